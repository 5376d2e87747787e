"""The model in plain operators of fixed shapes: what the exporters for phones' own runtimes trace.

LiteRT, ExecuTorch and Core ML take a graph whose shapes are known, and none of them has top-k, sort or scatter in a form that
a mixture can use. So a copy of the model is made in which

- every quantized layer is an `nn.Linear` or `nn.Embedding` that holds the dequantized weight, float32 [out, in]; the exporter puts
  codes in its place afterwards, and `Plain.weights` says which codes belong to which parameter;
- a stack of experts is one `nn.Linear` per product, every expert computes every token, and the router's weights mask the results
  (the *rank* form of `export.onnx`: top-k by counting comparisons). It costs experts / k times the work and runs everywhere;
- the mask is added, 4-D, and made here beside the position ids, because transformers' own way of making it does not trace.

`whole(plain)` computes all logits of a text of fixed length: pad on the *right* with any id and ignore the padded positions, for
no token sees those behind it. `stepped(plain, places)` is a step of generation: it takes the keys and values of `places` positions, and
one file then serves a prompt and, token by token, the answer.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import refuse_other_arithmetic
from edgelab.export.onnx import _Blocks, _ByComparison, _Causal, _layers, _past_shapes
from edgelab.layers import gated
from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup

MODES = ("exact", "dynamic")
MIN_AS_RUN = 0.98  # as in `gguf`: below this it is no rounding any more


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of the plain model: its parameter's `name`, its codes (None: floats), and what it belongs to.

    `kind`: "linear", "embedding" or "experts"; `origin`: the layer of the original model, for messages.
    """

    name: str
    kind: str
    origin: str
    q: QTensor | None


@dataclass(frozen=True, eq=False)
class Plain:
    """A causal language model in plain operators. `weights` by the name of the parameter of `model`; a tied pair has two names and
    one QTensor's memory. `floats`: parameters that are no codes and no part of `weights`."""

    model: nn.Module
    weights: Mapping[str, Weight]
    weights_total: int
    experts_total: int

    @property
    def codes(self) -> dict[str, Weight]:
        """The quantized weights; a tied pair once, under the first of its names."""
        seen: dict[tuple, Weight] = {}
        for w in self.weights.values():
            if w.q is not None:
                seen.setdefault((w.q.packed.ctypes.data, w.q.shape), w)
        return {w.name: w for w in seen.values()}

    def tied(self) -> list[QTensor]:
        """Weights that an embedding and a product share."""
        heads = {w.q.packed.ctypes.data for w in self.weights.values() if w.q is not None and w.kind == "linear"}
        return [w.q for w in self.weights.values() if w.q is not None and w.kind == "embedding" and w.q.packed.ctypes.data in heads]

    def quantized(self) -> tuple[int, int]:
        """(weights, expert weights) that are codes; a tied pair once."""
        codes = self.codes.values()
        return sum(prod(w.q.shape) for w in codes), sum(prod(w.q.shape) for w in codes if w.kind == "experts")

    def predicted_bytes(self, nbytes: Callable[[QTensor], int] = lambda q: q.nbytes) -> int:
        """Codes and scales as `nbytes` counts them, and four bytes for every other parameter."""
        return sum(nbytes(w.q) for w in self.codes.values()) + 4 * (self.weights_total - self.quantized()[0])

    def result(self, target: str, files: tuple[Path, ...], predicted: int, counted: tuple[int, int] | None = None) -> ExportResult:
        """What `export` and `verify` give back: `counted` in the file (weights, expert weights), else what the model has as codes. A
        folder counts with all that is in it."""
        quantized, in_experts = counted or self.quantized()
        size = sum(f.stat().st_size for path in files for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
        return ExportResult(target, files, size, predicted, self.weights_total, quantized, self.experts_total, in_experts)


class RankExperts(nn.Module):
    """A stack of experts as separate linears: all of them compute every token, masked by the router's weights."""

    def __init__(self, gate_up: list[nn.Linear], down: list[nn.Linear], glu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self.glu = nn.ModuleList(gate_up), nn.ModuleList(down), glu

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] from hidden_states [T, hidden], top_k_index [T, k] and top_k_weights [T, k]."""
        total = torch.zeros_like(hidden_states)
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            share = torch.where(top_k_index == e, top_k_weights, torch.zeros((), dtype=top_k_weights.dtype)).sum(-1, keepdim=True)
            total = total + down(self.glu(gate_up(hidden_states))) * share
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` around `weight` [out, in], not copied."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


def _floats(w: "_Blocks | Tensor") -> Tensor:
    """float32 [out, in], contiguous."""
    return torch.from_numpy(w.q.dequantize()) if isinstance(w, _Blocks) else w.detach().float().contiguous()


def _glu(source: nn.Module, interleaved: bool) -> Callable[[Tensor], Tensor]:
    act, limit, alpha = getattr(source, "act_fn", None), getattr(source, "limit", None), getattr(source, "alpha", None)
    return lambda y: gated(y, act, "interleaved_clamped" if interleaved else "chunk", limit, alpha)


def plain(model: nn.Module) -> Plain:
    """A copy of `model` in plain operators, float32 with eager attention. Raises ExportError for what no target writes."""
    refuse_other_arithmetic(model)
    memo: dict[int, object] = {}
    weights: dict[str, Weight] = {}
    made: dict[tuple, nn.Parameter] = {}  # a tied pair is one parameter
    total, in_experts = sum(p.numel() for p in model.parameters()), 0
    for module, layer, _ in _layers(model):
        built: dict[str, nn.Module] = {}
        for part, w in layer.weights.items():
            q = w.q if isinstance(w, _Blocks) else None
            name = f"{layer.name}.{part}.weight" if layer.kind == "experts" else f"{layer.name}.weight"
            weights[name] = Weight(name, layer.kind, layer.name, q)
            key = (q.packed.ctypes.data, q.shape) if q is not None else (name,)
            if key not in made:
                made[key] = nn.Parameter(_floats(w), requires_grad=False)
                total += prod(q.shape) if q is not None else 0
            in_experts += made[key].numel() if layer.kind == "experts" else 0
            built[part] = _linear(made[key].data, layer.biases.get(part)) if layer.kind != "embedding" else nn.Embedding(1, 1)
            built[part].weight = made[key]
        if layer.kind == "experts":
            gate_up, down = ([built[f"{part}.{e}"] for e in range(layer.num_experts)] for part in ("gate_up", "down"))
            memo[id(module)] = RankExperts(gate_up, down, _glu(layer.source, layer.interleaved))
        else:
            memo[id(module)] = built["weight"]
            if layer.kind == "embedding":
                built["weight"].num_embeddings, built["weight"].embedding_dim = made[key].shape
                built["weight"].padding_idx = None
    for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        value = t.detach().float() if t.is_floating_point() else t.detach()
        memo[id(t)] = nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value
    twin = copy.deepcopy(model, memo).eval()
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    return Plain(twin, weights, total, in_experts)


def signed(q: QTensor) -> np.ndarray:
    """int8 [out, in]: what the codes count, q - 2**(bits - 1)."""
    return (q.codes().astype(np.int16) - q.scheme.zero_point).astype(np.int8)


def stored_bytes(q: QTensor) -> int:
    """Bytes of codes and scales where 2 and 3 bits are stored as 4 and every row or group has a scale of its own."""
    return -(-prod(q.shape) * (8 if q.scheme.bits == 8 else 4) // 8) + group_scales(q).nbytes


def positive(q: QTensor) -> tuple[np.ndarray, np.ndarray, int]:
    """(values int8 [out, in], scales float16 > 0 [out, groups], how many values had to change) for kernels that refuse negative scales.

    A group whose scale is negative is turned: -s * -(q - h), h = 2**(bits - 1). Its code 0 becomes +h, which the codes cannot say; h - 1
    is the nearest. Where all scales are positive nothing changes.
    """
    held, top = group_scales(q), 2 ** (q.scheme.bits - 1) - 1
    values = signed(q).astype(np.int16).reshape(q.shape[0], -1, scale_run(q))
    turned = np.where(held[..., None] < 0, -values, values)
    turned = np.where(held[..., None] == 0, 0, turned)
    scales = np.where(held == 0, np.float16(1e-4), np.abs(held)).astype(np.float16)  # any scale does where the values are 0
    return np.minimum(turned, top).astype(np.int8).reshape(q.shape), scales, int((turned > top).sum())


def coarse(scales: np.ndarray) -> np.ndarray:
    """float16 scales with the seven bits of mantissa that XNNPACK's product in groups keeps (bfloat16), rounded to nearest even."""
    return torch.from_numpy(np.array(scales)).bfloat16().half().numpy()


def checked_mode(mode: str) -> None:
    if mode not in MODES:
        raise ExportError(f"mode={mode!r} is not one of {', '.join(MODES)}")


def checked_length(model: nn.Module, length: int, places: int | None = None) -> None:
    """Raises ExportError for a length that the model can't have, or places that a prompt of `length` does not fit in."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1
    for what, n in (("length", length), *([("places", places)] if places is not None else [])):
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
            raise ExportError(f"{what}={n!r} must be a whole number of tokens from 1 to {most}, the longest that this model was made for")
    if places is not None and places < length:
        raise ExportError(f"places={places} is less than length={length}: the prompt must have room")


def told(p: Plain, mode: str, length: int, places: int | None) -> tuple[str, ...]:
    """What the user of a file should know: the notes of its result."""
    notes = [f"{length} tokens at once, " + (f"then one by one in {places} places" if places else "computed anew for each token")]
    notes += ["every expert computes every token, masked (rank)"] if p.experts_total else []
    if more := sum(stored_bytes(w.q) - w.q.nbytes for w in p.codes.values()):
        notes.append(f"2 and 3 bits are stored as 4, and one scale per row or group: {more:,} bytes more than the codes need")
    if mode != "dynamic":
        return tuple(notes)
    if again := sum(map(stored_bytes, p.tied())):
        notes.append(f"embedding and head share their codes, which are here twice, turned and as they are: {again:,} bytes more")
    turned = [(positive(w.q), w.q) for w in p.weights.values() if w.q is not None and w.kind != "embedding"]
    changed, total = sum(t[2] for t, _ in turned), sum(prod(q.shape) for _, q in turned)
    if changed:
        notes.append(f"{changed:,} of {total:,} codes ({changed / total:.2%}) moved by one step, for the kernels refuse negative scales")
    grouped = [t[1] for t, q in turned if isinstance(q.scheme.granularity, PerGroup)]
    worst = max((float(np.abs(coarse(s).astype(np.float32) / s.astype(np.float32) - 1).max()) for s in grouped), default=0.0)
    if worst:
        notes.append(f"scales lose three bits of mantissa, {worst:.1e} of their value at most")
    return tuple(notes)


class _Whole(_Causal):
    """input_ids [batch, length] -> logits [batch, length, vocabulary].

    Positions start at min(first id, 0) = 0, which no converter can know: told a constant, it would store the mask and the rotations
    of all positions, 64 KiB and more for 128 tokens, instead of the few operators that make them.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        at = input_ids[0, :1].clamp(max=0) + torch.arange(input_ids.shape[1], dtype=input_ids.dtype)
        mask = self._mask(at[:, None] - at[None, :], None)
        with _ByComparison():
            return self.model(input_ids=input_ids, attention_mask=mask, position_ids=at[None, :], use_cache=False).logits


def whole(p: Plain) -> nn.Module:
    """A module: input_ids [batch, length] -> logits [batch, length, vocabulary], causal."""
    return _Whole(p.model, by_comparison=True, cache=False).eval()


class _Places:
    """Stands for a cache of transformers while a step is traced: keys and values [1, heads, places, width] of fixed size.

    `hit` float [places, T] is one where a place takes a new token. New rows go in by a product, for want of a scatter.
    """

    def __init__(self, past: tuple[Tensor, ...], hit: Tensor) -> None:
        self.past, self.hit = list(past), hit

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        kept = 1 - self.hit.sum(-1, keepdim=True)  # [places, 1]
        for i, new in ((2 * layer_idx, keys), (2 * layer_idx + 1, values)):
            self.past[i] = self.past[i] * kept + self.hit @ new
        return self.past[2 * layer_idx], self.past[2 * layer_idx + 1]


class _Step(_Causal):
    """(input_ids [1, T], start [1], past of each layer) -> (logits [1, T, vocabulary], present of each layer)."""

    def __init__(self, model: nn.Module, places: int) -> None:
        super().__init__(model, by_comparison=True, cache=False)
        self.places = places

    def forward(self, input_ids: Tensor, start: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        at = start + torch.arange(input_ids.shape[1], dtype=start.dtype)  # [T]
        place = torch.arange(self.places, dtype=start.dtype)
        cache = _Places(past, (place[:, None] == at[None, :]).float())
        mask = self._mask(at[:, None] - place[None, :], None)
        with _ByComparison():
            out = self.model(input_ids=input_ids, attention_mask=mask, position_ids=at[None, :], past_key_values=cache, use_cache=True)
        return out.logits, *cache.past


def stepped(p: Plain, places: int) -> nn.Module:
    """A module that computes the logits of T tokens from position `start` on and writes their keys and values into `places`.

    Places behind a token are not seen, so a prompt may be padded on the right: what stands there is overwritten by the next step.
    """
    return _Step(p.model, places).eval()


def nothing_past(model: nn.Module, places: int) -> tuple[Tensor, ...]:
    """Keys and values of a text that has not begun: zeros [1, heads, places, width], key and value of each layer in turn."""
    return tuple(torch.zeros(1, heads, places, width) for heads, width in _past_shapes(model))


# ---------------------------------------------------------------------------- weights as codes, for tracers that keep them


def scale_run(q: QTensor) -> int:
    """Inputs that share a scale."""
    return q.scheme.granularity.size if isinstance(q.scheme.granularity, PerGroup) else q.shape[1]


def nibbles(q: QTensor) -> np.ndarray:
    """uint8 [out, groups, size / 2] ([.., size] for 8 bits): a byte holds code j of its group in the low half and code size / 2 + j in the
    high one, as q - zero_point + 8; 2 and 3 bits are stored as 4. (Halves, not neighbours: they are joined by one operator.)
    """
    codes = q.codes().reshape(q.shape[0], -1, scale_run(q))
    if q.scheme.bits == 8:
        return codes
    codes = codes + np.uint8(8 - q.scheme.zero_point)
    low, high = np.split(codes, 2, axis=-1)
    return low | high << 4


def codes_of(stored: np.ndarray, q: QTensor) -> np.ndarray:
    """Codes uint8 [out, in] of the scheme of `q`: the inverse of `nibbles`."""
    if q.scheme.bits == 8:
        return stored.reshape(q.shape)
    stored = stored.reshape(q.shape[0], -1, scale_run(q) // 2)
    return (np.concatenate([stored & 15, stored >> 4], -1) - np.uint8(8 - q.scheme.zero_point)).reshape(q.shape)


def group_scales(q: QTensor) -> np.ndarray:
    """float16 [out, groups], contiguous."""
    return np.ascontiguousarray(np.broadcast_to(q.scales, (q.shape[0], q.shape[1] // scale_run(q))))


class Unpacked(nn.Module):
    """A weight kept as codes, which plain float operators unpack at every call.

    `codes` as of `nibbles`, `scales` float16 [out, groups, 1]. No shift and no mask: runtimes have floor and products of floats for sure.
    """

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        self.eight, self.inputs = q.scheme.bits == 8, q.shape[1]
        if not self.eight and scale_run(q) % 2:
            raise ExportError(f"{scale_run(q)} inputs share a scale; two 4-bit codes share a byte here: use int8-row for this weight")
        self.register_buffer("codes", torch.from_numpy(np.array(nibbles(q))))
        self.register_buffer("scales", torch.from_numpy(np.array(group_scales(q)))[..., None])

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        """float32 [..., in] of codes [..., groups, bytes] and scales [..., groups, 1]."""
        packed = codes.float()
        if self.eight:
            wide = packed - 128
        else:
            high = torch.floor(packed * 0.0625)
            wide = torch.cat((torch.sub(packed, high, alpha=16), high), -1) - 8
        return (wide * scales.float()).reshape(*codes.shape[:-2], self.inputs)


class UnpackedLinear(Unpacked):
    def __init__(self, q: QTensor, bias: Tensor | None) -> None:
        super().__init__(q)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values(self.codes, self.scales), self.bias)


class UnpackedEmbedding(Unpacked):
    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.reshape(-1)
        values = self.values(torch.index_select(self.codes, 0, rows), torch.index_select(self.scales, 0, rows))
        return values.reshape(*ids.shape, -1)


def with_codes(p: Plain, kinds: tuple[str, ...] = ("linear", "experts", "embedding")) -> Plain:
    """`p` with the quantized weights of these kinds as `Unpacked` modules; `p` itself is changed."""
    for w in p.weights.values():
        if w.q is None or w.kind not in kinds:
            continue
        parent, _, leaf = w.name.removesuffix(".weight").rpartition(".")
        old = p.model.get_submodule(w.name.removesuffix(".weight"))
        new = UnpackedEmbedding(w.q) if w.kind == "embedding" else UnpackedLinear(w.q, old.bias)
        setattr(p.model.get_submodule(parent) if parent else p.model, leaf, new)
    return p
