"""Layers that hold their weights in low bits: `QLinear`, `QEmbedding`, `QExperts`. For inference.

Each keeps a weight as buffers `packed`, `scales` and, for an asymmetric scheme, `offsets`, laid out as in `QTensor`. Three
ways compute:

- "numba": the kernels of `kernels/`, weights in low bits and activations float32; on a CPU, when no gradient is asked for;
- "numba-int8": the same, with activations quantized to int8 on the way in (per token, and per group of the weight). The
  fastest, and not quite the same numbers: int8 activations cost about half a percent of a layer's output;
- "torch": unpack, then `F.linear`; on any device, differentiable with respect to the input, also under `torch.compile`.

The kernels read a weight in tiles (`kernels/pack.py`). A layer lays its tiles out at its first use and keeps them beside
the buffers, which stay what is saved: after that it holds its codes twice.

An asymmetric weight is a symmetric one plus something that is constant in each group, so its product is the kernel's, plus
the sums of x over the groups times a small matrix [out, groups]:

    sum_k (s q_k + o) x_k = sum_k s (q_k - h) x_k + (o + s h) sum_k x_k,    h = 2**(bits - 1)

A layer may round its inputs first (`act`, an `ActScheme`): per token or per tensor, with a scale of its own input or a
stored one. The products then are those of the rounded numbers, in whatever way the layer computes.

All compute in float32 and return the input's dtype. The scales stay float16 whatever `.to(dtype)` is called on the
model: rounding them to bfloat16 would change the weights. `QExperts` stands in for the fused experts of transformers 5
(`gate_up_proj` [experts, 2 * inner, hidden], `down_proj` [experts, hidden, inner]), with the same call.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from edgelab.kernels._jit import threads, threads_are_chosen
from edgelab.kernels.experts import run as run_experts
from edgelab.kernels.matmul import ACTIVATIONS, LONGEST_GROUP, multiply
from edgelab.kernels.pack import Tiles, tile
from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import ActScheme, PerGroup, QuantScheme

KERNELS = ("numba", "numba-int8", "torch")
GLUS = ("chunk", "interleaved_clamped")


def set_kernel(name: str) -> str:
    """The kernel that was in use before; from now on all quantized layers use `name`: "numba" (default), "numba-int8" or "torch"."""
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not known; use one of {', '.join(KERNELS)}")
    before, Quantized.kernel = Quantized.kernel, name
    return before


def set_activations(model: nn.Module, activations: str | None) -> int:
    """The number of quantized layers of `model` that from now on take `activations`, on the CPU's kernels: "float32" or "int8".

    It holds for these layers whatever `set_kernel` says for all; None leaves them to `set_kernel` again.
    """
    if activations is not None and activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is not known; use one of {', '.join(ACTIVATIONS)}, or None")
    found = [m for m in model.modules() if isinstance(m, Quantized) and not isinstance(m, QEmbedding)]
    for layer in found:
        layer.__dict__.pop("kernel", None)
        if activations is not None:
            layer.kernel = "numba-int8" if activations == "int8" else "numba"
    return len(found)


def dequantize(packed: Tensor, scales: Tensor, scheme: QuantScheme, in_features: int, offsets: Tensor | None = None) -> Tensor:
    """The weight float32 [..., in] of packed rows uint8 [..., row_bytes], on their device: `QTensor.dequantize` in torch.

    `scales` [..., groups] as they are stored, and so `offsets`; broadcast over the rows.
    """
    bits, device = scheme.bits, packed.device
    if bits == 8:
        codes = packed
    elif bits == 3:  # eight codes are one 24-bit number; a row may end inside it
        units = F.pad(packed, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3)).to(torch.int32)
        word = units[..., 0] | units[..., 1] << 8 | units[..., 2] << 16
        codes = (word[..., None] >> torch.arange(0, 24, 3, dtype=torch.int32, device=device) & 7).flatten(-2)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
        codes = (packed[..., None] >> shifts & (2**bits - 1)).flatten(-2)
    codes, scales = codes[..., :in_features], _scale_values(scales)
    if scheme.affine:
        values = codes.float() if scheme.asymmetric else codes.float() - scheme.zero_point
    else:
        values = _table(scheme, device)[codes.long()]
    grouped = isinstance(scheme.granularity, PerGroup)
    if grouped:
        values, scales = values.unflatten(-1, (-1, scheme.granularity.size)), scales[..., None]
    values = values * scales
    if offsets is not None:
        values = values + (offsets.float()[..., None] if grouped else offsets.float())
    return values.flatten(-2) if grouped else values


@cache
def _table(scheme: QuantScheme, device: torch.device) -> Tensor:
    return torch.tensor(scheme.table, device=device)


def _scale_values(scales: Tensor) -> Tensor:
    """Stored scales as float32: float16 numbers, or exponents + 127 in bytes."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def round_inputs(x: Tensor, act: ActScheme, scale: Tensor | None = None) -> Tensor:
    """x [..., in] rounded to what `act` can say, in x's dtype. `scale`: the stored one of a static scheme (a number).

    With `act.outliers` = t, the channels k in which |x_k| > t for any row of x stay as they are: with O the set of them,
    x W^T = sum over O of x_k w_k + sum over the others of round(x_k) w_k, the split of LLM.int8() with the weights in
    low bits on both sides, as bitsandbytes has it.

    >>> round_inputs(torch.tensor([[1.27, 0.004, -0.26]]), ActScheme.parse("a8-token"))
    tensor([[ 1.2700,  0.0000, -0.2600]])
    >>> round_inputs(torch.tensor([[1.27, 0.004, 80.0]]), ActScheme.parse("a8-token-o6"))
    tensor([[ 1.2700,  0.0000, 80.0000]])
    """
    wide = x.float()
    if act.outliers is not None:
        out = (wide.abs() > act.outliers).reshape(-1, wide.shape[-1]).any(0)  # [in]
        return torch.where(out, x, round_inputs(torch.where(out, 0, wide), replace(act, outliers=None)).to(x.dtype))
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)  # per token; nothing rounds nothing when there is none
        scale = (largest if act.per == "token" or not largest.numel() else largest.amax()) / act.top
    q = torch.round(wide / torch.where(scale == 0, 1.0, scale)).clamp(-act.top, act.top)
    return (q * scale).to(x.dtype)


class Blank(NamedTuple):
    """Shape and scheme of a weight whose codes come later (`load_state_dict`)."""

    shape: tuple[int, ...]
    scheme: QuantScheme


class _Stored(NamedTuple):
    """One weight of a layer: the names of its buffers, and what they mean. `offsets` is None for a symmetric scheme."""

    packed: str
    scales: str
    offsets: str | None
    shape: tuple[int, ...]
    scheme: QuantScheme

    @property
    def group_size(self) -> int:
        return self.scheme.granularity.size if isinstance(self.scheme.granularity, PerGroup) else 0

    @property
    def buffers(self) -> tuple[str, ...]:
        return tuple(b for b in (self.packed, self.scales, self.offsets) if b)


class Quantized(nn.Module):
    """Base of the quantized layers: keeps `QTensor`s as buffers and hands them out again."""

    kernel = "numba"  # for all layers by `set_kernel`, for one layer by assignment

    def __init__(self) -> None:
        super().__init__()
        self._stored: dict[str, _Stored] = {}  # by the name of the parameter that the weight replaces
        self._views: dict[tuple[str, bool], tuple] = {}
        self.acts: dict[str, ActScheme] = {}  # how the input of each weight is rounded first; see `round_input_of`

    dtype = torch.float32  # of the weights that the layer stands for

    def _keep(self, name: str, weight: QTensor | Blank, prefix: str = "") -> None:
        shape, scheme = tuple(weight.shape), weight.scheme
        s = _Stored(f"{prefix}packed", f"{prefix}scales", f"{prefix}offsets" if scheme.asymmetric else None, shape, scheme)
        if isinstance(weight, QTensor):
            arrays = [_tensor(a) for a in (weight.packed, weight.scales, weight.offsets) if a is not None]
        else:
            small = torch.uint8 if scheme.scale_dtype == np.uint8 else torch.float16
            arrays = [torch.zeros((*shape[:-1], scheme.row_bytes(shape[-1])), dtype=torch.uint8)]
            arrays += [torch.zeros(scheme.scales_shape(shape), dtype=small) for _ in s.buffers[1:]]
        for buffer, array in zip(s.buffers, arrays, strict=True):
            self.register_buffer(buffer, array)
        self._stored[name] = s

    def _buffer(self, name: str | None) -> Tensor | None:
        return None if name is None else self._buffers[name]

    def round_input_of(self, name: str, act: ActScheme | None, scale: float | None = None) -> None:
        """Round what the weight `name` ("weight", "gate_up_proj", "down_proj") is multiplied by; None: no more.

        `scale`: the stored scale of a static scheme, which becomes the buffer `<prefix>act_scale` float32 [1].
        """
        if act is not None and act.static != (scale is not None):
            raise ValueError(f"{act} {'needs a scale' if act.static else 'finds its scale itself; scale=' + repr(scale)}")
        buffer = self._stored[name].packed.removesuffix("packed") + "act_scale"
        self.acts.pop(name, None)
        self._buffers.pop(buffer, None)
        if act is not None:
            self.acts[name] = act
        if scale is not None:
            self.register_buffer(buffer, torch.tensor([scale], dtype=torch.float32, device=self._buffers[self._stored[name].packed].device))

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        act = self.acts.get(name)
        if act is None:
            return x
        return round_inputs(x, act, self._buffers.get(self._stored[name].packed.removesuffix("packed") + "act_scale"))

    def _correction(self, name: str) -> Tensor | None:
        """[..., out, groups]: what an asymmetric weight adds to the kernel's product, per sum of x over a group."""
        s = self._stored[name]
        if s.offsets is None:
            return None
        extra = self._buffers[s.offsets].float() + s.scheme.zero_point * self._buffers[s.scales].float()
        return extra.expand(*s.shape[:-1], extra.shape[-1])

    def qtensors(self) -> dict[str, QTensor]:
        """The weights as `QTensor`s, by the name of the parameter each replaces: read-only views on the buffers (copies off the CPU)."""
        buffers = self._buffers
        return {
            name: QTensor(
                _read_only(buffers[s.packed]),
                _read_only(buffers[s.scales]),
                s.shape,
                s.scheme,
                None if s.offsets is None else _read_only(buffers[s.offsets]),
            )
            for name, s in self._stored.items()
        }

    def dequantized(self) -> dict[str, Tensor]:
        """The weights float32, by the name of the parameter each replaces, on the layer's device."""
        return {name: self._dequantized(name) for name in self._stored}

    def _dequantized(self, name: str, expert: int | None = None) -> Tensor:
        s = self._stored[name]
        parts = [None if b is None else b if expert is None else b[expert] for b in map(self._buffer, (s.packed, s.scales, s.offsets))]
        return dequantize(parts[0], parts[1], s.scheme, s.shape[-1], parts[2])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(s.scheme.nbytes(s.shape) for s in self._stored.values())

    def _multiply(self, name: str, x: Tensor, offsets: np.ndarray, y: np.ndarray) -> None:
        """Fill `y` with the kernel's product of the weight and x [..., in], whose rows are sorted by expert as `offsets` says.

        The integer kernel takes a row's scale from its largest input. Where the scale is given (one for the tensor, stored
        or not), each row gets one input more, 127 times the scale, and the weight a column of zeros.
        """
        integer, rows, act = self._integer(name), _rows(x), self.acts.get(name)
        given = integer and act is not None and act.per == "tensor"
        if given:
            stored = self._buffers.get(self._stored[name].packed.removesuffix("packed") + "act_scale")
            scale = np.abs(rows).max(initial=0) / act.top if stored is None else stored.item()
            most = np.float32(127 * scale)
            rows = np.concatenate([rows.clip(-most, most), np.full((len(rows), 1), most)], axis=1)
        multiply(self._tiles(name, given), rows, offsets, y, integer, most=kernel_threads())

    def _tiles(self, name: str, wider: bool = False) -> Tiles:
        """The weight as the kernels read it, laid out again when a buffer was replaced, moved, loaded or written to.

        `wider`: with one more input, whose weights are 0 (for a weight with one scale a row).

        PyTorch does not count what is written through `.data`, or to a tensor made in inference mode: `forget_tiles` then.
        """
        s = self._stored[name]
        packed, scales = self._buffers[s.packed], self._buffers[s.scales]  # offsets are no part of the tiles
        held = self._views.get((name, wider))
        if held is not None and held[0] is packed and held[1] is scales and held[2] == _version(packed, scales):
            return held[3]
        small = torch.uint8 if s.scheme.scale_dtype == np.uint8 else torch.float16
        if packed.dtype != torch.uint8 or scales.dtype != small:
            raise TypeError(
                f"{name}: packed is {packed.dtype} and scales are {scales.dtype}; they must be torch.uint8 and {small}: "
                "load the state dict without casting it"
            )
        halves = scales.detach() if small == torch.float16 else _scale_values(scales.detach()).half()
        if small == torch.uint8 and not halves.isfinite().all():
            raise ValueError(f"{name}: a scale of {s.scheme} is above 2**15, the largest in a tile; set_kernel('torch') computes with it")
        levels = None if s.scheme.affine else s.scheme.table
        codes, n = packed.detach().numpy(), s.shape[-1]
        if wider:
            zeros = np.full((*s.shape[:-1], 1), s.scheme.zero_point, np.uint8)
            codes, n = pack(np.concatenate([unpack(codes, s.scheme.bits, n), zeros], axis=-1), s.scheme.bits), n + 1
        tiles = tile(codes, halves.view(torch.int16).numpy(), s.scheme.bits, s.group_size, n, levels)
        self._views[name, wider] = (packed, scales, _version(packed, scales), tiles)
        return tiles

    def forget_tiles(self) -> None:
        """Lay the weights out anew at the next call."""
        self._views.clear()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._views.clear()  # tensors of inference mode do not count their versions
        super()._load_from_state_dict(*args, **kwargs)

    def _integer(self, *names: str) -> bool:
        """Whether activations go in as int8: asked for, the weights' levels are integers, and their sums fit."""
        stored = [self._stored[name] for name in names]
        longest = max(s.group_size or s.shape[-1] for s in stored)
        for name in names:
            act = self.acts.get(name)
            if act is not None and (self._stored[name].group_size or act.outliers is not None or (act.per == "token" and act.bits < 8)):
                return False  # the kernel finds a scale of 8 bits per token and group; these numbers lie on another grid
        return self.kernel == "numba-int8" and longest <= LONGEST_GROUP and all(s.scheme.affine for s in stored)

    def _use_kernel(self, *inputs: Tensor) -> bool:
        if self.kernel == "torch" or torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
            return False
        if any(type(t) not in (Tensor, nn.Parameter) or is_functorch_wrapped_tensor(t) for t in inputs):
            return False  # fake tensors, vmap and the like hold no numbers that a kernel could read
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            if self.kernel == "numba-int8":
                _warn_of_gradients()
            return False
        return all(t.is_cpu for t in inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._views.clear()
        kept = {b for s in self._stored.values() for b in s.buffers} | {b for b in self._buffers if b.endswith("act_scale")}
        scales = {id(self._buffers[b]) for b in kept}

        def keep_scales(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in scales and moved.dtype != t.dtype else moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_scales, recurse)

    def _weight(self, transposed: bool = False) -> Tensor:
        s = self._stored["weight"]
        if self._buffers[s.packed] is None:  # while transformers loads a model, a tied layer waits for its owner's codes
            weight = torch.empty(s.shape, dtype=self.dtype, device="meta")
        else:
            weight = self.dequantized()["weight"].to(self.dtype)
        weight = weight.mT if transposed else weight
        weight._is_hf_initialized = True  # transformers' `_init_weights` leaves it alone
        return weight

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_views": {}}  # deepcopy must not share views with the original

    def extra_repr(self) -> str:
        acts = {name: f" {act}" for name, act in self.acts.items()}
        weights = [f"{name} {' x '.join(map(str, s.shape))} {s.scheme}{acts.get(name, '')}" for name, s in self._stored.items()]
        total = sum(math.prod(s.shape) for s in self._stored.values())
        return ", ".join([*weights, f"{self.nbytes:,} bytes", f"{8 * self.nbytes / total:.3f} bits per weight"])


class QLinear(Quantized):
    """y = x W^T + bias, with W [out, in] in low bits."""

    def __init__(
        self, weight: QTensor | Blank, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, transposed: bool = False
    ) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight is {tuple(weight.shape)}; QLinear takes [out, in], an expert stack goes to QExperts")
        self._keep("weight", weight)
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias is {tuple(bias.shape)}; a weight {tuple(weight.shape)} needs ({self.out_features},)")
        # the very same parameter: it may be tied (BERT's decoder shares its bias with the head)
        bias = bias.requires_grad_(False) if isinstance(bias, nn.Parameter) else bias
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None and not isinstance(bias, nn.Parameter) else bias
        self.dtype, self.transposed = dtype, transposed
        self.lora_a = self.lora_b = None

    def adapt(self, a: Tensor, b: Tensor) -> None:
        """Add the low-rank term b a to the weight, beside its codes: a [r, in], b [out, r] (LoRA, arXiv 2106.09685)."""
        if a.shape[1] != self.in_features or b.shape != (self.out_features, a.shape[0]):
            raise ValueError(
                f"a {tuple(a.shape)}, b {tuple(b.shape)}: a weight {self.out_features, self.in_features} takes [r, in], [out, r]"
            )
        for name, value in (("lora_a", a), ("lora_b", b)):
            self.__dict__.pop(name, None)  # the plain None would hide the parameter
            self.register_parameter(name, nn.Parameter(value.detach().float(), requires_grad=False))

    def dequantized(self) -> dict[str, Tensor]:
        """As of every layer, with the adapter's term added."""
        value = self._dequantized("weight")
        return {"weight": value if self.lora_a is None else value + self.lora_b.float() @ self.lora_a.float()}

    @property
    def weight(self) -> Tensor:
        """The weight in `dtype`, oriented as in the module that the layer replaced, unpacked at each access. Read-only.

        For models that read the weight of a layer instead of calling it, or ask for its dtype.
        """
        return self._weight(self.transposed)

    @classmethod
    def empty(cls, out_features: int, in_features: int, scheme: QuantScheme, bias: bool = False) -> "QLinear":
        """A layer of zeros, to load a state dict into."""
        return cls(Blank((out_features, in_features), scheme), torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        s = self._stored["weight"]
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}; its last dimension must be in_features={self.in_features}")
        plain, x = x, self._rounded("weight", x)
        if self._use_kernel(x, self.packed):
            y = torch.empty((*x.shape[:-1], self.out_features), dtype=torch.float32, device="cpu")
            flat = y.numpy().reshape(-1, self.out_features)
            self._multiply("weight", x, np.array((0, len(flat))), flat)
            if s.offsets:
                with _float32(x.device):
                    y += _group_sums(x.float(), s) @ self._correction("weight").mT
        else:
            with _float32(x.device):
                y = F.linear(x.float(), self._dequantized("weight"))
        if self.lora_a is not None:
            with _float32(x.device):
                y = y + F.linear(F.linear(plain.float(), self.lora_a.float()), self.lora_b.float())
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


class QEmbedding(Quantized):
    """Rows of W [rows, dim], which is in low bits; only the rows asked for are unpacked.

    `dtype` of the output: float32, or what `.to(dtype)` of the model says, as for an ordinary embedding.
    """

    def __init__(self, weight: QTensor | Blank, padding_idx: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight is {tuple(weight.shape)}; QEmbedding takes [rows, dim]")
        self._keep("weight", weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.dtype = padding_idx, dtype

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        scheme: QuantScheme,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "QEmbedding":
        """A layer of zeros, to load a state dict into."""
        return cls(Blank((num_embeddings, embedding_dim), scheme), padding_idx, dtype)

    @property
    def weight(self) -> Tensor:
        """[rows, dim] in `dtype`, unpacked at each access: for models that read it. Read-only."""
        return self._weight()

    def forward(self, ids: Tensor) -> Tensor:
        s = self._stored["weight"]
        packed, *small = (b[0] if b.shape[0] == 1 else F.embedding(ids, b) for b in (self._buffers[n] for n in s.buffers))
        packed = packed if self.packed.shape[0] > 1 else F.embedding(ids, self.packed)  # an embedding of one row
        return dequantize(packed, small[0], s.scheme, self.embedding_dim, *small[1:]).to(self.dtype)


class QExperts(Quantized):
    """The routed experts of a mixture: down_e(glu(gate_up_e(x))), summed with the router's weights; weights in low bits.

    `gate_up` [experts, 2 * inner, hidden] and `down` [experts, hidden, inner] in the orientation of `F.linear`, also for
    families that store them transposed. `glu`:

    - "chunk": the first half of the rows is the gate, the second `up`; act_fn(gate) * up. DeepSeek, Qwen, Mixtral, OLMoE, Granite;
    - "interleaved_clamped": even rows are the gate, odd ones `up`; clamped to `limit`, (up + 1) * gate * sigmoid(alpha * gate). gpt-oss.
    """

    def __init__(
        self,
        gate_up: QTensor | Blank,
        down: QTensor | Blank,
        act_fn: Callable[[Tensor], Tensor] | None,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        glu: str = "chunk",
        limit: float | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        if glu not in GLUS:
            raise ValueError(f"glu={glu!r} is not known; use one of {', '.join(GLUS)}")
        if glu == "chunk" and act_fn is None:
            raise ValueError("act_fn=None: glu='chunk' needs an activation function, such as torch.nn.SiLU()")
        if glu == "interleaved_clamped" and (limit is None or alpha is None):
            raise ValueError(f"limit={limit}, alpha={alpha}: glu='interleaved_clamped' needs both (gpt-oss: limit=7.0, alpha=1.702)")
        experts, wide, hidden = _three(gate_up, "gate_up")
        if _three(down, "down") != (experts, hidden, wide // 2) or wide % 2:
            raise ValueError(
                f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit; "
                "they are [experts, 2 * inner, hidden] and [experts, hidden, inner]"
            )
        self._keep("gate_up_proj", gate_up, "gate_up_")
        self._keep("down_proj", down, "down_")
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, wide // 2
        self.act_fn, self.glu, self.limit, self.alpha = act_fn, glu, limit, alpha
        # what `kernels/experts.py` does in one call; other mixtures take a call per product
        silu = isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation" or act_fn is F.silu
        self._is_swiglu = glu == "chunk" and silu and gate_up_bias is None and down_bias is None
        for name, bias, rows in (("gate_up_bias", gate_up_bias, wide), ("down_bias", down_bias, hidden)):
            if bias is not None and bias.shape != (experts, rows):
                raise ValueError(f"{name} is {tuple(bias.shape)}; it must be ({experts}, {rows})")
            setattr(self, name, None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden: int,
        inner: int,
        gate_up_scheme: QuantScheme,
        down_scheme: QuantScheme,
        act_fn: Callable[[Tensor], Tensor] | None,
        bias: bool = False,
        glu: str = "chunk",
        limit: float | None = None,
        alpha: float | None = None,
    ) -> "QExperts":
        """A layer of zeros, to load a state dict into."""
        gate_up, down = Blank((num_experts, 2 * inner, hidden), gate_up_scheme), Blank((num_experts, hidden, inner), down_scheme)
        biases = (torch.zeros(num_experts, 2 * inner), torch.zeros(num_experts, hidden)) if bias else (None, None)
        return cls(gate_up, down, act_fn, *biases, glu, limit, alpha)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] from hidden_states [T, hidden], top_k_index [T, k] and top_k_weights [T, k].

        The index `num_experts` is the sentinel of transformers' expert parallelism: that choice is skipped.
        """
        tokens, k = top_k_index.shape
        if top_k_index.is_floating_point():
            raise ValueError(f"top_k_index is {top_k_index.dtype}; it must hold the numbers of experts, as integers")
        if hidden_states.shape != (tokens, self.hidden_dim) or top_k_weights.shape != (tokens, k):
            raise ValueError(
                f"hidden_states is {tuple(hidden_states.shape)}, top_k_index {tokens, k} and top_k_weights {tuple(top_k_weights.shape)}; "
                f"they must be [T, {self.hidden_dim}], [T, k] and [T, k]"
            )
        by_kernel = self._use_kernel(hidden_states, top_k_weights, self.gate_up_packed, self.down_packed)
        plain = not self.acts and not any(s.offsets for s in self._stored.values())
        if by_kernel and self._is_swiglu and plain:
            out = torch.empty((tokens, self.hidden_dim), dtype=torch.float32, device="cpu")
            run_experts(
                self._tiles("gate_up_proj"),
                self._tiles("down_proj"),
                _rows(hidden_states),
                top_k_index.to(torch.int64).contiguous().numpy(),
                top_k_weights.detach().to(torch.float32).contiguous().numpy(),
                out.numpy(),
                self._integer("gate_up_proj", "down_proj"),
                kernel_threads(),
                "top_k_index",
            )
            return out.to(hidden_states.dtype)
        choice = top_k_index.reshape(-1).cpu().numpy()
        order = np.argsort(choice, kind="stable")
        offsets = np.searchsorted(choice[order], np.arange(self.num_experts + 1))  # [experts + 1]; the sentinels come last
        if choice.size and (choice[order[0]] < 0 or choice[order[-1]] > self.num_experts):
            raise ValueError(
                f"top_k_index holds {choice.min()} .. {choice.max()}; "
                f"experts are 0 .. {self.num_experts - 1}, and {self.num_experts} means none"
            )
        kept = torch.from_numpy(order[: offsets[-1]]).to(hidden_states.device)
        with _float32(hidden_states.device):
            x = hidden_states[kept // k].float()  # [n, hidden], sorted by expert
            y = self._by_kernel(x, offsets) if by_kernel else self._by_torch(x, np.diff(offsets).tolist())
            # back to [T, k, hidden], then one weighted sum per token; a skipped choice is a row of zeros
            rows = y.new_zeros(tokens * k, self.hidden_dim).index_copy_(0, kept, y)
            weights = top_k_weights.float()
            if len(kept) < tokens * k:  # its weight may be anything, NaN too
                weights = weights.masked_fill(top_k_index == self.num_experts, 0)
            return (weights[:, None, :] @ rows.view(tokens, k, self.hidden_dim))[:, 0].to(hidden_states.dtype)

    def _by_kernel(self, x: Tensor, offsets: np.ndarray) -> Tensor:
        for name, bias in (("gate_up_proj", self.gate_up_bias), ("down_proj", self.down_bias)):
            s = self._stored[name]
            x = self._rounded(name, x)
            y = torch.empty(x.shape[0], s.shape[1], dtype=torch.float32, device="cpu")
            self._multiply(name, x, offsets, y.numpy())
            if s.offsets:
                sums, extra = _group_sums(x, s), self._correction(name)
                for e in np.flatnonzero(np.diff(offsets)):
                    y[offsets[e] : offsets[e + 1]] += sums[offsets[e] : offsets[e + 1]] @ extra[e].mT
            if bias is not None:
                y += bias.float().repeat_interleave(torch.from_numpy(np.diff(offsets)), dim=0)
            x = self._glu(y) if name == "gate_up_proj" else y
        return x

    def _by_torch(self, x: Tensor, counts: list[int]) -> Tensor:
        for name, bias in (("gate_up_proj", self.gate_up_bias), ("down_proj", self.down_bias)):
            parts = [
                F.linear(rows, self._dequantized(name, e), None if bias is None else bias[e].float())
                for e, rows in enumerate(self._rounded(name, x).split(counts))
                if len(rows)
            ]
            y = torch.cat(parts) if parts else x.new_zeros(0, self._stored[name].shape[1])
            x = self._glu(y) if name == "gate_up_proj" else y
        return x

    def _glu(self, y: Tensor) -> Tensor:
        return gated(y, self.act_fn, self.glu, self.limit, self.alpha)


def gated(y: Tensor, act_fn: Callable | None, glu: str = "chunk", limit: float | None = None, alpha: float | None = None) -> Tensor:
    """[n, inner], what down is multiplied by, of the output of gate_up [n, 2 * inner]; the settings as in `QExperts`."""
    if glu == "chunk":
        gate, up = y.chunk(2, dim=-1)
        return act_fn(gate) * up
    gate, up = y[..., ::2].clamp(max=limit), y[..., 1::2].clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def _group_sums(x: Tensor, s: _Stored) -> Tensor:
    """[..., groups]: sums of x [..., in] over the inputs that share a scale."""
    return x.unflatten(-1, (-1, s.group_size or s.shape[-1])).sum(-1)


def _three(weight: QTensor | Blank, name: str) -> tuple[int, int, int]:
    if len(weight.shape) != 3:
        raise ValueError(f"{name} is {tuple(weight.shape)}; an expert stack has three dimensions [experts, out, in]")
    return tuple(weight.shape)


@cache
def _warn_of_gradients() -> None:
    """Once a process: a model whose norms can be trained records gradients unless told not to."""
    warnings.warn(
        "int8 activations are not used while gradients are recorded: wrap the call in torch.inference_mode() or torch.no_grad()",
        stacklevel=2,
    )


def _read_only(t: Tensor) -> np.ndarray:
    if t.is_meta:  # a shape without bytes
        array = np.broadcast_to(np.zeros((), torch.empty((), dtype=t.dtype).numpy().dtype), t.shape)
    else:
        array = t.detach().cpu().numpy().view()
    array.flags.writeable = False
    return array


def _tensor(array: np.ndarray) -> Tensor:
    """`array` as a tensor that shares its memory; a read-only one (a mapped file) is copied, for torch has no read-only tensors."""
    return torch.from_numpy(np.require(array, requirements="CW"))


def _rows(x: Tensor) -> np.ndarray:
    """`x` [..., in] as a contiguous float32 array [tokens, in]; not copied when it is one already."""
    return x.detach().to(torch.float32).contiguous().numpy().reshape(-1, x.shape[-1])


def _float32(device: torch.device) -> AbstractContextManager:
    """Arithmetic in float32 also under `torch.autocast`."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _version(*tensors: Tensor) -> tuple:
    """Where the tensors are and how often they were written to (not known of a tensor made in inference mode)."""
    return tuple((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)


def kernel_threads() -> int:
    """Threads that a layer's kernels may use: as `edgelab.set_threads` says, else as `torch.set_num_threads`."""
    return threads() if threads_are_chosen() else min(torch.get_num_threads(), threads())
