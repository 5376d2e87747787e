"""Change the shape of a model in place: fewer experts, feed-forward channels, attention heads or decoder blocks.

What goes is cut out of the stored tensors, so that the model gets smaller and faster everywhere, without sparse kernels. For a
gated feed-forward y = D (act(G x) * (U x)) and any subset K of its inner channels, the cut model computes exactly what the
old one computes with the columns of D outside K at zero:

    y_K = D[:, K] (act(G[K] x) * (U[K] x))

The same holds for heads (columns of o_proj at zero) and blocks (o_proj and the feed-forward's output at zero). For experts the
cut model equals the old one with a router logit of -inf for those that are gone: its softmax runs over the ones that stay.
Which to keep is not decided here. Sources: heads, Michel et al. 2019 (arXiv 1905.10650); channels and heads by importance,
Minitron (arXiv 2407.14679, section 2); experts, Lu et al. 2024 (arXiv 2402.14800); blocks, ShortGPT (arXiv 2403.03853).

The price of a plain Hugging Face model is that its config has one number for all layers: every layer keeps as many, though
not the same ones. So each call works in two steps. A plan lists the cuts, {(module, parameter): (dimension, index)}, and the
config fields; a model of the new config is made on the meta device (shapes only) and every planned shape must be the one it
asks for. Only then is anything changed: after a ValueError the model is as it was. A `Parameter` stays the same object, with
its dtype, its device, `requires_grad` and whatever it is tied to; a gradient of the old shape is dropped. Models on the
meta device work too. Cut first, quantize after: quantized layers are refused.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgelab.blocks import decoder_blocks
from edgelab.evaluate import routers
from edgelab.layers import Quantized
from edgelab.model import ExpertLayout, family_of

_EXPERT_FIELDS = ("n_routed_experts", "num_local_experts", "num_experts")  # the same number under each family's name
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # config fields with one entry per block
_WIDTHS = ("intermediate_size", "intermediate_dim")  # attributes of feed-forwards and of expert stacks


def keep_experts(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Nothing; `model` has only the experts `kept[router]` left, in that order, of every router of `evaluate.routers(model)`.

    Cuts the stacks [E, ...] and their biases, the router's weight [E, hidden], its bias and `e_score_correction_bias` [E].

    Raises ValueError for a router that is missing or unknown, for numbers that differ between layers, for fewer experts than a
    token picks (top_k), and for DeepSeek's groups of experts (n_group > 1), which are runs of equal length.
    """
    plan, found, layout = _Plan(model), routers(model), family_of(model).experts
    if not found or layout is None:
        raise ValueError(f"model: this {type(model).__name__} has no routers with a known layout of experts; see edgelab.model.FAMILIES")
    count = _one_length("kept", kept, found, "router", "experts")
    for name, router in found.items():
        if (getattr(router, "num_group", None) or 1) > 1:
            raise ValueError(
                f"{name} picks groups of experts first (n_group = {router.num_group}): whole groups of equal size would have to go; "
                "only models with n_group = 1 can lose experts"
            )
        old, least = router.weight.shape[0], max(router.top_k, 2 if hasattr(router, "num_group") else 1)
        if count < least:
            raise ValueError(f"{name}: {count} experts would stay, but each token picks {router.top_k}; keep at least {least}")
        index = _index(name, kept[name], old, "expert")
        moe = name.rpartition(".")[0]
        stacks = [n for n in _stacks(model, layout) if n.rpartition(".")[0] == moe]
        if len(stacks) != 1:
            raise ValueError(f"{name}: {len(stacks)} stacks of experts beside it; a router must have one")
        for parameter in ("weight", "bias", "e_score_correction_bias"):
            plan.cut(name, parameter, 0, index)
        for parameter in (layout.gate_up, layout.down, f"{layout.gate_up}_bias", f"{layout.down}_bias"):
            plan.cut(stacks[0], parameter, 0, index)
        for module_name in (name, stacks[0], moe, ""):
            plan.attribute(module_name, "num_experts", old, count)
    plan.fields |= {f: count for f in _EXPERT_FIELDS if getattr(plan.config, f, None) == old}
    plan.carry_out()


def keep_channels(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Nothing; the feed-forwards named in `kept` have only these inner channels left, in that order.

    A dense or a shared feed-forward (up_proj, down_proj and mostly gate_proj) takes int64 [n], a stack of experts (the module
    that holds gate_up_proj) [E, n]. There are three kinds, dense, experts and shared, and of a kind all or none must be named:
    the config has one width for each. DeepSeek has no field for the width of the shared experts but moe_intermediate_size *
    n_shared_experts; its second factor is set to what fits.

    Raises ValueError for modules that are missing or unknown, for widths that differ or that the config cannot express.
    """
    plan, layout = _Plan(model), family_of(model).experts
    kinds: dict[str, list[str]] = {"dense": [], "experts": _stacks(model, layout) if layout else [], "shared": []}
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, p, None), nn.Linear) for p in ("up_proj", "down_proj")):
            kinds["shared" if "shared_expert" in name else "dense"].append(name)
    _known("kept", kept, [n for names in kinds.values() for n in names], "feed-forward")
    widths: dict[str, int] = {}
    for kind, names in kinds.items():
        given = {n: kept[n] for n in names if n in kept}
        if not given:
            continue
        called = "stack of experts" if kind == "experts" else f"{kind} feed-forward"
        widths[kind] = _one_length("kept", given, names, called, "channels", lambda t: torch.as_tensor(t).shape[-1])
        for name in names:
            module = model.get_submodule(name)
            old = _cut_stack(plan, name, kept[name], layout) if kind == "experts" else _cut_mlp(plan, name, kept[name])
            for attribute in _WIDTHS:
                plan.attribute(name, attribute, old, widths[kind])
    config = plan.config
    if "dense" in widths:
        plan.fields["intermediate_size"] = widths["dense"]
    if "experts" in widths:
        plan.fields["moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size"] = widths["experts"]
    if "shared" in widths and hasattr(config, "shared_expert_intermediate_size"):
        plan.fields["shared_expert_intermediate_size"] = widths["shared"]
    elif kinds["shared"] and hasattr(config, "n_shared_experts") and {"shared", "experts"} & set(widths):
        one = widths.get("experts", config.moe_intermediate_size)
        module = model.get_submodule(kinds["shared"][0])
        width = widths.get("shared", module.up_proj.weight.shape[0])
        if width % one:
            raise ValueError(
                f"{kinds['shared'][0]} would have {width} channels and an expert {one}: the config says moe_intermediate_size * "
                f"n_shared_experts for the first, so keep a multiple of {one} channels of each shared feed-forward"
            )
        plan.fields["n_shared_experts"] = width // one
    plan.carry_out()


def keep_heads(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Nothing; every attention has only the key-value heads `kept[name]` left, in that order, each with all its queries.

    Cuts rows of q_proj, k_proj, v_proj, their biases, gpt_oss's sinks, and columns of o_proj. In multi-head latent attention
    (DeepSeek) a head is its rows of q_proj or q_b_proj and of kv_b_proj, and its columns of o_proj; the latents stay.
    The config gets an explicit head_dim, since hidden_size / num_attention_heads no longer gives it.

    Raises ValueError for an attention that is missing or unknown, for numbers that differ between layers, for a norm that
    runs over all heads (OLMoE: its mean square would change and its width is hidden_size), and for a config that refuses the
    number (Llama wants hidden_size to be a multiple of num_attention_heads).
    """
    plan = _Plan(model)
    found = [n for n, m in model.named_modules() if _has_heads(m)]
    if not found:
        raise ValueError(f"model: this {type(model).__name__} has no attention with q_proj, k_proj, v_proj and o_proj (or kv_b_proj)")
    count = _one_length("kept", kept, found, "attention", "heads")
    if count == 0:
        raise ValueError(f"{found[0]}: no head would stay; keep at least 1 (keep_layers drops whole blocks)")
    for name in found:
        module = model.get_submodule(name)
        latent = hasattr(module, "kv_b_proj")
        if latent:
            per, value = module.qk_nope_head_dim + module.v_head_dim, module.v_head_dim
            key_like, queries, group = {"kv_b_proj": per}, module.qk_head_dim, 1
            heads = module.kv_b_proj.weight.shape[0] // per
        else:
            queries = value = module.head_dim
            key_like, heads = {"k_proj": module.head_dim, "v_proj": module.head_dim}, module.k_proj.weight.shape[0] // module.head_dim
            group = module.q_proj.weight.shape[0] // module.head_dim // heads
        for norm in ("q_norm", "k_norm"):
            weight = getattr(getattr(module, norm, None), "weight", None)
            if weight is not None and weight.numel() != queries:
                raise ValueError(
                    f"{name}.{norm} runs over all heads at once ({weight.numel()} wide, a head has {queries}): without some of them "
                    f"the rest would be scaled differently, and {type(plan.config).__name__} can't say its new width"
                )
        index = _index(name, kept[name], heads, "head")
        q = "q_proj" if isinstance(getattr(module, "q_proj", None), nn.Linear) else "q_b_proj"
        for linear, rows in key_like.items():
            plan.cut_linear(f"{name}.{linear}", 0, _spread(index, rows))
        plan.cut_linear(f"{name}.{q}", 0, _spread(index, group * queries))
        plan.cut_linear(f"{name}.o_proj", 1, _spread(index, group * value))
        plan.cut(name, "sinks", 0, _spread(index, group))
        for attribute, each in (("num_heads", group), ("num_attention_heads", group), ("num_key_value_heads", 1)):
            plan.attribute(name, attribute, heads * each, count * each)
    plan.fields |= {"num_attention_heads": count * group, "num_key_value_heads": count}
    if not latent:  # DeepSeek's config makes its head_dim itself, of the rotary part
        plan.fields["head_dim"] = queries
    plan.carry_out()


def keep_layers(model: nn.Module, kept: Sequence[int]) -> None:
    """Nothing; `model` has only the decoder blocks `kept` left (ascending), numbered anew from 0.

    In the config: num_hidden_layers, layer_types and their like, first_k_dense_replace, mlp_only_layers and
    decoder_sparse_step, max_window_layers. In the blocks: every layer_idx (the key-value cache goes by it).

    Raises ValueError for no blocks, for indices that are out of range or not ascending.
    """
    plan, chain = _Plan(model), decoder_blocks(model)
    if not chain:
        raise ValueError(f"model: this {type(model).__name__} is no chain of blocks of one class")
    old, config = len(chain), plan.config
    root = chain[0][0].rpartition(".")[0]
    kept = _index(root, kept, old, "block").tolist()
    if not kept or kept != sorted(kept):
        raise ValueError(f"kept = {kept}: at least one block must stay, and in the order of the model (ascending indices)")
    plan.fields["num_hidden_layers"] = len(kept)
    for name in _PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(value) == old:
            plan.fields[name] = [value[i] for i in kept]
    for name in ("first_k_dense_replace", "max_window_layers"):  # the number of blocks before which something holds
        value = getattr(config, name, None)
        if value is not None:
            plan.fields[name] = sum(i < value for i in kept)
    if hasattr(config, "decoder_sparse_step"):  # every step-th block has experts: true of the old numbers only, so list the others
        sparse = {int(n.removeprefix(f"{root}.").split(".")[0]) for n in routers(model)}
        plan.fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, i in enumerate(kept) if i not in sparse]}
    plan.blocks = (root, kept)
    plan.carry_out()


# ---------------------------------------------------------------------------------------------------------- plan


@dataclass
class _Plan:
    """What will be cut, {(module, parameter): (dimension, index)}, which attributes and which config fields change."""

    model: nn.Module
    cuts: dict[tuple[str, str], tuple[int, Tensor]] = field(default_factory=dict)
    attributes: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    fields: dict[str, object] = field(default_factory=dict)
    blocks: tuple[str, list[int]] | None = None

    def __post_init__(self):
        if not hasattr(getattr(self.model, "config", None), "get_text_config"):
            raise ValueError(f"model: a {type(self.model).__name__} has no transformers config; surgery needs a PreTrainedModel")
        name = next((n for n, m in self.model.named_modules() if isinstance(m, Quantized)), None)
        if name:
            kind = type(self.model.get_submodule(name)).__name__
            raise ValueError(f"model: {name} is quantized already ({kind}); cut first, quantize after")

    @property
    def config(self):
        return self.model.config.get_text_config()

    def cut(self, module_name: str, parameter: str, dim: int, index: Tensor) -> None:
        """Plan one cut; nothing for a parameter that the module lacks (most have no bias)."""
        if isinstance(getattr(self.model.get_submodule(module_name), parameter, None), Tensor):
            self.cuts[module_name, parameter] = (dim, index)

    def cut_linear(self, module_name: str, dim: int, index: Tensor) -> None:
        """Rows (dim 0) go from the bias too, columns (dim 1) do not."""
        if not isinstance(self.model.get_submodule(module_name), nn.Linear):
            kind = type(self.model.get_submodule(module_name)).__name__
            raise ValueError(f"{module_name} is a {kind}, no nn.Linear: cut a model before its layers are wrapped")
        self.cut(module_name, "weight", dim, index)
        if dim == 0:
            self.cut(module_name, "bias", 0, index)

    def attribute(self, module_name: str, name: str, old: int, new: int) -> None:
        """Plan a new value for an attribute, if the module has it and it means what we think (it has the old value)."""
        module = self.model.get_submodule(module_name)
        value = getattr(module, name, None)
        if isinstance(value, int) and value == old:
            self.attributes.append((module, name, new))

    def carry_out(self) -> None:
        """Check the planned shapes against a model of the new config, then change the model, its attributes and its config."""
        self._check()
        done = {}  # a tied tensor is cut once
        for (module_name, parameter), (dim, index) in self.cuts.items():
            module = self.model.get_submodule(module_name)
            tensor = getattr(module, parameter)
            if id(tensor) not in done:
                done[id(tensor)] = tensor
                tensor.data, tensor.grad = _take(tensor.detach(), dim, index), None
            if isinstance(module, nn.Linear) and parameter == "weight":
                module.out_features, module.in_features = tensor.shape
        for module, name, value in self.attributes:
            setattr(module, name, value)
        if self.blocks:
            root, kept = self.blocks
            chain = self.model.get_submodule(root)
            for i in reversed(range(len(chain))):
                if i not in kept:
                    del chain[i]
            for i, block in enumerate(chain):
                for module in block.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = i
        for name, value in self.fields.items():
            setattr(self.config, name, value)

    def _shapes(self) -> dict[str, list[int]]:
        """{name in the state dict: shape} of the model once the plan is carried out."""
        planned: dict[int, tuple[str, int, Tensor]] = {}  # by tensor: a tied one has several names
        for (module_name, parameter), (dim, index) in self.cuts.items():
            name, tensor = f"{module_name}.{parameter}", getattr(self.model.get_submodule(module_name), parameter)
            first, d, other = planned.setdefault(id(tensor), (name, dim, index))
            if d != dim or not torch.equal(other, index):
                raise ValueError(f"{name} is tied to {first}: both must keep the same, in the same order")
        shapes = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            shape = list(tensor.shape)
            if id(tensor) in planned:
                _, dim, index = planned[id(tensor)]
                shape[dim] = index.shape[-1]
            if self.blocks and name.startswith(f"{self.blocks[0]}."):
                root, kept = self.blocks
                number, _, rest = name.removeprefix(f"{root}.").partition(".")
                if int(number) not in kept:
                    continue
                name = f"{root}.{kept.index(int(number))}.{rest}"
            shapes[name] = shape
        return shapes

    def _check(self) -> None:
        shapes = self._shapes()
        config = copy.deepcopy(self.model.config)
        try:
            for name, value in self.fields.items():
                setattr(config.get_text_config(), name, value)
            config = type(config).from_dict(config.to_dict())  # as a file of it would be read
        except Exception as error:  # transformers has its own classes of errors here, some no ValueErrors
            said = " ".join(str(error).split())
            raise ValueError(f"{type(config).__name__} refuses {_fields(self.fields)}: {said}") from error
        lost = {n: v for n, v in self.fields.items() if getattr(config.get_text_config(), n, None) != v}
        if lost:
            raise ValueError(f"{type(config).__name__} does not keep {_fields(lost)}: the cut model could not be loaded again")
        with torch.device("meta"):
            wanted = {n: list(t.shape) for n, t in type(self.model)(config).state_dict().items()}
        for name, shape in shapes.items():
            if wanted.get(name, shape) != shape:
                raise ValueError(
                    f"{name} would have the shape {shape}, but {type(config).__name__} with {_fields(self.fields)} asks for {wanted[name]}"
                )
        missing = [n for n in wanted if n not in shapes]
        if missing:
            raise ValueError(f"{type(config).__name__} with {_fields(self.fields)} asks for {missing[0]}, which the model does not have")


def _fields(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{n} = {v}" for n, v in fields.items())


# ----------------------------------------------------------------------------------------------------------- parts


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """`index` [n] along `dim`; [E, n]: for each expert of the stack its own."""
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(dim, index).contiguous()
    return torch.stack([t.index_select(dim - 1, i) for t, i in zip(tensor, index, strict=True)])


def _spread(index: Tensor, each: int) -> Tensor:
    """The rows of the heads `index` when each has `each`, in order.

    >>> _spread(torch.tensor([2, 0]), 3)
    tensor([6, 7, 8, 0, 1, 2])
    """
    return (index[:, None] * each + torch.arange(each)).flatten()


def _cut_mlp(plan: _Plan, name: str, kept) -> int:
    module = plan.model.get_submodule(name)
    old = module.up_proj.weight.shape[0]
    index = _index(name, kept, old, "channel")
    for linear in ("gate_proj", "up_proj"):
        if hasattr(module, linear):
            plan.cut_linear(f"{name}.{linear}", 0, index)
    plan.cut_linear(f"{name}.down_proj", 1, index)
    return old


def _cut_stack(plan: _Plan, name: str, kept, layout: ExpertLayout) -> int:
    module = plan.model.get_submodule(name)
    down = getattr(module, layout.down)
    experts, old = down.shape[0], down.shape[1 if layout.transposed else 2]
    kept = torch.as_tensor(kept)
    if kept.ndim != 2 or kept.shape[0] != experts:
        raise ValueError(f"{name} holds {experts} experts: kept[{name!r}] must be [{experts}, n], one row each, not {list(kept.shape)}")
    index = torch.stack([_index(f"{name}, expert {e}", row, old, "channel") for e, row in enumerate(kept)])
    # rows gate0, up0, gate1 ... or all of gate, then all of up
    both = torch.stack([2 * index, 2 * index + 1], -1).flatten(1) if layout.interleaved else torch.cat([index, index + old], 1)
    plan.cut(name, layout.gate_up, 2 if layout.transposed else 1, both)
    plan.cut(name, f"{layout.gate_up}_bias", 1, both)
    plan.cut(name, layout.down, 1 if layout.transposed else 2, index)
    return old


def _stacks(model: nn.Module, layout: ExpertLayout) -> list[str]:
    """The modules that hold both stacks of experts, as parameters [E, ., .]."""
    wanted = (layout.gate_up, layout.down)
    return [n for n, m in model.named_modules() if all(getattr(m._parameters.get(p), "ndim", 0) == 3 for p in wanted)]


def _has_heads(module: nn.Module) -> bool:
    plain = all(isinstance(getattr(module, p, None), nn.Module) for p in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return (plain and hasattr(module, "head_dim")) or all(isinstance(getattr(module, p, None), nn.Module) for p in ("kv_b_proj", "o_proj"))


# ----------------------------------------------------------------------------------------------------------- checks


def _index(name: str, kept: Sequence[int] | Tensor, total: int, what: str) -> Tensor:
    """`kept` as int64 [n]: distinct integers of 0 .. total - 1."""
    index = torch.as_tensor(kept).cpu()
    if index.numel() == 0:
        index = index.long()
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"{name}: kept must be a row of integers, not {list(index.shape)} of {index.dtype}")
    index = index.long()
    if len(index) and not (index.min() >= 0 and index.max() < total):
        wrong = next(i for i in index.tolist() if not 0 <= i < total)
        raise ValueError(f"{name} has no {what} {wrong}: it has {total}, numbered 0 to {total - 1}")
    if len(index.unique()) != len(index):
        wrong = next(i for i in index.tolist() if index.tolist().count(i) > 1)
        raise ValueError(f"{name}: {what} {wrong} is kept twice; name each once")
    return index


def _known(argument: str, given: Mapping[str, object], names: Iterable[str], what: str) -> None:
    names = list(names)
    strangers = [n for n in given if n not in names]
    if strangers:
        raise ValueError(f"{argument}: {strangers[0]!r} is no {what} of this model; it has {', '.join(names[:4]) or 'none'}, ...")


def _one_length(argument: str, given: Mapping, names: Iterable[str], what: str, things: str, length=len) -> int:
    """The one length that all of `given` have, which must name all of `names`: the config has one number for all layers."""
    names = list(names)
    _known(argument, given, names, what)
    missing = [n for n in names if n not in given]
    if missing:
        raise ValueError(f"{argument} lacks {missing[0]}: the config has one number for all, so every {what} must be named")
    lengths = {n: length(given[n]) for n in names}
    first = names[0]
    odd = next((n for n in names if lengths[n] != lengths[first]), None)
    if odd:
        raise ValueError(
            f"{first} would keep {lengths[first]} {things} and {odd} {lengths[odd]}: "
            "the config has one number for all, so keep as many in each"
        )
    return lengths[first]
