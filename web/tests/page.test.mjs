// The page in a real browser against a running server.
//   QWENKIT_BASE   where the server is, with a chat model that reads text only
//   QWENKIT_VISION its model that sees images
//   CHROMIUM       the browser (default /usr/bin/chromium)
//   SCREENSHOTS    a folder for pictures of the page; none are made without it
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const base = process.env.QWENKIT_BASE;
assert.ok(base, "QWENKIT_BASE says where the server is");
const vision = process.env.QWENKIT_VISION;
assert.ok(vision, "QWENKIT_VISION names the model that sees");
let browser;

before(async () => {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
});
after(() => browser?.close());

/// A fresh visitor. What leaves the server's origin, and what the page complains of in the console, fails the test.
async function visit(options = {}) {
  const context = await browser.newContext({ locale: "en-GB", ...options });
  const page = await context.newPage();
  // The same answers each time.
  await page.addInitScript(() => localStorage.getItem("settings") ?? localStorage.setItem("settings", JSON.stringify({ temperature: 0 })));
  const faults = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(base) && !/^(data|blob):/.test(request.url())) faults.push(`request to ${request.url()}`);
  });
  page.on("pageerror", (error) => faults.push(`error ${error.message}`));
  page.on("dialog", (dialog) => faults.push(`dialog ${dialog.message()}`) && dialog.dismiss());
  await page.goto(base);
  await page.waitForFunction(() => document.querySelector("#model").value);
  return { page, context, faults };
}

async function say(page, text) {
  await page.fill("#prompt", text);
  await page.keyboard.press("Enter");
}

const answered = (page, count = 1) =>
  page.waitForFunction((n) => document.querySelectorAll(".message.assistant:not(.running)").length >= n && !document.querySelector(".message.running"), count, { timeout: 90000 });

/// An answer that the test makes up.
async function answerWith(page, pieces, status = 200) {
  await page.route("**/v1/chat/completions", (route) => {
    if (status !== 200) return route.fulfill({ status, contentType: "application/json", body: JSON.stringify(pieces) });
    const chunk = (delta, finish = null) => `data: ${JSON.stringify({ id: "x", choices: [{ index: 0, delta, finish_reason: finish }] })}\n\n`;
    const body = pieces.map((content) => chunk({ content })).join("") + chunk({}, "stop") + "data: [DONE]\n\n";
    return route.fulfill({ status: 200, contentType: "text/event-stream", body });
  });
}

async function picture(page, name) {
  if (process.env.SCREENSHOTS) await page.screenshot({ path: `${process.env.SCREENSHOTS}/${name}.png` });
}

test("a chat streams Markdown with code, shows model and speed, and survives a reload", async () => {
  const { page, faults } = await visit();
  await say(page, "Write a Python function that reverses a string. Answer briefly.");
  await answered(page);
  const answer = page.locator(".message.assistant");
  assert.ok((await answer.locator(".markdown").innerText()).includes("def "));
  assert.ok(await answer.locator(".markdown pre").count(), "code is a block of code");
  assert.match(await answer.locator(".stats").innerText(), /token/);
  await picture(page, "page-light");
  const text = await answer.locator(".markdown").innerText();
  await page.reload();
  await page.waitForSelector(".message.assistant");
  assert.equal(await page.locator(".message.assistant .markdown").innerText(), text);
  await page.emulateMedia({ colorScheme: "dark" });
  await picture(page, "page-dark");
  const background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const [red] = background.match(/\d+/g).map(Number);
  assert.ok(red < 80, `dark is dark: ${background}`);
  await page.setViewportSize({ width: 390, height: 800 });
  // The sidebar has gone when its movement has ended.
  await page.waitForFunction(() => document.querySelector("#sidebar").getBoundingClientRect().right <= 0);
  await picture(page, "page-phone");
  assert.deepEqual(faults, []);
});

test("an answer is stopped, asked for again, and its question edited", async () => {
  const { page, faults } = await visit();
  await say(page, "Count from 1 to 500, one number a line.");
  await page.waitForFunction(() => document.querySelector(".message.running .markdown")?.textContent.length > 20, null, { timeout: 60000 });
  await page.click("#stop");
  await answered(page);
  const stopped = await page.locator(".message.assistant .markdown").innerText();
  assert.ok(stopped.length > 10 && !stopped.includes("\n400\n"));
  assert.ok(await page.locator("#send").isVisible());
  await answerWith(page, ["second ", "answer"]);
  await page.click('.message.assistant button[aria-label="Regenerate"], .message.assistant button[aria-label="Answer again"]');
  await page.waitForFunction(() => document.querySelector(".message.assistant .markdown")?.textContent.includes("second answer"));
  assert.ok((await page.locator(".message.assistant .tools").innerText()).includes("2/2"));
  await page.locator(".message.user .tools button").last().click();
  await page.fill(".editor textarea", "Something else");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector(".message.user .plain")?.textContent === "Something else");
  await answered(page);
  assert.deepEqual(faults, []);
});

/// Puts files into a paste or a drop, as the browser would.
async function give(page, how, files) {
  await page.evaluate(async ([how, files]) => {
    const data = new DataTransfer();
    for (const { name, type, base64 } of files) data.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], name, { type }));
    if (how === "paste") document.querySelector("#prompt").dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
    else document.querySelector("#log").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
  }, [how, files]);
}

const photo = readFileSync(new URL("../../fixtures/images/photo.png", import.meta.url));
const asFile = (name, buffer = photo, type = "image/png") => ({ name, type, base64: buffer.toString("base64") });
const thumbnails = (page, count) => page.waitForFunction((n) => document.querySelectorAll("#attachments img").length === n, count);

/// A visitor who talks with the model that sees.
async function visitWithVision(options) {
  const visitor = await visit(options);
  await visitor.page.selectOption("#model", vision);
  return visitor;
}

test("an image is shown to a model that sees, and stays with its conversation", async () => {
  const { page, faults } = await visitWithVision();
  const sent = [];
  page.on("request", (request) => request.url().endsWith("/v1/chat/completions") && sent.push(request.postDataJSON()));
  await page.evaluate(() => localStorage.setItem("settings", JSON.stringify({ temperature: 0, max_tokens: 8 })));
  await page.setInputFiles("#images", { name: "photo.png", mimeType: "image/png", buffer: photo });
  await thumbnails(page, 1);
  await picture(page, "page-image");
  await say(page, "What is this?");
  await answered(page);
  const part = sent[0].messages.at(-1).content.find(({ type }) => type === "image_url");
  assert.equal(part.image_url.url, `data:image/png;base64,${photo.toString("base64")}`);
  assert.equal(await page.locator(".message.assistant [role=alert]").count(), 0, await page.locator(".message.assistant").innerText());
  assert.equal(await page.locator("#attachments img").count(), 0, "what was sent is not sent again");
  await page.reload();
  await page.waitForSelector(".message.user img");
  assert.ok(await page.locator(".message.user img").evaluate((image) => image.complete && image.naturalWidth === 252));
  // The next question carries the image along.
  await page.waitForFunction((name) => document.querySelector("#model").value === name, vision);
  await say(page, "And now?");
  await answered(page, 2);
  assert.equal(sent.at(-1).messages[0].content[0].type, "image_url");
  assert.deepEqual(faults, []);
});

test("images are pasted and dropped, taken away by key, and scaled down where they are large", async () => {
  const { page, faults } = await visitWithVision({ viewport: { width: 390, height: 800 } });
  await give(page, "paste", [asFile("pasted.png")]);
  await thumbnails(page, 1);
  await give(page, "drop", [asFile("a.png"), asFile("b.png")]);
  await thumbnails(page, 3);
  await page.locator('#attachments button[aria-label="Remove image pasted.png"]').focus();
  await page.keyboard.press("Enter");
  await thumbnails(page, 2);
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= document.documentElement.clientWidth), "a phone's width is enough");
  for (const [file, told] of [
    [asFile("notes.txt", Buffer.from("hello"), "text/plain"), "notes.txt is not a PNG"],
    [asFile("broken.png", photo.subarray(0, 60)), "broken.png cannot be read"],
  ]) {
    await give(page, "drop", [file]);
    await page.waitForFunction((told) => document.querySelector("#composer [role=alert]")?.textContent.includes(told), told);
    await page.locator("#composer [role=alert] button").first().click();
  }
  const large = await page.evaluate(async () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 4096, height: 1024 });
    canvas.getContext("2d").fillRect(10, 10, 100, 100);
    return canvas.toDataURL("image/png").split(",")[1];
  });
  await give(page, "drop", [asFile("large.png", Buffer.from(large, "base64"))]);
  await thumbnails(page, 3);
  assert.match(await page.locator("#attachments small").innerText(), /2,048 × 512/);
  let sent;
  await page.route("**/v1/chat/completions", (route) => {
    sent = route.request().postDataJSON();
    return route.fulfill({ status: 200, contentType: "text/event-stream", body: 'data: {"choices":[{"index":0,"delta":{"content":"seen"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n' });
  });
  // An image needs no words.
  await page.focus("#prompt");
  await page.keyboard.press("Enter");
  await answered(page);
  const urls = sent.messages[0].content.filter(({ type }) => type === "image_url").map(({ image_url }) => image_url.url);
  assert.deepEqual(urls.map((url) => url.slice(0, 15)), ["data:image/png;", "data:image/png;", "data:image/jpeg"]);
  assert.deepEqual(faults, []);
});

test("a model that reads text only says so, to pointer, key and drop", async () => {
  const { page, faults } = await visit();
  const told = async () => {
    await page.waitForFunction(() => /does not see images/.test(document.querySelector("#composer [role=alert]")?.textContent));
    assert.equal(await page.locator("#composer [role=alert]").count(), 1);
    await page.locator("#composer [role=alert] button").click();
  };
  assert.equal(await page.locator("#images").getAttribute("aria-disabled"), "true");
  assert.match(await page.locator("#attach").getAttribute("title"), /does not see images/);
  await page.click("#attach", { force: true });
  await page.click("#attach", { force: true });
  await told();
  await page.focus("#images");
  await page.keyboard.press("Space");
  await told();
  await give(page, "drop", [asFile("photo.png")]);
  await told();
  assert.equal(await page.locator("#attachments img").count(), 0);
  // An image that was chosen for another model is not sent to this one.
  await page.selectOption("#model", vision);
  assert.equal(await page.locator("#images").getAttribute("aria-disabled"), "false");
  await give(page, "paste", [asFile("photo.png")]);
  await thumbnails(page, 1);
  await page.selectOption("#model", { index: 0 });
  await say(page, "What is this?");
  await told();
  assert.equal(await page.locator(".message").count(), 0);
  assert.equal(await page.inputValue("#prompt"), "What is this?");
  assert.deepEqual(faults, []);
});

test("an error is shown in words, and the question is not lost", async () => {
  const { page, faults } = await visit();
  await answerWith(page, { error: { message: "the prompt has 9000 tokens and the context holds 4096", type: "invalid_request_error" } }, 400);
  await say(page, "A very long question");
  await page.waitForSelector('.message.assistant [role="alert"]');
  assert.ok((await page.locator('.message.assistant [role="alert"]').innerText()).includes("9000 tokens"));
  assert.ok((await page.locator(".message.user").innerText()).includes("A very long question"));
  assert.deepEqual(faults, []);
});

test("what a model writes never becomes more than text", async () => {
  const { page, faults } = await visit();
  await answerWith(page, [
    "<script>alert(1)</script> <img src=x onerror=alert(2)> [a](javascript:alert(3)) [b](data:text/html,x) ",
    "![c](https://example.com/pixel.png) <iframe src='https://example.com'></iframe> [good](https://example.com/)\n\n```html\n<script>alert(4)</script>\n```",
  ]);
  await say(page, "Be evil");
  await answered(page);
  const found = await page.evaluate(() => {
    const body = document.querySelector(".message.assistant .markdown");
    return {
      elements: [...body.querySelectorAll("script, iframe, img, object, [onerror]")].map(({ tagName }) => tagName),
      links: [...body.querySelectorAll("a")].map(({ href, rel }) => [href, rel]),
      text: body.textContent,
    };
  });
  assert.deepEqual(found.elements, []);
  assert.ok(found.links.every(([href, rel]) => /^https?:/.test(href) && rel.includes("noopener")), JSON.stringify(found.links));
  assert.ok(found.text.includes("<script>alert(1)</script>"));
  assert.deepEqual(faults, []);
});

test("everything has a name, keys reach it, and a phone's width is enough", async () => {
  const { page, faults } = await visit({ viewport: { width: 360, height: 700 } });
  await answerWith(page, ["short ", "| a | b |\n|---|---|\n| 1 | 2 |\n\n`" + "long".repeat(200) + "`"]);
  await say(page, "Hello");
  await answered(page);
  const report = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    nameless: [...document.querySelectorAll("button, input, select, textarea")]
      .filter((element) => element.checkVisibility?.() ?? true)
      .filter((element) => !(element.getAttribute("aria-label") || element.textContent.trim() || element.labels?.length || element.title))
      .map((element) => element.outerHTML.slice(0, 120)),
  }));
  assert.deepEqual(report, { wide: false, nameless: [] });
  await page.keyboard.press("Tab");
  const outline = await page.evaluate(() => {
    const style = getComputedStyle(document.activeElement);
    return style.outlineStyle !== "none" || style.boxShadow !== "none";
  });
  assert.ok(outline, "what has the focus shows it");
  assert.deepEqual(faults, []);
});

test("the page speaks English, Hindi and Chinese", async () => {
  const texts = new Set();
  for (const locale of ["en-GB", "hi-IN", "zh-CN"]) {
    const { page, context, faults } = await visit({ locale });
    texts.add(await page.locator("#new-chat").innerText());
    assert.equal((await page.evaluate(() => document.documentElement.lang)).slice(0, 2), locale.slice(0, 2));
    assert.deepEqual(faults, []);
    await context.close();
  }
  assert.equal(texts.size, 3, [...texts].join());
});
