"""Every kernel from the one table `PAIRS`, at the sizes of the embedded model and of its like: `make bench`.

Each row first checks that kernel and twin agree within the kernel's bound, then times the kernel alone, in cache. Those of
weights keep in `extra_info` the bytes that a call reads, so that the time can be read as a bandwidth.
"""

import numpy as np
import pytest

from edgelab.kernels._jit import threads
from edgelab.kernels.reference import BOUNDS, PAIRS

HEAD, GATE_UP = {"out": 2048, "n": 256}, {"out": 256, "n": 256, "experts": 16}  # the embedded model's head; its 16 experts' gate and up
FORMATS = {"int8-row": (8, 0), "int4-g32": (4, 32), "int3-g32": (3, 32), "int2-g32": (2, 32)}
SIZES = {
    "qmatmul": [HEAD],
    "qmatmul_int8": [HEAD],
    "qmatmul_experts": [GATE_UP],
    "qmatmul_experts_int8": [GATE_UP],
    "swiglu_experts": [{"out": 256, "n": 128, "experts": 16}],
    "swiglu_experts_int8": [{"out": 256, "n": 128, "experts": 16}],
    "count": [{"n": 1_000_000}],
}
TOKENS = {"decode": 1, "prefill": 64}


def cases() -> list:
    """(kernel, sizes) for each row of PAIRS: with weights in each format and for one and many tokens, else as its maker says."""
    found = []
    for name in PAIRS:
        by_token = name in ("softmax_topk", "deepseek_v3", "dispatch", "combine")
        for sizes in SIZES.get(name, [{}]):
            for when, tokens in TOKENS.items() if by_token or "out" in sizes else [("", None)]:
                for scheme, (bits, group) in FORMATS.items() if "out" in sizes else [("", (0, 0))]:
                    more = {"tokens": tokens} if when else {}
                    more |= {"bits": bits, "group_size": group} if scheme else {}
                    found.append(pytest.param(name, sizes | more, id="-".join(filter(None, (name, scheme, when)))))
    return found


def by_expert(name: str, args: tuple) -> np.ndarray:
    """What a kernel wrote last; where the order of a token's choices is free, sorted by expert."""
    return np.take_along_axis(args[-1], np.argsort(args[-2], axis=1), axis=1) if name == "deepseek_v3" else args[-1].copy()


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize(("name", "sizes"), cases())
def bench_kernel(benchmark, name, sizes):
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(0), **sizes)
    before = args[-1].copy()  # `count` adds to it
    kernel(*args)
    ours = by_expert(name, args)
    args[-1][...] = before
    reference(*args)
    twin, bound = by_expert(name, args), by_expert(name, (*args[:-1], BOUNDS[name](*args)))
    finite = np.isfinite(twin)  # a divergence may be infinite
    assert np.array_equal(ours[~finite], twin[~finite]) and np.all(np.abs(ours[finite] - twin[finite]) <= bound[finite])
    if "out" in sizes:
        weights = args[0].nbytes
        if "experts" in sizes:
            used = np.unique(args[3]) if name.startswith("swiglu") else np.flatnonzero(np.diff(args[2]))
            weights = weights * len(used) // sizes["experts"]
        benchmark.extra_info |= {"weight_bytes": int(weights), "threads": threads()}
    benchmark.group = name + (f", {sizes['tokens']} token{'s' * (sizes['tokens'] > 1)}" if "tokens" in sizes else "")
    benchmark(kernel, *args)
