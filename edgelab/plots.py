"""Figures: a `Report` (or a coverage audit) in, a plotly figure out, in one look of ours.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), told apart by colour-blind readers; models also
differ in their marker, so that no figure depends on colour alone. Backgrounds are transparent and the ink is mid-grey:
the same figure reads on a light and on a dark page.
"""

import json
import re

import plotly.graph_objects as go
import plotly.io as pio

from edgelab import words
from edgelab.report import Report
from edgelab.svg import to_svg as to_svg

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F")  # the last for black
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
INK, GRID = "#5f6b7a", "rgba(138,148,163,0.33)"

_axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": INK, "ticks": "outside", "tickcolor": GRID, "automargin": True}
TEMPLATE = go.layout.Template(
    layout={
        "colorway": OKABE_ITO,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": _axis,
        "yaxis": _axis,
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        "margin": {"l": 64, "r": 16, "t": 72, "b": 48},
        "height": 380,
        "hovermode": "closest",
    }
)
pio.templates["edgelab"] = TEMPLATE


def _figure(title: str, x: str, y: str, **layout) -> go.Figure:
    fig = go.Figure(
        layout={"template": TEMPLATE, "title": {"text": title}, "xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    )
    return fig.update_layout(**layout)


def _scale(name: str) -> float:
    """What a stored value is multiplied with on an axis: shares are drawn in per cent, bytes in MB."""
    return {"share": 100.0, "megabytes": 1e-6}.get(words.metric(name).style, 1.0)


def _bars(rows: list, scale: float) -> dict:
    """plotly's error_y of the rows' intervals (asymmetric), or nothing when no row has one."""
    if all(r.low is None for r in rows):
        return {}
    up = [None if r.high is None else max(0.0, (r.high - r.value) * scale) for r in rows]
    down = [None if r.low is None else max(0.0, (r.value - r.low) * scale) for r in rows]
    return {"error_y": {"type": "data", "array": up, "arrayminus": down, "thickness": 1.4, "width": 4}}


def size_against(report: Report, metric: str = "bits_per_byte") -> go.Figure:
    """Size against quality: a line per domain through the models, from the smallest to the largest.

    Needs rows of `weight_bytes` and of `metric`; raises LookupError when either is missing.
    """
    size = {r.model: r.value / 1e6 for r in report.where(metric="weight_bytes")}
    if not size or not report.where(metric=metric).rows:
        raise LookupError(f"the report has no rows of {'weight_bytes' if not size else metric!r}; measure it first")
    m = words.metric(metric)
    fig = _figure(f"Size against {m.title}", "weights, MB", m.axis, xaxis_rangemode="tozero")
    for i, on in enumerate(words.slices(report, metric)):
        rows = sorted((r for r in report.where(metric=metric, slice=on) if r.model in size), key=lambda r: size[r.model])
        fig.add_scatter(
            x=[size[r.model] for r in rows],
            y=[r.value * _scale(metric) for r in rows],
            mode="lines+markers",
            name=on or "all text",
            text=[f"{r.model}: {words.shown(r)}" for r in rows],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            marker={"color": OKABE_ITO[i % len(OKABE_ITO)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            **_bars(rows, _scale(metric)),
        )
    return fig


def by_domain(report: Report, metric: str, *, log: bool | None = None) -> go.Figure:
    """`metric` per domain, one series per model, with its 95 % intervals.

    KL divergences are drawn on a logarithmic axis (they span orders of magnitude) unless `log` says otherwise; a model
    whose values are all zero, as the baseline's divergence to itself, is then left out and the title says so.
    Raises LookupError when the report has no row of `metric`.
    """
    rows = report.where(metric=metric)
    if not rows.rows:
        raise LookupError(f"the report has no rows of {metric!r}; it has {', '.join(sorted({r.metric for r in report}))}")
    m = words.metric(metric)
    log = metric.startswith("kld") if log is None else log
    models = report.models()
    drawn = [n for n in rows.models() if not log or any(r.value > 0 for r in rows.where(model=n))]
    title = m.title[0].upper() + m.title[1:]
    if len(drawn) < len(rows.models()):
        title += f" ({', '.join(n for n in rows.models() if n not in drawn)} is 0, not on this log axis)"
    fig = _figure(title, "", m.axis, yaxis_type="log" if log else "linear", scattermode="group")
    for name in drawn:
        i, mine = models.index(name), list(rows.where(model=name))
        fig.add_scatter(
            x=[r.slice or "all text" for r in mine],
            y=[r.value * _scale(metric) for r in mine],
            mode="markers",
            name=name,
            text=[words.shown(r) for r in mine],
            hovertemplate="%{x}: %{text}<extra>%{fullData.name}</extra>",
            marker={"color": OKABE_ITO[i % len(OKABE_ITO)], "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 10},
            **_bars(mine, _scale(metric)),
        )
    if not log:  # plotly's own range for grouped markers starts at zero and hides the intervals
        ends = [v * _scale(metric) for r in rows if r.model in drawn for v in (r.value, r.low, r.high) if v is not None]
        pad = 0.08 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
        fig.update_yaxes(range=[min(ends) - pad, max(ends) + pad])
    return fig


def layer_bytes(coverage, *, title: str = "Bytes per layer") -> go.Figure:
    """Bytes per layer, stacked by the weights' role; a marker shows what the layer takes in bfloat16."""
    sizes: dict[str, dict[str, int]] = {}
    full: dict[str, float] = {}
    for row in coverage.rows:
        m = re.search(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)(?:\.|$)", row.name)
        where = f"layer {m[1]}" if m else row.role if row.role in ("embedding", "head") else "other"
        roles = sizes.setdefault(where, {})
        roles[row.role] = roles.get(row.role, 0) + row.predicted_bytes
        full[where] = full.get(where, 0.0) + 2 * row.parameters
    places = sorted(sizes, key=lambda w: (0, int(w.split()[1])) if w.startswith("layer ") else ({"embedding": -1}.get(w, 1), 0))
    fig = _figure(title, "", "MB", barmode="stack")
    for i, role in enumerate(dict.fromkeys(r.role for r in coverage.rows)):
        y = [sizes[p].get(role, 0) / 1e6 for p in places]
        if any(y):
            fig.add_bar(
                x=places,
                y=y,
                name=role or "other",
                marker={"color": OKABE_ITO[i % len(OKABE_ITO)]},
                hovertemplate="%{x}: %{y:.3f} MB<extra>%{fullData.name}</extra>",
            )
    fig.add_scatter(
        x=places,
        y=[full[p] / 1e6 for p in places],
        mode="markers",
        name="in bfloat16",
        marker={"color": INK, "symbol": "diamond", "size": 9},
    )
    return fig


def say_layer_bytes(coverage) -> str:
    """The sentence beside `layer_bytes`: which role takes the most, before and after."""
    after: dict[str, int] = {}
    before: dict[str, int] = {}
    for row in coverage.rows:
        after[row.role] = after.get(row.role, 0) + row.predicted_bytes
        before[row.role] = before.get(row.role, 0) + 2 * row.parameters
    role = max(before, key=before.__getitem__)
    total, left = sum(before.values()), sum(after.values())
    if not any(r.touched for r in coverage.rows):
        return f"The {role} weights take {after[role] / 1e6:.2f} MB, {100 * after[role] / left:.0f} % of {left / 1e6:.2f} MB."
    return (
        f"In bfloat16 the {role} weights take {before[role] / 1e6:.2f} MB, {100 * before[role] / total:.0f} % of the model; "
        f"stored as here they take {after[role] / 1e6:.2f} MB, {100 * after[role] / left:.0f} % of {left / 1e6:.2f} MB."
    )


def show(fig: go.Figure, sentence: str = "") -> None:
    """Display `fig` in a notebook as one output with three faces: interactive, SVG (code hosts, print) and the sentence."""
    from IPython.display import display

    faces = {
        "application/vnd.plotly.v1+json": json.loads(fig.to_json()),
        "image/svg+xml": to_svg(fig, describe=sentence),
        "text/plain": sentence or fig.layout.title.text,
    }
    display(faces, raw=True)


def show_rows(rows: list[dict[str, str]]) -> None:
    """Display `rows`, a dict per line, in a notebook as a table; nothing where there are none."""
    from IPython.display import Markdown, display

    if rows:
        display(Markdown(words.markdown(rows)))
