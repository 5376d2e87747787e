"""The GGUF file holds the model's own codes, and llama.cpp computes with them what torch computes."""

import errno
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from edgelab import paths
from edgelab.compress import compress
from edgelab.export import ExportError
from edgelab.export.gguf import _rounded_inputs, export, verify
from edgelab.export.gguf_file import F16, F32, MXFP4, Q2_0, Q4_0, Q4_1, Q8_0, blocks, read, unblock, write
from edgelab.export.gguf_metadata import TEXTS, nearest_pre_tokenizer
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import load, load_tokenizer, quantized, swap, weights
from edgelab.recipe import Recipe
from edgelab.scheme import ActScheme, QuantScheme

in_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="the extra `gguf` (llama-cpp-python) is not installed")

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256, "num_hidden_layers": 2}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "intermediate_size": 96}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def deepseek(**changes):
    settings = SMALL | ROUTED | {
        "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16,
        "routed_scaling_factor": 1.5,
    }  # fmt: skip
    return DeepseekV3Config(**settings | changes)


def deepseek_v2(**changes):
    settings = SMALL | ROUTED | {
        "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 32,
        "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16, "head_dim": 8, "topk_method": "greedy",
    }  # fmt: skip
    return DeepseekV2Config(**settings | changes)


def llama(**changes):
    return LlamaConfig(**SMALL | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False} | changes)


def qwen2(**changes):
    return Qwen2Config(**SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True} | changes)


def qwen3(**changes):
    return Qwen3Config(**SMALL | {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True} | changes)


def qwen3_moe(**changes):
    settings = {"num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "norm_topk_prob": True}
    return Qwen3MoeConfig(**SMALL | ROUTED | settings | changes)


def tiny(config, scheme: str | None = None):
    """A random model, quantized. Biases and norms get values, so that dropping one shows; projections are large enough for
    attention and routing to matter (with transformers' 0.02 any rotary base gives the same logits)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("norm.weight", "e_score_correction_bias", ".bias")):
            tensor.data += 0.2 * torch.randn_like(tensor)
        elif tensor.ndim > 1:
            tensor.data.normal_(0, 1.5 / tensor.shape[-1] ** 0.5)
    if scheme:
        s = QuantScheme.parse(scheme)
        swap(model, {w.name: round_to_nearest(w.tensor, s) for w in weights(model) if w.kind != "router" and not w.tied_to})
    return model


def decoded(path) -> dict[str, np.ndarray]:
    """Every tensor of the file as float32, by ggml's own Python code."""
    gguf = pytest.importorskip("gguf", reason="the extra `test` is not installed")
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        shape = tuple(reversed(t.shape.tolist()))
        found[t.name] = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(shape)
    return found


# ------------------------------------------------------------------------------------------------- the file's format


@pytest.mark.parametrize("kind, scheme", [(Q4_0, "int4-g32"), (Q4_1, "uint4-g32"), (Q8_0, "int8-g32"), (MXFP4, "mxfp4-g32")])
def test_blocks_are_ggmls_own(kind, scheme):
    gguf = pytest.importorskip("gguf", reason="the extra `test` is not installed")
    q = round_to_nearest(torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), QuantScheme.parse(scheme))
    raw = blocks(kind, q.codes(), q.scales, q.offsets)
    assert raw.shape == (6, kind.row_bytes(128))
    assert np.array_equal(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number)), q.dequantize())
    for ours, theirs in zip((q.codes(), q.scales, q.offsets), unblock(kind, raw), strict=True):
        assert (ours is None and theirs is None) or ours.tobytes() == theirs.tobytes()


def test_two_bits_are_q2_0_with_the_sign_turned():
    q = round_to_nearest(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), QuantScheme.parse("int2-g64"))
    raw = blocks(Q2_0, q.codes(), q.scales)
    codes, scales, _ = unblock(Q2_0, raw)
    assert np.array_equal(codes, q.codes()) and scales.tobytes() == q.scales.tobytes()
    # ggml-quants.c, dequantize_row_q2_0: ((qs[j / 4] >> 2 * (j % 4)) & 3) - 1, times d
    blocked = raw.reshape(3, 2, 18)
    d = np.ascontiguousarray(blocked[..., :2]).view(np.float16).astype(np.float32)
    j = np.arange(64)
    values = ((blocked[..., 2 + j // 4] >> (2 * (j % 4)).astype(np.uint8) & 3).astype(np.float32) - 1) * d
    assert np.array_equal(values.reshape(3, 128), q.dequantize())


def test_what_is_written_is_read_back_and_by_ggmls_reader(tmp_path):
    metadata = {"general.architecture": "llama", "n": 7, "x": 0.5, "yes": True, "words": ["a", "größer", ""], "types": [1, 3]}
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(8, dtype=np.float16).reshape(2, 2, 2)
    path = tmp_path / "m.gguf"
    write(path, metadata, [("a", F32, (2, 3), iter([a])), ("b", F16, (2, 2, 2), iter(b))])
    again, tensors = read(path)
    assert again == metadata
    assert np.array_equal(tensors["a"].values(), a) and np.array_equal(tensors["b"].values(), b)
    assert all(t.offset % 32 == 0 for t in tensors.values())
    gguf = pytest.importorskip("gguf", reason="the extra `test` is not installed")
    reader = gguf.GGUFReader(path)
    assert {k: reader.get_field(k).contents() for k in metadata} == metadata
    assert np.array_equal(reader.tensors[0].data, a) and np.array_equal(reader.tensors[1].data, b)


@pytest.mark.parametrize("cut", [0, 3, 40, 300, -1])
def test_damaged_files_are_refused(cut, tmp_path):
    whole = export(tiny(qwen3(), "int4-g32"), tmp_path / "m.gguf", check=False).files[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:cut])
    with pytest.raises(ExportError, match=r"cut.gguf is (no GGUF file|cut short)"):
        read(tmp_path / "cut.gguf")
    (tmp_path / "odd.gguf").write_bytes(whole[:4] + b"\x02" + whole[5:])
    with pytest.raises(ExportError, match=r"odd.gguf is GGUF version 2; this reads version 3"):
        read(tmp_path / "odd.gguf")


# ---------------------------------------------------------------------------------------------- what is in the file


def test_every_value_is_the_models_and_codes_are_bit_for_bit(tmp_path):
    model = tiny(deepseek(), "int4-g32")
    result = export(model, tmp_path / "moe.gguf", check=False)
    metadata, stored = read(result.files[0])
    values = decoded(result.files[0])
    experts = model.model.layers[1].mlp.experts.qtensors()
    names = {
        "ffn_gate_exps": ("gate_up_proj", slice(0, 32)),
        "ffn_up_exps": ("gate_up_proj", slice(32, 64)),
        "ffn_down_exps": ("down_proj", slice(None)),
    }
    for name, (parameter, rows) in names.items():
        held = stored[f"blk.1.{name}.weight"]
        codes, scales, _ = unblock(Q4_0, held.data)
        q = experts[parameter]
        assert codes.tobytes() == q.codes()[:, rows].tobytes() and scales.tobytes() == np.ascontiguousarray(q.scales[:, rows]).tobytes()
        assert np.array_equal(values[f"blk.1.{name}.weight"], q.dequantize()[:, rows])
    plain = {
        "token_embd": model.model.embed_tokens, "output": model.lm_head, "blk.0.attn_kv_b": model.model.layers[0].self_attn.kv_b_proj,
        "blk.0.ffn_down": model.model.layers[0].mlp.down_proj, "blk.1.ffn_up_shexp": model.model.layers[1].mlp.shared_experts.up_proj,
    }  # fmt: skip
    for name, layer in plain.items():
        assert np.array_equal(values[f"{name}.weight"], layer.qtensors()["weight"].dequantize()), name
        assert np.array_equal(stored[f"{name}.weight"].values(), values[f"{name}.weight"])
    gate = model.model.layers[1].mlp.gate
    assert np.array_equal(values["blk.1.ffn_gate_inp.weight"], gate.weight.detach()) and stored["blk.1.ffn_gate_inp.weight"].kind is F32
    assert np.array_equal(values["blk.1.exp_probs_b.bias"], gate.e_score_correction_bias)
    assert np.array_equal(values["output_norm.weight"], model.model.norm.weight.detach())
    wanted = {"expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": 1.5, "expert_group_count": 2}
    wanted |= {"expert_group_used_count": 1, "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 16}
    assert {k: metadata[f"deepseek2.{k}"] for k in wanted} == wanted


def test_llama_rows_are_permuted_and_codes_move_with_them(tmp_path):
    model = tiny(llama(), "int4-g32")
    _, stored = read(export(model, tmp_path / "m.gguf", check=False).files[0])
    q = model.model.layers[0].self_attn.q_proj.qtensors()["weight"]
    codes, scales, _ = unblock(Q4_0, stored["blk.0.attn_q.weight"].data)
    at = [32 * head + half * 16 + i for head in range(2) for i in range(16) for half in range(2)]  # 2i, 2i + 1 come from i, i + 16
    assert np.array_equal(codes, q.codes()[at]) and not np.array_equal(codes, q.codes())
    assert scales.tobytes() == q.scales[at].tobytes()
    bias = model.model.layers[0].self_attn.q_proj.bias.detach().numpy()
    assert np.array_equal(stored["blk.0.attn_q.bias"].values(), bias[at])
    v = model.model.layers[0].self_attn.v_proj.qtensors()["weight"]
    assert np.array_equal(unblock(Q4_0, stored["blk.0.attn_v.weight"].data)[0], v.codes())


@pytest.mark.parametrize("mla", ["whole", "latent"])
def test_latent_attention_in_both_layouts(mla, tmp_path):
    model = tiny(deepseek(), "int4-g32")
    result = export(model, tmp_path / "m.gguf", mla=mla, check=False)
    metadata, stored = read(result.files[0])
    q = model.model.layers[0].self_attn.kv_b_proj.qtensors()["weight"]  # [2 * (24 + 16), 32]
    if mla == "whole":
        assert stored["blk.0.attn_kv_b.weight"].kind is Q4_0
        assert result.weights_quantized == sum(
            q.packed.shape[0] * q.shape[-1] if q.packed.ndim == 2 else np.prod(q.shape) for _, q in quantized(model).values()
        )
        assert "deepseek2.attention.key_length_mla" not in metadata
        assert "caches 96 numbers per token and layer (whole 96, latent 40)" in " ".join(result.notes)
        return
    split = q.dequantize().reshape(2, 40, 32)
    keys, values = stored["blk.0.attn_k_b.weight"], stored["blk.0.attn_v_b.weight"]
    assert keys.shape == (2, 32, 24) and np.array_equal(keys.values(), split[:, :24].transpose(0, 2, 1))
    assert values.shape == (2, 16, 32) and values.kind is Q4_0
    assert np.array_equal(unblock(Q4_0, values.data)[0], q.codes().reshape(2, 40, 32)[:, 24:].reshape(32, 32))
    assert metadata["deepseek2.attention.head_count_kv"] == 1 and metadata["deepseek2.attention.key_length"] == 32 + 8
    assert f"{2 * 2 * 24 * 32:,} weights of kv_b_proj are transposed and left their codes: F32" in " ".join(result.notes)


@pytest.mark.parametrize(
    "scheme, kind", [("int4-g64", Q4_0), ("int4-row", Q4_0), ("int4-tensor", Q4_0), ("int3-g32", Q4_0), ("int8-row", Q8_0),
                     ("int8-g64", Q8_0),                     ("uint3-g64", Q4_1), ("uint4-g32", Q4_1), ("mxfp4-g32", MXFP4)],
)  # fmt: skip
def test_what_has_a_home_goes_out_with_the_same_values(scheme, kind, tmp_path):
    model = tiny(qwen3(intermediate_size=128, num_attention_heads=4), scheme)
    result = export(model, tmp_path / "m.gguf", check=False)
    _, stored = read(result.files[0])
    values = decoded(result.files[0])
    for i, layer in enumerate(model.model.layers):
        q = layer.mlp.down_proj.qtensors()["weight"]
        assert stored[f"blk.{i}.ffn_down.weight"].kind is kind
        assert np.array_equal(values[f"blk.{i}.ffn_down.weight"], q.dequantize())
    assert result.weights_quantized == sum(int(np.prod(q.shape)) for _, q in quantized(model).values())


def test_two_bits_in_groups_of_64_stay_two_bits_unless_portable(tmp_path):
    model = tiny(qwen3(intermediate_size=128, num_attention_heads=4), "int2-g64")
    small, wide = (export(model, tmp_path / f"{p}.gguf", portable=p, check=False) for p in (False, True))
    for result, kind in ((small, Q2_0), (wide, Q4_0)):
        _, stored = read(result.files[0])
        held = stored["blk.0.ffn_up.weight"]
        assert held.kind is kind and np.array_equal(held.values(), model.model.layers[0].mlp.up_proj.qtensors()["weight"].dequantize())
    assert small.predicted_bytes < 0.6 * wide.predicted_bytes
    assert "Q2_0" in " ".join(small.notes) and "the same values" in " ".join(wide.notes)


def test_experts_in_several_schemes_become_one_type(tmp_path):
    model = tiny(qwen3_moe())
    codes, stacks = {}, [w for w in weights(model) if w.kind == "experts"]
    for w in stacks:
        for e, scheme in enumerate(("int4-g32", "int3-g32", "int2-g32", "int4-row")):
            codes[f"{w.name}#{e}"] = round_to_nearest(w.tensor[e], QuantScheme.parse(scheme))
    swap(model, codes)
    result = export(model, tmp_path / "m.gguf", check=False)
    _, stored = read(result.files[0])
    assert result.expert_share == 1.0 and stored["blk.0.ffn_down_exps.weight"].kind is Q4_0
    for e, q in enumerate(model.model.layers[0].mlp.experts.qtensors()["down_proj"]):
        assert np.array_equal(stored["blk.0.ffn_down_exps.weight"].values()[e], q.dequantize())
    codes |= {f"{w.name}#0": round_to_nearest(w.tensor[0], QuantScheme.parse("int8-g32")) for w in stacks}
    model = tiny(qwen3_moe())
    swap(model, codes)
    _, stored = read(export(model, tmp_path / "m.gguf", check=False).files[0])
    assert stored["blk.0.ffn_up_exps.weight"].kind is Q8_0
    assert np.array_equal(
        stored["blk.0.ffn_up_exps.weight"].values()[2], codes["model.layers.0.mlp.experts.gate_up_proj#2"].dequantize()[32:]
    )


def test_a_tied_pair_is_in_the_file_once_and_counted_once(tmp_path):
    model = tiny(qwen3(), "int4-g32")
    result = export(model, tmp_path / "m.gguf", check=False)
    _, stored = read(result.files[0])
    assert "output.weight" not in stored and stored["token_embd.weight"].kind is Q4_0
    floats = sum(p.numel() for p in model.parameters())
    assert result.weights_total == floats + result.weights_quantized


def test_floats_are_float16_only_where_nothing_is_lost(tmp_path):
    model = tiny(qwen3())
    up, down = model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.down_proj.weight
    up.data = up.data.half().float()
    _, stored = read(export(model, tmp_path / "m.gguf", check=False).files[0])
    assert stored["blk.0.ffn_up.weight"].kind is F16 and np.array_equal(stored["blk.0.ffn_up.weight"].values(), up.detach())
    assert stored["blk.0.ffn_down.weight"].kind is F32 and np.array_equal(stored["blk.0.ffn_down.weight"].values(), down.detach())
    result = export(model, tmp_path / "half.gguf", halve=True, check=False)
    _, stored = read(result.files[0])
    assert stored["blk.0.ffn_down.weight"].kind is F16 and stored["blk.0.attn_norm.weight"].kind is F32
    assert "were rounded to float16" in " ".join(result.notes)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "config, scheme, message",
    [
        (qwen3, "nf4-g32", r"model.embed_tokens is nf4-g32; no type of GGUF has these levels.* int4-g32"),
        (qwen3, "uint8-row", r"uint8-row; no type of GGUF"),
        (qwen3, "int4-g16", r"int4-g16: a group of 16 weights is no multiple of 32, the block of Q4_0; use groups of 32, 64 or 128"),
        (lambda: qwen3(intermediate_size=80), "int8-row", r"layers.0.mlp.down_proj is int8-row: a row of 80 weights is no multiple of 32"),
        (lambda: qwen3_moe(norm_topk_prob=False), None, r"norm_topk_prob=False: llama.cpp's qwen3moe always"),
        (lambda: qwen3_moe(mlp_only_layers=[0]), None, r"mlp_only_layers=\[0\]"),
        (lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=0), None, r"sliding_window=8: llama.cpp's qwen2 att"),
        (lambda: qwen3(hidden_act="gelu"), None, r"hidden_act='gelu'"),
        (lambda: qwen3(attention_bias=True), None, r"o_proj.bias: llama.cpp's architecture qwen3 reads no bias there"),
        (lambda: deepseek_v2(topk_method="group_limited_greedy", n_group=2, topk_group=1), None, r"topk_method='group_limited_greedy'"),
        (lambda: MixtralConfig(**SMALL, num_key_value_heads=1), None, r"model_type='mixtral' is not one .* deepseek_v2, deepseek_v3, ll"),
        (lambda: qwen3(rope_parameters=YARN | {"attention_factor": 1.3}), None, r"yarn with .*'attention_factor': 1.3"),
        (lambda: llama(rope_parameters=YARN | {"beta_fast": 16.0}), None, r"yarn with .*'beta_fast': 16.0.* llama.cpp reads beta_fast=32"),
        (lambda: deepseek(rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}), None, r"mscale that equals mscale_all_dim"),
        (lambda: qwen3(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), None, r"rope_type='dynamic'"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_no_place_for_is_refused_at_the_door(config, scheme, message, tmp_path):
    model = tiny(config(), scheme)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "m.gguf", check=False)
    assert not list(tmp_path.iterdir())


def test_rounded_inputs_and_wrong_options_are_refused_at_the_door(tmp_path):
    model = tiny(qwen3(), "int8-row")
    with pytest.raises(ExportError, match="mla='half' is not one of whole, latent"):
        export(model, tmp_path / "m.gguf", mla="half", check=False)
    with pytest.raises(ExportError, match="Linear has no language-model head"):
        export(torch.nn.Linear(2, 2), tmp_path / "m.gguf", check=False)
    model.model.layers[0].mlp.down_proj.round_input_of("weight", ActScheme.parse("a8-token"))
    with pytest.raises(ExportError, match=r"model.layers.0.mlp.down_proj \(int8-row\) rounds its input to a8-token, which this target"):
        export(model, tmp_path / "m.gguf", check=False)
    assert not list(tmp_path.iterdir())


def test_a_weight_without_a_place_is_named(tmp_path):
    model = tiny(qwen3())
    model.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.extra.weight has no place in llama.cpp's architecture qwen3"):
        export(model, tmp_path / "m.gguf", check=False)


def test_without_llama_cpp_the_file_is_written_and_verification_names_the_extra(tmp_path, monkeypatch):
    model = tiny(qwen3(), "int4-g32")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ExportError, match=r"llama-cpp-python is not installed.*edgelab\[gguf\].*check=False"):
        export(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    result = export(model, tmp_path, check=False)
    assert result.files == (tmp_path / "model.gguf",) and result.verified_by == "" and not result.parity
    with pytest.raises(ExportError, match=r"edgelab\[gguf\]"):
        verify(result, model)


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_the_embedded_tokenizer_in_the_file(tmp_path):
    folder = paths.data_dir() / "edge-dense"
    tokenizer = load_tokenizer(folder)
    result = export(folder, tmp_path / "m.gguf", check=False)
    metadata, _ = read(result.files[0])
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens == tokenizer.convert_ids_to_tokens(range(len(tokenizer))) and len(tokens) == 2048
    assert [t for t, kind in zip(tokens, types, strict=True) if kind == 3] == ["<|end|>", "<|pad|>", "<|user|>", "<|call|>"]
    assert metadata["tokenizer.ggml.bos_token_id"] == 0 and metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
    merged = [m.replace(" ", "") for m in metadata["tokenizer.ggml.merges"]]
    assert set(merged) <= set(tokens) and len(merged) > 1500
    assert metadata["tokenizer.ggml.pre"] == nearest_pre_tokenizer(tokenizer) == "smollm"


def test_a_tokenizer_of_another_model_or_kind_is_refused(tmp_path):
    tokenizer = load_tokenizer(paths.data_dir() / "edge-dense")
    with pytest.raises(ExportError, match="ids up to 2047; the model has 96 rows"):
        export(tiny(qwen3()), tmp_path / "m.gguf", tokenizer=tokenizer, check=False)
    with pytest.raises(ExportError, match="pre='mine' is not one of smollm, gpt-2"):
        export(tiny(qwen3(vocab_size=2100)), tmp_path / "m.gguf", tokenizer=tokenizer, pre="mine", check=False)
    metadata, _ = read(export(tiny(qwen3(vocab_size=2100)), tmp_path / "m.gguf", tokenizer=tokenizer, check=False).files[0])
    assert metadata["tokenizer.ggml.tokens"][2048:2050] == ["[PAD2048]", "[PAD2049]"]
    with pytest.raises(ExportError, match="object is no byte-level BPE tokenizer"):
        export(tiny(qwen3()), tmp_path / "m.gguf", tokenizer=object(), check=False)


# ------------------------------------------------------------------------------------------------------- llama.cpp


@in_llama_cpp
@pytest.mark.parametrize(
    "config, scheme, options",
    [
        (llama(), "int4-g32", {}),
        (llama(rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 32}, mlp_bias=True), None, {}),
        (qwen2(intermediate_size=128), "int4-g64", {}),
        (qwen2(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), None, {}),
        (qwen3(intermediate_size=128, num_attention_heads=4), "int2-g64", {}),
        (qwen3(), "uint4-g32", {}),
        (qwen3(), "mxfp4-g32", {}),
        (qwen3_moe(), "int8-g32", {}),
        (qwen3_moe(tie_word_embeddings=True), "int3-g32", {}),
        (deepseek(), "int4-g32", {"mla": "whole"}),
        (deepseek(), "int4-g32", {"mla": "latent"}),
        (deepseek(rope_interleave=False, q_lora_rank=32, n_group=1, norm_topk_prob=False), "int8-row", {}),
        (deepseek(rope_interleave=False), None, {"mla": "latent"}),
        (deepseek(first_k_dense_replace=2), "int4-g32", {}),
        (deepseek_v2(), None, {}),
        (qwen3(rope_parameters=YARN), None, {}),
        (llama(rope_parameters=YARN), None, {}),
        (deepseek(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}), None, {"mla": "latent"}),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "model_type", None),
)  # fmt: skip
def test_llama_cpp_agrees_with_torch(config, scheme, options, tmp_path):
    model = tiny(config, scheme)
    result = export(model, tmp_path / "m.gguf", **options)
    assert result.parity["cosine"] >= 0.999999 and result.parity["top1_agreement"] >= 0.99
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    told = " ".join(result.notes)
    assert "of 24 tokens the same" in told
    assert ("as the file runs" in told) == (scheme is not None)
    assert result.verified_by.startswith("llama.cpp (llama-cpp-python ")


@in_llama_cpp
def test_wrong_metadata_is_caught_by_the_logits(tmp_path):
    model = tiny(llama(), "int4-g32")
    result = export(model, tmp_path / "m.gguf", check=False)
    metadata, stored = read(result.files[0])
    wrong = tmp_path / "wrong.gguf"
    write(wrong, metadata | {"llama.rope.freq_base": 100.0}, [(t.name, t.kind, t.shape, iter([t.data])) for t in stored.values()])
    with pytest.raises(ExportError, match=r"logits of wrong.gguf in llama.cpp .* to torch's .*; 0.9999 and 99% are asked for"):
        verify(replace(result, files=(wrong,)), model)
    bare = {k: v for k, v in metadata.items() if k != "llama.block_count"}
    write(wrong, bare, [(t.name, t.kind, t.shape, iter([t.data])) for t in stored.values()])
    with pytest.raises(ExportError, match=r"llama.cpp refuses wrong.gguf: .*llama.block_count"):
        verify(replace(result, files=(wrong,)), model)
    assert verify(result, model).parity["cosine"] > 0.999999


@in_llama_cpp
def test_a_failed_verification_leaves_what_was_there(tmp_path, monkeypatch):
    import edgelab.export.gguf as target

    (tmp_path / "m.gguf").write_text("before")
    monkeypatch.setattr(target.verify, "__kwdefaults__", target.verify.__kwdefaults__ | {"min_cosine": 1.1})
    with pytest.raises(ExportError, match=r"1.1 and 99% are asked for"):
        export(tiny(qwen3(), "int4-g32"), tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, where, message",
    [
        ("blk.0.ffn_down.weight", 5, r"blk.0.ffn_down.weight: the codes in the file are not those of model.layers.0.mlp.down_proj.weight"),
        ("blk.1.ffn_up_exps.weight", 18 * 2 * 32 * 3, r"blk.1.ffn_up_exps.weight\[3\]: the scales in the file"),
        ("output_norm.weight", 1, r"output_norm.weight: the values in the file are not those of model.norm.weight"),
    ],
)  # fmt: skip
def test_one_changed_byte_is_found(name, where, message, tmp_path):
    model = tiny(deepseek(), "int4-g32")
    result = export(model, tmp_path / "m.gguf", check=False)
    _, stored = read(result.files[0])
    data = bytearray(result.files[0].read_bytes())
    data[stored[name].offset + where] ^= 1
    result.files[0].write_bytes(bytes(data))
    with pytest.raises(ExportError, match=message):
        verify(result, model)


def test_a_lost_weight_is_found(tmp_path):
    model = tiny(qwen3(), "int4-g32")
    result = export(model, tmp_path / "m.gguf", check=False)
    metadata, stored = read(result.files[0])
    name, other = "blk.1.attn_k.weight", replace(result, files=(tmp_path / "other.gguf",))
    kept = {n: (n, t.kind, t.shape, [t.data]) for n, t in stored.items()}
    write(other.files[0], metadata, [(*t[:3], iter(t[3])) for n, t in kept.items() if n != name])
    with pytest.raises(ExportError, match=r"other\.gguf lacks blk\.1\.attn_k\.weight"):
        verify(other, model)
    kept[name] = (name, F32, stored[name].shape, [stored[name].values()])
    write(other.files[0], metadata, [(*t[:3], iter(t[3])) for t in kept.values()])
    with pytest.raises(ExportError, match=r"attn_k\.weight is F32 \(16, 64\); model\.layers\.1\.self_attn\.k_proj\.weight is Q4_0"):
        verify(other, model)


def test_rounding_inputs_leaves_the_model_as_it_was():
    model, ids = tiny(deepseek(), "int4-g32"), np.arange(20)
    with torch.no_grad():
        before = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        with _rounded_inputs(model) as run:
            rounded = run(ids)
        after = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    off = np.linalg.norm(rounded - before) / np.linalg.norm(before)
    assert np.array_equal(before, after) and 1e-3 < off < 0.2  # half a percent of each layer's output


# ------------------------------------------------------------------------------------------------ embedded models


@pytest.mark.parametrize("name", ["edge-moe", "edge-dense"])
def test_embedded_models_meet_the_bars(name, tmp_path):
    folder = paths.data_dir() / name
    tokenizer = load_tokenizer(folder)
    model = compress(load(folder), Recipe.uniform("int4-g32"), progress=False).model
    here = find_spec("llama_cpp") is not None
    result = export(model, tmp_path / "m.gguf", tokenizer=tokenizer, check=here)
    coded = {w: q for w, (_, q) in quantized(model).items()}
    linears = sum(int(np.prod(q.shape)) for q in coded.values())
    assert result.weights_quantized == linears and result.share > 0.99  # the rest: norms and routers
    assert result.expert_share == (1.0 if name == "edge-moe" else None)
    _, stored = read(result.files[0])
    assert sum(int(np.prod(t.shape)) for t in stored.values() if t.kind is Q4_0) == linears
    assert result.predicted_bytes <= result.bytes <= 1.03 * result.predicted_bytes
    if not here:
        return
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.parity["as_run_cosine"] >= (0.998 if name == "edge-moe" else 0.9999)
    assert result.parity["as_run_top1_agreement"] >= (0.95 if name == "edge-moe" else 0.99)
    told = " ".join(result.notes)
    assert "24 of 24 tokens the same" in told and f"13 of {len(TEXTS)} texts become the same ids (pre-tokenizer smollm)" in told


@in_llama_cpp
def test_the_phone_bundle_answers_in_llama_cpp(tmp_path):
    import llama_cpp

    folder = paths.data_dir() / "edge-phone"
    result = export(folder, tmp_path / "phone.gguf")
    assert result.parity["cosine"] >= 0.9999 and result.expert_share == 1.0
    assert "Q2_0" in result.notes[0]
    llama = llama_cpp.Llama(str(result.files[0]), n_ctx=128, n_threads=1, verbose=False)
    try:
        answer = llama.create_chat_completion([{"role": "user", "content": "set a timer for 5 minutes"}], max_tokens=40, temperature=0.0)
    finally:
        llama.close()
    assert "timer" in answer["choices"][0]["message"]["content"]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    import edgelab.export.gguf_file as target

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target.os, "fsync", full)
    with pytest.raises(ExportError, match=r"no space left on device; nothing was left there"):
        export(tiny(qwen3(), "int4-g32"), tmp_path / "m.gguf", check=False)
    assert not list(tmp_path.iterdir())


def test_a_damaged_header_is_an_export_error(tmp_path):
    """Any changed byte of the header is refused, or changes what is read; it never ends in another kind of error."""
    whole = export(tiny(qwen3(num_hidden_layers=1)), tmp_path / "m.gguf", check=False).files[0].read_bytes()
    _, tensors = read(tmp_path / "m.gguf")
    begin, damaged, refused = min(t.offset for t in tensors.values()), tmp_path / "d.gguf", 0
    for at in range(4, begin, 7):
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            read(damaged)
        except ExportError:
            refused += 1
    assert refused > 50
