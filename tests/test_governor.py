"""The governor: no flapping on noise, every change explained by a rule that is checked again here, missing sensors, runtimes."""

import math
import os
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab import governor as g
from edgelab.governor import LAPTOP, PHONE, DeviceState, Governed, Governor, Memory, Policy, Setting, Threshold, decide, frugal, read_state

CALM = DeviceState(battery=0.9, plugged=False, temperature_c=30.0, load=0.0)
H = PHONE.hysteresis


def run(policy: Policy, states, step_s: float = 5.0) -> list[g.Decision]:
    governor = Governor(policy)
    return [governor.decide(s, step_s * i) for i, s in enumerate(states)]


# ------------------------------------------------------------------------------------------------------- what it decides


def test_the_articles_rules():
    """Below 20 % a low-power mode; hot: 2 threads and 500 ms; both: the most frugal of each."""
    normal = run(PHONE, [CALM])[0]
    assert normal.setting == PHONE.levels["normal"] and normal.levels == ("normal",) and not normal.changes
    low = run(PHONE, [replace(CALM, battery=0.199)])[0]
    assert low.levels == ("low-power",) and low.setting.precision == "int4"
    hot = run(PHONE, [replace(CALM, temperature_c=42.1)])[0]
    assert (hot.setting.threads, hot.setting.pause_ms, hot.setting.precision) == (2, 500, "int8")
    both = run(PHONE, [DeviceState(0.1, False, 50.0, 0.0)])[0]
    assert both.setting == Setting("int4", None, 2, 500, 1608) and both.levels == ("low-power", "hot")
    assert run(PHONE, [replace(CALM, battery=0.2, temperature_c=42.0)])[0].levels == ("normal",)  # at the threshold: not yet
    assert LAPTOP.thresholds[1].at == 85


def test_there_and_back_by_hand():
    """Discharge to 19 %, charge without a plug being told: starts below 20 %, ends at 25 %, not before 30 s."""
    battery = [0.21, 0.20, 0.19, 0.21, 0.249, 0.25, 0.26]
    decisions = run(PHONE, [replace(CALM, battery=b) for b in battery], step_s=20)
    assert [d.levels[0] for d in decisions] == ["normal", "normal", "low-power", "low-power", "low-power", "normal", "normal"]
    assert decisions[2].changes == ("low-power starts: battery 19 % is below 20 %",)
    assert decisions[3].reason == "low-power: battery 21 % is not back at 25 %"
    assert decisions[5].changes == ("low-power ends: battery 25 % is back at 25 %",)


def test_it_starts_at_once_and_ends_after_the_dwell():
    states = [replace(CALM, temperature_c=c) for c in (30, 43, 30, 30, 30)]
    decisions = run(PHONE, states, step_s=10)
    assert [d.levels[0] for d in decisions] == ["normal", "hot", "hot", "hot", "normal"]
    assert decisions[2].reason == "hot: temperature 30 °C, stays until 30 s are over"


def test_on_the_charger_the_battery_does_not_call():
    assert run(PHONE, [DeviceState(0.05, True, 30.0, 0.0)])[0].levels == ("normal",)
    decisions = run(PHONE, [DeviceState(0.05, plugged, 30.0, 0.0) for plugged in (False, True, True, True)], step_s=15)
    assert [d.levels[0] for d in decisions] == ["low-power", "low-power", "normal", "normal"]
    assert decisions[2].changes == ("low-power ends: on the charger",)


def test_a_missing_sensor_is_told_and_its_threshold_stays():
    nothing = run(PHONE, [DeviceState()])[0]
    assert nothing.setting == PHONE.levels["normal"]
    for what in ("battery is not known: low-power", "temperature is not known: hot", "load is not known: busy"):
        assert f"{what} can't be called for" in nothing.reason
    silent = run(PHONE, [replace(CALM, temperature_c=c) for c in (50, None, None, 50, 30)], step_s=100)
    assert [d.levels[0] for d in silent] == ["hot", "hot", "hot", "hot", "normal"]
    assert "temperature is not known: hot stays" in silent[1].reason and not silent[1].changes


def test_several_thresholds_on_one_reading():
    levels = {"normal": Setting(), "low": Setting(threads=2), "critical": Setting("int4", threads=1)}
    policy = Policy(levels, (Threshold("battery", "below", 0.2, "low"), Threshold("battery", "below", 0.05, "critical")), {"battery": 0.02})
    assert [d.setting.threads for d in run(policy, [replace(CALM, battery=b) for b in (0.5, 0.1, 0.04)])] == [4, 2, 1]
    assert policy.without("battery").thresholds == () and policy.without("load") == policy


# ------------------------------------------------------------------------------------------------------------ no flapping


@given(
    st.sampled_from(PHONE.thresholds),
    st.lists(st.floats(0, 1), min_size=2, max_size=60),
    st.floats(0, 1),
    st.sampled_from([1.0, 30.0, 1e4]),
)
def test_noise_narrower_than_the_hysteresis_changes_a_threshold_once_at_most(t, noise, place, step_s):
    """A signal that wanders within an interval of less than h, which holds the threshold: one start at most, and no end."""
    h = H[t.reading]
    width = 0.999 * h
    low = t.at - place * width
    states = [replace(CALM, **{t.reading: low + width * x}) for x in noise]
    decisions = run(PHONE, states, step_s)
    texts = [text for d in decisions for text in d.changes]
    assert len(texts) <= 1 and all("starts" in text for text in texts)
    crossed = any(t.holds(getattr(s, t.reading), False, 0) for s in states)
    assert len(texts) == crossed


state = st.builds(
    DeviceState,
    battery=st.one_of(st.none(), st.floats(0.1, 0.35)),
    plugged=st.one_of(st.none(), st.booleans()),
    temperature_c=st.one_of(st.none(), st.floats(34, 50)),
    load=st.one_of(st.none(), st.floats(0.3, 1)),
)
moves = st.lists(st.tuples(state, st.floats(0, 45)), min_size=1, max_size=60)


@given(moves)
def test_every_change_is_explained_by_a_rule_checked_again_here(steps):
    """A thermostat per threshold, written out without the code under test, gives the same levels at the same times."""
    memory, now, before = Memory.fresh(PHONE), 0.0, PHONE.levels["normal"]
    on = dict.fromkeys(PHONE.thresholds, False)
    started = dict.fromkeys(PHONE.thresholds, -math.inf)
    for s, wait in steps:
        now += wait
        memory, d = decide(PHONE, memory, s, now)
        expected = []
        for t in PHONE.thresholds:
            x, sign = getattr(s, t.reading), 1 if t.side == "above" else -1
            if x is None:
                continue
            calls = sign * x > sign * t.at and not (t.reading == "battery" and s.plugged)
            relaxed = sign * x <= sign * t.at - H[t.reading] or (t.reading == "battery" and s.plugged)
            if not on[t] and calls:
                on[t], started[t] = True, now
                expected.append(f"{t.level} starts")
            elif on[t] and relaxed and now - started[t] >= 30:
                on[t], started[t] = False, now
                expected.append(f"{t.level} ends")
        assert [text.split(":")[0] for text in d.changes] == expected
        assert d.levels == (tuple(t.level for t in PHONE.thresholds if on[t]) or ("normal",))
        assert d.setting == before or d.changes  # no change of the setting without a reason
        assert all(level in d.reason for level in d.levels)
        before = d.setting


@given(moves)
def test_a_threshold_starts_once_per_dwell_at_most(steps):
    memory, now, starts = Memory.fresh(PHONE), 0.0, {}
    for s, wait in steps:
        now += wait
        memory, d = decide(PHONE, memory, s, now)
        for text in d.changes:
            if "starts" in text:
                starts.setdefault(text.split()[0], []).append(now)
    assert all(b - a >= PHONE.min_dwell_s - 1e-9 for times in starts.values() for a, b in pairwise(times))


@given(moves)
def test_deciding_is_pure_and_more_danger_never_gives_more_power(steps):
    memory, now = Memory.fresh(PHONE), 0.0
    for s, wait in steps:
        now += wait
        after, d = decide(PHONE, memory, s, now)
        assert decide(PHONE, memory, s, now) == (after, d)
        hotter = replace(s, temperature_c=60.0)
        worse = decide(PHONE, memory, hotter, now)[1].setting
        if s.temperature_c is not None:
            assert worse.threads <= d.setting.threads and worse.pause_ms >= d.setting.pause_ms
        memory = after


setting = st.builds(
    Setting,
    st.sampled_from(sorted(g.BITS)),
    st.one_of(st.none(), st.integers(1, 8)),
    st.integers(1, 8),
    st.floats(0, 1000),
    st.one_of(st.none(), st.floats(100, 3000)),
)


@given(st.lists(setting, min_size=1, max_size=4))
def test_frugal_is_a_lattice(several):
    low = frugal(*several)
    assert frugal(low, *several) == frugal(*reversed(several)) or g.BITS[low.precision] == 16  # fp16 and bf16 are equals
    for s in several:
        assert g.BITS[low.precision] <= g.BITS[s.precision] and low.threads <= s.threads and low.pause_ms >= s.pause_ms
        assert s.experts is None or low.experts <= s.experts
        assert s.frequency_mhz is None or low.frequency_mhz <= s.frequency_mhz


# ---------------------------------------------------------------------------------------------------------------- sensors


def test_reading_this_machine():
    s = read_state(0.01)
    assert s.load is not None and 0 <= s.load <= 1
    assert Governor(LAPTOP).decide(s, 0.0).setting.threads >= 2


def test_reading_sensors(monkeypatch):
    battery = namedtuple("sbattery", "percent secsleft power_plugged")(55.0, 100, False)
    temperature = namedtuple("shwtemp", "label current high critical")
    found = {
        "acpitz": [temperature("", 90.0, None, None)],
        "coretemp": [temperature("a", 61.0, None, None), temperature("b", 64.0, None, None)],
    }
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    s = read_state(0.01)
    assert (s.battery, s.plugged, s.temperature_c) == (0.55, False, 64.0)
    found.clear()
    found["odd"] = [temperature("", 65261.8, None, None), temperature("", 40.0, None, None)]
    assert read_state(0.01).temperature_c == 40.0
    monkeypatch.delattr(psutil, "sensors_temperatures")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    s = read_state(0.01)
    assert (s.battery, s.plugged, s.temperature_c) == (None, None, None)


# --------------------------------------------------------------------------------------------------------------- runtimes


class Runtime:
    """Refuses what it can't do, as the real one: more threads than it was opened with, more experts than its model uses."""

    def __init__(self, threads: int = 64, experts: int | None = 4) -> None:
        self._most, self._experts = threads, experts
        self._threads, self._top_k, self.seen = threads, experts, []

    @property
    def threads(self):
        return self._threads

    @threads.setter
    def threads(self, n):
        if not 1 <= n <= self._most:
            raise ValueError(f"threads={n}")
        self._threads = n

    @property
    def top_k(self):
        return self._top_k

    @top_k.setter
    def top_k(self, k):
        if self._experts is None or not 1 <= (self._experts if k is None else k) <= self._experts:
            raise ValueError(f"top_k={k}")
        self._top_k = self._experts if k is None else k

    def generate(self, ids, **kwargs):
        self.seen.append((self.threads, self.top_k))
        if kwargs.get("fail"):
            raise RuntimeError("as asked")
        return list(ids)

    def stream(self, ids, max_new=8):
        for i in range(max_new):
            self.seen.append((self.threads, self.top_k))
            yield i


def decision(**kwargs) -> g.Decision:
    return g.Decision(Setting(**kwargs), "")


def test_apply_sets_the_runtime_and_chooses_by_precision():
    r8, r4 = Runtime(), Runtime()
    assert decision(threads=1, experts=1).apply(r8) is r8 and (r8.threads, r8.top_k) == (1, 1)
    assert decision(threads=10_000).apply(r8) is r8 and r8.threads == min(64, os.cpu_count()) and r8.top_k == 4
    assert decision(threads=10_000, experts=9).apply(Runtime(threads=1, experts=2)).threads == 1
    assert decision(experts=9).apply(Runtime(experts=2)).top_k == 2 and decision(experts=1).apply(Runtime(experts=None)).top_k is None
    both = {"int8": r8, "int4": r4}
    assert decision(precision="int8").apply(both) is r8 and decision(precision="int4").apply(both) is r4
    assert decision(precision="fp16").apply(both) is r8  # nothing finer is open
    assert decision(precision="int2").apply(both) is r4  # nothing coarser is
    with pytest.raises(ValueError, match="is empty"):
        decision().apply({})
    with pytest.raises(ValueError, match=r"unknown precisions \['eight'\]"):
        decision().apply({"eight": r8})


class World:
    """A clock that only sleeping moves, and a device whose battery falls with every reading."""

    def __init__(self, battery) -> None:
        self.now, self.slept, self.battery = 0.0, [], iter(battery)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def read(self):
        return replace(CALM, battery=next(self.battery), temperature_c=45.0)


def test_governed_pauses_and_switches():
    r8, r4 = Runtime(), Runtime()
    world = World([0.3, 0.3, 0.1])
    run = Governed({"int8": r8, "int4": r4}, Governor(PHONE), world.read, lambda: world.now, world.sleep)
    assert run.generate([1, 2]) == [1, 2] and world.slept == []  # the first waits for nothing
    world.now += 0.2
    with pytest.raises(RuntimeError, match="as asked"):
        run.generate([1], fail=True)
    assert world.slept == pytest.approx([0.3])
    run.generate([1])  # after an error the pause is kept, too
    assert world.slept == pytest.approx([0.3, 0.5])
    threads = min(2, os.cpu_count())
    assert r8.seen == [(threads, 4)] * 2 and r4.seen == [(threads, 4)]
    assert run.decision.levels == ("low-power", "hot")


def test_governed_streams_and_decides_between_tokens():
    policy = Policy({"normal": Setting(threads=2), "low": Setting(threads=1, experts=1)}, (Threshold("battery", "below", 0.2, "low"),))
    r = Runtime()
    world = World([0.3, 0.3, 0.1, 0.1, 0.1])
    run = Governed(r, Governor(policy), world.read, lambda: world.now, world.sleep)
    assert list(run.stream([1], every=2, max_new=8)) == list(range(8))
    assert [k for _, k in r.seen] == [4] * 4 + [1] * 4
    with pytest.raises(ValueError, match="every=0 must be 1"):
        next(run.stream([1], every=0))


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DeviceState(battery=55), "battery=55 is no share from 0 to 1; divide per cent by 100"),
        (lambda: DeviceState(load=math.nan), "load=nan is no share"),
        (lambda: DeviceState(temperature_c=math.nan), "temperature_c=nan is no temperature"),
        (lambda: Setting("int9"), "precision='int9' is not known; use one of"),
        (lambda: Setting(threads=0), "threads=0 must be 1 or more"),
        (lambda: Setting(pause_ms=math.nan), "pause_ms=nan must be 0 or more"),
        (lambda: Threshold("humidity", "below", 0, "low"), "reading='humidity' is not known"),
        (lambda: Threshold("battery", "under", 0, "low"), "side='under' is not known; use 'below' or 'above'"),
        (lambda: Policy({}), "levels is empty"),
        (
            lambda: Policy({"normal": Setting()}, (Threshold("battery", "below", 0.2, "low"),)),
            "level='low'; levels beside 'normal' are: none",
        ),
        (lambda: Policy({"a": Setting(), "b": Setting()}, (Threshold("load", "above", 1, "a"),)), "levels beside 'a' are: b"),
        (lambda: Policy({"a": Setting()}, (), {"battery": -1}), "give 0 or more"),
        (lambda: Policy({"a": Setting()}, min_dwell_s=-1), "min_dwell_s=-1"),
        (lambda: decide(PHONE, replace(Memory.fresh(PHONE), last=9.0), CALM, 8.0), "now=8.0 is before the last decision at 9.0"),
    ],
)
def test_errors(make, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        make()


def test_it_shows_itself():
    html = run(PHONE, [replace(CALM, battery=0.1)])[0]._repr_html_()
    assert "int4" in html and "battery 10 % is below 20 %" in html
    assert str(Setting("int4", 1, 1, 500, 1200)) == "int4, 1 thread, 1 expert, 500 ms pause, 1200 MHz"
