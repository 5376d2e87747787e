"""The quantized layers against the ordinary ones that hold the dequantized weights: the layer test."""

import copy
import importlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_bundle import drawn
from torch import nn

from edgelab import layers
from edgelab.layers import KERNELS, QEmbedding, QExperts, QLinear, dequantize, round_inputs, set_kernel
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.scheme import ActScheme, QuantScheme

SCHEMES = ["int2-g32", "int3-g32", "int4-g32", "int8-g32", "int2-row", "int3-row", "int4-row", "int8-row", "int3-tensor", "int4-tensor"]


EXACT = [name for name in KERNELS if name != "numba-int8"]  # those that leave the activations as they are


@pytest.fixture(params=EXACT)
def kernel(request):
    before = set_kernel(request.param)
    yield request.param
    set_kernel(before)


@pytest.fixture
def int8():
    before = set_kernel("numba-int8")
    yield
    set_kernel(before)


def quantized(*shape: int, scheme: str = "int4-g32"):
    return round_to_nearest(torch.randn(*shape) / shape[-1] ** 0.5, QuantScheme.parse(scheme))


def plain(q, bias=None) -> nn.Linear:
    out, n = q.shape
    linear = nn.Linear(n, out, bias=bias is not None)
    linear.weight.data = torch.from_numpy(q.dequantize())
    if bias is not None:
        linear.bias.data = bias
    return linear


def close(a, b, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float64: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def fake_int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """x as int8 activations see it: per row and group, absmax / 127 steps."""
    parts = x.float().unflatten(-1, (-1, group))
    top = parts.abs().amax(-1, keepdim=True)
    return ((parts * (127 / top)).round().nan_to_num() * (top / 127)).flatten(-2)


# -------------------------------------------------------------------------------------------------------- QLinear


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_linear_equals_torch_with_the_dequantized_weights(scheme, kernel):
    n = 96 if "g32" in scheme else 61
    q, bias = quantized(37, n, scheme=scheme), torch.randn(37)
    for b in (None, bias):
        layer, oracle = QLinear(q, b), plain(q, b)
        for shape in [(n,), (1, n), (5, n), (2, 3, n), (0, n), (2, 0, n), (130, n)]:
            x = torch.randn(shape)
            close(layer(x), oracle(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_linear_computes_in_float32_and_returns_the_input_s_dtype(dtype, kernel):
    q = quantized(24, 64)
    x = torch.randn(7, 64).to(dtype)
    y = QLinear(q, torch.randn(24).to(dtype))(x)
    assert y.dtype == dtype
    layer = QLinear(q)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    close(layer(x), plain(q)(x.float()).to(dtype), dtype)


@torch.no_grad()
def test_linear_takes_strided_and_expanded_inputs(kernel):
    q = quantized(24, 64)
    layer, oracle = QLinear(q), plain(q)
    for x in (torch.randn(64, 9).T, torch.randn(5, 128)[:, ::2], torch.randn(1, 64).expand(6, 64), torch.randn(2, 64, 3).transpose(1, 2)):
        before = x.clone()
        close(layer(x), oracle(x))
        assert torch.equal(x, before)


def test_linear_in_inference_mode_and_under_autocast(kernel):
    q = quantized(24, 64)
    layer, x = QLinear(q), torch.randn(6, 64)
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(torch.randn(6, 64).copy_(x)), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_linear_is_differentiable_with_respect_to_its_input():
    q = quantized(24, 64)
    x = torch.randn(5, 64, requires_grad=True)
    y = torch.randn(24, 5)
    ours, oracle = ((layer(x) * y.T).sum() for layer in (QLinear(q), plain(q)))
    close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(oracle, x)[0])


@torch.no_grad()
def test_both_kernels_agree_on_many_tokens():
    layer, x = QLinear(quantized(300, 256)), torch.randn(77, 256)
    results = []
    for name in EXACT:
        before = set_kernel(name)
        results.append(layer(x))
        set_kernel(before)
    close(*results)


@torch.no_grad()
def test_kernel_is_set_for_all_or_for_one():
    layer = QLinear(quantized(8, 32))
    assert layer.kernel == "numba" and set_kernel("torch") == "numba" and layer.kernel == "torch"
    assert set_kernel("numba") == "torch"
    layer.kernel = "torch"
    assert QLinear.kernel == "numba"
    with pytest.raises(ValueError, match="kernel='cuda' is not known; use one of numba, numba-int8, torch"):
        set_kernel("cuda")


@torch.no_grad()
def test_linear_compiles_to_a_graph():
    """Under `torch.compile` (here with the eager backend) the torch path is traced whole."""
    layer, x = QLinear(quantized(24, 64), torch.randn(24)), torch.randn(3, 64)
    close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# --------------------------------------------------------------------------------------- what all the layers share


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_dequantize_equals_the_qtensor_s(scheme):
    for shape in [(5, 96), (3, 4, 96)] + ([] if "g32" in scheme else [(5, 61), (2, 3, 67), (1, 1)]):
        q = quantized(*shape, scheme=scheme)
        w = dequantize(torch.from_numpy(q.packed), torch.from_numpy(q.scales), q.scheme, shape[-1])
        np.testing.assert_array_equal(w.numpy(), q.dequantize())


def test_layer_hands_its_qtensors_out_again():
    q = quantized(24, 64)
    layer = QLinear(q)
    back = layer.qtensors()["weight"]
    assert np.shares_memory(back.packed, layer.packed.numpy()) and back.scheme == q.scheme
    np.testing.assert_array_equal(back.codes(), q.codes())
    np.testing.assert_array_equal(layer.dequantized()["weight"].numpy(), q.dequantize())
    assert layer.nbytes == q.nbytes
    assert "24 x 64 int4-g32" in repr(layer) and f"{q.nbytes:,} bytes" in repr(layer) and "4.500 bits per weight" in repr(layer)
    assert set(layer.state_dict()) == {"packed", "scales"} and not list(layer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_fills_an_empty_layer_that_was_already_used(assign, kernel):
    """The layer caches NumPy views of its buffers; a load, in place or by assignment, must not leave them stale."""
    q, bias, x = quantized(24, 64), torch.randn(24), torch.randn(3, 64)
    layer = QLinear.empty(24, 64, q.scheme, bias=True)
    assert torch.equal(layer(x), torch.zeros(3, 24))
    layer.load_state_dict(QLinear(q, bias).state_dict(), assign=assign)
    close(layer(x), plain(q, bias)(x))


@torch.no_grad()
def test_layer_moves_and_keeps_its_scales():
    q, x = quantized(24, 64), torch.randn(3, 64)
    layer = QLinear(q, torch.randn(24))
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.scales.dtype == torch.float16 and layer.bias.dtype == dtype
        np.testing.assert_array_equal(layer.qtensors()["weight"].scales, q.scales)
    close(layer(x), expected, torch.bfloat16)  # the bias went through bfloat16
    meta = QLinear(q).to("meta")
    assert meta.packed.is_meta and meta(x.to("meta")).shape == (3, 24)
    with torch.device("meta"):
        assert QLinear.empty(24, 64, q.scheme, bias=True).scales.is_meta


@torch.no_grad()
def test_copies_do_not_share_codes():
    layer, x = QLinear(quantized(24, 64)), torch.randn(3, 64)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    twin.packed.zero_()
    assert not torch.equal(twin(x), expected) and torch.equal(layer(x), expected)


@torch.no_grad()
def test_read_only_codes_are_copied_without_a_warning(recwarn):
    q = quantized(8, 32)
    q.packed.flags.writeable = q.scales.flags.writeable = False
    close(QLinear(q)(torch.eye(32)), torch.from_numpy(q.dequantize()).T)
    assert not len(recwarn)


@torch.no_grad()
def test_cast_scales_are_refused():
    layer = QLinear(quantized(8, 32))
    layer.scales = layer.scales.bfloat16()
    with pytest.raises(TypeError, match=r"scales are torch\.bfloat16; they must be torch\.uint8 and torch\.float16"):
        layer(torch.randn(1, 32))


# ------------------------------------------------------------------------------------------------------ QEmbedding


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_embedding_equals_rows_of_the_dequantized_weight(scheme):
    n = 96 if "g32" in scheme else 61
    q = quantized(50, n, scheme=scheme)
    layer = QEmbedding(q, padding_idx=0)
    for ids in (torch.tensor([0, 49, 3, 3]), torch.randint(50, (2, 5)), torch.tensor(7), torch.zeros(2, 0, dtype=torch.long)):
        assert torch.equal(layer(ids), nn.functional.embedding(ids, torch.from_numpy(q.dequantize())))
    assert layer.padding_idx == 0
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


def test_embedding_s_dtype_follows_the_model():
    layer, ids = QEmbedding(quantized(50, 64)), torch.tensor([[1, 2]])
    assert layer(ids).dtype == torch.float32
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16 and layer.scales.dtype == torch.float16
    assert layer.float()(ids).dtype == torch.float32
    assert QEmbedding.empty(50, 64, QuantScheme(), dtype=torch.float16)(ids).dtype == torch.float16


# -------------------------------------------------------------------------------------------------------- QExperts

EXPERT_FAMILIES = {
    "deepseek_v3": ("DeepseekV3", {"n_routed_experts": 8, "moe_intermediate_size": 32}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 8, "moe_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 32}),
    "olmoe": ("Olmoe", {"num_experts": 8, "intermediate_size": 32}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8, "intermediate_size": 32}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "intermediate_size": 32}),
}


def experts_of(family: str, scheme: str = "int4-g32") -> tuple[QExperts, nn.Module]:
    """Our layer, and transformers' own with the dequantized weights."""
    stem, sizes = EXPERT_FAMILIES[family]
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(importlib.import_module(f"transformers.models.{family}"), f"{stem}Config")(hidden_size=64, **sizes)
    config._experts_implementation = "eager"
    oracle = getattr(modeling, f"{stem}Experts")(config).eval()
    gate_up, down = quantized(8, 64, 64, scheme=scheme), quantized(8, 64, 32, scheme=scheme)
    turned = family == "gpt_oss"
    for parameter, q in ((oracle.gate_up_proj, gate_up), (oracle.down_proj, down)):
        w = torch.from_numpy(q.dequantize())
        assert parameter.shape == (w.mT if turned else w).shape
        parameter.data = w.mT.contiguous() if turned else w
    if not turned:
        return QExperts(gate_up, down, oracle.act_fn), oracle
    for bias in (oracle.gate_up_proj_bias, oracle.down_proj_bias):
        bias.data = torch.randn_like(bias)
    biases = oracle.gate_up_proj_bias, oracle.down_proj_bias
    return QExperts(gate_up, down, None, *biases, glu="interleaved_clamped", limit=oracle.limit, alpha=oracle.alpha), oracle


def routing(tokens: int, k: int = 2, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, experts).topk(k).indices, torch.rand(tokens, k)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@torch.no_grad()
def test_experts_equal_transformers_own(family, kernel):
    layer, oracle = experts_of(family)
    for tokens, k in [(1, 2), (5, 1), (40, 3), (0, 2)]:
        x = 3 * torch.randn(tokens, 64)
        index, weights = routing(tokens, k)
        close(layer(x, index, weights), oracle(x, index, weights))


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_experts_in_every_scheme(scheme, kernel):
    layer, oracle = experts_of("deepseek_v3", scheme)
    x, (index, weights) = torch.randn(30, 64), routing(30)
    close(layer(x, index, weights), oracle(x, index, weights))


@torch.no_grad()
def test_experts_inside_deepseek_s_moe_block_with_its_router(kernel):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=64, n_routed_experts=8, moe_intermediate_size=32, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1
    )
    config._experts_implementation = "eager"
    block = DeepseekV3MoE(config).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    layer, block.experts = experts_of("deepseek_v3")
    x = torch.randn(2, 9, 64)
    expected = block(x)
    block.experts = layer
    close(block(x), expected)


@torch.no_grad()
def test_experts_skip_the_sentinel_and_what_its_weight_holds(kernel):
    layer, oracle = experts_of("deepseek_v3")
    x, (index, weights) = torch.randn(12, 64), routing(12)
    index[::2, 1], index[3] = 8, 8
    expected = oracle(x, index, weights)
    weights[index == 8] = float("nan")
    got = layer(x, index, weights)
    close(got, expected)
    assert (got[3] == 0).all()
    assert (layer(x, torch.full_like(index, 8), weights) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_experts_compute_in_float32_and_return_the_input_s_dtype(dtype, kernel):
    layer, _ = experts_of("mixtral")
    x, (index, weights) = torch.randn(64, 12).T.to(dtype), routing(12)
    expected = layer(x.float(), index, weights).to(dtype)
    assert torch.equal(layer(x, index, weights), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, index, weights), expected)


def test_experts_are_differentiable_with_respect_to_input_and_router():
    layer, oracle = experts_of("deepseek_v3")
    index, weights = routing(9)
    x, weights = torch.randn(9, 64, requires_grad=True), weights.requires_grad_()
    ours, theirs = (torch.autograd.grad(m(x, index, weights).square().sum(), (x, weights)) for m in (layer, oracle))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


@torch.no_grad()
def test_experts_state_dict_fills_an_empty_layer(kernel):
    layer, _ = experts_of("gpt_oss")
    s = QuantScheme()
    empty = QExperts.empty(8, 64, 32, s, s, None, bias=True, glu="interleaved_clamped", limit=layer.limit, alpha=layer.alpha)
    x, (index, weights) = torch.randn(6, 64), routing(6)
    assert (empty(x, index, weights) == 0).all()
    assert {"gate_up_packed", "gate_up_scales", "down_packed", "down_scales"} < set(layer.state_dict())
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x, index, weights), layer(x, index, weights))
    assert list(layer.qtensors()) == ["gate_up_proj", "down_proj"] and layer.nbytes == sum(q.nbytes for q in layer.qtensors().values())


# ----------------------------------------------------------------------------------------------------- codebooks

CODEBOOKS = ["uint4-g32", "uint3-g32", "uint2-g8", "uint8-row", "uint4-tensor", "nf4-g32", "nf4-row", "fp4-g32", "fp4-tensor", "mxfp4-g32"]
ACTS = ["a8-token", "a8-tensor", "a8-static", "a4-token", "a8-token-o6"]


def of_codebook(family: str, scheme: str) -> tuple[QExperts, nn.Module]:
    """As `experts_of`, with random codes of any codebook."""
    layer, oracle = experts_of(family)
    gate_up, down = drawn((8, 64, 64), scheme), drawn((8, 64, 32), scheme)
    turned = family == "gpt_oss"
    for parameter, q in ((oracle.gate_up_proj, gate_up), (oracle.down_proj, down)):
        w = torch.from_numpy(q.dequantize())
        parameter.data = w.mT.contiguous() if turned else w
    biases = (oracle.gate_up_proj_bias, oracle.down_proj_bias) if turned else (None, None)
    return QExperts(gate_up, down, layer.act_fn, *biases, glu=layer.glu, limit=layer.limit, alpha=layer.alpha), oracle


@pytest.mark.parametrize("scheme", CODEBOOKS)
@torch.no_grad()
def test_linear_and_embedding_of_every_codebook(scheme, kernel):
    q, bias = drawn((37, 96), scheme), torch.randn(37)
    assert np.abs(q.dequantize()).max() > 0
    layer, oracle = QLinear(q, bias), plain(q, bias)
    for shape in [(96,), (1, 96), (5, 96), (2, 3, 96), (0, 96), (130, 96)]:
        x = torch.randn(shape)
        close(layer(x), oracle(x))
        close(layer(x.bfloat16()), oracle(x.bfloat16().float()).bfloat16(), torch.bfloat16)
    table = torch.from_numpy(q.dequantize())
    for ids in (torch.tensor([3, 0, 36, 3]), torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.long), torch.tensor(5)):
        torch.testing.assert_close(QEmbedding(q)(ids), table[ids], rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.weight, table, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", CODEBOOKS)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_experts_of_every_codebook(family, scheme, kernel):
    layer, oracle = of_codebook(family, scheme)
    for tokens, k in [(1, 2), (40, 3), (0, 2)]:
        x, (index, weights) = torch.randn(tokens, 64), routing(tokens, k)
        if family != "gpt_oss":  # transformers' own takes no sentinel there
            index[::3, 0] = 8  # no expert
        close(layer(x, index, weights), oracle(x, index, weights))


@pytest.mark.parametrize("scheme", CODEBOOKS)
@torch.no_grad()
def test_int8_activations_on_every_codebook(scheme, int8):
    """Evenly spaced levels take int8 activations; tables are multiplied by the inputs as they are. What an offset adds
    never sees the rounding: (o + s h) sum x is exact."""
    q = drawn((37, 96), scheme)
    layer, w = QLinear(q), torch.from_numpy(q.dequantize())
    group = q.scheme.granularity.size if "-g" in scheme else 96
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 96) * torch.rand(96).mul(4).exp()
        if not q.scheme.affine:
            close(layer(x), x @ w.T)
            continue
        middle = torch.from_numpy(
            QTensor.from_codes(np.full((37, 96), q.scheme.zero_point, np.uint8), q.scales, q.scheme, q.offsets).dequantize()
        )
        got, want = layer(x), fake_int8(x, group) @ (w - middle).T + x @ middle.T
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not torch.allclose(got, x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("text", ACTS)
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "uint4-g32", "uint8-row", "nf4-g32", "mxfp4-g32"])
@torch.no_grad()
def test_rounded_inputs_are_what_every_kernel_multiplies(scheme, text, name):
    """y = F.linear(round_inputs(x), W), also on the int8 kernel, which must not round a second time."""
    q, act, scale = drawn((37, 96), scheme), ActScheme.parse(text), 0.02
    layer, oracle = QLinear(q), plain(q)
    layer.kernel = name
    stored = scale if act.static else None
    layer.round_input_of("weight", act, stored)
    x = torch.randn(9, 96)
    x[:, 5] *= 40
    close(layer(x), oracle(round_inputs(x, act, stored and torch.tensor([scale]))))
    assert layer(x[:0]).shape == (0, 37)
    layer.round_input_of("weight", None)
    layer.kernel = "torch"
    close(layer(x), oracle(x))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("text", ACTS)
@pytest.mark.parametrize("scheme", ["int8-row", "uint4-g32", "nf4-g32"])
@torch.no_grad()
def test_experts_round_their_inputs_on_every_kernel(scheme, text, name):
    layer, _ = of_codebook("deepseek_v3", scheme)
    act, scale = ActScheme.parse(text), 0.03
    stored = scale if act.static else None
    for parameter in ("gate_up_proj", "down_proj"):
        layer.round_input_of(parameter, act, stored)
    layer.kernel = name
    tokens, k = 12, 2
    x, (index, weights) = torch.randn(tokens, 64), routing(tokens, k)
    x[:, 5] *= 40
    number = stored and torch.tensor([scale])
    w = layer.dequantized()
    inner = torch.empty(tokens, k, 32)  # what is multiplied by down, of all tokens: a scale per tensor sees it whole
    rounded = round_inputs(x, act, number)
    for t in range(tokens):
        for j, e in enumerate(index[t].tolist()):
            gate, up = (w["gate_up_proj"][e] @ rounded[t]).chunk(2)
            inner[t, j] = nn.functional.silu(gate) * up
    inner = round_inputs(inner, act, number)
    expected = torch.stack(
        [sum(weights[t, j] * (w["down_proj"][e] @ inner[t, j]) for j, e in enumerate(index[t].tolist())) for t in range(tokens)]
    )
    got = layer(x, index, weights)
    # where a sum lies on the edge between two steps, the order of summation may decide: one step of one input of `down`
    step = float(inner.abs().amax()) / act.top * float(w["down_proj"].abs().max())
    assert float((got - expected).abs().max()) <= step + 1e-4
    assert ((got - expected).abs() < 1e-3 * (1 + expected.abs())).float().mean() > 0.9


@torch.no_grad()
def test_a_power_of_two_that_no_tile_can_hold_is_named():
    scheme = QuantScheme.parse("mxfp4-g32")
    q = QTensor.from_codes(np.full((2, 32), 2, np.uint8), np.full((2, 1), 127 + 20, np.uint8), scheme)
    layer, x = QLinear(q), torch.ones(1, 32)
    with pytest.raises(ValueError, match=r"a scale of mxfp4-g32 is above 2\*\*15.*set_kernel\('torch'\)"):
        layer(x)
    layer.kernel = "torch"
    assert layer(x).tolist() == [[32 * 2.0**20] * 2]


# ---------------------------------------------------------------------------------------- errors, and a second home


def test_errors_name_the_value_and_the_way_out():
    q, gate_up, down = quantized(24, 64), quantized(2, 64, 64), quantized(2, 64, 32)
    silu = nn.SiLU()
    layer = QExperts(gate_up, down, silu)
    x, index = torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long)
    for make, message in [
        (lambda: QLinear(q)(torch.randn(2, 63)), r"x is \(2, 63\); its last dimension must be in_features=64"),
        (lambda: QLinear(gate_up), "QLinear takes .* an expert stack goes to QExperts"),
        (lambda: QLinear(q, torch.zeros(23)), r"bias is \(23,\); a weight \(24, 64\) needs \(24,\)"),
        (lambda: QEmbedding(gate_up), "QEmbedding takes"),
        (lambda: QExperts(q, down, silu), r"gate_up is \(24, 64\); an expert stack has three dimensions"),
        (lambda: QExperts(gate_up, gate_up, silu), r"gate_up \(2, 64, 64\) and down \(2, 64, 64\) do not fit"),
        (lambda: QExperts(gate_up, down, silu, glu="swiglu"), "glu='swiglu' is not known; use one of chunk, interleaved_clamped"),
        (lambda: QExperts(gate_up, down, None), "glu='chunk' needs an activation function"),
        (lambda: QExperts(gate_up, down, None, glu="interleaved_clamped"), "needs both"),
        (lambda: QExperts(gate_up, down, silu, torch.zeros(2, 3)), r"gate_up_bias is \(2, 3\); it must be \(2, 64\)"),
        (lambda: layer(x[:2], index, torch.rand(3, 2)), r"hidden_states is \(2, 64\), top_k_index \(3, 2\) and"),
        (lambda: layer(x, index + 3, torch.rand(3, 2)), r"top_k_index\[0, 0\]=3; experts are 0 \.\. 1, and 2 means none"),
        (lambda: layer(x, index - 1, torch.rand(3, 2)), r"top_k_index\[0, 0\]=-1; experts are"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


@torch.no_grad()
def test_the_same_codes_run_in_onnxruntime_s_matmulnbits():
    """4 bits in groups of 32 is its own format: codes and scales go over as they are (symmetric, zero point 8)."""
    q = quantized(48, 96)
    n, k = q.shape
    blobs = [
        numpy_helper.from_array(q.packed.reshape(n, k // 32, 16), "codes"),
        numpy_helper.from_array(q.scales.astype(np.float32).reshape(-1), "scales"),
    ]
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=32, accuracy_level=1
    )
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", size]) for name, size in (("x", k), ("y", n))]
    graph = helper.make_graph([node], "one", value[:1], value[1:], blobs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(11, k)
    theirs, ours = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), layers.QLinear(q)(x)
    assert torch.cosine_similarity(theirs.flatten(), ours.flatten(), dim=0) >= 0.9999
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ int8 activations


@pytest.mark.parametrize("scheme", ["int2-g32", "int3-g32", "int4-g32", "int8-g32", "int4-row", "int8-row", "int4-tensor"])
@torch.no_grad()
def test_linear_with_int8_activations_equals_torch_with_rounded_ones(scheme, int8):
    n = 96
    q, bias = quantized(37, n, scheme=scheme), torch.randn(37)
    layer, oracle = QLinear(q, bias), plain(q, bias)
    group = 32 if "g32" in scheme else n
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, n) * torch.rand(n).mul(4).exp()  # some inputs much larger than others
        close(layer(x), oracle(fake_int8(x, group)))
        assert not torch.allclose(layer(x), oracle(x), rtol=1e-4, atol=1e-4)  # the rounding is really there


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@torch.no_grad()
def test_experts_with_int8_activations_stay_close(family, int8):
    layer, oracle = experts_of(family)
    for tokens, k in [(1, 2), (40, 3)]:
        x, (index, weights) = torch.randn(tokens, 64), routing(tokens, k)
        got, expected = layer(x, index, weights), oracle(x, index, weights)
        error = ((got - expected).norm() / expected.norm()).item()
        assert 1e-4 < error < 0.03


@torch.no_grad()
def test_experts_with_int8_activations_equal_two_linears(int8):
    """One token with one expert of weight 1: gate and up, SwiGLU and down, each as a `QLinear` computes it."""
    layer, _ = experts_of("deepseek_v3")
    stacks = layer.qtensors()
    x = torch.randn(1, 64)
    for e in range(3):
        gate_up, down = QLinear(stacks["gate_up_proj"][e]), QLinear(stacks["down_proj"][e])
        gate, up = gate_up(x).chunk(2, dim=-1)
        expected = down(torch.nn.functional.silu(gate) * up)
        close(layer(x, torch.tensor([[e]]), torch.ones(1, 1)), expected)


@torch.no_grad()
def test_tiles_follow_the_buffers(kernel):
    """Codes written in place, replaced or loaded are seen by the next call."""
    q, other = quantized(20, 64), quantized(20, 64)
    layer, x = QLinear(q), torch.randn(2, 64)
    close(layer(x), plain(q)(x))
    layer.packed.copy_(torch.from_numpy(other.packed))
    layer.scales.copy_(torch.from_numpy(other.scales))
    close(layer(x), plain(other)(x))
    layer.packed, layer.scales = torch.from_numpy(q.packed), torch.from_numpy(q.scales)
    close(layer(x), plain(q)(x))
    with torch.inference_mode():
        made = QLinear(q)
        made(x)
        made.load_state_dict(QLinear(other).state_dict())
        close(made(x), plain(other)(x))


@torch.no_grad()
def test_set_activations_switches_the_layers_of_one_model():
    from edgelab.layers import set_activations

    q, x = quantized(20, 64), torch.randn(3, 64)
    model, other = nn.Sequential(QLinear(q), nn.ReLU(), nn.Linear(20, 4)), QLinear(q)
    plain_y = model[0](x)
    assert set_activations(model, "int8") == 1
    assert not torch.equal(model[0](x), plain_y) and torch.equal(other(x), plain_y)
    assert set_activations(model, "float32") == 1 and torch.equal(model[0](x), plain_y)
    before = set_kernel("numba-int8")
    try:
        assert torch.equal(model[0](x), plain_y)  # pinned
        set_activations(model, None)
        assert not torch.equal(model[0](x), plain_y)
    finally:
        set_kernel(before)
    assert set_activations(nn.Linear(3, 3), "int8") == 0
    with pytest.raises(ValueError, match="activations='int4' is not known; use one of float32, int8, or None"):
        set_activations(model, "int4")


def test_tracing_leaves_the_kernels_alone():
    """A trace of a kernel's output would hold the memory it was written to, and no operation."""
    q, x = quantized(20, 64), torch.randn(3, 64)
    layer = QLinear(q)
    with torch.no_grad():
        expected = layer(x)  # the tiles are there
        traced = torch.jit.trace(layer, torch.zeros(3, 64), check_trace=False)
        close(traced(x), expected)
        close(torch.vmap(layer)(x[:, None])[:, 0], expected)
    tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    close(tangent, layer(torch.ones_like(x)))


@torch.no_grad()
def test_a_default_device_does_not_matter():
    layer, (experts, _) = QLinear(quantized(20, 64)), experts_of("deepseek_v3")
    x, (index, weights) = torch.randn(3, 64), routing(3)
    expected = layer(x), experts(x, index, weights)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected[0]) and torch.equal(experts(x, index, weights), expected[1])


@torch.no_grad()
def test_codes_cannot_be_written_behind_a_layer_s_back():
    layer = QLinear(quantized(20, 64))
    with pytest.raises(ValueError, match="read-only"):
        layer.qtensors()["weight"].packed[0, 0] = 1
    x, other = torch.randn(2, 64), quantized(20, 64)
    layer(x)
    layer.packed.data.copy_(torch.from_numpy(other.packed))  # PyTorch does not count this
    layer.scales.data.copy_(torch.from_numpy(other.scales))
    layer.forget_tiles()
    close(layer(x), plain(other)(x))


def test_int8_activations_say_that_gradients_keep_them_from_being_used():
    from edgelab import layers

    layers._warn_of_gradients.cache_clear()
    layer = QLinear(quantized(20, 64))
    layer.kernel = "numba-int8"
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.warns(UserWarning, match=r"not used while gradients are recorded: wrap the call in torch.inference_mode\(\)"):
        y = layer(x)
    with torch.no_grad():
        assert not torch.equal(layer(x), y)


@torch.no_grad()
def test_numbers_of_experts_are_integers():
    layer, _ = experts_of("deepseek_v3")
    with pytest.raises(ValueError, match=r"top_k_index is torch\.float32; it must hold the numbers of experts, as integers"):
        layer(torch.randn(2, 64), torch.rand(2, 2), torch.rand(2, 2))
