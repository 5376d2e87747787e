"""`QExpertsMixed`: the experts of one mixture in several schemes, each expert in its own.

Experts that share their schemes (of gate_up and of down) form a part, which is an ordinary `QExperts` with its packed
stacks and kernels. A call goes to every part with the choice of experts renumbered: one of the part's own gets its place
in it, every other the number of "none", which `QExperts` skips. The outputs add up to the mixture's, since each choice
of expert is computed in exactly one part:

    out = sum_k w_k f_{e_k}(x) = sum_parts sum_{k: e_k in part} w_k f_{e_k}(x)

The price over one stack is a call per part; rows of weights are read once either way. The names of single experts are
`<stack name>#<expert>`, such as `model.layers.1.mlp.experts.down_proj#3`: in recipes, in the coverage audit and in the
schemes of a saved model, from which the parts follow: in the order of their first experts.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.layers import Blank, QExperts
from edgelab.qtensor import QTensor
from edgelab.scheme import ActScheme

Experts = Sequence[QTensor | Blank]  # [out, in] each


def expert_of(name: str) -> tuple[str, int | None]:
    """(stack, expert) of a name; expert is None for a name without one.

    >>> expert_of("layers.1.mlp.experts.down_proj#3"), expert_of("lm_head")
    (('layers.1.mlp.experts.down_proj', 3), ('lm_head', None))
    """
    stack, mark, expert = name.partition("#")
    if mark and not expert.isdecimal():
        raise ValueError(f"{name!r} names no expert; write {stack}#0, {stack}#1 ...")
    return stack, int(expert) if mark else None


def gather(tensors: Mapping[str, QTensor | Blank]) -> dict[str, QTensor | Blank | tuple[QTensor | Blank, ...]]:
    """`tensors` with the experts `<stack>#<expert>` of each stack together: one plain stack if they share a scheme, else a tuple.

    Raises ValueError when an expert is missing, or a stack comes both whole and by expert.
    """
    found: dict[str, QTensor | Blank | tuple[QTensor | Blank, ...]] = {}
    experts: dict[str, dict[int, QTensor | Blank]] = {}
    for name, q in tensors.items():
        stack, expert = expert_of(name)
        if expert is None:
            found[stack] = q
        else:
            experts.setdefault(stack, {})[expert] = q
    for stack, one_by_one in experts.items():
        if stack in found:
            raise ValueError(f"{stack} is given both whole and by expert; give one of them")
        absent = next((e for e in range(len(one_by_one)) if e not in one_by_one), None)
        if absent is not None:
            raise ValueError(f"{stack}#{absent} has no codes, but {stack}#{max(one_by_one)} has: the experts of a stack go together")
        ordered = tuple(one_by_one[e] for e in range(len(one_by_one)))
        found[stack] = _stack(ordered) if len({q.scheme for q in ordered}) == 1 else ordered
    return found


def each(stack: QTensor | Blank | Experts) -> Experts:
    """The experts of a stack, or what is a sequence of them already."""
    if isinstance(stack, Blank):  # before the sequences: it is a tuple too
        return [Blank(tuple(stack.shape[1:]), stack.scheme)] * stack.shape[0]
    return [stack[e] for e in range(stack.shape[0])] if isinstance(stack, QTensor) else list(stack)


def _stack(experts: Experts) -> QTensor | Blank:
    """One stack [experts, out, in] of experts in one scheme."""
    first = experts[0]
    shape = (len(experts), *first.shape)
    if isinstance(first, Blank):
        return Blank(shape, first.scheme)
    offsets = None if first.offsets is None else np.stack([q.offsets for q in experts])
    return QTensor(np.stack([q.packed for q in experts]), np.stack([q.scales for q in experts]), shape, first.scheme, offsets)


class QExpertsMixed(nn.Module):
    """What `QExperts` computes, with a scheme of its own for each expert. `gate_up` and `down`: a stack, or one `QTensor` for each.

    The other settings are those of `QExperts`.
    """

    def __init__(
        self,
        gate_up: QTensor | Blank | Experts,
        down: QTensor | Blank | Experts,
        act_fn: Callable[[Tensor], Tensor] | None,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        **glu,
    ) -> None:
        super().__init__()
        gate_up, down = each(gate_up), each(down)
        if len(gate_up) != len(down) or not gate_up:
            raise ValueError(f"gate_up has {len(gate_up)} experts and down {len(down)}; they must be as many, and at least one")
        for what, experts in (("gate_up", gate_up), ("down", down)):
            odd = next((e for e, q in enumerate(experts) if tuple(q.shape) != tuple(experts[0].shape)), None)
            if odd is not None:
                raise ValueError(f"{what}: expert {odd} is {tuple(experts[odd].shape)}, expert 0 {tuple(experts[0].shape)}")
        groups: dict[tuple, list[int]] = {}
        for e, (a, b) in enumerate(zip(gate_up, down, strict=True)):
            groups.setdefault((a.scheme, b.scheme), []).append(e)
        self.groups = tuple(map(tuple, groups.values()))  # the experts of each part
        parts = []
        for group in self.groups:
            biases = (None if bias is None else bias[list(group)] for bias in (gate_up_bias, down_bias))
            part = QExperts(_stack([gate_up[e] for e in group]), _stack([down[e] for e in group]), act_fn, *biases, **glu)
            part.tied_to, part.is_part = None, True
            parts.append(part)
        self.parts = nn.ModuleList(parts)
        self.num_experts, self.hidden_dim, self.intermediate_dim = len(gate_up), parts[0].hidden_dim, parts[0].intermediate_dim
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] from hidden_states [T, hidden], top_k_index [T, k] and top_k_weights [T, k], as `QExperts`."""
        if top_k_index.is_floating_point():
            raise ValueError(f"top_k_index is {top_k_index.dtype}; it must hold the numbers of experts, as integers")
        low, high = (int(t) for t in top_k_index.aminmax()) if top_k_index.numel() else (0, 0)
        if low < 0 or high > self.num_experts:
            raise ValueError(
                f"top_k_index holds {low} .. {high}; experts are 0 .. {self.num_experts - 1}, and {self.num_experts} means none"
            )
        wide = hidden_states.float()  # the parts' outputs are added before they are rounded to the input's dtype
        out = torch.zeros_like(wide)
        for group, part in zip(self.groups, self.parts, strict=True):
            local = torch.full((self.num_experts + 1,), len(group), dtype=torch.int64)  # the last: none
            local[list(group)] = torch.arange(len(group))
            out += part(wide, local.to(top_k_index.device)[top_k_index.long()], top_k_weights)
        return out.to(hidden_states.dtype)

    def round_input_of(self, name: str, act: ActScheme | None, scale: float | None = None) -> None:
        """As of `QExperts`, for all parts."""
        for part in self.parts:
            part.round_input_of(name, act, scale)

    @property
    def acts(self) -> dict[str, ActScheme]:
        return self.parts[0].acts

    def qtensors(self) -> dict[str, list[QTensor]]:
        """The experts one by one, for "gate_up_proj" and "down_proj": read-only views, as those of `QExperts`."""
        found: dict[str, list] = {name: [None] * self.num_experts for name in ("gate_up_proj", "down_proj")}
        for group, part in zip(self.groups, self.parts, strict=True):
            for name, q in part.qtensors().items():
                for i, e in enumerate(group):
                    found[name][e] = q[i]
        return found

    def dequantized(self) -> dict[str, Tensor]:
        """Both stacks float32 [experts, out, in], on the layer's device."""
        parts = [part.dequantized() for part in self.parts]
        order = torch.tensor([e for group in self.groups for e in group]).argsort()
        return {name: torch.cat([p[name] for p in parts])[order.to(parts[0][name].device)] for name in parts[0]}

    def _bias(self, name: str) -> Tensor | None:
        parts = [getattr(part, name) for part in self.parts]
        if parts[0] is None:
            return None
        order = torch.tensor([e for group in self.groups for e in group]).argsort()
        return nn.Parameter(torch.cat(list(parts))[order.to(parts[0].device)], requires_grad=False)

    @property
    def gate_up_bias(self) -> Tensor | None:
        return self._bias("gate_up_bias")

    @property
    def down_bias(self) -> Tensor | None:
        return self._bias("down_bias")

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.parts)
