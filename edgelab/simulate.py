"""A simulated phone: battery, heat, voltage and frequency; what a policy of the governor costs in latency and gains in endurance.

**One token.** It takes `operations` (2 per weight used) and reads `bytes`. With n threads at frequency f and voltage V(f)

    t_c = operations / (n f ops_per_cycle)        t_m = bytes / min(bandwidth, n * bandwidth of a core)
    t   = max(t_c, t_m) + (1 - overlap) min(t_c, t_m)
    E   = n C V^2 f (t_c + stall (t - t_c)) + e_dram bytes

C V^2 f is the kernel's own model of a core (`dynamic-power-coefficient`); while a core waits for memory it switches `stall` as
much. Each core that is awake leaks  P_l = leak V^3 g(T) / g(55 °C),  g a cubic in the chip's temperature.

**Heat.** Two nodes, chip and case:  C1 T1' = P_chip - (T1 - T2)/R1,  C2 T2' = P_static + (T1 - T2)/R1 - (T2 - T_ambient)/R2.
For constant power a step's solution is a matrix exponential, which is what is used, so that the step's length errs only through
leakage and decisions. No throttling of the firmware's is modelled: a `Trace` says how hot it got.

**Static power** (screen, radio, the rest of the system) is a number of its own, because gains in endurance hang on it:
with compute's mean powers a before and b after, endurance grows by (P_static + a) / (P_static + b) - 1, which falls towards 0
as P_static grows. A policy that answers slower also answers the same requests, or fewer: at a fixed rate (`per_minute`)
the work done per hour is the same before and after, with "one after the other" (`per_minute=None`) it is not, so `Gain`
has tokens per charge beside the hours.

Numbers with a source say so where they stand. Those marked "assumed" were measured nowhere; `UNKNOWN` gives the range that
`sensitivity` draws them from, and what comes out is an interval. Everything here is modelled, nothing measured.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgelab import html_table
from edgelab.governor import DeviceState, Memory, Policy, Setting, decide
from edgelab.report import Report, Row

# (MHz, V) of a Cortex-A76 of the RK3588: torvalds/linux, arch/arm64/boot/dts/rockchip/rk3588-opp.dtsi, opp-table-cluster1
RK3588_A76 = ((1200, 0.675), (1416, 0.725), (1608, 0.7625), (1800, 0.85), (2016, 0.925), (2208, 0.9875), (2400, 1.0))
# bits per weight as stored, with a float16 scale for each 32 weights
STORED_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5, "int3": 3.5, "int2": 2.5}


@dataclass(frozen=True)
class Network:
    """A mixture of experts in numbers: weights that each token uses, weights of one expert (all layers together), experts per token.

    A dense model has `per_expert=0`. Attention over the cache of keys and values is not counted: contexts are short here.
    """

    name: str
    shared: float
    per_expert: float = 0.0
    experts: int = 0

    def active(self, experts: int | None = None) -> float:
        """Weights that a token uses with `experts` of them (None: the model's own number; never more than that)."""
        return self.shared + self.per_expert * (self.experts if experts is None else min(experts, self.experts))

    def work(self, setting: Setting) -> "Work":
        """One token under `setting`.

        >>> Network("dense", 1e9).work(Setting("int8"))
        Work(operations=2000000000.0, bytes=1062500000.0)
        """
        n = self.active(setting.experts)
        return Work(2 * n, n * STORED_BITS[setting.precision] / 8)


# 16 layers, hidden 2048, 64 experts of width 1024, 8 a token, vocabulary 50304 (OLMoE, arXiv 2409.02060, table of hyperparameters):
# attention 16 * 4 * 2048^2 + head 50304 * 2048, an expert 16 * 3 * 2048 * 1024
OLMOE = Network("OLMoE-1B-7B", 16 * 4 * 2048**2 + 50304 * 2048, 16 * 3 * 2048 * 1024, 8)


@dataclass(frozen=True)
class Work:
    """What is to be done: operations (a multiply-add is two) and bytes from memory."""

    operations: float
    bytes: float = 0.0


@dataclass(frozen=True)
class Device:
    """A phone in numbers; see the module's docstring for the symbols. All of them can be replaced: `Device(static_w=0.3)`."""

    capacity_wh: float = 18.65  # Xiaomi 13 Pro: 4820 mAh (mi.com, product page) at 3.87 V (assumed)
    static_w: float = 1.0  # screen and the rest of the system; assumed, always vary it
    opps: tuple[tuple[float, float], ...] = RK3588_A76
    c_watt: float = 416e-6  # per core, W / (MHz V^2): rk3588-base.dtsi, cpu_b0, dynamic-power-coefficient = <416> (microwatts)
    cores: int = 4
    ops_per_cycle: float = 16.0  # per core, int8 with the unpacking of codes; assumed (two sdot a cycle would be 64)
    bandwidth: float = 20e9  # B/s that all cores get together; assumed, of 34.1e9 (64 bits of LPDDR4X-4266)
    core_bandwidth: float = 10e9  # B/s that one core gets; assumed
    dram_j_per_byte: float = 64e-12  # 8 pJ per bit, assumed; Horowitz (ISSCC 2014, figure 1.1.9) has 20-40 for DRAM of its day
    stall: float = 0.5  # share of C V^2 f that a core switches while it waits for memory; assumed
    overlap: float = 1.0  # 1: arithmetic and memory at once, 0: one after the other; assumed
    leak_w: float = 0.10  # per core at 1 V and 55 °C; assumed
    # g(T) = sum ts_i T^i, as in Arm's mali-simple-power-model; the numbers are those of the RK3399's GPU (rk3399.dtsi of Rockchip's kernel)
    leak_ts: tuple[float, float, float, float] = (32000.0, 4700.0, -80.0, 2.0)
    wake_s: float = 220e-6  # into sleep and out: rk3588-base.dtsi, cpu-sleep, entry-latency-us 100 + exit-latency-us 120
    residency_s: float = 1e-3  # no sleep in shorter gaps: min-residency-us, same place
    sleep_w: float = 0.01  # all cores asleep; assumed
    clock_gated: float = 0.1  # share of C V^2 f that an idle core switches when it does not sleep; assumed
    chip_j_per_k: float = 5.0  # assumed
    case_j_per_k: float = 150.0  # assumed: 0.2 kg of glass, metal and cell
    chip_k_per_w: float = 4.0  # chip to case; assumed
    case_k_per_w: float = 4.0  # case to air; assumed: 0.024 m^2 at 10 W / (m^2 K)
    ambient_c: float = 25.0

    def __post_init__(self) -> None:
        positive = ("capacity_wh", "c_watt", "cores", "ops_per_cycle", "bandwidth", "core_bandwidth", "chip_j_per_k", "case_j_per_k")
        for name in (*positive, "chip_k_per_w", "case_k_per_w"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        for name in ("static_w", "dram_j_per_byte", "leak_w", "wake_s", "residency_s", "sleep_w"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("stall", "overlap", "clock_gated"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is no share from 0 to 1")
        if not self.opps or list(self.opps) != sorted(self.opps):
            raise ValueError(f"opps={self.opps} must be pairs (MHz, V) from the slowest to the fastest")

    @classmethod
    def like(cls, profile: Any, reached: float = 0.6, **numbers: Any) -> "Device":
        """A device with the battery and the memory bandwidth of a profile of `edgelab.device`; all else as it stands, or `numbers`.

        `reached`: share of the theoretical bandwidth that decoding gets. Of a profile without a battery, capacity_wh is to be given.

        >>> from edgelab.device import device
        >>> d = Device.like(device("oneplus-12"), static_w=0.5)
        >>> d.capacity_wh, d.static_w
        (20.9, 0.5)
        """
        if profile.battery_wh is not None:
            numbers = {"capacity_wh": profile.battery_wh.value} | numbers
        elif "capacity_wh" not in numbers:
            raise ValueError(f"{profile.name} has no battery in its profile; give capacity_wh=...")
        if profile.dram_bytes_per_s is not None:
            numbers = {"bandwidth": reached * profile.dram_bytes_per_s.value} | numbers
        return cls(**numbers)

    def opp(self, frequency_mhz: float | None) -> tuple[float, float]:
        """(MHz, V) of the slowest point that is at least `frequency_mhz` fast; the fastest for None or more than there is.

        >>> Device().opp(1500), Device().opp(None)
        ((1608, 0.7625), (2400, 1.0))
        """
        return next((p for p in self.opps if frequency_mhz is not None and p[0] >= frequency_mhz), self.opps[-1])

    def leakage(self, volts: float, chip_c: float) -> float:
        """W that one awake core leaks at the chip's temperature `chip_c`, in degrees Celsius.

        >>> Device().leakage(1.0, 55.0), round(Device().leakage(1.0, 85.0) / Device().leakage(1.0, 25.0), 1)
        (0.1, 8.3)
        """
        a, b, c, d = self.leak_ts
        t = min(125.0, max(-20.0, chip_c))  # where the cubic was made for
        return self.leak_w * volts**3 * (a + t * (b + t * (c + t * d))) / (a + 55 * (b + 55 * (c + 55 * d)))


@dataclass(frozen=True)
class Cost:
    """Of one unit of `Work`: seconds, joules that it switches (memory included), and the volts and cores that leak meanwhile."""

    seconds: float
    joules: float
    volts: float
    cores: int
    mhz: float


def cost(device: Device, work: Work, setting: Setting) -> Cost:
    """What `work` takes on `device` under `setting`; leakage is not in it, for it depends on the temperature.

    >>> flat = Device(opps=((1000, 1.0),), c_watt=1e-3, ops_per_cycle=10, bandwidth=1e9, core_bandwidth=1e9, dram_j_per_byte=0)
    >>> c = cost(flat, Work(1e9, 1e8), Setting(threads=2))  # 0.05 s of arithmetic, 0.1 s of memory; 2 W, half of it while waiting
    >>> c.seconds, round(c.joules, 9)
    (0.1, 0.15)
    """
    mhz, volts = device.opp(setting.frequency_mhz)
    n = min(setting.threads, device.cores)
    arithmetic = work.operations / (n * mhz * 1e6 * device.ops_per_cycle)
    memory = work.bytes / min(device.bandwidth, n * device.core_bandwidth)
    seconds = max(arithmetic, memory) + (1 - device.overlap) * min(arithmetic, memory)
    power = n * device.c_watt * volts**2 * mhz
    joules = power * (arithmetic + device.stall * (seconds - arithmetic)) + device.dram_j_per_byte * work.bytes
    return Cost(seconds, joules, volts, n, mhz)


@dataclass(frozen=True)
class Workload:
    """Requests of `tokens` each, `per_minute` of them (None: the next when the last is answered), Poisson or evenly spaced."""

    tokens: int = 64
    per_minute: float | None = 4.0
    poisson: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be 1 or more")
        if self.per_minute is not None and not self.per_minute > 0:
            raise ValueError(f"per_minute={self.per_minute} must be more than 0, or None for one request after the other")


# --------------------------------------------------------------------------------------------------------- in time


@dataclass(frozen=True, repr=False)
class Trace:
    """A simulated discharge. Arrays have a value per step, at the step's end; `power_w` and `busy` are means over it.

    `latency_s` and `finished_s` have a value per answered request; `waiting` requests were not answered by the end.
    The step in which the battery ends is cut there, its tokens in proportion.
    """

    time_s: np.ndarray
    battery: np.ndarray
    chip_c: np.ndarray
    case_c: np.ndarray
    power_w: np.ndarray
    busy: np.ndarray
    tokens: np.ndarray
    which: np.ndarray  # index into `settings`
    settings: tuple[Setting, ...]
    levels: tuple[str, ...]  # their names
    changes: tuple[tuple[float, str], ...]  # (seconds, what the governor said)
    latency_s: np.ndarray
    finished_s: np.ndarray
    waiting: int
    empty: bool
    capacity_wh: float

    @property
    def hours(self) -> float:
        return float(self.time_s[-1]) / 3600

    @property
    def joules(self) -> float:
        """The integral of power over time."""
        return float((self.power_w * np.diff(self.time_s, prepend=0.0)).sum())

    @property
    def percent_per_10_min(self) -> float:
        """Per cent of the battery that ten minutes take, on average: the unit of claims such as "1 % in 10 minutes"."""
        return 100 * self.joules / (3600 * self.capacity_wh) / (self.hours * 6)

    def bands(self) -> list[tuple[float, float, str]]:
        """[(from, to, level)] in seconds: when each level held."""
        found: list[list] = []
        start = 0.0
        for end, i in zip(self.time_s.tolist(), self.which.tolist(), strict=True):
            if found and found[-1][2] == self.levels[i]:
                found[-1][1] = end
            else:
                found.append([start, end, self.levels[i]])
            start = end
        return [tuple(b) for b in found]

    def _rows(self) -> dict[str, str]:
        return {
            "hours": f"{self.hours:.2f}" + (" (battery empty)" if self.empty else ""),
            "mean power": f"{self.joules / self.time_s[-1]:.2f} W",
            "per 10 minutes": f"{self.percent_per_10_min:.2f} %",
            "tokens": f"{self.tokens[-1]:,.0f}",
            "latency, median": f"{np.median(self.latency_s):.2f} s" if len(self.latency_s) else "no answer",
            "hottest: case, chip": f"{self.case_c.max():.0f} °C, {self.chip_c.max():.0f} °C",
        }

    def __repr__(self) -> str:
        return "Trace (modelled): " + "; ".join(f"{k} {v}" for k, v in self._rows().items())

    def _repr_html_(self) -> str:
        return html_table.facts((f"{k} (modelled)", v) for k, v in self._rows().items())


def _heat(device: Device, step_s: float) -> np.ndarray:
    """exp(A h) [2, 2] of the temperatures' distance from where they would settle; through the two real eigenvalues of A."""
    a = 1 / (device.chip_k_per_w * device.chip_j_per_k)
    b = 1 / (device.chip_k_per_w * device.case_j_per_k)
    c = 1 / (device.case_k_per_w * device.case_j_per_k)
    values, vectors = np.linalg.eig(np.array([[-a, a], [b, -b - c]]))
    return (vectors * np.exp(values * step_s)) @ np.linalg.inv(vectors)


def simulate(
    policy: Policy | Setting,
    device: Device,
    workload: Workload,
    network: Network = OLMOE,
    *,
    battery: float = 1.0,
    hours: float = 24.0,
    step_s: float = 1.0,
    decide_s: float = 5.0,
    sensor: str = "case",
    load: float | None = None,
    seed: int = 0,
) -> Trace:
    """A `Trace` from `battery` (share 0..1) until it is empty or `hours` are over. The same arguments give the same trace.

    The governor is asked every `decide_s`, with the temperature of the `sensor` "case" or "chip"; a `Setting` instead of a policy is
    kept throughout. A setting takes effect at once, between tokens too, and its pause is kept after each request.
    """
    if not 0 < battery <= 1:
        raise ValueError(f"battery={battery} is no share above 0 up to 1; divide per cent by 100")
    if sensor not in ("case", "chip"):
        raise ValueError(f"sensor={sensor!r} is not known; use 'case' or 'chip'")
    if not (step_s > 0 and hours > 0 and decide_s >= step_s):
        raise ValueError(f"step_s={step_s}, decide_s={decide_s}, hours={hours}: all above 0, and decide_s at least step_s")
    policy = Policy({"fixed": policy}) if isinstance(policy, Setting) else policy
    rng, memory = np.random.default_rng(seed), Memory.fresh(policy)
    (m00, m01), (m10, m11) = _heat(device, step_s).tolist()
    capacity, left = device.capacity_wh * 3600, device.capacity_wh * 3600 * battery
    chip = case = device.ambient_c
    per_decision, gap = round(decide_s / step_s), math.inf if workload.per_minute is None else 60 / workload.per_minute
    arrivals: deque[float] = deque([0.0])
    todo, asked, free = 0.0, 0.0, 0.0  # tokens left of the request in hand, when it came, when the pause after the last is over
    done, taken, settings, changes, answered = 0.0, 0, {}, [], []
    rows: list[tuple] = []
    for step in range(math.ceil(hours * 3600 / step_s - 1e-9)):
        start = step * step_s
        end = start + step_s
        if step % per_decision == 0:
            state = DeviceState(max(0.0, left / capacity), False, case if sensor == "case" else chip, load)
            memory, decision = decide(policy, memory, state, start)
            changes += [(start, text) for text in decision.changes]
            key = (decision.setting, " and ".join(decision.levels))
            if key not in settings:
                settings[key] = (len(settings), cost(device, network.work(decision.setting), decision.setting))
            which, c = settings[key]
            pause = decision.setting.pause_ms / 1000
        clock, busy, before = start, 0.0, done
        while clock < end:  # the requests of this step, exactly
            if todo == 0:
                ready = max(free, arrivals[0])
                if ready >= end:
                    break
                clock, asked, todo = max(clock, ready), arrivals.popleft(), float(workload.tokens)
                taken += 1
                if gap < math.inf:
                    arrivals.append(asked + (rng.exponential(gap) if workload.poisson else gap))
            need = todo * c.seconds
            if clock + need <= end:
                clock, todo, busy, done = clock + need, 0.0, busy + need, done + todo
                answered.append((clock, clock - asked))
                free = clock + pause
                if gap == math.inf:
                    arrivals.append(clock)
            else:
                busy, done, todo = busy + end - clock, done + (end - clock) / c.seconds, todo - (end - clock) / c.seconds
                clock = end
        share = busy / step_s
        hot = share * (c.joules / c.seconds + c.cores * device.leakage(c.volts, chip)) + (1 - share) * device.sleep_w
        power = hot + device.static_w
        case_end = device.ambient_c + power * device.case_k_per_w
        chip_end = case_end + hot * device.chip_k_per_w
        d_chip, d_case = chip - chip_end, case - case_end
        chip, case = chip_end + m00 * d_chip + m01 * d_case, case_end + m10 * d_chip + m11 * d_case
        last = left <= power * step_s
        end = start + (left / power if last else step_s)
        done = before + (done - before) * (end - start) / step_s
        left = 0.0 if last else left - power * step_s
        rows.append((end, left / capacity, chip, case, power, share, done, which))
        if last:
            break
    columns = [np.array(x) for x in zip(*rows, strict=True)]
    while gap < math.inf and arrivals[-1] <= end:  # who came and was never looked at
        arrivals.append(arrivals[-1] + (rng.exponential(gap) if workload.poisson else gap))
    finished, latency = np.array([a for a in answered if a[0] <= end]).reshape(-1, 2).T
    waiting = taken + sum(a <= end for a in arrivals) - len(finished)
    told = (
        tuple(s for s, _ in settings),
        tuple(level for _, level in settings),
        tuple(changes),
        latency,
        finished,
        waiting,
        last,
        device.capacity_wh,
    )
    return Trace(*columns, *told)


# ------------------------------------------------------------------------------------------------------------- settled

HOTTEST_C = 110.0  # of the chip; above it, or where leakage and heat find no balance, a real device would have throttled


class Overheated(ValueError):
    """A setting that a device without throttling can't keep."""


@dataclass(frozen=True)
class Steady:
    """Where a fixed setting settles: mean power (static included), busy share, seconds and tokens, temperatures."""

    power_w: float
    busy: float
    latency_s: float  # of one request that does not wait for another; pause included when they come one after the other
    tokens_per_s: float
    chip_c: float
    case_c: float

    @property
    def joules_per_token(self) -> float:
        return self.power_w / self.tokens_per_s


def steady(device: Device, workload: Workload, setting: Setting, network: Network = OLMOE) -> Steady:
    """The state that `simulate` settles in, without the way there: leakage and temperature as a fixed point.

    Raises ValueError when requests come faster than they are answered, Overheated (one too) when the chip would pass `HOTTEST_C`.
    """
    c = cost(device, network.work(setting), setting)
    service, pause = workload.tokens * c.seconds, setting.pause_ms / 1000
    period = service + pause if workload.per_minute is None else 60 / workload.per_minute
    if period < service + pause - 1e-12:
        raise ValueError(
            f"per_minute={workload.per_minute}: {setting} takes {service + pause:.3g} s a request, the next comes after {period:.3g} s; "
            "lower the rate, or give per_minute=None"
        )
    share, chip = service / period, device.ambient_c
    for _ in range(200):
        hot = share * (c.joules / c.seconds + c.cores * device.leakage(c.volts, chip)) + (1 - share) * device.sleep_w
        case = device.ambient_c + (hot + device.static_w) * device.case_k_per_w
        before, chip = chip, case + hot * device.chip_k_per_w
        if abs(chip - before) < 1e-10:
            break
    if chip > HOTTEST_C:
        raise Overheated(f"{setting} settles at {chip:.0f} °C; a real device throttles before {HOTTEST_C:.0f} °C: fewer threads or MHz")
    closed = workload.per_minute is None
    return Steady(hot + device.static_w, share, service + pause * closed, workload.tokens / period, chip, case)


@dataclass(frozen=True)
class Gain:
    """A frugal setting against the normal one, in per cent: latency added, hours gained, tokens per charge gained; medians with
    the interval [2.5 %, 97.5 %] over `n` draws of the unknowns (`low`, `high`: of latency, hours, tokens)."""

    static_w: float
    latency: float
    hours: float
    tokens: float
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    n: int = 1


def gain(device: Device, workload: Workload, normal: Setting, frugal: Setting, network: Network = OLMOE) -> Gain:
    """The `Gain` of `frugal` over `normal` in the settled state, all numbers taken as they stand.

    With per_minute given and the same pause, latencies are of requests that do not queue. The share of the battery at which
    the frugal setting begins does not matter: both discharge what is left from there.
    """
    a, b = (steady(device, workload, s, network) for s in (normal, frugal))
    hours = a.power_w / b.power_w
    values = tuple(100 * (x - 1) for x in (b.latency_s / a.latency_s, hours, hours * b.tokens_per_s / a.tokens_per_s))
    return Gain(device.static_w, *values, values, values)


# ranges of what was measured nowhere: [low, high], drawn evenly in the logarithm, those of EVENLY evenly
EVENLY = {"stall", "overlap", "ambient_c"}
UNKNOWN: Mapping[str, tuple[float, float]] = {
    "ops_per_cycle": (8.0, 32.0),
    "bandwidth": (15e9, 30e9),
    "core_bandwidth": (7e9, 15e9),
    "dram_j_per_byte": (32e-12, 160e-12),
    "stall": (0.3, 0.8),
    "overlap": (0.5, 1.0),
    "leak_w": (0.03, 0.2),
    "c_watt": (300e-6, 550e-6),
    "chip_k_per_w": (2.0, 6.0),
    "ambient_c": (15.0, 35.0),
}


def sensitivity(
    device: Device,
    workload: Workload,
    normal: Setting,
    frugal: Setting,
    network: Network = OLMOE,
    *,
    static_w: Sequence[float] = (0.0, 0.1, 0.3, 1.0, 2.0, 3.0),
    busy: tuple[float, float] = (0.05, 0.95),
    unknown: Mapping[str, tuple[float, float]] = UNKNOWN,
    draws: int = 200,
    seed: int = 0,
) -> list[Gain]:
    """A `Gain` per static power: median and interval over `draws` of the unknowns and of the rate of requests.

    The rate is drawn so that the slower of the settings is busy a share within `busy` (a rate that it can't keep up with has no
    settled state). `workload.per_minute=None` draws no rate. The same draws serve each static power; one at which a setting
    overheats is left out there, and `n` says how many stayed. Raises Overheated when none does.
    """
    drawn = _draw(device, workload, (normal, frugal), network, busy, unknown, draws, seed)
    found = []
    for watts in static_w:
        gains = []
        for d, load in drawn:
            with suppress(Overheated):
                gains.append(gain(replace(d, static_w=watts), load, normal, frugal, network))
        if not gains:
            raise Overheated(f"static_w={watts}: a setting overheats in each of {draws} draws; give fewer threads, MHz or static power")
        low, mid, high = np.percentile([(g.latency, g.hours, g.tokens) for g in gains], [2.5, 50, 97.5], axis=0)
        found.append(Gain(watts, *map(float, mid), tuple(map(float, low)), tuple(map(float, high)), len(gains)))
    return found


def _draw(device, workload, settings, network, busy, unknown, draws, seed) -> list[tuple[Device, Workload]]:
    """`draws` devices with what is not known drawn from `unknown`, each with a rate that the slowest of `settings` keeps up with."""
    if draws < 1:
        raise ValueError(f"draws={draws} must be 1 or more")
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(draws):
        d = _device(device, unknown, rng)
        share, load = busy[0] + (busy[1] - busy[0]) * rng.random(), workload
        if workload.per_minute is not None:
            slowest = max(workload.tokens * cost(d, network.work(s), s).seconds + s.pause_ms / 1000 for s in settings)
            load = replace(workload, per_minute=60 * share / slowest)
        drawn.append((d, load))
    return drawn


def _device(device: Device, unknown: Mapping[str, tuple[float, float]], rng: np.random.Generator) -> Device:
    at = zip(unknown.items(), rng.random(len(unknown)), strict=True)
    return replace(device, **{k: lo + (hi - lo) * p if k in EVENLY else lo * (hi / lo) ** p for (k, (lo, hi)), p in at})


def claim_share(
    latency: float,
    hours: float,
    device: Device,
    workload: Workload,
    normal: Setting,
    frugal: Setting,
    network: Network = OLMOE,
    *,
    busy: tuple[float, float] = (0.05, 0.95),
    unknown: Mapping[str, tuple[float, float]] = UNKNOWN,
    draws: int = 200,
    seed: int = 0,
) -> float:
    """The share of draws in which `frugal` adds at most `latency` per cent *and* gains at least `hours` per cent of endurance.

    A claim of two numbers has to hold at once; each lying within its own interval is not enough. Draws as in `sensitivity`, at the
    static power of `device`.
    """
    held, tried = 0, 0
    for d, load in _draw(device, workload, (normal, frugal), network, busy, unknown, draws, seed):
        with suppress(Overheated):
            g = gain(d, load, normal, frugal, network)
            held, tried = held + (g.latency <= latency and g.hours >= hours), tried + 1
    if not tried:
        raise Overheated(f"a setting overheats in each of {draws} draws; give fewer threads, MHz or static power")
    return held / tried


def static_for(
    hours: float, device: Device, workload: Workload, normal: Setting, frugal: Setting, network: Network = OLMOE
) -> float | None:
    """The static power in W at which `frugal` gains `hours` per cent of endurance; None where it gains less even at 0 W.

    P = (a - (1 + g) b) / g for a gain g and compute's mean powers a, b. These depend on P a little, for static power warms what
    leaks: a fixed point. Raises Overheated where the way there leads above `HOTTEST_C`.
    """
    if not hours > 0:
        raise ValueError(f"hours={hours} per cent must be more than 0: no gain is left only at infinite static power")
    watts, g = 0.0, hours / 100
    for _ in range(100):
        a, b = (steady(replace(device, static_w=watts), workload, s, network).power_w - watts for s in (normal, frugal))
        before, watts = watts, max(0.0, (a - (1 + g) * b) / g)
        if abs(watts - before) < 1e-9:
            break
    return watts if watts > 0 else None


def compare(
    policy: Policy | Setting, other: Policy | Setting, device: Device, workload: Workload, network: Network = OLMOE, **kwargs
) -> tuple[Gain, Trace, Trace]:
    """(what `other` gains over `policy`, both traces) by simulating both until the battery is empty; `kwargs` as in `simulate`.

    `battery=0.2` starts at 20 %, where low-power modes begin. Latency is the mean over answered requests, queueing included.
    """
    a, b = (simulate(p, device, workload, network, **kwargs) for p in (policy, other))
    for t in (a, b):
        if not t.empty:
            raise ValueError(f"the battery was not empty after {t.hours:.1f} hours; give more hours=... or a smaller battery=...")
    ratios = (b.latency_s.mean() / a.latency_s.mean(), b.hours / a.hours, b.tokens[-1] / a.tokens[-1])
    values = tuple(100 * (float(x) - 1) for x in ratios)
    return Gain(device.static_w, *values, values, values), a, b


def report(name: str, gains: Sequence[Gain], seed: int | None = 0) -> Report:
    """Rows of `latency_added`, `endurance_gained`, `tokens_gained` in per cent, a slice per static power; provenance "modelled"."""
    rows = []
    for g in gains:
        for i, metric in enumerate(("latency_added", "endurance_gained", "tokens_gained")):
            value, interval = (g.latency, g.hours, g.tokens)[i], (g.low[i], g.high[i]) if g.n > 1 else (None, None)
            rows.append(Row(name, metric, value, "%", f"static power {g.static_w:g} W", *interval, g.n, seed, "modelled"))
    return Report(tuple(rows))


# ---------------------------------------------------------------------------------------------------------------- DVFS


@dataclass(frozen=True)
class Point:
    """One frequency at one rate: latency, mean power of the cores and their memory in mW (no static power), how the gap is spent."""

    mhz: float
    period_ms: float
    latency_ms: float
    awake_mw: float  # clocks stop between inferences, voltage and leakage stay
    sleep_mw: float  # power is cut between inferences where the gap allows it
    sleeps: bool


def dvfs(device: Device, work: Work, period_s: float, setting: Setting | None = None, chip_c: float = 45.0) -> list[Point]:
    """A `Point` per frequency of the device for `work` every `period_s`; frequencies too slow for the period are left out.

    Slow and steady against race to idle, as it comes out: C V^2 speaks for slow, leakage and whatever else is on while busy for
    fast. Sleeping costs `wake_s` at the power of work, and isn't done in gaps under `residency_s`.
    """
    points, base = [], setting or Setting(threads=1)
    for mhz, _ in device.opps:
        c = cost(device, work, replace(base, frequency_mhz=mhz))
        if c.seconds > period_s:
            continue
        leak = c.cores * device.leakage(c.volts, chip_c)
        gap, busy_w = period_s - c.seconds, c.joules / c.seconds + leak
        gated = device.clock_gated * c.cores * device.c_watt * c.volts**2 * c.mhz + leak
        awake = busy_w * c.seconds + gated * gap
        sleeps = gap >= max(device.residency_s, device.wake_s)
        asleep = busy_w * (c.seconds + device.wake_s) + device.sleep_w * (gap - device.wake_s) if sleeps else awake
        points.append(Point(mhz, 1e3 * period_s, 1e3 * c.seconds, 1e3 * awake / period_s, 1e3 * asleep / period_s, sleeps))
    if not points:
        raise ValueError(f"period_s={period_s}: the work takes longer at every frequency; give a longer period, more threads or less work")
    return points


@dataclass(frozen=True)
class Scaling:
    """DVFS and sleep against the highest frequency without sleep: power and latency in per cent of change, medians over `n` draws
    with [2.5 %, 97.5 %] (`low`, `high`: of power, latency), and the share of draws in which racing to idle took the least power."""

    power: float
    latency: float
    low: tuple[float, float]
    high: tuple[float, float]
    raced: float
    n: int


def scaling(
    device: Device,
    latency_s: float = 2.1e-3,
    *,
    memory: tuple[float, float] = (0.0, 0.6),
    busy: tuple[float, float] = (0.05, 0.95),
    unknown: Mapping[str, tuple[float, float]] = UNKNOWN,
    draws: int = 200,
    seed: int = 0,
) -> Scaling:
    """A `Scaling` for work of `latency_s` at the highest frequency; of each draw the frequency that takes the least power asleep.

    Drawn beside `unknown`: the share of the time that waits for memory, and the share of a period that the slowest frequency is busy.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be 1 or more")
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        d = _device(device, unknown, rng)
        work = work_of(d, latency_s, memory[0] + (memory[1] - memory[0]) * rng.random())
        slowest = cost(d, work, Setting(threads=1, frequency_mhz=d.opps[0][0])).seconds
        points = dvfs(d, work, slowest / (busy[0] + (busy[1] - busy[0]) * rng.random()))
        best, top = min(points, key=lambda p: p.sleep_mw), points[-1]
        found.append((100 * (best.sleep_mw / top.awake_mw - 1), 100 * (best.latency_ms / top.latency_ms - 1), best.mhz == top.mhz))
    low, mid, high = np.percentile([f[:2] for f in found], [2.5, 50, 97.5], axis=0)
    return Scaling(*map(float, mid), tuple(map(float, low)), tuple(map(float, high)), sum(f[2] for f in found) / draws, draws)


def work_of(device: Device, latency_s: float, memory: float = 0.0, setting: Setting | None = None) -> Work:
    """Work that takes `latency_s` at the highest frequency, of whose time a share `memory` is spent reading (nothing overlaps less).

    >>> round(cost(Device(), work_of(Device(), 2.1e-3), Setting(threads=1)).seconds, 9)
    0.0021
    """
    if not 0 <= memory <= 1:
        raise ValueError(f"memory={memory} is no share from 0 to 1")
    s = setting or Setting(threads=1)
    n, mhz = min(s.threads, device.cores), device.opp(s.frequency_mhz)[0]
    bandwidth = min(device.bandwidth, n * device.core_bandwidth)
    arithmetic, reading = (1 - memory) * latency_s, memory * latency_s
    scale = latency_s / (max(arithmetic, reading) + (1 - device.overlap) * min(arithmetic, reading))
    return Work(scale * arithmetic * n * mhz * 1e6 * device.ops_per_cycle, scale * reading * bandwidth)


# ----------------------------------------------------------------------------------------------------- other claims


@dataclass(frozen=True)
class Cloud:
    """Energy of one answer of a cloud model, in joules, and who says so."""

    name: str
    joules: float
    source: str


CLOUD = (
    Cloud("median text prompt, Gemini apps", 0.24 * 3600, "Elsworth et al. 2025, arXiv 2508.15734: 0.24 Wh, serving overheads counted"),
    Cloud("text generation, mean of open models", 0.047 * 3600, "Luccioni et al. 2024, arXiv 2311.16863: 0.047 kWh per 1,000 inferences"),
)


def saved_against(cloud_j: float, local_j: float, network_j: float = 0.0) -> float:
    """Per cent of energy that an answer on the device saves against the cloud's `cloud_j` plus the radio's `network_j`.

    >>> saved_against(100.0, 28.0)
    72.0
    """
    if not cloud_j + network_j > 0:
        raise ValueError(f"cloud_j={cloud_j}, network_j={network_j}: their sum must be more than 0")
    return 100 * (1 - local_j / (cloud_j + network_j))


def power_by_duty(power_mw: float, before_ms: float, after_ms: float, static_mw: float = 0.0) -> float:
    """Mean power in mW after the same inferences, as often as before, take `after_ms` instead of `before_ms`; the rest is idle.

    Of `power_mw`, `static_mw` does not depend on the work. A claim that latency and power fell by the same share says no more
    than this with static_mw=0:

    >>> round(power_by_duty(210, 89, 62), 1)
    146.3
    """
    if not 0 <= static_mw <= power_mw:
        raise ValueError(f"static_mw={static_mw} is a part of power_mw={power_mw}: give 0 up to that")
    return static_mw + (power_mw - static_mw) * after_ms / before_ms
