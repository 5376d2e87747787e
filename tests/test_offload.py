"""Experts on disk and their cache: policies against hand-checked and brute-force answers, mapped experts against resident ones."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from test_model import IDS, tiny

from edgelab import Recipe, load_bundle, save_bundle
from edgelab.compress import compress
from edgelab.expert_cache import Cache, Trace, _Prefer, gates_of, prefer_cached, selection_scores, simulate, table, trace
from edgelab.layers import set_kernel
from edgelab.model import FAMILIES, family_of, load
from edgelab.offload import mapped, offload
from edgelab.recipe import Quantize, QuantScheme

SPARSE = [f for f in FAMILIES if FAMILIES[f].experts]


def as_trace(*rows, experts: int = 4) -> Trace:
    return Trace(np.array([rows], np.int16), experts, (10.0,), ("router",))


# ------------------------------------------------------------------------------------------------------------ policies


def test_lru_lfu_and_belady_by_hand():
    """0 1 0 2 0 3 1 2 with room for two. LRU: 1 falls for 2, 2 for 3, 0 for 1, 3 for 2. LFU keeps 0, used three times.

    Belady: at 2 drops 1 (next used at 6, 0 at 4); at 3 drops 0 (never again); at 1 drops 3 (never), so 2 is still there.
    """
    t = as_trace([0], [1], [0], [2], [0], [3], [1], [2])
    lru, lfu, best = (simulate(t, 2, p) for p in ("lru", "lfu", "belady"))
    assert (lru.misses, lfu.misses, best.misses) == (6, 6, 5)
    assert lru.hit_rate == 2 / 8 and best.by_layer == (3 / 8,) and best.bytes_per_token == 5 * 10 / 8
    # 0 0 1 2 0 1: LRU loses 0 to 2, LFU does not
    t = as_trace([0], [0], [1], [2], [0], [1])
    assert [simulate(t, 2, p).misses for p in ("lru", "lfu", "belady")] == [5, 4, 4]


def fewest_misses(rows: list[tuple[int, ...]], capacity: int) -> int:
    """The fewest misses of any choice of what to drop: all caches that can be reached are followed."""
    states = {frozenset(): 0}
    for row in rows:
        following: dict[frozenset, int] = {}
        for held, cost in states.items():
            missing = [e for e in row if e not in held]
            spare = [e for e in held if e not in row]
            for keep in product((False, True), repeat=len(spare)):
                new = frozenset([*row, *(e for e, k in zip(spare, keep, strict=True) if k)])
                if len(new) <= capacity:
                    following[new] = min(following.get(new, 1 << 30), cost + len(missing))
        states = following
    return min(states.values())


def test_belady_is_the_fewest_misses_that_any_policy_can_have():
    rng = np.random.default_rng(0)
    for capacity in (2, 3, 4):
        for _ in range(12):
            rows = [tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(14)]
            t = as_trace(*rows, experts=6)
            assert simulate(t, capacity, "belady").misses == fewest_misses(rows, capacity)
            assert all(simulate(t, capacity, p).misses >= fewest_misses(rows, capacity) for p in ("lru", "lfu"))


def test_the_experts_of_a_token_do_not_drop_each_other():
    c = Cache(2)
    assert c.take([0, 1]) == [(0, 0), (1, 1)]
    assert c.take([2, 0]) == [(2, 1)]  # 0 is older than 1, and wanted now
    assert c.take([2, 2]) == [] and (c.hits, c.misses) == (2, 3)


def test_a_choice_without_weight_is_no_use():
    assert simulate(as_trace([-1, 0], [-1, 0], [1, 0]), 2).misses == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Cache(0), "capacity=0 holds no expert"),
        (lambda: Cache(2, "fifo"), "policy='fifo' is not known; use one of lru, lfu, belady"),
        (lambda: Cache(2, "belady"), "needs the future"),
        (lambda: Cache(1).take([0, 1]), "capacity=1 does not hold the 2 experts"),
        (lambda: trace(tiny("llama"), [IDS]), "no routers"),
    ],
)
def test_errors_of_the_cache(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# ------------------------------------------------------------------------------------------------------ choices, gates


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_strength_0_is_the_model_itself(family):
    model = tiny(family)
    plain = model(IDS).logits
    with prefer_cached(model, 0.0, capacity=2) as caches:
        torch.testing.assert_close(model(IDS).logits, plain)
    assert [c.misses for c in caches] == [simulate(trace(model, [IDS]), 2).misses // len(caches)] * len(caches) or len(caches) > 1
    assert sum(c.misses for c in caches) == simulate(trace(model, [IDS]), 2).misses
    torch.testing.assert_close(model(IDS).logits, plain, rtol=0, atol=0)  # and the hooks are gone


@torch.no_grad()
def test_groups_of_experts_stay_left_out():
    """DeepSeek-V3 with two groups of which one is chosen: c of the other is -inf, as in the router itself."""
    model = tiny("deepseek_v3")
    router = next(m for m in model.modules() if hasattr(m, "e_score_correction_bias"))
    router.num_group, router.topk_group = 2, 1
    router.e_score_correction_bias.normal_(0, 0.2)
    logits, gates, chosen = router(torch.randn(50, 32))
    scores = selection_scores(router, logits)
    assert scores.isinf().sum() == 100 and all(set(r.topk(2)[1].tolist()) == set(c.tolist()) for r, c in zip(scores, chosen, strict=True))
    torch.testing.assert_close(gates_of("deepseek_v3", router, logits, chosen), gates)


@torch.no_grad()
def test_strength_makes_hits_and_the_best_expert_stays():
    model = tiny("qwen3_moe")
    seen = {}
    router = next(m for m in model.modules() if hasattr(m, "top_k"))
    handle = router.register_forward_hook(lambda _m, _i, out: seen.update(best=out[0].argmax(-1), chosen=out[2]))
    runs = {}
    for strength in (0.0, 0.5, 10.0):
        with prefer_cached(model, strength, capacity=2, keep=1) as caches:
            handle.remove()
            handle = router.register_forward_hook(lambda _m, _i, out: seen.update(best=out[0].argmax(-1), chosen=out[2]))  # after ours
            model(IDS)
        runs[strength] = sum(c.hits for c in caches)
        assert (seen["chosen"] == seen["best"][:, None]).any(-1).all()
    assert runs[0.0] < runs[0.5] <= runs[10.0]
    with prefer_cached(model, 1e6, capacity=2, keep=0) as caches:
        model(IDS)
    assert sum(c.misses for c in caches) == 2  # the first two stay for ever


@torch.no_grad()
def test_what_is_in_ram_gains_the_mean_range_of_the_scores_so_far():
    """Cache-Prior (arXiv 2412.00099), written out for one choice per token and room for two."""
    router = next(m for m in tiny("qwen3_moe").modules() if hasattr(m, "top_k"))
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    gates = logits.softmax(-1).topk(1)
    chosen = _Prefer("qwen3_moe", Cache(2), 0.3, 0, simulated=True)(router, None, (logits, *gates))[2]
    ranges, recent, wanted, plain = [], [], [], logits.argmax(-1).tolist()
    for row in logits.double().numpy():
        ranges.append(row.max() - row.min())
        biased = [x + 0.3 * np.mean(ranges) * (e in recent[:2]) for e, x in enumerate(row)]
        pick = int(np.argmax(biased))
        recent = [pick, *(e for e in recent if e != pick)][:2]
        wanted.append(pick)
    assert chosen[:, 0].tolist() == wanted != plain


def test_table_says_exact_routing_costs_nothing_and_more_room_misses_less():
    model = tiny("mixtral")
    rows = table(model, [IDS], capacities=(2, 3, 4), strengths=(1.0,))
    plain = {(r.capacity, r.policy): r for r in rows if r.strength is None}
    assert len(rows) == 12 and all(r.kld == 0 for r in plain.values())
    for policy in ("lru", "lfu", "belady"):
        rates = [plain[c, policy].hit_rate for c in (2, 3, 4)]
        assert rates == sorted(rates) and rates[0] < rates[-1]
    assert all(plain[c, "belady"].hit_rate >= plain[c, p].hit_rate for c in (2, 3, 4) for p in ("lru", "lfu"))
    one = 4 * (2 * 64 * 32 + 64 * 32)  # bytes of an expert in float32
    assert plain[4, "lru"].bytes_per_token == 2 * 4 * one / IDS.numel()  # two layers, each of four experts once
    biased = next(r for r in rows if r.strength and r.capacity == 2)
    assert biased.kld > 0 and biased.hit_rate > plain[2, "lru"].hit_rate


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": -1.0, "capacity": 2}, "strength=-1.0"),
        ({"strength": 1.0}, "all in RAM"),
        ({"strength": 1.0, "capacity": 2, "keep": 3}, "keep=3"),
    ],
)
def test_errors_of_prefer_cached(settings, says):
    with pytest.raises(ValueError, match=says), prefer_cached(tiny("mixtral"), **settings):
        pass


# ----------------------------------------------------------------------------------------------------- mapped experts


@torch.no_grad()
def decode(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [length, vocabulary] of the first row of `ids`, token by token."""
    past, found = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:1, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_mapped_experts_give_the_same_bits(family, tmp_path):
    """Decoding with two of four experts in RAM, and a prompt that wants all four at once."""
    tiny(family).bfloat16().save_pretrained(tmp_path)
    resident, lean = load(tmp_path), offload(tmp_path, 2)
    torch.testing.assert_close(decode(lean, IDS), decode(resident, IDS), rtol=0, atol=0)
    chosen = trace(resident, [IDS[:1]])
    assert [(m.hits, m.misses) for m in mapped(lean).values()] == [
        (2 * 20 - (misses := simulate(Trace(chosen.choices[i : i + 1], 4, (1,), ("",)), 2).misses), misses)
        for i in range(len(mapped(lean)))
    ]
    torch.testing.assert_close(lean(IDS).logits, resident(IDS).logits, rtol=1e-5, atol=1e-5)
    for m in mapped(lean).values():
        assert m.bytes_read == m.misses * m.expert_bytes
        whole = next(e for n, e in resident.named_modules() if n == next(k for k, v in mapped(lean).items() if v is m))
        assert m.expert_bytes == sum(p.numel() for p in whole.parameters()) * 2 // 4  # bfloat16, one of four
        held = sum(p.numel() for p in m.inner.parameters())
        assert held * 2 == sum(p.numel() for p in whole.parameters())  # half of the experts
    other = copy.deepcopy(lean)  # shares the files, not the cache
    other(IDS)
    assert next(iter(mapped(other).values())).cache is not next(iter(mapped(lean).values())).cache


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("scheme", ["int4-g16", "int3-g32", "uint4-g16"])
@torch.no_grad()
def test_a_bundle_gives_the_same_numbers(scheme, kernel, tmp_path):
    """To the last bit but one: sums of torch depend on where tensors lie, so that a copy of the resident model differs as much."""
    recipe = Recipe.uniform(scheme, activations="a8-static" if kernel == "torch" and scheme == "int4-g16" else None)
    c = compress(tiny("deepseek_v3"), recipe, calibration=[IDS], progress=False)
    save_bundle(c.model, None, tmp_path / "b", recipe=recipe, coverage=c.coverage)
    before = set_kernel(kernel)
    try:
        resident, lean = load_bundle(tmp_path / "b"), offload(tmp_path / "b", 2)
        torch.testing.assert_close(decode(lean, IDS), decode(resident, IDS), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lean(IDS).logits, resident(IDS).logits, rtol=1e-5, atol=1e-5)
    finally:
        set_kernel(before)
    (m,) = mapped(lean).values()
    experts = next(e for e in resident.modules() if type(e).__name__ == "QExperts")
    assert m.expert_bytes * 4 == experts.nbytes and m.inner.nbytes * 2 == experts.nbytes


@torch.no_grad()
def test_tied_codes_and_experts_one_by_one(tmp_path):
    """A head that shares its codes with the embedding; a checkpoint that holds a matrix per expert and projection."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "float")  # transformers writes the experts of Mixtral one by one
    lean = offload(tmp_path / "float", 3)
    (first, *_) = mapped(lean).values()
    assert len(first.sources["gate_up_proj"][0].pieces) == 2
    torch.testing.assert_close(decode(lean, IDS), decode(model, IDS), rtol=0, atol=0)
    model = tiny("olmoe")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    recipe = Recipe.uniform("int8-row")
    c = compress(model, recipe, progress=False)
    save_bundle(c.model, None, tmp_path / "b", recipe=recipe, coverage=c.coverage)
    torch.testing.assert_close(decode(offload(tmp_path / "b", 2), IDS), decode(load_bundle(tmp_path / "b"), IDS), rtol=0, atol=0)


@torch.no_grad()
def test_what_is_chosen_follows_what_is_really_in_ram(tmp_path):
    """Decoding with real caches makes the choices of the simulated ones."""
    tiny("qwen3_moe").save_pretrained(tmp_path)
    resident, lean = load(tmp_path), offload(tmp_path, 2)
    with prefer_cached(resident, 0.7, capacity=2) as simulated:
        expected = resident(IDS[:1]).logits[0]
    with prefer_cached(lean, 0.7) as real:
        got = decode(lean, IDS)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (real[0].hits, real[0].misses) == (simulated[0].hits, simulated[0].misses)
    assert real[0].misses < simulate(trace(resident, [IDS[:1]]), 2).misses


def test_errors_of_offload(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="without fused experts: there is nothing to leave on disk"):
        offload(tmp_path / "dense", 2)
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "moe")
    for capacity in (1, 5):
        with pytest.raises(ValueError, match=rf"capacity={capacity} of model.layers.0.mlp.experts must be in 2 .* 4"):
            offload(tmp_path / "moe", capacity)
    name = "model.layers.0.mlp.experts.down_proj"
    recipe = Recipe((Quantize(((f"{name}#0", QuantScheme.parse("int8-row")), ("@router", None), ("*", QuantScheme.parse("int4-g16")))),))
    c = compress(model, recipe, progress=False)
    save_bundle(c.model, None, tmp_path / "mixed", recipe=recipe, coverage=c.coverage)
    with pytest.raises(ValueError, match="experts in several schemes"):
        offload(tmp_path / "mixed", 2)
    with pytest.raises(FileNotFoundError, match="no directory"):
        offload(tmp_path / "nothing", 2)
    assert family_of(model).model_type == "mixtral"
