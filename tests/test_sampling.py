"""`sampling`: the frequencies are those of the softmax, the nucleus is the smallest set, a seed repeats."""

import numpy as np
import pytest

from edgelab.sampling import Sampler, confidence, nucleus, probabilities

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def test_greedy_is_the_largest():
    assert Sampler()(np.array([1.0, 3.0, 2.0], np.float32)) == 1


def test_frequencies_are_the_softmax():
    sampler = Sampler(temperature=1.0, seed=0)
    counts = np.bincount([sampler(LOGITS) for _ in range(8000)], minlength=4) / 8000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.02  # 4 standard errors of the largest: 0.022


def test_temperature_sharpens():
    sampler = Sampler(temperature=0.5, seed=0)
    expected = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    counts = np.bincount([sampler(LOGITS) for _ in range(8000)], minlength=4) / 8000
    assert np.abs(counts - expected / expected.sum()).max() < 0.02


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_the_nucleus_is_the_fewest_tokens_of_that_mass(top_p, kept):
    sampler = Sampler(temperature=1.0, top_p=top_p - 1e-9, seed=1)
    assert {sampler(LOGITS) for _ in range(2000)} == kept


def test_a_seed_repeats_and_another_differs():
    draws = [[Sampler(1.0, seed=s)(LOGITS) for _ in range(1)] + [Sampler(1.0, seed=s + 100)(LOGITS)] for s in range(20)]
    assert draws == [[Sampler(1.0, seed=s)(LOGITS), Sampler(1.0, seed=s + 100)(LOGITS)] for s in range(20)]
    assert len({d for pair in draws for d in pair}) > 1


def test_confidence_is_the_probability():
    assert confidence(LOGITS, 2) == pytest.approx(0.15, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"temperature": -1}, "=-1"), ({"temperature": 1e-310}, "1e-310"), ({"top_p": 0}, "top_p=0"), ({"top_p": 1.5}, "1.5")],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        Sampler(**settings)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_whole_sort(top_p, spread):
    p = probabilities(np.random.default_rng(0).standard_normal(20_000) * spread)
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    assert np.array_equal(nucleus(p, top_p), kept)


def test_nan_is_an_error_and_not_a_token():
    with pytest.raises(ValueError, match="NaN or infinity"):
        probabilities(np.array([0.0, np.nan]))
