"""`compress_checkpoint`: a checkpoint on disk becomes a bundle without ever being a model in memory.

For methods that need no data and take each row by itself, nothing but shapes is needed to know the whole result: which tensors,
in which chunk file, at which byte. So the plan is made first, with the model on the meta device, and then blocks of some rows go
from file to file: read, round and pack, write to where they belong. Blocks are independent; as many threads as there are cores take
them in turn. What comes out is, byte for byte, what `save_bundle(compress(load(folder), recipe).model, ...)` writes.

Memory is that of the threads' buffers, a few MB each, beside the libraries'. Nothing is mapped: mapped pages would count as ours.
A method in torch (all but RTN at "int" schemes), a weight with one scale (`PerTensor`) and one that the model stores transposed take
more at a time, see `_Weight.blocks`.

A kill at any moment costs at most the chunks that were not whole. The work folder `.<out>.stream` beside `out` holds

    plan.json       what is being done: the digest of recipe, source files and layout; with another digest the work starts anew
    journal.jsonl   a line with the sha256 of each whole chunk, written before the chunk gets its name
    *.part          chunks that are being written
    bundle/         whole chunks; in the end all files, and then the folder is renamed to `out`

Every chunk is flushed to the disk before it is renamed, and hashed from the file, not from memory.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

import edgelab
from edgelab.bundle import FORMAT, MANIFEST, chunked, put, write_config, write_index, write_manifest
from edgelab.checkpoint import DTYPES, FLOATS, Piece, meta_model, place, read_rows, stored_in, values
from edgelab.compress import audit, plan
from edgelab.hf import adopt
from edgelab.kernels.quantize import NO_SCALE, count_broken, largest_of_rows, quantize_rows, scale_of
from edgelab.layers import Blank
from edgelab.methods.coverage import Coverage, CoverageRow
from edgelab.methods.hqq import hqq
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import Weight, family_of, stored_tensors, swap, weights
from edgelab.qtensor import QTensor
from edgelab.recipe import Hqq, Method, Quantize, Recipe, Rtn
from edgelab.scheme import PerTensor, QuantScheme

BLOCK_BYTES = 2 * 2**20  # of a source that a thread takes at a time: in cache, and long beside the calls around it
AHEAD = 32  # blocks that the kernel is told of before they are read: pieces of experts do not lie in the order in which they are stacked
_HASH_BYTES = 4 * 2**20
_SPARE = 64 * 2**20  # bytes of disk that are left free besides what is predicted
_ORDER = ("I64", "F32", "I32", "BF16", "F16", "U8", "BOOL")  # wider first: how safetensors lays out a file, and by name among equals
_FORM = {"BF16": 0, "F16": 1, "F32": 2}  # as kernels/quantize.py calls them


def compress_checkpoint(
    folder: str | Path,
    out_dir: str | Path,
    recipe: Recipe,
    *,
    tokenizer=None,
    max_chunk_bytes: int = 256 * 2**20,
    threads: int | None = None,
    progress: bool = True,
) -> Path:
    """The path of the bundle, made from the checkpoint in `folder` block by block; see the module.

    Called again after it was interrupted, with the same arguments, it goes on where it stopped. `tokenizer` may be None.
    A bundle that lies at `out_dir` is replaced when the new one is whole. `threads`: None, as many as there are cores.

    Raises before any work: what `compress` raises for a recipe that does not fit; ValueError for a method that needs calibration
    data, for tensors that have no place in the model or are missing, damaged or not in floating point; OSError when the
    disk has not the room; FileExistsError when `out_dir` holds something else, BlockingIOError when another process does the same.
    Raises later: ValueError, naming the tensor, for NaN or infinity. The work folder is removed then; after other errors, such
    as a full disk, it stays for the next call.
    """
    source, out = Path(folder), Path(out_dir)
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is no bundle: it is not replaced; choose another directory")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be 1 or more, or None for as many as there are cores")
    work = _plan(source, recipe, max_chunk_bytes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent / f".{out.name}.stream") as own:
        journal = _Journal(own, work.digest, out)
        if not journal.bundle.exists():  # killed between the last rename and the cleaning up
            return out
        _check_room(out.parent, work, journal)
        try:
            _Run(work, journal, threads or len(os.sched_getaffinity(0)), progress).go()
        except ValueError:
            journal.clear()
            raise
        _finish(work, journal, recipe, tokenizer)
        put(journal.bundle, out)
        _sync(out.parent)
    return out


# -------------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class _Place:
    """Where a stored tensor goes: bytes from `at` on in the chunk file number `chunk`."""

    chunk: int
    at: int


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight to be quantized: its pieces, and where its buffers go, in the order of `QTensor`: packed, scales, offsets."""

    name: str
    shape: tuple[int, ...]  # [out, in] or [experts, out, in], whatever way the model stores it
    pieces: list[Piece]  # rows as they are stored: [in, out] matrices if `transposed`
    transposed: bool
    scheme: QuantScheme
    step: Quantize
    places: tuple[_Place, ...]

    @property
    def by_kernel(self) -> bool:
        method = self.step.method
        return self.scheme.codebook == "int" and method.name == "rtn" and not method.mse_grid

    def blocks(self) -> Iterator["_Block"]:
        """Its rows, some at a time: BLOCK_BYTES of a stored tensor, or whole matrices where rows do not stand alone."""
        if self.transposed or isinstance(self.scheme.granularity, PerTensor):
            per = self.shape[-1] if self.transposed else self.shape[-2]  # stored rows of a matrix
            for m in range(prod(self.shape[:-2])):
                yield _Block(self, m * self.shape[-2], self.shape[-2], _cut(self.pieces, m * per, per))
            return
        for piece in self.pieces:
            step = max(1, BLOCK_BYTES // piece.stored.row_bytes)
            for r in range(0, piece.rows, step):
                count = min(step, piece.rows - r)
                yield _Block(self, piece.first + r, count, [Piece(0, piece.stored, piece.start + r, count)])


@dataclass(frozen=True, eq=False)
class _Copy:
    """A tensor that stays in floating point (or is none), stored as `dtype`; only what is a parameter must be finite."""

    name: str
    pieces: list[Piece]
    dtype: str
    parameter: bool
    places: tuple[_Place, ...]

    def blocks(self) -> Iterator["_Block"]:
        for piece in self.pieces:
            step = max(1, BLOCK_BYTES // max(piece.stored.row_bytes, 1))
            for r in range(0, piece.rows, step):
                count = min(step, piece.rows - r)
                yield _Block(self, piece.first + r, count, [Piece(0, piece.stored, piece.start + r, count)])


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows `first` .. `first + rows` of a weight or copy, and where they are read; `pieces` count from the block's first row."""

    of: _Weight | _Copy
    first: int
    rows: int
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return sum(p.rows * p.stored.row_bytes for p in self.pieces)


@dataclass(eq=False)
class _Chunk:
    """A file of the result: its header and size, and how many blocks still write to it."""

    name: str
    header: bytes
    size: int
    left: int = 0
    fd: int = -1
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False)
class _Work:
    """All that is to be done, known beforehand."""

    model: nn.Module
    jobs: list[_Weight | _Copy]
    chunks: list[_Chunk]
    files: dict[str, list[str]]  # chunk file -> the tensors in it
    total_size: int
    coverage: Coverage
    digest: str


def _plan(folder: Path, recipe: Recipe, max_chunk_bytes: int) -> _Work:
    stored = stored_in(folder)
    for step in recipe.steps:
        _check_step(step)
    model = meta_model(folder)
    pieces = place(model, stored)
    schemes = {name: (scheme, step) for step, by in zip(recipe.steps, plan(model, recipe), strict=True) for name, scheme in by.items()}
    if any("#" in name for name in schemes):
        raise ValueError("streaming mode gives a stack of experts one scheme; use compress for rules of single experts (name#0)")
    chosen = {w.name: w for w in weights(model) if w.name in schemes}
    before = model.state_dict(keep_vars=True)  # kept to the end: `pieces` goes by the identity of what is alive
    own = {w.name: before[w.parameter_name] for w in chosen.values()}
    with torch.device("meta"):
        swap(model, {w.name: Blank(w.shape, schemes[w.name][0]) for w in chosen.values()})
    if recipe.steps:
        adopt(model)

    layout = family_of(model).experts
    for w in chosen.values():
        if w.kind == "experts" and layout.biased:  # the new module's biases are new parameters of the same values
            bias = getattr(model.get_submodule(w.module_name), "gate_up_bias" if w.parameter == layout.gate_up else "down_bias")
            pieces[id(bias)] = pieces[id(before[f"{w.parameter_name}_bias"])]
    buffers = {f"{w.module_name}.{b}": (w.name, i) for w in chosen.values() for i, b in enumerate(_buffers(model, w))}
    tensors, parameters = stored_tensors(model), {name for name, _ in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    kept = {name: pieces[id(state[name])] for name in tensors if name not in buffers}
    dtypes = {n: _narrowest(kept[n]) if n in kept else "U8" if t.dtype == torch.uint8 else "F16" for n, t in tensors.items()}
    sizes = {n: t.numel() * DTYPES[dtypes[n]][0].itemsize for n, t in tensors.items()}
    files = chunked(sizes, max_chunk_bytes)
    chunks, where = [], {}
    for file, names in files.items():
        header, offsets, size = _layout({n: (dtypes[n], tuple(tensors[n].shape), sizes[n]) for n in names})
        where |= {n: _Place(len(chunks), offset) for n, offset in offsets.items()}
        chunks.append(_Chunk(file, header, size))

    places: dict[str, dict[int, _Place]] = {}
    for buffer, (name, i) in buffers.items():
        places.setdefault(name, {})[i] = where[buffer]
    jobs: list[_Weight | _Copy] = []
    for name, w in chosen.items():
        transposed = tuple(own[name].shape) != w.shape or w.tensor.stride(-1) != 1
        ordered = tuple(places[name][i] for i in sorted(places[name]))
        jobs.append(_Weight(name, w.shape, pieces[id(own[name])], transposed, *schemes[name], ordered))
    jobs += [_Copy(n, p, dtypes[n], n in parameters, (where[n],)) for n, p in kept.items()]
    jobs.sort(key=lambda job: job.places[0].chunk)

    def as_stored(row: CoverageRow) -> CoverageRow:
        if row.touched:
            return row
        dtype = str(DTYPES[dtypes[row.name]][0]).removeprefix("torch.")
        return replace(row, scheme=dtype, predicted_bytes=sizes[row.name])

    coverage = Coverage(tuple(map(as_stored, audit(model))), sum(c.size for c in chunks))
    for step in recipe.steps:
        coverage.check(step.min_expert_share)
    what = [edgelab.__version__, FORMAT, recipe.to_json(), max_chunk_bytes, (folder / "config.json").read_text()]
    what += [(c.name, c.size, c.header) for c in chunks]
    for file in sorted({s.file for s in stored.values()}):
        status = file.stat()
        what.append((file.name, status.st_size, status.st_mtime_ns, _header_hash(file)))
    return _Work(model, jobs, chunks, files, sum(sizes.values()), coverage, hashlib.sha256(repr(what).encode()).hexdigest())


def _check_step(step) -> None:
    match step:
        case Quantize(activations=None, method=Rtn() | Hqq()) if step.data_free:
            return
        case Quantize(activations=None):
            what = f"the method {step.method.name!r} needs calibration data"
        case Quantize():
            what = f"activations={step.activations} need a model"
        case _:
            what = f"a {type(step).__name__} step needs a model"
    raise ValueError(f"{what}: it can't be done block by block; load the model and use edgelab.compress")


def _buffers(model: nn.Module, w: Weight) -> tuple[str, ...]:
    """The buffers of the layer that stands where `w` was, in which its codes, scales and offsets lie."""
    layer, family = model.get_submodule(w.module_name), family_of(model)
    parameter = w.parameter
    if w.kind == "experts":
        parameter = "gate_up_proj" if w.parameter == family.experts.gate_up else "down_proj"
    return layer._stored[parameter].buffers


def _narrowest(pieces: list[Piece]) -> str:
    """The dtype that `model.stored_tensors` would store these values in: nothing may be lost."""
    stored = {p.stored.dtype for p in pieces}
    if stored == {"BF16"} or not stored <= set(FLOATS):
        return pieces[0].stored.dtype
    fits = ["BF16", "F16"]
    for p in pieces:
        for block in values(p.stored, p.start, p.rows):
            wide = block.float()
            fits = [d for d in fits if torch.equal(wide.to(DTYPES[d][0]).float(), wide)]
            if not fits:
                return "F32"
    return fits[0]


def _layout(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, int], int]:
    """Header, where each tensor begins in the file, and the file's size, of tensors name: (dtype, shape, bytes); as safetensors does."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at, begins = 0, {}
    for name, (dtype, shape, size) in sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1][0]), item[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size)}
        begins[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: first + b for n, b in begins.items()}, first + at


def _header_hash(file: Path) -> str:
    with file.open("rb") as f:
        length = f.read(8)
        return hashlib.sha256(length + f.read(int.from_bytes(length, "little"))).hexdigest()


def _cut(pieces: list[Piece], first: int, rows: int) -> list[Piece]:
    """The parts of `pieces` that lie in the rows from `first` on, counted from there."""
    found = []
    for p in pieces:
        begin, end = max(p.first, first), min(p.first + p.rows, first + rows)
        if begin < end:
            found.append(Piece(begin - first, p.stored, p.start + begin - p.first, end - begin))
    return found


# ----------------------------------------------------------------------------------------------------------------- journal


class _Journal:
    """What is done already, on disk: see the module."""

    def __init__(self, folder: Path, digest: str, out: Path) -> None:
        self.folder, self.bundle = folder, folder / "bundle"
        self.hashes = self._read()
        plan = folder / "plan.json"
        found = json.loads(plan.read_text())["digest"] if plan.is_file() else None
        if found != digest or not (self.bundle.is_dir() or self._became(out)):  # another recipe, another source, nothing yet
            self.clear()
            part = folder / "plan.part"
            part.write_text(json.dumps({"digest": digest}) + "\n")
            _sync(part)
            part.rename(plan)
            self.bundle.mkdir()
            _sync(folder)

    def _read(self) -> dict[str, str]:
        """{file: sha256} of the journal; a line that was cut short by a kill is cut off."""
        file = self.folder / "journal.jsonl"
        text = file.read_text() if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(file, len(whole.encode()))
        return dict(json.loads(line) for line in whole.splitlines())

    def note(self, name: str, digest: str) -> None:
        with (self.folder / "journal.jsonl").open("a") as f:
            f.write(json.dumps([name, digest]) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.hashes[name] = digest

    def has(self, chunk: _Chunk) -> bool:
        """Whether the chunk is whole. It has its name only when it and its line in the journal are on the disk."""
        file = self.bundle / chunk.name
        return chunk.name in self.hashes and file.is_file() and file.stat().st_size == chunk.size

    def _became(self, out: Path) -> bool:
        """Whether `out` is what this work made, and only the cleaning up is missing."""
        manifest = out / MANIFEST
        return manifest.is_file() and self.hashes.get(MANIFEST) == hashlib.sha256(manifest.read_bytes()).hexdigest()

    def clear(self) -> None:
        self.hashes.clear()
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


_LOCK = "lock"


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The work folder, made if need be and this process's alone; removed at the end, unless work is left in it."""
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process works in {folder}: wait until it has ended") from error
        try:
            yield folder
        except BaseException:
            if {entry.name for entry in folder.iterdir()} <= {_LOCK}:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Have the file or folder on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_room(folder: Path, work: _Work, journal: _Journal) -> None:
    needed = sum(c.size for c in work.chunks if not journal.has(c)) + _SPARE
    parts = sum(f.stat().st_blocks * 512 for f in journal.folder.glob("*.part"))
    free = shutil.disk_usage(folder).free + parts
    if needed > free:
        raise OSError(f"the bundle takes {needed:,} more bytes, the disk of {folder} has {free:,} free: make room, or choose another place")


# --------------------------------------------------------------------------------------------------------------------- run


class _Run:
    """The blocks that are still to do, the threads that do them, and what they find."""

    def __init__(self, work: _Work, journal: _Journal, threads: int, progress: bool) -> None:
        self._work, self._journal, self._threads, self._progress = work, journal, threads, progress
        self._lock, self._failed = threading.Lock(), False
        self._small: dict[str, list[float]] = {}  # weight -> groups too small for float16 scales, the largest weight of them

    def go(self) -> None:
        for part in self._journal.folder.glob("*.part"):
            part.unlink()
        open_chunks = {i for i, c in enumerate(self._work.chunks) if not self._journal.has(c)}
        jobs = [job for job in self._work.jobs if any(p.chunk in open_chunks for p in job.places)]
        blocks = [b for job in jobs for b in job.blocks()]
        for b in blocks:
            for i in {p.chunk for p in b.of.places} & open_chunks:
                self._work.chunks[i].left += 1
        self._open = open_chunks
        self._todo = enumerate(blocks)
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the threads are ours; each would start as many again
        bar = tqdm(total=sum(b.nbytes for b in blocks), desc="compress", unit="B", unit_scale=True, disable=not self._progress)
        try:
            with bar, ThreadPoolExecutor(1) as self._closer, ThreadPoolExecutor(self._threads) as workers:
                closing = [self._closer.submit(self._close, self._work.chunks[i]) for i in open_chunks if not self._work.chunks[i].left]
                running = [workers.submit(self._take, blocks, bar) for _ in range(self._threads)]
                try:
                    closing += [closed for worker in running for closed in worker.result()]
                    for closed in closing:
                        closed.result()
                except BaseException:
                    self._failed = True  # the others stop at their next block
                    raise
        finally:
            torch.set_num_threads(torch_threads)
            for chunk in self._work.chunks:
                if chunk.fd >= 0:
                    os.close(chunk.fd)
        for name, (count, largest) in self._small.items():
            warnings.warn(
                f"{name}: {int(count)} groups are so small (largest weight {largest:.3g}) that float16 can't hold their scale: "
                "they lose precision or become zero; rescale the weight or keep it with a rule (pattern, None)",
                stacklevel=3,
            )

    def _take(self, blocks: list[_Block], bar) -> list:
        """What a thread does: block after block, until none is left or one has failed."""
        files, memory, closing = _Files(), _Memory(), []
        try:
            while not self._failed:
                with self._lock:
                    i, block = next(self._todo, (0, None))
                if block is None:
                    break
                for coming in blocks[i + AHEAD : i + AHEAD + 1] if i else blocks[1 : 1 + AHEAD]:
                    files.expect(coming)
                outputs = self._copy(block, files, memory) if isinstance(block.of, _Copy) else self._quantize(block, files, memory)
                for place, at, data in outputs:
                    if place.chunk in self._open:
                        self._write(self._work.chunks[place.chunk], place.at + at, data)
                with self._lock:
                    bar.update(block.nbytes)
                    for i in {p.chunk for p in block.of.places} & self._open:
                        chunk = self._work.chunks[i]
                        chunk.left -= 1
                        if not chunk.left:
                            closing.append(self._closer.submit(self._close, chunk))
        except BaseException:
            self._failed = True
            raise
        finally:
            files.close()
        return closing

    # ------------------------------------------------------------------------------------------------------ files
    def _write(self, chunk: _Chunk, at: int, data: memoryview) -> None:
        with chunk.lock:
            if chunk.fd < 0:
                self._create(chunk)
        while data:
            written = os.pwrite(chunk.fd, data, at)
            data, at = data[written:], at + written

    def _create(self, chunk: _Chunk) -> None:
        chunk.fd = os.open(self._journal.folder / f"{chunk.name}.part", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(chunk.fd, chunk.size)
        os.pwrite(chunk.fd, chunk.header, 0)

    def _close(self, chunk: _Chunk) -> None:
        """All of the chunk is written: hash it, have it on the disk, note it, and only then give it its name."""
        if self._failed:
            return
        if chunk.fd < 0:  # it holds nothing but empty tensors
            self._create(chunk)
        digest, buffer, at = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES)), 0
        while got := os.preadv(chunk.fd, [buffer], at):
            digest.update(buffer[:got])
            at += got
        os.fsync(chunk.fd)
        os.close(chunk.fd)
        chunk.fd = -1
        self._journal.note(chunk.name, digest.hexdigest())
        (self._journal.folder / f"{chunk.name}.part").rename(self._journal.bundle / chunk.name)
        _sync(self._journal.bundle)

    # ----------------------------------------------------------------------------------------------------- blocks
    def _copy(self, block: _Block, files: "_Files", memory: "_Memory") -> list[tuple[_Place, int, memoryview]]:
        copy, (piece,) = block.of, block.pieces
        s = piece.stored
        rows = memory.read(files, piece)
        if copy.parameter and s.dtype in _FORM and count_broken(rows, _FORM[s.dtype]):
            raise self._broken(block, files, memory)
        target, bits = DTYPES[copy.dtype]
        if copy.dtype != s.dtype:
            wide = torch.from_numpy(rows).view(DTYPES[s.dtype][0])
            rows = wide.to(target).contiguous().view(torch.uint8).numpy()
        return [(copy.places[0], block.first * s.width * np.dtype(bits).itemsize, _bytes(rows))]

    def _quantize(self, block: _Block, files: "_Files", memory: "_Memory") -> list[tuple[_Place, int, memoryview]]:
        w = block.of
        if not w.by_kernel:
            return self._by_torch(block, files, memory)
        scheme, n = w.scheme, w.shape[-1]
        found = np.zeros(4)
        packed = memory.array("packed", np.uint8, (block.rows, scheme.row_bytes(n)))
        if isinstance(scheme.granularity, PerTensor):
            scales = self._with_one_scale(block, packed, found, files, memory)
            scales_at = block.first // w.shape[-2] * 2
        else:
            groups = scheme.groups(n)
            scales = memory.array("scales", np.uint16, (block.rows, groups))
            for rows, first, form in self._sources(block, files, memory):
                part = slice(first, first + len(rows))
                quantize_rows(rows, form, scheme.bits, n // groups, NO_SCALE, packed[part], scales[part], found)
            scales_at = block.first * groups * 2
        if found[0]:
            raise self._broken(block, files, memory)
        if found[1]:
            raise ValueError(f"{w.name}: a weight needs a scale above float16's 65504 at {scheme.bits} bits; rescale the weight")
        if found[2]:
            with self._lock:
                count, largest = self._small.get(w.name, (0, 0.0))
                self._small[w.name] = [count + found[2], max(largest, found[3])]
        return [(w.places[0], block.first * packed.shape[1], _bytes(packed)), (w.places[1], scales_at, _bytes(scales))]

    def _by_torch(self, block: _Block, files: "_Files", memory: "_Memory") -> list[tuple[_Place, int, memoryview]]:
        w, parts = block.of, []
        for rows, _, form in self._sources(block, files, memory):
            if count_broken(rows, form):
                raise self._broken(block, files, memory)
            parts.append(torch.from_numpy(rows).view((torch.bfloat16, torch.float16, torch.float32)[form]).float())
        try:
            q = _round(torch.cat(parts), w.scheme, w.step.method, w.name)
        except ValueError as error:
            raise ValueError(f"{w.name}: {error}") from error
        arrays = [a for a in (q.packed, q.scales, q.offsets) if a is not None]
        first = block.first // w.shape[-2] if isinstance(w.scheme.granularity, PerTensor) else block.first  # scales of a matrix or a row
        starts = [block.first, *[first] * (len(arrays) - 1)]
        return [(p, at * a.shape[-1] * a.itemsize, _bytes(a)) for p, at, a in zip(w.places, starts, arrays, strict=True)]

    def _with_one_scale(self, block: _Block, packed: np.ndarray, found: np.ndarray, files: "_Files", memory: "_Memory") -> np.ndarray:
        """Fill `packed` at the one scale of the block, a whole matrix, and return that; the matrix is read twice."""
        bits, n = block.of.scheme.bits, block.of.shape[-1]
        top = NO_SCALE  # nothing yet
        for rows, _, form in self._sources(block, files, memory):
            top = largest_of_rows(rows, form, top)
        if not np.isfinite(top):
            found[0] = 1
            return np.empty(1, np.float16)
        scale = scale_of(top, bits)
        found[1] += np.isinf(scale)
        for rows, first, form in self._sources(block, files, memory):
            quantize_rows(rows, form, bits, n, np.float32(scale), packed[first : first + len(rows)], np.empty((0, 1), np.uint16), found)
        exact = abs(float(top)) / 2 ** (bits - 1)
        if np.isfinite(scale) and abs(abs(float(scale)) - exact) * 2**bits > exact:
            found[2:] = 1, abs(float(top))
        return np.array([scale])

    def _sources(self, block: _Block, files: "_Files", memory: "_Memory") -> Iterator[tuple[np.ndarray, int, int]]:
        """(rows [some, in] as bits, the first one's number in the block, their form), as the weight has them."""
        for piece in block.pieces:
            if block.of.transposed:  # a whole matrix [in, out], in one piece
                yield np.ascontiguousarray(memory.read(files, piece).T), 0, _FORM[piece.stored.dtype]
                continue
            step = max(1, BLOCK_BYTES // piece.stored.row_bytes)
            for r in range(0, piece.rows, step):
                part = Piece(piece.first + r, piece.stored, piece.start + r, min(step, piece.rows - r))
                yield memory.read(files, part), part.first, _FORM[piece.stored.dtype]

    def _broken(self, block: _Block, files: "_Files", memory: "_Memory") -> ValueError:
        """The error that names the first stored tensor of the block that holds NaN or infinity."""
        for piece in block.pieces:
            if count := count_broken(memory.read(files, piece), _FORM[piece.stored.dtype]):
                break
        s = piece.stored
        return ValueError(
            f"{block.of.name} holds {count} NaN or infinite values (tensor {s.name} of {s.file.name}, rows {piece.start} to "
            f"{piece.start + piece.rows - 1}): the checkpoint is broken; download it again or repair it"
        )


def _round(rows: torch.Tensor, scheme: QuantScheme, method: Method, name: str) -> QTensor:
    """The `QTensor` of rows [rows, in] of a weight, as `compress` makes it; neither method looks beyond a row."""
    match method:
        case Rtn():
            return round_to_nearest(rows, scheme, mse_grid=method.mse_grid, name=name)
        case Hqq():
            return hqq(rows, scheme, p=method.p, beta=method.beta, kappa=method.kappa, iterations=method.iterations, name=name)
    raise TypeError(f"{method!r} can't be done block by block")


class _Files:
    """The source files that a thread has open."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def fd(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def expect(self, block: _Block) -> None:
        """Have the kernel read the block in the background. A disk of 300 MB/s gave half of that without."""
        for piece in block.pieces if hasattr(os, "posix_fadvise") else ():
            s = piece.stored
            os.posix_fadvise(self.fd(s.file), s.begin + piece.start * s.row_bytes, piece.rows * s.row_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)


class _Memory:
    """The buffers of a thread, kept from block to block."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def array(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        size = prod(shape) * np.dtype(dtype).itemsize
        if name not in self._held or self._held[name].nbytes < size:
            self._held[name] = np.empty(size, np.uint8)
        return self._held[name][:size].view(dtype).reshape(shape)

    def read(self, files: _Files, piece: Piece) -> np.ndarray:
        """The rows of `piece` as bits, [rows, width]. Valid until the next call."""
        s = piece.stored
        rows = self.array("source", DTYPES[s.dtype][1], (piece.rows, s.width))
        read_rows(files.fd(s.file), s, piece.start, piece.rows, _bytes(rows))
        return rows


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


# ------------------------------------------------------------------------------------------------------------------ finish


def _finish(work: _Work, journal: _Journal, recipe: Recipe, tokenizer) -> None:
    """Write what else a bundle holds; each is written anew if an earlier try was interrupted here."""
    names = {c.name for c in work.chunks}
    for entry in journal.bundle.iterdir():
        if entry.name not in names:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_index(journal.bundle, work.files, work.total_size)
    write_config(work.model, journal.bundle)
    if tokenizer is not None:
        tokenizer.save_pretrained(journal.bundle)
    write_manifest(journal.bundle, work.model.config.model_type, recipe, work.coverage, hashes=journal.hashes)
    for entry in [*journal.bundle.rglob("*"), journal.bundle]:
        if entry.name not in names:
            _sync(entry)
    journal.note(MANIFEST, hashlib.sha256((journal.bundle / MANIFEST).read_bytes()).hexdigest())
