"""The innermost loops of the matmul kernels, as LLVM vector code: one tile (`pack.py`) times a few rows of activations.

Written with `simd.Vectors`, so that one text serves every way. A *column* is a vector of output rows: 16 of them on
AVX-512, where a tile is one column, 8 on AVX2 (a tile is two columns), 4 on Arm (four). A product keeps its sums in
registers for `tokens` rows of x times some columns, and walks along the inputs:

    A8   y[t, o] = sum_g s[o, g] * sx[t, g] * sum_k (code[o, k] - zero) * xq[t, k]       integers inside the group g
    A16  y[t, o] = sum_g s[o, g] * sum_k level[code[o, k]] * x[t, k]                     float32 throughout

"- zero" costs nothing: it is -zero * sum(xq), computed once per row of x and put in as the integer sum's start.

Few rows of x (decoding): codes are unpacked in registers on the way (`a8_few`, `a16_few`); the memory is the limit.
Many rows (prefill): some tiles' codes are unpacked to a *panel* in the first-level cache (`unpack`, `dequantize`) and
multiplied from there with all the rows, a block of rows at a time (`a8_many`, `a8_many_row`, `a16_many`).
"""

from collections.abc import Iterator

from llvmlite import ir

from edgelab.kernels.pack import QUADS, ROWS, UNIT, VECTOR
from edgelab.kernels.simd import F32, I8, I32, Vectors

# Columns of a panel, and the rows of x taken at once: as many sums as the registers hold (32 vectors on AVX-512 and Arm,
# 16 on AVX2), each column's load serving all rows and each row's broadcast all columns.
COLUMNS = {"avx512": 2, "avxvnni": 2, "avx2": 2, "sdot": 4, "portable": 4}
# Rows of x are dealt out evenly over blocks of at most MANY[0] or FEW[0]: 128 rows are 18 blocks of six and four of five.
MANY = {"avx512": (6, 5, 4, 3), "avxvnni": (3, 2), "avx2": (2, 1), "sdot": (3, 2), "portable": (2, 1)}
FEW = {"avx512": (8, 7, 6, 5, 4, 3, 2, 1), "avxvnni": (3, 2, 1), "avx2": (2, 1), "sdot": (3, 2, 1), "portable": (2, 1)}
AHEAD = 6144  # bytes of codes that a prefetch runs ahead of the products


def _quads(v: Vectors, bits: int, stored: int, codes: ir.Value, *offset) -> Iterator[ir.Value]:
    """The eight quads of a unit, one byte per code, from codes of `bits` bits stored in `stored` (`bits`, or 8 in a panel).

    Each vector is loaded when its first quad is asked for: LLVM keeps that order, and loads made early would push sums
    out of the registers.
    """
    b = v.b

    def load(c: int) -> ir.Value:
        return v.load(v.i32, codes, *offset, VECTOR * c)

    def take(vector: ir.Value, shift: int, mask: int) -> ir.Value:
        vector = b.lshr(vector, v.ints(shift)) if shift > 0 else b.shl(vector, v.ints(-shift)) if shift < 0 else vector
        return b.and_(vector, v.ints(mask * 0x01010101))

    vector, third = None, load(2) if stored == 3 else None
    for q in range(QUADS):
        match stored:
            case 8:
                yield v.operand(load(q), bits)
            case 4:
                vector = vector if q % 2 else load(q // 2)
                yield take(vector, 4 * (q % 2), 15)
            case _:
                vector = vector if q % 4 else load(q // 4)
                low = take(vector, 2 * (q % 4), 3)
                yield low if third is None else b.or_(low, take(third, q - 2, 4))


def _column(v: Vectors, c: int, tile_stride) -> list:
    """The offset of column c: tiles lie `tile_stride` bytes apart, the columns of a tile 4 bytes per lane."""
    per_tile = ROWS // v.lanes
    return [v.mul(tile_stride, c // per_tile), 4 * v.lanes * (c % per_tile)] if c >= per_tile else [4 * v.lanes * c]


def _rows(v: Vectors, x: ir.Value, stride: ir.Value, tokens: int) -> list[tuple]:
    """(pointer, offset) of each row of x: every third has a pointer, the others lie one or two strides behind (an address
    may be a register plus one or two times another, so six rows take three registers and not six)."""
    pointers = [v.at(x, v.mul(stride, t)) if t else x for t in range(0, tokens, 3)]
    return [(pointers[t // 3], *([v.mul(stride, t % 3)] if t % 3 else [])) for t in range(tokens)]


def _dots(v: Vectors, bits, stored, sums: list, codes, code_offsets: list, x, ldx, units, stream: bool) -> list:
    """Integer sums [tokens * columns] over one group of `units` units (None: one)."""
    columns = len(code_offsets)
    tokens = len(sums) // columns
    # A long group is one long chain of products, each waiting for the last: a few sums in turn, where registers are free.
    turns = 1 if units is None or len(sums) > 4 else 4 if len(sums) <= 2 else 2
    empty = [v.ints(0)] * len(sums)

    def unit(u, sums):
        walk = [v.mul(u, VECTOR * stored)] if u is not None else []
        streams = [_quads(v, bits, stored, codes, *offset, *walk) for offset in code_offsets]
        if stream:  # the codes come from memory, one after the other
            for line in range(stored):
                v.prefetch(codes, *code_offsets[0], *walk, AHEAD + VECTOR * line)
        pairs = v.way == "avx2" and bits < 8  # eight pairs of small products fit an int16: widen once per unit
        partial = list(sums) if not pairs else [None] * (tokens * columns)
        rows = _rows(v, v.at(x, v.mul(u, UNIT)) if u is not None else x, ldx, tokens)
        for q, quads in enumerate(zip(*streams, strict=True)):
            for t in range(tokens):
                four = v.splat(v.load(I32, *rows[t], 4 * q))
                for c in range(columns):
                    i = t * columns + c
                    if pairs:
                        product = v.pairs(v.bytes(quads[c]), v.bytes(four), bits)
                        partial[i] = product if partial[i] is None else v.b.add(partial[i], product)
                    else:
                        i += tokens * columns * (q % turns)
                        partial[i] = v.dot(partial[i], quads[c], four, bits)
        if pairs:
            return [v.b.add(s, v.widen(p)) for s, p in zip(sums, partial, strict=False)] + sums[tokens * columns :]
        return partial

    if units is None:
        return unit(None, sums)
    found = v.loop(units, [*sums, *empty * (turns - 1)], unit)
    return [_tree(found[i :: len(sums)], v.b.add) for i in range(len(sums))]


def _groups(v: Vectors, bits, stored, sums, codes, code_offsets, scales, scale_offsets, x, ldx, sx, start, lds, groups, units, stream):
    """Float sums [tokens * columns] plus `groups` groups of A8 products. `sums` begin at 0 or where the last panel ended."""
    columns = len(code_offsets)
    tokens = len(sums) // columns

    def run(one: bool):
        size = 1 if one else units

        def group(g, sums):
            walk = v.mul(v.mul(g, size), VECTOR * stored)
            at = v.mul(v.mul(g, lds), 4)
            starts = [v.splat(v.load(I32, start, at, 4 * t)) for t in range(tokens) for _ in range(columns)]
            xg = v.at(x, v.mul(v.mul(g, size), UNIT))
            dots = _dots(v, bits, stored, starts, codes, [[*o, walk] for o in code_offsets], xg, ldx, None if one else units, stream)
            s = [v.halves(scales, *offset, v.mul(g, 2 * ROWS)) for offset in scale_offsets]
            new = []
            for t in range(tokens):
                st = v.splat(v.load(F32, sx, at, 4 * t))
                for c in range(columns):
                    i = t * columns + c
                    new.append(v.fma(v.b.sitofp(dots[i], v.f32), v.b.fmul(s[c], st), sums[i]))
            return new

        return v.loop(groups, sums, group)

    return v.either(v.b.icmp_signed("==", units, v.k(1)), lambda: run(True), lambda: run(False))


def _outputs(v: Vectors, tokens: int, columns: int, y, ldy, valid) -> list[tuple]:
    """(mask, pointer, offsets) of each of the [tokens * columns] vectors of y; `valid` output rows exist."""
    masks = [v.below(valid, c * v.lanes) for c in range(columns)]
    return [(masks[c], y, v.mul(ldy, 4 * t), 4 * v.lanes * c) for t in range(tokens) for c in range(columns)]


def a8_few(v: Vectors, bits: int, tokens: int, codes, scales, x, ldx, sx, start, lds, y, ldy, valid, groups, units) -> None:
    """One tile times `tokens` rows, all inputs.

    `codes`, `scales` of the tile; x int8 rows `ldx` bytes apart; sx float32 and start int32 [groups, lds], one number a row of x;
    y float32 rows `ldy` floats apart, of which `valid` outputs are stored.
    """
    columns = ROWS // v.lanes
    offsets = [_column(v, c, v.k(0)) for c in range(columns)]
    scale_offsets = [[2 * v.lanes * c] for c in range(columns)]
    zeros = [v.floats(0)] * (tokens * columns)
    sums = _groups(v, bits, bits, zeros, codes, offsets, scales, scale_offsets, x, ldx, sx, start, lds, groups, units, True)
    _store_all(v, sums, _outputs(v, tokens, columns, y, ldy, valid))


def _resume(v: Vectors, first: ir.Value, start: list, kept: ir.Value) -> list:
    """The sums of a block of rows: `start` if this is the `first` panel, else what `_pause` kept."""
    size = 4 * v.lanes
    again = lambda: [v.load(value.type, kept, size * i) for i, value in enumerate(start)]  # noqa: E731
    return v.either(v.b.icmp_signed("!=", first, v.k(0)), lambda: start, again)


def _pause(v: Vectors, last: ir.Value, sums: list, kept: ir.Value, finish) -> None:
    """Keep the sums for the next panel side by side in `kept`, or `finish` them after the `last`.

    Not in y: its rows are often a power of two apart, so that a block's rows share a few sets of the cache and push
    each other out.
    """

    def keep():
        for i, value in enumerate(sums):
            v.store(value, kept, 4 * v.lanes * i)
        return []

    v.either(v.b.icmp_signed("!=", last, v.k(0)), finish, keep)


def a8_many(
    v: Vectors,
    bits,
    tokens,
    codes,
    tile_stride,
    scales,
    scale_stride,
    x,
    ldx,
    sx,
    start,
    lds,
    kept,
    y,
    ldy,
    valid,
    groups,
    units,
    first,
    last,
) -> None:
    """COLUMNS columns times `tokens` rows over `groups` whole groups of 8-bit stored codes.

    The columns' tiles lie `tile_stride` and their scales `scale_stride` bytes apart; x, sx, start, y as in `a8_few`. Sums
    begin at 0 with the `first` panel, wait in `kept` for the next, and go to y with the `last`.
    """
    columns = COLUMNS[v.way]
    outputs = _outputs(v, tokens, columns, y, ldy, valid)
    offsets = [_column(v, c, tile_stride) for c in range(columns)]
    per_tile = ROWS // v.lanes
    scale_offsets = [[v.mul(scale_stride, c // per_tile), 2 * v.lanes * (c % per_tile)] for c in range(columns)]
    sums = _resume(v, first, [v.floats(0)] * len(outputs), kept)
    sums = _groups(v, bits, 8, sums, codes, offsets, scales, scale_offsets, x, ldx, sx, start, lds, groups, units, False)
    _pause(v, last, sums, kept, lambda: _store_all(v, sums, outputs))


def _store_all(v: Vectors, values: list, outputs: list[tuple]) -> list:
    for value, (mask, *at) in zip(values, outputs, strict=True):
        v.store_some(mask, value, *at)
    return []


def a8_many_row(
    v: Vectors, bits, tokens, codes, tile_stride, scales, scale_stride, x, ldx, sx, start, kept, y, ldy, valid, units, first, last
) -> None:
    """As `a8_many` for one group a row, of which `units` units come now: the sums that wait are integers."""
    columns = COLUMNS[v.way]
    offsets = [_column(v, c, tile_stride) for c in range(columns)]
    per_tile = ROWS // v.lanes
    starts = [v.splat(v.load(I32, start, 4 * t)) for t in range(tokens) for _ in range(columns)]
    sums = _dots(v, bits, 8, _resume(v, first, starts, kept), codes, offsets, x, ldx, units, False)

    def finish():
        s = [v.halves(scales, v.mul(scale_stride, c // per_tile), 2 * v.lanes * (c % per_tile)) for c in range(columns)]
        st = [v.splat(v.load(F32, sx, 4 * t)) for t in range(tokens)]
        values = [v.fma(v.b.sitofp(total, v.f32), v.b.fmul(s[i % columns], st[i // columns]), v.floats(0)) for i, total in enumerate(sums)]
        return _store_all(v, values, _outputs(v, tokens, columns, y, ldy, valid))

    _pause(v, last, sums, kept, finish)


def unpack(v: Vectors, bits: int, codes, panel, units) -> None:
    """A tile's `units` units of `bits` bits as the same units at 8 bits, into `panel`."""

    def unit(u, _):
        for c in range(ROWS // v.lanes):
            at = 4 * v.lanes * c
            for q, quad in enumerate(_quads(v, bits, bits, codes, v.mul(u, VECTOR * bits), at)):
                v.store(quad, panel, v.mul(u, VECTOR * QUADS), at + VECTOR * q)
        return []

    v.loop(units, [], unit)


def _values(v: Vectors, bits: int, table: list, codes, *offset) -> Iterator[ir.Value]:
    """The 32 levels of a unit for one column, float32, before the scale."""
    b = v.b
    vectors = [v.load(v.i32, codes, *offset, VECTOR * c) for c in range(bits)]
    for k in range(UNIT):
        q, byte = k // 4, 8 * (k % 4)
        if bits == 8:  # flip the top bit: code - 128 in two's complement, brought down with its sign
            signed = b.xor(vectors[q], v.ints(-0x7F7F7F80))
            top = b.shl(signed, v.ints(24 - byte)) if byte < 24 else signed
            yield b.sitofp(b.ashr(top, v.ints(24)), v.f32)
            continue
        # The table has 16 entries and repeats every 2**bits, so the neighbour's bits above a code change nothing.
        shift = byte + 4 * (q % 2) if bits == 4 else byte + 2 * (q % 4)
        index = vectors[q // 2 if bits == 4 else q // 4]
        index = b.lshr(index, v.ints(shift)) if shift else index
        if bits == 3:
            up = byte + q - 2
            third = b.lshr(vectors[2], v.ints(up)) if up > 0 else b.shl(vectors[2], v.ints(-up)) if up < 0 else vectors[2]
            index = b.or_(b.and_(index, v.ints(3)), b.and_(third, v.ints(4)))
        yield v.lookup(table, index)


def a16_few(v: Vectors, bits: int, tokens: int, codes, scales, levels, x, ldx, y, ldy, valid, groups, units) -> None:
    """One tile times `tokens` rows of float32 x, `ldx` floats apart, all inputs."""
    columns = ROWS // v.lanes
    table = v.levels(levels) if bits < 8 else []
    rows = [[v.mul(ldx, 4 * t)] if t else [] for t in range(tokens)]
    # Chains of additions, enough of them to hide the fma's latency; the same for every way, and so are the sums' bits.
    turns = 4 if tokens == 1 else 2

    def group(g, sums):
        def unit(u, parts):
            at = v.add(v.mul(g, units), u)
            for line in range(bits):
                v.prefetch(codes, v.mul(at, VECTOR * bits), AHEAD + VECTOR * line)
            parts = list(parts)
            for c in range(columns):
                for k, value in enumerate(_values(v, bits, table, codes, v.mul(at, VECTOR * bits), 4 * v.lanes * c)):
                    for t in range(tokens):
                        xk = v.splat(v.load(F32, x, *rows[t], v.mul(at, 4 * UNIT), 4 * k))
                        i = (t * columns + c) * turns + k % turns
                        parts[i] = v.fma(value, xk, parts[i])
            return parts

        parts = v.loop(units, [v.floats(0)] * (turns * len(sums)), unit)
        s = [v.halves(scales, v.mul(g, 2 * ROWS), 2 * v.lanes * c) for c in range(columns)]
        whole = [_tree(parts[turns * i : turns * (i + 1)], v.b.fadd) for i in range(len(sums))]
        return [v.fma(part, s[i % columns], total) for i, (part, total) in enumerate(zip(whole, sums, strict=True))]

    sums = v.loop(groups, [v.floats(0)] * (tokens * columns), group)
    _store_all(v, sums, _outputs(v, tokens, columns, y, ldy, valid))


def dequantize(v: Vectors, bits: int, codes, scales, levels, panel, panel_stride, groups, units) -> None:
    """A tile's `groups` groups as float32: input after input, 16 rows side by side, inputs `panel_stride` bytes apart."""
    table = v.levels(levels) if bits < 8 else []

    def group(g, _):
        def unit(u, _):
            at = v.add(v.mul(g, units), u)
            for c in range(ROWS // v.lanes):
                s = v.halves(scales, v.mul(g, 2 * ROWS), 2 * v.lanes * c)
                for k, value in enumerate(_values(v, bits, table, codes, v.mul(at, VECTOR * bits), 4 * v.lanes * c)):
                    where = v.mul(v.add(v.mul(at, UNIT), k), panel_stride)
                    v.store(v.b.fmul(value, s), panel, where, 4 * v.lanes * c)
            return []

        return v.loop(units, [], unit)

    v.loop(groups, [], group)


def a16_many(v: Vectors, tokens: int, panel, panel_stride, x, ldx, kept, y, ldy, valid, quads, first, last) -> None:
    """COLUMNS columns of a float32 panel times `tokens` rows of x, over 4 * `quads` inputs; sums wait as in `a8_many`."""
    columns = COLUMNS[v.way]
    x_rows = _rows(v, x, v.mul(ldx, 4), tokens)

    def four(i, sums):
        sums = list(sums)
        for j in range(4):
            w = [v.load(v.f32, panel, v.mul(v.add(v.mul(i, 4), j), panel_stride), 4 * v.lanes * c) for c in range(columns)]
            for t in range(tokens):
                xk = v.splat(v.load(F32, *x_rows[t], v.mul(i, 16), 4 * j))
                for c in range(columns):
                    sums[t * columns + c] = v.fma(w[c], xk, sums[t * columns + c])
        return sums

    sums = v.loop(quads, _resume(v, first, [v.floats(0)] * (tokens * columns), kept), four)
    _pause(v, last, sums, kept, lambda: _store_all(v, sums, _outputs(v, tokens, columns, y, ldy, valid)))


def _over_group(v: Vectors, group: ir.Value, carried: list, step) -> list:
    """carried = step(position, mask, carried) over the vectors of a group; the mask is None for all but a partial last one."""
    lanes = v.k(v.lanes)
    whole, rest = v.b.sdiv(group, lanes), v.b.srem(group, lanes)
    some, more = (v.b.icmp_signed(">", count, v.k(0)) for count in (whole, rest))
    carried = v.either(some, lambda: v.loop(whole, carried, lambda i, now: step(v.mul(i, v.lanes), None, now)), lambda: carried)
    return v.either(more, lambda: step(v.mul(whole, v.lanes), v.below(rest), carried), lambda: carried)


def quantize(v: Vectors, x, xq, sx, start, lds, groups, group, padded, zero) -> None:
    """One row of x float32 as int8: per group of `group` inputs a scale absmax / 127, codes rounded to even, and the sums' start.

    xq int8 [groups, padded], zeros behind each group's end; sx float32 and start int32 [groups, lds]; start = -zero * sum(xq).
    A group whose absmax is at most 2**-100 becomes zeros. NaN and infinity make the scale so, and with it the result.
    """
    b = v.b
    narrow = ir.VectorType(I8, v.lanes)
    magic = 12582912.0  # 1.5 * 2**23: in this binade a float32 counts in ones, so adding it rounds to an integer

    def one_group(g, _):
        from_, to = v.at(x, v.mul(v.mul(g, group), 4)), v.at(xq, v.mul(g, padded))

        def load(position, mask):
            where = v.mul(position, 4)
            return v.load(v.f32, from_, where) if mask is None else v.load_some(mask, v.f32, from_, where)

        def largest(position, mask, carried):
            # as integers: float32 without its sign bit sorts as an integer does, NaN above all
            bits = b.and_(b.bitcast(load(position, mask), v.i32), v.ints(0x7FFFFFFF))
            return [b.select(b.icmp_signed(">", bits, carried[0]), bits, carried[0])]

        (top,) = _over_group(v, group, [v.ints(0)], largest)
        # zeros first, so that the last, partial vector may be stored whole: its end is zeros too
        v.either(b.icmp_signed("<", group, padded), lambda: _zeros(v, to, padded), list)
        scale, inverse = steps(top)

        def codes(position, mask, carried):
            return [b.add(carried[0], rounded(load(position, mask), inverse, to, position))]

        (total,) = _over_group(v, group, [v.ints(0)], codes)
        finish(g, scale, total)
        return []

    def group_of_32(g, _):  # the usual one: every number is loaded once
        count = UNIT // v.lanes
        from_, to = v.at(x, v.mul(g, 4 * UNIT)), v.at(xq, v.mul(g, UNIT))
        values = [v.load(v.f32, from_, 4 * v.lanes * i) for i in range(count)]
        tops = [b.and_(b.bitcast(value, v.i32), v.ints(0x7FFFFFFF)) for value in values]
        scale, inverse = steps(_tree(tops, lambda a, c: b.select(b.icmp_signed(">", a, c), a, c)))
        total = _tree([rounded(value, inverse, to, v.lanes * i) for i, value in enumerate(values)], b.add)
        finish(g, scale, total)
        return []

    def steps(top):
        top = b.bitcast(v.call(f"llvm.vector.reduce.smax.v{v.lanes}i32", I32, top), F32)
        inverse = b.fdiv(ir.Constant(F32, 127.0), top)
        inverse = b.select(b.fcmp_ordered(">", top, ir.Constant(F32, 2.0**-100)), inverse, ir.Constant(F32, 0.0))
        return b.fdiv(top, ir.Constant(F32, 127.0)), v.splat(inverse)

    def rounded(value, inverse, to, position):
        q = b.sub(b.bitcast(b.fadd(b.fmul(value, inverse), v.floats(magic)), v.i32), v.ints(0x4B400000))
        v.store(b.trunc(q, narrow), to, position)
        return q

    def finish(g, scale, total):
        total = v.call(f"llvm.vector.reduce.add.v{v.lanes}i32", I32, total)
        at = v.mul(v.mul(g, lds), 4)
        v.store(scale, sx, at)
        v.store(b.mul(total, b.neg(b.trunc(zero, I32))), start, at)

    plain = b.icmp_signed("==", group, v.k(UNIT))
    v.either(plain, lambda: v.loop(groups, [], group_of_32), lambda: v.loop(groups, [], one_group))


def _tree(values: list, join) -> ir.Value:
    """All of `values` joined, neighbours first."""
    while len(values) > 1:
        values = [join(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


def spread(v: Vectors, x, xq, groups, group, padded) -> None:
    """One row of x float32 as [groups, padded]: zeros fill each group up."""

    def one_group(g, _):
        from_, to = v.at(x, v.mul(v.mul(g, group), 4)), v.at(xq, v.mul(v.mul(g, padded), 4))

        def copy(position, mask, _):
            where = v.mul(position, 4)
            v.store(v.load(v.f32, from_, where) if mask is None else v.load_some(mask, v.f32, from_, where), to, where)
            return []

        v.either(v.b.icmp_signed("<", group, padded), lambda: _zeros(v, to, v.mul(padded, 4)), list)
        return _over_group(v, group, [], copy)

    v.loop(groups, [], one_group)


def ahead(v: Vectors, codes, count) -> None:
    """Ask for `count` cache lines from `codes` on."""

    def line(i, _):
        v.prefetch(codes, v.mul(i, VECTOR))
        return []

    v.loop(count, [], line)


def _zeros(v: Vectors, pointer, count) -> list:
    """`count` zero bytes, a multiple of 32."""

    def step(i, _):
        v.store(ir.Constant(ir.VectorType(I8, UNIT), None), pointer, v.mul(i, UNIT))
        return []

    return v.loop(v.b.sdiv(count, v.k(UNIT)), [], step)


def swiglu(v: Vectors, x, y, count) -> None:
    """y [count] = silu(x[:count]) * x[count : 2 * count], float32; silu(a) = a / (1 + exp(-a))."""
    rest = v.b.srem(count, v.k(v.lanes))
    whole = v.b.sdiv(count, v.k(v.lanes))

    def step(position, mask):
        at = v.mul(position, 4)
        up_at = v.mul(v.add(position, count), 4)
        load = v.load if mask is None else lambda *a: v.load_some(mask, *a)
        gate, up = load(v.f32, x, at), load(v.f32, x, up_at)
        silu = v.b.fdiv(gate, v.b.fadd(v.floats(1.0), _exp(v, v.b.fneg(gate))))
        none = v.b.fmul(gate, v.floats(0.0))  # NaN where the gate is not finite
        silu = v.b.select(v.b.fcmp_ordered("<", gate, v.floats(-87.0)), none, silu)
        product = v.b.fmul(silu, up)
        if mask is None:
            v.store(product, y, at)
        else:
            v.store_some(mask, product, y, at)
        return []

    v.either(v.b.icmp_signed(">", whole, v.k(0)), lambda: v.loop(whole, [], lambda i, _: step(v.mul(i, v.lanes), None)), list)
    v.either(v.b.icmp_signed(">", rest, v.k(0)), lambda: step(v.mul(whole, v.lanes), v.below(rest)), list)


def _exp(v: Vectors, x: ir.Value) -> ir.Value:
    """exp(x), float32, within 2 units in the last place; x is held to -87 .. 87, where 2**n stays a normal number.

    x = n ln 2 + r with a whole n and |r| <= ln 2 / 2: 2**n is an exponent, exp(r) its Taylor series to r**7, whose rest
    is below 2**-27. ln 2 comes in two parts, the first short enough that n times it is exact.
    """
    b = v.b
    for sign, limit in ((">", 87.0), ("<", -87.0)):  # an ordered comparison is false for NaN, which so passes through
        x = b.select(b.fcmp_ordered(sign, x, v.floats(limit)), v.floats(limit), x)
    shifted = b.fadd(b.fmul(x, v.floats(1.4426950408889634)), v.floats(12582912.0))  # rounds, see `quantize`
    n = b.fsub(shifted, v.floats(12582912.0))
    r = v.fma(n, v.floats(-0.693359375), x)
    r = v.fma(n, v.floats(2.12194440e-4), r)
    series = v.floats(1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = v.fma(series, r, v.floats(coefficient))
    power = b.shl(b.add(b.bitcast(shifted, v.i32), v.ints(127 - 0x4B400000)), v.ints(23))
    return b.fmul(series, b.bitcast(power, v.f32))
