"""Usage, pairs, rows and sentences against hand-made statistics; exercises accept the right answer and reject plausible wrong ones."""

import copy
import json
import re

import pytest
import torch
from test_model import IDS, tiny

from edgelab import Quantize, QuantScheme, Recipe, experts_lab, plots, studies
from edgelab import experts_lab as lab
from edgelab.compress import compress
from edgelab.expert_cache import Cache, CacheRow, table
from edgelab.expert_stats import ExpertStats
from edgelab.recipe import Route
from edgelab.report import Report, Row


def stats(counts, reap=None, together=None, tokens=None):
    """Statistics of one router of len(counts) experts, two of which each token chose."""
    counts, n = torch.tensor(counts), len(counts)
    reap_sum = counts.double() if reap is None else torch.tensor(reap, dtype=torch.float64) * counts
    pairs = torch.zeros(n, n, dtype=torch.int64) if together is None else torch.tensor(together)
    zero = torch.zeros(n, dtype=torch.float64)
    return ExpertStats(
        tokens or int(counts.sum()) // 2, counts, counts.double(), zero, reap_sum, pairs, torch.zeros(n, 3), zero, torch.zeros(n, n)
    )


@pytest.fixture
def two():
    """Expert 2 of mixture 1 belongs to sums; in mixture 0 the rare expert 3 is strong and the common 0 weak."""
    return {
        "prose": {"r0": stats([40, 30, 20, 10], [0.1, 1, 1, 5]), "r1": stats([40, 30, 0, 30])},
        "sums": {"r0": stats([50, 20, 20, 10], [0.1, 1, 1, 5]), "r1": stats([20, 10, 60, 10])},
    }


# -------------------------------------------------------------------------------------------------------------- who routes


def test_usage_is_a_share_of_choices(two):
    assert lab.usage(two)["sums"].tolist() == [[0.5, 0.2, 0.2, 0.1], [0.2, 0.1, 0.6, 0.1]]
    assert lab.specialist(two) == (1, 2, "sums", 0.6, 0.0)
    assert lab.say_usage(two) == (
        "The purest specialist is expert 2 of mixture 1: 60 % of the choices on sums, at most 0 % on any other domain "
        "(even use would be 25.0 %)."
    )
    with pytest.raises(ValueError, match="1 domain"):
        lab.specialist({"prose": two["prose"]})


def test_the_table_of_usage_holds_what_the_figure_draws(two):
    html = lab.usage_html(two)
    lines = [re.findall(r"<t[hd][^>]*>([^<]*)<", line) for line in html.split("<tr>")[2:]]
    assert lines[0] == ["0 prose", "40", "30", "20", "10"] and lines[3] == ["1 sums", "20", "10", "60", "10"]
    fig = lab.usage_figure(two, layer=1)
    assert [(t.name, list(t.y)) for t in fig.data] == [("prose", [40, 30, 0, 30]), ("sums", [20, 10, 60, 10])]
    assert "<svg" in plots.to_svg(fig)


def test_lift_of_pairs_by_hand():
    """8 tokens, counts 8 4 4 0: 0 and 1 together 4 times; by chance 8 * 4 / 8 / 2 = 2 of the second choices."""
    together = [[8, 4, 4, 0], [4, 4, 0, 0], [4, 0, 4, 0], [0, 0, 0, 0]]
    rows = lab.pair_rows({"r": stats([8, 4, 4, 0], together=together)})
    assert [r["experts"] for r in rows] == ["0 and 1", "0 and 2", "1 and 2"]
    assert [r["together, % of tokens (measured)"] for r in rows] == ["50.0", "50.0", "0.0"]
    assert [r["times what independent choices would give"] for r in rows] == ["2.0", "2.0", "0.0"]
    assert len(lab.pair_rows({"r": stats([8, 4, 4, 0], together=together)}, most=1)) == 1


def test_frequency_and_reap_disagree_where_it_was_made_so(two):
    rows = [r for r in lab.rank_rows(two, share=0.25) if r["mixture"] == "0"]
    assert [(r["mixture"], r["expert"], r["dropped by"]) for r in rows] == [("0", "3", "frequency"), ("0", "0", "REAP")]
    assert rows[1]["chosen most on"] == "sums (50 %)" and rows[0]["of the choices, % (measured)"] == "10.0"
    assert rows[0]["REAP score (measured)"] == "5.00" and rows[0]["does most per token on"] == "prose (5.00)"
    assert lab.rank_rows({"a": {"r": stats([4, 3, 2, 1], [4, 3, 2, 1])}}, 0.25) == [{"expert": "none", "dropped by": "both alike"}]


def test_one_is_exchanged_where_frequency_wronged_it_most(two):
    found = lab.exchange(two, share=0.25)
    assert (found.layer, found.back, found.gone) == (0, 3, 0)
    assert found.by_frequency["r0"] == [0, 1, 2] and found.exchanged["r0"] == [1, 2, 3]
    assert found.by_frequency["r1"] == found.exchanged["r1"] == [0, 2, 3]  # counts 60 40 60 40: of equal ones the first goes


# -------------------------------------------------------------------------------------------------------------- outcomes


def report(provenance="measured here"):
    common = {"provenance": provenance}
    return Report(
        (
            Row("fp", "exact_match", 1.0, slice="sums", **common),
            Row("reap", "kld", 0.25, slice="prose", **common),
            Row("reap", "kld", 0.5, slice=studies.MEAN, n=7, machine="a machine", **common),
            Row("reap", "exact_match", 0.875, slice="sums", **common),
        )
    )


def test_outcomes_say_how_they_came_about():
    rows = lab.outcome_rows(report() + Report((Row("reap", "weight_bytes", 2_500_000),)))
    assert rows[0] == {"model": "fp", "exact match, % sums (measured)": "100.0"}
    assert rows[1] == {
        "model": "reap", "MB (counted)": "2.50", "KLD prose (measured)": "0.2500", "KLD mean of domains (measured)": "0.5000",
        "exact match, % sums (measured)": "87.5",
    }  # fmt: skip
    assert lab.exact(report(), "reap", "sums") == 0.875


def test_what_was_measured_at_build_is_read_or_told_how_to_make(tmp_path):
    told, rows = lab.built("experts", tmp_path)
    assert rows == [] and "python -m edgelab.studies experts" in told
    study = studies.Study("experts", report("measured at build"), {}, 120.0)
    (tmp_path / "experts.json").write_text(study.to_json(), encoding="utf-8")
    told, rows = lab.built("experts", tmp_path)
    assert "2 minutes on a machine" in told and "7 documents" in told
    assert rows[1] == {
        "model": "reap",
        "KLD mean of domains (measured at build)": "0.5000",
        "exact match, % sums (measured at build)": "87.5",
    }
    (tmp_path / "experts.json").write_text(json.dumps({"name": "experts"}), encoding="utf-8")
    with pytest.raises(KeyError):  # a broken file is no missing one
        experts_lab.built("experts", tmp_path)


def test_bits_of_experts_are_those_of_the_coverage():
    model = tiny("mixtral")
    rules = (("*.experts.*#0", QuantScheme.parse("int8-row")), ("*.experts.*", QuantScheme.parse("int4-row")))
    uniform = compress(model, Recipe((Quantize((("@experts", QuantScheme.parse("int4-row")),)),)))
    one = compress(model, Recipe((Quantize(rules),)))
    shapes = [p.shape[1:] for n, p in model.named_parameters() if "experts" in n and p.ndim == 3]
    four, eight = (sum(QuantScheme.parse(s).nbytes(tuple(x)) for x in shapes) for s in ("int4-row", "int8-row"))
    assert lab.expert_bytes(uniform) == 4 * four
    assert lab.expert_bytes(one) == eight + 3 * four
    rows = lab.bit_rows(one)
    assert len(rows) == len(shapes)
    assert all(r["int8-row (chosen)"] == "1" and r["int4-row (chosen)"] == "3" for r in rows)
    assert all(4 < float(r["bits, mean (counted)"]) < 8 for r in rows)


# --------------------------------------------------------------------------------------------------------------- routing


def test_routings_are_copies_with_their_arithmetic():
    model = tiny("mixtral")
    before = copy.deepcopy(model.state_dict())
    found = lab.routings(model, {"1": Route(top_k=1), "2": None, "all": Route(top_k=4)}, [IDS])
    assert [r.active for r in found] == [1.0, 2.0, 4.0]
    assert found[2].flops - found[1].flops == pytest.approx(2 * (found[1].flops - found[0].flops))
    assert model.config.num_experts_per_tok == 2 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    r = Report(
        (
            Row("1", "kld", 0.2, slice="a"), Row("1", "kld", 0.4, slice="b"), Row("1", "exact_match", 0.75, slice="a"),
            Row("all", "exact_match", 0.5, slice="a"), Row("2", "exact_match", 1.0, slice="a"),
        )
    )  # fmt: skip
    rows = lab.routing_rows(found, r, "all")
    assert rows[0]["KLD, mean of domains (measured)"] == "0.300" and rows[0]["exact match a, % (measured)"] == "75"
    assert rows[2]["less than all, %"] == "0" and float(rows[0]["less than all, %"]) > float(rows[1]["less than all, %"]) > 0
    claims = lab.claim_rows(found, r, "2", "all", IDS[:1, :12], rounds=3)
    less = 1 - found[1].flops / found[2].flops
    fewer, faster, lost = (list(c.values())[1] for c in claims)
    assert (fewer, lost) == (f"{100 * less:.0f} % (counted)", "-50 points of exact match lost (measured)")
    assert re.fullmatch(rf"at most {1 / (1 - less):.1f} times \(from FLOPs\); \d+\.\d\d times \(measured\)", faster)


def test_decoding_token_by_token_reads_every_token_once():
    model, read = tiny("qwen3_moe"), []
    handle = model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: read.append(inputs[0]))
    lab.decode(model, IDS[:1, :12], prompt=5)
    handle.remove()
    assert [r.shape[1] for r in read] == [5] + [1] * 7 and torch.equal(torch.cat(read, 1), IDS[:1, :12])


# ---------------------------------------------------------------------------------------------------------------- caches

ROWS = [
    CacheRow(2, "lru", None, 0.5, 1_000_000.0, 0.0),
    CacheRow(2, "belady", None, 0.7, 600_000.0, 0.0),
    CacheRow(2, "lru", 0.3, 0.8, 400_000.0, 0.05),
]


def test_rows_figure_and_sentence_of_caches_agree():
    assert lab.cache_rows(ROWS) == [
        {
            "experts in RAM": "2", "lru: hits, %": "50.0", "belady: hits, %": "70.0", "lru: MB per token": "1.000",
            "prefer RAM by 0.3: hits, %": "80.0", "prefer RAM by 0.3: MB per token": "0.400", "prefer RAM by 0.3: KLD (measured)": "0.050",
        }
    ]  # fmt: skip
    assert lab.say_cache(ROWS, 2) == (
        "With 2 experts in RAM lru hits 50 %; no choice of whom to drop does better than 70 %. Choosing differently (prefer RAM by 0.3) "
        "hits 80 %, for a KL divergence of 0.050 nats per token."
    )
    assert lab.say_cache(ROWS[:2], 2).endswith("than 70 %.")
    with pytest.raises(ValueError, match="capacity=5 is not among 2"):
        lab.say_cache(ROWS, 5)
    fig = lab.cache_figure(ROWS)
    assert [(t.name, list(t.y)) for t in fig.data] == [("lru", [50]), ("belady", [70]), ("lru, prefer RAM by 0.3", [80])]
    assert "<svg" in plots.to_svg(lab.cache_figure(table(tiny("mixtral"), [IDS], capacities=(2, 4), strengths=(0.3,))))


# ------------------------------------------------------------------------------------------------------------- exercises


def test_right_answers_are_accepted_and_none_is_not_answered():
    assert lab.check_reap(([0.8, 3.6, 0.5], "C")).passed and lab.check_reap(((0.8, 3.6, 0.5), " c ")).passed
    assert lab.check_bytes(589_824).passed and lab.check_lru(lab.lru_hits).passed and lab.check_reap_function(lab.reap_of).passed
    for verdict in (lab.check_reap(None), lab.check_bytes(None), lab.check_lru(None), lab.check_reap_function(lambda *_: None)):
        assert not verdict.passed and "no answer so far" in verdict
    for half in (([1, 2, 3], None), (None, "C"), "C", 3, [0.8, 3.6, 0.5]):
        assert not lab.check_reap(half).passed and "asked is a pair" in lab.check_reap(half)


def test_the_twins_of_the_function_exercises_are_the_package():
    import torch

    from edgelab.expert_stats import expert_stats, mixtures, routed

    model = tiny("mixtral")
    (stats, *_), seen = expert_stats(model, [IDS], all_tokens=False, progress=False).values(), []
    name = next(iter(mixtures(model).values()))
    experts = model.get_submodule(name)
    handle = experts.register_forward_pre_hook(lambda _m, args, kwargs: seen.append(routed(args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    x, gates, chosen = seen[0]
    with torch.no_grad():
        alone = [
            [experts(x[t : t + 1], chosen[t : t + 1, i : i + 1], torch.ones(1, 1)).norm() for i in range(chosen.shape[1])]
            for t in range(len(x))
        ]
    scores = lab.reap_of(gates, torch.tensor(alone), chosen, len(stats.counts))
    assert torch.allclose(scores, stats.reap, rtol=1e-4)
    assert lab.lru_hits([1, 2, 3, 1, 4, 2, 1, 2], 3) == 3 and lab.lru_hits([], 2) == 0 and lab.lru_hits([5, 5], 1) == 1


def test_what_the_exercises_call_right_is_what_the_library_computes():
    from edgelab.methods.experts import least

    scores = [sum(g * n for g, n in t) / len(t) for _, t in lab.EXERCISE_TOKENS]
    assert scores == pytest.approx([0.8, 3.6, 0.5])
    assert least(scores, 1) == [2] and least([len(t) for _, t in lab.EXERCISE_TOKENS], 1) == [1]
    shape = (3 * 128, 256)
    assert shape[0] * shape[1] == lab.EXERCISE_WEIGHTS
    assert 4 * QuantScheme.parse("int4-g32").nbytes(shape) + 12 * QuantScheme.parse("int2-g32").nbytes(shape) == 589_824
    hits = {}
    for policy in ("lru", "belady"):
        uses = {e: [t for t, x in enumerate(lab.EXERCISE_TRACE) if x == e] for e in set(lab.EXERCISE_TRACE)}
        cache = Cache(lab.EXERCISE_CAPACITY, policy, uses if policy == "belady" else None)
        for e in lab.EXERCISE_TRACE:
            cache.take([e])
        hits[policy] = cache.hits
    assert hits == {"lru": 3, "belady": 4}


@pytest.mark.parametrize(
    ("scores", "goes", "hint"),
    [
        ([3.2, 3.6, 1.5], "C", "divides each by the number of ITS tokens"),  # sums
        ([0.4, 0.45, 0.1875], "C", "not by all of them"),
        ([1.55, 4.0, 4 / 3], "C", "gates are missing"),
        ([0.5, 0.9, 0.4], "C", "how large the outputs are"),
        ([2.0, 0.9, 1.2], "B", "gate mass"),
        ([0.775, 3.6, 0.5333], "C", "mean of products"),
        ([0.8, 3.6, 0.5], "B", "rarest, not the weakest"),
        ([0.8, 3.6, 0.5], "A", "the least score"),
        ([0.8, 3.6], "C", "three numbers"),
        (["x", 1, 2], "C", "three numbers"),
        ([1, 2, 3], "C", "the mean over its tokens"),
    ],
)
def test_wrong_scores_are_rejected_with_a_hint(scores, goes, hint):
    assert not lab.check_reap((scores, goes)).passed and hint in lab.check_reap((scores, goes))


@pytest.mark.parametrize(
    ("answer", "hint"),
    [(491_520, "scale of 16 bits"), (4_718_592, "these are bits"), (786_432, "not the other way"), (688_128, "not half of them"),
     (688_129, "add weights"), (36_864, "one expert"), ("many", "one number")],
)  # fmt: skip
def test_wrong_bytes_are_rejected_with_a_hint(answer, hint):
    assert lab.check_bytes(answer).startswith("Not yet") and hint in lab.check_bytes(answer)


def test_hits_that_are_no_function_are_told_so():
    assert "asked is a function" in lab.check_lru(3) and not lab.check_lru(3).passed


def test_upside_down_the_largest_go():
    import torch

    from edgelab.evaluate import routers
    from edgelab.expert_stats import expert_stats

    model = tiny("qwen3_moe")
    (name,) = routers(model)
    stats = {"a": expert_stats(model, [torch.arange(64).reshape(2, 32) % 90], all_tokens=False, progress=False)}
    reap = stats["a"][name].reap
    (kept,) = lab.without_largest(stats, 0.5).values()
    assert len(kept) == 2 and max(reap[e] for e in kept) <= min(reap[e] for e in range(4) if e not in kept)


def test_one_reading_of_statistics_cuts_and_merges_as_the_recipes_do():
    import torch

    from edgelab.compress import compress
    from edgelab.expert_stats import expert_stats
    from edgelab.recipe import DropExperts, MergeExperts, Recipe

    model = tiny("mixtral")
    stats = expert_stats(model, [IDS], progress=False)

    def logits(m) -> torch.Tensor:
        with torch.no_grad():
            return m(IDS, use_cache=False).logits

    for method in ("reap", "frequency", "random"):
        made = compress(model, Recipe((DropExperts(0.5, method=method, seed=4),)), calibration=[IDS], progress=False)
        assert torch.equal(logits(lab.dropped(model, stats, 0.5, method, seed=4)), logits(made.model)), method
    for method in ("outputs", "router"):
        made = compress(model, Recipe((MergeExperts(0.5, method=method),)), calibration=[IDS], progress=False)
        merged, told = lab.merged_experts(model, stats, method)
        assert torch.equal(logits(merged), logits(made.model)), method
        assert told.startswith(f"merged by {method}: mixture 0: ")
        rows, _ = lab.merged_experts(model, stats, method, all_rows=True)
        assert len(next(iter(stats.values())).counts) == next(m.num_experts for m in rows.modules() if hasattr(m, "num_experts"))
    with pytest.raises(ValueError, match="method='naee' is not one of reap, frequency, random"):
        lab.dropped(model, stats, 0.5, "naee")
