"""transformers learns to load what edgelab saves: `import edgelab.hf`, then `AutoModelForCausalLM.from_pretrained(bundle)`.

A checkpoint of ours says in its config

    "quantization_config": {"quant_method": "edgelab", "format": 1, "schemes": {weight name: "int4-g32", ...}}

and holds for each of these weights `packed` and `scales` in the place of a floating-point tensor. Before the weights
are read, the model lies on the meta device and costs nothing; there its modules are swapped for empty quantized layers,
so that floating-point weights never exist. Of a tied pair (embedding and head) the codes are stored once.
"""

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from edgelab.layers import Blank, Quantized
from edgelab.model import dequantize, quantized, retie, stored_tensors, swap, weights
from edgelab.scheme import QuantScheme

FORMAT = 1


@register_quantization_config("edgelab")
class EdgeLabConfig(QuantizationConfigMixin):
    """The `quantization_config` of our checkpoints: a scheme for each quantized weight."""

    def __init__(self, schemes: dict[str, str] | None = None, format: int = FORMAT, **_ignored) -> None:
        if format != FORMAT:
            raise ValueError(f"quantization_config has format {format!r}, this edgelab reads {FORMAT}: it was written by another version")
        self.quant_method = "edgelab"
        self.format = format
        self.schemes = {name: str(QuantScheme.parse(text)) for name, text in (schemes or {}).items()}


@register_quantizer("edgelab")
class EdgeLabQuantizer(HfQuantizer):
    """Swaps modules before the weights are read, and lets tied layers share their codes after."""

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError("edgelab does not quantize while loading: load the model, then edgelab.compress(model, recipe)")

    def _process_model_before_weight_loading(self, model, **kwargs) -> None:
        known = {w.name: w for w in weights(model)}
        absent = sorted(set(self.quantization_config.schemes) - set(known))
        if absent:
            raise ValueError(f"{type(model).__name__} has no weight {absent[0]}, which the quantization_config lists ({len(absent)} such)")
        swap(model, {n: Blank(known[n].shape, QuantScheme.parse(s)) for n, s in self.quantization_config.schemes.items()})
        for module in model.modules():  # what is tied is not in the files: without buffers nobody waits for it
            if isinstance(module, Quantized) and module.tied_to:
                module._buffers.update(dict.fromkeys(module._stored["weight"].buffers))

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        absent = [
            f"{name}.{buffer}"
            for name, module in model.named_modules()
            if isinstance(module, Quantized) and not getattr(module, "tied_to", None)
            for buffer, tensor in module._buffers.items()
            if not getattr(tensor, "_is_hf_initialized", False)  # transformers marks what it read from the files
        ]
        if absent:
            raise ValueError(
                f"the checkpoint lacks {len(absent)} tensors of quantized weights ({', '.join(absent[:4])}"
                f"{' ...' if len(absent) > 4 else ''}): copy it again"
            )
        retie(model)

    def get_state_dict_and_metadata(self, model):
        return stored_tensors(model), {}

    def _dequantize(self, model, dtype=None):
        dequantize(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def adopt(model: PreTrainedModel) -> None:
    """Tell transformers that `model` (already swapped) is quantized, so that `save_pretrained` writes what loads again."""
    quantizer = EdgeLabQuantizer(EdgeLabConfig({name: str(q.scheme) for name, (_, q) in quantized(model).items()}))
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = "edgelab"
    model.config.quantization_config = quantizer.quantization_config
