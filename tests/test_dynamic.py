"""Dynamic channel pruning: against a naive layer in which all but the largest channels are zero, in every family and in codes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import CONFIGS, FAMILIES, IDS, tiny
from torch import nn

from edgelab import Recipe
from edgelab.compress import compress
from edgelab.dynamic import keep_largest, report, saved, skip_channels
from edgelab.layers import QExperts, gated, set_kernel
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import dequantize, family_of, glu_settings
from edgelab.recipe import Quantize, QuantScheme, SkipChannels


def naive_keep(h: torch.Tensor, share: float) -> torch.Tensor:
    out = torch.zeros_like(h)
    for row, to in zip(h.reshape(-1, h.shape[-1]), out.view(-1, h.shape[-1]), strict=True):
        order = sorted(range(len(row)), key=lambda i: -abs(float(row[i])))
        for i in order[: max(1, len(row) - int(share * len(row)))]:
            to[i] = row[i]
    return out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_keep_largest(share):
    h = torch.randn(2, 3, 10)
    assert torch.equal(keep_largest(h, share), naive_keep(h, share))
    assert int((keep_largest(torch.ones(1, 10), share) != 0).sum()) == max(1, 10 - int(share * 10))  # ties too


def naive(model, share: float):
    """A copy in which every down product sees h with its smallest channels at 0: of linears by a hook, of stacks written out."""
    model = copy.deepcopy(model)
    layout = family_of(model).experts
    for module in model.modules():
        if isinstance(getattr(module, "down_proj", None), nn.Linear):
            module.down_proj.register_forward_pre_hook(lambda _m, args: (naive_keep(args[0], share),))
        if layout and getattr(module._parameters.get(layout.down), "ndim", 0) == 3:
            module.forward = lambda x, index, weight, m=module: by_token(m, layout, x, index, weight, share)
    return model


def by_token(m, layout, x, index, weight, share):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for j in range(index.shape[1]):
            e = int(index[t, j])
            a, b = m._parameters[layout.gate_up][e], m._parameters[layout.down][e]
            y = x[t] @ (a if layout.transposed else a.T) + (m.gate_up_proj_bias[e] if layout.biased else 0)
            h = naive_keep(gated(y[None], **glu_settings(m, layout)), share)[0]
            out[t] += weight[t, j] * (h @ (b if layout.transposed else b.T) + (m.down_proj_bias[e] if layout.biased else 0))
    return out


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_family_equals_the_naive_model(family):
    model = tiny(family)
    plain = model(IDS).logits
    expected = naive(model, 0.6)(IDS).logits
    assert "60% of the inner channels" in skip_channels(model, SkipChannels(0.6))[0]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-3)
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.zero_()
    torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    skip_channels(other, SkipChannels(0.0))  # the second call replaces the first
    torch.testing.assert_close(other(IDS).logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama"])
@torch.no_grad()
def test_codes_equal_the_weights_that_they_stand_for(family, kernel):
    quantized = compress(tiny(family), Recipe.uniform("int8-row"), progress=False).model
    floating = copy.deepcopy(quantized)
    dequantize(floating)
    for m in (quantized, floating):
        skip_channels(m, SkipChannels(0.5))
    before = set_kernel(kernel)
    try:
        got = copy.deepcopy(quantized)(IDS).logits
        torch.testing.assert_close(got, floating(IDS).logits, rtol=1e-3, atol=1e-3)
    finally:
        set_kernel(before)


@torch.no_grad()
def test_experts_in_several_schemes():
    model = tiny("qwen3_moe")
    name = "model.layers.1.mlp.experts.down_proj"
    rules = ((f"{name}#0", QuantScheme.parse("int8-g16")), ("@router", None), ("*", QuantScheme.parse("int8-row")))
    mixed = compress(model, Recipe((Quantize(rules),)), progress=False).model
    assert any(isinstance(m, QExpertsMixed) for m in mixed.modules())
    floating = copy.deepcopy(mixed)
    dequantize(floating)
    for m in (mixed, floating):
        skip_channels(m, SkipChannels(0.5))
    torch.testing.assert_close(mixed(IDS).logits, floating(IDS).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_sentinel_is_no_expert():
    model = tiny("mixtral")
    experts = next(m for n, m in model.named_modules() if n.endswith("experts"))
    x, index = torch.randn(5, 32), torch.tensor([[0, 1], [4, 2], [3, 4], [4, 4], [1, 0]])
    gates = torch.rand(5, 2)
    skip_channels(model, SkipChannels(0.25))
    got = experts(x, index, gates.masked_fill(index == 4, float("nan")))
    expected = by_token(experts, FAMILIES["mixtral"].experts, x, index.clamp(max=3), gates.masked_fill(index == 4, 0), 0.25)
    torch.testing.assert_close(got, expected)


def test_saved_by_hand_and_the_report():
    """deepseek_v3 with one dense layer of 64 and one of four experts of 32, of which two and a shared one work: a third each is down."""
    model = tiny("deepseek_v3")
    total, less = saved(model, 0.5)
    down = 64 * 32 + 2 * 32 * 32 + 32 * 32
    assert total - less == 0.5 * down
    attention = 2 * (32 * 32 + 32 * 4 * 16 + 32 * 40 + 32 * 4 * 16 + 32 * 32)
    assert total == attention + 3 * down + 4 * 32 + 96 * 32
    other = copy.deepcopy(model)
    skip_channels(other, SkipChannels(0.5))
    r = report(model, other, [IDS])
    with torch.no_grad():
        a, b = (m(IDS).logits.log_softmax(-1) for m in (model, other))
    assert r.kld == pytest.approx(F.kl_div(b, a, log_target=True, reduction="none").sum(-1).mean().item(), rel=1e-3)
    assert r.share == 0.5 and r.saved == pytest.approx(0.5 * down / total) and 0 < r.same_top <= 1
    with pytest.raises(ValueError, match="skips no channels"):
        report(model, model, [IDS])


def test_a_model_without_gated_layers_is_refused():
    import transformers

    gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no feed-forward layer of gate_proj"):
        skip_channels(gpt2, SkipChannels())


def test_the_quantized_layer_is_put_back_as_it_was():
    """A share of 0 computes what the one-call kernel does."""
    model = compress(tiny("qwen3_moe"), Recipe.uniform("int8-row"), progress=False).model
    with torch.no_grad():
        plain = model(IDS).logits
        skip_channels(model, SkipChannels(0.0))
        assert not any(m._is_swiglu for m in model.modules() if isinstance(m, QExperts))
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-4)
