"""The explorer's figure: quality against size, quality against latency, and the chosen row's bytes and errors, layer by layer.

Made once, then only fed: `Picture.update` hands plotly the arrays that changed and nothing else, in one message. The 3,000 points are
drawn by WebGL, a trace per colour and axis for what lies within the budgets (its own symbol too, so that nothing depends on colour alone),
and one faint trace for the rest. A row has a place in both and is NaN in one: a budget moves rows from trace to trace, and colour, symbol
and opacity stay one value per trace. Arrays of colours would be parsed point by point at every redraw, which took longer than drawing.
What changes its shape lies in few small traces: the front, the budgets, the marks of what is chosen, pinned or measured here, the layers.

Shares are drawn in per cent, bytes in MB of 10^6. A KL divergence of 0, the original's to itself, has no place on a logarithmic axis: it
is drawn at the axis' lower edge, and the sentence beside the figure says its value.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from edgelab import plots
from edgelab.device import devices
from edgelab.frame import PLOT
from edgelab.sweep_table import Metric, Sweep
from edgelab.tradeoff import State, View

COLOURED_BY = ("method", "bits", "experts", "sparsity", "top_k", "group", "channels", "model")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
FAINT = 0.16
SLOTS = len(plots.OKABE_ITO)  # colours, and traces of points within the budgets
# what a weight is for, told by its name; the first that matches
ROLES = (
    ("embedding, head", r"embed_tokens|lm_head|wte|wpe"),
    ("shared experts", r"shared_expert"),
    ("experts", r"\bexperts\b"),
    ("router", r"mlp\.gate(\.weight)?$|router"),
    ("attention", r"attn"),
    ("mlp", r"mlp"),
    ("norms, other", r""),
)
ROLE_COLOURS = {role: plots.OKABE_ITO[i] for i, (role, _) in enumerate(ROLES)}
ROLE_SYMBOLS = {role: SYMBOLS[i % len(SYMBOLS)] for i, (role, _) in enumerate(ROLES)}
MARKS = {"best": ("star", plots.OKABE_ITO[3]), "chosen": ("circle-open", plots.OKABE_ITO[3]), "A": ("square-open", plots.OKABE_ITO[0]),
         "B": ("diamond-open", plots.OKABE_ITO[4]), "measured here": ("x", plots.INK)}  # fmt: skip


def role_of(name: str) -> str:
    """What a weight is for, of `ROLES`.

    >>> role_of("model.layers.1.mlp.experts.down_proj"), role_of("model.layers.1.mlp.gate.weight"), role_of("model.layers.0.mlp.gate_proj")
    ('experts', 'router', 'mlp')
    """
    return next(role for role, pattern in ROLES if re.search(pattern, name))


def place_of(name: str) -> str:
    """The layer of a weight: "layer 3", or "around" for what is in none.

    >>> place_of("model.layers.3.mlp.up_proj"), place_of("lm_head")
    ('layer 3', 'around')
    """
    m = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    return f"layer {m[1]}" if m else "around"


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers between 10^low and 10^high: more of them where the axis spans less.

    >>> log_ticks(0.0, 1.0), log_ticks(-0.7, -0.3)
    ((1.0, 2.0, 3.0, 5.0, 7.0, 10.0), (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5))
    """
    span = high - low
    digits = (1, 2, 5) if span > 1.4 else (1, 2, 3, 5, 7) if span > 0.6 else (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
    found = (float(f"{d * 10.0**power:.3g}") for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for d in digits)
    return tuple(v for v in found if 10**low * (1 - 1e-9) <= v <= 10**high * (1 + 1e-9))


@dataclass(frozen=True, eq=False)
class Layers:
    """A row's weights by layer and role: `megabytes` {role: {place: MB}}, `errors` {role: [(place, error, name)]}, places in order."""

    places: tuple[str, ...]
    megabytes: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Sequence[tuple[str, float, str]]]


def layers_of(sweep: Sweep, row: int) -> Layers:
    """The layers of a row. Errors that are not known (the shapes differ) are left out."""
    held, megabytes, errors = sweep.layer(row), {}, {}
    for name, size, error in zip(held["name"], held["bytes"], held["error"], strict=True):
        role, place = role_of(name), place_of(name)
        by_place = megabytes.setdefault(role, {})
        by_place[place] = by_place.get(place, 0.0) + size / 1e6
        if np.isfinite(error):
            errors.setdefault(role, []).append((place, float(error), name))
    found = {p for by_place in megabytes.values() for p in by_place}
    places = sorted(found, key=lambda p: (p == "around", int(p.split()[1]) if p != "around" else 0))
    return Layers(tuple(places), megabytes, errors)


@dataclass(frozen=True, eq=False)
class Colours:
    """Which of at most eight colours a row has: `index` float64 [rows], `names` of the colours used."""

    column: str
    index: np.ndarray
    names: tuple[str, ...]


def colours(sweep: Sweep, column: str) -> Colours:
    """The colours of the rows by `column`; values beyond the seventh share the last. Raises ValueError for another column."""
    if column not in COLOURED_BY:
        raise ValueError(f"colour by {column!r} is not offered; use one of {', '.join(COLOURED_BY)}")
    values = sweep.values(column)
    most = SLOTS
    place = {v: min(i, most - 1) for i, v in enumerate(values)}
    names = [said(column, v) for v in values[:most]]
    if len(values) > most:
        names[-1] = "other"
    return Colours(column, np.array([place[v] for v in sweep[column]], np.float64), tuple(names))


def said(column: str, value) -> str:
    """A value of a filter column in words.

    >>> said("group", 0.0), said("bits", 4.0), said("sparsity", 0.5), said("pattern", ""), said("experts", 0.0)
    ('row', '4', '50 %', 'none', 'dense')
    """
    if column in ("sparsity", "channels"):
        return f"{100 * value:.3g} %"
    if column == "group":
        return {0: "row", -1: "none"}.get(value, f"{value:g}")
    if column in ("experts", "top_k") and value == 0:
        return "dense"
    return (value or "none") if isinstance(value, str) else f"{value:g}"


@dataclass(frozen=True)
class Mark:
    """A point that is singled out, of `MARKS`: where it is on each axis, with ends of its intervals (None: not known)."""

    kind: str
    size_mb: float | None
    latency_ms: float | None
    quality: float
    low: float | None = None
    high: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None
    text: str = ""


def belongs(mark: Mark, axis: str, device: str) -> bool:
    """Whether a mark has a place on an axis: a time measured here has none among another device's times.

    >>> here = Mark("measured here", size_mb=2.0, latency_ms=0.4, quality=0.9)
    >>> belongs(here, "size", "galaxy-s22"), belongs(here, "latency", "galaxy-s22")
    (True, False)
    """
    return axis == "size" or mark.kind != "measured here" or devices()[device].kind == "host"


def scale(metric: Metric) -> float:
    """What a metric's values are multiplied with on its axis."""
    return 100.0 if metric.kind == "exact" else 1.0


def stairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The front as a staircase: from each point to the right until a better one comes.

    >>> stairs(np.array([2.0, 1.0]), np.array([5.0, 3.0]))
    (array([1., 2., 2.]), array([3., 3., 5.]))
    """
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    return np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]


class Fed(go.FigureWidget):
    """A FigureWidget that does not report back.

    After every update plotly's view compares each trace with its full form, sends what differs to the kernel (3,000 points: 0.7 MB), and
    gets it back as an echo: so that Python could read the defaults that plotly filled in. Nothing here reads them, and it all happens
    before the picture reaches the screen. The view still says that the update is done. Where plotly's script no longer has this place,
    it runs as it is: slower, not wrong.
    """

    _esm = re.sub(
        r"(\b_sendTraceDeltas\((\w+)\)\{)",
        r'\1this.model.set("_js2py_traceDeltas",{trace_deltas:[],trace_edit_id:\2});this.touch();return;',
        str(go.FigureWidget._esm),
        count=1,
    )


class Picture:
    """The figure and what it last showed. `figure`: a FigureWidget (or a Figure for tests).

    `points[axis]`: its traces of points, one per colour and at last the one of what is outside of the budgets; `rows_of[k]`: the row of the
    sweep behind each point of trace k.
    """

    AXES = ("size", "latency")

    def __init__(self, sweep: Sweep, figure_class=Fed) -> None:
        self.sweep = sweep
        self.models = tuple(sweep.values("model"))
        every = np.arange(len(sweep))
        self.rows_of: list[np.ndarray] = [every[:0]] * SLOTS + [every]
        self.inside = np.zeros(len(sweep), bool)
        self._coloured = ""
        self.figure = figure_class(self._empty())
        if issubclass(figure_class, go.FigureWidget):
            # one pixel per pixel: plotly's default of two by two is four times the work, which without a GPU falls to the processor
            self.figure._config = self.figure._config | PLOT | {"plotGlPixelRatio": 1}
        by_name = {t.name: t for t in self.figure.data}
        self.points = {axis: [by_name[f"{axis} {k}"] for k in range(SLOTS + 1)] for axis in self.AXES}
        self.fronts, self.limits, self.marks = ({a: by_name[f"{what} {a}"] for a in self.AXES} for what in ("front", "limit", "marks"))
        self.bars, self.errors = by_name["bytes"], by_name["errors"]
        self._sent: dict[tuple, object] = {}

    def _empty(self) -> go.Figure:
        fig = make_subplots(2, 2, row_heights=[0.66, 0.34], horizontal_spacing=0.09, vertical_spacing=0.13)
        label = self.sweep["label"]
        for col, axis in enumerate(self.AXES, 1):
            about = {"size": "%{x:.3f} MB, counted", "latency": "%{x:.4g} ms per token, modelled"}[axis]
            for k in range(SLOTS + 1):
                out = k == SLOTS
                style = {
                    "size": 5 if out else 7,
                    "symbol": "circle" if out else SYMBOLS[k % len(SYMBOLS)],
                    "opacity": FAINT if out else 0.85,
                }
                trace = go.Scattergl(
                    name=f"{axis} {k}", mode="markers", marker=style | {"color": plots.INK if out else plots.OKABE_ITO[k]}, visible=out,
                    hovertemplate="%{text}<br>" + about + "<br>quality %{y:.4g}, measured at build<extra></extra>",
                    unselected={"marker": {"opacity": FAINT}}, text=label if out else None,
                )  # fmt: skip
                fig.add_trace(trace, row=1, col=col)
            fig.add_scatter(name=f"limit {axis}", mode="lines", line={"color": plots.INK, "dash": "dot", "width": 1.5}, hoverinfo="skip",
                            row=1, col=col)  # fmt: skip
            fig.add_scatter(name=f"front {axis}", mode="lines", line={"color": plots.INK, "width": 2}, hoverinfo="skip", row=1, col=col)
            fig.add_scatter(name=f"marks {axis}", mode="markers+text", textposition="top center", cliponaxis=False, row=1, col=col,
                            textfont={"size": 13}, marker={"size": 15, "line": {"width": 2.5}},
                            hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
        told = "%{text}<extra></extra>"
        fig.add_bar(name="bytes", hovertemplate=told, textposition="none", row=2, col=1)
        fig.add_scatter(name="errors", mode="markers", marker_size=8, hovertemplate=told, row=2, col=2)
        fig.update_layout(
            template=plots.TEMPLATE, height=680, autosize=True, showlegend=False, barmode="overlay",
            margin={"t": 16, "r": 12, "b": 48, "l": 68}, dragmode="zoom", hovermode="closest", uirevision="kept",
        )  # fmt: skip
        # margins that fit themselves, titles as annotations, a trace per role: each costs every redraw tens of milliseconds
        fig.update_xaxes(automargin=False, title_standoff=6, title_font_size=13)
        fig.update_yaxes(automargin=False, title_standoff=6, title_font_size=13, nticks=6)
        size = np.log10(self.sweep["size_bytes"] / 1e6)
        pad = 0.04 * (np.ptp(size) or 1.0)
        ends = [size.min() - pad, size.max() + pad]
        ticks = {"tickvals": log_ticks(*ends), "tickformat": "~g"}
        fig.update_xaxes(title_text="size, MB (counted)", type="log", range=ends, **ticks, row=1, col=1)
        fig.update_xaxes(type="log", tickformat="~g", row=1, col=2)
        fig.update_xaxes(type="category", title_text="bytes of the chosen one, by layer", row=2, col=1)
        fig.update_xaxes(type="category", title_text="errors of the chosen one, by layer", row=2, col=2)
        fig.update_yaxes(title_text="MB (counted)", rangemode="tozero", row=2, col=1)
        fig.update_yaxes(title_text="relative error", rangemode="tozero", row=2, col=2)
        return fig

    # ------------------------------------------------------------------------------------------------------- feeding

    def _put(self, target, name: str, value) -> None:
        """Sets `target[name]` if that is not what was sent last."""
        key = (id(target), name)
        last = self._sent.get(key)
        if isinstance(value, np.ndarray):
            same = isinstance(last, np.ndarray) and np.array_equal(last, value, equal_nan=value.dtype.kind == "f")
        else:
            same = key in self._sent and last == value
        if same:
            return
        self._sent[key] = value
        target[name] = value

    def update(self, view: View, coloured: Colours, marks: Sequence[Mark], chosen: int | None, brushed: np.ndarray | None = None) -> None:
        """Show `view`: points, front, budgets, marks, and the layers of row `chosen`."""
        m, y = view.quality.metric, view.quality.value * scale(view.quality.metric)
        log = m.kind == "kld"
        if log:
            positive = y[view.rows & (y > 0)]
            floor = float(positive.min()) / 2 if len(positive) else 1e-6
            y = np.maximum(y, floor)
        shown = np.where(view.rows, y, np.nan)
        xs = {"size": self.sweep["size_bytes"] / 1e6, "latency": view.latency.value}
        fronts = {"size": view.front_size, "latency": view.front_latency}
        s, layout = view.state, self.figure.layout
        self.inside, recoloured = view.inside, coloured.column != self._coloured
        if recoloured:
            self._coloured = coloured.column
            self.rows_of[:SLOTS] = [np.flatnonzero(coloured.index == k) for k in range(SLOTS)]
        with self.figure.batch_update():
            for axis in self.AXES:
                x = xs[axis]
                for k, trace in enumerate(self.points[axis]):
                    of = self.rows_of[k]
                    if recoloured and k < SLOTS:
                        self._put(trace, "visible", bool(len(of)))
                        self._put(trace, "text", self.sweep["label"][of])
                    self._put(trace, "x", x[of].astype(np.float32))
                    self._put(trace, "y", np.where(self.drawn(k), shown[of], np.nan).astype(np.float32))
                    self._put(trace, "selectedpoints", None if brushed is None else tuple(np.flatnonzero(brushed[of]).tolist()))
                on = fronts[axis]
                line = stairs(x[on], y[on])
                self._put(self.fronts[axis], "x", line[0])
                self._put(self.fronts[axis], "y", line[1])
            self._budgets(self._axes(layout, view, shown, log), s, m)
            for axis in self.AXES:
                self._mark(axis, [k for k in marks if belongs(k, axis, s.device)], log, floor if log else 0.0, scale(m))
            if chosen is not None:
                self._layers(chosen)

    def drawn(self, k: int) -> np.ndarray:
        """Which points of trace k are its own to draw: those within the budgets, or for the last trace those outside. bool [points]"""
        return self.inside[self.rows_of[k]] == (k < SLOTS)

    def _axes(self, layout, view: View, shown: np.ndarray, log: bool) -> dict[str, tuple[float, float]]:
        """Sets types, titles and ranges; what the axes span, in data: {"quality", "size", "latency"}."""
        m = view.quality.metric
        known = shown[np.isfinite(shown)]
        ends = (float(known.min()), float(known.max())) if len(known) else (0.1, 1.0)
        if log:
            ends = (np.log10(ends[0]), np.log10(ends[1]))
        pad = 0.06 * (ends[1] - ends[0]) or 0.5
        ends = (float(ends[0] - pad), float(ends[1] + pad))
        for name in ("yaxis", "yaxis2"):
            self._put(layout[name], "type", "log" if log else "linear")
            self._put(layout[name], "range", ends)
        self._put(layout.yaxis.title, "text", f"{m.axis}<br>(measured at build)")
        times = view.latency.value[view.rows & np.isfinite(view.latency.value)]
        low, high = (np.log10(times.min()), np.log10(times.max())) if len(times) else (-1.0, 1.0)
        pad = 0.04 * (high - low) or 0.1
        late = (float(low - pad), float(high + pad))
        self._put(layout.xaxis2, "range", late)
        self._put(layout.xaxis2, "tickvals", log_ticks(*late))
        self._put(layout.xaxis2.title, "text", f"ms/token, {devices()[view.state.device].title} (modelled)")
        spans = {"quality": tuple(10**e for e in ends) if log else ends, "latency": tuple(10**e for e in late)}
        return spans | {"size": tuple(10**e for e in layout.xaxis.range)}

    def _budgets(self, spans: Mapping[str, tuple[float, float]], s: State, m: Metric) -> None:
        """Dotted lines at the budgets: one trace per axis, its pieces apart by a gap."""
        for axis, limit in (("size", None if s.size_limit is None else s.size_limit / 1e6), ("latency", s.latency_limit)):
            x: list = []
            y: list = []
            if limit is not None:
                x, y = [limit, limit, None], [*spans["quality"], None]
            if s.quality_limit is not None:
                x, y = [*x, *spans[axis]], [*y, *[s.quality_limit * scale(m)] * 2]
            self._put(self.limits[axis], "x", tuple(x))
            self._put(self.limits[axis], "y", tuple(y))

    def _mark(self, axis: str, marks: Sequence[Mark], log: bool, floor: float, factor: float) -> None:
        trace = self.marks[axis]
        where = [(k, k.size_mb if axis == "size" else k.latency_ms) for k in marks]
        where = [(k, x) for k, x in where if x is not None and np.isfinite(x) and np.isfinite(k.quality)]
        y = [max(k.quality * factor, floor) if log else k.quality * factor for k, _ in where]

        def bars(values: list, ends: list) -> dict:
            down, up = zip(*((v - a, b - v) if a is not None else (0.0, 0.0) for v, (a, b) in zip(values, ends, strict=True)), strict=True)
            return {"type": "data", "symmetric": False, "array": [max(u, 0.0) for u in up], "arrayminus": [max(d, 0.0) for d in down],
                    "thickness": 1.3, "width": 4, "color": plots.INK}  # fmt: skip

        def scaled(k: Mark) -> tuple:
            return (None, None) if k.low is None or k.high is None else (max(k.low * factor, floor), k.high * factor)

        self._put(trace, "x", tuple(x for _, x in where))
        self._put(trace, "y", tuple(y))
        self._put(trace, "text", tuple("" if k.kind == "chosen" else k.kind for k, _ in where))
        self._put(trace, "customdata", tuple(k.text for k, _ in where))
        self._put(trace.marker, "symbol", tuple(MARKS[k.kind][0] for k, _ in where))
        self._put(trace.marker, "color", tuple(MARKS[k.kind][1] for k, _ in where))
        self._put(trace.textfont, "color", tuple(MARKS[k.kind][1] for k, _ in where))
        if where:
            self._put(trace, "error_y", bars(y, [scaled(k) for k, _ in where]))
            if axis == "latency":
                known = [(k.latency_low, k.latency_high) if k.latency_low is not None else (None, None) for k, _ in where]
                self._put(trace, "error_x", bars([x for _, x in where], known))

    def _layers(self, row: int) -> None:
        """Bars, stacked by hand so that one trace holds all of them, and a marker per weight."""
        held = layers_of(self.sweep, row)
        below = dict.fromkeys(held.places, 0.0)
        bars, errors = [], []
        for role, by_place in held.megabytes.items():
            for place, size in by_place.items():
                bars.append((place, size, below[place], ROLE_COLOURS[role], f"{place}, {role}: {size:.4f} MB"))
                below[place] += size
            for place, error, name in held.errors.get(role, ()):
                errors.append((place, error, ROLE_COLOURS[role], ROLE_SYMBOLS[role], f"{name}: {error:.4f}"))
        x, y, base, colour, text = zip(*bars, strict=True) if bars else ((),) * 5
        for name, value in (("x", x), ("y", y), ("base", base), ("text", text)):
            self._put(self.bars, name, value)
        self._put(self.bars.marker, "color", colour)
        x, y, colour, symbol, text = zip(*errors, strict=True) if errors else ((),) * 5
        for name, value in (("x", x), ("y", y), ("text", text)):
            self._put(self.errors, name, value)
        self._put(self.errors.marker, "color", colour)
        self._put(self.errors.marker, "symbol", symbol)
        for name in ("xaxis3", "xaxis4"):
            self._put(self.figure.layout[name], "categoryarray", held.places)
            self._put(self.figure.layout[name], "range", (-0.5, len(held.places) - 0.5))

    def mode(self, brush: bool) -> None:
        """Brush: dragging selects, hovering is off (with it on, selections get lost). Inspect: hovering tells, dragging zooms."""
        with self.figure.batch_update():
            self.figure.layout.dragmode = "select" if brush else "zoom"
            self.figure.layout.hovermode = False if brush else "closest"

    # -------------------------------------------------------------------------------------------------------- static

    def static(self, view: View, marks: Sequence[Mark], most: int = 400) -> list[go.Figure]:
        """The two upper plots as plain figures: front, marks, and at most `most` other points, every n-th in the order of size."""
        m = view.quality.metric
        y = view.quality.value * scale(m)
        log, figures = m.kind == "kld", []
        for axis, x, front, about in (
            ("size", self.sweep["size_bytes"] / 1e6, view.front_size, "MB, counted"),
            ("latency", view.latency.value, view.front_latency, f"ms per token on {devices()[view.state.device].title}, modelled"),
        ):
            known = view.rows & np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))
            axes = {
                "xaxis": {"title": {"text": about}, "type": "log"},
                "yaxis": {"title": {"text": m.axis}, "type": "log" if log else "linear"},
            }
            fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": f"Quality against {axis}"}, **axes})
            rows = np.flatnonzero(known)
            rows = rows[np.argsort(x[rows], kind="stable")][:: max(1, -(-len(rows) // most))]
            for i, model in enumerate(self.models):
                mine = rows[self.sweep["model"][rows] == model]
                if len(mine):
                    style = {"color": plots.OKABE_ITO[i], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 4, "opacity": 0.45}
                    fig.add_scatter(x=x[mine].round(4), y=y[mine].round(4), mode="markers", name=model, marker=style)
            line = stairs(x[front & known], y[front & known])
            fig.add_scatter(x=line[0], y=line[1], mode="lines", name="front", line={"color": plots.INK, "width": 2})
            for mark in marks:
                where = mark.size_mb if axis == "size" else mark.latency_ms
                if not belongs(mark, axis, view.state.device):
                    continue
                if where is not None and np.isfinite(where) and mark.kind != "chosen" and (mark.quality > 0 or not log):
                    symbol, colour = MARKS[mark.kind]
                    style = {"color": colour, "symbol": symbol.removesuffix("-open"), "size": 12}
                    fig.add_scatter(x=[where], y=[mark.quality * scale(m)], mode="markers", name=mark.kind, marker=style)
            figures.append(fig)
        return figures
