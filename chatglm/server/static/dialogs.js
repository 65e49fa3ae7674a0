// The dialogs: settings, and the three that ask something.

import { preference, prefer } from "./preferences.js";
import { number, roundNumber, size, text } from "./texts.js";

const byId = (id) => document.getElementById(id);

// A click on the dark around a dialog closes it, as Esc does.
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-action=close]")) dialog.close("");
  });
}

/** Shows a dialog; resolves with the value of the button that closed it, "" where nothing was chosen. */
function shown(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Asks whether to go on; resolves with true or false. */
export async function confirmed(question) {
  byId("confirm-text").textContent = question;
  return (await shown(byId("confirm"))) === "yes";
}

/** Asks for a title; resolves with null where it is cancelled. */
export async function askTitle(title) {
  const field = byId("naming").querySelector("input");
  field.value = title;
  const answer = shown(byId("naming"));
  field.select();
  return (await answer) === "yes" ? field.value.trim() : null;
}

/** Asks for the API key; resolves with null where it is cancelled. */
export async function askKey() {
  const field = byId("unlock").querySelector("input");
  field.value = "";
  const answer = await shown(byId("unlock"));
  const key = field.value;
  field.value = "";
  return answer === "yes" ? key : null;
}

// ---- settings

const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const field = (name) => byId("settings").querySelector(`[name=${name}]`);

/** Opens the settings with the user's choices, or the server's where there is none. */
export function openSettings(info) {
  fill(info.defaults ?? {});
  byId("facts").replaceChildren(...facts(info));
  byId("reset").onclick = () => {
    for (const name of FIELDS) prefer(name, undefined);
    fill(info.defaults ?? {});
  };
  return shown(byId("settings"));
}

function fill(defaults) {
  for (const name of FIELDS) field(name).value = preference(name) ?? defaults[name] ?? "";
  for (const range of byId("settings").querySelectorAll("[type=range]")) showValue(range);
}

function showValue(range) {
  range.nextElementSibling.textContent = number(range.value, { maximumFractionDigits: 2 });
}

byId("settings").addEventListener("input", ({ target }) => {
  if (target.type === "range") showValue(target);
  if (FIELDS.includes(target.name)) {
    prefer(target.name, target.name === "system" ? target.value.trim() : target.valueAsNumber);
  }
});

/** A list of terms and values; what the server does not tell is left out. */
function facts(info) {
  const told = {
    model: info.model,
    modelFamily: info.family,
    modelParameters: info.parameters && roundNumber(info.parameters),
    modelMemory: info.bytes && size(info.bytes),
    modelDevice: [info.device, info.dtype].filter(Boolean).join(" · "),
    modelContext: info.context && text("tokens", { count: number(info.context) }),
    modelVersion: info.version,
  };
  return Object.entries(told).flatMap(([key, value]) => {
    if (!value) return [];
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = text(key);
    description.textContent = value;
    return [term, description];
  });
}
