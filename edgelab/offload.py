"""Experts that stay on disk: a mixture of experts runs with `capacity` experts per layer in RAM, and the same numbers.

`offload(folder, capacity)` loads a checkpoint or a bundle, all but the routed experts: their bytes are mapped, not read.
In the place of each expert module stands a `MappedExperts`: the same module with `capacity` slots instead of E experts.

    expert e is wanted:  in a slot?  yes: a hit
                                     no:  the slot of the expert whose last use is longest ago gets e's rows from the file
    then the module computes with slot numbers instead of expert numbers

What the slots hold is what a loaded model would hold of these experts, so the outputs are equal. A bfloat16 file is widened
on the way in to what the model computes in; codes stay codes. The file is mapped (`mmap`): the rows of one expert are
one contiguous piece, or one for each projection where the checkpoint holds the experts one by one, and the system reads
its pages from the disk when they are copied. `bytes_read` counts what was copied out of the file; pages that the system
still has in its own cache cost no disk access then, so on a phone this is the upper bound.

Decoding wants k experts per layer and token. A prompt wants many at once, perhaps more than there are slots: then the experts
are taken one after the other, those in RAM first, each read at most once per call.

The trade-off: RAM for (E - capacity) experts per layer is saved, each miss costs one expert's bytes from flash
(`expert_cache.simulate` says how many there will be, `expert_cache.prefer_cached` makes them fewer at a price).
"""

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgelab.checkpoint import DTYPES, Piece, Stored, place, stored_in, values
from edgelab.expert_cache import Cache
from edgelab.kernels.pack import tile
from edgelab.layers import QExperts, Quantized, _scale_values, _version
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import architecture, check_directory, retie


class Maps:
    """The files of a checkpoint, mapped when first wanted. Copies of a model share them."""

    def __init__(self) -> None:
        self._open: dict[Path, memoryview] = {}

    def rows(self, s: Stored, start: int, count: int) -> Tensor:
        """Rows of `s` [count, width], on the file's own pages: nothing is read before it is copied."""
        if s.file not in self._open:
            with s.file.open("rb") as f:  # a private mapping: torch has no read-only tensors, and nobody writes to it
                self._open[s.file] = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
        at = s.begin + start * s.row_bytes
        return torch.frombuffer(self._open[s.file][at : at + count * s.row_bytes], dtype=DTYPES[s.dtype][0]).view(count, s.width)

    def __deepcopy__(self, memo) -> "Maps":
        return self


class Slice(NamedTuple):
    """Where the tensors of one expert's parameter come from: `pieces` in order of rows, `shape` of the whole expert."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]


class MappedExperts(nn.Module):
    """The routed experts of one layer, `capacity` of them in RAM. Called as the module that it replaces.

    `inner`: that module with `capacity` experts. `sources`: {parameter or buffer of `inner`: a `Slice` for each expert}.
    """

    def __init__(self, inner: nn.Module, sources: dict[str, list[Slice]], maps: Maps, capacity: int) -> None:
        super().__init__()
        self.inner, self.sources, self.maps = inner, sources, maps
        self.num_experts = len(next(iter(sources.values())))
        self.cache = Cache(capacity)
        self.bytes_read = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file."""
        return sum(p.rows * p.stored.row_bytes for slices in self.sources.values() for p in slices[0].pieces)

    @property
    def hits(self) -> int:
        return self.cache.hits

    @property
    def misses(self) -> int:
        return self.cache.misses

    @torch.no_grad()
    def _fetch(self, experts: list[int]) -> None:
        for e, slot in self.cache.take(experts):
            for name, slices in self.sources.items():
                target = getattr(self.inner, name)[slot]
                rows = target.view(-1, target.shape[-1]) if target.ndim > 1 else target.view(1, -1)
                first = 0
                for p in slices[e].pieces:
                    rows[first : first + p.rows] = self.maps.rows(p.stored, p.start, p.rows)
                    first += p.rows
                    self.bytes_read += p.rows * p.stored.row_bytes
            if isinstance(self.inner, QExperts):
                _retile(self.inner, slot)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] from hidden_states [T, hidden], top_k_index [T, k] and top_k_weights [T, k]. A choice of weight 0 is not read."""
        x, index = hidden_states, top_k_index
        counted = (top_k_weights != 0) & (index < self.num_experts)
        # every expert at its last use: by token, within a token by weight, so that the cache keeps what simulate() keeps
        order = top_k_weights.argsort(dim=-1, stable=True)
        uses = torch.where(counted, index, -1).gather(1, order).flatten().tolist()
        wanted = list(dict.fromkeys(e for e in reversed(uses) if e >= 0))[::-1]
        if not wanted:
            return torch.zeros_like(x)
        if len(wanted) <= self.cache.capacity:
            self._fetch(wanted)
            slot_of = torch.full((self.num_experts + 1,), self.cache.slots[wanted[0]])
            slot_of[wanted] = torch.tensor([self.cache.slots[e] for e in wanted])
            return self.inner(x, slot_of[index], top_k_weights.masked_fill(~counted, 0))
        flat, k = index.flatten(), index.shape[1]
        rows = x.new_zeros(len(flat), x.shape[1])
        for e in sorted(wanted, key=lambda e: e not in self.cache.slots):  # stable: those in RAM first
            self._fetch([e])
            at = ((flat == e) & counted.flatten()).nonzero()[:, 0]
            slot = torch.full((len(at), 1), self.cache.slots[e])
            rows[at] = self.inner(x[at // k], slot, top_k_weights.new_ones(len(at), 1))
        gates = top_k_weights.masked_fill(~counted, 0)
        return (rows.view(*index.shape, -1) * gates[..., None]).sum(1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.cache.capacity} of {self.num_experts} experts in RAM, {self.expert_bytes:,} bytes each"


def _retile(layer: QExperts, slot: int) -> None:
    """Lay out one slot's tiles anew: the kernels' copy of the codes, which would else be made again for all slots."""
    for (name, wider), held in list(layer._views.items()):
        s = layer._stored[name]
        packed, scales = layer._buffers[s.packed], layer._buffers[s.scales]
        if wider or held[0] is not packed or held[1] is not scales:
            del layer._views[name, wider]
            continue
        halves = scales[slot : slot + 1] if scales.dtype == torch.float16 else _scale_values(scales[slot : slot + 1]).half()
        levels = None if s.scheme.affine else s.scheme.table
        codes = packed[slot : slot + 1].numpy()
        one = tile(codes, halves.contiguous().view(torch.int16).numpy(), s.scheme.bits, s.group_size, s.shape[-1], levels)
        held[3].codes[slot], held[3].scales[slot] = one.codes[0], one.scales[0]
        layer._views[name, wider] = (packed, scales, _version(packed, scales), held[3])


# ----------------------------------------------------------------------------------------------------------- loading


def offload(folder: str | Path, capacity: int) -> nn.Module:
    """The model of a checkpoint or bundle in `folder`, float32, in eval mode, with `capacity` experts per layer in RAM.

    The experts are not read, all else is. Raises ValueError for a model without fused experts, for experts in several schemes
    (a `per_expert` recipe), for fewer slots than a token has experts, and what `checkpoint.place` refuses; FileNotFoundError.
    """
    folder = Path(folder)
    check_directory(folder)
    model, runtime = _empty(folder)
    found = place(model, stored_in(folder))
    modules = {name: m for name, m in model.named_modules() if _is_stack(m)}
    mixed = next((name for name, m in model.named_modules() if isinstance(m, QExpertsMixed)), None)
    if mixed is not None:
        raise ValueError(f"{mixed} holds experts in several schemes, which have no slots in common; quantize with one scheme per layer")
    if not modules:
        raise ValueError(f"{folder} is a {type(model).__name__} without fused experts: there is nothing to leave on disk")
    maps = Maps()
    for name, module in modules.items():
        router = next(m for m in model.get_submodule(name.rpartition(".")[0]).modules() if hasattr(m, "top_k"))
        if not router.top_k <= capacity <= module.num_experts:
            raise ValueError(
                f"capacity={capacity} of {name} must be in {router.top_k} (experts of a token) .. {module.num_experts} (all of them)"
            )
        _put(model, name, MappedExperts(*_slots(module, found, capacity), maps, capacity))
    _fill(model, found)
    retie(model)
    if runtime:
        from edgelab.runtime_steps import restore

        restore(model, runtime)
    return model.eval()


def mapped(model: nn.Module) -> dict[str, MappedExperts]:
    """The modules of `model` whose experts are on disk, by name; their hits, misses and bytes_read count since loading."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MappedExperts)}


def _empty(folder: Path) -> tuple[nn.Module, tuple]:
    """(the model on the meta device, with the layers of its quantization_config, the run-time steps it computes by)."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    settings = dict(getattr(config, "quantization_config", None) or {})
    runtime: tuple = ()
    with torch.device("meta"):
        model = architecture(config, str(folder))._from_config(config, dtype=torch.float32)
        if settings:
            if settings.get("quant_method") != "edgelab":
                raise ValueError(f"{folder} is quantized by {settings.get('quant_method')!r}; float checkpoints and bundles can be mapped")
            from edgelab.hf import EdgeLabConfig, EdgeLabQuantizer

            quantization = EdgeLabConfig(**settings)
            EdgeLabQuantizer(quantization, pre_quantized=True)._process_model_before_weight_loading(model)
            runtime = quantization.runtime
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model, runtime


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, QExperts):
        return not getattr(module, "is_part", False)
    return hasattr(module, "num_experts") and any(
        p.ndim == 3 and len(p) == module.num_experts for p in module._parameters.values() if p is not None
    )


def _slots(module: nn.Module, found: dict[int, list[Piece]], capacity: int) -> tuple[nn.Module, dict[str, list[Slice]]]:
    """(`module` with `capacity` experts of zeros instead of all, where each tensor of each expert lies)"""
    sources, experts = {}, module.num_experts
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is None or tensor.ndim < 2 or len(tensor) != experts:
                continue  # a stored range of inputs is one for all
            each = prod(tensor.shape[1:-1])
            sources[name] = [Slice(tuple(_cut(found[id(tensor)], e * each, each)), tuple(tensor.shape[1:])) for e in range(experts)]
            zeros = torch.zeros(capacity, *tensor.shape[1:], dtype=tensor.dtype, device="cpu")
            store[name] = nn.Parameter(zeros, requires_grad=False) if store is module._parameters else zeros
    module.num_experts = capacity
    if isinstance(module, Quantized):
        module._stored = {name: s._replace(shape=(capacity, *s.shape[1:])) for name, s in module._stored.items()}
    return module, sources


def _cut(pieces: list[Piece], start: int, rows: int) -> Iterator[Piece]:
    """The parts of `pieces` that are the rows from `start` on of a parameter."""
    for p in pieces:
        low, high = max(p.first, start), min(p.first + p.rows, start + rows)
        if low < high:
            yield Piece(low - start, p.stored, p.start + low - p.first, high - low)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _fill(model: nn.Module, found: dict[int, list[Piece]]) -> None:
    """Read every tensor that is still on the meta device, and make those that no file holds (rotary frequencies)."""
    ready: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) in found:
                    if id(tensor) not in ready:
                        flat = torch.cat([block.to(tensor.dtype) for p in found[id(tensor)] for block in values(p.stored, p.start, p.rows)])
                        whole = flat.view(tensor.shape)
                        ready[id(tensor)] = nn.Parameter(whole, requires_grad=False) if store is module._parameters else whole
                    store[name] = ready[id(tensor)]
                else:
                    store[name] = torch.empty_like(tensor, device="cpu")
        if any(b is not None and name in module._non_persistent_buffers_set for name, b in module._buffers.items()):
            with torch.no_grad():
                model._init_weights(module)
