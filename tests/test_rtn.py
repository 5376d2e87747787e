"""Round to nearest: its error bound, its use of the whole range, and independent implementations of the same rule."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import BITS, PerChannel, PerGroup, PerTensor, QuantScheme

GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(8), PerGroup(16)]
schemes = st.builds(QuantScheme, st.sampled_from(BITS), st.sampled_from(GRANULARITIES))
finite = st.floats(-1e4, 1e4, width=32)


def weights(elements=finite):
    return st.tuples(st.sampled_from([(), (2,)]), st.integers(1, 4), st.sampled_from([16, 32])).flatmap(
        lambda s: arrays(np.float32, (*s[0], *s[1:]), elements=elements)
    )


def per_weight(q) -> np.ndarray:
    """The scale of each weight, float64, in the weight's shape."""
    scales = q.scales.astype(np.float64)
    if isinstance(q.scheme.granularity, PerGroup):
        scales = np.repeat(scales, q.scheme.granularity.size, axis=-1)
    return np.broadcast_to(scales, q.shape)


@given(weights(), schemes)
@settings(deadline=None)
def test_error_is_at_most_half_a_step_inside_the_range(w, scheme):
    """|w - value| <= |s| / 2 where w lies between the outermost codes' values, and the distance to them elsewhere.

    Elsewhere is at most one step away on the far side, m being the weight of largest magnitude, at -2**(b-1) steps:
    float16 rounds s = m / -2**(b-1) by at most s * 2**-11 (or 2**-25, half of its smallest number), which moves the
    outermost values by 2**(b-1) times that. Float32's own rounding of w / s, 2**-24 of it, is added.
    """
    q = round_to_nearest(torch.from_numpy(w), scheme)
    s, zero = np.abs(per_weight(q)), 2 ** (scheme.bits - 1)
    error = np.abs(w.astype(np.float64) - q.dequantize())
    steps = np.divide(w, per_weight(q), out=np.zeros_like(s), where=s > 0)
    slack = s * zero * 2.0**-23
    inside = (steps >= -zero) & (steps <= zero - 1) & (s > 0)
    assert (error <= s / 2 + slack)[inside].all()
    moved = zero * np.maximum(s * 2.0**-11 / (1 - 2.0**-11), 2.0**-25)
    assert (error <= s + moved + slack).all()


@given(weights(), schemes)
@settings(deadline=None)
def test_every_code_is_the_nearest(w, scheme):
    """No other code of the same scale is closer: checked against all of them."""
    q = round_to_nearest(torch.from_numpy(w), scheme)
    s = per_weight(q)[..., None]
    values = s * (np.arange(scheme.levels) - 2 ** (scheme.bits - 1))
    best = np.abs(w.astype(np.float64)[..., None] - values).min(-1)
    error = np.abs(w.astype(np.float64) - q.dequantize())
    assert (error <= best + np.abs(s[..., 0]) * scheme.levels * 2.0**-23).all()


@given(weights(st.integers(-60000, 60000).map(lambda i: float(np.float16(i / 8)))), schemes)
@settings(deadline=None)
def test_largest_weight_is_kept_exactly(w, scheme):
    """Where m / 2**(b-1) is a float16 (m is one, and the quotient not subnormal), m takes the code 0 and its own value."""
    q = round_to_nearest(torch.from_numpy(w), scheme)
    size = {PerTensor: w.shape[-2] * w.shape[-1], PerChannel: w.shape[-1]}.get(type(scheme.granularity)) or scheme.granularity.size
    for values, kept, codes in zip(w.reshape(-1, size), q.dequantize().reshape(-1, size), q.codes().reshape(-1, size), strict=True):
        k = np.abs(values).argmax()
        if values[k]:
            assert codes[k] == 0 and kept[k] == values[k]


@given(schemes, st.sampled_from([0.0, 1e-12, 1e-40]), st.sampled_from([0, 4]))
@settings(deadline=None)
def test_rows_of_zeros_stay_zeros(scheme, tiny, mse_grid):
    """Also weights below float16's smallest number: a scale of 0, the code of 0, and no NaN."""
    q = round_to_nearest(torch.full((3, 16), tiny), scheme, mse_grid=mse_grid)
    assert (q.codes() == scheme.zero_point).all() and (q.dequantize() == 0).all()


@given(weights(), schemes, st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_mse_grid_never_adds_error(w, scheme, grid):
    def error(q):
        squares = (q.dequantize().astype(np.float64) - w) ** 2
        n = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else w.shape[-1]
        squares = squares.reshape(*w.shape[:-1], -1, n).sum(-1)
        return squares.sum(-2, keepdims=True) if isinstance(scheme.granularity, PerTensor) else squares

    plain, searched = (error(round_to_nearest(torch.from_numpy(w), scheme, mse_grid=g)) for g in (0, grid))
    assert (searched <= plain * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_grid_comes_near_the_best_scale_for_a_gaussian(bits):
    """The best single scale for N(0, 1) is found here by brute force on other samples of it."""
    w, x = torch.randn(64, 256), torch.randn(20000)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = min(float((x - s * torch.round(x / s).clamp(low, high)).square().mean()) for s in np.linspace(0.1, 2, 200))
    plain, searched = (
        float((torch.from_numpy(round_to_nearest(w, QuantScheme(bits, PerChannel()), mse_grid=g).dequantize()) - w).square().mean())
        for g in (0, 24)
    )
    assert searched < 1.05 * best
    assert plain > searched


def test_int8_rows_equal_torch_fake_quantize():
    """torch multiplies by 1 / s where we divide by s, so a code may differ where w / s is a tie but for rounding."""
    w = torch.randn(40, 96)
    q = round_to_nearest(w, QuantScheme(8, PerChannel()))
    s = torch.from_numpy(q.scales[:, 0].astype(np.float32))
    flipped = w * torch.sign(s)[:, None]  # torch's observer-made scales are positive, ours carry the sign of the largest weight
    oracle = torch.fake_quantize_per_channel_affine(flipped, s.abs(), torch.zeros(40, dtype=torch.int32), 0, -128, 127)
    ours = torch.from_numpy(q.dequantize()) * torch.sign(s)[:, None]
    steps = flipped / s.abs()[:, None]
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-4
    assert tie.float().mean() < 0.01
    torch.testing.assert_close(ours[~tie], oracle[~tie], rtol=0, atol=0)


def test_q4_0_of_gguf_by_its_own_formula():
    """ggml-quants.c, quantize_row_q4_0_ref: d = max / -8, q = min(15, trunc(x / d + 8.5)), d unrounded; same up to ties."""
    w = torch.randn(32, 64)
    q = round_to_nearest(w, QuantScheme(4, PerGroup(32)))
    x = w.numpy().reshape(-1, 32)
    top = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    d = (top / -8).astype(np.float32)
    theirs = np.minimum(15, np.trunc(x / d + np.float32(8.5))).astype(np.uint8)
    np.testing.assert_array_equal(q.scales.reshape(-1, 1), d.astype(np.float16))
    # they divide by d before its rounding: a step moves by at most 8 * 2**-11 where it does
    near_a_tie = np.abs(np.abs(x / d - np.floor(x / d)) - 0.5) < 8 * 2.0**-11
    np.testing.assert_array_equal(q.codes().reshape(-1, 32)[~near_a_tie], theirs[~near_a_tie])
    assert near_a_tie.mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_the_codes_of_its_float32(dtype):
    w = torch.randn(2, 6, 32).to(dtype)
    a, b = (round_to_nearest(x, QuantScheme(3, PerGroup(16))) for x in (w, w.float()))
    np.testing.assert_array_equal(a.packed, b.packed)
    np.testing.assert_array_equal(a.scales, b.scales)


def test_a_stack_is_quantized_expert_by_expert_and_views_are_fine(monkeypatch):
    w = torch.randn(32, 6, 3).permute(2, 1, 0)  # not contiguous
    for granularity in GRANULARITIES:
        scheme = QuantScheme(4, granularity)
        stack = round_to_nearest(w, scheme)
        monkeypatch.setattr("edgelab.methods.rtn._CHUNK", 64)  # many chunks give the same
        for e in range(3):
            one = round_to_nearest(w[e], scheme)
            np.testing.assert_array_equal(stack[e].packed, one.packed)
            np.testing.assert_array_equal(stack[e].scales, one.scales)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "weight, scheme, message",
    [
        (
            torch.tensor([[1.0, float("nan"), float("inf"), 0.0]]),
            "int4-row",
            r"weight holds 2 NaN or infinite values of 4; repair the checkpoint",
        ),
        (torch.ones(2, 33), "int4-g32", r"group_size=32 does not divide in_features=33; use PerChannel\(\)"),
        (torch.ones(4), "int4-row", r"weight is torch.float32 \(4,\); it must be float \[out, in\]"),
        (torch.ones(2, 4, dtype=torch.int64), "int4-row", "weight is torch.int64"),
        (torch.ones(0, 4), "int4-row", "not empty"),
        (torch.full((2, 4), 1e6), "int4-row", r"a weight of magnitude 1e\+06 needs a scale above float16's 65504 at 4 bits"),
    ],
)
def test_errors_name_the_value_and_the_way_out(weight, scheme, message):
    with pytest.raises(ValueError, match=message):
        round_to_nearest(weight, QuantScheme.parse(scheme))


def test_scales_below_float16_are_warned_of():
    with pytest.warns(UserWarning, match="layer.x: 4 of 4 groups are so small"):
        round_to_nearest(torch.randn(4, 64) * 1e-7, QuantScheme.parse("int8-row"), name="layer.x")
