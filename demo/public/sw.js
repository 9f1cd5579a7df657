// Makes the page work offline, and isolates it (for threads) on hosts that cannot set headers.

const CACHE = "splitmeanflow-demo-1";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

/** The response with the two headers that WebAssembly's threads need. */
function isolated(response) {
  if (response.status !== 200) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(response.body, { status: 200, statusText: response.statusText, headers });
}

async function fetchAndKeep(request) {
  const response = await fetch(request);
  if (response.status === 200) (await caches.open(CACHE)).put(request, response.clone());
  return response;
}

async function answer(request) {
  const named = new URL(request.url);
  // These names change with their contents: what is kept is right. Everything else is asked for anew while there is a network.
  if (/\/assets\//.test(named.pathname) || named.searchParams.has("sha256")) {
    return isolated((await caches.match(request, { ignoreVary: true })) ?? (await fetchAndKeep(request)));
  }
  try {
    return isolated(await fetchAndKeep(request));
  } catch (error) {
    const kept = await caches.match(request, { ignoreVary: true, ignoreSearch: request.mode === "navigate" });
    if (kept) return isolated(kept);
    throw error;
  }
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === self.location.origin) event.respondWith(answer(request));
});

// What the page had loaded before this worker was there.
self.addEventListener("message", (event) => {
  const keep = async () => {
    const cache = await caches.open(CACHE);
    await Promise.all(event.data.keep.map(async (url) => (await cache.match(url)) ?? cache.add(url)));
    event.source.postMessage({ kept: event.data.keep.length });
  };
  event.waitUntil(keep());
});
