"""Share of positions where two models' likeliest token agrees. Self-contained: `evaluate.load` copies this file away."""

import datasets
import evaluate
import numpy as np
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
Same top token: the share of positions at which two models would write the same next token under greedy decoding,
given the same text before it.
"""

_CITATION = """
Reported beside KL divergence by llama.cpp, tools/perplexity ("Same top p"), for the formats of its README.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the likeliest token of the one model at each position (argmax of its logits).
    references: the likeliest token of the other model at each position.
Returns:
    same_top: float in 0 .. 1.
Examples:

    >>> from edgelab import metrics
    >>> metrics.load("same_top_token").compute(predictions=[5, 7, 7, 1], references=[5, 7, 8, 1])
    {'same_top': 0.75}
"""


def same_top(predictions, references):
    """Whether the two agree, per position (arrays or tensors of token ids)."""
    return predictions == references


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SameTopToken(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references):
        return {"same_top": float(np.mean(same_top(np.asarray(predictions), np.asarray(references))))}
