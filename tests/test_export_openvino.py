"""The OpenVINO files hold the model's own codes, and OpenVINO computes with them what torch computes."""

import sys

import pytest

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

from small_models import embedded, one_layer_deepseek, one_layer_qwen3, other, tiny

from edgelab.export import ExportError, written_at
from edgelab.export.openvino import export, verify


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, scheme",
    [(one_layer_deepseek, "int4-g32"), (one_layer_qwen3, "int4-g32"), (one_layer_qwen3, "int8-row"), (one_layer_qwen3, None)],
)
def test_files_compute_what_torch_computes(config, scheme, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.expert_share in (None, 1.0) and (scheme is None or result.share > 0.97)
    again = verify(written_at(result.files[0]), model)
    assert (again.share, again.files, again.bytes) == (result.share, result.files, result.bytes) and again.parity == result.parity
    if scheme:
        with pytest.raises(ExportError, match=r"o_proj.weight .*: the codes in the file are not the model's"):
            verify(result, other(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge-dense", "edge-moe"])
def test_embedded_models(name, tmp_path):
    result = export(embedded(name), tmp_path / "m.xml")
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99 and result.expert_share in (None, 1.0)


def test_nothing_is_reported_to_anybody():
    from edgelab.export.openvino import _needed

    openvino = _needed()
    assert "Telemetry" in vars(openvino.tools.ovc.telemetry_stub)
    for name in ("convert_impl", "telemetry_utils", "utils"):
        assert vars(sys.modules[f"openvino.tools.ovc.{name}"])["tm"].__name__.endswith("telemetry_stub")
