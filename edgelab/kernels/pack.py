"""`Tiles`: a low-bit weight in the order in which the kernels read it.

`QTensor` stores row after row. A kernel wants, in one load, codes that many output rows can multiply with the same
inputs, so that each row keeps a lane of the vector to itself and no sum ever crosses lanes. So 16 rows form a *tile*, and
along the inputs 32 codes form a *unit*; a unit of a tile at b bits is b vectors of 64 bytes, and in each vector row r
owns bytes 4r .. 4r + 3 (one 32-bit lane). Four neighbouring inputs are a *quad*; a unit has eight.

    bits  vector  in each byte
    8     c       quad c
    4     c       quad 2c in the low four bits, quad 2c + 1 in the high four
    2     c       quads 4c .. 4c + 3, two bits each from the low end
    3     0, 1    the low two bits of the codes, as at 2 bits;  vector 2: the third bit of quad i as bit i

Byte j of the lane is the quad's input j. The scales of a tile's 16 rows lie together for each group. Groups are filled
up to whole units, and rows to whole tiles; what fills them is never seen in a result, for the inputs beside it are 0 and
its outputs are not stored. The same bytes serve every way of `simd.py`: eight lanes take half a vector at a time.
"""

from typing import NamedTuple

import numpy as np

from edgelab.kernels._jit import exact

ROWS, UNIT, QUADS, VECTOR = 16, 32, 8, 64


class Tiles(NamedTuple):
    """A weight [experts, out, n] for the kernels; an ordinary matrix has one expert."""

    codes: np.ndarray  # uint8 [experts, tiles, units, bits, 64]
    scales: np.ndarray  # int16 [experts, tiles, groups, 16]: float16's bits
    levels: np.ndarray  # float32 [16]: what code (index & (2**bits - 1)) stands for, before the scale; unused at 8 bits
    out: int
    n: int
    bits: int
    group: int  # inputs that share a scale; n where a whole row does
    linear: bool  # levels are code - 2**(bits - 1): integer products are possible

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def units(self) -> int:
        """Units of one group, the last one filled up."""
        return -(-self.group // UNIT)

    @property
    def padded(self) -> int:
        """Inputs with every group filled up to whole units: the length of an activation row inside the kernels."""
        return self.codes.shape[2] * UNIT


@exact
def _fill(packed, bits, n, group, units, codes):
    """Scatter the bit streams `packed` [experts, out, row_bytes] into zeroed `codes` (see the module)."""
    experts, out = packed.shape[0], packed.shape[1]
    mask = (1 << bits) - 1
    for e in range(experts):
        for o in range(out):
            row, lane = packed[e, o], 4 * (o % ROWS)
            tile = codes[e, o // ROWS]
            for k in range(n):
                byte, shift = (k * bits) >> 3, (k * bits) & 7
                word = np.int64(row[byte])
                if shift + bits > 8:
                    word |= np.int64(row[byte + 1]) << 8
                code = (word >> shift) & mask
                at = (k // group) * units * UNIT + k % group
                u, quad, j = at // UNIT, at % UNIT // 4, lane + at % 4
                if bits == 8:
                    tile[u, quad, j] = code
                elif bits == 4:
                    tile[u, quad >> 1, j] |= code << 4 * (quad & 1)
                else:
                    tile[u, quad >> 2, j] |= (code & 3) << 2 * (quad & 3)
                    if bits == 3:
                        tile[u, 2, j] |= (code >> 2) << quad


def aligned(shape: tuple[int, ...], dtype=np.uint8) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes, so that a vector of a tile never straddles two cache lines."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + VECTOR, np.uint8)
    start = -raw.ctypes.data % VECTOR
    return raw[start : start + size].view(dtype).reshape(shape)


def tile(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, n: int, levels: np.ndarray | None = None) -> Tiles:
    """The weight as `Tiles`, laid out anew.

    `packed` uint8 [out, row_bytes] or [experts, out, row_bytes], a little-endian bit stream per row as in `QTensor`;
    `scales` int16 (float16's bits) [..., out or 1, groups]; `group_size` 0: one scale per row. `levels` float32
    [2**bits]: what each code stands for, instead of code - 2**(bits - 1) (NF4, say); with 8 bits there is no table.

    Raises ValueError when the pieces do not fit together.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits={bits} is not one of 2, 3, 4, 8")
    if packed.dtype != np.uint8 or packed.ndim not in (2, 3):
        raise ValueError(f"packed is {packed.dtype} {packed.shape}; it must be uint8 [out, row_bytes] or [experts, out, row_bytes]")
    if packed.shape[-1] != (n * bits + 7) // 8:
        raise ValueError(f"packed has {packed.shape[-1]} bytes a row; n={n} codes of {bits} bits take {(n * bits + 7) // 8}")
    if group_size < 0 or (group_size and n % group_size):
        raise ValueError(f"group_size={group_size} does not divide n={n}; use a divisor, or 0 for one scale per row")
    packed, scales = (a if packed.ndim == 3 else a[None] for a in (packed, scales))
    experts, out = packed.shape[:2]
    groups = n // group_size if group_size else 1
    if scales.dtype != np.int16 or scales.shape not in ((experts, out, groups), (experts, 1, groups)):
        raise ValueError(
            f"scales are {scales.dtype} {scales.shape}; they must be int16 (float16's bits) ({experts}, {out} or 1, {groups}): "
            "view float16 with .view(np.int16)"
        )
    if levels is not None and (bits == 8 or np.shape(levels) != (2**bits,)):
        raise ValueError(f"levels have shape {np.shape(levels)}; a table needs ({2**bits},) at {bits} bits, and 8 bits take none")
    group = group_size or n
    units, tiles = -(-group // UNIT), -(-out // ROWS)
    codes = aligned((experts, tiles, groups * units, bits, VECTOR))
    if codes.size:
        _fill(np.ascontiguousarray(packed), bits, n, group, units, codes)
    rows = aligned((experts, tiles * ROWS, groups), np.int16)
    rows[:, :out] = scales
    by_tile = aligned((experts, tiles, groups, ROWS), np.int16)
    by_tile[:] = rows.reshape(experts, tiles, ROWS, groups).swapaxes(2, 3)
    linear = levels is None
    table = np.zeros(16, np.float32)
    if bits < 8:
        base = np.arange(2**bits) - 2 ** (bits - 1) if linear else levels
        table[:] = np.tile(np.asarray(base, np.float32), 16 // 2**bits)
    return Tiles(codes, by_tile, table, out, n, bits, group, linear)
