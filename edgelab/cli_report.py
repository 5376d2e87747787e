"""`edgelab report`: one HTML file out of stored results, that opens from a disk and asks nobody for anything.

From reports and bundles: the page that `edgelab evaluate --out` writes, over all of them together. With `--explorer`: the trade-off
explorer over a stored sweep, with its controls, without Python behind it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import Force, guarded, may_write, out_console
from edgelab.recipe import Recipe
from edgelab.report import Report, Row

app = typer.Typer()


@dataclass(frozen=True)
class Source:
    """What one argument holds: rows, and of a bundle its audit and its recipe."""

    name: str
    report: Report
    coverage: object = None
    recipe: Recipe | None = None


@app.command()
@guarded
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Reports (.json, as `edgelab evaluate --out` writes them) and bundles, any number of each.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The .html file to write.")] = Path("report.html"),
    explorer: Annotated[bool, typer.Option("--explorer", help="The trade-off explorer over a stored sweep instead.")] = False,
    sweep: Annotated[
        Path | None, typer.Option("--sweep", help="With --explorer: a sweep (.parquet) of your own. Default: the stored one.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="The page's heading.")] = None,
    force: Force = False,
) -> None:
    """One HTML file that works offline: all the numbers of reports and bundles, or the trade-off explorer over a sweep."""
    results = results or []
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {out} must end in .html, for browsers go by that")
    if explorer and results:
        raise ValueError(f"--explorer shows a sweep, not {results[0]}: name it with --sweep FILE, or leave out --explorer")
    if sweep is not None and not explorer:
        raise ValueError(f"--sweep {sweep} goes with --explorer")
    if not explorer and not results:
        raise ValueError("name at least one report (.json) or bundle; or give --explorer for the trade-off explorer over the stored sweep")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {out / 'report.html'}")
    may_write(out, force, ours="edgelab.json", models=results)
    path = _explorer(out, sweep, title) if explorer else _report(out, results, title)
    out_console.print(f"page     {path.resolve().as_uri()}\nsize     {path.stat().st_size / 1e6:.2f} MB", markup=False, soft_wrap=True)


def _explorer(out: Path, sweep: Path | None, title: str | None) -> Path:
    from edgelab import explorer_page
    from edgelab.sweep_table import Sweep

    return explorer_page.write(out, Sweep.read(sweep), **({} if title is None else {"title": title}))


def _report(out: Path, results: list[Path], title: str | None) -> Path:
    from edgelab import page, plots, words

    sources = _named([read(path) for path in results])
    merged = merge({s.name: s.report for s in sources})
    if not merged.rows:
        raise ValueError(f"{', '.join(map(str, results))}: no row in any of them, so there is nothing to show")
    recipes = {s.name: s.recipe for s in sources if s.recipe is not None}
    machines = Counter(r.machine or "not stated" for r in merged)
    facts = {"read from": ", ".join(map(str, results))}
    facts |= {"machine": "; ".join(f"{name} ({n} rows)" for name, n in machines.most_common())}
    facts |= {"fingerprint of the text": ", ".join(sorted({r.corpus for r in merged if r.corpus})) or "not stated"}
    facts |= {"seed": ", ".join(map(str, sorted({r.seed for r in merged if r.seed is not None}))) or "not stated"}
    sections = page.standard_sections(merged, recipes=recipes, facts=facts)
    for s in sources:
        if s.coverage is not None and s.coverage.rows:
            figure = page.Plot(plots.layer_bytes(s.coverage), plots.say_layer_bytes(s.coverage))
            parts = (words.say_coverage(s.coverage), page.coverage_table(s.coverage), figure, page.tensors_table(s.coverage))
            sections.insert(-1, page.Section(f"Coverage audit of {s.name}", parts))
    made = "on one machine" if len(machines) == 1 else f"on {len(machines)} machines"
    lead = f"{len(merged.rows)} numbers of {', '.join(merged.models())}, measured before, {made} (named at the end), and put together here."
    return page.write(out, title or "edgelab report", lead, sections)


def read(path: Path) -> Source:
    """The rows of a report's file or of a bundle. Raises ValueError or FileNotFoundError that names what is wrong with `path`.

    A bundle that was never evaluated still says what it weighs.
    """
    if path.is_dir():
        return _bundle(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    try:
        return Source(path.stem, Report.from_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a report: {error}; `edgelab evaluate MODEL --out report.json` writes one") from error


def _bundle(folder: Path) -> Source:
    import json

    from edgelab.bundle import read_manifest
    from edgelab.methods.coverage import Coverage

    manifest = read_manifest(folder)
    try:
        recipe, coverage = Recipe.from_json(json.dumps(manifest["recipe"])), Coverage.from_dict(manifest["coverage"])
        rows = Report() if manifest.get("report") is None else Report.from_json(json.dumps(manifest["report"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its manifest cannot be read ({error}); was it written by another edgelab?") from error
    if not rows.rows:
        size = coverage.predicted_bytes if coverage.file_bytes is None else coverage.file_bytes
        unmeasured = {"provenance": "measured at build", "note": "never evaluated; the bytes that its manifest states"}
        rows = Report(
            (
                Row(folder.name, "weight_bytes", float(size), "B", **unmeasured),
                Row(folder.name, "bits_per_weight", coverage.bits_per_weight, **unmeasured),
            )
        )
    return Source(folder.resolve().name, rows, coverage, recipe)


def _named(sources: list[Source]) -> list[Source]:
    """The sources, with a number behind a name that two of them have."""
    seen: Counter[str] = Counter()
    found = []
    for s in sources:
        seen[s.name] += 1
        found.append(s if seen[s.name] == 1 else replace(s, name=f"{s.name} #{seen[s.name]}"))
    return found


def merge(reports: dict[str, Report]) -> Report:
    """All rows of several reports. A row that stands in two of them is taken once.

    Where two say different things of a model of the same name, the later one's model is called "model (report)": in a table one
    cell holds one number.

    >>> a, b = Report((Row("fp", "flips", 0.0), Row("int4", "flips", 0.1))), Report((Row("fp", "flips", 0.0), Row("int4", "flips", 0.2)))
    >>> [(r.model, r.value) for r in merge({"a": a, "b": b})]
    [('fp', 0.0), ('int4', 0.1), ('int4 (b)', 0.2)]
    """
    kept: dict[tuple, Row] = {}
    for source, each in reports.items():
        clash = {r.model for r in each if not _same(kept.get(_cell(r), r), r)}
        for r in each:
            row = replace(r, model=f"{r.model} ({source})") if r.model in clash else r
            kept.setdefault(_cell(row), row)
    return Report(tuple(kept.values()))


def _cell(row: Row) -> tuple:
    return row.model, row.metric, row.slice, row.provenance


def _same(a: Row, b: Row) -> bool:
    """Whether two rows say the same; NaN is itself."""
    return repr(a) == repr(b)
