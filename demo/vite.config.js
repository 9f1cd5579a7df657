import { defineConfig } from "vite";

// Threads of WebAssembly need a page that is isolated from others; public/sw.js sets the same headers on hosts that cannot.
const headers = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

export default defineConfig({
  base: "./",
  build: { target: "es2022", assetsInlineLimit: 0 },
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
  worker: { format: "es" },
  server: { headers },
  preview: { headers },
});
