// The page: choose, drag, look.

import { Engine } from "./engine.js";
import { gaussian, NoisePlane } from "./noise.js";
import { prepareOffline } from "./offline.js";
import { Plane } from "./plane.js";

const $ = (id) => document.getElementById(id);
const figures = [...document.querySelectorAll("figure")].map((figure) => ({
  steps: Number(figure.dataset.steps),
  canvas: figure.querySelector("canvas"),
  caption: figure.querySelector("figcaption"),
}));

let engine, models, model, noise, guidance, label = 0; // guidance stays undefined for a network that has it inside
let wanted = 0; // grows with every change; what is computed for an older one is not shown
let filling = false;

function say(text) {
  $("status").textContent = text;
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
const plane = new Plane($("plane"), $("point"), $("place"), () => changed());

const count = () => model.shape.reduce((a, b) => a * b);

function paint(canvas, rgba, index = 0) {
  const [, height, width] = model.shape;
  canvas.width = width;
  canvas.height = height;
  const part = rgba.subarray(index * width * height * 4, (index + 1) * width * height * 4);
  canvas.getContext("2d").putImageData(new ImageData(part, width, height), 0, 0);
}

/** The noise that the point stands for now. */
const here = () => noise.at(plane.x, plane.y);

let running = false;
/** Show what is wanted now: one step first, at each move; two and four when nothing newer is wanted. */
async function changed() {
  wanted++;
  if (running || filling || !model) return;
  running = true;
  try {
    for (let shown = 0; shown !== wanted; ) {
      shown = wanted;
      const z = here();
      for (const { steps, canvas, caption } of figures) {
        const { rgba, milliseconds } = await engine.ask("sample", { noise: z, labels: [label], steps, guidance });
        paint(canvas, rgba);
        caption.textContent = `${steps} step${steps > 1 ? "s" : ""} · ${milliseconds.toFixed(0)} ms`;
        demo.last = { ...demo.last, model: model.name, label, noise: z, guidance, [steps]: { rgba, milliseconds } };
        if (shown !== wanted) break;
      }
    }
  } catch (error) {
    say(`The network failed: ${error.message}`);
  } finally {
    running = false;
  }
}

function newNoise(seed) {
  $("seed").value = seed;
  noise = new NoisePlane(seed, count());
  changed();
}

function showClasses() {
  $("classes").hidden = model.classes.length < 2;
  $("classes").replaceChildren($("classes").querySelector("legend"));
  model.classes.forEach((name, i) => {
    const choice = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "class", value: i, checked: i === label });
    input.addEventListener("change", () => {
      label = i;
      changed();
    });
    choice.append(input, Object.assign(document.createElement("span"), { textContent: name }));
    $("classes").append(choice);
  });
}

function guide(scale) {
  guidance = scale;
  $("guidance").value = scale;
  $("scale").textContent = scale?.toFixed(2);
}

function showGuidance() {
  $("guiding").hidden = !model.guidance;
  if (model.guidance) [$("guidance").min, $("guidance").max] = model.guidance.range;
  guide(model.guidance?.usual);
}

async function choose(name) {
  model = undefined;
  filling = false;
  $("progress").hidden = false;
  $("hundred").hidden = true;
  const next = models.find((each) => each.name === name);
  const url = new URL(`models/${next.file}?sha256=${next.sha256}`, document.baseURI).href;
  const { threads } = await engine.ask("load", { url, size: next.bytes, imageShape: next.shape, guidance: next.guidance?.usual });
  model = next;
  label = 0;
  $("progress").hidden = true;
  $("stage").hidden = false;
  say(`${next.network}, ${megabytes(next.bytes)} MB, ${threads} thread${threads > 1 ? "s" : ""}. Ready.`);
  showClasses();
  showGuidance();
  newNoise(Number($("seed").value));
}

/** Ten of each class, a row at a time, so that the page stays quick. */
async function fillGrid() {
  filling = true;
  const [from, perRow, rows] = [model, 10, 10];
  $("hundred").hidden = false;
  $("stop").disabled = false;
  $("counted").textContent = "0 images";
  const cells = Array.from({ length: rows * perRow }, () => document.createElement("canvas"));
  $("grid").replaceChildren(...cells);
  const all = gaussian(Number($("seed").value), rows * perRow * count());
  let [done, milliseconds] = [0, 0];
  for (let row = 0; row < rows && filling; row++) {
    const labels = Array(perRow).fill(from.classes.length ? row % from.classes.length : 0);
    const z = all.slice(row * perRow * count(), (row + 1) * perRow * count());
    const result = await engine.ask("sample", { noise: z, labels, steps: 1, guidance });
    if (model !== from) return;
    labels.forEach((_, i) => paint(cells[row * perRow + i], result.rgba, i));
    done += perRow;
    milliseconds += result.milliseconds;
    $("counted").textContent = `${done} images in 1 step each, ${(milliseconds / 1000).toFixed(2)} s`;
  }
  filling = false;
  $("stop").disabled = true;
  changed();
}

async function start() {
  await prepareOffline();
  engine = new Engine({ // only now, so that its file comes through the service worker, which keeps it
    onprogress({ loaded, size }) {
      $("progress").value = loaded / size;
      say(`Loading the network: ${megabytes(loaded)} of ${megabytes(size)} MB`);
    },
    onpreparing: () => say("Preparing the network …"),
  });
  const response = await fetch("models/models.json").catch(() => undefined);
  if (!response?.ok || !/json/.test(response.headers.get("content-type") ?? "")) {
    throw new Error("there are no models beside this page; make them with: python -m demo.prepare");
  }
  models = await response.json();
  $("model").replaceChildren(...models.map(({ name }) => new Option(name, name)));
  $("model-label").hidden = models.length < 2;
  $("model").addEventListener("change", () => choose($("model").value).catch(fail));
  $("seed").addEventListener("change", () => newNoise(Number($("seed").value) >>> 0));
  $("guidance").addEventListener("input", () => {
    guide(Number($("guidance").value));
    changed();
  });
  $("again").addEventListener("click", () => newNoise(crypto.getRandomValues(new Uint32Array(1))[0] % 100000));
  $("fill").addEventListener("click", () => !filling && fillGrid().catch(fail));
  $("stop").addEventListener("click", () => (filling = false));
  await choose(models[0].name);
}

function fail(error) {
  $("progress").hidden = true;
  say(`This cannot run here: ${error.message}`);
}

/** What the last images were made of; test.mjs compares them with Python's. */
const demo = (window.demo = { last: {}, isQuiet: () => model !== undefined && !running && !filling });
start().catch(fail);
