"""Which experts a token goes to, and the way there and back: top-k gates, `dispatch` and `combine`.

The gates choose *the same experts in the same order as transformers on the CPU, bit for bit*, ties included. A choice is a
comparison of rounded numbers, so it repeats only if every rounding before it does. What torch rounds, and so do we:

- exp of vectors is Sleef's `expf` with 1.0 ulp (https://github.com/shibatch/sleef, sleefsimdsp.c, `xexpf`, `u10`):
  x = q ln 2 + s, a polynomial in s by fused multiply-adds, times 2**q. Sums run in `lanes` columns that are then folded
  in halves, softmax multiplies with 1 / sum (torch, cpu/vec/functional_base.h and SoftMaxKernel.cpp). `lanes` is torch's
  vector: 16 floats with AVX-512, 8 with AVX2, 4 on ARM. The sigmoid's last (tokens * experts) % (2 * lanes) scores are
  torch's scalar loop and use the C library's `expf`.
- topk is the C++ library's `partial_sort` where 64 k <= n, else `nth_element` and, when sorted, `sort` of the first k - 1
  (torch, native/TopKImpl.h). Which of two equal scores wins, and the order of DeepSeek's choices (`sorted=False`), is what
  these algorithms leave behind. They are introselect and introsort (Musser, Software: Practice and Experience 27(8), 1997) on
  the heap of Stepanov and Lee's STL (HP, 1994), with the pivots and cut-offs that SGI's STL chose and GNU's library keeps.

So it holds for Linux on x86-64 with AVX2 or AVX-512 (tests compare both, weights bit for bit too). Elsewhere (another C++
library, torch's ATEN_CPU_CAPABILITY=default, and sigmoids of 32,768 scores and more where several threads of torch split
them off a multiple of 2 * lanes) a choice may differ only where scores are equal within rounding, and DeepSeek's order.
NaN counts as the largest score, as in torch.

One thread: a token's gate over 128 experts takes 0.3 to 1 microsecond, as far as its branches are foreseen.
"""

import math
import os
import platform

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from edgelab.kernels._jit import exact

F = np.float32
U = np.uint64  # unsigned indices: a signed one is tested for wrapping around, which keeps loops out of vector registers


def _torch_lanes() -> int:
    """Floats in one of torch's vectors on this machine, by torch's own rule and its variable ATEN_CPU_CAPABILITY."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return 4
    has = binding.get_host_cpu_features()
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "avx512")
    if asked == "avx512" and all(has.get(f) for f in ("avx512f", "avx512vl", "avx512bw", "avx512dq", "fma")):
        return 16
    return 8


LANES = _torch_lanes()


# ------------------------------------------------------------------------------------------------------ exp as torch's


@intrinsic
def _fma(typingctx, a, b, c):
    """The float32 a * b + c, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _rint(typingctx, a):
    """The whole float32 nearest to `a`, ties to even."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), args)

    return types.float32(types.float32), codegen


@intrinsic
def _as_float32(typingctx, bits):
    """The float32 whose bits are the int32 `bits`."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@exact
def _exp(x):
    """exp of a float32 with at most 1.0 ulp of error: Sleef's expf_u10."""
    inside = x if F(-104) <= x <= F(100) else F(0)  # else the integer below would not be defined, NaN's neither
    q = _rint(inside * F(1.442695040888963407))  # 1 / ln 2
    s = _fma(q, F(-0.693145751953125), inside)  # ln 2 in two parts: the first has 15 bits, so q times it is exact
    s = _fma(q, F(-1.428606765330187045e-06), s)
    u = F(0.000198527617612853646278381)
    u = _fma(u, s, F(0.00139304355252534151077271))
    u = _fma(u, s, F(0.00833336077630519866943359))
    u = _fma(u, s, F(0.0416664853692054748535156))
    u = _fma(u, s, F(0.166666671633720397949219))
    u = _fma(u, s, F(0.5))
    u = F(1) + _fma(s * s, u, s)
    n = np.int32(q)
    half = n >> np.int32(1)  # 2**n in two factors: a subnormal result is rounded once, by the second
    u = u * _as_float32(np.int32((half + 127) << 23)) * _as_float32(np.int32((n - half + 127) << 23))
    if x < F(-104):
        u = F(0)
    if x > F(100):
        u = F(np.inf)
    return u if x == x else x


@exact
def _fold(x, acc, lanes):
    for i in range(U(lanes)):
        acc[i] = x[i]
    whole = U(x.size // lanes * lanes)
    for start in range(U(lanes), whole, U(lanes)):
        for i in range(U(lanes)):
            acc[i] += x[start + i]
    for i in range(whole, U(x.size)):
        acc[i - whole] += x[i]
    if lanes == 16:
        for i in range(U(8)):
            acc[i] += acc[i + U(8)]
    if lanes >= 8:
        for i in range(U(4)):
            acc[i] += acc[i + U(4)]
    return (acc[0] + acc[2]) + (acc[1] + acc[3])


@exact
def _sum(x, acc, lanes):
    """Sum of float32 x [n] as torch's softmax takes it: `lanes` columns, then folded in halves (n < lanes: in order)."""
    if x.size < lanes:
        total = x[0]
        for i in range(1, x.size):
            total += x[i]
        return total
    # a width that the compiler knows: 52 against 81 ns for 128 numbers (AMD EPYC with AVX-512)
    return _fold(x, acc, 16) if lanes == 16 else _fold(x, acc, 8) if lanes == 8 else _fold(x, acc, 4)


@exact
def _short_sum(x, acc, lanes):
    """Sum of float32 x [k] as torch.sum takes it over the last axis of [tokens, k]; compared up to k = 40."""
    # native/cpu/SumKernel.cpp: rows of at least one vector are summed per lane, the lanes at the end; shorter ones number
    # by number. Either way four partial sums when there are four summands or more; what remains goes to the first. Its
    # vector has 8 floats also where softmax has 16: with 16, weights from k = 8 on differ in the last bit.
    lanes = min(lanes, 8)
    width = lanes if x.size >= lanes else 1
    count = x.size // width
    total = F(0)
    for i in range(count * width, x.size):
        total += x[i]
    for lane in range(width):
        for i in range(4):
            acc[i] = F(0)
        for i in range(count):
            acc[i & 3 if i < count // 4 * 4 else 0] += x[i * width + lane]
        total += acc[0] + acc[1] + acc[2] + acc[3]
    return total


# ---------------------------------------------------------------------------------- topk as torch's: the STL's choices
# A score and its place are one int64, so they move and compare as one: the score's bits above, made to ascend with it, the
# place below. Comparisons come in the STL's order. np.int64(0) for 0: a literal argument would
# have its function compiled once more.


@intrinsic
def _bits(typingctx, x):
    """The int32 that has the bits of the float32 `x`."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@exact
def _ascending(b):
    """int32 that ascends with the float32 of bits b, and back: negative floats descend as their bits ascend."""
    return np.int32(b ^ ((b >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@exact
def _keys(score, v):
    """Fill v int64 [n] with (score, place): ascending in score, NaN largest, both zeros alike."""
    for j in range(U(score.size)):
        x = score[j]
        b = _ascending(_bits(x + F(0))) if x == x else np.int32(0x7FFFFFFF)  # -0 + 0 is 0
        v[j] = np.int64(b) << 32 | np.int64(j)


@exact
def _before(x, y):
    return x >> 32 > y >> 32


@exact
def _insertion_sort(v, first, last):
    for at in range(first + 1, last):
        moving = v[U(at)]
        while at > first and _before(moving, v[U(at - 1)]):
            v[U(at)] = v[U(at - 1)]
            at -= 1
        v[U(at)] = moving


@exact
def _partition(v, first, last):
    """Split around the median of three, which goes to `first`; returns the cut."""
    a, b, c = first + 1, first + (last - first) // 2, last - 1
    x, y, z = v[U(a)], v[U(b)], v[U(c)]
    if _before(x, y):  # noqa: SIM108 - two lines of three cases, as in C++
        median = b if _before(y, z) else c if _before(x, z) else a
    else:
        median = a if _before(x, z) else c if _before(y, z) else b
    v[U(first)], v[U(median)] = v[U(median)], v[U(first)]
    lowest = v[U(first)] >> 32 << 32  # the pivot with the least place, and with the greatest: between them nothing is before
    highest = lowest | 0xFFFFFFFF
    low, high = first + 1, last
    while True:
        while v[U(low)] > highest:
            low += 1
        high -= 1
        while v[U(high)] < lowest:
            high -= 1
        if low >= high:
            return low
        v[U(low)], v[U(high)] = v[U(high)], v[U(low)]
        low += 1


@exact
def _adjust_heap(v, first, hole, size, moving):
    top, child = hole, hole
    while child < (size - 1) // 2:
        child = 2 * (child + 1)
        if _before(v[U(first + child)], v[U(first + child - 1)]):
            child -= 1
        v[U(first + hole)] = v[U(first + child)]
        hole = child
    if size % 2 == 0 and child == (size - 2) // 2:
        child = 2 * child + 1
        v[U(first + hole)] = v[U(first + child)]
        hole = child
    while hole > top and _before(v[U(first + (hole - 1) // 2)], moving):
        v[U(first + hole)] = v[U(first + (hole - 1) // 2)]
        hole = (hole - 1) // 2
    v[U(first + hole)] = moving


@exact
def _pop_heap(v, first, last, result):
    moving = v[U(result)]
    v[U(result)] = v[U(first)]
    _adjust_heap(v, first, np.int64(0), last - first, moving)


@exact
def _heap_select(v, first, middle, last):
    size = middle - first
    if size > 1:  # make_heap
        for parent in range((size - 2) // 2, -1, -1):
            _adjust_heap(v, first, parent, size, v[U(first + parent)])
    for at in range(middle, last):
        if _before(v[U(at)], v[U(first)]):
            _pop_heap(v, first, middle, at)


@exact
def _partial_sort(v, first, middle, last):
    _heap_select(v, first, middle, last)
    for end in range(middle - 1, first, -1):
        _pop_heap(v, first, end, end)


@exact
def _twice_log2(n):
    depth = 0
    while n > 1:
        n >>= 1
        depth += 2
    return depth


@exact
def _nth_element(v, nth, last):
    first, depth = np.int64(0), _twice_log2(last)
    while last - first > 3:
        if depth == 0:
            _heap_select(v, first, nth + 1, last)
            v[U(first)], v[U(nth)] = v[U(nth)], v[U(first)]
            return
        depth -= 1
        cut = _partition(v, first, last)
        if cut <= nth:
            first = cut
        else:
            last = cut
    _insertion_sort(v, first, last)


@exact
def _sort(v, last):
    if last > 16:
        starts, ends, depths = np.empty(64, np.int64), np.empty(64, np.int64), np.empty(64, np.int64)  # C++ recurses instead
        starts[0], ends[0], depths[0] = 0, last, _twice_log2(last)
        count = 1
        while count > 0:
            count -= 1
            lo, hi, depth = starts[count], ends[count], depths[count]
            while hi - lo > 16:
                if depth == 0:
                    _partial_sort(v, lo, hi, hi)
                    break
                depth -= 1
                cut = _partition(v, lo, hi)
                starts[count], ends[count], depths[count] = cut, hi, depth
                count += 1
                hi = cut
    _insertion_sort(v, np.int64(0), last)


@exact
def _topk(score, v, k, in_order):
    """The places of the k largest of score [n], as torch.topk(sorted=in_order) orders them, in the low halves of v[:k]."""
    _keys(score, v)
    if k * 64 <= score.size:
        _partial_sort(v, np.int64(0), k, score.size)
    else:
        _nth_element(v, k - 1, score.size)
        if in_order:
            _sort(v, k - 1)


@exact
def _place(key):
    return key & 0xFFFFFFFF


# --------------------------------------------------------------------------------------------------------------- gates


@exact
def _softmax_kernel(logits, k, normalise, lanes, indices, weights):
    tokens, n = logits.shape
    p = np.empty(n, np.float32)
    keys = np.empty(n, np.int64)
    chosen = np.empty(k, np.float32)
    acc = np.empty(16, np.float32)
    for t in range(U(tokens)):
        highest = np.int32(-0x80000000)
        for e in range(U(n)):  # integers, for LLVM keeps a maximum of floats out of vector registers: 35 ns against 6
            highest = max(highest, _ascending(_bits(logits[t, e])))  # a NaN of either sign makes the sum below NaN
        top = _as_float32(_ascending(highest))
        for e in range(U(n)):
            p[e] = _exp(logits[t, e] - top)
        scale = F(1) / _sum(p, acc, lanes)
        for e in range(U(n)):
            p[e] *= scale
        _topk(p, keys, k, True)
        for j in range(U(k)):
            indices[t, j] = _place(keys[j])
            chosen[j] = p[U(_place(keys[j]))]
        total = _short_sum(chosen, acc, lanes) if normalise else F(1)
        for j in range(U(k)):
            weights[t, j] = chosen[j] / total


@exact
def _deepseek_v3_kernel(logits, bias, k, n_group, topk_group, normalise, scale, lanes, indices, weights):
    tokens, n = logits.shape
    score = np.empty(n, np.float32)
    choice = np.empty(n, np.float32)
    keys = np.empty(n, np.int64)
    chosen = np.empty(k, np.float32)
    acc = np.empty(16, np.float32)
    group = np.empty(n_group, np.float32)
    size = n // n_group
    by_vector = tokens * n // (2 * lanes) * (2 * lanes)
    for t in range(U(tokens)):
        here = min(max(by_vector - np.int64(t) * n, 0), n)
        for e in range(U(here)):
            score[e] = F(1) / (F(1) + _exp(-logits[t, e]))
        for e in range(U(here), U(n)):
            score[e] = F(1) / (F(1) + F(math.exp(-logits[t, e])))
        for e in range(U(n)):
            choice[e] = score[e] + bias[e]
        if topk_group < n_group:
            for g in range(n_group):
                # Where a NaN is among them the group's score is NaN, as the sum of a NaN and anything.
                first, second, any_nan = F(-np.inf), F(-np.inf), False
                for e in range(U(g * size), U((g + 1) * size)):
                    x = choice[e]
                    any_nan |= x != x
                    second = x if second < x <= first else first if x > first else second
                    first = x if x > first else first
                group[g] = F(np.nan) if any_nan else first + second
            _topk(group, keys, topk_group, False)
            for j in range(topk_group, n_group):
                g = _place(keys[U(j)])
                for e in range(U(g * size), U((g + 1) * size)):
                    choice[e] = F(-np.inf)
        _topk(choice, keys, k, False)
        for j in range(U(k)):
            indices[t, j] = _place(keys[j])
            chosen[j] = score[U(_place(keys[j]))]
        total = _short_sum(chosen, acc, lanes) + F(1e-20) if normalise else F(1)
        for j in range(U(k)):
            weights[t, j] = chosen[j] / total * F(scale)


def softmax_topk(
    logits: np.ndarray, k: int, normalise: bool = True, indices: np.ndarray | None = None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Experts int64 [tokens, k] and weights float32 [tokens, k]: the k largest of softmax(logits), the largest first.

    `logits` float32 [tokens, experts]. `normalise` divides a token's weights by their sum: always in Mixtral and in the
    top-2 gate of Qingzhou's article, `norm_topk_prob` in Qwen2-MoE and Qwen3-MoE. `indices` and `weights` are written
    where given. ValueError or TypeError where an array does not fit. A row with NaN or +inf has weights NaN, as in torch.

    >>> softmax_topk(np.log(np.array([[1, 4, 3, 2]], np.float32)), 2, False)
    (array([[1, 2]]), array([[0.4, 0.3]], dtype=float32))
    """
    _need(logits, "logits", np.float32, 2)
    indices, weights = _outputs(logits, k, indices, weights)
    _softmax_kernel(logits, k, bool(normalise), LANES, indices, weights)
    return indices, weights


def deepseek_v3(
    logits: np.ndarray,
    bias: np.ndarray,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    indices: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Experts int64 [tokens, k] and weights float32 [tokens, k] as DeepSeek-V3's router gives them (arXiv 2412.19437, 2.1.2).

    s = sigmoid(logits), logits float32 [tokens, experts]. Chosen are the k largest of s + bias [experts] within the
    `topk_group` groups whose two largest s + bias sum highest; the order of a token's choices means nothing. Weights are
    s without bias, divided by (their sum + 1e-20) if `normalise` (`norm_topk_prob`), times `scale`
    (`routed_scaling_factor`). `indices` and `weights` are written where given. ValueError or TypeError where one does not fit.

    >>> logits, bias = np.zeros((1, 4), np.float32), np.array([0, 3, 1, 2], np.float32)
    >>> deepseek_v3(logits, bias, 1, scale=2.5)
    (array([[1]]), array([[2.5]], dtype=float32))
    """
    _need(logits, "logits", np.float32, 2)
    _need(bias, "bias", np.float32, 1)
    n = logits.shape[1]
    if bias.size != n:
        raise ValueError(f"bias has {bias.size} numbers for {n} experts; give one per expert, zeros for none")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group} of n_group={n_group}; it must be 1 .. n_group (both 1: no groups)")
    if n % n_group or (n_group > 1 and n < 2 * n_group):
        raise ValueError(f"n_group={n_group} must divide the {n} experts into groups of two or more; 1 means no groups")
    indices, weights = _outputs(logits, k, indices, weights)
    _deepseek_v3_kernel(logits, bias, k, n_group, topk_group, bool(normalise), float(scale), LANES, indices, weights)
    return indices, weights


# ------------------------------------------------------------------------------------------------ to the experts and back


@exact
def _dispatch_kernel(indices, experts, order, offsets):
    choice = indices.reshape(-1)
    at = np.zeros(experts + 1, np.int64)
    for slot in range(choice.size):
        e = choice[slot]
        if e < 0 or e > experts:
            return slot
        at[e] += 1
    total = 0
    for e in range(experts + 1):
        offsets[e] = total
        total += at[e]
        at[e] = offsets[e]
    for slot in range(choice.size):
        e = choice[slot]
        order[at[e]] = slot
        at[e] += 1
    return -1


def dispatch(
    indices: np.ndarray, experts: int, order: np.ndarray | None = None, offsets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """order int64 [tokens * k] and offsets int64 [experts + 1]: the slots of each expert, in the order of tokens.

    Slot t * k + j is token t's choice j. Expert e's slots are order[offsets[e]:offsets[e + 1]], ascending; gather its
    rows with x[order // k]. The index `experts` means none: such slots come last, from offsets[-1] on. `indices` int64
    [tokens, k]; ValueError for an index outside 0 .. experts. `order` and `offsets` are written where given.

    >>> dispatch(np.array([[1, 0], [2, 1]]), 2)
    (array([1, 0, 3, 2]), array([0, 1, 3]))
    """
    _need(indices, "indices", np.int64, 2)
    if experts < 1:
        raise ValueError(f"experts={experts}; there must be at least one")
    if order is None:
        order = np.empty(indices.size, np.int64)
    else:
        _need(order, "order", np.int64, 1)
    if offsets is None:
        offsets = np.empty(experts + 1, np.int64)
    else:
        _need(offsets, "offsets", np.int64, 1)
    if order.size != indices.size or offsets.size != experts + 1:
        raise ValueError(
            f"order {order.shape} and offsets {offsets.shape} must be {(indices.size,)} and {(experts + 1,)}: "
            f"indices {indices.shape}, experts={experts}"
        )
    wrong = _dispatch_kernel(indices, experts, order, offsets)
    if wrong >= 0:
        t, j = divmod(wrong, indices.shape[1])
        raise ValueError(f"indices[{t}, {j}]={indices[t, j]}; experts are 0 .. {experts - 1}, and {experts} means none")
    return order, offsets


@exact
def _combine_kernel(rows, order, weights, out):
    tokens, k = weights.shape
    kept, hidden = rows.shape
    row_of = np.empty(order.size, np.int64)
    for slot in range(order.size):
        row_of[slot] = -1
    for row in range(kept):
        slot = order[row]
        if slot < 0 or slot >= order.size:
            return row
        row_of[slot] = row
    for t in range(U(tokens)):
        for h in range(U(hidden)):
            out[t, h] = F(0)
        for j in range(U(k)):
            row = row_of[t * U(k) + j]
            if row >= 0:
                w, r = weights[t, j], U(row)
                for h in range(U(hidden)):
                    out[t, h] += w * rows[r, h]
    return -1


def combine(rows: np.ndarray, order: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """Fill out float32 [tokens, hidden] with each token's sum over j of weights[t, j] times the row of its choice j.

    `rows` float32 [kept, hidden] belong to the slots order[:kept] (`dispatch`); a slot past them adds nothing, whatever
    its weight, NaN too. `weights` float32 [tokens, k]. Summed in float32 for j = 0 .. k - 1, so the result depends
    neither on the experts' order nor on threads. `out` must not overlap `rows`. ValueError or TypeError where one does not fit.
    """
    _need(rows, "rows", np.float32, 2)
    _need(order, "order", np.int64, 1)
    _need(weights, "weights", np.float32, 2)
    _need(out, "out", np.float32, 2)
    if order.size != weights.size:
        raise ValueError(f"order has {order.size} slots, weights {weights.shape} has {weights.size}; both are tokens * k, from one routing")
    if len(rows) > order.size:
        raise ValueError(f"rows has {len(rows)} rows for {order.size} slots; give one per slot that has an expert, offsets[-1] in all")
    if out.shape != (len(weights), rows.shape[1]):
        raise ValueError(f"out is {out.shape}; weights {weights.shape} and rows {rows.shape} make {(len(weights), rows.shape[1])}")
    wrong = _combine_kernel(rows, order, weights, out)
    if wrong >= 0:
        raise ValueError(f"order[{wrong}]={order[wrong]}; slots are 0 .. {order.size - 1}: pass the order that dispatch returned")


def _need(array: np.ndarray, name: str, dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        raise TypeError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}; give a NumPy array of {np.dtype(dtype)}")
    if array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it must have {ndim} {'axis' if ndim == 1 else 'axes'}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous (strides {array.strides}); pass np.ascontiguousarray({name})")


def _outputs(logits: np.ndarray, k: int, indices: np.ndarray | None, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    tokens, n = logits.shape
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of {n} experts; it must be 1 .. {n}")
    if indices is None:
        indices = np.empty((tokens, k), np.int64)
    else:
        _need(indices, "indices", np.int64, 2)
    if weights is None:
        weights = np.empty((tokens, k), np.float32)
    else:
        _need(weights, "weights", np.float32, 2)
    if indices.shape != (tokens, k) or weights.shape != (tokens, k):
        raise ValueError(f"indices {indices.shape} and weights {weights.shape} must be {(tokens, k)}: logits {logits.shape}, k={k}")
    return indices, weights
