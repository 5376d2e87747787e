"""Kernel against twin, from the one table `PAIRS`, at the shapes of the embedded MoE model: `make bench`.

Each row first checks that kernel and twin agree within the kernel's bound, then times the kernel. `extra_info` holds the
bytes of weights that a call reads, so that the time can be read as a bandwidth.
"""

import numba
import numpy as np
import pytest

from edgelab.kernels.reference import BOUNDS, PAIRS

SHAPES = {
    "qmatmul": {"out": 2048, "n": 256},  # the head
    "qmatmul_experts": {"out": 256, "n": 256, "experts": 16},  # gate and up of 16 experts
}


@pytest.mark.parametrize("tokens", [1, 64], ids=["decode", "prefill"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 32), (3, 32), (2, 32)], ids=["int8-row", "int4-g32", "int3-g32", "int2-g32"])
@pytest.mark.parametrize("name", PAIRS)
def bench_kernel(benchmark, name, bits, group_size, tokens):
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(0), bits=bits, group_size=group_size, tokens=tokens, **SHAPES[name])
    kernel(*args)
    ours = args[-1].copy()
    expected = np.empty(ours.shape)
    reference(*args[:-1], expected)
    assert np.all(np.abs(ours - expected) <= BOUNDS[name](*args))
    weights = args[0].nbytes + args[1].nbytes
    if name == "qmatmul_experts":
        used = int(np.count_nonzero(np.diff(args[-2])))
        weights = weights * used // len(args[0])
    benchmark.extra_info |= {"weight_bytes": weights, "threads": numba.get_num_threads()}
    benchmark.group = f"{name}, {tokens} token{'s' * (tokens > 1)}"
    benchmark(kernel, *args)
