"""`QTensor`: the packed codes and scales of one weight [out, in] or one expert stack [experts, out, in].

Layout. A row's codes form a little-endian bit stream along the inputs: code k fills bits k*b .. k*b + b - 1, so at
4 bits byte j holds code 2j in its low and code 2j+1 in its high nibble, and at 3 bits eight codes fill three bytes.
Rows start on a byte. Scales are float16, [..., out, groups] (or [..., 1, 1] for PerTensor), and so are the offsets of an
asymmetric scheme; the scales of MXFP4 are one byte each, their exponent + 127.

QTensor owns the layout and never fits anything: methods produce codes and scales, `QTensor.from_codes` packs them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgelab import html_table
from edgelab.scheme import PerGroup, QuantScheme

_CHUNK = 1 << 18  # codes that are packed or unpacked at a time


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packed bytes uint8 [..., ceil(n * bits / 8)] of codes uint8 [..., n].

    >>> pack(np.array([1, 2, 3, 15], np.uint8), 4)  # 0x21, 0xF3
    array([ 33, 243], dtype=uint8)
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    n = codes.shape[-1]
    out = np.empty((*codes.shape[:-1], (n * bits + 7) // 8), np.uint8)
    for a, b in _row_chunks(codes, out):
        if bits == 3:  # eight codes are one 24-bit number
            wide = _padded(a, 8)
            word = np.zeros(wide.shape[:-1], np.uint32)
            for i in range(8):
                word |= wide[..., i].astype(np.uint32) << np.uint32(3 * i)
            parts = np.stack([(word >> np.uint32(s)).astype(np.uint8) for s in (0, 8, 16)], axis=-1)
        else:
            wide = _padded(a, 8 // bits)
            parts = np.zeros((*wide.shape[:-1], 1), np.uint8)
            for i in range(8 // bits):
                parts[..., 0] |= wide[..., i] << (bits * i)
        b[:] = parts.reshape(len(a), -1)[:, : b.shape[1]]
    return out


def unpack(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Codes uint8 [..., n] of packed bytes: the inverse of `pack`.

    >>> unpack(np.array([33, 243], np.uint8), 4, 4)
    array([ 1,  2,  3, 15], dtype=uint8)
    """
    if bits == 8:
        return packed[..., :n]
    out = np.empty((*packed.shape[:-1], n), np.uint8)
    for a, b in _row_chunks(packed, out):
        if bits == 3:
            wide = _padded(a, 3).astype(np.uint32)
            word = wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16
            codes = np.stack([(word >> np.uint32(3 * i) & 7).astype(np.uint8) for i in range(8)], axis=-1)
        else:
            codes = a[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8)) & (2**bits - 1)
        b[:] = codes.reshape(len(a), -1)[:, :n]
    return out


def _row_chunks(source: np.ndarray, target: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of both arrays, some at a time, so that the temporaries stay small beside the arrays."""
    a, b = source.reshape(-1, source.shape[-1]), target.reshape(-1, target.shape[-1])
    step = max(1, _CHUNK // max(source.shape[-1], target.shape[-1], 1))
    for i in range(0, len(a), step):
        yield a[i : i + step], b[i : i + step]


def _padded(a: np.ndarray, unit: int) -> np.ndarray:
    """`a` [..., n] as [..., ceil(n / unit), unit], filled up with zeros."""
    short = -a.shape[-1] % unit
    if short:
        a = np.concatenate([a, np.zeros((*a.shape[:-1], short), a.dtype)], axis=-1)
    return a.reshape(*a.shape[:-1], -1, unit)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight: `packed` uint8 [..., out, row_bytes], `scales` (see the module), logical `shape`.

    `offsets`: float16 of the scales' shape for an asymmetric scheme, None for any other.
    """

    packed: np.ndarray
    scales: np.ndarray
    shape: tuple[int, ...]
    scheme: QuantScheme
    offsets: np.ndarray | None = None

    def __post_init__(self) -> None:
        expected = (*self.shape[:-1], self.scheme.row_bytes(self.shape[-1]))
        if self.packed.dtype != np.uint8 or self.packed.shape != expected:
            raise ValueError(f"packed is {self.packed.dtype} {self.packed.shape}; {self.scheme} of {self.shape} needs uint8 {expected}")
        expected, dtype = self.scheme.scales_shape(self.shape), self.scheme.scale_dtype
        if self.scales.dtype != dtype or self.scales.shape != expected:
            raise ValueError(f"scales are {self.scales.dtype} {self.scales.shape}; {self.scheme} of {self.shape} needs {dtype} {expected}")
        if (self.offsets is not None) != self.scheme.asymmetric:
            raise ValueError(f"{self.scheme} {'needs offsets' if self.scheme.asymmetric else 'has no offsets'}")
        if self.offsets is not None and (self.offsets.dtype != np.float16 or self.offsets.shape != expected):
            raise ValueError(
                f"offsets are {self.offsets.dtype} {self.offsets.shape}; {self.scheme} of {self.shape} needs float16 {expected}"
            )

    @classmethod
    def from_codes(cls, codes: np.ndarray, scales: np.ndarray, scheme: QuantScheme, offsets: np.ndarray | None = None) -> "QTensor":
        """Pack codes uint8 [..., out, in] (0 .. 2**bits - 1) with their scales and, for an asymmetric scheme, offsets.

        Scales and offsets are rounded to float16; the scales of MXFP4 are given as they are stored, uint8.
        Raises ValueError for codes out of range, and scales or offsets that are not finite.
        """
        if codes.dtype != np.uint8:
            raise ValueError(f"codes are {codes.dtype}; they must be uint8 (0 .. {scheme.levels - 1}): convert with .astype(np.uint8)")
        if codes.size and int(codes.max()) >= scheme.levels:
            raise ValueError(f"code {int(codes.max())} does not fit {scheme}: codes are 0 .. {scheme.levels - 1}")
        if scheme.scale_dtype == np.uint8 and scales.dtype != np.uint8:
            raise ValueError(f"scales are {scales.dtype}; those of {scheme} are uint8, the exponent + 127")
        with np.errstate(over="ignore"):  # answered below
            scales = np.ascontiguousarray(scales, scheme.scale_dtype)
            offsets = None if offsets is None else np.ascontiguousarray(offsets, np.float16)
        for what, values in (("scales", scales), ("offsets", offsets)):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"{what} hold NaN or infinity: the weight is outside float16's range; rescale it first")
        return cls(pack(codes, scheme.bits), scales, codes.shape, scheme, offsets)

    def codes(self) -> np.ndarray:
        """The codes, unpacked: uint8 [..., out, in]."""
        return unpack(self.packed, self.scheme.bits, self.shape[-1])

    def scale_values(self) -> np.ndarray:
        """The scales as numbers, float32."""
        if self.scheme.scale_dtype == np.uint8:
            return np.ldexp(np.float32(1), self.scales.astype(np.int32) - 127)
        return self.scales.astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """The weight that the codes stand for: float32 [..., out, in], scale * level[q] (+ offset).

        >>> s = QuantScheme.parse("int4-row")
        >>> QTensor.from_codes(np.array([[0, 8, 15]], np.uint8), np.array([[0.5]], np.float16), s).dequantize()
        array([[-4. ,  0. ,  3.5]], dtype=float32)
        """
        values, scales = self.scheme.table[self.codes()], self.scale_values()
        offsets = None if self.offsets is None else self.offsets.astype(np.float32)
        if isinstance(self.scheme.granularity, PerGroup):
            values = values.reshape(*self.shape[:-1], -1, self.scheme.granularity.size)
            scales, offsets = scales[..., None], None if offsets is None else offsets[..., None]
        values *= scales
        if offsets is not None:
            values += offsets
        return values.reshape(self.shape)

    def __getitem__(self, expert: int) -> "QTensor":
        """One expert of a stack (a view, nothing is copied)."""
        if len(self.shape) != 3:
            raise TypeError(f"only an expert stack [experts, out, in] can be indexed; this weight is {self.shape}")
        offsets = None if self.offsets is None else self.offsets[expert]
        return QTensor(self.packed[expert], self.scales[expert], self.shape[1:], self.scheme, offsets)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return self.scheme.bits_per_weight(self.shape)

    def __repr__(self) -> str:
        dims = " x ".join(map(str, self.shape))
        return f"QTensor({dims}, {self.scheme}, {self.nbytes:,} bytes, {self.bits_per_weight:.3f} bits per weight)"

    def table(self) -> list[dict[str, str]]:
        """A line per part that is stored, and a last one for all of it, as text."""
        parts = {"codes": self.packed, "scales": self.scales} | ({} if self.offsets is None else {"offsets": self.offsets})
        weights = max(math.prod(self.shape), 1)
        lines = [(name, " x ".join(map(str, a.shape)), str(a.dtype), a.nbytes) for name, a in parts.items()]
        lines.append(("all", " x ".join(map(str, self.shape)), str(self.scheme), self.nbytes))
        return [
            {"part": name, "shape": shape, "type": kind, "bytes": f"{size:,}", "bits per weight": f"{8 * size / weights:.3f}"}
            for name, shape, kind, size in lines
        ]

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), repr(self))
