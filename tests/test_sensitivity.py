"""Measured losses of single weights: what they are, that the model comes back, that they resume, and that they add up."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import tiny

from edgelab import Quantize, QuantScheme
from edgelab.methods.mixed import allocate
from edgelab.methods.rtn import round_to_nearest
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import weights
from edgelab.sensitivity import _divergence, additivity, joint_loss, mixed_recipe, rtn, sensitivity

SCHEMES = ("int2-g16", "int4-g16")


def batches(n: int = 2, rows: int = 2, length: int = 12) -> list[torch.Tensor]:
    return [torch.randint(2, 96, (rows, length)) for _ in range(n)]


def spread(model, scale: float = 6.0):
    """A model of small random weights says the same everywhere; larger ones make its distributions differ."""
    for w in weights(model):
        w.tensor.mul_(scale if w.kind != "embedding" else 20)
    return model


def state(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def whole_model_loss(model, ids, w, q) -> float:
    """The definition: full passes, full precision of the comparison."""
    with torch.no_grad():
        want = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
        old = w.tensor.clone()
        w.tensor.copy_(torch.from_numpy(q.dequantize()))
        got = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
        w.tensor.copy_(old)
    return float(token_kl(want, got).mean())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3"])
@torch.no_grad()
def test_losses_are_the_definitions(family):
    """Also of embedding, head and stacks, though passes start in the middle; and the model is as it was, to the bit."""
    model, data = spread(tiny(family)), batches(2, 1)
    before = state(model)
    listed = [w for w in weights(model) if not w.tied_to and w.kind != "router"]
    listed = {w.name: w for w in [listed[0], *listed[2::4], *(w for w in listed if w.kind == "experts"), listed[-1]]}
    costs = sensitivity(model, data, listed, SCHEMES, progress=False)
    assert costs.keys() == listed.keys()
    for name, options in costs.items():
        w = listed[name]
        for text, (loss, size) in options.items():
            q = rtn(w.tensor, QuantScheme.parse(text), name)
            want = sum(whole_model_loss(model, ids, w, q) for ids in data) / len(data)
            assert loss == pytest.approx(want, rel=2e-2, abs=1e-7) and size == q.nbytes
    assert sum(o["int2-g16"][0] for o in costs.values()) > sum(o["int4-g16"][0] for o in costs.values()) > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@given(st.integers(0, 2**31), st.floats(1e-4, 100))
@settings(deadline=None, max_examples=30)
def test_divergence_keeps_its_digits(seed, size):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(5, 40, generator=g)
    b = a + size * torch.randn(5, 40, generator=g)
    want = float(token_kl(*(torch.log_softmax(x.double(), -1) for x in (a, b))).sum())
    got = _divergence(*(torch.log_softmax(x, -1) for x in (a, b)))
    assert got == pytest.approx(want, rel=0.01)
    assert _divergence(torch.log_softmax(a, -1), torch.log_softmax(a, -1)) == 0


def test_divergence_where_a_word_is_ruled_out():
    half, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert _divergence(sure, half) == pytest.approx(0.693147, rel=1e-5) and _divergence(half, sure) == float("inf")


def test_a_scheme_that_does_not_fit_is_left_out():
    model = tiny("qwen3")  # attention: 32 inputs, mlp down: 64
    costs = sensitivity(model, batches(1), ["*_proj"], ("int4-g64", "int4-g16"), progress=False)
    assert {n.rpartition(".")[2] for n, o in costs.items() if "int4-g64" in o} == {"down_proj"}
    with pytest.raises(ValueError, match=r"none fits model.layers.0.self_attn.q_proj \(group_size=64 does not divide"):
        sensitivity(model, batches(1), ["*.q_proj"], ["int4-g64"], progress=False)


def test_default_is_the_body():
    model = tiny("deepseek_v3")
    costs = sensitivity(model, batches(1, 1, 4), schemes=["int4-g16"], progress=False)
    assert costs.keys() == {w.name for w in weights(model) if w.role not in ("router", "embedding", "head")}


class Stop(Exception):
    pass


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    """Mode, gradients, forwards and every bit of every weight: in the middle of a pass, and in a method."""
    model, data = tiny("deepseek_v3").train(), batches(1)
    before, calls = state(model), []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))

    def fails(weight, scheme, name):
        if len(calls) > 9:
            raise Stop
        return rtn(weight, scheme, name)

    with pytest.raises(Stop):
        sensitivity(model, data, schemes=SCHEMES, method=fails, progress=False)
    handle.remove()
    count = iter(range(1000))
    handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()) if next(count) == 12 else None)
    with pytest.raises(Stop):
        sensitivity(model, data, schemes=SCHEMES, progress=False)
    with pytest.raises(Stop):
        handle.remove()
        handle = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()))
        sensitivity(model, data, schemes=SCHEMES, metric="fisher", progress=False)
    handle.remove()
    assert all(m.training for m in model.modules()) and not any("forward" in m.__dict__ for m in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad, name


def test_it_resumes_with_what_was_measured(tmp_path):
    """Killed in block 1, started again: block 0 is not measured twice, and the result is that of one go."""
    model, data, store = tiny("deepseek_v3"), batches(1), tmp_path / "losses.json"
    whole = sensitivity(model, data, schemes=SCHEMES, progress=False)

    def killed(weight, scheme, name):
        if ".layers.1." in name:
            raise Stop
        return rtn(weight, scheme, name)

    with pytest.raises(Stop):
        sensitivity(model, data, schemes=SCHEMES, method=killed, store=store, progress=False)
    held = json.loads(store.read_text())["losses"]
    assert held and all(".layers.0." in name for name in held)
    held_name = next(iter(held))
    text = json.loads(store.read_text())
    text["losses"][held_name]["int2-g16"]["loss"] = 123.0  # a mark: taken from the file, not measured
    store.write_text(json.dumps(text))
    again = sensitivity(model, data, schemes=SCHEMES, store=store, progress=False)
    assert again[held_name].pop("int2-g16")[0] == 123.0 and whole[held_name].pop("int2-g16")[0] != 123.0
    assert again == whole and [f.name for f in tmp_path.iterdir()] == ["losses.json"]

    def other(weight, scheme, name):
        return round_to_nearest(weight * 1.01, scheme, name=name)

    anew = sensitivity(model, data, schemes=SCHEMES, method=other, store=store, progress=False)
    assert anew[held_name]["int2-g16"][0] != 123.0  # other codes are measured again
    with pytest.raises(ValueError, match="measured with another batches; give another file"):
        sensitivity(model, batches(1), schemes=SCHEMES, store=store, progress=False)
    weights(model)[3].tensor[0, 0] += 1
    with pytest.raises(ValueError, match="measured with another model"):
        sensitivity(model, data, schemes=SCHEMES, store=store, progress=False)


def test_small_losses_add_up_and_large_ones_less():
    """8-bit errors are small: the sum of single losses is the loss of all, within the cross terms of one draw."""
    model, data = spread(tiny("qwen3"), 3), batches(4, 4, 24)
    costs = sensitivity(model, data, schemes=("int2-g16", "int8-g16"), progress=False)
    before = state(model)
    ratio = {s: additivity(model, data, costs, dict.fromkeys(costs, s)).ratio for s in ("int2-g16", "int8-g16")}
    assert 0.7 < ratio["int8-g16"] < 1.4
    one = next(iter(costs))
    assert joint_loss(model, data, {one: "int2-g16"}) == pytest.approx(costs[one]["int2-g16"][0], rel=1e-3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_fisher_estimate_is_half_d_F_d():
    """Small errors in a dense model: the sum over all weights is the measured one, within the noise of some sequences."""
    model, data = spread(tiny("qwen3"), 3), batches(4, 8, 24)
    measured, estimated = (sensitivity(model, data, schemes=["int8-g16"], metric=m, progress=False) for m in ("kld", "fisher"))
    assert measured.keys() == estimated.keys()
    a, b = (torch.tensor([o["int8-g16"][0] for o in c.values()]) for c in (measured, estimated))
    assert float(b.sum() / a.sum()) == pytest.approx(1, abs=0.3)
    assert torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1] > 0.8


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_share_the_loss_of_their_stack(family):
    model, data = spread(tiny(family)), batches(1)
    stacks = {w.name: w for w in weights(model) if w.kind == "experts"}
    whole = sensitivity(model, data, ["@experts"], SCHEMES, progress=False)
    split = sensitivity(model, data, ["@experts"], SCHEMES, per_expert=True, progress=False)
    measured = sensitivity(model, data, ["@experts"], SCHEMES, per_expert="measured", progress=False)
    assert split.keys() == measured.keys() == {f"{n}#{e}" for n, w in stacks.items() for e in range(w.shape[0])}
    for name, w in stacks.items():
        for s in SCHEMES:
            entries = [split[f"{name}#{e}"][s] for e in range(w.shape[0])]
            assert sum(loss for loss, _ in entries) == pytest.approx(whole[name][s][0], rel=1e-6)
            assert sum(size for _, size in entries) == whole[name][s][1]
    name, w = next(iter(stacks.items()))
    assert measured[f"{name}#1"]["int2-g16"][0] == pytest.approx(joint_loss(model, data, {f"{name}#1": "int2-g16"}), rel=1e-3)


def test_an_expert_that_is_never_chosen_costs_nothing():
    model, data = spread(tiny("deepseek_v3")), batches(2)
    for w in weights(model):
        if w.kind == "router":
            model.get_submodule(w.module_name).e_score_correction_bias[1] = -100.0
    for how in (True, "measured"):
        costs = sensitivity(model, data, ["@experts"], SCHEMES, per_expert=how, progress=False)
        assert all(o["int2-g16"][0] == 0 for n, o in costs.items() if n.endswith("#1"))
        assert any(o["int2-g16"][0] > 0 for n, o in costs.items() if n.endswith("#0"))


def test_blocks_that_hand_on_more_than_their_output_are_run_whole():
    """A model whose last block reads what the first left elsewhere: skipping would go unnoticed, were it not checked."""
    model, data = spread(tiny("qwen3")), batches(1)
    first, last = model.model.layers[0], model.model.layers[-1]
    left = []
    first.mlp.register_forward_hook(lambda _m, _i, out: left.append(out * 0.5))
    last.register_forward_hook(lambda _m, _i, out: out + left.pop() if left else out)
    with pytest.warns(UserWarning, match=r"can't start at model.layers.0: whole passes are used"):
        costs = sensitivity(model, data, ["*.1.mlp.down_proj"], SCHEMES, progress=False)
    w = next(w for w in weights(model) if w.name == "model.layers.1.mlp.down_proj")
    q = rtn(w.tensor, QuantScheme.parse("int2-g16"), w.name)
    assert costs[w.name]["int2-g16"][0] == pytest.approx(whole_model_loss(model, data[0], w, q), rel=2e-2)


def test_recipe_of_an_allocation():
    """Names get their schemes, the base decides about the rest, and the recipe fits the model."""
    from edgelab import Recipe
    from edgelab.compress import plan

    model = spread(tiny("qwen3"))
    costs = sensitivity(model, batches(1), schemes=("int2-g16", "int4-g16", "int8-g16"), progress=False)
    budget = sum(o["int4-g16"][1] for o in costs.values())
    found = allocate(costs, budget)
    base = Recipe.body("int4-g16", method="gptq").steps[0]
    step = mixed_recipe(found, base)
    assert step.method == base.method and step.rules[-len(base.rules) :] == base.rules
    schemes = plan(model, Recipe((step,)))[0]
    assert {n: str(s) for n, s in schemes.items()} == found.choice
    assert sum(s.nbytes(next(w.shape for w in weights(model) if w.name == n)) for n, s in schemes.items()) == found.bytes <= budget
    assert found.loss <= sum(o["int4-g16"][0] for o in costs.values())
    assert mixed_recipe({"a": "int2-row"}, Quantize((("*", None),))).scheme_for("a", "mlp") == QuantScheme.parse("int2-row")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["*.nothing"]}, r"names: '\*.nothing' matches no weight"),
        ({"metric": "mse"}, "metric='mse' is not known"),
        ({"per_expert": "each"}, "per_expert='each' is not known"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.ones(3)]}, r"batches\[0\] is torch.float32 \(3,\); it must be int64"),
        ({"method": lambda w, s, n: rtn(w * float("nan"), s, n)}, "NaN"),
    ],
)
def test_errors_name_the_value_and_the_way_out(settings, message):
    given = {"batches": batches(1), "schemes": SCHEMES, "progress": False} | settings
    with pytest.raises(ValueError, match=message):
        sensitivity(tiny("qwen3"), **given)


def test_a_quantized_model_is_refused():
    from edgelab import Recipe
    from edgelab.compress import compress

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compress(tiny("qwen3"), Recipe.uniform("int4-g16"), progress=False).model
    with pytest.raises(ValueError, match="is quantized already; measure the floating-point model"):
        sensitivity(small, batches(1), progress=False)
