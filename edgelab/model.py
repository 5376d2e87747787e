"""Load a model, walk its weights, swap them for quantized layers. The model stays the Hugging Face module it is.

A family is one literal of `FAMILIES`: what a `config.model_type` needs beyond `ROLES_BY_NAME`, above all how its fused
expert stacks are laid out. In transformers 5 the experts of a layer are two 3-D parameters of one module,

    gate_up_proj  [experts, 2 * inner, hidden]      down_proj  [experts, hidden, inner]

(gpt_oss stores both transposed, interleaves gate and up, and adds biases). Below the table any torch module works:
every `nn.Linear`, `nn.Embedding` and transformers `Conv1D` in it is a weight. 3-D parameters of experts that no family
describes are not touched, and never in silence: `unknown_experts` lists them and the coverage audit fails on them.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from edgelab.layers import Blank, QEmbedding, QExperts, QLinear, Quantized
from edgelab.mixed_experts import QExpertsMixed, expert_of, gather
from edgelab.qtensor import QTensor

# ------------------------------------------------------------------------------------------------------ families

# the first pattern that matches a weight's name gives its role; shared by all families, so that recipes travel
ROLES_BY_NAME = (
    ("*.shared_expert_gate", "router"),
    ("*.router", "router"),
    ("*.gate", "router"),
    ("*.shared_expert*", "shared"),
    ("*.experts.*", "experts"),
    ("*.self_attn.*", "attention"),
    ("*attention*", "attention"),
    ("*.attn.*", "attention"),
    ("*.mlp.*", "mlp"),
    ("*.intermediate.*", "mlp"),  # BERT's feed-forward
    ("*.layer.*.output.dense", "mlp"),
    ("lm_head", "head"),
)


@dataclass(frozen=True)
class ExpertLayout:
    """How a family's fused expert module stores its weights: the parameters' names and their layout.

    `transposed`: [experts, in, out] instead of [experts, out, in]. `interleaved`: rows gate0, up0, gate1 ... instead
    of all of gate, then all of up. `biased`: each parameter P has a bias `P_bias` [experts, out].
    """

    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False


@dataclass(frozen=True)
class NormWire:
    """An RMSNorm and the weights that read its output, as globs relative to a decoder block.

    `writer`: the linear whose first rows the norm takes in (MLA's latents); None: the residual stream.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str | None = None


@dataclass(frozen=True)
class Wiring:
    """What feeds what in a decoder, so that a scale or a rotation can be moved from one weight into the next.

    The decoder is the module that holds the input embedding; `blocks` and `final_norm` are its children. Embedding and
    head are those that the model names itself. All else are globs relative to a block; one that matches nothing is fine
    (a dense layer has no experts), but every weight of a block must be a reader or a writer.

    `writers` add to the residual stream. `up_down`: (up, down) of one module: down reads act(gate) * up, which is linear
    in up; in a fused stack `up` is the second half of the rows. `values`: (v, o): o reads a mixture over tokens of what v
    makes, head by head; of a head's rows in v the last are the values (MLA: those before are keys). `value_clamp`: a field
    of the config that, when set, clips the values, so that nothing may be moved across them.
    """

    norms: tuple[NormWire, ...]
    writers: tuple[str, ...]
    up_down: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, str], ...]
    value_clamp: str = "clip_qkv"
    blocks: str = "layers"
    final_norm: str = "norm"


@dataclass(frozen=True)
class Family:
    """What is known of a `config.model_type`. `roles` come before `ROLES_BY_NAME`. `wiring` None: not known."""

    model_type: str
    experts: ExpertLayout | None = None
    roles: tuple[tuple[str, str], ...] = ()
    wiring: Wiring | None = None


_FUSED = ExpertLayout()

# One literal for all families of the table: they share their names, and what one lacks matches nothing. Norms inside the
# attention (Qwen3's per head, OLMoE's over all heads) and rotary positions come after q and k, which nothing moves;
# Granite's multipliers are scalars and the residual stream stays linear.
LLAMA_LIKE = Wiring(
    norms=(
        NormWire("input_layernorm", ("self_attn.[qkv]_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        NormWire("self_attn.q_a_layernorm", ("self_attn.q_b_proj",), writer="self_attn.q_a_proj"),
        NormWire("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",), writer="self_attn.kv_a_proj_with_mqa"),
        NormWire(
            "post_attention_layernorm",
            ("*.gate_proj", "*.up_proj", "*.experts.gate_up_proj", "mlp.gate", "*.router", "*.shared_expert_gate"),
        ),
    ),
    writers=("self_attn.o_proj", "*.down_proj"),
    up_down=(("up_proj", "down_proj"), ("gate_up_proj", "down_proj")),
    values=(("self_attn.v_proj", "self_attn.o_proj"), ("self_attn.kv_b_proj", "self_attn.o_proj")),
)
# gpt-oss clamps `up` and adds 1 to it: a scale can't be moved from down to up
_GPT_OSS = replace(LLAMA_LIKE, up_down=())

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        Family("llama", wiring=LLAMA_LIKE),
        Family("qwen2", wiring=LLAMA_LIKE),
        Family("qwen3", wiring=LLAMA_LIKE),
        Family("qwen3_moe", _FUSED, wiring=LLAMA_LIKE),
        Family("qwen2_moe", _FUSED, wiring=LLAMA_LIKE),
        Family("mixtral", _FUSED, wiring=LLAMA_LIKE),
        Family("olmoe", _FUSED, wiring=LLAMA_LIKE),
        Family("granitemoe", _FUSED, wiring=LLAMA_LIKE),
        Family("deepseek_v3", _FUSED, wiring=LLAMA_LIKE),
        Family("gpt_oss", ExpertLayout(transposed=True, interleaved=True, biased=True), wiring=_GPT_OSS),
    )
}


def family_of(model: nn.Module) -> Family:
    """The family of `model`, by its config's `model_type` (or its text part's); a plain one when it is not in the table."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if kind not in FAMILIES and hasattr(config, "get_text_config"):
        kind = config.get_text_config().model_type
    return FAMILIES.get(kind, Family(kind))


# ---------------------------------------------------------------------------------------------------------- walk


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model. `tensor` is a view [out, in] or [experts, out, in], whatever way the model stores it.

    `name` is what recipes match: the module's name, and for a fused expert stack also the parameter's. `kind` is
    "linear", "embedding", "experts", or "router" (a parameter that its module multiplies by itself: it can't be
    swapped). `tied_to` names the weight that this one shares its parameter with; only that one counts.
    """

    name: str
    module_name: str
    parameter: str
    kind: str
    role: str
    shape: tuple[int, ...]
    tensor: Tensor
    tied_to: str | None = None

    @property
    def parameter_name(self) -> str:
        return f"{self.module_name}.{self.parameter}"

    def __repr__(self) -> str:
        tied = f", tied to {self.tied_to}" if self.tied_to else ""
        return f"Weight({self.name}, {self.role}, {' x '.join(map(str, self.shape))}, {self.tensor.dtype}{tied})"


def weights(model: nn.Module) -> list[Weight]:
    """Every compressible weight that `model` still holds in floating point, in the model's order.

    Weights that are quantized already are not listed (see `quantized`).
    """
    family, head = family_of(model), _head_name(model)
    opaque = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]  # reads its children's weights itself
    skip = {id(child) for m in opaque for child in m.modules()}
    # on the meta device, before weights are loaded, transformers has not tied anything yet: only the names say what will be
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    owners: dict[int | str, str] = {}
    alone = _shared_with_others(model, family)
    found = []
    for module_name, module in model.named_modules():
        if not module_name or id(module) in skip:
            continue
        for parameter, kind, transposed in _slots(module, module_name, family):
            name = f"{module_name}.{parameter}" if kind == "experts" else module_name
            stored = module._parameters[parameter]
            if id(stored) in alone:
                continue
            tensor = stored.detach().transpose(-1, -2) if transposed else stored.detach()
            full = f"{module_name}.{parameter}"
            tied_to = owners.setdefault(ties.get(full, full) if stored.is_meta else id(stored), name)
            role = _role(family, head, name, kind)
            found.append(
                Weight(name, module_name, parameter, kind, role, tuple(tensor.shape), tensor, tied_to if tied_to != name else None)
            )
    return found


def by_expert(listed: Iterable[Weight], names: Iterable[str]) -> list[Weight]:
    """`listed` with the experts one by one, [out, in] each, of the stacks that `names` mentions as `<stack>#<expert>`."""
    split = {expert_of(name)[0] for name in names if "#" in name}
    return [
        part
        for w in listed
        for part in (
            [w]
            if w.name not in split
            else [replace(w, name=f"{w.name}#{e}", shape=w.shape[1:], tensor=w.tensor[e]) for e in range(w.shape[0])]
        )
    ]


def quantized(model: nn.Module) -> dict[str, tuple[str, QTensor]]:
    """{weight name: (role, QTensor)} of the layers that `swap` put in; of a tied pair only the first is listed.

    Experts in several schemes are listed one by one, as `<stack name>#<expert>`.
    """
    family, head, found = family_of(model), _head_name(model), {}
    for module_name, module in model.named_modules():
        if isinstance(module, QExpertsMixed):
            for parameter, experts in module.qtensors().items():
                stack = f"{module_name}.{_own_name(family, parameter)}"
                found |= {f"{stack}#{e}": (_role(family, head, stack, "experts"), q) for e, q in enumerate(experts)}
        elif isinstance(module, Quantized) and not getattr(module, "tied_to", None) and not getattr(module, "is_part", False):
            kind = "experts" if isinstance(module, QExperts) else "embedding" if isinstance(module, QEmbedding) else "linear"
            for parameter, q in module.qtensors().items():
                name = f"{module_name}.{_own_name(family, parameter)}" if kind == "experts" else module_name
                found[name] = (_role(family, head, name, kind), q)
    return found


def _role(family: Family, head: str | None, name: str, kind: str) -> str:
    """The role (one of `recipe.ROLES`): by kind, then whether it is the model's own head, then by name."""
    if kind in ("embedding", "router", "experts"):
        return kind
    if name == head:
        return "head"
    return next((role for pattern, role in (*family.roles, *ROLES_BY_NAME) if fnmatchcase(name, pattern)), "linear")


def unknown_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of expert weights that can't be compressed, because no family says how they are laid out.

    The way out is one literal: `FAMILIES["kind"] = Family("kind", ExpertLayout(...))`.
    """
    taken = {w.parameter_name for w in weights(model)}
    found = {}
    for module_name, module in model.named_modules():
        if "expert" not in f"{module_name}.{type(module).__name__}".lower() or isinstance(module, Quantized):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter}"
            if value.ndim >= 2 and value.is_floating_point() and name not in taken and not parameter.endswith("bias"):
                found[name] = value
    return found


def _shared_with_others(model: nn.Module, family: Family) -> dict[int, str]:
    """{id of a parameter: why} of those that a swappable module shares with one that computes with it in a way of its own."""
    own, others = set(), {}
    for module_name, module in model.named_modules():
        slots = {parameter for parameter, _, _ in _slots(module, module_name, family)}
        for parameter, value in module._parameters.items():
            if value is not None and parameter in slots:
                own.add(id(value))
            elif value is not None and value.ndim >= 2:
                others[id(value)] = f"also used by {module_name}, a {type(module).__name__}, in a way of its own"
    return {i: why for i, why in others.items() if i in own}


def untouchable(model: nn.Module) -> dict[str, str]:
    """{parameter name: reason} of the float parameters of two or more dimensions that `weights` does not list or `swap` refuses."""
    family, listed = family_of(model), {w.parameter_name: w for w in weights(model)}
    strangers, alone = unknown_experts(model), _shared_with_others(model, family)
    inside = {id(c): type(m).__name__ for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.modules()}
    kind, found = family.model_type, {}
    for module_name, module in model.named_modules():
        for parameter, value in module._parameters.items():
            name, own_class = f"{module_name}.{parameter}".lstrip("."), type(module).__name__
            if value is None or value.ndim < 2 or not value.is_floating_point():
                continue
            if name in listed:
                if listed[name].kind == "router":
                    found[name] = f"a router, which {own_class} computes itself"
            elif name in strangers:
                found[name] = (
                    f"model_type {kind!r} is not in edgelab.model.FAMILIES; tell its layout: "
                    f"FAMILIES[{kind!r}] = Family({kind!r}, ExpertLayout(...))"
                )
            elif id(value) in alone:
                found[name] = alone[id(value)]
            elif id(module) in inside:
                found[name] = f"{inside[id(module)]} reads the weights of its parts itself"
            elif isinstance(module, nn.Linear | nn.Embedding):
                found[name] = f"{own_class} computes with its weight in a way of its own (a subclass with another forward, or max_norm)"
            else:
                found[name] = f"{own_class} is no nn.Linear, nn.Embedding, Conv1D or known expert stack"
    return found


def _slots(module: nn.Module, module_name: str, family: Family) -> Iterable[tuple[str, str, bool]]:
    """(parameter, kind, stored transposed) of the weights that `module` itself holds."""
    layout, parameters = family.experts, module._parameters
    plain = parameters.get("weight") is not None
    # a subclass with a forward of its own does something else with its weight: leave it alone
    if plain and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        yield "weight", "linear", False
    elif plain and isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None:
        yield "weight", "embedding", False
    elif plain and (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        yield "weight", "linear", True
    elif layout and all(getattr(parameters.get(p), "ndim", 0) == 3 for p in (layout.gate_up, layout.down)):
        yield layout.gate_up, "experts", layout.transposed
        yield layout.down, "experts", layout.transposed
    elif plain and parameters["weight"].ndim == 2 and not module._modules:
        role = next((role for pattern, role in (*family.roles, *ROLES_BY_NAME) if fnmatchcase(module_name, pattern)), None)
        if role == "router":
            yield "weight", "router", False


def _head_name(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else next((name for name, module in model.named_modules() if module is head), None)


def _own_name(family: Family, parameter: str) -> str:
    """The family's name of QExperts' "gate_up_proj" or "down_proj"."""
    layout = family.experts or _FUSED
    return layout.gate_up if parameter == "gate_up_proj" else layout.down


# ---------------------------------------------------------------------------------------------------------- swap


def swap(model: nn.Module, tensors: Mapping[str, QTensor | Blank]) -> None:
    """Put quantized layers in the place of the modules that hold the named weights (names as in `weights`).

    A weight that is tied to another shares its codes with it, so that one name of the pair is enough. Both stacks of
    an expert module go together; `<stack name>#<expert>` is one expert of a stack, of which all must be given, each in
    a scheme of its own. A `Blank` makes a layer of zeros, for a state dict to fill. Raises ValueError for a
    name that is no weight of the model, a wrong shape, a router, or half an expert module.
    """
    known = {w.name: w for w in weights(model)}
    for name, q in tensors.items():
        stack, expert = expert_of(name)
        if stack not in known:
            some = next(iter(known), None)
            raise ValueError(f"{name!r} is no weight of this {type(model).__name__}; weights(model) lists {len(known)}, such as {some!r}")
        w = known[stack]
        if expert is not None and (w.kind != "experts" or expert >= w.shape[0]):
            raise ValueError(f"{name!r} names no expert: {stack} is {w.shape}" + (", no stack" if w.kind != "experts" else ""))
        shape = w.shape if expert is None else w.shape[1:]
        if tuple(q.shape) != shape:
            raise ValueError(f"{name} has the shape {shape}, its codes have {tuple(q.shape)}")
        if w.kind == "router":
            raise ValueError(f"{name} is a router that {_class_of(model, w)} computes itself; it stays in floating point")
    swapper = Swapper(model, known.values())
    swapper.put(tensors)
    swapper.finish()


class Swapper:
    """Swaps the modules of a model in several goes, at the cost of one walk: `put` each, then `finish`.

    It keeps no module and no tensor of the model, so that memory falls with each `put`.
    """

    def __init__(self, model: nn.Module, listed: Iterable[Weight]) -> None:
        self._model, self._family, self._places = model, family_of(model), _places(model)
        self._slots = {w.name: (w.module_name, w.parameter, w.kind, w.tied_to) for w in listed}
        self._same: dict[str, list[str]] = {}  # the owner of a parameter -> all names of it
        for name, (_, _, _, tied_to) in self._slots.items():
            self._same.setdefault(tied_to or name, []).append(name)

    def put(self, tensors: Mapping[str, QTensor | Blank]) -> None:
        """Put layers in the place of the modules that hold the named weights, and of those tied to them."""
        chosen = {self._slots[name][3] or name: q for name, q in gather(tensors).items()}
        parts: dict[str, dict[str, QTensor | Blank]] = {}  # module -> parameter -> codes
        kinds: dict[str, tuple[str, str | None]] = {}
        for owner, q in chosen.items():
            for name in self._same[owner]:  # the owner first
                module_name, parameter, kind, tied_to = self._slots[name]
                parts.setdefault(module_name, {})[parameter] = q
                kinds[module_name] = kind, tied_to
        layers: dict[str, Quantized] = {}
        for module_name, codes in parts.items():
            old, (kind, tied_to) = self._model.get_submodule(module_name), kinds[module_name]
            new = _layer(old, codes, module_name, kind, self._family)
            new.origin = (_skeleton(old),)  # in a tuple, so that torch does not take it for a child
            new.tied_to = tied_to
            if tied_to:
                _share(new, layers[tied_to])
            layers[module_name] = new
            _replace(self._places, old, new)

    def finish(self) -> None:
        _forget_ties(self._model)


def retie(model: nn.Module) -> None:
    """Let tied quantized layers share their buffers again, after a state dict was loaded or the model has moved."""
    for module in model.modules():
        if isinstance(module, Quantized) and getattr(module, "tied_to", None):
            _share(module, model.get_submodule(module.tied_to))


def dequantize(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Turn the quantized layers of `model` back into what they replaced, in place, with the weights their codes stand for."""
    family, places, back = family_of(model), _places(model), {}
    for module_name, old in list(model.named_modules()):
        if not isinstance(old, Quantized | QExpertsMixed) or getattr(old, "is_part", False):
            continue
        new = _skeleton(old.origin[0])
        turned = {parameter: transposed for parameter, _, transposed in _slots(new, module_name, family)}
        for parameter, value in old.dequantized().items():
            parameter = _own_name(family, parameter) if isinstance(old, QExperts | QExpertsMixed) else parameter
            value = value.transpose(-1, -2).contiguous() if turned[parameter] else value
            new._parameters[parameter] = nn.Parameter(value.to(dtype), requires_grad=False)
        if isinstance(old, QExperts | QExpertsMixed) and old.gate_up_bias is not None:
            new._parameters[f"{family.experts.gate_up}_bias"] = old.gate_up_bias
            new._parameters[f"{family.experts.down}_bias"] = old.down_bias
        elif getattr(old, "bias", None) is not None:
            new._parameters["bias"] = old.bias
        back[module_name] = new
        if getattr(old, "tied_to", None):
            new._parameters["weight"] = back[old.tied_to]._parameters["weight"]
        _replace(places, old, new)
    for module in model.modules():  # the ties that `_forget_ties` took away
        if module.__dict__.pop("_tied_weights_keys", None) is not None:
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
    if back:
        _disown(model)


def _disown(model: nn.Module) -> None:
    """Take back what `hf.adopt` and transformers' loading say of a quantized model: `save_pretrained` would believe it."""
    if getattr(model, "quantization_method", None) != "edgelab":
        return
    for attribute in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.is_quantized = False
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__"):
            config.__dict__.pop("quantization_config", None)
            config.__dict__.pop("_is_quantized", None)


def _layer(old: nn.Module, codes: dict[str, QTensor | Blank], module_name: str, kind: str, family: Family) -> Quantized:
    """The quantized layer that computes what `old` does."""
    if kind == "embedding":
        return QEmbedding(codes["weight"], padding_idx=old.padding_idx, dtype=old.weight.dtype)
    if kind == "linear":
        transposed = any(t for parameter, _, t in _slots(old, module_name, family) if parameter == "weight")
        return QLinear(codes["weight"], old.bias, dtype=old.weight.dtype, transposed=transposed)
    layout = family.experts
    missing = {layout.gate_up, layout.down} - set(codes)
    if missing:
        raise ValueError(f"{module_name}: {missing.pop()} has no codes; both stacks of an expert module are quantized together")
    settings = glu_settings(old, layout)
    if layout.biased:
        settings |= {"gate_up_bias": getattr(old, f"{layout.gate_up}_bias"), "down_bias": getattr(old, f"{layout.down}_bias")}
    gate_up, down = codes[layout.gate_up], codes[layout.down]
    whole = all(isinstance(q, QTensor | Blank) for q in (gate_up, down))
    return QExperts(gate_up, down, **settings) if whole else QExpertsMixed(gate_up, down, **settings)


def glu_settings(module: nn.Module, layout: ExpertLayout) -> dict:
    """How a fused expert module joins gate and up, in the words of `QExperts` and of `layers.gated`."""
    settings: dict = {"act_fn": getattr(module, "act_fn", None)}
    if layout.interleaved:
        settings |= {"glu": "interleaved_clamped", "limit": module.limit, "alpha": module.alpha}
    return settings


def _skeleton(module: nn.Module) -> nn.Module:
    """`module` without the bytes of its parameters (they are on the meta device)."""
    bare = copy.copy(module)
    bare._parameters = {k: None if p is None else nn.Parameter(p.detach().to("meta"), False) for k, p in module._parameters.items()}
    return bare


def _share(layer: Quantized, owner: Quantized) -> None:
    for buffer in _shared_buffers(layer):
        layer._buffers[buffer] = owner._buffers[buffer]


def _shared_buffers(layer: Quantized) -> tuple[str, ...]:
    """The buffers that tied layers share: the weight's; how each rounds its input is its own."""
    return layer._stored["weight"].buffers


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of a module: every (parent, name) that it is registered under}; there may be several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, key))
    return places


def _replace(places: dict[int, list[tuple[nn.Module, str]]], old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for parent, key in places.pop(id(old)):
        parent._modules[key] = new


def _forget_ties(model: nn.Module) -> None:
    """transformers ties parameters by name; a quantized pair has none left to tie."""
    for module in model.modules():
        keys = getattr(module, "all_tied_weights_keys", None)
        if keys:
            here = dict(module.named_parameters(remove_duplicate=False))
            module.all_tied_weights_keys = {k: v for k, v in keys.items() if k in here and v in here}
            module._tied_weights_keys = dict(module.all_tied_weights_keys)


def _class_of(model: nn.Module, w: Weight) -> str:
    return type(model.get_submodule(w.module_name)).__name__


# --------------------------------------------------------------------------------------------------------- store


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of everything that a saved model needs, each tensor once: of tied ones, the first.

    A float32 tensor whose values are all bfloat16 (or all float16) numbers is stored as such: nothing is lost, and a
    model that was loaded in float32 for computing does not double on disk.
    """
    tied = {
        f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, Quantized) and getattr(m, "tied_to", None) for b in _shared_buffers(m)
    }
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tied or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        found[name] = _narrow(tensor.detach())
    return found


def _narrow(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and not tensor.is_meta:
        for dtype in (torch.bfloat16, torch.float16):
            half = tensor.to(dtype)
            if torch.equal(half.to(torch.float32), tensor):
                return half
    return tensor


# ---------------------------------------------------------------------------------------------------------- load


def load(name_or_dir: str | Path, *, dtype: torch.dtype = torch.float32, auto=None) -> nn.Module:
    """The model in a local directory (or of that name on the hub), in eval mode. A bundle comes back quantized.

    The class is the one that the config names under `architectures`; `auto` (such as `transformers.AutoModel`) takes
    its place. Only safetensors are read and no code from the checkpoint is run. Raises FileNotFoundError for a missing
    directory or file, ValueError for an unknown architecture, a damaged or pickled checkpoint, or one that lacks weights.
    """
    import transformers

    if _is_local(name_or_dir):
        check_directory(Path(name_or_dir))
        if (Path(name_or_dir) / "edgelab.json").is_file():
            from edgelab.bundle import read_manifest, refuse_strangers  # bundle imports this module, so not at the top

            refuse_strangers(Path(name_or_dir), read_manifest(name_or_dir))
        config = json.loads((Path(name_or_dir) / "config.json").read_text())
        if config.get("model_type") not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            raise ValueError(
                f"model_type={config.get('model_type')!r} in {Path(name_or_dir) / 'config.json'} is not an architecture that transformers "
                f"{transformers.__version__} knows, and code from a checkpoint (trust_remote_code) is never run"
            )
    name = str(name_or_dir)
    with _named(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if dict(getattr(config, "quantization_config", None) or {}).get("quant_method") == "edgelab":
        import edgelab.hf  # noqa: F401 (registers the quantizer; hf imports this module, so not at the top)
    source = auto or architecture(config, name)
    extra = {"trust_remote_code": False} if auto else {}
    with _named(name):
        model, info = source.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True, **extra)
    absent = sorted([*info["missing_keys"], *(k[0] for k in info["mismatched_keys"])])
    if absent:
        raise ValueError(
            f"{name} lacks {len(absent)} weights of {type(model).__name__} or holds them in another shape ({', '.join(absent[:4])} ...): "
            "they would be random. Load it as the class it was saved from, or pass auto=..."
        )
    return model.eval()


def load_tokenizer(name_or_dir: str | Path):
    """The tokenizer of a local model directory or a hub name. Raises FileNotFoundError for a missing directory."""
    import transformers

    if _is_local(name_or_dir) and not Path(name_or_dir).is_dir():
        raise FileNotFoundError(f"there is no directory {name_or_dir}")
    with _named(str(name_or_dir)):
        return transformers.AutoTokenizer.from_pretrained(str(name_or_dir), trust_remote_code=False)


def check_directory(path: Path) -> None:
    """Raises FileNotFoundError or ValueError, naming the file, when `path` is no whole safetensors checkpoint."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {path}: it is not a model directory")
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [f for f in wanted if Path(f).name != f or "\\" in f]
        if outside:
            raise ValueError(f"{index} lists {outside[0]!r}, which is outside its directory")
        gone = [f for f in wanted if not (path / f).is_file()]
        if gone:
            raise FileNotFoundError(f"{gone[0]} is missing in {path}: {len(gone)} of its {len(wanted)} weight files are not there")
        files = [path / f for f in wanted]
    if not files:
        pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in path.glob(pattern))
        if pickles:
            raise ValueError(
                f"{path} holds its weights only as {pickles[0]}, a pickle: loading one can run any code, so it is refused. "
                "Convert it to safetensors (save_pretrained of a model that you trust)"
            )
        raise FileNotFoundError(f"there is no *.safetensors in {path}")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Raises ValueError, with the bytes expected and found, when `file` is not as long as its own header says."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or 8 + length > size:
            expected = f"at least {8 + length:,}" if len(head) == 8 and length < 1 << 30 else "at least 8"
            raise ValueError(
                f"{file} is truncated or no safetensors file: {expected} bytes expected, {size:,} found; copy or download it again"
            )
        try:
            header = json.loads(f.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has no readable safetensors header ({error}); copy or download it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{file} is {what}: {expected:,} bytes expected, {size:,} found; copy or download it again")


def _is_local(name_or_dir: str | Path) -> bool:
    """Whether this means a directory: it is there, is a Path, can't be a hub name (owner/name), or starts in a folder here."""
    text = str(name_or_dir)
    if "/" in text and Path(text).parts and Path(Path(text).parts[0]).is_dir():  # runs/mistyped
        return True
    return isinstance(name_or_dir, Path) or Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


@contextmanager
def _named(name: str) -> Iterator[None]:
    """transformers' errors about files and networks, with what was asked for in front."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{name!r} is no directory here, and the hub gave no such model (or there is no network): {error}") from error


def architecture(config, name: str):
    """The class that the config of `name` lists under `architectures`. Raises ValueError when transformers has no such class."""
    import transformers

    listed = getattr(config, "architectures", None) or []
    found = getattr(transformers, listed[0], None) if listed else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"architectures={listed} in the config of {name} names no model class of transformers {transformers.__version__}; "
            "pass auto=transformers.AutoModelForCausalLM (or another Auto class)"
        )
    return found
