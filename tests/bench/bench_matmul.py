"""Weight-only 4-bit matmul beside its peers, one process, interleaved: `make bench`.

Prints the median of each and its ratio to ours: 2.00x is a peer that takes twice as long as edgelab int4-g32. Asserts
only that every contender computes the same product. All use the threads that torch has (ours through the layer, ONNX
Runtime through its session); a peer that is not installed is left out, and the table says so.
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
OURS = "edgelab int4-g32"
SECONDS = 1.5  # of turns for each shape and number of tokens
MIN_COSINE = 0.99  # 4 bits against the float32 weight: about 0.996; a wrong product is near 0
MISSING = {
    "bitsandbytes": "bitsandbytes is not installed: pip install 'edgelab[bnb]' to compare with it",
    "onnxruntime": "onnxruntime is not installed: pip install 'edgelab[export]' to compare with it",
}


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
        bnb = pytest.importorskip("bitsandbytes", reason=MISSING["bitsandbytes"])
        layer = bnb.nn.Linear4bit(n, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", module=layer)
        layer.to("cpu")
        return lambda: layer(x)
    ort = pytest.importorskip("onnxruntime", reason=MISSING["onnxruntime"])
    helper = pytest.importorskip("onnx", reason=MISSING["onnxruntime"]).helper
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


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("out", "n"), SHAPES, ids=[f"{out}x{n}" for out, n in SHAPES])
@torch.inference_mode()
def bench_side_by_side(benchmark, capsys, out, n, tokens):
    """Medians of calls taken in turn, so that whatever else the machine does falls on all alike.

    What pytest-benchmark tabulates is ours alone, after the turns; the ratios are printed, and kept in `extra_info`.
    """
    torch.manual_seed(0)
    w, x = torch.randn(out, n) / n**0.5, torch.randn(tokens, n)
    runs, left_out, expected = {}, [], F.linear(x, w)
    for name in CONTENDERS:
        try:
            run = contender(name, w, x)
        except pytest.skip.Exception as skipped:
            left_out.append(f"  {name:24s} left out: {skipped}")
            continue
        y = run()
        assert torch.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > MIN_COSINE, name
        runs[name] = run
    seconds = {name: [] for name in runs}
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(seconds[OURS]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    ratios = {name: m / medians[OURS] for name, m in medians.items()}
    about = f"{out} x {n}, {tokens} token{'s' * (tokens > 1)}, {torch.get_num_threads()} threads, {len(seconds[OURS])} turns"
    lines = [f"{about}: median, and time over that of {OURS}"]
    lines += [f"  {name:24s} {1e3 * m:9.3f} ms  {ratios[name]:6.2f}x" for name, m in medians.items()] + left_out
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    benchmark.group = f"{OURS} alone"
    benchmark.extra_info |= {f"time of {name} over {OURS}": ratio for name, ratio in ratios.items() if name != OURS}
    benchmark.pedantic(runs[OURS], rounds=20, warmup_rounds=2)
