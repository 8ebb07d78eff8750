// Conversations and settings, kept in this browser: conversations with their images in IndexedDB, settings in localStorage, the
// API key in this tab's sessionStorage alone.

const DATABASE = "qwenkit";
const TABLE = "conversations";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let opened;
async function run(mode, action) {
  opened ??= open();
  const database = await opened;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(TABLE, mode);
    const request = action(transaction.objectStore(TABLE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/// All conversations, newest first.
export async function conversations() {
  const all = await run("readonly", (table) => table.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export const save = (conversation) => run("readwrite", (table) => table.put(structuredClone(conversation)));
export const remove = (id) => run("readwrite", (table) => table.delete(id));

export function settings() {
  try {
    return { probabilities: true, ...JSON.parse(localStorage.getItem("settings") ?? "{}") };
  } catch {
    return { probabilities: true };
  }
}

export const saveSettings = (values) => localStorage.setItem("settings", JSON.stringify(values));
export const apiKey = () => sessionStorage.getItem("key") ?? "";
export const saveApiKey = (key) => (key ? sessionStorage.setItem("key", key) : sessionStorage.removeItem("key"));
