"""The routed experts of a mixture in one call: y[t] = sum_j w[t, j] * down_e(silu(gate_e x[t]) * up_e x[t]), e = index[t, j].

From the packed stacks, of which only the experts that a token chose are read. Five steps on one arena: sort the choices
by expert (`router.dispatch`), gate and up product with each expert's tokens gathered on the way in, SwiGLU, down product,
weighted sum back to tokens (`router.combine`). One compiled function for all bit widths: the products are jobs called by
address (`matmul.py`).
"""

from functools import cache, lru_cache

import numpy as np

from edgelab.kernels import micro
from edgelab.kernels._jit import ONE_AT_A_TIME, exact, job
from edgelab.kernels.matmul import OUT, PLAN, SLOTS, X, Y, arena, check, expected_ns, jobs_of, numbers, plan, up, workers_for
from edgelab.kernels.pack import Tiles
from edgelab.kernels.pool import LONG_NS, each, parts_of, ready
from edgelab.kernels.router import _combine_kernel, _dispatch_kernel
from edgelab.kernels.simd import call, emitted

_swiglu = emitted(micro.swiglu)


@cache
def _glu_job() -> int:
    """Address of the job that writes silu(gate) * up of its slots. Of its plan it reads SLOTS, OUT (inner), X (gate and up), Y."""

    def glu(p, part, parts):
        slots, inner = p[SLOTS], p[OUT]
        for i in range(slots * part // parts, slots * (part + 1) // parts):
            _swiglu(p[X] + i * inner * 8, p[Y] + i * inner * 4, inner)

    return job(glu).address


@exact
def _prepare(first, second, places, x, indices, arena, experts, hidden, inner):
    """Sort the choices and write the three plans. Returns the first choice that is out of range, or -1."""
    slots, k = indices.size, indices.shape[1]
    order = arena[places[0] :][: 8 * slots].view(np.int64)
    offsets = arena[places[1] :][: 8 * (experts + 1)].view(np.int64)
    rows = arena[places[2] :][: 8 * slots].view(np.int64)
    wrong = _dispatch_kernel(indices, experts, order, offsets)
    if wrong >= 0:
        return wrong
    kept = offsets[experts]
    for i in range(kept):
        rows[i] = order[i] // k
    y1 = arena[places[3] :][: 8 * slots * inner].view(np.float32).reshape(slots, 2 * inner)
    h = arena[places[4] :][: 4 * slots * inner].view(np.float32).reshape(slots, inner)
    y2 = arena[places[5] :][: 4 * slots * hidden].view(np.float32).reshape(slots, hidden)
    glu = arena[places[6] :][: 8 * PLAN].view(np.int64)
    glu[SLOTS], glu[OUT], glu[X], glu[Y] = kept, inner, y1.ctypes.data, h.ctypes.data
    plan(arena[places[7] :], first[0], first[1], offsets, x, rows, y1)
    plan(arena[places[8] :], second[0], second[1], offsets, h, rows[:0], y2)
    return -1


@exact
def _gather(places, indices, weights, arena, experts, hidden, out):
    slots = indices.size
    order = arena[places[0] :][: 8 * slots].view(np.int64)
    kept = arena[places[1] :][: 8 * (experts + 1)].view(np.int64)[experts]
    y2 = arena[places[5] :][: 4 * slots * hidden].view(np.float32).reshape(slots, hidden)
    _combine_kernel(y2[:kept], order, weights, out)


@exact
def _serial(jobs, first, second, places, x, indices, weights, arena, out, experts, inner):
    hidden, a = out.shape[1], arena.ctypes.data
    wrong = _prepare(first, second, places, x, indices, arena, experts, hidden, inner)
    if wrong >= 0:
        return wrong
    if jobs[0]:
        call(jobs[0], a + places[7], 0, 1)
    call(jobs[1], a + places[7], 0, 1)
    call(jobs[2], a + places[6], 0, 1)
    if jobs[3]:
        call(jobs[3], a + places[8], 0, 1)
    call(jobs[4], a + places[8], 0, 1)
    _gather(places, indices, weights, arena, experts, hidden, out)
    return -1


@exact
def _threaded(jobs, first, second, places, x, indices, weights, arena, out, experts, inner, state, parts, workers, long):
    hidden, a = out.shape[1], arena.ctypes.data
    wrong = _prepare(first, second, places, x, indices, arena, experts, hidden, inner)
    if wrong >= 0:
        return wrong
    if jobs[0]:
        each(state, jobs[0], a + places[7], parts, workers, long)
    each(state, jobs[1], a + places[7], parts, workers, long)
    each(state, jobs[2], a + places[6], parts, workers, long)
    if jobs[3]:
        each(state, jobs[3], a + places[8], parts, workers, long)
    each(state, jobs[4], a + places[8], parts, workers, long)
    _gather(places, indices, weights, arena, experts, hidden, out)
    return -1


@lru_cache(1024)
def _places(slots: int, experts: int, hidden: int, inner: int, size1: int, size2: int) -> tuple[tuple[int, ...], int]:
    """(where order, offsets, rows, gate_up's output, down's input, its output, and the three plans begin; bytes in all)."""
    sizes = (8 * slots, 8 * (experts + 1), 8 * slots, 8 * slots * inner, 4 * slots * inner, 4 * slots * hidden, 8 * PLAN, size1, size2)
    places, at = [], 0
    for size in sizes:
        places.append(at)
        at += up(size)
    return tuple(places), at


def swiglu_experts(
    gate_up: Tiles, down: Tiles, x: np.ndarray, indices: np.ndarray, weights: np.ndarray, out: np.ndarray, activations: str = "float32"
) -> None:
    """Fill `out` float32 [tokens, hidden] with each token's weighted sum of its experts' outputs.

    `gate_up` [experts, 2 * inner, hidden], gate first, `down` [experts, hidden, inner]; x float32 [tokens, hidden];
    `indices` int64 and `weights` float32 [tokens, k]. The index `experts` means none: that choice is skipped, whatever
    its weight. ValueError where the arrays do not fit or an index is out of range.
    """
    experts, inner = gate_up.codes.shape[0], down.n
    if (down.codes.shape[0], down.out, gate_up.out) != (experts, gate_up.n, 2 * inner):
        raise ValueError(
            f"gate_up {(experts, gate_up.out, gate_up.n)} and down {(down.codes.shape[0], down.out, inner)} do not fit; "
            "they are [experts, 2 * inner, hidden] and [experts, hidden, inner]"
        )
    check(gate_up, x, np.empty((0, gate_up.out), np.float32), activations)
    check(down, np.empty((0, inner), np.float32), out, activations)
    for name, a, kind in (("indices", indices, np.int64), ("weights", weights, np.float32)):
        if a.dtype != kind or a.ndim != 2 or not a.flags.c_contiguous:
            raise ValueError(f"{name} are {a.dtype} {a.shape}; they must be contiguous {np.dtype(kind)} [tokens, k]")
    if not len(x) == len(out) == len(indices) or indices.shape != weights.shape:
        raise ValueError(f"x {x.shape}, indices {indices.shape}, weights {weights.shape} and out {out.shape} are not of the same tokens")
    run(gate_up, down, x, indices, weights, out, activations == "int8")


def run(gate_up: Tiles, down: Tiles, x, indices, weights, out, integer: bool, most: int | None = None, name: str = "indices") -> None:
    """`swiglu_experts` without its checks but for the indices (`name` them in an error), on up to `most` threads."""
    tokens, k = indices.shape
    slots, experts, inner = tokens * k, gate_up.codes.shape[0], down.n
    if not slots or not inner:
        out[:] = 0
        return
    active = min(slots, experts)
    ns = expected_ns(gate_up, slots, active, integer) + expected_ns(down, slots, active, integer)
    workers = workers_for(ns, most)
    parts = parts_of(workers)
    numbers1, size1 = numbers(gate_up, slots, integer, True, parts)
    numbers2, size2 = numbers(down, slots, integer, False, parts)
    places, size = _places(slots, experts, gate_up.n, inner, size1, size2)
    jobs = (*jobs_of(gate_up, integer, numbers1), _glu_job(), *jobs_of(down, integer, numbers2))
    first, second = (gate_up[:3], numbers1), (down[:3], numbers2)
    args = (jobs, first, second, places, x, indices, weights, arena(size), out, experts, inner)
    if workers:
        with ONE_AT_A_TIME:
            wrong = _threaded(*args, ready(workers), parts, workers, ns >= LONG_NS)
    else:
        wrong = _serial(*args)
    if wrong >= 0:
        t, j = divmod(wrong, k)
        raise ValueError(f"{name}[{t}, {j}]={indices[t, j]}; experts are 0 .. {experts - 1}, and {experts} means none")
