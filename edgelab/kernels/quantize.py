"""Round to nearest and pack, one pass over rows as they lie in a file: what `methods/rtn.py` computes, bit for bit.

For each group of `group` consecutive weights, with m the weight of largest magnitude (of several, the first) and h = 2**(bits - 1):

    s = float16(m / -h),    q = clip(round_half_even(w / s), -h, h - 1) + h

and the codes go out as the little-endian bit stream of `qtensor.py`. Sources are rows of bfloat16, float16 or float32, given as
their bits (uint16 or uint32): numba has no 16-bit floats. A row is widened to the bits of float32 once; then everything but the
division is integer work, which the compiler puts into vector lanes without leave to reorder floating-point operations:

- magnitudes: the bits of a non-negative float32 order as integers, so the largest is an integer maximum, over the bits as they
  are (positive weights win) and over the bits with the sign flipped (negative ones do);
- rounding: x + 1.5 * 2**23 leaves round_half_even(x) in the low bits of the sum, for |x| < 2**22.

Speed: 1.7 billion bfloat16 weights a second at int4-g32 on one thread of an AMD EPYC 9005, in cache; `round_to_nearest` in torch
does some 0.03.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgelab.kernels._jit import exact
from edgelab.kernels.simd import F32, I32

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # what the bits of a source mean
NO_SCALE = np.float32(np.nan)  # `quantize_rows` finds the scales itself

_SIGN = np.int32(-(2**31))
_MAGIC, _MAGIC_BITS = np.float32(1.5 * 2**23), np.int32(0x4B400000)
_INFINITE = 0x7F800000


@intrinsic
def _bits(typingctx, x):
    """The bits of a float32 as int32."""

    def codegen(context, builder, signature, values):
        return builder.bitcast(values[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def _float(typingctx, x):
    """The float32 of these bits."""

    def codegen(context, builder, signature, values):
        return builder.bitcast(values[0], F32)

    return types.float32(types.int32), codegen


def _int32(name: str):
    """An LLVM intrinsic int32(int32, int32): numba's own `max` and `min` would widen to int64 and halve the lanes."""

    @intrinsic
    def chosen(typingctx, a, b):
        def codegen(context, builder, signature, values):
            kind = ir.FunctionType(I32, [I32, I32])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

        return types.int32(types.int32, types.int32), codegen

    return chosen


_larger, _smaller = _int32("llvm.smax.i32"), _int32("llvm.smin.i32")


@exact
def _to_half(x):
    """The bits of float16(x), rounded half to even, as NumPy and torch round; infinity above 65,519."""
    a = np.int64(_bits(x)) & 0x7FFFFFFF
    if a >= 0x477FF000:  # 65520 lies halfway to the first number that float16 has not
        h = np.int64(0x7C00)
    elif a < 0x38800000:  # below 2**-14: adding 0.5 leaves multiples of 2**-24 in the low bits
        h = np.int64(_bits(_float(np.int32(a)) + np.float32(0.5))) - 0x3F000000
    else:
        h = (a + 0xFFF + ((a >> 13) & 1) - (112 << 23)) >> 13  # 112: from one exponent's bias to the other's
    return h | ((np.int64(_bits(x)) >> 16) & 0x8000)


@exact
def _from_half(h):
    """float32 of the bits of a finite float16."""
    a = h & 0x7FFF
    x = _float(np.int32((a << 13) + (112 << 23))) if a >= 0x400 else np.float32(a) * np.float32(2.0**-24)
    return -x if h & 0x8000 else x


@exact
def _widen(row, form, wide):
    """wide int32 [n] = the bits of float32(row)."""
    if form == 0:
        for i in range(row.shape[0]):
            wide[i] = np.int32(row[i]) << 16
    elif form == 1:
        for i in range(row.shape[0]):
            h = np.int32(row[i])
            a = np.int32(h & 0x7FFF)
            small = _bits(np.float32(a) * np.float32(2.0**-24))
            large = np.int32((a << 13) + ((224 if a >= 0x7C00 else 112) << 23))  # infinities and NaNs stay what they are
            wide[i] = np.int32(large if a >= 0x400 else small) | np.int32(np.int32(h & 0x8000) << 16)
    else:
        for i in range(row.shape[0]):
            wide[i] = np.int32(row[i])


@exact
def _largest(w, group, tops):
    """tops float32 [n / group]: of each group of w int32 [n] (bits of float32) the weight of largest magnitude, with its sign.

    Of several the first; a NaN is the largest of all.
    """
    for g in range(tops.shape[0]):
        v = w[g * group : (g + 1) * group]
        positive = negative = _SIGN
        for i in range(group):
            positive = _larger(positive, v[i])
            negative = _larger(negative, np.int32(v[i] ^ _SIGN))
        tops[g] = _float(positive) if positive > negative else _float(np.int32(negative ^ _SIGN))
        if positive == negative:  # both m and -m occur
            for i in range(group):
                if (v[i] & 0x7FFFFFFF) == positive:
                    tops[g] = _float(v[i])
                    break


@exact
def _broken(w):
    """How many of w are NaN or infinite."""
    count = 0
    for i in range(w.shape[0]):
        count += (w[i] & 0x7FFFFFFF) >= _INFINITE
    return count


@exact
def _encode(w, group, s, half, codes):
    """codes uint8 [n] of w int32 [n] (bits of float32) at the scales s [n / group]; infinity gives the code of 0."""
    low, high, zero = np.int32(-half), np.int32(half - 1), np.int32(half)
    for g in range(s.shape[0]):
        v, c, scale = w[g * group : (g + 1) * group], codes[g * group : (g + 1) * group], s[g]
        for i in range(group):
            q = np.int32(_bits(_float(v[i]) / scale + _MAGIC) - _MAGIC_BITS)
            c[i] = _smaller(_larger(q, low), high) + zero


@exact
def _pack(codes, bits, out):
    """out uint8 [ceil(n * bits / 8)] of codes uint8 [n rounded up to a multiple of 8]; what lies behind the n-th is 0."""
    if bits == 8:
        for i in range(out.shape[0]):
            out[i] = codes[i]
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for i in range(out.shape[0]):
            v = pairs[i]
            out[i] = v | (v >> 4)
    elif bits == 2:
        fours = codes.view(np.uint32)
        for i in range(out.shape[0]):
            v = fours[i]
            out[i] = v | (v >> 6) | (v >> 12) | (v >> 18)
    else:
        eights = codes.view(np.uint64)
        for i in range(eights.shape[0]):
            v = eights[i]  # fold pairs, then fours, then all eight together
            v = (v | (v >> np.uint64(5))) & np.uint64(0x003F003F003F003F)
            v = (v | (v >> np.uint64(10))) & np.uint64(0x00000FFF00000FFF)
            v = v | (v >> np.uint64(20))
            for b in range(min(3, out.shape[0] - 3 * i)):
                out[3 * i + b] = np.uint8((v >> np.uint64(8 * b)) & np.uint64(0xFF))


@exact
def _scales(tops, half, stored, s, found):
    """The scales of groups whose largest weights are `tops`: `stored` uint16, `s` float32 for `_encode`. Counts in `found`."""
    for g in range(tops.shape[0]):
        top = tops[g]
        h = _to_half(top / np.float32(-half))
        stored[g] = h
        if (h & 0x7FFF) >= 0x7C00:
            found[1] += 1
            s[g] = np.float32(np.inf)
            continue
        s[g] = _from_half(h)
        if (h & 0x7FFF) < 0x400:  # a subnormal float16; others lie within 2**-11 of what they stand for
            wanted = abs(np.float64(top)) / half
            if abs(abs(np.float64(s[g])) - wanted) * 2 * half > wanted:
                found[2] += 1
                found[3] = max(found[3], abs(np.float64(top)))
            if s[g] == 0:
                s[g] = np.float32(np.inf)


@exact
def quantize_rows(source, form, bits, group, given, packed, scales, found):
    """Fill `packed` uint8 [rows, row_bytes] and `scales` uint16 [rows, n / group] (bits of float16) from source [rows, n].

    `source` uint16 or uint32: the bits of weights of `form`. `given`: one scale for all, float32 as stored, in the place of those
    that each group has (`scales` is not written then); `NO_SCALE`: none. Adds to `found` float64 [4]: weights that are NaN or infinite;
    groups whose scale overflows float16; groups whose scale float16 holds badly (off by half a step at the end of the range); the
    largest weight of these. With any of the first two the codes mean nothing.
    """
    rows, n = source.shape
    half = 1 << (bits - 1)
    wide = np.empty(n, np.int32)
    codes = np.zeros((n + 7) // 8 * 8, np.uint8)
    tops = np.empty(n // group, np.float32)
    s = np.empty(n // group, np.float32)
    is_given = given == given  # no NaN
    if is_given:
        s[:] = np.float32(np.inf) if given == 0 else given
    for r in range(rows):
        _widen(source[r], form, wide)
        if is_given:
            found[0] += _broken(wide)
        else:
            _largest(wide, group, tops)
            before = found[1]
            _scales(tops, half, scales[r], s, found)
            if found[1] > before:  # too large for float16, or no number at all
                broken = _broken(wide)
                found[0] += broken
                if broken > 0:
                    found[1] = before
        _encode(wide, group, s, half, codes)
        _pack(codes, bits, packed[r])


@exact
def largest_of_rows(source, form, before):
    """The weight of largest magnitude, with its sign, of `before` (float32; NaN: nothing) and then source [rows, n]; of several the first.

    A NaN may or may not come through: `count_broken` finds it.
    """
    n = source.shape[1]
    wide, here = np.empty(n, np.int32), np.empty(1, np.float32)
    top = before
    for r in range(source.shape[0]):
        _widen(source[r], form, wide)
        _largest(wide, n, here)
        if not abs(here[0]) <= abs(top):
            top = here[0]
    return top


@exact
def count_broken(source, form):
    """How many of source [rows, n] are NaN or infinite."""
    wide = np.empty(source.shape[1], np.int32)
    count = 0
    for r in range(source.shape[0]):
        _widen(source[r], form, wide)
        count += _broken(wide)
    return count


def scale_of(largest: float, bits: int) -> np.float16:
    """The scale, as it is stored, of weights whose largest (with its sign) is given.

    >>> scale_of(-4.0, 4)
    np.float16(0.5)
    """
    with np.errstate(over="ignore"):
        return np.float16(np.float32(largest) / np.float32(-(2 ** (bits - 1))))
