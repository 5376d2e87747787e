"""LLM.int8(): the split against bitsandbytes and a loop, what it buys on planted outliers, and its form as an ActScheme."""

import math

import pytest
import torch
import torch.nn.functional as F

from edgelab.layers import QLinear, round_inputs, set_kernel
from edgelab.methods.outliers import llm_int8, outlier_columns
from edgelab.methods.rtn import round_to_nearest
from edgelab.scheme import ActScheme, QuantScheme

INT8 = QuantScheme.parse("int8-row")


def planted(tokens=24, n=96, channels=(3, 40), factor=50.0):
    """Inputs [tokens, n] whose `channels` are `factor` times as large as the rest, all above 6."""
    x = torch.randn(tokens, n).clamp(-3, 3)
    x[:, list(channels)] = (1 + torch.rand(tokens, len(channels))) * factor * torch.randn(tokens, len(channels)).sign()
    return x


def naive(x, w, threshold):
    """The definition, token by token and channel by channel, in Python's own numbers; `w` float64 [out, in]."""
    tokens, n = x.shape
    out = {k for k in range(n) if any(abs(float(x[i, k])) > threshold for i in range(tokens))}
    y = torch.zeros(tokens, w.shape[0], dtype=torch.float64)
    for i in range(tokens):
        s = max((abs(float(x[i, k])) for k in range(n) if k not in out), default=0.0) / 127
        for k in range(n):
            value = float(x[i, k])
            y[i] += w[:, k] * (value if k in out else round(value / s) * s if s else 0.0)
    return y


def test_outlier_columns():
    assert outlier_columns(torch.tensor([6.0, 6.5, 1.0])).tolist() == [1]
    assert outlier_columns(torch.tensor([6.0, 6.5]), math.inf).tolist() == []
    with pytest.raises(ValueError, match="threshold=0 must be positive"):
        outlier_columns(torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"absmax is torch.float32 \(2, 3\); it must be float \[in\]"):
        outlier_columns(torch.ones(2, 3))


@pytest.mark.parametrize("threshold", [6.0, 2.0, math.inf])
def test_the_split_equals_the_definition(threshold):
    x, q = planted(), round_to_nearest(torch.randn(17, 96) / 10, INT8)
    ref = naive(x, torch.from_numpy(q.dequantize()).double(), threshold)
    comp = llm_int8(x, q, threshold)
    assert comp.shape == (24, 17) and comp.dtype == torch.float32
    torch.testing.assert_close(comp.double(), ref, rtol=2e-5, atol=2e-5)
    assert torch.equal(llm_int8(x.view(2, 12, 96), q, threshold), comp.view(2, 12, 17))


def test_the_split_equals_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `bnb` is not installed")
    layer = bnb.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False, threshold=6.0).eval()
    layer.weight = bnb.nn.Int8Params((torch.randn(64, 96) / 10).half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    codes, scales = layer.weight.CB.clone(), layer.weight.SCB.clone() / 127
    x = planted().half()
    with torch.no_grad():
        theirs = layer(x)
    ours = llm_int8(x, (codes, scales))
    assert outlier_columns(x.float().abs().amax(0)).tolist() == [3, 40]
    # both round the same integers; theirs are summed up in float16, whose step at these sizes is up to 2**-6
    assert theirs.abs().max() > 16
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2**-6)
    exact = F.linear(x.float(), codes.float() * scales[:, None])
    one_scale = llm_int8(x, (codes, scales), math.inf)
    assert (ours - exact).norm() < 0.1 * (one_scale - exact).norm()


def test_nothing_and_zeros():
    q = round_to_nearest(torch.randn(5, 8), INT8)
    assert llm_int8(torch.empty(0, 8), q).shape == (0, 5)
    assert torch.equal(llm_int8(torch.zeros(2, 8), q), torch.zeros(2, 5))
    huge = torch.full((2, 8), 100.0)  # every channel is an outlier: nothing is rounded
    torch.testing.assert_close(llm_int8(huge, q), huge @ torch.from_numpy(q.dequantize()).T)


def test_doors():
    q, x = round_to_nearest(torch.randn(5, 8), INT8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"weight is int4-g8 \(5, 8\); LLM.int8\(\) multiplies int8-row"):
        llm_int8(x, round_to_nearest(torch.randn(5, 8), QuantScheme.parse("int4-g8")))
    with pytest.raises(ValueError, match="one expert at a time"):
        llm_int8(x, round_to_nearest(torch.randn(2, 5, 8), INT8))
    with pytest.raises(ValueError, match=r"x is torch.float32 \(2, 7\); it must be float \[..., 8\]"):
        llm_int8(x[:, :7], q)
    with pytest.raises(ValueError, match="x holds 1 NaN or infinite values of 16"):
        llm_int8(x.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))), q)
    with pytest.raises(ValueError, match=r"codes are torch.float32 \(5, 8\)"):
        llm_int8(x, (torch.zeros(5, 8), torch.zeros(5)))


# --------------------------------------------------------------------------------------------- as an ActScheme


@pytest.mark.parametrize("text", ["a8-token-o6", "a4-token-o0.5", "a8-tensor-o20"])
def test_the_scheme_s_text_round_trips(text):
    act = ActScheme.parse(text)
    assert str(act) == text and ActScheme.parse(str(act)) == act and act.outliers is not None
    assert ActScheme.parse(text.rpartition("-")[0]).outliers is None


def test_the_scheme_s_doors():
    with pytest.raises(ValueError, match=r"outliers=0 must be a positive threshold, such as 6\.0"):
        ActScheme(outliers=0)
    with pytest.raises(ValueError, match=r"outliers=6\.0 needs scales found at run time"):
        ActScheme.parse("a8-static-o6")
    with pytest.raises(ValueError, match="such as a8-token-o6"):
        ActScheme.parse("a8-token-six")


def test_round_inputs_leaves_the_outliers_alone():
    x = planted()
    comp = round_inputs(x, ActScheme.parse("a8-token-o6"))
    assert torch.equal(comp[:, [3, 40]], x[:, [3, 40]])
    rest = [k for k in range(96) if k not in (3, 40)]
    assert torch.equal(comp[:, rest], round_inputs(x[:, rest], ActScheme.parse("a8-token")))
    calm = x.clamp(-3, 3)
    assert torch.equal(round_inputs(calm, ActScheme.parse("a8-token-o6")), round_inputs(calm, ActScheme.parse("a8-token")))
    for shape in [(96,), (0, 96), (2, 0, 96)]:
        for text in ("a8-token", "a8-tensor", "a8-token-o6", "a8-tensor-o6"):
            assert round_inputs(torch.randn(shape).bfloat16(), ActScheme.parse(text)).shape == shape


@pytest.mark.parametrize("kernel", ["numba", "numba-int8", "torch"])
@torch.no_grad()
def test_a_layer_with_the_scheme_computes_the_split(kernel):
    q, x = round_to_nearest(torch.randn(64, 96) / 10, INT8), planted()
    layer = QLinear(q)
    layer.round_input_of("weight", ActScheme.parse("a8-token-o6"))
    layer.kernel = kernel
    torch.testing.assert_close(layer(x), llm_int8(x, q), rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_planted_outliers_cost_one_scale_per_token_dearly():
    """Two of 256 channels at 50 times the rest: the error of the output, a8-token against a8-token-o6."""
    q = round_to_nearest(torch.randn(128, 256) / 16, INT8)
    x, layer, error = planted(64, 256), QLinear(q), {}
    exact = layer(x)
    before = set_kernel("numba")
    try:
        for text in ("a8-token", "a8-token-o6"):
            layer.round_input_of("weight", ActScheme.parse(text))
            error[text] = float((layer(x) - exact).norm())
    finally:
        set_kernel(before)
    # the scale falls from about 100 / 127 to about 3 / 127, and the error with it
    assert error["a8-token-o6"] < 0.05 * error["a8-token"], error
