"""Bits per byte from summed log likelihoods. Self-contained: `evaluate.load` copies this file away."""

import math

import datasets
import evaluate
import numpy as np
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
Bits per byte: how many bits the model needs, on average, for one byte of UTF-8 text. It does not depend on the
tokenizer, so it compares models that read different tokens, and an n-gram model with a neural one.
"""

_CITATION = """
The cross entropy of a text in bits over its length in bytes; Gao et al., The Pile (arXiv 2101.00027), section 3.1,
argue for it over perplexity per token.
"""

_KWARGS_DESCRIPTION = """
Args:
    nll: negative log likelihood of each document's text, summed over its tokens, in nats.
    n_bytes: length of each document's text in bytes of UTF-8.
Returns:
    bits_per_byte: float.
Examples:

    >>> from edgelab import metrics
    >>> m = metrics.load("bits_per_byte")
    >>> m.compute(nll=[0.6931471805599453, 0.6931471805599453], n_bytes=[1, 3])["bits_per_byte"]  # 2 bits in 4 bytes
    0.5
"""


def bits_per_byte(nll, n_bytes):
    """nll / (n_bytes ln 2) of summed nats and byte counts (numbers or arrays of resampled sums)."""
    return np.divide(nll, np.multiply(n_bytes, math.log(2)))


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nll": datasets.Value("float64"), "n_bytes": datasets.Value("int64")}),
        )

    def _compute(self, nll, n_bytes):
        if sum(n_bytes) <= 0:
            raise ValueError("bits per byte needs at least one byte of text; n_bytes sum to 0")
        return {"bits_per_byte": float(bits_per_byte(np.sum(nll), np.sum(n_bytes)))}
