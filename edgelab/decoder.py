"""From a model to the program that `kernels/decode.py` runs: which jobs, in which order, on which addresses.

`assemble` walks a transformers model once. It lays weights out in tiles (`tile_store.py` keeps them on disk), joins products that read
the same input (q, k and v; gate and up) where their schemes agree, and writes the operations down (`program.py`). After that no torch
is needed: a step is one call.

Families are data (`FAMILIES`): llama, mistral, qwen2, qwen3, qwen3_moe, mixtral and deepseek_v3. What the runtime would compute
differently from transformers is refused, with the name of the setting.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from edgelab.kernels import decode
from edgelab.kernels.decode import BLOCK, QUERIES, RECORD
from edgelab.kernels.pack import ROWS, Tiles, aligned
from edgelab.layers import QEmbedding, QExperts, QLinear, Quantized
from edgelab.memory_plan import MemoryPlan, bound
from edgelab.mixed_experts import QExpertsMixed
from edgelab.program import Builder, Feed, Place, Program, Settings
from edgelab.qtensor import QTensor
from edgelab.recipe import Route
from edgelab.runtime_steps import steps_of
from edgelab.scheme import PerChannel, PerGroup, PerTensor, QuantScheme
from edgelab.tile_store import TileStore


@dataclass(frozen=True)
class Family:
    """What the runtime must know of a `config.model_type` beyond the names of its modules."""

    latent: bool = False  # multi-head latent attention
    gate: str | None = None  # how a router chooses: "softmax", "deepseek"; None: there are no experts
    always_normalised: bool = False  # the chosen gates are divided by their sum, whatever the config says
    always_slides: bool = False  # a sliding_window in the config holds for every layer


FAMILIES = {
    "llama": Family(),
    "mistral": Family(always_slides=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(gate="softmax", always_slides=True),
    "mixtral": Family(gate="softmax", always_normalised=True, always_slides=True),
    "deepseek_v3": Family(latent=True, gate="deepseek"),
}
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


def _by_row(scheme: QuantScheme) -> QuantScheme:
    """The scheme of rows that were put together: one scale for all becomes one for each."""
    return replace(scheme, granularity=PerChannel()) if isinstance(scheme.granularity, PerTensor) else scheme


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


def _offsets(q: QTensor) -> np.ndarray:
    """float32 [..., out, groups filled up to 4]: what an asymmetric weight adds to the kernels' product, per sum of x over a group."""
    extra = q.offsets.astype(np.float32) + np.float32(q.scheme.zero_point) * q.scales.astype(np.float32)
    found = np.zeros((*q.shape[:-1], -(-extra.shape[-1] // 4) * 4), np.float32)
    found[..., : extra.shape[-1]] = extra  # one row where a scale serves all of them
    return found


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
        return QTensor(np.concatenate([q.packed for q in qs]), np.concatenate(wide), shape, _by_row(first.scheme), None)

    return _Later(shape, first.scheme, make)


@dataclass
class _Source:
    """Rows that a job computes: `place` stores them, for any number of readers; to one product alone they can be fed."""

    feed: Feed
    store: Callable[[], Place]
    at: Place | None = None

    def place(self) -> Place:
        if self.at is None:
            self.at = self.store()
        return self.at


class _Assembler:
    """One model on its way into a program."""

    def __init__(self, model: nn.Module, settings: Settings, store: TileStore, fill: Callable, release: Callable) -> None:
        self.model, self.config, self.settings, self.store = model, model.config, settings, store
        self.fill, self.release = fill, release
        check_model(model, settings.context)
        self.family = FAMILIES[self.config.model_type]
        self.layers = list(model.model.layers)
        self.b = Builder(settings, store, 64 + 40 * len(self.layers) * 4)
        self.hidden = self.config.hidden_size
        self.top_k = np.zeros(1, np.int64)
        self.gates: list[int] = []
        self.indices: list[Place] = []
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
        return self.store.tiles(name, parts, scheme.bits, group, shape, levels)

    # ------------------------------------------------------------------------------------------------------------- pieces
    def product(
        self, name: str, weight: QTensor | _Later | np.ndarray, bias, x: Place | _Source, y, slots: int | None = None, head: bool = False
    ) -> None:
        """y = x W^T + bias, whatever the weight is. No other product reads the rows of a source."""
        b = self.b
        out, n = weight.shape
        if isinstance(x, _Source):
            x = x.feed if x.at is None and not isinstance(weight, np.ndarray) and b.rounds(weight) else x.place()
        if isinstance(weight, np.ndarray):
            b.dense(weight[None], x, n, 0, y, out, 0, name, head)
        else:
            make = weight.make if isinstance(weight, _Later) else lambda: weight
            b.product(self.tiles(name, make, weight.scheme, weight.shape), x, y, slots=slots)
            if weight.offsets is not None:
                self.asymmetric(name, weight, x, y, head)
        if bias is not None:
            if head:
                raise ValueError(f"{name} has a bias; the runtime knows heads without one")
            b.op(decode.bias_job(), [y, out, b.keep(np.ascontiguousarray(bias, np.float32))])

    def asymmetric(self, name: str, q: QTensor, x: Place, y: Place, head: bool) -> None:
        """y += (sums of x over the groups) (offset + zero point * scale)^T; see `layers.py`."""
        b, (out, n) = self.b, q.shape
        weight = _offsets(q)[None]
        padded = weight.shape[2]
        sums, more = b.floats(f"{name} sums", padded), b.floats(f"{name} offsets", out)
        b.op(decode.sums_job(), [x, n, n // q.offsets.shape[1], sums, b.rows_at(head)])
        b.dense(weight, sums, padded, 0, more, out, 0, name, head)
        b.add(more, y, out, head)

    def norm(self, module: nn.Module, x: Place, n: int) -> _Source:
        b, gain, eps = self.b, self.b.floats_of(module.weight), self.eps(module)

        def store() -> Place:
            y = b.floats("normed", n)
            b.op(decode.norm_job(), [x, 4 * n, gain, eps, n, y, 4 * n])
            return y

        return _Source(Feed(decode.norm_quantize_job, [x, 4 * n, gain, eps, n, b.rows_at()]), store)

    def eps(self, module: nn.Module) -> int:
        """The address of a norm's own epsilon: not every norm of a model has the config's."""
        return self.b.number(module.variance_epsilon)

    def swiglu(self, gate: Place, up: Place, stride: int, n: int, rows: int, rows_at: int) -> _Source:
        b = self.b

        def store() -> Place:
            h = b.floats("inner", n, rows)
            b.op(decode.glu_job(), [gate, up, stride, n, h, rows_at])
            return h

        return _Source(Feed(decode.glu_quantize_job, [gate, up, stride, n, rows_at]), store)

    def linear(self, module: nn.Module, name: str, x: Place | _Source) -> tuple[Place, int]:
        """(the output, its width) of one linear module."""
        weight, bias = _linear(module, name)
        y = self.b.floats(name, weight.shape[0])
        self.product(name, weight, bias, x, y)
        return y, weight.shape[0]

    def several(self, modules: dict[str, nn.Module], prefix: str, x: Place | _Source) -> list[tuple[Place, int]]:
        """[(the output, floats between its rows)] of modules that read the same x: one product where they can be joined."""
        found = {name: _linear(m, f"{prefix}.{name}") for name, m in modules.items()}
        weights = [w for w, _ in found.values()]
        joined = _joined(weights) if all(isinstance(w, QTensor) for w in weights) else None
        if joined is None:
            x, outs = x.place() if isinstance(x, _Source) else x, []
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
        return [(Place(y.held, 4 * int(start)), width) for start in starts[:-1]]

    # ---------------------------------------------------------------------------------------------------------- attention
    def cache_of(self, heads: int, dim: int, positions: int | None = None) -> tuple[np.ndarray, int, int]:
        """(zeros, bytes of a slot, bytes of a head). Memory is taken as positions are filled."""
        size = 2 if self.settings.half else 4
        head = heads and (positions or self.padded) * dim * size
        try:
            cache = np.zeros(self.settings.slots * heads * head + 64, np.uint8)
        except MemoryError as error:
            s = self.settings
            raise ValueError(
                f"slots={s.slots} of context={s.context}: a layer's cache takes {s.slots * heads * head:,} bytes; ask for fewer or shorter"
            ) from error
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

    def attend(self, q: Place, ldq: int, dim: int, group: int, heads: int, k, v, y: Place, ldy: int, y_head: int, scale: float) -> None:
        """One attention job; `k` and `v`: (cache, bytes of a slot, bytes of a head), v with its dim last, or None and the dim across."""
        b, across = self.b, v[0] is None
        each = 64 * 3 + 4 * QUERIES * self.padded + 64
        scratch = b.bytes("scores", each * self.b.parts)
        values = (0, 0, 0, v[1]) if across else (v[0].ctypes.data, *v[1:])
        words = [q, ldq, dim, group, heads, k[0].ctypes.data, k[1], k[2], *values, y, ldy, y_head, scratch, each, self.padded]
        many = heads * group > QUERIES or heads > 1
        b.op(decode.attention_job(self.settings.half, across), [*words, b.number(scale)], 1 if many else 2)

    def attention(self, module: nn.Module, name: str, x: _Source) -> Place:
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
        eps = self.eps(module.q_norm) if hasattr(module, "q_norm") else 0
        words = [q, k, v, ldq, ldk, ldv, heads, kv, dim, dim, half, *gains, eps, cos, sin, keys[0].ctypes.data, values[0].ctypes.data]
        b.op(decode.heads_job(self.settings.half), [*words, keys[1], values[1], keys[2], values[2], 0, dim])
        y = b.floats("attended", heads * dim)
        self.attend(q, ldq, dim, heads // kv, kv, keys, (*values, dim), y, heads * dim, dim, float(module.scaling))
        return self.linear(module.o_proj, f"{name}.o_proj", y)[0]

    def latent_attention(self, module: nn.Module, name: str, x: _Source) -> Place:
        """DeepSeek's; see `kernels/decode.py`."""
        x = x.place()  # for queries and latents
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
        eps = self.eps(module.kv_a_layernorm)
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
                return QTensor(np.stack([p.packed for p in cut]), scales, (heads, value_dim, rank), _by_row(weight.scheme), None)

            tiles = self.tiles(f"{name}.kv_b_proj values", stack, weight.scheme, (heads, value_dim, rank))
            turned, by_heads = b.floats("latent sums by head", heads * rank), b.floats("values by head", heads * value_dim)
            b.op(decode.turn_job(), [sums, heads, rank, turned, 1])
            offsets = b.bytes("offsets", 8 * (heads + 1))
            told = len(b.ops)
            b.op(decode.offsets_job(), [offsets, heads, 0], 0)
            row = b.product(tiles, turned, by_heads, slots=self.b.rows * heads, offsets=offsets)
            b.ops[told].words = b.written([offsets, heads, b.plan_address(row)])
            b.op(decode.turn_job(), [by_heads, heads, value_dim, y, 0])
        else:
            b.dense(np.ascontiguousarray(up_values), sums, heads * rank, 4 * rank, y, heads * value_dim, 4 * value_dim, f"{name}.kv_b_proj")
        return self.linear(module.o_proj, f"{name}.o_proj", y)[0]

    # -------------------------------------------------------------------------------------------------------- feed-forward
    def mlp(self, module: nn.Module, name: str, x: Place | _Source) -> Place:
        _silu(getattr(module, "act_fn", None), name)
        (gate, ld), (up, _) = self.several({n: getattr(module, n) for n in ("gate_proj", "up_proj")}, name, x)
        inner = module.down_proj.in_features
        h = self.swiglu(gate, up, 4 * ld, inner, self.b.rows, self.b.rows_at())
        return self.linear(module.down_proj, f"{name}.down_proj", h)[0]

    def mixture(self, module: nn.Module, name: str, x: _Source) -> Place:
        """Routed experts, and the shared ones beside them."""
        x = x.place()  # for the router and all experts
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
        for group, part in _parts(experts):
            out = self.experts_of(part, f"{name}.experts{'' if group is None else f'#{group[0]}'}", group, x, indices, gates, count, k)
            if total is None:
                total = out
            else:
                b.add(out, total, self.hidden)
        shared = getattr(module, "shared_experts", None)
        if shared is not None:
            b.add(self.mlp(shared, f"{name}.shared_experts", x), total, self.hidden)
        return total

    def experts_of(self, part: nn.Module, name: str, group, x: Place, indices: Place, gates: Place, count: int, k: int) -> Place:
        """The weighted sum of what the experts of one part return: of all, or of those in `group`."""
        b, weights = self.b, _stacks(part, name)
        own, _, inner = weights["down_proj"].shape
        slots = b.rows * k
        order, offsets, rows = b.bytes("order", 8 * slots), b.bytes("offsets", 8 * (own + 1)), b.bytes("rows", 8 * slots)
        kept = b.keep(np.zeros(8, np.int64))
        numbers = 0
        if group is not None:
            local = np.full(count + 1, own, np.int64)
            local[list(group)] = np.arange(own)
            numbers = b.keep(local)
        renamed = b.bytes("local", 8 * slots if group is not None else 8)
        words = [indices, self.top_k.ctypes.data, count, numbers, own, order, offsets, rows]
        told = len(b.ops)
        b.op(decode.dispatch_job(), [*words, 0, 0, kept, renamed], 0)
        wide, y = b.floats("gate and up", 2 * inner, slots), b.floats("outputs", self.hidden, slots)
        first = self.expert_product(f"{name}.gate_up_proj", weights["gate_up_proj"], x, wide, slots, offsets, rows, kept)
        h = self.swiglu(wide, Place(wide.held, 4 * inner), 8 * inner, inner, slots, kept)
        second = self.expert_product(f"{name}.down_proj", weights["down_proj"], h, y, slots, offsets, None, kept)
        plans = [0 if row is None else b.plan_address(row) for row in (first, second)]
        b.ops[told].words = b.written([*words, *plans, kept, renamed])
        out = b.floats("of the experts", self.hidden)
        b.op(decode.combine_job(), [y, kept, order, gates, self.top_k.ctypes.data, self.hidden, out], 0)
        return out

    def expert_product(
        self, name: str, weight, x: Place | _Source, y: Place, slots: int, offsets: Place, rows: Place | None, kept: int
    ) -> int | None:
        """y = W_e x for each expert's rows, which `rows` gathers from x. Returns the plan that wants to know how many, if there is one."""
        b, (_, out, n) = self.b, weight.shape
        codes = isinstance(weight, QTensor)
        if isinstance(x, _Source):
            x = x.feed if codes and b.rounds(weight) else x.place()
        sorted_x = x
        if rows is not None and not (codes and weight.offsets is None):
            sorted_x = b.floats("sorted", n, slots)
            b.op(decode.gather_job(), [x, n, rows, kept, sorted_x])
        if not codes:
            b.dense_experts(weight, sorted_x, y, offsets, name)
            return None
        tiles = self.tiles(name, lambda: weight, weight.scheme, weight.shape)
        plan = b.product(tiles, x, y, slots=slots, offsets=offsets, gather=rows)
        if weight.offsets is not None:
            extra = _offsets(weight)
            sums, more = b.floats("sums", extra.shape[2], slots), b.floats("offsets", out, slots)
            b.op(decode.sums_job(), [sorted_x, n, n // weight.offsets.shape[-1], sums, kept])
            b.dense_experts(extra, sums, more, offsets, name)
            b.add(more, y, out, rows_at=kept)
        return plan

    # ------------------------------------------------------------------------------------------------------------ the whole
    def embedding(self) -> Place:
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
            b.add(out, h, self.hidden)
            x = self.norm(layer.post_attention_layernorm, h, self.hidden)
            routed = hasattr(layer.mlp, "experts")
            out = (self.mixture if routed else self.mlp)(layer.mlp, f"{name}.mlp", x)
            b.add(out, h, self.hidden)
            self.release(name)
        body = len(b.ops)
        body_rows, b.rows_of = b.rows_of, []
        self.fill("model.norm")
        final = self.model.model.norm
        self.fill("lm_head")
        wanted = max(s.slots, 8)
        picked = b.floats("wanted", self.hidden, wanted)
        b.op(decode.pick_job(), [h, self.hidden, picked], 0)
        # the norm reads its number of rows where the head's record says how many are wanted: a record of its own
        normed = b.floats("normed", self.hidden, wanted)
        record, b.record = b.record, self.head_record(b.record)
        b.op(
            decode.norm_job(),
            [picked, 4 * self.hidden, b.floats_of(final.weight), self.eps(final), self.hidden, normed, 4 * self.hidden],
            0,
        )
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
            vocabulary, len(self.layers), [*b.kept, self.top_k],
        )  # fmt: skip

    def head_record(self, record: np.ndarray) -> np.ndarray:
        """A record whose ROWS is the number of wanted rows."""
        own = aligned((RECORD,), np.int64)
        self.b.kept.append(own)
        self._head_rows = own.ctypes.data + 8 * decode.ROWS
        return own


def _silu(act_fn, name: str) -> None:
    if not (isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation"):
        raise ValueError(f"{name}: its activation is {type(act_fn).__name__}; the runtime knows SiLU (SwiGLU)")


def _parts(experts: nn.Module) -> list[tuple[tuple[int, ...] | None, nn.Module]]:
    return list(zip(experts.groups, experts.parts, strict=True)) if isinstance(experts, QExpertsMixed) else [(None, experts)]


def _stacks(part: nn.Module, name: str) -> dict[str, QTensor | np.ndarray]:
    """The two stacks of a mixture's experts: codes, or float32 [experts, out, in]."""
    if isinstance(part, QExperts):
        _plain(part, name)
        if not part._is_swiglu:
            raise ValueError(f"{name}: the runtime knows experts with SwiGLU and without biases")
        return part.qtensors()
    _silu(getattr(part, "act_fn", None), name)
    return {which: getattr(part, which).detach().float().numpy() for which in ("gate_up_proj", "down_proj")}


def check_model(model: nn.Module, context: int) -> None:
    """Raise ValueError for a model that the runtime would compute differently from transformers."""
    c = model.config
    for step in steps_of(model):
        if not isinstance(step, Route) or (step.top_p, step.skip) != (None, None):
            raise ValueError(f"the model computes by {step}, which the runtime does not know: use transformers, or leave the step out")
    if c.model_type not in FAMILIES:
        raise ValueError(f"model_type={c.model_type!r} is not known to the runtime; it runs {', '.join(FAMILIES)}")
    if getattr(c, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={c.hidden_act!r}; the runtime knows silu")
    rope = getattr(c, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        raise ValueError(f"rope_type={rope['rope_type']!r} changes with the length; the runtime takes default, linear, llama3 or yarn")
    window = getattr(c, "sliding_window", None)
    sliding = FAMILIES[c.model_type].always_slides or "sliding_attention" in (getattr(c, "layer_types", None) or [])
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
