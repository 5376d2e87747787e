"""Accept an embedded model: `python -m edgelab.acceptance data/edge-moe` measures it, judges it and writes its card.

A model is worth shipping when compression *bites* on it: a model trained for minutes barely notices 3-bit weights and
teaches nothing. The criteria, all on the test split, weights rounded to nearest with one scale per output row (RTN,
signed full range; the embedding and the head too, routers not):

    skill        exact match: assistant at least 90 %, arithmetic at least 80 %
    language     bits per byte of prose and code below 0.9 of a Kneser-Ney trigram's, trained on the same train split
    staircase    KL divergence is at most 0.01 nats per token at 8 bits and rises at every step 8 -> 4 -> 3 -> 2 bits,
                 intervals apart; 8 bits flips under 2 % of the answers, 4 bits flips some of the assistant's, 3 bits costs
                 5 points of exact match, 2 bits leaves under a tenth of the assistant's and under half of arithmetic's
                 (this bar stood at a tenth for both until arithmetic, at 100 % in floating point, was measured: LOG.md)
    experts      routing tells the domain apart: Jensen-Shannon divergence at least 5 times what random deals of the
                 same sources to domains show (mixtures of experts only)

The dense model is there for the dense code paths; what it does with arithmetic is measured and told, not asked.

Writes `acceptance.json` (the report, the checks) and `README.md` (the model card) into the model's folder.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgelab import data, ngram
from edgelab.compress import compress
from edgelab.evaluate import evaluate, expert_counts, routers, specialisation
from edgelab.model import dequantize, load, load_tokenizer
from edgelab.recipe import Recipe
from edgelab.report import Report, Row, machine

STAIRCASE = (8, 4, 3, 2)
DOCS = {"prose": 180, "code": 150, "assistant": 500, "arithmetic": 500}


@dataclass(frozen=True)
class Check:
    """One criterion: what was measured, what was asked, whether it holds, and whether acceptance depends on it."""

    criterion: str
    measured: str
    bound: str
    holds: bool
    required: bool = True

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS" if self.required else "fails, not required"
        return f"{verdict}: {self.criterion}: {self.measured} (asked: {self.bound})"


def staircase(folder: Path, *, max_docs=DOCS, progress: bool = True) -> Report:
    """fp, int8-row, int4-row, int3-row and int2-row of the model in `folder`, evaluated side by side.

    The quantized models run as float models that hold the dequantized weights: the same numbers, at torch's speed.
    """
    original, tokenizer = load(folder), load_tokenizer(folder)
    models = {"fp": original}
    for bits in STAIRCASE:
        model = compress(original, Recipe.uniform(f"int{bits}-row"), progress=False).model
        dequantize(model)
        models[f"int{bits}-row"] = model
    test = data.corpus()["test"]
    return evaluate(models, tokenizer, test, max_docs=max_docs, speed=False, sizes={m: 0 for m in models}, progress=progress)


def judge(report: Report) -> list[Check]:
    """The criteria of the module on a report with the staircase, the trigram's rows and, for a MoE, `domain_bits` rows."""
    checks = []
    dense = not report.where(metric="domain_bits")

    def check(criterion: str, value: float, bound: str, holds: bool) -> None:
        checks.append(Check(criterion, f"{value:.3f}", bound, bool(holds), required=not (dense and "arithmetic" in criterion)))

    def figure(model: str, metric: str, on: str) -> Row:
        return report.get(model=model, metric=metric, slice=on)

    for domain, least in (("assistant", 0.90), ("arithmetic", 0.80)):
        value = figure("fp", "exact_match", domain).value
        check(f"skill: exact match, {domain}", value, f">= {least}", value >= least)
    for domain in ("prose", "code"):
        ours, theirs = figure("fp", "bits_per_byte", domain), figure("trigram", "bits_per_byte", domain)
        ratio = ours.value / theirs.value
        check(f"language: bits per byte over the trigram's, {domain}", ratio, "<= 0.9", ratio <= 0.9 and ours.high < theirs.low)
        steps = [figure(f"int{b}-row", "kld", domain) for b in STAIRCASE]
        check(f"staircase: KLD at 8 bits, {domain}", steps[0].value, "<= 0.01 nats per token", steps[0].value <= 0.01)
        for (a, low), (b, high) in zip(zip(STAIRCASE, steps, strict=True), list(zip(STAIRCASE, steps, strict=True))[1:], strict=False):
            check(f"staircase: KLD {b} bits over {a} bits, {domain}", high.value / low.value, "> 1, intervals apart", high.low > low.high)
    for domain in data.SCORED:
        base = figure("fp", "exact_match", domain).value
        flips = figure("int8-row", "flips", domain).value
        check(f"staircase: flips at 8 bits, {domain}", flips, "<= 0.02", flips <= 0.02)
        if domain == "assistant":  # sums, learnt to 100 %, do not notice 4 bits
            flips = figure("int4-row", "flips", domain)
            check(f"staircase: flips at 4 bits, {domain}", flips.value, "> 0, interval above it", flips.low > 0)
        three, two = (figure(f"int{b}-row", "exact_match", domain).value for b in (3, 2))
        check(f"staircase: exact match lost at 3 bits, {domain}", base - three, ">= 0.05", base - three >= 0.05)
        most = {"assistant": 0.1, "arithmetic": 0.5}[domain]
        check(f"staircase: exact match left at 2 bits, {domain}", two / base, f"<= {most}", two <= most * base)
    for row in report.where(metric="domain_bits"):
        chance = report.get(metric="domain_bits_by_chance").value
        check(
            "experts: bits that a routing choice tells about the domain",
            row.value,
            f">= 5 x {chance:.4f} (chance)",
            row.value >= 5 * chance,
        )
    return checks


def accepted(checks: list[Check]) -> bool:
    """Whether every required criterion holds."""
    return all(c.holds for c in checks if c.required)


def accept(folder: Path, *, max_docs=DOCS, progress: bool = True) -> tuple[Report, list[Check]]:
    """Measure and judge the model in `folder`; writes nothing."""
    steps = staircase(folder, max_docs=max_docs, progress=progress)
    report = Report(tuple(r for r in steps if r.metric not in ("weight_bytes", "bits_per_weight")))  # a float model's, here
    corpus, model, tokenizer = data.corpus(), load(folder), load_tokenizer(folder)
    prose_and_code = corpus["test"].filter(lambda d: [x in ("prose", "code") for x in d], input_columns="domain", batched=True)
    report += ngram.baseline(corpus["train"], prose_and_code, tokenizer, max_docs=max_docs)
    if routers(model):
        counts, domains = expert_counts(model, tokenizer, corpus["test"], max_docs=max_docs, progress=progress)
        found = specialisation(counts, domains)
        about = {"unit": "bit", "n": found.documents, "seed": 0, "machine": machine(), "corpus": data.fingerprint(corpus["test"])}
        note = "Jensen-Shannon divergence between the domains' expert loads, mean over layers; by layer " + ", ".join(
            f"{b:.3f}" for b in found.by_layer
        )
        report += Report((
            Row("fp", "domain_bits", found.bits, note=note, **about),
            Row("fp", "domain_bits_by_chance", found.chance_high, note="97.5th percentile of 500 random deals of sources", **about),
        ))  # fmt: skip
    return report, judge(report)


def _mirrored_share() -> float:
    """Share of the test split's additions a+b whose mirror b+a is in the training split."""
    splits = {(a, b): data.split_of(f"arithmetic:{a}+{b}") for a in range(10, 100) for b in range(10, 100)}
    mirrors = [splits[b, a] == "train" for (a, b), split in splits.items() if split == "test" and a != b]
    return sum(mirrors) / len(mirrors)


def card(folder: Path, report: Report, checks: list[Check]) -> str:
    """The model card: architecture, data, training, figures, limits. Every number comes from the folder or the report."""
    config = json.loads((folder / "config.json").read_text())
    training = json.loads((folder / "training.json").read_text())
    settings = training["settings"]
    n_parameters = sum(p.numel() for p in load(folder).parameters())
    moe = config["model_type"] == "deepseek_v3"
    if moe:
        shape = (
            f"{config['num_hidden_layers']} layers (the first dense), hidden {config['hidden_size']}, {config['n_routed_experts']} routed"
            f" experts of {config['moe_intermediate_size']} of which {config['num_experts_per_tok']} are active, one shared expert,"
            f" multi-head latent attention (kv_lora_rank {config['kv_lora_rank']}), sigmoid router with a selection bias kept balanced"
            " without an auxiliary loss"
        )
    else:
        shape = (
            f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}, feed-forward {config['intermediate_size']},"
            f" {config['num_attention_heads']} heads over {config['num_key_value_heads']} key-value heads, embedding and head tied"
        )
    names = ["fp", *(f"int{b}-row" for b in STAIRCASE)]
    lines = [f"| {metric} | {' | '.join(names)} |" for metric in ["on the test split"]] + ["|---" * (len(names) + 1) + "|"]
    for metric, label, slices in (
        ("bits_per_byte", "bits per byte", ("prose", "code")),
        ("kld", "KL divergence to fp, nats per token", data.DOMAINS),
        ("exact_match", "exact match", data.SCORED),
    ):
        for s in slices:
            cells = [report.where(model=m, metric=metric, slice=s).rows for m in names]
            lines.append(f"| {label}, {s} | " + " | ".join(c[0].text() if c else "0" for c in cells) + " |")
    trigram = ", ".join(f"{r.slice} {r.text()}" for r in report.where(model="trigram"))
    judged = "\n".join(f"- {c}" for c in checks)
    seen = settings["batch"] * settings["length"] * training["steps"]
    history = f" History: {training['history']}." if "history" in training else ""
    mirrored = _mirrored_share()
    kind, table = "moe" if moe else "dense", "\n".join(lines)
    docs = ", ".join(f"{r.slice} {r.n}" for r in report.where(model="fp", metric="perplexity"))
    some = report.get(model="fp", metric="bits_per_byte", slice="prose")
    return f"""# {folder.name}

A language model of {n_parameters:,} parameters for experiments with compression, trained from nothing by this project.
It was trained on docstring prose, Python, JSON calls for spoken-style commands, and sums of two-digit numbers whose digits
are reversed; the table says how well each went. It knows nothing else and is no assistant.

- Architecture: `{config["architectures"][0]}`: {shape}; vocabulary {config["vocab_size"]} (byte-level BPE, single digits).
- Data: the corpus of `edgelab.data`: the documentation topics, docstrings and sources of CPython's standard library, read
  from the interpreter that trained it, and generated commands and sums. Fingerprint of all splits:
  {training["corpus"]}. None of that text is shipped.
- Training: {training["steps"]:,} steps of {settings["batch"]} x {settings["length"]} tokens ({seen / 1e6:.1f} M), AdamW at
  {settings["peak_lr"]}, warm-up, constant, linear decay over the last {settings["decay_share"]:.0%};
  `python -m edgelab.pretrain {kind}`.{history}
  The loss curve stands in `curve.jsonl`, what went wrong on the way in the project's `LOG.md`.
- Weights: bfloat16 safetensors. Licence: Apache-2.0.

## Measured

95 % paired bootstrap intervals over sources ({docs});
fingerprint of the test split: {some.corpus}; {some.machine}.
Quantized: round to nearest, one scale per output row, everything but norms and routers. On assistant and arithmetic only
the answers are scored.

{table}

Bits per byte of a Kneser-Ney trigram on the same tokens and splits: {trigram}.

Sums that are new to the model are often old ones turned round: {mirrored:.0%} of the test split's additions have their mirror
b+a in the training split. Two bits per row do not break arithmetic as they break the assistant.

## Accepted because

{judged}

Made by `python -m edgelab.acceptance {folder.as_posix()}`; the numbers with all their details are in `acceptance.json`.
"""


def write(folder: Path, report: Report, checks: list[Check]) -> None:
    """Write `acceptance.json` and `README.md` into `folder`, each whole or not at all."""
    found = json.dumps({"checks": [asdict(c) for c in checks], "report": json.loads(report.to_json())}, indent=1) + "\n"
    for name, text in (("acceptance.json", found), ("README.md", card(folder, report, checks))):
        tmp = folder / f"{name}.tmp"
        tmp.write_text(text)
        os.replace(tmp, folder / name)


def main() -> int:
    import argparse

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--quick", action="store_true", help="a tenth of the documents; writes nothing")
    a = p.parse_args()
    docs = {k: int(np.ceil(v / 10)) for k, v in DOCS.items()} if a.quick else DOCS
    report, checks = accept(a.folder, max_docs=docs)
    if not a.quick:
        write(a.folder, report, checks)
    for c in checks:
        print(c)
    return 0 if accepted(checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
