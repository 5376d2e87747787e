"""Zeros and smaller shapes, looked at: masks, errors, bytes, times, blocks; a control and exercises. For notebook 05.

Three things are kept apart that articles mix up: what a method *costs* (KL divergence to the original, nats per token, measured
over all documents read), what it saves *by arithmetic* (parameters, bytes, multiply-adds: counted) and what it saves *in time*
(measured here, as a ratio). Two methods are compared paired, on the same documents (`Results.ratio`); two products are timed turn
about in one process, and what is told is the median of the rounds' ratios (`race`), for a busy machine slows all in a round alike.

Bits per weight of a matrix of which a share s is zero, scales counted (`methods.sparse`): dense float16 16, bitmap 1 + 16 (1 - s),
CSR (16 + i)(1 - s) with indices of i = 8 or 16 bits, 2:4 always 9, int4-g32 always 4.5, a bitmap of int4 codes 1.5 + 4 (1 - s).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from edgelab import plots, set_threads
from edgelab.compare import pool
from edgelab.compress import Compressed
from edgelab.dynamic import saved
from edgelab.evaluate import Measured, measure, summarise
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.frame import frame
from edgelab.kernels.matmul import qmatmul
from edgelab.kernels.pack import tile
from edgelab.kernels.sparse import bitmap_matmul, bits, columns, csr_matmul
from edgelab.methods.prune import keep, keep_n_of_m, sparsegpt, wanda
from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.sparse import encode
from edgelab.model import weights
from edgelab.quantize_lab import kld_ratio
from edgelab.recipe import Prune, matches
from edgelab.scheme import QuantScheme
from edgelab.sparsify import Storage, storage_table
from edgelab.structure import figures
from edgelab.studies import MEAN, STUDIES, read

METHODS = ("magnitude", "wanda", "sparsegpt")
INT4 = QuantScheme.parse("int4-g32")
FORMULAS: dict[str, Callable[[float], float]] = {  # bits per weight at a share s of zeros, large matrices of up to 65,536 inputs
    "dense float16": lambda s: 16.0,
    "bitmap float16": lambda s: 1 + 16 * (1 - s),
    "CSR float16": lambda s: (16 + 16) * (1 - s),
    "dense int4-g32": lambda s: 4.5,
    "bitmap int4-g32": lambda s: 1.5 + 4 * (1 - s),
}
TWO_OF_FOUR_BITS = 9.0  # at 50 % alone


# ------------------------------------------------------------------------------------------------------------- one matrix


class Zeroed(NamedTuple):
    """One matrix with zeros. `seen`: what outputs err by, sqrt(tr(E H E^T) / tr(W H W^T)); `equal`: |E| / |W|."""

    method: str
    pattern: str
    values: Tensor  # [out, in]
    equal: float
    seen: float

    @property
    def row(self) -> dict[str, str]:
        return {
            "method": self.method,
            "pattern": self.pattern,
            "zeros, % (counted)": f"{100 * float((self.values == 0).float().mean()):.1f}",
            "error, all weights alike, % (computed)": f"{100 * self.equal:.1f}",
            "error that inputs see, % (computed)": f"{100 * self.seen:.1f}",
        }


def zeroed(weight: Tensor, xx: Tensor, method: str, pattern: str = "unstructured", sparsity: float = 0.5) -> Zeroed:
    """`weight` [out, in] pruned by one of `METHODS`; `xx` [in, in]: sum of x x^T over tokens."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}")
    few = None if pattern == "unstructured" else tuple(int(p) for p in pattern.split(":"))
    weight = weight.detach().float()
    if method == "sparsegpt":
        values = sparsegpt(weight, xx, sparsity, n_of_m=few)
    else:
        scores = weight.abs() if method == "magnitude" else wanda(weight, xx.diagonal())
        mask = keep_n_of_m(scores, *few) if few else keep(scores, sparsity, "matrix" if method == "magnitude" else "row")
        values = weight.masked_fill(~mask, 0.0)
    return Zeroed(method, pattern, values, *matrix_errors(weight, values, xx))


def matrix_errors(weight: Tensor, values: Tensor, xx: Tensor) -> tuple[float, float]:
    """(all weights alike, as inputs see it), both relative.

    >>> matrix_errors(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), torch.diag(torch.tensor([1.0, 0.0])))
    (0.8, 0.0)
    """
    whole, e, h = weight.double(), (weight - values).double(), xx.double()
    size = [max(float(((a @ h) * a).sum()), 0.0) for a in (e, whole)]
    return float(e.norm() / whole.norm()), math.sqrt(size[0] / size[1])


def mask_figure(found: Sequence[Zeroed], rows: int = 6, inputs: int = 24) -> go.Figure:
    """What stays in the first `rows` x `inputs` weights: a band of rows for each entry, a mark for each weight that is left."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": f"What stays of {rows} x {inputs} weights"}})
    ticks = []
    for i, z in enumerate(found):
        out, inp = (z.values[:rows, :inputs] != 0).nonzero(as_tuple=True)
        top = -i * (rows + 2)
        ticks.append(top - (rows - 1) / 2)
        fig.add_scatter(
            x=inp.tolist(),
            y=(top - out).tolist(),
            mode="markers",
            name=_label(z),
            marker={"color": plots.OKABE_ITO[METHODS.index(z.method)], "symbol": "square", "size": 9},
            hoverinfo="skip",
        )
    fig.update_xaxes(title_text="input")
    fig.update_yaxes(tickvals=ticks, ticktext=[_label(z) for z in found], title_text="rows: a band each, in the legend's order")
    return fig.update_layout(height=140 + 95 * len(found), margin={"l": 150})


def _label(z: Zeroed) -> str:
    return z.method if z.pattern == "unstructured" else f"{z.method} {z.pattern}"


def say_masks(found: Sequence[Zeroed]) -> str:
    """The sentence beside `mask_figure`: how far masks agree, and who errs least as the inputs see it."""
    base = found[0].values != 0
    agree = [
        f"{_label(z)} agrees with {_label(found[0])} about {100 * float(((z.values != 0) == base).float().mean()):.0f} % of the weights"
        for z in found[1:]
        if z.pattern == found[0].pattern
    ]
    groups = {p: min((z for z in found if z.pattern == p), key=lambda z: z.seen) for p in dict.fromkeys(z.pattern for z in found)}
    least = "; ".join(f"{p}: {z.method}, {100 * z.seen:.1f} %" for p, z in groups.items())
    return f"In the whole matrix {', '.join(agree)}. Least error that inputs see, {least}."


# ----------------------------------------------------------------------------------------------------------- whole models


class Point(NamedTuple):
    """One model, counted and measured. `nbytes`: all of it, pruned weights in the smallest exact form (`form`), the rest in 16 bits."""

    name: str
    method: str
    pattern: str
    zeros: float  # share of the weights that `Prune` selects
    form: str
    nbytes: int
    kld: float
    low: float | None
    high: float | None
    same_top: float


@dataclass(frozen=True, eq=False)
class Results:
    """{name: Point} of models measured on the same documents, and the sums behind them, domains put together."""

    points: Mapping[str, Point]
    pooled: Measured

    def ratio(self, a: str, b: str, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """KLD of `a` over that of `b` with its 95 % interval: documents drawn anew, the same for both."""
        return kld_ratio(self.pooled, a, b, resamples=resamples, seed=seed)

    def rows(self, against: str | None = None) -> list[dict[str, str]]:
        """A line per model; `against`: the one whose KLD theirs is divided by, paired."""
        lines = []
        for p in self.points.values():
            line = {
                "model": p.name,
                "zeros, % (counted)": f"{100 * p.zeros:.1f}",
                "MB (counted)": f"{p.nbytes / 1e6:.2f}",
                "as": p.form,
                "KLD, nats per token [95 %] (measured)": f"{p.kld:.3g}" + ("" if p.low is None else f" [{p.low:.2g}, {p.high:.2g}]"),
            }
            if against is not None:
                told = "1" if p.name == against else "{:.2f} [{:.2f}, {:.2f}]".format(*self.ratio(p.name, against))
                line[f"KLD / {against}'s, paired [95 %]"] = told
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
    report, points = summarise(pooled, resamples=1000, seed=seed), {}
    for name, made in models.items():
        kld, same = (report.get(model=name, metric=metric, slice="all") for metric in ("kld", "same_top"))
        points[name] = Point(name, *_counted(made), kld.value, kld.low, kld.high, same.value)
    return Results(points, pooled)


def _counted(made: Compressed | nn.Module) -> tuple[str, str, float, str, int]:
    """(method, pattern, share of zeros, form, bytes of the whole model)."""
    model, steps = (made.model, made.recipe.steps) if isinstance(made, Compressed) else (made, ())
    step = next((s for s in steps if isinstance(s, Prune)), None)
    if isinstance(made, Compressed) and any(r.touched for r in made.coverage):  # in codes: as they are stored, dense
        size = sum(r.predicted_bytes if r.touched else 2 * r.parameters for r in made.coverage)
        return "" if step is None else step.method, "" if step is None else step.pattern, step.sparsity if step else 0.0, "codes", size
    chosen = [x.tensor for x in weights(model) if not x.tied_to and any(matches(p, x.name, x.role) for p in Prune.select)]
    count, zero = sum(t.numel() for t in chosen), sum(int((t == 0).sum()) for t in chosen)
    best = smallest(storage_table(model))
    rest = 2 * (sum(p.numel() for p in model.parameters()) - count)
    return "" if step is None else step.method, "" if step is None else step.pattern, zero / count, best.format, best.bytes + rest


def smallest(table: Sequence[Storage]) -> Storage:
    """The smallest form of a `storage_table` that keeps float16 values as they are."""
    return min((row for row in table if row.format.endswith("float16")), key=lambda row: row.bytes)


def zeros_figure(points: Mapping[str, Point]) -> go.Figure:
    """KLD against the share of zeros: a line per method, a lone mark for n:m patterns."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "What zeros cost"}})
    fig.update_xaxes(title_text="zeros, % of the blocks' weights")
    fig.update_yaxes(title_text="KL divergence, nats per token", type="log")
    for method, pattern in dict.fromkeys((p.method, p.pattern) for p in points.values()):
        mine = sorted((p for p in points.values() if (p.method, p.pattern) == (method, pattern)), key=lambda p: p.zeros)
        i, free = METHODS.index(method), pattern == "unstructured"
        fig.add_scatter(
            x=[100 * p.zeros for p in mine],
            y=[p.kld for p in mine],
            mode="lines+markers" if free else "markers",
            name=method if free else f"{method} {pattern}",
            line={"color": plots.OKABE_ITO[i]},
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i] if free else "x", "size": 9},
            text=[p.name for p in mine],
            hovertemplate="%{text}: %{y:.4f} nats<extra></extra>",
        )
    return fig


def say_zeros(found: Results, at: Sequence[str]) -> str:
    """The sentence beside `zeros_figure`: for each setting of `at` ("50%", "2:4") the methods in order, and the best against magnitude."""
    parts = []
    for setting in at:
        mine = sorted((p for n, p in found.points.items() if n.endswith(f" {setting}")), key=lambda p: p.kld)
        text = f"at {setting} " + ", ".join(f"{p.method} {p.kld:.3g}" for p in mine)
        if mine[0].method != "magnitude":
            text += " (the first is {:.2f} [{:.2f}, {:.2f}] of magnitude)".format(*found.ratio(mine[0].name, f"magnitude {setting}"))
        parts.append(text)
    return f"KL divergence, nats per token: {'; '.join(parts)}."


# -------------------------------------------------------------------------------------------------------------- bytes


def storage_rows(tables: Mapping[str, Sequence[Storage]]) -> list[dict[str, str]]:
    """A line per model and format, from `storage_table`s."""
    return [
        {
            "weights": name,
            "form": r.format,
            "bytes (counted)": f"{r.bytes:,}",
            "bits per weight": f"{r.bits_per_weight:.2f}",
            "of dense float16": f"{r.of_float16:.2f}",
            "of dense int4-g32": f"{r.of_int4:.2f}",
        }
        for name, table in tables.items()
        for r in table
    ]


def break_even(a: str, b: str) -> float | None:
    """The share of zeros from which form `a` of `FORMULAS` takes less than `b`; None where it never does. Both are straight lines.

    >>> break_even("bitmap float16", "dense float16"), break_even("bitmap float16", "dense int4-g32")
    (0.0625, 0.78125)
    """
    for name in (a, b):
        if name not in FORMULAS:
            raise ValueError(f"form {name!r} is not known; use one of {', '.join(FORMULAS)}")
    at0, at1 = (FORMULAS[a](s) - FORMULAS[b](s) for s in (0.0, 1.0))
    if at1 >= 0:
        return None
    return 0.0 if at0 <= 0 else at0 / (at0 - at1)


def bytes_figure() -> go.Figure:
    """Bytes per weight against the share of zeros, form by form, and the points of break-even with dense int4."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Bytes per weight: what a zero is worth"}})
    fig.update_xaxes(title_text="zeros, %")
    fig.update_yaxes(title_text="bytes per weight", rangemode="tozero")
    for i, (name, f) in enumerate(FORMULAS.items()):
        fig.add_scatter(
            x=[0, 100],
            y=[f(0.0) / 8, f(1.0) / 8],
            mode="lines",
            name=name,
            line={"color": plots.OKABE_ITO[i], "dash": "dash" if name.startswith("dense") else "solid"},
            marker={"color": plots.OKABE_ITO[i]},
            hovertemplate="%{x} %: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    mark = {"color": plots.OKABE_ITO[5], "symbol": "diamond", "size": 11}
    fig.add_scatter(x=[50], y=[TWO_OF_FOUR_BITS / 8], mode="markers", name="2:4 float16", marker=mark)
    pairs = [(name, "dense int4-g32") for name in FORMULAS if not name.startswith("dense")]
    at = [(100 * s, FORMULAS[a](s) / 8) for a, b in pairs if (s := break_even(a, b)) is not None]
    ring = {"color": plots.INK, "symbol": "x", "size": 9}
    fig.add_scatter(x=[x for x, _ in at], y=[y for _, y in at], mode="markers", name="as small as dense int4", marker=ring)
    return fig.update_layout(height=430)


def break_even_rows() -> list[dict[str, str]]:
    """From which share of zeros each sparse form is smaller than each dense one."""
    sparse, dense = ([n for n in FORMULAS if n.startswith("dense") is d] for d in (False, True))
    lines = []
    for a in sparse:
        line = {"form": a}
        for b in dense:
            s = break_even(a, b)
            line[f"smaller than {b} from"] = "never" if s is None else f"{100 * s:.4g} % zeros"
        lines.append(line)
    return lines


def say_bytes() -> str:
    """The sentence beside `bytes_figure`."""
    half, quarter = (break_even("bitmap float16", f"dense {d}") for d in ("float16", "int4-g32"))
    csr, codes = (break_even(f"{f}", "dense int4-g32") for f in ("CSR float16", "bitmap int4-g32"))
    return (
        f"A bitmap of float16 values is smaller than dense float16 from {100 * half:.4g} % zeros, and smaller than dense int4-g32 only "
        f"from {100 * quarter:.4g} %; CSR needs {100 * csr:.4g} %, 2:4 of float16 takes {TWO_OF_FOUR_BITS / 8:.3f} bytes, twice those "
        f"of int4-g32, and a bitmap of int4 codes wins from {100 * codes:.0f} %."
    )


# --------------------------------------------------------------------------------------------------------------- times


class Time(NamedTuple):
    """`seconds`: the median of one call. `ratio`: the median over rounds of its time over the first's; `low`, `high`: quartiles."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def race(calls: Mapping[str, Callable[[], object]], rounds: int = 9, least: float = 1e-2) -> list[Time]:
    """`calls` timed turn about on one thread, `rounds` times; each turn repeats its call for `least` seconds or once, after one that is
    not timed. The first is what others are divided by, round by round."""
    if rounds < 3:
        raise ValueError(f"rounds={rounds} gives no quartiles; at least 3")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    set_threads(1)
    try:
        return _race(calls, rounds, least)
    finally:
        torch.set_num_threads(threads)
        set_threads(None)


def _race(calls: Mapping[str, Callable[[], object]], rounds: int, least: float) -> list[Time]:
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, and warms caches
        began = time.perf_counter()
        call()
        repeats[name] = max(1, min(1000, int(least / max(time.perf_counter() - began, 1e-7))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # its weight is in the cache again, as far as it fits
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - began) / repeats[name])
    first = np.array(next(iter(taken.values())))
    found = []
    for name, each in taken.items():
        low, middle, high = np.percentile(np.array(each) / first, (25, 50, 75))
        found.append(Time(name, float(np.median(each)), float(middle), float(low), float(high)))
    return found


def products(sparsity: float, size: int = 2048, rows: int = 1, seed: int = 0) -> dict[str, Callable[[], object]]:
    """{name: a product of x [rows, size] with a weight [size, size] of which `sparsity` is zero}, dense ones first; all give the same but
    int4, which rounds. At 50 % the zeros lie as 2:4."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(size, size, generator=g).half().float()
    if sparsity == 0.5:
        pruned = dense.masked_fill(~keep_n_of_m(dense.abs(), 2, 4), 0.0)
    else:
        pruned = dense.masked_fill(torch.rand(size, size, generator=g) < sparsity, 0.0)
    t = torch.randn(rows, size, generator=g)
    x, y = t.numpy(), np.empty((rows, size), np.float32)
    q = round_to_nearest(pruned, INT4)
    tiles = tile(q.packed, q.scales.view(np.int16), 4, 32, size)
    b, c = encode(pruned, "bitmap", kind="float16"), encode(pruned, "csr", kind="float16")
    made, listed = bits(b.mask, b.values.data, size), columns(c.ends, c.columns, c.values.data, size)

    def into(call: Callable) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            call()
            return y

        return run

    return {
        "torch float32, no zeros": lambda: (t @ dense.T).numpy(),
        "torch float32, zeros in place": lambda: (t @ pruned.T).numpy(),
        "int4-g32, dense": into(lambda: qmatmul(tiles, x, y, "float32")),
        "bitmap float16": into(lambda: bitmap_matmul(made, x, y)),
        "CSR float16": into(lambda: csr_matmul(listed, x, y)),
    }


def time_rows(times: Mapping[str, Sequence[Time]]) -> list[dict[str, str]]:
    """A line per contender; a column of ratios per heading in `times`."""
    names = [t.name for t in next(iter(times.values()))]
    lines = []
    for i, name in enumerate(names):
        cells = {f"{head}: time / first's [quartiles]": f"{t[i].ratio:.2f} [{t[i].low:.2f}, {t[i].high:.2f}]" for head, t in times.items()}
        lines.append({"product": name} | cells)
    return lines


def times_figure(times: Mapping[str, Sequence[Time]]) -> go.Figure:
    """The ratio of each contender's time to the first one's, by heading; above 1 is slower."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Time, as a multiple of the dense float32 product's"}})
    fig.update_yaxes(title_text="time / dense float32's", type="log")
    for i, name in enumerate([t.name for t in next(iter(times.values()))][1:]):
        mine = [next(t for t in each if t.name == name) for each in times.values()]
        fig.add_scatter(
            x=list(times),
            y=[t.ratio for t in mine],
            mode="lines+markers",
            name=name,
            line={"color": plots.OKABE_ITO[i]},
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i], "size": 9},
            hovertemplate="%{x}: %{y:.2f}<extra>%{fullData.name}</extra>",
        )
    return fig


def say_times(times: Mapping[str, Sequence[Time]]) -> str:
    """The sentence beside `times_figure`, of `products`: each form's time, and which sparse ones are faster than int4 without a zero."""
    parts = []
    for head, each in times.items():
        ratio = {t.name: t.ratio for t in each}
        told = ", ".join(f"{name} {x:.2f}" for name, x in list(ratio.items())[1:])
        faster = [n for n in ratio if n.endswith("float16") and ratio[n] < ratio["int4-g32, dense"]]
        parts.append(f"{head}: {told}; sparse forms that are faster than dense int4: {', '.join(faster) or 'none'}")
    return f"Time as a multiple of the dense float32 product's. {'. '.join(parts)}."


# ------------------------------------------------------------------------------------------------------- structure


def structure_rows(
    original: nn.Module, models: Mapping[str, nn.Module], found: Results, times: Sequence[Time] = ()
) -> list[dict[str, str]]:
    """A line per model: what is left by arithmetic, what it costs, and what time is left where it was measured."""
    full, taken, lines = figures(original)["all"], {t.name: t for t in times}, []
    for name, model in models.items():
        now = figures(model)["all"]
        line = {"model": name}
        line |= {f"{k.replace('_', '-')}, % left (counted)": f"{100 * now[k] / full[k]:.1f}" for k in ("parameters", "multiply_adds")}
        line["MB in 16 bits (counted)"] = f"{2 * now['parameters'] / 1e6:.2f}"
        if taken:
            t = taken.get(name)
            line["time, % of the original's [quartiles] (measured)"] = (
                "" if t is None else f"{100 * t.ratio:.0f} [{100 * t.low:.0f}, {100 * t.high:.0f}]"
            )
        if name in found.points:
            p = found.points[name]
            line["KLD, nats per token (measured)"] = f"{p.kld:.3g}"
            line["same top token, % (measured)"] = f"{100 * p.same_top:.1f}"
        lines.append(line)
    return lines


def structure_figure(original: nn.Module, models: Mapping[str, nn.Module], times: Sequence[Time]) -> go.Figure:
    """Multiply-adds that are left against the time that is left; on the diagonal arithmetic would tell the whole truth."""
    full, taken = figures(original)["all"]["multiply_adds"], {t.name: t for t in times}
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Arithmetic promises, the clock tells"}})
    fig.update_xaxes(title_text="multiply-adds left, % (counted)")
    fig.update_yaxes(title_text="time left, % (measured)")
    line = {"color": plots.INK, "dash": "dot"}
    fig.add_scatter(x=[40, 100], y=[40, 100], mode="lines", name="time = arithmetic", line=line, marker={"color": plots.INK})
    for i, (name, model) in enumerate((n, m) for n, m in models.items() if n in taken):
        fig.add_scatter(
            x=[100 * figures(model)["all"]["multiply_adds"] / full],
            y=[100 * taken[name].ratio],
            mode="markers",
            name=name,
            marker={"color": plots.OKABE_ITO[i % 6], "symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)], "size": 11},
            hovertemplate=f"{name}: %{{x:.0f}} % of the arithmetic, %{{y:.0f}} % of the time<extra></extra>",
        )
    return fig


def say_structure(original: nn.Module, models: Mapping[str, nn.Module], times: Sequence[Time]) -> str:
    """The sentence beside `structure_figure`."""
    full, taken = figures(original)["all"]["multiply_adds"], {t.name: t for t in times}
    parts = [
        f"{name}: {100 * figures(m)['all']['multiply_adds'] / full:.0f} % of the multiply-adds, {100 * taken[name].ratio:.0f} % of the time"
        for name, m in models.items()
        if name in taken
    ]
    return f"What is left: {'; '.join(parts)}."


def influence_figure(influence: Sequence[float]) -> go.Figure:
    """Block influence 1 - E cos(h_in, h_out), a bar per block."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Block influence: how far each block turns the hidden states"}})
    fig.add_bar(x=[f"block {i}" for i in range(len(influence))], y=list(influence), marker={"color": plots.OKABE_ITO[0]}, showlegend=False)
    fig.update_yaxes(title_text="1 - E cos(in, out)")
    return fig


def say_influence(influence: Sequence[float]) -> str:
    """The sentence beside `influence_figure`."""
    order = sorted(range(len(influence)), key=lambda i: influence[i])
    each = ", ".join(f"block {i} {x:.3f}" for i, x in enumerate(influence))
    return f"Influence: {each}. DropLayers(1) takes block {order[0]}, the least; block {order[-1]} turns them most."


class Skipped(NamedTuple):
    """Dynamic channel pruning at one share: what arithmetic saves, what it costs, and its time over the original's."""

    share: float
    saved: float
    kld: float
    same_top: float
    ratio: float

    @property
    def row(self) -> dict[str, str]:
        return {
            "channels skipped, %": f"{100 * self.share:.0f}",
            "multiply-adds saved, % (counted)": f"{100 * self.saved:.1f}",
            "bytes saved": "0",
            "time / the original's (measured)": f"{self.ratio:.2f}",
            "KLD, nats per token (measured)": f"{self.kld:.3g}",
            "same top token, % (measured)": f"{100 * self.same_top:.1f}",
        }


def skipped(models: Mapping[str, nn.Module], found: Results, times: Sequence[Time]) -> list[Skipped]:
    """A `Skipped` for each of `models`, to which `SkipChannels` was done; their KLD in `found` and their times in `times`."""
    taken, lines = {t.name: t.ratio for t in times}, []
    for name, model in models.items():
        share = next((m._edgelab_skip for m in model.modules() if hasattr(m, "_edgelab_skip")), None)
        if share is None:
            raise ValueError(f"{name!r} skips no channels; make it with Recipe((SkipChannels(share),))")
        total, left = saved(model, share)
        lines.append(Skipped(share, 1 - left / total, found.points[name].kld, found.points[name].same_top, taken[name]))
    return lines


def skip_figure(found: Sequence[Skipped]) -> go.Figure:
    """KLD against the share of channels skipped."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Dynamic channel pruning"}})
    fig.add_scatter(
        x=[100 * s.share for s in found],
        y=[s.kld for s in found],
        mode="lines+markers",
        marker={"color": plots.OKABE_ITO[0], "size": 9},
        line={"color": plots.OKABE_ITO[0]},
        showlegend=False,
        text=[f"{100 * s.saved:.0f} % of the multiply-adds saved" for s in found],
        hovertemplate="%{x} %: %{y:.4f} nats; %{text}<extra></extra>",
    )
    fig.update_xaxes(title_text="inner channels skipped for each token, %")
    return fig.update_yaxes(title_text="KL divergence, nats per token", type="log")


def say_skip(found: Sequence[Skipped]) -> str:
    """The sentence beside `skip_figure`."""
    parts = [
        f"{100 * s.share:.0f} % skipped: KLD {s.kld:.2g}, {100 * s.saved:.0f} % of the multiply-adds saved by arithmetic, "
        f"time x {s.ratio:.2f}"
        for s in found
    ]
    return f"{'; '.join(parts)}."


# ---------------------------------------------------------------------------------------------------- claims, thresholds


def below(model: nn.Module, threshold: float = 1e-3) -> tuple[float, float]:
    """(share of the blocks' weights with |w| < `threshold`, their mean |w|)."""
    chosen = [x.tensor.detach() for x in weights(model) if not x.tied_to and any(matches(p, x.name, x.role) for p in Prune.select)]
    count = sum(t.numel() for t in chosen)
    return sum(int((t.abs() < threshold).sum()) for t in chosen) / count, sum(float(t.abs().sum()) for t in chosen) / count


def most_by_channels(model: nn.Module) -> float:
    """How many times smaller `model` gets when *all* feed-forward channels are gone: no share of them does more.

    Experts count as feed-forwards; parameters alone, whatever they are stored as.
    """
    rows = figures(model)
    inner = sum(rows[role]["parameters"] for role in ("mlp", "experts", "shared") if role in rows)
    return rows["all"]["parameters"] / (rows["all"]["parameters"] - inner)


def claim_rows(
    model: nn.Module,
    smaller: Mapping[str, nn.Module],
    structured: Results,
    times: Sequence[Time],
    skipped: Sequence[Skipped],
    thresholds: Results,
) -> list[dict[str, str]]:
    """The claims of section 6 beside what was counted and measured here. The cut nearest to 40 % less compute answers the first."""
    full, taken = figures(model)["all"]["multiply_adds"], {t.name: t for t in times}
    less = {name: 1 - figures(m)["all"]["multiply_adds"] / full for name, m in smaller.items()}
    near = min(less, key=lambda name: abs(less[name] - 0.4))
    most = max(skipped, key=lambda s: s.share)
    before, trained, after = (thresholds.points[name] for name in ("threshold 0.001", "L1, no threshold", "L1, threshold 0.001"))
    heads = ("claim", "here", "verdict")
    lines = (
        (
            "40 % less compute by pruning",
            f"{near}: {100 * less[near]:.0f} % fewer multiply-adds (counted), {100 * (1 - taken[near].ratio):.0f} % less time (measured), "
            f"KLD {structured.points[near].kld:.2g}; zeros in place: 0 % less",
            "by smaller shapes, and at a price" if less[near] >= 0.35 else "not reached",
        ),
        (
            "4.29 times smaller by dynamic channel pruning",
            f"1.00 times: every weight stays. All channels gone for good: {most_by_channels(model):.2f} times at most (counted)",
            "no" if most_by_channels(model) < 4.29 else "not by skipping",
        ),
        (
            "3.2 times faster by the same",
            f"{1 / (1 - most.saved):.2f} times at most at {100 * most.share:.0f} % skipped (counted), KLD {most.kld:.2g}; "
            f"{1 / most.ratio:.2f} times with a dense product (measured)",
            "no" if 1 / (1 - most.saved) < 3.2 else "by arithmetic",
        ),
        (
            "L1, then all below 0.001 dropped",
            f"{100 * before.zeros:.1f} % of the weights without L1 (KLD {before.kld:.2g}), {100 * after.zeros:.1f} % with "
            f"(KLD {after.kld:.2g}, of which L1 itself {trained.kld:.2g})",
            "finds little" if after.zeros < 0.3 else "finds weights, at a price",
        ),
    )
    return [dict(zip(heads, line, strict=True)) for line in lines]


def study(name: str, folder=None) -> tuple[str, list[dict[str, str]]]:
    """(a sentence, rows) of a study that was measured at build; where it is missing the sentence says how to make it."""
    if name not in STUDIES:
        raise ValueError(f"no study is called {name!r}; there are {', '.join(STUDIES)}")
    try:
        report = read(name, folder).report
    except FileNotFoundError:
        return f"The long measurements `{name}` are not there yet; `python -m edgelab.studies {name}` makes them.", []
    klds = list(report.where(slice=MEAN, metric="kld"))
    rows = [
        {"model": r.model, "KLD, mean of four domains [95 %] (measured at build)": f"{r.value:.3g} [{r.low:.2g}, {r.high:.2g}]"}
        if r.low is not None
        else {"model": r.model, "KLD, mean of four domains [95 %] (measured at build)": f"{r.value:.3g}"}
        for r in klds
    ]
    return f"Measured at build, on {klds[0].n} documents and more calibration: {len(rows)} models, all against their own original.", rows


# --------------------------------------------------------------------------------------------------------------- control


class ZerosControl:
    """Method, pattern and share of zeros in; KL divergence and bytes out. Nothing is computed anew: every choice was measured before.

    The box takes any percentage and says which were measured. An n:m pattern has one share, and sets the box to it.
    `choose` does from code what they do by hand; what can't be shown is said in the control and kept in `error`.
    """

    def __init__(self, points: Mapping[str, Point], start: str = "sparsegpt 50%") -> None:
        self._points = {(p.method, p.pattern, round(100 * p.zeros)): p for p in points.values()}
        self._names = {name: key for name, key in zip(points, self._points, strict=True)}
        self.chosen: list[Point] = []
        self.error: Exception | None = None
        self._busy = False
        wide = {"description_width": "7em"}
        options = [list(dict.fromkeys(key[i] for key in self._points)) for i in (0, 1)]
        self.method = w.Dropdown(options=options[0], description="method", style=wide, layout={"width": "17em"})
        self.pattern = w.Dropdown(options=options[1], description="pattern", style=wide, layout={"width": "17em"})
        self.percent = w.BoundedIntText(50, min=0, max=100, description="zeros, %", style=wide, layout={"width": "13em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(zeros_figure(points))
        ring = {"color": "rgba(0,0,0,0)", "size": 20, "line": {"color": plots.OKABE_ITO[3], "width": 3}}
        self.figure.add_scatter(mode="markers", name="your choice", marker=ring, hoverinfo="skip")
        self.figure.update_layout(height=430, autosize=True, title_text="", margin={"t": 80})
        self.figure._config = self.figure._config | {"responsive": True}
        self.choose(start)
        if self.error is not None:
            raise self.error
        for widget in (self.method, self.pattern, self.percent):
            widget.observe(lambda _: self._changed(), "value")

    @property
    def point(self) -> Point:
        """The present choice; raises ValueError where nothing was measured."""
        key = (self.method.value, self.pattern.value, self.percent.value)
        if key not in self._points:
            there = ", ".join(f"{z} %" for m, p, z in sorted(self._points) if (m, p) == key[:2])
            raise ValueError(f"{key[0]}, {key[1]} at {key[2]} % zeros was not measured; use {there or 'another pattern'}")
        return self._points[key]

    def choose(self, name: str) -> Point | None:
        """Set the inputs to a model by its name, such as "wanda 50%" or "wanda 2:4", and return its point. ValueError for others."""
        if name not in self._names:
            raise ValueError(f"{name!r} was not measured; there are {', '.join(self._names)}")
        self._busy = True
        try:
            self.method.value, self.pattern.value, self.percent.value = self._names[name]
        finally:
            self._busy = False
        self._changed()
        return self.point if self.error is None else None

    def _changed(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            shares = [z for _, p, z in self._points if p == self.pattern.value]
            if self.pattern.value != "unstructured":
                self.percent.value = shares[0]
            point = self.point
            self.chosen = [p for p in self.chosen if p is not point] + [point]
            with self.figure.batch_update():
                self.figure.data[-1].x, self.figure.data[-1].y = [100 * point.zeros], [point.kld]
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
        return (
            f'<p aria-live="polite"><b>{escape(p.name)}</b>: {100 * p.zeros:.1f} % of the blocks\' weights are zero (counted); stored as '
            f"{p.form} the whole model takes {p.nbytes / 1e6:.2f} MB (counted); KL divergence {p.kld:.3g} nats per token, the same top "
            f"token at {100 * p.same_top:.1f} % of the positions (measured).</p>"
        )

    @property
    def html(self) -> str:
        """All choices so far as an HTML table, by size."""
        heads = ("model", "zeros, %", "MB (counted)", "as", "KLD (measured)", "same top token, % (measured)")
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in heads)
        lines = []
        for p in sorted(self.chosen, key=lambda p: p.nbytes):
            cells = (f"{100 * p.zeros:.1f}", f"{p.nbytes / 1e6:.2f}", p.form, f"{p.kld:.3g}", f"{100 * p.same_top:.1f}")
            lines.append(f'<tr><th scope="row">{escape(p.name)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
        return f"<table><caption>Choices so far</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, a sentence that says what would be."""
        inputs = w.HBox([self.method, self.pattern, self.percent], layout={"flex_flow": "row wrap"})
        return frame(inputs, self.sentence, self.figure, self.table)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        p = self.chosen[-1]
        return f"A control of method, pattern and zeros, which needs a running notebook; it stands at {p.name}: {p.kld:.3g} nats."


# -------------------------------------------------------------------------------------------------------------- exercises

EXERCISE_ROW, EXERCISE_NORMS = (0.8, -0.5, 0.3, 0.6), (0.5, 2.0, 3.0, 0.5)
_KEPT, _LOSS = [0, 1, 1, 0], 0.25  # scores .4 1 .9 .3; .4^2 + .3^2
_SHARE, _FEED_FORWARD = 0.75, 0.6


def check_wanda(mask, loss) -> Verdict:
    """Exercise 1: which two of `EXERCISE_ROW` Wanda keeps (1 or 0 each), and the squared output error that this adds."""
    if mask is None or loss is None:
        return unanswered("a list of four 0s and 1s, and a number")
    m, x = numbers(mask, 4), numbers(loss, 1)
    if m is None or x is None or set(m) - {0.0, 1.0}:
        return not_yet("the mask is four numbers, 1 where a weight stays and 0 where it goes; the loss is one number")
    if m == [1, 0, 0, 1]:
        return not_yet("that is magnitude. Wanda multiplies each weight with the norm of its input before it compares")
    if m == [1 - k for k in _KEPT]:
        return not_yet("the other way round. 1 marks a weight that stays, and the lowest scores go")
    if m != _KEPT:
        return not_yet("the scores are |w| |x|; two of the four stay, those with the highest")
    hints = {
        0.7: "these are the scores added up; errors of inputs that do not vary together add as squares",
        0.5: "that is the root; the squared error is asked for",
        1.81: "that is what magnitude's mask would lose, or what stays; add the squared scores of the two that go",
        1.0: "weights alone (0.64 + 0.36) do not tell; each counts with the norm of its input",
    }
    if abs(x[0] - _LOSS) <= 2e-3:
        return right("the scores are 0.4, 1, 0.9, 0.3, the first and the last go, and 0.16 + 0.09 = 0.25. Magnitude's mask loses 1.81")
    return hint(x[0], hints, "add up the squared scores of the two weights that go")


def check_break_even(sparsity) -> Verdict:
    """Exercise 2: the share of zeros from which a bitmap of float16 values is smaller than dense int4 in groups of 64."""
    if sparsity is None:
        return unanswered("a share between 0 and 1")
    x = numbers(sparsity, 1)
    if x is None:
        return not_yet("one number, please")
    wanted = 1 - (4.25 - 1) / 16
    if abs(x[0] - wanted) <= 1e-3:
        return right(f"1 + 16 (1 - s) = 4 + 16 / 64 gives s = {wanted:.4f}. At 50 % a bitmap takes 9 bits, twice as many")
    hints = {
        1 - wanted: "that is the share that stays; the share of zeros is asked for",
        100 * wanted: "as a share between 0 and 1, please, not in per cent",
        1 - 4.25 / 16: "the bitmap itself takes one bit per place, whether or not it holds a value",
        1 - 3 / 16: "int4-g64 takes more than 4 bits: a float16 scale for 64 weights",
        1 - 3.5 / 16: "that is the answer for groups of 32; with 64 weights to a scale int4 is smaller",
        0.75: "16 bits against 4 is too simple: count the bitmap and the scales",
    }
    return hint(x[0], hints, "set 1 + 16 (1 - s) equal to the bits per weight of int4-g64", 1e-3)


def check_skip(times) -> Verdict:
    """Exercise 3: how many times faster skipping 75 % of the channels can be, where the gated feed-forwards are 60 % of the time."""
    if times is None:
        return unanswered("a number: how many times faster, at best")
    x = numbers(times, 1)
    if x is None:
        return not_yet("one number, please")
    left = 1 - _FEED_FORWARD * _SHARE / 3
    if abs(x[0] - 1 / left) <= 5e-3:
        return right(f"0.6 * 0.75 / 3 = 0.15 of the time goes, so 1 / 0.85 = {1 / left:.3f} times. That is the best a kernel could do")
    hints = {
        1 - left: "that is the share of the time that is saved; how many times faster is the whole?",
        left: "that is the time which is left; turn it over",
        1 / (1 - _FEED_FORWARD * _SHARE): "only one of three products shrinks: gate and up are needed to know which channels to skip",
        1 / (1 - _SHARE / 3): "the other 40 % of the time stay as they are",
        1 / (1 - _SHARE): "that would be so if the whole model shrank with the channels",
        1 + (1 - left): "nearly: a time of 1 - 0.15 is left, and 1 / 0.85 is more than 1.15",
    }
    return hint(x[0], hints, "the share of the time that goes is 0.6 of a third of 0.75", 3e-3)


def check_two_of_four(answer) -> Verdict:
    """Exercise 4: a function of scores [out, in] that returns the 2:4 mask: of four neighbours of a row the two highest stay."""
    r = np.random.default_rng(6)
    cases = [
        Case("one row of four", (np.array([[0.4, 1.0, 0.9, 0.3]]),), "the two highest stay: 1 where a weight stays"),
        Case(
            "a row of two fours",
            (np.array([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]]),),
            "each four for itself, though all of the first are larger",
        ),
        Case("two rows", (np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]),), "neighbours along a row, not down a column"),
        Case(
            "scores that are all equal", (np.ones((2, 8)),), "exactly two of four stay, the later ones: the hardware has no room for three"
        ),
        Case("a row of zeros and one score", (np.array([[0.0, 5.0, 0.0, 0.0]]),), "exactly two of four, zeros or not"),
        Case("a matrix of 6 x 32", (r.standard_normal((6, 32)) ** 2,)),
    ]
    form = "a function of scores [out, in] that returns a mask of their shape, 1 where a weight stays and 0 where it goes"
    praise = "with |w| it is magnitude's mask, with |w| |x| Wanda's: the same as keep_n_of_m makes"

    def twin(scores: np.ndarray) -> np.ndarray:
        return keep_n_of_m(torch.tensor(scores), 2, 4).numpy()

    return check_function(answer, twin, cases, form, praise, parts=("mask",))
