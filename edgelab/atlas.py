"""The expert atlas: every expert of a mixture on one page, and what the model loses when one is dropped, merged or stored in fewer bits.

`Atlas` holds the map (statistics per layer, expert and domain) and the edits; `AtlasControl` is the page: click an expert, choose
what happens to it, see the KL divergence move. Every divergence is measured on the spot, on the same held-out tokens:

- drop: the router never chooses it (`expert_steps.masked`): what removing its rows gives, without changing a shape;
- merge into another: one average takes their place, weighted by how often each is used, inner neurons matched first
  (`methods.experts`), and the router keeps the other's row: what `expert_steps.merge` gives where that one is the most used;
- bits: its weights, after merging, are replaced by those that codes of the scheme stand for, rounded to nearest.

Layers are counted as mixtures, from 0: a model whose first block is dense has its mixture 0 in block 1.

The quantization error on the map is |D| / |W| of an expert's weights, D what rounding them to `scheme` changes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from edgelab import plots
from edgelab.evaluate import routers
from edgelab.expert_stats import ExpertStats
from edgelab.expert_steps import masked
from edgelab.frame import frame
from edgelab.methods.experts import matched
from edgelab.methods.rtn import round_to_nearest
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import family_of, weights
from edgelab.scheme import QuantScheme

ALL = "all domains"
METRICS = {
    "tokens": "share of the tokens routed to it",
    "gate mass": "share of the gates' sum",
    "REAP score": "mean gate x output norm over its tokens",
    "quantization error": "relative error of its weights",
}
ACTIONS = ("keep", "drop", "merge into", "2 bits", "3 bits", "4 bits")


@dataclass(frozen=True)
class Edit:
    """What happens to one expert: `action` of ACTIONS, `into` the expert of the same layer that it is merged into."""

    action: str
    into: int | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action={self.action!r} is not known; use one of {', '.join(ACTIONS)}")
        if (self.action == "merge into") != (self.into is not None):
            raise ValueError(f"into={self.into!r} goes with action='merge into' and with no other")

    def __str__(self) -> str:
        return self.action if self.into is None else f"merge into {self.into}"


class Atlas:
    """Statistics and edits of the experts of `model`, and the KL divergence that the edits cost.

    `stats` {domain: {router: ExpertStats}}, as `expert_stats.by_domain` gives. `batches` int64 [B, T] of held-out tokens, on which
    every divergence is measured. `scheme`: of the quantization error on the map. The model is never left changed.
    """

    def __init__(
        self,
        model: nn.Module,
        stats: Mapping[str, Mapping[str, ExpertStats]],
        batches: Sequence[Tensor],
        scheme: str = "int3-g32",
    ) -> None:
        self.model, self.batches, self.scheme = model, list(batches), scheme
        self.routers = list(routers(model))
        if not self.routers:
            raise ValueError(f"this {type(model).__name__} has no experts; the atlas is a map of a mixture of experts")
        if not self.batches:
            raise ValueError("batches is empty; give held-out token ids, such as those of data.calibration_batches")
        if not stats:
            raise ValueError("stats is empty; expert_stats.by_domain(model, tokenizer, corpus()['calibration']) makes it")
        for domain, found in stats.items():
            if set(found) != set(self.routers):
                raise ValueError(f"stats of {domain!r} are of the routers {', '.join(found)}, the model's are {', '.join(self.routers)}")
        self.by_domain = {domain: [found[r] for r in self.routers] for domain, found in stats.items()}
        merged, *others = self.by_domain.values()
        for other in others:
            merged = [a.merge(b) for a, b in zip(merged, other, strict=True)]
        self.by_domain = {ALL: merged} | self.by_domain
        self.experts = len(merged[0].counts)
        # [layers] of (gate_up, down): the weights that belong to each router, in the order of the model
        layout, found = family_of(model).experts, [x for x in weights(model) if x.kind == "experts"]
        self._stacks, self._interleaved = [], layout.interleaved
        for name in self.routers:
            mine = {x.parameter: x for x in found if x.module_name.startswith(name.rpartition(".")[0] + ".")}
            if set(mine) != {layout.gate_up, layout.down}:
                raise ValueError(f"{name} has no floating-point experts beside it; the atlas edits the original, before Quantize")
            self._stacks.append((mine[layout.gate_up], mine[layout.down]))
        self._errors = self._relative_errors()
        self.edits: dict[tuple[int, int], Edit] = {}
        with torch.no_grad():
            self._reference = [torch.log_softmax(model(ids, use_cache=False).logits.float(), -1) for ids in self.batches]
        self.trail: list[tuple[str, float, int]] = [("the original", 0.0, self.nbytes)]

    # ---------------------------------------------------------------------------------------------------------- the map

    def map(self, metric: str, domain: str = ALL) -> np.ndarray:
        """[layers, experts] of one of METRICS over the tokens of `domain`."""
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is not known; use one of {', '.join(METRICS)}")
        if domain not in self.by_domain:
            raise ValueError(f"domain={domain!r} is not known; there are {', '.join(self.by_domain)}")
        if metric == "quantization error":
            return self._errors
        found = []
        for s in self.by_domain[domain]:
            counts, mass = _array(s.counts), _array(s.gate_mass)
            values = {"tokens": counts / max(counts.sum(), 1), "gate mass": mass / max(mass.sum(), 1e-30), "REAP score": _array(s.reap)}
            found.append(values[metric])
        return np.stack(found)

    def _relative_errors(self) -> np.ndarray:
        found = np.zeros((len(self.routers), self.experts))
        for i, stacks in enumerate(self._stacks):
            total = sum(x.tensor.detach().float().square().flatten(1).sum(1) for x in stacks)
            wrong = sum((self._rounded(x.tensor, self.scheme) - x.tensor.detach().float()).square().flatten(1).sum(1) for x in stacks)
            found[i] = (wrong / total.clamp(min=1e-30)).sqrt().cpu().numpy()
        return found

    @staticmethod
    def _rounded(tensor: Tensor, scheme: str) -> Tensor:
        return torch.from_numpy(round_to_nearest(tensor.detach(), QuantScheme.parse(scheme), mse_grid=24).dequantize()).to(tensor.device)

    # -------------------------------------------------------------------------------------------------------- the edits

    def edit(self, layer: int, expert: int, action: str, into: int | None = None) -> float:
        """Put `action` on an expert in place of the one before, and return the KL divergence of all edits together, nats per token."""
        if not (0 <= layer < len(self.routers) and 0 <= expert < self.experts):
            raise ValueError(f"layer {layer}, expert {expert}: there are layers 0 .. {len(self.routers) - 1} of {self.experts} experts")
        edit, before = Edit(action, into), dict(self.edits)
        if into is not None and (not 0 <= into < self.experts or into == expert):
            raise ValueError(f"into={into}: give another expert of the same layer, 0 .. {self.experts - 1}")
        self.edits[layer, expert] = edit
        if action == "keep":
            del self.edits[layer, expert]
        try:
            self._check(layer)
            kld = self.kld()
        except BaseException:  # also when the reader interrupts the measurement: what was not measured did not happen
            self.edits = before
            raise
        self.trail.append((f"layer {layer}, expert {expert}: {edit}", kld, self.nbytes))
        return kld

    def reset(self) -> None:
        """Takes all edits back."""
        self.edits.clear()
        self.trail.append(("all edits taken back", 0.0, self.nbytes))

    def _check(self, layer: int) -> None:
        gone = {e for (i, e), edit in self.edits.items() if i == layer and edit.action in ("drop", "merge into")}
        top_k = self.model.get_submodule(self.routers[layer]).top_k
        if self.experts - len(gone) < top_k:
            raise ValueError(f"layer {layer} would have {self.experts - len(gone)} experts left; a token chooses {top_k}")
        for (i, e), edit in self.edits.items():
            if i == layer and edit.into in gone:
                raise ValueError(f"expert {e} of layer {layer} is merged into {edit.into}, which is gone: merge it into one that stays")

    @property
    def nbytes(self) -> int:
        """Bytes of all expert weights as edited; those that keep their weights count 2 bytes each."""
        total = 0
        for i, stacks in enumerate(self._stacks):
            for e in range(self.experts):
                edit = self.edits.get((i, e))
                if edit is None or edit.action.endswith("bits"):
                    scheme = None if edit is None else QuantScheme.parse(_scheme(edit))
                    total += sum(2 * x.tensor[e].numel() if scheme is None else scheme.nbytes(x.shape[1:]) for x in stacks)
        return total

    def kld(self) -> float:
        """Mean KL(original || edited) over the held-out tokens, nats per token; the model is as it was afterwards."""
        if not self.edits:
            return 0.0
        total = 0.0
        with self.edited(), torch.no_grad():
            for ids, reference in zip(self.batches, self._reference, strict=True):
                got = torch.log_softmax(self.model(ids, use_cache=False).logits.float(), -1)
                total += float(token_kl(reference.flatten(0, 1), got.flatten(0, 1)).sum())
        return total / sum(ids.numel() for ids in self.batches)

    @contextmanager
    def edited(self):
        """Inside, the model computes with all edits."""
        gone: dict[str, list[int]] = {}
        saved: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as stack, torch.no_grad():
            try:
                for i in range(len(self.routers)):
                    self._merge(i, saved)
                for (i, e), edit in self.edits.items():
                    if edit.action in ("drop", "merge into"):
                        gone.setdefault(self.routers[i], []).append(e)
                    if edit.action.endswith("bits"):
                        for x in self._stacks[i]:
                            self._put(saved, x.tensor[e], self._rounded(x.tensor[e], _scheme(edit)))
                if gone:
                    stack.enter_context(masked(self.model, gone))
                yield self.model
            finally:
                for target, old in reversed(saved):
                    target.copy_(old)

    def _merge(self, layer: int, saved: list[tuple[Tensor, Tensor]]) -> None:
        """Each expert that others are merged into becomes the average of them all, weighted by their tokens."""
        groups: dict[int, list[int]] = {}
        for (i, e), edit in self.edits.items():
            if i == layer and edit.into is not None:
                groups.setdefault(edit.into, [edit.into]).append(e)
        counts = _array(self.by_domain[ALL][layer].counts)
        for into, members in groups.items():
            share = counts[members] / counts[members].sum() if counts[members].sum() else np.full(len(members), 1 / len(members))
            up, down = (x.tensor for x in self._stacks[layer])  # [E, 2 * inner, hidden], [E, hidden, inner]
            inner = down.shape[-1]
            parted = up.unflatten(1, (inner, 2)).transpose(1, 2) if self._interleaved else up.unflatten(1, (2, inner))
            first = torch.zeros_like(parted[into], dtype=torch.float64)
            second = torch.zeros_like(down[into], dtype=torch.float64)
            for weight, e in zip(share.tolist(), members, strict=True):
                order = torch.arange(inner) if e == into else matched(parted[e], down[e], parted[into], down[into])
                first += weight * parted[e][:, order].double()
                second += weight * down[e][:, order].double()
            whole = (first.transpose(0, 1) if self._interleaved else first).reshape(up.shape[1:])
            self._put(saved, up[into], whole)
            self._put(saved, down[into], second)

    @staticmethod
    def _put(saved: list[tuple[Tensor, Tensor]], target: Tensor, value: Tensor) -> None:
        saved.append((target, target.clone()))
        target.copy_(value)

    def rows(self) -> list[dict[str, str]]:
        """The edits so far, in their order, with what they cost and save."""
        first = self.trail[0][2]
        return [
            {"edit": what, "KLD, nats per token (measured)": f"{kld:.4f}", "bytes of the experts (counted)": f"{100 * size / first:.1f} %"}
            for what, kld, size in self.trail
        ]


def _scheme(edit: Edit) -> str:
    return f"int{edit.action.partition(' ')[0]}-g32"


def _array(x) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=float)


# ----------------------------------------------------------------------------------------------------------- the control


class AtlasControl:
    """The map of an `Atlas` to click on, with boxes for the same by keyboard; the divergence after each edit beside it.

    `choose` and `apply` do from code what the hand does. What goes wrong is shown in the control and kept in `error`.
    """

    def __init__(self, atlas: Atlas, metric: str = "REAP score", domain: str = ALL) -> None:
        self.atlas, self.error = atlas, None
        wide = {"description_width": "6em"}
        self.metric = w.Dropdown(options=list(METRICS), value=metric, description="map of", style=wide, layout={"width": "18em"})
        self.domain = w.Dropdown(options=list(atlas.by_domain), value=domain, description="domain", style=wide, layout={"width": "16em"})
        self.layer = w.BoundedIntText(0, min=0, max=len(atlas.routers) - 1, description="layer", style=wide, layout={"width": "11em"})
        self.expert = w.BoundedIntText(0, min=0, max=atlas.experts - 1, description="expert", style=wide, layout={"width": "11em"})
        self.action = w.Dropdown(options=ACTIONS, value="drop", description="action", style=wide, layout={"width": "15em"})
        self.into = w.BoundedIntText(1, min=0, max=atlas.experts - 1, description="into expert", style=wide, layout={"width": "11em"})
        self.go = w.Button(description="Do it", button_style="primary", layout={"width": "7em"})
        self.back = w.Button(description="Take all back", layout={"width": "9em"})
        self.sentence, self.table = w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(self._figure())
        self.figure._config = self.figure._config | {"responsive": True}
        self.figure.data[0].on_click(self._clicked)
        for widget in (self.metric, self.domain):
            widget.observe(lambda _: self._guard(self._draw), "value")
        for widget in (self.layer, self.expert):
            widget.observe(lambda _: self._guard(self._draw), "value")
        self.go.on_click(lambda _: self.apply())
        self.back.on_click(lambda _: self._guard(self._reset))
        self._draw()

    def _figure(self) -> go.Figure:
        from plotly.subplots import make_subplots

        fig = make_subplots(rows=2, cols=1, row_heights=[0.6, 0.4], vertical_spacing=0.22)
        fig.add_trace(go.Heatmap(z=[[0.0]], colorscale="Viridis", colorbar={"len": 0.55, "y": 0.78}, hoverongaps=False), row=1, col=1)
        mark = {"symbol": "square-open", "size": 22, "color": plots.OKABE_ITO[3], "line": {"width": 3}}
        fig.add_scatter(x=[0], y=[0], mode="markers", marker=mark, hoverinfo="skip", showlegend=False, row=1, col=1)
        edits = {"size": 15, "color": "#000000"}
        fig.add_scatter(x=[], y=[], mode="text", textfont=edits, hoverinfo="skip", showlegend=False, row=1, col=1)
        line = {"color": plots.OKABE_ITO[0]}
        fig.add_scatter(x=[], y=[], mode="lines+markers", line=line, marker=line, showlegend=False, row=2, col=1)
        fig.update_layout(template=plots.TEMPLATE, height=520, margin={"t": 30}, autosize=True)
        fig.update_xaxes(title_text="expert", dtick=1 if self.atlas.experts <= 32 else None, row=1, col=1)
        fig.update_yaxes(title_text="layer", dtick=1, autorange="reversed", row=1, col=1)
        fig.update_xaxes(title_text="edit", row=2, col=1)
        fig.update_yaxes(title_text="KLD, nats per token", rangemode="tozero", row=2, col=1)
        return fig

    def choose(self, layer: int, expert: int) -> None:
        """Point at an expert. Of one that is not there `error` tells."""
        self._guard(lambda: self._choose(layer, expert))

    def _choose(self, layer: int, expert: int) -> None:
        if not (0 <= layer < len(self.atlas.routers) and 0 <= expert < self.atlas.experts):  # a box would cut it off and say nothing
            raise ValueError(
                f"layer {layer}, expert {expert}: there are layers 0 .. {len(self.atlas.routers) - 1} of {self.atlas.experts} experts"
            )
        self.layer.value, self.expert.value = layer, expert

    def apply(self, action: str | None = None, into: int | None = None) -> float | None:
        """Do the chosen action to the chosen expert; the divergence of all edits, or None where it makes no sense."""
        return self._guard(lambda: self._apply(action, into))

    def _apply(self, action: str | None, into: int | None) -> float:
        if action is not None:
            Edit(action, (self.into.value if into is None else into) if action == "merge into" else into)  # says what is not known
            self.action.value = action
        if into is not None:
            if not 0 <= into < self.atlas.experts:
                raise ValueError(f"into={into}: give another expert of the same layer, 0 .. {self.atlas.experts - 1}")
            self.into.value = into
        partner = self.into.value if self.action.value == "merge into" else None
        kld = self.atlas.edit(self.layer.value, self.expert.value, self.action.value, partner)
        self._draw()
        return kld

    def _reset(self) -> None:
        self.atlas.reset()
        self._draw()

    def _clicked(self, _trace, points, _state) -> None:
        if points.xs:
            self.choose(round(points.ys[0]), round(points.xs[0]))

    def _guard(self, act):
        try:
            self.error = None
            return act()
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self.error = error
            self.sentence.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'
            return None

    def _draw(self) -> None:
        z = self.atlas.map(self.metric.value, self.domain.value)
        short = {"drop": "x", "merge into": "m", "2 bits": "2", "3 bits": "3", "4 bits": "4"}
        edits = self.atlas.edits
        with self.figure.batch_update():
            heat, ring, marks, trail = self.figure.data
            heat.z = np.round(z, 5).tolist()
            heat.x, heat.y = list(range(z.shape[1])), list(range(z.shape[0]))
            heat.hovertemplate = f"layer %{{y}}, expert %{{x}}: %{{z:.3g}}<extra>{escape(self.metric.value)}</extra>"
            ring.x, ring.y = [self.expert.value], [self.layer.value]
            marks.x, marks.y = [e for _, e in edits], [i for i, _ in edits]
            marks.text = [short[edit.action] for edit in edits.values()]
            trail.x, trail.y = list(range(len(self.atlas.trail))), [kld for _, kld, _ in self.atlas.trail]
        self.sentence.value, self.table.value = f'<p aria-live="polite">{escape(self.told)}</p>', self.html

    @property
    def told(self) -> str:
        """The chosen expert and the state of the edits, in two sentences."""
        i, e, metric = self.layer.value, self.expert.value, self.metric.value
        z = self.atlas.map(metric, self.domain.value)
        rank = int((z[i] > z[i, e]).sum()) + 1
        what, kld, size = self.atlas.trail[-1]
        edit = self.atlas.edits.get((i, e))
        of = f"{METRICS[metric]}; {self.domain.value}"
        who = f"Layer {i} ({self.atlas.routers[i].rpartition('.')[0]}), expert {e}{f' ({edit})' if edit else ''}"
        return (
            f"{who}: {metric} {z[i, e]:.3g} ({of}), number {rank} of "
            f"{z.shape[1]} in its layer. {len(self.atlas.edits)} edits; last: {what}; KL divergence now {kld:.4f} nats per token, "
            f"experts at {100 * size / self.atlas.trail[0][2]:.1f} % of their bytes in 16 bits."
        )

    @property
    def html(self) -> str:
        """The edits as an HTML table."""
        rows = self.atlas.rows()
        head = "".join(f'<th scope="col">{escape(c)}</th>' for c in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        return f"<table><caption>Edits so far</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The inputs, the sentence, the map and the table; where no widget can be shown, a sentence that says what would be."""
        view = w.HBox([self.metric, self.domain], layout={"flex_flow": "row wrap"})
        inputs = w.HBox([self.layer, self.expert, self.action, self.into, self.go, self.back], layout={"flex_flow": "row wrap"})
        return frame(view, inputs, self.sentence, self.figure, self.table)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"An atlas of {len(self.atlas.routers)} x {self.atlas.experts} experts, which needs a running notebook. {self.told}"
