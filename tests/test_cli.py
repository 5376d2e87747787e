"""The command line as a stranger uses it: on tiny models, with good input and bad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgelab import cli, page
from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.report import Report

runner = CliRunner()


def edgelab(*args: object, code: int = 0):
    """The result of a run; its exit code must be `code`, and no traceback may show."""
    result = runner.invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random MoE of the embedded model's kind, small enough for a test, with its tokenizer."""
    from edgelab.model import load_tokenizer
    from edgelab.pretrain import moe_config

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    tokenizer = load_tokenizer(data_dir() / "edge-moe")
    config = moe_config(len(tokenizer))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.moe_intermediate_size = 2, 64, 64, 32
    config.n_routed_experts = 4
    from transformers import DeepseekV3ForCausalLM

    DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "int4"
    result = edgelab("compress", model, "--scheme", "int4-g32", "--out", out, "--threads", 1)
    assert "Coverage audit" in result.output and "100.00 % of the experts" in result.output
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "notes.txt"
    file.write_text("\n\n".join(f"Document {i}: the quick brown fox counts {i * 7} hens and sleeps." for i in range(6)))
    return file


@pytest.mark.parametrize("command", ["", "demo", "compress", "evaluate", "export", "info", "doctor"])
def test_help(command):
    result = edgelab(*([command] if command else []), "--help")
    assert "Usage" in result.output and "--help" in result.output
    if not command:
        assert all(name in result.output for name in ("demo", "compress", "evaluate", "export", "info", "doctor"))


def test_help_loads_no_torch():
    code = "import sys; from edgelab import cli; print([m for m in ('torch', 'numba', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[1])
    assert done.stdout.strip() == "[]"


def test_version():
    assert edgelab("--version").output.startswith("edgelab 0")


def test_doctor_is_content_here():
    result = edgelab("doctor")
    assert "All that is needed is here" in result.output and "torch" in result.output


def test_doctor_ends_with_1_when_something_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGELAB_DATA", str(tmp_path))
    result = edgelab("doctor", code=1)
    assert "model edge-moe" in result.output and "config.json" in result.output


def test_info_of_a_model_and_of_a_bundle(model, bundle):
    result = edgelab("info", model, "--weights")
    assert "family deepseek_v3 (known)" in result.output and "experts.gate_up_proj" in result.output
    result = edgelab("info", bundle)
    assert "int4-g32" in result.output and "match their sha256" in result.output


def test_info_finds_a_damaged_bundle(bundle, tmp_path):
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text((copy / "tokenizer_config.json").read_text().replace("false", "true ", 1) + " ")
    assert "tokenizer_config.json" in edgelab("info", copy, code=2).output


def test_compress_by_recipe_file(model, tmp_path):
    from edgelab.bundle import read_manifest

    recipe = Recipe.uniform("int8-row", embedding=None)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    edgelab("compress", model, "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "b", "--threads", 1)
    assert read_manifest(tmp_path / "b")["recipe_digest"] == recipe.digest


def test_compress_refuses_to_overwrite(model, bundle, tmp_path):
    assert "--force" in edgelab("compress", model, "--scheme", "int4-g32", "--out", bundle, code=2).output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = edgelab("compress", model, "--scheme", "int4-g32", "--out", tmp_path / "mine", "--force", code=2)
    assert "edgelab did not write" in result.output.replace("\n", " ")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--scheme", "int5-g32"), "bits=5"),
        (("--scheme", "4bit"), "int4-g32"),
        (("--scheme", "int4-g48"), "group_size=48"),
        ((), "either --recipe FILE or --scheme"),
        (("--scheme", "int4-g32", "--recipe", "r.json"), "not both"),
    ],
)
def test_compress_says_what_is_wrong(model, tmp_path, args, said):
    result = edgelab("compress", model, *args, "--out", tmp_path / "b", code=2)
    assert said in result.output.replace("\n", " ")
    assert not (tmp_path / "b").exists()


def test_bad_recipe_file(model, tmp_path):
    (tmp_path / "r.json").write_text("{not json")
    assert "is not a recipe" in edgelab("compress", model, "--recipe", tmp_path / "r.json", "--out", tmp_path / "b", code=2).output
    (tmp_path / "r.json").write_text(json.dumps({"format": 1, "steps": [{"step": "shrink"}]}))
    assert "shrink" in edgelab("compress", model, "--recipe", tmp_path / "r.json", "--out", tmp_path / "b", code=2).output
    assert "nowhere.json" in edgelab("compress", model, "--recipe", "nowhere.json", "--out", tmp_path / "b", code=2).output


def test_missing_model(tmp_path):
    for command in (("info",), ("compress", "--scheme", "int4-g32", "--out", tmp_path / "b"), ("export", "--out", tmp_path / "m.onnx")):
        result = edgelab(command[0], tmp_path / "nothing", *command[1:], code=2)
        assert "nothing" in result.output.replace("\n", "")


def test_audit_that_fails_ends_with_a_sentence(model, tmp_path):
    from edgelab.recipe import Quantize
    from edgelab.scheme import QuantScheme

    careless = Recipe((Quantize((("@experts", None), ("@attention", QuantScheme.parse("int4-g32")))),))
    (tmp_path / "r.json").write_text(careless.to_json())
    result = edgelab("compress", model, "--recipe", tmp_path / "r.json", "--out", tmp_path / "b", code=2)
    assert "min_expert_share" in result.output.replace("\n", " ") and not (tmp_path / "b").exists()


def test_evaluate_writes_report_and_page(model, bundle, text, tmp_path):
    out = tmp_path / "report.json"
    result = edgelab("evaluate", bundle, "--baseline", model, "--data", text, "--out", out, "--threads", 1)
    report = Report.from_json(out.read_text())
    assert report.models() == ["tiny-moe", "int4"]
    kld = report.get(model="int4", metric="kld")
    assert kld.slice == "notes" and kld.n == 6 and 0 < kld.low <= kld.value <= kld.high
    assert report.get(model="int4", metric="weight_bytes").value < report.get(model="tiny-moe", metric="weight_bytes").value / 3
    assert "KL divergence" in result.output
    html = out.with_suffix(".html").read_text()
    assert page.external_loads(html) == [] and "bits per byte" in html
    assert "--force" in edgelab("evaluate", model, "--data", text, "--out", out, code=2).output


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("d.csv", "a,b", ".txt, .jsonl, .parquet"), ("d.jsonl", '{"words": "x"}\n', "a column `text`"), ("d.txt", "\n\n", "no document")],
)
def test_evaluate_says_what_is_wrong_with_the_data(model, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    assert said in edgelab("evaluate", model, "--data", tmp_path / name, code=2).output.replace("\n", " ")
    assert "is no file" in edgelab("evaluate", model, "--data", tmp_path / "gone.txt", code=2).output.replace("\n", " ")


def test_evaluate_reads_jsonl_with_domains(tmp_path):
    rows = [{"text": f"say {i}", "domain": "mine", "prompt": "say ", "answer": str(i)} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = cli._documents(tmp_path / "d.jsonl")
    assert data["domain"][:] == ["mine"] * 3 and data["answer"][2] == "2"


def test_models_of_one_name_are_told_apart():
    assert cli._short_names(["runs/a/int4", "runs/b/int4", "org/int8", "runs/a/int4"]) == {
        "int4": "runs/a/int4", "b/int4": "runs/b/int4", "int8": "org/int8"
    }  # fmt: skip


def test_export_is_verified(bundle, tmp_path):
    pytest.importorskip("onnxruntime")
    result = edgelab("export", bundle, "--out", tmp_path / "m.onnx", "--threads", 1)
    assert "onnxruntime" in result.output and (tmp_path / "m.onnx").stat().st_size > 10_000
    assert "must end in .onnx" in edgelab("export", bundle, "--out", tmp_path / "m.gguf", code=2).output.replace("\n", " ")
    assert "--force" in edgelab("export", bundle, "--out", tmp_path / "m.onnx", code=2).output


@pytest.mark.slow
def test_demo_quick_from_end_to_end(tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "demo"
    environment = os.environ | {"COLUMNS": "120", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "edgelab.cli", "demo", "--quick", "--out", str(out)]
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("Coverage audit of int4", "onnxruntime", "peak memory", "hashes match", "router overlap", "tokens per second"):
        assert said in done.stdout
    report = Report.from_json((out / "report.json").read_text())
    assert report.models() == ["fp", "int8", "int4"]
    size = {m: report.get(model=m, metric="weight_bytes").value for m in report.models()}
    assert size["int4"] <= 0.32 * size["fp"]
    for domain in ("prose", "code"):
        kld = {m: report.get(model=m, metric="kld", slice=domain) for m in ("int8", "int4")}
        assert kld["int8"].value < kld["int4"].value
        assert kld["int4"].low <= kld["int4"].value <= kld["int4"].high and kld["int4"].n > 1 and kld["int4"].corpus
    html = (out / "report.html").read_text()
    assert page.external_loads(html) == [] and "int4-g32" in html and report.rows[0].machine.split(",")[0] in html
    assert {p.name for p in out.iterdir()} == {"int4", "int4.onnx", "report.html", "report.json", cli.MARKER}

    from edgelab.bundle import coverage_of, verify_bundle

    verify_bundle(out / "int4")
    coverage = coverage_of(out / "int4")
    assert coverage.expert_share == 1.0 and abs(coverage.file_error) < 0.01


def test_demo_does_not_delete_what_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--force" in edgelab("demo", "--quick", "--out", tmp_path, code=2).output
    assert "did not write" in edgelab("demo", "--quick", "--out", tmp_path, "--force", code=2).output.replace("\n", " ")
    assert (tmp_path / "thesis.txt").exists()
