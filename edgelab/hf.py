"""transformers learns to load what edgelab saves, and to compress what it loads: `import edgelab.hf`, then

    AutoModelForCausalLM.from_pretrained(bundle)                                          # a saved bundle
    AutoModelForCausalLM.from_pretrained(name, quantization_config=EdgeLabConfig(scheme="int4-g32"))    # quantizes on load

A checkpoint of ours says in its config

    "quantization_config": {"quant_method": "edgelab", "format": 1, "schemes": {weight name: "int4-g32", ...},
                            "activations": {weight name: "a8-static", ...}}       only where inputs are rounded

and holds for each of these weights `packed`, `scales` and, for an asymmetric scheme, `offsets` in the place of a
floating-point tensor, and `act_scale` for a static range. Before the weights are read, the model lies on the meta device and
costs nothing; there its modules are swapped for empty quantized layers, so that floating-point weights never exist. Of
a tied pair (embedding and head) the codes are stored once; how each rounds its input is its own.

Quantizing on load happens after all weights were read, in place, one module at a time, by `compress` itself: so its checks
and its coverage audit hold (expert stacks are never skipped), at the price of a peak of the whole floating-point model.
transformers could also quantize each tensor as it is read, but a recipe looks at more than one at a time: both stacks of an
expert module, tied pairs, the model's NaNs. For a checkpoint larger than memory compress it in streaming mode first.
Weights are rounded from the dtype that `from_pretrained` was asked for: leave `dtype` at the checkpoint's own.
"""

import json
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from edgelab.layers import Blank, QEmbedding, QExperts, QLinear, Quantized
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import _own_name, dequantize, family_of, quantized, retie, stored_tensors, swap, weights
from edgelab.recipe import Method, Quantize, Recipe, RunTime, Smooth, matches, step_of
from edgelab.runtime_steps import attach, restore, steps_of
from edgelab.scheme import ActScheme, QuantScheme

FORMAT = 1


@register_quantization_config("edgelab")
class EdgeLabConfig(QuantizationConfigMixin):
    """The `quantization_config` of our checkpoints, or what to do to one that is not quantized yet.

    To quantize on load: a `recipe` (a `Recipe`, its JSON text or that text read), or `scheme` for all weights, by `method`
    ("rtn", "hqq", or a dict with its settings, as in {"name": "rtn", "mse_grid": 32}). `embedding` and `head`: True for
    the same scheme, False to keep them, or a scheme's text; a tied head goes with the embedding. `keep`: globs over weight names,
    or roles ("@attention"), that stay in floating point, like other quantizers' `modules_to_not_convert`; routers always do.
    `activations`: how inputs are rounded at run time, such as "a8-token". Raises ValueError for what needs calibration data.

    `schemes`, `activations` (a dict) and `format` are what a saved checkpoint holds.

    >>> EdgeLabConfig(scheme="int3-g64", embedding="int8-row", keep=["*.o_proj"]).recipe.steps[0].rules[1:3]
    (('*.o_proj', None), ('@embedding', QuantScheme(bits=8, granularity=PerChannel(), codebook='int')))
    """

    def __init__(
        self,
        recipe: Recipe | str | dict | None = None,
        scheme: str | QuantScheme | None = None,
        method: Method | str | dict = "rtn",
        *,
        embedding: bool | str = True,
        head: bool | str = True,
        keep: tuple[str, ...] | list[str] = (),
        activations: dict[str, str] | ActScheme | str | None = None,
        schemes: dict[str, str] | None = None,
        runtime: list[dict] | tuple[dict, ...] = (),
        adapters: dict[str, int] | None = None,
        format: int = FORMAT,
        quant_method: str = "edgelab",
        **unknown,
    ) -> None:
        if format != FORMAT:
            raise ValueError(f"quantization_config has format {format!r}, this edgelab reads {FORMAT}: it was written by another version")
        if quant_method != "edgelab" or unknown:
            what = f"quant_method={quant_method!r}" if quant_method != "edgelab" else f"{sorted(unknown)[0]!r}"
            raise ValueError(f"quantization_config of edgelab knows no {what}; it was written by another tool or version, or mistyped")
        settings = scheme is not None or keep or method != "rtn" or embedding is not True or head is not True
        if (schemes is not None) + (recipe is not None) + bool(settings) > 1:
            raise ValueError("give one of schemes (of a quantized checkpoint), recipe, or scheme with its settings")
        self.quant_method = "edgelab"
        self.format = format
        self.schemes = None if schemes is None else _texts("schemes", schemes, QuantScheme)
        self.activations: dict[str, str] = {}
        self.adapters = dict(adapters or {})
        self.runtime = tuple(_runtime_step(d) for d in runtime)
        self.recipe: Recipe | None = None
        if schemes is not None:
            self.activations = _texts("activations", activations or {}, ActScheme)
            return
        if isinstance(activations, dict):
            raise ValueError("the quantization_config lists activations of weights but no schemes: config.json was damaged; copy it again")
        if recipe is not None and activations is not None:
            raise ValueError("activations belong into the recipe: Quantize(..., activations='a8-token')")
        self.recipe = _read(recipe) if recipe is not None else _recipe(scheme or "int4-g32", method, embedding, head, keep, activations)
        for i, step in enumerate(self.recipe.steps):
            if not Recipe((step,)).data_free:
                settings = getattr(step.method, "name", step.method) if isinstance(step, Quantize | Smooth) else ""
                what, kind = f"{type(step).__name__}({settings})", "training" if Recipe((step,)).learns else "calibration"
                raise ValueError(
                    f"step {i + 1} of the recipe, {what}, needs {kind} data, which from_pretrained has none of: load the model, "
                    "compress(model, recipe, calibration=...), save_bundle(...); from_pretrained then loads the bundle"
                )

    def to_dict(self) -> dict:
        """What goes into config.json: the schemes of a quantized model, or the recipe that is still to come."""
        d = {"quant_method": self.quant_method, "format": self.format}
        if self.schemes is None:
            return d | {"recipe": json.loads(self.recipe.to_json())}
        return (
            d
            | {"schemes": dict(self.schemes)}
            | ({"activations": dict(self.activations)} if self.activations else {})
            | ({"runtime": [step.to_dict() for step in self.runtime]} if self.runtime else {})
            | ({"adapters": dict(self.adapters)} if self.adapters else {})
        )

    def __iter__(self):
        yield from self.to_dict().items()  # transformers' dict(config)


def _texts(what: str, given: dict[str, str], kind: type) -> dict[str, str]:
    """`given` in canonical form. Raises ValueError, naming the weight, for what `kind` can't parse."""
    if not isinstance(given, dict):
        raise ValueError(f"{what} of the quantization_config is {given!r}; it must be {{weight name: text}}: copy config.json again")
    found = {}
    for name, text in given.items():
        try:
            found[name] = str(kind.parse(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} of the quantization_config, {name}: {text!r} can't be read ({error})") from error
    return found


def _runtime_step(d: dict) -> RunTime:
    step = step_of(d)
    if not isinstance(step, RunTime):
        raise ValueError(
            f"runtime of the quantization_config lists {d!r}, which is no step of run time: config.json was damaged; copy it again"
        )
    return step


def _read(recipe: Recipe | str | dict) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    try:
        return Recipe.from_json(recipe if isinstance(recipe, str) else json.dumps(recipe))
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe={recipe!r:.80} is no Recipe, nor what Recipe.to_json writes: {error}") from error


def _recipe(scheme, method, embedding, head, keep, activations) -> Recipe:
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} must be a list of patterns; write [{keep!r}]")

    def special(what: str, given: bool | str | QuantScheme) -> tuple[tuple[str, QuantScheme | None], ...]:
        if given is True:
            return ((f"@{what}", _scheme(scheme)),) if what == "embedding" else ()  # as Recipe.uniform writes it
        if given is not False and not isinstance(given, str | QuantScheme):
            raise ValueError(f"{what}={given!r} must be True (the same scheme), False (keep it), or a scheme such as 'int8-row'")
        return ((f"@{what}", None if given is False else _scheme(given)),)

    kept = tuple((pattern, None) for pattern in keep)
    rules = (("@router", None), *kept, *special("embedding", embedding), *special("head", head), ("*", _scheme(scheme)))
    return Recipe((Quantize(rules, method=method, activations=activations),))


def _scheme(given: str | QuantScheme) -> QuantScheme:
    return QuantScheme.parse(given) if isinstance(given, str) else given


@register_quantizer("edgelab")
class EdgeLabQuantizer(HfQuantizer):
    """Swaps modules before the weights are read, and lets tied layers share their codes after; or compresses after.

    A model that was compressed while loading has its `Coverage` and `Recipe` here, for `save_bundle`:
    `model.hf_quantizer.coverage`, `model.hf_quantizer.recipe`.
    """

    coverage = None
    recipe = None

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        if self.pre_quantized and self.quantization_config.schemes is None:
            raise ValueError("the quantization_config of this checkpoint lists no schemes: its config.json was damaged; copy it again")
        if not self.pre_quantized and self.quantization_config.recipe is None:
            raise ValueError(
                "this EdgeLabConfig describes a checkpoint that is quantized already (schemes), and this one is not: "
                "give EdgeLabConfig(scheme=...) or EdgeLabConfig(recipe)"
            )
        if not self.pre_quantized and isinstance(device_map, dict):
            _refuse_several(device_map.values())

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        known = {w.name: w for w in weights(model)}
        if not self.pre_quantized:  # a mistyped exception would quantize what was to be kept
            for step in self.quantization_config.recipe.steps:
                for pattern, scheme in getattr(step, "rules", ()):
                    if scheme is None and not pattern.startswith("@") and not any(matches(pattern, w.name, w.role) for w in known.values()):
                        some = ", ".join([*known][:2] + [*known][-1:])
                        raise ValueError(
                            f"{pattern!r} is to be kept, but matches no weight of {type(model).__name__}; names are {some} ..."
                        )
            return
        attach(model, self.quantization_config.runtime)
        schemes = self.quantization_config.schemes
        stacks = {name: name.partition("#")[0] for name in schemes}  # one expert is listed as <stack>#<expert>
        absent = sorted(name for name, stack in stacks.items() if stack not in known)
        if absent:
            raise ValueError(f"{type(model).__name__} has no weight {absent[0]}, which the quantization_config lists ({len(absent)} such)")
        shapes = {name: known[stack].shape[name != stack :] for name, stack in stacks.items()}
        swap(model, {n: Blank(shapes[n], QuantScheme.parse(s)) for n, s in schemes.items()})
        layers = _inputs(model)
        for name, text in self.quantization_config.activations.items():
            if name not in layers:
                raise ValueError(f"activations of the quantization_config list {name}, which is no quantized linear layer or expert stack")
            (layer, parameter), act = layers[name], ActScheme.parse(text)
            layer.round_input_of(parameter, act, 0.0 if act.static else None)  # the files fill in the number
        for name, rank in self.quantization_config.adapters.items():
            layer = dict(model.named_modules()).get(name)
            if not isinstance(layer, QLinear) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"adapters of the quantization_config list {name!r}: {rank!r}; they name quantized linears and a rank")
            with torch.device("meta"):
                layer.adapt(torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
        for module in model.modules():  # what is tied is not in the files: without buffers nobody waits for it
            if isinstance(module, Quantized) and module.tied_to:
                module._buffers.update(dict.fromkeys(module._stored["weight"].buffers))

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        if not self.pre_quantized:
            self._compress(model)
            return
        absent = [
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, Quantized)
            for buffer, tensor in module._buffers.items()
            # a tied layer waits for its owner's; transformers marks what it read from the files
            if not (tensor is None and getattr(module, "tied_to", None)) and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if absent:
            raise ValueError(
                f"the checkpoint lacks {len(absent)} tensors of quantized weights ({', '.join(absent[:4])}"
                f"{' ...' if len(absent) > 4 else ''}): copy it again"
            )
        retie(model)
        restore(model, self.quantization_config.runtime)

    def _compress(self, model) -> None:
        from edgelab.compress import compress  # it imports this module

        _refuse_several(p.device for p in model.parameters())
        recipe = self.quantization_config.recipe
        done = compress(model, recipe, inplace=True, progress=logging.is_progress_bar_enabled())
        adopt(model)
        self.coverage, self.recipe, self.pre_quantized = done.coverage, recipe, True

    def get_state_dict_and_metadata(self, model):
        adopt(model)  # the config is written next: what it says of the layers is what they are now
        return stored_tensors(model), {}

    def _dequantize(self, model, dtype=None):
        dequantize(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _refuse_several(devices: Iterable) -> None:
    """Modules that accelerate dispatches can't be swapped: the new ones would not fetch their inputs. On "meta" is what it offloads."""
    names = {str(d) for d in devices}
    if len(names) > 1 or names & {"disk", "meta"}:
        raise ValueError(
            f"device_map spreads the model over {', '.join(sorted(names))}; edgelab quantizes on load on one device: "
            "device_map='cpu' or 'cuda:0'. Or compress and save it first: a bundle is a fraction of the size"
        )


def _inputs(model: nn.Module) -> dict[str, tuple[Quantized, str]]:
    """{weight name: (layer, its parameter)} of every quantized weight that is multiplied by something, tied ones too."""
    family, found = family_of(model), {}
    for name, layer in model.named_modules():
        if getattr(layer, "is_part", False):
            continue  # of a QExpertsMixed, which speaks for its parts
        if isinstance(layer, QExperts | QExpertsMixed):
            found |= {f"{name}.{_own_name(family, p)}": (layer, p) for p in ("gate_up_proj", "down_proj")}
        elif isinstance(layer, Quantized) and not isinstance(layer, QEmbedding):
            found[name] = (layer, "weight")
    return found


def activations_of(model: nn.Module) -> dict[str, ActScheme]:
    """{weight name: how its input is rounded}, of the quantized layers that round their inputs."""
    return {name: layer.acts[parameter] for name, (layer, parameter) in _inputs(model).items() if parameter in layer.acts}


def adopt(model: PreTrainedModel) -> None:
    """Tell transformers that `model` (already swapped) is quantized, so that `save_pretrained` writes what loads again.

    A model that neither holds codes nor computes by run-time steps stays an ordinary one.
    """
    schemes, steps = {name: str(q.scheme) for name, (_, q) in quantized(model).items()}, steps_of(model)
    if not schemes and not steps:
        return
    config = EdgeLabConfig(
        schemes=schemes,
        activations={name: str(act) for name, act in activations_of(model).items()},
        runtime=[step.to_dict() for step in steps],
        adapters={n: m.lora_a.shape[0] for n, m in model.named_modules() if isinstance(m, QLinear) and m.lora_a is not None},
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, EdgeLabQuantizer):
        quantizer = EdgeLabQuantizer(config)
    quantizer.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = "edgelab"
    model.config.quantization_config = config
