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
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.frame import frame
from edgelab.methods.distill import LOSSES, divergence, hinton
from edgelab.methods.qat import fake_quantize
from edgelab.report import Report
from edgelab.scheme import QuantScheme

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
        self.slider = w.FloatLogSlider(
            temperature, min=-1, max=1.3, step=0.02, readout=False, continuous_update=False, layout={"width": "14em"}
        )
        self.sentence, self.table = w.HTML(), w.HTML()
        self.figure = go.FigureWidget(layout={"template": plots.TEMPLATE, "height": 340, "margin": {"t": 30}})
        self.figure._config = self.figure._config | {"responsive": True}
        self.figure.add_bar(x=[self._words[i] for i in self._top], y=[0.0] * _BARS, marker_color=plots.OKABE_ITO[0])
        self.figure.update_yaxes(title_text="probability", range=[0, 1])
        self.figure.update_xaxes(title_text="next token, the likeliest first", type="category")
        self._draw()
        self.slider.observe(self._slid, "value")
        self.box.observe(lambda _: self._draw(), "value")
        self.box.observe(lambda change: setattr(self.slider, "value", change.new), "value")

    def _slid(self, change) -> None:
        """The slider goes in steps of 5 %, the box says any number: they follow one another."""
        if abs(math.log10(change.new / self.box.value)) > 0.6 * self.slider.step:  # less is the slider, rounding what the box says
            self.box.value = round(change.new, 2)

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
        return frame(inputs, self.sentence, self.figure, self.table)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

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


def hinton_loss(student: Sequence[float], teacher: Sequence[float], label: int, temperature: float, alpha: float) -> float:
    """Hinton's loss in nats of one position: logits of student and teacher, and the token that came. By `methods.distill.hinton`.

    >>> round(hinton_loss([0.0, 0.0], [1.386294, 0.0], 0, 1.0, 0.7), 4)  # p = (0.8, 0.2), q = (0.5, 0.5): 0.7 * 0.1927 + 0.3 * 0.6931
    0.3429
    """
    q, p = (torch.tensor([[list(x), list(x)]], dtype=torch.float32) for x in (student, teacher))  # two positions: one predicts, one follows
    return float(hinton(q, p, torch.tensor([[0, label]]), temperature=temperature, alpha=alpha))


def check_hinton(answer) -> Verdict:
    """Exercise 1: a function of (student logits, teacher logits, label, temperature, alpha) that returns Hinton's loss in nats."""
    two = ([0.0, 0.0], [math.log(4), 0.0])  # q = (0.5, 0.5), p = (0.8, 0.2) at T = 1
    four = ([0.5, -1.0, 2.0, 0.0], [3.0, 1.0, -2.0, 0.5])
    cases = [
        Case(
            "two tokens at T = 1 with alpha 0.7",
            (*two, 0, 1.0, 0.7),
            "0.7 KL(teacher || student) + 0.3 times minus ln of the label's share; in nats",
        ),
        Case("alpha = 1, where only the divergence counts", (*four, 2, 1.0, 1.0), "KL(p || q) = sum of p ln(p / q), p the teacher's"),
        Case("alpha = 0, where only the text counts", (*four, 2, 4.0, 0.0), "the cross entropy is taken at T = 1 and has no factor"),
        Case(
            "T = 3", (*four, 1, 3.0, 1.0), "both sides are divided by T before the softmax, and the divergence is multiplied by T squared"
        ),
        Case("T = 3 with alpha 0.5", (*four, 1, 3.0, 0.5), "T squared belongs to the divergence alone"),
        Case(
            "large logits",
            ([800.0, 0.0], [0.0, 800.0], 0, 2.0, 0.5),
            "exp(800) overflows: take the largest logit off first, or use log_softmax",
        ),
    ]
    form = "a function of student and teacher logits, label, temperature and alpha that returns one number, in nats"
    return check_function(
        answer, hinton_loss, cases, form, "alpha T² KL(p ‖ q) + (1 - alpha) CE, also where exp would overflow", tolerance=1e-4
    )


def step_gradient(weights: Sequence[float], step: float, bits: int) -> float:
    """LSQ's derivative of the sum of fake-quantized `weights` by their common `step`, without the factor g: by `methods.qat`."""
    w, s = torch.tensor([list(weights)]), torch.tensor([[float(step)]], requires_grad=True)
    fake_quantize(w, s, QuantScheme.parse(f"int{bits}-row"), gradient_scale=False).sum().backward()
    return float(s.grad)


def check_step_gradient(answer) -> Verdict:
    """Exercise 2: a function of (weights, step, bits) that returns LSQ's derivative by the step, without the factor g."""
    cases = [
        Case("one weight of 0.9 with step 0.5 and 3 bits", ([0.9], 0.5, 3), "inside of the range it is round(w / s) - w / s: 2 - 1.8"),
        Case(
            "a weight of 1.7, above the range",
            ([1.7], 0.5, 3),
            "1.7 / 0.5 = 3.4 lies above Qp = 3: the value is Qp * s, so the derivative is Qp",
        ),
        Case("a weight of -5, below the range", ([-5.0], 0.5, 3), "there the value is -Qn * s, with Qn = 2 ** (bits - 1)"),
        Case("weights at the ends of the range", ([1.5, -2.0], 0.5, 3), "3 bits go from -4 to 3, both of them inside"),
        Case("a row of six", ([0.9, -0.3, 1.7, -5.0, 0.1, 0.0], 0.5, 3), "the step is common to all weights: their derivatives add up"),
        Case("4 bits", ([0.9, 4.6, -9.0], 0.5, 4), "4 bits go from -8 to 7"),
    ]
    form = "a function of a list of weights, a step and a number of bits that returns one number"
    return check_function(answer, step_gradient, cases, form, "what `fake_quantize` hands back to the step, before g", tolerance=1e-4)


def check_bytes(answer) -> Verdict:
    """Exercise 3: bytes that LoRA of rank 8 adds beside a 256 x 640 weight in int4-g32, over the bytes of the weight, in percent; bf16."""
    if answer is None:
        return unanswered("a number of percent")
    codes = 256 * 640 * 4.5 / 8
    true = 100 * 8 * (256 + 640) * 2 / codes
    hints = {
        100 * 8 * (256 + 640) / codes: "a bfloat16 number takes two bytes",
        100 * 8 * (256 + 640) * 2 / (256 * 640 * 2): "compare with the weight in int4-g32, 4.5 bits each, not in 16",
        100 * 8 * (256 + 640) * 2 / (256 * 640 * 0.5): "int4-g32 takes 4.5 bits a weight: the scales count",
        100 * 8 * (256 + 640) * 4 / codes: "bfloat16: two bytes, not four",
        100 * 8 * (256 * 640) * 2 / codes: "A is [r, in] and B is [out, r]: r (in + out) numbers",
        true / 100: "in percent, please",
    }
    given = numbers(answer, 1)
    if given is None:
        return not_yet("one number, please")
    if math.isclose(given[0], true, rel_tol=5e-3):
        return right(f"8 · (256 + 640) · 2 bytes over {codes:,.0f} bytes = {true:.1f} %")
    return hint(given[0], hints, "compute each part by itself first", tolerance=5e-3)
