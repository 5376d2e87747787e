"""Every claim's function, and the entries that were measured at build: `python -m edgelab.claims.index` (half an hour on two cores).

    ENTRIES            {claim: the function of `deepseek`, `cherry`, ... that computes its entry}
    LONG               claims whose functions take longer than a lesson: measured at build, kept in data/studies/claims.json
    entry(a2, bench)   the entry of a function: computed now, or (LONG) read from that study; again=True computes it now

Verdicts are never stored: `ledger.judge` gives them from the entry and the rule in data/claims.csv, each time. The study has the form of
`edgelab.studies`, with the entries beside its report; it is written after each claim, so that an interrupted run goes on.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from tqdm.auto import tqdm

from edgelab.claims import autoglm, cherry, deepseek, devices, guide, policies, qingzhou, service
from edgelab.claims.bench import Bench, stored, study_path
from edgelab.ledger import Entry, Ledger, entries_of, read_claims
from edgelab.report import Report, Row

Function = Callable[[Bench], Entry]
_ROOMS = (deepseek, cherry, autoglm, qingzhou, guide, devices, policies, service)

# {claim: its function}, found by name: that of A1 is `a1` of one of the rooms. A claim of data/claims.csv that no room has is missing here
ENTRIES: dict[str, Function] = {c.id: getattr(room, c.id.lower()) for c in read_claims() for room in _ROOMS if hasattr(room, c.id.lower())}

LONG = frozenset(("A2", "A3", "A4", "A5", "A7", "B5", "B6", "B7", "B8", "B11", "C1", "C2", "C3", "C5", "C10", "D1", "D2", "D6"))


def claim_of(function: Function) -> str:
    """The claim that `function` is of: `deepseek.a1` is A1's. Raises ValueError for another function."""
    claim = function.__name__.upper()
    if ENTRIES.get(claim) is not function:
        raise ValueError(f"{function.__name__} computes no claim; there are {', '.join(ENTRIES)}")
    return claim


def entry(function: Function, bench: Bench, *, again: bool = False) -> Entry:
    """What `function` finds: computed now, or, of a claim in `LONG`, as it was measured at build. `again`: now in any case."""
    claim = claim_of(function)
    return compute(function, bench) if again or claim not in LONG else stored(claim)


def compute(function: Function, bench: Bench) -> Entry:
    """What `function` finds now, with the seed, and the fingerprint of the test split where text was read."""
    before = bench.reads
    made = function(bench)
    return replace(made, seed=bench.seed, corpus=bench.fingerprint if bench.reads > before else "")


def ledger(only: Iterable[str] | None = None, *, bench: Bench | None = None, again: bool = False, progress: bool = True) -> Ledger:
    """The ledger of the claims `only` (all by default), computed or as measured at build. Raises ValueError for an id that there is not."""
    bench, claims = bench or Bench(), read_claims()
    known = [c.id for c in claims]
    wanted = known if only is None else list(only)
    if unknown := [c for c in wanted if c not in known]:
        raise ValueError(f"there is no claim {unknown[0]!r}; there are {', '.join(known)}")
    book = Ledger([c for c in claims if c.id in wanted])
    bar = tqdm([c for c in wanted if c in ENTRIES], desc="claims", unit="claim", disable=not progress)
    for claim in bar:
        bar.set_postfix_str(claim)
        book.enter(entry(ENTRIES[claim], bench, again=again))
    return book


def write_study(entries: Iterable[Entry], seconds: float, path: Path | None = None) -> Path:
    """The path of the study, with these entries (labelled as measured at build) in the place of older ones of the same claims."""
    path = path or study_path()
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seconds": 0}
    found = {e.claim: e for e in entries_of(json.dumps(old))} if "entries" in old else {}
    for e in entries:
        found[e.claim] = replace(e, provenance="measured at build") if e.provenance == "measured here" else e
    order = [c.id for c in read_claims()]
    kept = sorted(found.values(), key=lambda e: order.index(e.claim))
    rows = [
        Row(e.claim, "claim", e.value, e.unit, "", e.low, e.high, e.n, e.seed, "measured at build", e.machine, e.corpus, e.by) for e in kept
    ]
    d = {"format": 1, "name": "claims", "seconds": round(old["seconds"] + seconds, 1), "curves": {}}
    d |= {"report": json.loads(Report(tuple(rows)).to_json()), "entries": [asdict(e) for e in kept]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(d, separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def main() -> None:
    import argparse

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("claims", nargs="*", help=f"claims (default: those of {', '.join(sorted(LONG))} that are missing)")
    p.add_argument("--again", action="store_true", help="all of them, also those that were measured already")
    p.add_argument("--out", type=Path, help="the file (default: data/studies/claims.json)")
    a = p.parse_args()
    if unknown := [c for c in a.claims if c not in ENTRIES]:
        p.error(f"no function computes the claim {unknown[0]!r}; there are {', '.join(ENTRIES)}")
    out = a.out or study_path()
    there = {e.claim for e in entries_of(out.read_text(encoding="utf-8"))} if out.is_file() and not a.again else set()
    bench = Bench()
    for claim in a.claims or [c for c in ENTRIES if c in LONG and c not in there]:
        began = time.monotonic()
        made = compute(ENTRIES[claim], bench)
        write_study([made], time.monotonic() - began, out)
        print(f"{claim}: {made.text} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
