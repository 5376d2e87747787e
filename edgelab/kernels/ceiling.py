"""What this machine can do at most: read memory, multiply bytes. Measured in a fraction of a second, by loops that do nothing else.

A kernel cannot beat the slower of (its bytes / read bandwidth) and (its operations / integer peak): the roofline
(Williams, Waterman & Patterson, CACM 52(4), 2009). Both loops use the vectors and threads of the kernels. The time is the best
of many short runs: a ceiling is what the machine can do when nothing disturbs it.
"""

import time
from functools import cache, lru_cache

import numpy as np
from llvmlite import ir

from edgelab.kernels import simd
from edgelab.kernels._jit import ONE_AT_A_TIME, exact, job, threads
from edgelab.kernels.pack import VECTOR, aligned
from edgelab.kernels.pool import each, parts_of, ready
from edgelab.kernels.simd import Vectors, call, emitted

LINES = 16  # cache lines read per step, into as many sums
AHEAD = 4096  # bytes that the prefetch runs ahead


def _read(v: Vectors, x: ir.Value, y: ir.Value, count: ir.Value) -> None:
    """Read `count` blocks of LINES cache lines at x; their bitwise or goes to y, so that no load is left out."""
    per_line = VECTOR // (4 * v.lanes)

    def step(i, seen):
        seen = list(seen)
        for line in range(LINES):
            at = v.mul(i, LINES * VECTOR)
            v.prefetch(x, at, VECTOR * line + AHEAD)
            for part in range(per_line):
                seen[line % 4] = v.b.or_(seen[line % 4], v.load(v.i32, x, at, VECTOR * line + 4 * v.lanes * part))
        return seen

    for i, value in enumerate(v.loop(count, [v.ints(0)] * 4, step)):
        v.store(value, y, 4 * v.lanes * i)


def _multiply(v: Vectors, x: ir.Value, y: ir.Value, count: ir.Value) -> None:
    """`count` rounds of 12 `dot`s on registers; the sums go to y.

    Each takes another's sum of the round before as its activations: products of constants would be taken out of the loop.
    """
    w = v.load(v.i32, x)

    def step(i, sums):
        return [v.dot(total, w, sums[(n + 1) % len(sums)], 4) for n, total in enumerate(sums)]

    for i, value in enumerate(v.loop(count, [v.ints(i) for i in range(12)], step)):
        v.store(value, y, 4 * v.lanes * i)


_emit_read, _emit_multiply = emitted(_read), emitted(_multiply)


@cache
def _read_job() -> int:
    """Address of the job that reads its share of plan[2] blocks at plan[0]."""

    def read(p, part, parts):
        first, last = p[2] * part // parts, p[2] * (part + 1) // parts
        if last > first:
            _emit_read(p[0] + first * LINES * VECTOR, p[1] + part * _RESULT, last - first)

    return job(read).address


@cache
def _multiply_job() -> int:
    """Address of the job that does plan[2] rounds of products."""

    def multiply(p, part, parts):
        _emit_multiply(p[0], p[1] + part * _RESULT, p[2] // parts)

    return job(multiply).address


_RESULT = 1024  # bytes where a part leaves what keeps its work from being optimized away


@exact
def _go(state, function, plan, parts, workers):
    if workers:
        each(state, function, plan, parts, workers, 1)
    else:
        call(function, plan, 0, 1)


def _time(function: int, plan: np.ndarray, workers: int) -> float:
    """Seconds that a job takes on `workers` threads and this one."""
    with ONE_AT_A_TIME:
        start = time.perf_counter()
        _go(ready(workers), function, plan.ctypes.data, parts_of(workers), workers)
        return time.perf_counter() - start


def _workers(n: int | None) -> int:
    if n is not None and n < 1:
        raise ValueError(f"n={n} threads; use 1 or more")
    return (threads() if n is None else n) - 1


@lru_cache(1)
def _buffer(size: int) -> np.ndarray:
    buffer = aligned((size,))
    buffer[:] = 1  # a page that was never written is one shared page of zeros, which the cache holds
    return buffer


def read_bandwidth(n: int | None = None, size: int = 256 << 20, seconds: float = 0.4) -> float:
    """Bytes per second that `n` threads (default: as many as the kernels use) read from a buffer of `size` bytes.

    `size` far above the last cache measures the memory, one below a cache that cache. On a virtual machine the last cache
    can be larger than the machine says: 256 MiB it is.
    """
    workers = _workers(n)
    if size < LINES * VECTOR * parts_of(workers):
        raise ValueError(f"size={size} bytes is too little to share; use at least {LINES * VECTOR * parts_of(workers)}")
    x, y = _buffer(size), aligned((_RESULT * parts_of(workers),))
    pieces = max(1, size >> 24)  # each 16 MiB or more: short enough to find one undisturbed
    blocks = size // pieces // (LINES * VECTOR)
    plans = [np.array([x.ctypes.data + i * blocks * LINES * VECTOR, y.ctypes.data, blocks]) for i in range(pieces)]
    best = np.full(pieces, np.inf)
    stop, passes = time.perf_counter() + seconds, 0
    while passes < 4 or time.perf_counter() < stop:
        for i, plan in enumerate(plans):  # one after the other, so that none is in a cache when its turn comes
            best[i] = min(best[i], _time(_read_job(), plan, workers))
        passes += 1
    return pieces * blocks * LINES * VECTOR / best.sum()


def integer_peak(n: int | None = None, rounds: int = 200_000, seconds: float = 0.2) -> float:
    """Operations per second (a multiplication and an addition are two) of the byte products of `simd.way()`, on registers."""
    workers = _workers(n)
    parts = parts_of(workers)
    x, y = aligned((256,)), aligned((_RESULT * parts,))
    x[:] = 3
    plan = np.array([x.ctypes.data, y.ctypes.data, rounds * parts])
    best, stop, passes = np.inf, time.perf_counter() + seconds, 0
    while passes < 5 or time.perf_counter() < stop:
        best, passes = min(best, _time(_multiply_job(), plan, workers)), passes + 1
    return parts * rounds * 12 * simd.LANES[simd.way()] * 4 * 2 / best
