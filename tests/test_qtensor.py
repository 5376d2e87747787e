"""The packed layout: exact round trips, exact sizes, errors that name the way out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import BITS, PerChannel, PerGroup, PerTensor, QuantScheme

schemes = st.builds(
    QuantScheme, st.sampled_from(BITS), st.sampled_from([PerTensor(), PerChannel(), PerGroup(8), PerGroup(24), PerGroup(32)])
)


@st.composite
def qtensors(draw):
    """A scheme, codes of a matrix or a stack, and scales that fit."""
    scheme = draw(schemes)
    n = draw(st.integers(1, 40))
    if isinstance(scheme.granularity, PerGroup):
        n = scheme.granularity.size * (1 + n % 3)
    shape = (*draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 5)), n)
    codes = draw(arrays(np.uint8, shape, elements=st.integers(0, scheme.levels - 1)))
    scales = draw(arrays(np.float16, scheme.scales_shape(shape), elements=st.floats(-100, 100, width=16)))
    return scheme, codes, scales


@given(st.sampled_from(BITS), st.data())
def test_pack_round_trip_is_exact(bits, data):
    shape = data.draw(st.sampled_from([(1,), (7,), (8,), (3, 9), (2, 3, 17)]))
    codes = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (*shape[:-1], (shape[-1] * bits + 7) // 8)
    np.testing.assert_array_equal(unpack(packed, bits, shape[-1]), codes)


@given(st.sampled_from(BITS), st.integers(1, 30), st.randoms(use_true_random=False))
def test_pack_is_a_little_endian_bit_stream(bits, n, random):
    codes = [random.randrange(2**bits) for _ in range(n)]
    number = sum(q << (bits * k) for k, q in enumerate(codes))  # the definition, in one big integer
    assert pack(np.array(codes, np.uint8), bits).tobytes() == number.to_bytes((n * bits + 7) // 8, "little")


@given(qtensors())
def test_from_codes_keeps_codes_scales_and_counts_its_bytes(parts):
    scheme, codes, scales = parts
    q = QTensor.from_codes(codes, scales, scheme)
    np.testing.assert_array_equal(q.codes(), codes)
    assert q.nbytes == scheme.nbytes(codes.shape) == q.packed.nbytes + q.scales.nbytes
    assert q.bits_per_weight == 8 * q.nbytes / codes.size
    assert f"{q.nbytes:,} bytes" in repr(q) and str(scheme) in repr(q)


@given(qtensors())
def test_dequantize_is_the_value_rule(parts):
    scheme, codes, scales = parts
    w = QTensor.from_codes(codes, scales, scheme).dequantize()
    assert w.dtype == np.float32 and w.shape == codes.shape
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else codes.shape[-1]
    for index in np.ndindex(codes.shape):
        row = 0 if isinstance(scheme.granularity, PerTensor) else index[-2]
        s = float(scales[(*index[:-2], row, index[-1] // size)])
        assert w[index] == s * (int(codes[index]) - 2 ** (scheme.bits - 1))


def test_an_expert_is_a_view():
    s = QuantScheme(4, PerGroup(8))
    codes = np.arange(2 * 3 * 8, dtype=np.uint8).reshape(2, 3, 8) % 16
    stack = QTensor.from_codes(codes, np.ones((2, 3, 1), np.float16), s)
    assert np.shares_memory(stack[1].packed, stack.packed)
    np.testing.assert_array_equal(stack[1].codes(), codes[1])
    with pytest.raises(TypeError, match="only an expert stack"):
        stack[1][0]


def test_errors_say_what_is_needed():
    s = QuantScheme(4, PerGroup(32))
    with pytest.raises(ValueError, match=r"code 16 does not fit int4-g32: codes are 0 \.\. 15"):
        QTensor.from_codes(np.full((1, 32), 16, np.uint8), np.ones((1, 1), np.float16), s)
    with pytest.raises(ValueError, match="scales hold NaN or infinity"):
        QTensor.from_codes(np.zeros((1, 32), np.uint8), np.full((1, 1), np.inf, np.float16), s)
    with pytest.raises(ValueError, match=r"packed is uint8 \(1, 15\); int4-g32 of \(1, 32\) needs uint8 \(1, 16\)"):
        QTensor(np.zeros((1, 15), np.uint8), np.ones((1, 1), np.float16), (1, 32), s)
    with pytest.raises(ValueError, match=r"scales are float32 \(1, 1\); .* needs float16 \(1, 1\)"):
        QTensor(np.zeros((1, 16), np.uint8), np.ones((1, 1), np.float32), (1, 32), s)


def test_codes_of_another_type_and_scales_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="codes are int64"):
        QTensor.from_codes(np.array([[-1, 3]]), np.array([[1.0]]), QuantScheme.parse("int8-row"))
    with pytest.raises(ValueError, match="scales hold NaN or infinity"):
        QTensor.from_codes(np.array([[1, 3]], np.uint8), np.array([[1e6]]), QuantScheme.parse("int4-row"))
