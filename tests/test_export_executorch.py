"""The .pte file holds the model's own codes, and ExecuTorch computes with them what torch computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

pytest.importorskip("executorch", reason="the extra `executorch` is not installed")

from edgelab import paths
from edgelab.compress import compress
from edgelab.export import ExportError
from edgelab.export.executorch import export, verify
from edgelab.model import load
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


def embedded(name: str):
    return compress(load(paths.data_dir() / name), Recipe.uniform("int4-g32"), progress=False).model


def other(model, name: str = "o_proj"):
    """`model` with one code changed: what the file holds is no longer its own."""
    layer = getattr(model.model.layers[0].self_attn, name)
    layer.packed[0, 0] ^= 1
    layer.forget_tiles()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("config, scheme", [(deepseek, "int4-g32"), (qwen3, "int8-row"), (qwen3, "int3-g16"), (qwen3, None)])
def test_exact_files_compute_what_torch_computes(config, scheme, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path, length=96)
    assert result.files == (tmp_path / "model.pte",) and [f.name for f in tmp_path.iterdir()] == ["model.pte"]
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.expert_share in (None, 1.0) and (scheme is None or result.share > 0.97)


@pytest.mark.slow
def test_prompt_and_steps_over_the_same_weights(tmp_path):
    model = tiny(deepseek(), "int4-g32")
    result = export(model, tmp_path / "steps.pte", length=32, places=64)
    assert result.parity["cosine"] >= 0.9999 and "24 + 64 tokens" in result.verified_by
    with pytest.raises(ExportError, match=r"codes of .*o_proj.weight .* or they changed"):
        verify(result, other(model))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_dynamic_files_run_and_say_what_they_cost(scheme, tmp_path):
    model = tiny(qwen3(), scheme)
    result = export(model, tmp_path / "fast.pte", length=96, mode="dynamic")
    assert result.share > 0.97 and 0.98 <= result.parity["cosine"] < 0.999999 and "XNNPACK" in result.verified_by
    with pytest.raises(ExportError, match=r"no product of XNNPACK reads the codes and scales of .*o_proj.weight"):
        verify(result, other(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge-dense", "edge-moe"])
def test_embedded_models(name, tmp_path):
    result = export(embedded(name), tmp_path / "m.pte")
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99 and result.expert_share in (None, 1.0)
