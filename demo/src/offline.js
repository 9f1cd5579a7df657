// Register the service worker and wait until it answers for this page.

/** Resolves when the page is kept for offline use and isolated, or at once where there are no service workers. */
export async function prepareOffline() {
  if (!("serviceWorker" in navigator) || import.meta.env.DEV) return;
  const container = navigator.serviceWorker;
  await container.register("./sw.js");
  await container.ready;
  if (!container.controller) await new Promise((resolve) => container.addEventListener("controllerchange", resolve, { once: true }));
  if (!self.crossOriginIsolated && !sessionStorage.getItem("isolated")) {
    sessionStorage.setItem("isolated", "tried"); // once: the headers come with the next load
    location.reload();
    await new Promise(() => {});
  }
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  const keep = [location.href.split("#")[0], ...loaded].filter((url) => new URL(url).origin === location.origin);
  const kept = new Promise((resolve) => container.addEventListener("message", resolve, { once: true }));
  container.controller.postMessage({ keep: [...new Set(keep)] });
  await kept;
}
