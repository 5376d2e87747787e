"""SmoothQuant: how much of each channel's range to move from the activations into the weights that read them.

With x [tokens, in] read by W [out, in], y = x W^T = (x / s) (W diag(s))^T for any s > 0. An activation channel with a few
huge values spoils the scale of a whole token; the weights of that channel have room to spare. Per channel j

    s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)         (arXiv 2211.10438, section 4, equation 4)

alpha = 1/2 makes both maxima sqrt(max|x_j| max|W_:j|): the difficulty is shared. Larger moves more into the weights. With
alpha = 1/2 the result does not depend on where the range lay before: scaling x by c and W by 1/c changes s by c.

A dead channel (max|x_j| or max|W_:j| of 0) says nothing about its scale; it gets 1.
"""

import torch
from torch import Tensor


def smoothing_scales(x_absmax: Tensor, w_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """s float32 [..., in], to divide activations by and multiply weights with, from the largest magnitudes of each channel.

    Raises ValueError for NaN, infinite or negative statistics, shapes that differ and an alpha outside of 0 .. 1.

    >>> smoothing_scales(torch.tensor([4.0, 100.0, 0.0]), torch.tensor([1.0, 0.25, 2.0]))
    tensor([ 2., 20.,  1.])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be from 0 (all in the activations) to 1 (all in the weights)")
    if x_absmax.shape != w_absmax.shape:
        raise ValueError(f"x_absmax is {tuple(x_absmax.shape)} and w_absmax {tuple(w_absmax.shape)}; they must be of one shape [..., in]")
    x, w = (check_magnitudes(t, name).double() for t, name in ((x_absmax, "x_absmax"), (w_absmax, "w_absmax")))
    live = (x > 0) & (w > 0)
    s = x.where(live, 1.0).pow(alpha) / w.where(live, 1.0).pow(1 - alpha)
    return s.where(live, 1.0).float()


def check_magnitudes(t: Tensor, name: str) -> Tensor:
    """`t`, when it holds finite numbers of 0 or more only."""
    broken = int((~(torch.isfinite(t) & (t >= 0))).sum())
    if broken:
        raise ValueError(
            f"{name} holds {broken} NaN, infinite or negative values of {t.numel()}: the activations of the calibration overflowed; "
            "look for the first layer that gives them, and calibrate again in float32"
        )
    return t
