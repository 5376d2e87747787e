"""Accuracy against size against latency: the arithmetic of the trade-off explorer, over a stored sweep of configurations.

A sweep (`data/sweep.parquet`, written by `edgelab sweep`) holds a row per configuration: its recipe, its counted bytes, its measured
quality with 95 % intervals, and the sums per document that a paired comparison needs. Everything here is a pure function of it, so
that the notebook's widget, the page without a kernel and the tests show the same numbers:

    select   rows that pass the filters                       latency  modelled milliseconds per token on a device (`device.predict`)
    pareto   rows that nothing beats on every axis at once    best     the one that is best, smallest or fastest within the budgets
    view     all of these for one `State` of the controls     compare  is the difference between two rows more than chance?

**The front.** Row a dominates b when it is nowhere worse and somewhere better; the front is what nothing dominates. It is read off
*measured* values: of rows whose qualities differ by chance alone, the lucky ones are on it. `compare` says for a pair what the
documents can tell apart, and how many rows a winner was picked from (the more, the luckier: `paired`, `halves`).

**What compares with what.** Exact match and bits per byte are a model's own and compare across models. KL divergence is a distance
from one original: edge-moe's rows and those of its student edge-phone share a reference, edge-dense's have another. `view` keeps one
reference, `compare` refuses two.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from math import inf
from types import MappingProxyType

import numpy as np

from edgelab.device import CLASSES, Prediction, devices, predict
from edgelab.shape import ModelShape
from edgelab.significance import Comparison as Comparison
from edgelab.significance import compare as compare
from edgelab.significance import halves as halves
from edgelab.significance import rivals as rivals
from edgelab.sweep_table import FILTERS, Quality, metric_of, quality
from edgelab.sweep_table import METRICS as METRICS
from edgelab.sweep_table import Sweep as Sweep


def select(sweep: Sweep, filters: Mapping[str, Iterable] | None = None) -> np.ndarray:
    """The rows whose columns hold one of the allowed values: bool [rows]. `filters` {column of `FILTERS`: values}; {} keeps all.

    An empty list of values keeps nothing. Raises ValueError for a column or value that the sweep does not have.
    """
    kept = np.ones(len(sweep), bool)
    for column, values in dict(filters or {}).items():
        if column not in FILTERS:
            raise ValueError(f"filter {column!r} is not known; use one of {', '.join(FILTERS)}")
        values = [values] if isinstance(values, str | int | float) else list(values)
        there = sweep.values(column)
        for value in values:
            if value not in there:
                raise ValueError(f"{column}={value!r} is in no row; the sweep has {', '.join(map(repr, there))}")
        kept &= np.isin(sweep[column], values) if values else False
    return kept


def pareto(*costs: np.ndarray) -> np.ndarray:
    """The rows that no other dominates, of 2 or 3 costs (less is better): bool [rows].

    Equal rows stay together: on the front or off it. A row with a NaN is never on the front and dominates nothing; infinities compare.
    O(n log n).

    >>> pareto(np.array([1, 2, 2, 3, 3]), np.array([9, 5, 5, 5, np.nan])).tolist()
    [True, True, True, False, False]
    """
    if len(costs) not in (2, 3) or len({len(c) for c in costs}) != 1:
        raise ValueError(f"{len(costs)} costs of lengths {[len(c) for c in costs]}; give two or three of one length")
    points = np.column_stack([np.asarray(c, np.float64) for c in costs])
    front = np.zeros(len(points), bool)
    known = np.flatnonzero(~np.isnan(points).any(1))
    if not len(known):
        return front
    order = known[np.lexsort(points[known].T[::-1])]  # by the first cost, ties by the second, then the third
    repeats = np.concatenate([[False], (points[order][1:] == points[order][:-1]).all(1)])
    if len(costs) == 2:  # the second cost must be below all before it
        y = points[order, 1]
        kept = y < np.concatenate([[inf], np.minimum.accumulate(y)[:-1]])
        kept[0] = True  # infinity is not below infinity
        front[order] = kept[np.maximum.accumulate(np.where(repeats, 0, np.arange(len(y))))]  # a repeated row has the verdict of its first
        return front
    # whatever dominates a row comes before it: keep the stairs of the other two costs, `ys` rising and `zs` falling
    ys: list[float] = []
    zs: list[float] = []
    verdict = False
    for i, (_, y, z), again in zip(order.tolist(), points[order].tolist(), repeats.tolist(), strict=True):
        if not again:
            at = bisect_right(ys, y)
            verdict = at == 0 or zs[at - 1] > z
            if verdict:
                start, end = bisect_left(ys, y), at
                while end < len(zs) and zs[end] >= z:
                    end += 1
                ys[start:end], zs[start:end] = [y], [z]
        front[i] = verdict
    return front


# --------------------------------------------------------------------------------------------------------------- latency


@dataclass(frozen=True, eq=False)
class Latency:
    """Modelled milliseconds per decoded token of each row, NaN where the model does not fit or the device lacks a number.

    `low`, `high`: the band in which four of five measurements of left-out devices lay, float64 [rows]. `missing` {row: why}.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    missing: Mapping[int, str]

    provenance = "modelled"


@lru_cache(maxsize=65_536)
def _milliseconds(shape: str, device: str, context: int, engine: str) -> tuple[float, float, float, str]:
    """(ms per token, low, high, why not) of one shape: what `latency` keeps."""
    p = predict(device, shape_of(shape), context=context, engine=engine)
    if p.decode is None:
        return np.nan, np.nan, np.nan, p.missing["decode"]
    low, high = (np.nan, np.nan) if p.decode.low is None else (1e3 / p.decode.high, 1e3 / p.decode.low)
    return 1e3 / p.decode.value, low, high, ""


@lru_cache(maxsize=8_192)
def shape_of(shape: str) -> ModelShape:
    """The ModelShape of a row's `shape` column."""
    known = {f.name for f in fields(ModelShape)}
    return ModelShape(**{k: v for k, v in json.loads(shape).items() if k in known})


def latency(sweep: Sweep, device: str, *, context: int = 512, engine: str = "cpu-tuned") -> Latency:
    """What each row would take per token on `device` with `context` tokens in the cache. Raises ValueError for what is not known.

    Rows of one shape are predicted once, and once for all calls.
    """
    if device not in devices():
        raise ValueError(f"device={device!r} is not known; use one of {', '.join(devices())}")
    if engine not in CLASSES:
        raise ValueError(f"engine={engine!r} is not one of {', '.join(CLASSES)}")
    if isinstance(context, bool) or not isinstance(context, int | np.integer) or context < 0:
        raise ValueError(f"context={context!r} must be a whole number of tokens, 0 or more")
    return _latency(sweep, device, int(context), engine)


@lru_cache(maxsize=256)
def _latency(sweep: Sweep, device: str, context: int, engine: str) -> Latency:
    found = [_milliseconds(s, device, context, engine) for s in sweep["shape"]]
    value, low, high = np.array([f[:3] for f in found]).T.copy()
    return Latency(value, low, high, {i: f[3] for i, f in enumerate(found) if f[3]})


def prediction(sweep: Sweep, i: int, device: str, *, context: int = 512, engine: str = "cpu-tuned") -> Prediction:
    """All that is modelled of row `i` on `device`: speed, first token, memory, energy, and what they rest on."""
    return replace(predict(device, shape_of(sweep["shape"][i]), context=context, engine=engine), model=sweep["label"][i])


# ----------------------------------------------------------------------------------------------- budgets, presets, state

OBJECTIVES = {"quality": "best quality", "size": "smallest", "latency": "fastest"}


@dataclass(frozen=True)
class State:
    """The controls, as the notebook and the page share them. Budgets: None is no limit; `quality_limit` is the worst that is allowed.

    `filters` ((column, (values ...)), ...). `chosen`, `pin_a`, `pin_b`: ids of rows, "" for none. `from_a`, `from_b`: (metric, number of
    rows) that a pin was picked from by looking at results, ("", 1) for one that was not; `pin` sets a pin together with it.
    """

    metric: str = "em_assistant"
    device: str = "galaxy-s22"
    engine: str = "cpu-tuned"
    context: int = 512
    objective: str = "quality"
    size_limit: float | None = None  # bytes
    latency_limit: float | None = None  # milliseconds per token
    quality_limit: float | None = None  # in the metric's unit
    filters: tuple[tuple[str, tuple], ...] = ()
    chosen: str = ""
    pin_a: str = ""
    pin_b: str = ""
    from_a: tuple[str, int] = ("", 1)
    from_b: tuple[str, int] = ("", 1)

    def __post_init__(self) -> None:
        metric_of(self.metric)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not known; use one of {', '.join(OBJECTIVES)}")
        for name in ("size_limit", "latency_limit", "quality_limit"):
            limit = getattr(self, name)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit < inf):
                raise ValueError(f"{name}={limit!r} must be a number, 0 or more, or None for no limit")
        given = self.filters.items() if isinstance(self.filters, Mapping) else self.filters
        object.__setattr__(self, "filters", tuple(sorted((c, tuple(v)) for c, v in given)))
        for name, id in (("from_a", self.pin_a), ("from_b", self.pin_b)):
            found = tuple(getattr(self, name))
            if len(found) != 2 or isinstance(found[1], bool) or not isinstance(found[1], int | np.integer) or found[1] < 1:
                raise ValueError(f'{name}={found!r} must be a metric and a whole number of rows, 1 or more; ("", 1) for no search')
            if found[0]:
                metric_of(found[0])
            object.__setattr__(self, name, (found[0], int(found[1])) if id and found[0] else ("", 1))

    @property
    def searched(self) -> int:
        """Of how many rows the better of the two pins was picked by this metric; 1 where neither was, or by another metric."""
        return max(n if metric == self.metric else 1 for metric, n in (self.from_a, self.from_b))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "State":
        d = json.loads(text)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(d) - known):
            raise ValueError(f"a state has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return cls(**d | {"filters": tuple((c, tuple(v)) for c, v in d.get("filters", ()))})


@dataclass(frozen=True)
class Preset:
    """A question with its answer's rule. `keep`: share of the original's quality that must stay (exact match) or, as `limit`, a bound in
    the metric's unit; `size_share`: of the original's bytes. The original is that of `anchor`."""

    name: str
    title: str
    metric: str
    objective: str
    keep: float | None = None
    limit: float | None = None
    size_share: float | None = None
    device: str | None = None
    meaning: str = ""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        p.name: p
        for p in (
            Preset("keep95", "smallest that keeps 95 % of exact match", "em_assistant", "size", keep=0.95,
                   meaning="at least 0.95 times the original's exact match on assistant; of those, the fewest bytes; arithmetic is not "
                   "asked for, and may go"),
            Preset("fastest-phone", "fastest on a phone of 2022", "em_assistant", "latency", keep=0.9, device="galaxy-s22",
                   meaning="at least 0.9 times the original's exact match on assistant; of those, the fewest modelled milliseconds on "
                   "a Galaxy S22, a top phone of its year"),
            Preset("lossless", "near-lossless and small", "kld", "size", limit=0.01,
                   meaning="KL divergence of at most 0.01 nats per token on prose and code; of those, the fewest bytes"),
            Preset("phone-2gb", "a 1.5B model in a 2 GB phone", "em_assistant", "quality", size_share=0.16, device="redmi-6a",
                   meaning="a phone of 2 GB lends an app 500 MB, 0.16 of the 3.1 GB that 1.5 billion weights take in 16 bits: at most "
                   "0.16 times the original's bytes; of those, the best exact match on assistant"),
            Preset("quarter", "best in a quarter of the bytes", "em_arithmetic", "quality", size_share=0.25,
                   meaning="at most a quarter of the original's bytes; of those, the best exact match on arithmetic"),
        )
    }
)  # fmt: skip


def anchor(sweep: Sweep, rows: np.ndarray | None = None) -> int | None:
    """The original that shares are of: of the models among `rows` the one with the most bytes; None where no original is stored."""
    models = sorted(set(sweep["model"] if rows is None else sweep["model"][rows]))
    found = [i for m in models if (i := sweep.original(m)) is not None]
    return max(found, key=lambda i: sweep["size_bytes"][i]) if found else None


def apply(sweep: Sweep, preset: Preset | str, state: State) -> State:
    """`state` with the preset's metric, objective, device and budgets; filters, context and pins stay, with what they were picked from.

    Raises ValueError.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not known; use one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    base = anchor(sweep, select(sweep, dict(state.filters)))
    if base is None and (preset.keep is not None or preset.size_share is not None):
        raise ValueError(f"preset {preset.name!r} is relative to an original, and the selected models have none in the sweep")
    limit = preset.limit
    if preset.keep is not None:
        limit = preset.keep * float(quality(sweep, preset.metric).value[base])
    size = None if preset.size_share is None else preset.size_share * float(sweep["size_bytes"][base])
    return replace(state, metric=preset.metric, objective=preset.objective, quality_limit=limit, size_limit=size, latency_limit=None,
                   device=preset.device or state.device)  # fmt: skip


def best(size: np.ndarray, latency_ms: np.ndarray, cost: np.ndarray, inside: np.ndarray, objective: str) -> int | None:
    """The row of `inside` that is best by `objective`; ties by the other two of (quality, size, latency), then the first row. None if none.

    `cost`: the metric times its sign, less is better. Rows without the objective's number don't count.
    """
    keys = {"quality": cost, "size": size, "latency": latency_ms}
    order = [keys[objective], *(k for name, k in keys.items() if name != objective)]
    rows = np.flatnonzero(inside & ~np.isnan(order[0]))
    if not len(rows):
        return None
    return int(rows[np.lexsort([np.where(np.isnan(k[rows]), inf, k[rows]) for k in order[::-1]])[0]])


@dataclass(frozen=True, eq=False)
class View:
    """What one state shows. `rows`, `inside`, `front_*` bool [rows]: passing the filters; also within the budgets; fronts of `rows`.

    `front` is that of quality, size and latency together, `front_size` and `front_latency` of quality with the one.
    `best`: row or None. `picked_from`: rows within the budgets that it was picked from. `notes`: what was left out, and why.
    """

    state: State
    quality: Quality
    latency: Latency
    rows: np.ndarray
    inside: np.ndarray
    front: np.ndarray
    front_size: np.ndarray
    front_latency: np.ndarray
    best: int | None
    picked_from: int
    notes: tuple[str, ...]


def view(sweep: Sweep, state: State) -> View:
    """All that the explorer draws for `state`: the one function that the page without a kernel has to agree with."""
    found, late = quality_of(sweep, state.metric), latency(sweep, state.device, context=state.context, engine=state.engine)
    rows, notes, m = select(sweep, dict(state.filters)), [], found.metric
    if m.kind == "kld":
        of = np.array([sweep.reference[name] for name in sweep["model"]], dtype=object)
        references = sorted(set(of[rows]), key=lambda r: (-(rows & (of == r)).sum(), r))
        if len(references) > 1:
            left = int((rows & (of != references[0])).sum())
            rows = rows & (of == references[0])
            notes.append(f"{left:,} rows are left out: their KL divergence is from {', '.join(references[1:])}, not from {references[0]}")
    cost, size = m.sign * found.value, sweep["size_bytes"]
    if missing := int((rows & np.isnan(late.value)).sum()):
        why = next(late.missing[i] for i in np.flatnonzero(rows & np.isnan(late.value)))
        notes.append(f"{missing:,} rows have no latency on {state.device}: {why}")
    inside = rows & ~np.isnan(cost)
    if state.size_limit is not None:
        inside &= size <= state.size_limit
    if state.latency_limit is not None:
        inside &= late.value <= state.latency_limit  # NaN is not within
    if state.quality_limit is not None:
        inside &= cost <= m.sign * state.quality_limit

    def front(*costs: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(sweep), bool)
        mask[rows] = pareto(*(c[rows] for c in costs))
        return mask

    return View(state, found, late, rows, inside, front(cost, size, late.value), front(cost, size), front(cost, late.value),
                best(size, late.value, cost, inside, state.objective), int(inside.sum()), tuple(notes))  # fmt: skip


def pinned(view: View, row: int) -> tuple[str, int]:
    """(metric, number of rows) that `row` was picked from if it is pinned while `view` is looked at; ("", 1) for a row like any other.

    The best row and those on a front stand out by their results: whoever pins one has searched, by hand or not. It was picked from the
    rows within the budgets; one that lies outside of them (on a front, which ends at no budget) from all that pass the filters.
    """
    if row != view.best and not (view.front[row] or view.front_size[row] or view.front_latency[row]):
        return "", 1
    return view.state.metric, view.picked_from if view.inside[row] else int(view.rows.sum())


def pin(sweep: Sweep, state: State, **pins: str) -> State:
    """`state` with pins set (`pin_a`, `pin_b`: an id, "" for none), each with what it was picked from in the view of `state`.

    Raises KeyError for an id that the sweep does not have, ValueError for another name.
    """
    if unknown := sorted(set(pins) - {"pin_a", "pin_b"}):
        raise ValueError(f"{unknown[0]}={pins[unknown[0]]!r} is no pin; use pin_a or pin_b")
    seen = view(sweep, state)
    found = {"from" + name.removeprefix("pin"): pinned(seen, sweep.index(id)) if id else ("", 1) for name, id in pins.items()}
    return replace(state, **pins, **found)


@lru_cache(maxsize=64)
def quality_of(sweep: Sweep, name: str) -> Quality:
    """`quality`, kept for the next call."""
    return quality(sweep, name)
