"""Structured pruning: which channels, heads and blocks go, and how the rest makes good what they did. `surgery` then cuts.

What a layer's output loses when inputs c of its last matrix W (down, o_proj) go, with H = sum x x^T over calibration tokens:

    channel c        H_cc |W[:, c]|^2                        the squared error of losing it alone          "activation"
    head g           tr(W[:, g] H_gg W[:, g]^T)              likewise for all columns of a head
    block            1 - E cos(h_in, h_out)                  block influence (ShortGPT, arXiv 2403.03853, section 3.1)

"magnitude" looks at weights alone: |gate row| |up row| |down column| of a channel (their product: a factor moved from up to down
changes nothing), |v rows| |o columns| of a head. On the embedded models it is worse than chance, and block 0 is why: of its ten
channels that carry most, five (dense) and eight (MoE) have norms among the least tenth. At 10 % on text of the train split, with
block 0 left to "activation", its KLD falls from 0.756 to 0.041 (dense) and from 1.76 to 0.29 (MoE), with 30 channels of
most activation spared in block 0 to 0.131 and 0.51, with 30 random ones spared not at all.

**Repair.** What stays can say part of what goes (G). The matrix W' on the kept inputs K of least squared output error, damped
towards W as it is, is

    W' = W[:, K] + W[:, G] H[G, K] (H[K, K] + lambda I)^-1   lambda = 0.01 mean diag H[K, K]

It costs one solve per matrix and no byte (normal equations; for single weights Optimal Brain Compression's, arXiv 2208.11580).
It comes with "activation". Each expert has its own H, to which as many tokens of the pool as there are channels are added: a rare
expert leans on the others (`methods.calibrate.shrink`). KLD to the original in nats per token, mean of four domains, 20 test
documents each, 32,768 tokens of calibration, multiple=8 (of the MoE's experts 12.5, 18.8, 31.2 and 50 % really went):

    share of the channels        10 %            20 %            30 %            50 %
    dense  activation, repaired  0.017           0.048           0.087           0.255
           activation            0.026           0.076           0.151           0.533
           random, 3 seeds       0.064 - 0.251   0.234 - 0.372   0.507 - 0.720   1.50 - 1.66
           magnitude             0.794           1.065           1.516           3.057
    MoE    activation, repaired  0.063           0.139           0.254           0.588
           activation            0.082           0.190           0.340           0.810
           random, 3 seeds       0.237 - 1.43    0.585 - 1.85    1.52 - 2.38     2.64 - 3.75
           magnitude             2.625           3.431           4.267           5.340

Calibrating each block on the output of those already pruned gained nothing (1-2 % worse at all of 10, 30, 50 %, both models).
One head of four of the MoE: 0.127 repaired, 0.219 not. One of two of the dense model is too much for either (1.43, 1.33).
One block of four is too much too (exact match 0 to 8 %), and block influence does not find the cheapest: it drops block 2 of the
dense model (0.763; block 3 costs 0.656) and block 1 of the MoE (2.369; block 2 costs 1.312).

Every block is judged by the original's activations. The config has one number for all layers, so each loses as many; a shared
expert of DeepSeek must stay a multiple of the experts' width, and loses about the same share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.blocks import checked_batches, decoder_blocks, walk
from edgelab.evaluate import routers
from edgelab.methods.calibrate import shrink as borrowed
from edgelab.model import Weight, family_of, weights
from edgelab.recipe import DropLayers, PruneChannels, PruneHeads
from edgelab.surgery import keep_channels, keep_heads, keep_layers

_DAMPING = 0.01  # share of the mean diagonal, as GPTQ's


def shrink(
    model: nn.Module,
    step: PruneChannels | PruneHeads | DropLayers,
    batches: Sequence[Tensor] | None,
    progress: bool = True,
    *,
    repair: bool = True,
) -> list[str]:
    """Makes `model` smaller in place as `step` says. Returns remarks. On the meta device only the shapes change.

    `batches` int64 [B, T] of calibration tokens, for "activation" and for `DropLayers`. `repair` False leaves down and o_proj as
    they were, to see what the repair is worth. Raises ValueError for a model without such
    parts, a share that leaves nothing, and what `surgery` refuses.
    """
    match step:
        case PruneChannels():
            return _channels(model, step, batches, progress, repair)
        case PruneHeads():
            return _heads(model, step, batches, progress, repair)
        case DropLayers():
            return _layers(model, step, batches, progress)


# ------------------------------------------------------------------------------------------------------------ channels


@dataclass(frozen=True)
class _Part:
    """A feed-forward or a stack of experts: its name as `surgery.keep_channels` wants it, and the weight of `down`."""

    name: str
    kind: str  # dense, experts or shared
    down: str
    width: int


def _feed_forwards(model: nn.Module) -> list[_Part]:
    layout, found = family_of(model).experts, []
    for w in weights(model):
        if w.kind == "experts" and w.parameter == layout.down:
            found.append(_Part(w.module_name, "experts", w.name, w.shape[-1]))
        elif w.kind == "linear" and w.name.endswith(".down_proj"):
            name = w.name.removesuffix(".down_proj")
            found.append(_Part(name, "shared" if "shared_expert" in name else "dense", w.name, w.shape[-1]))
    if not found:
        raise ValueError(f"this {type(model).__name__} has no feed-forward with a down_proj: PruneChannels has nothing to cut")
    return found


def _widths(model: nn.Module, parts: list[_Part], step: PruneChannels) -> dict[str, int]:
    """{kind: channels that stay}."""
    before = {p.kind: p.width for p in parts}
    stay = {kind: _stay(width, step.share, step.multiple) for kind, width in before.items()}
    if {"shared", "experts"} <= set(stay) and hasattr(model.config, "n_shared_experts"):
        one = stay["experts"]  # the config says n_shared_experts * moe_intermediate_size
        times = max(1, round(before["shared"] * (1 - step.share) / one))
        stay["shared"] = one * min(times, before["shared"] // one)
        if not stay["shared"]:
            raise ValueError(
                f"an expert would keep {one} channels and the shared one has {before['shared']}: prune less, or by another multiple"
            )
    return stay


def _stay(width: int, share: float, multiple: int) -> int:
    """How many of `width` channels stay when about `share` go: the nearest multiple, at least one and at most what fits.

    >>> _stay(640, 0.3, 32), _stay(100, 0.0, 32), _stay(100, 0.99, 32), _stay(20, 0.5, 32)
    (448, 100, 32, 20)
    """
    if share == 1:
        raise ValueError("share=1.0 of PruneChannels leaves no channel; prune less")
    if width <= multiple or not share:  # narrower than one multiple: nothing can go
        return width
    return min(max(1, round(width * (1 - share) / multiple)), width // multiple) * multiple


def _channels(model: nn.Module, step: PruneChannels, batches, progress: bool, repair: bool) -> list[str]:
    parts = _feed_forwards(model)
    stay = _widths(model, parts, step)
    experts = {p.name: next(w.shape[0] for w in weights(model) if w.name == p.down) for p in parts if p.kind == "experts"}
    if next(model.parameters()).is_meta:
        first = {p.name: torch.arange(stay[p.kind]) for p in parts}
        keep_channels(model, {n: t.expand(experts[n], -1) if n in experts else t for n, t in first.items()})
        return []
    by_down = {p.down: p for p in parts}
    kept: dict[str, Tensor] = {}
    mended: dict[str, Tensor] = {}
    if step.method == "activation":
        for item in walk(model, batches, want=("xx",), sequential=False, progress=progress, only=set(by_down)):
            for w in weights(model):
                if w.name in item.stats and w.name in by_down:
                    xx = _second_moments(item.stats[w.name], w)
                    score = xx.diagonal(dim1=-2, dim2=-1) * w.tensor.double().square().sum(-2)
                    kept[by_down[w.name].name] = index = _most(score, stay[by_down[w.name].kind])
                    if repair:
                        mended[w.name] = _mended(w.tensor, xx, index)
    else:
        rng = np.random.default_rng(step.seed)
        for p in parts:
            score = torch.from_numpy(rng.random((experts.get(p.name, 1), p.width))) if step.method == "random" else _magnitudes(model, p)
            score = score if p.name in experts else score.reshape(-1)
            kept[p.name] = _most(score, stay[p.kind])
    before = sum(p.numel() for p in model.parameters())
    keep_channels(model, kept)
    _put(model, mended)
    after = sum(p.numel() for p in model.parameters())
    was = {p.kind: p.width for p in parts}
    told = ", ".join(f"{kind} {was[kind]} -> {n} ({1 - n / was[kind]:.1%} gone)" for kind, n in stay.items())
    remarks = [f"channels kept by {step.method}: {told}; {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"]
    if still := [kind for kind, n in stay.items() if n == was[kind]]:
        remarks.append(
            f"share={step.share} of {', '.join(still)} channels rounds to none at multiple={step.multiple}; a smaller one cuts finer"
        )
    return remarks


def _second_moments(stats, w: Weight) -> Tensor:
    """H [in, in] or [E, in, in], float64; of experts with the rare ones helped."""
    return (borrowed(stats) if len(w.shape) == 3 else stats).xx.double()


def _magnitudes(model: nn.Module, part: _Part) -> Tensor:
    """[inner] or [E, inner]: |gate row| |up row| |down column|."""
    mine = {w.name: w.tensor.double() for w in weights(model) if w.module_name == part.name or w.name.startswith(f"{part.name}.")}
    down = mine.pop(part.down)
    product = down.norm(dim=-2)
    layout = family_of(model).experts
    for value in mine.values():
        rows = value.norm(dim=-1)
        if part.kind == "experts":
            pair = rows.unflatten(-1, (-1, 2)).prod(-1) if layout.interleaved else rows.unflatten(-1, (2, -1)).prod(-2)
            product = product * pair
        elif len(rows) == part.width:
            product = product * rows
    return product


def _most(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending, along the last dimension."""
    return torch.argsort(score, dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values.cpu()


def _mended(weight: Tensor, xx: Tensor, kept: Tensor) -> Tensor:
    """W' [..., out, kept] of least squared output error (see the module); W[:, K] where nothing was seen."""
    if weight.ndim == 3:
        return torch.stack([_mended(w, h, k) for w, h, k in zip(weight, xx, kept, strict=True)])
    inner = xx[kept][:, kept]
    scale = float(inner.diagonal().mean())
    if not scale > 0:
        return weight[:, kept]
    inner = inner + _DAMPING * scale * torch.eye(len(kept), dtype=inner.dtype)
    # around W[:, K]: the damping then pulls towards the weights as they are and not towards zero
    rest = xx[:, kept].T @ weight.double().T - xx[kept][:, kept] @ weight.double()[:, kept].T  # [kept, out]
    return (weight.double()[:, kept] + torch.linalg.solve(inner, rest).T).to(weight.dtype)


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for w in weights(model):
            if w.name in values:
                w.tensor.copy_(values[w.name])


# --------------------------------------------------------------------------------------------------------------- heads


def _heads(model: nn.Module, step: PruneHeads, batches, progress: bool, repair: bool) -> list[str]:
    listed = {w.name: w for w in weights(model)}
    places = {name.removesuffix(".o_proj"): w for name, w in listed.items() if name.endswith(".o_proj") and w.role == "attention"}
    if not places:
        raise ValueError(f"this {type(model).__name__} has no attention with an o_proj: PruneHeads has nothing to cut")
    config = model.config
    groups = config.num_key_value_heads or config.num_attention_heads
    stay = groups - round(step.share * groups)
    if stay < 1:
        raise ValueError(f"share={step.share} leaves none of {groups} key-value heads; at most {(groups - 1) / groups:g}")
    if next(model.parameters()).is_meta:
        keep_heads(model, {name: range(stay) for name in places})
        return []
    kept: dict[str, Tensor] = {}
    mended: dict[str, Tensor] = {}
    if step.method == "activation":
        wanted = {w.name for w in places.values()}
        for item in walk(model, batches, want=("xx",), sequential=False, progress=progress, only=wanted):
            for name, w in places.items():
                if w.name in item.stats:
                    xx, each = item.stats[w.name].xx.double(), w.shape[-1] // groups
                    spans = [slice(g * each, (g + 1) * each) for g in range(groups)]
                    losses = [float(((w.tensor.double()[:, s] @ xx[s, s]) * w.tensor.double()[:, s]).sum()) for s in spans]
                    kept[name] = _most(torch.tensor(losses), stay)
                    if repair:
                        columns = torch.cat([torch.arange(g * each, (g + 1) * each) for g in kept[name].tolist()])
                        mended[w.name] = _mended(w.tensor, xx, columns)
    else:
        rng = np.random.default_rng(step.seed)
        for name, w in places.items():
            columns = w.tensor.double().unflatten(-1, (groups, -1)).square().sum((0, 2)).sqrt()
            kept[name] = _most(
                torch.from_numpy(rng.random(groups)) if step.method == "random" else columns * _values(listed, name, groups), stay
            )
    before = sum(p.numel() for p in model.parameters())
    keep_heads(model, {name: index.tolist() for name, index in kept.items()})
    _put(model, mended)
    after = sum(p.numel() for p in model.parameters())
    told = "; ".join(f"{_number(name)}: {', '.join(map(str, index.tolist()))}" for name, index in kept.items())
    remarks = [f"key-value heads kept by {step.method}, of {groups}: {told}; {1 - after / before:.1%} fewer parameters"]
    if stay == groups:
        remarks.append(f"share={step.share} of {groups} key-value heads rounds to none: no head went")
    return remarks


def _number(name: str) -> str:
    """The block's number in a name, or all of it when there is none.

    >>> _number("model.layers.3.self_attn")
    '3'
    """
    return next((part for part in name.split(".") if part.isdigit()), name)


def _values(listed: Mapping[str, Weight], name: str, groups: int) -> Tensor:
    """[groups]: norms of the rows that make each head's values (and, in MLA, its keys)."""
    maker = listed.get(f"{name}.v_proj") or listed[f"{name}.kv_b_proj"]
    return maker.tensor.double().unflatten(0, (groups, -1)).square().sum((1, 2)).sqrt()


# -------------------------------------------------------------------------------------------------------------- blocks


def _layers(model: nn.Module, step: DropLayers, batches, progress: bool) -> list[str]:
    blocks = decoder_blocks(model)
    if step.count >= len(blocks):
        most = f"at most {len(blocks) - 1}" if len(blocks) > 1 else "a model of one block can't spare it"
        raise ValueError(f"count={step.count} leaves none of {len(blocks)} decoder blocks; {most}")
    if next(model.parameters()).is_meta:
        keep_layers(model, range(len(blocks) - step.count))
        return []
    influence = block_influence(model, batches, progress=progress)
    gone = sorted(np.argsort(influence, kind="stable")[: step.count].tolist())
    keep_layers(model, [i for i in range(len(blocks)) if i not in gone])
    told = ", ".join(f"{x:.3f}" for x in influence)
    return [f"blocks {', '.join(map(str, gone))} dropped; influence of all {len(blocks)}: {told}"]


def block_influence(model: nn.Module, batches: Sequence[Tensor], *, progress: bool = True) -> list[float]:
    """1 - E cos(h_in, h_out) of every decoder block over the tokens of `batches` int64 [B, T] (ShortGPT, arXiv 2403.03853, section 3.1)."""
    blocks, batches = decoder_blocks(model), checked_batches(model, batches)
    if not blocks:
        raise ValueError(f"this {type(model).__name__} is no chain of blocks")
    sums, tokens = np.zeros(len(blocks)), 0

    def hook(i: int):
        def watch(_module, args, kwargs, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[i] += float(torch.cosine_similarity(before.float(), after.float(), dim=-1).sum())

        return watch

    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, (_, block) in enumerate(blocks)]
    try:
        model.eval()
        with torch.no_grad():
            for ids in tqdm(batches, desc="block influence", unit="batch", disable=not progress):
                model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
                tokens += ids.numel()
    finally:
        for h in handles:
            h.remove()
    if not tokens:
        raise ValueError("batches is empty; give calibration tokens")
    return (1 - sums / tokens).tolist()


# ------------------------------------------------------------------------------------------------------------- figures


def figures(model: nn.Module, context: int = 0) -> dict[str, dict[str, int]]:
    """{role, and "all": {"parameters", "bytes", "multiply_adds"}}: what is stored, and what one token multiplies.

    Bytes: parameters and saved buffers in their dtype, tied ones once, which is what a safetensors file holds behind its header.
    A token multiplies with every matrix once, with top-k of the experts, and with no embedding. `context`: tokens that it
    attends to; queries times keys and weights times values then count under "context" (0: only what comes of weights).
    A prompt of T tokens has T^2 of these products without a mask that skips blocks, so context=T is what a CPU computes.
    """
    active = {name.rpartition(".")[0]: (r.top_k, r.weight.shape[0]) for name, r in routers(model).items()}
    found: dict[str, dict[str, int]] = {}
    seen = set()

    def add(role: str, parameters: int, size: int, products: int) -> None:
        for key in (role, "all"):
            row = found.setdefault(key, {"parameters": 0, "bytes": 0, "multiply_adds": 0})
            row["parameters"] += parameters
            row["bytes"] += size
            row["multiply_adds"] += products

    for w in weights(model):
        p = model.get_parameter(w.parameter_name)
        count = 0 if id(p) in seen else p.numel()
        seen.add(id(p))
        products = 0 if w.kind == "embedding" else w.tensor.numel()
        if w.kind == "experts":
            top_k, total = next(v for parent, v in active.items() if w.name.startswith(f"{parent}."))
            products = products * top_k // total
        add(w.role, count, count * p.element_size(), products)
    for t in model.state_dict(keep_vars=True).values():  # norms and biases, and the buffers that are saved
        if id(t) not in seen:
            seen.add(id(t))
            add("other", t.numel() if isinstance(t, nn.Parameter) else 0, t.numel() * t.element_size(), 0)
    if context:
        add("context", 0, 0, context * sum(_attended(m) for m in model.modules()))
    return found


def _attended(module: nn.Module) -> int:
    """Multiply-adds per token and token attended to: widths of all heads' queries and values together; 0 for no attention."""
    if not isinstance(getattr(module, "o_proj", None), nn.Linear):
        return 0
    queries = module.q_b_proj if hasattr(module, "q_b_proj") else module.q_proj
    return queries.weight.shape[0] + module.o_proj.weight.shape[1]
