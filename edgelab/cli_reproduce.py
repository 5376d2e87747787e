"""`edgelab reproduce`, `edgelab verify-tables`: the project's tables run anew with receipts, and what written ones are worth."""

from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import CheckFailedError, guarded, out_console, print_table

app = typer.Typer()
OUT = Path("runs/tables")
NEW = "Tables without stored values are printed, not judged: such cells are no failure."


@app.command()
@guarded
def reproduce(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables, such as quality or methods. Default: all.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each table: other documents, calibration, learning.", min=1)] = 3,
    out: Annotated[Path, typer.Option("--out", help="Folder; runs in it that still fit are not made again.")] = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="The short forms of four tables, one seed: a minute or two.")] = False,
    threads: Annotated[int, typer.Option("--threads", help="Of each run.", min=1)] = 1,
    again: Annotated[bool, typer.Option("--again", help="Run also what is there.")] = False,
    new: Annotated[bool, typer.Option("--new", help=NEW)] = False,
) -> None:
    """Run the paper-style tables from a clean state, each in a kernel of its own, and judge every cell by the stored values.

    Writes CSV, LaTeX, HTML and JSON with receipts. Fails (exit code 1) if a cell differs or has no stored value, or a run fails; the other
    tables go on.
    """
    from edgelab.reproduce import reproduce as run

    outcomes = run(tables or (), seeds=1 if quick else seeds, out=out, quick=quick, threads=threads, again=again, new=new)
    for o in outcomes:
        told = f"ran seeds {', '.join(map(str, o.ran))}" if o.ran else "nothing to run"
        told += f"; seeds {', '.join(map(str, o.kept))} were there" if o.kept else ""
        out_console.print(f"{o.name:<10} {told}", markup=False, soft_wrap=True)
    _tell(outcomes, f"Tables in {out}: cells that agree with the stored values, or do not")


@app.command("verify-tables")
@guarded
def verify_tables(
    folder: Annotated[Path, typer.Argument(help="What `edgelab reproduce` wrote.")] = OUT,
    new: Annotated[bool, typer.Option("--new", help=NEW)] = False,
) -> None:
    """Say from the written files alone which cells agree, whether a file was edited, and whether this code and data made them.

    Runs nothing. Fails (exit code 1) for a cell that differs or has no stored value, an edited file, and tables of other code, data, text
    or libraries.
    """
    from edgelab.reproduce import verify

    _tell(verify(folder, new=new), f"Tables in {folder}, from their files")


def _tell(outcomes, title: str) -> None:
    from edgelab.reproduce import VERDICTS

    print_table([o.line() for o in outcomes], title, right=VERDICTS)
    for o in outcomes:
        for j in o.table.differing() if o.table else ():
            out_console.print(f"{o.name}, seed {j.seed}, {j.cell.key}: {j.why}", markup=False, soft_wrap=True)
    if any(o.table and o.table.missing() and not o.new for o in outcomes):
        told = "Cells without a stored value were not judged. `--new` takes that for granted; `python -m edgelab.reproduce` stores values."
        out_console.print(told, markup=False, soft_wrap=True)
    bad = [o.name for o in outcomes if not o.well]
    if bad:
        raise CheckFailedError(f"{', '.join(bad)}: see the remarks and the cells above")
