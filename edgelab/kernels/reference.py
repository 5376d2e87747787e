"""The NumPy twin of every kernel: what it computes, said as plainly as possible.

`PAIRS` drives the equality tests and the benchmarks: kernel name -> (kernel, reference, maker). A maker takes a NumPy
generator and the sizes as keywords and returns arguments for either function, the outputs last.
`BOUNDS` holds, for each kernel, how far its last output may lie from the twin's: float64 of the output's shape.
"""

from collections.abc import Iterator

import numpy as np

from edgelab.kernels import decode as _decode
from edgelab.kernels import router as _router
from edgelab.kernels.experts import swiglu_experts as _swiglu
from edgelab.kernels.histogram import count as _count
from edgelab.kernels.histogram import kl_curve as _kl_curve
from edgelab.kernels.histogram import mse_curve as _mse_curve
from edgelab.kernels.matmul import qmatmul as _qmatmul
from edgelab.kernels.matmul import qmatmul_experts as _qmatmul_experts
from edgelab.kernels.pack import Tiles
from edgelab.kernels.pack import tile as _tile
from edgelab.kernels.sparse import Bits, Columns
from edgelab.kernels.sparse import bitmap_matmul as _bitmap_matmul
from edgelab.kernels.sparse import bits as _bits
from edgelab.kernels.sparse import columns as _columns
from edgelab.kernels.sparse import csr_matmul as _csr_matmul

# ---------------------------------------------------------------------------------------------------------------- matmul


def untile(tiles: Tiles) -> np.ndarray:
    """The codes int64 [experts, out, n] of `tiles`, looked up one by one in the table of `pack.py`.

    >>> tiles = _tile(np.array([[0x21, 0xF3]], np.uint8), np.array([[0.5]], np.float16).view(np.int16), 4, 0, 4)
    >>> untile(tiles)
    array([[[ 1,  2,  3, 15]]])
    """
    experts, count, units, bits, _ = tiles.codes.shape
    lanes = tiles.codes.reshape(experts, count, units, bits, 16, 4).astype(np.int64)  # byte j of the lane of row r
    quads = []
    for q in range(8):
        if bits == 8:
            quad = lanes[:, :, :, q]
        elif bits == 4:
            quad = lanes[:, :, :, q // 2] >> 4 * (q % 2) & 15
        else:
            quad = lanes[:, :, :, q // 4] >> 2 * (q % 4) & 3
        if bits == 3:
            quad = quad + 4 * (lanes[:, :, :, 2] >> q & 1)
        quads.append(quad)
    inputs = np.stack(quads, axis=4).swapaxes(2, 3)  # [experts, tiles, 16, units, quads, 4]
    groups = inputs.reshape(experts, count * 16, tiles.scales.shape[2], tiles.units * 32)
    return groups[:, : tiles.out, :, : tiles.group].reshape(experts, tiles.out, tiles.n)


def row_scales(tiles: Tiles) -> np.ndarray:
    """The scales float64 [experts, out, groups] of `tiles`."""
    experts, count, groups, _ = tiles.scales.shape
    s = tiles.scales.view(np.float16).astype(np.float64)
    return s.swapaxes(2, 3).reshape(experts, count * 16, groups)[:, : tiles.out]


def weight(tiles: Tiles) -> np.ndarray:
    """The weight float64 [experts, out, n]: scale * level of the code.

    >>> weight(_tile(np.array([[0x21, 0xF3]], np.uint8), np.array([[0.5]], np.float16).view(np.int16), 4, 0, 4))
    array([[[-3.5, -3. , -2.5,  3.5]]])
    """
    codes = untile(tiles)
    levels = codes - 128 if tiles.bits == 8 else tiles.levels.astype(np.float64)[codes]
    return levels * np.repeat(row_scales(tiles), tiles.group, axis=2)


def quantize_rows(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [rows, groups, group] and scales float32 [rows, groups] of finite x float32 [rows, n], operation by operation.

    >>> quantize_rows(np.array([[254.0, -1.0, 3.0, 5.0, 0.0, 0.0]], np.float32), 3)
    (array([[[127,   0,   2],
            [127,   0,   0]]], dtype=int8), array([[2.        , 0.03937008]], dtype=float32))
    """
    x = x.reshape(len(x), x.shape[1] // group, group)
    top = np.abs(x).max(axis=2)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(top > 2.0**-100, np.float32(127) / top, np.float32(0))
    return np.rint(x * inverse[:, :, None]).astype(np.int8), top / np.float32(127)


def _dots(tiles: Tiles, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(integer sums int64 [tokens, out, groups], their factors float64: weight's scale times activation's), one expert."""
    codes, sx = quantize_rows(x, tiles.group)
    centred = untile(tiles)[0].reshape(tiles.out, -1, tiles.group) - 2 ** (tiles.bits - 1)
    dots = np.einsum("tgk,ogk->tog", codes.astype(np.int64), centred)
    return dots, row_scales(tiles)[0] * sx.astype(np.float64)[:, None, :]


def _each_expert(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None) -> Iterator[tuple[Tiles, np.ndarray, slice]]:
    """(expert e as `Tiles` of its own, its rows of x, its rows of y) for each e."""
    x = x if rows is None else x[rows]
    for e in range(len(tiles.codes)):
        part = slice(offsets[e], offsets[e + 1])
        yield tiles._replace(codes=tiles.codes[e : e + 1], scales=tiles.scales[e : e + 1]), x[part], part


def qmatmul(tiles: Tiles, x: np.ndarray, y: np.ndarray) -> None:
    """Fill y [tokens, out] with x [tokens, n] times the transposed weight, summed in float64."""
    y[:] = x.astype(np.float64) @ weight(tiles)[0].T


def qmatmul_int8(tiles: Tiles, x: np.ndarray, y: np.ndarray) -> None:
    """`qmatmul` with x quantized per group: exact integers inside a group, float64 across groups."""
    dots, factors = _dots(tiles, x)
    y[:] = (factors * dots).sum(axis=2)


def qmatmul_experts(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> None:
    """`qmatmul` of the slots offsets[e] .. offsets[e + 1] - 1 with expert e, for each e."""
    for one, xe, part in _each_expert(tiles, x, offsets, rows):
        qmatmul(one, xe, y[part])


def qmatmul_experts_int8(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> None:
    """`qmatmul_int8` of the slots offsets[e] .. offsets[e + 1] - 1 with expert e, for each e."""
    for one, xe, part in _each_expert(tiles, x, offsets, rows):
        qmatmul_int8(one, xe, y[part])


# How far the kernels may lie from their twins. Each float32 operation is wrong by at most u = 2**-24 of its result, and
# a value that passes through m of them, in whatever order and fused or not, by g = m u / (1 - m u) of the sum of magnitudes
# (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). The twin's float64 adds nothing that shows
# beside it; storing it as float32 is one more operation. Zeros that fill up a group add exactly.
#
# float32: level * x * scale is two products, of which the one with the scale comes before or after the sum; then at most n
# additions: m = n + 2, with the twin's storing n + 3, and one more where a group's sum is kept in two halves.
# int8: the integer sum of a group is exact, and so is each code of x (`quantize_rows`). Making it float32 rounds, scale *
# scale and the product with it do, and each group is one addition: m = groups + 3, with the twin's storing groups + 4.
#
# A result below float32's normal range may be lost whole (torch.set_flush_denormal), 2**-126. In float32 there are 2 n + groups
# such results, which a scale may still multiply; in int8 two a group, and the product of the scales, which the sum multiplies.
def qmatmul_bound(tiles: Tiles, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Largest difference [tokens, out] between kernel and twin for these arguments."""
    magnitudes = np.abs(x.astype(np.float64)) @ np.abs(weight(tiles)[0]).T
    largest = np.abs(row_scales(tiles)[0]).max(axis=1, initial=1)
    return _relative(tiles.n + 4) * magnitudes + 2.0**-126 * 3 * tiles.n * largest


def qmatmul_int8_bound(tiles: Tiles, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Largest difference [tokens, out] between kernel and twin for these arguments."""
    dots, factors = _dots(tiles, x)
    return _relative(dots.shape[2] + 4) * np.abs(factors * dots).sum(axis=2) + 2.0**-126 * (2 + np.abs(dots)).sum(axis=2)


def _relative(operations: int) -> float:
    return operations * 2.0**-24 / (1 - operations * 2.0**-24)


def qmatmul_experts_bound(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> np.ndarray:
    """Largest difference [slots, out] between kernel and twin for these arguments."""
    return np.concatenate([qmatmul_bound(one, xe, y[part]) for one, xe, part in _each_expert(tiles, x, offsets, rows)])


def qmatmul_experts_int8_bound(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> np.ndarray:
    """Largest difference [slots, out] between kernel and twin for these arguments."""
    return np.concatenate([qmatmul_int8_bound(one, xe, y[part]) for one, xe, part in _each_expert(tiles, x, offsets, rows)])


def swiglu_experts(gate_up: Tiles, down: Tiles, x: np.ndarray, indices: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill out [tokens, hidden] with sum_j weights[t, j] * down_e(silu(gate_e x) * up_e x), e = indices[t, j]; `experts`: none."""
    out[:] = _swiglu_experts(gate_up, down, x, indices, weights, qmatmul, lambda *_: 0.0)[0]


def swiglu_experts_int8(gate_up: Tiles, down: Tiles, x: np.ndarray, indices: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """`swiglu_experts` with the inputs of both products quantized."""
    out[:] = _swiglu_experts(gate_up, down, x, indices, weights, qmatmul_int8, lambda *_: 0.0)[0]


def swiglu_experts_bound(gate_up: Tiles, down: Tiles, x: np.ndarray, indices: np.ndarray, weights: np.ndarray, out: np.ndarray):
    """Largest difference [tokens, hidden] between kernel and twin for these arguments."""
    return _swiglu_experts(gate_up, down, x, indices, weights, qmatmul, qmatmul_bound)[1]


def swiglu_experts_int8_bound(gate_up: Tiles, down: Tiles, x: np.ndarray, indices: np.ndarray, weights: np.ndarray, out: np.ndarray):
    """Largest difference [tokens, hidden] between kernel and twin for these arguments."""
    return _swiglu_experts(gate_up, down, x, indices, weights, qmatmul_int8, qmatmul_int8_bound)[1]


# An error d of the first product goes through SwiGLU, whose slope in the gate is at most 1.1, and adds the roundings of exp
# (2 units), sum, quotient and product. What is wrong in h, the second product multiplies with |W|; with int8 activations an h that
# lies near the middle between two codes may also fall to the other one, a step of absmax / 127.
def _swiglu_experts(gate_up: Tiles, down: Tiles, x, indices, weights, product, bound) -> tuple[np.ndarray, np.ndarray]:
    """(outputs float64 [tokens, hidden], how far the kernel's may lie from them)."""
    outputs, errors = np.zeros((len(x), down.out)), np.zeros((len(x), down.out))
    inner, integer = down.n, product is qmatmul_int8
    for t, j in np.ndindex(*indices.shape):
        e = indices[t, j]
        if e == len(gate_up.codes):
            continue
        first, second = (w._replace(codes=w.codes[e : e + 1], scales=w.scales[e : e + 1]) for w in (gate_up, down))
        both, y = np.empty((1, 2 * inner), np.float32), np.empty((1, down.out), np.float32)
        product(first, x[t : t + 1], both)
        gate, up = np.split(both.astype(np.float64), 2, axis=1)
        d_gate, d_up = np.split(np.broadcast_to(bound(first, x[t : t + 1], both), both.shape), 2, axis=1)
        silu = gate / (1 + np.exp(-gate))
        h = (silu * up).astype(np.float32)
        product(second, h, y)
        d_h = (1.1 * d_gate + _relative(6) * np.abs(silu)) * (np.abs(up) + d_up) + np.abs(silu) * d_up + 2.0**-120
        if integer:
            d_h = d_h + np.abs(h.reshape(-1, down.group)).max(axis=1).repeat(down.group)[None] / 127
        d_y = d_h @ np.abs(weight(second)[0]).T + bound(second, h, y)
        outputs[t] += weights[t, j] * y[0].astype(np.float64)
        errors[t] += abs(weights[t, j]) * (d_y[0] + _relative(indices.shape[1] + 2) * (np.abs(y[0]) + d_y[0]))
    return outputs, errors + _relative(1) * np.abs(outputs)


def make_qmatmul(
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    per_tensor: bool = False,
    table: bool = False,
    exact: bool = False,
    out: int = 64,
    n: int = 128,
    tokens: int = 5,
) -> tuple:
    """Arguments of `qmatmul`: random bytes, so every code occurs and a row's unused last bits are not zero.

    Scales of both signs over float16's whole range of exponents, its subnormal numbers too. With `table` the codes stand
    for numbers without order. With `exact` the scales of weights and of activations are 1 or 1/2 and no sum leaves 24 bits
    (up to 256 inputs): no float32 operation rounds.
    """
    tiles = _tiles(rng, (out,), bits, group_size, per_tensor, table, exact, n)
    return tiles, _activations(rng, tokens, n, tiles.group, exact), np.full((tokens, out), np.nan, np.float32)


def make_qmatmul_experts(
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    per_tensor: bool = False,
    table: bool = False,
    exact: bool = False,
    out: int = 64,
    n: int = 128,
    tokens: int = 5,
    experts: int = 4,
    gather: bool = False,
) -> tuple:
    """Arguments of `qmatmul_experts`: `tokens` slots fall to the experts at random, the first expert gets none.

    With `gather` the slots take rows of a smaller x, several times or never.
    """
    tiles = _tiles(rng, (experts, out), bits, group_size, per_tensor, table, exact, n)
    x = _activations(rng, tokens // 2 + 1 if gather else tokens, n, tiles.group, exact)
    rows = rng.integers(0, len(x), tokens) if gather else None
    offsets = np.concatenate([[0, 0], np.sort(rng.integers(0, tokens + 1, experts - 2)), [tokens]])
    return tiles, x, offsets.astype(np.int64), rows, np.full((tokens, out), np.nan, np.float32)


def make_swiglu_experts(
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    per_tensor: bool = False,
    out: int = 64,
    n: int = 64,
    tokens: int = 5,
    experts: int = 4,
    k: int = 2,
) -> tuple:
    """Arguments of `swiglu_experts`, `out` the hidden and `n` the inner size; some choices are none, with a weight of NaN."""
    packed = [rng.integers(0, 256, (experts, rows, (width * bits + 7) // 8), np.uint8) for rows, width in ((2 * n, out), (out, n))]
    scales = []
    for rows, width in ((2 * n, out), (out, n)):
        shape = (experts, 1 if per_tensor else rows, width // group_size if group_size else 1)
        scales.append((rng.uniform(0.5, 1.5, shape) / 2 ** (bits - 1) / width**0.5).astype(np.float16).view(np.int16))
    stacks = [_tile(p, s, bits, group_size, width) for p, s, width in zip(packed, scales, (out, n), strict=True)]
    indices = np.argsort(rng.random((tokens, experts + 1)), axis=1)[:, :k].astype(np.int64)
    weights = rng.random((tokens, k)).astype(np.float32)
    weights[indices == experts] = np.nan
    x = rng.standard_normal((tokens, out)).astype(np.float32) * 3
    return *stacks, x, indices, weights, np.full((tokens, out), np.nan, np.float32)


def _tiles(
    rng: np.random.Generator, rows: tuple[int, ...], bits: int, group_size: int, per_tensor: bool, table: bool, exact: bool, n: int
) -> Tiles:
    packed = rng.integers(0, 256, (*rows, (n * bits + 7) // 8), np.uint8)
    shape = (*rows[:-1], 1 if per_tensor else rows[-1], n // group_size if group_size else 1)
    scales = rng.choice([-1, -0.5, 0.5, 1], shape) if exact else rng.standard_normal(shape) * 2.0 ** rng.integers(-24, 8, shape)
    levels = rng.standard_normal(2**bits).astype(np.float32) if table else None
    return _tile(packed, scales.astype(np.float16).view(np.int16), bits, group_size, n, levels)


def _activations(rng: np.random.Generator, rows: int, n: int, group: int, exact: bool) -> np.ndarray:
    if not exact:
        return rng.standard_normal((rows, n)).astype(np.float32)
    x = rng.integers(-127, 128, (rows, n // group, group))
    x[:, :, 0] = 127
    return (x * rng.choice([0.5, 1], (rows, n // group, 1))).reshape(rows, n).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- router


def softmax_topk(logits: np.ndarray, k: int, normalise: bool, indices: np.ndarray, weights: np.ndarray) -> None:
    """Fill indices and weights [tokens, k] with the k largest of softmax(logits), the first of equal ones first."""
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    indices[:] = np.argsort(-p, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(p, indices, axis=1)
    weights[:] = chosen / chosen.sum(1, keepdims=True) if normalise else chosen


def deepseek_v3(
    logits: np.ndarray,
    bias: np.ndarray,
    k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    indices: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Fill indices and weights [tokens, k] with DeepSeek-V3's choice, the largest first (the kernel's order is another)."""
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = s + bias
    tokens, n = choice.shape
    groups = choice.reshape(tokens, n_group, n // n_group)
    if topk_group < n_group:
        group_score = np.sort(groups, axis=2)[:, :, -2:].sum(2)
        out = np.argsort(-group_score, axis=1, kind="stable")[:, topk_group:]
        np.put_along_axis(groups, out[:, :, None], -np.inf, axis=1)  # a view of `choice`
    indices[:] = np.argsort(-choice, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(s, indices, axis=1)
    weights[:] = (chosen / (chosen.sum(1, keepdims=True) + 1e-20) if normalise else chosen) * scale


def dispatch(indices: np.ndarray, experts: int, order: np.ndarray, offsets: np.ndarray) -> None:
    """Fill order [tokens * k] with the slots sorted by expert, offsets [experts + 1] with each expert's beginning."""
    choice = indices.reshape(-1)
    order[:] = np.argsort(choice, kind="stable")
    offsets[:] = np.searchsorted(choice[order], np.arange(experts + 1))


def combine(rows: np.ndarray, order: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill out [tokens, hidden] with each token's weighted sum of its rows, in float32 and in the order of its choices."""
    tokens, k = weights.shape
    by_slot = np.zeros((tokens * k, rows.shape[1]), np.float32)
    by_slot[order[: len(rows)]] = rows
    w = np.zeros(tokens * k, np.float32)  # a slot without a row counts nothing, whatever its weight
    w[order[: len(rows)]] = weights.reshape(-1)[order[: len(rows)]]
    out[:] = 0
    for j in range(k):
        out += w[j::k, None] * by_slot[j::k]


# How far a gate's weight may lie from its twin, relative to it, with u = 2**-24 and to first order in u. exp is wrong by at
# most 1 ulp = 2 u, after its argument's own rounding: x - max by D u, D the row's spread. A sum of n positive numbers adds
# (n - 1) u in any order, a product or quotient u. So p = exp(d) / sum(exp(d)) has (2 + D) + (2 + D + n - 1) + 2 = 2 D + n + 5
# of them; dividing by the sum of k such doubles that and adds (k - 1) + 1. The twin's own rounding to float32 adds 1.
# The sigmoid: exp 2, the sum with 1, the quotient 1: 4; normalised 4 + (4 + k - 1), 1e-20, quotient: 9 + k; scale 2; twin 1.
# Numbers below float32's normal range are wrong by 2**-126 at most.
def softmax_topk_bound(logits: np.ndarray, k: int, normalise: bool, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Largest difference [tokens, k] of the weights, for the weights that the twin has written."""
    count = 2 * np.ptp(logits.astype(np.float64), axis=1, keepdims=True) + logits.shape[1] + 5
    return (2 * count + k + 1) * 2.0**-24 * weights + 2.0**-126


def deepseek_v3_bound(
    logits: np.ndarray,
    bias: np.ndarray,
    k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    indices: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Largest difference [tokens, k] of the weights, for the weights that the twin has written."""
    return (k + 13) * 2.0**-24 * np.abs(weights.astype(np.float64)) + 2.0**-126


def dispatch_bound(indices: np.ndarray, experts: int, order: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Zero [experts + 1]: whole numbers."""
    return np.zeros(offsets.shape)


def combine_bound(rows: np.ndarray, order: np.ndarray, weights: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Zero [tokens, hidden]: the same float32 operations in the same order."""
    return np.zeros(out.shape)


def make_softmax_topk(rng: np.random.Generator, *, tokens: int = 5, experts: int = 128, k: int = 8, normalise: bool = True) -> tuple:
    """Arguments of `softmax_topk`: logits far enough apart that rounding makes no two equal."""
    logits = 2 * rng.standard_normal((tokens, experts)).astype(np.float32)
    return logits, k, normalise, np.full((tokens, k), -1, np.int64), np.full((tokens, k), np.nan, np.float32)


def make_deepseek_v3(
    rng: np.random.Generator,
    *,
    tokens: int = 5,
    experts: int = 128,
    k: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    normalise: bool = True,
    scale: float = 2.5,
) -> tuple:
    """Arguments of `deepseek_v3`; compare kernel and twin after sorting each token's choices."""
    logits, _, _, indices, weights = make_softmax_topk(rng, tokens=tokens, experts=experts, k=k)
    bias = rng.uniform(-0.1, 0.1, experts).astype(np.float32)
    return logits, bias, k, n_group, topk_group, normalise, scale, indices, weights


def make_dispatch(rng: np.random.Generator, *, tokens: int = 5, experts: int = 128, k: int = 8) -> tuple:
    """Arguments of `dispatch`: any expert may come twice in a token, and none (the index `experts`) too."""
    indices = rng.integers(0, experts + 1, (tokens, k))
    return indices, experts, np.full(tokens * k, -1, np.int64), np.full(experts + 1, -1, np.int64)


def make_combine(rng: np.random.Generator, *, tokens: int = 5, experts: int = 128, k: int = 8, hidden: int = 96) -> tuple:
    """Arguments of `combine`; a choice that means none has the weight NaN."""
    indices, _, order, offsets = make_dispatch(rng, tokens=tokens, experts=experts, k=k)
    dispatch(indices, experts, order, offsets)
    weights = np.where(indices == experts, np.nan, rng.uniform(0, 1, indices.shape)).astype(np.float32)
    rows = rng.standard_normal((offsets[-1], hidden)).astype(np.float32)
    return rows, order, weights, np.full((tokens, hidden), np.nan, np.float32)


# ------------------------------------------------------------------------------------------------------------- histogram


def count(x: np.ndarray, width: float, counts: np.ndarray) -> None:
    """Add to counts int64 [bins] how many of x float32 [n] have floor(|x| / width) = j."""
    j = np.floor(np.abs(x.astype(np.float64)) * (1 / width)).astype(np.int64)
    counts += np.bincount(j, minlength=counts.size)


def kl_curve(counts: np.ndarray, levels: int, curve: np.ndarray) -> None:
    """Fill curve float64 [bins + 1 - levels] with KL(P || Q) for i = levels .. bins, written as the slides have it."""
    for i in range(levels, counts.size + 1):
        outliers = counts[i:].sum()
        p = counts[:i].astype(np.float64)
        p[i - 1] += outliers
        level = np.arange(i) * levels // i  # the level of each bin
        source = counts[:i]
        merged = np.bincount(level, source, levels)
        filled = np.bincount(level, source > 0, levels)
        q = np.where(source > 0, merged[level] / np.maximum(filled[level], 1), 0.0)
        if outliers and (source[i - 1] == 0 or not source[: i - 1].any()):
            curve[i - levels] = np.inf  # Q is 0 where P is not; or both are the same single bin, whatever was clipped
            continue
        p, q = p / p.sum(), q / q.sum() if q.any() else q
        with np.errstate(divide="ignore"):
            curve[i - levels] = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


def mse_curve(counts: np.ndarray, levels: int, curve: np.ndarray) -> None:
    """Fill curve float64 [bins + 1 - levels] with the mean of (x - step * code)**2, x evenly spread in each bin of width 1."""
    bins = counts.size
    for i in range(levels, bins + 1):
        step = (i + 0.5) / (levels - 1)
        begins = (np.arange(1, levels) - 0.5) * step  # where code k begins
        edges = np.union1d(np.arange(bins + 1.0), begins[begins < bins])
        width, middle = np.diff(edges), (edges[:-1] + edges[1:]) / 2  # between two edges neither the bin nor the code changes
        y = step * np.searchsorted(begins, middle)
        curve[i - levels] = np.sum(counts[middle.astype(int)] * width * ((middle - y) ** 2 + width**2 / 12)) / counts.sum()


def count_bound(x: np.ndarray, width: float, counts: np.ndarray) -> np.ndarray:
    """0 [bins]: kernel and twin round the same product once."""
    return np.zeros(counts.size)


# kl_curve: the kernel adds at most `bins` terms c ln c, `levels` terms S ln(S / n) and five more, one after the other. Their
# magnitudes add up to at most N ln N for each of these (N the total: sum c ln c <= N ln N), and every term has a relative error
# of at most 4 u (two logarithms within one u each, their difference, the product), u = 2**-53. A sum of m positive
# terms errs by at most (m - 1) u times their sum. So |error| <= (bins + levels + 40) u N ln N before the division by N. The
# twin's terms P ln(P / Q) add up to less than ln N + 1 and err by fewer roundings (NumPy sums pairwise).
def kl_curve_bound(counts: np.ndarray, levels: int, curve: np.ndarray) -> np.ndarray:
    """Largest difference [candidates] between kernel and twin, nats."""
    return np.full(curve.size, (counts.size + levels + 40) * 2.0**-53 * (np.log(counts.sum()) + 1))


# mse_curve, u = 2**-53: the kernel takes 2 s sum_k H(b_k) from N E x**2, the sum of `bins` terms. The difference is a squared error,
# so it is not negative and 2 s sum_k H(b_k) <= N E x**2: adding up the bins and the K < levels codes errs by at most
# (bins + levels + 8) u N E x**2. Each H(b) = moment - b above + (part of a bin) errs by a few u of moment <= N E x; the two
# suffix sums are exact while twice their largest is below 2**53, and else err by `bins` u. 2 s K <= 2 bins + 1 of them make
# 4 (bins + 1) (8 + bins or 0) u N E x. All of it over N. The twin adds positive terms of a few u each; its y, 2 u off, is in the 8.
def mse_curve_bound(counts: np.ndarray, levels: int, curve: np.ndarray) -> np.ndarray:
    """Largest difference [candidates] between kernel and twin, bin widths squared."""
    j, bins, n = np.arange(counts.size), counts.size, int(counts.sum())
    mean, square = (counts * (j + 0.5)).sum() / n, (counts * (j + 1.0) ** 2).sum() / n
    suffix = 0 if 2 * n * bins < 2**53 else bins
    return np.full(curve.size, 2.0**-53 * ((bins + levels + 8) * square + 4 * (bins + 1) * (8 + suffix) * mean))


def make_count(rng: np.random.Generator, *, bins: int = 2048, n: int = 10_000, zeros: float = 0.1) -> tuple:
    """Arguments of `count`: a normal distribution with a share of zeros of both signs, and counts that are not 0 to begin with."""
    x = rng.standard_normal(n).astype(np.float32)
    x[rng.random(n) < zeros] *= 0
    width = float(np.abs(x).max(initial=1) * 1.001 / bins)  # no power of two: the product rounds
    return x, width, rng.integers(0, 1000, bins)


def make_kl_curve(
    rng: np.random.Generator, *, bins: int = 2048, levels: int = 128, values: int = 100_000, tail: float = 3.0, holes: float = 0.0
) -> tuple:
    """Arguments of `kl_curve`: counts of |Student t|, `tail` degrees of freedom; a share `holes` of the bins is emptied."""
    x = np.abs(rng.standard_t(tail, values))
    counts = np.bincount((x / x.max() * bins).astype(int).clip(max=bins - 1), minlength=bins)
    counts[rng.random(bins) < holes] = 0
    counts[rng.integers(bins)] += 1  # never all zero
    return counts, levels, np.full(bins + 1 - levels, np.nan)


make_mse_curve = make_kl_curve

# ------------------------------------------------------------------------------------------------------- without zeros


def sparse_weight(weight: Bits | Columns) -> np.ndarray:
    """The weight float64 [rows, n], zeros put back.

    >>> sparse_weight(_bits(np.array([[0b101]], np.uint8), np.array([2.0, 3.0], np.float16), 3))
    array([[2., 0., 3.]])
    """
    if isinstance(weight, Bits):
        there = np.unpackbits(weight.mask, axis=1, count=weight.n, bitorder="little").astype(bool)
        rows, where = np.nonzero(there)
        count, full = len(where), np.zeros(there.shape)
    else:
        ends = weight.ends.astype(np.int64)
        rows, where, count, full = (
            np.repeat(np.arange(len(ends) - 1), np.diff(ends)),
            weight.columns,
            ends[-1],
            np.zeros((len(ends) - 1, weight.n)),
        )
    full[rows, where] = weight.values[:count].view(np.float16)
    return full


def bitmap_matmul(weight: Bits, x: np.ndarray, y: np.ndarray) -> None:
    """Fill y [tokens, rows] with x [tokens, n] times the transposed weight, summed in float64."""
    y[:] = x.astype(np.float64) @ sparse_weight(weight).T


csr_matmul = bitmap_matmul


# As for `qmatmul_bound`, without a scale: a product and at most n additions, in whatever order, and the twin's storing: m = n + 2.
# Of a value that fills up a vector's lane both factors are 0. Below float32's normal range up to 2 n results may be lost whole.
def bitmap_matmul_bound(weight: Bits, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Largest difference [tokens, rows] between kernel and twin for these arguments."""
    return _relative(weight.n + 2) * (np.abs(x.astype(np.float64)) @ np.abs(sparse_weight(weight)).T) + 2.0**-126 * 2 * weight.n


csr_matmul_bound = bitmap_matmul_bound


def _pruned(rng: np.random.Generator, out: int, n: int, sparsity: float, exact: bool) -> np.ndarray:
    w = rng.integers(-4, 5, (out, n)) if exact else rng.standard_normal((out, n))
    w = np.where(rng.random((out, n)) < sparsity, 0, w).astype(np.float16)
    if out > 2:
        w[1] = 0  # a row of which nothing is left, and one that is whole
        w[2] = 1.5 if not exact else 2
    return w


def make_bitmap_matmul(
    rng: np.random.Generator, *, out: int = 64, n: int = 96, tokens: int = 3, sparsity: float = 0.5, exact: bool = False
) -> tuple:
    """Arguments of `bitmap_matmul`; `exact`: small whole numbers, of which no sum rounds."""
    w = _pruned(rng, out, n, sparsity, exact)
    there = w != 0
    x = rng.integers(-4, 5, (tokens, n)) if exact else rng.standard_normal((tokens, n))
    weight = _bits(np.packbits(there, axis=1, bitorder="little"), w[there], n)
    return weight, x.astype(np.float32), np.full((tokens, out), np.nan, np.float32)


def make_csr_matmul(
    rng: np.random.Generator, *, out: int = 64, n: int = 96, tokens: int = 3, sparsity: float = 0.5, exact: bool = False
) -> tuple:
    """Arguments of `csr_matmul`, with indices of the smallest type."""
    w = _pruned(rng, out, n, sparsity, exact)
    there = w != 0
    x = rng.integers(-4, 5, (tokens, n)) if exact else rng.standard_normal((tokens, n))
    ends = np.r_[0, np.cumsum(there.sum(1))]
    index = np.nonzero(there)[1].astype(np.min_scalar_type(n - 1))
    weight = _columns(ends.astype(np.min_scalar_type(ends[-1])), index, w[there], n)
    return weight, x.astype(np.float32), np.full((tokens, out), np.nan, np.float32)


# ------------------------------------------------------------------------------------------------------------ decoding


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: np.ndarray, y: np.ndarray) -> None:
    """Twin of `decode.rms_norm`, in float64."""
    wide = x.astype(np.float64)
    y[:] = wide / np.sqrt((wide**2).mean(1, keepdims=True) + eps.astype(np.float64)) * gain


def rms_norm_bound(x, gain, eps, y) -> np.ndarray:
    """Largest difference: a sum of n squares, a division, a root, a reciprocal and two products, each rounded."""
    rms_norm(x, gain, eps, ref := np.empty(y.shape, np.float64))
    return _relative(x.shape[1] + 8) * np.abs(ref) + 1e-30


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool, y: np.ndarray) -> None:
    """Twin of `decode.rotate`: pairs as complex numbers, times exp(i angle)."""
    half = cos.shape[1]
    a, b = (x[:, 0 : 2 * half : 2], x[:, 1 : 2 * half : 2]) if interleaved else (x[:, :half], x[:, half : 2 * half])
    turned = (a + 1j * b.astype(np.complex128)) * (cos + 1j * sin.astype(np.complex128))
    y[:] = x
    y[:, :half], y[:, half : 2 * half] = turned.real, turned.imag


def rotate_bound(x, cos, sin, interleaved, y) -> np.ndarray:
    """Largest difference: two products and a sum, rounded."""
    return np.full(y.shape, _relative(3) * 2 * float(np.abs(x).max(initial=0)) * 1.0001)


def attention(q, keys, values, positions, scale, y) -> None:
    """Twin of `decode.attention`: one row and one head after the other, in float64."""
    group = q.shape[1] // keys.shape[1]
    for t, position in enumerate(positions):
        for h in range(q.shape[1]):
            k = keys[: position + 1, h // group].astype(np.float64)
            v = k[:, : y.shape[2]] if values is None else values[: position + 1, h // group].astype(np.float64)
            score = k @ q[t, h].astype(np.float64) * float(scale[0])
            p = np.exp(score - score.max())
            y[t, h] = p @ v / p.sum()


def attention_bound(q, keys, values, positions, scale, y) -> np.ndarray:
    """Largest difference. A score is a sum of dim products, then scaled: it is off by e <= (dim + 2) eps sum |q k| |scale|, and so its
    power by a factor exp(+-2 e) (the largest is subtracted) and 4 units more; the weighted mean of values then moves by twice that, and by
    the rounding of a sum over the positions."""
    dim, length = q.shape[2], keys.shape[0]
    k = np.abs(keys.astype(np.float64))
    group = q.shape[1] // keys.shape[1]
    most = np.einsum("thd,phd->th", np.abs(q.astype(np.float64)), np.repeat(k, group, 1)[k.sum((1, 2)).argmax()][None])
    error = 2 * _relative(dim + 2) * most.max() * abs(float(scale[0])) + _relative(length + 8)
    largest = k[..., : y.shape[2]].max() if values is None else np.abs(values.astype(np.float64)).max()
    return np.full(y.shape, 4 * error * largest)


def make_rms_norm(rng: np.random.Generator, *, n: int = 256, tokens: int = 3) -> tuple:
    """Arguments of `rms_norm`."""
    x, gain = (rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, n), (n,)))
    return x, gain, np.array([1e-6], np.float32), np.full((tokens, n), np.nan, np.float32)


def make_rotate(rng: np.random.Generator, *, dim: int = 64, half: int = 32, tokens: int = 3, interleaved: bool = False) -> tuple:
    """Arguments of `rotate`."""
    x, angle = rng.standard_normal((tokens, dim)).astype(np.float32), rng.standard_normal((tokens, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return x, cos, sin, interleaved, np.full((tokens, dim), np.nan, np.float32)


def make_attention(
    rng: np.random.Generator, *, heads: int = 4, key_heads: int = 2, dim: int = 64, tokens: int = 3, length: int = 100, latent: int = 0,
    half: bool = False,
) -> tuple:  # fmt: skip
    """Arguments of `attention`: the last `tokens` of `length` positions; `latent`: that many numbers of the one key are the value."""
    kind, key_heads = np.float16 if half else np.float32, 1 if latent else key_heads
    q = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
    keys, values = (rng.standard_normal((length, key_heads, dim)).astype(kind) for _ in range(2))
    y = np.full((tokens, heads, latent or dim), np.nan, np.float32)
    return q, keys, None if latent else values, np.arange(length - tokens, length), np.array([dim**-0.5], np.float32), y


# ------------------------------------------------------------------------------------------------------------ the table


def _kernel_int8(tiles: Tiles, x: np.ndarray, y: np.ndarray) -> None:
    _qmatmul(tiles, x, y, "int8")


def _kernel_experts(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> None:
    _qmatmul_experts(tiles, x, offsets, y, rows=rows)


def _kernel_experts_int8(tiles: Tiles, x: np.ndarray, offsets: np.ndarray, rows: np.ndarray | None, y: np.ndarray) -> None:
    _qmatmul_experts(tiles, x, offsets, y, "int8", rows)


def _kernel_swiglu_int8(*args) -> None:
    _swiglu(*args, activations="int8")


PAIRS = {
    "qmatmul": (_qmatmul, qmatmul, make_qmatmul),
    "qmatmul_int8": (_kernel_int8, qmatmul_int8, make_qmatmul),
    "qmatmul_experts": (_kernel_experts, qmatmul_experts, make_qmatmul_experts),
    "qmatmul_experts_int8": (_kernel_experts_int8, qmatmul_experts_int8, make_qmatmul_experts),
    "swiglu_experts": (_swiglu, swiglu_experts, make_swiglu_experts),
    "swiglu_experts_int8": (_kernel_swiglu_int8, swiglu_experts_int8, make_swiglu_experts),
    "softmax_topk": (_router.softmax_topk, softmax_topk, make_softmax_topk),
    "deepseek_v3": (_router.deepseek_v3, deepseek_v3, make_deepseek_v3),
    "dispatch": (_router.dispatch, dispatch, make_dispatch),
    "combine": (_router.combine, combine, make_combine),
    "count": (_count, count, make_count),
    "kl_curve": (_kl_curve, kl_curve, make_kl_curve),
    "mse_curve": (_mse_curve, mse_curve, make_mse_curve),
    "bitmap_matmul": (_bitmap_matmul, bitmap_matmul, make_bitmap_matmul),
    "csr_matmul": (_csr_matmul, csr_matmul, make_csr_matmul),
    "rms_norm": (_decode.rms_norm, rms_norm, make_rms_norm),
    "rotate": (_decode.rotate, rotate, make_rotate),
    "attention": (_decode.attention, attention, make_attention),
}
BOUNDS = {
    "qmatmul": qmatmul_bound,
    "qmatmul_int8": qmatmul_int8_bound,
    "qmatmul_experts": qmatmul_experts_bound,
    "qmatmul_experts_int8": qmatmul_experts_int8_bound,
    "swiglu_experts": swiglu_experts_bound,
    "swiglu_experts_int8": swiglu_experts_int8_bound,
    "softmax_topk": softmax_topk_bound,
    "deepseek_v3": deepseek_v3_bound,
    "dispatch": dispatch_bound,
    "combine": combine_bound,
    "count": count_bound,
    "kl_curve": kl_curve_bound,
    "mse_curve": mse_curve_bound,
    "bitmap_matmul": bitmap_matmul_bound,
    "csr_matmul": csr_matmul_bound,
    "rms_norm": rms_norm_bound,
    "rotate": rotate_bound,
    "attention": attention_bound,
}
