"""The claims about DeepSeek-R1 on a phone (A1 to A15), a function each: it measures or models, and returns an `Entry`.

What they are judged by is in `data/claims.csv`. Sizes are of files; accuracy is exact match on the answers of `bench`; speed is
of the wide random model there, for the embedded one fits into a cache. The article's figures for a Xiaomi 13 Pro are modelled.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np

from edgelab import studies
from edgelab.claims.bench import (
    EXACT,
    Bench,
    Spread,
    Way,
    counted,
    faster_entry,
    file_bytes,
    found,
    half_precision,
    less,
    median_ratio,
    over,
    peaks_mib,
    processes,
    ratio_of,
    shown,
    timed,
)  # fmt: skip
from edgelab.claims.devices import four_bits_on_a_phone
from edgelab.compress import compress
from edgelab.expert_steps import split_experts
from edgelab.lazy import LazyBundle
from edgelab.ledger import Entry
from edgelab.model import dequantize, weights
from edgelab.prune_lab import products
from edgelab.recipe import PruneChannels, Recipe
from edgelab.startup import memory, random_bundle
from edgelab.structure import figures
from edgelab.studies import MEAN

PROCESSES = 2  # for each side of a ratio of memory, which hardly differs from one to the next


def a1(bench: Bench) -> Entry:
    """4-bit symmetric quantization: how many times smaller than 16 bits is the file?"""
    times = {}
    for kind in ("moe", "dense"):
        whole = file_bytes(half_precision(getattr(bench, kind)))
        for scheme in ("int4-g32", "int4-row"):
            times[kind, scheme] = whole / file_bytes(bench.packed(scheme, kind=kind))
    return counted(
        "A1",
        "the embedded mixture, every weight in int4-g32 (symmetric, a scale per 32 weights), against its bfloat16 file",
        times["moe", "int4-g32"],
        "x",
        beside={
            "one scale per row instead": f"{times['moe', 'int4-row']:.2f} x",
            "the dense model": f"{times['dense', 'int4-g32']:.2f} x; one scale per row {times['dense', 'int4-row']:.2f} x",
            "against float32": f"{2 * times['moe', 'int4-g32']:.2f} x",
            "the most there is": "16 / 4 = 4.00 x without a single scale: 13 GB to 3.2 GB is 4.06",
        },
    )


def a2(bench: Bench) -> Entry:
    """The accuracy that is kept after that."""
    pair = bench.compared(bench.packed("int4-g32").model)
    return found(
        "A2",
        "exact match of int4-g32, rounded to nearest, against the original's",
        pair.kept(bench.seed),
        "%",
        pair.answers,
        "answers, paired bootstrap",
        beside=pair.beside(),
    )


def a3(bench: Bench) -> Entry:
    """128 experts, 4 of them active: 16 experts cut into eight parts each, without a step of learning."""
    fewer, whole = copy.deepcopy(bench.moe), copy.deepcopy(bench.moe)
    split_experts(fewer, 8, bench.calibration[:2], active=4)
    split_experts(whole, 8, bench.calibration[:2])
    pair = bench.compared(fewer)
    ids = bench.calibration[0][:1]
    moved = (whole(ids).logits - bench.moe(ids).logits).abs().max().item()
    return found(
        "A3",
        "exact match with 4 of 128 fine experts active (our 16, each cut into 8 parts, not trained so) against the original's",
        pair.kept(bench.seed),
        "%",
        pair.answers,
        "answers, paired bootstrap",
        control=f"16 of 128 active is the same function: no logit moves by more than {moved:.1e}",
        beside=pair.beside(),
    )


def a4(bench: Bench) -> Entry:
    """FP32 against INT4: how many times faster?"""
    return faster_entry(bench, "A4", "int4-g32", on_a_Snapdragon_8_Gen_2=four_bits_on_a_phone())


def a5(bench: Bench) -> Entry:
    """FP32 against INT4: how much less memory does a process keep? Weights count once on both sides."""
    made = bench.packed("int4-g32", kind="wide")
    whole, small = resident(bench, "int4-g32")
    runs = {"torch": (bench.wide, bench.moe, Way("transformers"))}
    torches = over(processes(runs, repeats=1)["torch"], "steady_mib")[0]
    peaks = [peaks_mib(m, repeats=1)[0] for m in (bench.wide, made)]
    return found(
        "A5",
        "resident memory above the imports of a process that runs the wide model on our runtime (64 tokens read, 4 decoded), int4-g32 "
        "against float32, weights there once",
        less(ratio_of(small, whole)),
        "% less",
        PROCESSES,
        "processes, least and most",
        beside={
            "MiB": f"float32 {whole[0]:.0f}, int4 {small[0]:.0f}; transformers in float32 {torches:.0f}",
            "the peak where files are mapped and copied": f"float32 {peaks[0]:.0f} MiB, int4 layers in torch {peaks[1]:.0f}: "
            f"{100 * (1 - peaks[1] / peaks[0]):.0f} % less, for float32 is there twice while it loads; not judged",
            "the files alone": f"{100 * (1 - file_bytes(made) / file_bytes(bench.wide)):.1f} % less",
        },
    )


def resident(bench: Bench, scheme: str) -> tuple[Spread, Spread]:
    """MiB that our runtime keeps resident for the wide model, in float32 and in `scheme`."""
    runs = {
        "float32": (bench.wide, bench.moe, Way(settings=EXACT)),
        scheme: (bench.packed(scheme, kind="wide"), bench.packed(scheme), Way()),
    }
    found = processes(runs, repeats=PROCESSES)
    return over(found["float32"], "steady_mib"), over(found[scheme], "steady_mib")


def a6(bench: Bench) -> Entry:
    """INT8 weights: how far from the original are they?"""
    errors = {}
    for scheme in ("int8-row", "int8-tensor"):
        twin = copy.deepcopy(bench.packed(scheme).model)
        dequantize(twin)
        after = {w.name: w.tensor for w in weights(twin)}
        rounded = [w for w in weights(bench.moe) if w.role != "router"]
        errors[scheme] = {
            w.name: 100 * float((after[w.name].double() - w.tensor.double()).norm() / w.tensor.double().norm()) for w in rounded
        }
    rows, tensors = errors["int8-row"], errors["int8-tensor"]
    worst = max(rows, key=rows.get)
    return counted(
        "A6",
        "relative error |W - Q| / |W| of the worst weight of the embedded mixture in int8 with one scale per output row",
        rows[worst],
        "%",
        len(rows),
        "the largest over all weights; nothing sampled",
        beside={
            "which": worst,
            "mean over weights": f"{np.mean(list(rows.values())):.2f} %",
            "one scale per matrix": f"worst {max(tensors.values()):.2f} %, mean {np.mean(list(tensors.values())):.2f} %",
        },
    )


def a7(bench: Bench, megabytes: float = 600, chunk_bytes: int = 256_000_000) -> Entry:
    """Weights on demand in chunks: what is resident before a weight is wanted, and what at most while a token goes through."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = random_bundle(Path(tmp) / "random", megabytes=megabytes, max_chunk_bytes=chunk_bytes)
        sizes = [f.stat().st_size / 1e6 for f in folder.glob("*.safetensors")]
        LazyBundle(folder, keep=1).model  # noqa: B018 (the first one imports what it needs)
        start = memory()["VmRSS"]
        bundle = LazyBundle(folder, keep=1)
        model = bundle.model
        opened, before = (memory()["VmRSS"] - start) / 1e6, len(bundle.filled)
        model(bench.ids[:, :8] % model.config.vocab_size)
        peak = {name: mib * 2**20 / 1e6 for name, mib in peaks_lazy(folder).items()}
    return counted(
        "A7",
        f"a random mixture of {sum(sizes):.0f} MB, opened lazily, one block at a time: the most RAM above the imports from opening it "
        "to its first token",
        max(peak["lazy"], opened),
        "MB resident",
        1,
        "a process, its peak",
        control=f"loaded whole, the same takes {peak['whole']:.0f} MB at its peak; opened lazily, {opened:.1f} MB are resident before a "
        f"weight is wanted and {before} of {len(bundle.units)} units are filled",
        beside={"chunk files": f"{len(sizes)}, of {max(sizes):.0f} MB at most: a size that is ours to choose, so it is not judged"},
    )


def peaks_lazy(folder: Path) -> dict[str, float]:
    """MiB above imports for a token: {"lazy": one block at a time, "whole": loaded at once}."""
    from edgelab.startup import METRICS, Start, startup_table

    starts = (Start("lazy", settings={"keep": 1}), Start("whole", "read"))
    report = startup_table(folder, starts=starts)
    return {s.name: report.get(model=s.name, metric=METRICS["peak_mib"][0]).value for s in starts}


def a12(bench: Bench) -> Entry:
    """Compute removed by pruning: channels cut out for good, the deepest cut that keeps the article's own 70 % of the accuracy (A2)."""
    report = studies.read("channels").report
    removed = {}
    for kind in ("moe", "dense"):
        base = report.get(model=f"{kind}: fp", metric="exact_match", slice=MEAN).value
        left = {
            share: report.get(model=f"{kind}: channels {share:.0%} by activation", metric="exact_match", slice=MEAN).value / base
            for share in (0.1, 0.3, 0.5)
        }
        share = max(s for s, kept in left.items() if kept >= 0.7)
        model = getattr(bench, kind)
        cut = compress(model, Recipe((PruneChannels(share, method="magnitude"),)), progress=False).model  # whichever go, as many do
        whole, less_of_it = (figures(m)["all"]["multiply_adds"] for m in (model, cut))
        removed[kind] = share, 100 * (1 - less_of_it / whole), 100 * left[share]
    share, less_compute, left = removed["moe"]
    calls = products(0.5)
    times = timed({n: calls[n] for n in ("torch float32, no zeros", "torch float32, zeros in place", "bitmap float16")}, bench.turns)
    dense = times["torch float32, no zeros"]
    in_place, bitmap = (less(median_ratio(times[n], dense)) for n in ("torch float32, zeros in place", "bitmap float16"))
    return counted(
        "A12",
        f"multiply-adds of the embedded mixture without {share:.0%} of its feed-forward channels, the deepest cut measured that keeps 70 % "
        "of the exact match",
        less_compute,
        "% less",
        beside={
            "exact match kept": f"{left:.0f} % (measured at build)",
            "the dense model": "{:.0%} of the channels: {:.0f} % less, {:.0f} % kept".format(*removed["dense"]),
            "50 % zeros in place": f"{shown(in_place, 0)} % less time in a dense float32 product of 2048 x 2048",
            "50 % zeros, sparse kernel": f"{shown(bitmap, 0)} % less time against the same: 9 bits are read in place of 32",
        },
    )
