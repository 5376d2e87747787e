"""Adaptive precision: decoding against the teacher-forced mixture, bytes by hand, nested codes bit for bit."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_model import CONFIGS, IDS, tiny

from edgelab import QuantScheme, Recipe
from edgelab.cascade import Cascade, answers, bytes_per_token, calibrate, generate, join, low_of, report, split
from edgelab.compress import compress
from edgelab.early_exit import NEVER, choose_threshold
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import load_tokenizer, quantized


def pair(family: str = "qwen3_moe"):
    """(low, high): a tiny model in 2 and in 8 bits."""
    model = tiny(family)
    return tuple(compress(model, Recipe.uniform(s), progress=False).model for s in ("int2-g16", "int8-row"))


@torch.no_grad()
def naive_decode(cascade: Cascade, ids: list[int], n: int) -> tuple[list[int], int]:
    """Greedy decoding without caches: both models read everything anew for each token."""
    text, up = list(ids), 0
    for _ in range(n):
        p = cascade.low(torch.tensor([text])).logits[0, -1].softmax(-1)
        sure = p.max() >= cascade.confidence
        up += not sure
        text.append(int(p.argmax() if sure else cascade.high(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :], up


@torch.no_grad()
def test_decoding_equals_reading_everything_anew():
    low, high = pair()
    ids = IDS[0, 3:12]
    sure = low(IDS).logits.softmax(-1).amax(-1)
    cascade = Cascade(low, high, float(sure.median()))
    w = generate(cascade, ids, 14)
    expected, up = naive_decode(cascade, ids.tolist(), 14)
    assert w.ids == expected and w.escalated == up / 14 and 0 < up < 14
    for confidence, model in ((0.0, low), (NEVER, high)):
        alone = model.generate(ids[None], attention_mask=torch.ones(1, 9), max_new_tokens=14, do_sample=False, eos_token_id=95)[0, 9:]
        assert generate(Cascade(low, high, confidence), ids, 14).ids == alone.tolist()
        assert generate(Cascade(low, high, confidence), ids, 14, per="prompt").ids == alone.tolist()
    assert generate(cascade, ids, 14, eos=w.ids[1]).ids == w.ids[: w.ids.index(w.ids[1]) + 1]


@torch.no_grad()
def test_the_report_is_the_mixture_of_both():
    low, high = pair("llama")
    a, b = (m(IDS).logits.flatten(0, 1).log_softmax(-1) for m in (low, high))
    level = float(a.amax(-1).exp().median())
    up = a.amax(-1).exp() < level
    r = report(Cascade(low, high, level), [IDS[:1], IDS[1:]])
    kl = (b.exp() * (b - a)).sum(-1)
    assert r.tokens == 40 and r.escalated == int(up.sum()) / 40 == 19 / 40
    assert r.kld_low == pytest.approx(kl.mean().item(), rel=1e-4) and r.kld == pytest.approx(kl[~up].sum().item() / 40, rel=1e-4)
    hit = a.argmax(-1) == b.argmax(-1)
    assert r.same_top_low == pytest.approx(hit.float().mean().item()) and r.same_top == pytest.approx((hit | up).float().mean().item())
    assert r.bits == pytest.approx(8 * (r.bytes_low + r.escalated * r.bytes_high) / r.weights)
    both = [report(Cascade(low, high, c), [IDS]) for c in (0.0, NEVER)]
    assert both[0].escalated == 0 and both[0].kld == both[0].kld_low and both[0].bytes_read == r.bytes_low
    assert both[1].escalated == 1 and both[1].kld == 0 and both[1].bytes_read == r.bytes_low + r.bytes_high


def test_bytes_by_hand():
    """qwen3_moe: two layers of attention, one dense layer of 64, two of four experts of 32, router in float32, head of 96."""
    model = tiny("qwen3_moe")
    attention, dense, experts, router, head = 2 * (2 * 32 * 32 + 2 * 16 * 32), 3 * 64 * 32, 2 * 3 * 32 * 32, 4 * 32, 96 * 32
    weights = attention + dense + experts + router + head
    assert bytes_per_token(model) == (4 * weights, weights)
    eight = compress(model, Recipe.uniform("int8-row"), progress=False).model
    scales = 2 * (2 * (32 + 16 + 16 + 32) + (64 + 64 + 32) + 2 * (64 + 32) + 96)
    assert bytes_per_token(eight) == (weights + 3 * router + scales, weights)


def test_calibration_uses_the_tested_threshold():
    model = tiny("llama")
    low, high = (compress(model, Recipe.uniform(s), progress=False).model for s in ("int4-g16", "int8-row"))
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 96, (8, 32), generator=draw) for _ in range(3)]
    with torch.no_grad():
        p, token = torch.cat([low(b).logits.flatten(0, 1) for b in batches]).softmax(-1).max(-1)
        best = torch.cat([high(b).logits.flatten(0, 1) for b in batches]).argmax(-1)
    share = float((token == best).float().mean())
    cascade = calibrate(low, high, batches, share - 0.05)
    assert cascade.confidence == choose_threshold(p, token == best, share - 0.05) != NEVER
    assert calibrate(low, high, batches, 1.0).confidence == NEVER


def test_answers_go_through_both_models():
    tokenizer = load_tokenizer("data/edge-moe")
    import transformers

    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    models = [transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval() for _ in range(2)]
    data = Dataset.from_dict({"text": ["lights on yes"], "prompt": ["lights on"], "answer": [" yes"], "domain": ["assistant"]})
    a = answers(Cascade(*models, NEVER), tokenizer, data)
    assert (a.prompts, a.escalated, a.exact) == (1, 1.0, a.exact_high)
    with pytest.raises(ValueError, match="no rows of domain='poems'"):
        answers(Cascade(*models, 0.5), tokenizer, data, domain="poems")


# -------------------------------------------------------------------------------------------------------- nested codes


@pytest.mark.parametrize("scheme", ["int8-row", "int8-g16", "int8-tensor"])
@pytest.mark.parametrize("shape", [(6, 48), (3, 4, 32)])
def test_nested_codes_come_back_bit_for_bit(scheme, shape):
    q = round_to_nearest(torch.randn(shape) * torch.logspace(-2, 1, shape[-2])[:, None], QuantScheme.parse(scheme))
    low, rest = split(q)
    back = join(low, rest)
    assert back.scheme == q.scheme and np.array_equal(back.packed, q.packed) and np.array_equal(back.scales, q.scales)
    assert low.packed.nbytes + rest.nbytes == q.packed.nbytes
    # the 4-bit value is the middle of the sixteen that share its high nibble, but for the rounding of 120.5 s to float16
    known = q.codes() != 128  # a code of 128 is 0 and tells no scale
    scale = (q.dequantize() / np.where(known, q.codes().astype(float) - 128, 1))[known]
    middle = (q.codes() // 16 * 16 + 7.5 - 128)[known] * scale
    assert (np.abs(low.dequantize()[known] - middle) <= 0.06 * np.abs(scale)).all()


@torch.no_grad()
def test_the_nested_model_is_close_to_the_one_it_lies_in():
    model = tiny("deepseek_v3")
    high = compress(model, Recipe.uniform("int8-g16"), progress=False).model
    low = low_of(model, high)
    assert {str(q.scheme) for _, q in quantized(low).values()} == {"uint4-g16"}
    r = report(Cascade(low, high, 0.0), [IDS])
    plain = report(Cascade(compress(model, Recipe.uniform("uint4-g16"), progress=False).model, high, 0.0), [IDS])
    assert 0 < r.kld < 6 * plain.kld


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cascade(tiny("llama"), tiny("llama"), -0.1), "confidence=-0.1 must be 0"),
        (lambda: generate(Cascade(tiny("llama"), tiny("llama"), 0.5), IDS[0], per="word"), "per='word' is not known"),
        (lambda: calibrate(tiny("llama"), tiny("llama"), [IDS], 1.5), "agreement=1.5 is no share"),
        (lambda: split(round_to_nearest(torch.randn(4, 32), QuantScheme.parse("int4-g32"))), "int4-g32 holds no nibbles"),
        (lambda: split(round_to_nearest(torch.randn(4, 32), QuantScheme.parse("uint8-g32"))), "uint8-g32 holds no nibbles"),
        (lambda: split(round_to_nearest(torch.randn(4, 32) * 1e5, QuantScheme.parse("int8-row"))), "is no float16 number"),
    ],
)
def test_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_two_vocabularies_are_refused():
    config = CONFIGS["llama"]()
    config.vocab_size = 95
    import transformers

    other = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="vocabularies of 96 and 95"):
        Cascade(tiny("llama"), other, 0.5)
