"""How every kernel is compiled: `exact` keeps IEEE arithmetic, `approx` lets sums be reordered.

`approx` names its freedoms instead of saying `fastmath=True`, which also promises that no NaN or infinity ever occurs
and so makes `isnan(nan)` False. The freedoms: reorder sums (`reassoc`, what lets a dot product use vector lanes), fuse
multiply and add (`contract`), ignore the sign of zero (`nsz`), divide by multiplying with the reciprocal (`arcp`),
approximate functions (`afn`).

Threads come from numba's own `workqueue` layer, unless the environment chooses another (`NUMBA_THREADING_LAYER`): its
idle threads sleep. With OpenMP they spin, and on a machine with other work to do a kernel of 0.13 ms took 22 ms (median of
300 calls, two threads on two busy cores; `workqueue` 0.16 ms). `workqueue` aborts the process when two Python threads are
in it at once, and numba releases the GIL around a parallel loop: hold `ONE_AT_A_TIME` to call a parallel kernel.

Two rules for whoever writes a kernel:
- helpers live in the kernel's own file: the on-disk cache (`cache=True`) notices edits to that file only;
- one Python function is compiled once: the cache does not tell `parallel` from serial, so each has a `def` of its own.
"""

import os
import threading

import numba
from numba import njit

if not {"NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY"} & set(os.environ):
    numba.config.THREADING_LAYER = "workqueue"  # no effect when numba's threads already run

ONE_AT_A_TIME = threading.Lock()
APPROX = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})


def exact(function=None, *, parallel: bool = False):
    """`function` compiled with IEEE arithmetic: the result is the NumPy twin's, bit for bit, where sums are integer."""
    options = {"cache": True, "parallel": parallel, "error_model": "numpy"}
    return njit(**options) if function is None else njit(**options)(function)


def approx(function=None, *, parallel: bool = False):
    """`function` compiled with the freedoms of `APPROX`: float sums agree with the NumPy twin within a bound."""
    options = {"cache": True, "parallel": parallel, "error_model": "numpy", "fastmath": set(APPROX)}
    return njit(**options) if function is None else njit(**options)(function)
