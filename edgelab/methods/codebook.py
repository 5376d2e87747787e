"""The arithmetic of a `QuantScheme`: which level is nearest, how a scale is stored, what a weight must be to get one.

A code stands for scale * level (+ offset). Every method that fits codes works with *levels*, the numbers of
`QuantScheme.table`, and turns them into codes once, at the end. Ties go

    int, uint   to the even level (torch.round)
    nf, fp      to the lower level, as in bitsandbytes' comparisons `x > midpoint` (fp there: towards zero)
    mxfp        to the level whose mantissa bit is 0 (IEEE 754's roundTiesToEven, as OCP MX v1.0 has it); weights in bfloat16
                meet ties often, for the scale is a power of two
"""

import warnings
from functools import cache

import numpy as np
import torch
from torch import Tensor

from edgelab.qtensor import QTensor
from edgelab.scheme import PerChannel, PerGroup, QuantScheme

_FEW = 1 << 14  # numbers; of more, 15 comparisons of all (vector instructions) take half of what a binary search for each does


def nearest(x: Tensor, scheme: QuantScheme) -> Tensor:
    """The level nearest to each x (weights minus offset, divided by scale), float32, in x's shape.

    >>> nearest(torch.tensor([-9.0, 0.4, 6.6, 7.9]), QuantScheme.parse("int4-row")).tolist()
    [-8.0, 0.0, 7.0, 7.0]
    >>> nearest(torch.tensor([-0.9, 0.75, 5.0, 7.5]), QuantScheme.parse("mxfp4-g32")).tolist()  # 0.75 and 5 are ties
    [-1.0, 1.0, 4.0, 6.0]
    """
    if scheme.affine:
        low, high = _ends(scheme)
        return torch.round(x).clamp_(low, high)
    levels, borders, _ = _sorted(scheme, x.device)
    if x.numel() < _FEW:
        index = torch.bucketize(x.contiguous(), borders, out_int32=True)
    else:
        index = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        for border in borders.tolist():
            index += (x > border).view(torch.uint8)
        index = index.int()
    return levels.index_select(0, index.flatten()).view(x.shape)


def codes_of(levels: Tensor, scheme: QuantScheme) -> np.ndarray:
    """The codes uint8 of what `nearest` returned."""
    if scheme.affine:
        return (levels - _ends(scheme)[0]).to(torch.uint8).cpu().numpy()
    _, borders, order = _sorted(scheme, levels.device)
    return order[torch.bucketize(levels.contiguous(), borders)].cpu().numpy()


def divided(w: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(w - offset) / scale; 0 where the scale is 0 (all-zero weights, or below float16's 6e-8)."""
    return (w if offset is None else w - offset) / divisor(scale)


def divisor(scale: Tensor) -> Tensor:
    """`scale`, with infinity for 0."""
    return torch.where(scale == 0, torch.inf, scale)


def stored(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """`scale` (or an offset) as it will be read back: through float16, or the next power of two below for mxfp. float32."""
    if scheme.codebook != "mxfp":
        return scale.half().float()
    _, exponent = torch.frexp(scale)  # scale = m * 2**exponent, m in [.5, 1)
    return torch.ldexp(torch.ones_like(scale), (exponent - 1).clamp(-126, 127))


def pack(codes: np.ndarray, scale: Tensor, offset: Tensor | None, scheme: QuantScheme, shape: tuple[int, ...]) -> QTensor:
    """The `QTensor` of `shape` from codes, stored scales and offsets in the order of its elements."""
    target = scheme.scales_shape(shape)
    # mxfp: 2**e is .5 * 2**(e + 1) to frexp, and its byte e + 127
    scales = (torch.frexp(scale)[1] + 126).to(torch.uint8) if scheme.codebook == "mxfp" else scale.half()
    offsets = None if offset is None else offset.half().cpu().numpy().reshape(target)
    return QTensor.from_codes(codes.reshape(shape), scales.cpu().numpy().reshape(target), scheme, offsets)


def unit_of(scheme: QuantScheme, shape: tuple[int, ...]) -> int:
    """How many weights of a weight of `shape`, in the order of its elements, share a scale."""
    if isinstance(scheme.granularity, PerGroup):
        return scheme.granularity.size
    return shape[-1] if isinstance(scheme.granularity, PerChannel) else shape[-1] * shape[-2]


def check_weight(weight: Tensor, scheme: QuantScheme) -> None:
    """Raises ValueError unless `weight` is a finite float matrix, or stack of them, whose inputs the groups divide."""
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be float [out, in] or [experts, out, in], not empty")
    scheme.groups(weight.shape[-1])
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        raise ValueError(
            f"weight holds {broken} NaN or infinite values of {weight.numel()}; "
            "repair the checkpoint, or keep this weight as it is with a rule (pattern, None)"
        )


def warn_of_small_scales(weight: Tensor, scheme: QuantScheme, name: str) -> None:
    """Warns, with the `name` of a checked weight, of groups whose scale float16 can't hold to half a step, or at all."""
    if scheme.codebook == "mxfp":
        return  # powers of two down to 2**-126
    low, high = weight.detach().reshape(-1, unit_of(scheme, tuple(weight.shape))).aminmax(dim=1)
    largest = torch.maximum(-low, high).double()
    steps = {"int": scheme.zero_point, "uint": scheme.levels - 1}.get(scheme.codebook, 1)
    exact = ((high.double() - low) if scheme.asymmetric else largest) / steps
    small = (exact.half().double() - exact).abs() * scheme.levels > exact  # false where float16 overflows: `rtn.fit` raises
    if small.any() and torch.isfinite(exact.half()).all():
        warnings.warn(
            f"{name}: {int(small.sum())} of {len(exact)} groups are so small (largest weight {float(largest[small].max()):.3g}) that "
            "float16 can't hold their scale: they lose precision or become zero; rescale the weight or keep it with a rule (pattern, None)",
            stacklevel=3,
        )


def _ends(scheme: QuantScheme) -> tuple[int, int]:
    return (0, scheme.levels - 1) if scheme.asymmetric else (-scheme.zero_point, scheme.zero_point - 1)


@cache
def _sorted(scheme: QuantScheme, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Levels in rising order, the borders between them, and the code of each. Of mxfp's two zeros only the positive is used."""
    codes = np.argsort(scheme.table, kind="stable")
    codes = codes[np.r_[True, np.diff(scheme.table[codes]) > 0]]
    levels = scheme.table[codes]
    borders = (levels[1:] + levels[:-1]) / 2  # x belongs to the level above when x > border
    if scheme.codebook == "mxfp":
        up = codes[1:] % 2 == 0  # the level above is the even one: a tie goes there
        borders = np.where(up, np.nextafter(borders, np.float32(-np.inf)), borders)
    return tuple(torch.from_numpy(a).to(device) for a in (levels, borders.astype(np.float32), codes.astype(np.uint8)))
