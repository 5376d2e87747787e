"""The matmul kernels: each against its NumPy twin, within the bound derived in `kernels/reference.py`, and what else holds for them."""

import ctypes
import itertools
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numba
import numpy as np
import pytest

from edgelab.kernels import matmul
from edgelab.kernels._jit import set_threads, threads
from edgelab.kernels.matmul import qmatmul, qmatmul_experts
from edgelab.kernels.pack import tile
from edgelab.kernels.reference import BOUNDS, PAIRS, untile, weight
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup, QuantScheme

NAMES = ["qmatmul", "qmatmul_int8", "qmatmul_experts", "qmatmul_experts_int8"]
BITS = [2, 3, 4, 8]
GRANULARITIES = {
    "tensor": {"group_size": 0, "per_tensor": True},
    "row": {"group_size": 0},
    "g7": {"group_size": 7},
    "g8": {"group_size": 8},
    "g32": {"group_size": 32},
    "g64": {"group_size": 64},
    "g128": {"group_size": 128},
}
# out, n, tokens: one of each, odd everything, no token, around a tile of 16 rows and a panel of 32, more inputs than a panel's 512,
# every number of rows up to 14, and some above the 32 up to which a way may unpack codes again for each block of rows
SHAPES = [
    (1, 1, 1),
    (16, 32, 1),
    (17, 61, 2),
    (31, 33, 3),
    (32, 96, 8),
    (49, 64, 9),
    (16, 96, 0),
    (48, 545, 13),
    (33, 1100, 45),
    (65, 31, 5),
]
SHAPES += [(20, 40, tokens) for tokens in (*range(15), 33, 35, 37, 41, 150)]


def fitting(n: int, group_size: int) -> int:
    """`n` or the next multiple of the group."""
    return -(-n // group_size) * group_size if group_size else n


def both(name: str, **sizes):
    """The kernel's and the twin's output for the same arguments, and the bound."""
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(7), **sizes)
    kernel(*args)
    comp, ref = args[-1].copy(), args[-1]
    ref[:] = np.nan
    reference(*args)
    return comp, ref, BOUNDS[name](*args)


def close(comp: np.ndarray, ref: np.ndarray, bound: np.ndarray) -> bool:
    """Whether the difference is within the bound everywhere; NaN never is."""
    return bool((np.abs(comp.astype(np.float64) - ref) <= bound).all())


# ------------------------------------------------------------------------------------------------------- kernel = twin
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_its_twin(name, bits, granularity):
    settings = GRANULARITIES[granularity]
    for out, n, tokens in SHAPES:
        n = fitting(n, settings["group_size"])
        comp, ref, bound = both(name, bits=bits, out=out, n=n, tokens=tokens, **settings)
        assert comp.shape == (tokens, out) and np.isfinite(ref).all()
        assert close(comp, ref, bound), (out, n, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_than_are_taken_at_once(name):
    """Rows go in chunks of at most 192, of 48 where they are long: exactly one chunk, one row more, several."""
    for out, n, tokens in ((40, 64, 192), (40, 64, 193), (20, 1056, 600), (17, 4320, 100), (5, 16448, 49)):
        for group_size in (0, 32):
            assert close(*both(name, out=out, n=n, tokens=tokens, group_size=group_size, **({"experts": 2} if "experts" in name else {})))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["qmatmul", "qmatmul_experts"])
def test_codes_of_a_table_equal_their_twin(name, bits):
    for out, n, tokens in SHAPES:
        for group_size in (0, 64):
            assert close(*both(name, bits=bits, out=out, n=fitting(n, group_size), tokens=tokens, group_size=group_size, table=True))


@pytest.mark.parametrize("name", ["qmatmul_experts", "qmatmul_experts_int8"])
def test_slots_may_take_any_rows_of_x(name):
    kernel, _, make = PAIRS[name]
    for tokens in (0, 1, 6, 150):
        assert close(*both(name, out=40, n=96, tokens=tokens, gather=True))
        tiles, x, offsets, rows, y = make(np.random.default_rng(2), out=40, n=96, tokens=tokens, gather=True)
        kernel(tiles, x, offsets, rows, y)
        ref = np.full_like(y, np.nan)
        kernel(tiles, x[rows], offsets, None, ref)
        assert y.tobytes() == ref.tobytes()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_rounds_where_all_sums_are_whole(name, bits):
    """Scales of 1 and 1/2 and sums below 2**24: whatever the order and the instruction, the result is the twin's, bit for bit."""
    for out, n, tokens, group_size in [(33, 256, 1, 32), (16, 256, 8, 0), (17, 256, 37, 128), (50, 61, 40, 0), (40, 70, 7, 7)]:
        comp, ref, _ = both(name, bits=bits, out=out, n=n, tokens=tokens, group_size=group_size, exact=True)
        assert np.abs(ref).max() > 100
        np.testing.assert_array_equal(comp, ref)


@pytest.mark.parametrize("name", NAMES)
def test_bound_rejects_a_wrong_code(name):
    """One code off by one in a row of 64 is far outside the bound: the tests above can fail."""
    kernel, _, make = PAIRS[name]
    args = make(np.random.default_rng(7), out=8, n=64, group_size=0)
    kernel(*args)
    before = args[-1].copy()
    args[0].codes[..., 0, 0, ::4] ^= 1  # input 0 of every row
    kernel(*args)
    assert (np.abs(args[-1] - before) > BOUNDS[name](*args)).mean() > 0.9


@pytest.mark.parametrize("name", ["qmatmul_int8", "qmatmul_experts_int8"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_a_row_gives_the_same_bits_alone_and_among_others(name, group_size):
    """Few rows and many go different ways through the code; with int8 activations both do the same float operations."""
    kernel, _, make = PAIRS[name]
    tiles, x, *rest, y = make(np.random.default_rng(3), out=50, n=1088, tokens=100, group_size=group_size)
    kernel(tiles, x, *rest, y)
    experts = np.repeat(np.arange(len(tiles.codes)), np.diff(rest[0])) if rest else np.zeros(100, int)
    for t, e in enumerate(experts):
        alone = np.full((1, 50), np.nan, np.float32)
        qmatmul(tiles._replace(codes=tiles.codes[e : e + 1], scales=tiles.scales[e : e + 1]), x[t : t + 1], alone, "int8")
        assert alone.tobytes() == y[t].tobytes()


def test_a_weight_without_inputs_gives_zeros():
    tiles = tile(np.empty((3, 0), np.uint8), np.ones((3, 1), np.int16), 4, 0, 0)
    for activations in matmul.ACTIVATIONS:
        y = np.full((2, 3), np.nan, np.float32)
        qmatmul(tiles, np.empty((2, 0), np.float32), y, activations)
        assert (y == 0).all()


def test_a_weight_without_outputs_is_no_error():
    tiles = tile(np.empty((0, 8), np.uint8), np.empty((0, 1), np.int16), 4, 0, 16)
    for activations in matmul.ACTIVATIONS:
        qmatmul(tiles, np.ones((2, 16), np.float32), np.empty((2, 0), np.float32), activations)


# --------------------------------------------------------------------------------------------------------- the numbers
def test_every_finite_float16_scale_is_read_exactly():
    """Subnormal numbers too, and also while torch flushes subnormal float32 to zero: one input, of level 1, times x."""
    import torch

    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    tiles = tile(np.full((half.size, 1), 9, np.uint8), half.view(np.int16)[:, None], 4, 0, 1)
    for flush in (False, True):
        for activations, x in (("float32", 1), ("int8", 127)):  # absmax 127: the scale of the activation is 1
            for tokens in (1, 40):
                y = np.full((tokens, half.size), np.nan, np.float32)
                torch.set_flush_denormal(flush)
                try:
                    qmatmul(tiles, np.full((tokens, 1), x, np.float32), y, activations)
                finally:
                    torch.set_flush_denormal(False)
                np.testing.assert_array_equal(y, np.broadcast_to(half.astype(np.float32) * x, y.shape))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_shows_in_its_row_and_in_no_other(name, bad):
    kernel, _, make = PAIRS[name]
    for tokens in (1, 5, 40):
        for group_size in (0, 32):
            args = make(np.random.default_rng(1), out=33, n=192, tokens=tokens, group_size=group_size, bits=8)
            kernel(*args)
            good = args[-1].copy()
            for at in (0, 100, 191):
                row = tokens // 2
                kept, args[1][row, at] = args[1][row, at], bad
                kernel(*args)
                args[1][row, at] = kept
                assert not np.isfinite(args[-1][row]).any()
                others = np.arange(tokens) != row
                assert args[-1][others].tobytes() == good[others].tobytes()


def test_tiny_activations_become_zeros_and_tiny_weights_stay():
    """127 / absmax must not be infinite: below 2**-100 a group counts as zero."""
    tiles = tile(np.full((3, 32), 200, np.uint8), np.ones((3, 1), np.float16).view(np.int16), 8, 0, 32)
    for exponent, zero in ((-99, False), (-101, True), (-126, True), (-149, True)):
        x, y = np.full((1, 32), 2.0**exponent, np.float32), np.full((1, 3), np.nan, np.float32)
        qmatmul(tiles, x, y, "int8")
        np.testing.assert_allclose(y, 0 if zero else 72 * 32 * 2.0**exponent, rtol=1e-6)


# --------------------------------------------------------------------------------------------------- threads, processes
def in_a_new_process(code: str, **env: str) -> str:
    """What `code` prints; this file can be imported there."""
    here = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": here, **env}
    done = subprocess.run([sys.executable, "-c", dedent(code)], env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_result_does_not_depend_on_the_threads():
    """Nor do few rows or many: a thread owns output rows, and there may be more threads than tiles."""
    in_a_new_process(
        """
        import numpy as np
        from edgelab.kernels import matmul
        from edgelab.kernels._jit import set_threads
        from edgelab.kernels.reference import PAIRS
        from test_kernels import NAMES

        serial, threaded, calls = matmul._run, matmul._run_threads, []
        matmul._run = lambda *args: (calls.append(1), serial(*args))
        matmul._run_threads = lambda *args: (calls.append(args[-2] + 1), threaded(*args))
        matmul.PARALLEL_FROM_NS = 0
        for name in NAMES:
            kernel, _, make = PAIRS[name]
            for sizes in ({"out": 333, "n": 512, "tokens": 80}, {"out": 70, "n": 96, "tokens": 3}, {"out": 20, "n": 1056, "tokens": 150}):
                args = make(np.random.default_rng(3), **sizes)
                results = []
                for threads in (1, 2, 3):
                    set_threads(threads)
                    args[-1][:] = np.nan
                    kernel(*args)
                    results.append(args[-1].tobytes())
                    assert calls.pop() == threads
                assert np.isfinite(args[-1]).all()
                assert results[0] == results[1] == results[2], (name, sizes)
        """,
        NUMBA_NUM_THREADS="3",
    )


def test_small_products_run_on_one_thread(monkeypatch):
    used = []
    monkeypatch.setattr(matmul, "threads", lambda: 2)
    monkeypatch.setattr(matmul, "ready", lambda workers: 0)
    monkeypatch.setattr(matmul, "_run", lambda *args: used.append(1))
    monkeypatch.setattr(matmul, "_run_threads", lambda *args: used.append(args[-2] + 1))
    kernel, _, make = PAIRS["qmatmul"]
    for out, tokens, expected in ((64, 1, 1), (64, 8, 1), (4096, 512, 2)):
        kernel(*make(np.random.default_rng(0), out=out, n=256, tokens=tokens))
        assert used.pop() == expected


def test_python_threads_may_call_kernels_at_once():
    """The workers serve one of them at a time; scratch memory belongs to each."""
    in_a_new_process(
        """
        import numpy as np
        from concurrent.futures import ThreadPoolExecutor
        from edgelab.kernels import matmul
        from edgelab.kernels.reference import PAIRS
        from test_kernels import NAMES

        for expected_ns in (0, 1e9):  # with workers, and each on its own
            matmul.PARALLEL_FROM_NS = expected_ns
            for name in NAMES:
                kernel, _, make = PAIRS[name]
                sets = [make(np.random.default_rng(i), out=301, n=256, tokens=45) for i in range(4)]
                expected = []
                for args in sets:
                    kernel(*args)
                    expected.append(args[-1].tobytes())
                for _ in range(5):
                    for args in sets:
                        args[-1][:] = np.nan
                    with ThreadPoolExecutor(4) as pool:
                        list(pool.map(lambda args: kernel(*args), sets))
                    assert [args[-1].tobytes() for args in sets] == expected, name
        """,
        NUMBA_NUM_THREADS="2",
    )


def test_workers_take_thousands_of_jobs_awake_or_asleep():
    """Two jobs in turn, so that a part of the one before, done late or twice, shows; more workers than cores; a fork between."""
    in_a_new_process(
        """
        import os, time
        import numpy as np
        from edgelab.kernels import matmul
        from edgelab.kernels._jit import set_threads
        from edgelab.kernels.reference import PAIRS

        kernel, _, make = PAIRS["qmatmul_int8"]
        sets = [make(np.random.default_rng(i), out=300 + 100 * i, n=64, tokens=20) for i in range(2)]
        expected = []
        set_threads(1)
        for args in sets:
            kernel(*args)
            expected.append(args[-1].copy())
        set_threads(4)
        matmul.PARALLEL_FROM_NS = 0

        def several(times):
            for i in range(times):
                args, ref = sets[i % 2], expected[i % 2]
                args[-1][:] = np.nan
                kernel(*args)
                assert (args[-1] == ref).all(), i
                if i % 10 == 0:
                    time.sleep(0.0005)  # long enough to fall asleep

        several(2000)
        if hasattr(os, "fork"):
            child = os.fork()
            if not child:
                several(100)  # a failure prints its traceback and exits 1
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        several(100)
        """,
        NUMBA_NUM_THREADS="4",
    )


def test_set_threads_returns_the_number_before_and_none_goes_back():
    set_threads(None)
    numbas = numba.config.NUMBA_NUM_THREADS
    try:
        assert threads() == numbas
        assert set_threads(1) == numbas and threads() == 1
        assert set_threads(np.int64(1)) == 1
        assert set_threads(None) == 1 and threads() == numbas
    finally:
        set_threads(None)


def test_set_threads_refuses_what_cannot_be():
    most = numba.config.NUMBA_NUM_THREADS
    for n in (0, -1, most + 1):
        with pytest.raises(ValueError, match=re.escape(f"n={n} threads: kernels can use 1 .. {most} here (NUMBA_NUM_THREADS, set before")):
            set_threads(n)
    for n in ("2", 1.5):
        with pytest.raises(ValueError, match=re.escape(f"n={n!r} is not a number of threads; use 1 .. {most}")):
            set_threads(n)


def test_kernel_runs_on_a_processor_without_half_precision_instructions(tmp_path):
    """LLVM's own float16 conversion crashes there (a call to a library that numba does not link)."""
    in_a_new_process(
        """
        import numpy as np
        from edgelab.kernels import simd
        from edgelab.kernels.reference import BOUNDS, PAIRS

        assert simd.way() == "portable"
        kernel, reference, make = PAIRS["qmatmul"]
        args = make(np.random.default_rng(0), out=3, n=32, tokens=2)
        kernel(*args)
        got = args[-1].copy()
        reference(*args)
        assert (abs(got - args[-1]) <= BOUNDS["qmatmul"](*args)).all()
        """,
        NUMBA_CPU_NAME="generic",
        NUMBA_CPU_FEATURES="",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


# --------------------------------------------------------------------------------------------------------------- memory
class Guarded:
    """Arrays that touch, at their end or at their beginning, a page that nobody may read or write. Linux only."""

    def __init__(self, at_end: bool) -> None:
        self.at_end, self.libc = at_end, ctypes.CDLL(None, use_errno=True)

    def protect(self, address: int, size: int) -> None:
        """No access to these whole pages."""
        if self.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def empty(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        page, size = mmap.PAGESIZE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        inside = max(page, -(-size // page) * page)
        memory = mmap.mmap(-1, inside + 2 * page)
        at = page + (inside - size if self.at_end else 0)
        array = np.frombuffer(memory, np.uint8, size, at)
        array[:] = 0xFF  # NaN in every float type: what is read without having been written shows
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.protect(base, page)
        self.protect(base + page + inside, page)
        return array.view(dtype).reshape(shape)

    def copy(self, array):
        if not isinstance(array, np.ndarray):
            return array
        new = self.empty(array.shape, array.dtype)
        new[...] = array
        return new

    def tiles(self, tiles):
        return tiles._replace(codes=self.copy(tiles.codes), scales=self.copy(tiles.scales), levels=self.copy(tiles.levels))


def run_guarded(at_end: bool, widths: tuple[int, ...] = (2, 3, 4, 8)) -> None:
    """All kernels at odd shapes with every array, the scratch memory too, against a forbidden page; for a process of its own."""
    guarded = Guarded(at_end)
    matmul.arena = lambda size: guarded.empty((size,), np.uint8)
    matmul.PARALLEL_FROM_NS = 0
    shapes = [(1, 1, 1), (17, 61, 3), (33, 96, 7), (40, 35, 9), (20, 640, 13), (16, 32, 2), (17, 40, 40)]
    for name, bits, group_size, (out, n, tokens), parts in itertools.product(NAMES, widths, (0, 5, 32), shapes, (1, 2)):
        set_threads(parts)
        kernel, reference, make = PAIRS[name]
        sizes = {"out": out, "n": fitting(n, group_size), "tokens": tokens, "bits": bits, "group_size": group_size}
        if "experts" in name:
            sizes |= {"experts": 3, "gather": tokens % 2 == 0}
        tiles, *args = make(np.random.default_rng(5), **sizes)
        args = [guarded.tiles(tiles), *map(guarded.copy, args)]
        inputs = [a for a in (*args[0][:3], *args[1:-1]) if isinstance(a, np.ndarray)]
        before = [a.tobytes() for a in inputs]
        kernel(*args)
        assert before == [a.tobytes() for a in inputs]
        comp = args[-1].copy()
        reference(*args)
        assert close(comp, args[-1], BOUNDS[name](*args)), (name, sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with Linux's mprotect")
@pytest.mark.parametrize("edge", ["end", "beginning"])
def test_kernels_stay_inside_their_arrays(edge):
    in_a_new_process(f"import test_kernels; test_kernels.run_guarded({edge == 'end'})", NUMBA_NUM_THREADS="2")


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with Linux's mprotect")
@pytest.mark.parametrize(("edge", "index"), [("end", 16), ("beginning", -1)])
def test_a_step_outside_would_be_seen(edge, index):
    code = f"""
        import ctypes, numpy as np, test_kernels
        a = test_kernels.Guarded({edge == "end"}).empty((16,), np.uint8)
        print("inside", flush=True)
        ctypes.c_uint8.from_address(a.ctypes.data + {index}).value
    """
    with pytest.raises(AssertionError, match=r"exit status -11\n\s*inside"):
        in_a_new_process(code)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_write_y_and_nothing_beside_it(name):
    kernel, _, make = PAIRS[name]
    for out, tokens in ((1, 1), (17, 3), (33, 9), (20, 40)):
        *args, y = make(np.random.default_rng(6), out=out, n=96, tokens=tokens)
        kernel(*args, y)
        memory = np.full(y.size + 256, -12345.0, np.float32)
        inner = memory[128:-128].reshape(y.shape)
        kernel(*args, inner)
        assert inner.tobytes() == y.tobytes()
        assert (memory[:128] == -12345).all() and (memory[-128:] == -12345).all()


@pytest.mark.parametrize("name", NAMES[2:])
def test_experts_without_tokens_are_never_read(name):
    """Their scales are NaN here: had they come into a sum, NaN would show."""
    kernel, _, make = PAIRS[name]
    args = make(np.random.default_rng(1), experts=6, tokens=3)
    idle = np.flatnonzero(np.diff(args[2]) == 0)
    assert idle.size
    args[0].scales[idle] = np.float16(np.nan).view(np.int16)
    kernel(*args)
    assert np.isfinite(args[-1]).all()


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages with Linux's mprotect")
def test_experts_without_tokens_are_not_even_touched():
    """Nobody may read their pages; an expert's codes and scales are whole pages here."""
    in_a_new_process(
        """
        import mmap
        import numpy as np
        from edgelab.kernels.reference import PAIRS
        from test_kernels import NAMES, Guarded

        for name in NAMES[2:]:
            kernel, _, make = PAIRS[name]
            for tokens in (3, 150):
                tiles, *args = make(np.random.default_rng(1), experts=6, tokens=tokens, out=32, n=2048)
                kernel(tiles, *args)
                expected = args[-1].tobytes()
                idle = np.flatnonzero(np.diff(args[1]) == 0)
                assert idle.size
                guarded = Guarded(True)
                tiles = guarded.tiles(tiles)
                for e in idle:
                    for array in (tiles.codes[e], tiles.scales[e]):
                        assert array.nbytes % mmap.PAGESIZE == array.ctypes.data % mmap.PAGESIZE == 0
                        guarded.protect(array.ctypes.data, array.nbytes)
                args[-1][:] = np.nan
                kernel(tiles, *args)
                assert args[-1].tobytes() == expected
        """
    )


# --------------------------------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [0, 5, 8, 32])
def test_tile_keeps_every_code(bits, group_size):
    """`_fill` scatters and `untile` looks up: two readings of the table in `pack.py`."""
    rng = np.random.default_rng(8)
    for experts, out, n in ((1, 1, 1), (2, 17, 61), (3, 32, 64), (1, 33, 95)):
        n = fitting(n, group_size)
        packed = rng.integers(0, 256, (experts, out, (n * bits + 7) // 8), np.uint8)
        groups = n // group_size if group_size else 1
        scales = rng.standard_normal((experts, out, groups)).astype(np.float16)
        tiles = tile(packed, scales.view(np.int16), bits, group_size, n)
        stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : n * bits]  # the definition: a little-endian bit stream
        codes = stream.reshape(experts, out, n, bits) @ (1 << np.arange(bits))
        np.testing.assert_array_equal(untile(tiles), codes)
        levels = codes.astype(float) - 2 ** (bits - 1)
        np.testing.assert_array_equal(weight(tiles), levels * np.repeat(scales.astype(float), n // groups, axis=2))
        assert tiles.codes.ctypes.data % 64 == 0
        assert tiles.padded == tiles.codes.shape[2] * 32 == groups * tiles.units * 32
        assert tiles.nbytes == tiles.codes.nbytes + tiles.scales.nbytes


@pytest.mark.parametrize("text", ["int2-g8", "int3-row", "int4-g32", "int8-row", "int3-g32", "int4-tensor"])
def test_twin_reads_the_layout_of_qtensor(text):
    """The weight that the twin reads out of `Tiles` is the one that `QTensor` means."""
    scheme, n = QuantScheme.parse(text), 96 if "g" in text else 61
    rng = np.random.default_rng(5)
    codes = rng.integers(0, scheme.levels, (7, n), np.uint8)
    q = QTensor.from_codes(codes, rng.standard_normal(scheme.scales_shape((7, n))).astype(np.float16), scheme)
    group_size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0
    tiles = tile(q.packed, q.scales.view(np.int16), scheme.bits, group_size, n)
    np.testing.assert_array_equal(weight(tiles)[0], q.dequantize())


# --------------------------------------------------------------------------------------------------------------- errors
PACKED, SCALES = np.zeros((3, 16), np.uint8), np.zeros((3, 1), np.int16)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bits": 5}, "bits=5 is not one of 2, 3, 4, 8"),
        ({"packed": PACKED.astype(np.int8)}, "packed is int8 (3, 16); it must be uint8 [out, row_bytes] or [experts, out, row_bytes]"),
        ({"packed": PACKED[0]}, "packed is uint8 (16,); it must be uint8 [out, row_bytes] or [experts, out, row_bytes]"),
        ({"n": 33}, "packed has 16 bytes a row; n=33 codes of 4 bits take 17"),
        ({"group_size": 5}, "group_size=5 does not divide n=32; use a divisor, or 0 for one scale per row"),
        ({"group_size": -8}, "group_size=-8 does not divide n=32; use a divisor, or 0 for one scale per row"),
        (
            {"scales": SCALES.view(np.float16)},
            "scales are float16 (1, 3, 1); they must be int16 (float16's bits) (1, 3 or 1, 1): view float16 with .view(np.int16)",
        ),
        ({"group_size": 8}, "scales are int16 (1, 3, 1); they must be int16 (float16's bits) (1, 3 or 1, 4)"),
        ({"scales": SCALES[:2]}, "scales are int16 (1, 2, 1); they must be int16 (float16's bits) (1, 3 or 1, 1)"),
        ({"levels": np.zeros(8, np.float32)}, "levels have shape (8,); a table needs (16,) at 4 bits, and 8 bits take none"),
        ({"bits": 8, "n": 16, "levels": np.zeros(256)}, "levels have shape (256,); a table needs (256,) at 8 bits, and 8 bits take none"),
    ],
)
def test_tile_refuses_pieces_that_do_not_fit(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        tile(**{"packed": PACKED, "scales": SCALES, "bits": 4, "group_size": 0, "n": 32, "levels": None, **change})


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


X, Y = np.zeros((2, 32), np.float32), np.zeros((2, 3), np.float32)
BOTH_KERNELS = [
    ({"x": X.astype(np.float64)}, "x is float64 (2, 32); a weight 3 x 32 needs float32 (rows, 32)"),
    ({"x": X[0]}, "x is float32 (32,); a weight 3 x 32 needs float32 (rows, 32)"),
    ({"x": X[:, :31]}, "x is float32 (2, 31); a weight 3 x 32 needs float32 (rows, 32)"),
    ({"y": Y[:, :2]}, "y is float32 (2, 2); a weight 3 x 32 needs float32 (rows, 3)"),
    ({"y": Y.astype(np.float16)}, "y is float16 (2, 3); a weight 3 x 32 needs float32 (rows, 3)"),
    ({"x": np.zeros((32, 2), np.float32).T}, "x (2, 32) is not contiguous (strides (4, 8)): pass np.ascontiguousarray(x)"),
    ({"y": np.zeros((4, 3), np.float32)[::2]}, "y (2, 3) is not contiguous (strides (24, 4)): pass np.ascontiguousarray(y)"),
    ({"y": read_only(Y.copy())}, "y is read-only; it receives the result"),
    ({"activations": "int4"}, "activations='int4' is not known; use one of float32, int8"),
    ({"levels": True}, "activations='int8' needs codes that count in equal steps; a table (NF4, say) takes 'float32'"),
    ({"long": True}, "131104 inputs share a scale: their int8 products can leave an int32; use groups or 'float32'"),
]
ONE_ONLY = [
    ({"x": X[:1]}, "x has 1 rows and y 2: they must agree"),
    ({"experts": 2}, "the weight has 2 experts: use qmatmul_experts, which takes the tokens of each"),
]
OFFSETS, ROWS = np.array([0, 1, 2]), np.array([0, 1])
EXPERTS_ONLY = [
    ({"offsets": OFFSETS[:2]}, "offsets are int64 (2,); 2 experts need contiguous int64 (3,)"),
    ({"offsets": OFFSETS.astype(np.int32)}, "offsets are int32 (3,); 2 experts need contiguous int64 (3,)"),
    ({"offsets": np.zeros(6, np.int64)[::2]}, "offsets are int64 (3,); 2 experts need contiguous int64 (3,)"),
    ({"offsets": np.array([1, 1, 2])}, "offsets [1, 1, 2]... end at 2; they must rise from 0 to the 2 rows of y"),
    ({"offsets": np.array([0, 1, 3])}, "offsets [0, 1, 3]... end at 3; they must rise from 0 to the 2 rows of y"),
    ({"offsets": np.array([0, 3, 2])}, "offsets [0, 3, 2]... end at 2; they must rise from 0 to the 2 rows of y"),
    ({"x": X[:1]}, "x has 1 rows and y 2; without `rows` each row of y has its own row of x"),
    ({"rows": ROWS[:1]}, "rows are int64 (1,); y with 2 rows needs contiguous int64 (2,)"),
    ({"rows": ROWS.astype(np.int32)}, "rows are int32 (2,); y with 2 rows needs contiguous int64 (2,)"),
    ({"rows": np.array([0, 2])}, "rows hold 0 .. 2; x has rows 0 .. 1"),
    ({"rows": np.array([-1, 1])}, "rows hold -1 .. 1; x has rows 0 .. 1"),
]


def arguments(change: dict, experts: int) -> dict:
    """Arguments that would do, but for `change`."""
    change = dict(change)
    experts, table, n = change.pop("experts", experts), change.pop("levels", False), 131104 if change.pop("long", False) else 32
    tiles = tile(
        np.zeros((experts, 3, n // 2), np.uint8), np.zeros((experts, 3, 1), np.int16), 4, 0, n, np.zeros(16, np.float32) if table else None
    )
    integer = {"activations": "int8"} if table or n > 32 else {}
    return {"tiles": tiles, "x": np.zeros((2, n), np.float32), "y": Y, **integer, **change}


@pytest.mark.parametrize(("change", "text"), BOTH_KERNELS + ONE_ONLY)
def test_qmatmul_refuses_what_does_not_fit(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        qmatmul(**arguments(change, experts=1))


@pytest.mark.parametrize(("change", "text"), BOTH_KERNELS + EXPERTS_ONLY)
def test_qmatmul_experts_refuses_what_does_not_fit(change, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        qmatmul_experts(**{"offsets": OFFSETS, **arguments(change, experts=2)})


def test_arguments_of_these_tests_would_do():
    qmatmul(**arguments({}, experts=1))
    qmatmul_experts(**arguments({"rows": ROWS, "offsets": OFFSETS}, experts=2))


def test_the_longest_group_still_sums_to_an_int32():
    """131,072 products of the largest codes."""
    n = matmul.LONGEST_GROUP
    tiles = tile(np.zeros((1, n), np.uint8), np.full((1, 1), 2.0**-24).astype(np.float16).view(np.int16), 8, 0, n)
    for sign in (1, -1):
        for tokens in (1, 40):
            y = np.full((tokens, 1), np.nan, np.float32)
            qmatmul(tiles, np.full((tokens, n), 127 * sign, np.float32), y, "int8")
            assert (y == -sign * 128 * 127 * n * 2.0**-24).all()
