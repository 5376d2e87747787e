"""Perplexity per token from summed log likelihoods. Self-contained: `evaluate.load` copies this file away."""

import datasets
import evaluate
import numpy as np
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
Perplexity: exp of the mean negative log likelihood per token, the mean taken over all tokens together (not over
documents). It depends on the tokenizer: compare it only between models that read the same tokens.
"""

_CITATION = """
Jelinek, Mercer, Bahl, Baker: Perplexity - a measure of the difficulty of speech recognition tasks.
Journal of the Acoustical Society of America 62, S63, 1977.
"""

_KWARGS_DESCRIPTION = """
Args:
    nll: negative log likelihood of each document, summed over its tokens, in nats.
    tokens: number of tokens of each document.
Returns:
    perplexity: float >= 1.
Examples:

    >>> from edgelab import metrics
    >>> m = metrics.load("perplexity")
    >>> round(m.compute(nll=[0.6931471805599453, 2.0794415416798357], tokens=[1, 3])["perplexity"], 6)  # 4 coin flips
    2.0
"""


def perplexity(nll, tokens):
    """exp(nll / tokens) of summed nats and token counts (numbers or arrays of resampled sums)."""
    return np.exp(np.divide(nll, tokens))


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll, tokens):
        if sum(tokens) <= 0:
            raise ValueError("perplexity needs at least one token; tokens sum to 0")
        return {"perplexity": float(perplexity(np.sum(nll), np.sum(tokens)))}
