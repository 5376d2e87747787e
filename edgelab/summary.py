"""What a model is, on one screen: family, shape, parameters and bytes by role, and how many of them a token uses.

`Model` is the Hugging Face module itself, which prints a hundred lines of modules; this is the view that compression asks for. Counted
from the model as it lies in memory (`compress.audit`), so a compressed model is summed up like any other.
"""

from dataclasses import dataclass

from torch import nn

from edgelab import html_table
from edgelab.compress import audit
from edgelab.methods.coverage import Coverage
from edgelab.model import FAMILIES, family_of


@dataclass(frozen=True)
class Summary:
    """One model. `experts`: of a mixture layer, 0 without any; `top_k`: those that a token takes. Shows itself in a notebook.

    `layers`, `hidden`, `vocabulary`, `context` are 0 where the config does not name them.
    """

    name: str
    family: str
    known: bool
    layers: int
    hidden: int
    vocabulary: int
    context: int
    experts: int
    top_k: int
    coverage: Coverage

    @property
    def parameters(self) -> int:
        return self.coverage.parameters

    @property
    def active(self) -> int:
        """Parameters that one token meets: all but the experts that its routers do not take (all of them where `top_k` is not known)."""
        routed = sum(r.parameters for r in self.coverage if r.role == "experts")
        return self.parameters - (round(routed * (1 - self.top_k / self.experts)) if self.experts and self.top_k else 0)

    def table(self) -> list[dict[str, str]]:
        """A line per fact, as text."""
        family = f"{self.family or 'none'} ({'known' if self.known else 'not in the table: every linear layer and embedding is walked'})"
        facts = {
            "model": self.name,
            "family": family,
            "layers": str(self.layers or "?"),
            "hidden size": str(self.hidden or "?"),
            "vocabulary": f"{self.vocabulary:,}" if self.vocabulary else "?",
            "context": f"{self.context:,} tokens" if self.context else "?",
            "experts": f"{self.experts} in a layer, {self.top_k} for a token" if self.experts else "none",
            "parameters": f"{self.parameters:,}",
            "met by a token": f"{self.active:,} ({self.active / max(self.parameters, 1):.1%})",
            "bytes": f"{self.coverage.predicted_bytes:,} ({self.coverage.bits_per_weight:.3f} bits per weight)",
        }
        return [{"what": k, "value": v} for k, v in facts.items()]

    def __repr__(self) -> str:
        mixture = f", {self.top_k} of {self.experts} experts" if self.experts else ""
        return (
            f"Summary({self.name}: {self.layers} layers of {self.hidden}{mixture}; {self.parameters:,} parameters, {self.active:,} for a "
            f"token, {self.coverage.predicted_bytes:,} bytes)"
        )

    def _repr_html_(self) -> str:
        pairs = [(line["what"], line["value"]) for line in self.table()]
        return html_table.facts(pairs) + html_table.lines(self.coverage.table(), "By role, as it lies in memory")


def summary(model: nn.Module) -> Summary:
    """The `Summary` of a model, compressed or not."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = family_of(model).model_type

    def first(*names: str) -> int:
        return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int)), 0)

    return Summary(
        type(model).__name__, kind, kind in FAMILIES, first("num_hidden_layers"), first("hidden_size"), first("vocab_size"),
        first("max_position_embeddings"), first("n_routed_experts", "num_local_experts", "num_experts"),
        first("num_experts_per_tok", "num_experts_per_token"), audit(model),
    )  # fmt: skip
