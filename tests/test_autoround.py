"""Learnt rounding: it starts from the codes it is given, stays in their range, and lowers the loss it is given."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgelab.methods.autoround import Learnt, learn_rounding
from edgelab.methods.gptq import gptq
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import QuantScheme

SCHEMES = ("int4-g32", "int3-g8", "int2-row", "int8-row", "uint3-g16", "uint4-row", "int4-tensor", "nf4-g32", "fp4-g32")


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", [(24, 64), (3, 24, 64)])
def test_it_starts_from_the_codes_that_it_is_given(text, shape):
    torch.manual_seed(1)
    weight, scheme = torch.randn(shape), QuantScheme.parse(text)
    x = torch.randn(200, shape[-1]) @ torch.randn(shape[-1], shape[-1])
    xx = (x.T @ x).expand(*shape[:-2], shape[-1], shape[-1])
    for start in (round_to_nearest(weight, scheme, mse_grid=8), gptq(weight, xx, scheme)):
        learnt = Learnt(weight, start)
        assert np.array_equal(learnt.qtensor().codes(), start.codes())
        assert np.array_equal(learnt.qtensor().scales, start.scales)
        torch.testing.assert_close(learnt().detach(), torch.from_numpy(start.dequantize()))


def test_gradients_pass_straight_through():
    weight = torch.tensor([[-4.0, 0.2, 3.4, 1.0]])
    learnt = Learnt(weight, round_to_nearest(weight, QuantScheme.parse("int4-row")))
    learnt().backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    scale = float(learnt.scale.flatten()[0])
    assert learnt.shift.grad.flatten().tolist() == pytest.approx([scale * g for g in (1, 2, 3, 4)])
    # d(level * scale)/d(factor): scale * (level - w/s inside the range), summed with the gradients (LSQ, equation 3)
    level, place = torch.tensor([-8.0, 0.0, 7.0, 2.0]), weight[0] / scale
    wanted = float((torch.tensor([1.0, 2.0, 3.0, 4.0]) * (level - place) * scale).sum())
    assert float(learnt.factor.grad) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["sign", "adam"])
@pytest.mark.parametrize("text", ["int3-g32", "uint3-g32", "nf4-g32"])
def test_it_lowers_the_error_of_what_the_layer_puts_out(text, optimizer):
    torch.manual_seed(0)
    weight, scheme = torch.randn(48, 64), QuantScheme.parse(text)
    x = torch.randn(256, 64) @ (torch.eye(64) + 0.5 * torch.rand(64, 64))  # inputs that are correlated, as all inputs are

    def error(w):
        return F.mse_loss(x @ w.T, x @ weight.T)

    start = round_to_nearest(weight, scheme, mse_grid=16)
    settings = {"steps": 200, "lr": 0.002, "optimizer": optimizer, "progress": False, "judge": lambda now: float(error(now["w"]))}
    found = learn_rounding({"w": weight}, {"w": start}, lambda now, _: error(now["w"]), **settings)["w"]
    before, after = (float(error(torch.from_numpy(q.dequantize()))) for q in (start, found))
    assert after < (0.9 if text == "int3-g32" and optimizer == "adam" else 0.99) * before, (before, after)
    assert found.scheme == scheme and found.nbytes == start.nbytes


def test_the_best_state_by_the_judge_is_kept():
    weight, scheme = torch.randn(8, 32), QuantScheme.parse("int4-g32")
    start = round_to_nearest(weight, scheme)

    def astray(now, _):  # a loss that only does harm
        return now["w"].square().sum()

    def judge(now) -> float:
        return float((now["w"] - weight).square().sum())

    settings = {"steps": 40, "lr": 0.05, "progress": False}
    assert np.array_equal(learn_rounding({"w": weight}, {"w": start}, astray, judge=judge, **settings)["w"].packed, start.packed)
    assert not np.array_equal(learn_rounding({"w": weight}, {"w": start}, astray, **settings)["w"].packed, start.packed)


def test_it_is_the_same_twice():
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(64, 32)
    start = round_to_nearest(weight, QuantScheme.parse("int3-g32"))
    runs = [
        learn_rounding({"w": weight}, {"w": start}, lambda n, _: (x @ (n["w"] - weight).T).square().mean(), steps=20, progress=False)["w"]
        for _ in range(2)
    ]
    assert np.array_equal(runs[0].packed, runs[1].packed) and np.array_equal(runs[0].scales, runs[1].scales)


def test_an_all_zero_group_stays_zero():
    weight = torch.zeros(4, 32)
    weight[0] = torch.randn(32)
    start = round_to_nearest(weight, QuantScheme.parse("int4-g16"))
    loss = lambda now, _: (now["w"] - 1).square().sum()  # noqa: E731 (it pulls on everything)
    found = learn_rounding({"w": weight}, {"w": start}, loss, steps=10, progress=False)["w"]
    assert not found.dequantize()[1:].any() and np.isfinite(found.dequantize()).all()


def test_what_can_not_be_learnt_is_refused():
    weight = torch.randn(4, 32)
    start = round_to_nearest(weight, QuantScheme.parse("int4-g32"))
    with pytest.raises(ValueError, match="powers of two"):
        Learnt(weight, round_to_nearest(weight, QuantScheme.parse("mxfp4-g32")))
    with pytest.raises(ValueError, match=re.escape("steps=0, lr=0.005: both must be positive")):
        learn_rounding({"w": weight}, {"w": start}, lambda n, _: n["w"].sum(), steps=0)
    with pytest.raises(ValueError, match="optimizer='sgd' is not known"):
        learn_rounding({"w": weight}, {"w": start}, lambda n, _: n["w"].sum(), optimizer="sgd")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        learn_rounding({"w": weight}, {"w": start}, lambda n, _: n["w"].sum() * float("nan"), progress=False)
