"""A bundle opened by its headers alone: weights are mapped, and a layer comes into being when it is first called.

    bundle = LazyBundle("phone")       reads config and headers; bundle.tensors: name -> file, dtype, shape, bytes
    bundle.tensor("lm_head.scales")    one weight, on the pages of its file
    bundle.model(ids)                  each layer is filled at its first call
    bundle.release("model.layers.3")   and can be empty again
    bundle.load(progress)              or everything at once

The model is made on the meta device, where shapes cost nothing. A *unit* is what is filled at once: a block (the outermost
member of a ModuleList: everything in it), or a module outside of the blocks. Of a weight that is stored as the model computes
with it (codes, scales; floats of the same dtype) the unit gets a view on the mapped file: no byte is copied, and of an
embedding or a stack of float experts only the rows that are used are ever read. What is stored otherwise (bfloat16 computed in
float32, experts stored one by one) is copied a few rows at a time, and the pages it came from go back at once.

**Why the numbers are the same to the last bit.** A product of torch may depend on where its weight lies (MKL's float32 GEMV
sums in another order at an address of 8 modulo 16), so a view must lie where transformers' own loading has it: at the
file's offset in a map that starts on a page. Copies are as aligned as torch makes every tensor.

**What is really saved.** transformers maps files too, when nothing has to be converted; codes that nobody touches cost no RAM
there either. The rest is what is done here: the kernels lay codes out in tiles at a layer's first call, and from
then on the codes' pages are only ballast (`madvise(MADV_DONTNEED)` gives them back: RAM holds a weight once, not twice); floats are
not widened before they are wanted; `keep` blocks at most are filled at a time; `capacity` experts per layer are in RAM
(`offload.MappedExperts`). `startup.startup_table` measures each in processes of its own. A random Qwen3 mixture of 401 MiB at int4-g32
(`startup.random_bundle`: 16 layers, 32 experts), one token after a prompt of 8, peak of RAM above the imports, on an AMD EPYC: all read
960 MiB, `load_bundle` 808, lazily 434, 8 experts a layer 229, one layer at a time 66; the first weight after 0.7 s and 0.02 s.

Maps are private and writable (copy on write), for torch has no read-only tensors: what is written to a weight stays in this
process, never reaches the file, and is lost when its unit is released. A file may be deleted while it is mapped, but must
not be cut short or written over: `hot.ModelSlot` never does. Under strict overcommit (vm.overcommit_memory=2) a
private map counts as memory. Linux and macOS; the peak of RAM is read from /proc, which is Linux's.
"""

import json
import mmap
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.bundle import MANIFEST, _check_sizes, _sha256, chunked, verify_bundle, write_index
from edgelab.checkpoint import DTYPES, Piece, Stored, place, stored_in
from edgelab.export.checks import whole_or_nothing
from edgelab.layers import Quantized
from edgelab.methods.coverage import Coverage
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import architecture, retie
from edgelab.offload import MappedExperts, Maps, _is_stack, _put, _slots

VERIFY = ("sizes", "chunks")
_ROWS = 1 << 22  # weights that are copied at a time
_ALIGN = 64  # of the first weight in a chunk that `rechunk` writes


class _Chunks(Maps):
    """Mapped files, each checked against its sha256 when it is first mapped (`digests`: those that are to be checked)."""

    def __init__(self, digests: dict[Path, str]) -> None:
        super().__init__()
        self._digests = digests

    def rows(self, s: Stored, start: int, count: int) -> Tensor:
        if s.file in self._digests and s.file not in self._open:
            found, stated = _sha256(s.file), self._digests[s.file]  # read, not mapped: what was only hashed takes no RAM here
            if found != stated:
                raise ValueError(f"{s.file} was changed: its sha256 is {found[:12]}..., the manifest says {stated[:12]}...; copy it again")
        return super().rows(s, start, count)

    def advise(self, s: Stored, advice: int, start: int = 0, rows: int | None = None) -> None:
        """`madvise` for the pages of rows of `s`, all by default, if its file is mapped. Pages are widened to whole ones: none is lost,
        since a page that was given back is read again (what was written to it is not)."""
        view = self._open.get(s.file)
        if view is None or not s.nbytes:
            return
        begin = s.begin + start * s.row_bytes
        low = begin // mmap.PAGESIZE * mmap.PAGESIZE
        high = begin + (s.rows - start if rows is None else rows) * s.row_bytes
        view.obj.madvise(advice, low, high - low)

    def touch(self, s: Stored) -> None:
        """Read a byte of each page of `s`."""
        if s.nbytes:
            self.rows(replace(s, dtype="U8", shape=(s.nbytes,)), 0, 1).numpy()[0, :: mmap.PAGESIZE].max()


class _Slot:
    """One tensor of the model: where it is stored, every place in the model that holds it, what lies there while it is empty."""

    def __init__(self, empty: Tensor, pieces: list[Piece]) -> None:
        self.empty, self.pieces = empty, pieces
        self.places: list[tuple[dict, str]] = []  # (a module's _parameters or _buffers, name)
        self.filled = self.stays = False

    def put(self, tensor: Tensor) -> None:
        for store, name in self.places:
            store[name] = tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(p.rows * p.stored.row_bytes for p in self.pieces)


class _Unit:
    """What is filled at once: `root` and the modules of `holders`, which hold the tensors of `slots`. `inner`: all modules in it."""

    def __init__(self, name: str, root: nn.Module, is_block: bool) -> None:
        self.name, self.root, self.is_block = name, root, is_block
        self.inner = list(root.modules()) if is_block else [root]
        self.holders: list[nn.Module] = []
        self.slots: list[_Slot] = []
        self.misses = 0
        self.before: list = []  # handles of the hooks that fill it
        self.after = None

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


class LazyBundle:
    """A bundle, or any directory of a safetensors checkpoint, opened without reading its weights.

    `dtype`: what the model computes in, as of `load_bundle`. `verify`: "sizes" of all files now, or "chunks": also the sha256 of
    each chunk at the first use of a weight in it (the smaller the chunks, the sooner the first weight). `capacity`: experts per
    layer in RAM, as of `offload`; None: all that are called. `keep`: at most so many blocks are filled at a time, the one used
    longest ago is released (but not its experts' slots, if there is a `capacity`); for one thread at a time. `prefetch`: while a
    unit computes, the system reads the next.

    `tensors`: {name: `Stored`}, `chunks`: {file name: bytes}, `opened_s`, `first_weight_s` (None until a weight was used): seconds
    since the constructor was called.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing, truncated, damaged, or not as the manifest says.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        verify: str = "sizes",
        capacity: int | None = None,
        keep: int | None = None,
        prefetch: bool = False,
    ) -> None:
        self._start = perf_counter()
        self.path = Path(path)
        if verify not in VERIFY:
            raise ValueError(f"verify={verify!r} is not known; use one of {', '.join(VERIFY)}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep} must be 1 block or more, or None for all")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} is no floating-point type; use torch.float32, torch.bfloat16 or torch.float16")
        self.dtype, self.capacity, self.keep, self.prefetch = dtype, capacity, keep, prefetch
        self.manifest = _check_sizes(self.path) if (self.path / MANIFEST).is_file() else None
        if verify == "chunks" and self.manifest is None:
            raise ValueError(f"{self.path} has no {MANIFEST}, which would say the sha256 of its chunks; use verify='sizes'")
        self.tensors = _headers(self.path)
        self.chunks = {f.name: f.stat().st_size for f in dict.fromkeys(s.file for s in self.tensors.values())}
        listed = self.manifest["files"] if verify == "chunks" else {}
        self._maps = _Chunks({self.path / name: entry["sha256"] for name, entry in listed.items()})
        self._lock = threading.RLock()
        self._model: nn.Module | None = None
        self._units: dict[str, _Unit] = {}
        self._filled: OrderedDict[str, None] = OrderedDict()  # the one used longest ago first
        self.first_weight_s: float | None = None
        self.opened_s = perf_counter() - self._start

    def __deepcopy__(self, memo):
        raise TypeError("a model that is filled on first use can't be copied, for its layers look for their files: call load() first")

    def __repr__(self) -> str:
        total = sum(s.nbytes for s in self.tensors.values())
        filled = f", {len(self._filled)} of {len(self._units)} units filled" if self._units else ""
        return f"LazyBundle({self.path.name}: {len(self.tensors)} tensors, {total:,} bytes in {len(self.chunks)} chunks{filled})"

    def table(self) -> list[dict]:
        """One dict {tensor, dtype, shape, bytes, chunk} per stored tensor."""
        return [{"tensor": n, "dtype": s.dtype, "shape": s.shape, "bytes": s.nbytes, "chunk": s.file.name} for n, s in self.tensors.items()]

    def tensor(self, name: str) -> Tensor:
        """The stored tensor `name`, on the pages of its file: nothing is copied, and read only when it is looked at."""
        if name not in self.tensors:
            raise ValueError(
                f"{name!r} is no tensor of {self.path}; table() lists {len(self.tensors)}, such as {next(iter(self.tensors))!r}"
            )
        s = self.tensors[name]
        if s.dtype not in DTYPES:
            raise ValueError(f"{name} is stored as {s.dtype}; {', '.join(DTYPES)} can be read")
        found = self._stored(s) if s.nbytes else torch.empty(s.shape, dtype=DTYPES[s.dtype][0])
        self._note()
        return found

    # ------------------------------------------------------------------------------------------------------------ the model

    @property
    def model(self) -> nn.Module:
        """The model, in eval mode; made at the first access. Its layers are filled as they are called."""
        with self._lock:
            if self._model is None:
                self._model = self._build()
        return self._model

    @property
    def units(self) -> dict[str, int]:
        """{unit: its bytes in the files}, in the order of the model. A weight that two share is counted in both."""
        self.model  # noqa: B018 (makes it)
        return {name: unit.nbytes for name, unit in self._units.items()}

    @property
    def filled(self) -> tuple[str, ...]:
        """The units that are filled, the one used longest ago first."""
        return tuple(self._filled)

    def load(self, progress: Callable[[int, int, str], None] | None = None) -> nn.Module:
        """The model with every unit filled and its pages read. `progress(bytes so far, all bytes, unit)` is called after each.

        Afterwards it is a model like any other, which can be copied, compressed and saved.
        """
        if self.keep is not None:
            raise ValueError(f"keep={self.keep} blocks are filled at a time; load() fills all: open the bundle without keep")
        model, total, done = self.model, sum(self.units.values()), 0
        for name, unit in self._units.items():
            with self._lock:
                self._fill(unit)
                for slot in unit.slots:
                    if self._as_stored(slot):
                        self._maps.touch(slot.pieces[0].stored)
                if unit.after is not None and not any(isinstance(m, MappedExperts) for m in unit.inner):
                    unit.after.remove()
                    unit.after = None
            done += unit.nbytes
            if progress is not None:
                progress(done, total, name)
        return model

    def fill(self, layer: str) -> None:
        """Fill one unit now, without reading what is only mapped."""
        with self._lock:
            self._fill(self._unit(layer))

    def release(self, layer: str) -> None:
        """Empty a unit: its copies and tiles are freed, its pages given back. Its next call fills it again.

        A weight that it shares with a filled unit stays, and so does the model's first parameter, which `model.device` goes by (a
        norm, or the embedding of a float model). Not while a call of the model is under way.
        """
        with self._lock:
            unit = self._unit(layer)
            self._filled.pop(layer, None)
            others = {id(slot) for name in self._filled for slot in self._units[name].slots}
            for slot in unit.slots:
                if slot.filled and not slot.stays and id(slot) not in others:
                    slot.put(slot.empty)
                    slot.filled = False
                    for p in slot.pieces:
                        self._maps.advise(p.stored, mmap.MADV_DONTNEED, p.start, p.rows)
            for module in unit.inner:
                if isinstance(module, Quantized) and module not in self._mapped_inner:
                    module.forget_tiles()
            self._arm(unit)

    def _unit(self, name: str) -> _Unit:
        units = self.units
        if name not in units:
            raise ValueError(f"{name!r} is no unit of this {type(self.model).__name__}; units are {', '.join([*units][:3])} ...")
        return self._units[name]

    def _build(self) -> nn.Module:
        model, runtime = _empty(self.path, self.dtype)
        found = place(model, self.tensors)
        retie(model)  # tied codes: one empty tensor in both places
        held = [*model.parameters(), *model.buffers()]  # `found` goes by ids, which a freed tensor would leave to another
        if self.capacity is not None:
            _map_experts(model, found, self.capacity, self._maps, self.path)
        self._mapped_inner = {m.inner for m in model.modules() if isinstance(m, MappedExperts)}
        _make_unsaved(model, found)
        slots: dict[int, _Slot] = {}
        for _name, module, unit_name, is_block in _walk(model):
            for store in (module._parameters, module._buffers):
                for key, tensor in store.items():
                    if tensor is None or not tensor.is_meta or id(tensor) not in found:
                        continue
                    slot = slots.setdefault(id(tensor), _Slot(tensor, found[id(tensor)]))
                    slot.places.append((store, key))
                    if unit_name not in self._units:
                        self._units[unit_name] = _Unit(unit_name, model.get_submodule(unit_name), is_block)
                    unit = self._units[unit_name]
                    if slot not in unit.slots:
                        unit.slots.append(slot)
                    if module not in unit.holders:
                        unit.holders.append(module)
        del held
        if runtime:
            from edgelab.runtime_steps import restore

            restore(model, runtime)
        for unit in self._units.values():
            self._arm(unit)
        model.eval()
        first = next(model.parameters(), None)  # whoever asks for model.device is told that of this one: it stays
        for slot in slots.values():
            if slot.empty is first:
                self._fill_slot(slot)
                slot.stays = True
        return model

    def _arm(self, unit: _Unit) -> None:
        """Have the unit filled by its next call, or by that of a module in it which holds a weight (whichever a model calls)."""
        if not unit.before:
            callers = {id(m): m for m in (unit.root, *unit.holders)}
            unit.before = [m.register_forward_pre_hook(partial(self._before, unit), prepend=True) for m in callers.values()]
        if unit.after is None:
            unit.after = unit.root.register_forward_hook(partial(self._after, unit))

    def _before(self, unit: _Unit, _module, _inputs) -> None:
        with self._lock:
            if unit.is_block and self.keep is not None and unit.name not in self._filled:
                for name in [n for n in self._filled if self._units[n].is_block][: -self.keep + 1 or None]:
                    self.release(name)
            self._fill(unit)
            if self.prefetch:
                names = [*self._units]
                following = names[(names.index(unit.name) + 1) % len(names)]
                if following not in self._filled:
                    for slot in self._units[following].slots:
                        for p in slot.pieces:
                            self._maps.advise(p.stored, mmap.MADV_WILLNEED, p.start, p.rows)

    def _after(self, unit: _Unit, _module, _inputs, _output) -> None:
        """Give back the pages of codes that the kernels now hold as tiles, and those of experts that were copied into their slots."""
        with self._lock:
            stays = self.keep is not None
            for module in unit.inner:
                if isinstance(module, MappedExperts):
                    stays = True
                    if module.misses != unit.misses:
                        for slices in module.sources.values():
                            for p in {p.stored.name: p for s in slices for p in s.pieces}.values():
                                self._maps.advise(p.stored, mmap.MADV_DONTNEED)
                elif isinstance(module, Quantized) and module._views:
                    held = [module._stored[name] for name, _ in module._views]
                    codes = {id(module._buffers[b]) for s in held for b in (s.packed, s.scales)}
                    for slot in unit.slots:
                        if slot.filled and any(id(store[key]) in codes for store, key in slot.places):
                            for p in slot.pieces:
                                self._maps.advise(p.stored, mmap.MADV_DONTNEED, p.start, p.rows)
            unit.misses = sum(m.misses for m in unit.inner if isinstance(m, MappedExperts))
            if not stays and unit.after is not None:
                unit.after.remove()
                unit.after = None

    def _fill(self, unit: _Unit) -> None:
        if unit.name in self._filled:
            self._filled.move_to_end(unit.name)
            return
        for slot in unit.slots:
            if not slot.filled:
                self._fill_slot(slot)
        self._filled[unit.name] = None
        for handle in unit.before if self.keep is None and not self.prefetch else ():
            handle.remove()
        if self.keep is None and not self.prefetch:
            unit.before = []

    def _fill_slot(self, slot: _Slot) -> None:
        tensor = self._read(slot)
        if isinstance(slot.empty, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=slot.empty.requires_grad)
        slot.put(tensor)
        slot.filled = True
        self._note(tensor)

    def _note(self, tensor: Tensor | None = None) -> None:
        if self.first_weight_s is None:
            if tensor is not None and tensor.numel():
                tensor.detach().reshape(-1)[0].item()  # its page is read
            self.first_weight_s = perf_counter() - self._start

    def _as_stored(self, slot: _Slot) -> bool:
        """Whether the model can compute on the file's own pages."""
        first, dtype = slot.pieces[0], slot.empty.dtype
        return (
            len(slot.pieces) == 1
            and DTYPES[first.stored.dtype][0] == dtype
            and first.stored.begin % dtype.itemsize == 0  # files that others wrote; NumPy and numba want it
            and first.rows == first.stored.rows
            and slot.empty.numel() > 0
        )

    def _stored(self, s: Stored) -> Tensor:
        return self._maps.rows(s, 0, s.rows).view(s.shape)

    @torch.no_grad()
    def _read(self, slot: _Slot) -> Tensor:
        if self._as_stored(slot):
            return self._stored(slot.pieces[0].stored).view(slot.empty.shape)
        whole = torch.empty(slot.empty.shape, dtype=slot.empty.dtype, device="cpu")
        if not whole.numel():
            return whole
        rows = whole.view(-1, whole.shape[-1] if whole.ndim else 1)
        for p in slot.pieces:
            step = max(1, _ROWS // max(p.stored.width, 1))
            for at in range(0, p.rows, step):
                some = min(step, p.rows - at)
                rows[p.first + at : p.first + at + some] = self._maps.rows(p.stored, p.start + at, some)
                self._maps.advise(p.stored, mmap.MADV_DONTNEED, p.start + at, some)
        return whole


def lazy_load(path: str | Path, **settings) -> nn.Module:
    """The model of a bundle or checkpoint in `path`, whose layers are filled as they are called; settings as of `LazyBundle`."""
    return LazyBundle(path, **settings).model


def _headers(folder: Path) -> dict[str, Stored]:
    """`stored_in`, and every entry of the headers makes sense: its bytes are those of its shape, inside the file, in one chunk only."""
    try:
        found = stored_in(folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a safetensors header in {folder} lacks dtype, shape or data_offsets ({error!r}); copy it again") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        listed = json.loads(index.read_text())["weight_map"]
        for name, file in listed.items():
            if name not in found or found[name].file.name != file:
                where = f"in {found[name].file.name}" if name in found else "in none of the chunks"
                raise ValueError(f"{index} says that {name} is in {file}, and it is {where}; copy the bundle again")
        unlisted = sorted(set(found) - set(listed))
        if unlisted:
            raise ValueError(f"{found[unlisted[0]].file} holds {unlisted[0]}, which {index.name} does not list; copy the bundle again")
    ends: dict[Path, int] = {}
    for s in sorted(found.values(), key=lambda s: (str(s.file), s.begin, s.nbytes)):
        if not all(isinstance(n, int) and n >= 0 for n in s.shape):
            raise ValueError(f"{s.file}: {s.name} has the shape {s.shape}, which is none; copy it again")
        if s.dtype in DTYPES and s.nbytes != prod(s.shape) * np.dtype(DTYPES[s.dtype][1]).itemsize:
            raise ValueError(f"{s.file}: {s.name} {s.dtype} {s.shape} has {s.nbytes:,} bytes by its header; copy it again")
        if s.file not in ends:
            with s.file.open("rb") as f:
                ends[s.file] = 8 + int.from_bytes(f.read(8), "little")
        if s.begin != ends[s.file] or s.nbytes < 0:
            raise ValueError(f"{s.file}: the bytes of {s.name} begin at {s.begin:,}, those before end at {ends[s.file]:,}; copy it again")
        ends[s.file] += s.nbytes
    return found


def _empty(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, tuple]:
    """(the model on the meta device, with the layers of its quantization_config, the run-time steps it computes by)."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    settings = dict(getattr(config, "quantization_config", None) or {})
    runtime: tuple = ()
    with torch.device("meta"):
        model = architecture(config, str(folder))._from_config(config, dtype=dtype)
        if settings:
            if settings.get("quant_method") != "edgelab":
                raise ValueError(f"{folder} is quantized by {settings.get('quant_method')!r}; float checkpoints and bundles can be mapped")
            from edgelab.hf import EdgeLabConfig, EdgeLabQuantizer

            quantization = EdgeLabConfig(**settings)
            quantizer = EdgeLabQuantizer(quantization, pre_quantized=True)
            quantizer.validate_environment()
            quantizer._process_model_before_weight_loading(model)
            runtime = quantization.runtime
    _keep_wide(model, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model, runtime


def _keep_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """What the architecture wants in float32 whatever is asked for (DeepSeek-V3's bias of the router), as loading reads it."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    patterns, by_group, _ = build_glob_alternation([*plan])
    for module_name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                match = None if tensor is None or not tensor.is_floating_point() else patterns.search(f"{module_name}.{name}")
                if match and name not in module._non_persistent_buffers_set:
                    wide = tensor.detach().to(plan[by_group[match.lastgroup]])
                    store[name] = nn.Parameter(wide, tensor.requires_grad) if store is module._parameters else wide


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """(name, module, its unit, whether that is a block) of each module of `model`."""
    blocks: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parent = name.rpartition(".")[0]
        if name and parent in blocks:
            blocks[name] = blocks[parent]
        elif name and isinstance(model.get_submodule(parent), nn.ModuleList):
            blocks[name] = name
        yield name, module, blocks.get(name, name), name in blocks


def _map_experts(model: nn.Module, found: dict[int, list[Piece]], capacity: int, maps: Maps, folder: Path) -> None:
    """Put `MappedExperts` in the place of each stack of experts, as `offload` does."""
    if any(isinstance(m, QExpertsMixed) for m in model.modules()):
        raise ValueError(f"capacity={capacity}: {folder} has experts in several schemes, which have no slots in common; use capacity=None")
    stacks = {name: m for name, m in model.named_modules() if _is_stack(m)}
    if not stacks:
        raise ValueError(f"capacity={capacity}: {folder} is a {type(model).__name__} without fused experts; use capacity=None")
    for name, module in stacks.items():
        router = next(m for m in model.get_submodule(name.rpartition(".")[0]).modules() if hasattr(m, "top_k"))
        if not router.top_k <= capacity <= module.num_experts:
            raise ValueError(
                f"capacity={capacity} of {name} must be in {router.top_k} (experts of a token) .. {module.num_experts} (all of them)"
            )
        _put(model, name, MappedExperts(*_slots(module, found, capacity), maps, capacity))


def _make_unsaved(model: nn.Module, found: dict[int, list[Piece]]) -> None:
    """Make what no file holds (rotary frequencies): it is small, and computed from the config."""
    for module in model.modules():
        missing = [name for name, b in module._buffers.items() if b is not None and b.is_meta and id(b) not in found]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)


# -------------------------------------------------------------------------------------------------------------- chunks


def rechunk(bundle: str | Path, out: str | Path, max_chunk_bytes: int) -> Path:
    """The path of a bundle with the same weights in chunks of at most `max_chunk_bytes`, written whole or not at all.

    `bundle` is verified first. The weights of a chunk begin at a multiple of 64 bytes (its header is filled up with blanks, as the
    format allows) and those that end on one come first: on such addresses torch computes what it does on its own memory. One
    weight is in RAM at a time. Raises what `verify_bundle` does, FileExistsError when `out` holds something else than a bundle.
    """
    bundle, out = Path(bundle), Path(out)
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is no bundle: it is not replaced; choose another directory")
    manifest, tensors = verify_bundle(bundle), _headers(bundle)
    chunks = chunked({name: s.nbytes + _ALIGN for name, s in tensors.items()}, max_chunk_bytes)
    old = {s.file.name for s in tensors.values()} | {"model.safetensors.index.json"}
    with whole_or_nothing(out, ours=MANIFEST) as (tmp,):
        tmp.mkdir()
        for name in manifest["files"]:
            if name not in old:
                (tmp / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / name, tmp / name)
        for file, names in chunks.items():
            _write_chunk(tmp / file, [tensors[n] for n in sorted(names, key=lambda n: tensors[n].nbytes % _ALIGN != 0)])
        write_index(tmp, chunks, sum(s.nbytes for s in tensors.values()))
        coverage = Coverage.from_dict(manifest["coverage"]).with_file_bytes(sum((tmp / f).stat().st_size for f in chunks))
        files = sorted(f.relative_to(tmp).as_posix() for f in tmp.rglob("*") if f.is_file())
        manifest["coverage"] = coverage.to_dict()
        manifest["files"] = {name: {"bytes": (tmp / name).stat().st_size, "sha256": _sha256(tmp / name)} for name in files}
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return out


def _write_chunk(file: Path, tensors: list[Stored]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for s in tensors:
        header[s.name] = {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for s in tensors:
            with s.file.open("rb") as source:
                source.seek(s.begin)
                left = s.nbytes
                while left:
                    block = source.read(min(left, _ROWS))
                    if not block:
                        raise ValueError(f"{s.file} ended inside {s.name}: it was changed while it was read")
                    f.write(block)
                    left -= len(block)
