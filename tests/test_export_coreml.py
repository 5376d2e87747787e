"""The .mlpackage holds the model's own codes. It is not executed here: Core ML predicts on macOS only."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("coremltools", reason="the extra `coreml` is not installed")

from small_models import one_layer_deepseek, one_layer_qwen3, other, tiny

from edgelab.export import ExportError, written_at
from edgelab.export.coreml import export, verify


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("config, scheme", [(one_layer_deepseek, "int4-g32"), (one_layer_qwen3, "int8-row")])
def test_codes_are_in_the_package_bit_for_bit(config, scheme, precision, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path, length=16, precision=precision)
    assert [f.name for f in tmp_path.iterdir()] == ["model.mlpackage"]
    assert result.verified_by.startswith("converted, not executed") and not result.parity
    assert result.expert_share in (None, 1.0) and result.share > 0.97
    assert verify(written_at(result.files[0]), model).share == result.share
    with pytest.raises(ExportError, match=r"o_proj.weight .*: the codes in the package are not the model's"):
        verify(result, other(model))


@pytest.mark.slow
def test_what_is_no_package(tmp_path):
    model = tiny(one_layer_qwen3(), "int4-g32")
    result = export(model, tmp_path / "m.mlpackage", length=16)
    manifest = json.loads((result.files[0] / "Manifest.json").read_text())
    assert manifest
    (result.files[0] / "Manifest.json").write_text("{}")
    with pytest.raises(ExportError, match=r"m.mlpackage can't be read"):
        verify(result, model)
    with pytest.raises(ExportError, match="precision='int8' is not one of"):
        export(model, tmp_path, precision="int8")
    with pytest.raises(ExportError, match="is no package"):
        verify(replace(result, files=(tmp_path / "none",)), model)
