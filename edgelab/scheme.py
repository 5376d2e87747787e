"""How a weight is stored: `QuantScheme` = bits, granularity, codebook.

A code q is an unsigned integer of `bits` bits and stands for

    value = scale * (q - 2**(bits - 1))

with one float16 scale per group of `n` consecutive inputs (`PerGroup(n)`), per output row (`PerChannel()`) or per
matrix (`PerTensor()`; one per expert in a stack). The zero point is fixed: the scheme is symmetric and uses its full
range, -2**(bits-1) .. 2**(bits-1) - 1. `QuantScheme(4, PerGroup(32))` is exactly GGUF's Q4_0 and ONNX Runtime's
`MatMulNBits` with block 32, so the same codes go to each of them without being quantized again.
"""

import operator
import re
from dataclasses import dataclass, field
from math import prod

BITS = (2, 3, 4, 8)
SCALE_BYTES = 2  # float16


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
        if self.codebook != "int":
            raise ValueError(f"codebook={self.codebook!r} is not known; use 'int'")

    @classmethod
    def parse(cls, text: str) -> "QuantScheme":
        """The scheme that `str` prints: int<bits>-<tensor|row|g<size>>, as in int8-row or int4-g32."""
        m = re.fullmatch(r"int(\d+)-(tensor|row|g(\d+))", text)
        if not m:
            raise ValueError(f"scheme={text!r} is not of the form int<bits>-<tensor|row|g<size>>, such as int4-g32 or int8-row")
        kind: Granularity = PerGroup(int(m[3])) if m[3] else PerTensor() if m[2] == "tensor" else PerChannel()
        return cls(int(m[1]), kind)

    def __str__(self) -> str:
        return f"{self.codebook}{self.bits}-{self.granularity}"

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def zero_point(self) -> int:
        """The code that stands for 0."""
        return 2 ** (self.bits - 1)

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
        """Exact bytes of codes and scales of a weight [..., out, in]."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1]) + SCALE_BYTES * prod(self.scales_shape(shape))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Effective bits per weight of a weight [..., out, in], scales counted."""
        return 8 * self.nbytes(shape) / prod(shape)
