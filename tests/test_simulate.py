"""The simulated phone: by hand, energy and heat conserved, steps that converge, the settled state against the way there."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab import governor_plots as plots
from edgelab import simulate as sim
from edgelab.governor import PHONE, DeviceState, Governor, Policy, Setting, Threshold
from edgelab.simulate import OLMOE, Device, Network, Point, Work, Workload, compare, cost, dvfs, gain, sensitivity, simulate, steady
from edgelab.svg import to_svg

NORMAL, LOW = Setting("int8"), Setting("int8", frequency_mhz=1200)
SMALL = Device(capacity_wh=1.0)
CLOSED = Workload(64, None)
FIXED = Policy({"normal": NORMAL, "low": LOW}, (Threshold("battery", "below", 0.2, "low"),), {"battery": 0.05})


def same(a: sim.Trace, b: sim.Trace) -> bool:
    arrays = ("time_s", "battery", "chip_c", "power_w", "tokens", "latency_s", "finished_s")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays) and a.changes == b.changes


# -------------------------------------------------------------------------------------------------------------- one token


def test_a_token_by_hand():
    """int8, two of eight experts, 2 threads, 1608 MHz at 0.7625 V, with the arithmetic written out."""
    d = Device(overlap=0.25)
    weights = 371_458_048 + 2 * 100_663_296  # attention 268,435,456, head 103,022,592
    assert OLMOE.active(2) == weights
    c = cost(d, OLMOE.work(Setting("int8", experts=2)), Setting("int8", experts=2, threads=2, frequency_mhz=1500))
    arithmetic = 2 * weights / (2 * 1.608e9 * 16)
    memory = weights * 8.5 / 8 / 20e9
    assert memory > 0.7 * arithmetic
    t = max(arithmetic, memory) + 0.75 * min(arithmetic, memory)
    watts = 2 * 416e-6 * 0.7625**2 * 1608
    joules = watts * (arithmetic + 0.5 * (t - arithmetic)) + 64e-12 * weights * 8.5 / 8
    assert (c.seconds, c.joules, c.volts, c.cores) == (pytest.approx(t), pytest.approx(joules), 0.7625, 2)


def test_the_largest_point_is_a_watt_a_core():
    """The kernel's coefficient at the fastest point: 416 microwatts x 2400 MHz x 1 V^2."""
    d = Device()
    c = cost(d, Work(1e12), Setting(threads=1))
    assert c.joules / c.seconds == pytest.approx(0.9984)


@given(st.integers(1, 4), st.sampled_from([1200, 1608, 2016, 2400]), st.sampled_from(["int4", "int8"]), st.integers(1, 8))
def test_more_of_anything_never_slows_and_less_work_never_costs_more(threads, mhz, precision, experts):
    d, s = Device(), Setting(precision, experts, threads, 0.0, mhz)
    c = cost(d, OLMOE.work(s), s)
    for faster in (replace(s, threads=threads + 1), replace(s, frequency_mhz=mhz + 200)):
        assert cost(d, OLMOE.work(faster), faster).seconds <= c.seconds * (1 + 1e-12)
    fewer = replace(s, experts=max(1, experts - 1))
    assert cost(d, OLMOE.work(fewer), fewer).joules <= c.joules
    assert cost(d, OLMOE.work(replace(s, precision="int2")), s).joules < c.joules


def test_leakage_is_the_cubic_and_grows_with_heat_and_voltage():
    d = Device()
    g = np.polynomial.Polynomial([32000, 4700, -80, 2])
    for t in (0.0, 25.0, 70.0, 100.0):
        assert d.leakage(0.9, t) == pytest.approx(0.1 * 0.9**3 * g(t) / g(55))
    assert d.leakage(1, 60) < d.leakage(1, 61) < d.leakage(1.01, 61) and d.leakage(1, 500) == d.leakage(1, 125)


# -------------------------------------------------------------------------------------------------------------- in time


@pytest.mark.parametrize("workload", [CLOSED, Workload(64, 3), Workload(16, 20, poisson=True)])
@pytest.mark.parametrize("policy", [PHONE, LOW])
def test_energy_and_heat_are_conserved(policy, workload):
    """What leaves the battery is the integral of power; it becomes heat, which is in the phone or went into the air."""
    t = simulate(policy, SMALL, workload, battery=0.8, step_s=0.5)
    assert t.empty and t.battery[-1] == 0
    assert t.joules == pytest.approx(0.8 * 3600, rel=1e-12)
    drop = -np.diff(t.battery, prepend=0.8) * 3600
    assert np.allclose(drop, t.power_w * np.diff(t.time_s, prepend=0.0), rtol=1e-9, atol=1e-9)
    case = np.concatenate([[25.0], t.case_c])
    lost = np.trapezoid(case - 25, np.concatenate([[0.0], t.time_s])) / SMALL.case_k_per_w
    kept = SMALL.chip_j_per_k * (t.chip_c[-1] - 25) + SMALL.case_j_per_k * (t.case_c[-1] - 25)
    assert lost + kept == pytest.approx(0.8 * 3600, rel=2e-3)


def test_every_request_is_accounted_for():
    w = Workload(32, 6)
    t = simulate(Setting("int4", pause_ms=500), SMALL, w, hours=0.1)
    asked = t.finished_s - t.latency_s
    assert np.allclose(asked, 10 * np.arange(len(asked))) and (len(asked), t.waiting) == (36, 1)  # the last comes as time is up
    seconds = 32 * cost(SMALL, OLMOE.work(Setting("int4")), Setting("int4")).seconds
    assert np.allclose(t.latency_s, seconds)
    assert t.tokens[-1] == pytest.approx(32 * len(asked), abs=32)
    assert t.busy.sum() * 1.0 == pytest.approx(seconds * t.tokens[-1] / 32)


def test_one_after_the_other_with_a_pause():
    s = Setting("int4", pause_ms=500)
    t = simulate(s, SMALL, Workload(20, None), hours=0.05)
    seconds = 20 * cost(SMALL, OLMOE.work(s), s).seconds
    assert t.latency_s[0] == pytest.approx(seconds) and np.allclose(t.latency_s[1:], seconds + 0.5)
    assert np.allclose(np.diff(t.finished_s), seconds + 0.5)


def test_more_requests_than_it_can_answer_wait():
    t = simulate(NORMAL, SMALL, Workload(64, 30), hours=0.1)  # 4 s of work every 2 s
    assert 88 <= t.waiting <= 92 and (t.busy > 0.999).all() and (np.diff(t.latency_s) > 1.9).all()


def test_steps_converge():
    """Halving the step halves the error at least: hours, and the temperature half way."""
    hours, warm = [], []
    for step in (4.0, 2.0, 1.0, 0.25):
        t = simulate(NORMAL, SMALL, CLOSED, step_s=step)
        hours.append(t.hours)
        warm.append(float(np.interp(300, t.time_s, t.chip_c)))
    for values in (hours, warm):
        errors = [abs(v - values[-1]) for v in values[:-1]]
        assert errors[0] < 5e-3 * values[-1]
        assert errors[0] > 1.7 * errors[1] > 2.8 * errors[2] > 0


def test_it_settles_where_the_closed_form_says():
    """Two programs for one state: stepping for hours, and a fixed point."""
    for workload, setting in ((CLOSED, NORMAL), (Workload(64, 8), LOW), (CLOSED, Setting("int4", threads=2, pause_ms=500))):
        t = simulate(setting, Device(capacity_wh=100.0), workload, hours=4)
        s = steady(Device(), workload, setting)
        late = slice(-3600, None)
        assert t.power_w[late].mean() == pytest.approx(s.power_w, rel=3e-3)
        assert t.busy[late].mean() == pytest.approx(s.busy, rel=3e-3)
        assert t.case_c[late].mean() == pytest.approx(s.case_c, abs=0.1)
        assert t.chip_c[late].mean() == pytest.approx(s.chip_c, abs=0.2)
        assert np.median(t.latency_s[-20:]) == pytest.approx(s.latency_s)
        assert (t.tokens[-1] - t.tokens[-3601]) / 3600 == pytest.approx(s.tokens_per_s, rel=5e-3)


def test_heat_by_hand():
    """No work: the case alone, one exponential towards P R2 once the chip has followed."""
    d = Device(static_w=2.0, sleep_w=0.0, leak_w=0.0, chip_j_per_k=1e-3)
    t = simulate(NORMAL, d, Workload(1, 1e-6), hours=0.5)
    after = t.time_s[600:]
    assert np.allclose(t.case_c[600:], 25 + 8 * (1 - np.exp(-after / 600)), atol=2e-2)


def test_same_seed_same_trace():
    w = Workload(32, 5, poisson=True)
    a, b, c = (simulate(PHONE, SMALL, w, hours=2, seed=s) for s in (1, 1, 2))
    assert same(a, b) and not same(a, c)


def test_ten_hours_are_quick():
    """Thousands of times faster than what it simulates, on any machine that runs the tests (here: 0.1 to 0.3 s for 10 hours)."""
    began = time.process_time()
    t = simulate(PHONE, Device(capacity_wh=40.0), Workload(64, 2), hours=10)
    assert t.hours == 10 and time.process_time() - began < 36000 / 2000


def test_the_governor_inside_decides_as_one_outside():
    t = simulate(PHONE, Device(), CLOSED, hours=12)
    governor, settings = Governor(PHONE), []
    battery, case = np.concatenate([[1.0], t.battery]), np.concatenate([[25.0], t.case_c])
    for i in range(len(t.time_s)):
        if i % 5 == 0:
            setting = governor.decide(DeviceState(battery[i], False, case[i]), float(i)).setting
        settings.append(setting)
    assert [t.settings[i] for i in t.which] == settings
    assert {level for _, _, level in t.bands()} >= {"normal", "hot", "low-power"}
    assert t.bands()[0][0] == 0 and t.bands()[-1][1] == t.time_s[-1]
    assert all(a[1] == b[0] for a, b in pairwise(t.bands()))
    assert any("low-power starts: battery" in text for _, text in t.changes)


def test_levels_with_one_setting_are_told_apart():
    """Hot and busy asks for no more than hot does; the bands say which it was."""
    t = simulate(PHONE, Device(ambient_c=30), CLOSED, hours=1, load=0.9)
    assert [level for _, _, level in t.bands()] == ["busy", "hot and busy"]
    assert t.settings[1] == PHONE.levels["hot"]


def test_when_hot_two_threads_and_half_a_second_cool_it():
    """A15 by simulation: the case stays cooler than without the policy, and below where it would settle."""
    d = Device(ambient_c=28.0)
    calm = simulate(PHONE.without("battery"), d, CLOSED, hours=3)
    wild = simulate(NORMAL, d, CLOSED, hours=3)
    assert wild.case_c.max() > 46 and calm.case_c.max() < wild.case_c.max() - 2
    assert calm.latency_s[-1] > wild.latency_s[-1] + 0.499


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_gain_is_the_ratio_of_powers():
    g = gain(Device(), Workload(), NORMAL, LOW)
    a, b = (steady(Device(), Workload(), s) for s in (NORMAL, LOW))
    assert g.hours == pytest.approx(100 * (a.power_w / b.power_w - 1)) and g.tokens == pytest.approx(g.hours)
    slow = gain(Device(), CLOSED, NORMAL, Setting("int8", threads=1, frequency_mhz=1200))
    assert slow.tokens < slow.hours  # slower answers: more hours, but fewer of them answered


def test_simulating_both_agrees_with_the_settled_gain():
    small = Device()
    g, a, b = compare(FIXED.without("battery"), FIXED, small, Workload(), battery=0.2)
    settled = gain(small, Workload(), NORMAL, LOW)
    assert g.latency == pytest.approx(settled.latency, abs=0.2) and g.hours == pytest.approx(settled.hours, rel=0.05)
    assert a.empty and b.empty and a.bands()[0][2] == "normal"
    assert b.bands()[-1][2] == "low"


def test_static_power_eats_the_gain():
    rows = sensitivity(Device(), Workload(), NORMAL, LOW, static_w=(0.0, 0.3, 1.0, 3.0), draws=60)
    assert [r.static_w for r in rows] == [0.0, 0.3, 1.0, 3.0] and all(r.n > 50 for r in rows)
    assert all(a.hours > b.hours > 0 for a, b in pairwise(rows))
    assert all(r.low[i] <= v <= r.high[i] for r in rows for i, v in enumerate((r.latency, r.hours, r.tokens)))
    again = sensitivity(Device(), Workload(), NORMAL, LOW, static_w=(1.0,), draws=60)
    assert again[0] == rows[2] and sensitivity(Device(), Workload(), NORMAL, LOW, static_w=(1.0,), draws=60, seed=1)[0] != rows[2]


def test_the_static_power_of_a_claim():
    watts = sim.static_for(40, Device(), Workload(), NORMAL, LOW)
    assert 0.2 < watts < 3
    assert gain(Device(static_w=watts), Workload(), NORMAL, LOW).hours == pytest.approx(40, abs=1e-4)
    assert sim.static_for(40, Device(), Workload(), NORMAL, NORMAL) is None


def test_a_claim_of_two_numbers_has_to_hold_at_once():
    args = (Device(), Workload(), NORMAL, LOW)
    shares = [sim.claim_share(latency, 40, *args, draws=80) for latency in (-50, 5, 15, 1e3)]
    assert shares[0] == 0 and shares == sorted(shares) and 0.2 < shares[-1] < 0.9
    assert sim.claim_share(1e3, -99, *args, draws=10) == 1
    more = sim.claim_share(15, 40, Device(static_w=0.1), *args[1:], draws=80)
    assert more > shares[2] > sim.claim_share(15, 40, Device(static_w=3.0), *args[1:], draws=80)
    # counted again, draw by draw, from the gains themselves
    drawn = sim._draw(*args[:2], args[2:], OLMOE, (0.05, 0.95), sim.UNKNOWN, 80, 0)
    gains = [gain(d, load, NORMAL, LOW) for d, load in drawn]
    assert shares[2] == np.mean([g.latency <= 15 and g.hours >= 40 for g in gains])


def test_rows_say_that_they_are_modelled():
    rows = sim.report("low", sensitivity(Device(), Workload(), NORMAL, LOW, static_w=(0.0, 1.0), draws=20))
    assert {r.provenance for r in rows} == {"modelled"} and len(rows) == 6
    row = rows.get(metric="endurance_gained", slice="static power 1 W")
    assert row.low < row.value < row.high and row.unit == "%"
    one = sim.report("low", [gain(Device(), Workload(), NORMAL, LOW)], None)
    assert one.get(metric="latency_added").low is None


def test_claims_in_per_cent_per_ten_minutes():
    t = simulate(LOW, Device(), Workload(64, 4), hours=1)
    watts = t.joules / 3600
    assert t.percent_per_10_min == pytest.approx(100 * watts / 6 / 18.65)
    assert "per 10 minutes" in t._repr_html_() and repr(t).startswith("Trace (modelled): hours 1.00; mean power")


# ----------------------------------------------------------------------------------------------------------------- DVFS


def naive_point(d: Device, seconds: float, period: float, mhz: float, volts: float) -> tuple[float, float]:
    """Millijoules per period of pure arithmetic on one core, waking and sleeping, added up piece by piece."""
    run = 416e-6 * volts**2 * mhz
    leak = d.leakage(volts, 45.0)
    awake = (run + leak) * seconds + (0.1 * run + leak) * (period - seconds)
    asleep = (run + leak) * (seconds + 220e-6) + 0.01 * (period - seconds - 220e-6)
    return 1e3 * awake / period, 1e3 * asleep / period


def test_dvfs_by_hand():
    d = Device()
    work = Work(2.1e-3 * 2400e6 * 16)  # 2.1 ms at the top
    points = dvfs(d, work, 20e-3)
    assert [p.mhz for p in points] == [mhz for mhz, _ in d.opps]
    for p, (mhz, volts) in zip(points, d.opps, strict=True):
        assert p.latency_ms == pytest.approx(2.1 * 2400 / mhz)
        assert (p.awake_mw, p.sleep_mw) == pytest.approx(naive_point(d, p.latency_ms / 1e3, 20e-3, mhz, volts))


def test_frequencies_that_are_too_slow_are_left_out_and_short_gaps_not_slept():
    work = sim.work_of(Device(), 2.1e-3)
    points = dvfs(Device(), work, 2.9e-3)
    assert [p.mhz for p in points] == [1800, 2016, 2208, 2400] and not any(p.sleeps for p in points)
    assert all(p.sleep_mw == p.awake_mw for p in points)
    with pytest.raises(ValueError, match="takes longer at every frequency"):
        dvfs(Device(), work, 2e-3)


def test_which_is_better_depends_on_what_is_on_while_busy():
    """Slow and steady wins by C V^2; give each busy second a price and racing to idle wins."""
    work = sim.work_of(Device(), 2.1e-3)

    def best(d: Device) -> Point:
        return min(dvfs(d, work, 0.1), key=lambda p: p.sleep_mw)

    assert best(Device()).mhz == 1200
    flat = Device(opps=tuple((mhz, 1.0) for mhz, _ in Device().opps), leak_w=1.0)  # no voltage to save, all of it leaks
    assert best(flat).mhz == 2400


def test_scaling_is_an_interval_around_what_one_point_says():
    s = sim.scaling(Device(), draws=60)
    assert s.low[0] < s.power < s.high[0] < 0 and 0 <= s.low[1] <= s.latency <= s.high[1] <= 100 * (2400 / 1200 - 1) + 1e-9
    assert s == sim.scaling(Device(), draws=60) != sim.scaling(Device(), draws=60, seed=1) and s.n == 60
    known = sim.scaling(Device(), memory=(0, 0), busy=(0.21, 0.21), unknown={}, draws=3)  # 4.2 ms in 20 ms
    points = dvfs(Device(), sim.work_of(Device(), 2.1e-3), 20e-3)
    assert known.power == pytest.approx(100 * (points[0].sleep_mw / points[-1].awake_mw - 1)) and known.latency == pytest.approx(100)
    flat = Device(opps=tuple((mhz, 1.0) for mhz, _ in Device().opps), leak_w=1.0)
    assert sim.scaling(flat, memory=(0, 0), unknown={}, draws=5).raced == 1 and known.raced == 0


@given(st.floats(1e-4, 1.0), st.floats(0, 1), st.floats(0, 1))
def test_work_of_takes_what_it_says(seconds, memory, overlap):
    d = Device(overlap=overlap)
    assert cost(d, sim.work_of(d, seconds, memory), Setting(threads=1)).seconds == pytest.approx(seconds)


# -------------------------------------------------------------------------------------------------------------- figures


def lines(fig) -> dict[str, tuple]:
    return {t.name: t for t in fig.data}


def test_the_discharge_is_drawn_as_it_was():
    t = simulate(PHONE, Device(), CLOSED, hours=12)
    fig = plots.over_time(t)
    drawn = lines(fig)
    assert set(drawn) == {"battery, %", "case, °C", "chip, °C"} | {level for _, _, level in t.bands()}
    battery = drawn["battery, %"]
    assert np.allclose(battery.y, 100 * np.interp(battery.x, t.time_s / 3600, t.battery), atol=0.01) and len(battery.x) <= 240
    spans = [(x0, x1) for name in drawn if name in t.levels for x0, x1 in zip(drawn[name].x[::3], drawn[name].x[1::3], strict=True)]
    assert sorted(spans) == [(a / 3600, b / 3600) for a, b, _ in t.bands()]
    table = plots.table_over_time(t)
    assert [r["level"] for r in table] == [b[2] for b in t.bands()] and table[1]["latency, s, median (modelled)"] == "4.50"
    watts = [float(r["mean power, W (modelled)"]) for r in table]
    joules = sum(w * (b - a) for w, (a, b, _) in zip(watts, t.bands(), strict=True))
    assert joules == pytest.approx(t.joules, rel=2e-3)
    said = plots.say_over_time(t)
    assert said.startswith(f"Modelled: the battery is empty after {int(t.hours)}:") and f"{t.percent_per_10_min:.2f} %" in said
    assert "of the battery are left" in plots.say_over_time(simulate(NORMAL, Device(), CLOSED, hours=0.1))
    assert "<svg" in to_svg(fig, describe=said)


def test_the_gains_are_drawn_with_their_intervals():
    gains = {str(s): sensitivity(Device(), Workload(), NORMAL, s, static_w=(0.1, 1.0), draws=20) for s in (LOW, Setting("int4"))}
    fig = plots.endurance(gains, claim=40)
    line, rows = fig.data[0], gains[str(LOW)]
    assert list(line.y) == [g.hours for g in rows] and fig.data[-1].y == (40, 40)
    assert [y + e for y, e in zip(line.y, line.error_y.array, strict=True)] == pytest.approx([g.high[1] for g in rows])
    assert [y - e for y, e in zip(line.y, line.error_y.arrayminus, strict=True)] == pytest.approx([g.low[1] for g in rows])
    said = plots.say_endurance(gains, claim=1000)
    assert said.count("lies in no interval") == 2 and f"{rows[0].hours:+.0f} %" in said
    assert "lies within the interval at 0.1, 1 W" in plots.say_endurance({"x": rows}, claim=(rows[0].low[1] + rows[1].high[1]) / 2)
    table = plots.table_endurance(gains)
    assert len(table) == 4 and table[0]["hours (modelled)"].startswith(f"{rows[0].hours:+.0f} % [{rows[0].low[1]:+.0f}")
    assert "<svg" in to_svg(fig, describe=said)


def test_the_frontier_says_who_wins():
    work = sim.work_of(Device(), 2.1e-3)
    flat = Device(opps=tuple((mhz, 1.0) for mhz, _ in Device().opps), leak_w=1.0)
    points = {"phone": dvfs(Device(), work, 20e-3), "leaky": dvfs(flat, work, 20e-3), "tight": dvfs(Device(), work, 2.2e-3)}
    fig = plots.frontier(points)
    assert lines(fig)["phone, asleep between"].y == tuple(p.sleep_mw for p in points["phone"]) and len(fig.data) == 6
    phone, leaky, tight = plots.say_frontier(points).removeprefix("Modelled. ").split(". ")
    assert "slow and steady wins" in phone and "least at 1200 MHz" in phone
    assert "racing to idle wins" in leaky and "too short to sleep" in tight
    assert {r["asleep between, mW (modelled)"] for r in plots.table_frontier({"tight": points["tight"]})} == {"no time to sleep"}
    assert "<svg" in to_svg(fig)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Device(capacity_wh=0), "capacity_wh=0 must be more than 0"),
        (lambda: Device(static_w=-1), "static_w=-1 must be 0 or more"),
        (lambda: Device(stall=1.5), "stall=1.5 is no share"),
        (lambda: Device(opps=((2000, 1.0), (1000, 0.8))), "from the slowest to the fastest"),
        (lambda: Workload(0), "tokens=0 must be 1 or more"),
        (lambda: Workload(1, 0), "per_minute=0 must be more than 0"),
        (lambda: simulate(NORMAL, SMALL, CLOSED, battery=80), "battery=80 is no share"),
        (lambda: simulate(NORMAL, SMALL, CLOSED, sensor="skin"), "sensor='skin' is not known"),
        (lambda: simulate(NORMAL, SMALL, CLOSED, step_s=10), "decide_s at least step_s"),
        (lambda: steady(Device(), Workload(64, 60), NORMAL), "per_minute=60: int8, 4 threads takes 4 s"),
        (lambda: steady(Device(static_w=25), CLOSED, NORMAL), "throttles before 110"),
        (lambda: sensitivity(Device(), CLOSED, NORMAL, LOW, static_w=(40.0,), draws=3), "overheats in each of 3 draws"),
        (lambda: sensitivity(Device(), CLOSED, NORMAL, LOW, draws=0), "draws=0"),
        (lambda: compare(NORMAL, LOW, Device(), CLOSED, hours=0.5), "was not empty after 0.5 hours"),
        (lambda: sim.static_for(0, Device(), CLOSED, NORMAL, LOW), "hours=0 per cent"),
        (lambda: sim.work_of(Device(), 1e-3, 2.0), "memory=2.0 is no share"),
        (lambda: sim.saved_against(0, 1), "must be more than 0"),
        (lambda: sim.power_by_duty(210, 89, 62, 300), "static_mw=300 is a part"),
    ],
)
def test_errors(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@settings(deadline=None, max_examples=25)
@given(
    threads=st.integers(1, 4),
    pause=st.sampled_from([0, 100, 500]),
    minute=st.one_of(st.none(), st.floats(0.5, 60)),
    static=st.floats(0, 3),
    step=st.sampled_from([0.5, 1.0, 2.5]),
)
def test_whatever_the_numbers_the_books_balance(threads, pause, minute, static, step):
    s = Setting("int8", threads=threads, pause_ms=pause)
    t = simulate(s, Device(static_w=static, capacity_wh=0.05), Workload(48, minute), step_s=step, hours=0.4)
    assert t.joules == pytest.approx(3600 * 0.05 * (1 - t.battery[-1]))
    assert (np.diff(t.battery, prepend=1.0) < 0).all() and (t.busy <= 1 + 1e-9).all() and (t.busy >= 0).all()
    seconds = cost(Device(), OLMOE.work(s), s).seconds
    # the last step's tokens are shared out evenly, hence + step / seconds
    assert (t.latency_s >= 48 * seconds - 1e-6).all() and len(t.latency_s) * 48 <= t.tokens[-1] + step / seconds
    assert (t.finished_s <= t.time_s[-1]).all() and t.chip_c.max() < 125 and min(t.chip_c.min(), t.case_c.min()) >= 25


def test_numbers_of_a_profile():
    class Profile:
        name, battery_wh, dram_bytes_per_s = "board", None, None

    with pytest.raises(ValueError, match=r"board has no battery in its profile; give capacity_wh=\.\.\."):
        Device.like(Profile)
    assert Device.like(Profile, capacity_wh=3.0) == Device(capacity_wh=3.0)


def test_a_dense_model_has_no_experts_to_drop():
    dense = Network("dense", 1e9)
    assert dense.work(Setting("int4", experts=1)) == dense.work(Setting("int4"))
