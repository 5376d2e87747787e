"""OpenVINO (.xml and .bin): our own codes in a graph of any length, executed and compared in OpenVINO.

Nothing is quantized again. OpenVINO converts the plain model (`export.plain`) from torch; then every weight, found by its bytes, becomes
what OpenVINO calls a compressed weight, which its plugins multiply without unpacking it first:

    Constant i4 [out, groups, size] (q - 8; i8 for 8 bits) -> Convert -> Multiply by Convert(f16 scales) -> Reshape [out, in]

By default OpenVINO computes as the device likes: bfloat16 or float16 where there is hardware for it, and inputs of 4-bit products
rounded to int8 in groups. `EXACT` are the settings that leave the inputs float32; `verify` runs with them, and tells in the notes what the
default makes of it.

input_ids int64 [batch, sequence] -> logits float32 [batch, sequence, vocabulary]; pad on the right. There is no cache (OpenVINO 2026.4
does not convert the joining of the past with the new tokens): a text is computed anew for each token.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, place, require, whole_or_nothing
from edgelab.export.onnx import _Causal
from edgelab.export.plain import Plain, Weight, group_scales, plain, scale_run, signed, stored_bytes, told
from edgelab.qtensor import pack

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_RUNTIME_NOTE = "in OpenVINO: "


def _needed():
    """openvino, imported here so that the rest works without it."""
    # its package openvino_telemetry reports imports and conversions to its maker unless told not to: nothing leaves this machine
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        with _hushed():
            import openvino
            import openvino.tools.ovc.telemetry_stub as silent
    except ImportError as e:
        raise ExportError(
            f'{e.name or "openvino"} is not installed; export to OpenVINO needs the extra `openvino`: pip install "edgelab[openvino]"'
        ) from e
    for name, module in list(sys.modules.items()):  # where somebody imported it before us
        if name.startswith("openvino.tools.ovc") and hasattr(module, "tm"):
            module.tm = silent
    return openvino


@contextmanager
def _hushed() -> Iterator[None]:
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(model: "nn.Module | str | Path", out: str | Path, *, check: bool = True) -> ExportResult:
    """The verified OpenVINO files of a causal language model, quantized by `compress` or not at all.

    `model`: a module, or the directory of a bundle or a model. `out`: the .xml file to write, or a folder (then `model.xml` in it); the
    weights lie beside it in .bin.

    Raises ExportError when openvino is missing, when the model cannot be exported, and when the written files do not pass `verify`;
    nothing is left under `out` then.
    """
    model = causal_lm(model)
    p = plain(model)
    ov = _needed()
    out = Path(out)
    path = place(out, "model.xml")
    places = (path, path.with_suffix(".bin"))
    began = time.perf_counter()
    with whole_or_nothing(*places) as files:
        graph = _converted(ov, p, model)
        _put_codes(ov, graph, p)
        ov.save_model(graph, str(files[0]), compress_to_fp16=False)
        result = p.result("openvino", files, p.predicted_bytes(stored_bytes))
        notes = ("any length, computed anew for each token", *told(p, "exact", 1, None)[1:])
        result = replace(result, notes=notes, seconds=time.perf_counter() - began)
        if check:
            result = verify(result, model)
    return replace(result, files=places, seconds=time.perf_counter() - began)


def _converted(ov, p: Plain, model: nn.Module):
    free = torch.export.Dim.DYNAMIC
    try:
        with _hushed(), torch.no_grad():
            module = _Causal(p.model, by_comparison=True, cache=False).eval()
            ids = torch.zeros((2, 7), dtype=torch.int64)
            program = torch.export.export(module, (ids,), dynamic_shapes=({0: free, 1: free},), strict=False)
            graph = ov.convert_model(program, share_weights=False)  # shared with a program that is gone, they would be anything
    except ExportError:
        raise
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise ExportError(f"OpenVINO could not convert {type(model).__name__}: {type(e).__name__}: {first}") from e
    graph.inputs[0].get_tensor().set_names({"input_ids"})
    graph.outputs[0].get_tensor().set_names({"logits"})
    return graph


def _kind(w: Weight) -> str:
    return "i8" if w.q.scheme.bits == 8 else "i4"


def _code_bytes(w: Weight) -> np.ndarray:
    """uint8: codes of all rows in one run, two's complement, the first in the low bits."""
    values = signed(w.q).reshape(-1).view(np.uint8)
    return values if w.q.scheme.bits == 8 else pack(values & np.uint8(15), 4)


def _put_codes(ov, graph, p: Plain) -> None:
    """Put codes in the place of every float weight. Raises ExportError when one is not found."""
    from openvino import opset13 as ops

    wanted = {(w.q.shape, w.q.dequantize().tobytes()): w for w in p.codes.values()}
    shapes, made = {w.q.shape for w in p.codes.values()}, {}
    for node in list(graph.get_ops()):
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32 or tuple(node.get_output_shape(0)) not in shapes:
            continue
        w = wanted.get((tuple(node.get_output_shape(0)), np.ascontiguousarray(node.data).tobytes()))
        if w is None:
            continue
        if w.name not in made:
            shape = [w.q.shape[0], w.q.shape[1] // scale_run(w.q), scale_run(w.q)]
            tensor = ov.Tensor(getattr(ov.Type, _kind(w)), ov.Shape(shape))  # with memory of its own: it would not keep an array alive
            tensor.data.reshape(-1).view(np.uint8)[:] = _code_bytes(w)
            codes = ops.constant(tensor)
            scales = ops.constant(group_scales(w.q)[..., None])
            codes.set_friendly_name(f"{w.name}.codes")
            scales.set_friendly_name(f"{w.name}.scales")
            values = ops.multiply(ops.convert(codes, "f32"), ops.convert(scales, "f32"))
            made[w.name] = ops.reshape(values, np.array(w.q.shape, np.int64), False)
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(made[w.name].output(0))
    if missing := sorted(set(p.codes) - set(made)):
        raise ExportError(f"OpenVINO wrote {len(missing)} weights in another form, {missing[0]} first: codes can't replace them")
    graph.validate_nodes_and_infer_types()


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float = MIN_COSINE, seed: int = 0
) -> ExportResult:
    """`result` with the parity that OpenVINO reached and the counts found in the files.

    Opens the files again. First their constants: every code and float16 scale must be bit for bit the model's, and a product or a
    lookup must read what they make. Then logits with the settings `EXACT`, on random tokens of each of `lengths`, against `model`. The
    notes tell the parity of the default settings.

    Raises ExportError for a changed code, a missing weight, a size off the prediction, or a cosine below `min_cosine`.
    """
    ov, path = _needed(), result.files[0]
    core = ov.Core()
    try:
        graph = core.read_model(str(path))
    except RuntimeError as e:
        raise ExportError(f"OpenVINO refuses {path.name}: {str(e).strip().splitlines()[0]}") from e
    p = plain(model)
    counted = _check_codes(ov, graph, path, p)
    size, predicted = sum(f.stat().st_size for f in result.files), p.predicted_bytes(stored_bytes)
    allowed = predicted // 100 + 1000 * len(graph.get_ops()) + 2**16  # XML is wordy
    if size > predicted + allowed:
        raise ExportError(f"{path.name} and .bin have {size:,} bytes; the weights take {predicted:,}, the graph at most {allowed:,}")
    parity = agreement(_runner(core, graph, EXACT), model, lengths, seed)
    require(parity, f"{path.name} in OpenVINO", min_cosine)
    quick = agreement(_runner(core, graph, {}), model, lengths, seed)
    text = f"{_RUNTIME_NOTE}with default settings 1 - cosine {1 - quick['cosine']:.1e}, same top token {quick['top1_agreement']:.2%}"
    notes = (*(n for n in result.notes if not n.startswith(_RUNTIME_NOTE)), text)
    by = f"OpenVINO {ov.__version__.split('-')[0]} CPU, float32, {' + '.join(map(str, lengths))} tokens"
    found = p.result("openvino", result.files, predicted, counted)
    return replace(found, seconds=result.seconds, parity=parity, verified_by=by, notes=notes)


def _check_codes(ov, graph, path: Path, p: Plain) -> tuple[int, int]:
    """(weights, expert weights) that the files really hold as codes and that something reads."""
    held = {op.get_friendly_name(): op for op in graph.get_ops() if op.get_type_name() == "Constant"}
    total = in_experts = 0
    for w in p.codes.values():
        where, codes, scales = f"{path.name}: {w.name} ({w.q.scheme})", held.get(f"{w.name}.codes"), held.get(f"{w.name}.scales")
        if codes is None or scales is None or codes.get_element_type() != getattr(ov.Type, _kind(w)):
            raise ExportError(f"{where} is not in the file as codes of {_kind(w)}")
        if np.ascontiguousarray(codes.data).view(np.uint8).tobytes() != _code_bytes(w).tobytes():
            raise ExportError(f"{where}: the codes in the file are not the model's")
        if np.ascontiguousarray(scales.data).tobytes() != group_scales(w.q).tobytes() or scales.get_element_type() != ov.Type.f16:
            raise ExportError(f"{where}: the scales in the file are not the model's")
        node, seen = codes, []
        for _ in range(3):
            (port,) = node.output(0).get_target_inputs()
            node = port.get_node()
            seen.append(node.get_type_name())
        readers = {port.get_node().get_type_name() for port in node.output(0).get_target_inputs()}
        if seen != ["Convert", "Multiply", "Reshape"] or not readers & {"MatMul", "Gather"}:
            raise ExportError(f"{where} is not unpacked and multiplied, but read by {' -> '.join(seen)}")
        total += prod(w.q.shape)
        in_experts += prod(w.q.shape) * (w.kind == "experts")
    return total, in_experts


def _runner(core, graph, settings: dict[str, str]) -> Callable[[np.ndarray], np.ndarray]:
    """ids int64 [T] -> logits [T, vocabulary] in OpenVINO."""
    compiled = core.compile_model(graph, "CPU", settings)
    return lambda ids: compiled({"input_ids": ids[None]})["logits"][0].copy()
