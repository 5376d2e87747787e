"""Which experts of a mixture stay, and how alike ones become one. Pure functions on statistics and weights.

Dropping (`least`) ranks experts within a layer. Subsets (`subset`) are judged by what the layer computes without them, as NAEE
does (arXiv 2402.14800, section 3.2): all of them where they are few, else the expert goes whose loss hurts least, one after
another, and then kept ones change places with those that went for as long as the error falls. The error is exact for
what is tried; the search need not find the best subset. It takes no outputs [tokens, E, hidden]: with g the gates of all
experts, g' those of the router that has only the subset, and F_t = f(x_t) f(x_t)^T [E, E],

    sum_t | sum_e (g - g')_e f_e(x_t) |^2  =  sum_t (g - g')_t^T F_t (g - g')_t

Merging: `average_linkage` clusters mean outputs from the bottom up (HC-SMoE, arXiv 2410.08589, section 3.2: the distance between
two clusters is the mean over pairs), `around_dominant` gives each expert to the most similar of the most used ones (M-SMoE,
arXiv 2310.01334, section 3.1). Members are averaged, weighted by use; the inner neurons of an expert have no order, so each
member's are first matched to the most used member's (weight matching, Git Re-Basin, arXiv 2209.04836).
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import comb

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MOST_SUBSETS = 2000  # that are all tried


def least(scores: Sequence[float] | Tensor, count: int) -> list[int]:
    """The `count` experts of the least scores, ascending by number; of equal ones the first.

    >>> least([3.0, 1.0, 2.0, 1.0], 2)
    [1, 3]
    """
    values = np.asarray(torch.as_tensor(scores).double())
    return sorted(np.argsort(values, kind="stable")[:count].tolist())


def subset(total: int, keep: int, error: Callable[[tuple[int, ...]], float]) -> tuple[list[int], bool]:
    """(the experts that stay, whether all subsets were tried): of least `error(kept experts)`.

    >>> subset(4, 2, lambda kept: abs(sum(kept) - 5))
    ([2, 3], True)
    """
    if comb(total, keep) <= MOST_SUBSETS:
        return list(min(combinations(range(total), keep), key=error)), True
    kept, value = tuple(range(total)), 0.0
    while len(kept) > keep:
        value, kept = min((error(k), k) for k in (kept[:i] + kept[i + 1 :] for i in range(len(kept))))
    while True:
        others = [e for e in range(total) if e not in kept]
        lower, best = min((error(k), k) for k in (tuple(sorted({*kept} - {a} | {b})) for a in kept for b in others))
        if lower >= value * (1 - 1e-9):
            return list(kept), False
        value, kept = lower, best


def lost(gram: Tensor, gates: Tensor, other: Tensor) -> float:
    """sum_t |sum_e (g - g')_e f_e(x_t)|^2 with `gram` [tokens, E, E] of the experts' outputs, gates and other [tokens, E].

    >>> gram = torch.tensor([[[4.0, 2.0], [2.0, 9.0]]])  # one token: |f0| = 2, |f1| = 3, f0 . f1 = 2
    >>> lost(gram, torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))  # |(f1 - f0) / 2|^2 = (9 - 4 + 4) / 4
    2.25
    """
    d = (gates - other).to(gram.dtype)
    return float((torch.bmm(gram, d[..., None])[..., 0] * d).sum(dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------- clusters


def average_linkage(points: Tensor, clusters: int) -> list[list[int]]:
    """`clusters` groups of the rows of `points` [n, d]: the two groups whose rows are nearest on average become one, until so few remain.

    >>> average_linkage(torch.tensor([[0.0], [0.1], [5.0], [9.0]]), 2)
    [[0, 1], [2, 3]]
    """
    if not 1 <= clusters <= len(points):
        raise ValueError(f"clusters={clusters} of {len(points)} points; give 1 .. {len(points)}")
    distance = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    groups = [[i] for i in range(len(points))]
    while len(groups) > clusters:
        pairs = ((distance[np.ix_(groups[a], groups[b])].mean(), a, b) for a in range(len(groups)) for b in range(a + 1, len(groups)))
        _, a, b = min(pairs)
        groups[a] = sorted(groups[a] + groups.pop(b))
    return groups


def around_dominant(likeness: Tensor, used: Tensor, clusters: int) -> list[list[int]]:
    """Groups around the `clusters` most used experts; each other expert joins the one that it is most like. `likeness` [E, E].

    >>> around_dominant(torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.1], [0.9, 0.1, 1.0]]), torch.tensor([5, 4, 1]), 2)
    [[0, 2], [1]]
    """
    if not 1 <= clusters <= len(used):
        raise ValueError(f"clusters={clusters} of {len(used)} experts; give 1 .. {len(used)}")
    heads = sorted(torch.argsort(used.double(), descending=True, stable=True)[:clusters].tolist())
    groups = {h: [h] for h in heads}
    for e in range(len(used)):
        if e not in groups:
            groups[heads[int(likeness[e, heads].argmax())]].append(e)
    return [sorted(g) for g in groups.values()]


# --------------------------------------------------------------------------------------------------------------- merge


def matched(gate_up: Tensor, down: Tensor, to_gate_up: Tensor, to_down: Tensor) -> Tensor:
    """[inner]: which inner neuron of an expert stands where the other's do, by the largest sum of products of their weights.

    `gate_up` [2, inner, hidden], `down` [hidden, inner].
    """
    gain = torch.einsum("gih,gjh->ij", to_gate_up.double(), gate_up.double()) + to_down.double().T @ down.double()
    _, order = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def averaged(gate_up: Tensor, down: Tensor, members: Iterable[int], used: Tensor) -> tuple[int, Tensor, Tensor]:
    """(the most used member, gate_up [2, inner, hidden], down [hidden, inner]) of the average of `members`, weighted by `used` [E].

    `gate_up` [E, 2, inner, hidden], `down` [E, hidden, inner]. Members that nobody used count alike.
    """
    members = list(members)
    share = used[members].double()
    share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(members))
    head = members[int(share.argmax())]
    total_gate_up, total_down = torch.zeros_like(gate_up[head], dtype=torch.float64), torch.zeros_like(down[head], dtype=torch.float64)
    for weight, e in zip(share.tolist(), members, strict=True):
        order = matched(gate_up[e], down[e], gate_up[head], down[head]) if e != head else torch.arange(down.shape[-1])
        total_gate_up += weight * gate_up[e][:, order].double()
        total_down += weight * down[e][:, order].double()
    return head, total_gate_up.to(gate_up.dtype), total_down.to(down.dtype)


# --------------------------------------------------------------------------------------------------------------- split


def deal(importance: Tensor, parts: int) -> Tensor:
    """int64 [parts, inner / parts]: the inner channels by importance [inner], the most important part first.

    >>> deal(torch.tensor([0.1, 0.9, 0.2, 0.8]), 2)
    tensor([[1, 3],
            [2, 0]])
    """
    if parts < 1 or len(importance) % parts:
        raise ValueError(f"parts={parts} does not divide the {len(importance)} inner channels of an expert")
    return torch.argsort(importance, descending=True, stable=True).reshape(parts, -1)
