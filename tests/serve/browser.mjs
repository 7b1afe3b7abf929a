// A person at the page: `node browser.mjs URL SHOT WIDTH SCHEME FILE...` chooses files and prints what the page then says, as JSON.
import {chromium} from "playwright-core";

const [url, shot, width, colorScheme, ...files] = process.argv.slice(2);
const browser = await chromium.launch({executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]});
const page = await browser.newPage({viewport: {width: Number(width), height: 900}, colorScheme});
const faults = [], requests = [];
page.on("pageerror", error => faults.push(error.message));
page.on("request", request => requests.push(`${request.method()} ${request.url()}`));
await page.goto(url);
const reached = [];  // by the Tab key, with a visible outline
for (let i = 0; i < 3; i++) {
  await page.keyboard.press("Tab");
  reached.push(await page.evaluate(() => [document.activeElement.textContent.trim(), getComputedStyle(document.activeElement).outlineStyle]));
}
const results = count => page.waitForFunction(n => document.querySelectorAll(".result .found, .result .error").length === n, count, {timeout: 300000});
if (await page.isVisible("#heat")) await page.check("#heat");
await page.setInputFiles("#files", files);
await results(files.length);
const found = await page.$$eval(".result", entries => entries.map(entry => ({
  name: entry.querySelector("h2").textContent,
  error: entry.querySelector(".error")?.textContent ?? null,
  lines: [...entry.querySelectorAll(".found li")].map(line => [line.querySelector(".name")?.textContent ?? line.textContent, line.querySelector(".share")?.textContent ?? null]),
  picture: entry.querySelector("canvas").ariaLabel,
  heat: entry.querySelector(".heat")?.naturalWidth ?? 0,
  pixels: entry.querySelector("canvas").toDataURL(),
})));
const objects = await page.$$eval(".result", entries => Promise.all(entries.map(async ({answer}) => ({
  objects: answer?.objects ?? [],
  masks: await Promise.all((answer?.masks ?? []).map(async ({left, top, png}) => {
    const picture = await overlay(png), canvas = element("canvas", {width: picture.width, height: picture.height});
    canvas.getContext("2d").drawImage(picture, 0, 0);
    return {left, top, png: canvas.toDataURL()};
  })),
}))));
const said = await page.textContent("[aria-live]");
await page.screenshot({path: shot, fullPage: true});
const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
await page.click("#camera");
await page.waitForSelector("#live:not([hidden])");
await page.click("#shoot");
await results(files.length + 1);
await page.click("#stop");
const camera = await page.textContent(".result h2");
const about = await page.textContent("#about");
const ground = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
await page.click(".result .close");
const left = await page.locator(".result").count();
await browser.close();
console.log(JSON.stringify({reached, found: found.map((entry, i) => ({...entry, ...objects[i]})).reverse(), said, overflow, camera, about, ground, left, faults, requests}));
