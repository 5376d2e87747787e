"""Evaluation: against naive loops, hand-computable models, and `model.generate`."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from edgelab import data as corpora
from edgelab.evaluate import (
    Measured,
    Scores,
    _resampled_percentile,
    _share_interval,
    compare,
    documents,
    draws,
    evaluate,
    expert_counts,
    expert_load,
    generate_answers,
    interval,
    jensen_shannon,
    measure,
    routers,
    size,
    specialisation,
    speed,
    summarise,
    weigh,
    windows,
)
from edgelab.metrics.kl_divergence.kl_divergence import percentile
from edgelab.pretrain import train_tokenizer
from edgelab.report import Report

PROSE = [f"The {w} of the {v} is a matter of {w} and of {v}.\n" * k for k, (w, v) in enumerate([
    ("name", "list"), ("method", "module"), ("value", "key"), ("file", "line"), ("loop", "test"), ("scope", "block"),
], 1)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*PROSE, "<|user|>call anna<|call|>{}", "12+34=64"], 320)


@pytest.fixture(scope="module")
def rows():
    sums = [(a, b) for a in range(10, 16) for b in range(20, 23)]
    return Dataset.from_dict({
        "domain": ["prose"] * len(PROSE) + ["arithmetic"] * len(sums),
        "id": [f"p{i}" for i in range(len(PROSE))] + [f"{a}+{b}" for a, b in sums],
        "text": PROSE + [f"{a}+{b}={str(a + b)[::-1]}" for a, b in sums],
        "prompt": [""] * len(PROSE) + [f"{a}+{b}=" for a, b in sums],
        "answer": [""] * len(PROSE) + [str(a + b)[::-1] for a, b in sums],
    })  # fmt: skip


def tiny_moe(seed: int = 0):
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=16, n_group=1, topk_group=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for router in routers(model).values():  # transformers leaves it at zero, where every expert ties
        torch.nn.init.normal_(router.weight, std=0.5)
    return model


def tiny_dense(seed: int = 0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def moe():
    return tiny_moe()


def noisy(model, scale: float):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return other


class Bigram(torch.nn.Module):
    """A model that sees one token back: what it says does not depend on any window. Zero logits: uniform."""

    def __init__(self, vocab: int, scale: float, seed: int = 0):
        super().__init__()
        self.table = torch.nn.Parameter(scale * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)))
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=None)

    def forward(self, input_ids, attention_mask=None, use_cache=False, past_key_values=None):
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=None)


def run(models, tokenizer, rows, **settings):
    return measure(models, tokenizer, rows, max_docs=None, progress=False, **settings)


# ------------------------------------------------------------------------------------------------------- scoring


def test_identical_models_do_not_differ(moe, tokenizer, rows):
    report = evaluate({"fp": moe, "same": copy.deepcopy(moe)}, tokenizer, rows, max_docs=None, context=64, speed=False, progress=False)
    for domain in ("prose", "arithmetic"):
        same = report.where(model="same", slice=domain)
        assert same.get(metric="kld").value == 0 == same.get(metric="kld_p99").value
        assert same.get(metric="same_top").value == 1 == same.get(metric="router_overlap").value
        ratio = same.get(metric="ln_ppl_ratio")
        assert (ratio.low, ratio.value, ratio.high) == (0, 0, 0)
    flips = report.get(model="same", metric="flips")
    assert flips.value == 0 == flips.low < flips.high < 0.25  # 18 answers without a flip do not rule flips out
    assert "0.0000 right to wrong" in flips.note
    assert not report.where(model="fp", metric="kld")


def test_a_uniform_model_by_hand(tokenizer, rows):
    zero = Bigram(320, 0.0)
    report = summarise(run({"fp": zero}, tokenizer, rows))
    for r in report.where(metric="perplexity"):
        assert r.value == pytest.approx(320, rel=1e-5) and r.low == pytest.approx(320, rel=1e-5)
    text = rows.filter(lambda r: r["domain"] == "prose")["text"][:]
    tokens = sum(len(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"])
    bits = tokens * math.log2(320) / sum(len(t.encode()) for t in text)  # no end token: it is no byte of text
    assert report.get(metric="bits_per_byte", slice="prose").value == pytest.approx(bits, rel=1e-5)
    # of two digits of answer each, 2 bytes: log2(320) bits a byte
    assert report.get(metric="bits_per_byte", slice="arithmetic").value == pytest.approx(math.log2(320), rel=1e-5)


def test_only_the_answer_and_the_end_are_scored(tokenizer, rows):
    s = run({"fp": Bigram(320, 1.0)}, tokenizer, rows).scores["fp"]["arithmetic"]
    assert s.tokens.tolist() == [3] * 18 and s.n_bytes.tolist() == [2] * 18
    other = rows.map(lambda r: {"prompt": "99-9=", "text": "99-9=" + r["answer"]} if r["answer"] else {})  # ends in "=" too
    np.testing.assert_allclose(run({"fp": Bigram(320, 1.0)}, tokenizer, other).scores["fp"]["arithmetic"].nll.sum(), s.nll.sum())


def naive(model, base, ids, first, context, stride):
    """(nll, text nll, kld, same top) of a document, a window at a time, unpadded, in float64."""
    nll, kld, same = [], [], []
    start, done = 0, first - 1
    while done < len(ids) - 1:
        part = torch.tensor(ids[start : start + context])[None]
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=part).logits[0].double(), -1) for m in (base, model))
        for i in range(part.shape[1]):
            target = start + i + 1
            if done < target < len(ids):
                nll.append(-q[i, ids[target]].item())
                kld.append((p[i].exp() * (p[i] - q[i])).sum().item())
                same.append((p[i].argmax() == q[i].argmax()).item())
        done = max(done, min(start + context, len(ids) - 1))
        start += stride
    return sum(nll), sum(nll[:-1]), sum(kld), sum(same)


@pytest.mark.parametrize(("context", "stride", "batch_tokens"), [(200, 100, 4096), (24, 9, 150), (24, 24, 1)])
def test_scores_equal_those_of_a_naive_loop(moe, tokenizer, rows, context, stride, batch_tokens):
    """Windows, padding, batching and bookkeeping against one window at a time."""
    other = noisy(moe, 0.1)
    found = run({"fp": moe, "b": other}, tokenizer, rows, context=context, stride=stride, batch_tokens=batch_tokens).scores["b"]
    for domain in ("prose", "arithmetic"):
        docs = [d for d in documents(rows, tokenizer) if d.domain == domain]
        want = np.array([naive(other, moe, d.ids, d.first, context, stride) for d in docs])
        s = found[domain]
        np.testing.assert_allclose(np.stack([s.nll, s.text_nll, s.kld, s.same_top], 1), want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.add.reduceat(s.token_kld, np.cumsum([0, *s.tokens[:-1]])), s.kld, rtol=1e-4)


@pytest.mark.parametrize("context", [9, 13, 50])
def test_windows_change_nothing_where_context_does_not_matter(tokenizer, rows, context):
    models = {"fp": Bigram(320, 1.0), "b": Bigram(320, 1.0, seed=1)}
    whole, cut = run(models, tokenizer, rows), run(models, tokenizer, rows, context=context, stride=5)
    for name in models:
        for domain, s in whole.scores[name].items():
            for field in ("tokens", "nll", "text_nll", "kld", "same_top", "correct"):
                a, b = getattr(s, field), getattr(cut.scores[name][domain], field)
                assert (a is None) == (b is None)
                if a is not None:
                    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 9, 10, 11, 40])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (4, 4), (9, 2), (9, 9), (64, 32)])
@pytest.mark.parametrize("first", [1, 2, 8])
def test_windows_score_every_target_once(n, context, stride, first):
    seen = Counter()
    for start, stop, scored in windows(n, context, stride, first):
        assert 0 < stop - start <= context and start < scored <= stop
        seen.update(range(scored, stop + 1))
    assert seen == Counter(range(first, n))


def test_padding_is_routed_nowhere(moe, tokenizer, rows):
    """Each token before the last is fed once and picks 2 experts a layer, whatever the padding."""
    docs = documents(rows, tokenizer)
    counts, domains = expert_counts(moe, tokenizer, rows, context=64, progress=False)
    assert counts.shape == (len(docs), 2, 8) and domains == [d.domain for d in docs]
    assert (counts.sum(-1) == 2 * np.array([[len(d.ids) - 1] for d in docs])).all()


def test_expert_counts_sum_the_pieces_of_a_source(moe, tokenizer, rows):
    """So that `specialisation` deals whole sources to domains."""
    pieces = rows.map(lambda r: {"id": f"{r['domain']}:{int(len(r['text']) % 2)}#{r['id']}"})
    each, _ = expert_counts(moe, tokenizer, rows, context=64, progress=False)
    counts, domains = expert_counts(moe, tokenizer, pieces, context=64, progress=False)
    sources = {(d.domain, d.source) for d in documents(pieces, tokenizer)}
    assert len(counts) == len(domains) == len(sources) < len(each) == len(rows)
    assert Counter(domains) == Counter(d for d, _ in sources)
    np.testing.assert_array_equal(counts.sum(0), each.sum(0))


def test_router_overlap_by_hand(moe, tokenizer, rows):
    """The selection bias forces experts {0, 1} on the one and {0, 2} on the other: half of them in common."""
    models = {"fp": copy.deepcopy(moe), "b": copy.deepcopy(moe)}
    for name, model in models.items():
        for router in routers(model).values():
            router.e_score_correction_bias[[0, 1 if name == "fp" else 2]] += 100
    report = summarise(run(models, tokenizer, rows, context=64))
    assert [r.value for r in report.where(metric="router_overlap")] == [0.5, 0.5]
    load = expert_load(models["b"], tokenizer, rows, context=64, progress=False)
    assert load.shape == (2, 2, 8)
    np.testing.assert_allclose(load, np.tile([0.5, 0, 0.5, 0, 0, 0, 0, 0], (2, 2, 1)))


def test_a_model_without_the_same_routers_has_no_overlap(moe, tokenizer, rows):
    report = summarise(run({"fp": moe, "dense": tiny_dense()}, tokenizer, rows, context=64))
    assert not report.where(metric="router_overlap") and report.where(metric="kld")
    with pytest.raises(ValueError, match="no routers"):
        expert_counts(tiny_dense(), tokenizer, rows, progress=False)


FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_found_in_every_family(family, tokenizer, rows):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        family, vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=128, **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    docs = documents(rows, tokenizer, 2)
    counts, _ = expert_counts(model, tokenizer, rows, max_docs=2, context=32, progress=False)
    assert counts.shape == (len(docs), 2, 4)
    assert (counts.sum(-1) == 2 * np.array([[len(d.ids) - 1] for d in docs])).all()


# --------------------------------------------------------------------------------------------------- exact match


@pytest.fixture(scope="module")
def half_taught(tokenizer, rows):
    """A dense model that learnt two thirds of the sums by heart: right on some answers, wrong on others."""
    model = tiny_dense().train()
    docs = [d.ids for d in documents(rows, tokenizer) if d.domain == "arithmetic"]
    ids = torch.from_numpy(np.stack(docs[:12]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_exact_match_is_that_of_greedy_decoding(half_taught, tokenizer, rows):
    """The teacher-forced short cut against `generate`, on a model that gets some answers right and others wrong."""
    docs = [d for d in documents(rows, tokenizer) if d.domain == "arithmetic"]
    s = run({"fp": half_taught}, tokenizer, rows, context=64).scores["fp"]["arithmetic"]
    prompts = [tokenizer.decode(d.ids[1 : d.first]) for d in docs]
    written = generate_answers(half_taught, tokenizer, prompts, max_new_tokens=8)
    right = [w == d.targets.tolist() for w, d in zip(written, docs, strict=True)]
    assert s.correct.tolist() == right
    assert 3 < sum(right) < len(right)


def test_answers_do_not_depend_on_the_batch(half_taught, tokenizer):
    prompts = ["10+20=", "11+21=", "7-5=", "<|user|>the name<|call|>", "99+99=", "10+20="]
    together = generate_answers(half_taught, tokenizer, prompts, max_new_tokens=6)
    assert together == [generate_answers(half_taught, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together[0] == together[-1] and all(1 <= len(t) <= 6 for t in together)


def test_flips_count_both_directions(half_taught, tokenizer, rows):
    models = {"fp": half_taught, "blank": tiny_dense(1)}
    report = summarise(run(models, tokenizer, rows, context=64))
    before, flips = report.get(model="fp", metric="exact_match"), report.get(metric="flips")
    assert report.get(model="blank", metric="exact_match").value == 0
    assert flips.value == before.value and f"{before.value:.4f} right to wrong, 0.0000 wrong to right" in flips.note
    swapped = summarise(run(models, tokenizer, rows, context=64, baseline="blank")).get(metric="flips")
    assert swapped.model == "fp" and swapped.value == flips.value and f"{before.value:.4f} wrong to right" in swapped.note


# ----------------------------------------------------------------------------------------------------- intervals


def test_the_bootstrap_interval_covers_the_truth():
    """A ratio of sums with documents of very different lengths: 95 % intervals hold the truth in about 95 % of worlds."""
    rng, inside, worlds, n = np.random.default_rng(0), 0, 300, 120
    for world in range(worlds):
        tokens = rng.integers(5, 100, n)
        nll = tokens * rng.normal(2.0, 0.4, n)  # independent of the length: the ratio of the expectations is 2
        w = draws(n, 400, world)
        low, high = interval((w @ nll) / (w @ tokens))
        inside += low <= 2.0 <= high
    assert 0.90 <= inside / worlds <= 0.98  # binomial: 0.95 +- 3.4 standard errors, less what n = 120 costs


def scores_of(nll, tokens):
    return {"text": Scores(tokens, 3 * tokens, nll, 0.9 * nll)}


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 60)
    nll = tokens * rng.normal(2.0, 0.5, 60)
    worse = nll + tokens * rng.normal(0.05, 0.02, 60)
    measured = Measured({"fp": scores_of(nll, tokens), "q": scores_of(worse, tokens)}, "fp", "c", 512, 256)
    r = compare(measured, "fp", "q").rows[0]
    assert r.value == pytest.approx((worse.sum() - nll.sum()) / tokens.sum())
    assert r.low < r.value < r.high and r.low > 0.04 and r.high < 0.06  # plainly worse
    w = draws(60, 2000, 0)
    low, high = interval(np.log(np.exp(w @ nll / (w @ tokens))))
    assert high - low > 10 * (r.high - r.low)
    back = compare(measured, "q", "fp").rows[0]
    assert (back.value, back.low, back.high) == pytest.approx((-r.value, -r.high, -r.low))
    with pytest.raises(ValueError, match="'int3' was not measured; there are fp, q"):
        compare(measured, "fp", "int3")


@pytest.mark.parametrize("n_docs", [1, 7, 40, 300])
def test_the_resampled_percentile_equals_brute_force(n_docs):
    rng = np.random.default_rng(n_docs)
    lengths = rng.integers(1, 60, n_docs)
    values = rng.lognormal(-3, 2, lengths.sum()).astype(np.float32)
    w = draws(n_docs, 50, 0)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    want = [percentile(np.concatenate([p for p, k in zip(parts, row.astype(int), strict=True) for _ in range(k)])) for row in w]
    np.testing.assert_array_equal(_resampled_percentile(values, lengths, w), np.array(want, np.float32))


def test_the_resampled_percentile_takes_whole_sources():
    """Pieces of a source need not lie together: each draw of a source brings all its tokens."""
    rng = np.random.default_rng(0)
    lengths, source = rng.integers(1, 60, 40), rng.permutation(np.arange(40) % 12)
    values = rng.lognormal(-3, 2, lengths.sum()).astype(np.float32)
    owner = source[np.repeat(np.arange(40), lengths)]
    want = [percentile(np.repeat(values, row.astype(int)[owner])) for row in draws(12, 50, 0)]
    np.testing.assert_array_equal(_resampled_percentile(values, lengths, weigh(source, 50, 0)), np.array(want, np.float32))


def test_binning_a_long_tail_moves_the_percentile_by_less_than_a_bin():
    rng = np.random.default_rng(0)
    lengths = np.full(100, 1000)
    values = rng.permutation(100_000).astype(np.float32)  # a value is its rank
    got = _resampled_percentile(values, lengths, np.ones((1, 100)))
    assert abs(got[0] - percentile(values)) <= 10_000 / 1024 + 1


def test_a_perfect_share_is_not_certain():
    w, each, own = draws(300, 100, 0), np.ones(300), np.arange(300)
    low, high = _share_interval(np.ones(300, bool), each, own, w)
    assert high == 1 and low == pytest.approx(0.9878, abs=1e-4)  # Clopper-Pearson, 300 of 300
    assert _share_interval(np.zeros(300, bool), each, own, w) == pytest.approx((0, 1 - 0.9878), abs=1e-4)
    low, high = _share_interval(own < 30, each, own, w)
    assert 0.05 < low < 0.1 < high < 0.15
    # 300 documents of 30 sources are 30 trials, whatever the tokens
    assert _share_interval(7 * each, 7 * each, own // 10, w) == pytest.approx((0.025 ** (1 / 30), 1))


def test_perfect_agreement_is_not_certain(moe, tokenizer, rows):
    report = summarise(run({"fp": moe, "same": copy.deepcopy(moe)}, tokenizer, rows, context=64))
    for metric in ("same_top", "router_overlap"):
        r = report.get(model="same", metric=metric, slice="arithmetic")
        assert (r.value, r.high, r.n) == (1, 1, 18) and r.low == pytest.approx(0.025 ** (1 / 18))


def test_the_interval_covers_the_truth_when_documents_are_pieces_of_sources():
    """Pieces of one source share its level. Drawn one by one they claim twice the evidence that there is."""
    rng, worlds, n, pieces = np.random.default_rng(0), 200, 60, 8
    source = np.repeat(np.arange(n), pieces)
    inside = {"sources": 0, "pieces": 0}
    for world in range(worlds):
        tokens = rng.integers(20, 100, n * pieces)
        nll = tokens * (2.0 + rng.normal(0, 0.4, n)[source] + rng.normal(0, 0.2, n * pieces))
        for name, s in (("sources", source), ("pieces", None)):
            fp = Scores(tokens, 3 * tokens, np.zeros(n * pieces), nll, source=s)
            measured = Measured({"fp": {"text": fp}, "q": {"text": Scores(tokens, 3 * tokens, nll, nll, source=s)}}, "fp", "c", 512, 256)
            r = compare(measured, "fp", "q", resamples=300, seed=world).rows[0]
            assert r.n == (n if name == "sources" else n * pieces)
            inside[name] += r.low <= 2.0 <= r.high
    assert inside["sources"] / worlds >= 0.89  # binomial: 0.95 less 3 standard errors and what n = 60 costs
    assert inside["pieces"] / worlds < 0.8  # the test can tell


def test_pieces_of_a_source_come_together_and_count_as_one(tokenizer):
    # seven sources of three pieces, two rows without '#'
    ids = [f"s{i // 3}#{i % 3}" for i in range(21)] + ["whole", "other"]
    data = Dataset.from_dict({"id": ids, "text": [f"{PROSE[i % 6]}{i}" for i in range(23)]})
    everything = documents(data, tokenizer)
    assert Counter(Counter(d.source for d in everything).values()) == {3: 7, 1: 2}
    for cap in range(1, 24):
        docs = documents(data, tokenizer, cap)
        assert len(docs) == cap and [d.source for d in docs] == [d.source for d in everything[:cap]]
        cut = [s for s, k in Counter(d.source for d in docs).items() if k < (3 if s.startswith("s") else 1)]
        assert cut in ([], [docs[-1].source])
    r = summarise(run({"fp": Bigram(320, 1.0)}, tokenizer, data)).get(metric="perplexity")
    assert r.n == 9 and "9 sources (23 documents)" in r.note and r.low < r.value < r.high
    one = summarise(run({"fp": Bigram(320, 1.0)}, tokenizer, data.select(range(3)))).get(metric="perplexity")
    assert one.n == 1 and one.low is None is one.high  # nothing to resample
    without = summarise(run({"fp": Bigram(320, 1.0)}, tokenizer, data.remove_columns("id"))).get(metric="perplexity")
    assert without.n == 23 and without.value == pytest.approx(r.value)


def test_summing_by_source_is_weighing_by_source():
    rng = np.random.default_rng(0)
    source, x = rng.permutation(np.arange(40) % 9), rng.normal(size=40)
    np.testing.assert_allclose(weigh(source, 20, 3) @ x, draws(9, 20, 3) @ np.bincount(source, weights=x))


def test_the_seed_decides(moe, tokenizer, rows):
    measured = run({"fp": moe, "b": noisy(moe, 0.1)}, tokenizer, rows, context=64)
    assert summarise(measured, seed=3) == summarise(measured, seed=3)
    again = summarise(run({"fp": moe, "b": noisy(moe, 0.1)}, tokenizer, rows, context=64), seed=3)
    assert again.to_json() == summarise(measured, seed=3).to_json()
    a, b = (summarise(measured, seed=s).get(model="b", metric="kld", slice="prose") for s in (3, 4))
    assert a.value == b.value and (a.low, a.high) != (b.low, b.high) and a.low < a.value < a.high


def test_the_report_says_on_what_and_how(moe, tokenizer, rows):
    report = evaluate({"fp": moe, "b": noisy(moe, 0.1)}, tokenizer, rows, max_docs=5, context=64, seed=7, speed=False, progress=False)
    r = report.get(model="b", metric="kld", slice="arithmetic")
    assert (r.n, r.seed, r.corpus, r.unit) == (5, 7, corpora.fingerprint(rows), "nats/tok")
    assert "answers only" in r.note and "context 64, stride 32" in r.note and r.machine
    assert "answers only" not in report.get(model="b", metric="kld", slice="prose").note
    assert Report.from_json(report.to_json()) == report
    assert report.models() == ["fp", "b"]


# -------------------------------------------------------------------------------------------------------- routing


def test_jensen_shannon_is_bounded_by_the_number_of_domains():
    assert jensen_shannon(np.eye(4)) == pytest.approx(2)  # log2(4) bits
    assert jensen_shannon(np.full((3, 5), 0.2)) == pytest.approx(0, abs=1e-12)


def test_specialisation_against_chance():
    rng = np.random.default_rng(0)
    domains = ["a"] * 40 + ["b"] * 40

    def counts(a, b):
        return np.stack([rng.multinomial(100, a if d == "a" else b, size=2) for d in domains])

    told = specialisation(counts([0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]), domains, permutations=200)
    assert told.bits > 5 * told.chance_high and told.p < 0.01 and len(told.by_layer) == 2 and told.documents == 80
    even = specialisation(counts([0.25] * 4, [0.25] * 4), domains, permutations=200)
    assert even.bits < 3 * even.chance and even.p > 0.01
    with pytest.raises(ValueError, match="data has 1"):
        specialisation(counts([0.25] * 4, [0.25] * 4), ["a"] * 80)


# ---------------------------------------------------------------------------------------------------- size and speed


def test_size_counts_tied_weights_once(tokenizer):
    dense = tiny_dense()
    n = sum(p.numel() for p in dense.parameters())  # parameters() gives the tied one once
    report = size({"fp": dense, "half": copy.deepcopy(dense).half(), "given": dense}, sizes={"given": n})
    assert [r.value for r in report.where(metric="weight_bytes")] == [4 * n, 2 * n, n]
    assert [r.value for r in report.where(metric="bits_per_weight")] == [32, 16, 8]


def test_speed_is_measured_for_every_model(moe):
    report = speed({"fp": moe, "dense": tiny_dense()}, prompt=4, decode=3, prefill=1000, repetitions=3)
    assert len(report) == 4
    for r in report:
        assert 0 < r.low <= r.value <= r.high and r.n == 3 and "torch" in r.note and "threads" in r.note
        assert "float32; median of 3 repetitions" in r.note
    half = speed({"fp": tiny_dense().bfloat16()}, prompt=4, decode=3, prefill=8, repetitions=2)
    assert all("; bfloat16; " in r.note for r in half)
    assert "reading 256 tokens" in report.get(model="fp", metric="prefill_tokens_per_s").note  # the model's positions


# --------------------------------------------------------------------------------------------------------- errors


def test_a_subset_does_not_depend_on_the_order_of_the_rows(tokenizer, rows):
    def chosen(data):
        return {tuple(d.ids) for d in documents(data, tokenizer, {"prose": 2, "arithmetic": 4})}

    assert len(chosen(rows)) == 6 and chosen(rows) == chosen(rows.shuffle(seed=5))
    assert chosen(rows) < {tuple(d.ids) for d in documents(rows, tokenizer)}


def test_text_must_be_prompt_and_answer(tokenizer):
    data = {"text": ["1+1=2", "1+2=4"], "prompt": ["1+1=", "1+2="], "answer": ["2", "3"], "id": ["a", "b"]}
    with pytest.raises(ValueError, match=r"row 1 \(id 'b'\) has an answer, but its text '1\+2=4' is not prompt \+ answer '1\+2=3'"):
        documents(Dataset.from_dict(data), tokenizer)
    data = {"text": ["2", "1+2=3", "free"], "prompt": [None, "1+2=", None], "answer": ["2", "3", None]}
    docs = {d.n_bytes: d for d in documents(Dataset.from_dict(data), tokenizer)}
    assert {k: (d.first, d.answer) for k, d in docs.items()} == {1: (docs[1].first, True), 4: (1, False)}
    assert sorted(d.n_bytes for d in documents(Dataset.from_dict(data), tokenizer)) == [1, 1, 4]


def test_text_alone_is_enough(tokenizer):
    report = summarise(run({"fp": Bigram(320, 1.0)}, tokenizer, Dataset.from_dict({"text": PROSE})))
    assert {r.slice for r in report} == {"text"} and not report.where(metric="exact_match")


def test_models_come_back_as_they_were(moe, tokenizer, rows):
    model = copy.deepcopy(moe).train()
    run({"fp": model}, tokenizer, rows, context=64)
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"data": Dataset.from_dict({"text": []})}, ValueError, "holds no documents to score"),
        ({"data": Dataset.from_dict({"text": ["", ""]})}, ValueError, "holds no documents to score"),
        ({"data": Dataset.from_dict({"body": ["a"]})}, ValueError, "none is called 'text'"),
        ({"data": DatasetDict({"test": Dataset.from_dict({"text": ["a"]})})}, ValueError, "give one split"),
        ({"context": 1}, ValueError, "context=1 is too short"),
        ({"context": 5}, ValueError, "context=5 is too short for a prompt with its answer of 9 tokens; use context=9"),
        ({"context": 512}, ValueError, "longer than the 256 positions of model 'fp'; use context=256"),
        ({"stride": 65}, ValueError, "stride=65 must be in 1 .. context=64"),
        ({"models": {}}, ValueError, "models is empty"),
        ({"baseline": "bf16"}, ValueError, "baseline='bf16' is not one of the models fp"),
        ({"models": {"fp": Bigram(200, 1.0)}}, ValueError, "outside the vocabulary of model 'fp' .200."),
        ({"models": {"fp": Bigram(320, 1.0), "b": Bigram(400, 1.0)}}, ValueError, "different sizes .'fp' 320, 'b' 400."),
        ({"models": {"fp": Bigram(320, math.nan)}}, FloatingPointError, "model 'fp' returned NaN"),
    ],
)
def test_errors_name_the_value_and_the_way_out(moe, tokenizer, rows, change, error, text):
    settings = {"models": {"fp": moe}, "data": rows, "context": 64, **change}
    with pytest.raises(error, match=text):
        run(settings.pop("models"), tokenizer, settings.pop("data"), **settings)


def test_a_tokenizer_without_borders_is_refused(rows):
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        documents(rows, SimpleNamespace(bos_token_id=None, eos_token_id=None))
