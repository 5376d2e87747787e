"""What notebook 04 shows of quantized models: errors of a matrix, levels, the staircase, what is recovered; control and exercises."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config

from edgelab import QuantScheme, Recipe, plots
from edgelab import quantize_lab as lab
from edgelab.compress import compress
from edgelab.methods.calibrate import InputStats
from edgelab.methods.gptq import gptq
from edgelab.methods.rtn import round_to_nearest
from edgelab.pretrain import train_tokenizer

INT4 = QuantScheme.parse("int4-g32")


@pytest.fixture(scope="module")
def matrix():
    """A weight [24, 64] and the second moments of inputs that vary together."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=g) @ torch.randn(12, 64, generator=g) + 0.3 * torch.randn(400, 64, generator=g)
    return torch.randn(24, 64, generator=g), x.T @ x


@pytest.fixture(scope="module")
def tiny():
    """(model, tokenizer, eight documents)."""
    texts = [f"The {a} of the {b} is a matter of {a} and of {b}.\n" for a in ("name", "list", "loop", "key") for b in ("file", "test")]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    test = Dataset.from_dict({"domain": ["prose"] * len(texts), "id": [f"p{i}" for i in range(len(texts))], "text": texts})
    return AutoModelForCausalLM.from_config(config).eval(), train_tokenizer(texts, 300), test


def point(name: str, bits: float, kld: float) -> lab.Point:
    method, scheme = name.split()
    return lab.Point(name, method, QuantScheme.parse(scheme), bits, int(1e5 * bits), kld, 0.9 * kld, 1.1 * kld, 1 - kld)


@pytest.fixture
def stairs():
    """ln KLD falls by 1.5 for each bit, and GPTQ's lies 0.75 lower: half a bit."""
    points = [point(f"rtn int{b}-g32", b + 0.5, math.exp(-1.5 * b)) for b in (2, 3, 4, 8)]
    points += [point(f"gptq int{b}-g32", b + 0.5, math.exp(-1.5 * b - 0.75)) for b in (2, 3, 4, 8)]
    return {p.name: p for p in points}


# ------------------------------------------------------------------------------------------------------------ one matrix


def test_both_errors_are_what_their_names_say(matrix):
    weight, xx = matrix
    q = round_to_nearest(weight, INT4)
    e = (weight - torch.from_numpy(q.dequantize())).double()
    found = lab.matrix_error(weight, q, xx, "rtn")
    assert found.equal == pytest.approx(float(e.norm() / weight.double().norm()))
    outputs = [torch.trace(a @ xx.double() @ a.T) for a in (e, weight.double())]
    assert found.seen == pytest.approx(math.sqrt(float(outputs[0] / outputs[1])))
    assert found.bits == 4.5 and found.row["scheme"] == "int4-g32"
    alike = lab.matrix_error(weight, q, 3 * torch.eye(64))
    assert alike.seen == pytest.approx(alike.equal)  # inputs that are all alike and independent see what all see


def test_gptq_lowers_the_error_that_inputs_see_and_not_with_others_inputs(matrix):
    weight, xx = matrix
    errors = {e.method: e for e in lab.side_by_side(weight, xx)}
    nearest, published, refined = (errors[n] for n in ("RTN, scale of least squared error", "GPTQ as published", "GPTQ, refined"))
    assert refined.seen < published.seen < nearest.seen and nearest.equal < published.equal
    assert nearest.equal < errors["RTN, signed max / -8: codes -8 .. 7"].equal < errors[lab.NARROW].equal
    assert errors["RTN, asymmetric"].bits == 4.5 and errors["MXFP4"].bits == 4.25
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    wrong = gptq(weight, xx[shuffled][:, shuffled], INT4, rounds=0)
    assert lab.matrix_error(weight, wrong, xx).seen > nearest.seen
    assert "GPTQ, refined" in lab.say_errors(list(errors.values()))
    assert plots.to_svg(lab.errors_figure(list(errors.values()))).startswith("<svg")


def test_narrow_range_never_uses_the_lowest_code():
    w = torch.tensor([[-8.0, 7.6, 3.1, 0.2] * 8])
    values = lab.narrow_range(w)
    step = float(torch.tensor(8 / 7).half())
    assert torch.equal(torch.round(values / step), torch.tensor([[-7.0, 7.0, 3.0, 0.0] * 8]))
    assert torch.equal(lab.narrow_range(torch.zeros(1, 32)), torch.zeros(1, 32))


def test_levels_hold_every_value_that_the_group_was_rounded_to(matrix):
    group = matrix[0][0, :32]
    for row, scheme in zip(lab.group_levels(group)[1:], ("int4", "uint4", "nf4", "fp4", "mxfp4"), strict=True):
        rounded = round_to_nearest(group[None], QuantScheme.parse(f"{scheme}-g32")).dequantize()
        assert set(rounded.ravel()) <= set(row.values), row.name
        # fp4 and mxfp4 have a zero with either sign
        assert len(row.values) == (15 if scheme in ("fp4", "mxfp4") else 16)
        assert row.error == pytest.approx(float(np.linalg.norm(rounded - group.numpy()) / np.linalg.norm(group.numpy())), rel=1e-5)
    levels = lab.group_levels(group)
    fig = lab.levels_figure(group, levels)
    assert [t.name for t in fig.data[2:]] == [x.name for x in levels] and plots.to_svg(fig).startswith("<svg")
    best = min(levels, key=lambda x: x.error)
    assert f"{best.name} errs least" in lab.say_levels(levels)


# ---------------------------------------------------------------------------------------------------------- whole models


def test_results_are_paired_and_counted(tiny):
    model, tokenizer, test = tiny
    made = {b: compress(model, Recipe.body(f"int{b}-g32"), progress=False) for b in (2, 4)}
    found = lab.results(model, {"two": made[2], "four": made[4], "same": model}, tokenizer, test, max_docs=4)
    two, four, same = found.points.values()
    assert two.kld > four.kld > same.kld == 0 and same.same_top == 1
    assert (four.bits, four.method, str(four.scheme)) == (4.5, "rtn", "int4-g32") and same.bits == 16
    kept = sum(r.parameters for r in made[4].coverage if not r.touched)
    assert four.nbytes == sum(r.predicted_bytes for r in made[4].coverage if r.touched) + 2 * kept
    value, low, high = found.ratio("four", "two")
    assert value == pytest.approx(four.kld / two.kld) and low <= value <= high < 1
    assert found.ratio("two", "two") == (1, 1, 1)  # paired: no spread at all
    rows = found.rows(against="two", names=["two", "four"])
    assert [r["model"] for r in rows] == ["two", "four"] and rows[0]["KLD / two's, paired [95 %]"] == "1"
    with pytest.raises(ValueError, match="can't be called 'original'"):
        lab.results(model, {"original": model}, tokenizer, test, max_docs=1)


def test_saved_bits_on_a_staircase_that_a_hand_can_check(stairs):
    saved = lab.saved_bits(stairs)
    assert [str(s.scheme) for s in saved] == ["int8-g32", "int4-g32", "int3-g32", "int2-g32"]
    assert saved[0].base_bits is None and saved[0].row["saved"] == ""  # better than all that was measured: nothing is claimed
    assert [s.saved for s in saved[1:]] == pytest.approx([0.5, 0.5, 0.5])
    assert "saves 0.50 to 0.50 bits" in lab.say_staircase(stairs)
    stairs["rtn int3-g32"] = stairs["rtn int3-g32"]._replace(kld=1.0)
    with pytest.raises(ValueError, match="does not rise"):
        lab.saved_bits(stairs)


def test_the_control_shows_what_was_measured_and_says_what_was_not(stairs):
    control = lab.StaircaseControl(stairs)
    assert control.point is stairs["gptq int4-g32"] and control.slider.value == 2
    assert "0.56 GB" in control.told  # 1e9 weights of 4.5 bits
    control.slider.value = 1
    assert control.bits.value == 3 and control.point is stairs["gptq int3-g32"]
    ring = control.figure.data[-1]
    assert (ring.x, ring.y) == ((3.5,), (control.point.kld,))
    control.method.value = "rtn"
    assert control.point is stairs["rtn int3-g32"] and ring.y == (control.point.kld,)
    assert control.html.count("<tr>") == 4  # the head and three choices
    control.billions.value = 8
    assert "3.50 GB" in control.told
    control.bits.value = 5
    assert "5 bits were not measured; use 2, 3, 4 or 8" in str(control.error) and 'role="alert"' in control.sentence.value
    control.bits.value = 8
    assert control.error is None and control.slider.value == 3 and "alert" not in control.sentence.value
    del stairs["gptq int8-g32"]
    control = lab.StaircaseControl(stairs)
    control.bits.value = 8
    assert "gptq at int8-g32 was not measured; use one of int2-g32, int3-g32, int4-g32" in str(control.error)
    with pytest.raises(ValueError, match="'rtn int3-g64' was not measured"):
        control.choose("rtn int3-g64")
    assert control.choose("rtn int2-g32") is stairs["rtn int2-g32"] and control.error is None
    assert "stands at rtn, int2-g32" in repr(control)


def test_figures_of_whole_models_can_be_drawn_anywhere(stairs):
    found = lab.Results(stairs, None)
    for fig in (lab.methods_figure(found), lab.staircase_figure(stairs)):
        assert plots.to_svg(fig).startswith("<svg")
    assert [t.name for t in lab.staircase_figure(stairs).data] == ["rtn, groups of 32", "gptq, groups of 32"]


def test_cost_rows_put_the_dearest_byte_first():
    costs = {"model.a": {"int3-g32": (1.0, 10)}, "b": {"int3-g32": (4.0, 10)}, "c": {"int3-g32": (4.0, 80)}}
    rows = lab.cost_rows(costs, {"model.a": "int3-g32", "b": "int4-g32", "c": "int2-g32"}, "int3-g32", ends=1)
    assert [(r["weight"], r["gets"]) for r in rows] == [("b", "int4-g32"), ("c", "int2-g32")]


def test_recovery_is_a_share_of_what_was_lost(stairs):
    points = {
        n: stairs["rtn int4-g32"]._replace(name=n, kld=k) for n, k in (("fine", 0.1), ("naive", 0.5), ("half", 0.3), ("better", 0.06))
    }
    rows = lab.recovery_rows(lab.Results(points, None), "fine", "naive", ["half", "better"])
    assert [r["of the loss recovered, %"] for r in rows] == ["0.0", "50.0", "110.0", "100.0"]
    with pytest.raises(ValueError, match="nothing was lost"):
        lab.recovery_rows(lab.Results(points, None), "naive", "fine", [])


def test_channels_are_sorted_and_said():
    absmax = torch.tensor([1.0, 64.0, 2.0])
    after = InputStats(torch.tensor(5), absmax, absmax, absmax)
    before = InputStats(torch.tensor(5), torch.ones(3), absmax, absmax)
    fig = lab.channels_figure(before, after)
    assert list(fig.data[1].y) == [64.0, 2.0, 1.0] and plots.to_svg(fig).startswith("<svg")
    assert "reaches 64, the median one 2: 32.0 times" in lab.say_channels(before, after)


# ------------------------------------------------------------------------------------------------------------- exercises

RIGHT = [3, 6, 1, 4, 3, 0, 7, 2]


def test_right_answers_are_accepted_and_none_is_not_answered():
    group = torch.tensor([lab.EXERCISE_GROUP])
    q = round_to_nearest(group, QuantScheme.parse("int3-row"))
    assert q.codes()[0].tolist() == RIGHT  # the exercise and the library agree
    assert lab.check_rtn(-0.4, RIGHT).startswith("Right") and lab.check_rtn(float(q.scales[0, 0]), q.codes()[0]).startswith("Right")
    assert lab.check_bits(3.5).startswith("Right") and lab.check_gptq(0.4, 0).startswith("Right")
    for said in (lab.check_rtn(None, RIGHT), lab.check_bits(None), lab.check_gptq(0.4, None)):
        assert said.startswith("Not yet: no answer so far")


@pytest.mark.parametrize(
    ("scale", "codes", "hint"),
    [
        (1.6 / 3, [4, 2, 5, 3, 4, 6, 0, 5], "one of the eight codes unused"),
        (0.4, [5, 2, 7, 4, 5, 7, 0, 6], "the sign"),
        (-0.2, RIGHT, "largest magnitude"),
        (-0.4, [-1, 2, -3, 0, -1, -4, 3, -2], "stored code is the level"),
        (-0.4, [3, 6, 1, 4, 3, 0, 8, 2], "clipped"),
        (-0.4, [4, 5, 1, 4, 3, 0, 7, 2], "nearest"),
        (-0.4, [3, 6, 1, 4, 3, 0, 7, 3], "1 of 8 codes"),
        (-0.4, [3, 6, 1], "eight, one for each"),
        ("x", RIGHT, "one number"),
    ],
)
def test_wrong_codes_are_rejected_with_a_hint(scale, codes, hint):
    said = lab.check_rtn(scale, codes)
    assert said.startswith("Not yet") and hint in said


@pytest.mark.parametrize(
    ("answer", "hint"), [(3.25, "offset"), (3, "codes alone"), (4, "float16"), (3.75, "one offset"), (2, "codes, plus"), ("?", "number")]
)
def test_wrong_bits_are_rejected_with_a_hint(answer, hint):
    said = lab.check_bits(answer)
    assert said.startswith("Not yet") and hint in said


@pytest.mark.parametrize(
    ("updated", "level", "hint"),
    [
        (0.8, 1, "the sign"),
        (0.5, 0, "weight that answers"),
        (0.2, 0, "only partly"),
        (0.6, 1, "as it was"),
        (0.4, 1, "round it"),
        (0.3, 0, "minimise"),
        (float("nan"), 0, "two numbers"),
    ],
)
def test_wrong_updates_are_rejected_with_a_hint(updated, level, hint):
    said = lab.check_gptq(updated, level)
    assert said.startswith("Not yet") and hint in said
