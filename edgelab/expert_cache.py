"""A cache of experts: which of a layer's experts lie in RAM, and what the others cost. For phones whose RAM is too small.

A mixture reads k of E experts per token and layer, and its experts are most of its bytes. Where all of them do not fit,
each layer keeps `capacity` of them and reads the others from flash when a token wants them. What decides is the hit rate:

    bytes per token = sum over layers of (1 - hit rate of the layer) * k * bytes of one expert

`trace` records what a model chose, `simulate` replays it token by token, layer by layer, as decoding does:

- "lru" drops the expert whose last use is longest ago, "lfu" the one that was used least often so far (the older on a tie);
- "belady" drops the one whose next use is farthest away (Belady 1966, IBM Systems Journal 5(2)). It knows the future, so
  it is no policy but the bound: no choice of what to drop misses less often.

The experts of one token are wanted together: none of them makes room for another, so `capacity` is at least k. Caches
start empty and stay warm from text to text.

**Cache-conditional selection** (Skliar et al., arXiv 2412.00099, "Cache-Prior") changes what is chosen instead. With c the
scores that a router selects by, m = 1 for the experts in RAM, and D the mean of max c - min c over the tokens so far,

    chosen = top-k of c + strength * D * m,   but the `keep` best of c always

The gates are still made of the router's own scores, over those chosen. Fewer misses are paid for in quality, which `table`
measures as KL divergence to the model's own routing. Any `strength` gives another model; only 0 is exact.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import family_of
from edgelab.routing import router_pairs

POLICIES = ("lru", "lfu", "belady")
NEVER = 1 << 62


class Cache:
    """The experts of one layer that are in RAM, at most `capacity`, each in a slot of its own: 0 .. capacity - 1.

    `uses` for "belady" alone: {expert: the times at which it will be wanted, ascending}; the n-th call of `take` is time n.

    >>> c = Cache(2)
    >>> c.take([5]), c.take([7]), c.take([5]), c.take([3]), c.hits, c.misses  # 7 is the older one when 3 comes
    ([(5, 0)], [(7, 1)], [], [(3, 1)], 1, 3)
    """

    def __init__(self, capacity: int, policy: str = "lru", uses: dict[int, list[int]] | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} holds no expert; give at least the router's top_k")
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not known; use one of {', '.join(POLICIES)}")
        if (uses is not None) != (policy == "belady"):
            raise ValueError("policy='belady' needs the future (uses=...), and no other policy may have it; simulate() gives it")
        self.capacity, self.policy = capacity, policy
        self.slots: dict[int, int] = {}  # expert -> slot
        self.hits = self.misses = 0
        self._time = self._clock = 0
        self._last: dict[int, int] = {}
        self._count: dict[int, int] = {}
        self._uses = uses

    def take(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """[(expert, slot)] of what is to be read, after which all `experts` are in RAM. The last one counts as used last."""
        wanted = list(dict.fromkeys(experts))
        if len(wanted) > self.capacity:
            raise ValueError(
                f"capacity={self.capacity} does not hold the {len(wanted)} experts that are wanted at once; give at least that"
            )
        missing = [e for e in wanted if e not in self.slots]
        self.hits, self.misses = self.hits + len(wanted) - len(missing), self.misses + len(missing)
        read = []
        for e in missing:
            slot = len(self.slots) if len(self.slots) < self.capacity else self.slots.pop(self._victim(wanted))
            self.slots[e] = slot
            read.append((e, slot))
        for e in wanted:
            self._clock += 1
            self._last[e], self._count[e] = self._clock, self._count.get(e, 0) + 1
        self._time += 1
        return read

    def _victim(self, wanted: list[int]) -> int:
        free = [e for e in self.slots if e not in wanted]
        if self.policy == "belady":
            return max(free, key=self._next)
        if self.policy == "lfu":
            return min(free, key=lambda e: (self._count[e], self._last[e]))
        return min(free, key=self._last.__getitem__)

    def _next(self, e: int) -> int:
        uses = self._uses[e]
        at = np.searchsorted(uses, self._time, side="right")
        return int(uses[at]) if at < len(uses) else NEVER


# ------------------------------------------------------------------------------------------------- what a model chose


@dataclass(frozen=True, eq=False)
class Trace:
    """What every router chose: `choices` int16 [layers, tokens, k], by gate, the largest last; -1 where the gate is 0.

    `expert_bytes`: of one expert of each layer. `names`: the routers.
    """

    choices: np.ndarray
    experts: int
    expert_bytes: tuple[float, ...]
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.choices.shape[1]


@dataclass(frozen=True)
class CacheRun:
    """What a cache of `capacity` experts per layer would have done on a trace. `by_layer`: hit rates."""

    capacity: int
    policy: str
    hit_rate: float
    bytes_per_token: float
    misses: int
    by_layer: tuple[float, ...]


def trace(model: nn.Module, batches: Sequence[Tensor], *, expert_bytes: float | None = None) -> Trace:
    """The choices of all routers on token ids [rows, length], row after row. `expert_bytes`: as in memory unless given.

    Raises ValueError for a model without routers.
    """
    found = router_pairs(model)
    seen: list[list[np.ndarray]] = [[] for _ in found]
    with ExitStack() as stack:
        for i, (router, _) in enumerate(found.values()):

            def keep(router, _inputs, output, i=i) -> None:
                _, gates, chosen = output
                order = gates.argsort(dim=-1, stable=True)
                picked = torch.where((gates == 0) | (chosen >= router.num_experts), -1, chosen).gather(-1, order)
                seen[i].append(picked.reshape(-1, picked.shape[-1]).cpu().numpy().astype(np.int16))

            stack.callback(router.register_forward_hook(keep).remove)
        for batch in batches:
            _logits(model, batch)
    sizes = tuple(float(expert_bytes or _bytes_of_one(experts)) for _, experts in found.values())
    experts = max(router.num_experts for router, _ in found.values())
    return Trace(np.stack([np.concatenate(s) for s in seen]), experts, sizes, tuple(found))


def simulate(trace: Trace, capacity: int, policy: str = "lru") -> CacheRun:
    """Hits and bytes of a cache of `capacity` experts in each layer, token by token. The bytes are those of one trace token."""
    hits, rates, misses, read = 0, [], 0, 0.0
    for layer, size in zip(trace.choices, trace.expert_bytes, strict=True):
        wanted = [[int(e) for e in row if e >= 0] for row in layer]
        uses = None
        if policy == "belady":
            uses = {e: [] for e in range(trace.experts)}
            for t, row in enumerate(wanted):
                for e in set(row):
                    uses[e].append(t)
        cache = Cache(capacity, policy, uses)
        for row in wanted:
            cache.take(row)
        hits, misses, read = hits + cache.hits, misses + cache.misses, read + cache.misses * size
        rates.append(cache.hits / max(1, cache.hits + cache.misses))
    return CacheRun(capacity, policy, hits / max(1, hits + misses), read / max(1, trace.tokens), misses, tuple(rates))


def _bytes_of_one(experts: nn.Module) -> float:
    if hasattr(experts, "expert_bytes"):  # mapped ones know
        return experts.expert_bytes
    if hasattr(experts, "nbytes"):
        return experts.nbytes / experts.num_experts
    return sum(p.nbytes for p in experts.parameters() if p.shape and p.shape[0] == experts.num_experts) / experts.num_experts


@torch.no_grad()
def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch.to(next(model.parameters()).device), use_cache=False).logits


# --------------------------------------------------------------------------------------------- cache-conditional choice


@contextmanager
def prefer_cached(model: nn.Module, strength: float, capacity: int | None = None, keep: int = 1) -> Iterator[list[Cache]]:
    """Inside, routers choose experts in RAM more readily (see the module); gives the caches, one per router.

    `capacity`: a simulated LRU cache per layer, which follows what is chosen token by token. None: the real ones of mapped
    experts (`offload`). `keep`: so many of a token's best experts are chosen whatever is in RAM.
    """
    if strength < 0:
        raise ValueError(f"strength={strength} would favour what is not in RAM; give 0 or more")
    caches: list[Cache] = []
    with ExitStack() as stack:
        for name, (router, experts) in router_pairs(model).items():
            real = getattr(experts, "cache", None)
            if capacity is None and real is None:
                raise ValueError(
                    f"the experts beside {name} are all in RAM; give capacity=... to simulate a cache, or load by offload(...)"
                )
            if not 0 <= keep <= router.top_k:
                raise ValueError(f"keep={keep} must be in 0 .. {router.top_k}, the experts of a token")
            cache = real if capacity is None else Cache(capacity)
            caches.append(cache)
            hook = _Prefer(family_of(model).model_type, cache, strength, keep, simulated=capacity is not None)
            stack.callback(router.register_forward_hook(hook).remove)
        yield caches


class _Prefer:
    """A router's forward hook: other choices, and the gates that the router itself would give them."""

    def __init__(self, kind: str, cache: Cache, strength: float, keep: int, simulated: bool) -> None:
        self.kind, self.cache, self.strength, self.keep, self.simulated = kind, cache, strength, keep, simulated
        self.range_sum, self.seen = 0.0, 0

    def __call__(self, router: nn.Module, _inputs, output):
        logits, gates, chosen = output
        k, device = chosen.shape[-1], logits.device
        scores = selection_scores(router, logits.float())
        c = scores.cpu().double().numpy()  # [tokens, experts]
        new = np.empty((len(c), k), np.int64)
        # the experts' forward, not this hook, moves a real cache on; over several tokens its state is foreseen on a copy
        cache = self.cache if self.simulated or len(c) == 1 else copy.deepcopy(self.cache)
        for t, row in enumerate(c):
            finite = row[np.isfinite(row)]
            self.range_sum, self.seen = self.range_sum + finite.max() - finite.min(), self.seen + 1
            biased = row.copy()
            biased[list(cache.slots)] += self.strength * self.range_sum / self.seen
            biased[np.argsort(-row, kind="stable")[: self.keep]] = np.inf
            pick = np.argsort(-biased, kind="stable")[:k]
            new[t] = pick
            if self.simulated or len(c) > 1:
                cache.take([int(e) for e in pick[np.argsort(row[pick], kind="stable")]])
        indices = torch.from_numpy(new).to(device)
        return logits, gates_of(self.kind, router, logits, indices).to(gates.dtype), indices


def selection_scores(router: nn.Module, logits: Tensor) -> Tensor:
    """[tokens, experts], what the router takes the k largest of; -inf in groups that it leaves out (DeepSeek-V3)."""
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is None:
        return logits
    c = logits.sigmoid() + bias
    by_group = c.view(len(c), router.num_group, -1)
    best = by_group.topk(2, dim=-1)[0].sum(-1).topk(router.topk_group, dim=-1)[1]
    kept = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
    return c.masked_fill(~kept[..., None].expand_as(by_group).reshape(c.shape), float("-inf"))


def gates_of(kind: str, router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """[tokens, k], the gates that a router of the family `kind` gives to the experts `chosen`."""
    logits = logits.float()
    if hasattr(router, "e_score_correction_bias"):
        gates = logits.sigmoid().gather(1, chosen)
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20) if router.norm_topk_prob else gates
        return gates * router.routed_scaling_factor
    if kind in ("gpt_oss", "granitemoe"):
        return logits.gather(1, chosen).softmax(-1)
    gates = logits.softmax(-1).gather(1, chosen)
    return gates / gates.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", kind == "mixtral") else gates


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class CacheRow:
    """One line of `table`. `strength` None: the model's own routing, whose `kld` is 0; else cache-conditional, with LRU."""

    capacity: int
    policy: str
    strength: float | None
    hit_rate: float
    bytes_per_token: float
    kld: float


def table(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    capacities: Sequence[int] = (2, 4, 6, 8, 12, 16),
    policies: Sequence[str] = POLICIES,
    strengths: Sequence[float] = (0.1, 0.3, 1.0),
    keep: int = 1,
    expert_bytes: float | None = None,
) -> list[CacheRow]:
    """Hit rate, bytes per token and KL divergence (nats per token) of every capacity under every policy and strength."""
    chosen = trace(model, batches, expert_bytes=expert_bytes)
    plain = [_logits(model, b).flatten(0, 1).float().log_softmax(-1) for b in batches]  # tokens * vocabulary * 4 bytes
    rows = []
    for capacity in capacities:
        runs = [simulate(chosen, capacity, p) for p in policies]
        rows += [CacheRow(capacity, r.policy, None, r.hit_rate, r.bytes_per_token, 0.0) for r in runs]
        for strength in strengths:
            kld = 0.0
            with prefer_cached(model, strength, capacity, keep) as caches:
                for batch, expected in zip(batches, plain, strict=True):
                    other = _logits(model, batch).flatten(0, 1).float().log_softmax(-1)
                    kld += float(token_kl(expected, other).sum())
            hits, misses = sum(c.hits for c in caches), sum(c.misses for c in caches)
            read = sum(c.misses * size for c, size in zip(caches, chosen.expert_bytes, strict=True))
            rows.append(CacheRow(capacity, "lru", strength, hits / (hits + misses), read / chosen.tokens, kld / chosen.tokens))
    return rows
