"""Run the project's tables from a clean state, over seeds, and say of each cell whether it agrees with the stored one.

    runs/tables/quality/seed-0/notebook.ipynb   the run: one notebook, executed by papermill in a kernel of its own
                              /cells.json       its numbers
                              /receipt.json     code, data, machine, versions, hashes (`receipts`)
    runs/tables/quality/quality.csv .tex .html .json     all seeds together, with the verdicts
    runs/tables/quality/receipt.json                     over all of the above

A run that lies there with a receipt that still fits (same settings, seed, code, data, text, libraries, and not edited) is not run again.
One that fails is written down (seed-0.failed.txt) and the others go on.

Verdicts. `data/tables/NAME.json` holds the values of earlier runs. A cell is judged by its kind (`paper_tables`):

    counted, said    agrees if equal
    bounded          agrees if below its limit; nothing need be stored
    measured         agrees if |value - stored| <= tolerance
    time             not judged

Tolerance of a measured cell. For a seed that is stored, the same program ran on the same text, and only the order in which
floats are added can differ. How much that does is measured when values are stored: the first seed runs again with two threads, and
again with the instructions of an older processor. Let r be the largest relative change that they make in any row of the cell's column; then

    tolerance = max(SAFETY r |stored|, 1.5 step, FLOAT |stored|),    SAFETY = 3, FLOAT = 1e-4

step being one answer (or one token) of those scored, so that a single answer may turn. A column takes its worst row, since two other runs
are few; three times, since the next processor is another one still. FLOAT: sums of some thousand float32 products (6e-8 each), layer behind
layer, lose up to three digits with another library of matrix products, which no variant here stands for. For a seed that is *not* stored
the documents differ: then it is what one more draw may be, given the k stored ones with mean m and standard deviation s (Student, 95 %),

    tolerance = t(0.975, k - 1) s sqrt(1 + 1/k) + the above,    around m

Three seeds make t = 4.3, and where s is large too the interval would hold nearly anything: beyond ENOUGH = 25 % of |m| the verdict is
"too few seeds", which judges nothing. So it is with what is counted and is another number for each seed.

A cell that could be judged and of which nothing is stored is not well: a table whose values were forgotten must not pass. `new` is for
tables that have none yet: they are printed, not judged.

Where the text is another (it comes from the running Python's library), measured cells and words have nothing to agree with: "other text".
"""

import csv
import io
import json
import math
import os
import shutil
import statistics
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from tqdm.auto import tqdm

from edgelab import receipts
from edgelab.ledger import tex
from edgelab.manifest import sha256
from edgelab.paper_tables import TABLES, Cell, Made, PaperTable, grid_html, named, shown
from edgelab.paths import data_dir
from edgelab.receipts import Receipt, write_text

AGREES, DIFFERS, NO_VALUE, NOT_JUDGED, OTHER_TEXT = "agrees", "differs", "no stored value", "not judged", "other text"
TOO_FEW = "too few seeds"
VERDICTS = (AGREES, DIFFERS, NO_VALUE, TOO_FEW, NOT_JUDGED, OTHER_TEXT)
SAFETY, FLOAT = 3.0, 1e-4
ENOUGH = 0.25  # of the value: a wider tolerance for a seed that is not stored says nothing
CELL_TIMEOUT_S = 1800
MARKER = "edgelab-tables.json"  # a folder that holds it is ours to write into
# {variant: (threads, the environment)}: what stands for another machine when values are stored
VARIANTS: dict[str, tuple[int, dict[str, str]]] = {
    "two threads": (2, {}),
    "an older processor": (
        1,
        {"ATEN_CPU_CAPABILITY": "avx2", "EDGELAB_SIMD": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    ),
}
_QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


# -------------------------------------------------------------------------------------------------------- stored values


@dataclass(frozen=True)
class Stored:
    """The values of earlier runs of one table with one set of settings. `runs` {seed: {cell: value}}; `variants`: of the first seed."""

    settings: Mapping[str, object]
    text: str
    runs: Mapping[int, Mapping[str, float | int | str]]
    variants: Mapping[str, Mapping[str, float | int | str]]
    made: Mapping[str, object] = field(default_factory=dict)

    def noise(self, column: str) -> float:
        """The largest relative change that a variant makes in a row of `column`; 0 where there are none."""
        base = next(iter(self.runs.values()), {})
        found = [0.0]
        for values in self.variants.values():
            for key, b in base.items():
                if key.rpartition(" | ")[2] == column and not isinstance(b, str) and b and key in values:
                    found.append(abs(values[key] - b) / abs(b))
        return max(found)


def stored_file(name: str) -> Path:
    return data_dir() / "tables" / f"{name}.json"


def stored_of(name: str, settings: Mapping[str, object]) -> Stored | None:
    """What is stored of the table `name` with just these settings, or None."""
    path = stored_file(name)
    if not path.is_file():
        return None
    d = json.loads(path.read_text(encoding="utf-8"))
    if d.get("format") != 1:
        raise ValueError(f"{path}: format {d.get('format')!r} is not 1: it was written by another edgelab")
    for s in d["sets"]:
        if receipts.digest(s["settings"]) == receipts.digest(_plain(settings)):
            runs = {int(seed): values for seed, values in s["runs"].items()}
            return Stored(s["settings"], s["text"], runs, s["variants"], s["made"])
    return None


def tolerance(stored: Stored, cell: Cell, seed: int) -> tuple[float, float] | None:
    """(the stored value, how far from it a measured `cell` of `seed` may be) by the rule of the module; None where nothing is stored.

    >>> s = Stored({}, "", {0: {"int4 | KLD": 0.04}, 1: {"int4 | KLD": 0.05}}, {"two threads": {"int4 | KLD": 0.0404}})
    >>> [round(v, 5) for v in tolerance(s, Cell("int4", "KLD", 0.05), 0)]  # 3 x 1 % of 0.04
    [0.04, 0.0012]
    >>> value, within = tolerance(s, Cell("int4", "KLD", 0.05), 7)  # 12.7 x 0.00707 x sqrt(1.5), and 3 x 1 % of the mean
    >>> round(value, 3), round(within, 3)
    (0.045, 0.111)
    """
    known = {k: values[cell.key] for k, values in stored.runs.items() if cell.key in values}
    if not known or any(isinstance(v, str) for v in known.values()):
        return None

    def same_seed(value: float) -> float:
        return max(SAFETY * stored.noise(cell.column) * abs(value), 1.5 * cell.step, FLOAT * abs(value))

    if seed in known:
        return known[seed], same_seed(known[seed])
    if len(known) < 2:
        return None
    from scipy.stats import t

    k, mean = len(known), statistics.fmean(known.values())
    draw = float(t.ppf(0.975, k - 1)) * statistics.stdev(known.values()) * math.sqrt(1 + 1 / k)
    return mean, draw + same_seed(mean)


def _judges(stored: Stored, cell: Cell, seed: int, value: float, within: float) -> bool:
    """Whether a tolerance is narrow enough to tell anything. It always is for a stored seed, and where the stored seeds agree."""
    known = {values[cell.key] for values in stored.runs.values() if cell.key in values}
    return seed in stored.runs or len(known) == 1 or within <= ENOUGH * abs(value)


@dataclass(frozen=True)
class Judged:
    """A cell with its verdict. `stored`, `within`: what it was held against, where it was."""

    cell: Cell
    seed: int
    verdict: str
    stored: float | int | str | None = None
    within: float | None = None

    @property
    def why(self) -> str:
        """
        >>> judge(Cell("int4", "bytes", 10, "counted"), 0, Stored({}, "", {0: {"int4 | bytes": 12}}, {}), "").why
        '10, stored is 12; it must be equal'
        """
        c = self.cell
        if self.verdict == NOT_JUDGED:
            return f"{c.text}, a time"
        if c.kind == "bounded":
            return f"{c.text}, at most {shown(c.limit)} is allowed"
        if self.verdict == TOO_FEW:
            allowed = (
                f" {shown(self.stored)}, and one more draw may be {shown(self.within)} either way" if self.within else " is not enough"
            )
            return f"{c.text}, not one of the stored seeds; what they give{allowed}"
        if self.stored is None:
            return f"{c.text}, nothing is stored"
        rule = f"{shown(self.within)} either way is allowed" if self.within else "it must be equal"
        return f"{shown(c.value)}, stored is {shown(self.stored)}; {rule}"


def judge(cell: Cell, seed: int, stored: Stored | None, text: str) -> Judged:
    """The verdict on `cell` of `seed`; `text`: the fingerprint of the text it was measured on, "" for a table that reads none."""
    if cell.kind == "time":
        return Judged(cell, seed, NOT_JUDGED)
    if cell.kind == "bounded":
        return Judged(cell, seed, AGREES if cell.value <= cell.limit else DIFFERS)
    if stored is None:
        return Judged(cell, seed, NO_VALUE)
    if cell.kind == "measured":
        found = tolerance(stored, cell, seed)
        if found is None:
            one = any(isinstance(values.get(cell.key), int | float) for values in stored.runs.values())
            return Judged(cell, seed, TOO_FEW if one and seed not in stored.runs else NO_VALUE)
        value, within = found
        if text != stored.text:
            return Judged(cell, seed, OTHER_TEXT, value, within)
        if not _judges(stored, cell, seed, value, within):
            return Judged(cell, seed, TOO_FEW, value, within)
        return Judged(cell, seed, AGREES if abs(cell.value - value) <= within else DIFFERS, value, within)
    known = {values[cell.key] for k, values in stored.runs.items() if cell.key in values and (k == seed or seed not in stored.runs)}
    if len(known) != 1:  # none, or another one for each seed
        return Judged(cell, seed, TOO_FEW if known else NO_VALUE)
    (value,) = known
    if cell.kind == "said" and text != stored.text:
        return Judged(cell, seed, OTHER_TEXT, value)
    return Judged(cell, seed, AGREES if _equal(cell.value, value) else DIFFERS, value, 0.0)


def _equal(a, b) -> bool:
    """Equal, or floats that differ in the last bits of a quotient."""
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12))


def _plain(settings: Mapping) -> dict:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps({k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}))


# ------------------------------------------------------------------------------------------------------------- a run


def notebook_of(name: str):
    """The notebook (nbformat, not executed) that measures the table `name`: papermill fills in its parameters."""
    import nbformat.v4 as v4

    table = named(name)
    lead = f"# {table.title}\n\n{table.make.__doc__.strip()}\n\nWritten and run by `edgelab reproduce {name}`."
    parameters = f'table = "{name}"\nseed = 0\nsettings = {dict(_plain(table.full))!r}\nthreads = 1\nvariant = ""'
    measure = "made = paper_tables.run(table, seed, settings, threads)\nseconds = time.perf_counter() - began\nmade"
    cells = [
        v4.new_markdown_cell(lead, id="title"),
        v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("import time\n\nfrom edgelab import paper_tables\n\nbegan = time.perf_counter()", id="imports"),
        v4.new_code_cell(measure, id="measure"),
        v4.new_code_cell('paper_tables.keep(made, ".", seed, settings, threads, seconds, variant).facts()', id="receipt"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k, None) if v is None else os.environ.update({k: v})


def run_one(name: str, seed: int, settings: Mapping, folder: Path, *, threads: int = 1, variant: str = "", **environment: str) -> Receipt:
    """The receipt of one run: a fresh kernel in a fresh folder, which then becomes `folder`. What lay there goes.

    Raises what papermill raises, its message with the cell's own; `folder` is then as it was.
    """
    import papermill

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        given = {"table": name, "seed": seed, "settings": _plain(settings), "threads": threads, "variant": variant}
        with _environment(**_QUIET, OMP_NUM_THREADS=str(threads), **environment):
            papermill.execute_notebook(
                notebook_of(name), str(staging / "notebook.ipynb"), parameters=given, cwd=str(staging), kernel_name="python3",
                progress_bar=False, execution_timeout=CELL_TIMEOUT_S, log_output=False, extra_arguments=["--IPKernelApp.log_level=50"],
                **_transport(),
            )  # fmt: skip
        made = Receipt.read(staging)
        if folder.exists():
            shutil.rmtree(folder)
        os.chmod(staging, 0o755)  # mkdtemp's folders are private
        staging.rename(folder)
        return made
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _transport() -> dict:
    """Talk to the kernel by sockets of the file system where their names are short enough, so that no port is opened."""
    from jupyter_core.paths import jupyter_runtime_dir
    from traitlets.config import Config

    if os.name != "posix" or len(jupyter_runtime_dir()) > 48:  # a name holds 107 characters at most, the kernel's id is 50 of them
        return {}
    return {"config": Config({"KernelManager": {"transport": "ipc"}})}


def fits(folder: Path, name: str, seed: int, settings: Mapping, threads: int) -> list[str]:
    """Why the run in `folder` is not the one that would be made now, a sentence each; empty if it is."""
    try:
        told = Receipt.read(folder)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    wrong = []
    if (told.table, told.seed, told.variant) != (name, seed, ""):
        wrong.append(f"it is of {told.table}, seed {told.seed} {told.variant}".rstrip())
    if receipts.digest(_plain(told.settings)) != receipts.digest(_plain(settings)) or told.threads != threads:
        wrong.append("it had other settings")
    return wrong + told.edited(folder) + told.stale()


# ------------------------------------------------------------------------------------------------------- seeds together


@dataclass(frozen=True, repr=False)
class Table:
    """The runs of one table, a `Made` per seed, and how each cell was judged."""

    name: str
    title: str
    runs: Mapping[int, Made]
    judged: tuple[Judged, ...]

    def __repr__(self) -> str:
        return f"{self.title}, seeds {', '.join(map(str, self.runs))}: {self.verdict_text()}"

    def counts(self) -> dict[str, int]:
        found = Counter(j.verdict for j in self.judged)
        return {v: found[v] for v in VERDICTS if found[v]}

    def differing(self) -> list[Judged]:
        return [j for j in self.judged if j.verdict == DIFFERS]

    def missing(self) -> list[Judged]:
        """What could be judged, had somebody stored a value."""
        return [j for j in self.judged if j.verdict == NO_VALUE]

    def lines(self) -> list[dict[str, object]]:
        """A dict per cell, the seeds together: mean and spread of numbers, a word if all say the same."""
        by_key: dict[str, list[Judged]] = {}
        for j in self.judged:
            by_key.setdefault(j.cell.key, []).append(j)
        lines = []
        for found in by_key.values():
            first, values = found[0].cell, [j.cell.value for j in found]
            line = {"row": first.row, "column": first.column, "kind": first.kind, "seeds": " ".join(str(j.seed) for j in found)}
            line["values"] = " ".join(repr(v) if not isinstance(v, str) else v for v in values)
            if isinstance(first.value, str):
                line |= {"value": values[0] if len(set(values)) == 1 else " / ".join(dict.fromkeys(values)), "sd": None}
            else:
                same = len(set(values)) == 1
                line |= {
                    "value": values[0] if same else statistics.fmean(values),
                    "sd": statistics.stdev(values) if len(values) > 1 else None,
                }
            known = [j.stored for j in found if j.stored is not None]
            numbers = [v for v in known if not isinstance(v, str)]
            line["stored"] = statistics.fmean(numbers) if numbers else known[0] if known else None
            line["within"] = max((j.within for j in found if j.within is not None), default=None)
            line["verdict"] = next(
                v for v in (DIFFERS, OTHER_TEXT, NO_VALUE, TOO_FEW, AGREES, NOT_JUDGED) if v in {j.verdict for j in found}
            )
            lines.append(line)
        return lines

    def _shown(self) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
        lines = self.lines()
        cells = {(x["row"], x["column"]): shown(x["value"]) + (f" ± {shown(x['sd'])}" if x["sd"] else "") for x in lines}
        return list(dict.fromkeys(x["row"] for x in lines)), list(dict.fromkeys(x["column"] for x in lines)), cells

    def to_csv(self) -> str:
        out = io.StringIO()
        lines = self.lines()
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: "" if v is None else v if isinstance(v, str) else repr(v) for k, v in line.items()})
        return out.getvalue()

    def to_latex(self) -> str:
        """A tabular in booktabs' style (\\usepackage{booktabs}); ± is the standard deviation over seeds."""
        rows, columns, cells = self._shown()

        def written(text: str) -> str:
            return tex(text).replace("±", r"$\pm$").replace("µ", r"\textmu{}")

        body = [" & ".join([written(r), *(written(cells.get((r, c), "")) for c in columns)]) + r" \\" for r in rows]
        head = " & ".join(["", *map(written, columns)]) + r" \\"
        seeds = ", ".join(map(str, self.runs))
        return "\n".join(
            [
                f"% {self.title}; seeds {seeds}; {self.verdict_text()}",
                rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )

    def verdict_text(self) -> str:
        return ", ".join(f"{n} {verdict}" for verdict, n in self.counts().items())

    def _repr_html_(self) -> str:
        rows, columns, cells = self._shown()
        verdicts = {(x["row"], x["column"]): x["verdict"] for x in self.lines()}
        marks = {
            AGREES: "",
            DIFFERS: " <b>differs</b>",
            NO_VALUE: " <i>nothing stored</i>",
            TOO_FEW: " <i>too few seeds</i>",
            NOT_JUDGED: "",
            OTHER_TEXT: " <i>other text</i>",
        }
        grid = grid_html(rows, columns, {k: escape(text) + marks[verdicts[k]] for k, text in cells.items()})
        return f"{grid}<p>{escape(self.title)}. Seeds {', '.join(map(str, self.runs))}. Cells: {escape(self.verdict_text())}.</p>"

    def to_html(self, facts: Mapping[str, str]) -> str:
        """A page that stands alone: nothing is loaded from anywhere. Light or dark, as the reader's system is."""
        style = (
            ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}"
            "table{border-collapse:collapse;display:block;overflow-x:auto}th,td{border-bottom:1px solid #8888;padding:.3rem .6rem}"
            "dt{font-weight:600}dd{margin:0 0 .4rem;overflow-wrap:anywhere}"
        )
        told = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        worse = "".join(f"<li>{escape(j.cell.key)}, seed {j.seed}: {escape(j.why)}</li>" for j in self.differing())
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
            f"<title>{escape(self.title)}</title><style>{style}</style></head><body><h1>{escape(self.title)}</h1>{self._repr_html_()}"
            + (f"<h2>What differs</h2><ul>{worse}</ul>" if worse else "")
            + f"<h2>Receipt</h2><dl>{told}</dl></body></html>\n"
        )

    def to_json(self) -> str:
        d = {
            "format": 1,
            "name": self.name,
            "title": self.title,
            "seeds": list(self.runs),
            "verdicts": self.counts(),
            "cells": self.lines(),
        }
        return json.dumps(d, indent=1, allow_nan=False) + "\n"


def gather(folder: Path, stored: Stored | None = None) -> Table:
    """The runs below `folder` (its seed-N) as one table, judged by `stored`, or by what data/tables holds for their settings.

    Raises FileNotFoundError where there is none, ValueError where they are of several tables or settings.
    """
    told = {int(p.name.removeprefix("seed-")): Receipt.read(p) for p in sorted(folder.glob("seed-*")) if p.is_dir()}
    if not told:
        raise FileNotFoundError(f"{folder} holds no finished run (seed-N); `edgelab reproduce {folder.name}` makes them")
    told = dict(sorted(told.items()))
    kinds = {(r.table, receipts.digest(_plain(r.settings))) for r in told.values()}
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds runs of several tables or settings; run them into a folder of their own")
    first = next(iter(told.values()))
    runs = {seed: Made.from_json((folder / f"seed-{seed}" / "cells.json").read_text(encoding="utf-8")) for seed in told}
    stored = stored or stored_of(first.table, first.settings)
    judged = tuple(judge(c, seed, stored, told[seed].text) for seed, made in runs.items() for c in made.cells)
    return Table(first.table, runs[first.seed if first.seed in runs else min(runs)].title, runs, judged)


_WRITERS = ("reproduce.py", "paper_tables.py", "ledger.py")  # what decides how the files look, besides what measured the cells


def _texts(table: Table, first: Receipt) -> dict[str, str]:
    """{file: what is in it}; `first`: the receipt of the first seed, whose facts the page shows."""
    texts = {".csv": table.to_csv(), ".tex": table.to_latex(), ".html": table.to_html(first.facts()), ".json": table.to_json()}
    return {f"{table.name}{suffix}": text for suffix, text in texts.items()}


def write_table(folder: Path) -> Table:
    """The runs below `folder` as one table, with its files (.csv, .tex, .html, .json) and a receipt over all of them."""
    table = gather(folder)
    told = [Receipt.read(folder / f"seed-{seed}") for seed in table.runs]
    settings = dict(told[0].settings) | {"seeds": list(table.runs)}
    data = {k: v for r in told for k, v in r.data.items()}
    if (path := stored_file(table.name)).is_file():
        data |= {f"tables/{path.name}": sha256(path)}
    code = {k: v for r in told for k, v in r.code.items()} | {name: sha256(Path(__file__).with_name(name)) for name in _WRITERS}
    whole = Receipt(
        table.name, None, settings, told[0].threads, code=code, data=data, text=told[0].text,
        wall_seconds=round(sum(r.wall_seconds for r in told), 2),
    )  # fmt: skip
    texts = _texts(table, told[0])
    for name, text in texts.items():
        write_text(folder / name, text)
    files = list(texts)
    files += [f"seed-{seed}/{name}" for seed in table.runs for name in ("cells.json", "receipt.json", "notebook.ipynb")]
    receipts.write(folder, whole, files)
    return table


# --------------------------------------------------------------------------------------------------------- the door


@dataclass(frozen=True)
class Outcome:
    """What became of a table. `ran`, `kept`: seeds; `table` None where nothing of it is there; `remarks`: failures, edits, staleness.

    `new`: cells without a stored value are expected.
    """

    name: str
    table: Table | None
    ran: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    new: bool = False

    @property
    def well(self) -> bool:
        """Whether nothing failed, nothing differs, nothing was edited, and nothing went unjudged for want of a stored value."""
        return self.table is not None and not self.remarks and not self.table.differing() and not self._unjudged()

    def _unjudged(self) -> int:
        return 0 if self.new or self.table is None else len(self.table.missing())

    def line(self) -> dict[str, str]:
        counts = self.table.counts() if self.table else {}
        line = {"table": self.name, "seeds": " ".join(map(str, self.table.runs)) if self.table else ""}
        line |= {v: str(counts.get(v, 0)) for v in VERDICTS}
        n = self._unjudged()
        unjudged = [f"{n} cell{'s'[: n != 1]} could not be judged: no value is stored"] if n else []
        return line | {"remark": "; ".join([*self.remarks, *unjudged])}


def chosen(names: Iterable[str], quick: bool) -> dict[str, tuple[PaperTable, Mapping]]:
    """{table: (it, its settings)} of `names`, or of all (`quick`: of those that have quick settings). Raises ValueError."""
    names = list(dict.fromkeys(names))
    found = {}
    for name in names or TABLES:
        table = named(name)
        if quick and table.quick is None:
            if names:
                has = ", ".join(k for k, t in TABLES.items() if t.quick is not None)
                raise ValueError(f"table {name!r} has no quick form; there is one of {has}")
            continue
        found[name] = (table, table.quick if quick else table.full)
    return found


def reproduce(
    names: Iterable[str] = (),
    *,
    seeds: int | Sequence[int] = 3,
    out: str | Path = "runs/tables",
    quick: bool = False,
    threads: int = 1,
    again: bool = False,
    new: bool = False,
    progress: bool = True,
) -> list[Outcome]:
    """An `Outcome` per table of `names` (all by default): run what is not there yet, write the tables, judge their cells.

    `seeds`: how many, or which; a table that no seed changes runs once. `again`: also what is there. `new`: cells without a stored
    value are no failure. Raises ValueError for an unknown table or seeds below 1, FileExistsError for a folder with other things in it.
    """
    wanted = chosen(names, quick)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or min(numbers) < 0:
        raise ValueError(f"seeds={seeds!r}: give at least one, from 0 on")
    if threads < 1:
        raise ValueError(f"threads={threads}: at least one is needed")
    out = Path(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise FileExistsError(f"{out} was not made by `edgelab reproduce` (it holds no {MARKER}); choose another place for the tables")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARKER, json.dumps({"format": 1, "made by": "edgelab reproduce"}) + "\n")
    todo = [(name, seed) for name, (table, _) in wanted.items() for seed in (numbers if table.seeded else numbers[:1])]
    ran: dict[str, list[int]] = {name: [] for name in wanted}
    kept: dict[str, list[int]] = {name: [] for name in wanted}
    failed: dict[str, list[str]] = {name: [] for name in wanted}
    with tqdm(todo, desc="tables", unit="run", disable=not progress) as bar:
        for name, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            folder, (_, settings) = out / name / f"seed-{seed}", wanted[name]
            note = folder.with_name(f"{folder.name}.failed.txt")
            note.parent.mkdir(exist_ok=True)
            note.unlink(missing_ok=True)
            if not again and not fits(folder, name, seed, settings, threads):
                kept[name].append(seed)
                continue
            shutil.rmtree(folder, ignore_errors=True)  # what does not fit must not be taken for a result, should the new run fail
            try:
                run_one(name, seed, settings, folder, threads=threads)
                ran[name].append(seed)
            except Exception as error:  # whatever a table does, the others go on
                write_text(note, traceback.format_exc())
                said = [line for line in str(error).strip().splitlines() if line.strip()]
                failed[name].append(f"seed {seed} failed: {said[-1] if said else type(error).__name__} (see {note})")
    outcomes = []
    for name, (_, settings) in wanted.items():
        mine = {f"seed-{seed}" for seed in (*ran[name], *kept[name])}
        for other in (out / name).glob("seed-*"):  # of seeds that were not asked for: with those that fit they stand in one table
            number = other.name.removeprefix("seed-")
            if other.is_dir() and other.name not in mine and (not number.isdigit() or fits(other, name, int(number), settings, threads)):
                shutil.rmtree(other)
        try:
            made = write_table(out / name)
        except FileNotFoundError:
            made = None
        outcomes.append(Outcome(name, made, tuple(ran[name]), tuple(kept[name]), tuple(failed[name]), new))
    return outcomes


def verify(out: str | Path = "runs/tables", *, new: bool = False) -> list[Outcome]:
    """What the written tables below `out` are worth, from the files alone: nothing is run.

    Each is judged anew by the stored values; `new`: a cell without one is no failure. A remark says which file was edited or is gone, that
    the table does not follow from its cells, or that other code, data, text or libraries made it. Raises FileNotFoundError where there
    is no table.
    """
    out = Path(out)
    folders = sorted({p.parent.parent for p in out.glob("*/seed-*/*")} | {p.parent for p in out.glob(f"*/{receipts.NAME}")})
    folders = [f for f in folders if not f.name.startswith((".", "seed-"))]
    if not folders:
        raise FileNotFoundError(f"{out} holds no tables; `edgelab reproduce --out {out}` makes them")
    outcomes = []
    for folder in folders:
        table, remarks = None, [f"{p.name.removesuffix('.failed.txt')} failed" for p in sorted(folder.glob("*.failed.txt"))]
        try:
            whole = Receipt.read(folder)
            remarks += whole.edited(folder) + whole.stale()
            table = gather(folder)
            for seed in table.runs:
                inner = folder / f"seed-{seed}"
                remarks += [f"seed-{seed}/{what}" for what in Receipt.read(inner).edited(inner)]
            remarks += _follows(folder, table, whole)
        except (FileNotFoundError, ValueError, KeyError) as error:
            remarks.append(str(error))
        outcomes.append(
            Outcome(folder.name, table, kept=tuple(table.runs) if table else (), remarks=tuple(dict.fromkeys(remarks)), new=new)
        )
    return outcomes


_VERDICT_COLUMNS = ("stored", "within", "verdict")  # they follow from the stored values, which may be newer than the file


def _follows(folder: Path, table: Table, whole: Receipt) -> list[str]:
    """Whether the files are what the cells of the seeds give, byte for byte: whoever edits one and both receipts is found here.

    Where the stored values or the code that writes are others by now (a remark of its own says so), verdicts and form may have changed with
    them: then the values in the CSV and the rows in the LaTeX are compared.
    """
    key, path = f"tables/{table.name}.json", stored_file(table.name)
    now, told = sha256(path) if path.is_file() else None, whole.data.get(key)
    wrong = []
    if told is None and now is not None:
        wrong.append(
            "values are stored that its receipt does not name: `edgelab reproduce` writes the table anew, and runs nothing for that"
        )
    whole_files = told == now and all(whole.code.get(name) == sha256(Path(__file__).with_name(name)) for name in _WRITERS)
    if not set(_WRITERS) <= set(whole.code):
        wrong.append("its receipt does not say what code wrote the table: `edgelab reproduce` writes it anew, and runs nothing for that")
    first = Receipt.read(folder / f"seed-{min(table.runs)}")
    for name, made in _texts(table, first).items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is gone")
            continue
        there = (folder / name).read_bytes().decode("utf-8", errors="replace")
        if whole_files and there != made:
            wrong.append(f"{name} does not follow from its cells{_where(there, made)}")
        elif not whole_files and name.endswith((".csv", ".tex")) and _values(name, there) != _values(name, made):
            wrong.append(f"{name} does not follow from its cells")
    return wrong


def _values(name: str, text: str) -> list:
    """What is in a CSV or LaTeX file without what follows from stored values: rows without verdicts, lines without the comment."""
    if name.endswith(".csv"):
        return [{k: v for k, v in row.items() if k not in _VERDICT_COLUMNS} for row in csv.DictReader(io.StringIO(text))]
    return [line for line in text.splitlines() if not line.startswith("%")]


def _where(there: str, made: str) -> str:
    lines = enumerate(zip(there.splitlines(), made.splitlines(), strict=False), 1)
    return next((f" (line {i})" for i, (a, b) in lines if a != b), "")


# ------------------------------------------------------------------------------------------------------ storing values


def store(name: str, *, seeds: int = 3, quick: bool = False, work: str | Path = ".pretrain/tables", threads: int = 1) -> Path:
    """The path in data/tables with the values of `seeds` runs of the table `name`, and of the first seed's variants.

    Runs that lie in `work` and fit are taken. The older values of the same settings go, those of others stay.
    """
    from edgelab.kernels import simd

    table, settings = chosen([name], quick)[name]
    root = Path(work) / ("quick" if quick else "full") / name
    runs, told = {}, None
    for seed in range(seeds if table.seeded else 1):
        folder = root / f"seed-{seed}"
        if fits(folder, name, seed, settings, threads):
            run_one(name, seed, settings, folder, threads=threads)
        runs[seed], told = Made.from_json((folder / "cells.json").read_text(encoding="utf-8")), told or Receipt.read(folder)
    variants = {}
    if any(c.kind == "measured" for c in runs[0].cells):
        for variant, (n, environment) in VARIANTS.items():
            if environment.get("EDGELAB_SIMD", "avx2") not in simd.ways():
                continue  # another kind of processor
            folder = root / variant.replace(" ", "-")
            if not (folder / receipts.NAME).is_file() or Receipt.read(folder).stale():
                run_one(name, 0, settings, folder, threads=n, variant=variant, **environment)
            variants[variant] = Made.from_json((folder / "cells.json").read_text(encoding="utf-8"))

    def values(made: Made, *kinds: str) -> dict:
        return {c.key: c.value for c in made.cells if c.kind in kinds}

    made = {"code_sha256": told.code_sha256, "machine": told.machine, "kernels": told.kernels, "packages": dict(told.packages)}
    made |= {"python": told.python, "threads": told.threads, "written": told.written, "data": dict(told.data)}
    entry = {
        "settings": _plain(settings),
        "text": told.text,
        "runs": {str(seed): values(m, "measured", "counted", "said") for seed, m in runs.items()},
        "variants": {v: values(m, "measured") for v, m in variants.items()},
        "made": made,
    }
    path = stored_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.is_file() else []
    known = {receipts.digest(_plain(s)) for s in (table.full, table.quick) if s is not None}  # settings that nobody asks for any more go
    sets = [s for s in old if receipts.digest(s["settings"]) in known - {receipts.digest(_plain(settings))}]
    text = json.dumps({"format": 1, "table": name, "sets": [*sets, entry]}, indent=1, allow_nan=False)
    return write_text(path, text + "\n")


def main() -> None:
    import argparse

    p = argparse.ArgumentParser(prog="python -m edgelab.reproduce", description="Store the tables' values in data/tables.")
    p.add_argument("names", nargs="*", help=f"tables (default: all): {', '.join(TABLES)}")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="the quick forms: one seed")
    p.add_argument("--work", type=Path, default=Path(".pretrain/tables"), help="the runs; those that fit are not made again")
    a = p.parse_args()
    for name in tqdm(list(chosen(a.names, a.quick)), unit="table"):
        print(store(name, seeds=1 if a.quick else a.seeds, quick=a.quick, work=a.work), flush=True)
    print("now: python -m edgelab.manifest --write")


if __name__ == "__main__":
    main()
