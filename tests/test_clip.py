"""Thresholds through one door: against TensorRT's loop written naively, against the values themselves, and by hand."""

import math

import numpy as np
import pytest
import torch

from edgelab.kernels.histogram import TIE, add, empty, kl_threshold
from edgelab.methods.clip import RULES, clip_weight, clipped_share, kl_by_hand, search, threshold, weight_ranges
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import QuantScheme


def histogram_of(x: np.ndarray, bins: int = 2048):
    return add(empty(bins, top=float(np.nextafter(np.abs(x).max(), np.float32(np.inf)))), np.ascontiguousarray(x, np.float32))


def squared_error(x: np.ndarray, t: float, bits: int = 8) -> float:
    top = 2 ** (bits - 1) - 1
    q = np.clip(np.rint(x.astype(np.float64) * top / t), -top, top)
    return float(np.mean((q * t / top - x) ** 2))


SAMPLES = {
    "normal": lambda rng: rng.standard_normal(30_000),
    "laplace": lambda rng: rng.laplace(size=30_000),
    "student": lambda rng: rng.standard_t(3, 30_000),
    "relu": lambda rng: np.maximum(rng.standard_normal(30_000), 0),
    "swiglu": lambda rng: rng.standard_normal(30_000) ** 2 * rng.standard_normal(30_000),
    "outlier": lambda rng: np.append(rng.standard_normal(30_000), [60.0, 55.0, -61.0]),
}


@pytest.fixture(params=SAMPLES)
def values(request) -> np.ndarray:
    return SAMPLES[request.param](np.random.default_rng(3)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- the naive TensorRT


def naive_kl(counts: list[int], levels: int, i: int) -> float:
    """KL(P || Q) of the slides' candidate i, in plain Python, one loop after the other."""
    p = [float(c) for c in counts[:i]]
    p[i - 1] += sum(counts[i:])
    q = [0.0] * i
    for level in range(levels):
        start, stop = -(-level * i // levels), -(-(level + 1) * i // levels)
        filled = [j for j in range(start, stop) if counts[j]]
        for j in filled:
            q[j] = sum(counts[start:stop]) / len(filled)
    if sum(counts[i:]) and sum(v > 0 for v in q) < 2:
        return math.inf  # nothing, or one bin, is kept
    whole_p, whole_q, kl = sum(p), sum(q), 0.0
    for a, b in zip(p, q, strict=True):
        if a:
            kl += a / whole_p * math.log((a / whole_p) / (b / whole_q)) if b else math.inf
    return kl


def tensorrt(counts: list[int], levels: int) -> list[float]:
    return [naive_kl(counts, levels, i) for i in range(levels, len(counts) + 1)]


def chosen(curve: list[float]) -> int:
    return next(m for m, kl in enumerate(curve) if kl <= min(curve) + TIE)


def test_kl_thresholds_equal_the_naive_loops_at_few_bits(values):
    for bits, bins in ((3, 64), (4, 200), (5, 333)):
        h = histogram_of(values, bins)
        curve = tensorrt(h.counts.tolist(), 2 ** (bits - 1))
        best = chosen(curve)
        found = threshold(h, "kl", bits=bits, maximum=float(np.abs(values).max()), zero_bin="keep")
        assert found.threshold == min((2 ** (bits - 1) + best + 0.5) * h.width, float(np.abs(values).max()))


def test_kl_threshold_equals_the_naive_loop_at_8_bits_and_2048_bins():
    h = histogram_of(SAMPLES["student"](np.random.default_rng(0)).astype(np.float32))
    curve = tensorrt(h.counts.tolist(), 128)
    assert 0 < chosen(curve) < len(curve) - 1
    assert threshold(h, "kl", zero_bin="keep").threshold == (128 + chosen(curve) + 0.5) * h.width
    np.testing.assert_allclose(search(h, "kl", zero_bin="keep").curve, curve, rtol=1e-9, atol=1e-12)


def test_the_loop_by_hand_is_the_closed_form_and_the_naive_one():
    rng = np.random.default_rng(5)
    for case in range(60):
        levels = int(rng.integers(2, 7))
        counts = rng.integers(0, 9, int(rng.integers(levels + 1, 30)))
        counts *= rng.random(counts.size) < 0.7
        counts[rng.integers(counts.size)] += 1
        by_hand = [s.divergence for s in kl_by_hand(counts, levels)]
        np.testing.assert_allclose(by_hand, kl_threshold(counts, 1.0, levels, zero_bin="keep").curve, atol=1e-12)
        np.testing.assert_allclose(by_hand, tensorrt(counts.tolist(), levels), atol=1e-12, err_msg=str(case))


def test_every_array_of_a_step_by_hand():
    # eight bins, four levels, six kept: bins {0, 1}, {2}, {3, 4}, {5} (floor(j 4 / 6)); 3 + 1 outliers go to P's last bin
    step = kl_by_hand([20, 8, 6, 4, 0, 2, 3, 1], levels=4)[2]
    assert (step.kept, step.outliers, step.levels.tolist()) == (6, 4, [0, 0, 1, 2, 2, 3])
    assert step.p.tolist() == [20, 8, 6, 4, 0, 6] and step.q.tolist() == [14, 14, 6, 4, 0, 2]
    p, q = np.array([20, 8, 6, 4, 6]) / 44, np.array([14, 14, 6, 4, 2]) / 40
    assert step.divergence == pytest.approx(float(np.sum(p * np.log(p / q))))


# --------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_rule_does_what_it_says(values, bits):
    size = np.abs(values)
    most = float(size.max())
    h = histogram_of(values)
    found = {rule: threshold(h, rule, bits=bits, maximum=most, percentile=99.9) for rule in RULES}
    assert found["max"].threshold == most and found["max"].clipped == 0
    ref = np.sort(size)[math.ceil(0.999 * size.size) - 1]
    assert 0 <= found["percentile"].threshold - ref <= h.width or found["percentile"].threshold == most
    errors = [squared_error(values, t, bits) for t in np.linspace(128.5 * h.width, most, 300)]
    assert squared_error(values, found["mse"].threshold, bits) <= min(errors) * 1.02
    for rule, r in found.items():
        assert r.rule == rule and r.bits == bits and 0 < r.threshold <= most
        assert r.scale == r.threshold / (2 ** (bits - 1) - 1)
        beyond = (size > r.threshold).mean()
        assert beyond - h.counts[int(r.threshold / h.width - 1e-9)] / size.size - 1e-9 <= r.clipped <= beyond + 1e-9


def test_without_the_maximum_the_edge_of_its_bin_counts():
    h = add(empty(8), np.array([0.3, 0.9], np.float32))
    assert threshold(h, "max", bits=2).threshold == 1.0 and threshold(h, "max", bits=2, maximum=0.9).threshold == 0.9
    zeros = add(empty(), np.zeros(4, np.float32))
    assert [threshold(zeros, rule).threshold for rule in RULES] == [0, 0, 0, 0] and clipped_share(zeros, 0) == 0


def test_kl_cuts_off_rare_huge_values_whatever_they_mean():
    rng = np.random.default_rng(1)
    x = np.append(rng.standard_normal(200_000), np.full(20, 60.0)).astype(np.float32)  # one in ten thousand
    h = histogram_of(x)
    found = {rule: threshold(h, rule, maximum=60.0).threshold for rule in RULES}
    assert found["kl"] < 10 < 55 < found["mse"] <= found["max"]
    assert squared_error(x, found["kl"]) > 10 * squared_error(x, found["mse"])


def test_what_the_door_refuses():
    h = histogram_of(np.arange(1, 100, dtype=np.float32))
    with pytest.raises(ValueError, match=r"rule='entropy' is not known; use one of max, percentile, mse, kl"):
        threshold(h, "entropy")
    for bits in (1, 9, 4.0, True):
        with pytest.raises(ValueError, match=rf"bits={bits} must be 2 \.\. 8"):
            threshold(h, "max", bits=bits)
    for wrong in (50.0, 200.0):
        with pytest.raises(ValueError, match=rf"maximum={wrong} is not in the histogram's last filled bin"):
            threshold(h, "max", maximum=wrong)
    with pytest.raises(ValueError, match="the histogram is empty: no value was seen"):
        threshold(empty(), "max")
    with pytest.raises(ValueError, match="128 bins leave levels=128 at most one candidate"):
        threshold(histogram_of(np.ones(3), 128), "kl")
    with pytest.raises(ValueError, match=r"percentile=101 is outside"):
        threshold(h, "percentile", percentile=101)
    with pytest.raises(ValueError, match="rule='max' has no curve"):
        search(h, "max")
    with pytest.raises(ValueError, match="give one row of more bins than levels"):
        kl_by_hand([1, 2], 2)


# ----------------------------------------------------------------------------------------------------------- weights


def test_weight_ranges_by_scale():
    w = torch.randn(3, 8, 64)
    for text, shape in (("int8-row", (3, 8, 1)), ("int4-g32", (3, 8, 2)), ("int8-tensor", (3, 1, 1))):
        scheme = QuantScheme.parse(text)
        most = weight_ranges(w, scheme, "max")
        assert most.shape == shape
        assert torch.equal(most.amax(), w.abs().amax())
        half = weight_ranges(w, scheme, "percentile", percentile=50)
        kept = (clip_weight(w, scheme, half) == w).float().mean()
        assert kept == 0.5
    rows = weight_ranges(w, QuantScheme.parse("int8-row"), "max")
    assert torch.equal(rows[..., 0], w.abs().amax(-1))
    assert torch.equal(clip_weight(w, QuantScheme.parse("int8-row"), rows), w)


def test_rounding_takes_its_step_from_a_clipped_weight():
    w = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)) ** 3
    scheme = QuantScheme.parse("int4-row")
    found = {rule: weight_ranges(w, scheme, rule, percentile=99.5) for rule in RULES}

    def error(rule: str) -> float:
        q = round_to_nearest(clip_weight(w, scheme, found[rule]), scheme)
        np.testing.assert_allclose(np.abs(q.scale_values()), found[rule].numpy() / 8, rtol=1e-3)
        return float((torch.from_numpy(q.dequantize()) - w).square().mean())

    assert error("mse") < 0.7 * error("max") and error("mse") < error("kl")


def test_what_weight_ranges_refuse():
    w = torch.randn(4, 256)
    for rule in ("kl", "mse"):
        with pytest.raises(ValueError, match=rf"rule='{rule}' with int8-row: 256 weights share a scale, too few for a histogram of 2048"):
            weight_ranges(w, QuantScheme.parse("int8-row"), rule)
    assert weight_ranges(torch.randn(64, 256), QuantScheme.parse("int8-tensor"), "kl").shape == (1, 1)
    assert float(weight_ranges(torch.zeros(64, 256), QuantScheme.parse("int8-tensor"), "mse")) == 0
    with pytest.raises(ValueError, match=r"weight holds NaN or infinite"):
        weight_ranges(torch.full((4, 8), torch.nan), QuantScheme.parse("int8-row"), "max")
    with pytest.raises(ValueError, match=r"rule='best' is not known"):
        weight_ranges(w, QuantScheme.parse("int8-row"), "best")
    with pytest.raises(ValueError, match=r"weight is \(4,\); it must be"):
        weight_ranges(torch.ones(4), QuantScheme.parse("int8-row"), "max")
    with pytest.raises(ValueError, match="group_size=48 does not divide"):
        weight_ranges(w, QuantScheme.parse("int8-g48"), "max")
