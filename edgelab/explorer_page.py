"""The trade-off explorer without Python behind it: one HTML file that opens from a disk, with all its controls.

    explorer_files/explorer.html   the page: what is there before any script runs
    explorer_files/explorer.css    its look, light, dark and in print
    explorer_files/tradeoff.js     the arithmetic: the twin of tradeoff.py, paired.py and significance.py
    explorer_files/explorer.js     the controls, the drawing, the words

The sweep travels inside: columns as typed arrays, the sums per document of every row among them, since a paired comparison needs them;
gzip, then base64 (`packed` has the layout). Nothing that depends on a control is stored ready-made but one thing: the
intervals of a metric on one domain, which are a bootstrap of 1,000 resamples for each row. Latency is computed in the page for any
context from what `device.predict` reads of a shape, a device and a class of engines (`_shape`, `_device`, `_engine`), some 30 numbers each.

Points are drawn on a canvas of our own over plotly's axes: 3,000 SVG markers took 125 ms to redraw on 2 cores of an EPYC, the canvas
takes a few. Two walls keep the page to itself: it names no address, and its content security policy allows none; the scripts run
by their hashes alone.
"""

import base64
import gzip
import hashlib
import json
import math
import os
from html import escape
from pathlib import Path

import numpy as np

from edgelab import explorer_plots, plots, tradeoff, words
from edgelab.device import CHUNK, CLASSES, UNITS, DeviceProfile, devices, predict
from edgelab.shape import ModelShape
from edgelab.sweep_table import FILTERS, METRICS, TEXTS, Sweep, quality

FILES = Path(__file__).resolve().parent / "explorer_files"
TITLE = "How small can it get?"
PROMPT = 128  # tokens that `tradeoff.latency` has a prompt of: what a device's working memory is counted for
NUMBERS = ("bits", "group", "sparsity", "experts", "top_k", "channels", "size_bytes", "bits_per_weight", "seconds")


# ---------------------------------------------------------------------------------------------------------------- the data


class _Blocks:
    """Arrays one after the other, each on a multiple of eight bytes; `put` returns (kind, offset, count)."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def put(self, values, kind: str) -> tuple[str, int, int]:
        flat = np.ascontiguousarray(values, {"f8": "<f8", "f4": "<f4", "u4": "<u4", "u1": "u1"}[kind]).ravel()
        content = flat.tobytes()
        content += bytes(-len(content) % 8)
        place = (kind, self.size, len(flat))
        self.parts.append(content)
        self.size += len(content)
        return place

    def codes(self, values) -> dict:
        """A column of texts as its different values, in order of appearance, and a number into them for each row."""
        different = list(dict.fromkeys(values))
        number = {v: k for k, v in enumerate(different)}
        return {"values": different, "codes": self.put([number[v] for v in values], "u4")}


def packed(sweep: Sweep) -> bytes:
    """The sweep and what its latencies are computed from: uint32 length of a JSON header, the header, blocks (all little-endian)."""
    blocks = _Blocks()
    shapes = blocks.codes(sweep["shape"])
    names = blocks.codes([tuple(n) for n in sweep.layers["layer_name"]])
    sizes, errors = (list(sweep.layers[c]) for c in ("layer_bytes", "layer_error"))
    distinct = [tradeoff.shape_of(s) for s in shapes["values"]]
    header = {
        "rows": len(sweep),
        "meta": {k: v for k, v in sweep.meta.items() if k not in ("documents", "reference")},
        "reference": dict(sweep.reference),
        "original": {m: sweep.original(m) for m in sweep.values("model")},
        "values": {c: sweep.values(c) for c in FILTERS},
        "text": [{"domain": d.domain, "source": d.source, "tokens": d.tokens, "bytes": d.bytes} for d in sweep.text],
        "answers": [{"domain": d.domain} for d in sweep.answers],
        "metrics": {m.name: _metric(m) for m in METRICS.values() if _measured(sweep, m)},
        "objectives": tradeoff.OBJECTIVES,
        "presets": {p.name: _preset(p) for p in tradeoff.PRESETS.values()},
        "devices": {name: _device(p) for name, p in devices().items()},
        "engines": {name: _engine(name) for name in CLASSES},
        "shapes": [_shape(s) for s in distinct],
        "shape_code": shapes["codes"],
        "texts": {c: blocks.codes(sweep[c]) for c in TEXTS if c != "shape"},
        "numbers": {c: blocks.put(sweep[c], "f8") for c in NUMBERS},
        "quality": {},
        "doc_kld": blocks.put(sweep.doc_kld, "f4"),
        "doc_nll": blocks.put(sweep.doc_nll, "f4"),
        "doc_exact": blocks.put(sweep.doc_exact, "u1"),
        "layer": {
            "names": names["values"],
            "blocks": {
                "code": names["codes"],
                "start": blocks.put(np.cumsum([0, *map(len, sizes)]), "u4"),
                "bytes": blocks.put(np.concatenate(sizes), "f8"),
                "error": blocks.put(np.concatenate([np.array(e, np.float32) for e in errors]), "f4"),
            },
        },
        "colours": plots.OKABE_ITO,
        "symbols": explorer_plots.SYMBOLS,
        "roles": explorer_plots.ROLES,
        "coloured_by": explorer_plots.COLOURED_BY,
        "first": _first(sweep),
        "ink": plots.INK,
    }
    for name in header["metrics"]:
        q = quality(sweep, name)
        header["quality"][name] = {end: blocks.put(getattr(q, end), "f8") for end in ("value", "low", "high")}
    head = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    return len(head).to_bytes(4, "little") + head + bytes(-(4 + len(head)) % 8) + b"".join(blocks.parts)


def _first(sweep: Sweep) -> dict:
    """What differs from `tradeoff.State()` when the page opens: a quarter of the original's bytes, as in the notebook."""
    base = tradeoff.anchor(sweep)
    return {} if base is None else {"size_limit": 0.25 * float(sweep["size_bytes"][base])}


def _measured(sweep: Sweep, m) -> bool:
    return any(d.domain in m.domains for d in (*sweep.text, *sweep.answers))


def _metric(m) -> dict:
    return {"title": m.title, "axis": m.axis, "kind": m.kind, "domains": m.domains, "better": m.better, "sign": m.sign, "digits": m.digits}


def _preset(p) -> dict:
    return {
        k: getattr(p, k) for k in ("title", "metric", "objective", "keep", "limit", "size_share", "device", "meaning")
    }  # a limit that is absent is null


def _device(p: DeviceProfile) -> dict:
    """What decoding on a device depends on; null for a number that nobody states. `how` {number: how it is known}."""

    def value(q):
        return None if q is None else q.value

    return {
        "name": p.name, "title": p.title, "kind": p.kind, "soc": p.soc, "year": p.year, "dram": value(p.dram_bytes_per_s),
        "usable": value(p.usable_bytes), "flash": value(p.flash_bytes_per_s), "peak": {c: value(p.peak(c)[1]) for c in CLASSES},
        "how": {n: q.how for n, q in p.quantities.items() if n in UNITS},
        "peak_name": {c: p.peak(c)[0] for c in CLASSES},
    }  # fmt: skip


def _engine(name: str) -> dict:
    from edgelab.efficiency import fitted

    e = fitted()[name]
    return {"name": name, "eta": e.eta, "tau": e.tau_s, "gamma": e.gamma, "factors": e.factors, "cpu": name.startswith("cpu")}


def _shape(s: ModelShape) -> dict:
    """What the roofline reads of a shape, with everything that no control changes already summed up."""
    say = next(iter(devices()))
    warned = {c: list(predict(say, s, context=0, prompt=1, engine=c).warnings) for c in CLASSES}
    return {
        "layers": s.layers, "hidden": s.hidden, "moe_layers": s.moe_layers, "experts": s.experts, "top_k": s.top_k,
        "expert_bytes": s.expert_bytes, "active_expert_bytes": s.active_expert_bytes, "resident": s.dense_bytes + s.embedding_bytes,
        "working": s.activation_bytes(min(PROMPT, CHUNK)), "kv": s.kv_bytes(1), "read": s.decode_bytes(0), "ops": s.decode_ops(0),
        "attention_ops": s.attention_ops, "max_context": s.max_context, "warnings": warned,
    }  # fmt: skip


def encoded(sweep: Sweep) -> str:
    """`packed`, in gzip and base64: the text that stands in the page. The same sweep gives the same text."""
    return base64.b64encode(gzip.compress(packed(sweep), 9, mtime=0)).decode()


# ---------------------------------------------------------------------------------------------------------------- the page


def render(sweep: Sweep, title: str = TITLE) -> str:
    """The whole page as text: one self-contained HTML document."""
    import plotly.offline

    scripts = [plotly.offline.get_plotlyjs(), *((FILES / name).read_text(encoding="utf-8") for name in ("tradeoff.js", "explorer.js"))]
    for script in scripts:
        if "</script" in script.lower():
            raise ValueError("a script holds its own end tag, and cannot stand in a page")
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    parts = {
        "POLICY": policy,
        "TITLE": escape(title),
        "STYLE": (FILES / "explorer.css").read_text(encoding="utf-8"),
        "LEAD": escape(lead(sweep)),
        "STATIC": _static(sweep),
        "DATA": encoded(sweep),
        "SCRIPTS": "\n".join(f"<script>{s}</script>" for s in scripts),
    }
    page = (FILES / "explorer.html").read_text(encoding="utf-8")
    pieces = page.split("__")  # placeholders stand between double underscores; what is put in is not looked at again
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


def lead(sweep: Sweep) -> str:
    """What the page is about, in two sentences."""
    models, methods = sweep.values("model"), [m for m in sweep.values("method") if m != "fp"]
    cut = [(sweep["sparsity"] > 0, "zeros"), (sweep["channels"] > 0, "channels cut")]
    cut += [((sweep["model"] == m) & (sweep["experts"] < sweep["experts"][sweep["model"] == m].max()), "experts taken out") for m in models]
    also = _listed(list(dict.fromkeys(words for rows, words in cut if rows.any())))
    made = f"{', '.join(methods)} at {_listed([f'{b:g}' for b in sweep.values('bits') if b < 16])} bits" + (
        f", with {also}" if also else ""
    )
    return (
        f"{len(sweep):,} ways to make {_listed(models)} smaller ({made}), each of them really made and measured on text it never saw. "
        "Say what you need, and see what it costs."
    )


def _listed(parts: list[str]) -> str:
    return "".join(parts) if len(parts) < 2 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _static(sweep: Sweep) -> str:
    """What a reader without JavaScript sees: the front of the first view, as a table."""
    v = tradeoff.view(sweep, tradeoff.State(**_first(sweep)))
    rows = sorted(np.flatnonzero(v.front_size), key=lambda i: sweep["size_bytes"][i])
    body = "".join(
        f'<tr><th scope="row">{escape(sweep["label"][i])}</th><td class="num">{words.number("weight_bytes", sweep["size_bytes"][i])}</td>'
        f'<td class="num">{escape(v.quality.metric.said(v.quality.value[i]))}</td>'
        f'<td class="num">{"unknown" if math.isnan(v.latency.value[i]) else f"{v.latency.value[i]:.3g} ms"}</td></tr>'
        for i in rows
    )
    said, device = escape(v.quality.metric.title), escape(devices()[v.state.device].title)
    heads = "".join(f'<th scope="col" class="num">{t}</th>' for t in ("size", said, f"modelled time per token on {device}"))
    return (
        '<div class="card"><p>This page computes in your browser and needs JavaScript for that. Without it, here are the '
        f'configurations that nothing beats on size and {said} at once:</p><table><thead><tr><th scope="col">configuration</th>{heads}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def write(path: str | Path, sweep: Sweep, title: str = TITLE) -> Path:
    """Write the page (to a temporary name, then renamed) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(render(sweep, title), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
