"""Files that other runtimes execute, each verified in that runtime against the torch model. Every target is a module.

    onnx        one file; ONNX Runtime on desktops, Android, iOS, and behind Java
    gguf        one file; llama.cpp
    web         a folder with a page, ONNX Runtime Web and the model: opened in a browser it answers, offline too
    android     a folder: a library module (Java, C over ONNX Runtime, the model), run on the JVM here; a Swift package, not executed
    litert      one .tflite of fixed lengths; LiteRT
    executorch  one .pte of fixed lengths; ExecuTorch with XNNPACK
    openvino    .xml and .bin; OpenVINO
    coreml      an .mlpackage of a fixed length; converted, not executed

`export(model, "onnx", out)` and `verify(result, model)` are the doors to all of them; the modules have the settings of each.
`ExportResult` is what an export hands back. An export that cannot keep its promises (the runtime's logits differ, a
weight went out unquantized, a code changed on the way) raises `ExportError` and leaves no file behind.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgelab import html_table


class ExportError(RuntimeError):
    """An export that cannot be made, or that its verification refuses."""


class NoRuntimeError(ExportError):
    """What would run the file is not on this machine: it can be written, not verified."""


@dataclass(frozen=True)
class ExportResult:
    """What was written and what its verification found.

    `weights_*` count parameters of the model (a tied pair once); `weights_quantized` and `experts_quantized` are counted
    in the file. `predicted_bytes`: what codes, scales and the remaining floats should take; `bytes` has the graph on top.
    `parity`: cosine, max_abs_diff, top1_agreement, kld (nats per token) of the runtime's logits against the torch model's.
    """

    target: str
    files: tuple[Path, ...]
    bytes: int
    predicted_bytes: int
    weights_total: int
    weights_quantized: int
    experts_total: int
    experts_quantized: int
    seconds: float = 0.0
    parity: Mapping[str, float] = field(default_factory=dict)
    verified_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of all parameters that the file holds as codes."""
        return self.weights_quantized / self.weights_total

    @property
    def expert_share(self) -> float | None:
        """Share of the expert parameters that the file holds as codes; None for a model without experts."""
        return self.experts_quantized / self.experts_total if self.experts_total else None

    @property
    def bits_per_weight(self) -> float:
        """Effective bits per parameter: the whole file, graph counted."""
        return 8 * self.bytes / self.weights_total

    def table(self) -> list[dict[str, str]]:
        """One dict {item, value} per line, for the CLI, the notebooks and the page."""
        names = [f.name for f in self.files]
        lines = {"target": self.target, "file": ", ".join(names if len(names) < 4 else [names[0], f"and {len(names) - 1} more"])}
        lines["size"] = f"{self.bytes:,} bytes ({self.predicted_bytes:,} of weights)"
        lines["bits per weight"] = f"{self.bits_per_weight:.3f}"
        lines["weights quantized"] = f"{self.weights_quantized:,} of {self.weights_total:,} ({self.share:.1%})"
        if self.expert_share is not None:
            lines["expert weights quantized"] = f"{self.experts_quantized:,} of {self.experts_total:,} ({self.expert_share:.1%})"
        if self.parity:
            p = self.parity
            lines["logits against torch"] = f"1 - cosine {1 - p['cosine']:.1e}, largest difference {p['max_abs_diff']:.1e}"
            lines["same top token"] = f"{p['top1_agreement']:.2%}"
            lines["KL divergence"] = f"{p['kld']:.1e} nats per token"
        lines["verified by"] = self.verified_by or "not verified"
        if self.seconds:
            lines["time"] = f"{self.seconds:.1f} s"
        lines |= {f"note {i}": note for i, note in enumerate(self.notes, 1)}
        return [{"item": k, "value": v} for k, v in lines.items()]

    def _repr_html_(self) -> str:
        return html_table.facts((line["item"], line["value"]) for line in self.table())


TARGETS = {  # and what it is called in a folder
    "onnx": "model.onnx",
    "gguf": "model.gguf",
    "web": "web",
    "android": "android",
    "litert": "model.tflite",
    "executorch": "model.pte",
    "openvino": "model.xml",
    "coreml": "model.mlpackage",
}
MARKS = {
    "web": "web.json",
    "android": "edgelab/src/main/assets/edgelab/edgelab.json",
}  # of targets that are folders: the file by which one of ours is known
WITH_TOKENIZER = ("gguf", "web", "android")


def export(model, target: str, out: str | Path, **settings) -> ExportResult:
    """`model` (a module, or the directory of a bundle or a model) written for `target` and verified in the target's own runtime.

    `out`: the file to write (a folder for "web"). `settings` are those of the target's module, such as cache=True for "onnx". Raises
    ExportError for an unknown target, and what the module raises.
    """
    return _module(target).export(model, out, **settings)


def verify(result: ExportResult, model, **settings) -> ExportResult:
    """`result` verified again: its file opened in the target's own runtime and held against `model`. Raises ExportError."""
    return _module(result.target).verify(result, model, **settings)


def written_at(path: str | Path) -> ExportResult:
    """What `export` wrote at `path`, without its figures: `verify` fills them in. Raises ExportError where it is no file of ours."""
    path = Path(path)
    if not path.exists():
        raise ExportError(f"{path} does not exist")
    suffixes = {Path(name).suffix: target for target, name in TARGETS.items() if Path(name).suffix}
    target = next((t for t, mark in MARKS.items() if (path / mark).is_file()), None) or suffixes.get(path.suffix)
    if target is None:
        known = [*suffixes, *(f"a folder with {mark}" for mark in MARKS.values())]
        raise ExportError(f"{path} is nothing that `export` writes; it writes {', '.join(known)}")
    if target in MARKS:
        files = tuple(sorted((f for f in path.rglob("*") if f.is_file()), key=lambda f: (f.name != "index.html", str(f))))
    else:
        beside = {".onnx": path.with_name(f"{path.name}.data"), ".xml": path.with_suffix(".bin")}.get(path.suffix)
        files = (path, beside) if beside is not None and beside.is_file() else (path,)
    return ExportResult(target, files, sum(f.stat().st_size for f in files), 0, 0, 0, 0, 0)


def _module(target: str):
    if target not in TARGETS:
        raise ExportError(f"target={target!r} is not one of {', '.join(TARGETS)}")
    return importlib.import_module(f"edgelab.export.{target}")
