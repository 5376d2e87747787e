"""`edgelab ledger`: the claims of articles, what we found, and the verdicts; as a page, a LaTeX table, CSV and JSON."""

from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import Force, Threads, guarded, may_write, out_console, print_table, set_threads

app = typer.Typer()


@app.command()
@guarded
def ledger(
    only: Annotated[str | None, typer.Option("--only", help="Claims, such as A1,B3. Default: all.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for claims.html, .tex, .csv and .json.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what was measured at build: most of an hour.")] = False,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """What articles claim about models on devices, beside what was measured or modelled here, with a verdict by a stated rule."""
    if out is not None:
        may_write(out, force, ours="claims.json")
    from edgelab.claims.index import ENTRIES
    from edgelab.claims.index import ledger as run

    set_threads(threads)
    wanted = None if only is None else [c.strip().upper() for c in only.split(",") if c.strip()]
    if wanted == []:
        raise ValueError(f"--only {only!r} names no claim; give such as {','.join(list(ENTRIES)[:2])}")
    book = run(wanted, again=again)
    print_table(book.short(), "; ".join(f"{n} {word}" for word, n in book.counts().items()))
    if out is not None:
        for path in book.write(out):
            out_console.print(f"file     {path}", markup=False, soft_wrap=True)
