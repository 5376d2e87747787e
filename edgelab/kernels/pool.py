"""Threads for the kernels: a job is cut into parts, and whoever is free takes the next one.

A kernel of 0.2 ms gains from a second thread only if handing over costs little. On a 2-core virtual machine (AMD EPYC
9005) an empty parallel loop took 36-56 microseconds with numba's `workqueue` layer and 3 with its OpenMP layer, but 7
milliseconds with OpenMP when another process held a core: static shares wait for the slowest. So here

- a worker that has nothing to do watches for the next job for some 100 microseconds, then sleeps (a Linux futex);
- parts are claimed one by one with an atomic counter, so a worker that wakes late, or not at all, costs nothing: the
  calling thread goes on by itself, and at the end waits only for parts that somebody has begun.

Which thread computes a part changes nothing in the result. The workers are Python threads that never come back to Python
until the process ends. Elsewhere than on Linux, jobs go through numba's parallel loop.

The claim is one 64-bit word, the ticket: number of the job, workers invited, parts, and the next part. Claiming a part is
a compare-and-swap of the whole word, so a worker that still looks at an old job can never take a part of a new one.
"""

import atexit
import os
import platform
import sys
import threading

import numpy as np
from llvmlite import ir
from numba import config, prange, set_num_threads, types
from numba.core import cgutils

from edgelab.kernels import simd
from edgelab.kernels._jit import ONE_AT_A_TIME, exact
from edgelab.kernels.pack import aligned
from edgelab.kernels.simd import I32, I64, call

_SYSCALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None  # futex
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT, FUTEX_WAKE with FUTEX_PRIVATE_FLAG
_SPINS = 4_000  # looks at the ticket before a worker sleeps, some 25 ns each
# Looks at a job's last parts before the caller offers its core: on a busy machine a worker may hold a part and wait for this very core.
_PATIENCE = 2_000
LONG_NS = 300_000  # a job expected to take so long on one thread is worth waking workers for
PARTS_PER_THREAD = 4
_MOST_PARTS, MOST_WORKERS = 4095, 255  # what the ticket has room for
_NUMBA_THREADS = config.NUMBA_NUM_THREADS

# words of the state, each on a cache line of its own
_TICKET, _FUNCTION, _PLAN, _FINISHED, _EPOCH, _ASLEEP, _STOP = (64 * i for i in range(7))


def _atomic(emit, returns: bool, arguments: int):
    """An intrinsic of int64 `arguments` whose LLVM code `emit` (builder, *values) makes; the first one is an address."""

    def typed(typingctx, *args):
        def codegen(context, builder, signature, values):
            result = emit(builder, builder.inttoptr(values[0], I64.as_pointer()), *values[1:])
            return result if returns else context.get_dummy_value()

        return (types.int64 if returns else types.void)(*[types.int64] * len(args)), codegen

    return simd.spelled(typed, [f"a{i}" for i in range(arguments)], emit.__name__)


def _emit_load(b, address):
    return b.load_atomic(address, "seq_cst", 8)


def _emit_store(b, address, value):
    b.store_atomic(value, address, "seq_cst", 8)


def _emit_add(b, address, value):
    return b.atomic_rmw("add", address, value, "seq_cst")


def _emit_swap(b, address, old, new):
    """1 if the word was `old` and is now `new`."""
    return b.zext(b.extract_value(b.cmpxchg(address, old, new, "seq_cst"), 1), I64)


def _emit_pause(b, address):
    """A moment's rest for the other hardware thread of the core."""
    match platform.machine():
        case "x86_64" | "AMD64":
            b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"), [])
        case "aarch64" | "arm64":
            kind = ir.FunctionType(ir.VoidType(), [I32])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.hint"), [ir.Constant(I32, 1)])


def _emit_futex(b, address, operation, value):
    """The system call: sleep while the 32-bit word at the address is `value`, or wake up to `value` sleepers."""
    kind = ir.FunctionType(I64, [I64], var_arg=True)
    syscall = cgutils.get_or_insert_function(b.module, kind, "syscall")
    none = ir.Constant(I64, 0)
    return b.call(syscall, [ir.Constant(I64, _SYSCALL or 0), address, operation, value, none, none, none])


_load, _store = _atomic(_emit_load, True, 1), _atomic(_emit_store, False, 2)
_add, _swap = _atomic(_emit_add, True, 2), _atomic(_emit_swap, True, 3)
_pause, _futex = _atomic(_emit_pause, False, 1), _atomic(_emit_futex, True, 3)


def _emit_yield(b, address):
    """Let another thread of this core run: the one that we wait for, perhaps."""
    b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, []), "sched_yield"), [])


_yield = _atomic(_emit_yield, False, 1)


@exact
def _take(state, ticket):
    """Do parts of the ticket's job until none is left."""
    function, plan = _load(state + _FUNCTION), _load(state + _PLAN)
    job, parts = ticket >> 32, (ticket >> 12) & 4095
    while ticket >> 32 == job and ticket & 4095 < parts:
        if _swap(state + _TICKET, ticket, ticket + 1):
            # the job cannot end before this part does, so function and plan, read earlier, were this job's
            call(function, plan, ticket & 4095, parts)
            _add(state + _FINISHED, 1)
        ticket = _load(state + _TICKET)


@exact
def _serve(state, who):
    """What worker `who` does until the end."""
    idle = 0
    while not _load(state + _STOP):
        ticket = _load(state + _TICKET)
        if ticket & 4095 < (ticket >> 12) & 4095 and who < (ticket >> 24) & 255:
            _take(state, ticket)
            idle = 0
        elif idle < _SPINS:
            idle += 1
            _pause(state)
        else:
            epoch = _load(state + _EPOCH) & 0x7FFFFFFF
            _add(state + _ASLEEP, 1)
            # a job announced before we counted as asleep is seen here, one announced later changes the epoch
            if _load(state + _TICKET) == ticket and not _load(state + _STOP):
                _futex(state + _EPOCH, _WAIT, epoch)
            _add(state + _ASLEEP, -1)
            idle = 0


@exact
def _wake(state):
    epoch = _load(state + _EPOCH)
    _store(state + _EPOCH, (epoch + 1) & 0x7FFFFFFF)
    if _load(state + _ASLEEP) > 0:
        _futex(state + _EPOCH, _WAKE, MOST_WORKERS)


@exact
def _each_pool(state, function, plan, parts, workers, long):
    _store(state + _FUNCTION, function)
    _store(state + _PLAN, plan)
    _store(state + _FINISHED, 0)
    job = (_load(state + _TICKET) >> 32) + 1
    ticket = (job & 0x7FFFFFFF) << 32 | workers << 24 | parts << 12
    _store(state + _TICKET, ticket)
    if long:
        _wake(state)
    _take(state, ticket)
    waited = 0
    while _load(state + _FINISHED) < parts:
        _pause(state)
        waited += 1
        if waited > _PATIENCE:
            _yield(state)
    if not long:
        _wake(state)


@exact(parallel=True)
def _each_loop(state, function, plan, parts, workers, long):
    set_num_threads(min(workers + 1, _NUMBA_THREADS))
    for part in prange(parts):
        call(function, plan, part, parts)


# Do job `function` (an address, see `_jit.job`) with the plan at address `plan`, in `parts` parts on `workers` threads
# besides the caller's. One caller at a time. A worker that sleeps takes some 50 microseconds to come: for a job that is not
# `long` it is woken at the end, for the next job, and only those that are awake share this one.
each = _each_loop if _SYSCALL is None else _each_pool


class _Pool:
    """The state words and the workers of this process."""

    def __init__(self) -> None:
        self.state = aligned((64 * 7,))
        self.address = self.state.ctypes.data
        self.workers: list[threading.Thread] = []

    def ready(self, workers: int) -> int:
        """The address of the state, with at least so many workers running."""
        if _SYSCALL is None:
            return self.address
        if not self.workers and workers:  # compiled now: not in a thread that may fail alone, nor while the process ends
            _serve.compile((types.int64, types.int64))
            _wake(self.address)
        while len(self.workers) < min(workers, MOST_WORKERS):
            thread = threading.Thread(target=_serve, args=(self.address, len(self.workers)), name="edgelab-kernels", daemon=True)
            thread.start()
            self.workers.append(thread)
        return self.address

    def stop(self) -> None:
        """End the workers: their code must not be freed under them when the process exits."""
        if self.workers:
            self.state.view(np.int64)[_STOP // 8] = 1
            _wake(self.address)
            for thread in self.workers:
                thread.join()
            self.workers.clear()


_pool = _Pool()


def ready(workers: int) -> int:
    """The `state` that `each` takes, with `workers` workers running."""
    return _pool.ready(workers)


def parts_of(workers: int) -> int:
    """In how many parts to cut a job."""
    return min(_MOST_PARTS, PARTS_PER_THREAD * (workers + 1)) if workers else 1


def _forked() -> None:
    global _pool
    _pool = _Pool()  # a child has none of its parent's threads
    ONE_AT_A_TIME.release()


atexit.register(lambda: _pool.stop())
if hasattr(os, "register_at_fork"):
    # held over the fork, lest a child inherit the lock from a thread that it does not have
    os.register_at_fork(before=ONE_AT_A_TIME.acquire, after_in_parent=ONE_AT_A_TIME.release, after_in_child=_forked)
