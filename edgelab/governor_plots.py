"""Figures of the governor and its simulated phone, each with a sentence and a table computed from the same numbers.

Everything drawn here is modelled (`edgelab.simulate`), and every sentence and table says so.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from edgelab.plots import OKABE_ITO, SYMBOLS, TEMPLATE
from edgelab.simulate import Gain, Point, Trace

_DRAWN = 240  # points of a line: a screen shows no more, and a notebook stays small


def _figure(title: str, x: str, y: str, **layout) -> go.Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return go.Figure(layout={"template": TEMPLATE, "title": {"text": title}, **axes}).update_layout(**layout)


def _time(seconds: float) -> str:
    """A time of day since the start, in hours and minutes.

    >>> _time(5400), _time(59)
    ('1:30', '0:00')
    """
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}"


# ------------------------------------------------------------------------------------------------------------ over time


def over_time(trace: Trace) -> go.Figure:
    """Battery in per cent and temperatures in °C over hours, on one axis of 0 to 100; below them the levels as bands."""
    fig = _figure("Battery and temperature (modelled)", "hours", "battery, %  |  temperature, °C")
    at = np.unique(np.linspace(0, len(trace.time_s) - 1, _DRAWN).round().astype(int))
    hours = (trace.time_s[at] / 3600).tolist()
    lines = (("battery, %", 100 * trace.battery, "solid"), ("case, °C", trace.case_c, "dash"), ("chip, °C", trace.chip_c, "dot"))
    for i, (name, values, dash) in enumerate(lines):
        line = {"color": OKABE_ITO[i], "dash": dash, "width": 2}
        fig.add_scatter(x=hours, y=values[at].round(2).tolist(), mode="lines", name=name, line=line)
    for i, level in enumerate(dict.fromkeys(b[2] for b in trace.bands())):
        x, y = [], []
        for start, end, name in trace.bands():
            if name == level:
                x += [start / 3600, end / 3600, None]
                y += [-4.0 - 4 * i, -4.0 - 4 * i, None]
        line = {"color": OKABE_ITO[(3 + i) % len(OKABE_ITO)], "width": 6}
        fig.add_scatter(x=x[:-1], y=y[:-1], mode="lines", name=level, line=line)
    return fig


def say_over_time(trace: Trace) -> str:
    """The sentence beside `over_time`."""
    hours, left = _time(trace.time_s[-1]), f"{100 * trace.battery[-1]:.0f} %"
    text = f"Modelled: the battery is empty after {hours} h" if trace.empty else f"Modelled: after {hours} h {left} of the battery are left"
    text += f", {trace.percent_per_10_min:.2f} % in 10 minutes on average; "
    text += f"the case reaches {trace.case_c.max():.0f} °C, the chip {trace.chip_c.max():.0f} °C. "
    shares = {}
    for start, end, level in trace.bands():
        shares[level] = shares.get(level, 0.0) + (end - start) / trace.time_s[-1]
    return text + "Levels: " + ", ".join(f"{level} {100 * share:.0f} % of the time" for level, share in shares.items()) + "."


def table_over_time(trace: Trace) -> list[dict[str, str]]:
    """A row per band of `over_time`: from, to, level, setting, mean power and latency. All modelled."""
    rows = []
    for start, end, level in trace.bands():
        steps = (trace.time_s > start) & (trace.time_s <= end)
        lengths = np.diff(trace.time_s, prepend=0.0)[steps]
        answered = trace.latency_s[(trace.finished_s > start) & (trace.finished_s <= end)]
        settings = dict.fromkeys(str(trace.settings[i]) for i in trace.which[steps])
        rows.append(
            {
                "from, h": _time(start),
                "to, h": _time(end),
                "level": level,
                "setting": "; ".join(settings),
                "mean power, W (modelled)": f"{(trace.power_w[steps] * lengths).sum() / lengths.sum():.2f}",
                "latency, s, median (modelled)": f"{np.median(answered):.2f}" if len(answered) else "",
            }
        )
    return rows


# ------------------------------------------------------------------------------------------- endurance against static power


def endurance(gains: Mapping[str, Sequence[Gain]], claim: float | None = None) -> go.Figure:
    """Endurance gained (per cent) against static power, a line with its interval per frugal setting; `claim` as a level line."""
    fig = _figure("Endurance gained below 20 % battery (modelled)", "static power: screen and the rest of the phone, W", "hours gained, %")
    for i, (name, rows) in enumerate(gains.items()):
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        fig.add_scatter(
            x=[g.static_w for g in rows],
            y=[g.hours for g in rows],
            mode="lines+markers",
            name=name,
            text=[_interval(g, 1) for g in rows],
            hovertemplate="%{x} W: %{text}<extra>%{fullData.name}</extra>",
            marker={"color": colour, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9},
            error_y={
                "type": "data",
                "array": [g.high[1] - g.hours for g in rows],
                "arrayminus": [g.hours - g.low[1] for g in rows],
                "thickness": 1.4,
                "width": 4,
            },
        )
    if claim is not None:
        ends = [min(g.static_w for rows in gains.values() for g in rows), max(g.static_w for rows in gains.values() for g in rows)]
        line = {"color": OKABE_ITO[-1], "dash": "dash"}
        fig.add_scatter(x=ends, y=[claim, claim], mode="lines", name=f"claimed: {claim:+g} %", line=line)
    return fig


def _interval(g: Gain, which: int) -> str:
    value = (g.latency, g.hours, g.tokens)[which]
    return f"{value:+.0f} %" + (f" [{g.low[which]:+.0f}, {g.high[which]:+.0f}]" if g.n > 1 else "")


def say_endurance(gains: Mapping[str, Sequence[Gain]], claim: float | None = None) -> str:
    """The sentence beside `endurance`: for each setting what it gains at the least and the most static power, and where the claim lies."""
    sentences = ["Modelled, medians with the interval that holds 95 % of the draws of what is not known."]
    for name, rows in gains.items():
        first, last = min(rows, key=lambda g: g.static_w), max(rows, key=lambda g: g.static_w)
        text = f"{name}: {_interval(first, 1)} hours at {first.static_w:g} W of static power, {_interval(last, 1)} at {last.static_w:g} W"
        text += f"; latency {_interval(first, 0)}."
        if claim is not None:
            inside = [f"{g.static_w:g}" for g in rows if g.low[1] <= claim <= g.high[1]]
            text += f" {claim:+g} % lies within the interval at {', '.join(inside)} W." if inside else f" {claim:+g} % lies in no interval."
        sentences.append(text)
    return " ".join(sentences)


def table_endurance(gains: Mapping[str, Sequence[Gain]]) -> list[dict[str, str]]:
    """A row per setting and static power: latency, hours and tokens per charge gained, with intervals. All modelled."""
    return [
        {
            "setting": name,
            "static power, W": f"{g.static_w:g}",
            "latency (modelled)": _interval(g, 0),
            "hours (modelled)": _interval(g, 1),
            "tokens per charge (modelled)": _interval(g, 2),
            "draws": str(g.n),
        }
        for name, rows in gains.items()
        for g in rows
    ]


# ----------------------------------------------------------------------------------------------------------------- DVFS


def frontier(points: Mapping[str, Sequence[Point]]) -> go.Figure:
    """Latency against mean power, a point per frequency; per workload one line awake between inferences, one asleep."""
    fig = _figure("Frequency: latency against power (modelled)", "latency, ms", "mean power of cores and memory, mW", yaxis_type="log")
    for i, (name, rows) in enumerate(points.items()):
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        for sleeping in (False, True):
            fig.add_scatter(
                x=[p.latency_ms for p in rows],
                y=[p.sleep_mw if sleeping else p.awake_mw for p in rows],
                mode="lines+markers",
                name=f"{name}, {'asleep' if sleeping else 'awake'} between",
                text=[f"{p.mhz:g} MHz" for p in rows],
                hovertemplate="%{text}: %{x:.2f} ms, %{y:.0f} mW<extra>%{fullData.name}</extra>",
                line={"color": colour, "dash": "dash" if sleeping else "solid"},
                marker={"color": colour, "symbol": SYMBOLS[(2 * i + sleeping) % len(SYMBOLS)], "size": 8},
            )
    return fig


def say_frontier(points: Mapping[str, Sequence[Point]]) -> str:
    """The sentence beside `frontier`: the highest frequency kept without sleep, racing to idle, and what takes the least power."""
    sentences = ["Modelled."]
    for name, rows in points.items():
        top, best = max(rows, key=lambda p: p.mhz), min(rows, key=lambda p: p.sleep_mw)
        text = f"{name}: fixed at {top.mhz:g} MHz and awake, {top.awake_mw:.0f} mW and {top.latency_ms:.1f} ms; "
        text += f"asleep in the gaps, {top.sleep_mw:.0f} mW at the same speed; " if top.sleeps else "the gaps are too short to sleep in; "
        if best.mhz == top.mhz:
            text += "no slower frequency takes less (racing to idle wins)."
        else:
            text += f"least at {best.mhz:g} MHz, {best.sleep_mw:.0f} mW ({100 * (best.sleep_mw / top.awake_mw - 1):+.0f} %) "
            text += f"and {best.latency_ms:.1f} ms: slow and steady wins."
        sentences.append(text)
    return " ".join(sentences)


def table_frontier(points: Mapping[str, Sequence[Point]]) -> list[dict[str, str]]:
    """A row per workload and frequency: latency, power awake and asleep between inferences. All modelled."""
    return [
        {
            "workload": name,
            "MHz": f"{p.mhz:g}",
            "latency, ms (modelled)": f"{p.latency_ms:.2f}",
            "awake between, mW (modelled)": f"{p.awake_mw:.0f}",
            "asleep between, mW (modelled)": f"{p.sleep_mw:.0f}" if p.sleeps else "no time to sleep",
        }
        for name, rows in points.items()
        for p in rows
    ]
