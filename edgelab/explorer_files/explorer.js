// The page of the explorer: controls, drawing, words. What is computed is tradeoff.js's; `window.edgelab` is the same door for tests.
"use strict";
(() => {
  const T = tradeoff, $ = (id) => document.getElementById(id);
  const began = performance.now();
  let sweep, now, state, late = null;  // late: timer of what may wait until a slider rests
  // what the page alone knows: not part of a State
  const ui = { mode: "inspect", brush: null, zoom: {}, cursor: null, hover: null, sort: "quality", shown: 50, preset: "", drawn: 0,
    colour: "method", fitted: false };

  // ---------------------------------------------------------------------------------------------------------------- words

  // text from the sweep never becomes markup: h`...` escapes what is put in, unless it is markup made by h or raw
  class Markup { constructor(text) { this.text = text; } toString() { return this.text; } }
  const raw = (text) => new Markup(text);
  const escaped = (v) => (v instanceof Markup ? v.text : Array.isArray(v) ? v.map(escaped).join("") :
    String(v).replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]));
  const h = (parts, ...values) => raw(parts.reduce((text, part, k) => text + escaped(values[k - 1]) + part));
  const put = (node, markup) => { if (node.shown !== markup.text) { node.innerHTML = markup.text; node.shown = markup.text; } };

  const label = (i) => T.text(sweep, "label", i), id = (i) => T.text(sweep, "id", i), size = (i) => sweep.numbers.size_bytes[i];
  const MB = (bytes) => T.fixed(bytes / 1e6, 2);
  const short = (x) => (Number.isFinite(x) ? (x >= 100 ? T.thousands(x) : x >= 0.001 ? x.toPrecision(3) : String(Number(x.toPrecision(3)))) : "unknown");
  const listed = (parts) => (parts.length < 2 ? parts.join("") : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`);
  const percent = (x, digits = 0) => `${T.fixed(100 * x, digits)} %`;
  const COUNTED = raw('<span class="tag built">counted</span>'), built = (i) => h`<span class="tag built">${T.text(sweep, "provenance", i)}</span>`, MODELLED = raw('<span class="tag modelled">modelled</span>');
  const objectives = { quality: "best quality", size: "smallest", latency: "fastest" };

  // a value on an axis or in a number box: shares in per cent
  const scale = (m) => (m.kind === "exact" ? 100 : 1);
  const unit = (m) => ({ kld: "nats per token", bits: "bits per byte", exact: "%" })[m.kind];
  function bare(m, value) { return Number.isFinite(value) ? T.fixed(scale(m) * value, m.digits) : "unknown"; }
  function within(name, i) {
    const q = sweep.quality[name], m = sweep.metrics[name];
    return Number.isFinite(q.low[i]) ? `[${bare(m, q.low[i])}, ${bare(m, q.high[i])}]` : "";
  }
  const timed = (i) => (Number.isFinite(now.latency.value[i]) ? `${short(now.latency.value[i])} ms` : "unknown");
  const band = (i) => (Number.isFinite(now.latency.low[i]) ? `[${short(now.latency.low[i])}, ${short(now.latency.high[i])}]` : "");
  const NAMES = { model: "model", method: "method", bits: "bits", group: "group", sparsity: "zeros", pattern: "pattern", experts: "experts", top_k: "top-k", channels: "channels" };
  function shown(column, v) {
    if (column === "group") return v === 0 ? "row" : v === -1 ? "none" : String(v);
    if (column === "sparsity") return percent(v);
    if (column === "channels") return v ? `−${percent(v)}` : "all";
    if (column === "pattern") return v || "none";
    if (column === "experts" || column === "top_k") return v ? String(v) : "dense";
    return String(v);
  }

  // -------------------------------------------------------------------------------------------------------------- markers

  // eight colours: the values beyond the seventh share the last
  const colourOf = (column, v) => sweep.colours[Math.min(sweep.values[column].indexOf(v), sweep.colours.length - 1)];
  const colour = (i) => colourOf(ui.colour, T.cell(sweep, ui.colour, i));
  const symbol = (model) => sweep.symbols[sweep.values.model.indexOf(model) % sweep.symbols.length];

  function trace(c, name, x, y, r) {  // the outline of a marker, on a canvas or on what records one
    const line = (...points) => points.forEach(([dx, dy], k) => c[k ? "lineTo" : "moveTo"](x + dx * r, y + dy * r));
    if (name === "square") line([-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]);
    else if (name === "diamond") line([0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]);
    else if (name === "triangle-up") line([0, -1.15], [1.05, 0.75], [-1.05, 0.75]);
    else if (name === "cross") line([-0.38, -1.1], [0.38, -1.1], [0.38, -0.38], [1.1, -0.38], [1.1, 0.38], [0.38, 0.38], [0.38, 1.1], [-0.38, 1.1], [-0.38, 0.38], [-1.1, 0.38], [-1.1, -0.38], [-0.38, -0.38]);
    else if (name === "x") line([0, -0.55], [0.55, -1.1], [1.1, -0.55], [0.55, 0], [1.1, 0.55], [0.55, 1.1], [0, 0.55], [-0.55, 1.1], [-1.1, 0.55], [-0.55, 0], [-1.1, -0.55], [-0.55, -1.1]);
    else if (name === "star") line(...Array.from({ length: 10 }, (_, k) => { const a = (k * Math.PI) / 5, s = k % 2 ? 0.5 : 1.25; return [s * Math.sin(a), -s * Math.cos(a)]; }));
    else { c.moveTo(x + r, y); c.arc(x, y, r, 0, 2 * Math.PI); }
    c.closePath();
  }
  function icon(name, fill) {
    let d = "";
    const pen = { moveTo: (x, y) => { d += `M${x.toFixed(1)} ${y.toFixed(1)}`; }, lineTo: (x, y) => { d += `L${x.toFixed(1)} ${y.toFixed(1)}`; },
      arc: (x, y, r) => { d += `A${r} ${r} 0 1 1 ${x - r} ${y}A${r} ${r} 0 1 1 ${x + r} ${y}`; }, closePath: () => { d += "Z"; } };
    trace(pen, name, 8, 8, 6);
    return h`<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${d}" fill="${fill}"/></svg>`;
  }
  const sprites = new Map();  // a marker drawn once; a point is a copy of it
  function sprite(name, fill, r, ratio, edge) {
    const key = [name, fill, r, ratio, edge].join();
    if (!sprites.has(key)) {
      const half = Math.ceil(r * 1.4 + 1.5), c = new OffscreenCanvas(Math.round(2 * half * ratio), Math.round(2 * half * ratio));
      const pen = c.getContext("2d");
      pen.scale(ratio, ratio);
      pen.beginPath();
      trace(pen, name, half, half, r);
      pen.fillStyle = fill; pen.fill();
      pen.strokeStyle = edge; pen.lineWidth = 0.8; pen.stroke();
      sprites.set(key, { c: c.transferToImageBitmap(), half });
    }
    return sprites.get(key);
  }

  // ------------------------------------------------------------------------------------------------------------- the plot

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let axes = {}, panels = [], spots = [], inks = {};
  const readInks = () => { inks = Object.fromEntries(["ink", "soft", "grid", "raised", "key", "warm"].map((k) => [k, css(`--${k}`)])); };

  function extent(values, rows, log) {
    let low = Infinity, high = -Infinity;
    for (let i = 0; i < values.length; i++) {
      if (rows && !rows[i]) continue;
      const v = values[i];
      if (!Number.isFinite(v) || (log && v <= 0)) continue;
      low = Math.min(low, v); high = Math.max(high, v);
    }
    if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    const pad = 0.05 * (high - low) || 0.1 * Math.abs(high) || 0.5;
    return [low - pad, high + pad];
  }
  const wide = (values) => { const [low, high] = extent(values, null, true); return high - low > 1; };  // more than a decade

  // the two panels: ranges, whether logarithmic, and where they lie in the box, all from the state and the box's size
  function layout() {
    const box = $("plot"), W = box.clientWidth, H = box.clientHeight, narrow = W < 620, m = now.metric;
    const f = scale(m), q = now.quality.value, ylog = m.kind !== "exact" && (m.kind === "kld" || wide(q));
    const rows = ui.fitted ? now.inside : null;
    const y = { log: ylog, title: m.axis, values: f === 1 ? q : q.map((v) => v * f) };
    const x = [{ title: narrow ? "size, MB" : "size, MB (counted)", values: sweep.numbers.size_bytes.map((v) => v / 1e6) }, { title: narrow ? "modelled ms per token" : `modelled time per token, ms (${sweep.devices[state.device].title})`, values: now.latency.value }];
    x.forEach((a) => { a.log = wide(a.values); });
    y.range = ui.zoom.y || extent(y.values, rows, y.log);
    x.forEach((a, k) => { a.range = ui.zoom[`x${k}`] || extent(a.values, rows, a.log); });
    const edge = { l: 62, r: 14, t: 10, b: 50 }, w = W - edge.l - edge.r, t = H - edge.t - edge.b;
    const gap = narrow ? 0.09 : 0.035, half = (1 - gap) / 2;
    const place = narrow ? [[0, 1, half + gap + 0.02, 1], [0, 1, 0, half - 0.02]] : [[0, half, 0, 1], [half + gap, 1, 0, 1]];
    panels = x.map((a, k) => {
      const [x0, x1, y0, y1] = place[k];
      return { x: a, y, left: edge.l + x0 * w, right: edge.l + x1 * w, top: edge.t + (1 - y1) * t, bottom: edge.t + (1 - y0) * t, place: place[k] };
    });
    const axis = (a, more) => ({ type: a.log ? "log" : "linear", range: a.range, gridcolor: inks.grid, zeroline: false, linecolor: inks.soft, ticks: "outside", ticklen: 4,
      tickcolor: inks.grid, title: { text: a.title, standoff: 8, font: { size: 13 } }, automargin: false, fixedrange: true, ...(a.log ? { dtick: a.range[1] - a.range[0] < 1.6 ? "D2" : 1 } : {}), ...more });
    return { width: W, height: H, margin: { ...edge, pad: 0 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: false, dragmode: false,
      font: { family: "system-ui, -apple-system, 'Segoe UI', sans-serif", size: 12, color: inks.soft },
      xaxis: axis(x[0], { domain: place[0].slice(0, 2), anchor: "y" }), xaxis2: axis(x[1], { domain: place[1].slice(0, 2), anchor: "y2" }),
      yaxis: axis(y, { domain: place[0].slice(2), anchor: "x" }), yaxis2: axis(y, { domain: place[1].slice(2), anchor: "x2", ...(narrow ? {} : { showticklabels: false, title: { text: "" } }) }) };
  }

  const at = (a, v, from, to) => { const t = ((a.log ? Math.log10(v) : v) - a.range[0]) / (a.range[1] - a.range[0]); return from + t * (to - from); };
  const back = (a, p, from, to) => { const v = a.range[0] + ((p - from) / (to - from)) * (a.range[1] - a.range[0]); return a.log ? 10 ** v : v; };
  // a value of zero has no place on a logarithmic axis: it lies on the edge
  const py = (p, v) => (p.y.log && v <= 0 ? p.bottom - 5 : at(p.y, v, p.bottom, p.top)), px = (p, v) => at(p.x, v, p.left, p.right);
  const inPanel = (p, x, y, slack = 0) => x >= p.left - slack && x <= p.right + slack && y >= p.top - slack && y <= p.bottom + slack;

  function draw() {
    const wanted = layout(), flat = {};
    for (const [name, value] of Object.entries(wanted)) {  // plotly is told only what is another: "xaxis2.range" moves ticks, and no more
      if (/^[xy]axis/.test(name)) for (const [k, v] of Object.entries(value)) flat[k === "title" ? `${name}.title.text` : `${name}.${k}`] = k === "title" ? v.text : v;
      else flat[name] = value;
    }
    const other = Object.keys(flat).filter((k) => JSON.stringify(flat[k]) !== axes[k]);
    if (other.length) {
      if (other.every((k) => k in axes && /range$|title|dtick/.test(k))) Plotly.relayout("plot", Object.fromEntries(other.map((k) => [k, flat[k]])));
      else {
        const empty = { type: "scatter", mode: "markers", x: [null], y: [null] };
        Plotly.react("plot", [empty, { ...empty, xaxis: "x2", yaxis: "y2" }], wanted, { displayModeBar: false, staticPlot: true });
      }
      axes = Object.fromEntries(Object.entries(flat).map(([k, v]) => [k, JSON.stringify(v)]));
    }
    paint($("plot-points"), Math.min(3, window.devicePixelRatio || 1));
    ui.drawn++;
  }

  let hueOf = "", hueIs = null;
  function hues() {  // the number of each row's colour
    if (hueOf !== ui.colour) {
      hueOf = ui.colour;
      const number = new Map(sweep.values[ui.colour].map((v, k) => [v, Math.min(k, sweep.colours.length - 1)]));
      hueIs = Uint8Array.from({ length: sweep.n }, (_, i) => number.get(T.cell(sweep, ui.colour, i)));
    }
    return hueIs;
  }

  function paint(canvas, ratio) {
    const W = $("plot").clientWidth, H = $("plot").clientHeight, c = canvas.getContext("2d", { willReadFrequently: true }), n = sweep.n;  // in main memory: thousands of tiny copies are no work for a GPU
    if (canvas.width !== Math.round(W * ratio) || canvas.height !== Math.round(H * ratio)) { canvas.width = Math.round(W * ratio); canvas.height = Math.round(H * ratio); }
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    c.scale(ratio, ratio);
    const models = sweep.texts.model, hue = hues(), r = W < 620 ? 3.2 : 3.8;
    const marks = models.values.map((model) => sweep.colours.map((fill) => sprite(symbol(model), fill, r, ratio, inks.raised)));
    const brushed = ui.brush ? brushedRows() : null;
    spots = panels.map((p, k) => {
      const xs = new Float32Array(n).fill(NaN), ys = new Float32Array(n).fill(NaN), xv = p.x.values, yv = p.y.values;
      for (let i = 0; i < n; i++) {
        if (!now.rows[i] || Number.isNaN(yv[i]) || Number.isNaN(xv[i])) continue;
        const x = px(p, xv[i]), y = py(p, yv[i]);
        if (inPanel(p, x, y, 1)) { xs[i] = x; ys[i] = y; }
      }
      c.save();
      c.beginPath(); c.rect(p.left - 8, p.top - 8, p.right - p.left + 16, p.bottom - p.top + 16); c.clip();
      shade(c, p, k);
      for (const inside of [0, 1]) {
        for (let i = 0; i < n; i++) {
          if (now.inside[i] !== inside || Number.isNaN(xs[i])) continue;
          c.globalAlpha = !inside ? 0.13 : brushed && !brushed[i] ? 0.3 : 0.85;
          const s = marks[models.codes[i]][hue[i]];
          c.drawImage(s.c, xs[i] - s.half, ys[i] - s.half, 2 * s.half, 2 * s.half);
        }
      }
      c.globalAlpha = 1;
      stairs(c, p, k === 0 ? now.front_size : now.front_latency, xs, ys);
      special(c, p, xs, ys, ratio);
      if (ui.brush && ui.brush.panel === k) outline(c, p, ui.brush);
      if (ui.drag && ui.drag.panel === k && ui.drag.moved) {
        const [x0, y0, x1, y1] = ui.drag.rect;
        c.fillStyle = inks.key; c.globalAlpha = 0.12; c.fillRect(x0, y0, x1 - x0, y1 - y0);
        c.globalAlpha = 1; c.strokeStyle = inks.key; c.strokeRect(x0, y0, x1 - x0, y1 - y0);
      }
      c.restore();
      return { xs, ys };
    });
  }

  function shade(c, p, k) {  // what the budgets leave out
    const limit = k === 0 ? state.size_limit && state.size_limit / 1e6 : state.latency_limit, m = now.metric;
    c.strokeStyle = inks.warm; c.fillStyle = inks.warm; c.lineWidth = 1.2;
    const zone = (x0, y0, x1, y1, line) => {
      c.globalAlpha = 0.07; c.fillRect(x0, y0, x1 - x0, y1 - y0);
      c.globalAlpha = 0.9; c.setLineDash([5, 4]); c.beginPath(); c.moveTo(line[0], line[1]); c.lineTo(line[2], line[3]); c.stroke(); c.setLineDash([]);
    };
    if (limit !== null && limit > 0) { const x = Math.max(p.left, Math.min(p.right, px(p, limit))); zone(x, p.top, p.right, p.bottom, [x, p.top, x, p.bottom]); }
    if (state.quality_limit !== null) {
      const y = Math.max(p.top, Math.min(p.bottom, py(p, state.quality_limit * scale(m))));
      const bad = m.sign > 0 ? p.top : p.bottom;
      zone(p.left, y, p.right, bad, [p.left, y, p.right, y]);
    }
    c.globalAlpha = 1;
  }

  function stairs(c, p, front, xs, ys) {
    const rows = [];
    for (let i = 0; i < sweep.n; i++) if (front[i] && !Number.isNaN(xs[i])) rows.push(i);
    rows.sort((a, b) => xs[a] - xs[b] || (now.metric.sign > 0 ? ys[b] - ys[a] : ys[a] - ys[b]));
    c.strokeStyle = inks.ink; c.lineWidth = 1.4; c.globalAlpha = 0.75;
    c.beginPath();
    rows.forEach((i, k) => { if (k) { c.lineTo(xs[i], ys[rows[k - 1]]); c.lineTo(xs[i], ys[i]); } else c.moveTo(xs[i], ys[i]); });
    c.stroke();
    c.globalAlpha = 1;
  }

  function special(c, p, xs, ys, ratio) {  // the best, the pins, the chosen, the one under the pointer: with their intervals
    const q = now.quality, f = scale(now.metric);
    const whisker = (i) => {
      if (!Number.isFinite(q.low[i])) return;
      const y0 = Math.min(p.bottom, py(p, q.low[i] * f)), y1 = Math.max(p.top, py(p, q.high[i] * f));
      c.strokeStyle = inks.ink; c.lineWidth = 1.3;
      c.beginPath(); c.moveTo(xs[i], y0); c.lineTo(xs[i], y1);
      for (const y of [y0, y1]) { c.moveTo(xs[i] - 4, y); c.lineTo(xs[i] + 4, y); }
      c.stroke();
    };
    const there = (i) => i !== null && !Number.isNaN(xs[i]);
    const ring = (i, r, stroke, w = 2) => { c.beginPath(); c.arc(xs[i], ys[i], r, 0, 2 * Math.PI); c.strokeStyle = stroke; c.lineWidth = w; c.stroke(); };
    const chosen = chosenRow(), pins = [["A", rowOf(state.pin_a)], ["B", rowOf(state.pin_b)]];
    for (const i of new Set([now.best, chosen, ...pins.map((x) => x[1])])) if (there(i)) whisker(i);
    if (there(now.best)) {
      const s = sprite("star", inks.ink, 9.5, ratio, inks.raised);
      c.drawImage(s.c, xs[now.best] - s.half, ys[now.best] - s.half, 2 * s.half, 2 * s.half);
    }
    if (there(chosen) && chosen !== now.best) ring(chosen, 10, inks.ink);
    for (const [letter, i] of pins) {
      if (!there(i)) continue;
      const x = Math.min(p.right - 9, xs[i] + 13), y = Math.max(p.top + 9, ys[i] - 13);
      ring(i, 6.5, inks.ink, 1.6);
      c.beginPath(); c.arc(x, y, 8.5, 0, 2 * Math.PI); c.fillStyle = inks.ink; c.fill();
      c.fillStyle = inks.raised; c.font = "700 11px system-ui, sans-serif"; c.textAlign = "center"; c.textBaseline = "middle"; c.fillText(letter, x, y + 0.5);
    }
    for (const i of [ui.hover, ui.cursor]) if (there(i)) ring(i, 8, css("--key"), 2.5);
  }

  function outline(c, p, b) {
    const [x0, x1] = b.x.map((v) => Math.max(p.left, Math.min(p.right, p.x.log && v <= 0 ? p.left : px(p, v))));
    const [y0, y1] = b.y.map((v) => Math.max(p.top, Math.min(p.bottom, py(p, v))));
    c.setLineDash([3, 3]); c.strokeStyle = inks.key; c.lineWidth = 1.5; c.strokeRect(x0, y0, x1 - x0, y1 - y0); c.setLineDash([]);
    c.globalAlpha = 0.06; c.fillStyle = inks.key; c.fillRect(x0, y0, x1 - x0, y1 - y0); c.globalAlpha = 1;
  }

  const chosenRow = () => (state.chosen ? rowOf(state.chosen) : now.best);  // none chosen: the best is followed
  const rowOf = (name) => (name && sweep.rowOf.has(name) ? sweep.rowOf.get(name) : null);
  function brushedRows() {
    const b = ui.brush, p = panels[b.panel], found = new Uint8Array(sweep.n);
    for (let i = 0; i < sweep.n; i++) {
      const x = p.x.values[i], y = p.y.values[i];
      found[i] = now.rows[i] && x >= b.x[0] && x <= b.x[1] && y >= b.y[0] && y <= b.y[1] ? 1 : 0;
    }
    return found;
  }

  // ---------------------------------------------------------------------------------------- pointer and keyboard on the plot

  function nearest(x, y, reach = 18) {
    let found = null, best = reach * reach;
    panels.forEach((p, k) => {
      if (!inPanel(p, x, y, 8) || !spots[k]) return;
      const { xs, ys } = spots[k];
      for (let i = 0; i < sweep.n; i++) {
        const d = (xs[i] - x) ** 2 + (ys[i] - y) ** 2 + (now.inside[i] ? 0 : 60);  // of two that are as near, one within the budgets
        if (d < best) { best = d; found = { i, panel: k }; }
      }
    });
    return found;
  }

  function tip(i, panel) {
    const node = $("tip");
    node.hidden = i === null;
    if (i === null) return;
    put(node, h`<b>${label(i)}</b>${MB(size(i))} MB, ${T.fixed(sweep.numbers.bits_per_weight[i], 2)} bits per weight<br>${now.metric.title} ${bare(now.metric, now.quality.value[i])} ${unit(now.metric)} ${within(state.metric, i)}<br>${timed(i)} per token ${band(i)} modelled`);
    const { xs, ys } = spots[panel], box = $("plot-box");
    const x = xs[i], y = ys[i];
    node.style.left = `${Math.max(0, Math.min(box.clientWidth - node.offsetWidth - 4, x + 14 + node.offsetWidth > box.clientWidth ? x - 14 - node.offsetWidth : x + 14))}px`;
    node.style.top = `${Math.max(0, Math.min(box.clientHeight - node.offsetHeight, y - node.offsetHeight - 10 < 0 ? y + 14 : y - node.offsetHeight - 10))}px`;
  }

  function pointers() {
    const canvas = $("plot-points");
    const where = (e) => { const b = canvas.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
    canvas.addEventListener("pointermove", (e) => {
      const [x, y] = where(e);
      if (ui.drag) {
        const p = panels[ui.drag.panel], clip = (v, a, b) => Math.max(a, Math.min(b, v));
        ui.drag.moved = ui.drag.moved || Math.hypot(x - ui.drag.x, y - ui.drag.y) > 5;
        ui.drag.rect = [ui.drag.x, ui.drag.y, clip(x, p.left, p.right), clip(y, p.top, p.bottom)];
        if (ui.drag.moved) { tip(null); paint(canvas, Math.min(3, window.devicePixelRatio || 1)); }
        return;
      }
      const found = ui.mode === "inspect" ? nearest(x, y) : null, i = found ? found.i : null;
      canvas.style.cursor = found ? "pointer" : ui.mode === "brush" ? "crosshair" : "default";
      if (i !== ui.hover) { ui.hover = i; paint(canvas, Math.min(3, window.devicePixelRatio || 1)); tip(i, found ? found.panel : 0); }
    });
    canvas.addEventListener("pointerleave", () => { if (ui.hover !== null && !ui.drag) { ui.hover = null; tip(null); draw(); } });
    canvas.addEventListener("pointerdown", (e) => {
      const [x, y] = where(e), panel = panels.findIndex((p) => inPanel(p, x, y, 4));
      if (panel < 0 || e.button) return;
      ui.drag = { panel, x, y, rect: [x, y, x, y], moved: false };
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener("pointerup", (e) => {
      if (!ui.drag) return;
      const { panel, moved, rect } = ui.drag, p = panels[panel];
      ui.drag = null;
      const [xa, xb] = [rect[0], rect[2]].sort((a, b) => a - b), [ya, yb] = [rect[1], rect[3]].sort((a, b) => a - b);
      if (!moved) {
        const found = nearest(...where(e), e.pointerType === "touch" ? 28 : 18);
        if (found) choose(found.i);
        return;
      }
      const x = [xa, xb].map((v) => back(p.x, v, p.left, p.right)), y = [yb, ya].map((v) => back(p.y, v, p.bottom, p.top));
      if (ui.mode === "brush") { if (y[0] > y[1]) y.reverse(); if (p.y.log && yb > p.bottom - 8) y[0] = 0; setBrush({ panel, x, y }); }
      else {
        if (xb - xa >= 5) ui.zoom[`x${panel}`] = p.x.log ? x.map(Math.log10) : x;  // a drag straight up or along says nothing of the other axis
        if (yb - ya >= 5) ui.zoom.y = p.y.log ? y.map(Math.log10) : y;
        change({});
      }
    });
    canvas.addEventListener("pointercancel", () => { ui.drag = null; draw(); });
    canvas.addEventListener("dblclick", () => { ui.zoom = {}; ui.fitted = false; setBrush(null); });

    $("plot-box").addEventListener("keydown", (e) => {
      if (e.target !== $("plot-box") || e.ctrlKey || e.metaKey || e.altKey) return;
      const steps = { ArrowLeft: ["size", -1], ArrowRight: ["size", 1], ArrowUp: ["quality", 1], ArrowDown: ["quality", -1], Home: ["size", -Infinity], End: ["size", Infinity] };
      if (steps[e.key]) { step(...steps[e.key]); e.preventDefault(); }
      else if ((e.key === "Enter" || e.key === " ") && ui.cursor !== null) { choose(ui.cursor); e.preventDefault(); }
      else if ("aAbB".includes(e.key) && ui.cursor !== null) { change({ [e.key.toLowerCase() === "a" ? "pin_a" : "pin_b"]: id(ui.cursor) }); e.preventDefault(); }
      else if (e.key === "Escape") { ui.cursor = null; tip(null); setBrush(null); }
    });
    $("plot-box").addEventListener("blur", () => { if (ui.cursor !== null) { ui.cursor = null; tip(null); draw(); } });
  }

  function step(by, towards) {  // from point to point, along one axis
    const y = now.quality.value, there = [];
    const brushed = ui.brush ? brushedRows() : null;
    for (let i = 0; i < sweep.n; i++) if ((brushed ? brushed[i] : now.inside[i]) && !Number.isNaN(spots[0].xs[i])) there.push(i);
    if (!there.length) return;
    const value = by === "size" ? size : (i) => y[i];
    there.sort((a, b) => value(a) - value(b) || a - b);
    let k = there.indexOf(ui.cursor === null ? chosenRow() : ui.cursor);
    k = k < 0 && Number.isFinite(towards) ? 0 : Math.max(0, Math.min(there.length - 1, k + towards));
    ui.cursor = there[k];
    draw();
    tip(ui.cursor, 0);
    $("plot-say").textContent = `${k + 1} of ${T.thousands(there.length)} by ${by}: ${label(ui.cursor)}, ${MB(size(ui.cursor))} MB, ${T.said(now.metric, y[ui.cursor])}, ${timed(ui.cursor)} per token. Enter chooses it, A and B pin it.`;
  }

  // ------------------------------------------------------------------------------------------------------------- the state

  function change(patch, preset = "") {
    $("alert").textContent = "";
    try {
      if ("metric" in patch && patch.metric !== state.metric) { ui.zoom = { ...ui.zoom, y: undefined }; ui.brush = null; }
      if ("device" in patch || "engine" in patch || "context" in patch) { ui.zoom = { ...ui.zoom, x1: undefined }; if (ui.brush && ui.brush.panel === 1) ui.brush = null; }
      const next = { ...state, ...patch }, seen = T.view(sweep, next);
      for (const pin of ["a", "b"]) {  // a pin that is set now remembers what it was picked from, unless the patch says so itself
        const name = next[`pin_${pin}`], from = `from_${pin}`;
        if (`pin_${pin}` in patch && !(from in patch)) next[from] = name ? T.pinned(seen, T.index(sweep, name)) : ["", 1];
        if (!name || !next[from][0]) next[from] = ["", 1];
      }
      ui.preset = preset;
      state = next;
      now = seen;
    } catch (error) {  // the state stays as it was
      $("alert").textContent = error.message;
      fill();
      return;
    }
    draw();
    answer();
    clearTimeout(late);
    late = setTimeout(rest, 120);
  }

  function choose(i) { change({ chosen: id(i) }, ui.preset); }
  function setBrush(b) { ui.brush = b; change({}, ui.preset); brushFields(); }

  function rest() {  // what may come a moment after the plot
    clearTimeout(late);
    late = null;
    fill();
    frontTable();
    ties();
    brushTable();
    allTable();
    comparison();
    chosenCard();
    link();
  }

  // ----------------------------------------------------------------------------------------------------- sentence and tables

  function limits() {
    const m = now.metric, found = [];
    if (state.size_limit !== null) found.push(["size_limit", `at most ${MB(state.size_limit)} MB`]);
    if (state.latency_limit !== null) found.push(["latency_limit", `at most ${short(state.latency_limit)} ms per token`]);
    if (state.quality_limit !== null) found.push(["quality_limit", `${m.title} ${m.sign > 0 ? "at most" : "at least"} ${T.said(m, state.quality_limit)}`]);
    return found;
  }

  function answer() {
    const i = now.best, m = now.metric, found = limits(), device = sweep.devices[state.device].title;
    let rows = 0;
    for (const v of now.rows) rows += v;
    const notes = now.notes.map((n) => `${n}.`).join(" ");
    if (i === null) {
      const loose = found.map(([name, words]) => [words, T.view(sweep, { ...state, [name]: null }).picked_from]).filter(([, n]) => n);
      const way = loose.length ? ` Without “${loose[0][0]}” there would be ${T.thousands(loose[0][1])}.` : rows ? " No single budget is to blame." : " The filters leave none.";
      put($("say"), h`<b>Nothing fits.</b> None of ${T.thousands(rows)} configurations is ${found.length ? listed(found.map((f) => f[1])) : "known on this axis"}.${way} ${notes}`);
      put($("tiles"), raw(""));
      return;
    }
    const base = T.anchor(sweep, now.rows), times = base === null ? null : size(base) / size(i);
    const all = now.picked_from === rows && !found.length, among = all ? `all ${T.thousands(rows)} configurations` : `${T.thousands(now.picked_from)} configurations${found.length ? ` with ${listed(found.map((f) => f[1]))}` : ""}`;
    const which = state.objective === "quality" ? "best" : objectives[state.objective], origin = base === null ? "" : T.text(sweep, "model", base);
    const beside = base === null || base === i ? "" : ` (${origin} as it is: ${bare(m, now.quality.value[base])}${m.kind === "exact" ? " %" : ""} in ${MB(size(base))} MB)`;
    const luck = state.objective === "quality" && now.picked_from > 1 ? " Picked as the best of so many, it owes part of its lead to luck." : "";
    put($("say"), h`<b class="name">${icon(symbol(T.text(sweep, "model", i)), colour(i))}${label(i)}</b> is the ${which} of ${among}: ${MB(size(i))} MB${times && times > 1.05 ? `, ${T.fixed(times, 1)} times smaller` : ""}, ${m.title} ${T.said(m, now.quality.value[i])} ${within(state.metric, i)}${beside}; ${timed(i)} per token, modelled on ${device}.${luck} ${notes}`);
    const front = now.front.reduce((a, b) => a + b, 0);
    const tile = (name, value, below) => h`<div class="tile"><dt>${name}</dt><dd>${value}<small>${below}</small></dd></div>`;
    put($("tiles"), h`${[tile("Size", `${MB(size(i))} MB`, h`${T.fixed(sweep.numbers.bits_per_weight[i], 2)} bits per weight ${COUNTED}`),
      tile(m.title, T.said(m, now.quality.value[i]).replace(/ (nats|bits) per .*/, ""), h`${m.kind === "exact" ? "" : `${unit(m)} `}${within(state.metric, i)} ${built(i)}`),
      tile("Time per token", timed(i), h`${band(i)} ${MODELLED}`),
      tile("Tokens per second", Number.isFinite(now.latency.value[i]) ? short(1e3 / now.latency.value[i]) : "unknown", h`waits for ${now.latency.of(i).binds || "nothing known"} ${MODELLED}`),
      tile("Within the budgets", T.thousands(now.picked_from), `of ${T.thousands(rows)}; ${front} on the front`)]}`);
  }

  function ties() {  // how many others the documents can't tell from the best: a search over all, so it waits until a slider rests
    const found = now.best === null ? [] : T.rivals(sweep, now.best, now.inside, state.metric), node = $("ties");
    ui.rivals = found;
    if (now.best === null) { node.textContent = ""; return; }
    if (!found.length) { node.textContent = now.picked_from > 1 ? "On these documents every other one can be told from it." : ""; return; }
    const least = found.reduce((a, b) => (size(b) < size(a) ? b : a));
    const smaller = size(least) < size(now.best) ? h`, the smallest of them <b>${label(least)}</b> with ${MB(size(least))} MB <button type="button" data-act="choose" data-row="${least}" aria-label="Choose ${label(least)}">Choose it</button>` : "";
    put(node, h`On these documents ${T.thousands(found.length)} others can’t be told from it${smaller}.`);
  }

  const acts = (i) => h`<td class="acts"><button type="button" data-act="choose" data-row="${i}" aria-label="Choose ${label(i)}">Choose</button><button type="button" data-act="pin_a" data-row="${i}" aria-label="Pin ${label(i)} as A">A</button><button type="button" data-act="pin_b" data-row="${i}" aria-label="Pin ${label(i)} as B">B</button></td>`;
  const line = (i, mark = "") => h`<tr data-row="${i}"${raw(chosenRow() === i ? ' class="chosen"' : "")}><th scope="row">${icon(symbol(T.text(sweep, "model", i)), colour(i))} ${label(i)}${mark}</th><td class="num">${MB(size(i))}</td><td class="num">${bare(now.metric, now.quality.value[i])} <small>${within(state.metric, i)}</small></td><td class="num">${Number.isFinite(now.latency.value[i]) ? short(now.latency.value[i]) : "unknown"} <small>${band(i)}</small></td><td class="num">${T.fixed(sweep.numbers.bits_per_weight[i], 2)}</td>${acts(i)}</tr>`;

  function heads(sortable) {
    const cols = [["", "configuration"], ["size", "size, MB (counted)"], ["quality", `${now.metric.title}${now.metric.kind === "exact" ? ", %" : ""}`], ["latency", "ms per token (modelled)"], ["bits", "bits per weight"]];
    return h`<thead><tr>${cols.map(([key, words]) => (sortable && key ? h`<th scope="col" class="num" aria-sort="${ui.sort === key ? "ascending" : "none"}"><button type="button" data-sort="${key}" aria-pressed="${ui.sort === key}">${words}</button></th>` :
      h`<th scope="col"${raw(key ? ' class="num"' : "")}>${words}</th>`))}<th scope="col" class="acts"><span class="hidden">actions</span></th></tr></thead>`;
  }

  // a table made anew keeps the focus where it was
  function table(node, markup) {
    const on = node.contains(document.activeElement) ? document.activeElement : null;
    const key = on && on.dataset.act ? `[data-act="${on.dataset.act}"][data-row="${on.dataset.row}"]` : on && on.dataset.sort ? `[data-sort="${on.dataset.sort}"]` : "";
    put(node, markup);
    if (key && !node.contains(document.activeElement)) (node.querySelector(key) || node).focus({ preventScroll: true });
  }

  function frontTable() {
    const rows = [];
    let outside = 0;
    for (let i = 0; i < sweep.n; i++) if (now.front[i]) { if (now.inside[i]) rows.push(i); else outside++; }
    rows.sort((a, b) => size(a) - size(b) || a - b);
    const some = rows.slice(0, 150);
    const caption = `Pareto front: ${T.thousands(rows.length)} configurations within the budgets that none beats on size, ${now.metric.title} and time at once` +
      `${rows.length > some.length ? `, the smallest ${some.length} of them` : ""}${outside ? `; ${T.thousands(outside)} more lie outside the budgets` : ""}`;
    const best = h` <span class="tag built">best</span>`;
    table($("front"), h`<table><caption>${caption}</caption>${heads(false)}<tbody>${some.map((i) => line(i, i === now.best ? best : ""))}</tbody></table>`);
    if (ui.cursor === null) $("plot-say").textContent = `${T.thousands(now.picked_from)} configurations within the budgets, ${rows.length} of them on the front` +
      (rows.length ? `, from ${MB(size(rows[0]))} MB at ${T.said(now.metric, now.quality.value[rows[0]])} to ${MB(size(rows.at(-1)))} MB at ${T.said(now.metric, now.quality.value[rows.at(-1)])}.` : ".");
  }

  function allTable() {
    $("all-summary").textContent = `All ${T.thousands(now.picked_from)} configurations within the budgets`;
    if (!$("all-box").open) return;
    const keys = { size: sweep.numbers.size_bytes, quality: Float64Array.from(now.quality.value, (v) => v * now.metric.sign), latency: now.latency.value, bits: sweep.numbers.bits_per_weight }, key = keys[ui.sort];
    const rows = [];
    for (let i = 0; i < sweep.n; i++) if (now.inside[i]) rows.push(i);
    const worth = (i) => (Number.isNaN(key[i]) ? Infinity : key[i]);
    rows.sort((a, b) => worth(a) - worth(b) || size(a) - size(b) || a - b);
    table($("all"), h`<table><caption>${Math.min(ui.shown, rows.length)} of ${T.thousands(rows.length)}, the best first</caption>${heads(true)}<tbody>${rows.slice(0, ui.shown).map((i) => line(i))}</tbody></table>`);
    $("more").hidden = rows.length <= ui.shown;
  }

  function brushTable() {
    const node = $("brushed");
    node.hidden = !ui.brush;
    if (!ui.brush) { put(node, raw("")); return; }
    const found = brushedRows(), rows = [];
    for (let i = 0; i < sweep.n; i++) if (found[i]) rows.push(i);
    const q = now.quality.value, better = (a, b) => (q[a] - q[b]) * now.metric.sign || size(a) - size(b) || a - b;
    const span = (f) => { const v = rows.map(f).filter(Number.isFinite); return v.length ? [Math.min(...v), Math.max(...v)] : [NaN, NaN]; };
    const count = (column) => Object.entries(rows.reduce((n, i) => { const v = shown(column, T.cell(sweep, column, i)); n[v] = (n[v] || 0) + 1; return n; }, {})).sort((a, b) => b[1] - a[1]).map(([v, n]) => `${v} ${n}`).join(", ");
    const [s0, s1] = span(size), [q0, q1] = span((i) => q[i]), [t0, t1] = span((i) => now.latency.value[i]);
    const head = rows.length ? `${T.thousands(rows.length)} configurations in the brush: ${MB(s0)} to ${MB(s1)} MB, ${now.metric.title} ${bare(now.metric, q0)} to ${T.said(now.metric, q1)}, ${short(t0)} to ${short(t1)} ms per token.` : "No configuration lies in the brush.";
    const by = rows.length ? `Methods: ${count("method")}. Bits: ${count("bits")}. Models: ${count("model")}.` : "";
    put(node, h`<p><b>${head}</b> <span class="soft">${by}</span></p><div class="scroll">${rows.length ? h`<table><caption>The best of the brush</caption>${heads(false)}<tbody>${rows.sort(better).slice(0, 8).map((i) => line(i))}</tbody></table>` : raw("")}</div>`);
  }

  // ----------------------------------------------------------------------------------------------------------- comparison

  function comparison() {
    const front = [];
    for (let i = 0; i < sweep.n; i++) if (now.front[i] && now.inside[i]) front.push(i);
    front.sort((a, b) => size(a) - size(b));
    const originals = Object.values(sweep.original).filter((i) => i !== null);
    for (const [node, pin] of [[$("pin-a"), state.pin_a], [$("pin-b"), state.pin_b]]) {
      const option = (i) => h`<option value="${id(i)}">${label(i)}, ${MB(size(i))} MB</option>`;
      const more = [rowOf(state.pin_a), rowOf(state.pin_b), chosenRow()].filter((i, k, all) => i !== null && all.indexOf(i) === k && !front.includes(i) && !originals.includes(i));
      put(node, h`<option value="">choose one</option><optgroup label="Originals">${originals.map(option)}</optgroup><optgroup label="Chosen and pinned">${more.map(option)}</optgroup><optgroup label="On the front">${front.filter((i) => !originals.includes(i)).map(option)}</optgroup>`);
      node.value = pin;
    }
    if (!state.pin_a || !state.pin_b) {
      put($("compare-say"), h`<span class="soft">Pin two configurations, A and B: both were measured on the same documents, so the difference per document decides (McNemar's exact test for answers, a paired bootstrap for text), not whether two intervals overlap.</span>`);
      put($("compare"), raw(""));
      return;
    }
    const c = T.compare(sweep, state.pin_a, state.pin_b, state.metric, T.searched(state));
    put($("compare-say"), h`<span class="answer ${c.better ? "yes" : "no"}">${c.refused ? "No answer. " : c.better ? `Yes: ${c.better.toUpperCase()} is better. ` : "No. "}</span>${c.said}`);
    const body = Object.keys(sweep.metrics).map((name) => {
      const m = sweep.metrics[name], d = name === state.metric ? c : T.compare(sweep, state.pin_a, state.pin_b, name, 1);
      const gap = d.refused ? "" : m.kind === "exact" ? h`${signed(100 * d.difference, m.digits)} <small>right alone: A ${d.only_a}, B ${d.only_b}</small>` : `${signed(d.difference, m.digits)} [${signed(d.low, m.digits)}, ${signed(d.high, m.digits)}]`;
      return h`<tr><th scope="row">${m.title} <small>${unit(m)}</small></th><td class="num">${bare(m, d.value_a)}</td><td class="num">${bare(m, d.value_b)}</td><td class="num">${gap}</td><td class="num">${d.refused ? "" : d.p < 0.001 ? "below 0.001" : T.fixed(d.p, 3)}</td><td>${raw(d.refused || d.better ? "" : "<small>")}${d.refused ? "not comparable" : d.better ? `${d.better.toUpperCase()} is better` : "not told apart"}${raw(d.refused || d.better ? "" : "</small>")}</td></tr>`;
    });
    const a = rowOf(state.pin_a), b = rowOf(state.pin_b);
    const plain = (name, f, tag) => h`<tr><th scope="row">${name} ${tag}</th><td class="num">${f(a)}</td><td class="num">${f(b)}</td><td class="num"></td><td class="num"></td><td></td></tr>`;
    put($("compare"), h`<table><caption>A: ${label(a)}. B: ${label(b)}.</caption><thead><tr><th scope="col">on</th><th scope="col" class="num">A</th><th scope="col" class="num">B</th><th scope="col" class="num">B − A, 95 %</th><th scope="col" class="num">p</th><th scope="col">verdict</th></tr></thead><tbody>${body}${plain("size", (i) => `${MB(size(i))} MB`, COUNTED)}${plain("time per token", (i) => `${timed(i)}`, MODELLED)}</tbody></table>`);
  }
  const signed = (x, digits) => (x < 0 ? "−" : "+") + T.fixed(Math.abs(x), digits);

  // -------------------------------------------------------------------------------------------------------------- chosen

  let layered = "";
  function chosenCard() {
    const i = chosenRow();
    $("follow").setAttribute("aria-pressed", !state.chosen);
    if (i === null) {
      put($("chosen-say"), raw("None is chosen: click a point, or use a table's button."));
      for (const name of ["chosen", "layers", "layer-say"]) put($(name), raw(""));
      $("recipe").textContent = $("code").textContent = "";
      layered = "";
      Plotly.purge("layer-plot");
      return;
    }
    const l = now.latency.of(i), mem = l.memory, d = sweep.devices[state.device], e = state.engine, shape = sweep.shapes[sweep.shape_code[i]];
    const worth = shape.max_context && Math.max(state.context, T.PROMPT) > shape.max_context ? [`a context of ${T.thousands(state.context)} tokens is beyond the ${T.thousands(shape.max_context)} that the model was made for`] : [];
    const warned = [...worth, ...shape.warnings[e]];
    put($("chosen-say"), h`<b>${label(i)}</b> (${state.chosen ? "chosen by you" : "the best, followed"}; ${id(i)}).`);
    const parts = ["model", "method", "scheme", "bits", "group", "sparsity", "pattern", "experts", "top_k", "channels"].map((c) => [NAMES[c] || c, c in sweep.values ? shown(c, T.cell(sweep, c, i)) : T.cell(sweep, c, i)]);
    const row = (name, value, tag, note = "") => h`<tr><th scope="row">${name}</th><td class="num">${value}</td><td>${tag}</td><td>${note}</td></tr>`;
    const rests = ["dram_bytes_per_s", ...(l.binds === "compute" ? [d.peak_name[e]] : []), ...(mem.of && mem.kept !== mem.of ? ["flash_bytes_per_s", "usable_bytes"] : [])].filter((n) => n in d.how).map((n) => `${n} (${d.how[n]})`).join(", ");
    const fits = mem.fits === null ? "how much an app may take is not known" : `${mem.fits ? "fits in" : "does not fit in"} ${T.engineering(d.usable, "B")}`;
    put($("chosen"), h`<table><caption>${parts.map(([k, v]) => `${k} ${v}`).join(" · ")}</caption><thead><tr><th scope="col">number</th><th scope="col" class="num">value</th><th scope="col">provenance</th><th scope="col">note</th></tr></thead><tbody>${[
      row("size", `${MB(size(i))} MB`, COUNTED, `${T.thousands(size(i))} bytes; ${T.fixed(sweep.numbers.bits_per_weight[i], 3)} bits per weight, everything counted`),
      ...Object.entries(sweep.metrics).map(([name, m]) => row(m.title, T.said(m, sweep.quality[name].value[i]), built(i), m.kind === "kld" ? `${within(name, i)} from ${sweep.reference[T.text(sweep, "model", i)]}` : within(name, i))),
      row("time per token", timed(i), MODELLED, l.missing || h`${band(i)} on ${d.title}, waits for ${l.binds}; rests on ${rests}`),
      row("memory", T.engineering(mem.total, "B"), MODELLED, `${fits}; weights ${T.engineering(shape.resident + mem.experts, "B")}, cache ${T.engineering(mem.kv || 0, "B")}, working ${T.engineering(shape.working, "B")}`),
      ...warned.map((w) => row("caution", "", MODELLED, w)),
      row("made and measured in", `${short(sweep.numbers.seconds[i])} s`, built(i), sweep.meta.machine ? `on ${machine()}` : "")]}</tbody></table>`);
    const recipe = T.text(sweep, "recipe", i);
    let pretty = recipe;
    try { pretty = JSON.stringify(JSON.parse(recipe), null, 1); } catch { /* shown as it is stored */ }
    $("recipe").textContent = pretty;
    $("code").textContent = python(i, recipe);
    layers(i);
  }
  const machine = () => (typeof sweep.meta.machine === "string" ? sweep.meta.machine : sweep.meta.machine.machine || JSON.stringify(sweep.meta.machine));

  function python(i, recipe) {
    return `from edgelab import Recipe
from edgelab.sweep_run import measure_configuration

recipe = Recipe.from_json(${JSON.stringify(recipe)})
measured = measure_configuration(${JSON.stringify(T.text(sweep, "model", i))}, recipe, step=print)
for name in ("size_bytes", "em_assistant", "em_arithmetic", "kld", "bits_per_byte"):
    print(name, measured[name])
`;
  }

  function layers(i) {
    const names = sweep.layer.names[sweep.layer.code[i]], from = sweep.layer.start[i], sizes = names.map((_, k) => sweep.layer.bytes[from + k]), errors = names.map((_, k) => sweep.layer.error[from + k]);
    const brief = names.map((n) => n.replace(/^model\./, "").replace(/\.weight$/, ""));
    const all = sizes.reduce((a, b) => a + b, 0), most = sizes.indexOf(Math.max(...sizes)), known = errors.map((e, k) => [e, k]).filter(([e]) => Number.isFinite(e)).sort((a, b) => b[0] - a[0]);
    const lost = !known.length ? "no weight kept its shape, so none can be compared" : known[0][0] === 0 ? "every weight is as it was" : `the largest relative error is ${percent(known[0][0], 1)}, of ${brief[known[0][1]]}; the median is ${percent((known[known.length >> 1][0] + known[(known.length - 1) >> 1][0]) / 2, 1)}`;
    const cut = names.length - known.length;
    put($("layer-say"), h`${names.length} weights take ${MB(all)} MB; ${brief[most]} takes the most, ${percent(sizes[most] / all)} of it; ${lost}${cut && known.length ? `. ${cut} changed shape and have no error` : ""}.`);
    const key = `${id(i)} ${document.documentElement.dataset.theme} ${inks.ink} ${$("layer-plot").clientWidth}`;
    if (key !== layered) {
      layered = key;
      const place = names.map((n) => { const m = /(?:^|\.)(?:layers|h|blocks)\.(\d+)\./.exec(n); return m ? `layer ${m[1]}` : "around"; });
      const role = names.map((n) => sweep.roles.findIndex(([, pattern]) => new RegExp(pattern).test(n))), here = [...new Set(role)].sort((x, y) => x - y);
      const places = [...new Set(place)].sort((x, y) => (x === "around") - (y === "around") || Number(x.slice(6)) - Number(y.slice(6)));
      const bars = here.map((r) => ({ type: "bar", name: sweep.roles[r][0], x: places, y: places.map((p) => sizes.reduce((sum, bytes, k) => sum + (role[k] === r && place[k] === p ? bytes / 1e6 : 0), 0)), marker: { color: sweep.colours[r] }, hovertemplate: `${sweep.roles[r][0]}, %{x}: %{y:.4f} MB<extra></extra>` }));
      const dots = here.map((r) => { const of = names.map((_, k) => k).filter((k) => role[k] === r && Number.isFinite(errors[k])); return { type: "scatter", mode: "markers", x: of.map((k) => place[k]), y: of.map((k) => errors[k] * 100), xaxis: "x2", yaxis: "y2", text: of.map((k) => escaped(brief[k])), marker: { color: sweep.colours[r], symbol: sweep.symbols[r % sweep.symbols.length], size: 8, line: { width: 0.8, color: inks.raised } }, hovertemplate: "%{text}: %{y:.2f} %<extra></extra>" }; });
      put($("layer-key"), h`${here.map((r) => h`<span>${icon(sweep.symbols[r % sweep.symbols.length], sweep.colours[r])}${sweep.roles[r][0]}</span>`)}`);
      const slim = $("layer-plot").clientWidth < 620, axis = { gridcolor: inks.grid, zeroline: false, linecolor: inks.soft, tickcolor: inks.grid, fixedrange: true, automargin: false };
      const across = { ...axis, showgrid: false, type: "category", categoryorder: "array", categoryarray: places, range: [-0.5, places.length - 0.5], tickvals: places, ticktext: places.map((p) => p.replace("layer ", slim || places.length > 8 ? "" : "layer ")) };
      Plotly.react("layer-plot", [...bars, ...dots], { barmode: "stack", bargap: 0.25, showlegend: false, hovermode: "closest", dragmode: false, margin: { l: 62, r: 14, t: 12, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, sans-serif", size: 12, color: inks.soft }, xaxis: { ...across, domain: slim ? [0, 1] : [0, 0.46], anchor: "y" }, xaxis2: { ...across, domain: slim ? [0, 1] : [0.56, 1], anchor: "y2" },
        yaxis: { ...axis, domain: slim ? [0.56, 1] : [0, 1], title: { text: "MB", standoff: 6 }, rangemode: "tozero" }, yaxis2: { ...axis, domain: slim ? [0, 0.42] : [0, 1], anchor: "x2", title: { text: "relative error, %", standoff: 6 }, rangemode: "tozero" } }, { displayModeBar: false, responsive: true });
    }
    if ($("layers-box").open) put($("layers"), h`<table><thead><tr><th scope="col">weight</th><th scope="col" class="num">bytes</th><th scope="col" class="num">relative error</th></tr></thead><tbody>${brief.map((n, k) => h`<tr><th scope="row">${n}</th><td class="num">${T.thousands(sizes[k])}</td><td class="num">${Number.isFinite(errors[k]) ? percent(errors[k], 2) : "another shape"}</td></tr>`)}</tbody></table>`);
  }

  // ------------------------------------------------------------------------------------------------------------- controls

  const CONTEXTS = [0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072];
  const STEPS = 200;
  // sliders: from a position to a limit and back; the end that allows everything is no limit
  function ranges() {
    const m = now.metric, span = (values, log) => { const [a, b] = extent(values, null, log), pad = (b - a) / 22; return [a + pad, b - pad]; };  // without the axis' room
    const log = (values) => ({ log: true, ends: span(values, true) });
    const sizes = log(sweep.numbers.size_bytes), times = log(now.latency.value), values = now.quality.value;
    const quality = m.kind === "exact" ? { log: false, ends: [0, 1] } : log(values);
    return { size: { ...sizes, open: STEPS }, late: { ...times, open: STEPS }, quality: { ...quality, open: m.sign > 0 ? STEPS : 0 } };
  }
  const limitOf = (r, k) => { if (k === r.open) return null; const v = r.ends[0] + (k / STEPS) * (r.ends[1] - r.ends[0]); return Number((r.log ? 10 ** v : v).toPrecision(4)); };
  const placeOf = (r, v) => { if (v === null) return r.open; const t = ((r.log ? Math.log10(Math.max(v, 1e-300)) : v) - r.ends[0]) / (r.ends[1] - r.ends[0] || 1); return Math.round(STEPS * Math.max(0, Math.min(1, t))); };

  const BUDGETS = { size: ["size_limit", () => 1e6, () => "MB"], late: ["latency_limit", () => 1, () => "ms per token"], quality: ["quality_limit", () => 1 / scale(now.metric), () => unit(now.metric)] };

  function fill() {  // the controls say what the state says
    for (const name of ["metric", "objective", "device", "engine"]) $(name).value = state[name];
    if (document.activeElement !== $("context")) $("context").value = state.context;
    const nearest = CONTEXTS.reduce((a, c, k) => (Math.abs(c - state.context) < Math.abs(CONTEXTS[a] - state.context) ? k : a), 0);
    $("context-slider").value = nearest;
    $("context-slider").setAttribute("aria-valuetext", `${T.thousands(state.context)} tokens`);
    const r = ranges();
    for (const [name, [field, factor, words]] of Object.entries(BUDGETS)) {
      const v = state[field], slider = $(`${name}-slider`), box = $(name), shownV = v === null ? "" : String(Number((v / factor()).toPrecision(6)));
      slider.value = placeOf(r[name], v);
      slider.setAttribute("aria-valuetext", v === null ? "no limit" : `${shownV} ${words()}`);
      if (document.activeElement !== box) box.value = shownV;
    }
    const m = now.metric, bound = m.sign > 0 ? "at most" : "at least";
    $("quality-name").textContent = `${m.title[0].toUpperCase()}${m.title.slice(1)} ${bound}${m.kind === "exact" ? ", %" : ""}`;
    $("quality-slider").setAttribute("aria-label", `${m.title} ${bound}, slider`);
    const filters = new Map(state.filters);
    for (const box of document.querySelectorAll("#filters input")) {
      const allowed = filters.get(box.dataset.column);
      box.checked = !allowed || allowed.includes(sweep.values[box.dataset.column][Number(box.value)]);
    }
    for (const b of document.querySelectorAll("#presets button")) b.setAttribute("aria-pressed", b.dataset.preset === ui.preset);
    $("preset-meaning").hidden = !ui.preset;
    $("preset-meaning").textContent = ui.preset ? sweep.presets[ui.preset].meaning : "";
    for (const mode of ["inspect", "brush"]) $(mode).setAttribute("aria-pressed", ui.mode === mode);
    $("plot-box").classList.toggle("brushing", ui.mode === "brush");
    $("plot-how").textContent = ui.mode === "inspect" ? "A click chooses the point, dragging zooms, a double click shows all again. Keyboard: arrows go from point to point, Enter chooses, A and B pin." : "Dragging marks an area: what lies in it is summed up below. Escape or a double click clears it. “Brush by numbers” does the same by keyboard.";
  }

  function build() {
    const option = (value, words) => h`<option value="${value}">${words}</option>`;
    put($("metric"), h`${Object.entries(sweep.metrics).map(([name, m]) => option(name, m.title))}`);
    put($("objective"), h`${Object.entries(sweep.objectives).map(([name, words]) => option(name, words))}`);
    const kinds = [...new Set(Object.values(sweep.devices).map((d) => d.kind))];
    put($("device"), h`${kinds.map((kind) => h`<optgroup label="${kind}s">${Object.entries(sweep.devices).filter(([, d]) => d.kind === kind).map(([name, d]) => option(name, `${d.title} (${d.year})`))}</optgroup>`)}`);
    const kindsOf = { cpu: "CPU, general engine", "cpu-tuned": "CPU, low-bit kernels", gpu: "GPU", npu: "NPU" };
    put($("engine"), h`${Object.keys(sweep.engines).map((name) => option(name, kindsOf[name] || name))}`);
    put($("presets"), h`${Object.entries(sweep.presets).filter(([, p]) => p.metric in sweep.metrics).map(([name, p]) => h`<button type="button" data-preset="${name}" aria-pressed="false" title="${p.meaning}">${p.title[0].toUpperCase() + p.title.slice(1)}</button>`)}`);
    $("filter-box").open = matchMedia("(min-width: 66.01rem)").matches;
    $("filter-box").insertAdjacentHTML("beforeend", Object.entries(sweep.values).filter(([, v]) => v.length > 1).map(([column, values]) => h`<div class="filter" role="group" aria-label="${NAMES[column]}"><span class="name">${NAMES[column]}</span><div class="chips">${values.map((v, k) => h`<label class="chip"><input type="checkbox" checked data-column="${column}" value="${k}" aria-label="${NAMES[column]} ${shown(column, v)}"><span>${column === "method" ? icon("circle", colourOf(column, v)) : column === "model" ? icon(symbol(v), "currentColor") : ""}${shown(column, v)}</span></label>`)}</div></div>`.text).join(""));
    put($("colour"), h`${sweep.coloured_by.filter((c) => sweep.values[c].length > 1).map((c) => option(c, NAMES[c]))}`);
    legend();
    put($("brush-fields"), h`<div class="field"><label for="brush-x">Across</label><select id="brush-x"><option value="0">size, MB</option><option value="1">time per token, ms</option></select></div>${[["x0", "from"], ["x1", "to"], ["y0", "quality from"], ["y1", "to"]].map(([k, words]) => h`<div class="pair"><label for="brush-${k}">${words}</label><input type="number" step="any" id="brush-${k}" aria-label="Brush ${k[0] === "x" ? "across" : "quality"} ${k[1] === "0" ? "from" : "to"}"></div>`)}<button type="button" id="brush-clear">Clear the brush</button>`);
    for (const name of ["size", "late", "quality"]) Object.assign($(`${name}-slider`), { min: 0, max: STEPS, step: 1 });
    Object.assign($("context-slider"), { min: 0, max: CONTEXTS.length - 1, step: 1 });
    const facts = [["configurations", T.thousands(sweep.n)], ["documents", listed(Object.entries([...sweep.text, ...sweep.answers].reduce((n, d) => ({ ...n, [d.domain]: (n[d.domain] || 0) + 1 }), {})).map(([k, n]) => `${n} ${k}`))],
      ["KL divergence is from", listed(Object.entries(sweep.reference).map(([m, r]) => (m === r ? `${m} as it is` : `${r} for ${m}`)))], ...Object.entries(sweep.meta).filter(([, v]) => ["string", "number"].includes(typeof v)).map(([k, v]) => [k.replaceAll("_", " "), String(v)])];
    put($("facts"), h`${facts.map(([k, v]) => h`<dt>${k}</dt><dd>${v}</dd>`)}`);
  }

  function legend() {
    const values = sweep.values[ui.colour], most = sweep.colours.length, named = values.slice(0, most).map((v, k) => (k === most - 1 && values.length > most ? "other" : `${["method", "model"].includes(ui.colour) ? "" : `${NAMES[ui.colour]} `}${shown(ui.colour, v)}`));
    put($("key"), h`${named.map((words, k) => h`<span>${icon("circle", sweep.colours[k])}${words}</span>`)}<span class="rule"></span>${sweep.values.model.map((m) => h`<span>${icon(symbol(m), "currentColor")}${m}</span>`)}<span class="rule"></span><span>${icon("star", "var(--ink)")}best</span><span>— Pareto front</span><span>faint: outside the budgets</span>`);
  }

  function brushFields() {
    const b = ui.brush;
    if (b) $("brush-x").value = b.panel;
    for (const [k, v] of [["x0", b && b.x[0]], ["x1", b && b.x[1]], ["y0", b && b.y[0]], ["y1", b && b.y[1]]]) if (document.activeElement !== $(`brush-${k}`)) $(`brush-${k}`).value = b && Number.isFinite(v) ? Number(v.toPrecision(4)) : "";
  }

  // many events of a slider, one picture per frame
  let waiting = null, gate = false;
  function soon(work) {
    if (gate) { waiting = work; return; }
    gate = true;
    requestAnimationFrame(() => { gate = false; const next = waiting; waiting = null; if (next) soon(next); });
    work();
  }

  function listen() {
    $("controls").addEventListener("submit", (e) => e.preventDefault());
    for (const name of ["metric", "objective", "device", "engine"])
      $(name).addEventListener("change", () => change(name === "metric" ? { metric: $(name).value, quality_limit: null } : { [name]: $(name).value }));
    $("context-slider").addEventListener("input", () => soon(() => { $("context").value = CONTEXTS[$("context-slider").value]; change({ context: CONTEXTS[$("context-slider").value] }); }));
    $("context").addEventListener("input", () => { const v = Number($("context").value); if ($("context").value !== "") soon(() => change({ context: v })); });
    for (const [name, [field, factor]] of Object.entries(BUDGETS)) {
      const slider = $(`${name}-slider`), box = $(name);
      slider.addEventListener("input", () => soon(() => {
        const v = limitOf(ranges()[name], Number(slider.value));
        box.value = v === null ? "" : String(Number((v / factor()).toPrecision(4)));
        change({ [field]: v === null ? null : Number(box.value) * factor() });
      }));
      box.addEventListener("input", () => soon(() => {
        const v = box.value === "" ? null : Number(box.value) * factor();
        if (v !== null && !(v >= 0)) { $("alert").textContent = `${box.value} must be a number, 0 or more; leave the box empty for no limit`; return; }
        change({ [field]: v });
      }));
    }
    $("filters").addEventListener("change", (e) => {
      const column = e.target.dataset.column, boxes = [...document.querySelectorAll(`#filters input[data-column="${column}"]`)];
      const allowed = boxes.filter((b) => b.checked).map((b) => sweep.values[column][Number(b.value)]);
      const others = state.filters.filter(([c]) => c !== column);
      const filters = allowed.length === boxes.length ? others : [...others, [column, allowed]];
      change({ filters: filters.sort((a, b) => (a[0] < b[0] ? -1 : 1)) });
    });
    $("presets").addEventListener("click", (e) => {
      const name = e.target.closest("button")?.dataset.preset;
      if (!name) return;
      try {
        ui.zoom = {};
        const { metric, objective, device, size_limit, latency_limit, quality_limit } = T.apply(sweep, name, state);
        change({ metric, objective, device, size_limit, latency_limit, quality_limit, chosen: "" }, name);
      } catch (error) { $("alert").textContent = error.message; }
    });
    $("no-budgets").addEventListener("click", () => change({ size_limit: null, latency_limit: null, quality_limit: null }));
    $("no-filters").addEventListener("click", () => change({ filters: [] }));
    for (const mode of ["inspect", "brush"]) $(mode).addEventListener("click", () => { ui.mode = mode; if (mode === "brush") $("brush-box").open = true; fill(); });
    $("colour").addEventListener("change", () => { ui.colour = $("colour").value; legend(); change({}, ui.preset); });
    $("fit").addEventListener("click", () => { ui.fitted = true; ui.zoom = {}; change({}, ui.preset); });
    $("whole").addEventListener("click", () => { ui.fitted = false; ui.zoom = {}; change({}, ui.preset); });
    $("brush-fields").addEventListener("input", () => soon(() => {
      const read = (k, none) => ($(`brush-${k}`).value === "" ? none : Number($(`brush-${k}`).value));
      setBrush({ panel: Number($("brush-x").value), x: [read("x0", -Infinity), read("x1", Infinity)], y: [read("y0", -Infinity), read("y1", Infinity)] });
    }));
    $("brush-clear").addEventListener("click", () => setBrush(null));
    document.querySelector("main").addEventListener("click", (e) => {
      const b = e.target.closest("button[data-act], button[data-sort]");
      if (!b) return;
      if (b.dataset.sort) { ui.sort = b.dataset.sort; allTable(); return; }
      const i = Number(b.dataset.row);
      if (b.dataset.act === "choose") choose(i); else change({ [b.dataset.act]: id(i) }, ui.preset);
      tell(b.dataset.act === "choose" ? `${label(i)} is chosen` : `${label(i)} is pinned as ${b.dataset.act.at(-1).toUpperCase()}`);
    });
    $("all-box").addEventListener("toggle", allTable);
    $("more").addEventListener("click", () => { ui.shown += 100; allTable(); });
    for (const pin of ["a", "b"]) {
      $(`pin-${pin}`).addEventListener("change", () => change({ [`pin_${pin}`]: $(`pin-${pin}`).value }, ui.preset));
      $(`as-${pin}`).addEventListener("click", () => { if (chosenRow() !== null) change({ [`pin_${pin}`]: id(chosenRow()) }, ui.preset); });
    }
    $("against").addEventListener("click", () => {
      const base = T.anchor(sweep, now.rows);
      if (base === null || now.best === null) { $("alert").textContent = "There is no original, or nothing within the budgets, to compare."; return; }
      change({ pin_a: id(base), pin_b: id(now.best) }, ui.preset);
    });
    $("swap").addEventListener("click", () => change({ pin_a: state.pin_b, pin_b: state.pin_a, from_a: state.from_b, from_b: state.from_a }, ui.preset));
    $("unpin").addEventListener("click", () => change({ pin_a: "", pin_b: "" }, ui.preset));
    $("follow").addEventListener("click", () => change({ chosen: state.chosen || now.best === null ? "" : id(now.best) }, ui.preset));
    $("layers-box").addEventListener("toggle", chosenCard);
    $("copy-recipe").addEventListener("click", () => copy($("recipe").textContent, "The recipe"));
    $("copy-code").addEventListener("click", () => copy($("code").textContent, "The Python"));
    $("share").addEventListener("click", () => { link(); copy(location.href, "The link"); });
    $("picture").addEventListener("click", picture);
    const theme = $("theme");
    try { theme.value = localStorage.getItem("edgelab-theme") || "auto"; } catch { /* a browser may forbid it */ }
    const themed = () => {
      if (theme.value === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme.value;
      sprites.clear(); readInks(); layered = "";
      if (now) { draw(); chosenCard(); }
    };
    theme.addEventListener("change", () => { try { localStorage.setItem("edgelab-theme", theme.value); } catch { /* as above */ } themed(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themed);
    themed();
    let width = 0;
    new ResizeObserver(() => { if (now && $("plot").clientWidth !== width) { width = $("plot").clientWidth; draw(); } }).observe($("plot"));
    addEventListener("hashchange", () => { if (location.hash.slice(1) !== linked) { read(); } });
    addEventListener("beforeprint", () => { readInks(); sprites.clear(); draw(); });
  }

  const tell = (words) => { $("told").textContent = words; };
  async function copy(words, what) {
    try { await navigator.clipboard.writeText(words); } catch {  // a page on a disk may not be allowed to
      const area = Object.assign(document.createElement("textarea"), { value: words, readOnly: true });
      document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
    }
    $("told").classList.remove("hidden");
    tell(`${what} is copied.`);
    setTimeout(() => $("told").classList.add("hidden"), 2500);
  }

  async function picture() {  // what the plot shows, with the sentence above it, as a file
    const ratio = 2, W = $("plot").clientWidth, H = $("plot").clientHeight, top = 92;
    const base = await Plotly.toImage("plot", { format: "png", width: W, height: H, scale: ratio });
    const image = new Image();
    await new Promise((done, failed) => { image.onload = done; image.onerror = failed; image.src = base; });
    const points = document.createElement("canvas"), out = document.createElement("canvas");
    paint(points, ratio);
    out.width = W * ratio; out.height = (H + top) * ratio;
    const c = out.getContext("2d");
    c.fillStyle = inks.raised; c.fillRect(0, 0, out.width, out.height);
    c.drawImage(image, 0, top * ratio, W * ratio, H * ratio);
    c.drawImage(points, 0, top * ratio);
    c.scale(ratio, ratio);
    c.fillStyle = inks.ink; c.font = "600 17px system-ui, sans-serif"; c.fillText(document.title, 16, 26);
    c.font = "13px system-ui, sans-serif";
    const words = $("say").textContent.split(" "), lines = [""];
    for (const w of words) { const next = `${lines.at(-1)} ${w}`.trim(); if (c.measureText(next).width > W - 32) lines.push(w); else lines[lines.length - 1] = next; }
    c.fillStyle = inks.soft;
    lines.slice(0, 3).forEach((t, k) => c.fillText(t, 16, 46 + 17 * k));
    out.toBlob((blob) => { const a = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "explorer.png" }); a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); });
    tell("The picture is saved.");
  }

  // ---------------------------------------------------------------------------------------------------- the view in the link

  let linked = "";
  const opening = () => ({ ...T.DEFAULTS, ...sweep.first });
  function link() {
    const q = new URLSearchParams();
    for (const [k, v] of Object.entries(state)) {
      if (JSON.stringify(v) === JSON.stringify(opening()[k])) continue;
      q.set(k, k === "filters" ? JSON.stringify(v) : v === null ? "none" : String(v));
    }
    if (ui.colour !== "method") q.set("colour", ui.colour);
    linked = q.toString();
    try { history.replaceState(null, "", `#${linked}`); } catch { location.replace(`#${linked}`); }
  }

  function read() {
    const q = new URLSearchParams(location.hash.slice(1)), found = opening();
    const numbers = ["context", "size_limit", "latency_limit", "quality_limit"];
    linked = location.hash.slice(1);
    try {
      for (const [k, v] of q) {
        if (k === "colour" && sweep.coloured_by.includes(v)) { ui.colour = $("colour").value = v; legend(); continue; }
        if (!(k in T.DEFAULTS)) throw new Error(`the link has ${JSON.stringify(k)}, which is not known here`);
        const number = numbers.includes(k);
        if (v === "none" && k.endsWith("_limit")) { found[k] = null; continue; }
        if (number && (v.trim() === "" || !(Number(v) >= 0 && Number(v) < Infinity))) throw new Error(`${k}=${v} in the link must be a number, 0 or more`);
        if (k === "from_a" || k === "from_b") {
          const [metric, n] = v.split(",");
          if (!(metric in sweep.metrics) || !(Number.isInteger(Number(n)) && Number(n) >= 1)) throw new Error(`${k}=${v} in the link must be a metric and a number of rows`);
          found[k] = [metric, Number(n)];
          continue;
        }
        found[k] = k === "filters" ? JSON.parse(v) : number ? Number(v) : v;
      }
      for (const k of ["chosen", "pin_a", "pin_b"]) if (found[k]) T.index(sweep, found[k]);
      if (!(found.objective in sweep.objectives)) throw new Error(`objective=${found.objective} in the link is not known`);
      T.view(sweep, found);
    } catch (error) {
      change(opening());
      $("alert").textContent = `The link does not fit this page: ${error.message}. This is the view from the start.`;
      return;
    }
    change(found);
  }

  // ---------------------------------------------------------------------------------------------------------------- start

  async function start() {
    readInks();
    if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old to unpack the data; any of 2023 or later will do");
    const bytes = Uint8Array.from(atob($("sweep").textContent), (c) => c.charCodeAt(0));
    const plain = new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
    sweep = T.unpack(await plain.arrayBuffer());
    for (const name of ["tools", "app", "footer"]) $(name).hidden = false;
    state = opening();
    now = T.view(sweep, state);
    build();
    listen();
    pointers();
    read();
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
    window.edgelab.firstDisplayMs = performance.now() - began;
  }

  const rowsOf = (mask) => Array.from(mask.keys()).filter((i) => mask[i]);
  const plainView = (v) => ({ rows: rowsOf(v.rows), inside: rowsOf(v.inside), front: rowsOf(v.front), front_size: rowsOf(v.front_size), front_latency: rowsOf(v.front_latency), best: v.best,
    picked_from: v.picked_from, notes: v.notes, latency: [...v.latency.value], low: [...v.latency.low], high: [...v.latency.high], quality: [...v.quality.value], quality_low: [...v.quality.low], quality_high: [...v.quality.high] });
  window.edgelab = {
    state: () => ({ ...state, looked_at: chosenRow() === null ? "" : id(chosenRow()), mode: ui.mode, brushed: ui.brush ? rowsOf(brushedRows()) : null, best: now.best === null ? null : id(now.best), picked_from: now.picked_from, front: rowsOf(now.front).map(id), notes: now.notes }),
    set: (patch) => change(patch),
    view: (of) => plainView(T.view(sweep, { ...T.DEFAULTS, ...of })),
    apply: (name, of) => T.apply(sweep, name, { ...T.DEFAULTS, ...of }),
    time: (i, device, engine, context) => { const t = T.milliseconds(sweep.shapes[sweep.shape_code[i]], sweep.devices[device], sweep.engines[engine], context); return [t.value, t.low, t.high]; },
    compare: (a, b, metric, picked) => T.compare(sweep, a, b, metric, picked),
    rivals: (row, among, metric) => { const mask = new Uint8Array(sweep.n); for (const i of among) mask[i] = 1; return T.rivals(sweep, row, mask, metric); },
    place: (row, panel = 0) => { const b = $("plot-points").getBoundingClientRect(); return [b.left + spots[panel].xs[row], b.top + spots[panel].ys[row]]; },
    panel: (k) => panels[k],
    drawn: () => ui.drawn,
    rest, resting: () => late === null && waiting === null,
    sweep: () => sweep,
  };
  window.edgelab.ready = start().catch((error) => {
    $("app").hidden = false;
    $("alert").textContent = `This page could not start: ${error.message}`;
    window.edgelab.error = error;
    throw error;
  });
})();
