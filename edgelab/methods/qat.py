"""Rounding that learns: fake quantization with a straight-through gradient, and step sizes that learn too (LSQ).

A weight w in codes of `bits` bits with step s computes as

    v^ = s clip(round(w / s), -Qn, Qp),    Qn = 2^(bits - 1), Qp = 2^(bits - 1) - 1

so that the loss sees what rounding does, while w itself stays in floating point and learns. Rounding has the derivative 0 nearly
everywhere; the straight-through estimator (Bengio et al., arXiv 1308.3432) takes 1 in its place:

    dv^/dw = 1 inside of the range, 0 where w / s is clipped

and with it the step has a derivative as well (LSQ, Esser et al., arXiv 1902.08153, equation 3), which sees where in its cell a weight
lies:

    dv^/ds = round(w / s) - w / s  inside,  -Qn or Qp where clipped,  times g = 1 / sqrt(N Qp)      (N weights share s)

g keeps the step's updates in proportion to the weights' (section 2.2); under Adam, which divides by the gradient's size, it
changes nothing. A step may be negative, as in the signed-maximum form. Scales are stored as float16, so the forward pass
already computes with that number (straight through, too).
"""

import torch
from torch import Tensor

from edgelab.methods.codebook import unit_of
from edgelab.scheme import PerGroup, PerTensor, QuantScheme


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, `exact` in gradient."""
    return exact + (rounded - exact).detach()


def fake_quantize(weight: Tensor, scale: Tensor, scheme: QuantScheme, *, gradient_scale: bool = True) -> Tensor:
    """The values that `weight` [..., out, in] has in codes of `scheme`; gradients to weight (STE) and scale (LSQ).

    `scale` of `scheme.scales_shape(weight.shape)`. Raises ValueError for a codebook that is not "int" and a scale of another shape.

    >>> w, s = torch.tensor([[0.9, -5.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    >>> fake_quantize(w, s, QuantScheme.parse("int3-row"), gradient_scale=False).sum().backward()
    >>> w.grad, s.grad  # 1 - 0.9 inside, -Qn = -4 for the clipped one
    (tensor([[1., 0.]]), tensor([[-3.9000]]))
    """
    check(scheme)
    want = scheme.scales_shape(tuple(weight.shape))
    if tuple(scale.shape) != want:
        raise ValueError(f"scale is {tuple(scale.shape)}; {scheme} of {tuple(weight.shape)} needs {want}")
    qn, qp = scheme.zero_point, scheme.zero_point - 1
    stored = straight_through(scale, scale.half().float())
    if gradient_scale:
        g = (unit_of(scheme, tuple(weight.shape)) * qp) ** -0.5
        stored = stored.detach() + g * (stored - stored.detach())
    w, s = _grouped(weight, stored, scheme)
    v = (w / torch.where(s == 0, torch.inf, s)).clamp(-qn, qp)
    return (straight_through(v, v.round()) * s).reshape(weight.shape)


def levels(weight: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """The integers -Qn .. Qp that `fake_quantize` rounds to, in the shape of `weight`."""
    check(scheme)
    w, s = _grouped(weight, scale.half().float(), scheme)
    return (w / torch.where(s == 0, torch.inf, s)).clamp(-scheme.zero_point, scheme.zero_point - 1).round().reshape(weight.shape)


def lsq_start(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """LSQ's first step size, 2 mean|w| / sqrt(Qp) (section 2.1), in `scheme.scales_shape(weight.shape)`."""
    check(scheme)
    w = weight.detach().float()
    want = scheme.scales_shape(tuple(weight.shape))
    mean = w.abs().reshape(-1, unit_of(scheme, tuple(weight.shape))).mean(1).reshape(want)
    return 2 * mean / (scheme.zero_point - 1) ** 0.5


def check(scheme: QuantScheme) -> None:
    """Raises ValueError for a scheme that can't learn this way."""
    if scheme.codebook != "int":
        raise ValueError(f"{scheme} has no single step that could learn; use int{scheme.bits} with the same groups")


def _grouped(weight: Tensor, scale: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Weight and scale in shapes that broadcast: groups in a dimension of their own."""
    if isinstance(scheme.granularity, PerGroup):
        return weight.unflatten(-1, (-1, scheme.granularity.size)), scale[..., None]
    return weight, scale.reshape(*weight.shape[:-2], 1, 1) if isinstance(scheme.granularity, PerTensor) else scale
