"""The claims about running a model for people: memory, batches, privacy, monitoring (B8, B10, C10, E3, E4), a function each."""

import numpy as np
import torch

from edgelab import adapt, private, studies
from edgelab.batcher import Batcher
from edgelab.claims.bench import (
    Bench,
    Way,
    counted,
    file_bytes,
    found,
    less,
    median_ratio,
    over,
    processes,
    ratio_of,
    shown,
    timed,
)
from edgelab.evaluate import documents
from edgelab.features import Guard, Server, Wire, ask, curve, raw_inputs, split
from edgelab.fold import fold
from edgelab.ledger import Entry
from edgelab.monitor import Monitor
from edgelab.report import Row
from edgelab.runtime import Runtime
from edgelab.vision import network


def _prompts(bench: Bench, n: int, domain: str = "assistant") -> list[tuple[list[int], list[int]]]:
    """[(prompt, what is right)] in tokens."""
    docs = [d for d in documents(bench.test, bench.tokenizer, {domain: n}) if d.domain == domain][:n]
    return [(d.ids[: d.first].tolist(), d.targets.tolist()) for d in docs]


def b8(bench: Bench, prompt: int = 1000, repeats: int = 1) -> Entry:
    """Memory planning: how much a process grows while it reads a prompt, against what transformers grows by for the same one."""
    smaller, own, texts, chunked = {}, {}, {}, {}
    for kind, name in (("wide", "random mixture, 85 million weights"), ("moe", "embedded mixture")):
        original, made = getattr(bench, kind), bench.packed("int4-g32", kind=kind)
        warm = bench.packed("int4-g32")
        whole = {"context": 1024, "chunk": 1024}  # read at once, as transformers does
        runs = {
            "ours": (made, warm, Way(settings=whole)),
            "unshared": (made, warm, Way(settings=whole | {"reuse": False})),
            "chunks": (made, warm, Way(settings={"context": 1024})),
            "float32": (original, bench.moe, Way("transformers", "float32")),
            "bfloat16": (original, bench.moe, Way("transformers", "bfloat16")),
        }
        grown = {n: over(f, "growth_mib") for n, f in processes(runs, prompt=prompt, tokens=1, repeats=repeats).items()}
        ours, unshared, chunks = grown["ours"], grown["unshared"], grown["chunks"]
        torches = {d: grown[d] for d in ("float32", "bfloat16")}
        least = min(torches, key=lambda d: torches[d][0])
        smaller[kind], own[kind] = less(ratio_of(ours, torches[least])), less(ratio_of(ours, unshared))
        weights = file_bytes(made) / 2**20
        texts[name] = (
            f"ours {ours[0]:.0f} MiB, every buffer its own {unshared[0]:.0f}, transformers "
            + ", ".join(f"{d} {g[0]:.0f}" for d, g in torches.items())
            + f"; with the weights ({weights:.0f} MiB) on both sides "
            f"{100 * (1 - (ours[0] + weights) / (torches[least][0] + weights)):.0f} % less"
        )
        chunked[name] = f"{chunks[0]:.0f} MiB"
    worst = min(smaller, key=lambda k: smaller[k][0])
    return found(
        "B8",
        f"growth of a process (activations and cache of keys and values) while our runtime, int4-g32, reads {prompt:,} tokens at once, "
        "buffers "
        "sharing memory, against transformers on the original in the type that grows less, the worse of two models",
        smaller[worst],
        "% less",
        2 * repeats,
        "processes of two models, least and most of the worse one",
        control="against every buffer its own, which frees nothing: "
        + ", ".join(f"{shown(own[k], 0)} % less ({name})" for k, name in (("wide", "random mixture"), ("moe", "embedded"))),
        beside=texts
        | {"read 128 tokens at a time, as by default": ", ".join(f"{name} {text}" for name, text in chunked.items())}
        | {"what is not in it": "weights, which no plan of buffers moves: the peak of the whole process moves by less"},
    )


class _Frames:
    """A vision model as an engine of the batcher: a request names an image, `admit` takes it into the pool, `step` computes a batch.

    The pool is one buffer of a row per slot, made once: no batch allocates its input.
    """

    def __init__(self, model: torch.nn.Module, images: torch.Tensor, slots: int) -> None:
        self.model, self.images, self.slots = model, images, slots
        self.pool, self.of = torch.empty(slots, *images.shape[1:]), [0] * slots
        self._taken = np.zeros(2, np.float32)

    def admit(self, slot: int, ids) -> np.ndarray:
        self.of[slot] = ids[0]
        return self._taken

    def step(self, slots: list[int], tokens: list[int]) -> np.ndarray:
        for row, slot in enumerate(slots):
            self.pool[row] = self.images[self.of[slot]]
        return self.model(self.pool[: len(slots)]).numpy()

    def release(self, slot: int) -> None:
        pass


def frames(model: torch.nn.Module, images: torch.Tensor, seed: int = 0, least: int = 2, most: int = 8) -> tuple[list[int], float]:
    """(the class of each image, mean batch): the images come `least` to `most` at a time, at random, and are answered by the batcher."""
    rng, at, tickets = np.random.default_rng(seed), 0, []
    with Batcher(_Frames(model, images, most), least, most, 0.0, joins=most, start=False) as batcher:
        while at < len(images):
            n = min(int(rng.integers(least, most + 1)), len(images) - at)
            tickets += [batcher.submit([i], 2) for i in range(at, at + n)]  # the first "token" says it was taken, the second is the class
            at += n
            while not all(t.done() for t in tickets[-n:]):
                batcher.turn()
        return [t.tokens[-1] for t in tickets], batcher.numbers().mean_batch


def b10(bench: Bench, images: int = 64) -> Entry:
    """Pooled inputs, dynamic batches of 2 to 8, folded norms: how many times the frames per second of one image at a time?"""
    model = network(seed=bench.seed).eval()
    folded = fold(model).model
    x = torch.rand(images, 1, 32, 32, generator=torch.Generator().manual_seed(bench.seed))
    one, eight, two = x[:1].contiguous(), x[:8].contiguous(), x[:2].contiguous()
    calls = {
        "one by one": lambda: [model(row) for row in x.split(1)],
        "all three": lambda: frames(folded, x, bench.seed),
        "eight at a time": lambda: frames(folded, x, bench.seed, least=8),
        "batcher, not folded": lambda: frames(model, x, bench.seed),
        "one": lambda: model(one),
        "one, folded": lambda: folded(one),
        "eight, folded": lambda: folded(eight),
        "two, folded": lambda: folded(two),
    }
    times = timed(calls, bench.turns)
    with torch.inference_mode():
        same = np.mean(np.array(frames(folded, x, bench.seed)[0]) == model(x).argmax(1).numpy())
        mean = frames(folded, x, bench.seed)[1]
    size = {"one, folded": 1, "two, folded": 2, "eight, folded": 8}
    faster = {name: median_ratio(times["one"] * n, times[name], bench.seed) for name, n in size.items()}
    return found(
        "B10",
        f"images per second of a small convolutional network (32 x 32) with all three: {images} images that come 2 to 8 at a time "
        "through the "
        "batcher, inputs in one pooled buffer, batch norms folded; against one by one, one thread",
        median_ratio(times["one by one"], times["all three"], bench.seed),
        "x",
        bench.turns,
        "turns, paired bootstrap",
        control=f"{100 * same:.0f} % of the images get the class that the whole network gives them",
        beside={
            "rows per batch": f"{mean:.1f} on average",
            "without folding": f"{shown(median_ratio(times['one by one'], times['batcher, not folded'], bench.seed))} x",
            "always 8 at a time": f"{shown(median_ratio(times['one by one'], times['eight at a time'], bench.seed))} x",
            "folding alone": f"{shown(faster['one, folded'])} x",
            "fixed batches without the batcher": f"of 8, folded, {shown(faster['eight, folded'])} x; of 2 {shown(faster['two, folded'])} x",
            "not tested": "a Xavier NX, whose GPU gains more from a batch than one thread does; and a camera's frames, which come one "
            "by one",
        }
        | _batched(bench),
    )


def _batched(bench: Bench, requests: int = 16, new: int = 24, rows: int = 8) -> dict[str, str]:
    """What the batcher makes of requests to our runtime, and what sharing a step is worth."""
    runtime = Runtime(bench.packed("int4-g32").model, context=1024, slots=rows, threads=1)
    prompts = [p for p, _ in _prompts(bench, requests)]
    with Batcher(runtime, least=2, most=rows) as batcher:
        for ticket in [batcher.submit(p, new) for p in prompts]:
            ticket.result(60)
        shared = batcher.numbers().mean_batch
    for slot in range(rows):
        runtime.admit(slot, prompts[slot % len(prompts)])
    tokens = [5] * rows
    calls = {"one": lambda: runtime.step([0], tokens[:1]), "all": lambda: runtime.step(list(range(rows)), tokens)}
    times = timed(calls, min(bench.turns, 5))  # each step takes a position of the cache
    gained = median_ratio(times["one"] * rows, times["all"], bench.seed)
    return {
        "language model behind the batcher": f"{shared:.1f} rows per step on average, of {rows} at most",
        f"{rows} rows in one step": f"{shown(gained)} x the tokens per second of one row",
    }


def c10(bench: Bench, prompts: int = 12, k: int = 1) -> Entry:
    """Only encrypted features leave the device: pieces of the input that stand in what was sent."""
    front, back = split(bench.moe, k)
    guard = Guard()
    server = Server(back, guard)
    sent = plain = right = 0
    for ids, wanted in _prompts(bench, prompts):
        text = bench.tokenizer.decode(ids)
        wire = Wire()
        right += ask(front, guard, server, ids, max_new_tokens=len(wanted), eos=wanted[-1], wire=wire) == wanted
        sent += raw_inputs(wire, ids, text)
        open_wire = Wire()
        open_wire.carry(True, np.array(ids, "<i4").tobytes())
        plain += raw_inputs(open_wire, ids, text)
    docs = [d for d in documents(bench.test, bench.tokenizer, {"assistant": 30}) if d.domain == "assistant"]
    with torch.no_grad():
        leak = curve(bench.moe, docs[:20], docs[20:], [(k, guard)], attacks=("nearest",)).leaks[0]
    return counted(
        "C10",
        f"prompts whose states behind block {k} were sealed and sent to a server that answered: runs of three tokens or words in the clear",
        sent,
        "raw inputs sent",
        prompts,
        "prompts, every message searched",
        control=f"the same search finds {plain} where token ids are sent as they are",
        beside={
            "answers right": f"{right} of {prompts}",
            "what the server can read": f"{100 * leak.recovered:.0f} % of the tokens, from the states that it must have: encryption "
            "keeps out the others, not the server",
        },
    )


EPSILON, USEFUL = 10, 0.9  # our thresholds: more epsilon promises next to nothing, a model that knows less was not adapted


def e3(bench: Bench) -> Entry:
    """Differential privacy for the data that adapts a model: epsilon, what it costs, and what an attacker can tell."""
    report = studies.read("private").report

    def of(model: str, metric: str) -> Row:
        return report.get(model=model, metric=metric, slice=adapt.DOMAIN)

    spent, noise = (of("epsilon 8", metric) for metric in ("epsilon", "noise"))
    runs = ("not private", "epsilon 8", "epsilon 2")
    right = {m: of(m, "tokens_right").value for m in ("before", *runs)}
    useful = right["epsilon 8"] / right["not private"]
    return counted(
        "E3",
        f"DP-SGD on adapters of the embedded mixture that learn commands to a robot, noise {noise.value:.2f} ({spent.note}). Two "
        f"conditions: epsilon, {spent.value:.2f} by Renyi accounting, is {EPSILON} at most; and {USEFUL:.0%} of the answers' tokens "
        "that learning "
        f"without noise gets right are right, here {useful:.0%}: how many are met",
        (spent.value <= EPSILON) + (useful >= USEFUL),
        "of 2 conditions met",
        spent.n,
        "seeds; the accountant's bound, which no draw changes",
        provenance="measured at build",
        control=f"without noise epsilon is {private.epsilon(0.0, 0.1, 40, 1e-5)}: nothing is promised",
        beside={
            "tokens of answers right": f"before {100 * of('before', 'tokens_right').value:.0f} %, "
            + ", ".join(f"{m} {100 * of(m, 'tokens_right').value:.0f} %" for m in runs),
            "of what learning gains": f"{100 * (right['epsilon 8'] - right['before']) / (right['not private'] - right['before']):.0f} % "
            "is kept",
            "exact match": ", ".join(f"{m} {100 * of(m, 'exact_match').value:.0f} %" for m in runs),
        },
    )


def e4(bench: Bench, requests: int = 24) -> Entry:
    """A deployed model is watched: the kinds of figures that are there after real answers, and whether a broken model is noticed."""
    runtime = Runtime(bench.packed("int4-g32").model, context=256, threads=1)
    monitor, alarm = Monitor(), 0
    prompts = _prompts(bench, requests)
    for ids, wanted in prompts:
        g = runtime.generate(ids, max_new=len(wanted) + 8)
        monitor.generation(g)
        monitor.feedback(g.tokens == [t for t in wanted if t != wanted[-1]])
    told = {row["what"]: row["value"] for row in monitor.summary()}
    kinds = {
        "latency": any(k.startswith("time per token") for k in told),
        "throughput": monitor.tokens_per_s() > 0,
        "confidence": 0 < monitor.confidence() <= 1,
        "accuracy": monitor.accuracy() is not None,
    }
    rng = np.random.default_rng(bench.seed)
    before = len(monitor.alarms)
    for _ in range(200):  # a model that is broken from here on: its confidence is a guess among many
        alarm += 1
        if monitor.observe([0.01], [float(rng.random() * 0.2)]):
            break
    seen = len(monitor.alarms) - before
    return counted(
        "E4",
        f"our runtime answering {requests} prompts under the monitor: kinds of figures that it shows while running",
        sum(kinds.values()),
        "kinds",
        requests,
        "prompts answered",
        control=f"confidence of a broken model raised {seen} alarm after {alarm} requests; before, {before}",
        beside={k: told[k] for k in told if k.startswith(("time per token", "tokens per second", "confidence, mean", "right"))},
    )
