"""What each expert of a mixture does: one pass over text, sums that can be merged, whatever question is asked of them later.

For every router, over tokens t with gates g and outputs f_e(x):

    counts       how many tokens chose expert e                gate_mass      sum of its gates
    reap         mean over ITS tokens of g_e |f_e(x)|_2        output_norm    mean over its tokens of |f_e(x)|_2
    together     how many tokens chose e and f                 mean_output    mean of f_e(x) over ALL tokens
    likeness     correlation of the router's logits of e and f

REAP (github.com/CerebrasResearch/reap, arXiv 2510.13999) is what the layer's output loses on average where the expert was used;
HC-SMoE (arXiv 2410.08589) clusters mean outputs, which takes every expert's output for every token (experts / top-k times the work);
M-SMoE (arXiv 2310.01334) groups by the router's logits. A choice with gate 0 (skipped, see `routing`) is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab import data, html_table
from edgelab.blocks import _forward, _quiet, checked_batches
from edgelab.evaluate import routers
from edgelab.layers import gated
from edgelab.model import ExpertLayout, family_of, glu_settings


@dataclass(frozen=True, eq=False)
class ExpertStats:
    """Sums over `tokens` tokens for the E experts of one router, float64 (counts and `together` int64)."""

    tokens: int
    counts: Tensor  # [E]
    gate_mass: Tensor  # [E]
    norm_sum: Tensor  # [E] of |f_e(x)| over routed tokens
    reap_sum: Tensor  # [E] of g_e |f_e(x)| over routed tokens
    together: Tensor  # [E, E]
    output_sum: Tensor  # [E, hidden] over all tokens; zeros where all_tokens=False
    logit_sum: Tensor  # [E]
    logit_square: Tensor  # [E, E]

    def merge(self, other: "ExpertStats") -> "ExpertStats":
        """The statistics of both texts together."""
        if len(self.counts) != len(other.counts):
            raise ValueError(f"statistics of {len(self.counts)} and of {len(other.counts)} experts are of different routers")
        return ExpertStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def frequency(self) -> Tensor:
        """[E]: the share of the tokens that choose an expert; adds up to the experts per token."""
        return self.counts.double() / max(self.tokens, 1)

    @property
    def reap(self) -> Tensor:
        """[E]: mean of gate times output norm over an expert's own tokens; 0 where it had none."""
        return self.reap_sum / self.counts.clamp(min=1)

    @property
    def output_norm(self) -> Tensor:
        """[E]: mean norm of the output over an expert's own tokens."""
        return self.norm_sum / self.counts.clamp(min=1)

    @property
    def mean_output(self) -> Tensor:
        """[E, hidden]."""
        return self.output_sum / max(self.tokens, 1)

    @property
    def likeness(self) -> Tensor:
        """[E, E]: Pearson correlation of the router's logits."""
        n = max(self.tokens, 1)
        mean = self.logit_sum / n
        cov = self.logit_square / n - mean[:, None] * mean[None]
        sd = cov.diagonal().clamp(min=1e-30).sqrt()
        return cov / (sd[:, None] * sd[None])

    def to_dict(self) -> dict:
        """Plain numbers and lists, for JSON; `from_dict` reads them."""
        return {f.name: v.tolist() if isinstance(v := getattr(self, f.name), Tensor) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, d: Mapping) -> "ExpertStats":
        """Raises ValueError for a dict that `to_dict` did not write."""
        if set(d) != {f.name for f in fields(cls)}:
            raise ValueError(f"a dict of ExpertStats has the keys {', '.join(f.name for f in fields(cls))}, not {', '.join(map(str, d))}")
        whole = ("counts", "together")
        return cls(
            d["tokens"], *(torch.tensor(d[f.name], dtype=torch.int64 if f.name in whole else torch.float64) for f in fields(cls)[1:])
        )

    def rows(self) -> list[dict[str, str]]:
        """A line per expert."""
        share, mass = self.counts / self.counts.sum().clamp(min=1), self.gate_mass / self.gate_mass.sum().clamp(min=1e-30)
        return [
            {
                "expert": str(e),
                "tokens, %": f"{100 * share[e]:.1f}",
                "gate mass, %": f"{100 * mass[e]:.1f}",
                "output norm": f"{self.output_norm[e]:.3g}",
                "REAP": f"{self.reap[e]:.3g}",
            }
            for e in range(len(self.counts))
        ]

    def __repr__(self) -> str:
        return f"ExpertStats({len(self.counts)} experts, {self.tokens:,} tokens)"

    def _repr_html_(self) -> str:
        return html_table.lines(self.rows(), repr(self))


def expert_stats(model: nn.Module, batches: Sequence[Tensor], *, all_tokens: bool = True, progress: bool = True) -> dict[str, ExpertStats]:
    """{router: its `ExpertStats`} over `batches` int64 [B, T] without padding.

    `all_tokens`: also send every token to every expert, for `mean_output`. Raises ValueError for a model without experts or of a
    family whose experts' layout is not known, FloatingPointError when logits or outputs are NaN or infinite.
    """
    places, batches = mixtures(model), checked_batches(model, batches)
    layout = family_of(model).experts
    found: dict[str, ExpertStats] = {}
    logits: dict[str, Tensor] = {}
    handles = []

    def router_hook(name: str):
        def hook(_module, _args, output) -> None:
            logits[name] = output[0].detach()

        return hook

    def experts_hook(name: str):
        def hook(module, args, kwargs) -> None:
            x, gates, index = routed(args, kwargs)
            new = _of(module, layout, x, gates, index, logits.pop(name), all_tokens)
            if not all(t.isfinite().all() for t in (new.norm_sum, new.reap_sum, new.output_sum, new.logit_sum)):
                raise FloatingPointError(f"{name}: router logits or outputs of its experts are NaN or infinite; check the checkpoint")
            found[name] = new if name not in found else found[name].merge(new)

        return hook

    for router, experts in places.items():
        handles.append(model.get_submodule(router).register_forward_hook(router_hook(router)))
        handles.append(model.get_submodule(experts).register_forward_pre_hook(experts_hook(router), with_kwargs=True))
    try:
        with _quiet(model):
            for ids in tqdm(batches, desc="expert statistics", unit="batch", disable=not progress):
                _forward(model, ids)
    finally:
        for h in handles:
            h.remove()
    return {name: found[name] for name in places}


def by_domain(
    model: nn.Module, tokenizer, dataset, *, tokens: int = 8192, context: int = 256, all_tokens: bool = False, progress: bool = True
) -> dict[str, dict[str, ExpertStats]]:
    """{domain: {router: ExpertStats}} of one split, such as corpus()["calibration"]: about `tokens` tokens of each domain.

    Raises ValueError for a data set without a column `domain`.
    """
    if "domain" not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError("dataset has no column 'domain'; give a split such as corpus()['calibration'], or call expert_stats")
    domains = list(dict.fromkeys(dataset["domain"]))
    found = {}
    for domain in domains:
        rows = dataset.select([i for i, d in enumerate(dataset["domain"]) if d == domain])
        batches = data.calibration_batches(tokenizer, rows, tokens=tokens, context=context)
        found[domain] = expert_stats(model, batches, all_tokens=all_tokens, progress=progress)
    return found


def heatmap(stats: Mapping[str, ExpertStats], field: str = "reap") -> np.ndarray:
    """float64 [layers, experts] of one figure per expert: counts, frequency, gate_mass, output_norm or reap."""
    return np.stack([getattr(s, field).double().numpy() for s in stats.values()])


def mixtures(model: nn.Module) -> dict[str, str]:
    """{router: the module of its experts, both by name}, in layer order. Raises ValueError for a model without any."""
    layout, found = family_of(model).experts, {}
    for router in routers(model):
        parent = router.rpartition(".")[0]
        inside = [n for n, m in model.get_submodule(parent).named_modules() if layout and layout.gate_up in m._parameters]
        if len(inside) != 1:
            raise ValueError(
                f"{parent} holds {len(inside)} stacks of experts beside its router; edgelab.model.FAMILIES tells the layout of one"
            )
        found[router] = f"{parent}.{inside[0]}"
    if not found:
        raise ValueError(f"this {type(model).__name__} has no experts: the step is for mixtures of experts")
    return found


def routed(args: tuple, kwargs: Mapping) -> tuple[Tensor, Tensor, Tensor]:
    """(x [N, hidden], gates [N, k], index [N, k]) of a call of an expert module, whichever order its family has them in."""
    x, first, second = [*args, *kwargs.values()][:3]
    index, gates = (second, first) if first.is_floating_point() else (first, second)
    index, x = index.reshape(-1, index.shape[-1]), x.reshape(-1, x.shape[-1])
    gates = gates.reshape(len(index), -1)
    return x, gates if gates.shape == index.shape else gates.gather(1, index), index


def output_of(experts: nn.Module, x: Tensor, e: int, layout: ExpertLayout) -> Tensor:
    """f_e(x) [n, hidden] of expert `e`, for x [n, hidden]: the gate is not in it."""

    def multiply(x: Tensor, name: str) -> Tensor:
        weight = experts._parameters[name][e]
        y = x @ weight if layout.transposed else F.linear(x, weight)
        return y + experts._parameters[f"{name}_bias"][e] if layout.biased else y

    return multiply(gated(multiply(x, layout.gate_up), **glu_settings(experts, layout)), layout.down)


def _of(experts: nn.Module, layout: ExpertLayout, x, gates, index, logits, all_tokens: bool) -> ExpertStats:
    total = experts._parameters[layout.gate_up].shape[0]
    chosen = torch.zeros(len(x), total, dtype=torch.float64, device=x.device)
    index = index.masked_fill(gates == 0, total)  # the index `total` means none
    chosen.scatter_add_(1, index.clamp(max=total - 1), (index < total).double())  # a token chooses an expert once at most
    mass, norm, reap = (torch.zeros(total, dtype=torch.float64) for _ in range(3))
    outputs = torch.zeros(total, x.shape[-1], dtype=torch.float64)
    for e in range(total):
        token, slot = (index == e).nonzero(as_tuple=True)
        rows = x if all_tokens else x[token]
        y = output_of(experts, rows, e, layout).double() if len(rows) else x.new_zeros(0, x.shape[-1]).double()
        if all_tokens:
            outputs[e] = y.sum(0).cpu()
            y = y[token]
        own, size = gates[token, slot].double(), y.norm(dim=-1)
        mass[e], norm[e], reap[e] = own.sum().cpu(), size.sum().cpu(), (own * size).sum().cpu()
    wide = logits.reshape(len(x), total).double()
    counts = chosen.sum(0).long().cpu()
    return ExpertStats(
        len(x), counts, mass, norm, reap, (chosen.T @ chosen).long().cpu(), outputs, wide.sum(0).cpu(), (wide.T @ wide).cpu()
    )
