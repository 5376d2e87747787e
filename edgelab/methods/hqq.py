"""Half-quadratic quantization (HQQ): offsets fitted to the bulk of the weights, with no data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (mobiusml.github.io/hqq_blog), and
mobiusml/hqq, hqq/core/optimize.py. For each group with scale s = (max - min) / (2**b - 1) fixed, the offset o is sought that
makes the error sparse: least sum |W - s q - o|^p with p < 1, so that a few large errors count little and the many small ones
much. An auxiliary e that may hold the large errors splits the problem in two that have closed forms,

    min over o, e of   sum |e|^p + beta/2 |e - (W - s q - o)|^2 :

    q = clip(round((W - o) / s), 0, 2**b - 1),    r = s q + o                                   nearest codes
    e = sign(W - r) relu(|W - r| - |W - r|^(p-1) / beta)                                        generalised shrinkage
    o = mean(W - e - s q)                                                                       quadratic in o
    beta <- kappa beta

The original writes the same with the inverse scale and a zero point z = -o / s, stops when the mean of |W - r| over the whole
weight stops falling, and returns the last z. Here each group stops by itself, when its sum |W - r|^p has not fallen for five
rounds, and keeps the offset of the least one, as rounded to float16: no group ends worse, in that norm, than it began, and none
depends on another. Stopping at the first rise, as the original's rule would read per group, loses a percent of the norm at 3 bits.
It wants small groups (one offset has little to give to 1024 weights), and pays at 2 and 3 bits.
"""

import numpy as np
import torch
from torch import Tensor

from edgelab.methods.codebook import check_weight, codes_of, divided, nearest, pack, stored, unit_of, warn_of_small_scales
from edgelab.methods.rtn import fit
from edgelab.qtensor import QTensor
from edgelab.scheme import QuantScheme

_CHUNK = 1 << 17  # weights at a time: its passes stay in the cache
_PATIENCE = 5


def hqq(
    weight: Tensor,
    scheme: QuantScheme,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    name: str = "weight",
) -> QTensor:
    """The `QTensor` of `weight` [out, in] or [experts, out, in] with an asymmetric scheme, offsets fitted by HQQ.

    Raises ValueError for a symmetric scheme, for settings out of range, and as `round_to_nearest` does; warns as it does.

    >>> w = torch.tensor([[0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0, 3.5]])  # 3.5 stretches the range: steps of 3.5 / 3
    >>> q = hqq(w, QuantScheme.parse("uint2-row"))
    >>> float(q.offsets[0, 0]) < 0.0  # min(w) is 0: lower serves more of them better
    True
    """
    if not scheme.asymmetric:
        raise ValueError(f"{name}: HQQ fits an offset and {scheme} has none; use uint{scheme.bits}-{scheme.granularity}")
    if not 0 < p <= 1 or not beta > 0 or not kappa >= 1 or iterations < 0:
        raise ValueError(f"p={p!r}, beta={beta!r}, kappa={kappa!r}, iterations={iterations!r}: HQQ needs 0 < p <= 1, beta > 0, kappa >= 1")
    check_weight(weight, scheme)
    warn_of_small_scales(weight, scheme, name)
    rows = weight.detach().reshape(-1, unit_of(scheme, tuple(weight.shape)))
    parts = []
    for chunk in rows.split(max(1, _CHUNK // rows.shape[1])):
        levels, scale, offset = _fit(chunk.float(), scheme, p, beta, kappa, iterations)
        parts.append((codes_of(levels, scheme), scale, offset))
    codes, scale, offset = zip(*parts, strict=True)
    return pack(np.concatenate(codes), torch.cat(scale), torch.cat(offset), scheme, tuple(weight.shape))


def _fit(w: Tensor, scheme: QuantScheme, p: float, beta: float, kappa: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [rows, n], scale and offset [rows, 1] of w [rows, n]."""
    levels, scale, offset = fit(w, scheme)
    best_offset, best, stale = offset, torch.full_like(scale, torch.inf), torch.zeros_like(scale)
    for i in range(iterations + 1):
        r = w - levels * scale - offset
        norm = r.abs().pow(p).sum(1, keepdim=True)
        better = (norm < best) & (stale < _PATIENCE)
        best, best_offset = torch.where(better, norm, best), torch.where(better, offset, best_offset)
        stale = torch.where(better, 0.0, stale + 1)
        if i == iterations or stale.min() >= _PATIENCE:
            break
        e = torch.sign(r) * torch.relu(r.abs() - r.abs().pow(p - 1) / beta)
        offset = stored((w - e - levels * scale).mean(1, keepdim=True), scheme)
        levels = nearest(divided(w, scale, offset), scheme)
        beta *= kappa
    return nearest(divided(w, scale, best_offset), scheme), scale, best_offset
