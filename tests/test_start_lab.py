"""Notebooks 00 and 01: the baseline, and checks whose right answers are the package's own, and which say what a wrong one is."""

import math
import zlib

import numpy as np
import pytest
import torch

from edgelab import quantize_lab, start_lab
from edgelab.exercises import Verdict
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.scheme import QuantScheme


def test_zlib_counts_bytes_and_refuses_nothing_at_all():
    text = "über Öfen " * 20
    assert start_lab.zlib_bits_per_byte(text) == 8 * len(zlib.compress(text.encode(), 9)) / len(text.encode())
    assert start_lab.zlib_bits_per_byte("a") > 8
    with pytest.raises(ValueError, match="an empty text"):
        start_lab.zlib_bits_per_byte("")


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            start_lab.check_touched,
            0.184,
            {6 / 64: "other tenth", 0.9 * 6 / 64: "is missing", 18.4: "per cent", 0.1: "some experts", 7: "all that"},
        ),
        (
            start_lab.check_bits_per_byte,
            0.7213,
            {0.5: "nats per byte", 2.4526: "per token", 0.3466: "more than a bit", 1.7: "nats per token"},
        ),
        (start_lab.check_skipped, 13.7, {13.6: "share a scale", 4.5: "are not", 6.8: "other way", 10.25: "equally many", 3: "a mean"}),
        (
            start_lab.check_kl,
            0.0268,
            {0.0292: "KL(compressed", 0.0387: "bits", 0.189: "keep their sign", 0.2: "differences", 1: "sum p ln"},
        ),
    ],
)
def test_numbers_are_told_right_from_wrong(check, right, wrong):
    assert check(right).passed
    for answer, says in wrong.items():
        said = check(answer)
        assert isinstance(said, Verdict) and not said.passed and says in said, (answer, said)
    assert "no answer so far" in check(None) and "one number" in check("x") and not check(float("nan")).passed


def test_what_is_called_right_is_what_the_library_computes():
    p, q = (torch.tensor([v]).log() for v in (start_lab.BEFORE, start_lab.AFTER))
    assert start_lab.check_kl(float(token_kl(p, q)[0])).passed
    low = QuantScheme.parse("int4-g32")
    assert start_lab.check_skipped(0.8 * 16 + 0.2 * low.bits_per_weight((512, 256))).passed


def test_gptqs_step_is_the_published_one_and_the_least_there_is():
    r = np.random.default_rng(0)
    x = r.standard_normal((6, 50))
    h, row = x @ x.T, r.standard_normal(6)
    found = quantize_lab.others_answer(row, h, 0.0)
    inverse = np.linalg.inv(h)
    assert np.allclose(found, row[1:] + (0.0 - row[0]) * inverse[0, 1:] / inverse[0, 0])

    def loss(others):
        e = np.concatenate([[0.0 - row[0]], others - row[1:]])
        return e @ h @ e

    assert all(loss(found) <= loss(found + 1e-3 * d) for d in r.standard_normal((50, 5)))


def test_a_solution_may_use_torch_or_lists():
    def dequantize(codes, scales, bits):
        levels = torch.tensor(codes.astype(np.int64) - 2 ** (bits - 1))
        return levels * torch.tensor(scales).repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)

    assert start_lab.check_dequantize(dequantize).passed
    assert start_lab.check_dequantize(lambda *a: dequantize(*a).tolist()).passed
    assert not start_lab.check_dequantize(lambda *a: dequantize(*a) + 0.01).passed
    assert math.isclose(start_lab.NATS / math.log(2) / start_lab.BYTES, 0.7213, abs_tol=1e-4)
