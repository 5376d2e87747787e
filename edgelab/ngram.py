"""A trigram model with interpolated Kneser-Ney smoothing: the baseline that a neural model of the same text must beat.

It reads the same tokens as the neural model and is trained on the same split, so that the two differ in nothing but
the model. With c the training counts, N1+(. v w) the number of distinct tokens seen before "v w" and N1+(v .) the
number of distinct tokens after v (likewise for longer contexts):

    p3(w | u v) = [c(u v w) - D3]+ / c(u v)       + D3 N1+(u v .) / c(u v)         p2(w | v)
    p2(w | v)   = [N1+(. v w) - D2]+ / N1+(. v .) + D2 N1+(v .) / N1+(. v .)       p1(w)
    p1(w)       = [N1+(. w) - D1]+ / N1+(. .)     + D1 N1+(.) / N1+(. .)           1 / V

A context that was never seen passes all its mass down; every level sums to 1 over the vocabulary. The discounts are
D = n1 / (n1 + 2 n2) of each level's counts (Ney, Essen, Kneser 1994; Chen, Goodman 1998, sections 2.7 and 3).

Counts are sorted int64 keys (u V + v) V + w with np.unique, looked up by np.searchsorted: a few million tokens train
in seconds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edgelab import data as corpora
from edgelab.evaluate import QUICK_DOCS, Document, count, documents, source_index, spread, weigh
from edgelab.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from edgelab.report import Report, Row, machine


@dataclass(frozen=True, eq=False)
class _Level:
    """Counts of one order, by sorted key: of the whole n-gram, and per context their sum and number of kinds."""

    grams: np.ndarray  # int64 keys: context * V + token
    counts: np.ndarray
    contexts: np.ndarray  # int64 keys
    totals: np.ndarray
    kinds: np.ndarray
    discount: float

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, vocab: int) -> "_Level":
        contexts, start = np.unique(grams // vocab, return_index=True)
        totals = np.add.reduceat(counts, start)
        kinds = np.diff(np.append(start, len(grams)))
        n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
        discount = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5  # a text too small to tell
        return cls(grams, counts, contexts, totals, kinds, discount)

    def mix(self, context: np.ndarray, token: np.ndarray, vocab: int, lower: np.ndarray) -> np.ndarray:
        """This order's probability of `token` after `context`, given the lower order's."""
        count = _look_up(self.grams, self.counts, context * vocab + token)
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        seen = np.maximum(total, 1)
        p = np.maximum(count - self.discount, 0.0) / seen + self.discount * kinds / seen * lower
        return np.where(total > 0, p, lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` of the `wanted` keys, 0 for those that are not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


@dataclass(frozen=True, eq=False)
class Trigram:
    """A trained trigram model over `vocab` tokens. Documents start after two beginning tokens."""

    vocab: int
    uni: _Level
    bi: _Level
    tri: _Level

    @classmethod
    def fit(cls, docs: Iterable[Sequence[int]], vocab: int) -> "Trigram":
        """Train on documents in tokens, each with its beginning token in front (and its end token behind).

        Raises ValueError for no tokens, tokens outside the vocabulary, or a vocabulary whose triples overflow 63 bits.
        """
        if vocab > 2**21:
            raise ValueError(f"vocab={vocab} is too large for 63-bit keys of three tokens; at most {2**21}")
        parts = [np.asarray([d[0], *d], np.int64) for d in docs if len(d) > 1]
        if not parts:
            raise ValueError("no tokens to train on: give documents of a beginning token and at least one more")
        tokens = np.concatenate(parts)
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"token {int(tokens.max())} is outside the vocabulary 0 .. {vocab - 1}")
        inside = np.ones(len(tokens), bool)  # whether a trigram that ends here lies in one document
        starts = np.cumsum([0, *(len(p) for p in parts[:-1])])
        inside[starts] = inside[starts + 1] = False
        end = np.flatnonzero(inside)
        u, v, w = tokens[end - 2], tokens[end - 1], tokens[end]
        tri, c3 = np.unique((u * vocab + v) * vocab + w, return_counts=True)
        bi, c2 = np.unique(tri % (vocab * vocab), return_counts=True)  # distinct tokens before each "v w"
        uni, c1 = np.unique(bi % vocab, return_counts=True)
        return cls(vocab, _Level.of(uni, c1, vocab), _Level.of(bi, c2, vocab), _Level.of(tri, c3, vocab))

    def prob(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | u v) of arrays of tokens, float64, strictly between 0 and 1."""
        u, v, w = (np.asarray(x, np.int64) for x in np.broadcast_arrays(u, v, w))
        p = self.uni.mix(np.zeros_like(w), w, self.vocab, np.full(w.shape, 1 / self.vocab))
        p = self.bi.mix(v, w, self.vocab, p)
        return self.tri.mix(u * self.vocab + v, w, self.vocab, p)

    def distribution(self, u: int, v: int) -> np.ndarray:
        """The whole next-token distribution after "u v": float64 [vocab], sums to 1."""
        return self.prob(np.array(u), np.array(v), np.arange(self.vocab))

    def nll(self, ids: Sequence[int]) -> np.ndarray:
        """-ln p of each token after the first of a document with its beginning token in front: float64 [len(ids) - 1]."""
        padded = np.asarray([ids[0], *ids], np.int64)
        return -np.log(self.prob(padded[:-2], padded[1:-1], padded[2:]))


def _text_nll(model: Trigram, docs: list[Document]) -> np.ndarray:
    """Nats of each document's scored text, its end token left out (as in `edgelab.evaluate`)."""
    return np.array([math.fsum(model.nll(d.ids)[d.first - 1 : -1]) for d in docs])


def baseline(train, test, tokenizer, *, max_docs=QUICK_DOCS, per_domain: bool = False, resamples: int = 2000, seed: int = 0) -> Report:
    """A `Report` of the trigram's bits per byte on each domain of `test`, on the documents that `evaluate` would take.

    `train` and `test` are Datasets as `evaluate` takes them. `per_domain` trains one trigram per domain instead of one
    on all text. The rows' model is "trigram"; figures and intervals are as in `edgelab.evaluate`.
    """
    vocab = len(tokenizer)
    learn = documents(train, tokenizer)
    by_domain: dict[str, list[Document]] = {}
    for d in documents(test, tokenizer, max_docs):
        by_domain.setdefault(d.domain, []).append(d)
    shared = None if per_domain else Trigram.fit((d.ids for d in learn), vocab)
    rows = []
    for domain, docs in by_domain.items():
        model = shared or Trigram.fit((d.ids for d in learn if d.domain == domain), vocab)
        nll, n_bytes = _text_nll(model, docs), np.array([d.n_bytes for d in docs])
        source = source_index(docs)
        sources = int(source.max()) + 1
        w = weigh(source, resamples, seed)
        low, high = spread(bits_per_byte(w @ nll, w @ n_bytes), sources)
        note = f"Kneser-Ney trigram of the model's tokens, trained on {'this domain' if per_domain else 'all domains'} of the train split"
        note = f"{note}; {count(sources, len(docs))}"
        common = {"n": sources, "seed": seed, "machine": machine(), "corpus": corpora.fingerprint(test), "note": note}
        value = float(bits_per_byte(nll.sum(), n_bytes.sum()))
        rows.append(Row("trigram", "bits_per_byte", value, "bit/B", domain, low, high, **common))
    return Report(tuple(rows))
