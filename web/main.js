// The page: which conversation is open, what runs, and how the parts hear of each other.
import { models } from "./api.js";
import { answer, words } from "./chat.js";
import { drawSight, wireComposer } from "./composer.js";
import { make } from "./dom.js";
import { t } from "./i18n.js";
import { bytes } from "./pictures.js";
import { applyAppearance, openSettings } from "./settings.js";
import * as store from "./store.js";
import { add, newConversation, path, titleOf, turn } from "./tree.js";
import { messageElement, progress, redraw } from "./view.js";

const $ = (id) => document.getElementById(id);
let all = [];
let open = newConversation(Date.now());
/// The answer that is being written: { controller, conversation, node }.
let running = null;
/// What each model can do, by its name.
const capabilities = new Map();

/// What the composer asks of images.
const sight = {
  // A model that says nothing of images is given the benefit of the doubt; the server has the last word.
  blind: () => (capabilities.get($("model").value)?.images === false ? t("noVision", { model: $("model").value }) : ""),
  kept: () => path(open).reduce((sum, { images }) => sum + bytes(images ?? []), 0),
};

const actions = {
  edit: (node, text) => ask(node.parent, text, node.images ?? []),
  regenerate: (node) => run(open, node.parent),
  turn: (node, step) => {
    turn(open, node, step);
    keep(open);
    drawLog();
  },
};

/// Adds a message below `parent` and asks for its answer; false while another answer is being written.
function ask(parent, text, images) {
  if (running || !$("model").value) return false;
  const node = add(open, parent, { role: "user", text, images });
  if (!open.title) open.title = titleOf(text || images[0]?.name || "");
  run(open, node.id);
  return true;
}

async function run(conversation, parent) {
  if (running) return;
  const node = add(conversation, parent, { role: "assistant", model: $("model").value, running: true });
  const controller = new AbortController();
  running = { controller, conversation, node };
  drawRunning();
  drawLog();
  scrollToEnd();
  await keep(conversation);
  await answer(conversation, node, controller.signal, () => grow(conversation, node));
  running = null;
  drawRunning();
  conversation.updated = Date.now();
  await keep(conversation);
  if (conversation === open) drawLog();
  $("announce").textContent = node.error ?? (node.finish === "stopped" ? t("stopped") : t("answered"));
}

/// Redraws a growing answer once a frame at most, and follows it while its end is in view.
let frame = 0;
function grow(conversation, node) {
  if (frame || conversation !== open) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    const article = $("log").querySelector(`[data-id="${node.id}"]`);
    if (!article || !node.running) return;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    redraw(article, node);
    drawRunning();
    if (atEnd) scrollToEnd();
  });
}

function stop() {
  running?.controller.abort();
}

function drawRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  const node = running?.node;
  $("state").textContent = !node ? "" : node.text || node.reasoning ? `${t("answering")}…` : progress(node);
}

function drawLog() {
  const shown = path(open);
  const elements = shown.map((node) => messageElement(open, node, actions));
  $("log").replaceChildren(...(elements.length ? elements : [make("p", { class: "empty" }, t("empty"))]));
  document.title = open.title ? `${open.title} · QwenKit` : "QwenKit";
}

function scrollToEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

function drawConversations() {
  const wanted = $("search").value.trim().toLowerCase();
  const fits = (conversation) =>
    conversation.title.toLowerCase().includes(wanted) || Object.values(conversation.nodes).some(({ text }) => text.toLowerCase().includes(wanted));
  $("conversations").replaceChildren(...all.filter(fits).map(conversationEntry));
}

function conversationEntry(conversation) {
  const current = conversation.id === open.id;
  const small = (key, sign, click) => make("button", { type: "button", class: "icon", title: t(key), "aria-label": `${t(key)}: ${conversation.title}`, click }, sign);
  return make("li", { class: current ? "current" : "" },
    make("button", { type: "button", class: "name", "aria-current": current ? "true" : null, click: () => show(conversation) }, conversation.title),
    small("rename", "✎", () => rename(conversation)),
    small("export", "⭳", () => exportConversation(conversation)),
    small("remove", "🗑", () => removeConversation(conversation)));
}

function show(conversation) {
  open = conversation;
  closeSidebar();
  drawConversations();
  drawLog();
  scrollToEnd();
  $("prompt").focus();
}

function startNew() {
  show(newConversation(Date.now()));
}

function rename(conversation) {
  const title = window.prompt(t("renameTo"), conversation.title)?.trim();
  if (!title) return;
  conversation.title = title;
  keep(conversation);
  drawLog();
}

function exportConversation(conversation) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(conversation, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: `${conversation.title || "conversation"}.json` }).click();
  URL.revokeObjectURL(url);
}

async function removeConversation(conversation) {
  if (!window.confirm(t("removeAsk", { title: conversation.title }))) return;
  if (running?.conversation === conversation) stop();
  all = all.filter((other) => other !== conversation);
  await store.remove(conversation.id).catch(complainOfStorage);
  if (conversation === open) startNew();
  else drawConversations();
}

/// Keeps a conversation that has something in it. A conversation that was deleted meanwhile stays deleted.
async function keep(conversation) {
  if (!path(conversation).length) return;
  if (!all.includes(conversation)) {
    if (conversation !== open) return;
    all.unshift(conversation);
  }
  drawConversations();
  await store.save(conversation).catch(complainOfStorage);
}

function complain(text) {
  // Said again, it is said once.
  for (const old of $("composer").querySelectorAll(".error")) if (old.dataset.text === text) old.remove();
  const note = make("p", { class: "error", role: "alert", "data-text": text }, text, make("button", { type: "button", class: "icon", "aria-label": t("close"), click: () => note.remove() }, "✕"));
  $("composer").prepend(note);
}

function complainOfStorage(error) {
  complain(t("storageFailed", { why: error?.message ?? "" }));
}

async function loadModels() {
  const select = $("model");
  try {
    const list = await models();
    const before = select.value || localStorage.getItem("model");
    for (const { id, capabilities: own } of list) capabilities.set(id, own);
    select.replaceChildren(...list.map(({ id }) => make("option", { value: id }, id)));
    if (list.some(({ id }) => id === before)) select.value = before;
    drawSight(sight.blind());
    if (!list.length) complain(t("noModels"));
  } catch (error) {
    complain(words(error));
  }
}

function openSidebar() {
  document.body.classList.add("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "true");
  $("close-sidebar").focus();
}

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  $("open-sidebar").setAttribute("aria-expanded", "false");
}

function wireKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.body.classList.contains("sidebar-open")) closeSidebar();
    else if (event.key === "Escape" && running && !$("settings").open) stop();
    else if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      startNew();
    } else if (event.key === "ArrowUp" && event.target === $("prompt") && !$("prompt").value && !running) {
      const last = [...$("log").querySelectorAll(".message.user")].at(-1);
      last?.querySelector(`button[aria-label="${CSS.escape(t("edit"))}"]`)?.click();
    }
  });
}

async function start() {
  applyAppearance();
  wireComposer((text, images) => ask(path(open).at(-1)?.id ?? "", text, images), complain, sight);
  wireKeys();
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", startNew);
  $("search").addEventListener("input", drawConversations);
  $("open-sidebar").addEventListener("click", openSidebar);
  $("close-sidebar").addEventListener("click", closeSidebar);
  $("model").addEventListener("change", () => {
    localStorage.setItem("model", $("model").value);
    drawSight(sight.blind());
  });
  $("open-settings").addEventListener("click", () => openSettings(() => {
    drawConversations();
    drawLog();
    loadModels();
  }));
  try {
    all = await store.conversations();
    for (const conversation of all) mend(conversation);
  } catch (error) {
    complainOfStorage(error);
  }
  // A reload comes back to where it was.
  if (all.length) open = all[0];
  drawConversations();
  drawLog();
  scrollToEnd();
  $("prompt").focus();
  await loadModels();
}

/// An answer that was being written when the page closed was stopped there.
function mend(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    if (node.running) Object.assign(node, { running: false, finish: "stopped" });
  }
}

start();
