"""bitsandbytes as a baseline: what it touches, what it skips, and that its layers compute what their codes stand for."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from test_model import IDS as SHORT
from test_model import tiny
from torch import nn

pytest.importorskip("bitsandbytes", reason="the extra `bnb` is not installed")
pytest.importorskip("accelerate", reason="the extra `bnb` is not installed")

from edgelab import Recipe
from edgelab import bnb as ours
from edgelab.bnb import audit_bnb, dequantized_by_bnb, load_bnb
from edgelab.bundle import save_bundle
from edgelab.compress import compress
from edgelab.model import load, weights
from edgelab.paths import data_dir
from edgelab.scheme import QuantScheme

MOE, DENSE = data_dir() / "edge-moe", data_dir() / "edge-dense"
IDS = torch.arange(48).reshape(2, 24) * 37 % 2048
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def plain():
    return {path: load(path) for path in (MOE, DENSE)}


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_mixture_s_experts_are_skipped_and_the_audit_says_so(kind, double, plain):
    model = load_bnb(MOE, kind, double, device="cpu")
    y, fp = logits(model), logits(plain[MOE])
    assert y.isfinite().all() and 0 < (y - fp).norm() < 0.5 * fp.norm()
    coverage = audit_bnb(model)
    assert coverage.parameters == sum(p.numel() for p in plain[MOE].parameters())
    assert coverage.expert_share == 0.0 and coverage.share < 0.25
    shares = {line["role"]: line["touched"] for line in coverage.by_role()}
    assert shares["attention"] == shares["mlp"] == shares["shared"] == 1.0
    assert shares["experts"] == shares["router"] == shares["embedding"] == 0.0
    experts = [r for r in coverage if r.role == "experts"]
    assert {r.note for r in experts} == {"bitsandbytes replaces nn.Linear only; a stack of experts is a plain parameter"}
    assert {r.scheme for r in experts} == {"bfloat16"} and coverage.bits_per_weight > 13
    with pytest.raises(ValueError, match=r"0.0% of the expert parameters were quantized"):
        coverage.check()
    listed = {w.name: (w.role, w.shape) for w in weights(plain[MOE])}
    assert all(listed[r.name] == (r.role, r.shape) for r in coverage if r.touched)


@pytest.mark.parametrize(
    ("kind", "double", "bits"), [("nf4", False, 4.5), ("nf4", True, 4 + 8 / 64 + 32 / 64 / 256), ("int8", False, None)]
)
def test_the_dense_model_s_body_is_touched_to_the_last_weight(kind, double, bits, plain):
    model = load_bnb(DENSE, kind, double, device="cpu")
    coverage = audit_bnb(model)
    body = [r for r in coverage if r.role in ("attention", "mlp")]
    assert all(r.touched for r in body) and len(body) == 28 and coverage.expert_share is None
    assert {r.role for r in coverage if r.touched} == {"attention", "mlp"}
    assert coverage.parameters == sum(p.numel() for p in plain[DENSE].parameters())
    for r in body:
        want = r.parameters * bits / 8 + (4 if double else 0) if bits else r.parameters + 4 * r.shape[0]
        assert r.predicted_bytes == pytest.approx(want, abs=4)  # the last block of 256 scales may not be full
    before = audit_bnb(model)
    logits(model)
    assert audit_bnb(model).rows == before.rows  # a call does not lay anything out anew


@pytest.mark.parametrize(("kind", "double"), KINDS[:3])
def test_a_loaded_model_computes_with_the_dequantized_weights(kind, double, plain):
    """The same function twice: in bitsandbytes' layers, and as float weights in the plain model."""
    reference = copy.deepcopy(plain[DENSE])
    for w in weights(reference):
        if w.role in ("attention", "mlp"):
            w.tensor.copy_(dequantized_by_bnb(w.tensor, kind, double_quant=double))
    torch.testing.assert_close(logits(load_bnb(DENSE, kind, double, device="cpu")), logits(reference), rtol=1e-3, atol=1e-3)


def test_inputs_of_four_dimensions_go_through_int8():
    layer = next(m for m in load_bnb(DENSE, "int8", device="cpu").modules() if type(m).__name__ == "Linear8bitLt")
    x = torch.randn(2, 3, 5, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.reshape(30, -1)).reshape(2, 3, 5, -1))


@pytest.mark.parametrize("double", [False, True])
def test_rows_that_are_no_multiple_of_a_block(double, tmp_path):
    fp = tiny("llama")  # rows of 32 and 64
    fp.save_pretrained(tmp_path)
    for w in weights(fp):
        if w.role in ("attention", "mlp"):
            w.tensor.copy_(dequantized_by_bnb(w.tensor, "nf4", double_quant=double))
    with torch.no_grad():
        torch.testing.assert_close(load_bnb(tmp_path, "nf4", double, device="cpu")(SHORT).logits, fp(SHORT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 128), (16, 96), (5, 12)])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_nf4_and_fp4_are_our_codebooks_with_a_float32_scale(blocksize, shape):
    w = torch.randn(shape)
    blocks = F.pad(w.flatten(), (0, -w.numel() % blocksize)).view(-1, blocksize)  # they run on from row to row
    for kind in ("nf4", "fp4"):
        comp = dequantized_by_bnb(w, kind, blocksize)
        absmax = blocks.abs().amax(-1, keepdim=True)
        table = torch.tensor(QuantScheme.parse(f"{kind[:2]}4-g{blocksize}").table)
        levels = table[(blocks / absmax).unsqueeze(-1).sub(table).abs().argmin(-1)]
        want = (levels * absmax).flatten()[: w.numel()].view(shape)
        torch.testing.assert_close(comp, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_stack_is_each_of_its_experts(kind):
    stack = torch.randn(3, 16, 96).bfloat16()
    whole = dequantized_by_bnb(stack, kind)
    assert whole.shape == stack.shape and whole.dtype == torch.float32
    for e in range(3):
        assert torch.equal(whole[e], dequantized_by_bnb(stack[e], kind))
    assert torch.equal(dequantized_by_bnb(stack.mT, kind), dequantized_by_bnb(stack.mT.contiguous(), kind))
    error = (whole - stack.float()).norm() / stack.float().norm()
    assert error < {"nf4": 0.12, "fp4": 0.15, "int8": 0.01}[kind]  # rows of 96: blocks of 64 run on into the next row
    x = torch.randn(2, 96)
    assert (F.linear(x, whole[0]) - F.linear(x, stack[0].float())).norm() < 0.2 * F.linear(x, stack[0].float()).norm()


def test_doors(tmp_path, monkeypatch, plain):
    with pytest.raises(ValueError, match="kind='nf3' is not known; use one of nf4, fp4, int8"):
        load_bnb(DENSE, "nf3")
    with pytest.raises(ValueError, match="double_quant=True is for nf4 and fp4"):
        load_bnb(DENSE, "int8", double_quant=True)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        load_bnb(tmp_path / "nothing")
    with pytest.raises(ValueError, match="blocksize=48 is not one of 32, 64"):
        dequantized_by_bnb(torch.randn(4, 96), "nf4", 48)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(4,\); it must be float"):
        dequantized_by_bnb(torch.randn(4))
    with pytest.raises(ValueError, match="weight holds 1 NaN or infinite values of 4"):
        dequantized_by_bnb(torch.tensor([[1.0, float("nan")], [0, 1]]))
    with pytest.raises(ValueError, match="this Linear has no layer of bitsandbytes; load it with load_bnb"):
        audit_bnb(nn.Linear(2, 2))
    c = compress(plain[DENSE], Recipe.uniform("int8-row"), progress=False)
    save_bundle(c.model, None, tmp_path / "b", recipe=c.recipe, coverage=c.coverage)
    with pytest.raises(ValueError, match=r"is quantized already \(edgelab\)"):
        load_bnb(tmp_path / "b")
    found = importlib.util.find_spec
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    for door in (lambda: load_bnb(DENSE), lambda: dequantized_by_bnb(torch.ones(1, 1)), lambda: audit_bnb(nn.Linear(2, 2))):
        with pytest.raises(ImportError, match=r"bitsandbytes not installed; .* pip install 'edgelab\[bnb\]'"):
            door()
