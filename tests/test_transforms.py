"""Transforms leave the function of every family as it is; planted outliers cost what they must, and are dealt with."""

import copy
import warnings

import pytest
import torch
import transformers
from test_model import CONFIGS, IDS, tiny
from torch import nn

import edgelab
from edgelab.blocks import walk
from edgelab.compress import compress
from edgelab.data import SCORED
from edgelab.layers import QExperts, QLinear
from edgelab.methods.calibrate import InputStats
from edgelab.model import FAMILIES, LLAMA_LIKE, Family, load, load_tokenizer, stored_tensors, weights
from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.scheme import ActScheme, QuantScheme
from edgelab.transforms import awq, plant_outliers, rotate, smooth

INT4 = QuantScheme.parse("int4-g8")
PAIRED = [f for f in CONFIGS if f != "gpt_oss"]


def uneven(family: str) -> nn.Module:
    """A tiny model whose gains and biases are not all ones and zeros."""
    model = tiny(family)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def statistics(model: nn.Module, ids=IDS) -> dict[str, InputStats]:
    found = {}
    for item in walk(model, list(ids.split(4)), want=("xx",), progress=False):
        found |= item.stats
    return found


def logits(model: nn.Module, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def same(model: nn.Module, other: nn.Module, atol: float = 1e-4) -> None:
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=atol)


def changed(model: nn.Module, other: nn.Module) -> set[str]:
    """The last two parts of the names of the parameters that differ."""
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    return {
        ".".join(n.split(".")[-3:-1]) if n.endswith(".weight") else ".".join(n.split(".")[-2:]) for (n, p), q in pairs if not p.equal(q)
    }


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.filterwarnings("ignore:the head of this")
def test_rotation_keeps_the_function(family, latents):
    model = uneven(family)
    turned = copy.deepcopy(model)
    rotate(turned, seed=5, latents=latents)
    same(turned, model)
    for name, p in turned.named_parameters():
        if "layernorm" in name or name == "model.norm.weight":
            assert (p == 1).all(), name
    # all matrices: even q_b, which without `latents` only takes in its norm's gain
    still = {w.name.rpartition(".")[2] for w, v in zip(weights(model), weights(turned), strict=True) if w.tensor.equal(v.tensor)}
    assert still == set()


@pytest.mark.parametrize("family", CONFIGS)
def test_smoothing_keeps_the_function(family):
    model = uneven(family)
    stats = statistics(model)
    for pairs in (False, True):
        eased = copy.deepcopy(model)
        scales = smooth(eased, stats, pairs=pairs)
        same(eased, model)
        assert all(torch.isfinite(s).all() and (s > 0).all() for s in scales.values())
        assert ("model.layers.1.self_attn.v_proj" in scales) == (pairs and family != "deepseek_v3")
    assert (len(scales["model.layers.1.post_attention_layernorm"]),) == stats["model.layers.1.self_attn.o_proj"].absmax.shape
    again = statistics(eased)
    for name, s in scales.items():  # the inputs went down by s
        reader = {"input_layernorm": "self_attn.kv_a_proj_with_mqa" if family == "deepseek_v3" else "self_attn.q_proj"}
        key = name.replace("input_layernorm", reader["input_layernorm"])
        if name.endswith("input_layernorm"):
            torch.testing.assert_close(again[key].absmax, stats[key].absmax / s, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_awq_keeps_the_function(family):
    model = uneven(family)
    roles = {w.name: w.role for w in weights(model)}
    eased = copy.deepcopy(model)
    found = awq(eased, statistics(model), lambda n: None if roles[n] in ("router", "head") else INT4, grid=4)
    same(eased, model)
    # on a tiny random model too some scale is worth moving, and none is made worse
    assert any((f.exponent > 0).any() for f in found.values())
    assert all((f.errors.amin(0) <= f.errors[0]).all() for f in found.values())


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_planting_keeps_the_function(family, pairs):
    model = uneven(family)
    planted = copy.deepcopy(model)
    where = plant_outliers(planted, channels=3, factor=32, pairs=pairs)
    assert torch.equal(logits(planted), logits(model))  # a power of two: not a bit is lost
    assert (len(where["model.layers.0.input_layernorm"]), len(where)) == (3, len(where))
    before, after = statistics(model), statistics(planted)
    key = "model.layers.1.self_attn." + ("kv_a_proj_with_mqa" if family == "deepseek_v3" else "k_proj")
    factor = torch.ones(32).index_fill(0, where["model.layers.1.input_layernorm"], 32)
    torch.testing.assert_close(after[key].absmax, before[key].absmax * factor)


def test_each_weight_that_should_change_does_and_no_other():
    model = uneven("qwen2_moe")
    planted = copy.deepcopy(model)
    plant_outliers(planted, channels=2)
    attention = {f"self_attn.{n}_proj" for n in "qkv"}
    readers = {"mlp.gate", "mlp.shared_expert_gate", "experts.gate_up_proj", "shared_expert.gate_proj", "shared_expert.up_proj"}
    layer = {"0.input_layernorm", "1.input_layernorm", "0.post_attention_layernorm", "1.post_attention_layernorm"}
    assert changed(planted, model) == attention | readers | layer
    planted = copy.deepcopy(model)
    plant_outliers(planted, channels=2, pairs=True)
    assert changed(planted, model) >= {"self_attn.o_proj", "experts.down_proj", "shared_expert.down_proj"}
    bias = dict(planted.named_parameters())["model.layers.0.self_attn.v_proj.bias"]
    assert not torch.equal(bias, model.model.layers[0].self_attn.v_proj.bias)


def test_biases_move_along():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    for change in (
        rotate,
        lambda m: smooth(m, statistics(model), pairs=True),
        lambda m: plant_outliers(m, channels=3, factor=30, pairs=True),
    ):
        other = copy.deepcopy(model)
        change(other)
        same(other, model)


def test_grouped_heads_share_a_scale():
    model = uneven("qwen3")  # 4 heads over 2 of keys and values, 8 wide
    stats = statistics(model)
    scales = smooth(model, stats, pairs=True)
    name = "model.layers.0.self_attn"
    x = stats[f"{name}.o_proj"].absmax.view(2, 2, 8).amax(1).flatten()  # [kv head, its heads, 8]
    w = uneven("qwen3").model.layers[0].self_attn.o_proj.weight.abs().amax(0).view(2, 2, 8).amax(1).flatten()
    torch.testing.assert_close(scales[f"{name}.v_proj"], (x / w).sqrt(), rtol=1e-4, atol=1e-5)


def test_clipped_values_are_left_alone():
    model = uneven("olmoe")
    model.config.clip_qkv = 0.05  # clips nearly all: what moved across it would show
    for change in (rotate, lambda m: plant_outliers(m, channels=3, pairs=True)):
        other = copy.deepcopy(model)
        where = change(other)
        same(other, model)
    assert "model.layers.0.self_attn.v_proj" not in where and "model.layers.0.mlp.experts.gate_up_proj" in where


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_bfloat16_keeps_its_type(family):
    model = uneven(family).to(torch.bfloat16)
    stats = statistics(uneven(family))
    for change in (rotate, lambda m: smooth(m, stats, pairs=True), planting := lambda m: plant_outliers(m, channels=4, pairs=True)):
        other = copy.deepcopy(model)
        with warnings.catch_warnings(action="ignore"):
            change(other)
        assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
        if change is planting:
            assert torch.equal(logits(other), logits(model))
        else:  # one more rounding of the weights, no more; where that makes a router choose another expert, more
            assert (logits(other) - logits(model)).float().abs().amax(-1).median() < 0.05


def test_a_tied_head_is_untied_by_rotation_only(tmp_path):
    model = uneven("qwen3")
    plant_outliers(model, channels=2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    original = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"tied to model\.embed_tokens; rotated, each has its own weights: 3,072 parameters more"):
        rotate(model)
    same(model, original)
    assert not model.config.tie_word_embeddings and "lm_head.weight" in stored_tensors(model)
    assert original.config.tie_word_embeddings  # the copy's config is its own
    model.tie_weights()  # must not tie them again
    same(model, original)
    model.save_pretrained(tmp_path)
    same(load(tmp_path), original)


def test_they_compose():
    model = uneven("deepseek_v3")
    eased = copy.deepcopy(model)
    plant_outliers(eased, channels=2, pairs=True)
    rotate(eased, seed=1, latents=True)
    smooth(eased, statistics(eased), pairs=True)
    awq(eased, statistics(eased), lambda n: INT4 if "down_proj" in n else None, grid=2)
    rotate(eased, seed=2)
    same(eased, model, atol=2e-4)


# --------------------------------------------------------------------------------------------------- no silent failure


def test_a_model_without_wiring_is_refused():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    for change in (rotate, plant_outliers, lambda m: smooth(m, {}), lambda m: awq(m, {}, lambda n: None)):
        with pytest.raises(
            ValueError, match=r"model_type 'gpt2' has no wiring .* FAMILIES\['gpt2'\] = Family\('gpt2', wiring=LLAMA_LIKE\)"
        ):
            change(model)


def gemma():
    config = transformers.GemmaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.normal_()
    return model


def test_a_norm_of_another_kind_is_found_out(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma", Family("gemma", wiring=LLAMA_LIKE))  # right names, but (1 + weight)
    with pytest.raises(ValueError, match=r"input_layernorm is a GemmaRMSNorm that does not compute x / rms\(x\) \* weight"):
        rotate(gemma())
    model = tiny("llama")
    model.model.layers[0].input_layernorm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="is a LayerNorm; only an RMSNorm"):
        rotate(model)


def test_a_weight_that_the_wiring_does_not_name_is_found_out():
    model = tiny("llama")
    model.model.layers[1].self_attn.extra = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"says nothing of model\.layers\.1\.self_attn\.extra \(1 weights\)"):
        plant_outliers(model)
    model = transformers.LlamaForSequenceClassification(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="says nothing of score"):
        rotate(model)
    with pytest.raises(ValueError, match="has no output head"):
        rotate(transformers.LlamaModel(CONFIGS["llama"]()))


def test_a_quantized_model_is_refused():
    small = compress(tiny("llama"), Recipe.body("int4-g32"), progress=False).model
    with pytest.raises(ValueError, match="is quantized already; transform the floating-point model"):
        rotate(small)


def test_statistics_that_lack_something_or_are_broken_change_nothing():
    model = uneven("mixtral")
    before, stats = copy.deepcopy(model), statistics(model)
    broken = {k: copy.deepcopy(v) for k, v in stats.items()}
    broken["model.layers.1.mlp.experts.gate_up_proj"].absmax[2, 7] = torch.nan
    broken["model.layers.1.mlp.experts.gate_up_proj"].sum_abs[2, 7] = torch.nan
    for change in (lambda st: smooth(model, st), lambda st: awq(model, st, lambda n: INT4 if "proj" in n else None, grid=1)):
        with pytest.raises(ValueError, match=r"layers\.1\.post_attention_layernorm: .* holds 1 NaN, infinite"):
            change(broken)
        lacking = {k: v for k, v in stats.items() if "layers.1.mlp" not in k}
        with pytest.raises(ValueError, match=r"stats has nothing of .*layers\.1\."):
            change(lacking)
        wrong = stats | {"model.layers.0.mlp.experts.gate_up_proj": stats["model.layers.0.self_attn.q_proj"]}
        with pytest.raises(ValueError, match=r"are \(32,\); its weight \(4, 128, 32\) needs \(4, 32\)"):
            change(wrong)
    assert not changed(model, before)


def test_dead_channels_and_dead_experts_keep_their_scale():
    model = uneven("qwen3_moe")
    stats = statistics(model)
    stats = {k: InputStats(v.count.clone(), v.absmax.clone(), v.sum_abs.clone(), v.sum_sq.clone()) for k, v in stats.items()}
    name = "model.layers.1.mlp.experts"
    for t in (s := stats[f"{name}.down_proj"]).count, s.absmax, s.sum_abs, s.sum_sq:
        t[2] = 0
    for proj in ("q_proj", "k_proj", "v_proj"):
        for t in (s := stats[f"model.layers.1.self_attn.{proj}"]).absmax, s.sum_abs, s.sum_sq:
            t[5] = 0
    other = copy.deepcopy(model)
    scales = smooth(other, stats, pairs=True)
    same(other, model)
    found = awq(other, stats, lambda n: INT4 if "self_attn" in n or "experts" in n else None, grid=3)
    same(other, model)
    for s in (scales, {k: f.scales for k, f in found.items()}):
        assert (s[f"{name}.gate_up_proj"][2] == 1).all() and s["model.layers.1.input_layernorm"][5] == 1


def test_wrong_settings_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"channels=33 must be a whole number from 1 to 32"):
        plant_outliers(model, channels=33)
    for factor in (0, -2, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="factor="):
            plant_outliers(model, factor=factor)
    with pytest.raises(ValueError, match="alpha=2"):
        smooth(model, statistics(model), alpha=2)


# ------------------------------------------------------------------------------------------------------- the pathology


@pytest.fixture(scope="module")
def dense():
    """The embedded dense model with planted outliers, its statistics, token ids to test on, and the log-probabilities."""
    model, tokenizer, corpus = (
        load(data_dir() / "edge-dense"),
        load_tokenizer(data_dir() / "edge-dense"),
        edgelab.corpus(SCORED, assistant=2000),
    )

    def ids(split: str, rows: int) -> torch.Tensor:
        text = "\n\n".join(corpus[split]["text"])
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: rows * 256]).view(rows, 256)

    test = ids("test", 6)
    exact = logits(model, test).log_softmax(-1)
    plant_outliers(model)
    return model, statistics(model, ids("calibration", 8)), test, exact


def divergence(model: nn.Module, test: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean KL(original || model) over the tokens, in nats."""
    got = logits(model, test).log_softmax(-1)
    return (exact.exp() * (exact - got)).sum(-1).mean().item()


def rounded(model: nn.Module, scheme: str, act: str | None) -> nn.Module:
    small = compress(model, Recipe.body(scheme), progress=False).model
    for layer in small.modules():
        if act and isinstance(layer, QLinear | QExperts):
            for name in layer.qtensors():
                layer.round_input_of(name, ActScheme.parse(act))
    return small


@pytest.mark.parametrize(("scheme", "act"), [("int8-row", "a8-token"), ("int4-g32", "a8-token")])
@pytest.mark.filterwarnings("ignore:the head of this")
def test_planted_outliers_cost_and_each_way_wins_back_four_fifths(dense, scheme, act):
    model, stats, test, exact = dense
    assert divergence(model, test, exact) < 1e-6
    naive = divergence(rounded(model, scheme, act), test, exact)
    roles = {w.name: w.role for w in weights(model)}
    rule = Recipe.body(scheme).steps[0]
    ways = {
        "smooth": lambda m: smooth(m, stats),
        "awq": lambda m: awq(m, stats, lambda n: rule.scheme_for(n, roles[n]), grid=5),
        "rotate": rotate,
    }
    left = {}
    for way, change in ways.items():
        eased = copy.deepcopy(model)
        change(eased)
        left[way] = divergence(rounded(eased, scheme, act), test, exact)
    assert naive > 0.05, naive
    assert max(left.values()) < 0.2 * naive, (naive, left)


def test_planted_outliers_look_like_a_large_models(dense):
    _, stats, _, _ = dense
    for name, st in stats.items():
        if name.endswith(("q_proj", "gate_proj")):
            x = st.absmax.sort(descending=True).values
            assert (x[:6] > 20 * st.absmax.median()).all() and x[6] < 10 * st.absmax.median(), name
