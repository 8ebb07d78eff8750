// The settings dialog, and what of it goes into a request.
import { make } from "./dom.js";
import { locales, setLanguage, t, translate } from "./i18n.js";
import { apiKey, saveApiKey, saveSettings, settings } from "./store.js";

const NUMBERS = [
  ["temperature", 0, 2, 0.05],
  ["top_p", 0, 1, 0.01],
  ["top_k", 0, 1000, 1],
  ["min_p", 0, 1, 0.01],
  ["repetition_penalty", 0.1, 2, 0.05],
  ["max_tokens", 1, null, 1],
  ["seed", 0, null, 1],
];

/// The request's share of the settings; what is empty is left to the model.
export function requestOptions() {
  const values = settings();
  const options = {};
  for (const [name] of NUMBERS) {
    if (values[name] !== undefined && values[name] !== "") options[name] = Number(values[name]);
  }
  if (values.thinkingMode === "on") options.enable_thinking = true;
  if (values.thinkingMode === "off") options.enable_thinking = false;
  if (values.probabilities) Object.assign(options, { logprobs: true, top_logprobs: 5 });
  return options;
}

export function applyAppearance() {
  const { language, theme } = settings();
  setLanguage(language);
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  translate(document);
}

/// Opens the dialog; `changed` is called when it closes.
export function openSettings(changed) {
  const dialog = document.getElementById("settings");
  const draw = () => document.getElementById("fields").replaceChildren(...fields());
  document.getElementById("reset-settings").onclick = () => {
    saveSettings({ probabilities: true });
    draw();
  };
  dialog.onclose = () => {
    applyAppearance();
    changed();
  };
  draw();
  dialog.showModal();
}

function fields() {
  const values = settings();
  const keep = (name, value) => saveSettings({ ...settings(), [name]: value });
  const number = ([name, min, max, step]) => {
    const input = make("input", { id: `set-${name}`, type: "number", min, max, step, inputmode: "decimal", input: (event) => keep(name, event.target.value) });
    input.value = values[name] ?? "";
    return field(name, input);
  };
  const choice = (name, options) => {
    const select = make("select", { id: `set-${name}`, change: (event) => keep(name, event.target.value) }, options.map(([value, text]) => make("option", { value }, text)));
    select.value = values[name] ?? "";
    return field(name, select);
  };
  const system = make("textarea", { id: "set-systemPrompt", rows: 3, input: (event) => keep("systemPrompt", event.target.value) });
  system.value = values.systemPrompt ?? "";
  const probabilities = make("input", { id: "set-showProbabilities", type: "checkbox", change: (event) => keep("probabilities", event.target.checked) });
  probabilities.checked = values.probabilities;
  const key = make("input", { id: "set-apiKey", type: "password", autocomplete: "off", placeholder: t("apiKeyHint"), input: (event) => saveApiKey(event.target.value.trim()) });
  key.value = apiKey();
  return [
    field("systemPrompt", system, "whole"),
    ...NUMBERS.map(number),
    choice("thinkingMode", [["", t("thinkingAuto")], ["on", t("thinkingOn")], ["off", t("thinkingOff")]]),
    choice("language", [["", t("themeAuto")], ...Object.entries(locales).map(([code, words]) => [code, words.name])]),
    choice("theme", [["", t("themeAuto")], ["light", t("themeLight")], ["dark", t("themeDark")]]),
    field("apiKey", key),
    field("showProbabilities", probabilities),
  ];
}

function field(name, control, width = "") {
  return make("div", { class: `field ${width}` }, make("label", { for: control.id }, t(name)), control);
}
