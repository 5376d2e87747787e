"""Fewer experts: who goes and who merges against plain versions, masks against surgery, splits against the original."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from scipy.cluster import hierarchy
from test_model import CONFIGS, IDS, tiny

from edgelab.evaluate import routers
from edgelab.expert_stats import expert_stats
from edgelab.expert_steps import masked, merge, shrink_experts, split_experts
from edgelab.methods import experts as decide
from edgelab.model import FAMILIES
from edgelab.recipe import DropExperts, MergeExperts
from edgelab.surgery import keep_experts

SPARSE = [f for f in CONFIGS if FAMILIES[f].experts]
BATCHES = [torch.arange(40).reshape(2, 20) % 96, torch.arange(33).reshape(3, 11) % 96 + 7]
METHODS = ("reap", "gate_mass", "frequency", "naee", "random")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def check_round_trip(model, folder):
    model.save_pretrained(folder)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- decisions


def test_average_linkage_is_scipys():
    for seed in range(5):
        points = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tree = hierarchy.linkage(points.numpy(), method="average", metric="euclidean")
        for count in (1, 3, 7, 12):
            labels = hierarchy.fcluster(tree, count, criterion="maxclust")
            expected = {frozenset(np.flatnonzero(labels == n).tolist()) for n in set(labels)}
            assert {frozenset(g) for g in decide.average_linkage(points, count)} == expected


def test_subset_searched_is_as_good_as_all_tried(monkeypatch):
    """Additive losses with pairs that hurt together: exchange finds what elimination alone misses."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        a = generator.normal(size=(8, 8))
        cost = a @ a.T

        def error(kept, cost=cost):
            gone = [e for e in range(8) if e not in kept]
            return float(cost[np.ix_(gone, gone)].sum())

        best, every = decide.subset(8, 4, error)
        monkeypatch.setattr(decide, "MOST_SUBSETS", 10)
        found, searched_all = decide.subset(8, 4, error)
        monkeypatch.undo()
        assert every and not searched_all
        assert best == list(min(combinations(range(8), 4), key=error))
        # no exchange of one for one improves it
        others = [e for e in range(8) if e not in found]
        assert all(error(found) <= error(sorted({*found} - {x} | {y})) + 1e-9 for x in found for y in others)
        assert error(best) <= error(found) <= error([0, 1, 2, 3]) + 1e-9


def test_matched_neurons_are_found():
    gate_up, down = torch.randn(2, 6, 5), torch.randn(5, 6)
    order = torch.randperm(6)
    assert torch.equal(decide.matched(gate_up[:, order], down[:, order], gate_up, down), torch.argsort(order))


# ------------------------------------------------------------------------------------------------------------ dropping


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("method", METHODS)
def test_drop(family, method):
    """The kept experts are those that the statistics name, and the model is that of `surgery` with them."""
    model = tiny(family)
    twin, stats = copy.deepcopy(model), expert_stats(model, BATCHES, progress=False)
    (said,) = shrink_experts(model, DropExperts(0.25, method, seed=1), BATCHES, progress=False)
    kept = {}
    for i, (name, s) in enumerate(stats.items()):
        worth = {"reap": s.reap_sum / s.counts.clamp(min=1), "gate_mass": s.gate_mass, "frequency": s.counts}.get(method)
        before = twin.get_submodule(name).weight.detach()
        kept[name] = [e for e in range(4) if any(torch.equal(before[e], row) for row in model.get_submodule(name).weight)]
        assert len(kept[name]) == 3 and f"{name.rpartition('.')[0]}: {', '.join(map(str, kept[name]))}" in said, i
        if worth is not None:
            gone = next(e for e in range(4) if e not in kept[name])
            assert worth[gone] == worth.min()
    keep_experts(twin, kept)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_naee_by_running_the_layer(family):
    """The one that goes is the one whose absence changes the mixture's output least, the layer run with each masked in turn."""
    model = tiny(family)
    name = next(iter(routers(model)))
    seen, place = [], model.get_submodule(name.rpartition(".")[0])

    def outputs(gone):
        seen.clear()
        handle = place.register_forward_hook(lambda _m, _a, o: seen.append((o[0] if isinstance(o, tuple) else o).reshape(-1, 32)))
        with masked(model, {name: gone} if gone else {}), torch.no_grad():
            for ids in BATCHES:
                model(ids)
        handle.remove()
        return torch.cat(seen)

    whole = outputs([])
    error = [float((outputs([e]) - whole).double().square().sum()) for e in range(4)]
    twin = copy.deepcopy(model)
    shrink_experts(twin, DropExperts(0.25, "naee"), BATCHES, progress=False)
    rows = twin.get_submodule(name).weight
    gone = [e for e in range(4) if not any(torch.equal(model.get_submodule(name).weight[e], row) for row in rows)]
    assert gone == [int(np.argmin(error))]


def test_random_follows_its_seed():
    kept = []
    for seed in (0, 0, 1, 2, 3):
        model = tiny("mixtral")
        shrink_experts(model, DropExperts(0.5, "random", seed), None, progress=False)
        kept.append(torch.cat([r.weight.detach() for r in routers(model).values()]))
    assert torch.equal(kept[0], kept[1]) and any(not torch.equal(kept[0], k) for k in kept[2:])


@pytest.mark.parametrize("step", [DropExperts(0.5), MergeExperts(0.5), MergeExperts(0.25, "router")])
def test_on_the_meta_device_only_shapes(step):
    model = tiny("deepseek_v3").to("meta")
    assert shrink_experts(model, step, None, progress=False) == []
    stay = 4 - round(4 * step.share)
    assert model.config.n_routed_experts == stay and {tuple(r.weight.shape) for r in routers(model).values()} == {(stay, 32)}


def test_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        shrink_experts(tiny("llama"), DropExperts(0.5), BATCHES)
    with pytest.raises(ValueError, match=r"share=0.75 leaves 1 of 4 experts in .*, but a token chooses 2: at most share=0.5"):
        shrink_experts(tiny("mixtral"), DropExperts(0.75), BATCHES)
    grouped = tiny("deepseek_v3").to("meta")
    for router in routers(grouped).values():
        router.num_group = 2
    with pytest.raises(ValueError, match="n_group = 2"):
        shrink_experts(grouped, DropExperts(0.25), None)


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", SPARSE)
def test_copies_merge_into_what_they_were(family):
    """Expert 3 is expert 1 with its neurons in another order: one of the two, from whose rows the router chooses, is lost without loss."""
    model = tiny(family)
    order, layout = torch.randperm(model.config.get_text_config().intermediate_size if family in LOCAL else 32), FAMILIES[family].experts
    with torch.no_grad():
        for name in routers(model):
            x = model.get_submodule(name.rpartition(".")[0]).experts
            inner = len(order)
            both = torch.stack([2 * order, 2 * order + 1], 1).flatten() if layout.interleaved else torch.cat([order, order + inner])
            if layout.transposed:
                x.gate_up_proj[3], x.down_proj[3] = x.gate_up_proj[1][:, both], x.down_proj[1][order]
            else:
                x.gate_up_proj[3], x.down_proj[3] = x.gate_up_proj[1][both], x.down_proj[1][:, order]
            if layout.biased:
                x.gate_up_proj_bias[3], x.down_proj_bias[3] = x.gate_up_proj_bias[1][both], x.down_proj_bias[1]
    twin = copy.deepcopy(model)
    used = {name: torch.tensor([5, 7, 3, 2]) for name in routers(model)}
    merge(model, {name: [[0], [1, 3], [2]] for name in used}, used)
    rows = copy.deepcopy(twin)
    merge(rows, {name: [[0], [1, 3], [2]] for name in used}, used, all_rows=True)
    torch.testing.assert_close(logits(rows), logits(twin), rtol=1e-4, atol=1e-5)  # the two were one function: every row finds it again
    keep_experts(twin, {name: [0, 1, 2] for name in used})
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)


LOCAL = {"mixtral", "olmoe", "granitemoe", "gpt_oss"}  # whose experts are as wide as intermediate_size


@pytest.mark.parametrize("method", ["outputs", "router"])
def test_groups_follow_the_statistics(method, tmp_path):
    model = tiny("deepseek_v3")
    before, stats = copy.deepcopy(model), expert_stats(model, BATCHES, progress=False)
    (said,) = shrink_experts(model, MergeExperts(0.5, method), BATCHES, progress=False)
    for name, s in stats.items():
        if method == "outputs":
            labels = hierarchy.fcluster(hierarchy.linkage((s.output_sum / s.tokens).numpy(), "average"), 2, "maxclust")
            groups = [np.flatnonzero(labels == n).tolist() for n in sorted(set(labels))]
        else:
            first, second = np.argsort(-s.counts.numpy(), kind="stable")[:2].tolist()
            groups = [[first], [second]]
            for e in range(4):
                if e not in (first, second):
                    groups[0 if s.likeness[e, first] >= s.likeness[e, second] else 1].append(e)
        for g in groups:
            assert "+".join(map(str, sorted(g))) in said
        # the rows of the most used members stay, in order
        heads = sorted(max(g, key=lambda e: (s.counts[e], -e)) for g in groups)
        old, new = before.get_submodule(name), model.get_submodule(name)
        assert torch.equal(new.weight, old.weight[heads]) and torch.equal(new.e_score_correction_bias, old.e_score_correction_bias[heads])
    check_round_trip(model, tmp_path)


def test_average_is_weighted_by_use():
    model = tiny("qwen3_moe")
    (name,) = routers(model)
    x = model.get_submodule(name.rpartition(".")[0]).experts
    with torch.no_grad():  # neurons that belong together beyond doubt: matching changes nothing
        base = torch.eye(64, 32) * 10
        x.gate_up_proj.copy_(base + 0.1 * torch.randn(4, 64, 32))
    want = 0.75 * x.gate_up_proj[2] + 0.25 * x.gate_up_proj[0]
    merge(model, {name: [[2, 0], [1], [3]]}, {name: torch.tensor([1, 1, 3, 1])})
    torch.testing.assert_close(x.gate_up_proj[1], want, rtol=1e-5, atol=1e-6)  # kept are 1, 2, 3
    with pytest.raises(ValueError, match=r"must hold each of the experts 0 .. 2 once"):
        merge(model, {name: [[0, 1], [1, 2]]}, {name: torch.tensor([1, 1, 1])})


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", SPARSE)
def test_masked_is_dropped(family):
    model = tiny(family)
    plain, gone = logits(model), {name: [0 if i else 2] for i, name in enumerate(routers(model))}
    cut = copy.deepcopy(model)
    keep_experts(cut, {name: [e for e in range(4) if e not in experts] for name, experts in gone.items()})
    with masked(model, gone):
        torch.testing.assert_close(logits(model), logits(cut), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    last = list(routers(model))[-1]
    with masked(model, {last: [1, 3]}):  # one layer alone, more than the others
        assert not torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="1 of 4 left; a token chooses 2"), masked(model, {last: [0, 1, 2]}):
        pass
    with pytest.raises(ValueError, match="'mlp' is no router"), masked(model, {"mlp": [0]}):
        pass


# --------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("batches", [None, BATCHES])
def test_split_is_the_same_function(family, batches, tmp_path):
    model = tiny(family)
    want, size = logits(model), sum(p.numel() for n, p in model.named_parameters() if "experts" in n and not n.endswith("bias"))
    told = split_experts(model, 8, batches)
    assert told == ["4 experts became 32 of 1/8 the width; a token chooses 16"]
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for n, p in model.named_parameters() if "experts" in n and not n.endswith("bias")) == size
    check_round_trip(model, tmp_path)
    few = tiny(family)
    assert split_experts(few, 8, batches, active=4)[0].endswith("a token chooses 4")
    assert logits(few).isfinite().all() and not torch.allclose(logits(few), want)
    few.save_pretrained(tmp_path / "few")  # copies tie exactly in a softmax router: their order, and so the last digit, may differ
    torch.testing.assert_close(logits(type(few).from_pretrained(tmp_path / "few").eval()), logits(few), rtol=1e-4, atol=1e-5)


def test_split_with_gates_that_are_not_normalised():
    model = tiny("deepseek_v3")
    for router in routers(model).values():
        router.norm_topk_prob = False
    want = logits(model)
    split_experts(model, 4)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_the_first_parts_hold_the_most():
    model = tiny("mixtral")
    inner, name = 64, next(iter(routers(model)))
    x = model.get_submodule(name.rpartition(".")[0]).experts
    with torch.no_grad():
        x.down_proj[:, :, 5] *= 50
        x.down_proj[:, :, 40] *= 50
    split_experts(model, 32)
    size = x.down_proj.detach().norm(dim=1).amax(-1).reshape(4, 32)
    assert (size.argmax(1) == 0).all() and x.down_proj.shape == (128, 32, inner // 32)


def test_half_an_expert_counts_as_half():
    """Four equal parts of one expert, two of them active: half of what the expert puts out, not all of it."""
    model = tiny("deepseek_v3")
    for router in routers(model).values():
        router.top_k = 1
    model.config.num_experts_per_tok = 1
    outputs = []
    names = [name.rpartition(".")[0] + ".experts" for name in routers(model)]
    for name in names:
        experts = model.get_submodule(name)
        inner = experts.down_proj.shape[-1]
        with torch.no_grad():  # every inner channel of an expert the same
            experts.gate_up_proj.copy_(experts.gate_up_proj.unflatten(1, (2, inner))[:, :, :1].expand(-1, -1, inner, -1).flatten(1, 2))
            experts.down_proj.copy_(experts.down_proj[..., :1].expand_as(experts.down_proj))
        experts.register_forward_hook(lambda _m, _a, out: outputs.append(out.detach().clone()))
    first = names[0]
    logits(model)
    whole = outputs[0]
    outputs.clear()
    split_experts(model, 4, active=2)
    assert model.get_submodule(first).num_experts == 16
    logits(model)
    torch.testing.assert_close(outputs[0], whole / 2, rtol=1e-3, atol=1e-5)


def test_split_refused():
    with pytest.raises(ValueError, match=r"active=17 of the finer experts; give 1 \.\. 16"):
        split_experts(tiny("qwen3_moe"), 8, active=17)
    with pytest.raises(ValueError, match="parts=3 does not divide the 32 inner channels"):
        split_experts(tiny("qwen3_moe"), 3)
    grouped = tiny("deepseek_v3")
    for router in routers(grouped).values():
        router.num_group = 2
    with pytest.raises(ValueError, match="n_group = 2"):
        split_experts(grouped, 2)
