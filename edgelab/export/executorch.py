"""ExecuTorch (.pte): our own codes in a program of fixed shapes, executed and compared in ExecuTorch.

Nothing is quantized again. `torch.export` traces the plain model (`export.plain`), in one of two forms:

    "exact"    every quantized layer unpacks its codes by plain float operators (`plain.Unpacked`), then multiplies: weights are the
               model's to the last bit, inputs stay float32, kernels are ExecuTorch's own. Weights are unpacked at every call
    "dynamic"  every product goes to XNNPACK with 4-bit (8-bit) weights and inputs rounded to int8 per token, called 8da4w there: the
               fast way, and not the same numbers. XNNPACK refuses negative scales, so groups that have one are turned and their largest
               weight, code 0, moves from 8 steps to 7 (`plain.positive`); scales of groups become bfloat16, seven bits of mantissa
               where ours have ten. The notes count both. The embedding is written as in "exact"

"exact" must reach the parity that every target promises; "dynamic" is told as it runs, with a lower bar (`MIN_AS_RUN`).

The method "forward" takes input_ids int64 [1, length] and gives logits float32 [1, length, vocabulary]: pad on the right. With `places`
there are two methods over the same weights, so that an answer costs a token at a time:

    prefill   (input_ids int64 [1, length], start int64 [1], key 0, value 0, ... float32 [1, heads, places, width])
    decode    the same with one token                        -> (logits [1, T, vocabulary], key 0, value 0, ...)

The caller hands what came out as keys and values back in, and as `start` the number of tokens that came before. The methods get_length,
get_places and get_dynamic tell how the file was written.
"""

import contextlib
import hashlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
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
    MODES,
    Plain,
    Weight,
    checked_length,
    checked_mode,
    codes_of,
    group_scales,
    nibbles,
    nothing_past,
    plain,
    positive,
    stepped,
    stored_bytes,
    told,
    whole,
    with_codes,
)
from edgelab.scheme import PerGroup

__all__ = ["MIN_AS_RUN", "MODES", "export", "verify"]


@contextmanager
def _hushed() -> Iterator[None]:
    """The lowering tells its progress in several ways; what it raises is enough."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _needed() -> SimpleNamespace:
    """The packages of the extra `executorch`, imported here so that the rest works without them."""
    try:
        with _hushed():
            from executorch import exir
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir._serialize import _flatbuffer
            from executorch.exir._serialize._program import deserialize_pte_binary
            from executorch.runtime import Runtime
            from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx
    except ImportError as e:
        raise ExportError(
            f"{e.name or 'executorch'} is not installed; export to ExecuTorch needs the extra `executorch`: "
            'pip install "edgelab[executorch]"'
        ) from e
    return SimpleNamespace(
        exir=exir, Partitioner=XnnpackPartitioner, flatbuffer=_flatbuffer, deserialize=deserialize_pte_binary, Runtime=Runtime, intx=intx
    )


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
    """The verified .pte file of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model. `out`: the file to write, or a folder (then `model.pte` in it). `length`:
    tokens that go in at once. `places`: room for a prompt and its answer; the file then has the methods "prefill" and "decode" (see the
    module), without it a text is computed anew for every token. `mode`: "exact" or "dynamic". Lowering takes from seconds to minutes.

    Raises ExportError when the packages of the extra `executorch` are missing, when the model cannot be exported, and when the
    written file does not pass `verify`; nothing is left under `out` then.
    """
    checked_mode(mode)
    model = causal_lm(model)
    checked_length(model, length, places)
    p = plain(model)
    if mode == "dynamic":
        _refuse_for_kernels(p)
    needed = _needed()
    out = Path(out)
    path = place(out, "model.pte")
    began = time.perf_counter()
    with whole_or_nothing(path) as (part,):
        program = _lowered(needed, _with_codes(needed, plain(model), mode), model, length, places, mode)
        part.write_bytes(program)
        result = p.result("executorch", (part,), p.predicted_bytes(stored_bytes) + _twice(p, mode))
        result = replace(result, notes=told(p, mode, length, places), seconds=time.perf_counter() - began)
        if check:
            result = verify(result, model)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _refuse_for_kernels(p: Plain) -> None:
    for w in p.codes.values():
        s = w.q.scheme
        if w.kind != "embedding" and isinstance(s.granularity, PerGroup) and (s.bits == 8 or s.granularity.size % 32):
            raise ExportError(
                f'{w.origin} is {s}; XNNPACK multiplies 4-bit codes in groups of 32, 64, ... or one scale a row: mode="exact"'
            )


def _twice(p: Plain, mode: str) -> int:
    """Bytes of tied pairs that "dynamic" holds twice, for the product and for the embedding."""
    return sum(map(stored_bytes, p.tied())) if mode == "dynamic" else 0


def _with_codes(needed: SimpleNamespace, p: Plain, mode: str) -> Plain:
    """`p`, changed: its quantized weights are what `torch.export` shall keep."""
    if mode == "exact":
        return with_codes(p)
    intx = needed.intx
    for w in p.weights.values():
        if w.q is None or w.kind == "embedding":
            continue
        values, scales, _ = positive(w.q)
        scales = torch.from_numpy(scales).float()
        kind = torch.int8 if w.q.scheme.bits == 8 else torch.int4
        weight = intx.IntxUnpackedToInt8Tensor(
            torch.from_numpy(values), scales, torch.zeros(scales.shape, dtype=torch.int8), kind, (1, w.q.shape[1] // scales.shape[1]),
            torch.float32, intx.IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
        )  # fmt: skip
        p.model.get_submodule(w.name.removesuffix(".weight")).weight = nn.Parameter(weight, requires_grad=False)
    return with_codes(p, ("embedding",))


def _lowered(needed: SimpleNamespace, p: Plain, model: nn.Module, length: int, places: int | None, mode: str) -> bytes:
    ids = torch.zeros(1, length, dtype=torch.int64)
    try:
        with _hushed(), torch.no_grad():
            if places is None:
                programs = {"forward": torch.export.export(whole(p), (ids,), strict=False)}
            else:
                step, past, start = stepped(p, places), nothing_past(model, places), torch.zeros(1, dtype=torch.int64)
                inputs = {"prefill": (ids, start, *past), "decode": (ids[:, :1], start, *past)}
                programs = {name: torch.export.export(step, given, strict=False) for name, given in inputs.items()}
            programs = {name: program.run_decompositions({}) for name, program in programs.items()} if mode == "dynamic" else programs
            edge = needed.exir.to_edge_transform_and_lower(
                programs,
                partitioner=[needed.Partitioner()] if mode == "dynamic" else [],
                constant_methods={"get_length": length, "get_places": places or 0, "get_dynamic": int(mode == "dynamic")},
                compile_config=needed.exir.EdgeCompileConfig(_check_ir_validity=False),
            )
            return bytes(edge.to_executorch().buffer)
    except ExportError:
        raise
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise ExportError(f"ExecuTorch could not lower {type(model).__name__}: {type(e).__name__}: {first}") from e


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float | None = None, seed: int = 0
) -> ExportResult:
    """`result` with the parity that ExecuTorch reached and the counts found in the file.

    Opens the file again. First its constants: every code and scale must be bit for bit the model's ("dynamic": what `positive` and
    `coarse` make of them) and be read, in "dynamic" by XNNPACK's product with 4-bit (8-bit) weights, once per weight and method. Then
    ExecuTorch on random tokens of each of `lengths` (what is longer than the file takes is cut) against `model`; with "decode" half of
    them in prefill, the rest one by one.

    Raises ExportError for a changed code, a missing weight, a size off the prediction, or a cosine below `min_cosine` (by default
    `MIN_COSINE` for "exact", `MIN_AS_RUN` for "dynamic").
    """
    needed, path = _needed(), result.files[0]
    program = _opened(needed, path)
    length, places, dynamic = (program.load_method(f"get_{name}").execute([])[0] for name in ("length", "places", "dynamic"))
    mode, places = MODES[dynamic], places or None
    p = plain(model)
    counted = _check_weights(needed, path, p, mode)
    size, predicted = path.stat().st_size, p.predicted_bytes(stored_bytes) + _twice(p, mode)
    # a program is wordy: some 2.5 KB a weight and method for the operators that unpack it, more for the rest of the graph
    allowed = predicted // 100 + (2**17 + 2800 * len(p.weights)) * (2 if places else 1)
    if size > predicted + allowed:
        raise ExportError(f"{path.name} has {size:,} bytes; the weights take {predicted:,}, the rest at most {allowed:,}")
    lengths = tuple(sorted({min(n, places or length) for n in lengths}))
    parity = agreement(_runner(program, model, length, places), model, lengths, seed)
    least = min_cosine if min_cosine is not None else MIN_COSINE if mode == "exact" else MIN_AS_RUN
    require(parity, f"{path.name} ({mode}) in ExecuTorch", least, "" if mode == "exact" else 'mode="exact" is faithful')
    how = " portable kernels" if mode == "exact" else " XNNPACK, inputs rounded to int8"
    by = f"ExecuTorch {version('executorch')}{how}, {' + '.join(map(str, lengths))} tokens"
    notes = result.notes or told(p, mode, length, places)
    found = p.result("executorch", result.files, predicted, counted)
    return replace(found, notes=notes, seconds=result.seconds, parity=parity, verified_by=by)


# ------------------------------------------------------------------------------------------------- codes in the file


def _check_weights(needed: SimpleNamespace, path: Path, p: Plain, mode: str) -> tuple[int, int]:
    """(weights, expert weights) that the file really holds as codes and reads in every method."""
    try:
        stored = needed.deserialize(path.read_bytes())
        plans = [plan for plan in stored.program.execution_plan if not plan.name.startswith("get_")]
        held = _unpacked_constants(stored.program, plans)
        multiplied = [_products(needed, stored, plan) for plan in plans] if mode == "dynamic" else []
    except ExportError:
        raise
    except Exception as e:  # a damaged offset raises whatever it hits
        raise ExportError(f"{path.name} is no .pte file: {type(e).__name__}: {e}") from e
    total = in_experts = 0
    for w in p.codes.values():
        kinds = {
            other.kind for other in p.weights.values() if other.q is not None and other.q.packed.ctypes.data == w.q.packed.ctypes.data
        } | {w.kind}
        if mode == "exact" or "embedding" in kinds:
            _check_unpacked(path, held, w)
        if mode == "dynamic" and (w.kind != "embedding" or w.q.packed.ctypes.data in {q.packed.ctypes.data for q in p.tied()}):
            values, scales, _ = positive(w.q)
            grouped = isinstance(w.q.scheme.granularity, PerGroup)
            if grouped:
                scale_bytes = torch.from_numpy(scales).bfloat16().view(torch.int16).numpy().tobytes()
            else:
                scale_bytes = scales.astype(np.float32).tobytes()
            wanted = (_hash(_packed(values, w.q.scheme.bits)), _hash(scale_bytes), w.q.shape)
            if not all(wanted in products for products in multiplied):
                raise ExportError(
                    f"{path.name}: no product of XNNPACK reads the codes and scales of {w.name} ({w.q.scheme}), or they changed"
                )
        total += prod(w.q.shape)
        in_experts += prod(w.q.shape) * (w.kind == "experts")
    return total, in_experts


def _hash(data: bytes | np.ndarray) -> bytes:
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).digest()


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """As XNNPACK's serializer stores int8 values: themselves, or two of 4 bits a byte, plus 8, the first in the low half."""
    if bits == 8:
        return values
    codes = (values + np.int8(8)).view(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpacked_constants(program, plans) -> dict[str, list[dict[bytes, tuple]]]:
    """By type ("BYTE", "HALF"), for each method: {hash of a constant that some operator reads: its bytes and shape}."""
    found: dict[str, list] = {"BYTE": [], "HALF": []}
    for plan in plans:
        read = {i for chain in plan.chains for step in chain.instructions for i in getattr(step.instr_args, "args", None) or ()}
        for kind, lists in found.items():
            values = {}
            for i in read:
                t = plan.values[i].val if isinstance(i, int) else None
                if type(t).__name__ == "Tensor" and t.data_buffer_idx and t.scalar_type.name == kind:
                    raw = bytes(program.constant_buffer[t.data_buffer_idx].storage)
                    values[_hash(raw)] = (raw, tuple(t.sizes))
            lists.append(values)
    return found


def _check_unpacked(path: Path, held: dict[str, list], w: Weight) -> None:
    codes, scales = nibbles(w.q), group_scales(w.q)[..., None]
    for what, kind, array in (("codes", "BYTE", codes), ("scales", "HALF", scales)):
        for values in held[kind]:
            raw, shape = values.get(_hash(array), (b"", ()))
            if shape != array.shape:
                raise ExportError(f"{path.name}: the {what} of {w.name} ({w.q.scheme}) are not read by every method, or they changed")
            if what == "codes" and not np.array_equal(codes_of(np.frombuffer(raw, np.uint8), w.q), w.q.codes()):
                raise ExportError(f"{path.name}: the codes of {w.name} ({w.q.scheme}) are not the model's")


def _products(needed: SimpleNamespace, stored, plan) -> set[tuple[bytes, bytes, tuple[int, ...]]]:
    """(hash of the codes, hash of the scales, shape) of every product with 4- or 8-bit weights that XNNPACK computes in a method."""
    from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as xnn

    schema, found = xnn._get_schema_bytes(), set()
    named = stored.named_data
    data = {key: bytes(named.buffers[entry.buffer_index]) for key, entry in (named.pte_data if named else {}).items()}
    for delegate in plan.delegates:
        raw = bytes(stored.program.backend_delegate_data[delegate.processed.index].data)
        header = xnn.XNNHeader.from_bytes(raw[: xnn.XNNHeader.EXPECTED_LENGTH])
        body = raw[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "graph.fbs").write_bytes(schema)
            Path(folder, "graph.bin").write_bytes(body)
            needed.flatbuffer._flatc_decompile(folder, f"{folder}/graph.fbs", f"{folder}/graph.bin", ["--raw-binary"])
            graph = json.loads(Path(folder, "graph.json").read_text())
        keys = [c.get("named_key", "") for c in graph["constant_data"]]
        values = {}
        for value in graph["xvalues"]:
            if value["xvalue_union_type"] == "XNNQuantizedTensorValue":
                t, q = value["xvalue_union"]["tensor_value"], value["xvalue_union"]["quant_params"]
                values[t["id_out"]] = (t, q)
        for node in graph["xnodes"]:
            if node["xnode_union_type"] != "XNNFullyConnected" or node["xnode_union"]["filter_id"] not in values:
                continue
            t, q = values[node["xnode_union"]["filter_id"]]
            if t["datatype"] in ("xnn_datatype_qbint4", "xnn_datatype_qcint4", "xnn_datatype_qcint8"):
                codes, scales = data[keys[t["constant_buffer_idx"]]], data[keys[q["scale_buffer_idx"]]]
                found.add((_hash(codes), _hash(scales), tuple(t["dims"])))
    return found


# ------------------------------------------------------------------------------------------------------- the runtime


def _opened(needed: SimpleNamespace, path: Path):
    try:
        return needed.Runtime.get().load_program(path.read_bytes())
    except (RuntimeError, ValueError, OSError) as e:
        raise ExportError(f"ExecuTorch refuses {path.name}: {str(e).strip()[:200]}") from e


def _runner(program, model: nn.Module, length: int, places: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """ids int64 [T] -> logits [T, vocabulary] in ExecuTorch."""
    try:
        methods = {name: program.load_method(name) for name in (("forward",) if places is None else ("prefill", "decode"))}
    except (RuntimeError, ValueError) as e:
        raise ExportError(f"ExecuTorch cannot load the program: {str(e).strip()[:200]}") from e

    def padded(ids: np.ndarray, n: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(ids, (0, n - len(ids))).astype(np.int64)[None])

    def run(ids: np.ndarray) -> np.ndarray:
        if places is None:
            return methods["forward"].execute([padded(ids, length)])[0][0, : len(ids)].numpy().copy()
        state, first, seen = nothing_past(model, places), min(length, -(-len(ids) // 2)), []
        for begin, end, name in ((0, first, "prefill"), *((i, i + 1, "decode") for i in range(first, len(ids)))):
            given = padded(ids[begin:end], length if name == "prefill" else 1)
            logits, *state = methods[name].execute([given, torch.tensor([begin]), *state])
            state = [t.clone() for t in state]
            seen.append(logits[0, : end - begin].numpy().copy())
        return np.concatenate(seen)

    return run
