"""`Recipe`: what is done to a model, as data. Ordered frozen steps, JSON round trip, content hash.

A `Quantize` step holds rules (pattern, scheme): the first pattern that matches a weight decides; scheme None keeps the
weight as it is, and so does no match at all. A pattern is a shell glob over the weight's name
(`model.layers.0.*`), or `@role`: one of `ROLES`, the same for every architecture.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from edgelab.scheme import QuantScheme

# what a weight is for; model.py assigns one to each
ROLES = ("attention", "mlp", "experts", "shared", "router", "embedding", "head", "linear")


def matches(pattern: str, name: str, role: str) -> bool:
    """Whether `pattern` (`@role` or a glob over names) selects the weight `name` of `role`.

    >>> matches("@experts", "model.layers.1.mlp.experts.down_proj", "experts"), matches("*.o_proj", "x.q_proj", "attention")
    (True, False)
    """
    return role == pattern[1:] if pattern.startswith("@") else fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Quantize:
    """Store the weights that `rules` select in low bits.

    `method`: "rtn" (round to nearest). `min_expert_share`: the share of expert parameters that must really end up
    quantized; `compress` fails below it.
    """

    rules: tuple[tuple[str, QuantScheme | None], ...]
    method: str = "rtn"
    min_expert_share: float = 1.0

    def __post_init__(self) -> None:
        try:
            rules = tuple((pattern, scheme) for pattern, scheme in self.rules)
        except (TypeError, ValueError) as error:
            raise ValueError(f"rules={self.rules!r} are no (pattern, scheme) pairs, such as (('*', QuantScheme(4)),)") from error
        object.__setattr__(self, "rules", rules)
        share = self.min_expert_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"min_expert_share={share!r} is no share; give a number from 0 to 1")
        if self.method not in ("rtn",):
            raise ValueError(f"method={self.method!r} is not known; use 'rtn'")
        for pattern, scheme in rules:
            if not isinstance(pattern, str):
                raise ValueError(f"pattern={pattern!r} is no text; give a glob such as '*.down_proj', or '@role'")
            if pattern.startswith("@") and pattern[1:] not in ROLES:
                raise ValueError(f"pattern={pattern!r} names no role; roles are {', '.join('@' + r for r in ROLES)}")
            if scheme is not None and not isinstance(scheme, QuantScheme):
                raise ValueError(f"the scheme of pattern {pattern!r} is {scheme!r}; give a QuantScheme or None")

    def scheme_for(self, name: str, role: str) -> QuantScheme | None:
        """The scheme of the first rule that matches, or None: keep the weight."""
        return next((scheme for pattern, scheme in self.rules if matches(pattern, name, role)), None)

    def to_dict(self) -> dict:
        rules = [[p, None if s is None else str(s)] for p, s in self.rules]
        return {"step": "quantize", "rules": rules, "method": self.method, "min_expert_share": self.min_expert_share}

    @classmethod
    def from_dict(cls, d: dict) -> "Quantize":
        """Raises ValueError for missing rules, and for what is no (pattern, scheme) pair. The rest has defaults."""
        if "rules" not in d:
            raise ValueError(f"a quantize step has no 'rules', only {sorted(d)}")
        try:
            rules = tuple((p, None if s is None else QuantScheme.parse(s)) for p, s in d["rules"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"rules {d['rules']!r} of a quantize step can't be read: {error}") from error
        return cls(rules, **{f.name: d[f.name] for f in fields(cls) if f.name != "rules" and f.name in d})


Step = Quantize
_STEPS = {"quantize": Quantize}


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

    @classmethod
    def uniform(cls, scheme: QuantScheme | str, *, embedding: QuantScheme | str | None = "same", **settings) -> "Recipe":
        """One scheme for every weight; routers stay as they are. `embedding`: another scheme, or None to keep it."""
        scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
        if embedding == "same":
            embedding = scheme
        elif isinstance(embedding, str):
            embedding = QuantScheme.parse(embedding)
        return cls((Quantize((("@router", None), ("@embedding", embedding), ("*", scheme)), **settings),))

    def to_json(self) -> str:
        return json.dumps({"format": 1, "steps": [s.to_dict() for s in self.steps]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Raises ValueError for a step or a format that this version does not know."""
        d = json.loads(text)
        version = d.get("format") if isinstance(d, dict) else None
        if version != 1:
            raise ValueError(f"recipe format {version!r} is not 1: it was written by another edgelab")
        steps = d.get("steps")
        if not isinstance(steps, list):
            raise ValueError(f"the recipe has no list of 'steps', only {sorted(d)}")
        for s in steps:
            kind = s.get("step") if isinstance(s, dict) else s
            if not isinstance(kind, str) or kind not in _STEPS:
                raise ValueError(f"step {kind!r} is not one of {', '.join(_STEPS)}")
        return cls(tuple(_STEPS[s["step"]].from_dict(s) for s in steps))

    @property
    def digest(self) -> str:
        """Twelve hex digits of the recipe's content: equal recipes, equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
