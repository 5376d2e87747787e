// The model as ONNX Runtime Web runs it: one step at a time, with the keys and values of earlier tokens kept between steps.
//
// inputs   input_ids [1, n], attention_mask [1, past + n], past_key_values.{i}.key and .value [1, heads, past, width]
// outputs  logits [1, n, vocabulary], present.{i}.key and .value [1, heads, past + n, width]: the next step's past

export class Engine {
  /** `ort`: the runtime's module. `shape`: web.json's `model`: vocabulary, context and the caches' heads and widths. */
  constructor(ort, session, shape) {
    Object.assign(this, { ort, session, shape });
    this.reset();
  }

  static async load(ort, bytes, shape) {
    // "parallel" for what it leaves out: planning which values may share memory takes most of the start of a graph of a thousand nodes
    // whose shapes are not known beforehand (ONNX Runtime 1.30, a mixture of 4 x 16 experts: 6.6 s with it, 1.6 s without, same logits)
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], executionMode: "parallel" });
    return new Engine(ort, session, shape);
  }

  /** Forget the text so far. */
  reset() {
    this.past = 0;
    this.cache = {};
    for (const { name, heads, width } of this.shape.caches) {
      this.cache[name] = new this.ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]);
    }
  }

  /** Logits, Float32Array [ids.length * vocabulary], of `ids` after what was fed before. */
  async feed(ids) {
    const n = ids.length;
    const total = this.past + n;
    if (total > this.shape.context) throw new RangeError(`the text has ${total} tokens; this model reads ${this.shape.context} at most`);
    const integers = (values, length) => new this.ort.Tensor("int64", values, [1, length]);
    const inputs = {
      input_ids: integers(BigInt64Array.from(ids, BigInt), n),
      attention_mask: integers(new BigInt64Array(total).fill(1n), total),
      ...this.cache,
    };
    const { logits, ...present } = await this.session.run(inputs);
    for (const name of Object.keys(this.cache)) this.cache[name] = present[name.replace("past_key_values", "present")];
    this.past = total;
    return logits.data;
  }

  /**
   * Writes tokens after `ids`, calling `each(id, milliseconds)` for every one. Ends at a token of `stop`, after `limit` tokens, at the
   * end of the context or when `stopped()` says so. Gives {ids, ended, first_ms, tokens_per_s}: `ended` says which of the four;
   * tokens_per_s counts the tokens after the first, whose time is the prompt's.
   */
  async answer(ids, { stop, limit, temperature = 0, seed = 1, each = () => {}, stopped = async () => false }) {
    this.reset();
    const random = generator(seed);
    const written = [];
    const began = performance.now();
    let first;
    let ended = "limit";
    let next = ids;
    while (written.length < limit) {
      if (this.past + next.length > this.shape.context && written.length) {
        ended = "context";
        break;
      }
      const logits = await this.feed(next);
      const id = choose(logits.subarray(logits.length - this.shape.vocabulary), temperature, random);
      const now = performance.now() - began;
      first ??= now;
      if (stop.includes(id)) {
        ended = "stop";
        written.push(id);
        break;
      }
      written.push(id);
      each(id, now);
      next = [id];
      if (await stopped()) {
        ended = "stopped";
        break;
      }
    }
    const rest = performance.now() - began - first;
    return { ids: written, ended, first_ms: first, tokens_per_s: written.length > 1 ? (1000 * (written.length - 1)) / rest : null };
  }
}

/** The most likely token at temperature 0, else one drawn from softmax(logits / temperature). */
export function choose(logits, temperature, random) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const weights = Float64Array.from(logits, x => Math.exp((x - logits[best]) / temperature));
  let left = random() * weights.reduce((sum, w) => sum + w, 0);
  for (let i = 0; i < weights.length; i++) if ((left -= weights[i]) < 0) return i;
  return best; // rounding left a crumb
}

/** Numbers in [0, 1), the same ones for the same seed (a 32-bit Weyl sequence, mixed by multiplications and shifts). */
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let x = state;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    return ((x ^ (x >>> 16)) >>> 0) / 2 ** 32;
  };
}
