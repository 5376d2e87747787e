"""`compress`: do to a model what a recipe says, then audit what was really touched.

The whole recipe is checked against the model before any work is done: patterns that match nothing, group sizes that do
not divide, weights that hold NaN, an order that makes no sense, data that is missing. Steps that change shapes are tried on
a copy on the meta device, so that later steps are checked against what they will meet. A model that is not changed in
place is copied without the weights that will be replaced anyway, so the peak is the model, plus what the recipe keeps,
plus the codes; a recipe that does anything before it rounds copies all of it.
"""

import copy
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from html import escape
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from edgelab.blocks import calibrate, checked_batches
from edgelab.expert_steps import shrink_experts
from edgelab.fit import fit
from edgelab.layers import Quantized
from edgelab.methods.coverage import Coverage, CoverageRow
from edgelab.methods.mixed import Allocation, allocate
from edgelab.mixed_experts import expert_of
from edgelab.model import Weight, quantized, stored_tensors, unknown_experts, untouchable, weights
from edgelab.ranges import apply_activations, static_ranges
from edgelab.recipe import (
    AutoRound,
    Distill,
    DropExperts,
    DropLayers,
    EarlyExit,
    FineTune,
    Hqq,
    Learning,
    MergeExperts,
    Prune,
    PruneChannels,
    PruneHeads,
    Qat,
    Quantize,
    Recipe,
    Rotate,
    Route,
    RunTime,
    SkipChannels,
    Smooth,
    SparseAttention,
    Step,
    Structure,
    matches,
)
from edgelab.runtime_steps import apply, restore, steps_of, try_on
from edgelab.scheme import QuantScheme
from edgelab.sensitivity import sensitivity
from edgelab.sparsify import prune
from edgelab.structure import shrink
from edgelab.train import learn, quantization_aware
from edgelab.transforms import awq, rotate, smooth

_PRUNED = 0.2  # a share of exact zeros that no training leaves by chance
_BUDGET_TOKENS = 16_384  # of the calibration set, for the estimate of what each weight loses
_EXPECTED_SHARE = 0.9  # of the matrices' parameters, below which a rule for all ("*") is answered with a warning


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns: the model, the audit of it, and the recipe that made it.

    `remarks`: what happened on the way that a reader of the figures should know, such as experts that few tokens reached.
    """

    model: nn.Module
    coverage: Coverage
    recipe: Recipe
    remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Compressed({type(self.model).__name__}, recipe {self.recipe.digest}, {self.coverage!r})"

    def _repr_html_(self) -> str:
        remarks = "".join(f"<li>{escape(r)}</li>" for r in self.remarks)
        return self.recipe._repr_html_() + self.coverage._repr_html_() + (f"<ul>{remarks}</ul>" if remarks else "")


def compress(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Sequence[Tensor] | None = None,
    training: Sequence[Tensor] | None = None,
    teacher: nn.Module | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    inplace: bool = False,
) -> Compressed:
    """The compressed model with its audit. `model` is not changed unless `inplace`.

    `calibration`: token ids int64 [B, T] without padding, as `data.calibration_batches` makes them, for steps that need to
    see what the model sees. `training`: more of the same kind, from the training split, for steps that learn; they learn from
    `teacher`, by default the model as it was given. `folder`: where learning keeps checkpoints and curves (`step-<i>`
    each), and goes on from when it is called again. A tied weight (an embedding that is also the head) follows the first of
    its names: the embedding's rule. Raises ValueError before any work when the recipe does not fit the model (see `plan`),
    and after it when less than the recipe's `min_expert_share` of the experts' parameters was touched.
    """
    if torch.is_inference_mode_enabled():  # tensors made in it do not count their versions, by which calibration knows them
        with torch.inference_mode(False):
            return compress(
                model,
                recipe,
                calibration=calibration,
                training=training,
                teacher=teacher,
                folder=folder,
                progress=progress,
                inplace=inplace,
            )
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} is quantized already; compress the floating-point model it came from")
    steps = plan(model, recipe)
    _check_data(recipe, calibration, training)
    for given in (calibration, training):
        if given is not None and any(isinstance(s, Structure | RunTime | Learning) for s in recipe.steps):
            checked_batches(model, given)
    sparse = zeros(model)
    if inplace and recipe.learns and teacher is None:
        raise ValueError("inplace=True changes the model that a learning step would learn from; pass teacher=, or inplace=False")
    # weights that learn or are transformed before they are rounded must be the copy's own
    rounds_only = all(isinstance(step, Quantize) and not isinstance(step.method, Qat) for step in recipe.steps)
    replaced = {expert_of(name)[0] for schemes in steps for name in schemes} if rounds_only else set()
    result, teacher = model if inplace else _copy(model, replaced), model if teacher is None else teacher
    parameters = given_count = sum(p.numel() for p in model.parameters())
    remarks: list[str] = []
    if sparse and (recipe.learns or any(isinstance(s, Quantize) for s in recipe.steps)):
        remarks.append(f"up to {max(sparse.values()):.0%} of a weight is zero already ({next(iter(sparse))}): what is zero stays zero")
    for i, step in enumerate(recipe.steps):
        pruned = bool(sparse) or any(isinstance(s, Prune) for s in recipe.steps[:i])
        match step:
            case Quantize():
                schemes = steps[i] if rounds_only else _plan_quantize(result, weights(result), step)
                if isinstance(step.method, Qat):
                    work = None if folder is None else Path(folder) / f"step-{i + 1}"
                    found = _input_ranges(result, schemes, step, calibration, progress)
                    remarks += quantization_aware(
                        result, schemes, step.method, training, teacher=teacher, calibration=calibration, folder=work, progress=progress
                    )
                    if found is not None:
                        apply_activations(result, step.activations, *found)
                else:
                    remarks += _quantize(result, schemes, step, calibration, progress, pruned)
                restore(result, steps_of(result))  # layers that were swapped in know nothing of run-time steps before this one
                continue
            case Smooth():
                _smooth(result, step, next((s for s in recipe.steps[i:] if isinstance(s, Quantize)), None), calibration, progress)
            case Rotate():
                rotate(result, step.seed)
            case Prune():
                remarks += prune(result, step, calibration, progress=progress)
            case DropExperts() | MergeExperts():
                remarks += shrink_experts(result, step, calibration, progress=progress)
            case PruneChannels() | PruneHeads() | DropLayers():
                remarks += shrink(result, step, calibration, progress=progress)
            case Distill() | FineTune():
                work = None if folder is None else Path(folder) / f"step-{i + 1}"
                remarks += learn(result, step, training, teacher=teacher, keep_zeros=pruned, folder=work, progress=progress)
            case Route() | SkipChannels() | SparseAttention() | EarlyExit():
                remarks += apply(result, step, calibration, progress)
        parameters = audit(result).parameters  # a tied head has become one of its own, layers are gone, adapters were added
    if recipe.steps and hasattr(result, "save_pretrained"):
        from edgelab.hf import adopt  # transformers; not needed for a plain torch module

        adopt(result)
    coverage = audit(result)
    if any(isinstance(s, Structure) for s in recipe.steps):
        remarks.append(f"{coverage.parameters:,} of {given_count:,} parameters are left ({coverage.parameters / given_count:.1%})")
    if coverage.parameters != parameters:
        raise AssertionError(
            f"the audit counts {coverage.parameters:,}, the model had {parameters:,} parameters: a tie was lost; please report it"
        )
    quantizing = [step for step in recipe.steps if isinstance(step, Quantize)]
    for step in quantizing:  # at the end: one step may do the experts, another the rest
        coverage.check(step.min_expert_share)
    if any(pattern == "*" and scheme is not None for step in quantizing for pattern, scheme in step.rules):
        _warn_of_the_rest(result, coverage)
    return Compressed(result, coverage, recipe, tuple(remarks))


def plan(model: nn.Module, recipe: Recipe) -> list[dict[str, QuantScheme]]:
    """{weight name: scheme} for each step (empty for one that does not round), everything checked and nothing changed.

    A stack whose experts get different schemes is listed by expert, `<stack>#<expert>`.

    Raises ValueError: a pattern that matches no weight or never decides, a group size that does not divide, a router
    or half an expert module selected, a weight selected by two steps, a step that selects nothing, NaN in a parameter, an
    order that makes no sense (`_check_order`), a codebook that the method can't fit, a structure that the model does not have.
    """
    shadow = _meta_copy(model) if any(isinstance(s, Structure | Prune | RunTime) for s in recipe.steps) else model
    every, pruned = weights(shadow), bool(zeros(model))
    taken: set[str] = set()
    steps = []
    for i, step in enumerate(recipe.steps):
        schemes: dict[str, QuantScheme] = {}
        _check_order(step, recipe.steps[:i])
        match step:
            case Quantize():
                schemes = _plan_quantize(shadow, every, step)
                if pruned:
                    _check_keeps_zeros(step, schemes)
            case DropExperts() | MergeExperts():
                shrink_experts(shadow, step, None, progress=False)
                every = weights(shadow)
            case PruneChannels() | PruneHeads() | DropLayers():
                shrink(shadow, step, None, progress=False)
                every = weights(shadow)
            case Prune():
                prune(shadow, step, None, progress=False)
                pruned = True
            case Route() | SkipChannels() | SparseAttention() | EarlyExit():
                try_on(shadow, step)
            case _ if isinstance(step, Smooth | Rotate | Learning):
                _check_scales_learn(step, steps)
            case _:
                raise TypeError(f"{step!r} is not a step that compress knows")
        stacks = {expert_of(name)[0] for name in schemes}
        twice = taken & stacks
        if twice:
            raise ValueError(f"two steps of the recipe quantize {sorted(twice)[0]}; give it a scheme in one of them only")
        taken |= stacks
        steps.append(schemes)
    for name, p in model.named_parameters() if steps else ():
        broken = int((~torch.isfinite(p)).sum()) if p.is_floating_point() and not p.is_meta else 0
        if broken:
            raise ValueError(
                f"{name} holds {broken} NaN or infinite values of {p.numel()}: the checkpoint is broken; load it again or repair it"
            )
    return steps


def _check_order(step: Step, before: Sequence[Step]) -> None:
    """Raises ValueError when `step` makes no sense behind the steps `before` it."""

    def earlier(kind) -> Step | None:
        return next((s for s in before if isinstance(s, kind)), None)

    changes_weights = Smooth | Rotate | Prune | Structure
    if isinstance(step, changes_weights) and (other := earlier(Quantize)):
        raise ValueError(f"{step!r} comes after a Quantize step, but changes floating-point weights, not packed codes: put it first")
    if isinstance(step, Rotate) and (other := earlier(Prune)):
        raise ValueError(f"{step!r} mixes channels and would fill the zeros of {other!r}: put Rotate first")
    if isinstance(step, PruneChannels | PruneHeads | MergeExperts) and (other := earlier(Prune)):
        raise ValueError(f"{step!r} writes weights anew and would fill the zeros of {other!r}: put Prune behind it")
    if isinstance(step, Structure) and (other := earlier(RunTime)):
        raise ValueError(f"{step!r} changes the shape of a model that {other!r} already computes in its own way: put it first")
    if not isinstance(step, RunTime) and (other := earlier(EarlyExit)):
        raise ValueError(f"{step!r} changes the model that {other!r} was fitted to: put EarlyExit behind it")
    if isinstance(step, EarlyExit) and earlier(EarlyExit):
        raise ValueError("a model has one early exit; leave out one of the two EarlyExit steps")
    if isinstance(step, Learning):
        quantized_before = earlier(Quantize)
        if step.train == "scales" and not quantized_before:
            raise ValueError(f"{type(step).__name__}(train='scales') has no scales to learn before a Quantize step; put it behind one")
        if step.train == "all" and quantized_before:
            raise ValueError(
                f"{type(step).__name__}(train='all') comes after a Quantize step, whose codes don't learn: use train='scales' or 'lora', "
                "or put it before (learning with rounding in the loop is Quantize(rules, method=Qat()))"
            )


def _check_scales_learn(step: Step, before: Sequence[Mapping[str, QuantScheme]]) -> None:
    """Raises ValueError when a learning step wants scales to learn that can't."""
    if isinstance(step, Learning) and step.train == "scales":
        for name, scheme in ((n, s) for schemes in before for n, s in schemes.items()):
            if scheme.codebook == "mxfp":
                raise ValueError(f"{name}: the scales of {scheme} are powers of two and can't learn; use train='lora' or 'norms'")


def zeros(model: nn.Module) -> dict[str, float]:
    """{weight: its share of exact zeros} of those linear weights and expert stacks of which a fifth and more is zero: a model that was
    pruned before, whose zeros must stay."""
    found = {}
    for w in weights(model):
        if w.kind in ("linear", "experts") and not w.tied_to and not w.tensor.is_meta:
            share = float((w.tensor == 0).float().mean())
            if share >= _PRUNED:
                found[w.name] = share
    return found


def _check_keeps_zeros(step: Quantize, schemes: dict[str, QuantScheme]) -> None:
    """Raises ValueError when what a Prune step set to zero would not stay there."""
    if isinstance(step.method, AutoRound | Qat | Hqq):
        raise ValueError(f"{step.method.name} moves the weights that Prune has set to zero; use rtn or gptq behind a Prune step")
    for name, scheme in schemes.items():
        if scheme.asymmetric:
            raise ValueError(
                f"{name}: {scheme} stores an offset, so that what Prune has set to zero is none any more; use int{scheme.bits}"
            )


def _check_data(recipe: Recipe, calibration: Sequence[Tensor] | None, training: Sequence[Tensor] | None) -> None:
    for what, given in (("calibration", calibration), ("training", training)):
        if given is not None and not len(given):
            split = "calibration" if what == "calibration" else "train"
            raise ValueError(f"{what} is empty; data.calibration_batches(tokenizer, corpus()['{split}']) makes it")
    for step in recipe.steps:
        alone = Recipe((step,))
        if calibration is None and not alone.data_free and not isinstance(step, Learning) and not _learns_only(step):
            raise ValueError(
                f"the step {_called(step)!r} needs calibration data: "
                "pass calibration=data.calibration_batches(tokenizer, corpus()['calibration'])"
            )
        if training is None and alone.learns:
            raise ValueError(
                f"the step {_called(step)!r} learns: pass training=data.calibration_batches(tokenizer, corpus()['train'], tokens=1_000_000)"
            )


def _learns_only(step: Step) -> bool:
    """Whether a step needs training data and no calibration data."""
    if not isinstance(step, Quantize) or not isinstance(step.method, Qat):
        return False
    static = step.activations is not None and step.activations.static
    return not static and step.budget is None and step.method.start != "gptq"


def _called(step: Step) -> str:
    if isinstance(step, Quantize):
        return step.method.name + (f", {step.activations}" if step.activations else "")
    return step.to_dict()["step"]


def audit(model: nn.Module) -> Coverage:
    """What each tensor that `model` stores is and takes, found by walking it: nothing is believed, everything counted."""
    rows = [
        CoverageRow(name, role, q.shape, prod(q.shape), str(q.scheme), q.scheme.nbytes(q.shape), True)
        for name, (role, q) in quantized(model).items()
    ]
    codes = {f"{name}.{b}" for name, m in model.named_modules() if isinstance(m, Quantized) for s in m._stored.values() for b in s.buffers}
    parameters = {name for name, _ in model.named_parameters()}
    known = {w.parameter_name: w for w in weights(model)}
    strangers, reasons = unknown_experts(model), untouchable(model)
    for name, tensor in stored_tensors(model).items():
        if name not in codes:
            role = known[name].role if name in known else "experts" if name in strangers else "other"
            count = tensor.numel() if name in parameters else 0
            dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
            note = reasons.get(name, "no rule gave it a scheme" if name in known else "")
            rows.append(CoverageRow(name, role, tuple(tensor.shape), count, dtype, size, False, note))
    return Coverage(tuple(rows))


def _warn_of_the_rest(model: nn.Module, coverage: Coverage) -> None:
    """Says so when the rule "*" reached less than it sounds like. What the recipe itself leaves out does not count."""
    reasons = untouchable(model)
    rest = [r for r in coverage if r.name in reasons and r.role != "router" and r.parameters and not r.touched]
    touched, left = sum(r.parameters for r in coverage if r.touched), sum(r.parameters for r in rest)
    if touched < _EXPECTED_SHARE * (touched + left):
        largest = sorted(rest, key=lambda r: -r.parameters)[:3]
        warnings.warn(
            f"the rule '*' quantized only {touched / (touched + left):.1%} of the matrices' parameters of this {type(model).__name__}. "
            f"Left alone: {'; '.join(f'{r.name} {r.shape} ({r.note})' for r in largest)}{' ...' if len(rest) > 3 else ''}",
            stacklevel=3,
        )


def _plan_quantize(model: nn.Module, every: list[Weight], step: Quantize) -> dict[str, QuantScheme]:
    listed = [w for w in every if not w.tied_to]
    schemes = {w.name: s for w in listed if (s := step.scheme_for(w.name, w.role)) is not None}
    mixed = _schemes_of_experts(listed, step)
    for stack, by_expert in mixed.items():
        schemes.pop(stack, None)
        schemes |= by_expert
    for i, (pattern, scheme) in enumerate(step.rules):
        if pattern.startswith("@") or scheme is None:
            continue  # a role or an exception may have nothing to say about some architecture; a glob is a name
        if "#" in pattern:
            _check_expert_rule(model, listed, step, i)
            continue
        hit = [w for w in every if matches(pattern, w.name, w.role)]
        if not hit:
            raise ValueError(f"pattern {pattern!r} matches no weight of this {type(model).__name__}; names look like {_examples(listed)}")
        first = [any(matches(p, w.name, w.role) for p, _ in step.rules[:i]) for w in hit]
        if all(first) and pattern != "*":
            raise ValueError(f"pattern {pattern!r} never decides: earlier rules match all of its {len(hit)} weights; move it up")
    if not schemes:
        patterns = ", ".join(repr(p) for p, _ in step.rules)
        raise ValueError(f"the rules {patterns} quantize nothing in this {type(model).__name__}; names look like {_examples(listed)}")
    covered = {expert_of(name)[0] for name in schemes}
    given = [(w, s) for w in listed for s in set(mixed[w.name].values() if w.name in mixed else [schemes.get(w.name)])]
    for w, scheme in given:
        if scheme is None:
            continue
        if w.kind == "router":
            raise ValueError(
                f"{w.name} is a router that its module computes itself and stays in floating point: put ('@router', None) first"
            )
        try:
            scheme.groups(w.shape[-1])
        except ValueError as error:
            raise ValueError(f"{w.name}: {error}") from error
        if isinstance(step.method, Hqq) and not scheme.asymmetric:
            raise ValueError(f"{w.name}: hqq finds offsets, and {scheme} has none; use u{scheme}" if scheme.codebook == "int" else
                             f"{w.name}: hqq finds offsets, and {scheme} has none; use uint4-g64")  # fmt: skip
        if isinstance(step.method, AutoRound) and scheme.codebook == "mxfp":
            raise ValueError(f"{w.name}: autoround moves scales in small steps, and those of {scheme} are powers of two; use rtn or gptq")
        other = next((o for o in listed if o.module_name == w.module_name and o.name not in covered), None)
        if other:
            raise ValueError(f"{w.name} gets {scheme} but {other.name} none; both stacks of an expert module are quantized together")
    return schemes


def _schemes_of_experts(listed: list[Weight], step: Quantize) -> dict[str, dict[str, QuantScheme]]:
    """{stack: {stack#expert: scheme}} of the stacks whose experts get different schemes."""
    found = {}
    for w in listed:
        # the rules that may say something of this stack: a large model has one for each of thousands of experts
        near = tuple((p, s) for p, s in step.rules if "#" not in p or fnmatchcase(w.name, p.partition("#")[0]))
        if w.kind != "experts" or not any("#" in p for p, _ in near):
            continue
        here = replace(step, rules=near)
        by_expert = {name: here.scheme_for(name, w.role) for name in (f"{w.name}#{e}" for e in range(w.shape[0]))}
        bare = next((name for name, scheme in by_expert.items() if scheme is None), None)
        if bare and any(by_expert.values()):
            raise ValueError(f"{bare} gets no scheme, but other experts of its stack do; quantize all experts of a stack, or none")
        found[w.name] = by_expert if not bare else {}
    return found


def _check_expert_rule(model: nn.Module, listed: list[Weight], step: Quantize, i: int) -> None:
    """Raises ValueError when rule i, which names experts, matches none, or when earlier rules decide about all that it matches."""
    pattern, (stack, _, _) = step.rules[i][0], step.rules[i][0].partition("#")
    stacks = [w for w in listed if w.kind == "experts" and fnmatchcase(w.name, stack)]
    hit = [(w, f"{w.name}#{e}") for w in stacks for e in range(w.shape[0]) if fnmatchcase(f"{w.name}#{e}", pattern)]
    if not hit:
        some = next((f"{w.name}#0 .. #{w.shape[0] - 1}" for w in listed if w.kind == "experts"), "none: it has no experts")
        raise ValueError(f"pattern {pattern!r} matches no weight of this {type(model).__name__}; names of experts are {some}")
    whole = [p for p, _ in step.rules[:i] if "#" not in p]
    same = {p for p, _ in step.rules[:i] if "#" in p}
    if pattern in same or all(any(matches(p, w.name, w.role) for p in whole) for w, _ in hit):
        raise ValueError(f"pattern {pattern!r} never decides: earlier rules match all of its {len(hit)} experts; move it up")


def _smooth(model: nn.Module, step: Smooth, following: Quantize | None, calibration: Sequence[Tensor], progress: bool) -> None:
    if step.method == "smoothquant":
        smooth(model, calibrate(model, calibration, want=(), progress=progress), alpha=step.alpha, pairs=step.pairs)
        return
    if following is None:
        raise ValueError("Smooth('awq') searches what the next Quantize step loses least with, and none follows; use 'smoothquant'")
    schemes = _plan_quantize(model, weights(model), following)
    # experts in different schemes share one scale per channel: the first one's scheme stands for all
    with tempfile.TemporaryDirectory(prefix="edgelab-awq-") as folder:  # read norm by norm: X X^T of all weights need not fit in memory
        stats = calibrate(model, calibration, want=("xx",), store=folder, progress=progress)
        awq(model, stats, lambda name: schemes.get(name, schemes.get(f"{name}#0")), grid=step.grid)


def _within_budget(model: nn.Module, schemes: dict[str, QuantScheme], step: Quantize, calibration, progress: bool) -> Allocation:
    """The scheme of each selected weight: by the Fisher estimate of what each loses, under the step's budget of bits."""
    experts = [name for name in schemes if expert_of(name)[1] is not None]
    if experts:
        raise ValueError(f"budget={step.budget} chooses schemes, and a rule names that of {experts[0]}; leave out one of them")
    seen, rows = 0, []
    for ids in calibration:
        rows.append(ids)
        seen += ids.numel()
        if seen >= _BUDGET_TOKENS:
            break
    count = sum(w.tensor.numel() for w in weights(model) if w.name in schemes)
    costs = sensitivity(model, rows, list(schemes), step.choices, metric="fisher", per_expert=step.per_expert, progress=progress)
    return allocate(costs, int(step.budget * count / 8))


def _quantize(model: nn.Module, schemes: dict[str, QuantScheme], step: Quantize, calibration, progress: bool, pruned: bool) -> list[str]:
    told = []
    if step.budget is not None:
        found = _within_budget(model, schemes, step, calibration, progress)
        schemes, told = {name: QuantScheme.parse(str(s)) for name, s in found.choice.items()}, [f"budget of {step.budget} bits: {found!r}"]
    found = _input_ranges(model, schemes, step, calibration, progress)
    remarks = told + fit(model, schemes, step.method, calibration, progress, keep_zeros=pruned)
    if found is not None:
        apply_activations(model, step.activations, *found)
    return remarks


def _input_ranges(model: nn.Module, schemes: dict[str, QuantScheme], step: Quantize, calibration, progress: bool):
    """(ranges by name, or None; names, or None for those that have a range) of the step's activations, from the model as it is."""
    act = step.activations
    if act is None:
        return None
    chosen = {expert_of(name)[0] for name in schemes}
    names = [w.name for w in weights(model) if w.name in chosen and w.kind in ("linear", "experts") and w.role != "head"]
    if not act.static:
        return None, names
    stats = calibrate(model, calibration, want=("histogram",), progress=progress)
    return static_ranges(model, stats, calibration, step.ranges, act=act, names=names, progress=progress), None


def _copy(model: nn.Module, replaced: set[str]) -> nn.Module:
    """A copy of `model` that shares the parameters that will be replaced and owns all others."""
    shared = [model.get_parameter(w.parameter_name) for w in weights(model) if w.name in replaced]
    return copy.deepcopy(model, {id(p): p for p in shared})


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have shapes and no bytes; ties stay ties."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _examples(listed: list[Weight]) -> str:
    picked = dict.fromkeys([w.name for w in listed[:2]] + [w.name for w in listed[-1:]])
    return ", ".join(picked) or "(it has no weights)"
