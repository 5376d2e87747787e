"""Fake quantization and LSQ: values and gradients by hand, against torch's own operator, and in every granularity."""

import pytest
import torch

from edgelab.methods.qat import fake_quantize, levels, lsq_start
from edgelab.scheme import QuantScheme

SCHEMES = ["int2-g8", "int3-g16", "int4-row", "int8-row", "int4-tensor", "int4-g32"]


def naive(weight, scale, scheme):
    """One weight at a time."""
    out, unit = weight.clone(), weight.shape[-1] // scale.shape[-1]
    qn = 2 ** (scheme.bits - 1)
    flat, small = out.reshape(-1, out.shape[-1]), scale.expand(*weight.shape[:-1], scale.shape[-1]).reshape(-1, scale.shape[-1])
    for i in range(len(flat)):
        for j in range(flat.shape[1]):
            s = float(small[i, j // unit])
            flat[i, j] = s * max(-qn, min(qn - 1, round(float(flat[i, j]) / s)))
    return out


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("shape", [(4, 32), (3, 4, 32)])
def test_values_are_those_of_rounding_one_by_one(text, shape):
    scheme = QuantScheme.parse(text)
    weight = torch.randn(shape)
    scale = (torch.rand(scheme.scales_shape(shape)) * 0.3 + 0.05).half().float()
    got = fake_quantize(weight, scale, scheme)
    assert torch.allclose(got, naive(weight, scale, scheme), atol=1e-6)
    s = scale.repeat_interleave(shape[-1] // scale.shape[-1], -1)
    assert torch.allclose(levels(weight, scale, scheme) * s, got, atol=1e-6)


def test_equal_to_torchs_operator_with_its_gradient():
    scheme, weight = QuantScheme.parse("int8-row"), torch.randn(5, 40)
    scale = (weight.abs().amax(1, keepdim=True) / 100).half().float()  # some are clipped
    ours, theirs = (weight.clone().requires_grad_(True) for _ in range(2))
    a = fake_quantize(ours, scale, scheme)
    b = torch.fake_quantize_per_channel_affine(theirs, scale[:, 0], torch.zeros(5, dtype=torch.int32), 0, -128, 127)
    assert torch.allclose(a, b, atol=1e-6)
    up = torch.randn(5, 40)
    a.backward(up)
    b.backward(up)
    assert (torch.equal(ours.grad, theirs.grad) and (ours.grad != up).sum() == 0) or torch.allclose(ours.grad, theirs.grad)


def test_the_steps_gradient_by_hand():
    """LSQ, equation 3, with Qn = 2, Qp = 1: inside round(v) - v, clipped -Qn and Qp, summed, times 1 / sqrt(N Qp)."""
    scheme = QuantScheme.parse("int2-row")
    w, s = torch.tensor([[0.3, -0.2, 0.9, -3.0]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    up = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    fake_quantize(w, s, scheme, gradient_scale=False).backward(up)
    # v = .6 -> 1, -.4 -> 0, 1.8 clipped to Qp = 1, -6 clipped to -Qn = -2
    assert float(s.grad) == pytest.approx(1 * 0.4 + 2 * 0.4 + 3 * 1 + 4 * -2, rel=1e-5)
    assert w.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    plain = float(s.grad)
    s.grad = None
    fake_quantize(w, s, scheme).backward(up)
    assert float(s.grad) == pytest.approx(plain / (4 * 1) ** 0.5, rel=1e-5)


def test_a_negative_step_rounds_as_its_mirror():
    scheme, w = QuantScheme.parse("int4-row"), torch.randn(2, 16)
    scale = torch.tensor([[0.25], [0.5]])
    assert torch.equal(fake_quantize(-w, -scale, scheme), -fake_quantize(w, scale, scheme))


def test_a_step_of_zero_gives_zeros_and_no_nan():
    w = torch.randn(1, 8, requires_grad=True)
    s = torch.zeros(1, 1, requires_grad=True)
    got = fake_quantize(w, s, QuantScheme.parse("int4-row"))
    got.sum().backward()
    assert not got.any() and torch.isfinite(w.grad).all() and torch.isfinite(s.grad).all()


def test_lsqs_start_by_hand():
    w = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.5, 0.5, 0.5, 0.5]])
    got = lsq_start(w, QuantScheme.parse("int4-row"))
    assert torch.allclose(got, torch.tensor([[4 / 7**0.5], [1 / 7**0.5]]))


def test_learning_the_step_finds_the_least_error():
    """Gradient descent on the step alone ends where a search over steps does."""
    torch.manual_seed(3)
    scheme, w = QuantScheme.parse("int3-row"), torch.randn(1, 512)
    s = lsq_start(w, scheme).requires_grad_(True)
    optimizer = torch.optim.Adam([s], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        (fake_quantize(w, s, scheme) - w).square().mean().backward()
        optimizer.step()
    grid = torch.linspace(0.2, 1.2, 500)
    errors = torch.stack([(fake_quantize(w, g.view(1, 1), scheme) - w).square().mean() for g in grid])
    found = (fake_quantize(w, s.detach(), scheme) - w).square().mean()
    assert float(found) <= 1.03 * float(errors.min())


@pytest.mark.parametrize("text", ["uint4-g32", "nf4-g32", "mxfp4-g32"])
def test_codebooks_without_a_step_are_refused(text):
    with pytest.raises(ValueError, match="no single step that could learn"):
        fake_quantize(torch.zeros(2, 32), torch.zeros(2, 1), QuantScheme.parse(text))


def test_a_scale_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"scale is \(2,\); int4-row of \(2, 8\) needs \(2, 1\)"):
        fake_quantize(torch.zeros(2, 8), torch.zeros(2), QuantScheme.parse("int4-row"))
