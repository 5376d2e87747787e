// The worker that holds the model: the page stays responsive however long a step takes.
//
// It is asked {id, what, ...} and answers {id, value} or {id, error}; in between {id, token, text} and {progress}.

import { Engine } from "./engine.js";
import * as ort from "./ort/ort.wasm.min.mjs";
import { Tokenizer } from "./tokenizer.js";

const stopped = []; // addresses that the content security policy refused
addEventListener("securitypolicyviolation", event => stopped.push(event.blockedURI));

const memories = [];
const Memory = WebAssembly.Memory;
// the runtime does not say how much memory it has, so its memory is noted when it is made, at the first session
WebAssembly.Memory = class extends Memory {
  constructor(description) {
    super(description);
    memories.push(this);
  }
};

// Below so many bytes a step is too short to be shared: two threads took twice the processor's time of one, and longer
const LARGE = 32e6;

let about;
let engine;
let tokenizer;
let stopping = false;
let busy = Promise.resolve();

/** Lets the messages that wait be handled: a step of the runtime blocks this thread, and so its inbox, until it is done. */
const breathe = () =>
  new Promise(resolve => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });

async function get(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} could not be read (status ${response.status})`);
  return response;
}

async function bytesOf(name, total) {
  const response = await get(name);
  const bytes = new Uint8Array(total);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > total) throw new Error(`${name} is larger than the ${total} bytes that web.json states`);
    bytes.set(value, at);
    postMessage({ progress: { name, loaded: (at += value.length), total } });
  }
  if (at !== total) throw new Error(`${name} ended after ${at} of ${total} bytes`);
  return bytes;
}

const tasks = {
  async load({ threads }) {
    const began = performance.now();
    about = await (await get("web.json")).json();
    ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
    const sensible = about.model.bytes < LARGE ? 1 : Math.min(4, navigator.hardwareConcurrency || 1);
    ort.env.wasm.numThreads = crossOriginIsolated ? (threads ?? sensible) : 1;
    ort.env.logLevel = "error";
    tokenizer = new Tokenizer(await (await get("tokens.json")).json());
    const bytes = await bytesOf(about.model.file, about.model.bytes);
    const read = performance.now();
    engine = await Engine.load(ort, bytes, about.model);
    await engine.feed(tokenizer.encode("a", { begin: false })); // the first step of a session allocates; it is not the reader's
    engine.reset();
    return { about, threads: ort.env.wasm.numThreads, read_ms: read - began, ready_ms: performance.now() - read };
  },

  async answer({ id, text, chat, ...settings }) {
    const ids = chat ? tokenizer.encode(tokenizer.chat(text), { begin: false }) : tokenizer.encode(text);
    const stream = tokenizer.stream();
    stopping = false;
    const result = await engine.answer(ids, {
      stop: about.model.stop,
      limit: 256,
      ...settings,
      each: (token, ms) => postMessage({ id, token, text: stream.push(token), ms }),
      stopped: async () => (await breathe(), stopping),
    });
    return { ...result, rest: stream.end(), prompt: ids, text: tokenizer.decode(result.ids), context: engine.past };
  },

  /** Logits of `ids`, fed in pieces of `step` tokens through the cache (all at once without). */
  async logits({ ids, step = ids.length }) {
    engine.reset();
    const all = new Float32Array(ids.length * about.model.vocabulary);
    for (let at = 0; at < ids.length; at += step) all.set(await engine.feed(ids.slice(at, at + step)), at * about.model.vocabulary);
    engine.reset();
    return all;
  },

  encode: ({ text, chat }) => (chat ? tokenizer.encode(tokenizer.chat(text), { begin: false }) : tokenizer.encode(text)),
  decode: ({ ids, special }) => tokenizer.decode(ids, { special }),

  /** Bytes in use, and every address that this worker has loaded from. */
  state: () => ({
    wasm_bytes: memories.reduce((sum, m) => sum + m.buffer.byteLength, 0),
    heap_bytes: performance.memory?.usedJSHeapSize ?? null,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    stopped,
  }),

  /** Tries to send something out, which the content security policy of this worker must stop. */
  async leak({ url }) {
    const how = await fetch(url, { mode: "no-cors" }).then(
      () => "sent",
      () => "blocked",
    );
    await new Promise(resolve => setTimeout(resolve, 50)); // the report of a violation comes after the refusal
    return { how, stopped };
  },
};

const atOnce = new Set(["state", "leak"]); // these do not touch the model

onmessage = ({ data }) => {
  if (data.what === "stop") {
    stopping = true;
    return;
  }
  const run = async () => {
    try {
      postMessage({ id: data.id, value: await tasks[data.what](data) });
    } catch (error) {
      postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  };
  if (atOnce.has(data.what)) run();
  else busy = busy.then(run); // one at a time: they share the cache
};
