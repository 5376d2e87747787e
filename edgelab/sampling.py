"""From logits to a token: greedy, by temperature, from the nucleus; and how sure the model was of it."""

import numpy as np


def greedy(logits: np.ndarray) -> int:
    """The index of the largest of `logits` [vocab]. Raises ValueError where one is NaN: there is no largest then."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise ValueError(f"the largest logit is {logits[best]}: the model gave no usable numbers for this request")
    return best


LEAST_TEMPERATURE = 1e-4  # below it the differences of logits are no numbers any more; it is greedy long before


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
        if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < float("inf")):
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or a number from {LEAST_TEMPERATURE} on")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
        self.temperature, self.top_p = float(temperature), float(top_p)
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        """The number of the chosen token, for logits [vocabulary]."""
        if self.temperature == 0:
            return greedy(logits)
        p = probabilities(logits, self.temperature)
        order = None if self.top_p == 1 else nucleus(p, self.top_p)
        mass = np.cumsum(p if order is None else p[order])
        at = min(int(np.searchsorted(mass, self._random.random() * mass[-1], side="right")), len(mass) - 1)
        return at if order is None else int(order[at])


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """The numbers of the fewest tokens whose probabilities p [vocabulary] reach `top_p` together, the likeliest first.

    Only as many are sorted as are needed: 152,064 take 28 ms, and 1,024 of them nearly always do.
    """
    count = 1024
    while True:
        few = len(p) <= count
        found = np.arange(len(p)) if few else np.argpartition(p, len(p) - count)[len(p) - count :]
        order = found[np.lexsort((found, -p[found]))]  # of equal ones the lower number first
        mass = np.cumsum(p[order])
        if few or mass[-1] >= top_p:
            return order[: int(np.searchsorted(mass, top_p)) + 1]
        count *= 8


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) float64 [..., vocabulary]. Raises ValueError for logits that hold NaN or infinity."""
    highest = logits.max(-1, keepdims=True)
    z = (logits - highest).astype(np.float64) / temperature
    if not np.isfinite(z).all():
        raise ValueError("the logits hold NaN or infinity: the model's weights or its inputs do not fit")
    p = np.exp(z)
    return p / p.sum(-1, keepdims=True)


def confidence(logits: np.ndarray, token: int) -> float:
    """softmax(logits)[token]."""
    p = np.exp(logits - np.max(logits))
    return float(p[token] / p.sum())
