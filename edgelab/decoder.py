"""From a model to the program that `kernels/decode.py` runs: which jobs, in which order, on which addresses.

`assemble` walks a transformers model once. It lays weights out in tiles (`tile_store.py` keeps them on disk), joins products that read the same
input (q, k and v; gate and up) where their schemes agree, writes every job's plan, and gives each buffer its place
(`memory_plan.py`). After that no torch is needed: a step is one call.

Families are data (`FAMILIES`): llama, mistral, qwen2, qwen3, qwen3_moe, mixtral and deepseek_v3. What the runtime would compute
differently from transformers is refused, with the name of the setting.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgelab.kernels import decode, matmul
from edgelab.kernels.decode import BLOCK, DENSE, QUERIES, RECORD, WORDS
from edgelab.kernels.pack import ROWS, Tiles, aligned
from edgelab.kernels.pool import parts_of
from edgelab.layers import QEmbedding, QExperts, QLinear, Quantized
from edgelab.memory_plan import Buffer, MemoryPlan, bound, place
from edgelab.mixed_experts import QExpertsMixed
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup, QuantScheme
from edgelab.tile_store import TileStore


@dataclass(frozen=True)
class Family:
    """What the runtime must know of a `config.model_type` beyond the names of its modules."""

    latent: bool = False  # multi-head latent attention
    gate: str | None = None  # how a router chooses: "softmax", "deepseek"; None: there are no experts
    always_normalised: bool = False  # the chosen gates are divided by their sum, whatever the config says


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(gate="softmax"),
    "mixtral": Family(gate="softmax", always_normalised=True),
    "deepseek_v3": Family(latent=True, gate="deepseek"),
}
_ROWS_SHARED = 8  # rows from which on threads share what is not a product of weights


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
class _Held:
    """A buffer while the program is written: its size, its life so far; `address` once it has a place."""

    name: str
    nbytes: int
    first: int = -1
    last: int = -1
    address: int = 0


@dataclass
class _At:
    """A place in a buffer, `offset` bytes behind its beginning."""

    held: _Held
    offset: int = 0


@dataclass
class _Op:
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
    indices: list[np.ndarray]
    vocabulary: int
    layers: int
    kept: list = field(default_factory=list)  # arrays that must live as long as their addresses


class _Builder:
    def __init__(self, settings: Settings, store: TileStore, operations: int) -> None:
        self.settings, self.store = settings, store
        self.parts = parts_of(settings.threads - 1)
        self.record = aligned((RECORD,), np.int64)
        self.plans = aligned((operations, WORDS), np.int64)
        self.ops: list[_Op] = []
        self.buffers: list[_Held] = []
        self.rows_of: list[int] = []
        self.kept: list = [self.plans, self.record]
        self.used = 0
        self.rows = settings.rows

    # ------------------------------------------------------------------------------------------------ buffers, constants
    def floats(self, name: str, width: int, rows: int | None = None) -> _At:
        """A buffer float32 [rows, width]; some floats more, for vectors that are stored whole."""
        return self.bytes(name, 4 * width * (self.rows if rows is None else rows) + 64)

    def bytes(self, name: str, nbytes: int) -> _At:
        held = _Held(name, nbytes)
        self.buffers.append(held)
        return _At(held)

    def keep(self, array: np.ndarray) -> int:
        """The address of a constant."""
        self.kept.append(array)
        return array.ctypes.data

    def number(self, value: float) -> int:
        return self.keep(np.array([value], np.float32))

    def floats_of(self, tensor: torch.Tensor) -> int:
        return self.keep(np.array(tensor.detach().float().numpy().reshape(-1)))

    # -------------------------------------------------------------------------------------------------------- operations
    def op(self, function: int, words: Iterable, threads_from: int = _ROWS_SHARED) -> int:
        """Append a job. `words`: the plan from word 1 on; a place stands for its address. Returns the row of the plan."""
        words = list(words)
        row = self.new_plan()
        for w in words:
            self.touch(w)

        def write(p: np.ndarray) -> None:
            p[0] = self.record.ctypes.data
            for i, w in enumerate(words):
                p[1 + i] = self.address(w)

        self.ops.append(_Op(function, threads_from, write, row))
        return row

    def new_plan(self) -> int:
        row = self.used
        self.used += 1
        return row

    def touch(self, *places) -> None:
        for w in places:
            if isinstance(w, _At):
                here = len(self.ops)
                w.held.first = here if w.held.first < 0 else w.held.first
                w.held.last = here

    def address(self, w) -> int:
        return w.held.address + w.offset if isinstance(w, _At) else int(w)

    def plan_address(self, row: int) -> int:
        return self.plans[row].ctypes.data

    def product(
        self,
        tiles: Tiles,
        x: _At,
        y: _At,
        *,
        slots: int | None = None,
        offsets: _At | None = None,
        gather: _At | None = None,
    ) -> int:
        """y = x W^T by the kernels of `matmul.py`. With `offsets` for each expert its rows; their number is somebody else's to set."""
        slots = self.rows if slots is None else slots
        integer = self.settings.integer and tiles.linear and tiles.group <= matmul.LONGEST_GROUP
        sizes, nbytes = matmul.numbers(tiles, slots, integer, gather is not None, self.parts)
        prepare, compute = matmul.jobs_of(tiles, integer, sizes)
        scratch = self.bytes("scratch", nbytes)
        row = self.new_plan()
        active = 1 if offsets is None else min(tiles.codes.shape[0], 4)
        ns = matmul.expected_ns(tiles, active, active, integer)
        enough = 1 if ns >= matmul.PARALLEL_FROM_NS else max(2, int(matmul.PARALLEL_FROM_NS / max(ns, 1)))
        if offsets is None:
            both = np.zeros(2, np.int64)
            offsets_at: _At | int = self.keep(both)
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
            p[m.OFFSETS], p[m.X], p[m.Y] = self.address(offsets_at), self.address(x), self.address(y)
            p[m.ROWS_OF_X] = 0 if gather is None else self.address(gather)
            p[m.XQ], p[m.LDX] = a + matmul.HEAD if copied else self.address(x), ldx
            p[m.SX], p[m.START], p[m.PANEL], p[m.PANEL_STRIDE] = a + at_sx, a + at_start, a + at_panel, panel_stride

        self.kept.append(tiles)
        places = [p for p in (x, y, scratch, offsets, gather) if p is not None]
        if prepare:
            self.touch(*places)
            self.ops.append(_Op(prepare, matmul.QUANTIZE_SHARED, write, row))
        self.touch(*places)
        self.ops.append(_Op(compute, enough, write, row))
        return row

    def dense(self, weight: np.ndarray, x, ldx: int, x_step: int, y, ldy: int, y_step: int, name: str, rows_at: int | None = None) -> None:
        """y[t, b] = W_b x[t, b] for float32 weights [batch, out, n]."""
        batch, out, n = weight.shape
        if n % 4:
            raise ValueError(f"{name}: a float weight with {n} inputs; the runtime takes multiples of 4")
        panels = -(-out // DENSE)
        laid = aligned((batch, panels, n, DENSE), np.float32)
        padded = np.zeros((batch, panels * DENSE, n), np.float32)
        padded[:, :out] = weight
        laid[:] = padded.reshape(batch, panels, DENSE, n).swapaxes(2, 3)
        self.store.count(laid)
        enough = 1 if laid.nbytes > 1 << 20 else _ROWS_SHARED
        at = self.record.ctypes.data + 8 * decode.ROWS if rows_at is None else rows_at
        self.op(decode.dense_job(), [x, ldx, x_step, self.keep(laid), batch, out, n, y, ldy, y_step, at], enough)

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
        return np.array([(op.function, self.plan_address(op.plan), op.threads_from) for op in self.ops[first:last]], np.int64).reshape(-1, 3)


# ---------------------------------------------------------------------------------------------------------------- weights


def _linear(module: nn.Module, name: str) -> tuple[QTensor | np.ndarray, np.ndarray | None]:
    """(the weight [out, in]: its codes, or float32, the bias or None) of a linear module. Raises ValueError where it does more."""
    bias = None if getattr(module, "bias", None) is None else module.bias.detach().float().numpy()
    if isinstance(module, QLinear):
        _plain(module, name)
        if module.lora_a is not None:
            raise ValueError(f"{name} carries a LoRA adapter; the runtime takes plain weights: merge it into the weight and compress that")
        return module.qtensors()["weight"], bias
    if type(module) is nn.Linear:
        return module.weight.detach().float().numpy(), bias
    raise ValueError(f"{name} is a {type(module).__name__}; the runtime knows linear layers, quantized or plain")


def _plain(module: Quantized, name: str) -> None:
    for act in module.acts.values():
        if act.static or act.outliers is not None or act.per != "token" or act.bits != 8:
            raise ValueError(
                f"{name} rounds its inputs as {act}; the runtime rounds them its own way (int8 per token and group): "
                "compress without activations, or evaluate this model with edgelab.evaluate"
            )


def _rows_of(q: QTensor, start: int, stop: int) -> QTensor:
    """Rows of a weight [out, in]."""
    small = [None if a is None else a if a.shape[0] == 1 else a[start:stop] for a in (q.scales, q.offsets)]
    return QTensor(q.packed[start:stop], small[0], (stop - start, q.shape[1]), q.scheme, small[1])


def _halves(scales: np.ndarray, scheme: QuantScheme, name: str) -> np.ndarray:
    """Stored scales as float16."""
    if scales.dtype == np.float16:
        return np.ascontiguousarray(scales)
    halves = np.exp2(scales.astype(np.float32) - 127).astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(f"{name}: a scale of {scheme} is above 2**15, the largest that a tile holds")
    return halves


class _Later(NamedTuple):
    """A weight whose codes are put together when they are wanted: not where its tiles lie on disk already."""

    shape: tuple[int, ...]
    scheme: QuantScheme
    make: Callable[[], QTensor]
    offsets: None = None


def _joined(qs: list[QTensor]) -> _Later | None:
    """The weights one above the other, if they are stored alike and no tile would hold rows of two."""
    first = qs[0]
    if any(q.scheme != first.scheme for q in qs) or first.scheme.asymmetric or any(q.shape[0] % ROWS for q in qs):
        return None
    shape = sum(q.shape[0] for q in qs), first.shape[1]

    def make() -> QTensor:
        wide = [np.broadcast_to(q.scales, (q.shape[0], q.scales.shape[1])) for q in qs]
        return QTensor(np.concatenate([q.packed for q in qs]), np.concatenate(wide), shape, first.scheme, None)

    return _Later(shape, first.scheme, make)


class _Assembler:
    """One model on its way into a program."""

    def __init__(self, model: nn.Module, settings: Settings, store: TileStore, fill: Callable, release: Callable) -> None:
        self.model, self.config, self.settings, self.store = model, model.config, settings, store
        self.fill, self.release = fill, release
        check_model(model, settings.context)
        self.family = FAMILIES[self.config.model_type]
        self.layers = list(model.model.layers)
        self.b = _Builder(settings, store, 64 + 40 * len(self.layers) * 4)
        self.hidden = self.config.hidden_size
        self.eps = self.b.number(self.config.rms_norm_eps)
        self.top_k = np.zeros(1, np.int64)
        self.gates: list[int] = []
        self.indices: list[_At] = []
        self.experts = self.most_k = 0
        self.cache_bytes = self.plain_cache_bytes = 0
        self.padded = -(-settings.context // BLOCK) * BLOCK
        self.embedding_bytes = 0

    def tiles(self, name: str, q: Callable[[], QTensor], scheme: QuantScheme, shape: tuple[int, ...]) -> Tiles:
        group = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0

        def parts():
            found = q()
            return found.packed, _halves(found.scales, scheme, name).view(np.int16)

        levels = None if scheme.affine else scheme.table
        return self.store.tiles(name, parts, scheme.bits, group, shape[-1], levels)

    # ------------------------------------------------------------------------------------------------------------- pieces
    def product(self, name: str, weight: QTensor | _Later | np.ndarray, bias, x: _At, y: _At, slots: int | None = None, head: bool = False) -> None:
        """y = x W^T + bias, whatever the weight is."""
        b = self.b
        out, n = weight.shape
        if isinstance(weight, np.ndarray):
            rows_at = b.record.ctypes.data + 8 * (decode.WANTED if head else decode.ROWS)
            b.dense(weight[None], x, n, 0, y, out, 0, name, rows_at)
        else:
            make = weight.make if isinstance(weight, _Later) else lambda: weight
            b.product(self.tiles(name, make, weight.scheme, weight.shape), x, y, slots=slots)
            if weight.offsets is not None:
                self.asymmetric(name, weight, x, y, head)
        if bias is not None:
            if head:
                raise ValueError(f"{name} has a bias; the runtime knows heads without one")
            b.op(decode.bias_job(), [y, out, b.keep(np.ascontiguousarray(bias, np.float32))])

    def asymmetric(self, name: str, q: QTensor, x: _At, y: _At, head: bool) -> None:
        """y += (sums of x over the groups) (offset + zero point * scale)^T; see `layers.py`."""
        if head:
            raise ValueError(f"{name} has offsets ({q.scheme}); the runtime takes a head in a symmetric scheme, such as int4-g32")
        b, (out, n) = self.b, q.shape
        extra = q.offsets.astype(np.float32) + np.float32(q.scheme.zero_point) * q.scales.astype(np.float32)
        groups = extra.shape[1]
        padded = -(-groups // 4) * 4
        weight = np.zeros((1, out, padded), np.float32)
        weight[0, :, :groups] = extra  # one row where a scale serves all of them
        sums, more = b.floats(f"{name} sums", padded), b.floats(f"{name} offsets", out)
        b.op(decode.sums_job(), [x, n, n // groups, sums])
        b.dense(weight, sums, padded, 0, more, out, 0, name)
        b.op(decode.add_job(), [more, y, 0, out])

    def norm(self, module: nn.Module, x: _At, n: int, ldx: int | None = None) -> _At:
        y = self.b.floats("normed", n)
        self.b.op(decode.norm_job(), [x, 4 * (ldx or n), self.b.floats_of(module.weight), self.eps, n, y, 4 * n])
        return y

    def linear(self, module: nn.Module, name: str, x: _At) -> tuple[_At, int]:
        """(the output, its width) of one linear module."""
        weight, bias = _linear(module, name)
        y = self.b.floats(name, weight.shape[0])
        self.product(name, weight, bias, x, y)
        return y, weight.shape[0]

    def several(self, modules: dict[str, nn.Module], prefix: str, x: _At) -> list[tuple[_At, int]]:
        """[(the output, floats between its rows)] of modules that read the same x: one product where they can be joined."""
        found = {name: _linear(m, f"{prefix}.{name}") for name, m in modules.items()}
        weights = [w for w, _ in found.values()]
        joined = _joined(weights) if all(isinstance(w, QTensor) for w in weights) else None
        if joined is None:
            outs = []
            for name, (weight, bias) in found.items():
                y = self.b.floats(name, weight.shape[0])
                self.product(f"{prefix}.{name}", weight, bias, x, y)
                outs.append((y, weight.shape[0]))
            return outs
        name, width = f"{prefix}.{'+'.join(found)}", joined.shape[0]
        y = self.b.floats(name, width)
        biases = [bias for _, bias in found.values()]
        whole = None
        if any(bias is not None for bias in biases):
            whole = np.concatenate([np.zeros(w.shape[0], np.float32) if v is None else v for w, v in zip(weights, biases, strict=True)])
        self.product(name, joined, whole, x, y)
        starts = np.cumsum([0, *(w.shape[0] for w in weights)])
        return [(_At(y.held, 4 * int(start)), width) for start in starts[:-1]]

    # ---------------------------------------------------------------------------------------------------------- attention
    def cache_of(self, heads: int, dim: int, positions: int | None = None) -> tuple[np.ndarray, int, int]:
        """(zeros, bytes of a slot, bytes of a head). Memory is taken as positions are filled."""
        size = 2 if self.settings.half else 4
        head = heads and (positions or self.padded) * dim * size
        cache = np.zeros(self.settings.slots * heads * head + 64, np.uint8)
        self.b.kept.append(cache)
        self.cache_bytes += self.settings.slots * heads * head
        return cache, heads * head, head

    def rotation(self) -> tuple[int, int, int]:
        """(half of the rotated dims, addresses of cos and sin [context, half]) as the model's own module computes them."""
        if not hasattr(self, "_rotation"):
            rotary = type(self.model.model.rotary_emb)(self.config)  # a fresh one: the model's may be on the meta device
            with torch.no_grad():
                cos, sin = rotary(torch.zeros(1), torch.arange(self.settings.context)[None])
            half = cos.shape[-1] // 2
            arrays = [np.ascontiguousarray(t[0, :, :half].float().numpy()) for t in (cos, sin)]
            self._rotation = (half, *map(self.b.keep, arrays))
        return self._rotation

    def attend(self, q: _At, ldq: int, dim: int, group: int, heads: int, k, v, y: _At, ldy: int, y_head: int, scale: float) -> None:
        """One attention job; `k` and `v`: (cache, bytes of a slot, bytes of a head), v with its dim last, or None and the dim across."""
        b, across = self.b, v[0] is None
        each = 64 * 3 + 4 * QUERIES * self.padded + 64
        scratch = b.bytes("scores", each * self.b.parts)
        values = (0, 0, 0, v[1]) if across else (v[0].ctypes.data, *v[1:])
        words = [q, ldq, dim, group, heads, k[0].ctypes.data, k[1], k[2], *values, y, ldy, y_head, scratch, each, self.padded]
        many = heads * group > QUERIES or heads > 1
        b.op(decode.attention_job(self.settings.half, across), [*words, b.number(scale)], 1 if many else 2)

    def attention(self, module: nn.Module, name: str, x: _At) -> _At:
        config, b = self.config, self.b
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if dim % 16:
            raise ValueError(f"head_dim={dim}; the runtime takes multiples of 16")
        (q, ldq), (k, ldk), (v, ldv) = self.several({n: getattr(module, n) for n in ("q_proj", "k_proj", "v_proj")}, name, x)
        half, cos, sin = self.rotation()
        keys, values = self.cache_of(kv, dim), self.cache_of(kv, dim)
        self.plain_cache_bytes += self.settings.slots * self.settings.context * kv * dim * 8
        gains = [b.floats_of(getattr(module, n).weight) if hasattr(module, n) else 0 for n in ("q_norm", "k_norm")]
        words = [q, k, v, ldq, ldk, ldv, heads, kv, dim, dim, half, *gains, self.eps, cos, sin, keys[0].ctypes.data, values[0].ctypes.data]
        b.op(decode.heads_job(self.settings.half), [*words, keys[1], values[1], keys[2], values[2], 0, dim])
        y = b.floats("attended", heads * dim)
        self.attend(q, ldq, dim, heads // kv, kv, keys, (*values, dim), y, heads * dim, dim, float(module.scaling))
        return self.linear(module.o_proj, f"{name}.o_proj", y)[0]

    def latent_attention(self, module: nn.Module, name: str, x: _At) -> _At:
        """DeepSeek's; see `kernels/decode.py`."""
        c, b = self.config, self.b
        heads, rank, plain, value_dim = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim
        half, cos, sin = self.rotation()
        dim, of_head = rank + 2 * half, plain + 2 * half
        for what, n in (("kv_lora_rank + qk_rope_head_dim", dim), ("qk_nope_head_dim", plain)):
            if n % 4:
                raise ValueError(f"{what}={n}; the runtime takes multiples of 4")
        if c.q_lora_rank is None:
            q, _ = self.linear(module.q_proj, f"{name}.q_proj", x)
        else:
            low, width = self.linear(module.q_a_proj, f"{name}.q_a_proj", x)
            q, _ = self.linear(module.q_b_proj, f"{name}.q_b_proj", self.norm(module.q_a_layernorm, low, width))
        latent, ld = self.linear(module.kv_a_proj_with_mqa, f"{name}.kv_a_proj_with_mqa", x)
        weight, bias = _linear(module.kv_b_proj, f"{name}.kv_b_proj")
        if bias is not None:
            raise ValueError(f"{name}.kv_b_proj has a bias; the runtime's latent attention knows none")
        keys = self.cache_of(1, dim)
        self.plain_cache_bytes += self.settings.slots * self.settings.context * heads * 4 * (of_head + value_dim)
        queries = b.floats("latent queries", heads * dim)
        gain = b.floats_of(module.kv_a_layernorm.weight)
        eps = b.number(module.kv_a_layernorm.variance_epsilon)
        interleaved = int(getattr(c, "rope_interleave", True))
        words = [q, heads * of_head, heads, plain, half, latent, ld, rank, gain, eps, cos, sin, keys[0].ctypes.data, keys[1]]
        b.op(decode.latent_job(self.settings.half), [*words, interleaved, queries])
        # [heads, plain + value, rank]: what makes keys of latents goes to the queries' side, transposed
        wide = weight if isinstance(weight, np.ndarray) else weight.dequantize()
        by_head = wide.reshape(heads, plain + value_dim, rank)
        up_keys = np.ascontiguousarray(by_head[:, :plain].swapaxes(1, 2))  # [heads, rank, plain]
        b.dense(up_keys, q, heads * of_head, 4 * of_head, queries, heads * dim, 4 * dim, f"{name}.kv_b_proj")
        # sums of latents, [heads, rows, rank] for the products by head
        sums = b.floats("latent sums", heads * rank)
        self.attend(queries, heads * dim, dim, heads, 1, keys, (None, rank), sums, heads * rank, rank, float(module.scaling))
        up_values = by_head[:, plain:]
        y = b.floats("attended", heads * value_dim)
        codes = isinstance(weight, QTensor) and not weight.scheme.asymmetric and weight.shape[0] % (plain + value_dim) == 0
        if codes:

            def stack() -> QTensor:
                cut = [_rows_of(weight, h * (plain + value_dim) + plain, (h + 1) * (plain + value_dim)) for h in range(heads)]
                scales = np.stack([np.broadcast_to(p.scales, (value_dim, p.scales.shape[1])) for p in cut])
                return QTensor(np.stack([p.packed for p in cut]), scales, (heads, value_dim, rank), weight.scheme, None)

            tiles = self.tiles(f"{name}.kv_b_proj values", stack, weight.scheme, (heads, value_dim, rank))
            turned, by_heads = b.floats("latent sums by head", heads * rank), b.floats("values by head", heads * value_dim)
            b.op(decode.turn_job(), [sums, heads, rank, turned, 1])
            offsets = b.bytes("offsets", 8 * (heads + 1))
            told = len(b.ops)
            b.op(decode.offsets_job(), [offsets, heads, 0], 0)
            row = b.product(tiles, turned, by_heads, slots=self.b.rows * heads, offsets=offsets)
            b.ops[told].words = _told(b, offsets, heads, row)
            b.op(decode.turn_job(), [by_heads, heads, value_dim, y, 0])
        else:
            b.dense(np.ascontiguousarray(up_values), sums, heads * rank, 4 * rank, y, heads * value_dim, 4 * value_dim, f"{name}.kv_b_proj")
        return self.linear(module.o_proj, f"{name}.o_proj", y)[0]

    # -------------------------------------------------------------------------------------------------------- feed-forward
    def mlp(self, module: nn.Module, name: str, x: _At) -> _At:
        _silu(getattr(module, "act_fn", None), name)
        (gate, ld), (up, _) = self.several({n: getattr(module, n) for n in ("gate_proj", "up_proj")}, name, x)
        inner = module.down_proj.in_features
        h = self.b.floats(f"{name} inner", inner)
        self.b.op(decode.glu_job(), [gate, up, 4 * ld, inner, h, self.b.record.ctypes.data + 8 * decode.ROWS])
        return self.linear(module.down_proj, f"{name}.down_proj", h)[0]

    def mixture(self, module: nn.Module, name: str, x: _At) -> _At:
        """Routed experts, and the shared ones beside them."""
        b, c, deepseek = self.b, self.config, self.family.gate == "deepseek"
        router, experts = module.gate, module.experts
        weight = router.weight.detach().float().numpy()
        count, k = weight.shape[0], next(int(m.top_k) for m in (router, module) if hasattr(m, "top_k"))
        self.experts, self.most_k = count, max(self.most_k, k)
        logits = b.floats("router logits", count)
        b.dense(weight[None], x, self.hidden, 0, logits, count, 0, f"{name}.gate")
        indices, gates = b.bytes("experts chosen", 8 * self.b.rows * k), b.floats("gates", k)
        if deepseek:
            bias = b.floats_of(router.e_score_correction_bias)
            settings = [int(c.norm_topk_prob), bias, c.n_group, c.topk_group, b.number(c.routed_scaling_factor)]
        else:
            normalise = self.family.always_normalised or getattr(c, "norm_topk_prob", True)
            settings = [int(normalise), 0, 1, 1, 0]
        self.gates.append(b.op(decode.gate_job(deepseek), [logits, count, k, indices, gates, *settings], 0))
        total = None
        for group, part in _parts(experts, count):
            out = self.experts_of(part, f"{name}.experts{'' if group is None else f'#{group[0]}'}", group, x, indices, gates, count, k)
            if total is None:
                total = out
            else:
                b.op(decode.add_job(), [out, total, 0, self.hidden])
        shared = getattr(module, "shared_experts", None)
        if shared is not None:
            b.op(decode.add_job(), [self.mlp(shared, f"{name}.shared_experts", x), total, 0, self.hidden])
        return total

    def experts_of(self, part: QExperts, name: str, group, x: _At, indices: _At, gates: _At, count: int, k: int) -> _At:
        b, q = self.b, part.qtensors()
        _plain(part, name)
        if not part._is_swiglu:
            raise ValueError(f"{name}: the runtime knows experts with SwiGLU and without biases")
        for which, weight in q.items():
            if weight.scheme.asymmetric:
                raise ValueError(
                    f"{name}.{which} has offsets ({weight.scheme}); the runtime takes experts in symmetric schemes, such as int4-g32 or nf4-g64"
                )
        gate_up, down = (self.tiles(f"{name}.{which}", lambda w=w: w, w.scheme, w.shape) for which, w in q.items())
        slots, inner, own = b.rows * k, down.n, gate_up.codes.shape[0]
        order, offsets, rows = b.bytes("order", 8 * slots), b.bytes("offsets", 8 * (own + 1)), b.bytes("rows", 8 * slots)
        kept = b.keep(np.zeros(8, np.int64))
        numbers = 0
        if group is not None:
            local = np.full(count + 1, own, np.int64)
            local[list(group)] = np.arange(own)
            numbers = b.keep(local)
        renamed = b.bytes("local", 8 * slots if group is not None else 8)
        told = len(b.ops)
        b.op(decode.dispatch_job(), [indices, self.top_k.ctypes.data, count, numbers, own, order, offsets, rows, 0, 0, kept, renamed], 0)
        wide, h, y = b.floats("gate and up", 2 * inner, slots), b.floats("inner", inner, slots), b.floats("outputs", self.hidden, slots)
        first = b.product(gate_up, x, wide, slots=slots, offsets=offsets, gather=rows)
        b.op(decode.glu_job(), [wide, _At(wide.held, 4 * inner), 8 * inner, inner, h, kept])
        second = b.product(down, h, y, slots=slots, offsets=offsets)
        words = [indices, self.top_k.ctypes.data, count, numbers, own, order, offsets, rows]
        b.ops[told].words = _written(b, [*words, b.plan_address(first), b.plan_address(second), kept, renamed])
        out = b.floats("of the experts", self.hidden)
        b.op(decode.combine_job(), [y, kept, order, gates, self.top_k.ctypes.data, self.hidden, out], 0)
        return out

    # ------------------------------------------------------------------------------------------------------------ the whole
    def embedding(self) -> _At:
        b, module = self.b, self.model.get_input_embeddings()
        y = b.floats("hidden", self.hidden)
        if isinstance(module, QEmbedding):
            (q,) = module.qtensors().values()
            scheme = q.scheme
            table = np.arange(256, dtype=np.float32) - (0 if scheme.asymmetric else 128) if scheme.bits == 8 else scheme.table
            scales = _halves(q.scales, scheme, "the embedding")
            groups, shared = scales.shape[1], int(scales.shape[0] == 1 and q.shape[0] > 1)
            offsets = 0 if q.offsets is None else b.keep(np.ascontiguousarray(q.offsets))
            self.embedding_bytes = q.packed.nbytes + scales.nbytes
            words = [b.keep(q.packed), b.keep(scales), offsets, b.keep(np.ascontiguousarray(table, np.float32)), q.packed.shape[1]]
            b.op(decode.embed_job(scheme.bits), [*words, self.hidden, q.shape[1] // groups, groups, shared, y])
        else:
            weight = module.weight.detach()
            bf16 = weight.dtype == torch.bfloat16
            raw = weight.view(torch.int16).numpy() if bf16 else weight.float().numpy()
            raw = np.ascontiguousarray(raw)
            self.embedding_bytes = raw.nbytes
            b.op(decode.embed_job(16 if bf16 else 32), [b.keep(raw), 0, 0, 0, raw.strides[0], self.hidden, 0, 0, 0, y])
        return y

    def assemble(self) -> Program:
        b, s = self.b, self.settings
        self.fill("model.embed_tokens")
        h = self.embedding()
        for i, layer in enumerate(self.layers):
            name = f"model.layers.{i}"
            self.fill(name)
            x = self.norm(layer.input_layernorm, h, self.hidden)
            attend = self.latent_attention if self.family.latent else self.attention
            out = attend(layer.self_attn, f"{name}.self_attn", x)
            b.op(decode.add_job(), [out, h, 0, self.hidden])
            x = self.norm(layer.post_attention_layernorm, h, self.hidden)
            routed = hasattr(layer.mlp, "experts")
            out = (self.mixture if routed else self.mlp)(layer.mlp, f"{name}.mlp", x)
            b.op(decode.add_job(), [out, h, 0, self.hidden])
            self.release(name)
        body = len(b.ops)
        body_rows, b.rows_of = b.rows_of, []
        self.fill("model.norm")
        self.fill("lm_head")
        wanted = max(s.slots, 8)
        picked = b.floats("wanted", self.hidden, wanted)
        b.op(decode.pick_job(), [h, self.hidden, picked], 0)
        # the norm reads its number of rows where the head's record says how many are wanted: a record of its own
        normed = b.floats("normed", self.hidden, wanted)
        record, b.record = b.record, self.head_record(b.record)
        b.op(decode.norm_job(), [picked, 4 * self.hidden, b.floats_of(self.model.model.norm.weight), self.eps, self.hidden, normed, 4 * self.hidden], 0)
        b.record = record
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        if isinstance(head, QLinear) and isinstance(embedding, QEmbedding) and head.packed is embedding.packed:
            weight, bias = embedding.qtensors()["weight"], None
        else:
            weight, bias = _linear(head, "lm_head")
        vocabulary = weight.shape[0]
        logits = aligned((wanted, vocabulary + 16), np.float32)  # the products may store a vector's end behind the last row
        logits = logits.reshape(-1)[: wanted * vocabulary].reshape(wanted, vocabulary)
        b.kept.append(logits)
        self.product("lm_head", weight, bias, normed, logits.ctypes.data, slots=wanted, head=True)
        b.touch(h)  # the hidden states live through the head: it may be run again for other rows
        self.top_k[0] = self.most_k
        total, lives = b.finish()
        sizes = sum(-(-x.nbytes // 64) * 64 for x in lives)
        plan = MemoryPlan(
            len(lives), sizes, total, bound(lives), self.cache_bytes, self.plain_cache_bytes, self.store.nbytes + self.embedding_bytes,
            self.store.mapped_bytes,
        )  # fmt: skip
        return Program(
            b.table(0, body), b.table(body, len(b.ops)), np.array(body_rows, np.int64), np.array([*b.rows_of, self._head_rows], np.int64),
            b.record, logits, wanted, b.parts, plan, self.top_k, [b.plans[row] for row in self.gates], self.experts, self.most_k,
            [], vocabulary, len(self.layers), [*b.kept, self.top_k],
        )  # fmt: skip

    def head_record(self, record: np.ndarray) -> np.ndarray:
        """A record whose ROWS is the number of wanted rows."""
        own = aligned((RECORD,), np.int64)
        self.b.kept.append(own)
        self._head_rows = own.ctypes.data + 8 * decode.ROWS
        return own


def _told(b: _Builder, offsets: _At, heads: int, row: int) -> Callable[[np.ndarray], None]:
    return _written(b, [offsets, heads, b.plan_address(row)])


def _written(b: _Builder, words: list) -> Callable[[np.ndarray], None]:
    def write(p: np.ndarray) -> None:
        p[0] = b.record.ctypes.data
        for i, w in enumerate(words):
            p[1 + i] = b.address(w)

    return write


def _silu(act_fn, name: str) -> None:
    if not (isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"):
        raise ValueError(f"{name}: its activation is {type(act_fn).__name__}; the runtime knows SiLU (SwiGLU)")


def _parts(experts: nn.Module, count: int) -> list[tuple[tuple[int, ...] | None, QExperts]]:
    if isinstance(experts, QExpertsMixed):
        return list(zip(experts.groups, experts.parts, strict=True))
    if isinstance(experts, QExperts):
        return [(None, experts)]
    raise ValueError(f"the experts are a {type(experts).__name__} of {count}; the runtime takes quantized ones: compress the model first")


def check_model(model: nn.Module, context: int) -> None:
    """Raise ValueError for a model that the runtime would compute differently from transformers."""
    c = model.config
    if c.model_type not in FAMILIES:
        raise ValueError(f"model_type={c.model_type!r} is not known to the runtime; it runs {', '.join(FAMILIES)}")
    if getattr(c, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={c.hidden_act!r}; the runtime knows silu")
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(f"rope_type={rope['rope_type']!r} changes with the length; the runtime takes default, linear, llama3 or yarn")
    window = getattr(c, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(c, "layer_types", None) or []) or (c.model_type == "mistral" and window)
    if sliding and window and window < context:
        raise ValueError(f"sliding_window={window} is shorter than context={context}; open the model with context={window} or less")
    most = getattr(c, "max_position_embeddings", None)
    if most and context > most:
        raise ValueError(f"context={context} is above max_position_embeddings={most} of the model; use {most} or less")


def assemble(
    model: nn.Module, settings: Settings, store: TileStore, fill: Callable = lambda _: None, release: Callable = lambda _: None
) -> Program:
    """The program of `model` (transformers, quantized). `fill` and `release` get the names of its blocks as they are read and done with."""
    with torch.no_grad():
        return _Assembler(model, settings, store, fill, release).assemble()
