"""How near to its peaks software comes: fitted on published measurements, validated on others that were held out.

`data/published.toml` holds decoding speeds that others measured and published, each with its source. For a class of engines c

    seconds per token = bytes / (eta_c * B) + layers * tau_c * (hidden / 4096 on CPUs)

eta_c and tau_c minimise the squares of ln(predicted / measured) over the rows to fit on, where every *device* counts once, however many
rows it has. eta is at most 1: nothing reads faster than the memory. For a given tau * eta the best ln eta is a mean, so one number is
searched, on a grid that is refined around its best point: no start, the same result everywhere. gamma_c, the share of the peak
operations on a prompt, is the geometric mean over devices of (operations per second of the measured prompt / peak).

**The split.** Within a class, devices with the same chip (`soc`) are one family: an Orin Nano and an Orin Nano Super at higher clocks are
no two samples. Families are sorted by their first name; the first, third, fifth ... are fitted on, the others held out. A first split went
by device and had those two on opposite sides; it was replaced by this rule, which was stated before its result was looked at. The
*form* was chosen on the rows of the first split that were fitted on, leaving one device out at a time: of a share of the bandwidth by
itself, one that falls with the bandwidth, operations added on CPUs, and a time per layer with and without the hidden size, the last had
the least errors (LOG.md has them all). As the new split moved a few devices across, the form has seen some that are now held out.

**The bands.** For each row: ln(measured / predicted), predicted from all families of its class but its own. The 10 % and 90 % quantiles
of these, each device counted once, are the two sides; the prediction itself is always inside. A class of fewer than `FEW` families
(npu) takes the pooled quantiles of all classes. What such a band is worth is `coverage`: a family is left out of everything, fits and
quantiles, and its rows are tried. So measured, the bands of nominally 80 % held 79 % of the 96 rows, 76 % with every device counted
once: cpu 87 %, cpu-tuned 79 %, gpu 73 %, npu 58 % (three devices); those of prompts 61 % of 31 rows, 84 % with every device counted
once. `edgelab devices --errors` prints these shares.

**What this cannot do.** A class mixes engines, versions and settings, and a device is one sample; a class with two devices to fit on says
little about a third. CPUs whose cores cannot draw the memory's bandwidth (twelve Cortex-A78AE at the 204.8 GB/s of an AGX Orin) are
predicted two or three times too fast, and llama.cpp's 2-bit codes, which it unpacks slowly, too: the held-out median of the class `cpu` is
far above the 30 % that hold overall. Some rows used fewer threads than the device has cores (M2 Ultra 4 and 8 of 16, Raspberry Pi 5 two of
four, Surface Laptop 7 four of twelve: `Published.threads_of`), and are fitted as if they were the whole device: their source states no
other. `whole_device` leaves them out, and `edgelab devices --errors` says what the medians are then. No row is a mixture, none reads
from flash. `validation` prints every row, `leave_one_device_out` the same with each family predicted from all others.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import exp, log
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgelab.device import CLASSES, ENERGY_FACTOR, POWER_FACTORS, DeviceProfile, Efficiency, devices, energy_factors, plain, predict
from edgelab.paths import data_dir
from edgelab.shape import ModelShape, from_config

SPLITS = ("fit", "held-out")
SEEN = ("source", "copy")
COVERED = 0.8  # share of the left-out rows that a band is made to span
FEW = 4  # families that a class needs for a band of its own
_RATIO = (1e-7, 1.0)  # where the search looks for tau * eta, in seconds


@dataclass(frozen=True)
class Published:
    """One published measurement: `decode` tokens per second of `model` on `device`, at `bits` per weight and `context` tokens in the cache.

    `prefill`: tokens per second of a prompt of `prompt` tokens, None where not stated. `seen`: read in the source, or in a copy of it.
    """

    device: DeviceProfile
    model: str
    shape: ModelShape
    engine: str
    engine_class: str
    bits: float
    context: int
    decode: float
    split: str
    source: str
    seen: str = "source"
    prefill: float | None = None
    prompt: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        where = f"{self.model} on {self.device.name}"
        for name, value, allowed in (
            ("class", self.engine_class, CLASSES),
            ("split", self.split, SPLITS),
            ("seen", self.seen, SEEN),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} of {where} is not one of {', '.join(allowed)}")
        if not self.decode > 0 or not self.source.strip():
            raise ValueError(f"{where}: decode={self.decode} must be above 0, and the source must say where it comes from")
        if self.device.dram_bytes_per_s is None:
            raise ValueError(f"{where}: the device has no dram_bytes_per_s, which a speed is compared with")

    @property
    def family(self) -> str:
        """The chip: devices with the same one are on the same side of the split, and left out together."""
        return self.device.soc

    @property
    def partial(self) -> bool:
        """Whether fewer threads ran than the device has (large) cores. False where one of the two is not stated."""
        return bool(self.threads and self.threads < self.device.cores)

    @property
    def threads_of(self) -> str:
        """ "2 of 4" threads of cores; "" where no threads are stated."""
        return "" if not self.threads else f"{self.threads} of {self.device.cores}" if self.device.cores else str(self.threads)

    @property
    def bandwidth(self) -> float:
        return self.device.dram_bytes_per_s.value

    def predicted(self, eff: Efficiency) -> float:
        """Tokens per second by the model that is fitted."""
        return 1 / eff.decode_s(self.shape, self.context, self.bandwidth)

    @cached_property
    def peak_share(self) -> float | None:
        """Operations per second of the measured prompt as a share of the peak; None without a prompt, a peak, or low-bit weights.

        Rows of 16 bits are left out: their peak is not that of bytes.
        """
        _, peak = self.device.peak(self.engine_class)
        if self.prefill is None or peak is None or (self.bits >= 16 and self.engine_class != "gpu"):
            return None
        ops = 2.0 * self.shape.active_weights + self.shape.attention_ops * self.prompt / 2
        return self.prefill * ops / peak.value


@cache
def published(path: str | Path | None = None) -> tuple[Published, ...]:
    """The rows of data/published.toml. Raises ValueError for a row that is not of its form."""
    file = Path(path) if path is not None else data_dir() / "published.toml"
    with file.open("rb") as f:
        content = tomllib.load(f)
    return rows_of(content, devices())


def rows_of(content: Mapping, profiles: Mapping[str, DeviceProfile]) -> tuple[Published, ...]:
    """The rows of the parsed file `content`. Raises ValueError naming the row."""
    rows = []
    for i, r in enumerate(content["rows"]):
        lacks = [k for k in ("device", "model", "engine", "class", "bits", "context", "decode", "split", "source") if k not in r]
        if lacks:
            raise ValueError(f"row {i} of the published measurements has no {lacks[0]!r}: {r}")
        if r["device"] not in profiles:
            raise ValueError(f"row {i}: device={r['device']!r} is not in devices.toml")
        if r["model"] not in content["models"]:
            raise ValueError(f"row {i}: model={r['model']!r} has no [models] table")
        config = content["models"][r["model"]]["config"]
        rows.append(
            Published(
                device=profiles[r["device"]],
                model=r["model"],
                shape=from_config(config, float(r["bits"]), head=float(r.get("head_bits", r["bits"])), name=r["model"]),
                engine=r["engine"],
                engine_class=r["class"],
                bits=float(r["bits"]),
                context=r["context"],
                decode=float(r["decode"]),
                split=r["split"],
                source=r["source"],
                seen=r.get("seen", "source"),
                prefill=None if "prefill" not in r else float(r["prefill"]),
                prompt=r.get("prompt"),
                threads=r.get("threads"),
            )
        )
    return tuple(rows)


def split_by_rule(rows: Iterable[Published]) -> dict[tuple[str, str], str]:
    """{(class, device): split} by the rule: families (chips) sorted by the first name among them, alternating, the first one to fit on."""
    families: dict[str, dict[str, set[str]]] = {}
    for r in rows:
        families.setdefault(r.engine_class, {}).setdefault(r.family, set()).add(r.device.name)
    return {
        (c, d): SPLITS[i % 2] for c, found in families.items() for i, names in enumerate(sorted(found.values(), key=min)) for d in names
    }


def whole_device(rows: Sequence[Published]) -> tuple[Published, ...]:
    """The rows without those that used fewer threads than the device has cores."""
    return tuple(r for r in rows if not r.partial)


# ------------------------------------------------------------------------------------------------------------- fitting


def _weights(rows: Sequence[Published]) -> np.ndarray:
    """One over the number of rows of the same device, so that every device counts once."""
    names = [r.device.name for r in rows]
    return np.array([1 / names.count(n) for n in names])


def fit_class(rows: Sequence[Published], engine: str) -> tuple[float, float]:
    """(eta, tau in seconds) of one class: the least weighted squares of ln(predicted / measured), eta at most 1.

    Raises ValueError without a row.
    """
    if not rows:
        raise ValueError(f"no published row of the class {engine!r} to fit on")
    weights, measured = _weights(rows), np.log([1 / r.decode for r in rows])
    read = np.array([r.shape.decode_bytes(r.context) / r.bandwidth for r in rows])
    layers = np.array([Efficiency(engine, 1.0, 1.0).overhead_s(r.shape) for r in rows])  # what tau = 1 s would add
    low, high = map(log, _RATIO)
    for _ in range(12):
        ratios = np.linspace(low, high, 201)
        seconds = np.log(read + np.exp(ratios)[:, None] * layers)  # [ratios, rows] at eta = 1
        eta = np.minimum(0.0, ((seconds - measured) * weights).sum(-1) / weights.sum())  # the best ln eta for each ratio
        loss = ((seconds - eta[:, None] - measured) ** 2 * weights).sum(-1)
        best, step = loss.argmin(), ratios[1] - ratios[0]
        low, high = ratios[best] - 4 * step, ratios[best] + 4 * step
    return exp(eta[best]), exp(ratios[best] - eta[best])


def fit_prefill(rows: Sequence[Published]) -> float | None:
    """gamma: the geometric mean over devices of the share of the peak that prompts reached; None without a row that says."""
    usable = [r for r in rows if r.peak_share is not None]
    if not usable:
        return None
    w = _weights(usable)
    return float(exp((w * np.log([r.peak_share for r in usable])).sum() / w.sum()))


def fit(rows: Sequence[Published]) -> Mapping[str, Efficiency]:
    """{class: Efficiency} fitted on the rows of `rows` whose split is "fit"; the bands alone see the others (`bands`)."""
    decode, prompts = bands(rows), bands(rows, prompts=True)
    found = {}
    for engine in CLASSES:
        mine = [r for r in rows if r.engine_class == engine and r.split == "fit"]
        if not mine:
            continue
        eta, tau = fit_class(mine, engine)
        sizes = [float(r.shape.active_weights) for r in mine]
        low, high = decode.get(engine, (None, None))
        prompt_low, prompt_high = prompts.get(engine, (None, None))
        found[engine] = Efficiency(
            engine, eta, tau, fit_prefill(mine), _wider(low, high), _wider(prompt_low, prompt_high),
            note=f"fitted on {len(mine)} rows of {', '.join(sorted({r.device.name for r in mine}))}",
            low=low, high=high, prefill_low=prompt_low, prefill_high=prompt_high, sizes=(min(sizes), max(sizes)),
        )  # fmt: skip
    return MappingProxyType(found)


def _wider(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else max(1 / low, high)


def left_out(rows: Sequence[Published], engine: str, *, prompts: bool = False) -> list[tuple[Published, float]]:
    """(row, ln(measured / predicted)) of a class, each predicted from all families but its own; nothing for a class of one family."""
    mine = [r for r in rows if r.engine_class == engine and (not prompts or r.peak_share)]
    found = []
    for family in dict.fromkeys(r.family for r in mine):
        others = [r for r in mine if r.family != family]
        if not others:
            continue
        gamma = fit_prefill(others) if prompts else None
        eff = None if prompts else Efficiency(engine, *fit_class(others, engine))
        found += [(r, log(r.peak_share / gamma if prompts else r.decode / r.predicted(eff))) for r in mine if r.family == family]
    return found


def bands(rows: Sequence[Published], *, prompts: bool = False) -> dict[str, tuple[float, float]]:
    """{class: (low, high)} of measured over predicted: quantiles of `left_out`, at most 1 and at least 1. Pooled below `FEW` families."""
    found = {e: left_out(rows, e, prompts=prompts) for e in CLASSES}
    every = [x for of in found.values() for x in of]
    result = {}
    for engine, of in found.items():
        chosen = of if len({r.family for r, _ in of}) >= FEW else every
        if chosen and any(r.engine_class == engine for r in rows):
            low, high = (_quantile(chosen, (1 + side * COVERED) / 2) for side in (-1, 1))
            result[engine] = exp(min(low, 0.0)), exp(max(high, 0.0))
    return result


def _quantile(of: Sequence[tuple[Published, float]], q: float) -> float:
    """The quantile of the second numbers, every (class, device) counted once; between two of them by a line."""
    keys = [(r.engine_class, r.device.name) for r, _ in of]
    order = np.argsort([x for _, x in of], kind="stable")
    weights = np.array([1 / keys.count(k) for k in keys])[order]
    return float(np.interp(q, (weights.cumsum() - weights / 2) / weights.sum(), np.array([x for _, x in of])[order]))


@cache
def fitted() -> Mapping[str, Efficiency]:
    """The efficiencies of data/published.toml, by class: what `predict` uses."""
    return fit(published())


# ---------------------------------------------------------------------------------------------------------- validating


@dataclass(frozen=True)
class Checked:
    """A published row beside what was predicted for it."""

    row: Published
    predicted: float

    @property
    def error(self) -> float:
        """Share by which the prediction is off what was measured: 0.25 is 25 % too fast."""
        return self.predicted / self.row.decode - 1


@dataclass(frozen=True)
class Validation:
    """Rows with predictions. `held_out`: whether every one of them was predicted without itself and its device."""

    checked: tuple[Checked, ...]
    title: str
    held_out: bool = True

    @property
    def median_error(self) -> float:
        """Median over the rows of |predicted / measured - 1|."""
        return float(np.median([abs(c.error) for c in self.checked]))

    @property
    def median_device_error(self) -> float:
        """The same with every (class, device) counted once, by the median of its rows."""
        by: dict[tuple[str, str], list[float]] = {}
        for c in self.checked:
            by.setdefault((c.row.engine_class, c.row.device.name), []).append(abs(c.error))
        return float(np.median([np.median(v) for v in by.values()]))

    def by_class(self) -> dict[str, tuple[int, int, float]]:
        """{class: (rows, devices, median error)}."""
        found = {}
        for engine in CLASSES:
            mine = [c for c in self.checked if c.row.engine_class == engine]
            if mine:
                found[engine] = (len(mine), len({c.row.device.name for c in mine}), float(np.median([abs(c.error) for c in mine])))
        return found

    def class_table(self) -> list[dict[str, str]]:
        """One dict of text per class: its median and its worst row, so that no class hides behind the others."""
        rows = []
        for engine, (n, d, median) in self.by_class().items():
            worst = max((c for c in self.checked if c.row.engine_class == engine), key=lambda c: abs(log(c.predicted / c.row.decode)))
            rows.append(
                {
                    "class": engine, "rows": str(n), "devices": str(d), "median error": f"{median:.0%}",
                    "worst": f"{worst.error:+.0%}, {worst.row.model} at {worst.row.bits:g} bits on {worst.row.device.name}",
                }
            )  # fmt: skip
        return rows

    def table(self) -> list[dict[str, str]]:
        """One dict of text per row."""
        return [
            {
                "class": c.row.engine_class,
                "device": c.row.device.name,
                "model": c.row.model,
                "bits": f"{c.row.bits:g}",
                "engine": c.row.engine,
                "threads of cores": c.row.threads_of,
                "measured": f"{c.row.decode:.2f}",
                "predicted": f"{c.predicted:.2f}",
                "error": f"{c.error:+.0%}",
                "source": c.row.source,
            }
            for c in self.checked
        ]

    def say(self) -> str:
        """The medians in a sentence."""
        parts = ", ".join(f"{e} {m:.0%} ({n} rows of {d} devices)" for e, (n, d, m) in self.by_class().items())
        return (
            f"{self.title}: median error {self.median_error:.0%} over {len(self.checked)} rows, "
            f"{self.median_device_error:.0%} with every device counted once; {parts}."
        )

    def __repr__(self) -> str:
        return f"Validation({self.say()})"

    def _repr_html_(self) -> str:
        from edgelab.device import _html

        return f"<p>{self.say()}</p>" + _html(self.table())


def validation(rows: Sequence[Published] | None = None, split: str = "held-out") -> Validation:
    """The rows of one split predicted from those fitted on. `split` "fit" shows how close the fit itself is, which proves nothing."""
    rows = published() if rows is None else rows
    effs = fit(rows)
    mine = [r for r in rows if r.split == split and r.engine_class in effs]
    title = "Held-out devices" if split == "held-out" else "Devices fitted on"
    return Validation(tuple(Checked(r, r.predicted(effs[r.engine_class])) for r in mine), title, split == "held-out")


def leave_one_device_out(rows: Sequence[Published] | None = None) -> Validation:
    """Every row predicted from all rows of its class on other devices (a twin is left out, too), whatever their split."""
    rows = published() if rows is None else rows
    checked = [Checked(r, r.decode / exp(x)) for engine in CLASSES for r, x in left_out(rows, engine)]
    return Validation(tuple(checked), "Each device predicted from all others")


def coverage(rows: Sequence[Published] | None = None) -> list[dict[str, str]]:
    """One dict of text per class, and one for all: how many rows the bands held whose family was left out of fits *and* quantiles."""
    rows = published() if rows is None else rows
    held, prompts = covered(rows), covered(rows, prompts=True)
    found = []
    for engine in (*CLASSES, "all", "prompts, all"):
        mine = prompts if engine == "prompts, all" else [(r, ok) for r, ok in held if engine in ("all", r.engine_class)]
        if mine:
            found.append(
                {
                    "class": engine,
                    "rows": str(len(mine)),
                    "devices": str(len({(r.engine_class, r.device.name) for r, _ in mine})),
                    "rows inside": f"{share_inside(mine, by_device=False):.0%}",
                    "devices counted once": f"{share_inside(mine):.0%}",
                    "nominal": f"{COVERED:.0%}",
                }
            )
    return found


def covered(rows: Sequence[Published], *, prompts: bool = False) -> list[tuple[Published, bool]]:
    """(row, whether the band held it), with the row's family left out of the fit and of the quantiles of every class."""
    rows = [r for r in rows if r.peak_share] if prompts else rows
    found = []
    for family in dict.fromkeys(r.family for r in rows):
        others = [r for r in rows if r.family != family]
        limits = bands(others, prompts=prompts)
        for engine in CLASSES:
            mine, rest = ([r for r in of if r.engine_class == engine] for of in (rows, others))
            tried = [r for r in mine if r.family == family]
            if not tried or not rest:
                continue
            low, high = limits[engine]
            if prompts:
                gamma = fit_prefill(rest)
                found += [(r, low <= r.peak_share / gamma <= high) for r in tried]
            else:
                eff = Efficiency(engine, *fit_class(rest, engine))
                found += [(r, low <= r.decode / r.predicted(eff) <= high) for r in tried]
    return found


def share_inside(held: Sequence[tuple[Published, bool]], *, by_device: bool = True) -> float:
    """Share of rows that a band held, every (class, device) counted once or every row."""
    if not by_device:
        return float(np.mean([ok for _, ok in held]))
    by: dict[tuple[str, str], list[bool]] = {}
    for r, ok in held:
        by.setdefault((r.engine_class, r.device.name), []).append(ok)
    return float(np.mean([np.mean(v) for v in by.values()]))


@dataclass(frozen=True)
class MeasuredEnergy:
    """A published energy per token, in joules, beside what is predicted. `own_power`: the profile's watts come from the same table."""

    row: Published
    watts: float
    joules: float
    own_power: bool
    predicted: float
    low: float
    high: float
    alone: tuple[float, float]

    @property
    def factor(self) -> float:
        """Predicted over measured, or its inverse: how many times off, at least 1."""
        return max(self.predicted / self.joules, self.joules / self.predicted)

    @property
    def inside(self) -> bool:
        return self.low <= self.joules <= self.high

    @property
    def inside_alone(self) -> bool:
        """Whether the bands of speed and power alone hold it, without `ENERGY_FACTOR`."""
        return self.alone[0] <= self.joules / self.predicted <= self.alone[1]

    def line(self) -> dict[str, str]:
        """One dict of text."""
        return {
            "class": self.row.engine_class, "device": self.row.device.name, "model": self.row.model, "bits": f"{self.row.bits:g}",
            "engine": self.row.engine, "measured W": plain(self.watts), "measured J": plain(self.joules),
            "predicted J": f"{plain(self.predicted)} [{plain(self.low)}, {plain(self.high)}]", "times off": f"{self.factor:.2f}",
            "band": "inside" if self.inside else "outside",
            "of speed and power alone": "inside" if self.inside_alone else "outside",
            "power known from": "this very table" if self.own_power else "another row of it", "split of the speed": self.row.split,
        }  # fmt: skip


def energies(path: str | Path | None = None) -> tuple[MeasuredEnergy, ...]:
    """The energies of data/published.toml, predicted. The speed is fitted without them; the power, where `own_power`, is not blind.

    So where it is, what is tested is the speed alone. Raises ValueError for a row whose power times time is not its energy within 3 %.
    """
    file = Path(path) if path is not None else data_dir() / "published.toml"
    with file.open("rb") as f:
        content = tomllib.load(f)
    split, found = split_by_rule(published()), []
    for r in content["energy"]:
        whole = r | {"split": split.get((r["class"], r["device"]), "held-out")}
        (row,) = rows_of({"models": content["models"], "rows": [whole]}, devices())
        if abs(r["watts"] / r["decode"] / r["joules"] - 1) > 0.03:
            raise ValueError(f"{r['model']} on {r['device']}: {r['watts']} W / {r['decode']} tokens/s is not {r['joules']} J per token")
        e = predict(row.device, row.shape, context=row.context, engine=row.engine_class).energy
        factors, how = fitted()[row.engine_class].factors, row.device.watts(row.engine_class)[1].how
        alone = energy_factors(factors, POWER_FACTORS[how], least=1.0)
        found.append(MeasuredEnergy(row, r["watts"], r["joules"], r["own_power"], e.value, e.low, e.high, alone))
    return tuple(found)


def energy_validation(path: str | Path | None = None) -> list[dict[str, str]]:
    """One dict of text per published energy."""
    return [e.line() for e in energies(path)]


def say_energy(found: Sequence[MeasuredEnergy] | None = None) -> str:
    """How far energies are off, in a sentence."""
    found = energies() if found is None else found
    off = sorted(e.factor for e in found)
    return (
        f"Energy per token is an order of magnitude: {len(found)} published ones are off by a factor of {off[0]:.1f} to {off[-1]:.1f}; for "
        f"{sum(e.own_power for e in found)} of them the power was taken from the same table, so that only the speed was predicted. "
        f"Speed and power alone would make a band that holds {sum(e.inside_alone for e in found)} of them; it was widened to a factor of "
        f"{ENERGY_FACTOR:g} either way after that was seen. Expect up to two or three."
    )


def prefill_validation(rows: Sequence[Published] | None = None) -> list[dict[str, str]]:
    """One dict of text per held-out prompt: measured tokens per second, and those of the fitted share of the peak (compute alone)."""
    rows = published() if rows is None else rows
    effs, found = fit(rows), []
    for r in rows:
        if r.split == "held-out" and r.peak_share and r.engine_class in effs and effs[r.engine_class].gamma:
            predicted = r.prefill * effs[r.engine_class].gamma / r.peak_share
            found.append(
                {
                    "class": r.engine_class, "device": r.device.name, "model": r.model, "prompt": str(r.prompt),
                    "measured": f"{r.prefill:.1f}",
                    "predicted": f"{predicted:.1f}", "error": f"{predicted / r.prefill - 1:+.0%}",
                }
            )  # fmt: skip
    return found


def efficiency_table() -> list[dict[str, str]]:
    """One dict of text per class: the fitted numbers and what they were fitted on."""
    return [
        {
            "class": e,
            "share of the bandwidth": f"{f.eta:.2f}",
            "per layer": f"{1e6 * f.tau_s:.0f} us",
            "share of the peak, prompts": "" if f.gamma is None else f"{f.gamma:.3f}",
            "measured / predicted, 10 % to 90 %": "" if f.factors is None else f"{f.factors[0]:.2f} to {f.factors[1]:.2f}",
            "on prompts": "" if f.prefill_factors is None else f"{f.prefill_factors[0]:.2f} to {f.prefill_factors[1]:.2f}",
            "note": f.note,
        }
        for e, f in fitted().items()
    ]
