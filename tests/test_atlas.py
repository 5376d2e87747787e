"""The atlas: every edit against a model that was changed for good, the original afterwards, and the control by hand and by code."""

import copy
import json
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_model import CONFIGS, IDS, tiny

from edgelab import data
from edgelab.atlas import ALL, METRICS, Atlas, AtlasControl, Edit
from edgelab.compress import compress
from edgelab.evaluate import routers
from edgelab.expert_stats import expert_stats
from edgelab.expert_steps import merge
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import FAMILIES, load, load_tokenizer, weights
from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.scheme import QuantScheme
from edgelab.surgery import keep_experts

SPARSE = [f for f in CONFIGS if FAMILIES[f].experts]
OTHER = torch.arange(66).reshape(3, 22) % 96 + 11


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


@torch.no_grad()
def divergence(reference, other, batches):
    """By torch's own KL divergence."""
    total = 0.0
    for ids in batches:
        p, q = (torch.log_softmax(m(ids).logits.double(), -1) for m in (reference, other))
        total += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
    return total / sum(b.numel() for b in batches)


def small(family="mixtral"):
    model = tiny(family)
    stats = {"one": expert_stats(model, [IDS], progress=False), "two": expert_stats(model, [OTHER], progress=False)}
    return model, Atlas(model, stats, [IDS, OTHER], "int3-row")


@pytest.fixture(scope="module")
def embedded():
    folder = data_dir() / "edge-moe"
    model, tokenizer = load(folder), load_tokenizer(folder)
    batches = data.calibration_batches(tokenizer, data.corpus()["calibration"], tokens=1024, context=128)
    return model, Atlas(model, {"some text": expert_stats(model, batches, all_tokens=False, progress=False)}, batches[:1])


# ------------------------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("family", SPARSE)
def test_a_dropped_expert_is_one_that_surgery_took_out(family):
    model, atlas = small(family)
    before = state(model)
    for layer in range(len(atlas.routers)):
        kld = atlas.edit(layer, layer % 3, "drop")
    cut = copy.deepcopy(model)
    keep_experts(cut, {name: [e for e in range(4) if e != i % 3] for i, name in enumerate(atlas.routers)})
    assert kld == pytest.approx(divergence(model, cut, [IDS, OTHER]), rel=1e-3, abs=1e-7)
    assert kld > 1e-6
    assert same(model, before)
    assert atlas.nbytes == pytest.approx(0.75 * atlas.trail[0][2])


def test_on_the_embedded_model_too(embedded):
    model, atlas = embedded
    before = state(model)
    for layer in range(3):
        first = atlas.edit(layer, 3, "drop")
    cut = copy.deepcopy(model)
    keep_experts(cut, {name: [e for e in range(16) if e != 3] for name in atlas.routers})
    assert first == pytest.approx(divergence(model, cut, atlas.batches), rel=1e-3)
    assert same(model, before)
    with torch.no_grad():
        now = torch.log_softmax(model(atlas.batches[0], use_cache=False).logits.float(), -1)
    assert torch.equal(now, atlas._reference[0])
    atlas.reset()
    bits = {b: atlas.edit(1, 5, f"{b} bits") for b in (2, 3, 4)}
    assert bits[2] > bits[3] > bits[4] > 0
    assert same(model, before)
    atlas.reset()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_merging_is_the_merging_of_the_step(family):
    model, atlas = small(family)
    before = state(model)
    counts = {r: atlas.by_domain[ALL][i].counts for i, r in enumerate(atlas.routers)}
    kld = 0.0
    groups = {}
    for i, r in enumerate(atlas.routers):
        order = counts[r].argsort(descending=True, stable=True).tolist()
        kld = atlas.edit(i, order[2], "merge into", order[0])  # into the most used one: whose row the step keeps, too
        groups[r] = [sorted([order[0], order[2]]), [order[1]], [order[3]]]
    merged = copy.deepcopy(model)
    merge(merged, groups, counts)
    assert kld == pytest.approx(divergence(model, merged, [IDS, OTHER]), rel=1e-3, abs=1e-7)
    assert same(model, before)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bits_are_the_values_of_codes(family):
    model, atlas = small(family)
    kld = atlas.edit(0, 2, "3 bits")
    other = copy.deepcopy(model)
    for w in [w for w in weights(other) if w.kind == "experts"][:2]:
        with torch.no_grad():
            w.tensor[2].copy_(
                torch.from_numpy(round_to_nearest(w.tensor[2].detach(), QuantScheme.parse("int3-g32"), mse_grid=24).dequantize())
            )
    assert kld == pytest.approx(divergence(model, other, [IDS, OTHER]), rel=1e-3, abs=1e-8)
    shapes = [w.shape[1:] for w in weights(model) if w.kind == "experts"][:2]
    saved = sum(2 * s[0] * s[1] - QuantScheme.parse("int3-g32").nbytes(s) for s in shapes)
    assert atlas.trail[0][2] - atlas.nbytes == saved


def test_an_expert_is_rounded_after_others_were_merged_into_it():
    _, atlas = small()
    one = atlas.edit(0, 1, "2 bits")
    atlas.edit(0, 0, "merge into", 1)
    with atlas.edited(), torch.no_grad():
        stack = atlas._stacks[0][1].tensor[1].clone()
    again = torch.from_numpy(round_to_nearest(stack, QuantScheme.parse("int2-g32"), mse_grid=24).dequantize())
    # codes of 2 bits: at most four values in a group of 32
    assert all(len(row.unique()) <= 4 for row in stack.unflatten(-1, (-1, min(32, stack.shape[-1]))).flatten(0, 1))
    torch.testing.assert_close(again, stack, rtol=2e-3, atol=1e-3)
    assert one != atlas.kld()


def test_an_edit_replaces_the_one_before_and_keep_takes_it_back():
    _, atlas = small()
    first = atlas.edit(0, 1, "drop")
    atlas.edit(0, 1, "4 bits")
    assert atlas.edits == {(0, 1): Edit("4 bits")}
    assert atlas.edit(0, 1, "keep") == 0.0 and atlas.edits == {}
    assert atlas.edit(0, 1, "drop") == first
    atlas.reset()
    assert atlas.kld() == 0.0 and atlas.nbytes == atlas.trail[0][2]
    assert [row["edit"] for row in atlas.rows()] == [
        "the original", "layer 0, expert 1: drop", "layer 0, expert 1: 4 bits", "layer 0, expert 1: keep", "layer 0, expert 1: drop",
        "all edits taken back",
    ]  # fmt: skip


def test_the_model_is_left_alone_when_a_measurement_fails():
    model, atlas = small()
    before = state(model)
    atlas.edit(0, 1, "drop")
    held, atlas._reference = atlas._reference, [r[:, :3] for r in atlas._reference]
    with pytest.raises(RuntimeError):
        atlas.edit(0, 2, "2 bits")
    atlas._reference = held
    assert same(model, before)
    assert atlas.edits == {(0, 1): Edit("drop")} and len(atlas.trail) == 2
    assert all("forward" not in vars(r) for r in routers(model).values())


def test_maps_are_those_of_the_statistics():
    model, atlas = small()
    for domain, batches in (("one", [IDS]), (ALL, [IDS, OTHER])):
        stats = expert_stats(model, batches, progress=False)
        for i, s in enumerate(stats.values()):
            np.testing.assert_allclose(atlas.map("tokens", domain)[i], s.counts / s.counts.sum())
            np.testing.assert_allclose(atlas.map("gate mass", domain)[i], s.gate_mass / s.gate_mass.sum())
            np.testing.assert_allclose(atlas.map("REAP score", domain)[i], s.reap)
    w, v = (x.tensor[3].detach() for x in atlas._stacks[1])
    wrong = sum(
        float((t - torch.from_numpy(round_to_nearest(t, QuantScheme.parse("int3-row"), mse_grid=24).dequantize())).square().sum())
        for t in (w, v)
    )
    assert atlas.map("quantization error")[1, 3] == pytest.approx((wrong / float(w.square().sum() + v.square().sum())) ** 0.5, rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a: a.edit(0, 0, "delete"), "action='delete' is not known"),
        (lambda a: a.edit(0, 0, "merge into"), "into=None goes with action='merge into'"),
        (lambda a: a.edit(0, 0, "drop", 1), "and with no other"),
        (lambda a: a.edit(9, 0, "drop"), "layer 9, expert 0: there are layers 0 .. 1 of 4 experts"),
        (lambda a: a.edit(0, 4, "drop"), "expert 4"),
        (lambda a: a.edit(0, 1, "merge into", 1), "give another expert of the same layer"),
        (lambda a: a.edit(0, 1, "merge into", 7), "0 .. 3"),
        (lambda a: [a.edit(0, e, "drop") for e in range(3)], "would have 1 experts left; a token chooses 2"),
        (lambda a: [a.edit(0, 0, "drop"), a.edit(0, 1, "merge into", 0)], "merged into 0, which is gone"),
        (lambda a: [a.edit(0, 1, "merge into", 0), a.edit(0, 0, "drop")], "merge it into one that stays"),
        (lambda a: a.map("beauty"), "metric='beauty' is not known"),
        (lambda a: a.map("tokens", "poetry"), "there are all domains, one, two"),
    ],
)
def test_what_makes_no_sense_is_said_and_not_done(call, says):
    _, atlas = small()
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        call(atlas)
    assert atlas.kld() == atlas.trail[-1][1]


def test_what_an_atlas_can_not_be_made_of():
    model, atlas = small()
    with pytest.raises(ValueError, match="no experts"):
        Atlas(tiny("qwen3"), {"x": {}}, [IDS])
    with pytest.raises(ValueError, match="batches is empty"):
        Atlas(model, {"x": {}}, [])
    with pytest.raises(ValueError, match="stats is empty"):
        Atlas(model, {}, [IDS])
    with pytest.raises(ValueError, match="stats of 'x' are of the routers somewhere"):
        Atlas(model, {"x": {"somewhere": atlas.by_domain[ALL][0]}}, [IDS])
    packed = compress(model, Recipe.uniform("int4-row")).model
    with pytest.raises(ValueError, match="before Quantize"):
        Atlas(packed, {"x": dict(zip(atlas.routers, atlas.by_domain[ALL], strict=True))}, [IDS])


# ------------------------------------------------------------------------------------------------------------ the control


def click(control, layer, expert):
    """What plotly calls when the heat map is clicked."""
    (handler,) = control.figure.data[0]._click_callbacks
    handler(control.figure.data[0], SimpleNamespace(xs=[expert], ys=[layer]), None)


def test_hand_boxes_and_code_agree():
    shown = []
    for act in (
        lambda c: (click(c, 1, 2), setattr(c.action, "value", "3 bits"), c.go.click()),
        lambda c: (setattr(c.layer, "value", 1), setattr(c.expert, "value", 2), setattr(c.action, "value", "3 bits"), c.go.click()),
        lambda c: (c.choose(1, 2), c.apply("3 bits")),
    ):
        _, atlas = small()
        control = AtlasControl(atlas)
        act(control)
        assert control.error is None and atlas.edits == {(1, 2): Edit("3 bits")}
        heat, ring, marks, trail = control.figure.data
        np.testing.assert_allclose(heat.z, atlas.map("REAP score"), atol=1e-5)
        assert (list(ring.x), list(ring.y)) == ([2], [1]) and (list(marks.x), list(marks.y), list(marks.text)) == ([2], [1], ["3"])
        assert list(trail.y) == [0.0, atlas.kld()]
        shown.append((control.sentence.value, control.table.value, control.told))
    assert shown[0] == shown[1] == shown[2]
    assert "expert 2 (3 bits)" in shown[0][2] and "1 edits" in shown[0][2] and atlas.routers[1].rpartition(".")[0] in shown[0][2]


def test_a_change_of_map_is_drawn_and_edits_can_be_taken_back():
    _, atlas = small()
    control = AtlasControl(atlas)
    for metric in METRICS:
        control.metric.value = metric
        control.domain.value = "two"
        np.testing.assert_allclose(control.figure.data[0].z, atlas.map(metric, "two"), atol=1e-5)
    assert control.apply("merge into", into=3) == atlas.kld() > 0
    assert "merge into 3" in control.html
    control.back.click()
    assert atlas.edits == {} and list(control.figure.data[2].x) == [] and "all edits taken back" in control.told
    click(control, 1, 3)
    assert (control.layer.value, control.expert.value) == (1, 3)
    control.figure.data[0]._click_callbacks[0](control.figure.data[0], SimpleNamespace(xs=[], ys=[]), None)  # beside the map
    assert (control.layer.value, control.expert.value) == (1, 3)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda c: c.choose(5, 0), "layer 5, expert 0: there are layers 0 .. 1 of 4 experts"),
        (lambda c: c.apply("burn"), "action='burn' is not known"),
        (lambda c: c.apply("merge into", into=9), "into=9"),
        (lambda c: c.apply("merge into", into=0), "give another expert"),
        (lambda c: (c.apply("drop"), c.choose(0, 1), c.apply("drop"), c.choose(0, 2), c.go.click()), "1 experts left"),
    ],
)
def test_errors_are_shown_in_the_control(act, says):
    _, atlas = small()
    control = AtlasControl(atlas)
    act(control)
    assert says in str(control.error) and f"ValueError:</b> {escape(str(control.error))}" in control.sentence.value
    control.choose(1, 1)
    assert control.error is None and "alert" not in control.sentence.value


def test_the_saved_state_stays_small():
    _, atlas = small()
    control = AtlasControl(atlas)
    for i in range(6):
        control.choose(i % 2, i % 3)
        control.apply(("2 bits", "3 bits", "4 bits")[i % 3])
    own = {k: v for k, v in control.figure.get_state().items() if not k.startswith(("_esm", "_css"))}  # the script of every FigureWidget
    assert len(json.dumps(own, default=str)) < 20_000
    bundle = control._repr_mimebundle_()
    assert "6 edits" in bundle["text/plain"] and "application/vnd.jupyter.widget-view+json" in bundle
    assert len(control.html) < 2000
