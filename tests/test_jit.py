"""How kernels are compiled, kept on disk and run on threads: `kernels/_jit.py`, `kernels/pool.py`."""

import itertools
import os
import signal
import subprocess
import sys
from textwrap import dedent

import numpy as np
import pytest

from edgelab.kernels import _jit, matmul, pool, simd
from edgelab.kernels._jit import job
from edgelab.kernels.reference import PAIRS


def in_a_new_process(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", dedent(code)], env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPUTE = """
    import numpy as np
    from edgelab.kernels import matmul
    from edgelab.kernels.reference import PAIRS

    matmul.PARALLEL_FROM_NS = 0
    kernel, reference, make = PAIRS["qmatmul"]
    args = make(np.random.default_rng(0), out=50, tokens=9)
    kernel(*args)
    got = args[-1].copy()
    reference(*args)
    assert abs(got - args[-1]).max() < 1e-3 * abs(args[-1]).max()
"""


def test_files_cut_short_or_unwritable_only_cost_a_compilation(tmp_path):
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    in_a_new_process(COMPUTE, **env)
    files = sorted(tmp_path.rglob("*.nbc"))
    assert len(files) > 5
    for i, file in enumerate(files):
        file.write_bytes(b"" if i % 2 else file.read_bytes()[:100])
    in_a_new_process(COMPUTE, **env)
    assert all(file.stat().st_size > 100 for file in files)


def test_without_a_folder_for_compiled_kernels_there_is_a_warning(monkeypatch):
    def nowhere(*args):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(_jit, "_Cache", nowhere)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        double = _jit.exact(lambda x: 2 * x)
    assert double(21) == 42


def test_variants_of_one_function_have_symbols_of_their_own():
    """Else the code of one would depend on which was loaded last."""
    matmul._integer_job.cache_clear()
    made, compiled = [], _jit.CFunc

    class Watched(compiled):
        def compile(self):
            super().compile()
            made.append(self._wrapper_name)

    original, _jit.CFunc = _jit.CFunc, Watched
    try:
        matmul._integer_job(4), matmul._integer_job(8)
    finally:
        _jit.CFunc = original
    assert len(set(made)) == 2


def test_threads_where_there_is_no_futex():
    """The way that macOS and Windows take: numba's parallel loop, and no system call is linked."""
    first = """
    import sys

    import numba.core.cgutils, numpy, llvmlite.binding  # they ask for the platform themselves

    platform, sys.platform = sys.platform, "elsewhere"
    import edgelab.kernels.pool as pool

    sys.platform = platform
    assert pool._SYSCALL is None and pool.each is pool._each_loop
    """
    then = """
    from edgelab.kernels import _jit

    results = []
    for threads in (1, 2, 3):
        _jit.set_threads(threads)
        args[-1][:] = np.nan
        kernel(*args)
        results.append(args[-1].tobytes())
    assert results[0] == results[1] == results[2]
    """
    in_a_new_process(dedent(first) + dedent(COMPUTE) + dedent(then), NUMBA_NUM_THREADS="3")


def test_a_signal_s_handler_may_call_a_kernel(monkeypatch):
    """It runs in the thread that holds the lock."""
    monkeypatch.setattr(matmul, "PARALLEL_FROM_NS", 0)
    monkeypatch.setattr(matmul, "threads", lambda: 2)
    kernel, _, make = PAIRS["qmatmul"]
    args, others = (make(np.random.default_rng(0), out=300, n=512, tokens=20) for _ in range(2))
    kernel(*args)  # compiled
    calls = []

    def handler(*_):
        kernel(*others)
        calls.append(1)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(40):
            signal.setitimer(signal.ITIMER_REAL, 2e-4 + 1e-5 * i)
            while len(calls) == i:
                kernel(*args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert args[-1].tobytes() == others[-1].tobytes()


def test_every_part_is_done_once_however_many_threads_are_asked_for():
    def count(p, part, parts):
        p[1 + part] += 1

    address = job(count, variant="test").address
    for workers in (0, 1, 3):
        for parts in (1, 7, 64):
            plan = np.zeros(parts + 1, np.int64)
            with _jit.ONE_AT_A_TIME:
                for _ in range(50):
                    pool.each(pool.ready(workers), address, plan.ctypes.data, parts, workers, parts % 2)
            assert (plan[1:] == 50).all()
    assert matmul.workers_for(1e9, 10_000) == pool.MOST_WORKERS  # what the ticket has room for


def test_the_integer_peak_is_of_products():
    """Products of constants leave the loop: AVX2 then seems 15 times as fast as AVX-VNNI, whose half it is."""
    can = [way for way in ("avx512", "avxvnni", "avx2", "portable") if way in simd.ways()]
    code = "from edgelab.kernels.ceiling import integer_peak\nprint(integer_peak(1, seconds=0.1))"
    peaks = [float(in_a_new_process(code, EDGELAB_SIMD=way)) for way in can]
    for better, worse in itertools.pairwise(peaks):
        assert worse < 2 * better, dict(zip(can, peaks, strict=True))
