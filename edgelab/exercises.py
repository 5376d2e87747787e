"""What the checks of the notebooks' exercises share: reading an answer, and saying what is wrong with it."""

import math
from collections.abc import Mapping

import numpy as np


def numbers(answer, count: int) -> list[float] | None:
    """`answer` as `count` finite numbers, or None when it is something else.

    >>> numbers([1, "2"], 2), numbers("x", 1), numbers(3, 2)
    ([1.0, 2.0], None, None)
    """
    try:
        found = [float(a) for a in np.asarray(answer, dtype=float).reshape(-1)]
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def hint(value: float, hints: Mapping[float, str], otherwise: str, tolerance: float = 2e-3) -> str:
    """ "Not yet", with the hint of the wrong value that `value` is (to `tolerance`, absolute), or `otherwise`."""
    return f"Not yet: {next((h for v, h in hints.items() if abs(value - v) <= tolerance), otherwise)}."
