"""One step of a language model, of one token or of a prompt's: a *program*, a list of jobs over addresses, run by one compiled loop.

A job is a C function (plan, part, parts), as those of `matmul.py`; its plan is a row of int64 numbers: addresses, sizes, strides.
`edgelab.runtime` writes the plans once, when it opens a model. What changes from step to step lies in one record that all
plans point to:

    ROWS       tokens of this step: rows of every activation
    RUN        rows in a row that belong to one sequence: all of them (a prompt), or 1 (decoding, one row per sequence)
    TOKENS     address of their numbers, int64 [ROWS]
    POSITIONS  address of their places in their sequences, int64 [ROWS]
    SLOTS_AT   address of the cache slot of each, int64 [ROWS]
    WANTED     rows whose logits are asked for; WANTED_AT: address of their numbers

`run` walks the program: a job with work for several threads goes to `pool.each`, the others run where they are. No Python and no torch
between two jobs, so a step costs what its bytes and products cost, and some 0.3 microseconds a job.

**The cache.** Keys of 16 positions lie side by side, [slot, head, position / 16, dim, 16], so that a score needs no sum across lanes:
each lane is a position, a query's number is broadcast. Values lie position after position, [slot, head, position, dim], lanes are
dimensions. As float16 (half the memory, rounded) or float32.

**Attention** takes up to QUERIES queries of one key head at a time, whether they are the heads of a group (Ainslie et al., arXiv
2305.13245) or neighbouring rows of a prompt: a key's vector, once loaded, serves all of them. Scores, softmax and weighted sum are three
passes over a scratch that fits the second-level cache.

**Multi-head latent attention** (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps per token only the normalised latent c [rank] and one
rotated key [rope]. With K = c W_uk, q . k = (q W_uk^T) . c: queries go to the latent space (`dense_job`, per head), attention runs there
with one key head for all, and what it returns, sums of c, goes through W_uv (a product per head). The values are the latents themselves:
they are read from the keys' layout, lanes being positions (`_values_across`), and not stored twice.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, types

from edgelab.kernels import micro, simd
from edgelab.kernels._jit import exact, job
from edgelab.kernels.matmul import GROUP, GROUP_UNITS, GROUPS, LDX, SLOTS, START, SX, XQ, _even
from edgelab.kernels.pack import UNIT
from edgelab.kernels.pool import each
from edgelab.kernels.router import LANES, _combine_kernel, _deepseek_v3_kernel, _dispatch_kernel, _softmax_kernel
from edgelab.kernels.simd import F32, I16, I64, POINTER, Vectors, call, emitted, peek, pointer, poke

BLOCK = 16  # positions whose keys lie side by side
QUERIES = {"avx512": 8, "avxvnni": 4, "avx2": 4, "sdot": 4, "portable": 2}[simd.way()]
_EACH = tuple(range(QUERIES, 0, -1))
KV = ("float16", "float32")

ROWS, RUN, TOKENS, POSITIONS, SLOTS_AT, WANTED, WANTED_AT = range(7)
RECORD = 8  # int64 numbers of the record
WORDS = 32  # int64 numbers of a plan: at least matmul's

_f32, _i16, _u8, _i64 = pointer(types.float32), pointer(types.int16), pointer(types.uint8), pointer(types.int64)


# ------------------------------------------------------------------------------------------------------------ vector code


def _vector(v: Vectors, half: bool, address, *offset) -> ir.Value:
    return v.halves(address, *offset) if half else v.load(v.f32, address, *offset)


def _scores(v: Vectors, tokens: int, half: bool, q, keys, y, ldy, blocks, dim) -> None:
    """y [tokens, ldy] float32: q_t . key of each position of `blocks` blocks of BLOCK; `q` is a table of `tokens` addresses.

    `dim` is a multiple of 4.
    """
    columns, size = BLOCK // v.lanes, 2 if half else 4
    pointers = [v.b.inttoptr(v.load(I64, q, 8 * t), POINTER) for t in range(tokens)]

    def block(i, _):
        here = v.at(keys, v.mul(v.mul(i, dim), BLOCK * size))

        def four(d, sums):
            sums = list(sums)
            for j in range(4):
                at = v.mul(d, 4 * BLOCK * size)
                k = [_vector(v, half, here, at, (j * BLOCK + c * v.lanes) * size) for c in range(columns)]
                for t in range(tokens):
                    x = v.splat(v.load(F32, pointers[t], v.mul(d, 16), 4 * j))
                    for c in range(columns):
                        sums[t * columns + c] = v.fma(k[c], x, sums[t * columns + c])
            return sums

        sums = v.loop(v.b.sdiv(dim, v.k(4)), [v.floats(0)] * (tokens * columns), four)
        for t in range(tokens):
            for c in range(columns):
                v.store(sums[t * columns + c], y, v.mul(ldy, 4 * t), v.mul(i, 4 * BLOCK), 4 * v.lanes * c)
        return []

    v.loop(blocks, [], block)


def _values(v: Vectors, tokens: int, half: bool, x, ldx, codes, stride, q, scales, positions, columns) -> None:
    """The sum over positions of x[t, position] * value, times scales[t], to the address q[t]; 16 * `columns` dimensions.

    Values lie `stride` bytes apart at `codes`, filled up to whole vectors, and so are the outputs.
    """
    size = 2 if half else 4
    pointers = [v.b.inttoptr(v.load(I64, q, 8 * t), POINTER) for t in range(tokens)]
    s = [v.splat(v.load(F32, scales, 4 * t)) for t in range(tokens)]

    def column(c, _):
        at = v.mul(c, v.lanes * size)

        def position(i, sums):
            value = _vector(v, half, codes, at, v.mul(i, stride))
            return [v.fma(v.splat(v.load(F32, x, v.mul(ldx, 4 * t), v.mul(i, 4))), value, sums[t]) for t in range(tokens)]

        sums = v.loop(positions, [v.floats(0)] * tokens, position)
        for t in range(tokens):
            v.store(v.b.fmul(sums[t], s[t]), pointers[t], v.mul(c, 4 * v.lanes))
        return []

    v.loop(v.mul(columns, 16 // v.lanes), [], column)


def _values_across(v: Vectors, tokens: int, half: bool, x, ldx, keys, key_dim, q, scales, positions, dim) -> None:
    """As `_values` for the first `dim` numbers of the keys: lanes are positions, summed at the end.

    Lanes behind the last position hold what a sequence before left there, infinity perhaps: 0 times it is not 0, so they are masked.
    """
    blocks = v.b.sdiv(v.add(positions, BLOCK - 1), v.k(BLOCK))
    columns, size = BLOCK // v.lanes, 2 if half else 4
    pointers = [v.b.inttoptr(v.load(I64, q, 8 * t), POINTER) for t in range(tokens)]
    s = [v.load(F32, scales, 4 * t) for t in range(tokens)]

    def number(d, _):
        at = v.mul(d, BLOCK * size)

        def block(i, sums):
            sums = list(sums)
            there = v.mul(v.mul(i, key_dim), BLOCK * size)
            for c in range(columns):
                filled = v.below(v.b.sub(positions, v.mul(i, BLOCK)), c * v.lanes)
                k = v.b.select(filled, _vector(v, half, keys, at, there, c * v.lanes * size), v.floats(0))
                for t in range(tokens):
                    p = v.load(v.f32, x, v.mul(ldx, 4 * t), v.mul(i, 4 * BLOCK), 4 * c * v.lanes)
                    sums[t] = v.fma(p, k, sums[t])
            return sums

        sums = v.loop(blocks, [v.floats(0)] * tokens, block)
        for t in range(tokens):
            v.store(v.b.fmul(_across(v, sums[t]), s[t]), pointers[t], v.mul(d, 4))
        return []

    v.loop(dim, [], number)


def _across(v: Vectors, value: ir.Value) -> ir.Value:
    """The sum of a vector's lanes, folded in halves."""
    n = v.lanes
    while n > 1:
        n //= 2
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(first, first + n))) for first in (0, n))
        value = v.b.fadd(v.b.shuffle_vector(value, value, low), v.b.shuffle_vector(value, value, high))
    return v.b.extract_element(value, ir.Constant(ir.IntType(32), 0))


def _largest(v: Vectors, value: ir.Value) -> ir.Value:
    n = v.lanes
    while n > 1:
        n //= 2
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(first, first + n))) for first in (0, n))
        a, b = v.b.shuffle_vector(value, value, low), v.b.shuffle_vector(value, value, high)
        value = v.b.select(v.b.fcmp_unordered(">", a, b), a, b)
    return v.b.extract_element(value, ir.Constant(ir.IntType(32), 0))


def _softmax(v: Vectors, x, count, padded, scales, y) -> None:
    """exp((x - max) * scale) in place of the `count` numbers at x, zeros up to `padded`, and at y 1 / their sum. `scales`: the scale.

    A NaN anywhere makes the sum, and so every output, NaN.
    """
    b, scale = v.b, v.splat(v.load(F32, scales))
    low = ir.Constant(v.f32, [float("-inf")] * v.lanes)

    def value(i):
        here = v.load(v.f32, x, v.mul(i, 4 * v.lanes))
        return b.select(v.below(b.sub(count, v.mul(i, v.lanes))), here, low)

    vectors = b.sdiv(v.add(count, v.lanes - 1), v.k(v.lanes))

    def top(i, carried):
        here = value(i)
        return [b.select(b.fcmp_unordered(">", here, carried[0]), here, carried[0])]

    (highest,) = v.loop(vectors, [low], top)
    highest = v.splat(_largest(v, highest))

    def power(i, carried):
        e = micro._exp(v, b.fmul(b.fsub(value(i), highest), scale))
        e = b.select(v.below(b.sub(count, v.mul(i, v.lanes))), e, v.floats(0))
        v.store(e, x, v.mul(i, 4 * v.lanes))
        return [b.fadd(carried[0], e)]

    (total,) = v.loop(vectors, [v.floats(0)], power)
    v.store(b.fdiv(ir.Constant(F32, 1.0), _across(v, total)), y)
    rest = b.sub(b.sdiv(padded, v.k(v.lanes)), vectors)

    def clear(i, _):
        v.store(v.floats(0), x, v.mul(v.add(vectors, i), 4 * v.lanes))
        return []

    v.either(b.icmp_signed(">", rest, v.k(0)), lambda: v.loop(rest, [], clear), list)


def _rms_norm(v: Vectors, x, gain, eps, y, count) -> None:
    """y [count] = x / sqrt(mean(x^2) + eps) * gain, float32 (Zhang and Sennrich, arXiv 1910.07467). `eps`: its address."""
    b = v.b

    def load(pointer, position, mask):
        where = v.mul(position, 4)
        return v.load(v.f32, pointer, where) if mask is None else v.load_some(mask, v.f32, pointer, where)

    def square(position, mask, carried):
        here = load(x, position, mask)
        return [v.fma(here, here, carried[0])]

    (total,) = micro._over_group(v, count, [v.floats(0)], square)
    mean = b.fdiv(_across(v, total), b.sitofp(count, F32))
    root = v.call("llvm.sqrt.f32", F32, b.fadd(mean, v.load(F32, eps)))
    inverse = v.splat(b.fdiv(ir.Constant(F32, 1.0), root))

    def scale(position, mask, _):
        result = b.fmul(load(gain, position, mask), b.fmul(load(x, position, mask), inverse))
        if mask is None:
            v.store(result, y, v.mul(position, 4))
        else:
            v.store_some(mask, result, y, v.mul(position, 4))
        return []

    micro._over_group(v, count, [], scale)


def _swiglu(v: Vectors, x, xq, y, count) -> None:
    """y [count] = silu(x) * xq, all float32: `micro.swiglu` with gate and up apart."""
    b = v.b

    def step(position, mask, _):
        at = v.mul(position, 4)
        load = v.load if mask is None else lambda *a: v.load_some(mask, *a)
        gate, up = load(v.f32, x, at), load(v.f32, xq, at)
        silu = b.fdiv(gate, b.fadd(v.floats(1.0), micro._exp(v, b.fneg(gate))))
        silu = b.select(b.fcmp_ordered("<", gate, v.floats(-87.0)), b.fmul(gate, v.floats(0.0)), silu)
        product = b.fmul(silu, up)
        if mask is None:
            v.store(product, y, at)
        else:
            v.store_some(mask, product, y, at)
        return []

    micro._over_group(v, count, [], step)


def _add(v: Vectors, x, y, count) -> None:
    """y [count] += x, float32."""

    def step(position, mask, _):
        at = v.mul(position, 4)
        if mask is None:
            v.store(v.b.fadd(v.load(v.f32, y, at), v.load(v.f32, x, at)), y, at)
        else:
            v.store_some(mask, v.b.fadd(v.load_some(mask, v.f32, y, at), v.load_some(mask, v.f32, x, at)), y, at)
        return []

    micro._over_group(v, count, [], step)


def _narrow(v: Vectors, x, y, count) -> None:
    """`count` float32 at x, a multiple of 16, as float16 at y."""

    def step(i, _):
        v.store(v.b.fptrunc(v.load(v.f32, x, v.mul(i, 4 * v.lanes)), v.f16), y, v.mul(i, 2 * v.lanes))
        return []

    v.loop(v.b.sdiv(count, v.k(v.lanes)), [], step)


def _widen(v: Vectors, x, y, count) -> None:
    """`count` float16 at x, a multiple of 16, as float32 at y."""

    def step(i, _):
        v.store(v.halves(x, v.mul(i, 2 * v.lanes)), y, v.mul(i, 4 * v.lanes))
        return []

    v.loop(v.b.sdiv(count, v.k(v.lanes)), [], step)


def _of_half(v: Vectors, x, y) -> None:
    """The float16 at x as float32 at y."""
    half = v.splat(v.load(I16, x))
    if v.way == "portable":
        b, raw = v.b, v.b.sext(half, v.i32)
        magnitude, sign = b.and_(raw, v.ints(0x7FFF)), b.and_(raw, v.ints(-(1 << 31)))
        normal = b.add(b.shl(magnitude, v.ints(13)), v.ints((127 - 15) << 23))
        small = b.bitcast(b.fmul(b.sitofp(magnitude, v.f32), v.floats(2.0**-24)), v.i32)
        wide = b.bitcast(b.or_(b.select(b.icmp_signed("<", magnitude, v.ints(0x0400)), small, normal), sign), v.f32)
    else:
        wide = v.b.fpext(v.b.bitcast(half, v.f16), v.f32)
    v.store(v.b.extract_element(wide, ir.Constant(ir.IntType(32), 0)), y)


_emit_norm, _emit_add, _emit_glu, _emit_softmax = (emitted(f) for f in (_rms_norm, _add, _swiglu, _softmax))
_emit_quantize = emitted(micro.quantize)
_emit_half, _emit_narrow = emitted(_of_half), emitted(_narrow)


@exact
def _round(x, t, rows, plan, zero):
    """Row t of a product's inputs, float32 at address x, as the product reads it; `plan`: the product's."""
    p = _i64(plan)
    padded = p[GROUP_UNITS] * UNIT
    _emit_quantize(x, p[XQ] + t * p[LDX], p[SX] + 4 * t, p[START] + 4 * t, rows, p[GROUPS], p[GROUP], padded, zero)


# -------------------------------------------------------------------------------------------------------------------- jobs
# Word 0 of a plan is the address of the record; what follows is named beside each job.


@cache
def embed_job(bits: int) -> int:
    """Address of the job that writes rows of an embedding as float32.

    Words: 1 codes, 2 scales (float16), 3 offsets (float16) or 0, 4 levels (float32 [2**bits]), 5 bytes of a row, 6 dim, 7 inputs of
    a group, 8 scales of a row, 9 whether all rows share them, 10 y. `bits` 32: rows of float32; 16: of bfloat16.
    """

    def embed(p, part, parts):
        record = p[0]
        rows, tokens, dim = peek(record + 8 * ROWS), _i64(peek(record + 8 * TOKENS)), p[6]
        number = np.empty(2, np.float32)
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            token = tokens[t]
            y = _f32(p[10] + 4 * t * dim)
            if bits == 32:
                x = _f32(p[1] + token * p[5])
                for i in range(dim):
                    y[i] = x[i]
                continue
            if bits == 16:
                raw, whole = _i16(p[1] + token * p[5]), _i64(number.ctypes.data)
                for i in range(dim):
                    whole[0] = np.int64(raw[i]) << 16
                    y[i] = number[0]
                continue
            codes, levels = _u8(p[1] + token * p[5]), _f32(p[4])
            at = 0 if p[9] else 2 * token * p[8]
            for g in range(p[8]):
                _emit_half(p[2] + at + 2 * g, number.ctypes.data)
                if p[3]:
                    _emit_half(p[3] + at + 2 * g, number.ctypes.data + 4)
                for i in range(g * p[7], min((g + 1) * p[7], dim)):
                    byte, shift = (i * bits) >> 3, (i * bits) & 7
                    word = np.int64(codes[byte])
                    if shift + bits > 8:
                        word |= np.int64(codes[byte + 1]) << 8
                    value = levels[(word >> shift) & ((1 << bits) - 1)] * number[0]
                    y[i] = value + number[1] if p[3] else value

    return job(embed, variant=bits).address


@cache
def norm_job() -> int:
    """Words: 1 x, 2 bytes between its rows, 3 gain, 4 address of eps, 5 n, 6 y, 7 bytes between its rows."""

    def norm(p, part, parts):
        rows = peek(p[0] + 8 * ROWS)
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_norm(p[1] + t * p[2], p[3], p[4], p[6] + t * p[7], p[5])

    return job(norm).address


@cache
def add_job() -> int:
    """y += x. Words: 1 x, 2 y, 3 n, 4 address of the number of rows."""

    def add(p, part, parts):
        rows, n = peek(p[4]), p[3]
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_add(p[1] + 4 * t * n, p[2] + 4 * t * n, n)

    return job(add).address


@cache
def bias_job() -> int:
    """Every row of x += bias. Words: 1 x, 2 n, 3 bias."""

    def bias(p, part, parts):
        rows, n = peek(p[0] + 8 * ROWS), p[2]
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_add(p[3], p[1] + 4 * t * n, n)

    return job(bias).address


@cache
def glu_job() -> int:
    """y = silu(gate) * up. Words: 1 gate, 2 up, 3 bytes between their rows, 4 n, 5 y, 6 address of the number of rows."""

    def glu(p, part, parts):
        rows = peek(p[6])
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_glu(p[1] + t * p[3], p[2] + t * p[3], p[5] + 4 * t * p[4], p[4])

    return job(glu).address


@cache
def glu_quantize_job(zero: int) -> int:
    """silu(gate) * up of each row, rounded at once for the product that reads it: what `glu_job` would write is never stored.

    Words: 1 gate, 2 up, 3 bytes between their rows, 4 n, 5 address of the number of rows, 6 a row of floats for each part, 7 bytes of it,
    8 the product's plan.
    """

    def glu_quantize(p, part, parts):
        rows, row = peek(p[5]), p[6] + part * p[7]
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_glu(p[1] + t * p[3], p[2] + t * p[3], row, p[4])
            _round(row, t, rows, p[8], zero)

    return job(glu_quantize, variant=zero).address


@cache
def norm_quantize_job(zero: int) -> int:
    """Rows normed and rounded at once for the product that reads them.

    Words: 1 x, 2 bytes between its rows, 3 gain, 4 address of eps, 5 n, 6 address of the number of rows, 7 a row of floats for each part,
    8 bytes of it, 9 the product's plan.
    """

    def norm_quantize(p, part, parts):
        rows, row = peek(p[6]), p[7] + part * p[8]
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            _emit_norm(p[1] + t * p[2], p[3], p[4], row, p[5])
            _round(row, t, rows, p[9], zero)

    return job(norm_quantize, variant=zero).address


@cache
def pick_job() -> int:
    """The rows whose logits are wanted, side by side. Words: 1 x, 2 n, 3 y."""

    def pick(p, part, parts):
        wanted, n = _i64(peek(p[0] + 8 * WANTED_AT)), p[2]
        for i in range(peek(p[0] + 8 * WANTED)):
            x, y = _f32(p[1] + 4 * wanted[i] * n), _f32(p[3] + 4 * i * n)
            for j in range(n):
                y[j] = x[j]

    return job(pick).address


_MOST = micro.MANY[simd.way()][0]
_dense = emitted(micro.a16_many, tuple(range(_MOST, 0, -1)))
DENSE = micro.COLUMNS[simd.way()] * simd.LANES[simd.way()]  # outputs side by side in a dense weight


@cache
def dense_job() -> int:
    """Float32 weights [batch, out, n], a product for each batch: y[t, b] = W_b x[t, b].

    A weight is laid out as [batch, out / DENSE, n, DENSE], filled up with zeros. Words: 1 x, 2 floats between its rows, 3 bytes between
    the batches of a row, 4 weights, 5 batches, 6 out, 7 n (a multiple of 4), 8 y, 9 floats between its rows, 10 bytes between batches,
    11 address of the number of rows.
    """

    def dense(p, part, parts):
        rows, out, n = peek(p[11]), p[6], p[7]
        panels = (out + DENSE - 1) // DENSE
        total = p[5] * panels
        for w in range(total * part // parts, total * (part + 1) // parts):
            b, panel = w // panels, w % panels
            t = 0
            while t < rows:
                m = _even(rows - t, _MOST)
                x, y = p[1] + 4 * t * p[2] + b * p[3], p[8] + 4 * (t * p[9] + panel * DENSE) + b * p[10]
                _dense(m, p[4] + w * n * DENSE * 4, DENSE * 4, x, p[2], 0, y, p[9], out - panel * DENSE, n // 4, 1, 1)
                t += m

    return job(dense).address


@cache
def gather_job() -> int:
    """Rows of x in an order, side by side. Words: 1 x, 2 n, 3 rows int64, 4 address of their number, 5 y."""

    def gather(p, part, parts):
        count, n, order = peek(p[4]), p[2], _i64(p[3])
        for i in range(count * part // parts, count * (part + 1) // parts):
            x, y = _f32(p[1] + 4 * order[i] * n), _f32(p[5] + 4 * i * n)
            for j in range(n):
                y[j] = x[j]

    return job(gather).address


@cache
def dense_experts_job() -> int:
    """Float32 weights of experts [experts, out, n], laid out as for `dense_job`, times each expert's rows.

    Words: 1 x (sorted by expert), 2 weights, 3 experts, 4 out, 5 n (a multiple of 4), 6 y, 7 offsets int64 [experts + 1].
    """

    def dense_experts(p, part, parts):
        out, n, offsets = p[4], p[5], _i64(p[7])
        panels = (out + DENSE - 1) // DENSE
        for w in range(panels * part // parts, panels * (part + 1) // parts):
            for e in range(p[3]):
                t, to = offsets[e], offsets[e + 1]
                while t < to:
                    m = _even(to - t, _MOST)
                    weights, y = p[2] + (e * panels + w) * n * DENSE * 4, p[6] + 4 * (t * out + w * DENSE)
                    _dense(m, weights, DENSE * 4, p[1] + 4 * t * n, n, 0, y, out, out - w * DENSE, n // 4, 1, 1)
                    t += m

    return job(dense_experts).address


@exact
def _rotate(x, from_, half, cos, sin, interleaved, spare):
    """The 2 * half numbers of x from `from_` on, rotated in place (Su et al., RoFormer, arXiv 2104.09864).

    Pairs are (i, i + half) before and after; `interleaved`: (2i, 2i + 1) before, as DeepSeek stores them.
    """
    if interleaved:
        for i in range(half):
            spare[i], spare[half + i] = x[from_ + 2 * i], x[from_ + 2 * i + 1]
    else:
        for i in range(2 * half):
            spare[i] = x[from_ + i]
    for i in range(half):
        x[from_ + i] = spare[i] * cos[i] - spare[half + i] * sin[i]
        x[from_ + half + i] = spare[half + i] * cos[i] + spare[i] * sin[i]


@exact
def _store_key(x, from_, dim, cache, position, half, spare):
    """dim numbers of x to the position's lane of the keys at address `cache`; a multiple of 16 numbers behind x[from_] exist."""
    block, lane = position // BLOCK, position % BLOCK
    if half:
        padded = (dim + 15) // 16 * 16
        _emit_narrow(x.ctypes.data + 4 * from_, spare.ctypes.data, padded)
        halves = _i16(spare.ctypes.data)
        to = _i16(cache + 2 * block * dim * BLOCK)
        for i in range(dim):
            to[i * BLOCK + lane] = halves[i]
    else:
        wide = _f32(cache + 4 * block * dim * BLOCK)
        for i in range(dim):
            wide[i * BLOCK + lane] = x[from_ + i]


@cache
def heads_job(half: bool) -> int:
    """Queries and keys normed (where there is a gain) and rotated, in place; keys and values to the cache.

    Words: 1 q, 2 k, 3 v, 4 / 5 / 6 floats between their rows, 7 heads, 8 key heads, 9 dim of a key, 10 dim of a value, 11 half of the
    rotated dims, 12 / 13 gains of queries and keys or 0, 14 address of eps, 15 / 16 cos and sin [positions, half], 17 keys, 18 values,
    19 / 20 bytes of a slot, 21 / 22 bytes of a head, 23 interleaved, 24 dim of a value filled up to 16.
    """

    def heads(p, part, parts):
        record = p[0]
        rows = peek(record + 8 * ROWS)
        positions, slots = _i64(peek(record + 8 * POSITIONS)), _i64(peek(record + 8 * SLOTS_AT))
        dim, value_dim, rotated = p[9], p[10], p[11]
        spare, wide = np.zeros(dim + value_dim + 32, np.float32), np.zeros(dim + value_dim + 32, np.float32)
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            position, slot = positions[t], slots[t]
            cos, sin = _f32(p[15] + 4 * position * rotated), _f32(p[16] + 4 * position * rotated)
            for h in range(p[7]):
                at = p[1] + 4 * (t * p[4] + h * dim)
                if p[12]:
                    _emit_norm(at, p[12], p[14], at, dim)
                _rotate(carray(_f32(at), (dim,)), 0, rotated, cos, sin, p[23], spare)
            for h in range(p[8]):
                at = p[2] + 4 * (t * p[5] + h * dim)
                if p[13]:
                    _emit_norm(at, p[13], p[14], at, dim)
                key = carray(_f32(at), (dim,))
                _rotate(key, 0, rotated, cos, sin, p[23], spare)
                for i in range(dim):
                    wide[i] = key[i]
                _store_key(wide, 0, dim, p[17] + slot * p[19] + h * p[21], position, half, spare)
                value = _f32(p[3] + 4 * (t * p[6] + h * value_dim))
                for i in range(value_dim):
                    wide[i] = value[i]
                for i in range(value_dim, p[24]):
                    wide[i] = 0
                to = p[18] + slot * p[20] + h * p[22] + position * p[24] * (2 if half else 4)
                if half:
                    _emit_narrow(wide.ctypes.data, to, p[24])
                else:
                    there = _f32(to)
                    for i in range(p[24]):
                        there[i] = wide[i]

    return job(heads, variant=half).address


@cache
def latent_job(half: bool) -> int:
    """Multi-head latent attention: the latent normed, the shared key rotated, both to the cache; the queries' rotated parts put in place.

    Words: 1 q, 2 floats between its rows, 3 heads, 4 dims of a head without rotation, 5 half of the rotated dims, 6 latent and shared
    key, 7 floats between its rows, 8 rank, 9 gain of the latent, 10 address of eps, 11 / 12 cos and sin, 13 keys, 14 bytes of a slot,
    15 interleaved, 16 latent queries [rows, heads, rank + rotated], of which the last are written here.
    """

    def latent(p, part, parts):
        record = p[0]
        rows = peek(record + 8 * ROWS)
        positions, slots = _i64(peek(record + 8 * POSITIONS)), _i64(peek(record + 8 * SLOTS_AT))
        rank, rotated, plain = p[8], p[5], p[4]
        dim, of_head = rank + 2 * rotated, plain + 2 * rotated
        spare, wide = np.zeros(dim + 32, np.float32), np.zeros(dim + 32, np.float32)
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            position, slot = positions[t], slots[t]
            cos, sin = _f32(p[11] + 4 * position * rotated), _f32(p[12] + 4 * position * rotated)
            x = p[6] + 4 * t * p[7]
            _emit_norm(x, p[9], p[10], wide.ctypes.data, rank)
            shared = _f32(x + 4 * rank)
            for i in range(2 * rotated):
                wide[rank + i] = shared[i]
            _rotate(wide, rank, rotated, cos, sin, p[15], spare)
            _store_key(wide, 0, dim, p[13] + slot * p[14], position, half, spare)
            for h in range(p[3]):
                q, to = _f32(p[1] + 4 * (t * p[2] + h * of_head + plain)), _f32(p[16] + 4 * ((t * p[3] + h) * dim + rank))
                for i in range(2 * rotated):
                    wide[i] = q[i]
                _rotate(wide, 0, rotated, cos, sin, p[15], spare)
                for i in range(2 * rotated):
                    to[i] = wide[i]

    return job(latent, variant=half).address


@cache
def attention_job(half: bool, across: bool) -> int:
    """softmax(q K^T * scale) V over the positions of each row's sequence up to its own.

    Words: 1 q, 2 floats between its rows, 3 dim of a key, 4 queries of a key head, 5 key heads, 6 keys, 7 bytes of a slot, 8 bytes of a
    head, 9 values, 10 bytes of a slot, 11 bytes of a head, 12 dim of a value (`across`) or of one filled up to 16, 13 y, 14 floats between
    its rows, 15 floats between its heads, 16 scratch, 17 bytes of it for each part, 18 floats of a row of scores, 19 address of the scale.
    """
    scores, values = emitted(_scores, _EACH, half=half), emitted(_values_across if across else _values, _EACH, half=half)
    size = 2 if half else 4

    def attention(p, part, parts):
        record = p[0]
        rows, run = peek(record + 8 * ROWS), peek(record + 8 * RUN)
        positions, slots = peek(record + 8 * POSITIONS), peek(record + 8 * SLOTS_AT)
        group, heads, dim, ld = p[4], p[5], p[3], p[18]
        items = run * group
        chunks = (items + QUERIES - 1) // QUERIES
        queries = p[16] + part * p[17]
        outputs, inverse, table = queries + 64, queries + 128, queries + 192
        for w in range(part, rows // run * heads * chunks, parts):
            chunk, head, first = w % chunks, w // chunks % heads, w // (chunks * heads) * run
            from_, to = items * chunk // chunks, items * (chunk + 1) // chunks
            m = to - from_
            longest = 0
            for i in range(m):
                t, h = first + (from_ + i) // group, head * group + (from_ + i) % group
                poke(queries + 8 * i, p[1] + 4 * (t * p[2] + h * dim))
                poke(outputs + 8 * i, p[13] + 4 * (t * p[14] + h * p[15]))
                longest = max(longest, peek(positions + 8 * t) + 1)
            slot = peek(slots + 8 * first)
            blocks = (longest + BLOCK - 1) // BLOCK
            keys = p[6] + slot * p[7] + head * p[8]
            scores(m, queries, keys, table, ld, blocks, dim)
            for i in range(m):
                count = peek(positions + 8 * (first + (from_ + i) // group)) + 1
                _emit_softmax(table + 4 * i * ld, count, blocks * BLOCK, p[19], inverse + 4 * i)
            if across:
                values(m, table, ld, keys, dim, outputs, inverse, longest, p[12])
            else:
                at = p[9] + slot * p[10] + head * p[11]
                values(m, table, ld, at, p[12] * size, outputs, inverse, longest, p[12] // 16)

    return job(attention, variant=(half, across)).address


@cache
def turn_job() -> int:
    """[heads, rows, n] to [rows, heads, n]. Words: 1 x, 2 heads, 3 n, 4 y, 5 whether back: [rows, heads, n] to [heads, rows, n]."""

    def turn(p, part, parts):
        rows, heads, n = peek(p[0] + 8 * ROWS), p[2], p[3]
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            for h in range(heads):
                a, b = (t * heads + h) * n, (h * rows + t) * n
                x, y = _f32(p[1] + 4 * (a if p[5] else b)), _f32(p[4] + 4 * (b if p[5] else a))
                for i in range(n):
                    y[i] = x[i]

    return job(turn).address


@cache
def offsets_job() -> int:
    """The rows of each head: 0, ROWS, 2 * ROWS ... as a product's offsets. Words: 1 offsets, 2 heads, 3 the product's plan."""

    def offsets(p, part, parts):
        rows, to, plan = peek(p[0] + 8 * ROWS), _i64(p[1]), _i64(p[3])
        for h in range(p[2] + 1):
            to[h] = h * rows
        plan[SLOTS] = p[2] * rows

    return job(offsets).address


@cache
def gate_job(deepseek: bool) -> int:
    """Experts and weights of each row from the router's logits, as transformers has them.

    Words: 1 logits, 2 experts, 3 k, 4 indices int64 [rows, k], 5 weights float32 [rows, k], 6 normalise, 7 bias (float32), 8 groups,
    9 groups kept, 10 address of the scale (float32).
    """

    def gate(p, part, parts):
        rows, k = peek(p[0] + 8 * ROWS), p[3]
        logits = carray(_f32(p[1]), (rows, p[2]))
        indices, weights = carray(_i64(p[4]), (rows, k)), carray(_f32(p[5]), (rows, k))
        if deepseek:
            bias, scale = carray(_f32(p[7]), (p[2],)), _f32(p[10])
            _deepseek_v3_kernel(logits, bias, k, p[8], p[9], p[6] != 0, np.float64(scale[0]), LANES, indices, weights)
        else:
            _softmax_kernel(logits, k, p[6] != 0, LANES, indices, weights)

    return job(gate, variant=deepseek).address


@cache
def dispatch_job() -> int:
    """The choices sorted by expert, for the experts of one part; three plans told how many there are.

    Words: 1 indices [rows, k], 2 address of k, 3 experts of the model, 4 numbers within the part, int64 [experts], or 0 where the part is
    the whole, 5 experts of the part, 6 order, 7 offsets, 8 rows, 9 / 10 plans of gate_up and down or 0, 11 address of the number of slots,
    12 local indices.
    """

    def dispatch(p, part, parts):
        k = peek(p[2])
        slots = peek(p[0] + 8 * ROWS) * k
        indices, experts = carray(_i64(p[1]), (slots,)), p[5]
        if p[4]:
            local, numbers = carray(_i64(p[12]), (slots,)), _i64(p[4])
            for i in range(slots):
                local[i] = numbers[indices[i]]
            indices = local
        order, offsets, rows = carray(_i64(p[6]), (slots,)), carray(_i64(p[7]), (experts + 1,)), _i64(p[8])
        _dispatch_kernel(indices, experts, order, offsets)
        kept = offsets[experts]
        for i in range(kept):
            rows[i] = order[i] // k
        if p[9]:
            poke(p[9] + 8 * SLOTS, kept)
        if p[10]:
            poke(p[10] + 8 * SLOTS, kept)
        poke(p[11], kept)

    return job(dispatch).address


@cache
def combine_job() -> int:
    """Each row's weighted sum of what its experts returned.

    Words: 1 outputs, 2 address of their number, 3 order, 4 weights, 5 address of k, 6 n, 7 y.
    """

    def combine(p, part, parts):
        rows, kept, k, n = peek(p[0] + 8 * ROWS), peek(p[2]), peek(p[5]), p[6]
        outputs, order = carray(_f32(p[1]), (kept, n)), carray(_i64(p[3]), (rows * k,))
        _combine_kernel(outputs, order, carray(_f32(p[4]), (rows, k)), carray(_f32(p[7]), (rows, n)))

    return job(combine).address


@cache
def sums_job() -> int:
    """Sums of x over groups, for a weight with offsets.

    Words: 1 x, 2 n, 3 group, 4 y [rows, n / group filled up to 4], 5 address of the number of rows.
    """

    def sums(p, part, parts):
        rows, n, group = peek(p[5]), p[2], p[3]
        padded = (n // group + 3) // 4 * 4
        for t in range(rows * part // parts, rows * (part + 1) // parts):
            x, y = _f32(p[1] + 4 * t * n), _f32(p[4] + 4 * t * padded)
            for g in range(padded):
                total = np.float32(0)
                if g * group < n:
                    for i in range(group):
                        total += x[g * group + i]
                y[g] = total

    return job(sums).address


# ---------------------------------------------------------------------------------------------------------------- the program

FUNCTION, PLAN_AT, THREADS = range(3)  # of an operation: address of the job, of its plan, from how many rows on threads share it (0: never)


@exact
def run(program, rows_of, rows, state, parts, workers, long):
    """Run a program int64 [operations, 3] for `rows` rows. `rows_of` int64 [n]: addresses that want the number of rows."""
    for i in range(rows_of.size):
        poke(rows_of[i], rows)
    for i in range(program.shape[0]):
        if workers > 0 and 0 < program[i, THREADS] <= rows:
            each(state, program[i, FUNCTION], program[i, PLAN_AT], parts, workers, long)
        else:
            call(program[i, FUNCTION], program[i, PLAN_AT], 0, 1)


# --------------------------------------------------------------------------------------------- one job on arrays, to test and to time


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: np.ndarray, y: np.ndarray) -> None:
    """Fill y float32 [rows, n] with x / sqrt(mean(x^2) + eps) * gain. `eps` float32 [1]."""
    record, plan = _record(len(x)), np.zeros(WORDS, np.int64)
    n = x.shape[1]
    plan[:8] = record.ctypes.data, x.ctypes.data, 4 * n, gain.ctypes.data, eps.ctypes.data, n, y.ctypes.data, 4 * n
    _do(norm_job(), plan)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, y: np.ndarray) -> None:
    """Fill y float32 [rows, dim] with each row of x rotated by the angles of cos and sin [rows, half] (`_rotate`)."""
    y[:] = x
    spare = np.empty(2 * cos.shape[1], np.float32)
    for t in range(len(x)):
        _rotate(y[t], 0, cos.shape[1], cos[t], sin[t], interleaved, spare)


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray | None, positions: np.ndarray, scale: np.ndarray, y: np.ndarray) -> None:
    """Fill y float32 [rows, heads, value_dim] with softmax(q K^T * scale) V over positions 0 .. positions[t] of each row t.

    q float32 [rows, heads, dim]; keys [length, key heads, dim] and values [length, key heads, value_dim] float32 or float16, `heads` a
    multiple of the key heads; `values` None: the first value_dim numbers of the keys, of which there is one head. `scale` float32 [1].
    """
    (rows, heads, dim), (length, key_heads, _), value_dim = q.shape, keys.shape, y.shape[2]
    half, size, padded = keys.dtype == np.float16, keys.itemsize, -(-length // BLOCK) * BLOCK
    blocks = np.zeros((key_heads, padded // BLOCK, dim, BLOCK), keys.dtype)
    for i in range(length):
        blocks[:, i // BLOCK, :, i % BLOCK] = keys[i]
    by_head = None if values is None else np.ascontiguousarray(values.swapaxes(0, 1))
    each_bytes = 64 * 3 + 4 * QUERIES * padded + 64
    scratch, slots, record = np.zeros(each_bytes, np.uint8), np.zeros(rows, np.int64), _record(rows)
    record[RUN], record[POSITIONS], record[SLOTS_AT] = rows, positions.ctypes.data, slots.ctypes.data
    plan = np.zeros(WORDS, np.int64)
    plan[:9] = (
        record.ctypes.data,
        q.ctypes.data,
        heads * dim,
        dim,
        heads // key_heads,
        key_heads,
        blocks.ctypes.data,
        0,
        padded * dim * size,
    )
    if by_head is not None:
        plan[9], plan[11] = by_head.ctypes.data, length * value_dim * size
    plan[12:17] = value_dim, y.ctypes.data, heads * value_dim, value_dim, scratch.ctypes.data
    plan[17:20] = each_bytes, padded, scale.ctypes.data
    _do(attention_job(half, values is None), plan)


def _record(rows: int) -> np.ndarray:
    record = np.zeros(RECORD, np.int64)
    record[ROWS] = rows
    return record


@exact
def _do_one(function, plan):
    call(function, plan, 0, 1)


def _do(function: int, plan: np.ndarray) -> None:
    _do_one(function, plan.ctypes.data)
