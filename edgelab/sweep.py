"""Sweeps: a thousand configurations measured, on one core or many machines, killed and gone on with at any time.

    jobs = {bench.identify(c): c for c in space()}      an id is a hash of all that decides the row
    with Store(folder) as store:
        sweep(jobs, store, work)                        measures those that the store lacks
        export(store, jobs, path, metadata)             one Parquet file, rows in an order of their own

**Why it can be killed.** The store is one SQLite file in write-ahead mode with one row per id. A row is inserted in one transaction
when its run is over, so a kill loses the runs in flight and nothing else; the next start asks which ids are there and does the rest.
`INSERT OR IGNORE` makes doubles impossible, also when two processes share a store (both may do the work; the first one's row stays).
A journal on a network file system is not safe: keep the store on a local disk, workers far away send rows and never open it.

**Where it runs.** In this process; in processes of this machine by joblib (`jobs`); on a cluster by Dask (`scheduler`): this process
submits, the workers measure, this process writes. A worker that dies costs its run, which is done again: Dask sends it to another
worker, joblib's pool is made anew. What a configuration raises is kept as its row's error, and the sweep goes on; so is a row with a
figure that is not finite. That a cluster is gone says nothing of a configuration: it ends the sweep and leaves no error behind.

Runs of one structure follow each other in the order of `space`, and each process keeps the last structures it made (`sweep_run`).
"""

import json
import math
import os
import sqlite3
import time
from asyncio import CancelledError
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from edgelab.report import machine
from edgelab.sweep_space import METRICS, MODELS, TEACHERS, VERSION, Configuration, Protocol

if TYPE_CHECKING:
    from edgelab.sweep_run import Bench  # torch, transformers; the engine and its store do without

FILE = "sweep.sqlite"
FORMAT = 1  # of the exported file
Work = Callable[[Configuration], dict]
_WAIT_S = 60.0  # for another process' transaction
_ANSWER_S = 20  # for a cluster's workers to come back
_RESTARTS = 3  # of joblib's pool without a single row between them


# -------------------------------------------------------------------------------------------------------------- the store


class Store:
    """Rows by id in `<folder>/sweep.sqlite`. Any number of processes of one machine may use it at once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / FILE
        try:
            self._db = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, configuration TEXT NOT NULL, row TEXT, error TEXT, at REAL NOT NULL)"
            )
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no store of a sweep ({error}); move it away or give another folder") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def put(self, id: str, configuration: Configuration, row: Mapping | None = None, error: str | None = None) -> bool:
        """Whether the run is new: keeps its row, or its error. A row takes the place of an error; nothing takes that of a row."""
        if (row is None) == (error is None):
            raise ValueError(f"run {id} has a row or an error, and not both")
        said = None if row is None else json.dumps(row, separators=(",", ":"), allow_nan=False)
        done = self._db.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET row = excluded.row, error = NULL, at = excluded.at "
            "WHERE runs.row IS NULL AND excluded.row IS NOT NULL",
            (id, configuration.to_json(), said, error, time.time()),
        )
        return done.rowcount == 1

    def done(self) -> set[str]:
        """Ids of the runs that have a row."""
        return {i for (i,) in self._db.execute("SELECT id FROM runs WHERE row IS NOT NULL")}

    def errors(self) -> dict[str, str]:
        """{id: what it raised} of the runs that have none."""
        return dict(self._db.execute("SELECT id, error FROM runs WHERE row IS NULL"))

    def row(self, id: str) -> dict | None:
        """The row of `id` with its id, or None."""
        found = self._db.execute("SELECT row FROM runs WHERE id = ? AND row IS NOT NULL", (id,)).fetchone()
        return None if found is None else {"id": id, **json.loads(found[0])}

    def configurations(self) -> dict[str, Configuration]:
        """{id: configuration} of all runs whose configuration this version can still read."""
        found = {}
        for id, text in self._db.execute("SELECT id, configuration FROM runs"):
            with suppress(ValueError):
                found[id] = Configuration.from_json(text)
        return found

    def rows(self, ids: Collection[str]) -> list[dict]:
        """The rows of those of `ids` that are there, in an order that depends on nothing but the rows: by model, label, id."""
        found = [r for r in map(self.row, ids) if r is not None]
        return sorted(found, key=lambda r: (r["model"], r["label"], r["id"]))

    def __len__(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM runs WHERE row IS NOT NULL").fetchone()[0]

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self):,} rows, {len(self.errors()):,} errors)"


# ------------------------------------------------------------------------------------------------------------- the engine


@dataclass(frozen=True)
class Tally:
    """What a call of `sweep` did: runs measured, runs that raised, runs that were there already."""

    measured: int
    failed: int
    known: int


def _attempt(work: Work, id: str, configuration: Configuration) -> tuple[str, dict | None, str | None]:
    """(id, row, None) or (id, None, what was raised). Never raises for a configuration's own fault.

    A figure that is NaN or infinite is such a fault (overflowing weights give one), but for an error of a layer that is not known.
    """
    try:
        row = dict(work(configuration))
        if "layer_error" in row:
            row["layer_error"] = [None if isinstance(e, float) and math.isnan(e) else e for e in row["layer_error"]]
        values = {k: v if isinstance(v, list) else [v] for k, v in row.items()}
        if bad := [k for k, v in values.items() if any(isinstance(x, float) and not math.isfinite(x) for x in v)]:
            raise ArithmeticError(f"not finite: {', '.join(bad)}")
        json.dumps(row, allow_nan=False)  # what the store will do: what it cannot hold must show here, where it costs one run
        return id, row, None
    except Exception as error:  # whatever a recipe raises is a fact about its configuration
        return id, None, f"{type(error).__name__}: {error}"[:2000]


def sweep(
    jobs: Mapping[str, Configuration],
    store: Store,
    work: Work,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Tally:
    """Measures the configurations of `jobs` {id: configuration} that `store` lacks, and keeps each row at once.

    `work` makes the row; it goes to other processes, so it is a module's function or a `partial` of one. `workers`: processes of this
    machine. `scheduler`: a Dask scheduler's address in their place. `retry`: also those that raised before.
    Raises ImportError, saying what to install, where joblib or Dask is missing; ConnectionError where no scheduler answers or it is lost
    on the way, ChildProcessError where workers do nothing but die or cannot read what they are sent.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if scheduler is not None and not scheduler.strip():
        raise ValueError(f"scheduler={scheduler!r} is no address; give one such as tcp://127.0.0.1:8786, or None")
    there = store.done()
    left_out = there | (set() if retry else set(store.errors()))
    todo = {i: c for i, c in jobs.items() if i not in left_out}
    if scheduler:
        outcomes = _by_dask(todo, work, scheduler)
    elif workers > 1:
        outcomes = _by_joblib(todo, work, workers)
    else:
        # another process may have done it meanwhile
        outcomes = (_attempt(work, i, c) for i, c in todo.items() if store.row(i) is None)
    measured = failed = 0
    known = len(jobs) - len(todo)
    with tqdm(total=len(jobs), initial=known, desc="sweep", unit="run", disable=not progress, smoothing=0.05) as bar:
        for id, row, error in outcomes:
            store.put(id, jobs[id], row, error)
            measured, failed = measured + (row is not None), failed + (error is not None)
            bar.set_postfix_str(f"{failed} failed" if failed else "", refresh=False)
            bar.update()
    return Tally(measured, failed, known)


def _by_joblib(todo: Mapping[str, Configuration], work: Work, workers: int) -> Iterator[tuple[str, dict | None, str | None]]:
    """Outcomes as they come. A worker that dies breaks the pool: a new one does what is left."""
    try:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import BrokenProcessPool
    except ImportError as error:
        raise ImportError("several processes need joblib: pip install 'edgelab[sweep]'") from error
    left, broken = dict(todo), 0
    while left:
        before = len(left)
        try:
            pool = Parallel(n_jobs=min(workers, len(left)), backend="loky", batch_size=1, return_as="generator_unordered")
            for outcome in pool(delayed(_attempt)(work, i, c) for i, c in list(left.items())):
                left.pop(outcome[0])
                yield outcome
        except BrokenProcessPool as error:
            broken = broken + 1 if len(left) == before else 0
            if broken >= _RESTARTS:
                raise ChildProcessError(
                    f"workers died {_RESTARTS} times without finishing a run ({error}); use fewer workers, each takes the models' memory"
                ) from error


def _by_dask(todo: Mapping[str, Configuration], work: Work, scheduler: str) -> Iterator[tuple[str, dict | None, str | None]]:
    """Outcomes as they come. Dask gives the runs of a lost worker to another one; this process alone writes."""
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise ImportError("a cluster needs dask.distributed: pip install 'edgelab[cluster]'") from error
    try:
        client = Client(scheduler, timeout="20s")
    except OSError as error:
        raise ConnectionError(f"no Dask scheduler answers at {scheduler!r}: start one (dask scheduler) and give its address") from error
    with client:
        # keys of their own: a cluster remembers results, and what a changed `work` gives must not come from there
        turn = os.urandom(4).hex()
        names = {f"edgelab-{turn}-{i}": i for i in todo}
        futures = [client.submit(_attempt, work, i, todo[i], key=key, retries=2, pure=False) for key, i in names.items()]
        coming = as_completed(futures)
        for future in coming:
            status = future.status
            if status in ("lost", "pending"):  # done, but its worker died before the result came: the cluster does it again
                coming.add(future)
                continue
            error = future.exception() if status == "error" else None
            if status == "finished":
                try:
                    outcome = future.result()
                except (CancelledError, OSError) as lost:  # the scheduler went before the result came
                    raise _gone(scheduler) from lost
                yield outcome
            elif isinstance(error, KilledWorker):
                _still_there(client, scheduler)
                yield names[future.key], None, "KilledWorker: each worker that took this run died; it may need more memory than they have"
            elif error is not None:  # `_attempt` raises nothing: the worker could not read what it was sent
                raise ChildProcessError(
                    f"the workers cannot do a run ({type(error).__name__}: {error}); give them this version of edgelab and of Python"
                ) from error
            else:  # cancelled: a fact about the cluster, not about the configuration
                raise _gone(scheduler)
            future.release()


def _gone(scheduler: str) -> ConnectionError:
    return ConnectionError(
        f"the Dask scheduler at {scheduler!r} was lost or dropped the runs; all rows that came are kept: "
        "start a cluster again and call the sweep again with its address"
    )


def _still_there(client, scheduler: str) -> None:
    """Raises where the cluster has no worker left, or is gone: then nothing is known of the run that they died with."""
    try:
        client.wait_for_workers(1, timeout=_ANSWER_S)
    except TimeoutError as error:
        raise ChildProcessError(
            f"the cluster at {scheduler!r} has no workers left; start some with more memory, and call the sweep again: it goes on"
        ) from error
    except (CancelledError, OSError) as error:
        raise _gone(scheduler) from error


# ------------------------------------------------------------------------------------------------------------- the result


def schema():
    """The columns of an exported sweep, as a `pyarrow.Schema`."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    columns = {"id": text, "label": text, "model": text, "method": text, "scheme": text, "bits": real, "group": whole, "sparsity": real}
    columns |= {"pattern": text, "experts": whole, "top_k": whole, "channels": real, "kept_by": text, "ends": text, "recipe": text}
    columns |= {"size_bytes": whole, "bits_per_weight": real} | {f"{m}{end}": real for m in METRICS for end in ("", "_low", "_high")}
    columns |= {"doc_kld": pa.list_(pa.float32()), "doc_nll": pa.list_(pa.float32()), "doc_exact": pa.list_(pa.bool_())}
    columns |= {"layer_name": pa.list_(text), "layer_bytes": pa.list_(whole), "layer_error": pa.list_(pa.float32())}
    columns |= {"read_bytes": real, "macs": real, "kv_bytes": real, "layers": whole, "hidden": whole, "shape": text, "seconds": real}
    return pa.schema([pa.field(k, v) for k, v in (columns | {"provenance": text}).items()])


def metadata(here: "Bench") -> dict:
    """What an exported sweep says of itself: protocol, text, originals, machine."""
    return {
        "format": FORMAT,
        "seed": here.protocol.seed,
        "version": VERSION,
        "corpus": here.text_hash,
        "machine": machine(),
        "protocol": {k: v for k, v in asdict(here.protocol).items() if k != "models"},
        "documents": here.documents,
        "reference": {m: TEACHERS.get(m, m) for m in MODELS},
        "originals": here.originals(),
        "doc_kld": "nats per document, end token counted",
        "doc_nll": "nats per document, end token left out",
    }


def export(store: Store, ids: Iterable[str], path: str | Path, about: Mapping) -> int:
    """How many rows were written to the Parquet file `path`, whole or not at all; `about` goes into its metadata under "edgelab".

    The file depends on the rows alone, not on the order in which they came. Raises ValueError where there is no row yet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = store.rows(set(ids))
    if not rows:
        raise ValueError(f"{store.path} holds no row of this sweep yet; run `edgelab sweep` first")
    for row in rows:
        row["layer_error"] = [float("nan") if e is None else e for e in row["layer_error"]]
    table = pa.Table.from_pylist(rows, schema=schema().with_metadata({"edgelab": json.dumps(about, separators=(",", ":"))}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", compression_level=12)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def jobs_of(here: "Bench", configurations: Iterable[Configuration]) -> dict[str, Configuration]:
    """{id: configuration}, in their order."""
    return {here.identify(c): c for c in configurations}


def belonging(here: "Bench", store: Store) -> dict[str, Configuration]:
    """{id: configuration} of the runs in `store` that this bench would give the same ids: its protocol, text, models and version."""
    return {i: c for i, c in store.configurations().items() if here.identify(c) == i}


def work_of(protocol: Protocol) -> Work:
    """What a worker does with a configuration."""
    from edgelab.sweep_run import run

    return partial(run, protocol=protocol)
