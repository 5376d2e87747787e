"""The `Prune` step: weights of a floating-point model become zero, in place. Scores and masks are `methods/prune.py`.

Order. Magnitude takes weight after weight. Wanda and SparseGPT walk the model block by block (`blocks.walk`), as both
papers' codes do: a block's statistics come from the block as it was, on the outputs of the blocks before it, which are
pruned already; then all of its weights are pruned, it is run again, and its new outputs are what the next block is
calibrated on. (SparseGPT, section 3.4 and algorithm 1; Wanda, section 3, "after pruning a layer, the updated activations".)
Experts are pruned one by one, each by the statistics of the tokens that the router sent to it, with those of the average
token added to those of rare ones (`methods.calibrate.shrink`). What has no input statistics, an embedding or what no token
reached, is pruned by magnitude.

Schedules, all with the same total:

- "uniform": the same share of every matrix, so of every expert.
- "global": one threshold for all. Magnitudes are compared as they are. Wanda's scores are divided by the mean score of their
  output row, since a score in one layer and one in another are not errors of the same thing; what is compared is then how
  uneven rows are. One threshold needs all scores at once: they come from one pass of the model as it was, and later blocks do
  not see pruned ones. Measured at 50 % on the embedded models (mean KLD on test text, dense / MoE; uniform .136 / .253): .152 /
  .259 so, .161 / .272 by the mean of each matrix, .323 / .338 by its root mean square, .574 / .526 as they are. Magnitude:
  uniform .166 / .319, global .251 / .432. One threshold is worse than none, on models whose matrices are alike in size.
- "sensitivity": a Fisher estimate of what each matrix loses at each of `LEVELS` sparsities near the wanted one, 1/2 sum w^2 F
  over the weights that the method's own mask would take (`edgelab.sensitivity`; for SparseGPT Wanda's mask), then shares
  that make the sum of losses least under the total (`methods.prune.share_out`). The estimate is of second order, sees no
  interplay, and gets worse as the error grows: hence no share is further than `REACH` from the wanted one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.blocks import walk
from edgelab.methods.calibrate import InputStats, rare, shrink
from edgelab.methods.prune import check_n_of_m, counts, keep, keep_global, keep_n_of_m, share_out, sparsegpt, wanda
from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.sparse import predicted_bytes
from edgelab.model import Weight, weights
from edgelab.recipe import Prune, matches
from edgelab.scheme import PerChannel, QuantScheme
from edgelab.sensitivity import _fisher_diagonal

REACH = 0.2  # the largest difference of a matrix's sparsity to the whole's, by "sensitivity"
LEVELS = 9  # sparsities that are tried within it
_SCAN_TOKENS = 16_384  # of the calibration set, for the Fisher estimate
Shares = Mapping[str, float | list[float]]


@torch.no_grad()
def prune(model: nn.Module, step: Prune, batches: Sequence[Tensor] | None, progress: bool = True) -> list[str]:
    """Remarks: the sparsity that each role ended up with, and what was done otherwise than the step says. In place.

    `batches` int64 [B, T] of calibration tokens; None will do for a step without data. Ties stay: a tied head follows its
    embedding. On the meta device nothing but the checks is done, and no remark comes back. Raises ValueError, before any change, for a
    selection that matches nothing or routers only, and a pattern that does not divide the inputs of a weight.
    """
    chosen, left_out = _selected(model, step)
    if step.pattern != "unstructured":
        for w in chosen:
            check_n_of_m(*_n_of_m(step), w.shape[-1], w.name)
    if any(w.tensor.is_meta for w in chosen):
        return []
    if not step.data_free and not batches:
        raise ValueError(f"method={step.method!r}, schedule={step.schedule!r} of Prune needs calibration data; pass batches")
    for w in chosen:
        broken = int((~torch.isfinite(w.tensor)).sum())
        if broken:
            raise ValueError(f"{w.name} holds {broken} NaN or infinite values of {w.tensor.numel()}: repair the checkpoint")
    remarks = [f"routers are not pruned: {', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''}"] if left_out else []
    if step.threshold is not None:
        for w in chosen:
            w.tensor.masked_fill_(w.tensor.abs() < step.threshold, 0.0)
    elif step.schedule == "global":
        _global(model, step, chosen, batches, progress, remarks)
    else:
        shares: Shares = {w.name: step.sparsity for w in chosen}
        if step.schedule == "sensitivity":
            shares = _sensitivity(model, step, chosen, batches, progress, remarks)
        _by_weight(model, step, chosen, shares, batches, progress, remarks)
    return remarks + _achieved(chosen, step)


def _n_of_m(step: Prune) -> tuple[int, int]:
    n, _, m = step.pattern.partition(":")
    return int(n), int(m)


def _selected(model: nn.Module, step: Prune) -> tuple[list[Weight], list[str]]:
    """The weights that are pruned, and the names of routers that the patterns match too."""
    every = weights(model)
    own = [w for w in every if not w.tied_to]
    chosen: dict[str, Weight] = {}
    routers: dict[str, None] = {}
    explicit = step.select != Prune.select
    for pattern in step.select:
        found = [w for w in own if matches(pattern, w.name, w.role)]
        if found and all(w.role == "router" for w in found):
            raise ValueError(
                f"select: {pattern!r} selects the router {found[0].name}; a router is a thousandth of the weights and decides about all "
                "others: leave it out"
            )
        tied = next((w for w in every if w.tied_to and matches(pattern, w.name, w.role)), None)
        if explicit and not found:
            if tied:
                raise ValueError(
                    f"select: {pattern!r} matches {tied.name}, which is tied to {tied.tied_to}; select that one, and both are pruned"
                )
            raise ValueError(f"select: {pattern!r} matches no weight of this {type(model).__name__}; names look like {_example(own)!r}")
        routers |= dict.fromkeys(w.name for w in found if w.role == "router")
        chosen |= {w.name: w for w in found if w.role != "router"}
    if not chosen:
        raise ValueError(f"select={step.select} matches no weight of this {type(model).__name__}; names look like {_example(own)!r}")
    return [w for w in own if w.name in chosen], list(routers)


def _example(listed: list[Weight]) -> str:
    return listed[-1].name if listed else "(it has no weights)"


def _achieved(chosen: list[Weight], step: Prune) -> list[str]:
    """What the weights have become."""
    zeros: dict[str, int] = {}
    sizes: dict[str, int] = {}
    empty = []
    for w in chosen:
        none = int((w.tensor == 0).sum())
        zeros[w.role], sizes[w.role] = zeros.get(w.role, 0) + none, sizes.get(w.role, 0) + w.tensor.numel()
        if none == w.tensor.numel():
            empty.append(w.name)
    parts = ", ".join(f"{role} {100 * zeros[role] / sizes[role]:.2f} %" for role in sizes)
    total, of = sum(zeros.values()), sum(sizes.values())
    how = f"{step.method}, {step.pattern if step.pattern != 'unstructured' else step.schedule}"
    told = [f"pruned ({how}): {total:,} of {of:,} weights are zero, {100 * total / of:.2f} % ({parts})"]
    if empty:
        told.append(f"nothing is left of {len(empty)} weights: {', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}")
    return told


# ------------------------------------------------------------------------------------------------------- weight by weight


def _by_weight(model, step: Prune, chosen: list[Weight], shares: Shares, batches, progress: bool, remarks: list[str]) -> None:
    left = {w.name: w for w in chosen}
    if step.method != "magnitude":
        readers = _readers(model, left)
        want = ("xx",) if step.method == "sparsegpt" else ()
        for item in walk(model, batches, want=want, sequential=True, progress=progress, only=readers):
            for reader, name in readers.items():
                if reader in item.stats and name in left:
                    w = left.pop(name)
                    _apply(w, step, shares[name], _usable(w, item.stats[reader], remarks))
        if left:
            remarks.append(f"{', '.join(left)}: no products of it are seen in calibration; pruned by magnitude")
    for w in left.values():
        _apply(w, step, shares[w.name], None)


def _apply(w: Weight, step: Prune, share: float | list[float], stats: InputStats | None) -> None:
    """Prune one weight in place; without statistics by magnitude."""
    n_of_m = None if step.pattern == "unstructured" else _n_of_m(step)
    if step.method == "sparsegpt" and stats is not None:
        w.tensor.copy_(sparsegpt(w.tensor, stats.xx, share, n_of_m=n_of_m, damping=step.damping, name=w.name))
        return
    mask = keep_n_of_m(_scores(w, step, stats), *n_of_m) if n_of_m else _mask(w, step, share, stats)
    w.tensor.masked_fill_(~mask, 0.0)


def _scores(w: Weight, step: Prune, stats: InputStats | None) -> Tensor:
    return w.tensor.float().abs() if step.method == "magnitude" or stats is None else wanda(w.tensor, stats.sum_sq)


def _mask(w: Weight, step: Prune, share: float | list[float], stats: InputStats | None) -> Tensor:
    """What stays by magnitude or Wanda's scores, `share` of each matrix (or one for all)."""
    within = "matrix" if step.method == "magnitude" or stats is None else "row"
    scores = _scores(w, step, stats)
    if isinstance(share, list):
        return torch.stack([keep(s, one, within) for s, one in zip(scores, share, strict=True)])
    return keep(scores, share, within)


def _readers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{weight whose inputs are wanted: the name that it is pruned under}: a tied head goes by its embedding's."""
    names = set(names)
    return {w.name: w.tied_to or w.name for w in weights(model) if (w.tied_to or w.name) in names and w.kind in ("linear", "experts")}


def _usable(w: Weight, stats: InputStats, remarks: list[str]) -> InputStats | None:
    """The statistics of a weight's inputs, of experts with the rare ones helped; None where no token came."""
    if not int(stats.count.sum()) and not (stats.pooled is not None and int(stats.pooled.count)):
        remarks.append(f"{w.name}: no calibration token reached it; pruned by magnitude")
        return None
    if stats.experts is not None:
        seen = rare(stats, w.shape[-1])
        if len(seen.rare):
            remarks.append(f"{w.name}: {seen}")
        stats = shrink(stats)
    return stats


# ------------------------------------------------------------------------------------------------------------ schedules


def _input_sums(model, step: Prune, chosen: list[Weight], batches, progress: bool, remarks: list[str]) -> dict[str, InputStats | None]:
    """The statistics of every chosen weight's inputs in the model as it is, without X X^T."""
    if step.method == "magnitude":
        return {}
    readers, named, found = _readers(model, [w.name for w in chosen]), {w.name: w for w in chosen}, {}
    for item in walk(model, batches, want=(), sequential=False, progress=progress, only=readers):
        found |= {name: _usable(named[name], item.stats[reader], remarks) for reader, name in readers.items() if reader in item.stats}
    return found


def _global(model, step: Prune, chosen: list[Weight], batches, progress: bool, remarks: list[str]) -> None:
    stats = _input_sums(model, step, chosen, batches, progress, remarks)
    scores = {w.name: _scores(w, step, stats.get(w.name)) for w in chosen}
    if step.method == "wanda":
        scores = {name: _normalised(s) for name, s in scores.items()}
    masks = keep_global(scores, step.sparsity)
    for w in chosen:
        w.tensor.masked_fill_(~masks[w.name], 0.0)


def _normalised(scores: Tensor) -> Tensor:
    """Divided by the mean of their output row."""
    return scores / scores.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _sensitivity(model, step: Prune, chosen: list[Weight], batches, progress: bool, remarks: list[str]) -> Shares:
    """The sparsity of each matrix (of a stack: a list) that the Fisher estimate gives it."""
    rows, seen = [], 0
    for ids in batches:
        rows.append(ids)
        seen += ids.numel()
        if seen >= _SCAN_TOKENS:
            break
    ignored: list[str] = []  # rare experts: told when they are pruned
    stats = _input_sums(model, step, chosen, batches, progress, ignored)
    squares = _fisher_diagonal(model, rows, chosen, 0, progress)
    low, high = max(0.0, step.sparsity - REACH), min(1.0, step.sparsity + REACH)
    levels = [low + (high - low) * i / (LEVELS - 1) for i in range(LEVELS)] if high > low else [low]
    losses: dict[str, list[float]] = {}
    for w in chosen:
        loss = w.tensor.float().square() * squares[w.name] / (2 * seen)
        for level in levels:
            gone = torch.where(_mask(w, step, level, stats.get(w.name)), 0.0, loss).flatten(-2).sum(-1, dtype=torch.float64)
            for unit, value in zip(_units(w), gone.reshape(-1).tolist(), strict=True):
                losses.setdefault(unit, []).append(value)
    sizes = {unit: math.prod(w.shape[-2:]) for w in chosen for unit in _units(w)}
    total = min(counts(step.sparsity, 1, sum(sizes.values()))[0], sum(math.floor(levels[-1] * n + 0.5) for n in sizes.values()))
    total = max(total, sum(math.floor(levels[0] * n + 0.5) for n in sizes.values()))
    zeros = share_out(losses, sizes, levels, total)
    shares = {unit: zeros[unit] / size for unit, size in sizes.items()}
    least, most = min(shares, key=shares.get), max(shares, key=shares.get)
    remarks.append(f"sensitivity gives {100 * shares[least]:.1f} % ({least}) to {100 * shares[most]:.1f} % ({most})")
    return {w.name: [shares[u] for u in _units(w)] if len(w.shape) == 3 else shares[w.name] for w in chosen}


def _units(w: Weight) -> list[str]:
    """The names of a weight's matrices."""
    return [f"{w.name}#{e}" for e in range(w.shape[0])] if len(w.shape) == 3 else [w.name]


# -------------------------------------------------------------------------------------------------------------- storage


class Storage(NamedTuple):
    """What a pruned weight or model takes in one format; shares of what all of it takes as float16 and as int4."""

    format: str
    bytes: int
    bits_per_weight: float
    of_float16: float
    of_int4: float


def storage_table(
    pruned: nn.Module | Tensor | np.ndarray, *, select: Sequence[str] = Prune.select, block: tuple[int, int] = (16, 16)
) -> list[Storage]:
    """The exact bytes of the weights of a model that `select` matches, or of one weight [..., out, in], format by format.

    First dense float16 and int4-g32 (int4-row where 32 does not divide), then `methods.sparse` of float16 values and a bitmap of int4
    codes, rounded to nearest: what rounds to zero is not stored either. "2:4" only where every group of four allows it. Nothing is
    encoded: `predicted_bytes` counts. Raises ValueError where nothing is selected.

    >>> rows = storage_table(torch.tensor([[0.0, 1.0, 0.0, 2.0] * 16] * 16))
    >>> [(r.format, r.bytes) for r in rows[:3]], rows[2].of_int4
    ([('float16', 2048), ('int4-g32', 576), ('bitmap float16', 1152)], 2.0)
    """
    if isinstance(pruned, nn.Module):
        tensors = [w.tensor for w in weights(pruned) if not w.tied_to and any(matches(p, w.name, w.role) for p in select)]
    else:
        tensors = [torch.as_tensor(pruned)]
    if not tensors:
        raise ValueError(f"select={tuple(select)} matches no floating-point weight of this {type(pruned).__name__}")
    totals: dict[str, int] = {}
    two_of_four = all(t.shape[-1] % 4 == 0 and int((t != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2 for t in tensors)
    for t in tensors:
        shape, there = tuple(t.shape), t != 0
        int4 = QuantScheme() if shape[-1] % 32 == 0 else QuantScheme(4, PerChannel())
        codes = round_to_nearest(t, int4).codes()
        left = int(there.sum())
        sizes = {
            "float16": 2 * t.numel(),
            "int4": int4.nbytes(shape),
            "bitmap float16": predicted_bytes("bitmap", shape, left),
            "csr float16": predicted_bytes("csr", shape, left),
        }
        rows, (high, wide) = there.reshape(-1, shape[-1]), block
        if len(rows) % high == 0 and shape[-1] % wide == 0:
            blocks = int(rows.reshape(len(rows) // high, high, -1, wide).any(3).any(1).sum())
            sizes[f"bsr {high}x{wide} float16"] = predicted_bytes("bsr", shape, blocks, block=block)
        if two_of_four:
            sizes["2:4 float16"] = predicted_bytes("n:m", shape, left, n_of_m=(2, 4))
        sizes["bitmap int4"] = predicted_bytes("bitmap", shape, int((codes != int4.zero_point).sum()), str(int4))
        for name, size in sizes.items():
            totals.setdefault(name, 0)
            totals[name] += size
    count, grouped = sum(t.numel() for t in tensors), all(t.shape[-1] % 32 == 0 for t in tensors)
    named = {n.replace("int4", "int4-g32" if grouped else "int4"): size for n, size in totals.items()}
    dense, int4_bytes = totals["float16"], totals["int4"]
    return [Storage(n, size, 8 * size / count, size / dense, size / int4_bytes) for n, size in named.items()]
