"""The trigram baseline: normalised, equal to Kneser-Ney written out plainly, and better than chance."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Dataset

from edgelab.ngram import Trigram, baseline
from edgelab.pretrain import train_tokenizer


def sentences(n: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Documents of a Markov chain that starts at 0 and likes to count upwards."""
    rng = np.random.default_rng(seed)
    docs = []
    for _ in range(n):
        ids = [0, int(rng.integers(1, vocab))]
        while len(ids) < 12:
            ids.append((ids[-1] + int(rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1]))) % vocab)
        docs.append([*ids, 0])
    return docs


def kneser_ney(docs, vocab, u, v, w) -> float:
    """The formulas of the module with dictionaries."""
    c3 = Counter((a, b, c) for d in docs for a, b, c in zip([d[0], *d], d, d[1:], strict=False))
    before2, before1 = defaultdict(set), defaultdict(set)
    for a, b, c in c3:
        before2[b, c].add(a)
        before1[c].add(b)
    c2 = {k: len(s) for k, s in before2.items()}
    c1 = {k: len(s) for k, s in before1.items()}

    def level(counts, context, token, lower):
        ones, twos = (sum(n == k for n in counts.values()) for k in (1, 2))
        d = ones / (ones + 2 * twos) if ones and twos else 0.5
        mine = {k[-1] if isinstance(k, tuple) else k: n for k, n in counts.items() if not isinstance(k, tuple) or k[:-1] == context}
        total = sum(mine.values())
        return lower if not total else max(mine.get(token, 0) - d, 0) / total + d * len(mine) / total * lower

    return level(c3, (u, v), w, level(c2, (v,), w, level(c1, (), w, 1 / vocab)))


def test_equal_to_kneser_ney_written_out():
    docs = sentences(30, 15)
    model = Trigram.fit(docs, 15)
    for u, v, w in [(0, 0, 3), (0, 3, 4), (3, 4, 5), (14, 13, 7), (9, 0, 9), (5, 6, 0)]:
        got = model.prob(np.array(u), np.array(v), np.array(w))
        assert float(got) == pytest.approx(kneser_ney(docs, 15, u, v, w), rel=1e-12)


@pytest.mark.parametrize("docs", [sentences(30, 15), sentences(1, 15), [[0, 0]], [[0, 1], [0, 2]]])
def test_every_distribution_sums_to_one(docs):
    model = Trigram.fit(docs, 15)
    for u in range(15):
        for v in range(15):
            p = model.distribution(u, v)
            assert p.sum() == pytest.approx(1, abs=1e-12) and (p > 0).all()


def test_trigrams_do_not_reach_across_documents():
    assert Trigram.fit([[0, 1, 2], [0, 3, 4]], 6).tri.counts.sum() == 4  # 0 0 1, 0 1 2, 0 0 3, 0 3 4


def test_it_learns_what_there_is_to_learn():
    model = Trigram.fit([d[:-1] for d in sentences(2000, 15)], 15)  # without the end, which could come after anything
    nll = np.concatenate([model.nll(d)[2:-1] for d in sentences(200, 15, seed=1)])
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert entropy - 0.05 < nll.mean() < entropy + 0.05 < math.log(15)


def test_bits_per_byte_on_scored_text_only():
    texts = [f"the {w} of the {v} is here\n" for w in ("name", "list", "key", "loop") for v in ("file", "line", "test", "word")]
    tokenizer = train_tokenizer(texts, 300)
    train = Dataset.from_dict({"text": texts * 3, "domain": ["prose"] * 48})
    sums = Dataset.from_dict({"text": ["1+1=2", *texts[:4]], "prompt": ["1+1=", *[""] * 4], "answer": ["2", *[""] * 4],
                              "domain": ["arithmetic", *["prose"] * 4]})  # fmt: skip
    report = baseline(train, sums, tokenizer)
    prose, answer = report.get(slice="prose"), report.get(slice="arithmetic")
    assert 0 < prose.low <= prose.value <= prose.high < 1.5 and prose.n == 4
    model = Trigram.fit([[0, *tokenizer(t, add_special_tokens=False)["input_ids"], 0] for t in texts * 3], len(tokenizer))
    one, two, equals = tokenizer("12=", add_special_tokens=False)["input_ids"]
    assert answer.value == pytest.approx(-math.log2(float(model.prob(np.array(one), np.array(equals), np.array(two)))), rel=1e-9)


def test_the_interval_is_over_sources():
    texts = [f"the {w} of the {v} is here\n" for w in ("name", "list", "key", "loop") for v in ("file", "line", "test", "word")]
    tokenizer = train_tokenizer(texts, 300)
    train = Dataset.from_dict({"text": texts[:9]})
    pieces = Dataset.from_dict({"text": texts, "id": [f"{i // 4}#{i % 4}" for i in range(16)]})
    whole, single = baseline(train, pieces, tokenizer).rows[0], baseline(train, pieces.remove_columns("id"), tokenizer).rows[0]
    assert (whole.n, single.n) == (4, 16) and whole.value == pytest.approx(single.value)
    assert "4 sources (16 documents)" in whole.note and whole.high - whole.low > single.high - single.low
    one = baseline(train, pieces.select(range(4)), tokenizer).rows[0]
    assert one.n == 1 and one.low is None is one.high


@pytest.mark.parametrize(
    ("docs", "vocab", "text"),
    [([], 10, "no tokens to train on"), ([[0]], 10, "no tokens"), ([[0, 12]], 10, "token 12 is outside"), ([[0, 1]], 2**22, "too large")],
)
def test_errors(docs, vocab, text):
    with pytest.raises(ValueError, match=text):
        Trigram.fit(docs, vocab)
