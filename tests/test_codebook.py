"""The arithmetic that all methods share: nearest levels, ties, stored scales, the way into a QTensor."""

import numpy as np
import pytest
import torch

from edgelab.methods import codebook
from edgelab.methods.codebook import codes_of, nearest, pack, stored
from edgelab.scheme import QuantScheme

TABLES = ["nf4-g64", "fp4-g64", "mxfp4-g32"]


@pytest.mark.parametrize("text", [*TABLES, "int4-row", "int2-row", "uint3-row", "int8-row"])
def test_nearest_is_the_nearest_of_all_levels(text):
    scheme = QuantScheme.parse(text)
    x = torch.randn(50, 40) * float(np.abs(scheme.table).max())
    found = nearest(x, scheme)
    best = (x[..., None].double() - torch.tensor(scheme.table).double()).abs().amin(-1)
    torch.testing.assert_close((x.double() - found.double()).abs(), best, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(scheme.table[codes_of(found, scheme)], found.numpy())


@pytest.mark.parametrize("text", TABLES)
def test_many_numbers_take_another_way_to_the_same_levels(text, monkeypatch):
    """Comparisons instead of a search; on a grid with every tie, and not contiguous."""
    scheme = QuantScheme.parse(text)
    x = torch.cat([torch.arange(-64, 65) / 8, torch.from_numpy(scheme.table[1:] + scheme.table[:-1]) / 2]).reshape(-1, 9).T
    monkeypatch.setattr(codebook, "_FEW", 0)
    many = nearest(x, scheme)
    monkeypatch.setattr(codebook, "_FEW", 1 << 30)
    assert torch.equal(many, nearest(x, scheme))


def test_ties_of_mxfp_go_to_the_even_mantissa_on_both_sides_of_zero():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    scheme = QuantScheme.parse("mxfp4-g32")
    assert torch.equal(nearest(ties, scheme), even)
    assert torch.equal(nearest(-ties, scheme), -even)
    assert (codes_of(nearest(torch.tensor([-0.1]), scheme), scheme) == 0).all()  # one zero, the positive one


def test_scales_of_mxfp_are_exact_powers_of_two_as_bytes():
    scheme = QuantScheme.parse("mxfp4-g32")
    scale = stored(torch.tensor([[1.0], [0.99], [3.5], [2.0**-20], [1e-45], [2.0**120]]), scheme)
    assert scale.flatten().tolist() == [1.0, 0.5, 2.0, 2.0**-20, 2.0**-126, 2.0**120]
    q = pack(np.full((6, 32), 2, np.uint8), scale, None, scheme, (6, 32))  # code 2 is 1.0
    np.testing.assert_array_equal(q.dequantize(), scale.numpy() * np.ones(32, np.float32))
