// The field where people write, with its images: pasted, dropped or picked.
import { make } from "./dom.js";
import { number, t } from "./i18n.js";
import { bytes, picture, Refusal } from "./pictures.js";

/// Bytes of all images of a conversation: a request carries them all, and servers take 32 MB unless told otherwise.
const CONVERSATION_BYTES = 24 * 2 ** 20;

let attached = [];

/// Wires the composer; `send(text, images)` is called with what was written, `complain(text)` with what is wrong. `sight` says of
/// the model chosen: blind(), why it takes no images or ""; and of the conversation: kept(), the bytes of its images.
export function wireComposer(send, complain, sight) {
  const form = document.getElementById("composer");
  const prompt = document.getElementById("prompt");
  const picker = document.getElementById("images");
  const submit = () => {
    const text = prompt.value.trim();
    if (!text && !attached.length) return;
    if (attached.length && sight.blind()) return complain(sight.blind());
    if (!send(text, attached)) return;
    prompt.value = "";
    attached = [];
    drawAttached();
    fit(prompt);
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("input", () => fit(prompt));
  prompt.addEventListener("keydown", (event) => {
    // Enter while an input method composes a character belongs to the input method.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  prompt.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    attach(files, complain, sight);
  });
  // The button stays in reach where the model sees nothing, and says why.
  picker.addEventListener("click", (event) => {
    if (!sight.blind()) return;
    event.preventDefault();
    complain(sight.blind());
  });
  picker.addEventListener("change", async () => {
    await attach([...picker.files], complain, sight);
    picker.value = "";
    prompt.focus();
  });
  const hold = (on) => form.classList.toggle("dragging", on);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    hold([...(event.dataTransfer?.types ?? [])].includes("Files"));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? hold(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    hold(false);
    attach([...(event.dataTransfer?.files ?? [])], complain, sight);
  });
}

/// Shows whether images can be added: `why` not, or "".
export function drawSight(why) {
  const label = document.getElementById("attach");
  label.classList.toggle("off", Boolean(why));
  label.title = why || t("addImages");
  const picker = document.getElementById("images");
  picker.setAttribute("aria-disabled", String(Boolean(why)));
  document.getElementById("attach-why").textContent = why;
}

/// The field is as high as what stands in it, up to a third of the window.
function fit(prompt) {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight / 3)}px`;
}

async function attach(files, complain, sight) {
  if (!files.length) return;
  if (sight.blind()) return complain(sight.blind());
  for (const file of files) {
    try {
      const image = await picture(file);
      const size = sight.kept() + bytes(attached) + bytes([image]);
      if (size > CONVERSATION_BYTES) throw new Refusal("imagesTooLarge", { size, limit: CONVERSATION_BYTES });
      attached.push(image);
    } catch (error) {
      complain(words(error));
    }
  }
  drawAttached();
}

function words(error) {
  if (!(error instanceof Refusal)) return String(error?.message ?? error);
  const { name, size = 0, limit = 0 } = error.values;
  return t(error.key, { name, size: number(size / 2 ** 20, 1), limit: limit / 2 ** 20 });
}

function drawAttached() {
  const entry = (image) => {
    const drop = () => {
      attached = attached.filter((other) => other !== image);
      drawAttached();
      document.getElementById("prompt").focus();
    };
    const label = t("removeImage", { name: image.name });
    const sides = ({ width, height }) => `${number(width)} × ${number(height)}`;
    const scaled = image.from ? t("imageScaled", { from: sides(image.from), to: sides(image) }) : null;
    const note = scaled ? make("small", { class: "hint", title: scaled }, sides(image)) : null;
    return make("li", {}, make("img", { src: image.url, alt: image.name, title: scaled ?? image.name }), note, make("button", { type: "button", class: "icon", title: label, "aria-label": label, click: drop }, "✕"));
  };
  document.getElementById("attachments").replaceChildren(...attached.map(entry));
}
