"""What `byte_map` reads: the headers of safetensors, ONNX and GGUF files, from their published descriptions.

    safetensors   uint64 length, JSON {name: dtype, shape, data_offsets}, tensors
    ONNX          protobuf: a field is a varint (number << 3 | wire type), then a varint, or a length and so many bytes. Read are
                  ModelProto.graph (7), GraphProto.node (1) and .initializer (5), TensorProto.raw_data (9): the numbers of onnx.proto3
    GGUF          magic, version, counts; keys with typed values; name, shape, type and offset of each tensor; tensors, each padded

A reader gives the segments of a file in order, all of it. What an ONNX initializer *is*, the nodes that read it say (`_READS`), so files
of other tools are understood too; only floats are told apart by their names. Nothing in a file is trusted: lengths are checked
before they are followed, and ValueError says what is wrong.
"""

import json
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

from edgelab.byte_map import BLOCKS, GRAPH, Segment, role_of

SMALL_CONSTANT = 1024  # bytes; a float initializer below, of no known role, is a constant of the graph


# --------------------------------------------------------------------------------------------------- what all share


def _mapped(path: Path) -> "mmap.mmap | bytes":
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(f.fileno()).st_size else b""


def _laid(path: Path, data, begin: int, pieces: Iterable[Segment]) -> Iterator[Segment]:
    """`pieces` in the order of their offsets, from byte `begin` to the file's end, and segments for what lies between them."""
    at = begin
    for s in sorted(pieces, key=lambda s: (s.offset, s.bytes)):  # what is empty before what begins at the same byte
        if s.offset < at or s.end > len(data):
            where = "on top of another tensor" if s.end <= len(data) else f"behind the end of the file, {len(data):,} bytes"
            raise ValueError(f"{path.name} is damaged: {s.name} (bytes {s.offset:,} to {s.end:,}) lies {where}")
        yield from _gap(path, data, at, s.offset)
        if s.bytes:
            yield s
        at = s.end
    yield from _gap(path, data, at, len(data))


def _gap(path: Path, data, begin: int, end: int) -> Iterator[Segment]:
    if end > begin:
        zero = not any(data[at : min(at + (1 << 20), end)].strip(b"\0") for at in range(begin, end, 1 << 20))
        yield Segment(path.name, begin, end - begin, "padding" if zero else "not mentioned", "padding" if zero else "unknown")


def _count(tensor: str, n: int) -> int:
    """Of `n` numbers how many are weights: a router's correction is counted nowhere as one, for training sets it by counting tokens."""
    return 0 if re.search(r"correction_bias|exp_probs_b", tensor) else n


def _float_kind(tensor: str) -> str:
    return {"norm": "norms", "router": "router"}.get(role_of(tensor), "float weights")


# ------------------------------------------------------------------------------------------------------- safetensors

_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_DTYPE_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_STORED = re.compile(r"^(.*?)[._](packed|scales|offsets)$")


def _safetensors(path: Path) -> Iterator[Segment]:
    data = _mapped(path)
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
    if 8 + length > len(data):
        raise ValueError(f"{path.name} is no safetensors file, or cut short: its header would take {length:,} of {len(data):,} bytes")
    try:
        header = json.loads(data[8 : 8 + length])
        listed = [(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path.name} is damaged: its header is no list of tensors ({e})") from e
    text = bytes(data[8 : 8 + length])
    filled = length - len(text.rstrip(b" "))  # the header is filled up with spaces
    yield Segment(path.name, 0, 8 + length - filled, "names, shapes and places of the tensors", GRAPH)
    if filled:
        yield Segment(path.name, 8 + length - filled, filled, "spaces behind the header", "padding")
    rows = _packed_rows(path.parent)
    pieces = []
    for name, dtype, shape, begin, end in listed:
        if prod(shape) * _DTYPE_BYTES.get(dtype, 0) != end - begin and dtype in _DTYPE_BYTES:
            raise ValueError(f"{path.name} is damaged: {name} is {dtype} {list(shape)} and would have {end - begin:,} bytes")
        part = _STORED.match(name)
        piece = Segment(path.name, 8 + length + begin, end - begin, name, _float_kind(name), name, _count(name, prod(shape)), stored=dtype)
        if part and dtype in (("U8",) if part[2] == "packed" else ("F16", "U8")):
            bits, width = rows.get(part[1], (0, 0)) if part[2] == "packed" else (0, 0)
            kind = "codes" if part[2] == "packed" else "scales"
            piece = replace(piece, kind=kind, tensor=part[1], weights=prod(shape[:-1]) * width, bits=bits, width=width, parts={})
        pieces.append(piece)
    yield from _laid(path, data, 8 + length, pieces)


def _packed_rows(folder: Path) -> dict[str, tuple[int, int]]:
    """{name before .packed: (bits, weights per row)} of a bundle's weights, from the audit in its manifest; empty without one."""
    try:
        rows = json.loads((folder / "edgelab.json").read_text(encoding="utf-8"))["coverage"]["rows"]
        found = {r["name"]: (int(re.search(r"\d+", r["scheme"])[0]), r["shape"][-1]) for r in rows if r["touched"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    # the stacks of a mixture are parameters of one module: experts.down_proj is stored as experts.down_packed
    return found | {name.removesuffix("_proj"): row for name, row in found.items() if name.endswith("_proj") and ".experts." in name}


# -------------------------------------------------------------------------------------------------------------- ONNX

# op: [(its input that is codes, that of their scales, that of their zero points)]
_READS = {
    "MatMulNBits": [(1, 2, 3)],
    "GatherBlockQuantized": [(0, 2, 3)],
    "QMoE": [(2, 3, 11), (5, 6, 12), (8, 9, 13)],
    "DequantizeLinear": [(0, 1, 2)],
    "MatMulInteger": [(1, -1, 3)],
    "ConvInteger": [(1, -1, 3)],
    "DynamicQuantizeMatMul": [(1, 2, 3)],
    "QLinearMatMul": [(3, 4, 5)],
    "QLinearConv": [(3, 4, 5)],
}
_PASSES_ON = ("Cast", "Reshape", "Expand", "Transpose", "Unsqueeze")
_ELEMENT_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
_FLOATS = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}
_PAYLOADS = (4, 5, 7, 9, 10, 11)  # TensorProto's fields of values: float_data, int32_data, int64_data, raw_data, double_data, uint64_data


def _varint(data, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]  # IndexError behind the end: `_fields` says what that means
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError


class _Field(NamedTuple):
    """A field of a protobuf message: its number, wire type, the value of a varint; where it begins, its contents begin, and it ends."""

    number: int
    wire: int
    value: int
    begin: int
    contents: int
    end: int


def _fields(data, begin: int, end: int, where: str) -> Iterator[_Field]:
    """The fields of the message in bytes begin .. end. Raises ValueError for what is no protobuf message of exactly that length."""
    at = begin
    while at < end:
        start = at
        try:
            key, at = _varint(data, at)
            number, wire, value, contents = key >> 3, key & 7, 0, at
            if wire == 0:
                value, at = _varint(data, at)
            elif wire == 2:
                length, contents = _varint(data, at)
                at = contents + length
            else:
                at += {1: 8, 5: 4}[wire]  # KeyError: groups, of which ONNX has none
        except (IndexError, KeyError):
            number, at = 0, end + 1
        if at > end or not number:
            raise ValueError(f"{where} is no ONNX file, or damaged: the field at byte {start:,} is none, or leaves its message")
        yield _Field(number, wire, value, start, contents, at)


@dataclass
class _Tensor:
    """An initializer. `values`: where in the file they begin and end; `beside`: or in which other one, where, how many bytes."""

    name: str
    dims: list[int]
    dtype: int
    values: tuple[int, int] | None
    beside: tuple[str, int, int] | None


@dataclass
class _Node:
    """A node. `numbers`: its integer attributes; `values`: where those of its tensors begin and end."""

    op: str
    inputs: list[str]
    outputs: list[str]
    numbers: dict[str, int]
    values: list[tuple[int, int]]


def _onnx(path: Path) -> Iterator[Segment]:
    data, file = _mapped(path), path.name
    model = list(_fields(data, 0, len(data), file))
    graphs = [f for f in model if f.number == 7]
    if len(graphs) != 1:
        raise ValueError(f"{file} is no ONNX file: it holds {len(graphs)} graphs")
    fields = list(_fields(data, graphs[0].contents, graphs[0].end, file))
    nodes = {f.begin: _read_node(data, f, file) for f in fields if f.number == 1}
    tensors = {f.begin: _read_tensor(data, f, file) for f in fields if f.number == 5}
    described = _described(list(nodes.values()), list(tensors.values()))
    of_model = {1: "version", 2: "producer", 3: "producer", 8: "operator sets", 14: "metadata"}
    of_graph = {2: "name", 11: "inputs", 12: "outputs", 13: "shapes"}
    for f in model:
        if f.number != 7:
            yield Segment(file, f.begin, f.end - f.begin, f"{of_model.get(f.number, f'field {f.number}')} of the model", GRAPH)
            continue
        yield Segment(file, f.begin, f.contents - f.begin, "head of the graph", GRAPH)
        for g in fields:
            name, inside = f"{of_graph.get(g.number, f'field {g.number}')} of the graph", []
            if t := tensors.get(g.begin):
                name = f"name and shape of {t.name}"
                if t.values:
                    inside = [replace(described[t.name], file=file, offset=t.values[0], bytes=t.values[1] - t.values[0], parts={})]
            elif node := nodes.get(g.begin):
                output = next(iter(node.outputs), "nothing")
                name = f"node {node.op} of {output}"
                inside = [Segment(file, a, b - a, f"constant {output}", _constant(b - a)) for a, b in node.values]
            yield from _around(file, g.begin, g.end, name, inside)
    yield from _beside(path, [(t, described[t.name]) for t in tensors.values() if t.beside])


def _constant(size: int) -> str:
    return "float weights" if size >= SMALL_CONSTANT else GRAPH


def _around(file: str, begin: int, end: int, name: str, inside: list[Segment]) -> Iterator[Segment]:
    """The segments `inside` of a message, in order, and the message's own bytes between them under `name`."""
    at = begin
    for s in [*inside, None]:
        stop = end if s is None else s.offset
        if stop > at:
            yield Segment(file, at, stop - at, name, GRAPH)
        if s is not None and s.bytes:
            yield s
        at = stop if s is None else s.end


def _text(data, f: _Field) -> str:
    return bytes(data[f.contents : f.end]).decode(errors="replace")


def _read_tensor(data, field: _Field, where: str) -> _Tensor:
    t, pairs, external = _Tensor("", [], 0, None, None), {}, False
    for f in _fields(data, field.contents, field.end, where):
        match f.number:
            case 1 if f.wire == 0:
                t.dims.append(f.value)
            case 1:
                at = f.contents
                while at < f.end:
                    n, at = _varint(data, at)
                    t.dims.append(n)
            case 2:
                t.dtype = f.value
            case 8:
                t.name = _text(data, f)
            case 13:
                pair = {g.number: _text(data, g) for g in _fields(data, f.contents, f.end, where)}
                pairs[pair.get(1)] = pair.get(2, "")
            case 14:
                external = f.value == 1
            case _ if f.number in _PAYLOADS and (t.values is None or f.end - f.contents > t.values[1] - t.values[0]):
                t.values = (f.contents, f.end)
    if external:
        try:
            t.beside = (pairs["location"], int(pairs.get("offset", 0)), int(pairs["length"]))
        except (KeyError, ValueError) as e:
            raise ValueError(
                f"{where}: {t.name} lies in another file, but where is not said ({pairs}): save it with offset and length"
            ) from e
    return t


def _read_node(data, field: _Field, where: str) -> _Node:
    node = _Node("", [], [], {}, [])
    for f in _fields(data, field.contents, field.end, where):
        match f.number:
            case 1:
                node.inputs.append(_text(data, f))
            case 2:
                node.outputs.append(_text(data, f))
            case 4:
                node.op = _text(data, f)
            case 5:
                name, number = "", None
                for g in _fields(data, f.contents, f.end, where):
                    match g.number:
                        case 1:
                            name = _text(data, g)
                        case 3:
                            number = g.value
                        case 5:
                            values = _read_tensor(data, g, where).values
                            node.values += [values] if values else []
                if number is not None:
                    node.numbers[name] = number
    return node


def _described(nodes: list[_Node], tensors: list[_Tensor]) -> dict[str, Segment]:
    """{initializer: a segment without a place that says what it is}, by the nodes that read it."""
    makers = {output: node for node in nodes if node.op in _PASSES_ON for output in node.outputs}

    def origin(name: str) -> str:
        for _ in range(len(makers) + 1):  # a damaged graph may go round
            if name not in makers or not makers[name].inputs:
                break
            name = makers[name].inputs[0]
        return name

    shapes = {t.name: t for t in tensors}
    found: dict[str, Segment] = {}
    for node in nodes:
        for places in _READS.get(node.op, ()):
            names = [origin(node.inputs[i]) if 0 <= i < len(node.inputs) else "" for i in places]
            if names[0] not in shapes:
                continue
            tensor, t = names[0].removesuffix(".codes"), shapes[names[0]]
            bits = node.numbers.get("bits", node.numbers.get("expert_weight_bits", 0)) or _ELEMENT_BITS.get(t.dtype, 8)
            packed = node.op in ("MatMulNBits", "GatherBlockQuantized", "QMoE")
            width = node.numbers.get("K", 0) or (prod(t.dims[1 if node.op == "GatherBlockQuantized" else 2 :]) * 8 // bits if packed else 0)
            rows = prod(t.dims[: 2 if node.op == "QMoE" else 1])
            weights = rows * width if packed else prod(t.dims)
            plain = packed and names[2] not in shapes  # the zero point is 2**(bits-1)
            piece = Segment("", 0, 0, names[0], "codes", tensor, weights, bits if plain else 0, width if plain else 0)
            if names[0] not in found or width < found[names[0]].width:  # a row that is filled up has its true width in K
                found[names[0]] = piece
            for name in names[1:]:
                if name in shapes:
                    found.setdefault(name, Segment("", 0, 0, name, "scales", tensor, stored=_FLOATS.get(shapes[name].dtype, "integers")))
    for t in tensors:
        if t.name not in found:
            size, role = prod(t.dims) * _ELEMENT_BITS.get(t.dtype, 8) // 8, role_of(t.name)
            is_weight = t.dtype in _FLOATS and (
                size >= SMALL_CONSTANT or role in ("norm", "router") or t.name.endswith((".weight", ".bias"))
            )
            kind = _float_kind(t.name) if is_weight else GRAPH
            whose = (t.name, _count(t.name, prod(t.dims))) if is_weight else ("", 0)
            found[t.name] = Segment("", 0, 0, t.name, kind, *whose, stored=_FLOATS.get(t.dtype, "integers"))
    return found


def _beside(path: Path, tensors: list[tuple[_Tensor, Segment]]) -> Iterator[Segment]:
    """The segments of the files beside the graph that hold its tensors; a range that two tensors share is one segment."""
    files: dict[str, dict[tuple[int, int], Segment]] = {}
    for t, piece in tensors:
        name, offset, size = t.beside
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path.name}: the values of {t.name} should lie in {name!r} beside it; there is no such file")
        files.setdefault(name, {}).setdefault((offset, size), replace(piece, file=name, offset=offset, bytes=size, parts={}))
    for name, pieces in files.items():
        place = path.with_name(name)
        yield from _laid(place, _mapped(place), 0, pieces.values())


# -------------------------------------------------------------------------------------------------------------- GGUF

# number: (name, weights per block, bytes per block, of them scales and offsets). Blocks of ggml-common.h; 0 scales: plain numbers
_GGML = {
    0: ("F32", 1, 4, 0), 1: ("F16", 1, 2, 0), 30: ("BF16", 1, 2, 0), 28: ("F64", 1, 8, 0),
    24: ("I8", 1, 1, 0), 25: ("I16", 1, 2, 0), 26: ("I32", 1, 4, 0), 27: ("I64", 1, 8, 0),
    2: ("Q4_0", 32, 18, 2), 3: ("Q4_1", 32, 20, 4), 6: ("Q5_0", 32, 22, 2), 7: ("Q5_1", 32, 24, 4), 8: ("Q8_0", 32, 34, 2),
    10: ("Q2_K", 256, 84, 20), 11: ("Q3_K", 256, 110, 14), 12: ("Q4_K", 256, 144, 16), 13: ("Q5_K", 256, 176, 16),
    14: ("Q6_K", 256, 210, 18), 20: ("IQ4_NL", 32, 18, 2), 23: ("IQ4_XS", 256, 136, 8), 39: ("MXFP4", 32, 17, 1), 42: ("Q2_0", 64, 18, 2),
}  # fmt: skip
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = "general.alignment"
_VOCABULARY = ("tokens", "merges", "scores", "token_type", "precompiled_charsmap")  # behind tokenizer.ggml.


class _Reader:
    """Reads numbers and strings one after the other. Raises ValueError behind the end."""

    def __init__(self, path: Path) -> None:
        self.name, self.data, self.at = path.name, _mapped(path), 0

    def skip(self, n: int) -> int:
        """Where the next `n` bytes begin; they are passed over."""
        begin, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise ValueError(f"{self.name} is cut short: its header asks for more than its {len(self.data):,} bytes")
        return begin

    def number(self, form: str) -> int:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]

    def text(self) -> str:
        n = self.number("<Q")
        begin = self.skip(n)
        return bytes(self.data[begin : self.at]).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> None:
        """Passes over a value of metadata."""
        if kind == 8:
            self.skip(self.number("<Q"))
        elif kind == 9 and depth < 4:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                self.skip(count * _SCALARS[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise ValueError(f"{self.name} is damaged: a value of its header has the unknown type {kind}")


def _gguf(path: Path) -> Iterator[Segment]:
    r = _Reader(path)
    if len(r.data) < 24 or r.data[:4] != b"GGUF":
        raise ValueError(f"{path.name} is no GGUF file")
    r.skip(4)
    if (version := r.number("<I")) not in (2, 3):
        raise ValueError(f"{path.name} is GGUF version {version}; this reads versions 2 and 3")
    count, pairs, alignment = r.number("<Q"), r.number("<Q"), 32
    yield Segment(path.name, 0, r.at, "head: version and counts", GRAPH)
    for _ in range(pairs):
        begin, key = r.at, r.text()
        kind = r.number("<I")
        r.value(kind)
        if key == _ALIGNMENT and kind == 4:
            alignment = struct.unpack("<I", r.data[r.at - 4 : r.at])[0] or 1
        is_words = key.removeprefix("tokenizer.ggml.") in _VOCABULARY
        yield Segment(path.name, begin, r.at - begin, f"key {key}", "vocabulary" if is_words else GRAPH)
    begin, listed = r.at, []
    for _ in range(count):
        name = r.text()
        shape = [r.number("<Q") for _ in range(min(r.number("<I"), 8))]
        listed.append((name, shape, r.number("<I"), r.number("<Q")))
    if listed:
        yield Segment(path.name, begin, r.at - begin, "names, shapes and places of the tensors", GRAPH)
    start = r.at + -r.at % alignment
    pieces = [_gguf_tensor(path, name, shape, number, start + offset) for name, shape, number, offset in listed]
    yield from _laid(path, r.data, r.at, pieces)


def _gguf_tensor(path: Path, name: str, shape: list[int], number: int, offset: int) -> Segment:
    if number not in _GGML:
        known = ", ".join(name for name, *_ in _GGML.values())
        raise ValueError(f"{path.name}: {name} has the ggml type {number}, whose size is not known here; known are {known}")
    stored, block, size, scales = _GGML[number]
    weights = prod(shape)
    if weights % block:
        raise ValueError(f"{path.name} is damaged: {name} has {weights:,} weights, no multiple of a block of {block}")
    blocks = weights // block
    if not scales:
        return Segment(path.name, offset, blocks * size, name, _float_kind(name), name, _count(name, weights), stored=stored)
    parts = {"codes": blocks * (size - scales), "scales": blocks * scales}
    return Segment(path.name, offset, blocks * size, name, BLOCKS, name, weights, 8 * (size - scales) // block, shape[0], stored, parts)


READERS: dict[str, tuple[str, Callable[[Path], Iterator[Segment]]]] = {
    ".onnx": ("ONNX", _onnx),
    ".gguf": ("GGUF", _gguf),
    ".safetensors": ("safetensors", _safetensors),
}
