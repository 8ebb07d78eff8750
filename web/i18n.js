// The words of the page in the reader's language: `t(key, values)`, and `translate(root)` for what the HTML marks.
import en from "./locales/en.js";
import hi from "./locales/hi.js";
import zh from "./locales/zh.js";

export const locales = { en, hi, zh };
let current = "en";

/// Takes `code`, or the first language of the browser that the page speaks.
export function setLanguage(code) {
  const wanted = code ? [code] : navigator.languages ?? [];
  current = wanted.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in locales) ?? "en";
  document.documentElement.lang = current;
}

export function t(key, values = {}) {
  const text = locales[current][key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/// A number as the reader writes it.
export function number(value, digits = 0) {
  return new Intl.NumberFormat(current, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
}

export function translate(root) {
  const set = (attribute, apply) => {
    for (const element of root.querySelectorAll(`[${attribute}]`)) apply(element, t(element.getAttribute(attribute)));
  };
  set("data-i18n", (element, text) => (element.textContent = text));
  set("data-i18n-placeholder", (element, text) => (element.placeholder = text));
  set("data-i18n-title", (element, text) => (element.title = text));
  set("data-i18n-label", (element, text) => {
    element.setAttribute("aria-label", text);
    if (element.tagName === "BUTTON") element.title = text;
  });
}
