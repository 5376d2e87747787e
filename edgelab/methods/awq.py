"""AWQ: the scale per input channel under which rounding a weight changes the layer's output least.

Rounding W diag(s) instead of W, and dividing the activations by s, leaves the channels of large s with a finer step.
Activation-aware weight quantization (arXiv 2306.00978, section 3.2, equations 4 and 5) searches along one curve,

    s = mean|x|^a,  a = 0, 1/grid .. (grid - 1)/grid, 1,      s <- s / sqrt(max s * min s)

so that a = 0 is plain rounding, and keeps the a of least error of all readers of the same input together. The paper
runs the block on a sample of tokens; here the error of a reader comes from its sufficient statistics, exactly over all
tokens seen: with D = W - Q(W diag s) diag(s)^-1 and X X^T summed over tokens,

    sum_tokens ||D x||^2 = tr(D X X^T D^T)       (or sum_ij D_ij^2 sum x_j^2, where only the squares are kept)

A channel that was never active (mean|x| = 0) gets 1. The paper's other half, the search for a clipping range, is
`round_to_nearest(mse_grid=...)`. Scales too far from 1 cost the other channels of the group their precision, which is why
the answer is searched and not solved for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.smoothquant import check_magnitudes
from edgelab.scheme import QuantScheme


class Reader(NamedTuple):
    """A weight [out, in] or [experts, out, in] that reads the channels to be scaled, and how it will be rounded.

    `second`: sum over tokens of x x^T [(experts,) in, in], or of x^2 [(experts,) in].
    """

    weight: Tensor
    scheme: QuantScheme
    second: Tensor
    name: str = "weight"


class Found(NamedTuple):
    """The scales float32 [..., in], the exponent a of each [...], and the error of every a [grid + 1, ...] (float64)."""

    scales: Tensor
    exponent: Tensor
    errors: Tensor


def awq_scales(mean_abs: Tensor, a: float | Tensor) -> Tensor:
    """s float32 [..., in] for mean|x| [..., in] and the exponent a: mean|x|^a over sqrt(max * min), 1 for dead channels.

    >>> awq_scales(torch.tensor([1.0, 4.0, 0.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 1.0000, 2.0000])
    """
    x = mean_abs.double()
    live = x > 0
    log = a * x.where(live, 1.0).log()
    top, bottom = log.where(live, -torch.inf).amax(-1, keepdim=True), log.where(live, torch.inf).amin(-1, keepdim=True)
    return torch.exp(log - (top + bottom) / 2).where(live, 1.0).float()


def awq_search(mean_abs: Tensor, readers: list[Reader], *, grid: int = 20) -> Found:
    """The best of grid + 1 scales for `readers` of one input with mean|x| = `mean_abs`.

    `mean_abs` [in]: one scale for all, also for the experts of a stack. [experts, in]: each expert of the stacks has its
    own (what feeds `down`). Equal entries of `mean_abs` get equal scales. On ties the smaller exponent wins. Raises
    ValueError for NaN statistics, no readers or shapes that do not fit.

    >>> w = torch.tensor([[0.05, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    >>> x = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])  # the first weight is small, but its input is large
    >>> found = awq_search(x, [Reader(w, QuantScheme.parse("int3-g8"), x.square())], grid=10)
    >>> bool(found.errors.amin() < 0.2 * found.errors[0]), bool(found.exponent > 0)
    (True, True)
    """
    check_magnitudes(mean_abs, "mean_abs")
    if not readers:
        raise ValueError("readers is empty: there is nothing to round; skip this scale")
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
        raise ValueError(f"grid={grid!r} must be a whole number of 1 or more; the paper takes 20")
    for r in readers:
        lead, n = r.weight.shape[:-2], r.weight.shape[-1]
        if r.second.shape not in ((*lead, n), (*lead, n, n)):
            raise ValueError(
                f"second of {r.name} is {tuple(r.second.shape)}; a weight {tuple(r.weight.shape)} needs {(*lead, n)} or {(*lead, n, n)}"
            )
        if not torch.isfinite(r.second).all():
            raise ValueError(f"second of {r.name} holds NaN or infinite values; calibrate again in float32")
    errors = torch.stack([_error(awq_scales(mean_abs, i / grid), readers) for i in range(grid + 1)])
    exponent = errors.argmin(0) / grid  # the first of equals
    return Found(awq_scales(mean_abs, exponent[..., None].double()), exponent, errors)


def _error(s: Tensor, readers: list[Reader]) -> Tensor:
    """float64 [] for s [in], [experts] for s [experts, in]."""
    total = 0.0
    for weight, scheme, second, name in readers:
        wide = weight.detach().float()
        scale = s[..., None, :]  # [(experts,) 1, in]
        rounded = torch.from_numpy(round_to_nearest(wide * scale, scheme, name=name).dequantize()).to(wide.device)
        d = wide - rounded / scale
        if second.ndim == weight.ndim:  # x x^T [..., in, in]
            error = ((d @ second.to(d)) * d).sum((-2, -1), dtype=torch.float64)
        else:
            error = (d.square() * second.to(d)[..., None, :]).sum((-2, -1), dtype=torch.float64)
        total = total + (error if s.ndim == 2 else error.sum())
    return total
