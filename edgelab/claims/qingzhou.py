"""The claims about Qingzhou (D1 to D9), a function each: it measures, models or simulates, and returns an `Entry`."""

import copy
from functools import partial

from torch import nn

from edgelab import studies
from edgelab.adapt import DOMAIN
from edgelab.claims.bench import Bench, counted, exact, file_bytes, found, kept, lost, median_ratio, run_tokens, shown, timed
from edgelab.compress import compress
from edgelab.experts_lab import decode
from edgelab.ledger import Entry
from edgelab.recipe import Qat, Quantize, Recipe, Route
from edgelab.routing import route
from edgelab.runtime import Runtime
from edgelab.scheme import QuantScheme


def _routed(model: nn.Module, k: int) -> nn.Module:
    other = copy.deepcopy(model)
    route(other, Route(top_k=k))
    return other


def d1(bench: Bench) -> Entry:
    """Two of 16 experts instead of all: how many times faster, in the setting where it is least?"""
    ratios, torches, ids = {}, {}, bench.ids[0].tolist()
    for kind, name in (("wide", "random mixture"), ("moe", "embedded mixture")):
        for scheme in ("float32", "int4-g32"):
            model = _routed(getattr(bench, kind) if scheme == "float32" else bench.packed(scheme, kind=kind).model, 16)
            runtime = exact(model, context=64) if scheme == "float32" else Runtime(model, threads=1, context=64)
            calls = {k: partial(_with, runtime, k, ids) for k in (2, 16)}
            if scheme == "float32":
                calls |= {f"torch, {k}": partial(decode, _routed(model, k), bench.ids) for k in (2, 16)}
            times = timed(calls, bench.turns)
            ratios[f"{name}, {scheme}"] = median_ratio(times[16], times[2], bench.seed)
            if scheme == "float32":
                torches[name] = median_ratio(times["torch, 16"], times["torch, 2"], bench.seed)
            del model, runtime, calls
    worst = min(ratios, key=lambda name: ratios[name][0])
    return found(
        "D1",
        f"reading 8 tokens and decoding 16 on our runtime, one thread, with 2 of 16 experts against all 16: the least of {len(ratios)} "
        "settings, "
        f"{worst}",
        ratios[worst],
        "x",
        bench.turns,
        "turns, paired bootstrap",
        beside={
            "every setting": ", ".join(f"{name} {shown(r)} x" for name, r in ratios.items()),
            "in torch, float32": ", ".join(f"{name} {shown(r)} x" for name, r in torches.items()),
            "against what": "all 16 active, which nobody runs; experts are nine tenths of the random model's weights",
        },
    )


def _with(runtime: Runtime, k: int, ids: list[int]) -> None:
    runtime.top_k = k
    run_tokens(runtime, ids)


def d2(bench: Bench) -> Entry:
    """The accuracy that this routing loses: there is no dense model of the same text and size to compare it with."""
    pair = bench.compared(bench.moe, original=_routed(bench.moe, 16))
    one = lost(bench.right(bench.moe), bench.right(_routed(bench.moe, 1)), bench.seed)
    return found(
        "D2",
        "not the claim: points of exact match that the embedded mixture loses with the 2 of 16 experts that it was trained with, "
        "against all "
        "16, which it never saw in training and which make it worse",
        pair.lost(bench.seed),
        "points lost",
        pair.answers,
        "answers, paired bootstrap",
        control=f"a single expert loses {shown(one)} points against the two that it was trained with",
        beside={
            "exact match": pair.beside()["exact match"].replace("original", "all 16 active"),
            "what it would take": "a dense model as large as all experts together, taught on the same text for as long",
        },
    )


def _learnt(bench: Bench, steps: int):
    rules = (("@router", None), ("*", QuantScheme.parse("int8-row")))
    recipe = Recipe((Quantize(rules, method=Qat(steps=steps, lr=3e-5)),))
    return compress(bench.moe, recipe, training=bench.training, progress=False)


def d6(bench: Bench, steps: int = 100) -> Entry:
    """INT8 by quantization-aware training: the accuracy that is kept."""
    pair = bench.compared(_learnt(bench, steps).model)
    nearest = kept(bench.right(bench.moe), bench.right(bench.packed("int8-row").model), bench.seed)
    return found(
        "D6",
        f"exact match of the embedded mixture in int8-row after {steps} steps of quantization-aware training, in % of the original's",
        pair.kept(bench.seed),
        "% of FP32",
        pair.answers,
        "answers, paired bootstrap",
        control=f"rounded to nearest, without learning: {shown(nearest, 1)} %",
        beside=pair.beside(),
    )


def d7(bench: Bench) -> Entry:
    """The size after it: codes and scales do not know how they were found, so it is that of int8-row."""
    shares = {kind: file_bytes(bench.packed("int8-row", kind=kind)) / file_bytes(getattr(bench, kind)) for kind in ("moe", "dense")}
    return counted(
        "D7",
        "the embedded mixture's file in int8-row over its float32 file, scales, norms and routers counted",
        shares["moe"],
        "of FP32",
        beside={"the dense model": f"{shares['dense']:.4f}", "of 16 bits": f"{2 * shares['moe']:.3f}"},
    )


def d8(bench: Bench) -> Entry:
    """1,000 labelled examples for a new domain: exact match there, of a compressed model that learnt them."""
    report = studies.read("adapt").report
    row = report.get(model="int4 + LoRA", metric="exact_match", slice=DOMAIN)
    before = report.get(model="int4", metric="exact_match", slice=DOMAIN)
    old = {m: report.get(model=m, metric="exact_match", slice="assistant").value for m in ("int4", "int4 + LoRA")}
    alone = {d: report.get(model="fp, all weights, not rehearsed", metric="exact_match", slice=d).value for d in (DOMAIN, "assistant")}
    return found(
        "D8",
        "exact match on commands to a robot, never seen before, after the int4 model's adapters learnt 1,000 of them beside old text",
        [100 * v for v in (row.value, row.low, row.high)],
        "%",
        row.n,
        "answers, bootstrap",
        provenance="measured at build",
        control=f"before learning: {100 * before.value:.0f} %",
        beside={
            "what it forgets": f"the assistant's exact match goes from {100 * old['int4']:.0f} to {100 * old['int4 + LoRA']:.0f} %",
            "without old text, all weights in floating point": f"{100 * alone[DOMAIN]:.0f} %, and the assistant falls to "
            f"{100 * alone['assistant']:.0f} %",
        },
    )
