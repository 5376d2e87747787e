"""`kernels/experts.py` against its NumPy twin, on one thread and on several."""

import numpy as np
import pytest
from test_kernels import GRANULARITIES, both, close, fitting

from edgelab.kernels import experts
from edgelab.kernels.experts import swiglu_experts
from edgelab.kernels.matmul import qmatmul_experts
from edgelab.kernels.pack import aligned, tile
from edgelab.kernels.reference import BOUNDS, PAIRS

NAMES = ["swiglu_experts", "swiglu_experts_int8"]
# hidden, inner, tokens, experts, choices
SIZES = [(64, 32, 5, 4, 2), (33, 17, 1, 3, 1), (48, 40, 9, 2, 2), (16, 96, 37, 5, 3), (20, 24, 0, 4, 2), (64, 64, 60, 1, 1)]


@pytest.mark.parametrize("granularity", ["row", "tensor", "g8", "g32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_experts_equal_their_twin(name, bits, granularity):
    settings = GRANULARITIES[granularity]
    for hidden, inner, tokens, count, k in SIZES:
        hidden, inner = (fitting(n, settings["group_size"]) for n in (hidden, inner))
        comp, ref, bound = both(name, bits=bits, out=hidden, n=inner, tokens=tokens, experts=count, k=k, **settings)
        assert np.isfinite(comp).all() and close(comp, ref, bound), (hidden, inner, tokens, count, k)


@pytest.mark.parametrize("name", NAMES)
def test_bound_rejects_a_wrong_expert_weight_and_order(name):
    """Another expert, another weight of the sum, gate and up exchanged: each is far outside the bound."""
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(3), tokens=8)
    gate_up, down, x, indices, weights, out = args
    reference(*args)
    right, bound = out.copy(), BOUNDS[name](*args)
    scales = gate_up.scales.reshape(4, 2, -1, *gate_up.scales.shape[2:])[:, ::-1]
    codes = gate_up.codes.reshape(4, 2, -1, *gate_up.codes.shape[2:])[:, ::-1]
    exchanged = gate_up._replace(
        codes=np.ascontiguousarray(codes).reshape(gate_up.codes.shape), scales=np.ascontiguousarray(scales).reshape(gate_up.scales.shape)
    )
    wrong = [(gate_up, down, x, (indices + 1) % 4, np.nan_to_num(weights, nan=0.5)), (gate_up, down, x, indices, weights * np.float32(1.2))]
    for changed in [*wrong, (exchanged, down, x, indices, weights)]:
        kernel(*changed, out)
        assert not close(out, right, bound)


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name, monkeypatch):
    kernel, _, make = PAIRS[name]
    for tokens in (1, 3, 40):
        args = make(np.random.default_rng(5), out=96, n=80, group_size=8, tokens=tokens, experts=6)
        results = []
        for workers in (0, 1, 2):
            monkeypatch.setattr(experts, "workers_for", lambda ns, most, workers=workers: workers)
            args[-1][:] = np.nan
            kernel(*args)
            results.append(args[-1].tobytes())
        assert results[0] == results[1] == results[2]
    assert experts._threaded.signatures  # the threaded function was the one that ran


def test_few_and_many_rows_cross_no_expert():
    """One expert gets nearly all tokens, so that panels and registers are both used in one call."""
    for name in NAMES:
        kernel, reference, make = PAIRS[name]
        args = make(np.random.default_rng(9), tokens=70, experts=4, k=2)
        args[3][:, 0], args[3][:, 1] = 2, np.arange(70) % 3 % 2
        args[4][:] = 0.5
        kernel(*args)
        comp = args[-1].copy()
        reference(*args)
        assert close(comp, args[-1], BOUNDS[name](*args))


def test_silu_is_right_for_large_and_odd_gates():
    """Identity products: the gate goes straight into SwiGLU."""
    n = 16
    eye = np.zeros((1, 2 * n, n), np.uint8) + 128
    eye[0, np.arange(n), np.arange(n)] = 129
    eye[0, n:, 0] = 129  # up is the first input
    down = np.zeros((1, n, n), np.uint8) + 128
    down[0, np.arange(n), np.arange(n)] = 129
    one = np.full((1, 1, 1), 1.0, np.float16).view(np.int16)
    stacks = [tile(w, one, 8, 0, n) for w in (eye, down)]
    x = np.array([[1, -1, 0, 3, -3, 20, -20, 87, -87, 100, -100, 1e38, -1e38, 1e-30, -1e-3, 0.5]], np.float32)
    out = np.empty((1, n), np.float32)
    swiglu_experts(*stacks, x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), out)
    with np.errstate(over="ignore"):
        expected = x / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(out, expected, rtol=5e-7, atol=1e-30)
    for value in (np.nan, np.inf):
        x[0, 3] = value
        swiglu_experts(*stacks, x, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), out)
        assert not np.isfinite(out[0, 3])


def test_errors_name_the_value_and_the_way_out():
    gate_up, down, x, indices, weights, out = PAIRS["swiglu_experts"][2](np.random.default_rng(0))
    weights = np.nan_to_num(weights, nan=1.0)
    late = indices.copy()
    late[3, 1] = 5
    for call, says in [
        (lambda: swiglu_experts(down, gate_up, x, indices, weights, out), r"do not fit; they are \[experts, 2 \* inner, hidden\]"),
        (lambda: swiglu_experts(gate_up, down, x[:, :3], indices, weights, out), r"x is float32 \(5, 3\)"),
        (
            lambda: swiglu_experts(gate_up, down, x, indices.astype(np.int32), weights, out),
            r"indices are int32 \(5, 2\); they must be cont",
        ),
        (lambda: swiglu_experts(gate_up, down, x, indices, weights.astype(np.float64), out), r"weights are float64"),
        (lambda: swiglu_experts(gate_up, down, x, indices[:4], weights[:4], out), "are not of the same tokens"),
        (lambda: swiglu_experts(gate_up, down, x, late, weights, out), r"indices\[3, 1\]=5; experts are 0 \.\. 3, and 4 means none"),
        (lambda: swiglu_experts(gate_up, down, x, indices, weights, out, "int4"), "activations='int4' is not known"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()


def test_doors_refuse_what_a_kernel_cannot_read():
    kernel, _, make = PAIRS["qmatmul"]
    tiles, x, y = make(np.random.default_rng(0), out=40, n=64, tokens=3)
    experts_args = PAIRS["qmatmul_experts"][2](np.random.default_rng(0), experts=3)
    cut = tiles._replace(codes=tiles.codes[:, :1])
    strided = tiles._replace(codes=np.repeat(tiles.codes, 2, axis=1)[:, ::2])
    for call, error, says in [
        (lambda: kernel(cut, x, y), ValueError, "make them with `tile`, and do not cut them"),
        (lambda: kernel(strided, x, y), ValueError, "do not cut them"),
        (lambda: kernel(tiles, x.tolist(), y), TypeError, "x is a list; it must be a NumPy array"),
        (lambda: kernel("weight", x, y), TypeError, "the weight is a str; lay it out with edgelab.kernels.pack.tile"),
        (lambda: qmatmul_experts(experts_args[0], experts_args[1], [0, 1], experts_args[-1]), TypeError, "offsets is a list"),
    ]:
        with pytest.raises(error, match=says):
            call()
    square = make(np.random.default_rng(0), out=64, n=64, tokens=3)
    with pytest.raises(ValueError, match="x and y share memory"):
        kernel(square[0], square[1], square[1])


@pytest.mark.parametrize("name", NAMES)
def test_scratch_memory_is_what_was_asked_for(name, monkeypatch):
    """It begins as NaN and codes of -1, and nothing behind its end is touched: no result reads what was left there."""
    kernel, reference, make = PAIRS[name]
    asked = []

    def poisoned(size: int) -> np.ndarray:
        memory = aligned((size + 4096,))
        memory[:] = 255
        asked.append((memory, size))
        return memory[:size]

    monkeypatch.setattr(experts, "arena", poisoned)
    for workers in (0, 1):
        monkeypatch.setattr(experts, "workers_for", lambda ns, most, workers=workers: workers)
        for sizes in ({"out": 33, "n": 17, "group_size": 0}, {"out": 64, "n": 40, "group_size": 8, "tokens": 50}):
            args = make(np.random.default_rng(1), **sizes)
            kernel(*args)
            comp = args[-1].copy()
            reference(*args)
            assert close(comp, args[-1], BOUNDS[name](*args))
    assert len(asked) == 4
    assert all((memory[size:] == 255).all() for memory, size in asked)
