"""What every target promises, in one place: the model is one it can write, nothing half-written stays, the runtime agrees with torch."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import TARGETS, ExportError
from edgelab.layers import QExperts, Quantized
from edgelab.runtime_steps import steps_of

MIN_COSINE, MIN_TOP1 = 0.9999, 0.99
LENGTHS = (24, 96)


def causal_lm(model: "nn.Module | str | Path") -> nn.Module:
    """`model`, or the one in the directory of a bundle or a model. Raises ExportError where it is no causal language model."""
    if not isinstance(model, nn.Module):
        from edgelab.model import load

        model = load(str(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(model, "config"):
        raise ExportError(f"{type(model).__name__} has no language-model head; export takes a causal language model of transformers")
    return model


def refuse_other_arithmetic(model: nn.Module, *, symmetric_only: bool = True) -> None:
    """Raises ExportError for what no target writes: rounded inputs, adapters, run-time steps; and, with `symmetric_only`, for what is no
    symmetric code, scale * (q - 2**(bits-1)): other codebooks, experts in several schemes."""
    if steps := steps_of(model):
        raise ExportError(f"{steps[0]!r} changes how the model computes, which this target does not write; export it without")
    for name, module in model.named_modules():
        if getattr(module, "lora_a", None) is not None:
            raise ExportError(f"{name} has an adapter (LoRA) beside its codes, which this target does not write; learn scales instead")
        for parameter, s in module._stored.items() if isinstance(module, Quantized) else ():
            where = f"{name}.{parameter}" if isinstance(module, QExperts) else name
            if symmetric_only and getattr(module, "is_part", False):
                raise ExportError(f"{name}: experts in several schemes are not what this target writes; give each stack one scheme")
            if symmetric_only and s.scheme.codebook != "int":
                raise ExportError(
                    f"{where} is {s.scheme}; this target writes the symmetric codebook only, scale * (q - 2**(bits-1)). "
                    f"Export a model compressed to a scheme such as int{s.scheme.bits}-{s.scheme.granularity}"
                )
            if parameter in module.acts:
                raise ExportError(
                    f"{where} ({s.scheme}) rounds its input to {module.acts[parameter]}, which this target does not write. Export a model "
                    "without activations in its recipe, or take the rounding off: layer.round_input_of(parameter, None)"
                )


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file


@contextmanager
def whole_or_nothing(*paths: Path, ours: str = "") -> Iterator[tuple[Path, ...]]:
    """A path to write to for each of `paths` (files or folders of one parent), in a hidden folder beside them. When the block ends well
    they take their places, the first, which stands for all, last. When it does not, nothing is left and what was there is still there;
    after a kill the next call puts that back. One file is replaced in one step; while a folder or several files are, there is none under
    the first name for a moment. A folder is replaced only if it is empty or holds the file `ours`.

    Raises ExportError, before anything is written, for what is not ours to replace and where another process writes the same; and for a
    full disk.
    """
    first, parent = paths[0], paths[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f".{first.name}.edgelab"
    with _alone(work, first):
        _put_back(paths, work)
        _may_replace(paths, ours)
        (work / "moving").unlink(missing_ok=True)  # of a killed call that had not moved anything yet
        try:
            for name in ("new", "old"):
                shutil.rmtree(work / name, ignore_errors=True)
                (work / name).mkdir()
            yield tuple(work / "new" / p.name for p in paths)
            if not (work / "new" / first.name).exists():
                raise ExportError(f"{first.name} was not written, or was taken away meanwhile; export again")
            _synced(work / "new")
            (work / "moving").touch()
            for path in paths:
                if path.is_dir() or (len(paths) > 1 and path.exists()):  # never new beside old, and no rename replaces a folder
                    os.rename(path, work / "old" / path.name)
            for path in reversed(paths):
                if (work / "new" / path.name).exists():
                    os.replace(work / "new" / path.name, path)
        except OSError as e:
            if e.errno in FULL:
                why = os.strerror(e.errno).lower()
                raise ExportError(f"{parent}: {why}; nothing was left there: free some space or write elsewhere") from e
            raise
        finally:
            _put_back(paths, work)


@contextmanager
def _alone(work: Path, path: Path) -> Iterator[None]:
    """While it is active no other process has the folder `work`; afterwards it is gone."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers are not told from each other there
        fcntl = None
    if work.exists() and not (work / "lock").is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ExportError(f"{work} is in the way and not of edgelab: move it elsewhere")
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = (work / "lock").open("a")
        except FileNotFoundError:  # the other one has just cleared it away
            continue
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == (work / "lock").stat().st_ino:  # and not one that was cleared away meanwhile
                break
        except BlockingIOError as e:
            lock.close()
            raise ExportError(f"another process is writing {path}; wait for it, or write elsewhere") from e
        except FileNotFoundError:
            pass
        lock.close()
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def _may_replace(paths: tuple[Path, ...], ours: str) -> None:
    first, *others = paths
    if first.is_dir() and any(first.iterdir()) and not (ours and (first / ours).is_file()):
        what = f"no file {ours}" if ours else "other things"
        raise ExportError(f"{first} is a folder with {what} in it: it is not replaced; choose another place")
    if not first.exists() and (lonely := next((p for p in others if p.exists()), None)):
        raise ExportError(f"{lonely} exists without {first.name} and would be overwritten; choose another place, or move it")


def _put_back(paths: tuple[Path, ...], work: Path) -> None:
    """Undo a replacement that did not come to its end."""
    if not (work / "moving").exists() or paths[0].exists():
        return
    for path in paths[1:]:
        if path.exists() and not (work / "new" / path.name).exists():
            path.unlink()  # the new one, alone
    for path in reversed(paths):
        if (old := work / "old" / path.name).exists():
            os.replace(old, path)
    (work / "moving").unlink()


def _synced(folder: Path) -> None:
    """Have what is in `folder` on the disk, so that after a power cut no name stands for less."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as f:
                os.fsync(f.fileno())


@torch.no_grad()
def agreement(
    run: Callable[[np.ndarray], np.ndarray], model: nn.Module, lengths: tuple[int, ...] = LENGTHS, seed: int = 0
) -> dict[str, float]:
    """`compared` logits of a runtime and of torch on random tokens, kld in nats per token.

    `run`: ids int64 [T] -> logits [T, vocabulary], once for each of `lengths`. `model` computes with its own quantized layers: the
    dequantized weights, in float32.
    """
    vocabulary, draw, pairs = model.config.get_text_config().vocab_size, np.random.default_rng(seed), []
    for length in lengths:
        ids = draw.integers(0, vocabulary, (1, length))
        ours = model(input_ids=torch.from_numpy(ids), use_cache=False).logits[0]
        pairs.append((run(ids[0]), ours))
    return compared(pairs)


def compared(pairs: Iterable[tuple[np.ndarray, Tensor]]) -> dict[str, float]:
    """Agreement of logits [N, classes], (a runtime's, torch's) in pairs: the worst cosine and difference, the mean of the others.

    Keys: cosine, max_abs_diff, top1_agreement, kld (nats per row, torch's distribution first).
    """
    cosine, worst, top, kld, rows = 1.0, 0.0, 0.0, 0.0, 0
    for given, wanted in pairs:
        theirs, ours = np.asarray(given, np.float64), wanted.double().numpy()
        if theirs.shape != ours.shape:
            raise ExportError(f"the runtime gives logits {theirs.shape}; torch gives {ours.shape}")
        norms = np.linalg.norm(theirs) * np.linalg.norm(ours)
        cosine = min(cosine, float((theirs * ours).sum() / norms) if norms and np.isfinite(norms) else -1.0)
        worst = float(np.maximum(worst, np.abs(theirs - ours).max()))  # NaN stays NaN
        p, q = log_softmax(ours), log_softmax(theirs)
        kld += float((np.exp(p) * (p - q)).sum())
        top += float(((theirs.argmax(-1) == ours.argmax(-1)) & np.isfinite(theirs).all(-1)).sum())
        rows += len(ours)
    return {"cosine": cosine, "max_abs_diff": worst, "top1_agreement": top / rows, "kld": kld / rows}


def require(parity: Mapping[str, float], what: str, min_cosine: float = MIN_COSINE, advice: str = "") -> None:
    """Raises ExportError unless logits agree: the cosine, and where that is asked for in full the most likely token too."""
    if parity["cosine"] >= min_cosine and (min_cosine < MIN_COSINE or parity["top1_agreement"] >= MIN_TOP1):
        return
    raise ExportError(
        f"logits of {what} have cosine {parity['cosine']:.6f} to torch's and the same top token in {parity['top1_agreement']:.2%}; "
        f"{min_cosine} and {MIN_TOP1:.0%} are asked for" + (f". {advice}" if advice else "")
    )


def place(out: str | Path, name: str) -> Path:
    """The file `out`, or `name` in the folder `out`. Raises ExportError for a name that is another format's."""
    out, suffix = Path(out), Path(name).suffix
    others = {Path(n).suffix for n in TARGETS.values()} - {suffix, ""}
    if out.suffix in others or (out.is_file() and out.suffix != suffix):
        raise ExportError(f"{out} does not end in {suffix}; give a name that does, or a folder")
    return out if out.suffix == suffix else out / name


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last dimension."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
