"""The claims about Open-AutoGLM (C1 to C10), a function each: it measures, models or simulates, and returns an `Entry`.

C5 can't be repeated: GLUE is natural-language tasks of thousands of words, and the embedded models know spoken commands and sums. What has
the same form is measured instead and labelled so: a model that was pruned and distilled, against the larger one that it came from.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgelab.claims.bench import (
    RESAMPLES,
    Bench,
    counted,
    faster_entry,
    file_bytes,
    found,
    median_ratio,
    one_thread,
    ratio_of,
    shown,
    timed,
)  # fmt: skip
from edgelab.claims.deepseek import PROCESSES, resident
from edgelab.compress import compress
from edgelab.early_exit import generate
from edgelab.evaluate import documents, interval
from edgelab.ledger import Entry
from edgelab.model import load
from edgelab.paths import data_dir
from edgelab.recipe import EarlyExit, Recipe
from edgelab.vision import conv_madds, counted_madds


def c1(bench: Bench) -> Entry:
    """INT8 against FP32: how many times faster?"""
    return faster_entry(bench, "C1", "int8-row")


def c2(bench: Bench) -> Entry:
    """INT8 against FP32: which share of the memory? Weights count once on both sides, as in A5."""
    made = bench.packed("int8-row", kind="wide")
    whole, small = resident(bench, "int8-row")
    return found(
        "C2",
        "resident memory above the imports of a process that runs the wide model on our runtime (64 tokens read, 4 decoded), int8-row in "
        "per cent of float32, weights there once",
        [100 * v for v in ratio_of(small, whole)],
        "% of FP32",
        PROCESSES,
        "processes, least and most",
        beside={
            "MiB": f"float32 {whole[0]:.0f}, int8 {small[0]:.0f}: buffers and cache are the same on both sides, or nearly",
            "the files alone": f"{100 * file_bytes(made) / file_bytes(bench.wide):.1f} %",
        },
    )


EXITS = tuple((after, agreement) for after in (2, 3) for agreement in (0.98, 0.995, 0.999))


def c3(bench: Bench, prompts: int = 100) -> Entry:
    """A dynamic branch, shallow for easy tokens: how much less latency, where no more answers may go wrong?

    Which exit (behind block 2 or 3, by how strict a threshold) is chosen on other prompts than those that it is judged by: the one that
    saves most among those that lose no answer there.
    """
    docs = [d for d in documents(bench.test, bench.tokenizer, {"assistant": 2 * prompts}) if d.domain == "assistant"]
    chosen_on, judged_on = docs[: len(docs) // 2], docs[len(docs) // 2 : 2 * prompts]
    calibration = bench.calibration
    models = {e: compress(bench.moe, Recipe((EarlyExit(*e),)), calibration=calibration, progress=False).model for e in EXITS}
    tried = {e: _exited(m, chosen_on) for e, m in models.items()}
    level = {e: t for e, t in tried.items() if t.right[True] >= t.right[False]}
    best = max(level or tried, key=lambda e: (tried[e].saved() if level else tried[e].right[True], e))
    fastest = max(tried, key=lambda e: (tried[e].saved(), e))
    t, other = (_exited(models[e], judged_on) for e in (best, fastest))
    drawn = np.random.default_rng(bench.seed).integers(0, len(judged_on), (RESAMPLES, len(judged_on)))
    wrong = t.right[False] - t.right[True]
    return found(
        "C3",
        f"processor time per token of the assistant's answers, prompts read, with an exit behind block {best[0]} of 4 ({best[1]:.1%} "
        "agreement asked for on calibration text), against without; torch, for our runtime has no exits. It loses "
        f"{wrong} of {len(judged_on)} answers",
        (t.saved(), *interval([t.saved(rows) for rows in drawn])),
        "% less time",
        len(judged_on),
        "prompts, answered both ways in turns, bootstrap",
        control=f"the exit that saves most on the prompts it was chosen on (behind block {fastest[0]}, {fastest[1]:.1%}) saves "
        f"{other.saved():.0f} % and loses {other.right[False] - other.right[True]} answers: a saving at unequal accuracy, not judged",
        beside={
            "tokens that leave early": f"{100 * np.mean(t.left):.0f} %",
            "exact match": f"{100 * t.right[True] / len(judged_on):.0f} %, without exits {100 * t.right[False] / len(judged_on):.0f} %",
            "chosen": f"of {len(EXITS)} exits, on {len(chosen_on)} other prompts, the one that saves most and "
            + ("loses no answer there" if level else "loses the fewest answers: each of them loses some"),
        },
    )


@dataclass(frozen=True)
class _Exited:
    """Answers with (True) and without (False) the exit: processor time per token [prompts], how many are right, the share that left."""

    seconds: dict[bool, np.ndarray]
    right: dict[bool, int]
    left: list[float]

    def saved(self, rows=slice(None)) -> float:
        """Per cent of the time."""
        return 100 * (1 - float(self.seconds[True][rows].mean() / self.seconds[False][rows].mean()))


def _exited(model: nn.Module, docs) -> _Exited:
    seconds, right, left = {True: [], False: []}, {True: 0, False: 0}, []
    with one_thread():
        generate(model, torch.from_numpy(docs[0].ids[: docs[0].first]))  # warms up
        for d in docs:
            wanted = d.targets.tolist()
            for on in (True, False):
                began = time.thread_time()
                w = generate(model, torch.from_numpy(d.ids[: d.first]), len(wanted) + 16, eos=int(d.ids[-1]), on=on)
                seconds[on].append((time.thread_time() - began) / len(w.ids))
                right[on] += w.ids == wanted
                if on:
                    left.append(w.left)
    return _Exited({on: np.array(s) for on, s in seconds.items()}, right, left)


def c5(bench: Bench) -> Entry:
    """Pruned and distilled, and better than a larger one? On our tasks, for want of GLUE."""
    pair = bench.compared(load(data_dir() / "edge-phone"))
    value, low, high = pair.lost(bench.seed)
    dense = 100 * float(np.mean([r.mean() for r in bench.right(bench.dense).values()]))
    return found(
        "C5",
        "not GLUE: exact match of edge-phone (half of the experts dropped, distilled, 2.9 bits) minus that of edge-moe, its original",
        (-value, -high, -low),
        "points above the larger",
        pair.answers,
        "answers of our two tasks, paired bootstrap",
        beside=pair.beside()
        | {"the dense model of the same text": f"{dense:.1f} %"}
        | {"why not GLUE": "its texts need words that models of a few million parameters, trained on Python's documentation, do not know"},
    )


def c7(bench: Bench) -> Entry:
    """INT8 with dynamic ranges by default: how much smaller is the file than FP32?"""
    smaller = {
        kind: 100 * (1 - file_bytes(bench.packed("int8-row", kind=kind)) / file_bytes(getattr(bench, kind))) for kind in ("moe", "dense")
    }
    return counted(
        "C7",
        "the embedded mixture in int8-row against its float32 file, scales, norms and routers counted",
        smaller["moe"],
        "% smaller",
        beside={
            "the dense model": f"{smaller['dense']:.1f} %",
            "against 16 bits": f"{100 - 2 * (100 - smaller['moe']):.1f} %: most models come in 16 bits already",
        },
    )


def c9(bench: Bench) -> Entry:
    """A depthwise separable convolution costs 1/K^2 + 1/N of a standard one: counted where it happens, over 12 shapes."""
    off, size = [], 16
    for k in (3, 5, 7):
        for inputs, outputs in ((8, 16), (16, 32), (32, 32), (64, 128)):
            one = nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False)
            deep = nn.Conv2d(inputs, inputs, k, padding=k // 2, groups=inputs, bias=False)
            point = nn.Conv2d(inputs, outputs, 1, bias=False)
            x = torch.zeros(1, inputs, size, size)
            executed = counted_madds(nn.Sequential(deep, point), x) / counted_madds(nn.Sequential(one), x)
            off.append(executed / (1 / k**2 + 1 / outputs))
    standard, separable = nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), nn.Conv2d(64, 128, 1, bias=False)
    )  # fmt: skip
    x = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(bench.seed))
    times = timed({"standard": lambda: standard(x), "separable": lambda: separable(x)}, bench.turns)
    return found(
        "C9",
        "multiply-adds executed by a depthwise and a pointwise convolution over those of one standard convolution, in parts of 1/K^2 + 1/N",
        (float(np.mean(off)), min(off), max(off)),
        "of the formula",
        len(off),
        "shapes (K of 3, 5, 7), least and most",
        control=f"the depthwise alone is not it: {conv_madds(deep, size, size)[0] / conv_madds(one, size, size)[0]:.4f} of the standard, "
        f"where the formula says {1 / 49 + 1 / 128:.4f}",
        beside={
            "time, 64 to 128 channels of 32 x 32": f"{shown(median_ratio(times['separable'], times['standard']))} of the standard's, "
            f"where the formula says {1 / 9 + 1 / 128:.2f}"
        },
    )
