"""Controls for the notebooks. Each recomputes what it shows: nothing is looked up, nothing interpolated.

A control has named inputs (dropdowns and number boxes, which a screen reader finds), one figure, and a sentence and a
table beside it. What goes wrong is shown in the control and kept in `error`.
"""

import math
from collections.abc import Callable
from html import escape

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from edgelab import matmul_lab as lab
from edgelab import plots, words
from edgelab.frame import frame
from edgelab.methods.rtn import round_to_nearest
from edgelab.recipe import Recipe
from edgelab.report import Report
from edgelab.scheme import BITS, PerChannel, PerGroup, PerTensor, QuantScheme

GRANULARITIES = ("group", "row", "matrix")


class BitsControl:
    """Bits and granularity in, KL divergence and size out, measured for each choice and kept.

    `measure` returns the report of one scheme (see `measurer`); its rows of `kld` and `weight_bytes` are drawn. The
    figure shows every choice made so far, the present one larger. `choose` does from code what the inputs do by hand.
    """

    def __init__(self, measure: Callable[[QuantScheme], Report], start: str = "int4-g32") -> None:
        self._measure = measure
        self.reports: dict[QuantScheme, Report] = {}
        self.error: Exception | None = None
        self._busy = False
        wide = {"description_width": "7.5em"}
        self.bits = w.Dropdown(options=BITS, description="bits", style=wide, layout={"width": "16em"})
        self.granularity = w.Dropdown(options=GRANULARITIES, description="one scale per", style=wide, layout={"width": "18em"})
        self.group_size = w.BoundedIntText(min=8, max=256, step=8, description="group size", style=wide, layout={"width": "14em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(layout={"template": plots.TEMPLATE, "height": 360})
        self.figure.update_layout(title_text="Size against KL divergence, every choice measured so far", yaxis_type="log")
        self.figure.update_xaxes(title_text="weights, MB", rangemode="tozero")
        self.figure.update_yaxes(title_text=words.metric("kld").axis)
        self.choose(start)  # before the observers: an error in the first choice is the caller's, raised at once
        if self.error is not None:
            raise self.error
        for widget in (self.bits, self.granularity, self.group_size):
            widget.observe(lambda _: self._changed(), "value")

    @property
    def scheme(self) -> QuantScheme:
        """The scheme that the inputs stand for. Raises ValueError where there is none."""
        kinds = {"group": lambda: PerGroup(self.group_size.value), "row": PerChannel, "matrix": PerTensor}
        return QuantScheme(self.bits.value, kinds[self.granularity.value]())

    def choose(self, scheme: QuantScheme | str) -> Report | None:
        """Set the inputs to `scheme` and return its report, None when it cannot be measured (then `error` says why)."""
        scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
        self._busy = True
        try:
            self.bits.value = scheme.bits
            match scheme.granularity:
                case PerGroup(size):
                    self.granularity.value, self.group_size.value = "group", size
                case PerChannel():
                    self.granularity.value = "row"
                case PerTensor():
                    self.granularity.value = "matrix"
            if not self.group_size.value or self.group_size.value < 8:
                self.group_size.value = 32
        finally:
            self._busy = False
        self._changed()
        return self.reports.get(scheme) if self.error is None else None

    def _changed(self) -> None:
        if self._busy:
            return
        self.group_size.disabled = self.granularity.value != "group"
        try:
            scheme = self.scheme
            if scheme not in self.reports:
                self.sentence.value = f"<p>Compressing to {scheme} and measuring ...</p>"
                self.reports[scheme] = self._measure(scheme)
            self._draw(scheme)
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'

    def _draw(self, scheme: QuantScheme) -> None:
        report = self.combined
        name = str(scheme)
        size = {r.model: r.value / 1e6 for r in report.where(metric="weight_bytes")}
        with self.figure.batch_update():
            for i, on in enumerate(words.slices(report, "kld")):
                rows = sorted((r for r in report.where(metric="kld", slice=on) if r.value > 0), key=lambda r: size[r.model])
                series = {
                    "x": [size[r.model] for r in rows],
                    "y": [r.value for r in rows],
                    "text": [f"{r.model}: {words.shown(r)}" for r in rows],
                    "marker": {
                        "size": [15 if r.model == name else 8 for r in rows],
                        "color": plots.OKABE_ITO[i % len(plots.OKABE_ITO)],
                        "symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)],
                    },
                }
                if i < len(self.figure.data):
                    self.figure.data[i].update(series)
                else:
                    self.figure.add_scatter(
                        **series, mode="markers", name=on or "all text", hovertemplate="%{text}<extra>%{fullData.name}</extra>"
                    )
        self.sentence.value = f'<p aria-live="polite"><b>{name}</b>{escape(self.told.removeprefix(name))}</p>'
        self.table.value = self.html

    @property
    def told(self) -> str:
        """The present choice in a sentence. Raises KeyError for one that was not measured."""
        report, name = self.reports[self.scheme], str(self.scheme)
        klds = ", ".join(f"{words.shown(r)} nats per token on {r.slice}" for r in report.where(model=name, metric="kld") if r.slice)
        return f"{name}: {words.shown(report.get(model=name, metric='weight_bytes'))}; KL divergence {klds}."

    @property
    def combined(self) -> Report:
        """The rows of all choices made so far; the baseline's, which each report holds, once."""
        rows = {(r.model, r.metric, r.slice): r for report in self.reports.values() for r in report}
        return Report(tuple(rows.values()))

    @property
    def html(self) -> str:
        """The measurements so far as an HTML table, a line per choice."""
        report = self.combined
        domains = words.slices(report, "kld")
        head = "".join(
            f'<th scope="col">{escape(c)}</th>' for c in ("scheme", "size", "bits per weight", *(f"KLD on {d}" for d in domains))
        )
        lines = []
        for scheme in self.reports:
            name = str(scheme)
            cells = [r for m in ("weight_bytes", "bits_per_weight") for r in report.where(model=name, metric=m)]
            cells += [r for d in domains for r in report.where(model=name, metric="kld", slice=d)]
            lines.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{words.shown(r)}</td>" for r in cells) + "</tr>")
        return f"<table><caption>Measured so far</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def static(self) -> go.Figure:
        """The present figure as a plain one, for `plots.show` (a widget is empty on a code host)."""
        fig = go.Figure(self.figure.to_dict())
        for trace in fig.data:
            trace.marker.size = 9
        return fig.update_layout(template=plots.TEMPLATE)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, the sentence."""
        inputs = w.HBox([self.bits, self.granularity, self.group_size], layout={"flex_flow": "row wrap"})
        box = frame(inputs, self.sentence, self.figure, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A control of bits and granularity, which needs a running notebook. {'' if self.error else self.told}"


def measurer(model, tokenizer, data, *, max_docs, seed: int = 0, baseline: str = "fp") -> Callable[[QuantScheme], Report]:
    """A function that compresses `model` to a scheme and measures it on a slice of `data` against `model` itself."""
    from edgelab.compress import compress
    from edgelab.evaluate import evaluate

    def measure(scheme: QuantScheme) -> Report:
        compressed = compress(model, Recipe.uniform(scheme), progress=False)
        models = {baseline: model, str(scheme): compressed.model}
        settings = {"max_docs": max_docs, "seed": seed, "bootstrap": 500, "speed": False, "progress": False}
        return evaluate(models, tokenizer, data, sizes={str(scheme): compressed.coverage.predicted_bytes}, **settings)

    return measure


class MatmulControl:
    """Bits, granularity, rows and activations in; error, bytes and time of a quantized product out, measured for each choice.

    `weight` [out, in] is rounded to nearest, and its product with `x` float32 [tokens, in] compared with the one in floating
    point. Time is taken with the codes `repeat` times beside themselves, at the size of a larger model's weight, coming from
    memory (`matmul_lab.Rotation`), under the roof `roof`. `choose` does from code what the inputs do by hand.
    """

    MOST_ROWS = 512
    WORDS = ("weights' errors, computed", "bytes, counted", "speed, measured, under the measured roof")

    def __init__(
        self,
        weight: Tensor,
        x: np.ndarray,
        roof: lab.Roofline,
        *,
        repeat: int = 8,
        start: str = "int4-g32",
        rotation: lab.Rotation | None = None,
        seconds: float = 0.15,
    ) -> None:
        self._weight, self._x, self._roof, self._repeat, self._seconds = weight, x, roof, repeat, seconds
        self._rows_of_x = np.tile(np.resize(x, (self.MOST_ROWS, x.shape[1])), (1, repeat))
        self._rotation = rotation or lab.Rotation()
        self._rounded: dict[QuantScheme, tuple] = {}
        self.points: dict[tuple[QuantScheme, int, str], lab.Point] = {}
        self.error: Exception | None = None
        self._busy = False
        wide = {"description_width": "7em"}
        sizes = [n for n in (16, 32, 64, 128, 256) if weight.shape[1] % n == 0]
        kinds = [*((f"group of {n}", PerGroup(n)) for n in sizes), ("row", PerChannel()), ("matrix", PerTensor())]
        self.bits = w.Dropdown(options=BITS, description="bits", style=wide, layout={"width": "13em"})
        self.granularity = w.Dropdown(options=kinds, description="one scale per", style=wide, layout={"width": "18em"})
        self.activations = w.Dropdown(options=("int8", "float32"), description="activations", style=wide, layout={"width": "15em"})
        self.rows = w.BoundedIntText(1, min=1, max=self.MOST_ROWS, description="rows (tokens)", style=wide, layout={"width": "13em"})
        most = round(math.log2(self.MOST_ROWS))
        self.slider = w.IntSlider(0, min=0, max=most, readout=False, continuous_update=False, layout={"width": "12em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._empty())
        self.choose(start)  # before the observers: an error in the first choice is the caller's, raised at once
        if self.error is not None:
            raise self.error
        self.slider.observe(self._slid, "value")
        for widget in (self.bits, self.granularity, self.activations, self.rows):
            widget.observe(lambda _: self._changed(), "value")

    @property
    def scheme(self) -> QuantScheme:
        """The scheme that the inputs stand for."""
        return QuantScheme(self.bits.value, self.granularity.value)

    @property
    def point(self) -> lab.Point:
        """What was measured for the present choice."""
        return self.points[self.scheme, self.rows.value, self.activations.value]

    def choose(self, scheme: QuantScheme | str, rows: int | None = None, activations: str | None = None) -> lab.Point | None:
        """Set the inputs and return what was measured, None when that was not possible (then `error` says why).

        Raises ValueError for what the inputs do not offer, and leaves them as they were.
        """
        scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
        offered = [kind for _, kind in self.granularity.options]
        if scheme not in [QuantScheme(bits, kind) for bits in BITS for kind in offered]:
            names = ", ".join(str(kind) for kind in offered)
            raise ValueError(
                f"{scheme} is not offered for rows of {self._weight.shape[1]}; use int2, int3, int4 or int8 with one of {names}"
            )
        if rows is not None and not (isinstance(rows, int | np.integer) and 1 <= rows <= self.MOST_ROWS):
            raise ValueError(f"rows={rows!r}; use a whole number from 1 to {self.MOST_ROWS}")
        if activations is not None and activations not in self.activations.options:
            raise ValueError(f"activations={activations!r}; use {' or '.join(map(repr, self.activations.options))}")
        self._busy = True
        try:
            self.bits.value, self.granularity.value = scheme.bits, scheme.granularity
            self.rows.value = self.rows.value if rows is None else rows
            self.activations.value = self.activations.value if activations is None else activations
        finally:
            self._busy = False
        self._changed()
        return self.point if self.error is None else None

    def _slid(self, change) -> None:
        """The slider goes by powers of two, the box beside it says any number: they follow one another."""
        if change.new != self._near():
            self.rows.value = 2**change.new

    def _near(self) -> int:
        return round(math.log2(self.rows.value))

    def _changed(self) -> None:
        if self._busy:
            return
        self.slider.value = self._near()
        try:
            self._measure()
            self._draw()
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'

    def _measure(self) -> None:
        scheme, rows, activations = self.scheme, self.rows.value, self.activations.value
        if scheme not in self._rounded:
            q = round_to_nearest(self._weight, scheme)
            errors = lab.weight_error(self._weight, q), lab.output_error(self._weight, q, self._x)
            self._rounded[scheme] = (lab.repeated(q, self._repeat), *errors, lab.error_outline(self._weight, q))
        if (scheme, rows, activations) not in self.points:
            wide = self._rounded[scheme][0]
            (point,), self._roof = lab.sweep(wide, self._rows_of_x, [rows], self._roof, self._rotation, [activations], self._seconds)
            self.points[scheme, rows, activations] = point
            self.points = {key: p.under(self._roof) for key, p in self.points.items()}

    # ------------------------------------------------------------------------------------------------------- figure
    def _empty(self) -> go.Figure:
        titles = [t[0].upper() + t[1:] for t in self.WORDS]
        fig = make_subplots(
            2,
            2,
            specs=[[{}, {}], [{"colspan": 2}, None]],
            subplot_titles=titles,
            column_widths=[0.68, 0.32],
            row_heights=[0.42, 0.58],
            vertical_spacing=0.2,
            horizontal_spacing=0.14,
        )
        blue, orange, grey = plots.OKABE_ITO[0], plots.OKABE_ITO[1], plots.INK
        fig.add_scatter(mode="lines", name="the choice before", line={"color": grey, "width": 1}, marker_color=grey, row=1, col=1)
        fig.add_scatter(mode="lines", name="error", line_color=blue, marker_color=blue, fill="tozeroy", showlegend=False, row=1, col=1)
        fig.add_bar(name="codes", marker_color=blue, row=1, col=2)
        fig.add_bar(name="scales", marker_color=orange, row=1, col=2)
        for activations, i in lab.LOOK.items():
            line = {"color": plots.OKABE_ITO[i], "dash": "solid" if activations == "int8" else "dash"}
            fig.add_scatter(
                mode="lines", name=f"roof, {activations}", line=line, marker_color=line["color"], showlegend=False, row=2, col=1
            )
        for activations, i in lab.LOOK.items():
            marker = {"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i], "line": {"color": "white", "width": 1}}
            fig.add_scatter(mode="markers", name=f"{activations}, measured", marker=marker, row=2, col=1)
        fig.update_traces(hovertemplate="%{text}<extra></extra>", selector={"mode": "markers"})
        fig.update_layout(template=plots.TEMPLATE, height=660, autosize=True, barmode="stack", legend={"y": 1.08}, margin={"t": 100})
        fig.update_xaxes(title_text="error, % of the weight's root mean square", row=1, col=1)
        fig.update_yaxes(title_text="% of weights, per % of error", row=1, col=1)
        fig.update_yaxes(title_text="MB", row=1, col=2)
        fig.update_xaxes(title_text="operations per byte of weights (counted)", type="log", row=2, col=1)
        fig.update_yaxes(title_text="10<sup>9</sup> operations per second", type="log", row=2, col=1)
        return fig

    def _draw(self) -> None:
        wide, *_, (x, y) = self._rounded[self.scheme]
        before, now, codes, scales, *roofs, int8, float32 = self.figure.data
        dense = 2 * math.prod(wide.shape)
        with self.figure.batch_update():
            if self.scheme != getattr(self, "_drawn", None):
                before.x, before.y = now.x, now.y
                now.x, now.y = x, y
                self.figure.update_xaxes(range=[x[0], x[-1]], row=1, col=1)  # the choice before may lie outside
                self.figure.update_yaxes(range=[0, 1.1 * max(y)], row=1, col=1)
                self._drawn = self.scheme
            codes.x = scales.x = ["bfloat16", str(self.scheme)]
            codes.y, scales.y = [dense / 1e6, wide.packed.nbytes / 1e6], [0, wide.scales.nbytes / 1e6]
            ends = 16 / max(BITS), 16 * self.MOST_ROWS / min(BITS)  # operations per byte: two for each weight and row
            for trace, activations in zip(roofs, ("int8", "float32"), strict=True):
                knee = self._roof.peak(activations) / self._roof.read
                trace.x = x_of_roof = sorted({*ends, min(max(knee, ends[0]), ends[1])})
                trace.y = [min(self._roof.read * i, self._roof.peak(activations)) / 1e9 for i in x_of_roof]
            for trace, activations in ((int8, "int8"), (float32, "float32")):
                mine = [p for p in self.points.values() if p.activations == activations]
                trace.x = [p.operations / p.nbytes for p in mine]
                trace.y = [p.operations / p.timing.median / 1e9 for p in mine]
                trace.text = [f"{p.name}, rows: {p.tokens}<br>{p.timing}<br>{p.share:.2f} of the limit ({p.bound})" for p in mine]
                trace.marker.size = [16 if p is self.point else 9 for p in mine]
        self.sentence.value, self.table.value = self.told, self.html

    @property
    def told(self) -> str:
        """The present choice in a sentence, as HTML."""
        p, (wide, error, output, _) = self.point, self._rounded[self.scheme]
        lost = output.int8_activations if p.activations == "int8" else output.float_activations
        return (
            f'<p aria-live="polite"><b>{p.name}, {p.tokens} row{"s" * (p.tokens > 1)} of {p.activations} activations</b>: '
            f"{p.nbytes / 1e6:.2f} MB for {wide.shape[0]:,} x {wide.shape[1]:,} weights (counted); "
            f"the weights are off by {lab.percent(error.rms)} % of their root mean square, "
            f"the outputs by {lab.percent(lost)} % of theirs (computed); "
            f"{p.timing} per call (measured, {p.timing.calls} calls), {p.share:.2f} of what {p.bound} allows: {lab.duration(p.limit)} "
            f"(computed from the measured ceilings).</p>"
        )

    @property
    def html(self) -> str:
        """All choices so far as an HTML table, a line each."""
        columns = ("scheme", "rows", "activations", "MB (counted)", "weights off by, % (computed)", "outputs off by, % (computed)")
        columns += ("time per call, median [quartiles] (measured)", "limit (computed)", "share of the limit")
        lines = []
        for (scheme, rows, activations), p in self.points.items():
            _, error, output, _ = self._rounded[scheme]
            lost = output.int8_activations if activations == "int8" else output.float_activations
            cells = (rows, activations, f"{p.nbytes / 1e6:.2f}", lab.percent(error.rms), lab.percent(lost), p.timing)
            cells += (f"{lab.duration(p.limit)}, {p.bound}", f"{p.share:.2f}")
            lines.append(f'<tr><th scope="row">{scheme}</th>' + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>")
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
        return f"<table><caption>Choices so far</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

    def static(self) -> list[go.Figure]:
        """The present figure's parts as plain ones, for `plots.show` (a widget is empty on a code host)."""
        drawn = self.figure
        parts = []
        for title, axis, traces in zip(self.WORDS, ("", "2", "3"), (drawn.data[1:2], drawn.data[2:4], drawn.data[4:]), strict=True):
            axes = {
                name: {
                    "title": {"text": a.title.text.replace("<sup>9</sup>", "⁹") if a.title.text else ""},
                    "type": a.type,
                    "range": a.range,
                }
                for name in ("xaxis", "yaxis")
                for a in (drawn.layout[name + axis],)
            }
            title = title[0].upper() + title[1:]
            if axis != "3":
                title += f", {self.scheme}"
            fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": title}, "barmode": "stack", **axes})
            for trace in traces:
                if trace.x is not None and len(trace.x):
                    trace = trace.to_plotly_json() | {"xaxis": "x", "yaxis": "y"}
                    trace["showlegend"] = True  # on its own, a part has no room to explain its lines elsewhere
                    if trace.get("mode") == "markers":
                        trace["marker"] = trace["marker"] | {"size": 9}
                        # what the pointer would say stands beside the point: left of the slope and right of it the page is empty
                        side = "top left" if trace["name"].startswith("int8") else "bottom right"
                        trace |= {"mode": "markers+text", "textposition": side, "cliponaxis": False, "textfont": {"size": 10}}
                        trace |= {"customdata": trace["text"], "hovertemplate": "%{customdata}<extra></extra>"}
                        trace["text"] = [f"{p.name}, {p.tokens} row{'s' * (p.tokens > 1)}" for p in self._of(trace["name"])]
                    fig.add_trace(trace)
            if axis == "3":  # room for the labels on the left
                ends = [math.log10(v) for v in (fig.data[0].x[0], fig.data[0].x[-1])]
                fig.update_xaxes(range=[ends[0] - 0.6, ends[1] + 0.1])
            parts.append(fig)
        return parts

    def _of(self, trace: str) -> list[lab.Point]:
        """The points that the trace of that name shows."""
        return [p for p in self.points.values() if trace.startswith(p.activations)]

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the figure and the table; where no widget can be shown, a sentence that says what would be."""
        rows = w.HBox([self.rows, self.slider])  # on one line, however narrow the page
        inputs = w.HBox([self.bits, self.granularity, self.activations, rows], layout={"flex_flow": "row wrap"})
        box = frame(inputs, self.sentence, self.figure, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        p = self.point
        return (
            "A control of bits, granularity, activations and rows, which needs a running notebook; it stands at "
            f"{p.name}, {p.tokens} row{'s' * (p.tokens > 1)} of {p.activations} activations: {p.timing} per call."
        )
