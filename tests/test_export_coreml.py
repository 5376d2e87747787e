"""The .mlpackage holds the model's own codes. It is not executed here: Core ML predicts on macOS only."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

pytest.importorskip("coremltools", reason="the extra `coreml` is not installed")

from edgelab.compress import compress
from edgelab.export import ExportError
from edgelab.export.coreml import export, verify
from edgelab.recipe import Recipe

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 128, "num_hidden_layers": 1}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "intermediate_size": 96}


def deepseek():  # one layer, of experts
    return DeepseekV3Config(
        **SMALL, first_k_dense_replace=0, num_key_value_heads=2, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=24,
        v_head_dim=32,
    )  # fmt: skip


def qwen3():  # embedding and head are one weight
    return Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)


def tiny(config, scheme: str | None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    return compress(model, Recipe.uniform(scheme), progress=False).model if scheme else model


def other(model, name: str = "o_proj"):
    """`model` with one code changed: what the file holds is no longer its own."""
    layer = getattr(model.model.layers[0].self_attn, name)
    layer.packed[0, 0] ^= 1
    layer.forget_tiles()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("config, scheme", [(deepseek, "int4-g32"), (qwen3, "int8-row")])
def test_codes_are_in_the_package_bit_for_bit(config, scheme, precision, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path, length=16, precision=precision)
    assert [f.name for f in tmp_path.iterdir()] == ["model.mlpackage"]
    assert result.verified_by.startswith("converted, not executed") and not result.parity
    assert result.expert_share in (None, 1.0) and result.share > 0.97
    with pytest.raises(ExportError, match=r"o_proj.weight .*: the codes in the package are not the model's"):
        verify(result, other(model))


@pytest.mark.slow
def test_what_is_no_package(tmp_path):
    model = tiny(qwen3(), "int4-g32")
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
