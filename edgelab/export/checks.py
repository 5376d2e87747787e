"""What every target promises, in one place: the model is one it can write, nothing half-written stays, the runtime agrees with torch."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import ExportError
from edgelab.layers import QExperts, Quantized
from edgelab.runtime_steps import steps_of

MIN_COSINE = 0.9999
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
def whole_or_nothing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """A path to write to for each of `paths` (files or folders of one parent), in a folder beside them. When the block ends well they
    take their places, the first, which stands for all, last. When it does not, nothing is left and what was there is still there; after
    a kill the next call puts that back. One file is replaced in one step; while a folder or several files are, there is none under the
    first name for a moment. A full disk becomes an ExportError."""
    parent = paths[0].parent
    work = parent / f"{paths[0].name}.tmp"
    _put_back(paths, work)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield tuple(work / p.name for p in paths)
        for path in paths:
            if path.is_dir() or (len(paths) > 1 and path.exists()):  # never new beside old, and no rename replaces a folder
                os.rename(path, work / f"{path.name}.old")
        for path in reversed(paths):
            if (work / path.name).exists():
                os.replace(work / path.name, path)
    except OSError as e:
        if e.errno in FULL:
            why = os.strerror(e.errno).lower()
            raise ExportError(f"{parent}: {why}; nothing was left there: free some space or write elsewhere") from e
        raise
    finally:
        _put_back(paths, work)
        shutil.rmtree(work, ignore_errors=True)


def _put_back(paths: tuple[Path, ...], work: Path) -> None:
    """Undo a replacement that did not come to its end."""
    if not paths[0].exists() and (work / f"{paths[0].name}.old").exists():
        for path in reversed(paths):
            if (old := work / f"{path.name}.old").exists():
                os.replace(old, path)


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
        worst = max(worst, float(np.abs(theirs - ours).max()))
        p, q = log_softmax(ours), log_softmax(theirs)
        kld += float((np.exp(p) * (p - q)).sum())
        top += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
        rows += len(ours)
    return {"cosine": cosine, "max_abs_diff": worst, "top1_agreement": top / rows, "kld": kld / rows}


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last dimension."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
