"""Federated averaging of LoRA adapters: devices learn on what they hold, a server averages what they learnt; no example moves.

A round of FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1), on adapters W + B A (arXiv 2106.09685):

    server   sends the adapters
    client i takes E steps on its own n_i examples, returns what changed, as safetensors bytes
    server   adds sum_i n_i delta_i / sum_i n_i, over the clients that answered

**The pitfall of averaging two factors.** What a client learnt is the product B_i A_i, and

    mean(B_i A_i) != mean(B_i) mean(A_i)

as soon as both move: the right side holds terms B_i A_j of clients that never met. FFA-LoRA (Sun et al. 2024, arXiv 2403.12313)
freezes A, drawn alike everywhere by one seed, and averages B: exact, as B_i A is linear in B_i, with half of the bytes or
less. `mode="both"` averages the factors anyway; every round then says how far it missed (`Round.gap`).

**Exact or accurate.** An exact mean of what was learnt is not the mean of what it is good for. In `study` (six devices, one kind of
command each, three seeds; whole answers right) the mean of FFA is exact, and takes from each device more than half of what it had on
its own kind when it learnt alone. The mean of both factors misses by 13 %, takes a quarter, and twice as many numbers learn:

                        alone, own kind   federated   bytes a round
    both factors             0.61           0.45         226 kB
    A frozen (FFA)           0.47           0.19         119 kB

So "both" is the default. Use "ffa" where half of the bytes, or a mean that is exact, is worth that. For its own kind alone a device
does best by itself; averaging brings the other kinds: over all of them a device alone has 0.10.

**A client that drops out.** An update is a function of (adapters, client, round, seed), so when a worker dies its task runs again
elsewhere and gives the same update. The server holds a round's updates by client: a second one is refused, one of another round too,
and a client that never answers is left out of the mean, with its weight. So no update is lost by a dying worker, and none counts twice.

**A client that lies.** `Collected.take` believes nothing: an update must be safetensors bytes of the layers, shapes and type that were
sent out, finite, of 1 to `most` examples, and no longer than an honest one can be: clipped by the server where `clip` is set, refused
elsewhere beyond what Adam can move (`reach`). What fails is told with the client's name and left out; the round goes on. A lie inside
these bounds counts: up to `most` examples of weight without `clip`, one client's share with it. Clients are not authenticated: who
sent an update is what the engine says.

**Privacy.** The examples stay, and that is no proof of anything: updates tell of examples (Zhu et al. 2019, arXiv 1906.08935).
`sealed=True` encrypts them to the server, which sees each one; secure aggregation is not here. `clip` and `noise` make a round a
Gaussian mechanism with the client as its unit (DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963): each delta is clipped to norm C, all
weigh alike, the mean gets noise of sigma C / clients. So epsilon depends on sigma alone, and what the noise does to the mean on how many
clients share it: with few it leaves nothing. Noise comes from the operating system (`private.normal`); with `noise_seed`, for tests,
it is known, and `FedAvg.epsilon` refuses to promise anything.

**Engine.** `engine="local"` runs clients one after the other here. A `distributed.Client` runs them on its workers; each worker
reads the model from its folder, and dask moves the simulated clients' examples to them, as no protocol would. dask talks to its
own processes by pickle: an engine for simulations on one machine (`cluster`: 127.0.0.1, no dashboard), no boundary of trust.
Flower was looked at: its 1.42 holds protobuf, typer, rich and packaging below what this project runs with.
"""

import functools
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as bytes_of
from torch import Tensor
from tqdm.auto import tqdm

from edgelab import adapt
from edgelab.compress import compress
from edgelab.features import Caller, Envelope, Identity, SealError, open_, seal, tensors_of
from edgelab.model import load
from edgelab.private import Adapters, Examples, answered, epsilon, examples, losses, normal, quality_rows
from edgelab.recipe import Recipe
from edgelab.report import Report, Row, machine

MODES = ("both", "ffa")
_B1, _B2 = 0.9, 0.999  # of Adam


@dataclass(frozen=True)
class Base:
    """The model that every device has already: `folder`, rounded to `scheme` (None: as it is), with adapters of `rank`."""

    folder: str
    scheme: str | None = "int4-g32"
    rank: int = 4
    mode: str = "both"
    seed: int = 0  # of A, the same everywhere

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not known; use 'both', or 'ffa', which averages exactly and answers less")

    def adapters(self) -> Adapters:
        """Fresh adapters on the model."""
        return Adapters(_model(self.folder, self.scheme), self.rank, freeze_a=self.mode == "ffa", seed=self.seed)


@functools.lru_cache(maxsize=2)
def _model(folder: str, scheme: str | None):
    model = load(folder)
    return model if scheme is None else compress(model, Recipe.uniform(scheme), progress=False).model


@functools.lru_cache(maxsize=2)
def _adapters(base: Base) -> Adapters:
    return base.adapters()  # a client loads its state before each use


@dataclass(frozen=True)
class FedAvg:
    """Settings. `steps` of Adam per client and round, with `batch` of its examples, at a rate that falls to 0 over the rounds.

    `clip` 0: weights by examples, of which a client counts for `most` at the most. Above 0: deltas are clipped to it and weigh alike;
    `noise` sigma in units of it. `seed` draws the clients' batches. `noise_seed` None: noise from the operating system; a number, for
    tests alone, makes the noise known and the run not private.
    """

    rounds: int = 12
    steps: int = 4
    batch: int = 16
    lr: float = 1e-2
    clip: float = 0.0
    noise: float = 0.0
    sealed: bool = False
    seed: int = 0
    most: int = 10_000
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps, self.batch, self.most) < 1 or not self.lr > 0:
            counts = f"rounds={self.rounds}, steps={self.steps}, batch={self.batch}, most={self.most}"
            raise ValueError(f"{counts} must be 1 or more, lr={self.lr} above 0")
        if self.clip < 0 or self.noise < 0 or (self.noise and not self.clip):
            raise ValueError(f"clip={self.clip}, noise={self.noise}: noise hides an update only when clip bounds it; give clip=1.0")

    def epsilon(self, delta: float) -> float:
        """What all rounds cost a client that takes part in each: every client does, so nothing is won by sampling.

        Raises ValueError where `noise_seed` is given: noise that can be drawn again can be taken off again.
        """
        if self.noise and self.noise_seed is not None:
            raise ValueError(f"noise_seed={self.noise_seed}: not private, the noise is known; leave it None for the operating system's")
        return epsilon(self.noise, 1.0, self.rounds, delta)

    @property
    def reach(self) -> float:
        """How far `steps` steps of Adam can move one number at the most.

        A step is lr m / sqrt(v). With m = (1 - b1) sum b1^j g_j and v = (1 - b2) sum b2^j g_j^2 (Kingma and Ba 2015, arXiv 1412.6980,
        algorithm 1), the inequality of Cauchy and Schwarz gives m^2 / v <= (1 - b1)^2 / (1 - b2) / (1 - b1^2 / b2), and the corrections
        of their bias are together below 1.

        >>> round(FedAvg(steps=4, lr=0.03).reach, 3)
        0.872
        """
        return self.steps * self.lr * math.sqrt((1 - _B1) ** 2 / (1 - _B2) / (1 - _B1**2 / _B2))


# -------------------------------------------------------------------------------------------------------------- client


@dataclass(frozen=True)
class Task:
    """What a client needs for one round, all plain bytes and numbers. `keys`: the server's two public keys, or none."""

    base: Base
    settings: FedAvg
    client: int
    round: int
    data: bytes
    state: bytes
    keys: tuple[bytes, bytes] | None = None


def packed(data: Examples) -> bytes:
    """`data` as safetensors bytes."""
    return bytes_of({"ids": data.ids.contiguous(), "scored": data.scored.contiguous()})


def work(task: Task) -> bytes:
    """A client's round: the sealed or plain safetensors bytes that go to the server."""
    s, data, state = task.settings, Examples(**tensors_of(task.data)), tensors_of(task.state)
    adapters = _adapters(task.base)
    adapters.load(state)
    descend(adapters, data, s.steps, s.batch, s.lr * (1 - task.round / s.rounds), (s.seed, task.round, task.client))
    delta = {n: t - state[n] for n, t in adapters.state().items()}
    if s.clip:
        delta = clipped(delta, s.clip)  # the server does it again, as it trusts nobody
    delta["about"] = torch.tensor([task.round, task.client, min(len(data), s.most)])
    if task.keys is None:
        return bytes_of(delta)
    caller = Caller(task.keys[0])  # a key for this try alone: a task that runs twice uses no nonce twice
    return caller.hello + seal(caller.finish(task.keys[1]), delta).to_bytes()


def clipped(delta: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """`delta` scaled to an Euclidean norm over all tensors of `clip`, or as it is if it is shorter.

    >>> clipped({"x": torch.tensor([3.0, 4.0])}, 1.0)["x"]
    tensor([0.6000, 0.8000])
    """
    norm = math.sqrt(sum(float(t.double().pow(2).sum()) for t in delta.values()))
    return dict(delta) if norm <= clip else {n: (t.double() * (clip / norm)).to(t.dtype) for n, t in delta.items()}


def descend(adapters: Adapters, data: Examples, steps: int, batch: int, lr: float, seed, *, falling: bool = False) -> None:
    """Plain steps of Adam on `batch` examples each, in place; `falling`: the rate goes to 0."""
    learnt, rng = list(adapters.parameters().values()), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(learnt, lr=lr, betas=(_B1, _B2))
    for step in range(steps):
        rows = torch.from_numpy(rng.choice(len(data), min(batch, len(data)), replace=False))
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) if falling else lr
        with torch.enable_grad():
            grads = torch.autograd.grad(losses(adapters, data[rows]).mean(), learnt)
        for p, g in zip(learnt, grads, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------------------- server


_SLACK = 1 << 14  # bytes around the numbers of an update: the keys, headers and tags


class RoundError(ValueError):
    """An update that does not count: its message names the client and the reason."""


class Collected:
    """The updates of round `number` from `clients`, against the adapters `state` that they were sent.

    `identity` and `fresh`: the server's keys, where updates come sealed.
    """

    def __init__(
        self, number: int, clients: Sequence[int], state: Mapping[str, Tensor], settings: FedAvg, identity: Identity | None = None
    ) -> None:
        self.number, self.clients, self.state, self.settings, self.identity = number, frozenset(clients), state, settings, identity
        self.fresh = None if identity is None else identity.fresh()
        self.deltas: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self.bytes_up = 0
        self._room = sum(t.nbytes for t in state.values()) + 256 * len(state) + _SLACK

    @property
    def keys(self) -> tuple[bytes, bytes] | None:
        return None if self.identity is None else (self.identity.public, self.fresh.public_key().public_bytes_raw())

    def take(self, sender: int, raw: bytes) -> None:
        """Keeps the update `raw` that client `sender` sent. Raises `RoundError` for one that does not count; nothing is kept of it then."""
        self.bytes_up += len(raw)
        if sender not in self.clients:
            raise RoundError(f"client {sender} was not asked in round {self.number}")
        if sender in self.deltas:
            raise RoundError(f"client {sender} sent an update of round {self.number} already; a second one does not count")
        try:
            self.deltas[sender] = self._checked(sender, raw)
        except SealError as error:
            raise RoundError(f"the update of client {sender} in round {self.number} does not count: {error}") from error

    def _checked(self, sender: int, raw: bytes) -> tuple[int, dict[str, Tensor]]:
        """(examples that it counts for, delta). Cheap checks come first: nothing is computed with what was not looked at."""

        def refuse(why: str) -> RoundError:
            return RoundError(f"the update of client {sender} in round {self.number} does not count: {why}")

        if len(raw) > self._room:
            raise refuse(f"it has {len(raw):,} bytes, an honest one at most {self._room:,}")
        if self.identity is None:
            found = tensors_of(raw)
        else:
            session, _ = self.identity.accept(raw[:32], self.fresh)
            found = open_(session, Envelope.from_bytes(raw[32:]))
        about = found.pop("about", None)
        if about is None or about.dtype != torch.int64 or about.shape != (3,):
            raise refuse("it lacks `about`, int64 [round, client, examples]")
        number, client, n = about.tolist()
        if number != self.number:
            raise refuse(f"it is of round {number}, this is round {self.number}")
        if client != sender:
            raise refuse(f"it says that it is client {client}'s")
        if not 1 <= n <= self.settings.most:
            raise refuse(f"it is of n={n} examples; n must be 1 to {self.settings.most:,} (FedAvg.most)")
        if set(found) != set(self.state):
            raise refuse(f"its layers are not those sent out: {min(set(found) ^ set(self.state))!r} is in one alone")
        for name, like in self.state.items():
            t = found[name]
            if t.shape != like.shape or t.dtype != like.dtype:
                raise refuse(f"{name} is {t.dtype} {tuple(t.shape)}, sent out was {like.dtype} {tuple(like.shape)}")
            if not t.isfinite().all():
                raise refuse(f"{name} holds numbers that are not finite")
        if self.settings.clip:
            return n, clipped(found, self.settings.clip)
        furthest, reach = max(float(t.abs().max()) for t in found.values()), self.settings.reach
        if furthest > reach * (1 + 1e-3):  # rounding
            raise refuse(f"a number moved by {furthest:.3g}; {self.settings.steps} steps of Adam move none by more than {reach:.3g}")
        return n, found

    def shares(self) -> dict[int, float]:
        """{client: weight}: by examples, or with `clip` alike among all that were asked. In order: sums do not tell who was first."""
        order = sorted(self.deltas)
        if self.settings.clip:
            return dict.fromkeys(order, 1 / len(self.clients))
        total = sum(self.deltas[c][0] for c in order)
        return {c: self.deltas[c][0] / total for c in order}

    def mean(self, known: torch.Generator | None = None) -> dict[str, Tensor]:
        """The weighted mean of the updates taken; with `clip`, their sum over the number asked, and the noise. Raises without any.

        Noise is the operating system's, or of `known`, for tests.
        """
        if not self.deltas:
            raise RoundError(f"no client answered in round {self.number}")
        s, share = self.settings, self.shares()
        merged = {n: sum(w * self.deltas[c][1][n] for c, w in share.items()) for n in self.state}
        if s.noise:
            scale = s.noise * s.clip / len(self.clients)
            merged = {n: t + scale * normal(t.shape, known) for n, t in merged.items()}
        return merged

    def gap(self) -> float:
        """|mean(B_i A_i) - mean(B_i) mean(A_i)| over |mean(B_i A_i)|, Frobenius, over all layers; 0 where A is frozen."""
        if not any(n.endswith(".a") for n in self.state):
            return 0.0
        share, missed, whole = self.shares(), 0.0, 0.0
        total = sum(share.values())
        for layer in sorted({n[:-2] for n in self.state}):
            a, b = ([(w / total, self.state[k] + self.deltas[c][1][k]) for c, w in share.items()] for k in (f"{layer}.a", f"{layer}.b"))
            exact = sum(w * (bi @ ai) for (w, ai), (_, bi) in zip(a, b, strict=True))
            factors = sum(w * bi for w, bi in b) @ sum(w * ai for w, ai in a)
            missed, whole = missed + float((exact - factors).pow(2).sum()), whole + float(exact.pow(2).sum())
        return math.sqrt(missed / whole) if whole else 0.0


@dataclass(frozen=True)
class Round:
    """Facts of a round. `bytes_down` and `bytes_up` of all clients together; `missing` did not count, `refused` says of whom and why."""

    number: int
    arrived: tuple[int, ...]
    missing: tuple[int, ...]
    bytes_down: int
    bytes_up: int
    gap: float
    seconds: float
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Averaged:
    """`state` of the adapters after all `rounds`: for `Adapters.load`. `noise_known`: a seed was given, so no epsilon holds."""

    state: dict[str, Tensor]
    rounds: tuple[Round, ...]
    noise_known: bool = False

    def __repr__(self) -> str:
        r = self.rounds[-1]
        missed, refused = (sum(len(getattr(x, f)) for x in self.rounds) for f in ("missing", "refused"))
        up, down = (x / max(1, len(r.arrived) + len(r.missing)) for x in (r.bytes_up, r.bytes_down))
        told = f"{len(self.rounds)} rounds, {missed} updates missing, {refused} refused"
        known = ", not private: the noise is known" if self.noise_known else ""
        return f"Averaged({told}, a client sends {up:,.0f} B and gets {down:,.0f} B a round{known})"


def average(
    base: Base, clients: Sequence[Examples], settings: FedAvg, *, engine="local", timeout_s: float | None = None, progress: bool = True
) -> Averaged:
    """Federated averaging over `clients`. `engine`: "local", or a `distributed.Client`.

    `timeout_s`: a round waits no longer; who has not answered then is missing. So is a client whose workers died three times, and one
    whose update is refused (`Collected.take`), of which a warning tells.
    """
    if not clients or any(len(c) == 0 for c in clients):
        raise ValueError(f"{len(clients)} clients, some without examples: a client needs at least one")
    if isinstance(engine, str) and engine != "local":
        raise ValueError(f"engine={engine!r} is not known; use 'local', or a distributed.Client, as of federated.cluster()")
    state, held = base.adapters().state(), [packed(c) for c in clients]
    identity = Identity() if settings.sealed else None
    known = None if settings.noise_seed is None else torch.Generator().manual_seed(settings.noise_seed)
    told = []
    for number in tqdm(range(settings.rounds), desc="federated", unit="round", disable=not progress):
        began, sent, refused = time.monotonic(), bytes_of(state), []
        collected = Collected(number, range(len(clients)), state, settings, identity)
        tasks = [Task(base, settings, i, number, data, sent, collected.keys) for i, data in enumerate(held)]
        for sender, raw in ((t.client, work(t)) for t in tasks) if engine == "local" else _on_workers(engine, tasks, timeout_s):
            try:
                collected.take(sender, raw)
            except RoundError as error:
                refused.append(str(error))
                warnings.warn(f"{error}; the round goes on without it", stacklevel=2)
        gap = 0.0
        if collected.deltas:
            gap, mean = collected.gap(), collected.mean(known)
            state = {n: t + mean[n] for n, t in state.items()}
        arrived = tuple(sorted(collected.deltas))
        missing = tuple(sorted(collected.clients - set(arrived)))
        down = len(clients) * (len(sent) + (64 if collected.keys else 0))
        told.append(Round(number, arrived, missing, down, collected.bytes_up, gap, time.monotonic() - began, tuple(refused)))
    return Averaged(state, tuple(told), bool(settings.noise) and settings.noise_seed is not None)


def _on_workers(client, tasks: Sequence[Task], timeout_s: float | None) -> Iterator[tuple[int, bytes]]:
    """(client, what its worker returns), as it comes. A task whose worker dies runs again; one that killed three workers is missing."""
    from distributed import KilledWorker, as_completed

    run = secrets.token_hex(4)
    futures = {client.submit(work, t, key=f"update-{run}-{t.round}-{t.client}", pure=False): t.client for t in tasks}
    try:
        for future in as_completed(list(futures), timeout=timeout_s):
            try:
                yield futures[future], future.result()
            except KilledWorker:
                continue
    except TimeoutError:
        return
    finally:
        client.cancel(list(futures))


@contextmanager
def cluster(workers: int = 2) -> Iterator:
    """A `distributed.Client` of worker processes on this machine: on 127.0.0.1 alone, without a dashboard. Needs the extra `cluster`."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ImportError("a cluster needs `distributed`: pip install 'edgelab[cluster]', or use engine='local'") from error
    settings = {"n_workers": workers, "threads_per_worker": 1, "processes": True, "host": "127.0.0.1", "dashboard_address": None}
    with LocalCluster(**settings, worker_dashboard_address=None, silence_logs=50) as made, Client(made) as client:
        yield client


# --------------------------------------------------------------------------------------------------------------- study


def by_kind(tokenizer, data) -> dict[str, Examples]:
    """{call: the examples of a Dataset of `adapt.commands` that mean it}: devices that are each used for one thing."""
    kinds = [json.loads(a)["call"] for a in data["answer"]]
    return {kind: examples(tokenizer, data.select([i for i, k in enumerate(kinds) if k == kind])) for kind in sorted(set(kinds))}


_STUDY = FedAvg(rounds=10, steps=4, batch=12, lr=3e-2)


def study(
    base: Base,
    tokenizer,
    folder: Path,
    *,
    settings: FedAvg = _STUDY,
    seeds: int = 3,
    n: int = 1000,
    tests: int = 200,
    progress: bool = True,
) -> Report:
    """Rows for: each device alone, federated, pooled in one place; the same steps and batch each, with both factors learning and with A
    frozen. And one seed with noise.

    A device holds one kind of command (`by_kind`). Alone: the mean over devices, on all commands and on its own kind; as each command
    belongs to one device, a federated model's mean over all commands is the mean over devices on their own kind, too. Runs are kept
    in `folder`, so that a study which was stopped goes on.
    """
    data = adapt.commands(n, tests=tests)
    mine, held = by_kind(tokenizer, data["train"]), by_kind(tokenizer, data["test"])
    kinds, everything = list(mine), functools.reduce(Examples.__add__, held.values())
    kind_of = np.repeat(np.arange(len(kinds)), [len(held[k]) for k in kinds])
    clients, steps = [mine[k] for k in kinds], settings.rounds * settings.steps

    def alone(of: Base) -> dict:
        each = []
        for i, client in enumerate(clients):
            adapters = of.adapters()
            descend(adapters, client, steps, settings.batch, settings.lr, (of.seed, i), falling=True)
            each.append(answered(adapters, everything))
        found = {f: np.mean([getattr(e, f) for e in each], 0).tolist() for f in _SCORES}
        return found | {f"own {f}": np.array([getattr(each[k], f)[j] for j, k in enumerate(kind_of)], float).tolist() for f in _SCORES}

    def pooled(of: Base) -> dict:
        adapters = of.adapters()
        together = functools.reduce(Examples.__add__, clients)
        descend(adapters, together, steps, settings.batch * len(clients), settings.lr, (of.seed, 99), falling=True)
        return _scored(adapters, everything)

    def federated(of: Base, **changes) -> dict:
        ran = average(of, clients, replace(settings, seed=of.seed, **changes), progress=progress)
        adapters = of.adapters()
        adapters.load(ran.state)
        last = ran.rounds[-1]
        facts = {
            "gap": float(np.mean([r.gap for r in ran.rounds])),
            "up": last.bytes_up / len(clients),
            "down": last.bytes_down / len(clients),
        }
        return _scored(adapters, everything) | facts

    every = {"alone": alone, "federated": federated, "pooled": pooled}
    runs = [
        (name + _NAMED[mode], replace(base, mode=mode, seed=seed), run, {})
        for mode in MODES for seed in range(seeds) for name, run in every.items()
    ]  # fmt: skip
    noisy = {"clip": _CLIP, "noise": _NOISE}
    runs.append((f"federated{_NAMED['ffa']}, noise {_NOISE:g}", replace(base, mode="ffa", seed=0), federated, noisy))
    found: dict[str, list[dict]] = {}
    for name, of, run, changes in tqdm(runs, desc="federated study", unit="run", disable=not progress):
        path = Path(folder) / f"{name.replace(', ', '-').replace(' ', '-')}-{of.seed}.json"
        facts = {"settings": repr(replace(settings, **changes)), "base": repr(replace(of, folder=Path(of.folder).name)), "n": n}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("facts") != facts:
            kept = run(of, **changes) | {"facts": facts}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(temporary, path)
        found.setdefault(name, []).append(kept)
    return _rows(found, replace(settings, **noisy).epsilon(1e-5))


def _rows(found: Mapping[str, Sequence[Mapping]], spent: float) -> Report:
    """The rows of runs {name: [what each seed found]}; `spent` is the epsilon of the one with noise, the last."""
    rows = []
    for name, each in found.items():
        rows += quality_rows(name, *([np.array(e[f]) for e in each] for f in _SCORES))
        for what, unit in (("gap", "share"), ("up", "B"), ("down", "B")):
            if what in each[0]:
                metric = {"gap": "gap of the mean of factors", "up": "bytes up", "down": "bytes down"}[what]
                rows.append(Row(name, metric, float(np.mean([e[what] for e in each])), unit, "a client's round", machine=machine()))
        if "own exact" in each[0]:
            rows += quality_rows(f"{name}, own kind", *([np.array(e[f"own {f}"]) for e in each] for f in _SCORES))
    note = "per client, delta 1e-5; noise of the operating system"
    rows.append(Row(list(found)[-1], "epsilon", spent, "", adapt.DOMAIN, note=note, machine=machine()))
    return Report(tuple(rows))


_NAMED = {"both": "", "ffa": ", A frozen"}
_SCORES = ("exact", "right", "nll")
_CLIP, _NOISE = 1.0, 1.0


def _scored(adapters: Adapters, held: Examples) -> dict[str, list[float]]:
    a = answered(adapters, held)
    return {f: getattr(a, f).astype(float).tolist() for f in _SCORES}
