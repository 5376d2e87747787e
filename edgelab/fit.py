"""Finding the codes of a `Quantize` step: which method sees what of a model, and in which order.

- Methods without data take one module after the other; each is swapped at once, so that in place the memory falls.
- GPTQ and weighted rounding walk the model block by block (`blocks.walk`): statistics of one block's inputs, its codes,
  its swap, then the next block, calibrated on what the quantized ones before it put out (`Gptq.sequential`).
- AutoRound on blocks walks likewise. Its target is the output of the original block for the *original* inputs, its input
  what the quantized blocks put out: so a block also makes good what those before it have lost.
- AutoRound on the whole model holds all weights at once, and learns from the original's next-token distributions.

An embedding is looked up and not multiplied: it has no input statistics, unless it is the head as well, and is rounded to
nearest (with the method's grid); with the whole model it learns. So is what no calibration token reached. Experts that few
tokens reached borrow: `methods.calibrate.shrink`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.blocks import BlockStats, walk
from edgelab.methods.autoround import learn_rounding
from edgelab.methods.calibrate import InputStats, rare, shrink
from edgelab.methods.gptq import gptq
from edgelab.methods.hqq import hqq
from edgelab.methods.rtn import round_to_nearest
from edgelab.mixed_experts import expert_of
from edgelab.model import Swapper, Weight, by_expert, weights
from edgelab.qtensor import QTensor
from edgelab.recipe import AutoRound, Gptq, Hqq, Method, Rtn
from edgelab.scheme import QuantScheme

_START_GRID = 32  # scales tried for the rounding that learning starts from
_KNOWN = 1 << 26  # log-probabilities of the original that are kept, not computed anew: 256 MiB
_JUDGING = 0.125  # share of the calibration rows that learning does not see and that judge it
Schemes = Mapping[str, QuantScheme]


def fit(
    model: nn.Module,
    schemes: Schemes,
    method: Method,
    batches: Sequence[Tensor] | None,
    progress: bool = True,
    *,
    keep_zeros: bool = False,
) -> list[str]:
    """Swaps the weights of `model` named in `schemes` for codes that `method` finds. Returns remarks: who was rare, what fell back.

    `batches` int64 [B, T] of calibration tokens; None will do for a method without data. `keep_zeros`: a weight that is exactly 0, as
    pruning leaves it, is 0 afterwards too. Then raises ValueError, before any change, for a method or a scheme that can't hold that.
    """
    if keep_zeros:
        _check_zeros(model, schemes, method)
    if method.data_free:
        _without_data(model, schemes, method, progress)
        return []
    match method:
        case AutoRound(scope="model"):
            return _whole_model(model, schemes, method, batches, progress)
        case _:
            return _by_block(model, schemes, method, batches, progress, keep_zeros)


def _check_zeros(model: nn.Module, schemes: Schemes, method: Method) -> None:
    """Rounding to nearest keeps zeros in every symmetric codebook: all of them have the level 0. GPTQ does when told to."""
    if isinstance(method, AutoRound | Hqq):
        why = "learns which way to round, zeros too" if isinstance(method, AutoRound) else "fits an offset, so that no level is exactly 0"
        raise ValueError(f"keep_zeros=True: {method.name} {why}; use rtn or gptq for a pruned model")
    for w in by_expert(weights(model), schemes):
        if w.name in schemes and schemes[w.name].asymmetric and (zeros := int((w.tensor == 0).sum())):
            scheme = schemes[w.name]
            raise ValueError(
                f"{w.name}: keep_zeros=True, but {scheme} has no exact zero for its {zeros:,} pruned weights: levels begin at an offset; "
                f"use int{scheme.bits}-{scheme.granularity}"
            )


def round_weight(w: Weight, scheme: QuantScheme, method: Method, stats: InputStats | None = None, keep_zeros: bool = False) -> QTensor:
    """The codes of one weight by `method`; without statistics, those of rounding to nearest on the method's grid.

    `keep_zeros` is for GPTQ: rounding to nearest keeps the zeros of a symmetric scheme anyway.
    """
    try:
        match method:
            case Hqq():
                settings = {k: getattr(method, k) for k in ("p", "beta", "kappa", "iterations")}
                return hqq(w.tensor, scheme, **settings, name=w.name)
            case Gptq() if stats is not None and stats.xx is not None:
                settings = {k: getattr(method, k) for k in ("damping", "act_order", "mse_grid", "rounds")}
                return gptq(w.tensor, stats.xx, scheme, **settings, keep_zeros=keep_zeros, name=w.name)
            case Rtn(weighted=True) if stats is not None:
                return round_to_nearest(w.tensor, scheme, mse_grid=method.mse_grid, importance=stats.sum_sq, name=w.name)
            case _:
                return round_to_nearest(w.tensor, scheme, mse_grid=getattr(method, "mse_grid", _START_GRID), name=w.name)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(w.name) else f"{w.name}: {error}") from error


def _without_data(model: nn.Module, schemes: Schemes, method: Method, progress: bool) -> None:
    by_module: dict[str, list[Weight]] = {}
    listed = weights(model)
    swapper = Swapper(model, listed)
    for w in by_expert(listed, schemes):
        if w.name in schemes:
            by_module.setdefault(w.module_name, []).append(w)
    del listed, w
    with tqdm(total=len(schemes), desc=f"quantize ({method.name})", unit="weight", disable=not progress) as bar:
        for module_name in list(by_module):  # swapped one module at a time, so that in place the memory falls as it goes
            group, codes = by_module.pop(module_name), {}
            for w in group:
                codes[w.name] = round_weight(w, schemes[w.name], method)
                bar.update()
            swapper.put(codes)
    swapper.finish()


def _by_block(
    model: nn.Module, schemes: Schemes, method: Method, batches: Sequence[Tensor], progress: bool, keep_zeros: bool = False
) -> list[str]:
    remarks: list[str] = []
    listed = weights(model)
    names = {w.name for w in by_expert(listed, schemes)}
    swapper = Swapper(model, listed)
    del listed
    learning = isinstance(method, AutoRound)
    sequential = learning or getattr(method, "sequential", False)
    remaining = {n: s for n, s in schemes.items() if n in names}
    want = ("xx",) if isinstance(method, Gptq) or (learning and method.start == "gptq") else ()
    only = _readers(model, schemes)
    for item in walk(model, batches, want=want, sequential=sequential, twin=learning, progress=progress, only=only):
        codes = _codes_of_block(model, item, remaining, method, remarks, progress, keep_zeros)
        for name in codes:
            remaining.pop(name)
        _put(swapper, codes)
        del codes
    if remaining:  # the embeddings, and what no block or head reads
        left = [w for w in by_expert(weights(model), remaining) if w.name in remaining]
        _put(swapper, {w.name: round_weight(w, schemes[w.name], method) for w in left})
    swapper.finish()
    return remarks


def _codes_of_block(
    model, item: BlockStats, schemes: Schemes, method: Method, remarks: list[str], progress: bool, keep_zeros: bool
) -> dict[str, QTensor]:
    found, stats = _found_in(model, item, schemes, remarks)
    if isinstance(method, AutoRound) and found and item.name not in ("head", "model"):
        return _learn_block(model, item, found, stats, schemes, method, progress)
    return {w.name: round_weight(w, schemes[w.name], method, stats[w.name], keep_zeros) for w in found}


def _readers(model: nn.Module, schemes: Schemes) -> dict[str, str]:
    """{weight whose inputs are wanted: the name under which `schemes` has it}: a tied head goes by its embedding's."""
    stacks = {expert_of(name)[0] for name in schemes}
    return {w.name: w.tied_to or w.name for w in weights(model) if (w.tied_to or w.name) in stacks and w.kind in ("linear", "experts")}


def _found_in(model, item: BlockStats, schemes: Schemes, remarks: list[str]) -> tuple[list[Weight], dict[str, InputStats | None]]:
    """The weights (or single experts) of `schemes` that this item has statistics of, and these, ready for use."""
    listed = weights(model)
    readers = {reader: name for reader, name in _readers(model, schemes).items() if reader in item.stats}
    usable = {readers[w.name]: _usable(w, item, remarks) for w in listed if w.name in readers}
    found = [w for w in by_expert(listed, schemes) if w.name in schemes and expert_of(w.name)[0] in usable]
    return found, {w.name: _of_expert(usable, w.name) for w in found}


def _of_expert(stats: Mapping[str, InputStats | None], name: str) -> InputStats | None:
    """The statistics of a weight, or of one expert of a stack."""
    stack, expert = expert_of(name)
    found = stats.get(stack)
    return found if found is None or expert is None else found.expert(expert)


def _put(swapper: Swapper, codes: Mapping[str, QTensor]) -> None:
    if codes:
        swapper.put(codes)


def _usable(w: Weight, item: BlockStats, remarks: list[str]) -> InputStats | None:
    """The statistics of a weight's inputs; of experts with the rare ones helped; None where no token came."""
    stats = item.stats.get(w.name)
    if stats is None:
        return None
    if len(w.shape) == 3:
        seen = rare(stats, w.shape[-1])
        if len(seen.rare):
            remarks.append(f"{w.name}: {seen}")
        stats = shrink(stats)
    elif not int(stats.count):
        remarks.append(f"{w.name}: no calibration token reached it; rounded to nearest")
        return None
    return stats


# ------------------------------------------------------------------------------------------------------ learnt rounding


@contextmanager
def substituted(model: nn.Module, listed: Mapping[str, Weight], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, `model` computes with `values` {weight name: tensor [..., out, in]} in the places of those weights; gradients flow."""
    before: list[tuple[dict, str, nn.Parameter]] = []
    try:
        stacks: dict[str, list[Tensor]] = {}  # experts one by one make up a stack, in their order
        for name, value in values.items():
            stacks.setdefault(name.partition("#")[0], []).append(value)
        for name, parts in stacks.items():
            w, value = (listed[name], parts[0]) if name in listed else (listed[f"{name}#0"], torch.stack(parts))
            held = model.get_parameter(w.parameter_name)
            if w.tensor.stride()[-2:] != held.stride()[-2:]:
                value = value.mT  # stored transposed (Conv1D, gpt-oss)
            for module in model.modules():  # a tied parameter lies in several places
                for key, parameter in module._parameters.items():
                    if parameter is held:
                        before.append((module._parameters, key, parameter))
                        module._parameters[key] = value.to(held.dtype)
        yield
    finally:
        for parameters, key, parameter in before:
            parameters[key] = parameter


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and no parameter of it asks for a gradient."""
    training, grads = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.requires_grad_(grad)


def _starts(found: list[Weight], schemes: Schemes, method: AutoRound, stats: Mapping[str, InputStats | None]) -> dict[str, QTensor]:
    start = Gptq() if method.start == "gptq" else Rtn(mse_grid=_START_GRID)
    return {w.name: round_weight(w, schemes[w.name], start, stats.get(w.name)) for w in found}


def _split(rows: list, seed: int) -> tuple[list, list]:
    """(rows to learn from, rows to judge by), drawn; a single row is both."""
    order = np.random.default_rng(seed).permutation(len(rows))
    held = max(1, round(_JUDGING * len(rows)))
    return [rows[i] for i in order[held:]] or rows, [rows[i] for i in order[:held]]


def _learn_block(model, item: BlockStats, found: list[Weight], stats, schemes: Schemes, method: AutoRound, progress: bool):
    """AutoRound's loss: mean squared error of the block's output, over rows of the calibration set drawn at random."""
    rows, held = _split([(b, r) for b, x in enumerate(item.inputs) for r in range(len(x))], method.seed)
    rng = np.random.default_rng(method.seed)
    listed = {w.name: w for w in found}

    def error(values: dict[str, Tensor], chosen: list[tuple[int, int]]) -> Tensor:
        total, count = 0.0, 0
        with substituted(model, listed, values):
            for b in dict.fromkeys(b for b, _ in chosen):  # rows of one batch share masks and positions
                mine = [r for batch, r in chosen if batch == b]
                difference = item.forward(item.inputs[b][mine], b, mine).float() - item.outputs[b][mine].float()
                total, count = total + difference.square().sum(), count + difference.numel()
        return total / count

    def loss(values: dict[str, Tensor], step: int) -> Tensor:
        return error(values, [rows[i] for i in rng.choice(len(rows), min(method.batch, len(rows)), replace=False)])

    start = _starts(found, schemes, method, stats)
    settings = {"steps": method.steps, "lr": method.lr, "progress": progress, "judge": lambda values: float(error(values, held))}
    with _frozen(model):
        return learn_rounding({w.name: w.tensor for w in found}, start, loss, **settings)


def _whole_model(model: nn.Module, schemes: Schemes, method: AutoRound, batches: Sequence[Tensor], progress: bool) -> list[str]:
    """KL(original || rounded) of the next-token distributions, in nats per token, over rows drawn at random."""
    remarks: list[str] = []
    listed = {w.name: w for w in by_expert(weights(model), schemes) if w.name in schemes}
    start: dict[str, QTensor] = {}
    if method.start == "gptq":
        for item in walk(model, batches, want=("xx",), sequential=False, progress=progress, only=_readers(model, schemes)):
            found, stats = _found_in(model, item, schemes, remarks)
            start |= _starts(found, schemes, method, stats)
    start |= _starts([w for name, w in listed.items() if name not in start], schemes, method, {})
    rows, held = _split([row for ids in batches for row in ids], method.seed)
    rng = np.random.default_rng(method.seed)
    device = next(model.parameters()).device

    def original(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(ids, use_cache=False).logits.float(), -1)

    def divergence(values: dict[str, Tensor], ids: Tensor, wanted: Tensor) -> Tensor:
        with substituted(model, listed, values):
            got = torch.log_softmax(model(ids, use_cache=False).logits.float(), -1)
        return (wanted.exp() * (wanted - got)).sum(-1).mean()

    def loss(values: dict[str, Tensor], step: int) -> Tensor:
        length = len(rows[int(rng.integers(len(rows)))])
        same = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.stack([rows[i] for i in rng.choice(same, min(method.batch, len(same)), replace=False)]).to(device)
        return divergence(values, ids, original(ids))

    by_length = {length: torch.stack([row for row in held if len(row) == length]).to(device) for length in {len(row) for row in held}}
    judged = [ids for same in by_length.values() for ids in same.split(method.batch)]
    known: dict[int, Tensor] = {}  # what the original says of the judged rows, as far as there is room

    def judge(values: dict[str, Tensor]) -> float:
        total = 0.0
        for i, ids in enumerate(judged):
            wanted = known[i] if i in known else original(ids)
            if sum(t.numel() for t in known.values()) + wanted.numel() <= _KNOWN:
                known[i] = wanted
            total += float(divergence(values, ids, wanted)) * ids.numel()
        return total / sum(ids.numel() for ids in judged)

    with _frozen(model):
        tensors = {name: w.tensor for name, w in listed.items()}
        settings = {"steps": method.steps, "lr": method.lr, "optimizer": "adam", "progress": progress, "judge": judge}
        codes = learn_rounding(tensors, start, loss, **settings)
    swapper = Swapper(model, weights(model))
    swapper.put(codes)
    swapper.finish()
    return remarks
