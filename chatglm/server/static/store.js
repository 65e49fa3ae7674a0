// Where conversations outlive the page: IndexedDB, which holds more than localStorage, and which a killed browser
// has not lost.

import { sound } from "./conversations.js";

const DATABASE = "chatglm";
const CONVERSATIONS = "conversations";
const DELAY = 300; // milliseconds: changes of one conversation in this time become one write

/** Opens the store. Where the browser offers none, one that keeps nothing; its `lasting` is false. */
export async function openStore() {
  try {
    return new Store(await openDatabase());
  } catch {
    return new Store(null);
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

class Store {
  #database;
  #waiting = new Map(); // id -> { conversation, timer }
  #channel = new BroadcastChannel(DATABASE);

  constructor(database) {
    this.#database = database;
    this.lasting = database !== null;
    this.onFailure = () => {}; // called when a conversation could not be written
  }

  /** { conversations, damaged }: all that is stored, and how many of them cannot be read. */
  async all() {
    const values = (await this.#run("readonly", (objects) => objects.getAll())) ?? [];
    const conversations = values.map(sound).filter(Boolean);
    return { conversations, damaged: values.length - conversations.length };
  }

  /** One conversation as it is stored now, or null. */
  async one(id) {
    return sound(await this.#run("readonly", (objects) => objects.get(id)));
  }

  /** Writes the conversation soon, and no more often than every 300 ms however fast it grows. */
  keepSoon(conversation) {
    if (this.#waiting.has(conversation.id)) return;
    const timer = setTimeout(() => this.keep(conversation), DELAY);
    this.#waiting.set(conversation.id, { conversation, timer });
  }

  /** Writes the conversation now. */
  async keep(conversation) {
    this.#cancel(conversation.id);
    try {
      await this.#run("readwrite", (objects) => objects.put(conversation));
      this.#channel.postMessage(conversation.id);
    } catch {
      this.onFailure();
    }
  }

  /** Writes now whatever waits: the page may be about to go. */
  flush() {
    for (const { conversation } of [...this.#waiting.values()]) this.keep(conversation);
  }

  async remove(id) {
    this.#cancel(id);
    await this.#run("readwrite", (objects) => objects.delete(id));
    this.#channel.postMessage(id);
  }

  /** Calls `listener` with the id of every conversation that another tab writes or deletes. */
  onOtherTab(listener) {
    this.#channel.onmessage = ({ data }) => listener(data);
  }

  #cancel(id) {
    clearTimeout(this.#waiting.get(id)?.timer);
    this.#waiting.delete(id);
  }

  /** Resolves once the change is on its way to the disk; a full disk shows only there. */
  async #run(mode, work) {
    if (!this.#database) return undefined;
    const transaction = this.#database.transaction(CONVERSATIONS, mode);
    const request = work(transaction.objectStore(CONVERSATIONS));
    if (mode === "readwrite") transaction.commit(); // or it would end with the page, unwritten
    return new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  }
}
