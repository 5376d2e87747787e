"""When sparsity pays: products with pruned weights in their sparse forms, beside the dense ones: `make bench ARGS="-k sparse"`.

One row of x (decoding, where reading the weight is what takes time) and 64 rows (prefill), at 50, 75, 90 and 95 % zeros; one
thread each. Each contender first gives the product within its bound of the dense float32 one. `extra_info` holds the bytes of
the weight that a call reads, as `edgelab.sparsify.storage_table` counts them. Calls follow one another on the same weight, so
that one which fits the last-level cache stays there: of a model that does not, the bytes count the more.
"""

from functools import cache

import numpy as np
import pytest
import torch

from edgelab import set_threads
from edgelab.kernels.matmul import qmatmul
from edgelab.kernels.pack import tile
from edgelab.kernels.sparse import bitmap_matmul, bits, columns, csr_matmul
from edgelab.methods.prune import keep_n_of_m
from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.sparse import encode
from edgelab.scheme import QuantScheme

SHAPE = (4096, 4096)
SPARSITIES = (50, 75, 90, 95)
TOKENS = {"decode": 1, "prefill": 64}
CONTENDERS = ("torch float32", "numpy float32", "torch csr float32", "int4-g32", "int4-g32, a8", "bitmap float16", "csr float16")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    set_threads(1)
    yield
    torch.set_num_threads(before)
    set_threads(None)


@cache
def weight(sparsity: int) -> torch.Tensor:
    """Values that float16 holds; half of them as 2:4."""
    generator = torch.Generator().manual_seed(sparsity)
    w = torch.randn(SHAPE, generator=generator).half().float()
    if sparsity == 50:
        return w.masked_fill(~keep_n_of_m(w.abs(), 2, 4), 0.0)
    return w.masked_fill(torch.rand(SHAPE, generator=generator) < sparsity / 100, 0.0)


def product(name: str, w: torch.Tensor, x: np.ndarray, y: np.ndarray):
    """(a function that writes or returns x times the transposed weight, the bytes of the weight)."""
    t = torch.from_numpy(x)
    match name:
        case "torch float32":
            return lambda: torch.mm(t, w.T), w.nbytes
        case "numpy float32":
            dense = w.numpy().T
            return lambda: x @ dense, w.nbytes
        case "torch csr float32":
            s = w.to_sparse_csr()
            return lambda: (s @ t.T).T, s.values().nbytes + s.col_indices().nbytes + s.crow_indices().nbytes
        case "int4-g32" | "int4-g32, a8":
            q = round_to_nearest(w, QuantScheme.parse("int4-g32"))
            tiles = tile(q.packed, q.scales.view(np.int16), 4, 32, SHAPE[1])
            return lambda: qmatmul(tiles, x, y, "int8" if "a8" in name else "float32"), q.nbytes
        case "bitmap float16":
            s = encode(w, kind="float16")
            made = bits(s.mask, s.values.data, SHAPE[1])
            return lambda: bitmap_matmul(made, x, y), s.nbytes
    s = encode(w, "csr", kind="float16")
    made = columns(s.ends, s.columns, s.values.data, SHAPE[1])
    return lambda: csr_matmul(made, x, y), s.nbytes


@pytest.mark.benchmark(max_time=0.3, min_rounds=3)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("when", TOKENS)
def bench_sparse(benchmark, when, sparsity, name):
    w, tokens = weight(sparsity), TOKENS[when]
    x = np.random.default_rng(0).standard_normal((tokens, SHAPE[1])).astype(np.float32)
    y = np.empty((tokens, SHAPE[0]), np.float32)
    call, size = product(name, w, x, y)
    found = call()
    found = y if found is None else np.asarray(found)
    exact = x.astype(np.float64) @ w.double().numpy().T
    if "int4" in name:  # rounded weights: the direction is what is left to check
        assert (found * exact).sum() > 0.98 * np.linalg.norm(found) * np.linalg.norm(exact)
    else:
        assert np.abs(found - exact).max() < 1e-3 * np.abs(exact).max()
    benchmark.group = f"sparse, {sparsity} % zeros, {tokens} row{'s' * (tokens > 1)}"
    benchmark.extra_info |= {"weight_bytes": int(size), "bits_per_weight": round(8 * size / w.numel(), 3)}
    benchmark(call)
