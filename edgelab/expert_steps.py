"""Fewer experts: `DropExperts` and `MergeExperts` on a model, and routers that pass experts over without changing a shape.

Every layer loses as many, for the config has one number for all; which ones is each layer's own matter. All decisions see the
original model in one pass: a layer is not judged behind layers that were cut already.

`masked` computes what remains when experts are gone by letting the router decide among the others alone: a copy of it with
their rows only, whose choices are numbered back. So top-k, groups, biases and the normalisation of gates are the family's own,
and the result is that of `surgery.keep_experts` to rounding.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.evaluate import routers
from edgelab.expert_stats import ExpertStats, expert_stats, mixtures, output_of, routed
from edgelab.methods.experts import around_dominant, average_linkage, averaged, least, subset
from edgelab.model import family_of, weights
from edgelab.recipe import DropExperts, MergeExperts
from edgelab.surgery import keep_experts

_SAMPLE = 512  # tokens whose outputs NAEE rebuilds
_NAMES = ("num_experts", "n_routed_experts", "num_local_experts")


def shrink_experts(
    model: nn.Module, step: DropExperts | MergeExperts, batches: Sequence[Tensor] | None, progress: bool = True
) -> list[str]:
    """Takes experts out of `model` in place, as `step` says. Returns remarks. On the meta device only the shapes change.

    `batches` int64 [B, T] of calibration tokens; None will do for "random". Raises ValueError for a model without experts, a
    share that leaves fewer than a token chooses, and what `surgery.keep_experts` refuses.
    """
    places = mixtures(model)
    total = {name: model.get_submodule(name).weight.shape[0] for name in places}
    stay = {name: n - round(step.share * n) for name, n in total.items()}
    for name, n in stay.items():
        top_k = model.get_submodule(name).top_k
        if n < top_k:
            raise ValueError(
                f"share={step.share} leaves {n} of {total[name]} experts in {name}, but a token chooses {top_k}: "
                f"at most share={(total[name] - top_k) / total[name]:g}, or Route(top_k=...) first"
            )
    if next(model.parameters()).is_meta:
        keep_experts(model, {name: range(n) for name, n in stay.items()})
        return []
    if isinstance(step, MergeExperts):
        return _merge(model, step, stay, batches, progress)
    if step.method == "random":
        rng = np.random.default_rng(step.seed)
        kept = {name: sorted(rng.permutation(total[name])[:n].tolist()) for name, n in stay.items()}
        keep_experts(model, kept)
        return [f"experts kept at random: {_listed(kept)}"]
    stats = expert_stats(model, batches, all_tokens=False, progress=progress)
    how = ""
    if step.method == "naee":
        kept, every = _rebuilding(model, places, stay, batches)
        how = " (all subsets tried)" if every else " (greedy: too many subsets to try all)"
    else:
        scores = {"reap": lambda s: s.reap, "gate_mass": lambda s: s.gate_mass, "frequency": lambda s: s.counts}[step.method]
        gone = {name: least(scores(s), total[name] - stay[name]) for name, s in stats.items()}
        kept = {name: [e for e in range(total[name]) if e not in gone[name]] for name in places}
    lost = [float(1 - s.counts[kept[name]].sum() / s.counts.sum().clamp(min=1)) for name, s in stats.items()]
    keep_experts(model, kept)
    share = ", ".join(f"{100 * x:.0f}" for x in lost)
    return [
        f"{step.method}{how}: experts kept {_listed(kept)}; of the choices of the calibration tokens {share} % went to those that are gone"
    ]


def _listed(kept: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{name.rpartition('.')[0]}: {', '.join(map(str, experts))}" for name, experts in kept.items())


def _rebuilding(model: nn.Module, places: Mapping[str, str], stay: Mapping[str, int], batches) -> tuple[dict[str, list[int]], bool]:
    """{router: the experts whose mixture is nearest to that of all}, and whether all subsets of all layers were tried."""
    layout, seen = family_of(model).experts, {}
    handles = []
    for name in places:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        )
    try:
        model.eval()
        with torch.no_grad():
            read = 0
            for ids in batches:
                model(input_ids=ids, use_cache=False)
                read += ids.numel()
                if read >= _SAMPLE:
                    break
    finally:
        for h in handles:
            h.remove()
    kept, every = {}, True
    with torch.no_grad():
        for name, place in places.items():
            router, experts = model.get_submodule(name), model.get_submodule(place)
            x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen.pop(name)])
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_SAMPLE]]
            outputs = torch.stack([output_of(experts, x, e, layout) for e in range(router.weight.shape[0])])  # [E, n, hidden]

            def mixed(kept_here: Sequence[int], router=router, outputs=outputs, x=x) -> Tensor:
                _, gates, index = _among(router, kept_here)(x)
                _, gates, index = routed((x, gates, index), {})
                return (outputs[index.T, torch.arange(len(x))] * gates.T[..., None]).sum(0)

            whole = mixed(range(len(outputs)))
            kept[name], tried = subset(
                len(outputs), stay[name], lambda k, whole=whole, mixed=mixed: float((mixed(k) - whole).square().sum())
            )
            every = every and tried
    return kept, every


# --------------------------------------------------------------------------------------------------------------- merge


def _merge(model: nn.Module, step: MergeExperts, stay: Mapping[str, int], batches, progress: bool) -> list[str]:
    stats = expert_stats(model, batches, all_tokens=step.method == "outputs", progress=progress)
    clusters = {name: _clusters(s, step.method, stay[name]) for name, s in stats.items()}
    merge(model, clusters, {name: s.counts for name, s in stats.items()})
    told = "; ".join(f"{n.rpartition('.')[0]}: " + " ".join("+".join(map(str, c)) for c in found) for n, found in clusters.items())
    return [f"experts merged by {step.method}: {told}"]


def _clusters(stats: ExpertStats, method: str, count: int) -> list[list[int]]:
    return average_linkage(stats.mean_output, count) if method == "outputs" else around_dominant(stats.likeness, stats.counts, count)


def merge(model: nn.Module, clusters: Mapping[str, Sequence[Sequence[int]]], used: Mapping[str, Tensor]) -> None:
    """Makes one expert of each cluster {router: [[experts], ...]} of `model`, in place; `used` {router: [E]} weighs its members.

    The most used member of a cluster gives its row of the router, its biases and the order of inner neurons.
    """
    layout, places, kept = family_of(model).experts, mixtures(model), {}
    for name, groups in clusters.items():
        stacks = {w.parameter: w.tensor for w in weights(model) if w.module_name == places[name]}
        gate_up, down = stacks[layout.gate_up], stacks[layout.down]  # views [E, 2 * inner, hidden], [E, hidden, inner]
        inner = down.shape[-1]
        parted = gate_up.unflatten(1, (inner, 2)).transpose(1, 2) if layout.interleaved else gate_up.unflatten(1, (2, inner))
        new = [averaged(parted, down, group, used[name]) for group in groups]
        with torch.no_grad():
            for head, first, second in new:
                gate_up[head].copy_((first.transpose(0, 1) if layout.interleaved else first).reshape(gate_up.shape[1:]))
                down[head].copy_(second)
        kept[name] = sorted(head for head, _, _ in new)
    keep_experts(model, kept)


# ---------------------------------------------------------------------------------------------------------------- mask


@contextmanager
def masked(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, the routers named in `gone` never choose these experts. Raises ValueError when fewer than top-k would be left."""
    found, before = routers(model), []
    for name, experts in gone.items():
        if name not in found:
            raise ValueError(f"{name!r} is no router of this {type(model).__name__}; routers are {', '.join(found) or 'none'}")
        total = found[name].weight.shape[0]
        left = [e for e in range(total) if e not in set(experts)]
        if len(left) < found[name].top_k or not set(experts) <= set(range(total)):
            raise ValueError(
                f"{name}: without experts {sorted(experts)} there are {len(left)} of {total} left; a token chooses {found[name].top_k}"
            )
        before.append((found[name], _among(found[name], left)))
    saved = [(router, router.__dict__.get("forward")) for router, _ in before]
    try:
        for router, forward in before:
            router.forward = forward
        yield
    finally:
        for router, forward in saved:
            router.__dict__.pop("forward", None)
            if forward is not None:
                router.forward = forward


def _among(router: nn.Module, kept: Sequence[int]):
    """The forward of `router` with only the experts `kept` to choose from; (logits [N, E], gates, indices) in the old numbers."""
    kept, total = torch.as_tensor(list(kept)), router.weight.shape[0]
    small = copy.copy(router)
    small.__dict__ = dict(router.__dict__)
    small._forward_hooks, small._forward_pre_hooks = type(router._forward_hooks)(), type(router._forward_pre_hooks)()
    small.__dict__.pop("forward", None)

    def cut(values: dict) -> dict:
        return {k: v if v is None or v.ndim == 0 or v.shape[0] != total else _like(v, v.detach()[kept]) for k, v in values.items()}

    small._parameters, small._buffers = cut(router._parameters), cut(router._buffers)
    for attribute in _NAMES:
        if getattr(router, attribute, None) == total:
            small.__dict__[attribute] = len(kept)

    def forward(*args, **kwargs):
        logits, gates, index = small(*args, **kwargs)
        whole = logits.new_full((*logits.shape[:-1], total), -torch.inf)
        whole[..., kept] = logits
        if gates.shape != index.shape:  # a weight for every expert
            wide = gates.new_zeros(*gates.shape[:-1], total)
            wide[..., kept] = gates
            gates = wide
        return whole, gates, kept.to(index.device)[index]

    return forward


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
