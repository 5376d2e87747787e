"""KL divergence between two models' next-token distributions. Self-contained: `evaluate.load` copies this file away."""

import datasets
import evaluate
import numpy as np
import torch
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
KL divergence per token, in nats, from a reference model's next-token distribution P to another model's Q on the same
text: sum over the vocabulary of P ln(P / Q). Its mean says how far compression moved the model, its 99th percentile
how far on the tokens that it moved most; unlike perplexity, gains on some tokens cannot hide losses on others.
"""

_CITATION = """
Kullback, Leibler: On information and sufficiency. Annals of Mathematical Statistics 22, 1951.
As a measure of compressed language models: llama.cpp, tools/perplexity; Dutta et al., Accuracy is not all you need
(arXiv 2407.09141), section 4.
"""

_KWARGS_DESCRIPTION = """
Args:
    references: logits of the reference model, one row of vocabulary size per token (any constant may be added to a row).
    predictions: logits of the other model, the same shape.
Returns:
    kld: mean over tokens, nats; kld_p99: 99th percentile over tokens.
Examples:

    >>> from edgelab import metrics
    >>> m = metrics.load("kl_divergence")
    >>> out = m.compute(references=[[0.0, 0.0], [0.0, 0.0]], predictions=[[0.0, 0.0], [1.0986123, 0.0]])  # 1/2 against 3/4
    >>> round(out["kld"], 5), round(out["kld_p99"], 5)  # ln(4/3) / 4 and ln(4/3) / 2
    (0.07192, 0.14384)
"""


def token_kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats, [tokens], of log probabilities [tokens, vocabulary].

    A word that the reference rules out (log probability -inf) adds nothing, whatever the other says; a word that only
    the other rules out makes the divergence infinite.
    """
    p = reference.exp()
    terms = torch.where(p > 0, p * (reference - other), 0.0)
    return terms.sum(-1).clamp_min_(0.0)  # rounding can leave -1e-8


def percentile(values, share: float = 0.99) -> float:
    """The smallest of `values` that at least `share` of them do not exceed (the inverse of the empirical CDF)."""
    return float(np.quantile(np.asarray(values), share, method="inverted_cdf"))


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class KLDivergence(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references):
        p = torch.log_softmax(torch.tensor(references, dtype=torch.float32), -1)
        q = torch.log_softmax(torch.tensor(predictions, dtype=torch.float32), -1)
        each = token_kl(p, q).numpy()
        return {"kld": float(each.mean(dtype=np.float64)), "kld_p99": percentile(each)}
