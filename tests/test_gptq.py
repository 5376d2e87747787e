"""GPTQ against a straight implementation, what its refinement guarantees, and how each thing that can go wrong ends."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.methods.gptq import gptq
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.scheme import QuantScheme

ALL = ["int4-g32", "int3-g32", "int2-g16", "int8-row", "int4-row", "int4-tensor", "uint4-g32", "uint2-g16", "uint4-tensor", "nf4-g64",
       "fp4-g32", "mxfp4-g32"]  # fmt: skip


def problem(out=48, n=64, tokens=500, seed=0):
    """A weight and the second moments of inputs that are correlated and of unequal size, as activations are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) / 2 + torch.randn(n, n, generator=g) / n**0.5
    x = torch.randn(tokens, n, generator=g) * (0.1 + 2 * torch.rand(n, generator=g) ** 2) @ mix
    return torch.randn(out, n, generator=g) * 0.05, x.T @ x


def loss(w, q, xx, damping=0.05) -> float:
    """tr((W - Q) H (W - Q)^T), float64, with the damping that was fitted against."""
    h = xx.double() + damping * xx.double().diagonal().mean() * torch.eye(len(xx), dtype=torch.float64)
    e = w.double() - torch.from_numpy(q.dequantize()).double()
    return float((e @ h * e).sum())


def straight_gptq(w, xx, scheme, scales, offsets, damping, act_order) -> np.ndarray:
    """The values of the algorithm of the paper, column by column, with an explicit inverse, float64: no blocks, no tricks."""
    w, h, table = w.double().numpy().copy(), xx.double().numpy(), scheme.table.astype(np.float64)
    h = h + damping * np.diag(h).mean() * np.eye(len(h))
    order = np.argsort(-xx.diagonal().double().numpy(), kind="stable") if act_order else np.arange(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T  # H^-1 = U^T U
    values = np.zeros_like(w)
    for i, j in enumerate(order):
        levels = scales[:, j, None] * table + offsets[:, j, None]  # [out, levels]
        nearest = np.abs(w[:, j, None] - levels).argmin(1)
        values[:, j] = levels[np.arange(len(w)), nearest]
        e = (w[:, j] - values[:, j]) / upper[i, i]
        w[:, order[i:]] -= e[:, None] * upper[i, i:]
    return values


def spread(q: QTensor, what) -> np.ndarray:
    """A scale (or offset) per weight, float64 [out, in]."""
    return np.broadcast_to(np.repeat(what.astype(np.float64), q.shape[-1] // what.shape[-1], axis=-1), q.shape)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", ["int4-g32", "int3-row", "int2-tensor", "uint3-g16", "nf4-g32", "fp4-g64", "mxfp4-g32"])
def test_equals_the_straight_implementation(scheme, act_order):
    """Same scales, same order, no refinement: the loss agrees to 1e-3, and nearly all values do (ties fall either way)."""
    w, xx = problem(seed=1)
    scheme = QuantScheme.parse(scheme)
    comp = gptq(w, xx, scheme, act_order=act_order, block=24, rounds=0)
    offsets = np.zeros(comp.scales.shape, np.float16) if comp.offsets is None else comp.offsets
    ref = straight_gptq(w, xx, scheme, spread(comp, comp.scale_values()), spread(comp, offsets), 0.05, act_order)
    assert (np.abs(ref - comp.dequantize()) < 1e-6).mean() > 0.99

    def error(values):
        e = w.double() - torch.from_numpy(values).double()
        return float((e @ xx.double() * e).sum())

    assert error(comp.dequantize()) == pytest.approx(error(ref), rel=1e-3)


@pytest.mark.parametrize("scheme", ALL)
def test_each_step_lowers_the_loss(scheme):
    """To nearest > GPTQ >= 1 round >= 4 rounds of refinement, against the damped H that is minimised."""
    w, xx = problem(seed=2)
    scheme = QuantScheme.parse(scheme)
    losses = [loss(w, round_to_nearest(w, scheme, mse_grid=32), xx), *(loss(w, gptq(w, xx, scheme, rounds=r), xx) for r in (0, 1, 4))]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < losses[1]
    assert losses[3] <= losses[2] * (1 + 1e-5)


@given(
    st.sampled_from(ALL), st.integers(0, 1000), st.sampled_from([1, 7, 40, 300]), st.sampled_from([8, 32, 128]), st.booleans(),
    st.sampled_from([1e-3, 1.0, 1e4]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_refinement_never_adds_loss(scheme, seed, tokens, block, act_order, size):
    """Also with fewer tokens than inputs (xx singular but for its damping), any block, any size of the activations."""
    w, xx = problem(out=6, n=64, tokens=tokens, seed=seed)
    scheme = QuantScheme.parse(scheme)
    plain, refined = (gptq(w, xx * size, scheme, act_order=act_order, block=block, rounds=r, mse_grid=4) for r in (0, 2))
    assert refined.codes().max() < scheme.levels
    assert loss(w, refined, xx) <= loss(w, plain, xx) * (1 + 1e-4)


def test_no_code_can_be_moved_for_the_better_after_many_rounds():
    """A fixed point of the refinement: try every other code of every weight."""
    w, xx = problem(out=4, n=32, seed=3)
    scheme = QuantScheme.parse("int3-g16")
    q = gptq(w, xx, scheme, rounds=60)
    h = xx.double() + 0.05 * xx.double().diagonal().mean() * torch.eye(32, dtype=torch.float64)
    e = w.double() - torch.from_numpy(q.dequantize()).double()
    values = torch.from_numpy(spread(q, q.scales)[..., None] * scheme.table)  # [out, in, levels]
    moved = values - torch.from_numpy(q.dequantize()).double()[..., None]
    change = moved.square() * h.diagonal()[:, None] - 2 * moved * (e @ h)[..., None]
    assert float(change.min()) > -1e-6 * loss(w, q, xx)


@pytest.mark.parametrize("scheme", ["int4-g32", "uint3-g32", "int4-tensor", "mxfp4-g32"])
def test_a_stack_is_its_experts(scheme):
    (w0, h0), (w1, h1) = problem(seed=4), problem(seed=5)
    scheme = QuantScheme.parse(scheme)
    stack = gptq(torch.stack([w0, w1]), torch.stack([h0, h1]), scheme)
    for e, one in enumerate([gptq(w0, h0, scheme), gptq(w1, h1, scheme)]):
        np.testing.assert_array_equal(stack[e].packed, one.packed)
        np.testing.assert_array_equal(stack[e].scales, one.scales)


def test_the_size_of_xx_and_the_block_do_not_matter():
    """xx may be a sum or a mean; blocks only order the same sums (float32: a tie may fall the other way)."""
    w, xx = problem(seed=6)
    scheme = QuantScheme.parse("int4-g32")
    a = gptq(w, xx, scheme)
    for other in (gptq(w, xx / 512, scheme), gptq(w, xx, scheme, block=5), gptq(w.double(), xx.double(), scheme)):
        assert (a.codes() == other.codes()).mean() > 0.99
        assert loss(w, other, xx) == pytest.approx(loss(w, a, xx), rel=1e-3)


def test_independent_inputs_leave_nothing_to_answer():
    """With a diagonal H there is nothing to make good: GPTQ is round to nearest."""
    w, _ = problem(seed=7)
    scheme = QuantScheme.parse("int4-g32")
    plain = gptq(w, torch.diag(torch.rand(64) + 0.1), scheme, mse_grid=0, rounds=0)
    np.testing.assert_array_equal(plain.codes(), round_to_nearest(w, scheme).codes())


# ------------------------------------------------------------------------------------------------ what can go wrong


def test_an_expert_without_tokens_is_rounded_to_nearest_with_a_warning():
    w, xx = problem(seed=8)
    scheme = QuantScheme.parse("int4-g32")
    with pytest.warns(UserWarning, match=r"layers.1.experts\[1\] saw no token in calibration"):
        q = gptq(torch.stack([w, w]), torch.stack([xx, torch.zeros_like(xx)]), scheme, name="layers.1.experts")
    np.testing.assert_array_equal(q[1].codes(), round_to_nearest(w, scheme, mse_grid=32).codes())
    np.testing.assert_array_equal(q[0].codes(), gptq(w, xx, scheme).codes())


def test_dead_inputs_keep_their_weights_and_touch_no_others():
    """H_jj = 0: no evidence is no reason to zero a weight. Rounded to nearest; the live columns as if alone."""
    w, xx = problem(seed=9)
    w[:, 40:] = w[:, 40:].clamp(-0.03, 0.03)  # not what sets a group's scale
    xx[40:, :] = xx[:, 40:] = 0
    scheme = QuantScheme.parse("int4-row")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = gptq(w, xx, scheme, rounds=0)
    nearest = np.clip(np.round(w[:, 40:].numpy() / q.scales.astype(np.float32)), -8, 7) + 8
    np.testing.assert_array_equal(q.codes()[:, 40:], nearest)


@pytest.mark.parametrize("scheme", ALL)
def test_groups_of_zeros_stay_zeros(scheme):
    w, xx = problem(seed=10)
    w[3] = 0
    w[5, :32] = 0
    q = gptq(w, torch.diag(xx.diagonal()), QuantScheme.parse(scheme))
    assert np.isfinite(q.dequantize()).all()
    if "tensor" not in scheme:
        assert (q.dequantize()[3] == 0).all()
    assert (gptq(torch.zeros(8, 64), xx, QuantScheme.parse(scheme)).dequantize() == 0).all()


def test_a_singular_hessian_is_damped_further_with_a_warning():
    w, _ = problem(seed=11)
    x = torch.randn(3, 64)  # three tokens for 64 inputs
    scheme = QuantScheme.parse("int4-g32")
    with pytest.warns(UserWarning, match=r"layer.x: xx needed damping=1e-06 instead of 0 to be positive definite"):
        q = gptq(w, (x.T @ x).double(), scheme, damping=0.0, name="layer.x")
    e = (w - torch.from_numpy(q.dequantize())) @ x.T
    nearest = (w - torch.from_numpy(round_to_nearest(w, scheme).dequantize())) @ x.T
    assert e.square().sum() < 0.1 * nearest.square().sum()


def test_what_is_no_sum_of_squares_is_an_error():
    w, xx = problem(seed=12)
    indefinite = xx.clone()
    indefinite[0, 1] = indefinite[1, 0] = 100 * xx.diagonal().max()
    with pytest.raises(ValueError, match=r"layer.x: xx isn't a sum of x x\^T: .* smallest eigenvalue -.* no damping up to 10"):
        gptq(w, indefinite, QuantScheme.parse("int4-g32"), name="layer.x")
    with pytest.raises(ValueError, match=r"layer.x: xx isn't a sum"):
        gptq(w, -xx, QuantScheme.parse("int4-g32"), name="layer.x")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w, xx: (w, xx.clone().fill_(torch.nan)), "layer.x: xx holds 4096 NaN or infinite values"),
        (lambda w, xx: (w, xx[:32, :32]), r"layer.x: xx is \(32, 32\); a weight of \(48, 64\) needs \(64, 64\)"),
        (lambda w, xx: (w.clone().fill_(torch.inf), xx), "layer.x: weight holds 3072 NaN or infinite values"),
        (lambda w, xx: (w[0], xx), "layer.x: weight is torch.float32"),
        (lambda w, xx: (w[:, :33], xx[:33, :33]), "group_size=32 does not divide in_features=33"),
        (lambda w, xx: (w * 1e8, xx), "needs a scale above float16"),
    ],
)
def test_errors_name_the_weight(change, message):
    w, xx = change(*problem())
    with pytest.raises(ValueError, match=message):
        gptq(w, xx, QuantScheme.parse("int4-g32"), name="layer.x")


@pytest.mark.parametrize("scheme", ["int4-g32", "uint4-g32", "nf4-g64", "int4-row", "int4-tensor"])
def test_scales_below_float16_are_warned_of(scheme):
    """Once per expert, also for one that saw no token; the others are not named."""
    (w, xx), scheme = problem(seed=13), QuantScheme.parse(scheme)
    for moments in (xx, torch.zeros_like(xx)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            q = gptq(torch.stack([w, w * 1e-9]), torch.stack([xx, moments]), scheme, name="layer.x")
        small = [str(t.message) for t in told if "are so small" in str(t.message)]
        assert len(small) == 1 and small[0].startswith("layer.x[1]: ")
        assert not q[1].dequantize().any() and q[0].dequantize().any()


def test_powers_of_two_as_scales_hold_small_weights():
    w, xx = problem(seed=14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = gptq(w * 1e-9, xx, QuantScheme.parse("mxfp4-g32"))
    assert np.abs(q.dequantize() / 1e-9 - w.numpy()).max() < 0.3 * float(w.abs().max())


@pytest.mark.parametrize("setting", [{"damping": -1.0}, {"damping": float("nan")}, {"block": 0}, {"rounds": -1}])
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        gptq(*problem(), QuantScheme.parse("int4-g32"), **setting)
