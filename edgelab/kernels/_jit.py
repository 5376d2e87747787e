"""How every kernel is compiled: `exact` keeps IEEE arithmetic, `approx` lets sums be reordered.

`approx` names its freedoms instead of saying `fastmath=True`, which also promises that no NaN or infinity ever occurs
and so makes `isnan(nan)` False. The freedoms: reorder sums (`reassoc`, what lets a dot product use vector lanes), fuse
multiply and add (`contract`), ignore the sign of zero (`nsz`), divide by multiplying with the reciprocal (`arcp`),
approximate functions (`afn`).

The GIL is held inside a kernel (no `nogil`): two Python threads then never enter numba's thread pool at once, which
its `workqueue` layer does not survive.

Two rules for whoever writes a kernel:
- helpers live in the kernel's own file: the on-disk cache (`cache=True`) notices edits to that file only;
- one Python function is compiled once: the cache does not tell `parallel` from serial, so each has a `def` of its own.
"""

from numba import njit

APPROX = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})


def exact(function=None, *, parallel: bool = False):
    """`function` compiled with IEEE arithmetic: the result is the NumPy twin's, bit for bit, where sums are integer."""
    options = {"cache": True, "parallel": parallel, "error_model": "numpy"}
    return njit(**options) if function is None else njit(**options)(function)


def approx(function=None, *, parallel: bool = False):
    """`function` compiled with the freedoms of `APPROX`: float sums agree with the NumPy twin within a bound."""
    options = {"cache": True, "parallel": parallel, "error_model": "numpy", "fastmath": set(APPROX)}
    return njit(**options) if function is None else njit(**options)(function)
