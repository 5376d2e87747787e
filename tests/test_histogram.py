"""Streaming histograms and the thresholds they give: against their twins, against other people's tools, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.kernels import histogram
from edgelab.kernels.histogram import TIE, add, empty, kl_threshold, merge, mse_threshold, percentile_threshold
from edgelab.kernels.reference import BOUNDS, PAIRS

compiles = settings(deadline=None)  # the first call takes a second
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = arrays(np.float32, st.integers(0, 40), elements=FLOATS | st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -2.0, 4.0, 4.0 - 2**-21]))
BINS = st.sampled_from([1, 2, 7, 8, 64])
TOPS = st.sampled_from([1.0, 0.7, 3.1415927, float(np.nextafter(np.float32(5), np.float32(6)))])


@st.composite
def counts_and_levels(draw):
    """Counts of few and of many bins, many of them empty or equal, so that ties and infinite divergences abound."""
    levels = draw(st.integers(2, 20))
    bins = draw(st.integers(levels + 1, levels + 80))
    count = st.sampled_from([0, 0, 0, 1, 1, 2, 3]) | st.integers(0, 50) | st.integers(0, 2**40)
    counts = draw(arrays(np.int64, bins, elements=count))
    counts[draw(st.integers(0, bins - 1))] += 1
    return counts, levels


def same(a: histogram.Histogram, b: histogram.Histogram) -> bool:
    return np.array_equal(a.counts, b.counts) and a[1:] == b[1:]


def both(name: str, *args):
    """Kernel's and twin's output for the same arguments, and the bound."""
    kernel, reference, _ = PAIRS[name]
    output = args[-1].copy()
    kernel(*args[:-1], output)
    comp, ref = output, args[-1].copy()
    reference(*args[:-1], ref)
    return comp, ref, BOUNDS[name](*args)


def close(comp: np.ndarray, ref: np.ndarray, bound: np.ndarray) -> bool:
    finite = np.isfinite(ref)
    return np.array_equal(comp[~finite], ref[~finite]) and bool((np.abs(comp[finite] - ref[finite]) <= bound[finite]).all())


# ----------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 63, 64, 65, 10_001])
def test_count_equals_its_twin(n):
    for bins in (1, 31, 2048):
        comp, ref, _ = both("count", *PAIRS["count"][2](np.random.default_rng(n), bins=bins, n=n))
        np.testing.assert_array_equal(comp, ref)


@pytest.mark.parametrize("name", ["kl_curve", "mse_curve"])
@pytest.mark.parametrize("sizes", [{}, {"levels": 8, "values": 300}, {"levels": 255, "bins": 700}, {"holes": 0.9}, {"tail": 1.0}], ids=str)
def test_curve_equals_its_twin(name, sizes):
    if name == "mse_curve":
        sizes = {"bins": 300, **sizes, "levels": min(sizes.get("levels", 128), 250)}  # its twin takes half a second for 2048 bins
    comp, ref, bound = both(name, *PAIRS[name][2](np.random.default_rng(1), **sizes))
    assert np.isfinite(ref).any() and close(comp, ref, bound)
    assert np.ptp(ref[np.isfinite(ref)]) > 1e6 * bound.max()  # the bound tells candidates apart


@compiles
@given(counts_and_levels())
def test_any_kl_curve_equals_its_twin(drawn):
    counts, levels = drawn
    assert close(*both("kl_curve", counts, levels, np.full(counts.size + 1 - levels, np.nan)))


@compiles
@given(counts_and_levels())
def test_any_mse_curve_equals_its_twin(drawn):
    counts, levels = drawn
    assert close(*both("mse_curve", counts, levels, np.full(counts.size + 1 - levels, np.nan)))


def chosen(curve: np.ndarray) -> int:
    return int(np.flatnonzero(curve <= curve.min() + TIE)[0])


def test_kernel_and_twin_choose_the_same_threshold_of_thousands():
    rng = np.random.default_rng(2)
    ties = 0
    for case in range(2000):
        levels = int(rng.integers(2, 12))
        bins = int(rng.integers(levels + 1, 50))
        shape = [rng.integers(0, 3, bins), rng.integers(0, 1000, bins), rng.poisson(10_000 * np.exp(-np.arange(bins) / 7))][case % 3]
        counts = shape * (rng.random(bins) < rng.choice([0.2, 0.7, 1.0]))
        counts[rng.integers(bins)] += 1
        found = kl_threshold(counts, 1.0, levels, zero_bin="keep")
        ref = np.empty_like(found.curve)
        PAIRS["kl_curve"][1](counts, levels, ref)
        ties += np.count_nonzero(ref <= ref.min() + TIE) > 1
        assert found.threshold == levels + chosen(ref) + 0.5, (counts, levels)
    assert ties > 100  # the rule for ties was put to work


def test_full_size_searches_choose_the_same_threshold():
    for seed, tail in enumerate([1.5, 3.0, 8.0]):
        counts, levels, ref = PAIRS["kl_curve"][2](np.random.default_rng(seed), tail=tail)
        PAIRS["kl_curve"][1](counts, levels, ref)
        assert kl_threshold(counts, 1.0, zero_bin="keep").threshold == levels + chosen(ref) + 0.5


# ------------------------------------------------------------------------------------------------------- streaming


@settings(compiles, max_examples=300)
@given(VALUES, st.lists(st.integers(0, 40), max_size=4), st.randoms(), BINS, TOPS)
def test_streaming_in_any_order_equals_one_shot(x, cuts, random, bins, top):
    ref = add(empty(bins, top), x)
    order = list(range(x.size))
    random.shuffle(order)
    comp = empty(bins, top)
    for part in np.split(x[order], sorted(c for c in cuts if c <= x.size)):
        comp = add(comp, part)
    assert same(comp, ref)
    assert ref.counts.sum() == x.size and ref.zeros == np.count_nonzero(x == 0)


@compiles
@given(VALUES, VALUES, VALUES, BINS, TOPS)
def test_merging_is_associative_and_commutative_and_equals_one_shot(x, y, z, bins, top):
    a, b, c = (add(empty(bins, top), v) for v in (x, y, z))
    ref = add(empty(bins, top), np.concatenate([x, y, z]))
    assert same(merge(merge(a, b), c), ref)
    assert same(merge(a, merge(b, c)), ref)
    assert same(merge(c, merge(b, a)), ref)
    assert same(merge(a, empty(bins, top)), a)


@compiles
@given(VALUES, BINS, TOPS)
def test_every_value_lies_in_its_bin_and_the_range_is_no_wider_than_need_be(x, bins, top):
    h = add(empty(bins, top), x)
    largest = float(np.abs(x).max(initial=0))
    if largest == 0:
        assert h.width == 0 and h.counts[0] == x.size
        return
    assert math.frexp(h.width * bins / top)[0] == pytest.approx(0.5, rel=1e-15)  # top times a power of two
    assert largest < h.width * bins * (1 + 2**-50) and largest * 2 >= h.width * bins * (1 - 2**-50)
    if top == 1.0 and bins in (1, 2, 8, 64):  # edges that float64 holds exactly
        ref, _ = np.histogram(np.abs(x.astype(np.float64)), np.arange(bins + 1) * h.width)
        np.testing.assert_array_equal(h.counts, ref)


def test_the_counts_are_numpys():
    x = np.random.default_rng(3).standard_t(3, (50, 999)).astype(np.float32)
    h = add(empty(), x)
    ref, _ = np.histogram(np.abs(x).astype(np.float64), 2048, (0, h.width * 2048))
    np.testing.assert_array_equal(h.counts, ref)


def test_a_range_that_ends_at_the_maximum():
    x = np.random.default_rng(4).standard_normal(10_000).astype(np.float32)
    largest = np.abs(x).max()
    h = add(empty(top=np.nextafter(largest, np.float32(np.inf))), x)
    assert h.counts[-1] == 1 and h.width * 2048 == np.nextafter(largest, np.float32(np.inf))


def test_no_rounding_puts_a_value_beyond_the_last_bin():
    rounded_up = 0
    for value in np.random.default_rng(13).random(300).astype(np.float32):
        top = math.nextafter(float(value), math.inf)  # so close above that the quotient may round to 1
        h = add(empty(8, top), value.reshape(1))
        assert float(value) * (1 / h.width) < 8 and h.counts.sum() == 1
        assert h.width in (top / 8, top / 4)
        rounded_up += h.width == top / 4
    assert 0 < rounded_up < 300


@pytest.mark.parametrize("extreme", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal])
def test_extremes_of_float32_are_counted(extreme):
    h = add(empty(), np.array([extreme, -extreme, 0], np.float32))
    assert h.counts[1024:].sum() == 2 and h.zeros == h.counts[0] == 1  # in the upper half of the range
    h = add(h, np.array([1.0], np.float32))
    assert h.counts.sum() == 4 and h.zeros == 1


def test_adding_leaves_the_histogram_it_started_from_alone():
    first = add(empty(8), np.array([1, 2, 3], np.float32))
    before = first.counts.copy()
    for later in (add(first, np.array([0.5], np.float32)), add(first, np.array([100], np.float32)), merge(first, first)):
        assert later.counts is not first.counts
    np.testing.assert_array_equal(first.counts, before)


def test_what_a_histogram_refuses():
    h = add(empty(), np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match=r"x is float16, but the histogram counts float32: pass x\.astype"):
        add(h, np.ones(3, np.float16))
    with pytest.raises(ValueError, match=r"x of shape \(3, 2\) and strides \(4, 12\) is not C-contiguous; pass np\.ascontiguousarray"):
        add(h, np.ones((2, 3), np.float32).T)
    x = np.ones((2, 3), np.float32)
    x[1] = [2, -np.inf, np.nan]
    with pytest.raises(
        ValueError, match=r"2 of the 6 values of x are NaN or infinite, the first is x\[1, 1\] = -inf; find what overflowed"
    ):
        add(h, x)
    for infinite in (np.inf, -np.inf):
        with pytest.raises(ValueError, match=rf"1 of the 2 values .* x\[1\] = {infinite}"):
            add(h, np.array([0, infinite], np.float32))
    with pytest.raises(ValueError, match=r"1 of the 1 values .* x\[\] = nan"):
        add(h, np.array(np.nan, np.float32))
    with pytest.raises(ValueError, match="bins=0 must be at least 1"):
        empty(0)
    for top in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"top={top} must be positive and finite"):
            empty(top=top)
    with pytest.raises(ValueError, match=r"a has 2048 bins and top=1\.0, b has 1024 bins and top=1\.0: only histograms that started"):
        merge(h, empty(1024))
    with pytest.raises(ValueError, match="top=3"):
        merge(h, empty(top=3))
    assert h.counts.sum() == 6


# ------------------------------------------------------------------------------------------------------ KL by hand


def test_kl_by_hand_where_something_is_clipped():
    # i = 2: P = [4, 2 + 4] / 10, Q = [4, 2] / 6, one bin per level. i = 3: P = [4, 2, 4] / 10, the levels hold bins {0, 1} and {2}
    # (floor(j 2 / 3)): Q = [3, 3, 1] / 7. i = 4: nothing is clipped, {0, 1} and {2, 3}: Q = [3, 3, 2, 2] / 10.
    found = kl_threshold(np.array([4, 2, 1, 3]), 2.0, levels=2, zero_bin="keep")
    expected = [
        0.4 * math.log(0.4 / (4 / 6)) + 0.6 * math.log(0.6 / (2 / 6)),
        0.4 * math.log(0.4 / (3 / 7)) + 0.2 * math.log(0.2 / (3 / 7)) + 0.4 * math.log(0.4 / (1 / 7)),
        0.4 * math.log(4 / 3) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 2) + 0.3 * math.log(3 / 2),
    ]
    np.testing.assert_allclose(found.curve, expected, rtol=1e-14)
    assert found.candidates.tolist() == [5.0, 7.0, 9.0] and found.threshold == 9.0


def test_all_mass_in_one_bin():
    for j, i in ((0, 128), (100, 128), (127, 128), (128, 129), (1500, 1501), (2047, 2048)):
        counts = np.zeros(2048, np.int64)
        counts[j] = 7
        found = kl_threshold(counts, 0.5)
        assert found.threshold == (i + 0.5) * 0.5  # the smallest candidate that clips nothing
        assert np.isinf(found.curve[: i - 128]).all() and (found.curve[i - 128 :] == 0).all()


def test_data_that_stay_away_from_zero_are_not_cut_at_their_smallest_value():
    # P and Q are the same single bin at the first filled one, whatever lies above: the formula gives 0 there
    counts = np.zeros(2048, np.int64)
    counts[1000:1400] = 50
    found = kl_threshold(counts, 1.0)
    assert np.isinf(found.curve[1001 - 128]) and found.threshold == 1400.5


def test_zeros_alone_give_the_threshold_zero():
    h = add(empty(), np.zeros(10, np.float32))
    assert kl_threshold(h.counts, h.width).threshold == 0
    assert mse_threshold(h.counts, h.width).threshold == 0
    assert percentile_threshold(h.counts, h.width, 99) == 0


def test_ties_go_to_the_smallest_threshold():
    counts = np.tile([5, 0, 0, 0], 8)  # one filled bin per level at most, for every candidate
    found = kl_threshold(counts, 1.0, levels=16, zero_bin="keep")
    tied = np.flatnonzero(found.curve <= TIE)
    assert tied.size > 1 and found.threshold == found.candidates[tied[0]] == 29.5  # bin 28 is the last that is filled


@pytest.mark.parametrize("levels", [2, 8, 100, 128, 256])
def test_levels_of_other_widths(levels):
    """2 to 9 bits, signed or unsigned, and a number that is no power of two."""
    counts, _, _ = PAIRS["kl_curve"][2](np.random.default_rng(5), bins=600)
    comp, ref, bound = both("kl_curve", counts, levels, np.full(counts.size + 1 - levels, np.nan))
    assert close(comp, ref, bound)


def test_a_spike_of_zeros_does_not_clip_the_rest():
    rng = np.random.default_rng(6)
    x = np.maximum(rng.standard_normal(1 << 17), 0).astype(np.float32)
    h = add(empty(), x)

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.mean((np.clip(np.rint(x / step), -127, 127) * step - x) ** 2))

    best = error(mse_threshold(h.counts, h.width).threshold)
    assert error(kl_threshold(h.counts, h.width).threshold) < 2 * best
    assert error(kl_threshold(h.counts, h.width, zero_bin="keep").threshold) > 20 * best
    changed = np.concatenate([h.counts[1:2], h.counts[1:]])  # what "like_next" means, and the caller's counts stay
    ref = kl_threshold(changed, h.width, zero_bin="keep")
    np.testing.assert_array_equal(kl_threshold(h.counts, h.width).curve, ref.curve)
    assert h.counts[0] > x.size / 2


def test_what_the_searches_refuse():
    counts = np.ones(2048, np.int64)
    for search in (kl_threshold, mse_threshold):
        with pytest.raises(ValueError, match=r"128 bins leave levels=128 at most one candidate.*onnxruntime#9597.*at least 2048 bins"):
            search(counts[:128], 1.0)
        with pytest.raises(ValueError, match="levels=1 must be at least 2"):
            search(counts, 1.0, levels=1)
        with pytest.raises(ValueError, match="counts is all zero: no value was seen"):
            search(counts * 0, 1.0)
        with pytest.raises(ValueError, match=r"counts\[3\] = -1 is negative"):
            search(np.where(np.arange(2048) == 3, -1, 1), 1.0)
        with pytest.raises(ValueError, match=r"counts of shape \(2048,\) and dtype float64 must be one row of integers"):
            search(counts / 2, 1.0)
        for width in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"width={width} must be a finite number"):
                search(counts, width)
    with pytest.raises(ValueError, match="zero_bin='drop' is neither 'like_next' nor 'keep'"):
        kl_threshold(counts, 1.0, zero_bin="drop")
    for percentile in (-1, 100.5, math.nan):
        with pytest.raises(ValueError, match=f"percentile={percentile} is outside of 0 .. 100"):
            percentile_threshold(counts, 1.0, percentile)
    with pytest.raises(ValueError, match="counts is all zero"):
        percentile_threshold(counts * 0, 1.0, 50)


# -------------------------------------------------------------------------------------------- other people's rules


def by_the_rules(counts, levels, *, outliers_in_q=False, spread_over_zeros=False):
    """The divergences of all candidates under the right rules or a wrong one."""
    entropy = pytest.importorskip("scipy.stats").entropy
    curve = []
    for i in range(levels, counts.size + 1):
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        source = p if outliers_in_q else counts[:i].astype(float)
        level = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        q = np.zeros(i)
        for k in range(levels):
            into = (level == k) & ((source > 0) | spread_over_zeros)
            if into.any():
                q[into] = source[level == k].sum() / into.sum()
        curve.append(entropy(p, q) if q.any() else np.inf)
    return np.array(curve)


def test_curve_is_scipys_entropy_of_the_rules_and_wrong_rules_choose_otherwise():
    rng = np.random.default_rng(7)
    counts = np.bincount((np.abs(rng.standard_t(3, 3000)) * 20).astype(int).clip(max=255), minlength=256)
    assert (counts[:200] == 0).any()  # holes in the tail
    found = kl_threshold(counts, 1.0, levels=16, zero_bin="keep")
    np.testing.assert_allclose(found.curve, by_the_rules(counts, 16), rtol=1e-10, atol=1e-13)
    right = int(np.argmin(found.curve))
    for wrong in ({"outliers_in_q": True}, {"spread_over_zeros": True}):
        assert abs(int(np.argmin(by_the_rules(counts, 16, **wrong))) - right) > 10, wrong


def onnxruntime_calibrate(monkeypatch):
    """ONNX Runtime's calibration module, which prints, and the list that its divergences go to."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    divergences = []
    entropy = calibrate.entropy

    def recorded(p, q):
        divergences.append(float(entropy(p, q)))
        return divergences[-1]

    monkeypatch.setattr(calibrate, "entropy", recorded)
    return calibrate, divergences


def test_onnxruntime_agrees_where_the_definitions_meet(monkeypatch):
    """Its last candidate, nothing clipped, of a mirrored histogram without holes.

    It counts signed values, 2 B bins for our B. Its candidate i takes 2 i + 1 of them, the middle one at zero, so its
    levels do not lie as ours do, except the last: all 2 B bins, `num_quantized_bins` / 2 levels a side. It also
    truncates Q to integers (so the counts here divide), leaves the bins beyond num_quantized_bins * (bins //
    num_quantized_bins) out of Q (so B is a multiple), smooths zeros with 1e-4 (so there are none) and works in float32.
    """
    calibrate, divergences = onnxruntime_calibrate(monkeypatch)
    rng = np.random.default_rng(8)
    half = 4 * np.sort(rng.integers(1, 900, 128))[::-1]
    levels = 32  # of four bins each, whose counts are multiples of four
    signed = np.concatenate([half[::-1], half])
    edges = np.linspace(-1, 1, signed.size + 1).astype(np.float32)
    collector = calibrate.HistogramCollector("entropy", True, signed.size, 2 * levels, 99.9, "same")
    collector.get_entropy_threshold((signed, edges, edges[0], edges[-1], edges[-1]), 2 * levels)
    found = kl_threshold(half, 1 / 128, levels, zero_bin="keep")
    assert found.curve[-1] > 1e-4
    assert divergences[-1] == pytest.approx(found.curve[-1], rel=1e-3)


def test_onnxruntimes_defaults_search_nothing_and_we_say_so(monkeypatch):
    calibrate, _ = onnxruntime_calibrate(monkeypatch)
    x = np.random.default_rng(9).standard_t(3, 20_000).astype(np.float32)
    collector = calibrate.HistogramCollector("entropy", True, 128, 128, 99.9, "same")  # as EntropyCalibrater starts it
    collector.collect({"x": x})
    low, high = collector.compute_entropy()["x"][:2]
    assert max(-low, high) == pytest.approx(np.abs(x).max(), rel=0.05)  # the maximum, on a heavy tail
    h = add(empty(bins=64), x)  # 64 bins a side, 64 levels a side
    with pytest.raises(ValueError, match="nothing would be searched"):
        kl_threshold(h.counts, h.width, levels=64)
    fine = add(empty(), x)
    assert kl_threshold(fine.counts, fine.width).threshold < 0.8 * np.abs(x).max()


def test_onnxruntimes_percentile_is_one_bin_less(monkeypatch):
    calibrate, _ = onnxruntime_calibrate(monkeypatch)
    n = 30_011  # of which 99.9 % is no whole number: theirs, a sum of float shares, may miss one that is
    x = np.random.default_rng(10).laplace(size=n).astype(np.float32)
    x[0] = 0  # it counts |x| from the minimum on
    largest = np.abs(x).max()
    h = add(empty(top=np.nextafter(largest, np.float32(np.inf))), x)
    for percentile in (50.0, 99.0, 99.9, 99.99):
        collector = calibrate.HistogramCollector("percentile", True, 2048, 128, percentile, "same")
        collector.collect({"x": x})
        _, high = collector.compute_percentile()["x"][:2]
        assert np.abs(collector.histogram_dict["x"][0] - h.counts).sum() <= 4  # its edges are rounded otherwise
        assert percentile_threshold(h.counts, h.width, percentile) - h.width == pytest.approx(high, rel=1e-6)


# ------------------------------------------------------------------------------------ percentile and squared error


@compiles
@given(counts_and_levels(), st.sampled_from([0, 0.1, 50, 99.9, 99.99, 100]) | st.floats(0, 100))
def test_percentile_keeps_at_least_what_was_asked_and_no_bin_more(drawn, percentile):
    counts, _ = drawn
    edge = int(percentile_threshold(counts, 1.0, percentile))
    total = int(counts.sum())
    assert int(counts[:edge].sum()) >= percentile / 100 * total * (1 - 1e-15)
    assert counts[edge - 1] > 0 and int(counts[: edge - 1].sum()) <= percentile / 100 * total * (1 + 1e-15)


def test_percentile_is_numpys_within_a_bin():
    x = np.abs(np.random.default_rng(11).standard_normal(50_000)).astype(np.float32)
    h = add(empty(), x)
    for percentile in (10, 50, 99, 99.9):
        exact = np.sort(x)[50 * round(percentile * 10) - 1]  # so many per mille of 50,000 are at most this
        assert 0 < percentile_threshold(h.counts, h.width, percentile) - exact <= h.width
    assert 0 < percentile_threshold(h.counts, h.width, 100) - x.max() <= h.width


def test_percentages_are_read_as_decimals():
    """99.9 in binary is a little more than 99.9: taken so, it would ask for one value more of a thousand."""
    assert percentile_threshold(np.array([999, 1]), 1.0, 99.9) == 1.0
    assert percentile_threshold(np.array([9993, 7]), 1.0, 99.93) == 1.0
    assert percentile_threshold(np.array([999, 1]), 1.0, 99.91) == 2.0
    assert percentile_threshold(np.array([10**15, 1]), 1.0, 100) == 2.0


@pytest.mark.parametrize("levels", [8, 128])
def test_squared_error_is_that_of_rounding_the_values(levels):
    x = np.random.default_rng(12).laplace(size=200_000).astype(np.float32)
    h = add(empty(), x)
    found = mse_threshold(h.counts, h.width, levels)
    x = x.astype(np.float64)

    def error(threshold: float) -> float:
        step = threshold / (levels - 1)
        return float(np.mean((np.clip(np.rint(x / step), 1 - levels, levels - 1) * step - x) ** 2))

    some = slice(0, None, 97)
    measured = [error(t) for t in found.candidates[some]]
    np.testing.assert_allclose(found.curve[some], measured, rtol=0.01)
    assert error(found.threshold) <= min(measured) * 1.01
