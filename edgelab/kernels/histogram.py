"""Streaming histograms of |x|, and the clipping thresholds that they give: least KL divergence, least squared error, percentile.

**The histogram.** Bin j holds the values with floor(|x| / width) = j, and width = top / bins * 2**k with the smallest k (of
either sign) for which the largest value has a bin. `top` fixes the series of ranges, k follows from the data alone, so the
histogram is a function of the values seen and of nothing else: not of their order, nor of how they were cut into batches.
This is exact and not approximate: when the range doubles, 2j and 2j + 1 merge into j, and since scaling by two rounds
nothing, floor(fl(x / 2w)) = floor(floor(fl(x / w)) / 2). No value is read twice and none is lost.
The price: with top = 1 the range is a power of two and the data fill between half and all of the bins. The KL threshold
depends on the width of the bins, so to compare with a tool whose range ends at the maximum, start from
`empty(top=np.nextafter(maximum, np.inf))`: bins are open above, and the maximum itself needs one.

NaN and infinity are refused before anything is counted: an activation that overflowed is a fault to find, and a
histogram that silently lacks it would hide it. Zeros lie in bin 0 as they should and are counted apart as well.

**The KL threshold** is TensorRT's entropy calibration (Szymon Migacz, "8-bit inference with TensorRT", GTC 2017, S7310,
the slides "Entropy calibration, pseudocode"): see `kl_threshold`. Written out, a candidate costs a pass over all its bins.
Here it costs one addition per level. With c the counts, N their sum, M that of the i bins kept, O = N - M the outliers,
p = c[i - 1] + O the last bin's share, and S_l the count, n_l the number of nonzero bins of level l:

    N KL = sum_{j < i - 1} c_j ln c_j + p ln p - N ln(N / M) - sum_l S_l ln(S_l / n_l) - O ln(S_last / n_last)

The first sum, S and n are differences of prefix sums. A level of candidate i is i // levels bins wide or one wider, so
`levels` candidates in a row share the terms of the last sum: each is computed once (19 thousand logarithms in place of
246 thousand for 2048 bins and 128 levels).

**The squared error** of rounding to multiples of a step s, codes 0 .. K, has a closed form too. With b_k = (k - 1/2) s,
the value where code k begins, summation by parts turns sum (x - s code(x))**2 into

    sum x**2 - 2 s sum_{k=1..K} sum_x max(x - b_k, 0)

and the inner sum, for values spread evenly inside each bin, is read from two prefix sums and the bin that b_k cuts.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from edgelab.kernels._jit import exact

# Candidates whose divergences differ by less (nats) are tied, and the smallest threshold wins. Equal divergences are
# common (0 wherever no level holds two different nonzero counts and nothing is clipped), so an argmin that trusts the last bit would
# depend on the order of a sum. The rounding error is below (bins + levels + 40) * 2**-53 * (ln N + 1) (kernels/reference.py derives
# it): 1e-11 for 2048 bins and 1e18 values. The best two candidates of a million normal, Laplace or Student t values were 4e-7 to
# 2e-5 apart.
TIE = 1e-9
LANES = 4  # counters per bin: an increment waits for the last one to the same address, and zero-heavy data hits one bin
ROW = 64  # values that `_scan` takes at once: four vectors of 16


class Histogram(NamedTuple):
    """Counts of |x|: `counts[j]` values lie in [j * width, (j + 1) * width). A value: `add` and `merge` return new ones.

    counts: int64 [bins]; width: of a bin, 0.0 as long as only zeros were seen; zeros: exact zeros, which `counts[0]`
    includes; top: the range is top * 2**k.
    """

    counts: np.ndarray
    width: float
    zeros: int
    top: float


class Search(NamedTuple):
    """A threshold and how it was found: `curve[m]` is the loss, in nats or x**2, of clipping at `candidates[m]`."""

    threshold: float
    candidates: np.ndarray
    curve: np.ndarray


# ---------------------------------------------------------------------------------------------------- the histogram


def empty(bins: int = 2048, top: float = 1.0) -> Histogram:
    """A histogram of no values yet, whose range will be top * 2**k for some integer k.

    Raises ValueError when bins < 1 or top is not a positive finite number.
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1; 2048 is usual")
    if not 0 < top < math.inf:
        raise ValueError(f"top={top} must be positive and finite; 1.0 gives ranges that are powers of two")
    return Histogram(np.zeros(bins, np.int64), 0.0, 0, float(top))


def add(histogram: Histogram, x: np.ndarray) -> Histogram:
    """`histogram` with the values of x (float32, C-contiguous, any shape) counted in.

    Raises TypeError for another dtype, ValueError for another memory order and for NaN or infinity.

    >>> h = add(empty(bins=4), np.array([0.0, -1.0, 3.5], np.float32))
    >>> h.counts, h.width, h.zeros
    (array([1, 1, 0, 1]), 1.0, 1)
    >>> h = add(h, np.array([6.0], np.float32))  # beyond the range of 4, so pairs of bins merge
    >>> h.counts, h.width
    (array([2, 1, 0, 1]), 2.0)
    """
    if x.dtype != np.float32:
        raise TypeError(f"x is {x.dtype}, but the histogram counts float32: pass x.astype(np.float32), a tensor as x.float().numpy()")
    if not x.flags.c_contiguous:
        raise ValueError(f"x of shape {x.shape} and strides {x.strides} is not C-contiguous; pass np.ascontiguousarray(x)")
    flat = x.reshape(-1)
    largest, zeros = _scan(flat.view(np.uint32))
    if largest >= 0x7F800000:  # infinity's bits; NaN's are larger
        bad = np.flatnonzero(~np.isfinite(flat))
        where = ", ".join(str(i) for i in np.unravel_index(bad[0], x.shape))
        raise ValueError(
            f"{bad.size} of the {flat.size} values of x are NaN or infinite, the first is x[{where}] = {flat[bad[0]]}; "
            "find what overflowed, or pass x[np.isfinite(x)] to leave them out"
        )
    counts, width, before, top = histogram
    wanted = max(width, _width(float(np.uint32(largest).view(np.float32)), counts.size, top))
    counts = _fold(counts, width, wanted)
    if wanted:
        count(flat, wanted, counts)
    else:
        counts[0] += flat.size
    return Histogram(counts, wanted, before + int(zeros), top)


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the values of both: the same as if one histogram had seen them all.

    Raises ValueError unless both have the same number of bins and the same series of ranges.
    """
    if a.counts.size != b.counts.size or a.top != b.top:
        raise ValueError(
            f"a has {a.counts.size} bins and top={a.top}, b has {b.counts.size} bins and top={b.top}: only histograms that started from "
            "the same empty(bins, top) have bins that merge exactly"
        )
    width = max(a.width, b.width)
    counts = _fold(a.counts, a.width, width) + _fold(b.counts, b.width, width)
    return Histogram(counts, width, a.zeros + b.zeros, a.top)


def _width(largest: float, bins: int, top: float) -> float:
    """The least top / bins * 2**k whose last bin holds `largest`, or is above it; 0.0 for 0.0."""
    if largest == 0:
        return 0.0
    width = math.ldexp(top / bins, math.frexp(largest / top)[1])
    if largest * (1 / width) >= bins:  # just under the range, `count`'s product may round up to it: nothing may land there
        width *= 2
    return width


def _fold(counts: np.ndarray, old: float, new: float) -> np.ndarray:
    """A copy of the counts of bins `old` wide, as counts of bins `new` wide: new / old is a power of two, or old is 0."""
    if old in (0.0, new):  # no width yet: all values are zeros and stay in bin 0
        return counts.copy()
    folded = np.zeros_like(counts)
    shift = min(math.frexp(new / old)[1] - 1, 62)
    np.add.at(folded, np.arange(counts.size) >> shift, counts)
    return folded


@exact
def _scan(bits):
    """The largest |x| as its bits, and the number of zeros, of float32 values given as their bits, uint32."""
    # On bits: they order as the magnitudes do, NaN above all, and integer maxima and sums vectorise without any freedom.
    # In rows, because a scalar uint32 becomes int64 in numba's arithmetic and fills twice the vectors (12 against 48 GB/s).
    largest, zeros = np.zeros(ROW, np.uint32), np.zeros(ROW, np.uint32)
    whole = bits.size - bits.size % ROW
    for i in range(0, whole, ROW):
        for lane in range(ROW):
            magnitude = bits[i + lane] & np.uint32(0x7FFFFFFF)
            largest[lane] = max(largest[lane], magnitude)
            zeros[lane] += np.uint32(magnitude == 0)
    for i in range(whole, bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        largest[0] = max(largest[0], magnitude)
        zeros[0] += np.uint32(magnitude == 0)
    return largest.max(), zeros.sum()


@exact
def count(x, width, counts):
    """Add to counts int64 [bins] how many of x float32 [n] lie in each bin; no |x| may lie beyond the last."""
    bins, inverse = counts.size, 1.0 / width  # float64: no range of float32 overflows it, and bin edges are true to 2**-52
    lanes = np.zeros((LANES, bins), np.uint32)  # 32 KiB for 2048 bins: the first-level cache
    whole = x.size - x.size % LANES
    part = 1 << 30  # values until a lane of uint32 must be emptied
    for start in range(0, whole, part):
        for i in range(start, min(start + part, whole), LANES):
            for lane in range(LANES):
                lanes[lane, np.int64(abs(np.float64(x[i + lane])) * inverse)] += np.uint32(1)
        for lane in range(LANES):
            for j in range(bins):
                counts[j] += lanes[lane, j]
                lanes[lane, j] = 0
    for i in range(whole, x.size):
        counts[np.int64(abs(np.float64(x[i])) * inverse)] += 1


# ---------------------------------------------------------------------------------------------------- thresholds


def kl_threshold(counts: np.ndarray, width: float, levels: int = 128, *, zero_bin: str = "like_next") -> Search:
    """The threshold that loses least information, (i + 1/2) * width, and the divergence of every candidate i in nats.

    For i = levels .. bins: P is the first i bins, everything beyond added to its last; Q is the same bins *without* what
    is beyond, merged into `levels` levels (bin j into level floor(j * levels / i)), the count of each level spread evenly over
    its nonzero bins; the loss is KL(P || Q), both normalised. The least wins, the smallest threshold where several are
    within `TIE`.

    counts: int64 [bins], of |x|. levels: 2**(b - 1) for signed b-bit codes, so 128 for int8 and 8 for int4; 2**b for
    unsigned codes. 2048 bins were made for 128 levels: at least 16 bins per level.

    zero_bin: a spike of zeros (ReLU, sparse data, padding) costs nothing to quantize, for zero is a code at any threshold,
    but merged into a level it looks like a great loss and drives the threshold down. "like_next" gives bin 0 the count of
    bin 1, as NVIDIA's own tool does (TensorRT tools/pytorch-quantization, calib/histogram.py, `bins[0] = bins[1]`); it does
    nothing when no other bin is filled. "keep" is the rule of the slides to the letter. For max(z, 0) of 2**20 normal z, int8:
    "keep" clips at 2.0 and makes 131 times the least squared error, "like_next" at 4.65 and 1.3 times.

    Where the slides are silent:
    - the last bin is empty but something is beyond: P is positive where Q is 0, the divergence infinite (NVIDIA's tool
      agrees; MXNet and ONNX Runtime spread Q into that bin as well);
    - all that is kept lies in the last bin and something is beyond: P and Q are the same single bin whatever was clipped, so
      the formula gives 0 and would cut data that stay away from zero at their *smallest* value; infinite here too;
    - i = bins, no clipping, is a candidate (the slides' loop ends one short).

    Raises ValueError for counts that are negative or all zero, for bins <= levels, and for an unknown zero_bin.

    Four levels of two bins. Each but the first has two equal counts, which a level keeps without loss; 3 + 1 become 2 + 2:

    >>> found = kl_threshold(np.array([3, 1, 2, 2, 5, 5, 0, 4]), 0.5, levels=4, zero_bin="keep")
    >>> found.threshold, found.candidates.tolist()
    (4.25, [2.25, 2.75, 3.25, 3.75, 4.25])
    >>> expected = (3 * math.log(3 / 2) + math.log(1 / 2)) / 22
    >>> bool(abs(found.curve[-1] - expected) < 1e-15)
    True
    """
    counts = _checked(counts, width, levels)
    if zero_bin not in ("like_next", "keep"):
        raise ValueError(f"zero_bin={zero_bin!r} is neither 'like_next' nor 'keep'")
    if zero_bin == "like_next" and counts[1:].any():
        counts = np.concatenate([counts[1:2], counts[1:]])
    curve = np.empty(counts.size + 1 - levels)
    kl_curve(counts, levels, curve)
    candidates = (np.arange(levels, counts.size + 1) + 0.5) * width
    best = int(np.argmax(curve <= curve.min() + TIE))
    return Search(float(candidates[best]), candidates, curve)


def mse_threshold(counts: np.ndarray, width: float, levels: int = 128) -> Search:
    """The threshold t of least mean squared error of rounding to codes 0 .. levels - 1 times t / (levels - 1), and all errors.

    The candidates are those of `kl_threshold`. Values count as spread evenly inside their bin: at its centre, as NVIDIA's
    tool takes them, all of a bin would share one rounding error, and a step near the width of a bin would look too good or too bad.

    Raises ValueError for counts that are negative or all zero, and for bins <= levels.
    """
    counts = _checked(counts, width, levels)
    curve = np.empty(counts.size + 1 - levels)
    mse_curve(counts, levels, curve)
    candidates = (np.arange(levels, counts.size + 1) + 0.5) * width
    return Search(float(candidates[np.argmin(curve)]), candidates, curve * width**2)


def percentile_threshold(counts: np.ndarray, width: float, percentile: float) -> float:
    """The least bin edge below which at least `percentile` percent of the values lie; 100 gives the edge above the maximum.

    NVIDIA's tool and ONNX Runtime return the *lower* edge of that bin, one width less, and so clip more than was asked for.

    Raises ValueError for counts that are negative or all zero, and for a percentile outside of 0 .. 100.

    >>> percentile_threshold(np.array([50, 40, 9, 1]), 0.5, 90), percentile_threshold(np.array([50, 40, 9, 1]), 0.5, 99.5)
    (1.0, 2.0)
    """
    counts = _checked(counts, width, 0)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is outside of 0 .. 100; 99.9 clips one value in a thousand")
    below = np.cumsum(counts)
    wanted = math.ceil(Fraction(str(percentile)) * int(below[-1]) / 100)  # exact: in floats, 99.9 % of 1000 could be 999 or 1000
    return float((np.searchsorted(below, max(wanted, 1)) + 1) * width)


def _checked(counts: np.ndarray, width: float, levels: int) -> np.ndarray:
    """`counts` as contiguous int64, its total above zero."""
    counts = np.asarray(counts)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"counts of shape {counts.shape} and dtype {counts.dtype} must be one row of integers, such as Histogram.counts")
    if not 0 <= width < math.inf:
        raise ValueError(f"width={width} must be a finite number, at least 0; take Histogram.width")
    if levels and levels < 2:
        raise ValueError(f"levels={levels} must be at least 2; b-bit signed codes have 2**(b - 1)")
    if counts.size <= levels:
        raise ValueError(
            f"{counts.size} bins leave levels={levels} at most one candidate, the maximum, so nothing would be searched "
            f"(onnxruntime#9597); use at least {16 * levels} bins"
        )
    counts = np.ascontiguousarray(counts, np.int64)
    if counts.min(initial=0) < 0:
        raise ValueError(f"counts[{int(np.argmin(counts))}] = {counts.min()} is negative: this is no histogram")
    if not counts.any():
        raise ValueError("counts is all zero: no value was seen, so there is no threshold; add data, or leave this tensor as it is")
    return counts


@exact
def kl_curve(counts, levels, curve):
    """Fill curve float64 [bins + 1 - levels] with KL(P || Q) in nats for i = levels .. bins; counts int64 [bins], not all 0."""
    bins = counts.size
    below = np.zeros(bins + 1, np.int64)  # [i]: sum of the first i counts
    filled = np.zeros(bins + 1, np.int64)  # [i]: how many of them are not 0
    entropy = np.zeros(bins + 1)  # [i]: sum of c ln c
    log = np.zeros(bins // levels + 2)  # of the number of nonzero bins in a level
    for n in range(2, log.size):
        log[n] = math.log(n)
    for j in range(bins):
        c = counts[j]
        below[j + 1] = below[j] + c
        filled[j + 1] = filled[j] + (c > 0)
        entropy[j + 1] = entropy[j] + (c * math.log(c) if c else 0.0)
    total = below[bins]
    # terms[w & 1, a] = S ln(S / n) of the w bins from a on; NaN: not computed yet. Only widths w and w + 1 are in use at a time.
    terms = np.full((2, bins), np.nan)
    for i in range(levels, bins + 1):
        w, more = i // levels, i % levels
        if more == 0:
            terms[(w + 1) & 1] = np.nan
        if below[i] == 0 or (counts[i - 1] == 0 and below[i] < total) or (filled[i] == 1 and below[i] < total):
            curve[i - levels] = np.inf
            continue
        merged, a, lag, last = 0.0, 0, 0, 0.0
        for _ in range(levels):  # edges at ceil(l * i / levels): a * levels = l * i + lag
            wide = more > lag
            b = a + w + wide
            lag += levels * wide - more
            last = terms[(w + wide) & 1, a]
            if np.isnan(last):
                s = below[b] - below[a]
                last = s * (math.log(s) - log[filled[b] - filled[a]]) if s else 0.0
                terms[(w + wide) & 1, a] = last
            merged += last
            a = b
        kept, outliers = below[i], total - below[i]
        loss = entropy[i] - merged
        if outliers:  # then the last bin, and so the last level, is not empty
            p = counts[i - 1] + outliers
            s = kept - below[((levels - 1) * i + levels - 1) // levels]
            loss += p * math.log(p) - (entropy[i] - entropy[i - 1]) - total * (math.log(total) - math.log(kept)) - outliers * (last / s)
        curve[i - levels] = max(loss / total, 0.0)  # rounding may leave -1e-16


@exact
def mse_curve(counts, levels, curve):
    """Fill curve float64 [bins + 1 - levels] with the mean squared error, widths**2, of the candidates (i + 1/2); counts as above."""
    bins = counts.size
    above = np.zeros(bins + 1)  # [j]: the count from bin j on
    moment = np.zeros(bins + 1)  # [j]: the sum of their values, in bin widths
    square = 0.0
    for j in range(bins - 1, -1, -1):
        above[j] = above[j + 1] + counts[j]
        moment[j] = moment[j + 1] + counts[j] * (j + 0.5)
        square += counts[j] * (j * (j + 1.0) + 1 / 3)  # the mean of x**2 over [j, j + 1)
    codes = levels - 1
    for i in range(levels, bins + 1):
        step, excess = (i + 0.5) / codes, 0.0
        for k in range(1, codes + 1):
            b = (k - 0.5) * step
            j = int(b)
            if j >= bins:
                break
            excess += moment[j + 1] - b * above[j + 1] + 0.5 * counts[j] * (j + 1 - b) ** 2
        curve[i - levels] = (square - 2 * step * excess) / above[0]
