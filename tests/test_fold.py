"""Folding changes no output, and says why what stays stays; a fallback changes every place, and its cost is what it is measured to be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.special import lambertw
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MobileNetV1Config,
    MobileNetV1Model,
    Qwen3MoeConfig,
    ResNetConfig,
    ResNetModel,
)
from transformers.activations import ACT2FN

from edgelab import fold as folding
from edgelab.compress import compress
from edgelab.fold import (
    KINDS,
    RULES,
    Fallback,
    activations,
    fall_back,
    fallback_for,
    fallback_table,
    fold,
    folded_weight,
    kind_of,
    operators,
)
from edgelab.model import dequantize, load, weights
from edgelab.paths import data_dir
from edgelab.recipe import Recipe


def lived(model: nn.Module) -> nn.Module:
    """`model` in eval mode, its norms with statistics and weights as training leaves them."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            if m.weight is not None:
                nn.init.uniform_(m.weight, -1.5, 1.5)
                nn.init.normal_(m.bias)
    return model.eval()


def why(model: nn.Module, *args) -> str:
    """Why the one norm of `model` stays."""
    (left,) = fold(model, *args).left
    return left.why


# --------------------------------------------------------------------------------------------------------------- folding

LAYERS = [
    (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    (nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 7, 7)),
    (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 7, 7)),
    (nn.Conv2d(6, 12, 3, groups=6, stride=2, padding=1), (2, 6, 7, 7)),  # depthwise, two outputs each
    (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", dilation=1), (2, 6, 7, 7)),
    (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(6, 8, 3), (2, 6, 9)),
    (nn.ConvTranspose2d(6, 8, 3, stride=2, bias=False), (2, 6, 5, 5)),
    (nn.ConvTranspose2d(6, 9, 3, groups=3), (2, 6, 5, 5)),
    (nn.Linear(6, 8), (5, 6)),
    (nn.Linear(6, 8, bias=False), (5, 6)),
]
NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d, 2: nn.BatchNorm1d}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:60])
def test_every_layer_folds_exactly(layer, shape, affine):
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    net = lived(nn.Sequential(copy.deepcopy(layer), NORMS[len(shape)](channels, affine=affine), nn.ReLU()).double())
    x = torch.randn(shape, dtype=torch.float64)
    found = fold(net, x)
    assert [(f.layer, f.norm, f.relu) for f in found.folds] == [("0", "1", "2")] and not found.left
    assert isinstance(found.model[1], nn.Identity) and isinstance(net[1], nn.modules.batchnorm._BatchNorm)
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-12, atol=1e-12)
    single = fold(copy.deepcopy(net).float(), x.float()).model(x.float())
    torch.testing.assert_close(single.double(), net(x), rtol=1e-5, atol=1e-5)  # float32: 2**-24 times some hundred terms


@pytest.mark.parametrize(
    ("layer", "shape"), [x for x in LAYERS if getattr(x[0], "groups", 1) == 1 or not getattr(x[0], "transposed", False)]
)
def test_weights_are_those_of_torch_own_fusion(layer, shape):
    norm = lived(NORMS[len(shape)](layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)).double()
    layer = copy.deepcopy(layer).double().eval()
    linear = isinstance(layer, nn.Linear)
    ref = fuse_linear_bn_eval(layer, norm) if linear else fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
    weight, bias = folded_weight(layer, norm)
    torch.testing.assert_close(weight, ref.weight.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bias, ref.bias.detach(), rtol=1e-12, atol=1e-14)


def test_training_mode_and_models_without_norms_are_refused():
    with pytest.raises(ValueError, match=r"1 is in training mode.* call model.eval\(\) first"):
        fold(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    with pytest.raises(ValueError, match="no batch norm in this Sequential"):
        fold(nn.Sequential(nn.Conv2d(1, 2, 1)).eval())


class Net(nn.Module):
    """conv, norm, and a forward of the test's own."""

    def __init__(self, forward, conv=None, norm=None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 1)
        self.norm = norm or nn.BatchNorm2d(3)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def plain(m, x):
    return m.norm(m.conv(x))


def branchy(m, x):  # torch.fx can't follow a branch on values
    return plain(m, x) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (Net(lambda m, x: m.norm(m.conv(x)) + m.conv(x)), "conv is used 2 times"),
        (Net(lambda m, x: m.norm(m.norm(m.conv(x)))), "norm is used 2 times"),
        (Net(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x))), "conv also feeds add"),
        (Net(lambda m, x: m.norm(m.conv(x).relu())), "reads relu, no convolution"),
        (Net(lambda m, x: m.conv(m.norm(x))), "reads x, no convolution"),
        (Net(lambda m, x: m.norm(m.conv(x)) * m.conv.bias.sum()), "forward reads the parameters of conv by itself"),
        (Net(plain, norm=nn.BatchNorm2d(3, track_running_stats=False)), "no running statistics"),
        (Net(plain, conv=OwnConv(3, 3, 1)), r"conv \(OwnConv\) is a subclass with a forward of its own"),
        (Net(plain, conv=parametrizations.weight_norm(nn.Conv2d(3, 3, 1))), "conv is parametrized"),
        (Net(branchy), "in a part that torch.fx can't trace, or not at all"),
        (Net(lambda m, x: m.conv(x)), "or not at all"),
    ],
)
def test_what_can_not_be_folded_stays_and_says_why(net, says):
    net = lived(net)
    x = torch.randn(2, 3, 4, 4)
    found = fold(net)
    assert not found.folds and len(found.left) == 1
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found.left[0].why)
    torch.testing.assert_close(found.model(x), net(x), rtol=0, atol=0)


def test_hooks_and_shared_weights_stay():
    net = lived(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    net[0].register_forward_hook(lambda m, i, o: o)
    assert "0 has forward hooks" in why(net)
    twins = lived(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    twins[2].weight = twins[0].weight
    assert "the weight of 0 is shared" in why(twins)


def test_a_linear_layer_needs_an_example_and_must_be_flat():
    net = lived(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert "only where its output is [N, C]; pass example=" in why(net)
    assert fold(net, torch.randn(3, 5)).folds
    # [N, 4, 4]: the norm normalizes dimension 1, which happens to be as long; torch's own fusion would get this wrong
    x = torch.randn(3, 4, 5)
    assert "on the example it is [3]-dimensional" in why(net, x)
    wrong = fuse_linear_bn_eval(copy.deepcopy(net[0]), net[1])
    assert not torch.allclose(wrong(x), net(x), atol=0.1)


class Outer(nn.Module):
    """Can't be traced as a whole; its parts can. `twice`: the forward also calls a part's convolution by itself."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3))
        self.twice = twice

    def forward(self, x):
        for block in self.blocks:
            if float(x.detach().abs().max()) > 1e9:
                return x
            x = block(x) + (block[0](x) if self.twice else 0)
        return x


def test_parts_of_what_can_not_be_traced_fold_with_an_example_only():
    net, x = lived(Outer(twice=False)), torch.randn(2, 3, 6, 6)
    assert not fold(net).folds and all("can't trace the whole model" in x.why for x in fold(net).left)
    found = fold(net, x)
    assert len(found.folds) == 3 and not found.left and 0 <= found.max_abs_diff < 1e-4
    assert repr(found).startswith("Folded(3 norms folded, 3 with a ReLU behind; 0 left, outputs differ by")
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_wrong_fold_is_found_on_the_example():
    with pytest.raises(ValueError, match=r"the folded Outer differs by .* on the example"):
        fold(lived(Outer(twice=True)), torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("make", "norms", "relus"),
    [
        (lambda: MobileNetV1Model(MobileNetV1Config(image_size=32, depth_multiplier=0.25, hidden_act="relu", tf_padding=False)), 27, 27),
        (lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")), 8, 4),
    ],
)
def test_vision_models_of_transformers_fold_whole(make, norms, relus):
    net, x = lived(make()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for m in net.modules():  # statistics that fit the weights, or 27 layers overflow or vanish
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
                m.reset_running_stats()
                nn.init.uniform_(m.weight, 0.5, 1.5)
        net.train()(torch.randn(8, 3, 32, 32))
    found = fold(net.eval(), x)
    assert len(found.folds) == norms and not found.left and sum(f.relu is not None for f in found.folds) == relus
    a, b = net(x).last_hidden_state, found.model(x).last_hidden_state
    assert a.std() > 0.05
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert any("batch_norm" in name for name in operators(net, x)) and not any("batch_norm" in name for name in operators(found.model, x))


# -------------------------------------------------------------------------------------------------------------- fallback


def test_gaps_are_what_they_are_known_to_be():
    gap = {str(r): r.gap for r in RULES}
    assert gap["silu -> relu"] == pytest.approx(float(lambertw(1 / torch.e).real), abs=1e-6)  # the depth of SiLU: W(1/e)
    assert gap["silu -> hardswish"] == pytest.approx(3 - 3 / (1 + torch.e**-3), abs=1e-6)  # at 3
    for r in RULES:
        assert (r.gap < 1e-13) == r.exact, r
    scaled, quick = gap["silu -> scaled_gelu"], gap["gelu -> quick_gelu"]
    assert scaled == pytest.approx(1.702 * quick, rel=1e-3) and gap["silu -> gelu"] > 5 * scaled


@pytest.mark.parametrize("name", [*(k.config for k in KINDS.values() if k.config), "swish", "gelu_new", "gelu_python"])
def test_what_transformers_calls_an_activation_is_known_by_its_function(name):
    module, x = ACT2FN[name], torch.linspace(-9, 9, 999, dtype=torch.float64)
    kind = kind_of(module)
    torch.testing.assert_close(KINDS[kind].function(x), module(x), rtol=1e-6, atol=1e-6)


def test_kinds_of_functions_and_of_what_is_none():
    assert [kind_of(f) for f in (F.silu, F.gelu, torch.relu, nn.GELU(approximate="tanh"), nn.ReLU6(), nn.Linear(1, 1), "silu", None)] == [
        "silu", "gelu", "relu", "gelu_tanh", None, None, None, None,
    ]  # fmt: skip


def test_the_rule_for_a_runtime():
    assert fallback_for("silu", {"Swish", "Gelu"}) is None
    assert str(fallback_for("silu", {"HardSwish", "Gelu", "Relu"})) == "silu -> hardswish"  # 0.142 < 0.193 < 0.278
    assert str(fallback_for("gelu", {"Mul", "Add", "Erf", "Tanh"})) == "gelu -> gelu_erf"
    with pytest.raises(ValueError, match=r"no rule replaces hardswish with only Relu.* mul_relu6: Add, Clip, Mul"):
        fallback_for("hardswish", {"Relu"})
    with pytest.raises(ValueError, match="'sulu' is no activation"):
        fallback_for("sulu", {"Relu"})
    with pytest.raises(ValueError, match=r"'silu to gelu' is not of the form 'source -> target'"):
        folding.parse("silu to gelu")
    with pytest.raises(ValueError, match="'prelu' is no activation"):
        Fallback("silu", "prelu")


def test_operators_are_those_of_onnx():
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    since = {name: onnx.defs.get_schema(name).since_version for kind in KINDS.values() for name in kind.operators}
    assert since["Swish"] == 24 and since["Gelu"] == 20  # our files are of opset 20: SiLU has no operator of its own there


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2, "num_hidden_layers": 2}
CONFIGS = {
    "deepseek": lambda **more: DeepseekV3Config(
        **SMALL, first_k_dense_replace=1, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, **more,
    ),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **SMALL, intermediate_size=96, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **more
    ),
}  # fmt: skip
IDS = torch.arange(20).reshape(2, 10) * 4


def tiny(name: str, **more) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**more)).float().eval()
    for p in model.parameters():
        p.data *= 3 if p.ndim > 1 else 1  # so that activations leave the range where all of them look linear
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fallback_is_the_model_that_its_config_would_have_made(name):
    model, before = tiny(name), logits(tiny(name))
    found = fall_back(model, "silu -> gelu")
    torch.testing.assert_close(logits(found.model), logits(tiny(name, hidden_act="gelu")), rtol=0, atol=0)
    assert (logits(found.model) - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)  # the original is as it was
    assert model.config.hidden_act == "silu" and found.model.config.hidden_act == "gelu"
    assert any("experts.act_fn" in place for place in found.changed) and "config.hidden_act" in found.changed
    assert "silu" in operators(model, input_ids=IDS) and "silu" not in operators(found.model, input_ids=IDS)
    assert [p.data_ptr() for p in found.model.parameters()] == [p.data_ptr() for p in model.parameters()]


def test_a_saved_copy_comes_back_with_it(tmp_path):
    found = fall_back(tiny("qwen3_moe"), "silu -> gelu_tanh")
    found.model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), logits(found.model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("r", [r for r in RULES if r.source == "silu"], ids=str)
def test_an_exact_rule_costs_nothing_and_another_something(r):
    model = tiny("deepseek")
    found = fall_back(model, r)
    diff = float((logits(found.model) - logits(model)).abs().max())
    assert (diff < 1e-4) == r.exact, diff
    assert "silu" not in operators(found.model, input_ids=IDS)
    says = [n for n in found.notes if f"no name for {r.target}" in n]
    assert bool(says) == (KINDS[r.target].config is None and not r.exact)


def test_quantized_experts_leave_the_kernel_that_has_silu_built_in():
    model = compress(tiny("deepseek"), Recipe.uniform("int8-row"), progress=False).model
    logits(model)  # lays the weights out for the kernels
    found = fall_back(model, "silu -> gelu").model
    views = [[id(v) for m in (net.model.layers[1].mlp.experts,) for v in m._views.values()] for net in (model, found)]
    assert views[0] and views[0] == views[1]  # nothing of the size of a weight is copied
    experts = found.model.layers[1].mlp.experts
    assert kind_of(experts.act_fn) == "gelu" and not experts._is_swiglu and model.model.layers[1].mlp.experts._is_swiglu
    ref = tiny("deepseek", hidden_act="gelu")
    plain_weights = copy.deepcopy(model)
    dequantize(plain_weights)
    ref.load_state_dict(plain_weights.state_dict())
    torch.testing.assert_close(logits(found), logits(ref), rtol=0.05, atol=0.05)  # int8 activations in the kernels
    assert (logits(found) - logits(model)).abs().max() > 0.2
    dequantize(found)  # what a quantized layer came from keeps the new activation too
    torch.testing.assert_close(logits(found), logits(ref), rtol=1e-4, atol=1e-4)
    assert len(weights(found)) == len(weights(ref))


def test_what_a_forward_calls_by_itself_is_not_found_but_seen():
    class Own(nn.Module):
        def forward(self, x):
            return F.silu(x)

    assert activations(Own()) == {} and operators(Own(), torch.ones(3)) == {"silu": 1}
    with pytest.raises(ValueError, match=r"rule silu -> gelu: this Own holds no silu; it holds no activation that is known"):
        fall_back(Own(), "silu -> gelu")

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = F.silu  # a function, no module

        def forward(self, x):
            return self.act(x)

    found = fall_back(Kept(), "silu -> relu")
    assert found.changed == ("act",) and operators(found.model, torch.ones(3)) == {"relu": 1}


def test_what_it_costs_the_embedded_model():
    from datasets import Dataset
    from transformers import AutoTokenizer

    where = data_dir() / "edge-moe"
    model, tokenizer = load(where), AutoTokenizer.from_pretrained(where)
    docs = [d for f in (copy.copy, copy.deepcopy, pytest.approx, F.gelu, torch.relu, Dataset.map) if (d := (f.__doc__ or "")[:900])]
    asked = {"prompt": "2 + 3 = ", "answer": "5"}
    rows = [{"text": d, "domain": "prose", "prompt": "", "answer": ""} for d in docs]
    rows += [{"text": asked["prompt"] + asked["answer"], "domain": "arithmetic"} | asked]
    table = fallback_table(model, tokenizer, Dataset.from_list(rows), ["silu -> mul_sigmoid", "silu -> gelu", "silu -> scaled_gelu"])
    cost = {row["rule"]: row for row in table if row["on"] == "all"}
    assert cost["silu -> mul_sigmoid"]["kld"] < 1e-6
    assert cost["silu -> gelu"]["kld"] > 5 * cost["silu -> scaled_gelu"]["kld"] > 5e-6
    assert cost["silu -> gelu"]["kld_low"] <= cost["silu -> gelu"]["kld"] <= cost["silu -> gelu"]["kld_high"]
    answers = [row for row in table if row["on"] == "answers"]
    assert len(answers) == 3 and all(0 <= row["exact_match"] <= 1 and "exact_match_original" in row for row in answers)
