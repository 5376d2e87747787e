"""`deploy`: what a device gets, that the folder says what is in it, and that it is refused when it is not so any more."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnx
from test_cli import bundle, edgelab, model  # noqa: F401 (fixtures)

from edgelab import deploy as deploying
from edgelab import devices
from edgelab.deploy import deploy, need, verify
from edgelab.export import ExportError
from edgelab.export.batches import measure, rows_alone
from edgelab.export.onnx import export
from edgelab.model import load, load_tokenizer


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("deployed") / "phone"
    said = edgelab("deploy", bundle, "--device", "arm64", "--batch-size", 4, "--dynamic-shape", "--target", "onnx", "--out", out).output
    assert "arm64" in said and "onnx" in said and "100.0%" in said
    return out


def test_what_is_there(folder):
    stated = json.loads((folder / "deploy.json").read_text())
    assert stated["device"] == "arm64" and stated["settings"] == {"batch_size": 4, "dynamic_shape": True, "length": 512, "threads": 4}
    assert set(stated["files"]) | {"deploy.json"} == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert stated["targets"]["onnx"]["parity"]["cosine"] > 0.9999 and stated["batch_difference"] < 1e-4
    rows = [m["rows"] for m in stated["measured"]]
    assert rows == [1, 4] and all(m["tokens_per_s"] > 0 and m["peak_bytes"] > 0 for m in stated["measured"])
    names = {i.name for i in onnx.load(str(folder / "model.onnx")).graph.input}
    assert "attention_mask" in names and "past_key_values.0.key" in names
    readme = (folder / "README.md").read_text()
    for said in ("Threads: **4**", "model.onnx", "tokenizer/tokenizer.json", "on the left", "not on a device", "edgelab verify"):
        assert said in readme, said
    assert str(folder.parent) not in readme


def test_the_program_in_the_readme_says_what_torch_says(folder, bundle, monkeypatch, capsys):  # noqa: F811
    text = (folder / "README.md").read_text()
    assert "| input | `past_key_values.0.key` | float32 | [batch, 1, past, " in text and "`<|end|><|user|>`, message, `<|call|>`" in text
    program = text.split("```python\n")[1].split("```")[0].replace("< 1024", "< 24")
    monkeypatch.chdir(folder)
    exec(compile(program, "README.md", "exec"), {})
    m, tokenizer = load(str(bundle)), load_tokenizer(str(bundle))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "turn on the light"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    ids = m.generate(prompt, max_length=24, do_sample=False)[0, prompt.shape[1] :]
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\n")


def test_verified_again_and_refused_when_it_changed(folder, bundle, tmp_path):  # noqa: F811
    assert verify(folder, bundle).results["onnx"].parity["cosine"] > 0.9999
    assert "match their sha256" in edgelab("verify", folder).output

    def aim(d):
        stated = json.loads((d / "deploy.json").read_text())
        stated["targets"]["../x"] = stated["targets"].pop("onnx")
        (d / "deploy.json").write_text(json.dumps(stated))

    for damage, said in (
        (aim, "can't be read"),
        (lambda d: (d / "README.md").write_text("no"), "README.md was changed"),
        (lambda d: (d / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda d: (d / "more").write_text(""), "more is not listed"),
        (lambda d: (d / "deploy.json").write_text("{"), "can't be read"),
        (lambda d: (d / "deploy.json").write_text((d / "deploy.json").read_text().replace('"format": 1', '"format": 2')), "format 2"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(ExportError, match=said):
            verify(copy)
        assert said in edgelab("verify", copy, code=1).output.replace("\n", " ")


def test_a_link_and_an_empty_folder_are_strangers(folder, tmp_path):
    for name, make in (("link", lambda p: p.symlink_to("/")), ("empty", lambda p: p.mkdir())):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        make(copy / "stranger")
        with pytest.raises(ExportError, match="stranger is not listed"):
            verify(copy)
    (tmp_path / "elsewhere").write_bytes((folder / "README.md").read_bytes())
    (tmp_path / "copy").mkdir()
    shutil.copytree(folder, tmp_path / "copy" / "d")
    (tmp_path / "copy" / "d" / "README.md").unlink()
    (tmp_path / "copy" / "d" / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"README.md was changed: its sha256 is of a link"):
        verify(tmp_path / "copy" / "d")


def test_what_was_stated_is_shown_and_another_bundle_is_refused(folder, model, tmp_path):  # noqa: F811
    told = verify(folder)
    assert told.results["onnx"].share > 0.9 and "stated when it was made" in told.table()[0]["verified by"]
    edgelab("compress", model, "--scheme", "int8-row", "--out", tmp_path / "other")
    with pytest.raises(ExportError, match="was made of another bundle"):
        verify(folder, tmp_path / "other")


def test_nothing_that_is_not_ours_is_replaced(bundle, tmp_path):  # noqa: F811
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match=r"precious is a folder with no file deploy.json in it: it is not replaced"):
        deploy(bundle, out, targets=["onnx"], check=False)
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    for place in (copy, copy / "inside", tmp_path):
        with pytest.raises(ValueError, match="is, holds or lies in the model"):
            deploy(copy, place, targets=["onnx"], check=False)
    assert (out / "thesis.txt").read_text() == "years" and (copy / "edgelab.json").is_file()


def test_a_phone_gets_a_module_and_a_file_and_each_says_its_shape(bundle, tmp_path):  # noqa: F811
    done = deploy(bundle, tmp_path / "d", device="arm64", batch_size=2, check=False)
    assert list(done.results) == ["android", "gguf"]
    assert (tmp_path / "d" / "android" / "edgelab" / "src" / "main" / "assets" / "edgelab" / "model.onnx").is_file()
    assert [line["shape"] for line in done.table()] == ["any; meant for up to 2 rows", "the runtime's choice"]
    text = (tmp_path / "d" / "README.md").read_text()
    assert "not verified" in text and "Measured where" not in text
    assert list(verify(tmp_path / "d").results) == ["android", "gguf"]


def test_without_its_runtime_a_file_is_written_and_said_not_to_be_verified(bundle, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    done = deploy(bundle, tmp_path / "d", device="arm64", targets=["gguf"])
    assert (tmp_path / "d" / "model.gguf").is_file() and not done.refused and not done.results["gguf"].verified_by
    assert any(note.startswith("not verified: llama-cpp-python is not installed") for note in done.results["gguf"].notes)
    assert done.table()[0]["verified by"] == "not verified" and "not verified" in (tmp_path / "d" / "README.md").read_text()


def test_fixed_shape(bundle, tmp_path):  # noqa: F811
    done = deploy(bundle, tmp_path / "d", device="x86-64", targets=["onnx"], batch_size=2, length=16, dynamic_shape=False)
    (value,) = onnx.load(str(tmp_path / "d" / "model.onnx")).graph.input
    assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [2, 16]
    assert done.results["onnx"].parity["cosine"] > 0.9999 and not done.measured
    text = (tmp_path / "d" / "README.md").read_text()
    assert "2 rows of 16 tokens" in text and "there is no cache" in text and "present" not in text
    assert "16 tokens" in done.results["onnx"].verified_by and "24" not in done.results["onnx"].verified_by.split("Provider")[1]
    with pytest.raises(ExportError, match="its files take one row; batch_size=2 is not for it"):
        deploy(bundle, tmp_path / "e", device="arm64", targets=["litert"], batch_size=2, dynamic_shape=False)


def test_every_target_of_every_device_is_written_or_said_to_be_left_out(bundle, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def pretend(model, target, out, **settings):  # noqa: F811
        asked.append((target, settings))
        if target == "gguf":
            raise ExportError("llama.cpp has no such thing")
        return export(model, out / "model.onnx" if out.suffix != ".onnx" else out, cache=True, check=False)

    monkeypatch.setattr(deploying, "export", pretend)
    done = deploy(bundle, tmp_path / "d", device="linux-arm64", check=False)
    assert list(done.results) == ["onnx"] and done.refused == {"gguf": "llama.cpp has no such thing"}
    assert "left out: llama.cpp has no such thing" in (tmp_path / "d" / "README.md").read_text()
    assert asked[0] == ("onnx", {"check": False, "cache": True, "experts": "auto"})
    monkeypatch.setattr(deploying, "export", lambda *a, **k: (_ for _ in ()).throw(ExportError("no")))
    with pytest.raises(ExportError, match="onnx: no; gguf: no"):
        deploy(bundle, tmp_path / "e", device="linux-arm64", check=False)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "settings, error, said",
    [
        ({"device": "toaster"}, ValueError, "device='toaster' is not one of arm64"),
        ({"targets": ["elf"]}, ValueError, "'elf' is no list of onnx"),
        ({"targets": []}, ValueError, r"targets=\[\]"),
        ({"targets": "onnx"}, ValueError, "'onnx' is no list of"),
        ({"batch_size": True}, ValueError, "batch_size=True"),
        ({"device": "browser", "dynamic_shape": False}, ValueError, "no files of a fixed shape"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"length": 10**6}, ValueError, "length=1000000 is more than the"),
        ({"memory": 1000}, ExportError, "arm64 leaves an app 0"),
    ],
)
def test_refused_before_any_work(bundle, tmp_path, settings, error, said):  # noqa: F811
    with pytest.raises(error, match=said):
        deploy(bundle, tmp_path / "d", **settings)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_mixes_its_rows_is_refused(model, tmp_path):  # noqa: F811
    export(load(str(model)), tmp_path / "m.onnx", cache=True, check=False)
    vocabulary = load(str(model)).config.vocab_size
    assert rows_alone(tmp_path / "m.onnx", 3, vocabulary) < 1e-4
    graph = onnx.load(str(tmp_path / "m.onnx"))
    for node in graph.graph.node:  # a file whose mask is not read
        for i, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[i] = "ones"
    ones = onnx.helper.make_node("Mul", ["attention_mask", "zero_i"], ["zeros"])
    more = onnx.helper.make_node("Add", ["zeros", "one_i"], ["ones"])
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v, np.int64), n) for n, v in (("zero_i", 0), ("one_i", 1)))
    nodes = [ones, more, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    onnx.save(graph, str(tmp_path / "m.onnx"))
    with pytest.raises(ExportError, match="a row of a batch of 3 differs from the row alone"):
        rows_alone(tmp_path / "m.onnx", 3, vocabulary)


def test_the_estimate_of_memory_grows_as_it_should(model):  # noqa: F811
    m = load(str(model))
    result = replace(_nothing, bytes=1000)
    settings = {"batch_size": 1, "length": 10, "dynamic_shape": True}
    one, two = need(m, result, settings), need(m, result, settings | {"batch_size": 2})
    assert two - 1000 == 2 * (one - 1000)
    config = m.config
    cached = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)  # the latent and the rotary key
    assert one - 1000 == 4 * 10 * (2 * cached + config.vocab_size)


def test_measured_in_a_process_of_its_own(model, tmp_path):  # noqa: F811
    export(load(str(model)), tmp_path / "m.onnx", cache=True, check=False)
    small, large = measure(tmp_path / "m.onnx", [1, 64], 1, 128, steps=2, repeats=1)
    assert large["peak_bytes"] > 2 * small["peak_bytes"] and large["first_token_s"] > small["first_token_s"]
    with pytest.raises(ExportError, match="with 1 rows of 0 tokens fails"):
        measure(tmp_path / "m.onnx", [1], 1, 0, repeats=1)


def test_devices_say_why():
    from edgelab.export import TARGETS

    for name, d in devices.DEVICES.items():
        assert d.name == name and d.why and d.about and d.threads >= 1 and d.memory > 0 and d.targets
        assert {*d.targets, *d.fixed} <= set(TARGETS)


_nothing = deploying.ExportResult("onnx", (), 0, 0, 0, 0, 0, 0)
