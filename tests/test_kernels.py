"""Each kernel against its NumPy twin, within the bound derived in `kernels/reference.py`."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import numpy as np
import pytest
from numba import njit

from edgelab.kernels import matmul
from edgelab.kernels.reference import BOUNDS, PAIRS, weight
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup, QuantScheme

GRANULARITIES = {
    "tensor": {"group_size": 0, "per_tensor": True},
    "row": {"group_size": 0},
    "g8": {"group_size": 8},
    "g32": {"group_size": 32},
}
# out, in, tokens: odd everything, one of each, no token, more rows than a block, tokens around the tile of four
SHAPES = [(1, 1, 1), (3, 5, 2), (17, 61, 4), (33, 67, 7), (16, 96, 0), (40, 64, 9)]


def both(name: str, **sizes):
    """The kernel's and the twin's output for the same arguments, and the bound."""
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(7), **sizes)
    kernel(*args)
    comp, ref = args[-1].copy(), args[-1]
    reference(*args)
    return comp, ref, BOUNDS[name](*args)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", PAIRS)
def test_kernel_equals_its_twin(name, bits, granularity):
    settings = GRANULARITIES[granularity]
    for out, n, tokens in SHAPES:
        if settings["group_size"]:
            n = 32 * ((n + 31) // 32)
        comp, ref, bound = both(name, bits=bits, out=out, n=n, tokens=tokens, **settings)
        assert comp.shape == (tokens, out) and np.isfinite(ref).all()
        assert (np.abs(comp.astype(np.float64) - ref) <= bound).all(), (out, n, tokens)


@pytest.mark.parametrize("name", PAIRS)
def test_threaded_kernel_equals_its_twin(name):
    sizes = {"out": 301, "n": 256, "tokens": 45}
    assert matmul.uses_threads(sizes["out"], sizes["n"], sizes["tokens"])
    comp, ref, bound = both(name, **sizes)
    assert (np.abs(comp.astype(np.float64) - ref) <= bound).all()


def test_bound_rejects_a_wrong_code():
    """One code off by one in a row of 64 is far outside the bound: the tests above can fail."""
    kernel, _, make = PAIRS["qmatmul"]
    args = make(np.random.default_rng(7), out=8, n=64, group_size=0)
    before = args[-1].copy()
    kernel(*args)
    before[:] = args[-1]
    args[0][:, 0] ^= 1
    kernel(*args)
    assert (np.abs(args[-1] - before) > BOUNDS["qmatmul"](*args)).mean() > 0.9


def in_a_new_process(code: str, **env: str) -> None:
    done = subprocess.run([sys.executable, "-c", dedent(code)], env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_result_does_not_depend_on_the_threads():
    in_a_new_process(
        """
        import numba, numpy as np
        from edgelab.kernels import matmul
        from edgelab.kernels.reference import PAIRS

        for kernel, _, make in PAIRS.values():
            args = make(np.random.default_rng(3), out=333, n=512, tokens=37)
            assert matmul.uses_threads(333, 512, 37)
            results = []
            for threads in (1, 2, 3):
                numba.set_num_threads(threads)
                kernel(*args)
                results.append(args[-1].tobytes())
                args[-1][:] = np.nan
            assert results[0] == results[1] == results[2]
        """,
        NUMBA_NUM_THREADS="3",
    )


@pytest.mark.parametrize("name", PAIRS)
def test_one_thread_and_many_give_the_same_bits(name):
    """The serial and the threaded variant pair the same rows, so the threshold between them changes no result."""
    _, _, make = PAIRS[name]
    args = make(np.random.default_rng(4), out=53, n=96, tokens=6)
    serial, parallel = {
        "qmatmul": (matmul._qmatmul_serial, matmul._qmatmul_parallel),
        "qmatmul_experts": (matmul._experts_serial, matmul._experts_parallel),
    }[name]
    serial(*args)
    expected = args[-1].tobytes()
    args[-1][:] = np.nan
    parallel(*args)
    assert args[-1].tobytes() == expected


def test_python_threads_may_call_kernels_at_once():
    kernel, _, make = PAIRS["qmatmul"]
    sets = [make(np.random.default_rng(i), out=301, n=256, tokens=45) for i in range(4)]
    expected = []
    for args in sets:
        kernel(*args)
        expected.append(args[-1].tobytes())
        args[-1][:] = np.nan
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda args: kernel(*args), sets))
    assert [args[-1].tobytes() for args in sets] == expected


def test_experts_without_tokens_are_never_read():
    """Their scales are NaN here: had they been unpacked into the sums, NaN would show."""
    kernel, _, make = PAIRS["qmatmul_experts"]
    args = make(np.random.default_rng(1), experts=6, tokens=3)
    idle = np.flatnonzero(np.diff(args[5]) == 0)
    assert idle.size
    args[1][idle] = np.float16(np.nan).view(np.int16)
    kernel(*args)
    assert np.isfinite(args[-1]).all()


def test_every_finite_float16_decodes_exactly():
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    decode = matmul._half

    @njit
    def run(bits, y):
        for i in range(bits.size):
            y[i] = decode(bits[i])

    y = np.empty(half.size, np.float32)
    run(half.view(np.int16), y)
    np.testing.assert_array_equal(y, half.astype(np.float32))


def test_kernel_runs_on_a_processor_without_half_precision_instructions(tmp_path):
    """LLVM's own float16 conversion crashes there (a call to a library that numba does not link)."""
    in_a_new_process(
        """
        import numpy as np
        from edgelab.kernels.reference import BOUNDS, PAIRS

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


@pytest.mark.parametrize("text", ["int2-g8", "int3-row", "int4-g32", "int8-row", "int3-g32"])
def test_twin_reads_the_layout_of_qtensor(text):
    """The twin reads a bit stream, `QTensor` unpacks by its own arithmetic: two readings of one definition."""
    scheme, n = QuantScheme.parse(text), 96 if "g" in text else 61
    rng = np.random.default_rng(5)
    codes = rng.integers(0, scheme.levels, (7, n), np.uint8)
    q = QTensor.from_codes(codes, rng.standard_normal(scheme.scales_shape((7, n))).astype(np.float16), scheme)
    group_size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0
    np.testing.assert_array_equal(weight(q.packed, q.scales.view(np.int16), scheme.bits, group_size, n), q.dequantize())
