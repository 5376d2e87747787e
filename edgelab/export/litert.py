"""LiteRT (.tflite): our own codes in 4-bit tensors of a graph of fixed shapes, executed and compared in LiteRT.

Nothing is quantized again. `litert_torch` converts the plain model (`export.plain`) in float32; then every weight in the file, found by
its bytes, is replaced by its codes. TFLite packs as we do, the first code in the low bits, but signed: q - 8 in two's complement,
which is q with its highest bit turned. What reads them is written in one of two ways:

    "exact"    codes int4 [out, groups, size] -> CAST -> MUL by the float16 scales -> RESHAPE [out, in] -> the operator as it was.
               The weights are the model's to the last bit and inputs stay float32. Weights are unpacked at every call
    "dynamic"  the tensor itself is int4 with blockwise scales (or one scale a row), and LiteRT's kernels (XNNPACK) round the inputs
               of every product to int8, per token: the fast way, and not the same numbers. These kernels refuse negative scales, so
               groups that have one are turned and their largest weight, code 0, moves from 8 steps to 7 (`plain.positive`); and they
               keep seven bits of a blockwise scale's mantissa where ours have ten. The notes count both. The embedding is "exact"

"exact" must reach the parity that every target promises; "dynamic" is told as it runs, with a lower bar (`MIN_AS_RUN`).

Either `length` tokens go in and all their logits come out (signature "serving_default": input_ids int32 [1, length] -> logits): pad on
the right. Or, with `places`, two signatures over the same weights, so that an answer costs a token at a time:

    prefill   input_ids int32 [1, length], start int32 [1], key.0, value.0, ... float32 [1, heads, places, width]
    decode    the same with one token                        -> logits float32 [1, T, vocabulary], key.0, value.0, ...

The caller hands what came out as key and value back in, and as `start` the number of tokens that came before.

Known of litert_torch 0.10: a model with one key and value head (multi-query attention) is converted without a word and computes something
else, also in float32; `verify` refuses it.
"""

import contextlib
import hashlib
import io
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, place, require, whole_or_nothing
from edgelab.export.plain import (
    MIN_AS_RUN,
    Plain,
    Weight,
    checked_length,
    checked_mode,
    coarse,
    group_scales,
    nothing_past,
    plain,
    positive,
    scale_run,
    signed,
    stepped,
    stored_bytes,
    told,
    whole,
)
from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import PerGroup

BLOCKWISE = (32, 64, 128, 256)  # block sizes of XNNPACK's blockwise product
_OUTSIDE = 256  # bytes of a buffer from which on it lies behind the flatbuffer, on a multiple of 16


def _needed(converter: bool = True) -> SimpleNamespace:
    """The packages of the extra `litert`, imported here so that the rest works without them."""
    try:
        from ai_edge_litert import interpreter, schema_py_generated

        with _hushed():
            litert_torch = __import__("litert_torch") if converter else None
    except ImportError as e:
        raise ExportError(
            f"{e.name or 'ai-edge-litert'} is not installed; export to LiteRT needs the extra `litert` in an environment of its own: "
            'pip install -c .ci/constraints-litert.txt "edgelab[litert]"'
        ) from e
    return SimpleNamespace(schema=schema_py_generated, runtime=interpreter, convert=litert_torch)


@contextmanager
def _hushed() -> Iterator[None]:
    """The converter tells its progress on three channels; what it raises is enough."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------------- codes in the file


def stored_bits(q: QTensor) -> int:
    """Bits of a code in the file: 2 and 3 go out as 4."""
    return 8 if q.scheme.bits == 8 else 4


def code_bytes(q: QTensor) -> np.ndarray:
    """uint8: the codes of all rows in one run, two's complement, the first in the low bits.

    >>> from edgelab.scheme import QuantScheme
    >>> q = QTensor.from_codes(np.array([[0, 8, 15, 9]], np.uint8), np.ones((1, 1), np.float16), QuantScheme.parse("int4-row"))
    >>> code_bytes(q).tobytes().hex()  # -8, 0, 7, 1
    '0817'
    """
    return _packed(signed(q), stored_bits(q))


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    values = values.reshape(-1).view(np.uint8)
    return values if bits == 8 else pack(values & np.uint8(15), 4)


def codes_of(raw: np.ndarray, q: QTensor) -> np.ndarray:
    """Codes uint8 [out, in] of the scheme of `q`, from the file's bytes: the inverse of `code_bytes`."""
    bits, n = stored_bits(q), prod(q.shape)
    values = raw[:n] if bits == 8 else unpack(raw, 4, n)
    shift = 2 ** (bits - 1)
    return ((values ^ np.uint8(shift)).astype(np.int16) - shift + q.scheme.zero_point).astype(np.uint8).reshape(q.shape)


def _grouped(q: QTensor) -> tuple[int, int, int]:
    """[out, groups, size] in which a scale stands for the last dimension."""
    return q.shape[0], q.shape[1] // scale_run(q), scale_run(q)


# ---------------------------------------------------------------------------------------------------- the flatbuffer


class _File:
    """A .tflite file as objects of its schema, to read and to change."""

    def __init__(self, schema, raw: bytes, name: str) -> None:
        self.S, self.name = schema, name
        try:
            if raw[4:8] != b"TFL3":
                raise ValueError("no TFL3")
            self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(raw, 0))
        except Exception as e:  # a damaged offset raises whatever it hits
            raise ExportError(f"{name} is no .tflite file: {type(e).__name__}") from e
        for b in self.model.buffers:
            if b.offset:
                if b.offset + b.size > len(raw):
                    raise ExportError(f"{name} is cut short: a buffer ends at byte {b.offset + b.size:,} of {len(raw):,}")
                b.data = np.frombuffer(raw, np.uint8, b.size, b.offset)
            b.offset = b.size = 0
        self._kinds = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}

    def data(self, tensor) -> np.ndarray:
        """uint8: the bytes of a constant; none of any other tensor."""
        data = self.model.buffers[tensor.buffer].data
        return np.zeros(0, np.uint8) if data is None else np.asarray(data, np.uint8)

    def kind(self, op) -> str:
        code = self.model.operatorCodes[op.opcodeIndex]
        return self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def code(self, kind: str) -> int:
        """The index of an operator's code, entered on first use."""
        number = getattr(self.S.BuiltinOperator, kind)
        for i, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == number:
                return i
        code = self.S.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def buffer(self, data: np.ndarray) -> int:
        b = self.S.BufferT()
        b.data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.model.buffers.append(b)
        return len(self.model.buffers) - 1

    def tensor(self, graph, name: str, kind: str, shape: tuple[int, ...], buffer: int = 0) -> int:
        t = self.S.TensorT()
        t.name, t.type, t.shape, t.buffer = name, getattr(self.S.TensorType, kind), np.array(shape, np.int32), buffer
        t.hasRank = True
        graph.tensors.append(t)
        return len(graph.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int, options: str | None = None):
        op = self.S.OperatorT()
        op.opcodeIndex, op.inputs, op.outputs = self.code(kind), np.array(inputs, np.int32), np.array([output], np.int32)
        if options:
            op.builtinOptionsType, op.builtinOptions = getattr(self.S.BuiltinOptions, options), getattr(self.S, f"{options}T")()
        return op

    def describe(self, name: str, data: bytes) -> None:
        m = self.S.MetadataT()
        m.name, m.buffer = name, self.buffer(np.frombuffer(data, np.uint8))
        self.model.metadata = [*(self.model.metadata or []), m]

    def described(self, name: str) -> bytes:
        """The metadata `name`. Raises KeyError."""
        held = {bytes(m.name).decode(): self.model.buffers[m.buffer].data for m in self.model.metadata or []}
        return np.asarray(held[name], np.uint8).tobytes()

    def slim(self) -> None:
        """Drop buffers that nothing reads, share equal ones, and shorten the names: the converter's tell the path of every layer."""
        kept: dict[bytes, int] = {b"": 0}
        buffers, number = [self.model.buffers[0]], {0: 0}
        described = {m.buffer for m in self.model.metadata or []}
        for i in sorted({t.buffer for g in self.model.subgraphs for t in g.tensors} | described):
            data = self.model.buffers[i].data
            key = b"" if data is None or not len(data) else hashlib.sha256(np.asarray(data, np.uint8).tobytes()).digest()
            if key not in kept:
                kept[key] = len(buffers)
                buffers.append(self.model.buffers[i])
            number[i] = kept[key]
        self.model.buffers = buffers
        for m in self.model.metadata or []:
            m.buffer = number[m.buffer]
        for g in self.model.subgraphs:
            for t in g.tensors:
                t.buffer = number[t.buffer]
                t.name = t.name if isinstance(t.name, str) else ""
                if t.quantization is not None and t.quantization.scale is None and not t.quantization.detailsType:
                    t.quantization = None

    def write(self, path: Path) -> None:
        import flatbuffers

        large = [b for b in self.model.buffers if b.data is not None and len(b.data) >= _OUTSIDE]
        pieces = [np.asarray(b.data, np.uint8) for b in large]
        for b in large:
            b.data, b.offset, b.size = None, 1, 1  # as wide as any other number

        def packed() -> bytes:
            builder = flatbuffers.Builder(1 << 20)
            builder.Finish(self.model.Pack(builder), b"TFL3")
            return bytes(builder.Output())

        at = len(packed())
        for b, piece in zip(large, pieces, strict=True):
            at += -at % 16
            b.offset, b.size, at = at, len(piece), at + len(piece)
        with open(path, "wb") as f:
            f.write(packed())
            for b, piece in zip(large, pieces, strict=True):
                f.write(bytes(b.offset - f.tell()))
                f.write(piece.data)
        for b, piece in zip(large, pieces, strict=True):
            b.data, b.offset, b.size = piece, 0, 0


def _replace_weights(file: _File, p: Plain, mode: str) -> None:
    """Put codes in the place of every float weight. Raises ExportError when one is not found in the file."""
    by_bytes = {(w.q.shape, hashlib.sha256(w.q.dequantize().tobytes()).digest()): w for w in p.codes.values()}
    shapes, buffers, found = {w.q.shape for w in p.codes.values()}, {}, set()

    def constant(name: str, data: Callable[[], np.ndarray]) -> int:
        if name not in buffers:
            buffers[name] = file.buffer(data())
        return buffers[name]

    for graph in file.model.subgraphs:
        for at in range(len(graph.tensors)):
            t = graph.tensors[at]
            shape = tuple(map(int, t.shape)) if t.shape is not None else ()
            if t.type != file.S.TensorType.FLOAT32 or shape not in shapes or not len(file.data(t)):
                continue
            w = by_bytes.get((shape, hashlib.sha256(file.data(t).tobytes()).digest()))
            if w is None:
                continue
            found.add(w.name)
            readers = [op for op in graph.operators if at in op.inputs]
            products = [op for op in readers if file.kind(op) == "FULLY_CONNECTED" and op.inputs[1] == at]
            rest = [op for op in readers if op not in products]
            if mode == "exact" or not products:
                _unpacked(file, graph, at, w, constant, readers)
            else:
                if rest:  # a tied pair: the embedding reads its own tensor of the same buffer
                    twin = file.tensor(graph, "", "FLOAT32", shape)
                    for op in rest:
                        op.inputs = np.where(np.asarray(op.inputs) == at, twin, op.inputs).astype(np.int32)
                    _unpacked(file, graph, twin, w, constant, rest)
                _dynamic(file, graph, at, w, constant)
    missing = sorted(set(p.codes) - found)
    if missing:
        raise ExportError(
            f"the converter wrote {len(missing)} weights in another form, {missing[0]} first: they can't be replaced by codes"
        )


def _unpacked(file: _File, graph, at: int, w: Weight, constant: Callable, readers: list) -> None:
    """The tensor `at` becomes what four operators make of the codes."""
    shape, kind = _grouped(w.q), f"INT{stored_bits(w.q)}"
    codes = file.tensor(graph, f"{w.name}.codes", kind, shape, constant(f"{w.name}.codes", lambda: code_bytes(w.q)))
    scales = file.tensor(graph, "", "FLOAT16", (*shape[:2], 1), constant(f"{w.name}.scales", lambda: group_scales(w.q)))
    wide = next((i for i, t in enumerate(graph.tensors) if t.name == f"{w.q.shape}"), None)
    if wide is None:
        buffer = constant(f"{w.q.shape}", lambda: np.array(w.q.shape, np.int32))
        wide = file.tensor(graph, f"{w.q.shape}", "INT32", (2,), buffer)
    values, factors, product = (file.tensor(graph, "", "FLOAT32", s) for s in (shape, (*shape[:2], 1), shape))
    graph.tensors[at].buffer, graph.tensors[at].name = 0, ""
    cast = [file.operator("CAST", [codes], values), file.operator("CAST", [scales], factors)]
    made = [*cast, file.operator("MUL", [values, factors], product, "MulOptions"), file.operator("RESHAPE", [product, wide], at)]
    first = min(next(i for i, op in enumerate(graph.operators) if op is r) for r in readers)
    graph.operators[first:first] = made


def _dynamic(file: _File, graph, at: int, w: Weight, constant: Callable) -> None:
    """The tensor `at` becomes a quantized one, which the kernels multiply as it is."""
    t, S = graph.tensors[at], file.S
    values, scales, _ = positive(w.q)
    q = S.QuantizationParametersT()
    if isinstance(w.q.scheme.granularity, PerGroup):
        details = S.BlockwiseQuantizationT()
        buffer = constant(f"{w.name}.coarse", lambda: coarse(scales))
        details.scales = file.tensor(graph, "", "FLOAT16", scales.shape, buffer)
        details.zeroPoints, details.blockSize = -1, w.q.scheme.granularity.size
        q.detailsType, q.details = S.QuantizationDetails.BlockwiseQuantization, details
    else:
        q.scale, q.zeroPoint = scales.reshape(-1).astype(np.float32), np.zeros(len(scales), np.int64)
    q.quantizedDimension = 0
    t.quantization, t.name, t.type = q, f"{w.name}.turned", getattr(S.TensorType, f"INT{stored_bits(w.q)}")
    t.buffer = constant(f"{w.name}.turned", lambda: _packed(values, stored_bits(w.q)))


def _name_signatures(file: _File) -> None:
    """args_0, args_1, ... and output_0, ... become what they are."""
    for s in file.model.signatureDefs:
        for maps, head in ((s.inputs, ["input_ids"] + ["start"] * (len(s.inputs) > 1)), (s.outputs, ["logits"])):
            for m in maps:
                i = int(re.search(rb"\d+$", bytes(m.name))[0])
                m.name = head[i] if i < len(head) else f"{('key', 'value')[(i - len(head)) % 2]}.{(i - len(head)) // 2}"


# --------------------------------------------------------------------------------------------------------- the doors


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    length: int = 128,
    places: int | None = None,
    mode: str = "exact",
    check: bool = True,
) -> ExportResult:
    """The verified .tflite file of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model. `out`: the file to write, or a folder (then `model.tflite` in it).
    `length`: tokens that go in at once. `places`: room for a prompt and its answer; the file then has the signatures "prefill" and
    "decode" (see the module), without it a text is computed anew for every token. `mode`: "exact" or "dynamic".

    Raises ExportError when the packages of the extra `litert` are missing, when the model cannot be exported, and when the written
    file does not pass `verify`; nothing is left under `out` then.
    """
    checked_mode(mode)
    model = causal_lm(model)
    checked_length(model, length, places)
    p = plain(model)
    if mode == "dynamic":
        _refuse_for_kernels(p)
    needed = _needed()
    out = Path(out)
    path = place(out, "model.tflite")
    began = time.perf_counter()
    with whole_or_nothing(path) as (part,):
        file = _File(needed.schema, _converted(needed.convert, p, model, length, places), path.name)
        _replace_weights(file, p, mode)
        _name_signatures(file)
        options = {"mode": mode, "length": length, "places": places, "schemes": sorted({str(w.q.scheme) for w in p.codes.values()})}
        file.describe("edgelab", json.dumps(options).encode())
        file.slim()
        file.write(part)
        result = p.result("litert", (part,), _predicted(p, mode))
        result = replace(result, notes=told(p, mode, length, places), seconds=time.perf_counter() - began)
        if check:
            result = verify(result, model)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _predicted(p: Plain, mode: str) -> int:
    """Bytes of codes, scales and floats; "dynamic" holds a tied pair twice, turned and as it is."""
    return p.predicted_bytes(stored_bytes) + (sum(map(stored_bytes, p.tied())) if mode == "dynamic" else 0)


def _refuse_for_kernels(p: Plain) -> None:
    for w in p.codes.values():
        s = w.q.scheme
        if w.kind != "embedding" and isinstance(s.granularity, PerGroup) and (s.bits == 8 or s.granularity.size not in BLOCKWISE):
            sizes = ", ".join(map(str, BLOCKWISE))
            raise ExportError(
                f'{w.origin} is {s}; LiteRT\'s kernels have 4-bit codes in groups of {sizes} or one scale a row: mode="exact"'
            )


def _converted(litert_torch, p: Plain, model: nn.Module, length: int, places: int | None) -> bytes:
    """The float32 model as the converter writes it."""
    ids = torch.zeros(1, length, dtype=torch.int32)
    try:
        with _hushed(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            if places is None:
                edge = litert_torch.convert(whole(p), (ids,))
            else:
                start, past, step = torch.zeros(1, dtype=torch.int32), nothing_past(model, places), stepped(p, places)
                edge = litert_torch.signature("prefill", step, (ids, start, *past))
                edge = edge.signature("decode", step, (ids[:, :1], start, *past)).convert()
            edge.export(f"{folder}/float.tflite")
            return Path(folder, "float.tflite").read_bytes()
    except ExportError:
        raise
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise ExportError(f"litert_torch could not convert {type(model).__name__}: {type(e).__name__}: {first}") from e


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float | None = None, seed: int = 0
) -> ExportResult:
    """`result` with the parity that LiteRT reached and the counts found in the file.

    Opens the file again. First its tensors: every code and scale must be bit for bit the model's ("dynamic": what `positive` and
    `coarse` make of them), and be read by the right operator. Then LiteRT on random tokens of each of `lengths` (what is longer than the
    file takes is cut) against `model`; with "decode" half of them in prefill, the rest one by one.

    Raises ExportError for a changed code, a missing weight, a size off the prediction, or a cosine below `min_cosine` (by default
    `MIN_COSINE` for "exact", `MIN_AS_RUN` for "dynamic").
    """
    needed, path = _needed(converter=False), result.files[0]
    file = _File(needed.schema, path.read_bytes(), path.name)
    try:
        options = json.loads(file.described("edgelab"))
        mode, length, places = options["mode"], options["length"], options["places"]
    except (KeyError, ValueError) as e:
        raise ExportError(f"{path.name} does not say how it was written: it is none of ours") from e
    p = plain(model)
    counted = _check_weights(file, p, mode)
    if counted != p.quantized():
        raise ExportError(f"{path.name} holds (weights, expert weights) {counted} as codes; the model has {p.quantized()}")
    size, predicted = path.stat().st_size, _predicted(p, mode)
    operators = sum(len(g.operators) for g in file.model.subgraphs)
    allowed = predicted // 100 + 300 * operators + 2**17
    if size > predicted + allowed:
        raise ExportError(f"{path.name} has {size:,} bytes; the weights take {predicted:,} and {operators:,} operators at most {allowed:,}")
    lengths = tuple(sorted({min(n, places or length) for n in lengths}))
    parity = agreement(_runner(needed.runtime, path, length, places), model, lengths, seed)
    least = min_cosine if min_cosine is not None else MIN_COSINE if mode == "exact" else MIN_AS_RUN
    require(parity, f"{path.name} ({mode}) in LiteRT", least, "" if mode == "exact" else 'mode="exact" is faithful')
    from importlib.metadata import version

    how = "" if mode == "exact" else ", inputs rounded to int8"
    by = f"LiteRT (ai-edge-litert {version('ai-edge-litert')}) CPU{how}, {' + '.join(map(str, lengths))} tokens"
    notes = result.notes or told(p, mode, length, places)
    found = p.result("litert", result.files, predicted, counted)
    return replace(found, notes=notes, seconds=result.seconds, parity=parity, verified_by=by)


def _check_weights(file: _File, p: Plain, mode: str) -> tuple[int, int]:
    """(weights, expert weights) that the file really holds as codes and reads by the right operators, in every signature."""
    total, in_experts = 0, 0
    for w in p.codes.values():
        reading = 0
        for g in file.model.subgraphs:
            names = {bytes(t.name).decode(): i for i, t in enumerate(g.tensors) if t.name}
            if (at := names.get(f"{w.name}.turned")) is not None and mode == "dynamic":
                _check_turned(file, g, at, w)
                reading += any(file.kind(op) == "FULLY_CONNECTED" and op.inputs[1] == at for op in g.operators)
            elif (at := names.get(f"{w.name}.codes")) is not None:
                codes, scales = _unpacking(file, g, at, w)
                if not np.array_equal(codes_of(codes, w.q), w.q.codes()):
                    raise ExportError(f"{file.name}: the codes of {w.name} ({w.q.scheme}) are not the model's")
                if scales.tobytes() != group_scales(w.q).tobytes():
                    raise ExportError(f"{file.name}: the scales of {w.name} ({w.q.scheme}) are not the model's")
                reading += 1
        if reading < len(file.model.subgraphs):
            raise ExportError(f"{file.name}: {w.name} ({w.q.scheme}) is not read as codes by every signature")
        total += prod(w.q.shape)
        in_experts += prod(w.q.shape) * (w.kind == "experts")
    return total, in_experts


def _unpacking(file: _File, g, at: int, w: Weight) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of the codes `at`, of their scales), when the four operators behind them make a weight that something reads."""

    def reader(tensor: int, kind: str):
        found = [op for op in g.operators if tensor in op.inputs]
        if len(found) != 1 or file.kind(found[0]) != kind:
            raise ExportError(f"{file.name}: the codes of {w.name} ({w.q.scheme}) are not read by one {kind}")
        return found[0]

    values = reader(at, "CAST").outputs[0]
    product = reader(values, "MUL")
    factors = next(i for i in product.inputs if i != values)
    scales = next((g.tensors[op.inputs[0]] for op in g.operators if factors in op.outputs and file.kind(op) == "CAST"), None)
    made = reader(product.outputs[0], "RESHAPE").outputs[0]
    types = file.S.TensorType
    right = scales is not None and scales.type == types.FLOAT16 and g.tensors[at].type == getattr(types, f"INT{stored_bits(w.q)}")
    if not right or tuple(g.tensors[made].shape) != w.q.shape or not any(made in op.inputs for op in g.operators):
        raise ExportError(f"{file.name}: {w.name} ({w.q.scheme}) is not made of its codes and scales")
    return file.data(g.tensors[at]), file.data(scales)


def _check_turned(file: _File, g, at: int, w: Weight) -> None:
    t, (values, scales, _) = g.tensors[at], positive(w.q)
    held = t.quantization
    if held.detailsType == file.S.QuantizationDetails.BlockwiseQuantization:
        right = file.data(g.tensors[held.details.scales]).tobytes() == coarse(scales).tobytes()
    else:
        right = np.array_equal(np.asarray(held.scale, np.float32), scales.reshape(-1).astype(np.float32))
    if t.type != getattr(file.S.TensorType, f"INT{stored_bits(w.q)}") or not right:
        raise ExportError(f"{file.name}: the type or the scales of {w.name} ({w.q.scheme}) are not what was written")
    if file.data(t).tobytes() != _packed(values, stored_bits(w.q)).tobytes():
        raise ExportError(f"{file.name}: the codes of {w.name} ({w.q.scheme}) are not the model's")


def _runner(runtime, path: Path, length: int, places: int | None, threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """ids int64 [T] -> logits [T, vocabulary] in LiteRT."""
    try:
        interpreter = runtime.Interpreter(str(path), num_threads=threads)
        runners = {name: interpreter.get_signature_runner(name) for name in interpreter.get_signature_list()}
    except (RuntimeError, ValueError) as e:
        raise ExportError(f"LiteRT refuses {path.name}: {str(e).strip()[:200]}") from e

    def padded(ids: np.ndarray, n: int) -> np.ndarray:
        return np.pad(ids, (0, n - len(ids))).astype(np.int32)[None]

    def run(ids: np.ndarray) -> np.ndarray:
        if places is None:
            return runners["serving_default"](input_ids=padded(ids, length))["logits"][0, : len(ids)].copy()
        state = {k: np.zeros(d["shape"], np.float32) for k, d in runners["decode"].get_input_details().items() if "." in k}
        first, seen = min(length, -(-len(ids) // 2)), []
        for begin, end, name in ((0, first, "prefill"), *((i, i + 1, "decode") for i in range(first, len(ids)))):
            given = padded(ids[begin:end], length if name == "prefill" else 1)
            out = runners[name](input_ids=given, start=np.array([begin], np.int32), **state)
            seen.append(out.pop("logits")[0, : end - begin].copy())
            state = {k: v.copy() for k, v in out.items()}
        return np.concatenate(seen)

    run.interpreter = interpreter
    return run
