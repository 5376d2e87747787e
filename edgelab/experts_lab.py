"""Who routes where, what fewer experts cost, bits for each expert, fewer per token, experts on disk. For notebook 06.

Three quantities that are easily mixed up, for an expert e of one mixture, over tokens t with gates g:

    share of choices      tokens that chose e / (tokens * top_k)           how *often* it is used
    REAP score            mean over ITS tokens of g_e |f_e(x)|_2           how much it does *when* it is used
    lift of a pair e, f   tokens that chose both / expected if independent  who works with whom

An expert that serves a rare task is seldom used and does much. Rows say how a figure came about: counted, computed, measured
(here), or measured at build (`edgelab.studies`, on the machine of the row).
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from edgelab import plots, studies, words
from edgelab.compress import Compressed
from edgelab.evaluate import evaluate
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.expert_cache import CacheRow, Trace
from edgelab.expert_cache import simulate as simulate_cache
from edgelab.expert_stats import ExpertStats
from edgelab.expert_steps import clustered, merge
from edgelab.methods.experts import least
from edgelab.prune_lab import race
from edgelab.recipe import Route
from edgelab.report import Report
from edgelab.routing import active_experts, flops_per_token, route
from edgelab.scheme import QuantScheme
from edgelab.surgery import keep_experts

Domains = Mapping[str, Mapping[str, ExpertStats]]  # as of expert_stats.by_domain


# ------------------------------------------------------------------------------------------------------ who routes where


def usage(stats: Domains) -> dict[str, np.ndarray]:
    """{domain: [layers, experts]}: the share of a mixture's choices that goes to each expert; each row adds up to 1."""
    return {
        domain: np.stack([s.counts.double().numpy() / max(int(s.counts.sum()), 1) for s in found.values()])
        for domain, found in stats.items()
    }


def usage_html(stats: Domains) -> str:
    """`usage` in per cent as an HTML table, a line per mixture and domain; the darker a cell the larger its share."""
    shares = usage(stats)
    layers, experts = next(iter(shares.values())).shape
    most = max(float(s.max()) for s in shares.values())
    head = "".join(f'<th scope="col">{e}</th>' for e in range(experts))
    lines = []
    for i in range(layers):
        for domain, s in shares.items():
            cells = []
            for v in s[i]:
                strength = v / most
                ink = "#ffffff" if strength > 0.55 else "inherit"
                cells.append(f'<td style="background:rgba(0,84,147,{strength:.2f});color:{ink}">{100 * v:.0f}</td>')
            lines.append(f'<tr><th scope="row">{i} {escape(domain)}</th>{"".join(cells)}</tr>')
    caption = "Share of a mixture's choices that goes to each expert, % (measured on calibration text)"
    return (
        f'<table><caption>{caption}</caption><thead><tr><th scope="col">mixture, domain</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def usage_figure(stats: Domains, layer: int = 0) -> go.Figure:
    """The shares of one mixture's experts, a series of bars per domain."""
    fig = go.Figure(
        layout={"template": plots.TEMPLATE, "title": {"text": f"Mixture {layer}: who is chosen, by domain"}, "barmode": "group"}
    )
    for k, (domain, s) in enumerate(usage(stats).items()):
        y = [round(100 * float(v), 2) for v in s[layer]]
        fig.add_bar(x=[str(e) for e in range(len(y))], y=y, name=domain, marker={"color": plots.OKABE_ITO[k % len(plots.OKABE_ITO)]})
    fig.update_xaxes(title_text="expert", type="category")
    fig.update_yaxes(title_text="share of choices, %")
    return fig


class Specialist(NamedTuple):
    """The expert with the largest difference between the domain that it serves most and the others' largest share."""

    layer: int
    expert: int
    domain: str
    share: float
    elsewhere: float


def specialist(stats: Domains) -> Specialist:
    """The expert that one domain needs most and the others least."""
    shares = usage(stats)
    names, stack = list(shares), np.stack(list(shares.values()))  # [domains, layers, experts]
    if len(names) < 2:
        raise ValueError(f"stats has {len(names)} domain(s); a specialist shows beside others, so give two or more")
    ordered = np.sort(stack, 0)
    layer, expert = np.unravel_index(int((ordered[-1] - ordered[-2]).argmax()), stack.shape[1:])
    column = stack[:, layer, expert]
    return Specialist(int(layer), int(expert), names[int(column.argmax())], float(column.max()), float(np.sort(column)[-2]))


def say_usage(stats: Domains) -> str:
    """The sentence beside `usage_figure`."""
    s, experts = specialist(stats), next(iter(usage(stats).values())).shape[1]
    return (
        f"The purest specialist is expert {s.expert} of mixture {s.layer}: {100 * s.share:.0f} % of the choices on {s.domain}, at most "
        f"{100 * s.elsewhere:.0f} % on any other domain (even use would be {100 / experts:.1f} %)."
    )


def merged(stats: Domains) -> dict[str, ExpertStats]:
    """{router: the statistics of all domains together}."""
    first, *others = stats.values()
    out = dict(first)
    for other in others:
        out = {name: s.merge(other[name]) for name, s in out.items()}
    return out


def pair_rows(stats: Mapping[str, ExpertStats], most: int = 6) -> list[dict[str, str]]:
    """The `most` pairs of experts that are chosen together most, with their lift over independent choices."""
    found = []
    for i, s in enumerate(stats.values()):
        counts, together = s.counts.double(), s.together.double()
        top_k = float(counts.sum()) / s.tokens
        # of the pairs of a token's choices, how many e and f would share if every choice were drawn by the counts alone
        for e in range(len(counts)):
            for f in range(e + 1, len(counts)):
                expected = float(counts[e] * counts[f]) / s.tokens * (top_k - 1) / top_k
                if expected > 0:
                    found.append((float(together[e, f]), i, e, f, float(together[e, f]) / expected, s.tokens))
    found.sort(key=lambda x: -x[0])
    return [
        {
            "mixture": str(i),
            "experts": f"{e} and {f}",
            "together, % of tokens (measured)": f"{100 * n / tokens:.1f}",
            "times what independent choices would give": f"{lift:.1f}",
        }
        for n, i, e, f, lift, tokens in found[:most]
    ]


# ------------------------------------------------------------------------------------------------------------- dropping


def rank_rows(stats: Domains, share: float = 0.25) -> list[dict[str, str]]:
    """The experts about which frequency and REAP disagree, when `share` of each mixture goes, and what they do on each domain."""
    lines, shares = [], usage(stats)
    for i, (name, every) in enumerate(merged(stats).items()):
        n = round(share * len(every.counts))
        rare = set(np.argsort(every.counts.numpy(), kind="stable")[:n].tolist())
        weak = set(np.argsort(every.reap.numpy(), kind="stable")[:n].tolist())
        for e in sorted(rare ^ weak, key=lambda e: (e in weak, e)):
            home = max(shares, key=lambda d, e=e, i=i: shares[d][i][e])
            strong = max(stats, key=lambda d, e=e, name=name: float(stats[d][name].reap[e]))
            lines.append(
                {
                    "mixture": str(i),
                    "expert": str(e),
                    "dropped by": "frequency" if e in rare else "REAP",
                    "of the choices, % (measured)": f"{100 * float(every.counts[e]) / max(float(every.counts.sum()), 1.0):.1f}",
                    "REAP score (measured)": f"{float(every.reap[e]):.2f}",
                    "chosen most on": f"{home} ({100 * shares[home][i][e]:.0f} %)",
                    "does most per token on": f"{strong} ({float(stats[strong][name].reap[e]):.2f})",
                }
            )
    return lines or [{"expert": "none", "dropped by": "both alike"}]


class Exchange(NamedTuple):
    """What frequency keeps {router: experts}, and the same but for one: `back` returns to mixture `layer`, `gone` makes room."""

    by_frequency: dict[str, list[int]]
    exchanged: dict[str, list[int]]
    layer: int
    back: int
    gone: int


def exchange(stats: Domains, share: float = 0.25) -> Exchange:
    """Drops `share` by frequency, then takes back the expert whose REAP score is highest above its mixture's mean, for the least one.

    The counter-test: if the rarely used really were the least needed, one exchange could not matter.
    """
    every, kept, wronged = merged(stats), {}, (-1.0, 0, 0)
    for i, (name, s) in enumerate(every.items()):
        order = np.argsort(s.counts.numpy(), kind="stable").tolist()
        n = round(share * len(order))
        kept[name] = sorted(order[n:])
        wronged = max([wronged, *((float(s.reap[e] / s.reap.mean()), i, e) for e in order[:n])])
    _, layer, back = wronged
    name = list(every)[layer]
    gone = min(kept[name], key=lambda e: float(every[name].reap[e]))
    return Exchange(kept, kept | {name: sorted({*kept[name]} - {gone} | {back})}, layer, back, gone)


def without_largest(stats: Domains, share: float = 0.25) -> dict[str, list[int]]:
    """{router: the experts that stay when the `share` of each mixture with the largest REAP scores goes}: the wrong way round."""
    found = {}
    for name, s in merged(stats).items():
        order = np.argsort(-s.reap.numpy(), kind="stable").tolist()
        found[name] = sorted(order[round(share * len(order)) :])
    return found


def dropped(model: nn.Module, stats: Mapping[str, ExpertStats], share: float, method: str, seed: int = 0) -> nn.Module:
    """A copy without `share` of each mixture's experts, as `DropExperts(share, method=method, seed=seed)` cuts it: by "reap",
    "frequency" or "random", from statistics that were read once for all choices. Raises ValueError for another method."""
    scores = {"reap": lambda s: s.reap, "frequency": lambda s: s.counts}
    if method not in (*scores, "random"):
        raise ValueError(f"method={method!r} is not one of {', '.join(scores)}, random; use compress with DropExperts")
    rng, kept = np.random.default_rng(seed), {}
    for name, s in stats.items():
        n = round(share * len(s.counts))
        if method == "random":
            kept[name] = sorted(rng.permutation(len(s.counts))[: len(s.counts) - n].tolist())
        else:
            gone = least(scores[method](s), n)
            kept[name] = [e for e in range(len(s.counts)) if e not in gone]
    twin = copy.deepcopy(model)
    keep_experts(twin, kept)
    return twin


def merged_experts(
    model: nn.Module, stats: Mapping[str, ExpertStats], method: str, share: float = 0.5, *, all_rows: bool = False
) -> tuple[nn.Module, str]:
    """(a copy whose experts are merged as `MergeExperts(share, method=method)` does it, the clusters in words).

    `stats` of all tokens for the method "outputs". `all_rows`: all rows of the routers are kept (`expert_steps.merge`).
    """
    clusters = {name: clustered(s, method, len(s.counts) - round(share * len(s.counts))) for name, s in stats.items()}
    twin = copy.deepcopy(model)
    merge(twin, clusters, {name: s.counts for name, s in stats.items()}, all_rows=all_rows)
    told = "; ".join(f"mixture {i}: " + " ".join("+".join(map(str, c)) for c in found) for i, found in enumerate(clusters.values()))
    return twin, f"merged by {method}: {told}"


def outcome_rows(report: Report, kld_on: Sequence[str] | None = None, *, size: bool = True) -> list[dict[str, str]]:
    """A line per model: its size, exact match on each domain, KL divergence on each slice of `kld_on` (all of them unless given)."""
    lines = []
    for name in report.models():
        line = {"model": name}
        for metric, on in (("weight_bytes", None if size else ()), ("exact_match", None), ("kld", kld_on)):
            for row in report.where(model=name, metric=metric):
                if on is not None and row.slice not in on:
                    continue
                unit = {"weight_bytes": "MB", "kld": "KLD", "exact_match": "exact match, %"}[metric]
                how = "counted" if metric == "weight_bytes" else {"measured here": "measured"}.get(row.provenance, row.provenance)
                value = words.number(metric, row.value, unit=False)
                line.setdefault(" ".join(filter(None, (unit, row.slice, f"({how})"))), value)
        lines.append(line)
    return lines


def built(name: str, folder=None) -> tuple[str, list[dict[str, str]]]:
    """(a sentence, the table) of a study that was measured at build; no rows, and how to make it, where it is not there."""
    try:
        study = studies.read(name, folder)
    except FileNotFoundError:
        return f"The long measurement is not here. `python -m edgelab.studies {name}` makes it (some minutes on two cores).", []
    n = max((r.n or 0 for r in study.report.where(metric="kld", slice=studies.MEAN)), default=0)
    where = next((r.machine for r in study.report if r.machine), "")
    told = (
        f"Measured at build, {study.seconds / 60:.0f} minutes on {where or 'two cores'}, up to {n} documents; mean of domains: all alike."
    )
    return told, outcome_rows(study.report, kld_on=[studies.MEAN])


def measured(models: Mapping[str, nn.Module], *, original: nn.Module, tokenizer, test, **settings) -> Report:
    """A report on `original` and `models` on the same documents of `test`; sizes as of a bfloat16 file."""
    every = {"original": original} | dict(models)
    sizes = {name: 2 * sum(p.numel() for p in m.parameters()) for name, m in every.items()}
    return evaluate(every, tokenizer, test, sizes=sizes, context=256, bootstrap=500, speed=False, progress=False, **settings)


def exact(report: Report, model: str, domain: str) -> float:
    """The share of right answers of one model on one domain."""
    return report.get(model=model, metric="exact_match", slice=domain).value


# ----------------------------------------------------------------------------------------------------- bits per expert


def expert_bytes(made: Compressed) -> int:
    """Bytes of the experts of a model whose codes were counted."""
    return sum(r.predicted_bytes for r in made.coverage.rows if r.role == "experts")


def bit_rows(made: Compressed) -> list[dict[str, str]]:
    """How many experts of each stack got which scheme. A line per stack, and the mean of bits."""
    stacks: dict[str, list] = {}
    for r in made.coverage.rows:
        if r.role == "experts":
            stacks.setdefault(r.name.partition("#")[0], []).append(r)
    experts = max(map(len, stacks.values()))  # a stack of one scheme is one row
    schemes = sorted({r.scheme for rows in stacks.values() for r in rows}, key=_bits)
    lines = []
    for name, rows in stacks.items():
        counts = Counter({rows[0].scheme: experts}) if len(rows) == 1 else Counter(r.scheme for r in rows)
        total = 8 * sum(r.predicted_bytes for r in rows) / sum(r.parameters for r in rows)
        line = {"stack": name.removeprefix("model.").replace(".mlp.experts", "")}
        lines.append(line | {f"{s} (chosen)": str(counts[s]) for s in schemes} | {"bits, mean (counted)": f"{total:.2f}"})
    return lines


def _bits(scheme: str | None) -> float:
    return 16.0 if scheme is None else QuantScheme.parse(str(scheme)).bits_per_weight((64, 128))


# ------------------------------------------------------------------------------------------------------ routing at run time


class Routing(NamedTuple):
    """One way of routing: what it needs per token (counted) and what it does (measured by `evaluate`)."""

    name: str
    active: float
    flops: float
    model: nn.Module


def routings(model: nn.Module, steps: Mapping[str, Route | None], batches: Sequence[Tensor]) -> list[Routing]:
    """A copy of `model` for each of `steps` {name: Route, or None for the model as it is}, with its arithmetic on `batches`."""
    found = []
    for name, step in steps.items():
        other = copy.deepcopy(model)
        if step is not None:
            route(other, step)
        active = active_experts(other, batches)
        found.append(Routing(name, float(np.mean(list(active.values()))), flops_per_token(other, active)["all"], other))
    return found


def routing_rows(found: Sequence[Routing], report: Report, against: str) -> list[dict[str, str]]:
    """A line per routing; FLOPs beside those of the one called `against`."""
    whole = next(r.flops for r in found if r.name == against)
    lines = []
    for r in found:
        klds = [row.value for row in report.where(model=r.name, metric="kld")]
        line = {
            "routing": r.name,
            "experts per token (counted)": f"{r.active:.2f}",
            "MFLOPs per token (counted)": f"{r.flops / 1e6:.2f}",
            f"less than {against}, %": f"{100 * (1 - r.flops / whole):.0f}",
            "KLD, mean of domains (measured)": f"{np.mean(klds):.3f}" if klds else "0",
        }
        for row in report.where(model=r.name, metric="exact_match"):
            line[f"exact match {row.slice}, % (measured)"] = f"{100 * row.value:.0f}"
        lines.append(line)
    return lines


@torch.inference_mode()
def decode(model: nn.Module, ids: Tensor, prompt: int = 8) -> None:
    """Reads the first `prompt` tokens of `ids` int64 [1, T] at once and the others one by one, with a key-value cache."""
    cache = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    for i in range(prompt, ids.shape[1]):
        model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)


def claim_rows(found: Sequence[Routing], report: Report, chosen: str, every: str, ids: Tensor, rounds: int = 9) -> list[dict[str, str]]:
    """The articles' three figures for "a few of 16 experts" beside ours: `chosen` against `every` expert active.

    `ids` int64 [1, T] are decoded one by one by both, turn about, `rounds` times, on one thread; the time is that of prompt and steps.
    """
    one, whole = (next(r for r in found if r.name == name) for name in (chosen, every))
    faster = race({every: partial(decode, whole.model, ids), chosen: partial(decode, one.model, ids)}, rounds)[1]

    def right(name: str) -> float:
        return float(np.mean([r.value for r in report.where(model=name, metric="exact_match")]))

    lost = 100 * (right(every) - right(chosen))
    times = f"at most {whole.flops / one.flops:.1f} times (from FLOPs); {1 / faster.ratio:.2f} times (measured)"
    here = f"here: {chosen} against {every}"
    return [
        {"article": "62 % fewer FLOPs", here: f"{100 * (1 - one.flops / whole.flops):.0f} % (counted)"},
        {"article": "2.3 times faster", here: times},
        {"article": "1.2 % accuracy lost", here: f"{lost:+.0f} points of exact match lost (measured)"},
    ]


# ---------------------------------------------------------------------------------------------------------------- caches


def cache_rows(rows: Sequence[CacheRow], strengths: Sequence[float] = (0.3,)) -> list[dict[str, str]]:
    """A line per capacity: hit rates of the policies, and hit rate, MB and KLD of cache-conditional selection."""
    lines = []
    for capacity in dict.fromkeys(r.capacity for r in rows):
        mine = [r for r in rows if r.capacity == capacity]
        line = {"experts in RAM": str(capacity)}
        for r in mine:
            if r.strength is None:
                line[f"{r.policy}: hits, %"] = f"{100 * r.hit_rate:.1f}"
        plain = next(r for r in mine if r.strength is None and r.policy == "lru")
        line["lru: MB per token"] = f"{plain.bytes_per_token / 1e6:.3f}"
        for r in mine:
            if r.strength in strengths:
                at = f"prefer RAM by {r.strength:g}"
                line |= {
                    f"{at}: hits, %": f"{100 * r.hit_rate:.1f}",
                    f"{at}: MB per token": f"{r.bytes_per_token / 1e6:.3f}",
                    f"{at}: KLD (measured)": f"{r.kld:.3f}",
                }
        lines.append(line)
    return lines


def cache_figure(rows: Sequence[CacheRow]) -> go.Figure:
    """Hit rate against capacity: the policies, and cache-conditional selection by strength."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "How often a wanted expert is in RAM already"}})
    names = list(dict.fromkeys((r.policy, r.strength) for r in rows))
    for k, (policy, strength) in enumerate(names):
        mine = [r for r in rows if (r.policy, r.strength) == (policy, strength)]
        look = {"color": plots.OKABE_ITO[k % len(plots.OKABE_ITO)]}
        fig.add_scatter(
            x=[r.capacity for r in mine],
            y=[round(100 * r.hit_rate, 2) for r in mine],
            mode="lines+markers",
            name=policy if strength is None else f"{policy}, prefer RAM by {strength:g}",
            line=look | {"dash": "solid" if strength is None else "dot"},
            marker=look | {"symbol": plots.SYMBOLS[k % len(plots.SYMBOLS)], "size": 9},
        )
    fig.update_xaxes(title_text="experts of each mixture in RAM")
    fig.update_yaxes(title_text="hits, %")
    return fig


def say_cache(rows: Sequence[CacheRow], capacity: int) -> str:
    """The sentence beside `cache_figure`, about one capacity."""
    mine = [r for r in rows if r.capacity == capacity]
    if not mine:
        raise ValueError(f"capacity={capacity} is not among {', '.join(map(str, dict.fromkeys(r.capacity for r in rows)))}")
    rate = {r.policy: r.hit_rate for r in mine if r.strength is None}
    best = max((r for r in mine if r.strength is not None), key=lambda r: r.hit_rate, default=None)
    told = (
        f"With {capacity} experts in RAM lru hits {100 * rate['lru']:.0f} %; no choice of whom to drop does better than "
        f"{100 * rate['belady']:.0f} %"
    )
    if best is None:
        return told + "."
    price = f"for a KL divergence of {best.kld:.3f} nats per token"
    return f"{told}. Choosing differently (prefer RAM by {best.strength:g}) hits {100 * best.hit_rate:.0f} %, {price}."


# -------------------------------------------------------------------------------------------------------------- exercises

EXERCISE_TOKENS = (  # (gate, |f(x)|) of the tokens that chose each expert
    ("A", ((0.6, 2.0), (0.5, 2.0), (0.4, 1.0), (0.5, 1.2))),
    ("B", ((0.9, 4.0),)),
    ("C", ((0.5, 1.0), (0.3, 2.0), (0.4, 1.0))),
)
EXERCISE_TRACE = (1, 2, 3, 1, 4, 2, 1, 2)  # lru hits 3, first in first out 2, Belady 4
EXERCISE_CAPACITY = 3


def toy_rows() -> list[dict[str, str]]:
    """The table of exercise 1."""
    return [{"expert": e, "its tokens: gate x norm of output": ", ".join(f"{g} x {n:g}" for g, n in t)} for e, t in EXERCISE_TOKENS]


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=5e-3) for x, y in zip(a, b, strict=True))


def check_reap(answer) -> Verdict:
    """Exercise 1: (the REAP scores of A, B, C, the name of the expert that goes first)."""
    form = "a pair: a list of three scores, and the name of the expert that goes"
    if answer is None:
        return unanswered(form)
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != 2 or answer[0] is None or answer[1] is None:
        return not_yet(f"asked is {form}, as in ([1, 2, 3], 'A')")
    scores, dropped = answer
    given = numbers(scores, 3)
    if given is None:
        return not_yet("three numbers, the scores of A, B and C, come first")
    tokens = [t for _, t in EXERCISE_TOKENS]
    true = [sum(g * n for g, n in t) / len(t) for t in tokens]
    total = sum(map(len, tokens))
    hints = (
        (
            [sum(g * n for g, n in t) for t in tokens],
            "these are sums; REAP divides each by the number of ITS tokens, so that rare experts count",
        ),
        ([sum(g * n for g, n in t) / total for t in tokens], "divide by the tokens that chose this expert, not by all of them"),
        ([sum(n for _, n in t) / len(t) for t in tokens], "the gates are missing: an output counts as much as its gate lets through"),
        ([sum(g for g, _ in t) / len(t) for t in tokens], "these are mean gates; how large the outputs are counts as well"),
        ([sum(g for g, _ in t) for t in tokens], "this is the gate mass; REAP is the mean of gate times norm"),
        (
            [sum(g for g, _ in t) / len(t) * sum(n for _, n in t) / len(t) for t in tokens],
            "multiply token by token, then take the mean: the mean of products is not the product of means",
        ),
    )
    if not _near(given, true):
        return not_yet(
            next((h for wrong, h in hints if _near(given, wrong)), "for each expert the mean over its tokens of gate times norm")
        )
    name = str(dropped).strip().upper()
    if name == "B":
        return not_yet("the scores are right, but B is the rarest, not the weakest. REAP drops the least score")
    if name != "C":
        return not_yet("the scores are right; REAP drops the expert of the least score")
    return right("0.8, 3.6 and 0.5, so C goes. By frequency B would go, which does most where it is needed")


def reap_of(gates: Tensor, norms: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """[experts]: the REAP scores as `ExpertStats` makes them of gates, norms and choices [tokens, k]."""
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    sums = torch.zeros(experts, dtype=torch.float64).index_add_(0, chosen.flatten(), (gates * norms).double().flatten())
    zeros, square = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, experts, dtype=torch.float64)
    return ExpertStats(len(chosen), counts, zeros, zeros, sums, square.long(), zeros[:, None], zeros, square).reap


def check_reap_function(answer) -> Verdict:
    """Exercise 2: a function of (gates, norms, chosen [tokens, k], experts) that returns the REAP scores [experts]."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(40)])
    chosen[chosen == 3] = 4  # expert 3 of five is never chosen
    gates, norms = torch.rand(40, 2, generator=generator), 0.5 + 3 * torch.rand(40, 2, generator=generator)
    small = (torch.tensor([[0.5], [0.25], [1.0]]), torch.tensor([[2.0], [4.0], [3.0]]), torch.tensor([[0], [0], [1]]), 2)
    cases = [
        Case("three tokens, one expert each", small, "expert 0 got two tokens: (0.5 * 2 + 0.25 * 4) / 2; expert 1 got one"),
        Case(
            "40 tokens, two of five experts each",
            (gates, norms, chosen, 5),
            "the mean over the tokens that chose THIS expert; nobody chose 3",
        ),
        Case("experts that nobody chose", (gates[:1], norms[:1], chosen[:1], 6), "an expert without a token has score 0, not NaN"),
    ]
    form = "a function of gates, norms and chosen [tokens, k] and the number of experts, that returns a score per expert"
    return check_function(
        answer, reap_of, cases, form, "the scores that `DropExperts` ranks by, also of experts that nobody chose", tolerance=1e-5
    )


EXERCISE_WEIGHTS = 98_304  # of one expert of the embedded model: 3 * 256 * 128


def check_bytes(answer) -> Verdict:
    """Exercise 3: bytes of 16 experts, 4 of them int4-g32 and 12 int2-g32."""
    if answer is None:
        return unanswered("a number of bytes")
    given = numbers(answer, 1)
    if given is None:
        return not_yet("one number, please")
    n = EXERCISE_WEIGHTS
    true = n * (4 * 4.5 + 12 * 2.5) / 8
    if given[0] == true:
        return right(f"{true:,.0f} bytes, 3 bits per weight on average, a scale for 32 weights counted")
    hints = {
        n * (4 * 4 + 12 * 2) / 8: "each 32 weights have a scale of 16 bits, half a bit per weight more",
        n * (4 * 4.5 + 12 * 2.5): "these are bits; a byte has 8 of them",
        n * (12 * 4.5 + 4 * 2.5) / 8: "it is 4 experts in 4 bits and 12 in 2, not the other way round",
        n * (4.5 + 2.5) / 2 / 8 * 16: "scales are float16, half a bit per weight; and 12 of 16 experts have 2 bits, not half of them",
        n * 3.0 / 8: "that is one expert; there are 16",
    }
    return hint(given[0], hints, "add weights x effective bits / 8 over the 16 experts", tolerance=1e-7)


def lru_hits(wanted: Sequence[int], capacity: int) -> int:
    """The hits of an LRU cache of `capacity` experts, empty at first, when token after token wants one expert: as `expert_cache` counts."""
    if not len(wanted):
        return 0
    trace = Trace(np.asarray(wanted, np.int16).reshape(1, -1, 1), int(max(wanted)) + 1, (1.0,), ("mixture",))
    return len(wanted) - simulate_cache(trace, capacity).misses


def check_lru(answer) -> Verdict:
    """Exercise 4: a function of (wanted experts, capacity) that returns the hits of an LRU cache."""
    long = np.random.default_rng(5).integers(0, 6, 60).tolist()
    cases = [
        Case(f"the experts {', '.join(map(str, EXERCISE_TRACE))} and room for 3", (list(EXERCISE_TRACE), 3), _LRU_HINT),
        Case("room for one", ([2, 2, 2, 1, 1, 2], 1), "every change of the expert is a miss, every repetition a hit"),
        Case("60 tokens, six experts, room for 4", (long, 4), _LRU_HINT),
        Case("room for all", (long, 6), "only the first use of each expert misses"),
        Case("no token at all", ([], 3), "nothing was wanted, so nothing hit"),
    ]
    form = "a function of a list of experts and a capacity that returns the number of hits"
    return check_function(answer, lru_hits, cases, form, "as `expert_cache.simulate` counts; who knew the future would hit 4 of the 8")


_LRU_HINT = "write down what is in RAM after each token, the oldest use first; a hit makes its expert the newest"
