"""Experts in several schemes: against the same codes in floating point, through recipe, audit, bundle and back."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model import IDS, tiny
from torch import nn

from edgelab import AutoRound, Gptq, Quantize, QuantScheme, Recipe, load_bundle, save_bundle
from edgelab.compress import audit, compress, plan
from edgelab.export import ExportError
from edgelab.export.checks import refuse_other_arithmetic
from edgelab.layers import Blank, QExperts, set_kernel
from edgelab.methods.rtn import round_to_nearest
from edgelab.mixed_experts import QExpertsMixed, each, expert_of, gather
from edgelab.model import dequantize, quantized, swap, weights
from edgelab.qtensor import QTensor

E, HIDDEN, INNER = 5, 32, 16
GATE_UP = ("int2-g16", "int4-g32", "int2-g16", "uint4-g16", "int4-g32")
DOWN = ("int3-g16", "int3-g16", "int3-g16", "int3-g16", "int8-row")


def codes(schemes, *shape: int) -> list[QTensor]:
    return [round_to_nearest(torch.randn(shape), QuantScheme.parse(s)) for s in schemes]


def expected(gate_up, down, x, index, weight, biases=(None, None)):
    """The mixture by its definition, token by token, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, k in np.ndindex(*index.shape):
        e = int(index[t, k])
        if e == len(gate_up):
            continue
        a, b = (torch.from_numpy(q[e].dequantize()).double() for q in (gate_up, down))
        wide = a @ x[t].double() + (0 if biases[0] is None else biases[0][e])
        gate, up = wide.chunk(2)
        inner = gate * torch.sigmoid(gate) * up
        out[t] += weight[t, k].double() * (b @ inner + (0 if biases[1] is None else biases[1][e]))
    return out


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_forward_equals_the_definition(kernel, biased):
    """Also with the sentinel, the same expert twice for a token, and NaN as the weight of what is skipped."""
    gate_up, down = codes(GATE_UP, 2 * INNER, HIDDEN), codes(DOWN, HIDDEN, INNER)
    biases = (torch.randn(E, 2 * INNER), torch.randn(E, HIDDEN)) if biased else (None, None)
    layer = QExpertsMixed(gate_up, down, nn.SiLU(), *biases)
    assert layer.groups == ((0, 2), (1,), (3,), (4,))
    x, index, weight = torch.randn(23, HIDDEN), torch.randint(0, E + 1, (23, 2)), torch.rand(23, 2)
    weight[index == E] = float("nan")
    before = set_kernel(kernel)
    try:
        got = layer(x, index, weight)
        torch.testing.assert_close(got.double(), expected(gate_up, down, x, index, weight, biases), rtol=1e-4, atol=1e-4)
        assert layer(x[:0], index[:0], weight[:0]).shape == (0, HIDDEN)
        half = layer(x.bfloat16(), index, weight)  # rounded to bfloat16 once, after the sum over the parts
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half, layer(x.bfloat16().float(), index, weight).bfloat16(), rtol=0, atol=0)
    finally:
        set_kernel(before)


def test_one_scheme_gives_the_plain_layers_numbers():
    """One part, which is the plain layer: bit for bit."""
    gate_up, down = codes(["int4-g32"] * E, 2 * INNER, HIDDEN), codes(["int4-g16"] * E, HIDDEN, INNER)
    stacks = gather({f"{name}#{e}": q for name, experts in (("a", gate_up), ("b", down)) for e, q in enumerate(experts)})
    plain = QExperts(stacks["a"], stacks["b"], nn.SiLU())
    mixed = QExpertsMixed(gate_up, down, nn.SiLU())
    x, index, weight = torch.randn(9, HIDDEN), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(mixed(x, index, weight), plain(x, index, weight), rtol=0, atol=0)
    assert len(mixed.parts) == 1 and mixed.nbytes == plain.nbytes


def test_codes_come_back_in_the_order_of_the_experts():
    gate_up, down = codes(GATE_UP, 2 * INNER, HIDDEN), codes(DOWN, HIDDEN, INNER)
    layer = QExpertsMixed(gate_up, down, nn.SiLU())
    for name, given in (("gate_up_proj", gate_up), ("down_proj", down)):
        for e, q in enumerate(layer.qtensors()[name]):
            assert q.scheme == given[e].scheme
            np.testing.assert_array_equal(q.packed, given[e].packed)
            np.testing.assert_array_equal(layer.dequantized()[name][e].numpy(), given[e].dequantize())
    assert layer.nbytes == sum(q.nbytes for q in [*gate_up, *down])


def mixed_rules(model) -> tuple:
    """Rules that give the experts of the model's first stacks schemes of their own."""
    stacks = [w for w in weights(model) if w.kind == "experts"]
    special = (
        (f"{stacks[0].name}#0", QuantScheme.parse("int8-row")),
        (f"{stacks[0].name}#2", QuantScheme.parse("int2-g16")),
        (f"{stacks[1].name}#1", QuantScheme.parse("int8-row")),
    )
    return (*special, ("@router", None), ("*", QuantScheme.parse("int4-g16")))


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_recipe_to_model_and_back(family):
    """What the rules say is what the audit finds, one row per expert; turned back, the model gives the same logits."""
    model = tiny(family)
    recipe = Recipe((Quantize(mixed_rules(model)),))
    assert Recipe.from_json(recipe.to_json()) == recipe
    c = compress(model, recipe, progress=False)
    layers = [m for m in c.model.modules() if isinstance(m, QExpertsMixed)]
    assert len(layers) == 1 and len(layers[0].parts) > 1
    stacks = [w for w in weights(model) if w.kind == "experts"]
    rows = {r.name: r for r in c.coverage}
    for stack in stacks[:2]:
        schemes = [rows[f"{stack.name}#{e}"].scheme for e in range(stack.shape[0])]
        assert schemes == [str(recipe.steps[0].scheme_for(f"{stack.name}#{e}", "experts")) for e in range(stack.shape[0])]
    for stack in stacks[2:]:  # experts of one scheme stay one stack
        assert rows[stack.name].scheme == "int4-g16" and f"{stack.name}#0" not in rows
    assert c.coverage.expert_share == 1.0 and c.coverage.parameters == sum(p.numel() for p in model.parameters())
    # each expert has the codes that its scheme gives it alone
    for name, (_, q) in quantized(c.model).items():
        stack, e = expert_of(name)
        if e is not None:
            w = next(w for w in stacks if w.name == stack)
            np.testing.assert_array_equal(q.packed, round_to_nearest(w.tensor[e], q.scheme).packed)
    want = c.model(IDS).logits
    back = copy.deepcopy(c.model)
    dequantize(back)
    assert not quantized(back) and audit(back).parameters == c.coverage.parameters
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [Gptq(), AutoRound(steps=2), AutoRound(steps=2, scope="model")])
def test_methods_with_data_fit_single_experts(method):
    """Each expert gets its scheme, from its own statistics; with activations that round, all parts round."""
    model = tiny("deepseek_v3")
    data = [torch.randint(2, 96, (4, 16))]
    step = Quantize(mixed_rules(model), method=method, activations="a8-token")
    c = compress(model, Recipe((step,)), calibration=data, progress=False)
    for name, (role, q) in quantized(c.model).items():
        assert q.scheme == step.scheme_for(name, role)
    layer = next(m for m in c.model.modules() if isinstance(m, QExpertsMixed))
    assert all(set(part.acts) == {"gate_up_proj", "down_proj"} for part in layer.parts)
    with torch.no_grad():
        assert torch.isfinite(c.model(IDS).logits).all()


@torch.no_grad()
def test_bundle_round_trip(tmp_path):
    model = tiny("deepseek_v3")
    c = compress(model, Recipe((Quantize(mixed_rules(model)),)), progress=False)
    path = save_bundle(c.model, None, tmp_path / "b", recipe=c.recipe, coverage=c.coverage)
    stack = next(w for w in weights(model) if w.kind == "experts").name
    schemes = json.loads((path / "config.json").read_text())["quantization_config"]["schemes"]
    assert schemes[f"{stack}#0"] == "int8-row" and schemes[f"{stack}#1"] == "int4-g16" and stack not in schemes
    loaded = load_bundle(path)
    before, after = quantized(c.model), quantized(loaded)
    assert before.keys() == after.keys()
    for name, (_, q) in before.items():
        assert q.scheme == after[name][1].scheme
        np.testing.assert_array_equal(q.packed, after[name][1].packed)
    assert torch.equal(loaded(IDS).logits, c.model(IDS).logits)
    tensors = load_file(next(path.glob("*.safetensors")))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == c.coverage.predicted_bytes
    with pytest.raises(ExportError, match="experts in several schemes"):
        refuse_other_arithmetic(loaded)


def test_a_blank_for_each_expert_waits_for_a_state_dict():
    model = tiny("deepseek_v3")
    c = compress(model, Recipe((Quantize(mixed_rules(model)),)), progress=False)
    empty = tiny("deepseek_v3")
    swap(empty, {name: Blank(q.shape, q.scheme) for name, (_, q) in quantized(c.model).items()})
    empty.load_state_dict(c.model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty(IDS).logits, c.model(IDS).logits)


def test_errors_name_the_expert_and_the_way_out():
    model = tiny("deepseek_v3")
    gate_up, down = (w for w in weights(model) if w.kind == "experts" and w.module_name.endswith("1.mlp.experts"))
    q = round_to_nearest(gate_up.tensor, QuantScheme.parse("int4-g16"))
    with pytest.raises(ValueError, match=rf"{gate_up.name}#1 has no codes, but {gate_up.name}#2 has"):
        swap(model, {f"{gate_up.name}#0": q[0], f"{gate_up.name}#2": q[2]})
    with pytest.raises(ValueError, match="both whole and by expert"):
        gather({"a": q, "a#0": q[0]})
    with pytest.raises(ValueError, match="'a#x' names no expert; write a#0"):
        expert_of("a#x")
    with pytest.raises(ValueError, match=r"names no expert: .* is .*, no stack"):
        swap(model, {"lm_head#0": q[0]})
    with pytest.raises(ValueError, match="has the shape"):
        swap(model, {f"{gate_up.name}#0": round_to_nearest(down.tensor[0], QuantScheme.parse("int4-g16"))})
    with pytest.raises(ValueError, match=r"gate_up has 4 experts and down 3"):
        QExpertsMixed(each(q), each(q)[:3], nn.SiLU())
    rules = ((f"{gate_up.name}#1", None), ("@router", None), ("*", QuantScheme.parse("int4-g16")))
    with pytest.raises(ValueError, match=rf"{gate_up.name}#1 gets no scheme"):
        plan(model, Recipe((Quantize(rules),)))
    with pytest.raises(ValueError, match="matches no weight"):
        plan(model, Recipe((Quantize(((f"{gate_up.name}#99", QuantScheme.parse("int4-g16")), ("@router", None), ("*", None))),)))
    with pytest.raises(ValueError, match="never decides"):
        late = ((gate_up.name, QuantScheme.parse("int4-g16")), (f"{gate_up.name}#1", QuantScheme.parse("int8-row")))
        plan(model, Recipe((Quantize((*late, ("@router", None), ("*", QuantScheme.parse("int4-g16")))),)))


def test_a_choice_out_of_range_is_refused():
    layer = QExpertsMixed(codes(GATE_UP, 2 * INNER, HIDDEN), codes(DOWN, HIDDEN, INNER), nn.SiLU())
    for bad in (-1, E + 1):
        with pytest.raises(ValueError, match=rf"experts are 0 .. {E - 1}, and {E} means none"):
            layer(torch.randn(1, HIDDEN), torch.tensor([[bad, 0]]), torch.ones(1, 2))
