"""bitsandbytes beside us: NF4, FP4 and LLM.int8() through transformers, and an audit of what they leave in 16 bits.

Two uses. As a baseline: what most people run today, measured by the same code as ours. As a backend on CUDA, where its
kernels are fast and ours (numba) do not run. The code is the same for every device; what is measured and tested in this
project is the CPU. It needs the extra `bnb`: pip install 'edgelab[bnb]'.

    NF4, FP4   blocks of 64 consecutive weights, absmax float32: 4.5 bits per weight; with `double_quant` the absmax are 8 bits,
               256 of them to a float32 of their own: 4.127 (QLoRA, arXiv 2305.14314, section 3)
    int8       LLM.int8(): absmax per row, and the split of `methods/outliers.py`

What it skips. bitsandbytes replaces modules of the class nn.Linear. The experts of a mixture are no nn.Linear in transformers 5
but stacked parameters, and stay in 16 bits, nearly all of such a model (bitsandbytes issue 1849); so do the embedding
(by class) and the head (transformers leaves it out). `audit_bnb` counts it. To compare the *codes* at equal coverage,
`dequantized_by_bnb` gives what any weight would become, expert stacks included.

Three repairs that a baseline needs, made here on the loaded model (bitsandbytes 0.50.2):
- On a CPU with AVX-512 BF16, `Linear4bit` packs its weight anew in eval mode: it fails where the rows are no multiple of 32, as the
  latent projections of DeepSeek's attention, and rounds absmax and activations to bfloat16, which would count against NF4. It
  is switched off: the weights are unpacked and multiplied in the input's dtype.
- On a CPU a 4-bit weight whose rows are no multiple of the block is unpacked with the wrong absmax (16 x 96 normal numbers in
  NF4: 31 % error instead of 9 %; the codes are right). Such a weight is unpacked here as the one long row that it is stored as.
- `Linear8bitLt` fails on inputs of four dimensions, as DeepSeek's attention has them: they go in as rows.
"""

import copy
import importlib.util
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgelab.compress import audit
from edgelab.methods.coverage import Coverage, CoverageRow
from edgelab.model import check_directory, weights

KINDS = ("nf4", "fp4", "int8")
BLOCK = 64  # transformers gives no choice
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NOTES = {
    "experts": "bitsandbytes replaces nn.Linear only; a stack of experts is a plain parameter",
    "embedding": "bitsandbytes replaces nn.Linear only",
    "head": "transformers keeps the head from bitsandbytes",
}


def load_bnb(
    name_or_dir: str | Path, kind: str = "nf4", double_quant: bool = False, device: str | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The causal language model, quantized by bitsandbytes while transformers loads it, in eval mode.

    `kind`: "nf4", "fp4" or "int8". `double_quant`: 8-bit absmax, for the 4-bit kinds. `device`: "cuda" where there is one, else
    "cpu". `dtype`: of everything else, and of the products of the 4-bit kinds; int8 rounds its inputs to float16 whatever
    it is. Raises ImportError without the extra `bnb`, ValueError for another kind and for a checkpoint that is quantized.
    """
    _need("bitsandbytes", "accelerate")
    _check_kind(kind)
    if double_quant and kind == "int8":
        raise ValueError("double_quant=True is for nf4 and fp4; int8 has one scale per row, and nothing to gain")
    import transformers

    name = str(name_or_dir)
    if Path(name).is_dir() or isinstance(name_or_dir, Path):
        check_directory(Path(name))
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method")
        raise ValueError(f"{name} is quantized already ({method}); give load_bnb the floating-point model it came from")
    settings = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    if kind != "int8":
        settings |= {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": dtype}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        dtype=dtype,
        device_map={"": device or ("cuda" if torch.cuda.is_available() else "cpu")},
        use_safetensors=True,
        trust_remote_code=False,
    )
    for module in _layers(model).values():
        if kind == "int8":
            module.forward = partial(_by_rows, module.forward)
        else:
            module.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu" and module.in_features % BLOCK:
                module.forward = partial(_by_long_row, module)
    if kind == "int8":  # a warning per layer and call that float32 goes in as float16; the docstring says it once
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return model.eval()


def audit_bnb(model: nn.Module) -> Coverage:
    """What bitsandbytes touched of `model`, with the names, roles and shapes that the plain model's weights have.

    Bytes are those of the packed codes and their scales (absmax, and with double quantization its own absmax and mean) as they
    lie in memory; the tables of 16 and 256 levels, equal for all weights, are not counted. Whatever else is stored counts
    as in `compress.audit`.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no layer of bitsandbytes; load it with load_bnb")
    with torch.device("meta"):  # the same architecture without bytes, and without bitsandbytes
        plain = {w.module_name: w for w in weights(type(model)(model.config)) if w.kind == "linear"}
    rows: list[CoverageRow] = []
    for row in audit(model):
        owner = next((m for m in (row.name.removesuffix(".weight"), row.name.partition(".weight.")[0]) if m in layers), None)
        owner = owner or next((m for m in (row.name.removesuffix(".SCB"), row.name.removesuffix(".weight_format")) if m in layers), None)
        if owner is None:
            known = _NOTES.get(row.role) if row.note == "no rule gave it a scheme" else None
            rows.append(replace(row, note=known or row.note))
        elif row.name == f"{owner}.weight":
            w, (scheme, size) = plain[owner], _stored(layers[owner])
            rows.append(CoverageRow(w.name, w.role, w.shape, w.shape[0] * w.shape[1], scheme, size, True))
    return Coverage(tuple(rows))


def dequantized_by_bnb(weight: Tensor, kind: str = "nf4", blocksize: int = BLOCK, double_quant: bool = False) -> Tensor:
    """float32, of the shape of `weight` [out, in] or [experts, out, in]: what bitsandbytes makes of it, each expert by itself.

    On the weight's device. `blocksize` and `double_quant` are for nf4 and fp4; blocks run on from one row into the next where
    the rows are no multiple of it.
    """
    _need("bitsandbytes")
    _check_kind(kind)
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; it must be float [out, in] or [experts, out, in], not empty")
    if blocksize not in BLOCKS:
        raise ValueError(f"blocksize={blocksize!r} is not one of {', '.join(map(str, BLOCKS))}")
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        raise ValueError(f"weight holds {broken} NaN or infinite values of {weight.numel()}; repair the checkpoint")
    from bitsandbytes import functional as F

    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    matrices = weight.detach().float().unsqueeze(0) if weight.ndim == 2 else weight.detach().float()
    for matrix, target in zip(matrices, out.view(matrices.shape), strict=True):
        if kind == "int8":
            codes, absmax, _ = F.int8_vectorwise_quant(matrix.contiguous().half())
            target.copy_(codes.float() * (absmax[:, None] / 127))
        else:
            packed, state = F.quantize_4bit(matrix.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type=kind)
            target.copy_(_long_row(packed, state))
    return out


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of those that bitsandbytes put in."""
    _need("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}


def _stored(layer: nn.Module) -> tuple[str, int]:
    """(scheme, bytes) of a layer of bitsandbytes."""
    if hasattr(layer, "state"):  # Linear8bitLt; the scales move from the weight to the state at the first call
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return "bnb-int8-row", _nbytes(layer.weight.data, scales)
    state = layer.weight.quant_state
    nested = (state.state2.absmax, state.offset) if state.nested else ()
    return f"bnb-{state.quant_type}-g{state.blocksize}{'-double' if nested else ''}", _nbytes(layer.weight.data, state.absmax, *nested)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _long_row(packed: Tensor, state) -> Tensor:
    """The weight of codes and `QuantState`, unpacked as one row."""
    from bitsandbytes.functional import dequantize_4bit

    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return dequantize_4bit(packed, flat).reshape(state.shape)


def _by_long_row(layer: nn.Module, x: Tensor) -> Tensor:
    weight = _long_row(layer.weight.data, layer.weight.quant_state).to(x.dtype)
    return nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


def _by_rows(forward, x: Tensor) -> Tensor:
    return forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.ndim > 3 else forward(x)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}")


def _need(*packages: str) -> None:
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        raise ImportError(f"{' and '.join(absent)} not installed; this needs the extra `bnb`: pip install 'edgelab[bnb]'")
