"""The stored measurements: read back, of this repository's models, and saying what the notebooks say of them."""

import numpy as np
import pytest

from edgelab import studies
from edgelab.evaluate import Measured, Scores
from edgelab.report import Report, Row
from edgelab.studies import MEAN, Study, mean_of_domains, read


def test_a_study_comes_back_from_its_file(tmp_path):
    report = Report((Row("fp", "kld", 0.5, slice=MEAN, low=0.4, high=0.6, provenance="measured at build"),))
    study = Study("qat", report, {"run": [{"step": 1, "judged": 0.5}]}, 12.0)
    (tmp_path / "qat.json").write_text(study.to_json())
    again = read("qat", tmp_path)
    assert again.report.rows == report.rows and again.curves == study.curves
    with pytest.raises(FileNotFoundError, match=r"edgelab\.studies zeros"):
        read("zeros", tmp_path)


def test_domains_weigh_alike():
    """One long document of one domain must not outweigh two short ones of another."""

    def scores(kld, tokens):
        n = len(kld)
        zeros = np.zeros(n)
        return Scores(
            tokens=np.array(tokens), n_bytes=np.ones(n), nll=zeros, text_nll=zeros, kld=np.array(kld), token_kld=np.zeros(int(sum(tokens))),
            same_top=np.array(tokens), overlap=None, correct=None, source=np.arange(n),
        )  # fmt: skip

    domains = {"long": scores([900.0, 900.0], [1000, 1000]), "short": scores([1.0, 2.0], [10, 10])}
    base = {d: scores([0.0, 0.0], list(s.tokens)) for d, s in domains.items()}
    found = mean_of_domains(Measured({"fp": base, "cut": domains}, "fp", "corpus", 512, 256))
    row = found.get(model="cut", metric="kld")
    assert row.value == pytest.approx((0.9 + 0.15) / 2) and row.low == pytest.approx((0.9 + 0.1) / 2) and row.slice == MEAN


@pytest.mark.parametrize("name", ["qat", "students", "recovery"])
def test_what_ships_says_that_it_was_measured_at_build(name):
    study = read(name)
    assert study.name == name and study.curves and {r.provenance for r in study.report} == {"measured at build"}


def test_rounding_that_learns_keeps_what_the_article_claims():
    """Qingzhou: INT8 QAT keeps 98.7 % of the accuracy; the other bar is half of the divergence that rounding costs at 4 bits."""
    report = read("qat").report
    em = {m: report.get(model=m, metric="exact_match", slice=MEAN).value for m in ("fp", "int8-row, QAT")}
    assert em["int8-row, QAT"] >= 0.987 * em["fp"]


def test_rounding_to_4_bits_that_learns_wins_back_half():
    report = read("qat").report
    lost, kept = (report.get(model=f"int4-row, {how}", metric="kld", slice=MEAN) for how in ("to nearest", "QAT"))
    assert lost.value - kept.value >= 0.5 * lost.value and kept.high < lost.low


@pytest.mark.parametrize("share", ["25%", "50%"])
def test_reap_loses_less_than_frequency_and_chance_in_the_mean_of_domains(share):
    """In the mean of the domains alone: pooled over tokens, or on prose by itself, it does not (LOG.md)."""
    report = read("experts").report
    row = {m: report.get(model=f"{m} {share}", metric="kld", slice=MEAN) for m in ("reap", "frequency", "random 0", "random 1", "random 2")}
    assert row["reap"].high < row["frequency"].low
    others = [row[f"random {seed}"] for seed in range(3)]
    assert row["reap"].high < np.mean([r.value for r in others]) and row["reap"].value < min(r.value for r in others)


def test_ten_minutes_win_back_half_of_what_half_of_the_experts_cost():
    report = read("recovery").report

    def value(model, metric):
        return report.get(model=model, metric=metric, slice=MEAN).value

    assert value("REAP 50%, distilled", "kld") <= 0.5 * value("REAP 50%", "kld")
    fp, cut, back = (value(m, "exact_match") for m in ("fp", "REAP 50%", "REAP 50%, distilled"))
    assert back - cut >= 0.5 * (fp - cut) > 0


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "4:8"])
def test_wanda_and_sparsegpt_lose_less_than_magnitude(model, pattern):
    report = read("zeros").report
    row = {m: report.get(model=f"{model}: {m} {pattern}", metric="kld", slice=MEAN) for m in ("magnitude", "wanda", "sparsegpt")}
    assert row["sparsegpt"].high < row["magnitude"].low and row["wanda"].high < row["magnitude"].low


def test_a_new_task_is_learnt_and_the_old_ones_only_with_rehearsal():
    report = read("adapt").report

    def em(model, domain):
        return report.get(model=model, metric="exact_match", slice=domain).value

    assert em("fp, all weights, not rehearsed", "robot") > 0.9 > em("fp, all weights", "robot") > em("fp", "robot") + 0.4
    assert em("fp, all weights, not rehearsed", "assistant") < 0.1 < 0.8 < em("fp, all weights", "assistant")


def test_what_is_computed_by_the_input_says_what_it_saves_and_costs():
    report = read("dynamic").report

    def value(model, metric):
        return report.get(model=model, metric=metric, slice="8192 tokens").value

    assert value("int3, int8 where unsure", "kld") < 0.5 * value("int3, int8 where unsure", "kld of int3 alone")
    assert value("early exit", "same top of those") >= 0.98 and value("early exit", "multiply-adds saved") < 0  # a negative result
    assert report.get(model="half of the channels skipped", metric="kld", slice=MEAN).high < 0.01


def test_a_teacher_teaches_more_than_text():
    report = read("students").report
    for domain in ("prose", "code"):
        taught, alone = (report.get(model=m, metric="bits_per_byte", slice=domain) for m in ("distilled", "text"))
        assert taught.high < alone.low  # of three seeds the worst against the best


def test_the_students_config_is_a_small_dense_model():
    config = studies.student_config(2048)
    assert (config.num_hidden_layers, config.hidden_size, len(config.layer_types)) == (2, 128, 2)
