"""How a weight is stored, `QuantScheme` = bits, granularity, codebook; how an activation goes in, `ActScheme`.

A code q is an unsigned integer of `bits` bits and stands for

    value = scale * level[q] (+ offset)

with one scale per group of `n` consecutive inputs (`PerGroup(n)`), per output row (`PerChannel()`) or per matrix
(`PerTensor()`; one per expert in a stack). The codebook says which levels there are:

    int   q - 2**(bits - 1)   symmetric, full range. int4-g32 is exactly GGUF's Q4_0 and ONNX Runtime's MatMulNBits
    uint  q, and an offset    asymmetric: a float16 offset beside each scale. uint4-g32 is exactly GGUF's Q4_1
    nf    normal quantiles    NF4: levels of equal probability under a normal distribution, scale = absmax (QLoRA, section 3)
    fp    bitsandbytes' FP4   sign, two bits of exponent, one of mantissa; scale = absmax
    mxfp  E2M1                0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; the scale is a power of two (OCP MX, section 5.3)

Scales are float16, except those of mxfp, which are one byte: the exponent + 127 (E8M0). So the same codes go out to
each target that knows the form, without being quantized again.
"""

import operator
import re
from dataclasses import dataclass, field
from functools import cache
from math import prod
from types import MappingProxyType

import numpy as np

BITS = (2, 3, 4, 8)
SCALE_BYTES = 2  # float16; offsets too
CODEBOOKS = ("int", "uint", "nf", "fp", "mxfp")

# What the codes of a table stand for, in the order of the codes. NF4: Dettmers et al. 2023 (arXiv 2305.14314), appendix E;
# the float32 values are those of bitsandbytes, as the tests check. FP4: bitsandbytes' order, in twelfths. MXFP4: OCP
# Microscaling Formats v1.0, table 5: bit 3 is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TABLES = MappingProxyType({"nf": _NF4, "fp": (*(v / 12 for v in _FP4), *(-v / 12 for v in _FP4)), "mxfp": (*_E2M1, *(-v for v in _E2M1))})


def _integer(value) -> int | None:
    """`value` as an int when it is one, of Python or of NumPy; None for 4.0, "4" and the like."""
    try:
        return operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class PerTensor:
    """One scale for a whole matrix."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per output row."""

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive inputs of an output row; `size` is a multiple of 8."""

    size: int

    def __post_init__(self) -> None:
        size = _integer(self.size)
        if size is None or size < 8 or size % 8:
            raise ValueError(f"group_size={self.size!r} must be a positive multiple of 8; use 32, 64 or 128")
        object.__setattr__(self, "size", size)

    def __str__(self) -> str:
        return f"g{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class QuantScheme:
    """Bits, granularity and codebook of a quantized weight.

    >>> s = QuantScheme(4, PerGroup(32))
    >>> str(s), s.levels, s.zero_point
    ('int4-g32', 16, 8)
    >>> s.bits_per_weight((64, 128))  # 4 + 16 / 32
    4.5
    >>> QuantScheme.parse("int3-row")
    QuantScheme(bits=3, granularity=PerChannel(), codebook='int')
    """

    bits: int = 4
    granularity: Granularity = field(default_factory=lambda: PerGroup(32))
    codebook: str = "int"

    def __post_init__(self) -> None:
        bits = _integer(self.bits)
        if bits not in BITS:
            raise ValueError(f"bits={self.bits!r} is not one of {BITS}")
        object.__setattr__(self, "bits", bits)
        if not isinstance(self.granularity, Granularity):
            raise ValueError(f"granularity={self.granularity!r} is not PerTensor(), PerChannel() or PerGroup(n)")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook={self.codebook!r} is not known; use one of {', '.join(CODEBOOKS)}")
        if self.codebook in _TABLES and bits != 4:
            raise ValueError(f"codebook={self.codebook!r} has a table of 16 levels: bits={bits} must be 4")
        if self.codebook == "mxfp" and self.granularity != PerGroup(32):
            raise ValueError(f"granularity={self.granularity} does not fit codebook='mxfp': its blocks are PerGroup(32)")

    @classmethod
    def parse(cls, text: str) -> "QuantScheme":
        """The scheme that `str` prints: <codebook><bits>-<tensor|row|g<size>>, as in int8-row, int4-g32, uint4-g64 or nf4-g64."""
        m = re.fullmatch(rf"({'|'.join(CODEBOOKS)})(\d+)-(tensor|row|g(\d+))", text)
        if not m:
            raise ValueError(
                f"scheme={text!r} is not of the form <{'|'.join(CODEBOOKS)}><bits>-<tensor|row|g<size>>, such as int4-g32 or int8-row"
            )
        kind: Granularity = PerGroup(int(m[4])) if m[4] else PerTensor() if m[3] == "tensor" else PerChannel()
        return cls(int(m[2]), kind, m[1])

    def __str__(self) -> str:
        return f"{self.codebook}{self.bits}-{self.granularity}"

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def zero_point(self) -> int:
        """The level-0 code of the symmetric codebook: q - zero_point is what a code of "int" stands for, before the scale."""
        return 2 ** (self.bits - 1)

    @property
    def affine(self) -> bool:
        """Whether the levels are evenly spaced, so that products may be integers."""
        return self.codebook in ("int", "uint")

    @property
    def asymmetric(self) -> bool:
        """Whether an offset lies beside each scale."""
        return self.codebook == "uint"

    @property
    def table(self) -> np.ndarray:
        """float32 [levels]: what each code stands for, before scale and offset. Read-only.

        >>> QuantScheme.parse("int2-row").table, QuantScheme.parse("uint2-row").table
        (array([-2., -1.,  0.,  1.], dtype=float32), array([0., 1., 2., 3.], dtype=float32))
        """
        return _table(self.codebook, self.bits)

    @property
    def scale_dtype(self) -> np.dtype:
        """float16, or uint8 where the scales are powers of two (mxfp: exponent + 127)."""
        return np.dtype(np.uint8 if self.codebook == "mxfp" else np.float16)

    def groups(self, in_features: int) -> int:
        """Scales per output row. Raises ValueError when the group size does not divide `in_features`."""
        if not isinstance(self.granularity, PerGroup):
            return 1
        size = self.granularity.size
        if in_features % size:
            fits = [n for n in (128, 64, 32, 16, 8) if in_features % n == 0 and n != size]
            way_out = f"use {' or '.join(map(str, fits[:3]))}" if fits else "use PerChannel()"
            raise ValueError(f"group_size={size} does not divide in_features={in_features}; {way_out}")
        return in_features // size

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one output row's packed codes (rows start on a byte)."""
        return (in_features * self.bits + 7) // 8

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight [..., out, in]."""
        rows = 1 if isinstance(self.granularity, PerTensor) else shape[-2]
        return (*shape[:-2], rows, self.groups(shape[-1]))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of codes, scales and offsets of a weight [..., out, in]."""
        each = self.scale_dtype.itemsize + (SCALE_BYTES if self.asymmetric else 0)
        return prod(shape[:-1]) * self.row_bytes(shape[-1]) + each * prod(self.scales_shape(shape))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Effective bits per weight of a weight [..., out, in], scales counted."""
        return 8 * self.nbytes(shape) / prod(shape)


@cache
def _table(codebook: str, bits: int) -> np.ndarray:
    if codebook in _TABLES:
        table = np.array(_TABLES[codebook], np.float32)
    else:
        table = np.arange(2**bits, dtype=np.float32) - np.float32(2 ** (bits - 1) if codebook == "int" else 0)
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class ActScheme:
    """How activations are rounded on the way into a layer: symmetric, x ~ scale * clip(round(x / scale), -top, top).

    `per`: "token" (a scale per row of x, from its own largest value) or "tensor" (one scale for all of x). `static`: the
    scale was found beforehand, on calibration data, and is stored with the layer; otherwise x gives it at run time.
    `outliers`: the threshold of LLM.int8(): an input channel that holds a larger magnitude anywhere in x is not rounded and
    has no part in the scales (see `methods/outliers.py`); None: all are rounded.

    >>> str(ActScheme(8, "tensor", static=True)), ActScheme.parse("a8-token-o6")
    ('a8-static', ActScheme(bits=8, per='token', static=False, outliers=6.0))
    """

    bits: int = 8
    per: str = "token"
    static: bool = False
    outliers: float | None = None

    def __post_init__(self) -> None:
        bits = _integer(self.bits)
        if bits is None or not 2 <= bits <= 8:
            raise ValueError(f"bits={self.bits!r} of an activation must be 2 .. 8")
        object.__setattr__(self, "bits", bits)
        if self.per not in ("token", "tensor"):
            raise ValueError(f"per={self.per!r} is not known; use 'token' or 'tensor'")
        if self.static and self.per != "tensor":
            raise ValueError("static=True needs per='tensor': the scales of tokens that were not seen yet cannot be stored")
        if self.outliers is not None:
            number = isinstance(self.outliers, int | float) and not isinstance(self.outliers, bool)
            if not number or not 0 < self.outliers < float("inf"):
                raise ValueError(f"outliers={self.outliers!r} must be a positive threshold, such as 6.0, or None: round every channel")
            if self.static:
                raise ValueError(f"outliers={self.outliers!r} needs scales found at run time, from what is left; use per='token'")
            object.__setattr__(self, "outliers", float(self.outliers))

    @classmethod
    def parse(cls, text: str) -> "ActScheme":
        """The scheme that `str` prints: a<bits>-<token|tensor|static>, or a<bits>-<token|tensor>-o<threshold>."""
        m = re.fullmatch(r"a(\d+)-(token|tensor|static)(?:-o(\d+(?:\.\d+)?))?", text)
        if not m:
            raise ValueError(
                f"activations={text!r} is not of the form a<bits>-<token|tensor|static>, such as a8-token, "
                "or a<bits>-<token|tensor>-o<threshold>, such as a8-token-o6"
            )
        static = m[2] == "static"
        return cls(int(m[1]), "tensor" if static else m[2], static, None if m[3] is None else float(m[3]))

    def __str__(self) -> str:
        outliers = "" if self.outliers is None else f"-o{np.format_float_positional(self.outliers, trim='-')}"
        return f"a{self.bits}-{'static' if self.static else self.per}{outliers}"

    @property
    def top(self) -> int:
        """The largest code: 127 at 8 bits. Codes are -top .. top."""
        return 2 ** (self.bits - 1) - 1
