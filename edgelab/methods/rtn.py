"""Round to nearest: the codes that lie closest to each weight, one scale at a time.

Signed-maximum form (GGUF's Q4_0, ONNX Runtime, nncf): with m the weight of largest magnitude in its group and b bits,

    s = float16(m / -2**(b-1)),    q = clip(round(w / s), -2**(b-1), 2**(b-1) - 1) + 2**(b-1)

so that m itself takes the code 0 and all 2**b codes are used; s may be negative. The usual |m| / (2**(b-1) - 1) wastes
a code, which is dear at 2 and 3 bits. The price: a weight near -m lies outside the range by at most one step. The scale
is rounded to float16, as it will be stored, before the codes are computed, so they are the best ones for it.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from edgelab.qtensor import QTensor
from edgelab.scheme import PerChannel, PerGroup, QuantScheme

# weights at a time: bounds the temporaries (about 6 float32 copies) to some 100 MB, or to 6 copies of what shares one
# scale when that is more (a whole matrix for PerTensor)
_CHUNK = 1 << 22


def round_to_nearest(weight: Tensor, scheme: QuantScheme, *, mse_grid: int = 0, name: str = "weight") -> QTensor:
    """The `QTensor` of `weight` [out, in] or [experts, out, in] (any float dtype, any device), rounded to nearest.

    `mse_grid` n > 0 also tries n scales from 0.4 to 1.1 times the signed-maximum one, each with both signs, and keeps
    per scale the one of least squared error. Raises ValueError for a weight that holds NaN or infinity, is no float
    matrix or stack of them, is too large for float16 scales, or whose inputs the group size does not divide. Warns, with
    the weight's `name`, of groups so small that float16 can't hold their scale well (by half a step, or at all).

    >>> q = round_to_nearest(torch.tensor([[-4.0, 1.0, 3.4, 0.2]]), QuantScheme.parse("int4-row"))
    >>> q.scales, q.codes()
    (array([[0.5]], dtype=float16), array([[ 0, 10, 15,  8]], dtype=uint8))
    """
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be float [out, in] or [experts, out, in], not empty")
    shape = tuple(weight.shape)
    scales_shape = scheme.scales_shape(shape)  # raises when the group size does not divide
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        raise ValueError(
            f"weight holds {broken} NaN or infinite values of {weight.numel()}; "
            "repair the checkpoint, or keep this weight as it is with a rule (pattern, None)"
        )
    if isinstance(scheme.granularity, PerGroup):
        unit = scheme.granularity.size
    else:
        unit = shape[-1] if isinstance(scheme.granularity, PerChannel) else shape[-1] * shape[-2]
    rows = weight.detach().reshape(-1, unit)  # one scale each
    _warn_of_small_scales(rows, scheme, name)
    parts = [_fit(chunk.float(), scheme, mse_grid) for chunk in rows.split(max(1, _CHUNK // unit))]
    codes = np.concatenate([c for c, _ in parts]).reshape(shape)
    scales = np.concatenate([s for _, s in parts]).reshape(scales_shape)
    return QTensor.from_codes(codes, scales, scheme)


def _warn_of_small_scales(rows: Tensor, scheme: QuantScheme, name: str) -> None:
    low, high = rows.aminmax(dim=1)
    exact = torch.maximum(-low, high).double() / scheme.zero_point
    small = (exact.half().double() - exact).abs() * scheme.levels > exact  # false where float16 overflows: _fit raises
    if small.any() and torch.isfinite(exact.half()).all():
        warnings.warn(
            f"{name}: {int(small.sum())} of {len(exact)} groups are so small "
            f"(largest weight {float(exact[small].max()) * scheme.zero_point:.3g}) that "
            "float16 can't hold their scale: they lose precision or become zero; rescale the weight or keep it with a rule (pattern, None)",
            stacklevel=3,
        )


def _fit(w: Tensor, scheme: QuantScheme, mse_grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [rows, n] and scales float16 [rows] of w float32 [rows, n]."""
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))
    scale = _as_stored(largest / -scheme.zero_point)
    if not torch.isfinite(scale).all():
        top = float(largest.abs().max())
        raise ValueError(f"a weight of magnitude {top:.4g} needs a scale above float16's 65504 at {scheme.bits} bits; rescale the weight")
    codes = _round(w, scale, scheme)
    if mse_grid > 0:
        best = _squared_error(w, codes, scale, scheme)
        for factor in np.linspace(0.4, 1.1, mse_grid):
            for sign in (1.0, -1.0):
                tried = _as_stored(largest * (sign * factor / -scheme.zero_point))
                tried_codes = _round(w, tried, scheme)
                error = _squared_error(w, tried_codes, tried, scheme)
                better = (error < best) & torch.isfinite(tried)
                best = torch.where(better, error, best)
                scale = torch.where(better, tried, scale)
                codes = torch.where(better, tried_codes, codes)
    return codes.to(torch.uint8).cpu().numpy(), scale[:, 0].half().cpu().numpy()


def _as_stored(scale: Tensor) -> Tensor:
    return scale.half().float()


def _round(w: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes as float32; a zero scale (all-zero weights, or below float16's 6e-8) gives the code of 0 everywhere."""
    q = torch.round(w / torch.where(scale == 0, torch.inf, scale))
    return q.clamp(-scheme.zero_point, scheme.zero_point - 1) + scheme.zero_point


def _squared_error(w: Tensor, codes: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    return ((codes - scheme.zero_point) * scale - w).square().sum(1, keepdim=True)
