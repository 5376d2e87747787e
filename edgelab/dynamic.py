"""Dynamic channel pruning: for each token, the inner channels of a feed-forward layer that say least are left out.

    h = act(gate x) * up x          [inner]
    y = down (h with the `share` of its smallest |h| set to 0)

Which channels these are differs from token to token, so no weight goes away (`PruneChannels` is for that); what goes is the
columns of `down` that a token needs (activation sparsity, as in CATS, arXiv 2404.08763, and TEAL, 2408.14690). It is done to
dense layers, shared experts and routed ones, in floating point or in codes.

**What is saved.** gate and up are computed in full, for h is what decides. Of the three products of a gated layer only `down`
shrinks: at share s by s, the layer by s / 3, and by as much the weights that decoding reads, if `down` is stored so that its columns
are contiguous and a kernel skips them. Torch's dense product multiplies by the zeros: here it saves nothing in time, and finding
the largest of `inner` numbers costs some. `report` says what arithmetic saves and what it costs in quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

from edgelab.blocks import _inner
from edgelab.early_exit import multiply_adds
from edgelab.layers import QExperts, gated
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import ExpertLayout, family_of
from edgelab.recipe import SkipChannels

_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


def keep_largest(h: Tensor, share: float) -> Tensor:
    """h [..., inner] with the int(share * inner) values of least magnitude of each row set to 0; one at least stays.

    >>> keep_largest(torch.tensor([[3.0, -1.0, 2.0, -4.0]]), 0.5)
    tensor([[ 3.,  0.,  0., -4.]])
    """
    n = h.shape[-1]
    kept = max(1, n - int(share * n))
    if kept == n:
        return h
    at = h.abs().topk(kept, dim=-1, sorted=False).indices
    return torch.zeros_like(h).scatter(-1, at, h.gather(-1, at))


# The stand-ins are bound methods on the instances, so that copy.deepcopy binds them to the copy; `_edgelab_skip` is the share.


def _mlp_forward(self, x: Tensor) -> Tensor:
    return self.down_proj(keep_largest(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self._edgelab_skip))


def _glu(self, y: Tensor) -> Tensor:
    return keep_largest(gated(y, self.act_fn, self.glu, self.limit, self.alpha), self._edgelab_skip)


def _experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    layout: ExpertLayout = self._edgelab_layout
    flat, k = top_k_index.flatten(), top_k_index.shape[1]
    rows = hidden_states.new_zeros(len(flat), hidden_states.shape[1])  # [tokens * k, hidden]
    for e in flat.unique().tolist():
        if e >= self.num_experts:  # none
            continue
        at = (flat == e).nonzero()[:, 0]
        h = keep_largest(_inner(self, hidden_states[at // k], e, layout), self._edgelab_skip)
        down = self._parameters[layout.down][e]
        y = h @ (down if layout.transposed else down.mT)
        rows[at] = (y + self._parameters[f"{layout.down}_bias"][e]) if layout.biased else y
    weights = top_k_weights.masked_fill(top_k_index >= self.num_experts, 0)
    return (rows.view(*top_k_index.shape, -1) * weights[..., None]).sum(1).to(hidden_states.dtype)


def skip_channels(model: nn.Module, step: SkipChannels) -> list[str]:
    """Remarks, after the feed-forward layers of `model` compute as `step` says. In place; again with another share replaces the first.

    Modules that are swapped in later know nothing of it: call it once more then, as `compress` and loading do.
    Raises ValueError for a model without a gated feed-forward layer that is known here.
    """
    layout, found = family_of(model).experts, 0
    for module in model.modules():
        kind = _kind(module, layout)
        if kind is None:
            continue
        found += 1
        module._edgelab_skip = float(step.share)
        if kind == "codes":
            module._is_swiglu = False  # the kernel that does all in one call keeps h to itself
            module._glu = MethodType(_glu, module)
        else:
            module._edgelab_layout = layout
            module.forward = MethodType(_mlp_forward if kind == "mlp" else _experts_forward, module)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward layer of gate_proj, up_proj and down_proj and no fused experts: "
            "channels of others can't be skipped"
        )
    dense, less = saved(model, step.share)
    return [
        f"{step.share:.0%} of the inner channels are left out of the down products of {found} layers, token by token: by arithmetic "
        f"{1 - less / dense:.1%} of the model's multiply-adds; torch's dense products save no time by it"
    ]


def _kind(module: nn.Module, layout: ExpertLayout | None) -> str | None:
    if isinstance(module, QExperts):
        return "codes"
    if all(hasattr(module, a) for a in _MLP) and isinstance(module.down_proj, nn.Module) and callable(module.act_fn):
        return "mlp"
    stacks = layout and all(getattr(module._parameters.get(p), "ndim", 0) == 3 for p in (layout.gate_up, layout.down))
    return "experts" if stacks else None


def saved(model: nn.Module, share: float) -> tuple[float, float]:
    """(multiply-adds per token of all weights, what is left when `share` of the inner channels is skipped in the down products)."""
    layout = family_of(model).experts
    each = multiply_adds(model)
    down = sum(n for name, n in each.items() if name.rpartition(".")[2] in ("down_proj", layout.down if layout else "down_proj"))
    total = sum(each.values())
    return total, total - share * down


@dataclass(frozen=True)
class SkipReport:
    """What skipping does on text: KL(original || skipping) in nats per token, and the share of multiply-adds that is left out."""

    share: float
    kld: float
    same_top: float
    saved: float


@torch.no_grad()
def report(original: nn.Module, skipping: nn.Module, batches: Sequence[Tensor]) -> SkipReport:
    """A `SkipReport` of `skipping`, to which `skip_channels` was done, on token ids [rows, length]."""
    share = next((m._edgelab_skip for m in skipping.modules() if hasattr(m, "_edgelab_skip")), None)
    if share is None:
        raise ValueError(f"{type(skipping).__name__} skips no channels; give the model that skip_channels was done to second")
    kld, same, tokens = 0.0, 0, 0
    for batch in batches:
        a, b = (m(input_ids=batch, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1) for m in (original, skipping))
        kld, same, tokens = kld + float(token_kl(a, b).sum()), same + int((a.argmax(-1) == b.argmax(-1)).sum()), tokens + len(a)
    total, less = saved(skipping, share)
    return SkipReport(share, kld / tokens, same / tokens, 1 - less / total)
