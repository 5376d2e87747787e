"""The OpenVINO files hold the model's own codes, and OpenVINO computes with them what torch computes."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

pytest.importorskip("openvino", reason="the extra `openvino` is not installed")

from edgelab import paths
from edgelab.compress import compress
from edgelab.export import ExportError
from edgelab.export.openvino import export, verify
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
@pytest.mark.parametrize("config, scheme", [(deepseek, "int4-g32"), (qwen3, "int4-g32"), (qwen3, "int8-row"), (qwen3, None)])
def test_files_compute_what_torch_computes(config, scheme, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.expert_share in (None, 1.0) and (scheme is None or result.share > 0.97)
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
