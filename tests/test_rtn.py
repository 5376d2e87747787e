"""Round to nearest: its error bound, its use of the whole range, and independent implementations of the same rules."""

import math
import warnings

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


every_scheme = st.one_of(
    schemes,
    st.builds(QuantScheme, st.sampled_from(BITS), st.sampled_from(GRANULARITIES), st.just("uint")),
    st.builds(QuantScheme, st.just(4), st.sampled_from(GRANULARITIES), st.sampled_from(["nf", "fp"])),
    st.just(QuantScheme(4, PerGroup(32), "mxfp")),
)


def group_error(q, w, h=1.0) -> np.ndarray:
    """sum of h (w - value)**2, float64, in the scales' shape."""
    squares = h * (q.dequantize().astype(np.float64) - w) ** 2
    n = q.scheme.granularity.size if isinstance(q.scheme.granularity, PerGroup) else w.shape[-1]
    squares = squares.reshape(*w.shape[:-1], -1, n).sum(-1)
    return squares.sum(-2, keepdims=True) if isinstance(q.scheme.granularity, PerTensor) else squares


def quiet(*args, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are so small")  # hypothesis finds them
        return round_to_nearest(*args, **settings)


@given(weights(), every_scheme, st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_mse_grid_never_adds_error(w, scheme, grid):
    w = np.concatenate([w, w], -1)[..., :32]  # what every scheme divides
    plain, searched = (group_error(quiet(torch.from_numpy(w), scheme, mse_grid=g), w) for g in (0, grid))
    assert (searched <= plain * (1 + 1e-4) + 1e-12).all()


@given(weights(), every_scheme, st.sampled_from([0, 5]), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_importance_never_adds_weighted_error(w, scheme, grid, seed):
    """Neither with a grid nor with the least squares alone; some inputs count for nothing."""
    w = np.concatenate([w, w], -1)[..., :32]
    h = np.random.default_rng(seed).exponential(size=(*w.shape[:-2], 32)) ** 3
    h[..., ::5] = 0
    plain = quiet(torch.from_numpy(w), scheme)
    weighted = quiet(torch.from_numpy(w), scheme, mse_grid=grid, importance=torch.from_numpy(h))
    before, after = (group_error(q, w, h[..., None, :]) for q in (plain, weighted))
    assert weighted.codes().max() < scheme.levels
    assert (after <= before * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("scheme", ["int4-g16", "uint3-g16", "nf4-row", "int2-tensor", "uint4-tensor"])
def test_importance_pays_where_it_says(scheme):
    """The weighted search does better by its own measure than the plain search, and each expert has its own importance."""
    w, h = torch.randn(3, 20, 32), torch.rand(3, 32) ** 6 + 1e-3
    scheme = QuantScheme.parse(scheme)
    plain, weighted = round_to_nearest(w, scheme, mse_grid=16), round_to_nearest(w, scheme, mse_grid=16, importance=h)
    errors = [float((h[:, None] * (torch.from_numpy(q.dequantize()) - w).square()).sum()) for q in (plain, weighted)]
    assert errors[1] < 0.97 * errors[0]
    for e in range(3):
        np.testing.assert_array_equal(weighted[e].packed, round_to_nearest(w[e], scheme, mse_grid=16, importance=h[e] * 7).packed)


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


def test_q8_0_of_gguf_differs_by_its_scale_only():
    """ggml-quants.c, quantize_row_q8_0_ref: d = max|x| / 127, codes -127 .. 127; ours: s = m / -128, codes -128 .. 127.

    With the scale exchanged, their formula gives our codes, up to ties and the float16 of the scale.
    """
    w = torch.randn(32, 64)
    q = round_to_nearest(w, QuantScheme(8, PerGroup(32)))
    x = w.numpy().reshape(-1, 32)
    top = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    d = top / np.float32(-128)
    theirs = np.minimum(np.copysign(np.floor(np.abs(x / d) + 0.5), x / d), 127) + 128
    near_a_tie = np.abs(np.abs(x / d) % 1 - 0.5) < 128 * 2.0**-11
    ours = q.codes().reshape(-1, 32)
    np.testing.assert_array_equal(ours[~near_a_tie], theirs[~near_a_tie])
    assert np.abs(ours - theirs).max() <= 1
    assert near_a_tie.mean() < 0.2
    q8_0 = np.abs(top) / 127  # and the values of both lie within half a step (and float16's rounding) of the same weight
    np.testing.assert_allclose(np.abs(q.scales.astype(np.float32).reshape(-1, 1)) / q8_0, 127 / 128, rtol=2.0**-11)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_matmulnbits_of_onnx_runtime(bits, dtype):
    """ONNX Runtime's own quantizer of MatMulNBits, symmetric, block 32: scale = m / -2**(b-1).

    From float16 weights, to float16 scales, the codes of 4 bits are equal. From float32 it keeps a float32 scale, and the codes
    differ where that of float16 (rounded by at most 2**-11 of it) moves w / s across a tie.
    """
    state = pytest.importorskip("onnxruntime.capi._pybind_state")
    w = torch.randn(40, 96).numpy().astype(dtype)
    packed, scales = np.zeros((40, 3, 32 * bits // 8), np.uint8), np.zeros(120, dtype)
    quantize = getattr(state, f"quantize_matmul_{bits}bits")
    quantize(packed, np.ascontiguousarray(w.T), scales, np.zeros(120, np.uint8), 32, 40, 96, True)
    theirs = packed.reshape(40, 96) if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(40, 96)
    q = round_to_nearest(torch.from_numpy(w), QuantScheme(bits, PerGroup(32)))
    np.testing.assert_allclose(scales.reshape(40, 3).astype(np.float64), q.scales.astype(np.float64), rtol=2.0**-11)
    if dtype == np.float16:
        np.testing.assert_array_equal(scales.reshape(40, 3), q.scales)
    steps = w.astype(np.float64) / per_weight(q)
    tie = np.abs(np.abs(steps) % 1 - 0.5) < 2 ** (bits - 1) * (2.0**-11 if dtype == np.float32 else 2.0**-20)
    np.testing.assert_array_equal(q.codes()[~tie], theirs[~tie])
    assert np.abs(q.codes().astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nf4_and_fp4_are_those_of_bitsandbytes(kind):
    """The table is equal; the codes too, but where float16 scales (theirs are float32) move w / s across a midpoint.

    So the values differ by 2**-11 of themselves, or, at a midpoint, both lie half a gap from the weight.
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(64, 256)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind)
    theirs = bnb.dequantize_4bit(packed, state).numpy()
    q = round_to_nearest(w, QuantScheme.parse(f"{kind}-g64"))
    np.testing.assert_array_equal(q.scheme.table, state.code.numpy())
    np.testing.assert_array_equal(q.scales.reshape(-1), state.absmax.numpy().astype(np.float16))
    codes = np.stack([packed.numpy().ravel() >> 4, packed.numpy().ravel() & 15], -1).reshape(w.shape)
    same = q.scheme.table[codes] == q.scheme.table[q.codes()]  # as levels: fp4 has two zeros
    assert (~same).mean() < 0.002
    scale = per_weight(q)
    np.testing.assert_array_less(np.abs(q.dequantize() - theirs)[same], np.abs(theirs[same]) * 2.0**-11 + 1e-7)
    x = np.abs(w.numpy()[..., None] / scale[..., None] - q.scheme.table)
    distance = np.sort(x, -1)[..., :3]  # fp4's zeros are two of them
    assert (np.abs(distance[..., 1:] - distance[..., :1]).min(-1)[~same] < 2 * 2.0**-11).all()


def test_uint4_equals_torch_fake_quantize_where_the_offset_is_a_whole_number_of_steps():
    """torch stores a zero point, an integer code; we store its value, and round neither. Equal where that is no difference."""
    s, zero = 2.0**-5, torch.randint(0, 16, (30,), dtype=torch.int32)
    w = (torch.rand(30, 64) * 15 - zero[:, None]) * s
    w[:, 0], w[:, 1] = -zero * s, (15 - zero) * s  # the range is exactly 15 steps
    q = round_to_nearest(w, QuantScheme.parse("uint4-row"))
    oracle = torch.fake_quantize_per_channel_affine(w, torch.full((30,), s), zero, 0, 0, 15)
    tie = (((w / s) % 1) - 0.5).abs() < 1e-4
    np.testing.assert_array_equal(torch.from_numpy(q.dequantize())[~tie], oracle[~tie])
    assert tie.float().mean() < 0.01


def test_q4_1_of_gguf_by_its_own_formula():
    """ggml-quants.c, quantize_row_q4_1_ref: d = (max - min) / 15, q = min(15, trunc((x - min) / d + 0.5)); d, min unrounded."""
    w = torch.randn(32, 64)
    q = round_to_nearest(w, QuantScheme.parse("uint4-g32"))
    x = w.numpy().reshape(-1, 32)
    low = x.min(1, keepdims=True)
    d = (x.max(1, keepdims=True) - low) / np.float32(15)
    theirs = np.minimum(15, np.trunc((x - low) / d + np.float32(0.5))).astype(np.uint8)
    np.testing.assert_array_equal(q.scales.reshape(-1, 1), d.astype(np.float16))
    np.testing.assert_array_equal(q.offsets.reshape(-1, 1), low.astype(np.float16))
    near_a_tie = np.abs((x - low) / d % 1 - 0.5) < 15 * 2.0**-11 + np.abs(low) / d * 2.0**-11
    np.testing.assert_array_equal(q.codes().reshape(-1, 32)[~near_a_tie], theirs[~near_a_tie])
    assert near_a_tie.mean() < 0.04


def test_mxfp4_by_the_rule_of_the_standard():
    """OCP MX v1.0, section 6.3: X = 2**(floor(log2(max|v|)) - 2), elements to nearest, ties to even, saturating at 6 X.

    Multiples of 1/8 in bfloat16: many ties.
    """
    w = torch.randint(-40, 41, (20, 64)).float() / 8
    w[0] = 0
    q = round_to_nearest(w.bfloat16(), QuantScheme.parse("mxfp4-g32"))
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for r in range(20):
        for g in range(2):
            group = w[r, 32 * g : 32 * g + 32].tolist()
            top = max(map(abs, group))
            x = 2.0 ** (math.floor(math.log2(top)) - 2) if top else 1.0
            assert q.scales[r, g] == math.log2(x) + 127
            for k, v in enumerate(group):
                best = min(range(8), key=lambda i: (abs(abs(v) / x - values[i]), i % 2))
                assert q.dequantize()[r, 32 * g + k] == math.copysign(values[best] * x, v)
                assert q.codes()[r, 32 * g + k] == best + (8 if v < 0 and best else 0)


@given(weights(), every_scheme)
@settings(deadline=None, max_examples=60)
def test_every_codebook_takes_the_nearest_level(w, scheme):
    w = np.concatenate([w, w], -1)[..., :32]
    q = quiet(torch.from_numpy(w), scheme)

    def spread(x):
        repeat = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 1
        return np.broadcast_to(np.repeat(x.astype(np.float64), repeat, -1), w.shape)[..., None]

    s, o = spread(q.scale_values()), 0.0 if q.offsets is None else spread(q.offsets)
    best = np.abs(w[..., None] - (s * scheme.table + o)).min(-1)
    error = np.abs(w.astype(np.float64) - q.dequantize())
    assert (error <= best + (np.abs(s[..., 0]) * scheme.levels + np.abs(w)) * 2.0**-22).all()


@pytest.mark.parametrize("scheme", ["uint4-g32", "uint2-row", "nf4-g32", "fp4-row", "mxfp4-g32", "uint8-tensor"])
@pytest.mark.parametrize("settings", [{}, {"mse_grid": 8}, {"mse_grid": 8, "importance": torch.zeros(32)}])
def test_constant_groups_of_any_codebook(scheme, settings):
    """All zero: zero. All one value: that value, for uint to float16's precision."""
    scheme = QuantScheme.parse(scheme)
    assert (round_to_nearest(torch.zeros(3, 32), scheme, **settings).dequantize() == 0).all()
    if scheme.codebook != "mxfp":
        constant = round_to_nearest(torch.full((3, 32), 0.3), scheme, **settings).dequantize()
        np.testing.assert_allclose(constant, 0.3, rtol=2.0**-11)


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
        (torch.full((2, 4), 1e6), "uint4-row", r"a weight of magnitude 1e\+06 needs an offset above float16's 65504"),
        (torch.full((2, 4), 1e6), "nf4-row", r"a weight of magnitude 1e\+06 needs a scale above float16's 65504"),
    ],
)
def test_errors_name_the_value_and_the_way_out(weight, scheme, message):
    with pytest.raises(ValueError, match=message):
        round_to_nearest(weight, QuantScheme.parse(scheme))


def test_scales_below_float16_are_warned_of():
    with pytest.warns(UserWarning, match="layer.x: 4 of 4 groups are so small"):
        round_to_nearest(torch.randn(4, 64) * 1e-7, QuantScheme.parse("int8-row"), name="layer.x")


@pytest.mark.parametrize(
    "importance, message",
    [
        (torch.ones(3), r"importance is \(3,\); a weight of \(2, 4\) needs \(4,\)"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "importance holds NaN, infinite or negative values"),
        (torch.tensor([1.0, torch.nan, 1.0, 1.0]), "importance holds NaN"),
    ],
)
def test_importance_is_checked(importance, message):
    with pytest.raises(ValueError, match=message):
        round_to_nearest(torch.randn(2, 4), QuantScheme.parse("int4-row"), mse_grid=4, importance=importance)
