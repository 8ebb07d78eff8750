// The field where people write, with its images: pasted, dropped or picked.
import { make } from "./dom.js";
import { number, t } from "./i18n.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
/// Bytes of an image file; the server has its own limit.
const MOST_BYTES = 20 * 1024 * 1024;

let attached = [];

/// Wires the composer; `send(text, images)` is called with what was written, `complain(text)` with what is wrong.
export function wireComposer(send, complain) {
  const form = document.getElementById("composer");
  const prompt = document.getElementById("prompt");
  const picker = document.getElementById("images");
  const submit = () => {
    const text = prompt.value.trim();
    if (!text && !attached.length) return;
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
    attach(files, complain);
  });
  picker.addEventListener("change", async () => {
    await attach([...picker.files], complain);
    picker.value = "";
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    attach([...(event.dataTransfer?.files ?? [])], complain);
  });
}

/// The field is as high as what stands in it, up to a third of the window.
function fit(prompt) {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight / 3)}px`;
}

async function attach(files, complain) {
  for (const file of files) {
    if (!TYPES.includes(file.type)) complain(t("notAnImage", { name: file.name }));
    else if (file.size > MOST_BYTES) complain(t("imageTooLarge", { name: file.name, size: number(file.size / 2 ** 20, 1), limit: MOST_BYTES / 2 ** 20 }));
    else attached.push({ name: file.name, url: await dataUrl(file) });
  }
  drawAttached();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function drawAttached() {
  const entry = (image) => {
    const drop = () => {
      attached = attached.filter((other) => other !== image);
      drawAttached();
      document.getElementById("prompt").focus();
    };
    const label = t("removeImage", { name: image.name });
    return make("li", {}, make("img", { src: image.url, alt: image.name }), make("button", { type: "button", class: "icon", title: label, "aria-label": label, click: drop }, "✕"));
  };
  document.getElementById("attachments").replaceChildren(...attached.map(entry));
}
