"""DP-SGD: per-example gradients against loops, the accountant against closed forms and Opacus, attacks against what epsilon allows."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from small_models import one_layer_deepseek, one_layer_qwen3, tiny
from torch import nn

from edgelab import adapt, private
from edgelab.model import load_tokenizer
from edgelab.paths import data_dir
from edgelab.private import (
    Adapters,
    DpSgd,
    Examples,
    answered,
    auc,
    auc_bound,
    auc_interval,
    clipped_sum,
    epsilon,
    examples,
    learn,
    losses,
    noise_for,
    odd_ones,
    over_seeds,
    renyi,
)
from edgelab.studies import read


def drawn(n=6, width=10, seed=0) -> Examples:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (n, width), generator=g)
    scored = torch.zeros(n, width, dtype=torch.bool)
    for i in range(n):
        scored[i, 3 : 5 + i % (width - 5)] = True  # of different lengths
    return Examples(ids, scored)


def adapters_of(config, scheme=None, moved=True, **settings) -> Adapters:
    made = Adapters(tiny(config, scheme), 2, **settings)
    if moved:  # B away from zero, so that A has a gradient
        g = torch.Generator().manual_seed(1)
        made.load({n: 0.2 * torch.randn(p.shape, generator=g) for n, p in made.parameters().items()})
    return made


# ---------------------------------------------------------------------------------------------------------- accountant


def by_binomial(noise: float, rate: float, order: int) -> float:
    """Mironov et al. 2019, section 3.3, for whole orders, in Python's own numbers."""
    total = sum(
        math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp((k * k - k) / (2 * noise**2)) for k in range(order + 1)
    )
    return math.log(total) / (order - 1)


@pytest.mark.parametrize("noise", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.7])
@pytest.mark.parametrize("order", [2, 5, 16])
def test_renyi_is_the_closed_form_at_whole_orders(noise, rate, order):
    assert renyi(noise, rate, order) == pytest.approx(by_binomial(noise, rate, order), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("noise", "rate", "order"), [(1.0, 0.1, 1.5), (0.8, 0.02, 3.7), (2.0, 0.5, 1.1), (0.3, 0.2, 2.4)])
def test_renyi_is_the_integral_at_real_orders(noise, rate, order):
    def inner(z):
        return math.exp(-(z**2) / (2 * noise**2)) * (1 - rate + rate * math.exp((2 * z - 1) / (2 * noise**2))) ** order

    found, _ = quad(inner, -12 * noise, order + 12 * noise, limit=500, points=[0.0, order / 2, order], epsabs=0, epsrel=1e-11)
    assert renyi(noise, rate, order) == pytest.approx(math.log(found / (noise * math.sqrt(2 * math.pi))) / (order - 1), rel=1e-6, abs=1e-12)


@given(st.floats(0.4, 20), st.floats(0.001, 1), st.integers(1, 500))
@settings(max_examples=25, deadline=None)
def test_more_noise_costs_less_and_more_steps_cost_more(noise, rate, steps):
    here = epsilon(noise, rate, steps, 1e-5)
    assert epsilon(1.1 * noise, rate, steps, 1e-5) <= here <= epsilon(noise, rate, steps + 1, 1e-5)
    assert here <= epsilon(noise, 1.0, steps, 1e-5) * (1 + 1e-9)  # sampling never costs


def test_the_settings_of_the_first_paper():
    """Abadi et al. 2016, section 5.1, figure 2: q 0.01, sigma 4, 10,000 steps, delta 1e-5: 1.26 by the moments accountant, 9.34 before."""
    assert 0.9 < epsilon(4.0, 0.01, 10_000, 1e-5) < 1.26


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.1, 60), (0.7, 0.02, 1000), (4.0, 0.01, 10_000), (6.0, 0.3, 40)])
def test_opacus_counts_the_same(noise, rate, steps):
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    theirs = accountants.RDPAccountant()
    theirs.history = [(noise, rate, steps)]
    assert epsilon(noise, rate, steps, 1e-5) == pytest.approx(theirs.get_epsilon(delta=1e-5), rel=0.01)


def test_noise_for_is_the_inverse():
    for target in (0.5, 8.0, 300.0):
        noise = noise_for(target, 0.1, 50, 1e-5)
        assert 0.99 * target < epsilon(noise, 0.1, 50, 1e-5) <= target


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: renyi(0.0, 0.1, 2), r"noise=0.0 must be above 0"),
        (lambda: renyi(1.0, 1.1, 2), r"rate=1.1 is no sampling probability"),
        (lambda: epsilon(1.0, 0.1, 10, 1.0), r"delta=1.0 must lie between 0 and 1"),
        (lambda: noise_for(-1, 0.1, 10, 1e-5), r"target=-1 must be an epsilon above 0"),
        (lambda: DpSgd(noise=1.0, clip=math.inf), r"clip=inf leaves one example unbounded"),
        (lambda: DpSgd(batch=7).rate(6), r"batch=7 is more than the 6 examples"),
        (lambda: DpSgd(batch=3, delta=0.2).epsilon(6), r"delta=0.2 with 6 examples allows to publish one of them"),
        (lambda: Examples(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool)), "no scored token"),
        (lambda: adapters_of(one_layer_qwen3(), roles=("router",)), "no linear layer of roles router"),
        (lambda: adapters_of(one_layer_qwen3()).load({}), "the state is of other adapters"),
    ],
)
def test_errors_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ----------------------------------------------------------------------------------------------- per-example gradients


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize(("config", "scheme"), [(one_layer_qwen3, None), (one_layer_deepseek, None), (one_layer_deepseek, "int4-g32")])
def test_gradients_are_those_of_each_example_alone(config, scheme, freeze_a):
    made, data = adapters_of(config(), scheme, freeze_a=freeze_a), drawn()
    learnt = made.parameters()
    assert any("shared_experts" in n for n in learnt) == (config is one_layer_deepseek)
    total, norms, told = clipped_sum(made, data, 0.05, micro=4)
    ref = {n: torch.zeros_like(p) for n, p in learnt.items()}
    for i in range(len(data)):
        loss = losses(made, data[torch.tensor([i])])[0]
        grads = torch.autograd.grad(loss, list(learnt.values()))
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads))
        assert float(norms[i]) == pytest.approx(norm, rel=1e-4) and float(told[i]) == pytest.approx(float(loss.detach()), rel=1e-5)
        for n, g in zip(learnt, grads, strict=True):
            ref[n] += g * min(1.0, 0.05 / norm)
    assert float(norms.min()) > 0.05  # all were clipped
    for n in learnt:
        torch.testing.assert_close(total[n], ref[n], rtol=1e-3, atol=1e-6)
    length = math.sqrt(sum(float(t.double().pow(2).sum()) for t in total.values()))
    assert 0 < length <= len(data) * 0.05 * (1 + 1e-6)


def test_a_step_may_draw_nobody():
    made, data = adapters_of(one_layer_qwen3()), drawn()
    total, norms, _ = clipped_sum(made, data[torch.arange(0)], 1.0)
    assert len(norms) == 0 and all((t == 0).all() for t in total.values())
    learn(made, data, DpSgd(noise=1.0, batch=1, steps=8, delta=0.01), seed=0, progress=False)
    assert all(p.isfinite().all() for p in made.parameters().values())


def test_without_a_bound_it_is_the_gradient_of_the_sum():
    made, data = adapters_of(one_layer_deepseek()), drawn()
    total, _, _ = clipped_sum(made, data, math.inf)
    grads = torch.autograd.grad(losses(made, data).sum(), list(made.parameters().values()))
    for t, g in zip(total.values(), grads, strict=True):
        torch.testing.assert_close(t, g, rtol=1e-3, atol=1e-6)


class Lora(nn.Module):
    """What Opacus understands: adapters that are linear layers."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(*reversed(a.shape), bias=False), nn.Linear(*reversed(b.shape), bias=False)
        self.a.weight.data.copy_(a)
        self.b.weight.data.copy_(b)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_opacus_finds_the_same_gradients_on_a_mixture_of_experts():
    opacus = pytest.importorskip("opacus", reason="opacus is not installed")
    made, data = adapters_of(one_layer_deepseek()), drawn()
    model = tiny(one_layer_deepseek(), None).requires_grad_(False)
    for name, a in made.a.items():
        where, _, last = name.rpartition(".")
        setattr(model.get_submodule(where), last, Lora(model.get_submodule(name), a.detach(), made.b[name].detach()))
    wrapped = opacus.GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    logits = wrapped(input_ids=data.ids[:, :-1], use_cache=False).logits
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten(), reduction="none").view(len(data), -1)
    mask = data.scored[:, 1:]
    ((nll * mask).sum(1) / mask.sum(1)).sum().backward()
    with made.copies(len(data)) as copies:
        ours = dict(zip(copies, torch.autograd.grad(losses(made, data).sum(), list(copies.values())), strict=True))
    for name in made.a:
        layer = model.get_submodule(name)
        for part in "ab":
            theirs = getattr(layer, part).weight.grad_sample
            torch.testing.assert_close(theirs.view_as(ours[f"{name}.{part}"]), ours[f"{name}.{part}"], rtol=1e-3, atol=1e-6)


def test_a_layer_that_mixes_examples_is_refused():
    made = adapters_of(one_layer_qwen3())
    name = next(iter(made.a))
    with made.copies(3), pytest.raises(ValueError, match=rf"{name} sees \(6, 64\) of 3 examples: it mixes them"):
        made.model.get_submodule(name)(torch.zeros(6, 64))


# ------------------------------------------------------------------------------------------------------------ learning


def test_noise_has_its_size_and_batches_their_rate(monkeypatch):
    made, data, sizes = adapters_of(one_layer_qwen3(), moved=False), drawn(200), []
    before = made.state()

    def nothing(adapters, batch, clip, micro):
        sizes.append(len(batch))
        return {n: torch.zeros_like(p) for n, p in adapters.parameters().items()}, torch.zeros(len(batch)), torch.zeros(len(batch))

    monkeypatch.setattr(private, "clipped_sum", nothing)
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: torch.optim.SGD(parameters, lr=lr))
    learn(made, data, DpSgd(noise=3.0, clip=0.5, batch=50, steps=1, lr=1.0, delta=1e-3), seed=0, progress=False)
    moved = torch.cat([(made.state()[n] - before[n]).flatten() for n in before])
    assert float(moved.std()) == pytest.approx(3.0 * 0.5 / 50, rel=0.03) and abs(float(moved.mean())) < 0.002
    learn(made, data, DpSgd(noise=0.0, batch=50, steps=60), seed=0, progress=False)
    assert np.mean(sizes) == pytest.approx(50, abs=3) and 4 < np.std(sizes) < 9  # binomial: 6.1, not a fixed size


def test_plain_learning_learns_private_learning_is_bounded_and_both_come_out_again():
    data, start = drawn(24), adapters_of(one_layer_deepseek(), moved=False)
    first = float(losses(start, data).mean())
    after = {}
    for name, s in {
        "plain": DpSgd(noise=0.0, batch=12, steps=15, lr=5e-2),
        "noisy": DpSgd(noise=50.0, batch=12, steps=15, lr=5e-2),
    }.items():
        runs = []
        for _ in range(2):
            made = adapters_of(one_layer_deepseek(), moved=False)
            ran = learn(made, data, s, seed=3, progress=False)
            runs.append(made.state())
        assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
        assert ran.epsilon == (math.inf if name == "plain" else epsilon(50.0, 0.5, 15, 1e-5)) and 0 <= ran.clipped <= 1
        after[name] = float(losses(made, data).mean())
    assert after["plain"] < first - 0.15 and after["plain"] < after["noisy"]
    made = adapters_of(one_layer_deepseek(), moved=False)
    learn(made, data, DpSgd(noise=50.0, batch=12, steps=1), progress=False)  # no seed: another noise each time
    again = adapters_of(one_layer_deepseek(), moved=False)
    learn(again, data, DpSgd(noise=50.0, batch=12, steps=1), progress=False)
    assert not all(torch.equal(made.state()[n], again.state()[n]) for n in again.state())


def test_known_noise_is_called_so():
    data, s = drawn(24), DpSgd(noise=2.0, batch=12, steps=1)
    known, unknown = (learn(adapters_of(one_layer_qwen3(), moved=False), data, s, seed=seed, progress=False) for seed in (0, None))
    assert known.noise_known and "not private: the noise is known" in repr(known)
    assert not unknown.noise_known and "not private" not in repr(unknown) and unknown.epsilon == known.epsilon


def test_noise_of_the_system_is_normal_and_no_generator_of_32_bits(monkeypatch):
    from scipy import stats

    from edgelab.private import normal, uniform

    torch.manual_seed(0)
    first = normal((200, 100))
    torch.manual_seed(0)
    again = normal((200, 100))
    assert first.shape == (200, 100) and first.dtype == torch.float32 and not torch.equal(first, again)
    for x in (first, again):
        assert stats.kstest(x.flatten().double().numpy(), "norm").pvalue > 1e-6
    u = uniform(20_000)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and stats.kstest(u.numpy(), "uniform").pvalue > 1e-6
    g = torch.Generator()
    assert torch.equal(normal((3,), g.manual_seed(1)), normal((3,), g.manual_seed(1 + 2**32)))  # why not torch's generator
    monkeypatch.setattr(private.os, "urandom", lambda n: b"\xff" * n)
    assert normal((4,)).abs().max() < 8.7 and normal((4,)).isfinite().all() and normal(()).shape == ()


@pytest.mark.parametrize("scheme", [None, "int4-g32"])
def test_put_carries_the_adapters_to_the_model(scheme):
    model = tiny(one_layer_deepseek(), scheme)
    before = copy.deepcopy(model.state_dict())
    made = Adapters(model, 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor))
    made.load({n: 0.2 * torch.randn(p.shape) for n, p in made.parameters().items()})
    ids = drawn().ids
    with torch.inference_mode():
        want, was = made.model(input_ids=ids).logits, model(input_ids=ids).logits
        made.put(model)
        got = model(input_ids=ids).logits
    assert (got - want).abs().max() < 0.05 * (was - want).abs().max()  # int8 inputs of the kernel, at int4
    assert scheme or torch.allclose(got, want, atol=1e-4)


def test_examples_are_read_and_scored_as_everywhere():
    tokenizer = load_tokenizer(data_dir() / "edge-moe")
    rows = adapt.commands(8, tests=8)["test"]
    data = examples(tokenizer, rows)
    told = {tokenizer.decode(i[s][:-1].tolist()) for i, s in zip(data.ids, data.scored, strict=True)}
    assert told == set(rows["answer"]) and all(int(i[s][-1]) == tokenizer.eos_token_id for i, s in zip(data.ids, data.scored, strict=True))
    odd = odd_ones(rows)
    assert odd["prompt"] == rows["prompt"] and all(a != b for a, b in zip(odd["answer"], rows["answer"], strict=True))
    assert odd["text"] == [p + a for p, a in zip(odd["prompt"], odd["answer"], strict=True)] and set(odd["answer"]) <= set(rows["answer"])
    assert len((data + data[torch.arange(3)]).ids) == 11


def test_answered_is_what_loops_find():
    made, data = adapters_of(one_layer_qwen3()), drawn()
    found = answered(made, data, batch=4)
    for i in range(len(data)):
        with torch.inference_mode():
            logp = made.model(input_ids=data.ids[i : i + 1]).logits[0].float().log_softmax(-1)
        at = data.scored[i].nonzero()[:, 0]
        nll = [-float(logp[t - 1, data.ids[i, t]]) for t in at]
        right = [int(logp[t - 1].argmax()) == int(data.ids[i, t]) for t in at]
        assert found.nll[i] == pytest.approx(np.mean(nll), rel=1e-4) and found.right[i] == np.mean(right) and found.exact[i] == all(right)


# ------------------------------------------------------------------------------------------------------------- attacks


@given(st.floats(0, 8), st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_the_bound_is_the_area_under_the_trade_off(eps, delta):
    x = np.linspace(0, 1, 200_001)
    curve = np.minimum(1, np.minimum(math.exp(eps) * x + delta, 1 - math.exp(-eps) * np.maximum(0, 1 - delta - x)))
    assert auc_bound(eps, delta) == pytest.approx(np.trapezoid(curve, x), abs=1e-4)


def test_auc_of_what_is_told_apart_and_what_is_not():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(size=300)
    from sklearn.metrics import roc_auc_score

    assert auc(a, b) == pytest.approx(roc_auc_score([1] * 200 + [0] * 300, -np.concatenate([a, b])))
    labels = rng.integers(3, size=200), rng.integers(3, size=300)
    pairs = [(x < y) for x, g in zip(a, labels[0], strict=True) for y, h in zip(b, labels[1], strict=True) if g == h]
    assert auc(a, b, labels) == pytest.approx(np.mean(pairs))
    shifted = a + 5 * labels[0], b + 5 * labels[1]  # one kind is harder: no news about membership
    assert auc(*shifted, labels) == pytest.approx(auc(a, b, labels))
    assert auc(a - 9, b) == 1.0 and auc_interval(a - 9, b, resamples=20) == (1.0, 1.0)
    low, high = auc_interval(a, b, resamples=200)
    assert low < 0.5 < high and high - low < 0.15
    with pytest.raises(ValueError, match="0 members and 3 others"):
        auc(np.array([]), b[:3])


def test_intervals_take_runs_and_documents():
    same = [np.array([0.0, 1.0] * 50)] * 3
    mean, low, high = over_seeds(same)
    assert mean == 0.5 and 0.38 < low < 0.45 and 0.55 < high < 0.62  # of 100 documents: +- 0.1
    apart = [np.full(100, v) for v in (0.0, 0.5, 1.0)]
    mean, low, high = over_seeds(apart)
    assert mean == 0.5 and low < 0.2 and high > 0.8  # runs differ, documents do not


# --------------------------------------------------------------------------------------------------------------- study


def test_the_stored_study_says_what_privacy_costs():
    report = read("private").report

    def value(model, metric):
        return report.get(model=model, metric=metric).value

    private_runs = [m for m in report.models() if m.startswith("epsilon") and not m.endswith("examples")]
    assert len(private_runs) >= 2
    n = 1000 + private.ODD
    for m in private_runs:
        row = report.get(model=m, metric="epsilon")
        assert row.value <= float(m.split()[1]) and "delta 1e-05" in row.note
        s = private._STUDY
        assert row.value == pytest.approx(epsilon(value(m, "noise"), s.batch / n, s.steps, s.delta), rel=1e-6)
        for what in ("auc members", "auc odd ones"):
            assert report.get(model=m, metric=what).low <= value(m, "auc bound")
        assert value("not private", "exact_match") >= value(m, "exact_match") and value("not private", "nll") < value(m, "nll")
        assert value(m, "nll") < value("before", "nll") and value(m, "tokens_right") > value("before", "tokens_right")


def test_what_is_learnt_often_shows_unless_it_is_private():
    report = read("private").report
    kept, hidden = (report.get(model=f"{m}, {2 * private.ODD} examples", metric="auc odd ones") for m in ("not private", "epsilon 8"))
    assert kept.low > 0.5 and hidden.value < kept.value
