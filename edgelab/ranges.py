"""Static activation ranges: one stored scale for the inputs of each weight, found on calibration text, chosen by measured effect.

A static scheme (`a8-static`) rounds what a weight is multiplied by with a scale that was fixed beforehand. Every rule of
`methods/clip.py` reads the same histogram of |x| and gives a threshold; which of them harms least cannot be read from
the histogram, for it depends on what the layer does with the values that are clipped. So the rule "best" measures:

1. per tensor: round the inputs of this one weight, everything else in floating point, run its decoder block, and take

       effect = mean over tokens t of |block'(x)_t - block(x)_t|^2 / |block(x)_t|^2

   (per token, because the next norm divides each token by its own size). The rule of least effect gets the tensor. A block
   runs once per weight and *distinct* threshold, on a few thousand tokens: the cost is linear in the number of weights.
2. for the whole: the KL divergence of the next-token distribution to the original's with every tensor rounded, for this
   choice and for each rule applied throughout. The least wins: errors of single blocks do not know how they add up.

The ranges are those of the floating-point model. What smoothing or rotation did to it must come first, for it moves them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.blocks import walk
from edgelab.layers import Blank, QEmbedding, QExperts, Quantized, round_inputs
from edgelab.methods.calibrate import InputStats
from edgelab.methods.clip import PERCENTILE, RULES, Range, threshold
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import Weight, _layer, family_of, weights
from edgelab.scheme import ActScheme, QuantScheme

STATIC = ActScheme(8, "tensor", static=True)
EFFECT_TOKENS = 4096  # on which "best" measures
_KEPT = ("embedding", "head", "router")  # roles whose inputs are left alone unless they are named


# ----------------------------------------------------------------------------------------------------- what is returned


@dataclass(frozen=True, eq=False)
class StaticRanges(Mapping):
    """{weight name: scale}, and how they were found.

    `ranges[name][rule]`: every rule's `Range`. `effects[name][rule]`: the measured effect (see the module), empty unless
    the rule was "best". `rules[name]`: the rule that the tensor got. `klds[assignment]`: nats per token of the whole model,
    for "best" (each tensor its own rule) and each rule throughout; `assignment` is the one that won. `left`: weights that
    no calibration token reached; their inputs are not rounded.
    """

    ranges: dict[str, dict[str, Range]]
    rules: dict[str, str]
    effects: dict[str, dict[str, float]] = field(default_factory=dict)
    klds: dict[str, float] = field(default_factory=dict)
    assignment: str = "best"
    left: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> float:
        return self.ranges[name][self.rules[name]].scale

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def throughout(self, rule: str) -> "StaticRanges":
        """The same ranges with one rule for all tensors."""
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(RULES)}")
        return StaticRanges(self.ranges, dict.fromkeys(self.ranges, rule), self.effects, self.klds, rule, self.left)

    def table(self) -> list[dict[str, str]]:
        """A line per weight: thresholds by every rule, the effect of each where it was measured, and which rule won."""
        lines = []
        for name, by_rule in self.ranges.items():
            line = {"weight": name}
            for rule, found in by_rule.items():
                effect = self.effects.get(name, {}).get(rule)
                line[rule] = f"{found.threshold:.4g}" + ("" if effect is None else f" ({effect:.1e})")
            lines.append(line | {"chosen": self.rules[name]})
        return lines

    def __repr__(self) -> str:
        count = {rule: list(self.rules.values()).count(rule) for rule in RULES}
        shares = ", ".join(f"{rule} {n}" for rule, n in count.items() if n)
        klds = "; ".join(f"{name} {kld:.3g}" for name, kld in self.klds.items())
        return f"StaticRanges({len(self)} tensors: {shares}{f'; KLD in nats: {klds}' if klds else ''})"


# ------------------------------------------------------------------------------------------------------------- choosing


def static_ranges(
    model: nn.Module,
    stats: Mapping[str, InputStats],
    batches: Sequence[Tensor],
    rule: str = "best",
    *,
    act: ActScheme = STATIC,
    names: Iterable[str] | None = None,
    percentile: float = PERCENTILE,
    tokens: int = EFFECT_TOKENS,
    progress: bool = True,
) -> StaticRanges:
    """The scale of each weight's inputs by `rule`: "max", "percentile", "mse", "kl", or "best" (by measured effect).

    `model` in floating point; `stats` {weight name: InputStats} with histograms (`blocks.calibrate(..., want=("histogram",))`);
    `batches` int64 [B, T] as for `calibrate`, of which "best" uses about the first `tokens`. `names`: which weights, by
    default all linear layers and expert stacks of `stats` but head and router. Warns of weights that no token reached, and
    leaves them out. Raises ValueError for an unknown rule, a scheme that is not static, and statistics without histogram.
    """
    if rule not in (*RULES, "best"):
        raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(RULES)}, or 'best'")
    if not act.static:
        raise ValueError(f"act={act} finds its scale at run time; static ranges are for a<bits>-static")
    listed = {w.name: w for w in weights(model) if w.kind in ("linear", "experts")}
    if names is None:
        names = [n for n, w in listed.items() if n in stats and w.role not in _KEPT]
    ranges, left = {}, []
    for name in names:
        if name not in listed:
            raise ValueError(f"{name!r} is no linear layer or expert stack of this floating-point {type(model).__name__}")
        if name not in stats or stats[name].histogram is None:
            raise ValueError(f"stats has no histogram of the inputs of {name}; calibrate with want=('histogram',)")
        histogram = stats[name].histogram
        if histogram.width == 0:  # nothing was seen, or only zeros
            left.append(name)
            continue
        maximum = _maximum(stats[name])
        ranges[name] = {r: threshold(histogram, r, bits=act.bits, percentile=percentile, maximum=maximum) for r in RULES}
    if left:
        warnings.warn(
            f"no calibration token reached {left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''} with anything but zeros: "
            "their inputs stay in floating point; calibrate on more text",
            stacklevel=2,
        )
    if rule != "best":
        return StaticRanges(ranges, dict.fromkeys(ranges, rule), assignment=rule, left=tuple(left))
    few = _first(batches, tokens)
    effects = _effects(model, ranges, few, act, progress)
    chosen = {name: min(RULES, key=by_rule.__getitem__) for name, by_rule in effects.items()}
    assignments = {"best": chosen} | {r: dict.fromkeys(ranges, r) for r in RULES}
    klds = model_klds(model, {k: {n: ranges[n][r].scale for n, r in rules.items()} for k, rules in assignments.items()}, few, act)
    winner = min(klds, key=klds.__getitem__)
    return StaticRanges(ranges, assignments[winner], effects, klds, winner, tuple(left))


def _maximum(stats: InputStats) -> float:
    """The largest |x| of what the histogram counts: of a gate_up stack, whose histogram is the pool's, over all tokens."""
    return float((stats if stats.pooled is None else stats.pooled).absmax.max())


def _first(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Rows of `batches` from the front, about `tokens` tokens, at least one row."""
    few, left = [], tokens
    for ids in batches:
        rows = min(len(ids), max(1 if not few else 0, left // ids.shape[1]))
        if rows < 1:
            break
        few.append(ids[:rows])
        left -= rows * ids.shape[1]
    return few


@torch.no_grad()
def _effects(model, ranges, batches, act: ActScheme, progress: bool) -> dict[str, dict[str, float]]:
    """{weight: {rule: effect}}, each weight's inputs rounded alone."""
    found: dict[str, dict[str, float]] = {}
    with tqdm(total=len(ranges), desc="ranges", unit="weight", disable=not progress) as bar:
        for item in walk(model, batches, want=(), progress=False, collect=lambda name: name != "head"):
            if item.name == "head":
                continue
            mine = [n for n in ranges if item.name == "model" or n.startswith(f"{item.name}.")]
            for name in mine:
                by_scale: dict[float, float] = {}
                for r in RULES:
                    scale = ranges[name][r].scale
                    if scale not in by_scale:
                        with tapped(model, {name: rounding(scale, act)}):
                            by_scale[scale] = _relative_error(item.run(), item.outputs)
                found[name] = {r: by_scale[ranges[name][r].scale] for r in RULES}
                bar.update()
    missing = [n for n in ranges if n not in found]
    if missing:
        raise ValueError(
            f"{missing[0]} lies in no decoder block: its effect cannot be measured; leave it out of `names`, or use another rule"
        )
    return {n: found[n] for n in ranges}


def _relative_error(got: list[Tensor], ref: list[Tensor]) -> float:
    """Mean over tokens of |got - ref|^2 / |ref|^2."""
    total, count = 0.0, 0
    for a, b in zip(got, ref, strict=True):
        a, b = a.float(), b.float()
        share = (a - b).square().sum(-1) / b.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total += float(share.double().sum())
        count += share.numel()
    return total / count


@torch.no_grad()
def model_klds(
    model: nn.Module, assignments: Mapping[str, Mapping[str, float]], batches: Sequence[Tensor], act: ActScheme = STATIC
) -> dict[str, float]:
    """{name: mean KL divergence in nats per token} of `model` with the inputs of weights rounded, to itself without.

    `assignments` {name: {weight name: scale}}; weights in floating point, whatever they will be stored in.
    """
    sums, count, training = dict.fromkeys(assignments, 0.0), 0, model.training
    model.eval()
    try:
        for ids in batches:
            for row in ids.split(max(1, (1 << 24) // (ids.shape[1] * model.config.get_text_config().vocab_size))):
                ref = torch.log_softmax(model(row, use_cache=False).logits.float(), -1)
                count += ref[..., 0].numel()
                for name, scales in assignments.items():
                    with tapped(model, {n: rounding(s, act) for n, s in scales.items()}):
                        got = torch.log_softmax(model(row, use_cache=False).logits.float(), -1)
                    sums[name] += float(token_kl(ref, got).double().sum())
    finally:
        model.train(training)
    return {name: total / count for name, total in sums.items()}


def rounding(scale: float, act: ActScheme = STATIC) -> Callable[[Tensor], Tensor]:
    """The function that rounds x as a layer with this stored scale does."""
    stored = torch.tensor(scale, dtype=torch.float32)
    return lambda x: round_inputs(x, act, stored.to(x.device))


# ------------------------------------------------------------------------------------------------------------- applying


def apply_activations(
    model: nn.Module, act: ActScheme | None, scales: Mapping[str, float] | None = None, names: Iterable[str] | None = None
) -> int:
    """The number of weights of the quantized `model` whose inputs are from now on rounded as `act` says; None: no more.

    `scales` {weight name: scale} for a static scheme (a `StaticRanges`, say), None for a dynamic one. `names`: which
    weights; by default those of `scales`, or all quantized linear layers and expert stacks but the head. Raises ValueError
    for a name that is no quantized weight, a static scheme without scales, and a dynamic one with them.
    """
    if act is not None and act.static != (scales is not None):
        raise ValueError(
            f"{act} {'needs scales, as static_ranges finds them' if act.static else 'finds its scales itself; pass scales=None'}"
        )
    slots = _slots(model)
    if names is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = list(scales) if scales is not None else [n for n, (layer, _) in slots.items() if layer is not head]
    names = list(names)
    for name in names:
        if name not in slots:
            some = next(iter(slots), None)
            raise ValueError(f"{name!r} is no quantized linear layer or expert stack of this {type(model).__name__}; one is {some!r}")
        if act is not None and act.static and name not in scales:
            raise ValueError(f"scales has nothing of {name}; leave it out of `names`, or calibrate with it")
    for name in names:
        layer, own = slots[name]
        layer.round_input_of(own, act, float(scales[name]) if act is not None and act.static else None)
    return len(names)


def _slots(model: nn.Module) -> dict[str, tuple[Quantized, str]]:
    """{weight name: (layer, its own name of the weight)} of all quantized layers that multiply."""
    layout, found = family_of(model).experts, {}
    for name, layer in model.named_modules():
        if getattr(layer, "is_part", False):
            continue  # of a QExpertsMixed, which speaks for its parts
        if isinstance(layer, QExperts | QExpertsMixed):
            found |= {f"{name}.{layout.gate_up}": (layer, "gate_up_proj"), f"{name}.{layout.down}": (layer, "down_proj")}
        elif isinstance(layer, Quantized) and not isinstance(layer, QEmbedding):
            found[name] = layer, "weight"
    return found


# ----------------------------------------------------------------------------------------- taps on a floating-point model


class _FloatExperts(QExperts):
    """The experts of a floating-point module, computed as `QExperts` does, the inputs of each stack through a function first."""

    def _dequantized(self, name: str, expert: int | None = None) -> Tensor:
        whole = self.floats[name]
        return (whole if expert is None else whole[expert]).float()

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        return self.changes[name](x)


@contextmanager
def tapped(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, what each named weight of the floating-point `model` is multiplied by goes through its function first.

    `changes` {weight name: function of x [..., in]}, names as in `weights`: linear layers, and expert stacks, whose inputs
    are the rows [n, in] of all tokens that were sent to an expert. Afterwards the model is as it was.
    """
    found = {w.name: w for w in weights(model)}
    for name in changes:
        if name not in found or found[name].kind not in ("linear", "experts"):
            raise ValueError(f"{name!r} is no linear layer or expert stack of this floating-point {type(model).__name__}")
    handles, replaced = [], {}
    try:
        for name, change in changes.items():
            w = found[name]
            if w.kind == "linear":
                handles.append(model.get_submodule(w.module_name).register_forward_pre_hook(_through(change)))
            elif w.module_name not in replaced:
                stacks = [v for v in found.values() if v.module_name == w.module_name]
                replaced[w.module_name] = model.get_submodule(w.module_name)
                model.set_submodule(w.module_name, _float_experts(model, replaced[w.module_name], stacks, changes))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, old in replaced.items():
            model.set_submodule(name, old)


def _through(change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda _module, args: (change(args[0]), *args[1:])


def _float_experts(model: nn.Module, old: nn.Module, stacks: list[Weight], changes: Mapping) -> _FloatExperts:
    layout = family_of(model).experts
    blank = {w.parameter: Blank(w.shape, QuantScheme.parse("int2-tensor")) for w in stacks}  # the least that a QExperts can hold
    new = _layer(old, blank, stacks[0].module_name, "experts", family_of(model))
    new.__class__, new.kernel = _FloatExperts, "torch"
    own = {layout.gate_up: "gate_up_proj", layout.down: "down_proj"}
    new.floats = {own[w.parameter]: w.tensor for w in stacks}
    new.changes = {own[w.parameter]: changes.get(w.name, lambda x: x) for w in stacks}
    return new.train(old.training)
