"""Notebook 07's lab: what its figures and sentences say is so, and its exercises reject wrong answers."""

import json
import math

import numpy as np
import pytest
import torch

from edgelab import train_lab as lab
from edgelab.report import Report, Row


def test_temperature_by_hand():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    assert np.allclose(lab.softened(logits, 1.0), [0.5, 0.25, 0.25])
    p = lab.softened(logits, 2.0)
    assert p[0] / p[1] == pytest.approx(math.sqrt(2))
    assert lab.entropy_bits(lab.softened(logits, 1e3)) == pytest.approx(math.log2(3), abs=1e-5)
    assert lab.entropy_bits(lab.softened(logits, 0.01)) == pytest.approx(0, abs=1e-6)


def test_the_control_says_what_it_draws():
    logits = torch.randn(50)
    control = lab.TemperatureControl(logits, [f"t{i}" for i in range(50)], "a text")
    p = lab.softened(logits, 1.0)
    assert list(control.figure.data[0].y) == pytest.approx(sorted(p, reverse=True)[:8], abs=1e-5)
    control.choose(5.0)
    hot = list(control.figure.data[0].y)
    assert hot[0] < p.max() and "T = 5" in control.sentence.value
    assert float(control.rows[0]["probability"]) == pytest.approx(hot[0], abs=1e-4)
    control.slider.value = 2.0
    assert control.box.value == 2.0
    with pytest.raises(ValueError, match=r"temperature=99 must be from 0\.1 to 20"):
        control.choose(99)


def test_reverse_seeks_a_mode_and_forward_covers():
    x = np.arange(24)
    teacher = np.exp(-0.5 * ((x - 5) / 1.2) ** 2) + 0.6 * np.exp(-0.5 * ((x - 18) / 1.2) ** 2)
    teacher = (teacher + 1e-4) / (teacher + 1e-4).sum()
    students = lab.narrow_students(teacher, steps=200)
    valley = slice(9, 15)
    assert students["forward"][valley].sum() > 10 * students["reverse"][valley].sum()
    assert "forward" in lab.say_students(teacher, students)
    figure = lab.students_figure(teacher, students)
    assert [t.name for t in figure.data] == ["teacher", *students]


def test_rows_curves_and_shares():
    report = Report((
        Row("fp", "exact_match", 0.9, slice="a"), Row("cut", "exact_match", 0.3, slice="a"), Row("mended", "exact_match", 0.75, slice="a"),
        Row("cut", "kld", 0.8, slice="a"), Row("mended", "kld", 0.2, slice="a"),
    ))  # fmt: skip
    assert lab.recovered(report, "fp", "cut", "mended", "exact_match", "a") == pytest.approx(0.75)
    assert lab.recovered(report, "fp", "cut", "mended", "kld", "a") == pytest.approx(0.75)
    with pytest.raises(ValueError, match="nothing was lost"):
        lab.recovered(report, "cut", "cut", "mended", "kld", "a")
    lines = lab.rows(report, {"KLD": ("kld", "a"), "EM": ("exact_match", "a")})
    assert lines[0] == {"model": "fp", "KLD": "", "EM": "0.900"} and lines[1]["KLD"] == "0.800"
    curves = {"run": [{"step": 5, "judged": 0.5}, {"step": 10, "judged": 0.25}]}
    assert lab.say_curves(curves) == "run: 0.500 at step 5, 0.250 at step 10."
    assert json.loads(lab.curves_figure(curves, "t").to_json())["data"][0]["name"] == "run"


def test_the_staircase_has_the_derivative_of_the_straight_through_estimator():
    value, derivative = lab.staircase_figure().data
    x = np.array(value.x)
    inside = (x > -1.99) & (x < 1.49)
    assert set(np.array(derivative.y)[inside]) == {1.0} and set(np.array(derivative.y)[(x < -2.01) | (x > 1.51)]) == {0.0}
    assert set(np.array(value.y)) == {-2 + 0.5 * i for i in range(8)}


def test_the_twins_of_the_function_exercises_agree_with_sums_by_hand():
    kl, reverse = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5), 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    teacher, student = [math.log(4), 0.0], [0.0, 0.0]
    assert lab.hinton_loss(student, teacher, 0, 1.0, 0.7) == pytest.approx(0.7 * kl + 0.3 * math.log(2), rel=1e-5)
    assert lab.hinton_loss(student, teacher, 0, 1.0, 0.7) != pytest.approx(0.7 * reverse + 0.3 * math.log(2), rel=1e-2)
    assert lab.step_gradient([1.7], 0.5, 3) == 3 and lab.step_gradient([-5.0], 0.5, 3) == -4
    assert lab.step_gradient([0.9, 1.7], 0.5, 3) == pytest.approx(0.2 + 3)


def test_exercises_take_the_right_answer_and_name_the_mistake():
    assert lab.check_hinton(lab.hinton_loss).passed and lab.check_step_gradient(lab.step_gradient).passed
    assert "no answer so far" in lab.check_bytes(None) and lab.check_bytes(15.56).passed
    said = [lab.check_bytes(answer) for answer in (7.78, 4.375, 17.5, 31.1, 2844.4, 0.156, "x")]
    assert not any(s.passed for s in said)
    assert len(set(said)) == len(said)  # each mistake has a hint of its own
