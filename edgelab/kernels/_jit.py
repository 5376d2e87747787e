"""How every kernel is compiled and cached, and how many threads run it.

`exact` keeps IEEE arithmetic, `approx` lets sums be reordered. `approx` names its freedoms instead of saying
`fastmath=True`, which also promises that no NaN or infinity ever occurs and so makes `isnan(nan)` False. The freedoms:
reorder sums (`reassoc`, what lets a dot product use vector lanes), fuse multiply and add (`contract`), ignore the sign of
zero (`nsz`), divide by multiplying with the reciprocal (`arcp`), approximate functions (`afn`).

Compiled kernels are kept on disk. numba's own cache looks at the kernel's file only, so an edit to a helper elsewhere, or
another choice of instructions, would go unnoticed; ours also asks for the digest of every file in `kernels/` and for the
way of `simd.py`.

Kernels run on threads of our own (`pool.py`), one product at a time: hold `ONE_AT_A_TIME`. Where those do not exist, and in
`ceiling.py`, threads come from numba's `workqueue` layer, unless the environment chooses another (`NUMBA_THREADING_LAYER`):
OpenMP's idle threads spin, and beside a busy process a kernel of 0.13 ms took 22 ms. `workqueue` aborts the process when two
Python threads are in it at once, which the same lock prevents.
"""

import glob
import hashlib
import operator
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numba
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

from edgelab.kernels import simd

if not {"NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY"} & set(os.environ):
    numba.config.THREADING_LAYER = "workqueue"  # no effect when numba's threads already run

ONE_AT_A_TIME = threading.Lock()
APPROX = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})
_chosen: int | None = None


# of the sources of all kernels, read at import: the sources that this process runs
_DIGEST = hashlib.sha256(
    b"\0".join(path.name.encode() + path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()


class _Files(IndexDataCacheFile):
    """One file per compiled function, named after its key.

    numba numbers its files and keeps an index: two processes that compile at the same time can take the same number, and
    one then loads the other's code. A name of the key's own cannot be mistaken. Files of other sources are removed.
    """

    def __init__(self, folder: str, base: str) -> None:
        super().__init__(folder, base, None)
        self._base = base

    def _name(self, key: tuple) -> str:
        return f"{self._base}.{_DIGEST[:8]}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def save(self, key, data) -> None:
        self._save_data(self._name(key), data)
        for old in Path(self._cache_path).glob(f"{glob.escape(self._base)}.*"):
            if not old.name.startswith(f"{self._base}.{_DIGEST[:8]}."):
                old.unlink(missing_ok=True)

    def load(self, key):
        try:
            return self._load_data(self._name(key))
        except OSError:
            return None

    def flush(self) -> None:
        for file in Path(self._cache_path).glob(f"{glob.escape(self._base)}.{_DIGEST[:8]}.*"):
            file.unlink(missing_ok=True)


class _Cache(FunctionCache):
    """numba's on-disk cache with a key of our own: signature, processor, `variant`, way, digest of the sources."""

    def __init__(self, function: Callable, variant: object) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base)
        self._variant = variant

    def _index_key(self, sig, codegen):
        return str(sig), codegen.magic_tuple(), self._variant, simd.way(), numba.__version__, _DIGEST


def exact(function=None, *, parallel: bool = False, variant: object = None):
    """`function` compiled with IEEE arithmetic: the result is the NumPy twin's, bit for bit, where sums are integer.

    `variant` tells apart the functions that one `def` inside a factory makes.
    """
    return _compiled(function, variant, parallel=parallel)


def approx(function=None, *, parallel: bool = False, variant: object = None):
    """`function` compiled with the freedoms of `APPROX`: float sums agree with the NumPy twin within a bound."""
    return _compiled(function, variant, parallel=parallel, fastmath=set(APPROX))


def _compiled(function, variant, **options):
    if function is None:
        return lambda f: _compiled(f, variant, **options)
    dispatcher = njit(error_model="numpy", nogil=True, **options)(function)
    dispatcher._cache = _Cache(function, variant)  # what `cache=True` does, with our key
    return dispatcher


def job(function=None, *, variant: object = None):
    """`function` (plan, part, parts) as a C function, compiled with IEEE arithmetic on first use of its `.address`.

    `plan` points to int64 numbers, addresses among them. A loop over threads calls jobs by address (`simd.call`), so that
    it is compiled once and not, as a loop that calls kernels by name, again with each kernel's body inside (4.6 s against 1.7 s).
    """
    if function is None:
        return lambda f: job(f, variant=variant)
    signature = types.void(types.CPointer(types.int64), types.int64, types.int64)
    made = CFunc(function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"})
    made._cache = _Cache(function, variant)
    made.compile()
    return made


def set_threads(n: int | None) -> int:
    """The number of threads that kernels used before; from now on they use up to `n` (None: numba's number again).

    A product too small to gain from threads runs on one. Raises ValueError outside 1 .. the number numba started with.
    """
    global _chosen
    before, most = threads(), numba.config.NUMBA_NUM_THREADS
    if n is not None:
        try:
            n = operator.index(n)
        except TypeError:
            raise ValueError(f"n={n!r} is not a number of threads; use 1 .. {most}") from None
        if not 1 <= n <= most:
            raise ValueError(f"n={n} threads: kernels can use 1 .. {most} here (NUMBA_NUM_THREADS, set before Python starts, raises it)")
    _chosen = n
    return before


def threads() -> int:
    """The number of threads that kernels use for a product worth them."""
    return _chosen if _chosen is not None else numba.get_num_threads()


def threads_are_chosen() -> bool:
    """Whether `set_threads` was called with a number."""
    return _chosen is not None
