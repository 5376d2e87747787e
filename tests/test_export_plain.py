"""The plain model computes what the model computes, and its weights come back as codes: the ground of four exporters. Runs without them."""

import numpy as np
import pytest
import torch
from small_models import tiny
from transformers import DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from edgelab.export import ExportError, coreml, executorch, litert, openvino
from edgelab.export.plain import (
    RankExperts,
    Unpacked,
    checked_length,
    codes_of,
    nibbles,
    nothing_past,
    plain,
    positive,
    stepped,
    stored_bytes,
    told,
    whole,
    with_codes,
)
from edgelab.layers import QExperts, QLinear
from edgelab.qtensor import QTensor
from edgelab.scheme import ActScheme, QuantScheme

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def deepseek():
    return DeepseekV3Config(
        **SMALL, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=96, num_key_value_heads=2, moe_intermediate_size=32,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1, kv_lora_rank=32, q_lora_rank=None,
        qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=32,
    )  # fmt: skip


def qwen3(**changes):
    settings = {"num_hidden_layers": 1, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
    return Qwen3Config(**SMALL | settings | changes)


def qwen3_moe():
    return Qwen3MoeConfig(
        **SMALL, num_hidden_layers=1, intermediate_size=96, num_key_value_heads=1, head_dim=32, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip


MODELS = [(deepseek, "int4-g32"), (qwen3, "int4-g32"), (qwen3_moe, "int8-row"), (deepseek, "int3-g16"), (qwen3, None), (deepseek, None)]


@pytest.mark.parametrize("config, scheme", MODELS)
@torch.no_grad()
def test_plain_model_gives_the_same_logits_in_every_form(config, scheme):
    model = tiny(config(), scheme)
    p = plain(model)
    assert not any(isinstance(m, QLinear | QExperts) for m in p.model.modules())
    ids = torch.randint(0, 96, (1, 20))
    wanted = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(whole(p)(ids), wanted, atol=2e-5)
    padded = torch.cat([ids, torch.full((1, 5), 7)], 1)  # on the right: what stands there is not seen
    assert torch.allclose(whole(p)(padded)[:, :20], wanted, atol=2e-5)
    step, state = stepped(p, 24), nothing_past(model, 24)
    logits, *state = step(padded[:, :16], torch.tensor([0]), *state)  # the prompt is of 12: four places are written over
    seen = [logits[:, :12]]
    for t in range(12, 20):
        logits, *state = step(ids[:, t : t + 1], torch.tensor([t]), *state)
        seen.append(logits)
    assert torch.allclose(torch.cat(seen, 1), wanted, atol=2e-5)
    alone = step(ids[:, 19:], torch.tensor([19]), *nothing_past(model, 24))[0]
    assert (alone[:, 0] - wanted[:, 19]).abs().max() > 1e-3  # control: the past matters
    assert torch.allclose(whole(with_codes(p))(ids), wanted, atol=2e-5)
    assert sum(isinstance(m, Unpacked) for m in p.model.modules()) == sum(w.q is not None for w in p.weights.values())


def test_counts_and_tied_pairs():
    model = tiny(qwen3(), "int4-g32")
    p = plain(model)
    assert len(p.weights) == len(p.codes) + 1 and len(p.tied()) == 1
    assert p.weights_total == sum(t.numel() for t in tiny(qwen3(), None).parameters())
    assert p.model.lm_head.weight is p.model.model.embed_tokens.weight
    floats = p.weights_total - p.quantized()[0]
    assert p.predicted_bytes() == sum(w.q.nbytes for w in p.codes.values()) + 4 * floats and floats < 500
    moe = plain(tiny(deepseek(), "int4-g32"))
    assert moe.experts_total == 8 * 3 * 64 * 32 == moe.quantized()[1]
    (stack,) = (m for m in moe.model.modules() if isinstance(m, RankExperts))
    assert len(stack.gate_up) == 8 and stack.gate_up[3].weight.shape == (64, 64)


def test_equal_scores_still_choose_k_experts():
    """Rank by comparison breaks ties by place (torch's top-k by nothing it promises): never fewer or more than k, none twice."""
    model = tiny(qwen3_moe(), "int8-row")
    model.model.layers[0].mlp.gate.weight.data[:] = 0
    p = plain(model)
    (stack,) = (m for m in p.model.modules() if isinstance(m, RankExperts))
    seen = []
    stack.register_forward_pre_hook(lambda module, given: seen.append(given))
    with torch.no_grad():
        whole(p)(torch.arange(9)[None])
    ((_, index, weight),) = seen
    assert torch.equal(index, torch.tensor([[0, 1]]).expand(9, 2)) and torch.allclose(weight, torch.tensor(0.25))  # of 4 experts


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g16", "int2-g8", "int8-g32", "int8-row", "int4-row", "int4-tensor"])
def test_codes_come_back_from_the_bytes_that_are_stored(scheme):
    scheme, draw = QuantScheme.parse(scheme), np.random.default_rng(0)
    codes = draw.integers(0, scheme.levels, (6, 64)).astype(np.uint8)
    q = QTensor.from_codes(codes, draw.normal(size=scheme.scales_shape((6, 64))), scheme)
    assert np.array_equal(codes_of(nibbles(q), q), codes)
    assert np.array_equal(litert.codes_of(litert.code_bytes(q), q), codes)
    u = Unpacked(q)
    assert np.array_equal(u.values(u.codes, u.scales).numpy(), q.dequantize())
    assert stored_bytes(q) == u.codes.nbytes + u.scales.nbytes == litert.code_bytes(q).nbytes + u.scales.nbytes


def test_negative_scales_turn_their_group_and_only_code_0_moves():
    codes = np.array([[0, 1, 15, 8, 9, 7, 8, 8] * 2, [0, 1, 15, 8, 9, 7, 8, 8] * 2], np.uint8)
    q = QTensor.from_codes(codes, np.array([[-0.5, 0.5], [0.0, 2.0]]), QuantScheme.parse("int4-g8"))
    values, scales, changed = positive(q)
    assert scales.min() > 0 and changed == 1  # code 0 of the first group; a group of scale 0 is zeros
    back = (values.reshape(2, 2, 8) * scales[..., None]).reshape(2, 16)
    moved = back != q.dequantize()
    assert moved.sum() == 1 and moved[0, 0] and q.dequantize()[0, 0] == 4.0 and back[0, 0] == 3.5


def test_notes_tell_what_dynamic_costs():
    p = plain(tiny(qwen3(), "int4-g32"))
    assert told(p, "exact", 8, None) == ("8 tokens at once, computed anew for each token",)
    notes = " ".join(told(p, "dynamic", 8, 16))
    assert "one by one in 16 places" in notes and "are here twice" in notes and "moved by one step" in notes and "lose three bits" in notes


def test_refusals():
    model = tiny(qwen3(), "int4-g32")
    for length, places, says in [(0, None, "length=0 must be"), (65, None, "to 64"), (True, None, "length=True"), (8, 4, "must have room")]:
        with pytest.raises(ExportError, match=says):
            checked_length(model, length, places)
    model.model.layers[0].mlp.down_proj.round_input_of("weight", ActScheme.parse("a8-token"))
    with pytest.raises(ExportError, match="rounds its input to a8-token"):
        plain(model)


@pytest.mark.parametrize("module", [litert, executorch])
def test_modes_are_checked_before_anything_is_imported(module, tmp_path):
    with pytest.raises(ExportError, match="mode='quick' is not one of exact, dynamic"):
        module.export(tiny(qwen3(), None), tmp_path, mode="quick")
    with pytest.raises(ExportError, match=r"int8-g32; .*one scale a row"):
        module.export(tiny(qwen3(), "int8-g32"), tmp_path, mode="dynamic", length=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, package, extra", [
    (litert, "ai_edge_litert", "litert"), (executorch, "executorch", "executorch"), (coreml, "coremltools", "coreml"),
    (openvino, "openvino", "openvino"),
])  # fmt: skip
def test_missing_package_names_its_extra(module, package, extra, tmp_path, monkeypatch):
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf'is not installed.*pip install .*"edgelab\[{extra}\]"'):
        module.export(tiny(qwen3(max_position_embeddings=128), None), tmp_path)
    assert not list(tmp_path.iterdir())
