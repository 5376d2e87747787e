"""How every kernel is compiled and cached, and how many threads run it.

`exact` keeps IEEE arithmetic; no kernel gives numba leave to do otherwise. Those that want vector lanes and fused operations say so
themselves (`simd.py`), and so stay the same on every processor; `fastmath=True` would also promise that no NaN ever occurs,
and make `isnan(nan)` False.

Compiled kernels are kept on disk. numba's own cache looks at the kernel's file only, so an edit to a helper elsewhere, or
another choice of instructions, would go unnoticed; ours also asks for the digest of every file in `kernels/` and for the
way of `simd.py`.

Kernels run on threads of our own (`pool.py`), one product at a time: hold `ONE_AT_A_TIME`. Elsewhere than on Linux threads
come from numba's `workqueue` layer, unless the environment chooses another (`NUMBA_THREADING_LAYER`):
OpenMP's idle threads spin, and beside a busy process a kernel of 0.13 ms took 22 ms. `workqueue` aborts the process when two
Python threads are in it at once, which the same lock prevents.
"""

import glob
import hashlib
import operator
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numba
from numba import njit, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

from edgelab.kernels import simd

if sys.platform != "linux" and not {"NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY"} & set(os.environ):
    numba.config.THREADING_LAYER = "workqueue"  # no effect when numba's threads already run

ONE_AT_A_TIME = threading.RLock()  # a signal's handler runs in the thread that holds it, after the kernel, and may call another
_chosen: int | None = None


# of the sources of all kernels, read at import: the sources that this process runs
_DIGEST = hashlib.sha256(
    b"\0".join(path.name.encode() + path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()


class _Files(IndexDataCacheFile):
    """One file per compiled function, named after its key.

    numba numbers its files and keeps an index: two processes that compile at the same time can take the same number, and
    one then loads the other's code. A name of the key's own cannot be mistaken. What older sources left for a function at the
    same place of its file is removed.
    """

    def __init__(self, folder: str, base: str) -> None:
        super().__init__(folder, base, None)
        self._base = base

    def _name(self, key: tuple) -> str:
        return f"{self._base}.{_DIGEST[:8]}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def save(self, key, data) -> None:
        with suppress(OSError):  # a full disk, another user's folder: compiled again next time
            self._save_data(self._name(key), data)
            for old in Path(self._cache_path).glob(f"{glob.escape(self._base)}.*"):
                if not old.name.startswith(f"{self._base}.{_DIGEST[:8]}."):
                    old.unlink(missing_ok=True)

    def load(self, key):
        try:
            return self._load_data(self._name(key))
        except FileNotFoundError:
            return None
        except Exception:  # cut short when the machine went down, say: whatever it is, it is not the code
            with suppress(OSError):
                (Path(self._cache_path) / self._name(key)).unlink()
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


def exact(function: Callable | None = None, *, parallel: bool = False):
    """`function` compiled with IEEE arithmetic: the result is the NumPy twin's, bit for bit, where sums are integer."""
    if function is None:
        return lambda f: exact(f, parallel=parallel)
    dispatcher = njit(error_model="numpy", nogil=True, parallel=parallel)(function)
    if (kept := _cache_of(function)) is not None:
        dispatcher._cache = kept  # what `cache=True` does, with our key
    return dispatcher


def _cache_of(function: Callable, variant: object = None) -> _Cache | None:
    """The on-disk cache of `function`; None, with a warning, where no folder can be written to."""
    try:
        return _Cache(function, variant)
    except RuntimeError as error:  # numba's "no locator available"
        warnings.warn(
            f"edgelab's kernels are compiled again in each process, for nothing can be kept on disk ({error}): "
            "set NUMBA_CACHE_DIR to a folder that can be written to",
            stacklevel=2,
        )
        return None


def job(function: Callable, variant: object = None) -> CFunc:
    """`function` (plan, part, parts) as a C function of that `.address`, compiled at once with IEEE arithmetic.

    `plan` points to int64 numbers, addresses among them. A loop over threads calls jobs by address (`simd.call`), so that
    it is compiled once and not, as a loop that calls kernels by name, again with each kernel's body inside (4.6 s against 1.7 s).
    `variant` tells apart the jobs that one `def` inside a factory makes.
    """
    function.__qualname__ += f"_{variant}"  # of which numba makes the symbol: each variant has its own
    signature = types.void(types.CPointer(types.int64), types.int64, types.int64)
    made = CFunc(function, (signature.args, signature.return_type), locals={}, options={"error_model": "numpy"})
    if (kept := _cache_of(function, variant)) is not None:
        made._cache = kept
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
    return _chosen if _chosen is not None else numba.config.NUMBA_NUM_THREADS


def threads_are_chosen() -> bool:
    """Whether `set_threads` was called with a number."""
    return _chosen is not None
