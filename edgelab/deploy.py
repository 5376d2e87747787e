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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from edgelab import html_table
from edgelab.deploy_readme import PROMPT, readme, shape_of
from edgelab.devices import DEVICES, Device
from edgelab.export import TARGETS, WITH_TOKENIZER, ExportError, ExportResult, NoRuntimeError, export, written_at
from edgelab.export import verify as verify_target
from edgelab.export.batches import measure, rows_alone
from edgelab.export.checks import causal_lm, whole_or_nothing

MANIFEST, SUMS = "deploy.json", "SHA256SUMS"
ONE_ROW = ("litert", "executorch", "coreml")
_TOLD = ("bytes", "predicted_bytes", "weights_total", "weights_quantized", "experts_total", "experts_quantized", "seconds", "parity")
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
                    "shape": shape_of(target, self.settings),
                    "bytes": f"{sum(f.stat().st_size for f in r.files):,}",
                    "weights as codes": f"{r.share:.1%}" if r.weights_total else "",
                    "RAM there, estimated": f"{self.memory[target] / 1e6:,.0f} MB" if target in self.memory else "",
                    "1 - cosine to torch": f"{1 - p['cosine']:.1e}" if p else "",
                    "same top token": f"{p['top1_agreement']:.1%}" if p else "",
                    "as it runs": f"{1 - p['as_run_cosine']:.1e}, {p['as_run_top1_agreement']:.1%}" if "as_run_cosine" in p else "",
                    "verified by": r.verified_by or "not verified",
                }
            )
        return lines + [{"target": target, "verified by": f"left out: {why}"} for target, why in self.refused.items()]

    def _repr_html_(self) -> str:
        return html_table.lines(self.table())


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
    if targets is not None and (isinstance(targets, str) or not targets or (unknown := [t for t in targets if t not in TARGETS])):
        wrong = repr(unknown[0]) if targets and not isinstance(targets, str) else repr(targets)
        raise ValueError(f"targets={targets!r}: {wrong} is no list of {', '.join(TARGETS)}")
    wanted = tuple(targets or (kind.targets if dynamic_shape else kind.fixed))
    if not wanted:
        raise ValueError(f"device={device!r} takes no files of a fixed shape; leave dynamic_shape=True")
    for name, value, least in (("batch_size", batch_size, 1), ("length", length, 2)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number from {least} on")
    if Path(bundle).exists():
        there, here = Path(bundle).resolve(), out.resolve()
        if there == here or there in here.parents or here in there.parents:
            raise ValueError(f"out={str(out)!r} is, holds or lies in the model {bundle}; choose another place")
    from edgelab.model import load, load_tokenizer

    model, tokenizer = causal_lm(load(str(bundle))), load_tokenizer(str(bundle))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"length={length} is more than the {context} positions of the model")
    settings = {"batch_size": batch_size, "dynamic_shape": dynamic_shape, "length": length, "threads": kind.threads}
    budget = kind.memory if memory is None else memory
    _fits(model, settings, budget, kind)

    results, refused, needs, measured, difference = {}, {}, {}, [], None
    with whole_or_nothing(out, ours=MANIFEST) as (folder,):
        folder.mkdir()
        for target in wanted:
            try:
                if settings["batch_size"] > 1 and target in ONE_ROW:
                    raise ExportError(f"its files take one row; batch_size={settings['batch_size']} is not for it")
                result = _exported(model, target, folder, check, _settings(target, settings, tokenizer))
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
        (folder / "README.md").write_text(
            readme(deployment, bundle, budget, MANIFEST, _contract(graph, model, tokenizer)), encoding="utf-8"
        )
        _write_manifest(deployment, bundle)
    placed = {t: replace(r, files=tuple(out / f.relative_to(folder) for f in r.files)) for t, r in results.items()}
    return Deployment(out, kind, placed, refused, settings, needs, measured, difference)


def verify(folder: str | Path, bundle: str | Path | None = None) -> Deployment:
    """The deployment in `folder`: every file as its sha256 says and nothing besides; with `bundle`, which must be the one it was made of,
    each target run and compared again. Without, its figures are those that were stated when it was made.

    Raises ExportError for a file that is missing, changed or strange, and what the targets raise.
    """
    folder = Path(folder)
    try:
        stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = stated["format"]
        files, device, results = dict(stated["files"]), DEVICES[stated["device"]], {}
        for target, told in stated["targets"].items():
            fields = {k: told[k] for k in _TOLD} | {"notes": tuple(told["notes"])}
            by = f"{told['verified_by'] or 'not verified'} (stated when it was made)"
            results[target] = ExportResult(target, (folder / TARGETS[target],), **fields, verified_by=by)
        rest = {k: stated[k] for k in ("left_out", "settings", "memory", "measured", "batch_difference")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / MANIFEST} can't be read: {error!r}; deploy again") from error
    if version != FORMAT:
        raise ExportError(f"{folder / MANIFEST} has format {version!r}, this edgelab reads {FORMAT}")
    there = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir() or not any(f.iterdir())}
    if strange := sorted(set(there) ^ {*files, MANIFEST}):
        raise ExportError(f"{folder}: {strange[0]} is {'not listed' if strange[0] in there else 'missing'}; deploy again")
    for name, digest in files.items():
        if there[name].is_symlink() or (found := _sha256(there[name])) != digest:
            found = "of a link" if there[name].is_symlink() else found
            raise ExportError(f"{folder / name} was changed: its sha256 is {found[:12]}..., stated is {digest[:12]}...; deploy again")
    results = {t: replace(r, files=written_at(r.files[0]).files) for t, r in results.items()}
    if bundle is not None:
        from edgelab.model import load, load_tokenizer

        manifest = Path(bundle) / "edgelab.json"
        if "bundle_sha256" in stated and (not manifest.is_file() or _sha256(manifest) != stated["bundle_sha256"]):
            raise ExportError(f"{folder} was made of another bundle than {bundle}: its sha256 is not the one in {MANIFEST}")
        model, tokenizer = load(str(bundle)), load_tokenizer(str(bundle))
        more = {"gguf": {"tokenizer": tokenizer}}
        results = {t: verify_target(written_at(folder / TARGETS[t]), model, **more.get(t, {})) for t in results}
    return Deployment(
        folder, device, results, rest["left_out"], rest["settings"], rest["memory"], rest["measured"], rest["batch_difference"]
    )


def _exported(model: nn.Module, target: str, folder: Path, check: bool, settings: dict) -> ExportResult:
    """`export`, and without its check where what would run the file is not here: then `verified_by` says so."""
    try:
        return export(model, target, folder / TARGETS[target], check=check, **settings)
    except NoRuntimeError as error:
        result = export(model, target, folder / TARGETS[target], check=False, **settings)
        return replace(result, notes=(*result.notes, f"not verified: {error}"))


def _settings(target: str, settings: Mapping, tokenizer) -> dict:
    """What `export` is told for a target."""
    given: dict[str, object] = {"tokenizer": tokenizer} if target in WITH_TOKENIZER else {}
    if target == "android":
        given |= {"threads": settings["threads"], "batch_size": settings["batch_size"]}
    if target in ("litert", "executorch"):  # a prompt at once, then token by token, in one file
        given |= {"length": min(PROMPT, settings["length"]), "places": settings["length"]}
    if target == "coreml":
        given |= {"length": settings["length"]}
    if target == "gguf":  # what is built into apps is older than what is on a desk
        given |= {"portable": True}
    if target == "onnx" and settings["dynamic_shape"]:
        given |= {"cache": True, "experts": "auto"}
    elif target == "onnx":
        given |= {"fixed": (settings["batch_size"], settings["length"]), "experts": "auto"}
    return given


def _graph(results: Mapping[str, ExportResult]) -> Path | None:
    """An ONNX file with a cache among what was written."""
    return next((f for r in results.values() for f in r.files if f.suffix == ".onnx"), None)


def _contract(graph: Path | None, model: nn.Module, tokenizer) -> dict:
    """What whoever runs the ONNX file needs to know: inputs and outputs as (name, dtype, shape), ids that end an answer, the longest
    text, what the chat template puts around a message."""
    if graph is None:
        return {}
    import onnx

    from edgelab.export.web_tokens import tokenizer_data

    held, kinds = onnx.load(str(graph), load_external_data=False).graph, {1: "float32", 7: "int64"}

    def told(values) -> list[tuple[str, str, str]]:
        lines = []
        for v in values:
            shape = [str(d.dim_value or d.dim_param) for d in v.type.tensor_type.shape.dim]
            lines.append((v.name, kinds[v.type.tensor_type.elem_type], f"[{', '.join(shape)}]"))
        return lines

    try:
        chat = tokenizer_data(tokenizer)["chat"]
    except ExportError:  # a tokenizer that has no counterpart on the page; its file is here all the same
        chat = None
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stop = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return {"inputs": told(held.input), "outputs": told(held.output), "stop": stop, "context": context, "chat": chat}


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
    (d.folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in files.items()), encoding="utf-8")
    files[SUMS] = _sha256(d.folder / SUMS)
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
