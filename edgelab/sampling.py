"""From logits to a token: greedy, by temperature, from the nucleus; and how sure the model was of it."""

import numpy as np


def greedy(logits: np.ndarray) -> int:
    """The index of the largest of `logits` [vocab]. Raises ValueError where one is NaN: there is no largest then."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise ValueError(f"the largest logit is {logits[best]}: the model gave no usable numbers for this request")
    return best


class Sampler:
    """Chooses a token from logits: the largest at temperature 0, else drawn from softmax(logits / temperature).

    `top_p`: from the fewest tokens that together have so much probability (nucleus sampling, Holtzman et al., arXiv 1904.09751). The same
    seed draws the same tokens.

    >>> Sampler()(np.array([0.0, 2.0, 1.0], np.float32))
    1
    >>> Sampler(temperature=1.0, top_p=0.5, seed=0)(np.log(np.array([0.1, 0.6, 0.3], np.float32)))  # 0.6 >= 0.5: only that one
    1
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
        self.temperature, self.top_p = float(temperature), float(top_p)
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The number of the chosen token, for logits [vocabulary]."""
        if self.temperature == 0:
            return greedy(logits)
        p = probabilities(logits, self.temperature)
        order = np.argsort(-p, kind="stable")
        mass = np.cumsum(p[order])
        if self.top_p < 1:
            mass = mass[: int(np.searchsorted(mass, self.top_p)) + 1]
        return int(order[min(int(np.searchsorted(mass, self._random.random() * mass[-1], side="right")), len(mass) - 1)])


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) float64 [..., vocabulary]. Raises ValueError for logits that hold NaN or infinity."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(-1, keepdims=True)
    if not np.isfinite(z).all():
        raise ValueError("the logits hold NaN or infinity: the model's weights or its inputs do not fit")
    p = np.exp(z)
    return p / p.sum(-1, keepdims=True)


def confidence(logits: np.ndarray, token: int) -> float:
    """softmax(logits)[token]."""
    p = np.exp(logits - np.max(logits))
    return float(p[token] / p.sum())
