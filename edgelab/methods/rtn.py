"""Round to nearest: the codes that lie closest to each weight, one scale at a time.

**int**, signed-maximum form (GGUF's Q4_0, ONNX Runtime, nncf): with m the weight of largest magnitude in its group and b bits,

    s = float16(m / -2**(b-1)),    q = clip(round(w / s), -2**(b-1), 2**(b-1) - 1) + 2**(b-1)

so that m itself takes the code 0 and all 2**b codes are used; s may be negative. The usual |m| / (2**(b-1) - 1) wastes
a code, which is dear at 2 and 3 bits. The price: a weight near -m lies outside the range by at most one step.
**uint**: s = (max - min) / (2**b - 1), offset = min (GGUF's Q4_1). **nf, fp**: s = max|w|. **mxfp**: s = 2**(floor(log2
max|w|) - 2) (OCP MX v1.0, section 6.3), so that magnitudes between 6 s and 8 s are clipped.

Scales and offsets are rounded as they will be stored before the codes are computed, so the codes are the best ones for them.

**The search.** With a grid, the range may be narrower than the weights: clipping the few largest leaves finer steps for the
rest. Of all candidates the one of least sum(h (w - value)**2) stays, with h the importance of each input (1 when none is
given; E[x**2] is the error of a layer's output as far as inputs are independent: the diagonal of GPTQ's Hessian, and
llama.cpp's imatrix). Then two rounds of least squares: given levels c, the best scale (and offset) solves a linear regression,

    s = <w, c>_h / <c, c>_h      or with an offset o:   s = cov_h(w, c) / var_h(c),   o = mean_h(w) - s mean_h(c)

and given the scale the best levels are the nearest ones. A candidate is taken only where the error falls.
"""

import numpy as np
import torch
from torch import Tensor

from edgelab.methods.codebook import check_weight, codes_of, divided, nearest, pack, stored, unit_of, warn_of_small_scales
from edgelab.qtensor import QTensor
from edgelab.scheme import PerTensor, QuantScheme

# weights at a time: bounds the temporaries (about 6 float32 copies) to some 100 MB, or to 6 copies of what shares one
# scale when that is more (a whole matrix for PerTensor). The search makes many passes, so there they stay in the cache:
# 2048 x 2048 with 32 candidates takes 0.6 s of one core (AMD EPYC) instead of 1.0 s
_CHUNK = 1 << 22
_SEARCH_CHUNK = 1 << 18
_ROUNDS = 2  # of least squares after the grid


def round_to_nearest(
    weight: Tensor, scheme: QuantScheme, *, mse_grid: int = 0, importance: Tensor | None = None, name: str = "weight"
) -> QTensor:
    """The `QTensor` of `weight` [out, in] or [experts, out, in] (any float dtype, any device), rounded to nearest.

    `mse_grid` n > 0 also tries n ranges from 0.4 to 1.1 times the full one (for int and nf with both signs; for uint
    narrower at either end or both; for mxfp the powers of two beside), then least squares, and keeps per scale what has the
    least squared error. `importance` [in] or [experts, in], not negative, weighs the squares; with it and no grid only the
    least squares are done. Raises ValueError for a weight that holds NaN or infinity, is no float
    matrix or stack of them, is too large for float16 scales, or whose inputs the group size does not divide. Warns, with
    the weight's `name`, of groups so small that float16 can't hold their scale well (by half a step, or at all).

    >>> q = round_to_nearest(torch.tensor([[-4.0, 1.0, 3.4, 0.2]]), QuantScheme.parse("int4-row"))
    >>> q.scales, q.codes()
    (array([[0.5]], dtype=float16), array([[ 0, 10, 15,  8]], dtype=uint8))
    >>> round_to_nearest(torch.tensor([[1.0, 2.0, 4.0]]), QuantScheme.parse("uint2-row")).dequantize()
    array([[1., 2., 4.]], dtype=float32)
    """
    check_weight(weight, scheme)
    if importance is not None:
        importance = _checked_importance(importance, weight)
    warn_of_small_scales(weight, scheme, name)
    codes, scale, offset = fit_weight(weight.detach(), scheme, mse_grid, importance)
    return pack(codes, scale, offset, scheme, tuple(weight.shape))


def fit_weight(
    weight: Tensor, scheme: QuantScheme, mse_grid: int = 0, importance: Tensor | None = None
) -> tuple[np.ndarray, Tensor, Tensor | None]:
    """Codes uint8 [scales, n], stored scales and offsets [scales, 1] of a checked weight, some at a time.

    `importance` float32 [in] or [experts or 1, in].
    """
    shape, unit = tuple(weight.shape), unit_of(scheme, tuple(weight.shape))
    step = max(1, (_SEARCH_CHUNK if mse_grid > 0 or importance is not None else _CHUNK) // unit)
    parts = []
    for i, chunk in enumerate(weight.reshape(-1, unit).split(step)):
        h = None if importance is None else _importance_of(importance, i * step, i * step + len(chunk), scheme, shape)
        levels, *scales = fit(chunk.float(), scheme, mse_grid, h)
        parts.append((codes_of(levels, scheme), *scales))
    codes, scale, offset = zip(*parts, strict=True)
    return np.concatenate(codes), torch.cat(scale), torch.cat(offset) if scheme.asymmetric else None


def fit(w: Tensor, scheme: QuantScheme, mse_grid: int = 0, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels [rows, n], scales and offsets (None for symmetric schemes) [rows, 1] of w float32 [rows, n], a scale per row.

    `importance` [rows, n] or [1, n]. Scales and offsets are as stored. Raises ValueError where float16 can't hold them.
    """
    low, high = w.aminmax(dim=1, keepdim=True)
    if scheme.codebook == "int":
        full = w.gather(1, w.abs().argmax(1, keepdim=True)) / -scheme.zero_point
    elif scheme.asymmetric:
        full = (high - low) / (scheme.levels - 1)
    else:
        full = torch.maximum(-low, high)
        if scheme.codebook == "mxfp":
            full = torch.where(full == 0, 1.0, full / 4)  # E8M0 has no zero
    scale, offset = stored(full, scheme), stored(low, scheme) if scheme.asymmetric else None
    if not torch.isfinite(scale).all() or (offset is not None and not torch.isfinite(offset).all()):
        top = float(torch.maximum(-low, high).max())
        what = "an offset" if torch.isfinite(scale).all() else "a scale"
        raise ValueError(f"a weight of magnitude {top:.4g} needs {what} above float16's 65504 at {scheme.bits} bits; rescale the weight")
    levels = nearest(divided(w, scale, offset), scheme)
    if mse_grid <= 0 and importance is None:
        return levels, scale, offset

    best = _squared_error(w, levels, scale, offset, importance)
    for tried, tried_offset in _candidates(full, low, high, scheme, mse_grid):
        levels, scale, offset, best = _keep_better(w, tried, tried_offset, importance, scheme, levels, scale, offset, best)
    for _ in range(_ROUNDS if scheme.codebook != "mxfp" else 0):
        tried, tried_offset = least_squares(w, levels, scale, offset, importance)
        levels, scale, offset, best = _keep_better(w, tried, tried_offset, importance, scheme, levels, scale, offset, best)
    return levels, scale, offset


def least_squares(
    w: Tensor, levels: Tensor, scale: Tensor, offset: Tensor | None, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The scale and offset [rows, 1] of least squared error for given levels; the old ones where the levels don't tell."""
    h = torch.ones(1, 1, device=w.device) if importance is None else importance
    if offset is None:
        top, bottom = (w * levels * h).sum(1, keepdim=True), (levels.square() * h).sum(1, keepdim=True)
        return torch.where(bottom > 0, top / bottom, scale), None
    total = h.expand_as(w).sum(1, keepdim=True)
    mean_w, mean_c = (w * h).sum(1, keepdim=True) / total, (levels * h).sum(1, keepdim=True) / total
    centred = levels - mean_c
    top, bottom = ((w - mean_w) * centred * h).sum(1, keepdim=True), (centred.square() * h).sum(1, keepdim=True)
    s = torch.where(bottom > 0, top / bottom, scale)
    return s, torch.where(total > 0, mean_w - s * mean_c, offset)


def _candidates(full: Tensor, low: Tensor, high: Tensor, scheme: QuantScheme, grid: int):
    """Scales and offsets to try, before they are rounded."""
    if scheme.codebook == "mxfp":
        if grid > 0:
            yield from ((full * f, None) for f in (0.5, 2.0))
        return
    for factor in np.linspace(0.4, 1.1, max(grid, 0)):
        if scheme.asymmetric:
            cut = (high - low) * (1 - factor)
            yield from ((full * factor, low + cut * share) for share in (0.0, 0.5, 1.0))
        else:
            yield from ((full * (sign * factor), None) for sign in ((1.0,) if scheme.codebook == "fp" else (1.0, -1.0)))


def _keep_better(w, tried, tried_offset, importance, scheme, levels, scale, offset, best):
    """The candidate where its error is less, what there was elsewhere."""
    tried = stored(tried, scheme)
    tried_offset = None if offset is None else stored(tried_offset, scheme)
    tried_levels = nearest(divided(w, tried, tried_offset), scheme)
    error = _squared_error(w, tried_levels, tried, tried_offset, importance)
    better = error < best  # false for what float16 can't hold: its error is NaN or infinite
    best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    offset = None if offset is None else torch.where(better, tried_offset, offset)
    return torch.where(better, tried_levels, levels), scale, offset, best


def _squared_error(w: Tensor, levels: Tensor, scale: Tensor, offset: Tensor | None, importance: Tensor | None) -> Tensor:
    error = levels * scale
    if offset is not None:
        error += offset
    error.sub_(w).square_()
    return (error if importance is None else error.mul_(importance)).sum(1, keepdim=True)


def _checked_importance(importance: Tensor, weight: Tensor) -> Tensor:
    """[experts or 1, in], float32, on the weight's device, scaled to a mean of 1 per expert; ones where all are zero."""
    wanted = (*weight.shape[:-2], weight.shape[-1])
    if tuple(importance.shape) != wanted:
        raise ValueError(f"importance is {tuple(importance.shape)}; a weight of {tuple(weight.shape)} needs {wanted}")
    h = importance.detach().to(weight.device, torch.float64).reshape(-1, wanted[-1])
    if not torch.isfinite(h).all() or (h < 0).any():
        raise ValueError("importance holds NaN, infinite or negative values; it is a mean of squares: check the calibration data")
    mean = h.mean(1, keepdim=True)
    return torch.where(mean > 0, h / torch.where(mean > 0, mean, 1.0), 1.0).float()


def _importance_of(importance: Tensor, first: int, last: int, scheme: QuantScheme, shape: tuple[int, ...]) -> Tensor:
    """Importance [last - first, n] of the rows that share a scale, from [experts or 1, in]. A group of zeros counts as ones."""
    importance = importance.reshape(-1, shape[-1])
    index = torch.arange(first, last, device=importance.device)
    if isinstance(scheme.granularity, PerTensor):
        h = importance[index].repeat(1, shape[-2])
    else:
        groups = scheme.groups(shape[-1])
        h = importance.reshape(len(importance) * groups, -1)
        h = h[index // (shape[-2] * groups) * groups + index % groups]
    return torch.where(h.sum(1, keepdim=True) > 0, h, 1.0)
