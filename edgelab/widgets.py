"""Controls for the notebooks. Each recomputes what it shows: nothing is looked up, nothing interpolated.

A control has named inputs (dropdowns and number boxes, which a screen reader finds), one figure, and a sentence and a
table beside it. What goes wrong is shown in the control and kept in `error`.
"""

from collections.abc import Callable
from html import escape

import ipywidgets as w
import plotly.graph_objects as go

from edgelab import plots, words
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
        self.sentence = w.HTML()
        self.table = w.HTML()
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
        klds = [r for r in report.where(model=name, metric="kld") if r.slice]
        told = ", ".join(f"{words.shown(r)} nats per token on {r.slice}" for r in klds)
        size_row = report.get(model=name, metric="weight_bytes")
        self.sentence.value = f'<p aria-live="polite"><b>{name}</b>: {words.shown(size_row)}; KL divergence {escape(told)}.</p>'
        self.table.value = self.html

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

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(
            w.VBox(
                [
                    w.HBox([self.bits, self.granularity, self.group_size], layout={"flex_flow": "row wrap"}),
                    self.sentence,
                    self.figure,
                    self.table,
                ]
            )
        )


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
