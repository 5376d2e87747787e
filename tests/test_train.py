"""Learning steps: every kind of model learns, what is to stay stays, a run that was stopped goes on, and what is wrong is said."""

import copy
import itertools
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_model import tiny

from edgelab import Distill, FineTune, Gptq, Qat, Quantize, QuantScheme, Recipe
from edgelab.bundle import load_bundle, save_bundle
from edgelab.compress import audit, compress
from edgelab.layers import QLinear
from edgelab.methods.distill import hidden_error
from edgelab.model import dequantize, quantized, weights
from edgelab.train import _Rows, _scale_buffers, autocast, learn, learning_rate, quantization_aware

FAMILIES = ("llama", "qwen3_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture
def batches():
    return [torch.randint(0, 90, (16, 32), generator=torch.Generator().manual_seed(1))]


def disturbed(model, by=0.02):
    twin, g = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in twin.parameters():
            p += by * torch.randn(p.shape, generator=g)
    return twin


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_only_where_the_processor_multiplies_it(monkeypatch, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    x = torch.ones(2, 2)
    with autocast("cpu"):
        assert (x @ x).dtype == (torch.bfloat16 if fast else torch.float32)
    with autocast("cpu", enabled=False):
        assert (x @ x).dtype == torch.float32


def kld(teacher, student, ids) -> float:
    with torch.no_grad():
        p, q = (m(ids).logits.float().log_softmax(-1) for m in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"loss": "jsd", "hidden": 0.5}, {"temperature": 3.0, "alpha": 0.98}], ids=["kl", "jsd", "hinton"])
def test_a_student_comes_nearer_to_its_teacher(family, settings, batches):
    teacher = tiny(family)
    student = disturbed(teacher)
    before = kld(teacher, student, batches[0])
    grads = [p.requires_grad for p in student.parameters()]
    student.train()
    (told,) = learn(student, Distill(steps=20, lr=1e-3, batch=4, **settings), batches, teacher=teacher, progress=False)
    assert kld(teacher, student, batches[0]) < 0.9 * before, told
    assert [p.requires_grad for p in student.parameters()] == grads and not student.training
    assert getattr(student.config, "_experts_implementation", None) == getattr(teacher.config, "_experts_implementation", None)


def test_hidden_states_are_learnt_too(batches):
    """Where they weigh most, it is they that come nearer, and not the logits."""
    teacher, errors = tiny("llama"), {}
    for hidden in (0.0, 100.0):
        student = disturbed(teacher)
        learn(student, Distill(steps=20, lr=1e-3, batch=4, alpha=1.0, hidden=hidden), batches, teacher=teacher, progress=False)
        with torch.no_grad():
            ours, theirs = (m(batches[0], output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
        errors[hidden] = float(hidden_error(list(ours), list(theirs)))
    assert errors[100.0] < 0.8 * errors[0.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int3-g16", "uint3-g16", "int4-row", "nf4-g16"])
def test_scales_learn_and_codes_stay(family, scheme, batches):
    teacher = tiny(family)
    small = compress(teacher, Recipe.uniform(scheme), progress=False).model
    codes = {name: q.packed.copy() for name, (_, q) in quantized(small).items()}
    before = kld(teacher, small, batches[0])
    learn(small, Distill(steps=20, lr=5e-3, batch=4, train="scales"), batches, teacher=teacher, progress=False)
    for name, (_, q) in quantized(small).items():
        assert np.array_equal(q.packed, codes[name])
    assert kld(teacher, small, batches[0]) < 0.97 * before


def test_scales_of_single_experts_are_found_where_they_lie(batches):
    model = tiny("qwen3_moe")
    stack = next(w.name for w in weights(model) if w.kind == "experts").rsplit(".", 1)[0]
    rules = (("@router", None), (f"{stack}.*#1", QuantScheme.parse("int2-g16")), ("*", QuantScheme.parse("int4-g16")))
    small = compress(model, Recipe((Quantize(rules),)), progress=False).model
    found = _scale_buffers(small)
    assert list(found) == list(quantized(small))
    for name, (_, q) in quantized(small).items():
        assert np.array_equal(found[name][0].numpy(), q.scales), name
    before = kld(model, small, batches[0])
    learn(small, Distill(steps=20, lr=5e-3, batch=4, train="scales"), batches, teacher=model, progress=False)
    assert kld(model, small, batches[0]) < 0.97 * before


def test_adapters_stay_beside_the_codes_and_survive_a_bundle(batches, tmp_path):
    teacher = tiny("llama")
    small = compress(teacher, Recipe.uniform("int3-g16"), progress=False)
    before = kld(teacher, small.model, batches[0])
    parameters = small.coverage.parameters
    step = Distill(steps=20, lr=5e-3, batch=4, train="lora", rank=4)
    learn(small.model, step, batches, teacher=teacher, progress=False)
    assert kld(teacher, small.model, batches[0]) < 0.97 * before
    layer = next(m for m in small.model.modules() if isinstance(m, QLinear) and m.lora_a is not None)
    assert layer.lora_a.shape == (4, layer.in_features) and layer.lora_b.abs().max() > 0
    coverage = audit(small.model)
    extra = sum(m.lora_a.numel() + m.lora_b.numel() for m in small.model.modules() if isinstance(m, QLinear) and m.lora_a is not None)
    assert coverage.parameters == parameters + extra
    out = save_bundle(small.model, None, tmp_path / "b", recipe=Recipe((*small.recipe.steps, step)), coverage=coverage)
    again = load_bundle(out)
    with torch.no_grad():
        assert torch.equal(again(batches[0]).logits, small.model(batches[0]).logits)
        want = small.model(batches[0]).logits
        dequantize(again)  # the adapters are in the weights then
        assert torch.allclose(again(batches[0]).logits, want, atol=1e-4)


def test_lora_on_floating_point_is_merged(batches):
    teacher = tiny("qwen3_moe")
    student = disturbed(teacher)
    names = [n for n, _ in student.named_parameters()]
    experts = {n: p.clone() for n, p in student.named_parameters() if "experts" in n or "embed" in n}
    before = kld(teacher, student, batches[0])
    learn(student, Distill(steps=20, lr=1e-2, batch=4, train="lora"), batches, teacher=teacher, progress=False)
    assert [n for n, _ in student.named_parameters()] == names and kld(teacher, student, batches[0]) < before
    assert all(torch.equal(student.get_parameter(n), p) for n, p in experts.items())


@pytest.mark.parametrize("train", ["all", "lora"])
def test_zeros_stay(train, batches):
    teacher = tiny("llama")
    model = disturbed(teacher)
    with torch.no_grad():
        for w in weights(model):
            if w.role == "mlp":
                w.tensor[:, ::2] = 0
    zeros = {w.name: w.tensor == 0 for w in weights(model)}
    before = {w.name: w.tensor.clone() for w in weights(model)}
    learn(model, Distill(steps=10, lr=1e-3, batch=4, train=train), batches, teacher=teacher, keep_zeros=True, progress=False)
    for w in weights(model):
        assert torch.equal(w.tensor == 0, zeros[w.name]), w.name
    assert any(not torch.equal(w.tensor, before[w.name]) for w in weights(model))


def held_kld(teacher, student, batches) -> float:
    (rows,) = _Rows(batches, 0).held_back.values()
    return kld(teacher, student, rows)


def losses(told) -> tuple[float, float]:
    """The judged losses, first and best, of a remark."""
    first, best = re.search(r"held-out loss ([\d.]+) -> ([\d.]+) nats", told).groups()
    return float(first), float(best)


@pytest.mark.parametrize("train", ["norms", "lora", "scales"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_told_is_what_a_quantized_model_does(train, adapted, batches):
    """Before and after: the twin that learns computes what the model does, its adapters among it, and hands all of it back."""
    teacher = tiny("llama")
    small = compress(teacher, Recipe.uniform("int3-g16"), progress=False).model
    if adapted:
        for module in small.modules():
            if isinstance(module, QLinear) and module is not small.lm_head:
                module.adapt(0.2 * torch.randn(4, module.in_features), 0.1 * torch.randn(module.out_features, 4))
    before = held_kld(teacher, small, batches)
    step = Distill(steps=20, lr=3e-3, batch=4, train=train, rank=4)
    (told,) = learn(small, step, batches, teacher=teacher, keep_zeros=True, progress=False)
    first, best = losses(told)
    assert first == pytest.approx(before, rel=0.01) and best < first
    assert held_kld(teacher, small, batches) == pytest.approx(best, rel=0.01)
    if adapted and train == "lora":
        with pytest.raises(ValueError, match=r"rank=8: .*q_proj has an adapter of rank 4 already, which would learn on; give rank=4"):
            learn(small, Distill(steps=1, train="lora"), batches, teacher=teacher, progress=False)


def test_scales_leave_matrices_without_codes_alone(batches):
    teacher = tiny("llama")
    rules = (("@embedding", None), ("@head", None), ("*", QuantScheme.parse("int3-g16")))
    small = compress(teacher, Recipe((Quantize(rules),)), progress=False).model
    before = {n: p.clone() for n, p in small.named_parameters()}
    learn(small, Distill(steps=10, lr=3e-3, batch=4, train="scales"), batches, teacher=teacher, progress=False)
    changed = {n for n, p in small.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("norm" in n for n in changed)


def test_bfloat16_learns_in_float32_and_is_bfloat16_again(batches):
    """A rate of 1e-4 moves few bfloat16 numbers near 0.1: without float32 inside, a tenth of this gain is left."""
    teacher = tiny("llama").bfloat16()
    student = disturbed(teacher)
    before = kld(teacher.float(), copy.deepcopy(student).float(), batches[0])
    learn(student, Distill(steps=30, lr=1e-4, batch=4), batches, teacher=teacher, progress=False)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert kld(teacher, student.float(), batches[0]) < 0.85 * before


def test_l1_makes_weights_smaller(batches):
    sizes = []
    for l1 in (0.0, 30.0):
        model = tiny("llama")
        learn(model, FineTune(steps=20, lr=3e-3, batch=4, l1=l1), batches, progress=False)
        sizes.append(sum(float(w.tensor.abs().sum()) for w in weights(model)))
    assert sizes[1] < 0.95 * sizes[0]


def test_a_stopped_run_goes_on_to_the_same_end(batches, tmp_path, monkeypatch):
    teacher = tiny("llama")
    step = Distill(steps=12, lr=1e-3, batch=4)
    whole = disturbed(teacher)
    learn(whole, step, batches, teacher=teacher, folder=tmp_path / "whole", progress=False)

    import edgelab.train as train

    monkeypatch.setattr(train, "_SAVE_EVERY_S", 0.0)
    draw, seen = _Rows.draw, []

    def breaking(self, at, batch):
        if at == 7 and 7 not in seen:
            seen.append(7)
            raise KeyboardInterrupt
        return draw(self, at, batch)

    monkeypatch.setattr(_Rows, "draw", breaking)
    with pytest.raises(KeyboardInterrupt):
        learn(disturbed(teacher), step, batches, teacher=teacher, folder=tmp_path / "part", progress=False)
    again = disturbed(teacher)
    learn(again, step, batches, teacher=teacher, folder=tmp_path / "part", progress=False)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    curves = [[json.loads(x) for x in (tmp_path / n / "curve.jsonl").read_text().splitlines()] for n in ("whole", "part")]
    assert [r["step"] for r in curves[0]] == [r["step"] for r in curves[1]] == list(range(1, 13))
    with pytest.raises(ValueError, match="of a run with another step"):
        learn(disturbed(teacher), Distill(steps=13, lr=1e-3, batch=4), batches, teacher=teacher, folder=tmp_path / "part", progress=False)


def test_a_checkpoint_is_of_one_model_and_one_teacher(batches, tmp_path):
    """Adapters begin alike in every model: without the models' own digests, another's would be taken up."""
    teacher, other = tiny("llama"), disturbed(tiny("llama"))
    step = Distill(steps=2, lr=1e-3, batch=4, train="lora")
    learn(copy.deepcopy(teacher), step, batches, teacher=teacher, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of a run with another model"):
        learn(copy.deepcopy(other), step, batches, teacher=teacher, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of a run with another teacher"):
        learn(copy.deepcopy(teacher), step, batches, teacher=other, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of a run with another data"):
        learn(copy.deepcopy(teacher), step, [batches[0].flip(0)], teacher=teacher, folder=tmp_path, progress=False)


def test_a_run_that_lost_patience_is_over(batches, tmp_path):
    teacher = tiny("llama")
    step = Distill(steps=50, lr=1.0, batch=4, patience=2)
    for _ in range(2):
        learn(copy.deepcopy(teacher), step, batches, teacher=teacher, folder=tmp_path, progress=False)
        with safe_open(tmp_path / "checkpoint.safetensors", "pt") as f:
            assert json.loads(f.metadata()["facts"])["step"] == 10  # two judgements, one every five steps


def test_the_best_state_is_kept_and_patience_stops(batches):
    teacher = tiny("llama")
    student = copy.deepcopy(teacher)  # nothing to learn: any step can only harm
    before = [p.clone() for p in student.parameters()]
    (told,) = learn(student, Distill(steps=50, lr=1.0, batch=4, patience=2), batches, teacher=teacher, progress=False)
    assert "best after 0 of 50" in told
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), before, strict=True))


def test_kept_draws_teach_as_the_teacher_does(batches):
    teacher = tiny("llama")
    student = disturbed(teacher, by=0.1)
    before = kld(teacher, student, batches[0])
    learn(student, Distill(steps=60, lr=1e-3, batch=8, samples=32), batches, teacher=teacher, progress=False)
    assert kld(teacher, student, batches[0]) < before


def test_the_teacher_is_read_once_and_its_tokens_are_kept(batches, tmp_path, monkeypatch):
    teacher, step = tiny("llama"), Distill(steps=3, lr=1e-3, batch=4, samples=5)
    students = [disturbed(teacher, by=0.1) for _ in range(2)]
    read, forward = [], teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda *args, **kwargs: read.append(kwargs["input_ids"]) or forward(*args, **kwargs))
    learn(students[0], step, batches, teacher=teacher, folder=tmp_path, progress=False)
    assert sorted(torch.cat(read).tolist()) == sorted(batches[0].tolist())  # every row once, those that judge too
    (tmp_path / "checkpoint.safetensors").unlink()
    learn(students[1], step, batches, teacher=teacher, folder=tmp_path, progress=False)
    assert len(torch.cat(read)) == len(batches[0])
    assert all(torch.equal(p, q) for p, q in zip(*(s.parameters() for s in students), strict=True))
    kept = load_file(tmp_path / "drawn.safetensors")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in kept.items()} == {
        "learning.32": (torch.int16, (14, 32, 5)),
        "judging.32": (torch.int16, (2, 32, 5)),
    }
    with pytest.raises(ValueError, match="was drawn with another teacher"):
        learn(students[1], step, batches, teacher=tiny("qwen3_moe"), folder=tmp_path, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"step_size": "max"}, {"start": "gptq"}, {"alpha": 0.98}], ids=["lsq", "max", "gptq", "text"])
def test_rounding_that_learns_beats_rounding(family, settings, batches):
    teacher = tiny(family)
    rules = (("@router", None), ("@embedding", None), ("*", QuantScheme.parse("int3-row")))
    plain = compress(teacher, Recipe((Quantize(rules),)), progress=False).model
    recipe = Recipe((Quantize(rules, method=Qat(steps=20, lr=1e-3, batch=4, scale_lr=3.0, **settings)),))
    before = [p.clone() for p in teacher.parameters()]
    learnt = compress(teacher, recipe, training=batches, calibration=batches, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before, strict=True))  # the original does not learn
    assert kld(teacher, learnt.model, batches[0]) < 0.97 * kld(teacher, plain, batches[0])
    assert learnt.coverage.bits_per_weight == audit(plain).bits_per_weight
    assert learnt.remarks[0].startswith("qat")


def test_codes_are_what_the_forward_pass_computed_with(batches):
    """One step of learning rate zero: the codes must be those of the first scales, rounded to nearest."""
    model = tiny("llama")
    name = next(w.name for w in weights(model) if w.role == "mlp")
    weight = next(w for w in weights(model) if w.name == name).tensor.clone()
    twin = copy.deepcopy(model)
    quantization_aware(twin, {name: QuantScheme.parse("int4-row")}, Qat(steps=1, lr=1e-30, alpha=0), batches, progress=False)
    q = quantized(twin)[name][1]
    scale = torch.from_numpy(q.scale_values())
    assert torch.equal(torch.from_numpy(q.codes().astype(np.float32)) - 8, (weight / scale).clamp(-8, 7).round())


def test_what_is_wrong_is_said(batches):
    model = tiny("llama")
    with pytest.raises(ValueError, match="teacher=None"):
        learn(model, Distill(steps=1), batches, progress=False)
    with pytest.raises(ValueError, match=r"training batch 0 is torch\.float32"):
        learn(model, FineTune(steps=1), [torch.zeros(2, 8)], progress=False)
    with pytest.raises(ValueError, match="there are 1 rows of training data"):
        learn(model, FineTune(steps=1), [batches[0][:1]], progress=False)
    with pytest.raises(ValueError, match="this model holds no codes"):
        learn(model, FineTune(steps=1, train="scales"), batches, progress=False)
    with pytest.raises(ValueError, match="teacher= is the model that learns"):
        learn(model, Distill(steps=1), batches, teacher=model, progress=False)
    with pytest.raises(ValueError, match="samples=4: tokens drawn from the teacher stand for the forward loss at temperature 1"):
        Distill(samples=4, temperature=3.0)
    other = tiny("llama")
    other.config.vocab_size = 7
    with pytest.raises(ValueError, match="the teacher 7: a student must read its teacher's tokens"):
        learn(model, Distill(steps=1), batches, teacher=other, progress=False)
    with pytest.raises(FloatingPointError, match="lower lr="):
        learn(model, FineTune(steps=30, lr=1e30, batch=4), batches, progress=False)
    name = next(w.name for w in weights(model) if w.role == "mlp")
    with pytest.raises(ValueError, match=r"nf4-g16 has no single step that could learn; use int4"):
        quantization_aware(model, {name: QuantScheme.parse("nf4-g16")}, Qat(steps=1, alpha=0), batches, progress=False)
    with pytest.raises(ValueError, match="powers of two and can't learn"):
        small = compress(tiny("llama"), Recipe.uniform("mxfp4-g32"), progress=False).model
        learn(small, Distill(steps=1, train="scales"), batches, teacher=tiny("llama"), progress=False)


def test_a_method_with_scales_needs_calibration():
    with pytest.raises(ValueError, match="calibration"):
        compress(
            tiny("llama"),
            Recipe((Quantize((("*", QuantScheme.parse("int4-row")),), method=Qat(steps=1, start="gptq")),)),
            training=[torch.zeros(4, 8, dtype=torch.long)],
            progress=False,
        )
    assert Gptq().sequential  # what start="gptq" does not use: all scales come from the original


def test_the_rate_by_hand():
    rates = [learning_rate(s, 40, 2.0) for s in range(40)]
    assert rates[:2] == [1.0, 2.0] and rates[2] < 2.0 and 0 < rates[-1] < 0.06
    assert all(a > b for a, b in itertools.pairwise(rates[1:]))
