"""The tensors of a GGUF file, from a model: names and shapes as llama.cpp wants them, codes as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import ExportError
from edgelab.export.gguf_file import F16, F32, MXFP4, Q2_0, Q4_0, Q4_1, Q8_0, Type, blocks
from edgelab.layers import QEmbedding, QExperts, QLinear, Quantized
from edgelab.mixed_experts import QExpertsMixed
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one weight of the model: codes or floats [out, in], and which of its rows go out, in the file's order."""

    source: QTensor | np.ndarray
    rows: np.ndarray | slice | None = None  # None: all

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._picked(np.arange(self.source.shape[0]))), *self.source.shape[1:])

    def _picked(self, a: np.ndarray) -> np.ndarray:
        return a if self.rows is None else a[self.rows]

    def coded(self, kind: Type) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes, scales and offsets as the blocks of `kind` hold them: widened, one scale per block, rows in the file's order."""
        q: QTensor = self.source
        zero = {Q4_0: 8, Q8_0: 128, Q2_0: 2}.get(kind, q.scheme.zero_point)  # the code that stands for 0 in this type
        codes = self._picked(q.codes() + np.uint8(zero - q.scheme.zero_point))
        count = q.shape[1] // kind.block

        def per_block(a: np.ndarray | None) -> np.ndarray | None:
            if a is None:
                return None
            return np.repeat(self._picked(np.broadcast_to(a, (q.shape[0], a.shape[1]))), count // a.shape[1], axis=1)

        return codes, per_block(q.scales), per_block(q.offsets)

    def bytes(self, kind: Type) -> np.ndarray:
        if isinstance(self.source, QTensor):
            return blocks(kind, *self.coded(kind))
        return self._picked(self.source).astype(np.float32 if kind is F32 else np.float16)


@dataclass(frozen=True, eq=False)
class Out:
    """One tensor of the file and the weights that it holds: several pieces are a stack."""

    name: str
    kind: Type
    role: str  # "linear", "embedding", "experts" or "other" (vectors, routers)
    origin: str
    pieces: tuple[Piece, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.pieces), *self.pieces[0].shape) if self.stacked else self.pieces[0].shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    def data(self) -> Iterator[np.ndarray]:
        """The tensor's bytes, piece by piece, so that one expert at a time is unpacked."""
        for piece in self.pieces:
            yield piece.bytes(self.kind)


@dataclass(frozen=True)
class Arch:
    """What llama.cpp calls an architecture, and where its code differs from transformers'."""

    name: str
    biases: tuple[str, ...] = ()  # the modules of which it reads a bias
    halves: bool = True  # rotary positions turn (i, i + half), as in transformers; False: (2i, 2i + 1), so rows are permuted


_QKV = ("q_proj", "k_proj", "v_proj")
ARCHITECTURES = {
    "llama": Arch("llama", (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"), halves=False),
    "qwen2": Arch("qwen2", _QKV),
    "qwen3": Arch("qwen3", _QKV),
    "qwen3_moe": Arch("qwen3moe", _QKV),
    "deepseek_v2": Arch("deepseek2", halves=False),
    "deepseek_v3": Arch("deepseek2", halves=False),
}
# a module inside a decoder block -> the file's name for it, behind blk.<n>.
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _type_of(origin: str, sources: list[QTensor], portable: bool) -> Type:
    """The type whose blocks hold these codes (the experts of a stack) unchanged. Raises ExportError when there is none."""
    books, bits, n = {q.scheme.codebook for q in sources}, max(q.scheme.bits for q in sources), sources[0].shape[-1]
    runs = [q.scheme.granularity.size if isinstance(q.scheme.granularity, PerGroup) else n for q in sources]
    schemes = " and ".join(sorted({str(q.scheme) for q in sources}))
    kind = None
    if books == {"int"}:
        twos = {q.scheme.bits for q in sources} == {2} and all(run % 64 == 0 for run in runs)
        kind = Q2_0 if twos and not portable else Q4_0 if bits <= 4 else Q8_0
    elif books == {"uint"} and bits <= 4:
        kind = Q4_1
    elif books == {"mxfp"}:
        kind = MXFP4
    if kind is None:
        raise ExportError(
            f"{origin} is {schemes}; no type of GGUF has these levels. Its blocks hold int2 to int8, uint2 to uint4 and mxfp4: "
            "export a model compressed to a scheme such as int4-g32"
        )
    if odd := next((run for run in runs if run % kind.block), None):
        row = "a row of" if odd == n else "a group of"
        raise ExportError(
            f"{origin} is {schemes}: {row} {odd} weights is no multiple of {kind.block}, the block of {kind.name}; "
            "use groups of 32, 64 or 128 that divide the row, or leave this weight in floating point"
        )
    return kind


def _sources(model: nn.Module) -> Iterator[tuple[str, str, list[QTensor] | np.ndarray]]:
    """(name, role, codes or floats) of every weight, bias and buffer that is saved; a tied pair once. Codes of a stack: one per expert."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QExpertsMixed):
            for parameter, experts in module.qtensors().items():
                yield f"{name}.{parameter}", "experts", experts
        elif isinstance(module, QExperts):
            if not getattr(module, "is_part", False):
                for parameter, q in module.qtensors().items():
                    yield f"{name}.{parameter}", "experts", [q[e] for e in range(q.shape[0])]
        elif isinstance(module, QLinear | QEmbedding) and not getattr(module, "tied_to", None):
            yield f"{name}.weight", "linear" if isinstance(module, QLinear) else "embedding", [module.qtensors()["weight"]]
        if isinstance(module, Quantized) and getattr(module, "bias", None) is None:
            continue
        own = {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}
        for parameter, value in own.items():
            if value is None or id(value) in seen or (isinstance(module, Quantized) and parameter != "bias"):
                continue
            seen.add(id(value))
            role = "other"
            if value.ndim == 3:
                role = "experts"
            elif isinstance(module, nn.Linear | nn.Embedding) and parameter == "weight":
                role = "linear" if isinstance(module, nn.Linear) else "embedding"
            yield f"{name}.{parameter}", role, _numpy(value)


def _numpy(t: Tensor) -> np.ndarray:
    t = t.detach()
    return (t if t.dtype in (torch.float32, torch.float16) else t.float()).cpu().numpy()


def _float_type(role: str, value: np.ndarray, halve: bool) -> Type:
    """float16 for a matrix whose values all are float16 numbers, or when `halve`; vectors and routers stay float32."""
    if role == "other" or value.ndim < 2:
        return F32
    if halve or value.dtype == np.float16:
        return F16
    with np.errstate(over="ignore"):
        return F16 if np.array_equal(value.astype(np.float16).astype(np.float32), value) else F32


def tensors_of(model: nn.Module, mla: str, portable: bool, halve: bool) -> list[Out]:
    """What the file holds. Raises ExportError for a weight that it has no place for."""
    config = model.config.get_text_config()
    arch = ARCHITECTURES[config.model_type]
    found: list[Out] = []

    def put(name: str, role: str, origin: str, sources: list[QTensor] | np.ndarray, rows=None, stacked: bool = False) -> None:
        if isinstance(sources, list):
            kind, parts = _type_of(origin.removesuffix(".weight"), sources, portable), sources
        else:
            kind, parts = _float_type(role, sources, halve), list(sources) if stacked else [sources]
        each = rows if isinstance(rows, list) else [rows] * len(parts)
        found.append(Out(name, kind, role, origin, tuple(Piece(p, r) for p, r in zip(parts, each, strict=True)), stacked))

    for origin, role, sources in _sources(model):
        module, _, parameter = origin.rpartition(".")
        place = module.removeprefix("model.layers.").partition(".") if module.startswith("model.layers.") else None
        inside = place[2] if place else module
        block = f"blk.{place[0]}." if place else ""
        if inside == "mlp.experts" and parameter in ("gate_up_proj", "down_proj"):
            if parameter == "down_proj":
                put(f"{block}ffn_down_exps.weight", role, origin, sources, stacked=True)
            else:
                inner = (sources[0].shape[0] if isinstance(sources, list) else sources.shape[1]) // 2
                put(f"{block}ffn_gate_exps.weight", role, origin, sources, slice(0, inner), True)
                put(f"{block}ffn_up_exps.weight", role, origin, sources, slice(inner, None), True)
        elif inside == "mlp.gate" and parameter == "e_score_correction_bias":
            put(f"{block}exp_probs_b.bias", role, origin, sources)
        elif inside == "self_attn.kv_b_proj" and mla == "latent":
            heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
            of_head = np.arange(heads * (nope + value)).reshape(heads, nope + value)
            whole = sources[0].dequantize() if isinstance(sources, list) else sources
            keys = np.ascontiguousarray(whole[of_head[:, :nope]].transpose(0, 2, 1))  # [heads, lora, nope]
            put(f"{block}attn_k_b.weight", role, origin, keys, stacked=True)
            if isinstance(sources, list):
                put(f"{block}attn_v_b.weight", role, origin, sources * heads, [r[nope:] for r in of_head], True)
            else:
                put(f"{block}attn_v_b.weight", role, origin, whole[of_head[:, nope:]], stacked=True)
        elif (target := (_NAMES if place else _OUTSIDE).get(inside)) and parameter in ("weight", "bias"):
            if parameter == "bias" and inside.rpartition(".")[2] not in arch.biases:
                raise ExportError(f"{origin}: llama.cpp's architecture {arch.name} reads no bias there; export a model without it")
            rows = _rotated(config, arch, inside.rpartition(".")[2])
            put(f"{block}{target}.{parameter}", role, origin, sources, rows)
        else:
            raise ExportError(
                f"{origin} has no place in llama.cpp's architecture {arch.name}: the file would compute without it. "
                f"Known are {', '.join(sorted(ARCHITECTURES))} as transformers makes them"
            )
    if rope_scaling(config) == "llama3":  # what each frequency is divided by, as llama.cpp reads it
        theta, head = config.rope_parameters["rope_theta"], head_dim(config)
        plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
        rope = model.get_decoder().rotary_emb
        put("rope_freqs.weight", "other", "rotary_emb.inv_freq", (plain / rope.inv_freq.float().cpu()).numpy())
    return found


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotated(config, arch: Arch, module: str) -> np.ndarray | None:
    """The order of a projection's rows in the file, where llama.cpp turns (2i, 2i + 1) and transformers (i, i + half)."""
    if arch.halves or (arch.name == "deepseek2" and getattr(config, "rope_interleave", True)):
        return None
    latent = arch.name == "deepseek2"
    heads = {"q_proj": config.num_attention_heads, "q_b_proj": config.num_attention_heads, "kv_a_proj_with_mqa": 1}.get(module)
    if not latent:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)
    if heads is None:
        return None
    turned = config.qk_rope_head_dim if latent else head_dim(config)
    before = 0
    if latent:
        before = config.kv_lora_rank if module == "kv_a_proj_with_mqa" else config.qk_nope_head_dim
    rows = np.arange(heads * (before + turned)).reshape(heads, before + turned)
    pairs = rows[:, before:].reshape(heads, 2, turned // 2).swapaxes(1, 2).reshape(heads, turned)
    return np.concatenate([rows[:, :before], pairs], axis=1).reshape(-1)


def rope_scaling(config) -> str:
    return dict(config.rope_parameters or {}).get("rope_type", "default")
