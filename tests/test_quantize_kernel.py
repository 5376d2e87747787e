"""The kernel that rounds and packs rows of a file: codes and scales are those of `round_to_nearest` and a plain twin, bit for bit."""

import numpy as np
import pytest
import torch

from edgelab.kernels.quantize import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NO_SCALE,
    _from_half,
    _to_half,
    count_broken,
    largest_of_rows,
    quantize_rows,
    scale_of,
)
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import pack, unpack
from edgelab.scheme import QuantScheme

FORMS = {BFLOAT16: (torch.bfloat16, torch.uint16), FLOAT16: (torch.float16, torch.uint16), FLOAT32: (torch.float32, torch.uint32)}


def run(source, form, scheme, given=NO_SCALE):
    rows, n = source.shape
    groups = scheme.groups(n)
    packed, scales, found = np.zeros((rows, scheme.row_bytes(n)), np.uint8), np.zeros((rows, groups), np.uint16), np.zeros(4)
    quantize_rows(source, form, scheme.bits, n // groups, given, packed, scales, found)
    return packed, scales.view(np.float16), found


def bits_of(w, form):
    return w.to(FORMS[form][0]).view(FORMS[form][1]).numpy()


def twin(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, n] and scales float16 [rows, n / group] of w float32, group by group."""
    half, codes, scales = 2 ** (bits - 1), np.empty(w.shape, np.uint8), np.empty((len(w), w.shape[1] // group), np.float16)
    for r, row in enumerate(w.reshape(len(w), -1, group)):
        for g, v in enumerate(row):
            scales[r, g] = v[np.abs(v).argmax()] / np.float32(-half)
            s = np.float32(scales[r, g])
            q = np.rint(v / s) if s else np.zeros(group)
            codes[r, g * group : (g + 1) * group] = np.clip(q, -half, half - 1) + half
    return codes, scales


def awkward(rows: int, n: int) -> torch.Tensor:
    """Rows of many sizes, among them zeros of both signs, ties of m and -m, and what float16 scales can't hold well."""
    w = torch.randn(rows, n) * torch.exp(2 * torch.randn(rows, 1))
    w[0], w[1] = 0, -0.0
    w[2, ::2], w[2, 1::2] = -0.0, 0.0
    w[3] = torch.round(2 * torch.randn(n))
    w[4] *= 1e-6
    w[5], w[6] = 2.0, -2.0
    w[7] = torch.where(torch.arange(n) % 2 == 0, 3.0, -3.0)
    return w


@pytest.mark.parametrize("text", ["int4-g32", "int4-g8", "int3-g32", "int2-g64", "int8-g128", "int8-row", "int3-row"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*so small")
def test_equals_round_to_nearest(text, form):
    scheme, w = QuantScheme.parse(text), awkward(16, 384).to(FORMS[form][0])
    packed, scales, found = run(bits_of(w, form), form, scheme)
    want = round_to_nearest(w, scheme)
    np.testing.assert_array_equal(packed, want.packed)
    np.testing.assert_array_equal(scales.view(np.uint16), want.scales.view(np.uint16))  # the sign of a zero, too
    codes, s = twin(w.float().numpy(), scheme.bits, 384 // scheme.groups(384))
    np.testing.assert_array_equal(unpack(packed, scheme.bits, 384), codes)
    np.testing.assert_array_equal(scales.view(np.uint16), s.view(np.uint16))
    assert found[0] == found[1] == 0


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_that_end_inside_a_byte(n, bits):
    w = torch.randn(3, n)
    packed, _, _ = run(bits_of(w, FLOAT32), FLOAT32, QuantScheme.parse(f"int{bits}-row"))
    np.testing.assert_array_equal(packed, pack(twin(w.numpy(), bits, n)[0], bits))


def test_every_float16_and_its_neighbours_convert_as_numpy_does():
    halves = np.arange(0x7C00, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    between = (values[:-1] + values[1:]) / 2  # ties
    for x in (values[::31], between[::31], np.nextafter(between[::31], np.float32(0)), np.nextafter(between[::31], np.float32(9e9))):
        for v in (*x, *-x):
            assert _to_half(v) == np.float16(v).view(np.uint16)
    for h in (*halves[::31], *(halves[::31] | 0x8000)):
        assert np.float32(_from_half(np.int64(h))).view(np.uint32) == h.view(np.float16).astype(np.float32).view(np.uint32)
    for v in (65504, 65519.9, 65520, 1e6, -7e4, 1e-9, -(2.0**-25), 3e-8):
        with np.errstate(over="ignore"):
            assert _to_half(np.float32(v)) == np.float16(np.float32(v)).view(np.uint16), v


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_weights_are_counted(form, value):
    w = torch.randn(4, 64)
    w[1, 3], w[1, 40], w[3, 63] = value, value, -value
    source = bits_of(w, form)
    for given in (NO_SCALE, np.float32(0.5)):
        _, _, found = run(source, form, QuantScheme.parse("int4-g32"), given)
        assert found.tolist() == [3, 0, 0, 0]
    assert count_broken(source, form) == 3 and count_broken(source[:1], form) == 0


def test_scales_beyond_float16_and_those_it_holds_badly_are_counted():
    w = torch.full((3, 32), 1e-3)
    w[0, 5], w[1] = 1e6, 3e-8
    _, _, found = run(bits_of(w, FLOAT32), FLOAT32, QuantScheme.parse("int4-g32"))
    assert found[1] == 1 and found[2] == 1 and found[3] == np.float32(3e-8)


@pytest.mark.parametrize("top", [5.0, -5.0])
def test_one_scale_for_a_matrix_that_comes_in_parts(top):
    scheme = QuantScheme.parse("int3-tensor")
    w = torch.randn(6, 40).clamp(-4, 4)
    w[2, 7], w[4, 1] = top, -top  # the first one counts
    source, largest = bits_of(w, FLOAT32), NO_SCALE
    for part in (source[:2], source[2:3], source[3:]):
        largest = largest_of_rows(part, FLOAT32, largest)
    assert largest == top
    scale = scale_of(largest, 3)
    packed, _, _ = run(source, FLOAT32, scheme, np.float32(scale))
    want = round_to_nearest(w, scheme)
    np.testing.assert_array_equal(packed, want.packed)
    assert scale == want.scales[0, 0]
