"""What notebook 09 shows: this machine under its roof, models on devices, experts on flash, the governor with sliders, the controls.

What runs here is measured here. What is said of other devices is modelled (`device.py`, `simulate.py`), and every figure, sentence and
table says so. Beside each band stands what it was tested on: devices that were held out of the fit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from edgelab import governor_plots, plots
from edgelab.device import CHUNK, CLASSES, DeviceProfile, Efficiency, Prediction, Quantity, device, devices, engineering, plain, predict
from edgelab.efficiency import fitted, published
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.expert_cache import Trace as ExpertTrace
from edgelab.expert_cache import simulate as simulate_cache
from edgelab.frame import frame
from edgelab.governor import PHONE, DeviceState, Memory, Policy, Setting, decide
from edgelab.host import CODES, Host, predict_host, probe_work, work_in
from edgelab.paths import data_dir
from edgelab.probes import NEW, PROMPT, Probe, probe_model, seconds_per_token
from edgelab.shape import ModelShape, from_config, from_folder
from edgelab.simulate import OLMOE, Gain, Network, Trace, Workload, compare
from edgelab.simulate import Device as Phone

KIND_NAMES = {"phone": "phones", "board": "boards", "laptop": "laptops", "server": "servers", "host": "this machine"}

# ------------------------------------------------------------------------------------------------------ models and recipes

# the mixture that is compared with phones here: moonshotai/Moonlight-16B-A3B, config.json (the architecture of DeepSeek-V3)
MOONLIGHT = {
    "model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 163840, "tie_word_embeddings": False,
}  # fmt: skip

RECIPES: Mapping[str, tuple[str | float, float]] = {  # name: (scheme or bits per weight, share of the experts that stays)
    "16 bits": (16.0, 1.0),
    "int8-g32": ("int8-g32", 1.0),
    "int4-g32": ("int4-g32", 1.0),
    "int3-g64": ("int3-g64", 1.0),
    "int2-g64": ("int2-g64", 1.0),
    "half of the experts, int4-g32": ("int4-g32", 0.5),
}
AS_STORED = "as stored"


def models() -> dict[str, Mapping | Path]:
    """{name: config, or the folder of an embedded model}: what the control offers."""
    import tomllib

    with (data_dir() / "published.toml").open("rb") as f:
        known = tomllib.load(f)["models"]
    chosen = ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "qwen3-0.6b", "llama-3-8b")
    configs = {name: known[name]["config"] for name in chosen}
    return configs | {"moonlight-16b-a3b": MOONLIGHT} | {name: data_dir() / name for name in ("edge-moe", "edge-phone")}


def recipes_for(source: Mapping | Path) -> list[str]:
    """The names of `RECIPES` that make sense for a model; a folder can also be taken as it is stored."""
    names = [AS_STORED] if isinstance(source, Path) else []
    mixture = bool(_config(source).get("n_routed_experts"))
    return names + [name for name, (_, share) in RECIPES.items() if share == 1.0 or mixture]


def _config(source: Mapping | Path) -> Mapping:
    import json

    return json.loads((source / "config.json").read_text(encoding="utf-8")) if isinstance(source, Path) else source


def shape_with(name: str, source: Mapping | Path, recipe: str) -> ModelShape:
    """The shape of a model after a recipe of `recipes_for`. Raises ValueError for one that it does not have."""
    if recipe not in recipes_for(source):
        raise ValueError(f"recipe={recipe!r} is not one for {name}; use one of {', '.join(recipes_for(source))}")
    if recipe == AS_STORED:
        return from_folder(source)
    scheme, share = RECIPES[recipe]
    config = dict(_config(source))
    if share < 1:
        config["n_routed_experts"] = round(share * config["n_routed_experts"])
    return from_config(config, scheme, name=name)


# ----------------------------------------------------------------------------------------------------- this machine


@dataclass(frozen=True)
class Own:
    """One model on this machine: measured, and predicted in two ways before it ran.

    `roof_s`: bytes of a token / the bandwidth at that working set, nothing else. `modelled_s`: by the terms of `host.py`.
    """

    name: str
    bytes_per_token: float
    roof_s: float
    modelled_s: float
    measured_s: float
    most: str

    @property
    def roof_error(self) -> float:
        """Share by which the roof's tokens per second are off the measured ones."""
        return self.measured_s / self.roof_s - 1

    @property
    def error(self) -> float:
        return self.measured_s / self.modelled_s - 1


def own(host: Host, source: str | Path | Probe, *, threads: int = 1, seconds: float = 0.5) -> Own:
    """A model (a folder, or a `Probe` of random weights) predicted for this machine, then run and measured on it."""
    from edgelab.runtime import Runtime

    context = PROMPT + NEW / 2
    work = probe_work(source) if isinstance(source, Probe) else work_in(source)
    name = source.name if isinstance(source, Probe) else Path(source).name
    predicted = predict_host(work, threads=threads, context=context, host=host, name=name)
    size = work.read_bytes + work.kv_bytes * context
    settings = {"threads": threads, "context": PROMPT + NEW}
    runtime = Runtime(probe_model(source), **settings) if isinstance(source, Probe) else Runtime.open(source, tiles=None, **settings)
    measured, _ = seconds_per_token(runtime, seconds=seconds)
    most = max(predicted.parts, key=predicted.parts.get)
    return Own(name, size, size / host.bandwidth_at(size, threads), predicted.seconds, measured, most)


def own_rows(found: Sequence[Own]) -> list[dict[str, str]]:
    """A line per model: the two predictions, what was measured, and how far off each was."""
    return [
        {
            "model": o.name,
            "bytes per token": engineering(o.bytes_per_token, "B"),
            "bytes / bandwidth, tokens/s (modelled)": f"{1 / o.roof_s:,.0f}",
            "off by": f"{o.roof_error:+.0%}",
            "with overheads, tokens/s (modelled)": f"{1 / o.modelled_s:,.0f}",
            "off by ": f"{o.error:+.0%}",
            "tokens/s (measured here)": f"{1 / o.measured_s:,.0f}",
            "most of the time (modelled)": f"codes of {o.most}" if o.most in CODES else o.most,
        }
        for o in found
    ]


def plan_rows(plans: Mapping[str, object]) -> list[dict[str, str]]:
    """`MemoryPlan`s side by side: a line per kind of memory."""
    first = next(iter(plans.values()))
    return [{"memory": what} | {name: f"{p.rows()[i][1]:,}" for name, p in plans.items()} for i, (what, _) in enumerate(first.rows())]


# ------------------------------------------------------------------------------------------------------- the roofline


@dataclass(frozen=True)
class RoofPoint:
    """`tokens` at once: operations and bytes of the step, operations per second as predicted."""

    what: str
    ops: float
    bytes: float
    ops_per_s: float

    @property
    def intensity(self) -> float:
        return self.ops / self.bytes


@dataclass(frozen=True)
class Roofs:
    """The two roofs of a device under an engine class (theoretical, and what the class reaches of them), and the points below. Modelled."""

    device: str
    model: str
    bandwidth: float
    peak: float
    eta: float
    gamma: float
    points: tuple[RoofPoint, ...]

    @property
    def knee(self) -> float:
        """Operations per byte from which the reached peak binds and not the reached bandwidth."""
        return self.gamma * self.peak / (self.eta * self.bandwidth)


def roofs(
    name: str, shape: ModelShape, *, context: int = 1024, prompts: Sequence[int] = (8, 32, 128, 512), engine: str = "cpu-tuned"
) -> Roofs:
    """The roofline of `shape` on the device `name`: one token of decoding, and prompts of so many tokens (`CHUNK` at most).

    Raises ValueError where the device lacks a number, the class one of prompts, or the model does not fit.
    """
    if max(prompts) > CHUNK:
        raise ValueError(f"prompts={list(prompts)}: more than {CHUNK} tokens are not computed at once")
    profile, eff = device(name), fitted()[engine]
    what, peak = profile.peak(engine)
    if peak is None or profile.dram_bytes_per_s is None or eff.gamma is None:
        raise ValueError(f"{name} has no {what if peak is None else 'dram_bytes_per_s'}: no roof to draw; take another device or class")
    points = []
    for n in (1, *prompts):
        p = predict(name, shape, context=context, prompt=n, engine=engine)
        if p.decode is None or p.prefill is None:
            raise ValueError(f"{shape.name} on {name}: {p.missing.get('decode') or p.missing['prefill']}")
        if n == 1:
            ops = shape.decode_ops(context)
            points.append(RoofPoint("decoding", ops, shape.decode_bytes(context), ops * p.decode.value))
            continue
        ops = n * 2.0 * shape.active_weights + shape.attention_ops * n * n / 2
        read = shape.dense_bytes + shape.moe_layers * shape.experts_touched(n) * shape.expert_bytes
        points.append(RoofPoint(f"prompt of {n}", ops, read, ops * p.prefill.value / n))
    return Roofs(name, shape.name, profile.dram_bytes_per_s.value, peak.value, eff.eta, eff.gamma, tuple(points))


def roofline_figure(r: Roofs) -> go.Figure:
    """Operations per byte against operations per second: the theoretical roof, the reached one, decoding and prompts."""
    fig = _figure(f"Roofline of {r.device}, {r.model} (modelled)", "operations per byte", "10⁹ operations per second")
    ends = [0.5 * min(p.intensity for p in r.points), 2 * max(*(p.intensity for p in r.points), r.knee, r.peak / r.bandwidth)]
    for i, (name, bandwidth, peak, dash) in enumerate(
        (
            ("theoretical", r.bandwidth, r.peak, "dash"),
            ("reached by this class of software", r.eta * r.bandwidth, r.gamma * r.peak, "solid"),
        )
    ):
        x = [ends[0], peak / bandwidth, ends[1]]
        colour = plots.OKABE_ITO[7 if i == 0 else 0]
        line = {"color": colour, "dash": dash}
        fig.add_scatter(x=x, y=[min(bandwidth * v, peak) / 1e9 for v in x], mode="lines", name=name, line=line, marker_color=colour)
    for i, (name, points) in enumerate((("decoding", r.points[:1]), ("prompts", r.points[1:])), 1):
        fig.add_scatter(
            x=[p.intensity for p in points],
            y=[p.ops_per_s / 1e9 for p in points],
            mode="markers+text",
            name=name,
            text=[p.what.removeprefix("prompt of ") for p in points],
            textposition="bottom right",
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i], "size": 10},
        )
    return fig.update_layout(xaxis_type="log", yaxis_type="log")


def say_roofline(r: Roofs) -> str:
    """The sentence beside `roofline_figure`."""
    d, most = r.points[0], r.points[-1]
    bound = [p.what for p in r.points if p.intensity > r.knee]
    return (
        f"Modelled, {r.model} on {r.device}: decoding: {d.intensity:.1f} operations per byte, {d.ops_per_s / r.peak:.1%} of the "
        f"{engineering(r.peak, 'op/s')} peak; a {most.what}: {most.intensity:,.0f} and {most.ops_per_s / r.peak:.0%}. "
        f"Arithmetic binds from {r.knee:.0f} operations per byte on: " + (f"{', '.join(bound)}." if bound else "none of these.")
    )


def roofline_rows(r: Roofs) -> list[dict[str, str]]:
    """A line per point of `roofline_figure`."""
    return [
        {
            "work": p.what,
            "operations per byte": f"{p.intensity:.1f}",
            "10⁹ operations/s (modelled)": plain(p.ops_per_s / 1e9),
            "of the peak": f"{p.ops_per_s / r.peak:.1%}",
            "of the bandwidth": f"{p.ops_per_s / p.intensity / r.bandwidth:.0%}",
        }
        for p in r.points
    ]


# ------------------------------------------------------------------------------------------------- models on devices


def everywhere(shape: ModelShape, **settings) -> dict[str, Prediction]:
    """{device: prediction} of all devices. Settings as `predict` takes them."""
    return {name: predict(profile, shape, **settings) for name, profile in devices().items()}


def prediction_rows(found: Sequence[Prediction]) -> list[dict[str, str]]:
    """A line per prediction. A star marks what rests on an assumed number; empty is what a missing number leaves unknown."""

    def short(e) -> str:
        return "" if e is None else plain(e.value) + "*" * e.assumed

    return [
        {
            "device": p.device,
            "model": p.model,
            "software": p.engine,
            "tokens/s [4 of 5 held-out]": decode_shown(p),
            "first token, s": short(p.first_token),
            "memory": f"{engineering(p.memory.total, 'B')}{'' if p.fits else ': does not fit' if p.fits is False else ': unknown'}",
            "load, s": short(p.load),
            "J per token": short(p.energy),
            "battery, % per hour": short(p.battery),
            "when hot, tokens/s": short(p.steady),
            "waits for": p.binds,
        }
        for p in found
    ]


def decode_shown(p: Prediction) -> str:
    """Tokens per second with the band, or why there are none."""
    if p.decode is None:
        return "does not fit" if p.fits is False else "unknown"
    return str(replace(p.decode, unit="")) + "*" * p.decode.assumed


def discrepancy_rows(rows: Sequence) -> list[dict[str, str]]:
    """`device.discrepancies` for a page: what the article says and what we go by, with the source."""
    return [d.row() for d in rows]


def validation_rows(v) -> list[dict[str, str]]:
    """`efficiency.validation` for a page: a line per device and class, its rows together; the worst first."""
    by: dict[tuple[str, str], list] = {}
    for c in v.checked:
        by.setdefault((c.row.engine_class, c.row.device.name), []).append(c)
    lines = []
    for (engine, name), mine in sorted(by.items(), key=lambda kv: -float(np.median([abs(c.error) for c in kv[1]]))):
        errors = [c.error for c in mine]
        worst = max(mine, key=lambda c: abs(c.error))
        lines.append(
            {
                "class": engine,
                "device": name,
                "rows": str(len(mine)),
                "median error": f"{float(np.median(np.abs(errors))):.0%}",
                "from, to": f"{min(errors):+.0%}, {max(errors):+.0%}",
                "worst row": f"{worst.row.model}, {worst.row.bits:g} bits: {worst.row.decode:g} measured, {worst.predicted:.3g} predicted",
            }
        )
    return lines


@dataclass(frozen=True)
class ByPeak:
    """A held-out measurement beside two predictions: from the peak operations of the unit, and from the bandwidth (fitted elsewhere)."""

    device: str
    model: str
    engine: str
    measured: float
    by_peak: float
    by_bandwidth: float


def by_peak() -> list[ByPeak]:
    """Every held-out published row whose device states a peak: what its TOPS alone promise, and what its bandwidth does."""
    found, effs = [], fitted()
    for r in published():
        _, peak = r.device.peak(r.engine_class)
        if r.split == "held-out" and peak is not None:
            ops = r.shape.decode_ops(r.context)
            found.append(ByPeak(r.device.name, r.model, r.engine_class, r.decode, peak.value / ops, r.predicted(effs[r.engine_class])))
    return found


def factor(found: Sequence[ByPeak], which: str) -> float:
    """Median factor between a prediction ("by_peak" or "by_bandwidth") and what was measured, 1 where they agree."""
    return float(np.median([math.exp(abs(math.log(getattr(b, which) / b.measured))) for b in found]))


def peak_rows(found: Sequence[ByPeak], most: int = 8) -> list[dict[str, str]]:
    """A line for one model of each device, those first that the peak misses by most."""
    by = {}
    for b in sorted(found, key=lambda b: -b.by_peak / b.measured):
        by.setdefault((b.engine, b.device), b)
    return [
        {
            "device": b.device,
            "class": b.engine,
            "model": b.model,
            "measured by others": f"{b.measured:.3g}",
            "from peak operations (modelled)": plain(b.by_peak),
            "times too fast": f"{b.by_peak / b.measured:,.0f}",
            "from bandwidth (modelled)": plain(b.by_bandwidth),
            "off by": f"{b.by_bandwidth / b.measured - 1:+.0%}",
        }
        for b in list(by.values())[:most]
    ]


# --------------------------------------------------------------------------------------------------- experts on flash


def flash_rows(name: str, shape: ModelShape, trace: ExpertTrace, *, context: int = 1024, engine: str = "cpu-tuned") -> list[dict[str, str]]:
    """The mixture on a device that does not hold all of its experts, with three hit rates. Raises ValueError where all fit, or none.

    The rates: that of equally likely experts; lru's on `trace`, of another model, with the same share of experts in RAM; every hit.
    """
    p = predict(name, shape, context=context, engine=engine)
    m = p.memory
    if not m.of or m.whole:
        raise ValueError(f"{shape.name} on {name}: no experts are left on flash" if m.of else f"{shape.name} has no experts")
    kept = m.kept / m.of
    capacity = max(trace.choices.shape[-1], round(kept * trace.experts))
    lru = simulate_cache(trace, capacity, "lru").hit_rate
    lines = []
    for what, rate in (
        ("equally likely experts", kept),
        (f"lru, measured on another model ({capacity} of {trace.experts})", lru),
        ("as if all were there", 1.0),
    ):
        q = predict(name, shape, context=context, engine=engine, hit_rate=rate)
        lines.append(
            {
                "hits": what,
                "hit rate": f"{rate:.0%}",
                "experts in RAM, per layer": f"{m.kept} of {m.of}",
                "read from flash per token (modelled)": engineering(max(q.flash_bytes.value, 0.0), "B") if rate < 1 else "0",
                "tokens/s (modelled)": decode_shown(q),
                "waits for": q.binds,
            }
        )
    return lines


# ------------------------------------------------------------------------------------------------------------ governor


def low_policy(at: float, low: Setting, policy: Policy = PHONE) -> Policy:
    """`policy` with its low-power level being `low`, called for below a battery of `at` (a share)."""
    thresholds = tuple(replace(t, at=at) if t.reading == "battery" else t for t in policy.thresholds)
    return Policy({**policy.levels, "low-power": low}, thresholds, policy.hysteresis, policy.min_dwell_s)


def switches(policy: Policy, *, noise: float = 0.005, hours: float = 0.5, every_s: float = 5.0, seed: int = 0) -> int:
    """How often the level changes while the battery falls from 21 to 19 % and its gauge errs by `noise` (standard deviation)."""
    random, memory, changes = np.random.default_rng(seed), Memory.fresh(policy), 0
    steps = round(hours * 3600 / every_s)
    for i, battery in enumerate(np.linspace(0.21, 0.19, steps) + noise * random.standard_normal(steps)):
        memory, decision = decide(policy, memory, DeviceState(battery=float(np.clip(battery, 0, 1))), i * every_s)
        changes += len(decision.changes)
    return changes


def flapping_rows(policy: Policy = PHONE, **settings) -> list[dict[str, str]]:
    """`switches` of a policy, without its hysteresis, and without its dwell as well."""
    bare = replace(policy, hysteresis={})
    ways = {
        "as it is": policy,
        "no hysteresis": bare,
        "no dwell": replace(policy, min_dwell_s=0.0),
        "neither": replace(bare, min_dwell_s=0.0),
    }
    return [{"policy": name, "changes of level in half an hour (simulated)": str(switches(p, **settings))} for name, p in ways.items()]


# ---------------------------------------------------------------------------------------------------------- the controls


class _Control:
    """What both controls share: inputs that are changed together, and errors that are shown in place."""

    error: Exception | None = None
    sentence: w.HTML
    _busy = False

    def _set(self, values: Mapping[w.Widget, object]) -> None:
        """Sets inputs to values (None: as it is), then recomputes once."""
        self._busy = True
        try:
            for widget, value in values.items():
                if value is not None:
                    _offered(widget, value)
            for widget, value in values.items():
                if value is not None:
                    widget.value = value
        finally:
            self._busy = False
        self._changed()

    def _changed(self) -> None:
        if self._busy:
            return
        try:
            self._compute()
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'

    def _watch(self, *widgets: w.Widget) -> None:
        for widget in widgets:
            widget.observe(lambda _: self._changed(), "value")

    def _compute(self) -> None:
        raise NotImplementedError


def _offered(widget: w.Widget, value) -> None:
    """Raises ValueError for a value that the input does not offer."""
    if isinstance(widget, w.Dropdown):
        offered = [o[0] if isinstance(o, tuple) else o for o in widget.options]
        values = [o[1] if isinstance(o, tuple) else o for o in widget.options]
        if value not in values:
            raise ValueError(f"{widget.description}={value!r} is not offered; there are {', '.join(map(str, offered))}")
    elif not widget.min <= value <= widget.max:
        raise ValueError(f"{widget.description}={value!r} is outside {widget.min} .. {widget.max}")


def _pair(box: w.Widget, slider: w.Widget, to_slider: Callable, to_box: Callable) -> w.HBox:
    """A number box, which a screen reader finds, and the slider that follows it and leads it."""

    def follow(_) -> None:
        slider.value = to_slider(box.value)

    def lead(change) -> None:
        if change.new != to_slider(box.value):
            box.value = to_box(change.new)

    follow(None)
    box.observe(follow, "value")
    slider.observe(lead, "value")
    return w.HBox([box, slider])


def _table(rows: Sequence[Mapping[str, str]], caption: str) -> str:
    """Rows as an HTML table, the first cell of each its head."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(c or "what")}</th>' for c in rows[0])
    body = ""
    for first, *rest in (row.values() for row in rows):
        body += f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(v)}</td>" for v in rest) + "</tr>"
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class DeviceControl(_Control):
    """Device, model, recipe, context and class of software in; speed, memory, energy with their bands out. All of it modelled.

    Drawn: every device that holds the model, by its bandwidth; and where the time of a token goes on the chosen one, recipe by recipe.
    `choose` does from code what the inputs do by hand; `prediction` is what stands there.
    """

    PARTS = ("bandwidth", "compute", "overhead", "flash")

    def __init__(self, device_name: str = "oneplus-12", model: str = "llama-3.2-1b", recipe: str = "int4-g32") -> None:
        self._models = models()
        device(device_name)
        if model not in self._models:
            raise ValueError(f"model={model!r} is not offered; there are {', '.join(self._models)}")
        shape_with(model, self._models[model], recipe)
        self._shapes: dict[tuple[str, str], ModelShape] = {}
        wide = {"description_width": "7em"}
        names = [(f"{p.title} ({p.kind})", n) for n, p in devices().items()]
        self.device = w.Dropdown(options=names, value=device_name, description="device", style=wide, layout={"width": "24em"})
        self.model = w.Dropdown(options=list(self._models), value=model, description="model", style=wide, layout={"width": "19em"})
        offered = recipes_for(self._models[model])
        self.recipe = w.Dropdown(options=offered, value=recipe, description="recipe", style=wide, layout={"width": "24em"})
        self.engine = w.Dropdown(options=CLASSES, value="cpu-tuned", description="software", style=wide, layout={"width": "16em"})
        self.context = w.BoundedIntText(1024, min=1, max=131072, description="context", style=wide, layout={"width": "14em"})
        self.prompt = w.BoundedIntText(128, min=1, max=8192, description="prompt", style=wide, layout={"width": "14em"})
        slider = w.IntSlider(min=0, max=17, readout=False, continuous_update=False, layout={"width": "12em"})
        self.slider = slider
        self._contexts = _pair(self.context, slider, lambda v: round(math.log2(v)), lambda v: 2**v)
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._empty())
        self.figure._config = self.figure._config | {"responsive": True}  # as wide as the page, also when that changes
        self._changed()
        if self.error is not None:
            raise self.error
        self.model.observe(lambda _: self._other_model(), "value")  # before the others: recipes follow the model
        self._watch(self.device, self.model, self.recipe, self.engine, self.context, self.prompt)

    def choose(
        self,
        device: str | None = None,
        model: str | None = None,
        recipe: str | None = None,
        *,
        context: int | None = None,
        prompt: int | None = None,
        engine: str | None = None,
    ) -> Prediction | None:
        """Set the inputs and return the prediction, None where there is none (then `error` says why).

        Raises ValueError for what the inputs do not offer, and leaves them as they were.
        """
        if model is not None:
            _offered(self.model, model)
            offered = recipes_for(self._models[model])
            if recipe is not None and recipe not in offered:
                raise ValueError(f"recipe={recipe!r} is not offered for {model}; there are {', '.join(offered)}")
            for widget, value in ((self.device, device), (self.engine, engine), (self.context, context), (self.prompt, prompt)):
                if value is not None:
                    _offered(widget, value)
            busy, self._busy = self._busy, True
            try:
                self.model.value = model
            finally:
                self._busy = busy
        self._set({self.device: device, self.recipe: recipe, self.context: context, self.prompt: prompt, self.engine: engine})
        return self.prediction if self.error is None else None

    @property
    def shape(self) -> ModelShape:
        """The model after the recipe."""
        key = self.model.value, self.recipe.value
        if key not in self._shapes:
            self._shapes[key] = shape_with(key[0], self._models[key[0]], key[1])
        return self._shapes[key]

    def _other_model(self) -> None:
        busy, self._busy = self._busy, True
        try:
            offered, before = recipes_for(self._models[self.model.value]), self.recipe.value
            self.recipe.options = offered
            self.recipe.value = before if before in offered else offered[0]
        finally:
            self._busy = busy

    def _compute(self) -> None:
        settings = {"context": self.context.value, "prompt": self.prompt.value, "engine": self.engine.value}
        self.predictions = everywhere(self.shape, **settings)
        self.prediction = self.predictions[self.device.value]
        name, source = self.model.value, self._models[self.model.value]
        self.by_recipe = {r: predict(self.device.value, shape_with(name, source, r), **settings) for r in self.recipe.options}
        self._draw()

    # ------------------------------------------------------------------------------------------------------- figure
    def _empty(self) -> go.Figure:
        titles = ("Every device that holds it (modelled)", "By recipe (modelled)")
        fig = make_subplots(1, 2, subplot_titles=titles, column_widths=[0.64, 0.36], horizontal_spacing=0.12)
        dashed = {"color": plots.INK, "dash": "dash"}
        fig.add_scatter(mode="lines", name="bytes / bandwidth", line=dashed, marker_color=plots.INK, hoverinfo="skip", row=1, col=1)
        kinds = list(dict.fromkeys(p.kind for p in devices().values()))
        for i, kind in enumerate(kinds):
            fig.add_scatter(
                mode="markers", name=KIND_NAMES[kind], marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i]},
                hovertemplate="%{text}<extra></extra>", row=1, col=1,
            )  # fmt: skip
        ring = {"color": "rgba(0,0,0,0)", "size": 20, "line": {"color": plots.OKABE_ITO[3], "width": 2.5}}
        fig.add_scatter(mode="markers", name="the chosen one", marker=ring, hoverinfo="skip", row=1, col=1)
        for i, part in enumerate(self.PARTS):
            fig.add_bar(name=part, marker_color=plots.OKABE_ITO[4 + i], row=1, col=2)
        fig.update_layout(
            template=plots.TEMPLATE,
            height=460,
            autosize=True,
            barmode="stack",
            legend={"y": 1.1, "traceorder": "normal"},
            margin={"t": 120},
        )
        fig.update_xaxes(title_text="theoretical DRAM bandwidth, GB/s", type="log", row=1, col=1)
        fig.update_yaxes(title_text="tokens per second, with the band", type="log", row=1, col=1)
        fig.update_yaxes(title_text="ms per token", row=1, col=2)
        return fig

    def _draw(self) -> None:
        known = devices()
        drawn = {n: p for n, p in self.predictions.items() if p.decode is not None}
        roof, *kinds, ring = self.figure.data[: -len(self.PARTS)]
        names = {v: k for k, v in KIND_NAMES.items()}
        with self.figure.batch_update():
            ends = [min(_gbs(n) for n in known) * 0.8, max(_gbs(n) for n in known) * 1.25]
            read = self.shape.decode_bytes(self.context.value)
            roof.x, roof.y = ends, [1e9 * b / read for b in ends]
            for trace in kinds:
                mine = [n for n in drawn if known[n].kind == names[trace.name]]
                trace.x, trace.y = [_gbs(n) for n in mine], [drawn[n].decode.value for n in mine]
                trace.text = [f"{known[n].title}: {drawn[n].decode}" for n in mine]
                trace.error_y = _band([drawn[n].decode for n in mine])
            chosen = [self.device.value] if self.device.value in drawn else []
            ring.x, ring.y = [_gbs(n) for n in chosen], [drawn[n].decode.value for n in chosen]
            for trace in self.figure.data[-len(self.PARTS) :]:
                trace.x = list(self.by_recipe)
                trace.y = [1e3 * p.parts_s.get(trace.name, 0.0) if p.decode is not None else 0.0 for p in self.by_recipe.values()]
        self.sentence.value = f'<p aria-live="polite">{escape(self.told)}</p>'
        self.table.value = _table(self.prediction.table(), f"{self.model.value}, {self.recipe.value}, on {self.device.value}")

    @property
    def told(self) -> str:
        """What is predicted, in a sentence."""
        p, left = self.prediction, [n for n, q in self.predictions.items() if q.fits is False]
        where = f"{p.model}, {self.recipe.value}, on {p.device}, {p.engine}, context {p.context:,}"
        if p.decode is None:
            text = f"Modelled, {where}: no speed, it {p.missing.get('decode', 'is not known')}."
        else:
            text = f"Modelled, {where}: {p.decode} where four of five held-out measurements lie in the brackets; it waits for {p.binds}"
            text += f"; {engineering(p.memory.total, 'B')} of memory"
            text += "" if p.energy is None else f"; {plain(p.energy.value)} J per token"
            text += "" if p.hit_rate is None or p.memory.whole else f"; {p.memory.kept} of {p.memory.of} experts in RAM"
            rests = sorted({r for e in (p.decode, p.energy) if e is not None for r in e.rests_on if r.endswith("(assumed)")})
            text += (f". Rests on {', '.join(rests)}" if rests else "") + "."
        return text + (f" It does not fit on {len(left)} of {len(self.predictions)} devices." if left else "")

    def static(self) -> list[go.Figure]:
        """The present figure's parts as plain ones, for `plots.show` (a widget is empty on a code host)."""
        traces = list(self.figure.data)
        parts = []
        for axis, mine, title in (
            ("", traces[: -len(self.PARTS)], f"{self.prediction.model}, {self.recipe.value}: bandwidth against speed (modelled)"),
            ("2", traces[-len(self.PARTS) :], f"{self.prediction.model} on {self.prediction.device}: time per token, by recipe (modelled)"),
        ):
            axes = {
                name: {"title": {"text": a.title.text or ""}, "type": a.type}
                for name in ("xaxis", "yaxis")
                for a in (self.figure.layout[name + axis],)
            }
            fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": title}, "barmode": "stack", **axes})
            for trace in mine:
                if trace.x is not None and len(trace.x) and trace.name != "the chosen one" and any(trace.y):
                    fig.add_trace(trace.to_plotly_json() | {"xaxis": "x", "yaxis": "y"})
            parts.append(fig)
        return parts

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, the sentence."""
        inputs = w.HBox([self.device, self.model, self.recipe, self.engine, self._contexts, self.prompt], layout={"flex_flow": "row wrap"})
        box = frame(inputs, self.sentence, self.figure, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A control of device, model, recipe and context, which needs a running notebook. {self.told}"


def _gbs(name: str) -> float:
    return device(name).dram_bytes_per_s.value / 1e9


def _band(estimates: Sequence) -> dict:
    """plotly's error_y of the bands of estimates."""
    up = [0.0 if e.high is None else e.high - e.value for e in estimates]
    down = [0.0 if e.low is None else e.value - e.low for e in estimates]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.2, "width": 3}


LOW_SETTINGS: Mapping[str, Setting] = {
    str(s): s
    for s in (
        PHONE.levels["low-power"],
        Setting("int4", threads=4),
        Setting("int8", threads=2),
        Setting("int4", threads=1, frequency_mhz=1200),
        Setting("int4", experts=4, threads=2, frequency_mhz=1608),
    )
}


class GovernorControl(_Control):
    """Static power, requests, threshold and low-power setting in; the discharge and what the mode gains out. All of it modelled.

    A phone discharges from full under the policy; then the rest of its charge from the threshold on is simulated twice, with the mode
    and without. The picture is an SVG, not a second plotly widget: each of those adds 5 MB to a notebook. `claim`: (latency, hours) in
    per cent that an article states of the mode. `choose` does from code what the inputs do by hand.
    """

    def __init__(self, network: Network = OLMOE, *, claim: tuple[float, float] = (15.0, 40.0), phone: Phone | None = None) -> None:
        self._network, self.claim, self._phone = network, claim, Phone() if phone is None else phone
        wide, size = {"description_width": "11em"}, {"width": "18em"}
        self.static_w = w.BoundedFloatText(1.0, min=0.0, max=4.0, step=0.1, description="static power, W", style=wide, layout=size)
        self.per_minute = w.BoundedFloatText(4.0, min=0.2, max=12.0, step=0.1, description="requests per minute", style=wide, layout=size)
        self.at = w.BoundedIntText(20, min=5, max=60, description="below battery, %", style=wide, layout=size)
        self.low = w.Dropdown(options=list(LOW_SETTINGS), description="low-power setting", style=wide, layout={"width": "30em"})
        self.sliders = []
        self._rows = [self.low]
        for box, most, step in ((self.static_w, 4.0, 0.1), (self.per_minute, 12.0, 0.1), (self.at, 60, 1)):
            kind = w.IntSlider if box is self.at else w.FloatSlider
            slider = kind(min=box.min, max=most, step=step, readout=False, continuous_update=False, layout={"width": "14em"})
            self.sliders.append(slider)
            self._rows.append(_pair(box, slider, lambda v: v, lambda v: round(v, 2)))
        self.sentence, self.picture = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.table = w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self._changed()
        if self.error is not None:
            raise self.error
        self._watch(self.static_w, self.per_minute, self.at, self.low)

    def choose(
        self, static_w: float | None = None, per_minute: float | None = None, at: int | None = None, low: str | None = None
    ) -> Gain | None:
        """Set the inputs and return what the mode gains, None where it can't be said (then `error` says why). Raises ValueError for
        what the inputs do not offer, and leaves them as they were."""
        self._set({self.static_w: static_w, self.per_minute: per_minute, self.at: at, self.low: low})
        return self.gain if self.error is None else None

    @property
    def policy(self) -> Policy:
        return low_policy(self.at.value / 100, LOW_SETTINGS[self.low.value])

    def _compute(self) -> None:
        from edgelab.simulate import simulate

        phone, load = replace(self._phone, static_w=self.static_w.value), Workload(64, self.per_minute.value)
        hours = self._phone.capacity_wh / (self.static_w.value + 0.02)  # at least what sleeping takes: no discharge is longer
        step = max(5.0, hours * 3600 / 15_000)  # requests are counted exactly within a step, so that a long one costs little
        steps = {"hours": 2 * hours, "step_s": step, "decide_s": step}
        self.trace: Trace = simulate(self.policy, phone, load, self._network, **steps)
        below = self.at.value / 100 - 1e-6
        self.gain, *_ = compare(self.policy.without("battery"), self.policy, phone, load, self._network, battery=below, **steps)
        sentence = self.told
        self.sentence.value = f'<p aria-live="polite">{escape(sentence)}</p>'
        self.picture.value = plots.to_svg(governor_plots.over_time(self.trace), describe=sentence)
        self.table.value = _table(governor_plots.table_over_time(self.trace), "The discharge, level by level")

    @property
    def told(self) -> str:
        """The discharge and what the mode gains, in sentences."""
        g, (latency, hours) = self.gain, self.claim
        both = g.latency <= latency and g.hours >= hours
        text = f"{governor_plots.say_over_time(self.trace)} From {self.at.value} % on, the mode against going on as before: latency "
        changes = [f"{round(v) + 0:+d} %" for v in (g.latency, g.hours, g.tokens)]
        text += f"{changes[0]}, hours {changes[1]}, tokens per charge {changes[2]} (modelled, all numbers as they stand). "
        return text + f"At most {latency:+g} % and at least {hours:+g} % at once: {'yes' if both else 'no'}."

    def figure(self) -> go.Figure:
        """The present picture as a plotly figure, for `plots.show`."""
        return governor_plots.over_time(self.trace)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the picture and the table; where no widget can be shown, the sentences."""
        box = frame(*self._rows, self.sentence, self.picture, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A control of static power, requests, threshold and setting, which needs a running notebook. {self.told}"


def _figure(title: str, x: str, y: str) -> go.Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": title}, **axes})


# ------------------------------------------------------------------------------------------------------- the exercises


def _checked(answer, true: float, hints: Mapping[float, str], otherwise: str, why: str, tolerance: float, form: str) -> Verdict:
    if answer is None:
        return unanswered(form)
    given = numbers(answer, 1)
    if given is None:
        return not_yet("one number")
    return right(why) if abs(given[0] - true) <= tolerance else hint(given[0], hints, otherwise, 5e-3)


def decode_speed(weights: int, bits: float, kv_bytes: float, bandwidth: float, share: float, peak: float) -> float:
    """Tokens per second by `device.predict`: `weights` of `bits` each and a cache of `kv_bytes`, a memory of `bandwidth` bytes/s of which
    software reaches `share`, arithmetic of `peak` operations/s (all of it reached), and no time per layer."""
    known = ("", "derived")
    profile = DeviceProfile(
        "by-hand", "by hand", "board", "none", 2024, dram_bytes_per_s=Quantity(bandwidth, "B/s", "given", known[1]),
        cpu_int8_ops_per_s=Quantity(peak, "op/s", "given", known[1]),
    )  # fmt: skip
    shape = ModelShape(
        "by-hand", layers=1, hidden=1, inner=1, vocab=1, dense_bytes=weights * bits / 8, embedding_bytes=0.0, dense_weights=weights,
        kv_bytes_per_token_layer=kv_bytes, attention_ops=0.0,
    )  # fmt: skip
    efficiency = Efficiency("cpu", eta=share, tau_s=0.0, gamma=1.0)
    return predict(profile, shape, context=1, prompt=1, engine="cpu", efficiency=efficiency).decode.value


def check_roofline(answer) -> Verdict:
    """Exercise 1: a function of (weights, bits, kv_bytes, bandwidth, share, peak) that returns tokens per second."""
    cases = [
        Case(
            "1.5 billion weights of 4.5 bits, no cache, 60 % of 68 GB/s",
            (1_500_000_000, 4.5, 0.0, 68e9, 0.6, 1e18),
            "bytes are weights * bits / 8, and software reaches only a share of the bandwidth",
        ),
        Case(
            "the same with a cache of 400 MB", (1_500_000_000, 4.5, 4e8, 68e9, 0.6, 1e18), "keys and values are read for every token, too"
        ),
        Case(
            "a slow processor",
            (1_500_000_000, 4.5, 0.0, 68e9, 0.6, 5e10),
            "arithmetic takes 2 operations per weight; memory and arithmetic overlap, so the slower of the two decides",
        ),
        Case("16 bits", (400_000_000, 16.0, 1e8, 25e9, 0.8, 1e18), "16 bits are two bytes"),
    ]
    form = "a function of weights, bits, kv_bytes, bandwidth, share and peak that returns tokens per second"
    return check_function(
        answer, decode_speed, cases, form, "the roofline of `device.predict`, its time per layer left out", tolerance=1e-6
    )


def check_cache(answer) -> Verdict:
    """Exercise 2: MB of the cache of Llama-3.2-1B at 4,096 tokens in float16."""
    one = 16 * 8 * 64 * 2 * 4096 / 1e6  # keys alone
    hints = {
        one: "keys and values",
        8 * one: "the cache has 8 heads of keys and values, not 32",
        4 * one: "float16 has two bytes",
        2 * one / 16: "every layer has a cache of its own",
        2 * one * 1e6: "in MB, please",
        2 * one * 1e6 / 2**20: "that is MiB, of 1,048,576 bytes; a MB has 1,000,000",
        2 * one / 1e3: "that is GB; in MB, please",
    }
    why, form = "2 · 16 · 8 · 64 · 2 · 4,096 bytes", "a number of MB"
    return _checked(answer, 2 * one, hints, "2 · layers · heads of keys · their size · bytes · tokens", why, 1.0, form)


def check_static(answer) -> Verdict:
    """Exercise 3: the static power at which 2 W of compute going down to 1 W lengthen the life by 40 %."""
    hints = {
        0.0: "without static power the gain is 2 / 1 - 1 = 100 %",
        1.0: "at 1 W it is 3 / 2 - 1 = 50 %",
        2.5: "1 W saved, of what total is that 40 %? The gain is (P + 2) / (P + 1) - 1",
        3.0: "at 3 W it is 5 / 4 - 1 = 25 %",
    }
    return _checked(answer, 1.5, hints, "solve (P + 2) / (P + 1) = 1.4 for P", "(1.5 + 2) / (1.5 + 1) = 1.4", 0.02, "a number of watts")


def check_flash(answer) -> Verdict:
    """Exercise 4: tokens per second, 10 ms in RAM and 20 % of 300 MB of experts from a flash of 4 GB/s."""
    hints = {
        1e3 / 15: "the 10 ms are still there",
        100.0: "a fifth of the experts is read from flash",
        1e3 / (10 + 60): "80 % are hits, and only what is missed is read",
        1e3 / 85: "20 % of the 300 MB, not all of them",
        166.667: "speeds do not add up, times do",
    }
    why = "10 ms + 0.2 · 300 MB / 4 GB/s = 25 ms"
    return _checked(answer, 40.0, hints, "add the time of the bytes that are missed", why, 0.4, "a number of tokens per second")
