"""Random models, small enough for a test, that the tests of the export targets share."""

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from edgelab import paths
from edgelab.compress import compress
from edgelab.model import load
from edgelab.recipe import Recipe

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def deepseek(layers=1):  # the last is the MoE layer; tracing takes seconds a layer
    return DeepseekV3Config(
        **SMALL, num_hidden_layers=layers, first_k_dense_replace=layers - 1, intermediate_size=96, num_key_value_heads=2,
        moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
        kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip


def qwen3(**changes):
    settings = SMALL | {
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    return Qwen3Config(**settings | changes)


def qwen3_moe():
    return Qwen3MoeConfig(
        **SMALL, num_hidden_layers=1, intermediate_size=96, num_key_value_heads=1, head_dim=16, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip


def tiny(config, scheme: str | None):
    """A random model, quantized. Biases and norms get values, so that dropping one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("norm.weight", "e_score_correction_bias", ".bias")):
            tensor.data += 0.2 * torch.randn_like(tensor)
    return compress(model, Recipe.uniform(scheme), progress=False).model if scheme else model


def one_layer_deepseek():
    """One layer, of experts; every weight has rows of 32 or more."""
    return DeepseekV3Config(
        **SMALL, num_hidden_layers=1, first_k_dense_replace=0, intermediate_size=96, num_key_value_heads=2, moe_intermediate_size=32,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=32, q_lora_rank=None,
        qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=32,
    )  # fmt: skip


def one_layer_qwen3(**changes):
    """One layer; embedding and head are one weight."""
    return qwen3(**{"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2} | changes)


def embedded(name: str):
    """An embedded model in int4-g32."""
    return compress(load(paths.data_dir() / name), Recipe.uniform("int4-g32"), progress=False).model


def other(model, name: str = "o_proj"):
    """`model` with one code changed: what the file holds is no longer its own."""
    layer = getattr(model.model.layers[0].self_attn, name)
    layer.packed[0, 0] ^= 1
    layer.forget_tiles()
    return model
