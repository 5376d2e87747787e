"""The .pte file holds the model's own codes, and ExecuTorch computes with them what torch computes."""

import pytest

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")

from small_models import embedded, one_layer_deepseek, one_layer_qwen3, other, tiny

from edgelab.export import ExportError, written_at
from edgelab.export.executorch import export, verify


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, scheme",
    [(one_layer_deepseek, "int4-g32"), (one_layer_qwen3, "int8-row"), (one_layer_qwen3, "int3-g16"), (one_layer_qwen3, None)],
)
def test_exact_files_compute_what_torch_computes(config, scheme, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path, length=96)
    assert result.files == (tmp_path / "model.pte",) and [f.name for f in tmp_path.iterdir()] == ["model.pte"]
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.expert_share in (None, 1.0) and (scheme is None or result.share > 0.97)
    again = verify(written_at(result.files[0]), model)
    assert (again.share, again.files, again.bytes) == (result.share, result.files, result.bytes) and again.parity == result.parity


@pytest.mark.slow
def test_prompt_and_steps_over_the_same_weights(tmp_path):
    model = tiny(one_layer_deepseek(), "int4-g32")
    result = export(model, tmp_path / "steps.pte", length=32, places=64)
    assert result.parity["cosine"] >= 0.9999 and "24 + 64 tokens" in result.verified_by
    with pytest.raises(ExportError, match=r"codes of .*o_proj.weight .* or they changed"):
        verify(result, other(model))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_dynamic_files_run_and_say_what_they_cost(scheme, tmp_path):
    model = tiny(one_layer_qwen3(), scheme)
    result = export(model, tmp_path / "fast.pte", length=96, mode="dynamic")
    assert result.share > 0.97 and 0.98 <= result.parity["cosine"] < 0.999999 and "XNNPACK" in result.verified_by
    with pytest.raises(ExportError, match=r"no product of XNNPACK reads the codes and scales of .*o_proj.weight"):
        verify(result, other(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge-dense", "edge-moe"])
def test_embedded_models(name, tmp_path):
    result = export(embedded(name), tmp_path / "m.pte")
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99 and result.expert_share in (None, 1.0)
