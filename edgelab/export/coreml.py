"""Core ML (.mlpackage): our own codes in 4-bit weights of an ML program. Converted, NOT executed: Core ML predicts on macOS only.

Nothing is quantized again. coremltools converts the plain model (`export.plain`); then every weight, found by its values, becomes a
`constexpr_blockwise_shift_scale` (iOS 18, macOS 15): codes int4 [out, in] as q - 8 (int8 as q - 128) and scales [out, groups].

    "float32"  everything is computed in float32 and the scales are stored so: the weights are the model's to the last bit, and 2 bytes
               a group go on top. Runs on the processor and the GPU
    "float16"  what the neural engine runs: activations, norms and scales in float16. Codes and scales are the model's bit for bit, the
               products of both are rounded once

What `verify` can do here is to open the package again and to compare each code and scale in it, and which operator reads it. Nobody has
seen its logits: `parity` is empty and `verified_by` says so. Look at them on a Mac before you ship it.

input_ids int32 [1, length] -> logits [1, length, vocabulary]; pad on the right. It has no cache: a text is computed anew for each token.
"""

import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import causal_lm, place, whole_or_nothing
from edgelab.export.plain import Plain, Weight, checked_length, group_scales, plain, signed, stored_bytes, told, whole

PRECISIONS = ("float32", "float16")
NOT_EXECUTED = "converted, not executed: Core ML predicts on macOS only"


@contextmanager
def _hushed() -> Iterator[None]:
    """coremltools tells its progress on standard error, and that it was not tested with this torch."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _needed():
    """coremltools, imported here so that the rest works without it."""
    try:
        with _hushed():
            import coremltools
    except ImportError as e:
        raise ExportError(
            f'{e.name or "coremltools"} is not installed; export to Core ML needs the extra `coreml`: pip install "edgelab[coreml]"'
        ) from e
    return coremltools


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    length: int = 128,
    precision: str = "float32",
    check: bool = True,
) -> ExportResult:
    """The .mlpackage of a causal language model, quantized by `compress` or not at all, read back but not executed.

    `model`: a module, or the directory of a bundle or a model. `out`: the package to write (a folder named *.mlpackage), or a folder to
    put `model.mlpackage` in. `length`: tokens that go in at once. `precision`: "float32" or "float16" (see the module).

    Raises ExportError when coremltools is missing, when the model cannot be exported, and when the written package does not pass
    `verify`; nothing is left under `out` then.
    """
    if precision not in PRECISIONS:
        raise ExportError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    model = causal_lm(model)
    checked_length(model, length)
    p = plain(model)
    ct = _needed()
    out = Path(out)
    path = place(out, "model.mlpackage")
    began = time.perf_counter()
    with whole_or_nothing(path, ours="Manifest.json") as (part,):
        package = _converted(ct, p, model, length, precision)
        with _hushed():
            package = ct.models.utils._apply_graph_pass(package, _pass(ct, p, precision), spec_version=9, skip_model_load=True)
            package.user_defined_metadata["edgelab"] = json.dumps({"length": length, "precision": precision})
            package.save(str(part))
        result = p.result("coreml", (part,), _predicted(p, precision))
        notes = (*told(p, "exact", length, None), f"computes in {precision}")
        result = replace(result, notes=notes, seconds=time.perf_counter() - began)
        if check:
            result = verify(result, model)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _bytes(package: Path) -> int:
    return sum(f.stat().st_size for f in package.rglob("*") if f.is_file())


def _predicted(p: Plain, precision: str) -> int:
    """Codes, scales of `precision`, and the floats in it."""
    wide = 4 if precision == "float32" else 2
    scales = sum(prod(group_scales(w.q).shape) for w in p.codes.values())
    return sum(stored_bytes(w.q) for w in p.codes.values()) + (wide - 2) * scales + wide * (p.weights_total - p.quantized()[0])


def _converted(ct, p: Plain, model: nn.Module, length: int, precision: str):
    """The floating-point package."""
    try:
        with _hushed(), torch.no_grad():
            program = torch.export.export(whole(p), (torch.zeros(1, length, dtype=torch.int32),), strict=False).run_decompositions({})
            _known_operators(program.graph)
            return ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=getattr(ct.precision, precision.upper()),
                outputs=[ct.TensorType(name="logits")],
                skip_model_load=True,
            )
    except Exception as e:
        first = (str(e).strip().splitlines() or [""])[0]
        raise ExportError(f"coremltools could not convert {type(model).__name__}: {type(e).__name__}: {first}") from e


def _known_operators(graph: torch.fx.Graph) -> None:
    """Replace what coremltools 9 does not know by what it knows, the same on booleans."""
    aten = torch.ops.aten
    same = {getattr(aten, f"{form}_{name}{mark}").Tensor: getattr(aten, f"logical_{name}").default
            for name in ("and", "or") for form, mark in (("_", "__"), ("bitwise", ""))}  # fmt: skip
    for node in list(graph.nodes):
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in same and node.meta["val"].dtype == torch.bool:
            node.target = same[node.target]


def _pass(ct, p: Plain, precision: str):
    """A pass of coremltools that puts codes in the place of every float weight."""
    from coremltools.converters.mil.mil import Builder, types
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass

    dtype = np.dtype(precision)
    kinds = {4: types.nptype_from_builtin(types.int4), 8: np.int8}

    class PutCodes(AbstractGraphPass):
        def apply(self, program) -> None:
            wanted = {(w.q.shape, w.q.dequantize().astype(dtype).tobytes()): w for w in p.codes.values()}
            shapes, found = {w.q.shape for w in p.codes.values()}, set()
            for block in program.functions.values():
                with block:
                    for op in list(block.operations):
                        value = op.outputs[0].val if op.op_type == "const" else None
                        if not isinstance(value, np.ndarray) or value.shape not in shapes or value.dtype != dtype:
                            continue
                        if (w := wanted.get((value.shape, value.tobytes()))) is None:
                            continue
                        codes = signed(w.q).astype(kinds[8 if w.q.scheme.bits == 8 else 4])
                        made = Builder.constexpr_blockwise_shift_scale(
                            data=codes, scale=group_scales(w.q).astype(dtype), before_op=op, name=_name(w.name)
                        )
                        block.replace_uses_of_var_after_op(op, op.outputs[0], made, force_replace=True)
                        block.remove_ops([op])
                        found.add(w.name)
            if missing := sorted(set(p.codes) - found):
                raise ExportError(f"coremltools wrote {len(missing)} weights in another form, {missing[0]} first: codes can't replace them")

    return PutCodes()


def _name(weight: str) -> str:
    """As Core ML allows it."""
    return "codes_" + weight.removesuffix(".weight").replace(".", "_")


def verify(result: ExportResult, model: nn.Module) -> ExportResult:
    """`result` with the counts found in the package; its logits can't be had here, and `verified_by` says so.

    Opens the package again: every code and scale must be bit for bit the model's (scales widened in "float32"), what coremltools makes of
    them must be the weight, and a product or a lookup must read it. Raises ExportError for a changed code, a missing weight, or a size
    off the prediction.
    """
    ct, path = _needed(), result.files[0]
    if not path.is_dir():
        raise ExportError(f"{path.name} is no package: a .mlpackage is a folder")
    try:
        with _hushed():
            package = ct.models.MLModel(str(path), skip_model_load=True)
            program = ct.models.utils._apply_graph_pass(package, [], spec_version=9, skip_model_load=True, return_pymil_prog=True)
            options = json.loads(package.user_defined_metadata["edgelab"])
            precision = options["precision"]
    except Exception as e:  # a damaged package raises whatever it hits
        raise ExportError(f"{path.name} can't be read: {type(e).__name__}: {str(e).strip()[:200]}") from e
    p = plain(model)
    (main,) = program.functions.values()
    held = {op.outputs[0].name: op for op in main.operations if op.op_type == "constexpr_blockwise_shift_scale"}
    total = in_experts = 0
    for w in p.codes.values():
        _check(path, held.get(_name(w.name)), w, precision)
        total += prod(w.q.shape)
        in_experts += prod(w.q.shape) * (w.kind == "experts")
    size, predicted, counted = _bytes(path), _predicted(p, precision), (total, in_experts)
    allowed = predicted // 100 + 600 * len(main.operations) + 2**16
    if size > predicted + allowed:
        raise ExportError(f"{path.name} has {size:,} bytes; the weights take {predicted:,}, the program at most {allowed:,}")
    found = p.result("coreml", result.files, predicted, counted)
    return replace(found, notes=result.notes, seconds=result.seconds, verified_by=_by(ct))


def _by(ct) -> str:
    return f"{NOT_EXECUTED} (codes and scales read back by coremltools {ct.__version__})"


def _stored_type(values: np.ndarray) -> str:
    """ "int4" or "int8": NumPy has no type of 4 bits, and coremltools notes in the dtype what it is."""
    from coremltools.converters.mil.mil import types

    return types.builtin_to_string(types.numpy_type_to_builtin_type(values.dtype))


def _check(path: Path, op, w: Weight, precision: str) -> None:
    where = f"{path.name}: {w.name} ({w.q.scheme})"
    if op is None:
        raise ExportError(f"{where} is not in the package as codes")
    bits, stored = 8 if w.q.scheme.bits == 8 else 4, _stored_type(op.data.val)
    if stored != f"int{bits}":
        raise ExportError(f"{where} is stored as {stored}, not int{bits}")
    if not np.array_equal(np.asarray(op.data.val, np.int8), signed(w.q)):
        raise ExportError(f"{where}: the codes in the package are not the model's")
    if op.scale.val.tobytes() != group_scales(w.q).astype(precision).tobytes():
        raise ExportError(f"{where}: the scales in the package are not the model's")
    if precision == "float32" and op.materialized_val_inference().tobytes() != w.q.dequantize().tobytes():
        raise ExportError(f"{where}: codes and scales do not make the weight")
    if not any(reader.op_type in ("linear", "gather", "matmul") for reader in op.outputs[0].child_ops):
        raise ExportError(f"{where} is read by no product and no lookup")
