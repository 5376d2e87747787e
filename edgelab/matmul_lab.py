"""What bits, groups, rows and activations cost in a quantized product: measured, counted, computed, and drawn. For notebook 02.

Three kinds of numbers, never mixed: *measured* ones (times, and the two ceilings of the roofline) belong to this machine
at this moment and carry their quartiles; *counted* ones (bytes) and *computed* ones (errors, limits) are the same tomorrow.

A product is timed on weights that come from memory, as in decoding, where all other layers lie between two uses of one:
every call takes the next of so many copies that together they do not fit into the last cache (`Rotation`).
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch

from edgelab import plots
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.kernels import simd
from edgelab.kernels._jit import threads
from edgelab.kernels.ceiling import integer_peak, read_bandwidth
from edgelab.kernels.matmul import ACTIVATIONS, qmatmul
from edgelab.kernels.pack import VECTOR, Tiles, aligned, tile
from edgelab.kernels.reference import BOUNDS, PAIRS, quantize_rows
from edgelab.methods.rtn import round_to_nearest
from edgelab.qtensor import QTensor
from edgelab.qtensor import pack as pack_codes
from edgelab.scheme import PerGroup, QuantScheme

# Bytes of copies: as many as the loop that measures the memory reads, for a cache that holds 32 MB still serves part of 96 MB
# (measured: 53 GB/s, against 43 of 256 MB); at most so many that a server's huge cache does not make a notebook take gigabytes.
ROTATED, MOST_ROTATED = 256 << 20, 512 << 20
SHORT = 2e-3  # seconds; a shorter call is made once before the one that counts, to bring code and threads back
LOOK = {"int8": 0, "float32": 1}  # which colour and marker activations have in every figure
# Byte products in the time of one float32 product: a vector holds four times as many, and both run on the same units;
# without VNNI a byte product takes three instructions; the portable way has no byte products to speak of.
FLOATS = {"avx512": 4.0, "avxvnni": 4.0, "sdot": 4.0, "avx2": 4 / 3, "portable": 1.0}


# ---------------------------------------------------------------------------------------------------------------- time
class Timing(NamedTuple):
    """Seconds per call: median and quartiles of `calls` calls."""

    median: float
    low: float
    high: float
    calls: int

    def __str__(self) -> str:
        return f"{duration(self.median)} [{duration(self.low, unit=False, like=self.median)}, {duration(self.high, like=self.median)}]"


def duration(seconds: float, *, unit: bool = True, like: float | None = None) -> str:
    """`seconds` in the unit that suits it (or suits `like`).

    >>> duration(58.14e-6), duration(0.01224), duration(2.5), duration(1.2e-4, unit=False, like=0.01)
    ('58.1 µs', '12.2 ms', '2.50 s', '0.120')
    """
    scale, name = next(((s, n) for s, n in ((1.0, "s"), (1e-3, "ms")) if (like or seconds) >= s), (1e-6, "µs"))
    value = seconds / scale
    digits = 0 if value >= 1000 else max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 3)}f}" + (f" {name}" if unit else "")


def timed(calls: Mapping[str, Callable[[], object]], seconds: float = 0.3, fewest: int = 5, most: int = 300) -> dict[str, Timing]:
    """How long each of `calls` takes. They take turns, so that whatever else the machine does falls on all alike.

    As many turns as fit into about `seconds`, `fewest` to `most`. Each is called twice before anything counts.
    """
    single = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        single[name] = time.perf_counter() - start
    turns = max(fewest, min(most, int(seconds / sum(t * (2 if t < SHORT else 1) for t in single.values()))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            if single[name] < SHORT:
                call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(t), *statistics.quantiles(t, n=4)[::2], len(t)) for name, t in times.items()}


def percent(share: float) -> str:
    """`share` in per cent with three digits that count, so that what stands in one column can be compared.

    >>> percent(0.053), percent(0.3), percent(2.59), percent(0.00546), percent(12.3), percent(0)
    ('5.30', '30.0', '259', '0.546', '1,230', '0.00')
    """
    return f"{100 * share:#.3g}".rstrip(".") if abs(100 * share) < 999.5 else f"{100 * share:,.0f}"


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the first processor's largest cache; 32 MiB where the system does not say."""
    sizes = []
    for index in folder.glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


class Rotation:
    """Memory for copies of a weight that do not fit into the last cache together; used anew for each weight."""

    def __init__(self, nbytes: int | None = None) -> None:
        self.nbytes = nbytes or min(max(ROTATED, 3 * last_level_cache()), MOST_ROTATED)
        self._buffer = aligned((self.nbytes,))
        self._buffer[:] = 1  # a page that was never written is one shared page of zeros

    def of(self, tiles: Tiles) -> Iterator[Tiles]:
        """Copies of `tiles` for ever, one after the other. The copies of the weight before are overwritten."""
        codes, scales = (-(-a.nbytes // VECTOR) * VECTOR for a in (tiles.codes, tiles.scales))
        copies = []
        for at in range(0, self.nbytes - codes - scales + 1, codes + scales):
            c = self._buffer[at : at + tiles.codes.nbytes].reshape(tiles.codes.shape)
            s = self._buffer[at + codes : at + codes + tiles.scales.nbytes].view(np.int16).reshape(tiles.scales.shape)
            c[:], s[:] = tiles.codes, tiles.scales
            copies.append(tiles._replace(codes=c, scales=s))
        return itertools.cycle(copies or [tiles])  # a weight larger than all of it leaves the cache by itself


def product(turn: Iterator[Tiles], x: np.ndarray, activations: str) -> Callable[[], None]:
    """A call that multiplies `x` with the next weight of `turn`."""
    first = next(turn)
    y = np.empty((len(x), first.out), np.float32)
    qmatmul(first, x, y, activations)  # compiles, the first time ever
    return lambda: qmatmul(next(turn), x, y, activations)


# ------------------------------------------------------------------------------------------------------------ roofline
class Roofline(NamedTuple):
    """What this machine can do at most with `threads` threads. `read` and `integer` are measured, the rest follows."""

    read: float  # bytes per second from memory
    integer: float  # operations per second on bytes; a multiplication and an addition are two
    threads: int
    way: str

    @property
    def floats(self) -> float:
        """Operations per second on float32, computed: see `FLOATS`."""
        return self.integer / FLOATS[self.way]

    def again(self) -> "Roofline":
        """The higher of these ceilings and of ones measured anew, in some 50 ms: a ceiling is what is possible undisturbed.

        Neighbours share the memory: where they come and go, one measurement may lie a third too low.
        """
        read, integer = read_bandwidth(seconds=0.03), integer_peak(seconds=0.01)
        return self._replace(read=max(self.read, read), integer=max(self.integer, integer))

    def peak(self, activations: str) -> float:
        return self.integer if activations == "int8" else self.floats

    def limit(self, nbytes: float, operations: float, activations: str) -> float:
        """Seconds that a product takes at least: to read its weights or to do its operations, whichever is longer.

        >>> Roofline(40e9, 1000e9, 1, "avx512").limit(2e6, 8e6, "int8")
        5e-05
        """
        return max(nbytes / self.read, operations / self.peak(activations))

    def bound(self, nbytes: float, operations: float, activations: str) -> str:
        """Which of the two is longer: "memory" or "arithmetic"."""
        return "memory" if nbytes / self.read >= operations / self.peak(activations) else "arithmetic"

    def crossover(self, bits_per_weight: float, activations: str) -> float:
        """Rows of activations from which on arithmetic takes longer than reading the weights.

        >>> Roofline(40e9, 1000e9, 1, "avx512").crossover(4.5, "int8")  # 4.5 / 8 bytes against two operations
        7.03125
        """
        return bits_per_weight / 8 / self.read * self.peak(activations) / 2

    def __str__(self) -> str:
        return (
            f"{self.threads} thread{'s' * (self.threads > 1)}, {self.way}: memory {self.read / 1e9:.1f} GB/s (measured), byte products "
            f"{self.integer / 1e9:,.0f} GOPS (measured), float32 products {self.floats / 1e9:,.0f} GOPS (computed)"
        )


def measure_roofline() -> Roofline:
    """The ceilings of this machine, for as many threads as the kernels use; measured now, in about a second."""
    return Roofline(read_bandwidth(), integer_peak(), threads(), simd.way())


class Point(NamedTuple):
    """One product, measured, beside what the roofline allows (see `under`)."""

    name: str
    tokens: int
    activations: str
    nbytes: int  # of the weight, scales counted
    operations: int
    timing: Timing
    limit: float = math.nan  # seconds
    bound: str = ""

    def under(self, roof: Roofline) -> "Point":
        """This product with its limit by `roof`."""
        args = (self.nbytes, self.operations, self.activations)
        return self._replace(limit=roof.limit(*args), bound=roof.bound(*args))

    @property
    def share(self) -> float:
        """Of the limit that the product reached; 1 is the roof."""
        return self.limit / self.timing.median

    @property
    def row(self) -> dict[str, str]:
        """For a table."""
        return {
            "rows (tokens)": str(self.tokens),
            "activations": self.activations,
            "operations per weight byte (counted)": f"{self.operations / self.nbytes:,.1f}",
            "limit (computed)": f"{duration(self.limit)}, {self.bound}",
            "time (measured)": str(self.timing),
            "share of the limit": f"{self.share:.2f}",
        }


def tiles_of(q: QTensor) -> Tiles:
    """The weight as the kernels read it."""
    group = q.scheme.granularity.size if isinstance(q.scheme.granularity, PerGroup) else 0
    return tile(q.packed, q.scales.view(np.int16), q.scheme.bits, group, q.shape[-1])


def repeated(q: QTensor, times: int) -> QTensor:
    """The weight [out, in] beside itself, [out, times * in]: the same codes and scales, at the size of a larger model.

    Raises ValueError where a row's codes do not end on a byte.
    """
    if q.shape[-1] * q.scheme.bits % 8:
        raise ValueError(f"rows of {q.shape[-1]} codes of {q.scheme.bits} bits end inside a byte; use a multiple of 8 inputs")
    scales = np.tile(q.scales, (1, times)) if isinstance(q.scheme.granularity, PerGroup) else q.scales
    return QTensor(np.tile(q.packed, (1, times)), scales, (*q.shape[:-1], times * q.shape[-1]), q.scheme)


def sweep(
    q: QTensor,
    x: np.ndarray,
    tokens: Sequence[int],
    roof: Roofline,
    rotation: Rotation,
    activations: Sequence[str] = ACTIVATIONS,
    seconds: float = 0.3,
) -> tuple[list[Point], Roofline]:
    """The product of `q` with the first rows of `x`, for each number of `tokens` and kind of `activations`; and the roof.

    The ceilings are measured again beside each product, and the highest count (`Roofline.again`).
    """
    tiles, found = tiles_of(q), []
    turn = rotation.of(tiles)
    for t in tokens:
        rows = np.ascontiguousarray(x[:t])
        times = timed({a: product(turn, rows, a) for a in activations}, seconds)
        operations = 2 * t * q.shape[0] * q.shape[1]
        found += [Point(str(q.scheme), t, a, tiles.nbytes, operations, times[a]) for a in activations]
        roof = roof.again()
    return [p.under(roof) for p in found], roof


def cached_and_not(q: QTensor, x: np.ndarray, roof: Roofline, rotation: Rotation, activations: str = "int8") -> dict[str, Point]:
    """{"from memory", "from the cache"}: the same product with copies taken in turn, and with one copy again and again."""
    tiles = tiles_of(q)
    operations, found = 2 * len(x) * q.shape[0] * q.shape[1], {}
    for name, turn in (("from memory", rotation.of(tiles)), ("from the cache", itertools.repeat(tiles))):
        (timing,) = timed({name: product(turn, x, activations)}).values()
        found[name] = Point(name, len(x), activations, tiles.nbytes, operations, timing)
        roof = roof.again()
    return {name: p.under(roof) for name, p in found.items()}


def contest(q: QTensor, x: np.ndarray, rotation: Rotation) -> dict[str, Timing]:
    """The kernel beside a float32 product by torch, and beside NumPy that dequantizes first; all weights from memory.

    Three groups, one after the other: the kernels take turns as in `sweep`, for beside the others, which
    push out caches and slow the clock, the same product took a third longer (88 instead of 67 µs) and would agree with no other table.
    """
    turn, before = rotation.of(tiles_of(q)), torch.get_num_threads()
    dense = torch.from_numpy(q.dequantize())
    copies = max(2, min(48, math.ceil(rotation.nbytes / (4 * dense.numel()))))
    floats = itertools.cycle([dense, *(dense.clone() for _ in range(copies - 1))])
    rows = torch.from_numpy(x)
    groups = (
        {f"kernel, {a} activations": product(turn, x, a) for a in reversed(ACTIVATIONS)},
        {"float32 weights, torch": lambda: torch.nn.functional.linear(rows, next(floats))},
        {
            "naive: dequantize, then multiply, NumPy": lambda: x @ q.dequantize().T,
            "of it, dequantize alone": q.dequantize,
            "of it, unpack the codes alone": q.codes,
            "of it, multiply alone": lambda: x @ next(floats).numpy().T,
        },
    )
    torch.set_num_threads(threads())
    try:
        return {name: timing for calls in groups for name, timing in timed(calls).items()}
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- is it the same answer?
class Comparison(NamedTuple):
    """How far a kernel lies from its NumPy twin, in units of what rounding alone can do."""

    kernel: str
    numbers: int
    largest: float  # of |kernel - twin| / bound; at most 1 where rounding explains it

    @property
    def agrees(self) -> bool:
        return self.largest <= 1  # false for NaN

    @property
    def row(self) -> dict[str, str]:
        return {
            "kernel": self.kernel,
            "numbers compared": f"{self.numbers:,}",
            "largest difference, of what rounding explains": f"{self.largest:.3g}",
            "same answer": "yes" if self.agrees else "NO",
        }


def compare(kernel: str, args: tuple, given: tuple | None = None) -> Comparison:
    """The kernel of that name in `PAIRS` against its twin on `args`; the kernel gets `given` instead, if there is any."""
    run, reference, _ = PAIRS[kernel]
    given = args if given is None else given
    run(*given)
    comp, ref = given[-1].astype(np.float64), args[-1]
    reference(*args)
    bound = BOUNDS[kernel](*args)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(comp == ref, 0.0, np.abs(comp - ref) / bound)
    return Comparison(kernel, shares.size, float(shares.max(initial=0.0)))


def compare_all(seed: int = 0, prefix: str = "qmatmul", **sizes) -> list[Comparison]:
    """`compare` of every kernel whose name begins with `prefix`, over all bit widths, on random arguments."""
    found = []
    for name in (n for n in PAIRS if n.startswith(prefix)):
        parts = [compare(name, PAIRS[name][2](np.random.default_rng(seed), bits=bits, **sizes)) for bits in (2, 3, 4, 8)]
        found.append(Comparison(name, sum(p.numbers for p in parts), float(np.max([p.largest for p in parts]))))
    return found


def with_a_flipped_bit(args: tuple) -> tuple:
    """`args` of a matmul kernel, with the lowest bit of the very first code flipped and an output of its own."""
    tiles, *rest, y = args
    codes = tiles.codes.copy()
    codes.reshape(-1)[0] ^= 1
    return (tiles._replace(codes=codes), *rest, y.copy())


# --------------------------------------------------------------------------------------------------------------- errors
class WeightError(NamedTuple):
    """What rounding did to a weight, in units of the weight's own root mean square; and its bytes."""

    scheme: QuantScheme
    nbytes: int
    bits_per_weight: float
    rms: float
    worst: float

    @property
    def row(self) -> dict[str, str]:
        return {
            "scheme": str(self.scheme),
            "bytes (counted)": f"{self.nbytes:,}",
            "bits per weight (counted)": f"{self.bits_per_weight:.3f}",
            "error, % of the weight's root mean square (computed)": percent(self.rms),
            "largest error, % of the same (computed)": percent(self.worst),
        }


def weight_error(weight: torch.Tensor, q: QTensor) -> WeightError:
    """The error of `q` as a stand-in for `weight`."""
    size = float(weight.double().square().mean().sqrt()) or 1.0
    error = (weight.double() - torch.from_numpy(q.dequantize()).double()).abs()
    return WeightError(q.scheme, q.nbytes, q.bits_per_weight, float(error.square().mean().sqrt()) / size, float(error.max()) / size)


def weight_errors(weight: torch.Tensor, schemes: Sequence[str]) -> list[WeightError]:
    """The error of `weight` [out, in] rounded to nearest, for each of `schemes`."""
    return [weight_error(weight, round_to_nearest(weight, QuantScheme.parse(s))) for s in schemes]


class OutputError(NamedTuple):
    """What a product lost, as a share of its own root mean square; and how often its largest output stayed the largest."""

    scheme: QuantScheme
    float_activations: float
    int8_activations: float
    between: float  # the two kernels' outputs: what int8 activations alone changed
    same_float: float
    same_int8: float

    @property
    def row(self) -> dict[str, str]:
        return {
            "scheme": str(self.scheme),
            "output error, float32 activations, % (computed)": percent(self.float_activations),
            "output error, int8 activations, % (computed)": percent(self.int8_activations),
            "int8 activations alone, % (computed)": percent(self.between),
            "same largest output, float32, %": f"{100 * self.same_float:.1f}",
            "same largest output, int8, %": f"{100 * self.same_int8:.1f}",
        }


def output_error(weight: torch.Tensor, q: QTensor, x: np.ndarray) -> OutputError:
    """The error of the kernels' products of `q` with x float32 [tokens, in], against `weight` in float64."""
    ref = x.astype(np.float64) @ weight.double().numpy().T
    tiles, y = tiles_of(q), {}
    for a in ACTIVATIONS:
        y[a] = np.empty(ref.shape, np.float32)
        qmatmul(tiles, x, y[a], a)
    size = math.sqrt(np.square(ref).mean()) or 1.0
    away = [math.sqrt(np.square(d).mean()) / size for d in (y["float32"] - ref, y["int8"] - ref, y["int8"] - y["float32"].astype(float))]
    same = [float((y[a].argmax(1) == ref.argmax(1)).mean()) for a in ("float32", "int8")]
    return OutputError(q.scheme, *away, *same)


def output_errors(weight: torch.Tensor, x: np.ndarray, schemes: Sequence[str]) -> list[OutputError]:
    """`output_error` of `weight` [out, in] rounded to nearest, for each of `schemes`."""
    return [output_error(weight, round_to_nearest(weight, QuantScheme.parse(s)), x) for s in schemes]


def error_outline(weight: torch.Tensor, q: QTensor, bins: int = 81) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the histogram of the errors as a line of steps: x in % of the weights' root mean square, y in % of the weights per x.

    The area is 100 % for every scheme, so that two outlines can be compared.
    """
    size = float(weight.double().square().mean().sqrt()) or 1.0
    error = 100 * (torch.from_numpy(q.dequantize()).double() - weight.double()).numpy().ravel() / size
    end = float(np.abs(error).max()) * 1.02 or 1e-6
    counts, edges = np.histogram(error, bins, (-end, end))
    density = 100 * counts / error.size / (edges[1] - edges[0])
    return np.repeat(edges, 2), np.concatenate([[0], np.repeat(density, 2), [0]])


# --------------------------------------------------------------------------------------------------------------- figures
def time_against_tokens(points: Sequence[Point], roof: Roofline) -> go.Figure:
    """Measured times with their quartiles, and the limit that the roofline computes, against the rows of activations."""
    first = points[0]
    fig = go.Figure(
        layout={"template": plots.TEMPLATE, "title": {"text": f"Time of a product, {first.name}: measured, and the computed limit"}}
    )
    fig.update_xaxes(type="log", title_text="rows of activations (tokens)", dtick=1, tickformat=",")  # whole decades: 1, 10, 100
    fig.update_yaxes(type="log", title_text="microseconds", dtick=1, tickformat=",")
    for a in dict.fromkeys(p.activations for p in points):
        i, mine = LOOK[a], [p for p in points if p.activations == a]
        style = {"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i], "size": 9}
        fig.add_scatter(
            x=[p.tokens for p in mine],
            y=[1e6 * p.timing.median for p in mine],
            error_y={
                "type": "data",
                "array": [1e6 * (p.timing.high - p.timing.median) for p in mine],
                "arrayminus": [1e6 * (p.timing.median - p.timing.low) for p in mine],
            },
            mode="markers",
            marker=style,
            name=f"{a}, measured",
            text=[f"{p.tokens} rows: {p.timing}, {p.share:.2f} of the limit ({p.bound})" for p in mine],
            hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        )
        cross = roof.crossover(8 * first.nbytes / (first.operations / 2 / first.tokens), a)
        ends = (min(p.tokens for p in mine), max(p.tokens for p in mine))
        x = sorted({*ends, *([cross] if ends[0] < cross < ends[1] else [])})
        per_row = first.operations / first.tokens
        fig.add_scatter(
            x=x,
            y=[1e6 * roof.limit(first.nbytes, per_row * t, a) for t in x],
            mode="lines",
            line={"color": plots.OKABE_ITO[i], "dash": "solid" if a == "int8" else "dash"},
            marker={"color": plots.OKABE_ITO[i]},
            name=f"{a}, limit",
            hovertemplate="%{x:.1f} rows: at least %{y:.3g} µs<extra>%{fullData.name}</extra>",
        )
    return fig


def say_times(points: Sequence[Point], roof: Roofline) -> str:
    """The sentence beside `time_against_tokens`."""
    parts = []
    for a in dict.fromkeys(p.activations for p in points):
        mine = [p for p in points if p.activations == a]
        one, many = mine[0], mine[-1]
        cross = roof.crossover(8 * one.nbytes / (one.operations / 2 / one.tokens), a)
        parts.append(
            f"With {a} activations {one.tokens} row{'s' * (one.tokens > 1)} took {duration(one.timing.median)}, {one.share:.2f} of what "
            f"{one.bound} allows, and {many.tokens} rows {duration(many.timing.median)}, {many.share:.2f} of what {many.bound} allows: "
            f"{many.timing.median / one.timing.median:,.0f} times as long for {many.tokens // one.tokens} times the work. "
            f"The limit's knee lies at {cross:.1f} rows."
        )
    return " ".join(parts)


def error_against_bits(errors: Sequence[WeightError]) -> go.Figure:
    """The weights' error against bits per weight, scales counted: a line per granularity through the bit widths."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Error of a weight against what it takes"}})
    fig.update_xaxes(title_text="bits per weight, scales counted")
    fig.update_yaxes(type="log", title_text="error, % of the weight's root mean square")
    for i, kind in enumerate(dict.fromkeys(str(e.scheme.granularity) for e in errors)):
        mine = [e for e in errors if str(e.scheme.granularity) == kind]
        fig.add_scatter(
            x=[e.bits_per_weight for e in mine],
            y=[100 * e.rms for e in mine],
            mode="lines+markers",
            marker={"color": plots.OKABE_ITO[i], "symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)], "size": 9},
            name={"tensor": "one scale per matrix", "row": "per row"}.get(kind, f"per group of {kind[1:]}"),
            text=[str(e.scheme) for e in mine],
            hovertemplate="%{text}: %{x:.3f} bits, %{y:.3g} %<extra></extra>",
        )
    return fig


def say_errors(errors: Sequence[WeightError]) -> str:
    """The sentence beside `error_against_bits`: for each bit width the best and the worst granularity."""
    parts = []
    for bits in dict.fromkeys(e.scheme.bits for e in errors):
        mine = sorted((e for e in errors if e.scheme.bits == bits), key=lambda e: e.rms)
        best, worst = mine[0], mine[-1]
        parts.append(
            f"at {bits} bits {best.scheme} is off by {percent(best.rms)} % ({best.bits_per_weight:.2f} bits each) and {worst.scheme} "
            f"by {percent(worst.rms)} % ({worst.bits_per_weight:.2f})"
        )
    return f"Error in % of the weight's root mean square: {'; '.join(parts)}."


# ----------------------------------------------------------------------------------------------------------- exercises

READ_GB_S, PRODUCTS_G_S = 40, 800  # of a machine in the exercise: memory, and multiply-adds of bytes


def check_knee(answer) -> Verdict:
    """Exercise 1: from how many rows on a product with an int4-g32 weight takes longer to compute than to read."""
    if answer is None:
        return unanswered("a number of rows")
    if (x := numbers(answer, 1)) is None:
        return not_yet("one number, please")
    bits = QuantScheme.parse("int4-g32").bits_per_weight((4096, 4096))
    wanted = bits / 8 / READ_GB_S * PRODUCTS_G_S
    if wanted - 0.05 <= x[0] <= math.ceil(wanted) + 0.05:
        return right(
            f"4.5 / 8 bytes per weight at 40 GB/s, and one multiply-add per weight and row at 800 G/s: {wanted:.2f} rows, whatever the size"
        )
    hints = {
        4 / 8 / READ_GB_S * PRODUCTS_G_S: "int4-g32 reads 4.5 bits per weight, scales and all",
        wanted / 2: "800 G/s counts multiply-adds, one per weight and row; an operation is not counted twice",
        8 * wanted: "GB are bytes, and 4.5 is a number of bits",
        1 / wanted: "turn it over: how many rows are computed in the time of reading the weight once?",
        PRODUCTS_G_S / READ_GB_S: "that is the number of multiply-adds per byte; a weight takes less than a byte",
        2 / READ_GB_S * PRODUCTS_G_S: "that would be weights of 16 bits",
    }
    return hint(x[0], hints, "per weight: time to read its bits = rows * time of a multiply-add", 0.05)


def check_pack(answer) -> Verdict:
    """Exercise 2: a function of codes uint8 [n], each 0 .. 15, that returns them two to a byte, the first in the low half."""
    r = np.random.default_rng(1)
    cases = [
        Case("the codes 1 and 2", (np.array([1, 2], np.uint8),), "the first code is in the low half: 1 + 16 * 2"),
        Case("four codes", (np.array([3, 0, 15, 9], np.uint8),), "neighbours share a byte: codes 0 and 1, then 2 and 3"),
        Case("an odd number of codes", (np.array([7, 1, 12], np.uint8),), "the last byte has one code, and zeros in its high half"),
        Case("one code", (np.array([5], np.uint8),)),
        Case("a row of 257 codes", (r.integers(0, 16, 257, np.uint8),)),
    ]
    form = "a function of an array of codes (uint8, each 0 .. 15) that returns the bytes as an array"
    praise = "this is how a QTensor stores its rows. A kernel's tiles put codes 0 and 4 into one byte (section 5): a mask and a shift again"
    return check_function(answer, lambda codes: pack_codes(codes, 4), cases, form, praise, parts=("bytes",))


def check_activations(answer) -> Verdict:
    """Exercise 3: a function of one group of activations that returns (codes -127 .. 127, step)."""

    def twin(x: np.ndarray) -> tuple[np.ndarray, float]:
        codes, scales = quantize_rows(x[None], len(x))
        return codes[0, 0], float(scales[0, 0])

    r = np.random.default_rng(2)
    cases = [
        Case(
            "a group whose largest is 2.54",
            (np.array([2.54, -0.01, 0.333, 1.0], np.float32),),
            "the largest becomes 127: the step is 2.54 / 127",
        ),
        Case(
            "a group whose largest magnitude is negative",
            (np.array([0.4, -5.08, 0.05, 3.0], np.float32),),
            "it is the magnitude that counts",
        ),
        Case(
            "values between two codes",
            (np.array([127.0, 0.6, -0.6, 3.4, -7.9], np.float32),),
            "round to the nearest code, on both sides of zero",
        ),
        Case("a group of zeros", (np.zeros(4, np.float32),), "no code is 0 / 0: a step of 0 asks for codes of 0"),
        Case("a group of random values", (r.standard_normal(32).astype(np.float32),)),
    ]
    form = "a function of a group of activations that returns (codes, step)"
    praise = "symmetric, one step for a group, zeros stay zero: what the kernel does with each row before it multiplies integers"
    return check_function(answer, twin, cases, form, praise, parts=("codes", "step"), tolerance=1e-5)
