"""A model block by block: statistics of every weight's inputs with only one block's worth of them alive at a time.

The activations between two decoder blocks are all that the blocks after them need. So the model is run once with its
blocks replaced by recorders, which hand the hidden states on unchanged and keep what else each block was called with
(masks, positions); then block after block is run on the stored hidden states of all batches. In memory are the model,
the hidden states of one boundary (two while a block runs), and the statistics of one block: a 7 B model's X X^T, some
60 GB for all its weights in float64, never exists at once.

    for block in walk(model, batches):       # statistics of block i, computed with blocks 0 .. i - 1 as they now are
        quantize(block.module, block.stats)  # so that block i + 1 is calibrated behind the quantized block i

Everything outside of the blocks (the head, projections around an embedding) comes last, as the item "head": the model is run
once more with its blocks left out and the last hidden states in their place.

Before any of this, sixteen tokens go through the model both ways. A model whose blocks are not a chain (they read more
from each other than the hidden states) is refused and not calibrated wrongly. A model without a list of blocks, or with
`blocks=False`, is one item, "model": hooks on all weights at once, with all statistics in memory.

Weights that read the same tensor (q, k and v; gate and up) share their statistics: one product x^T x instead of three.
The fused experts of transformers 5 hide their inner activation, so the input of `down_proj` is computed here once more,
from the expert's own `gate_up_proj`.

**Rare experts.** By default an expert's statistics are those of the tokens that the router sent to it, beside the pooled
ones of all tokens, for `methods.calibrate.shrink`. With `all_tokens=True` every token goes to every expert, for the statistics only:
no expert is rare then, at the price of experts / top_k times the work, and of statistics over tokens that an expert will
never see. Counts and gate mass of the router are those of real routing either way, and `CalibStats.report` says who was rare.
"""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab import html_table
from edgelab.evaluate import routers as find_routers
from edgelab.kernels.histogram import Histogram
from edgelab.layers import gated
from edgelab.methods.calibrate import WANT, Accumulator, InputStats, is_shared, rare
from edgelab.model import ExpertLayout, family_of, glu_settings, weights

_PROBE = 16  # tokens that go through the model both ways first
_AGREE = 1e-2  # the largest relative difference between the two: what reordered bfloat16 sums may make


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the blocks that `model` is a chain of; empty when it has none.

    They are the `ModuleList` of modules of one class that holds the most parameters, and lies in no other such list
    (experts lie in a block).
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for _, outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and len({type(m) for m in module}) == 1:
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found:
        return []
    _, name, blocks = max(found, key=lambda f: f[0])
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


@dataclass(frozen=True, eq=False)
class RouterStats:
    """Of one router: how many tokens each expert got (counts int64 [E]), their gate weights' sum (gate_mass float32 [E]).

    `tokens` passed the router, each `inputs` wide.
    """

    counts: Tensor
    gate_mass: Tensor
    tokens: int
    inputs: int

    def merge(self, other: "RouterStats") -> "RouterStats":
        return RouterStats(self.counts + other.counts, self.gate_mass + other.gate_mass, self.tokens + other.tokens, self.inputs)


class _Slot(NamedTuple):
    """A `Weight` without its tensor: the walk must not hold what its caller replaces."""

    name: str
    module_name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]


def _slots(model: nn.Module, only: Collection[str] | None = None) -> list[_Slot]:
    listed = [w for w in weights(model) if w.kind in ("linear", "experts")]
    if only is not None:  # of an expert module both stacks or none
        modules = {w.module_name for w in listed if w.name in only}
        listed = [w for w in listed if w.module_name in modules]
    return [_Slot(w.name, w.module_name, w.parameter, w.kind, w.shape) for w in listed]


# ----------------------------------------------------------------------------------------------------- collecting


class _Collector:
    """Hooks on the modules that hold `slots`, and on the routers among `names`; `finish` gives their statistics."""

    def __init__(self, model: nn.Module, slots: list[_Slot], routers: dict[str, nn.Module], where: str, want, all_tokens: bool) -> None:
        self.model, self.slots, self.routers, self.where = model, slots, routers, where
        self.want, self.all_tokens, self.layout = tuple(want), all_tokens, family_of(model).experts
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.sums: dict[str, Accumulator] = {}  # by leader, the first weight of those that read the same tensor
        self.adds: dict[str, int] = {}  # how often a leader's sums were added to
        self.follows: dict[str, dict[str, int]] = {}  # weight -> leader -> how often it read the leader's input
        self.seen: dict[tuple, tuple[str, Tensor]] = {}  # of this forward; holds the tensors, so that no address is used twice
        self.routed: dict[str, list] = {}  # router -> [counts, gate mass, tokens]
        self.batch, self.handles = 0, []

    def __enter__(self) -> "_Collector":
        experts: dict[str, dict[str, _Slot]] = {}
        for slot in self.slots:
            module = self.model.get_submodule(slot.module_name)
            if slot.kind == "experts":
                experts.setdefault(slot.module_name, {})[slot.parameter] = slot
            else:
                self.handles.append(module.register_forward_pre_hook(self._linear_hook(slot), with_kwargs=True))
        for module_name, pair in experts.items():
            gate_up, down = pair[self.layout.gate_up], pair[self.layout.down]
            for slot in (gate_up, down):
                want = self.want if slot is down else tuple(w for w in self.want if w != "histogram")  # gate_up: the pool's
                if slot is down or not self.all_tokens:
                    self.sums[slot.name] = Accumulator(slot.shape[-1], slot.shape[0], want=want, device=self.device)
            module = self.model.get_submodule(module_name)
            self.handles.append(module.register_forward_pre_hook(self._experts_hook(gate_up, down), with_kwargs=True))
        for name, module in self.routers.items():
            self.handles.append(module.register_forward_hook(self._router_hook(name)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.seen.clear()

    def start(self, batch: int) -> None:
        """Before each forward."""
        self.batch = batch
        self.seen.clear()

    def _called(self, name: str) -> str:
        return f"{name}, batch {self.batch} of {self.where}"

    def _linear_hook(self, slot: _Slot) -> Callable:
        def hook(_module, args, kwargs) -> None:
            x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
            self._see(slot.name, x)

        return hook

    def _see(self, name: str, x: Tensor) -> None:
        """Count `x` as read by `name`, once for all that read it."""
        key = (x.data_ptr(), x._version, x.numel(), x.shape[-1], x.dtype)
        leader, _ = self.seen.get(key, (None, None)) if x.is_contiguous() else (None, None)
        if leader is None:
            leader = name
            if x.is_contiguous():
                self.seen[key] = name, x
            if name not in self.sums:
                self.sums[name] = Accumulator(x.shape[-1], want=self.want, device=x.device)
            self.sums[name].name = self._called(name)
            self.sums[name].add(x)
            self.adds[name] = self.adds.get(name, 0) + 1
        followed = self.follows.setdefault(name, {})
        followed[leader] = followed.get(leader, 0) + 1

    def _experts_hook(self, gate_up: _Slot, down: _Slot) -> Callable:
        def hook(module, args, kwargs) -> None:
            x, first, second = [*args, *kwargs.values()][:3]
            index, gates = (second, first) if first.is_floating_point() else (first, second)
            index, x = index.reshape(-1, index.shape[-1]), x.reshape(-1, x.shape[-1])
            gates = gates.reshape(len(index), -1)
            if gates.shape != index.shape:  # a weight for every expert, zero where it was not chosen
                gates = gates.gather(1, index.clamp(max=gates.shape[1] - 1))
            self._see(_pool_name(gate_up), x)
            experts, k = gate_up.shape[0], index.shape[1]
            choice = index.reshape(-1)
            order = torch.argsort(choice, stable=True)
            sizes = torch.bincount(choice, minlength=experts + 1)[:experts].tolist()  # the index `experts` means none
            gates, begin = gates.reshape(-1), 0
            for e, size in enumerate(sizes):
                mine = order[begin : begin + size]
                begin += size
                token, own = mine // k, gates[mine]
                if self.all_tokens:
                    counted = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, token, True)
                    self._add(down.name, _inner(module, x, e, self.layout), e, own, counted)
                elif size:
                    rows = x[token]
                    self._add(gate_up.name, rows, e, own)
                    self._add(down.name, _inner(module, rows, e, self.layout), e, own)

        return hook

    def _add(self, name: str, x: Tensor, e: int, gates: Tensor, counted: Tensor | None = None) -> None:
        sums = self.sums[name]
        sums.name = f"{self._called(name)} (expert {e})"
        sums.add(x, e, gates, counted)

    def _router_hook(self, name: str) -> Callable:
        def hook(module, _args, output) -> None:
            _, gates, index = output
            index = index.reshape(-1, index.shape[-1])
            gates = gates.reshape(len(index), -1).double()
            gates = gates if gates.shape == index.shape else gates.gather(1, index)
            if not torch.isfinite(gates).all():
                raise FloatingPointError(f"{self._called(name)}: the router's weights are NaN or infinite; check the checkpoint")
            size = module.num_experts + 1  # the last is the index that means none
            held = self.routed.setdefault(name, [0, 0.0, 0])
            held[0] += torch.bincount(index.reshape(-1), minlength=size)[:-1]
            held[1] += torch.zeros(size, dtype=torch.float64, device=gates.device).index_add_(0, index.reshape(-1), gates.reshape(-1))[:-1]
            held[2] += len(index)

        return hook

    def finish(self) -> tuple[dict[str, InputStats], dict[str, RouterStats]]:
        done: dict[str, InputStats] = {}

        def of(name: str, width: int) -> InputStats:
            leaders = self.follows.get(name, {})
            for leader, times in leaders.items():
                if times != self.adds[leader]:
                    raise RuntimeError(
                        f"{name} read the input of {leader} in {times} of {self.adds[leader]} calls of {self.where}: "
                        "a model that rewires itself from batch to batch can't be calibrated; use batches of one shape"
                    )
                if leader not in done:
                    done[leader] = self.sums.pop(leader).finish()
            if not leaders:  # nothing ever reached it
                return Accumulator(width, want=self.want, device=self.device).finish()
            first, *rest = (done[leader] for leader in leaders)
            for other in rest:
                first = first.merge(other)
            return first

        stats: dict[str, InputStats] = {}
        for slot in self.slots:
            if slot.kind == "linear":
                stats[slot.name] = of(slot.name, slot.shape[-1])
            elif slot.parameter == self.layout.down:
                stats[slot.name] = self.sums.pop(slot.name).finish()
            else:
                pooled = of(_pool_name(slot), slot.shape[-1])
                if not self.all_tokens:
                    stats[slot.name] = self.sums.pop(slot.name).finish(pooled, pooled.histogram)
                    continue
                experts = slot.shape[0]
                down = f"{slot.module_name}.{self.layout.down}"
                xx = None if pooled.xx is None else pooled.xx.expand(experts, -1, -1)
                wide = (t.expand(experts, -1) for t in (pooled.absmax, pooled.sum_abs, pooled.sum_sq))
                mass = self.sums[down].gate_mass.float()
                stats[slot.name] = InputStats(pooled.count.repeat(experts), *wide, xx, pooled.histogram, mass, pooled)
        found = {}
        for name, module in self.routers.items():
            nothing = torch.zeros(module.num_experts, device=self.device)
            counts, mass, tokens = self.routed.get(name, (nothing.long(), nothing, 0))
            found[name] = RouterStats(counts, mass.float(), tokens, module.weight.shape[-1])
        return {slot.name: stats[slot.name] for slot in self.slots}, found


def _pool_name(gate_up: _Slot) -> str:
    return f"{gate_up.name} (all tokens)"


def _inner(experts: nn.Module, x: Tensor, e: int, layout: ExpertLayout) -> Tensor:
    """What `down` of expert `e` is multiplied by, [n, inner], for x [n, hidden]: the module computes it and keeps it to itself."""
    weight = experts._parameters[layout.gate_up][e]
    y = x @ weight if layout.transposed else F.linear(x, weight)
    if layout.biased:
        y = y + experts._parameters[f"{layout.gate_up}_bias"][e]
    return gated(y, **glu_settings(experts, layout))


# --------------------------------------------------------------------------------------------------------- the walk


class _Call(NamedTuple):
    """What a block was called with besides the hidden states."""

    args: tuple
    kwargs: dict
    by_name: bool  # the hidden states came as a keyword


class _Done(Exception):
    """Leaves a forward whose needed part has been seen; no error."""


class BlockStats:
    """One stop of `walk`: a block, the statistics of its weights' inputs, and the means to run it.

    name: of the block, "head" for what lies outside of the blocks, "model" for all at once. module: the block (the whole
    model for the latter two). stats: {weight name: InputStats}, names as `model.weights` has them. routers: {name:
    RouterStats}. inputs: the hidden states [B, T, hidden] of each batch (of "head": after the last block; of "model":
    token ids); outputs: what the block made of them before any change, with `twin` of `fp_inputs`. Holds until the walk
    goes on: keep what is needed of it, not the item.
    """

    def __init__(self, name, module, tokens, stats, routers, inputs, fp_inputs, outputs, calls) -> None:
        self.name, self.module, self.tokens = name, module, tokens
        self._held: tuple | None = (stats, routers, inputs, fp_inputs, outputs)
        self._calls: list[_Call] | None = calls

    def _get(self, i: int):
        if self._held is None:
            raise RuntimeError(f"the walk has left {self.name}: keep its stats (dict(item.stats)) before the next step")
        return self._held[i]

    stats: dict[str, InputStats] = property(lambda self: self._get(0))
    routers: dict[str, RouterStats] = property(lambda self: self._get(1))
    inputs: list[Tensor] = property(lambda self: self._get(2))
    fp_inputs: list[Tensor] = property(lambda self: self._get(3))
    outputs: list[Tensor] = property(lambda self: self._get(4))

    def forward(self, hidden: Tensor, batch: int = 0, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """The block as it now is on hidden states [B, T, hidden] of `batch`, or of some of its rows; gradients flow."""
        if self._calls is None:
            raise ValueError(f"{self.name} is no block: it can't be run on hidden states")
        call = self._calls[batch]
        if rows is not None:
            rows = torch.as_tensor(rows, device=hidden.device)
            size = len(self.inputs[batch])
            call = _map(call, lambda t: t[rows] if t.ndim > 1 and len(t) == size > 1 else t)
        return _run(self.module, hidden, call)

    def run(self, inputs: Iterable[Tensor] | None = None) -> list[Tensor]:
        """The outputs [B, T, hidden] of the block as it now is for each batch of `inputs` (its own), without gradients."""
        with _quiet(self.module):
            return [self.forward(x, b) for b, x in enumerate(self.inputs if inputs is None else inputs)]

    def _release(self) -> None:
        self._held = None

    def __repr__(self) -> str:
        return f"BlockStats({self.name}, {self.tokens:,} tokens" + (")" if self._held is None else f", {len(self.stats)} weights)")


def walk(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    want: Sequence[str] = ("xx",),
    all_tokens: bool = False,
    sequential: bool = True,
    twin: bool = False,
    blocks: bool = True,
    progress: bool = True,
    collect: Callable[[str], bool] = lambda name: True,
    only: Collection[str] | None = None,
) -> Iterator[BlockStats]:
    """Yields a `BlockStats` per decoder block, in order, and a last one, "head", for the weights outside of them.

    batches: token ids int64 [B, T] without padding, any number, shapes may differ. want: of "xx" and "histogram". The
    caller may change a block's inside (swap its layers) while it has the item. sequential: the next block then gets the
    outputs of the changed one; else those of the original. twin: the original blocks' outputs for their own inputs are
    carried along (`item.fp_inputs`, `item.outputs`), at the price of a second set of hidden states. collect(name) False:
    no statistics of that block. only: the names of the weights whose statistics are wanted; None: all. See the module for
    `all_tokens` and `blocks`.

    Raises ValueError for batches that the model can't read, FloatingPointError that names block, weight and batch for
    NaN or infinite activations, RuntimeError for a model whose blocks are not a chain.
    """
    if isinstance(want, str) or set(want) - set(WANT):
        raise ValueError(f"want={want!r} must be a list of some of {', '.join(WANT)}")
    batches = checked_batches(model, batches)
    chain = decoder_blocks(model) if blocks else []
    settings = (tuple(want), all_tokens, collect, progress, only)
    if not chain:
        return _walk_whole(model, batches, *settings)
    return _walk(model, chain, batches, *settings, sequential, twin)


def _walk(model, chain, batches, want, all_tokens, collect, progress, only, sequential, twin) -> Iterator[BlockStats]:
    slots, routers, tokens = _slots(model, only), find_routers(model), sum(ids.numel() for ids in batches)
    kinds = _probe(model, chain, batches[0][:1, :_PROBE])
    hidden, calls = _record(model, chain, batches, kinds)
    _check_finite(hidden, "what comes before the first block")
    original = hidden if twin else None

    def collector(inside: Callable[[str], bool], where: str) -> _Collector:
        mine = {n: m for n, m in routers.items() if inside(n)}
        return _Collector(model, [s for s in slots if inside(s.module_name)], mine, where, want, all_tokens)

    with tqdm(total=len(chain) + 1, desc="calibrate", unit="block", disable=not progress) as bar:
        for i, (name, block) in enumerate(chain):
            bar.set_postfix_str(name)
            stats, found, outputs = {}, {}, []
            if collect(name):
                with _quiet(model), collector(lambda n, name=name: n.startswith(f"{name}."), f"block {name}") as sums:
                    for b, x in enumerate(hidden):
                        sums.start(b)
                        outputs.append(_run(block, x, calls[i][b]))
                    stats, found = sums.finish()
                    del sums
            if not collect(name) or (twin and original is not hidden):
                with _quiet(model):
                    outputs = [_run(block, x, calls[i][b]) for b, x in enumerate(original if twin else hidden)]
            _check_finite(outputs, f"the output of block {name}")
            item = BlockStats(name, block, tokens, stats, found, hidden, original if twin else hidden, outputs, calls[i])
            del stats, found
            yield item
            inputs = item.inputs
            item._held = ({}, {}, inputs, None, None)
            hidden = item.run() if sequential else outputs
            original = outputs if twin else None
            item._release()
            calls[i] = []
            del item, inputs, outputs
            if sequential:
                _check_finite(hidden, f"the output of block {name} as it was changed")
            bar.update()
        bar.set_postfix_str("head")
        stats, found = {}, {}
        outside = collector(lambda n: not any(n.startswith(f"{name}.") for name, _ in chain), "the head")
        if collect("head") and outside.slots:
            with _quiet(model), outside as sums:
                for b, ids in enumerate(batches):
                    sums.start(b)
                    _run_around(model, chain, ids, kinds, hidden[b])
                stats, found = sums.finish()
        del outside
        item = BlockStats("head", model, tokens, stats, found, hidden, original if twin else hidden, hidden, None)
        del stats, found
        yield item
        item._release()
        bar.update()


def _walk_whole(model, batches, want, all_tokens, collect, progress, only) -> Iterator[BlockStats]:
    """One item for all weights, by hooks on the whole model."""
    stats, found = {}, {}
    if collect("model"):
        with _quiet(model), _Collector(model, _slots(model, only), find_routers(model), "the model", want, all_tokens) as sums:
            for b, ids in enumerate(tqdm(batches, desc="calibrate", unit="batch", disable=not progress)):
                sums.start(b)
                _forward(model, ids)
            stats, found = sums.finish()
    item = BlockStats("model", model, sum(ids.numel() for ids in batches), stats, found, batches, None, None, None)
    del stats, found
    yield item
    item._release()


def checked_batches(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: calibration needs text; data.calibration_batches makes batches of a data set")
    config = getattr(model, "config", None)
    most = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "max_position_embeddings", None)
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(table, "num_embeddings", None)
    for b, ids in enumerate(batches):
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"batches[{b}] is {what}; each batch is token ids int64 [B, T], without padding")
        if most and ids.shape[1] > most:
            raise ValueError(
                f"batches[{b}] has rows of {ids.shape[1]} tokens, the model {most} positions; make batches with context={most}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (rows is not None and high >= rows):
            raise ValueError(
                f"batches[{b}] holds the ids {low} .. {high}, but the model's embedding has {rows} rows; "
                "take the tokenizer that belongs to the model"
            )
    return batches


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """No gradients, and every part in eval mode (dropout off); the modes come back afterwards."""
    training = [m for m in module.modules() if m.training]
    try:
        for m in training:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def _forward(model: nn.Module, ids: Tensor):
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    known = inspect.signature(model.forward).parameters
    ids, extra = ids.to(device), {"use_cache": False} if "use_cache" in known else {}
    return model(input_ids=ids, **extra) if "input_ids" in known else model(ids, **extra)


def _run(block: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    out = block(*call.args, **call.kwargs, hidden_states=hidden) if call.by_name else block(hidden, *call.args, **call.kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def _replaced(chain: list[tuple[str, nn.Module]], forward: Callable) -> Iterator[None]:
    """Every block computes forward(i, hidden, args, kwargs, by_name) instead of its own; it stays where it is, with all its attributes."""
    before = [block.__dict__.get("forward") for _, block in chain]

    def stand_in(i: int) -> Callable:
        def run(*args, **kwargs):
            by_name = not args
            hidden = kwargs.pop("hidden_states") if by_name else args[0]
            return forward(i, hidden, args[1:], kwargs, by_name)

        return run

    try:
        for i, (_, block) in enumerate(chain):
            block.__dict__["forward"] = stand_in(i)
        yield
    finally:
        for (_, block), old in zip(chain, before, strict=True):
            if old is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = old


def _probe(model: nn.Module, chain, ids: Tensor) -> list[int]:
    """The length of the tuple that each block returns (0: a plain tensor). Raises RuntimeError unless the blocks are a chain."""
    kinds: dict[int, int] = {}
    order: list[int] = []
    last: list[Tensor] = []

    def look(i: int) -> Callable:
        def hook(_module, _args, output) -> None:
            order.append(i)
            kinds[i] = 0 if isinstance(output, Tensor) else len(output)
            last[:] = [output if isinstance(output, Tensor) else output[0]]

        return hook

    handles = [block.register_forward_hook(look(i)) for i, (_, block) in enumerate(chain)]
    try:
        with _quiet(model):
            _forward(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    way_out = "pass blocks=False to calibrate the whole model at once"
    if order != list(range(len(chain))):
        raise RuntimeError(f"the {len(chain)} blocks {chain[0][0]} .. {chain[-1][0]} run in the order {order}, not once each; {way_out}")
    lengths = [kinds[i] for i in range(len(chain))]
    (hidden,), calls = _record(model, chain, [ids], lengths)
    with _quiet(model):
        for (_, block), (call,) in zip(chain, calls, strict=True):
            hidden = _run(block, hidden, call)
    scale, difference = float(last[0].abs().max()), float((hidden - last[0]).abs().max())
    if difference > _AGREE * scale:  # NaN passes: the walk will name its place
        raise RuntimeError(
            f"run one by one, the blocks {chain[0][0]} .. {chain[-1][0]} differ from the model by {difference:.3g} of {scale:.3g}: "
            f"they hand on more than their hidden states; {way_out}"
        )
    return lengths


def _record(model: nn.Module, chain, batches: list[Tensor], kinds: list[int]) -> tuple[list[Tensor], list[list[_Call]]]:
    """The hidden states before the first block [B, T, hidden] of each batch, and what each block was called with, [block][batch]."""
    hidden: list[Tensor] = []
    calls: list[list[_Call]] = [[] for _ in chain]
    kept: dict[tuple, list[Tensor]] = {}  # batches of one shape have the same masks and positions: one copy serves all

    def one_of(t: Tensor) -> Tensor:
        same = kept.setdefault((t.shape, t.dtype, t.device), [])
        for other in (*(o for o in same if o is t), *same):
            if other is t or torch.equal(other, t):
                return other
        same.append(t)
        return t

    def keep(i: int, x: Tensor, args: tuple, kwargs: dict, by_name: bool):
        if i == 0:
            hidden.append(x)
        kwargs = {k: None if hasattr(v, "get_seq_length") else v for k, v in kwargs.items()}  # a cache would grow with each run
        args = tuple(None if hasattr(v, "get_seq_length") else v for v in args)
        calls[i].append(_map(_Call(args, kwargs, by_name), one_of))
        if i == len(chain) - 1:
            raise _Done
        return _shaped(x, kinds[i])

    with _quiet(model), _replaced(chain, keep):
        for ids in batches:
            try:
                _forward(model, ids)
            except _Done:
                continue
    return hidden, calls


def _run_around(model: nn.Module, chain, ids: Tensor, kinds: list[int], hidden: Tensor) -> None:
    """Run `model` without its blocks, with `hidden` as what the last one returns, up to the input of its head."""

    def hand_on(i: int, x: Tensor, args: tuple, kwargs: dict, by_name: bool):
        return _shaped(hidden if i == len(chain) - 1 else x, kinds[i])

    def stop(_module, _args) -> None:
        raise _Done  # the logits of a large vocabulary are the largest tensor of all, and nobody asked for them

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        with _replaced(chain, hand_on):
            _forward(model, ids)
    except _Done:
        pass
    finally:
        if handle is not None:
            handle.remove()


def _shaped(hidden: Tensor, length: int):
    return hidden if length == 0 else (hidden, *([None] * (length - 1)))


def _map(tree, function: Callable[[Tensor], Tensor]):
    """`tree` of tuples, lists and dicts with `function` applied to its tensors."""
    match tree:
        case Tensor():
            return function(tree)
        case dict():
            return {k: _map(v, function) for k, v in tree.items()}
        case tuple() if hasattr(tree, "_fields"):
            return type(tree)(*(_map(v, function) for v in tree))
        case tuple() | list():
            return type(tree)(_map(v, function) for v in tree)
    return tree


def _check_finite(hidden: list[Tensor], what: str) -> None:
    for b, x in enumerate(hidden):
        if not torch.isfinite(x).all():
            raise FloatingPointError(
                f"{what} holds {int((~torch.isfinite(x)).sum())} NaN or infinite values of {x.numel()} in batch {b}; "
                "check the checkpoint, or load the model in float32: float16 overflows at 65504"
            )


# ------------------------------------------------------------------------------------------------------- CalibStats


@dataclass(frozen=True)
class RouterRow:
    """A router in `CalibStats.report`: how its `tokens` were spread over the experts, and who got too few to be fitted on.

    `rare`: experts with fewer than `threshold` tokens, the `dead` with none among them. `share_rare`: of all routed rows,
    those that went to rare experts.
    """

    router: str
    tokens: int
    experts: int
    threshold: int
    rare: tuple[int, ...]
    dead: tuple[int, ...]
    least: int
    median: int
    most: int
    share_rare: float


class CalibStats(Mapping):
    """{weight name: InputStats} of a whole model, with its routers' statistics; statistics on disk are read when asked for.

    routers: {name: RouterStats}; tokens: how many were seen; all_tokens: whether each expert's statistics are over all.
    """

    def __init__(
        self, readers: dict[str, Callable[[], InputStats]], routers: dict[str, RouterStats], tokens: int, all_tokens: bool
    ) -> None:
        self._readers, self.routers, self.tokens, self.all_tokens = readers, routers, tokens, all_tokens

    def __getitem__(self, name: str) -> InputStats:
        if name not in self._readers:
            some = next(iter(self._readers), None)
            raise KeyError(f"{name!r} was not calibrated; there are statistics of {len(self)} weights, such as {some!r}")
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def merge(self, other: "CalibStats") -> "CalibStats":
        """The statistics of both calibration sets; each weight's are merged when asked for. ValueError for another model's."""
        if set(self) != set(other) or set(self.routers) != set(other.routers) or self.all_tokens != other.all_tokens:
            alone = [*sorted(set(self) ^ set(other)), "routers or all_tokens"][0]
            raise ValueError(f"only statistics of one model with the same settings merge; these differ in {alone}")
        readers = {n: lambda a=a, b=other._readers[n]: a().merge(b()) for n, a in self._readers.items()}
        routers = {n: r.merge(other.routers[n]) for n, r in self.routers.items()}
        return CalibStats(readers, routers, self.tokens + other.tokens, self.all_tokens)

    def report(self, threshold: int | None = None) -> list[RouterRow]:
        """A row per router. `threshold`: the tokens that an expert should see; None: as many as it has inputs."""
        rows = []
        for name, r in self.routers.items():
            found = rare(r.counts, r.inputs if threshold is None else threshold)
            ordered, total = sorted(found.tokens), max(sum(found.tokens), 1)
            share = sum(found.tokens[e] for e in found.rare) / total
            middle = ordered[len(ordered) // 2]
            few = (ordered[0], middle, ordered[-1], share)
            rows.append(RouterRow(name, r.tokens, len(ordered), found.threshold, found.rare, found.dead, *few))
        return rows

    def __repr__(self) -> str:
        rows = self.report()
        told = ""
        if rows:
            total = sum(r.experts for r in rows)
            told = f", {sum(len(r.rare) for r in rows)} of {total} experts rare, {sum(len(r.dead) for r in rows)} dead"
        return f"CalibStats({len(self)} weights, {self.tokens:,} tokens{told})"

    def table(self) -> list[dict[str, str]]:
        """A line per router, as text: how tokens were spread over its experts; without routers a line per weight."""
        if not self.routers:
            return [{"weight": name, "statistics": repr(stats)} for name, stats in self.items()]
        return [
            {
                "router": r.router,
                "tokens": f"{r.tokens:,}",
                "experts": f"{r.experts}",
                "tokens of an expert, least": f"{r.least:,}",
                "median": f"{r.median:,}",
                "most": f"{r.most:,}",
                "rare": f"{len(r.rare)} (under {r.threshold:,})",
                "dead": f"{len(r.dead)}",
                "rows of rare experts": f"{r.share_rare:.1%}",
            }
            for r in self.report()
        ]

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), repr(self))


def merge(a: CalibStats, b: CalibStats) -> CalibStats:
    """The statistics of two calibration sets of one model."""
    return a.merge(b)


def calibrate(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    want: Sequence[str] = WANT,
    all_tokens: bool = False,
    store: str | Path | None = None,
    blocks: bool = True,
    progress: bool = True,
) -> CalibStats:
    """The statistics of all weights of `model` over `batches` (token ids int64 [B, T], no padding), in one pass.

    Without `store` they stay in memory, on the model's device. With it, a directory, each block's are written as it is
    done (a temporary name, then a rename) and read when asked for, so that memory holds one block's. A later call with
    the same model, batches and settings takes what is there and computes the rest; what belongs to others is replaced.
    Errors as in `walk`.
    """
    batches = checked_batches(model, batches)
    tokens = sum(ids.numel() for ids in batches)
    settings = {"want": want, "all_tokens": all_tokens, "blocks": blocks, "progress": progress, "sequential": False}
    readers: dict[str, Callable[[], InputStats]] = {}
    routers: dict[str, RouterStats] = {}
    if store is None:
        for item in walk(model, batches, **settings):
            readers |= {name: lambda s=s: s for name, s in item.stats.items()}
            routers |= item.routers
        return CalibStats(readers, routers, tokens, all_tokens)
    folder, device = Path(store), next((p.device for p in model.parameters()), torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_UNFINISHED}*"):  # of a run that was killed
        leftover.unlink()
    key = _key(model, batches, want, all_tokens)
    chain = decoder_blocks(model) if blocks else []
    names = [*(name for name, _ in chain), "head"] if chain else ["model"]
    files = {name: folder / f"{i:05d}-{name}.safetensors" for i, name in enumerate(names)}
    missing = {name for name, file in files.items() if not _belongs(file, key)}
    if missing:
        last = max(names.index(name) for name in missing)
        for i, item in enumerate(walk(model, batches, collect=missing.__contains__, **settings)):
            if item.name in missing:
                _write(files[item.name], item, key)
            if i == last:
                break
    for file in files.values():
        head, found = _read_head(file, device)
        routers |= found
        readers |= {name: lambda f=file, i=i: _read(f, i, device) for name, i in head["names"].items()}
    return CalibStats(readers, routers, tokens, all_tokens)


# ----------------------------------------------------------------------------------------------------------- store

_FORMAT = 1
_UNFINISHED = ".unfinished-"
_TENSORS = ("count", "absmax", "sum_abs", "sum_sq", "xx", "gate_mass")


def _key(model: nn.Module, batches: list[Tensor], want: Sequence[str], all_tokens: bool) -> str:
    """What the statistics depend on: every parameter's and buffer's name, shape and bits, every token, the settings."""
    h = hashlib.sha256(json.dumps([_FORMAT, type(model).__name__, sorted(want), all_tokens]).encode())
    for name, t in model.state_dict().items():
        h.update(f"{name} {tuple(t.shape)} {t.dtype} {checksum(t)}".encode())
    for ids in batches:
        h.update(f"{tuple(ids.shape)}".encode() + ids.cpu().long().contiguous().numpy().tobytes())
    return h.hexdigest()


def checksum(t: Tensor) -> str:
    """Two sums over the bits of `t`, exact whatever their order, the second weighted by place: a change of one value shows."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    total, placed = 0, 0
    for i, part in enumerate(t.detach().reshape(-1).split(1 << 18)):
        bits = part.contiguous().view(whole).long()
        place = torch.arange(1, len(bits) + 1, device=t.device) * 2 + 1
        total += int(bits.sum())
        placed += (i + 1) * int((bits * place).sum())
    return f"{total % 2**64:x} {placed % 2**64:x}"


def _write(file: Path, item: BlockStats, key: str) -> None:
    """The statistics of a block as one safetensors file, whole or not at all; what weights share is written once."""
    unique: dict[int, InputStats] = {}  # by id; a pool before the stack that names it
    for stats in item.stats.values():
        if stats.pooled is not None:
            unique.setdefault(id(stats.pooled), stats.pooled)
        unique.setdefault(id(stats), stats)
    places = {key: i for i, key in enumerate(unique)}
    tensors: dict[str, Tensor] = {}
    entries = []
    for i, stats in enumerate(unique.values()):
        entry: dict = {"pooled": None if stats.pooled is None else places[id(stats.pooled)], "histogram": None, "shared": []}
        for part in _TENSORS:
            if (t := getattr(stats, part)) is None:
                continue
            if is_shared(t):  # the pool's, for every expert
                entry["shared"].append(part)
            else:  # safetensors refuses tensors that share memory; no two xx do
                tensors[f"{i}.{part}"] = t.contiguous() if part == "xx" else t.clone()
        if (h := stats.histogram) is not None:
            entry["histogram"] = {"width": h.width, "zeros": h.zeros, "top": h.top}
            tensors[f"{i}.histogram"] = torch.tensor(h.counts)
        entries.append(entry)
    names = {name: places[id(stats)] for name, stats in item.stats.items()}
    routers = {}
    for name, r in item.routers.items():
        routers[name] = {"tokens": r.tokens, "inputs": r.inputs}
        tensors |= {f"router.{name}.counts": r.counts, f"router.{name}.gate_mass": r.gate_mass}
    head = {"key": key, "names": names, "entries": entries, "routers": routers}
    handle, temporary = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".safetensors", dir=file.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, {"edgelab": json.dumps(head)})
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _belongs(file: Path, key: str) -> bool:
    """Whether `file` is there, whole, and of this key."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as f:
            return json.loads((f.metadata() or {}).get("edgelab", "{}")).get("key") == key
    except (SafetensorError, ValueError):  # cut off by something else than us: computed again and replaced
        return False


def _read_head(file: Path, device: torch.device) -> tuple[dict, dict[str, RouterStats]]:
    with safe_open(file, framework="pt", device=str(device)) as f:
        head = json.loads(f.metadata()["edgelab"])
        routers = {
            name: RouterStats(f.get_tensor(f"router.{name}.counts"), f.get_tensor(f"router.{name}.gate_mass"), r["tokens"], r["inputs"])
            for name, r in head["routers"].items()
        }
    return head, routers


def _read(file: Path, i: int, device: torch.device) -> InputStats:
    with safe_open(file, framework="pt", device=str(device)) as f:
        return _entry(f, json.loads(f.metadata()["edgelab"])["entries"], set(f.keys()), i)


def _entry(f, entries: list[dict], there: set[str], i: int) -> InputStats:
    entry = entries[i]
    parts: dict = {p: f.get_tensor(f"{i}.{p}") for p in _TENSORS if f"{i}.{p}" in there}
    if (h := entry["histogram"]) is not None:
        counts = f.get_tensor(f"{i}.histogram").cpu().numpy()
        parts["histogram"] = Histogram(counts, h["width"], h["zeros"], h["top"])
    if entry["pooled"] is not None:
        parts["pooled"] = _entry(f, entries, there, entry["pooled"])
    for part in entry["shared"]:
        one = getattr(parts["pooled"], part)
        parts[part] = one.expand(len(parts["count"]), *one.shape)
    return InputStats(**parts)
