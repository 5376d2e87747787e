"""The claims about Cherry Studio and DeepSeek-R1-0528 (B1 to B12), a function each: it measures or models, and returns an `Entry`.

"Dynamic channel pruning" is read in the way that favours the article: taken literally (channels are skipped token by token, `SkipChannels`)
every weight stays and the model is 1.00 times as large, so B1 and B2 are judged by channels that are cut out for good, and the literal
reading stands beside it. Vision runs on scikit-learn's digits (extra `vision`): small images, and a small network.
"""

import copy
import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edgelab import studies
from edgelab.claims.bench import Bench, counted, file_bytes, found, half_precision, less, lost, median_ratio, shown, timed
from edgelab.compress import compress
from edgelab.evaluate import interval
from edgelab.experts_lab import decode
from edgelab.fold import fall_back, operators
from edgelab.ledger import Entry
from edgelab.prune_lab import most_by_channels
from edgelab.recipe import PruneChannels, Recipe, Route, SkipChannels, SparseAttention
from edgelab.routing import active_experts, flops_per_token, route
from edgelab.sparse_attention import attend, cost
from edgelab.studies import MEAN
from edgelab.vision import adapted, correct, digits, madds, network, train

_SHARE = 0.5  # of the channels: the most that was measured, and near 4.29 times fewer of the weights that are channels


def _cut(bench: Bench, kind: str = "moe", method: str = "activation") -> torch.nn.Module:
    calibration = None if method == "magnitude" else bench.calibration
    return compress(getattr(bench, kind), Recipe((PruneChannels(_SHARE, method=method),)), calibration=calibration, progress=False).model


def _kept_after_cut(kind: str = "moe") -> str:
    report = studies.read("channels").report
    base, left = (
        report.get(model=f"{kind}: {name}", metric="exact_match", slice=MEAN).value
        for name in ("fp", f"channels {_SHARE:.0%} by activation")
    )
    return f"{100 * left / base:.0f} % of the exact match (measured at build)"


def b1(bench: Bench) -> Entry:
    """Channel pruning: how many times smaller?"""
    whole = file_bytes(half_precision(bench.moe))
    cut = file_bytes(half_precision(_cut(bench, method="magnitude")))  # which channels go does not change the bytes
    skipping = compress(bench.moe, Recipe((SkipChannels(_SHARE),)), progress=False).model
    return counted(
        "B1",
        f"the 16-bit file of the embedded mixture with {_SHARE:.0%} of all feed-forward channels (experts' too) cut out for good",
        whole / cut,
        "x",
        beside={
            "skipped token by token (dynamic)": f"{whole / file_bytes(half_precision(skipping)):.2f} x: every weight stays",
            "all channels gone": f"{most_by_channels(bench.moe):.2f} x at most; the dense model {most_by_channels(bench.dense):.2f} x",
            "kept": _kept_after_cut(),
        },
    )


def b2(bench: Bench) -> Entry:
    """The same pruning: how many times faster?"""
    ids = bench.calibration[0][:1, :128]
    ways = {
        "whole": bench.moe,
        "cut": _cut(bench, method="magnitude"),
        "skipping": compress(bench.moe, Recipe((SkipChannels(_SHARE),)), progress=False).model,
    }
    times = timed({n: partial(m, input_ids=ids, use_cache=False) for n, m in ways.items()}, bench.turns)
    decoding = timed({n: partial(decode, ways[n], bench.ids) for n in ("whole", "cut")}, bench.turns)
    return found(
        "B2",
        f"reading 128 tokens, the embedded mixture against itself with {_SHARE:.0%} of the channels cut out, float32, one thread",
        median_ratio(times["whole"], times["cut"], bench.seed),
        "x",
        bench.turns,
        "turns, paired bootstrap",
        beside={
            "decoding": f"{shown(median_ratio(decoding['whole'], decoding['cut']))} x",
            "skipped token by token (dynamic)": f"{shown(median_ratio(times['whole'], times['skipping']))} x: gate and up are computed in "
            "full, and a dense product multiplies by the zeros",
            "kept": _kept_after_cut(),
        },
    )


def b3(bench: Bench) -> Entry:
    """16 experts, 2 to 4 active: FLOPs per token against all 16."""
    batches = bench.calibration[:1]

    def flops(model: torch.nn.Module, k: int) -> float:
        other = copy.deepcopy(model)
        route(other, Route(top_k=k))
        return flops_per_token(other, active_experts(other, batches))["all"]

    every = flops(bench.moe, 16)
    saved = {k: 100 * (1 - flops(bench.moe, k) / every) for k in (2, 3, 4)}
    return found(
        "B3",
        "floating-point operations per token of the embedded mixture with 2 of 16 experts, against all 16 active",
        (saved[2], min(saved.values()), max(saved.values())),
        "% less",
        3,
        "2, 3 and 4 active experts: least and most",
        beside={
            "by experts": ", ".join(f"top-{k} {v:.0f} %" for k, v in saved.items()),
            "against what": "all 16 active, which nobody runs: the model was trained with 2",
        },
    )


def b4(bench: Bench, length: int = 4096) -> Entry:
    """Local and strided attention on long text: time against dense causal attention."""
    draw = torch.Generator().manual_seed(bench.seed)
    q, k, v = torch.randn(3, 1, 4, length, 64, generator=draw)
    calls = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "sparse": lambda: attend(q, k, v, 32, 16),
    }
    times = timed(calls, bench.turns)
    sparse = compress(bench.moe, Recipe((SparseAttention(32, 16),)), progress=False).model
    ids = _text(bench, 1024)
    whole = timed({n: partial(m, input_ids=ids, use_cache=False) for n, m in (("dense", bench.moe), ("sparse", sparse))}, bench.turns)
    some, every = cost(length, 32, 16)
    report = studies.read("dynamic").report
    em = {m: report.get(model=m, metric="exact_match", slice=MEAN).value for m in ("fp", "attention 32/16")}
    kld = report.get(model="attention 32/16", metric="kld", slice=MEAN)
    return found(
        "B4",
        f"attention of one layer over {length:,} tokens (4 heads of 64), window 32 and every 16th token, against dense causal attention",
        less(median_ratio(times["sparse"], times["dense"], bench.seed)),
        "% less time",
        bench.turns,
        "turns, paired bootstrap",
        beside={
            "pairs of query and key": f"{100 * (1 - some / every):.0f} % fewer",
            "whole model, 1,024 tokens": f"{shown(less(median_ratio(whole['sparse'], whole['dense'])), 0)} % less time",
            "what it costs": f"exact match {100 * em['fp']:.1f} to {100 * em['attention 32/16']:.1f} %, KLD {kld.value:.3f} "
            f"[{kld.low:.3f}, {kld.high:.3f}] (measured at build)",
        },
    )


def _text(bench: Bench, length: int) -> Tensor:
    row = torch.cat([b.flatten() for b in bench.calibration])
    return row.repeat(math.ceil(length / len(row)))[:length].view(1, -1)


def b5(bench: Bench) -> Entry:
    """INT8 weights, a scale per channel: points of accuracy lost."""
    pair = bench.compared(bench.packed("int8-row").model)
    return found(
        "B5",
        "points of exact match that int8-row loses against the original",
        pair.lost(bench.seed),
        "points lost",
        pair.answers,
        "answers, paired bootstrap",
        beside=pair.beside(),
    )


def b6(bench: Bench) -> Entry:
    """W8A8 with ranges from KL calibration: points of accuracy lost."""
    pair = bench.compared(bench.packed("int8-row", activations="a8-static", ranges="kl").model)
    plain = {r: bench.right(bench.packed("int8-row", activations="a8-static", ranges=r).model) for r in ("max", "percentile", "mse")}
    losses = ", ".join(f"{rule} {shown(lost(bench.right(bench.moe), right, bench.seed))}" for rule, right in plain.items())
    return found(
        "B6",
        "points of exact match that int8-row with int8 inputs loses, one stored range per tensor by KL calibration",
        pair.lost(bench.seed),
        "points lost",
        pair.answers,
        "answers, paired bootstrap",
        control=f"the same with ranges by other rules loses, in points: {losses}",
        beside=pair.beside(),
    )


def b7(bench: Bench, epochs: int = 20, small: int = 4, large: int = 16) -> Entry:
    """A resolution that adapts, four times as many pixels a side where it matters: points of accuracy gained on small images."""
    split = digits(bench.seed)
    model = network(seed=bench.seed)
    train(model, split.train, epochs=epochs, sizes=(small, 8, large), seed=bench.seed)
    right = {size: correct(adapted(model, split.train.pixels, size), split.test.resized(size)) for size in (small, 8, large)}
    gained = right[large].astype(float) - right[small]
    drawn = np.random.default_rng(bench.seed).integers(0, len(gained), (4000, len(gained)))
    low, high = interval(100 * gained[drawn].mean(1))
    return found(
        "B7",
        f"handwritten digits of 8 x 8 pixels seen at {small} x {small} and at {large} x {large} (the article's factor of 4), one network "
        "for all sizes: points of accuracy; the two resolutions are fixed, and nothing chooses one for an image",
        (100 * gained.mean(), low, high),
        "points",
        len(gained),
        "test images, paired bootstrap",
        control=f"from 8 to {large} pixels, where no detail is added: {100 * (right[large].mean() - right[8].mean()):+.1f} points",
        beside={
            "accuracy": ", ".join(f"{size} px {100 * r.mean():.1f} %" for size, r in right.items()),
            "not tested": "the adapting itself (what picks a resolution, and what it costs), and 896 pixels",
            "cost": f"{madds(model, large) / madds(model, small):.1f} times the multiply-adds",
        },
    )


def b11(bench: Bench) -> Entry:
    """An operator that a runtime lacks is swapped: GELU for SiLU."""
    swapped = fall_back(bench.moe, "silu -> gelu")
    scaled = fall_back(bench.moe, "silu -> scaled_gelu")
    ids = bench.calibration[0][:1, :32]
    before, after = (operators(m, input_ids=ids, use_cache=False) for m in (bench.moe, swapped.model))
    done = float("silu" not in after and after.get("gelu", 0) == before["silu"])
    pair, other = bench.compared(swapped.model), bench.compared(scaled.model)
    return counted(
        "B11",
        "the rule silu -> gelu on the embedded mixture: 1 if one forward then executes no SiLU and as many GELU in its place",
        done,
        "swap",
        before["silu"],
        "operators executed, each counted",
        beside={"what it costs": f"{shown(pair.lost(bench.seed))} points of exact match"}
        | pair.beside()
        | {"GELU with argument and result scaled": other.beside()["same top token"] + " the same top token"},
    )
