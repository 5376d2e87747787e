"""Low-bit weights times float activations: y[t, o] = sum_k scale[o, k // g] * (q[o, k] - 2**(b-1)) * x[t, k].

Weight-only: the codes stay packed in memory as `QTensor` lays them out, and activations are float32. A block of output
rows is unpacked two rows at a time into a scratch that fits the first-level cache, and each pair is then used for all
tokens, four at once: eight sums in registers per pass, six loads for eight multiply-adds.

Parallel over blocks of output rows and never over a sum, so the result does not depend on the number of threads.

Scales come as the int16 bits of float16, which numba cannot hold in an array.
"""

import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, types
from numba.extending import intrinsic

from edgelab.kernels._jit import ONE_AT_A_TIME, approx

BLOCK = 16  # output rows that one task computes; even, so that the same rows are paired whatever the threads
UNPACK = 6  # to unpack a weight costs about as much as to multiply it with six tokens (0.2 against 0.03 ns)
# A product below this many multiply-adds (unpacking counted so) runs on one thread: it takes about 0.1 ms on one
# core of an AVX-512 Xeon, where handing work to a second thread and waiting for it took 0.02 ms with the machine busy.
PARALLEL_FROM = 1 << 21

U = np.uint64  # an index or mask: a plain 2 beside a uint64 would make a float64


@intrinsic
def _as_float32(typingctx, bits):
    """The float32 whose bits are the int32 `bits`."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@approx
def _half(h):
    """float32 of the finite float16 whose bits are the int16 `h`."""
    # By hand and not LLVM's `fpext half`: without F16C (an old or a masked virtual CPU) that becomes a call to a compiler
    # library that numba does not link, and crashes the process. A table of 65,536 would be frozen into every kernel and
    # compete for the cache. No float32 on the way is subnormal, so `torch.set_flush_denormal(True)` changes nothing.
    magnitude = np.int32(h) & 0x7FFF
    if magnitude < 0x0400:  # subnormal: magnitude * 2**-24
        f = np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
    else:  # the exponent's bias grows from 15 to 127
        f = _as_float32(np.int32((magnitude << 13) + ((127 - 15) << 23)))
    return -f if h < 0 else f


@approx
def _spread3(x):
    """Eight codes, one per byte, of a 24-bit number: octal 76543210 -> 0x07060504_03020100, by halves."""
    x = (x | x << U(20)) & U(0x00000FFF_00000FFF)
    x = (x | x << U(10)) & U(0x003F003F_003F003F)
    return (x | x << U(5)) & U(0x07070707_07070707)


@approx
def _spread(packed, o, bits, c16, c32, c64):
    """One byte per code of row `o`, at 2, 3 or 4 bits, into a scratch that c16, c32 and c64 view as wider integers.

    A unit of codes (one byte, or three at 3 bits) is pulled apart with shifts and masks in one integer, which is then
    stored whole. Loads and stores run straight through memory, so LLVM does many units at once. The last unit may
    write past the row's end: the scratch has room. Assumes a little-endian machine, as `QTensor` does.
    """
    row_bytes = U(packed.shape[1])
    if bits == 4:
        for j in range(row_bytes):
            x = np.uint32(packed[o, j])
            c16[j] = (x | x << 4) & 0x0F0F
    elif bits == 2:
        for j in range(row_bytes):
            x = np.uint32(packed[o, j])
            x = (x | x << 12) & 0x000F000F
            c32[j] = (x | x << 6) & 0x03030303
    else:
        units, rest = row_bytes // U(3), row_bytes % U(3)
        for j in range(units):
            at = U(3) * j
            c64[j] = _spread3(U(packed[o, at]) | U(packed[o, at + U(1)]) << U(8) | U(packed[o, at + U(2)]) << U(16))
        if rest > U(0):  # the row ends inside a unit
            word = U(packed[o, U(3) * units])
            if rest > U(1):
                word |= U(packed[o, U(3) * units + U(1)]) << U(8)
            c64[units] = _spread3(word)


@approx
def _scale(codes, row, scales, o, bits, group_size, w):
    """w [in] = scale * (q - zero point), for row `row` of the one-byte `codes` and the scales of output row `o`."""
    zero_point = np.int32(1 << (bits - 1))
    size = U(group_size) if group_size > 0 else U(w.size)
    scale_row = o if scales.shape[0] > 1 else U(0)
    for g in range(U(scales.shape[1])):
        s = _half(scales[scale_row, g])
        for k in range(g * size, (g + U(1)) * size):
            w[k] = s * np.float32(np.int32(codes[row, k]) - zero_point)


@approx
def _block(packed, scales, bits, group_size, x, y, first, last):
    """Output rows first .. last - 1 of y [tokens, out] = x [tokens, in] times the transposed weight."""
    # Indices are unsigned and rows are not sliced. A signed index that might be negative is tested for wrapping around
    # at every element, which keeps a loop out of the vector registers (seen: 0.85 against 0.15 ns per weight); a slice
    # costs an atomic count of references, which threads would contend for.
    tokens, n = U(x.shape[0]), U(x.shape[1])
    c64 = np.empty((1, n // U(8) + U(1)), np.uint64)
    c8, c16, c32 = c64.view(np.uint8), c64.view(np.uint16)[0], c64.view(np.uint32)[0]
    c1 = c64[0]
    u = np.zeros(n, np.float32)
    v = np.zeros(n, np.float32)  # stays zero beside a last odd row
    zero = np.float32(0)
    end = U(last)
    for o in range(U(first), end, U(2)):
        two = o + U(1) < end
        if bits == 8:
            _scale(packed, o, scales, o, bits, group_size, u)
            if two:
                _scale(packed, o + U(1), scales, o + U(1), bits, group_size, v)
        else:
            _spread(packed, o, bits, c16, c32, c1)
            _scale(c8, U(0), scales, o, bits, group_size, u)
            if two:
                _spread(packed, o + U(1), bits, c16, c32, c1)
                _scale(c8, U(0), scales, o + U(1), bits, group_size, v)
        whole = tokens - tokens % U(4)
        for t in range(U(0), whole, U(4)):
            t1, t2, t3 = t + U(1), t + U(2), t + U(3)
            u0, u1, u2, u3, v0, v1, v2, v3 = zero, zero, zero, zero, zero, zero, zero, zero
            for k in range(n):
                a, b = u[k], v[k]
                u0 += a * x[t, k]
                u1 += a * x[t1, k]
                u2 += a * x[t2, k]
                u3 += a * x[t3, k]
                v0 += b * x[t, k]
                v1 += b * x[t1, k]
                v2 += b * x[t2, k]
                v3 += b * x[t3, k]
            y[t, o], y[t1, o], y[t2, o], y[t3, o] = u0, u1, u2, u3
            if two:
                y[t, o + U(1)], y[t1, o + U(1)], y[t2, o + U(1)], y[t3, o + U(1)] = v0, v1, v2, v3
        for t in range(whole, tokens):  # also the whole of decoding, one token at a time
            u0, v0 = zero, zero
            for k in range(n):
                u0 += u[k] * x[t, k]
                v0 += v[k] * x[t, k]
            y[t, o] = u0
            if two:
                y[t, o + U(1)] = v0


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


def uses_threads(out: int, n: int, tokens: int, experts: int = 1) -> bool:
    """Whether a product of `tokens` with weights [out, n] (at most one expert per token) is worth several threads."""
    return out * n * (tokens + UNPACK * min(tokens, experts)) >= PARALLEL_FROM


def qmatmul(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, y: np.ndarray) -> None:
    """Fill `y` float32 [tokens, out] with x [tokens, in] times the transposed low-bit weight.

    `packed` uint8 [out, row_bytes] and `scales` int16 [out or 1, groups] (float16 bits) as in `QTensor`; `group_size` 0:
    one scale per row. All arrays C-contiguous; nothing is checked here.
    """
    if uses_threads(packed.shape[0], x.shape[1], x.shape[0]) and get_num_threads() > 1:
        with ONE_AT_A_TIME:
            _qmatmul_parallel(packed, scales, bits, group_size, x, y)
    else:
        _qmatmul_serial(packed, scales, bits, group_size, x, y)


def qmatmul_experts(
    packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, offsets: np.ndarray, y: np.ndarray
) -> None:
    """Fill `y` float32 [tokens, out]: expert e multiplies the tokens offsets[e] .. offsets[e + 1] - 1 of `x` [tokens, in].

    `packed` uint8 [experts, out, row_bytes], `scales` int16 [experts, out or 1, groups], `offsets` int64 [experts + 1]
    rising from 0 to tokens (tokens are sorted by expert). An expert without tokens is never unpacked.
    """
    if uses_threads(packed.shape[1], x.shape[1], x.shape[0], packed.shape[0]) and get_num_threads() > 1:
        with ONE_AT_A_TIME:
            _experts_parallel(packed, scales, bits, group_size, x, offsets, y)
    else:
        _experts_serial(packed, scales, bits, group_size, x, offsets, y)
