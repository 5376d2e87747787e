"""Products with a pruned weight that is stored without its zeros: y[t, o] = sum_k W[o, k] * x[t, k], W in float16.

Two ways to say where the weights that are left lie, row after row:

- `Bits`: one bit per place, and the values in order. 16 places are 16 bits: on AVX-512 one instruction (vexpandps) spreads
  the next values over the lanes that their bits name, the others become 0, and one fma multiplies with 16 inputs as they
  lie. The work is that of the dense product; what is saved is reading (9 bits per weight at 50 % zeros, 3.4 at 85 %).
  Elsewhere a plain loop over the set bits.
- `Columns` (CSR): the column of each value. The work is proportional to what is left, but every value fetches an input of
  its own: one multiplication for one load, where a vector does 16. With many rows of x, these are the vector.

One thread. x must be finite: a zero weight is skipped by one kernel and multiplied by the other. Float32 sums; within the
bound that `reference.py` derives, not bit for bit.
"""

import math
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgelab.kernels import simd
from edgelab.kernels._jit import exact
from edgelab.kernels.pack import aligned
from edgelab.kernels.simd import F16, F32, I16, I64, Vectors, emitted

UNIT = 64  # places per step of the vector kernel; a row of bits is filled up to whole units
_LANES = 16
_TOKENS = (16, 8, 4, 2, 1)  # rows of x that share one spreading of the values: as many sums as registers hold
_PAD = 16  # floats between rows of x, lest 16 rows of 4,096 all fall into one set of the cache: 4 times faster
_VECTORS = simd.way() == "avx512"


class Bits(NamedTuple):
    """A weight [rows, n] for the kernel: what `bits` makes of a bitmap."""

    mask: np.ndarray  # uint8 [rows, units * 8]: bit k % 8 of byte k // 8 is place k
    starts: np.ndarray  # int64 [rows]: where a row's values begin
    values: np.ndarray  # int16 [values + 16]: float16's bits; the last 16 are there to be loaded, not used
    n: int

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.starts.nbytes + self.values.nbytes


class Columns(NamedTuple):
    """A weight [rows, n] for the kernel: CSR."""

    ends: np.ndarray  # [rows + 1], any integer: row o's values are ends[o] .. ends[o + 1] - 1
    columns: np.ndarray  # uint8, uint16 or uint32 [values]
    values: np.ndarray  # int16 [values]: float16's bits
    n: int

    @property
    def nbytes(self) -> int:
        return self.ends.nbytes + self.columns.nbytes + self.values.nbytes


def bits(mask: np.ndarray, values: np.ndarray, n: int) -> Bits:
    """The kernel's form of `mask` uint8 [rows, ceil(n / 8)] (little-endian bits) and `values` float16 [number of set bits].

    Raises ValueError where the two do not fit together.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2 or mask.shape[1] != (n + 7) // 8:
        raise ValueError(f"mask is {mask.dtype} {mask.shape}; n={n} places a row need uint8 [rows, {(n + 7) // 8}]")
    padded = aligned((len(mask), -(-n // UNIT) * UNIT // 8))
    padded[:, : mask.shape[1]] = mask
    each = np.bitwise_count(padded).sum(axis=1, dtype=np.int64)
    if values.dtype != np.float16 or values.shape != (each.sum(),):
        raise ValueError(f"values are {values.dtype} {values.shape}; the {each.sum()} bits of the mask need float16 ({each.sum()},)")
    if not np.isfinite(values).all():
        raise ValueError("values hold NaN or infinity")
    stored = aligned((len(values) + _LANES,), np.int16)
    stored[: len(values)] = values.view(np.int16)
    return Bits(padded, np.r_[0, np.cumsum(each)[:-1]].astype(np.int64)[: len(mask)], stored, n)


def columns(ends: np.ndarray, indices: np.ndarray, values: np.ndarray, n: int) -> Columns:
    """The kernel's form of CSR arrays: `ends` [rows + 1], `indices` and `values` float16 [ends[-1]]. ValueError where they do not fit."""
    if not (len(ends) and ends[0] == 0 and (np.diff(ends.astype(np.int64)) >= 0).all() and ends[-1] == len(indices)):
        raise ValueError(f"ends {ends[:3]} .. do not rise from 0 to the {len(indices)} indices")
    if values.dtype != np.float16 or values.shape != indices.shape:
        raise ValueError(f"values are {values.dtype} {values.shape}; {len(indices)} indices need float16 ({len(indices)},)")
    if len(indices) and int(indices.max()) >= n:
        raise ValueError(f"an index is {int(indices.max())}; columns are 0 .. {n - 1}")
    return Columns(ends, indices, np.ascontiguousarray(values).view(np.int16), n)


# ------------------------------------------------------------------------------------------------------------ the loops


def spread(v: Vectors, tokens: int, codes, scales, x, ldx, y, ldy, units) -> None:
    """One output for `tokens` rows of x. `codes`: the bits of the row, `scales`: its values; x float32 rows `ldx` bytes apart, `units`
    of 64 inputs each; the outputs are `ldy` bytes apart."""
    b = v.b
    parts = UNIT // _LANES
    turns = parts if tokens == 1 else 2 if tokens <= 4 else 1  # several sums of one row, lest each fma waits for the last

    def unit(i, carried):
        at, sums = carried[0], list(carried[1:])
        word = v.load(I64, codes, v.mul(i, UNIT // 8))
        for part in range(parts):
            sixteen = b.trunc(b.lshr(word, v.k(_LANES * part)), I16)
            places = b.bitcast(sixteen, v.mask)
            values = v.halves(scales, v.mul(at, 2))
            w = v.call("llvm.x86.avx512.mask.expand.v16f32", v.f32, values, ir.Constant(v.f32, None), places)
            for t in range(tokens):
                k = t * turns + part % turns
                sums[k] = v.fma(w, v.load(v.f32, x, v.mul(ldx, t), v.mul(i, 4 * UNIT), 4 * _LANES * part), sums[k])
            at = b.add(at, b.zext(v.call("llvm.ctpop.i16", I16, sixteen), I64))
        return [at, *sums]

    _, *sums = v.loop(units, [v.k(0), *[v.floats(0)] * (tokens * turns)], unit)
    for t in range(tokens):
        mine = sums[t * turns : (t + 1) * turns]
        while len(mine) > 1:
            mine = [b.fadd(p, q) for p, q in zip(mine[::2], mine[1::2], strict=True)]
        total = mine[0]
        while total.type.count > 1:
            half = total.type.count // 2
            low, high = (
                b.shuffle_vector(total, total, ir.Constant(ir.VectorType(ir.IntType(32), half), [k + o for k in range(half)]))
                for o in (0, half)
            )
            total = b.fadd(low, high)
        v.store(b.extract_element(total, ir.Constant(ir.IntType(32), 0)), y, v.mul(ldy, t))


_spread = emitted(spread, _TOKENS) if _VECTORS else None


@intrinsic
def _half(typingctx, stored):
    """float32 of a float16's bits, by the processor's own conversion."""

    def codegen(context, builder, signature, values):
        return builder.fpext(builder.bitcast(values[0], F16), F32)

    return types.float32(types.int16), codegen


if simd.way() == "portable":  # where LLVM would call a library function that numba does not link

    @exact
    def _half(stored):
        exponent, fraction = (np.int64(stored) >> 10) & 31, np.int64(stored) & 1023
        size = math.ldexp(1.0 * fraction, -24) if exponent == 0 else math.ldexp(1.0 * (1024 + fraction), exponent - 25)
        return np.float32(-size if stored < 0 else size)


@exact
def _bits_vectors(mask, starts, values, x, y):
    """x [tokens, whole units and perhaps some more]."""
    tokens, out, ldx, units = x.shape[0], y.shape[1], 4 * x.shape[1], mask.shape[1] * 8 // UNIT
    t = 0
    for most in _TOKENS:
        while tokens - t >= most:
            for o in range(out):
                codes, at = mask.ctypes.data + o * mask.shape[1], values.ctypes.data + 2 * starts[o]
                _spread(most, codes, at, x.ctypes.data + t * ldx, ldx, y.ctypes.data + 4 * (t * out + o), 4 * out, units)
            t += most


@exact
def _bits_plain(mask, starts, values, x, y):
    """x [n, tokens], y [out, tokens]: both turned, so that a weight multiplies neighbours."""
    tokens = x.shape[1]
    for o in range(y.shape[0]):
        at, row = starts[o], y[o]
        row[:] = 0
        for i in range(mask.shape[1]):
            byte, k = mask[o, i], 8 * i
            while byte:
                if byte & 1:
                    w = _half(values[at])
                    at += 1
                    for t in range(tokens):
                        row[t] += w * x[k, t]
                byte >>= 1
                k += 1


@exact
def _columns_one(ends, indices, values, x, y):
    """One row of x [n]; four sums in turn, lest each addition waits for the last."""
    for o in range(y.size):
        first, last = np.int64(ends[o]), np.int64(ends[o + 1])
        a = b = c = d = np.float32(0)
        whole = first + (last - first) // 4 * 4
        for k in range(first, whole, 4):
            a += _half(values[k]) * x[indices[k]]
            b += _half(values[k + 1]) * x[indices[k + 1]]
            c += _half(values[k + 2]) * x[indices[k + 2]]
            d += _half(values[k + 3]) * x[indices[k + 3]]
        for k in range(whole, last):
            a += _half(values[k]) * x[indices[k]]
        y[o] = (a + b) + (c + d)


@exact
def _columns_many(ends, indices, values, x, y):
    """x [n, tokens], y [out, tokens]."""
    tokens = x.shape[1]
    for o in range(y.shape[0]):
        row = y[o]
        row[:] = 0
        for k in range(np.int64(ends[o]), np.int64(ends[o + 1])):
            w, inputs = _half(values[k]), x[indices[k]]
            for t in range(tokens):
                row[t] += w * inputs[t]


def _check(rows: int, n: int, x: np.ndarray, y: np.ndarray) -> None:
    for name, a in (("x", x), ("y", y)):
        if a.dtype != np.float32 or a.ndim != 2 or not a.flags.c_contiguous:
            raise ValueError(f"{name} is {a.dtype} {a.shape}; it must be contiguous float32 of two dimensions")
    if x.shape[1] != n or y.shape != (len(x), rows):
        raise ValueError(f"x {x.shape} and y {y.shape} do not fit a weight [{rows}, {n}]; they must be [tokens, {n}] and [tokens, {rows}]")


def bitmap_matmul(weight: Bits, x: np.ndarray, y: np.ndarray) -> None:
    """Fill y float32 [tokens, rows] with x float32 [tokens, n] times the transposed weight. ValueError where shapes do not fit.

    >>> w = bits(np.array([[0b101]], np.uint8), np.array([2.0, 3.0], np.float16), 3)
    >>> y = np.empty((1, 1), np.float32)
    >>> bitmap_matmul(w, np.array([[1.0, 10.0, 100.0]], np.float32), y)
    >>> y
    array([[302.]], dtype=float32)
    """
    _check(len(weight.mask), weight.n, x, y)
    if not x.size or not y.size:
        y[:] = 0
        return
    if _VECTORS:
        more = -weight.n % UNIT + (_PAD if len(x) > 1 else 0)
        if more:
            x = np.pad(x, ((0, 0), (0, more)))
        _bits_vectors(weight.mask, weight.starts, weight.values, x, y)
        return
    turned = np.empty(y.shape[::-1], np.float32)
    _bits_plain(weight.mask, weight.starts, weight.values, np.ascontiguousarray(x.T), turned)
    y[:] = turned.T


def csr_matmul(weight: Columns, x: np.ndarray, y: np.ndarray) -> None:
    """Fill y float32 [tokens, rows] with x float32 [tokens, n] times the transposed weight. ValueError where shapes do not fit."""
    _check(len(weight.ends) - 1, weight.n, x, y)
    if not x.size or not y.size:
        y[:] = 0
    elif len(x) == 1:
        _columns_one(weight.ends, weight.columns, weight.values, x[0], y[0])
    else:
        turned = np.empty(y.shape[::-1], np.float32)
        _columns_many(weight.ends, weight.columns, weight.values, np.ascontiguousarray(x.T), turned)
        y[:] = turned.T
