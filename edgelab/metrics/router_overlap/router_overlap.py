"""Overlap of two routers' chosen experts. Self-contained: `evaluate.load` copies this file away."""

import datasets
import evaluate
import torch
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
Router overlap: of the k experts that a mixture-of-experts layer picks for a token, the share that another copy of the
layer picks too, |A and B| / k, averaged over tokens. 1 means that compression left the routing as it was; picking k of
n at random gives k / n.
"""

_CITATION = """
The intersection of two sets of k over k; a measure of ours for routing before and after compression.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the chosen experts, one row of k indices per token, in any order.
    references: the other router's choice, the same shape.
Returns:
    router_overlap: float in 0 .. 1.
Examples:

    >>> from edgelab import metrics
    >>> metrics.load("router_overlap").compute(predictions=[[3, 1], [0, 2]], references=[[1, 3], [2, 5]])
    {'router_overlap': 0.75}
"""


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|A and B| / k per token, float32 [tokens], of two choices [tokens, k] without repetition in a row."""
    return (a[:, :, None] == b[:, None, :]).any(-1).float().mean(-1)


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RouterOverlap(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references):
        return {"router_overlap": float(overlap(torch.tensor(predictions), torch.tensor(references)).mean())}
