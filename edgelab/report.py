"""`Report`: measured numbers as rows. Every row says of which model, on what text, how sure, and where it comes from."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Literal

from edgelab import html_table

Provenance = Literal["measured here", "measured at build", "modelled"]
PROVENANCES = ("measured here", "measured at build", "modelled")


@cache
def machine() -> str:
    """This machine in a line: processor, cores, system, Python."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


@dataclass(frozen=True)
class Row:
    """One number. `low` and `high` bound its 95 % interval (None: exact, or no interval was computed).

    `slice` is the domain or text it was measured on ("" for none), `n` the number of documents or repetitions,
    `corpus` the fingerprint of the data (`data.fingerprint`).
    """

    model: str
    metric: str
    value: float
    unit: str = ""
    slice: str = ""
    low: float | None = None
    high: float | None = None
    n: int = 1
    seed: int | None = None
    provenance: Provenance = "measured here"
    machine: str = ""
    corpus: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.provenance not in PROVENANCES:
            raise ValueError(f"provenance={self.provenance!r} is not one of {', '.join(PROVENANCES)}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low!r}, high={self.high!r}: an interval has both ends, or give neither")

    def text(self, digits: int = 3) -> str:
        """The value with its interval, as it is printed in tables.

        >>> Row("int4", "kld", 0.0512, low=0.05, high=0.0533).text()
        '0.051 [0.050, 0.053]'
        """

        def show(v: float) -> str:
            return f"{v:,.{digits}f}" if isinstance(v, float) else f"{v:,}"

        return show(self.value) + (f" [{show(self.low)}, {show(self.high)}]" if self.low is not None else "")


@dataclass(frozen=True, repr=False)
class Report:
    """Rows, in the order they were measured. Reports add up: `a + b`."""

    rows: tuple[Row, ...] = ()

    def __add__(self, other: "Report") -> "Report":
        return Report(self.rows + other.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, **equal) -> "Report":
        """The rows whose fields equal the given values: `report.where(metric="kld", slice="prose")`."""
        return Report(tuple(r for r in self.rows if all(getattr(r, k) == v for k, v in equal.items())))

    def get(self, **equal) -> Row:
        """The one row that matches. Raises LookupError when there is none or more than one."""
        rows = self.where(**equal).rows
        if len(rows) != 1:
            raise LookupError(f"{len(rows)} rows match {equal}; one was expected")
        return rows[0]

    def models(self) -> list[str]:
        return list(dict.fromkeys(r.model for r in self.rows))

    def table(self, digits: Callable[[Row], int] | int = 3) -> list[dict[str, str]]:
        """One dict per (metric, slice, provenance) with a column per model: what the CLI, the notebooks and the page print.

        Where rows of several provenances meet, the metric's name says which is which. Raises ValueError for two rows
        of the same model in one cell.
        """
        several = len({r.provenance for r in self.rows}) > 1
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        filled = set()
        for r in self.rows:
            key = (r.metric, r.slice, r.provenance)
            if (key, r.model) in filled:
                raise ValueError(
                    f"two rows say what {r.metric} of {r.model!r} is on {r.slice!r} ({r.provenance}); "
                    "a table has one cell for them: select with report.where(...), or give one model another name"
                )
            filled.add((key, r.model))
            label = f"{r.metric} ({r.provenance})" if several else r.metric
            line = lines.setdefault(key, {"metric": label, "on": r.slice, "unit": r.unit})
            line[r.model] = r.text(digits(r) if callable(digits) else digits)
        return list(lines.values())

    def to_json(self) -> str:
        """The rows as JSON. A value that is NaN or infinite becomes null (JSON knows neither) and comes back as NaN."""

        def plain(row: Row) -> dict:
            d = asdict(row)
            if not math.isfinite(row.value):
                d["value"] = None
            if row.low is not None and not (math.isfinite(row.low) and math.isfinite(row.high)):
                d["low"] = d["high"] = None
            return d

        return json.dumps({"format": 1, "rows": [plain(r) for r in self.rows]}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Raises ValueError for what is no report of this format, naming the first row that can't be read."""
        d = json.loads(text)
        version = d.get("format") if isinstance(d, dict) else None
        if version != 1:
            raise ValueError(f"report format {version!r} is not 1: it was written by another edgelab")
        if not isinstance(d.get("rows"), list):
            raise ValueError(f"the report has no list of 'rows', only {sorted(d)}")
        known, rows = {f.name for f in fields(Row)}, []
        for i, r in enumerate(d["rows"]):
            absent = [k for k in ("model", "metric", "value") if not isinstance(r, dict) or k not in r]
            if absent:
                raise ValueError(f"row {i} of the report has no {absent[0]!r}: {r!r}")
            row = {k: v for k, v in r.items() if k in known}
            rows.append(Row(**(row | {"value": math.nan if r["value"] is None else r["value"]})))
        return cls(tuple(rows))

    def __repr__(self) -> str:
        """How many rows of what; `table` and the notebook show them."""
        metrics, models = list(dict.fromkeys(r.metric for r in self.rows)), self.models()
        said = f" of {_few(models)}: {_few(metrics)}" if self.rows else ""
        return f"Report({len(self.rows)} row{'s' * (len(self.rows) != 1)}{said})"

    def _repr_html_(self) -> str:
        columns = ["metric", "on", "unit", *self.models()]
        lines = [{c: line.get(c, "") for c in columns} for line in self.table()]
        return html_table.lines(lines, "" if lines else repr(self))


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
