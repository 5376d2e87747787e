"""Sweeps: a killed one ends like an unbroken one, no run twice, a row is a function of its configuration; and the stored sweep."""

import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fake_runs import fake_id, fake_jobs, fake_row
from typer.testing import CliRunner

from edgelab import cli_sweep, sweep_run, sweep_space
from edgelab.compress import compress, plan
from edgelab.evaluate import measure
from edgelab.model import dequantize, load
from edgelab.paths import data_dir
from edgelab.recipe import Gptq, Recipe, Rtn
from edgelab.shape import ModelShape, from_folder, tiny
from edgelab.sweep import Store, export, jobs_of, metadata, schema, sweep, work_of
from edgelab.sweep_run import bench, measure_configuration
from edgelab.sweep_search import goals, propose, search
from edgelab.sweep_space import METRICS, Configuration, Protocol, space, structures

ROOT = Path(__file__).resolve().parents[1]
STORED = data_dir() / "sweep.parquet"
SMALL = Protocol(docs=(("prose", 2), ("code", 2), ("assistant", 4), ("arithmetic", 4)), calibration_tokens=1024)


# --------------------------------------------------------------------------------------------------------------- the space


def test_the_grid_is_a_thousand_and_more_and_names_none_twice():
    grid = space()
    assert len(grid) >= 1000 and len(set(grid)) == len({c.to_json() for c in grid}) == len({c.label for c in grid}) == len(grid)
    assert {c.model for c in grid} == set(sweep_space.MODELS) and {c.method for c in grid} == set(sweep_space.METHODS)
    for place in structures():  # the floating-point row that all schemes of a structure are compared with
        assert Configuration(**place) in grid
    for n in (30, 200, 600):  # a beginning is a sweep of its own
        assert {c.model for c in grid[:n]} == set(sweep_space.MODELS) and {c.method for c in grid[:n]} == set(sweep_space.METHODS)


def test_a_configuration_says_the_recipe_that_makes_it():
    for c in space()[::7]:
        assert Configuration.from_json(c.to_json()) == c
        assert Recipe.from_json(c.recipe.to_json()) == c.recipe
        assert c.recipe.steps == (*c.prefix, *([c.quantize] if c.quantize else []))


def test_recipes_fit_their_models():
    """A structure of each kind, with a scheme that its widths must divide."""
    fitted = {}
    for place in structures()[::5]:
        c = Configuration(method="mse", scheme="int3-g64", ends="int8-g32", **place)
        if c.model not in fitted:
            fitted[c.model] = load(data_dir() / c.model)
            dequantize(fitted[c.model])
        assert len(plan(fitted[c.model], c.recipe)) == len(c.recipe.steps)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "edge-tower"}, "edge-moe, edge-dense"),
        ({"model": "edge-dense", "experts": 8}, "dense"),
        ({"model": "edge-dense", "top_k": 1}, "dense"),
        ({"model": "edge-moe", "experts": 17}, "must be 1 .. 16"),
        ({"model": "edge-moe", "experts": 8}, "kept_by"),
        ({"model": "edge-moe", "kept_by": "reap"}, "kept_by"),
        ({"model": "edge-moe", "experts": 1, "kept_by": "reap"}, "top_k"),
        ({"model": "edge-moe", "channels": 0.2}, "channels"),
        ({"model": "edge-moe", "sparsity": 0.5}, "sparsity"),
        ({"model": "edge-moe", "sparsity": 0.25, "pattern": "2:4"}, "2:4"),
        ({"model": "edge-moe", "method": "awq", "scheme": "int4-g32"}, "method"),
        ({"model": "edge-moe", "method": "rtn"}, "stands alone"),
        ({"model": "edge-moe", "scheme": "int4-g32"}, "stands alone"),
        ({"model": "edge-moe", "method": "hqq", "scheme": "int4-g32"}, "uint"),
        ({"model": "edge-moe", "method": "rtn", "scheme": "uint4-g32"}, "hqq"),
        ({"model": "edge-phone", "method": "hqq", "scheme": "uint4-g32"}, "no exact zero"),
        ({"model": "edge-moe", "method": "hqq", "scheme": "uint4-g32", "sparsity": 0.5, "pattern": "2:4"}, "no exact zero"),
        ({"model": "edge-moe", "method": "rtn", "scheme": "int5-g32"}, "bits"),
    ],
)
def test_what_no_recipe_can_make_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Configuration(**fields)


# ------------------------------------------------------------------------------------------------------------------ the id


@pytest.fixture
def light(tmp_path):
    """A bench of a folder that holds bytes in the place of models, and of a text that is a word."""

    def make(text="text", weights=b"weights", **changes):
        for name in sweep_space.MODELS:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            for file in ("model.safetensors", "config.json", "tokenizer.json"):
                (folder / file).write_bytes(weights if file.startswith("model") else b"{}")
        here = sweep_run.Bench(Protocol(models=str(tmp_path), **changes))
        here.__dict__["text_hash"] = text
        return here

    return make


def test_an_id_changes_with_all_that_matters_and_with_nothing_else(light, monkeypatch):
    c = Configuration("edge-moe", "gptq", "int4-g32", experts=12, kept_by="reap", sparsity=0.5, pattern="2:4")
    first = light().identify(c)
    assert len(first) == 12 and int(first, 16) >= 0 and light().identify(replace(c)) == first
    changed = [
        {"model": "edge-phone", "experts": 6}, {"method": "rtn"}, {"scheme": "int4-g64"}, {"experts": 8}, {"kept_by": "frequency"},
        {"top_k": 1}, {"pattern": "unstructured"}, {"ends": "int8-g32"},
    ]  # fmt: skip
    ids = [light().identify(replace(c, **fields)) for fields in changed]
    ids.append(light().identify(Configuration("edge-dense", channels=0.1)))
    ids.append(light().identify(Configuration("edge-dense", channels=0.2)))
    ids += [light(seed=1).identify(c), light(text="other").identify(c), light(weights=b"other").identify(c)]
    ids += [light(longest=161).identify(c), light(calibration_tokens=4096).identify(c), light(resamples=1000).identify(c)]
    ids.append(light(docs=(("prose", 13), ("code", 12), ("assistant", 80), ("arithmetic", 100))).identify(c))
    with monkeypatch.context() as m:
        m.setattr(sweep_run, "VERSION", sweep_run.VERSION + 1)
        ids.append(light().identify(c))
    with monkeypatch.context() as m:
        m.setitem(sweep_space.METHODS, "gptq", Gptq(sequential=False, rounds=3))
        ids.append(light().identify(c))
    assert len({first, *ids}) == 1 + len(ids)
    with monkeypatch.context() as m:  # a method that it does not use
        m.setitem(sweep_space.METHODS, "rtn", Rtn(mse_grid=3))
        assert light().identify(c) == first
    assert light().identify(c) == first


def test_a_student_is_compared_with_its_teacher_and_its_id_says_so(light, tmp_path):
    here, c = light(), Configuration("edge-phone")
    first = here.identify(c)
    (tmp_path / "edge-moe" / "model.safetensors").write_bytes(b"another teacher")
    assert sweep_run.Bench(here.protocol).model_hash("edge-phone") != here.model_hash("edge-phone") and here.identify(c) == first
    (tmp_path / "edge-dense" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="edge-dense"):
        sweep_run.Bench(here.protocol).model_hash("edge-dense")


def test_a_protocol_wants_documents_of_every_domain():
    with pytest.raises(ValueError, match="arithmetic"):
        Protocol(docs=(("prose", 2), ("code", 2), ("assistant", 4)))


# --------------------------------------------------------------------------------------------------------------- the store


def test_a_row_is_kept_once_and_takes_the_place_of_an_error(tmp_path):
    c = space()[0]
    with Store(tmp_path) as store:
        assert store.put("a", c, error="ValueError: no") and not store.put("a", c, error="again")
        assert store.errors() == {"a": "ValueError: no"} and store.row("a") is None and len(store) == 0
        assert store.put("a", c, fake_row(c)) and store.errors() == {} and store.row("a") == {"id": "a", **fake_row(c)}
        assert not store.put("a", c, fake_row(c) | {"kld": 9.0}) and not store.put("a", c, error="late") and store.errors() == {}
        assert store.row("a")["kld"] == fake_row(c)["kld"] and store.configurations() == {"a": c}
        with pytest.raises(ValueError, match="not both"):
            store.put("b", c)
        with pytest.raises(ValueError):  # NaN is no JSON
            store.put("b", c, fake_row(c) | {"kld": math.nan})


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "sweep.sqlite").write_bytes(b"hello " * 1000)
    with pytest.raises(ValueError, match="no store of a sweep"):
        Store(tmp_path)


def test_errors_are_kept_and_do_not_stop_the_sweep(tmp_path):
    jobs = fake_jobs(20)
    bad = list(jobs)[7]

    def work(c):
        if fake_id(c) == bad and not (tmp_path / "mended").exists():
            raise ArithmeticError("its weights overflow")
        return fake_row(c)

    with Store(tmp_path) as store:
        tally = sweep(jobs, store, work, progress=False)
        assert (tally.measured, tally.failed, tally.known) == (19, 1, 0)
        assert store.errors() == {bad: "ArithmeticError: its weights overflow"}
        (tmp_path / "mended").touch()
        assert sweep(jobs, store, work, progress=False).measured == 0  # it is known to fail
        tally = sweep(jobs, store, work, retry=True, progress=False)
        assert (tally.measured, tally.failed, tally.known) == (1, 0, 19) and store.done() == set(jobs) and store.errors() == {}


@pytest.mark.parametrize("how", ["serial", "joblib", "search"])
def test_a_figure_that_is_not_finite_is_an_error_and_the_sweep_goes_on(tmp_path, how):
    jobs = fake_jobs(6)
    bad, worse, fine = list(jobs)[1], list(jobs)[3], list(jobs)[4]

    def work(c):
        row, nan, inf = fake_row(c), float("nan"), float("inf")
        if fake_id(c) == fine:
            return row | {"layer_error": [nan]}  # the schema has a place for it
        if how == "search":
            return row | ({"kld": nan} if c.bits == 4 else {})
        return row | ({"kld": nan} if fake_id(c) == bad else {"doc_nll": [1.0, inf]} if fake_id(c) == worse else {})

    with Store(tmp_path) as store:
        if how == "search":
            best = search(store, fake_id, work, 30, progress=False)
            assert set(store.errors().values()) == {"ArithmeticError: not finite: kld"} and best and all(c.bits != 4 for c, _ in best)
            return
        tally = sweep(jobs, store, work, workers=2 if how == "joblib" else 1, progress=False)
        assert (tally.measured, tally.failed) == (4, 2) and store.row(fine)["layer_error"] == [None]
        assert store.errors() == {bad: "ArithmeticError: not finite: kld", worse: "ArithmeticError: not finite: doc_nll"}
        assert sweep(jobs, store, work, progress=False).measured == 0


def test_the_exported_file_does_not_depend_on_the_order_of_work(tmp_path):
    jobs, about = fake_jobs(60), {"format": 1, "seed": 0}
    files = []
    for name, order in (("a", list(jobs)), ("b", list(jobs)[::-1]), ("c", random.sample(list(jobs), len(jobs)))):
        with Store(tmp_path / name) as store:
            sweep({i: jobs[i] for i in order}, store, fake_row, progress=False)
            assert export(store, order, tmp_path / f"{name}.parquet", about) == 60
        files.append((tmp_path / f"{name}.parquet").read_bytes())
    assert files[0] == files[1] == files[2]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.equals(schema()) and json.loads(table.schema.metadata[b"edgelab"]) == about
    assert math.isnan(table["layer_error"][0].as_py()[0]) and set(table["id"].to_pylist()) == set(jobs)


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    jobs, path = fake_jobs(3), tmp_path / "out" / "sweep.parquet"
    with Store(tmp_path) as store:
        with pytest.raises(ValueError, match="no row"):
            export(store, jobs, path, {})
        sweep(jobs, store, fake_row, progress=False)
        export(store, jobs, path, {"format": 1})
        before = path.read_bytes()

        def half(table, where, **_):
            Path(where).write_bytes(before[:100])
            raise OSError("disk full")

        monkeypatch.setattr(pq, "write_table", half)
        with pytest.raises(OSError, match="disk full"):
            export(store, jobs, path, {"format": 2})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["sweep.parquet"]


# ------------------------------------------------------------------------------------------------ killed, doubled, spread


WORKER = textwrap.dedent(
    """
    import os, sys, time
    sys.path[:0] = [{tests!r}, {root!r}]
    import fake_runs as t
    from edgelab.sweep import Store, sweep

    folder, pause = sys.argv[1], float(sys.argv[2])
    log = os.open(os.path.join(folder, "started"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def work(c):
        os.write(log, (t.fake_id(c) + "\\n").encode())
        time.sleep(pause)
        return t.fake_row(c)

    print("ready", flush=True)
    with Store(folder) as store:
        sweep(t.fake_jobs(200), store, work, progress=False)
    """
)


def worker(folder: Path, pause: float) -> subprocess.Popen:
    code = WORKER.format(tests=str(ROOT / "tests"), root=str(ROOT))
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(pause)], stdout=subprocess.PIPE, text=True)


def kept(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "sweep.sqlite")) as db:
        try:
            return db.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().split()


def without_time(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def unbroken(folder: Path, n: int) -> list[dict]:
    with Store(folder) as store:
        sweep(fake_jobs(n), store, fake_row, progress=False)
        return store.rows(store.done())


@pytest.mark.slow
def test_a_sweep_killed_five_times_ends_like_an_unbroken_one(tmp_path):
    draw, here = random.Random(11), tmp_path / "killed"
    reached = []
    for _ in range(5):
        process = worker(here, 0.02)
        process.stdout.readline()  # past its imports
        goal = (reached[-1] if reached else 0) + draw.randrange(5, 35)
        while kept(here) < goal:
            assert process.poll() is None, "the sweep ended before it was killed"
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        reached.append(kept(here))
    assert reached == sorted(set(reached)) and reached[-1] < 200  # each start went on, and none was the last
    process = worker(here, 0.0)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    with Store(here) as store:
        assert store.rows(store.done()) == unbroken(tmp_path / "unbroken", 200) and store.done() == set(fake_jobs(200))
    assert 200 <= len(started(here)) <= 205 and len(set(started(here))) == 200  # a kill costs the run in flight


@pytest.mark.slow
def test_two_processes_on_one_store_make_no_doubles(tmp_path):
    here = tmp_path / "shared"
    both = [worker(here, 0.005) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    for p in both:
        p.stdout.close()
    with Store(here) as store:
        assert store.rows(store.done()) == unbroken(tmp_path / "alone", 200)


@pytest.mark.slow
def test_processes_of_joblib_give_the_same_rows_and_a_dead_one_loses_nothing(tmp_path):
    jobs, flag = fake_jobs(40), tmp_path / "died"
    victim = list(jobs)[11]

    def work(c):
        import os

        if fake_id(c) == victim and not os.path.exists(flag):
            open(flag, "w").close()
            os._exit(9)
        return fake_row(c)

    with Store(tmp_path / "many") as store:
        tally = sweep(jobs, store, work, workers=2, progress=False)
        assert flag.exists() and (tally.measured, tally.failed) == (40, 0)
        assert store.rows(jobs) == unbroken(tmp_path / "one", 40)


def test_workers_that_do_nothing_but_die_end_the_sweep_with_advice(tmp_path):
    def work(_c):
        import os

        os._exit(9)

    with Store(tmp_path) as store, pytest.raises(ChildProcessError, match="fewer workers"):
        sweep(fake_jobs(4), store, work, workers=2, progress=False)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_and_doubles_nothing(tmp_path):
    from distributed import Client, LocalCluster

    jobs = fake_jobs(60)
    pids = tmp_path / "pids"
    pids.mkdir()

    def work(c):
        import os
        import time

        open(os.path.join(pids, str(os.getpid())), "w").close()
        time.sleep(0.05)
        return fake_row(c)

    def kill_one(folder: Path) -> None:
        while not (folder / "sweep.sqlite").exists() or kept(folder) < 10:
            time.sleep(0.01)
        os.kill(int(sorted(p.name for p in pids.iterdir())[0]), signal.SIGKILL)
        (tmp_path / "killed").touch()

    quiet = {"host": "127.0.0.1", "dashboard_address": None, "n_workers": 2, "threads_per_worker": 1, "processes": True}
    with LocalCluster(**quiet, local_directory=str(tmp_path / "dask"), silence_logs=50) as cluster, Store(tmp_path / "far") as store:
        with Client(cluster) as client:
            client.wait_for_workers(2, timeout=60)
        killer = threading.Thread(target=kill_one, args=(tmp_path / "far",), daemon=True)
        killer.start()
        tally = sweep(jobs, store, work, scheduler=cluster.scheduler_address, progress=False)
        killer.join(timeout=10)
        assert (tmp_path / "killed").exists() and (tally.measured, tally.failed) == (60, 0) and len(list(pids.iterdir())) >= 2
        assert store.rows(store.done()) == unbroken(tmp_path / "near", 60)


CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    here = {"protocol": "tcp://", "host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, **here) as c:
        print(c.scheduler_address, flush=True)
        sys.stdin.read()
"""


@contextlib.contextmanager
def cluster_elsewhere():
    """(process, address) of a cluster in another process, which ends with the block."""
    there = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("tcp://127.0.0.1:")
        yield process, address
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow
def test_a_scheduler_that_is_lost_leaves_rows_only_and_the_sweep_goes_on_elsewhere(tmp_path):
    import dask

    jobs = fake_jobs(40)

    def work(c):
        import time

        time.sleep(0.05)
        return fake_row(c)

    def kill(process) -> None:
        while kept(tmp_path) < 5:
            time.sleep(0.01)
        process.kill()

    with Store(tmp_path) as store, dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
        with cluster_elsewhere() as (process, address):
            killer = threading.Thread(target=kill, args=(process,), daemon=True)
            killer.start()
            with pytest.raises(ConnectionError, match="start a cluster again"):
                sweep(jobs, store, work, scheduler=address, progress=False)
            killer.join(timeout=10)
        assert 5 <= len(store) < 40 and store.errors() == {}
        before = len(store)
        with cluster_elsewhere() as (_, address):
            tally = sweep(jobs, store, work, scheduler=address, progress=False)
        assert (tally.measured, tally.failed, tally.known) == (40 - before, 0, before) and store.done() == set(jobs)


def test_what_is_missing_is_said_with_the_way_out(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        for module, settings, says in (
            ("joblib", {"workers": 2}, r"edgelab\[sweep\]"),
            ("distributed", {"scheduler": "tcp://127.0.0.1:1"}, r"edgelab\[cluster\]"),
        ):
            monkeypatch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=says):
                sweep(fake_jobs(2), store, fake_row, progress=False, **settings)
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(ImportError, match=r"edgelab\[sweep\]"):
            search(store, fake_id, fake_row, 2, progress=False)
        with pytest.raises(ValueError, match="scheduler=''"):
            sweep(fake_jobs(2), store, fake_row, scheduler="", progress=False)
        with pytest.raises(ValueError, match="workers=0"):
            sweep(fake_jobs(2), store, fake_row, workers=0, progress=False)


# ----------------------------------------------------------------------------------------------------------------- search


class Counting:
    """Work that says how often each configuration was measured."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, c: Configuration) -> dict:
        self.seen.append(fake_id(c))
        # finer codes are larger and better, so that there is something to trade
        return fake_row(c) | {"kld": 1 / c.bits + c.sparsity + c.channels, "size_bytes": int(1e6 * c.bits * (1 - c.channels))}


def test_a_search_measures_nothing_twice_and_goes_on(tmp_path):
    work = Counting()
    with Store(tmp_path) as store:
        known = {fake_id(c): c for c in space()[:300]}
        sweep(known, store, Counting(), progress=False)
        best = search(store, fake_id, work, 40, seed=3, progress=False)
        assert len(work.seen) == len(set(work.seen)) and not set(work.seen) & set(known)
        assert best and all(store.row(fake_id(c)) for c, _ in best)
        n = len(work.seen)
        assert search(store, fake_id, work, 40, seed=3, progress=False) == best and len(work.seen) == n  # nothing is left to do
        search(store, fake_id, work, 60, seed=3, progress=False)
        assert len(work.seen) == len(set(work.seen)) > n
    values = [v for _, v in best]
    assert not any(all(x <= y for x, y in zip(a, b, strict=True)) and a != b for a in values for b in values)
    again = Counting()
    with Store(tmp_path / "again") as store:
        sweep(known, store, Counting(), progress=False)
        assert search(store, fake_id, again, 40, seed=3, progress=False) == best and again.seen == work.seen[:n]


def test_a_trial_that_raises_is_kept_and_counts(tmp_path):
    def work(c):
        if c.bits == 2:
            raise ArithmeticError("two bits are too few")
        return fake_row(c)

    with Store(tmp_path) as store:
        best = search(store, fake_id, work, 30, progress=False)
        assert store.errors() and set(store.errors().values()) == {"ArithmeticError: two bits are too few"}
        assert best and all(c.bits > 2 for c, _ in best)
        with pytest.raises(ValueError, match="kld, exact"):
            search(store, fake_id, work, 3, quality="beauty", progress=False)
        with pytest.raises(ValueError, match="trials=0"):
            search(store, fake_id, work, 0, progress=False)


def test_goals_are_bytes_loss_and_modelled_milliseconds():
    row = fake_row(space()[0]) | {
        "kld": 0.25,
        "em_assistant": 1.0,
        "em_arithmetic": 0.5,
        "size_bytes": 7,
        "shape": json.dumps(asdict(tiny())),
    }
    size, kld, ms = goals(row)
    assert (size, kld) == (7, 0.25) and goals(row, "exact")[1] == 0.25
    larger = row | {"shape": json.dumps(asdict(replace(tiny(), dense_bytes=1e9)))}
    assert goals(larger)[2] > 10 * ms > 0
    with pytest.raises(ValueError, match="not-a-phone"):
        goals(row, device="not-a-phone")


def test_every_proposal_is_a_configuration():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = {propose(study.ask()) for _ in range(300)}
    assert len(found) > 250 and {c.model for c in found} == set(sweep_space.MODELS)


# ------------------------------------------------------------------------------------------------------- real, and small


@pytest.fixture(scope="module")
def real():
    return bench(SMALL)


SIX = [
    Configuration("edge-dense"),
    Configuration("edge-dense", "rtn", "int4-g32"),
    Configuration("edge-dense", "gptq", "int3-g32"),
    Configuration("edge-dense", "hqq", "uint3-g64"),
    Configuration("edge-dense", "mse", "int2-g32", channels=0.2, ends="int8-g32"),
    Configuration("edge-dense", "gptq", "int3-g32", channels=0.2, sparsity=0.5, pattern="2:4"),
]


@pytest.fixture(scope="module")
def six(real, tmp_path_factory):
    """Rows of six real configurations, measured one after the other."""
    with Store(tmp_path_factory.mktemp("six")) as store:
        sweep(jobs_of(real, SIX), store, work_of(SMALL), progress=False)
        assert store.errors() == {}
        return {r["label"]: r for r in store.rows(store.done())}


@pytest.mark.slow
def test_rows_do_not_depend_on_processes_or_order(real, six, tmp_path):
    backwards = [real.run(c) for c in SIX[::-1]]
    fresh = sweep_run.Bench(SMALL)
    cold = [fresh.run(SIX[5]), fresh.run(SIX[2])]
    with Store(tmp_path) as store:
        sweep(jobs_of(real, SIX[1:4]), store, work_of(SMALL), workers=2, progress=False)
        far = store.rows(store.done())
    assert len(far) == 3
    for row in (*backwards, *cold, *far):
        row = {"id": six[row["label"]]["id"]} | row
        assert without_time([row]) == without_time([six[row["label"]]]), row["label"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "c",
    [
        SIX[2],
        SIX[4],
        SIX[5],
        Configuration("edge-moe", "gptq", "int3-g64", experts=12, kept_by="reap", top_k=1, sparsity=0.5, pattern="2:4"),
        Configuration("edge-phone", "rtn", "int4-g32", top_k=1),
    ],
    ids=lambda c: c.label,
)
def test_a_rows_recipe_gives_its_figures_again(real, c):
    """By the plain road: `compress` of the whole recipe at once, `measure` with the original itself, no bench."""
    row = real.run(c)
    original = load(data_dir() / c.model)
    dequantize(original)
    torch.set_num_threads(1)
    made = compress(original, Recipe.from_json(row["recipe"]), calibration=real.calibration, progress=False)
    assert made.coverage.predicted_bytes == row["size_bytes"] == sum(row["layer_bytes"])
    assert made.coverage.bits_per_weight == pytest.approx(row["bits_per_weight"])
    teacher = load(data_dir() / "edge-moe") if c.model == "edge-phone" else original
    with sweep_run.one_thread():
        found = measure({"teacher": teacher, "row": made.model}, real.tokenizer, real.test, max_docs=None, progress=False).scores["row"]
    kld = np.concatenate([found[d].kld for d in ("prose", "code")])
    assert row["doc_kld"] == pytest.approx(kld, rel=1e-3, abs=1e-5)  # the packed kernels sum in another order
    assert row["kld"] == pytest.approx(kld.sum() / sum(found[d].tokens.sum() for d in ("prose", "code")), rel=1e-3, abs=1e-6)
    assert row["em_assistant"] == found["assistant"].correct.mean() and row["em_arithmetic"] == found["arithmetic"].correct.mean()


@pytest.mark.slow
def test_one_configuration_is_measured_as_the_sweep_does_it(real, six):
    said = []
    row = six["dense gptq int3-g32"]
    again = measure_configuration("edge-dense", row["recipe"], step=said.append, protocol=SMALL)
    assert said == ["text", "load", "compress", "evaluate"]
    assert all(again[k] == row[k] for k in again if k != "seconds") and {"kld", "doc_nll", "layer_error", "shape"} <= set(again)
    with pytest.raises(ValueError, match="recipe"):
        measure_configuration("edge-dense", "{}", protocol=SMALL)
    with pytest.raises(FileNotFoundError, match="edge-tower"):
        measure_configuration("edge-tower", row["recipe"], protocol=SMALL)


@pytest.mark.slow
def test_a_row_says_what_the_model_is(real, six):
    fp, cut = six["dense fp"], six["dense mse int2-g32, ends int8-g32, 20% of channels cut"]
    assert fp["kld"] == 0 and fp["bits_per_weight"] == pytest.approx(16, abs=0.01) and set(fp["layer_error"]) == {0.0}
    shape, folder = ModelShape(**json.loads(fp["shape"])), from_folder(data_dir() / "edge-dense")
    assert shape.dense_bytes == folder.dense_bytes and shape.decode_ops(64) == folder.decode_ops(64) and shape.layers == 4
    assert fp["read_bytes"] == shape.decode_bytes(0) and fp["macs"] == shape.active_weights and fp["kv_bytes"] == shape.kv_bytes(1)
    missing = [n for n, e in zip(cut["layer_name"], cut["layer_error"], strict=True) if e is None]
    assert len(missing) == 12 and all(".mlp." in n for n in missing)  # their shapes differ: gate, up and down of four layers
    assert 0.2 < max(e for e in cut["layer_error"] if e is not None) < 1
    finer, coarser = six["dense rtn int4-g32"], six["dense gptq int3-g32"]
    assert finer["kld"] < coarser["kld"] and finer["size_bytes"] > coarser["size_bytes"]
    assert len(real.documents) == 12 and len(fp["doc_nll"]) == 4 and len(fp["doc_exact"]) == 8
    sources = [(d["domain"], d["source"]) for d in real.documents]
    assert len(set(sources)) == len(sources)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--status"], "holds no sweep yet"),
        (["--search", "3", "--device", "nokia"], "device='nokia' is not known"),
        (["--search", "3", "--quality", "beauty"], "quality='beauty' is not one of kld, exact"),
        (["--search", "3", "--limit", "2"], "leave out"),
    ],
)
def test_the_command_line_refuses_before_it_works(tmp_path, monkeypatch, asked, says):
    def never(_):
        raise AssertionError("the bench was asked for")

    monkeypatch.setattr(sweep_run, "bench", never)
    said = CliRunner().invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), *asked])
    assert said.exit_code == 2 and says in said.output and "Traceback" not in said.output
    assert not (tmp_path / "s").exists()


def test_a_question_about_no_store_loads_no_torch(tmp_path):
    code = "import sys; from edgelab.cli import app\ntry: app()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    asked = [sys.executable, "-c", code, "sweep", "--status", "--store", str(tmp_path / "s")]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "holds no sweep yet" in said.stderr and said.stdout.strip() == "False"


@pytest.mark.slow
def test_the_command_line_sweeps_and_says_where_it_is(tmp_path, monkeypatch, real, six):
    monkeypatch.setattr(sweep_run, "bench", lambda _: real)
    monkeypatch.setattr(sweep_space, "space", lambda: SIX)
    run = CliRunner()
    gone = run.invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), "--status"])
    assert gone.exit_code == 2 and not (tmp_path / "s").exists()
    done = run.invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), "--limit", "2", "--export", str(tmp_path / "out.parquet")])
    assert done.exit_code == 0, done.output
    assert "measured 2" in done.output and pq.read_table(tmp_path / "out.parquet").num_rows == 2
    said = run.invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), "--status", "--json"])
    assert json.loads(said.output)["rows"] == 2 and json.loads(said.output)["left"] == 4
    table = run.invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), "--status"])
    assert "left      4 of 6" in table.output and "edge-dense" in table.output
    wrong = run.invoke(cli_sweep.app, ["--store", str(tmp_path / "s"), "--search", "3", "--jobs", "2"])
    assert wrong.exit_code == 2


# ------------------------------------------------------------------------------------------------------- the stored sweep


@pytest.fixture(scope="module")
def stored():
    return pq.read_table(STORED)


@pytest.fixture(scope="module")
def about(stored):
    return json.loads(stored.schema.metadata[b"edgelab"])


def test_the_stored_sweep_is_a_thousand_rows_of_the_schema(stored, about):
    assert stored.num_rows >= 1000 and stored.schema.equals(schema()) and STORED.stat().st_size < 3_000_000
    assert len(set(stored["id"].to_pylist())) == len(set(stored["label"].to_pylist())) == stored.num_rows
    assert about["format"] == 1 and {"seed", "corpus", "machine", "documents", "reference", "protocol", "originals"} <= set(about)
    assert about["reference"] == {"edge-moe": "edge-moe", "edge-dense": "edge-dense", "edge-phone": "edge-moe"}
    assert set(stored["provenance"].to_pylist()) == {"measured at build"}
    keys = list(zip(stored["model"].to_pylist(), stored["label"].to_pylist(), strict=True))
    assert keys == sorted(keys)


def test_stored_rows_are_what_their_configurations_say(stored):
    fields = ["model", "method", "scheme", "experts", "kept_by", "top_k", "channels", "sparsity", "pattern", "ends"]
    found = set()
    for r in stored.select([*fields, "label", "recipe", "bits", "group"]).to_pylist():
        c = Configuration(**{k: r[k] for k in fields})
        assert (c.label, c.bits, c.group) == (r["label"], r["bits"], r["group"])
        assert Recipe.from_json(r["recipe"]) == c.recipe
        found.add(c)
    for place in structures()[:12]:  # what others are compared with
        assert Configuration(**place) in found
    assert {c.method for c in found} == set(sweep_space.METHODS)


def test_stored_figures_hold_together(stored, about):
    docs = about["documents"]
    text = [d for d in docs if d["domain"] in ("prose", "code")]
    tokens, sizes = sum(d["tokens"] for d in text), sum(d["bytes"] for d in text)
    asked = [d["domain"] for d in docs if d["domain"] in ("assistant", "arithmetic")]
    for r in stored.to_pylist():
        for m in METRICS:
            assert r[f"{m}_low"] <= r[m] <= r[f"{m}_high"], (r["label"], m)
        assert len(r["doc_kld"]) == len(r["doc_nll"]) == len(text) and len(r["doc_exact"]) == len(asked)
        assert r["kld"] == pytest.approx(sum(r["doc_kld"]) / tokens, rel=1e-5, abs=1e-9)
        assert r["bits_per_byte"] == pytest.approx(sum(r["doc_nll"]) / math.log(2) / sizes, rel=1e-5)
        for domain in ("assistant", "arithmetic"):
            assert r[f"em_{domain}"] == pytest.approx(np.mean([e for e, d in zip(r["doc_exact"], asked, strict=True) if d == domain]))
        assert sum(r["layer_bytes"]) == r["size_bytes"] and len(r["layer_name"]) == len(r["layer_error"]) == len(set(r["layer_name"]))
        shape = ModelShape(**json.loads(r["shape"]))
        assert (
            shape.weight_bytes == pytest.approx(r["size_bytes"], rel=1e-3) and shape.top_k == r["top_k"] and shape.experts == r["experts"]
        )
        assert r["read_bytes"] == shape.decode_bytes(0) and r["seconds"] > 0


def test_what_must_be_so_is_so_in_the_stored_sweep(stored):
    rows = {r["label"]: r for r in stored.to_pylist()}
    for model in ("moe", "dense"):
        by_bits = [rows[f"{model} rtn int{b}-g32"] for b in (8, 4, 3, 2)]
        assert [r["kld"] for r in by_bits] == sorted(r["kld"] for r in by_bits) and rows[f"{model} fp"]["kld"] == 0
        assert [r["size_bytes"] for r in by_bits] == sorted((r["size_bytes"] for r in by_bits), reverse=True)
        assert rows[f"{model} gptq int2-g32"]["kld"] < rows[f"{model} rtn int2-g32"]["kld"]
    assert rows["phone fp"]["kld"] > 0  # to its teacher


@pytest.mark.slow
def test_two_stored_rows_come_out_the_same_here(stored, about):
    here = bench(Protocol(seed=about["seed"]))
    if here.text_hash != about["corpus"]:
        pytest.skip(f"this interpreter's library gives other text ({here.text_hash}) than the sweep was measured on ({about['corpus']})")
    cheap = [r for r in stored.to_pylist() if r["method"] in ("fp", "rtn") and not r["sparsity"] and not r["channels"]]
    for r in random.Random(os.getpid()).sample(cheap, 2):
        again = measure_configuration(r["model"], r["recipe"])
        assert again["size_bytes"] == r["size_bytes"], r["label"]
        assert again["kld"] == pytest.approx(r["kld"], rel=0.01, abs=1e-4), r["label"]  # another processor sums in another order
        assert again["bits_per_byte"] == pytest.approx(r["bits_per_byte"], rel=1e-3), r["label"]
        assert abs(again["em_assistant"] - r["em_assistant"]) <= 2 / 80 and abs(again["em_arithmetic"] - r["em_arithmetic"]) <= 2 / 100
        fields = {k: r[k] for k in ("model", "method", "scheme", "experts", "kept_by", "top_k", "channels", "sparsity", "pattern", "ends")}
        assert here.identify(Configuration(**fields)) == r["id"]


def test_the_metadata_is_made_of_the_bench(real):
    said = metadata(real)
    assert said["documents"] == real.documents and said["corpus"] == real.text_hash and said["protocol"]["docs"] == SMALL.docs
    assert said["originals"]["edge-dense"]["size_bytes"] > 6e6 and json.loads(json.dumps(said))
