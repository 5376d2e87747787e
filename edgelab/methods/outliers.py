"""LLM.int8(): int8 products for all input channels but the few whose activations are huge (arXiv 2208.07339, section 3.2).

From some billions of parameters on, a handful of channels of the residual stream carry values of 20 and more, in all
layers, while the rest stay near 1. One scale per token then spends its 127 steps on them and rounds the rest to nothing.
So the input is split. With t a threshold (6 in the paper), X [tokens, in] and W [out, in],

    O = { k : |x_ik| > t for some token i }                                 the outlier channels, some 0.1 % of all

    X W^T  ~  X_O W_O^T                                                     in floating point
            + diag(s_x) (round(X_r / s_x) round(W_r / s_w)^T) diag(s_w)     int8 x int8 -> int32; r: the channels not in O

    s_x,i = max over k not in O of |x_ik| / 127,    s_w,j = the scale of row j of the weight

The paper keeps W_O in 16 bits as well. Since O is only known once the input is there, bitsandbytes stores all of W as int8
and takes W_O = s_w round(W / s_w) out of it; so does this function. The weight costs 8 bits either way: the split
saves quality, not memory. The price is an irregular product beside the regular one.

Two differences to bitsandbytes (`int8_vectorwise_quant` in bitsandbytes/backends/default/ops.py): a channel is an outlier
there from |x| >= t on, and the values of an outlier channel that stay below t still take part in s_x.

The same arithmetic as an option of a compressed model is `ActScheme(outliers=...)`, text "a8-token-o6".
"""

import torch
from torch import Tensor

from edgelab.qtensor import QTensor
from edgelab.scheme import PerChannel

THRESHOLD = 6.0
_TOP = 127  # the largest int8 code of an activation, and the smallest with its sign turned


def outlier_columns(absmax: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """int64 [n]: the channels whose largest magnitude `absmax` [in] is above `threshold`, in order.

    >>> outlier_columns(torch.tensor([0.5, 60.0, 6.0, 6.1]))
    tensor([1, 3])
    """
    if absmax.ndim != 1 or not absmax.is_floating_point():
        raise ValueError(f"absmax is {absmax.dtype} {tuple(absmax.shape)}; it must be float [in], the largest |x| of each channel")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold!r} must be positive; LLM.int8() uses 6.0, and infinity means no outliers")
    return torch.nonzero(absmax > threshold).flatten()


def llm_int8(x: Tensor, weight: QTensor | tuple[Tensor, Tensor], threshold: float = THRESHOLD) -> Tensor:
    """[..., out] = x W^T by the split of the module, in x's dtype.

    `x` [..., in]. `weight`: a `QTensor` [out, in] of int8-row, or a pair (codes int8 [out, in], scales float [out]) with
    value = scale * code, such as bitsandbytes' (CB, SCB / 127). Raises ValueError for another scheme or shape, and
    for x with NaN or infinity, which no int8 code can say.

    >>> codes, scales = torch.tensor([[100, -50, 1]], dtype=torch.int8), torch.tensor([0.01])  # W = 1, -0.5, 0.01
    >>> llm_int8(torch.tensor([[1.27, 0.64, 500.0]]), (codes, scales))  # 1.27 - 0.32 + 5; x_1 and x_2 are 127 and 64 steps
    tensor([[5.9500]])
    """
    codes, scales = _codes(weight, x.device)
    if x.ndim == 0 or x.shape[-1] != codes.shape[1] or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it must be float [..., {codes.shape[1]}] for a weight {tuple(codes.shape)}")
    rows = x.detach().reshape(-1, x.shape[-1]).float()  # [T, in]
    if not torch.isfinite(rows).all():
        raise ValueError(f"x holds {int((~torch.isfinite(rows)).sum())} NaN or infinite values of {rows.numel()}; find where they arise")
    absmax = rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[-1])
    out = outlier_columns(absmax, threshold)
    rest = rows.index_fill(1, out, 0)
    s = rest.abs().amax(1, keepdim=True) / _TOP  # [T, 1]
    q = torch.round(rest / torch.where(s == 0, 1, s))
    # the integer product in float64, which is exact (below 2**53) and runs on every device
    y = (q.double() @ codes.double().T).float() * s * scales
    y = y + rows[:, out] @ (codes[:, out].float() * scales[:, None]).T
    return y.to(x.dtype).reshape(*x.shape[:-1], codes.shape[0])


def _codes(weight: QTensor | tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(signed codes [out, in], scales float32 [out])."""
    if isinstance(weight, QTensor):
        s = weight.scheme
        if (s.bits, s.codebook, s.granularity) != (8, "int", PerChannel()) or len(weight.shape) != 2:
            raise ValueError(f"weight is {s} {weight.shape}; LLM.int8() multiplies int8-row [out, in] (a stack: one expert at a time)")
        signed = torch.from_numpy(weight.codes()).to(device).to(torch.int16) - s.zero_point
        return signed, torch.from_numpy(weight.scale_values()[:, 0]).to(device)
    codes, scales = weight
    if codes.dtype != torch.int8 or codes.ndim != 2 or scales.shape != codes.shape[:1]:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}, scales {tuple(scales.shape)}; they must be int8 [out, in] and float [out]"
        )
    return codes.to(device), scales.to(device).float()
