"""Rewrites of a trained model before it is exported: batch norms into the weights before them, operators into others.

**Folding.** In eval mode a batch norm is an affine map per channel, and so it goes into the weight W and bias b of the convolution
or linear layer that feeds it (Jacob et al. 2018, arXiv 1712.05877, section 3.2):

    s = gamma / sqrt(var + eps)      W' = s W      b' = s (b - mean) + beta

Computed in float64 and rounded once to the weight's type. It holds where the norm reads nothing but that layer, and nothing else
reads that layer: torch.fx tells, from the graph of the whole model. A ReLU behind the norm stays a module; the report names it,
because a quantizer gets it for nothing (codes of [0, t] cut negative values off; `edgelab/vision.py` and its export do so).
A model that torch.fx can't trace is folded part by part, and then only with an `example`, on which the outputs are compared.

**Fallback.** A runtime that lacks an activation gets another. `RULES` is the table; a rule is exact where the target is the same
function in other operators, and its `gap` is the largest difference where it is not. Two facts behind the rules for SiLU:

    x sigmoid(x)                        the same function, from operators that every runtime has
    1.702 gelu(x / 1.702)  ~ silu(x)    gelu(y) ~ y sigmoid(1.702 y) (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2),
                                        so an unscaled GELU in SiLU's place is wrong by more than the approximation itself

What a rule costs a trained model is measured, not derived: `fallback_table`.
"""

import copy
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from edgelab import html_table
from edgelab.layers import QExperts, Quantized

# --------------------------------------------------------------------------------------------------------------- folding

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (*_CONVS, *_TRANSPOSED, nn.Linear)
# Outputs may differ by this share of their largest magnitude: W' is rounded anew (2**-24 relative) and a sum of n products then
# differs by at most n 2**-24 of the sum of magnitudes. What is folded wrongly is off by its whole size.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fold:
    """A norm that went into the layer before it. `relu`: the ReLU that reads the norm, a module's name or "function"; None: none."""

    layer: str
    norm: str
    relu: str | None = None


@dataclass(frozen=True)
class Left:
    """A norm that stays, and why."""

    norm: str
    why: str


@dataclass(frozen=True, eq=False)
class Folded:
    """`model`: a copy without the folded norms (`nn.Identity` in their place, so names and indices stay). `max_abs_diff`: of its
    output on the example; None without one."""

    model: nn.Module
    folds: tuple[Fold, ...]
    left: tuple[Left, ...]
    max_abs_diff: float | None = None

    def table(self) -> list[dict[str, str]]:
        """A line per norm: where it went, or why it stayed."""
        went = [{"norm": f.norm, "into": f.layer, "then": "ReLU" if f.relu else "", "why not": ""} for f in self.folds]
        return went + [{"norm": x.norm, "into": "", "then": "", "why not": x.why} for x in self.left]

    def __repr__(self) -> str:
        relus = sum(f.relu is not None for f in self.folds)
        diff = "" if self.max_abs_diff is None else f", outputs differ by {self.max_abs_diff:.1e}"
        return f"Folded({len(self.folds)} norms folded, {relus} with a ReLU behind; {len(self.left)} left{diff})"

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), repr(self))


@torch.no_grad()
def folded_weight(layer: nn.Module, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(weight, bias) of `layer` with the eval-mode `norm` behind it folded in: of the weight's shape and type, [out].

    Transposed convolutions store [in, out / groups, ...]; output channel c is row c % (out / groups) of group c // (out / groups).
    """
    w, channels = layer.weight.double(), norm.num_features
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    if isinstance(layer, _TRANSPOSED):
        by_group = w.unflatten(0, (layer.groups, -1))  # [groups, in / groups, out / groups, ...]
        new = (by_group * scale.view(layer.groups, 1, -1, *[1] * (w.ndim - 2))).reshape(w.shape)
    else:
        new = w * scale.view(channels, *[1] * (w.ndim - 1))
    bias = torch.zeros(channels, dtype=torch.float64, device=w.device) if layer.bias is None else layer.bias.double()
    bias = (bias - norm.running_mean.double()) * scale + (0 if norm.bias is None else norm.bias.double())
    return new.to(layer.weight.dtype), bias.to(layer.weight.dtype)


class _Tracer(fx.Tracer):
    """Traces with the modules of `opaque` as leaves, besides torch's own."""

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = isinstance(module, (*FOLDABLE, _BatchNorm))  # subclasses too: theirs would be traced into
        return known or id(module) in self.opaque or super().is_leaf_module(module, name)


def _graphs(module: nn.Module, prefix: str, opaque: dict[int, list[tuple[str, fx.Graph]]]) -> list[tuple[str, fx.Graph]]:
    """[(prefix of names, graph)] that cover `module`; what can't be traced goes to `opaque` {id: its own graphs} and is a leaf above."""

    def trace() -> list[tuple[str, fx.Graph]]:
        graph = _Tracer(set(opaque)).trace(module)
        leaves = {id(module.get_submodule(n.target)): None for n in graph.nodes if n.op == "call_module"}
        return [(prefix, graph), *(g for leaf in leaves for g in opaque.get(leaf, ()))]

    try:
        return trace()
    except Exception:  # whatever a stranger's forward does to a proxy
        below = [g for name, child in module.named_children() for g in _graphs(child, f"{prefix}{name}.", opaque)]
    try:
        opaque[id(module)] = trace()
    except Exception:
        opaque[id(module)] = below
    return opaque[id(module)]


def fold(model: nn.Module, example: Tensor | tuple | None = None) -> Folded:
    """`Folded`: a copy of `model`, in eval mode as it is, with every batch norm folded that can be; the original is not changed.

    `example`: an input (a tensor, or a tuple of arguments). With it the outputs of both are compared, and two things become
    foldable that the graph alone does not prove: parts of a model that torch.fx can't trace, and linear layers (a norm behind
    one normalizes its features only where the output is [N, C]).

    Raises ValueError for a model with a norm in training mode (its statistics are those of the batch), for one that holds no
    batch norm at all, and when the outputs on `example` differ by more than `TOLERANCE`.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    >>> fold(net)
    Folded(1 norms folded, 1 with a ReLU behind; 1 left)
    >>> fold(net).left
    (Left(norm='3', why='reads a ReLU, no convolution or linear layer'),)
    """
    names = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not names:
        raise ValueError(f"there is no batch norm in this {type(model).__name__}: nothing to fold")
    for name, norm in names.items():
        if norm.training:
            raise ValueError(
                f"{name or 'model'} is in training mode, where a batch norm uses the statistics of each batch: call model.eval() first"
            )
    twin = copy.deepcopy(model)
    arguments = example if isinstance(example, tuple) else () if example is None else (example,)
    dims = _output_dims(twin, arguments) if arguments else None
    sight = _Sight(twin, dims)
    proposals, left = sight.proposals()
    left += [Left(n, "is called in a part that torch.fx can't trace, or not at all") for n in names if n not in sight.seen]
    for f in proposals:
        layer, norm = twin.get_submodule(f.layer), twin.get_submodule(f.norm)
        weight, bias = folded_weight(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        twin.set_submodule(f.norm, nn.Identity().eval())
    order = {name: i for i, name in enumerate(names)}
    in_order = (tuple(sorted(x, key=lambda one: order[one.norm])) for x in (proposals, left))
    return Folded(twin, *in_order, _difference(model, twin, arguments) if arguments else None)


class _Sight:
    """What torch.fx shows of a model: who calls what how often, and what can be folded. `seen`: the norms it met."""

    def __init__(self, model: nn.Module, dims: Mapping[str, set[int]] | None) -> None:
        opaque: dict[int, list[tuple[str, fx.Graph]]] = {}
        self.model, self.dims, self.graphs = model, dims, _graphs(model, "", opaque)
        self.whole, self.seen = not opaque, set()
        self.places: dict[int, list[str]] = {}
        for name, m in model.named_modules(remove_duplicate=False):
            self.places.setdefault(id(m), []).append(name)
        self.owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self.calls, self.read = Counter(), set()  # modules called; parameters that a forward reads by itself
        for prefix, graph in self.graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    self.calls[id(self.module(prefix, node))] += 1
                elif node.op == "get_attr":
                    self.read.add(prefix + node.target)

    def module(self, prefix: str, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(prefix + node.target) if node.op == "call_module" else None

    def proposals(self) -> tuple[list[Fold], list[Left]]:
        """What can be folded; what can't, and why."""
        folds, left = [], []
        for prefix, graph in self.graphs:
            for node in graph.nodes:
                norm = self.module(prefix, node)
                if not isinstance(norm, _BatchNorm) or self.places[id(norm)][0] in self.seen:
                    continue
                name = self.places[id(norm)][0]
                self.seen.add(name)
                layer = self.module(prefix, node.all_input_nodes[0])
                if why := self.obstacle(prefix, node, norm, layer):
                    left.append(Left(name, why))
                else:
                    folds.append(Fold(self.places[id(layer)][0], name, self.relu_behind(prefix, node)))
        return folds, left

    def obstacle(self, prefix: str, node: fx.Node, norm: _BatchNorm, layer: nn.Module | None) -> str | None:
        """Why `norm`, called at `node`, can't go into `layer`, whose output it reads; None when it can."""
        source = node.all_input_nodes[0]
        if norm.running_mean is None:
            return "keeps no running statistics (track_running_stats=False): it uses those of each batch"
        if not isinstance(layer, FOLDABLE):
            what = f"a {type(layer).__name__}" if layer is not None else source.name
            return f"reads {what}, no convolution or linear layer"
        into = self.places[id(layer)][0]
        for module, plain in ((layer, next(c for c in FOLDABLE if isinstance(layer, c)).forward), (norm, _BatchNorm.forward)):
            which, places = self.places[id(module)][0], self.places[id(module)]
            if is_parametrized(module):
                return f"{which} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
            if type(module).forward is not plain:
                return f"{which} ({type(module).__name__}) is a subclass with a forward of its own"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{which} has forward hooks, which would see other values"
            if max(self.calls[id(module)], len(places)) > 1:
                return f"{which} is used {max(self.calls[id(module)], len(places))} times"
            if any(f"{which}.{p}" in self.read for p in (*module._parameters, *module._buffers)):
                return f"the model's forward reads the parameters of {which} by itself"
        if self.owners[id(layer.weight)] > 1:
            return f"the weight of {into} is shared with another module"
        if others := [u.name for u in source.users if u is not node]:
            return f"{into} also feeds {', '.join(others)}"
        linear = isinstance(layer, nn.Linear)
        if norm.num_features != (layer.out_features if linear else layer.out_channels):
            return f"normalizes {norm.num_features} channels, not the {layer.out_features if linear else layer.out_channels} of {into}"
        if linear and (self.dims is None or self.dims.get(into) != {2}):
            dims = "pass example=, an input" if self.dims is None else f"on the example it is {sorted(self.dims.get(into, ()))}-dimensional"
            return f"normalizes the features of {into} only where its output is [N, C]; {dims}"
        if not self.whole and self.dims is None:
            return f"torch.fx can't trace the whole model, so what else reads {into} is unknown: pass example=, an input"
        return None

    def relu_behind(self, prefix: str, node: fx.Node) -> str | None:
        """The ReLU that alone reads `node`: a module's name, or "function"."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if isinstance(self.module(prefix, user), nn.ReLU):
            return prefix + user.target
        plain = user.op == "call_function" and user.target in (F.relu, torch.relu, torch.relu_)
        return "function" if plain or (user.op == "call_method" and user.target in ("relu", "relu_")) else None


@torch.no_grad()
def _output_dims(model: nn.Module, arguments: tuple) -> dict[str, set[int]]:
    """{layer: dimensions that its output had} over one forward of `model`."""
    found: dict[str, set[int]] = {}

    def hook(name: str) -> Callable:
        return lambda _m, _i, out: found.setdefault(name, set()).add(out.ndim)

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, FOLDABLE)]
    try:
        model(*arguments)
    finally:
        for h in handles:
            h.remove()
    return found


@torch.no_grad()
def _difference(model: nn.Module, twin: nn.Module, arguments: tuple) -> float:
    """The largest difference of outputs. Raises ValueError above `TOLERANCE` of the largest magnitude."""
    worst, largest = 0.0, 0.0
    for a, b in zip(_tensors(model(*arguments)), _tensors(twin(*arguments)), strict=True):
        if a.is_floating_point() and a.numel():
            worst = max(worst, float((a - b).abs().max()))
            largest = max(largest, float(a.abs().max()))
    if not worst <= TOLERANCE * largest:
        raise ValueError(
            f"the folded {type(model).__name__} differs by {worst:.3g} on the example (outputs up to {largest:.3g}): its forward uses a "
            "folded layer in a way that torch.fx did not show; fold the parts that are plain by themselves"
        )
    return worst


def _tensors(out) -> Iterator[Tensor]:
    """The tensors in what a forward returned."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for v in out.values():
            yield from _tensors(v)
    elif isinstance(out, list | tuple):
        for v in out:
            yield from _tensors(v)


# -------------------------------------------------------------------------------------------------------------- fallback


@dataclass(frozen=True)
class Kind:
    """An activation: its function, the ONNX operators that it needs, what transformers calls it in a config (None: no name there)."""

    function: Callable[[Tensor], Tensor]
    operators: frozenset[str]
    config: str | None = None


QUICK = 1.702  # gelu(x) ~ x sigmoid(1.702 x): Hendrycks and Gimpel 2016, section 2

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "silu": Kind(F.silu, frozenset({"Swish"}), "silu"),  # ONNX has Swish from opset 24 on; most runtimes do not
        "mul_sigmoid": Kind(lambda x: x * torch.sigmoid(x), frozenset({"Mul", "Sigmoid"})),
        "gelu": Kind(F.gelu, frozenset({"Gelu"}), "gelu"),
        "gelu_erf": Kind(lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)), frozenset({"Mul", "Add", "Erf"})),
        "gelu_tanh": Kind(lambda x: F.gelu(x, approximate="tanh"), frozenset({"Mul", "Add", "Tanh"}), "gelu_pytorch_tanh"),
        "quick_gelu": Kind(lambda x: x * torch.sigmoid(QUICK * x), frozenset({"Mul", "Sigmoid"}), "quick_gelu"),
        "scaled_gelu": Kind(lambda x: QUICK * F.gelu(x / QUICK), frozenset({"Mul", "Gelu"})),
        "scaled_quick_gelu": Kind(lambda x: QUICK * ((x / QUICK) * torch.sigmoid(QUICK * (x / QUICK))), frozenset({"Mul", "Sigmoid"})),
        "hardswish": Kind(F.hardswish, frozenset({"HardSwish"}), "hardswish"),
        "mul_relu6": Kind(lambda x: x * (x + 3).clamp(0, 6) / 6, frozenset({"Mul", "Add", "Clip"})),
        "relu": Kind(F.relu, frozenset({"Relu"}), "relu"),
    }
)
# A module where torch has one, so that whoever reads the model by class (an exporter, say) knows it.
_MODULES = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish,
    "relu": nn.ReLU,
}
# What an activation is called where a model holds one: the class of a module, or the name of a function.
_CLASSES = {
    "SiLU": "silu", "SiLUActivation": "silu", "silu": "silu", "swish": "silu",
    "GELU": "gelu", "GELUActivation": "gelu", "gelu": "gelu",
    "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu", "Hardswish": "hardswish", "hardswish": "hardswish",
    "ReLU": "relu", "relu": "relu",
}  # fmt: skip
_CONFIG_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "hidden_activation_function")


@dataclass(frozen=True)
class Fallback:
    """Put `target` where `source` was. `exact`: the same function in other operators. `why`: where the rule comes from."""

    source: str
    target: str
    exact: bool = False
    why: str = ""

    def __post_init__(self) -> None:
        for kind in (self.source, self.target):
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is no activation of edgelab.fold.KINDS; there are {', '.join(KINDS)}")

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"

    @property
    def gap(self) -> float:
        """The largest |target(x) - source(x)| over x in -12 .. 12, in steps of 1/1024: float64, so an exact rule's is about 1e-15.

        >>> round(RULES[1].gap, 4), round(RULES[2].gap, 4)  # SiLU by GELU, as it is and scaled
        (0.193, 0.0346)
        """
        return _gap(self.source, self.target)


@cache
def _gap(source: str, target: str) -> float:
    x = torch.arange(-12 * 1024, 12 * 1024 + 1, dtype=torch.float64) / 1024
    return float((KINDS[target].function(x) - KINDS[source].function(x)).abs().max())


RULES = (
    Fallback("silu", "mul_sigmoid", exact=True, why="the definition of SiLU"),
    Fallback("silu", "gelu", why="the rule of on-device articles"),
    Fallback("silu", "scaled_gelu", why="GELU's own sigmoid approximation, solved for SiLU"),
    Fallback("silu", "scaled_quick_gelu", exact=True, why="where the runtime's GELU is the sigmoid one: 1.702 quick_gelu(x / 1.702)"),
    Fallback("silu", "hardswish", why="MobileNetV3 (Howard et al. 2019, arXiv 1905.02244, section 5.2)"),
    Fallback("silu", "relu", why="the last resort: every runtime has it"),
    Fallback("gelu", "gelu_erf", exact=True, why="the definition of GELU"),
    Fallback("gelu", "gelu_tanh", why="Hendrycks and Gimpel 2016, section 2"),
    Fallback("gelu", "quick_gelu", why="Hendrycks and Gimpel 2016, section 2"),
    Fallback("gelu", "relu", why="the last resort: every runtime has it"),
    Fallback("gelu_tanh", "gelu", why="the function that it approximates"),
    Fallback("gelu_tanh", "quick_gelu", why="Hendrycks and Gimpel 2016, section 2"),
    Fallback("hardswish", "mul_relu6", exact=True, why="the definition of h-swish"),
)


def parse(text: "str | Fallback") -> Fallback:
    """The rule of `RULES` that prints as `text` ("silu -> gelu"); any pair of `KINDS` in that form is a rule too."""
    if isinstance(text, Fallback):
        return text
    source, arrow, target = (part.strip() for part in text.partition("->"))
    if not arrow:
        raise ValueError(f"rule={text!r} is not of the form 'source -> target', such as 'silu -> gelu'")
    return next((r for r in RULES if (r.source, r.target) == (source, target)), None) or Fallback(source, target)


def fallback_for(source: str, operators: Iterable[str]) -> Fallback | None:
    """The best rule for `source` in a runtime that has these ONNX `operators`; None where it needs none.

    Exact rules come first, then the smallest gap. Raises ValueError for an unknown activation, and where no rule fits.

    >>> print(fallback_for("silu", {"Mul", "Sigmoid", "Gelu"}), fallback_for("silu", {"Gelu", "Relu"}), sep="; ")
    silu -> mul_sigmoid; silu -> gelu
    >>> print(fallback_for("silu", {"Gelu", "Mul"}))  # not the plain GELU, where a product can be had
    silu -> scaled_gelu
    """
    if source not in KINDS:
        raise ValueError(f"{source!r} is no activation of edgelab.fold.KINDS; there are {', '.join(KINDS)}")
    have = frozenset(operators)
    if KINDS[source].operators <= have:
        return None
    fit = [r for r in RULES if r.source == source and KINDS[r.target].operators <= have]
    if not fit:
        wanted = "; ".join(f"{r.target}: {', '.join(sorted(KINDS[r.target].operators))}" for r in RULES if r.source == source)
        raise ValueError(
            f"no rule replaces {source} with only {', '.join(sorted(have)) or 'nothing'}; what the rules need is {wanted or 'not known'}"
        )
    return min(fit, key=lambda r: (not r.exact, r.gap))


class Activation(nn.Module):
    """An activation of `KINDS` that torch has no module for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind].function(x)

    def extra_repr(self) -> str:
        return self.kind


def kind_of(fn: object) -> str | None:
    """Which of `KINDS` a module or a function is; None for anything else."""
    if isinstance(fn, Activation):
        return fn.kind
    if not isinstance(fn, nn.Module | types.FunctionType | types.BuiltinFunctionType):
        return None
    kind = _CLASSES.get(type(fn).__name__ if isinstance(fn, nn.Module) else fn.__name__)
    return "gelu_tanh" if kind == "gelu" and getattr(fn, "approximate", "none") == "tanh" else kind


def activations(model: nn.Module) -> dict[str, str]:
    """{where: kind} of the activations that `model` holds as modules or as attributes, the experts' and the config's too."""
    held = {name: kind for _, _, name, kind in _held(model)}
    return held | {f"config.{field}": kind for _, field, kind in _configured(model)}


def _held(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    """(owner, attribute, name, kind). A quantized layer keeps what it came from beside it: that has activations too."""
    seen = set()
    for name, module in list(model.named_modules()):
        for owner in (module, *(getattr(module, "origin", None) or ())):
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            for attribute, value in (*owner._modules.items(), *vars(owner).items()):
                if attribute != "_modules" and (kind := kind_of(value)):
                    yield owner, attribute, f"{name}.{attribute}".lstrip("."), kind


def _configured(model: nn.Module) -> Iterator[tuple[object, str, str]]:
    """(config, field, kind): the config's fields that name an activation, those of its text part included."""
    config = getattr(model, "config", None)
    parts = [config] + ([config.get_text_config()] if hasattr(config, "get_text_config") else [])
    named = {k.config: name for name, k in KINDS.items() if k.config} | {"swish": "silu", "gelu_new": "gelu_tanh"}
    for part in {id(p): p for p in parts if p is not None}.values():
        for field in _CONFIG_FIELDS:
            if (kind := named.get(getattr(part, field, None))) is not None:
                yield part, field, kind


@dataclass(frozen=True, eq=False)
class Replaced:
    """`model`: a copy that shares its weights with the original. `changed`: where the rule was applied. `notes`: what it could not say."""

    model: nn.Module
    rule: Fallback
    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> list[dict[str, str]]:
        """A line per place."""
        return [{"where": place, "was": self.rule.source, "is": self.rule.target} for place in self.changed]

    def __repr__(self) -> str:
        how = "exact" if self.rule.exact else f"off by at most {self.rule.gap:.3f}"
        return f"Replaced({self.rule}, {how}: {len(self.changed)} places{''.join(f'; {n}' for n in self.notes)})"

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), repr(self))


def fall_back(model: nn.Module, rule: "str | Fallback") -> Replaced:
    """`Replaced`: a copy of `model` in which the rule's target stands wherever its source was. The copy shares all weights.

    Found are modules (nn.SiLU, transformers' activations), attributes that hold a module or a function (`act_fn`, of fused and
    quantized experts too), and the config's fields (`hidden_act`), so that a saved copy comes back with what it was measured with.
    What a forward calls by itself (`F.silu(x)` in its text) is not found: `operators` shows it.

    Raises ValueError for an unknown rule, and for a model that holds no such activation.
    """
    r = parse(rule)
    if r.source not in activations(model).values():
        found = sorted(set(activations(model).values()))
        raise ValueError(
            f"rule {r}: this {type(model).__name__} holds no {r.source}; it holds {', '.join(found) or 'no activation that is known'}"
        )
    twin, changed, notes = _sharing_copy(model), [], []
    for owner, attribute, name, kind in list(_held(twin)):
        if kind != r.source:
            continue
        is_module, function = attribute in owner._modules, KINDS[r.target].function
        new = _MODULES.get(r.target, lambda: Activation(r.target))().train(owner.training)
        if not is_module and kind_of(function) == r.target:  # one without a name would not be known again, by an exporter say
            new = function
        (owner._modules if is_module else vars(owner))[attribute] = new
        if isinstance(owner, QExperts):
            owner._is_swiglu = r.target == "silu" and owner._is_swiglu  # the kernel that does all in one call has SiLU built in
        if name not in changed:
            changed.append(name)
    for config, field, kind in list(_configured(twin)):
        if kind != r.source:
            continue
        if KINDS[r.target].config:
            setattr(config, field, KINDS[r.target].config)
            changed.append(f"config.{field}")
        elif not r.exact:
            says = f"config.{field} still says {getattr(config, field)!r}, for transformers has no name for {r.target}"
            notes.append(f"{says}: apply the rule again after loading")
    return Replaced(twin, r, tuple(changed), tuple(notes))


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules and the config; parameters and buffers are the same tensors, and so is what kernels made of them."""
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for own, new in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(own, Quantized):
            new._views = dict(own._views)  # a copy starts without; each view is checked against its buffers before it is used
    return twin


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operators(model: nn.Module, *arguments, **keywords) -> dict[str, int]:
    """{ATen operator: how often one forward of `model` executes it}: what no reading of modules can miss.

    >>> operators(nn.Sequential(nn.SiLU(), nn.ReLU()), torch.ones(2))
    {'silu': 1, 'relu': 1}
    """
    with _Counting() as mode:
        model(*arguments, **keywords)
    return dict(mode.counts)


def fallback_table(
    model: nn.Module,
    tokenizer,
    data,
    rules: "Iterable[str | Fallback]" = tuple(r for r in RULES if r.source == "silu"),
    *,
    max_docs: "Mapping[str, int] | int" = 40,
    seed: int = 0,
    progress: bool = False,
) -> list[dict]:
    """What each rule costs the causal language model `model` on the documents `data`: a row per rule and domain, "all" and "answers" last.

    Keys: rule, exact, gap (of the functions), places, on (the domain), and of `edgelab.evaluate`, each with its 95 % interval over
    sources as `<metric>_low`, `<metric>_high`: exact_match (with exact_match_original; domains with answers), kld (nats per token),
    same_top, ln_ppl_ratio. The models run on the same documents; they share one set of weights.
    """
    from edgelab.compare import pool
    from edgelab.evaluate import measure, summarise

    replaced = {str(r.rule): r for r in (fall_back(model, one) for one in rules)}
    measured = measure(
        {"original": model} | {name: r.model for name, r in replaced.items()}, tokenizer, data, max_docs=max_docs, progress=progress
    )
    pooled = pool(measured)
    report = summarise(measured, seed=seed) + summarise(pooled, seed=seed)
    rows = []
    for name, r in replaced.items():
        for domain in (*measured.domains(), *pooled.domains()):
            row = {"rule": name, "exact": r.rule.exact, "gap": r.rule.gap, "places": len(r.changed), "on": domain}
            for metric in ("exact_match", "kld", "same_top", "ln_ppl_ratio"):
                for found in report.where(model=name, metric=metric, slice=domain):
                    row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high, "n": found.n}
            for found in report.where(model="original", metric="exact_match", slice=domain):
                row["exact_match_original"] = found.value
            rows.append(row)
    return rows
