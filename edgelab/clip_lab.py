"""Where to cut an activation: histograms, the curves of four rules, what a threshold does to the model. For notebook 03.

One tensor, the inputs of one weight, is looked at closely (`Tensor`): its values, their histogram, the threshold of every
rule of `methods/clip.py`. `Tensor.at(t)` says of any threshold what it costs, in four ways that do not agree: the share of
values clipped, the squared error, KL(P || Q) of the histogram, and the KL divergence of the *model's* next-token
distribution when only this tensor's values are rounded. The last is measured by running the model, each time.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import nn

from edgelab import plots
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.frame import frame
from edgelab.kernels.histogram import add, empty
from edgelab.methods.clip import RULES, Range, kl_by_hand, search, threshold
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.ranges import StaticRanges, rounding, tapped

BITS, TOP = 8, 127
LOOK = {rule: (plots.OKABE_ITO[i], plots.SYMBOLS[i]) for i, rule in enumerate(RULES)}


class Cost(NamedTuple):
    """What a threshold costs. `squared`: mean squared error over the mean square. `kl`: of the histogram, nats. `kld`: of the model."""

    threshold: float
    clipped: float
    squared: float
    kl: float
    kld: float

    @property
    def row(self) -> dict[str, str]:
        return {
            "threshold": f"{self.threshold:.4g}",
            "step": f"{self.threshold / TOP:.3g}",
            "clipped, % (counted)": f"{100 * self.clipped:.3g}",
            "squared error, % of the mean square (computed)": f"{100 * self.squared:.3g}",
            "KL of the histogram, nats (computed)": f"{self.kl:.3g}",
            "KL of the model, nats per token (measured)": f"{self.kld:.3g}",
        }


class Tensor:
    """The inputs of the weight `name` of floating-point `model` while it reads `ids` [B, T], and what rounding them costs.

    `values` float32 [n, in] (of an expert stack: the rows sent to any expert); `histogram` of their magnitudes, 2048 bins
    that end at the maximum; `ranges[rule]`. `text` ids [B, T]: what the model's divergence is measured on.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, name: str, ids: torch.Tensor, text: torch.Tensor) -> None:
        self.model, self.name, self.ids, self.text = model, name, ids, text
        seen = []
        with tapped(model, {name: lambda x: (seen.append(x.detach().float().reshape(-1, x.shape[-1])), x)[1]}):
            model(ids, use_cache=False)
        self.values = np.ascontiguousarray(torch.cat(seen).numpy())
        self.maximum = float(np.abs(self.values).max())
        self.histogram = add(empty(top=float(np.nextafter(np.float32(self.maximum), np.float32(np.inf)))), self.values)
        self.ranges: dict[str, Range] = {r: threshold(self.histogram, r, maximum=self.maximum) for r in RULES}
        self.curves = {r: search(self.histogram, r) for r in ("kl", "mse")}
        self._ref = torch.log_softmax(model(text, use_cache=False).logits.float(), -1)
        self.costs: dict[float, Cost] = {}

    @property
    def lowest(self) -> float:
        """The least threshold that a search tries: 128 bins."""
        return float(self.curves["kl"].candidates[0])

    @torch.no_grad()
    def at(self, t: float) -> Cost:
        """The `Cost` of rounding these values, and nothing else, to 8 bits with the range [-t, t]; measured once per t."""
        if not 0 < t <= self.maximum * (1 + 1e-6):
            raise ValueError(f"threshold={t!r} must be above 0 and at most {self.maximum:.6g}, the largest value: beyond are no values")
        if t not in self.costs:
            x = self.values.astype(np.float64)
            rounded = np.clip(np.rint(x * (TOP / t)), -TOP, TOP) * (t / TOP)
            kl = self.curves["kl"]  # infinite where the last bin kept is empty: the nearest candidate that is not
            finite = np.flatnonzero(np.isfinite(kl.curve))
            with tapped(self.model, {self.name: rounding(t / TOP)}):
                got = torch.log_softmax(self.model(self.text, use_cache=False).logits.float(), -1)
            self.costs[t] = Cost(
                t,
                float((np.abs(x) > t).mean()),
                float(np.square(rounded - x).mean() / np.square(x).mean()),
                float(kl.curve[finite[np.argmin(np.abs(kl.candidates[finite] - t))]]),
                float(token_kl(self._ref, got).double().mean()),
            )
        return self.costs[t]

    def rule_rows(self) -> list[dict[str, str]]:
        """A line per rule: its threshold and what it costs."""
        return [{"rule": rule} | self.at(self.ranges[rule].threshold).row for rule in RULES]

    def shape_rows(self) -> list[dict[str, str]]:
        """How the magnitudes are distributed: root mean square, percentiles, maximum, each beside the first."""
        size = np.abs(self.values).ravel()
        rms = float(np.sqrt(np.square(size, dtype=np.float64).mean()))
        kinds = {"median": 50.0, "99 %": 99.0, "99.9 %": 99.9, "99.99 %": 99.99, "maximum": 100.0}
        found = {"root mean square": rms} | {k: float(np.percentile(size, p)) for k, p in kinds.items()}
        return [{"|x|": k, "value": f"{v:.4g}", "times the root mean square": f"{v / rms:.2f}"} for k, v in found.items()]

    def clipped_tokens(self, tokenizer, t: float, most: int = 8) -> list[dict[str, str]]:
        """Whose values lie beyond `t`: the tokens in order of how many of theirs do, with where they stood. For a plain linear."""
        if len(self.values) != self.ids.numel():
            raise ValueError(
                f"{self.name} has {len(self.values)} rows of inputs for {self.ids.numel()} tokens; whose they are is known of plain linears"
            )
        over = (np.abs(self.values) > t).sum(1)
        flat, place = self.ids.reshape(-1).numpy(), np.tile(np.arange(self.ids.shape[1]), self.ids.shape[0])
        kinds: dict[tuple[str, bool], list[int]] = {}
        for i in np.flatnonzero(over):
            kinds.setdefault((repr(tokenizer.decode([int(flat[i])])), bool(place[i] == 0)), []).append(int(i))
        lines = []
        for (token, first), where in sorted(kinds.items(), key=lambda kind: -over[kind[1]].sum())[:most]:
            same = int(((flat == flat[where[0]]) & ((place == 0) == first)).sum())
            lines.append(
                {
                    "token": token,
                    "at": "the first position" if first else "later positions",
                    "values clipped": f"{int(over[where].sum()):,}",
                    "share of all that are clipped, %": f"{100 * over[where].sum() / over.sum():.1f}",
                    "tokens concerned": f"{len(where)} of {same}",
                    "largest |x|": f"{np.abs(self.values[where]).max():.4g}",
                }
            )
        return lines

    @torch.no_grad()
    def blame(self, tokenizer, t: float, kinds: int = 3) -> list[dict[str, str]]:
        """Who suffers from clipping at `t` (without rounding): the model's KL when only some positions of the text are clipped.

        The first position, the `kinds` of later tokens with the most values beyond `t`, all others, and all. For a plain linear.
        """
        first = torch.zeros_like(self.text, dtype=torch.bool)
        first[:, 0] = True
        over = torch.zeros(self.text.shape)
        with tapped(self.model, {self.name: lambda x: (over.add_((x.abs() > t).sum(-1).reshape(over.shape)), x)[1]}):
            self.model(self.text, use_cache=False)
        tokens = self.text[~first].unique()
        count = torch.stack([over[(self.text == v) & ~first].sum() for v in tokens])
        groups = {"first position": first}
        for v in tokens[count.topk(min(kinds, len(tokens))).indices]:
            groups[f"{tokenizer.decode([int(v)])!r}, later"] = (self.text == v) & ~first
        groups["all other positions"] = ~torch.stack(list(groups.values())).any(0)
        groups["all"] = torch.ones_like(first)
        lines = []
        for name, mask in groups.items():
            with tapped(self.model, {self.name: lambda x, mask=mask: torch.where(mask[..., None], x.clamp(-t, t), x)}):
                got = torch.log_softmax(self.model(self.text, use_cache=False).logits.float(), -1)
            kld = float(token_kl(self._ref, got).double().mean())
            share, values = float(mask.float().mean()), int(over[mask].sum())
            lines.append(
                {
                    "clipped only at": name,
                    "share of the positions, %": f"{100 * share:.2f}",
                    "values clipped": f"{values:,}",
                    "KL of the model, nats per token (measured)": f"{kld:.3g}",
                }
            )
        return lines


# --------------------------------------------------------------------------------------------------------- by hand, checked


def hand_rows(counts: Sequence[int], levels: int) -> list[dict[str, str]]:
    """A line per candidate of TensorRT's loop on a small histogram: P, Q and their divergence, all bins written out."""

    def bins(values: np.ndarray, cut: np.ndarray) -> str:
        parts = [f"{v:.3g}" for v in values]
        return " ".join(("| " if i and cut[i] != cut[i - 1] else "") + p for i, p in enumerate(parts))

    return [
        {
            "bins kept": str(s.kept),
            "outliers": str(s.outliers),
            "P (outliers in the last bin)": " ".join(f"{v:.3g}" for v in s.p),
            "Q (levels between the bars)": bins(s.q, s.levels),
            "KL(P || Q), nats": f"{s.divergence:.4f}",
        }
        for s in kl_by_hand(counts, levels)
    ]


def check_bins_kept(answer) -> Verdict:
    """Exercise 1: how many of the bins [4, 2, 1, 3] does the rule keep with 2 levels?"""
    if answer is None:
        return unanswered("a number of bins")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one whole number of bins, please")
    steps = kl_by_hand([4, 2, 1, 3], 2)
    best = min(steps, key=lambda s: s.divergence).kept
    if x[0] not in {s.kept for s in steps}:
        return not_yet(f"{x[0]:g} is no candidate; the loop runs from as many bins as levels (2) to all of them (4)")
    if x[0] != best:
        s = steps[[s.kept for s in steps].index(x[0])]
        return not_yet(f"with {x[0]:g} bins KL is {s.divergence:.3f}, and another candidate has less. Did the outliers go into P only?")
    return right(f"{best} bins")


def check_step(answer) -> Verdict:
    """Exercise 2: the step of int8 for the threshold 6.35."""
    if answer is None:
        return unanswered("a number, the distance of two neighbouring values")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    if math.isclose(x[0], 0.05, rel_tol=1e-3):
        return right("6.35 / 127 = 0.05. The codes are -127 .. 127: 127 steps on each side")
    hints = {6.35 / 128: "the code -128 is not used", 12.7 / 255: "codes are -127 .. 127, 254 steps", 6.35 / 255: "that is half a step"}
    return hint(x[0], hints, "it is the threshold over the largest code", 2e-5)


def check_costs(clip, keep) -> Verdict:
    """Exercise 3: mean squared error of clipping one value of 60 in 100,000 at 4, and of keeping it (8 bits)."""
    if clip is None or keep is None:
        return unanswered("two numbers, both mean squared errors")
    c, k = numbers(clip, 1), numbers(keep, 1)
    if c is None or k is None:
        return not_yet("two numbers, please")
    wrong = []
    if not math.isclose(c[0], 56**2 / 1e5, rel_tol=0.015):  # 0.031 will do; 55 or 57 are 3.6 % off
        wrong.append("clipping loses 60 - 4 once in 100,000 values, squared")
    if not math.isclose(k[0], (60 / TOP) ** 2 / 12, rel_tol=0.005):
        near = any(math.isclose(k[0], step**2 / 12, rel_tol=0.005) for step in (60 / 128, 120 / 255, 120 / 256))
        wrong.append(
            "the codes are -127 .. 127: the step is 60 / 127"
            if near
            else "keeping makes the step 60 / 127 for all, and rounding errors are spread evenly over a step: step squared / 12"
        )
    if wrong:
        return not_yet("; ".join(wrong))
    return right("0.0314 against 0.0186. The squared error keeps the outlier; KL, which counts values, would cut it")


def check_divergence(answer) -> Verdict:
    """Exercise 4: a function (counts, kept, levels) that returns KL(P || Q) of one candidate of TensorRT's rule, in nats."""

    def twin(counts: np.ndarray, kept: int, levels: int) -> float:
        return kl_by_hand(counts, levels)[kept - levels].divergence

    r = np.random.default_rng(3)
    bins, tail = np.array([20, 8, 6, 4, 0, 2, 3, 1]), np.sort(r.integers(1, 90, 32))[::-1].copy()
    cases = [
        Case(
            "[4, 2, 1, 3], all four kept, 2 levels",
            (np.array([4, 2, 1, 3]), 4, 2),
            "no outliers: Q is 3 3 2 2. Both become shares before KL",
        ),
        Case(
            "[4, 2, 1, 3], three kept, 2 levels",
            (np.array([4, 2, 1, 3]), 3, 2),
            "outliers go into P's last bin and not into Q; bin j joins level j * levels // kept",
        ),
        Case("section 2's bins, six kept", (bins, 6, 4), "an empty bin of Q gets nothing, and the others of its level share its count"),
        Case("section 2's bins, five kept", (bins, 5, 4), "the last bin of P holds outliers and that of Q nothing: KL is infinite"),
        Case("section 2's bins, all eight kept", (bins, 8, 4), "where P is zero the term is zero"),
        Case(
            "[4, 2, 3, 0, 5], four kept, 2 levels",
            (np.array([4, 2, 3, 0, 5]), 4, 2),
            "a bin is empty if Q is empty there, before the outliers: bin 3 gets nothing, though P has 5 in it",
        ),
        Case("32 bins with a tail, 20 kept, 8 levels", (tail, 20, 8)),
    ]
    form = "a function of counts, kept and levels that returns KL(P || Q) in nats"
    praise = "with a loop over all candidates this is entropy calibration; the kernel does the same in closed form, for 2,048 bins at once"
    return check_function(answer, twin, cases, form, praise, parts=("divergence",), tolerance=1e-6)


# ----------------------------------------------------------------------------------------------------------------- figures


def _outline(tensor: Tensor, bins: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the histogram as a line of steps, y in % of the values per bin; None where a bin is empty."""
    size = tensor.histogram.counts.size // bins
    shares = 100 * tensor.histogram.counts.reshape(bins, size).sum(1) / tensor.histogram.counts.sum()
    edges = np.arange(bins + 1) * size * tensor.histogram.width
    return np.repeat(edges, 2)[1:-1], np.repeat(np.where(shares > 0, shares, np.nan), 2)


def _thinned(candidates: np.ndarray, curve: np.ndarray, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Some points of a curve over its least, infinities left out, the least itself kept."""
    kept = np.unique(np.append(np.linspace(0, curve.size - 1, points).astype(int), np.argmin(curve)))
    kept = kept[np.isfinite(curve[kept])]
    return candidates[kept], curve[kept] / curve[np.isfinite(curve)].min()


def _marks(tensor: Tensor, height) -> list[dict]:
    """A marker per rule, as plotly traces: at its threshold, `height(rule)` high."""
    return [
        {
            "x": [tensor.ranges[rule].threshold],
            "y": [height(rule)],
            "mode": "markers",
            "name": rule,
            "marker": {"color": LOOK[rule][0], "symbol": LOOK[rule][1], "size": 11, "line": {"color": "white", "width": 1}},
            "text": [f"{rule}: {tensor.ranges[rule].threshold:.4g}"],
            "hovertemplate": "%{text}<extra></extra>",
        }
        for rule in RULES
    ]


def histogram_figure(tensor: Tensor) -> go.Figure:
    """The histogram of |x| on a logarithmic axis, with the threshold of every rule."""
    x, y = _outline(tensor)
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": f"|x| of what {_short(tensor.name)} multiplies"}})
    fig.update_xaxes(title_text="|x|")
    fig.update_yaxes(title_text="% of the values, per bin", type="log")
    fig.add_scatter(x=x, y=y, mode="lines", name="values", line={"color": plots.INK}, marker={"color": plots.INK})
    for trace in _marks(tensor, lambda rule: float(np.nanmin(y))):
        fig.add_scatter(**trace)
    return fig


def curves_figure(tensor: Tensor) -> go.Figure:
    """KL and squared error of every candidate threshold over the least of each, and where the rules lie on them."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Two losses of the same thresholds, each over its least"}})
    fig.update_xaxes(title_text="threshold")
    fig.update_yaxes(title_text="loss / its least", type="log")
    for rule, name, dash in (("kl", "KL(P || Q)", "solid"), ("mse", "squared error", "dash")):
        x, y = _thinned(*tensor.curves[rule][1:])
        color = LOOK[rule][0]
        fig.add_scatter(x=x, y=np.maximum(y, 1), mode="lines", name=name, line={"color": color, "dash": dash}, marker={"color": color})
    for trace in _marks(tensor, lambda rule: 1.0):
        fig.add_scatter(**trace)
    return fig


def effects_figure(ranges: StaticRanges) -> go.Figure:
    """The measured effect of each rule on each tensor, in the model's order."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Effect of rounding one tensor's inputs on its block's output"}})
    fig.update_xaxes(title_text="tensor, in the model's order")
    fig.update_yaxes(title_text="squared error / squared size, per token", type="log")
    for rule in RULES:
        fig.add_scatter(
            x=list(range(1, len(ranges) + 1)),
            y=[ranges.effects[name][rule] for name in ranges],
            mode="markers",
            name=rule,
            marker={"color": LOOK[rule][0], "symbol": LOOK[rule][1], "size": 8},
            text=[f"{_short(name)}, {rule}: {ranges.effects[name][rule]:.2g}" for name in ranges],
            hovertemplate="%{text}<extra></extra>",
        )
    return fig


def say_thresholds(tensor: Tensor) -> str:
    """The sentence beside `histogram_figure` and `curves_figure`."""
    parts = [f"{rule} cuts at {r.threshold:.4g}" for rule, r in tensor.ranges.items()]
    return f"{'; '.join(parts)}. 99.9 % of the values lie below {np.percentile(np.abs(tensor.values), 99.9):.3g}."


def say_effects(ranges: StaticRanges) -> str:
    """The sentence beside `effects_figure`: how often each rule has the least effect, and KL's worst tensor."""
    least = {rule: sum(min(e, key=e.get) == rule for e in ranges.effects.values()) for rule in RULES}
    worst = max(ranges.effects, key=lambda n: ranges.effects[n]["kl"] / min(ranges.effects[n].values()))
    e = ranges.effects[worst]
    return (
        f"Least effect: {', '.join(f'{rule} on {n}' for rule, n in least.items())} of {len(ranges)} tensors. KL is worst for "
        f"{_short(worst)}: {e['kl'] / min(e.values()):,.0f} times the effect of the best rule there."
    )


def effect_rows(ranges: StaticRanges, most: int = 8) -> list[dict[str, str]]:
    """The tensors that lose most, worst first by the best rule's effect: thresholds, effects, and the rule that was chosen."""
    worst = sorted(ranges.effects, key=lambda n: -min(ranges.effects[n].values()))[:most]
    by_name = {line["weight"]: line for line in ranges.table()}
    return [by_name[name] | {"weight": _short(name)} for name in worst]


def variant_rows(klds: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """{model variant: {rule: KLD}} as lines."""
    return [{"model": name} | {rule: f"{v:.4f}" for rule, v in by_rule.items()} for name, by_rule in klds.items()]


def _short(name: str) -> str:
    return name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", "")


# ----------------------------------------------------------------------------------------------------------------- control


class ThresholdControl:
    """A threshold in; clipped share, squared error, KL of the histogram and KL of the model out, computed anew for each.

    The slider moves in 100 equal steps on a logarithmic scale, the box beside it takes any threshold: they follow one another.
    `choose` does from code what they do by hand; what goes wrong is shown in the control and kept in `error`.
    """

    STEPS = 100

    def __init__(self, tensor: Tensor, start: float | None = None) -> None:
        self.tensor, self.error, self._busy = tensor, None, False
        self._low, self._high = tensor.lowest, tensor.maximum
        wide = {"description_width": "6em"}
        self.box = w.BoundedFloatText(
            self._high, min=0.001, max=round(self._high, 4), step=0.01, description="threshold", style=wide, layout={"width": "14em"}
        )
        self.slider = w.IntSlider(self.STEPS, min=0, max=self.STEPS, readout=False, continuous_update=False, layout={"width": "20em"})
        self.rule = w.Dropdown(options=("by hand", *RULES), description="rule", style=wide, layout={"width": "14em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._empty())
        self.figure._config = self.figure._config | {"responsive": True}
        self.choose(self._high if start is None else start)
        if self.error is not None:
            raise self.error
        self.slider.observe(self._slid, "value")
        self.box.observe(lambda _: self._changed(), "value")
        self.rule.observe(self._ruled, "value")

    @property
    def cost(self) -> Cost:
        return self.tensor.at(self._threshold)

    @property
    def _threshold(self) -> float:
        return min(float(self.box.value), self._high)

    def choose(self, t: float | str) -> Cost | None:
        """Set the threshold, a number or a rule's name, and return what it costs; None when it can't be measured (see `error`)."""
        if isinstance(t, str):
            if t not in RULES:
                raise ValueError(f"rule={t!r} is not known; use one of {', '.join(RULES)}")
            t = self.tensor.ranges[t].threshold
        if not 0 < t <= self._high * (1 + 1e-6):
            raise ValueError(f"threshold={t!r} must be above 0 and at most {self._high:.6g}, the largest value")
        self._busy = True
        try:
            self.box.value = round(min(t, self.box.max), 4)
        finally:
            self._busy = False
        self._changed()
        return self.cost if self.error is None else None

    def _position(self) -> int:
        share = math.log(max(self._threshold, self._low) / self._low) / math.log(self._high / self._low)
        return round(self.STEPS * share)

    def _slid(self, change) -> None:
        if not self._busy and change.new != self._position():
            self.box.value = round(min(self._low * (self._high / self._low) ** (change.new / self.STEPS), self.box.max), 4)

    def _ruled(self, change) -> None:
        if not self._busy and change.new != "by hand":
            self.choose(change.new)

    def _changed(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self.slider.value = self._position()
            near = [r for r, found in self.tensor.ranges.items() if abs(found.threshold - self._threshold) < 1e-3 * self._threshold]
            self.rule.value = near[0] if near else "by hand"
            self._draw(self.cost)
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'
        finally:
            self._busy = False

    # ------------------------------------------------------------------------------------------------------- figure
    def _empty(self) -> go.Figure:
        fig = make_subplots(
            2, 2, specs=[[{}, {}], [{"colspan": 2}, None]], vertical_spacing=0.2, horizontal_spacing=0.14,
            subplot_titles=("Histogram of |x|", "Loss / its least, computed", "KL of the model, measured: every threshold so far"),
        )  # fmt: skip
        x, y = _outline(self.tensor)
        self._span = (float(np.nanmin(y)), float(np.nanmax(y)))
        fig.add_scatter(x=x, y=y, mode="lines", name="values", line_color=plots.INK, showlegend=False, row=1, col=1)
        for rule, name in (("kl", "KL of the histogram"), ("mse", "squared error")):
            cx, cy = _thinned(*self.tensor.curves[rule][1:])
            dash = "solid" if rule == "kl" else "dash"
            fig.add_scatter(x=cx, y=np.maximum(cy, 1), mode="lines", name=name, line={"color": LOOK[rule][0], "dash": dash}, row=1, col=2)
        for column in (1, 2):
            line = {"color": plots.OKABE_ITO[3], "width": 2}
            fig.add_scatter(mode="lines", name="threshold", line=line, showlegend=column == 1, row=1, col=column)
        marker = {"color": plots.OKABE_ITO[0], "line": {"color": "white", "width": 1}}
        fig.add_scatter(mode="markers", name="tried", marker=marker, hovertemplate="%{text}<extra></extra>", showlegend=False, row=2, col=1)
        fig.update_layout(template=plots.TEMPLATE, height=620, autosize=True, legend={"y": 1.08}, margin={"t": 100})
        for row, column in ((1, 1), (1, 2), (2, 1)):
            fig.update_yaxes(type="log", row=row, col=column)
            fig.update_xaxes(title_text=("|x|", "threshold", "threshold")[row + column - 2], row=row, col=column)
        fig.update_xaxes(type="log", row=2, col=1)
        fig.update_yaxes(title_text="% of values, per bin", row=1, col=1)
        fig.update_yaxes(title_text="nats per token", row=2, col=1)
        return fig

    def _draw(self, cost: Cost) -> None:
        tried = list(self.tensor.costs.values())
        _, _, mse, left, right, points = self.figure.data
        with self.figure.batch_update():
            left.x = right.x = [cost.threshold, cost.threshold]
            left.y, right.y = list(self._span), [1, max(10.0, float(max(mse.y)))]
            points.x, points.y = [c.threshold for c in tried], [max(c.kld, 1e-9) for c in tried]
            points.text = [f"threshold {c.threshold:.4g}: {c.kld:.3g} nats" for c in tried]
            points.marker.size = [16 if c is cost else 9 for c in tried]
        self.sentence.value, self.table.value = self.told, self.html

    @property
    def told(self) -> str:
        """The present threshold in a sentence, as HTML."""
        c = self.cost
        return (
            f'<p aria-live="polite"><b>Threshold {c.threshold:.4g}</b>: steps of {c.threshold / TOP:.3g}; {100 * c.clipped:.3g} % of '
            f"the values are clipped; the squared error is {100 * c.squared:.3g} % of the mean square; KL of the histogram is {c.kl:.3g} "
            f"nats; the model's next-token distribution moves by {c.kld:.3g} nats per token (measured).</p>"
        )

    @property
    def html(self) -> str:
        """All thresholds tried so far as an HTML table, in order."""
        rows = [c.row for c in sorted(self.tensor.costs.values())]
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        return f"<table><caption>Thresholds so far</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def static(self) -> go.Figure:
        """The measured divergences so far as a plain figure, for `plots.show` (a widget is empty on a code host)."""
        tried = sorted(self.tensor.costs.values())
        title = {"text": "KL of the model against the threshold of one tensor, measured"}
        fig = go.Figure(layout={"template": plots.TEMPLATE, "title": title})
        fig.update_xaxes(title_text="threshold", type="log")
        fig.update_yaxes(title_text="nats per token", type="log")
        fig.add_scatter(
            x=[c.threshold for c in tried],
            y=[max(c.kld, 1e-9) for c in tried],
            mode="lines+markers",
            name="measured",
            marker={"color": plots.OKABE_ITO[0], "size": 8},
            text=[f"{c.threshold:.4g}: {c.kld:.3g} nats" for c in tried],
            hovertemplate="%{text}<extra></extra>",
        )
        return fig

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, a sentence that says what would be."""
        inputs = w.HBox([self.rule, w.HBox([self.box, self.slider])], layout={"flex_flow": "row wrap"})
        return frame(inputs, self.sentence, self.figure, self.table)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        c = self.cost
        return f"A control of the threshold, which needs a running notebook; it stands at {c.threshold:.4g}: {c.kld:.3g} nats per token."
