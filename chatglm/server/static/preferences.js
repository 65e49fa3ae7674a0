// What the user chose, kept in localStorage; a stored value that makes no sense counts as not chosen.

const KEY = "chatglm.preferences";
const API_KEY = "chatglm.key";
const DRAFT = "chatglm.draft";

const isNumber = (least, most) => (value) => Number.isFinite(value) && value >= least && value <= most;
const isWhole = (least) => (value) => Number.isSafeInteger(value) && value >= least;
const isOneOf = (...values) => (value) => values.includes(value);

const VALID = {
  language: isOneOf("en", "zh"),
  theme: isOneOf("light", "dark"),
  temperature: isNumber(0, 2),
  top_p: isNumber(0.01, 1),
  max_tokens: isWhole(1),
  seed: isWhole(0),
  system: (value) => typeof value === "string" && value !== "",
};

// A browser may forbid storage (then even naming it throws) or have none left: what is kept lasts for this page.
const lastResort = new Map();

let preferences = load();

function load() {
  try {
    const stored = Object.entries(JSON.parse(read("localStorage", KEY) || "{}"));
    return Object.fromEntries(stored.filter(([name, value]) => VALID[name]?.(value)));
  } catch {
    return {};
  }
}

/** The chosen value, or undefined: then the browser, the system or the server decides. */
export function preference(name) {
  return preferences[name];
}

/** Chooses; a value that makes no sense (undefined, NaN, "") takes the choice back. */
export function prefer(name, value) {
  const { [name]: _, ...others } = preferences;
  preferences = VALID[name](value) ? { ...others, [name]: value } : others;
  keep("localStorage", KEY, JSON.stringify(preferences));
}

/** The question that is being written: it survives a reload. */
export function draft() {
  return read("localStorage", DRAFT);
}

export function keepDraft(text) {
  keep("localStorage", DRAFT, text);
}

/** The API key, which is gone when the tab is closed. */
export function apiKey() {
  return read("sessionStorage", API_KEY);
}

export function keepApiKey(key) {
  keep("sessionStorage", API_KEY, key);
}

function read(storage, key) {
  try {
    return lastResort.get(key) ?? window[storage].getItem(key) ?? "";
  } catch {
    return "";
  }
}

function keep(storage, key, value) {
  try {
    window[storage].setItem(key, value);
    lastResort.delete(key);
  } catch {
    lastResort.set(key, value);
  }
}
