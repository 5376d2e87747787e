"""ONNX: our own codes in `MatMulNBits` nodes, executed and compared in ONNX Runtime.

Nothing is quantized again. `QuantScheme` and the contrib operator agree on the arithmetic, scale * (q - 2**(bits-1)),
and on the packing (the first code in the low bits), so a row's bytes go into the file as they are, cut into blocks:

    codes   uint8 [out, blocks, block * bits / 8]      scales  float16 [out, groups], cast to float32 when the file is loaded

`MatMulNBits` knows 2, 4 and 8 bits and blocks of 16 .. 256. Three bits go out as four (q + 4: the same value, a larger
file). A row or a group longer than a block becomes several blocks that share its scale. `GatherBlockQuantized` takes
the same codes for the embedding, so a tied head costs nothing.

How: torch traces a *skeleton* of the model, in which every quantized layer and every expert stack is one opaque node
that only names its layer; afterwards each of these nodes is replaced by the ONNX nodes it stands for. Weights never
pass through the tracer, and the tracing time does not depend on the number of experts. The experts are written either

    "sparse"   per expert: the tokens routed to it are gathered, computed, weighted and added back; the others cost nothing
    "rank"     every expert computes every token, masked by the router's weights, and top-k is done by counting
               comparisons: no top-k, sort, gather-by-index or scatter, for runtimes that lack them; experts / k times the work
    "qmoe"     one `QMoE` node for the whole stack, which reads the same codes, rows of gate and up in turn: fewer nodes, where the
               runtime has this operator (ONNX Runtime on processors, in the browser too). Our router stays: its weights are scattered
               to [tokens, experts] and given as `router_weights`
    "auto"     "qmoe" where every stack of the model can be written so, else "sparse"

The graph takes input_ids int64 [batch, sequence], both of any length, and gives logits float32 [batch, sequence,
vocabulary]; causal. Without a cache there is no padding mask (pad on the right and ignore the padded positions). With `cache=True` it
bears the names that other tools of this format use, and one file serves the prompt and each step after it:

    attention_mask            int64 [batch, past + sequence]: 0 for padding, left of a row's first token
    past_key_values.i.key     float32 [batch, heads, past, width], and .value, of layer i; past = 0 at first
    present.i.key             the same with the new tokens behind: [batch, heads, past + sequence, width]

What is cached is what transformers caches: for DeepSeek's latent attention the compressed vector and the rotary key, one "head" each.
"""

import copy
import itertools
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, place, refuse_other_arithmetic, require, whole_or_nothing
from edgelab.fold import QUICK, activations, kind_of
from edgelab.layers import QEmbedding, QExperts, QLinear
from edgelab.model import family_of
from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import PerGroup, PerTensor

OPSET = 20  # the first with Gelu; ONNX Runtime 1.17 and later
IR_VERSION = 10  # what opset 20 was published with; a newer number locks out older runtimes for nothing
EXPERTS = ("sparse", "rank", "qmoe", "auto")
BLOCKS = (256, 128, 64, 32, 16)  # MatMulNBits takes no other (ONNX Runtime 1.31)
STORED_BITS = {2: 2, 3: 4, 4: 4, 8: 8}  # bits of the scheme -> bits in the file
SINGLE_FILE_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; above, the weights go to a file beside


def _runtime() -> SimpleNamespace:
    """The packages of the extra `export`, imported here so that the rest of edgelab works without them."""
    try:
        import onnx
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as e:
        name = e.name or "onnxruntime"
        raise ExportError(f'{name} is not installed; export to ONNX needs the extra `export`: pip install "edgelab[export]"') from e
    return SimpleNamespace(onnx=onnx, ir=onnx_ir, ort=onnxruntime)


# ------------------------------------------------------------------------------------------------- codes in the file


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A weight [out, in] as `MatMulNBits` wants it: see the module. `repeat`: blocks that share one scale."""

    name: str
    q: QTensor
    bits: int
    block: int
    repeat: int

    @classmethod
    def of(cls, name: str, q: QTensor) -> "_Blocks":
        bits, (_, n) = STORED_BITS[q.scheme.bits], q.shape
        grouped = isinstance(q.scheme.granularity, PerGroup)
        run = q.scheme.granularity.size if grouped else n  # inputs that share a scale
        block = next((b for b in BLOCKS if run % b == 0), None)
        if block is None and grouped:
            raise ExportError(f"{name}: group_size={run} is no multiple of 16, the smallest block of MatMulNBits; use 16, 32, 64 or 128")
        block = block or 16  # one scale per row: the last block is filled up
        return cls(name, q, bits, block, -(-run // block))

    @property
    def count(self) -> int:
        """Blocks per row."""
        return -(-self.q.shape[1] // self.block)

    @property
    def code_bytes(self) -> int:
        return self.q.shape[0] * self.count * self.block * self.bits // 8

    @property
    def nbytes(self) -> int:
        return self.code_bytes + self.q.scales.nbytes

    def codes(self) -> np.ndarray:
        """uint8 [out, blocks, block * bits / 8]."""
        out, n = self.q.shape
        packed, zero = self.q.packed, 2 ** (self.bits - 1)
        width = self.count * self.block
        if self.bits != self.q.scheme.bits or width != n:
            wide = np.full((out, width), zero, np.uint8)
            wide[:, :n] = self.q.codes() + np.uint8(zero - self.q.scheme.zero_point)
            packed = pack(wide, self.bits)
        return packed.reshape(out, self.count, -1)

    def restored(self, codes: np.ndarray) -> np.ndarray:
        """Codes uint8 [out, in] of the scheme, from the file's."""
        out, n = self.q.shape
        wide = unpack(codes.reshape(out, -1), self.bits, self.count * self.block)[:, :n]
        return wide - np.uint8(2 ** (self.bits - 1) - self.q.scheme.zero_point)


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one opaque node stands for: its weights by part ("weight", "gate_up.3", ...), codes or float32 [out, in]."""

    name: str
    kind: str  # "linear" | "embedding" | "experts"
    weights: dict[str, "_Blocks | Tensor"]
    biases: dict[str, Tensor]
    source: nn.Module | None = None
    num_experts: int = 0
    interleaved: bool = False


def _in_turn(rows: np.ndarray) -> np.ndarray:
    """[experts, rows, ...] with the first and the second half of the rows in turn: gate 0, up 0, gate 1, ..."""
    n, both = rows.shape[:2]
    return rows.reshape(n, 2, both // 2, *rows.shape[2:]).swapaxes(1, 2).reshape(rows.shape)


def _apart(rows: np.ndarray) -> np.ndarray:
    """The inverse of `_in_turn`."""
    n, both = rows.shape[:2]
    return rows.reshape(n, both // 2, 2, *rows.shape[2:]).swapaxes(1, 2).reshape(rows.shape)


def _fusible(layer: _Layer) -> _Blocks:
    """One weight of a stack that `QMoE` can take. Raises ExportError for one it can't."""
    weights = list(layer.weights.values())
    way_out = 'export with experts="sparse"'
    if not all(isinstance(w, _Blocks) for w in weights):
        raise ExportError(f"{layer.name} is not quantized, and QMoE multiplies with codes; {way_out}")
    kinds = {(w.bits, w.block, w.repeat, w.q.shape[1] % w.block) for w in weights}
    if len(kinds) > 1 or weights[0].repeat > 1 or weights[0].q.shape[1] % weights[0].block:
        said = " and ".join(sorted({str(w.q.scheme) for w in weights}))
        raise ExportError(f"{layer.name} is {said}; QMoE wants groups of 16, 32, 64, 128 or 256, the same in the whole stack; {way_out}")
    if weights[0].bits == 8:
        raise ExportError(f"{layer.name} has 8 bits, for which QMoE rounds the activations to int8 whatever it is told; {way_out}")
    act = getattr(layer.source, "act_fn", None)
    if not layer.interleaved and kind_of(act) not in ("silu", "mul_sigmoid"):
        raise ExportError(
            f"{layer.name} has {kind_of(act) or type(act).__name__} between its products; QMoE as written here has SiLU; {way_out}"
        )
    return weights[0]


def _best(layers: list[tuple[nn.Module, _Layer, int]]) -> str:
    """What "auto" stands for."""
    try:
        for _, layer, _ in layers:
            if layer.kind == "experts":
                _fusible(layer)
    except ExportError:
        return "sparse"
    return "qmoe"


class _Opaque(nn.Module):
    """Stands for a layer while the skeleton is traced: one node of the domain `edgelab` that bears the layer's name."""

    def __init__(self, layer: _Layer, features: int) -> None:
        super().__init__()
        self.layer, self.features = layer.name, features

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """`x` is [..., in], or ids [...] for an embedding; experts also get their top-k indices and weights."""
        lead = x.shape[:-1] if x.is_floating_point() else x.shape
        attributes = {"layer": self.layer} | ({"k": more[0].shape[-1]} if more else {})
        return torch.onnx.ops.symbolic(
            "edgelab::Layer", (x, *more), attributes, dtype=torch.float32, shape=(*lead, self.features), version=1
        )


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, _Layer, int]]:
    """(module, what it becomes, features it puts out) of every layer that is exported as an opaque node."""
    shared: dict[tuple, str] = {}  # a tied pair is one weight: both read the initializer of the first

    def blocks(name: str, q: QTensor) -> _Blocks:
        return _Blocks.of(shared.setdefault((q.packed.ctypes.data, q.shape, q.scheme), name), q)

    layout = family_of(model).experts
    for name, module in model.named_modules():
        if isinstance(module, QLinear | QEmbedding):
            q = module.qtensors()["weight"]
            bias = getattr(module, "bias", None)
            biases = {} if bias is None else {"weight": bias.detach()}
            kind = "linear" if isinstance(module, QLinear) else "embedding"
            yield module, _Layer(name, kind, {"weight": blocks(name, q)}, biases), q.shape[0 if kind == "linear" else 1]
        elif isinstance(module, QExperts):
            stacks = {"gate_up": module.qtensors()["gate_up_proj"], "down": module.qtensors()["down_proj"]}
            count = module.num_experts
            parts = {f"{part}.{e}": blocks(f"{name}.{part}.{e}", q[e]) for part, q in stacks.items() for e in range(count)}
            both = {"gate_up": module.gate_up_bias, "down": module.down_bias}
            biases = {f"{part}.{e}": b.detach()[e] for part, b in both.items() if b is not None for e in range(count)}
            layer = _Layer(name, "experts", parts, biases, module, count, module.glu != "chunk")
            yield module, layer, module.hidden_dim
        elif layout and getattr(getattr(module, layout.gate_up, None), "ndim", 0) == 3:
            stacks = {"gate_up": getattr(module, layout.gate_up).detach(), "down": getattr(module, layout.down).detach()}
            if layout.transposed:
                stacks = {part: w.transpose(-1, -2) for part, w in stacks.items()}
            count = stacks["down"].shape[0]
            parts = {f"{part}.{e}": w[e] for part, w in stacks.items() for e in range(count)}
            both = {part: getattr(module, f"{getattr(layout, part)}_bias") for part in stacks} if layout.biased else {}
            biases = {f"{part}.{e}": b.detach()[e] for part, b in both.items() for e in range(count)}
            yield module, _Layer(name, "experts", parts, biases, module, count, layout.interleaved), stacks["down"].shape[1]


# ---------------------------------------------------------------------------------------------------- the skeleton


class _ByComparison(TorchFunctionMode):
    """While it is active, top-k, gather and scatter along the last dimension are comparisons, products and sums.

    The rank of a value is the number of larger ones, plus the equal ones before it; the k-th output is the value whose
    rank is k. n**2 comparisons for n values: n is the number of experts.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        match getattr(func, "__name__", ""):
            case "topk":
                return self._topk(*args, **kwargs)
            case "gather" if args[1] in (-1, args[0].ndim - 1):
                x, _, index = args
                hit = index[..., None] == torch.arange(x.shape[-1])
                return torch.where(hit, x[..., None, :], torch.zeros((), dtype=x.dtype)).sum(-1)
            case "scatter_" if args[1] in (-1, args[0].ndim - 1) and not isinstance(args[3], Tensor):
                x, _, index, value = args
                hit = (index[..., None] == torch.arange(x.shape[-1])).any(-2)
                return x.copy_(torch.where(hit, torch.full((), value, dtype=x.dtype), x))
        return func(*args, **kwargs)

    @staticmethod
    def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True):
        if dim not in (-1, x.ndim - 1) or not largest:
            raise ExportError('experts="rank" rewrites top-k of the largest along the last dimension only; use experts="sparse"')
        place = torch.arange(x.shape[-1])
        mine, other = x[..., :, None], x[..., None, :]
        ahead = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
        hit = ahead.to(torch.int64).sum(-1)[..., None] == torch.arange(k)  # [..., n, k]
        values = torch.where(hit, mine, torch.zeros((), dtype=x.dtype)).sum(-2)
        return torch.return_types.topk((values, (hit.to(torch.int64) * place[:, None]).sum(-2)))


class _Causal(nn.Module):
    """input_ids (and with a cache the mask and the past) -> logits (and the present), with the position ids and the additive mask
    made here: transformers' own way of making masks does not trace to plain operators."""

    def __init__(self, model: nn.Module, by_comparison: bool, cache: bool) -> None:
        super().__init__()
        self.model, self.by_comparison, self.cache = model, by_comparison, cache
        config = model.config.get_text_config()
        self.window = getattr(config, "sliding_window", None)
        self.kinds = sorted(set(getattr(config, "layer_types", None) or ())) or ["sliding_attention" if self.window else "full_attention"]
        unknown = set(self.kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ExportError(f"attention of kind {', '.join(sorted(unknown))} cannot be exported; full and sliding attention can")

    def _mask(self, behind: Tensor, present: Tensor | None):
        """What is added to the scores [.., query, key], by kind of attention; `behind`: how far back the key lies."""
        masks = {}
        for kind in self.kinds:
            seen = behind >= 0
            if kind == "sliding_attention" and self.window:
                seen = seen & (behind < self.window)
            if present is not None:
                seen = seen & present
            masks[kind] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            masks[kind] = masks[kind][None, None] if masks[kind].ndim == 2 else masks[kind][:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past: list[Tensor] = ()):
        """`past`: key and value of each layer in turn."""
        length = input_ids.shape[1]
        if self.cache:
            before = past[0].shape[2]
            at = torch.arange(before + length)
            mask = self._mask(at[before:, None] - at[None, :], attention_mask[:, None, :] != 0)
            where = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
            cache = DynamicCache()
            for i in range(0, len(past), 2):
                cache.update(past[i], past[i + 1], i // 2)
            call = {"past_key_values": cache, "use_cache": True}
        else:
            at = torch.arange(length)
            mask, where, call = self._mask(at[:, None] - at[None, :], None), at[None, :], {"use_cache": False}
        with _ByComparison() if self.by_comparison else nullcontext():
            out = self.model(input_ids=input_ids, attention_mask=mask, position_ids=where, **call)
        if not self.cache:
            return out.logits
        return out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def _past_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, width) of key and value of each layer in turn, as transformers caches them."""
    cache = model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=True).past_key_values
    kinds = {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if kinds:
        raise ExportError(f"a cache of {', '.join(sorted(kinds))} cannot be exported; one of keys and values can: export with cache=False")
    return [(t.shape[1], t.shape[3]) for layer in cache.layers for t in (layer.keys, layer.values)]


def _skeleton(model: nn.Module, layers: list[tuple[nn.Module, _Layer, int]], experts: str, cache: bool) -> nn.Module:
    """A copy of `model` in float32 with eager attention and `_Opaque` layers. Tensors are shared with the original."""
    memo: dict[int, object] = {id(module): _Opaque(layer, features) for module, layer, features in layers}
    for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        value = t.detach().float() if t.is_floating_point() else t.detach()
        memo[id(t)] = nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value
    twin = copy.deepcopy(model, memo).eval()
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    return _Causal(twin, experts == "rank", cache).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns of packages it does not need and of its own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace(skeleton: nn.Module, vocabulary: int, past: list[tuple[int, int]]):
    """The skeleton as an onnx_ir.Model. `past`: (heads, width) of each tensor of the cache; empty without one."""
    free = torch.export.Dim.DYNAMIC
    inputs, shapes = [torch.arange(14).reshape(2, 7) % vocabulary], [{0: free, 1: free}]
    if past:
        inputs += [torch.ones((2, 12), dtype=torch.int64), [torch.zeros(2, heads, 5, width) for heads, width in past]]
        shapes += [{0: free, 1: free}, [{0: free, 2: free}] * len(past)]
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(skeleton, tuple(inputs), dynamic_shapes=tuple(shapes), strict=False)
            return torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False).model
    except ExportError:
        raise
    except Exception as e:  # torch wraps what went wrong several times; the first line says it
        kind = type(skeleton.model).__name__
        raise ExportError(f"torch could not trace {kind}: {type(e).__name__}: {str(e).strip().splitlines()[0]}") from e


# ------------------------------------------------------------------------------------------------- nodes for layers


class _Writer:
    """Makes the nodes that one opaque node stands for. Methods return values of the graph; `nodes` collects."""

    def __init__(self, ir, graph, accuracy_level: int, experts: str) -> None:
        self.ir, self.graph, self.accuracy_level, self.experts_as = ir, graph, accuracy_level, experts
        self.nodes: list = []
        self.layers = 0  # written so far
        self._scales: dict[str, object] = {}

    def op(self, kind: str, *inputs, domain: str = "", **attributes):
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(self, kind: str, *inputs, outputs: int, domain: str = "", **attributes):
        node = self.ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        for i, value in enumerate(node.outputs):  # the layer's number, not its name: names were 2 % of a small file
            value.name = f"{self.layers}/{len(self.nodes)}" + f".{i}" * (outputs > 1)
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: np.ndarray, name: str):
        """The initializer `name`; made on first use."""
        if name not in self.graph.initializers:
            value = self.ir.Value(name=name, const_value=self.ir.tensor(array, name=name))
            value.shape, value.type = self.ir.Shape(array.shape), self.ir.TensorType(value.const_value.dtype)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def integers(self, *values: int):
        return self.constant(np.array(values, np.int64), f"ints[{','.join(map(str, values))}]")

    def scales(self, w: _Blocks):
        """float32 [out, blocks]; float16 in the file."""
        s = self.op("Cast", self.constant(w.q.scales, f"{w.name}.scales"), to=self.ir.DataType.FLOAT)
        if isinstance(w.q.scheme.granularity, PerTensor) or w.repeat > 1:
            rows, groups = w.q.scales.shape
            s = self.op("Reshape", s, self.integers(rows, groups, 1))
            s = self.op("Expand", s, self.integers(w.q.shape[0], groups, w.repeat))
            s = self.op("Reshape", s, self.integers(w.q.shape[0], w.count))
        return s

    def codes(self, w: _Blocks):
        name = f"{w.name}.codes"
        return self.graph.initializers[name] if name in self.graph.initializers else self.constant(w.codes(), name)

    def product(self, x, layer: _Layer, part: str):
        """x W^T (+ bias)."""
        w = layer.weights[part]
        if isinstance(w, _Blocks):
            out, n = w.q.shape
            attributes = {"K": n, "N": out, "bits": w.bits, "block_size": w.block, "accuracy_level": self.accuracy_level}
            y = self.op("MatMulNBits", x, self.codes(w), self.scales(w), domain="com.microsoft", **attributes)
        else:
            w = np.ascontiguousarray(w.float().numpy().T)
            y = self.op("MatMul", x, self.constant(w, f"{layer.name}.{part}.weight"))
        if part in layer.biases:
            y = self.op("Add", y, self.constant(layer.biases[part].float().numpy(), f"{layer.name}.{part}.bias"))
        return y

    def embedding(self, ids, layer: _Layer):
        w = layer.weights["weight"]
        data = self.codes(w)
        if w.count * w.block != w.q.shape[1]:  # a filled-up row would give a wider vector: this operator fills up by itself
            wide = w.restored(w.codes()) + np.uint8(2 ** (w.bits - 1) - w.q.scheme.zero_point)
            data = self.constant(pack(wide, w.bits)[:, None], f"{w.name}.gather_codes")
        data = self.op("Reshape", data, self.integers(w.q.shape[0], -1))
        attributes = {"bits": w.bits, "block_size": w.block, "gather_axis": 0, "quantize_axis": 1}
        return self.op("GatherBlockQuantized", data, ids, self.scales(w), domain="com.microsoft", **attributes)

    def activation(self, x, fn: Callable, name: str):
        """`fn`, one of `fold.KINDS`, in the operators of opset 20; `name` for the error."""

        def number(value: float):
            return self.constant(np.array(value, np.float32), f"number[{value:.9g}]")

        def gated(y, slope: float = 1.0):
            return self.op("Mul", y, self.op("Sigmoid", y if slope == 1 else self.op("Mul", y, number(slope))))

        match kind_of(fn):
            case "silu" | "mul_sigmoid":
                return gated(x)
            case "gelu" | "gelu_tanh" as kind:
                return self.op("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")
            case "gelu_erf":
                erf = self.op("Erf", self.op("Mul", x, number(0.5**0.5)))
                return self.op("Mul", self.op("Mul", x, number(0.5)), self.op("Add", erf, number(1)))
            case "quick_gelu":
                return gated(x, QUICK)
            case "scaled_gelu":
                return self.op("Mul", self.op("Gelu", self.op("Mul", x, number(1 / QUICK))), number(QUICK))
            case "scaled_quick_gelu":
                return self.op("Mul", gated(self.op("Mul", x, number(1 / QUICK)), QUICK), number(QUICK))
            case "hardswish":
                return self.op("HardSwish", x)
            case "mul_relu6":
                six = self.op("Clip", self.op("Add", x, number(3)), number(0), number(6))
                return self.op("Mul", self.op("Mul", x, six), number(1 / 6))
            case "relu":
                return self.op("Relu", x)
        called = getattr(fn, "__name__", None) or type(fn).__name__
        raise ExportError(f"{name}: the experts' activation {called} has no ONNX form here; those of edgelab.fold.KINDS have")

    def expert(self, x, e: int, layer: _Layer):
        """[n, hidden] of the expert `e` for tokens [n, hidden]."""
        wide = self.product(x, layer, f"gate_up.{e}")
        if layer.interleaved:  # gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), clamped
            end, axis, step = self.integers(2**31 - 1), self.integers(-1), self.integers(2)
            gate, up = (self.op("Slice", wide, self.integers(start), end, axis, step) for start in (0, 1))
            limit, low, alpha, one = (
                self.constant(np.array(v, np.float32), f"{layer.name}.{k}")
                for k, v in (("limit", layer.source.limit), ("low", -layer.source.limit), ("alpha", layer.source.alpha), ("one", 1))
            )
            gate, up = self.op("Min", gate, limit), self.op("Clip", up, low, limit)
            gate = self.op("Mul", gate, self.op("Sigmoid", self.op("Mul", gate, alpha)))
            inner = self.op("Mul", self.op("Add", up, one), gate)
        else:
            gate, up = self.ops("Split", wide, outputs=2, axis=-1, num_outputs=2)
            inner = self.op("Mul", self.activation(gate, layer.source.act_fn, layer.name), up)
        return self.product(inner, layer, f"down.{e}")

    def stack(self, layer: _Layer, part: str, what: str, of_one: Callable[[str], np.ndarray]):
        """The initializer [experts, rows, ...] of an array of each expert's `part`; gate's and up's rows in turn."""
        each = np.stack([of_one(f"{part}.{e}") for e in range(layer.num_experts)])
        if part == "gate_up" and not layer.interleaved:
            each = _in_turn(each)
        return self.constant(np.ascontiguousarray(each), f"{layer.name}.{part}.{what}")

    def fused(self, x, index, weight, layer: _Layer, k: int):
        """What `experts` gives, by one QMoE node: the router's weights are spread over all experts, and zeros are not chosen."""
        one = _fusible(layer)
        rows = self.op("Slice", self.op("Shape", x), self.integers(0), self.integers(1))
        zeros = self.op("ConstantOfShape", self.op("Concat", rows, self.integers(layer.num_experts), axis=0))
        spread = self.op("ScatterElements", zeros, index, weight, axis=1)
        inputs = [x, spread]
        for part in ("gate_up", "down"):
            codes = self.stack(layer, part, "codes", lambda p: layer.weights[p].codes().reshape(layer.weights[p].q.shape[0], -1))
            scales = self.stack(layer, part, "scales", lambda p: layer.weights[p].q.scales)
            biased = f"{part}.0" in layer.biases
            bias = self.stack(layer, part, "bias", lambda p: layer.biases[p].float().numpy()) if biased else None
            inputs += [codes, self.op("Cast", scales, to=self.ir.DataType.FLOAT), bias]
        settings = {"k": k, "expert_weight_bits": one.bits, "block_size": one.block, "activation_type": "swiglu", "swiglu_fusion": 1}
        settings |= {"activation_alpha": 1.0, "activation_beta": 0.0}
        if layer.interleaved:  # gpt-oss
            settings |= {"activation_alpha": layer.source.alpha, "activation_beta": 1.0, "swiglu_limit": layer.source.limit}
        if self.accuracy_level == 4:  # younger than the operator: written where it says something
            settings["accuracy_level"] = 4
        return self.op("QMoE", *inputs, *[None] * 6, spread, domain="com.microsoft", **settings)

    def experts(self, x, index, weight, layer: _Layer):
        """[tokens, hidden] from x [tokens, hidden], index and weight [tokens, k]."""
        if self.experts_as == "sparse":
            total = self.op("ConstantOfShape", self.op("Shape", x), value=self.ir.tensor(np.zeros(1, np.float32)))
        for e in range(layer.num_experts):
            chosen = self.op("Equal", index, self.integers(e))
            if self.experts_as == "sparse":
                where = self.op("Transpose", self.op("NonZero", chosen), perm=[1, 0])  # [n, (token, choice)]
                token = self.op("Slice", where, self.integers(0), self.integers(1), self.integers(1))  # [n, 1]
                y = self.expert(self.op("GatherND", x, token), e, layer)
                y = self.op("Mul", y, self.op("Unsqueeze", self.op("GatherND", weight, where), self.integers(-1)))
                total = self.op("ScatterND", total, token, y, reduction="add")
            else:
                zero = self.constant(np.zeros((), np.float32), "zero")
                share = self.op("ReduceSum", self.op("Where", chosen, weight, zero), self.integers(-1), keepdims=1)
                y = self.op("Mul", self.expert(x, e, layer), share)
                total = y if e == 0 else self.op("Add", total, y)
        return total

    def write(self, node, layer: _Layer) -> None:
        """Replace the opaque `node` by what `layer` is."""
        self.nodes, self.layers = [], self.layers + 1
        inputs = list(node.inputs)
        match layer.kind:
            case "linear":
                value = self.product(inputs[0], layer, "weight")
            case "embedding":
                value = self.embedding(inputs[0], layer)
            case _ if self.experts_as == "qmoe":
                value = self.fused(*inputs, layer, node.attributes["k"].as_int())
            case _:
                value = self.experts(*inputs, layer)
        self.ir.convenience.replace_nodes_and_values(self.graph, node, [node], self.nodes, [node.outputs[0]], [value])


def _strip(ir, model, vocabulary: int, past: list[tuple[int, int]], fixed: tuple[int, int] | None) -> None:
    """Take out what the tracer left for debuggers (stack traces: 15 % of a small file), and shapes that are inferred anyway; name the
    inputs and outputs."""
    graph = model.graph
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = value.type = None
    integers, floats = ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.FLOAT)
    batch, sequence = fixed or ("batch", "sequence")
    inputs = [("input_ids", [batch, sequence], integers)]
    outputs = [("logits", [batch, sequence, vocabulary], floats)]
    if past:
        inputs.append(("attention_mask", ["batch", "total"], integers))
        for i, (heads, width) in enumerate(past):
            which = f"{i // 2}.{('key', 'value')[i % 2]}"
            inputs.append((f"past_key_values.{which}", ["batch", heads, "past", width], floats))
            outputs.append((f"present.{which}", ["batch", heads, "total", width], floats))
    for values, wanted in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, (name, shape, kind) in zip(values, wanted, strict=True):
            value.name, value.shape, value.type = name, ir.Shape(shape), kind


def _unname(graph) -> None:
    """Take out what every reader can do without, 1 % of a small file: names of nodes, shapes and types said twice of initializers."""
    for node in graph:
        node.name = ""
    for value in graph.initializers.values():
        value.shape = value.type = None


# --------------------------------------------------------------------------------------------------------- the doors


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    cache: bool = False,
    fixed: tuple[int, int] | None = None,
    experts: str = "sparse",
    accuracy_level: int = 1,
    check: bool = True,
    single_file_bytes: int = SINGLE_FILE_BYTES,
) -> ExportResult:
    """The verified ONNX file of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model. `out`: the file to write, or a folder (then `model.onnx` in it).
    `cache`: keys and values of the past are inputs and outputs, for generation. `fixed`: (rows, tokens) that the file takes, no others,
    for runtimes and accelerators that plan ahead; without a cache. Quantized layers become `MatMulNBits` with the
    model's own codes, the rest float32. `experts`: "sparse", "rank", "qmoe", "auto" (see the module). `accuracy_level`, of `MatMulNBits`: 1
    computes with float32 activations, as `QLinear` does; 4 quantizes them to int8, faster, and about 1e-2 off: not within the parity
    that `check` asks for on every model. `check=False` leaves out `verify`. From `single_file_bytes` on the weights go to a second
    file, `<out>.data`.

    Raises ExportError when the packages of the extra `export` are missing, when the model cannot be exported, and when
    the written file does not pass `verify`; nothing is left under `out` then.
    """
    needed = _runtime()
    ir = needed.ir
    if experts not in EXPERTS:
        raise ExportError(f"experts={experts!r} is not one of {', '.join(EXPERTS)}")
    if accuracy_level not in (0, 1, 4):
        raise ExportError(f"accuracy_level={accuracy_level!r} is not one of 0, 1 (float32 activations) or 4 (int8 activations)")
    if fixed is not None and (cache or len(fixed) != 2 or min(fixed) < 1):
        why = "a cache grows; export without it" if cache else "it is two numbers from 1 on: rows and tokens"
        raise ExportError(f"fixed={fixed!r}: {why}")
    model = causal_lm(model)
    out = Path(out)
    path = place(out, "model.onnx")
    began = time.perf_counter()

    refuse_other_arithmetic(model)
    layers = list(_layers(model))
    experts = _best(layers) if experts == "auto" else experts
    vocabulary = model.config.get_text_config().vocab_size
    past = _past_shapes(model) if cache else []
    traced = _trace(_skeleton(model, layers, experts, cache), vocabulary, past)
    graph = traced.graph
    _strip(ir, traced, vocabulary, past, fixed)
    for value in list(graph.initializers.values()):  # the wrapper's name is not the reader's business
        del graph.initializers[value.name]
        value.name = value.name.removeprefix("model.")
        graph.initializers[value.name] = value
    by_name = {layer.name: layer for _, layer, _ in layers}
    writer = _Writer(ir, graph, accuracy_level, experts)
    for node in [n for n in graph if n.domain == "edgelab"]:
        writer.write(node, by_name[node.attributes["layer"].as_string()])
    if writer.nodes or "com.microsoft" not in graph.opset_imports:
        traced.opset_imports["com.microsoft"] = 1
    traced.opset_imports.pop("edgelab", None)
    ir.passes.common.RemoveUnusedNodesPass()(traced)
    _unname(graph)
    traced.ir_version = IR_VERSION
    traced.producer_name, traced.producer_version = "edgelab", _version()
    schemes = sorted({str(w.q.scheme) for _, w in _codes(layers)})
    traced.metadata_props["edgelab"] = json.dumps(
        {
            "schemes": schemes,
            "experts": experts,
            "accuracy_level": accuracy_level,
            "cache": cache,
            "activations": sorted(set(activations(model).values())),
        }
    )

    weight_bytes = sum(v.const_value.nbytes for v in graph.initializers.values())
    beside = f"{path.name}.data" if weight_bytes >= single_file_bytes else None
    places = (path, *([path.with_name(beside)] if beside else []))  # the graph last into place: where it is, its weights are
    with whole_or_nothing(*places) as files:
        ir.save(traced, files[0], external_data=beside)
        result = _count(model, layers, files)
        result = replace(result, notes=_notes(layers, experts), seconds=time.perf_counter() - began)
        if check:
            result = verify(result, model)
    return replace(result, files=places, seconds=time.perf_counter() - began)


def _version() -> str:
    import edgelab

    return edgelab.__version__


def _codes(layers: list[tuple[nn.Module, _Layer, int]]) -> list[tuple[str, _Blocks]]:
    """(kind of layer, weight) of all that is stored as codes; a tied pair once."""
    found = {w.name: (layer.kind, w) for _, layer, _ in layers for w in layer.weights.values() if isinstance(w, _Blocks)}
    return list(found.values())


def _notes(layers: list[tuple[nn.Module, _Layer, int]], experts: str) -> tuple[str, ...]:
    codes = [w for _, w in _codes(layers)]
    notes = []
    widened = [w for w in codes if w.bits != w.q.scheme.bits]
    if widened:
        more = sum(w.nbytes - w.q.nbytes for w in widened)
        notes.append(f"{len(widened)} weights of 3 bits are stored as 4 bits, the same values: {more:,} bytes more than their codes need")
    if any(layer.kind == "experts" for _, layer, _ in layers):
        how = {"sparse": "per routed token", "rank": "for all tokens, top-k by comparisons", "qmoe": "as one node per stack"}
        notes.append(f"experts written {how[experts]} ({experts})")
    return tuple(notes)


def _count(model: nn.Module, layers: list[tuple[nn.Module, _Layer, int]], files: tuple[Path, ...]) -> ExportResult:
    """What the model asks for and how large the files are; `verify` replaces the quantized counts by the file's own."""
    codes = _codes(layers)
    floats = sum(p.numel() for p in model.parameters())
    quantized = sum(prod(w.q.shape) for _, w in codes)
    stacks = (w for _, layer, _ in layers if layer.kind == "experts" for w in layer.weights.values())
    experts = sum(prod(w.q.shape) if isinstance(w, _Blocks) else w.numel() for w in stacks)
    expert_codes = sum(prod(w.q.shape) for kind, w in codes if kind == "experts")
    predicted = sum(w.nbytes for _, w in codes) + 4 * floats
    size = sum(f.stat().st_size for f in files)
    return ExportResult("onnx", files, size, predicted, floats + quantized, quantized, experts, expert_codes)


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float = MIN_COSINE, seed: int = 0
) -> ExportResult:
    """`result` with the parity that ONNX Runtime reached and the counts found in the file.

    Opens the file again. First its initializers: every code and every float16 scale must be bit for bit the model's, the
    nodes that read them must say the right shape, bits and block, and nothing quantized may be missing; norms, routers and biases must
    be the model's too. Then its logits,
    on random tokens of each of `lengths`, against `model` itself (its quantized layers, the same codes).

    Raises ExportError for a changed code, a missing weight, a size off the prediction, or a cosine below `min_cosine`.
    """
    needed = _runtime()
    layers = list(_layers(model))
    expected = _count(model, layers, result.files)
    try:
        held = needed.onnx.load(str(result.files[0]))
    except Exception as e:  # protobuf's own errors, and a missing file of weights
        raise ExportError(f"{result.files[0].name} is no ONNX file, or a damaged one: {str(e).strip()[:200]}") from e
    graph, stated = held.graph, _stated(held)
    kinds = sorted(set(activations(model).values()))
    if stated.get("activations", kinds) != kinds:
        was = ", ".join(stated["activations"])
        raise ExportError(
            f"{result.files[0].name} was made of a model with {was}; this one has {', '.join(kinds)}: apply the same fallback"
        )
    quantized, experts = _check_codes(needed.onnx, graph, layers)
    _check_floats(needed.onnx, graph, model)
    if quantized != expected.weights_quantized or experts != expected.experts_quantized:
        raise ExportError(
            f"{result.files[0].name} holds {quantized:,} quantized weights, {experts:,} of them experts'; "
            f"the model has {expected.weights_quantized:,} and {expected.experts_quantized:,}"
        )
    # what the graph itself takes: some 150 bytes a node and its names
    allowed = expected.predicted_bytes // 100 + 400 * (len(graph.node) + len(graph.initializer)) + 2**16
    if expected.bytes > expected.predicted_bytes + allowed:  # fewer is well: the tracer merges floats that are equal
        raise ExportError(
            f"{result.files[0].name} has {expected.bytes:,} bytes; the weights take {expected.predicted_bytes:,} "
            f"and the graph at most {allowed:,}: a weight went out in another form"
        )
    parity, lengths = _parity(needed.ort, result.files[0], model, lengths, seed)
    advice = (
        "Export with accuracy_level=1 (float32 activations), or lower min_cosine knowingly" if stated.get("accuracy_level") == 4 else ""
    )
    require(parity, f"{result.files[0].name} in ONNX Runtime", min_cosine, advice)
    by = f"onnxruntime {needed.ort.__version__} CPUExecutionProvider, {' + '.join(map(str, lengths))} tokens"
    return replace(expected, notes=result.notes, seconds=result.seconds, parity=parity, verified_by=by)


def _check_codes(onnx, graph, layers: list[tuple[nn.Module, _Layer, int]]) -> tuple[int, int]:
    """(weights, expert weights) that the file really holds as codes and reads by a quantized operator."""
    stored = {t.name: t for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}

    def origin(name: str) -> str:
        """The initializer behind a value that is only cast, reshaped or expanded."""
        while name in makers and makers[name].op_type in ("Cast", "Reshape", "Expand"):
            name = makers[name].input[0]
        return name

    arrays = {name: onnx.numpy_helper.to_array(t) for name, t in stored.items() if name.endswith(("codes", ".scales"))}
    readers: dict[str, list] = {}
    for node in graph.node:
        if node.op_type == "QMoE":
            _unfuse(node, origin, arrays, readers, layers)
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            at = 1 if node.op_type == "MatMulNBits" else 0
            settings = {a.name: a.i for a in node.attribute}
            readers.setdefault(origin(node.input[at]), []).append((node.op_type, origin(node.input[2]), settings))
    found = {"linear": 0, "embedding": 0, "experts": 0}
    for kind, w in _codes(layers):
        (out, n), where = w.q.shape, f"{w.name} ({w.q.scheme})"
        names = [name for name in (f"{w.name}.codes", f"{w.name}.gather_codes") if name in readers]
        if not names:
            raise ExportError(f"{where}: no MatMulNBits or GatherBlockQuantized node reads its codes")
        for name in names:
            for op_type, scales, settings in readers[name]:
                right = {"bits": w.bits, "block_size": w.block} | ({"K": n, "N": out} if op_type != "GatherBlockQuantized" else {})
                wrong = {k: settings.get(k) for k, v in right.items() if settings.get(k) != v}
                if wrong or scales != f"{w.name}.scales":
                    raise ExportError(f"{where}: its {op_type} node has {wrong or scales}; {right} was written")
            codes = arrays[name]
            if name.endswith(".gather_codes"):
                same = np.array_equal(unpack(codes[:, 0], w.bits, n), w.q.codes() + np.uint8(2 ** (w.bits - 1) - w.q.scheme.zero_point))
            else:
                same = codes.nbytes == w.code_bytes and np.array_equal(w.restored(codes), w.q.codes())
            if not same:
                raise ExportError(f"{where}: the codes in the file are not the model's")
        scales = arrays[f"{w.name}.scales"]
        if scales.dtype != np.float16 or not np.array_equal(scales.view(np.uint16), w.q.scales.view(np.uint16)):
            raise ExportError(f"{where}: the scales in the file are not the model's")
        found[kind] += out * n
    if strange := sorted(set(readers) - {f"{w.name}.{how}" for _, w in _codes(layers) for how in ("codes", "gather_codes")}):
        raise ExportError(f"the file holds {strange[0]}, which is no quantized weight of the model: it was made of another one")
    return sum(found.values()), found["experts"]


def _stated(held) -> dict:
    """What `export` wrote into the file about how it was made; {} where that is not to be had."""
    try:
        stated = json.loads({p.key: p.value for p in held.metadata_props}.get("edgelab", "{}"))
    except ValueError:
        return {}
    return stated if isinstance(stated, dict) else {}


def _check_floats(onnx, graph, model: nn.Module) -> None:
    """Norms, routers, biases and what else is stored under its own name must be the model's to the bit. (The tracer merges those that are
    equal: not every one is there.)"""
    stored = {t.name: t for t in graph.initializer}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and value.is_floating_point() and not name.endswith(".scales"):
            held, ours = onnx.numpy_helper.to_array(stored[name]), value.detach().float().numpy()
            if not any(np.array_equal(held, form) for form in (ours, ours.T)):
                raise ExportError(f"{name}: the floats in the file are not the model's")


def _unfuse(node, origin: Callable, arrays: dict, readers: dict, layers: list[tuple[nn.Module, _Layer, int]]) -> None:
    """Enter what a QMoE node reads under the names of its experts' weights, as if each had a MatMulNBits node of its own."""
    given = {a.name: a.i for a in node.attribute}
    stacks = {layer.name: layer for _, layer, _ in layers if layer.kind == "experts"}
    for part, at in (("gate_up", 2), ("down", 5)):
        codes, scales = origin(node.input[at]), origin(node.input[at + 1])
        layer = stacks.get(codes.removesuffix(f".{part}.codes"))
        if layer is None or scales != f"{layer.name}.{part}.scales":
            raise ExportError(f"a QMoE node reads {codes} and {scales}, which are of no stack of this model")
        both = [arrays[codes], arrays[scales]]
        if part == "gate_up" and not layer.interleaved:
            both = [_apart(a) for a in both]
        for e, (c, s) in enumerate(zip(*both, strict=True)):
            name = f"{layer.name}.{part}.{e}"
            settings = {"bits": given["expert_weight_bits"], "block_size": given["block_size"]}
            n = c.shape[1] * 8 // settings["bits"]
            arrays[f"{name}.codes"], arrays[f"{name}.scales"] = c, s
            readers.setdefault(f"{name}.codes", []).append(("QMoE", f"{name}.scales", settings | {"K": n, "N": len(c)}))


def _parity(ort, path: Path, model: nn.Module, lengths: tuple[int, ...], seed: int):
    """(agreement of ONNX Runtime's logits with torch's, the lengths that were run: a fixed shape cuts them). A file with a cache reads half
    of the tokens at once, then a quarter, then one by one, each time on what it remembers."""
    session = _session(ort, path)
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    rows, most = session.get_inputs()[0].shape
    if fixed := isinstance(rows, int) and isinstance(most, int):
        lengths = tuple(dict.fromkeys(min(n, most) for n in lengths))

    def run(ids: np.ndarray) -> np.ndarray:
        if fixed:  # filled up on the right, which nothing on the left can see
            given = np.zeros((rows, most), np.int64)
            given[:, : len(ids)] = ids
            return session.run(["logits"], {"input_ids": given})[0][-1, : len(ids)]
        if not past:
            return session.run(["logits"], {"input_ids": ids[None]})[0][0]
        n, logits = len(ids), []
        state = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past}
        cuts = [0, n // 2, 3 * n // 4, *range(3 * n // 4 + 1, n + 1)]
        for begin, end in itertools.pairwise(cuts):
            given = {"input_ids": ids[None, begin:end], "attention_mask": np.ones((1, end), np.int64)}
            out, *present = session.run(None, given | state)
            state = dict(zip(state, present, strict=True))
            logits.append(out[0])
        return np.concatenate(logits)

    return agreement(run, model, lengths, seed), lengths


def _session(ort, path: Path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(f"ONNX Runtime refuses {path.name}: {str(e).strip().splitlines()[0]}") from e
