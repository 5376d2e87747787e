"""What a device can do, as numbers with sources, and the roofline that turns them into tokens per second, memory, joules.

`data/devices.toml` holds the profiles. A number is a `Quantity`: value, unit, source, and how it is known. A number that
nobody states is missing, and a prediction that needs it says so instead of guessing.

**The model.** One token of decoding takes

    t = max(bytes / (eta * B), ops / (gamma * P)) + layers * tau * (hidden / 4096 on a CPU, 1 on an accelerator) + flash bytes / F

with B the DRAM's theoretical bandwidth, P the peak of the unit that computes, F the flash's. Bytes and operations are the model's
(`shape.py`): every dense weight, the experts that the token takes, the keys and values of the context. It is the roofline (Williams,
Waterman & Patterson, CACM 52(4), 2009) with three corrections that were fitted on published measurements (`efficiency.py`): the share
eta of the bandwidth that kernels of a class reach, the share gamma of the peak that they reach on a prompt, and a fixed time tau
per layer: a launch on an accelerator; norms, rounding and waiting for threads on a CPU, which grow with the hidden size.

- A prompt of n tokens reads the weights once per chunk of `CHUNK` tokens and computes n times: the slower of the two. Of a mixture
  it reads every expert that any of the tokens takes.
- A mixture whose experts do not all fit keeps as many per layer as there is room for, and reads the others from flash. The hit rate is
  (kept / experts) if all were equally likely; `expert_cache` measures the real one, which is higher.
- Energy is power times time: the power is of the whole chip while it decodes, not of the memory traffic, and of the engine where
  somebody measured it (`cpu_tuned_w` beside `cpu_w`). Its band is that of the speed and `POWER_FACTORS` of the power, their logarithms
  added in squares, as if independent, and at least `ENERGY_FACTOR` either way. Take it as an order of magnitude: it was off by a factor of
  1.7 to 2.3 from five published energies, power known or not (`efficiency.energy_validation`); expect up to two or three.
- A throttled device falls from its first rate to `sustained_share` of it with a time constant: r(t) = r0 * (s + (1 - s) exp(-t / T)).

What is left out: other apps, the screen, the tokenizer, sampling, DVFS, and that flash reads may overlap with arithmetic. No published
row is a mixture or reads from flash, and none has fewer than 490 million weights: a prediction beyond that says so (`warnings`).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from html import escape
from math import ceil, exp, hypot, inf, log
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from edgelab import html_table
from edgelab.paths import data_dir
from edgelab.report import Report, Row
from edgelab.shape import ModelShape

How = Literal["measured", "derived", "vendor", "article", "assumed"]
HOW = ("measured", "derived", "vendor", "article", "assumed")
KINDS = ("phone", "board", "laptop", "server", "host")
CLASSES = ("cpu", "cpu-tuned", "gpu", "npu")
CHUNK = 512  # tokens of a prompt that are computed at once; llama.cpp's default, too
# Factor within which the power of another model or program on the device is taken to lie, by how the profile's number is known. On the
# cores of an AGX Orin llama.cpp took 15.0 W and T-MAC 10.4 W for the same model (microsoft/T-MAC, README): 1.44. The cap of a power mode
# and a rule of thumb are no measurements: 2, a judgement.
POWER_FACTORS: Mapping[str, float] = MappingProxyType({"measured": 1.45, "derived": 1.45, "vendor": 2.0, "article": 2.0, "assumed": 2.0})
# An energy's band is at least that wide, either way. The bands of speed and power held two of five published energies, which were off by
# up to 2.3. This was set after they were seen: that all five lie inside now proves nothing.
ENERGY_FACTOR = 2.5
FLOAT_WIDTH = 4096  # hidden size that tau of a CPU is stated for: that of a 7B model

UNITS: Mapping[str, str] = MappingProxyType(
    {
        "dram_bytes_per_s": "B/s", "memory_bytes": "B", "usable_bytes": "B", "flash_bytes_per_s": "B/s", "cpu_int8_ops_per_s": "op/s",
        "gpu_int8_ops_per_s": "op/s", "npu_int8_ops_per_s": "op/s", "gpu_fp16_flops": "op/s", "cpu_fp32_flops": "op/s", "idle_w": "W",
        "cpu_w": "W", "cpu_tuned_w": "W", "accelerator_w": "W", "battery_wh": "Wh", "sustained_share": "", "throttle_after_s": "s",
        "throttle_c": "C",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, its source, and how it is known (one of `HOW`).

    >>> print(Quantity(76.8e9, "B/s", "9,600 MT/s x 64 bits", "derived"))
    76.8 GB/s (derived)
    """

    value: float
    unit: str
    source: str
    how: How

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"how={self.how!r} is not one of {', '.join(HOW)}")
        if not self.source.strip():
            raise ValueError(f"a number ({self.value:g} {self.unit}) without a source: say where it comes from")
        if not 0 < self.value < inf:
            raise ValueError(f"value={self.value!r} {self.unit} must be above 0; leave out what is not known")

    def __str__(self) -> str:
        return f"{engineering(self.value, self.unit)} ({self.how})"


def engineering(value: float, unit: str) -> str:
    """A value with its prefix: 76.8e9, "B/s" is "76.8 GB/s"."""
    if unit in ("B/s", "B", "op/s"):
        for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= power:
                return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def plain(value: float) -> str:
    """Three digits, and never a power of ten above one.

    >>> plain(4912.3), plain(19.138), plain(0.00081)
    ('4,912', '19.1', '0.00081')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class DeviceProfile:
    """What is known of one device. Numbers are `Quantity`s or None; `article`: what an article says instead of them.

    `soc`: the chip; devices with the same text are twins, which the fit keeps on one side. `cores`: those that a program would use for
    all it can get (performance cores where there are two kinds), 0 where no measurement needs it. `cpu_w`: watts of a CPU engine;
    `cpu_tuned_w`: of one of the class "cpu-tuned", where somebody measured it apart.
    `deploy`: the kind of device in `edgelab.devices` that `edgelab deploy` writes for, "" where none fits.
    """

    name: str
    title: str
    kind: str
    soc: str
    year: int
    deploy: str = ""
    note: str = ""
    cores: int = 0
    dram_bytes_per_s: Quantity | None = None
    memory_bytes: Quantity | None = None
    usable_bytes: Quantity | None = None
    flash_bytes_per_s: Quantity | None = None
    cpu_int8_ops_per_s: Quantity | None = None
    gpu_int8_ops_per_s: Quantity | None = None
    npu_int8_ops_per_s: Quantity | None = None
    gpu_fp16_flops: Quantity | None = None
    cpu_fp32_flops: Quantity | None = None
    idle_w: Quantity | None = None
    cpu_w: Quantity | None = None
    cpu_tuned_w: Quantity | None = None
    accelerator_w: Quantity | None = None
    battery_wh: Quantity | None = None
    sustained_share: Quantity | None = None
    throttle_after_s: Quantity | None = None
    throttle_c: Quantity | None = None
    article: Mapping[str, Quantity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} of {self.name!r} is not one of {', '.join(KINDS)}")
        if self.sustained_share is not None and self.sustained_share.value > 1:
            raise ValueError(f"sustained_share={self.sustained_share.value} of {self.name!r} must be at most 1")
        object.__setattr__(self, "article", dict(self.article))  # a plain dict: profiles can be pickled and copied

    @property
    def quantities(self) -> dict[str, Quantity]:
        """{field: number} of all numbers that are known."""
        return {name: value for name in UNITS if (value := getattr(self, name)) is not None}

    def peak(self, engine: str) -> tuple[str, Quantity | None]:
        """(field, number) of the operations per second of the unit that an engine class computes on."""
        name = {"gpu": "gpu_fp16_flops", "npu": "npu_int8_ops_per_s"}.get(engine, "cpu_int8_ops_per_s")
        return name, getattr(self, name)

    def watts(self, engine: str) -> tuple[str, Quantity | None]:
        """(field, number) of the power while an engine class decodes: its own where it was measured apart."""
        if engine == "cpu-tuned" and self.cpu_tuned_w is not None:
            return "cpu_tuned_w", self.cpu_tuned_w
        name = "cpu_w" if engine.startswith("cpu") else "accelerator_w"
        return name, getattr(self, name)

    def table(self) -> list[dict[str, str]]:
        """One dict of text per number: what the CLI and the notebooks print."""
        rows = [
            {"number": n.replace("_", " "), "value": engineering(q.value, q.unit), "how": q.how, "source": q.source}
            for n, q in self.quantities.items()
        ]
        return rows + [
            {"number": n.replace("_", " "), "value": engineering(q.value, q.unit), "how": q.how, "source": q.source}
            for n, q in self.article.items()
        ]

    def __repr__(self) -> str:
        known = ", ".join(f"{n} {engineering(q.value, q.unit)} ({q.how})" for n, q in list(self.quantities.items())[:4])
        number = f"{len(self.quantities)} of {len(UNITS)} numbers known"
        return f"DeviceProfile({self.name!r}: {self.title}, {self.soc}, {self.year}; {known}; {number})"

    def _repr_html_(self) -> str:
        return f"<p><b>{escape(self.title)}</b>, {escape(self.soc)}, {self.year}</p>" + html_table.lines(self.table())


def profile_of(name: str, entry: Mapping) -> DeviceProfile:
    """The profile of one table of devices.toml. Raises ValueError naming device and field for what is not of its form."""
    known = {f.name for f in fields(DeviceProfile)}
    values = {}
    for key, value in entry.items():
        if key == "article":
            values[key] = {k: _quantity(name, k, v) for k, v in value.items()}
        elif key in UNITS:
            values[key] = _quantity(name, key, value)
        elif key in known and key != "name":
            values[key] = value
        else:
            raise ValueError(f"[{name}] has a field {key!r} that is not known; use one of {', '.join(UNITS)}")
    absent = [k for k in ("title", "kind", "soc", "year") if k not in values]
    if absent:
        raise ValueError(f"[{name}] has no {absent[0]!r}")
    return DeviceProfile(name=name, **values)


def _quantity(device: str, key: str, value) -> Quantity:
    if key not in UNITS:
        raise ValueError(f"[{device}] has a number {key!r} that is not known; use one of {', '.join(UNITS)}")
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], int | float) and isinstance(value[2], str)):
        raise ValueError(f"[{device}] {key} = {value!r} is not of the form [value, how, source]")
    return Quantity(float(value[0]), UNITS[key], value[2], value[1])


@cache
def devices(path: str | Path | None = None) -> Mapping[str, DeviceProfile]:
    """{name: profile} of `path`, by default data/devices.toml. Raises ValueError for a table that is not of its form."""
    file = Path(path) if path is not None else data_dir() / "devices.toml"
    with file.open("rb") as f:
        return MappingProxyType({name: profile_of(name, entry) for name, entry in tomllib.load(f).items()})


def device(name: str) -> DeviceProfile:
    """The profile `name`. Raises ValueError that lists the names."""
    known = devices()
    if name not in known:
        near = get_close_matches(name, known, 3, 0.5)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"device={name!r} is not known; {meant}use one of {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Discrepancy:
    """A number of an article that is not the one this project goes by; `ratio`: article / ours."""

    device: str
    field: str
    ours: Quantity
    article: Quantity

    @property
    def ratio(self) -> float:
        return self.article.value / self.ours.value

    def row(self) -> dict[str, str]:
        return {
            "device": self.device,
            "number": self.field.replace("_", " "),
            "article": engineering(self.article.value, self.article.unit),
            "ours": engineering(self.ours.value, self.ours.unit),
            "article / ours": f"{self.ratio:.2f}",
            "how ours is known": self.ours.how,
            "source": self.ours.source,
        }


def discrepancies(profiles: Mapping[str, DeviceProfile] | None = None, *, tolerance: float = 0.05) -> list[Discrepancy]:
    """Where an article's number is off ours by more than `tolerance` (a share), the farthest first. Both are kept."""
    found = [
        Discrepancy(p.name, name, ours, said)
        for p in (devices() if profiles is None else profiles).values()
        for name, said in p.article.items()
        if (ours := getattr(p, name)) is not None and not 1 - tolerance <= said.value / ours.value <= 1 + tolerance
    ]
    return sorted(found, key=lambda d: -max(d.ratio, 1 / d.ratio))


# ------------------------------------------------------------------------------------------------- the roofline


@dataclass(frozen=True)
class Efficiency:
    """How near to the peaks a class of engines comes. `efficiency.py` fits them.

    `eta`: share of the DRAM's theoretical bandwidth while decoding, 0..1. `tau_s`: seconds per layer (on CPUs at a hidden size of 4096).
    `gamma`: share of the peak operations on a prompt; None where no measurement says. `spread`: the factor within which four of
    five measurements lay whose device was left out, 1.3 for 30 % either way; None where none was. `prefill_spread`: the same of prompts.
    `low`, `high`: the two sides apart, measured over predicted, 0.7 and 1.2 say; where they are None, `spread` either way.
    `sizes`: the fewest and the most active weights of a model among the rows that were fitted on.
    """

    engine: str
    eta: float
    tau_s: float
    gamma: float | None = None
    spread: float | None = None
    prefill_spread: float | None = None
    note: str = ""
    low: float | None = None
    high: float | None = None
    prefill_low: float | None = None
    prefill_high: float | None = None
    sizes: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.engine not in CLASSES:
            raise ValueError(f"engine={self.engine!r} is not one of {', '.join(CLASSES)}")
        if not 0 < self.eta <= 1 or self.tau_s < 0:
            raise ValueError(f"eta={self.eta} must be in 0 .. 1 and tau_s={self.tau_s} not negative")

    @property
    def factors(self) -> tuple[float, float] | None:
        """(lowest, highest) measured over predicted speed of decoding, None where nothing tells."""
        return _factors(self.low, self.high, self.spread)

    @property
    def prefill_factors(self) -> tuple[float, float] | None:
        """The same of prompts."""
        return _factors(self.prefill_low, self.prefill_high, self.prefill_spread)

    def overhead_s(self, shape: ModelShape) -> float:
        """Seconds per step that neither bytes nor operations explain."""
        width = shape.hidden / FLOAT_WIDTH if self.engine.startswith("cpu") else 1.0
        return self.tau_s * shape.layers * width

    def decode_s(self, shape: ModelShape, context: int, dram_bytes_per_s: float) -> float:
        """Seconds per token from memory and overhead alone: what the fit compares with measurements."""
        return shape.decode_bytes(context) / (self.eta * dram_bytes_per_s) + self.overhead_s(shape)


def _factors(low: float | None, high: float | None, spread: float | None) -> tuple[float, float] | None:
    if low is not None and high is not None:
        return low, high
    return None if spread is None else (1 / spread, spread)


@dataclass(frozen=True)
class Estimate:
    """A modelled value. `low`, `high`: the 10 % and 90 % quantiles of what measurements of left-out devices would make of it (None:
    nothing to tell by). Of published speeds whose device the band had not seen it held 79 %, 76 % with every device counted once, and 58 %
    in the class npu (`efficiency.coverage`). Of energies: `ENERGY_FACTOR`.

    `rests_on`: the numbers of the device that it was computed from, each with how it is known.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    rests_on: tuple[str, ...] = ()

    provenance = "modelled"

    @property
    def assumed(self) -> bool:
        """Whether a rule of thumb is among what it rests on."""
        return any(r.endswith("(assumed)") for r in self.rests_on)

    def __str__(self) -> str:
        if self.unit in ("B", "B/s"):
            return engineering(self.value, self.unit)
        band = "" if self.low is None or self.high is None else f" [{plain(self.low)}, {plain(self.high)}]"
        return f"{plain(self.value)}{band}" + (f" {self.unit}" if self.unit else "")


def _around(value: float, unit: str, factors: tuple[float, float] | None, rests_on: tuple[str, ...]) -> Estimate:
    low, high = (None, None) if factors is None else (value * factors[0], value * factors[1])
    return Estimate(value, unit, low, high, rests_on)


def _inverse(factors: tuple[float, float] | None) -> tuple[float, float] | None:
    """The factors of a time from those of a speed."""
    return None if factors is None else (1 / factors[1], 1 / factors[0])


def energy_factors(speed: tuple[float, float] | None, power: float, *, least: float = ENERGY_FACTOR) -> tuple[float, float]:
    """(lowest, highest) of power / speed over its predicted value: logarithms added in squares, as of independent errors.

    At least a factor of `least` either way.

    >>> [round(x, 3) for x in energy_factors((0.5, 1.0), 2.0)]  # speed may be half, not more; power twice or half
    [0.4, 2.665]
    """
    low, high = (1.0, 1.0) if speed is None else speed
    down, up = (max(hypot(log(side), log(power)), log(least)) for side in (high, low))
    return exp(-down), exp(up)


@dataclass(frozen=True)
class Memory:
    """Bytes in RAM while `context` tokens are held. `experts`: those that lie in RAM; `kept`: so many per layer of `of`."""

    dense: float
    experts: float
    kv: float
    activations: float
    usable: float | None
    kept: int = 0
    of: int = 0

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.kv + self.activations

    @property
    def fits(self) -> bool | None:
        """None where it is not known how much an app may take."""
        return None if self.usable is None else self.total <= self.usable

    @property
    def whole(self) -> bool:
        """Whether every expert lies in RAM."""
        return self.kept == self.of


# the estimates of a Prediction, with the words that tables use
LINES = MappingProxyType(
    {
        "decode": "decoding", "prefill": "reading a prompt", "first_token": "time to first token", "load": "load time from flash",
        "energy": "energy per token", "battery": "battery per hour", "steady": "decoding when hot", "flash_bytes": "flash read per token",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What one model would do on one device. Every `Estimate` is modelled; one that is None has its reason in `missing`.

    `binds`: what decoding waits for most: "bandwidth", "compute", "overhead" or "flash". `hit_rate`: share of the experts found in RAM.
    `warnings`: where nothing that was measured says whether such a prediction holds; its bands then say too little.
    """

    device: str
    model: str
    engine: str
    context: int
    prompt: int
    memory: Memory
    binds: str
    parts_s: Mapping[str, float]
    hit_rate: float | None
    sustained_share: float | None
    throttle_after_s: float | None
    decode: Estimate | None = None
    prefill: Estimate | None = None
    first_token: Estimate | None = None
    load: Estimate | None = None
    energy: Estimate | None = None
    battery: Estimate | None = None
    steady: Estimate | None = None
    flash_bytes: Estimate | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        return self.memory.fits

    @property
    def shown(self) -> dict[str, Estimate | None]:
        """{line of `LINES`: estimate} as it is printed: of a model that does not fit, reading it once (`load`) is no load time."""
        return {name: None if name == "load" and self.fits is False else getattr(self, name) for name in LINES}

    def rate_after(self, seconds: float) -> float | None:
        """Tokens per second after so many seconds of decoding, from cold; None where decoding or throttling is not known."""
        if self.decode is None or self.sustained_share is None:
            return None
        if self.throttle_after_s is None:
            return self.decode.value * (self.sustained_share if seconds else 1.0)
        return self.decode.value * (self.sustained_share + (1 - self.sustained_share) * exp(-seconds / self.throttle_after_s))

    def report(self) -> Report:
        """Rows of provenance "modelled" for the estimates that there are, the model's name in `model`, the device in `slice`."""
        rows = []
        for name, e in self.shown.items():
            words = LINES[name]
            if e is not None:
                metric = {"decode": "tokens_per_s", "prefill": "prefill_tokens_per_s"}.get(name, words)
                note = "; ".join(e.rests_on)
                rows.append(Row(self.model, metric, e.value, e.unit, self.device, e.low, e.high, provenance="modelled", note=note))
        return Report(tuple(rows))

    def table(self) -> list[dict[str, str]]:
        """One dict of text per line; a line that is not known says why."""
        m, rows = self.memory, []
        missing = {"load": self.missing["decode"]} | dict(self.missing) if self.fits is False else self.missing
        for name, e in self.shown.items():
            words = LINES[name]
            if e is None and name not in missing:
                continue
            rows.append(
                {
                    "": words,
                    "value": str(e) if e is not None else "unknown",
                    "provenance": "modelled" if e is not None else "",
                    "rests on": ", ".join(e.rests_on) if e is not None else missing[name],
                }
            )
        fits = {True: "fits", False: "does not fit", None: "unknown whether it fits"}[self.fits]
        parts = (
            f"weights {engineering(m.dense + m.experts, 'B')}, cache {engineering(m.kv, 'B')}, working {engineering(m.activations, 'B')}"
        )
        if m.of and not m.whole:
            parts += f"; {m.kept} of {m.of} experts per layer in RAM, hit rate {self.hit_rate:.0%}" if self.hit_rate is not None else ""
        room = "" if m.usable is None else f" of {engineering(m.usable, 'B')}"
        rows.append({"": "memory", "value": f"{engineering(m.total, 'B')}{room}: {fits}", "provenance": "modelled", "rests on": parts})
        rows.append({"": "decoding waits for", "value": self.binds, "provenance": "modelled", "rests on": self._said()})
        return rows + [{"": "warning", "value": "", "provenance": "", "rests on": w} for w in self.warnings]

    def _said(self) -> str:
        total = sum(self.parts_s.values())
        return ", ".join(f"{k} {1e3 * v:.3g} ms" for k, v in self.parts_s.items() if v) if total < inf else ""

    def __repr__(self) -> str:
        shown = "; ".join(f"{words} {e}" for name, words in LINES.items() if (e := self.shown[name]) is not None)
        fits = {True: "fits", False: "does not fit", None: "fits or not: unknown"}[self.fits]
        lacks = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        where = f"{self.model!r} on {self.device!r}, {self.engine}, context {self.context}"
        warned = f"; warnings: {'; '.join(self.warnings)}" if self.warnings else ""
        return f"Prediction({where}: {fits}, {self.binds} binds; {shown}{lacks}{warned}; modelled)"

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), f"{self.model} on {self.device}, engine class {self.engine}, modelled")


def fit_memory(profile: DeviceProfile, shape: ModelShape, context: int, chunk: int = CHUNK) -> Memory:
    """How the model lies in the device's memory: all of it, or with as many experts per layer as there is room for."""
    dense, kv, work = shape.dense_bytes + shape.embedding_bytes, shape.kv_bytes(context), shape.activation_bytes(chunk)
    usable = None if profile.usable_bytes is None else profile.usable_bytes.value
    kept = shape.experts
    if usable is not None and shape.moe_layers and shape.expert_bytes:
        room = usable - dense - kv - work
        kept = int(min(shape.experts, max(0, room // (shape.moe_layers * shape.expert_bytes))))
        if kept < shape.top_k:  # the experts of one token are wanted together: less than that is no cache
            kept = shape.experts
    return Memory(dense, shape.moe_layers * kept * shape.expert_bytes, kv, work, usable, kept if shape.moe_layers else 0, shape.experts)


def predict(
    profile: DeviceProfile | str,
    shape: ModelShape,
    *,
    context: int = 1024,
    prompt: int = 128,
    engine: str = "cpu-tuned",
    efficiency: Efficiency | None = None,
    hit_rate: float | None = None,
) -> Prediction:
    """What the model would do on the device. `context`: tokens in the cache; `prompt`: tokens to read before the first one is written.

    `engine`: the class of software; `efficiency`: instead of the fitted one of that class. `hit_rate`: measured share of the experts found
    in RAM, instead of that of equally likely experts; it is used only where experts have to stay on flash. Raises ValueError for a
    device, class or number that is not known or out of range.
    """
    profile = device(profile) if isinstance(profile, str) else profile
    if engine not in CLASSES:
        raise ValueError(f"engine={engine!r} is not one of {', '.join(CLASSES)}")
    if context < 0 or prompt < 1:
        raise ValueError(f"context={context} must not be negative, prompt={prompt} must be at least 1")
    if hit_rate is not None and not 0 <= hit_rate <= 1:
        raise ValueError(f"hit_rate={hit_rate} must be in 0 .. 1")
    if efficiency is None:
        from edgelab.efficiency import fitted

        efficiency = fitted()[engine]
    elif efficiency.engine != engine:
        efficiency = replace(efficiency, engine=engine)
    return _Roofline(profile, shape, context, prompt, efficiency, hit_rate).predict()


class _Roofline:
    """The steps of one `predict`, sharing their inputs."""

    def __init__(
        self, profile: DeviceProfile, shape: ModelShape, context: int, prompt: int, eff: Efficiency, hit_rate: float | None
    ) -> None:
        self.p, self.shape, self.context, self.prompt, self.eff = profile, shape, context, prompt, eff
        self.memory = fit_memory(profile, shape, context, min(prompt, CHUNK))
        self.missing: dict[str, str] = {}
        self.hit_rate = None
        if self.memory.of:
            uniform = self.memory.kept / self.memory.of
            self.hit_rate = 1.0 if self.memory.whole else hit_rate if hit_rate is not None else uniform

    def rests(self, *names: str) -> tuple[str, ...]:
        return tuple(f"{n} ({q.how})" for n in names if (q := getattr(self.p, n)) is not None)

    def need(self, line: str, *names: str) -> bool:
        """Whether the device has these numbers; else `missing[line]` says which it lacks."""
        lacks = [n for n in names if getattr(self.p, n) is None]
        if lacks:
            self.missing[line] = f"{self.p.name} has no {', no '.join(lacks)}"
        return not lacks

    def predict(self) -> Prediction:
        p, m = self.p, self.memory
        parts, decode = self.decode()
        prefill = self.prefill(decode is not None)
        load = None
        if self.need("load", "flash_bytes_per_s"):
            read = m.dense + m.experts  # what is kept in RAM; the other experts come later
            load = Estimate(read / p.flash_bytes_per_s.value, "s", rests_on=self.rests("flash_bytes_per_s"))
        first = None
        if prefill is not None:
            seconds = self.prompt / prefill.value
            first = _around(seconds, "s", _inverse(self.eff.prefill_factors), prefill.rests_on)
        else:
            self.missing["first_token"] = self.missing["prefill"]
        flash = None
        if m.of and not m.whole and self.hit_rate is not None:
            flash = Estimate((1 - self.hit_rate) * self.shape.active_expert_bytes, "B")
        return Prediction(
            device=p.name, model=self.shape.name, engine=self.eff.engine, context=self.context, prompt=self.prompt, memory=m,
            binds=max(parts, key=parts.get) if decode is not None else "memory" if m.fits is False else "unknown",
            parts_s=parts, hit_rate=self.hit_rate,
            sustained_share=None if p.sustained_share is None else p.sustained_share.value,
            throttle_after_s=None if p.throttle_after_s is None else p.throttle_after_s.value,
            decode=decode, prefill=prefill, first_token=first, load=load, flash_bytes=flash, missing=self.missing,
            warnings=self.warnings(), **self.power(decode),
        )  # fmt: skip

    def warnings(self) -> tuple[str, ...]:
        """What this prediction asks of the model that no published measurement has checked."""
        shape, found = self.shape, []
        if shape.max_context and max(self.context, self.prompt) > shape.max_context:
            what = f"context={self.context}" if self.context > shape.max_context else f"prompt={self.prompt}"
            found.append(f"{what} is beyond the model's max_position_embeddings={shape.max_context}: it was not made for so many tokens")
        if shape.moe_layers:
            found.append("a mixture of experts: none of the published measurements is of one, so nothing has checked this speed")
            if not self.memory.whole and self.memory.fits is not False:
                found.append("experts are read from flash for every token: none of the published measurements does that")
        if self.eff.sizes is not None:
            low, high = self.eff.sizes
            for ratio, than, bound in ((low / shape.active_weights, "fewer", low), (shape.active_weights / high, "more", high)):
                if ratio > 1.02:  # 2 %: counts of weights differ by that much with what is counted
                    found.append(
                        f"{shape.active_weights / 1e6:,.3g} million active weights, {ratio:,.3g} times {than} than in any model that "
                        f"{self.eff.engine} was fitted on ({bound / 1e6:,.0f} million): extrapolated"
                    )
        return tuple(found)

    def decode(self) -> tuple[dict[str, float], Estimate | None]:
        p, shape, eff, m = self.p, self.shape, self.eff, self.memory
        names = ["dram_bytes_per_s"]
        if m.fits is False:
            self.missing["decode"] = f"needs {engineering(m.total, 'B')} and an app may take {engineering(m.usable, 'B')}"
            return {"bandwidth": inf}, None
        if not self.need("decode", "dram_bytes_per_s"):
            return {"bandwidth": inf}, None
        parts = {
            "bandwidth": shape.decode_bytes(self.context) / (eff.eta * p.dram_bytes_per_s.value),
            "compute": 0.0,
            "overhead": eff.overhead_s(shape),
            "flash": 0.0,
        }
        peak_name, peak = p.peak(eff.engine)
        if eff.gamma is not None and peak is not None:
            seconds = shape.decode_ops(self.context) / (eff.gamma * peak.value)
            if seconds > parts["bandwidth"]:  # the slower of the two, as they overlap
                parts |= {"bandwidth": 0.0, "compute": seconds}
                names.append(peak_name)
        if m.of and not m.whole:
            if not self.need("decode", "flash_bytes_per_s"):
                return parts, None
            parts["flash"] = (1 - self.hit_rate) * shape.active_expert_bytes / p.flash_bytes_per_s.value
            names += ["flash_bytes_per_s", "usable_bytes"]
        return parts, _around(1 / sum(parts.values()), "tokens/s", eff.factors, self.rests(*names))

    def prefill(self, decodes: bool) -> Estimate | None:
        p, shape, eff, n = self.p, self.shape, self.eff, self.prompt
        name, peak = p.peak(eff.engine)
        if not decodes:
            self.missing["prefill"] = self.missing["decode"]
            return None
        if eff.gamma is None:
            self.missing["prefill"] = f"no measurement says how near the class {eff.engine} comes to the peak on a prompt"
            return None
        if not self.need("prefill", name):
            return None
        chunks = ceil(n / CHUNK)
        touched = shape.moe_layers * shape.experts_touched(min(n, CHUNK)) * shape.expert_bytes
        memory = chunks * (shape.dense_bytes + touched) / (eff.eta * p.dram_bytes_per_s.value)
        # position i of the prompt attends to i others: n / 2 on average
        compute = (n * 2.0 * shape.active_weights + shape.attention_ops * n * n / 2) / (eff.gamma * peak.value)
        flash = 0.0
        if self.memory.of and not self.memory.whole:  # each expert that is wanted and not kept is read once per chunk
            absent = shape.moe_layers * shape.experts_touched(min(n, CHUNK)) * (1 - self.memory.kept / self.memory.of) * shape.expert_bytes
            flash = chunks * absent / p.flash_bytes_per_s.value
        seconds = max(memory, compute) + chunks * eff.overhead_s(shape) + flash
        return _around(n / seconds, "tokens/s", eff.prefill_factors, self.rests("dram_bytes_per_s", name))

    def power(self, decode: Estimate | None) -> dict[str, Estimate | None]:
        p, eff = self.p, self.eff
        found: dict[str, Estimate | None] = {"energy": None, "battery": None, "steady": None}
        watts, power = p.watts(eff.engine)
        if decode is None:
            for line in ("energy", "steady"):
                self.missing[line] = self.missing["decode"]
        else:
            if self.need("energy", watts):
                factors = energy_factors(eff.factors, POWER_FACTORS[power.how])
                found["energy"] = _around(power.value / decode.value, "J", factors, (*self.rests(watts), *decode.rests_on))
            if self.need("steady", "sustained_share"):
                steady = decode.value * p.sustained_share.value
                found["steady"] = _around(steady, "tokens/s", eff.factors, (*self.rests("sustained_share"), *decode.rests_on))
        if p.kind == "phone" and decode is not None and self.need("battery", watts, "battery_wh"):
            factor = POWER_FACTORS[power.how]
            share = 100 * power.value / p.battery_wh.value
            found["battery"] = _around(share, "% per hour", (1 / factor, factor), self.rests(watts, "battery_wh"))
        return found
