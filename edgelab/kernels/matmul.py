"""Low-bit weights times activations: y[t, o] = sum_k W[o, k] * x[t, k], with W as `Tiles`.

Two kinds of arithmetic, chosen by `activations`:

- "float32" (weight-only; the field's W4A16): W[o, k] = scale * level[code], float32 sums. For every bit width and table.
- "int8" (W4A8, W8A8): each row of x is quantized on the way in, per group of the weight (per row where the weight has one
  scale a row), to int8 by absmax / 127; products and sums inside a group are integers, exact; float32 across groups.

Decoding multiplies one row of x by the whole weight, so it takes as long as reading the weight takes. Prefill has many
rows; then some tiles' codes are unpacked into a panel that the first-level cache holds, and all rows use it there.
`micro.py` has the loops over inputs, this file those over tiles, panels, rows, experts and threads.

Parallel over tiles of output rows and never over a sum, so the result does not depend on the number of threads.
"""

import threading
from functools import cache, lru_cache

import numpy as np

from edgelab.kernels import micro, simd
from edgelab.kernels._jit import ONE_AT_A_TIME, exact, job, threads
from edgelab.kernels.pack import QUADS, ROWS, UNIT, VECTOR, Tiles, aligned
from edgelab.kernels.pool import LONG_NS, MOST_WORKERS, each, parts_of, ready
from edgelab.kernels.simd import call, emitted, peek

ACTIVATIONS = ("float32", "int8")
LONGEST_GROUP = 131072  # inputs that may share one scale with int8 activations: 128 * 127 of each still sum to an int32

_WAY = simd.way()
_FEW, _MANY = micro.FEW[_WAY], micro.MANY[_WAY]
# Up to so many rows of x codes are unpacked in registers, for each block of rows again; beyond, once into a panel.
# Measured at 4 bits, groups of 32, 1024 x 4096 on an AMD EPYC 9005: unpacking each time was faster by 4 % at 32 rows on AVX-512
# and AVX-VNNI (12 and 16 % at 12 rows), slower by 5 % at 12 rows on AVX2.
_FEW_ROWS = {"avx512": 32, "avxvnni": 32, "avx2": 8}.get(_WAY, _FEW[0])
_FEW_ROWS_FLOAT = _FEW[0]
_PANEL_TILES = max(1, micro.COLUMNS[_WAY] * simd.LANES[_WAY] // ROWS)
# A panel takes 16 KiB on AVX-512, a third to a half of a first-level cache: 512 inputs as int8, 128 as float32. With
# 32 KiB 128 rows were 4 % slower at 4 bits and 2 % at 8 (AMD EPYC 9005, 4096 x 4096).
_PANEL_UNITS = {"int8": 16, "float32": 4}
_PANEL_BYTES = {"int8": QUADS * VECTOR, "float32": 4 * QUADS * VECTOR}  # of one unit of one tile
_KEPT = _PANEL_TILES * ROWS * 4  # bytes of sums that wait between two panels, per row of x
_MOST_ROWS, _LEAST_ROWS = 192, 48  # of x taken with a panel before it is unpacked again
_SECOND_LEVEL = 3 << 18  # bytes of x that should stay in the second-level cache meanwhile
_PAD = 64  # bytes between rows of activations, lest rows of 4,096 all fall into the same sets of the cache
QUANTIZE_SHARED = 16  # rows of x from which on threads share the work of quantizing them

# The numbers that a kernel is handed, by position: addresses, sizes, strides (see `_run`).
PLAN = 22
(
    CODES,
    SCALES,
    LEVELS,
    EXPERTS,
    TILES,
    UNITS,  # of a row
    GROUPS,
    GROUP,  # inputs
    GROUP_UNITS,
    OUT,
    N,
    OFFSETS,
    SLOTS,  # rows of y
    X,
    ROWS_OF_X,  # address of the row of x that each row of y takes, or 0 where they are the same
    XQ,  # the activations as the products read them
    LDX,  # bytes between their rows
    SX,
    START,
    PANEL,
    PANEL_STRIDE,  # bytes: each part has its own panel
    Y,
) = range(PLAN)

_quantize, _spread, _ahead = emitted(micro.quantize), emitted(micro.spread), emitted(micro.ahead)


@exact
def _even(left, most):
    """How many of `left` rows to take next when each block takes at most `most`: all blocks alike, give or take one."""
    return (left + (left + most - 1) // most - 1) // ((left + most - 1) // most)


@exact
def _next_expert(p, e):
    """The next expert after `e` that has rows, or -1."""
    for following in range(e + 1, p[EXPERTS]):
        if peek(p[OFFSETS] + 8 * following + 8) > peek(p[OFFSETS] + 8 * following):
            return following
    return -1


@cache
def _quantize_job(zero: int) -> int:
    """Address of the job that writes XQ, SX and START for integers; `zero` is the code of 0 (`simd.zero_point`)."""

    def quantize(p, part, parts):
        slots, ldx, padded = p[SLOTS], p[LDX], p[GROUP_UNITS] * UNIT
        for i in range(slots * part // parts, slots * (part + 1) // parts):
            row = peek(p[ROWS_OF_X] + 8 * i) if p[ROWS_OF_X] else i
            x = p[X] + row * p[N] * 4
            _quantize(x, p[XQ] + i * ldx, p[SX] + 4 * i, p[START] + 4 * i, slots, p[GROUPS], p[GROUP], padded, zero)

    return job(quantize, variant=zero).address


@cache
def _spread_job() -> int:
    """Address of the job that writes XQ as float32, groups filled up."""

    def spread(p, part, parts):
        slots, padded = p[SLOTS], p[GROUP_UNITS] * UNIT
        for i in range(slots * part // parts, slots * (part + 1) // parts):
            row = peek(p[ROWS_OF_X] + 8 * i) if p[ROWS_OF_X] else i
            _spread(p[X] + row * p[N] * 4, p[XQ] + i * p[LDX], p[GROUPS], p[GROUP], padded)

    return job(spread).address


@cache
def _integer_job(bits: int) -> int:
    """Address of the job that computes its part of y with integer products, for codes of `bits` bits."""
    few = emitted(micro.a8_few, _FEW, bits=bits)
    many = emitted(micro.a8_many, _MANY, bits=bits)
    many_row = emitted(micro.a8_many_row, _MANY, bits=bits)
    unpack = emitted(micro.unpack, bits=bits)
    panel_units, most, few_most = _PANEL_UNITS["int8"], _MANY[0], _FEW[0]
    few_rows = few_most if bits == 8 else _FEW_ROWS  # codes of 8 bits need no unpacking

    def integer(p, part, parts):
        tiles, all_units, groups, units, out, slots = p[TILES], p[UNITS], p[GROUPS], p[GROUP_UNITS], p[OUT], p[SLOTS]
        ldx, kept = p[LDX], p[PANEL] + part * p[PANEL_STRIDE]
        panel = kept + _MOST_ROWS * _KEPT
        rows_at_once = max(_LEAST_ROWS, min(_MOST_ROWS, _SECOND_LEVEL // ldx))
        tile_bytes, scale_bytes = all_units * bits * VECTOR, groups * ROWS * 2
        steps = (tiles + _PANEL_TILES - 1) // _PANEL_TILES
        block = panel_units if groups == 1 else max(1, panel_units // units) * units
        # One row or a few for several experts: a part takes whole experts one after the other, for memory is read fastest in long
        # runs. With more rows each part takes its share of every expert, for experts then differ in their work.
        in_runs = p[EXPERTS] > 1 and slots <= few_most
        seen = from_tile = to_tile = 0
        if in_runs:
            active = 0
            for e in range(p[EXPERTS]):
                active += peek(p[OFFSETS] + 8 * e + 8) > peek(p[OFFSETS] + 8 * e)
            from_tile, to_tile = active * tiles * part // parts, active * tiles * (part + 1) // parts
        for e in range(p[EXPERTS]):
            lo, hi = peek(p[OFFSETS] + 8 * e), peek(p[OFFSETS] + 8 * e + 8)
            if hi <= lo:
                continue
            codes, scales = p[CODES] + e * tiles * tile_bytes, p[SCALES] + e * tiles * scale_bytes
            if hi - lo <= few_rows:
                first, last = tiles * part // parts, tiles * (part + 1) // parts
                if in_runs:
                    first, last = max(from_tile - seen, 0), min(to_tile - seen, tiles)
                    seen += tiles
                for tile in range(first, last):
                    if tile + 1 == last:  # the stream of codes ends here; the next one begins at another expert
                        following = _next_expert(p, e)
                        if following >= 0:
                            at = following * tiles + (0 if in_runs else first)
                            _ahead(p[CODES] + at * tile_bytes, micro.AHEAD // VECTOR)
                            _ahead(p[SCALES] + at * scale_bytes, micro.AHEAD // VECTOR // 8)
                    c, s, y, valid = codes + tile * tile_bytes, scales + tile * scale_bytes, p[Y] + tile * ROWS * 4, out - tile * ROWS
                    t = lo
                    while t < hi:
                        m = _even(hi - t, few_most)
                        x, sx, start = p[XQ] + t * ldx, p[SX] + 4 * t, p[START] + 4 * t
                        few(m, c, s, x, ldx, sx, start, slots, y + t * out * 4, out, valid, groups, units)
                        t += m
                continue
            chunks = (hi - lo + rows_at_once - 1) // rows_at_once
            for chunk in range(chunks * steps):  # rows of x that the second-level cache holds, with every tile
                step = chunk % steps
                if step < steps * part // parts or step >= steps * (part + 1) // parts:
                    continue
                from_, to = lo + (hi - lo) * (chunk // steps) // chunks, lo + (hi - lo) * (chunk // steps + 1) // chunks
                rounds = (to - from_ + most - 1) // most
                tile = step * _PANEL_TILES
                here = min(_PANEL_TILES, tiles - tile)  # of a lone last tile the columns come twice, and are stored once
                valid = out - tile * ROWS
                for u in range(0, all_units, block):
                    count = min(block, all_units - u)
                    last = u + count == all_units
                    c, stride = codes + tile * tile_bytes + u * bits * VECTOR, tile_bytes
                    lines = count * bits // rounds + 1  # of the next panel, to be asked for before each block of rows
                    following = c + (_PANEL_TILES * tile_bytes - u * bits * VECTOR if last else count * bits * VECTOR)
                    if bits < 8:
                        stride = count * QUADS * VECTOR
                        for i in range(here):
                            unpack(c + i * tile_bytes, panel + i * stride, count)
                        c = panel
                    s, scale_stride = scales + tile * scale_bytes + (u // units) * ROWS * 2, scale_bytes
                    if here < _PANEL_TILES:
                        stride, scale_stride = 0, 0
                    t = from_
                    while t < to:
                        m = _even(to - t, most)
                        for i in range(here):
                            _ahead(following + i * tile_bytes, lines)
                        following += lines * VECTOR
                        x, y, k = p[XQ] + t * ldx + u * UNIT, p[Y] + (t * out + tile * ROWS) * 4, kept + (t - from_) * _KEPT
                        if groups == 1:
                            sx, start = p[SX] + 4 * t, p[START] + 4 * t
                            many_row(m, c, stride, s, scale_stride, x, ldx, sx, start, k, y, out, valid, count, u == 0, last)
                        else:
                            at = 4 * (u // units * slots + t)
                            sx, start, whole = p[SX] + at, p[START] + at, count // units
                            many(m, c, stride, s, scale_stride, x, ldx, sx, start, slots, k, y, out, valid, whole, units, u == 0, last)
                        t += m

    return job(integer, variant=bits).address


@cache
def _float_job(bits: int) -> int:
    """Address of the job that computes its part of y in float32, for codes of `bits` bits."""
    few = emitted(micro.a16_few, _FEW, bits=bits)
    many = emitted(micro.a16_many, _MANY)
    dequantize = emitted(micro.dequantize, bits=bits)
    panel_units, most, few_most = _PANEL_UNITS["float32"], _MANY[0], _FEW[0]
    few_rows = _FEW_ROWS_FLOAT

    def floating(p, part, parts):
        tiles, all_units, groups, units, out = p[TILES], p[UNITS], p[GROUPS], p[GROUP_UNITS], p[OUT]
        ldx, kept, levels = p[LDX] // 4, p[PANEL] + part * p[PANEL_STRIDE], p[LEVELS]
        panel = kept + _MOST_ROWS * _KEPT
        rows_at_once = max(_LEAST_ROWS, min(_MOST_ROWS, _SECOND_LEVEL // p[LDX]))
        tile_bytes, scale_bytes = all_units * bits * VECTOR, groups * ROWS * 2
        steps = (tiles + _PANEL_TILES - 1) // _PANEL_TILES
        across = _PANEL_TILES * ROWS * 4  # bytes of one input in the panel
        for e in range(p[EXPERTS]):
            lo, hi = peek(p[OFFSETS] + 8 * e), peek(p[OFFSETS] + 8 * e + 8)
            if hi <= lo:
                continue
            codes, scales = p[CODES] + e * tiles * tile_bytes, p[SCALES] + e * tiles * scale_bytes
            if hi - lo <= few_rows:
                for tile in range(tiles * part // parts, tiles * (part + 1) // parts):
                    c, s, y, valid = codes + tile * tile_bytes, scales + tile * scale_bytes, p[Y] + tile * ROWS * 4, out - tile * ROWS
                    t = lo
                    while t < hi:
                        m = _even(hi - t, few_most)
                        few(m, c, s, levels, p[XQ] + t * ldx * 4, ldx, y + t * out * 4, out, valid, groups, units)
                        t += m
                continue
            # a panel holds whole groups where they are small, and a part of one group where they are large
            whole = max(1, panel_units // units)
            chunks = (hi - lo + rows_at_once - 1) // rows_at_once
            for chunk in range(chunks * steps):
                step = chunk % steps
                if step < steps * part // parts or step >= steps * (part + 1) // parts:
                    continue
                from_, to = lo + (hi - lo) * (chunk // steps) // chunks, lo + (hi - lo) * (chunk // steps + 1) // chunks
                tile = step * _PANEL_TILES
                here = min(_PANEL_TILES, tiles - tile)
                valid = out - tile * ROWS
                u = 0
                while u < all_units:
                    g = u // units
                    if units <= panel_units:
                        group_count, unit_count = min(whole, groups - g), units
                    else:
                        group_count, unit_count = 1, min(panel_units, (g + 1) * units - u)
                    count = group_count * unit_count
                    for i in range(here):
                        c = codes + (tile + i) * tile_bytes + u * bits * VECTOR
                        s = scales + (tile + i) * scale_bytes + g * ROWS * 2
                        dequantize(c, s, levels, panel + i * ROWS * 4, across, group_count, unit_count)
                    t = from_
                    while t < to:
                        m = _even(to - t, most)
                        x, y, k = p[XQ] + (t * ldx + u * UNIT) * 4, p[Y] + (t * out + tile * ROWS) * 4, kept + (t - from_) * _KEPT
                        many(m, panel, across, x, ldx, k, y, out, valid, count * QUADS, u == 0, u + count == all_units)
                        t += m
                    u += count

    return job(floating, variant=bits).address


@exact
def _run(prepare, compute, weight, sizes, offsets, x, rows, scratch, y):
    """Fill the plan and do both jobs, on this thread."""
    plan(scratch, weight, sizes, offsets, x, rows, y)
    if prepare:
        call(prepare, scratch.ctypes.data, 0, 1)
    call(compute, scratch.ctypes.data, 0, 1)


@exact
def _run_threads(prepare, compute, weight, sizes, offsets, x, rows, scratch, y, state, parts, workers, long):
    """Fill the plan and do both jobs in `parts` parts, with `workers` threads besides this one."""
    plan(scratch, weight, sizes, offsets, x, rows, y)
    if prepare:
        if offsets[-1] < QUANTIZE_SHARED:
            call(prepare, scratch.ctypes.data, 0, 1)
        else:
            each(state, prepare, scratch.ctypes.data, parts, workers, long)
    each(state, compute, scratch.ctypes.data, parts, workers, long)


@exact
def plan(scratch, weight, sizes, offsets, x, rows, y):
    """Write the plan to the head of `scratch`. `weight` are the arrays of the `Tiles`, `sizes` what `numbers` returns."""
    codes, scales, levels = weight
    out, n, group, units, ldx, at_sx, at_start, at_panel, panel_stride, copied = sizes
    a = scratch.ctypes.data
    p = scratch[: 8 * PLAN].view(np.int64)
    p[CODES], p[SCALES], p[LEVELS] = codes.ctypes.data, scales.ctypes.data, levels.ctypes.data
    p[EXPERTS], p[TILES], p[UNITS], p[GROUPS] = codes.shape[0], codes.shape[1], codes.shape[2], scales.shape[2]
    p[GROUP], p[GROUP_UNITS], p[OUT], p[N] = group, units, out, n
    p[OFFSETS], p[SLOTS] = offsets.ctypes.data, offsets[-1]
    p[X], p[ROWS_OF_X], p[Y] = x.ctypes.data, rows.ctypes.data if rows.size else 0, y.ctypes.data
    p[XQ], p[LDX] = a + HEAD if copied else x.ctypes.data, ldx
    p[SX], p[START], p[PANEL], p[PANEL_STRIDE] = a + at_sx, a + at_start, a + at_panel, panel_stride


HEAD = -(-8 * PLAN // VECTOR) * VECTOR
_KEEP = 64 << 20  # bytes of scratch memory that a thread may hold for good
_NO_ROWS = np.empty(0, np.int64)
_local = threading.local()


def arena(size: int) -> np.ndarray:
    """Scratch memory of this Python thread, kept between calls unless it is large."""
    if size > _KEEP:
        return aligned((size,))
    held = getattr(_local, "arena", None)
    if held is None or held.size < size:
        held = _local.arena = aligned((max(size, 1 << 16),))
    return held


def up(size: int) -> int:
    return -(-size // VECTOR) * VECTOR


def numbers(tiles: Tiles, slots: int, integer: bool, gather: bool, parts: int) -> tuple[tuple[int, ...], int]:
    """(the sizes that `plan` takes, bytes of scratch) for a product of up to `slots` rows in `parts` parts."""
    return _numbers(tiles.out, tiles.n, tiles.group, tiles.scales.shape[2], slots, integer, gather, parts)


@lru_cache(1024)
def _numbers(out: int, n: int, group: int, groups: int, slots: int, integer: bool, gather: bool, parts: int):
    units = -(-group // UNIT)
    padded = groups * units * UNIT
    copied = integer or gather or padded != n
    ldx = (padded if integer else 4 * padded) + _PAD if copied else 4 * n
    kind = "int8" if integer else "float32"
    # integers of a group stay together unless it is the row
    panel_units = max(_PANEL_UNITS[kind], units) if integer and groups > 1 else _PANEL_UNITS[kind]
    panel = _MOST_ROWS * _KEPT + _PANEL_TILES * panel_units * _PANEL_BYTES[kind]
    at_sx = HEAD + (up(slots * ldx) if copied else 0)
    at_start = at_sx + (up(4 * slots * groups) if integer else 0)
    at_panel = at_start + (up(4 * slots * groups) if integer else 0)
    return (out, n, group, units, ldx, at_sx, at_start, at_panel, panel, int(copied)), at_panel + parts * panel


def jobs_of(tiles: Tiles, integer: bool, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Addresses of the jobs that prepare the activations (0: nothing to do) and multiply."""
    if integer:
        return _quantize_job(simd.zero_point(_WAY, tiles.bits)), _integer_job(tiles.bits)
    return _spread_job() if sizes[-1] else 0, _float_job(tiles.bits)


# A product expected to take less runs on one thread. Measured on two cores of an AMD EPYC 9005 (W4A8, groups of 32): two
# threads against one 0.9x at 512 x 512 and one row, 1.0x at 1024 x 1024, 1.2x at 2048 x 1024, in cache or not.
PARALLEL_FROM_NS = 20_000


def expected_ns(tiles: Tiles, slots: int, active: int, integer: bool) -> float:
    """A rough time on one thread: bytes of `active` experts at 40 per ns, or products at 300 (float32: 60) per ns, if longer."""
    per_expert = tiles.nbytes / tiles.codes.shape[0]
    return max(active * per_expert / 40, slots * tiles.out * tiles.n / (300 if integer else 60))


def workers_for(ns: float, most: int | None) -> int:
    """How many threads besides the caller's for a product that takes about `ns` on one, of `most` (None: `set_threads`)."""
    return 0 if ns < PARALLEL_FROM_NS else min((threads() if most is None else most) - 1, MOST_WORKERS)


@exact
def _wrong(offsets, slots, rows, count):
    """1: offsets do not rise from 0 to `slots`; 2: a row is outside 0 .. count - 1; 0: neither. (In NumPy: 8 microseconds.)"""
    if offsets[0] != 0 or offsets[-1] != slots:
        return 1
    for i in range(offsets.size - 1):
        if offsets[i + 1] < offsets[i]:
            return 1
    for i in range(rows.size):
        if rows[i] < 0 or rows[i] >= count:
            return 2
    return 0


def qmatmul_experts(
    tiles: Tiles, x: np.ndarray, offsets: np.ndarray, y: np.ndarray, activations: str = "float32", rows: np.ndarray | None = None
) -> None:
    """Fill `y` float32 [slots, out]: expert e multiplies the slots offsets[e] .. offsets[e + 1] - 1.

    `x` float32 [slots, n], sorted by expert, or with `rows` int64 [slots] any [tokens, n] of which slot i takes row
    rows[i]: a token that goes to several experts is not copied. `offsets` int64 [experts + 1] rises from 0 to slots. An
    expert without slots is never read. Raises ValueError where the arrays do not fit.
    """
    check(tiles, x, y, activations)
    slots = y.shape[0]
    for name, a in (("offsets", offsets), ("rows", rows)):
        if a is not None and not isinstance(a, np.ndarray):
            raise TypeError(f"{name} is a {type(a).__name__}; it must be a NumPy array of int64")
    if offsets.dtype != np.int64 or offsets.shape != (tiles.codes.shape[0] + 1,) or not offsets.flags.c_contiguous:
        experts = tiles.codes.shape[0]
        raise ValueError(f"offsets are {offsets.dtype} {offsets.shape}; {experts} experts need contiguous int64 ({experts + 1},)")
    if rows is None:
        if x.shape[0] != slots:
            raise ValueError(f"x has {x.shape[0]} rows and y {slots}; without `rows` each row of y has its own row of x")
    elif rows.dtype != np.int64 or rows.shape != (slots,) or not rows.flags.c_contiguous:
        raise ValueError(f"rows are {rows.dtype} {rows.shape}; y with {slots} rows needs contiguous int64 ({slots},)")
    wrong = _wrong(offsets, slots, _NO_ROWS if rows is None else rows, x.shape[0])
    if wrong == 1:
        raise ValueError(f"offsets {offsets[:8].tolist()}... end at {offsets[-1]}; they must rise from 0 to the {slots} rows of y")
    if wrong == 2:
        raise ValueError(f"rows hold {rows.min()} .. {rows.max()}; x has rows 0 .. {x.shape[0] - 1}")
    multiply(tiles, x, offsets, y, activations == "int8", _NO_ROWS if rows is None else rows)


def qmatmul(tiles: Tiles, x: np.ndarray, y: np.ndarray, activations: str = "float32") -> None:
    """Fill `y` float32 [tokens, out] with x float32 [tokens, n] times the transposed weight.

    `activations`: "float32" (weight-only) or "int8" (x is quantized on the way in). Raises ValueError where shapes, types
    or memory layout do not fit. From a `QTensor` q: tile(q.packed, q.scales.view(np.int16), q.scheme.bits, group size, n).

    >>> from edgelab.kernels.pack import tile
    >>> codes, scale = np.array([[1, 2, 255]], np.uint8), np.array([[0.5]], np.float16)  # 8 bits: 128 stands for 0
    >>> weight = tile(codes, scale.view(np.int16), bits=8, group_size=0, n=3)  # one scale for the row
    >>> y = np.empty((1, 1), np.float32)
    >>> qmatmul(weight, np.array([[2, 0, 1]], np.float32), y)
    >>> y  # 0.5 * (2 * (1 - 128) + 1 * (255 - 128))
    array([[-63.5]], dtype=float32)
    """
    check(tiles, x, y, activations)
    if tiles.codes.shape[0] != 1:
        raise ValueError(f"the weight has {tiles.codes.shape[0]} experts: use qmatmul_experts, which takes the tokens of each")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows and y {y.shape[0]}: they must agree")
    multiply(tiles, x, np.array((0, len(x))), y, activations == "int8", _NO_ROWS)


def check(tiles: Tiles, x: np.ndarray, y: np.ndarray, activations: str) -> None:
    """Raise ValueError or TypeError where a weight, its inputs [.., n] and its outputs [.., out] do not fit together."""
    if not isinstance(tiles, Tiles):
        raise TypeError(f"the weight is a {type(tiles).__name__}; lay it out with edgelab.kernels.pack.tile first")
    experts, groups = tiles.codes.shape[0], tiles.scales.shape[2]
    tall = -(-tiles.out // ROWS)
    shapes = (experts, tall, groups * -(-tiles.group // UNIT), tiles.bits, VECTOR), (experts, tall, groups, ROWS)
    whole = tiles.codes.flags.c_contiguous and tiles.scales.flags.c_contiguous
    if (tiles.codes.shape, tiles.scales.shape) != shapes or not whole or groups * tiles.group != tiles.n:
        raise ValueError(
            f"the tiles' codes {tiles.codes.shape} and scales {tiles.scales.shape} are not a weight {tiles.out} x {tiles.n} at "
            f"{tiles.bits} bits in groups of {tiles.group}: make them with `tile`, and do not cut them"
        )
    for name, a, width in (("x", x, tiles.n), ("y", y, tiles.out)):
        if not isinstance(a, np.ndarray):
            raise TypeError(f"{name} is a {type(a).__name__}; it must be a NumPy array of float32 (rows, {width})")
        if a.dtype != np.float32 or a.ndim != 2 or a.shape[1] != width:
            raise ValueError(f"{name} is {a.dtype} {a.shape}; a weight {tiles.out} x {tiles.n} needs float32 (rows, {width})")
        if not a.flags.c_contiguous:
            raise ValueError(f"{name} {a.shape} is not contiguous (strides {a.strides}): pass np.ascontiguousarray({name})")
    if np.may_share_memory(x, y):
        raise ValueError("x and y share memory: y is written while x is still read")
    if not y.flags.writeable:
        raise ValueError("y is read-only; it receives the result")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    if activations == "int8" and not tiles.linear:
        raise ValueError("activations='int8' needs codes that count in equal steps; a table (NF4, say) takes 'float32'")
    if activations == "int8" and tiles.group > LONGEST_GROUP:
        raise ValueError(f"{tiles.group} inputs share a scale: their int8 products can leave an int32; use groups or 'float32'")


def multiply(
    tiles: Tiles, x: np.ndarray, offsets: np.ndarray, y: np.ndarray, integer: bool, rows: np.ndarray = _NO_ROWS, most: int | None = None
) -> None:
    """`qmatmul_experts` without its checks, for callers that made them once (`layers.py`), on up to `most` threads."""
    slots = y.shape[0]
    if not slots or not tiles.out:
        return
    if not tiles.n:
        y[:] = 0
        return
    ns = expected_ns(tiles, slots, min(slots, tiles.codes.shape[0]), integer)
    workers = workers_for(ns, most)
    parts = parts_of(workers)
    sizes, size = numbers(tiles, slots, integer, rows.size > 0, parts)
    prepare, compute = jobs_of(tiles, integer, sizes)
    args = (prepare, compute, tiles[:3], sizes, offsets, x, rows, arena(size), y)
    if workers:
        with ONE_AT_A_TIME:
            _run_threads(*args, ready(workers), parts, workers, ns >= LONG_NS)
    else:
        _run(*args)
