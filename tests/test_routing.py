"""Other numbers of experts per token: against routing written out by hand; saved, copied, packed; arithmetic by hand."""

import copy

import pytest
import torch
import transformers
from test_model import CONFIGS, IDS, tiny

from edgelab import Quantize, QuantScheme, Recipe
from edgelab.compress import compress
from edgelab.evaluate import routers
from edgelab.expert_steps import split_experts
from edgelab.layers import QExperts
from edgelab.methods.router import near_best, nucleus, without
from edgelab.model import FAMILIES, load
from edgelab.paths import data_dir
from edgelab.recipe import Route
from edgelab.routing import active_experts, flops_per_token, route

SPARSE = [f for f in CONFIGS if FAMILIES[f].experts]
DIVIDES = {"mixtral", "granitemoe", "gpt_oss", "deepseek_v3"}  # in the configs of these tests; Qwen's and OLMoE's do not


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def watched(model):
    """[(gates, index)] of every router's forward on IDS."""
    seen = []
    handles = [r.register_forward_hook(lambda _m, _a, o: seen.append((o[1].clone(), o[2].clone()))) for r in routers(model).values()]
    logits(model)
    for h in handles:
        h.remove()
    return seen


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_top_k(family, k, tmp_path):
    """The same as a model whose config said so from the start; and it survives a file."""
    model = tiny(family)
    config = copy.deepcopy(model.config)
    config.num_experts_per_tok = k
    other = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict())
    told = route(model, Route(top_k=k))
    assert told == [f"a token gets {k} of 4 experts instead of 2"]
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)
    assert set(active_experts(model, [IDS]).values()) == {float(k)}
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("step", [Route(skip=0.8), Route(top_p=0.52), Route(top_k=3, top_p=0.7, skip=0.5)])
def test_skipping_token_by_token(family, step):
    model = tiny(family)
    plain = copy.deepcopy(model)
    if step.top_k:
        route(plain, Route(top_k=step.top_k))
    route(model, step)
    # the first mixture sees the same input in both
    (before, index), (after, same) = watched(plain)[0], watched(model)[0]
    assert torch.equal(index, same)
    skipped = 0
    for g, h in zip(before.double().tolist(), after.double().tolist(), strict=True):
        keep = set(range(len(g)))
        if step.skip is not None:
            keep &= {i for i in keep if g[i] >= step.skip * max(g)}
        if step.top_p is not None:
            order, reached = sorted(range(len(g)), key=lambda i: -g[i]), 0.0
            needed = set()
            for i in order:
                if reached >= step.top_p * sum(g) - 1e-6:
                    break
                needed.add(i)
                reached += g[i]
            keep &= needed
        scale = sum(g) / sum(g[i] for i in keep) if family in DIVIDES else 1.0
        assert h == pytest.approx([g[i] * scale if i in keep else 0.0 for i in range(len(g))], abs=1e-5)
        skipped += len(g) - len(keep)
    assert skipped > 0
    expected = len(before[0]) - skipped / len(before)
    assert next(iter(active_experts(model, [IDS]).values())) == pytest.approx(expected)


def test_a_model_with_a_rule_can_be_copied_and_a_second_route_takes_its_place():
    model = tiny("deepseek_v3")
    plain = logits(model)
    route(model, Route(top_p=0.5))
    skipping = logits(model)
    assert not torch.equal(plain, skipping)
    torch.testing.assert_close(logits(copy.deepcopy(model)), skipping, rtol=0, atol=0)
    route(model, Route(skip=0.9))
    fresh = tiny("deepseek_v3")
    route(fresh, Route(skip=0.9))
    torch.testing.assert_close(logits(model), logits(fresh), rtol=0, atol=0)
    route(model, Route(top_k=2))
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_experts_do_not_compute_what_is_skipped(mixed, monkeypatch):
    model, scheme = tiny("qwen3_moe"), QuantScheme.parse("int8-g32")
    rules = (("*#0", QuantScheme.parse("int4-g32")), ("@experts", scheme)) if mixed else (("@experts", scheme),)
    packed = compress(model, Recipe((Quantize(rules),)), progress=False).model
    twin = copy.deepcopy(packed)
    told = route(packed, Route(skip=0.9))
    assert told == ["skipped experts are neither read nor computed"]
    seen = []
    forward = QExperts.forward

    def count(self, x, index, gates):
        seen.append(int((index < self.num_experts).sum()))
        return forward(self, x, index, gates)

    monkeypatch.setattr(QExperts, "forward", count)
    got = logits(packed)
    needed = sum(active_experts(packed, [IDS]).values()) * IDS.numel()
    parts = 2 if mixed else 1
    assert sum(seen[:parts]) == round(needed) < 2 * IDS.numel()
    # the rule alone, without "none": gate 0
    from edgelab.routing import _Rule

    for router in routers(twin).values():
        router.register_forward_hook(_Rule(None, 0.9, False))
    torch.testing.assert_close(got, logits(twin), rtol=1e-5, atol=1e-6)


def test_the_remark_tells_of_floating_point():
    assert "computed all the same in floating point" in route(tiny("mixtral"), Route(skip=0.5))[0]


def test_flops_by_hand():
    """hidden 32, vocabulary 96, 4 heads of 8, 2 key heads; layer 0 dense of 64, layer 1 four experts of 32, two active."""
    model = tiny("qwen3_moe")
    attention = 2 * 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)  # two layers; two operations per weight; q, k and v, o
    want = {
        "attention": attention,
        "mlp": 2 * 3 * 32 * 64,
        "experts": 2 * 2 * 3 * 32 * 32,
        "router": 2 * 4 * 32,
        "head": 2 * 32 * 96,
    }
    assert flops_per_token(model) == pytest.approx(want | {"all": sum(want.values())})
    route(model, Route(top_k=4))
    assert flops_per_token(model)["experts"] == 2 * want["experts"]
    name = next(iter(routers(model)))
    assert flops_per_token(model, {name: 1.5})["experts"] == 0.75 * want["experts"]
    packed = compress(tiny("qwen3_moe"), Recipe((Quantize((("@experts", QuantScheme.parse("int4-g32")),)),)), progress=False).model
    assert flops_per_token(packed) == pytest.approx(want | {"all": sum(want.values())})
    assert "experts" not in flops_per_token(tiny("llama"))


def test_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        route(tiny("llama"), Route(top_k=1))
    with pytest.raises(ValueError, match=r"top_k=5 of Route is more than the 4 experts that .*mlp.gate chooses from; give 4 at most"):
        route(tiny("deepseek_v3"), Route(top_k=5))
    grouped = tiny("deepseek_v3")
    for router in routers(grouped).values():
        router.num_group, router.topk_group = 2, 1
    with pytest.raises(ValueError, match="more than the 2 experts"):
        route(grouped, Route(top_k=3))


def test_rules_on_gates():
    gates = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.25, 0.5]])
    assert nucleus(gates, 1.0)[1].all() and nucleus(gates, 0.5)[1].tolist() == [False, False, True]
    assert nucleus(gates, 0.5)[0].tolist() == [True, False, False]  # nothing to share: the first stays
    assert near_best(gates, 1.0)[1].tolist() == [False, False, True]
    assert without(gates, nucleus(gates, 0.5), True)[1].tolist() == [0.0, 0.0, 1.0]
    assert without(gates, nucleus(gates, 0.5), False)[1].tolist() == [0.0, 0.0, 0.5]


def test_the_embedded_model_split_into_128_and_cheap(tmp_path):
    """16 experts become 128: with 16 active the same logits, for every token; with 4 active the parts that matter most."""
    model, original = load(data_dir() / "edge-moe"), load(data_dir() / "edge-moe")
    ids = torch.randint(2048, (8, 128), generator=torch.Generator().manual_seed(0))
    split_experts(model, 8)
    assert flops_per_token(model)["experts"] == flops_per_token(original)["experts"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-4)
    few = load(data_dir() / "edge-moe")
    split_experts(few, 8, active=4)
    chosen = []
    for router in routers(few).values():
        router.register_forward_hook(lambda _m, _a, o: chosen.append(o[2]))
    with torch.no_grad():
        few(ids)
    assert (torch.cat(chosen) % 8 < 4).float().mean() > 0.999  # first parts first, but for two experts that all but tie
    assert few.config.n_routed_experts == 128 and set(active_experts(few, [ids]).values()) == {4.0}
    few.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), logits(few), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_rule_survives_a_file(family, packed, tmp_path):
    steps = ((Quantize((("@experts", QuantScheme.parse("int4-g32")),)),) if packed else ()) + (Route(top_k=3, top_p=0.6),)
    model = compress(tiny(family), Recipe(steps), progress=False).model
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert active_experts(again, [IDS]) == active_experts(model, [IDS]) and max(active_experts(again, [IDS]).values()) < 3
