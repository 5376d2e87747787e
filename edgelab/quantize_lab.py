"""One matrix, then a whole model, quantized in many ways: errors, levels, the staircase of bits, outliers. For notebook 04.

An error of a matrix W [out, in] that became Q is measured in two ways that do not agree:

    equal = |W - Q| / |W|                                        every weight counts alike (Frobenius norms)
    seen  = sqrt(tr((W - Q) H (W - Q)^T) / tr(W H W^T))          what the outputs on the inputs x are off by; H = sum x x^T

and a model by the KL divergence of its next-token distribution from the original's, in nats per token, over all documents
of the test split that were read. Two methods are compared *paired*: the same documents are drawn for both (`Results.ratio`),
for documents differ from each other far more than methods do.

Bits are *effective*, over the weights that were rounded: codes, scales and offsets. Bytes are the whole model's, with all
that is not rounded in 16 bits. Both are counted, not measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from edgelab import plots
from edgelab.compare import pool
from edgelab.compress import Compressed
from edgelab.evaluate import Measured, interval, measure, summarise, weigh
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.frame import frame
from edgelab.methods.calibrate import InputStats
from edgelab.methods.gptq import gptq
from edgelab.methods.hqq import hqq
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.recipe import Quantize
from edgelab.scheme import QuantScheme

NARROW = "RTN, max|w| / 7: codes -7 .. 7"
LOOK = {"rtn": 0, "gptq": 1}  # which colour and marker a method has in every figure


# ----------------------------------------------------------------------------------------------------------- one matrix


class MatrixError(NamedTuple):
    """How far the values of one matrix moved; see the module."""

    method: str
    scheme: str
    bits: float
    equal: float
    seen: float

    @property
    def row(self) -> dict[str, str]:
        """For a table."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "bits per weight (counted)": f"{self.bits:.2f}",
            "error, all weights alike, % (computed)": f"{100 * self.equal:.2f}",
            "error that inputs see, % (computed)": f"{100 * self.seen:.2f}",
        }


def matrix_error(weight: Tensor, values: QTensor | Tensor, xx: Tensor, method: str = "", scheme: str | None = None) -> MatrixError:
    """Both errors of `values` (codes, or values [out, in] with the text of their `scheme`) in place of `weight` [out, in].

    >>> w, h = torch.tensor([[3.0, 4.0]]), torch.diag(torch.tensor([1.0, 0.0]))  # only the first input is ever active
    >>> matrix_error(w, torch.tensor([[3.0, 0.0]]), h, scheme="int4-row")[3:]
    (0.8, 0.0)
    """
    scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else values.scheme
    q = torch.from_numpy(values.dequantize()) if isinstance(values, QTensor) else values
    wide, h = weight.detach().double(), xx.double()
    e = wide - q.double()

    def size(a: Tensor) -> float:
        return float(torch.einsum("oi,ij,oj->", a, h, a))

    equal, seen = float(e.norm() / wide.norm()), math.sqrt(max(size(e), 0.0) / size(wide))
    return MatrixError(method, str(scheme), scheme.bits_per_weight(tuple(weight.shape)), equal, seen)


def narrow_range(weight: Tensor, bits: int = 4, group: int = 32) -> Tensor:
    """The values of `weight` [out, in] rounded to nearest with scale = max|w| / (2^(b-1) - 1): one code is never used.

    >>> narrow_range(torch.tensor([[0.7, -0.33] + [0.0] * 6]), group=8)[0, :2].round(decimals=2)
    tensor([ 0.7000, -0.3000])
    """
    top = 2 ** (bits - 1) - 1
    groups = weight.detach().float().unflatten(-1, (-1, group))
    scale = (groups.abs().amax(-1, keepdim=True) / top).half().float()
    return (torch.round(groups / torch.where(scale == 0, 1, scale)).clamp(-top, top) * scale).flatten(-2)


def side_by_side(weight: Tensor, xx: Tensor) -> list[MatrixError]:
    """The errors of the methods on one `weight` [out, in] at about 4.5 bits, whose inputs have the second moments `xx`."""
    symmetric, wide = QuantScheme.parse("int4-g32"), QuantScheme.parse("uint4-g64")
    found = [matrix_error(weight, narrow_range(weight), xx, NARROW, "int4-g32")]
    for method, scheme, settings in (
        ("RTN, signed max / -8: codes -8 .. 7", symmetric, {}),
        ("RTN, scale of least squared error", symmetric, {"mse_grid": 32}),
        ("the same, weighted by E[x²]", symmetric, {"mse_grid": 32, "importance": xx.diagonal()}),
        ("RTN, asymmetric", wide, {}),
        ("NF4", QuantScheme.parse("nf4-g32"), {}),
        ("FP4", QuantScheme.parse("fp4-g32"), {}),
        ("MXFP4", QuantScheme.parse("mxfp4-g32"), {}),
    ):
        found.append(matrix_error(weight, round_to_nearest(weight, scheme, **settings), xx, method))
    found.append(matrix_error(weight, hqq(weight, wide), xx, "HQQ"))
    found.append(matrix_error(weight, gptq(weight, xx, symmetric, rounds=0), xx, "GPTQ as published"))
    found.append(matrix_error(weight, gptq(weight, xx, symmetric), xx, "GPTQ, refined"))
    return found


def errors_figure(errors: Sequence[MatrixError]) -> go.Figure:
    """Both errors of each method, a point each: left is better for equal weights, down for the outputs."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Two errors of one matrix that do not agree"}})
    fig.update_xaxes(title_text="error, all weights alike, %")
    fig.update_yaxes(title_text="error that inputs see, %")
    for i, e in enumerate(errors):
        fig.add_scatter(
            x=[100 * e.equal],
            y=[100 * e.seen],
            mode="markers",
            name=e.method,
            marker={"color": plots.OKABE_ITO[i % 6], "symbol": plots.SYMBOLS[(i + i // 6) % len(plots.SYMBOLS)], "size": 11},
            hovertemplate=f"{e.method}: %{{x:.2f}} %, %{{y:.2f}} %<extra></extra>",
        )
    return fig.update_layout(height=460)


def say_errors(errors: Sequence[MatrixError]) -> str:
    """The sentence beside `errors_figure`."""
    equal, seen = min(errors, key=lambda e: e.equal), min(errors, key=lambda e: e.seen)
    return (
        f"With all weights alike {equal.method} errs least ({100 * equal.equal:.2f} %); for the inputs that the matrix sees {seen.method} "
        f"({100 * seen.seen:.2f} %), though its weights are off by {100 * seen.equal:.2f} %."
    )


# ------------------------------------------------------------------------------------------------- the levels of one group


class Levels(NamedTuple):
    """The values that one group's weights may take, and how far they moved."""

    name: str
    values: np.ndarray
    error: float  # |w - q| / |w|

    @property
    def row(self) -> dict[str, str]:
        return {
            "codebook": self.name,
            "levels": str(len(self.values)),
            "lowest": f"{self.values[0]:+.4f}",
            "highest": f"{self.values[-1]:+.4f}",
            "error of this group, % (computed)": f"{100 * self.error:.2f}",
        }


def group_levels(group: Tensor) -> list[Levels]:
    """The levels of the 4-bit codebooks for one `group` of 32 weights, each rounded to nearest."""
    group = group.detach().float().reshape(1, 32)
    top, found = float(group.abs().max()) / 7, []
    error = float((group - narrow_range(group)).norm() / group.norm())
    found.append(Levels("int4, max|w| / 7", top * np.arange(-7, 8), error))
    for name, scheme in (
        ("int4, signed max / -8", "int4"),
        ("uint4: scale and offset", "uint4"),
        ("NF4", "nf4"),
        ("FP4", "fp4"),
        ("MXFP4", "mxfp4"),
    ):
        q = round_to_nearest(group, QuantScheme.parse(f"{scheme}-g32"))
        every = QTensor.from_codes(np.tile(np.arange(16, dtype=np.uint8), 2)[None], q.scales, q.scheme, q.offsets)
        error = float((group - torch.from_numpy(q.dequantize())).norm() / group.norm())
        found.append(Levels(name, np.unique(every.dequantize()), error))
    return found


def levels_figure(group: Tensor, levels: Sequence[Levels], bins: int = 16) -> go.Figure:
    """The histogram of one group's weights as a line of steps, the weights below it, and below those a row of levels each."""
    values = group.detach().float().flatten().numpy()
    fig = go.Figure(
        layout={"template": plots.TEMPLATE, "title": {"text": f"{len(values)} weights of one group, and the levels of each codebook"}}
    )
    counts, edges = np.histogram(values, bins)
    fig.add_scatter(
        x=np.repeat(edges, 2), y=np.concatenate([[0], np.repeat(counts, 2), [0]]), mode="lines", name="weights, per bin",
        line={"color": plots.INK}, marker={"color": plots.INK},
    )  # fmt: skip
    rug = {"color": plots.INK, "symbol": "cross", "size": 6}
    fig.add_scatter(x=values, y=np.full(len(values), -0.7), mode="markers", name="weights", marker=rug)
    for i, row in enumerate(levels):
        fig.add_scatter(
            x=row.values,
            y=np.full(len(row.values), -1.7 - i),
            mode="markers",
            name=row.name,
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)], "size": 8},
            hovertemplate=f"{row.name}: %{{x:.4f}}<extra></extra>",
        )
    fig.update_xaxes(title_text="weight")
    fig.update_yaxes(title_text="weights per bin; below 0: levels", range=[-1.5 - len(levels), 1.1 * counts.max()])
    return fig.update_layout(height=460)


def say_levels(levels: Sequence[Levels]) -> str:
    """The sentence beside `levels_figure`."""
    best = min(levels, key=lambda x: x.error)
    each = ", ".join(f"{x.name} {100 * x.error:.1f} %" for x in levels)
    return f"In this group {best.name} errs least. Errors: {each}."


# ----------------------------------------------------------------------------------------------------------- whole models


class Point(NamedTuple):
    """One model, counted and measured."""

    name: str
    method: str  # of its Quantize step; "" for a model in floating point
    scheme: QuantScheme | None  # None where weights differ, or are in floating point
    bits: float  # effective, of the rounded weights
    nbytes: int  # of the whole model
    kld: float
    low: float | None
    high: float | None
    same_top: float


def kld_ratio(pooled: Measured, a: str, b: str, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """KLD of `a` over that of `b` on all documents of `pooled` (`compare.pool`), with its 95 % interval: drawn anew, the same for both."""
    one, two = (pooled.scores[name]["all"] for name in (a, b))
    drawn = weigh(one.source, resamples, seed)
    return float(one.kld.sum() / two.kld.sum()), *interval((drawn @ one.kld) / (drawn @ two.kld))


@dataclass(frozen=True, eq=False)
class Results:
    """{name: Point} of models measured on the same documents, and the sums behind them, domains put together."""

    points: Mapping[str, Point]
    pooled: Measured

    def ratio(self, a: str, b: str, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """KLD of `a` over that of `b`, with its 95 % interval: documents drawn anew, the same for both."""
        return kld_ratio(self.pooled, a, b, resamples=resamples, seed=seed)

    def rows(self, against: str | None = None, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """A line per model; `against`: the one whose KLD theirs is divided by, paired."""
        lines = []
        for p in self.points.values():
            if names is not None and p.name not in names:
                continue
            line = {
                "model": p.name,
                "scheme": str(p.scheme or ("mixed" if p.method else "")),
                "bits (counted)": f"{p.bits:.2f}",
                "MB (counted)": f"{p.nbytes / 1e6:.2f}",
                "KLD, nats per token [95 %] (measured)": f"{p.kld:.3g}" + ("" if p.low is None else f" [{p.low:.2g}, {p.high:.2g}]"),
            }
            if against is not None:
                line[f"KLD / {against}'s, paired [95 %]"] = (
                    "1" if p.name == against else "{:.2f} [{:.2f}, {:.2f}]".format(*self.ratio(p.name, against))
                )
            lines.append(line | {"same top token, % (measured)": f"{100 * p.same_top:.1f}"})
        return lines


def results(
    original: nn.Module, models: Mapping[str, Compressed | nn.Module], tokenizer, test, *, max_docs, context: int = 256, seed: int = 0
) -> Results:
    """`models` measured against `original` on the same documents of `test`."""
    plain = {name: m.model if isinstance(m, Compressed) else m for name, m in models.items()}
    if "original" in plain:
        raise ValueError("a model can't be called 'original': that is the one they are measured against")
    pooled = pool(measure({"original": original} | plain, tokenizer, test, max_docs=max_docs, context=context, progress=False))
    report = summarise(pooled, resamples=1000, seed=seed)
    points = {}
    for name, made in models.items():
        kld = report.get(model=name, metric="kld", slice="all")
        same = report.get(model=name, metric="same_top", slice="all").value
        points[name] = Point(name, *_counted(made), kld.value, kld.low, kld.high, same)
    return Results(points, pooled)


def _counted(made: Compressed | nn.Module) -> tuple[str, QuantScheme | None, float, int]:
    """(method, scheme, effective bits, bytes) of one model."""
    if not isinstance(made, Compressed):
        return "", None, 16.0, 2 * sum(p.numel() for p in made.parameters())
    step = next(s for s in reversed(made.recipe.steps) if isinstance(s, Quantize))
    rounded = [r for r in made.coverage if r.touched]
    size, count = sum(r.predicted_bytes for r in rounded), sum(r.parameters for r in rounded)
    schemes = {r.scheme for r in rounded}
    return (
        step.method.name,
        QuantScheme.parse(schemes.pop()) if len(schemes) == 1 else None,
        8 * size / count,
        size + 2 * (made.coverage.parameters - count),
    )


def methods_figure(found: Results) -> go.Figure:
    """KLD of each model with its interval, on a logarithmic axis."""
    points = list(found.points.values())
    fig = go.Figure(
        layout={"template": plots.TEMPLATE, "title": {"text": "What each method leaves: KL divergence, 95 % intervals over documents"}}
    )
    fig.add_scatter(
        x=[p.name for p in points],
        y=[p.kld for p in points],
        mode="markers",
        error_y={"type": "data", "array": [p.high - p.kld for p in points], "arrayminus": [p.kld - p.low for p in points]},
        marker={"color": plots.OKABE_ITO[0], "size": 10},
        showlegend=False,
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    fig.update_yaxes(title_text="KL divergence, nats per token", type="log")
    return fig


def say_methods(found: Results, against: str) -> str:
    """The sentence beside `methods_figure`: who is better than `against` beyond doubt, and who is best."""
    ratios = {name: found.ratio(name, against) for name in found.points if name != against}
    better = [name for name, (_, _, high) in ratios.items() if high < 1]
    best = min(ratios, key=lambda name: ratios[name][0])
    value, low, high = ratios[best]
    return (
        f"Least: {best}, {value:.2f} of the KL divergence of {against} [{low:.2f}, {high:.2f}]. Below {against} with the whole interval: "
        f"{', '.join(better) or 'none'}."
    )


# -------------------------------------------------------------------------------------------------------------- staircase


def _stairs(points: Mapping[str, Point]) -> dict[tuple[str, str], list[Point]]:
    """{(method, granularity): its points, by falling bits}."""
    found: dict[tuple[str, str], list[Point]] = {}
    for p in points.values():
        found.setdefault((p.method, str(p.scheme.granularity)), []).append(p)
    return {key: sorted(mine, key=lambda p: -p.bits) for key, mine in found.items()}


def staircase_figure(points: Mapping[str, Point]) -> go.Figure:
    """KLD against effective bits: a line per method and group size."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "The staircase of bits"}})
    fig.update_xaxes(title_text="effective bits per weight, scales counted")
    fig.update_yaxes(title_text="KL divergence, nats per token", type="log")
    kinds = list(dict.fromkeys(kind for _, kind in _stairs(points)))
    for (method, kind), mine in _stairs(points).items():
        i, k = LOOK[method], kinds.index(kind)
        fig.add_scatter(
            x=[p.bits for p in mine],
            y=[p.kld for p in mine],
            mode="lines+markers",
            name=f"{method}, groups of {kind[1:]}",
            line={"color": plots.OKABE_ITO[i], "dash": ("solid", "dash", "dot")[k % 3]},
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[2 * i + k % 2], "size": 9},
            text=[str(p.scheme) for p in mine],
            hovertemplate="%{text}: %{x:.3f} bits, %{y:.4f} nats<extra>%{fullData.name}</extra>",
        )
    return fig


class Saved(NamedTuple):
    """How many bits fewer the better method needs for the KLD that it has at `scheme`; None beyond what was measured."""

    scheme: QuantScheme
    kld: float
    bits: float
    base_bits: float | None

    @property
    def saved(self) -> float | None:
        return None if self.base_bits is None else self.base_bits - self.bits

    @property
    def row(self) -> dict[str, str]:
        return {
            "scheme": str(self.scheme),
            "KLD": f"{self.kld:.3g}",
            "its bits": f"{self.bits:.2f}",
            "bits that the other needs": "outside" if self.base_bits is None else f"{self.base_bits:.2f}",
            "saved": "" if self.saved is None else f"{self.saved:+.2f}",
        }


def saved_bits(points: Mapping[str, Point], base: str = "rtn", better: str = "gptq") -> list[Saved]:
    """For each point of `better`: the bits at which `base`, with groups of the same size, has the same KLD.

    Between measured points ln KLD is taken to be linear in the bits; nothing is extrapolated.
    """
    stairs, found = _stairs(points), []
    for (method, kind), mine in stairs.items():
        if method != better or (base, kind) not in stairs:
            continue
        other = stairs[base, kind]  # bits fall, so KLD rises
        klds, bits = np.log([p.kld for p in other]), [p.bits for p in other]
        if (np.diff(klds) <= 0).any():
            raise ValueError(f"the KLD of {base} does not rise while its bits fall: measure on more documents")
        for p in mine:
            inside = klds[0] <= math.log(p.kld) <= klds[-1]
            found.append(Saved(p.scheme, p.kld, p.bits, float(np.interp(math.log(p.kld), klds, bits)) if inside else None))
    return found


def say_staircase(points: Mapping[str, Point]) -> str:
    """The sentence beside `staircase_figure`."""
    parts = []
    for (method, kind), mine in _stairs(points).items():
        steps = [f"{p.scheme.bits} bits {p.kld:.2g}" for p in mine]
        parts.append(f"{method} with groups of {kind[1:]}: {', '.join(steps)}")
    saved = [s.saved for s in saved_bits(points) if s.saved is not None]
    text = f"KL divergence, nats per token. {'; '.join(parts)}."
    return text + (f" At equal KL divergence GPTQ saves {min(saved):.2f} to {max(saved):.2f} bits per weight." if saved else "")


class StaircaseControl:
    """Method, bits and group size in; the point on the staircase, the size of this and of a larger model out. Nothing is
    computed anew: every choice was measured before.

    The slider goes through the bits that were measured, the box beside it takes any number and says which there are.
    `choose` does from code what they do by hand; what can't be shown is said in the control and kept in `error`.
    """

    def __init__(self, points: Mapping[str, Point], start: str = "gptq int4-g32", billions: float = 1.0) -> None:
        self._points = {(p.method, p.scheme): p for p in points.values()}
        self._stairs = staircase_figure(points)
        self._bits = sorted({p.scheme.bits for p in points.values()})
        kinds = list(dict.fromkeys(p.scheme.granularity for p in points.values()))
        self.chosen: list[Point] = []
        self.error: Exception | None = None
        self._busy = False
        wide = {"description_width": "7em"}
        self.method = w.Dropdown(
            options=list(dict.fromkeys(p.method for p in points.values())), description="method", style=wide, layout={"width": "14em"}
        )
        self.group = w.Dropdown(
            options=[(f"groups of {str(k)[1:]}", k) for k in kinds], description="one scale per", style=wide, layout={"width": "17em"}
        )
        self.bits = w.BoundedIntText(self._bits[0], min=1, max=16, description="bits", style=wide, layout={"width": "12em"})
        self.slider = w.IntSlider(0, min=0, max=len(self._bits) - 1, readout=False, continuous_update=False, layout={"width": "10em"})
        self.billions = w.BoundedFloatText(
            billions, min=0.001, max=2000, step=0.5, description="your model, 10⁹",
            style={"description_width": "9em"}, layout={"width": "17em"},
        )  # fmt: skip
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._stairs)
        ring = {"color": "rgba(0,0,0,0)", "size": 20, "line": {"color": plots.OKABE_ITO[3], "width": 3}}
        line = {"color": plots.OKABE_ITO[3], "dash": "dot", "width": 1.5}
        self.figure.add_scatter(mode="lines", name="the same KLD", line=line, marker_color=line["color"], hoverinfo="skip")
        self.figure.add_scatter(mode="markers", name="your choice", marker=ring, hoverinfo="skip")
        self.figure.update_layout(height=460, autosize=True, title_text="", margin={"t": 60})
        self.figure._config = self.figure._config | {"responsive": True}  # as wide as the page, also when that changes
        self.choose(start)
        if self.error is not None:
            raise self.error
        self.slider.observe(self._slid, "value")
        for widget in (self.method, self.group, self.bits, self.billions):
            widget.observe(lambda _: self._changed(), "value")

    @property
    def point(self) -> Point:
        """The present choice; raises ValueError where nothing was measured."""
        if self.bits.value not in self._bits:
            raise ValueError(f"{self.bits.value} bits were not measured; use {', '.join(map(str, self._bits[:-1]))} or {self._bits[-1]}")
        key = (self.method.value, QuantScheme(self.bits.value, self.group.value))
        if key not in self._points:
            there = ", ".join(str(s) for m, s in self._points if m == key[0])
            raise ValueError(f"{key[0]} at {key[1]} was not measured; use one of {there}")
        return self._points[key]

    def choose(self, name: str) -> Point | None:
        """Set the inputs to "<method> <scheme>", such as "rtn int3-g128", and return its point. ValueError for what was not measured."""
        method, _, text = name.partition(" ")
        scheme = QuantScheme.parse(text)
        if (method, scheme) not in self._points:
            raise ValueError(f"{name!r} was not measured; there are {', '.join(f'{m} {s}' for m, s in self._points)}")
        self._busy = True
        try:
            self.method.value, self.group.value, self.bits.value = method, scheme.granularity, scheme.bits
        finally:
            self._busy = False
        self._changed()
        return self.point if self.error is None else None

    def _slid(self, change) -> None:
        if not self._busy:
            self.bits.value = self._bits[change.new]

    def _changed(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            point = self.point
            self.slider.value = self._bits.index(point.scheme.bits)
            self.chosen = [p for p in self.chosen if p is not point] + [point]
            *_, level, ring = self.figure.data
            ends = [min(p.bits for p in self._points.values()), max(p.bits for p in self._points.values())]
            with self.figure.batch_update():
                level.x, level.y = ends, [point.kld, point.kld]
                ring.x, ring.y = [point.bits], [point.kld]
            self.sentence.value, self.table.value = self.told, self.html
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'
        finally:
            self._busy = False

    @property
    def told(self) -> str:
        """The present choice in a sentence, as HTML."""
        p = self.point
        gigabytes = self.billions.value * p.bits / 8
        return (
            f'<p aria-live="polite"><b>{p.method}, {p.scheme}</b>: {p.bits:.3f} bits per weight (counted), {p.nbytes / 1e6:.2f} MB '
            f"for this whole model; KL divergence {p.kld:.3g} nats per token, the same top token at {100 * p.same_top:.1f} % of the "
            f"positions (measured). A model with {self.billions.value:g} · 10⁹ such weights would take {gigabytes:.2f} GB (computed).</p>"
        )

    @property
    def html(self) -> str:
        """All choices so far as an HTML table, by size."""
        columns = ("scheme", "method", "bits per weight (counted)", "MB (counted)", "KLD [95 %] (measured)", "same top token, % (measured)")
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
        lines = []
        for p in sorted(self.chosen, key=lambda p: p.bits):
            cells = (
                p.method,
                f"{p.bits:.3f}",
                f"{p.nbytes / 1e6:.2f}",
                f"{p.kld:.3g} [{p.low:.2g}, {p.high:.2g}]",
                f"{100 * p.same_top:.1f}",
            )
            lines.append(f'<tr><th scope="row">{p.scheme}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
        return f"<table><caption>Choices so far</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, a sentence that says what would be."""
        bits = w.HBox([self.bits, self.slider])  # on one line, however narrow the page
        inputs = w.HBox([self.method, self.group, bits, self.billions], layout={"flex_flow": "row wrap"})
        return frame(inputs, self.sentence, self.figure, self.table)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        p = self.chosen[-1]
        stands = f"it stands at {p.method}, {p.scheme}: {p.kld:.3g} nats."
        return f"A control of method, bits and group size, which needs a running notebook; {stands}"


# ------------------------------------------------------------------------------------------------------------- mixed bits


def cost_rows(
    costs: Mapping[str, Mapping[str, tuple[float, int]]], choice: Mapping[str, str], scheme: str, ends: int = 4
) -> list[dict[str, str]]:
    """The `ends` weights that lose most per byte at `scheme`, and those that lose least: their losses, and the scheme of each in `choice`.

    `costs` as of `edgelab.sensitivity.sensitivity`.
    """
    ordered = sorted(costs, key=lambda name: -costs[name][scheme][0] / costs[name][scheme][1])
    lines = []
    for name in ordered[:ends] + ordered[-ends:]:
        kld, nbytes = costs[name][scheme]
        lines.append(
            {
                "weight": name.removeprefix("model."),
                f"KLD, it alone in {scheme} (measured)": f"{kld:.2g}",
                "nats per MB": f"{1e6 * kld / nbytes:.2g}",
                "gets": str(choice[name]),
            }
        )
    return lines


# --------------------------------------------------------------------------------------------------------------- outliers


def channels_figure(before: InputStats, after: InputStats) -> go.Figure:
    """The largest magnitude of every input channel, before and after a change of the model, each sorted."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "The largest |x| of each input channel, sorted"}})
    fig.update_xaxes(title_text="channel, from the largest")
    fig.update_yaxes(title_text="largest |x| in calibration", type="log")
    for i, (name, stats) in enumerate((("as it is", before), ("outliers planted", after))):
        y = stats.absmax.flatten().sort(descending=True).values
        at = np.unique(
            np.append(np.arange(min(12, len(y))), np.linspace(0, len(y) - 1, 40).astype(int))
        )  # the outliers, then some of the rest
        fig.add_scatter(
            x=(at + 1).tolist(),
            y=[float(f"{v:.4g}") for v in y[at].tolist()],
            mode="lines+markers",
            name=name,
            line={"color": plots.OKABE_ITO[i]},
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i], "size": 5},
            hovertemplate="%{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    return fig


def say_channels(before: InputStats, after: InputStats) -> str:
    """The sentence beside `channels_figure`."""
    parts = []
    for name, stats in (("as it is", before), ("with outliers planted", after)):
        top, middle = float(stats.absmax.max()), float(stats.absmax.median())
        parts.append(f"{name} the largest channel reaches {top:.3g}, the median one {middle:.3g}: {top / middle:.1f} times")
    return f"The largest |x|: {'; '.join(parts)}."


def recovery_rows(found: Results, healthy: str, naive: str, fixes: Sequence[str]) -> list[dict[str, str]]:
    """A line for `naive`, each of `fixes` and `healthy`: KLD, and which share of (naive - healthy) is won back."""
    klds = {name: found.points[name].kld for name in (naive, *fixes, healthy)}
    lost = klds[naive] - klds[healthy]
    if lost <= 0:
        raise ValueError(
            f"{naive!r} has a KLD of {klds[naive]:.3g} and {healthy!r} {klds[healthy]:.3g}: nothing was lost that could be recovered"
        )
    return [
        {
            "model": name,
            "KLD, nats per token (measured)": f"{kld:.3g}",
            "same top token, % (measured)": f"{100 * found.points[name].same_top:.1f}",
            "of the loss recovered, %": f"{100 * (klds[naive] - kld) / lost:.1f}",
        }
        for name, kld in klds.items()
    ]


# -------------------------------------------------------------------------------------------------------------- exercises

EXERCISE_GROUP = (0.3, -0.7, 1.2, -0.1, 0.5, 1.6, -1.5, 0.9)  # no tie, one weight that is clipped, the largest is positive
_ROW, _H, _STEP = (0.6, 0.6), ((4.0, 1.0), (1.0, 2.0)), 1.0


def check_rtn(scale, codes) -> Verdict:
    """Exercise 1: scale and the 8 stored codes 0 .. 7 of `EXERCISE_GROUP` at 3 bits, signed-maximum form."""
    if scale is None or codes is None:
        return unanswered("a scale (one number) and a list of eight codes, each 0 .. 7")
    s, c = numbers(scale, 1), numbers(codes, 8)
    if s is None or c is None:
        return not_yet("the scale is one number and the codes are eight, one for each weight")
    group = np.array(EXERCISE_GROUP)
    if math.isclose(s[0], 1.6 / 3, rel_tol=2e-3):
        return not_yet("max|w| / 3 leaves one of the eight codes unused; divide the largest weight, sign and all, by -4")
    if math.isclose(s[0], 0.4, rel_tol=2e-3):
        return not_yet("the sign. The largest weight must become level -4, for there is no level +4: 1.6 / scale = -4")
    if not math.isclose(s[0], -0.4, rel_tol=2e-3):
        return not_yet("the scale is the weight of largest magnitude, with its sign, over -2^(bits - 1)")
    levels = np.round(group / -0.4, 6)  # 1.2 / -0.4 is a little above -3 in binary
    want = np.clip(np.round(levels), -4, 3) + 4
    if np.array_equal(c, want):
        return right("scale -0.4, codes 3 6 1 4 3 0 7 2. The weight -1.5 wanted level 3.75 and was clipped to 3")
    if min(c) < 0:
        return not_yet("these are levels, -4 .. 3; a stored code is the level + 4")
    if max(c) > 7:
        return not_yet("3 bits hold 0 .. 7. The level of -1.5 is clipped to 3")
    if np.array_equal(c, np.clip(np.trunc(levels), -4, 3) + 4) or np.array_equal(c, np.clip(np.floor(levels), -4, 3) + 4):
        return not_yet("round to the nearest level, don't cut off")
    wrong = [i for i in range(8) if c[i] != want[i]]
    first = group[wrong[0]]
    return not_yet(f"{len(wrong)} of 8 codes are off, the first is that of the weight {first}: w / scale = {first / -0.4:.2f}")


def check_bits(answer) -> Verdict:
    """Exercise 2: effective bits per weight of uint3-g64."""
    if answer is None:
        return unanswered("a number of bits")
    number = numbers(answer, 1)
    wanted = QuantScheme.parse("uint3-g64").bits_per_weight((64, 128))
    if number is None:
        return not_yet("one number, please")
    if math.isclose(number[0], wanted, rel_tol=1e-6):
        return right(f"3 + (16 + 16) / 64 = {wanted} bits, as many as int3-g32")
    hints = {
        3.25: "uint has an offset beside each scale, and that takes 16 bits, too",
        3.0: "these are the codes alone; scale and offset are stored as well",
        4.0: "scale and offset are float16, not float32; 64 weights share them",
        3.75: "one offset per group is enough: 16 bits for the scale and 16 for the offset",
    }
    return hint(number[0], hints, "codes, plus a float16 scale and a float16 offset that 64 weights share", 1e-9)


def check_rtn_function(answer) -> Verdict:
    """Exercise 3: a function (group [n], bits) -> (scale, codes), round to nearest in the signed-maximum form.

    Two rules that the package keeps are asked, too: of two weights of largest magnitude the first one gives the scale, and ties go to even.
    """

    def twin(group: np.ndarray, bits: int) -> tuple[float, np.ndarray]:
        q = round_to_nearest(torch.tensor(group[None], dtype=torch.float32), QuantScheme.parse(f"int{bits}-row"))
        return float(q.scales[0, 0]), q.codes()[0]

    group, negative = np.array(EXERCISE_GROUP), np.array([0.25, -2.0, 1.6, -0.35, 1.9, 0.1])
    r = np.random.default_rng(4)
    cases = [
        Case("the eight weights of exercise 1", (group, 3), "scale: the weight of largest magnitude, with its sign, over -2^(bits - 1)"),
        Case(
            "a group whose largest magnitude is negative",
            (negative, 4),
            "the scale is positive here, and 1.9 is clipped to the highest code",
        ),
        Case("2 bits", (np.array([0.5, -1.0, 0.3, 0.9]), 2), "the zero point is 2^(bits - 1), and the codes are 0 .. 2^bits - 1"),
        Case("a group of zeros", (np.zeros(4), 4), "no division by a scale of 0: every code is that of zero, 2^(bits - 1)"),
        Case("one weight", (np.array([-3.0]), 4)),
        Case(
            "the largest magnitude twice, with either sign",
            (np.array([0.3, 1.0, -1.0, 0.2]), 4),
            "the first of the two gives the scale, as np.argmax finds it; the other one is clipped",
        ),
        Case(
            "weights halfway between two levels",
            (np.array([2.0, 0.125, -0.125, 0.375, -0.375, 0.625]), 4),
            "ties go to the even level, as np.rint, np.round and torch.round do: 0.5 becomes 0 and 1.5 becomes 2",
        ),
        Case("32 random weights, 8 bits", (np.append(r.uniform(-1.9, 1.9, 31).round(3), 2.0), 8)),
    ]
    form = "a function of a group of weights and a number of bits that returns (scale, codes)"
    praise = "the codes are those of round_to_nearest; for a matrix do so for each group, and that is all of RTN"
    return check_function(answer, twin, cases, form, praise, parts=("scale", "codes"), tolerance=1e-3)


def check_gptq(updated, code) -> Verdict:
    """Exercise 4: GPTQ's update of the second of two weights, and the level it is then rounded to."""
    if updated is None or code is None:
        return unanswered("two numbers, the updated weight and its level")
    u, c = numbers(updated, 1), numbers(code, 1)
    if u is None or c is None:
        return not_yet("two numbers, the updated weight and the level")
    error = _ROW[0] - round(_ROW[0] / _STEP) * _STEP
    wanted = _ROW[1] + error * _H[0][1] / _H[1][1]
    if math.isclose(u[0], wanted, abs_tol=1e-6):
        if c[0] == round(wanted):
            return right("0.6 - 0.4 · 1/2 = 0.4, rounded to 0. The loss e H eᵀ is 0.88; rounding both to nearest makes it 1.28")
        return not_yet("the updated weight is right; now round it to the nearest level")
    hints = {
        _ROW[1] - error * _H[0][1] / _H[1][1]: "the sign: the first weight was rounded up, so the second has to come down",
        _ROW[1] + error * _H[0][1] / _H[0][0]: "divide by H of the weight that answers (the second), not of the one that was rounded",
        _ROW[1] + error: "the inputs are only partly alike: the error counts H_12 / H_22 of itself",
        _ROW[1]: "that is the weight as it was; it has to make good what the first one lost",
    }
    return hint(u[0], hints, "minimise e H eᵀ over the second error, with the first one fixed", 1e-6)


def others_answer(row: np.ndarray, h: np.ndarray, rounded: float) -> np.ndarray:
    """The weights row[1:] after row[0] became `rounded`, so that e h eᵀ is least: GPTQ's update of one column, float64 [n - 1].

    e is the error (new minus old) of the whole row, h [n, n] symmetric and positive definite. With e₀ fixed the least is at
    h_rr e_r = -h_r0 e₀. The published form takes row 0 of the inverse, e_r = e₀ (h⁻¹)_0r / (h⁻¹)_00, which is the same.

    >>> others_answer(np.array([0.6, 0.6]), np.array([[4.0, 1.0], [1.0, 2.0]]), 1.0)
    array([0.4])
    """
    row, h = np.asarray(row, np.float64), np.asarray(h, np.float64)
    return row[1:] - np.linalg.solve(h[1:, 1:], h[1:, 0]) * (rounded - row[0])


def check_column(answer) -> Verdict:
    """Exercise 5: a function (row [n], h [n, n], rounded) -> row[1:] updated after row[0] became `rounded`."""
    r = np.random.default_rng(5)
    x = r.standard_normal((5, 40))
    h = x @ x.T + 3
    two = np.array([[4.0, 1.0], [1.0, 2.0]])
    cases = [
        Case(
            "the two weights of exercise 4",
            (np.array([0.6, 0.6]), two, 1.0),
            "0.4 is right there: with e₀ fixed, which e₁ makes e h eᵀ least?",
        ),
        Case("a weight that was rounded down", (np.array([1.3, 0.2]), two, 1.0), "the other way: what is missing is made good"),
        Case(
            "inputs that have nothing in common",
            (np.array([0.4, 1.2, -0.7]), np.diag([1.0, 2.0, 3.0]), 0.0),
            "then nothing can be made good",
        ),
        Case(
            "a weight that is a level already",
            (np.array([2.0, 0.3, 0.7]), np.array([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]]), 2.0),
            "no error, no change",
        ),
        Case(
            "five weights",
            (r.standard_normal(5), h, 0.0),
            "the others answer together: solve h[1:, 1:] e = -h[1:, 0] e₀, or take row 0 of the inverse of all of h",
        ),
    ]
    form = "a function of row, h and rounded that returns the other weights, updated"
    praise = "GPTQ does this for one input after the other, for all rows at once, from one factor of h's inverse"
    return check_function(answer, others_answer, cases, form, praise, parts=("weights",), tolerance=1e-6)
