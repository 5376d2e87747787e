"""The long measurements behind the notebooks' and the README's tables: `python -m edgelab.studies` (an hour on two cores).

Each study is a function that returns a `Report` on the test split, and writes `data/studies/<name>.json`: report, training curves,
seconds. One that lies there is not measured again (`--again NAME`), so an interrupted run goes on. Rows say "measured at
build": they are of the machine named in them, not of the reader's.

    experts     which experts to drop or merge, at 25 and 50 %
    recovery    half of the experts gone, then learning from the original or from text
    zeros       magnitude, Wanda, SparseGPT at 50 %, 2:4, 4:8
    channels    feed-forward channels, heads, blocks
    qat         4 and 8 bits per row, rounded to nearest against learnt
    students    one small dense model from nothing, from text or from the MoE: three seeds each
    adapt       a compressed model and about 1,000 examples of a domain that it never saw
    dynamic     what is computed by the input: early exit, skipped channels, sparse attention, two precisions
    private     learning with differential privacy, and what an attacker can tell
    federated   six devices with one kind of command each: alone, averaged, pooled

`claims` is measured by `python -m edgelab.claims.index`.

"mean of domains" rows weigh the four domains alike; their intervals resample the documents of each domain.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgelab import adapt, cascade, data, federated, private
from edgelab.compress import compress
from edgelab.dynamic import report as skip_report
from edgelab.early_exit import exit_report
from edgelab.evaluate import Measured, measure, spread, summarise, weigh
from edgelab.model import dequantize, load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.recipe import (
    Distill,
    DropExperts,
    DropLayers,
    EarlyExit,
    FineTune,
    MergeExperts,
    Prune,
    PruneChannels,
    PruneHeads,
    Qat,
    Quantize,
    Recipe,
    SkipChannels,
    SparseAttention,
)
from edgelab.report import Report, Row, machine
from edgelab.scheme import QuantScheme
from edgelab.sparse_attention import cost as attended_pairs
from edgelab.train import learn

MEAN = "mean of domains"
DOCS = {"prose": 40, "code": 40, "assistant": 150, "arithmetic": 150, adapt.DOMAIN: 200}
CALIBRATION_TOKENS = 32_768
CONTEXT = 256


@dataclass(frozen=True)
class Study:
    """A finished study. `curves` {run: the lines of its curve.jsonl}."""

    name: str
    report: Report
    curves: dict[str, list[dict]]
    seconds: float

    def to_json(self) -> str:
        d = {"name": self.name, "seconds": round(self.seconds, 1), "curves": self.curves, "report": json.loads(self.report.to_json())}
        return json.dumps(d, indent=None, separators=(",", ":")) + "\n"


def read(name: str, folder: Path | None = None) -> Study:
    """A study that was measured at build. Raises FileNotFoundError, naming the command that makes it."""
    path = (folder or data_dir() / "studies") / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `python -m edgelab.studies {name}` measures it")
    d = json.loads(path.read_text(encoding="utf-8"))
    return Study(d["name"], Report.from_json(json.dumps(d["report"])), d["curves"], d["seconds"])


def mean_of_domains(measured: Measured, *, resamples: int = 2000, seed: int = 0) -> Report:
    """KL divergence, same top token and exact match with the domains weighed alike, and their paired bootstrap intervals."""
    rows = []
    base = measured.scores[measured.baseline]
    draws = {d: weigh(_sources(s), resamples, seed + i) for i, (d, s) in enumerate(base.items())}
    for name, by_domain in measured.scores.items():
        for metric, unit in (("kld", "nats/tok"), ("same_top", "share"), ("exact_match", "share")):
            if name == measured.baseline and metric != "exact_match":
                continue
            values, drawn = [], []
            for d, s in by_domain.items():
                if metric == "exact_match" and s.correct is None:
                    continue
                top = {"kld": s.kld, "same_top": s.same_top, "exact_match": s.correct}[metric]
                bottom = np.ones(len(top)) if metric == "exact_match" else s.tokens
                values.append(top.sum() / bottom.sum())
                drawn.append((draws[d] @ top) / (draws[d] @ bottom))
            if values:
                n = sum(len(np.unique(_sources(s))) for s in by_domain.values())
                low, high = spread(np.mean(drawn, axis=0), n)
                common = {"n": n, "seed": seed, "machine": machine(), "corpus": measured.corpus, "note": f"{len(values)} domains alike"}
                rows.append(Row(name, metric, float(np.mean(values)), unit, MEAN, low, high, **common))
    return Report(tuple(rows))


def _sources(scores) -> np.ndarray:
    return np.arange(len(scores.tokens)) if scores.source is None else scores.source


# -------------------------------------------------------------------------------------------------------------- studies


class Bench:
    """What all studies share: models, tokens, and where runs keep their checkpoints."""

    def __init__(self, work: Path) -> None:
        self.work, self.corpus = work, data.corpus()
        self.tokenizer = load_tokenizer(data_dir() / "edge-moe")
        self.calibration = data.calibration_batches(self.tokenizer, self.corpus["calibration"], tokens=CALIBRATION_TOKENS)
        self._training = None
        self.curves: dict[str, list[dict]] = {}

    @property
    def training(self) -> list:
        if self._training is None:
            rows = data.calibration_batches(self.tokenizer, self.corpus["train"], tokens=4_000_000, context=CONTEXT)
            self._training = [b for b in rows if b.shape[1] == CONTEXT]
        return self._training

    def model(self, kind: str = "moe") -> nn.Module:
        return load(data_dir() / f"edge-{kind}")

    def run(self, name: str, model: nn.Module, recipe: Recipe, **settings) -> nn.Module:
        """The model of `recipe`, for torch's speed with its codes unpacked; curves of its learning steps are kept."""
        folder = self.work / name
        made = compress(
            model, recipe, calibration=self.calibration, training=self.training if recipe.learns else None, folder=folder, **settings
        )
        self.keep_curve(name, folder)
        dequantize(made.model)
        return made.model

    def keep_curve(self, name: str, folder: Path) -> None:
        for path in sorted(folder.rglob("curve.jsonl")) if folder.is_dir() else ():
            self.curves[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def report(self, models: Mapping[str, nn.Module], test=None, docs=DOCS) -> Report:
        measured = measure(models, self.tokenizer, self.corpus["test"] if test is None else test, max_docs=docs, progress=False)
        return summarise(measured) + mean_of_domains(measured)


def experts(b: Bench) -> Report:
    """Drop and merge at 25 and 50 %; random with three seeds."""
    fp = b.model()
    report = Report(())
    for share in (0.25, 0.5):
        models = {"fp": fp}
        for method in ("reap", "gate_mass", "frequency", "naee"):
            models[f"{method} {share:.0%}"] = b.run(f"drop-{method}-{share}", fp, Recipe((DropExperts(share, method=method),)))
        for seed in range(3):
            models[f"random {seed} {share:.0%}"] = b.run(
                f"drop-{seed}-{share}", fp, Recipe((DropExperts(share, method="random", seed=seed),))
            )
        for method in ("outputs", "router"):
            models[f"merge by {method} {share:.0%}"] = b.run(f"merge-{method}-{share}", fp, Recipe((MergeExperts(share, method=method),)))
        report += b.report(models)
    return report


def recovery(b: Bench) -> Report:
    """Half of the experts gone; then 500 steps from the original's distributions, or from the text alone."""
    fp, drop = b.model(), DropExperts(0.5, method="reap")
    models = {
        "fp": fp,
        "REAP 50%": b.run("reap50", fp, Recipe((drop,))),
        "REAP 50%, distilled": b.run("reap50-distilled", fp, Recipe((drop, Distill(steps=500)))),
        "REAP 50%, fine-tuned": b.run("reap50-text", fp, Recipe((drop, FineTune(steps=500)))),
    }
    return b.report(models)


def zeros(b: Bench) -> Report:
    """Three methods, three patterns, both models."""
    report = Report(())
    for kind in ("dense", "moe"):
        fp = b.model(kind)
        models = {f"{kind}: fp": fp}
        for pattern in ("unstructured", "2:4", "4:8"):
            for method in ("magnitude", "wanda", "sparsegpt"):
                name = f"{kind}: {method} {'50%' if pattern == 'unstructured' else pattern}"
                models[name] = b.run(name.replace(" ", "-"), fp, Recipe((Prune(0.5, method=method, pattern=pattern),)))
        report += b.report(models)
    return report


def channels(b: Bench) -> Report:
    """What is cut out of both models, and what that does."""
    report = Report(())
    for kind in ("dense", "moe"):
        fp = b.model(kind)
        models, steps = {f"{kind}: fp": fp}, {}
        for share in (0.1, 0.3, 0.5):
            for method in ("activation", "magnitude", "random"):
                steps[f"{kind}: channels {share:.0%} by {method}"] = PruneChannels(share, method=method)
        steps[f"{kind}: heads 50% by activation"] = PruneHeads(0.5)
        steps[f"{kind}: one block"] = DropLayers(1)
        for name, step in steps.items():
            models[name] = b.run(name.replace(" ", "-"), fp, Recipe((step,)))
        report += b.report(models)
    return report


def _per_row(bits: int) -> tuple:
    return (("@router", None), ("*", QuantScheme.parse(f"int{bits}-row")))


def qat(b: Bench) -> Report:
    """Rounding that learns, one scale per row, everything but routers."""
    fp = b.model()
    models = {"fp": fp}
    for bits, steps in ((4, 600), (8, 100)):
        models[f"int{bits}-row, to nearest"] = b.run(f"rtn{bits}", fp, Recipe((Quantize(_per_row(bits)),)))
        method = Qat(steps=steps) if bits == 4 else Qat(steps=steps, lr=3e-5)
        models[f"int{bits}-row, QAT"] = b.run(f"qat{bits}", fp, Recipe((Quantize(_per_row(bits), method=method),)))
    return b.report(models)


def students(b: Bench) -> Report:
    """A dense student of half the width, from random weights: the same rows and steps, once from the MoE and once from the text."""
    from transformers import AutoModelForCausalLM

    teacher, report = b.model(), Report(())
    models = {"teacher": teacher}
    for seed in range(3):
        for how, step in (("distilled", Distill(steps=300, lr=2e-3, seed=seed)), ("text", FineTune(steps=300, lr=2e-3, seed=seed))):
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(student_config(len(b.tokenizer)), dtype=torch.float32).eval()
            name = f"{how}, seed {seed}"
            learn(student, step, b.training, teacher=teacher, folder=b.work / f"student-{how}-{seed}")
            b.keep_curve(name, b.work / f"student-{how}-{seed}")
            models[name] = student
    report += b.report(models)
    rows = []
    for row in report.where(slice=MEAN, metric="kld").rows + report.where(metric="bits_per_byte").rows:
        if row.model.endswith("seed 0"):
            how = row.model.removesuffix(", seed 0")
            values = [report.get(model=f"{how}, seed {s}", metric=row.metric, slice=row.slice).value for s in range(3)]
            rows.append(
                replace(
                    row,
                    model=how,
                    value=float(np.mean(values)),
                    low=min(values),
                    high=max(values),
                    n=3,
                    note="mean, least and most of 3 seeds",
                )
            )
    return report + Report(tuple(rows))


def student_config(vocab: int):
    """Two layers, 128 wide, tied: 0.7 M parameters."""
    from edgelab.pretrain import dense_config

    config = dense_config(vocab)
    for name, value in {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 384, "head_dim": 32, "layer_types": None}.items():
        setattr(config, name, value)
    config.layer_types = ["full_attention"] * 2
    return config


def few_shot(b: Bench) -> Report:
    """int4-g32 by GPTQ, then 1,000 commands to a robot, with as many rows of the old text between them ("rehearsed") or alone."""
    import datasets

    fp, new = b.model(), adapt.commands(1000)
    rows = data.calibration_batches(b.tokenizer, new["train"], tokens=200_000, context=CONTEXT)
    old = torch.cat(b.training)[: sum(len(r) for r in rows)]
    test = datasets.concatenate_datasets([b.corpus["test"], new["test"]])
    int4 = compress(fp, Recipe.uniform("int4-g32", method="gptq"), calibration=b.calibration).model
    models = {"fp": fp, "int4": int4}
    for name, base, train, lr, text in (
        ("int4 + LoRA", int4, "lora", 3e-3, [*rows, old]),
        ("int4, scales", int4, "scales", 1e-2, [*rows, old]),
        ("fp, all weights", fp, "all", 3e-4, [*rows, old]),
        ("fp, all weights, not rehearsed", fp, "all", 3e-4, rows),
    ):
        models[name] = copy.deepcopy(base)
        work = b.work / f"adapt-{name.replace(' ', '-')}"
        learn(models[name], FineTune(steps=300, lr=lr, train=train, rank=16, batch=8), text, folder=work)
        b.keep_curve(name, work)
    return b.report(models, test)


def dynamic(b: Bench) -> Report:
    """An early exit, half of the channels skipped, sparse attention, two precisions: each against the whole model, and what it saves."""
    fp = b.model()
    half = "half of the channels skipped"
    steps = {"early exit": EarlyExit(after=2), half: SkipChannels(0.5), "attention 32/16": SparseAttention(32, 16)}
    models = {"fp": fp} | {name: b.run(name.replace(" ", "-").replace("/", "-"), fp, Recipe((step,))) for name, step in steps.items()}
    held = data.calibration_batches(b.tokenizer, b.corpus["test"], tokens=8192, context=CONTEXT)
    left, skipped = exit_report(models["early exit"], held), skip_report(fp, models[half], held)
    low, high = (compress(fp, Recipe.uniform(s), progress=False).model for s in ("int3-g32", "int8-row"))
    both = cascade.report(cascade.calibrate(low, high, b.calibration, 0.98), held)
    some, every = attended_pairs(4096, 32, 16)
    facts = {
        "early exit": {"left early": left.left, "same top of those": left.agreement, "kld": left.kld, "multiply-adds saved": left.saved},
        half: {"multiply-adds saved": skipped.saved},
        "attention 32/16": {"pairs saved at 4096 tokens": 1 - some / every},
        "int3, int8 where unsure": {"escalated": both.escalated, "kld": both.kld, "kld of int3 alone": both.kld_low},
    }
    unit = {"kld": "nats/tok", "kld of int3 alone": "nats/tok"}
    rows = [
        Row(model, what, value, unit.get(what, "share"), "8192 tokens", machine=machine())
        for model, found in facts.items() for what, value in found.items()
    ]  # fmt: skip
    del models["early exit"]  # it is taken while decoding; a text that is read at once goes through all blocks
    return b.report(models) + Report(tuple(rows))


def private_study(b: Bench) -> Report:
    """DP-SGD at several epsilons, and what an attacker can tell."""
    int4 = compress(b.model(), Recipe.uniform("int4-g32"), progress=False).model
    return private.study(int4, b.tokenizer, b.work / "private")


def federated_study(b: Bench) -> Report:
    """Six devices of one kind of command each: alone, averaged, pooled."""
    return federated.study(federated.Base(str(data_dir() / "edge-moe")), b.tokenizer, b.work / "federated")


STUDIES: dict[str, Callable[[Bench], Report]] = {
    "experts": experts, "recovery": recovery, "zeros": zeros, "channels": channels, "qat": qat, "students": students, "adapt": few_shot,
    "dynamic": dynamic, "private": private_study, "federated": federated_study,
}  # fmt: skip


def main() -> None:
    import argparse

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", help=f"studies (default: all that are missing): {', '.join(STUDIES)}")
    p.add_argument("--again", action="store_true", help="also those that were measured already")
    p.add_argument("--out", type=Path, help="folder (default: data/studies)")
    p.add_argument("--work", type=Path, default=Path(".pretrain/studies"), help="checkpoints of the runs")
    a = p.parse_args()
    out = a.out or data_dir() / "studies"
    unknown = [n for n in a.names if n not in STUDIES]
    if unknown:
        p.error(f"no study is called {unknown[0]!r}; there are {', '.join(STUDIES)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in a.names or STUDIES:
        path = out / f"{name}.json"
        if path.exists() and not a.again:
            continue
        began, bench = time.monotonic(), Bench(a.work)
        report = STUDIES[name](bench)
        report = Report(tuple(r if r.provenance == "modelled" else replace(r, provenance="measured at build") for r in report))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(Study(name, report, bench.curves, time.monotonic() - began).to_json(), encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
