"""The comparison: every line on the same footing, its costs measured in a process of its own, its table in four forms."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_cli import edgelab, model, text  # noqa: F401 (fixtures)

from edgelab import Recipe, Report, Rtn
from edgelab.bundle import coverage_of, load_bundle
from edgelab.compare import EIGHT_BITS_ONLY, FOUR_BITS_ONLY, METHODS, Comparison, _digest_of, compare, pool
from edgelab.data import calibration_batches
from edgelab.evaluate import measure, summarise
from edgelab.model import load, load_tokenizer, weights

DOCS = {"prose": 1, "code": 1, "assistant": 3, "arithmetic": 3}


@pytest.fixture(scope="module")
def parts(model):  # noqa: F811
    from edgelab import corpus

    tokenizer, splits = load_tokenizer(model), corpus()
    return model, tokenizer, splits["test"], calibration_batches(tokenizer, splits["calibration"], tokens=2048, context=128)


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory) -> tuple[Comparison, object]:
    folder, tokenizer, data, calibration = parts
    out = tmp_path_factory.mktemp("compare")
    own = {"mine": Recipe.body("int8-row", method=Rtn(8))}
    peers = {"onnxruntime": ["rtn"]} if pytest.importorskip("onnxruntime") else None
    run = compare(
        folder, tokenizer, data, calibration, methods=("rtn", "gptq"), bits=(4,), recipes=own, peers=peers, out=out,
        max_docs=DOCS, threads=1, bootstrap=50, progress=False,
    )  # fmt: skip
    return run, out


def test_lines_are_of_the_same_weights_and_their_costs_are_measured(made, parts):
    run, out = made
    model = load(parts[0])  # noqa: F811
    body = {w.name for w in weights(model) if w.role not in ("embedding", "head", "router")}
    by_name = {line.name: line for line in run.lines}
    assert set(by_name) == {"rtn int4-g32", "gptq int4-g32", "mine", "onnxruntime rtn 4-g32"}
    for line in run.lines:
        assert line.seconds > 0 and line.peak_rss_bytes > 50e6
        assert line.coverage == 1.0
        assert line.modelled == (line.by != "edgelab")
    for bundle in out.glob("lines/*/bundle"):
        assert {r.name for r in coverage_of(bundle) if r.touched} == body
    assert by_name["rtn int4-g32"].bits == by_name["onnxruntime rtn 4-g32"].bits == 4.5
    assert by_name["rtn int4-g32"].file_bytes == pytest.approx(
        by_name["onnxruntime rtn 4-g32"].file_bytes, rel=0.1
    )  # small headers weigh here
    assert by_name["mine"].file_bytes > by_name["rtn int4-g32"].file_bytes


def test_its_figures_are_those_of_evaluate(made, parts):
    """The same bundle, evaluated directly: the same sums; and the peer with our own rule of rounding is our own line."""
    run, out = made
    folder, tokenizer, data, _ = parts
    line = next(f for f in out.glob("lines/*/line.json") if json.loads(f.read_text())["name"] == "gptq int4-g32")
    models = {"fp": load(folder), "it": load_bundle(line.parent / "bundle")}
    found = measure(models, tokenizer, data, max_docs=DOCS, progress=False)
    total = sum(s.kld.sum() for s in found.scores["it"].values()) / sum(s.tokens.sum() for s in found.scores["it"].values())
    assert run.report.get(model="gptq int4-g32", metric="kld", slice="all").value == pytest.approx(total, rel=1e-6)
    klds = [run.report.get(model=m, metric="kld", slice="all").value for m in ("rtn int4-g32", "onnxruntime rtn 4-g32")]
    assert klds[0] == pytest.approx(klds[1], rel=0.05)  # float32 scales there, float16 ones here
    assert run.report.get(model="mine", metric="kld", slice="all").value < klds[0] / 5


def test_it_goes_on_where_it_was(made, parts):
    run, out = made
    folder, tokenizer, data, calibration = parts
    before = {f: f.stat().st_mtime_ns for f in out.glob("lines/*/line.json")}
    again = compare(
        folder,
        tokenizer,
        data,
        calibration,
        methods=("rtn", "gptq"),
        bits=(4,),
        out=out,
        max_docs=DOCS,
        threads=1,
        bootstrap=50,
        progress=False,
    )
    assert {f: f.stat().st_mtime_ns for f in out.glob("lines/*/line.json")} == before
    assert again.lines == run.lines[:2]
    same = [r.value for r in again.report.where(model="gptq int4-g32")]
    assert same == [r.value for r in run.report.where(model="gptq int4-g32")]


def test_the_table_in_its_forms(made):
    run, out = made
    rows = run.table()
    assert [r["method"] for r in rows] == ["original", "rtn", "gptq", "rtn", "mine"]
    assert rows[3]["MB"].startswith("~") and not rows[1]["MB"].startswith("~")
    markdown = run.to_markdown().splitlines()
    assert len(markdown) == len(rows) + 2 and len({line.count(" | ") for line in markdown}) == 1
    latex = run.to_latex()
    assert latex.count(r"\\") == len(rows) + 1 and "same top, \\%" in latex and "$\\sim$" in latex
    frame = run.to_dataframe()
    assert list(frame["method"]) == [r["method"] for r in rows] and frame["kld"].dtype == float and np.isnan(frame["kld"][0])
    assert run.to_html().count("<tr>") == len(rows) + 1
    assert Comparison.from_json(run.to_json()).table() == rows
    for suffix in ("md", "tex", "html", "csv", "json"):
        assert (out / f"comparison.{suffix}").stat().st_size > 100
    with pytest.raises(ValueError, match="comparison format 2 is not 1"):
        Comparison.from_json('{"format": 2}')


def test_pooled_scores_are_the_sums_of_the_domains(parts):
    folder, tokenizer, data, _ = parts
    fp = load(folder)
    found = measure({"fp": fp, "same": fp}, tokenizer, data, max_docs=DOCS, progress=False)
    pooled = pool(found)
    assert set(pooled.scores["fp"]) == {"all", "answers"}
    each = found.scores["fp"].values()
    assert pooled.scores["fp"]["all"].nll.sum() == pytest.approx(sum(s.nll.sum() for s in each))
    assert len(np.unique(pooled.scores["fp"]["all"].source)) == sum(len(np.unique(s.source)) for s in each)
    assert len(pooled.scores["fp"]["answers"].correct) == 6
    report = summarise(pooled, resamples=20)
    assert isinstance(report, Report) and report.get(model="same", metric="kld", slice="all").value == 0


def test_a_line_is_made_again_for_another_model_and_not_for_the_same(parts):
    one, two = load(parts[0]), load(parts[0])
    assert _digest_of(one) == _digest_of(two)
    router = next(m for m in two.modules() if hasattr(m, "e_score_correction_bias"))
    router.e_score_correction_bias[0] += 1  # a buffer
    assert _digest_of(one) != _digest_of(two)
    two = load(parts[0])
    two.model.layers[0].mlp.up_proj.weight.data[3, 5] *= -1  # one sign
    assert _digest_of(one) != _digest_of(two)
    two = load(parts[0])
    two.config.num_experts_per_tok = 1
    assert _digest_of(one) != _digest_of(two)


def test_what_a_recipe_leaves_out_is_told(parts, tmp_path):
    folder, tokenizer, data, calibration = parts
    from edgelab import Quantize, QuantScheme

    int4 = QuantScheme.parse("int4-g32")
    own = {"half": Recipe((Quantize((("*.o_proj", int4), ("@embedding", int4)), min_expert_share=0),))}
    made = compare(
        folder, tokenizer, data, calibration, methods=(), recipes=own, out=tmp_path, max_docs=DOCS, threads=1, bootstrap=20, progress=False
    )
    (line,) = made.lines
    assert line.coverage < 0.2 and line.bits == 4.5 and line.whole_bits > 12
    assert "also rounds embedding" in line.notes[-1] and "of the weights)" in made.table()[1]["method"]
    with pytest.raises(ValueError, match="two lines would be called 'fp'"):
        compare(folder, tokenizer, data, calibration, methods=(), recipes={"fp": own["half"]}, out=tmp_path)


def test_methods_of_one_step_of_bits_take_the_same_bits():
    for bits in (4, 3, 2):
        for name, (scheme_of, _) in METHODS.items():
            if name not in EIGHT_BITS_ONLY and (bits == 4 or name not in FOUR_BITS_ONLY):
                from edgelab import QuantScheme

                effective = QuantScheme.parse(scheme_of(bits, 32)).bits_per_weight((256, 256))
                assert effective == (4.25 if name == "mxfp4" else bits + 0.5), name


def test_bad_input_is_refused_and_failures_are_told(parts, tmp_path):
    folder, tokenizer, data, calibration = parts
    settings = {"out": tmp_path, "max_docs": DOCS, "threads": 1, "progress": False, "bits": (4,)}
    with pytest.raises(ValueError, match="method 'magic' is not one of rtn"):
        compare(folder, tokenizer, data, calibration, methods=("magic",), **settings)
    with pytest.raises(ValueError, match="peer 'nobody' is not one of"):
        compare(folder, tokenizer, data, calibration, methods=(), peers={"nobody": ["x"]}, **settings)
    with pytest.raises(RuntimeError, match=re.escape("no line could be made: rtn int4-g48")):
        compare(folder, tokenizer, data, calibration, methods=("rtn",), group=48, **settings)
    with pytest.raises(RuntimeError, match="peers install hqq"):
        compare(folder, tokenizer, data, calibration, methods=(), peers={"hqq": ["hqq"]}, peers_root=tmp_path / "none", **settings)


def test_on_the_command_line(model, tmp_path):  # noqa: F811
    out = tmp_path / "table"
    args = (
        "compare",
        model,
        "--methods",
        "rtn",
        "--bits",
        "8",
        "--out",
        out,
        "--max-docs",
        2,
        "--calibration-tokens",
        1024,
        "--context",
        128,
    )
    result = edgelab(*args, "--threads", 1)
    assert "int8-g32" in result.output and (out / "comparison.md").is_file()
    assert "8.500" in (out / "comparison.md").read_text()
    assert "must be numbers with commas" in edgelab("compare", model, "--bits", "four", "--out", out, code=2).output


def test_compress_with_calibration_on_the_command_line(model, tmp_path):  # noqa: F811
    result = edgelab(
        "compress", model, "--scheme", "int4-g32", "--method", "gptq", "--activations", "a8-static", "--calibration-tokens", 1024,
        "--out", tmp_path / "b", "--threads", 1,
    )  # fmt: skip
    assert "Coverage audit" in result.output
    again = load(tmp_path / "b")
    assert any(getattr(m, "acts", None) for m in again.modules())
    with torch.no_grad():
        assert torch.isfinite(again(torch.arange(8)[None]).logits).all()
    assert (
        "go with --scheme" in edgelab("compress", model, "--recipe", "x.json", "--method", "gptq", "--out", tmp_path / "c", code=2).output
    )


def test_the_worker_says_what_is_wrong(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({"model": str(tmp_path / "nothing"), "threads": 1, "recipe": "{}", "out": "x"}))
    done = subprocess.run([sys.executable, "-m", "edgelab.compare", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode and "calibration.safetensors" in done.stderr
