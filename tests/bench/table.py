"""The table of `make bench`, from its results: `python tests/bench/table.py` on the terminal, with `--markdown` for the README.

python tests/bench/table.py --markdown --shape 4096x4096 --threads 1 --tokens 1 128
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

BUSY = 0.05  # processors that other processes may keep busy before a cell is marked
RESULTS = Path(__file__).resolve().parents[2] / "runs" / "bench" / "matmul.json"


def time_text(seconds: float | None) -> str:
    """Milliseconds with three digits that count.

    >>> time_text(0.00037123), time_text(0.0123), time_text(1.5), time_text(None)
    ('0.371', '12.3', '1500', '-')
    """
    if seconds is None:
        return "-"
    ms = 1e3 * seconds
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def verdict(row: dict) -> str:
    """A peer's time over that of ours beside it, or our share of the ceiling that binds (r: read bandwidth, o: operations)."""
    if "share" in row:
        return f"{100 * row['share']:.0f} %{row['bound'][0]}"
    return f"{row['ratio']:.{2 if row['ratio'] < 10 else 1 if row['ratio'] < 100 else 0}f}x"


def groups(report: dict) -> list[list[dict]]:
    """Cells that differ in the number of tokens only, in the order measured."""
    found: dict[tuple, list[dict]] = {}
    for cell in report["cells"]:
        found.setdefault((cell["label"], cell["threads"]), []).append(cell)
    return list(found.values())


def lines(cells: list[dict]) -> list[list[str]]:
    """For each contender: its name, the one of ours it stands beside, MB per call, in cache, then time and verdict per number of tokens."""
    by_name: dict[str, dict[int, dict]] = {}
    for cell in cells:
        for row in cell["rows"]:
            by_name.setdefault(row["name"], {})[cell["tokens"]] = row
    result = []
    for name, rows in by_name.items():
        first = next(iter(rows.values()))
        shown = name if "ratio" in first else f"edgelab {name}"
        line = [shown, first.get("beside", ""), f"{first['weight_bytes'] / 1e6:.3g}", time_text(rows.get(1, {}).get("cached_seconds"))]
        for cell in cells:
            row, mark = rows[cell["tokens"]], "!" if cell["others_busy"] > BUSY else ""
            line.append(f"{time_text(row['seconds'])} {verdict(row):>6s}{mark}")
        result.append(line)
    return result


def about(report: dict, cells: list[dict]) -> str:
    """The heading of a group: what is multiplied, the ceilings, the working set."""
    c = cells[0]
    ceiling = next(found for found in report["ceilings"] if found["threads"] == c["threads"])
    threads = f"{c['threads']} thread{'s' * (c['threads'] > 1)}"
    limits = f"{ceiling['read'] / 1e9:.1f} GB/s, {ceiling['integer'] / 1e9:.0f} GOPS"
    return f"{c['label']}, {threads} (ceilings {limits}; working set {c['working_set'] / 1e6:.0f} MB)"


def notes(report: dict) -> list[str]:
    """What must be known to read the figures."""
    result = [
        f"{report['date']}, {report['machine']}, {report['simd']}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"median ms per call, weights from memory (last-level cache {report['last_level_cache'] / 2**20:.0f} MiB; "
        "'in cache': one row, one copy). "
        "x: a peer's time over that of ours beside it. %r, %o: our share of the ceiling that binds, reading or operations.",
    ]
    result += [f"left out: {name}: {why}" for name, why in report["absent"].items()]
    busy = [c["others_busy"] for c in report["cells"] if c["others_busy"] > BUSY]
    if busy:
        result.append(
            f"THE MACHINE WAS BUSY during {len(busy)} of {len(report['cells'])} measurements (marked !): other processes used "
            f"{min(busy):.2f} to {max(busy):.2f} processors. Times are too long there; on several threads they mean nothing, for threads "
            "that spin wait for those that are kept from running."
        )
    for ceiling in report["ceilings"]:
        peaks = [c["integer"] / 1e9 for c in ceiling["all"]]
        if max(peaks) > 1.1 * min(peaks):
            loop = f"the same register loop on {ceiling['threads']} thread{'s' * (ceiling['threads'] > 1)}"
            result.append(f"THE MACHINE WAS UNEVEN: {loop} gave {min(peaks):.0f} to {max(peaks):.0f} GOPS in the course of the run")
    return result


def show(report: dict, console: Console) -> None:
    """Print the table: a section for each weight and number of threads."""
    tokens = sorted({c["tokens"] for c in report["cells"]})
    for number, cells in enumerate(groups(report)):
        part = Table(box=None, pad_edge=False, show_header=number == 0, header_style="bold")
        heads = [("", 27), ("beside", 10), ("MB", 6), ("in cache", 8), *((f"{t} row{'s' * (t > 1)}", 14) for t in tokens)]
        for name, width in heads:
            part.add_column(name, justify="left" if name in ("", "beside") else "right", width=width, no_wrap=True)
        here = [c["tokens"] for c in cells]
        for line in lines(cells):
            values = dict(zip(here, line[4:], strict=True))
            style = "green" if line[0].startswith("edgelab") else None
            part.add_row(*line[:4], *(values.get(t, "") for t in tokens), style=style)
        console.print(f"\n[bold cyan]{about(report, cells)}[/]", highlight=False)
        console.print(part)
    for note in notes(report):
        console.print(note, style="bold red" if note.startswith("THE MACHINE") else "dim", highlight=False)


def markdown(report: dict, shape: str | None, threads: int | None, tokens: list[int] | None) -> str:
    """The same as Markdown, of the weights, threads and numbers of tokens asked for."""
    parts = []
    for cells in groups(report):
        cells = [c for c in cells if not tokens or c["tokens"] in tokens]
        chosen = (not shape or "x".join(map(str, cells[0]["shape"])) == shape) if cells else False
        if not chosen or (threads and cells[0]["threads"] != threads):
            continue
        heads = ["", "beside", "MB", "in cache", *(f"{c['tokens']} row{'s' * (c['tokens'] > 1)}" for c in cells)]
        rows = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *lines(cells)]
        parts.append(
            f"{about(report, cells)}\n\n" + "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in rows)
        )
    return "\n\n".join([*parts, *notes(report)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--shape", help="such as 4096x4096, or 64x1024x512 for the expert stack (default: all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, nargs="+")
    args = parser.parse_args()
    if not args.results.is_file():
        parser.error(f"{args.results} is not there; make it with: make bench")
    report = json.loads(args.results.read_text())
    if args.markdown:
        print(markdown(report, args.shape, args.threads, args.tokens))
    else:
        show(report, Console(width=max(140, Console().width)))


if __name__ == "__main__":
    main()
