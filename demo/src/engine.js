// The worker as promises.

export class Engine {
  /** onprogress({ loaded, size }) while a file comes, onpreparing() when it is there. */
  constructor({ onprogress, onpreparing }) {
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.waiting = new Map();
    this.count = 0;
    this.worker.onmessage = ({ data }) => {
      if (data.kind === "progress") onprogress(data);
      else if (data.kind === "preparing") onpreparing();
      else {
        const { resolve, reject } = this.waiting.get(data.id);
        this.waiting.delete(data.id);
        if (data.kind === "done") resolve(data.result);
        else reject(new Error(data.message));
      }
    };
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(event.message || "the worker could not start"));
      this.waiting.clear();
    };
  }

  ask(task, request) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, ...request });
    });
  }
}
