"""GGUF: our own codes in llama.cpp's blocks, executed and compared in llama.cpp.

Nothing is quantized again. A row of a GGUF tensor is a sequence of blocks, scale and codes together (ggml-common.h):

    Q4_0    32 weights: float16 d, 16 bytes; byte j holds code j in its low, code 16 + j in its high nibble; d * (q - 8)
    Q4_1    32 weights: float16 d, float16 m, 16 bytes alike;                                                d * q + m
    Q8_0    32 weights: float16 d, 32 int8;                                                                  d * q
    Q2_0    64 weights: float16 d, 16 bytes, code 4j in the low bits of byte j;                              d * (q - 1)
    MXFP4   32 weights: exponent + 127 in one byte, 16 bytes as in Q4_0;                                     OCP MX's E2M1

So int4-g32 is Q4_0, uint4-g32 is Q4_1 and mxfp4-g32 is MXFP4, bit for bit, in another order. A group that is a multiple
of the block, or a whole row, becomes several blocks that repeat its scale; fewer bits go out as four, the same values
(q - 4 + 8 for three). Two bits in groups of 64 are Q2_0 with the sign turned: s * (q - 2) = -s * ((3 - q) - 1); files
with it need a llama.cpp that knows that type, and `portable=True` writes Q4_0 instead. All experts of a stack share a type.

llama.cpp reads the tensors of an architecture by name, so a family is a table of names (`_NAMES`) and what else differs:
the llama architecture rotates neighbouring pairs where transformers rotates halves, so the rows of q and k are permuted
(codes move with their rows); fused gate_up stacks are cut in two. Multi-head latent attention can be written

    "whole"    kv_b_proj as it is, all of it codes. llama.cpp then caches expanded keys and values, per token and layer
               heads * (key + value) numbers: the layout of DeepSeek files before April 2025, which it still reads
    "latent"   kv_b_proj cut into attn_k_b, transposed, and attn_v_b. llama.cpp caches the latent, kv_lora_rank + rope
               numbers. The groups of the transposed half run across ours: it goes out as floats

What is no codes is float16 where that changes no value, float32 otherwise; vectors and routers are always float32.

One difference is llama.cpp's own: its CPU code rounds the *inputs* of every quantized product to int8, 32 at a time (Q8_0),
and no option of it does otherwise. The weights are right all the same, so `verify` runs both and tells both: the file's
weights as float32 in llama.cpp, whose logits must be torch's, and the file as a phone runs it, beside torch with its inputs
rounded alike. The embedded models in int4-g32, 4,096 tokens of held-out text against torch's float32 inputs:

    edge-dense   as float32 1 - cosine 1e-13   as it runs 2.2e-5, same top token 99.0 %   torch with int8 inputs 2.2e-5, 99.2 %
    edge-moe     as float32 1 - cosine 1e-13   as it runs 3.6e-4, same top token 98.4 %   torch with int8 inputs 3.3e-4, 98.2 %

A mixture loses more: now and then the rounding turns a router's choice.
"""

import json
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, refuse_other_arithmetic, whole_or_nothing
from edgelab.fold import activations
from edgelab.layers import QEmbedding, QExperts, QLinear, Quantized
from edgelab.mixed_experts import QExpertsMixed
from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import PerGroup

MLA = ("whole", "latent")
VERSION, ALIGNMENT = 3, 32
_RUNTIME_NOTE = "in llama.cpp: "  # what `verify` adds to the notes begins so, and is replaced when it runs again


# ------------------------------------------------------------------------------------------------- the file's format


@dataclass(frozen=True)
class _Type:
    """A tensor type of ggml: its number, weights per block, bytes per block and the file_type of a file that is mostly this."""

    name: str
    number: int
    block: int
    bytes: int
    file_type: int

    def row_bytes(self, n: int) -> int:
        return n // self.block * self.bytes


F32, F16 = _Type("F32", 0, 1, 4, 0), _Type("F16", 1, 1, 2, 1)
Q4_0, Q4_1, Q8_0 = _Type("Q4_0", 2, 32, 18, 2), _Type("Q4_1", 3, 32, 20, 3), _Type("Q8_0", 8, 32, 34, 7)
MXFP4, Q2_0 = _Type("MXFP4", 39, 32, 17, 38), _Type("Q2_0", 42, 64, 18, 41)
_TYPES = {t.number: t for t in (F32, F16, Q4_0, Q4_1, Q8_0, MXFP4, Q2_0)}
QUANTIZED = (Q4_0, Q4_1, Q8_0, MXFP4, Q2_0)


def blocks(kind: _Type, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows, row bytes] of codes uint8 [rows, n] and scales [rows, n / block], as the type counts its codes.

    Codes are those of the scheme with the type's bits: 0 .. 15 for Q4_0, 0 .. 255 for Q8_0, 0 .. 3 for Q2_0.

    >>> blocks(Q4_0, np.arange(32, dtype=np.uint8)[None] % 16, np.array([[1]], np.float16))[0].tobytes().hex()
    '003c00112233445566778899aabbccddeeff'
    """
    rows, n = codes.shape
    if kind is Q8_0:
        body = (codes ^ np.uint8(128)).reshape(rows, -1, 32)  # q - 128 in two's complement
    elif kind is Q2_0:
        body = pack(np.uint8(3) - codes, 2).reshape(rows, -1, 16)
        scales = -scales
    else:
        halves = codes.reshape(rows, -1, 2, 16)
        body = halves[:, :, 0] | halves[:, :, 1] << 4
    heads = [np.ascontiguousarray(a).view(np.uint8).reshape(rows, n // kind.block, -1) for a in (scales, offsets) if a is not None]
    return np.concatenate([*heads, body], axis=-1).reshape(rows, -1)


def unblock(kind: _Type, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes uint8 [rows, n], scales and offsets [rows, n / block] of uint8 [rows, row bytes]: the inverse of `blocks`."""
    rows = raw.shape[0]
    raw = raw.reshape(rows, -1, kind.bytes)
    head = 1 if kind is MXFP4 else 2
    numbers = [np.ascontiguousarray(raw[..., i : i + head]) for i in range(0, 4 if kind is Q4_1 else head, head)]
    scales, *more = (a[..., 0] if head == 1 else a.view(np.float16)[..., 0] for a in numbers)
    body = raw[..., head * len(numbers) :]
    if kind is Q8_0:
        codes = body ^ np.uint8(128)
    elif kind is Q2_0:
        codes, scales = np.uint8(3) - unpack(np.ascontiguousarray(body), 2, 64), -scales
    else:
        codes = np.concatenate([body & 15, body >> 4], axis=-1)
    return codes.reshape(rows, -1), scales, more[0] if more else None


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value) -> bytes:
    """A metadata value with its type: bool, uint32, float32, string, or an array of int32 or strings."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case list():
            return struct.pack("<IIQ", 9, 5, len(value)) + np.array(value, "<i4").tobytes()
    raise TypeError(f"GGUF metadata of type {type(value).__name__}")


def _pad(n: int) -> int:
    return -n % ALIGNMENT


def write(path: Path, metadata: Mapping[str, object], tensors: "list[tuple[str, _Type, tuple[int, ...], Iterator[np.ndarray]]]") -> None:
    """Writes a GGUF file. Each tensor: its name, type, shape [..., out, in] and its bytes in pieces, made when their turn comes."""
    head = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, kind, shape, _ in tensors:
        head.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.number, offset))
        size = prod(shape[:-1]) * kind.row_bytes(shape[-1])
        offset += size + _pad(size)
    with open(path, "wb") as f:
        f.write(b"".join(head))
        f.write(bytes(_pad(f.tell())))
        for name, kind, shape, pieces in tensors:
            begin = f.tell()
            for piece in pieces:
                f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)  # tofile would hide that the disk is full
            size = f.tell() - begin
            if size != prod(shape[:-1]) * kind.row_bytes(shape[-1]):
                raise ExportError(f"{name}: {size:,} bytes were written of {prod(shape[:-1]) * kind.row_bytes(shape[-1]):,}")
            f.write(bytes(_pad(size)))
        f.flush()
        os.fsync(f.fileno())


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as it lies in a file: shape [..., out, in] and `data`, the file's bytes (mapped), uint8 [rows, row bytes]."""

    name: str
    kind: _Type
    shape: tuple[int, ...]
    offset: int
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def values(self) -> np.ndarray:
        """float32 of `shape`: what llama.cpp reads."""
        if self.kind in (F32, F16):
            dtype = np.float32 if self.kind is F32 else np.float16
            return np.ascontiguousarray(self.data).view(dtype).astype(np.float32).reshape(self.shape)
        codes, scales, offsets = unblock(self.kind, self.data)
        if self.kind is MXFP4:
            from edgelab.scheme import QuantScheme

            values, scales = QuantScheme.parse("mxfp4-g32").table[codes], np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        else:
            zero = {Q4_0: 8, Q4_1: 0, Q8_0: 128, Q2_0: 2}[self.kind]
            values, scales = codes.astype(np.float32) - np.float32(zero), scales.astype(np.float32)
        values = values.reshape(len(codes), -1, self.kind.block) * scales[..., None]
        if offsets is not None:
            values += offsets.astype(np.float32)[..., None]
        return values.reshape(self.shape)


def read(path: str | Path) -> tuple[dict[str, object], dict[str, StoredTensor]]:
    """(metadata, tensors by name) of a GGUF file; the tensors' bytes are mapped, not loaded.

    Raises ExportError for a file that is no GGUF, is cut short, or holds a tensor type that this module does not write.
    """
    path, at = Path(path), 0
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def take(form: str):
        nonlocal at
        try:
            values = struct.unpack_from(form, buffer, at)
        except struct.error as e:  # also a length that no file can have
            raise ExportError(f"{path.name} is cut short: its header asks for more than its {size:,} bytes") from e
        at += struct.calcsize(form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        return take(f"<{take('<Q')}s").decode(errors="replace")

    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def value(kind: int):
        if kind == 8:
            return text()
        inner, count = take("<IQ") if kind == 9 else (kind, 1)
        if inner in (8, 9):
            return [value(inner) for _ in range(count)]
        if inner not in scalars:
            raise ExportError(f"{path.name} holds a value of the unknown type {inner}: it is damaged")
        found = take(f"<{count}{scalars[inner]}")
        return found if kind != 9 else list(found) if isinstance(found, tuple) else [found]

    if size < 24 or buffer[:4] != b"GGUF":
        raise ExportError(f"{path.name} is no GGUF file")
    _, version, count, pairs = take("<4sIQQ")
    if version != VERSION:
        raise ExportError(f"{path.name} is GGUF version {version}; this reads version {VERSION}")
    metadata = {}
    for _ in range(pairs):
        key = text()
        metadata[key] = value(take("<I"))
    listed = []
    for _ in range(count):
        name, dims = text(), take("<I")
        shape = take(f"<{dims}Q")
        shape = shape if isinstance(shape, tuple) else (shape,)
        number, offset = take("<IQ")
        if number not in _TYPES:
            raise ExportError(f"{path.name}: {name} has the ggml type {number}; this reads {', '.join(t.name for t in _TYPES.values())}")
        listed.append((name, _TYPES[number], tuple(reversed(shape)), offset))
    begin, tensors = at + _pad(at), {}
    for name, kind, shape, offset in listed:
        rows, width = prod(shape[:-1]), kind.row_bytes(shape[-1])
        if begin + offset + rows * width > size:
            raise ExportError(f"{path.name} is cut short: {name} ends at byte {begin + offset + rows * width:,} of {size:,}")
        data = np.frombuffer(buffer, np.uint8, rows * width, begin + offset).reshape(rows, width)
        tensors[name] = StoredTensor(name, kind, shape, begin + offset, data)
    return metadata, tensors


# --------------------------------------------------------------------------------------------- from model to tensors


@dataclass(frozen=True, eq=False)
class _Piece:
    """Rows of one weight of the model: codes or floats [out, in], and which of its rows go out, in the file's order."""

    source: QTensor | np.ndarray
    rows: np.ndarray | slice | None = None  # None: all

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._picked(np.arange(self.source.shape[0]))), *self.source.shape[1:])

    def _picked(self, a: np.ndarray) -> np.ndarray:
        return a if self.rows is None else a[self.rows]

    def coded(self, kind: _Type) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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

    def bytes(self, kind: _Type) -> np.ndarray:
        if isinstance(self.source, QTensor):
            return blocks(kind, *self.coded(kind))
        return self._picked(self.source).astype(np.float32 if kind is F32 else np.float16)


@dataclass(frozen=True, eq=False)
class _Out:
    """One tensor of the file and the weights that it holds: several pieces are a stack."""

    name: str
    kind: _Type
    role: str  # "linear", "embedding", "experts" or "other" (vectors, routers)
    origin: str
    pieces: tuple[_Piece, ...]
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
class _Arch:
    """What llama.cpp calls an architecture, and where its code differs from transformers'."""

    name: str
    biases: tuple[str, ...] = ()  # the modules of which it reads a bias
    halves: bool = True  # rotary positions turn (i, i + half), as in transformers; False: (2i, 2i + 1), so rows are permuted


_QKV = ("q_proj", "k_proj", "v_proj")
ARCHITECTURES = {
    "llama": _Arch("llama", (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"), halves=False),
    "qwen2": _Arch("qwen2", _QKV),
    "qwen3": _Arch("qwen3", _QKV),
    "qwen3_moe": _Arch("qwen3moe", _QKV),
    "deepseek_v2": _Arch("deepseek2", halves=False),
    "deepseek_v3": _Arch("deepseek2", halves=False),
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


def _type_of(origin: str, sources: list[QTensor], portable: bool) -> _Type:
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


def _float_type(role: str, value: np.ndarray, halve: bool) -> _Type:
    """float16 for a matrix whose values all are float16 numbers, or when `halve`; vectors and routers stay float32."""
    if role == "other" or value.ndim < 2:
        return F32
    if halve or value.dtype == np.float16:
        return F16
    with np.errstate(over="ignore"):
        return F16 if np.array_equal(value.astype(np.float16).astype(np.float32), value) else F32


def _tensors(model: nn.Module, mla: str, portable: bool, halve: bool) -> list[_Out]:
    """What the file holds. Raises ExportError for a weight that it has no place for."""
    config = model.config.get_text_config()
    arch = ARCHITECTURES[config.model_type]
    found: list[_Out] = []

    def put(name: str, role: str, origin: str, sources: list[QTensor] | np.ndarray, rows=None, stacked: bool = False) -> None:
        if isinstance(sources, list):
            kind, parts = _type_of(origin.removesuffix(".weight"), sources, portable), sources
        else:
            kind, parts = _float_type(role, sources, halve), list(sources) if stacked else [sources]
        each = rows if isinstance(rows, list) else [rows] * len(parts)
        found.append(_Out(name, kind, role, origin, tuple(_Piece(p, r) for p, r in zip(parts, each, strict=True)), stacked))

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
    if _rope_scaling(config) == "llama3":  # what each frequency is divided by, as llama.cpp reads it
        theta, head = config.rope_parameters["rope_theta"], _head_dim(config)
        plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
        rope = model.get_decoder().rotary_emb
        put("rope_freqs.weight", "other", "rotary_emb.inv_freq", (plain / rope.inv_freq.float().cpu()).numpy())
    return found


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotated(config, arch: _Arch, module: str) -> np.ndarray | None:
    """The order of a projection's rows in the file, where llama.cpp turns (2i, 2i + 1) and transformers (i, i + half)."""
    if arch.halves or (arch.name == "deepseek2" and getattr(config, "rope_interleave", True)):
        return None
    latent = arch.name == "deepseek2"
    heads = {"q_proj": config.num_attention_heads, "q_b_proj": config.num_attention_heads, "kv_a_proj_with_mqa": 1}.get(module)
    if not latent:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)
    if heads is None:
        return None
    turned = config.qk_rope_head_dim if latent else _head_dim(config)
    before = 0
    if latent:
        before = config.kv_lora_rank if module == "kv_a_proj_with_mqa" else config.qk_nope_head_dim
    rows = np.arange(heads * (before + turned)).reshape(heads, before + turned)
    pairs = rows[:, before:].reshape(heads, 2, turned // 2).swapaxes(1, 2).reshape(heads, turned)
    return np.concatenate([rows[:, :before], pairs], axis=1).reshape(-1)


# --------------------------------------------------------------------------------------------------------- metadata


def _rope_scaling(config) -> str:
    return dict(config.rope_parameters or {}).get("rope_type", "default")


def _refuse_config(config) -> None:
    """Raises ExportError for settings that llama.cpp's code for the architecture does not have."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(f"model_type={kind!r} is not one that this target writes; it writes {', '.join(sorted(ARCHITECTURES))}")
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"hidden_act={config.hidden_act!r}: llama.cpp's {ARCHITECTURES[kind].name} computes with silu only")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ExportError(f"sliding_window={config.sliding_window}: llama.cpp's {ARCHITECTURES[kind].name} attends to all tokens")
    if _rope_scaling(config) not in ("default", "linear", "yarn") + (("llama3",) if kind == "llama" else ()):
        raise ExportError(
            f"rope_type={_rope_scaling(config)!r} is not written for {kind}; default, linear and yarn are, and llama3 for llama. "
            "A model that is used within its original context length can be exported with rope_type='default'"
        )
    if _rope_scaling(config) == "yarn":
        rope = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
        } | config.rope_parameters
        plain = (rope["beta_fast"] or 32.0, rope["beta_slow"] or 1.0, rope["attention_factor"]) == (32.0, 1.0, None)
        matched = rope["mscale"] is not None and rope["mscale"] == rope["mscale_all_dim"]
        if not plain or (kind.startswith("deepseek") and not matched):
            raise ExportError(
                f"yarn with {rope}: llama.cpp reads beta_fast=32, beta_slow=1, no attention_factor, and for DeepSeek an mscale that "
                "equals mscale_all_dim (as DeepSeek-V3 has it); other numbers are not written"
            )
    if dict(config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("partial_rotary_factor below 1 is not written")
    if kind == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError(f"head_dim={_head_dim(config)}: llama.cpp's qwen2 takes hidden_size / heads only")
    if kind == "qwen3_moe" and not config.norm_topk_prob:
        raise ExportError("norm_topk_prob=False: llama.cpp's qwen3moe always lets the weights of the chosen experts sum to 1")
    if kind == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        raise ExportError(
            f"mlp_only_layers={config.mlp_only_layers}, decoder_sparse_step={config.decoder_sparse_step}: llama.cpp's qwen3moe has experts "
            "in every layer"
        )
    if kind == "deepseek_v2" and config.topk_method != "greedy":
        raise ExportError(f"topk_method={config.topk_method!r}: llama.cpp ranks groups as DeepSeek-V3 does; greedy can be exported")
    if kind.startswith("deepseek") and (config.q_lora_rank is not None and config.num_hidden_layers in (26, 27)):
        raise ExportError(f"num_hidden_layers={config.num_hidden_layers} with q_lora_rank: llama.cpp takes 26 and 27 layers for V2-Lite")


def _metadata(model: nn.Module, tensors: list[_Out], mla: str) -> dict[str, object]:
    """The keys of the architecture, as llama.cpp reads them (llama-arch.cpp)."""
    config = model.config.get_text_config()
    arch, rope = ARCHITECTURES[config.model_type].name, dict(config.rope_parameters or {})
    by_type: dict[_Type, int] = {}
    for t in tensors:
        by_type[t.kind] = by_type.get(t.kind, 0) + prod(t.shape)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    own: dict[str, object] = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "rope.dimension_count": _head_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if _rope_scaling(config) in ("linear", "yarn"):
        own |= {"rope.scaling.type": _rope_scaling(config), "rope.scaling.factor": float(rope["factor"])}
    if _rope_scaling(config) == "yarn":
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if arch == "deepseek2" and rope.get("mscale_all_dim"):
            own["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]  # llama.cpp divides by 0.1 again
    stacks = [t for t in tensors if t.name.endswith("ffn_down_exps.weight")]
    if stacks:
        counts = {t.shape[0] for t in stacks}
        if len(counts) > 1:
            raise ExportError(f"the layers have {sorted(counts)} experts; llama.cpp takes one number for all layers. Keep as many in each")
        own |= {
            "expert_count": counts.pop(),
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": stacks[0].shape[2],
        }
    if arch == "deepseek2":
        nope, turned, value, lora = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        own |= {
            "attention.kv_lora_rank": lora,
            "rope.dimension_count": turned,
            "leading_dense_block_count": min(config.first_k_dense_replace, layers) if stacks else layers,
            "expert_shared_count": config.n_shared_experts if stacks else 0,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.model_type == "deepseek_v3" and bool(config.norm_topk_prob),
            "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,  # sigmoid, softmax
        }
        if not stacks:  # llama.cpp asks for it of a dense model too
            own["expert_feed_forward_length"] = config.moe_intermediate_size
        own["attention.q_lora_rank"] = config.q_lora_rank or 0  # asked for also where there is none
        if config.model_type == "deepseek_v3" and stacks and config.n_group > 1:
            own |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
        if mla == "whole":
            own |= {"attention.head_count_kv": heads, "attention.key_length": nope + turned, "attention.value_length": value}
        else:  # one head of keys: the latent
            own |= {"attention.head_count_kv": 1, "attention.key_length": lora + turned, "attention.value_length": lora}
            own |= {"attention.key_length_mla": nope + turned, "attention.value_length_mla": value}
    schemes = sorted({str(p.source.scheme) for t in tensors for p in t.pieces if isinstance(p.source, QTensor)})
    found: dict[str, object] = {"general.architecture": arch, "general.type": "model"}
    if schemes:
        found |= {"general.quantization_version": 2, "edgelab.schemes": json.dumps(schemes)}
    found["general.file_type"] = max(by_type, key=by_type.get).file_type
    return found | {f"{arch}.{key}": v for key, v in own.items()}


# -------------------------------------------------------------------------------------------------------- tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's pre-tokenizers by name: expressions that cut the text one after the other (llama-vocab.cpp). It has no others
# than those it was compiled with, so a tokenizer of one's own gets the nearest. That of the embedded models, which knows no
# contractions, gets "smollm", which cuts 's, 't, 're ... off whatever follows them: b'text' becomes b 't ext '. Of 270,000 held-out
# tokens 0.01 % differ for it.
PRE_TOKENIZERS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "qwen2": (rf"{_CASELESS}|{_WORDS}|\p{{N}}|{_TAIL}",),
    "llama-bpe": (rf"{_CASELESS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# what a tokenizer is compared on: prose, contractions, quotes, numbers, code, white space, other scripts, nothing
TEXTS = (
    "Return a list of the names, in the order in which they were defined.",
    "It's what we'd call a don't-care: they're I'm you've we'll.",
    "set a timer for 25 minutes and 3.5 seconds",
    "12345 + 678 = 13023",
    "def f(self, *args, key='value', **kwargs):\n    return {k: v for k, v in kwargs.items()}\n",
    "x = b'text' if r'raw' else 'self'\n",
    "    indented\n\n\n        twice\t\ttabs   \n",
    "a  b   c    d",
    "naïve café, Größe, Ελληνικά, Русский",
    "日本語のテキスト と 中文",
    "emoji 🙂👍🏽 and symbols ±×÷ €100 <html> a->b != c",
    "",
    " leading and trailing ",
    "CamelCase snake_case SCREAMING_CASE http://example.org/a?b=c&d=%20",
)


def _vocabulary(tokenizer, size: int, pre: str | None) -> dict[str, object]:
    """The keys tokenizer.ggml.* of a byte-level BPE tokenizer for a model with `size` rows. None or False: no tokenizer in the file."""
    if not tokenizer:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if stored["model"].get("type") != "BPE" or '"ByteLevel"' not in json.dumps(stored["pre_tokenizer"]):
        raise ExportError(
            f"{type(tokenizer).__name__} is no byte-level BPE tokenizer, the only kind that this target writes; "
            "tokenizer=False leaves it out (ids in, ids out)"
        )
    ids = {**stored["model"]["vocab"], **{t["content"]: t["id"] for t in stored["added_tokens"]}}
    if max(ids.values()) >= size:
        raise ExportError(f"the tokenizer has ids up to {max(ids.values())}; the model has {size} rows: it is another model's tokenizer")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size  # 5: unused
    for token, i in ids.items():
        tokens[i], types[i] = token, 1
    for token in stored["added_tokens"]:
        types[token["id"]] = 3 if token["special"] else 4  # control, user defined
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise ExportError(f"pre={pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    found: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or nearest_pre_tokenizer(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if merges:
        found["tokenizer.ggml.merges"] = merges
    for key in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{key}_token_id")) is not None:
            found[f"tokenizer.ggml.{'unknown' if key == 'unk' else 'padding' if key == 'pad' else key}_token_id"] = i
    probe = tokenizer("a").input_ids
    found["tokenizer.ggml.add_bos_token"] = bool(probe) and probe[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(probe) > 1 and probe[-1] == tokenizer.eos_token_id
    found["tokenizer.ggml.add_space_prefix"] = False
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    return found


def nearest_pre_tokenizer(tokenizer) -> str:
    """The name in `PRE_TOKENIZERS` with which most of `TEXTS` become the same ids as with the tokenizer's own."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    own = tokenizer.backend_tokenizer
    wanted = [own.encode(text).ids for text in TEXTS]
    same = {}
    for name, expressions in PRE_TOKENIZERS.items():
        twin = Tokenizer.from_str(own.to_str())
        twin.pre_tokenizer = Sequence(
            [*(Split(Regex(e), "isolated") for e in expressions), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        same[name] = sum(twin.encode(text).ids == ids for text, ids in zip(TEXTS, wanted, strict=True))
    return max(same, key=same.get)  # the first of equals


# --------------------------------------------------------------------------------------------------------- the doors


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    tokenizer=None,
    check: bool = True,
    mla: str | None = None,
    portable: bool = False,
    halve: bool = False,
    pre: str | None = None,
) -> ExportResult:
    """The verified GGUF file of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model, whose tokenizer then goes into the file too. `out`: the file
    to write, or a folder (then `model.gguf` in it). `tokenizer`: a fast tokenizer of transformers; False leaves out the one of
    the directory: the file then takes and gives ids. `check=False` leaves out `verify`, and needs no llama.cpp. `mla`: "whole"
    or "latent" (see the module) for DeepSeek models; None: "whole" when kv_b_proj is quantized, so that it stays so, else
    "latent". `portable` writes no Q2_0, which older llama.cpp can't read. `halve` rounds matrices that are no codes to
    float16, as most GGUF files have them. `pre`: llama.cpp's pre-tokenizer, a name of `PRE_TOKENIZERS`; None: the one that
    agrees with the tokenizer on most of `TEXTS`.

    Raises ExportError when the model has no place in llama.cpp's architecture, when llama-cpp-python is missing, and when
    the written file does not pass `verify`; nothing is left under `out` then.
    """
    began = time.perf_counter()
    if tokenizer is None and not isinstance(model, nn.Module) and (not Path(model).is_dir() or (Path(model) / "tokenizer.json").is_file()):
        from edgelab.model import load_tokenizer

        tokenizer = load_tokenizer(model)
    model, out = causal_lm(model), Path(out)
    path = out if out.suffix == ".gguf" else out / "model.gguf"
    if mla not in (None, *MLA):
        raise ExportError(f"mla={mla!r} is not one of {', '.join(MLA)}")
    if check:
        _runtime()  # before the work
    config = model.config.get_text_config()
    _refuse_config(config)
    if other := sorted(set(activations(model).values()) - {"silu"}):
        raise ExportError(f"{', '.join(other)}: llama.cpp's {ARCHITECTURES[config.model_type].name} computes with silu only")
    refuse_other_arithmetic(model, symmetric_only=False)  # GGUF has homes for more: see `_type_of`
    if mla is None:
        mla = "whole" if any(n.endswith("kv_b_proj") and isinstance(m, Quantized) for n, m in model.named_modules()) else "latent"
    tensors = _tensors(model, mla, portable, halve)
    metadata = _metadata(model, tensors, mla) | _vocabulary(tokenizer, config.vocab_size, pre)
    metadata |= {"general.name": type(model).__name__, "edgelab.version": _version(), "edgelab.options": json.dumps([mla, portable, halve])}
    with whole_or_nothing(path) as files:
        write(files[0], metadata, [(t.name, t.kind, t.shape, t.data()) for t in tensors])
        result = replace(_count(model, tensors, metadata, files), notes=_notes(config, tensors, mla, metadata))
        if check:
            result = verify(result, model, tokenizer=tokenizer)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _version() -> str:
    import edgelab

    return edgelab.__version__


def _coded(t: _Out) -> bool:
    return t.kind in QUANTIZED


def _count(model: nn.Module, tensors: list[_Out], metadata: Mapping[str, object], files: tuple[Path, ...]) -> ExportResult:
    """What the model asks for and how large the file is; `verify` replaces the quantized counts by the file's own. The prediction
    is that of the weights and of the tokenizer's words."""
    words = sum(len(_value(v)) for v in metadata.values() if isinstance(v, list))
    coded = [t for t in tensors if _coded(t)]
    in_experts = [t for t in tensors if t.role == "experts"]
    total = sum(prod(t.shape) for t in tensors if t.name != "rope_freqs.weight" and not t.name.endswith("exp_probs_b.bias"))
    return ExportResult(
        "gguf",
        files,
        sum(f.stat().st_size for f in files),
        sum(t.nbytes for t in tensors) + words,
        total,
        sum(prod(t.shape) for t in coded),
        sum(prod(t.shape) for t in in_experts),
        sum(prod(t.shape) for t in in_experts if _coded(t)),
    )


def _notes(config, tensors: list[_Out], mla: str, metadata: dict[str, object]) -> tuple[str, ...]:
    notes = []
    by_kind = {kind: sum(prod(t.shape) for t in tensors if t.kind is kind) for kind in _TYPES.values()}
    notes.append("stored as " + ", ".join(f"{kind.name}: {n:,}" for kind, n in by_kind.items() if n))
    pieces = [(p.source, t.kind, p.shape) for t in tensors for p in t.pieces if isinstance(p.source, QTensor)]
    more = sum(prod(shape[:-1]) * kind.row_bytes(shape[-1]) - round(q.nbytes * shape[0] / q.shape[0]) for q, kind, shape in pieces)
    if more > 0:
        notes.append(f"fewer bits and larger groups are written as blocks of the next type, the same values: {more:,} bytes more")
    if any(t.kind is Q2_0 for t in tensors):
        notes.append("has tensors of type Q2_0, which older llama.cpp can't read; portable=True writes Q4_0 instead")
    if config.model_type.startswith("deepseek"):
        heads, key, value = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        whole, latent = heads * (key + value), config.kv_lora_rank + config.qk_rope_head_dim
        kept = whole if mla == "whole" else latent
        notes.append(f"attention written {mla}: llama.cpp caches {kept} numbers per token and layer (whole {whole}, latent {latent})")
        floats = [t for t in tensors if t.name.endswith("attn_k_b.weight") and any(o.origin == t.origin and _coded(o) for o in tensors)]
        if floats:
            n = sum(prod(t.shape) for t in floats)
            notes.append(f"{n:,} weights of kv_b_proj are transposed and left their codes: {floats[0].kind.name}, the same values")
    rounded = [t for t in tensors for p in t.pieces if t.kind is F16 and not isinstance(p.source, QTensor) and not _is_half(p.source)]
    if rounded:
        notes.append(f"{sum(prod(t.shape) for t in rounded):,} weights were rounded to float16")
    if "tokenizer.ggml.pre" not in metadata:
        notes.append("no tokenizer in the file: ids in, ids out")
    return tuple(notes)


def _is_half(value: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return value.dtype == np.float16 or np.array_equal(value.astype(np.float16).astype(np.float32), value)


def verify(
    result: ExportResult,
    model: nn.Module,
    *,
    tokenizer=None,
    lengths: tuple[int, ...] = LENGTHS,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
) -> ExportResult:
    """`result` with the parity that llama.cpp reached and the counts found in the file.

    Opens the file again. First its tensors: every code, scale and float must be bit for bit the model's (rows put back in
    order), and nothing quantized may be missing. Then llama.cpp, on one thread of the CPU with a float32 cache, on random
    tokens of each of `lengths` against `model`: the file's weights as float32 (`parity`), and the file as it runs, with int8
    inputs (`parity` again, under as_run_..., and in the notes beside what that rounding does to torch). Above `TWIN_BYTES` of
    float32 the latter alone. The notes also tell how many tokens are the same that follow greedily, one by one through the
    cache, and with a `tokenizer` for how many of `TEXTS` the ids are.

    Raises ExportError for a changed value, a missing weight, a size off the prediction, a cosine below `min_cosine`, or
    one below `MIN_AS_RUN` of the file as it runs.
    """
    path = result.files[0]
    metadata, stored = read(path)
    mla, portable, halve = json.loads(str(metadata.get("edgelab.options", '["whole", false, false]')))
    tensors = _tensors(model, mla, portable, halve)
    expected = _count(model, tensors, metadata, result.files)
    quantized, experts = _check_tensors(path, stored, tensors)
    if quantized != expected.weights_quantized or experts != expected.experts_quantized:
        raise ExportError(
            f"{path.name} holds {quantized:,} quantized weights, {experts:,} of them experts'; "
            f"the model has {expected.weights_quantized:,} and {expected.experts_quantized:,}"
        )
    # on top: some 160 bytes a tensor for its name, shape and alignment, and the keys
    allowed = expected.predicted_bytes // 100 + 160 * len(stored) + 2**13
    if not 0 <= expected.bytes - expected.predicted_bytes <= allowed:
        raise ExportError(
            f"{path.name} has {expected.bytes:,} bytes; weights and words take {expected.predicted_bytes:,}, the rest at most {allowed:,}"
        )
    runtime = _runtime()
    notes = [n for n in result.notes if not n.startswith(_RUNTIME_NOTE)]
    length = max(*lengths, GREEDY_PROMPT + GREEDY_TOKENS)
    with _llama(runtime, path, length) as llama:
        as_run = agreement(lambda ids: _logits(llama, ids), model, lengths, seed)
        same, asked = _greedy(llama, model, seed)
        notes.append(f"{_RUNTIME_NOTE}{same} of {asked} tokens the same, chosen greedily one by one through the cache")
        if tokenizer and metadata.get("tokenizer.ggml.model") == "gpt2":
            differ = [t for t in TEXTS if llama.tokenize(t.encode(), add_bos=True, special=True) != tokenizer(t).input_ids]
            pre, equal = metadata["tokenizer.ggml.pre"], len(TEXTS) - len(differ)
            others = f"; not {', '.join(map(repr, differ))}" if differ else ""
            notes.append(f"{_RUNTIME_NOTE}{equal} of {len(TEXTS)} texts become the same ids (pre-tokenizer {pre}){others}")
            if equal < MIN_TEXTS * len(TEXTS):
                raise ExportError(f"{path.name}: {notes[-1]}. Try another of pre={', '.join(PRE_TOKENIZERS)}, or tokenizer=False")
    parity, form = dict(as_run), ""
    if quantized:
        notes.append(f"{_RUNTIME_NOTE}as the file runs, with inputs rounded to int8: {_told(as_run)}")
        with _rounded_inputs(model) as rounded:
            notes[-1] += f"; torch with its inputs rounded so: {_told(agreement(rounded, model, lengths, seed))}"
        if 4 * sum(prod(t.shape) for t in stored.values()) <= TWIN_BYTES:
            form = "the file's weights as float32, "
            with tempfile.TemporaryDirectory() as folder:
                twin = Path(folder) / f"{path.stem}-float32.gguf"
                floats = [(t.name, F32, t.shape, iter([t.values()])) for t in stored.values()]
                write(twin, {k: v for k, v in metadata.items() if not k.startswith("edgelab.")}, floats)
                with _llama(runtime, twin, length) as llama:
                    parity = agreement(lambda ids: _logits(llama, ids), model, lengths, seed)
        parity |= {f"as_run_{k}": v for k, v in as_run.items()}
    if not parity["cosine"] >= min_cosine:
        raise ExportError(
            f"logits of {path.name} in llama.cpp ({form or 'as it runs, '}{_told(parity)}) have cosine {parity['cosine']:.6f} to torch's; "
            f"{min_cosine} is asked for"
        )
    if not as_run["cosine"] >= MIN_AS_RUN:
        raise ExportError(f"{path.name}: {notes[-1]}. A cosine below {MIN_AS_RUN} is no rounding any more")
    by = f"llama.cpp (llama-cpp-python {runtime.__version__}) CPU, {form}{' + '.join(map(str, lengths))} tokens"
    return replace(expected, seconds=result.seconds, parity=parity, verified_by=by, notes=tuple(notes))


TWIN_BYTES = 2**30
MIN_AS_RUN = 0.98  # a mixture of 4 layers was at 0.9993; a wrong scale or order of codes is at 0.9 and below
MIN_TEXTS = 0.75  # share of `TEXTS`
GREEDY_PROMPT, GREEDY_TOKENS = 8, 24


def _check_tensors(path: Path, stored: dict[str, StoredTensor], tensors: list[_Out]) -> tuple[int, int]:
    """(weights, expert weights) that the file really holds as codes, each compared with the model's."""
    missing, extra = {t.name for t in tensors} - set(stored), set(stored) - {t.name for t in tensors}
    if missing or extra:
        raise ExportError(f"{path.name} {'lacks' if missing else 'has besides the model'} {', '.join(sorted(missing or extra)[:4])}")
    for t in tensors:
        held = stored[t.name]
        if held.kind is not t.kind or held.shape != t.shape:
            raise ExportError(f"{path.name}: {t.name} is {held.kind.name} {held.shape}; {t.origin} is {t.kind.name} {t.shape}")
        rows = prod(t.pieces[0].shape[:-1])
        for i, piece in enumerate(t.pieces):
            raw = held.data[i * rows : (i + 1) * rows]
            where = f"{path.name}: {t.name}" + (f"[{i}]" if t.stacked else "")
            if not _coded(t):
                if raw.tobytes() != piece.bytes(t.kind).tobytes():
                    raise ExportError(f"{where}: the values in the file are not those of {t.origin}")
                continue
            for what, ours, theirs in zip(("codes", "scales", "offsets"), piece.coded(t.kind), unblock(t.kind, raw), strict=True):
                if (ours is None) != (theirs is None) or (ours is not None and ours.tobytes() != theirs.tobytes()):
                    raise ExportError(f"{where}: the {what} in the file are not those of {t.origin} ({piece.source.scheme})")
    coded = [t for t in stored.values() if t.kind in QUANTIZED]
    return sum(prod(t.shape) for t in coded), sum(prod(t.shape) for t in coded if t.name.endswith("_exps.weight"))


# ------------------------------------------------------------------------------------------------------- llama.cpp


def _runtime():
    """llama-cpp-python, imported here so that the rest works without it."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as e:  # a wheel built for another processor fails with the latter two
        raise ExportError(
            f'llama-cpp-python is not installed or does not load ({e}); verification needs the extra `gguf`: pip install "edgelab[gguf]" '
            "(it builds llama.cpp, some 20 minutes). export(check=False) writes the file without it"
        ) from e
    return llama_cpp


@contextmanager
def _llama(runtime, path: Path, length: int):
    """The file in llama.cpp: CPU, one thread, all logits, a float32 cache (its default, float16, alone costs 2e-4)."""
    size, said = -(-length // 32) * 32, []
    listen = runtime.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace").strip()) if level == 4 else None)
    runtime.llama_log_set(listen, None)
    try:
        llama = runtime.Llama(
            str(path), n_gpu_layers=0, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=1, n_threads_batch=1, logits_all=True,
            type_k=runtime.GGML_TYPE_F32, type_v=runtime.GGML_TYPE_F32, flash_attn=False, verbose=False,
            yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,  # as the file says; the package has numbers of its own
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as e:
        reason = said[0] if said else str(e).strip() or type(e).__name__
        raise ExportError(f"llama.cpp refuses {path.name}: {reason}") from e
    finally:
        from llama_cpp._logger import llama_log_callback

        runtime.llama_log_set(llama_log_callback, None)  # as it was
    try:
        yield llama
    finally:
        llama.close()


def _told(parity: Mapping[str, float]) -> str:
    return f"1 - cosine {1 - parity['cosine']:.1e}, same top token {parity['top1_agreement']:.2%}, KL {parity['kld']:.1e}"


@contextmanager
def _rounded_inputs(model: nn.Module):
    """A run of `model` in which every quantized layer rounds its input as llama.cpp does, to int8 per 32 with a float16 scale;
    outside a run `model` is as it was."""
    layers = [m for m in model.modules() if isinstance(m, QLinear | QExperts)]

    def rounded(_: str, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (-1, 32))
        top = parts.abs().amax(-1, keepdim=True)
        codes = torch.round(parts * torch.where(top == 0, 0.0, 127 / top))
        return (codes * (top / 127).half().float()).flatten(-2).to(x.dtype)

    def run(ids: np.ndarray) -> np.ndarray:
        swiglu = [(m, m._is_swiglu) for m in layers if isinstance(m, QExperts)]
        try:
            for m in layers:
                m._rounded = rounded
            for m, _ in swiglu:
                m._is_swiglu = False  # the fused kernel has no place for it
            return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double().numpy()
        finally:
            for m in layers:
                del m._rounded
            for m, was in swiglu:
                m._is_swiglu = was

    yield run


def _logits(llama, ids: np.ndarray) -> np.ndarray:
    llama.reset()
    llama.eval([int(i) for i in ids])
    return llama.scores[: len(ids)].copy()


@torch.no_grad()
def _greedy(llama, model: nn.Module, seed: int) -> tuple[int, int]:
    """(tokens that are the same until the first that differs, tokens asked for) of both going on from random ids."""
    ids = np.random.default_rng(seed).integers(0, model.config.get_text_config().vocab_size, GREEDY_PROMPT).tolist()
    llama.reset()
    llama.eval(ids)
    for n in range(GREEDY_TOKENS):
        ours = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if ours != int(llama.scores[len(ids) - 1].argmax()):
            return n, GREEDY_TOKENS
        ids.append(ours)
        llama.eval([ours])
    return GREEDY_TOKENS, GREEDY_TOKENS
