"""Who takes part in `make bench`: ours and its peers, each at its best setting, each with copies of the weight to rotate.

A builder takes a `Case` and returns what one call reads in bytes and, for each number of tokens, one function per copy. The
functions take nothing and return the product in the library's own type. Inputs stand ready in the type that each library
likes best, and outputs are preallocated where its interface allows. What a library cannot do here raises `Absent`.

The best settings, found on an AVX-512 machine with VNNI and BF16:
- torch int4pack and int8pack: bfloat16 inputs; float32 takes a path that is 100x slower.
- torch qint8: full-range activations (`reduce_range=False`: VNNI does not saturate), both engines that can do it, for FBGEMM
  was the faster one for a row (0.45 to 0.53 ms) and oneDNN for 128 rows (4.9 to 5.8 ms).
- bitsandbytes: `eval()`. Only then does it take its fused AVX-512 BF16 product (1.0 ms for 8 rows, 16 to 34 ms without).
- ONNX Runtime: inputs and outputs bound once (0.393 ms; 0.411 with `run`); `force_spinning_stop`: its threads spin inside a run
  and sleep after it. By default they go on for 32 ms, and of a dozen sessions that take turns each holds a core: 0.42 ms against 0.32
  on two. (One session alone, in cache: 0.087 ms by default, 0.098 so; nothing at 128 rows.)
- llama.cpp: its own choice of layout, which for Q4_0 and Q8_0 interleaves eight rows.
"""

import copy
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import ggml
import numpy as np
import torch
import torch.nn.functional as F

from edgelab.kernels.matmul import qmatmul, qmatmul_experts
from edgelab.kernels.pack import Tiles, aligned, tile
from edgelab.matmul_lab import last_level_cache
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor, pack
from edgelab.scheme import PerGroup, QuantScheme

MOST_COPIES = 48


class Absent(Exception):
    """A contender that cannot take part; the text says why and what to do about it."""


class Case(NamedTuple):
    """One weight float32 [out, in] (or a stack [experts, out, in]), inputs float32 [tokens, in] by number of tokens, threads."""

    w: torch.Tensor
    xs: dict[int, torch.Tensor]
    threads: int
    offsets: dict[int, list[np.ndarray]] = {}  # of a stack: for each number of tokens, routings that take turns  # noqa: RUF012


class Contender(NamedTuple):
    """`calls` {tokens: functions, one per copy}; `nbytes` of weights that one call reads (by tokens: of a stack, those used)."""

    name: str
    nbytes: dict[int, int]
    copies: int
    calls: dict[int, list[Callable]]


class Entry(NamedTuple):
    """A row of the table below: who computes it, beside which of ours it stands, whose threads, the least cosine."""

    build: Callable
    beside: str
    pool: str
    bits: int
    settings: tuple = ()


MIN_COSINE = {32: 0.9999, 16: 0.999, 8: 0.999, 4: 0.98, 3: 0.96, 2: 0.85}  # with the float32 product; 0 for a wrong one
# fmt: off
NF4 = np.array([  # QLoRA (Dettmers et al., 2023), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# fmt: on


def copies(nbytes: int) -> int:
    """Copies of a weight that together fill three times the last-level cache, at most MOST_COPIES.

    A small weight does not get so far by itself; but between two uses of a copy every copy of every other contender is read.
    """
    return min(MOST_COPIES, math.ceil(3 * last_level_cache() / nbytes))


# ------------------------------------------------------------------------------------------------------------------ ours
@lru_cache(maxsize=12)
def _rounded(w: torch.Tensor, scheme: str) -> QTensor:
    return round_to_nearest(w, QuantScheme.parse(scheme))


def _nf4(w: torch.Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes of the nearest of NF4's levels after absmax per group, and the scales' bits."""
    groups = w.reshape(-1, group)
    scales = groups.abs().amax(1, keepdim=True).half().float()
    middles = torch.from_numpy((NF4[1:] + NF4[:-1]) / 2)
    codes = torch.bucketize(groups / scales, middles).to(torch.uint8).reshape(w.shape)
    return pack(codes.numpy(), 4), scales.half().numpy().view(np.int16).reshape(*w.shape[:-1], -1)


@lru_cache(maxsize=1)
def _nf4_tiles(w: torch.Tensor) -> Tiles:
    return tile(*_nf4(w, 64), 4, 64, w.shape[-1], levels=NF4)


@lru_cache(maxsize=12)
def _tiles(w: torch.Tensor, scheme: str) -> Tiles:
    if scheme == "nf4-g64":
        return _nf4_tiles(w)
    q = _rounded(w, scheme)
    group = q.scheme.granularity.size if isinstance(q.scheme.granularity, PerGroup) else 0
    return tile(q.packed, q.scales.view(np.int16), q.scheme.bits, group, w.shape[-1])


def _again(t: Tiles) -> Tiles:
    codes, scales = aligned(t.codes.shape), aligned(t.scales.shape, np.int16)
    codes[:], scales[:] = t.codes, t.scales
    return t._replace(codes=codes, scales=scales)


def ours(case: Case, scheme: str, activations: str):
    first = _tiles(case.w, scheme)
    stack = [first, *(_again(first) for _ in range(copies(first.nbytes) - 1))]
    if case.offsets:
        return _our_experts(case, stack, activations)
    calls = {}
    for tokens, x in case.xs.items():
        y, rows = np.empty((tokens, case.w.shape[0]), np.float32), x.numpy()
        calls[tokens] = [_into(y, qmatmul, t, rows, y, activations) for t in stack]
    return dict.fromkeys(case.xs, first.nbytes), calls


def _our_experts(case: Case, stack: list[Tiles], activations: str):
    calls, nbytes = {}, {}
    for tokens, x in case.xs.items():
        y, rows = np.empty((len(x), case.w.shape[1]), np.float32), x.numpy()
        calls[tokens] = [_into(y, qmatmul_experts, t, rows, offsets, y, activations) for t in stack for offsets in case.offsets[tokens]]
        nbytes[tokens] = _used(case.offsets[tokens][0]) * stack[0].nbytes // len(case.w)
    return nbytes, calls


def _into(y: np.ndarray, kernel: Callable, *args) -> Callable:
    def call() -> np.ndarray:
        kernel(*args)
        return y

    return call


def _used(offsets: np.ndarray) -> int:
    return int(np.count_nonzero(np.diff(offsets)))


# ----------------------------------------------------------------------------------------------------------------- torch
def _dense(case: Case, nbytes: int, weights: list, product: Callable, dtype: torch.dtype = torch.float32):
    """The usual result: `product(x, weight)` for each copy, x in `dtype`."""
    calls = {tokens: [_bound(product, x.to(dtype), w) for w in weights] for tokens, x in case.xs.items()}
    return dict.fromkeys(case.xs, nbytes), calls


def _bound(product: Callable, *args) -> Callable:
    return lambda: product(*args)


def torch_float(case: Case, dtype: torch.dtype):
    w = case.w.to(dtype)
    return _dense(case, w.nbytes, [w.clone() for _ in range(copies(w.nbytes))], F.linear, dtype)


def _int4pack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise Absent("this torch has no _weight_int4pack_mm_for_cpu")
    q = _rounded(w, "int4-g32")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(q.codes().astype(np.int32)), 1)
    scales = torch.from_numpy(q.scales.astype(np.float32)).T
    return packed, torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous().bfloat16()  # [groups, out, 2]: (q - 8) s + zero


def torch_int4pack(case: Case):
    packed, scales = _int4pack(case.w)
    nbytes = packed.nbytes + scales.nbytes
    weights = [(packed.clone(), scales.clone()) for _ in range(copies(nbytes))]
    return _dense(case, nbytes, weights, lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1]), torch.bfloat16)


def _int8_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales float32 [out]: absmax per row."""
    scales = w.abs().amax(-1) / 127
    return (w / scales[..., None]).round().to(torch.int8), scales


def torch_int8pack(case: Case):
    codes, scales = _int8_rows(case.w)
    nbytes = codes.nbytes + 2 * len(scales)
    weights = [(codes.clone(), scales.bfloat16()) for _ in range(copies(nbytes))]
    return _dense(case, nbytes, weights, lambda x, w: torch.ops.aten._weight_int8pack_mm(x, *w), torch.bfloat16)


def _prepacked(w: torch.Tensor, engine: str, count: int) -> list:
    if engine not in torch.backends.quantized.supported_engines:
        raise Absent(f"this torch has no quantized engine {engine}")
    torch.backends.quantized.engine = engine  # it decides at packing; the packed weight keeps its engine
    codes, scales = _int8_rows(w)
    q = torch._make_per_channel_quantized_tensor(codes, scales.double(), torch.zeros(len(w), dtype=torch.int64), 0)
    return [torch.ops.quantized.linear_prepack(q, None) for _ in range(count)]


def torch_qint8(case: Case, engine: str):
    nbytes = case.w.numel() + 4 * len(case.w)
    weights = _prepacked(case.w, engine, copies(nbytes))
    return _dense(case, nbytes, weights, lambda x, w: torch.ops.quantized.linear_dynamic(x, w, False))


def torch_experts(case: Case, kind: str):
    """Each used expert's product after the other: what a module of `nn.Linear`s does."""
    experts, out = case.w.shape[:2]
    dtype = torch.float32 if kind in ("fp32", "qint8") else torch.bfloat16
    match kind:
        case "fp32" | "bf16":
            w = case.w.to(dtype)
            nbytes, product = w.nbytes, F.linear
            stacks = [[e.clone() for e in w] for _ in range(copies(nbytes))]
        case "int4pack":
            packed = [_int4pack(e) for e in case.w]
            nbytes = sum(a.nbytes + b.nbytes for a, b in packed)
            stacks = [[(a.clone(), b.clone()) for a, b in packed] for _ in range(copies(nbytes))]

            def product(x, w):
                return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1])

        case "qint8":
            nbytes = case.w.numel() + 4 * experts * out
            stacks = list(zip(*(_prepacked(e, "fbgemm", copies(nbytes)) for e in case.w), strict=True))

            def product(x, w):
                return torch.ops.quantized.linear_dynamic(x, w, False)

    def routed(x: torch.Tensor, spans: list[tuple[int, int, int]], stack: list) -> torch.Tensor:
        return torch.cat([product(x[lo:hi], stack[e]) for e, lo, hi in spans])

    calls = {}
    for tokens, x in case.xs.items():
        routings = [[(e, int(o[e]), int(o[e + 1])) for e in np.flatnonzero(np.diff(o))] for o in case.offsets[tokens]]
        calls[tokens] = [_bound(routed, x.to(dtype), spans, stack) for stack in stacks for spans in routings]
    return {tokens: _used(case.offsets[tokens][0]) * nbytes // experts for tokens in case.xs}, calls


# ----------------------------------------------------------------------------------------------------------- other libraries
def bitsandbytes_nf4(case: Case):
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise Absent("bitsandbytes is not installed: pip install 'edgelab[bnb]'") from None
    out, n = case.w.shape
    layer = bnb.nn.Linear4bit(n, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(case.w.clone(), requires_grad=False, quant_type="nf4", module=layer)
    layer.to("cpu").eval()
    layer(torch.zeros(1, n, dtype=torch.bfloat16))  # lays the weight out anew, once
    nbytes = layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
    return _dense(case, nbytes, [copy.deepcopy(layer) for _ in range(copies(nbytes))], lambda x, layer: layer(x), torch.bfloat16)


@cache
def _onnx():
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise Absent("onnxruntime is not installed: pip install 'edgelab[export]'") from None
    return onnx, onnxruntime


def onnxruntime_nbits(case: Case, level: int):
    onnx, ort = _onnx()
    out, n = case.w.shape
    q = _rounded(case.w, "int4-g32")
    blobs = [
        onnx.numpy_helper.from_array(q.packed.reshape(out, n // 32, 16), "codes"),
        onnx.numpy_helper.from_array(q.scales.astype(np.float32).reshape(-1), "scales"),
    ]
    settings = {"K": n, "N": out, "bits": 4, "block_size": 32, "accuracy_level": level}
    node = onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **settings)
    x, y = (onnx.helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, ["t", size]) for v, size in (("x", n), ("y", out)))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", [x], [y], blobs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    nbytes, text = q.packed.nbytes + 4 * q.scales.size, model.SerializeToString()
    sessions = [ort.InferenceSession(text, options, providers=["CPUExecutionProvider"]) for _ in range(copies(nbytes))]
    calls = {}
    for tokens, rows in case.xs.items():
        value = ort.OrtValue.ortvalue_from_numpy(rows.numpy())
        result = np.empty((tokens, out), np.float32)
        calls[tokens] = [_bound_run(session, value, ort.OrtValue.ortvalue_from_numpy(result)) for session in sessions]
    return dict.fromkeys(case.xs, nbytes), calls


def _bound_run(session, x, y) -> Callable:
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return y  # an OrtValue: read only where the product is checked

    return call


def llama_cpp(case: Case, kind: str):
    try:
        backend = ggml.Ggml(case.threads)
    except ImportError as error:
        raise Absent(str(error)) from None
    q = backend.quantize(kind, case.w.numpy())
    xs = {tokens: backend.put(x.numpy()) for tokens, x in case.xs.items()}
    products = [backend.product(kind, q, case.w.shape[1], xs) for _ in range(copies(q.nbytes))]
    return dict.fromkeys(case.xs, q.nbytes), {tokens: [p[tokens] for p in products] for tokens in case.xs}


# The peers first, library by library: one that spins is given time to fall asleep only when the library changes.
DENSE = {
    "torch fp32": Entry(torch_float, "W4A8 g32", "torch", 32, (torch.float32,)),
    "torch bf16": Entry(torch_float, "W4A8 g32", "torch", 16, (torch.bfloat16,)),
    "torch int4pack g32": Entry(torch_int4pack, "W4A16 g32", "torch", 4),
    "torch int8pack row": Entry(torch_int8pack, "W8A16 row", "torch", 8),
    "torch qint8 FBGEMM": Entry(torch_qint8, "W8A8 row", "torch", 8, ("fbgemm",)),
    "torch qint8 oneDNN": Entry(torch_qint8, "W8A8 row", "torch", 8, ("onednn",)),
    "bitsandbytes NF4 g64": Entry(bitsandbytes_nf4, "NF4A16 g64", "bitsandbytes", 4),
    "llama.cpp Q4_0": Entry(llama_cpp, "W4A8 g32", "llama.cpp", 4, ("Q4_0",)),
    "llama.cpp Q8_0": Entry(llama_cpp, "W8A8 row", "llama.cpp", 8, ("Q8_0",)),
    "ONNX Runtime g32, level 0": Entry(onnxruntime_nbits, "W4A16 g32", "onnxruntime", 4, (0,)),
    "ONNX Runtime g32, level 1": Entry(onnxruntime_nbits, "W4A16 g32", "onnxruntime", 4, (1,)),
    "ONNX Runtime g32, level 4": Entry(onnxruntime_nbits, "W4A8 g32", "onnxruntime", 4, (4,)),
    "W4A8 g32": Entry(ours, "", "edgelab", 4, ("int4-g32", "int8")),
    "W4A8 g128": Entry(ours, "", "edgelab", 4, ("int4-g128", "int8")),
    "W4A8 row": Entry(ours, "", "edgelab", 4, ("int4-row", "int8")),
    "W3A8 g32": Entry(ours, "", "edgelab", 3, ("int3-g32", "int8")),
    "W2A8 g32": Entry(ours, "", "edgelab", 2, ("int2-g32", "int8")),
    "W8A8 row": Entry(ours, "", "edgelab", 8, ("int8-row", "int8")),
    "W4A16 g32": Entry(ours, "", "edgelab", 4, ("int4-g32", "float32")),
    "W8A16 row": Entry(ours, "", "edgelab", 8, ("int8-row", "float32")),
    "NF4A16 g64": Entry(ours, "", "edgelab", 4, ("nf4-g64", "float32")),
}
EXPERTS = {
    "torch fp32, per expert": Entry(torch_experts, "W4A8 g32", "torch", 32, ("fp32",)),
    "torch bf16, per expert": Entry(torch_experts, "W4A8 g32", "torch", 16, ("bf16",)),
    "torch int4pack, per expert": Entry(torch_experts, "W4A16 g32", "torch", 4, ("int4pack",)),
    "torch qint8, per expert": Entry(torch_experts, "W8A8 row", "torch", 8, ("qint8",)),
    **{name: DENSE[name] for name in ("W4A8 g32", "W8A8 row", "W4A16 g32")},
}


def array(y) -> np.ndarray:
    """A product of any of them as float32."""
    if isinstance(y, torch.Tensor):
        return y.float().numpy()
    return y if isinstance(y, np.ndarray) else y.numpy()
