"""The Prune step on whole models: every family, in order, what it refuses, and that the methods are worth their name."""

import copy
import re

import pytest
import torch
from test_model import CONFIGS, tiny

from edgelab import Gptq, Hqq, Prune, QuantScheme, Recipe, Rtn
from edgelab.blocks import walk
from edgelab.compress import compress
from edgelab.fit import fit
from edgelab.methods.calibrate import shrink
from edgelab.methods.prune import keep, keep_n_of_m, sparsegpt, wanda
from edgelab.methods.sparse import encode
from edgelab.model import dequantize, quantized, weights
from edgelab.recipe import AutoRound
from edgelab.sparsify import prune, storage_table

BATCHES = [torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(3)]
BODY = ("attention", "mlp", "experts", "shared", "linear")


def run(model, step: Prune) -> list[str]:
    return prune(model, step, BATCHES, progress=False)


def zeros(w) -> float:
    return float((w.tensor == 0).float().mean())


def naive(model, step: Prune) -> None:
    """Block after block: statistics as the walk gives them, then each matrix by itself."""
    for item in walk(model, BATCHES, want=("xx",), sequential=True, progress=False):
        for w in weights(model):
            if w.name not in item.stats or w.role not in BODY:
                continue
            stats = item.stats[w.name]
            stats = shrink(stats) if stats.experts else stats
            matrices = range(w.shape[0]) if stats.experts else [...]
            for e in matrices:
                if step.method == "wanda":
                    scores = wanda(w.tensor[e], stats.sum_sq[e])
                    mask = keep(scores, step.sparsity) if step.pattern == "unstructured" else keep_n_of_m(scores, 2, 4)
                    w.tensor[e] = w.tensor[e] * mask
                else:
                    w.tensor[e] = sparsegpt(w.tensor[e], stats.xx[e], n_of_m=None if step.pattern == "unstructured" else (2, 4))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_blocks_are_pruned_behind_pruned_ones_and_experts_by_their_own_tokens(family, method, pattern):
    model, step = tiny(family), Prune(0.5, method=method, pattern=pattern)
    ref = copy.deepcopy(model)
    told = run(model, step)
    naive(ref, step)
    for (name, p), q in zip(model.named_parameters(), ref.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    assert "50.00 %" in told[-1] and f"{method}, {'uniform' if pattern == 'unstructured' else '2:4'}" in told[-1]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_is_pruned_where_it_should_be(family):
    model = tiny(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for method in ("magnitude", "wanda", "sparsegpt"):
        again = copy.deepcopy(model)
        run(again, Prune(0.5, method=method))
        for w in weights(again):
            if w.role in BODY:
                assert zeros(w) == 0.5, w
                if method != "sparsegpt":
                    assert torch.equal(w.tensor[w.tensor != 0], dict_of(model)[w.name][w.tensor != 0])
            else:
                assert torch.equal(w.tensor, dict_of(model)[w.name]), w
        assert torch.isfinite(again(BATCHES[0]).logits).all()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def dict_of(model) -> dict:
    return {w.name: w.tensor for w in weights(model)}


SCHEDULED = [(s, m) for s in ("uniform", "global", "sensitivity") for m in ("magnitude", "wanda", "sparsegpt")]


@pytest.mark.parametrize(("schedule", "method"), [pair for pair in SCHEDULED if pair != ("global", "sparsegpt")])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_total_is_what_was_asked_for(schedule, method, sparsity):
    model = tiny("deepseek_v3")
    run(model, Prune(sparsity, method=method, schedule=schedule))
    body = [w for w in weights(model) if w.role in BODY]
    matrices = sum(w.shape[0] if len(w.shape) == 3 else 1 for w in body)
    total, count = sum(int((w.tensor == 0).sum()) for w in body), sum(w.tensor.numel() for w in body)
    assert abs(total - sparsity * count) <= (1 if schedule == "global" else matrices)
    if schedule != "uniform" and sparsity == 0.37:
        shares = [zeros(w) for w in body]
        assert max(shares) - min(shares) > 0.02


def test_global_is_one_threshold():
    model = tiny("llama")
    before = dict_of(copy.deepcopy(model))
    run(model, Prune(0.6, method="magnitude", schedule="global"))
    body = [w for w in weights(model) if w.role in BODY]
    gone, left = (torch.cat([before[w.name][(w.tensor == 0) == z].abs() for w in body]) for z in (True, False))
    assert gone.max() < left.min()


def test_threshold():
    model = tiny("llama")
    before = dict_of(copy.deepcopy(model))
    run(model, Prune(threshold=0.05, method="magnitude", select="@mlp"))
    for w in weights(model):
        expected = before[w.name].masked_fill(before[w.name].abs() < 0.05, 0.0) if w.role == "mlp" else before[w.name]
        assert torch.equal(w.tensor, expected)


def test_sensitivity_spares_what_counts():
    """A block whose output is multiplied by nearly nothing can be spared less than the other."""
    model = tiny("llama")
    with torch.no_grad():
        for w in weights(model):
            if w.name.startswith("model.layers.1.") and w.name.endswith(("o_proj", "down_proj")):
                w.tensor.mul_(1e-3)
    told = run(model, Prune(0.5, method="wanda", schedule="sensitivity"))
    share = {i: [zeros(w) for w in weights(model) if w.name.startswith(f"model.layers.{i}.")] for i in (0, 1)}
    assert min(share[1]) > 0.6 and max(share[0]) < 0.55
    assert any(r.startswith("sensitivity gives") for r in told)


# ------------------------------------------------------------------------------------------------- selection and ties


def test_a_tied_head_follows_its_embedding_and_is_pruned_by_what_it_reads():
    model = tiny("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.lm_head.weight.detach().clone()
    run(model, Prune(0.5, method="wanda", select="@embedding"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float((model.lm_head.weight == 0).float().mean()) == 0.5
    assert not torch.equal(model.lm_head.weight == 0, ~keep(before.abs(), 0.5))  # wanda's, not magnitude's
    with pytest.raises(ValueError, match=re.escape("select: 'lm_head' matches lm_head, which is tied to model.embed_tokens; select")):
        run(model, Prune(0.5, select="lm_head"))


def test_an_embedding_has_no_inputs():
    model = tiny("llama")
    before = model.model.embed_tokens.weight.detach().clone()
    told = run(model, Prune(0.5, method="sparsegpt", select="@embedding"))
    assert torch.equal(model.model.embed_tokens.weight == 0, ~keep(before.abs(), 0.5, "matrix"))
    assert "pruned by magnitude" in told[0] and "model.embed_tokens" in told[0]


def test_experts_that_no_token_reached():
    model = tiny("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    told = run(model, Prune(0.5, method="sparsegpt"))
    assert any("2 saw none: [2, 3]" in r for r in told)
    experts = model.model.layers[1].mlp.experts
    assert all((p == 0).float().mean((1, 2)).eq(0.5).all() for p in (experts.gate_up_proj, experts.down_proj))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Prune(select="@router"), "select: '@router' selects the router model.layers.1.mlp.gate"),
        (Prune(select="*.qqq"), "select: '*.qqq' matches no weight of this DeepseekV3ForCausalLM"),
        (Prune(pattern="2:3"), "pattern 2:3 does not divide in_features=32"),
        (Prune(), "method='wanda', schedule='uniform' of Prune needs calibration data"),
        (Prune(method="magnitude", schedule="sensitivity"), "schedule='sensitivity' of Prune needs calibration data"),
    ],
)
def test_refused_before_any_work(step, text):
    model = tiny("deepseek_v3")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(text)):
        prune(model, step, None, progress=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    if "calibration" not in text:
        with pytest.raises(ValueError, match=re.escape(text)):
            prune(copy.deepcopy(model).to("meta"), step, None, progress=False)


def test_nan_is_refused_before_any_work():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = dict_of(copy.deepcopy(model))
    with pytest.raises(ValueError, match=re.escape("model.layers.1.mlp.down_proj holds 1 NaN")):
        prune(model, Prune(method="magnitude"), None, progress=False)
    assert torch.equal(dict_of(model)["model.layers.0.self_attn.q_proj"], before["model.layers.0.self_attn.q_proj"])


def test_on_the_meta_device_only_the_checks_are_done():
    assert prune(tiny("deepseek_v3").to("meta"), Prune(pattern="4:8", method="sparsegpt"), None, progress=False) == []


def test_a_glob_that_holds_a_router_leaves_it_out_and_says_so():
    model = tiny("deepseek_v3")
    told = run(model, Prune(1.0, method="magnitude", select="model.layers.1.*"))
    assert told[0] == "routers are not pruned: model.layers.1.mlp.gate" and (dict_of(model)["model.layers.1.mlp.gate"] != 0).all()
    assert told[-1].startswith("nothing is left of ") and "100.00 %" in told[-2]
    assert zeros(next(w for w in weights(model) if w.name.endswith("layers.0.mlp.up_proj"))) == 0


# ------------------------------------------------------------------------------------------------- zeros behind codes


@pytest.mark.parametrize("method", [Gptq(mse_grid=8), Gptq(mse_grid=0, act_order=False, rounds=0), Rtn(mse_grid=16), Rtn(weighted=True)])
def test_2_of_4_holds_exactly_in_the_codes(method):
    model = tiny("deepseek_v3")
    recipe = Recipe((Prune(pattern="2:4", method="sparsegpt"), *Recipe.body("int4-g32", method=method).steps))
    made = compress(model, recipe, calibration=BATCHES, progress=False)
    assert quantized(made.model)
    for _, q in quantized(made.model).values():
        values = torch.from_numpy(q.dequantize())
        assert int((values != 0).unflatten(-1, (-1, 4)).sum(-1).max()) <= 2
        encode(q, "n:m")  # would refuse
    dequantize(made.model)
    assert all(zeros(w) >= 0.5 for w in weights(made.model) if w.role in BODY)


def test_schemes_and_methods_that_hold_no_zero_are_refused():
    model = tiny("llama")
    run(model, Prune(method="magnitude"))
    names = [w.name for w in weights(model) if w.role == "mlp"]
    before = copy.deepcopy(model.state_dict())
    for scheme, method, text in (
        ("uint4-g32", Rtn(), f"{names[0]}: keep_zeros=True, but uint4-g32 has no exact zero for its 1,024 pruned weights"),
        ("uint4-g32", Gptq(), "use int4-g32"),
        ("int4-g32", AutoRound(), "keep_zeros=True: autoround learns which way to round"),
        ("uint4-g32", Hqq(), "keep_zeros=True: hqq fits an offset"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            fit(model, dict.fromkeys(names, QuantScheme.parse(scheme)), method, BATCHES, False, keep_zeros=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    untouched = tiny("llama")  # no zeros: nothing to keep
    fit(untouched, dict.fromkeys(names, QuantScheme.parse("uint4-g32")), Rtn(), None, False, keep_zeros=True)


def test_prune_composes_in_a_recipe_and_says_what_it_did():
    recipe = Recipe((Prune(0.25, method="wanda"), Prune(0.5, method="sparsegpt"), *Recipe.body("int8-g32").steps))
    made = compress(tiny("qwen3_moe"), recipe, calibration=BATCHES, progress=False)
    assert [r for r in made.remarks if r.startswith("pruned (wanda, uniform)") and "25.00 %" in r]
    assert [r for r in made.remarks if r.startswith("pruned (sparsegpt, uniform)")]


# ------------------------------------------------------------------------------------------------------------- storage


def test_storage_table_counts_what_encode_makes():
    model = tiny("deepseek_v3")
    run(model, Prune(pattern="2:4", method="magnitude"))
    rows = {r.format: r for r in storage_table(model, block=(8, 8))}
    body = [w for w in weights(model) if w.role in BODY]
    count = sum(w.tensor.numel() for w in body)
    assert rows["float16"].bytes == 2 * count and rows["float16"].of_float16 == 1
    for name, form in (("bitmap float16", "bitmap"), ("csr float16", "csr"), ("2:4 float16", "n:m"), ("bsr 8x8 float16", "bsr")):
        assert rows[name].bytes == sum(encode(w.tensor, form, kind="float16", block=(8, 8)).nbytes for w in body), name
    assert rows["bitmap float16"].bits_per_weight == 9 and rows["int4-g32"].bits_per_weight == 4.5
    assert rows["bitmap int4-g32"].bits_per_weight <= 3.5 and rows["bitmap float16"].of_int4 == 2
    assert "2:4 float16" not in {r.format for r in storage_table(tiny("deepseek_v3"))}
    with pytest.raises(ValueError, match="matches no floating-point weight"):
        storage_table(model, select=("*.qqq",))


# ------------------------------------------------------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def trained():
    from edgelab import corpus, load
    from edgelab.data import calibration_batches
    from edgelab.model import load_tokenizer
    from edgelab.paths import data_dir

    folder = data_dir() / "edge-dense"
    tokenizer, splits = load_tokenizer(folder), corpus()
    seen = calibration_batches(tokenizer, splits["calibration"], tokens=4096, context=256)
    other = calibration_batches(tokenizer, splits["test"], tokens=1024, context=128)
    return load(folder), seen, other


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_data_beats_magnitude_and_answering_beats_that(trained, pattern):
    model, seen, other = trained

    def kld(method: str) -> float:
        made = copy.deepcopy(model)
        prune(made, Prune(0.5, method=method, pattern=pattern), seen, progress=False)
        with torch.inference_mode():
            pairs = [[torch.log_softmax(m(ids).logits.float(), -1) for m in (model, made)] for ids in other]
        return sum(float((p.exp() * (p - q)).sum()) for p, q in pairs) / sum(ids.numel() for ids in other)

    magnitude, by_inputs, answered = kld("magnitude"), kld("wanda"), kld("sparsegpt")
    assert answered < by_inputs < magnitude, (magnitude, by_inputs, answered)
