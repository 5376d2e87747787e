"""GPTQ: what rounding one input's weights costs is made good by those still to come; then scales and codes are refined.

The aim, per weight W [out, in] with inputs x and H = sum x x^T: codes whose values Q have the least

    L(Q) = sum_tokens |W x - Q x|^2 = tr((W - Q) H (W - Q)^T)

**GPTQ** (Frantar et al., arXiv 2210.17323, section 4): columns are rounded one after another, and each leaves its error to the
rest, W[:, k] -= e_j U[j, k] with H^-1 = U^T U. The same numbers come out of H = R R^T, R upper triangular with columns
R = (I + T) diag(R): no inverse is needed, and the error stays one against the *original* weight (LDLQ, which Chee et al.,
arXiv 2307.13304, prove to be the same as GPTQ):

    Q[:, j] = nearest(W[:, j] + E[:, :j] T[:j, j]),     E = W - Q         for j = 0, 1, ...          (1)

Then L = sum_j d_j |rounding error of column j|^2 with d_j = R_jj^2: what a unit of error in column j costs once the later
columns have answered. So d weighs the search of the scales (diag(H) does as well: within 2 % of each other). Columns of large
H_jj go first (`act_order`), while many others can still answer; scales are fixed before (static groups), so that codes may be
stored in their own order.

**Refinement** (`rounds` sweeps; 0 is GPTQ as published). (1) looks forward only, and at scales fitted to W. Each sweep takes one
group g after another, and lowers L exactly, all rows at once. With G = E H, c the levels of the group and u any direction that
changes its values (c for the scale, 1 for an offset), the best step along u is

    t = <u, G_g> / <u, H_gg u>                                                                     (2)

and the best level of column j given all others is nearest to Q[:, j] + G[:, j] / H_jj (coordinate descent, as in CDQuant,
arXiv 2406.17542). Steps are taken after rounding scales to float16, and only where L falls.

Measured on the embedded dense model, decoder blocks only, 65,536 calibration tokens, mean KL divergence to the original on 20,480
test tokens (damping 0.01): int4-g32 to nearest .0148, GPTQ .0076, refined .0070; int3-g32 .0662, .0342, .0305; int2-g32 .341, .203,
.159. Four rounds get nearly all of what sixteen do (.0303 at 3 bits). Damping of .03 to .1 instead, which trusts the calibration
set less, changes nothing at 4 bits and takes another 2 to 4 % off at 3 and 2; .3 is too much. Without `act_order`, 2 % worse at
4 bits and 1 % better at 3.

What can go wrong, and what happens: H is damped by lambda = damping * mean(diag H) on its diagonal; where it is still not positive
definite, lambda grows tenfold, with a warning, until it exceeds the mean diagonal tenfold: then ValueError. An input that is never
active (H_jj = 0) meets the damping alone: its weights are rounded to nearest and touch no others. No tokens at all (xx = 0, an
expert that the router never chose): round to nearest, with a warning. NaN in weight or xx: ValueError.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from edgelab.methods.codebook import check_weight, codes_of, divisor, nearest, pack, stored, warn_of_small_scales
from edgelab.methods.rtn import fit, fit_weight, round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup, PerTensor, QuantScheme

_TOP_DAMPING = 10.0  # of the mean diagonal: beyond it H says nothing any more


def gptq(
    weight: Tensor,
    xx: Tensor,
    scheme: QuantScheme,
    *,
    damping: float = 0.05,
    act_order: bool = True,
    mse_grid: int = 32,
    block: int = 128,
    rounds: int = 4,
    keep_zeros: bool = False,
    name: str = "weight",
) -> QTensor:
    """The `QTensor` of `weight` [out, in] or [experts, out, in] whose outputs on inputs with second moments `xx` err least.

    `xx` [in, in] or [experts, in, in]: sum of x x^T over tokens, in any scale. `damping`: share of its mean diagonal that is
    added to it. `act_order`: columns in order of falling diag(xx), scales fitted beforehand; without it in their own order,
    the scales of a group fitted when it is reached. `mse_grid`: candidates per scale (`rtn.fit`). `block`: columns between
    products of whole matrices, a matter of speed only. `rounds` of refinement. `keep_zeros`: a weight that is exactly 0 gets the code of
    0, whatever errors were left to it; they go on to the columns after it. Experts are done one by one; all rows at once.

    Raises ValueError for NaN or infinity in either, shapes that don't fit, an `xx` that no bounded damping makes positive definite,
    or `keep_zeros` with a scheme whose levels begin at an offset.
    Warns, as `round_to_nearest` does, of groups too small for a float16 scale.

    >>> w, x = torch.tensor([[0.35, 0.35, -4.0]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two act together
    >>> gptq(w, x.T @ x, QuantScheme.parse("int4-row"), mse_grid=0, rounds=0).dequantize()  # to nearest: 0.5 + 0.5 for 0.7
    array([[ 0.5,  0. , -4. ]], dtype=float32)
    """
    try:
        check_weight(weight, scheme)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    wanted = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    if tuple(xx.shape) != wanted:
        raise ValueError(f"{name}: xx is {tuple(xx.shape)}; a weight of {tuple(weight.shape)} needs {wanted}")
    if not damping >= 0:
        raise ValueError(f"damping={damping!r} must not be negative; 0.01 is usual")
    if block < 1 or rounds < 0:
        raise ValueError(f"block={block!r} must be positive and rounds={rounds!r} not negative")
    if keep_zeros and scheme.asymmetric:
        raise ValueError(
            f"{name}: keep_zeros=True, but {scheme} has no exact zero: its levels begin at an offset; "
            f"use int{scheme.bits}-{scheme.granularity}"
        )
    stacked = weight.ndim == 3
    done = [
        _one(w, h, scheme, damping, act_order, mse_grid, block, rounds, keep_zeros, f"{name}[{e}]" if stacked else name)
        for e, (w, h) in enumerate(zip(weight if stacked else weight[None], xx if stacked else xx[None], strict=True))
    ]
    if not stacked:
        return done[0]
    codes, scales = np.stack([q.codes() for q in done]), np.stack([q.scales for q in done])
    return QTensor.from_codes(codes, scales, scheme, np.stack([q.offsets for q in done]) if scheme.asymmetric else None)


def _one(
    weight: Tensor,
    xx: Tensor,
    scheme: QuantScheme,
    damping: float,
    act_order: bool,
    grid: int,
    block: int,
    rounds: int,
    keep_zeros: bool,
    name: str,
) -> QTensor:
    h = xx.detach().to(weight.device, torch.float64)
    if not torch.isfinite(h).all():
        raise ValueError(
            f"{name}: xx holds {int((~torch.isfinite(h)).sum())} NaN or infinite values: the activations that were "
            "calibrated on overflowed; calibrate in float32 or bfloat16"
        )
    if not h.any():
        warnings.warn(f"{name} saw no token in calibration (xx is zero): rounded to nearest instead", stacklevel=3)
        return round_to_nearest(weight, scheme, mse_grid=grid, name=name)
    warn_of_small_scales(weight, scheme, name)
    h, diagonal = _damped(h, damping, name)
    n = len(h)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(n, device=h.device)
    tt, d = _factor(h[order][:, order])

    unit = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else n
    wt = weight.detach().float().T.contiguous()  # [in, out]: a column of the weight lies in one piece
    alive = wt != 0 if keep_zeros else None  # the level of an exact zero is 0 in every symmetric codebook
    back = torch.empty_like(order)
    back[order] = torch.arange(n, device=h.device)
    _, scale, offset = fit_weight(weight.detach(), scheme, grid, d[back] if grid else None)
    scale, offset = (None if s is None else s.reshape(-1, n // unit).T.expand(-1, len(weight)).contiguous() for s in (scale, offset))
    refit = None if act_order or unit == n else lambda w, columns: fit(w.T, scheme, grid, d[None, columns] if grid else None)
    ordered = None if alive is None else alive[order]
    levels = _forward(wt[order], tt, scale, offset, order // unit, scheme, block, refit, ordered)[back]

    h = h.float()
    error = wt - _values(levels, scale, offset, unit)
    for _ in range(rounds):
        _sweep(levels, scale, offset, error, h, scheme, unit, block, alive)
    if isinstance(scheme.granularity, PerTensor):
        scale, offset = scale[:, :1], None if offset is None else offset[:, :1]
    codes = codes_of(levels.T, scheme)
    return pack(codes, scale.T.contiguous(), None if offset is None else offset.T.contiguous(), scheme, tuple(weight.shape))


def _damped(h: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """H + lambda I, positive definite, and the diagonal of H."""
    h = (h + h.T) / 2
    diagonal = h.diagonal().clone()
    mean, tried = float(diagonal.mean()), damping
    if mean > 0 and float(diagonal.min()) >= -1e-6 * mean:
        while tried <= max(_TOP_DAMPING, damping):
            damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (tried * mean)
            if int(torch.linalg.cholesky_ex(damped)[1]) == 0:
                if tried > damping:
                    warnings.warn(f"{name}: xx needed damping={tried:.3g} instead of {damping:g} to be positive definite", stacklevel=4)
                return damped, diagonal
            tried = tried * 10 if tried else 1e-6
    raise ValueError(
        f"{name}: xx isn't a sum of x x^T: its smallest diagonal element is {float(diagonal.min()):.3g}, its smallest eigenvalue "
        f"{float(torch.linalg.eigvalsh(h)[0]):.3g}, its mean diagonal {mean:.3g}, and no damping up to {_TOP_DAMPING:g} of that makes it "
        "positive definite; calibrate again, in float32"
    )


def _factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """T^T [n, n] (lower, contiguous) and d [n] of H = R R^T, R = (I + T) diag(sqrt(d)) upper; float32 from float64.

    The factor that starts at the last column comes from the Cholesky factor of H with its rows and columns reversed.
    """
    lower = torch.linalg.cholesky(h.flip(0, 1))
    r = lower.flip(0, 1)
    root = r.diagonal()
    return (r / root).T.float().contiguous(), root.square().float()


def _forward(
    wt: Tensor,
    tt: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group: Tensor,
    scheme: QuantScheme,
    block: int,
    refit,
    alive: Tensor | None,
) -> Tensor:
    """Levels [in, out] by (1), of wt [in, out] in the order of rounding; column j takes the scale of row group[j] of `scale`.

    `refit(weights, columns)` gives scales for a group that is reached, from its weights as they are by then; in place.
    `alive` bool [in, out], or None for all: where it is False the level is 0.
    """
    error, levels, group = torch.empty_like(wt), torch.empty_like(wt), group.tolist()
    divide_by = divisor(scale)
    for a in range(0, len(wt), block):
        b = min(a + block, len(wt))
        target = wt[a:b] + tt[a:b, :a] @ error[:a]  # what the blocks before leave to this one
        for j in range(a, b):
            g = group[j]
            if refit is not None and (j == 0 or group[j - 1] != g):
                columns = slice(j, j + group.count(g))
                reached = wt[columns] + tt[columns, :j] @ error[:j]
                _, s, o = refit(reached if alive is None else reached * alive[columns], columns)
                scale[g], divide_by[g] = s[:, 0], divisor(s[:, 0])
                if offset is not None:
                    offset[g] = o[:, 0]
            w = target[j - a]
            if j > a:
                w = torch.addmv(w, error[a:j].T, tt[j, a:j])
            o = None if offset is None else offset[g]
            level = nearest((w if o is None else w - o) / divide_by[g], scheme)
            if alive is not None:
                level = level.masked_fill_(~alive[j], 0.0)
            levels[j] = level
            value = level * scale[g]
            torch.sub(wt[j], value if o is None else value + o, out=error[j])
    return levels


def _values(levels: Tensor, scale: Tensor, offset: Tensor | None, unit: int) -> Tensor:
    values = levels.unflatten(0, (-1, unit)) * scale[:, None]
    return (values if offset is None else values + offset[:, None]).flatten(0, 1)


def _sweep(
    levels: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    error: Tensor,
    h: Tensor,
    scheme: QuantScheme,
    unit: int,
    block: int,
    alive: Tensor | None,
) -> None:
    """One round of refinement over all groups: levels, scale, offset and error = W - Q [in, out] change in place."""
    for g in range(len(scale)):
        first = g * unit
        whole = slice(first, first + unit)
        gradient = h[whole] @ error
        if scheme.codebook != "mxfp":  # a power of two has no small steps
            _refit(levels[whole], scale, offset, g, error[whole], gradient, h[whole, whole], scheme)
        s, divide_by, o = scale[g], divisor(scale[g]), None if offset is None else offset[g]
        for a in range(first, first + unit, block):
            b = min(a + block, first + unit)
            part = gradient[a - first : b - first] if a == first else h[a:b] @ error
            moved = torch.empty_like(part)
            own = h[a:b, a:b] / h.diagonal()[a:b, None]
            part = part / h.diagonal()[a:b, None]
            values = levels[a:b] * s if o is None else levels[a:b] * s + o
            part += values
            for j in range(b - a):
                w = part[j] if j == 0 else torch.addmv(part[j], moved[:j].T, own[j, :j], alpha=-1)
                level = nearest((w if o is None else w - o) / divide_by, scheme)
                if alive is not None:
                    level = level.masked_fill_(~alive[a + j], 0.0)
                levels[a + j] = level
                value = level * s
                torch.sub(value if o is None else value + o, values[j], out=moved[j])
            error[a:b] -= moved


def _refit(
    c: Tensor, scale: Tensor, offset: Tensor | None, g: int, error: Tensor, gradient: Tensor, h: Tensor, scheme: QuantScheme
) -> None:
    """The step (2) of group g's scale, and offset, with levels c [n, out] as they are: error and gradient too change in place."""
    together = isinstance(scheme.granularity, PerTensor)  # one scale for all rows

    def over(x: Tensor) -> Tensor:  # [n, out] -> [out]
        return x.sum().expand(x.shape[1]) if together else x.sum(0)

    hc = h @ c
    bc, acc = over(c * gradient), over(c * hc)
    if offset is None:
        step_s, step_o = torch.where(acc > 0, bc / acc, 0.0), None
    else:
        h1 = h.sum(1, keepdim=True).expand_as(c)
        b1, ac1, a11 = over(gradient), over(hc), over(h1)
        det = acc * a11 - ac1 * ac1
        solvable = det > 1e-6 * acc * a11  # else all levels are (nearly) one
        step_s = torch.where(solvable, (bc * a11 - b1 * ac1) / det, 0.0)
        step_o = (b1 - step_s * ac1) / a11
        step_o = stored(offset[g] + step_o, scheme) - offset[g]
    step_s = stored(scale[g] + step_s, scheme) - scale[g]
    gain = step_s * (2 * bc - step_s * acc)
    if offset is not None:
        gain = gain + step_o * (2 * b1 - step_o * a11) - 2 * step_s * step_o * ac1
    taken = (gain > 0) & torch.isfinite(gain)
    step_s = torch.where(taken, step_s, 0.0)
    scale[g] += step_s
    error -= step_s * c
    gradient -= step_s * hc
    if offset is not None:
        step_o = torch.where(taken, step_o, 0.0)
        offset[g] += step_o
        error -= step_o
        gradient -= step_o * h1
