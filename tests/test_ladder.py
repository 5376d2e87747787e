"""The round-trip ladder: nothing is lost below the rounding, and a target that can't be made hides no other."""

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
from test_export_onnx import qwen3_moe, tiny

from edgelab import Recipe, save_bundle
from edgelab.compress import compress
from edgelab.export import ExportError, export, verify
from edgelab.export.ladder import climb


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    original = tiny(qwen3_moe(), None)
    made = compress(original, Recipe.uniform("int4-g16"), progress=False)
    save_bundle(made.model, None, folder / "bundle", recipe=made.recipe, coverage=made.coverage)
    return climb(original, made.model, folder / "bundle", folder, {"onnx": {"cache": True}, "web": {"runtime": folder / "nowhere"}}), folder


def test_each_rung_is_held_against_the_one_below(ladder):
    rungs = {r.name: r for r in ladder[0].rungs}
    assert list(rungs)[:5] == ["original", "fake-quantized", "packed", "bundle", "onnx"]
    assert rungs["original"].parity is None and rungs["fake-quantized"].on == "original"
    assert rungs["fake-quantized"].parity["kld"] > 1e-5  # rounding costs something,
    for name in ("packed", "bundle", "onnx"):  # and nothing behind it does
        assert abs(rungs[name].parity["kld"]) < 1e-8 and rungs[name].parity["max_abs_diff"] < 1e-3, name
    assert rungs["bundle"].parity["max_abs_diff"] == 0
    assert rungs["packed"].quantized == rungs["bundle"].quantized == rungs["onnx"].quantized > 0.97 * rungs["original"].weights
    assert rungs["bundle"].bytes < rungs["fake-quantized"].bytes / 4
    assert (ladder[1] / "model.onnx").is_file()


def test_a_refused_target_is_a_line_and_no_error(ladder):
    found, folder = ladder
    assert set(found.refused) == {"web"} and not (folder / "web").exists()
    lines = found.table()
    assert lines[-1]["rung"] == "web" and lines[-1]["computed by"].startswith("refused: ")
    assert all(line["rung"] in found._repr_html_() for line in lines)


def test_doors_know_their_targets(tmp_path):
    with pytest.raises(ExportError, match="'tflight' is not one of onnx, gguf, web"):
        export(torch.nn.Linear(2, 2), "tflight", tmp_path)


def test_the_door_verifies_again_what_it_wrote(tmp_path):
    model = tiny(qwen3_moe(), "int4-g16")
    result = export(model, "onnx", tmp_path / "m.onnx", check=False)
    assert not result.parity and verify(result, model).parity["cosine"] >= 0.9999
