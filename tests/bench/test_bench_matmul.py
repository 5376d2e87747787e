"""Weight-only 4-bit matmul beside its peers, one process, interleaved: `pytest tests/bench/test_bench_matmul.py -s`.

Prints the median of each and its ratio to torch's float32 linear; asserts only that every contender computes the same
product. All use the threads that torch has (ours through the layer, ONNX Runtime through its session).
"""

import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgelab.layers import QLinear
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import QuantScheme

SHAPES = [(640, 256), (2048, 2048)]  # out, in: the embedded model's, and one that leaves the second-level cache
TOKENS = [1, 16, 128]
CONTENDERS = ["torch fp32", "edgelab int4-g32", "edgelab int8-row", "torch int4pack", "onnxruntime MatMulNBits", "bitsandbytes NF4"]
MIN_COSINE = 0.99  # 4 bits against the float32 weight: about 0.996; a wrong product is near 0


def contender(name: str, w: torch.Tensor, x: torch.Tensor):
    """A function of no arguments that returns x W^T, or a skip where the library is missing or cannot do it on this CPU."""
    out, n = w.shape
    if name == "torch fp32":
        return lambda: F.linear(x, w)
    if name.startswith("edgelab"):
        layer = QLinear(round_to_nearest(w, QuantScheme.parse(name.split()[1])))
        return lambda: layer(x)
    q = round_to_nearest(w, QuantScheme.parse("int4-g32"))
    if name == "torch int4pack":  # (q - 8) * scale + zero; bfloat16 is what its fast path takes (float32 is 100x slower)
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            pytest.skip("this torch has no _weight_int4pack_mm_for_cpu")
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(q.codes().astype(np.int32)), 1)
        scales = torch.from_numpy(q.scales.astype(np.float32)).T
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()  # [groups, out, 2]
        half, scales_and_zeros = x.bfloat16(), scales_and_zeros.bfloat16()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, 32, scales_and_zeros)
    if name == "bitsandbytes NF4":
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(n, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", module=layer)
        layer.to("cpu")
        return lambda: layer(x)
    ort, helper = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx").helper
    from onnx import TensorProto, numpy_helper

    blobs = [
        numpy_helper.from_array(q.packed.reshape(out, n // 32, 16), "codes"),
        numpy_helper.from_array(q.scales.astype(np.float32).reshape(-1), "scales"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=n, N=out, bits=4, block_size=32, accuracy_level=1
    )
    values = [helper.make_tensor_value_info(v, TensorProto.FLOAT, ["t", size]) for v, size in (("x", n), ("y", out))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "one", values[:1], values[1:], blobs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("name", CONTENDERS)
@torch.inference_mode()
def test_matmul(benchmark, name):
    """The statistics of pytest-benchmark for one shape of each kind: 2048 x 2048, 16 tokens."""
    torch.manual_seed(0)
    w, x = torch.randn(2048, 2048) / 2048**0.5, torch.randn(16, 2048)
    run = contender(name, w, x)
    y = benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    assert torch.cosine_similarity(y.float().flatten(), F.linear(x, w).flatten(), dim=0) > MIN_COSINE


@pytest.mark.parametrize("out, n", SHAPES)
@torch.inference_mode()
def test_side_by_side(capsys, out, n):
    """Medians of calls taken in turn, so that whatever else the machine does falls on all alike."""
    torch.manual_seed(0)
    w = torch.randn(out, n) / n**0.5
    lines = [f"{out} x {n}, {torch.get_num_threads()} threads: median ms (speed relative to torch fp32)"]
    for tokens in TOKENS:
        x = torch.randn(tokens, n)
        runs, expected = {}, F.linear(x, w)
        for name in CONTENDERS:
            try:
                run = contender(name, w, x)
                y = run()
            except pytest.skip.Exception as skipped:
                lines.append(f"  {name}: {skipped}")
                continue
            assert torch.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > MIN_COSINE, name
            runs[name] = run
        seconds = {name: [] for name in runs}
        stop = time.perf_counter() + 2
        while time.perf_counter() < stop or len(seconds["torch fp32"]) < 5:
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        cells = [f"{name} {1e3 * m:.3f} ({medians['torch fp32'] / m:.2f})" for name, m in medians.items()]
        lines.append(f"  {tokens:3d} tokens: " + ", ".join(cells))
    with capsys.disabled():
        print("\n" + "\n".join(lines))
