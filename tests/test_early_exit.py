"""Early exit: decoding against a naive pass with the same tokens handed on, the threshold against brute force, costs by hand."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from test_model import CONFIGS, IDS, tiny
from torch import nn

from edgelab.early_exit import (
    NEVER,
    answers,
    attach,
    choose_threshold,
    early_exit,
    exit_macs,
    exit_report,
    exits,
    generate,
    multiply_adds,
    restore,
)
from edgelab.model import load_tokenizer
from edgelab.recipe import EarlyExit


def with_exit(family: str, after: int = 1, share: float | None = 0.5, layers: int = 3):
    """A tiny model with an exit that about `share` of the tokens of IDS take (None: all of them)."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_hidden_layers = layers
    if hasattr(config, "layer_types") and config.layer_types:
        config.layer_types = ["full_attention"] * layers
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.isfinite().all() or p.ndim >= 2 or p.abs().max() == 0:
                p.normal_(0, 0.1)
        attach(model, EarlyExit(after=after))
        nn.init.normal_(model.early_exit.proj.weight, std=0.5)
        sure = confidence(model, IDS, after)
        # between two confidences: rounding must not decide
        level = 0.0 if share is None else float(sure.flatten().sort().values[int(sure.numel() * (1 - share)) :][:2].mean())
        model.early_exit.threshold.fill_(level)
    restore(model, EarlyExit(after=after))
    return model


@torch.no_grad()
def confidence(model, ids, after):
    states = []
    handle = model.model.layers[after - 1].register_forward_hook(lambda _m, _i, out: states.append(out))
    model.model(ids, use_cache=False)
    handle.remove()
    h = states[0]
    z = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + model.early_exit.eps) * model.early_exit.norm
    return model.lm_head(model.early_exit.proj(z)).softmax(-1).amax(-1)


@torch.no_grad()
def naive(model, ids, after):
    """(logits, who left): a copy without exits, in which whoever is sure keeps the state behind block `after` to the end."""
    plain = copy.deepcopy(model)
    left = confidence(model, ids, after) >= model.early_exit.threshold
    for part in plain.modules():
        part.__dict__.pop("forward", None)
    states = []
    plain.model.layers[after - 1].register_forward_hook(lambda _m, _i, out: states.append(out))
    for layer in plain.model.layers[after:]:
        layer.register_forward_hook(lambda _m, inputs, out: torch.where(left[..., None], inputs[0], out))
    logits = plain(ids, use_cache=False).logits
    return torch.where(left[..., None], plain.lm_head(plain.early_exit(states[0])), logits), left


@torch.no_grad()
def decode(model, ids):
    past, found = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits[:, 0])
    return torch.stack(found, 1), past


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_decoding_equals_the_naive_pass(family):
    """Token by token with a cache, in a batch whose rows leave at different times, and all at once with everywhere=True."""
    model = with_exit(family)
    expected, left = naive(model, IDS, 1)
    assert 0.3 < left.float().mean() < 0.7
    assert (left[0] != left[1]).any() and (left[0] & left[1]).any()  # mixed batches, and such that all leave
    with exits(model) as run:
        got, past = decode(model, IDS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (run.seen, run.gone) == (IDS.numel(), int(left.sum()))
    assert all(past.get_seq_length(i) == IDS.shape[1] for i in range(3))
    with exits(model, everywhere=True):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(model, IDS[1:])[0], expected[1:], rtol=1e-4, atol=1e-4)  # a row alone


@torch.no_grad()
def test_deeper_blocks_are_left_out_and_only_the_cache_filled(monkeypatch):
    model = with_exit("deepseek_v3", share=None)
    calls = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _i, _o, name=name: calls.__setitem__(name, calls.get(name, 0) + 1))
    products, linear = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: products.append(self) or linear(self, x))
    decode(model, IDS[:1, :4])
    for i in (1, 2):
        assert calls[f"model.layers.{i}.self_attn.kv_a_proj_with_mqa"] == 4
        assert not {n for n in calls if n.startswith(f"model.layers.{i}.") and ("mlp" in n or "o_proj" in n or "kv_b" in n)}
    assert sum(m is model.lm_head for m in products) == 4  # the head is not computed twice for a token that leaves
    assert calls["model.layers.0.mlp.down_proj"] == 4


@torch.no_grad()
def test_nobody_leaves_a_prompt_nor_in_training_nor_when_off():
    model = with_exit("qwen3")
    plain = copy.deepcopy(model)
    plain.early_exit.threshold.fill_(NEVER)
    whole, _ = decode(plain, IDS)
    torch.testing.assert_close(model(IDS).logits, whole, rtol=1e-4, atol=1e-4)
    with exits(model, on=False) as run:
        torch.testing.assert_close(decode(model, IDS)[0], whole, rtol=0, atol=0)
    assert run.seen == 0
    model.train()
    torch.testing.assert_close(decode(model, IDS)[0], whole, rtol=0, atol=0)
    model.eval()
    assert not torch.allclose(decode(model, IDS)[0], whole, atol=1e-3)
    # the base model alone leaves nothing behind that the head could take for its own
    model.early_exit.threshold.zero_()
    model.model(IDS[:, :1])
    x = torch.randn(2, 1, 32)
    torch.testing.assert_close(model.lm_head(x), nn.functional.linear(x, model.lm_head.weight))


@torch.no_grad()
def test_copies_and_state_dicts_carry_the_exit():
    model = with_exit("mixtral")
    expected, _ = decode(model, IDS)
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.zero_()
    model.early_exit.threshold.fill_(NEVER)
    torch.testing.assert_close(decode(other, IDS)[0], expected, rtol=0, atol=0)
    fresh = copy.deepcopy(with_exit("mixtral"))
    for part in fresh.modules():
        part.__dict__.pop("forward", None)
    del fresh.early_exit
    attach(fresh, EarlyExit(after=1))
    assert torch.equal(fresh.early_exit.threshold, torch.tensor([NEVER]))
    fresh.load_state_dict(other.state_dict())
    restore(fresh, EarlyExit(after=1))
    torch.testing.assert_close(decode(fresh, IDS)[0], expected, rtol=0, atol=0)
    assert {"early_exit.norm", "early_exit.proj.weight", "early_exit.threshold"} <= set(other.state_dict())
    with torch.device("meta"):
        import transformers

        bare = transformers.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    attach(bare, EarlyExit(after=1))
    assert bare.early_exit.norm.is_meta and bare.early_exit.threshold.is_meta


# ----------------------------------------------------------------------------------------------------------- threshold


def at_most(wrong: int, n: int, p: float) -> float:
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(wrong + 1))


def test_threshold_against_a_plain_search():
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        sure = torch.rand(600, generator=draw)
        agrees = torch.rand(600, generator=draw) < 0.7 + 0.32 * sure
        found = choose_threshold(sure, agrees, 0.9)
        best, failed = NEVER, False
        for k in range(255, 0, -1):
            gone = sure >= k / 256
            n, wrong = int(gone.sum()), int((gone & ~agrees).sum())
            if failed or at_most(1, n, 0.1) > 0.05:
                continue
            failed = at_most(wrong, n, 0.1) > 0.05
            best = best if failed else k / 256
        assert found == best
    assert found != NEVER


def test_threshold_holds_its_promise():
    """Of 300 draws whose true agreement is below what is asked for at every threshold, at most about 5 % get one at all."""
    draw = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(300):
        sure = torch.rand(400, generator=draw)
        wrong += choose_threshold(sure, torch.rand(400, generator=draw) < 0.945, 0.95) != NEVER
    assert wrong <= 0.09 * 300
    agrees = torch.arange(300) > 0  # one error
    assert at_most(1, 235, 0.02) > 0.05 > at_most(1, 236, 0.02)
    assert (
        choose_threshold(torch.ones(235), agrees[:235], 0.98) == NEVER and choose_threshold(torch.ones(236), agrees[:236], 0.98) == 1 / 256
    )


# ------------------------------------------------------------------------------------------------- learning and report


@torch.no_grad()
def test_the_exit_starts_as_norm_and_head_and_learns():
    draw = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 96, (4, 24), generator=draw) for _ in range(4)]
    model = tiny("qwen3")
    before = {n: p.clone() for n, p in model.named_parameters()}
    remarks = early_exit(model, EarlyExit(after=1, steps=0, agreement=0.2), batches, progress=False)
    h = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: h.append(out))
    model(IDS)
    z = model.early_exit(h[0])
    torch.testing.assert_close(z, h[0] * torch.rsqrt((h[0] ** 2).mean(-1, keepdim=True) + 1e-6) * model.model.norm.weight)
    assert "block 1 of 2" in remarks[0]
    report = exit_report(model, batches)
    taught = tiny("qwen3")
    early_exit(taught, EarlyExit(after=1, steps=150, agreement=0.2), batches, progress=False)
    for m in (model, taught):
        m.early_exit.threshold.zero_()  # all leave: the exits themselves are compared
    a, b = exit_report(model, batches), exit_report(taught, batches)
    assert b.kld < 0.7 * a.kld and a.left == b.left == 1 and b.agreement == b.same_top > a.agreement
    assert report.tokens == 384
    assert all(torch.equal(p, before[n]) for n, p in taught.named_parameters() if n in before)  # the body is frozen
    assert not any(p.requires_grad for p in taught.early_exit.parameters())


@torch.no_grad()
def test_report_counts_who_leaves_and_costs_by_hand():
    model = with_exit("llama", after=1)
    logits, left = naive(model, IDS, 1)
    with exits(model, on=False):
        whole = model(IDS).logits
    report = exit_report(model, [IDS])
    assert report.left == int(left.sum()) / 40 and report.tokens == 40
    kl = (whole.softmax(-1) * (whole.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    assert report.kld == pytest.approx(kl.mean().item(), rel=1e-3)
    hit = whole.argmax(-1) == logits.argmax(-1)
    assert report.same_top == pytest.approx(hit.float().mean().item()) and report.agreement == pytest.approx(
        hit[left].float().mean().item()
    )
    # hidden 32, inner 64, 4 heads of 8, 2 of keys and values: q and o 1024 each, k and v 512 each, three of 2048; head 96 x 32
    block, head, own, kept = 2 * 1024 + 2 * 512 + 3 * 2048, 96 * 32, 32 * 32, 1024 + 2 * 512
    assert exit_macs(model) == (3 * block + head, 3 * block + 2 * head + own, block + head + own + 2 * kept)
    share = report.left
    assert report.macs == pytest.approx(share * (block + head + own + 2 * kept) + (1 - share) * (3 * block + 2 * head + own))
    assert report.saved == 1 - report.macs / report.macs_whole


def test_multiply_adds_of_a_mixture():
    """qwen3_moe: of 4 experts a token gets 2; the router counts."""
    each = multiply_adds(tiny("qwen3_moe"))
    assert each["model.layers.1.mlp.experts.gate_up_proj"] == 2 * 64 * 32 and each["model.layers.1.mlp.gate"] == 4 * 32
    assert "model.embed_tokens" not in each and each["lm_head"] == 96 * 32


@torch.no_grad()
def test_generate_writes_what_transformers_writes():
    model = with_exit("qwen3_moe")
    for on in (True, False):
        w = generate(model, IDS[0, :6], 12, on=on)
        with exits(model, on=on):
            ids = IDS[:1, :6]  # 1, the padding token, is one of them
            again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=95)[0, 6:]
        assert w.ids == again.tolist() and (w.left > 0) == on and w.tokens_per_s > 0
    stop = w.ids[2]
    assert generate(model, IDS[0, :6], 12, eos=stop, on=False).ids == w.ids[: w.ids.index(stop) + 1]


def test_answers_of_the_embedded_tokenizer():
    """With an exit that is never taken all answers are the same, and a model that knows the answer is right."""
    tokenizer = load_tokenizer("data/edge-moe")
    import transformers

    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    attach(model, EarlyExit(after=1))
    restore(model, EarlyExit(after=1))
    prompts = ["turn on the light\n", "what time is it\n"]
    data = Dataset.from_dict({"text": [p + "no" for p in prompts], "prompt": prompts, "answer": ["no"] * 2, "domain": ["assistant"] * 2})
    a = answers(model, tokenizer, data, 2)
    assert (a.prompts, a.same, a.left, a.exact, a.exact_whole) == (2, 1.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no rows of domain='poems'"):
        answers(model, tokenizer, data, 2, domain="poems")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: attach(tiny("llama"), EarlyExit(after=2)), "after=2 of EarlyExit must be in 1 .. 1: the model has 2 blocks"),
        (lambda: attach(nn.Linear(2, 2), EarlyExit()), "Linear is no decoder with model.layers"),
        (lambda: attach(with_exit("llama"), EarlyExit(after=1)), "has an early exit already"),
        (lambda: early_exit(tiny("llama"), EarlyExit(after=1), [IDS[:1]]), "1 rows of calibration data"),
        (lambda: exits(tiny("llama")).__enter__(), "has no early exit"),
    ],
)
def test_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()
