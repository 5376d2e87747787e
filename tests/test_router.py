"""The router's gates against transformers' own, bit for bit; dispatch and combine against their NumPy twins."""

import importlib
import itertools
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.kernels import router
from edgelab.kernels.reference import BOUNDS, PAIRS
from edgelab.kernels.router import combine, deepseek_v3, dispatch, softmax_topk

CAPABILITY = torch.backends.cpu.get_cpu_capability()
BIT_FOR_BIT = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or {"AVX2": 8, "AVX512": 16}.get(CAPABILITY) != router.LANES,
    reason=f"the promise is for Linux on x86-64 with AVX2 or AVX-512; here torch runs {CAPABILITY} on {sys.platform} {platform.machine()}",
)
inf, nan = np.inf, np.nan


# --------------------------------------------------------------------------------------------------- transformers' routers


def theirs(family: str, experts: int, k: int, hidden: int | None = None, **settings):
    """transformers' router of a family, weights random; `hidden` None for tests that hand it logits."""
    config_name, router_name, settings = {
        "mixtral": ("MixtralConfig", "MixtralTopKRouter", {"num_local_experts": experts, **settings}),
        "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeTopKRouter", {"num_experts": experts, **settings}),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeTopKRouter", {"num_experts": experts, **settings}),
        "deepseek_v3": ("DeepseekV3Config", "DeepseekV3TopkRouter", {"n_routed_experts": experts, **settings}),
    }[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module("transformers"), config_name)(hidden_size=hidden or experts, num_experts_per_tok=k, **settings)
    gate = getattr(module, router_name)(config).requires_grad_(False)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(experts + k))
    return module, gate


@pytest.fixture
def route(monkeypatch):
    """(indices, weights) of transformers' router for given logits: its matrix product hands the logits through."""

    def run(family: str, logits: np.ndarray, k: int, bias: np.ndarray | None = None, **settings):
        module, gate = theirs(family, logits.shape[1], k, **settings)
        if bias is not None:
            gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
        with monkeypatch.context() as patch:
            patch.setattr(module, "F", SimpleNamespace(linear=lambda x, weight: x))
            _, weights, indices = gate(torch.from_numpy(logits))
        return indices.numpy(), weights.numpy()

    return run


def killer(n: int) -> np.ndarray:
    """A permutation on which a median of three splits off two at a time (Musser, Introspective sorting, 1997)."""
    i = np.arange(1, n // 2 + 1)
    return np.concatenate([np.where(i % 2, i, n // 2 + i - 1), 2 * i, [n] * (n % 2)]).astype(np.float64)


def hard_logits(tokens: int, n: int) -> dict[str, np.ndarray]:
    """Logits float32 [tokens, n] on which a gate that rounds or breaks ties in another way chooses others."""
    rng = np.random.default_rng(n)
    normal = rng.standard_normal((tokens, n))
    holes, spikes, gaps = (np.where(rng.random((tokens, n)) < p, x, normal) for p, x in ((0.3, -inf), (0.02, inf), (0.02, nan)))
    cases = {
        "normal": 3 * normal,
        "bfloat16": torch.from_numpy(normal).bfloat16().double().numpy(),
        "few values": rng.integers(0, 3, (tokens, n)),
        "all equal": np.zeros((tokens, n)),
        "signed zeros": np.where(normal > 0, 0.0, -0.0),
        "one ulp apart": 1 + rng.integers(0, 6, (tokens, n)) * 2.0**-23,
        "less than an ulp of p apart": rng.integers(-20, 20, (tokens, n)) * 2.0**-25,
        "saturated": 60 * normal,  # exp(x - max) underflows, sigmoid is 0 or 1
        "around the sigmoid's end": 16 + rng.integers(0, 40, (tokens, n)) / 16,
        "huge": np.clip(normal * 1e38, -3e38, 3e38),
        "-inf": holes,
        "+inf": spikes,
        "nan": gaps,
        "all -inf": np.full((tokens, n), -inf),
        "ascending": np.sort(normal, 1),
        "descending": -np.sort(normal, 1),
        "killer": np.tile(-killer(n) / n, (tokens, 1)),
    }
    return {name: x.astype(np.float32) for name, x in cases.items()}


def same_bits(comp: tuple[np.ndarray, np.ndarray], ref: tuple[np.ndarray, np.ndarray]) -> bool:
    """Indices equal, in order, and weights equal to the last bit (any NaN is a NaN)."""
    return np.array_equal(comp[0], ref[0]) and np.array_equal(comp[1], ref[1], equal_nan=True)


SOFTMAX = {  # family, its setting, ours
    "mixtral": ("mixtral", {}, True),
    "qwen2": ("qwen2_moe", {"norm_topk_prob": False}, False),
    "qwen2 normalised": ("qwen2_moe", {"norm_topk_prob": True}, True),
    "qwen3": ("qwen3_moe", {"norm_topk_prob": False}, False),
    "qwen3 normalised": ("qwen3_moe", {"norm_topk_prob": True}, True),
}
# experts, k: fewer than a vector, one that fills none, all chosen, topk's partial_sort (64 k <= n), sort of more than 16
SIZES = [(4, 2), (8, 2), (15, 6), (16, 16), (60, 4), (64, 1), (64, 6), (128, 8), (128, 20), (256, 4), (384, 40)]


@BIT_FOR_BIT
@pytest.mark.parametrize(("experts", "k"), SIZES)
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_gate_is_transformers_bit_for_bit(route, name, experts, k):
    family, settings, normalise = SOFTMAX[name]
    for tokens in (1, 3, 40):
        for case, logits in hard_logits(tokens, experts).items():
            comp, ref = softmax_topk(logits, k, normalise), route(family, logits, k, **settings)
            assert same_bits(comp, ref), (case, tokens)


@BIT_FOR_BIT
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (2, 1), (4, 2), (8, 4), (8, 8)])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4), (24, 6), (64, 1), (64, 6), (128, 8), (256, 8), (384, 40)])
def test_deepseek_gate_is_transformers_bit_for_bit(route, experts, k, n_group, topk_group, normalise):
    if experts < 2 * n_group:
        pytest.skip("a group needs two experts")
    settings = {"n_group": n_group, "topk_group": topk_group, "norm_topk_prob": normalise, "routed_scaling_factor": 2.5}
    rng = np.random.default_rng(k)
    biases = np.zeros(experts), rng.integers(-2, 3, experts) / 8, np.where(rng.random(experts) < 0.2, -inf, rng.uniform(-0.1, 0.1, experts))
    for tokens, bias in itertools.product((1, 3, 40), (b.astype(np.float32) for b in biases)):
        for case, logits in hard_logits(tokens, experts).items():
            comp = deepseek_v3(logits, bias, k, n_group, topk_group, normalise, 2.5)
            assert same_bits(comp, route("deepseek_v3", logits, k, bias, **settings)), (case, tokens, bias)


@BIT_FOR_BIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_whole_router_with_random_weights(family, dtype):
    """Nothing patched: the router's own matrix product, in bfloat16 too, where Qwen rounds the weights at the end."""
    _, gate = theirs(family, 64, 6, hidden=48, **({} if family == "mixtral" else {"norm_topk_prob": True}))
    gate = gate.to(dtype)
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits, weights, indices = gate(x)
    comp = softmax_topk(logits.float().numpy(), 6)
    assert torch.equal(torch.from_numpy(comp[0]), indices)
    assert torch.equal(torch.from_numpy(comp[1]).to(weights.dtype), weights)


@BIT_FOR_BIT
def test_whole_deepseek_router_with_random_weights():
    _, gate = theirs("deepseek_v3", 64, 6, hidden=48, n_group=8, topk_group=3, norm_topk_prob=True, routed_scaling_factor=2.446)
    gate.e_score_correction_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    logits, weights, indices = gate(torch.randn(200, 48, generator=torch.Generator().manual_seed(1)))
    comp = deepseek_v3(logits.numpy(), gate.e_score_correction_bias.numpy(), 6, 8, 3, True, 2.446)
    assert same_bits(comp, (indices.numpy(), weights.numpy()))


@BIT_FOR_BIT
def test_many_tokens_on_torchs_threads(route):
    logits = np.random.default_rng(0).standard_normal((1000, 128)).astype(np.float32)  # torch splits from 32,768 numbers on
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert same_bits(softmax_topk(logits, 8), route("mixtral", logits, 8))
        ref = route("deepseek_v3", logits, 8, n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5)
        assert same_bits(deepseek_v3(logits, np.zeros(128, np.float32), 8, 8, 4, True, 2.5), ref)
    finally:
        torch.set_num_threads(before)


@BIT_FOR_BIT
@pytest.mark.slow
@pytest.mark.skipif(router.LANES != 16, reason="this run itself uses AVX2")
def test_bit_for_bit_where_torch_uses_avx2():
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    some = "bit_for_bit and 128 and not avx2 or random_weights"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:]


@BIT_FOR_BIT
def test_the_comparison_sees_one_rounding_and_one_tie(route):
    """Sums in another vector's order, and ties broken by place, are found out: the tests above can fail."""
    logits = hard_logits(40, 128)
    other = np.empty((40, 8), np.int64), np.empty((40, 8), np.float32)
    router._softmax_kernel(logits["normal"], 8, True, 24 - router.LANES, *other)
    ref = route("mixtral", logits["normal"], 8)
    assert np.array_equal(other[0], ref[0]) and not same_bits(other, ref)
    by_place = np.argsort(-logits["bfloat16"], axis=1, kind="stable")[:, :8]
    comp = softmax_topk(logits["bfloat16"], 8)
    assert not np.array_equal(by_place, comp[0])
    by_logit = np.argsort(-logits["less than an ulp of p apart"], axis=1, kind="stable")[:, :8]
    p_ties = route("mixtral", logits["less than an ulp of p apart"], 8)[0]
    assert (np.sort(by_logit) != np.sort(p_ties)).any()  # logits differ, probabilities do not: torch takes another set


# ---------------------------------------------------------------------------------------------------------- exp and topk


def test_exp_is_within_one_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-104, 88.7, 20000), rng.uniform(-1, 1, 20000), np.arange(-103, 89)]).astype(np.float32)
    comp = np.array([router._exp(v) for v in x])
    ref = np.exp(x.astype(np.float64))
    assert (np.abs(comp - ref) <= np.spacing(ref.astype(np.float32))).all()
    ends = np.array([-inf, -105, -104.5, 0, -0.0, 89, 101, inf, nan, 3e38, -3e38], np.float32)
    np.testing.assert_array_equal([router._exp(v) for v in ends], np.array([0, 0, 0, 1, 1, inf, inf, inf, nan, inf, 0], np.float32))


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 2.0, 3e38, -3e38, inf, -inf, nan, 0.5, 0.25])


@BIT_FOR_BIT
@settings(max_examples=400, deadline=None)
@given(st.data(), st.lists(VALUES, min_size=1, max_size=90), st.booleans())
def test_topk_chooses_as_torch(data, values, in_order):
    k = data.draw(st.integers(1, len(values)))
    x = np.array(values, np.float32)
    comp = topk(x, k, in_order)
    assert comp == torch.topk(torch.from_numpy(x), k, sorted=in_order)[1].tolist()


@BIT_FOR_BIT
@pytest.mark.parametrize("n", [128, 256, 384])
def test_topk_chooses_as_torch_where_the_splits_are_worst(n, monkeypatch):
    x = killer(n).astype(np.float32)
    for y, k, in_order in itertools.product((x, -x, x // 4), (1, 2, 9, 20, n // 2, n - 1, n), (True, False)):
        assert topk(y, k, in_order) == torch.topk(torch.from_numpy(y), k, sorted=in_order)[1].tolist(), (k, in_order)

    def reached(*args):
        raise ZeroDivisionError

    keys = np.empty(n, np.int64)  # the fall-back to a heap has been among them
    router._keys(x, keys)
    monkeypatch.setattr(router, "_heap_select", reached)
    with pytest.raises(ZeroDivisionError):
        router._nth_element.py_func(keys, 19, n)


def test_sort_where_the_splits_are_worst(monkeypatch):
    x, keys = killer(512).astype(np.float32), np.empty(512, np.int64)
    router._keys(x, keys)
    router._sort(keys, 512)
    np.testing.assert_array_equal(keys & 0xFFFFFFFF, np.argsort(-x))

    def reached(*args):
        raise ZeroDivisionError

    router._keys(x, keys)
    monkeypatch.setattr(router, "_partial_sort", reached)
    with pytest.raises(ZeroDivisionError):
        router._sort.py_func(keys, 512)


def topk(x: np.ndarray, k: int, in_order: bool) -> list[int]:
    keys = np.empty(x.size, np.int64)
    router._topk(x, keys, k, in_order)
    return (keys[:k] & 0xFFFFFFFF).tolist()


# ----------------------------------------------------------------------------------------------------------- NumPy twins


def both(name: str, **sizes):
    """The kernel's outputs, the twin's, and the bound on the last of them."""
    kernel, reference, make = PAIRS[name]
    args = make(np.random.default_rng(3), **sizes)
    outputs = [a for a in args[-2:] if isinstance(a, np.ndarray)]
    kernel(*args)
    comp = [a.copy() for a in outputs]
    reference(*args)
    return comp, [a.copy() for a in outputs], BOUNDS[name](*args)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 8, 2), (1, 8, 2), (7, 61, 6), (33, 128, 8), (5, 128, 128), (3, 1, 1)])
def test_gates_equal_their_twins(monkeypatch, tokens, experts, k, normalise, lanes):
    """In the order of every vector that torch has."""
    monkeypatch.setattr(router, "LANES", lanes)
    comp, ref, bound = both("softmax_topk", tokens=tokens, experts=experts, k=k, normalise=normalise)
    np.testing.assert_array_equal(comp[0], ref[0])
    assert (np.abs(comp[1].astype(np.float64) - ref[1]) <= bound).all() and (bound <= 1e-4).all()
    groups = {"n_group": 4, "topk_group": 3} if experts % 4 == 0 and k <= experts // 2 else {"n_group": 1, "topk_group": 1}
    comp, ref, bound = both("deepseek_v3", tokens=tokens, experts=experts, k=k, normalise=normalise, **groups)
    here, there = np.argsort(comp[0], axis=1), np.argsort(ref[0], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(comp[0], here, 1), np.take_along_axis(ref[0], there, 1))
    comp, ref, bound = np.take_along_axis(comp[1], here, 1), *(np.take_along_axis(x, there, 1) for x in (ref[1], bound))
    assert (np.abs(comp.astype(np.float64) - ref) <= bound).all()


@pytest.mark.parametrize(("tokens", "experts", "k", "hidden"), [(0, 8, 2, 16), (1, 1, 1, 1), (1, 128, 8, 96), (50, 7, 3, 33), (9, 4, 5, 0)])
def test_dispatch_and_combine_equal_their_twins(tokens, experts, k, hidden):
    comp, ref, _ = both("dispatch", tokens=tokens, experts=experts, k=k)
    np.testing.assert_array_equal(comp[0], ref[0])
    np.testing.assert_array_equal(comp[1], ref[1])
    comp, ref, _ = both("combine", tokens=tokens, experts=experts, k=k, hidden=hidden)
    assert comp[-1].tobytes() == ref[-1].tobytes() and np.isfinite(comp[-1]).all()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.lists(st.lists(st.integers(0, e), min_size=2, max_size=2), max_size=20)))
)
def test_dispatch_sorts_each_slot_to_its_expert(case):
    experts, choices = case
    indices = np.array(choices, np.int64).reshape(-1, 2)
    order, offsets = dispatch(indices, experts)
    assert sorted(order) == list(range(indices.size)) and offsets[0] == 0
    for e in range(experts):
        slots = order[offsets[e] : offsets[e + 1]]
        assert (np.diff(slots) > 0).all() and slots.tolist() == np.flatnonzero(indices.reshape(-1) == e).tolist()
    assert (indices.reshape(-1)[order[offsets[-1] :]] == experts).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_there_and_back_is_the_weighted_sum(tokens, experts, k, seed):
    """Each expert multiplies by its number; whole numbers, so that sums are exact."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (tokens, 5)).astype(np.float32)
    weights = rng.integers(0, 5, (tokens, k)).astype(np.float32)
    indices = rng.integers(0, experts + 1, (tokens, k))
    order, offsets = dispatch(indices, experts)
    kept = order[: offsets[-1]]
    rows = x[kept // k] * np.repeat(np.arange(experts), np.diff(offsets))[:, None].astype(np.float32)
    out = np.full_like(x, nan)
    combine(rows, order, np.where(indices == experts, nan, weights).astype(np.float32), out)
    np.testing.assert_array_equal(out, x * (weights * np.where(indices == experts, 0, indices)).sum(1, keepdims=True))


def test_combine_adds_in_the_order_of_choices():
    """1 + 2**24 - 2**24 is 0 or 1: in the experts' order, which is the reverse here, it would be 1."""
    order, _ = dispatch(np.array([[2, 1, 0]]), 3)
    out = np.empty((1, 1), np.float32)
    combine(np.array([[-(2.0**24)], [2.0**24], [1]], np.float32), order, np.ones((1, 3), np.float32), out)
    assert out[0, 0] == 0


def test_outputs_are_written_where_given_and_nowhere_else():
    logits, bias = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32), np.zeros(16, np.float32)
    for gate in (lambda *out: softmax_topk(logits, 4, True, *out), lambda *out: deepseek_v3(logits, bias, 4, 4, 2, True, 1.0, *out)):
        i, w = np.full((5, 4), -7, np.int64), np.full((5, 4), -7, np.float32)
        comp, ref = gate(i[1:4], w[1:4]), gate()
        assert comp[0].base is i and comp[1].base is w and same_bits(comp, ref)
        assert (i[[0, 4]] == -7).all() and (w[[0, 4]] == -7).all()
    order, offsets, out = np.full(14, -7, np.int64), np.full(19, -7, np.int64), np.full((5, 6), -7, np.float32)
    comp = dispatch(ref[0], 16, order[1:13], offsets[1:18])
    assert all((a[[0, -1]] == -7).all() and (a[1:-1] >= 0).all() for a in (order, offsets)) and comp[0].base is order
    combine(np.ones((12, 6), np.float32), comp[0], ref[1], out[1:4])
    assert (out[[0, 4]] == -7).all() and (out[1:4] > 0).all()


# ---------------------------------------------------------------------------------------------------------------- errors

L, B, N, W = np.zeros((2, 8), np.float32), np.zeros(8, np.float32), np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32)
R, S, Y = np.zeros((6, 5), np.float32), np.arange(6), np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: softmax_topk(L.astype(np.float64), 2), TypeError, "logits is float64; give a NumPy array of float32"),
        (lambda: softmax_topk(torch.zeros(2, 8), 2), TypeError, "logits is torch.float32; give a NumPy array"),
        (lambda: softmax_topk(L[0], 2), ValueError, r"logits has shape \(8,\); it must have 2 axes"),
        (lambda: softmax_topk(L[:, ::2], 2), ValueError, r"logits is not contiguous .*pass np.ascontiguousarray\(logits\)"),
        (lambda: softmax_topk(L, 0), ValueError, r"k=0 of 8 experts; it must be 1 \.\. 8"),
        (lambda: softmax_topk(L, 9), ValueError, r"k=9 of 8 experts; it must be 1 \.\. 8"),
        (
            lambda: softmax_topk(L, 2, True, N, W),
            ValueError,
            r"indices \(2, 3\) and weights \(2, 3\) must be \(2, 2\): logits",
        ),
        (lambda: softmax_topk(L, 3, True, W, W), TypeError, "indices is float32; give a NumPy array of int64"),
        (lambda: deepseek_v3(L, B[:7].copy(), 2), ValueError, "bias has 7 numbers for 8 experts; give one per expert"),
        (lambda: deepseek_v3(L, B.astype(np.float64), 2), TypeError, "bias is float64"),
        (lambda: deepseek_v3(L, B, 2, 3, 1), ValueError, "n_group=3 must divide the 8 experts into groups of two or more"),
        (lambda: deepseek_v3(L, B, 2, 8, 1), ValueError, "n_group=8 must divide the 8 experts into groups of two or more"),
        (lambda: deepseek_v3(L, B, 2, 4, 5), ValueError, r"topk_group=5 of n_group=4; it must be 1 \.\. n_group"),
        (lambda: deepseek_v3(L, B, 2, 4, 0), ValueError, "topk_group=0 of n_group=4"),
        (lambda: dispatch(np.array([[0, 1], [2, 5]]), 4), ValueError, r"indices\[1, 1\]=5; experts are 0 \.\. 3, and 4 means none"),
        (lambda: dispatch(np.array([[0, -1]]), 4), ValueError, r"indices\[0, 1\]=-1; experts are 0 \.\. 3"),
        (lambda: dispatch(np.array([[2**62, -1]]), 4), ValueError, r"indices\[0, 0\]=4611686018427387904"),
        (lambda: dispatch(N.astype(np.int32), 4), TypeError, "indices is int32; give a NumPy array of int64"),
        (lambda: dispatch(N, 0), ValueError, "experts=0; there must be at least one"),
        (lambda: dispatch(N, 4, S[:5]), ValueError, r"order \(5,\) and offsets \(5,\) must be \(6,\) and \(5,\)"),
        (lambda: combine(R, S[:5], W, Y), ValueError, r"order has 5 slots, weights \(2, 3\) has 6"),
        (lambda: combine(np.zeros((7, 5), np.float32), S, W, Y), ValueError, "rows has 7 rows for 6 slots"),
        (lambda: combine(R, S, W, Y[:, :4].copy()), ValueError, r"out is \(2, 4\); weights \(2, 3\) and rows \(6, 5\) make \(2, 5\)"),
        (lambda: combine(R, S + 1, W, Y), ValueError, r"order\[5\]=6; slots are 0 \.\. 5: pass the order that dispatch returned"),
        (lambda: combine(R, S - 9, W, Y), ValueError, r"order\[0\]=-9; slots are 0 \.\. 5"),
        (lambda: combine(R, S, W, Y[:, ::-1]), ValueError, "out is not contiguous"),
    ],
)
def test_errors_say_what_is_wrong(call, error, says):
    with pytest.raises(error, match=says):
        call()
