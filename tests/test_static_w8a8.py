"""Static W8A8: ranges chosen by measured effect, put into layers, and the integer arithmetic that they allow."""

import copy

import pytest
import torch
from test_model import CONFIGS, IDS, tiny

from edgelab import Quantize, Recipe, layers
from edgelab.blocks import calibrate
from edgelab.compress import compress
from edgelab.layers import QExperts, QLinear, round_inputs
from edgelab.methods.clip import RULES
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import dequantize, weights
from edgelab.ranges import STATIC, StaticRanges, apply_activations, model_klds, rounding, static_ranges, tapped
from edgelab.recipe import Smooth
from edgelab.scheme import ActScheme, QuantScheme

BATCHES = [torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))]
TENSOR, TOKEN = ActScheme.parse("a8-tensor"), ActScheme.parse("a8-token")


def inside(model) -> list[str]:
    return [w.name for w in weights(model) if w.kind in ("linear", "experts") and w.role not in ("head", "router")]


@pytest.fixture(scope="module")
def found():
    """(model, statistics, ranges by measured effect) of a tiny mixture of experts."""
    model = tiny("deepseek_v3")
    stats = calibrate(model, BATCHES, want=("histogram",), progress=False)
    return model, stats, static_ranges(model, stats, BATCHES, progress=False)


# ------------------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("family", CONFIGS)
def test_taps_that_change_nothing_change_nothing_and_go_away(family):
    model, seen = tiny(family), {}

    def look(name):
        def keep(x):
            seen[name] = tuple(x.shape)
            return x

        return keep

    before = dict(model.named_modules())
    with torch.no_grad():
        want = model(IDS).logits
        with tapped(model, {name: look(name) for name in inside(model)}):
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
        assert dict(model.named_modules()) == before and torch.equal(model(IDS).logits, want)
    shapes = {w.name: w.shape for w in weights(model)}
    assert set(seen) == set(inside(model)) and all(shape[-1] == shapes[name][-1] for name, shape in seen.items())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_rounding_at_a_tap_is_what_a_quantized_layer_does(family):
    """Weights in floating point and inputs rounded, against layers whose 8-bit weights are the same numbers."""
    model = tiny(family)
    quantized = compress(model, Recipe.body("int8-row"), progress=False).model
    model = copy.deepcopy(quantized)
    dequantize(model)
    scales = {name: 0.01 + 0.001 * i for i, name in enumerate(inside(model))}
    assert apply_activations(quantized, STATIC, scales) == len(scales)
    with torch.no_grad(), tapped(model, {name: rounding(s) for name, s in scales.items()}):
        torch.testing.assert_close(quantized(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_taps_refuse_what_they_cannot_reach():
    model = tiny("qwen3")
    says = r"'model.embed_tokens' is no linear layer or expert stack of this floating-point Qwen3"
    with pytest.raises(ValueError, match=says), tapped(model, {"model.embed_tokens": lambda x: x}):
        pass


# -------------------------------------------------------------------------------------------------------- the choice


def test_best_takes_the_least_effect_of_each_tensor_and_checks_the_whole(found):
    model, _, best = found
    assert list(best) == inside(model) and set(best.klds) == {"best", *RULES}
    assert best.klds[best.assignment] == min(best.klds.values())
    for name, effects in best.effects.items():
        if best.assignment == "best":
            assert effects[best.rules[name]] == min(effects.values())
        assert best[name] == best.ranges[name][best.rules[name]].threshold / 127
    again = model_klds(model, {"it": dict(best)}, BATCHES)["it"]
    assert again == pytest.approx(best.klds[best.assignment], rel=1e-6)
    for rule in RULES:
        assert dict(best.throughout(rule)) == {name: r[rule].scale for name, r in best.ranges.items()}


def test_the_ranges_are_those_of_the_inputs_that_the_model_really_sees(found):
    model, _, best = found
    largest = {}

    def look(name):
        def keep(x):
            largest[name] = float(x.abs().max())
            return x

        return keep

    with torch.no_grad(), tapped(model, {name: look(name) for name in best}):
        model(BATCHES[0])
    for name, found_max in largest.items():
        assert best.ranges[name]["max"].threshold == pytest.approx(found_max, rel=1e-5), name


def test_where_a_rare_huge_input_carries_meaning_kl_is_not_chosen():
    """One token whose activation of 200 decides the output: rules that clip it are seen to harm, rules that keep it are not."""
    model = tiny("qwen3")
    down = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[5].zero_()
        model.model.embed_tokens.weight[5, 0] = 4.0  # the token "5" is one large channel
        model.model.embed_tokens.weight[[i for i in range(96) if i != 5], 0] = 0
        for gate_or_up in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
            gate_or_up.weight *= 9  # the others reach beyond a sixteenth of it, the least threshold that KL considers
            gate_or_up.weight[:, 0] = 0
            gate_or_up.weight[7] = 0
            gate_or_up.weight[7, 0] = 3.0  # which inner channel 7 multiplies with itself: about (3 * 5.7)**2
        strong = 4 * down.weight[:, 7]
        down.weight *= 0.001  # what all other channels say is little beside it
        down.weight[:, 7] = strong
    ids = torch.randint(6, 96, (16, 16), generator=torch.Generator().manual_seed(0))
    ids[3, 4] = 5
    batches = [ids]
    stats = calibrate(model, batches, want=("histogram",), progress=False)
    best = static_ranges(model, stats, batches, progress=False)
    name = "model.layers.1.mlp.down_proj"
    by_rule, effects = best.ranges[name], best.effects[name]
    assert by_rule["max"].threshold > 100 and by_rule["kl"].threshold < 0.5 * by_rule["max"].threshold
    assert effects["kl"] > 3 * effects["max"] and best.rules[name] != "kl"


def test_weights_that_no_token_reached_are_left_alone():
    model = tiny("qwen3")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()  # so what o_proj reads is zeros
    stats = calibrate(model, BATCHES, want=("histogram",), progress=False)
    name = "model.layers.1.self_attn.o_proj"
    with pytest.warns(UserWarning, match=rf"no calibration token reached {name} with anything but zeros: their inputs stay"):
        ranges = static_ranges(model, stats, BATCHES, "max")
    assert ranges.left == (name,) and name not in ranges and len(ranges) == len(inside(model)) - 1
    quantized = compress(model, Recipe.body("int8-row"), progress=False).model
    assert apply_activations(quantized, STATIC, ranges) == len(ranges)
    assert quantized.model.layers[1].self_attn.o_proj.acts == {}


def test_what_static_ranges_refuse(found):
    model, stats, _ = found
    with pytest.raises(ValueError, match=r"rule='entropy' is not known; use one of max, percentile, mse, kl, or 'best'"):
        static_ranges(model, stats, BATCHES, "entropy")
    with pytest.raises(ValueError, match=r"act=a8-token finds its scale at run time"):
        static_ranges(model, stats, BATCHES, act=TOKEN)
    with pytest.raises(ValueError, match=r"stats has no histogram of the inputs of model.layers.0.mlp.up_proj; calibrate with want="):
        static_ranges(model, {}, BATCHES, names=["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"'model.norm' is no linear layer"):
        static_ranges(model, stats, BATCHES, "max", names=["model.norm"])
    with pytest.raises(ValueError, match=r"lm_head lies in no decoder block"):
        static_ranges(model, calibrate(model, BATCHES, want=("histogram",), progress=False), BATCHES, names=["lm_head"], progress=False)
    with pytest.raises(ValueError, match=r"rule='best' is not known"):
        static_ranges(model, stats, BATCHES, "max").throughout("best")


def test_the_table_says_what_won_and_by_how_much(found):
    _, _, best = found
    assert isinstance(best, StaticRanges) and "KLD in nats: best" in repr(best)
    line = best.table()[0]
    assert line["weight"] == next(iter(best)) and line["chosen"] in RULES
    assert f"({best.effects[line['weight']]['kl']:.1e})" in line["kl"]


# ---------------------------------------------------------------------------------------------------- into the model


def test_a_recipe_with_a_static_scheme_gives_a_model_near_the_original():
    model = tiny("deepseek_v3")
    with torch.no_grad():
        want = torch.log_softmax(model(IDS).logits, -1)
        for rule in ("best", "max"):
            recipe = Recipe.body("int8-row", activations="a8-static", ranges=rule)
            small = compress(model, recipe, calibration=BATCHES, progress=False).model
            acts = [act for m in small.modules() for act in getattr(m, "acts", {}).values()]
            assert len(acts) == len(inside(model)) and set(acts) == {STATIC}
            got = torch.log_softmax(small(IDS).logits, -1)
            assert 0 < float((want.exp() * (want - got)).sum(-1).median()) < 0.02


def test_some_layers_take_a_scale_per_token_and_the_others_a_stored_one():
    """Two steps: what reads gated products rounds them token by token, at run time; all else has ranges, on a smoothed model."""
    model, int8 = tiny("deepseek_v3"), QuantScheme.parse("int8-row")
    gated = Quantize((("@experts", int8), ("*down_proj", int8)), activations="a8-token")
    rest = Quantize((("@router", None), ("@embedding", None), ("@head", None), ("*", int8)), activations="a8-static", ranges="percentile")
    recipe = Recipe((Smooth(alpha=0.9, pairs=True), gated, rest))
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match="two steps of the recipe quantize"):
        compress(model, recipe, calibration=BATCHES, progress=False)
    others = [(name, int8) for name in inside(model) if not name.endswith("down_proj") and ".experts." not in name]
    recipe = Recipe((Smooth(alpha=0.9, pairs=True), gated, Quantize(tuple(others), activations="a8-static", ranges="best")))
    small = compress(model, recipe, calibration=BATCHES, progress=False).model
    acts = {f"{n}.{w}": act for n, m in small.named_modules() for w, act in getattr(m, "acts", {}).items()}
    assert len(acts) == len(inside(model))
    for name, act in acts.items():
        assert act == (TOKEN if "down_proj" in name or ".experts." in name else STATIC), name
    with torch.no_grad():
        want, got = (torch.log_softmax(m(IDS).logits, -1) for m in (model, small))
    assert 0 < float((want.exp() * (want - got)).sum(-1).median()) < 0.02


def test_activations_go_in_by_name_and_come_out_again():
    model = compress(tiny("deepseek_v3"), Recipe.body("int8-row"), progress=False).model
    with torch.no_grad():
        want = model(IDS).logits
        assert apply_activations(model, TOKEN) == 18
        rounded = model(IDS).logits
        assert not torch.equal(rounded, want)
        experts = model.model.layers[1].mlp.experts
        assert experts.acts == {"gate_up_proj": TOKEN, "down_proj": TOKEN}
        assert apply_activations(model, None) == 18 and torch.equal(model(IDS).logits, want)
        apply_activations(model, STATIC, {"model.layers.1.mlp.experts.down_proj": 0.5})
        assert experts.acts == {"down_proj": STATIC} and experts.down_act_scale.item() == 0.5
    with pytest.raises(ValueError, match=r"a8-static needs scales, as static_ranges finds them"):
        apply_activations(model, STATIC)
    with pytest.raises(ValueError, match=r"a8-token finds its scales itself"):
        apply_activations(model, TOKEN, {})
    with pytest.raises(ValueError, match=r"'lm_head' is no quantized linear layer or expert stack of this Deepseek"):
        apply_activations(model, TOKEN, names=["lm_head"])
    with pytest.raises(ValueError, match=r"scales has nothing of model.layers.0.mlp.up_proj"):
        apply_activations(model, STATIC, {}, ["model.layers.0.mlp.up_proj"])


# ------------------------------------------------------------------------------------------------ integer arithmetic


def kernels(layer, call) -> dict[str, torch.Tensor]:
    """What each way to compute gives."""
    outputs = {}
    with torch.no_grad():
        for name in layers.KERNELS:
            layer.kernel = name
            outputs[name] = call()
    return outputs


@pytest.mark.parametrize("text", ["int8-row", "uint8-row", "int4-row", "int3-row", "int8-tensor", "int8-g32"])
@pytest.mark.parametrize("act", ["a8-static", "a8-tensor", "a6-static"])
def test_linear_products_in_integers_are_those_of_the_rounded_numbers(text, act):
    g, act = torch.Generator().manual_seed(0), ActScheme.parse(act)
    scheme = QuantScheme.parse(text)
    layer = QLinear(round_to_nearest(torch.randn(48, 96, generator=g), scheme))
    x = torch.randn(5, 7, 96, generator=g) ** 3  # of very different sizes, row by row
    layer.round_input_of("weight", act, 0.02 if act.static else None)
    out = kernels(layer, lambda: layer(x))
    scale = out["torch"].abs().max()
    for name in ("numba", "numba-int8"):
        torch.testing.assert_close(out[name], out["torch"], rtol=0, atol=float(2e-6 * scale))
    layer.kernel = "numba-int8"
    assert layer._integer("weight") == (text != "int8-g32")
    layer.round_input_of("weight", None)
    with torch.no_grad():
        assert (layer(x) - out["torch"]).abs().max() > 1e-3 * scale  # the rounding was there


def test_expert_products_in_integers_are_those_of_the_rounded_numbers():
    g = torch.Generator().manual_seed(0)
    scheme = QuantScheme.parse("int8-row")
    stacks = [round_to_nearest(torch.randn(*shape, generator=g) / 8, scheme) for shape in ((4, 128, 96), (4, 96, 64))]
    layer = QExperts(*stacks, torch.nn.SiLU())
    x, index = torch.randn(30, 96, generator=g), torch.randint(0, 5, (30, 2), generator=g)  # 4 means none
    gates = torch.rand(30, 2, generator=g)
    layer.round_input_of("gate_up_proj", STATIC, 0.02)
    layer.round_input_of("down_proj", STATIC, 0.05)
    out = kernels(layer, lambda: layer(x, index, gates))
    assert out["torch"].abs().max() > 0.1
    for name in ("numba", "numba-int8"):
        # gate_up's rounding errors of 1e-7 may carry an input of down over the edge between two codes: rarely, and by one step
        away = (out[name] - out["torch"]).abs()
        assert away.median() < 1e-6 and (away > 1e-5).float().mean() < 0.05, name
    layer.kernel = "numba-int8"
    assert layer._integer("gate_up_proj", "down_proj")


def test_clipped_inputs_are_clipped_in_integers_too():
    weight = round_to_nearest(torch.eye(32), QuantScheme.parse("int8-row"))
    layer = QLinear(weight)
    layer.round_input_of("weight", STATIC, 0.01)
    layer.kernel = "numba-int8"
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 1], x[2, 2] = 50.0, -1.274, 0.0149
    with torch.no_grad():
        y = layer(x)
    assert [float(y[i, i]) for i in range(3)] == pytest.approx([1.27, -1.27, 0.01], rel=1e-3)
    ref = round_inputs(x, STATIC, torch.tensor(0.01)) @ torch.from_numpy(weight.dequantize()).mT
    torch.testing.assert_close(y, ref, rtol=1e-5, atol=1e-7)
