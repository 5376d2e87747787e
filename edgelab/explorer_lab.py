"""What notebook 10 shows beside the explorer, and the checks of its exercises.

Two controls that must fail live here. *Shuffled*: the sweep's qualities dealt out to its rows at random; a front read off them is
beaten by the true one almost everywhere, so a front is not what any cloud of points has. *Halves*: the best of all rows on half of the
documents, measured on the other half; what it loses there was luck.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from edgelab import explorer_words as say
from edgelab import plots, tradeoff
from edgelab.device import devices, predict
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.explorer_plots import SYMBOLS, scale, stairs
from edgelab.sweep_table import METRICS, Sweep
from edgelab.tradeoff import State


def preset_rows(sweep: Sweep, state: State | None = None) -> list[dict[str, str]]:
    """What each preset finds, a dict of text each."""
    rows = []
    for name, preset in tradeoff.PRESETS.items():
        v = tradeoff.view(sweep, tradeoff.apply(sweep, name, state or State()))
        line = {"question": preset.title, "means": preset.meaning, "picked from": f"{v.picked_from:,}"}
        found = (
            {"configuration": "nothing"}
            if v.best is None
            else {
                "configuration": sweep["label"][v.best],
                "size (measured at build)": say.megabytes(sweep["size_bytes"][v.best]),
                "quality (measured at build)": f"{v.quality.metric.title} {say.quality_said(v, v.best)}",
                "per token (modelled)": say.latency_said(v, v.best),
            }
        )
        rows.append(line | found)
    return rows


def shuffled(sweep: Sweep, metric: str = "em_assistant", *, seed: int = 0) -> tuple[go.Figure, float, str]:
    """(figure, share of the shuffled front that the true front dominates, sentence): the control of what a front is."""
    m, size = METRICS[metric], sweep["size_bytes"]
    true = tradeoff.quality_of(sweep, metric).value
    dealt = np.random.default_rng(seed).permutation(true)
    fronts = {name: tradeoff.pareto(m.sign * q, size) for name, q in (("true", true), ("shuffled", dealt))}
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "The front, and that of shuffled qualities"}})
    fig.update_layout(xaxis={"title": {"text": "MB (counted)"}, "type": "log"}, yaxis={"title": {"text": m.axis}})
    for i, (name, q) in enumerate((("true", true), ("shuffled", dealt))):
        x, y = stairs(size[fronts[name]] / 1e6, q[fronts[name]] * scale(m))
        fig.add_scatter(x=x, y=y, mode="lines+markers", name=name, marker={"symbol": SYMBOLS[i], "size": 7, "color": plots.OKABE_ITO[i]},
                        line={"color": plots.OKABE_ITO[i]})  # fmt: skip
    on = np.flatnonzero(fronts["true"])
    beaten = 0
    claimed = np.flatnonzero(fronts["shuffled"])
    for i in claimed:  # is there a true point as small as what the shuffled front claims, and really better than that row is?
        beaten += bool(((size[on] <= size[i]) & (m.sign * true[on] < m.sign * true[i])).any())
    share = beaten / len(claimed)
    said = f"Of the {len(claimed)} rows on the shuffled front {beaten} are in truth dominated by one of the {len(on)} on the true front."
    return fig, share, said


def halves_rows(
    sweep: Sweep, metric: str, rows: np.ndarray, sizes: Sequence[int] = (10, 30, 100, 300), *, splits: int = 20
) -> list[dict[str, str]]:
    """The winner's curse: the best of so many rows on half of the answers, and on the other half, means over `splits` random halves."""
    there, lines = np.flatnonzero(rows), []
    for n in (*[s for s in sizes if s < len(there)], len(there)):
        found = []
        for seed in range(splits):
            picked = np.zeros(len(sweep), bool)
            picked[np.random.default_rng(seed).choice(there, n, replace=False)] = True
            found.append(tradeoff.halves(sweep, picked, metric, seed=seed))
        on, other = (float(np.mean([getattr(h, a) for h in found])) for a in ("chosen_on", "other"))
        m = METRICS[metric]
        lines.append({"picked from": f"{n:,}", f"{m.title}, on the half it was picked on": m.said(on), "on the other half": m.said(other),
                      "lost": f"{100 * (on - other):.1f} points"})  # fmt: skip
    return lines


def lost_points(lines: Sequence[Mapping[str, str]]) -> list[float]:
    """The last column of `halves_rows` as numbers."""
    return [float(line["lost"].split()[0]) for line in lines]


def three_bit_rows(sweep: Sweep) -> tuple[int, int, int]:
    """(original, three bits with one scale per row, three bits with one per 32 weights) of edge-moe, the latter by plain rounding.

    Rows that are named by what was done to them and not by how they did: a comparison of theirs needs no correction for a search.
    Raises LookupError where the sweep lacks one.
    """
    original = sweep.original("edge-moe")
    if original is None:
        raise LookupError("the sweep holds no original of edge-moe")
    same = {c: sweep[c][original] for c in ("model", "sparsity", "experts", "top_k", "channels")}
    whole = np.logical_and.reduce([sweep[c] == value for c, value in same.items()]) & (sweep["method"] == "rtn")
    found = [original]
    for scheme in ("int3-row", "int3-g32"):
        rows = [i for i in np.flatnonzero(whole & (sweep["scheme"] == scheme)) if "ends" not in sweep["label"][i]]
        if not rows:
            raise LookupError(f"the sweep has no row of edge-moe, rtn {scheme}, with nothing else done to it")
        found.append(int(rows[0]))
    return tuple(found)


def device_rows(sweep: Sweep, rows: Mapping[str, int], names: Sequence[str], *, context: int = 512) -> list[dict[str, str]]:
    """Modelled milliseconds per token of some rows on some devices, and what decoding waits for there."""
    lines = []
    for name in names:
        line = {"device": devices()[name].title}
        for what, row in rows.items():
            p = predict(name, tradeoff.shape_of(sweep["shape"][row]), context=context)
            line[f"{what} (modelled)"] = "unknown" if p.decode is None else f"{1e3 / p.decode.value:.3g} ms, {p.binds}"
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------------------ exercises

POINTS = {"a": (1.0, 60.0), "b": (2.0, 60.0), "c": (2.0, 80.0), "d": (3.0, 75.0), "e": (4.0, 90.0), "f": (4.0, 90.0), "g": (6.0, 89.0)}


def check_front(answer) -> Verdict:
    """Which of `POINTS` (MB, per cent) nothing dominates: a, c, e, f."""
    form = 'a list of letters, such as ["a", "b"]'
    if answer is None:
        return unanswered(form)
    if not isinstance(answer, list | tuple | set | str) or not all(isinstance(x, str) and x in POINTS for x in answer):
        return not_yet(f"asked is {form}, of {', '.join(POINTS)}")
    found = set(answer)
    if found == set("acef"):
        return right("a, c, e and f: smaller is worse or better is larger for each of them, and twins stand together")
    for x, why in (
        ("b", "b is as good as a and larger: a dominates it"), ("d", "d is larger than c and worse"), ("g", "g is larger than e and worse"),
    ):  # fmt: skip
        if x in found:
            return not_yet(why)
    if found & set("ef") and not set("ef") <= found:
        return not_yet("e and f are equal: neither is better anywhere, so neither dominates the other")
    absent = min(set("acef") - found)
    return not_yet(f"what would dominate {absent}? Look for a row that is nowhere worse and somewhere better")


def check_mcnemar(answer) -> Verdict:
    """The exact two-sided p of 1 against 7 answers that one alone got right: 18 / 256."""
    if answer is None:
        return unanswered("a number between 0 and 1")
    found = numbers(answer, 1)
    if found is None:
        return not_yet("asked is one number between 0 and 1")
    wanted = 18 / 256
    if abs(found[0] - wanted) < 1e-4:
        return right(f"2 (C(8, 0) + C(8, 1)) / 2^8 = {wanted:.4f}: not below 0.05, so 7 against 1 can be chance")
    hints = {
        9 / 256: "that is one side; nobody said beforehand which model would be the better one",
        16 / 256: "that is the chance of exactly 1 of 8; more extreme outcomes count as well",
        8 / 256: "that is one side, and of exactly 1 of 8 only; more extreme outcomes and the other side count as well",
        1 / 8: "that is the share of the disagreements that A won, no probability of it",
        2 / 256: "that is 8 against 0; 7 against 1 is less extreme",
    }
    return hint(found[0], hints, "only the answers on which they differ count, and each would be a coin's toss", 2e-4)


def smallest_that_keeps(size: np.ndarray, quality: np.ndarray, original: int, keep: float) -> int:
    """The row of the fewest bytes whose quality is at least `keep` times that of row `original`; NaN is unknown and does not count."""
    found = np.flatnonzero(quality >= keep * quality[original])  # NaN compares as False
    return int(found[np.argmin(size[found])])


def check_smallest(answer) -> Verdict:
    """A function of (size, quality, original, keep) against `smallest_that_keeps`."""
    size, nan = np.array([8.0, 4.0, 2.0, 1.0, 3.0]), np.nan
    cases = [
        Case("five rows", (size, np.array([0.9, 0.88, 0.86, 0.3, 0.87]), 0, 0.95), "return the row's number, not its size or rank"),
        Case("an original that is not the best", (size, np.array([0.8, 0.95, 0.77, 0.3, 0.91]), 0, 0.95), "95 % of the original's quality"),
        Case("an original that is not the first row", (size, np.array([0.5, 0.9, 0.86, 0.5, 0.84]), 1, 0.95), "which row is the original?"),
        Case("an original of 50 %", (size, np.array([0.5, 0.46, 0.42, 0.1, 0.47]), 0, 0.9), "a share of the original, not points below it"),
        Case("a small row of unknown quality", (size, np.array([0.9, 0.88, nan, nan, 0.87]), 0, 0.95), "NaN is no quality that is kept"),
        Case("a bound that is just met", (size, np.array([1.0, 0.99, 0.5, 0.5, 0.75]), 0, 0.75), "at least, so equal is enough"),
    ]
    form = "a function of (size, quality, original, keep) that returns the number of a row"
    praise = "the smallest row that keeps what was asked, measured by the original"
    return check_function(answer, smallest_that_keeps, cases, form, praise, parts=("row",))


def check_luck(answer) -> Verdict:
    """1,000 equally good rows against one: how many look better at 5 %, and the p that Bonferroni asks for: (25, 0.00005)."""
    form = "two numbers: how many rows, and a p"
    if answer is None or (isinstance(answer, tuple | list) and all(a is None for a in answer)):
        return unanswered(form)
    found = numbers(answer, 2)
    if found is None:
        return not_yet(f"asked are {form}")
    rows, p = found
    if abs(rows - 25) > 0.5:
        return hint(rows, {50: "50 look different; half of them look worse", 0: "5 % of the tests cry wolf where there is none",
                           5: "5 is a share in per cent of 1,000 what?", 975: "those are the ones that do not stand out"},
                    "a test at 5 % errs in 5 % of cases, on either side alike", 0.5)  # fmt: skip
    if abs(p - 5e-5) > 1e-6:
        return hint(p, {0.05: "0.05 is for one comparison that was chosen before looking", 2.5e-5: "the test has two sides already",
                        0.001: "1 / 1,000: and where is the 5 %?", 50.0: "divide, don't multiply"},
                    "Bonferroni: the p of one test times the number of tests has to stay below 0.05", 1e-6)  # fmt: skip
    return right("25 of them look better by luck alone, and only a p below 0.05 / 1,000 = 0.00005 is worth mentioning")
