// Keeps every file of this folder, so that the page works without a network, and adds the headers that the page needs.
//
// A version is a cache of its own, named by the sha256 of all files' sha256s. A file whose bytes are not the stated ones is
// refused, and the version with it: the one before goes on. A version is complete or not there.

const VERSION = "__VERSION__";
const FILES = __FILES__; // {name: {bytes, sha256, type}}
const HEADERS = __HEADERS__;

const scope = self.registration.scope;
const mine = `edgelab ${scope} `; // other folders of the same origin have caches of their own
const urlOf = name => new URL(name, scope).href;

async function tell(message) {
  for (const client of await self.clients.matchAll({ includeUncontrolled: true })) client.postMessage(message);
}

async function digest(bytes) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, byte => byte.toString(16).padStart(2, "0")).join("");
}

/** The bytes of a file from a version that is already here, or null. */
async function kept(name, sha256) {
  for (const key of await caches.keys()) {
    if (!key.startsWith(mine)) continue;
    const found = await (await caches.open(key)).match(urlOf(name));
    if (found?.headers.get("x-sha256") === sha256) return new Uint8Array(await found.arrayBuffer());
  }
  return null;
}

async function fetched(name, told) {
  const response = await fetch(urlOf(name), { cache: "no-cache", redirect: "error" });
  if (!response.ok) throw new Error(`${name}: status ${response.status}`);
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    told(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function install() {
  const total = Object.values(FILES).reduce((sum, file) => sum + file.bytes, 0);
  const cache = await caches.open(mine + VERSION);
  let loaded = 0;
  let last = 0;
  const told = bytes => {
    loaded += bytes;
    if (Date.now() - last < 100) return;
    last = Date.now();
    tell({ progress: { loaded, total } });
  };
  try {
    for (const [name, file] of Object.entries(FILES)) {
      const bytes = (await kept(name, file.sha256)) ?? (await fetched(name, told));
      const found = await digest(bytes);
      if (found !== file.sha256) {
        throw new Error(`${name} was changed: its sha256 is ${found.slice(0, 12)}..., not ${file.sha256.slice(0, 12)}...`);
      }
      const headers = { ...HEADERS, "content-type": file.type, "content-length": bytes.length, "x-sha256": file.sha256 };
      await cache.put(urlOf(name), new Response(bytes, { headers }));
    }
  } catch (error) {
    await caches.delete(mine + VERSION);
    await tell({ refused: String(error?.message ?? error) });
    throw error;
  }
}

async function activate() {
  for (const key of await caches.keys()) if (key.startsWith(mine) && key !== mine + VERSION) await caches.delete(key);
  await self.clients.claim();
}

async function answer(request) {
  const url = new URL(request.url);
  if (!url.href.startsWith(scope)) {
    if (url.origin === location.origin) return fetch(request);
    await tell({ turnedAway: url.origin }); // the policy of the page stops these before they come here; this is the second lock
    return Response.error();
  }
  const name = decodeURIComponent(url.pathname.slice(new URL(scope).pathname.length)) || "index.html";
  const found = name in FILES && (await (await caches.open(mine + VERSION)).match(urlOf(name)));
  return found || fetch(request);
}

self.addEventListener("install", event => event.waitUntil(install()));
self.addEventListener("activate", event => event.waitUntil(activate()));
self.addEventListener("fetch", event => event.respondWith(answer(event.request)));
self.addEventListener("message", event => event.data === "take over" && self.skipWaiting());
