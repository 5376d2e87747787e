"""Losses of distillation against their definitions written out, and what kept logits do to the estimate."""

import math

import pytest
import torch

from edgelab.methods import distill
from edgelab.methods.distill import divergence, draw, hidden_error, hinton, layer_map, sampled_cross_entropy, top_k_cross_entropy


def definition(teacher, student, loss, t, b) -> float:
    """The divergences as sums over a vocabulary, position by position."""
    total = 0.0
    for a, c in zip(teacher, student, strict=True):
        p, q = ([math.exp(x / t) for x in row.tolist()] for row in (a, c))
        p, q = ([x / sum(v) for x in v] for v in (p, q))

        def kl(u, v):
            return sum(x * math.log(x / y) for x, y in zip(u, v, strict=True))

        m = [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]
        total += {"forward": kl(p, q), "reverse": kl(q, p), "jsd": b * kl(p, m) + (1 - b) * kl(q, m), "skew": kl(p, m)}[loss]
    return t * t * total / len(teacher)


@pytest.mark.parametrize("loss", distill.LOSSES)
@pytest.mark.parametrize(("t", "b"), [(1.0, 0.1), (3.0, 0.5), (0.5, 0.9)])
def test_each_loss_is_its_definition(loss, t, b):
    teacher, student = torch.randn(6, 5).double(), torch.randn(6, 5).double()
    got = divergence(student, teacher, loss=loss, temperature=t, beta=b)
    assert float(got) == pytest.approx(definition(teacher, student, loss, t, b), rel=1e-4)


@pytest.mark.parametrize("loss", distill.LOSSES)
def test_nothing_to_learn_costs_nothing_and_pulls_nowhere(loss):
    teacher = torch.randn(4, 7)
    student = teacher.clone().requires_grad_(True)
    got = divergence(student, teacher, loss=loss, beta=0.3)
    got.backward()
    assert abs(float(got)) < 1e-6 and student.grad.abs().max() < 1e-6


def test_the_gradient_of_forward_is_q_minus_p():
    teacher, student = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    divergence(student, teacher).backward()
    assert torch.allclose(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 3, atol=1e-6)


def test_t_squared_keeps_the_size_of_the_gradient():
    """For small logits the softened gradient is (s - t) / (N V) at every temperature (arXiv 1503.02531, equation 4)."""
    teacher = torch.randn(1, 8) * 0.01
    grads = []
    for t in (1.0, 4.0, 16.0):
        student = torch.zeros(1, 8, requires_grad=True)
        divergence(student, teacher, temperature=t).backward()
        grads.append(student.grad)
    assert torch.allclose(grads[0], grads[1], atol=2e-5) and torch.allclose(grads[1], grads[2], atol=2e-5)


def test_a_teacher_that_rules_a_token_out():
    teacher, student = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert float(divergence(student, teacher)) == pytest.approx(math.log(2))


def test_hinton_is_the_sum_of_its_parts():
    ids, student, teacher = torch.randint(0, 9, (2, 5)), torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    nll = -student.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    want = 0.7 * definition(teacher.flatten(0, 1), student.flatten(0, 1), "forward", 3.0, 0.1) + 0.3 * float(nll)
    assert float(hinton(student, teacher, ids)) == pytest.approx(want, rel=1e-5)


def test_drawn_tokens_are_unbiased_and_the_largest_k_are_not():
    teacher, student = torch.randn(1, 50), torch.randn(1, 50)
    exact = float(-(teacher.softmax(-1) * student.log_softmax(-1)).sum())
    many = draw(teacher.expand(20_000, -1), 4, torch.Generator().manual_seed(0))
    estimates = -student.log_softmax(-1).expand(20_000, -1).gather(-1, many.long()).mean(1)
    error = float(estimates.std() / len(estimates) ** 0.5)
    assert abs(float(estimates.mean()) - exact) < 4 * error
    assert float(sampled_cross_entropy(student.expand(20_000, -1), many)) == pytest.approx(float(estimates.mean()), rel=1e-5)
    assert abs(float(top_k_cross_entropy(student, teacher, 4)) - exact) > 20 * error
    assert float(top_k_cross_entropy(student, teacher, 50)) == pytest.approx(exact, rel=1e-5)


def test_layers_are_mapped_evenly_and_widths_need_a_bridge():
    assert layer_map(4, 12) == [2, 5, 8, 11] and layer_map(3, 4) == [1, 2, 3]
    states = [torch.randn(2, 3, 4) for _ in range(4)]
    assert float(hidden_error([states[1], states[3]], states)) == 0
    assert float(hidden_error([torch.zeros(2, 3, 4)], states)) == pytest.approx(1.0)
    narrow = [torch.randn(2, 3, 2)]
    with pytest.raises(ValueError, match="need a bridge"):
        hidden_error(narrow, states)
    assert hidden_error(narrow, states, torch.nn.Linear(2, 4)).requires_grad


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"loss": "kl"}, "use one of forward"), ({"temperature": 0.0}, "temperature=0.0"), ({"beta": 2.0}, r"beta=2.0 in 0 .. 1")],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), **settings)
    with pytest.raises(ValueError, match="must be logits of the same shape"):
        divergence(torch.zeros(1, 2), torch.zeros(1, 3))
