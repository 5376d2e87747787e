"""Low-bit weights times float activations: y[t, o] = sum_k scale[o, k // g] * (q[o, k] - 2**(b-1)) * x[t, k].

Weight-only: the codes stay packed in memory as `QTensor` lays them out, and activations are float32. A block of output
rows is unpacked two rows at a time into a scratch that fits the first-level cache, and each pair is then used for all
tokens, four at once: eight sums in registers per pass, six loads for eight multiply-adds.

Parallel over blocks of output rows and never over a sum, so the result does not depend on the number of threads.

Scales come as the int16 bits of float16, which numba cannot hold in an array.
"""

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from edgelab.kernels._jit import approx

BLOCK = 16  # output rows that one task computes; even, so that the same rows are paired whatever the threads
PARALLEL_FROM = 1 << 17  # multiply-adds

U = np.uint64  # an index or mask: a plain 2 beside a uint64 would make a float64


@intrinsic
def _half(typingctx, bits):
    """float32 of the float16 whose bits are the int16 `bits`."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), codegen


@approx
def _spread(row, bits, codes):
    """Fill `codes` (uint64, read as bytes) with one byte per code of a packed row of 2, 3 or 4 bits.

    A unit of codes (a byte; three bytes at 3 bits) is pulled apart by halves with shifts and masks, in one integer that
    is then stored whole. At 3 bits, octal 76543210 -> 0x07060504_03020100 in three steps. Loads and stores run
    straight through memory, so LLVM does many units at once. Assumes a little-endian machine, as `QTensor` does.
    """
    if bits == 4:
        c16 = codes.view(np.uint16)
        for j in range(U(row.size)):
            x = np.uint32(row[j])
            c16[j] = (x | x << 4) & 0x0F0F
    elif bits == 2:
        c32 = codes.view(np.uint32)
        for j in range(U(row.size)):
            x = np.uint32(row[j])
            x = (x | x << 12) & 0x000F000F
            c32[j] = (x | x << 6) & 0x03030303
    else:
        units = U(row.size) // U(3)
        for j in range(units):
            at = U(3) * j
            codes[j] = _spread3(U(row[at]) | U(row[at + U(1)]) << U(8) | U(row[at + U(2)]) << U(16))
        if row.size % 3:  # a row's end inside a unit
            word = U(row[U(3) * units])
            if row.size % 3 == 2:
                word |= U(row[U(3) * units + U(1)]) << U(8)
            codes[units] = _spread3(word)


@approx
def _spread3(x):
    x = (x | x << U(20)) & U(0x00000FFF_00000FFF)
    x = (x | x << U(10)) & U(0x003F003F_003F003F)
    return (x | x << U(5)) & U(0x07070707_07070707)


@approx
def _unpack_row(row, scales, bits, group_size, codes, w):
    """Fill `w` float32 [in] with the values of one packed row; `scales` int16 [groups], `codes` scratch for `_spread`."""
    # Indices are unsigned: a signed one that might be negative is tested for wrapping around at every element, and that
    # test keeps a loop out of the vector registers (seen: 0.85 against 0.15 ns per weight).
    if bits == 8:
        c = row
    else:
        _spread(row, bits, codes)
        c = codes.view(np.uint8)
    zero_point = np.int32(1 << (bits - 1))
    size = U(group_size) if group_size > 0 else U(w.size)
    for g in range(U(scales.size)):
        s = _half(scales[g])
        for k in range(g * size, (g + U(1)) * size):
            w[k] = s * np.float32(np.int32(c[k]) - zero_point)


@approx
def _block(packed, scales, bits, group_size, x, y, first, last):
    """Output rows first .. last - 1 of y [tokens, out] = x [tokens, in] times the transposed weight."""
    tokens, n = x.shape
    u = np.zeros(n, np.float32)
    v = np.zeros(n, np.float32)  # stays zero beside a last odd row
    codes = np.empty(n // 8 + 1, np.uint64)
    zero = np.float32(0)
    for o in range(first, last, 2):
        two = o + 1 < last
        _unpack_row(packed[o], scales[o if scales.shape[0] > 1 else 0], bits, group_size, codes, u)
        if two:
            _unpack_row(packed[o + 1], scales[o + 1 if scales.shape[0] > 1 else 0], bits, group_size, codes, v)
        whole = tokens - tokens % 4
        for t in range(0, whole, 4):
            x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
            u0, u1, u2, u3, v0, v1, v2, v3 = zero, zero, zero, zero, zero, zero, zero, zero
            for k in range(n):
                a, b = u[k], v[k]
                u0 += a * x0[k]
                u1 += a * x1[k]
                u2 += a * x2[k]
                u3 += a * x3[k]
                v0 += b * x0[k]
                v1 += b * x1[k]
                v2 += b * x2[k]
                v3 += b * x3[k]
            y[t, o], y[t + 1, o], y[t + 2, o], y[t + 3, o] = u0, u1, u2, u3
            if two:
                y[t, o + 1], y[t + 1, o + 1], y[t + 2, o + 1], y[t + 3, o + 1] = v0, v1, v2, v3
        for t in range(whole, tokens):
            x0 = x[t]
            u0, v0 = zero, zero
            for k in range(n):
                u0 += u[k] * x0[k]
                v0 += v[k] * x0[k]
            y[t, o] = u0
            if two:
                y[t, o + 1] = v0


@approx
def _qmatmul_serial(packed, scales, bits, group_size, x, y):
    out = packed.shape[0]
    for i in range((out + BLOCK - 1) // BLOCK):
        _block(packed, scales, bits, group_size, x, y, i * BLOCK, min(out, (i + 1) * BLOCK))


@approx(parallel=True)
def _qmatmul_parallel(packed, scales, bits, group_size, x, y):
    out = packed.shape[0]
    for i in prange((out + BLOCK - 1) // BLOCK):
        _block(packed, scales, bits, group_size, x, y, i * BLOCK, min(out, (i + 1) * BLOCK))


@approx
def _experts_serial(packed, scales, bits, group_size, x, offsets, y):
    experts, out = packed.shape[0], packed.shape[1]
    blocks = (out + BLOCK - 1) // BLOCK
    for i in range(experts * blocks):
        e, b = i % experts, i // experts
        lo, hi = offsets[e], offsets[e + 1]
        if hi > lo:
            _block(packed[e], scales[e], bits, group_size, x[lo:hi], y[lo:hi], b * BLOCK, min(out, (b + 1) * BLOCK))


@approx(parallel=True)
def _experts_parallel(packed, scales, bits, group_size, x, offsets, y):
    experts, out = packed.shape[0], packed.shape[1]
    blocks = (out + BLOCK - 1) // BLOCK
    # threads get runs of i: the expert varies fastest, so that each has a share of every expert, busy or idle
    for i in prange(experts * blocks):
        e, b = i % experts, i // experts
        lo, hi = offsets[e], offsets[e + 1]
        if hi > lo:
            _block(packed[e], scales[e], bits, group_size, x[lo:hi], y[lo:hi], b * BLOCK, min(out, (b + 1) * BLOCK))


def qmatmul(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, y: np.ndarray) -> None:
    """Fill `y` float32 [tokens, out] with x [tokens, in] times the transposed low-bit weight.

    `packed` uint8 [out, row_bytes] and `scales` int16 [out or 1, groups] (float16 bits) as in `QTensor`; `group_size` 0:
    one scale per row. All arrays C-contiguous; nothing is checked here.
    """
    work = packed.shape[0] * x.shape[0] * x.shape[1]
    (_qmatmul_parallel if work >= PARALLEL_FROM else _qmatmul_serial)(packed, scales, bits, group_size, x, y)


def qmatmul_experts(
    packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, offsets: np.ndarray, y: np.ndarray
) -> None:
    """Fill `y` float32 [tokens, out]: expert e multiplies the tokens offsets[e] .. offsets[e + 1] - 1 of `x` [tokens, in].

    `packed` uint8 [experts, out, row_bytes], `scales` int16 [experts, out or 1, groups], `offsets` int64 [experts + 1]
    rising from 0 to tokens (tokens are sorted by expert). An expert without tokens is never unpacked.
    """
    work = packed.shape[1] * x.shape[0] * x.shape[1]
    (_experts_parallel if work >= PARALLEL_FROM else _experts_serial)(packed, scales, bits, group_size, x, offsets, y)
