"""Behind notebook 07: soft targets, what each divergence asks for, curves and tables of runs, and the checks of its exercises."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from edgelab import plots
from edgelab.exercises import hint, numbers
from edgelab.methods.distill import LOSSES, divergence
from edgelab.report import Report

_BARS = 8

# --------------------------------------------------------------------------------------------------------- soft targets


def softened(logits: Tensor, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) of logits [vocabulary], float64."""
    return torch.softmax(logits.double() / temperature, -1).numpy()


def entropy_bits(p: np.ndarray) -> float:
    """Entropy in bits.

    >>> entropy_bits(np.array([0.5, 0.25, 0.25, 0.0]))
    1.5
    """
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


class TemperatureControl:
    """A slider for T beside its number box: the teacher's likeliest next tokens at that temperature, and what they tell.

    `logits` [vocabulary] of one position, `words` the text of every token of the vocabulary. `choose` does from code what a hand does.
    """

    def __init__(self, logits: Tensor, words: Sequence[str], context: str, temperature: float = 1.0) -> None:
        self._logits, self._words, self._context = logits.detach().float(), words, context
        self._top = torch.topk(self._logits, _BARS).indices.tolist()
        self.error: Exception | None = None
        wide = {"description_width": "8em"}
        self.box = w.BoundedFloatText(
            temperature, min=0.1, max=20, step=0.1, description="temperature T", style=wide, layout={"width": "15em"}
        )
        self.slider = w.FloatLogSlider(temperature, min=-1, max=1.3, step=0.02, readout=False, layout={"width": "14em"})
        self.sentence, self.table = w.HTML(), w.HTML()
        self.figure = go.FigureWidget(layout={"template": plots.TEMPLATE, "height": 340, "margin": {"t": 30}})
        self.figure._config = self.figure._config | {"responsive": True}
        self.figure.add_bar(x=[self._words[i] for i in self._top], y=[0.0] * _BARS, marker_color=plots.OKABE_ITO[0])
        self.figure.update_yaxes(title_text="probability", range=[0, 1])
        self.figure.update_xaxes(title_text="next token, the likeliest first", type="category")
        self._draw()
        self.slider.observe(lambda change: setattr(self.box, "value", round(change.new, 2)), "value")
        self.box.observe(lambda _: self._draw(), "value")

    def choose(self, temperature: float) -> None:
        """Set T. ValueError outside of 0.1 .. 20."""
        if not self.box.min <= temperature <= self.box.max:
            raise ValueError(f"temperature={temperature!r} must be from {self.box.min:g} to {self.box.max:g}")
        self.box.value = temperature

    @property
    def rows(self) -> list[dict[str, str]]:
        """A line per bar."""
        p = softened(self._logits, self.box.value)
        return [{"token": repr(self._words[i]), "probability": f"{p[i]:.4f}"} for i in self._top]

    @property
    def told(self) -> str:
        p = softened(self._logits, self.box.value)
        bits, tail = entropy_bits(p), 1 - p[self._top].sum()
        return (
            f"T = {self.box.value:g}: the likeliest token after {self._context!r} has {100 * p[self._top[0]]:.1f} %, "
            f"all but the {_BARS} shown {100 * tail:.1f} %. The distribution tells {bits:.2f} bits of entropy; a hard label would tell 0."
        )

    def _draw(self) -> None:
        p = softened(self._logits, self.box.value)
        with self.figure.batch_update():
            self.figure.data[0].y = [round(float(p[i]), 5) for i in self._top]
        self.sentence.value = f'<p aria-live="polite">{escape(self.told)}</p>'
        body = "".join(f"<tr><th scope='row'>{escape(r['token'])}</th><td>{r['probability']}</td></tr>" for r in self.rows)
        self.table.value = f"<table><caption>Soft targets</caption><tr><th>token</th><th>probability</th></tr>{body}</table>"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        inputs = w.HBox([self.box, self.slider], layout={"flex_flow": "row wrap"})
        return w.VBox([inputs, self.sentence, self.figure, self.table])._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A slider for the temperature, which needs a running notebook. {self.told}"


# ------------------------------------------------------------------------------------------------------ what a loss wants


def narrow_students(teacher: np.ndarray, *, beta: float = 0.1, steps: int = 400) -> dict[str, np.ndarray]:
    """{loss: the bell-shaped distribution that is best by it} for a teacher [n] that a bell can't copy.

    A student with a mean and a width only, as a small model can't say all that a large one does.
    """
    x, wanted = torch.arange(len(teacher), dtype=torch.float32), torch.log(torch.tensor(teacher, dtype=torch.float32))[None]
    found = {}
    for loss in LOSSES:
        best = (math.inf, None)
        for start in (0.25, 0.5, 0.75):  # a divergence may have several valleys: the deepest counts
            place = torch.tensor([start * len(teacher), math.log(len(teacher) / 8)], requires_grad=True)
            optimizer = torch.optim.Adam([place], lr=0.1)
            for _ in range(steps):
                logits = (-0.5 * ((x - place[0]) / place[1].exp()) ** 2)[None]
                value = divergence(logits, wanted, loss=loss, beta=beta)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            if (reached := float(value.detach())) < best[0]:
                best = (reached, torch.softmax(logits.detach()[0], -1).numpy())
        found[loss] = best[1]
    return found


def students_figure(teacher: np.ndarray, students: Mapping[str, np.ndarray]) -> go.Figure:
    """The teacher's distribution as bars, each loss's best student as a line."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "The best bell by each divergence"}})
    fig.add_bar(x=list(range(len(teacher))), y=np.round(teacher, 5).tolist(), name="teacher", marker_color="#bbbbbb")
    for i, (loss, p) in enumerate(students.items()):
        line = {"color": plots.OKABE_ITO[i], "dash": ("solid", "dash", "dot", "dashdot")[i]}
        fig.add_scatter(x=list(range(len(p))), y=np.round(p, 5).tolist(), name=loss, mode="lines", line=line)
    fig.update_xaxes(title_text="token")
    fig.update_yaxes(title_text="probability")
    return fig


def say_students(teacher: np.ndarray, students: Mapping[str, np.ndarray]) -> str:
    """The sentence beside `students_figure`: what each student gives to tokens that the teacher hardly ever says."""
    rare = teacher < teacher.max() / 20
    parts = [f"{loss} {100 * p[rare].sum():.0f} %" for loss, p in students.items()]
    told = f"({100 * teacher[rare].sum():.0f} %)"
    return f"Of its probability, the best student puts on tokens that the teacher hardly ever says {told}: {', '.join(parts)}."


# --------------------------------------------------------------------------------------------------------------- runs


def curves_figure(curves: Mapping[str, Sequence[Mapping]], title: str, y: str = "held-out loss, nats per token") -> go.Figure:
    """A line per run: the judged loss against the step. `curves` {run: lines of its curve.jsonl}."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": title}})
    for i, (name, lines) in enumerate(curves.items()):
        colour, symbol = plots.OKABE_ITO[i % len(plots.OKABE_ITO)], plots.SYMBOLS[i % len(plots.SYMBOLS)]
        fig.add_scatter(
            x=[line["step"] for line in lines],
            y=[round(line["judged"], 4) for line in lines],
            name=name,
            mode="lines+markers",
            line={"color": colour},
            marker={"color": colour, "symbol": symbol},
        )
    fig.update_xaxes(title_text="step", rangemode="tozero")
    fig.update_yaxes(title_text=y)
    return fig


def say_curves(curves: Mapping[str, Sequence[Mapping]]) -> str:
    """The sentence beside `curves_figure`."""
    parts = [
        f"{name}: {first['judged']:.3f} at step {first['step']}, {last['judged']:.3f} at step {last['step']}"
        for name, (first, *_, last) in curves.items()
    ]
    return "; ".join(parts) + "."


def rows(report: Report, metrics: Mapping[str, tuple[str, str]], models: Sequence[str] | None = None) -> list[dict[str, str]]:
    """A line per model; `metrics` {column: (metric, slice)}; figures with their intervals, blank where there is none."""
    found = []
    for model in report.models() if models is None else models:
        line = {"model": model}
        for column, (metric, on) in metrics.items():
            here = report.where(model=model, metric=metric, slice=on).rows
            line[column] = here[0].text() if here else ""
        if any(v for k, v in line.items() if k != "model"):
            found.append(line)
    return found


def recovered(report: Report, healthy: str, broken: str, mended: str, metric: str, on: str) -> float:
    """The share of the loss from `healthy` to `broken` that `mended` has back; of a divergence, `healthy` is 0.

    Raises ValueError when nothing was lost.
    """

    def value(model: str) -> float:
        here = report.where(model=model, metric=metric, slice=on).rows
        return here[0].value if here else 0.0

    lost = value(broken) - value(healthy)
    if lost == 0:
        raise ValueError(f"{metric} of {broken!r} and {healthy!r} are the same: nothing was lost")
    return (value(broken) - value(mended)) / lost


# ---------------------------------------------------------------------------------------------------------- a staircase


def staircase_figure(step: float = 0.5, bits: int = 3) -> go.Figure:
    """What fake quantization makes of a weight, and the derivative that the straight-through estimator puts in its place."""
    from edgelab.methods.qat import fake_quantize
    from edgelab.scheme import QuantScheme

    x = torch.linspace(-3, 3, 121)[None].requires_grad_(True)
    y = fake_quantize(x, torch.tensor([[step]]), QuantScheme.parse(f"int{bits}-row"))
    y.sum().backward()
    fig = go.Figure(
        layout={"template": plots.TEMPLATE, "title": {"text": f"int{bits}, step {step:g}: value and straight-through derivative"}}
    )
    for i, (name, values) in enumerate((("value", y.detach()[0]), ("derivative", x.grad[0]))):
        line = {"color": plots.OKABE_ITO[i], "shape": "hv", "dash": ["solid", "dash"][i]}
        fig.add_scatter(
            x=[round(float(v), 3) for v in x.detach()[0]], y=[round(float(v), 3) for v in values], name=name, mode="lines", line=line
        )
    fig.update_xaxes(title_text="weight w")
    fig.update_yaxes(title_text="fake-quantized value, and d/dw")
    return fig


# -------------------------------------------------------------------------------------------------------------- exercises

TEACHER, STUDENT, LABEL = (0.8, 0.2), (0.5, 0.5), 0  # of two tokens, at T = 1
WEIGHT, STEP, BITS = 1.7, 0.5, 3


def check_hinton(answer) -> str:
    """Exercise 1: alpha T^2 KL + (1 - alpha) CE for TEACHER and STUDENT, T = 1, alpha = 0.7, label 0."""
    if answer is None:
        return "Not answered yet: put a number in place of None."
    kl = sum(p * math.log(p / q) for p, q in zip(TEACHER, STUDENT, strict=True))
    reverse = sum(q * math.log(q / p) for p, q in zip(TEACHER, STUDENT, strict=True))
    ce = -math.log(STUDENT[LABEL])
    hints = {
        0.3 * kl + 0.7 * ce: "alpha weighs the divergence, 1 - alpha the cross entropy",
        0.7 * reverse + 0.3 * ce: "that is the reverse divergence, KL(student || teacher); Hinton's is KL(teacher || student)",
        0.7 * kl: "the cross entropy on the label is missing",
        kl + ce: "weigh the two by alpha and 1 - alpha",
        (0.7 * kl + 0.3 * ce) / math.log(2): "in nats, not bits: the natural logarithm",
    }
    return _verdict(answer, 0.7 * kl + 0.3 * ce, hints, f"0.7 · {kl:.4f} + 0.3 · {ce:.4f} = {0.7 * kl + 0.3 * ce:.4f}")


def check_step_gradient(answer) -> str:
    """Exercise 2: LSQ's derivative of the fake-quantized WEIGHT by its STEP, without the factor g."""
    if answer is None:
        return "Not answered yet: put a number in place of None."
    v = WEIGHT / STEP  # 3.4: above Qp = 3, clipped
    hints = {
        round(v) - v: "the weight lies outside of the range, 1.7 / 0.5 = 3.4 > Qp = 3: there the derivative is another",
        -4.0: "that is -Qn, for weights clipped at the lower end",
        4.0: "3 bits have levels -4 .. 3: the upper end is Qp = 3",
        0.0: "the value is Qp · s there, and that does depend on s",
        1.5: "that is the value itself, Qp · s; its derivative by s is asked for",
    }
    return _verdict(answer, 3.0, hints, "clipped at the upper end the value is Qp · s, so the derivative is Qp = 3")


def check_bytes(answer) -> str:
    """Exercise 3: bytes that LoRA of rank 8 adds beside a 256 x 640 weight in int4-g32, over the bytes of the weight, in percent; bf16."""
    if answer is None:
        return "Not answered yet: put a number of percent in place of None."
    codes = 256 * 640 * 4.5 / 8
    right = 100 * 8 * (256 + 640) * 2 / codes
    hints = {
        100 * 8 * (256 + 640) / codes: "a bfloat16 number takes two bytes",
        100 * 8 * (256 + 640) * 2 / (256 * 640 * 2): "compare with the weight in int4-g32, 4.5 bits each, not in 16",
        100 * 8 * (256 + 640) * 2 / (256 * 640 * 0.5): "int4-g32 takes 4.5 bits a weight: the scales count",
        100 * 8 * (256 + 640) * 4 / codes: "bfloat16: two bytes, not four",
        100 * 8 * (256 * 640) * 2 / codes: "A is [r, in] and B is [out, r]: r (in + out) numbers",
    }
    return _verdict(answer, right, hints, f"8 · (256 + 640) · 2 bytes over {codes:,.0f} bytes = {right:.1f} %")


def _verdict(answer, right: float, hints: Mapping[float, str], why: str) -> str:
    given = numbers(answer, 1)
    if given is None:
        return "Not yet: one number, please."
    if math.isclose(given[0], right, rel_tol=5e-3):
        return f"Right: {why}."
    return hint(given[0], hints, "compute each part by itself first", tolerance=5e-3 * max(1.0, abs(right)))
