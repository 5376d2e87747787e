"""Bits where they count: one scheme for each weight, so that the sum of losses is least within a budget of bytes.

With x_ij = 1 when weight i takes scheme j, loss l_ij and bytes b_ij this is the multiple-choice knapsack problem

    minimise sum l_ij x_ij    subject to    sum b_ij x_ij <= B,    sum_j x_ij = 1 for every i

(Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapter 11). It is NP-hard, and in practice easy:

1. a price L per byte makes the weights independent, and gives a lower bound on every solution that fits,

       bound(L) = sum_i min_j (l_ij + L b_ij) - L B        (Lagrangian relaxation)

   which is largest at the price where the greedy walk down the lower convex hulls, the steepest step first, runs out of
   budget; there it equals the bound of the linear programme;
2. that walk, continued with the steps that still fit, gives a first solution;
3. what a choice costs above the cheapest one at that price, r_ij, is paid on top of the bound: an option with bound +
   r_ij above the loss of a known solution is in no better one and goes. Over the few that stay runs a dynamic
   programme whose states (bytes, loss) are dropped when another is better in both, or when their own bound says so.

When the number of states stays below `states`, the result is the optimum and the gap 0. Otherwise the most promising
are kept, and what was dropped enters the bound: the gap is then what the result can be worse than the optimum at most.
"""

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import numpy as np


@dataclass(frozen=True)
class Allocation:
    """A scheme for each name. `bound`: no choice within the budget has a smaller loss; `gap` = loss - bound."""

    choice: dict[str, Hashable]
    loss: float
    bytes: int
    bound: float
    budget_bytes: int

    @property
    def gap(self) -> float:
        return self.loss - self.bound

    @property
    def exact(self) -> bool:
        """Whether this is proven to be the least loss (to rounding)."""
        return self.gap <= 0

    def __repr__(self) -> str:
        uses = {s: sum(c == s for c in self.choice.values()) for s in dict.fromkeys(self.choice.values())}
        mix = ", ".join(f"{n} x {s}" for s, n in sorted(uses.items(), key=lambda u: -u[1]))
        proof = "optimal" if self.exact else f"at most {self.gap:.3g} above the optimum"
        return f"Allocation(loss {self.loss:.6g}, {proof}, {self.bytes:,} of {self.budget_bytes:,} bytes: {mix})"


def allocate(costs: Mapping[str, Mapping[Hashable, tuple[float, int]]], budget_bytes: int, *, states: int = 1 << 15) -> Allocation:
    """The scheme of each name, of least total loss within `budget_bytes`: `costs` is {name: {scheme: (loss, bytes)}}.

    `states` bounds memory and time of the exact part (32,768 states over 100 weights take about a second). Raises
    ValueError for a budget below the least bytes possible, for a loss that is not finite and for bytes that are no
    whole number.

    >>> costs = {"a": {"int2": (9.0, 2), "int4": (1.0, 4)}, "b": {"int2": (3.0, 2), "int4": (2.0, 4)}}
    >>> allocate(costs, 6)
    Allocation(loss 4, optimal, 6 of 6 bytes: 1 x int4, 1 x int2)
    """
    items = _checked(costs, budget_bytes, states)
    price, bound, picked = _relax(items, budget_bytes)
    best = sum(float(loss[j]) for (loss, _), j in zip(items, picked, strict=True))
    # above the cheapest at this price; what exceeds the gap can't be in a better solution
    extra = [loss + price * size - (loss + price * size).min() for loss, size in items]
    alive = [np.flatnonzero(r < best - bound) for r in extra]
    if all(len(a) for a in alive):  # otherwise nothing can be better
        found, missed = _search(items, alive, budget_bytes, price, best, states)
        if found is not None:
            picked = found
            best = sum(float(loss[j]) for (loss, _), j in zip(items, picked, strict=True))
        bound = max(bound, min(best, missed))
    else:
        bound = best
    schemes = [list(options) for options in costs.values()]
    choice = {name: schemes[i][j] for i, (name, j) in enumerate(zip(costs, picked, strict=True))}
    total = sum(int(size[j]) for (_, size), j in zip(items, picked, strict=True))
    return Allocation(choice, best, total, min(bound, best), int(budget_bytes))


def _checked(costs, budget_bytes: int, states: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(losses float64, bytes int64) of each name's options, in their order."""
    if not costs:
        raise ValueError("costs={} is empty; give {name: {scheme: (loss, bytes)}}, as edgelab.sensitivity measures it")
    if _whole(budget_bytes) is None:
        raise ValueError(f"budget_bytes={budget_bytes!r} is no whole number of bytes; round it down")
    if _whole(states) is None or states < 1:
        raise ValueError(f"states={states!r} must be a whole number of at least 1; use 32768")
    items = []
    for name, options in costs.items():
        if not options:
            raise ValueError(f"{name} has no scheme to choose from; give it at least one")
        for scheme, (loss, size) in options.items():
            if not isfinite(loss):
                raise ValueError(f"the loss of {name} at {scheme} is {loss}; leave this scheme out")
            if _whole(size) is None or size < 0:
                raise ValueError(f"the bytes of {name} at {scheme} are {size!r}; give a whole number of at least 0")
        losses, sizes = zip(*options.values(), strict=True)
        items.append((np.array(losses, np.float64), np.array(sizes, np.int64)))
    least = sum(int(size.min()) for _, size in items)
    if least > budget_bytes:
        raise ValueError(
            f"budget_bytes={budget_bytes:,} is too small: with the smallest scheme for each of the {len(items)} weights they take "
            f"{least:,} bytes; raise the budget to that at least, or offer smaller schemes"
        )
    return items


def _whole(value) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _hull(loss: np.ndarray, size: np.ndarray) -> list[int]:
    """The options on the lower convex hull of (bytes, loss), from the smallest to the one of least loss."""
    hull: list[int] = []
    for j in np.lexsort((loss, size)).tolist():
        if hull and loss[j] >= loss[hull[-1]]:
            continue  # larger and no better
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (size[j] - size[b]) > (loss[b] - loss[j]) * (size[b] - size[a]):
                break
            hull.pop()  # b lies on or above the line from a to j
        hull.append(j)
    return hull


def _relax(items: list[tuple[np.ndarray, np.ndarray]], budget: int) -> tuple[float, float, list[int]]:
    """(price per byte, lower bound at it, a solution that fits): the greedy walk down the hulls."""
    hulls = [_hull(*item) for item in items]
    steps = []  # (loss saved per byte, weight, from, to)
    for i, ((loss, size), hull) in enumerate(zip(items, hulls, strict=True)):
        steps += [((loss[a] - loss[b]) / (size[b] - size[a]), i, a, b) for a, b in pairwise(hull)]
    steps.sort(key=lambda s: -s[0])  # stable: a weight's own steps keep their order, for hulls flatten
    picked = [hull[0] for hull in hulls]
    room = budget - sum(int(size[j]) for (_, size), j in zip(items, picked, strict=True))
    price = 0.0
    for slope, i, a, b in steps:
        more = int(items[i][1][b] - items[i][1][a])
        if picked[i] == a and more <= room:  # not at a: an earlier step of this weight did not fit
            picked[i], room = b, room - more
        elif not price:
            price = float(slope)  # the first step that does not fit: all dearer ones were taken
    bound = sum(float((loss + price * size).min()) for loss, size in items) - price * budget
    return price, bound, picked


def _search(items, alive: list[np.ndarray], budget: int, price: float, best: float, states: int) -> tuple[list[int] | None, float]:
    """(a solution with a loss below `best`, or None; the least bound of the states that were dropped for their number)."""
    loss = [item[0][a] for item, a in zip(items, alive, strict=True)]
    size = [item[1][a] for item, a in zip(items, alive, strict=True)]
    order = sorted(range(len(items)), key=lambda i: len(alive[i]))  # single options first: they make no states
    tail_bytes, tail_bound = 0, -price * budget  # of the weights still to come
    tail_bytes += sum(int(size[i].min()) for i in order)
    tail_bound += sum(float((loss[i] + price * size[i]).min()) for i in order)
    used, paid = np.zeros(1, np.int64), np.zeros(1)  # bytes and loss of each state
    trail, missed = [], np.inf
    for i in order:
        tail_bytes -= int(size[i].min())
        tail_bound -= float((loss[i] + price * size[i]).min())
        k = len(alive[i])
        u, p = (used[:, None] + size[i]).ravel(), (paid[:, None] + loss[i]).ravel()  # state * k + option
        low = p + price * u + tail_bound
        keep = np.flatnonzero((u + tail_bytes <= budget) & (low < best))
        keep = keep[np.lexsort((p[keep], u[keep]))]
        if len(keep) > 1:  # with more bytes there must be less loss
            keep = keep[np.r_[True, p[keep][1:] < np.minimum.accumulate(p[keep])[:-1]]]
        if len(keep) > states:
            ranked = np.argpartition(low[keep], states)
            missed = min(missed, float(low[keep[ranked[states:]]].min()))
            keep = keep[np.sort(ranked[:states])]
        if not len(keep):
            return None, missed
        used, paid = u[keep], p[keep]
        trail.append((keep // k, keep % k))
    state, picked = int(paid.argmin()), [0] * len(items)
    if paid[state] >= best:  # their bounds promised more than they hold
        return None, missed
    for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
        picked[i] = int(alive[i][option[state]])
        state = int(parent[state])
    return picked, missed
