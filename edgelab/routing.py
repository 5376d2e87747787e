"""How many experts a token gets at run time: another top-k, top-p, skipping (`Route`), and what that costs in arithmetic.

`top_k` is a number of the config, the routers and the mixtures. `top_p` and `skip` are a forward hook on each router (a small
object, so that models stay picklable and copyable): a skipped choice keeps the expert's number and gets gate 0, and the
gates of the others take over its share where the router normalises (`methods.router`). Numbers stay as they were because
everything that reads a choice (loads, overlaps, caches) expects experts there.

What is saved: packed experts (`QExperts` and those made of them) are told "none" for a gate of 0, read nothing and compute
nothing. The modules of transformers have no "none" outside of expert parallelism: they compute the skipped expert and multiply
by 0. So `top_p` and `skip` save time in a quantized model, top_k in any, and `active_experts` counts what is needed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgelab.blocks import _forward, _quiet, checked_batches
from edgelab.evaluate import routers
from edgelab.layers import QExperts
from edgelab.methods import router as decide
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import family_of, quantized, weights
from edgelab.recipe import Route


def router_pairs(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """{name of a router: (router, the experts beside it)}, quantized ones too."""
    found = {}
    for name, router in routers(model).items():
        experts = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
        if experts is None:
            raise ValueError(f"the router {name} has no module 'experts' beside it: this mixture is not known here")
        found[name] = router, experts
    if not found:
        raise ValueError(f"this {type(model).__name__} has no experts (there are no routers in it): this is for mixtures of experts")
    return found


def route(model: nn.Module, step: Route) -> list[str]:
    """Remarks; from now on the routers of `model` choose as `step` says.

    Of several calls the last one's `top_p` and `skip` hold (None: no rule any more), and the last `top_k` that was given.

    Raises ValueError for a model without experts, and for a top_k above what a router can choose from.
    """
    known = router_pairs(model)
    for name, (router, _) in known.items():
        most = router.num_experts
        if (getattr(router, "num_group", None) or 1) > 1:
            most = router.topk_group * router.num_experts // router.num_group
        if step.top_k is not None and step.top_k > most:
            raise ValueError(f"top_k={step.top_k} of Route is more than the {most} experts that {name} chooses from; give {most} at most")
    told = []
    config = model.config.get_text_config()
    if step.top_k is not None:
        before = next(iter(known.values()))[0].top_k
        config.num_experts_per_tok = step.top_k
        for name, (router, _) in known.items():
            for module in (router, model.get_submodule(name.rpartition(".")[0])):
                for key in ("top_k", "num_experts_per_tok"):
                    if isinstance(getattr(module, key, None), int):
                        setattr(module, key, step.top_k)
        told.append(f"a token gets {step.top_k} of {next(iter(known.values()))[0].num_experts} experts instead of {before}")
    rule = None
    if step.top_p is not None or step.skip is not None:
        rule = _Rule(step.top_p, step.skip, _normalises(model, next(iter(known.values()))[0]))
        packed = all(isinstance(experts, QExperts | QExpertsMixed) for _, experts in known.values())
        saved = (
            "neither read nor computed" if packed else "computed all the same in floating point (gate 0): quantize first to save the time"
        )
        told.append(f"skipped experts are {saved}")
    for router, experts in known.values():
        for hooks, kind in ((router._forward_hooks, _Rule), (experts._forward_pre_hooks, _Spare)):
            for key in [k for k, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]
        if rule is not None:
            router.register_forward_hook(rule)
            if isinstance(experts, QExperts | QExpertsMixed):
                experts.register_forward_pre_hook(_Spare())
    return told


def _normalises(model: nn.Module, router: nn.Module) -> bool:
    always = family_of(model).model_type in ("mixtral", "granitemoe", "gpt_oss")
    return bool(getattr(router, "norm_topk_prob", always))


class _Rule:
    """A router's forward hook: gates of the choices that `top_p` and `skip` leave out become 0."""

    def __init__(self, top_p: float | None, skip: float | None, renormalise: bool) -> None:
        self.top_p, self.skip, self.renormalise = top_p, skip, renormalise

    def __call__(self, _router: nn.Module, _inputs, output):
        logits, gates, index = output
        kept = torch.ones_like(gates, dtype=torch.bool)
        if self.skip is not None:
            kept &= decide.near_best(gates, self.skip)
        if self.top_p is not None:
            kept &= decide.nucleus(gates, self.top_p)
        return logits, decide.without(gates, kept, self.renormalise), index


class _Spare:
    """A forward pre-hook of packed experts: what has gate 0 gets the number that means none."""

    def __call__(self, experts: nn.Module, args):
        x, index, gates = args
        return x, torch.where(gates == 0, experts.num_experts, index), gates


def active_experts(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """{router name: mean number of experts per token whose gate is not 0} over token ids int64 [B, T]."""
    known, batches = router_pairs(model), checked_batches(model, batches)
    sums, tokens = dict.fromkeys(known, 0.0), dict.fromkeys(known, 0)
    handles = []

    def count(name: str):
        def hook(_router, _inputs, output) -> None:
            gates = output[1].reshape(-1, output[1].shape[-1])
            sums[name] += decide.active(gates) * len(gates)
            tokens[name] += len(gates)

        return hook

    try:
        handles = [router.register_forward_hook(count(name)) for name, (router, _) in known.items()]
        with _quiet(model):
            for ids in batches:
                _forward(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / max(tokens[name], 1) for name in known}


def flops_per_token(model: nn.Module, active: Mapping[str, float] | None = None) -> dict[str, float]:
    """{role: floating-point operations per token, "all": their sum}: two for each weight that a token is multiplied by.

    Of a stack of experts, top_k of E count, or as many as `active` {router name: mean number} says. An embedding is looked up (0). Norms,
    activations and the products of attention with its context (which grow with it) are left out.

    >>> from types import SimpleNamespace
    >>> flops_per_token(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2, bias=False)))
    {'linear': 96.0, 'all': 96.0}
    """
    known = router_pairs(model) if routers(model) else {}
    shares = {}
    for name, (router, _) in known.items():
        count = router.top_k if active is None else active[name]
        shares[f"{name.rpartition('.')[0]}.experts"] = count / router.num_experts
    sizes = [(w.name, w.role, w.shape) for w in weights(model)]  # a tied head multiplies too
    sizes += [(name, role, q.shape) for name, (role, q) in quantized(model).items()]
    found: dict[str, float] = {}
    for name, role, shape in sizes:
        if role == "embedding":
            continue
        share = next((s for stack, s in shares.items() if name.startswith(f"{stack}.")), 1.0)
        found[role] = found.get(role, 0.0) + 2.0 * float(torch.Size(shape).numel()) * share
    return found | {"all": sum(found.values())}
