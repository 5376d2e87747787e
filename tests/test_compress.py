"""`compress` and its audit: what is touched, what is counted, and what is refused before any work."""

import copy

import pytest
import torch
import transformers
from test_model import CONFIGS, IDS, SmallConvNet, tiny
from torch import nn

from edgelab import PerGroup, Quantize, QuantScheme, Recipe
from edgelab.compress import _copy, audit, compress, plan
from edgelab.methods.coverage import Coverage
from edgelab.model import FAMILIES, ExpertLayout, Family, weights

INT4, INT8 = QuantScheme(4, PerGroup(32)), QuantScheme.parse("int8-row")


def rules(*pairs, **settings) -> Recipe:
    return Recipe((Quantize(tuple(pairs), **settings),))


@pytest.mark.parametrize("family", CONFIGS)
def test_int8_is_close_int4_runs_and_every_expert_is_counted(family):
    model = tiny(family)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model(IDS).logits
        for text, least in (("int8-row", 0.999), ("int4-g32", 0.9)):
            c = compress(model, Recipe.uniform(text), progress=False)
            got = c.model(IDS).logits
            assert torch.isfinite(got).all()
            # a token whose router choice flips goes elsewhere altogether: the median token is what the codes cost
            assert torch.nn.functional.cosine_similarity(got, want, dim=-1).median() > least
            assert c.coverage.expert_share == (1.0 if FAMILIES[family].experts else None)
            assert c.coverage.parameters == sum(p.numel() for p in model.parameters())
            kept = [r for r in c.coverage if not r.touched]
            assert {r.role for r in kept} <= {"other", "router"}
    for name, p in model.named_parameters():  # the original is as it was
        assert torch.equal(p, before[name]), name


def test_predicted_bytes_by_hand():
    model = tiny("qwen3")  # tied: vocab 96, hidden 32, 2 layers
    c = compress(model, Recipe.uniform("int4-g32"), progress=False).coverage
    per_weight = 4 / 8 + 2 / 32
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64  # q, k + v, o, mlp
    norms = 2 * (2 * 32 + 2 * 8) + 32  # float32 ones: exact in bfloat16
    assert c.predicted_bytes == (96 * 32 + 2 * layer) * per_weight + 2 * norms
    assert c.bits_per_weight == 8 * c.predicted_bytes / (96 * 32 + 2 * layer + norms)
    assert [r.name for r in c if r.role in ("embedding", "head")] == ["model.embed_tokens"]  # one of a tied pair


def test_buffers_are_stored_bytes_but_no_parameters():
    model = tiny("deepseek_v3")
    row = next(r for r in audit(model) if r.name.endswith("e_score_correction_bias"))
    assert row.parameters == 0 and row.predicted_bytes in (8, 16) and not row.touched
    assert audit(model).share == 0 and audit(model).expert_share == 0


def test_a_copy_shares_nothing_that_stays_and_inplace_changes_the_model():
    model = tiny("qwen3_moe")
    c = compress(model, rules(("@experts", INT4)), progress=False)
    assert c.model is not model and isinstance(model.lm_head, nn.Linear)
    for name, p in c.model.named_parameters():
        assert p.data_ptr() != model.get_parameter(name).data_ptr(), name
    logits = c.model(IDS).logits
    same = compress(model, rules(("@experts", INT4)), progress=False, inplace=True)
    assert same.model is model and torch.equal(model(IDS).logits, logits)
    assert not [n for n, _ in model.named_parameters() if "experts" in n]


def test_the_copy_does_not_hold_what_will_be_replaced():
    model = tiny("qwen3_moe")
    replaced = {w.name for w in weights(model) if w.role == "experts"}
    twin = _copy(model, replaced)
    for name, p in twin.named_parameters():
        assert (p is model.get_parameter(name)) == ("experts" in name), name


def test_first_rule_wins_and_exceptions_stay():
    model = tiny("deepseek_v3")
    recipe = rules(
        ("@router", None), ("model.layers.0.*", None), ("@experts", INT4), ("*.o_proj", QuantScheme.parse("int3-row")), ("*", INT8)
    )
    schemes = {r.name: r.scheme for r in compress(model, recipe, progress=False).coverage}
    assert schemes["model.layers.1.mlp.experts.down_proj"] == "int4-g32" and schemes["model.layers.1.self_attn.o_proj"] == "int3-row"
    assert schemes["model.layers.0.self_attn.o_proj.weight"] == "float32" and schemes["lm_head"] == "int8-row"
    assert schemes["model.layers.1.mlp.gate.weight"] == "float32"


def test_a_tied_weight_follows_the_embeddings_rule():
    c = compress(tiny("qwen3"), Recipe.uniform("int4-g32", embedding="int8-row"), progress=False)
    assert next(r for r in c.coverage if r.role == "embedding").scheme == "int8-row"
    assert "int8-row" in repr(c.model.lm_head)


def test_two_steps_add_up():
    model = tiny("mixtral")
    both = Recipe((Quantize((("@attention", INT8),)), Quantize((("@experts", INT4),))))
    c = compress(model, both, progress=False)
    assert {r.role for r in c.coverage if r.touched} == {"experts", "attention"}
    with pytest.raises(ValueError, match=r"two steps of the recipe quantize model.layers.0.self_attn.k_proj"):
        compress(model, Recipe((*both.steps, both.steps[0])), progress=False)


def test_an_empty_recipe_copies():
    model = tiny("llama")
    c = compress(model, Recipe(), progress=False)
    assert c.coverage.share == 0 and torch.equal(c.model(IDS).logits, model(IDS).logits)


def test_bert_and_convnet():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    bert = transformers.BertModel(config).eval()
    c = compress(bert, Recipe.uniform("int8-row"), progress=False)
    assert c.coverage.share > 0.97 and c.coverage.expert_share is None
    assert torch.nn.functional.cosine_similarity(c.model(IDS).last_hidden_state, bert(IDS).last_hidden_state, dim=-1).min() > 0.999
    net = SmallConvNet().eval()
    c = compress(net, Recipe.uniform("int8-row"), progress=False)
    assert {r.name for r in c.coverage if r.touched} == {"head.1", "head.3"}
    assert c.coverage.parameters == sum(p.numel() for p in net.parameters())
    assert c.model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


# -------------------------------------------------------------------------------------------------------- errors


def refused(model, recipe, match):
    """Refused, and before anything was changed, even in place."""
    state = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        compress(model, recipe, progress=False, inplace=True)
    assert {n for n, _ in model.named_parameters()} == set(state)


def test_a_group_size_that_does_not_divide_names_the_weight():
    model = tiny("qwen3_moe")  # hidden 32
    refused(
        model,
        Recipe.uniform(QuantScheme(4, PerGroup(64))),
        r"model.embed_tokens: group_size=64 does not divide in_features=32; use 32 or 16 or 8",
    )
    refused(
        model,
        rules(("@head", INT4), ("*.experts.down_proj", QuantScheme(4, PerGroup(128))), ("*.experts.gate_up_proj", INT4)),
        r"experts.down_proj: group_size=128 does not divide in_features=32",
    )


def test_patterns_that_match_nothing_are_named():
    model = tiny("llama")
    refused(
        model,
        rules(("*.q_porj", INT4), ("*", INT8)),
        r"pattern '\*.q_porj' matches no weight of this LlamaForCausalLM; names look like model.embed",
    )
    refused(
        model, rules(("*_proj", INT8), ("*.q_proj", INT4)), r"pattern '\*.q_proj' never decides: earlier rules match all of its 2 weights"
    )
    refused(model, rules(("@experts", INT4)), r"the rules '@experts' quantize nothing in this LlamaForCausalLM")
    assert plan(model, rules(("@experts", INT4), ("*", INT8)))  # a role may have nothing to say about an architecture
    refused(nn.Sequential(nn.Conv2d(3, 8, 3)), Recipe.uniform("int8-row"), r"pattern '\*' matches no weight of this Sequential")


def test_routers_are_refused_with_the_way_out():
    model = tiny("mixtral")
    refused(model, rules(("*", INT4)), r"model.layers.0.mlp.gate is a router .*put \('@router', None\) first")


def test_half_an_expert_module_is_refused():
    match = r"experts.gate_up_proj gets int4-g32 but model.layers.0.mlp.experts.down_proj none; both stacks"
    refused(tiny("mixtral"), rules(("*.experts.gate_up_proj", INT4), min_expert_share=0.0), match)


def test_nan_is_found_before_any_work_and_named():
    model = tiny("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
        model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")
    refused(
        model,
        Recipe.uniform("int4-g32"),
        r"model.layers.1.mlp.experts.down_proj holds 2 NaN or infinite values of 4096: the checkpoint is broken",
    )


def test_a_weight_outside_float16_is_named():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e9
    with pytest.raises(ValueError, match=r"lm_head: a weight of magnitude 1e\+09 needs a scale above float16"):
        compress(model, Recipe.uniform("int4-g32"), progress=False)


def test_a_quantized_model_is_refused():
    c = compress(tiny("llama"), Recipe.uniform("int8-row"), progress=False)
    with pytest.raises(ValueError, match="this LlamaForCausalLM is quantized already; compress the floating-point model it came from"):
        compress(c.model, Recipe.uniform("int4-g32"), progress=False)


# --------------------------------------------------------------------------------------------------------- audit


def test_experts_left_alone_fail_the_audit_unless_the_recipe_accepts_it():
    model = tiny("mixtral")
    match = r"0.0% of the expert parameters were quantized, .*=100.0%. Left alone: model.layers.0.mlp.experts.gate_up_proj \(4, 128, 32\)"
    with pytest.raises(ValueError, match=match):
        compress(model, rules(("@attention", INT4)), progress=False)
    assert compress(model, rules(("@attention", INT4), min_expert_share=0.0), progress=False).coverage.expert_share == 0
    half = rules(("model.layers.0.*.experts.*", INT4), min_expert_share=0.5)
    assert compress(model, half, progress=False).coverage.expert_share == 0.5
    with pytest.raises(ValueError, match=r"50.0% of the expert parameters .* min_expert_share=60.0%"):
        compress(model, rules(("model.layers.0.*.experts.*", INT4), min_expert_share=0.6), progress=False)


def test_an_unknown_family_is_never_skipped_in_silence(monkeypatch):
    model = tiny("olmoe")
    monkeypatch.delitem(FAMILIES, "olmoe")
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj .*model_type 'olmoe' is not in edgelab.model.FAMILIES; .*FAMILIES\['olmoe'\] = Family\("
    ):
        compress(model, Recipe.uniform("int4-g32"), progress=False)
    monkeypatch.setitem(FAMILIES, "olmoe", Family("olmoe", ExpertLayout()))  # the way out that the text gives
    assert compress(model, Recipe.uniform("int4-g32"), progress=False).coverage.expert_share == 1.0


def test_coverage_shows_itself_and_round_trips():
    c = compress(tiny("deepseek_v3"), Recipe.uniform("int4-g32"), progress=False).coverage
    lines = c.table()
    assert [line["role"] for line in lines][-1] == "all" and {"embedding", "experts", "router"} <= {line["role"] for line in lines}
    assert lines[-1]["parameters"] == f"{c.parameters:,}"
    assert "<table>" in c._repr_html_() and "100.0% of the expert parameters" in repr(c)
    assert Coverage.from_dict(c.with_file_bytes(12345).to_dict()) == c.with_file_bytes(12345)
    assert c.file_error is None and c.with_file_bytes(2 * c.predicted_bytes).file_error == 1.0


def test_deepcopy_of_a_compressed_model():
    c = compress(tiny("deepseek_v3"), Recipe.uniform("int4-g32"), progress=False)
    assert torch.equal(copy.deepcopy(c.model)(IDS).logits, c.model(IDS).logits)
    assert not weights(c.model)[0].tensor.is_meta  # what is left: the routers


def test_the_number_of_walks_does_not_depend_on_the_number_of_layers(monkeypatch):
    import edgelab.model

    calls = []
    for name in ("_places", "_forget_ties", "_head_name"):
        original = getattr(edgelab.model, name)
        monkeypatch.setattr(edgelab.model, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    counts = []
    for n in (3, 9):
        calls.clear()
        result = compress(nn.Sequential(*(nn.Linear(8, 8) for _ in range(n))), Recipe.uniform("int8-row"), progress=False).model
        edgelab.model.dequantize(result)
        counts.append(sorted(calls))
    assert counts[0] == counts[1] and counts[0].count("_forget_ties") == 1 and counts[0].count("_places") == 2


def test_a_rule_for_all_that_reaches_little_warns_with_reasons():
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.warns(UserWarning, match=r"quantized only .*FalconLinear computes with its weight in a way of its own"):
        coverage = compress(transformers.FalconForCausalLM(config), Recipe.uniform("int8-row"), progress=False).coverage
    assert all(r.note for r in coverage if r.parameters and not r.touched and len(r.shape) >= 2)


@pytest.mark.filterwarnings("ignore:the rule")
def test_a_head_tied_to_an_embedding_of_another_kind_is_left_with_it():
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, head_dim=16
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    coverage = compress(model, Recipe.uniform("int4-g32"), progress=False).coverage
    assert coverage.parameters == sum(p.numel() for p in model.parameters())
    row = next(r for r in coverage if r.name == "model.embed_tokens.weight")
    assert not row.touched and "Gemma3TextScaledWordEmbedding" in row.note
