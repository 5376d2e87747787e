"""HQQ against its equations written out in NumPy float64, against the original's loop, and what it promises."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.methods.hqq import hqq
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import QuantScheme


def half(x):
    return np.float64(np.float16(x))


def naive_hqq(w: np.ndarray, bits: int, p=0.7, beta=10.0, kappa=1.01, iterations=20) -> np.ndarray:
    """The values for one group [n], float64."""
    s, o = half((w.max() - w.min()) / (2**bits - 1)), half(w.min())

    def codes(o):
        return np.clip(np.round((w - o) / s), 0, 2**bits - 1)

    best, kept, stale = np.inf, o, 0
    for i in range(iterations + 1):
        r = w - s * codes(o) - o
        norm = (np.abs(r) ** p).sum()
        stale = 0 if norm < best else stale + 1
        if norm < best:
            best, kept = norm, o
        if stale == 5:
            break
        if i < iterations:
            e = np.sign(r) * np.maximum(0, np.abs(r) - np.maximum(np.abs(r), 1e-30) ** (p - 1) / beta)
            o = half((w - e - s * codes(o)).mean())
            beta *= kappa
    return s * codes(kept) + kept


def p_norm(w, q, p=0.7) -> np.ndarray:
    """sum |w - value|**p of each group of 32."""
    return (np.abs(w.double().numpy() - q.dequantize()) ** p).reshape(-1, 32).sum(1)


def heavy(*shape):
    """Weights with a few that are far out, as those of language models have."""
    return torch.randn(*shape) * (1 + 4 * (torch.rand(*shape) < 0.03))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("setting", [{}, {"p": 1.0}, {"beta": 2.0, "kappa": 1.2, "iterations": 7}])
def test_equals_its_equations_in_float64(bits, setting):
    """Nearly everywhere: float32 may round a tie, or a stop, the other way; then a group differs, by next to nothing in its norm."""
    w = heavy(64, 64)
    comp = hqq(w, QuantScheme.parse(f"uint{bits}-g32"), **setting)
    ref = np.stack([naive_hqq(g.astype(np.float64), bits, **setting) for g in w.numpy().reshape(-1, 32)])
    same = (np.abs(ref - comp.dequantize().reshape(-1, 32)) < 1e-5).all(1)
    assert same.mean() > 0.9
    p = setting.get("p", 0.7)
    norm = (np.abs(w.numpy().reshape(-1, 32) - ref) ** p).sum()
    assert p_norm(w, comp, p).sum() == pytest.approx(norm, rel=1e-3)


def test_is_as_good_as_the_loop_of_the_original():
    """mobiusml/hqq, hqq/core/optimize.py: zero points z, one stop for the whole weight; scales and z in float32."""
    w = heavy(64, 64)
    x = w.double().numpy().reshape(-1, 32)
    span = x.max(1, keepdims=True) - x.min(1, keepdims=True)
    inverse, z, beta, last = 7 / span, -x.min(1, keepdims=True) * 7 / span, 10.0, np.inf
    for _ in range(20):
        q = np.clip(np.round(x * inverse + z), 0, 7)
        r = (q - z) / inverse
        e = np.sign(x - r) * np.maximum(0, np.abs(x - r) - np.maximum(np.abs(x - r), 1e-30) ** -0.3 / beta)
        z, beta, error = (q - (x - e) * inverse).mean(1, keepdims=True), beta * 1.01, np.abs(x - r).mean()
        if error >= last:
            break
        last = error
    theirs = (np.clip(np.round(x * inverse + z), 0, 7) - z) / inverse
    ours = p_norm(w, hqq(w, QuantScheme.parse("uint3-g32"))).sum()
    assert ours < 1.005 * (np.abs(x - theirs) ** 0.7).sum()


@given(st.sampled_from(["uint2-g32", "uint3-g32", "uint4-g32", "uint8-g32"]), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 100.0]))
@settings(deadline=None, max_examples=30)
def test_no_group_ends_worse_than_it_began(scheme, seed, size):
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * size
    scheme = QuantScheme.parse(scheme)
    q = hqq(w, scheme)
    assert q.codes().max() < scheme.levels
    assert (p_norm(w, q) <= p_norm(w, round_to_nearest(w, scheme)) * (1 + 1e-4) + 1e-9).all()


def test_lowers_the_p_norm_of_weights_with_outliers():
    w = heavy(128, 64)
    for bits, factor in ((2, 0.98), (3, 0.98), (4, 0.98)):
        scheme = QuantScheme.parse(f"uint{bits}-g32")
        assert p_norm(w, hqq(w, scheme)).sum() < factor * p_norm(w, round_to_nearest(w, scheme)).sum()


@pytest.mark.parametrize("scheme", ["uint3-g16", "uint4-row", "uint2-tensor"])
def test_a_stack_is_its_experts_in_chunks_or_whole(scheme, monkeypatch):
    w, scheme = heavy(3, 10, 32), QuantScheme.parse(scheme)
    whole = hqq(w, scheme)
    monkeypatch.setattr("edgelab.methods.hqq._CHUNK", 64)
    for e, q in enumerate(hqq(x, scheme) for x in w):
        np.testing.assert_array_equal(whole[e].packed, q.packed)
        np.testing.assert_array_equal(whole[e].offsets, q.offsets)


def test_no_iterations_is_round_to_nearest_and_constants_stay():
    w, scheme = torch.randn(4, 64), QuantScheme.parse("uint4-g32")
    np.testing.assert_array_equal(hqq(w, scheme, iterations=0).dequantize(), round_to_nearest(w, scheme).dequantize())
    assert (hqq(torch.zeros(2, 64), scheme).dequantize() == 0).all()
    np.testing.assert_allclose(hqq(torch.full((2, 64), -0.7), scheme).dequantize(), -0.7, rtol=2.0**-11)


@pytest.mark.parametrize(
    "weight, scheme, setting, message",
    [
        (torch.ones(2, 64), "int4-g32", {}, "layer.x: HQQ fits an offset and int4-g32 has none; use uint4-g32"),
        (torch.ones(2, 64), "nf4-g64", {}, "use uint4-g64"),
        (torch.ones(2, 64), "uint4-g32", {"p": 0}, "p=0, beta=10.0"),
        (torch.ones(2, 64), "uint4-g32", {"beta": -1.0}, "beta=-1.0"),
        (torch.full((2, 64), torch.nan), "uint4-g32", {}, "weight holds 128 NaN or infinite values"),
        (torch.ones(2, 48), "uint4-g32", {}, "group_size=32 does not divide in_features=48"),
        (torch.full((2, 64), 1e6), "uint4-g32", {}, "needs an offset above float16"),
    ],
)
def test_errors_name_the_way_out(weight, scheme, setting, message):
    with pytest.raises(ValueError, match=message):
        hqq(weight, QuantScheme.parse(scheme), name="layer.x", **setting)


@pytest.mark.parametrize("scheme", ["uint4-g32", "uint3-row", "uint2-tensor"])
def test_scales_below_float16_are_warned_of(scheme):
    scheme = QuantScheme.parse(scheme)
    with pytest.warns(UserWarning, match=r"layer.x: (\d) of \1 groups are so small \(largest weight .*rescale the weight or keep it"):
        q = hqq(torch.randn(2, 64) * 1e-9, scheme, name="layer.x")
    assert not q.dequantize().any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hqq(torch.randn(2, 64), scheme)
