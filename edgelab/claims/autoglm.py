"""The claims about Open-AutoGLM (C1 to C10), a function each: it measures, models or simulates, and returns an `Entry`.

C5 can't be repeated: GLUE is natural-language tasks of thousands of words, and the embedded models know spoken commands and sums. What has
the same form is measured instead and labelled so: a model that was pruned and distilled, against the larger one that it came from.
"""

import numpy as np
import torch
from torch import nn

from edgelab.claims.bench import RESAMPLES, Bench, counted, decoding, file_bytes, found, median_ratio, peaks_mib, shown, timed
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
    ratios = decoding(bench, "int8-row")
    return found(
        "C1",
        "reading 8 tokens and decoding 16, one thread: float32 (torch) against int8-row with int8 inputs (our kernels), wide random model",
        ratios["wide, int8-row, int8 inputs"],
        "x",
        bench.turns,
        "turns, paired bootstrap",
        beside={"int8 with float32 inputs": f"{shown(ratios['wide, int8-row'])} x"}
        | {"the embedded mixture": f"{shown(ratios['moe, int8-row, int8 inputs'])} x: all of it lies in the cache"},
    )


def c2(bench: Bench) -> Entry:
    """INT8 against FP32: which share of the memory?"""
    made = bench.packed("int8-row", kind="wide")
    peaks = peaks_mib({"float32": bench.wide, "int8": made}, repeats=3)
    whole, small = peaks["float32"], peaks["int8"]
    return found(
        "C2",
        "peak of RAM above the imports while a process loads the wide model and decodes 4 tokens, int8-row in per cent of float32",
        (100 * small[0] / whole[0], 100 * small[1] / whole[2], 100 * small[2] / whole[1]),
        "% of FP32",
        3,
        "processes, least and most",
        beside={
            "MiB": f"float32 {whole[0]:.0f}, int8 {small[0]:.0f}",
            "the files alone": f"{100 * file_bytes(made) / file_bytes(bench.wide):.1f} %; a layer that has computed holds its codes twice, "
            "as saved and in tiles",
        },
    )


def c3(bench: Bench, prompts: int = 100) -> Entry:
    """A dynamic branch, shallow for easy tokens: how much less latency?"""
    model = compress(bench.moe, Recipe((EarlyExit(after=2),)), calibration=bench.calibration, progress=False).model
    docs = [d for d in documents(bench.test, bench.tokenizer, {"assistant": prompts}) if d.domain == "assistant"][:prompts]
    seconds, right, left = {True: [], False: []}, {True: 0, False: 0}, []
    generate(model, torch.from_numpy(docs[0].ids[: docs[0].first]))  # warms up
    for d in docs:
        wanted = d.targets.tolist()
        for on in (True, False):
            w = generate(model, torch.from_numpy(d.ids[: d.first]), len(wanted) + 16, eos=int(d.ids[-1]), on=on)
            seconds[on].append(w.seconds / max(1, len(w.ids) - 1))
            right[on] += w.ids == wanted
            if on:
                left.append(w.left)
    shallow, whole = np.array(seconds[True]), np.array(seconds[False])
    drawn = np.random.default_rng(bench.seed).integers(0, len(docs), (RESAMPLES, len(docs)))
    low, high = interval(100 * (1 - shallow[drawn].mean(1) / whole[drawn].mean(1)))
    return found(
        "C3",
        "time per token of the assistant's answers with an exit behind block 2 of 4 (98 % agreement on calibration text), against without",
        (100 * (1 - shallow.mean() / whole.mean()), low, high),
        "% less time",
        len(docs),
        "prompts, answered both ways in turns, bootstrap",
        beside={
            "tokens that leave early": f"{100 * np.mean(left):.0f} %",
            "exact match": f"{100 * right[True] / len(docs):.0f} %, without exits {100 * right[False] / len(docs):.0f} %",
        },
    )


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
