"""The claims ledger: what articles say, what we found, and a verdict that a stated rule gives. No verdict is ever typed in.

`data/claims.csv` holds the claims, and for each how it is judged: `rule`, `target`, `of` (what is compared, with its unit), `null`,
`tolerance`, `note`. Let v [low, high] be our value with its 95 % interval, T the target, t the tolerance, N the null (the
value that would mean "no effect": 1 for "times smaller", 0 for "% less").

    at least T      good = [T - t|T|, inf)              at most T       good = (-inf, T + t|T|]
    about T         good = [T - t|T|, T + t|T|]         between A..B    good = [A - t|A|, B + t|B|]

    holds                 the whole interval lies in `good`
    holds in part         v lies in `good` and its interval reaches out of it; or the whole interval lies on the claim's side of N and v
                          reaches at least half of the size claimed: (v - N) / (T - N) >= 0.5 (`HALF`, our threshold)
    doesn't hold here     neither: an effect that is there, and smaller than half of what was claimed, is this too
    can't be tested       where `kind` is "model" (that takes the hardware): the value is modelled, and what is said of it is whether the
                          claim lies inside of its band, whether `good` and [low, high] meet. An entry with `band` False has none to lie
                          in (a model that is known to be off, or no value at all), and then that isn't said either. Or where `kind` is
                          "not reproducible here" (that takes the article's own model and data): something else was measured, is shown,
                          and says nothing of the claim

The share (v - N) / (T - N) is printed with the verdict wherever there is a null: 100 % is the figure claimed, 50 % half of the effect.

So a claim of "at most 0.8 % lost" needs an interval that ends below 0.8, not a mean that does. Our models are small: a failed claim
"doesn't hold *here*". A claim without a computed value has no verdict at all (LookupError).

A value that was counted, not sampled (bytes, multiply-adds), has an interval of no width.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path

from edgelab import html_table
from edgelab.paths import data_dir
from edgelab.report import PROVENANCES as _MEASURED

NO_VALUE = "no value"
PROVENANCES = (*_MEASURED, "simulated", NO_VALUE)
HALF = 0.5  # the least share of the claimed effect that is called "in part"
RULES = ("at least", "at most", "about", "between")
HOLDS, IN_PART, NOT_HERE, UNTESTED = "holds", "holds in part", "doesn't hold here", "can't be tested without the hardware"
NO_DATA = "can't be tested without its model and data"
VERDICTS = (HOLDS, IN_PART, NOT_HERE, UNTESTED, NO_DATA)
_FORCED = {"model": UNTESTED, "not reproducible here": NO_DATA}


# -------------------------------------------------------------------------------------------------------------- nouns


@dataclass(frozen=True)
class Claim:
    """One claim of an article, and the rule by which it is judged (see the module). `target`: a number, or "A..B" for "between"."""

    id: str
    system: str
    topic: str
    claim: str
    value: str
    unit: str
    setting: str
    kind: str
    rule: str
    target: str
    of: str
    null: float | None
    tolerance: float
    note: str

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"claim {self.id}: rule={self.rule!r} is not known; use one of {', '.join(RULES)}")
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(f"claim {self.id}: tolerance={self.tolerance} is no share of the target; give a number from 0 to 1")
        try:
            ends = self.targets
        except ValueError as error:
            raise ValueError(f"claim {self.id}: target={self.target!r} is no number (or A..B for 'between')") from error
        if len(ends) != 1 + (self.rule == "between") or list(ends) != sorted(ends):
            raise ValueError(f"claim {self.id}: target={self.target!r} does not go with {self.rule!r}; 'between' takes A..B, others one")

    @property
    def targets(self) -> tuple[float, ...]:
        return tuple(float(part) for part in self.target.split(".."))

    @property
    def good(self) -> tuple[float, float]:
        """(least, most) that our value may be for the claim to hold."""
        first, last = self.targets[0], self.targets[-1]
        low = -math.inf if self.rule == "at most" else first - self.tolerance * abs(first)
        return low, math.inf if self.rule == "at least" else last + self.tolerance * abs(last)

    @property
    def said(self) -> str:
        """The claim in the article's words and figures."""
        return f"{self.claim}: {self.value} {self.unit}".strip() if self.value != "-" else self.claim

    @property
    def wanted(self) -> str:
        """The rule in words, such as "at least 4.06 times smaller"."""
        return f"{self.rule} {self.target.replace('..', ' and ')} {self.of}".strip()


@dataclass(frozen=True)
class Entry:
    """What was found for the claim `claim`: a value with its interval, and where it comes from.

    `ran`: one sentence, what was run or modelled. `by`: what the interval is over ("500 answers, paired bootstrap"; "counted").
    `control`: what was checked to fail, or to stay the same. `beside`: {label: text}, other figures that a reader should see. `corpus`:
    the fingerprint of the text, where any was read. `band` False: [low, high] is no band that a modelled claim could lie in; `control`
    or `beside` say why. A claim of which nothing can be computed has value, low and high None, and provenance "no value".
    """

    claim: str
    ran: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    n: int
    by: str
    provenance: str = "measured here"
    control: str = ""
    machine: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    corpus: str = ""
    seed: int | None = None
    band: bool = True

    def __post_init__(self) -> None:
        if self.provenance not in PROVENANCES:
            raise ValueError(f"entry {self.claim}: provenance={self.provenance!r} is not one of {', '.join(PROVENANCES)}")
        if self.n < (self.provenance != NO_VALUE):
            raise ValueError(f"entry {self.claim}: n={self.n}; something has to be counted")
        if not self.ran or not self.by:
            raise ValueError(f"entry {self.claim}: ran={self.ran!r}, by={self.by!r}: say what was run, and what the interval is over")
        empty = [v is None for v in (self.value, self.low, self.high)]
        if (self.provenance == NO_VALUE) != all(empty) or any(empty) != all(empty) or (all(empty) and self.band):
            raise ValueError(
                f"entry {self.claim}: {self.value} [{self.low}, {self.high}], {self.provenance}, band={self.band}: None goes with the "
                f"provenance {NO_VALUE!r} and band=False, and with nothing else"
            )
        if all(empty):
            return
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            raise ValueError(f"entry {self.claim}: {self.value} [{self.low}, {self.high}] is not finite: nothing was computed")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"entry {self.claim}: {self.value} lies outside of its own interval [{self.low}, {self.high}]")

    @property
    def text(self) -> str:
        """The value with its interval, as it is printed.

        >>> Entry("A1", "packed", 3.5432, 3.5432, 3.5432, "x", 1, "counted").text
        '3.54 x'
        >>> Entry("A2", "ran", 98.75, 97.5, 99.5, "%", 1000, "answers").text
        '98.8 % [97.5, 99.5]'
        """
        if self.value is None:
            return NO_VALUE
        digits = _digits(self.value, self.low, self.high)
        shown = f"{number(self.value, digits)} {self.unit}".strip()
        return shown if self.low == self.high else f"{shown} [{number(self.low, digits)}, {number(self.high, digits)}]"


def _digits(*values: float) -> int:
    most = max(map(abs, values))
    return 0 if all(float(v).is_integer() for v in values) else 0 if most >= 1000 else 1 if most >= 20 else 2 if most >= 0.1 else 4


def number(value: float, digits: int | None = None) -> str:
    """A number as the ledger prints it: three significant digits or so, thousands apart, no minus before a zero.

    >>> number(1234.5), number(61.33), number(0.5625), number(3.0), number(-0.0001, 2)
    ('1,234', '61.3', '0.56', '3', '0.00')
    """
    digits = _digits(value) if digits is None else digits
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


@dataclass(frozen=True)
class Verdict:
    """One of `VERDICTS`, and a sentence with the numbers that gave it.

    `inside`: of a claim that takes hardware, whether it lies in the modelled band; None where it was tested, or nothing can be said.
    `share`: which part of the claimed effect the value is, 1 for all of it; None where the claim has no null or was not tested.
    """

    word: str
    why: str
    inside: bool | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.word not in VERDICTS:
            raise ValueError(f"word={self.word!r} is no verdict; there are {', '.join(VERDICTS)}")

    def __str__(self) -> str:
        if self.inside is not None:
            return f"{self.word}: {'inside' if self.inside else 'outside'} of the band"
        return self.word if self.share is None else f"{self.word} ({percent(self.share)} of the claim)"


def percent(share: float) -> str:
    """
    >>> percent(0.974), percent(-1.5), percent(0.4996)
    ('97 %', '-150 %', '49.96 %')
    """
    digits = next((d for d in (0, 1, 2) if (round(100 * share, d) >= 100 * HALF) == (share >= HALF)), 3)
    return f"{number(100 * share, digits)} %"


def judge(claim: Claim, entry: Entry | None) -> Verdict:
    """The `Verdict` that the rule of `claim` gives for `entry`: see the module.

    Raises LookupError where nothing was computed, ValueError for an entry of another claim.
    """
    if entry is None:
        raise LookupError(f"claim {claim.id} has no computed value: a claim without one gets no verdict")
    if entry.claim != claim.id:
        raise ValueError(f"the entry is of claim {entry.claim}, not of {claim.id}")
    if entry.value is None:
        if claim.kind not in _FORCED:
            raise LookupError(f"claim {claim.id} could be tested and has no computed value: it gets no verdict")
        return Verdict(_FORCED[claim.kind], f"there is {NO_VALUE}: {entry.by}.")
    least, most = claim.good
    inside = entry.low >= least and entry.high <= most
    meets = entry.low <= most and entry.high >= least
    if claim.kind in _FORCED:
        band = "modelled" if entry.provenance == "modelled" else entry.provenance
        if _FORCED[claim.kind] == NO_DATA:
            return Verdict(NO_DATA, f"{band} {entry.text}, of something else: it says nothing of the claim, {claim.wanted}.")
        if not entry.band:
            return Verdict(UNTESTED, f"{band} {entry.text}, which is no band that the claim, {claim.wanted}, could lie in.")
        return Verdict(UNTESTED, f"{band} {entry.text}; the claim, {claim.wanted}, is {_where(inside, meets)}.", meets)
    share = None if claim.null is None else _share_of(claim, entry.value)
    if inside:
        return Verdict(HOLDS, f"{entry.text} is {claim.wanted}{_within(claim)}.", share=share)
    if least <= entry.value <= most:
        why = f"{entry.text} is {claim.wanted}{_within(claim)}, but its interval reaches further: not beyond doubt."
        return Verdict(IN_PART, why, share=share)
    missed = f"{entry.text} is not {claim.wanted}{_within(claim)}"
    if share is None:
        return Verdict(NOT_HERE, f"{missed}.")
    if not _beyond(claim, entry):
        return Verdict(NOT_HERE, f"{missed}, and not beyond doubt on the claim's side of {number(claim.null)}.", share=share)
    told = f"{missed}, but on the claim's side of {number(claim.null)}: the direction holds, {percent(share)} of the size claimed"
    if share < HALF:
        return Verdict(NOT_HERE, f"{told}, which is less than half.", share=share)
    return Verdict(IN_PART, f"{told}.", share=share)


def _beyond(claim: Claim, entry: Entry) -> bool:
    """Whether the whole interval lies on that side of the null where the target is."""
    up = claim.targets[0] > claim.null
    return entry.low > claim.null if up else entry.high < claim.null


def _within(claim: Claim) -> str:
    return f" (tolerance {100 * claim.tolerance:g} %)" if claim.tolerance else ""


def _where(inside: bool, meets: bool) -> str:
    return "met by the whole band" if inside else "inside of the band" if meets else "outside of the band"


@dataclass(frozen=True)
class Line:
    """A claim with what was found and its verdict: what a cell of the notebook shows."""

    claim: Claim
    entry: Entry
    verdict: Verdict

    def rows(self) -> list[tuple[str, str]]:
        e, c = self.entry, self.claim
        found = [
            ("claim", f"{c.id}, {c.system}: {c.said} ({c.setting})"),
            ("what we ran", e.ran),
            ("found", f"{e.text}; {e.by}; n = {e.n:,}; {e.provenance}" + (f"; text {e.corpus}" if e.corpus else "")),
            *e.beside.items(),
            *([("control", e.control)] if e.control else []),
            ("judged by", f"{c.wanted}{_within(c)}" + ("" if c.null is None else f"; no effect would be {number(c.null)}")),
            *([("note", c.note)] if c.note else []),
            ("verdict", f"{self.verdict}. {self.verdict.why}"),
        ]
        return found

    def __str__(self) -> str:
        return "\n".join(f"{label:>12}  {text}" for label, text in self.rows())

    def __repr__(self) -> str:
        return f"{self.claim.id}: {self.entry.text} ({self.entry.provenance}): {self.verdict}"

    def _repr_html_(self) -> str:
        return html_table.facts(self.rows()[1:])


# -------------------------------------------------------------------------------------------------------------- claims

_COLUMNS = tuple(f.name for f in fields(Claim))
TEX_WIDTHS = (0.30, 0.18, 0.10, 0.16)  # of a line, of the columns behind the id: with what lies between columns they fill it


def read_claims(path: str | Path | None = None) -> tuple[Claim, ...]:
    """The claims of `path` (default: `data/claims.csv`), in its order. Raises ValueError for other columns, or one id twice."""
    path = Path(path) if path is not None else data_dir() / "claims.csv"
    with path.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path} has the columns {', '.join(reader.fieldnames or ())}; it needs {', '.join(_COLUMNS)}")
        found = []
        for i, row in enumerate(reader, 2):
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {i}: it has not as many fields as the head; quote a text that holds a comma")
            try:
                null, tolerance = (float(row["null"]) if row["null"] else None), float(row["tolerance"] or 0)
            except ValueError as error:
                raise ValueError(f"{path}, line {i}: null={row['null']!r}, tolerance={row['tolerance']!r} must be numbers") from error
            found.append(Claim(**(row | {"null": null, "tolerance": tolerance})))
    ids = [c.id for c in found]
    if twice := {i for i in ids if ids.count(i) > 1}:
        raise ValueError(f"{path} has the claim {sorted(twice)[0]} twice; an id names one claim")
    return tuple(found)


def claims_csv(claims: Iterable[Claim]) -> str:
    """The text that `read_claims` reads."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for c in claims:
        row = asdict(c)
        writer.writerow(row | {"null": "" if c.null is None else f"{c.null:g}", "tolerance": f"{c.tolerance:g}" if c.tolerance else ""})
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- ledger


class Ledger:
    """Claims and the entries made so far. `enter` judges one and returns its `Line`; the whole renders as HTML, LaTeX, CSV and JSON.

    What has no entry is listed as "not computed", in every form: it can't be overlooked.
    """

    def __init__(self, claims: Iterable[Claim] | None = None, entries: Iterable[Entry] = ()) -> None:
        self.claims = {c.id: c for c in (read_claims() if claims is None else claims)}
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            self.enter(entry)

    def enter(self, entry: Entry) -> Line:
        """The `Line` of `entry`, which is kept; a second one of the same claim takes its place."""
        if entry.claim not in self.claims:
            raise ValueError(f"the entry is of claim {entry.claim!r}; this ledger has {', '.join(self.claims)}")
        line = Line(self.claims[entry.claim], entry, judge(self.claims[entry.claim], entry))
        self.entries[entry.claim] = entry
        return line

    def verdict(self, claim: str) -> Verdict:
        """Raises LookupError for a claim without an entry."""
        return judge(self.claims[claim], self.entries.get(claim))

    def missing(self) -> list[str]:
        return [c for c in self.claims if c not in self.entries]

    def __iter__(self) -> Iterator[Line]:
        for claim in self.claims.values():
            if claim.id in self.entries:
                entry = self.entries[claim.id]
                yield Line(claim, entry, judge(claim, entry))

    def __len__(self) -> int:
        return len(self.entries)

    def counts(self) -> dict[str, int]:
        """{verdict: how many}, and "not computed" where some are."""
        words = [line.verdict.word for line in self]
        found = {word: words.count(word) for word in VERDICTS if word in words}
        return found | ({"not computed": len(self.missing())} if self.missing() else {})

    def table(self) -> list[dict[str, str]]:
        """A line per claim, all as text."""
        lines = []
        for c in self.claims.values():
            e = self.entries.get(c.id)
            line = {"id": c.id, "system": c.system, "claim": c.said, "what we ran": "", "ours": "", "interval": "", "n": "", "from": ""}
            line |= {"verdict": "not computed", "why": "no value was computed, so there is no verdict"}
            if e is not None:
                v = judge(c, e)
                line |= {"what we ran": e.ran, "ours": e.text, "interval": e.by, "n": f"{e.n:,}", "from": e.provenance}
                line |= {"verdict": str(v), "why": v.why}
            lines.append(line)
        return lines

    def short(self) -> list[dict[str, str]]:
        """`table` with fewer columns: for a notebook."""
        return [{k: line[k] for k in ("id", "claim", "ours", "from", "verdict")} for line in self.table()]

    def shares(self) -> dict[str, float]:
        """{claim: which part of the claimed effect was reached}, of those that were tested and have a null."""
        return {line.claim.id: line.verdict.share for line in self if line.verdict.share is not None}

    def reached(self) -> str:
        """How far what fails misses and what holds exceeds, in a sentence: computed, for nobody can guess it."""
        found = {line.claim.id: line.verdict for line in self if line.verdict.share is not None}
        parts = []
        for word in (HOLDS, IN_PART, NOT_HERE):
            mine = sorted((v.share, c) for c, v in found.items() if v.word == word)
            if mine:
                (least, a), (most, b) = mine[0], mine[-1]
                parts.append(f"{word}: {len(mine)}, with {percent(least)} ({a}) to {percent(most)} ({b}) of the figure claimed")
        near = [c for c, v in found.items() if abs(v.share - 1) < 0.1]
        close = f"; {len(near)} of {len(found)} lie within a tenth of it ({', '.join(near)})" if near else ""
        return f"Of the claims with a size that can be reached in part: {'; '.join(parts)}{close}." if parts else "None was judged yet."

    def __repr__(self) -> str:
        told = ", ".join(f"{n} {word}" for word, n in self.counts().items())
        return f"Ledger of {len(self.claims)} claims: {told}"

    def _repr_html_(self) -> str:
        return html_table.lines(self.short())

    def to_html(self) -> str:
        """A page that stands alone: nothing is loaded from anywhere. Light or dark, as the reader's system is."""
        told = "; ".join(f"{n} {word}" for word, n in self.counts().items())
        style = (
            ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:110rem;padding:0 1rem}"
            "table{border-collapse:collapse}th,td{text-align:left;vertical-align:top;border-bottom:1px solid #8888;padding:.35rem .6rem}"
            "thead th{position:sticky;top:0;background:Canvas}"
        )
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>The claims ledger</title><style>{style}</style></head><body><h1>The claims ledger</h1>"
            f"<p>{len(self.claims)} claims: {escape(told)}. Brackets are 95 % intervals, or the band of a model. The models measured are "
            "small: a claim that fails here may hold on a larger one.</p>"
            f"{html_table.lines(self.table())}</body></html>\n"
        )

    def to_latex(self) -> str:
        """A longtable in booktabs' style (\\usepackage{array,booktabs,longtable}); ASCII and LaTeX's own commands only."""
        columns = ("id", "claim", "ours", "from", "verdict")
        wide = ("l", *(rf">{{\raggedright\arraybackslash}}p{{{w:.2f}\linewidth}}" for w in TEX_WIDTHS))
        head = " & ".join(columns) + r" \\"
        rows = [" & ".join(tex(line[k]) for k in columns) + r" \\" for line in self.table()]
        return "\n".join(
            [
                rf"\begin{{longtable}}{{{''.join(wide)}}}",
                r"\toprule",
                head,
                r"\midrule",
                r"\endhead",
                *rows,
                r"\bottomrule",
                r"\end{longtable}",
                "",
            ]
        )

    def to_csv(self) -> str:
        """The lines with their numbers apart: what a spreadsheet takes, and what `read_csv` gives back."""
        out = io.StringIO()
        names = ("id", "value", "low", "high", "unit", "n", "by", "provenance", "ran", "control", "machine", "corpus", "seed", "beside")
        names += ("band", "verdict", "why")
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        for line in self:
            e = line.entry
            row = {k: getattr(e, k) for k in names if hasattr(e, k)}
            row |= {"id": e.claim, "beside": json.dumps(dict(e.beside))}
            row |= {k: "" if (v := getattr(e, k)) is None else repr(v) for k in ("value", "low", "high")}
            writer.writerow(row | {"verdict": str(line.verdict), "why": line.verdict.why})
        return out.getvalue()

    @classmethod
    def read_csv(cls, text: str, claims: Iterable[Claim] | None = None) -> "Ledger":
        """The ledger that `to_csv` wrote. Verdicts are judged anew: what the text says of them is not read."""
        found = []
        for row in csv.DictReader(io.StringIO(text)):
            read = {k: row[k] for k in ("unit", "by", "provenance", "ran", "control", "machine", "corpus")}
            read |= {k: float(row[k]) if row[k] else None for k in ("value", "low", "high")}
            read |= {"n": int(row["n"]), "beside": json.loads(row["beside"]), "band": row["band"] == "True"}
            found.append(Entry(row["id"], **read, seed=int(row["seed"]) if row["seed"] else None))
        return cls(claims, found)

    def to_json(self) -> str:
        lines = [asdict(x.entry) | {"verdict": str(x.verdict), "why": x.verdict.why} for x in self]
        return json.dumps({"format": 1, "missing": self.missing(), "entries": lines}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, claims: Iterable[Claim] | None = None) -> "Ledger":
        """Raises ValueError for what is no ledger of this format. Verdicts are judged anew."""
        return cls(claims, entries_of(text))

    def write(self, folder: str | Path) -> list[Path]:
        """The files claims.html, .tex, .csv and .json in `folder`, each written whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for suffix, text in ((".html", self.to_html()), (".tex", self.to_latex()), (".csv", self.to_csv()), (".json", self.to_json())):
            path = folder / f"claims{suffix}"
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
            made.append(path)
        return made


LIMITS = (-50.0, 250.0)  # per cent drawn by `share_figure`; what lies beyond is drawn at the edge


def share_figure(book: Ledger):
    """A plotly figure: per claim the share of the claimed effect that was reached, its interval, a marker and colour per verdict.

    Claims that have no null, or could not be tested, have no share and are not drawn. Raises LookupError where none has one.
    """
    from edgelab import plots

    lines = [line for line in book if line.verdict.share is not None]
    if not lines:
        raise LookupError("no claim of this ledger has a share that was reached; enter one that was tested and has a null")
    title = f"Share of the claimed effect that was reached (drawn from {LIMITS[0]:.0f} to {LIMITS[1]:.0f} %)"
    fig = plots.go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": title}})
    ids = [line.claim.id for line in lines]
    for name, at, dash in (("the claim", 100.0, "solid"), ("half of it", 100 * HALF, "dot")):
        fig.add_scatter(x=ids, y=[at] * len(ids), mode="lines", name=name, line={"color": plots.INK, "width": 1, "dash": dash})
    for i, word in enumerate((HOLDS, IN_PART, NOT_HERE)):
        mine = [line for line in lines if line.verdict.word == word]
        if not mine:
            continue
        ends = [sorted(100 * _share_of(x.claim, v) for v in (x.entry.low, x.entry.high)) for x in mine]
        at = [_clipped(100 * x.verdict.share) for x in mine]
        fig.add_scatter(
            x=[x.claim.id for x in mine],
            y=at,
            mode="markers",
            name=word,
            text=[f"{x.claim.id}, {x.claim.claim}: {percent(x.verdict.share)}" for x in mine],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
            marker={"color": plots.OKABE_ITO[(2, 1, 3)[i]], "symbol": plots.SYMBOLS[i], "size": 9},
            error_y={
                "type": "data",
                "array": [_clipped(high) - p for (_, high), p in zip(ends, at, strict=True)],
                "arrayminus": [p - _clipped(low) for (low, _), p in zip(ends, at, strict=True)],
                "thickness": 1.2,
            },
        )
    fig.update_xaxes(categoryorder="array", categoryarray=ids)
    return fig.update_yaxes(title="% of the effect claimed", range=[LIMITS[0] - 8, LIMITS[1] + 8])


def _share_of(claim: Claim, value: float) -> float:
    return (value - claim.null) / (claim.targets[0] - claim.null)


def _clipped(per_cent: float) -> float:
    return min(max(per_cent, LIMITS[0]), LIMITS[1])


def entries_of(text: str) -> list[Entry]:
    """The entries in the JSON of a ledger, or of the study `data/studies/claims.json`."""
    d = json.loads(text)
    if not isinstance(d, dict) or d.get("format") != 1 or not isinstance(d.get("entries"), list):
        raise ValueError("this is no ledger of format 1: it was written by another edgelab, or by something else")
    known = {f.name for f in fields(Entry)}
    return [Entry(**{k: v for k, v in e.items() if k in known}) for e in d["entries"]]


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''", "²": r"\textsuperscript{2}", "·": r"\textperiodcentered{}", "×": r"\texttimes{}", "–": "--",
    "≥": r"\ensuremath{\geq}", "≤": r"\ensuremath{\leq}", "[": "{[}", "]": "{]}",
    "°": r"\textdegree{}", "−": "-", "µ": r"\textmu{}",
}  # fmt: skip


def tex(text: str) -> str:
    """`text` for LaTeX: what means something there is escaped. Brackets go into braces, for one at a row's start would be an argument.

    >>> tex("50 % of a_b & [1, 2]")
    '50 \\\\% of a\\\\_b \\\\& {[}1, 2{]}'
    """
    return "".join(_TEX.get(c, c) for c in text)
