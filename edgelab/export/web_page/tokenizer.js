// Byte-level BPE: text to token ids and back, as the `tokenizers` library computes them.
//
// The data (tokens.json, written by web.py) holds
//   vocab      the token of every id, in the byte alphabet below; null for an id that is not used
//   merges     pairs "left right", the first the most wanted
//   steps      how text is cut before merging: {digits: true} or {pattern: "..."}, one after the other on every piece
//   normalize  "NFC" or null;  whole: a piece that is a token is not merged
//   added      {token: id} found in the text before anything else;  special: ids that are left out of answers
//   begin      ids in front of a text;  chat: {before, after, trim}, what the chat template puts around a message
//
// Byte alphabet: printable Latin-1 characters stand for their own byte, the other 68 bytes for the characters from U+0100 on.

const BYTE_OF = new Map();
const CHAR_OF = [];
{
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    CHAR_OF[byte] = String.fromCharCode(printable ? byte : next++);
    BYTE_OF.set(CHAR_OF[byte], byte);
  }
}

const KEPT_WORDS = 20_000; // of the cache below; a page may stay open for days

export class Tokenizer {
  #ids = new Map();
  #ranks = new Map();
  #steps;
  #added;
  #words = new Map();
  #utf8 = new TextEncoder();

  constructor(data) {
    this.data = data;
    data.vocab.forEach((token, id) => token !== null && this.#ids.set(token, id));
    data.merges.forEach((pair, rank) => this.#ranks.set(pair, rank));
    this.#steps = data.steps.map(step => new RegExp(step.digits ? "\\p{N}" : step.pattern, "gu"));
    const added = Object.keys(data.added).sort((a, b) => b.length - a.length); // where two begin together the longer one wins
    this.#added = added.length ? new RegExp(added.map(escaped).join("|"), "gu") : null;
    this.special = new Set(data.special);
  }

  /** Ids of `text`. `begin`: with the ids that the tokenizer puts in front; a chat template brings its own. */
  encode(text, { begin = true } = {}) {
    const ids = begin ? [...this.data.begin] : [];
    for (const [piece, isAdded] of pieces(text, this.#added)) {
      if (isAdded) {
        ids.push(this.data.added[piece]);
        continue;
      }
      let parts = [this.data.normalize ? piece.normalize(this.data.normalize) : piece];
      for (const step of this.#steps) parts = parts.flatMap(part => pieces(part, step).map(([text]) => text));
      for (const part of parts) for (const id of this.#word(part)) ids.push(id);
    }
    return ids;
  }

  /** The prompt that the chat template makes of one message of the user. */
  chat(message) {
    const { before, after, trim } = this.data.chat;
    return before + (trim ? message.trim() : message) + after;
  }

  /** The text of `ids`; special tokens are left out unless `special`. */
  decode(ids, { special = false } = {}) {
    const stream = this.stream({ special });
    return ids.map(id => stream.push(id)).join("") + stream.end();
  }

  /** A decoder that takes one id at a time: `push` gives the text that is complete by then (a character can take four tokens). */
  stream({ special = false } = {}) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      push: id => {
        const token = this.data.vocab[id] ?? null;
        if (token === null || (!special && this.special.has(id))) return "";
        return decoder.decode(this.#bytes(token), { stream: true });
      },
      end: () => decoder.decode(),
    };
  }

  #bytes(token) {
    const bytes = [];
    for (const char of token) {
      if (!BYTE_OF.has(char)) return this.#utf8.encode(token); // an added token outside the byte alphabet is its own text
      bytes.push(BYTE_OF.get(char));
    }
    return Uint8Array.from(bytes);
  }

  /** Ids of one piece: its bytes, the best ranked neighbours joined (the leftmost of equals) until no pair is known. */
  #word(text) {
    const known = this.#words.get(text);
    if (known) return known;
    let parts = Array.from(this.#utf8.encode(text), byte => CHAR_OF[byte]);
    const whole = parts.join("");
    if (this.data.whole && this.#ids.has(whole)) parts = [whole];
    while (parts.length > 1) {
      let best = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    const ids = parts.map(part => this.#ids.get(part));
    if (this.#words.size >= KEPT_WORDS) this.#words.clear();
    this.#words.set(text, ids);
    return ids;
  }
}

const escaped = text => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");

/** [[piece, whether it matched]] of `text`, nothing lost: what lies between two matches is a piece too. */
function pieces(text, pattern) {
  if (!text) return [];
  if (!pattern) return [[text, false]];
  const found = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    if (!match[0]) continue;
    if (match.index > end) found.push([text.slice(end, match.index), false]);
    found.push([match[0], true]);
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push([text.slice(end), false]);
  return found;
}
