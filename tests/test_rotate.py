"""Hadamard matrices by their definition, rotations by theirs, and that they spread what they are for."""

import pytest
import scipy.linalg
import torch

from edgelab.methods.rotate import hadamard, random_rotation

PALEY = [12, 20, 24, 28, 36, 44, 60, 76, 140, 180]
ORDERS = [1, 2, 4, 8, 64, 256, *PALEY, 40, 48, 56, 96, 896]


@pytest.mark.parametrize("n", ORDERS)
def test_a_hadamard_matrix_is_one(n):
    h = hadamard(n)
    assert h.dtype == torch.float64 and h.abs().eq(1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_powers_of_two_are_scipys(n):
    assert (hadamard(n).numpy() == scipy.linalg.hadamard(n)).all()


@pytest.mark.parametrize("n", [0, -4, 3, 6, 52, 100])
def test_other_orders_are_refused(n):
    # 52 and 100 exist, over the fields of 25 and 49 elements, which are not built
    with pytest.raises(ValueError, match=f"n={n} "):
        hadamard(n)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 18, 48, 50, 52, 100, 192, 640])
def test_a_rotation_is_orthogonal(n):
    r = random_rotation(n, seed=3)
    assert r.shape == (n, n) and r.dtype == torch.float64
    torch.testing.assert_close(r @ r.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_rotation_is_its_seeds():
    assert torch.equal(random_rotation(48, 1), random_rotation(48, 1))
    assert not torch.equal(random_rotation(48, 1), random_rotation(48, 2))
    assert not torch.equal(random_rotation(3, 1), random_rotation(3, 2))
    with pytest.raises(ValueError, match="n=0"):
        random_rotation(0)


@pytest.mark.parametrize("n", [64, 192, 256, 640])
def test_a_rotation_spreads_outliers(n):
    x = torch.randn(200, n, dtype=torch.float64)
    x[:, 5] *= 50
    turned = x @ random_rotation(n)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))

    def crest(t):  # the largest of a row over its root mean square: what a scale per token has to bear
        return (t.abs().amax(1) / t.square().mean(1).sqrt()).mean()

    assert crest(x) > 0.6 * n**0.5 and crest(turned) < 4
