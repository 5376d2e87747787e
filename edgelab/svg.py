"""A plotly figure as a small standalone SVG: what a code host, a printer or a reader without JavaScript sees.

plotly's own static export drives a browser. This draws the few kinds of figure that `plots.py` makes, scatter (lines,
markers, error bars) and bars (grouped or stacked) on linear, logarithmic or category axes, in a few kilobytes of text.
A trace of another kind raises TypeError: a figure that is silently incomplete is worse than none.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 44, 58
_LINE = 16  # of the legend
_INK, _GRID = "#5f6b7a", "#8a94a355"  # mid-grey: legible on white and on black


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers between `low` and `high` (of log10 values when `log`, whole decades if there are some)."""
    if log:
        decades = list(range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
        if len(decades) >= 2:
            return [float(d) for d in decades[:: max(1, len(decades) // 6)]]
        return [low, (low + high) / 2, high]
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _power(t: float) -> str:
    """10^t with three digits, written out where that is short.

    >>> _power(4), _power(2.5), _power(-3), _power(9)
    ('10,000', '316', '0.001', '1e+09')
    """
    value = float(f"{10**t:.3g}")
    return f"{value:,.10g}" if 1e-4 <= value < 1e7 else f"{value:.3g}"


def _list(value: Any) -> list:
    return [] if value is None else list(value)


class _Axis:
    """Maps data to pixels: linear, log or category."""

    def __init__(self, values: Sequence, pixels: tuple[float, float], *, log: bool, zero: bool, fixed: Sequence | None) -> None:
        self.pixels, self.log = pixels, log
        values = [v for v in values if v is not None]
        self.categories = list(dict.fromkeys(values)) if any(isinstance(v, str) for v in values) else None
        if self.categories is not None:
            self.low, self.high = -0.5, len(self.categories) - 0.5
            self.ticks = [(float(i), str(c)) for i, c in enumerate(self.categories)]
            return
        numbers = [math.log10(v) if log else float(v) for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.0, 1.0]
        low, high = min(numbers), max(numbers)
        if zero and not log:
            low, high = min(low, 0.0), max(high, 0.0)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
        self.low, self.high = (low if zero and low == 0 else low - pad), high + pad
        if fixed:
            self.low, self.high = float(fixed[0]), float(fixed[1])
        self.ticks = [(t, _power(t) if log else f"{t:.6g}") for t in _ticks(self.low, self.high, log)]

    def number(self, v: Any) -> float | None:
        if self.categories is not None:
            return float(self.categories.index(v))
        if v is None or not math.isfinite(v) or (self.log and v <= 0):
            return None
        return math.log10(v) if self.log else float(v)

    def at(self, number: float) -> float:
        a, b = self.pixels
        return a + (number - self.low) / (self.high - self.low) * (b - a)


def _mark(x: float, y: float, colour: str, symbol: str) -> str:
    if symbol.startswith("square"):
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    if symbol.startswith(("diamond", "triangle", "cross", "x")):
        points = {"d": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)], "t": [(0, -5), (5, 4), (-5, 4)]}
        shape = points.get(
            symbol[0], [(-2, -5), (2, -5), (2, -2), (5, -2), (5, 2), (2, 2), (2, 5), (-2, 5), (-2, 2), (-5, 2), (-5, -2), (-2, -2)]
        )
        return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shape)}" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{colour}"/>'


def _legend(names: Sequence[str]) -> list[tuple[float, float]]:
    """Where each name's swatch begins and its text stands: from the left, on as many lines as it takes."""
    places, x, line = [], float(_LEFT), 0
    for name in names:
        wide = 40 + 6.4 * len(name)
        if x + wide - 16 > _WIDTH and x > _LEFT:
            x, line = float(_LEFT), line + 1
        places.append((x, line))
        x += wide
    return [(x, 36.0 + _LINE * line) for x, line in places]


def _swatch(x: float, y: float, trace: Any, colour: str, symbol: str) -> str:
    """What stands for `trace` in the legend: its mark, its line, or both."""
    mode = (trace.mode or "lines+markers") if trace.type == "scatter" else "markers"
    line = f'<path d="M{x - 9:.1f},{y:.1f}h18" stroke="{colour}" stroke-width="1.8"{_dash(trace)}/>' if "lines" in mode else ""
    return line + (_mark(x, y, colour, symbol) if "markers" in mode else "")


def _dash(trace: Any) -> str:
    dash = getattr(trace.line, "dash", None)
    return "" if dash in (None, "solid") else ' stroke-dasharray="6 4"' if "dash" in dash else ' stroke-dasharray="2 3"'


def _label(text: str, x: float, y: float, place: str, colour: str) -> str:
    """`text` beside a point, where plotly's textposition puts it; moved so far that it does not leave the page."""
    wide = 5.2 * len(text)
    left = x - wide - 6 if "left" in place else x + 6 if "right" in place else x - wide / 2
    left = min(max(left, _LEFT), _WIDTH - 4 - wide)
    y += -6 if "top" in place else 13 if "bottom" in place else 3.5
    return f'<text x="{left:.1f}" y="{y:.1f}" font-size="10" fill="{colour}" textLength="{wide:.0f}">{escape(text)}</text>'


def to_svg(fig, *, describe: str = "") -> str:
    """`fig` (a plotly figure of scatter and bar traces) as SVG text; `describe` becomes its accessible description.

    Raises TypeError for a trace of another kind, ValueError for a figure with more than one pair of axes.
    """
    layout = fig.layout
    default = _list(layout.template.layout.colorway) or ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"]
    traces = [t for t in fig.data if t.visible not in (False, "legendonly")]
    for t in traces:
        if t.type not in ("scatter", "bar"):
            raise TypeError(f"a {t.type!r} trace cannot be drawn as SVG here: only scatter and bar")
        if t.type == "bar" and t.orientation == "h":
            raise TypeError("horizontal bars cannot be drawn as SVG here: use vertical ones")
        if getattr(t, "xaxis", None) not in (None, "x") or getattr(t, "yaxis", None) not in (None, "y"):
            raise ValueError("a figure with more than one pair of axes cannot be drawn as SVG here: draw its parts one by one")
    bars = [t for t in traces if t.type == "bar"]
    stacked = layout.barmode in ("stack", "relative")

    xs = [v for t in traces for v in _list(t.x)]
    ys: list[float] = []
    base: dict[Any, float] = {}
    for t in traces:
        up = _list(t.error_y.array) if t.error_y is not None else []
        down = (_list(t.error_y.arrayminus) if t.error_y is not None else []) or up
        for i, (x, y) in enumerate(zip(_list(t.x), _list(t.y), strict=True)):
            if y is None:
                continue
            if t.type == "bar" and stacked:
                base[x] = base.get(x, 0.0) + y
                ys.append(base[x])
            else:
                ys += [y, y + (up[i] or 0 if i < len(up) else 0), y - (down[i] or 0 if i < len(down) else 0)]
    named = [t for t in traces if t.showlegend is not False and t.name]
    legend = {id(t): place for t, place in zip(named, _legend([t.name for t in named]), strict=True)}
    head = _TOP + max((y for _, y in legend.values()), default=36.0) - 36
    x_log, y_log = layout.xaxis.type == "log", layout.yaxis.type == "log"
    x_axis = _Axis(xs, (_LEFT, _WIDTH - _RIGHT), log=x_log, zero=layout.xaxis.rangemode == "tozero", fixed=layout.xaxis.range)
    y_zero = bool(bars) or layout.yaxis.rangemode == "tozero"
    y_axis = _Axis(ys, (_HEIGHT - _BOTTOM, head), log=y_log, zero=y_zero, fixed=layout.yaxis.range)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        'font-family="system-ui, sans-serif">'
    ]
    title = layout.title.text or ""
    out.append(f"<title>{escape(title)}</title>" + (f"<desc>{escape(describe)}</desc>" if describe else ""))
    out.append(f'<g font-size="11" fill="{_INK}">')
    for t, label in y_axis.ticks:
        y = y_axis.at(t)
        out.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for t, label in x_axis.ticks:
        x = x_axis.at(t)
        out.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>')
    out.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}" stroke="{_INK}"/>')
    middle = (head + _HEIGHT - _BOTTOM) / 2
    for text, place in (
        (layout.xaxis.title.text, f'x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - _BOTTOM + 34}"'),
        (layout.yaxis.title.text, f'x="14" y="{middle}" transform="rotate(-90 14 {middle})"'),
    ):
        if text:
            out.append(f'<text {place} text-anchor="middle" font-size="12">{escape(text)}</text>')
    out.append(f'<text x="{_LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text></g>')

    base = {}
    grouped = layout.scattermode == "group" and x_axis.categories is not None and not bars
    bar_width = 0.8 / (1 if stacked else max(1, len(bars)))
    for k, t in enumerate(traces):
        colour = (t.marker.color if isinstance(t.marker.color, str) else None) or default[k % len(default)]
        symbol = getattr(t.marker, "symbol", None) or "circle"
        up = _list(t.error_y.array) if t.error_y is not None else []
        down = (_list(t.error_y.arrayminus) if t.error_y is not None else []) or up
        line, drawn = [], []
        for i, (xv, yv) in enumerate(zip(_list(t.x), _list(t.y), strict=True)):
            x, y = x_axis.number(xv), y_axis.number(yv)
            if x is None or y is None:
                continue
            low, high = y, y
            if up and up[i] is not None:
                ends = [y_axis.number(yv - down[i]), y_axis.number(yv + up[i])]
                low, high = (y_axis.low if ends[0] is None else ends[0]), ends[1]
            if t.type == "bar":
                start = base.get(xv, 0.0) if stacked else 0.0
                base[xv] = start + y
                place = x if stacked else x + (bars.index(t) - (len(bars) - 1) / 2) * bar_width
                left, right = x_axis.at(place - bar_width / 2), x_axis.at(place + bar_width / 2)
                bottom = y_axis.pixels[0] if y_log else y_axis.at(start)
                top = y_axis.at(start + y) if stacked else y_axis.at(y)
                said = escape(f"{t.name or 'value'} {xv}: {yv:.4g}")
                drawn.append(
                    f'<rect x="{left:.1f}" y="{min(top, bottom):.1f}" width="{right - left:.1f}" '
                    f'height="{abs(bottom - top):.1f}" fill="{colour}">'
                    f"<title>{said}</title></rect>"
                )
                px = (left + right) / 2
            else:
                shift = (k - (len(traces) - 1) / 2) * 0.8 / len(traces) if grouped else 0.0
                px = x_axis.at(x + shift)
                line.append(f"{px:.1f},{y_axis.at(y):.1f}")
                if "markers" in (t.mode or "lines+markers"):
                    drawn.append(_mark(px, y_axis.at(y), colour, str(symbol)))
                if "text" in (t.mode or "") and not isinstance(t.text, str) and t.text is not None:
                    drawn.append(_label(str(t.text[i]), px, y_axis.at(y), str(t.textposition or "middle center"), _INK))
            if high > low:
                a, b = y_axis.at(low), y_axis.at(high)
                whisker = f"M{px - 4:.1f},{a:.1f}h8M{px - 4:.1f},{b:.1f}h8M{px:.1f},{a:.1f}V{b:.1f}"
                drawn.append(f'<path d="{whisker}" stroke="{colour if t.type == "scatter" else _INK}" stroke-width="1.4" fill="none"/>')
        if t.type == "scatter" and "lines" in (t.mode or "lines+markers") and len(line) > 1:
            out.append(f'<polyline points="{" ".join(line)}" stroke="{colour}" stroke-width="1.8" fill="none"{_dash(t)}/>')
        out += drawn
        if id(t) in legend:
            x, y = legend[id(t)]
            out.append(_swatch(x + 9, y - 4, t, colour, str(symbol)))
            out.append(f'<text x="{x + 22:.0f}" y="{y:.0f}" font-size="11" fill="{_INK}">{escape(t.name)}</text>')
    return "\n".join([*out, "</svg>"])
