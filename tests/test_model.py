"""Walking, swapping and loading, on a tiny random model of every family and on modules that are no language model."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

from edgelab import layers
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import FAMILIES, Family, dequantize, load, load_tokenizer, quantized, stored_tensors, swap, unknown_experts, weights
from edgelab.recipe import ROLES
from edgelab.scheme import QuantScheme

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**BASE, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**BASE, head_dim=8, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=8, decoder_sparse_step=1, mlp_only_layers=[0]),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**BASE, **EXPERTS, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "mixtral": lambda: transformers.MixtralConfig(**BASE, **LOCAL_EXPERTS),
    "olmoe": lambda: transformers.OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**BASE, **LOCAL_EXPERTS),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **(BASE | {"num_key_value_heads": 4}), n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, num_nextn_predict_layers=0,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **BASE, **LOCAL_EXPERTS, head_dim=8, layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():  # transformers starts routers, biases and sinks at zero or empty: make all matter
        for p in model.parameters():
            if not p.isfinite().all() or p.ndim >= 2 or p.abs().max() == 0:
                p.normal_(0, 0.1)
    return model


IDS = torch.arange(40).reshape(2, 20) % 96


def test_every_family_of_the_table_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_account_for_every_parameter(family):
    model = tiny(family)
    listed = weights(model)
    own = {w.parameter_name: w for w in listed if not w.tied_to}
    rest = {n: p for n, p in model.named_parameters() if n not in own}
    assert sum(w.tensor.numel() for w in own.values()) + sum(p.numel() for p in rest.values()) == sum(p.numel() for p in model.parameters())
    # what is left over is no matrix: norms, biases, attention sinks
    assert not [n for n, p in rest.items() if p.ndim >= 2 and not n.endswith("bias")]
    assert {w.role for w in listed} <= set(ROLES)
    assert len({w.name for w in listed}) == len(listed)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert set(linears) <= {w.module_name for w in listed}
    assert not unknown_experts(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_roles(family):
    model = tiny(family)
    by_role: dict[str, list[str]] = {}
    for w in weights(model):
        by_role.setdefault(w.role, []).append(w.name)
    assert by_role["embedding"] == ["model.embed_tokens"] and by_role["head"] == ["lm_head"]
    assert len(by_role["attention"]) == 2 * (5 if family == "deepseek_v3" else 4)
    sparse = FAMILIES[family].experts is not None
    layers_with_experts = 1 if family in ("qwen3_moe", "deepseek_v3") else 2
    assert len(by_role.get("experts", [])) == (2 * layers_with_experts if sparse else 0)
    assert len(by_role.get("router", [])) == (layers_with_experts * (2 if family == "qwen2_moe" else 1) if sparse else 0)
    assert len(by_role.get("shared", [])) == {"qwen2_moe": 6, "deepseek_v3": 3}.get(family, 0)
    assert "linear" not in by_role


@pytest.mark.parametrize("family", [f for f in CONFIGS if FAMILIES[f].experts])
def test_expert_stacks_have_the_orientation_of_a_linear(family):
    model = tiny(family)
    inner = model.config.intermediate_size if family in ("mixtral", "olmoe", "granitemoe", "gpt_oss") else 32
    shapes = {w.parameter: w.shape for w in weights(model) if w.kind == "experts"}
    assert shapes == {"gate_up_proj": (4, 2 * inner, 32), "down_proj": (4, 32, inner)}


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("family", CONFIGS)
def test_swapped_model_equals_one_that_holds_the_dequantized_weights(family, kernel):
    model = tiny(family)
    codes = {
        w.name: round_to_nearest(w.tensor, QuantScheme.parse("int4-g32")) for w in weights(model) if not w.tied_to and w.kind != "router"
    }
    reference = copy.deepcopy(model)
    for w in weights(reference):
        if w.name in codes:  # a view: this writes into the model, whatever way it stores the weight
            w.tensor.copy_(torch.from_numpy(codes[w.name].dequantize()))
    swap(model, codes)
    assert set(quantized(model)) == set(codes)
    before = layers.set_kernel(kernel)
    try:
        with torch.no_grad():
            got = model(IDS).logits
    finally:
        layers.set_kernel(before)
    with torch.no_grad():
        torch.testing.assert_close(got, reference(IDS).logits, rtol=1e-4, atol=1e-4)
    dequantize(model)
    assert not quantized(model)
    for name, p in reference.named_parameters(remove_duplicate=False):
        assert torch.equal(model.get_parameter(name), p), name
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=0, atol=0)


def test_tied_weights_share_one_set_of_codes_in_copies_too():
    model = tiny("qwen3")
    listed = {w.name: w for w in weights(model)}
    assert listed["lm_head"].tied_to == "model.embed_tokens" and listed["model.embed_tokens"].tied_to is None
    swap(model, {"lm_head": round_to_nearest(listed["lm_head"].tensor, QuantScheme.parse("int8-row"))})  # either name will do
    assert isinstance(model.model.embed_tokens, layers.QEmbedding) and isinstance(model.lm_head, layers.QLinear)
    for m in (model, copy.deepcopy(model)):
        assert m.lm_head.packed is m.model.embed_tokens.packed and m.lm_head.scales is m.model.embed_tokens.scales
        assert [n for n in stored_tensors(m) if n.endswith(("packed", "scales"))] == [
            "model.embed_tokens.packed",
            "model.embed_tokens.scales",
        ]
    model.tie_weights()  # transformers has nothing left to tie, and must not fail


def test_weights_of_a_moved_tied_model_are_still_stored_once():
    model = tiny("qwen3")
    swap(model, {"model.embed_tokens": round_to_nearest(weights(model)[0].tensor, QuantScheme.parse("int8-row"))})
    model.to(torch.float64)
    assert [n for n in stored_tensors(model) if n.endswith("packed")] == ["model.embed_tokens.packed"]


def test_bert_encoder_and_its_roles():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = transformers.BertModel(config).eval()
    listed = weights(model)
    assert {w.role for w in listed} == {"embedding", "attention", "mlp", "linear"}  # linear: the pooler
    assert sum(w.role == "attention" for w in listed) == 8 and sum(w.role == "mlp" for w in listed) == 4
    own = {w.parameter_name for w in listed}
    assert not [n for n, p in model.named_parameters() if n not in own and p.ndim >= 2]
    with torch.no_grad():
        want = model(IDS).last_hidden_state
        swap(model, {w.name: round_to_nearest(w.tensor, QuantScheme.parse("int8-row")) for w in listed})
        assert torch.nn.functional.cosine_similarity(model(IDS).last_hidden_state, want, dim=-1).min() > 0.999


def test_conv1d_is_stored_transposed():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    w = {w.name: w for w in weights(model)}
    assert w["transformer.h.0.attn.c_attn"].shape == (96, 32) and model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
    with torch.no_grad():
        want = model(IDS).logits
        swap(model, {n: round_to_nearest(x.tensor, QuantScheme.parse("int8-row")) for n, x in w.items() if not x.tied_to})
        assert torch.nn.functional.cosine_similarity(model(IDS).logits, want, dim=-1).min() > 0.999
        got = model(IDS).logits
        dequantize(model)
        torch.testing.assert_close(model(IDS).logits, got, rtol=1e-4, atol=1e-5)


class SmallConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.conv(x).relu())


def test_linears_of_a_convnet_and_only_those():
    torch.manual_seed(0)
    model, x = SmallConvNet().eval(), torch.randn(4, 3, 16, 16)
    listed = weights(model)
    assert [(w.name, w.role) for w in listed] == [("head.1", "linear"), ("head.3", "linear")]
    with torch.no_grad():
        want = model(x)
        swap(model, {w.name: round_to_nearest(w.tensor, QuantScheme.parse("int8-row")) for w in listed})
        assert (model(x) - want).abs().max() < 0.05 * want.abs().max()


def test_modules_that_read_the_weight_of_their_child_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "scaled": Scaled(16, 16), "plain": nn.Linear(16, 16)})
    assert [w.name for w in weights(model)] == ["plain"]


def test_a_module_under_two_names_is_swapped_under_both():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    swap(model, {"a": round_to_nearest(shared.weight, QuantScheme.parse("int8-row"))})
    assert isinstance(model["a"], layers.QLinear) and model["b"][0] is model["a"]


def test_experts_of_an_unknown_family_are_named(monkeypatch):
    model = tiny("mixtral")
    monkeypatch.delitem(FAMILIES, "mixtral")
    assert not [w for w in weights(model) if w.role == "experts"]
    assert sorted(unknown_experts(model)) == [f"model.layers.{i}.mlp.experts.{p}_proj" for i in range(2) for p in ("down", "gate_up")]
    assert unknown_experts(tiny("llama")) == {}


def test_swap_errors():
    model = tiny("qwen2_moe")
    q = {w.name: round_to_nearest(w.tensor, QuantScheme.parse("int8-row")) for w in weights(model)}
    with pytest.raises(ValueError, match=r"'nowhere' is no weight of this Qwen2MoeForCausalLM; weights\(model\) lists"):
        swap(model, {"nowhere": q["lm_head"]})
    with pytest.raises(ValueError, match=r"lm_head has the shape \(96, 32\), its codes have \(32, 32\)"):
        swap(model, {"lm_head": q["model.layers.0.self_attn.q_proj"]})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate is a router that Qwen2MoeTopKRouter computes itself"):
        swap(model, {"model.layers.0.mlp.gate": q["model.layers.0.mlp.gate"]})
    with pytest.raises(ValueError, match=r"mlp.experts: down_proj has no codes; both stacks"):
        swap(model, {"model.layers.0.mlp.experts.gate_up_proj": q["model.layers.0.mlp.experts.gate_up_proj"]})


def test_float32_values_that_are_bfloat16_numbers_are_stored_as_such():
    model = nn.Linear(4, 4)
    model.weight.data = torch.randn(4, 4).bfloat16().float()
    kept = stored_tensors(model)
    assert kept["weight"].dtype == torch.bfloat16 and kept["bias"].dtype == torch.float32
    assert torch.equal(kept["weight"].float(), model.weight)


# ---------------------------------------------------------------------------------------------------------- load


def test_load_takes_the_class_that_the_config_names(tmp_path):
    cases = {
        "llama": tiny("llama"),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
        ),
        "resnet": transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
    }
    for name, model in cases.items():
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        got = load(tmp_path / name)
        assert type(got) is type(model) and not got.training and got.dtype == torch.float32
        for key, value in model.state_dict().items():
            assert torch.equal(got.state_dict()[key].to(value.dtype), value), key
    assert [w.name for w in weights(load(tmp_path / "resnet"))] == ["classifier.1"]
    assert type(load(str(tmp_path / "bert"), auto=transformers.AutoModel)) is transformers.BertModel


def test_load_errors(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "m")
    file, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    whole, settings = file.read_bytes(), json.loads(config.read_text())

    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no directory ./nowhere"):
        load_tokenizer("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*empty: it is not a model directory"):
        load(tmp_path / "empty")

    file.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=rf"model.safetensors is truncated: {len(whole):,} bytes expected, {len(whole) - 1000:,} found"):
        load(tmp_path / "m")
    file.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="longer than its header says"):
        load(tmp_path / "m")
    for head in (whole[:4], whole[:100], b"\xff" * 200, (20).to_bytes(8, "little") + b"not json" * 5):
        file.write_bytes(head)
        with pytest.raises(ValueError, match=r"model.safetensors (is truncated or no safetensors file|has no readable safetensors header)"):
            load(tmp_path / "m")
    file.write_bytes(whole)

    config.write_text(json.dumps(settings | {"model_type": "never_heard_of"}))
    with pytest.raises(ValueError, match=r"model_type='never_heard_of' in .* is not an architecture .*trust_remote_code\) is never run"):
        load(tmp_path / "m")
    config.write_text(json.dumps(settings | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match=r"architectures=\['NoSuchModel'\] .* names no model class .* pass auto="):
        load(tmp_path / "m")
    config.write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 weights of LlamaForCausalLM .*they would be random"):
        load(tmp_path / "m")
    config.write_text(json.dumps(settings))

    file.rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pytorch_model.bin, a pickle: loading one can run any code, so it is refused"):
        load(tmp_path / "m")


def test_a_missing_shard_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[1].name} is missing in .*: 1 of its {len(shards)} weight files"):
        load(tmp_path)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    d = json.loads(index.read_text())
    name = next(iter(d["weight_map"]))
    (tmp_path / "m" / d["weight_map"][name]).rename(tmp_path / "secret.safetensors")
    d["weight_map"][name] = "../secret.safetensors"
    index.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=r"lists '../secret.safetensors', which is outside its directory"):
        load(tmp_path / "m")


def test_a_hub_name_without_a_network_says_so():
    with pytest.raises(
        OSError, match=r"'edgelab-tests/no-such-model' is no directory here, and the hub gave no such model \(or there is no network\)"
    ):
        load("edgelab-tests/no-such-model")


def test_a_family_is_one_literal():
    assert Family("x").experts is None and FAMILIES["gpt_oss"].experts.transposed
