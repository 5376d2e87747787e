"""Is the difference between two rows of a sweep more than chance, and how lucky is a winner that was picked from many?

`compare` takes two rows and a metric and runs the test of `paired` that fits: McNemar's for answers, a bootstrap for sums over text.
It answers for a pair that was chosen *before* looking. The best of 1,000 rows was chosen by looking: part of its lead is luck (the
winner's curse). Bonferroni's correction, p times the number of rows picked from, bounds what luck explains; `halves` shows it directly.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from edgelab import paired
from edgelab.sweep_table import METRICS, Sweep, drawn_ratios, metric_of, sums


@dataclass(frozen=True)
class Comparison:
    """Two rows on the same documents. `difference`: b - a in the metric's unit; interval and ratio of sums only (None for exact match).

    `only_a`, `only_b`: answers that one alone got right (exact match). `n`: documents, or sources of text. `picked_from`: how many
    rows the better one was picked from; `p_search` = min(1, p * picked_from) (Bonferroni). `refused`: why there is no test.
    """

    metric: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    p: float
    test: str
    n: int
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    only_a: int | None = None
    only_b: int | None = None
    picked_from: int = 1
    refused: str = ""

    @property
    def significant(self) -> bool:
        """At 5 %, as a pair that was chosen before looking: McNemar's p, or an interval of the difference that leaves out 0."""
        if self.refused:
            return False
        return self.p < paired.LEVEL if self.low is None else not self.low <= 0 <= self.high

    @property
    def p_search(self) -> float:
        return min(1.0, self.p * self.picked_from)

    @property
    def better(self) -> str:
        """ "a", "b", or "" where the documents don't tell."""
        if not self.significant:
            return ""
        return "b" if self.difference * METRICS[self.metric].sign < 0 else "a"

    @property
    def said(self) -> str:
        """The verdict in words."""
        if self.refused:
            return self.refused
        m = METRICS[self.metric]
        verdict = {"a": "A is better", "b": "B is better", "": "the documents do not tell them apart"}[self.better]
        if m.kind == "exact":
            how = f"of {self.n} answers A alone got {self.only_a} right and B alone {self.only_b}; {self.test} p = {_p(self.p)}"
        else:
            how = f"B - A = {self.difference:+.{m.digits}f} [{self.low:+.{m.digits}f}, {self.high:+.{m.digits}f}] {m.unit}"
            if self.ratio is not None:
                how += f", B / A = {self.ratio:.3f} [{self.ratio_low:.3f}, {self.ratio_high:.3f}]"
            how += f"; {self.test} over {self.n} sources"
        said = f"On {m.title}: A {m.said(self.value_a)}, B {m.said(self.value_b)}; {verdict} ({how})."
        return said + (f" {self.curse}" if self.curse else "")

    @property
    def curse(self) -> str:
        """The winner's curse in words, "" for a pair that was not picked by its result."""
        if self.picked_from <= 1 or self.refused:
            return ""
        least = 2 / (paired.RESAMPLES + 1)
        said = f"One of them was picked from {self.picked_from:,} by how it did: part of its lead is luck."
        if not self.significant:
            return said
        if METRICS[self.metric].kind != "exact" and least * self.picked_from >= paired.LEVEL:
            return said + f" {paired.RESAMPLES:,} resamples are too few to correct for so many; measure both again on other documents."
        survives = "it still holds" if self.p_search < paired.LEVEL else "it no longer holds; measure both again on other documents"
        return said + f" Corrected for so many comparisons (p = {_p(self.p_search)}), {survives}."


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def compare(sweep: Sweep, a: int | str, b: int | str, metric: str = "em_assistant", *, picked_from: int = 1) -> Comparison:
    """Whether row `b` differs from row `a` (numbers or ids) on `metric` by more than chance, on the same documents.

    `picked_from`: among how many rows the better one was found. Rows whose KL divergences have different references are
    refused: the result says why. Raises KeyError for an unknown id, ValueError for a metric or number.
    """
    i, j = (sweep.index(r) if isinstance(r, str) else int(r) for r in (a, b))
    m, ids = metric_of(metric), (sweep["id"][i], sweep["id"][j])
    if picked_from < 1:
        raise ValueError(f"picked_from={picked_from} must be at least 1")
    if m.kind == "exact":
        keep = np.array([d.domain in m.domains for d in sweep.answers])
        one, two = sweep.doc_exact[i][keep].astype(bool), sweep.doc_exact[j][keep].astype(bool)
        if not len(one):
            raise ValueError(f"the sweep was not measured on {m.domains[0]}")
        only_a, only_b = int((one & ~two).sum()), int((two & ~one).sum())
        return Comparison(metric, *ids, float(one.mean()), float(two.mean()), (only_b - only_a) / len(one), paired.mcnemar(only_a, only_b),
                          "McNemar's exact test", len(one), only_a=only_a, only_b=only_b, picked_from=picked_from)  # fmt: skip
    tops, bottom, sizes = sums(sweep, m, [i, j])
    values = tops.sum(1) / bottom.sum()
    references = [sweep.reference[sweep["model"][r]] for r in (i, j)]
    if m.kind == "kld" and references[0] != references[1]:
        why = (
            f"KL divergence can't compare these two: A's is a distance from {references[0]}, B's from {references[1]}. Use bits per byte "
            "or exact match, which are a model's own."
        )
        return Comparison(metric, *ids, *map(float, values), np.nan, np.nan, "", 0, picked_from=picked_from, refused=why)
    d = paired.difference(tops[0], tops[1], bottom, sizes)
    return Comparison(metric, *ids, *map(float, values), d.value, d.p, "paired bootstrap", d.sources, d.low, d.high, d.ratio,
                      d.ratio_low, d.ratio_high, picked_from=picked_from)  # fmt: skip


def rivals(sweep: Sweep, row: int, among: np.ndarray, metric: str) -> np.ndarray:
    """The other rows of `among` (bool [rows]) that the documents can't tell from `row` at 5 %: their numbers.

    As `compare` would say of each pair; no correction for how many there are. Rows of another reference are told apart by definition.
    """
    m, rows = metric_of(metric), np.flatnonzero(among & (np.arange(len(sweep)) != row))
    if m.kind == "exact":
        right = sweep.doc_exact[:, [d.domain in m.domains for d in sweep.answers]].astype(np.int64)
        both = right[rows] @ right[row]
        only_a, only_b = right[row].sum() - both, right[rows].sum(1) - both
        p = {pair: paired.mcnemar(*pair) for pair in set(zip(only_a.tolist(), only_b.tolist(), strict=True))}
        return rows[[p[pair] >= paired.LEVEL for pair in zip(only_a.tolist(), only_b.tolist(), strict=True)]]
    if m.kind == "kld":
        same = {name for name, r in sweep.reference.items() if r == sweep.reference[sweep["model"][row]]}
        rows = rows[[name in same for name in sweep["model"][rows]]]
    drawn = drawn_ratios(sweep, metric)
    tops, bottom, sizes = sums(sweep, m, [row, *rows])
    measured = ((tops[1:] - tops[0]).sum(1) / bottom.sum())[:, None]
    if (w := paired.widening(sizes)) == inf:
        return rows
    apart = measured + w * (drawn[rows] - drawn[row] - measured)
    most = round(0.025 * drawn.shape[1])  # the interval's end is the 25th of 1,000: fewer than 25 on one side of 0 leave it out
    return rows[((apart <= 0).sum(1) >= most) & ((apart >= 0).sum(1) >= most)]


@dataclass(frozen=True)
class Halves:
    """The winner's curse, measured: the best of `picked_from` rows by exact match on half of the documents, and on the other half."""

    row: int
    picked_from: int
    chosen_on: float
    other: float


def halves(sweep: Sweep, rows: np.ndarray, metric: str = "em_arithmetic", *, seed: int = 0) -> Halves:
    """Split the answers of `metric` in two at random, pick the best of `rows` (bool [rows]) on one half, measure it on the other.

    Raises ValueError for a metric without answers, or no rows.
    """
    m = metric_of(metric)
    if m.kind != "exact":
        raise ValueError(f"metric={metric!r} has no answers to split; use em_assistant or em_arithmetic")
    if not rows.any():
        raise ValueError("no rows to pick from; loosen the filters")
    docs = np.flatnonzero([d.domain in m.domains for d in sweep.answers])
    mixed = docs[np.argsort(paired.mulberry32(len(docs), seed), kind="stable")]
    one, two = mixed[: len(docs) // 2], mixed[len(docs) // 2 :]
    there = np.flatnonzero(rows)
    shares = sweep.doc_exact[there][:, one].mean(1)
    winner = int(np.argmax(shares))
    return Halves(int(there[winner]), len(there), float(shares[winner]), float(sweep.doc_exact[there[winner]][two].mean()))
