"""SmoothQuant's and AWQ's scales against their formulas, written out plainly, and what each does to the error."""

import numpy as np
import pytest
import torch

from edgelab.methods.awq import Reader, awq_scales, awq_search
from edgelab.methods.rtn import round_to_nearest
from edgelab.methods.smoothquant import smoothing_scales
from edgelab.scheme import QuantScheme

INT4 = QuantScheme.parse("int4-g32")


def test_smoothing_scales_by_hand():
    s = smoothing_scales(torch.tensor([8.0, 8.0, 1.0]), torch.tensor([2.0, 0.5, 4.0]), 0.5)
    torch.testing.assert_close(s, torch.tensor([2.0, 4.0, 0.5]))
    assert smoothing_scales(torch.tensor([8.0]), torch.tensor([2.0]), 1.0).item() == 8.0
    assert smoothing_scales(torch.tensor([8.0]), torch.tensor([2.0]), 0.0).item() == 0.5


def test_alpha_of_a_half_equals_both_ranges_and_forgets_where_they_were():
    x, w = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    s = smoothing_scales(x, w)
    torch.testing.assert_close(x / s, w * s)
    c = torch.exp2(torch.randint(-6, 7, (64,)).float())
    torch.testing.assert_close((x * c) / smoothing_scales(x * c, w / c), x / s)


@pytest.mark.parametrize(("x", "w"), [(0.0, 2.0), (3.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_dead_channel_keeps_its_scale(x, w, alpha):
    assert smoothing_scales(torch.tensor([x, 4.0]), torch.tensor([w, 4.0]), alpha)[0] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_broken_statistics_are_an_error(bad):
    good = torch.ones(3)
    broken = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(ValueError, match="x_absmax holds 1 NaN, infinite or negative values of 3"):
        smoothing_scales(broken, good)
    with pytest.raises(ValueError, match="w_absmax holds 1"):
        smoothing_scales(good, broken)
    with pytest.raises(ValueError, match="mean_abs holds 1"):
        awq_search(broken, [Reader(torch.ones(2, 3), QuantScheme.parse("int4-row"), good)])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        smoothing_scales(torch.ones(2), torch.ones(2), 1.5)
    with pytest.raises(ValueError, match="must be of one shape"):
        smoothing_scales(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="readers is empty"):
        awq_search(torch.ones(8), [])
    with pytest.raises(ValueError, match="grid=0"):
        awq_search(torch.ones(32), [Reader(torch.ones(2, 32), INT4, torch.ones(32))], grid=0)
    with pytest.raises(ValueError, match=r"second of q is \(31,\)"):
        awq_search(torch.ones(32), [Reader(torch.ones(2, 32), INT4, torch.ones(31), "q")])
    with pytest.raises(ValueError, match="second of q holds NaN"):
        awq_search(torch.ones(32), [Reader(torch.ones(2, 32), INT4, torch.full((32,), torch.nan), "q")])


def test_awq_scales_are_centred():
    x = torch.rand(64) + 0.01
    for a in (0.0, 0.3, 1.0):
        s = awq_scales(x, a)
        torch.testing.assert_close(s.amax() * s.amin(), torch.tensor(1.0))
        torch.testing.assert_close(s / s[0], (x / x[0]) ** a)
    assert (awq_scales(x, 0.0) == 1).all()
    assert (awq_scales(torch.zeros(4), 0.7) == 1).all()  # nothing was ever active


def plain_search(x, weights, grid):
    """The search of the paper on the tokens themselves: x [tokens, in]."""
    mean = np.abs(x).mean(0)
    best = (np.inf, None)
    for i in range(grid + 1):
        s = mean ** (i / grid)
        s = s / np.sqrt(s.max() * s.min())
        loss = 0.0
        for w in weights:
            q = round_to_nearest(torch.from_numpy((w * s).astype(np.float32)), INT4).dequantize() / s
            loss += np.square(x @ (w - q).T).sum()
        best = min(best, (loss, i / grid))
    return best


def test_the_search_by_statistics_is_the_search_on_tokens():
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 64)) * np.exp(random.standard_normal(64) * 1.5) @ (np.eye(64) + 0.1 * random.standard_normal((64, 64)))
    ws = [random.standard_normal((n, 64)).astype(np.float32) for n in (16, 48)]
    xx = torch.from_numpy(x.T @ x).float()
    found = awq_search(torch.from_numpy(np.abs(x).mean(0)), [Reader(torch.from_numpy(w), INT4, xx) for w in ws], grid=10)
    loss, a = plain_search(x, ws, 10)
    assert found.exponent.item() == pytest.approx(a) and found.errors.amin().item() == pytest.approx(loss, rel=1e-3)
    assert found.errors.amin() < 0.8 * found.errors[0] and found.exponent > 0
    torch.testing.assert_close(found.scales, awq_scales(torch.from_numpy(np.abs(x).mean(0)), a))


def test_the_diagonal_is_the_whole_where_channels_do_not_go_together():
    w, second = torch.randn(16, 64), torch.rand(64) * 10
    a, b = (awq_search(second.sqrt(), [Reader(w, INT4, t)], grid=4) for t in (second, second.diag()))
    torch.testing.assert_close(a.errors, b.errors, rtol=1e-4, atol=0)


def test_experts_search_alone_or_together():
    w, xx = torch.randn(3, 16, 32), torch.rand(3, 32, 100)
    xx = (torch.randn(3, 32, 1).exp() * xx) @ (torch.randn(3, 32, 1).exp() * xx).mT
    xx[2] = 0  # a dead expert
    mean = torch.randn(3, 32).exp()
    mean[2] = 0
    alone = awq_search(mean, [Reader(w, INT4, xx)], grid=5)
    assert alone.scales.shape == (3, 32) and alone.errors.shape == (6, 3)
    assert alone.exponent[2] == 0 and (alone.scales[2] == 1).all()
    for e in range(2):
        one = awq_search(mean[e], [Reader(w[e], INT4, xx[e])], grid=5)
        torch.testing.assert_close(one.errors, alone.errors[:, e], rtol=1e-4, atol=0)
        torch.testing.assert_close(one.scales, alone.scales[e])
    together = awq_search(mean[0], [Reader(w, INT4, xx)], grid=5)
    parts = [awq_search(mean[0], [Reader(w[e], INT4, xx[e])], grid=5).errors for e in range(3)]
    torch.testing.assert_close(together.errors, sum(parts), rtol=1e-4, atol=1e-6)
