"""The NumPy twin of every kernel: what it computes, said as plainly as possible.

`PAIRS` drives the equality tests and the benchmarks: kernel name -> (kernel, reference, maker). A maker takes a NumPy
generator and the sizes as keywords and returns arguments for either function, the output array last.
`BOUNDS` holds, for a kernel of floats, how far it may lie from its twin: float64 of the output's shape.
"""

import numpy as np

from edgelab.kernels.matmul import qmatmul as _qmatmul
from edgelab.kernels.matmul import qmatmul_experts as _qmatmul_experts


def weight(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, n: int) -> np.ndarray:
    """The weight float64 [out, n] of packed codes uint8 [out, row_bytes] and float16 scales as int16 [out or 1, groups].

    >>> weight(np.array([[0x21, 0xF3]], np.uint8), np.array([[0.5]], np.float16).view(np.int16), 4, 0, 4)
    array([[-3.5, -3. , -2.5,  3.5]])
    """
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[:, : n * bits]  # the definition: a little-endian bit stream
    codes = stream.reshape(len(packed), n, bits) @ (1 << np.arange(bits))
    s = scales.view(np.float16).astype(np.float64)
    return (codes - 2 ** (bits - 1)) * np.repeat(s, group_size or n, axis=1)


def qmatmul(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, y: np.ndarray) -> None:
    """Fill y [tokens, out] with x [tokens, in] times the transposed weight, summed in float64."""
    y[:] = x.astype(np.float64) @ weight(packed, scales, bits, group_size, x.shape[1]).T


def qmatmul_experts(
    packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, offsets: np.ndarray, y: np.ndarray
) -> None:
    """`qmatmul` of the tokens offsets[e] .. offsets[e + 1] - 1 with expert e, for each e."""
    for e in range(len(packed)):
        lo, hi = offsets[e], offsets[e + 1]
        qmatmul(packed[e], scales[e], bits, group_size, x[lo:hi], y[lo:hi])


# How far the kernel may lie from the twin. A value w = s * (q - 2**(b-1)) is exact in float32: 11 bits of a float16 times
# at most 8. So only the n products and their sum round, each by at most u = 2**-24 of its result. In whatever order the
# sum is taken, and fused or not, |error| <= g * sum_k |w_k x_k| with g = n u / (1 - n u) (Higham, Accuracy and Stability
# of Numerical Algorithms, 2nd ed., section 3.1); the twin's float64 errors are 2**-29 of that, and storing it as float32
# adds one more u. A product below float32's normal range loses at most 2**-126 (all of it, where such are flushed to 0).
def _bound(magnitudes: np.ndarray, n: int) -> np.ndarray:
    g = (n + 2) * 2.0**-24
    return g / (1 - g) * magnitudes + n * 2.0**-126


def qmatmul_bound(packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Largest difference [tokens, out] between kernel and twin for these arguments."""
    w = weight(packed, scales, bits, group_size, x.shape[1])
    return _bound(np.abs(x.astype(np.float64)) @ np.abs(w).T, x.shape[1])


def qmatmul_experts_bound(
    packed: np.ndarray, scales: np.ndarray, bits: int, group_size: int, x: np.ndarray, offsets: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Largest difference [tokens, out] between kernel and twin for these arguments."""
    parts = [
        qmatmul_bound(packed[e], scales[e], bits, group_size, x[offsets[e] : offsets[e + 1]], y[offsets[e] : offsets[e + 1]])
        for e in range(len(packed))
    ]
    return np.concatenate(parts)


def make_qmatmul(
    rng: np.random.Generator, *, bits: int = 4, group_size: int = 32, per_tensor: bool = False, out: int = 64, n: int = 128, tokens: int = 5
) -> tuple:
    """Arguments of `qmatmul`: random bytes, so every code occurs and a row's unused last bits are not zero.

    Scales of both signs over float16's whole range of exponents, its subnormal numbers too.
    """
    packed, scales = _weights(rng, (out,), bits, group_size, per_tensor, n)
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    return packed, scales, bits, group_size, x, np.full((tokens, out), np.nan, np.float32)


def make_qmatmul_experts(
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    per_tensor: bool = False,
    out: int = 64,
    n: int = 128,
    tokens: int = 5,
    experts: int = 4,
) -> tuple:
    """Arguments of `qmatmul_experts`: tokens fall to the experts at random, the first expert gets none."""
    packed, scales = _weights(rng, (experts, out), bits, group_size, per_tensor, n)
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    offsets = np.concatenate([[0, 0], np.sort(rng.integers(0, tokens + 1, experts - 2)), [tokens]])
    return packed, scales, bits, group_size, x, offsets.astype(np.int64), np.full((tokens, out), np.nan, np.float32)


def _weights(
    rng: np.random.Generator, rows: tuple[int, ...], bits: int, group_size: int, per_tensor: bool, n: int
) -> tuple[np.ndarray, np.ndarray]:
    packed = rng.integers(0, 256, (*rows, (n * bits + 7) // 8), np.uint8)
    shape = (*rows[:-1], 1 if per_tensor else rows[-1], n // group_size if group_size else 1)
    scales = rng.standard_normal(shape) * 2.0 ** rng.integers(-24, 8, shape)
    return packed, scales.astype(np.float16).view(np.int16)


PAIRS = {
    "qmatmul": (_qmatmul, qmatmul, make_qmatmul),
    "qmatmul_experts": (_qmatmul_experts, qmatmul_experts, make_qmatmul_experts),
}
BOUNDS = {"qmatmul": qmatmul_bound, "qmatmul_experts": qmatmul_experts_bound}
