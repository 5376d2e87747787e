"""Ours beside torch, ONNX Runtime, bitsandbytes and llama.cpp, in one process and one table: `make bench`.

How it is measured. All contenders take turns, so that whatever else the machine does falls on all alike; a time is a median.
In a turn a contender makes two calls that count, after one that does not (it brings code and threads back); of calls of 2 ms and
more, one, at once. Each call takes the next copy of the weight. A contender's copies fill three times the last-level cache, or there are 48
of them and then all contenders' together do: the weight comes from memory, as in decoding, where all other layers lie between two
uses of one. The column "in cache" is one row and one copy, again and again.

Threads. Nothing is pinned. OpenMP's threads (torch, bitsandbytes, llama.cpp) spin for 4 to 9 ms after a parallel region, which on two
cores are the next contender's: with more than one thread, whoever comes after another library waits until its threads sleep.

A share is of the ceiling that binds: the longer of (bytes of weights and scales / read bandwidth) and (operations / peak), over the
time. The peak is that of integer products; of float32 ones, for float activations, a quarter (see FLOATS). Both ceilings are
measured in the same run, before and after each weight (`kernels/ceiling.py`); the best counts. A peer stands "beside" our kernel with the
same kind of weights and activations: 2.00x is a peer that takes twice as long.

Choose with `make bench ARGS="-k '4096x4096 and 1-threads'"`; a number of rows is `-k threads-8-rows`.

The results go to runs/bench/matmul.json (a part of the run: matmul-part.json); `table.py` prints them, also as Markdown.
"""

import gc
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import contenders
import ggml
import numpy as np
import psutil
import pytest
import table
import torch
from contenders import DENSE, EXPERTS, MIN_COSINE, Absent, Case, Contender
from rich.console import Console
from tqdm import tqdm

from edgelab import set_threads
from edgelab.kernels import simd
from edgelab.kernels.ceiling import integer_peak, read_bandwidth
from edgelab.report import machine

# out x in: two squares, a feed-forward layer of a 7B model, and the embedded model's attention and head
SHAPES = [(2048, 2048), (4096, 4096), (4096, 11008), (640, 256), (2048, 256)]
TOKENS = [1, 8, 32, 128, 512]
STACK, TOP = (64, 1024, 512), 6  # experts x out x in, and how many a token takes
STACK_TOKENS = [1, 128]
THREADS = [1, 2] if (os.cpu_count() or 1) > 1 else [1]
OURS = "W4A8 g32"  # what pytest-benchmark times by itself

SECONDS, LONGEST = 1.5, 3.0  # of turns per shape, threads and rows: as many as fit into SECONDS, but
FEWEST, FEW, MOST = 15, 4, 200  # at least FEWEST where they fit into LONGEST, and FEW anyway
SHORT = 2e-3  # seconds: a shorter call is made three times in a turn, and the last two count
PAUSE = 0.010  # seconds until the threads of a library sleep
SPINNERS = {"torch", "bitsandbytes", "llama.cpp"}
# Byte products in the time of one float32 product: a vector holds four times as many, and `dot` and fma take turns on the same
# units; without VNNI, `dot` is three instructions; the portable way has no byte products to speak of.
FLOATS = {"avx512": 4.0, "avxvnni": 4.0, "sdot": 4.0, "avx2": 4 / 3, "portable": 1.0}
RESULTS = Path(__file__).resolve().parents[2] / "runs" / "bench"

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, and still the only way


# ------------------------------------------------------------------------------------------------------- the whole run
class Others:
    """How busy other processes (and the hypervisor) keep the machine, from its making on."""

    def __init__(self) -> None:
        self.start, self.all, self.own = time.perf_counter(), self._all(), time.process_time()

    def _all(self) -> float:
        """Seconds that all processors have been at work, or were taken away."""
        t = psutil.cpu_times()
        return sum(t) - t.idle - getattr(t, "iowait", 0) - getattr(t, "guest", 0) - getattr(t, "guest_nice", 0)

    def processors(self) -> float:
        """Processors' worth of work, on average."""
        return max(0.0, self._all() - self.all - time.process_time() + self.own) / (time.perf_counter() - self.start)


class Run:
    """What a run has found: cells (one number of tokens each), who was absent and why."""

    def __init__(self, cells: int, whole: bool, uncaptured: Callable) -> None:
        self.uncaptured = uncaptured
        self.cells, self.absent, self.ceilings, self.whole = [], {}, {n: [] for n in THREADS}, whole
        self.start = time.perf_counter()
        self.bar = tqdm(total=cells, unit="cell", desc="matmul", smoothing=0.1, disable=None)

    def tell(self, text: str, done: int = 0) -> None:
        """Show what is going on."""
        with self.uncaptured():
            self.bar.set_postfix_str(text, refresh=not done)
            self.bar.update(done)

    def measure_ceilings(self, threads: int) -> None:
        self.tell(f"ceilings of {threads} threads")
        set_threads(threads)
        self.ceilings[threads].append({"read": read_bandwidth(), "integer": integer_peak()})

    def report(self) -> dict:
        """All of it, for `table.py`."""
        best = {n: {kind: max(c[kind] for c in found) for kind in found[0]} for n, found in self.ceilings.items() if found}
        for cell in self.cells:
            for row in cell["rows"]:
                if "ratio" not in row:
                    factor = FLOATS[simd.way()] if "A16" in row["name"] else 1
                    read = row["weight_bytes"] / best[cell["threads"]]["read"]
                    work = row["operations"] * factor / best[cell["threads"]]["integer"]
                    row |= {"share": max(read, work) / row["seconds"], "bound": "read" if read > work else "ops"}
        packages = ["torch", "onnxruntime", "bitsandbytes", "llama-cpp-python", "numba", "llvmlite", "numpy"]
        installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
        versions = {name: installed[name] for name in packages if name in installed}
        versions |= {"ggml": ggml.version()} if ggml.version() else {}
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "simd": simd.way(),
            "last_level_cache": contenders.last_level_cache(),
            "versions": versions,
            "whole": self.whole,
            "seconds": round(time.perf_counter() - self.start, 1),
            "ceilings": [{"threads": n, **best[n], "all": self.ceilings[n]} for n in best],
            "absent": self.absent,
            "cells": self.cells,
        }


@pytest.fixture(scope="session")
def run(request):
    """The `Run`; at its end the table is printed and the file written."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    whole = len(mine) == len(THREADS) * (len(SHAPES) * len(TOKENS) + len(STACK_TOKENS))
    with capture.global_and_fixture_disabled():
        print()
        run = Run(len(mine), whole, capture.global_and_fixture_disabled)
    before = torch.get_num_threads()
    yield run
    torch.set_num_threads(before)
    set_threads(None)
    run.whole = run.whole and len(run.cells) == len(mine)  # none failed
    report = run.report()
    path = RESULTS / ("matmul.json" if run.whole else "matmul-part.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1))
    unfinished.replace(path)
    with capture.global_and_fixture_disabled():
        run.bar.close()
        table.show(report, Console(width=max(140, Console().width)))
        print(f"written to {path}")


# ------------------------------------------------------------------------------------------------------------ one case
class Setup:
    """The contenders of one weight and number of threads, checked against the float32 product; and the ceilings."""

    def __init__(self, run: Run, case: Case, entries: dict[str, contenders.Entry], label: str) -> None:
        self.case, self.entries, self.label = case, entries, label
        torch.set_num_threads(case.threads)
        run.measure_ceilings(case.threads)
        expected = {tokens: self._expected(tokens) for tokens in case.xs}
        self.contenders = []
        for name, entry in entries.items():
            run.tell(f"{label}, {case.threads} threads: preparing {name}")
            try:
                nbytes, calls = entry.build(case, *entry.settings)
            except Absent as why:
                run.absent[name] = str(why)
                continue
            c = Contender(name, nbytes, len(next(iter(calls.values()))), calls)
            for tokens, functions in c.calls.items():
                y, right = contenders.array(functions[0]()).ravel(), expected[tokens].ravel()
                cosine = float(y @ right / (np.linalg.norm(y) * np.linalg.norm(right)))
                assert cosine > MIN_COSINE[entry.bits], f"{name}, {label}, {tokens} tokens: cosine {cosine:.4f} with the float32 product"
                for function in functions[1:] if tokens == min(c.calls) else ():  # touch every copy once
                    function()
            self.contenders.append(c)

    def _expected(self, tokens: int) -> np.ndarray:
        w, x = self.case.w, self.case.xs[tokens]
        if not self.case.offsets:
            return (x @ w.T).numpy()
        offsets = self.case.offsets[tokens][0]
        return torch.cat([x[offsets[e] : offsets[e + 1]] @ w[e].T for e in range(len(w))]).numpy()

    def measure(self, tokens: int, cached: bool = False) -> dict[str, list[float]]:
        """Seconds of every call that counts, by contender. `cached`: of the first copy only, where it fits the cache with room to spare."""
        functions, last = {}, contenders.last_level_cache()
        for c in self.contenders:
            if cached and c.nbytes[tokens] > 0.75 * last:
                continue
            functions[c.name] = itertools.cycle(c.calls[tokens][:1] if cached else c.calls[tokens])
        single = {}
        for name, turn in functions.items():  # a first look, to choose the number of turns
            for _ in range(2):
                start = time.perf_counter()
                next(turn)()
                single[name] = time.perf_counter() - start
                if single[name] > 0.05:  # long enough to be believed at once
                    break
        calls = {name: (4, 4) if cached else (1, 2) if t < SHORT else (0, 1) for name, t in single.items()}  # idle, counted
        once = sum(sum(calls[name]) * t for name, t in single.items()) + (PAUSE * len(SPINNERS) if self.case.threads > 1 else 0)
        seconds = SECONDS / 2 if cached else SECONDS
        turns = max(FEW, min(FEWEST, int(LONGEST / once)), min(MOST, int(seconds / once)))
        times = {name: [] for name in functions}
        before = None
        for _ in range(turns):
            for name, turn in functions.items():
                pool = self.entries[name].pool
                if self.case.threads > 1 and before in SPINNERS and pool != before:
                    time.sleep(PAUSE)
                before = pool
                idle, counted = calls[name]
                for _ in range(idle):
                    next(turn)()
                for _ in range(counted):
                    function = next(turn)
                    start = time.perf_counter()
                    function()
                    times[name].append(time.perf_counter() - start)
        return times

    def cell(self, tokens: int) -> dict:
        """The row of `Run.cells` for this number of tokens."""
        gc.collect()
        gc.disable()
        others = Others()
        try:
            times = self.measure(tokens)
            cached = self.measure(tokens, cached=True) if tokens == 1 else {}
        finally:
            gc.enable()
        busy = round(others.processors(), 3)
        rows, matrix = [], math.prod(self.case.w.shape[-2:])
        medians = {name: statistics.median(t) for name, t in times.items()}
        slots = len(self.case.xs[tokens])
        for c in self.contenders:
            entry, t = self.entries[c.name], times[c.name]
            row = {"name": c.name, "library": entry.pool, "seconds": medians[c.name], "calls": len(t)}
            row |= {"quartiles": statistics.quantiles(t, n=4)[::2], "weight_bytes": c.nbytes[tokens], "copies": c.copies}
            row["operations"] = 2 * slots * matrix
            if c.name in cached:
                row["cached_seconds"] = statistics.median(cached[c.name])
            if entry.beside:
                row |= {"beside": entry.beside, "ratio": medians[c.name] / medians[entry.beside]}
            rows.append(row)
        together = sum(c.copies * c.nbytes[tokens] for c in self.contenders)
        about = {"shape": list(self.case.w.shape), "threads": self.case.threads, "tokens": tokens, "label": self.label}
        return about | {"working_set": together, "others_busy": busy, "rows": rows}


def _inputs(rng: torch.Generator, tokens: list[int], n: int) -> dict[int, torch.Tensor]:
    return {t: torch.randn(t, n, generator=rng) for t in tokens}


@pytest.fixture(scope="module")
def dense(request, run):
    """`Setup` of one shape and number of threads, for all numbers of tokens."""
    (out, n), threads = request.param
    rng = torch.Generator().manual_seed(0)
    case = Case(_weight(out, n), _inputs(rng, TOKENS, n), threads)
    with torch.inference_mode():
        yield from _held(run, Setup(run, case, DENSE, f"{out} x {n}"))


@pytest.fixture(scope="module")
def experts(request, run):
    """`Setup` of the expert stack: tokens sorted by expert, with several routings so that one row meets nearly all experts in turn."""
    count, _, n = STACK
    rng = torch.Generator().manual_seed(0)
    offsets, xs = {}, {}
    for tokens in STACK_TOKENS:
        xs[tokens] = torch.randn(tokens * TOP, n, generator=rng)
        offsets[tokens] = []
        every = torch.randperm(count, generator=rng)
        for i in range(count // TOP if tokens == 1 else 1):
            draws = [torch.randperm(count, generator=rng)[:TOP] for _ in range(tokens)]
            chosen = every[i * TOP : (i + 1) * TOP] if tokens == 1 else torch.stack(draws)
            offsets[tokens].append(np.concatenate([[0], np.cumsum(np.bincount(chosen.ravel().numpy(), minlength=count))]))
    label = f"top {TOP} of {count} experts {STACK[1]} x {n}"
    with torch.inference_mode():
        yield from _held(run, Setup(run, Case(_weight(*STACK), xs, request.param, offsets), EXPERTS, label))


_WEIGHTS: dict[tuple[int, ...], torch.Tensor] = {}


def _weight(*shape: int) -> torch.Tensor:
    """The same tensor for each number of threads, so that it is quantized once."""
    if shape not in _WEIGHTS:
        _WEIGHTS.clear()
        _WEIGHTS[shape] = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[-1] ** 0.5
    return _WEIGHTS[shape]


def _held(run: Run, setup: Setup):
    yield setup
    run.measure_ceilings(setup.case.threads)
    setup.contenders.clear()
    gc.collect()


def _id(value) -> str:
    return f"{value[0][0]}x{value[0][1]}-{value[1]}-threads"


@pytest.mark.parametrize("tokens", TOKENS, ids=[f"{t}-rows" for t in TOKENS])
@pytest.mark.parametrize("dense", list(itertools.product(SHAPES, THREADS)), ids=_id, indirect=True)
def bench_side_by_side(benchmark, run, dense, tokens):
    _bench(benchmark, run, dense, tokens)


@pytest.mark.parametrize("tokens", STACK_TOKENS, ids=[f"{t}-rows" for t in STACK_TOKENS])
@pytest.mark.parametrize("experts", THREADS, ids=[f"{t}-threads" for t in THREADS], indirect=True)
def bench_experts(benchmark, run, experts, tokens):
    _bench(benchmark, run, experts, tokens)


def _bench(benchmark, run: Run, setup: Setup, tokens: int) -> None:
    run.tell(f"{setup.label}, {setup.case.threads} threads: {tokens} row{'s' * (tokens > 1)}")
    run.cells.append(setup.cell(tokens))
    run.tell("", 1)
    alone = next(c for c in setup.contenders if c.name == OURS)
    benchmark.group = f"edgelab {OURS} alone, in cache"
    benchmark.pedantic(alone.calls[tokens][0], rounds=10, warmup_rounds=2)
