// The network, in a thread of its own: noise, labels and guidance in, pixels out.

import * as ort from "onnxruntime-web/wasm";
import glue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import wasm from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

const absolute = (url) => new URL(url, self.location.href).href;
ort.env.wasm.wasmPaths = { mjs: absolute(glue), wasm: absolute(wasm) };
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

let session, shape;

/** Read a file, telling how much of it has come. */
async function download(url, size) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} could not be loaded (${response.status})`);
  const reader = response.body.getReader();
  const parts = [];
  let loaded = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    postMessage({ kind: "progress", loaded, size });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function load({ url, size, imageShape, guidance }) {
  await session?.release();
  session = undefined;
  shape = imageShape;
  const model = await download(url, size);
  postMessage({ kind: "preparing" });
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], graphOptimizationLevel: "all" });
  await sample({ noise: new Float32Array(shape[0] * shape[1] * shape[2]), labels: [0], steps: 1, guidance }); // the first run is slower
  return { threads: ort.env.wasm.numThreads };
}

/** From noise (B x C x H x W) at t = 1 to images at t = 0: z_r = z_t - (t - r) u, `steps` times. Returns RGBA bytes.
 * guidance: a scale, for a network that is told one. */
async function sample({ noise, labels, steps, guidance }) {
  const [channels, height, width] = shape;
  const start = performance.now();
  let z = new ort.Tensor("float32", noise, [labels.length, ...shape]);
  const label = new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]);
  const scalar = (value) => new ort.Tensor("float32", Float32Array.of(value), []);
  const told = guidance === undefined ? {} : { guidance: scalar(guidance) };
  for (let i = 0; i < steps; i++) {
    const result = await session.run({ z, t: scalar(1 - i / steps), r: scalar(1 - (i + 1) / steps), label, ...told });
    z = result.z_r;
  }
  const milliseconds = performance.now() - start;
  const x = z.data;
  const plane = height * width;
  const rgba = new Uint8ClampedArray(labels.length * plane * 4);
  for (let b = 0; b < labels.length; b++) {
    for (let i = 0; i < plane; i++) {
      for (let c = 0; c < 3; c++) {
        const value = x[(b * channels + (channels === 1 ? 0 : c)) * plane + i];
        rgba[(b * plane + i) * 4 + c] = Math.round((Math.min(1, Math.max(-1, value)) + 1) * 127.5);
      }
      rgba[(b * plane + i) * 4 + 3] = 255;
    }
  }
  return { rgba, milliseconds };
}

const tasks = { load, sample };
let last = Promise.resolve(); // one task at a time, in order

onmessage = ({ data: { id, task, ...request } }) => {
  last = last.then(async () => {
    try {
      postMessage({ kind: "done", id, result: await tasks[task](request) });
    } catch (error) {
      postMessage({ kind: "failed", id, message: String(error?.message ?? error) });
    }
  });
};
