"""Cut models against the old ones with zeros (channels, heads, blocks) or barred experts; saved, loaded again, refused."""

import copy

import pytest
import torch
import transformers
from test_model import CONFIGS, IDS, tiny

from edgelab import surgery
from edgelab.blocks import decoder_blocks
from edgelab.evaluate import routers
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import FAMILIES, swap, weights
from edgelab.scheme import QuantScheme

SPARSE = [f for f in CONFIGS if FAMILIES[f].experts]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def check_round_trip(model, folder):
    """Through plain transformers: nothing missing, nothing of another shape, the same logits; every attribute the same too."""
    model.save_pretrained(folder)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=0)
    fresh = dict(again.named_modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, int | float | str) and key != "name_or_path" and not key.startswith("_"):
                assert vars(fresh[name])[key] == value, (name, key)


def modules(model, kind):
    wanted = {
        "attention": lambda n: n.endswith("self_attn"),
        "dense": lambda n: n.endswith("mlp") and hasattr(model.get_submodule(n), "up_proj"),
        "experts": lambda n: n.endswith(".experts"),
        "shared": lambda n: n.endswith(("shared_expert", "shared_experts")),
    }[kind]
    return [n for n, _ in model.named_modules() if wanted(n)]


def barred(model, kept):
    """A hook for each router after which only the kept experts can be chosen, written from the papers' formulas."""
    for name, router in routers(model).items():
        gone = [e for e in range(router.num_experts) if e not in kept[name]]

        def choose(module, _inputs, output, gone=gone):
            z = output[0].clone().reshape(-1, module.num_experts)
            kind = type(module).__name__
            if kind.startswith("Deepseek"):
                score = z.sigmoid()
                pick = score + module.e_score_correction_bias
                pick[:, gone] = -torch.inf
                picked = pick.topk(module.top_k).indices
                value = score.gather(1, picked)
            else:
                z[:, gone] = -torch.inf
                value, picked = z.softmax(-1).topk(module.top_k)
            # Mixtral, Granite and gpt-oss always normalise what the chosen ones get
            if getattr(module, "norm_topk_prob", True):
                value = value / value.sum(-1, keepdim=True)
            return output[0], value * getattr(module, "routed_scaling_factor", 1.0), picked

        router.register_forward_hook(choose)
    return model


@pytest.mark.parametrize("family", SPARSE)
def test_experts(family, tmp_path):
    model = tiny(family)
    kept = {n: [3, 0, 2] if i == 0 else [1, 3, 0] for i, n in enumerate(routers(model))}
    want = logits(barred(copy.deepcopy(model), kept))
    surgery.keep_experts(model, kept)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert {r.num_experts for r in routers(model).values()} == {3}
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_channels(family, tmp_path):
    model, generator = tiny(family), torch.Generator().manual_seed(1)
    reference, kept = copy.deepcopy(model), {}
    with torch.no_grad():
        for kind in ("dense", "shared"):
            for name in modules(model, kind):
                down = reference.get_submodule(name).down_proj.weight
                inner = down.shape[1]
                kept[name] = torch.randperm(inner, generator=generator)[: inner * 3 // 4 // 8 * 8]
                down[:, [i for i in range(inner) if i not in kept[name].tolist()]] = 0
        for name in modules(model, "experts"):
            down = reference.get_submodule(name).down_proj
            channels = down.transpose(1, 2) if family != "gpt_oss" else down  # [E, inner, hidden]
            inner = channels.shape[1]
            kept[name] = torch.stack([torch.randperm(inner, generator=generator)[: inner * 3 // 4] for _ in range(4)])
            for e in range(4):
                channels[e, [i for i in range(inner) if i not in kept[name][e].tolist()]] = 0
    surgery.keep_channels(model, kept)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in reference.parameters())
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "olmoe"])
def test_heads(family, tmp_path):
    model = tiny(family)
    total, group = (4, 1) if family == "deepseek_v3" else (2, 2)
    stay = [[2, 0], [3, 1]] if total == 4 else [[1], [0]]
    reference = copy.deepcopy(model)
    kept = dict(zip(modules(model, "attention"), stay, strict=True))
    with torch.no_grad():
        for name, heads in kept.items():
            columns = reference.get_submodule(name).o_proj.weight.view(32, total, group * 8)
            columns[:, [h for h in range(total) if h not in heads]] = 0
            if family == "gpt_oss":
                model.get_submodule(name).sinks.copy_(torch.tensor([0.5, -1, 2, 1]))
                reference.get_submodule(name).sinks.copy_(torch.tensor([0.5, -1, 2, 1]))
    surgery.keep_heads(model, kept)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert model.config.num_attention_heads == 2
    check_round_trip(model, tmp_path)


LAYERS = {  # config fields of a four-block model, and what must be left of them with blocks 0, 2, 3
    "qwen3_moe": ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2]}),
    "qwen2_moe": ({"mlp_only_layers": [2]}, {"mlp_only_layers": [1]}),
    "deepseek_v3": ({"first_k_dense_replace": 3}, {"first_k_dense_replace": 2}),
    "gpt_oss": (
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
        {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "qwen3": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "layer_types": None},
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "max_window_layers": 2},
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_layers(family, tmp_path, monkeypatch):
    old, new = LAYERS.get(family, ({}, {}))
    config = CONFIGS[family]()
    values = config.to_dict() | {"num_hidden_layers": 4, "layer_types": None} | old
    values |= {"sliding_window": old.get("sliding_window")} if "sliding_window" in values else {}
    if not hasattr(config, "layer_types"):
        del values["layer_types"]
    monkeypatch.setitem(CONFIGS, family, lambda: type(config).from_dict(values))
    model = tiny(family)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.startswith("model.layers.1.") and ("o_proj" in name or "down_proj" in name):
                p.zero_()  # the block then adds nothing
    surgery.keep_layers(model, [0, 2, 3])
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert {k: getattr(model.config, k) for k in new} == new and model.config.num_hidden_layers == 3
    assert [b.self_attn.layer_idx for _, b in decoder_blocks(model)] == [0, 1, 2]
    check_round_trip(model, tmp_path)
    with torch.no_grad():  # the cache goes by layer_idx
        out = model.generate(IDS[:, :6], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(out, model.generate(IDS[:, :6], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False))


def first_half(model, kind):
    """Half of the channels, experts or heads of every module, for tests of what does not depend on which."""
    if kind == "experts":
        return surgery.keep_experts, {n: [0, 1] for n in routers(model)}
    if kind == "heads":
        return surgery.keep_heads, {
            n: range(2 if "kv_b_proj" in dict(model.get_submodule(n).named_children()) else 1) for n in modules(model, "attention")
        }
    kept = {n: torch.arange(model.get_submodule(n).up_proj.weight.shape[0] // 2) for k in ("dense", "shared") for n in modules(model, k)}
    for n in modules(model, "experts"):
        stack = model.get_submodule(n)
        kept[n] = torch.arange(stack.down_proj.shape[1 if hasattr(stack, "down_proj_bias") else 2] // 2).expand(4, -1)
    return surgery.keep_channels, kept


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_on_the_meta_device_are_those_of_the_real_model(family):
    real = tiny(family)
    with torch.device("meta"):
        meta = type(real)(copy.deepcopy(real.config))
    kinds = ["channels"] + ["experts"] * (family in SPARSE) + ["heads"] * (family != "olmoe")
    for model in (real, meta):
        for kind in kinds:
            cut, kept = first_half(model, kind)
            cut(model, kept)
        surgery.keep_layers(model, [1])
    assert {n: p.shape for n, p in meta.state_dict().items()} == {n: p.shape for n, p in real.state_dict().items()}
    assert all(p.is_meta for p in meta.parameters()) and meta.config.to_dict() == real.config.to_dict()


def test_all_cuts_one_after_the_other_load_again(tmp_path):
    for family in ("deepseek_v3", "gpt_oss"):
        model = tiny(family)
        for kind in ("heads", "experts"):
            cut, kept = first_half(model, kind)
            cut(model, kept)
        surgery.keep_layers(model, [1])
        kept = {n: torch.stack([torch.arange(8), torch.arange(8, 16)]) for n in modules(model, "experts")}
        kept |= {n: torch.arange(16) for n in modules(model, "shared")}
        surgery.keep_channels(model, kept)
        check_round_trip(model, tmp_path / family)
    assert not hasattr(model.config, "n_shared_experts")


def test_deepseek_shared_experts_follow_the_config():
    model = tiny("deepseek_v3")  # experts 32 wide, shared 1 * 32
    stack, shared = modules(model, "experts")[0], modules(model, "shared")[0]
    surgery.keep_channels(model, {stack: torch.arange(16).expand(4, -1)})
    assert (model.config.moe_intermediate_size, model.config.n_shared_experts) == (16, 2)
    assert model.get_submodule(shared).up_proj.out_features == 32
    with pytest.raises(ValueError, match=rf"{shared} would have 24 channels and an expert 16: .* keep a multiple of 16"):
        surgery.keep_channels(model, {shared: torch.arange(24)})
    surgery.keep_channels(model, {shared: torch.arange(16)})
    assert (model.config.moe_intermediate_size, model.config.n_shared_experts) == (16, 1)


def test_parameters_stay_the_same_objects_with_dtype_grad_flag_and_ties():
    model = tiny("qwen3").to(torch.bfloat16)
    a, b = (layer.mlp for layer in model.model.layers)
    b.up_proj.weight = a.up_proj.weight
    a.gate_proj.weight.requires_grad_(False)
    model(IDS).logits.sum().backward()
    before, random = dict(model.named_parameters(remove_duplicate=False)), torch.random.get_rng_state()
    old = a.up_proj.weight.detach().clone()
    index = torch.tensor([5, 1, 40, 7, 2, 3, 60, 9])
    surgery.keep_channels(model, {"model.layers.0.mlp": index, "model.layers.1.mlp": index})
    assert torch.equal(random, torch.random.get_rng_state())  # the model of shapes alone draws no numbers
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[n] is p for n, p in before.items()) and len(after) == len(before)
    assert b.up_proj.weight is a.up_proj.weight and torch.equal(a.up_proj.weight, old[index])  # cut once, not twice
    assert a.up_proj.weight.dtype == torch.bfloat16 and a.up_proj.weight.grad is None
    assert not a.gate_proj.weight.requires_grad and a.up_proj.weight.requires_grad
    assert (b.up_proj.out_features, b.up_proj.in_features, b.down_proj.in_features) == (8, 32, 8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS).logits.sum().backward()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is tied to model\.layers\.0\.mlp\.up_proj\.weight"):
        surgery.keep_channels(model, {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [0, 2]})


def test_deepseek_without_query_latents():
    values = CONFIGS["deepseek_v3"]().to_dict() | {"q_lora_rank": None}
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config.from_dict(values)).eval()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.o_proj.weight[:, 8:24] = 0
    surgery.keep_heads(model, {n: [0, 3] for n in modules(model, "attention")})
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)


STACK, MLP, ATTENTION = "model.layers.1.mlp.experts", "model.layers.0.mlp", "model.layers.0.self_attn"
ATTENTIONS = (ATTENTION, "model.layers.1.self_attn")
GATES = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")


def each(names, kept):
    return {n: kept for n in names}


REFUSED = [
    ("mixtral", "experts", {GATES[0]: [0, 1]}, rf"kept lacks {GATES[1]}: .* every router must be named"),
    ("mixtral", "experts", {GATES[0]: [0, 1], GATES[1]: [0, 1, 2]}, rf"{GATES[0]} would keep 2 experts and {GATES[1]} 3"),
    ("mixtral", "experts", each(GATES, [0]), rf"{GATES[0]}: 1 experts would stay, but each token picks 2; keep at least 2"),
    ("mixtral", "experts", each(GATES, [0, 4]), rf"{GATES[0]} has no expert 4: it has 4, numbered 0 to 3"),
    ("mixtral", "experts", each(GATES, [0, -1]), r"has no expert -1"),
    ("mixtral", "experts", each(GATES, [0, 1, 1]), rf"{GATES[0]}: expert 1 is kept twice"),
    ("mixtral", "experts", each((*GATES, "lm_head"), [0, 1]), r"'lm_head' is no router of this model"),
    ("llama", "experts", {}, r"this LlamaForCausalLM has no routers"),
    ("llama", "channels", {MLP: [0, 1]}, r"kept lacks model.layers.1.mlp"),
    ("llama", "channels", {MLP: [0, 1], "model.layers.1.mlp": [0.5, 1]},
     r"layers.1.mlp: kept must be a row of integers, not \[2\] of torch.float32"),
    ("qwen3_moe", "channels", {STACK: torch.arange(8)}, rf"{STACK} holds 4 experts: .* must be \[4, n\], one row each, not \[8\]"),
    ("qwen3_moe", "channels", {STACK: torch.full((4, 1), 32)}, rf"{STACK}, expert 0 has no channel 32: it has 32"),
    ("deepseek_v3", "channels", {STACK: torch.arange(24).expand(4, -1)}, r"shared_experts would have 32 channels and an expert 24"),
    ("olmoe", "heads", each(ATTENTIONS, [0]), rf"{ATTENTION}.q_norm runs over all heads at once \(32 wide, a head has 8\)"),
    ("qwen2", "heads", each(ATTENTIONS, []), rf"{ATTENTION}: no head would stay"),
    ("qwen2", "heads", each(ATTENTIONS, [2]), rf"{ATTENTION} has no head 2: it has 2"),
    ("qwen2", "layers", [], r"kept = \[\]: at least one block must stay"),
    ("qwen2", "layers", [1, 0], r"kept = \[1, 0\]: .* \(ascending indices\)"),
    ("qwen2", "layers", [2], r"model.layers has no block 2: it has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "what", "kept", "says"), REFUSED)
def test_refusals_name_the_rule_and_leave_the_model_alone(family, what, kept, says):
    model = tiny(family)
    config, before = model.config.to_dict(), {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        getattr(surgery, f"keep_{what}")(model, kept)
    after = model.state_dict()
    assert model.config.to_dict() == config and all(torch.equal(after[n], p) for n, p in before.items()) and len(after) == len(before)


def test_what_the_config_refuses_leaves_the_model_alone():
    torch.manual_seed(0)
    values = CONFIGS["llama"]().to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    kept = {n: [0, 1, 3] for n in modules(model, "attention")}
    with pytest.raises(ValueError, match=r"LlamaConfig refuses num_attention_heads = 3, .*hidden size \(32\) is not a multiple"):
        surgery.keep_heads(model, kept)
    assert model.config.num_attention_heads == 4 and model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


def test_groups_of_experts_quantized_layers_and_foreign_models_are_refused():
    values = CONFIGS["deepseek_v3"]().to_dict() | {"n_group": 2, "topk_group": 1}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config.from_dict(values))
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate picks groups of experts first \(n_group = 2\)"):
        surgery.keep_experts(model, {"model.layers.1.mlp.gate": [0, 1]})
    model, scheme = tiny("qwen2"), QuantScheme.parse("int8-row")
    w = next(w for w in weights(model) if w.name == "model.layers.0.mlp.up_proj")
    swap(model, {w.name: round_to_nearest(w.tensor, scheme)})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj is quantized already \(QLinear\); cut first"):
        surgery.keep_layers(model, [0])
    with pytest.raises(ValueError, match=r"a Linear has no transformers config"):
        surgery.keep_layers(torch.nn.Linear(2, 2), [0])
