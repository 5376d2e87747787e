"""`compress`: do to a model what a recipe says, then audit what was really touched.

The whole recipe is checked against the model before any work is done: patterns that match nothing, group sizes that do
not divide, weights that hold NaN. A model that is not changed in place is copied without the weights that will be
replaced anyway, so the peak is the model, plus what the recipe keeps, plus the codes.
"""

import copy
import warnings
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from tqdm.auto import tqdm

from edgelab.layers import Quantized
from edgelab.methods.coverage import Coverage, CoverageRow
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import Swapper, Weight, quantized, stored_tensors, unknown_experts, untouchable, weights
from edgelab.recipe import Quantize, Recipe, matches
from edgelab.scheme import QuantScheme

_EXPECTED_SHARE = 0.9  # of the matrices' parameters, below which a rule for all ("*") is answered with a warning


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` returns: the model, the audit of it, and the recipe that made it."""

    model: nn.Module
    coverage: Coverage
    recipe: Recipe

    def __repr__(self) -> str:
        return f"Compressed({type(self.model).__name__}, recipe {self.recipe.digest}, {self.coverage!r})"


def compress(model: nn.Module, recipe: Recipe, *, progress: bool = True, inplace: bool = False) -> Compressed:
    """The compressed model with its audit. `model` is not changed unless `inplace`.

    A tied weight (an embedding that is also the head) follows the first of its names: the embedding's rule. Raises
    ValueError before any work when the recipe does not fit the model (see `plan`), and after it when less than the
    recipe's `min_expert_share` of the experts' parameters was touched.
    """
    if any(isinstance(m, Quantized) for m in model.modules()):
        raise ValueError(f"this {type(model).__name__} is quantized already; compress the floating-point model it came from")
    steps = plan(model, recipe)
    parameters = sum(p.numel() for p in model.parameters())
    result = model if inplace else _copy(model, {name for schemes in steps for name in schemes})
    for step, schemes in zip(recipe.steps, steps, strict=True):
        match step:
            case Quantize():
                _quantize(result, schemes, step, progress)
    if steps and hasattr(result, "save_pretrained"):
        from edgelab.hf import adopt  # transformers; not needed for a plain torch module

        adopt(result)
    coverage = audit(result)
    if coverage.parameters != parameters:
        raise AssertionError(
            f"the audit counts {coverage.parameters:,}, the model had {parameters:,} parameters: a tie was lost; please report it"
        )
    for step in recipe.steps:  # at the end: one step may do the experts, another the rest
        coverage.check(step.min_expert_share)
    if any(pattern == "*" and scheme is not None for step in recipe.steps for pattern, scheme in step.rules):
        _warn_of_the_rest(result, coverage)
    return Compressed(result, coverage, recipe)


def plan(model: nn.Module, recipe: Recipe) -> list[dict[str, QuantScheme]]:
    """{weight name: scheme} for each step, everything checked and nothing changed.

    Raises ValueError: a pattern that matches no weight or never decides, a group size that does not divide, a router
    or half an expert module selected, a weight selected by two steps, a step that selects nothing, NaN in a parameter.
    """
    every = weights(model)
    taken: set[str] = set()
    steps = []
    for step in recipe.steps:
        match step:
            case Quantize():
                schemes = _plan_quantize(model, every, step)
            case _:
                raise TypeError(f"{step!r} is not a step that compress knows")
        twice = taken & set(schemes)
        if twice:
            raise ValueError(f"two steps of the recipe quantize {sorted(twice)[0]}; give it a scheme in one of them only")
        taken |= set(schemes)
        steps.append(schemes)
    for name, p in model.named_parameters() if steps else ():
        broken = int((~torch.isfinite(p)).sum()) if p.is_floating_point() else 0
        if broken:
            raise ValueError(
                f"{name} holds {broken} NaN or infinite values of {p.numel()}: the checkpoint is broken; load it again or repair it"
            )
    return steps


def audit(model: nn.Module) -> Coverage:
    """What each tensor that `model` stores is and takes, found by walking it: nothing is believed, everything counted."""
    rows = [
        CoverageRow(name, role, q.shape, prod(q.shape), str(q.scheme), q.scheme.nbytes(q.shape), True)
        for name, (role, q) in quantized(model).items()
    ]
    codes = {f"{name}.{b}" for name, m in model.named_modules() if isinstance(m, Quantized) for b in m._buffers}
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
    for i, (pattern, scheme) in enumerate(step.rules):
        if pattern.startswith("@") or scheme is None:
            continue  # a role or an exception may have nothing to say about some architecture; a glob is a name
        hit = [w for w in every if matches(pattern, w.name, w.role)]
        if not hit:
            raise ValueError(f"pattern {pattern!r} matches no weight of this {type(model).__name__}; names look like {_examples(listed)}")
        first = [any(matches(p, w.name, w.role) for p, _ in step.rules[:i]) for w in hit]
        if all(first) and pattern != "*":
            raise ValueError(f"pattern {pattern!r} never decides: earlier rules match all of its {len(hit)} weights; move it up")
    if not schemes:
        patterns = ", ".join(repr(p) for p, _ in step.rules)
        raise ValueError(f"the rules {patterns} quantize nothing in this {type(model).__name__}; names look like {_examples(listed)}")
    for w in listed:
        scheme = schemes.get(w.name)
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
        other = next((o for o in listed if o.module_name == w.module_name and o.name not in schemes), None)
        if other:
            raise ValueError(f"{w.name} gets {scheme} but {other.name} none; both stacks of an expert module are quantized together")
    return schemes


def _quantize(model: nn.Module, schemes: dict[str, QuantScheme], step: Quantize, progress: bool) -> None:
    by_module: dict[str, list[Weight]] = {}
    listed = weights(model)
    swapper = Swapper(model, listed)
    for w in listed:
        if w.name in schemes:
            by_module.setdefault(w.module_name, []).append(w)
    del listed, w
    with tqdm(total=len(schemes), desc=f"quantize ({step.method.name})", unit="weight", disable=not progress) as bar:
        for module_name in list(by_module):  # swapped one module at a time, so that in place the memory falls as it goes
            group, codes = by_module.pop(module_name), {}
            for w in group:
                try:
                    codes[w.name] = round_to_nearest(w.tensor, schemes[w.name], name=w.name)
                except ValueError as error:
                    raise ValueError(f"{w.name}: {error}") from error
                bar.update()
            swapper.put(codes)
    swapper.finish()


def _copy(model: nn.Module, replaced: set[str]) -> nn.Module:
    """A copy of `model` that shares the parameters that will be replaced and owns all others."""
    shared = [model.get_parameter(w.parameter_name) for w in weights(model) if w.name in replaced]
    return copy.deepcopy(model, {id(p): p for p in shared})


def _examples(listed: list[Weight]) -> str:
    picked = dict.fromkeys([w.name for w in listed[:2]] + [w.name for w in listed[-1:]])
    return ", ".join(picked) or "(it has no weights)"
