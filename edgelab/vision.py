"""A small vision model on the same path as the language models: train, fold, round to INT8, choose a resolution, export.

**Data**: scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, 17 grey levels; the test part of UCI's "Optical
Recognition of Handwritten Digits", CC BY 4.0). The split is drawn by image, so writers occur on both sides: figures are those of
known writers.

**Cost**, in multiply-adds, bias and norm left out. A convolution of M into N channels with k x k weights and g groups, giving H' x W':

    H' W' N (M / g) k k            H' = floor((H + 2 p - d (k - 1) - 1) / s) + 1

A depthwise (g = M = N) and a pointwise (k = 1) one in its place cost the share 1 / N + 1 / k**2 of it (MobileNets, Howard et al.
2017, arXiv 1704.04861, section 3.1). Multiply-adds are no milliseconds: `cost_table` measures both.

**INT8 static** (Jacob et al. 2018, arXiv 1712.05877, section 2). Weights are int8 codes per output channel, w = s_w q, the codes of
a `QTensor`. Activations are uint8 codes with a scale that was fixed on calibration images, x = s_x (q - z): z = 0 behind a ReLU, so
all 256 levels stand for [0, t] and the ReLU itself is gone, cut off with the codes below 0; z = 128 elsewhere. A layer is

    acc = sum (q_x - z_x) q_w + b        b = round(bias / (s_x s_w)), int32
    q_y = clip(round(acc * (s_x s_w / s_y)) + z_y, 0, 255)

all integers but the one factor. `Static` computes exactly this in torch (sums of integers below 2**53 are exact in float64,
whatever their order), so that a runtime's integers can be compared with it code by code.

**Resolution**. Averaging over all positions before the last layer lets a network take images of any size; what a size costs and
brings is measured (`resolution_table`), and `resolution_for` picks the best one that a budget of multiply-adds allows.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelab.evaluate import interval
from edgelab.fold import fold
from edgelab.kernels.histogram import Histogram, add, empty, kl_threshold, mse_threshold, percentile_threshold
from edgelab.methods.clip import PERCENTILE, RULES
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.qtensor import QTensor
from edgelab.scheme import QuantScheme

# ------------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, eq=False)
class Images:
    """`pixels` float32 [n, 1, height, width] in 0 .. 1, `labels` int64 [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> "Images":
        return Images(self.pixels[rows], self.labels[rows])

    def resized(self, size: int) -> "Images":
        """The same images with `size` x `size` pixels (see `resize`)."""
        return Images(resize(self.pixels, size), self.labels)


@dataclass(frozen=True, eq=False)
class Split:
    """Images to learn from, to find ranges on, and to measure on: no image is in two of them."""

    train: Images
    calibration: Images
    test: Images


def digits(seed: int = 0, *, test: float = 0.4, calibration: float = 0.1) -> Split:
    """scikit-learn's digits, split by a seeded draw in which every digit has the same shares in each part.

    `test`, `calibration`: shares of all images, 0 .. 1. Raises ImportError without the extra `vision`, ValueError for shares
    that leave nothing to train on.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError('the digits come with scikit-learn, the extra `vision`: pip install "edgelab[vision]"') from e
    if not (0 < test < 1 and 0 < calibration < 1 and test + calibration < 1):
        raise ValueError(f"test={test} and calibration={calibration} must be shares above 0 that leave images to train on")
    found = load_digits()
    whole = Images(torch.from_numpy(found.images / 16).float()[:, None], torch.from_numpy(found.target).long())
    parts = ([], [], [])
    draw = np.random.default_rng(seed)
    for digit in range(10):
        rows = draw.permutation(np.flatnonzero(found.target == digit))
        a, b = round(test * len(rows)), round((test + calibration) * len(rows))
        for part, own in zip(parts, (rows[b:], rows[a:b], rows[:a]), strict=True):
            part.append(own)
    return Split(*(whole[torch.from_numpy(np.sort(np.concatenate(part)))] for part in parts))


def resize(pixels: Tensor, size: int) -> Tensor:
    """`pixels` [n, c, h, w] with `size` x `size` pixels, by linear interpolation between pixel centres, edges repeated.

    The centre of new pixel i lies at (i + 1/2) h / size - 1/2 of the old ones. Shrinking averages over all old pixels that a new
    one covers (a triangle of that width), or fine strokes would vanish between samples. Twice as many pixels in one row:

    >>> resize(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), 4)[0, 0, 0]
    tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    if pixels.ndim != 4:
        raise ValueError(f"pixels are {tuple(pixels.shape)}; they must be [images, channels, height, width]")
    shrinks = size < max(pixels.shape[-2:])
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)


# ---------------------------------------------------------------------------------------------------------------- models


def network(separable: bool = False, *, width: int = 16, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """A convolutional network with random weights for images [n, 1, h, w] of any size from 4 x 4 on: logits [n, classes].

    A stem of `width` channels and three blocks of 2, 4 and 4 times as many (the second halves the resolution), each a 3 x 3
    convolution, batch norm and ReLU; `separable`: each block a depthwise and a pointwise convolution with norm and ReLU each.
    """
    if width < 1:
        raise ValueError(f"width={width} must be at least 1 channel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = [*_conv(1, width, 3)]
        before = width
        for times, stride in ((2, 1), (4, 2), (4, 1)):
            after = times * width
            if separable:
                parts += [*_conv(before, before, 3, stride, groups=before), *_conv(before, after, 1)]
            else:
                parts += _conv(before, after, 3, stride)
            before = after
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def _conv(before: int, after: int, k: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, k, stride, padding=k // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


def train(
    model: nn.Module, images: Images, *, epochs: int = 20, batch: int = 64, peak: float = 2e-2, sizes: Sequence[int] = (), seed: int = 0
) -> list[float]:
    """The mean loss of every epoch; `model` has learned `images` in place and is in eval mode.

    AdamW, one cycle of the learning rate, images shifted by up to an eighth of their size so that 900 of them don't suffice to be
    learned by heart. `sizes`: the resolutions that batches come in, drawn anew for each; by default the images' own.
    Repeats exactly with the same seed, machine and number of threads.
    """
    if epochs < 1 or batch < 2:
        raise ValueError(f"epochs={epochs} and batch={batch}: train at least one epoch, on batches of at least 2 (a batch norm needs them)")
    draw = torch.Generator().manual_seed(seed)
    by_size = {size: resize(images.pixels, size) for size in sizes or (images.pixels.shape[-1],)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-2)
    steps = max(1, len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps)
    losses = []
    model.train()
    try:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=draw)
            total = 0.0
            for rows in order[: steps * batch].reshape(steps, -1) if steps * batch <= len(images) else (order,):
                size = list(by_size)[int(torch.randint(len(by_size), (), generator=draw))]
                x = _shifted(by_size[size][rows], draw)
                loss = F.cross_entropy(model(x), images.labels[rows], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            losses.append(total / steps)
    finally:
        model.eval()
    return losses


def _shifted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Each image of x [n, c, h, w] moved by whole pixels, zeros coming in."""
    reach = max(1, x.shape[-1] // 8)
    n, c, h, w = x.shape
    by = torch.randint(0, 2 * reach + 1, (2, n), generator=draw)
    rows = torch.arange(h) + by[0][:, None]  # [n, h]
    columns = torch.arange(w) + by[1][:, None]
    padded = F.pad(x, (reach,) * 4)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor, batch: int = 512) -> Tensor:
    """float32 [n, classes]."""
    return torch.cat([model(part).float() for part in pixels.split(batch)])


def correct(model: nn.Module, images: Images) -> np.ndarray:
    """bool [n]: which images `model` names rightly."""
    return (logits(model, images.pixels).argmax(-1) == images.labels).numpy()


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share of `hits` in `n` (Wilson 1927): good near 0 and 1, where p +- 2 sigma is not.

    >>> tuple(round(x, 4) for x in wilson(9, 10))
    (0.5958, 0.9821)
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits={hits} of n={n}: count from 0 to n, with n at least 1")
    p, shrink = hits / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def share_of(hits: np.ndarray) -> dict[str, float | int]:
    """{accuracy, accuracy_low, accuracy_high, n} of hits bool [n]."""
    low, high = wilson(int(hits.sum()), len(hits))
    return {"accuracy": float(hits.mean()), "accuracy_low": low, "accuracy_high": high, "n": len(hits)}


# ------------------------------------------------------------------------------------------------------------------ cost


def chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of a network that is one layer after the other: what cost formulas, `static` and the export take.

    Raises TypeError for anything that is no `nn.Sequential` (nested ones are fine) of Conv2d, BatchNorm2d, ReLU,
    AdaptiveAvgPool2d(1), Flatten, Linear, Dropout and Identity.
    """
    if type(model) is not nn.Sequential:
        raise TypeError(f"model is a {type(model).__name__}; this path takes an nn.Sequential, one layer after the other")
    found: list[tuple[str, nn.Module]] = []
    for name, layer in model.named_modules(remove_duplicate=False):  # in the order in which they are called
        if type(layer) in (nn.Sequential, nn.Identity, nn.Dropout):
            continue  # a container, or nothing in eval mode
        if type(layer) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Flatten, nn.AdaptiveAvgPool2d):
            if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
                raise TypeError(f"{name} pools to {layer.output_size}; this path knows AdaptiveAvgPool2d(1), which takes any resolution")
            if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
                raise TypeError(f"{name} pads with {layer.padding_mode!r}, {layer.padding!r}; this path knows numbers of zeros")
            if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
                raise TypeError(f"{name} flattens dimensions {layer.start_dim} .. {layer.end_dim}; this path knows Flatten(1, -1)")
            found.append((name, layer))
        else:
            raise TypeError(
                f"{name} is a {type(layer).__name__}; this path knows Conv2d, BatchNorm2d, ReLU, AdaptiveAvgPool2d(1), Flatten, Linear"
            )
    return found


def conv_madds(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int, int]:
    """(multiply-adds per image, height, width) of what `conv` makes of an image of `height` x `width` (formula in the module).

    >>> conv_madds(nn.Conv2d(16, 32, 3, padding=1), 8, 8)  # 8 * 8 * 32 * 16 * 9
    (294912, 8, 8)
    >>> conv_madds(nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), 8, 8)  # depthwise: 4 * 4 * 16 * 1 * 9
    (2304, 4, 4)
    """
    sizes = zip((height, width), conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]
    if min(out) < 1:
        raise ValueError(f"an image of {height} x {width} is too small for {conv}")
    return math.prod(out) * conv.out_channels * (conv.in_channels // conv.groups) * math.prod(conv.kernel_size), *out


def madds(model: nn.Module, size: int) -> int:
    """Multiply-adds of `model` for one image of `size` x `size`, from the formulas alone. Raises as `chain` does."""
    total, h, w = 0, size, size
    for _, layer in chain(model):
        if isinstance(layer, nn.Conv2d):
            more, h, w = conv_madds(layer, h, w)
            total += more
        elif isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
    return total


@torch.no_grad()
def counted_madds(model: nn.Module, pixels: Tensor) -> int:
    """Multiply-adds of `model` for one image, counted where they happen: every output value of a layer takes as many as one row
    of its weight has entries. Any model of convolutions and linear layers; `pixels` [n, c, h, w]."""
    counts: list[int] = []

    def hook(layer: nn.Module, _inputs, out: Tensor) -> None:
        counts.append(out.numel() * layer.weight[0].numel())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    try:
        model(pixels)
    finally:
        for h in handles:
            h.remove()
    total, rest = divmod(sum(counts), len(pixels))
    assert not rest
    return total


def parameters(model: nn.Module) -> int:
    """How many numbers `model` has learned."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def latencies_ms(calls: Mapping[str, Callable[[], object]], *, turns: int = 15, at_least_s: float = 2e-3) -> dict[str, np.ndarray]:
    """{name: milliseconds per call [turns]}, on one thread. The calls take turns, so a slow moment of the machine falls on all.

    It is the processor time of the calling thread: what a call takes on a core of its own, whatever else the machine does. Each turn
    repeats a call until it has taken `at_least_s`; a first turn warms up and is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    with _one_thread():
        repeats = {}
        for name, call in calls.items():
            call()
            began = time.thread_time()
            call()
            repeats[name] = max(1, math.ceil(at_least_s / max(time.thread_time() - began, 1e-7)))
        for turn in range(turns + 1):
            for name, call in calls.items():
                began = time.thread_time()
                for _ in range(repeats[name]):
                    call()
                if turn:
                    found[name].append((time.thread_time() - began) / repeats[name] * 1e3)
    return {name: np.array(values) for name, values in found.items()}


def spread_ms(times: np.ndarray, seed: int = 0) -> dict[str, float]:
    """{latency_ms, latency_ms_low, latency_ms_high}: the median of times [turns] and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(seed).integers(0, len(times), (2000, len(times)))
    low, high = interval(np.median(times[drawn], axis=1))
    return {"latency_ms": float(np.median(times)), "latency_ms_low": low, "latency_ms_high": high}


def cost_table(models: Mapping[str, nn.Module], images: Images, *, turns: int = 15, batch: int = 1, seed: int = 0) -> list[dict]:
    """A row per model, the first being what the others are compared with: model, parameters, madds, madds_share, latency_ms (of
    `batch` images, one thread, norms folded; with its bootstrap interval), latency_share (of paired turns, with interval), accuracy
    (with its Wilson interval and n). Raises AssertionError if the formula and the count of multiply-adds differ.
    """
    folded = {name: _folded(model) for name, model in models.items()}
    x = images.pixels[:batch].contiguous()
    times = latencies_ms({name: (lambda m=m: m(x)) for name, m in folded.items()}, turns=turns)
    rows, base = [], next(iter(models))
    for name, model in models.items():
        formula, count = madds(model, x.shape[-1]), counted_madds(model, x)
        assert formula == count, f"{name}: the formula gives {formula} multiply-adds, hooks counted {count}"
        drawn = np.random.default_rng(seed).integers(0, turns, (2000, turns))
        ratios = np.median(times[name][drawn] / times[base][drawn], axis=1)
        low, high = interval(ratios)
        rows.append(
            {"model": name, "parameters": parameters(model), "madds": formula}
            | spread_ms(times[name], seed)
            | share_of(correct(model, images))
            | {"latency_share": float(np.median(times[name] / times[base])), "latency_share_low": low, "latency_share_high": high}
        )
    for row in rows:
        row["madds_share"] = row["madds"] / rows[0]["madds"]
    return rows


def _folded(model: nn.Module) -> nn.Module:
    return fold(model).model if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else model


# ----------------------------------------------------------------------------------------------------------- INT8 static


@dataclass(frozen=True)
class Codes:
    """What the uint8 codes of an activation stand for: scale * (q - zero). `scale` is a float32, as every runtime stores it."""

    scale: float
    zero: int

    def quantize(self, x: Tensor) -> Tensor:
        """Codes 0 .. 255 of x, as float64. Ties go to even, in float32, as `QuantizeLinear` does."""
        q = torch.round(x.float() / torch.tensor(self.scale, dtype=torch.float32)) + self.zero
        return q.clamp(0, 255).double()


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer in integers. `before`, `after`: codes of its input and output; no `after`: it puts out floats.

    `weight`: int8 codes [out, in / groups * kh * kw] (one scale per row, or one for all). `bias` int64 [out], in units of
    s_x s_w. `settings`: stride, padding, dilation and groups of a convolution and its weight's shape; empty for a linear layer.
    """

    name: str
    weight: QTensor
    bias: np.ndarray
    before: Codes
    after: Codes | None
    shape: tuple[int, ...]
    settings: Mapping[str, object]

    def signed(self) -> np.ndarray:
        """The weight's codes as the integers that they stand for: int8 of `shape`, -127 .. 127."""
        return (self.weight.codes().astype(np.int16) - self.weight.scheme.zero_point).astype(np.int8).reshape(self.shape)

    def scales(self) -> np.ndarray:
        """float32 [out]: the weight's scales, one per output channel also where all are the same."""
        return np.ascontiguousarray(np.broadcast_to(self.weight.scale_values().reshape(-1), (self.shape[0],)))

    def accumulate(self, q: Tensor) -> Tensor:
        """sum (q_x - z_x) q_w + b: integers as float64, exactly."""
        w, b = torch.from_numpy(self.signed()).double(), torch.from_numpy(self.bias).double()
        x = q - self.before.zero
        return F.conv2d(x, w, b, **self.settings) if self.settings else F.linear(x, w, b)


@dataclass(frozen=True)
class Pool:
    """The mean over all positions, codes in, codes out."""

    name: str
    before: Codes
    after: Codes


class Static(nn.Module):
    """A network in integers: images float32 [n, c, h, w] -> logits float32 [n, classes]. `steps`: `Layer` and `Pool`, in order.

    `rule`: by which its ranges were found. Made by `static`.
    """

    def __init__(self, steps: Sequence[Layer | Pool], rule: str) -> None:
        super().__init__()
        self.steps, self.rule = tuple(steps), rule

    def forward(self, pixels: Tensor) -> Tensor:
        *_, (_, last) = self.trace(pixels)
        return last

    @torch.no_grad()
    def trace(self, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(step, what it puts out): codes uint8 after every step but the last, which gives the logits."""
        x = self.steps[0].before.quantize(pixels)
        for step in self.steps:
            if isinstance(step, Pool):
                total = (x - step.before.zero).sum((2, 3), keepdim=True)
                factor = np.float32(step.before.scale) / (np.float32(step.after.scale) * np.float32(x.shape[2] * x.shape[3]))
                x = _requantized(total, torch.tensor([factor]), step.after)
                yield step.name, x.to(torch.uint8)
                continue
            if not step.settings:
                x = x.flatten(1)
            acc = step.accumulate(x)
            unit = torch.from_numpy(np.float32(step.before.scale) * step.scales())  # float32 [out]
            unit = unit.view(-1, 1, 1) if step.settings else unit
            if step.after is None:
                yield step.name, acc.float() * unit
                return
            x = _requantized(acc, unit / torch.tensor(step.after.scale, dtype=torch.float32), step.after)
            yield step.name, x.to(torch.uint8)

    @property
    def scheme(self) -> QuantScheme:
        """That of all weights."""
        return next(s.weight.scheme for s in self.steps if isinstance(s, Layer))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return sum(s.weight.nbytes + 4 * len(s.bias) for s in self.steps if isinstance(s, Layer))

    def extra_repr(self) -> str:
        return f"{len(self.steps)} steps, ranges by {self.rule!r}, {self.nbytes:,} bytes"


def _requantized(acc: Tensor, factor: Tensor, codes: Codes) -> Tensor:
    """Codes, as float64, of integer sums: one float32 product, ties to even."""
    return (torch.round(acc.float() * factor) + codes.zero).clamp(0, 255).double()


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration saw of an activation: |x| as a histogram, the largest |x|, and whether a value was below zero."""

    histogram: Histogram
    maximum: float
    signed: bool

    def codes(self, rule: str, percentile: float = PERCENTILE) -> Codes:
        """The codes of least loss by `rule`. Without negative values all 256 levels are positive: twice as fine."""
        levels = 128 if self.signed else 256
        counts, width = self.histogram.counts, self.histogram.width
        match rule:
            case "max":
                t = self.maximum
            case "percentile":
                t = percentile_threshold(counts, width, percentile)
            case "mse":
                t = mse_threshold(counts, width, levels).threshold
            case "kl":
                t = kl_threshold(counts, width, levels).threshold
            case _:
                raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(RULES)}")
        return Codes(float(np.float32(min(t, self.maximum) / (levels - 1))), 128 if self.signed else 0)


_BINS = 4096  # 16 for each of the 256 levels, as `kl_threshold` wants at least


def static(
    model: nn.Module,
    calibration: Tensor,
    rule: str = "kl",
    *,
    weights: str = "int8-row",
    weight_top: int = 127,
    percentile: float = PERCENTILE,
) -> Static:
    """`model` in integers: INT8 weights, activations in the uint8 ranges that `rule` finds on the images `calibration` [n, c, h, w].

    `model`: a chain (see `chain`) in eval mode that starts with a convolution and ends with a linear layer; norms are folded first.
    `rule`: "max", "percentile", "mse" or "kl". `weights`: "int8-row", a scale per output channel, or "int8-tensor".
    The weights' codes are -127 .. 127 with a positive scale, max|w| / 127, as LiteRT's int8 specification asks for convolutions;
    code 0 of the `QTensor` stays unused. `weight_top=64` halves the codes, for x86 processors without VNNI, whose runtimes add two
    products of uint8 and int8 in 16 bits: 2 * 255 * 64 = 32,640 is the most that fits.

    Raises TypeError as `chain` does, and ValueError for what can't be rounded: an unknown rule, calibration images that leave an
    activation at zero, a layer that isn't followed as the integers need it.
    """
    return statics(model, calibration, (rule,), weights=weights, weight_top=weight_top, percentile=percentile)[rule]


def statics(
    model: nn.Module,
    calibration: Tensor,
    rules: Sequence[str] = RULES,
    *,
    weights: str = "int8-row",
    weight_top: int = 127,
    percentile: float = PERCENTILE,
) -> dict[str, Static]:
    """{rule: `static`(..., rule)}, from one pass over the calibration images."""
    scheme = QuantScheme.parse(weights)
    if str(scheme) not in ("int8-row", "int8-tensor"):
        raise ValueError(f"weights={weights!r} must be int8-row (a scale per output channel) or int8-tensor")
    if not 1 <= weight_top <= 127:
        raise ValueError(f"weight_top={weight_top} must be 1 .. 127, the largest code of a weight; 127, or 64 for x86 without VNNI")
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first: its ranges would be those of dropout and batch statistics")
    plan = _planned(_folded(model))
    seen = _watched(plan, calibration)
    found = {}
    for rule in rules:
        codes = [s.codes(rule, percentile) for s in seen]
        steps: list[Layer | Pool] = []
        for i, (name, layer, _) in enumerate(plan):
            before, after = codes[i], codes[i + 1] if i + 1 < len(codes) else None
            pool = isinstance(layer, nn.AdaptiveAvgPool2d)
            steps.append(Pool(name, before, after) if pool else _layer(name, layer, before, after, scheme, weight_top))
        found[rule] = Static(steps, rule)
    return found


def _planned(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """(name, convolution | pool | linear, whether a ReLU is behind it) of a folded chain."""
    plan: list[tuple[str, nn.Module, bool]] = []
    for name, layer in chain(model):
        if isinstance(layer, nn.BatchNorm2d):
            raise ValueError(f"the norm {name} can't be folded into the layer before it ({'; '.join(x.why for x in fold(model).left)})")
        if isinstance(layer, nn.ReLU):
            if not plan or isinstance(plan[-1][1], nn.AdaptiveAvgPool2d):
                raise ValueError(f"the ReLU {name} follows no convolution or linear layer")
            plan[-1] = (*plan[-1][:2], True)
        elif not isinstance(layer, nn.Flatten):
            plan.append((name, layer, False))
    if len(plan) < 2 or not isinstance(plan[0][1], nn.Conv2d) or not isinstance(plan[-1][1], nn.Linear) or plan[-1][2]:
        names = ", ".join(f"{n} ({type(x).__name__}{', ReLU' if relu else ''})" for n, x, relu in plan)
        raise ValueError(f"model must start with a Conv2d and end with a Linear that no ReLU follows; its layers are {names}")
    return plan


@torch.no_grad()
def _watched(plan: list[tuple[str, nn.Module, bool]], pixels: Tensor, batch: int = 256) -> list[Seen]:
    """What each step of `plan` reads: the image first, the logits left out."""
    if not len(pixels):
        raise ValueError("calibration holds no images; give some hundred of the kind that the model will see")
    histograms = [empty(_BINS) for _ in plan]
    most, least = [0.0] * len(plan), [0.0] * len(plan)
    for x in pixels.split(batch):
        for i, (_, layer, relu) in enumerate(plan):
            histograms[i] = add(histograms[i], np.ascontiguousarray(x.float().numpy()))
            most[i], least[i] = max(most[i], float(x.abs().max())), min(least[i], float(x.min()))
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
            x = x.relu() if relu else x
    for (name, *_), m in zip(plan, most, strict=True):
        if m == 0:
            raise ValueError(f"the calibration images leave the input of {name} at zero everywhere: it has no range; give other images")
    return [Seen(h, m, low < 0) for h, m, low in zip(histograms, most, least, strict=True)]


def _layer(name: str, layer: nn.Conv2d | nn.Linear, before: Codes, after: Codes | None, scheme: QuantScheme, top: int) -> Layer:
    w = layer.weight.detach().float().numpy()
    q = _restricted(w.reshape(len(w), -1), scheme, top)
    unit = np.float32(before.scale) * q.scale_values().reshape(-1)  # float32, as the runtime multiplies them
    bias = np.zeros(len(w)) if layer.bias is None else layer.bias.detach().double().numpy()
    rounded = np.round(bias / unit.astype(np.float64))
    reach = 255 * 127 * w[0].size + np.abs(rounded).max()
    if reach >= 2**31:
        raise ValueError(
            f"{name}: its sums may reach {reach:.3g}, more than an int32 accumulator holds; it has too many inputs or too large a bias"
        )
    settings = {}
    if isinstance(layer, nn.Conv2d):
        settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return Layer(name, q, rounded.astype(np.int64), before, after, w.shape, settings)


def _restricted(w: np.ndarray, scheme: QuantScheme, top: int) -> QTensor:
    """Codes -top .. top around the zero point, and positive scales, max|w| / top, of w [out, in]."""
    most = np.abs(w).max(1, keepdims=True) if str(scheme) == "int8-row" else np.abs(w).max(keepdims=True)
    scales = np.where(most > 0, most / top, 1).astype(np.float16)
    scales = np.maximum(scales, np.float16(2**-24))  # a channel of tiny weights gets the least float16, not zero
    codes = np.clip(np.round(w / scales.astype(np.float32)), -top, top) + scheme.zero_point
    return QTensor.from_codes(codes.astype(np.uint8), scales, scheme)


def static_table(
    model: nn.Module, split: Split, *, rules: Sequence[str] = RULES, weights: Sequence[str] = ("int8-row", "int8-tensor"), seed: int = 0
) -> list[dict]:
    """A row for float32, and one for each way to find scales: weights, activations (the rule), accuracy (Wilson interval, n), and
    against float32 same (the share of images that get the same answer), lost and won (images), kld (nats per image, bootstrap
    interval over images), bytes (of codes, scales and biases)."""
    test = split.test
    reference = logits(model, test.pixels)
    right = (reference.argmax(-1) == test.labels).numpy()
    rows = [{"weights": "float32", "activations": "float32"} | share_of(right) | {"bytes": 4 * parameters(_folded(model))}]
    drawn = np.random.default_rng(seed).multinomial(len(test), np.full(len(test), 1 / len(test)), size=2000) / len(test)
    for scheme in weights:
        for rule, q in statics(model, split.calibration.pixels, rules, weights=scheme).items():
            ours = logits(q, test.pixels)
            hits = (ours.argmax(-1) == test.labels).numpy()
            kld = token_kl(torch.log_softmax(reference, -1), torch.log_softmax(ours, -1)).double().numpy()
            low, high = interval(drawn @ kld)
            rows.append(
                {"weights": scheme, "activations": f"uint8, {rule}"}
                | share_of(hits)
                | {"same": float((ours.argmax(-1) == reference.argmax(-1)).double().mean())}
                | {"lost": int((right & ~hits).sum()), "won": int((~right & hits).sum())}
                | {"kld": float(kld.mean()), "kld_low": low, "kld_high": high, "bytes": q.nbytes}
            )
    return rows


# ------------------------------------------------------------------------------------------------------------ resolution


def adapted(model: nn.Module, pixels: Tensor, size: int, batch: int = 128) -> nn.Module:
    """A copy of `model` for images of `size` x `size`: the same weights, the norms' statistics taken anew from `pixels` at that size.

    Resizing changes what a layer sees (edges get softer, borders weigh less), and so the mean and variance of every channel. A norm
    that divides by those of another size shifts all that follows; nothing needs to be learned to mend that (Wang et al. 2020,
    "Resolution Switchable Networks", arXiv 2007.09558, keep one set of norms per size). `pixels` without labels, some hundred.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        raise ValueError("model has no batch norm to adapt; adapt it before its norms are folded")
    twin = copy.deepcopy(model)
    kept = {}
    for m in twin.modules():
        if isinstance(m, nn.BatchNorm2d):
            kept[m] = m.momentum
            m.reset_running_stats()
            m.momentum = None  # a plain mean over the batches
            m.train()
    with torch.no_grad():
        for x in resize(pixels, size).split(batch):
            twin(x)
    for m, momentum in kept.items():
        m.momentum = momentum
    return twin.eval()


def resolution_table(
    model: nn.Module, split: Split, sizes: Sequence[int] = (4, 6, 8, 12, 16, 24), *, turns: int = 9, batch: int = 1, seed: int = 0
) -> list[dict]:
    """A row per size of the input: size, madds, latency_ms (of `batch` images, one thread, norms folded; bootstrap interval), accuracy
    of the model `adapted` to the size on the training images (Wilson interval, n), and accuracy_as_it_is, without that.

    `model` with its norms; train it with `sizes`, or it knows its strokes in one width only. The images are the split's, resized.
    """
    found = {size: _folded(adapted(model, split.train.pixels, size)) for size in sizes}
    images = {size: split.test.resized(size) for size in sizes}
    inputs = {size: images[size].pixels[:batch].contiguous() for size in sizes}
    times = latencies_ms({str(size): (lambda m=m, x=inputs[size]: m(x)) for size, m in found.items()}, turns=turns)
    return [
        {"size": size, "madds": madds(model, size)}
        | spread_ms(times[str(size)], seed)
        | share_of(correct(found[size], images[size]))
        | {"accuracy_as_it_is": float(correct(model, images[size]).mean())}
        for size in sizes
    ]


def resolution_for(budget_madds: float, table: Sequence[Mapping]) -> int:
    """The size in `table` (rows of `resolution_table`) of the best accuracy within `budget_madds` multiply-adds per image.

    Of equally accurate sizes the cheapest. Raises ValueError where even the cheapest costs more.

    >>> rows = [{"size": 8, "madds": 100, "accuracy": 0.97}, {"size": 16, "madds": 400, "accuracy": 0.99}]
    >>> resolution_for(399, rows), resolution_for(400, rows)
    (8, 16)
    """
    affordable = [row for row in table if row["madds"] <= budget_madds]
    if not affordable:
        least = min(table, key=lambda row: row["madds"], default=None)
        way_out = (
            "the table is empty" if least is None else f"the cheapest size, {least['size']}, takes {least['madds']:,}: use a smaller model"
        )
        raise ValueError(f"budget_madds={budget_madds:,} allows no size of the table; {way_out}")
    return max(affordable, key=lambda row: (row["accuracy"], -row["madds"]))["size"]
