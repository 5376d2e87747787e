"""ONNX for the vision path: a chain of layers, in float32 or with our own INT8 codes as QDQ, executed in ONNX Runtime.

A chain (`edgelab.vision.chain`) is a dozen operators, so its graph is written by hand: nothing is traced and nothing is quantized
again. A `Static` goes out as pairs of QuantizeLinear and DequantizeLinear around plain operators (QDQ):

    image -> Q -> DQ -> Conv(DQ(weight), DQ(bias)) -> Q -> DQ -> ... -> Q -> Flatten -> DQ -> Gemm(DQ(weight), DQ(bias)) -> logits

    weight  int8 [out, in / groups, kh, kw], axis 0     scale  float32 [out] (the float16 scales of the `QTensor`, exactly)
    bias    int32 [out]                                 scale  float32 [out], s_x s_w
    codes   uint8                                       scale  float32, zero point 0 behind a ReLU, else 128

There is no Relu node: with zero point 0 the codes end where it would cut. A runtime that knows the pattern computes all of it in
integers; `verify` looks into the graph that ONNX Runtime made of the file and refuses one in which a convolution stayed float.

The trap: on x86 processors without VNNI, ONNX Runtime adds two products of uint8 and int8 in 16 bits, which saturate, and large
codes give wrong sums, in silence (on the digits: logits off by up to 3.8, 98.1 % of the answers the same). Two ways out: the
session option `session.x64quantprecision` (`SESSION`; it does nothing elsewhere), or weights of half the range,
`static(..., weight_top=64)`, which need no option. `verify` sets the option only for models that need it.

The graph takes image float32 [batch, channels, height, width], all but the channels of any size, and gives logits float32
[batch, classes].
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

import edgelab
from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import MIN_COSINE, compared, place, require, whole_or_nothing
from edgelab.export.onnx import IR_VERSION, OPSET, _runtime
from edgelab.vision import Images, Layer, Pool, Static, chain, latencies_ms, logits, share_of, spread_ms

SESSION: Mapping[str, str] = MappingProxyType({"session.x64quantprecision": "1"})
SIZES = (8, 16, 24)  # pixels of a side, at which `verify` compares
IMAGES = 16  # of each size
GRAPH_BYTES = 400  # a node with its names
_PAIR = 2**15 - 1  # the largest sum of two products that 16 bits hold


@dataclass(frozen=True, eq=False)
class _Graph:
    """Collects nodes and initializers."""

    onnx: object
    nodes: list
    tensors: dict[str, np.ndarray]

    def put(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = np.ascontiguousarray(array)
        return name

    def op(self, kind: str, *inputs: str, out: str, **attributes) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [out], **attributes))
        return out


def _conv_attributes(settings: Mapping[str, object], kernel: Sequence[int]) -> dict:
    pads = list(settings["padding"])
    named = {"strides": list(settings["stride"]), "pads": pads + pads, "dilations": list(settings["dilation"])}
    return named | {"group": settings["groups"], "kernel_shape": list(kernel)}


def _float_graph(g: _Graph, model: nn.Module) -> None:
    layers = chain(model)
    x = "image"
    for i, (name, layer) in enumerate(layers):
        out = "logits" if i == len(layers) - 1 else f"{name}/out"

        def put(key: str, tensor, name=name) -> str:
            return g.put(f"{name}.{key}", tensor.detach().float().numpy())

        match layer:
            case nn.Conv2d():
                settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
                more = [] if layer.bias is None else [put("bias", layer.bias)]
                x = g.op("Conv", x, put("weight", layer.weight), *more, out=out, **_conv_attributes(settings, layer.kernel_size))
            case nn.BatchNorm2d():
                if layer.running_mean is None or layer.weight is None:
                    raise ExportError(f"{name}: a batch norm without statistics or without weights has no ONNX form here; fold it first")
                values = [put(k, getattr(layer, k)) for k in ("weight", "bias", "running_mean", "running_var")]
                x = g.op("BatchNormalization", x, *values, out=out, epsilon=layer.eps)
            case nn.ReLU():
                x = g.op("Relu", x, out=out)
            case nn.AdaptiveAvgPool2d():
                x = g.op("GlobalAveragePool", x, out=out)
            case nn.Flatten():
                x = g.op("Flatten", x, out=out)
            case nn.Linear():
                more = [] if layer.bias is None else [put("bias", layer.bias)]
                x = g.op("Gemm", x, put("weight", layer.weight), *more, out=out, transB=1)


def _static_graph(g: _Graph, model: Static) -> None:
    def codes(x: str, name: str, at, out: str) -> str:
        scale, zero = g.put(f"{name}.scale", np.float32(at.scale)), g.put(f"{name}.zero", np.uint8(at.zero))
        return g.op("QuantizeLinear", x, scale, zero, out=out)

    def floats(q: str, name: str, out: str) -> str:
        return g.op("DequantizeLinear", q, f"{name}.scale", f"{name}.zero", out=out)

    x = codes("image", "image", model.steps[0].before, "image/q")
    name = "image"  # of what holds the scale of x
    for step in model.steps:
        if isinstance(step, Layer) and not step.settings:
            x = g.op("Flatten", x, out=f"{name}/flat")
        x = floats(x, name, f"{step.name}/in")
        if isinstance(step, Pool):
            x = g.op("GlobalAveragePool", x, out=f"{step.name}/out")
        else:
            w, b = f"{step.name}.weight", f"{step.name}.bias"
            unit = np.float32(step.before.scale) * step.scales()
            for key, array, scale in ((w, step.signed(), step.scales()), (b, step.bias.astype(np.int32), unit)):
                # the zero points could be left out by the standard; ONNX Runtime 1.31 then puts in one of its own, and fails on it
                parts = g.put(key, array), g.put(f"{key}.scale", scale), g.put(f"{key}.zero", np.zeros(len(array), array.dtype))
                g.op("DequantizeLinear", *parts, out=f"{key}/dq", axis=0)
            out = "logits" if step.after is None else f"{step.name}/out"
            if step.settings:
                x = g.op("Conv", x, f"{w}/dq", f"{b}/dq", out=out, **_conv_attributes(step.settings, step.shape[2:]))
            else:
                x = g.op("Gemm", x, f"{w}/dq", f"{b}/dq", out=out, transB=1)
        if step.after is not None:
            x = codes(x, step.name, step.after, f"{step.name}/q")
        name = step.name


def _layers(model: nn.Module) -> list:
    """The first and the last layer that multiply, for the graph's shapes."""
    if isinstance(model, Static):
        return [s for s in model.steps if isinstance(s, Layer)]
    return [x for _, x in chain(model) if isinstance(x, nn.Conv2d | nn.Linear)]


def _ends(model: nn.Module) -> tuple[int, int]:
    """(channels of the image, classes)."""
    first, last = _layers(model)[0], _layers(model)[-1]
    if isinstance(model, Static):
        return first.shape[1] * first.settings["groups"], last.shape[0]
    if not isinstance(first, nn.Conv2d) or not isinstance(last, nn.Linear):
        raise ExportError(
            f"the network must start with a Conv2d and end with a Linear, it has {type(first).__name__}, {type(last).__name__}"
        )
    return first.in_channels, last.out_features


def export(model: nn.Module, out: str | Path, *, check: bool = True) -> ExportResult:
    """The verified ONNX file of `model`: a `vision.Static`, whose codes go out as QDQ, or a float32 chain (see `vision.chain`).

    `out`: the file to write, or a folder (then `model.onnx` in it). `check=False` leaves out `verify`. Raises ExportError when the
    packages of the extra `export` are missing, for a model that is neither, and when the file does not pass; nothing is left then.
    """
    needed = _runtime()
    onnx = needed.onnx
    out = Path(out)
    path = place(out, "model.onnx")
    began = time.perf_counter()
    if model.training and not isinstance(model, Static):
        raise ExportError(f"{type(model).__name__} is in training mode; call model.eval() first")
    g = _Graph(onnx, [], {})
    try:
        channels, classes = _ends(model)
        (_static_graph if isinstance(model, Static) else _float_graph)(g, model)
    except TypeError as e:  # of `chain`
        raise ExportError(str(e)) from e
    made = onnx.helper.make_graph(
        g.nodes,
        "edgelab",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", channels, "height", "width"])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", classes])],
        [onnx.numpy_helper.from_array(array, name) for name, array in g.tensors.items()],
    )
    file = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    file.producer_name, file.producer_version = "edgelab", edgelab.__version__
    if isinstance(model, Static):
        onnx.helper.set_model_props(file, {"edgelab": json.dumps({"weights": str(model.scheme), "ranges": model.rule})})
    onnx.checker.check_model(file)
    with whole_or_nothing(path) as (temporary,):
        temporary.write_bytes(file.SerializeToString())
        result = _count(model, (temporary,))
        if check:
            result = verify(result, model)
    return replace(result, files=(path,), seconds=time.perf_counter() - began)


def _count(model: nn.Module, files: tuple[Path, ...]) -> ExportResult:
    size = sum(f.stat().st_size for f in files)
    if not isinstance(model, Static):
        floats = {id(t): t.numel() for _, layer in chain(model) for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()}
        total = sum(floats.values())
        return ExportResult("onnx", files, size, 4 * total, total, 0, 0, 0)
    quantized = sum(s.weight.packed.size for s in _layers(model))
    biases = sum(len(s.bias) for s in _layers(model))
    # per channel a bias, its scale and zero point, and the weight's; a scale and a zero point for each activation
    predicted = quantized + biases * (4 + 4 + 4 + 4 + 1) + 5 * len(model.steps)
    return ExportResult("onnx", files, size, predicted, quantized + biases, quantized, 0, 0)


def verify(
    result: ExportResult, model: nn.Module, *, pixels: Sequence[np.ndarray] | None = None, min_cosine: float = MIN_COSINE, seed: int = 0
) -> ExportResult:
    """`result` with the parity that ONNX Runtime reached and the count of weights found in the file.

    Opens the file again. Of a `Static` every code, scale, bias and zero point must be bit for bit the model's and be read by the
    node that it belongs to, and ONNX Runtime must have made integer convolutions of all of it. Then the logits, on `pixels` (arrays
    float32 [n, c, h, w]; by default random images of three sizes), against `model` in torch. Raises ExportError otherwise.
    """
    needed = _runtime()
    expected = _count(model, result.files)
    graph = needed.onnx.load(str(result.files[0])).graph
    quantized = _check_codes(needed.onnx, graph, model) if isinstance(model, Static) else 0
    allowed = expected.predicted_bytes // 100 + GRAPH_BYTES * (len(graph.node) + len(graph.initializer)) + 2**10
    if not expected.predicted_bytes <= expected.bytes <= expected.predicted_bytes + allowed:
        raise ExportError(
            f"{result.files[0].name} has {expected.bytes:,} bytes; the weights take {expected.predicted_bytes:,} "
            f"and the graph at most {allowed:,}: a weight went out in another form"
        )
    options = session_options(model)
    ran, notes = executed(result.files[0], options), result.notes
    if isinstance(model, Static):
        convs = sum(1 for s in _layers(model) if s.settings)
        if ran["Conv"] or ran["FusedConv"] or ran["QLinearConv"] != convs:
            raise ExportError(
                f"ONNX Runtime computes {ran['QLinearConv']} of {convs} convolutions in integers and {ran['Conv'] + ran['FusedConv']} in "
                f"float32 ({dict(ran)}): its optimizer did not see the pattern"
            )
        notes = (*notes, f"ONNX Runtime made {convs} QLinearConv of it, and {ran['QGemm']} QGemm")
        if options:
            settings = ", ".join(f"{k}={v}" for k, v in options.items())
            notes = (*notes, f"on x86 without VNNI, set the session option {settings}, or make it with static(..., weight_top=64)")
    else:
        notes = (*notes, "ONNX Runtime runs " + ", ".join(f"{n} {kind}" for kind, n in sorted(ran.items())))
    channels, _ = _ends(model)
    draw = np.random.default_rng(seed)
    pixels = pixels or [draw.random((IMAGES, channels, size, size), np.float32) for size in SIZES]
    parity = agreement(run(result.files[0], options), model, pixels)
    require(parity, f"{result.files[0].name} in ONNX Runtime", min_cosine)
    by = f"onnxruntime {needed.ort.__version__} CPUExecutionProvider, {sum(map(len, pixels))} images of {len(pixels)} sizes"
    return replace(result, bytes=expected.bytes, weights_quantized=quantized, parity=parity, verified_by=by, notes=notes)


def session_options(model: nn.Module) -> dict[str, str]:
    """The session entries that the file of `model` needs to be computed rightly on any x86 processor (see the module)."""
    if not isinstance(model, Static):
        return {}
    most = max(int(np.abs(step.signed().astype(np.int16)).max()) for step in _layers(model))
    return dict(SESSION) if 2 * 255 * most > _PAIR else {}


def session(path: str | Path, options: Mapping[str, str] = SESSION, *, threads: int = 0, keep: Path | None = None):
    """An ONNX Runtime session of the file on the CPU. `options`: session entries; `keep`: where to write the optimized graph."""
    ort = _runtime().ort
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    if keep is not None:
        settings.optimized_model_filepath = str(keep)
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(f"ONNX Runtime refuses {Path(path).name}: {str(e).strip().splitlines()[0]}") from e


def run(path: str | Path, options: Mapping[str, str] = SESSION, *, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The function float32 [n, c, h, w] -> logits [n, classes] of the file, in ONNX Runtime."""
    opened = session(path, options, threads=threads)
    return lambda pixels: opened.run(["logits"], {"image": np.ascontiguousarray(pixels, np.float32)})[0]


def executed(path: str | Path, options: Mapping[str, str] = SESSION) -> Counter:
    """{operator: how many} of what ONNX Runtime executes for the file, after its own optimizations."""
    with TemporaryDirectory() as folder:
        session(path, options, keep=Path(folder) / "optimized.onnx")
        return Counter(node.op_type for node in _runtime().onnx.load(str(Path(folder) / "optimized.onnx")).graph.node)


def runtime_table(
    models: Mapping[str, nn.Module], images: Images, folder: str | Path, *, turns: int = 15, batch: int = 1, seed: int = 0
) -> list[dict]:
    """A row per model, exported to `folder`/<name>.onnx and run in ONNX Runtime; the first is what sizes are compared with.

    Keys: model, bytes, bytes_share, accuracy in the runtime (Wilson interval, n), same (the share of images that torch answers
    the same), max_abs_diff of their logits, same_without_options (that share in a session of default options), latency_ms (of
    `batch` images on one thread, ONNX Runtime; bootstrap interval). Raises ExportError as `export` does.
    """
    folder, pixels = Path(folder), images.pixels.numpy()
    written = {name: export(model, folder / f"{name}.onnx") for name, model in models.items()}
    inputs = np.ascontiguousarray(pixels[:batch])
    runs = {name: run(r.files[0], session_options(models[name]), threads=1) for name, r in written.items()}
    times = latencies_ms({name: (lambda f=f: f(inputs)) for name, f in runs.items()}, turns=turns)
    rows = []
    for name, result in written.items():
        ours, theirs, plain = logits(models[name], images.pixels).numpy(), runs[name](pixels), run(result.files[0], {})(pixels)
        row = {"model": name, "bytes": result.bytes, "bytes_share": result.bytes / next(iter(written.values())).bytes}
        row |= share_of(theirs.argmax(-1) == images.labels.numpy())
        row |= {"same": float((ours.argmax(-1) == theirs.argmax(-1)).mean()), "max_abs_diff": float(np.abs(ours - theirs).max())}
        rows.append(row | {"same_without_options": float((ours.argmax(-1) == plain.argmax(-1)).mean())} | spread_ms(times[name], seed))
    return rows


@torch.no_grad()
def agreement(infer, model: nn.Module, pixels: Sequence[np.ndarray]) -> dict[str, float]:
    """`checks.compared` logits of a runtime and of torch over `pixels`, kld in nats per image."""
    return compared((infer(x), model(torch.from_numpy(x))) for x in pixels)


def _check_codes(onnx, graph, model: Static) -> int:
    """Weights that the file holds as codes. Raises ExportError where codes, scales, biases or zero points are not the model's."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    wanted = _Graph(onnx, [], {})
    _static_graph(wanted, model)
    for name, array in wanted.tensors.items():
        if name not in held or held[name].dtype != array.dtype or held[name].tobytes() != array.tobytes():
            raise ExportError(f"{name} in the file is not the model's")
    found = 0
    for step in _layers(model):
        node = next((n for n in graph.node if n.op_type in ("Conv", "Gemm") and _origin(makers, n, 1) == f"{step.name}.weight"), None)
        if node is None or _origin(makers, node, 2) != f"{step.name}.bias":
            raise ExportError(f"{step.name}: no Conv or Gemm node reads its codes and its bias")
        found += held[f"{step.name}.weight"].size if held[f"{step.name}.weight"].dtype == np.int8 else 0
        scale = held[f"{step.name}.weight.scale"]
        stored = step.weight.scales.reshape(-1)
        if not np.array_equal(scale.astype(np.float16), np.broadcast_to(stored, scale.shape)):
            raise ExportError(f"{step.name}: the scales in the file are not the float16 scales of its QTensor")
    return found


def _origin(makers: dict, node, at: int) -> str | None:
    """The initializer behind the input `at` of a node, through one DequantizeLinear that names its scale rightly."""
    if at >= len(node.input) or node.input[at] not in makers:
        return None
    maker = makers[node.input[at]]
    right = maker.op_type == "DequantizeLinear" and maker.input[1] == f"{maker.input[0]}.scale"
    return maker.input[0] if right else None
