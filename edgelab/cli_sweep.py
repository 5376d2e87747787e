"""`edgelab sweep`: measure a thousand configurations, or let a search choose them; stop and go on at any time."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import guarded, out_console, print_table

app = typer.Typer()


@app.command()
@guarded
def sweep(
    store: Annotated[Path, typer.Option("--store", help="Folder that keeps the rows; a later call goes on with it.")] = Path("runs/sweep"),
    jobs: Annotated[int, typer.Option("--jobs", help="Processes of this machine, one thread each.", min=1)] = 1,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="A Dask scheduler in their place: tcp://10.0.0.1:8786.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first so many configurations of the grid; 0: none.", min=0)] = None,
    searched: Annotated[int | None, typer.Option("--search", help="Not the grid: so many trials of a search, in all.", min=1)] = None,
    quality: Annotated[str, typer.Option("--quality", help="What a search keeps: kld (KL divergence) or exact (exact match).")] = "kld",
    device: Annotated[str, typer.Option("--device", help="Whose latency a search models: `edgelab devices` lists them.")] = "galaxy-s22",
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals. It belongs to the rows: another seed, other rows.")] = 0,
    search_seed: Annotated[int, typer.Option("--search-seed", help="Of a search's choices; the rows stay the same.")] = 0,
    retry: Annotated[bool, typer.Option("--retry", help="Measure those again that raised an error.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say what the store holds and what is left, and measure nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--export", help="Write all rows that are there to this Parquet file afterwards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compress and measure the configurations of a grid: bytes, KL divergence, exact match, each with its interval.

    Rows are kept one by one, so a sweep that was killed goes on where it was. `--export FILE --limit 0` writes what is there.
    """
    from edgelab import sweep as sweeps
    from edgelab.sweep_space import Protocol, space

    # all that can be wrong with the request, before torch and the models are there
    if searched is not None and (scheduler or jobs > 1 or limit is not None):
        raise ValueError("--search measures one configuration after the other in this process: leave out --jobs, --scheduler and --limit")
    if status and not (store / sweeps.FILE).is_file():
        raise FileNotFoundError(f"{store} holds no sweep yet; `edgelab sweep --store {store}` starts one")
    if searched is not None:
        from edgelab.sweep_search import check_goals

        check_goals(quality, device)

    from edgelab.sweep_run import bench

    here = bench(Protocol(seed=seed))
    grid = sweeps.jobs_of(here, space())
    with sweeps.Store(store) as kept:
        try:
            if status:
                _status(here, kept, grid, as_json)
            elif searched is not None:
                _search(here, kept, searched, quality, device, search_seed, as_json)
            else:
                some = dict(list(grid.items())[:limit])
                if some:
                    tally = sweeps.sweep(
                        some, kept, sweeps.work_of(here.protocol), workers=jobs, scheduler=scheduler, retry=retry, progress=not as_json
                    )
                    _say(f"measured {tally.measured:,}, there already {tally.known:,}, failed {tally.failed:,}: {kept!r}", as_json)
        except ImportError as error:  # says which extra is missing
            raise ValueError(str(error)) from error
        if out is not None:
            n = sweeps.export(kept, sweeps.belonging(here, kept), out, sweeps.metadata(here))
            _say(f"exported  {n:,} rows to {out}", as_json)


def _say(text: str, as_json: bool) -> None:
    if not as_json:
        out_console.print(text, markup=False, soft_wrap=True)


def _status(here, kept, grid, as_json: bool) -> None:
    from edgelab.sweep import belonging

    mine, done = belonging(here, kept), kept.done()
    errors = {i: e for i, e in kept.errors().items() if i in mine}
    ours = {i: c for i, c in mine.items() if i in done}
    seconds = [kept.row(i)["seconds"] for i in ours]
    left = sum(i not in ours for i in grid)
    mean = sum(seconds) / len(seconds) if seconds else None
    if as_json:
        content = {"rows": len(ours), "left": left, "errors": errors, "others": len(done) - len(ours), "seconds_per_run": mean}
        out_console.print_json(json.dumps(content))
        return
    there, wanted = Counter((c.model, c.method) for c in ours.values()), Counter((c.model, c.method) for c in grid.values())
    rows = [
        {"model": m, "method": how, "rows": f"{there[m, how]:,}", "in the grid": f"{wanted[m, how]:,}"}
        for m, how in dict.fromkeys([*wanted, *there])
    ]
    print_table(rows, f"{kept!r}", right=("rows", "in the grid"))
    for id, error in list(errors.items())[:10]:
        _say(f"error     {mine[id].label} ({id}): {error}", False)
    about = "" if mean is None else f", about {left * mean / 60:,.0f} minutes in one process ({mean:.1f} s a run)"
    _say(f"left      {left:,} of {len(grid):,}{about}", False)
    if len(done) > len(ours):
        _say(f"others    {len(done) - len(ours):,} rows are of another protocol, text, model or version; they are not exported", False)


def _search(here, kept, trials: int, quality: str, device: str, seed: int, as_json: bool) -> None:
    from edgelab.sweep import work_of
    from edgelab.sweep_search import search

    best = search(
        kept, here.identify, work_of(here.protocol), trials, quality=quality, device=device, protocol=here.protocol, seed=seed,
        progress=not as_json,
    )  # fmt: skip
    lost = "KLD, nats/token" if quality == "kld" else "1 - exact match"
    if as_json:
        content = [{"configuration": json.loads(c.to_json()), "bytes": v[0], lost: v[1], "modelled_ms": v[2]} for c, v in best]
        out_console.print_json(json.dumps(content))
        return
    rows = [{"configuration": c.label, "kB": f"{v[0] / 1e3:,.0f}", lost: f"{v[1]:.4f}", "modelled ms": f"{v[2]:.3g}"} for c, v in best]
    print_table(rows, f"Not dominated after {trials} trials, latency on {device}", right=tuple(rows[0])[1:] if rows else ())
