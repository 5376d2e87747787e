"""The space of a sweep: one `Configuration` is one way to make one model smaller, and says by which recipe.

Eight axes. Three change what the model is, two what is zero, three what is stored:

    model       edge-moe, edge-dense, or edge-phone: the student that learnt from edge-moe, in floating point again
    experts     of each mixture so many stay, chosen by REAP or by how often they were used; `top_k` of them per token
    channels    share of the inner channels that every feed-forward of a dense model loses
    sparsity    share of the body's weights that Wanda sets to zero: anywhere, or two of every four (2:4)
    method      fp (bfloat16), rtn, mse (rtn with the scale of least squared error), hqq, gptq
    scheme      bits, weights per scale, codebook: as `QuantScheme` writes them
    ends        another scheme for embedding and head; "" the same as for all

Not every combination means something. HQQ fits an offset, so it takes the uint schemes, and what has been set to zero must stay zero,
so it takes no pruned model; the student is one (three of ten of its weights are exact zeros of two-bit codes). `space()` is a choice
among the others: every structure with a short list of schemes, six structures with the long one. Its order makes each beginning of
it a sweep of its own: the three models and a few schemes first, then six structures in full, then the others without data, and at last
what GPTQ and HQQ make of those.

`Protocol` is what all configurations of a sweep have in common: the text and how it is read.

A structure (experts, channels, top-k, zeros) is a prefix of the recipe: all schemes on it share what it costs.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from edgelab.paths import data_dir
from edgelab.recipe import DropExperts, Gptq, Hqq, Method, Prune, PruneChannels, Quantize, Recipe, Route, Rtn, Step
from edgelab.scheme import PerChannel, PerGroup, QuantScheme


class Facts(NamedTuple):
    """What a model has: experts per mixture and how many a token takes (0: it is dense); whether zeros are in it already."""

    experts: int
    top_k: int
    zeros: bool = False


MODELS = {"edge-moe": Facts(16, 2), "edge-dense": Facts(0, 0), "edge-phone": Facts(8, 2, zeros=True)}
METHODS: dict[str, Method | None] = {
    "fp": None,
    "rtn": Rtn(),
    "mse": Rtn(mse_grid=8),
    "hqq": Hqq(iterations=10),
    # not sequential and as published, without rounds of refinement: one set of statistics serves all schemes on a structure
    "gptq": Gptq(sequential=False, mse_grid=8, rounds=0),
}
KEPT_BY = ("reap", "frequency")
FP = "fp"
ENDS = "int8-g32"
VERSION = 1  # of what a row says: one more whenever the same configuration would give other figures
TEACHERS = {"edge-phone": "edge-moe"}  # KL divergence is to the model's own original, but for a student
TEXT, ANSWERS = ("prose", "code"), ("assistant", "arithmetic")
METRICS = ("kld", "bits_per_byte", "em_assistant", "em_arithmetic")
_MULTIPLE = 64  # channels that stay: groups of 64 still divide them


@dataclass(frozen=True)
class Protocol:
    """How all configurations of a sweep are measured.

    `docs` (domain, how many documents); `longest`: tokens of one without an answer; `models`: the folder that holds the models, None
    for the embedded ones.
    """

    docs: tuple[tuple[str, int], ...] = (("prose", 12), ("code", 12), ("assistant", 80), ("arithmetic", 100))
    longest: int = 160
    calibration_tokens: int = 8192
    context: int = 512
    resamples: int = 2000
    seed: int = 0
    models: str | None = None

    def __post_init__(self) -> None:
        missing = {*TEXT, *ANSWERS} - {domain for domain, n in self.docs if n >= 1}
        if missing or len(self.docs) != len(TEXT + ANSWERS):
            raise ValueError(f"docs={self.docs} must give at least one document of each of {', '.join(TEXT + ANSWERS)}")

    @property
    def folder(self) -> Path:
        return data_dir() if self.models is None else Path(self.models)


@dataclass(frozen=True)
class Configuration:
    """One point of the space. `experts` and `top_k` are what the model has afterwards, 0 for a dense one.

    Raises ValueError for a value that is none and for combinations that no recipe can make.

    >>> c = Configuration("edge-moe", "gptq", "int4-g32", experts=12, kept_by="reap", top_k=1)
    >>> c.label
    'moe gptq int4-g32, 12 of 16 experts by reap, top-1'
    >>> Configuration.from_json(c.to_json()) == c
    True
    """

    model: str
    method: str = FP
    scheme: str = FP
    experts: int = -1  # -1: all that the model has
    kept_by: str = ""
    top_k: int = -1
    channels: float = 0.0
    sparsity: float = 0.0
    pattern: str = ""
    ends: str = ""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r} is not one of {', '.join(MODELS)}")
        has = MODELS[self.model]
        object.__setattr__(self, "experts", has.experts if self.experts == -1 else self.experts)
        object.__setattr__(self, "top_k", has.top_k if self.top_k == -1 else self.top_k)
        object.__setattr__(self, "channels", float(self.channels))
        object.__setattr__(self, "sparsity", float(self.sparsity))
        self._check_structure(has)
        self._check_codes(has)

    def _check_structure(self, has: Facts) -> None:
        if not has.experts and (self.experts or self.top_k or self.kept_by):
            raise ValueError(f"experts={self.experts}, top_k={self.top_k}: {self.model} is dense; give 0 or leave them out")
        if has.experts and not 1 <= self.top_k <= min(has.top_k, self.experts):
            raise ValueError(f"top_k={self.top_k} must be 1 .. {has.top_k}, and at most experts={self.experts}")
        if has.experts and not 1 <= self.experts <= has.experts:
            raise ValueError(f"experts={self.experts} must be 1 .. {has.experts} of {self.model}")
        if (self.kept_by in KEPT_BY) != (self.experts < has.experts) or self.kept_by not in ("", *KEPT_BY):
            raise ValueError(f"kept_by={self.kept_by!r} says who chose {self.experts} of {has.experts} experts: {', '.join(KEPT_BY)}")
        if not 0 <= self.channels < 1 or (self.channels and has.experts):
            raise ValueError(f"channels={self.channels} is a share below 1 that a dense model loses; {self.model} takes 0")
        if not 0 <= self.sparsity < 1 or (self.pattern not in ("", "unstructured", "2:4")) or bool(self.pattern) != (self.sparsity > 0):
            raise ValueError(f"sparsity={self.sparsity}, pattern={self.pattern!r}: give 0 and '', or a share with 'unstructured' or '2:4'")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"sparsity={self.sparsity} contradicts pattern='2:4', which is 0.5")

    def _check_codes(self, has: Facts) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not one of {', '.join(METHODS)}")
        if (self.method == FP) != (self.scheme == FP) or (self.method == FP and self.ends):
            raise ValueError(f"method={self.method!r} with scheme={self.scheme!r}, ends={self.ends!r}: 'fp' stands alone in both")
        for text in (self.scheme, self.ends):
            scheme = None if text in (FP, "") else QuantScheme.parse(text)
            if scheme and scheme.asymmetric and (has.zeros or self.sparsity):
                raise ValueError(f"{text} has no exact zero for the zeros of this model; use int{scheme.bits}-{scheme.granularity}")
            if scheme and (self.method == "hqq") != scheme.asymmetric:
                raise ValueError(f"method={self.method!r} with {text}: hqq takes the uint schemes, here it alone does")

    @property
    def label(self) -> str:
        """Short, for people."""
        has, parts = MODELS[self.model], [f"{self.model.removeprefix('edge-')} {self.method}"]
        parts[0] += "" if self.scheme == FP else f" {self.scheme}"
        if self.ends:
            parts.append(f"ends {self.ends}")
        if self.experts < has.experts:
            parts.append(f"{self.experts} of {has.experts} experts by {self.kept_by}")
        if self.top_k < has.top_k:
            parts.append(f"top-{self.top_k}")
        if self.channels:
            parts.append(f"{self.channels:.0%} of channels cut")
        if self.sparsity:
            parts.append("2:4 zeros" if self.pattern == "2:4" else f"{self.sparsity:.0%} zeros")
        return ", ".join(parts)

    @property
    def prefix(self) -> tuple[Step, ...]:
        """The steps that change what the model is and what in it is zero, in the order of the recipe."""
        has, steps = MODELS[self.model], []
        if self.experts < has.experts:
            steps.append(DropExperts(1 - self.experts / has.experts, method=self.kept_by))
        if self.channels:
            steps.append(PruneChannels(self.channels, multiple=_MULTIPLE))
        if self.top_k < has.top_k:
            steps.append(Route(top_k=self.top_k))
        if self.sparsity:
            steps.append(Prune(self.sparsity, method="wanda", pattern=self.pattern))
        return tuple(steps)

    @property
    def quantize(self) -> Quantize | None:
        """The last step; None in floating point."""
        if self.method == FP:
            return None
        scheme = QuantScheme.parse(self.scheme)
        ends = QuantScheme.parse(self.ends) if self.ends else scheme
        rules = (("@router", None), ("@embedding", ends), ("@head", ends), ("*", scheme))
        return Quantize(rules, method=METHODS[self.method])

    @property
    def recipe(self) -> Recipe:
        """What `compress` needs to make it, of a model in floating point."""
        return Recipe((*self.prefix, *([self.quantize] if self.quantize else [])))

    @property
    def bits(self) -> float:
        """Of a code, or 16."""
        return 16.0 if self.method == FP else float(QuantScheme.parse(self.scheme).bits)

    @property
    def group(self) -> int:
        """Weights per scale; 0 a whole row, -1 no scale."""
        if self.method == FP:
            return -1
        found = QuantScheme.parse(self.scheme).granularity
        return found.size if isinstance(found, PerGroup) else 0 if isinstance(found, PerChannel) else -1

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, with what the recipe's methods are set to (a changed default is another run)."""
        step = self.quantize
        settings = {"recipe": [s.to_dict() for s in (*self.prefix, *([step] if step else []))]}
        return json.dumps(asdict(self) | settings, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Configuration":
        """Raises ValueError for text that `to_json` did not write."""
        try:
            found = json.loads(text)
            return cls(**{f.name: found[f.name] for f in fields(cls)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{text[:80]!r} is no configuration: {error}") from error


# -------------------------------------------------------------------------------------------------------------- the grid

_FEW = [("fp", "fp"), *(("rtn", f"int{b}-g32") for b in (8, 4, 3, 2)), ("mse", "int4-row"), ("mse", "int3-g32"), ("rtn", "nf4-g32")]
_FEW += [("gptq", "int4-g32"), ("gptq", "int3-g32"), ("gptq", "int2-g32"), ("hqq", "uint3-g32")]
_SHORT = [("fp", "fp"), *(("rtn", s) for s in "int8-row int8-g32 int4-row int4-g64 int4-g32 int3-g32 nf4-g32 mxfp4-g32".split())]  # noqa: SIM905
_SHORT += [("mse", s) for s in "int4-row int4-g32 int3-g64 int3-g32 int2-g32".split()]  # noqa: SIM905
_SHORT_LATE = [("gptq", s) for s in "int4-g32 int3-g64 int3-g32 int2-g32".split()]  # noqa: SIM905
_SHORT_LATE += [("hqq", s) for s in "uint4-g64 uint3-g32 uint2-g32".split()]  # noqa: SIM905
_GRAINS = ("g32", "g64", "row")
_LONG = [("rtn", f"int{b}-{g}") for b in (8, 4, 3, 2) for g in _GRAINS] + [("rtn", f"{c}4-{g}") for c in ("nf", "fp") for g in _GRAINS]
_LONG += [("rtn", "mxfp4-g32"), *(("mse", f"int{b}-{g}") for b in (4, 3, 2) for g in _GRAINS), ("mse", "nf4-g32"), ("mse", "nf4-g64")]
_LONG_LATE = [("gptq", f"int{b}-{g}") for b in (4, 3, 2) for g in _GRAINS] + [("gptq", "nf4-g64"), ("gptq", "mxfp4-g32")]
_LONG_LATE += [("hqq", f"uint{b}-{g}") for b in (4, 3, 2) for g in _GRAINS]
_MIXED, _MIXED_LATE = [("mse", "int3-g32"), ("mse", "int2-g32")], [("gptq", "int3-g32"), ("gptq", "int2-g32")]  # with other ends

_ZEROS = (*({"sparsity": s, "pattern": "unstructured"} for s in (0.25, 0.5)), {"sparsity": 0.5, "pattern": "2:4"})


def structures() -> list[dict]:
    """The fields of each structure of the grid, those that matter most first."""
    found = [{"model": m} for m in MODELS]
    found += [{"model": "edge-moe", "experts": n, "kept_by": "reap"} for n in (12, 8)]
    found += [{"model": "edge-dense", "channels": 0.2}]
    found += [{"model": "edge-moe", "top_k": 1}, *({"model": "edge-moe", "top_k": 1, "experts": n, "kept_by": "reap"} for n in (12, 8))]
    found += [{"model": "edge-dense", "channels": c} for c in (0.1, 0.3, 0.4, 0.5)]
    found += [{"model": "edge-phone", "top_k": 1}, {"model": "edge-phone", "experts": 6, "kept_by": "reap"}]
    found += [{"model": m} | z for z in _ZEROS for m in MODELS]
    found += [{"model": "edge-moe", "experts": n, "kept_by": "frequency"} for n in (12, 8)]
    found += [{"model": "edge-moe", "experts": n, "kept_by": "reap"} | z for n in (12, 8) for z in _ZEROS]
    found += [{"model": "edge-dense", "channels": c} | z for c in (0.2, 0.3, 0.5) for z in _ZEROS]
    found += [{"model": "edge-phone", "experts": n, "top_k": k, "kept_by": "reap"} for n, k in ((6, 1), (4, 2))]
    found += [{"model": "edge-moe", "top_k": 1} | z for z in _ZEROS]
    found += [{"model": "edge-moe", "top_k": 1, "experts": n, "kept_by": "frequency"} for n in (12, 8)]
    found += [{"model": "edge-phone", "experts": 6, "kept_by": "reap"} | z for z in _ZEROS[1:]]
    return found + [{"model": "edge-dense", "channels": c} | z for c in (0.1, 0.4) for z in _ZEROS]


def space() -> list[Configuration]:
    """All configurations of the grid, each once, in the order in which they are measured."""
    places = structures()
    known: dict[Configuration, None] = {}

    def take(chosen: list[dict], *lists: list[tuple[str, str]], mixed: list[tuple[str, str]]) -> None:
        for place in chosen:
            pruned = MODELS[place["model"]].zeros or "sparsity" in place
            points = [(m, s, "") for some in lists for m, s in some] + [(m, s, ENDS) for m, s in mixed]
            for method, scheme, ends in points:
                if not (pruned and method == "hqq"):
                    known[Configuration(method=method, scheme=scheme, ends=ends, **place)] = None

    take(places[:3], _FEW, mixed=[])
    take(places[:6], _SHORT, _LONG, mixed=_MIXED)
    take(places[:6], _SHORT_LATE, _LONG_LATE, mixed=_MIXED_LATE)
    for part in (places[6:-6], places[-6:]):
        take(part, _SHORT, mixed=_MIXED)
        take(part, _SHORT_LATE, mixed=[])
    return list(known)
