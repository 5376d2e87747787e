// The arithmetic of the explorer in the browser: the twin of edgelab/tradeoff.py, significance.py and paired.py, name for name.
// On the same sweep and the same state it gives the same rows, fronts, best row, milliseconds, test and interval; a test holds the two
// beside each other. Nothing here touches the page.
"use strict";
const tradeoff = (() => {
  const RESAMPLES = 1000, LEVEL = 0.05, PROMPT = 128;

  // ------------------------------------------------------------------------------------------------------------ the sweep

  // bytes: uint32 length of a JSON header, the header, then blocks that the header places, each on a multiple of eight
  function unpack(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const begin = Math.ceil((4 + length) / 8) * 8;
    const kinds = { f8: Float64Array, f4: Float32Array, u4: Uint32Array, u1: Uint8Array };
    const block = ([kind, offset, count]) => new kinds[kind](buffer, begin + offset, count);
    const blocks = (of) => Object.fromEntries(Object.entries(of).map(([name, at]) => [name, block(at)]));
    const sweep = { ...header, n: header.rows, numbers: blocks(header.numbers), texts: {}, quality: {} };
    for (const [name, { values, codes }] of Object.entries(header.texts)) sweep.texts[name] = { values, codes: block(codes) };
    for (const [name, ends] of Object.entries(header.quality)) sweep.quality[name] = blocks(ends);
    for (const name of ["doc_kld", "doc_nll", "doc_exact", "shape_code"]) sweep[name] = block(header[name]);
    sweep.layer = { ...blocks(header.layer.blocks), names: header.layer.names };
    sweep.rowOf = new Map(sweep.texts.id.values.map((id, k) => [id, k]));  // ids differ, so their codes are the rows
    return sweep;
  }

  const text = (sweep, column, i) => sweep.texts[column].values[sweep.texts[column].codes[i]];
  const cell = (sweep, column, i) => (column in sweep.texts ? text(sweep, column, i) : sweep.numbers[column][i]);

  function index(sweep, id) {
    if (!sweep.rowOf.has(id)) throw new Error(`the sweep has no row with id=${JSON.stringify(id)}`);
    return sweep.rowOf.get(id);
  }

  // ------------------------------------------------------------------------------------------------- selection and fronts

  function select(sweep, filters) {
    const kept = new Uint8Array(sweep.n).fill(1);
    for (const [column, allowed] of filters) {
      if (!(column in sweep.values)) throw new Error(`filter ${JSON.stringify(column)} is not known`);
      for (const v of allowed)
        if (!sweep.values[column].includes(v)) throw new Error(`${column}=${JSON.stringify(v)} is in no row`);
      if (column in sweep.texts) {
        const { values, codes } = sweep.texts[column], ok = values.map((v) => allowed.includes(v));
        for (let i = 0; i < sweep.n; i++) if (!ok[codes[i]]) kept[i] = 0;
      } else {
        const data = sweep.numbers[column], ok = new Set(allowed);
        for (let i = 0; i < sweep.n; i++) if (!ok.has(data[i])) kept[i] = 0;
      }
    }
    return kept;
  }

  // the rows of `rows` that no other of them dominates; costs: two or three arrays, less is better, NaN is never on the front
  function pareto(rows, ...costs) {
    const front = new Uint8Array(rows.length), known = [];
    for (let i = 0; i < rows.length; i++) if (rows[i] && costs.every((c) => !Number.isNaN(c[i]))) known.push(i);
    known.sort((a, b) => {
      for (const c of costs) if (c[a] !== c[b]) return c[a] - c[b];
      return 0;
    });
    if (costs.length === 2) {
      const [x, y] = costs;
      let least = Infinity, kept = false;
      known.forEach((i, k) => {
        const before = known[k - 1];
        if (k === 0 || x[i] !== x[before] || y[i] !== y[before]) kept = k === 0 || y[i] < least;  // equal rows stay together
        if (kept) front[i] = 1;
        least = Math.min(least, y[i]);
      });
      return front;
    }
    const [x, y, z] = costs, found = [];
    for (const i of known) {  // whatever dominates a row comes before it
      const beaten = found.some((j) => x[j] <= x[i] && y[j] <= y[i] && z[j] <= z[i] && (x[j] !== x[i] || y[j] !== y[i] || z[j] !== z[i]));
      if (!beaten) { front[i] = 1; found.push(i); }
    }
    return front;
  }

  // --------------------------------------------------------------------------------------------------------------- latency

  const thousands = (n) => Math.round(n).toLocaleString("en-US");

  // three significant digits, as Python's .3g
  function three(x) {
    if (x === 0) return "0";
    const [digits, power] = x.toExponential(2).split("e"), e = Number(power);
    if (e < -4 || e >= 3) return `${Number(digits)}e${e < 0 ? "-" : "+"}${String(Math.abs(e)).padStart(2, "0")}`;
    return String(Number(x.toPrecision(3)));
  }

  function engineering(value, unit) {
    for (const [power, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (value >= power) return `${three(value / power)} ${prefix}${unit}`;
    return `${three(value)} ${unit}`;
  }

  // how a shape lies in a device's memory: all of it, or as many experts of each layer as there is room for (device.fit_memory)
  function memory(shape, device, context) {
    const kv = shape.kv * context;
    let kept = shape.experts;
    if (device.usable !== null && shape.moe_layers && shape.expert_bytes) {
      const room = device.usable - shape.resident - kv - shape.working;
      kept = Math.min(shape.experts, Math.max(0, Math.floor(room / (shape.moe_layers * shape.expert_bytes))));
      if (kept < shape.top_k) kept = shape.experts;
    }
    const experts = shape.moe_layers * kept * shape.expert_bytes, total = shape.resident + experts + kv + shape.working;
    return { kv, experts, total, kept: shape.moe_layers ? kept : 0, of: shape.experts, fits: device.usable === null ? null : total <= device.usable };
  }

  // milliseconds per token of one shape: device.predict's decoding line, with the same words where there is none
  function milliseconds(shape, device, engine, context) {
    const none = (why, m) => ({ value: NaN, low: NaN, high: NaN, missing: why, memory: m, binds: "" });
    const m = memory(shape, device, context);
    if (m.fits === false) return none(`needs ${engineering(m.total, "B")} and an app may take ${engineering(device.usable, "B")}`, m);
    if (device.dram === null) return none(`${device.name} has no dram_bytes_per_s`, m);
    let bandwidth = (shape.read + m.kv) / (engine.eta * device.dram), compute = 0, flash = 0;
    const peak = device.peak[engine.name];
    if (engine.gamma !== null && peak !== null) {
      const seconds = (shape.ops + shape.attention_ops * context) / (engine.gamma * peak);
      if (seconds > bandwidth) { compute = seconds; bandwidth = 0; }
    }
    if (m.of && m.kept !== m.of) {
      if (device.flash === null) return none(`${device.name} has no flash_bytes_per_s`, m);
      flash = ((1 - m.kept / m.of) * shape.active_expert_bytes) / device.flash;
    }
    const overhead = engine.tau * shape.layers * (engine.cpu ? shape.hidden / 4096 : 1);
    const parts = { bandwidth, compute, overhead, flash };
    const rate = 1 / (bandwidth + compute + overhead + flash);
    const binds = Object.keys(parts).reduce((a, b) => (parts[b] > parts[a] ? b : a));
    const [low, high] = engine.factors === null ? [NaN, NaN] : [1e3 / (rate * engine.factors[1]), 1e3 / (rate * engine.factors[0])];
    return { value: 1e3 / rate, low, high, missing: "", memory: m, binds };
  }

  function latency(sweep, deviceName, context, engineName) {
    const device = sweep.devices[deviceName], engine = sweep.engines[engineName];
    if (!device) throw new Error(`device=${JSON.stringify(deviceName)} is not known`);
    if (!engine) throw new Error(`engine=${JSON.stringify(engineName)} is not known`);
    if (!Number.isInteger(context) || context < 0) throw new Error(`context=${context} must be a whole number of tokens, 0 or more`);
    const each = sweep.shapes.map((s) => milliseconds(s, device, engine, context));
    const found = { value: new Float64Array(sweep.n), low: new Float64Array(sweep.n), high: new Float64Array(sweep.n), of: (i) => each[sweep.shape_code[i]] };
    for (let i = 0; i < sweep.n; i++) {
      const e = each[sweep.shape_code[i]];
      found.value[i] = e.value; found.low[i] = e.low; found.high[i] = e.high;
    }
    return found;
  }

  // ------------------------------------------------------------------------------------------------- the state and its view

  const DEFAULTS = { metric: "em_assistant", device: "galaxy-s22", engine: "cpu-tuned", context: 512, objective: "quality", size_limit: null,
    latency_limit: null, quality_limit: null, filters: [], chosen: "", pin_a: "", pin_b: "", from_a: ["", 1], from_b: ["", 1] };

  // keys: the objective first, then the others; unknown counts as the worst; ties go to the first row
  function best(size, late, cost, inside, objective) {
    const keys = { quality: cost, size, latency: late }, first = keys[objective];
    const order = [first, ...Object.keys(keys).filter((k) => k !== objective).map((k) => keys[k])];
    const worth = (k, i) => (Number.isNaN(k[i]) ? Infinity : k[i]);
    let found = -1;
    for (let i = 0; i < inside.length; i++) {
      if (!inside[i] || Number.isNaN(first[i])) continue;
      if (found < 0) { found = i; continue; }
      for (const k of order) {
        const a = worth(k, i), b = worth(k, found);
        if (a !== b) { if (a < b) found = i; break; }
      }
    }
    return found < 0 ? null : found;
  }

  function view(sweep, state) {
    const m = sweep.metrics[state.metric], q = sweep.quality[state.metric], n = sweep.n;
    if (!m) throw new Error(`metric=${JSON.stringify(state.metric)} is not known`);
    const late = latency(sweep, state.device, state.context, state.engine), rows = select(sweep, state.filters), notes = [];
    if (m.kind === "kld") {
      const { values, codes } = sweep.texts.model, count = new Map();
      for (let i = 0; i < n; i++) if (rows[i]) { const r = sweep.reference[values[codes[i]]]; count.set(r, (count.get(r) || 0) + 1); }
      const references = [...count.keys()].sort((a, b) => count.get(b) - count.get(a) || (a < b ? -1 : 1));
      if (references.length > 1) {
        let left = 0;
        for (let i = 0; i < n; i++) if (rows[i] && sweep.reference[values[codes[i]]] !== references[0]) { rows[i] = 0; left++; }
        notes.push(`${thousands(left)} rows are left out: their KL divergence is from ${references.slice(1).join(", ")}, not from ${references[0]}`);
      }
    }
    const cost = Float64Array.from(q.value, (v) => m.sign * v), size = sweep.numbers.size_bytes, inside = new Uint8Array(n);
    let missing = 0, why = "", picked = 0;
    for (let i = 0; i < n; i++) {
      if (!rows[i]) continue;
      if (Number.isNaN(late.value[i]) && missing++ === 0) why = late.of(i).missing;
      if (Number.isNaN(cost[i])) continue;
      if (state.size_limit !== null && !(size[i] <= state.size_limit)) continue;
      if (state.latency_limit !== null && !(late.value[i] <= state.latency_limit)) continue;
      if (state.quality_limit !== null && !(cost[i] <= m.sign * state.quality_limit)) continue;
      inside[i] = 1; picked++;
    }
    if (missing) notes.push(`${thousands(missing)} rows have no latency on ${state.device}: ${why}`);
    return { state, metric: m, quality: q, latency: late, rows, inside, front: pareto(rows, cost, size, late.value), front_size: pareto(rows, cost, size),
      front_latency: pareto(rows, cost, late.value), best: best(size, late.value, cost, inside, state.objective), picked_from: picked, notes };
  }

  // (metric, number of rows) that a row was picked from if it is pinned while this view is looked at (tradeoff.pinned): the best row
  // and those on a front stand out by their results
  function pinned(view, row) {
    if (row !== view.best && !view.front[row] && !view.front_size[row] && !view.front_latency[row]) return ["", 1];
    return [view.state.metric, view.inside[row] ? view.picked_from : total(view.rows)];
  }

  // of how many rows the better of the two pins was picked by this metric (State.searched)
  const searched = (state) => Math.max(...[state.from_a, state.from_b].map(([metric, n]) => (metric === state.metric ? n : 1)));

  function anchor(sweep, rows) {
    const { values, codes } = sweep.texts.model, there = new Set();
    for (let i = 0; i < sweep.n; i++) if (rows[i]) there.add(values[codes[i]]);
    let found = null;
    for (const model of [...there].sort()) {
      const i = sweep.original[model];
      if (i !== null && (found === null || sweep.numbers.size_bytes[i] > sweep.numbers.size_bytes[found])) found = i;
    }
    return found;
  }

  function apply(sweep, name, state) {
    const preset = sweep.presets[name];
    if (!preset) throw new Error(`preset=${JSON.stringify(name)} is not known`);
    const base = anchor(sweep, select(sweep, state.filters));
    if (base === null && (preset.keep !== null || preset.size_share !== null))
      throw new Error(`preset ${JSON.stringify(name)} is relative to an original, and the selected models have none in the sweep`);
    return { ...state, metric: preset.metric, objective: preset.objective, device: preset.device || state.device, latency_limit: null,
      quality_limit: preset.keep === null ? preset.limit : preset.keep * sweep.quality[preset.metric].value[base],
      size_limit: preset.size_share === null ? null : preset.size_share * sweep.numbers.size_bytes[base] };
  }

  // ------------------------------------------------------------------------------------------------------------ comparison

  // mulberry32 (Tommy Ettinger, public domain): uniform numbers in [0, 1)
  function mulberry32(count, seed = 0) {
    const found = new Float64Array(count);
    for (let k = 0; k < count; k++) {
      const a = (seed + Math.imul(k + 1, 0x6d2b79f5)) | 0;
      let t = Math.imul(a ^ (a >>> 15), a | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      found[k] = ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    }
    return found;
  }

  const draws = new Map();
  function drawn(sizes) {
    const key = sizes.join();
    if (!draws.has(key)) {
      const start = [], size = [];
      let at = 0;
      for (const s of sizes) { for (let k = 0; k < s; k++) { start.push(at); size.push(s); } at += s; }
      draws.set(key, Uint32Array.from(mulberry32(RESAMPLES * at), (u, k) => start[k % at] + Math.floor(u * size[k % at])));
    }
    return draws.get(key);
  }

  function resampled(values, sizes) {
    const found = drawn(sizes), n = values.length, sums = new Float64Array(RESAMPLES);
    for (let r = 0; r < RESAMPLES; r++) {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += values[found[r * n + j]];
      sums[r] = sum;
    }
    return sums;
  }

  function interval(values) {
    const ordered = Float64Array.from(values).sort(), cut = Math.round(0.025 * ordered.length) - 1;
    return [ordered[cut], ordered[ordered.length - 1 - cut]];
  }

  const total = (values) => values.reduce((a, b) => a + b, 0);

  // what a bootstrap of few sources is too narrow by (paired.widening, in the same order of operations)
  const STUDENT = [1.95996, 2.37227, 2.8225, 2.55585, 1.58949], STUDENT_OF_FEW = [12.7062, 4.30265];
  function widening(sizes) {
    const n = total(sizes), free = n - sizes.length, [c0, c1, c2, c3, c4] = STUDENT;
    if (free < 1) return Infinity;
    const t = free < 3 ? STUDENT_OF_FEW[free - 1] : c0 + (c1 + (c2 + (c3 + c4 / free) / free) / free) / free;
    return (t / c0) * Math.sqrt(n / free);
  }

  function difference(a, b, bottom, sizes) {
    const topA = resampled(a, sizes), topB = resampled(b, sizes), below = resampled(bottom, sizes);
    const value = (total(b) - total(a)) / total(bottom), w = widening(sizes), times = topA.every((t) => t > 0) ? total(b) / total(a) : null;
    if (w === Infinity) return { value, low: -w, high: w, ratio: times === null ? [null, null, null] : [times, 0, w], p: 1, sources: a.length };
    const values = topA.map((t, r) => value + w * ((topB[r] - t) / below[r] - value));
    const [low, high] = interval(values);
    const sides = Math.min(values.filter((v) => v <= 0).length, values.filter((v) => v >= 0).length);
    const ratio = times === null ? [null, null, null] : [times, ...interval(topA.map((t, r) => times + w * (topB[r] / t - times))).map((v) => Math.max(0, v))];
    return { value, low, high, ratio, p: Math.min(1, (2 * (1 + sides)) / (RESAMPLES + 1)), sources: a.length };
  }

  // exact: integers until the last division
  function mcnemar(onlyA, onlyB) {
    const n = BigInt(onlyA + onlyB), k = BigInt(Math.min(onlyA, onlyB));
    let term = 1n, sum = 1n;
    for (let i = 1n; i <= k; i++) { term = (term * (n - i + 1n)) / i; sum += term; }
    const scale = 1n << 60n;  // 2 sum / 2^n in fixed point of n bits and sixty more
    const shifted = (2n * sum * scale) >> n;
    return Math.min(1, shifted > 1n << 53n ? Number(shifted) / Number(scale) : Number(2n * sum) / 2 ** Number(n));
  }

  function sums(sweep, m, i) {
    const found = [], sizes = [], number = new Map();
    const docs = sweep.text.map((d, k) => ({ ...d, k })).filter((d) => m.domains.includes(d.domain));
    for (const domain of new Set(docs.map((d) => d.domain))) {
      const before = number.size;
      for (const d of docs) if (d.domain === domain) { const key = `${domain}\n${d.source}`; if (!number.has(key)) number.set(key, number.size); }
      sizes.push(number.size - before);
    }
    const held = m.kind === "kld" ? sweep.doc_kld : sweep.doc_nll, scale = m.kind === "kld" ? 1 : 1 / Math.log(2), wide = sweep.text.length;
    for (const row of i) {
      const top = new Float64Array(number.size);
      for (const d of docs) top[number.get(`${d.domain}\n${d.source}`)] += held[row * wide + d.k];
      found.push(top.map((v) => v * scale));
    }
    const bottom = new Float64Array(number.size);
    for (const d of docs) bottom[number.get(`${d.domain}\n${d.source}`)] += m.kind === "kld" ? d.tokens : d.bytes;
    return { tops: found, bottom, sizes };
  }

  // digits after the point as Python prints them: an exact half goes to the even neighbour
  function fixed(x, digits) {
    const scaled = Math.abs(x) * 10 ** digits, whole = Math.floor(scaled);
    if (scaled - whole !== 0.5 || scaled / 10 ** digits !== Math.abs(x) || digits > 6) return x.toFixed(digits);
    return ((Math.sign(x) * (whole % 2 ? whole + 1 : whole)) / 10 ** digits).toFixed(digits);
  }
  const signed = (x, digits) => (x < 0 || Object.is(x, -0) ? "" : "+") + (Object.is(x, -0) ? "-" : "") + fixed(x, digits);

  const UNITS = { kld: "nats per token", bits: "bits per byte", exact: "" };
  function said(m, value) {
    if (value === null || !Number.isFinite(value)) return "unknown";
    return m.kind === "exact" ? `${fixed(100 * value, m.digits)} %` : `${fixed(value, m.digits)} ${UNITS[m.kind]}`;
  }

  function compare(sweep, idA, idB, metric, pickedFrom = 1) {
    const m = sweep.metrics[metric], rows = [index(sweep, idA), index(sweep, idB)];
    const c = { metric, a: idA, b: idB, picked_from: pickedFrom, refused: "", low: null, high: null, ratio: null, ratio_low: null, ratio_high: null, only_a: null, only_b: null };
    if (m.kind === "exact") {
      const wide = sweep.answers.length, docs = sweep.answers.map((d, k) => k).filter((k) => m.domains.includes(sweep.answers[k].domain));
      const [one, two] = rows.map((r) => docs.map((k) => sweep.doc_exact[r * wide + k]));
      c.only_a = one.filter((v, k) => v && !two[k]).length;
      c.only_b = two.filter((v, k) => v && !one[k]).length;
      Object.assign(c, { value_a: total(one) / one.length, value_b: total(two) / two.length, difference: (c.only_b - c.only_a) / one.length,
        p: mcnemar(c.only_a, c.only_b), test: "McNemar's exact test", n: one.length });
    } else {
      const { tops, bottom, sizes } = sums(sweep, m, rows), below = total(bottom);
      const references = rows.map((r) => sweep.reference[text(sweep, "model", r)]);
      [c.value_a, c.value_b] = tops.map((t) => total(t) / below);
      if (m.kind === "kld" && references[0] !== references[1]) {
        c.refused = `KL divergence can't compare these two: A's is a distance from ${references[0]}, B's from ${references[1]}. Use bits per byte ` +
          "or exact match, which are a model's own.";
        Object.assign(c, { difference: NaN, p: NaN, test: "", n: 0 });
      } else {
        const d = difference(tops[0], tops[1], bottom, sizes);
        Object.assign(c, { difference: d.value, p: d.p, test: "paired bootstrap", n: d.sources, low: d.low, high: d.high, ratio: d.ratio[0],
          ratio_low: d.ratio[1], ratio_high: d.ratio[2] });
      }
    }
    c.significant = c.refused ? false : c.low === null ? c.p < LEVEL : !(c.low <= 0 && 0 <= c.high);
    c.p_search = Math.min(1, c.p * pickedFrom);
    c.better = !c.significant ? "" : c.difference * m.sign < 0 ? "b" : "a";
    c.curse = curse(c, m);
    c.said = verdict(c, m);
    return c;
  }

  // the other rows of `among` that the documents can't tell from `row` at 5 % (significance.rivals): their numbers
  function rivals(sweep, row, among, metric) {
    const m = sweep.metrics[metric], found = [];
    if (m.kind === "exact") {
      const wide = sweep.answers.length, docs = sweep.answers.map((d, k) => k).filter((k) => m.domains.includes(sweep.answers[k].domain));
      const mine = docs.map((k) => sweep.doc_exact[row * wide + k]), known = new Map();
      for (let i = 0; i < sweep.n; i++) {
        if (!among[i] || i === row) continue;
        let onlyA = 0, onlyB = 0;
        for (let j = 0; j < docs.length; j++) { const b = sweep.doc_exact[i * wide + docs[j]]; if (mine[j] !== b) { if (b) onlyB++; else onlyA++; } }
        const pair = onlyA * 100000 + onlyB;
        if (!known.has(pair)) known.set(pair, mcnemar(onlyA, onlyB));
        if (known.get(pair) >= LEVEL) found.push(i);
      }
      return found;
    }
    const model = (i) => text(sweep, "model", i), most = Math.round(0.025 * RESAMPLES), rows = [];
    for (let i = 0; i < sweep.n; i++) if (among[i] && i !== row && (m.kind !== "kld" || sweep.reference[model(i)] === sweep.reference[model(row)])) rows.push(i);
    const { tops, bottom, sizes } = sums(sweep, m, [row, ...rows]), n = tops[0].length, index = drawn(sizes), times = new Float64Array(RESAMPLES * n);
    const w = widening(sizes), below = resampled(bottom, sizes), all = total(bottom);
    if (w === Infinity) return rows;
    for (let k = 0; k < index.length; k++) times[Math.floor(k / n) * n + index[k]]++;
    rows.forEach((i, k) => {
      const apart = tops[k + 1].map((v, j) => v - tops[0][j]), measured = total(apart) / all;
      let less = 0, more = 0;
      for (let r = 0; r < RESAMPLES && (less < most || more < most); r++) {
        let sum = 0;
        for (let j = 0; j < n; j++) sum += times[r * n + j] * apart[j];
        const figure = measured + w * (sum / below[r] - measured);
        if (figure <= 0) less++;
        if (figure >= 0) more++;
      }
      if (less >= most && more >= most) found.push(i);
    });
    return found;
  }

  const inWords = (p) => (p >= 0.001 ? fixed(p, 3) : "below 0.001");

  function curse(c, m) {
    if (c.picked_from <= 1 || c.refused) return "";
    const words = `One of them was picked from ${thousands(c.picked_from)} by how it did: part of its lead is luck.`;
    if (!c.significant) return words;
    if (m.kind !== "exact" && (2 / (RESAMPLES + 1)) * c.picked_from >= LEVEL)
      return `${words} ${thousands(RESAMPLES)} resamples are too few to correct for so many; measure both again on other documents.`;
    const survives = c.p_search < LEVEL ? "it still holds" : "it no longer holds; measure both again on other documents";
    return `${words} Corrected for so many comparisons (p = ${inWords(c.p_search)}), ${survives}.`;
  }

  function verdict(c, m) {
    if (c.refused) return c.refused;
    let how;
    if (m.kind === "exact") how = `of ${c.n} answers A alone got ${c.only_a} right and B alone ${c.only_b}; ${c.test} p = ${inWords(c.p)}`;
    else {
      how = `B - A = ${signed(c.difference, m.digits)} [${signed(c.low, m.digits)}, ${signed(c.high, m.digits)}] ${UNITS[m.kind]}`;
      if (c.ratio !== null) how += `, B / A = ${fixed(c.ratio, 3)} [${fixed(c.ratio_low, 3)}, ${fixed(c.ratio_high, 3)}]`;
      how += `; ${c.test} over ${c.n} sources`;
    }
    const which = { a: "A is better", b: "B is better", "": "the documents do not tell them apart" }[c.better];
    return `On ${m.title}: A ${said(m, c.value_a)}, B ${said(m, c.value_b)}; ${which} (${how}).` + (c.curse ? ` ${c.curse}` : "");
  }

  return { unpack, text, cell, index, select, pareto, latency, milliseconds, view, pinned, searched, anchor, apply, compare, rivals, said, fixed, engineering, thousands, DEFAULTS, PROMPT };
})();
