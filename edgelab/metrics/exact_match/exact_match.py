"""Exact match of answers, and flips against a baseline. Self-contained: `evaluate.load` copies this file away."""

import datasets
import evaluate
import numpy as np
from evaluate.utils.file_utils import add_start_docstrings

_DESCRIPTION = """
Exact match: the share of answers that equal their reference, character by character (no stripping, no case folding).
With a baseline's answers it also counts flips: answers whose correctness changed, in either direction. Two models can
have the same exact match and still differ on many answers; flips show it.
"""

_CITATION = """
Flips: Dutta, Krishnan, Kwatra, Ramjee: Accuracy is not all you need (arXiv 2407.09141), section 2.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the model's answers.
    references: the right answers.
    baseline: (optional) the uncompressed model's answers to the same questions.
Returns:
    exact_match: share of right answers; with `baseline` also flips (share whose correctness changed),
    down (right before, wrong now) and up (wrong before, right now).
Examples:

    >>> from edgelab import metrics
    >>> m = metrics.load("exact_match")
    >>> m.compute(predictions=["28", "7", "31", "4"], references=["28", "7", "13", "5"])
    {'exact_match': 0.5}
    >>> m.compute(predictions=["1", "2", "9", "9"], references=["1", "2", "3", "4"], baseline=["1", "9", "3", "9"])
    {'exact_match': 0.5, 'flips': 0.5, 'down': 0.25, 'up': 0.25}
"""


def exact(prediction, reference) -> bool:
    """Whether one answer equals its reference: two strings, or two sequences of tokens."""
    return len(prediction) == len(reference) and all(a == b for a, b in zip(prediction, reference, strict=True))


def flips(before, now) -> tuple[np.ndarray, np.ndarray]:
    """(down, up): per question, whether a right answer became wrong, and whether a wrong one became right."""
    before, now = np.asarray(before, bool), np.asarray(now, bool)
    return before & ~now, ~before & now


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExactMatch(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, baseline=None):
        now = [exact(a, b) for a, b in zip(predictions, references, strict=True)]
        result = {"exact_match": float(np.mean(now))}
        if baseline is not None:
            if len(baseline) != len(references):
                raise ValueError(f"baseline has {len(baseline)} answers for {len(references)} references; give one for each")
            down, up = flips([exact(a, b) for a, b in zip(baseline, references, strict=True)], now)
            result |= {"flips": float(np.mean(down | up)), "down": float(np.mean(down)), "up": float(np.mean(up))}
        return result
