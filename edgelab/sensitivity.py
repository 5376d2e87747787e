"""What each weight costs at each scheme: measured losses, from which `methods/mixed.py` allocates bits.

The loss of weight i at scheme j is the KL divergence of the model's next-token distribution from the original's when
*only* that weight is rounded, in nats per token, the mean over calibration batches. Near the original the divergence is
a quadratic form of the error d of the weights,

    KL(p_w || p_{w+d}) = 1/2 d^T F d + O(d^3),    F = E[g g^T],  g = grad log p(y | x), y drawn from the model

(Fisher information). Its blocks on the diagonal are what single weights cost; the blocks beside it vanish on average,
since rounding errors of different weights are close to independent. So single losses add up, as long as they are small:
`additivity` measures how well for a given choice. At 2 bits errors are large and the sum is no more than a guide. In a
mixture the smallest error flips some choices of experts; what that costs grows with |d| rather than d^2, and the flips of
several weights overlap. On the embedded MoE with all of the body at int3-g32 the loss was 0.51 of the sum of the single
measured ones, and about twice what the diagonal of F (below) says, which knows nothing of flips. Yet choices made by either
were alike in quality: 0.101 nats per token by measured losses, 0.081 to 0.097 by the diagonal, 0.177 for int3-g32 throughout,
at the same bytes. So "fisher" is the cheap way
(13 s of one core for 16,384 tokens and 7 schemes), "kld" the one that measures.

A block of the decoder changes nothing before it: the passes for a weight of block i start there, from the hidden states
that the block before gave, which are kept for one block at a time. That this model allows it is checked, not assumed.

Experts one by one. With `per_expert` the entries of a stack are `<stack name>#<expert>`. A pass for each expert, stack
and scheme is often too many (`per_expert="measured"` does it); `per_expert=True` takes the diagonal of F instead,

    loss_e  ~  1/2 sum_k d_k^2 F_kk / tokens,    F_kk = sum over sequences of (d log p(y) / d w_k)^2

from one backward pass per sequence with y drawn from the model: what an expert does when it is chosen, how often and
with which gate is all in g. For y drawn from the model the scores of different positions are uncorrelated, so that the
square of a sequence's gradient is, on average, the sum of the squares of its tokens'. The losses of a stack's experts
are then scaled to add up to the stack's own measured loss. (MC-MoE, arXiv 2410.06270, weighs an expert's
error by its frequency and its mean gate instead.)
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.blocks import decoder_blocks
from edgelab.layers import Quantized
from edgelab.methods.mixed import Allocation
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import Weight, weights
from edgelab.qtensor import QTensor
from edgelab.recipe import Quantize, matches
from edgelab.scheme import QuantScheme

Costs = dict[str, dict[str, tuple[float, int]]]
Method = Callable[[Tensor, QuantScheme, str], QTensor]

_ROWS = 1024  # positions whose distributions are compared at a time
_BODY_LEAVES = ("router", "embedding", "head")  # roles that are not measured unless asked for


def rtn(weight: Tensor, scheme: QuantScheme, name: str) -> QTensor:
    """The default method: round to nearest with the scale of least squared error."""
    return round_to_nearest(weight, scheme, mse_grid=24, name=name)


def sensitivity(
    model: nn.Module,
    batches: Sequence[Tensor],
    names: Iterable[str] | None = None,
    schemes: Iterable[QuantScheme | str] = ("int2-g32", "int3-g64", "int3-g32", "int4-g64", "int4-g32", "int8-g64"),
    *,
    method: Method = rtn,
    metric: str = "kld",
    per_expert: bool | str = False,
    seed: int = 0,
    progress: bool = True,
    store: str | Path | None = None,
) -> Costs:
    """{name: {scheme: (loss, bytes)}} of single weights: what `allocate` takes.

    `batches`: int64 [B, T] token ids without padding; all positions count. `names`: weights, globs or `@role`s; by
    default the weights of the decoder blocks. A scheme whose groups do not divide a weight's inputs is left out for it.
    `method` (weight, scheme, name) -> QTensor finds the codes, once for each weight and scheme, from the original model.
    `metric`: "kld" measures; "fisher" is the second-order estimate for every weight, a backward pass per sequence in all.
    `per_expert`: False, True (see the module) or "measured". `seed`: of the tokens drawn for the Fisher information.
    `store`: a file that keeps what is measured, block by block; a later call takes from it what was measured with the
    same model, batches and codes. The model is as it was afterwards, to the bit, also when something fails.

    Raises ValueError for a pattern that matches no weight, no batches, a loss that is not finite.
    """
    batches = _checked_batches(batches)
    if metric not in ("kld", "fisher"):
        raise ValueError(f"metric={metric!r} is not known; use 'kld' (measured) or 'fisher' (second-order estimate)")
    if per_expert not in (False, True, "measured"):
        raise ValueError(f"per_expert={per_expert!r} is not known; use False, True or 'measured'")
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} is quantized already; measure the floating-point model that it came from")
    parsed = list(dict.fromkeys(QuantScheme.parse(s) if isinstance(s, str) else s for s in schemes))
    chosen = _chosen(model, names)
    split = [w for w in chosen if per_expert and w.kind == "experts"]
    fitting = {w.name: _fitting(w, parsed) for w in chosen}
    costs: Costs = {}
    if metric == "kld":
        single = split if per_expert == "measured" else []
        costs = _measured(model, batches, chosen, single, fitting, method, progress, store)
    estimated = chosen if metric == "fisher" else split if per_expert is True else []
    if estimated:
        squares = _fisher_diagonal(model, batches, estimated, seed, progress)
        tokens = sum(b.numel() for b in batches)
        for w in estimated:
            parts: dict[str, list[float]] = {}
            for scheme in fitting[w.name]:
                error = _values(method(w.tensor, scheme, w.name), w.tensor).sub_(w.tensor.float()).square_()
                each = (error * squares[w.name]).flatten(-2).sum(-1, dtype=torch.float64) / (2 * tokens)
                parts[str(scheme)] = each.reshape(-1).tolist()
            if w in split:
                costs |= _shared_out(w, parts, costs.pop(w.name, None))
            else:
                costs[w.name] = {s: (sum(p), QuantScheme.parse(s).nbytes(w.shape)) for s, p in parts.items()}
    position = {w.name: i for i, w in enumerate(chosen)}
    return dict(sorted(costs.items(), key=lambda item: position[item[0].partition("#")[0]]))  # stable: experts keep their order


def _shared_out(w: Weight, parts: dict[str, list[float]], whole: dict[str, tuple[float, int]] | None) -> Costs:
    """The entries of a stack's experts; with the stack's measured losses `whole`, scaled to add up to them."""
    found: Costs = {f"{w.name}#{e}": {} for e in range(w.shape[0])}
    for text, losses in parts.items():
        total = sum(losses)
        target = total if whole is None else whole[text][0]
        size = QuantScheme.parse(text).nbytes(w.shape[1:])
        for e, loss in enumerate(losses):
            found[f"{w.name}#{e}"][text] = (loss * target / total if total else target / len(losses), size)
    return found


# --------------------------------------------------------------------------------------------------------- check


@dataclass(frozen=True)
class Additivity:
    """The losses of single weights, added up, beside the measured loss of all of them rounded at once."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """measured / predicted: 1 where losses add up; above 1 where errors of different weights work together."""
        return self.measured / self.predicted if self.predicted else float("inf")


def additivity(
    model: nn.Module,
    batches: Sequence[Tensor],
    costs: Mapping[str, Mapping[str, tuple[float, int]]],
    choice: Mapping[str, str] | Allocation,
    *,
    method: Method = rtn,
) -> Additivity:
    """How well the losses of `choice` add up: their sum in `costs`, and the KL divergence measured with all of it applied."""
    picked = choice.choice if isinstance(choice, Allocation) else choice
    predicted = sum(costs[name][str(scheme)][0] for name, scheme in picked.items())
    return Additivity(predicted, joint_loss(model, batches, picked, method=method))


def joint_loss(model: nn.Module, batches: Sequence[Tensor], choice: Mapping[str, QuantScheme | str], *, method: Method = rtn) -> float:
    """KL divergence in nats per token when all weights (or `name#expert`s) of `choice` are rounded at once; `model` is restored."""
    batches = _checked_batches(batches)
    known = {w.name: w for w in weights(model)}
    parts = []  # (the tensor that is replaced, its values)
    for name, scheme in choice.items():
        stack, _, expert = name.partition("#")
        if stack not in known:
            raise ValueError(f"{name!r} is no weight of this {type(model).__name__}; weights(model) lists them")
        target = known[stack].tensor[int(expert)] if expert else known[stack].tensor
        parts.append((target, _values(method(target, QuantScheme.parse(str(scheme)), name), target)))
    total = 0.0
    with _evaluating(model):
        for ids in batches:
            reference = _log_probabilities(model, ids)
            saved = []
            try:
                for target, value in parts:
                    saved.append((target, target.clone()))
                    target.copy_(value)
                total += _divergence(reference, _log_probabilities(model, ids))
            finally:
                for target, old in saved:
                    target.copy_(old)
    return total / sum(b.numel() for b in batches)


def mixed_recipe(allocation: Allocation | Mapping[str, QuantScheme | str], base: Quantize) -> Quantize:
    """`base` with a rule for each weight of the allocation before its own rules, which decide about all others.

    So the rules of `base` for routers, embedding and head stay. Raises ValueError for a scheme that can't be parsed.
    """
    choice = allocation.choice if isinstance(allocation, Allocation) else allocation
    parsed = {name: QuantScheme.parse(str(scheme)) for name, scheme in choice.items()}
    return replace(base, rules=(*parsed.items(), *base.rules))


# ------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True, eq=False)
class _Trial:
    """One weight, or one expert of a stack, at one scheme."""

    name: str
    target: Tensor  # a view on the model's own memory
    q: QTensor

    @property
    def scheme(self) -> str:
        return str(self.q.scheme)

    @property
    def codes(self) -> str:
        """Twelve hex digits of codes, scales and offsets."""
        arrays = (self.q.packed, self.q.scales, self.q.offsets)
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays if a is not None)).hexdigest()[:12]


def _measured(model, batches, chosen, single, fitting, method, progress, store) -> Costs:
    """The measured losses of all weights, and of the experts of `single` one by one."""
    blocks, tokens = decoder_blocks(model), sum(b.numel() for b in batches)
    starts = {w.name: _start(w, [name for name, _ in blocks]) for w in chosen}
    kept, found = _Store(store, model, batches), {}
    total = sum(len(fitting[w.name]) * (w.shape[0] if w in single else 1) for w in chosen)
    hidden: list = [None] * len(batches)  # what the block before `start` returned, for each batch
    skipping = True
    with _evaluating(model), tqdm(total=total, desc="sensitivity", unit="loss", disable=not progress) as bar:
        for start in range(max(starts.values()) + 1):
            trials = [t for w in chosen if starts[w.name] == start for t in _trials(w, fitting[w.name], method, w in single)]
            losses = {t: kept.get(t) for t in trials}
            todo = [t for t in trials if losses[t] is None]
            bar.update(len(trials) - len(todo))
            sums = dict.fromkeys(todo, 0.0)
            for b, ids in enumerate(batches):
                if start and b == 0 and skipping:
                    skipping = _may_skip(model, blocks, start, hidden[0], ids)
                with _from_block(blocks, start if skipping else 0, hidden[b]):
                    with _output_of(blocks, start) as output:
                        reference = _log_probabilities(model, ids)
                    hidden[b] = output[0] if output else None
                    for t in todo:
                        sums[t] += _loss_with(model, ids, t, reference)
                        bar.update(1 / len(batches))
            for t in todo:
                losses[t] = sums[t] / tokens
                if not losses[t] < float("inf"):  # NaN too
                    raise ValueError(f"{t.name} at {t.scheme} gives a KL divergence of {losses[t]}: leave this scheme out")
                kept.put(t, losses[t])
            kept.write()
            for t in trials:
                found.setdefault(t.name, {})[t.scheme] = (losses[t], t.q.nbytes)
    return found


def _trials(w: Weight, schemes: list[QuantScheme], method: Method, by_expert: bool) -> Iterator[_Trial]:
    for scheme in schemes:
        q = method(w.tensor, scheme, w.name)
        if by_expert:
            yield from (_Trial(f"{w.name}#{e}", w.tensor[e], q[e]) for e in range(w.shape[0]))
        else:
            yield _Trial(w.name, w.tensor, q)


def _loss_with(model: nn.Module, ids: Tensor, trial: _Trial, reference: Tensor) -> float:
    """KL divergence of a batch, summed over its positions, with one weight replaced; the weight comes back whatever happens."""
    saved = trial.target.clone()
    try:
        trial.target.copy_(_values(trial.q, trial.target))
        return _divergence(reference, _log_probabilities(model, ids))
    finally:
        trial.target.copy_(saved)


def _values(q: QTensor, like: Tensor) -> Tensor:
    """float32 on the device of `like`."""
    return torch.from_numpy(q.dequantize()).to(like.device)


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """[positions, vocabulary], float32."""
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    return torch.log_softmax(logits.flatten(0, -2).float(), dim=-1)


def _divergence(reference: Tensor, other: Tensor) -> float:
    """KL(reference || other) of log probabilities [positions, vocabulary], summed over the positions.

    As sum p (e^r - 1 - r), r = ln(q / p), which is the same because both sum to 1: no term is negative, so nothing
    cancels when the two are close. Where r is large p e^r is written as q, which can't overflow.
    """
    total = 0.0
    for p, q in zip(reference.split(_ROWS), other.split(_ROWS), strict=True):
        r, share = q - p, p.exp()
        terms = torch.where(r > 1, q.exp() - share * (1 + r), share * (torch.expm1(r) - r))
        terms = torch.where(p == -torch.inf, q.exp(), terms)
        total += float(terms.sum(dtype=torch.float64))
    return total


def _fisher_diagonal(model: nn.Module, batches: list[Tensor], chosen: list[Weight], seed: int, progress: bool) -> dict[str, Tensor]:
    """{name: sum over sequences of (d log p(y) / d w)^2}, float32 in the weight's shape, y drawn from the model."""
    parameters = {w.name: model.get_parameter(w.parameter_name) for w in chosen}
    turned = {w.name for w in chosen if w.tensor.shape != parameters[w.name].shape or w.tensor.stride() != parameters[w.name].stride()}
    squares = {w.name: torch.zeros(w.shape, dtype=torch.float32, device=w.tensor.device) for w in chosen}
    before = {p: p.requires_grad for p in model.parameters()}
    draw = torch.Generator().manual_seed(seed)
    sequences = [row[None] for ids in batches for row in ids]
    try:
        for p in before:
            p.requires_grad_(False)
        for p in parameters.values():
            p.requires_grad_(True)
        with _evaluating(model, gradients=True):
            for ids in tqdm(sequences, desc="fisher information", unit="sequence", disable=not progress):
                scores = _log_probabilities(model, ids)
                y = torch.multinomial(scores.detach().exp().cpu(), 1, generator=draw).to(scores.device)
                gradients = torch.autograd.grad(scores.gather(1, y).sum(), list(parameters.values()), allow_unused=True)
                for name, g in zip(parameters, gradients, strict=True):
                    if g is not None:  # None: this sequence does not reach the weight
                        squares[name] += (g.transpose(-1, -2) if name in turned else g).float().square()
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)
    return squares


# -------------------------------------------------------------------------------------------------------- blocks


def _start(w: Weight, names: list[str]) -> int:
    """The block at which a pass may start when only `w` is changed."""
    inside = next((i for i, name in enumerate(names) if w.module_name.startswith(f"{name}.")), None)
    return inside if inside is not None else len(names) if w.role == "head" else 0


@contextmanager
def _from_block(blocks: list[tuple[str, nn.Module]], start: int, before) -> Iterator[None]:
    """The blocks before `start` do nothing but return a copy of `before`, what the last of them would."""
    skipped = [block for _, block in blocks[:start]]
    own = [block.__dict__.get("forward") for block in skipped]  # a wrapper that somebody put there
    try:
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: _copy(before)
        yield
    finally:
        for block, forward in zip(skipped, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def _output_of(blocks: list[tuple[str, nn.Module]], at: int) -> Iterator[list]:
    """A list that holds what block `at` returned in the pass inside."""
    output: list = []
    handle = blocks[at][1].register_forward_hook(lambda _m, _i, out: output.append(_copy(out))) if at < len(blocks) else None
    try:
        yield output
    finally:
        if handle is not None:
            handle.remove()


def _copy(output):
    """A block's output, copied: a block may add to its input in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_copy(o) for o in output) if isinstance(output, tuple | list) else output


def _may_skip(model: nn.Module, blocks: list[tuple[str, nn.Module]], start: int, before, ids: Tensor) -> bool:
    """Whether a pass from `start` on gives what a whole pass does: not where a block hands more to later ones than its output."""
    whole = _log_probabilities(model, ids)
    with _from_block(blocks, start, before):
        part = _log_probabilities(model, ids)
    same = torch.allclose(whole, part, rtol=1e-4, atol=1e-3)
    if not same:
        warnings.warn(f"a pass of this {type(model).__name__} can't start at {blocks[start - 1][0]}: whole passes are used", stacklevel=4)
    return same


@contextmanager
def _evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Dropout off, gradients only if asked for; each module's mode comes back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


# --------------------------------------------------------------------------------------------------------- inputs


def _checked_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give token ids [B, T], such as those of data.calibration_batches")
    for i, b in enumerate(batches):
        if not isinstance(b, Tensor) or b.ndim != 2 or b.dtype != torch.int64 or not b.numel():
            what = f"{b.dtype} {tuple(b.shape)}" if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"batches[{i}] is {what}; it must be int64 [B, T] token ids, not empty")
    return batches


def _chosen(model: nn.Module, names: Iterable[str] | None) -> list[Weight]:
    every = [w for w in weights(model) if not w.tied_to and w.kind != "router"]
    if names is None:
        found = [w for w in every if w.role not in _BODY_LEAVES]
    else:
        patterns = [names] if isinstance(names, str) else list(names)
        for p in patterns:
            if not any(matches(p, w.name, w.role) for w in every):
                raise ValueError(f"names: {p!r} matches no weight of this {type(model).__name__}; names look like {every[-1].name!r}")
        found = [w for w in every if any(matches(p, w.name, w.role) for p in patterns)]
    if not found:
        raise ValueError(f"names={names!r} selects nothing in this {type(model).__name__}; give names or globs of weights(model)")
    return found


def _fitting(w: Weight, schemes: list[QuantScheme]) -> list[QuantScheme]:
    """Those of `schemes` whose groups divide the inputs of `w`."""
    found, why = [], "no scheme was given"
    for scheme in schemes:
        try:
            scheme.groups(w.shape[-1])
            found.append(scheme)
        except ValueError as error:
            why = str(error)
    if not found:
        raise ValueError(f"schemes: none fits {w.name} ({why})")
    return found


class _Store:
    """Measured losses in a JSON file. One is used again only for the same codes, in the same model, on the same tokens."""

    def __init__(self, path: str | Path | None, model: nn.Module, batches: list[Tensor]) -> None:
        self._path, self._losses, self._stamp = None if path is None else Path(path), {}, {}
        if self._path is None:
            return
        self._stamp = {"format": 1, "model": _digest(model.state_dict().items()), "batches": _digest(enumerate(batches))}
        if self._path.is_file():
            held = json.loads(self._path.read_text(encoding="utf-8"))
            differs = next((k for k, v in self._stamp.items() if held.get(k) != v), None)
            if differs:
                raise ValueError(f"store={str(path)!r} holds what was measured with another {differs}; give another file, or delete it")
            self._losses = held["losses"]

    def get(self, trial: _Trial) -> float | None:
        held = self._losses.get(trial.name, {}).get(trial.scheme)
        return held["loss"] if held and held["codes"] == trial.codes else None

    def put(self, trial: _Trial, loss: float) -> None:
        self._losses.setdefault(trial.name, {})[trial.scheme] = {"loss": loss, "codes": trial.codes}

    def write(self) -> None:
        if self._path is not None:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self._stamp | {"losses": self._losses}, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)


def _digest(tensors: Iterable[tuple[object, Tensor]]) -> str:
    """Twelve hex digits of names, shapes and values; of a large tensor, 2**16 values spread over it."""
    h = hashlib.sha256()
    for name, t in tensors:
        flat = t.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() >> 16)].cpu()
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode() + some.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:12]
