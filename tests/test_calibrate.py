"""Statistics of inputs: against float64, in any order of merging, for stacks with rare and dead experts."""

import numpy as np
import pytest
import torch

from edgelab.methods import calibrate
from edgelab.methods.calibrate import Accumulator, accumulate, pool, rare, shrink


def naive(x: torch.Tensor) -> dict[str, np.ndarray]:
    """The sums of x [n, in], written out in float64."""
    x = x.double().numpy()
    return {
        "absmax": np.abs(x).max(0),
        "sum_abs": np.abs(x).sum(0),
        "sum_sq": (x**2).sum(0),
        "xx": sum(np.outer(row, row) for row in x),
    }


def close(comp: torch.Tensor, ref, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(comp.numpy(), ref, rtol=tolerance, atol=tolerance * max(np.abs(ref).max(), 1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [1 << 24, 1 << 10])  # in one part and in many
def test_sums_equal_float64(dtype, values, monkeypatch):
    monkeypatch.setattr(calibrate, "_VALUES", values)
    x = (torch.randn(4, 300, 12) * torch.logspace(-2, 1, 12)).to(dtype)
    comp, ref = accumulate(x), naive(x.reshape(-1, 12))
    assert comp.count.item() == 1200 and comp.count.dtype == torch.int64 and comp.experts is None and comp.in_features == 12
    for part, values in ref.items():
        assert getattr(comp, part).dtype == torch.float32
        close(getattr(comp, part), values, 1e-6)
    assert comp.histogram.counts.sum() == x.numel()
    close(comp.mean_abs, ref["sum_abs"] / 1200)
    close(comp.mean_sq, ref["sum_sq"] / 1200)


def test_stacks_hold_the_sums_of_each_expert():
    x, gates = torch.randn(30, 6), torch.rand(30)
    offsets = [0, 9, 9, 25, 30]
    comp = accumulate(x, offsets=torch.tensor(offsets), gates=gates)
    assert comp.count.tolist() == [9, 0, 16, 5] and comp.experts == 4
    for e, (a, b) in enumerate([(0, 9), (9, 25), (25, 30)]):
        e = (0, 2, 3)[e]
        for part, values in naive(x[a:b]).items():
            close(getattr(comp.expert(e), part), values)
        assert comp.gate_mass[e].item() == pytest.approx(gates[a:b].sum().item(), rel=1e-6)
    dead = comp.expert(1)
    assert dead.count == 0 and not dead.xx.any() and not dead.mean_sq.any() and not dead.absmax.any()
    assert comp.histogram.counts.sum() == x.numel()


def test_merging_in_any_order_gives_the_statistics_of_all():
    parts = [torch.randn(n, 8) * s for n, s in ((5, 0.1), (64, 1.0), (17, 30.0))]
    whole = accumulate(torch.cat(parts))
    a, b, c = (accumulate(p) for p in parts)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert merged.count == whole.count
        np.testing.assert_array_equal(merged.histogram.counts, whole.histogram.counts)
        assert merged.histogram[1:] == whole.histogram[1:]
        assert torch.equal(merged.absmax, whole.absmax)
        for part in ("sum_abs", "sum_sq", "xx"):
            close(getattr(merged, part), getattr(whole, part).numpy())


def test_merging_stacks_merges_the_pool_and_keeps_what_is_shared_shared():
    def of(x):
        pooled = accumulate(x)
        expanded = {p: getattr(pooled, p).expand(3, *getattr(pooled, p).shape) for p in ("absmax", "sum_abs", "sum_sq", "xx")}
        return calibrate.InputStats(pooled.count.repeat(3), **expanded, gate_mass=torch.ones(3), pooled=pooled)

    x, y = torch.randn(20, 4), torch.randn(30, 4)
    both, ref = of(x).merge(of(y)), naive(torch.cat([x, y]))
    assert calibrate.is_shared(both.xx) and both.nbytes < 3 * 4 * 4 * 4
    close(both.xx[2], ref["xx"])
    close(both.pooled.sum_sq, ref["sum_sq"])
    assert both.count.tolist() == [50] * 3 and both.gate_mass.tolist() == [2.0] * 3


def test_a_long_sum_does_not_drift():
    x = torch.rand(64, 4) + 0.5  # all of one sign: a float32 sum of 4,000 products would round each time
    sums, naive32 = Accumulator(4, want=["xx"]), torch.zeros(4, 4)
    for _ in range(4000):
        sums.add(x)
        naive32 += x.T @ x
    ref = 4000 * (x.T @ x).double()
    error, drift = (float(((xx - ref).abs() / ref).max()) for xx in (sums.finish().xx, naive32))
    assert error < 2**-24 * 1.01  # the one rounding to float32 at the end
    assert drift > 5 * error


def test_shrinking_adds_the_average_token():
    x = torch.randn(200, 5)
    own = accumulate(x, offsets=[0, 190, 198, 198, 200])
    assert shrink(own, 0) is own
    assert shrink(accumulate(x)).count == 200  # a plain weight stays as it is
    shrunk, whole = shrink(own, 40), naive(x)
    for e, (a, b) in enumerate([(0, 190), (190, 198), (198, 198), (198, 200)]):
        for part in ("sum_abs", "sum_sq", "xx"):
            mine = naive(x[a:b])[part] if b > a else 0
            close(getattr(shrunk, part)[e], mine + whole[part] * 40 / 200, 2e-6)
    assert shrunk.count.tolist() == [230, 48, 40, 42]
    close(shrunk.absmax[2], whole["absmax"])
    close(shrunk.absmax[0], naive(x[:190])["absmax"])  # it saw enough
    assert torch.linalg.eigvalsh(shrunk.xx[2].double()).min() > 0 == own.xx[2].abs().max()
    assert shrink(own).count.tolist() == [195, 13, 5, 7]  # as many as it has inputs


def test_the_pool_is_every_token_where_it_is_known():
    x, others = torch.randn(10, 3), torch.randn(50, 3)
    own = accumulate(x, offsets=[0, 10, 10])
    close(pool(own).xx, naive(x)["xx"])
    known = calibrate.InputStats(own.count, own.absmax, own.sum_abs, own.sum_sq, own.xx, pooled=accumulate(others))
    close(shrink(known, 5).xx[1], naive(others)["xx"] / 10)


def test_rare_experts_are_counted():
    found = rare(accumulate(torch.ones(20, 8), offsets=[0, 12, 12, 19, 20]))
    assert found.threshold == 8 and found.rare == (1, 2, 3) and found.dead == (1,)
    assert str(found) == "3 of 4 experts saw fewer than 8 tokens, 1 saw none: [1]"
    assert rare(torch.tensor([5, 5]), 5).rare == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad):
    x = torch.randn(40, 6)
    x[31, 4] = bad
    with pytest.raises(FloatingPointError, match=r"model.q_proj: 1 of the 240 input values .* the first is .* at token 31, input 4"):
        accumulate(x, name="model.q_proj")
    with pytest.raises(FloatingPointError, match="overflow float32"):
        accumulate(torch.full((2, 3), 1e20), want=["xx"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accumulate(torch.ones(3, dtype=torch.int64)), r"x is torch.int64 \(3,\)"),
        (lambda: accumulate(torch.ones(3, 2), want=["hessian"]), "want holds 'hessian'; known are xx, histogram"),
        (lambda: accumulate(torch.ones(3, 2), offsets=[0, 2]), r"offsets rise from 0 to n=3"),
        (lambda: accumulate(torch.ones(3, 2), offsets=[0, 2, 1, 3]), r"offsets rise from 0 to n=3"),
        (lambda: accumulate(torch.ones(3, 2), gates=torch.ones(3)), "gates without offsets"),
        (lambda: accumulate(torch.ones(3, 2), offsets=[0, 3], gates=torch.ones(2)), r"needs \(3,\)"),
        (lambda: accumulate(torch.ones(3, 2)).merge(accumulate(torch.ones(3, 4))), "not those of the same weight"),
        (lambda: accumulate(torch.ones(3, 2)).merge(accumulate(torch.ones(3, 2), want=[])), "one of the two has no xx"),
        (lambda: accumulate(torch.ones(3, 2)).expert(0), "not of a stack"),
        (lambda: accumulate(torch.ones(3, 2), offsets=[0, 3]).expert(-1), r"expert -1 is not one of 0 .. 0"),
        (lambda: shrink(accumulate(torch.ones(3, 2), offsets=[0, 3]), -1), "prior=-1 must be"),
        (lambda: shrink(accumulate(torch.ones(0, 2), offsets=[0, 0])), "no token reached this stack"),
        (lambda: rare(accumulate(torch.ones(3, 2))), "statistics of a plain weight"),
        (lambda: rare(torch.tensor([1, 2])), "give a number of tokens"),
    ],
)
def test_errors_name_the_value_and_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
