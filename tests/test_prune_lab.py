"""What notebook 05 shows of pruned models: masks, bytes, break-even points, times, structure, claims; the control and the exercises."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config

from edgelab import Recipe, plots
from edgelab import prune_lab as lab
from edgelab.compress import compress
from edgelab.methods.sparse import predicted_bytes
from edgelab.pretrain import train_tokenizer
from edgelab.recipe import Prune, SkipChannels
from edgelab.scheme import QuantScheme
from edgelab.sparsify import storage_table


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


def point(method: str, pattern: str, percent: int, kld: float) -> lab.Point:
    name = f"{method} {percent}%" if pattern == "unstructured" else f"{method} {pattern}"
    return lab.Point(name, method, pattern, percent / 100, "bitmap float16", 5000 - 10 * percent, kld, 0.9 * kld, 1.1 * kld, 1 - kld)


@pytest.fixture
def points():
    found = [point(m, "unstructured", z, 0.1 * (i + 1) * z / 50) for i, m in enumerate(lab.METHODS) for z in (25, 50)]
    found += [point(m, "2:4", 50, 0.3 * (i + 1)) for i, m in enumerate(lab.METHODS)]
    return {p.name: p for p in found}


# ------------------------------------------------------------------------------------------------------------ one matrix


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_method_wins_by_its_own_measure(matrix, pattern):
    weight, xx = matrix
    found = {m: lab.zeroed(weight, xx, m, pattern) for m in lab.METHODS}
    assert found["sparsegpt"].seen < min(found["wanda"].seen, found["magnitude"].seen)
    assert found["magnitude"].equal == min(z.equal for z in found.values())
    for z in found.values():
        there = z.values != 0
        assert int(there.sum()) == weight.numel() // 2
        if pattern == "2:4":
            assert (there.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    e = (weight - found["wanda"].values).double()
    outputs = [torch.trace(a @ xx.double() @ a.T) for a in (e, weight.double())]
    assert found["wanda"].seen == pytest.approx(math.sqrt(float(outputs[0] / outputs[1])))
    with pytest.raises(ValueError, match="'gptq' is not known; use one of magnitude"):
        lab.zeroed(weight, xx, "gptq")


def test_the_masks_are_drawn_and_said(matrix):
    found = [lab.zeroed(*matrix, m) for m in lab.METHODS]
    fig = lab.mask_figure(found, rows=4, inputs=16)
    assert [len(t.x) for t in fig.data] == [int((z.values[:4, :16] != 0).sum()) for z in found]
    x, y = fig.data[0].x[0], -fig.data[0].y[0]
    assert found[0].values[y, x] != 0 and plots.to_svg(fig).startswith("<svg")
    agree = 100 * float(((found[1].values != 0) == (found[0].values != 0)).float().mean())
    assert f"wanda agrees with magnitude about {agree:.0f} %" in lab.say_masks(found)


# ---------------------------------------------------------------------------------------------------------- whole models


def test_results_are_paired_and_counted(tiny):
    model, tokenizer, test = tiny
    made = {f"magnitude {s}%": compress(model, Recipe((Prune(s / 100, method="magnitude"),)), progress=False) for s in (25, 90)}
    found = lab.results(model, made | {"same": model}, tokenizer, test, max_docs=4)
    few, many, same = found.points.values()
    assert many.kld > few.kld > same.kld == 0 and same.same_top == 1
    assert (few.zeros, few.method, few.pattern) == (pytest.approx(0.25, abs=1e-3), "magnitude", "unstructured")
    assert same.form == "float16" and same.nbytes == 2 * sum(p.numel() for p in model.parameters())
    best = min((r for r in storage_table(made["magnitude 90%"].model) if "int4" not in r.format), key=lambda r: r.bytes)
    pruned = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    assert many.nbytes == best.bytes + same.nbytes - 2 * pruned and many.form == best.format != "float16"
    value, low, high = found.ratio("magnitude 25%", "magnitude 90%")
    assert value == pytest.approx(few.kld / many.kld) and low <= value <= high < 1
    assert found.rows(against="magnitude 25%")[0]["KLD / magnitude 25%'s, paired [95 %]"] == "1"
    with pytest.raises(ValueError, match="can't be called 'original'"):
        lab.results(model, {"original": model}, tokenizer, test, max_docs=1)
    coded = compress(model, Recipe.body("int4-g32"), progress=False)
    assert lab.results(model, {"q": coded}, tokenizer, test, max_docs=1).points["q"].form == "codes"


def test_skipped_models_are_counted_and_others_refused(tiny):
    model, tokenizer, test = tiny
    made = {"half": compress(model, Recipe((SkipChannels(0.5),)), progress=False).model}
    found = lab.results(model, made, tokenizer, test, max_docs=2)
    times = [lab.Time("half", 1.0, 1.5, 1.4, 1.6)]
    (half,) = lab.skipped(made, found, times)
    products = {n: p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    down = sum(v for n, v in products.items() if "down" in n)
    assert half.saved == pytest.approx(0.5 * down / (sum(products.values()) + 300 * 32)) and half.ratio == 1.5  # and the head
    assert plots.to_svg(lab.skip_figure([half])).startswith("<svg") and "time x 1.50" in lab.say_skip([half])
    with pytest.raises(ValueError, match="skips no channels"):
        lab.skipped({"half": model}, found, times)


# ----------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("form", "kind"), [("bitmap", "float16"), ("bitmap", "int4-g32"), ("csr", "float16")])
def test_formulas_are_what_storage_counts(form, kind):
    shape = (512, 4096)
    name = f"{form.replace('csr', 'CSR')} {kind}"
    for share in (0.5, 0.9):
        size = predicted_bytes(form, shape, round(math.prod(shape) * (1 - share)), kind)
        assert 8 * size / math.prod(shape) == pytest.approx(lab.FORMULAS[name](share), rel=0.01)
    assert 8 * predicted_bytes("n:m", shape, 0) / math.prod(shape) == lab.TWO_OF_FOUR_BITS
    assert QuantScheme.parse("int4-g32").bits_per_weight(shape) == lab.FORMULAS["dense int4-g32"](0.3)


def test_break_even_points_a_hand_can_check():
    assert lab.break_even("bitmap float16", "dense int4-g32") == 0.78125  # 1 + 16 (1 - s) = 4.5
    assert lab.break_even("CSR float16", "dense float16") == 0.5  # 32 (1 - s) = 16
    assert lab.break_even("bitmap int4-g32", "dense int4-g32") == 0.25  # 1.5 + 4 (1 - s) = 4.5
    assert lab.break_even("dense float16", "dense int4-g32") is None
    with pytest.raises(ValueError, match="'bsr' is not known"):
        lab.break_even("bsr", "dense float16")
    assert len(lab.break_even_rows()) == 3 and "only from 78.12 %" in lab.say_bytes()
    assert list(lab.bytes_figure().data[-1].x) == [78.125, pytest.approx(85.9375), 25.0]
    assert plots.to_svg(lab.bytes_figure()).startswith("<svg")


# ----------------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_all_products_give_the_same_but_int4(share):
    found = {name: call().copy() for name, call in lab.products(share, size=256, rows=2).items()}
    right = found.pop("torch float32, zeros in place")
    dense, int4 = found.pop("torch float32, no zeros"), found.pop("int4-g32, dense")
    for name, y in found.items():
        assert abs(y - right).max() < 1e-3 * abs(right).max(), name
    assert 1e-3 < abs(int4 - right).max() / abs(right).max() < 0.3 and abs(dense - right).max() > 0.1


def test_a_race_divides_round_by_round(monkeypatch):
    clock, threads = [0.0], torch.get_num_threads()
    monkeypatch.setattr(lab.time, "perf_counter", lambda: clock[0])
    calls = {"one": lambda: clock.__setitem__(0, clock[0] + 0.5), "two": lambda: clock.__setitem__(0, clock[0] + 1.5)}
    one, two = lab.race(calls, rounds=3)
    assert (one.seconds, one.ratio, two.seconds, two.ratio, two.low, two.high) == (0.5, 1, 1.5, 3, 3, 3)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="rounds=2"):
        lab.race(calls, rounds=2)
    times = {"90% zeros": [one, two]}
    race = [one, two._replace(name="int4-g32, dense"), two._replace(name="CSR float16", ratio=2.0)]
    assert "CSR float16 2.00; sparse forms that are faster than dense int4: CSR float16." in lab.say_times({"90% zeros": race})
    race[2] = race[2]._replace(ratio=4.0)
    assert "faster than dense int4: none." in lab.say_times({"90% zeros": race})
    assert lab.time_rows(times)[1]["90% zeros: time / first's [quartiles]"] == "3.00 [3.00, 3.00]"
    assert plots.to_svg(lab.times_figure(times)).startswith("<svg")


# ------------------------------------------------------------------------------------------------- structure and claims


def test_structure_is_held_against_the_clock(tiny, points):
    model, *_ = tiny
    times = [lab.Time("original", 1.0, 1.0, 1.0, 1.0), lab.Time("cut", 0.5, 0.5, 0.4, 0.6)]
    found = lab.Results(points, None)
    rows = lab.structure_rows(model, {"original": model, "cut": model, "magnitude 25%": model}, found, times)
    assert (
        rows[1]["time, % of the original's [quartiles] (measured)"] == "50 [40, 60]" and rows[1]["parameters, % left (counted)"] == "100.0"
    )
    assert rows[2]["time, % of the original's [quartiles] (measured)"] == "" and rows[2]["KLD, nats per token (measured)"] == "0.05"
    assert "cut: 100 % of the multiply-adds, 50 % of the time" in lab.say_structure(model, {"cut": model}, times)
    assert plots.to_svg(lab.structure_figure(model, {"cut": model}, times)).startswith("<svg")
    assert "takes block 1, the least; block 2" in lab.say_influence([0.3, 0.1, 0.5])
    assert plots.to_svg(lab.influence_figure([0.3, 0.1])).startswith("<svg")


def test_claims_are_counted(tiny, points):
    model, *_ = tiny
    total, inner = sum(p.numel() for p in model.parameters()), sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    assert lab.most_by_channels(model) == pytest.approx(total / (total - inner))
    w = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("_proj.weight")])
    share, mean = lab.below(model, 0.01)
    assert share == pytest.approx(float((w.abs() < 0.01).float().mean())) and mean == pytest.approx(float(w.abs().mean()))
    cut = {"cut": model}
    times, skipped = [lab.Time("cut", 1.0, 0.9, 0.8, 1.0)], [lab.Skipped(0.9, 0.2, 0.5, 0.6, 1.25)]
    names = ("threshold 0.001", "L1, no threshold", "L1, threshold 0.001")
    base = points["magnitude 25%"]
    thresholds = lab.Results({n: base._replace(name=n) for n in names}, None)
    rows = lab.claim_rows(model, cut, lab.Results({"cut": base._replace(name="cut")}, None), times, skipped, thresholds)
    assert [r["verdict"] for r in rows] == ["not reached", "no", "no", "finds little"]
    assert "1.25 times at most" in rows[2]["here"] and "0.80 times with a dense product" in rows[2]["here"]


def test_a_study_that_is_missing_says_how_to_make_it(tmp_path):
    sentence, rows = lab.study("zeros", tmp_path)
    assert "`python -m edgelab.studies zeros`" in sentence and rows == [] and str(tmp_path) not in sentence
    with pytest.raises(ValueError, match="no study is called 'ones'"):
        lab.study("ones")


def test_a_study_that_is_there_is_shown(tmp_path):
    from edgelab.report import Report, Row
    from edgelab.studies import MEAN, Study

    row = Row("dense: wanda 50%", "kld", 0.125, "nats/tok", MEAN, 0.1, 0.15, n=9, provenance="measured at build")
    (tmp_path / "zeros.json").write_text(Study("zeros", Report((row,)), {}, 1.0).to_json())
    sentence, rows = lab.study("zeros", tmp_path)
    assert "9 documents" in sentence and rows[0]["KLD, mean of four domains [95 %] (measured at build)"] == "0.125 [0.1, 0.15]"


# ----------------------------------------------------------------------------------------------------------- the control


def test_the_control_shows_what_was_measured_and_says_what_was_not(points):
    control = lab.ZerosControl(points)
    assert control.point is points["sparsegpt 50%"] and "50.0 %" in control.told
    control.percent.value = 25
    ring = control.figure.data[-1]
    assert control.point is points["sparsegpt 25%"] and (ring.x, ring.y) == ((25.0,), (control.point.kld,))
    control.pattern.value = "2:4"  # sets the box to the one share that it has
    assert control.error is None and control.percent.value == 50 and control.point is points["sparsegpt 2:4"]
    control.pattern.value, control.percent.value = "unstructured", 60
    assert "at 60 % zeros was not measured; use 25 %, 50 %" in str(control.error) and 'role="alert"' in control.sentence.value
    with pytest.raises(ValueError, match="'wanda 33%' was not measured"):
        control.choose("wanda 33%")
    assert control.choose("wanda 50%") is points["wanda 50%"] and control.error is None and "alert" not in control.sentence.value
    assert control.html.count("<tr>") == 5 and "stands at wanda 50%" in repr(control)
    assert plots.to_svg(lab.zeros_figure(points)).startswith("<svg")


# ------------------------------------------------------------------------------------------------------------- exercises


def test_right_answers_are_accepted_and_none_is_not_answered():
    row, norms = (torch.tensor([v]) for v in (lab.EXERCISE_ROW, lab.EXERCISE_NORMS))
    z = lab.zeroed(row, torch.diag(norms[0].square()), "wanda")  # the exercise and the library agree
    mask = (z.values[0] != 0).int().tolist()
    loss = float(((row - z.values) * norms).square().sum())
    assert lab.check_wanda(mask, loss).startswith("Right") and mask == [0, 1, 1, 0] and loss == pytest.approx(0.25)
    s = 1 - (QuantScheme.parse("int4-g64").bits_per_weight((64, 128)) - 1) / 16
    assert lab.check_break_even(s).startswith("Right") and lab.check_break_even(0.797).startswith("Right")
    assert lab.check_skip(1 / (1 - 0.6 * 0.75 / 3)).startswith("Right") and lab.check_skip(1.18).startswith("Right")
    for said in (lab.check_wanda(None, 1), lab.check_wanda(mask, None), lab.check_break_even(None), lab.check_skip(None)):
        assert said.startswith("Not yet: no answer so far")


@pytest.mark.parametrize(
    ("mask", "loss", "hint"),
    [
        ([1, 0, 0, 1], 1.81, "that is magnitude"),
        ([1, 1, 0, 0], 0.25, "two of the four stay"),
        ([0.4, 1, 0.9, 0.3], 0.25, "four numbers"),
        ([0, 1, 1, 0], 0.7, "add as squares"),
        ([0, 1, 1, 0], 0.5, "the root"),
        ([0, 1, 1, 0], 1.81, "of the two that go"),
        ([0, 1, 1, 0], 1.0, "the norm of its input"),
        ([0, 1, 1, 0], 0.0, "add up the squared scores"),
        ([0, 1], 0.25, "four numbers"),
        ("x", 0.25, "four numbers"),
    ],
)
def test_wrong_masks_are_rejected_with_a_hint(mask, loss, hint):
    said = lab.check_wanda(mask, loss)
    assert said.startswith("Not yet") and hint in said


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (0.203125, "share that stays"),
        (79.6875, "not in per cent"),
        (0.734375, "one bit per place"),
        (0.8125, "more than 4 bits"),
        (0.78125, "groups of 32"),
        (0.75, "too simple"),
        (0.5, "set 1 + 16"),
        (float("nan"), "one number"),
    ],
)
def test_wrong_break_even_points_are_rejected_with_a_hint(answer, hint):
    said = lab.check_break_even(answer)
    assert said.startswith("Not yet") and hint in said


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (0.15, "is saved"),
        (0.85, "is left"),
        (1.818, "one of three products"),
        (1.333, "other 40 %"),
        (4, "whole model shrank"),
        (1.15, "nearly"),
        (3.2, "0.6 of a third"),
        ("?", "one number"),
    ],
)
def test_wrong_speed_ups_are_rejected_with_a_hint(answer, hint):
    said = lab.check_skip(answer)
    assert said.startswith("Not yet") and hint in said
