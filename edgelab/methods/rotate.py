"""Orthogonal matrices that spread what lies in single channels over all of them: Hadamard's, and random ones made of it.

A Hadamard matrix H [n, n] holds only +1 and -1 and H H^T = n I, so H / sqrt(n) is orthogonal with all entries of the
same size: a vector with one outlier of magnitude m becomes one with n entries of m / sqrt(n). With random signs first,

    R = diag(+-1) H / sqrt(n)

it does so for any vector, with high probability (QuaRot, arXiv 2404.00456, section 3; QuIP#, arXiv 2402.04396, section 3).

Which n: powers of two (Sylvester), and by Paley's constructions over the integers modulo a prime p, with Q[i, j] = the
Legendre symbol of i - j: for p = 3 (mod 4) order p + 1 (12, 20, 24, 44, 60 ...), for p = 1 (mod 4) order 2 (p + 1)
(28, 36, 76 ...), and Kronecker products of one of these with powers of two. For other n, R is the Kronecker product of
the largest Hadamard that divides n with a small random orthogonal matrix: outliers then spread over blocks, and within
a block as a random rotation spreads them. All in float64: the matrices are made once, and folded into weights.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix float64 [n, n] of +1 and -1. Raises ValueError for an order that is not built here.

    >>> hadamard(4)
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]], dtype=torch.float64)
    >>> h = hadamard(28)
    >>> bool((h @ h.T == 28 * torch.eye(28)).all())
    True
    """
    if n < 1:
        raise ValueError(f"n={n} must be 1 or more")
    seed = _seed_order(n)
    if seed is None:
        raise ValueError(f"n={n} is no order of a Hadamard matrix built here (2^k, or 2^k times 12, 20, 28 ...); use random_rotation(n)")
    h = _paley(seed) if seed > 1 else np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return torch.from_numpy(h)


def random_rotation(n: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix float64 [n, n] with all entries of about the same size; the same for the same `n` and `seed`.

    >>> r = random_rotation(48, seed=1)
    >>> bool((r @ r.T - torch.eye(48)).abs().max() < 1e-12), bool(torch.allclose(r.abs(), torch.tensor(48**-0.5).double()))
    (True, True)
    """
    if n < 1:
        raise ValueError(f"n={n} must be 1 or more")
    random = torch.Generator().manual_seed(seed)
    m = next(m for m in range(1, n + 1) if n % m == 0 and _seed_order(n // m))  # the part that no Hadamard covers
    h = hadamard(n // m) / (n // m) ** 0.5
    if m > 1:
        q, r = torch.linalg.qr(torch.randn(m, m, generator=random, dtype=torch.float64))
        h = torch.kron(h, (q * r.diagonal().sign()).contiguous())  # signs that make it uniform over all rotations
    signs = torch.randint(0, 2, (n, 1), generator=random).double() * 2 - 1
    return signs * h


@cache
def _seed_order(n: int) -> int | None:
    """The least order of a Paley matrix (or 1) that n is a power of two times; None when there is none."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    orders = (odd << k for k in range(2, n.bit_length()) if n % (odd << k) == 0)
    return next((m for m in orders if _is_prime(m - 1) or (m % 8 == 4 and _is_prime(m // 2 - 1))), None)


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


def _paley(n: int) -> np.ndarray:
    """Paley's matrix of order n = p + 1 (first construction) or 2 (p + 1) (second), p a prime."""
    first = _is_prime(n - 1)
    p = n - 1 if first else n // 2 - 1
    legendre = -np.ones(p)
    legendre[np.arange(1, p) ** 2 % p] = 1
    legendre[0] = 0
    i = np.arange(p)
    s = np.ones((p + 1, p + 1))  # the bordered Jacobsthal matrix: [[0, 1], [+-1, Q]]
    s[0, 0] = 0
    s[1:, 1:] = legendre[(i[:, None] - i) % p]
    if first:  # skew: S^T = -S and S S^T = p I, so (I + S)(I + S)^T = (p + 1) I
        s[1:, 0] = -1
        return s + np.eye(p + 1)
    # symmetric: S S = p I; each 0 becomes [[1, -1], [-1, -1]], each +-1 becomes +-[[1, 1], [1, -1]]
    return np.kron(s, [[1, 1], [1, -1]]) + np.kron(np.eye(p + 1), [[1, -1], [-1, -1]])
