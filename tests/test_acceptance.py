"""The shipped models deserve their acceptance: the judge is right, the stored record holds, and a fresh sample agrees."""

import json
from dataclasses import replace

import pytest

from edgelab import acceptance, data
from edgelab.evaluate import evaluate, expert_counts, specialisation
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.report import Report, Row

FOLDERS = ("edge-moe", "edge-dense")


def good_report() -> Report:
    rows = [Row("fp", "exact_match", 0.98, slice=d) for d in data.SCORED]
    for d in ("prose", "code"):
        rows.append(Row("fp", "bits_per_byte", 1.0, slice=d, low=0.9, high=1.1))
        rows.append(Row("trigram", "bits_per_byte", 1.5, slice=d, low=1.4, high=1.6))
        for bits, k in {8: 0.001, 4: 0.1, 3: 0.5, 2: 3.0}.items():
            rows.append(Row(f"int{bits}-row", "kld", k, slice=d, low=0.9 * k, high=1.1 * k))
    for d in data.SCORED:
        rows.append(Row("int8-row", "flips", 0.001, slice=d))
        rows.append(Row("int3-row", "exact_match", 0.7, slice=d))
        rows.append(Row("int2-row", "exact_match", 0.0, slice=d))
    rows += [Row("fp", "domain_bits", 0.5), Row("fp", "domain_bits_by_chance", 0.01)]
    return Report(tuple(rows))


def with_value(report: Report, value: float, **which) -> Report:
    old = report.get(**which)
    assert old.value != value
    return Report(tuple(replace(r, value=value, low=value, high=value) if r is old else r for r in report))


def test_a_good_model_passes_every_check():
    checks = acceptance.judge(good_report())
    assert len(checks) == 17 and all(c.holds for c in checks)


@pytest.mark.parametrize("value, which", [
    (0.5, {"model": "fp", "metric": "exact_match", "slice": "assistant"}),
    (0.7, {"model": "fp", "metric": "exact_match", "slice": "arithmetic"}),
    (1.45, {"model": "fp", "metric": "bits_per_byte", "slice": "code"}),
    (0.1, {"model": "int3-row", "metric": "kld", "slice": "prose"}),  # 3 bits no worse than 4
    (0.05, {"model": "int8-row", "metric": "flips", "slice": "assistant"}),
    (0.97, {"model": "int3-row", "metric": "exact_match", "slice": "assistant"}),
    (0.97, {"model": "int2-row", "metric": "exact_match", "slice": "assistant"}),
    (0.05, {"model": "fp", "metric": "domain_bits"}),
])  # fmt: skip
def test_each_fault_is_seen(value, which):
    failed = [c.criterion for c in acceptance.judge(with_value(good_report(), value, **which)) if not c.holds]
    assert failed


def test_a_dense_model_is_not_refused_for_its_arithmetic():
    dense = Report(tuple(r for r in good_report() if not r.metric.startswith("domain_bits")))
    weak = with_value(dense, 0.1, model="fp", metric="exact_match", slice="arithmetic")
    assert acceptance.accepted(acceptance.judge(weak)) and any(str(c).startswith("fails, not required") for c in acceptance.judge(weak))
    assert not acceptance.accepted(acceptance.judge(with_value(dense, 0.5, model="fp", metric="exact_match", slice="assistant")))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_record_of_a_shipped_model_follows_from_its_report(name):
    stored = json.loads((data_dir() / name / "acceptance.json").read_text())
    checks = [acceptance.Check(**c) for c in stored["checks"]]
    assert checks == acceptance.judge(Report.from_json(json.dumps(stored["report"]))) and acceptance.accepted(checks)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_fresh_sample_agrees_with_the_record(name):
    """Measured now, on this interpreter's text: the stored figure lies within the sample's own uncertainty, and skill is real."""
    folder = data_dir() / name
    stored = Report.from_json(json.dumps(json.loads((folder / "acceptance.json").read_text())["report"]))
    test = data.corpus()["test"]
    docs = {"prose": 20, "code": 20, "assistant": 120, "arithmetic": 120}
    now = evaluate({"fp": load(folder)}, load_tokenizer(folder), test, max_docs=docs, speed=False, progress=False)

    def both(metric, domain):
        return tuple(r.get(model="fp", metric=metric, slice=domain).value for r in (now, stored))

    for domain in data.SCORED:
        measured, recorded = both("exact_match", domain)
        assert measured == pytest.approx(recorded, abs=0.08)
    for domain in ("prose", "code"):
        measured, recorded = both("bits_per_byte", domain)
        assert measured == pytest.approx(recorded, rel=0.25)


def test_the_experts_of_the_embedded_model_specialise():
    folder = data_dir() / "edge-moe"
    docs = {"prose": 15, "code": 15, "assistant": 60, "arithmetic": 60}
    counts, domains = expert_counts(load(folder), load_tokenizer(folder), data.corpus()["test"], max_docs=docs, progress=False)
    found = specialisation(counts, domains, permutations=100)
    assert found.bits > 2 * found.chance_high and found.p < 0.02
