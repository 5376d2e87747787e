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

**A client that drops out.** An update is a function of (adapters, client, round, seed), so when a worker dies its task runs again
elsewhere and gives the same update. The server holds a round's updates by client: a second one is refused, one of another round too,
and a client that never answers is left out of the mean, with its weight. So no update is lost by a dying worker, and none counts twice.

**Privacy.** The examples stay, and that is no proof of anything: updates tell of examples (Zhu et al. 2019, arXiv 1906.08935).
`sealed=True` encrypts them to the server, which sees each one; secure aggregation is not here. `clip` and `noise` make a round a
Gaussian mechanism with the client as its unit (DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963): each delta is clipped to norm C, all
weigh alike, the mean gets noise of sigma C / clients. So epsilon depends on sigma alone, and what the noise does to the mean on how many
clients share it: with few it leaves nothing. Clients are not authenticated: who returns an update is what the engine says.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor
from tqdm.auto import tqdm

from edgelab import adapt
from edgelab.compress import compress
from edgelab.features import Caller, Envelope, Identity, open_, seal
from edgelab.model import load
from edgelab.private import Adapters, Examples, answered, epsilon, examples, losses, quality_rows
from edgelab.recipe import Recipe
from edgelab.report import Report, Row, machine

MODES = ("ffa", "both")


@dataclass(frozen=True)
class Base:
    """The model that every device has already: `folder`, rounded to `scheme` (None: as it is), with adapters of `rank`."""

    folder: str
    scheme: str | None = "int4-g32"
    rank: int = 4
    mode: str = "ffa"
    seed: int = 0  # of A, the same everywhere

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not known; use 'ffa', which averages exactly, or 'both'")

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

    `clip` 0: no bound, weights by examples. Above 0: deltas are clipped to it and weigh alike; `noise` sigma in units of it.
    """

    rounds: int = 12
    steps: int = 4
    batch: int = 16
    lr: float = 1e-2
    clip: float = 0.0
    noise: float = 0.0
    sealed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps, self.batch) < 1 or not self.lr > 0:
            raise ValueError(f"rounds={self.rounds}, steps={self.steps}, batch={self.batch} must be 1 or more, lr={self.lr} above 0")
        if self.clip < 0 or self.noise < 0 or (self.noise and not self.clip):
            raise ValueError(f"clip={self.clip}, noise={self.noise}: noise hides an update only when clip bounds it; give clip=1.0")

    def epsilon(self, delta: float) -> float:
        """What all rounds cost a client that takes part in each: every client does, so nothing is won by sampling."""
        return epsilon(self.noise, 1.0, self.rounds, delta)


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
        norm = math.sqrt(sum(float(t.double().pow(2).sum()) for t in delta.values()))
        delta = {n: t * min(1.0, s.clip / max(norm, 1e-12)) for n, t in delta.items()}
    delta["about"] = torch.tensor([task.round, task.client, len(data)])
    if task.keys is None:
        return bytes_of(delta)
    caller = Caller(task.keys[0])  # a key for this try alone: a task that runs twice uses no nonce twice
    return caller.hello + seal(caller.finish(task.keys[1]), delta).to_bytes()


def descend(adapters: Adapters, data: Examples, steps: int, batch: int, lr: float, seed, *, falling: bool = False) -> None:
    """Plain steps of Adam on `batch` examples each, in place; `falling`: the rate goes to 0."""
    learnt, rng = list(adapters.parameters().values()), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(learnt, lr=lr)
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


class RoundError(ValueError):
    """An update that does not belong: of another round, of an unknown client, or a client's second."""


class Collected:
    """The updates of one round by client. `identity` and `fresh`, the server's keys, where updates come sealed."""

    def __init__(self, number: int, clients: Sequence[int], identity: Identity | None = None) -> None:
        self.number, self.clients, self.identity = number, frozenset(clients), identity
        self.fresh = None if identity is None else identity.fresh()
        self.deltas: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self.bytes_up = 0

    @property
    def keys(self) -> tuple[bytes, bytes] | None:
        return None if self.identity is None else (self.identity.public, self.fresh.public_key().public_bytes_raw())

    def take(self, raw: bytes) -> int:
        """The client whose update `raw` is. Raises `RoundError` for one that does not count, `SealError` for one that does not open."""
        if self.identity is None:
            found = tensors_of(raw)
        else:
            session, _ = self.identity.accept(raw[:32], self.fresh)
            found = open_(session, Envelope.from_bytes(raw[32:]))
        number, client, n = (int(x) for x in found.pop("about"))
        if number != self.number:
            raise RoundError(f"the update of client {client} is of round {number}, this is round {self.number}: it comes too late")
        if client not in self.clients:
            raise RoundError(f"client {client} was not asked in round {number}")
        if client in self.deltas:
            raise RoundError(f"client {client} sent an update of round {number} already; a second one does not count")
        if not all(t.isfinite().all() for t in found.values()):
            raise RoundError(f"the update of client {client} holds numbers that are not finite; it does not count")
        self.deltas[client] = n, found
        self.bytes_up += len(raw)
        return client

    def mean(self, settings: FedAvg, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The weighted mean of the updates taken; with `clip`, their sum over the number asked, and the noise. Raises without any."""
        if not self.deltas:
            raise RoundError(f"no client answered in round {self.number}")
        order = sorted(self.deltas)  # the sum must not depend on who was first
        total = sum(self.deltas[c][0] for c in order)
        share = {c: 1 / len(self.clients) if settings.clip else self.deltas[c][0] / total for c in order}
        merged = {n: sum(share[c] * self.deltas[c][1][n] for c in order) for n in self.deltas[order[0]][1]}
        if settings.noise:
            scale = settings.noise * settings.clip / len(self.clients)
            merged = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in merged.items()}
        return merged

    def gap(self, base: Mapping[str, Tensor]) -> float:
        """|mean(B_i A_i) - mean(B_i) mean(A_i)| over |mean(B_i A_i)|, Frobenius, over all layers; 0 where A is frozen."""
        first = next(iter(self.deltas.values()))[1]
        if not any(n.endswith(".a") for n in first):
            return 0.0
        total, missed, whole = sum(n for n, _ in self.deltas.values()), 0.0, 0.0
        for layer in {n[:-2] for n in first}:
            a, b = ([(n / total, base[f"{layer}.{x}"] + d[f"{layer}.{x}"]) for n, d in self.deltas.values()] for x in "ab")
            exact = sum(w * (bi @ ai) for (w, ai), (_, bi) in zip(a, b, strict=True))
            factors = sum(w * bi for w, bi in b) @ sum(w * ai for w, ai in a)
            missed, whole = missed + float((exact - factors).pow(2).sum()), whole + float(exact.pow(2).sum())
        return math.sqrt(missed / whole) if whole else 0.0


@dataclass(frozen=True)
class Round:
    """Facts of a round. `bytes_down` and `bytes_up` of all clients together."""

    number: int
    arrived: tuple[int, ...]
    missing: tuple[int, ...]
    bytes_down: int
    bytes_up: int
    gap: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Averaged:
    """`state` of the adapters after all `rounds`: for `Adapters.load`."""

    state: dict[str, Tensor]
    rounds: tuple[Round, ...]

    def __repr__(self) -> str:
        r = self.rounds[-1]
        missed = sum(len(x.missing) for x in self.rounds)
        up, down = (x / max(1, len(r.arrived) + len(r.missing)) for x in (r.bytes_up, r.bytes_down))
        return f"Averaged({len(self.rounds)} rounds, {missed} updates missing, a client sends {up:,.0f} B and gets {down:,.0f} B a round)"


def average(
    base: Base, clients: Sequence[Examples], settings: FedAvg, *, engine="local", timeout_s: float | None = None, progress: bool = True
) -> Averaged:
    """Federated averaging over `clients`. `engine`: "local", or a `distributed.Client`.

    `timeout_s`: a round waits no longer; who has not answered then is missing. So is a client whose workers died three times.
    """
    if not clients or any(len(c) == 0 for c in clients):
        raise ValueError(f"{len(clients)} clients, some without examples: a client needs at least one")
    if isinstance(engine, str) and engine != "local":
        raise ValueError(f"engine={engine!r} is not known; use 'local', or a distributed.Client, as of federated.cluster()")
    state, held = base.adapters().state(), [packed(c) for c in clients]
    identity = Identity() if settings.sealed else None
    noise, told = torch.Generator().manual_seed(settings.seed), []
    for number in tqdm(range(settings.rounds), desc="federated", unit="round", disable=not progress):
        began, sent, collected = time.monotonic(), bytes_of(state), Collected(number, range(len(clients)), identity)
        tasks = [Task(base, settings, i, number, data, sent, collected.keys) for i, data in enumerate(held)]
        for raw in map(work, tasks) if engine == "local" else _on_workers(engine, tasks, timeout_s):
            collected.take(raw)
        if collected.deltas:
            gap = collected.gap(state)
            state = {n: t + d for (n, t), d in zip(state.items(), _ordered(collected.mean(settings, noise), state), strict=True)}
        arrived = tuple(sorted(collected.deltas))
        missing = tuple(sorted(collected.clients - set(arrived)))
        down = len(clients) * (len(sent) + (64 if collected.keys else 0))
        told.append(Round(number, arrived, missing, down, collected.bytes_up, gap if arrived else 0.0, time.monotonic() - began))
    return Averaged(state, tuple(told))


def _ordered(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> list[Tensor]:
    return [found[n] for n in like]


def _on_workers(client, tasks: Sequence[Task], timeout_s: float | None) -> Iterator[bytes]:
    """What the workers return, as it comes. A task whose worker dies runs again; one that killed three workers is missing."""
    from distributed import KilledWorker, as_completed

    run = secrets.token_hex(4)
    futures = [client.submit(work, t, key=f"update-{run}-{t.round}-{t.client}", pure=False) for t in tasks]
    try:
        for future in as_completed(futures, timeout=timeout_s):
            try:
                yield future.result()
            except KilledWorker:
                continue
    except TimeoutError:
        return
    finally:
        client.cancel(futures)


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
    """Rows for: each device alone, federated, pooled in one place; the same steps and batch each. And one seed of variants.

    A device holds one kind of command (`by_kind`). Alone: the mean over devices, on all commands and on its own kind. Runs are kept in
    `folder`, so that a study which was stopped goes on.
    """
    data = adapt.commands(n, tests=tests)
    mine, held = by_kind(tokenizer, data["train"]), by_kind(tokenizer, data["test"])
    kinds, everything = list(mine), functools.reduce(Examples.__add__, held.values())
    kind_of = np.repeat(np.arange(len(kinds)), [len(held[k]) for k in kinds])
    clients, steps = [mine[k] for k in kinds], settings.rounds * settings.steps

    def alone(s: int) -> dict:
        each = []
        for i, client in enumerate(clients):
            adapters = replace(base, seed=s).adapters()
            descend(adapters, client, steps, settings.batch, settings.lr, (s, i), falling=True)
            each.append(answered(adapters, everything))
        found = {f: np.mean([getattr(e, f) for e in each], 0).tolist() for f in _SCORES}
        return found | {f"own {f}": np.array([getattr(each[k], f)[j] for j, k in enumerate(kind_of)], float).tolist() for f in _SCORES}

    def pooled(s: int) -> dict:
        adapters = replace(base, seed=s).adapters()
        together = functools.reduce(Examples.__add__, clients)
        descend(adapters, together, steps, settings.batch * len(clients), settings.lr, (s, 99), falling=True)
        return _scored(adapters, everything)

    def federated(s: int, mode: str = "ffa", **changes) -> dict:
        of = replace(base, seed=s, mode=mode)
        ran = average(of, clients, replace(settings, seed=s, **changes), progress=progress)
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
    runs = [(name, s, functools.partial(run, s)) for s in range(seeds) for name, run in every.items()]
    runs.append(("federated, both factors", 0, functools.partial(federated, 0, "both")))
    runs.append((f"federated, noise {_NOISE:g}", 0, functools.partial(federated, 0, clip=_CLIP, noise=_NOISE)))
    found: dict[str, list[dict]] = {}
    for name, s, run in tqdm(runs, desc="federated study", unit="run", disable=not progress):
        path = Path(folder) / f"{name.replace(', ', '-').replace(' ', '-')}-{s}.json"
        facts = {"settings": repr(settings), "base": repr(replace(base, folder=Path(base.folder).name)), "n": n}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("facts") != facts:
            kept = run() | {"facts": facts}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(temporary, path)
        found.setdefault(name, []).append(kept)
    rows = []
    for name, each in found.items():
        rows += quality_rows(name, *([np.array(e[f]) for e in each] for f in _SCORES))
        for what, unit in (("gap", "share"), ("up", "B"), ("down", "B")):
            if what in each[0]:
                metric = {"gap": "gap of the mean of factors", "up": "bytes up", "down": "bytes down"}[what]
                rows.append(Row(name, metric, float(np.mean([e[what] for e in each])), unit, "a client's round", machine=machine()))
    own = [np.array(e["own exact"]) for e in found["alone"]]
    rows += quality_rows("alone, own kind", own, *([np.array(e[f"own {f}"]) for e in found["alone"]] for f in _SCORES[1:]))
    spent = replace(settings, clip=_CLIP, noise=_NOISE).epsilon(1e-5)
    rows.append(Row(f"federated, noise {_NOISE:g}", "epsilon", spent, "", adapt.DOMAIN, note="per client, delta 1e-5", machine=machine()))
    return Report(tuple(rows))


_SCORES = ("exact", "right", "nll")
_CLIP, _NOISE = 1.0, 1.0


def _scored(adapters: Adapters, held: Examples) -> dict[str, list[float]]:
    a = answered(adapters, held)
    return {f: getattr(a, f).astype(float).tolist() for f in _SCORES}
