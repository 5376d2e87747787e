"""The arithmetic of the trade-off explorer: fronts by brute force, tests against scipy and a plain bootstrap, budgets, refusals."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import made_up, write

from edgelab import paired, tradeoff
from edgelab.device import device, devices, predict
from edgelab.sweep_table import METRICS, Sweep, quality, sums
from edgelab.tradeoff import PRESETS, State


@pytest.fixture(scope="module")
def table():
    return made_up(400, seed=3)


@pytest.fixture(scope="module")
def sweep(table):
    return Sweep.from_table(table, json.loads(table.schema.metadata[b"edgelab"]))


# --------------------------------------------------------------------------------------------------------------- front


def dominated(points: np.ndarray) -> list[bool]:
    """Which points another one dominates, or that hold a NaN: by looking at every pair."""
    known = ~np.isnan(points).any(1)
    return [not known[i] or any(known[j] and (q <= p).all() and (q != p).any() for j, q in enumerate(points)) for i, p in enumerate(points)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 3), st.integers(0, 14))
def test_the_front_is_what_nothing_dominates(data, axes, n):
    value = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.0, math.inf, -math.inf, math.nan]) | st.floats(-1, 1)
    points = np.array(data.draw(st.lists(st.tuples(*[value] * axes), min_size=n, max_size=n))).reshape(n, axes)
    assert tradeoff.pareto(*points.T).tolist() == [not d for d in dominated(points)]


def test_the_front_of_many_points_and_of_wrong_ones():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3000, 3)).round(1)
    for axes in (2, 3):
        front = tradeoff.pareto(*points[:, :axes].T)
        on = points[front][:, :axes]
        assert 3 < front.sum() < 600
        for p in points[:, :axes][~front][::37]:
            assert ((on <= p).all(1) & (on != p).any(1)).any(), "off the front, and nothing on it dominates"
    with pytest.raises(ValueError, match="give two or three of one length"):
        tradeoff.pareto(np.ones(2), np.ones(3))


# -------------------------------------------------------------------------------------------------------- significance


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_scipys_exact_test(only_a, only_b):
    from scipy.stats import binomtest

    p = paired.mcnemar(only_a, only_b)
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert p == pytest.approx(min(1.0, expected), rel=1e-9)
    assert p == paired.mcnemar(only_b, only_a)


def mulberry(count: int, seed: int) -> list[float]:
    """mulberry32 as its author wrote it, a step at a time, in whole numbers."""
    found, mask = [], 0xFFFFFFFF
    for _ in range(count):
        seed = (seed + 0x6D2B79F5) & mask
        t = ((seed ^ seed >> 15) * (seed | 1)) & mask
        t ^= (t + ((t ^ t >> 7) * (t | 61) & mask)) & mask
        found.append(((t ^ t >> 14) & mask) / 2**32)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_the_generator_is_mulberry32(seed):
    assert paired.mulberry32(200, seed).tolist() == mulberry(200, seed)
    u = paired.mulberry32(20_000, seed)
    assert abs(u.mean() - 0.5) < 0.01 and u.min() >= 0 and u.max() < 1


def sum_of(values) -> float:
    """One after the other."""
    found = 0.0
    for v in values:
        found += float(v)
    return found


def test_the_widening_is_students():
    from scipy.stats import norm, t

    for sizes in ((2,), (3,), (4,), (12,), (12, 12), (40, 20), (500,)):
        n, free = sum(sizes), sum(sizes) - len(sizes)
        assert paired.widening(sizes) == pytest.approx(t.ppf(0.975, free) / norm.ppf(0.975) * math.sqrt(n / free), rel=2e-3)
    alone = paired.difference(np.array([1.0, 2.0]), np.array([2.0, 3.0]), np.ones(2), (1, 1))
    assert (alone.low, alone.high, alone.p) == (-math.inf, math.inf, 1.0), "one source per domain tells nothing of chance"


@pytest.mark.parametrize("sizes", [(12,), (12, 12)])
def test_equal_models_are_rarely_told_apart(sizes):
    """1,500 pairs with normal differences around 0: about 5 % verdicts. A plain percentile interval gave 7 to 9 %."""
    rng, n, false = np.random.default_rng(4), sum(sizes), 0
    for gap in rng.normal(size=(1500, n)):
        d = paired.difference(np.full(n, 9.0), 9.0 + gap, np.ones(n), sizes)
        false += not d.low <= 0 <= d.high
    assert 0.035 <= false / 1500 <= 0.065


def test_the_bootstrap_is_the_seven_steps_in_plain_loops():
    rng = np.random.default_rng(1)
    sizes = (4, 3)
    a, b, bottom = rng.uniform(1, 2, (3, 7))
    u, values, ratios = mulberry(7 * 1000, 0), [], []
    for r in range(1000):
        top_a = top_b = below = 0.0
        for j in range(7):
            start, size = (0, 4) if j < 4 else (4, 3)
            i = start + int(u[r * 7 + j] * size)
            top_a, top_b, below = top_a + a[i], top_b + b[i], below + bottom[i]
        values.append((top_b - top_a) / below)
        ratios.append(top_b / top_a)
    d = paired.difference(a, b, bottom, sizes)
    one, two, three = (sum_of(x) for x in (a, b, bottom))
    value, times, w = (two - one) / three, two / one, paired.widening(sizes)
    values, ratios = [value + w * (v - value) for v in values], [times + w * (v - times) for v in ratios]
    assert (d.low, d.high) == (sorted(values)[24], sorted(values)[975])  # to the last bit: another program must get the same
    assert (d.ratio_low, d.ratio_high) == (sorted(ratios)[24], sorted(ratios)[975])
    sides = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))
    assert d.p == min(1.0, 2 * (1 + sides) / 1001)
    assert d.value == pytest.approx((b.sum() - a.sum()) / bottom.sum()) and d.ratio == pytest.approx(b.sum() / a.sum())


def test_the_interval_is_that_of_another_bootstrap():
    """NumPy's generator instead of mulberry32, a plain bootstrap within domains: the ends lie within their noise."""
    rng = np.random.default_rng(2)
    a, b, bottom = rng.uniform(1, 2, (3, 60))
    b += 0.05
    d = paired.difference(a, b, bottom, (40, 20))
    index = np.concatenate([rng.integers(0, 40, (20_000, 40)), 40 + rng.integers(0, 20, (20_000, 20))], axis=1)
    values = (b - a)[index].sum(1) / bottom[index].sum(1)
    values = d.value + paired.widening((40, 20)) * (values - d.value)
    spread = values.std()
    assert d.low == pytest.approx(np.quantile(values, 0.025), abs=0.25 * spread)
    assert d.high == pytest.approx(np.quantile(values, 0.975), abs=0.25 * spread)
    with pytest.raises(ValueError, match="give one sum per source"):
        paired.difference(a, b, bottom, (40, 19))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        a = rng.normal(5, 1, 40)
        b = a + rng.normal(0.2, 0.5, 40)
        d = paired.difference(a, b, np.ones(40), (40,))
        held += d.low <= 0.2 <= d.high
    assert 0.90 <= held / 300 <= 0.985  # 95 % nominal; a percentile interval of 40 sources is a little narrow


def test_compare_counts_answers_and_sums_documents(sweep):
    c = tradeoff.compare(sweep, 0, 40, "em_arithmetic")
    keep = [d.domain == "arithmetic" for d in sweep.answers]
    one, two = sweep.doc_exact[0][keep], sweep.doc_exact[40][keep]
    assert (c.only_a, c.only_b) == ((one & ~two).sum(), (two & ~one).sum()) and c.n == sum(keep)
    assert c.p == paired.mcnemar(c.only_a, c.only_b) and c.difference == pytest.approx(two.mean() - one.mean())
    moe = np.flatnonzero(sweep["model"] == "edge-moe")
    for metric, held, scale in (("kld", sweep.doc_kld, 1.0), ("bits_per_byte_code", sweep.doc_nll, 1 / math.log(2))):
        i, j = int(moe[3]), int(moe[9])
        domains = METRICS[metric].domains
        keep = [d.domain in domains for d in sweep.text]
        below = sum(d.tokens if metric == "kld" else d.bytes for d in sweep.text if d.domain in domains)
        expected = [held[r][keep].astype(float).sum() * scale / below for r in (i, j)]
        c = tradeoff.compare(sweep, i, j, metric)
        assert (c.value_a, c.value_b) == pytest.approx(tuple(expected)) and c.difference == pytest.approx(expected[1] - expected[0])
        assert c.low <= c.difference <= c.high and c.n == len({(d.domain, d.source) for d in sweep.text if d.domain in domains})
        assert c.better == ("" if c.low <= 0 <= c.high else "b" if c.difference < 0 else "a")
    same = tradeoff.compare(sweep, 5, 5, "bits_per_byte")
    assert same.better == "" and same.p == 1.0 and "do not tell them apart" in same.said


def test_a_divergence_from_another_original_is_refused_and_a_students_is_not(sweep):
    moe, dense, phone = (int(np.flatnonzero(sweep["model"] == f"edge-{n}")[2]) for n in ("moe", "dense", "phone"))
    c = tradeoff.compare(sweep, moe, dense, "kld")
    assert not c.significant and c.better == "" and "A's is a distance from edge-moe, B's from edge-dense" in c.said
    assert "Use bits per byte" in c.said and tradeoff.compare(sweep, moe, dense, "bits_per_byte").refused == ""
    assert tradeoff.compare(sweep, moe, phone, "kld_prose").refused == ""
    with pytest.raises(KeyError, match="no row with id='nothing'"):
        tradeoff.compare(sweep, "nothing", 0)
    with pytest.raises(ValueError, match=r"metric='loss' is not known; use one of em_assistant"):
        tradeoff.compare(sweep, 0, 1, "loss")
    with pytest.raises(ValueError, match="picked_from=0"):
        tradeoff.compare(sweep, 0, 1, picked_from=0)


def test_a_winner_of_a_search_pays_for_it(sweep):
    worst = int(np.argmin(sweep["em_assistant"]))
    plain = tradeoff.compare(sweep, worst, 0)
    searched = tradeoff.compare(sweep, worst, 0, picked_from=1000)
    assert plain.curse == "" and plain.p == searched.p and searched.p_search == min(1, 1000 * plain.p)
    assert "picked from 1,000 by how it did" in searched.said and "it still holds" in searched.said  # all against nothing
    b = next(i for i in range(400) if 0.002 < tradeoff.compare(sweep, 0, i).p < 0.05)
    assert "no longer holds" in tradeoff.compare(sweep, 0, b, picked_from=100).said
    text = next(i for i in range(1, 400) if tradeoff.compare(sweep, 0, i, "bits_per_byte").significant)
    assert "too few to correct" in tradeoff.compare(sweep, 0, text, "bits_per_byte", picked_from=1000).said


@pytest.mark.parametrize("metric", METRICS)
def test_rivals_are_those_that_compare_cannot_tell_apart(sweep, metric):
    found = tradeoff.view(sweep, State(metric=metric))
    for row in (found.best, int(np.flatnonzero(found.rows)[30])):
        expected = [i for i in np.flatnonzero(found.rows) if i != row and not tradeoff.compare(sweep, row, int(i), metric).significant]
        assert tradeoff.rivals(sweep, row, found.rows, metric).tolist() == expected
    dense = sweep["model"] == "edge-dense"
    if METRICS[metric].kind == "kld":
        assert len(tradeoff.rivals(sweep, found.best, dense, metric)) == 0, "another reference is no rival"


def test_half_of_the_documents_flatter_their_winner():
    """Rows that are all equally good: the winner of one half leads there by luck, and by nothing on the other."""
    table = made_up(300, seed=5)
    meta = json.loads(table.schema.metadata[b"edgelab"])
    rng = np.random.default_rng(0)
    fair = pa.array([rng.random(100) < 0.8 for _ in range(300)], pa.list_(pa.bool_()))
    equal = Sweep.from_table(table.set_column(table.column_names.index("doc_exact"), "doc_exact", fair), meta)
    found = [tradeoff.halves(equal, np.ones(300, bool), seed=s) for s in range(10)]
    assert all(h.chosen_on > 0.9 for h in found) and abs(np.mean([h.other for h in found]) - 0.8) < 0.08
    with pytest.raises(ValueError, match="no answers to split"):
        tradeoff.halves(equal, np.ones(300, bool), "kld")
    with pytest.raises(ValueError, match="no rows to pick from"):
        tradeoff.halves(equal, np.zeros(300, bool))


# --------------------------------------------------------------------------------------------- filters, latency, budgets


def test_filters_keep_what_they_say(sweep):
    kept = tradeoff.select(sweep, {"bits": [4.0, 3.0], "model": "edge-moe"})
    assert (kept == ((sweep["model"] == "edge-moe") & np.isin(sweep["bits"], [3, 4]))).all() and 0 < kept.sum() < len(sweep)
    assert tradeoff.select(sweep).all() and not tradeoff.select(sweep, {"bits": []}).any()
    with pytest.raises(ValueError, match=r"bits=5 is in no row; the sweep has 2\.0, 3\.0"):
        tradeoff.select(sweep, {"bits": [5]})
    with pytest.raises(ValueError, match="filter 'colour' is not known; use one of model, method"):
        tradeoff.select(sweep, {"colour": ["red"]})


def test_latency_is_what_predict_says_of_each_shape(sweep):
    found = tradeoff.latency(sweep, "redmi-6a", context=256, engine="cpu")
    for i in (0, 17, 200):
        p = predict(device("redmi-6a"), tradeoff.shape_of(sweep["shape"][i]), context=256, engine="cpu").decode
        assert found.value[i] == pytest.approx(1e3 / p.value) and found.low[i] == pytest.approx(1e3 / p.high)
    assert found.provenance == "modelled" and tradeoff.latency(sweep, "redmi-6a", context=256, engine="cpu") is found
    assert (tradeoff.latency(sweep, "redmi-6a", context=1024, engine="cpu").value > found.value).all()
    assert all(np.isfinite(tradeoff.latency(sweep, d).value).any() or tradeoff.latency(sweep, d).missing for d in devices())
    assert tradeoff.prediction(sweep, 17, "redmi-6a").model == sweep["label"][17]
    with pytest.raises(ValueError, match="device='nokia' is not known"):
        tradeoff.latency(sweep, "nokia")
    with pytest.raises(ValueError, match=r"context=-1 must be a whole number"):
        tradeoff.latency(sweep, "redmi-6a", context=-1)
    with pytest.raises(ValueError, match="engine='abacus'"):
        tradeoff.latency(sweep, "redmi-6a", engine="abacus")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_best_within_budget_by_looking_at_every_row(data):
    n = data.draw(st.integers(0, 12))
    numbers = st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), min_size=n, max_size=n)
    size, late, cost = (np.array(data.draw(numbers), float) for _ in range(3))
    size = np.nan_to_num(size, nan=2.0)
    inside = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    order = {"quality": (cost, size, late), "size": (size, cost, late), "latency": (late, cost, size)}
    for objective, keys in order.items():
        rows = [i for i in range(n) if inside[i] and not math.isnan(keys[0][i])]
        by = lambda i, keys=keys: tuple(math.inf if math.isnan(k[i]) else k[i] for k in keys)  # noqa: E731
        assert tradeoff.best(size, late, cost, inside, objective) == (min(rows, key=by) if rows else None)


def test_a_view_holds_filters_budgets_and_fronts_together(sweep):
    state = State(
        metric="em_arithmetic", size_limit=3e6, latency_limit=0.25, quality_limit=0.5, filters={"model": ("edge-moe", "edge-phone")}
    )
    v = tradeoff.view(sweep, state)
    expected = (sweep["size_bytes"] <= 3e6) & (v.latency.value <= 0.25) & (sweep["em_arithmetic"] >= 0.5) & (sweep["model"] != "edge-dense")
    assert (v.inside == expected).all() and v.picked_from == expected.sum() > 0
    assert sweep["em_arithmetic"][v.best] == sweep["em_arithmetic"][expected].max()
    rows = np.flatnonzero(v.rows)
    points = np.column_stack([-sweep["em_arithmetic"], sweep["size_bytes"], v.latency.value])[rows]
    for front, axes in ((v.front, [0, 1, 2]), (v.front_size, [0, 1]), (v.front_latency, [0, 2])):
        assert front[rows].tolist() == [not d for d in dominated(points[:, axes])] and not front[~v.rows].any()
    nothing = tradeoff.view(sweep, State(size_limit=1.0))
    assert nothing.best is None and nothing.picked_from == 0


def test_a_view_of_divergences_keeps_one_reference(sweep):
    v = tradeoff.view(sweep, State(metric="kld"))
    assert not (v.rows & (sweep["model"] == "edge-dense")).any() and v.rows.sum() == (sweep["model"] != "edge-dense").sum()
    assert "their KL divergence is from edge-dense, not from edge-moe" in v.notes[0]
    alone = tradeoff.view(sweep, State(metric="kld", filters={"model": ("edge-dense",)}))
    assert alone.notes == () and alone.rows.sum() == (sweep["model"] == "edge-dense").sum()


def test_a_device_that_cannot_hold_a_model_gives_no_latency(sweep, monkeypatch):
    small = tradeoff.view(sweep, State(device="redmi-6a"))
    assert not np.isnan(small.latency.value).any()
    lacks = [d for d, p in devices().items() if p.dram_bytes_per_s is None]
    for name in lacks:
        v = tradeoff.view(sweep, State(device=name, latency_limit=1e9))
        assert v.picked_from == 0 and "have no latency" in v.notes[-1]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_find_what_their_titles_say(sweep, name):
    state = tradeoff.apply(sweep, name, State(context=64, filters={"model": ("edge-moe", "edge-phone")}))
    v, base = tradeoff.view(sweep, state), sweep.original("edge-moe")
    assert state.context == 64 and tradeoff.anchor(sweep, v.rows) == base and v.best is not None
    if name == "keep95":
        keep = v.rows & (sweep["em_assistant"] >= 0.95 * sweep["em_assistant"][base])
        assert sweep["size_bytes"][v.best] == sweep["size_bytes"][keep].min()
    if name == "lossless":
        assert sweep["kld"][v.best] <= 0.01 and sweep["size_bytes"][v.best] == sweep["size_bytes"][v.rows & (sweep["kld"] <= 0.01)].min()
    if name in ("phone-2gb", "quarter"):
        share = {"phone-2gb": 0.16, "quarter": 0.25}[name]
        assert sweep["size_bytes"][v.best] <= share * sweep["size_bytes"][base] and v.picked_from < v.rows.sum()
    if name == "fastest-phone":
        assert v.latency.value[v.best] == v.latency.value[v.inside].min() and state.device == "galaxy-s22"


def test_presets_without_an_original_say_so(table):
    meta = json.loads(table.schema.metadata[b"edgelab"])
    without = Sweep.from_table(table.filter(pa.compute.not_equal(table["method"], "fp")), meta)
    with pytest.raises(ValueError, match="'keep95' is relative to an original"):
        tradeoff.apply(without, "keep95", State())
    with pytest.raises(ValueError, match="preset='cheap' is not known; use one of keep95"):
        tradeoff.apply(without, "cheap", State())


def test_a_pin_remembers_what_it_was_picked_from(sweep):
    state = State(size_limit=float(np.median(sweep["size_bytes"])))
    v = tradeoff.view(sweep, state)
    front = next(int(i) for i in np.flatnonzero(v.front & v.inside) if i != v.best)
    far = int(np.flatnonzero(v.front & ~v.inside)[0])
    plain = int(np.flatnonzero(~(v.front | v.front_size | v.front_latency))[3])
    assert tradeoff.pinned(v, v.best) == tradeoff.pinned(v, front) == ("em_assistant", v.picked_from) and v.picked_from > 1
    assert tradeoff.pinned(v, far) == ("em_assistant", int(v.rows.sum())) and tradeoff.pinned(v, plain) == ("", 1)
    both = tradeoff.pin(sweep, state, pin_a=sweep["id"][plain], pin_b=sweep["id"][v.best])
    assert (both.from_a, both.from_b, both.searched) == (("", 1), ("em_assistant", v.picked_from), v.picked_from)
    assert State.from_json(both.to_json()) == both and State.from_json('{"pin_b": "x"}').searched == 1, "an old state opens"
    assert tradeoff.apply(sweep, "keep95", both).searched == v.picked_from, "a preset keeps the count"
    assert tradeoff.apply(sweep, "lossless", both).searched == 1, "picked by another metric"
    assert tradeoff.pin(sweep, both, pin_b="").from_b == ("", 1)
    with pytest.raises(ValueError, match="is no pin; use pin_a or pin_b"):
        tradeoff.pin(sweep, state, pin_c="x")
    with pytest.raises(ValueError, match=r"from_a=.* must be a metric and a whole number"):
        State(pin_a="x", from_a=("kld", 0))


def test_a_state_survives_json_and_refuses_nonsense():
    state = State(metric="kld", size_limit=2.5e6, filters={"bits": (4.0,), "model": ("edge-moe",)}, pin_a="abc")
    assert State.from_json(state.to_json()) == state and hash(state) == hash(State.from_json(state.to_json()))
    for bad, says in (({"metric": "x"}, "metric='x'"), ({"objective": "luck"}, "objective='luck'"), ({"size_limit": -1}, "size_limit=-1"),
                      ({"latency_limit": math.nan}, "latency_limit=nan"), ({"quality_limit": "all"}, "quality_limit='all'")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            State(**bad)
    with pytest.raises(ValueError, match="no field 'colour'"):
        State.from_json('{"colour": "red"}')


# --------------------------------------------------------------------------------------------------------------- quality


def test_stored_columns_are_the_sums_of_their_documents(sweep):
    for name in ("kld", "bits_per_byte"):
        tops, bottom, sizes = sums(sweep, METRICS[name])
        assert tops.sum(1) / bottom.sum() == pytest.approx(sweep[name], rel=1e-5) and sum(sizes) == tops.shape[1]
    q = quality(sweep, "kld_code")
    keep = [d.domain == "code" for d in sweep.text]
    below = sum(d.tokens for d in sweep.text if d.domain == "code")
    assert q.value == pytest.approx(sweep.doc_kld[:, keep].sum(1) / below, rel=1e-5)
    assert (q.low <= q.value + 1e-12).all() and (q.value <= q.high + 1e-12).all() and quality(sweep, "kld").low is sweep["kld_low"]
    both = quality(sweep, "kld_prose").value * sum(d.tokens for d in sweep.text if d.domain == "prose") + q.value * below
    assert both / sum(d.tokens for d in sweep.text) == pytest.approx(sweep["kld"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_sweep_is_read_whole(tmp_path, table):
    path = write(tmp_path / "s.parquet", 40, seed=1)
    s = Sweep.read(path)
    assert (
        len(s) == 40
        and s.path == str(path)
        and s.reference == {"edge-dense": "edge-dense", "edge-moe": "edge-moe", "edge-phone": "edge-moe"}
    )
    assert s.index(s["id"][7]) == 7 and s.row(7)["label"] == s["label"][7] and isinstance(s.row(7)["bits"], float)
    layers = s.layer(0)
    assert len(layers["name"]) == len(layers["bytes"]) == len(layers["error"]) > 3
    assert s.original("edge-moe") == 0 and s.original("none") is None
    assert "40 configurations" in repr(s) and "edge-moe" in s._repr_html_() and "measured at build" in s._repr_html_()
    with pytest.raises(ValueError, match="read-only"):
        s["size_bytes"][0] = 1
    with pytest.raises(KeyError, match="no column 'price'"):
        s["price"]


def test_what_is_no_sweep_is_told(tmp_path, table):
    with pytest.raises(FileNotFoundError, match="`edgelab sweep` measures one"):
        Sweep.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("no parquet", encoding="utf-8")
    with pytest.raises(ValueError, match="is no Parquet file of a sweep"):
        Sweep.read(tmp_path / "text.parquet")
    meta = json.loads(table.schema.metadata[b"edgelab"])
    for broken, other, says in (
        (table.drop_columns(["recipe", "shape"]), meta, "no column recipe, shape|no column shape, recipe"),
        (table.slice(0, 0), meta, "has no rows"),
        (table, meta | {"format": 9}, "has format=9, this version reads 1"),
        (table, meta | {"documents": meta["documents"][1:]}, "values a row for"),
        (pa.concat_tables([table, table.slice(3, 1)]), meta, "two rows with the same id"),
    ):
        with pytest.raises(ValueError, match=says):
            Sweep.from_table(broken, other)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="format=None"):
        Sweep.read(tmp_path / "bare.parquet")
