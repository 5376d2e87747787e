"""A program for `kernels/decode.py` while it is written: operations in order, the buffers between them, constants.

Operations name *places* in buffers. A buffer's life is from the first operation that names it to the last; when the program is
finished, `memory_plan.place` gives each its address and every operation's plan is filled in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from edgelab.kernels import decode, matmul, simd
from edgelab.kernels.decode import DENSE, RECORD, WORDS
from edgelab.kernels.pack import Tiles, aligned
from edgelab.kernels.pool import parts_of
from edgelab.memory_plan import Buffer, MemoryPlan, place
from edgelab.scheme import PerGroup
from edgelab.tile_store import TileStore

ROWS_SHARED = 8  # rows from which on threads share what is not a product of weights


@dataclass(frozen=True)
class Settings:
    """What the program is assembled for: see `edgelab.runtime.Runtime.open`."""

    context: int
    slots: int
    chunk: int
    integer: bool
    half: bool
    threads: int
    reuse: bool

    @property
    def rows(self) -> int:
        """The most rows of a step."""
        return max(self.chunk, self.slots)


@dataclass
class Held:
    """A buffer while the program is written: its size, its life so far; `address` once it has a place."""

    name: str
    nbytes: int
    first: int = -1
    last: int = -1
    address: int = 0


@dataclass
class Place:
    """A place in a buffer, `offset` bytes behind its beginning."""

    held: Held
    offset: int = 0


@dataclass
class Feed:
    """What computes and rounds the rows that a product reads: `job` of the code that stands for 0, and its first words."""

    job: Callable[[int], int]
    words: list


@dataclass
class Op:
    function: int
    threads_from: int
    words: Callable[[np.ndarray], None]
    plan: int  # its row


@dataclass
class Program:
    """What `assemble` returns: two programs over one record, and everything that they point to."""

    body: np.ndarray  # int64 [operations, 3]: from tokens to the last hidden states
    head: np.ndarray  # from the wanted rows of those to logits
    body_rows: np.ndarray  # int64: addresses that want the number of rows
    head_rows: np.ndarray
    record: np.ndarray
    logits: np.ndarray  # float32 [most wanted, vocabulary]
    wanted: int
    parts: int
    plan: MemoryPlan
    top_k: np.ndarray  # int64 [1], read by every layer of experts
    gates: list[np.ndarray]  # plans of the gates, whose word 3 is k
    experts: int
    most_k: int
    vocabulary: int
    layers: int
    kept: list = field(default_factory=list)  # arrays that must live as long as their addresses


class Builder:
    """Collects operations. `record`, `plans`: what the jobs point to; `store` counts the weights."""

    def __init__(self, settings: Settings, store: TileStore, operations: int) -> None:
        self.settings, self.store = settings, store
        self.parts = parts_of(settings.threads - 1)
        self.record = aligned((RECORD,), np.int64)
        self.plans = aligned((operations, WORDS), np.int64)
        self.ops: list[Op] = []
        self.buffers: list[Held] = []
        self.rows_of: list[int] = []
        self.kept: list = [self.plans, self.record]
        self.used = 0
        self.rows = settings.rows

    # ------------------------------------------------------------------------------------------------ buffers, constants
    def floats(self, name: str, width: int, rows: int | None = None) -> Place:
        """A buffer float32 [rows, width]; some floats more, for vectors that are stored whole."""
        return self.bytes(name, 4 * width * (self.rows if rows is None else rows) + 64)

    def bytes(self, name: str, nbytes: int) -> Place:
        held = Held(name, nbytes)
        self.buffers.append(held)
        return Place(held)

    def keep(self, array: np.ndarray) -> int:
        """The address of a constant."""
        self.kept.append(array)
        return array.ctypes.data

    def number(self, value: float) -> int:
        return self.keep(np.array([value], np.float32))

    def floats_of(self, tensor: torch.Tensor) -> int:
        return self.keep(np.array(tensor.detach().float().numpy().reshape(-1)))

    # -------------------------------------------------------------------------------------------------------- operations
    def op(self, function: int, words: Iterable, threads_from: int = ROWS_SHARED) -> int:
        """Append a job. `words`: the plan from word 1 on; a place stands for its address. Returns the row of the plan."""
        words = list(words)
        row = self.new_plan()
        self.touch(*words)
        self.ops.append(Op(function, threads_from, self.written(words), row))
        return row

    def written(self, words: list) -> Callable[[np.ndarray], None]:
        """What fills a plan in: the record of now, and the addresses that the words' places will have."""
        record = self.record.ctypes.data

        def write(p: np.ndarray) -> None:
            p[0] = record
            for i, w in enumerate(words):
                p[1 + i] = self.address(w)

        return write

    def new_plan(self) -> int:
        row = self.used
        self.used += 1
        return row

    def touch(self, *places) -> None:
        for w in places:
            if isinstance(w, Place):
                here = len(self.ops)
                w.held.first = here if w.held.first < 0 else w.held.first
                w.held.last = here

    def address(self, w) -> int:
        return w.held.address + w.offset if isinstance(w, Place) else int(w)

    def plan_address(self, row: int) -> int:
        return self.plans[row].ctypes.data

    def rounds(self, weight) -> bool:
        """Whether the inputs of a weight (with `scheme`, `shape`, `offsets`) go in as int8 and nothing else of them is needed."""
        size = weight.scheme.granularity.size if isinstance(weight.scheme.granularity, PerGroup) else weight.shape[-1]
        return self.settings.integer and weight.scheme.affine and size <= matmul.LONGEST_GROUP and weight.offsets is None

    def product(
        self,
        tiles: Tiles,
        x: "Place | Feed",
        y: Place,
        *,
        slots: int | None = None,
        offsets: Place | None = None,
        gather: Place | None = None,
    ) -> int:
        """y = x W^T by the kernels of `matmul.py`. With `offsets` for each expert its rows; their number is somebody else's to set.

        A `Feed` for x: a job that computes its rows and rounds them on the spot (where `rounds` says so).
        """
        slots = self.rows if slots is None else slots
        integer = self.settings.integer and tiles.linear and tiles.group <= matmul.LONGEST_GROUP
        sizes, nbytes = matmul.numbers(tiles, slots, integer, gather is not None, self.parts)
        prepare, compute = matmul.jobs_of(tiles, integer, sizes)
        fed = isinstance(x, Feed)
        scratch = self.bytes("scratch", nbytes)
        row = self.new_plan()
        active = 1 if offsets is None else min(tiles.codes.shape[0], 4)
        ns = matmul.expected_ns(tiles, active, active, integer)
        enough = 1 if ns >= matmul.PARALLEL_FROM_NS else max(2, int(matmul.PARALLEL_FROM_NS / max(ns, 1)))
        if offsets is None:
            both = np.zeros(2, np.int64)
            offsets_at: Place | int = self.keep(both)
            self.rows_of += [both.ctypes.data + 8, self.plan_address(row) + 8 * matmul.SLOTS]
        else:
            offsets_at = offsets

        def write(p: np.ndarray) -> None:
            out, n, group, units, ldx, at_sx, at_start, at_panel, panel_stride, copied = sizes
            a = self.address(scratch)
            m = matmul
            p[m.CODES], p[m.SCALES], p[m.LEVELS] = tiles.codes.ctypes.data, tiles.scales.ctypes.data, tiles.levels.ctypes.data
            p[m.EXPERTS], p[m.TILES], p[m.UNITS], p[m.GROUPS] = *tiles.codes.shape[:3], tiles.scales.shape[2]
            p[m.GROUP], p[m.GROUP_UNITS], p[m.OUT], p[m.N] = group, units, out, n
            p[m.OFFSETS], p[m.X], p[m.Y] = self.address(offsets_at), 0 if fed else self.address(x), self.address(y)
            p[m.ROWS_OF_X] = 0 if gather is None else self.address(gather)
            p[m.XQ], p[m.LDX] = a + matmul.HEAD if copied else self.address(x), ldx
            p[m.SX], p[m.START], p[m.PANEL], p[m.PANEL_STRIDE] = a + at_sx, a + at_start, a + at_panel, panel_stride

        self.kept.append(tiles)
        if fed:
            stride = -(-4 * tiles.n // 64) * 64 + 64
            self.touch(scratch)
            zero = simd.zero_point(simd.way(), tiles.bits)
            self.op(x.job(zero), [*x.words, self.bytes("row", stride * self.parts), stride, self.plan_address(row)])
        elif prepare:
            self.touch(x, scratch, gather, offsets)
            self.ops.append(Op(prepare, matmul.QUANTIZE_SHARED, write, row))
        # rounded inputs lie in the scratch: x is not needed any more
        self.touch(*([] if integer else [x, gather]), y, scratch, offsets)
        self.ops.append(Op(compute, enough, write, row))
        return row

    def rows_at(self, head: bool = False) -> int:
        """The address of the number of rows, or of wanted rows."""
        return self.record.ctypes.data + 8 * (decode.WANTED if head else decode.ROWS)

    def add(self, x, y, n: int, head: bool = False, rows_at: int | None = None) -> None:
        self.op(decode.add_job(), [x, y, n, self.rows_at(head) if rows_at is None else rows_at])

    def laid(self, weight: np.ndarray, name: str) -> np.ndarray:
        """Float32 weights [batch, out, n] as `dense_job` reads them."""
        batch, out, n = weight.shape
        if n % 4:
            raise ValueError(f"{name}: a float weight with {n} inputs; the runtime takes multiples of 4")
        panels = -(-out // DENSE)
        laid = aligned((batch, panels, n, DENSE), np.float32)
        padded = np.zeros((batch, panels * DENSE, n), np.float32)
        padded[:, :out] = weight
        laid[:] = padded.reshape(batch, panels, DENSE, n).swapaxes(2, 3)
        self.store.count(laid)
        self.kept.append(laid)
        return laid

    def dense(self, weight: np.ndarray, x, ldx: int, x_step: int, y, ldy: int, y_step: int, name: str, head: bool = False) -> None:
        """y[t, b] = W_b x[t, b] for float32 weights [batch, out, n]."""
        laid, (batch, out, n) = self.laid(weight, name), weight.shape
        words = [x, ldx, x_step, laid.ctypes.data, batch, out, n, y, ldy, y_step, self.rows_at(head)]
        self.op(decode.dense_job(), words, 1 if laid.nbytes > 1 << 20 else ROWS_SHARED)

    def dense_experts(self, weight: np.ndarray, x: Place, y: Place, offsets: Place, name: str) -> None:
        """y = W_e x for the rows of each expert e, which lie side by side."""
        laid, (experts, out, n) = self.laid(weight, name), weight.shape
        words = [x, laid.ctypes.data, experts, out, n, y, offsets]
        self.op(decode.dense_experts_job(), words, 1 if laid.nbytes > 1 << 20 else ROWS_SHARED)

    def finish(self) -> tuple[int, list[Buffer]]:
        """Give the buffers their places and write all plans."""
        lives = [Buffer(b.name, b.nbytes, b.first, b.last) for b in self.buffers if b.first >= 0]
        used = [b for b in self.buffers if b.first >= 0]
        if self.settings.reuse:
            offsets, total = place(lives)
        else:
            sizes = [-(-b.nbytes // 64) * 64 for b in lives]
            offsets, total = np.cumsum([0, *sizes[:-1]]).tolist() if sizes else [], sum(sizes)
        arena = aligned((max(total, 64),))
        self.kept.append(arena)
        for b, at in zip(used, offsets, strict=True):
            b.address = arena.ctypes.data + at
        for op in self.ops:
            op.words(self.plans[op.plan])
        return total, lives

    def table(self, first: int, last: int) -> np.ndarray:
        return np.array([(op.function, self.plan_address(op.plan), op.threads_from) for op in self.ops[first:last]], np.int64).reshape(
            -1, 3
        )
