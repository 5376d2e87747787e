"""Fewer experts, or finer ones: `DropExperts` and `MergeExperts` on a model, routers that pass experts over, `split_experts`.

Every layer loses as many, for the config has one number for all; which ones is each layer's own matter. All decisions see the
original model in one pass: a layer is not judged behind layers that were cut already.

`masked` computes what remains when experts are gone by letting the router decide among the others alone: a copy of it with
their rows only, whose choices are numbered back. So top-k, groups, biases and the normalisation of gates are the family's own,
and the result is that of `surgery.keep_experts` to rounding.

`split_experts` rests on a sum: D act(G x)(U x) = sum_p D_p act(G_p x)(U_p x), for any deal of an expert's inner channels into
parts. E experts become parts * E finer ones whose router rows are copies; all copies of an expert have one score, so with
parts * top_k of them chosen the model computes what it did. A router that normalises its gates, or takes a softmax, gives each copy
1 / parts of the gate; `routed_scaling_factor`, or else the down projections, make that good. Many small experts of which few are
active are the shape of DeepSeekMoE (arXiv 2401.06066, section 3.1): `active=` chooses them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.blocks import _forward, _inner, _quiet, checked_batches
from edgelab.evaluate import routers
from edgelab.expert_stats import ExpertStats, expert_stats, mixtures, output_of, routed
from edgelab.methods.experts import around_dominant, average_linkage, averaged, deal, least, lost, subset
from edgelab.model import ExpertLayout, family_of, weights
from edgelab.recipe import DropExperts, MergeExperts
from edgelab.surgery import keep_experts

_SAMPLE = 4096  # tokens whose outputs NAEE rebuilds, at most
_GRAM_BYTES = 1 << 28  # of one layer's inner products for it: tokens * E * E * 4
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
                f"at most share={(total[name] - top_k) / total[name]:g}"
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
        how = " (all subsets tried)" if every else " (elimination and exchange: too many subsets to try all)"
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
    layout, batches = family_of(model).experts, checked_batches(model, batches)
    total = sum(ids.numel() for ids in batches)
    widest = max(model.get_submodule(name).weight.shape[0] for name in places)
    rows = torch.linspace(0, total - 1, min(total, _SAMPLE, max(1, _GRAM_BYTES // (4 * widest**2)))).round().long().unique()
    seen: dict[str, list[Tensor]] = {name: [] for name in places}
    read = dict.fromkeys(places, 0)

    def hook(name: str):
        def keep(_module, args) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            here = rows[(rows >= read[name]) & (rows < read[name] + len(x))] - read[name]
            read[name] += len(x)
            seen[name].append(x[here.to(x.device)])

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in places]
    try:
        with _quiet(model):
            for ids in batches:
                _forward(model, ids)
    finally:
        for h in handles:
            h.remove()
    kept, every = {}, True
    with torch.no_grad():
        for name, place in places.items():
            router, experts = model.get_submodule(name), model.get_submodule(place)
            x, count = torch.cat(seen.pop(name)), router.weight.shape[0]
            grams = []
            for part in x.split(512):  # [n, E, hidden] of so many tokens at a time
                f = torch.stack([output_of(experts, part, e, layout).float() for e in range(count)], 1)
                grams.append(f @ f.mT)
            gram = torch.cat(grams)

            def dense(kept_here: Sequence[int], router=router, x=x, count=count) -> Tensor:
                _, gates, index = routed((x, *_among(router, kept_here)(x)[1:]), {})
                return torch.zeros(len(x), count, device=x.device).scatter_(1, index, gates.float())

            whole = dense(range(count))
            kept[name], tried = subset(count, stay[name], lambda k, gram=gram, whole=whole, dense=dense: lost(gram, whole, dense(k)))
            every = every and tried
    return kept, every


# --------------------------------------------------------------------------------------------------------------- merge


def _merge(model: nn.Module, step: MergeExperts, stay: Mapping[str, int], batches, progress: bool) -> list[str]:
    stats = expert_stats(model, batches, all_tokens=step.method == "outputs", progress=progress)
    clusters = {name: clustered(s, step.method, stay[name]) for name, s in stats.items()}
    merge(model, clusters, {name: s.counts for name, s in stats.items()})
    told = "; ".join(f"{n.rpartition('.')[0]}: " + " ".join("+".join(map(str, c)) for c in found) for n, found in clusters.items())
    return [f"experts merged by {step.method}: {told}"]


def clustered(stats: ExpertStats, method: str, count: int) -> list[list[int]]:
    """The experts of one mixture in `count` clusters: by "outputs" or "router", as `MergeExperts` says."""
    return average_linkage(stats.mean_output, count) if method == "outputs" else around_dominant(stats.likeness, stats.counts, count)


def merge(model: nn.Module, clusters: Mapping[str, Sequence[Sequence[int]]], used: Mapping[str, Tensor], *, all_rows: bool = False) -> None:
    """Makes one expert of each cluster {router: [[experts], ...]} of `model`, in place; `used` {router: [E]} weighs its members.

    The most used member of a cluster gives its row of the router, its biases and the order of inner neurons; the other rows go, so
    that what remains is an ordinary, smaller mixture. `all_rows`: every row of the router stays and leads to its cluster's expert, as
    in the papers. That loses less; no ordinary checkpoint can say that rows share an expert, so here it is stored once per row, and
    serves to measure what the rows are worth.
    """
    layout, places, kept = family_of(model).experts, mixtures(model), {}
    for name, groups in clusters.items():
        if sorted(e for g in groups for e in g) != list(range(len(used[name]))) or not all(len(g) for g in groups):
            raise ValueError(
                f"{name}: the groups {[list(g) for g in groups]} must hold each of the experts 0 .. {len(used[name]) - 1} once"
            )
        stacks = {w.parameter: w.tensor for w in weights(model) if w.module_name == places[name]}
        gate_up, down = stacks[layout.gate_up], stacks[layout.down]  # views [E, 2 * inner, hidden], [E, hidden, inner]
        inner = down.shape[-1]
        parted = gate_up.unflatten(1, (inner, 2)).transpose(1, 2) if layout.interleaved else gate_up.unflatten(1, (2, inner))
        new = [averaged(parted, down, group, used[name]) for group in groups]
        with torch.no_grad():
            for group, (head, first, second) in zip(groups, new, strict=True):
                for e in group if all_rows else [head]:
                    gate_up[e].copy_((first.transpose(0, 1) if layout.interleaved else first).reshape(gate_up.shape[1:]))
                    down[e].copy_(second)
                    for part in (layout.gate_up, layout.down) if layout.biased else ():
                        bias = getattr(model.get_submodule(places[name]), f"{part}_bias")
                        bias[e].copy_(bias[head])
        kept[name] = sorted(head for head, _, _ in new)
    if not all_rows:
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


# --------------------------------------------------------------------------------------------------------------- split


@torch.no_grad()
def split_experts(model: nn.Module, parts: int = 8, batches: Sequence[Tensor] | None = None, *, active: int | None = None) -> list[str]:
    """Makes `parts` finer experts of each, in place, and a token choose `active` of them. Returns remarks.

    By default parts * top_k are active, and the function is the same. With fewer an approximation: expert e becomes
    parts * e .. parts * e + parts - 1, the most important inner channels first (by E[(g h)^2] |down column|^2 over `batches`, or
    by the norms of the weights without them), and where the router has a bias for selection (DeepSeek), steps of 2.4e-7 in it order
    the copies, so that the first parts are chosen first; other routers may take any. Gates that are normalised sum to what
    min(parts, active) parts of one expert would have had: a token that gets less than one expert must not count it as a whole one.

    Raises ValueError when `parts` does not divide the inner channels, for an `active` outside of 1 .. parts * top_k, and for routers that
    choose groups of experts first.
    """
    places, layout, config = mixtures(model), family_of(model).experts, model.config.get_text_config()
    found = {name: (model.get_submodule(name), model.get_submodule(place)) for name, place in places.items()}
    total = next(iter(found.values()))[0].weight.shape[0]
    for name, (router, _) in found.items():
        if (getattr(router, "num_group", None) or 1) > 1:
            raise ValueError(
                f"{name} picks groups of experts first (n_group = {router.num_group}); only models with n_group = 1 can be split"
            )
    whole = parts * next(iter(found.values()))[0].top_k
    active = whole if active is None else active
    if not 1 <= active <= whole:
        raise ValueError(
            f"active={active} of the finer experts; give 1 .. {whole}, which is all parts of the experts that a token chose before"
        )
    importance = _importance(model, places, batches)
    plans = {name: torch.stack([deal(v, parts) for v in importance[name]]) for name in places}  # [E, parts, n]
    scaled = hasattr(config, "routed_scaling_factor")
    if getattr(next(iter(found.values()))[0], "norm_topk_prob", True):
        factor = float(min(parts, active))
    else:  # a sigmoid's gates are those of the whole expert, a softmax over copies gives each 1 / parts
        factor = 1.0 if scaled else float(parts)
    for name, (router, experts) in found.items():
        _split_stacks(experts, layout, plans[name], 1.0 if scaled else factor)
        for tensors in (router._parameters, router._buffers):
            for t in (t for t in tensors.values() if t is not None and t.ndim and t.shape[0] == total):
                t.data, t.grad = t.detach().repeat_interleave(parts, 0), None
        if active < whole and "e_score_correction_bias" in router._buffers:  # a step that is far below what tells experts apart
            router.e_score_correction_bias -= torch.arange(parts, device=router.weight.device).repeat(total) * 2.0**-22
        if scaled:
            router.routed_scaling_factor *= factor
        for module in (router, experts, model.get_submodule(name.rpartition(".")[0])):
            for key in (*_NAMES, "top_k", "num_experts_per_tok"):
                if isinstance(vars(module).get(key), int):
                    setattr(module, key, active if "experts" not in key or "per_tok" in key else vars(module)[key] * parts)
        for key in ("intermediate_dim", "intermediate_size"):
            if isinstance(vars(experts).get(key), int):
                setattr(experts, key, vars(experts)[key] // parts)
    for key in [f for f in _NAMES if getattr(config, f, None) == total]:  # all at once: they may be names of one number
        setattr(config, key, total * parts)
    config.num_experts_per_tok = next(iter(found.values()))[0].top_k
    width = "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"
    setattr(config, width, getattr(config, width) // parts)
    if getattr(config, "n_shared_experts", None):  # DeepSeek: their width is that many experts'
        config.n_shared_experts *= parts
    if scaled:
        config.routed_scaling_factor = next(iter(found.values()))[0].routed_scaling_factor
    return [f"{total} experts became {total * parts} of 1/{parts} the width; a token chooses {config.num_experts_per_tok}"]


def _split_stacks(experts: nn.Module, layout: ExpertLayout, plan: Tensor, factor: float) -> None:
    """Deals the channels as `plan` [E, parts, n] says; the down projections are multiplied by `factor`, not their biases."""
    parts, n = plan.shape[1:]
    flat = plan.flatten(1)  # [E, inner]
    both = torch.stack([2 * flat, 2 * flat + 1], -1).flatten(1) if layout.interleaved else None

    def rows(t: Tensor) -> Tensor:
        """[E, 2 * inner, ...] to [E * parts, 2 * n, ...]"""
        if layout.interleaved:
            picked = torch.stack([x[i.to(x.device)] for x, i in zip(t, both, strict=True)])
            return picked.unflatten(1, (parts, 2 * n)).flatten(0, 1)
        halves = t.unflatten(1, (2, -1))  # [E, 2, inner, ...]
        picked = torch.stack([x[:, i.to(x.device)] for x, i in zip(halves, flat, strict=True)])
        return picked.unflatten(2, (parts, n)).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    stacks = {key: p.detach().mT if layout.transposed else p.detach() for key, p in experts.named_parameters(recurse=False) if p.ndim == 3}
    down = stacks[layout.down].mT  # [E, inner, hidden]
    down = torch.stack([x[i.to(x.device)] for x, i in zip(down, flat, strict=True)]).unflatten(1, (parts, n)).flatten(0, 1).mT * factor
    new = {layout.gate_up: rows(stacks[layout.gate_up]), layout.down: down}
    new = {key: (t.mT if layout.transposed else t).contiguous() for key, t in new.items()}
    if layout.biased:
        new[f"{layout.gate_up}_bias"] = rows(getattr(experts, f"{layout.gate_up}_bias").detach())
        new[f"{layout.down}_bias"] = getattr(experts, f"{layout.down}_bias").detach().repeat_interleave(parts, 0)
    for key, t in new.items():
        parameter = getattr(experts, key)
        parameter.data, parameter.grad = t, None


def _importance(model: nn.Module, places: Mapping[str, str], batches: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """{router: float64 [E, inner]}: about what the layer's output loses, squared, without each channel."""
    layout, found = family_of(model).experts, {}
    for name, place in places.items():
        stacks = {w.parameter: w.tensor for w in weights(model) if w.module_name == place}
        columns = stacks[layout.down].double().square().sum(1)  # [E, inner]
        norms = stacks[layout.gate_up].double().square().sum(-1)
        gate, up = (norms[:, ::2], norms[:, 1::2]) if layout.interleaved else norms.chunk(2, 1)
        found[name] = columns * (gate * up if batches is None else 1.0)
    if batches is None:
        return found
    squares = {name: torch.zeros_like(v) for name, v in found.items()}

    def hook(name: str):
        def see(module, args, kwargs) -> None:
            x, gates, index = routed(args, kwargs)
            for e in range(len(squares[name])):
                token, slot = (index == e).nonzero(as_tuple=True)
                h = _inner(module, x[token], e, layout).double() * gates[token, slot, None].double()
                squares[name][e] += h.square().sum(0)

        return see

    handles = [model.get_submodule(place).register_forward_pre_hook(hook(name), with_kwargs=True) for name, place in places.items()]
    try:
        with _quiet(model):
            for ids in checked_batches(model, batches):
                _forward(model, ids)
    finally:
        for h in handles:
            h.remove()
    return {name: v * squares[name] for name, v in found.items()}
