"""Local and strided attention: the pattern by counting, the gathering against a mask over all pairs, in models of every family."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_model import CONFIGS, IDS, tiny

from edgelab import sparse_attention as module
from edgelab.recipe import SparseAttention
from edgelab.sparse_attention import attend, attended, cost, dense_mask, measure, set_pattern, sparse_attention

PATTERNS = [(2, 4), (0, 3), (5, None), (3, 1), (40, 7)]


@pytest.mark.parametrize(("window", "stride"), PATTERNS)
def test_cost_is_the_count(window, stride):
    for length in (1, 2, 3, 6, 7, 20, 41, 90):
        rows = [attended(t, window, stride) for t in range(length)]
        assert cost(length, window, stride) == (sum(map(len, rows)), length * (length + 1) // 2)
        for t, row in enumerate(rows):
            wanted = [j for j in range(t + 1) if t - j <= window or (stride and j % stride == 0)]
            assert row == wanted and dense_mask(length, window, stride)[t].nonzero()[:, 0].tolist() == wanted


def naive(q, k, v, window, stride, scaling=None, padding=None, sinks=None):
    """Query by query over the tokens that it attends to, in float64."""
    queries, keys = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            for i in range(queries):
                t = keys - queries + i
                js = [j for j in attended(t, window, stride) if padding is None or padding[b, j] or j == t]
                scores = k[b, h // groups, js].double() @ q[b, h, i].double() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
                top = scores.exp()
                below = top.sum() + (0 if sinks is None else sinks[h].double().exp())
                out[b, h, i] = (top / below) @ v[b, h // groups, js].double()
    return out


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize(("window", "stride"), PATTERNS)
def test_gathering_equals_the_definition(window, stride, block, monkeypatch):
    """Whole texts, the last queries of a longer cache, and one query alone; keys wider than values, two heads per key."""
    monkeypatch.setattr(module, "BLOCK", block)
    q, k, v = torch.randn(1, 4, 37, 8), torch.randn(1, 2, 37, 8), torch.randn(1, 2, 37, 6)
    expected = naive(q, k, v, window, stride)
    for queries in (37, 9, 1):
        got = attend(q[:, :, -queries:], k, v, window, stride)
        torch.testing.assert_close(got.double(), expected[:, :, -queries:], rtol=1e-4, atol=1e-5)


def test_gathering_equals_a_mask_over_all_pairs():
    q, k, v = torch.randn(3, 2, 3, 300, 16)
    mask = dense_mask(300, 32, 16)
    torch.testing.assert_close(attend(q, k, v, 32, 16), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-4, atol=1e-5)


def test_padding_and_sinks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    q, k, v = torch.randn(3, 2, 2, 21, 8)
    padding = torch.ones(2, 21, dtype=torch.bool)
    padding[1, 13:] = False
    sinks = torch.randn(2)
    for s in (None, sinks):
        got = attend(q, k, v, 3, 4, scaling=0.3, padding=padding, sinks=s)
        expected = naive(q, k, v, 3, 4, 0.3, padding, s)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    padding[1] = False  # nothing at all: no NaN
    assert attend(q, k, v, 3, 4, padding=padding).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- models


def masked(model, window, stride):
    """`model` computing all pairs, with the pattern added to the mask of transformers' eager attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")

    def add(_module, args, kwargs):
        mask = kwargs["attention_mask"]
        keys, queries = mask.shape[-1], mask.shape[-2]
        pattern = dense_mask(keys, window, stride)[-queries:]
        return args, kwargs | {"attention_mask": mask.masked_fill(~pattern, torch.finfo(mask.dtype).min)}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_family_with_and_without_cache(family):
    """Also after a deep copy, from a prompt and a chunk of several tokens, and differently from dense attention."""
    model = tiny(family)
    dense = model(IDS).logits
    expected = masked(model, 3, 5)(IDS).logits
    remarks = sparse_attention(model, SparseAttention(window=3, stride=5))
    assert "window 3 and stride 5" in remarks[0] and "of 64 tokens" in remarks[0]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(IDS).logits, dense, atol=1e-3)
    other = copy.deepcopy(model)
    set_pattern(model, 1, None)  # the copy keeps its own
    out = other(IDS[:, :8], use_cache=True)
    found = [out.logits]
    for a, b in ((8, 9), (9, 14), (14, 15), (15, 20)):
        out = other(IDS[:, a:b], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it():
    model = tiny("deepseek_v3")
    set_pattern(model, 2, 4)
    alone = model(IDS[1:, :11]).logits
    mask = torch.ones_like(IDS)
    mask[1, 11:] = 0
    together = model(IDS, attention_mask=mask).logits
    torch.testing.assert_close(together[1:, :11], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[:1], model(IDS[:1]).logits, rtol=1e-4, atol=1e-4)
    assert together.isfinite().all()


@torch.no_grad()
def test_layers_with_their_own_window_keep_it():
    config = CONFIGS["gpt_oss"]()
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention"], 4
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for p in model.parameters():
        p.normal_(0, 0.1)
    expected = masked(model, 100, None)
    for hooks in (expected.model.layers[1].self_attn._forward_pre_hooks,):
        hooks.clear()
    dense = expected(IDS).logits
    set_pattern(model, 100, None)  # a pattern that leaves nothing out: what the model did itself
    torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-4, atol=1e-4)
    set_pattern(model, 0, None)
    assert not torch.allclose(model(IDS).logits, dense, atol=1e-3)


@torch.no_grad()
def test_generating_uses_the_pattern():
    model = tiny("qwen3")
    reference = masked(model, 2, 4)
    set_pattern(model, 2, 4)
    ids, settings = IDS[:1, 2:9], {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 95, "pad_token_id": 1}
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert got.tolist() == reference.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()


def test_measure_names_what_it_measured():
    rows = measure((32, 64), 4, 8, heads=2, width=8, repetitions=2)
    assert [r.length for r in rows] == [32, 64] and all(r.sparse_ms > 0 and r.dense_ms > 0 for r in rows)
    assert rows[1].pairs == cost(64, 4, 8)[0] / (64 * 65 / 2)


def test_errors():
    gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no attention that transformers lets one replace"):
        sparse_attention(gpt2, SparseAttention())
    model = tiny("llama")
    set_pattern(model, 2, 4)
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 1, 4, 4\); sparse attention takes \[batch, keys\]"):
        model(IDS[:1, :4], attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@torch.no_grad()
def test_the_summaries_help_the_embedded_model():
    """On 512 tokens of Python: window and stride are closer to dense than the window alone, and summaries alone say little."""
    import textwrap

    from edgelab.model import load, load_tokenizer

    ids = torch.tensor([load_tokenizer("data/edge-moe")(inspect.getsource(textwrap), verbose=False)["input_ids"][:512]])
    model = load("data/edge-moe")
    dense = model(ids).logits.log_softmax(-1)
    kld = {}
    for pattern in ((32, 16), (32, None), (0, 16)):
        set_pattern(model, *pattern)
        kld[pattern] = F.kl_div(model(ids).logits.log_softmax(-1), dense, log_target=True, reduction="none").sum(-1).mean().item()
    assert kld[32, 16] < kld[32, None] < 0.1 * kld[0, 16] and kld[32, 16] < 0.25
