// The built page in headless Chromium, used as a visitor would, and its images compared with PyTorch's.
//
//   npm --prefix demo test                  CHROMIUM: the browser; PYTHON: the Python; SHOTS: a folder for screenshots

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";
import { preview } from "vite";

const here = dirname(fileURLToPath(import.meta.url));
const root = dirname(here);
const models = JSON.parse(readFileSync(join(here, "dist/models/models.json")));
const checkpoints = process.env.CHECKPOINTS?.split(":") ?? models.map(({ name }) => join(root, `checkpoints/student-${name}.safetensors`));
const environment = join(root, ".venv/bin/python");         // what uv made
const python = process.env.PYTHON ?? (existsSync(environment) ? environment : "python");
const shots = process.env.SHOTS;
const temporary = mkdtempSync(join(tmpdir(), "demo-"));

const server = await preview({ root: here, preview: { port: 0, strictPort: false, open: false }, logLevel: "error" });
const address = server.resolvedUrls.local[0];
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync"],
});
const context = await browser.newContext({ viewport: { width: 1100, height: 900 } });
const page = await context.newPage();
const problems = [];
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
page.on("pageerror", (error) => problems.push(String(error)));
context.on("request", (request) => {
  if (!/^(data|blob):/.test(request.url()) && !request.url().startsWith(address)) problems.push(`request to ${request.url()}`);
});

const quiet = (on = page) => on.waitForFunction(() => window.demo?.isQuiet() && window.demo.last[4], null, { timeout: 120_000 });
const choose = async (name) => {
  await page.selectOption("#model", name);
  await page.waitForFunction((wanted) => window.demo.isQuiet() && window.demo.last.model === wanted, name, { timeout: 120_000 });
  await quiet();
};
const image = (steps) => page.$eval(`figure[data-steps="${steps}"] canvas`, (canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return [...data];
});
const shot = (name, on = page) => shots && on.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
const step = (text) => console.log(`ok  ${text}`);

try {
  await page.goto(address);
  await quiet();
  assert.ok(await page.evaluate(() => self.crossOriginIsolated), "the page is not isolated: no threads");
  assert.match(await page.textContent("#status"), /MB, \d+ threads?\. Ready\./);
  step(`loads: ${await page.textContent("#status")}`);
  await shot("desktop");

  const first = await image(1);
  assert.ok(new Set(first).size > 10, "an empty image");
  await page.locator("#classes label").nth(7).click();
  await quiet();
  assert.equal(await page.evaluate(() => window.demo.last.label), 7);
  const seven = await image(1);
  assert.notDeepEqual(seven, first);
  step("another class, another image");

  const box = await page.locator("#plane").boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  await page.mouse.down();
  const seen = new Set();
  for (let i = 1; i <= 8; i++) {
    await page.mouse.move(box.x + box.width * (0.5 + 0.05 * i), box.y + box.height * (0.5 - 0.04 * i));
    await quiet();
    seen.add(String(await image(1)));
  }
  await page.mouse.up();
  assert.equal(seen.size, 8, "the image does not follow the point");
  assert.equal(await page.textContent("#place"), "noise at 0.80, 0.64");
  step("the image follows the point");

  await page.locator("#plane").focus();
  await page.keyboard.press("ArrowLeft");
  await page.keyboard.press("Shift+ArrowDown");
  await quiet();
  assert.equal(await page.textContent("#place"), "noise at 0.76, 0.44");
  assert.ok(!seen.has(String(await image(1))));
  step("arrow keys move it");

  await page.fill("#seed", "5");
  await page.keyboard.press("Enter");
  await quiet();
  const five = await image(1);
  await page.click("#again");
  await quiet();
  assert.notDeepEqual(await image(1), five);
  await page.fill("#seed", "5");
  await page.keyboard.press("Enter");
  await quiet();
  assert.deepEqual(await image(1), five);
  step("a seed is a noise");

  const guided = async (scale) => {
    await page.fill("#guidance", String(scale));
    await quiet();
    return image(1);
  };
  const told = models[0].guidance;
  if (told) {
    const usual = await image(1);
    assert.equal(await page.textContent("#scale"), told.usual.toFixed(2));
    assert.notDeepEqual(await guided(told.range[1]), usual);
    assert.deepEqual(await guided(told.usual), usual);
    step("more guidance, another image");
  }
  assert.equal(await page.isVisible("#guidance"), Boolean(told));

  for (const [i, { name, guidance }] of models.entries()) {
    if (i) await choose(name);
    for (const [place, chosen] of [[[0.2, 0.3], 0], [[0.9, 0.6], 3]]) {
      await page.locator("#classes label").nth(chosen).click();
      if (guidance && chosen) await guided(guidance.range[1]);
      const area = await page.locator("#plane").boundingBox();
      await page.mouse.click(area.x + area.width * place[0], area.y + area.height * place[1]);
      await quiet();
      const noise = await page.evaluate(() => [...window.demo.last.noise]);
      const mean = noise.reduce((a, b) => a + b) / noise.length;
      const deviation = Math.sqrt(noise.reduce((a, b) => a + (b - mean) ** 2, 0) / noise.length);
      assert.ok(Math.abs(mean) < 0.15 && Math.abs(deviation - 1) < 0.15, `noise of mean ${mean} and deviation ${deviation}`);
      const images = { 1: await image(1), 2: await image(2), 4: await image(4) };
      const file = join(temporary, "page.json");
      writeFileSync(file, JSON.stringify({ label: chosen, noise, images, guidance: await page.evaluate(() => window.demo.last.guidance) }));
      const printed = execFileSync(python, ["-m", "demo.reference", checkpoints[i], file], { cwd: root });
      const worst = JSON.parse(printed);
      step(`${name}, class ${chosen}: grey levels from PyTorch's image at 1, 2, 4 steps: ${Object.values(worst).join(", ")}`);
      assert.ok(Math.max(...Object.values(worst)) <= 2);
    }
    const times = await page.evaluate(async () => {
      const milliseconds = [];
      const plane = document.getElementById("plane");
      for (let i = 0; i < 21; i++) {
        plane.dispatchEvent(new KeyboardEvent("keydown", { key: i % 2 ? "ArrowLeft" : "ArrowRight" }));
        await new Promise((resolve) => {
          const poll = () => (window.demo.isQuiet() ? resolve() : setTimeout(poll, 5));
          poll();
        });
        milliseconds.push(window.demo.last[1].milliseconds);
      }
      return milliseconds.sort((a, b) => a - b);
    });
    step(`${name}: one step takes ${times[10].toFixed(1)} ms (median of 21, ${times[0].toFixed(1)} to ${times[20].toFixed(1)})`);
    assert.ok(times[10] < 2000);
    await shot(`model-${name}`);
  }

  await page.reload();                                      // the point, class and guidance as at first
  await page.waitForFunction(() => window.demo?.isQuiet(), null, { timeout: 120_000 });
  await choose(models.at(-1).name);
  await page.click("#fill");
  await page.waitForFunction(() => window.demo.isQuiet(), null, { timeout: 120_000 });
  assert.match(await page.textContent("#counted"), /^100 images in 1 step each/);
  const cells = await page.$$eval("#grid canvas", (all) => all.map((canvas) => canvas.toDataURL()));
  assert.equal(new Set(cells).size, 100);
  step(`grid: ${await page.textContent("#counted")}`);
  await shot("grid");
  await page.click("#fill");
  await page.click("#stop");
  await page.waitForFunction(() => window.demo.isQuiet(), null, { timeout: 60_000 });
  assert.doesNotMatch(await page.textContent("#counted"), /^100 images/);
  step("the grid can be stopped");

  await context.setOffline(true);
  await page.reload();
  await quiet();
  assert.ok(new Set(await image(1)).size > 10);
  await context.setOffline(false);
  step("works offline after the first visit");

  const phone = await browser.newContext({ viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true, colorScheme: "dark" });
  const small = await phone.newPage();
  await small.goto(address);
  await quiet(small);
  assert.equal(await small.evaluate(() => document.documentElement.scrollWidth), 360, "scrolls sideways on a phone");
  const before = await small.textContent("#place");
  const touch = await small.locator("#plane").boundingBox();
  await small.touchscreen.tap(touch.x + touch.width * 0.25, touch.y + touch.height * 0.25);
  await quiet(small);
  assert.notEqual(await small.textContent("#place"), before);
  await shot("phone", small);
  step("a finger moves it; a phone shows all of it");

  const bare = await browser.newContext();
  await bare.route("**/models.json", (route) => route.fulfill({ status: 404, body: "" }));
  const empty = await bare.newPage();
  await empty.addInitScript(() => delete Navigator.prototype.serviceWorker);
  await empty.goto(address);
  await empty.waitForFunction(() => /cannot run here/.test(document.getElementById("status").textContent));
  assert.match(await empty.textContent("#status"), /no models beside this page.*demo\.prepare/);
  step("says what is missing");
  assert.deepEqual(problems, []);
  step("no error, and no request to anyone else");
} finally {
  await browser.close();
  await server.close();
}
