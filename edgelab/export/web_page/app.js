// The page: what a person types goes to the worker, and its tokens, its figures and the count of requests come back.
//
// `window.edgelab` is the same door for tests: ready, answer, stop, logits, encode, decode, state, requests, tryToLeak.

const $ = id => document.getElementById(id);
const megabytes = bytes => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
const sized = bytes => (bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${megabytes(bytes)} MB`);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// ------------------------------------------------------------------------------------------- requests, counted

const here = location.origin;
const requests = { local: new Set(), away: [], stopped: [] };

/** Counts the address that something was loaded from. */
function note(address) {
  const url = new URL(address, location.href);
  if (url.origin === here || url.protocol === "blob:" || url.protocol === "data:") requests.local.add(url.href);
  else if (!requests.away.includes(url.href)) requests.away.push(url.href);
  $("left").value = $("badge-count").textContent = requests.away.length;
  $("badge").classList.toggle("alarm", requests.away.length > 0);
  $("local").textContent = requests.local.size;
}

addEventListener("securitypolicyviolation", event => requests.stopped.push(event.blockedURI));
// some browsers also list what the policy stopped, which was never sent: the report of the stop comes a little later
const seen = list => list.getEntries().forEach(({ name }) => setTimeout(() => requests.stopped.includes(name) || note(name), 100));
new PerformanceObserver(seen).observe({ type: "resource", buffered: true });
$("origin").textContent = location.host || "this address";

// --------------------------------------------------------------------------------------------------- the worker

let worker;
let asked = 0;
const waiting = new Map();

function ask(what, message = {}, each = null) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject, each });
    worker.postMessage({ id, what, ...message });
  });
}

function hear({ data }) {
  if (data.progress) return progress(data.progress, "Loading the model");
  const one = waiting.get(data.id);
  if (!one) return;
  if ("token" in data) return one.each?.(data);
  waiting.delete(data.id);
  if ("error" in data) one.reject(new Error(data.error));
  else one.resolve(data.value);
}

function progress({ loaded, total }, doing) {
  $("progress").value = loaded / total;
  say(`${doing}: ${megabytes(loaded)} of ${megabytes(total)} MB`);
}

const say = text => ($("state").textContent = text);

// ------------------------------------------------------------------------------------- stored for use offline

let registration;

/** Resolves when the service worker has stored all files and answers for this page, or when it is clear that it will not. */
async function store() {
  if (!("serviceWorker" in navigator)) return "This browser cannot store the page for use without a network here.";
  navigator.serviceWorker.addEventListener("message", ({ data }) => {
    if (data.progress && !ready.done) progress(data.progress, "Storing for use without a network");
    if (data.refused) $("offline").textContent = `Not stored: ${data.refused}`;
    if (data.turnedAway) requests.stopped.push(data.turnedAway);
  });
  registration = await navigator.serviceWorker.register("sw.js", { updateViaCache: "none" });
  registration.addEventListener("updatefound", () => watch(registration.installing));
  if (registration.waiting) $("update").hidden = false;
  if (navigator.serviceWorker.controller) return null;
  if (registration.active) return "Loaded past the stored copy (a forced reload); a plain reload uses it again.";
  const refused = await new Promise(resolve => {
    navigator.serviceWorker.addEventListener("controllerchange", () => resolve(false), { once: true });
    const first = registration.installing ?? registration.waiting;
    first?.addEventListener("statechange", () => {
      if (first.state === "redundant") resolve(true);
      if (first.state === "activated") setTimeout(resolve, 3000, false); // it is there, but did not take this page over: go on without
    });
  });
  if (refused) return $("offline").textContent;
  // its answers carry the headers that threads need; this document came without them, so it is fetched once more
  if (!crossOriginIsolated && window === top && once("reloaded for threads")) {
    location.reload();
    await new Promise(() => {});
  }
  return null;
}

function watch(next) {
  next?.addEventListener("statechange", () => {
    if (next.state === "installed" && navigator.serviceWorker.controller) $("update").hidden = false;
  });
}

function once(key) {
  try {
    if (sessionStorage.getItem(key)) return false;
    sessionStorage.setItem(key, "yes");
    return true;
  } catch {
    return false;
  }
}

$("update").addEventListener("click", () => {
  navigator.serviceWorker.addEventListener("controllerchange", () => location.reload(), { once: true });
  registration.waiting?.postMessage("take over");
});

let offer;
addEventListener("beforeinstallprompt", event => {
  event.preventDefault();
  offer = event;
  $("install").hidden = false;
});
$("install").addEventListener("click", async () => {
  await offer?.prompt();
  $("install").hidden = true;
});

// -------------------------------------------------------------------------------------------------------- start

let about;
let threads;
const ready = { done: false };

async function start() {
  const trouble = await store().catch(error => `Not stored: ${error.message}`);
  if (trouble) $("offline").textContent = trouble;
  else $("offline").textContent = "Stored on this device: it works without a network from now on.";
  say("Loading the model");
  const wanted = Number(new URLSearchParams(location.search).get("threads")) || null; // ?threads=4, for measurements
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = hear;
  worker.onerror = event => {
    event.preventDefault();
    for (const { reject } of waiting.values()) reject(new Error(event.message || "the worker could not be started"));
    waiting.clear();
  };
  const loaded = await ask("load", { threads: wanted });
  ({ about, threads } = loaded);
  ready.done = true;
  ready.ms = performance.now();
  await show(loaded);
}

async function show(loaded) {
  const sizes = await (await fetch("files.json")).json();
  $("about").textContent = about.about;
  $("load").remove();
  $("download").value = megabytes(sizes.total.bytes);
  const part = name => `${sized(sizes.parts[name].bytes)}, compressed ${sized(sizes.parts[name].gzip)}`;
  facts({
    "Download, compressed": sized(sizes.total.gzip),
    Runtime: part("runtime"),
    Model: part("model"),
    "Page and tokenizer": part("page"),
    Weights: about.model.weights,
    Threads: `${threads}${crossOriginIsolated ? "" : " (the page is not isolated, so no more are allowed)"}`,
    "Read and started": `${Math.round(loaded.read_ms)} + ${Math.round(loaded.ready_ms)} ms`,
    Runs: about.runtime,
  });
  for (const task of about.tasks) addTask(task);
  chooseTask(about.tasks[0]);
  for (const id of ["prompt", "send"]) $(id).disabled = false;
  await measure();
  if (matchMedia("(hover: hover)").matches) $("prompt").focus({ preventScroll: true });
}

function facts(lines) {
  for (const [name, value] of Object.entries(lines)) {
    const old = document.querySelector(`[data-fact="${name}"]`);
    if (old) old.lastChild.textContent = value;
    else {
      const line = make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
      line.dataset.fact = name;
      $("facts").append(line);
    }
  }
}

async function measure() {
  const state = await ask("state");
  state.loaded.filter(name => !state.stopped.includes(name)).forEach(note);
  const page = performance.memory?.usedJSHeapSize ?? null;
  const heap = page === null && state.heap_bytes === null ? null : (page ?? 0) + (state.heap_bytes ?? 0);
  $("memory").value = megabytes(state.wasm_bytes + (heap ?? 0));
  facts({
    "Memory of the model": `${megabytes(state.wasm_bytes)} MB (WebAssembly)`,
    "Memory of the scripts": heap === null ? "this browser does not say" : `${megabytes(heap)} MB (JavaScript)`,
  });
  return { ...state, page_heap_bytes: page };
}

// ----------------------------------------------------------------------------------------- questions and answers

let task;
let current = null; // the answer being written

function addTask(one) {
  const radio = make("input", { type: "radio", name: "task", id: `task-${one.id}`, value: one.id });
  radio.addEventListener("change", () => chooseTask(one));
  $("tasks").append(make("span", {}, radio, make("label", { htmlFor: radio.id, textContent: one.label })));
}

function chooseTask(one) {
  task = one;
  $(`task-${one.id}`).checked = true;
  $("prompt").placeholder = one.placeholder;
  $("prompt-label").textContent = one.label;
  setRange("limit", one.limit);
  setRange("temperature", one.temperature ?? 0);
  $("examples").replaceChildren(
    ...one.examples.map(text => {
      const chip = make("button", { type: "button", textContent: text.trim() });
      chip.addEventListener("click", () => submit(text));
      return chip;
    }),
  );
  $("examples").scrollLeft = 0;
}

function setRange(id, value) {
  $(id).value = value;
  $(id).dispatchEvent(new Event("input"));
}

$("temperature").addEventListener("input", event => {
  const value = Number(event.target.value);
  $("temperature-said").value = value ? `${value.toFixed(1)}: drawn by chance` : "0: always the likeliest";
});
$("limit").addEventListener("input", event => ($("limit-said").value = `${event.target.value} tokens`));

const prompt = $("prompt");
prompt.addEventListener("input", grow);
function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 180)}px`;
}
prompt.addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
addEventListener("keydown", event => event.key === "Escape" && stop());
$("ask").addEventListener("submit", event => {
  event.preventDefault();
  submit(prompt.value);
});
$("stop").addEventListener("click", stop);

function stop() {
  worker.postMessage({ what: "stop" });
}

/** What is sent for `text`, or null where the task cannot use it: a sum gets its form, other texts stay as they are. */
function formed(text) {
  if (!task.pattern) return text.trim() ? text : null;
  const found = text.trim().match(new RegExp(`^(?:${task.pattern})$`, "u"));
  return found && found.slice(1).join("") + (task.ending ?? "");
}

async function submit(text) {
  if (!ready.done || current) return;
  const question = formed(text);
  if (question === null) {
    $("hint").textContent = task.wanted ?? "Write something first.";
    $("hint").classList.add("wrong");
    prompt.focus();
    return;
  }
  $("hint").textContent = "Enter sends, Shift+Enter starts a new line, Escape stops.";
  $("hint").classList.remove("wrong");
  prompt.value = "";
  grow();
  $("hello")?.remove();
  const answer = make("p", { className: "answer writing" });
  const figures = make("p", { className: "figures" });
  const turn = make("article", { className: "turn" }, make("p", { className: "question", textContent: question }), answer, figures);
  answer.dataset.continues = String(!task.chat && !task.reading);
  turn.setAttribute("aria-busy", "true");
  $("log").append(turn);
  scroll();
  busy(true);
  const asking = task;
  try {
    const [seed] = crypto.getRandomValues(new Uint32Array(1));
    const settings = { temperature: Number($("temperature").value), limit: Number($("limit").value), seed };
    let count = 0;
    const result = await run(question, { chat: asking.chat, ...settings }, ({ text, ms }) => {
      answer.append(text);
      count += 1;
      if (count === 1) $("first").value = Math.round(ms);
      scroll();
    });
    finish(answer, figures, result, asking);
  } catch (error) {
    answer.classList.add("wrong");
    answer.textContent = error.message;
    $("said").textContent = error.message;
  }
  answer.classList.remove("writing");
  turn.removeAttribute("aria-busy");
  busy(false);
  await measure();
}

const ENDINGS = { stop: "", limit: " · cut at the longest answer", context: " · the model reads no further", stopped: " · stopped" };

function finish(answer, figures, result, asking) {
  answer.textContent = result.text || "(the model ended at once)";
  const digits = asking.reading === "last digit first" && /^-?\d+$/.test(result.text);
  if (digits) {
    const number = [...result.text].reverse().join("");
    answer.textContent = number;
    answer.append(make("small", { textContent: ` written “${result.text}”: this model gives the last digit first` }));
  }
  const call = asking.chat && parsed(result.text);
  if (call) answer.after(card(call));
  const speed = result.tokens_per_s === null ? "" : ` · ${result.tokens_per_s.toFixed(0)} tokens/s`;
  if (result.tokens_per_s !== null) $("speed").value = result.tokens_per_s.toFixed(0);
  $("first").value = Math.round(result.first_ms);
  const many = result.ids.length === 1 ? "1 token" : `${result.ids.length} tokens`;
  figures.textContent = `${many}${speed} · first after ${Math.round(result.first_ms)} ms${ENDINGS[result.ended]}`;
  $("said").textContent = `Answer: ${answer.textContent}`;
  scroll();
}

/** The call that an answer is, or null: an object of JSON with a name under "call". */
function parsed(text) {
  try {
    const value = JSON.parse(text);
    return typeof value?.call === "string" ? value : null;
  } catch {
    return null;
  }
}

function card({ call, ...arguments_ }) {
  const list = make("dl", {});
  for (const [name, value] of Object.entries(arguments_)) {
    const said = Array.isArray(value) ? value.join(", ") : typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
    list.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: said })));
  }
  return make("div", { className: "call" }, make("strong", { textContent: call }), list);
}

function scroll() {
  const log = $("log");
  log.scrollTop = log.scrollHeight;
}

function busy(yes) {
  current = yes || null;
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  for (const chip of $("examples").children) chip.disabled = yes;
  if (yes) $("said").textContent = "Answering";
}

function run(text, settings, each) {
  return ask("answer", { text, ...settings }, each);
}

// ---------------------------------------------------------------------------------- the proof, and the test door

/** Tries a request to an address that is no one's, from the page and from the model's thread: {page, worker}, each "sent" or "blocked". */
async function tryToLeak(url = "https://example.invalid/your-words") {
  const page = await fetch(url, { mode: "no-cors" }).then(
    () => "sent",
    () => "blocked",
  );
  await new Promise(resolve => setTimeout(resolve, 50)); // the report of a violation comes after the refusal
  const from = await ask("leak", { url });
  return { page, worker: from.how, by_policy: requests.stopped.includes(url) && from.stopped.includes(url) };
}

$("leak").addEventListener("click", async () => {
  const { page, worker, by_policy } = await tryToLeak();
  const held = page === "blocked" && worker === "blocked" && by_policy;
  $("leak-result").textContent = held
    ? "The browser refused it, both for the page and for the model's thread: nothing was sent."
    : "Could not be shown here: the request failed for another reason, or was sent.";
});

window.edgelab = {
  ready: start().catch(error => {
    $("progress")?.remove();
    $("state").classList.add("wrong");
    say(`The model could not be started: ${error.message}`);
    throw error;
  }),
  logits: (ids, step) => ask("logits", { ids, step }),
  answer: (text, settings = {}) => run(text, settings),
  encode: (text, chat = false) => ask("encode", { text, chat }),
  decode: (ids, special = false) => ask("decode", { ids, special }),
  stop,
  state: measure,
  tryToLeak,
  // of the page; state() has the worker's
  requests: () => ({ local: [...requests.local], away: [...requests.away], stopped: [...requests.stopped] }),
  threads: () => threads,
};
window.edgelab.ready.catch(() => {}); // shown above
