"""A bundle: a directory that holds a compressed model, what was done to it, and the proof that nothing in it changed.

    model-00001-of-0000n.safetensors   the weights, in chunks small enough to map one at a time
    model.safetensors.index.json       which weight is in which chunk
    config.json, generation_config.json, the tokenizer's files
    edgelab.json                       the manifest: recipe, schemes, coverage, report, bytes and sha256 of every other file

It is written to a temporary name and renamed when whole. With `import edgelab.hf` done, plain
`AutoModelForCausalLM.from_pretrained(bundle)` loads it.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import edgelab
from edgelab.methods.coverage import Coverage
from edgelab.model import load, quantized, stored_tensors
from edgelab.recipe import Recipe
from edgelab.report import Report
from edgelab.runtime_steps import steps_of

FORMAT = 1
MANIFEST = "edgelab.json"
_ENTRY_BYTES = 128  # of a safetensors header per tensor, besides its name: dtype, shape, offsets; never less than it takes


def save_bundle(
    model: nn.Module,
    tokenizer,
    out_dir: str | Path,
    *,
    recipe: Recipe,
    coverage: Coverage,
    report: Report | None = None,
    max_chunk_bytes: int = 256 * 2**20,
) -> Path:
    """The path of the bundle, written whole or not at all. `tokenizer` may be None.

    A bundle that lies at `out_dir` is replaced. A weight above `max_chunk_bytes` gets a chunk of its own, with a
    warning. Raises FileExistsError when `out_dir` holds something else, TypeError when `model` is no transformers
    model, ValueError when `coverage` is not the audit of this model.
    """
    out = Path(out_dir)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"a bundle holds a transformers model with its config; {type(model).__name__} is a plain module (use torch.save of its state)"
        )
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is no bundle: it is not replaced; choose another directory")
    packed = quantized(model)
    schemes = {name: str(q.scheme) for name, (_, q) in packed.items()}
    audited = {r.name: r.scheme for r in coverage if r.touched}
    if audited != schemes:
        differs = sorted({*audited.items()} ^ {*schemes.items()})[0]
        raise ValueError(
            f"the coverage is of another model: {differs[0]} ({differs[1]}) is not in both; pass the one that compress returned"
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    if packed or steps_of(model):
        from edgelab.hf import adopt  # imports transformers

        adopt(model)  # the config says what the layers are now, also how they round their inputs
    tmp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        weight_bytes = _write_weights(stored_tensors(model), tmp, max_chunk_bytes)
        write_config(model, tmp)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
        write_manifest(tmp, model.config.model_type, recipe, coverage.with_file_bytes(weight_bytes), report)
        tmp.chmod(0o755)  # mkdtemp makes it private
        put(tmp, out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return out


def write_manifest(
    folder: Path, model_type: str, recipe: Recipe, coverage: Coverage, report: Report | None = None, hashes: dict[str, str] | None = None
) -> None:
    """Write the manifest of all files in `folder`. `hashes`: the sha256 of those that were hashed already."""
    hashes = hashes or {}
    manifest = {
        "format": FORMAT,
        "edgelab": edgelab.__version__,
        "model_type": model_type,
        "recipe": json.loads(recipe.to_json()),
        "recipe_digest": recipe.digest,
        "schemes": {r.name: r.scheme for r in coverage if r.touched},
        "coverage": coverage.to_dict(),
        "report": None if report is None else json.loads(report.to_json()),
        "files": {
            name: {"bytes": f.stat().st_size, "sha256": hashes.get(name) or _sha256(f)} for name, f in sorted(_files(folder).items())
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(bundle: str | Path) -> dict:
    """The manifest of a bundle, checked: format, files inside the directory only.

    Its "recipe", "coverage" and "report" go through `Recipe.from_json(json.dumps(...))`, `Coverage.from_dict`,
    `Report.from_json(json.dumps(...))`. Raises FileNotFoundError or ValueError.
    """
    path = Path(bundle) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no {MANIFEST} in {bundle}: it is not a bundle")
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest.get("format"), manifest.get("files")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no readable JSON object ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this edgelab reads {FORMAT}: it was written by another version")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} lists no files")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] == "/" or "/".join(parts) != name or "\\" in name or ":" in name:
            raise ValueError(f"{path} lists {name!r}, which is outside the bundle or no plain relative path")
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise ValueError(f"{path}: the entry of {name!r} is {entry!r}; it must state bytes (a number) and sha256 (text): copy it again")
    return manifest


def verify_bundle(bundle: str | Path) -> dict:
    """The manifest, after every file was found to have the bytes and the sha256 that it states.

    Raises FileNotFoundError for a missing file, ValueError for a changed one or one that the manifest does not know.
    """
    manifest = _check_sizes(Path(bundle))
    for name, entry in manifest["files"].items():
        found = _sha256(Path(bundle) / name)
        if found != entry["sha256"]:
            stated = entry["sha256"][:12]
            raise ValueError(
                f"{Path(bundle) / name} was changed: its sha256 is {found[:12]}..., the manifest says {stated}...; copy it again"
            )
    return manifest


def load_bundle(bundle: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The quantized model of a bundle, in eval mode. File names and sizes are checked; hashes are `verify_bundle`'s.

    A file that the manifest does not list is refused: transformers would take a stray model.safetensors for the model.
    """
    _check_sizes(Path(bundle))
    return load(Path(bundle), dtype=dtype)


def coverage_of(bundle: str | Path) -> Coverage:
    """The audit that was made when the bundle was written, with the bytes that its weights take on disk."""
    return Coverage.from_dict(read_manifest(bundle)["coverage"])


def _check_sizes(bundle: Path) -> dict:
    manifest = read_manifest(bundle)
    for name, entry in manifest["files"].items():
        path = bundle / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the manifest lists it with {entry['bytes']:,} bytes; copy the bundle again")
        if any((bundle / p).is_symlink() for p in (name, *PurePosixPath(name).parents) if str(p) != "."):
            raise ValueError(f"{path} is a link: a bundle holds its files itself")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes, the manifest says {entry['bytes']:,}; copy it again")
    refuse_strangers(bundle, manifest)
    return manifest


def refuse_strangers(bundle: Path, manifest: dict) -> None:
    """Raises ValueError for a file that the manifest does not list: transformers would read a stray model.safetensors."""
    strange = sorted(set(_files(bundle)) - set(manifest["files"]) - {MANIFEST})
    if strange:
        raise ValueError(f"{bundle / strange[0]} is not in the manifest: it was added later; remove it")


def _files(folder: Path) -> dict[str, Path]:
    """{path relative to `folder`, with slashes: path} of everything in it that is no directory (a link is a file)."""
    return {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir()}


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_chunk_bytes: int) -> int:
    """Bytes of all chunk files. Tensors keep their order, so that a layer's lie together."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    chunks = chunked(sizes, max_chunk_bytes)
    total = 0
    for file, names in tqdm(chunks.items(), desc="write chunks", unit="chunk", disable=len(chunks) < 4):
        save_file({name: tensors[name].cpu().contiguous() for name in names}, folder / file, {"format": "pt"})
        total += (folder / file).stat().st_size
    write_index(folder, chunks, sum(sizes.values()))
    return total


def chunked(sizes: dict[str, int], max_chunk_bytes: int) -> dict[str, list[str]]:
    """{chunk file: the tensors in it}, of tensors of `sizes` bytes, in their order. Warns of a tensor that is larger than a chunk."""
    chunks: list[list[str]] = []
    room = 0
    for name, n in sizes.items():
        size = n + len(name) + _ENTRY_BYTES
        if size + 2 * _ENTRY_BYTES > max_chunk_bytes:
            warnings.warn(f"{name} takes {size:,} bytes, more than max_chunk_bytes={max_chunk_bytes:,}: its chunk is larger", stacklevel=4)
        if not chunks or size > room:
            chunks.append([])
            room = max_chunk_bytes - 2 * _ENTRY_BYTES
        chunks[-1].append(name)
        room -= size
    return {f"model-{i + 1:05}-of-{len(chunks):05}.safetensors": names for i, names in enumerate(chunks)}


def write_index(folder: Path, chunks: dict[str, list[str]], total_size: int) -> None:
    """Write which tensor is in which chunk, as transformers reads it."""
    index = {name: file for file, names in chunks.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total_size}, "weight_map": index}, indent=1) + "\n"
    )


def write_config(model, folder: Path) -> None:
    """Write the model's config and generation config."""
    import copy

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if getattr(config, "tie_word_embeddings", False) and not _has_tied_head(model):
        config.tie_word_embeddings = False  # the checkpoint held two different weights: as the config says, one would be lost
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _has_tied_head(model) -> bool:
    """Whether the output embedding is the input embedding, in floating point or in codes."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends:
        return True
    first, second = ({**m._parameters, **m._buffers} for m in ends)
    return any(first.get(k) is not None and first[k] is second.get(k) for k in ("weight", "packed"))


def put(tmp: Path, out: Path) -> None:
    """Rename `tmp` to `out`; what lies there is only removed once the new one is in its place."""
    if not out.exists():
        os.rename(tmp, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.rename(out, old / out.name)
    try:
        os.rename(tmp, out)
    except BaseException:
        os.rename(old / out.name, out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
