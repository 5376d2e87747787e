"""`Recipe`: what is done to a model, as data. Ordered frozen steps, JSON round trip, content hash.

    structure   DropExperts, MergeExperts, PruneChannels, PruneHeads, DropLayers    the model itself gets smaller
    zeros       Prune                                                               weights that are zero from then on
    function    Smooth, Rotate                                                      the same function, easier to round
    codes       Quantize                                                            low bits
    learning    Distill, FineTune                                                   quality back
    run time    Route, SkipChannels, SparseAttention, EarlyExit                     weights stay; less is computed

Any order that makes sense is allowed, `compress` says why another does not: what changes floating-point weights comes
before `Quantize`; after it, learning is left with scales, norms and adapters (`train=`).

A `Quantize` step holds rules (pattern, scheme): the first pattern that matches a weight decides; scheme None keeps the
weight as it is, and so does no match at all. A pattern is a shell glob over the weight's name
(`model.layers.0.*`), or `@role`: one of `ROLES`, the same for every architecture.
"""

import hashlib
import json
import operator
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from typing import get_args

from edgelab import html_table
from edgelab.scheme import ActScheme, QuantScheme

RANGES = ("max", "percentile", "mse", "kl", "best")  # how the range of an activation is found

# what a weight is for; model.py assigns one to each
ROLES = ("attention", "mlp", "experts", "shared", "router", "embedding", "head", "linear")


def matches(pattern: str, name: str, role: str) -> bool:
    """Whether `pattern` (`@role` or a glob over names) selects the weight `name` of `role`.

    >>> matches("@experts", "model.layers.1.mlp.experts.down_proj", "experts"), matches("*.o_proj", "x.q_proj", "attention")
    (True, False)
    """
    return role == pattern[1:] if pattern.startswith("@") else fnmatchcase(name, pattern)


# --------------------------------------------------------------------------------------------------- settings in range

# (field, type, least, most) of each class; None: no end. A float is finite in any case
_ABOVE_0 = sys.float_info.min
_SEED = ("seed", int, 0, 2**63 - 1)  # what NumPy's and torch's generators both take
_SETTINGS: dict[str, tuple[tuple[str, type, float | None, float | None], ...]] = {
    "Rtn": (("mse_grid", int, 0, None), ("weighted", bool, None, None)),
    "Hqq": (("p", float, _ABOVE_0, 1), ("beta", float, _ABOVE_0, None), ("kappa", float, 1, None), ("iterations", int, 1, None)),
    "Gptq": (
        ("damping", float, 0, None),
        ("act_order", bool, None, None),
        ("mse_grid", int, 0, None),
        ("rounds", int, 0, None),
        ("sequential", bool, None, None),
    ),
    "AutoRound": (("steps", int, 1, None), ("lr", float, _ABOVE_0, None), ("batch", int, 1, None), _SEED),
    "Qat": (
        ("steps", int, 1, None),
        ("lr", float, _ABOVE_0, None),
        ("scale_lr", float, 0, None),
        ("batch", int, 1, None),
        ("alpha", float, 0, 1),
        ("temperature", float, _ABOVE_0, None),
        _SEED,
    ),
    "Smooth": (("alpha", float, 0, 1), ("grid", int, 1, None), ("pairs", bool, None, None)),
    "Rotate": (_SEED,),
    "DropExperts": (("share", float, 0, 1), _SEED),
    "MergeExperts": (("share", float, 0, 1),),
    "PruneChannels": (("share", float, 0, 1), ("multiple", int, 1, None), _SEED),
    "PruneHeads": (("share", float, 0, 1), _SEED),
    "DropLayers": (("count", int, 1, None),),
    "Prune": (("sparsity", float, 0, 1), ("damping", float, 0, None)),
    "Route": (),
    "SkipChannels": (("share", float, 0, 1),),
    "SparseAttention": (("window", int, 1, None), ("stride", int, 1, None)),
    "EarlyExit": (("after", int, 1, None), ("agreement", float, 0, 1), ("steps", int, 0, None), ("lr", float, _ABOVE_0, None), _SEED),
    "Distill": (
        ("steps", int, 1, None),
        ("lr", float, _ABOVE_0, None),
        ("batch", int, 1, None),
        ("temperature", float, _ABOVE_0, None),
        ("alpha", float, 0, 1),
        ("beta", float, 0, 1),
        ("hidden", float, 0, None),
        ("samples", int, 0, None),
        ("rank", int, 1, None),
        ("patience", int, 0, None),
        _SEED,
    ),
    "FineTune": (
        ("steps", int, 1, None),
        ("lr", float, _ABOVE_0, None),
        ("batch", int, 1, None),
        ("l1", float, 0, None),
        ("rank", int, 1, None),
        ("patience", int, 0, None),
        _SEED,
    ),
}


def _check_settings(step) -> None:
    """Raises ValueError for a setting of `step` that is not of its type and range; leaves plain ints and floats.

    So that equal settings write equal JSON: 1 for a float becomes 1.0, a NumPy integer an int. A bool is no number.
    """
    for name, kind, least, most in _SETTINGS[type(step).__name__]:
        given = getattr(step, name)
        value = _as(kind, given)
        top = (sys.float_info.max if kind is float else None) if most is None else most
        if value is None or (least is not None and value < least) or (top is not None and not value <= top):
            low = "above 0" if least == _ABOVE_0 else f"of at least {least}"
            within = low if most is None else f"{low} and at most {most}"
            if name in ("share", "sparsity") and isinstance(value, Real) and 1 < value <= 100:
                within += f" (a share, not per cent: {value / 100:g}?)"
            rule = {bool: "True or False", int: f"a whole number {within}", float: f"a number {within}"}[kind]
            raise ValueError(f"{name}={given!r} of {type(step).__name__} must be {rule}")
        object.__setattr__(step, name, kind(value))


def _one_of(step, field: str, allowed: tuple[str, ...]) -> None:
    if getattr(step, field) not in allowed:
        raise ValueError(f"{field}={getattr(step, field)!r} of {type(step).__name__} is not known; use one of {', '.join(allowed)}")


def _as(kind: type, given):
    """`given` when it is a bool, an integer (Python's or NumPy's) or a real number, as `kind` says; None for all else."""
    if kind is bool or isinstance(given, bool):
        return given if kind is bool and isinstance(given, bool) else None
    if kind is float:
        return given if isinstance(given, Real) else None
    try:
        return operator.index(given)
    except TypeError:
        return None


# ------------------------------------------------------------------------------------------------ how codes are found


@dataclass(frozen=True)
class Rtn:
    """Round to nearest (`methods/rtn.py`). `mse_grid` n > 0 searches the scale of least squared error among n;
    `weighted`: each weight's error counts as much as its input is large, E[x^2], which takes calibration data."""

    mse_grid: int = 0
    weighted: bool = False
    name = "rtn"
    data_free = property(lambda self: not self.weighted)

    def __post_init__(self) -> None:
        _check_settings(self)


@dataclass(frozen=True)
class Hqq:
    """Half-quadratic quantization (`methods/hqq.py`), for asymmetric schemes; needs no data."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    name = "hqq"
    data_free = True

    def __post_init__(self) -> None:
        _check_settings(self)


@dataclass(frozen=True)
class Gptq:
    """GPTQ (`methods/gptq.py`): what rounding one input's weights costs is made good by those still to come.

    `sequential`: each block is calibrated on the output of the blocks that are quantized already, not on the original's.
    `mse_grid`: as in `Rtn`, for the scales. `rounds` of refinement of scales and codes follow; 0 is the published method.
    """

    damping: float = 0.05
    act_order: bool = True
    mse_grid: int = 32
    rounds: int = 4
    sequential: bool = True
    name = "gptq"
    data_free = False

    def __post_init__(self) -> None:
        _check_settings(self)


@dataclass(frozen=True)
class AutoRound:
    """Rounding learnt by signed gradient descent (`methods/autoround.py`).

    `scope` "block": the squared error of each decoder block's output, block after block (AutoRound). "model": the KL
    divergence of the whole model's next-token distribution to the original's, all blocks together, by Adam instead of signs.
    `start`: where learning begins, "rtn" or "gptq". `batch` counts sequences of the calibration set.
    """

    steps: int = 200
    lr: float = 0.005
    batch: int = 8
    scope: str = "block"
    start: str = "rtn"
    seed: int = 0
    name = "autoround"
    data_free = False

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "scope", ("block", "model"))
        _one_of(self, "start", ("rtn", "gptq"))


@dataclass(frozen=True)
class Qat:
    """Quantization-aware training (`methods/qat.py`): all weights learn while the selected ones compute as rounded.

    `step_size`: "lsq" learns the scales too (arXiv 1902.08153), at `scale_lr` times the rate of the weights; "max" takes
    them from the weights at each step. The gradient goes straight through the rounding (arXiv 1308.3432). Loss: alpha
    T^2 KL(original || rounded) + (1 - alpha) cross entropy, T = `temperature`. `start`: "rtn", or "gptq" for its scales.
    Learns from the training batches; `batch` counts sequences.
    """

    steps: int = 500
    lr: float = 1e-4
    scale_lr: float = 3.0
    batch: int = 8
    step_size: str = "lsq"
    start: str = "rtn"
    alpha: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    name = "qat"
    data_free = False

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "step_size", ("lsq", "max"))
        _one_of(self, "start", ("rtn", "gptq"))


Method = Rtn | Hqq | Gptq | AutoRound | Qat
METHODS: dict[str, type] = {m.name: m for m in (Rtn, Hqq, Gptq, AutoRound, Qat)}


def method_of(given: "Method | str | dict") -> Method:
    """A method with its settings: from itself, its name, or what `to_dict` wrote ({"name": ..., settings}).

    >>> method_of("gptq").damping, method_of({"name": "rtn", "mse_grid": 16})
    (0.05, Rtn(mse_grid=16, weighted=False))
    """
    if isinstance(given, Method):
        return given
    name, settings = (given, {}) if isinstance(given, str) else (given.get("name"), {k: v for k, v in given.items() if k != "name"})
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not known; use one of {', '.join(METHODS)}")
    unknown = set(settings) - {f.name for f in fields(METHODS[name])}
    if unknown:
        known = ", ".join(f.name for f in fields(METHODS[name]))
        raise ValueError(f"method {name!r} has no setting {sorted(unknown)[0]!r}; it has {known}")
    return METHODS[name](**settings)


# ------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Quantize:
    """Store the weights that `rules` select in low bits.

    `method`: one of the above or its name, with its defaults. `activations`: how the inputs of the linear layers and experts
    that this step selects are rounded, or None; `ranges` finds the stored ranges of a static scheme: "max", "percentile",
    "mse", "kl", or "best" (per tensor the one with the least measured effect). `min_expert_share`: the share of expert
    parameters that must really end up quantized; `compress` fails below it.

    `budget`: effective bits per weight, on average over the selected weights; each then gets the one of `choices` with
    which the whole loses least (`sensitivity`, `methods/mixed.py`), and the schemes of the rules only say which weights are
    selected. `per_expert`: each expert of a stack gets its own, in place of one for the stack.
    """

    rules: tuple[tuple[str, QuantScheme | None], ...]
    method: Method | str = "rtn"
    min_expert_share: float = 1.0
    activations: ActScheme | None = None
    ranges: str = "best"
    budget: float | None = None
    choices: tuple[str, ...] = ("int2-g32", "int3-g64", "int3-g32", "int4-g64", "int4-g32", "int8-g64")
    per_expert: bool = False

    def __post_init__(self) -> None:
        try:
            rules = tuple((pattern, scheme) for pattern, scheme in self.rules)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rules={self.rules!r} are no (pattern, scheme) pairs, such as (('*', QuantScheme(4)),)") from error
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "method", method_of(self.method))
        if isinstance(self.activations, str):
            object.__setattr__(self, "activations", ActScheme.parse(self.activations))
        share = self.min_expert_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"min_expert_share={share!r} is no share; give a number from 0 to 1")
        if self.ranges not in RANGES:
            raise ValueError(f"ranges={self.ranges!r} is not known; use one of {', '.join(RANGES)}")
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and 0 < self.budget < float("inf")):
            raise ValueError(f"budget={self.budget!r} is no number of bits per weight; 3.5 is what int3-g32 takes")
        if not isinstance(self.per_expert, bool) or (self.per_expert and self.budget is None):
            raise ValueError(f"per_expert={self.per_expert!r} chooses a scheme for each expert under a budget; give budget=3.5 with it")
        object.__setattr__(self, "choices", tuple(str(QuantScheme.parse(str(c))) for c in self.choices))
        for pattern, scheme in rules:
            if not isinstance(pattern, str):
                raise ValueError(f"pattern={pattern!r} is no text; give a glob such as '*.down_proj', or '@role'")
            if pattern.startswith("@") and pattern[1:] not in ROLES:
                raise ValueError(f"pattern={pattern!r} names no role; roles are {', '.join('@' + r for r in ROLES)}")
            if scheme is not None and not isinstance(scheme, QuantScheme):
                raise ValueError(f"the scheme of pattern {pattern!r} is {scheme!r}; give a QuantScheme or None")

    @property
    def data_free(self) -> bool:
        """Whether the step needs no calibration data."""
        static = self.activations is not None and self.activations.static
        return self.method.data_free and not static and self.budget is None

    def scheme_for(self, name: str, role: str) -> QuantScheme | None:
        """The scheme of the first rule that matches, or None: keep the weight.

        One expert of a stack is `<stack>#<expert>`; a rule for the stack matches it too.
        """
        names = {name, name.partition("#")[0]}
        return next((scheme for pattern, scheme in self.rules if any(matches(pattern, n, role) for n in names)), None)

    def to_dict(self) -> dict:
        rules = [[p, None if s is None else str(s)] for p, s in self.rules]
        settings = {k: v for k, v in asdict(self.method).items() if v != getattr(METHODS[self.method.name](), k)}
        method = {"name": self.method.name, **settings} if settings else self.method.name
        d = {"step": "quantize", "rules": rules, "method": method, "min_expert_share": self.min_expert_share}
        d |= {} if self.activations is None else {"activations": str(self.activations)}
        d |= {"ranges": self.ranges} if self.activations is not None or self.ranges != Quantize.ranges else {}
        d |= {} if self.budget is None else {"budget": self.budget}
        d |= {"per_expert": True} if self.per_expert else {}
        return d | ({"choices": list(self.choices)} if self.budget is not None or self.choices != Quantize.choices else {})

    @classmethod
    def from_dict(cls, d: dict) -> "Quantize":
        """Raises ValueError for missing rules, what is no (pattern, scheme) pair, and unknown settings. The rest has defaults."""
        _refuse_unknown(cls, d)
        if "rules" not in d:
            raise ValueError(f"a quantize step has no 'rules', only {sorted(d)}")
        try:
            rules = tuple((p, None if s is None else QuantScheme.parse(s)) for p, s in d["rules"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"rules {d['rules']!r} of a quantize step can't be read ({error}); write pairs: [['*', 'int4-g32']]"
            ) from error
        return cls(rules, **{k: v for k, v in d.items() if k not in ("step", "rules")})


def _plain_dict(step) -> dict:
    """A step whose settings are plain numbers and texts as data: its class' name as in `_STEPS`, then its settings."""
    return {"step": _name_of(type(step)), **asdict(step)}


def _name_of(cls: type | str) -> str:
    """`DropExperts` -> "drop_experts"."""
    name = cls if isinstance(cls, str) else cls.__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


@dataclass(frozen=True)
class Smooth:
    """Divide the inputs of the linears behind each norm by a scale per channel, and multiply their weights by it.

    "smoothquant": max|x|^alpha / max|w|^(1 - alpha) (arXiv 2211.10438, equation 4). "awq": mean|x|^a, with the a of
    `grid` that leaves the least error after rounding as the next `Quantize` step says (arXiv 2306.00978, equation 5).
    `alpha`: from 0 (all stays in the activations) to 1 (all goes into the weights).
    `pairs`: smoothquant also moves scale between up and down, and between values and output, as awq always does.
    """

    method: str = "smoothquant"
    alpha: float = 0.5
    grid: int = 20
    pairs: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("smoothquant", "awq"):
            raise ValueError(f"method={self.method!r} of a Smooth step is not known; use 'smoothquant' or 'awq'")
        _check_settings(self)

    to_dict = _plain_dict


@dataclass(frozen=True)
class Rotate:
    """Turn the residual stream (and each head's values) by a random orthogonal matrix made of Hadamard's, folded into the
    weights: outliers of single channels spread over all (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406)."""

    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)

    to_dict = _plain_dict


# ---------------------------------------------------------------------------------------------------------- structure


@dataclass(frozen=True)
class DropExperts:
    """Take `share` of the experts out of each mixture (as many of each layer, rounded to whole experts; never below top-k).

    `method` says which go, those with the least: "reap" mean over routed tokens of gate times output norm
    (github.com/CerebrasResearch/reap), "gate_mass" sum of gates, "frequency" tokens; "naee": the subset that rebuilds the
    layer's output best (arXiv 2402.14800); "random" by `seed`. The router loses their rows and renormalises over the rest.
    """

    share: float = 0.5
    method: str = "reap"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "method", ("reap", "gate_mass", "frequency", "naee", "random"))

    @property
    def data_free(self) -> bool:
        return self.method == "random"

    to_dict = _plain_dict


@dataclass(frozen=True)
class MergeExperts:
    """Leave 1 - `share` of the experts in each mixture: alike ones are averaged, weighted by how often they are used.

    `method`: "outputs" clusters by mean output on the calibration data, average linkage (HC-SMoE, arXiv 2410.08589);
    "router" groups around the most used experts by the likeness of router logits (M-SMoE, arXiv 2310.01334). The members of
    a cluster are one expert afterwards. Unlike in those papers, whose routers keep every row, the router keeps only the row of the
    member that was used most: the result is an ordinary mixture that any runtime loads, and loses more (`expert_steps.merge`).
    """

    share: float = 0.5
    method: str = "outputs"

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "method", ("outputs", "router"))

    to_dict = _plain_dict


@dataclass(frozen=True)
class PruneChannels:
    """Take `share` of the inner channels out of every feed-forward layer: rows of gate and up with the column of down.

    `method`: "activation" least E[h^2] |down column|^2 (what the output loses), "magnitude" least norms of the three,
    "random". Experts each lose their own channels. `multiple`: what remains is a multiple of it, so that groups of scales fit.
    """

    share: float = 0.3
    method: str = "activation"
    multiple: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "method", ("activation", "magnitude", "random"))

    @property
    def data_free(self) -> bool:
        return self.method != "activation"

    to_dict = _plain_dict


@dataclass(frozen=True)
class PruneHeads:
    """Take `share` of the attention heads out of each layer; of grouped-query attention whole groups: keys, values and their queries.

    `method`: "activation" least E[|output of the head|^2] after o_proj, "magnitude", "random".
    """

    share: float = 0.25
    method: str = "activation"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "method", ("activation", "magnitude", "random"))

    @property
    def data_free(self) -> bool:
        return self.method != "activation"

    to_dict = _plain_dict


@dataclass(frozen=True)
class DropLayers:
    """Take out the `count` decoder blocks that change the hidden states least: block influence 1 - E[cos(in, out)] (ShortGPT,
    arXiv 2403.03853)."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_settings(self)

    to_dict = _plain_dict


# -------------------------------------------------------------------------------------------------------------- zeros

_BODY = ("@attention", "@mlp", "@experts", "@shared", "@linear")


@dataclass(frozen=True)
class Prune:
    """Set weights to zero; whatever comes later keeps them there.

    `sparsity`: the share that becomes zero. `pattern`: "unstructured", or "n:m" such as "2:4": n of every m inputs stay.
    `method`: "magnitude"; "wanda" |w| |x|_2 compared within a row (arXiv 2306.11695); "sparsegpt" w^2 / [H^-1]_jj, and the
    others make good what is lost (arXiv 2301.00774). `schedule`: "uniform" in each weight, "global" one threshold for all
    (magnitude, wanda), "sensitivity" more where a scan says that it costs less. `threshold`: all |w| below it, instead of a
    share. `select`: patterns of the weights that are pruned.
    """

    sparsity: float = 0.5
    method: str = "wanda"
    pattern: str = "unstructured"
    schedule: str = "uniform"
    threshold: float | None = None
    select: tuple[str, ...] = _BODY
    damping: float = 0.01

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "method", ("magnitude", "wanda", "sparsegpt"))
        _one_of(self, "schedule", ("uniform", "global", "sensitivity"))
        if not isinstance(self.select, str | Iterable):
            raise ValueError(f"select={self.select!r} of Prune is no pattern; give some such as '@mlp' or '*.down_proj'")
        object.__setattr__(self, "select", tuple((self.select,) if isinstance(self.select, str) else self.select))
        if self.pattern != "unstructured":
            n, _, m = str(self.pattern).partition(":")
            if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
                raise ValueError(f"pattern={self.pattern!r} of Prune is not known; use 'unstructured', or 'n:m' such as '2:4'")
            if self.sparsity not in (0.5, 1 - int(n) / int(m)):  # 0.5: nothing was said
                raise ValueError(f"sparsity={self.sparsity} contradicts pattern={self.pattern!r}, which is {1 - int(n) / int(m):g}")
            if self.schedule != "uniform":
                raise ValueError(f"pattern={self.pattern!r} leaves as many weights everywhere; schedule={self.schedule!r} has no choice")
            object.__setattr__(self, "sparsity", 1 - int(n) / int(m))
        if self.threshold is not None:
            bad = isinstance(self.threshold, bool) or not isinstance(self.threshold, Real) or not 0 <= self.threshold < float("inf")
            if bad or self.method != "magnitude" or self.pattern != "unstructured" or self.schedule != "uniform":
                raise ValueError(
                    f"threshold={self.threshold!r} is a magnitude of at least 0 below which weights go; it takes method='magnitude'"
                )
        if self.schedule == "global" and self.method == "sparsegpt":
            raise ValueError("schedule='global' compares all weights; sparsegpt chooses as it goes: use 'uniform' or 'sensitivity'")
        _check_patterns(self.select)

    @property
    def data_free(self) -> bool:
        return self.method == "magnitude" and self.schedule != "sensitivity"

    def to_dict(self) -> dict:
        return {"step": "prune", **asdict(self), "select": list(self.select)}


def _check_patterns(patterns: tuple[str, ...]) -> None:
    if not patterns:
        raise ValueError("select=() selects nothing; give patterns such as '@mlp' or '*.down_proj'")
    for pattern in patterns:
        if not isinstance(pattern, str) or (pattern.startswith("@") and pattern[1:] not in ROLES):
            raise ValueError(f"pattern={pattern!r} is no glob and no role; roles are {', '.join('@' + r for r in ROLES)}")


# ------------------------------------------------------------------------------------------------------------ run time


@dataclass(frozen=True)
class Route:
    """How many experts a token gets. `top_k`: another number than the model was trained with.

    `top_p`: the fewest experts whose gates reach this share of all gates, at most top_k (arXiv 2403.07652). `skip`: beta; an
    expert whose gate is below beta times the first one's is left out (arXiv 2402.14800, section 3.3). Gates are normalised
    over those that stay, if the router normalises.
    """

    top_k: int | None = None
    top_p: float | None = None
    skip: float | None = None
    data_free = True

    def __post_init__(self) -> None:
        if (self.top_k, self.top_p, self.skip) == (None, None, None):
            raise ValueError("Route() changes nothing; give top_k, top_p or skip")
        if self.top_k is not None:
            top_k = _as(int, self.top_k)
            if top_k is None or top_k < 1:
                raise ValueError(f"top_k={self.top_k!r} of Route must be a whole number of at least 1")
            object.__setattr__(self, "top_k", top_k)
        for field in ("top_p", "skip"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1):
                raise ValueError(f"{field}={value!r} of Route must be above 0 and at most 1")

    def to_dict(self) -> dict:
        return {"step": "route", **{k: v for k, v in asdict(self).items() if v is not None}}


@dataclass(frozen=True)
class SkipChannels:
    """Dynamic channel pruning: for each token, the `share` of a feed-forward layer's inner channels with the least |h| is left
    out of the down product (all channels for another token may be others)."""

    share: float = 0.5
    data_free = True

    def __post_init__(self) -> None:
        _check_settings(self)

    to_dict = _plain_dict


@dataclass(frozen=True)
class SparseAttention:
    """A token attends to the last `window` tokens and to every `stride`-th of all before (local + strided, arXiv 1904.10509)."""

    window: int = 32
    stride: int = 16
    data_free = True

    def __post_init__(self) -> None:
        _check_settings(self)

    to_dict = _plain_dict


@dataclass(frozen=True)
class EarlyExit:
    """An exit behind block `after` (1 is the first): where its own prediction is confident enough, the deeper blocks are left out.

    The exit is a norm and a square matrix before the model's own head, learnt in `steps` from the whole model's predictions
    on the calibration data, half of which is held back: there the confidence is chosen at which at least `agreement` of the
    tokens that leave early get the token that the whole model gives (CALM, arXiv 2207.07061).
    """

    after: int = 2
    agreement: float = 0.98
    steps: int = 200
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)

    to_dict = _plain_dict


# ------------------------------------------------------------------------------------------------------------ learning

_TRAIN = ("all", "lora", "scales", "norms")


@dataclass(frozen=True)
class Distill:
    """Learn from the teacher's next-token distributions: alpha T^2 D(teacher, student) + (1 - alpha) cross entropy.

    `loss`, D: "forward" KL(teacher || student) (arXiv 1503.02531), "reverse", "jsd" the generalised Jensen-Shannon divergence
    with `beta` (GKD, arXiv 2306.13649), "skew" KL(teacher || beta teacher + (1 - beta) student) (DistiLLM, arXiv 2402.03898).
    `hidden`: weight of the mean squared error between hidden states, layers mapped evenly. `samples` > 0: the teacher's
    distribution stands as so many tokens drawn from it, read once and kept (arXiv 2503.16870).

    `train`: "all" floating-point weights, "lora" adapters of `rank` (arXiv 2106.09685), "scales" those of the codes and the
    norms (after Quantize; EfficientQAT, arXiv 2407.11062), "norms". `patience`: stop after so many judgements without gain,
    0: never; the best state is kept. The teacher is the model that `compress` was given, or `teacher=`.
    """

    steps: int = 500
    lr: float = 1e-3
    batch: int = 8
    loss: str = "forward"
    temperature: float = 1.0
    alpha: float = 1.0
    beta: float = 0.1
    hidden: float = 0.0
    samples: int = 0
    train: str = "all"
    rank: int = 8
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "loss", ("forward", "reverse", "jsd", "skew"))
        _one_of(self, "train", _TRAIN)
        if self.samples and (self.loss != "forward" or self.temperature != 1):
            raise ValueError(
                f"samples={self.samples}: tokens drawn from the teacher stand for the forward loss at temperature 1, not for "
                f"loss={self.loss!r} at {self.temperature:g}; give samples=0, which reads the teacher at each step"
            )

    to_dict = _plain_dict


@dataclass(frozen=True)
class FineTune:
    """Learn from the text alone: cross entropy on the training batches. `l1`: weight of mean |w| of the matrices, which drives
    small weights to zero for `Prune(threshold=...)`. The other settings as in `Distill`."""

    steps: int = 500
    lr: float = 1e-3
    batch: int = 8
    l1: float = 0.0
    train: str = "all"
    rank: int = 8
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)
        _one_of(self, "train", _TRAIN)

    to_dict = _plain_dict


def _refuse_unknown(cls: type, d: dict) -> None:
    known = [f.name for f in fields(cls)]
    unknown = set(d) - {"step", *known}
    if unknown:
        raise ValueError(f"a {_name_of(cls)} step has no setting {sorted(unknown)[0]!r}; it has {', '.join(known)}")


def _plain_step(cls: type):
    """Reads a step whose settings are plain numbers and texts."""

    def read(d: dict):
        _refuse_unknown(cls, d)
        return cls(**{k: v for k, v in d.items() if k != "step"})

    return read


Structure = DropExperts | MergeExperts | PruneChannels | PruneHeads | DropLayers
RunTime = Route | SkipChannels | SparseAttention | EarlyExit
Learning = Distill | FineTune
Step = Quantize | Smooth | Rotate | Prune | Structure | RunTime | Learning
_STEPS = {"quantize": Quantize.from_dict} | {_name_of(cls): _plain_step(cls) for cls in get_args(Step) if cls is not Quantize}


def step_of(d: dict) -> Step:
    """The step that `to_dict` wrote. Raises ValueError for one that this version does not know."""
    kind = d.get("step") if isinstance(d, dict) else d
    if not isinstance(kind, str) or kind not in _STEPS:
        named = _name_of(kind) if isinstance(kind, str) else ""  # "DropExperts" as Python calls it, or a slip
        near = next(iter(get_close_matches(named, _STEPS, 1, 0.7)), None)
        hint = f"; did you mean {near!r}?" if near else "; 'qat' is a method of a quantize step" if named == "qat" else ""
        raise ValueError(f"step {kind!r} is not one of {', '.join(_STEPS)}{hint}")
    if not isinstance(d, dict):
        raise ValueError(f"the step {kind!r} stands alone; write it with its settings, at least {{'step': {kind!r}}}")
    return _STEPS[kind](d)


@dataclass(frozen=True)
class Recipe:
    """Ordered steps. `Recipe()` changes nothing.

    >>> r = Recipe.uniform("int4-g32")
    >>> Recipe.from_json(r.to_json()) == r
    True
    >>> r.steps[0].scheme_for("model.layers.0.mlp.down_proj", "mlp")
    QuantScheme(bits=4, granularity=PerGroup(size=32), codebook='int')
    """

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, str) or not isinstance(self.steps, Iterable):
            raise ValueError(f"steps={self.steps!r} of a Recipe is no tuple of steps; write Recipe(({self.steps!r},)) for one")
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            if not isinstance(step, Step):
                said = "a method of Quantize, not a step: Quantize(rules, method=Qat())" if isinstance(step, Qat) else "no step"
                said = f"a class; write {step.__name__}()" if isinstance(step, type) else said
                raise ValueError(f"{step!r} in a Recipe is {said}; steps are {', '.join(t.__name__ for t in get_args(Step))}")

    @classmethod
    def body(cls, scheme: QuantScheme | str, *, before: tuple[Step, ...] = (), **settings) -> "Recipe":
        """One scheme for the weights of the decoder blocks; embedding, head and routers stay: what papers' tables compare.

        `before`: steps that come first, such as (Rotate(), Smooth()).
        """
        scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
        rules = (("@router", None), ("@embedding", None), ("@head", None), ("*", scheme))
        return cls((*before, Quantize(rules, **settings)))

    @classmethod
    def uniform(cls, scheme: QuantScheme | str, *, embedding: QuantScheme | str | None = "same", **settings) -> "Recipe":
        """One scheme for every weight; routers stay as they are. `embedding`: another scheme, or None to keep it."""
        scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
        if embedding == "same":
            embedding = scheme
        elif isinstance(embedding, str):
            embedding = QuantScheme.parse(embedding)
        return cls((Quantize((("@router", None), ("@embedding", embedding), ("*", scheme)), **settings),))

    @classmethod
    def phone(cls, *, bits: float = 2.85, steps: int = 1000, scale_steps: int = 400) -> "Recipe":
        """The recipe of the house: a mixture of experts at least 8 times smaller than in 16 bits, doing the same tasks.

        REAP drops half of the experts, the rest learns from the original in `steps`, GPTQ spends `bits` effective bits per weight,
        embedding and head included, where the Fisher estimate says that they count, and the scales learn from the original
        in `scale_steps`. Minutes on two cores for the embedded model; it takes calibration and training data.
        """
        rules = (("@router", None), ("*", QuantScheme.parse("int4-g32")))
        choices = ("int2-g32", "int2-g64", *Quantize.choices[1:])
        return cls(
            (
                DropExperts(0.5, method="reap"),
                Distill(steps=steps, lr=1e-3, batch=8),
                Quantize(rules, method="gptq", budget=bits, choices=choices),
                Distill(steps=scale_steps, lr=3e-3, batch=8, train="scales"),
            )
        )

    @property
    def data_free(self) -> bool:
        """Whether no step needs data, to calibrate on or to learn from."""
        return all(isinstance(s, Rotate) or getattr(s, "data_free", False) for s in self.steps)

    @property
    def learns(self) -> bool:
        """Whether a step needs training data."""
        return any(isinstance(s, Learning) or (isinstance(s, Quantize) and isinstance(s.method, Qat)) for s in self.steps)

    def to_json(self) -> str:
        return json.dumps({"format": 1, "steps": [s.to_dict() for s in self.steps]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Raises ValueError for a step or a format that this version does not know."""
        d = json.loads(text)
        version = d.get("format") if isinstance(d, dict) else None
        if isinstance(d, dict) and "format" not in d:
            raise ValueError('the recipe lacks "format": 1')
        if version != 1:
            raise ValueError(f"recipe format {version!r} is not 1: it was written by another edgelab")
        steps = d.get("steps")
        if not isinstance(steps, list):
            raise ValueError(f"the recipe has no list of 'steps', only {sorted(d)}")
        return cls(tuple(step_of(s) for s in steps))

    def __repr__(self) -> str:
        """The steps in a line, with the settings that are not defaults; `to_json` keeps all of them.

        >>> Recipe((Prune(0.5), *Recipe.body("int4-g32", method="gptq").steps))
        Recipe(Prune(sparsity 0.5), Quantize(@router: kept, @embedding: kept, @head: kept, *: int4-g32, method gptq))
        """
        steps = (f"{type(step).__name__}({', '.join(_settings(step))})" for step in self.steps)
        return f"Recipe({', '.join(steps)})"

    def table(self) -> list[dict[str, str]]:
        """A line per step, in order, as text: what it is, its settings where they are not the defaults, what data it needs.

        >>> Recipe.uniform("int4-g32").table()[0]["settings"]
        '@router: kept, @embedding: int4-g32, *: int4-g32'
        """
        return [
            {
                "step": str(i),
                "what": type(step).__name__,
                "settings": ", ".join(_settings(step)) or "defaults",
                "needs": "training text" if Recipe((step,)).learns else "nothing" if Recipe((step,)).data_free else "calibration text",
            }
            for i, step in enumerate(self.steps, 1)
        ]

    def _repr_html_(self) -> str:
        count = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}" if self.steps else "no steps: the model stays as it is"
        return html_table.lines(self.table(), f"Recipe {self.digest}: {count}")

    @property
    def digest(self) -> str:
        """Twelve hex digits of the recipe's content: equal recipes, equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def _settings(step: "Step | Method") -> Iterator[str]:
    """As people write them: a step's first setting (what it is about), and those of it or of a method that are not the defaults."""
    for i, f in enumerate(fields(step)):
        value = getattr(step, f.name)
        if f.name == "rules":
            yield from (f"{pattern}: {'kept' if scheme is None else scheme}" for pattern, scheme in value)
        elif isinstance(value, Method):
            said = " ".join((type(value).__name__.lower(), *_settings(value)))
            if said != f.default:
                yield f"{f.name} {said}"
        elif value != f.default or (i == 0 and not isinstance(step, Method)):
            yield f"{f.name} {value}"
