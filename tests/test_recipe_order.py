"""Which orders of steps make sense, and what `compress` says of the others; a recipe of many steps from end to end."""

import numpy as np
import pytest
import torch
from test_model import tiny

from edgelab import (
    AutoRound,
    Distill,
    DropExperts,
    DropLayers,
    EarlyExit,
    FineTune,
    MergeExperts,
    Prune,
    PruneChannels,
    PruneHeads,
    Qat,
    Quantize,
    QuantScheme,
    Recipe,
    Rotate,
    Route,
    SkipChannels,
    Smooth,
    SparseAttention,
)
from edgelab.compress import compress, plan, zeros
from edgelab.model import quantized, weights
from edgelab.recipe import step_of

INT4 = Quantize((("@router", None), ("*", QuantScheme.parse("int4-g32"))))
BATCHES = [torch.arange(64).reshape(2, 32) % 90]
EVERY = (
    DropExperts(method="random", seed=3),
    MergeExperts(share=0.25, method="router"),
    PruneChannels(share=0.5, method="magnitude"),
    PruneHeads(share=0.5),
    DropLayers(2),
    Prune(0.25, method="sparsegpt", schedule="sensitivity", select=("@mlp",)),
    Prune(pattern="2:4"),
    Prune(threshold=1e-3, method="magnitude"),
    Smooth(),
    Rotate(seed=7),
    Route(top_k=1, skip=0.5),
    SkipChannels(0.25),
    SparseAttention(8, 4),
    EarlyExit(after=1),
    Distill(loss="jsd", beta=0.5, train="lora"),
    FineTune(l1=1e-4),
    Quantize((("*", QuantScheme(4)),), method=Qat(steps=3, start="gptq")),
)


@pytest.mark.parametrize("step", EVERY, ids=lambda s: type(s).__name__)
def test_every_step_comes_back_from_its_json(step):
    again = Recipe.from_json(Recipe((step,)).to_json()).steps[0]
    assert again == step and type(again) is type(step)
    assert step_of(step.to_dict()) == step


WRONG = [
    ((INT4, Prune()), "comes after a Quantize step"),
    ((INT4, DropExperts()), "comes after a Quantize step"),
    ((INT4, PruneChannels()), "comes after a Quantize step"),
    ((Prune(), Rotate()), "would fill the zeros"),
    ((Route(top_k=1), DropExperts()), "already computes in its own way"),
    ((EarlyExit(after=1), INT4), "put EarlyExit behind it"),
    ((EarlyExit(after=1), EarlyExit(after=1)), "one early exit"),
    ((Distill(train="scales"),), "no scales to learn before a Quantize step"),
    ((INT4, FineTune()), "whose codes don't learn"),
    ((Prune(), Quantize(INT4.rules, method=AutoRound())), "moves the weights that Prune has set to zero"),
    ((Prune(), Quantize((("@attention", QuantScheme.parse("uint4-g32")),))), "stores an offset"),
    ((INT4, INT4), "two steps of the recipe quantize"),
    ((Prune(), PruneChannels()), "would fill the zeros"),
    ((Prune(), PruneHeads()), "would fill the zeros"),
    ((Prune(), MergeExperts()), "would fill the zeros"),
    # what a run-time step needs is asked before anything learns
    ((Distill(), EarlyExit(after=9)), "after=9"),
    ((DropExperts(0.5), Distill(), Route(top_k=3)), "more than the 2 experts"),
    ((Quantize((("@router", None), ("*", QuantScheme.parse("mxfp4-g32")))), Distill(train="scales")), "powers of two and can't learn"),
]


@pytest.mark.parametrize(("steps", "says"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_an_order_that_makes_no_sense_is_refused_before_any_work(steps, says):
    with pytest.raises(ValueError, match=says):
        plan(tiny("qwen3_moe"), Recipe(steps))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lambda: Prune(pattern="4:2"), "pattern='4:2'"),
        (lambda: Prune(sparsity=1.5), "sparsity=1.5"),
        (lambda: Prune(pattern="2:4", schedule="global"), "has no choice"),
        (lambda: Prune(threshold=1e-3), "it takes method='magnitude'"),
        (lambda: Prune(schedule="global", method="sparsegpt"), "chooses as it goes"),
        (lambda: Prune(select=("@mpl",)), "no role; roles are"),
        (lambda: Prune(select=()), "selects nothing"),
        (lambda: Route(), "changes nothing"),
        (lambda: Route(top_k=0), "top_k=0"),
        (lambda: Route(top_p=1.5), "top_p=1.5"),
        (lambda: DropExperts(method="best"), "use one of reap"),
        (lambda: PruneChannels(multiple=0), "multiple=0"),
        (lambda: Prune(select=5), "select=5"),
        (lambda: Distill(loss="kl"), "use one of forward"),
        (lambda: Distill(train="bias"), "use one of all"),
        (lambda: Qat(step_size="pact"), "use one of lsq"),
        (lambda: Quantize(INT4.rules, per_expert=True), "give budget=3.5"),
        (lambda: Quantize(INT4.rules, budget=True), "budget=True"),
        (lambda: Quantize(INT4.rules, budget=float("inf")), "budget=inf"),
    ],
)
def test_settings_out_of_range_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        settings()


def test_integers_of_any_kind_are_whole_numbers():
    assert PruneChannels(multiple=np.int64(8)) == PruneChannels(multiple=8)
    assert type(Route(top_k=np.int64(2)).top_k) is int


def test_routing_asks_for_experts_before_anything_learns():
    with pytest.raises(ValueError, match="no experts"):
        plan(tiny("llama"), Recipe((Distill(), Route(top_k=1))))


@pytest.mark.parametrize(
    "step", [Distill(steps=3, batch=2, lr=1e-2), Quantize(INT4.rules), Quantize(INT4.rules, method="gptq")], ids=["distill", "rtn", "gptq"]
)
def test_zeros_of_an_earlier_call_stay(step):
    """A model that comes back pruned, from a file for instance, is as pruned as one in the middle of a recipe."""
    pruned = compress(tiny("qwen3_moe"), Recipe((Prune(0.5, method="magnitude"),)), progress=False).model
    was = zeros(pruned)
    assert was and min(was.values()) >= 0.45
    done = compress(pruned, Recipe((step,)), calibration=BATCHES, training=BATCHES, teacher=tiny("qwen3_moe"), progress=False)
    assert any("stays zero" in remark for remark in done.remarks)
    values = {n: q.dequantize() for n, (_, q) in quantized(done.model).items()} or {w.name: w.tensor for w in weights(done.model)}
    for name, share in was.items():
        assert float((torch.as_tensor(values[name]) == 0).float().mean()) >= share, name
    with pytest.raises(ValueError, match="stores an offset"):
        plan(pruned, Recipe.uniform("uint4-g32"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"calibration": [torch.arange(8)]}, r"batches\[0\] is torch.int64 \(8,\)"),
        ({"training": [torch.full((4, 8), 10_000)]}, "the tokenizer that belongs to the model"),
        ({"teacher": torch.nn.Linear(2, 2)}, "teacher=Linear is no causal language model"),
    ],
    ids=["shape", "ids", "teacher"],
)
def test_data_that_is_none_is_said_before_any_work(given, says):
    recipe = Recipe((DropLayers(1), Distill(steps=1)))
    with pytest.raises(ValueError, match=says):
        compress(tiny("qwen3_moe"), recipe, **{"calibration": BATCHES, "training": BATCHES} | given, progress=False)


def test_missing_data_is_said_before_any_work():
    model = tiny("qwen3_moe")
    with pytest.raises(ValueError, match="'drop_experts' needs calibration data"):
        compress(model, Recipe((DropExperts(),)), training=BATCHES, progress=False)
    with pytest.raises(ValueError, match=r"'distill' learns: pass training="):
        compress(model, Recipe((DropExperts(method="random"), Distill(steps=1))), calibration=BATCHES, progress=False)
    with pytest.raises(ValueError, match="'qat' learns"):
        compress(model, Recipe((Quantize(INT4.rules, method=Qat(steps=1)),)), progress=False)
    with pytest.raises(ValueError, match="pass teacher="):
        compress(model, Recipe((Distill(steps=1),)), training=BATCHES, progress=False, inplace=True)


def test_a_structure_is_tried_on_shapes_first():
    """A group size that fits the model but not what PruneChannels leaves of it is refused before any work."""
    model = tiny("qwen3_moe")
    wide = QuantScheme.parse("int4-g32")
    rules = (("@router", None), ("*.down_proj", wide), ("*", QuantScheme.parse("int4-row")))
    plan(model, Recipe((Quantize(rules),)))
    with pytest.raises(ValueError, match="group_size=32 does not divide"):
        plan(model, Recipe((PruneChannels(share=0.5, method="magnitude", multiple=16), Quantize(rules))))


def test_steps_compose_from_end_to_end_and_the_model_is_as_it_was():
    model = tiny("qwen3_moe")
    before = {n: p.clone() for n, p in model.named_parameters()}
    recipe = Recipe(
        (
            DropExperts(0.5),
            Distill(steps=2, batch=2),
            Prune(0.5, method="wanda"),
            Quantize(INT4.rules, method="gptq"),
            Distill(steps=2, batch=2, train="scales"),
            Route(top_k=1),
        )
    )
    done = compress(model, recipe, calibration=BATCHES, training=BATCHES, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert done.coverage.expert_share == 1.0
    assert done.coverage.parameters < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert torch.isfinite(done.model(BATCHES[0]).logits).all()


@pytest.mark.parametrize(
    "step", [SkipChannels(0.5), Route(top_p=0.4), Route(top_k=1), SparseAttention(4, 4)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_run_time_step_before_rounding_is_the_same_as_behind_it(family, step):
    model, ids = tiny(family), BATCHES[0]
    before, behind, alone = (compress(model, Recipe(steps), progress=False).model for steps in ((step, INT4), (INT4, step), (INT4,)))
    with torch.no_grad():
        got, want, plain = (m(ids).logits for m in (before, behind, alone))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not torch.allclose(got, plain)
