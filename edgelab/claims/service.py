"""The claims about running a model for people: memory, batches, privacy, monitoring (B8, B10, C10, E3, E4), a function each."""

import numpy as np
import torch

from edgelab import adapt, private, studies
from edgelab.batcher import Batcher
from edgelab.claims.bench import Bench, counted, found, median_ratio, shown, timed
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


def b8(bench: Bench) -> Entry:
    """Memory planning: buffers that share memory against buffers of their own."""
    model = bench.packed("int4-g32").model
    plan = Runtime(model, context=1024).plan
    before = plan.unplanned_bytes + plan.cache_bytes + plan.weight_bytes
    return counted(
        "B8",
        "our runtime for the embedded mixture in int4-g32, 1,024 tokens of context: bytes of weights, cache and activations, buffers "
        "sharing memory, against every buffer its own",
        100 * (plan.unplanned_bytes - plan.planned_bytes) / before,
        "% less",
        plan.buffers,
        "buffers, counted",
        control=f"no plan can take less than {plan.bound_bytes:,} bytes for activations",
        beside={
            "activations alone": f"{plan.unplanned_bytes:,} to {plan.planned_bytes:,} bytes, {100 * plan.saved:.1f} % less",
            "activations and cache": f"{100 * plan.saved_with_cache:.0f} % less",
            "against what": "a plan that frees nothing; a framework that frees buffers after use is nearer to ours",
        },
    )


def b10(bench: Bench) -> Entry:
    """Pooled memory, batches of 2 to 8, folded norms: how many times the frames per second of one image at a time?"""
    model = network(seed=bench.seed).eval()
    folded = fold(model).model
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(bench.seed))
    one = x[:1].contiguous()
    calls = {"one": lambda: model(one), "one, folded": lambda: folded(one), "eight": lambda: model(x), "eight, folded": lambda: folded(x)}
    calls |= {"two, folded": lambda: folded(x[:2])}
    times = timed(calls, bench.turns)
    size = {"one": 1, "one, folded": 1, "two, folded": 2, "eight": 8, "eight, folded": 8}
    faster = {name: median_ratio(times["one"] * size[name], times[name], bench.seed) for name in times}
    return found(
        "B10",
        "images per second of a small convolutional network (32 x 32): batches of 8, batch norms folded, against one by one, one thread",
        faster["eight, folded"],
        "x",
        bench.turns,
        "turns, paired bootstrap",
        beside={
            "folding alone": f"{shown(faster['one, folded'])} x",
            "batches of 8 alone": f"{shown(faster['eight'])} x",
            "batches of 2, folded": f"{shown(faster['two, folded'])} x",
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


def e3(bench: Bench) -> Entry:
    """Differential privacy for the data that adapts a model: epsilon, what it costs, and what an attacker can tell."""
    report = studies.read("private").report

    def of(model: str, metric: str) -> Row:
        return report.get(model=model, metric=metric, slice=adapt.DOMAIN)

    spent, noise = (of("epsilon 8", metric) for metric in ("epsilon", "noise"))
    runs = ("not private", "epsilon 8", "epsilon 2")
    return counted(
        "E3",
        f"DP-SGD on adapters of the embedded mixture that learn commands to a robot: epsilon by Renyi accounting, noise {noise.value:.2f} "
        f"({spent.note})",
        spent.value,
        "epsilon",
        spent.n,
        "seeds; the accountant's bound, which no draw changes",
        provenance="measured at build",
        control=f"without noise epsilon is {private.epsilon(0.0, 0.1, 40, 1e-5)}: nothing is promised",
        beside={
            "tokens of answers right": f"before {100 * of('before', 'tokens_right').value:.0f} %, "
            + ", ".join(f"{m} {100 * of(m, 'tokens_right').value:.0f} %" for m in runs),
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
