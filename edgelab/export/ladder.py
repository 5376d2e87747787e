"""The round-trip ladder: one set of codes from the floating-point model to each runtime, held against the rung below at every step.

    original          the model as it was trained, float32
    fake-quantized    the same modules with the rounded weights in floating point: what rounding costs, and nothing else
    packed            codes and scales in memory, our layers compute with them
    bundle            written to files and loaded again
    <target>          exported, opened in the target's own runtime

Every rung says how far its logits are from those of the rung it stands on (exports stand on the bundle): the largest difference, KL
divergence (nats per token), the share of tokens with the same most likely successor; how many weights it holds as codes, and how many
bytes it takes.
A runtime that rounds inputs of its own accord (llama.cpp) is compared without that; "as it runs" says what it costs.
Below "fake-quantized" nothing may be lost but the order of sums; exports are refused by their own `verify` where a code changed.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from edgelab import html_table
from edgelab.bundle import coverage_of, load_bundle, read_manifest
from edgelab.export import TARGETS, WITH_TOKENIZER, ExportError, ExportResult, export
from edgelab.export.checks import LENGTHS, agreement
from edgelab.model import dequantize, load_tokenizer, quantized


@dataclass(frozen=True)
class Rung:
    """One step. `parity` as of `checks.agreement`, against the rung `on`; None for the lowest."""

    name: str
    on: str
    parity: Mapping[str, float] | None
    weights: int
    quantized: int
    bytes: int
    by: str


@dataclass(frozen=True)
class Ladder:
    """All rungs, the lowest first. `exports` by target: what `export` gave back. `refused` {target: why}."""

    rungs: tuple[Rung, ...]
    exports: Mapping[str, ExportResult]
    refused: Mapping[str, str]

    def table(self) -> list[dict[str, str]]:
        """A line per rung, and one per target that was refused."""
        lines = []
        for r in self.rungs:
            p = r.parity or {}
            lines.append(
                {
                    "rung": r.name,
                    "against": r.on,
                    "largest difference": f"{p['max_abs_diff']:.1e}" if p else "",
                    "KLD, nats per token": f"{max(p['kld'], 0.0):.1e}" if p else "",
                    "same top token": f"{p['top1_agreement']:.2%}" if p else "",
                    "as it runs": f"KLD {p['as_run_kld']:.1e}, {p['as_run_top1_agreement']:.2%}" if "as_run_kld" in p else "",
                    "weights as codes": f"{r.quantized:,} of {r.weights:,} ({r.quantized / r.weights:.1%})",
                    "bytes": f"{r.bytes:,}",
                    "computed by": r.by,
                }
            )
        lines += [dict.fromkeys(lines[0], "") | {"rung": name, "computed by": f"refused: {why}"} for name, why in self.refused.items()]
        return lines

    def _repr_html_(self) -> str:
        return html_table.lines(self.table())


def climb(
    original: nn.Module,
    packed: nn.Module,
    bundle: str | Path,
    out: str | Path,
    targets: Mapping[str, Mapping] | Sequence[str] = ("onnx",),
    *,
    lengths: tuple[int, ...] = LENGTHS,
    seed: int = 0,
) -> Ladder:
    """The ladder of `packed` (what `compress` made of `original`) and its saved `bundle`; exports go to the folder `out`.

    `targets`: names, or {name: settings of that target's export}; the tokenizer is the bundle's unless settings name another. A target
    that can't be made is a line of the table and no error, so that one missing runtime does not hide the others. All rungs see the same
    random tokens, of each of `lengths`.
    """
    settings = {t: {} for t in targets} if not isinstance(targets, Mapping) else targets
    fake = copy.deepcopy(packed)
    dequantize(fake)
    loaded = load_bundle(bundle)
    weights = sum(p.numel() for p in original.parameters())
    codes = sum(prod(q.shape) for _, q in quantized(packed).values())
    coverage, files = coverage_of(bundle), read_manifest(bundle)["files"]
    in_memory = coverage.predicted_bytes
    on_disk = sum(entry["bytes"] for name, entry in files.items() if name.endswith(".safetensors"))
    by = f"torch {torch.__version__}"
    rungs = [Rung("original", "", None, weights, 0, 4 * weights, by)]
    for name, model, below, size, count in (
        ("fake-quantized", fake, original, 4 * weights, 0),
        ("packed", packed, fake, in_memory, codes),
        ("bundle", loaded, packed, on_disk, sum(prod(q.shape) for _, q in quantized(loaded).values())),
    ):
        parity = agreement(lambda ids, m=model: m(input_ids=torch.from_numpy(ids[None]), use_cache=False).logits[0], below, lengths, seed)
        rungs.append(Rung(name, rungs[-1].name, parity, weights, count, size, by))
    exports, refused = {}, {}
    for target, more in settings.items():
        try:
            own = {"tokenizer": load_tokenizer(bundle)} if target in WITH_TOKENIZER and (Path(bundle) / "tokenizer.json").is_file() else {}
            exports[target] = r = export(loaded, target, Path(out) / TARGETS[target], **own | dict(more))
        except ExportError as error:
            refused[target] = str(error)
            continue
        rungs.append(
            Rung(target, "bundle", r.parity or None, r.weights_total, r.weights_quantized, r.bytes, r.verified_by or "not verified")
        )
    return Ladder(tuple(rungs), exports, refused)
