"""What makes a comparison fair, each as a few measured rows: behind the first part of notebook 11.

    divergences  KL divergence per model: with it, what calibration on the test text is worth
    against      one size, several originals: "times smaller" depends on what it is compared with
    effective    what a scheme stores per weight, scales and offsets counted
    two_ways     a difference with the models' own intervals, and paired: the same documents are hard for both
    hidden       perplexity and accuracy that hardly move, and how many answers are other ones
    luck         of k methods that change nothing, how often the best of them looks better

`luck` makes its methods out of a measured one: the sign of each document's difference is thrown, so that the truth is zero, and the
spread over documents is the real one (a sign-flip test, Fisher 1935). "Looks better": its 95 % interval, mean -1.96 standard errors
to +1.96, lies below zero. For k independent tries that happens with probability 1 - 0.975^k.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from edgelab import words
from edgelab.compare import pool
from edgelab.evaluate import Measured, compare, spread, summarise, weigh
from edgelab.paired import mcnemar
from edgelab.scheme import QuantScheme


def against(compressed_bytes: int, weights: int) -> list[dict[str, str]]:
    """How many times smaller `compressed_bytes` is than `weights` numbers in 32, 16 and 8 bits.

    >>> [row["times smaller"] for row in against(500, 1000)]
    ['8.00', '4.00', '2.00']
    """
    return [
        {"compared with": name, "bytes": f"{weights * size:,}", "times smaller": f"{weights * size / compressed_bytes:.2f}"}
        for name, size in (("float32, as it runs here", 4), ("bfloat16, as it is published", 2), ("int8, which loses nearly nothing", 1))
    ]


def effective(schemes: Iterable[str], shape: tuple[int, int] = (256, 256)) -> list[dict[str, str]]:
    """Bits per weight of a matrix of that shape, as its name says and as it is stored.

    >>> [row["stored"] for row in effective(["int4-g32", "int4-row"])]
    ['4.500', '4.062']
    """
    found = [QuantScheme.parse(s) for s in schemes]
    return [{"scheme": str(s), "its name says": str(s.bits), "stored": f"{s.bits_per_weight(shape):.3f}"} for s in found]


def two_ways(measured: Measured, a: str, b: str, *, resamples: int = 2000, seed: int = 0) -> list[dict[str, str]]:
    """Per domain: bits of `a` and `b` per token with their own intervals, their difference paired, and what each way says."""
    rows, paired = [], compare(measured, a, b, resamples=resamples, seed=seed)
    for domain in measured.domains():
        one, two = (measured.scores[m][domain] for m in (a, b))
        source = np.arange(len(one.tokens)) if one.source is None else one.source
        n, w = int(source.max()) + 1, weigh(source, resamples, seed)
        ends = [spread((w @ s.nll) / (w @ s.tokens), n) for s in (one, two)]
        if any(low is None for low, _ in ends):
            continue  # a single source has no spread
        r = paired.get(slice=domain)
        (low_a, high_a), (low_b, high_b) = ends
        rows.append(
            {
                "on": domain,
                f"{a}, nats/token": f"{one.nll.sum() / one.tokens.sum():.3f} [{low_a:.3f}, {high_a:.3f}]",
                f"{b}, nats/token": f"{two.nll.sum() / two.tokens.sum():.3f} [{low_b:.3f}, {high_b:.3f}]",
                "side by side": "apart" if high_a < low_b or high_b < low_a else "overlap: cannot tell",
                "difference, paired": f"{r.value:+.4f} [{r.low:+.4f}, {r.high:+.4f}]",
                "paired": "apart" if r.low > 0 or r.high < 0 else "cannot tell",
            }
        )
    return rows


def hidden(measured: Measured, models: Sequence[str]) -> list[dict[str, str]]:
    """Of each model against the baseline, where there are answers: perplexity's ratio, points lost, flips, and McNemar's p."""
    rows, base = [], measured.scores[measured.baseline]
    for model in models:
        scores = [(base[d], measured.scores[model][d]) for d in measured.domains() if base[d].correct is not None]
        before, after = (np.concatenate([pair[i].correct for pair in scores]).astype(bool) for i in (0, 1))
        nll = sum(float(b.nll.sum() - a.nll.sum()) for a, b in scores) / sum(float(a.tokens.sum()) for a, _ in scores)
        down, up = int((before & ~after).sum()), int((~before & after).sum())
        rows.append(
            {
                "model": model,
                "perplexity of answers": f"x {np.exp(nll):.3f}",
                "points lost": f"{100 * (before.mean() - after.mean()):+.1f}",
                "right to wrong": str(down),
                "wrong to right": str(up),
                "flips": f"{100 * (down + up) / len(before):.1f} % of {len(before)}",
                "p (McNemar)": f"{mcnemar(down, up):.3f}",
            }
        )
    return rows


def divergences(measured: Measured) -> list[dict[str, str]]:
    """KL divergence to the baseline per model, all documents together, with its interval."""
    report = summarise(pool(measured), resamples=1000)
    models = [m for m in report.models() if m != measured.baseline]
    rows = [report.get(model=m, metric="kld", slice="all") for m in models]
    return [{"model": r.model, "KL divergence, nats/token": r.text(4)} for r in rows]


def differences(measured: Measured, a: str, b: str, domain: str) -> np.ndarray:
    """Nats per token by which `b` needs more than `a`, per document of `domain`: float64 [documents]."""
    one, two = (measured.scores[m][domain] for m in (a, b))
    return (two.nll - one.nll) / one.tokens


def luck(differences: np.ndarray, tries: Iterable[int] = (1, 5, 20, 100), *, trials: int = 2000, seed: int = 0) -> list[dict[str, str]]:
    """How often the best of k methods that change nothing looks better, measured by thrown signs, and 1 - 0.975^k.

    Raises ValueError for fewer than 8 documents: with so few the interval itself is wrong.
    """
    d = np.asarray(differences, np.float64)
    if len(d) < 8:
        raise ValueError(f"{len(d)} documents are too few for an interval from standard errors; give 8 or more")
    rng, n = np.random.default_rng(seed), len(d)
    rows = []
    for k in tries:
        found = 0
        for _ in range(trials):
            thrown = rng.choice((-1.0, 1.0), (k, n)) * d
            error = thrown.std(1, ddof=1) / np.sqrt(n)
            found += bool((thrown.mean(1) + 1.96 * error < 0).any())
        share = found / trials
        rows.append({"methods tried": str(k), "the best looks better": f"{share:.0%}", "1 - 0.975^k": f"{1 - 0.975**k:.0%}"})
    return rows


def seeds_apart(report, models: Mapping[str, str], metric: str = "kld", on: str = "mean of domains") -> list[dict[str, str]]:
    """Rows of runs that differ in a seed alone: value and the interval over documents, which knows nothing of seeds."""
    rows = [(label, report.get(model=model, metric=metric, slice=on)) for label, model in models.items()]
    lines = [
        {"run": label, words.metric(metric).title: f"{r.value:.3f}", "95 % over documents": f"[{r.low:.3f}, {r.high:.3f}]"}
        for label, r in rows
    ]
    values = [r.value for _, r in rows]
    return [
        *lines,
        {
            "run": "all of them",
            words.metric(metric).title: f"{np.mean(values):.3f}",
            "95 % over documents": f"from {min(values):.3f} to {max(values):.3f}",
        },
    ]
