"""What this machine can do at most: read memory, multiply bytes. Measured in a fraction of a second, by loops that do nothing else.

A kernel cannot beat the slower of (its bytes / read bandwidth) and (its operations / integer peak): the roofline
(Williams, Waterman & Patterson, CACM 52(4), 2009). Both loops use the same vectors and threads as the kernels. The time
is the best of many short runs: a ceiling is what the machine can do when nothing disturbs it.
"""

import time
from functools import cache

import numpy as np
from llvmlite import ir
from numba import prange

from edgelab.kernels import simd
from edgelab.kernels._jit import ONE_AT_A_TIME, exact, threads
from edgelab.kernels.pack import VECTOR, aligned
from edgelab.kernels.simd import Vectors, emitted

LINES = 16  # cache lines read per step, into as many sums
AHEAD = 2048  # bytes that the prefetch runs ahead


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
    """`count` rounds of 12 independent `dot`s on registers; the sums go to y."""
    w, four = v.load(v.i32, x), v.load(v.i32, x, 4 * v.lanes)

    def step(i, sums):
        return [v.dot(total, w, four, 4) for total in sums]

    for i, value in enumerate(v.loop(count, [v.ints(i) for i in range(12)], step)):
        v.store(value, y, 4 * v.lanes * i)


_emit_read, _emit_multiply = emitted(_read), emitted(_multiply)


@exact(parallel=True)
def _read_all(x, y, blocks, parts):
    px, py = x.ctypes.data, y.ctypes.data
    if parts == 1:  # no launch of threads
        _emit_read(px, py, blocks)
        return
    for part in prange(parts):
        first, last = blocks * part // parts, blocks * (part + 1) // parts
        _emit_read(px + first * LINES * VECTOR, py + part * 1024, last - first)


@exact(parallel=True)
def _multiply_all(x, y, rounds, parts):
    px, py = x.ctypes.data, y.ctypes.data
    if parts == 1:
        _emit_multiply(px, py, rounds)
        return
    for part in prange(parts):
        _emit_multiply(px, py + part * 1024, rounds)


def _best(run, seconds: float) -> float:
    """The shortest time of `run()`, seconds, tried for about `seconds`."""
    times, stop = [], time.perf_counter() + seconds
    with ONE_AT_A_TIME:
        run()
        while time.perf_counter() < stop or len(times) < 5:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times)


@cache
def _buffer(size: int) -> np.ndarray:
    buffer = aligned((size,))
    buffer[:] = 1  # a page that was never written is one shared page of zeros, which the cache holds
    return buffer


def read_bandwidth(parts: int | None = None, size: int = 256 << 20, seconds: float = 0.4) -> float:
    """Bytes per second that `parts` threads (default: the kernels' number) read from a buffer of `size` bytes.

    `size` far above the last cache measures the memory, one below a cache that cache.
    """
    parts = parts or threads()
    x, y = _buffer(size), aligned((1024 * parts,))
    blocks = size // (LINES * VECTOR)
    return blocks * LINES * VECTOR / _best(lambda: _read_all(x, y, blocks, parts), seconds)


def integer_peak(parts: int | None = None, rounds: int = 1_000_000, seconds: float = 0.2) -> float:
    """Operations per second (a multiplication and an addition are two) of the byte products of `simd.way()`, on registers."""
    parts = parts or threads()
    x, y = aligned((256,)), aligned((1024 * parts,))
    x[:] = 3
    per_round = 12 * simd.LANES[simd.way()] * 4 * 2
    return parts * rounds * per_round / _best(lambda: _multiply_all(x, y, rounds, parts), seconds)
