"""Changes of a floating-point model that leave its function as it is and make it easier (or harder) to round. In place.

Where one weight's output channels are another's inputs, with nothing but a product in between, a scale can move across:

    norm -> readers     rmsnorm(h) * g is read by W:      g / s         and  W diag(s)
    up -> down          down reads act(gate) * up:        up's rows / s and  W_down diag(s)     (experts: each its own s)
    v -> o              o reads sum_t p_t v_t:            v's rows / s  and  W_o diag(s)        (one s for all heads of a group)

`smooth` (SmoothQuant) and `awq` choose s to ease rounding, `plant_outliers` to make it hard: a pathology for tiny models,
which have none of the outliers of large ones. `rotate` uses a second freedom. Once the gains are folded into the readers,
RMSNorm commutes with any orthogonal R, so that the whole residual stream may be turned,

    embedding E R,   readers W diag(g) R,   writers R^T W and b R,   head W diag(g_final) R

and so may the values of each attention head between v and o (QuaRot, arXiv 2404.00456, section 4; SpinQuant's R1 and R2,
arXiv 2405.16406, section 3.1). What feeds what is data, `model.Wiring`; a model that it does not describe wholly is refused
before anything is changed. Scales are computed in float32, rotations in float64, and both are cast back once: in a bfloat16
model that cast is what the function changes by, so load in float32 for work. Statistics belong to the model that they were
taken from: calibrate again after a transform.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.layers import Quantized
from edgelab.methods.awq import Found, Reader, awq_search
from edgelab.methods.rotate import random_rotation
from edgelab.methods.smoothquant import smoothing_scales
from edgelab.model import Weight, Wiring, family_of, unknown_experts, weights
from edgelab.scheme import QuantScheme

if TYPE_CHECKING:
    from edgelab.methods.calibrate import InputStats

_CHUNK = 1 << 24  # weights at a time in float64: bounds the copies to 128 MB each


# --------------------------------------------------------------------------------------------- what feeds what, resolved


@dataclass(frozen=True, eq=False)
class Wire:
    """Channels that a scale can move across: out of what makes them, into the columns of what reads them.

    Made by an RMSNorm's `gain`, or by the `rows` of `source` (and its `bias`). Input i of the readers is the channel
    `columns[i]`. `writer`: for a norm inside the attention, the linear whose first rows it takes in. `head_dim`: for
    values, channels per head; a rotation may mix those of one head.
    """

    name: str
    readers: tuple[Weight, ...]
    channels: int
    gain: nn.Parameter | None = None
    source: Weight | None = None
    bias: nn.Parameter | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    writer: Weight | None = None
    head_dim: int = 0

    def move(self, s: Tensor) -> None:
        """Divide the channels by `s` [channels] (or [experts, channels]) and multiply the readers' columns by it."""
        if self.gain is not None:
            self.gain.copy_(self.gain.float() / s)
        else:
            for tensor, scale in _matrices(self.source.tensor, s):
                tensor[self.rows] = (tensor[self.rows].float() / scale[:, None]).to(tensor.dtype)
            if self.bias is not None:
                self.bias[..., self.rows] = (self.bias[..., self.rows].float() / s).to(self.bias.dtype)
        for reader in self.readers:
            for tensor, scale in _matrices(reader.tensor, s if self.columns is None else s[..., self.columns]):
                tensor.copy_(tensor.float() * scale)

    def by_channel(self, t: Tensor, reduce: str) -> Tensor:
        """[..., channels] of t [..., in]: the "amax" or "mean" over the inputs that are one channel."""
        if self.columns is None:
            return t
        index = self.columns.to(t.device).expand(t.shape)
        return t.new_zeros(*t.shape[:-1], self.channels).scatter_reduce(-1, index, t, reduce, include_self=False)


@dataclass(frozen=True, eq=False)
class _Graph:
    norms: list[Wire]  # in the blocks
    pairs: list[Wire]  # up -> down and v -> o
    writers: list[tuple[Weight, nn.Parameter | None]]  # with their biases
    embedding: Weight
    final: Wire | None  # the last norm and the head; None without a head


def _graph(model: nn.Module) -> _Graph:
    """The wiring of `model`, every weight accounted for. Raises ValueError when anything is not understood."""
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} is quantized already; transform the floating-point model, then compress it")
    family = family_of(model)
    wiring, kind = family.wiring, family.model_type
    if wiring is None:
        raise ValueError(
            f"model_type {kind!r} has no wiring in edgelab.model.FAMILIES: it is not known which norm feeds which weight. For a decoder "
            f"with Llama's names: FAMILIES[{kind!r}] = Family({kind!r}, wiring=LLAMA_LIKE); otherwise write its Wiring(...)"
        )
    listed = weights(model)
    names = {m: n for n, m in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    above = names[embedding].rpartition(".")[0]
    decoder = model.get_submodule(above)
    prefix = f"{above}." if above else ""
    blocks = [(f"{prefix}{wiring.blocks}.{i}.", block) for i, block in enumerate(getattr(decoder, wiring.blocks))]
    norms, pairs, writers, used = [], [], [], {names[embedding], names.get(head)}
    for start, block in blocks:
        inside = {w.name.removeprefix(start): w for w in listed if w.name.startswith(start)}
        here = list(_norm_wires(start, block, wiring, inside))
        norms += here
        pairs += _pair_wires(start, model, wiring, inside)
        writing = _matching(inside, wiring.writers)
        writers += [(w, _bias(model, w)) for w in writing]
        used |= {w.name for wire in here for w in wire.readers} | {w.name for w in writing}
    strange = [w.name for w in listed if w.name not in used]
    strange += [n for m, n in names.items() if isinstance(m, nn.Linear) and n not in {w.module_name for w in listed}]
    strange += list(unknown_experts(model))
    if strange:
        raise ValueError(f"the wiring of {kind!r} says nothing of {strange[0]} ({len(strange)} weights): its inputs can't be transformed")
    if any(w.tensor.is_meta for w in listed):
        raise ValueError(f"the weights of this {type(model).__name__} are on the meta device; load them first")
    by_name = {w.name: w for w in listed}
    norm = getattr(decoder, wiring.final_norm)
    _check_rmsnorm(f"{prefix}{wiring.final_norm}", norm)
    final = None if head is None else Wire(f"{prefix}{wiring.final_norm}", (by_name[names[head]],), len(norm.weight), norm.weight)
    return _Graph(norms, pairs, writers, by_name[names[embedding]], final)


def _matching(inside: Mapping[str, Weight], patterns: tuple[str, ...]) -> tuple[Weight, ...]:
    return tuple(w for name, w in inside.items() if any(fnmatchcase(name, p) for p in patterns))


def _norm_wires(start: str, block: nn.Module, wiring: Wiring, inside: Mapping[str, Weight]) -> Iterator[Wire]:
    modules = dict(block.named_modules())
    for wire in wiring.norms:
        norm, readers = modules.get(wire.norm), _matching(inside, wire.readers)
        if norm is None and not readers:
            continue
        if norm is None or not readers:
            there, absent = (readers[0].name, wire.norm) if readers else (start + wire.norm, " or ".join(wire.readers))
            raise ValueError(f"{there} is there, but {start} has no {absent}: the wiring of this family does not fit the model")
        _check_rmsnorm(start + wire.norm, norm)
        yield Wire(start + wire.norm, readers, len(norm.weight), norm.weight, writer=inside[wire.writer] if wire.writer else None)


def _check_rmsnorm(name: str, norm: nn.Module) -> None:
    """Raises ValueError unless `norm` gives x / rms(x) * weight: LayerNorm and Gemma's (1 + weight) do not."""
    g = getattr(norm, "weight", None)
    says = f"{name} is a {type(norm).__name__}"
    if g is None or g.ndim != 1 or getattr(norm, "bias", None) is not None:
        raise ValueError(f"{says}; only an RMSNorm with a weight and no bias lets a scale or a rotation through")
    x = torch.linspace(-1, 2, len(g), device=g.device, dtype=g.dtype)
    wanted, got = (x.float() * x.float().square().mean().rsqrt() * g.float()), norm(x[None])[0].float()
    if not torch.isfinite(g).all():
        raise ValueError(f"{name}.weight holds NaN or infinite values: the checkpoint is broken; load it again")
    if (got - wanted).norm() > 0.02 * wanted.norm():  # bfloat16 is good for 0.004
        raise ValueError(f"{says} that does not compute x / rms(x) * weight; no scale or rotation can be moved across it")


def _pair_wires(start: str, model: nn.Module, wiring: Wiring, inside: Mapping[str, Weight]) -> Iterator[Wire]:
    layout = family_of(model).experts
    for up_name, down_name in wiring.up_down:
        for name, up in inside.items():
            parent, _, last = name.rpartition(".")
            down = inside.get(f"{parent}.{down_name}")
            if last == up_name and down is not None:
                out, n = up.shape[-2], down.shape[-1]
                if out not in (n, 2 * n):
                    raise ValueError(f"{up.name} makes {out} channels, {down.name} reads {n}: it must be as many, or twice as many")
                rows = torch.arange(out)
                rows = rows[1::2] if out > n and layout and layout.interleaved else rows[out - n :]
                yield Wire(up.name, (down,), n, source=up, bias=_bias(model, up), rows=rows.to(up.tensor.device))
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, wiring.value_clamp, None) is not None:
        return
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    for v_name, o_name in wiring.values:
        if v_name in inside and o_name in inside:
            v, o = inside[v_name], inside[o_name]
            dim, per = o.shape[-1] // heads, v.shape[-2] // kv_heads  # a head's values, and its rows in v
            if heads * dim != o.shape[-1] or kv_heads * per != v.shape[-2] or dim > per or heads % kv_heads:
                raise ValueError(f"{v.name} {v.shape} and {o.name} {o.shape} do not fit {heads} heads over {kv_heads} of keys and values")
            rows = torch.arange(v.shape[-2]).view(kv_heads, per)[:, per - dim :].flatten().to(v.tensor.device)
            columns = torch.arange(kv_heads * dim).view(kv_heads, 1, dim).expand(-1, heads // kv_heads, -1).flatten()
            columns = columns.to(o.tensor.device)
            yield Wire(v.name, (o,), kv_heads * dim, source=v, bias=_bias(model, v), rows=rows, columns=columns, head_dim=dim)


def _bias(model: nn.Module, w: Weight) -> nn.Parameter | None:
    return model.get_submodule(w.module_name)._parameters.get("bias" if w.parameter == "weight" else f"{w.parameter}_bias")


def _matrices(tensor: Tensor, s: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(matrix [out, in], its scales): of a stack one expert at a time, so that the copies stay small."""
    s = s.to(tensor.device)
    yield from zip(_each(tensor), s if s.ndim == 2 else [s] * len(_each(tensor)), strict=True)


def _each(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor[None]


# ---------------------------------------------------------------------------------------------------- SmoothQuant, AWQ


@torch.no_grad()
def smooth(model: nn.Module, stats: Mapping[str, "InputStats"], *, alpha: float = 0.5, pairs: bool = False) -> dict[str, Tensor]:
    """{name: s} of the scales that SmoothQuant moved from activations into weights of `model`, in place.

    `stats` {weight name: InputStats}: of each norm's readers at least one; of experts the largest over all. All readers of
    a norm share its s, router, shared and routed experts too, so that the function stays the same; the router, which
    stays in floating point, does not count for max|W|. `pairs`: also up -> down and v -> o. An untied head is smoothed too
    when `stats` has it. Raises ValueError, before anything is changed, for missing or NaN statistics, a model that is
    quantized or has no wiring.
    """
    graph = _graph(model)
    wires = graph.norms + (graph.pairs if pairs else [])
    if graph.final and graph.final.readers[0].name in stats and not graph.final.readers[0].tied_to:
        wires = [*wires, graph.final]
    planned = {}
    for wire in wires:
        found = [_of(stats, w).absmax for w in wire.readers if w.name in stats]
        if not found:
            raise ValueError(f"stats has nothing of what reads {wire.name} ({wire.readers[0].name} ...); calibrate all decoder blocks")
        x = torch.stack([_shared(wire, t, "amax").to(found[0].device) for t in found]).amax(0)
        counted = [w for w in wire.readers if w.role != "router"] or wire.readers
        w = torch.stack([_shared(wire, w.tensor.detach().abs().amax(-2).float(), "amax").to(x.device) for w in counted]).amax(0)
        try:
            planned[wire.name] = wire, smoothing_scales(wire.by_channel(x, "amax"), wire.by_channel(w, "amax"), alpha)
        except ValueError as error:
            raise ValueError(f"{wire.name}: {error}") from error
    for wire, s in planned.values():
        wire.move(s.to(wire.readers[0].tensor.device))
    return {name: s for name, (_, s) in planned.items()}


@torch.no_grad()
def awq(
    model: nn.Module, stats: Mapping[str, "InputStats"], scheme_for: Callable[[str], QuantScheme | None], *, grid: int = 20
) -> dict[str, Found]:
    """{name: what the search found} for each norm, up -> down and v -> o whose readers will be rounded; scaled in place.

    `scheme_for(weight name)`: how a reader will be rounded, None for one that stays (it is scaled all the same).
    `stats` must hold every reader that has a scheme; errors are exact with `xx`, by the diagonal without. The experts of
    a stack share the scale of their norm; between `up` and `down` each has its own, and one without tokens keeps 1.
    """
    graph = _graph(model)
    planned = {}
    final = [graph.final] if graph.final and not graph.final.readers[0].tied_to else []
    for wire in [*graph.norms, *graph.pairs, *final]:
        rounded = [(w, scheme) for w in wire.readers if (scheme := scheme_for(w.name)) is not None]
        if not rounded:
            continue
        here = [(w, scheme, _of(stats, w)) for w, scheme in rounded]
        device = here[0][0].tensor.device
        total = sum(_shared(wire, st.sum_abs.to(device).double(), "sum") for _, _, st in here)
        count = sum(st.count.to(device) if wire.gain is None else st.count.sum().to(device) for _, _, st in here)
        mean = wire.by_channel(total / count.clamp(min=1)[..., None], "mean")
        spread = mean if wire.columns is None else mean[..., wire.columns]  # equal in all heads that share a value
        readers = [Reader(w.tensor, scheme, (st.sum_sq if st.xx is None else st.xx).to(device), w.name) for w, scheme, st in here]
        try:
            found = awq_search(spread, readers, grid=grid)
        except ValueError as error:
            raise ValueError(f"{wire.name}: {error}") from error
        planned[wire.name] = wire, found._replace(scales=wire.by_channel(found.scales, "amax"))
    for wire, found in planned.values():
        wire.move(found.scales)
    return {name: found for name, (_, found) in planned.items()}


def _of(stats: Mapping[str, "InputStats"], w: Weight) -> "InputStats":
    if w.name not in stats:
        raise ValueError(f"stats has nothing of {w.name}, which is to be rounded; calibrate the model with it")
    st = stats[w.name]
    if tuple(st.absmax.shape) != (*w.shape[:-2], w.shape[-1]):
        raise ValueError(
            f"the statistics of {w.name} are {tuple(st.absmax.shape)}; its weight {w.shape} needs {(*w.shape[:-2], w.shape[-1])}"
        )
    return st


def _shared(wire: Wire, t: Tensor, reduce: str) -> Tensor:
    """t [in], or of a stack [experts, in]: reduced over the experts where they share the wire's scale."""
    return getattr(t, reduce)(0) if wire.gain is not None and t.ndim == 2 else t


# ------------------------------------------------------------------------------------------------------------ rotation


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0, *, values: bool = True, latents: bool = False) -> None:
    """Turn the residual stream of `model` by a random orthogonal matrix made of Hadamard's, and each head's values; in place.

    All norm gains become 1. `values`: also a rotation of each attention head between v and o, one per block. `latents`:
    also MLA's compressed queries, keys and values between a and b projections. Nothing is added at run time, so what
    `down` reads stays as it is. A tied head gets weights of its own, with a warning: the embedding is not to have the last norm's gain.
    Raises ValueError, before anything is changed, for a model without a head, quantized or not wired.
    """
    graph = _graph(model)
    if graph.final is None:
        raise ValueError(f"this {type(model).__name__} has no output head: what leaves it would be rotated; load the causal LM")
    head = graph.final.readers[0]
    if head.tied_to:
        head = _untie(model, head)
    device = head.tensor.device
    turn = random_rotation(graph.embedding.shape[-1], seed).to(device)
    _columns(graph.embedding.tensor, turn)
    for i, wire in enumerate([*graph.norms, graph.final]):
        own = turn
        if wire.writer is not None:  # a norm inside the attention: its own rotation, or only the gain
            own = random_rotation(wire.channels, seed + 7919 * (i + 1)).to(device) if latents else None
        for reader in (head,) if wire is graph.final else wire.readers:
            for tensor, gain in _matrices(reader.tensor, wire.gain):
                _columns(tensor, own, gain.double())
        wire.gain.fill_(1)
        if wire.writer is not None and own is not None:
            _rows(wire.writer.tensor[: wire.channels], _bias(model, wire.writer), own)
    for writer, bias in graph.writers:
        for tensor in _each(writer.tensor):
            _rows(tensor, None, turn)
        if bias is not None:
            bias.copy_(bias.double() @ turn)
    for i, wire in enumerate(graph.pairs) if values else ():
        if wire.head_dim:
            own = random_rotation(wire.head_dim, seed + 104729 * (i + 1)).to(device)
            (o,), dim = wire.readers, wire.head_dim
            for rows in wire.rows.split(dim):
                block = wire.source.tensor[rows]
                wire.source.tensor[rows] = (own.T @ block.double()).to(block.dtype)
                if wire.bias is not None:
                    wire.bias[rows] = (wire.bias[rows].double() @ own).to(wire.bias.dtype)
            o.tensor.copy_((o.tensor.double().unflatten(-1, (-1, dim)) @ own).flatten(-2))


def _columns(matrix: Tensor, turn: Tensor | None, gain: Tensor | None = None) -> None:
    """W diag(gain) R, in place, some rows at a time."""
    for part in matrix.split(max(1, _CHUNK // matrix.shape[-1])):
        wide = part.double() if gain is None else part.double() * gain
        part.copy_(wide if turn is None else wide @ turn.to(part.device))


def _rows(matrix: Tensor, bias: Tensor | None, turn: Tensor) -> None:
    """R^T W and b R, in place; of the bias the first entries, as many as the matrix has rows."""
    turn = turn.to(matrix.device)
    for part in matrix.split(max(1, _CHUNK // matrix.shape[-2]), dim=-1):
        part.copy_(turn.T @ part.double())
    if bias is not None:
        bias[: len(turn)] = (bias[: len(turn)].double() @ turn).to(bias.dtype)


def _untie(model: nn.Module, head: Weight) -> Weight:
    """The head with weights of its own; the model's config and transformers' tables of ties say so too."""
    module = model.get_submodule(head.module_name)
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    for m in model.modules():
        config = getattr(m, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        if getattr(m, "all_tied_weights_keys", None):
            ends = f"{head.module_name}.weight"
            m.all_tied_weights_keys = {k: v for k, v in m.all_tied_weights_keys.items() if not ends.endswith(k)}
    warnings.warn(
        f"the head of this {type(model).__name__} was tied to {head.tied_to}; rotated, each has its own weights: "
        f"{module.weight.numel():,} parameters more",
        stacklevel=3,
    )
    return next(w for w in weights(model) if w.name == head.name)


# ----------------------------------------------------------------------------------------------------------- pathology


@torch.no_grad()
def plant_outliers(model: nn.Module, *, channels: int = 6, factor: float = 64.0, seed: int = 0, pairs: bool = False) -> dict[str, Tensor]:
    """{name: the channels} whose activations are now `factor` times as large, and the weights that read them as much smaller.

    A pathology: the logits stay what they were, but the inputs of every block have the outlier features that Dettmers et al.
    found in models of 6.7 B parameters and more: a few channels, the same in all layers, some 20 times and more as large as
    the rest (LLM.int8(), arXiv 2208.07339, section 4). The last norm is left alone. `pairs`: also in what `down` and `o`
    read. A `factor` that is a power of two loses nothing, in bfloat16 either.

    What is planted is a scale, so what chooses scales can take it away whole: `smooth` at alpha = 1/2 and `rotate`, which
    folds the gains, end up where they would have without it; but `rotate` does not reach what `pairs` plants before `down`.
    Raises ValueError for too many channels or a factor that is no finite number above 0.
    """
    graph = _graph(model)
    wires = graph.norms + (graph.pairs if pairs else [])
    least = min(wire.channels for wire in wires)
    if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels <= least:
        raise ValueError(f"channels={channels!r} must be a whole number from 1 to {least}, the narrowest place; LLM.int8() saw up to 7")
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor={factor!r} must be a finite number above 0; 30 to 100 looks like a large model")
    planted = {}
    for wire in wires:  # the same seed for the same width: so the same channels in all layers
        picked = torch.randperm(wire.channels, generator=torch.Generator().manual_seed(seed))[:channels].sort().values
        s = torch.ones(wire.channels)
        s[picked] = 1 / factor
        wire.move(s.to(wire.readers[0].tensor.device))
        planted[wire.name] = picked
    return planted
