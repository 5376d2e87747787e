"""A checkpoint on disk as the tensors of its model: which bytes of which file fill which parameter, without reading them.

A safetensors file is a header (JSON: name -> dtype, shape, byte range) and bytes, so a tensor's rows can be read wherever they
lie. What transformers does to names and shapes while it loads is taken from its own tables (`conversion_mapping.py`):

- renamings, `block_sparse_moe.` to `mlp.` and the like;
- fusions: checkpoints of mixtures hold one matrix per expert and projection, `experts.3.gate_proj.weight`, and the model one
  stack, `experts.gate_up_proj` [experts, 2 * inner, hidden]. Since rows stay whole, a fusion is a list of `Piece`s: rows
  of a stored tensor that become rows of a parameter, both counted as [.., out, in] flattened to [rows, in];
- ties: a weight that has two names and is stored once, or twice alike.

Another conversion (a transposition, a split) is refused by name.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgelab.model import architecture, check_directory

# safetensors' names of dtypes: torch's, and the NumPy type of the same size that carries the bits
DTYPES = {
    "BF16": (torch.bfloat16, np.uint16),
    "F16": (torch.float16, np.uint16),
    "F32": (torch.float32, np.uint32),
    "I64": (torch.int64, np.uint64),
    "I32": (torch.int32, np.uint32),
    "U8": (torch.uint8, np.uint8),
    "BOOL": (torch.bool, np.uint8),
}
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: `nbytes` bytes from `begin` on in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.width * np.dtype(DTYPES[self.dtype][1]).itemsize


class Piece(NamedTuple):
    """`rows` rows of `stored`, from row `start` on, are the rows from `first` on of a parameter."""

    first: int
    stored: Stored
    start: int
    rows: int


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder`, from the headers of its files.

    Raises FileNotFoundError or ValueError, naming the file, when one is missing, cut short or no safetensors file.
    """
    check_directory(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json, which says what its files hold")
    found = {}
    for file in files:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = Stored(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def meta_model(folder: Path) -> nn.Module:
    """The model of the checkpoint in `folder`, as `model.load` makes it but on the meta device: shapes and names, no bytes."""
    import transformers

    name = str(folder)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantized already (its config has a quantization_config); start from the floating-point checkpoint")
    with torch.device("meta"):
        model = architecture(config, name)._from_config(config, dtype=torch.float32)
    if hasattr(model, "adjust_generation_fn"):  # reads generation_config.json, as loading does
        model.adjust_generation_fn(
            generation_config=None, from_auto_class=False, from_pipeline=None, pretrained_model_name_or_path=name, cache_dir=None,
            force_download=False, proxies=None, local_files_only=True, token=None, revision="main", subfolder="", trust_remote_code=False,
        )  # fmt: skip
    return model.eval()


def place(model: nn.Module, stored: dict[str, Stored]) -> dict[int, list[Piece]]:
    """{id of a parameter or buffer of the meta `model`: its pieces, in order of rows}. Ties the parameters that share a weight.

    Raises ValueError for a tensor that no parameter takes, a parameter that no tensor fills, a shape that does not fit, a
    dtype or conversion that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    state, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    sources: dict[str, dict[str | None, list[Stored]]] = {}
    strangers = []
    for name in sorted(stored, key=dot_natural_key):  # the experts in the order of their numbers, as transformers stacks them
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            sources.setdefault(target, {}).setdefault(pattern, []).append(stored[name])
        elif not _is_ignored(model, target):
            strangers.append(name)
    kind = type(model).__name__
    if strangers:
        raise ValueError(
            f"{len(strangers)} tensors of the checkpoint have no place in {kind}: {', '.join(strangers[:4])}"
            f"{' ...' if len(strangers) > 4 else ''}; is `architectures` in its config.json right?"
        )
    placed = {}
    for target, by in sources.items():
        pattern = next(iter(by))
        placed[target] = _pieces(target, tuple(state[target].shape), by, by_pattern.get(pattern))
        for piece in placed[target]:
            floating = state[target].is_floating_point()
            if piece.stored.dtype not in (FLOATS if floating else DTYPES):
                raise ValueError(
                    f"{piece.stored.name} is stored as {piece.stored.dtype}; weights of {', '.join(FLOATS)} can be streamed "
                    "(a checkpoint in FP8 or FP4 is quantized already)"
                )
            if not floating and DTYPES[piece.stored.dtype][0] != state[target].dtype:
                raise ValueError(f"{piece.stored.name} is stored as {piece.stored.dtype}, {kind} has {state[target].dtype}")
    _tie(model, placed)
    state = model.state_dict(keep_vars=True)
    found = {id(state[name]): pieces for name, pieces in placed.items()}
    absent = [name for name, tensor in state.items() if id(tensor) not in found]
    if absent:
        raise ValueError(
            f"the checkpoint lacks {len(absent)} weights of {kind}: {', '.join(absent[:4])}{' ...' if len(absent) > 4 else ''}"
        )
    return found


def _is_ignored(model: nn.Module, name: str) -> bool:
    """Whether transformers leaves this tensor of a checkpoint unread without a word."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(b.endswith("rotary_emb.inv_freq") for b in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(b.endswith("position_ids") for b in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(p, name) for p in patterns)


def _pieces(target: str, shape: tuple[int, ...], by: dict[str | None, list[Stored]], converter) -> list[Piece]:
    """The pieces of the parameter `target` of `shape`. `by`: the stored tensors by the pattern of `converter` that took them."""
    if converter is None:
        (only,) = by.values()
        if len(only) != 1 or only[0].shape != shape:
            raise ValueError(f"{target} has the shape {shape}, the checkpoint holds {', '.join(f'{s.name} {s.shape}' for s in only)}")
        return [Piece(0, only[0], 0, only[0].rows)]
    steps = [(type(o).__name__, o.dim if hasattr(o, "dim") else None) for o in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise ValueError(
            f"transformers makes {target} out of {next(iter(by.values()))[0].name} by {' and '.join(s for s, _ in steps)}, which "
            "can't be done row by row: load the model and use edgelab.compress"
        )
    lists = [by[p] for p in converter.source_patterns if p in by]
    counts = {len(one) for one in lists}
    if len(lists) != len(converter.source_patterns) or counts != {shape[0]}:
        held = ", ".join(f"{len(one)} x {one[0].name}" for one in lists)
        raise ValueError(f"{target} {shape} is a stack of {shape[0]} experts; the checkpoint holds {held}")
    pieces, first = [], 0
    for expert in zip(*lists, strict=True):
        for one in expert:
            pieces.append(Piece(first, one, 0, one.rows))
            first += one.rows
        if any(len(one.shape) != 2 or one.width != shape[2] for one in expert) or first % shape[1]:
            held = ", ".join(f"{one.name} {one.shape}" for one in expert)
            raise ValueError(f"an expert of {target} is {shape[1:]}; the checkpoint holds {held}")
    return pieces


def _tie(model: nn.Module, placed: dict[str, list[Piece]]) -> None:
    """Tie parameters as loading does: also when the checkpoint holds the weight under its second name, or twice alike."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in placed and source in placed:
            if _same(placed[target], placed[source]):
                del placed[target]
            else:  # two weights, whatever the config says; the meta model was made with one
                model.all_tied_weights_keys.pop(target)
                module, _, parameter = target.rpartition(".")
                apart = nn.Parameter(torch.empty_like(model.get_parameter(target)), requires_grad=False)
                setattr(model.get_submodule(module), parameter, apart)
    absent = set(model.state_dict()) - set(placed)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)


def _same(a: list[Piece], b: list[Piece]) -> bool:
    blocks = zip(*(values(s, 0, s.rows) for s in (a[0].stored, b[0].stored)), strict=False)
    return a[0].stored.shape == b[0].stored.shape and all(torch.equal(x.float(), y.float()) for x, y in blocks)


def values(s: Stored, start: int, rows: int, most: int = 1 << 22) -> Iterator[torch.Tensor]:
    """Rows of `s` as torch tensors [some, width], at most `most` weights at a time (or one row)."""
    step = max(1, most // max(s.width, 1))
    fd = os.open(s.file, os.O_RDONLY)
    try:
        for r in range(start, start + rows, step):
            count = min(step, start + rows - r)
            buffer = bytearray(count * s.row_bytes)
            read_rows(fd, s, r, count, memoryview(buffer))
            yield torch.frombuffer(buffer, dtype=DTYPES[s.dtype][0]).reshape(count, s.width)
    finally:
        os.close(fd)


def read_rows(fd: int, s: Stored, start: int, rows: int, into: memoryview) -> None:
    """Fill `into` with the bytes of `rows` rows of `s`, from row `start` on."""
    at, done, size = s.begin + start * s.row_bytes, 0, rows * s.row_bytes
    while done < size:
        got = os.preadv(fd, [into[done:size]], at + done)
        if not got:
            raise ValueError(f"{s.file} ended inside {s.name}: it was changed while it was read")
        done += got
