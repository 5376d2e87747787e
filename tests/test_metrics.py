"""The metric modules: figures worked out by hand, and the door through `evaluate.load` without a network."""

import math

import numpy as np
import pytest
import torch

from edgelab import metrics
from edgelab.metrics.exact_match.exact_match import exact, flips
from edgelab.metrics.kl_divergence.kl_divergence import percentile, token_kl
from edgelab.metrics.router_overlap.router_overlap import overlap


@pytest.mark.parametrize("name", metrics.NAMES)
def test_every_metric_loads_by_its_folder_and_explains_itself(name):
    import evaluate

    m = evaluate.load(metrics.path(name))
    assert isinstance(m, evaluate.Metric)
    assert len(m.description) > 80 and len(m.citation) > 40
    assert ">>>" in m.inputs_description and "Args:" in m.inputs_description
    assert m.features


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'bleu' is not one of perplexity, bits_per_byte"):
        metrics.load("bleu")


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    out = metrics.load("perplexity").compute(nll=[3 * math.log(10), 5 * math.log(10)], tokens=[3, 5])
    assert out["perplexity"] == pytest.approx(10)
    with pytest.raises(ValueError, match="at least one token"):
        metrics.load("perplexity").compute(nll=[0.0], tokens=[0])


def test_bits_per_byte_pools_documents_and_does_not_average_them():
    # 8 bits in 1 byte and 0 bits in 3 bytes: 2 bits per byte, where the mean of the documents' figures would be 4
    out = metrics.load("bits_per_byte").compute(nll=[8 * math.log(2), 0.0], n_bytes=[1, 3])
    assert out["bits_per_byte"] == pytest.approx(2)
    with pytest.raises(ValueError, match="at least one byte"):
        metrics.load("bits_per_byte").compute(nll=[1.0], n_bytes=[0])


def test_kl_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert token_kl(p.log(), q.log()).item() == pytest.approx(want, rel=1e-6)
    assert token_kl(p.log(), p.log()).item() == 0
    # a constant added to the logits changes nothing
    m = metrics.load("kl_divergence")
    shifted = m.compute(references=(p.log() + 7).tolist(), predictions=(q.log() - 3).tolist())
    assert shifted["kld"] == pytest.approx(want, rel=1e-5)


def test_kl_divergence_where_a_model_rules_words_out():
    ruled_out, even = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]).log()
    assert token_kl(ruled_out, even).item() == pytest.approx(math.log(2))  # 0 ln 0 is 0, not NaN
    assert token_kl(even, ruled_out).item() == math.inf


def test_the_percentile_is_a_value_that_occurred():
    assert percentile(np.arange(1, 101), 0.99) == 99
    assert percentile(np.arange(1, 102), 0.99) == 100
    assert percentile([3.0], 0.99) == 3


def test_exact_match_wants_every_character():
    assert exact("28", "28") and not exact("28", "2") and not exact("2", "28") and not exact("28 ", "28")
    assert exact(np.array([1, 2]), np.array([1, 2])) and not exact(np.array([1, 2]), np.array([1, 3]))
    m = metrics.load("exact_match")
    assert m.compute(predictions=["a", "b"], references=["a", "B"]) == {"exact_match": 0.5}
    with pytest.raises(ValueError, match="baseline has 1 answers for 2 references"):
        m.compute(predictions=["a", "b"], references=["a", "B"], baseline=["a"])


def test_flips_go_both_ways_and_equal_accuracy_does_not_hide_them():
    down, up = flips([True, False, True, False], [False, True, True, False])
    assert down.tolist() == [True, False, False, False] and up.tolist() == [False, True, False, False]
    out = metrics.load("exact_match").compute(predictions=["x", "b"], references=["a", "b"], baseline=["a", "x"])
    assert out == {"exact_match": 0.5, "flips": 1.0, "down": 0.5, "up": 0.5}


def test_router_overlap_ignores_the_order():
    a, b = torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.tensor([[1, 0], [1, 2], [2, 3]])
    assert overlap(a, b).tolist() == [1.0, 0.5, 0.0]
