"""Sparse storage of a pruned weight: where the values that are left lie, and the values. Nothing here decides what is zero.

Bits per weight at density p (the share that is not zero), b bits per value, scales aside:

    bitmap   1 + p b                one bit per place, rows begin on a byte; the values in order
    csr      p (b + i) + rows       one index per value, i = 8, 16 or 32 bits, the smallest that the row length fits, and one
                                    number per row (16 or 32 bits, the smallest that the count of values fits)
    bsr      q (b + i / area)       blocks of the weight that are not all zero, a share q of them, stored whole
    n:m      (n / m) (b + k)        of every m places n values with their place in k = log2 m bits: 2:4 is b / 2 + 1

so that a bitmap of float16 is 9 bits per weight at 50 % zeros where int4-g32 of the dense weight is 4.5, and falls below that
only beyond 78 %; csr beats the bitmap where p i < 1: beyond 87.5 % for rows of up to 256, 93.75 % for longer ones.
A random mask leaves hardly a block of 16 x 16 all zero: bsr is for masks that were made of blocks.

**Values** are float32, float16 or bfloat16, or the codes of a `QTensor` of 2, 3, 4 or 8 bits without those of zeros,
packed in one stream, beside its scales (all of them: a group's scale is stored even where the group is all zero). Then
a bitmap of int4 at 50 % takes 1 + 2 + 0.5 = 3.5 bits. A stack [experts, out, in] is stored as its rows, one after another.
Encoding to the weight's own kind and back is exact to the bit, but for -0.0, which comes back as 0.0. Positions of an n:m
group that has fewer than n values are filled with zeros.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import QuantScheme

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}  # how NumPy holds them
FORMATS = ("bitmap", "csr", "bsr", "n:m")


@dataclass(frozen=True, eq=False)
class Values:
    """`count` values in order. `kind`: one of `FLOATS`, or a scheme such as "int4-g32".

    `data`: float32 | float16 | uint16 (the bits of bfloat16) [count], or uint8, packed codes; `scales` as in `QTensor`.
    """

    data: np.ndarray
    kind: str
    count: int
    scales: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True, eq=False)
class Bitmap:
    """mask uint8 [rows, ceil(in / 8)], bit k % 8 of byte k // 8 for input k; the values row after row."""

    shape: tuple[int, ...]
    values: Values
    mask: np.ndarray

    def places(self) -> np.ndarray:
        """bool [rows, in]: where a value is stored."""
        return np.unpackbits(self.mask, axis=1, count=self.shape[-1], bitorder="little").view(bool)

    nbytes = property(lambda self: self.values.nbytes + self.mask.nbytes)
    bits_per_weight = property(lambda self: 8 * self.nbytes / math.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Csr:
    """ends uint16 | uint32 | uint64 [rows + 1] and columns uint8 | uint16 | uint32 [values], as scipy's indptr and indices."""

    shape: tuple[int, ...]
    values: Values
    ends: np.ndarray
    columns: np.ndarray

    def places(self) -> np.ndarray:
        """bool [rows, in]: where a value is stored."""
        found = np.zeros((len(self.ends) - 1, self.shape[-1]), bool)
        found[np.repeat(np.arange(len(found)), np.diff(self.ends.astype(np.int64))), self.columns] = True
        return found

    nbytes = property(lambda self: self.values.nbytes + self.ends.nbytes + self.columns.nbytes)
    bits_per_weight = property(lambda self: 8 * self.nbytes / math.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Bsr:
    """`Csr` of blocks (rows, columns) = `block`: each stored one with all its values, row after row inside it."""

    shape: tuple[int, ...]
    values: Values
    ends: np.ndarray
    columns: np.ndarray
    block: tuple[int, int]

    def places(self) -> np.ndarray:
        """bool [rows, in]: where a value is stored, zeros of a block included."""
        blocks = np.zeros((len(self.ends) - 1, self.shape[-1] // self.block[1]), bool)
        blocks[np.repeat(np.arange(len(blocks)), np.diff(self.ends.astype(np.int64))), self.columns] = True
        return blocks.repeat(self.block[0], 0).repeat(self.block[1], 1)

    nbytes = property(lambda self: self.values.nbytes + self.ends.nbytes + self.columns.nbytes)
    bits_per_weight = property(lambda self: 8 * self.nbytes / math.prod(self.shape))


@dataclass(frozen=True, eq=False)
class NOfM:
    """n values of every m inputs, and their places: uint8, packed numbers of log2(m) bits [rows, in / m * n], rising in a group."""

    shape: tuple[int, ...]
    values: Values
    packed: np.ndarray
    n: int
    m: int

    def places(self) -> np.ndarray:
        """bool [rows, in]: where a value is stored, n in each group."""
        rows, size = len(self.packed), self.shape[-1] // self.m
        at = unpack(self.packed, _place_bits(self.m), size * self.n).reshape(rows, size, self.n)
        found = np.zeros((rows, size, self.m), bool)
        np.put_along_axis(found, at.astype(np.int64), True, 2)
        return found.reshape(rows, -1)

    nbytes = property(lambda self: self.values.nbytes + self.packed.nbytes)
    bits_per_weight = property(lambda self: 8 * self.nbytes / math.prod(self.shape))


Sparse = Bitmap | Csr | Bsr | NOfM


def encode(
    weight: Tensor | np.ndarray | QTensor,
    form: str = "bitmap",
    *,
    kind: str | None = None,
    block: tuple[int, int] = (16, 16),
    n_of_m: tuple[int, int] = (2, 4),
) -> Sparse:
    """`weight` [..., out, in] without its zeros, as one of `FORMATS`.

    `kind` of the values: of a float weight float32, float16 or bfloat16 (None: its own; another one rounds); a `QTensor` keeps its
    codes. Raises ValueError for a block or m that does not divide, a group of m with more than n values, a value that `kind`
    can't hold, a scheme without an exact zero, NaN.

    >>> w = encode(np.array([[0, 1.5, 0, -2.0]], np.float16))
    >>> w.mask, w.values.data, w.nbytes
    (array([[10]], dtype=uint8), array([ 1.5, -2. ], dtype=float16), 5)
    """
    if form not in FORMATS:
        raise ValueError(f"form={form!r} is not known; use one of {', '.join(FORMATS)}")
    shape = tuple(weight.shape)
    if len(shape) not in (2, 3) or not math.prod(shape):
        raise ValueError(f"weight is {shape}; it must be [out, in] or [experts, out, in], not empty")
    content = _codes_of(weight) if isinstance(weight, QTensor) else _floats_of(weight, kind)
    full, zero, kind, scales = content
    full = full.reshape(-1, shape[-1])
    there = full != zero
    rows, n = full.shape

    def values(picked: np.ndarray) -> Values:
        if kind in FLOATS:
            return Values(np.ascontiguousarray(picked), kind, picked.size)
        data = pack(picked, QuantScheme.parse(kind).bits) if picked.size else picked
        return Values(data, kind, picked.size, scales)

    match form:
        case "bitmap":
            return Bitmap(shape, values(full[there]), np.packbits(there, axis=1, bitorder="little"))
        case "csr":
            ends, columns = _csr(there)
            return Csr(shape, values(full[there]), ends, columns)
        case "bsr":
            high, wide = _checked_block(block, rows, n)
            blocks = full.reshape(rows // high, high, n // wide, wide).swapaxes(1, 2)
            stored = there.reshape(rows // high, high, n // wide, wide).any((1, 3))
            ends, columns = _csr(stored)
            return Bsr(shape, values(blocks[stored].reshape(-1)), ends, columns, (high, wide))
    few, of = _checked_n_of_m(n_of_m, n)
    groups = there.reshape(rows, n // of, of)
    crowded = groups.sum(2) > few
    if crowded.any():
        row, group = np.argwhere(crowded)[0]
        raise ValueError(
            f"n_of_m={few}:{of}: row {row} has {int(groups[row, group].sum())} values in inputs {group * of} .. {group * of + of - 1}; "
            f"prune with Prune(pattern='{few}:{of}'), or use form='bitmap'"
        )
    at = np.sort(np.argsort(~groups, axis=2, kind="stable")[..., :few], axis=2)  # values first, then zeros, in the order of places
    picked = np.take_along_axis(full.reshape(rows, n // of, of), at, 2).reshape(-1)
    return NOfM(shape, values(picked), pack(at.astype(np.uint8).reshape(rows, -1), _place_bits(of)), few, of)


def decode(sparse: Sparse) -> np.ndarray | QTensor:
    """The weight: float32 [..., out, in], or the `QTensor` whose codes were stored."""
    values, n = sparse.values, sparse.shape[-1]
    places = sparse.places()
    if values.kind in FLOATS:
        data, zero, dtype = _as_float32(values), 0, np.float32
    else:
        scheme = QuantScheme.parse(values.kind)
        data = unpack(values.data, scheme.bits, values.count) if values.count else values.data
        zero, dtype = _zero_code(scheme), np.uint8
    full = np.full(places.shape, zero, dtype)
    if isinstance(sparse, Bsr):
        high, wide = sparse.block
        blocks = full.reshape(-1, high, n // wide, wide).swapaxes(1, 2)
        stored = places.reshape(-1, high, n // wide, wide)[:, 0, :, 0]
        blocks[stored] = data.reshape(-1, high, wide)  # `blocks` is a view of `full`
    else:
        full[places] = data
    full = full.reshape(sparse.shape)
    return full if values.kind in FLOATS else QTensor.from_codes(full, values.scales, QuantScheme.parse(values.kind))


def predicted_bytes(
    form: str,
    shape: tuple[int, ...],
    stored: int,
    kind: str = "float16",
    *,
    block: tuple[int, int] = (16, 16),
    n_of_m: tuple[int, int] = (2, 4),
) -> int:
    """The bytes of a weight of `shape` with `stored` values (of "bsr": blocks; of "n:m": given by the shape), without making it.

    >>> predicted_bytes("bitmap", (4096, 4096), 4096 * 2048) * 8 / 4096**2  # half of it zero, float16
    9.0
    """
    rows, n = math.prod(shape[:-1]), shape[-1]
    if form == "n:m":
        few, of = _checked_n_of_m(n_of_m, n)
        stored = rows * n // of * few
    count = stored * math.prod(block) if form == "bsr" else stored
    if kind in FLOATS:
        size = count * FLOATS[kind].itemsize
    else:
        scheme = QuantScheme.parse(kind)
        size = (count * scheme.bits + 7) // 8 + scheme.scale_dtype.itemsize * math.prod(scheme.scales_shape(shape))
    match form:
        case "bitmap":
            return size + rows * ((n + 7) // 8)
        case "n:m":
            return size + rows * ((n // of * few * _place_bits(of) + 7) // 8)
        case "csr" | "bsr":
            high, wide = (1, 1) if form == "csr" else _checked_block(block, rows, n)
            return size + (rows // high + 1) * _end_type(stored).itemsize + stored * _index_type(n // wide).itemsize
    raise ValueError(f"form={form!r} is not known; use one of {', '.join(FORMATS)}")


# ------------------------------------------------------------------------------------------------------------- in a file


def save_sparse(path: str | Path, weights: Mapping[str, Sparse]) -> None:
    """Write `weights` to one safetensors file, whole or not at all. Tensors are `<name>:<part>`; the rest is metadata."""
    arrays, about = {}, {}
    for name, w in weights.items():
        if ":" in name:
            raise ValueError(f"the name {name!r} holds ':', which separates a weight from its parts in the file; rename it")
        parts, settings = _parts(w)
        arrays |= {f"{name}:{part}": a for part, a in parts.items() if a is not None}
        about[name] = settings | {"shape": list(w.shape), "kind": w.values.kind, "count": w.values.count}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary, {"edgelab_sparse": json.dumps(about)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_sparse(path: str | Path) -> dict[str, Sparse]:
    """What `save_sparse` wrote. Raises ValueError for a file that is cut short, or holds something else."""
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get("edgelab_sparse", "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no whole safetensors file of sparse weights ({error}); write it again with save_sparse") from error
    if about is None:
        raise ValueError(f"{path} holds no sparse weights: it was not written by save_sparse")
    found = {}
    for name, a in about.items():
        part = {p: arrays.get(f"{name}:{p}") for p in ("values", "scales", "mask", "ends", "columns", "packed")}
        values, shape = Values(part["values"], a["kind"], a["count"], part["scales"]), tuple(a["shape"])
        try:
            match a["form"]:
                case "bitmap":
                    w = Bitmap(shape, values, part["mask"])
                case "csr":
                    w = Csr(shape, values, part["ends"], part["columns"])
                case "bsr":
                    w = Bsr(shape, values, part["ends"], part["columns"], tuple(a["block"]))
                case "n:m":
                    w = NOfM(shape, values, part["packed"], a["n"], a["m"])
                case other:
                    raise ValueError(f"form {other!r} is not one of {', '.join(FORMATS)}")
            stored = int(w.places().sum())
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"{path}: the parts of {name} are not all there, or do not fit its shape {shape}") from error
        if stored != values.count or w.places().shape != (math.prod(shape[:-1]), shape[-1]):
            raise ValueError(f"{path}: {name} has {values.count} values for {stored} places of {shape}; write it again with save_sparse")
        found[name] = w
    return found


def _parts(w: Sparse) -> tuple[dict[str, np.ndarray | None], dict]:
    values = {"values": w.values.data, "scales": w.values.scales}
    match w:
        case Bitmap():
            return values | {"mask": w.mask}, {"form": "bitmap"}
        case Csr():
            return values | {"ends": w.ends, "columns": w.columns}, {"form": "csr"}
        case Bsr():
            return values | {"ends": w.ends, "columns": w.columns}, {"form": "bsr", "block": list(w.block)}
        case NOfM():
            return values | {"packed": w.packed}, {"form": "n:m", "n": w.n, "m": w.m}
    raise TypeError(f"{type(w).__name__} is no sparse weight; encode makes them")


# ------------------------------------------------------------------------------------------------------------- the parts


def _floats_of(weight: Tensor | np.ndarray, kind: str | None) -> tuple[np.ndarray, int, str, None]:
    """(values as NumPy holds them, what is zero, their kind, no scales)."""
    t = torch.from_numpy(np.ascontiguousarray(weight)) if isinstance(weight, np.ndarray) else weight.detach().cpu()
    own = str(t.dtype).removeprefix("torch.")
    kind = own if kind is None else kind
    if kind not in FLOATS or not t.is_floating_point():
        raise ValueError(f"kind={kind!r} of a weight of {own} is not known; use one of {', '.join(FLOATS)}")
    there = t != 0
    if torch.isnan(t).any():
        raise ValueError(f"weight holds {int(torch.isnan(t).sum())} NaN; repair the checkpoint")
    rounded = t.to(getattr(torch, kind))
    if not torch.equal(torch.isinf(rounded), torch.isinf(t)):
        raise ValueError(f"weight holds {float(t.abs().max()):.4g}, which kind={kind!r} can't hold; use 'bfloat16' or 'float32'")
    rounded = torch.where(there, rounded, torch.zeros((), dtype=rounded.dtype))  # no -0.0; what underflows is a zero that is not stored
    rounded = torch.where(rounded == 0, torch.zeros((), dtype=rounded.dtype), rounded)
    array = rounded.contiguous().view(torch.uint16).numpy() if kind == "bfloat16" else rounded.contiguous().numpy()
    return array, 0, kind, None


def _as_float32(values: Values) -> np.ndarray:
    if values.kind != "bfloat16":
        return values.data.astype(np.float32)
    return (values.data.astype(np.uint32) << 16).view(np.float32)


def _codes_of(q: QTensor) -> tuple[np.ndarray, int, str, np.ndarray]:
    return q.codes(), _zero_code(q.scheme), str(q.scheme), q.scales


def _zero_code(scheme: QuantScheme) -> int:
    """The code that stands for 0."""
    if scheme.asymmetric:
        raise ValueError(f"{scheme} has no exact zero: its levels begin at an offset; use int{scheme.bits}-{scheme.granularity}")
    return int(np.flatnonzero(scheme.table == 0)[0])


def _csr(there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    each = there.sum(1, dtype=np.int64)
    ends = np.r_[0, np.cumsum(each)]
    return ends.astype(_end_type(int(ends[-1]))), np.nonzero(there)[1].astype(_index_type(there.shape[1]))


def _end_type(stored: int) -> np.dtype:
    return np.min_scalar_type(max(stored, 256))  # uint16, uint32, uint64


def _index_type(columns: int) -> np.dtype:
    return np.min_scalar_type(max(columns - 1, 0))  # uint8, uint16, uint32


def _place_bits(m: int) -> int:
    return 8 if m > 16 else max(2, (m - 1).bit_length())


def _checked_block(block: tuple[int, int], rows: int, n: int) -> tuple[int, int]:
    high, wide = block
    if high < 1 or wide < 1 or rows % high or n % wide:
        raise ValueError(f"block={block} does not divide a weight of {rows} rows and {n} inputs; use (1, 1), or sizes that divide both")
    return high, wide


def _checked_n_of_m(n_of_m: tuple[int, int], n: int) -> tuple[int, int]:
    few, of = n_of_m
    if not 0 < few < of <= 256 or n % of:
        raise ValueError(f"n_of_m={n_of_m}: n of every m inputs are stored, 0 < n < m <= 256, and m must divide in_features={n}")
    return few, of
