"""The shipped models deserve their acceptance: the judge is right, the stored record holds, and a fresh sample agrees."""

import json
from dataclasses import replace

import pytest

from edgelab import acceptance, data
from edgelab.evaluate import evaluate, expert_counts, generate_answers, specialisation
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
        rows.append(Row("int4-row", "flips", 0.03, slice=d, low=0.01, high=0.05))
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
    assert len(checks) == 20 and all(c.holds for c in checks)


FAULTS = [
    (0.5, ("fp", "exact_match", "assistant"), {"skill: exact match, assistant", "staircase: exact match lost at 3 bits, assistant"}),
    (0.7, ("fp", "exact_match", "arithmetic"), {"skill: exact match, arithmetic", "staircase: exact match lost at 3 bits, arithmetic"}),
    (1.45, ("fp", "bits_per_byte", "code"), {"language: bits per byte over the trigram's, code"}),
    (1.45, ("fp", "bits_per_byte", "prose"), {"language: bits per byte over the trigram's, prose"}),
    (0.02, ("int8-row", "kld", "prose"), {"staircase: KLD at 8 bits, prose"}),
    (0.0001, ("int4-row", "kld", "code"), {"staircase: KLD 4 bits over 8 bits, code"}),
    (0.1, ("int3-row", "kld", "prose"), {"staircase: KLD 3 bits over 4 bits, prose"}),
    (0.5, ("int2-row", "kld", "code"), {"staircase: KLD 2 bits over 3 bits, code"}),
    (0.05, ("int8-row", "flips", "assistant"), {"staircase: flips at 8 bits, assistant"}),
    (0.0, ("int4-row", "flips", "assistant"), {"staircase: flips at 4 bits, assistant"}),
    (0.97, ("int3-row", "exact_match", "assistant"), {"staircase: exact match lost at 3 bits, assistant"}),
    (0.97, ("int2-row", "exact_match", "arithmetic"), {"staircase: exact match left at 2 bits, arithmetic"}),
    (0.04, ("fp", "domain_bits", ""), {"experts: bits that a routing choice tells about the domain"}),
]


@pytest.mark.parametrize("value, which, expected", FAULTS)
def test_each_fault_is_seen_and_no_other(value, which, expected):
    model, metric, domain = which
    faulty = with_value(good_report(), value, model=model, metric=metric, slice=domain)
    assert {c.criterion for c in acceptance.judge(faulty) if not c.holds} == expected


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
def test_the_shipped_weights_are_the_ones_that_were_accepted(name):
    """Measured anew on the stored documents of two domains. On the same text the figures repeat; on another Python's
    text (another fingerprint) they must lie within the recorded interval, widened by half. 4-bit weights in the
    model's place would cost 2 % of the bits per byte."""
    folder = data_dir() / name
    stored = Report.from_json(json.dumps(json.loads((folder / "acceptance.json").read_text())["report"]))
    test = data.corpus()["test"]
    part = test.filter(lambda d: [x in ("prose", "assistant") for x in d], input_columns="domain", batched=True)
    now = evaluate({"fp": load(folder)}, load_tokenizer(folder), part, max_docs=acceptance.DOCS, speed=False, progress=False)
    same_text = stored.get(model="fp", metric="bits_per_byte", slice="prose").corpus == data.fingerprint(test)
    for metric, domain in (("bits_per_byte", "prose"), ("exact_match", "assistant")):
        measured = now.get(metric=metric, slice=domain).value
        recorded = stored.get(model="fp", metric=metric, slice=domain)
        if same_text:
            assert measured == pytest.approx(recorded.value, rel=0.004)
        else:
            slack = (recorded.high - recorded.low) / 4
            assert recorded.low - slack <= measured <= recorded.high + slack


def test_plain_generate_answers_as_evaluation_does():
    """The tokenizer itself puts the beginning that training and evaluation put, so nobody has to know of it."""
    folder = data_dir() / "edge-moe"
    model, tokenizer = load(folder), load_tokenizer(folder)
    rows = [r for r in data.corpus(data.SCORED, assistant=2000)["test"] if r["domain"] == "assistant"][:6]
    for row, expected in zip(rows, generate_answers(model, tokenizer, [r["prompt"] for r in rows]), strict=True):
        asked = tokenizer(row["prompt"], return_tensors="pt")
        out = model.generate(**asked, max_new_tokens=64, do_sample=False)[0, asked.input_ids.shape[1] :]
        assert out.tolist()[: len(expected)] == expected
        said = [{"role": "user", "content": row["prompt"].removeprefix(data.USER).removesuffix(data.CALL)}]
        assert tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"] == asked.input_ids[0].tolist()


def test_the_experts_of_the_embedded_model_specialise():
    folder = data_dir() / "edge-moe"
    docs = {"prose": 15, "code": 15, "assistant": 60, "arithmetic": 60}
    counts, domains = expert_counts(load(folder), load_tokenizer(folder), data.corpus()["test"], max_docs=docs, progress=False)
    found = specialisation(counts, domains, permutations=100)
    assert found.bits > 2 * found.chance_high and found.p < 0.02
