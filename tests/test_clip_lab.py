"""What notebook 03 shows: one tensor's costs at a threshold, whose values are clipped, its control, and its exercises' checks."""

import numpy as np
import pytest
import torch
from test_model import tiny

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")

from edgelab import clip_lab, plots
from edgelab.blocks import calibrate
from edgelab.clip_lab import Tensor, ThresholdControl, check_bins_kept, check_costs, check_step, hand_rows
from edgelab.layers import round_inputs
from edgelab.methods.clip import RULES
from edgelab.ranges import STATIC, static_ranges

NAME = "model.layers.1.mlp.down_proj"
IDS = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(0))


class Words:
    """A tokenizer that writes token 7 as "w7"."""

    def decode(self, ids: list[int]) -> str:
        return f"w{ids[0]}"


@pytest.fixture(scope="module")
def tensor() -> Tensor:
    model = tiny("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(20)
    return Tensor(model, NAME, IDS, IDS[:2])


def test_costs_are_those_of_the_values(tensor):
    x = torch.from_numpy(tensor.values)
    assert x.shape == (IDS.numel(), 64) and tensor.maximum == x.abs().max()
    for t in (tensor.maximum, 0.4 * tensor.maximum):
        cost = tensor.at(t)
        rounded = round_inputs(x, STATIC, torch.tensor(t / 127))
        assert cost.clipped == pytest.approx(float((x.abs() > t).float().mean()))
        assert cost.squared == pytest.approx(float((rounded - x).square().mean() / x.square().mean()), rel=1e-3)
        assert tensor.at(t) is cost and np.isfinite(cost.kl)
    assert tensor.at(tensor.maximum).clipped == 0
    assert tensor.at(0.05 * tensor.maximum).kld > 10 * tensor.at(tensor.maximum).kld > 0
    for t in (0, -1, 1.1 * tensor.maximum, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and at most"):
            tensor.at(t)


def test_each_rule_is_best_by_its_own_measure(tensor):
    costs = {rule: tensor.at(tensor.ranges[rule].threshold) for rule in RULES}
    assert min(costs, key=lambda r: costs[r].squared) == "mse"
    assert costs["kl"].kl == min(c.kl for c in costs.values())
    assert [row["rule"] for row in tensor.rule_rows()] == list(RULES)
    assert [row["|x|"] for row in tensor.shape_rows()][-1] == "maximum"


def test_whose_values_are_clipped():
    model = tiny("qwen3")
    tensor = Tensor(model, NAME, IDS, IDS)
    cut = float(np.percentile(np.abs(tensor.values), 98))
    over = (np.abs(tensor.values) > cut).sum(1).reshape(IDS.shape)
    lines = tensor.clipped_tokens(Words(), cut, most=1000)
    assert sum(int(line["values clipped"].replace(",", "")) for line in lines) == over.sum()
    first = [line for line in lines if line["at"] == "the first position"]
    assert sum(int(line["values clipped"]) for line in first) == over[:, 0].sum()
    counted = [int(line["values clipped"]) for line in lines]
    assert counted == sorted(counted, reverse=True)
    blamed = tensor.blame(Words(), cut)
    names = [line["clipped only at"] for line in blamed]
    assert names[0] == "first position" and names[-2:] == ["all other positions", "all"] and len(names) == 6
    *parts, whole = [int(line["values clipped"].replace(",", "")) for line in blamed]
    assert sum(parts) == whole == over.sum()
    klds = [float(line["KL of the model, nats per token (measured)"]) for line in blamed]
    assert 0 < max(klds[:-1]) <= klds[-1] * 1.5
    with pytest.raises(ValueError, match="rows of inputs for 192 tokens; whose they are is known of plain linears"):
        Tensor(tiny("qwen3_moe"), "model.layers.1.mlp.experts.down_proj", IDS, IDS).clipped_tokens(Words(), 1.0)


def test_figures_have_their_sentences_and_an_svg(tensor):
    stats = calibrate(tensor.model, [IDS], want=("histogram",), progress=False)
    ranges = static_ranges(tensor.model, stats, [IDS], tokens=48, progress=False)
    for fig in (clip_lab.histogram_figure(tensor), clip_lab.curves_figure(tensor), clip_lab.effects_figure(ranges)):
        assert {t.name for t in fig.data} >= set(RULES) and plots.to_svg(fig).startswith("<svg")
    curves = clip_lab.curves_figure(tensor)
    assert min(curves.data[0].y) == 1 and min(curves.data[1].y) == 1
    assert f"kl cuts at {tensor.ranges['kl'].threshold:.4g}" in clip_lab.say_thresholds(tensor)
    assert f"of {len(ranges)} tensors" in clip_lab.say_effects(ranges)
    rows = clip_lab.effect_rows(ranges, most=3)
    assert len(rows) == 3 and all(row["chosen"] in RULES for row in rows)
    assert clip_lab.variant_rows({"a": {"max": 0.5}}) == [{"model": "a", "max": "0.5000"}]


# ------------------------------------------------------------------------------------------------------------ control


def test_the_control_measures_what_it_is_set_to(tensor):
    control = ThresholdControl(tensor)
    assert control.slider.value == 100 and control.rule.value == "max"
    control.slider.value = 50
    middle = (tensor.lowest * tensor.maximum) ** 0.5
    assert control.box.value == pytest.approx(middle, rel=1e-3) and control.cost.threshold == control.box.value
    control.box.value = 0.6 * tensor.maximum
    assert 50 < control.slider.value < 100 and control.rule.value == "by hand"
    control.rule.value = "kl"
    assert control.box.value == pytest.approx(tensor.ranges["kl"].threshold, rel=1e-3)
    assert f"<b>Threshold {control.cost.threshold:.4g}</b>" in control.sentence.value
    tried = control.figure.data[-1]
    assert len(tried.x) == len(tensor.costs) and list(tried.marker.size).count(16) == 1
    assert control.table.value.count("<tr>") == len(tensor.costs) + 1
    assert len(control.static().data[0].x) == len(tensor.costs) and plots.to_svg(control.static())
    assert "it stands at" in repr(control) and "text/plain" in control._repr_mimebundle_()
    for wrong in (0.0, 2 * tensor.maximum):
        with pytest.raises(ValueError, match="must be above 0 and at most"):
            control.choose(wrong)
    with pytest.raises(ValueError, match="rule='entropy' is not known"):
        control.choose("entropy")


def test_an_error_is_shown_and_kept_and_goes_away(tensor, monkeypatch):
    control = ThresholdControl(tensor)
    monkeypatch.setattr(Tensor, "at", lambda self, t: (_ for _ in ()).throw(RuntimeError("no <model>")))
    assert control.choose(0.33 * tensor.maximum) is None
    assert (
        isinstance(control.error, RuntimeError)
        and "no &lt;model&gt;" in control.sentence.value
        and 'role="alert"' in control.sentence.value
    )
    monkeypatch.undo()
    assert control.choose("max") is not None and control.error is None


def test_inputs_have_names_for_a_screen_reader(tensor):
    control = ThresholdControl(tensor)
    assert [control.box.description, control.rule.description] == ["threshold", "rule"]


# ---------------------------------------------------------------------------------------------------------- exercises


def test_the_exercises_accept_the_answer_and_reject_the_usual_mistakes():
    assert check_bins_kept(4).startswith("Right") and check_step(0.05).startswith("Right")
    assert check_costs(56**2 / 1e5, (60 / 127) ** 2 / 12).startswith("Right") and check_costs(0.031, 0.0186).startswith("Right")
    for answer in (2, 3, 1, 5, 4.5):
        assert check_bins_kept(answer).startswith("Not yet")
    for answer in (6.35 / 128, 12.7 / 255, 6.35 / 255, 6.35, 0.1):
        assert check_step(answer).startswith("Not yet")
    for answers in ((60**2 / 1e5, 0.0186), (56 / 1e5, 0.0186), (0.0314, (60 / 127) ** 2), (0.0314, (60 / 255) ** 2 / 12), (0.0186, 0.0314)):
        assert check_costs(*answers).startswith("Not yet")
    for unanswered in (check_bins_kept(None), check_step(None), check_costs(None, None), check_costs(0.03, None)):
        assert unanswered.startswith("Not yet: no answer so far")


def test_the_worked_example_by_hand():
    lines = hand_rows([20, 8, 6, 4, 0, 2, 3, 1], 4)
    assert [line["bins kept"] for line in lines] == ["4", "5", "6", "7", "8"]
    assert lines[2]["P (outliers in the last bin)"] == "20 8 6 4 0 6" and lines[2]["Q (levels between the bars)"] == "14 14 | 6 | 4 0 | 2"
    assert lines[1]["KL(P || Q), nats"] == "inf"
    assert min(lines, key=lambda line: float(line["KL(P || Q), nats"]))["bins kept"] == "4"
