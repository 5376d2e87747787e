"""`QuantScheme`: text round trip, exact sizes, errors that name the way out."""

import re

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

from edgelab.qtensor import QTensor
from edgelab.scheme import BITS, CODEBOOKS, PerChannel, PerGroup, PerTensor, QuantScheme

granularities = st.one_of(st.just(PerTensor()), st.just(PerChannel()), st.integers(1, 32).map(lambda n: PerGroup(8 * n)))
schemes = st.one_of(
    st.builds(QuantScheme, st.sampled_from(BITS), granularities, st.sampled_from(["int", "uint"])),
    st.builds(QuantScheme, st.just(4), granularities, st.sampled_from(["nf", "fp"])),
    st.just(QuantScheme(4, PerGroup(32), "mxfp")),
)


@given(schemes)
def test_text_round_trip(scheme):
    assert QuantScheme.parse(str(scheme)) == scheme


def test_every_codebook_is_drawn():
    for codebook in CODEBOOKS:
        find(schemes, lambda s, c=codebook: s.codebook == c)


@given(schemes, st.integers(1, 3), st.integers(1, 5), st.integers(1, 50), st.booleans())
def test_nbytes_is_what_the_tensor_takes(scheme, experts, out, n, stack):
    if isinstance(scheme.granularity, PerGroup):
        n = scheme.granularity.size * (1 + n % 2)
    shape = (experts, out, n) if stack else (out, n)
    scales = np.zeros(scheme.scales_shape(shape), scheme.scale_dtype)
    offsets = np.zeros(scales.shape, np.float16) if scheme.asymmetric else None
    q = QTensor.from_codes(np.zeros(shape, np.uint8), scales, scheme, offsets)
    assert scheme.nbytes(shape) == q.packed.nbytes + q.scales.nbytes + (0 if offsets is None else q.offsets.nbytes) == q.nbytes
    assert scheme.bits_per_weight(shape) == 8 * q.nbytes / np.prod(shape)


@pytest.mark.parametrize(
    "text, bits_per_weight",
    [
        ("int4-g32", 4.5),
        ("int4-g128", 4.125),
        ("int8-row", 8 + 16 / 256),
        ("int3-g64", 3.25),
        ("int2-g32", 2.5),
        ("int4-tensor", 4 + 16 / 128 / 256),
    ],
)
def test_bits_per_weight_by_hand(text, bits_per_weight):
    assert QuantScheme.parse(text).bits_per_weight((128, 256)) == bits_per_weight


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuantScheme(5), "bits=5 is not one of (2, 3, 4, 8)"),
        (lambda: QuantScheme.parse("int6-row"), "bits=6 is not one of"),
        (lambda: QuantScheme.parse("nf4"), "scheme='nf4' is not of the form <int|uint|nf|fp|mxfp><bits>-<tensor|row|g<size>>"),
        (lambda: PerGroup(20), "group_size=20 must be a positive multiple of 8; use 32, 64 or 128"),
        (lambda: PerGroup(0), "group_size=0 must be"),
        (lambda: QuantScheme(4, "row"), "granularity='row' is not PerTensor(), PerChannel() or PerGroup(n)"),
        (lambda: QuantScheme(4, codebook="nf4"), "codebook='nf4' is not known"),
        (lambda: QuantScheme(4, PerGroup(48)).groups(128), "group_size=48 does not divide in_features=128; use 128 or 64 or 32"),
        (lambda: QuantScheme(4, PerGroup(32)).groups(33), "group_size=32 does not divide in_features=33; use PerChannel()"),
    ],
)
def test_errors_name_the_value_and_the_way_out(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_integers_of_any_kind_and_nothing_else():
    import numpy as np

    scheme = QuantScheme(np.int64(4), PerGroup(np.int64(32)))
    assert str(scheme) == "int4-g32" and type(scheme.bits) is int and type(scheme.granularity.size) is int
    for wrong in (4.0, "4", None):
        with pytest.raises(ValueError, match="bits="):
            QuantScheme(wrong)
