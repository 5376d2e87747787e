"""Differentially private adaptation: what a model learns from a person's data tells little about any one line of it.

**DP-SGD** (Abadi et al. 2016, arXiv 1607.00133, algorithm 1) on LoRA adapters (W + B A, arXiv 2106.09685). A step takes each of N
examples with probability q, on its own (Poisson sampling: a batch has a random size), clips each example's gradient g_i over
all adapters together, and adds noise once:

    g = (sum_i g_i min(1, C / |g_i|) + N(0, (sigma C)^2)) / (q N)

The mechanism ends here; Adam, its rate and anything after are post-processing. **Per-example gradients** are exact: every
example gets its own copy of A and B (a batch dimension), so autograd of the summed losses gives each copy its own example's gradient.
That asks for layers that see [examples, tokens, ...] and mix no examples: attention, dense MLPs and shared experts do. Routed experts
see a flat list of tokens and have no adapter; a router without a capacity limit treats each token alone. Opacus' `GradSampleModule` on
adapters of `nn.Linear` gives the same numbers (a test compares them), but it wraps the model and hooks every layer; these are 20 lines.

**Accounting** by Renyi divergence (Mironov, Talwar, Zhang 2019, arXiv 1908.10530, section 3). At order a > 1 one step costs

    R(a) = log A / (a - 1),   A = E_{z ~ N(0, sigma^2)} [(1 - q + q exp((2 z - 1) / (2 sigma^2)))^a]

for adding or removing one example, steps add up, and the cheapest order gives the bound (Balle et al. 2020, arXiv 1905.09982, theorem 21)

    epsilon = min_a  T R(a) + log((a - 1) / a) - (log delta + log a) / (a - 1)

A is integrated by the trapezoid rule, which converges geometrically here, so that real orders need no series of their own.

**What epsilon says**: for every output set S and every two data sets that differ by one example, P(S) <= e^epsilon P'(S) + delta. What
it does not: it is per example, not per person with several; it covers the learning and not settings that were chosen by looking at the same
data; noise is drawn in floating point, whose gaps tell something (Mironov 2012, CCS, "On significance of the least significant bits").
Noise and samples come from the operating system's generator: torch's takes 32 bits of any seed, which can be tried one by one. A given
`seed`, for tests and studies that must come out again, undoes the noise: `Learnt` then says so, and epsilon is the mechanism's, not the
run's. Weights of the base model are not protected: they never saw the data.

`auc` attacks: members have lower losses (Yeom et al. 2018, arXiv 1709.01604, section 3). `auc_bound` is what (epsilon, delta) leaves to
any attacker (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776, section 2.1). An attack that fails proves nothing; the bound does.
"""

import copy
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab import adapt
from edgelab.evaluate import documents, interval
from edgelab.layers import QLinear, Quantized
from edgelab.model import dequantize, weights
from edgelab.report import Report, Row, machine

# Orders as far apart as changes epsilon by less than 1 %
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), *range(64, 129, 8), 160, 192, 256, 384, 512, 1024)
_ROLES = ("attention", "mlp", "shared", "linear")
_POINTS = 8  # of the trapezoid rule within the smaller of sigma and sigma^2
_LEAST_NOISE = 0.05  # where bisection begins: epsilon is in the hundreds there
_TAILS = 12.0  # standard deviations: what is cut off is below 1e-30


# ---------------------------------------------------------------------------------------------------------- accountant


def renyi(noise: float, rate: float, order: float) -> float:
    """Renyi divergence R(order) of one step, in nats: the subsampled Gaussian of noise multiplier `noise` at sampling `rate`.

    >>> round(renyi(2.0, 1.0, 8), 6), renyi(2.0, 0.0, 8)  # without subsampling: order / (2 noise^2)
    (1.0, 0.0)
    """
    if not (noise > 0 and math.isfinite(noise)):
        raise ValueError(f"noise={noise} must be above 0: without noise nothing bounds what one example does")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} is no sampling probability; give batch / examples, from 0 to 1")
    if not order > 1:
        raise ValueError(f"order={order} must be above 1")
    if rate == 0:
        return 0.0
    if rate == 1:
        return order / (2 * noise**2)
    step = min(noise, noise**2) / _POINTS
    z = np.arange(-_TAILS * noise, order + _TAILS * noise + step, step)  # the mass lies around 0 and around `order`
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
    terms = order * ratio - z**2 / (2 * noise**2)
    top = terms.max()
    log_a = float(top) + math.log(float(np.exp(terms - top).sum()) * step / (noise * math.sqrt(2 * math.pi)))
    return max(0.0, log_a / (order - 1))


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon that `steps` steps at `delta` are proven to have; infinite without noise.

    >>> epsilon(0.0, 0.1, 10, 1e-5), 1.71 < epsilon(1.1, 0.01, 1000, 1e-5) < 1.72
    (inf, True)
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must lie between 0 and 1, and well below 1 / examples")
    if steps < 0:
        raise ValueError(f"steps={steps} is negative")
    if noise == 0:
        return math.inf
    if steps == 0 or rate == 0:
        return 0.0
    bounds = (steps * renyi(noise, rate, a) + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in ORDERS)
    return max(0.0, min(bounds))


def noise_for(target: float, rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, to 0.1 %, with which `steps` steps cost at most epsilon `target`."""
    if not target > 0:
        raise ValueError(f"target={target} must be an epsilon above 0")
    low, high = _LEAST_NOISE, 1.0
    while epsilon(high, rate, steps, delta) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"epsilon={target} at delta={delta} takes more noise than 1e6; take fewer steps or a smaller rate")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(middle, rate, steps, delta) <= target else (middle, high)
    return high


# ------------------------------------------------------------------------------------------------------------ examples


@dataclass(frozen=True, eq=False)
class Examples:
    """`ids` int64 [n, T], padded on the right; `scored` bool [n, T]: tokens that count, the answer and the end."""

    ids: Tensor
    scored: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.scored.shape or self.scored[:, :1].any():
            raise ValueError(f"ids {tuple(self.ids.shape)} and scored {tuple(self.scored.shape)}: both [n, T], the first token not scored")
        if not self.scored.any(1).all():
            raise ValueError("an example has no scored token, so it has no loss; leave it out")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows) -> "Examples":
        return Examples(self.ids[rows], self.scored[rows])

    def __add__(self, other: "Examples") -> "Examples":
        width = max(self.ids.shape[1], other.ids.shape[1])
        pads = [(F.pad(e.ids, (0, width - e.ids.shape[1])), F.pad(e.scored, (0, width - e.scored.shape[1]))) for e in (self, other)]
        return Examples(*(torch.cat(parts) for parts in zip(*pads, strict=True)))


def examples(tokenizer, data) -> Examples:
    """One example per row of a Dataset with `prompt` and `answer`, tokenized and scored as `evaluate.documents` does, in its order."""
    docs = documents(data, tokenizer)
    width = max(len(d.ids) for d in docs)
    ids, scored = torch.zeros(len(docs), width, dtype=torch.int64), torch.zeros(len(docs), width, dtype=torch.bool)
    for i, d in enumerate(docs):
        ids[i, : len(d.ids)] = torch.from_numpy(d.ids)
        scored[i, d.first : len(d.ids)] = True
    return Examples(ids, scored)


def odd_ones(data, seed: int = 0):
    """`data` with every answer swapped for another row's: lines that only memory explains, as canaries are (arXiv 1802.08232).

    `data` is a Dataset with columns of `data.corpus`. Raises ValueError where all answers are the same.
    """
    import datasets

    rows = data.to_dict()
    answers, r = rows["answer"], random.Random(seed)
    if len(set(answers)) < 2:
        raise ValueError("all answers are the same: no row can get a wrong one")
    wrong = [r.choice([a for a in answers if a != own]) for own in answers]
    rows["answer"], rows["text"] = wrong, [p + a for p, a in zip(rows["prompt"], wrong, strict=True)]
    return datasets.Dataset.from_dict(rows)


# ------------------------------------------------------------------------------------------------------------ adapters


class Adapters:
    """LoRA adapters on a floating-point twin of `model`, whose own weights are frozen; `put` carries them to the model itself.

    A [rank, in] is drawn by `seed`, B [out, rank] starts at zero. `freeze_a`: only B learns (FFA-LoRA, arXiv 2403.12313).
    `model` may hold codes; it is not changed, and the twin computes with the values that the codes stand for.
    """

    def __init__(self, model: nn.Module, rank: int = 4, *, freeze_a: bool = False, seed: int = 0, roles: Sequence[str] = _ROLES) -> None:
        if rank < 1:
            raise ValueError(f"rank={rank} must be 1 or more")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        if any(isinstance(m, Quantized) for m in self.model.modules()):
            dequantize(self.model)
        listed = [w for w in weights(self.model) if w.kind == "linear" and w.role in roles and not w.tied_to]
        if not listed:
            raise ValueError(f"this {type(model).__name__} has no linear layer of roles {', '.join(roles)} to adapt")
        generator = torch.Generator().manual_seed(seed)
        self.a: dict[str, nn.Parameter] = {}
        self.b: dict[str, nn.Parameter] = {}
        self.rank, self.freeze_a = rank, freeze_a
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        for w in listed:
            out, inputs = w.shape
            a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            self.a[w.module_name] = nn.Parameter(a, requires_grad=not freeze_a)
            self.b[w.module_name] = nn.Parameter(torch.zeros(out, rank))
            self.model.get_submodule(w.module_name).register_forward_hook(self._hook(w.module_name))

    def _hook(self, name: str):
        def add(_module, inputs, output: Tensor) -> Tensor:
            x = inputs[0]
            a, b = self._copies.get(name, (self.a[name], self.b[name]))
            if a.ndim == 3 and (x.ndim < 3 or len(x) != len(a)):
                raise ValueError(
                    f"{name} sees {tuple(x.shape)} of {len(a)} examples: it mixes them, so no example has a gradient of its own; "
                    "leave its role out of roles="
                )
            if a.ndim == 2:
                return output + (x @ a.mT) @ b.mT
            return output + ((x.reshape(len(a), -1, x.shape[-1]) @ a.mT) @ b.mT).view_as(output)  # [N, T, in] by [N, rank, in]

        return add

    def parameters(self) -> dict[str, nn.Parameter]:
        """{"<layer>.a" or "<layer>.b": what learns}."""
        learnt = {} if self.freeze_a else {f"{n}.a": p for n, p in self.a.items()}
        return learnt | {f"{n}.b": p for n, p in self.b.items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of what learns."""
        return {n: p.detach().clone() for n, p in self.parameters().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a state of other layers or shapes; nothing is changed then."""
        mine = self.parameters()
        differs = set(mine) ^ set(state) or {n for n, p in mine.items() if state[n].shape != p.shape}
        if differs:
            raise ValueError(f"the state is of other adapters: {min(differs)} does not fit; rank and freeze_a must be the same")
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(state[name])

    @contextmanager
    def copies(self, n: int) -> Iterator[dict[str, Tensor]]:
        """Inside, each of `n` examples computes with a copy of its own: {parameter: [n, ...]}, equal values, separate gradients."""
        grown = {name: p.detach().expand(n, *p.shape).clone().requires_grad_(True) for name, p in self.parameters().items()}
        for name in self.b:
            a = self.a[name].detach().expand(n, -1, -1) if self.freeze_a else grown[f"{name}.a"]
            self._copies[name] = a, grown[f"{name}.b"]
        try:
            yield grown
        finally:
            self._copies = {}

    def put(self, model: nn.Module) -> None:
        """Adds the adapters to `model`: merged into floating-point weights, beside the codes of a `QLinear` (`QLinear.adapt`)."""
        with torch.no_grad():
            for name, b in self.b.items():
                module = model.get_submodule(name)
                if isinstance(module, QLinear):
                    module.adapt(self.a[name].detach(), b.detach())
                else:
                    module.weight += (b @ self.a[name]).to(module.weight.dtype)


def losses(adapters: Adapters, batch: Examples) -> Tensor:
    """Mean negative log likelihood of each example's scored tokens, in nats: [n]."""
    logits = adapters.model(input_ids=batch.ids[:, :-1], use_cache=False).logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
    mask = batch.scored[:, 1:]
    return (nll * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True, eq=False)
class Answered:
    """Arrays [n]. `nll` nats per scored token; `right` share of them that are the likeliest, the ones before given; `exact`: all are, so
    greedy decoding writes the answer and stops (`evaluate`)."""

    nll: np.ndarray
    right: np.ndarray
    exact: np.ndarray


@torch.inference_mode()
def answered(adapters: Adapters, held: Examples, batch: int = 64) -> Answered:
    nll, right = [], []
    for rows in torch.arange(len(held)).split(batch):
        part = held[rows]
        logits = adapters.model(input_ids=part.ids[:, :-1], use_cache=False).logits.float()
        wanted, mask = part.ids[:, 1:], part.scored[:, 1:]
        token = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        nll.append((token * mask).sum(1) / mask.sum(1))
        right.append(((logits.argmax(-1) == wanted) & mask).sum(1).double() / mask.sum(1))
    share = torch.cat(right).numpy()
    return Answered(torch.cat(nll).double().numpy(), share, share == 1)


# -------------------------------------------------------------------------------------------------------------- DP-SGD


@dataclass(frozen=True)
class DpSgd:
    """Settings of a run. `batch` examples are expected in each of `steps` steps; `noise` sigma in units of `clip` (C).

    `noise=0` and `clip=inf` is plain training with the same sampling. `lr` is Adam's, falling to zero by a straight line.
    """

    noise: float = 1.0
    clip: float = 1.0
    batch: int = 200
    steps: int = 50
    lr: float = 5e-3
    delta: float = 1e-5
    micro: int = 64  # examples whose gradients are in memory at once

    def __post_init__(self) -> None:
        if not self.noise >= 0 or not self.clip > 0:
            raise ValueError(f"noise={self.noise} must be 0 or more, clip={self.clip} above 0")
        if self.noise > 0 and math.isinf(self.clip):
            raise ValueError("clip=inf leaves one example unbounded, so no noise hides it; give clip=1.0, or noise=0 for plain training")
        if self.batch < 1 or self.steps < 1 or self.micro < 1 or not self.lr > 0:
            raise ValueError(f"batch={self.batch}, steps={self.steps}, micro={self.micro} must be 1 or more and lr={self.lr} above 0")

    def rate(self, n: int) -> float:
        """Sampling probability among `n` examples."""
        if self.batch > n:
            raise ValueError(f"batch={self.batch} is more than the {n} examples; give {n} or fewer")
        return self.batch / n

    def epsilon(self, n: int) -> float:
        """What the run costs each of `n` examples at `delta`. Raises ValueError for a delta of 1 / n or more, which promises nothing."""
        if self.delta >= 1 / n:
            raise ValueError(f"delta={self.delta} with {n} examples allows to publish one of them at random; give less than {1 / n:.1e}")
        return epsilon(self.noise, self.rate(n), self.steps, self.delta)


@dataclass(frozen=True)
class Learnt:
    """A finished run: what it cost, the share of gradients that were clipped, the mean loss of each step's sample. The last two look at
    the data without noise, so they are for the one who holds it; epsilon does not cover them."""

    epsilon: float
    delta: float
    clipped: float
    losses: tuple[float, ...]
    noise_known: bool = False  # a seed was given: who knows it takes the noise off

    def __repr__(self) -> str:
        cost = f"epsilon={self.epsilon:.2f} at delta={self.delta:g}"
        if self.noise_known:
            cost = f"not private: the noise is known; with unknown noise {cost}"
        return f"Learnt({cost}, {self.clipped:.0%} of the gradients clipped)"


def clipped_sum(adapters: Adapters, batch: Examples, clip: float, micro: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """({parameter: sum of clipped per-example gradients}, norms before clipping [n], losses [n])."""
    total = {name: torch.zeros_like(p) for name, p in adapters.parameters().items()}
    norms, told = [], []
    for rows in torch.arange(len(batch)).split(micro) if len(batch) else ():  # Poisson sampling may draw nobody
        part = batch[rows]
        part = Examples(part.ids[:, : (width := int(part.scored.any(0).nonzero().max()) + 1)], part.scored[:, :width])
        with torch.enable_grad(), adapters.copies(len(part)) as copies:
            each = losses(adapters, part)
            grads = dict(zip(copies, torch.autograd.grad(each.sum(), list(copies.values())), strict=True))
        norm = torch.sqrt(sum(g.flatten(1).double().pow(2).sum(1) for g in grads.values()))  # over all adapters together
        factor = (clip / norm.clamp(min=1e-12)).clamp(max=1.0).float()
        for name, g in grads.items():
            total[name] += torch.tensordot(factor, g, 1)
        norms.append(norm)
        told.append(each.detach())
    return total, torch.cat(norms) if norms else torch.zeros(0), torch.cat(told) if told else torch.zeros(0)


def uniform(n: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` numbers in [0, 1), float64: of `generator`, or 53 bits each of the operating system's."""
    if generator is not None:
        return torch.rand(n, generator=generator).double()
    return torch.from_numpy((np.frombuffer(os.urandom(8 * n), "<u8") >> 11) * 2.0**-53)


def normal(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Standard normal float32 of `shape`: of `generator`, or of the operating system's random bytes.

    By Box and Muller (1958, Annals of Mathematical Statistics 29, 610): sqrt(-2 log u) cos(2 pi v). Nothing beyond 8.6 is ever drawn,
    a part of 1e-17.
    """
    if generator is not None:
        return torch.randn(shape, generator=generator)
    n = math.prod(shape)
    u, v = uniform(n), uniform(n)
    return (torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * math.pi * v)).float().view(tuple(shape))


def learn(adapters: Adapters, data: Examples, settings: DpSgd, *, seed: int | None = None, progress: bool = True) -> Learnt:
    """Trains `adapters` in place by DP-SGD. `seed=None`: chance from the operating system, which nobody can run again.

    A `seed` makes the noise known and the run not private; `Learnt.noise_known` says so.
    """
    rate, cost = settings.rate(len(data)), settings.epsilon(len(data)) if settings.noise else math.inf
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    learnt = adapters.parameters()
    optimizer = torch.optim.Adam(learnt.values(), lr=settings.lr)
    clipped, seen, told = 0, 0, []
    for step in tqdm(range(settings.steps), desc="DP-SGD" if settings.noise else "SGD", unit="step", disable=not progress):
        rows = (uniform(len(data), generator) < rate).nonzero()[:, 0]
        total, norms, each = clipped_sum(adapters, data[rows], settings.clip, settings.micro)
        for name, p in learnt.items():
            noise = normal(p.shape, generator) * (settings.noise * settings.clip) if settings.noise else 0.0
            p.grad = (total[name] + noise) / settings.batch  # the expected size: the real one is a secret, too
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.step()
        clipped, seen = clipped + int((norms > settings.clip).sum()), seen + len(norms)
        told.append(float(each.mean()) if len(each) else math.nan)
    for p in learnt.values():
        p.grad = None
    return Learnt(cost, settings.delta, clipped / max(1, seen), tuple(told), noise_known=bool(settings.noise) and seed is not None)


# ---------------------------------------------------------------------------------------------------------- membership


def auc(members: np.ndarray, others: np.ndarray, groups: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Chance that a member's loss is below another's, ties half: 0.5 tells nothing, 1 all.

    `groups`: labels of members and others; only pairs of one label are compared, so that harder kinds of text on one side do not count.

    >>> auc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.875
    >>> auc(np.array([1.0, 5.0]), np.array([1.0, 5.0]), (np.array(["easy", "hard"]), np.array(["easy", "hard"])))
    0.5
    """
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others: an attack needs both")
    below = (members[:, None] < others) + 0.5 * (members[:, None] == others)
    if groups is None:
        return float(below.mean())
    alike = groups[0][:, None] == groups[1]
    if not alike.any():
        raise ValueError("no member has a label that one of the others has: nothing to compare")
    return float(below[alike].mean())


def auc_interval(members: np.ndarray, others: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """A 95 % percentile bootstrap interval of `auc`, members and others drawn apart."""
    rng = np.random.default_rng(seed)
    found = [auc(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(resamples)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def auc_bound(epsilon: float, delta: float = 0.0) -> float:
    """The area under the best ROC curve that (epsilon, delta) allows any attacker on one example's membership.

    >>> auc_bound(0.0), round(auc_bound(math.log(3)), 4), auc_bound(math.inf)
    (0.5, 0.75, 1.0)
    """
    if math.isinf(epsilon):
        return 1.0
    left = (1 - delta) / (1 + math.exp(epsilon))  # where e^epsilon x + delta meets 1 - e^-epsilon (1 - delta - x)
    rest = 1 - delta - left
    return math.exp(epsilon) * left**2 / 2 + delta * left + rest - math.exp(-epsilon) * rest**2 / 2 + delta


# --------------------------------------------------------------------------------------------------------------- study

EPSILONS = (math.inf, 8.0, 2.0)
ODD = 40  # canaries learnt, and as many that are not
_STUDY = DpSgd(noise=0.0, clip=1.0, batch=100, steps=40, lr=1e-2)
_FEW = DpSgd(noise=0.0, clip=1.0, batch=40, steps=50, lr=1e-2)  # of 2 ODD examples, each seen 25 times


def study(
    model: nn.Module,
    tokenizer,
    folder: Path,
    *,
    targets: Sequence[float] = EPSILONS,
    seeds: int = 3,
    settings: DpSgd = _STUDY,
    few: DpSgd = _FEW,
    n: int = 1000,
    tests: int = 300,
    odd: int = ODD,
    rank: int = 4,
    progress: bool = True,
) -> Report:
    """Rows per epsilon of `targets`: what the robot's commands cost to learn in private, and what an attacker can tell.

    `n` commands teach, and `odd` whose answers are swapped; as many of each never learnt are the others of the attack, members and
    others of one kind of command being compared. Then, for the first two targets, a run that memory shows in: `odd` commands and the
    `odd` ones, each seen often. Runs are kept in `folder`, so that a study which was stopped goes on. Settings were chosen on commands
    of another draw (seed 99).
    """
    data, more = adapt.commands(n, tests=tests), adapt.commands(4 * odd + 50, tests=1, seed=7)["train"]
    seen = set(data["train"]["text"])
    fresh = [i for i, text in enumerate(more["text"]) if text not in seen][: 2 * odd]
    canaries = examples(tokenizer, odd_ones(more.select(fresh)))
    held, told = examples(tokenizer, data["test"]), examples(tokenizer, data["train"])
    inside, outside = canaries[torch.arange(odd)], canaries[torch.arange(odd, 2 * odd)]
    parts = {"held": held, "members": told[torch.arange(min(tests, n))], "inside": inside, "outside": outside}
    learnt = {"": (told + inside, settings, targets), _SMALL: (told[torch.arange(odd)] + inside, few, targets[:2])}
    runs = [(kind, target, seed) for kind, (_, _, wanted) in learnt.items() for seed in range(seeds) for target in wanted]
    found: dict[tuple[str, float, int], dict] = {}
    for kind, target, seed in tqdm(runs, desc="private", unit="run", disable=not progress):
        rows, s, _ = learnt[kind]
        if math.isfinite(target):
            s = replace(s, noise=noise_for(target, s.rate(len(rows)), s.steps, s.delta))
        path = Path(folder) / f"{kind and 'few-'}{target:g}-{seed}.json"
        facts = {"settings": repr(s), "n": len(rows), "rank": rank, "seed": seed}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("facts") != facts:
            adapters = Adapters(model, rank, seed=seed)
            ran = learn(adapters, rows, s, seed=seed, progress=progress)
            scored = {name: answered(adapters, part) for name, part in parts.items()}
            kept = {"facts": facts, "epsilon": ran.epsilon if s.noise else None, "noise": s.noise, "clipped": ran.clipped}
            kept |= {"losses": list(ran.losses), "right": scored["held"].right.tolist(), "exact": scored["held"].exact.tolist()}
            kept |= {f"nll {name}": v.nll.tolist() for name, v in scored.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(temporary, path)
        found[kind, target, seed] = kept
    start = Adapters(model, 1)
    before = {name: answered(start, part) for name, part in parts.items()}
    rows = quality_rows("before", *([getattr(before["held"], f)] for f in ("exact", "right", "nll")))
    of_members, of_held = (_kinds(tokenizer, data[split]) for split in ("train", "test"))
    groups = of_members[: len(parts["members"])], of_held
    chance = {"auc members": ("members", "held", groups), "auc odd ones": ("inside", "outside", None)}
    for what, (a, b, within) in chance.items():  # before anything was learnt: how far the two sets differ by themselves
        pair = before[a].nll, before[b].nll
        low, high = interval(_attacks([pair], within))
        common = {"slice": adapt.DOMAIN, "machine": machine(), "note": "the loss as score: what chance in drawing the sets makes"}
        rows.append(Row("before", what, auc(*pair, within), "", low=low, high=high, **common))
    for kind, (learnt_rows, s, wanted) in learnt.items():
        for target in wanted:
            each = [found[kind, target, seed] for seed in range(seeds)]
            name = (f"epsilon {target:g}" if math.isfinite(target) else "not private") + kind
            rows += quality_rows(name, *([np.array(e[k], float) for e in each] for k in ("exact", "right", "nll held")))
            spent = math.inf if each[0]["epsilon"] is None else each[0]["epsilon"]
            note = f"delta {s.delta:g}, {len(learnt_rows)} examples, {s.steps} steps of {s.batch}, add or remove one example"
            common = {"slice": adapt.DOMAIN, "n": seeds, "machine": machine()}
            facts = {"epsilon": spent, "noise": each[0]["noise"], "clipped": float(np.mean([e["clipped"] for e in each]))}
            for what, value in facts.items():
                if math.isfinite(value):  # a run without noise has no epsilon
                    rows.append(Row(name, what, value, "share" if what == "clipped" else "", note=note, **common))
            attacks = {"auc odd ones": ("inside", "outside", None)}
            if not kind:
                attacks = {"auc members": ("members", "held", groups)} | attacks
            for what, (a, b, within) in attacks.items():
                pairs = [(np.array(e[f"nll {a}"]), np.array(e[f"nll {b}"])) for e in each]
                value, drawn = float(np.mean([auc(x, y, within) for x, y in pairs])), _attacks(pairs, within)
                rows.append(Row(name, what, value, "", low=interval(drawn)[0], high=interval(drawn)[1], note="the loss as score", **common))
            bound = auc_bound(spent, s.delta)
            rows.append(Row(name, "auc bound", bound, "", adapt.DOMAIN, machine=machine(), provenance="modelled"))
    return Report(tuple(rows))


_SMALL = f", {2 * ODD} examples"


def _kinds(tokenizer, data) -> np.ndarray:
    """The kind of command of each row, in the order of `examples`."""
    call = dict(zip(data["id"], data["answer"], strict=True))
    return np.array([json.loads(call[d.source])["call"] for d in documents(data, tokenizer)])


def over_seeds(values: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of `values` [seeds][documents]: a 95 % bootstrap interval over runs and over documents, both drawn anew."""
    table, rng = np.stack(values).astype(float), np.random.default_rng(seed)
    runs, docs = table.shape
    by_run = rng.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
    by_doc = rng.multinomial(docs, np.full(docs, 1 / docs), resamples) / docs
    return float(table.mean()), *interval(np.einsum("sr,rd,sd->s", by_run, table, by_doc))


def quality_rows(name: str, exact: Sequence, right: Sequence, nll: Sequence) -> list[Row]:
    """Rows of exact match, tokens right and loss, each [seeds][documents], with `over_seeds` intervals."""
    rows = []
    for metric, unit, values in (("exact_match", "share", exact), ("tokens_right", "share", right), ("nll", "nats/tok", nll)):
        mean, low, high = over_seeds(values)
        if metric == "exact_match" and mean in (0.0, 1.0):  # no resample differs; the exact bound, as in `evaluate`
            least = 0.025 ** (1 / len(values[0]))
            low, high = (0.0, 1 - least) if mean == 0 else (least, 1.0)
        each = ", ".join(f"{np.mean(v):.3f}" for v in values)
        common = {"n": len(values[0]), "machine": machine(), "note": f"{len(values)} seeds: {each}"}
        rows.append(Row(name, metric, mean, unit, adapt.DOMAIN, low, high, **common))
    return rows


def _attacks(pairs: Sequence[tuple[np.ndarray, np.ndarray]], groups=None, *, resamples: int = 500, seed: int = 0) -> np.ndarray:
    """Resampled mean AUC: runs, members and others drawn anew."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        values = []
        for i in rng.integers(len(pairs), size=len(pairs)):
            at = [rng.integers(len(x), size=len(x)) for x in pairs[i]]
            drawn = None if groups is None else tuple(g[j] for g, j in zip(groups, at, strict=True))
            values.append(auc(*(x[j] for x, j in zip(pairs[i], at, strict=True)), drawn))
        found.append(np.mean(values))
    return np.array(found)
