"""The explorer in words: the sentence beside each plot, the tables, and what a number is: measured here, at build, or modelled."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite

import numpy as np

from edgelab import html_table
from edgelab.device import devices, plain
from edgelab.explorer_plots import Layers
from edgelab.sweep_table import METRICS, Sweep
from edgelab.tradeoff import OBJECTIVES, State, View, compare

BUILD, MODELLED, HERE = "measured at build", "modelled", "measured here"
SIGNS = {"circle": "●", "diamond": "◆", "square": "■", "triangle-up": "▲", "cross": "✚", "x": "✖"}
MOST_ROWS = 12  # of a front in the table


def megabytes(size: float) -> str:
    """Bytes in MB of 10^6.

    >>> megabytes(2_345_678)
    '2.35 MB'
    """
    return f"{size / 1e6:,.2f} MB"


def milliseconds(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """A time with its band.

    >>> milliseconds(0.2512, 0.2, 0.4), milliseconds(float("nan"))
    ('0.251 ms [0.2, 0.4]', 'unknown')
    """
    if not isfinite(value):
        return "unknown"
    return f"{plain(value)} ms" + (f" [{plain(low)}, {plain(high)}]" if isfinite(low) and isfinite(high) else "")


def quality_said(view: View, row: int) -> str:
    """A row's quality with its 95 % interval."""
    q = view.quality
    value, low, high = (a[row] for a in (q.value, q.low, q.high))
    ends = [q.metric.said(e).removesuffix(" " + q.metric.unit).removesuffix(" %") for e in (low, high)]
    return q.metric.said(value) + (f" [{', '.join(ends)}]" if isfinite(low) and isfinite(high) else "")


def latency_said(view: View, row: int) -> str:
    return milliseconds(view.latency.value[row], view.latency.low[row], view.latency.high[row])


def limits_said(state: State) -> str:
    """The budgets in words, "no budgets" where there are none."""
    m, found = METRICS[state.metric], []
    if state.size_limit is not None:
        found.append(f"at most {megabytes(state.size_limit)}")
    if state.latency_limit is not None:
        found.append(f"at most {plain(state.latency_limit)} ms per token")
    if state.quality_limit is not None:
        found.append(f"{m.title} at {'least' if m.better == 'higher' else 'most'} {m.said(state.quality_limit)}")
    return ", ".join(found) or "no budgets"


def row_said(sweep: Sweep, view: View, row: int) -> str:
    """A row with its three numbers and what each of them is."""
    where = devices()[view.state.device].title
    return (
        f"{sweep['label'][row]}: {megabytes(sweep['size_bytes'][row])} ({BUILD}), {view.quality.metric.title} {quality_said(view, row)} "
        f"({BUILD}), {latency_said(view, row)} per token on {where} ({MODELLED})"
    )


def found_said(sweep: Sweep, view: View, rivals: Sequence[int] = ()) -> str:
    """The sentence beside the two upper plots: what is best within the budgets, and of how many."""
    s, rows, front = view.state, int(view.rows.sum()), int(view.front.sum())
    counted = f"{rows:,} of {len(sweep):,} configurations pass the filters, {view.picked_from:,} of them lie within the budgets "
    counted += f"({limits_said(s)}); {front:,} are on the front of quality, size and latency."
    if view.best is None:
        return " ".join([f"Nothing lies within the budgets: loosen one. {counted}", *map(_sentence, view.notes)])
    told = f"{OBJECTIVES[s.objective].capitalize()}: {row_said(sweep, view, view.best)}."
    if len(rivals):
        smallest = min(rivals, key=lambda i: (sweep["size_bytes"][i], i))
        told += f" On these documents {len(rivals):,} others can't be told from it"
        if sweep["size_bytes"][smallest] < sweep["size_bytes"][view.best]:
            told += f", the smallest of them {sweep['label'][smallest]} with {megabytes(sweep['size_bytes'][smallest])}"
        told += "."
    return " ".join([told, counted, *map(_sentence, view.notes)])


def _sentence(note: str) -> str:
    return note[0].upper() + note[1:] + "."


def front_rows(sweep: Sweep, view: View, most: int = MOST_ROWS) -> list[dict[str, str]]:
    """The front, from the smallest: at most `most` rows, spread evenly, the best one among them; a dict of text each."""
    rows = np.flatnonzero(view.front)
    rows = rows[np.argsort(sweep["size_bytes"][rows], kind="stable")]
    if len(rows) > most:
        kept = set(rows[np.linspace(0, len(rows) - 1, most).round().astype(int)].tolist())
        if view.best is not None and view.front[view.best] and view.best not in kept:
            kept.remove(min(kept, key=lambda i: abs(sweep["size_bytes"][i] - sweep["size_bytes"][view.best])))
            kept.add(view.best)
        rows = [i for i in rows.tolist() if i in kept]
    return [row_cells(sweep, view, int(i)) for i in rows]


def row_cells(sweep: Sweep, view: View, row: int) -> dict[str, str]:
    """One row of the table of the front."""
    return {
        "configuration": sweep["label"][row] + (" (best)" if row == view.best else ""),
        f"size, {BUILD}": megabytes(sweep["size_bytes"][row]),
        f"{view.quality.metric.title}, {BUILD}": quality_said(view, row),
        f"per token, {MODELLED}": latency_said(view, row),
        "bits per weight": f"{sweep['bits_per_weight'][row]:.2f}",
        "within the budgets": "yes" if view.inside[row] else "no",
    }


def brush_said(sweep: Sweep, view: View, brushed: np.ndarray | None) -> str:
    """The sentence beside a selection of rows."""
    if brushed is None or not (brushed & view.rows).any():
        return "Brush: drag a box in one of the two upper plots; the other shows the same rows. Double-click to drop the selection."
    rows = np.flatnonzero(brushed & view.rows)
    size, q = sweep["size_bytes"][rows], view.quality
    values = q.value[rows]
    best = int(rows[np.nanargmin(q.metric.sign * values)]) if np.isfinite(values).any() else None
    said = f"Brushed: {len(rows):,} rows, {megabytes(size.min())} to {megabytes(size.max())}"
    said += f", {int(view.inside[rows].sum()):,} within the budgets"
    for column in ("method", "bits", "model"):
        there, count = np.unique(sweep[column][rows].astype(str), return_counts=True)
        most = int(np.argmax(count))
        said += f"; {100 * count[most] / len(rows):.0f} % have {column} {there[most].removesuffix('.0')}"
    return said + (f". The best of them: {row_said(sweep, view, best)}." if best is not None else ".")


def compared_rows(sweep: Sweep, a: str, b: str) -> list[dict[str, str]]:
    """A against B on every metric, a dict of text each: both values, the test's answer."""
    lines = []
    for name, m in METRICS.items():
        c = compare(sweep, a, b, name)
        line = {"metric": m.title, "A": m.said(c.value_a), "B": m.said(c.value_b)}
        if c.refused:
            lines.append(line | {"B - A": "", "verdict": "not comparable: other references"})
            continue
        p = f"= {c.p:.3f}" if c.p >= 0.001 else "below 0.001"
        how = (
            f"{c.difference:+.{m.digits}f} [{c.low:+.{m.digits}f}, {c.high:+.{m.digits}f}]"
            if c.low is not None
            else (f"{100 * c.difference:+.1f} points, p {p}; only A right {c.only_a}, only B {c.only_b}, of {c.n}")
        )
        verdict = {"a": "A is better", "b": "B is better", "": "can't be told apart"}[c.better]
        lines.append(line | {"B - A": how, "verdict": verdict})
    i, j = sweep.index(a), sweep.index(b)
    sizes = sweep["size_bytes"][[i, j]]
    share = f"{100 * (sizes[1] / sizes[0] - 1):+.1f} %"
    return [{"metric": "size", "A": megabytes(sizes[0]), "B": megabytes(sizes[1]), "B - A": share, "verdict": "counted, no test"}, *lines]


def layers_said(sweep: Sweep, row: int, held: Layers) -> str:
    """The sentence beside the two lower plots: which weights take the bytes, and where the error is largest."""
    total = sum(v for by_place in held.megabytes.values() for v in by_place.values())
    sums = {role: sum(by_place.values()) for role, by_place in held.megabytes.items()}
    role = max(sums, key=sums.__getitem__)
    said = f"{sweep['label'][row]}: the {role} take {sums[role]:.2f} of {total:.2f} MB ({100 * sums[role] / total:.0f} %)"
    errors = [(e, name) for found in held.errors.values() for _, e, name in found]
    left = len(sweep.layer(row)["name"]) - len(errors)
    if errors:
        worst, name = max(errors)
        middle = float(np.median([e for e, _ in errors]))
        said += f"; the largest relative error is {worst:.3f}, of {name}; the median over {len(errors)} weights is {middle:.3f}"
    if left:
        said += f"; {left} weights have no error to show, their shapes differ from the original's"
    return f"{said}. All {BUILD}."


def layer_rows(held: Layers) -> list[dict[str, str]]:
    """Bytes and median error by layer and role, a line per layer."""
    rows = []
    for place in held.places:
        row = {"layer": place}
        for role, by_place in held.megabytes.items():
            if any(by_place.values()):
                errors = [e for p, e, _ in held.errors.get(role, ()) if p == place]
                size = f"{by_place[place]:.3f} MB" if place in by_place else ""
                row[role] = size + (f", {np.median(errors):.3f}" if errors and size else "")
        rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, str]], caption: str) -> str:
    """Rows as an HTML table, the first cell of each its head; "" without rows."""
    rows = list(rows)
    if not rows:
        return ""
    style = "overflow-x: auto; line-height: 1.35"
    return f'<div style="{style}" tabindex="0" role="region" aria-label="{escape(caption)}">{html_table.lines(rows, caption)}</div>'


def dot(colour: str, name: str) -> str:
    """A name behind a dot of its colour: HTML."""
    style = f"display:inline-block;width:0.8em;height:0.8em;border-radius:50%;background:{colour}"
    return f'<span aria-hidden="true" style="{style}"></span> {escape(name)}'


def legend(parts: Iterable[str]) -> str:
    """A legend as a list, of parts that are HTML."""
    items = "".join(f'<li style="display:inline-block;margin-right:1em">{part}</li>' for part in parts)
    return f'<ul aria-label="legend" style="list-style:none;margin:0.2em 0;padding:0;line-height:1.5">{items}</ul>'


def said(text: str) -> str:
    """A sentence; in an `explorer_controls.Live` a screen reader announces it when it changes."""
    return f'<p style="line-height: 1.45; margin: 0.3em 0">{escape(text)}</p>'


def alert(error: Exception) -> str:
    return f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'
