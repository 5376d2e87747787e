"""Ranges: where to cut the values that int8 codes shall stand for. By maximum, percentile, squared error, KL divergence.

A symmetric code of b bits says s * q with |q| <= top = 2**(b - 1) - 1, so a range [-t, t] fixes the step, s = t / top. A
wide range clips nothing and rounds coarsely, a narrow one rounds finely and clips. Four rules weigh one against the other:

    max         t = max|x|: nothing is clipped, one outlier sets the step for all
    percentile  the least t that p percent of the |x| stay below (99.99)
    mse         the t of least sum (x - s q(x))**2: a clipped value counts with the square of what it loses
    kl          the t whose codes keep most of the *distribution* of |x|: least KL(P || Q), TensorRT's entropy calibration
                (Migacz, "8-bit inference with TensorRT", GTC 2017; `kernels/histogram.py` has all three searches)

What KL does not know: it looks at how *often* values come and not at how large they are. One value in a hundred thousand
that is fifty times as large as the rest adds almost nothing to KL(P || Q) wherever it is moved to, while the layer's output
may consist of little else: the products of gated layers, which are near zero unless a neuron fires, and the "massive
activations" of a language model's first token and delimiters (arXiv 2402.17762, section 2). The squared error sees them, but in
the input only, not what they do behind the weights. So no rule is right for all tensors, and `edgelab/ranges.py` measures which one is.

All rules but "max" read a histogram, which streams and merges; "max" takes the exact maximum where the caller has it.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgelab.kernels.histogram import Histogram, Search, add, empty, kl_threshold, mse_threshold, percentile_threshold
from edgelab.scheme import PerGroup, PerTensor, QuantScheme

RULES = ("max", "percentile", "mse", "kl")
PERCENTILE = 99.99


class Range(NamedTuple):
    """A threshold: values beyond it are clipped. `clipped`: the share of values in bins wholly beyond it, 0 .. 1."""

    threshold: float
    rule: str
    bits: int
    clipped: float

    @property
    def scale(self) -> float:
        """The step of the codes: threshold / top."""
        return self.threshold / (2 ** (self.bits - 1) - 1)


def threshold(
    histogram: Histogram,
    rule: str,
    *,
    bits: int = 8,
    percentile: float = PERCENTILE,
    maximum: float | None = None,
    zero_bin: str = "like_next",
) -> Range:
    """The `Range` of the values that `histogram` counted, by `rule`: "max", "percentile", "mse" or "kl".

    `maximum`: the largest |x|, where it is known better than by the upper edge of its bin. No threshold is above it: the
    codes beyond would stand for nothing. `percentile` and `zero_bin` are for the rules that take them (`zero_bin`: see
    `kernels.histogram.kl_threshold`). Raises ValueError for an unknown rule, for bits outside 2 .. 8, for a `maximum` that
    the histogram contradicts, and for a histogram that is empty or has too few bins for the levels of `bits`.

    Eight values around 1 and one at 4, in eight bins of 1/2, 3 bits:

    >>> h = add(empty(8, top=4.5), np.array([0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.2, 1.3, 4.0], np.float32))
    >>> h.counts.tolist(), h.width
    ([0, 5, 3, 0, 0, 0, 0, 1], 0.5625)
    >>> threshold(h, "max", bits=3, maximum=4.0)
    Range(threshold=4.0, rule='max', bits=3, clipped=0.0)
    >>> threshold(h, "percentile", bits=3, percentile=80)
    Range(threshold=1.6875, rule='percentile', bits=3, clipped=0.1111111111111111)
    """
    _check_bits(bits)
    counts, width = histogram.counts, histogram.width
    total = int(counts.sum())
    if not total:
        raise ValueError("the histogram is empty: no value was seen; calibrate with text that reaches this tensor")
    last = int(np.flatnonzero(counts)[-1])
    if maximum is not None and not last * width * (1 - 1e-6) <= maximum <= (last + 1) * width * (1 + 1e-6):
        raise ValueError(
            f"maximum={maximum} is not in the histogram's last filled bin, {last * width:.6g} .. {(last + 1) * width:.6g}: "
            "it belongs to other values"
        )
    most = (last + 1) * width if maximum is None else float(maximum)
    match rule:
        case "max":
            t = most
        case "percentile":
            t = percentile_threshold(counts, width, percentile)
        case "mse" | "kl":
            t = search(histogram, rule, bits=bits, zero_bin=zero_bin).threshold
        case _:
            raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(RULES)}")
    t = min(t, most)
    return Range(t, rule, bits, clipped_share(histogram, t))


def search(histogram: Histogram, rule: str, *, bits: int = 8, zero_bin: str = "like_next") -> Search:
    """All candidates of "mse" or "kl" and their losses, for whoever wants to see the curve and not only its minimum."""
    _check_bits(bits)
    levels = 2 ** (bits - 1)  # codes of one sign, zero included
    if rule == "kl":
        return kl_threshold(histogram.counts, histogram.width, levels, zero_bin=zero_bin)
    if rule == "mse":
        return mse_threshold(histogram.counts, histogram.width, levels)
    raise ValueError(f"rule={rule!r} has no curve; use 'kl' or 'mse'")


def clipped_share(histogram: Histogram, t: float) -> float:
    """The share of values in bins that lie wholly beyond `t`, 0 .. 1 (a bin that `t` cuts counts as kept)."""
    if not histogram.width:
        return 0.0
    first = int(np.ceil(t / histogram.width - 1e-9))
    return float(histogram.counts[first:].sum() / max(int(histogram.counts.sum()), 1))


# ------------------------------------------------------------------------------------------------------------- weights


def weight_ranges(weight: Tensor, scheme: QuantScheme, rule: str, *, percentile: float = PERCENTILE, bins: int = 2048) -> Tensor:
    """Thresholds of a weight [out, in] or [experts, out, in], one per scale of `scheme`: float32, of the scales' shape.

    A weight is known whole, so "max" is exact here and "percentile" too (the least |w| with p percent at or below). "mse" and "kl"
    go through a histogram of `bins` bins. Raises ValueError for "kl" and "mse" with fewer values to a scale than bins: a
    histogram in which most bins are empty says nothing about a distribution, and `round_to_nearest(..., mse_grid=n)`
    searches the least squared error of a few weights exactly. Also for NaN and infinity, and for shapes that do not fit.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(RULES)}")
    if weight.ndim not in (2, 3) or not weight.numel():
        raise ValueError(f"weight is {tuple(weight.shape)}; it must be [out, in] or [experts, out, in], not empty")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is outside of 0 .. 100; 99.9 clips one value in a thousand")
    shape = scheme.scales_shape(tuple(weight.shape))
    rows = _per_scale(weight, scheme).float().abs()  # [scales, values]
    if not torch.isfinite(rows).all():
        raise ValueError("weight holds NaN or infinite values; repair the checkpoint first")
    n = rows.shape[1]
    match rule:
        case "max":
            found = rows.amax(1)
        case "percentile":
            found = rows.kthvalue(max(1, math.ceil(Fraction(str(percentile)) * n / 100)), dim=1).values
        case _:
            if n < bins:
                raise ValueError(
                    f"rule={rule!r} with {scheme}: {n} weights share a scale, too few for a histogram of {bins} bins; use "
                    "rule='percentile', a scheme per tensor, or round_to_nearest(..., mse_grid=32)"
                )
            found = torch.tensor([_searched(row, rule, scheme.bits, bins) for row in rows], device=weight.device)
    return found.reshape(shape).float()


def clip_weight(weight: Tensor, scheme: QuantScheme, thresholds: Tensor) -> Tensor:
    """`weight` with every value cut to the threshold of its scale, so that rounding to nearest finds its steps from it."""
    cut = thresholds.reshape(-1, 1).to(weight.device, weight.dtype)
    return _per_scale(weight, scheme).clamp(-cut, cut).reshape(weight.shape)


def _per_scale(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """`weight` as [scales, values that share one]."""
    if isinstance(scheme.granularity, PerTensor):
        return weight.reshape(-1, weight.shape[-1] * weight.shape[-2])
    return weight.reshape(-1, scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else weight.shape[-1])


def _searched(row: Tensor, rule: str, bits: int, bins: int) -> float:
    values = np.ascontiguousarray(row.cpu().numpy())
    most = float(values.max())
    if most == 0:
        return 0.0
    histogram = add(empty(bins, top=float(np.nextafter(np.float32(most), np.float32(np.inf)))), values)
    return threshold(histogram, rule, bits=bits, maximum=most).threshold


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be 2 .. 8")


# ---------------------------------------------------------------------------------------------------- by hand, in steps


class Step(NamedTuple):
    """One candidate of TensorRT's loop, every array that it makes. `p` and `q` are not normalised yet."""

    kept: int  # bins below the threshold
    outliers: int
    p: np.ndarray  # float64 [kept]: the kept bins, the outliers added to the last
    levels: np.ndarray  # int64 [kept]: the level that each bin is merged into
    q: np.ndarray  # float64 [kept]: the levels' counts, spread over their nonzero bins, without outliers
    divergence: float  # KL(P || Q) in nats


def kl_by_hand(counts: Sequence[int], levels: int) -> list[Step]:
    """The loop of the slides, written out: what `kernels.histogram.kl_curve` computes in closed form, as arrays to look at.

    Slow, and `zero_bin="keep"`: bin 0 is taken as it is.

    >>> step = kl_by_hand([4, 2, 1, 3], levels=2)[1]
    >>> step.kept, step.outliers, step.p.tolist(), step.levels.tolist(), step.q.tolist()
    (3, 3, [4.0, 2.0, 4.0], [0, 0, 1], [3.0, 3.0, 1.0])
    """
    counts = np.asarray(counts, np.int64)
    if counts.ndim != 1 or counts.size <= levels or levels < 2 or not counts.any():
        raise ValueError(f"counts of shape {counts.shape} with levels={levels}: give one row of more bins than levels, not all zero")
    steps = []
    for i in range(levels, counts.size + 1):
        outliers = int(counts[i:].sum())
        p = counts[:i].astype(float)
        p[-1] += outliers
        level = np.arange(i) * levels // i
        q = np.zeros(i)
        for k in range(levels):
            into = (level == k) & (counts[:i] > 0)
            if into.any():
                q[into] = counts[:i][level == k].sum() / into.sum()
        steps.append(Step(i, outliers, p, level, q, _divergence(p, q, outliers)))
    return steps


def _divergence(p: np.ndarray, q: np.ndarray, outliers: int) -> float:
    filled = p > 0
    if (q[filled] == 0).any() or (outliers and np.count_nonzero(q) == 1):  # the cases that `kl_threshold` documents
        return float("inf")
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float(np.sum(p * np.log(p / q)))
