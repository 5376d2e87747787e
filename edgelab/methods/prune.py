"""Unstructured pruning: which weights become zero, and what the others do about it.

A weight W [out, in], its inputs' second moments H = sum x x^T over tokens, |X_j|_2 = sqrt(H_jj). Scores, the lowest of
which go:

    magnitude   |w_ij|                           compared within a whole matrix
    wanda       |w_ij| |X_j|_2                   compared within an output row (Sun et al., arXiv 2306.11695, section 3)
    sparsegpt   w_ij^2 / [H^-1]_jj               compared within 128 columns of a matrix, all rows together
                                                 (Frantar and Alistarh, arXiv 2301.00774, section 3 and algorithm 1)

Wanda's square is what losing w_ij alone adds to sum |W x - W' x|^2. SparseGPT's is what it adds once the columns that are
still to come have answered, in the best way, to the loss: U_jj of H^-1 = U^T U at the place where it is used. From the
factor H = R R^T = (I + T) D (I + T)^T of `methods/gptq.py`, which needs no inverse, both the score and the answer follow:

    target_j = W[:, j] + E[:, :j] T[:j, j],    score = target_j^2 d_j,    Q[:, j] = target_j or 0,    E = W - Q

with d_j = D_jj = 1 / U_jj^2. The mask of a block of 128 columns is chosen when the block is reached, that of n:m for each m
columns when these are reached: from the values that the columns B of the block would take if none of them were pruned,
W_B + G (I + T_BB)^-1 with G = E[:, :a] T[:a, B], which is what W holds at that moment where all later columns are updated at
once, as in the paper. (target_j alone would take the columns between for unchanged.)

**Counts are exact.** Of n weights that are compared, round(sparsity * n) go (halves up), where there are several rows or
blocks by running totals: row i loses R(i + 1) - R(i) with R(i) = round(sparsity * n * i), so that the whole matrix loses
round(sparsity * n * rows) and rows differ by one at most. (The published codes take the floor in each row.) Ties go by
position: of equal scores the first in order goes first, so that equal inputs give equal masks on every machine.
**What is zero stays zero**: it is the first to be counted, and SparseGPT does not revive it.

Measured on the embedded models, decoder blocks, 32,768 calibration tokens, mean KLD in nats to the original on 80 test
documents (all of four domains), uniform; differences between methods of a column are beyond their paired intervals, but for
the last of the MoE between Wanda and SparseGPT:

                dense:  50 %   2:4    4:8    70 %      MoE:  50 %   2:4    4:8    70 %
    magnitude           .173   .324   .237   .992            .340   .578   .451  1.844
    wanda               .140   .303   .215   .680            .261   .526   .381  1.229
    sparsegpt           .109   .230   .158   .624            .220   .423   .305  1.175

Trade-off: magnitude needs no data and is the worst; wanda needs one number per input and no inverse; SparseGPT a Cholesky
factor of H per weight, and changes what stays. Group sizes differ too: within a row every output keeps as many inputs, which
guards rows of small weights, and within a matrix weights can move to the outputs that need them.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from edgelab.methods.gptq import _damped, _factor

_BLOCK = 128  # columns whose mask SparseGPT chooses at once ("adaptive mask", section 3.3)


def counts(sparsity: float, groups: int, size: int) -> list[int]:
    """How many of the `size` weights in each of `groups` groups become zero: running totals rounded, halves up.

    >>> counts(0.5, 3, 4), counts(0.7, 4, 4), sum(counts(0.7, 4, 4))
    ([2, 2, 2], [3, 3, 2, 3], 11)
    """
    ends = [math.floor(sparsity * size * i + 0.5) for i in range(groups + 1)]
    return [b - a for a, b in pairwise(ends)]


def wanda(weight: Tensor, sum_sq: Tensor) -> Tensor:
    """The scores |w| |x|_2, float32 [..., out, in], of `weight` [..., out, in] with `sum_sq` [..., in], sums of x^2.

    >>> wanda(torch.tensor([[2.0, -1.0]]), torch.tensor([1.0, 9.0])).tolist()
    [[2.0, 3.0]]
    """
    wanted = (*weight.shape[:-2], weight.shape[-1])
    if tuple(sum_sq.shape) != wanted:
        raise ValueError(f"sum_sq is {tuple(sum_sq.shape)}; a weight of {tuple(weight.shape)} needs {wanted}")
    return weight.detach().float().abs() * sum_sq.to(weight.device).float().sqrt()[..., None, :]


def keep(scores: Tensor, sparsity: float, within: str = "row") -> Tensor:
    """The mask bool [..., out, in] of the weights that stay: the lowest `scores` go.

    `within` "row": compared in each output row; "matrix": in each matrix of a stack. Exactly round(sparsity * out * in)
    of every matrix go (see the module for how rows share them). Raises ValueError for NaN in the scores.

    >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> keep(w, 0.5).int().tolist(), keep(w, 0.5, "matrix").int().tolist()
    ([[0, 1], [0, 1]], [[0, 0], [1, 1]])
    """
    _check(scores, sparsity)
    if within not in ("row", "matrix"):
        raise ValueError(f"within={within!r} is not known; use 'row' or 'matrix'")
    if scores.ndim == 3:
        return torch.stack([keep(s, sparsity, within) for s in scores])
    if within == "matrix":
        return ~_lowest(scores.reshape(-1), counts(sparsity, 1, scores.numel())[0]).view(scores.shape)
    out, n = scores.shape
    rank = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    order = torch.argsort(scores, dim=1, stable=True)
    rank.scatter_(1, order, torch.arange(n, device=scores.device).expand(out, n))
    return rank >= torch.tensor(counts(sparsity, out, n), device=scores.device)[:, None]


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask bool [..., in] of the n highest `scores` of each m neighbours along the inputs; of equal ones the later stay.

    >>> keep_n_of_m(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 5.0]]), 2, 4).int().tolist()
    [[0, 0, 1, 1, 0, 0, 1, 1]]
    """
    _check(scores, 0.0)
    check_n_of_m(n, m, scores.shape[-1])
    parts = scores.unflatten(-1, (-1, m))
    lowest = torch.argsort(parts, dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(parts, dtype=torch.bool).scatter_(-1, lowest, False).flatten(-2)


def check_n_of_m(n: int, m: int, in_features: int, name: str = "weight") -> None:
    """Raises ValueError unless n of every m of `in_features` inputs can stay."""
    if not 0 < n < m:
        raise ValueError(f"{n}:{m} is no pattern; n of every m weights stay, 0 < n < m, as in 2:4")
    if in_features % m:
        fits = [f"{k * n // m}:{k}" for k in (4, 8, 16, 2) if in_features % k == 0 and k * n % m == 0]
        way_out = f"use {fits[0]}, or 'unstructured'" if fits else "use 'unstructured', or leave the weight out"
        raise ValueError(f"{name}: pattern {n}:{m} does not divide in_features={in_features}; {way_out}")


def keep_global(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """{name: mask} under one threshold for all: exactly round(sparsity * number of all scores) go, the lowest.

    Needs all scores at once, as float32. Ties go by the order of names, then by position.

    >>> masks = keep_global({"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([[2.0, 3.0]])}, 0.5)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([[False, True]], [[False, True]])
    """
    for s in scores.values():
        _check(s, sparsity)
    flat = torch.cat([s.reshape(-1).float() for s in scores.values()])
    gone = _lowest(flat, counts(sparsity, 1, len(flat))[0])
    parts = gone.split([s.numel() for s in scores.values()])
    return {name: ~part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def sparsegpt(
    weight: Tensor,
    xx: Tensor,
    sparsity: float | Sequence[float] = 0.5,
    *,
    n_of_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = _BLOCK,
    name: str = "weight",
) -> Tensor:
    """`weight` [out, in] or [experts, out, in] in float32 with zeros, and with the rest changed so that outputs err least.

    `xx` [in, in] or [experts, in, in]: sum of x x^T, in any scale. `sparsity`: of each matrix (of a stack one for all or one
    each). `n_of_m` (2, 4): that pattern instead. `damping`: share of the mean diagonal added to xx. `block`: columns whose
    mask is chosen at once; with n_of_m a matter of speed only. A matrix whose xx is zero is pruned by magnitude,
    with a warning. Raises ValueError for NaN, for shapes that don't fit, and for an xx that is no sum of x x^T.

    >>> w, x = torch.tensor([[1.0, 0.9, 0.5, 2.0]]), torch.eye(4)
    >>> x[0, 1] = 1.0  # the first two act together: the second does the work of both
    >>> sparsegpt(w, x[[0, 2, 3]].T @ x[[0, 2, 3]], n_of_m=(2, 4), damping=1e-6).round(decimals=3)
    tensor([[0.0000, 1.9000, 0.0000, 2.0000]])
    """
    if weight.ndim not in (2, 3) or not weight.is_floating_point():
        raise ValueError(f"{name}: weight is {weight.dtype} {tuple(weight.shape)}; it must be float [out, in] or [experts, out, in]")
    wanted = (*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    if tuple(xx.shape) != wanted:
        raise ValueError(f"{name}: xx is {tuple(xx.shape)}; a weight of {tuple(weight.shape)} needs {wanted}")
    if not damping >= 0 or block < 1:
        raise ValueError(f"damping={damping!r} must not be negative and block={block!r} at least 1; 0.01 and {_BLOCK} are usual")
    if n_of_m is not None:
        check_n_of_m(*n_of_m, weight.shape[-1], name)
        block = max(1, block // n_of_m[1]) * n_of_m[1]
    stacked = weight.ndim == 3
    if not stacked:
        return _sparsegpt(weight, xx, float(sparsity), n_of_m, damping, block, name)
    each = [sparsity] * len(weight) if isinstance(sparsity, int | float) else list(sparsity)
    parts = enumerate(zip(weight, xx, each, strict=True))
    return torch.stack([_sparsegpt(w, h, float(s), n_of_m, damping, block, f"{name}[{e}]") for e, (w, h, s) in parts])


def _sparsegpt(weight: Tensor, xx: Tensor, sparsity: float, n_of_m, damping: float, block: int, name: str) -> Tensor:
    weight = weight.detach().float()
    _check(weight, sparsity, f"{name}: weight")
    h = xx.detach().to(weight.device, torch.float64)
    if not torch.isfinite(h).all():
        raise ValueError(f"{name}: xx holds NaN or infinite values: the activations overflowed; calibrate in float32 or bfloat16")
    if not h.any():
        warnings.warn(f"{name} saw no token in calibration (xx is zero): pruned by magnitude instead", stacklevel=3)
        mask = keep_n_of_m(weight.abs(), *n_of_m) if n_of_m else keep(weight.abs(), sparsity, "matrix")
        return weight.masked_fill(~mask, 0.0)
    damped, diagonal = _damped(h, damping, name)
    tt, d = _factor(damped)
    d[diagonal == 0] = 0.0  # an input that is never active: its weights go first, whatever the damping says they cost
    wt = weight.T.contiguous()  # [in, out]: a column of the weight lies in one piece
    alive, error, result, zero = wt != 0, torch.empty_like(wt), torch.empty_like(wt), wt.new_zeros(())

    def mask_of(left: Tensor, rows: slice, gone: int | None) -> Tensor:
        """Which of the columns `rows` stay, bool [columns, out]; `left` [columns, out]: what those before leave to them."""
        target = wt[rows] + torch.linalg.solve_triangular(tt[rows, rows], left, upper=False, unitriangular=True)
        scores = torch.where(alive[rows], target.square() * d[rows, None], -1.0)
        if gone is None:
            return keep_n_of_m(scores.T, *n_of_m).T & alive[rows]
        return ~_lowest(scores.T.reshape(-1), gone).view(scores.T.shape).T & alive[rows]  # ties in the weight's own order

    n, out = wt.shape
    goal = [math.floor(sparsity * out * a + 0.5) for a in range(n + 1)]  # zeros in the first a columns
    for a in range(0, n, block):
        b = min(a + block, n)
        left = tt[a:b, :a] @ error[:a]  # what the blocks before leave to this one
        target = wt[a:b] + left
        mask = None if n_of_m else mask_of(left, slice(a, b), goal[b] - goal[a])
        for j in range(a, b):
            if n_of_m and j % n_of_m[1] == 0:
                columns = slice(j, j + n_of_m[1])
                mask = mask_of(left[j - a : columns.stop - a] + tt[columns, a:j] @ error[a:j], columns, None)
            w = target[j - a] if j == a else torch.addmv(target[j - a], error[a:j].T, tt[j, a:j])
            stays = mask[j % n_of_m[1]] if n_of_m else mask[j - a]
            torch.where(stays, w, zero, out=result[j])  # not w * stays: that would write -0.0
            torch.sub(wt[j], result[j], out=error[j])
    return result.T.contiguous()


def share_out(losses: Mapping[str, Sequence[float]], sizes: Mapping[str, int], levels: Sequence[float], total: int) -> dict[str, int]:
    """{name: how many of its `sizes` become zero}, `total` in all, so that the sum of losses is least.

    `losses[name][i]`: what the weight loses when the share `levels[i]` of it is zero; levels rise. Between levels a loss is
    taken as linear, and its lower convex hull in its place: then the cheapest stretch of all (least loss per zero) comes
    first, until `total` is reached within a stretch (the continuous knapsack; no price search is needed). Raises ValueError
    for a total outside of what levels[0] and levels[-1] leave.

    >>> share_out({"a": [0, 1, 4], "b": [0, 2, 9]}, {"a": 10, "b": 10}, [0, 0.5, 1.0], 8)
    {'a': 5, 'b': 3}
    """
    if any(a >= b for a, b in pairwise(levels)):
        raise ValueError(f"levels={list(levels)} must rise")
    ends = {name: [math.floor(level * size + 0.5) for level in levels] for name, size in sizes.items()}
    least, most = (sum(e[i] for e in ends.values()) for i in (0, -1))
    if not least <= total <= most:
        raise ValueError(f"total={total:,} zeros are not between {least:,} and {most:,}, what the levels {levels[0]} .. {levels[-1]} leave")
    steps = []
    for name, at in ends.items():
        for i, j in pairwise(_hull(at, losses[name])):
            steps.append(((losses[name][j] - losses[name][i]) / (at[j] - at[i]), at[j] - at[i], name))
    steps.sort(key=lambda s: s[0])  # stable; slopes of one name rise
    found, left = {name: at[0] for name, at in ends.items()}, total - least
    for _, width, name in steps:
        taken = min(width, left)
        found[name] += taken
        left -= taken
    return found


def _hull(at: Sequence[int], loss: Sequence[float]) -> list[int]:
    """The points on the lower convex hull from the first to the last, those of no width left out."""
    hull: list[int] = []
    for j in range(len(at)):
        if hull and at[j] == at[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[b] - loss[a]) * (at[j] - at[b]) < (loss[j] - loss[b]) * (at[b] - at[a]):
                break
            hull.pop()
        hull.append(j)
    return hull


def _lowest(flat: Tensor, k: int) -> Tensor:
    """bool [n]: the k lowest of `flat` [n]; of equal ones the first."""
    if k <= 0 or k >= len(flat):
        return torch.full(flat.shape, k > 0, device=flat.device)
    threshold = flat.kthvalue(k).values
    gone = flat < threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    gone[tied[: k - int(gone.sum())]] = True
    return gone


def _check(values: Tensor, sparsity: float, what: str = "scores") -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r} is no share; give a number from 0 (nothing goes) to 1 (everything)")
    if torch.isnan(values).any():
        raise ValueError(f"{what} hold {int(torch.isnan(values).sum())} NaN of {values.numel()}: repair the checkpoint or calibrate again")
