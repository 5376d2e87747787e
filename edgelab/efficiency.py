"""How near to its peaks software comes: fitted on published measurements, validated on others that were held out.

`data/published.toml` holds decoding speeds that others measured and published, each with its source. For a class of engines c

    seconds per token = bytes / (eta_c * B) + layers * tau_c * (hidden / 4096 on CPUs)

eta_c and tau_c minimise the squares of ln(predicted / measured) over the rows to fit on, where every *device* counts once, however many
rows it has. eta is at most 1: nothing reads faster than the memory. For a given tau * eta the best ln eta is a mean, so one number is
searched, on a grid that is refined around its best point: no start, the same result everywhere. gamma_c, the share of the peak
operations on a prompt, is the geometric mean over devices of (operations per second of the measured prompt / peak).

**The split** was set before anything was fitted: within a class the devices are sorted by name, the first, third, fifth ... are fitted
on, the others held out. The *form* was chosen on the fitted rows alone, leaving one device out at a time: of a share of the bandwidth by
itself, one that falls with the bandwidth, operations added on CPUs, and a time per layer with and without the hidden size, the last had
the least errors (LOG.md has them all).

**What this cannot do.** A class mixes engines, versions and settings, and a device is one sample; a class with two devices to fit on says
little about a third. CPUs whose cores cannot draw the memory's bandwidth (twelve Cortex-A78AE at the 204.8 GB/s of an AGX Orin) are
predicted two or three times too fast, and llama.cpp's 2-bit codes, which it unpacks slowly, too. `validation` prints every row,
`leave_one_device_out` the same with each device predicted from all others.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import exp, log
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgelab.device import CLASSES, DeviceProfile, Efficiency, devices
from edgelab.paths import data_dir
from edgelab.shape import ModelShape, from_config

SPLITS = ("fit", "held-out")
SEEN = ("source", "copy")
COVERED = 0.8  # share of the held-out rows that `Efficiency.spread` spans
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
    """{(class, device): split} by the rule that was set beforehand: sorted by name, alternating, the first one to fit on."""
    names: dict[str, set[str]] = {}
    for r in rows:
        names.setdefault(r.engine_class, set()).add(r.device.name)
    return {(c, d): SPLITS[i % 2] for c, found in names.items() for i, d in enumerate(sorted(found))}


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
    """{class: Efficiency} fitted on the rows of `rows` whose split is "fit"; the held-out ones give the spreads alone."""
    found = {}
    for engine in CLASSES:
        mine = [r for r in rows if r.engine_class == engine and r.split == "fit"]
        if not mine:
            continue
        eta, tau = fit_class(mine, engine)
        names = sorted({r.device.name for r in mine})
        found[engine] = Efficiency(engine, eta, tau, fit_prefill(mine), note=f"fitted on {len(mine)} rows of {', '.join(names)}")
    held = [r for r in rows if r.split == "held-out" and r.engine_class in found]
    errors = {e: [abs(log(r.predicted(found[e]) / r.decode)) for r in held if r.engine_class == e] for e in found}
    prompts = {
        e: [abs(log(found[e].gamma / r.peak_share)) for r in held if r.engine_class == e and r.peak_share and found[e].gamma] for e in found
    }
    every, every_prompt = ([x for found in of.values() for x in found] for of in (errors, prompts))
    return MappingProxyType(
        {
            e: Efficiency(
                e,
                eff.eta,
                eff.tau_s,
                eff.gamma,
                _spread(errors[e] if len(errors[e]) >= 5 else every),  # four of five of fewer rows would be all of them
                _spread(prompts[e] if len(prompts[e]) >= 5 else every_prompt),
                eff.note,
            )
            for e, eff in found.items()
        }
    )


def _spread(errors: Sequence[float]) -> float | None:
    return float(exp(np.quantile(errors, COVERED))) if errors else None


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

    def table(self) -> list[dict[str, str]]:
        """One dict of text per row."""
        return [
            {
                "class": c.row.engine_class,
                "device": c.row.device.name,
                "model": c.row.model,
                "bits": f"{c.row.bits:g}",
                "engine": c.row.engine,
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
    """Every row predicted from all rows of its class on other devices, whatever their split. A class of one device is left out."""
    rows = published() if rows is None else rows
    checked = []
    for engine in CLASSES:
        mine = [r for r in rows if r.engine_class == engine]
        for name in sorted({r.device.name for r in mine}):
            others = [r for r in mine if r.device.name != name]
            if others:
                eff = Efficiency(engine, *fit_class(others, engine))
                checked += [Checked(r, r.predicted(eff)) for r in mine if r.device.name == name]
    return Validation(tuple(checked), "Each device predicted from all others")


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
            "four of five held-out rows within": "" if f.spread is None else f"x or / {f.spread:.2f}",
            "note": f.note,
        }
        for e, f in fitted().items()
    ]
