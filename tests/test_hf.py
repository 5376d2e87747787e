"""transformers and edgelab: quantizing while a checkpoint is read, and reading back what rounds its inputs."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import CONFIGS, IDS, tiny
from torch import nn

from edgelab import Quantize, QuantScheme, Recipe
from edgelab.bundle import load_bundle, save_bundle
from edgelab.compress import compress
from edgelab.hf import EdgeLabConfig, activations_of, adopt
from edgelab.layers import QExperts, QLinear, Quantized
from edgelab.model import quantized, stored_tensors
from edgelab.recipe import Gptq, Rtn, Smooth
from edgelab.scheme import ActScheme

Auto = transformers.AutoModelForCausalLM


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: directory} of tiny float32 models as save_pretrained writes them."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return made[family]

    return of


def schemes(model):
    return {name: str(q.scheme) for name, (_, q) in quantized(model).items()}


# ----------------------------------------------------------------------------------------------- quantize on load


@pytest.mark.parametrize("family", CONFIGS)
def test_quantizing_on_load_equals_load_then_compress(family, checkpoints, tmp_path):
    there = checkpoints(family)
    model = Auto.from_pretrained(there, quantization_config=EdgeLabConfig(scheme="int4-g32"))
    want = compress(Auto.from_pretrained(there), Recipe.uniform("int4-g32"), progress=False)
    assert torch.equal(logits(model), logits(want.model)) and not model.training
    held = model.hf_quantizer
    assert held.recipe == want.recipe and held.coverage.rows == want.coverage.rows
    assert held.coverage.expert_share in (None, 1.0)
    model.save_pretrained(tmp_path / "plain")
    save_bundle(model, None, tmp_path / "bundle", recipe=held.recipe, coverage=held.coverage)
    for back in (Auto.from_pretrained(tmp_path / "plain"), load_bundle(tmp_path / "bundle")):
        assert torch.equal(logits(back), logits(model)) and schemes(back) == schemes(model)
    saved = json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]
    assert set(saved) == {"quant_method", "format", "schemes"}  # as it was before there were activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_generation(dtype, checkpoints, tmp_path):
    model = Auto.from_pretrained(checkpoints("qwen3_moe"), dtype=dtype, quantization_config=EdgeLabConfig(scheme="int8-row"))
    assert model.dtype == dtype == model.model.embed_tokens.weight.dtype
    assert isinstance(model.model.layers[1].mlp.experts, QExperts)
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("scales")} == {torch.float16}
    settings = {"max_new_tokens": 5, "do_sample": False}
    words = model.generate(IDS[:1, :4], **settings)
    model.save_pretrained(tmp_path)
    back = Auto.from_pretrained(tmp_path)
    assert back.dtype == dtype and torch.equal(back.generate(IDS[:1, :4], **settings), words) and words.shape[1] > 4
    assert torch.equal(logits(back), logits(model))
    fp = Auto.from_pretrained(checkpoints("qwen3_moe"), dtype=dtype)
    assert (logits(fp) - logits(model)).norm() < 0.05 * logits(fp).norm()


def test_what_is_kept_and_what_gets_another_scheme(checkpoints):
    config = EdgeLabConfig(scheme="int3-row", embedding="int8-row", head=False, keep=["*.o_proj", "@mlp"])
    model = Auto.from_pretrained(checkpoints("llama"), quantization_config=config)
    assert schemes(model)["model.embed_tokens"] == "int8-row" and type(model.lm_head) is nn.Linear
    layer = model.model.layers[1]
    assert type(layer.self_attn.o_proj) is nn.Linear and type(layer.mlp.up_proj) is nn.Linear
    assert {text for name, text in schemes(model).items() if "_proj" in name} == {"int3-row"}
    assert type(model.hf_quantizer.recipe.steps[0]) is Quantize


def test_a_recipe_its_json_and_its_dict_are_the_same(checkpoints):
    recipe = Recipe.body("int4-g32", method=Rtn(mse_grid=8))
    for given in (recipe, recipe.to_json(), json.loads(recipe.to_json())):
        assert EdgeLabConfig(given).recipe == recipe
    settings = EdgeLabConfig(scheme="int4-g32", method={"name": "rtn", "mse_grid": 8}, embedding=False, head=False).recipe
    assert settings.steps[0].method == Rtn(mse_grid=8)
    by_recipe, by_settings = (Auto.from_pretrained(checkpoints("llama"), quantization_config=EdgeLabConfig(r)) for r in (recipe, settings))
    assert torch.equal(logits(by_recipe), logits(by_settings)) and type(by_recipe.lm_head) is nn.Linear
    assert EdgeLabConfig().recipe == Recipe.uniform("int4-g32")


def test_a_config_of_an_unquantized_model_prints_and_copies():
    config = EdgeLabConfig(scheme="int4-g32")
    d = config.to_dict()
    assert json.loads(config.to_json_string()) == d == dict(config)
    assert EdgeLabConfig.from_dict(d).recipe == config.recipe


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_map_of_one_device(device_map, checkpoints):
    pytest.importorskip("accelerate", reason="transformers asks for accelerate before it takes a device_map")
    model = Auto.from_pretrained(checkpoints("mixtral"), device_map=device_map, quantization_config=EdgeLabConfig(scheme="int4-g32"))
    plain = Auto.from_pretrained(checkpoints("mixtral"), quantization_config=EdgeLabConfig(scheme="int4-g32"))
    assert torch.equal(logits(model), logits(plain))


def test_a_device_map_of_several_devices_is_refused(checkpoints, tmp_path):
    pytest.importorskip("accelerate", reason="transformers asks for accelerate before it takes a device_map")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"device_map spreads the model over cpu, disk; edgelab quantizes on load on one device"):
        Auto.from_pretrained(
            checkpoints("llama"), device_map=device_map, offload_folder=tmp_path, quantization_config=EdgeLabConfig(scheme="int4-g32")
        )


def test_experts_that_cannot_be_quantized_fail_the_load(checkpoints):
    with pytest.raises(ValueError, match=r"0.0% of the expert parameters were quantized.*min_expert_share=100.0%"):
        Auto.from_pretrained(checkpoints("mixtral"), quantization_config=EdgeLabConfig(scheme="int4-g32", keep=["@experts"]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "gptq"}, r"step 1 of the recipe, Quantize\(gptq\), needs calibration data.*compress\(model, recipe, calibration=...\)"),
        ({"recipe": Recipe.body("int4-g32", before=(Smooth(),))}, r"step 1 of the recipe, Smooth\(smoothquant\), needs calibration data"),
        ({"recipe": Recipe.body("int4-g32", method=Gptq()).to_json()}, "needs calibration data"),
        ({"activations": "a8-static"}, "needs calibration data"),
        ({"recipe": Recipe.uniform("int4-g32"), "scheme": "int4-g32"}, "give one of schemes"),
        ({"recipe": Recipe.uniform("int4-g32"), "activations": "a8-token"}, "activations belong into the recipe"),
        ({"recipe": "{"}, r"recipe='\{' is no Recipe, nor what Recipe.to_json writes"),
        ({"recipe": 5}, "recipe=5 is no Recipe"),
        ({"scheme": "int5-g32"}, "bits=5 is not one of"),
        ({"scheme": "int4-g32", "embedding": 4}, "embedding=4 must be True"),
        ({"keep": "lm_head"}, r"keep='lm_head' must be a list of patterns; write \['lm_head'\]"),
        ({"method": "magic"}, "method='magic' is not known"),
        ({"shceme": "int4-g32"}, "knows no 'shceme'"),
        ({"quant_method": "gptq"}, "knows no quant_method='gptq'"),
        ({"format": 2}, "format 2, this edgelab reads 1"),
    ],
)
def test_doors_of_the_config(settings, says):
    with pytest.raises(ValueError, match=says):
        EdgeLabConfig(**settings)


def test_doors_of_the_load(checkpoints):
    with pytest.raises(ValueError, match=r"'\*.q_prj' is to be kept, but matches no weight of LlamaForCausalLM"):
        Auto.from_pretrained(checkpoints("llama"), quantization_config=EdgeLabConfig(keep=["*.q_prj"]))
    with pytest.raises(ValueError, match="describes a checkpoint that is quantized already"):
        Auto.from_pretrained(checkpoints("llama"), quantization_config=EdgeLabConfig(schemes={"lm_head": "int4-g32"}))
    with pytest.raises(ValueError, match="group_size=128 does not divide in_features=32"):
        Auto.from_pretrained(checkpoints("llama"), quantization_config=EdgeLabConfig(scheme="int4-g128"))


# -------------------------------------------------------------------------------------------------- activations


def with_activations(family, text):
    """A compressed model whose linears and experts round their inputs; static scales differ from layer to layer."""
    model = compress(tiny(family), Recipe.uniform("int8-row"), progress=False).model
    act, scale = ActScheme.parse(text), 0.011
    for _, layer in model.named_modules():
        if isinstance(layer, QLinear | QExperts):
            for parameter in layer._stored:
                layer.round_input_of(parameter, act, scale if act.static else None)
                scale *= 1.1
    return model


@pytest.mark.parametrize("text", ["a8-token", "a8-tensor", "a8-static", "a4-token", "a8-token-o6"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_activations_survive(family, text, tmp_path):
    model = with_activations(family, text)
    plain = compress(tiny(family), Recipe.uniform("int8-row"), progress=False).model
    if not text.endswith("-o6"):  # no input of a tiny model is above 6: there it is a8-token
        assert not torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path / "fp32")  # writes what the layers are, also when adopt came before them
    back = Auto.from_pretrained(tmp_path / "fp32")
    assert torch.equal(logits(back), logits(model))
    assert activations_of(back) == activations_of(model) and set(map(str, activations_of(back).values())) == {text}
    assert "lm_head" in activations_of(back) and "model.embed_tokens" not in activations_of(back)
    held = {n: b for n, b in back.named_buffers() if n.endswith("act_scale")}
    assert len(held) == (len(activations_of(model)) if text == "a8-static" else 0)
    back.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "fp32" / "model.safetensors").read_bytes()


def test_a_stored_range_stays_float32_in_a_bfloat16_model(tmp_path):
    model = with_activations("qwen3_moe", "a8-static").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "first")
    back = Auto.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    ours, theirs = ({n: b for n, b in m.named_buffers() if n.endswith("act_scale")} for m in (model, back))
    assert ours.keys() == theirs.keys() and all(b.dtype == torch.float32 and torch.equal(b, ours[n]) for n, b in theirs.items())
    back.save_pretrained(tmp_path / "again")  # `model` itself has cosines in bfloat16, which loading leaves in float32
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "again")), logits(back))


def test_a_missing_range_is_named(tmp_path):
    """Also that of a tied head, whose codes are the embedding's."""
    model = with_activations("qwen3", "a8-static")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    assert "lm_head.act_scale" in tensors and "lm_head.packed" not in tensors
    for gone in ("lm_head.act_scale", "model.layers.1.mlp.up_proj.act_scale"):
        save_file({k: v for k, v in tensors.items() if k != gone}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks 1 tensors of quantized weights \({gone}\)"):
            Auto.from_pretrained(tmp_path)


def test_dequantize_takes_the_rounding_of_inputs_away(tmp_path):
    model = with_activations("llama", "a8-static")
    model.save_pretrained(tmp_path)
    back = Auto.from_pretrained(tmp_path)
    back.dequantize()
    assert not any(isinstance(m, Quantized) for m in back.modules()) and not any("act_scale" in n for n in stored_tensors(back))


def test_dynamic_activations_on_load(checkpoints):
    config = EdgeLabConfig(scheme="int8-row", activations="a8-token", embedding=False)
    model = Auto.from_pretrained(checkpoints("llama"), quantization_config=config)
    assert set(map(str, activations_of(model).values())) == {"a8-token"}
    want = compress(tiny("llama"), config.recipe, progress=False).model
    assert torch.equal(logits(model), logits(want))


# --------------------------------------------------------------------------------------- what a config may not say


@pytest.fixture
def damaged(tmp_path):
    """(function that changes the quantization_config of a saved model, its directory)."""
    with_activations("qwen3_moe", "a8-static").save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())

    def change(**changes):
        new = {k: v for k, v in (whole["quantization_config"] | changes).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(whole | {"quantization_config": new}))

    return change, tmp_path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schemes": ["int4-g32"]}, r"schemes of the quantization_config is \['int4-g32'\]; it must be"),
        ({"schemes": {"lm_head": "int4_g32"}}, "schemes of the quantization_config, lm_head: 'int4_g32' can't be read"),
        ({"schemes": {"lm_head": 4}}, "schemes of the quantization_config, lm_head: 4 can't be read"),
        ({"schemes": {"lm_head": "mxfp4-g64"}}, "lm_head: 'mxfp4-g64' can't be read .*its blocks are"),
        ({"schemes": None}, "lists activations of weights but no schemes: config.json was damaged"),
        ({"activations": {"lm_head": "a9-token"}}, "activations of the quantization_config, lm_head: 'a9-token' can't be read"),
        ({"activations": {"lm_head": None}}, "activations of the quantization_config, lm_head: None can't be read"),
        ({"activations": {"model.norm": "a8-token"}}, "activations of the quantization_config list model.norm, which is no quantized"),
        ({"activations": {"model.embed_tokens": "a8-token"}}, "list model.embed_tokens, which is no quantized linear layer"),
        ({"something": 1}, "knows no 'something'"),
    ],
)
def test_damaged_texts_are_named(damaged, changes, says):
    change, there = damaged
    change(**changes)
    with pytest.raises(ValueError, match=says):
        Auto.from_pretrained(there)


def test_adopt_follows_the_layers():
    model = with_activations("llama", "a8-token")
    adopt(model)
    before = model.hf_quantizer
    assert model.config.quantization_config.activations["model.layers.0.mlp.up_proj"] == "a8-token"
    model.model.layers[0].mlp.up_proj.round_input_of("weight", None)
    adopt(model)
    assert "model.layers.0.mlp.up_proj" not in model.config.quantization_config.activations and model.hf_quantizer is before
    assert QuantScheme.parse(model.config.quantization_config.schemes["lm_head"]) == QuantScheme.parse("int8-row")
