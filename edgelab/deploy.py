"""`deploy`: one call from a bundle to the folder that an app's developer takes over, chosen by the kind of device.

    deploy("runs/demo/int4", "runs/phone", device="arm64", batch_size=4)

    runs/phone/README.md      what is here, how it is used, what it needs, what was measured and where
    runs/phone/deploy.json    the same for programs, with the sha256 of every file
    runs/phone/android/ ...   one entry per target

The call is that of the Cherry Studio article (convert, calibrate, deploy: `deploy --device arm64 --batch-size 4 --dynamic-shape`). A
device says which targets come first, how many threads are sensible, and what memory an app may take there; these are
starting points with their reasons beside them, no measurements of a phone. What is measured is labelled so: parity in each target's
own runtime, that rows of a batch do not influence each other, and speed and memory of the ONNX file *on the machine that ran
the export*.

A target that this model or this machine cannot do (no llama.cpp to verify with, an architecture that GGUF lacks) is left out, and the
README says why; when none is left, ExportError.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from torch import nn

from edgelab.devices import DEVICES, Device
from edgelab.export import TARGETS, WITH_TOKENIZER, ExportError, ExportResult, export, written_at
from edgelab.export import verify as verify_target
from edgelab.export.batches import measure, rows_alone
from edgelab.export.checks import causal_lm, whole_or_nothing

MANIFEST = "deploy.json"
FORMAT = 1


@dataclass(frozen=True)
class Deployment:
    """What `deploy` wrote. `refused`: {target: why it is not there}. `measured`: on the machine of the export, see `measure`."""

    folder: Path
    device: Device
    results: Mapping[str, ExportResult]
    refused: Mapping[str, str]
    settings: Mapping[str, object]
    memory: Mapping[str, int]
    measured: Sequence[Mapping[str, object]] = field(default=())
    batch_difference: float | None = None

    def table(self) -> list[dict[str, str]]:
        """A line per target, written or not."""
        lines = []
        for target, r in self.results.items():
            p = r.parity
            lines.append(
                {
                    "target": target,
                    "where": TARGETS[target],
                    "bytes": f"{sum(f.stat().st_size for f in r.files):,}",
                    "weights as codes": f"{r.share:.1%}" if r.weights_total else "",
                    "RAM there, estimated": f"{self.memory[target] / 1e6:,.0f} MB" if target in self.memory else "",
                    "1 - cosine to torch": f"{1 - p['cosine']:.1e}" if p else "",
                    "same top token": f"{p['top1_agreement']:.1%}" if p else "",
                    "verified by": r.verified_by or "not verified",
                }
            )
        return lines + [{"target": target, "verified by": f"left out: {why}"} for target, why in self.refused.items()]

    def _repr_html_(self) -> str:
        lines = self.table()
        columns = list(dict.fromkeys(c for line in lines for c in line))
        head = "".join(f"<th>{escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(line.get(c, ''))}</td>" for c in columns) + "</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def deploy(
    bundle: str | Path,
    out: str | Path,
    *,
    device: str = "arm64",
    batch_size: int = 1,
    dynamic_shape: bool = True,
    length: int = 512,
    memory: int | None = None,
    targets: Sequence[str] | None = None,
    check: bool = True,
) -> Deployment:
    """The folder `out` for `device` (a key of `DEVICES`), written whole or not at all.

    `bundle`: the directory of a bundle or a model. `batch_size`: rows that are answered at once, at most. `dynamic_shape`: the files
    take any number of rows and tokens, and keep keys and values; otherwise [batch_size, length] and nothing else, without a cache.
    `length`: tokens of prompt and answer that the memory is reckoned for. `memory`: bytes that the app may take instead of the device's.
    `targets`: instead of the device's. `check=False` runs nothing.

    Raises ValueError for settings that contradict each other or the model, ExportError when the model does not fit and when no
    target could be written.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} is not one of {', '.join(DEVICES)}")
    kind, out = DEVICES[device], Path(out)
    wanted = tuple(targets if targets is not None else kind.targets if dynamic_shape else kind.fixed)
    unknown = [t for t in wanted if t not in TARGETS]
    if targets is not None and unknown:
        raise ValueError(f"targets={list(targets)!r}: {unknown[0]!r} is not one of {', '.join(TARGETS)}")
    if not wanted:
        raise ValueError(f"device={device!r} takes no files of a fixed shape; leave dynamic_shape=True")
    if batch_size < 1 or length < 2:
        raise ValueError(f"batch_size={batch_size} must be 1 or more, length={length} 2 or more")
    from edgelab.model import load, load_tokenizer

    model, tokenizer = causal_lm(load(str(bundle))), load_tokenizer(str(bundle))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"length={length} is more than the {context} positions of the model")
    settings = {"batch_size": batch_size, "dynamic_shape": dynamic_shape, "length": length, "threads": kind.threads}
    budget = kind.memory if memory is None else memory
    _fits(model, settings, budget, kind)

    results, refused, needs, measured, difference = {}, {}, {}, [], None
    with whole_or_nothing(out) as (folder,):
        folder.mkdir()
        for target in wanted:
            try:
                result = export(model, target, folder / TARGETS[target], check=check, **_settings(target, settings, tokenizer))
            except ExportError as error:
                refused[target] = str(error)
                continue
            results[target] = result
            needs[target] = need(model, result, settings)
        if not results:
            raise ExportError("; ".join(f"{t}: {why}" for t, why in refused.items()))
        graph = _graph(results)
        if check and graph is not None and dynamic_shape:
            difference = rows_alone(graph, batch_size, model.config.get_text_config().vocab_size)
            measured = measure(graph, sorted({1, batch_size}), min(kind.threads, os.cpu_count() or 1), min(length, 64))
        if "onnx" in results:
            tokenizer.save_pretrained(folder / "tokenizer")
        deployment = Deployment(folder, kind, results, refused, settings, needs, measured, difference)
        (folder / "README.md").write_text(_readme(deployment, bundle, budget), encoding="utf-8")
        _write_manifest(deployment, bundle)
    placed = {t: ExportResult(**{**r.__dict__, "files": tuple(out / f.relative_to(folder) for f in r.files)}) for t, r in results.items()}
    return Deployment(out, kind, placed, refused, settings, needs, measured, difference)


def verify(folder: str | Path, bundle: str | Path | None = None) -> Deployment:
    """The deployment in `folder`: every file as its sha256 says and none besides; with `bundle`, each target run and compared again.

    Raises ExportError for a file that is missing, changed or strange, and what the targets raise.
    """
    folder = Path(folder)
    try:
        stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, device, names = dict(stated["files"]), DEVICES[stated["device"]], list(stated["targets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / MANIFEST} can't be read: {error!r}; deploy again") from error
    if stated.get("format") != FORMAT:
        raise ExportError(f"{folder / MANIFEST} has format {stated.get('format')!r}, this edgelab reads {FORMAT}")
    there = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
    if strange := sorted(set(there) ^ {*files, MANIFEST}):
        raise ExportError(f"{folder}: {strange[0]} is {'not listed' if strange[0] in there else 'missing'}; deploy again")
    for name, digest in files.items():
        if (found := _sha256(there[name])) != digest:
            raise ExportError(f"{folder / name} was changed: its sha256 is {found[:12]}..., stated is {digest[:12]}...; deploy again")
    results = {t: written_at(folder / TARGETS[t]) for t in names}
    if bundle is not None:
        from edgelab.model import load

        model = load(str(bundle))
        results = {t: verify_target(r, model) for t, r in results.items()}
    return Deployment(folder, device, results, stated["left_out"], stated["settings"], stated["memory"], stated["measured"])


def _settings(target: str, settings: Mapping, tokenizer) -> dict:
    """What `export` is told for a target."""
    given: dict[str, object] = {"tokenizer": tokenizer} if target in WITH_TOKENIZER else {}
    if target == "android":
        given |= {"threads": settings["threads"], "batch_size": settings["batch_size"]}
    if target in ("litert", "executorch", "coreml"):
        given |= {"length": settings["length"]}
    if target == "onnx" and settings["dynamic_shape"]:
        given |= {"cache": True, "experts": "auto"}
    elif target == "onnx":
        given |= {"fixed": (settings["batch_size"], settings["length"]), "experts": "auto"}
    return given


def _graph(results: Mapping[str, ExportResult]) -> Path | None:
    """An ONNX file with a cache among what was written."""
    return next((f for r in results.values() for f in r.files if f.suffix == ".onnx"), None)


# --------------------------------------------------------------------------------------------------------------- memory


def cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of keys and values that a token leaves in a float32 cache, as transformers caches them (DeepSeek: the latent)."""
    from edgelab.export.onnx import _past_shapes

    return 4 * sum(heads * width for heads, width in _past_shapes(model))


def need(model: nn.Module, result: ExportResult, settings: Mapping) -> int:
    """Bytes of RAM, estimated: the target's weights, keys and values of all rows (twice: the step's inputs and outputs), logits of a
    prompt."""
    rows, tokens = int(settings["batch_size"]), int(settings["length"])
    cached = 2 * cache_bytes_per_token(model) * rows * tokens if settings["dynamic_shape"] else 0
    return result.bytes + cached + 4 * model.config.get_text_config().vocab_size * rows * tokens


def _fits(model: nn.Module, settings: Mapping, budget: int, device: Device) -> None:
    """Raises ExportError, before anything is written, when weights and cache alone are over `budget`."""
    from edgelab.compress import audit

    weights = audit(model).predicted_bytes
    whole = ExportResult("", (), weights, weights, 0, 0, 0, 0)
    if (wanted := need(model, whole, settings)) > budget:
        raise ExportError(
            f"{wanted / 1e6:,.0f} MB are needed ({weights / 1e6:,.0f} of weights; {settings['batch_size']} rows of {settings['length']} "
            f"tokens for the rest), {device.name} leaves an app {budget / 1e6:,.0f}: fewer bits, a smaller batch or length, or say memory"
        )


# ---------------------------------------------------------------------------------------------------------- what is written


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_manifest(d: Deployment, bundle: str | Path) -> None:
    files = {f.relative_to(d.folder).as_posix(): _sha256(f) for f in sorted(d.folder.rglob("*")) if f.is_file()}
    stated = {
        "format": FORMAT,
        "device": d.device.name,
        "made_from": Path(bundle).name,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": dict(d.settings),
        "targets": {
            t: {k: v for k, v in asdict(r).items() if k not in ("files", "target")} | {"place": TARGETS[t]} for t, r in d.results.items()
        },
        "left_out": dict(d.refused),
        "memory": dict(d.memory),
        "batch_difference": d.batch_difference,
        "measured": list(d.measured),
        "files": files,
    }
    if (manifest := Path(bundle) / "edgelab.json").is_file():
        stated["bundle_sha256"] = _sha256(manifest)
    (d.folder / MANIFEST).write_text(json.dumps(stated, indent=1, default=str) + "\n", encoding="utf-8")


_USE = {
    "android": "A Gradle module: Java, C, and the model as an asset. `android/README.md` says how an app takes it in.",
    "onnx": "One file for ONNX Runtime (Java, Kotlin, Swift, C, Python). Inputs and outputs are named as in transformers: with a cache, "
    "give `present.*` back as `past_key_values.*` at the next token; without one, give `input_ids` and read `logits`. The text's "
    "ids come from `tokenizer/tokenizer.json` (Hugging Face's `tokenizers`).",
    "gguf": "One file for llama.cpp: `llama-cli -m model.gguf -t {threads}`, or its Android and Swift bindings. The tokenizer is inside.",
    "web": "A static page. Put the folder on any https host and open it on the phone; installed, it works without a network.",
    "litert": "One file for LiteRT's interpreter, of one shape: fill prompts up to {length} tokens on the right, and read the logits "
    "of your last token.",
    "coreml": "A package for Xcode, converted and not executed: Core ML predicts on Apple's systems only.",
    "openvino": "Two files for OpenVINO.",
}


def _readme(d: Deployment, bundle: str | Path, budget: int) -> str:
    """For the developer who has only this folder."""
    settings, name = d.settings, Path(bundle).name
    shape = (
        f"any number of rows (meant for up to {settings['batch_size']}) and tokens, with a cache"
        if settings["dynamic_shape"]
        else f"{settings['batch_size']} rows of {settings['length']} tokens, nothing else"
    )
    lines = [
        f"# {name} for {d.device.about}",
        "",
        f"Made by `edgelab deploy` for `{d.device.name}` ({d.device.abi}). Shapes: {shape}.",
        f"Threads: **{d.device.threads}** ({d.device.why}). This is a starting point: measure on your device.",
        f"Memory an app may take, as assumed: {budget / 1e6:,.0f} MB.",
        "",
        "## What is here",
        "",
        *_markdown(d.table()),
        "",
        "`weights as codes` were counted in the file. `RAM there, estimated`: weights, "
        f"keys and values of {settings['batch_size']} x {settings['length']} tokens and the logits of a prompt; not measured on a device.",
        "`1 - cosine` and `same top token` compare the file's logits, in its own runtime, with torch computing with the same codes.",
        "",
        "## How it is used",
        "",
    ]
    for target in d.results:
        lines += [f"**{TARGETS[target]}** {_USE.get(target, 'See its runtime.').format(**settings)}", ""]
        lines += [f"- {note}" for note in d.results[target].notes] + [""]
    if d.batch_difference is not None and int(settings["batch_size"]) > 1:
        lines += [
            "## Batches",
            "",
            "Rows of different lengths are filled up **on the left**, with zeros in `attention_mask`. Checked here with "
            f"{settings['batch_size']} rows: none differs from the row alone by more than {d.batch_difference:.0e} of the largest logit.",
            "",
        ]
    if d.measured:
        rows = [
            {
                "rows": str(m["rows"]),
                "threads": str(m["threads"]),
                f"first token of {m['prompt']}": f"{1e3 * m['first_token_s']:.0f} ms",
                "tokens/s, all rows": f"{m['tokens_per_s']:.0f}",
                "RAM above the imports": f"{m['peak_bytes'] / 1e6:.0f} MB",
            }
            for m in d.measured
        ]
        lines += [
            "## Measured where it was made, not on a device",
            "",
            f"The ONNX file on {d.measured[0]['machine']}:",
            "",
            *_markdown(rows),
            "",
        ]
    lines += [
        "## Whether it is whole",
        "",
        f"`{MANIFEST}` lists the sha256 of every file: `edgelab verify FOLDER` compares them, with BUNDLE behind it "
        "each target is run again too.",
        "The model's own licence applies to these files; edgelab adds none.",
        "",
    ]
    return "\n".join(lines)


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return table + ["| " + " | ".join(row.get(c, "").replace("|", "\\|") for c in columns) + " |" for row in rows]
