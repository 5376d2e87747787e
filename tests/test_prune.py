"""Scores and masks of pruning: against readable naive versions, counts that are exact, ties, and what SparseGPT must gain."""

import re

import numpy as np
import pytest
import torch

from edgelab.methods.gptq import gptq
from edgelab.methods.prune import counts, keep, keep_global, keep_n_of_m, share_out, sparsegpt, wanda
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import QuantScheme

SHAPES = [(1, 1), (3, 7), (8, 16), (20, 260)]


def inputs(n: int, tokens: int = 400, seed: int = 0, decades: float = 1.0) -> torch.Tensor:
    """Correlated inputs of sizes that are `decades` above and below 1, neighbours' too."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5 + torch.eye(n)
    return torch.randn(tokens, n, generator=generator) @ mix * torch.logspace(-decades, decades, n)[torch.randperm(n, generator=generator)]


# ------------------------------------------------------------------------------------------------------ naive versions


def naive_wanda(weight: torch.Tensor, x: torch.Tensor, sparsity: float) -> torch.Tensor:
    """As in the paper's PyTorch code (algorithm 1): metric, sort in each row, the first `sparsity` of them become zero."""
    metric = weight.abs() * x.norm(p=2, dim=0)
    sorted_index = torch.sort(metric, dim=1, stable=True)[1]
    pruned = weight.clone()
    pruned.scatter_(1, sorted_index[:, : int(weight.shape[1] * sparsity)], 0.0)
    return pruned


def naive_sparsegpt(weight: np.ndarray, h: np.ndarray, sparsity=None, n_of_m=None, damping=0.01, block=128) -> np.ndarray:
    """Algorithm 1 of arXiv 2301.00774, float64: the inverse, its upper Cholesky factor, updates of all later columns at once."""
    w, n = weight.astype(np.float64).copy(), len(h)
    h = h + damping * np.mean(np.diag(h)) * np.eye(n)
    u = np.linalg.cholesky(np.linalg.inv(h)).T  # upper: H^-1 = L L^T, and torch's cholesky(upper=True) is L^T
    mask = np.ones_like(w, bool)  # True: stays
    for i in range(0, n, block):
        columns = slice(i, min(i + block, n))
        if n_of_m is None:
            score = w[:, columns] ** 2 / np.diag(u)[columns] ** 2
            gone = int(np.floor(sparsity * score.size + 0.5))
            order = np.argsort(score, axis=None, kind="stable")[:gone]
            part = mask[:, columns].copy()
            part.flat[order] = False
            mask[:, columns] = part
        for j in range(columns.start, columns.stop):
            if n_of_m is not None and j % n_of_m[1] == 0:
                few, of = n_of_m
                score = w[:, j : j + of] ** 2 / np.diag(u)[j : j + of] ** 2
                worst = np.argsort(score, axis=1, kind="stable")[:, : of - few]
                np.put_along_axis(mask[:, j : j + of], worst, False, 1)
            error = np.where(mask[:, j], 0.0, w[:, j]) / u[j, j]
            w[:, j:] -= np.outer(error, u[j, j:])
            w[~mask[:, j], j] = 0.0
    return w


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.7, 1 / 3, 0.999, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_exact(shape, sparsity):
    out, n = shape
    scores = torch.rand(shape)
    wanted = int(np.floor(sparsity * out * n + 0.5))
    for within in ("row", "matrix"):
        assert int((~keep(scores, sparsity, within)).sum()) == wanted
    each = (~keep(scores, sparsity)).sum(1)
    assert each.max() - each.min() <= 1
    both = keep_global({"a": scores, "b": scores + 0.5}, sparsity)
    assert sum(int((~m).sum()) for m in both.values()) == int(np.floor(sparsity * 2 * out * n + 0.5))
    assert sum(counts(sparsity, out, n)) == wanted
    pruned = sparsegpt(torch.randn(shape) + 3, torch.eye(n), sparsity, block=4)
    assert int((pruned == 0).sum()) == wanted


def test_what_goes_is_what_is_lowest():
    scores = torch.rand(6, 40)
    mask = keep(scores, 0.35)
    for row, stays in zip(scores, mask, strict=True):
        assert row[~stays].max() < row[stays].min()
    mask = keep(scores, 0.35, "matrix")
    assert scores[~mask].max() < scores[mask].min()
    masks = keep_global({"a": scores, "b": 2 * scores}, 0.5)
    gone, left = (torch.cat([s[m if left else ~m] for s, m in ((scores, masks["a"]), (2 * scores, masks["b"]))]) for left in (False, True))
    assert gone.max() < left.min() and len(gone) == len(left)


def test_ties_go_by_position():
    ones = torch.ones(2, 8)
    assert keep(ones, 0.25).int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]] * 2
    assert keep(ones, 0.5, "matrix").int().tolist() == [[0] * 8, [1] * 8]
    assert keep_n_of_m(ones, 2, 4).int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] * 2
    masks = keep_global({"a": ones, "b": ones}, 0.75)
    assert masks["a"].sum() == 0 and masks["b"].int().tolist() == [[0] * 8, [1] * 8]


def test_experts_are_matrices_of_their_own():
    scores = torch.rand(3, 5, 12) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    for within in ("row", "matrix"):
        for e in range(3):
            assert torch.equal(keep(scores, 0.4, within)[e], keep(scores[e], 0.4, within))
    x = [inputs(12, seed=e) for e in range(3)]
    xx, w = torch.stack([a.T @ a for a in x]), torch.randn(3, 5, 12)
    ref = torch.stack([sparsegpt(w[e], xx[e], s) for e, s in enumerate((0.25, 0.5, 0.75))])
    torch.testing.assert_close(sparsegpt(w, xx, [0.25, 0.5, 0.75]), ref, rtol=0, atol=0)
    assert (sparsegpt(w, xx, [0.25, 0.5, 0.75]) == 0).sum((1, 2)).tolist() == [15, 30, 45]


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 2), (3, 4)])
def test_n_of_m_holds_in_every_group(pattern):
    n, m = pattern
    w, x = torch.randn(6, 48), inputs(48)
    for pruned in (w * keep_n_of_m(w.abs(), n, m), sparsegpt(w, x.T @ x, n_of_m=pattern)):
        assert ((pruned != 0).unflatten(-1, (-1, m)).sum(-1) == n).all()


# --------------------------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_wanda_equals_the_papers_code(sparsity):
    w, x = torch.randn(24, 64), inputs(64)
    mask = keep(wanda(w, x.square().sum(0)), sparsity)
    assert torch.equal(w.masked_fill(~mask, 0.0), naive_wanda(w, x, sparsity))
    assert not torch.equal(mask, keep(w.abs(), sparsity))  # the inputs matter


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"sparsity": 0.5, "block": 32}, {"n_of_m": (2, 4)}, {"n_of_m": (4, 8)}]
)
def test_sparsegpt_equals_the_algorithm_with_an_inverse(settings):
    """The masks to the last weight: statistics that are mild enough for float32 and float64 to rank alike."""
    w, x = torch.randn(12, 160), inputs(160, tokens=4000, decades=0.3)
    xx = x.T @ x
    pruned = sparsegpt(w, xx, **settings)
    ref = naive_sparsegpt(w.numpy(), xx.double().numpy(), **settings)
    np.testing.assert_array_equal(pruned.numpy() == 0, ref == 0)
    np.testing.assert_allclose(pruned.numpy(), ref, rtol=2e-3, atol=2e-3)


def loss(w: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    return float((x.double() @ (w - pruned).double().T).square().sum())


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_each_method_loses_less_than_the_one_before(n_of_m):
    w, x = torch.randn(32, 128), inputs(128, tokens=2000)

    def masked(scores, within):
        return w.masked_fill(~(keep_n_of_m(scores, *n_of_m) if n_of_m else keep(scores, 0.5, within)), 0.0)

    lost = [
        loss(w, p, x)
        for p in (masked(w.abs(), "matrix"), masked(wanda(w, x.square().sum(0)), "row"), sparsegpt(w, x.T @ x, 0.5, n_of_m=n_of_m))
    ]
    assert lost[1] < 0.5 * lost[0] and lost[2] < 0.9 * lost[1], lost


def test_what_is_zero_stays_zero_and_is_counted():
    w, x = torch.randn(8, 64), inputs(64)
    first = sparsegpt(w, x.T @ x, 0.5)
    for second in (sparsegpt(first, x.T @ x, 0.25), sparsegpt(first, x.T @ x, 0.5), sparsegpt(first, x.T @ x, n_of_m=(2, 4))):
        assert (second[first == 0] == 0).all()
    assert int((sparsegpt(first, x.T @ x, 0.5) == 0).sum()) == 8 * 32
    assert not torch.signbit(first[first == 0]).any()  # 0.0, not -0.0: sparse storage tells them apart


def test_no_tokens_means_magnitude():
    w = torch.randn(4, 8)
    with pytest.warns(UserWarning, match=re.escape("up saw no token in calibration (xx is zero): pruned by magnitude instead")):
        pruned = sparsegpt(w, torch.zeros(8, 8), 0.5, name="up")
    assert torch.equal(pruned, w.masked_fill(~keep(w.abs(), 0.5, "matrix"), 0.0))


def test_an_input_that_is_never_active_goes_first():
    x = inputs(16)
    x[:, 3] = 0
    w = torch.randn(4, 16)
    w[:, 3] = 100
    assert (sparsegpt(w, x.T @ x, 0.25)[:, 3] == 0).all()
    assert not keep(wanda(w, x.square().sum(0)), 0.25)[:, 3].any()


# ------------------------------------------------------------------------------------------------------------ schedule


def test_share_out_is_the_best_of_all():
    """Against all choices of single zeros, for losses that are convex and linear between the levels."""
    rng = np.random.default_rng(0)
    levels, sizes = [0.0, 0.5, 1.0], {"a": 4, "b": 8, "c": 2}
    for _ in range(20):
        slopes = np.sort(rng.random((3, 2)), axis=1)
        losses = {n: [0.0, s[0] * sizes[n] / 2, (s[0] + s[1]) * sizes[n] / 2] for n, s in zip(sizes, slopes, strict=True)}

        def lost(choice, losses=losses):
            return sum(np.interp(k / sizes[n], levels, losses[n]) for n, k in choice.items())

        every = [{"a": a, "b": b, "c": 9 - a - b} for a in range(5) for b in range(9) if 0 <= 9 - a - b <= 2]
        found = share_out(losses, sizes, levels, 9)
        assert sum(found.values()) == 9
        assert lost(found) == pytest.approx(min(map(lost, every)))


def test_share_out_ignores_a_point_above_the_hull():
    """Half of `a` costs more per zero than all of it: then there is one stretch, not a dear one and a cheap one."""
    found = share_out({"a": [0, 5, 6], "b": [0, 4, 8]}, {"a": 10, "b": 10}, [0, 0.5, 1.0], 10)
    assert found == {"a": 10, "b": 0}


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: keep(torch.rand(2, 4), 1.5), "sparsity=1.5 is no share"),
        (lambda: keep(torch.tensor([[torch.nan, 1.0]]), 0.5), "scores hold 1 NaN of 2"),
        (lambda: keep(torch.rand(2, 4), 0.5, "column"), "within='column' is not known"),
        (lambda: keep_n_of_m(torch.rand(2, 6), 2, 4), "pattern 2:4 does not divide in_features=6; use 1:2, or 'unstructured'"),
        (lambda: keep_n_of_m(torch.rand(2, 8), 4, 4), "4:4 is no pattern"),
        (lambda: wanda(torch.rand(2, 4), torch.rand(3)), "sum_sq is (3,); a weight of (2, 4) needs (4,)"),
        (lambda: sparsegpt(torch.rand(2, 4), torch.eye(3)), "xx is (3, 3); a weight of (2, 4) needs (4, 4)"),
        (lambda: sparsegpt(torch.rand(2, 4), torch.eye(4), damping=-1), "damping=-1 must not be negative"),
        (lambda: sparsegpt(torch.rand(2, 4), torch.full((4, 4), torch.inf)), "xx holds NaN or infinite"),
        (lambda: sparsegpt(torch.rand(2, 4).int(), torch.eye(4)), "it must be float"),
        (lambda: share_out({"a": [0, 1]}, {"a": 10}, [0.2, 0.4], 5), "total=5 zeros are not between 2 and 4"),
        (lambda: share_out({"a": [0, 1]}, {"a": 10}, [0.4, 0.2], 5), "must rise"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


# ---------------------------------------------------------------------------------------------- zeros behind quantizing


@pytest.mark.parametrize("scheme", ["int4-g32", "int2-g32", "int8-row", "int4-tensor", "nf4-g32", "fp4-g32", "mxfp4-g32"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_keeps_zeros_in_every_symmetric_codebook(scheme, act_order):
    scheme, x = QuantScheme.parse(scheme), inputs(64, tokens=2000)
    w = sparsegpt(torch.randn(16, 64), x.T @ x, n_of_m=(2, 4))
    q = torch.from_numpy(gptq(w, x.T @ x, scheme, act_order=act_order, keep_zeros=True).dequantize())
    assert (q[w == 0] == 0).all()
    free = torch.from_numpy(gptq(w, x.T @ x, scheme, act_order=act_order).dequantize())
    if scheme.bits > 2:
        assert (free[w == 0] != 0).any()  # it is not so by itself
    nearest = torch.from_numpy(round_to_nearest(w, scheme, mse_grid=32).dequantize())
    assert (nearest[w == 0] == 0).all()  # to nearest it is
    assert loss(w, free, x) <= loss(w, q, x) < loss(w, nearest, x)  # errors go on to what is left


def test_gptq_keep_zeros_changes_nothing_without_zeros():
    w, x = torch.randn(16, 64), inputs(64, tokens=2000)
    a, b = (gptq(w, x.T @ x, QuantScheme.parse("int4-g32"), keep_zeros=k).packed for k in (True, False))
    np.testing.assert_array_equal(a, b)


def test_gptq_refuses_zeros_in_a_scheme_with_offsets():
    with pytest.raises(ValueError, match=re.escape("up: keep_zeros=True, but uint4-g32 has no exact zero")):
        gptq(torch.randn(4, 32), torch.eye(32), QuantScheme.parse("uint4-g32"), keep_zeros=True, name="up")
