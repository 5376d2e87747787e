"""The command line as a stranger uses it: on tiny models, with good input and bad."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgelab import cli, console, page
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
    file.write_text(
        "\n\n".join(
            f"Document {i}: the quick brown fox counts {i * 7} hens and sleeps. " + f"One hen in {i + 2} lays an egg before noon. " * 2
            for i in range(6)
        )
    )
    return file


@pytest.mark.parametrize("command", ["", "demo", "compress", "evaluate", "export", "serve", "info", "doctor"])
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


def test_doctor_sees_a_package_that_is_there_and_does_not_import(tmp_path, monkeypatch):
    from edgelab.doctor import broken_imports

    (tmp_path / "sound.py").write_text("x = 1")
    (tmp_path / "torn.py").write_text("raise ImportError('libtorn.so.1: cannot open shared object file')")
    (tmp_path / "crash.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = broken_imports(["torn", "crash", "sound"])
    assert set(broken) == {"torn", "crash"}
    assert "libtorn.so.1" in broken["torn"] and "code 7" in broken["crash"]


def test_info_of_a_model_and_of_a_bundle(model, bundle):
    result = edgelab("info", model, "--weights")
    assert "deepseek_v3 (known)" in result.output and "experts.gate_up_proj" in result.output
    result = edgelab("info", bundle)
    assert "int4-g32" in result.output and "match their sha256" in result.output


def test_info_finds_a_damaged_bundle(bundle, tmp_path):
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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_source_is_never_deleted(model, bundle, tmp_path):
    source = shutil.copytree(model, tmp_path / "all" / "source")
    before = contents(tmp_path)
    for out in (source, source / "int4", tmp_path / "all"):
        said = edgelab("compress", source, "--scheme", "int4-g32", "--out", out, "--force", code=2).output.replace("\n", " ")
        assert "--out" in said and "the model" in said
    assert "lies in" in edgelab("export", source, "--out", source / "m.onnx", code=2).output.replace("\n", " ")
    assert "lies in" in edgelab("evaluate", source, "--out", source / "r.json", code=2).output.replace("\n", " ")
    assert contents(tmp_path) == before


def test_what_is_replaced_stays_until_its_successor_is_whole(model, bundle, tmp_path, monkeypatch):
    out = shutil.copytree(bundle, tmp_path / "int4")
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr("edgelab.bundle._write_weights", fail)
        assert "no space left" in edgelab("compress", model, "--scheme", "int8-row", "--out", out, "--force", code=2).output
        assert contents(tmp_path) == before
    edgelab("compress", model, "--scheme", "int8-row", "--out", out, "--force", "--threads", 1)
    assert "int8-row" in (out / "edgelab.json").read_text() and [p.name for p in tmp_path.iterdir()] == ["int4"]


def test_a_staged_folder_replaces_the_old_one_at_the_end_or_not_at_all(tmp_path):
    out = tmp_path / "demo"
    with console.staged(out) as folder:
        (folder / "a").write_text("first")
        assert not out.exists()
    with pytest.raises(RuntimeError), console.staged(out) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"demo/a": b"first"}
    with console.staged(out) as folder:
        (folder / "b").write_text("second")
        assert contents(out) == {"a": b"first"}
    assert contents(tmp_path) == {"demo/b": b"second"}
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.fixture(scope="module")
def without_tokenizer(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "bare"
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("token*", "special*", "chat*"))


def test_a_model_without_a_tokenizer_is_compressed_and_said_to_be(without_tokenizer, tmp_path):
    from edgelab.bundle import load_bundle, verify_bundle

    result = edgelab("compress", without_tokenizer, "--scheme", "int4-g32", "--out", tmp_path / "b", "--threads", 1)
    assert "without a tokenizer" in result.output.replace("\n", " ")
    verify_bundle(tmp_path / "b")
    assert load_bundle(tmp_path / "b").config.model_type == "deepseek_v3"
    assert not list((tmp_path / "b").glob("token*"))


def test_a_dense_model_without_a_tokenizer_gets_no_empty_one(tmp_path):
    # for some architectures transformers makes a tokenizer of one token from nothing
    from transformers import Qwen3ForCausalLM

    from edgelab.pretrain import dense_config

    Qwen3ForCausalLM(dense_config(64)).save_pretrained(tmp_path / "qwen")
    result = edgelab("compress", tmp_path / "qwen", "--scheme", "int4-g32", "--out", tmp_path / "b", "--threads", 1)
    assert "without a tokenizer" in result.output.replace("\n", " ") and not list((tmp_path / "b").glob("token*"))


def test_a_model_of_pictures_is_compressed(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    from edgelab.bundle import verify_bundle

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=8, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    edgelab("compress", tmp_path / "resnet", "--scheme", "int8-row", "--out", tmp_path / "b", "--threads", 1)
    verify_bundle(tmp_path / "b")


def test_a_broken_tokenizer_is_no_missing_one(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(Exception):  # noqa: B017 (which of its errors is the tokenizer library's choice)
        console.tokenizer_of(str(folder))


def test_models_with_different_tokenizers_are_not_compared(model, without_tokenizer, text, tmp_path):
    from edgelab.model import load_tokenizer

    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(other)
    said = edgelab("evaluate", model, other, "--data", text, code=2).output.replace("\n", " ")
    assert "different tokenizers" in said and "1 differ" in said
    assert "has no tokenizer" in edgelab("evaluate", without_tokenizer, "--data", text, code=2).output.replace("\n", " ")
    assert console.one_tokenizer([str(without_tokenizer), str(model)]).get_vocab() == load_tokenizer(model).get_vocab()


def test_the_hub_is_ruled_out_only_when_everything_is_here(model, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    console.local_only(model, "org/name")
    assert "HF_HUB_OFFLINE" not in os.environ
    console.local_only(model)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_numbers_that_overflow_end_with_a_sentence_and_our_mistakes_do_not(monkeypatch):
    def broken(*args, **kwargs):
        raise FloatingPointError("logits hold 3 NaN")

    monkeypatch.setattr(cli, "one_tokenizer", broken)
    assert "logits hold 3 NaN" in edgelab("evaluate", "any", code=2).output
    from datasets.exceptions import DatasetGenerationError

    assert console.expected(DatasetGenerationError("x")) and not console.expected(TypeError("x"))


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
    result = edgelab("evaluate", bundle, "--baseline", model, "--data", text, "--out", out, "--context", 32, "--stride", 16, "--threads", 1)
    report = Report.from_json(out.read_text())
    assert report.models() == ["tiny-moe", "int4"]
    kld = report.get(model="int4", metric="kld")
    assert kld.slice == "notes" and kld.n == 6 and 0 < kld.low <= kld.value <= kld.high
    assert report.get(model="int4", metric="weight_bytes").value < report.get(model="tiny-moe", metric="weight_bytes").value / 3
    assert "KL divergence" in result.output
    html = out.with_suffix(".html").read_text()
    assert page.external_loads(html) == [] and "bits per byte" in html
    assert "fingerprint of all documents" in html and "over its repetitions" in html
    assert "--force" in edgelab("evaluate", model, "--data", text, "--out", out, code=2).output
    assert "--context 99999 is more than" in edgelab("evaluate", model, "--data", text, "--context", 99999, code=2).output.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", "a,b", ".txt, .md, .jsonl"),
        ("d.jsonl", '{"words": "x"}\n', "text='text' is not a column"),
        ("d.jsonl", "{not json", "Error:"),
        ("d.txt", "\n\n", "no document"),
    ],
)
def test_evaluate_says_what_is_wrong_with_the_data(model, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    assert said in edgelab("evaluate", model, "--data", tmp_path / name, code=2).output.replace("\n", " ")
    assert "does not exist" in edgelab("evaluate", model, "--data", tmp_path / "gone.txt", code=2).output.replace("\n", " ")


def test_evaluate_reads_jsonl_with_domains(tmp_path):
    rows = [{"text": f"say {i}", "domain": "mine", "prompt": "say ", "answer": str(i)} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = console.read_documents(str(tmp_path / "d.jsonl"))
    assert data["domain"][:] == ["mine"] * 3 and sorted(data["answer"]) == ["0", "1", "2"]


def test_models_of_one_name_are_told_apart():
    assert cli._short_names(["runs/a/int4", "runs/b/int4", "org/int8", "runs/a/int4"]) == {
        "int4": "runs/a/int4", "b/int4": "runs/b/int4", "int8": "org/int8"
    }  # fmt: skip


def test_several_targets_go_into_a_folder(bundle, tmp_path):
    settings = ("--target", "onnx", "--target", "gguf", "--cache", "--no-verify", "--threads", 1)
    result = edgelab("export", bundle, "--out", tmp_path / "out", *settings)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["model.gguf", "model.onnx"] and result.output.count("not verified") == 4
    assert "--force" in edgelab("export", bundle, "--out", tmp_path / "out", *settings, code=2).output
    assert "holds no page" in edgelab("serve", tmp_path / "out", code=1).output.replace("\n", " ")


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
    peak = float(re.search(r"peak memory ([\d.]+) GB", done.stdout)[1])
    assert 0.1 < peak < 3.0  # GB: the bar of the demo
    assert "over its repetitions" in done.stdout and "bfloat16 file" in done.stdout
    report = Report.from_json((out / "report.json").read_text())
    assert report.models() == ["fp", "int8", "int4", "phone"]
    size = {m: report.get(model=m, metric="weight_bytes").value for m in report.models()}
    assert size["int4"] <= 0.32 * size["fp"]
    for domain in ("prose", "code"):
        kld = {m: report.get(model=m, metric="kld", slice=domain) for m in ("int8", "int4")}
        assert kld["int8"].value < kld["int4"].value
        assert kld["int4"].low <= kld["int4"].value <= kld["int4"].high and kld["int4"].n > 1 and kld["int4"].corpus
    html = (out / "report.html").read_text()
    assert page.external_loads(html) == [] and "int4-g32" in html and report.rows[0].machine.split(",")[0] in html
    assert {p.name for p in out.iterdir()} == {"int4", "int4.onnx", "report.html", "report.json", cli.MARKER}
    assert [p.name for p in tmp_path.iterdir()] == ["demo"] and "all splits" in html and "bfloat16 file" in html

    from edgelab.bundle import coverage_of, verify_bundle

    verify_bundle(out / "int4")
    coverage = coverage_of(out / "int4")
    assert coverage.expert_share == 1.0 and abs(coverage.file_error) < 0.01


def test_demo_does_not_delete_what_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--force" in edgelab("demo", "--quick", "--out", tmp_path, code=2).output
    assert "did not write" in edgelab("demo", "--quick", "--out", tmp_path, "--force", code=2).output.replace("\n", " ")
    assert (tmp_path / "thesis.txt").exists()
