"""The GGUF format: tensor types of ggml, their blocks, and a reader and a writer that keep every value as it is."""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgelab.export import ExportError
from edgelab.qtensor import pack, unpack

VERSION, ALIGNMENT = 3, 32


@dataclass(frozen=True)
class Type:
    """A tensor type of ggml: its number, weights per block, bytes per block and the file_type of a file that is mostly this."""

    name: str
    number: int
    block: int
    bytes: int
    file_type: int

    def row_bytes(self, n: int) -> int:
        return n // self.block * self.bytes


F32, F16 = Type("F32", 0, 1, 4, 0), Type("F16", 1, 1, 2, 1)
Q4_0, Q4_1, Q8_0 = Type("Q4_0", 2, 32, 18, 2), Type("Q4_1", 3, 32, 20, 3), Type("Q8_0", 8, 32, 34, 7)
MXFP4, Q2_0 = Type("MXFP4", 39, 32, 17, 38), Type("Q2_0", 42, 64, 18, 41)
TYPES = {t.number: t for t in (F32, F16, Q4_0, Q4_1, Q8_0, MXFP4, Q2_0)}
QUANTIZED = (Q4_0, Q4_1, Q8_0, MXFP4, Q2_0)


def blocks(kind: Type, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
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


def unblock(kind: Type, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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


def value_bytes(value) -> bytes:
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


def write(path: Path, metadata: Mapping[str, object], tensors: "list[tuple[str, Type, tuple[int, ...], Iterator[np.ndarray]]]") -> None:
    """Writes a GGUF file. Each tensor: its name, type, shape [..., out, in] and its bytes in pieces, made when their turn comes."""
    head = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    head += [_string(key) + value_bytes(value) for key, value in metadata.items()]
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
    kind: Type
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
        if inner == 9:
            raise ExportError(f"{path.name} holds an array of arrays: it is damaged")
        if inner == 8:
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
        if not 1 <= dims <= 4:
            raise ExportError(f"{path.name}: {name} has {dims} dimensions, ggml has 1 to 4: it is damaged")
        shape = take(f"<{dims}Q")
        shape = shape if isinstance(shape, tuple) else (shape,)
        number, offset = take("<IQ")
        if number not in TYPES:
            raise ExportError(f"{path.name}: {name} has the ggml type {number}; this reads {', '.join(t.name for t in TYPES.values())}")
        listed.append((name, TYPES[number], tuple(reversed(shape)), offset))
    begin, tensors = at + _pad(at), {}
    for name, kind, shape, offset in listed:
        rows, width = prod(shape[:-1]), kind.row_bytes(shape[-1])
        if begin + offset + rows * width > size:
            raise ExportError(f"{path.name} is cut short: {name} ends at byte {begin + offset + rows * width:,} of {size:,}")
        data = np.frombuffer(buffer, np.uint8, rows * width, begin + offset).reshape(rows, width)
        tensors[name] = StoredTensor(name, kind, shape, begin + offset, data)
    return metadata, tensors
