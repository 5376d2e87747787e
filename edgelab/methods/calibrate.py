r"""What a weight was multiplied by, as sums that can be merged: one pass over a calibration set serves every method.

For a weight W [out, in] and its inputs x_t, t = 1 .. n, `InputStats` holds

    count = n      absmax_j = max_t |x_tj|      sum_abs_j = sum_t |x_tj|      sum_sq_j = sum_t x_tj**2
    xx = sum_t x_t x_t^T  [in, in]              a histogram of all |x_tj|

and for a stack of experts the same per expert, over the tokens that the router sent to it, with the sum of its gate
weights. Everything is a sum or a maximum: the statistics of two sets of tokens, merged, are those of both. The xx is
not divided by n and not doubled; GPTQ's Hessian is 2 xx (Frantar et al. 2022, arXiv 2210.17323, section 3.1).

**Precision.** A batch's x^T x is one float32 matrix product (inputs are upcast first); the products
of batches are added in float64 and rounded to float32 once, at the end. A float32 sum of K products drifts by up to
K * 2**-24 of itself, and the small eigenvalues, which GPTQ inverts, are what drowns; in float64 the sum adds nothing to
the error of the products, however long the calibration set. The price is memory: 8 bytes per entry while a block is
being calibrated instead of 4 (a compensated float32 sum would take as much), and 12 for one weight at a time at the end.

**Rare experts.** With 128 experts and 8 of them per token, 65,536 tokens leave the average expert 4,096 and a rare one
a handful. The xx of fewer tokens than inputs is singular, and what GPTQ makes of it fits noise. `shrink` adds to each
expert what the average token of its stack looks like, with the weight of `prior` tokens:

    xx_e' = xx_e + (prior / n_pooled) xx_pooled

so that an expert of many tokens keeps its own statistics, and a dead one gets the stack's. This is the posterior mean of a
covariance under an inverse Wishart prior of that many pseudo-observations (Gelman et al., Bayesian Data Analysis, 3rd
edition, section 3.6). For the gate and up projections the pool is every token that reaches the layer, routed here or
not; for the down projection, whose input only exists where an expert ran, it is all rows of all experts. `rare` counts
what this is about. The other way, every token to every expert, is the option `all_tokens` of `edgelab.blocks`.

NaN and infinity raise FloatingPointError with the weight's name: sums would carry them on to every method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from edgelab.kernels import histogram as histograms
from edgelab.kernels.histogram import Histogram

WANT = ("xx", "histogram")  # what costs extra; counts, maxima and the sums of |x| and x**2 are always there
_VALUES = 1 << 24  # inputs upcast and multiplied at a time: bounds the copies to about 256 MiB


@dataclass(frozen=True, eq=False)
class InputStats:
    """The statistics of a weight's inputs; those of a stack of experts have a leading [experts].

    count int64 [] | [E]; absmax, sum_abs, sum_sq float32 [in] | [E, in]; xx float32 [in, in] | [E, in, in], or None;
    histogram of |x|, or None: one for all experts, over the rows that they were sent (for gate_up over the tokens that
    reach the layer, each once, which is in proportion); gate_mass float32 [E]: the sum of the gate weights, None for a
    plain weight; pooled: the statistics of all tokens that reach the stack where these are known, else None.
    Treat the tensors as read-only: weights that read the same input share them.
    """

    count: Tensor
    absmax: Tensor
    sum_abs: Tensor
    sum_sq: Tensor
    xx: Tensor | None = None
    histogram: Histogram | None = None
    gate_mass: Tensor | None = None
    pooled: "InputStats | None" = None

    @property
    def experts(self) -> int | None:
        return len(self.count) if self.count.ndim else None

    @property
    def in_features(self) -> int:
        return self.absmax.shape[-1]

    @property
    def mean_abs(self) -> Tensor:
        """[in] | [E, in]: the mean of |x|; 0 for an expert without tokens."""
        return self.sum_abs / self.count.clamp(min=1)[..., None]

    @property
    def mean_sq(self) -> Tensor:
        """[in] | [E, in]: the mean of x**2, an importance of inputs; 0 for an expert without tokens."""
        return self.sum_sq / self.count.clamp(min=1)[..., None]

    def merge(self, other: "InputStats") -> "InputStats":
        """The statistics of the tokens of both, up to float32 rounding; the histogram and the counts exactly.

        Raises ValueError when they are not of the same weight or hold different things.
        """
        if self.absmax.shape != other.absmax.shape:
            raise ValueError(f"inputs of shape {tuple(self.absmax.shape)} and {tuple(other.absmax.shape)} are not those of the same weight")
        for part in ("xx", "histogram", "gate_mass", "pooled"):
            if (getattr(self, part) is None) != (getattr(other, part) is None):
                raise ValueError(f"one of the two has no {part}; calibrate both with the same `want` and the same settings")
        return InputStats(
            self.count + other.count,
            _both(torch.maximum, self.absmax, other.absmax),
            _both(torch.add, self.sum_abs, other.sum_abs),
            _both(torch.add, self.sum_sq, other.sum_sq),
            None if self.xx is None else _both(torch.add, self.xx, other.xx),
            None if self.histogram is None else histograms.merge(self.histogram, other.histogram),
            None if self.gate_mass is None else self.gate_mass + other.gate_mass,
            None if self.pooled is None else self.pooled.merge(other.pooled),
        )

    def expert(self, e: int) -> "InputStats":
        """The statistics of one expert, as of a plain weight; without the histogram, which is the stack's."""
        if self.experts is None:
            raise ValueError("these are the statistics of a plain weight, not of a stack of experts")
        if not 0 <= e < self.experts:
            raise ValueError(f"expert {e} is not one of 0 .. {self.experts - 1}")
        xx = None if self.xx is None else self.xx[e]
        return InputStats(self.count[e], self.absmax[e], self.sum_abs[e], self.sum_sq[e], xx)

    def to(self, device: torch.device | str) -> "InputStats":
        """The same on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | InputStats)}
        return replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors (what is expanded counts once); the histogram and `pooled` not counted."""
        tensors = (v for v in vars(self).values() if isinstance(v, Tensor))
        return sum(t.element_size() * (t[0].numel() if is_shared(t) else t.numel()) for t in tensors)

    def __repr__(self) -> str:
        stack = "" if self.experts is None else f"{self.experts} experts, "
        parts = [p for p in ("xx", "histogram", "gate_mass", "pooled") if getattr(self, p) is not None]
        return f"InputStats({stack}{self.in_features} inputs, {int(self.count.sum()):,} tokens, {', '.join(parts) or 'sums only'})"


def _both(function, a: Tensor, b: Tensor) -> Tensor:
    """function(a, b); what all experts share stays shared."""
    if is_shared(a) and is_shared(b):
        return function(a[:1], b[:1]).expand_as(a)
    return function(a, b)


def is_shared(t: Tensor) -> bool:
    """Whether t [E, ...] is one tensor that was expanded over the experts: `all_tokens` gives each the same statistics."""
    return t.ndim > 1 and len(t) > 1 and t.stride(0) == 0


class Accumulator:
    """Sums over batches, in float64; `finish` gives the `InputStats`.

    `experts`: the size of a stack, None for a plain weight. `name` is what errors call the weight.
    """

    def __init__(
        self,
        in_features: int,
        experts: int | None = None,
        *,
        want: Sequence[str] = WANT,
        device: torch.device | str = "cpu",
        name: str = "x",
    ) -> None:
        for part in want:
            if part not in WANT:
                raise ValueError(f"want holds {part!r}; known are {', '.join(WANT)}")
        lead = () if experts is None else (experts,)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.name, self.want = name, tuple(want)
        self.count = zeros(*lead, dtype=torch.int64) if lead else zeros((), dtype=torch.int64)
        self.absmax = zeros(*lead, in_features, dtype=torch.float32)
        self.sum_abs, self.sum_sq = zeros(*lead, in_features), zeros(*lead, in_features)
        self.xx = zeros(*lead, in_features, in_features) if "xx" in want else None
        self.histogram = histograms.empty() if "histogram" in want else None
        self.gate_mass = zeros(*lead) if lead else None

    @torch.no_grad()
    def add(self, x: Tensor, expert: int | None = None, gates: Tensor | None = None, count: Tensor | None = None) -> None:
        """Add inputs x [..., in] (of `expert`, in a stack), with the router's weights for them, `gates`.

        `count` bool [...]: which of them the histogram counts; None for all. Raises FloatingPointError for NaN and infinity.
        """
        at = ... if expert is None else expert
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        for part in x.split(max(256, _VALUES // x.shape[-1])):
            wide = part.float()
            size = wide.abs()
            largest = size.amax(0)
            if not torch.isfinite(largest).all():  # amax hands NaN on
                _refuse(self.name, wide)
            self.absmax[at] = torch.maximum(self.absmax[at], largest)
            size = size.double()
            self.sum_abs[at] += size.sum(0)
            self.sum_sq[at] += size.square_().sum(0)
            if self.xx is not None:
                self.xx[at] += wide.mT @ wide
        self.count[at] += len(x)
        if gates is not None:
            self.gate_mass[at] += gates.detach().sum(dtype=torch.float64)
        if self.histogram is not None:
            counted = x if count is None else x[count.reshape(-1)]
            self.histogram = histograms.add(self.histogram, np.ascontiguousarray(counted.float().cpu().numpy()))

    def finish(self, pooled: InputStats | None = None, histogram: Histogram | None = None) -> InputStats:
        """The statistics so far, as float32. The accumulator is empty afterwards: its xx is given up to spare memory."""
        xx, self.xx = None if self.xx is None else self.xx.float(), None
        stats = InputStats(
            self.count,
            self.absmax,
            self.sum_abs.float(),
            self.sum_sq.float(),
            xx,
            self.histogram if histogram is None else histogram,
            None if self.gate_mass is None else self.gate_mass.float(),
            pooled,
        )
        if not torch.isfinite(stats.sum_sq).all() or (xx is not None and not torch.isfinite(xx).all()):
            raise FloatingPointError(
                f"{self.name}: the squares of its inputs overflow float32 (the largest is {float(self.absmax.max()):.3g}); "
                "the model diverges on this text"
            )
        return stats


def _refuse(name: str, x: Tensor) -> None:
    broken = ~torch.isfinite(x)
    first = broken.nonzero()[0].tolist()
    raise FloatingPointError(
        f"{name}: {int(broken.sum())} of the {x.numel()} input values are NaN or infinite, the first is {float(x[tuple(first)])} "
        f"at token {first[0]}, input {first[1]}; check the checkpoint, or load the model in float32: float16 overflows at 65504"
    )


def accumulate(
    x: Tensor, *, offsets: Sequence[int] | Tensor | None = None, gates: Tensor | None = None, want: Sequence[str] = WANT, name: str = "x"
) -> InputStats:
    """The statistics of inputs x [..., in], on x's device.

    For a stack of experts, x [n, in] is sorted by expert and `offsets` [E + 1] says where each begins: the rows of
    expert e are x[offsets[e] : offsets[e + 1]]; `gates` [n] are the router's weights of the rows.

    >>> s = accumulate(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> s.count.item(), s.absmax.tolist(), s.sum_sq.tolist(), s.xx.tolist()
    (2, [3.0, 2.0], [10.0, 4.0], [[10.0, -2.0], [-2.0, 4.0]])
    >>> s = accumulate(torch.tensor([[1.0], [2.0], [4.0]]), offsets=[0, 1, 1, 3])
    >>> s.count.tolist(), s.sum_abs.flatten().tolist()
    ([1, 0, 2], [1.0, 0.0, 6.0])
    """
    if x.ndim < 1 or not x.is_floating_point() or not x.shape[-1]:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be float [..., in]")
    if offsets is None:
        if gates is not None:
            raise ValueError("gates without offsets: gate weights belong to the rows of experts")
        sums = Accumulator(x.shape[-1], want=want, device=x.device, name=name)
        sums.add(x)
        return sums.finish()
    ends = [int(o) for o in offsets]
    if x.ndim != 2 or ends[:1] != [0] or ends[-1] != len(x) or sorted(ends) != ends:
        raise ValueError(f"x is {tuple(x.shape)} and offsets {ends}; x must be [n, in] and offsets rise from 0 to n={len(x)}")
    if gates is not None and gates.shape != (len(x),):
        raise ValueError(f"gates is {tuple(gates.shape)}; a weight per row of x needs ({len(x)},)")
    sums = Accumulator(x.shape[-1], len(ends) - 1, want=want, device=x.device, name=name)
    for e, (begin, end) in enumerate(pairwise(ends)):
        sums.add(x[begin:end], e, None if gates is None else gates[begin:end])
    return sums.finish()


def pool(stats: InputStats) -> InputStats:
    """The statistics of the average token of a stack: all that reach the layer where known, else all rows of all experts."""
    if stats.experts is None:
        return stats
    if stats.pooled is not None:
        return stats.pooled
    xx = None
    if stats.xx is not None:
        xx = stats.xx[0] * len(stats.xx) if is_shared(stats.xx) else stats.xx.sum(0)
    return InputStats(stats.count.sum(), stats.absmax.amax(0), stats.sum_abs.sum(0), stats.sum_sq.sum(0), xx, stats.histogram)


def shrink(stats: InputStats, prior: float | None = None) -> InputStats:
    """The statistics of a stack with those of the average token added to each expert, with the weight of `prior` tokens.

    `prior`: in tokens; None takes the number of inputs, about where an expert's own xx gets full rank; 0 changes nothing.
    The maxima of experts that saw fewer than `prior` tokens become the pool's where that is larger (a maximum over few
    tokens says little); the histogram and the gate mass stay. Statistics of a plain weight come back as they are.
    Raises ValueError for a negative prior, and when no token reached the stack at all.

    >>> own = accumulate(torch.tensor([[2.0], [2.0], [4.0]]), offsets=[0, 3, 3], want=["xx"])
    >>> shrunk = shrink(own, prior=6)
    >>> own.xx.flatten().tolist(), shrunk.xx.flatten().tolist(), shrunk.count.tolist()
    ([24.0, 0.0], [72.0, 48.0], [9, 6])
    """
    if prior is not None and not prior >= 0:
        raise ValueError(f"prior={prior} must be a number of tokens, at least 0")
    if stats.experts is None or prior == 0:
        return stats
    pooled = pool(stats)
    if not int(pooled.count):
        raise ValueError("no token reached this stack of experts, so there is nothing to shrink to; use a method without statistics")
    prior = stats.in_features if prior is None else prior
    weight = prior / int(pooled.count)
    few = (stats.count < prior)[:, None]
    return replace(
        stats,
        count=stats.count + round(prior),
        absmax=torch.where(few, torch.maximum(stats.absmax, pooled.absmax), stats.absmax),
        sum_abs=stats.sum_abs + weight * pooled.sum_abs,
        sum_sq=stats.sum_sq + weight * pooled.sum_sq,
        xx=None if stats.xx is None else torch.add(stats.xx, pooled.xx, alpha=weight),
    )


@dataclass(frozen=True)
class Rare:
    """How many tokens the experts of a stack saw: those below `threshold` (the dead included), and those that saw none."""

    threshold: int
    tokens: tuple[int, ...]

    @property
    def rare(self) -> tuple[int, ...]:
        return tuple(e for e, n in enumerate(self.tokens) if n < self.threshold)

    @property
    def dead(self) -> tuple[int, ...]:
        return tuple(e for e, n in enumerate(self.tokens) if n == 0)

    def __str__(self) -> str:
        return (
            f"{len(self.rare)} of {len(self.tokens)} experts saw fewer than {self.threshold:,} tokens, "
            f"{len(self.dead)} saw none{f': {list(self.dead)}' if self.dead else ''}"
        )


def rare(stats: "InputStats | Tensor", threshold: int | None = None) -> Rare:
    """Which experts of a stack saw fewer than `threshold` tokens (None: its number of inputs) and which none.

    `stats` may also be the counts [E] of a router; then `threshold` must be given.

    >>> print(rare(torch.tensor([900, 3, 0]), 64))
    2 of 3 experts saw fewer than 64 tokens, 1 saw none: [2]
    """
    count = stats.count if isinstance(stats, InputStats) else stats
    if count.ndim != 1:
        raise ValueError("rare() is about a stack of experts; these are the statistics of a plain weight")
    if threshold is None:
        if not isinstance(stats, InputStats):
            raise ValueError("threshold=None takes the number of inputs, which counts alone don't tell; give a number of tokens")
        threshold = stats.in_features
    return Rare(int(threshold), tuple(int(n) for n in count.tolist()))
