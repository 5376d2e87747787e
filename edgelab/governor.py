"""The governor: battery, temperature and load in; precision, experts, threads, pause and frequency out, with hysteresis.

A `Policy` is a normal level, other levels, and thresholds that call for them. Several may hold at once (low battery *and* hot);
the setting is then, field by field, the most frugal one that is called for: fewest bits, experts, threads and MHz, longest pause.

A threshold "battery below a" with hysteresis h has memory, as a thermostat has:

    it starts when x < a,  it ends when x >= a + h  and it has held for `min_dwell_s`

("above": x > a, x <= a - h.) It starts at once, because a hot device can't wait, and ends late. Two things follow, and the tests
hold them: a signal whose noise spans less than h changes each threshold once at most, however long it hovers there; and
whatever the signal does, a threshold starts at most once per `min_dwell_s`.

What a sensor does not say is None. A threshold whose reading is missing stays as it was, and the decision's reason says so: a
device without a battery never saves it, and one whose thermometer fell silent while it was hot stays careful. On the
charger the battery's thresholds don't call.

The thresholds of `PHONE` are those that articles on phones name: below 20 % battery a low-power mode; hot, 2 threads and 500 ms
between inferences. What they gain is another question: `edgelab.simulate`.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edgelab import html_table

BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int3": 3, "int2": 2}  # precisions, to know the more frugal of two
READINGS = ("battery", "temperature_c", "load")
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "soc-thermal")  # psutil's names on Linux


@dataclass(frozen=True)
class DeviceState:
    """What the sensors say; None is no sensor. `battery` and `load` are shares 0..1; `load` is that of *other* processes."""

    battery: float | None = None
    plugged: bool | None = None
    temperature_c: float | None = None
    load: float | None = None

    def __post_init__(self) -> None:
        for name in ("battery", "load"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is no share from 0 to 1; divide per cent by 100, or give None where there is no sensor")
        if self.temperature_c is not None and not -60 <= self.temperature_c <= 200:  # NaN too
            raise ValueError(f"temperature_c={self.temperature_c} is no temperature of a device in degrees Celsius; None: no sensor")


def read_state(interval_s: float = 0.1) -> DeviceState:
    """The state of this machine, by psutil. Takes `interval_s`, over which the load of other processes is measured.

    The temperature is the highest of the processor's sensors (of all sensors where none bears a processor's name). Laptops
    report the chip, phones mostly the battery or the case: thresholds belong to one or the other.
    """
    import psutil

    own, cores = psutil.Process(), psutil.cpu_count() or 1
    own.cpu_percent()
    total = psutil.cpu_percent(interval_s) / 100
    load = min(1.0, max(0.0, total - own.cpu_percent() / 100 / cores))
    battery = getattr(psutil, "sensors_battery", lambda: None)()
    sensors = getattr(psutil, "sensors_temperatures", dict)() or {}
    heard = [t.current for name in CPU_SENSORS for t in sensors.get(name, ())] or [t.current for s in sensors.values() for t in s]
    heard = [t for t in heard if t is not None and -60 <= t <= 200]  # some drivers say 65261.8 where nothing is connected
    return DeviceState(
        battery=None if battery is None else min(1.0, max(0.0, battery.percent / 100)),
        plugged=None if battery is None else battery.power_plugged,
        temperature_c=max(heard, default=None),
        load=load,
    )


@dataclass(frozen=True)
class Setting:
    """How to run: `experts` per token (None: the model's own), `pause_ms` between inferences, `frequency_mhz` (None: the system's)."""

    precision: str = "int8"
    experts: int | None = None
    threads: int = 4
    pause_ms: float = 0.0
    frequency_mhz: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in BITS:
            raise ValueError(f"precision={self.precision!r} is not known; use one of {', '.join(BITS)}")
        for name, least in (("experts", 1), ("threads", 1), ("pause_ms", 0), ("frequency_mhz", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}={value} must be {least} or more")

    def __str__(self) -> str:
        parts = [self.precision, f"{self.threads} thread{'s' * (self.threads > 1)}"]
        parts += [f"{self.experts} expert{'s' * (self.experts > 1)}"] if self.experts is not None else []
        parts += [f"{self.pause_ms:g} ms pause"] if self.pause_ms else []
        return ", ".join([*parts, *([f"{self.frequency_mhz:g} MHz"] if self.frequency_mhz is not None else [])])


def frugal(*settings: Setting) -> Setting:
    """Field by field the most frugal of `settings`.

    >>> print(frugal(Setting("int4", threads=4), Setting("int8", experts=1, threads=2, pause_ms=500)))
    int4, 2 threads, 1 expert, 500 ms pause
    """

    def least(name: str) -> Any:
        return min((v for s in settings if (v := getattr(s, name)) is not None), default=None)

    return Setting(
        precision=min((s.precision for s in settings), key=BITS.__getitem__),
        experts=least("experts"),
        threads=least("threads"),
        pause_ms=max(s.pause_ms for s in settings),
        frequency_mhz=least("frequency_mhz"),
    )


@dataclass(frozen=True)
class Threshold:
    """While `reading` is on `side` of `at`, the level named `level` is called for: Threshold("battery", "below", 0.2, "low-power")."""

    reading: str
    side: str
    at: float
    level: str

    def __post_init__(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"reading={self.reading!r} is not known; use one of {', '.join(READINGS)}")
        if self.side not in ("below", "above"):
            raise ValueError(f"side={self.side!r} is not known; use 'below' or 'above'")

    def holds(self, value: float, active: bool, h: float) -> bool:
        """Whether `value` calls for the level, when it was called for before (`active`) and hysteresis is `h`.

        >>> low = Threshold("battery", "below", 0.2, "low-power")
        >>> [low.holds(x, a, 0.05) for x, a in ((0.19, False), (0.21, False), (0.21, True), (0.25, True))]
        [True, False, True, False]
        """
        if self.side == "below":
            return value < self.at + (h if active else 0)
        return value > self.at - (h if active else 0)

    def shown(self, value: float) -> str:
        """A value of this reading as it is told.

        >>> Threshold("battery", "below", 0.2, "low-power").shown(0.185), Threshold("temperature_c", "above", 42, "hot").shown(43)
        ('18.5 %', '43 °C')
        """
        return f"{value:.4g} °C" if self.reading == "temperature_c" else f"{100 * value:.4g} %"


@dataclass(frozen=True)
class Policy:
    """`levels` by name, the first is the normal one; `thresholds` that call for the others; `hysteresis` per reading."""

    levels: Mapping[str, Setting]
    thresholds: tuple[Threshold, ...] = ()
    hysteresis: Mapping[str, float] = field(default_factory=dict)
    min_dwell_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty; give at least the normal one, such as {'normal': Setting()}")
        for t in self.thresholds:
            if t.level not in self.levels or t.level == self.normal:
                others = ", ".join(list(self.levels)[1:]) or "none"
                raise ValueError(f"a threshold on {t.reading} calls for level={t.level!r}; levels beside {self.normal!r} are: {others}")
        for reading, h in self.hysteresis.items():
            if reading not in READINGS or not h >= 0:
                raise ValueError(f"hysteresis={{{reading!r}: {h}}}: give 0 or more for {', '.join(READINGS)}, in the reading's own unit")
        if not self.min_dwell_s >= 0:
            raise ValueError(f"min_dwell_s={self.min_dwell_s} must be 0 or more")

    @property
    def normal(self) -> str:
        """The name of the level that holds when nothing calls for another."""
        return next(iter(self.levels))

    def without(self, reading: str) -> "Policy":
        """The same policy, blind to `reading`: what it is compared with."""
        kept = tuple(t for t in self.thresholds if t.reading != reading)
        return Policy(self.levels, kept, self.hysteresis, self.min_dwell_s)


_LEVELS = {
    "normal": Setting("int8", threads=4),
    "low-power": Setting("int4", threads=2, frequency_mhz=1608),
    "hot": Setting("int8", threads=2, pause_ms=500),
    "busy": Setting("int8", threads=2),
}


def _policy(hot_c: float) -> Policy:
    thresholds = (
        Threshold("battery", "below", 0.20, "low-power"),
        Threshold("temperature_c", "above", hot_c, "hot"),
        Threshold("load", "above", 0.75, "busy"),
    )
    return Policy(_LEVELS, thresholds, {"battery": 0.05, "temperature_c": 4.0, "load": 0.25})


PHONE = _policy(hot_c=42)  # of the case: no article says which temperature is hot, this is our choice
LAPTOP = _policy(hot_c=85)  # of the chip


@dataclass(frozen=True)
class Memory:
    """What the governor remembers: which thresholds hold, when each last started, and when it last decided."""

    active: tuple[bool, ...]
    since: tuple[float, ...]
    last: float = float("-inf")

    @classmethod
    def fresh(cls, policy: Policy) -> "Memory":
        n = len(policy.thresholds)
        return cls((False,) * n, (float("-inf"),) * n)


@dataclass(frozen=True)
class Decision:
    """A setting, the levels that are called for, what changed just now (a sentence per threshold), and why, in words."""

    setting: Setting
    reason: str
    levels: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def apply(self, runtime: Any) -> Any:
        """Sets `threads` and `top_k` of `runtime` and returns it; of a mapping {precision: runtime} the one that fits.

        That is the most precise one with no more bits than the setting asks for, or the least precise there is. Threads and
        experts are at most what the runtime takes, and this machine has; a model without experts (`top_k` None) has none to set.
        A pause and a frequency are not the runtime's: `Governed` keeps the pause.
        """
        if isinstance(runtime, Mapping):
            if not runtime or (unknown := [p for p in runtime if p not in BITS]):
                said = f"has unknown precisions {unknown}" if runtime else "is empty"
                raise ValueError(f"runtime {said}; give {{'int8': runtime, ...}} with keys of {', '.join(BITS)}")
            fits = [p for p in runtime if BITS[p] <= BITS[self.setting.precision]]
            runtime = runtime[max(fits, key=BITS.__getitem__) if fits else min(runtime, key=BITS.__getitem__)]
        _set_at_most(runtime, "threads", min(self.setting.threads, os.cpu_count() or self.setting.threads))
        if self.setting.experts is not None and runtime.top_k is not None:
            _set_at_most(runtime, "top_k", self.setting.experts)
        elif runtime.top_k is not None:
            runtime.top_k = None
        return runtime

    def _repr_html_(self) -> str:
        from html import escape

        return html_table.facts((f.name, getattr(self.setting, f.name)) for f in fields(Setting)) + f"<p>{escape(self.reason)}</p>"


def _set_at_most(runtime: Any, name: str, value: int) -> None:
    """Sets the largest number up to `value` that the runtime takes: it refuses more threads than it was opened with by ValueError."""
    for n in range(value, 1, -1):
        try:
            setattr(runtime, name, n)
            return
        except ValueError:
            continue
    setattr(runtime, name, 1)


def decide(policy: Policy, memory: Memory, state: DeviceState, now: float) -> tuple[Memory, Decision]:
    """(the memory after, the decision) at time `now` in seconds of any clock that never goes back. Pure.

    >>> memory, d = decide(PHONE, Memory.fresh(PHONE), DeviceState(battery=0.18, plugged=False, temperature_c=31, load=0.1), 0.0)
    >>> print(d.setting, "|", d.reason)
    int4, 2 threads, 1608 MHz | low-power: battery 18 % is below 20 %
    """
    if now < memory.last:
        raise ValueError(f"now={now} is before the last decision at {memory.last}; use a clock that never goes back, as time.monotonic")
    active, since = list(memory.active), list(memory.since)
    changes, why, missing = [], [], []
    for i, t in enumerate(policy.thresholds):
        value, h = getattr(state, t.reading), policy.hysteresis.get(t.reading, 0.0)
        name = t.reading.removesuffix("_c")
        if value is None:
            missing.append(f"{name} is not known: {t.level} " + ("stays" if active[i] else "can't be called for"))
            why += [f"{t.level}: {name} was {t.side} {t.shown(t.at)} when last known"] * active[i]
            continue
        charging = t.reading == "battery" and bool(state.plugged)
        wanted = not charging and t.holds(value, active[i], h)
        fact = f"{name} {t.shown(value)}"
        if wanted and not active[i]:
            active[i], since[i] = True, now
            changes.append(f"{t.level} starts: {fact} is {t.side} {t.shown(t.at)}")
        elif active[i] and not wanted and now - since[i] >= policy.min_dwell_s:
            active[i] = False
            back = t.at + h if t.side == "below" else t.at - h
            changes.append(f"{t.level} ends: " + ("on the charger" if charging else f"{fact} is back at {t.shown(back)}"))
        if active[i]:
            if not wanted:
                why.append(f"{t.level}: {fact}, stays until {policy.min_dwell_s:g} s are over")
            elif t.holds(value, False, h):
                why.append(f"{t.level}: {fact} is {t.side} {t.shown(t.at)}")
            else:
                back = t.at + h if t.side == "below" else t.at - h
                why.append(f"{t.level}: {fact} is not back at {t.shown(back)}")
    levels = tuple(dict.fromkeys(t.level for t, on in zip(policy.thresholds, active, strict=True) if on))
    setting = frugal(policy.levels[policy.normal], *(policy.levels[name] for name in levels))
    reason = "; ".join([*(why or [f"{policy.normal}: nothing calls for another level"]), *missing])
    return Memory(tuple(active), tuple(since), now), Decision(setting, reason, levels or (policy.normal,), tuple(changes))


class Governor:
    """`decide` with its memory kept: `Governor(PHONE).decide(read_state(), time.monotonic())`."""

    def __init__(self, policy: Policy = PHONE) -> None:
        self.policy, self.memory = policy, Memory.fresh(policy)

    def decide(self, state: DeviceState, now: float) -> Decision:
        """The decision at `now`, seconds of a clock that never goes back."""
        self.memory, decision = decide(self.policy, self.memory, state, now)
        return decision


class Governed:
    """Runtimes {precision: runtime} (or one) under a governor: decides before each generation, and between tokens of a stream.

    `read`, `clock` and `sleep` are there to be replaced, by a simulated device for one. `decisions` holds the last of them.
    """

    def __init__(
        self,
        runtimes: Any,
        governor: Governor,
        read: Callable[[], DeviceState] = read_state,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.runtimes, self.governor = runtimes, governor
        self._read, self._clock, self._sleep = read, clock, sleep
        self._ended = float("-inf")
        self.decision: Decision | None = None

    def _decide(self) -> Decision:
        self.decision = self.governor.decide(self._read(), self._clock())
        return self.decision

    def _begin(self) -> Any:
        decision = self._decide()
        left = self._ended + decision.setting.pause_ms / 1000 - self._clock()
        if left > 0:
            self._sleep(left)
        return decision.apply(self.runtimes)

    def generate(self, ids: Any, **kwargs: Any) -> Any:
        """What the chosen runtime's `generate` returns, after the pause that the setting asks for since the last one ended."""
        runtime = self._begin()
        try:
            return runtime.generate(ids, **kwargs)
        finally:
            self._ended = self._clock()

    def stream(self, ids: Any, every: int = 16, **kwargs: Any) -> Iterator:
        """The tokens of the chosen runtime's `stream`; after every `every` of them threads and experts are decided anew.

        Another precision waits for the next request: a runtime's cache of keys and values is its own.
        """
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more tokens")
        runtime = self._begin()
        try:
            for i, token in enumerate(runtime.stream(ids, **kwargs), 1):
                yield token
                if i % every == 0:
                    self._decide().apply(runtime)
        finally:
            self._ended = self._clock()
