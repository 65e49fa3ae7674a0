// The list of conversations: beside the page on a desk, a drawer over it on a phone.

const byId = (id) => document.getElementById(id);
const items = new Map(); // id of a conversation -> its <li>

/** Shows the conversations, the last one used first; `choose` is called with the one that is clicked. */
export function drawList(conversations, current, running, choose) {
  const sorted = [...conversations].sort((a, b) => b.updated - a.updated);
  const list = byId("conversations");
  const drawn = sorted.map((conversation) => drawItem(conversation, current, running, choose));
  // Left alone where the order is right, so that the focus stays.
  if (drawn.length !== list.children.length || drawn.some((item, at) => item !== list.children[at])) {
    list.replaceChildren(...drawn);
  }
}

function drawItem(conversation, current, running, choose) {
  const item = items.get(conversation.id) ?? newItem(conversation.id);
  const button = item.firstElementChild;
  button.textContent = conversation.title;
  button.title = conversation.title;
  button.classList.toggle("running", running.has(conversation.id));
  button.onclick = () => choose(conversation);
  if (conversation.id === current.id) button.setAttribute("aria-current", "page");
  else button.removeAttribute("aria-current");
  return item;
}

function newItem(id) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dir = "auto";
  item.append(button);
  items.set(id, item);
  return item;
}

// ---- the drawer; on a desk the style sheet shows it always

const isDrawer = window.matchMedia("(max-width: 860px)");

export function openDrawer() {
  setDrawer(true);
  byId("close-drawer").focus();
}

/** Returns whether there was a drawer to close. */
export function closeDrawer() {
  if (!document.body.classList.contains("drawer-open")) return false;
  setDrawer(false);
  byId("open-drawer").focus();
  return true;
}

function setDrawer(open) {
  document.body.classList.toggle("drawer-open", open);
  document.querySelector("main").inert = open;
  byId("open-drawer").setAttribute("aria-expanded", String(open));
}

byId("open-drawer").addEventListener("click", openDrawer);
byId("close-drawer").addEventListener("click", closeDrawer);
byId("shade").addEventListener("click", closeDrawer);
isDrawer.addEventListener("change", () => setDrawer(false));
