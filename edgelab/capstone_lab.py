"""Behind notebook 12: a form that builds a recipe and submits it, the board as a picture and a table, and the checks of the exercises.

Before anything is compressed the form says what the choice *would* take, from shapes and schemes alone (modelled); what it took is
counted afterwards. A plan that can't fit is told in milliseconds, and submitting it is still allowed: the board has room for it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go

from edgelab import html_table, plots
from edgelab.capstone import DOMAINS, MODELS, Capstone, Challenge, Entry, ranked
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, numbers, right, unanswered
from edgelab.frame import PLOT, frame
from edgelab.paths import data_dir
from edgelab.recipe import DropExperts, Quantize, Recipe, Route
from edgelab.scheme import QuantScheme
from edgelab.shape import ModelShape, from_config

METHODS = ("rtn", "mse", "gptq", "hqq")
GROUPS = (32, 64, 0)  # weights per scale; 0: a scale per row
CHOICES = ("int2-g64", "int2-g32", "int3-g64", "int3-g32", "int4-g32")  # of a budget
_STAGES = ("compressing", "writing the bundle", "counting bytes", "answering", "done")


# ------------------------------------------------------------------------------------------------------- the board drawn


def board_figure(entries: Sequence[Entry], challenge: Challenge) -> go.Figure:
    """Memory against exact match, with its intervals: those that fit, those that don't, and the budget."""
    fig = go.Figure(layout={"template": plots.TEMPLATE, "title": {"text": "Who fits, and what that costs"}})
    for i, (name, fits) in enumerate((("fits", True), ("does not fit", False))):
        fig.add_scatter(**_points(entries, fits), name=name, mode="markers+text", textposition="top center")
        fig.data[-1].marker.update(color=plots.OKABE_ITO[(0, 3)[i]], symbol=("circle", "x")[i], size=10)
    budget = {"color": plots.INK, "dash": "dash"}
    fig.add_scatter(x=[challenge.memory_bytes / 1e6] * 2, y=[0, 100], mode="lines", name="memory that there is", line=budget)
    fig.update_xaxes(title_text="memory, MB (counted)", type="log")
    fig.update_yaxes(title_text="exact match, % (measured here)", range=[-5, 112])
    return fig


def _points(entries: Sequence[Entry], fits: bool) -> dict:
    mine = [e for e in entries if e.fits == fits]
    ends = [e.interval() for e in mine]
    return {
        "x": [round(e.memory_bytes / 1e6, 3) for e in mine],
        "y": [round(100 * e.score, 2) for e in mine],
        "text": [e.name for e in mine],
        "error_y": {
            "type": "data", "width": 4, "thickness": 1.4,
            "array": [round(100 * (high - e.score), 2) for e, (_, high) in zip(mine, ends, strict=True)],
            "arrayminus": [round(100 * (e.score - low), 2) for e, (low, _) in zip(mine, ends, strict=True)],
        },
        "hovertemplate": "%{text}: %{x} MB, %{y} %<extra></extra>",
    }  # fmt: skip


def short_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The board for a page: rank, name, exact match by task, memory, time, verdict."""
    lines = []
    for p in ranked(entries):
        e, (low, high) = p.entry, p.entry.interval()
        lines.append(
            {
                "rank": "–" if p.rank is None else str(p.rank),
                "name": e.name,
                "exact match, %": f"{100 * e.score:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                **{d: f"{100 * e.answers[d].mean():.0f}" for d in DOMAINS},
                "MB": f"{e.memory_bytes / 1e6:.2f}",
                "ms (modelled)": f"{e.ms_per_token:.1f}",
                "verdict": e.verdict if not e.fits else p.told,
            }
        )
    return lines


def task_rows(challenge: Challenge) -> list[dict[str, str]]:
    """The device before and after it was scaled, and what of its memory is left for weights."""
    from edgelab.device import device, engineering

    whole, small = device(challenge.device), challenge.profile
    lines = [
        {
            "number": name,
            whole.title: engineering(a.value, a.unit),
            f"here, 1/{challenge.scale:g}": engineering(b.value, b.unit),
            "known": a.how,
        }
        for name, a, b in (
            ("memory that an app gets", whole.usable_bytes, small.usable_bytes),
            ("bandwidth of the memory", whole.dram_bytes_per_s, small.dram_bytes_per_s),
            ("int8 operations of the cores", whole.cpu_int8_ops_per_s, small.cpu_int8_ops_per_s),
        )
        if a is not None and b is not None
    ]
    return lines


# --------------------------------------------------------------------------------------------------------------- refusals


def cheats(capstone: Capstone, entry: Entry) -> list[dict[str, str]]:
    """What `submit` says to four dishonest submissions made of the bundle of `entry`; the board stays as it is."""
    import torch

    good = capstone.folder / entry.folder
    question = next(r for r in capstone.items if r["domain"] == "assistant")
    ids = capstone.tokenizer(question["prompt"] + question["answer"] + capstone.tokenizer.eos_token, return_tensors="pt")["input_ids"]
    seen = [torch.cat([ids] * 4, 1)]
    recipe = Recipe.uniform("int2-g32", method="gptq")
    tries = {
        "a bit of the weights turned after the bundle was written": _turned,
        "a manifest that claims half of the bytes": _halved,
        "weights that nothing accounts for, in a file of its own": _hidden,
    }
    lines = []
    for what, damage in tries.items():
        with tempfile.TemporaryDirectory(prefix="edgelab-capstone-") as place:
            folder = Path(place) / "bundle"
            shutil.copytree(good, folder)
            damage(folder)
            lines.append({"submission": what, "what happened": _outcome(lambda folder=folder: capstone.submit(folder, "dishonest"), place)})
    said = _outcome(lambda: capstone.submit(recipe, "dishonest", calibration=seen), "")
    return [*lines, {"submission": "calibration text that holds a question", "what happened": said}]


def _outcome(action: Callable, place: str) -> str:
    try:
        action()
    except (ValueError, FileNotFoundError) as error:
        return f"refused: {str(error).replace(place, '...') if place else error}"
    return "ACCEPTED"


def _turned(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    with open(file, "r+b") as f:
        f.seek(-1, 2)
        last = f.read(1)[0]
        f.seek(-1, 2)
        f.write(bytes([last ^ 1]))


def _halved(folder: Path) -> None:
    """The coverage says half of the bytes for every weight; the files' hashes stay right, for the manifest is not among them."""
    from edgelab.bundle import MANIFEST

    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for row in manifest["coverage"]["rows"]:
        row["predicted_bytes"] //= 2
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _hidden(folder: Path) -> None:
    """One more file of tensors, listed with its right hash."""
    from safetensors.numpy import save_file

    from edgelab.bundle import MANIFEST

    file = folder / "more.safetensors"
    save_file({"answers": np.zeros(1000, np.float32)}, file)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- the form


class SubmitControl:
    """A form of a recipe: model, experts kept, experts per token, method, bits, group, a budget of bits; and a button that submits it.

    `choose` sets inputs from code, `submit` does what the button does. Errors stand in the form, and in `error`.
    """

    def __init__(self, capstone: Capstone) -> None:
        self._capstone = capstone
        self._configs = {m: json.loads((data_dir() / m / "config.json").read_text(encoding="utf-8")) for m in MODELS}
        self.error: Exception | None = None
        self._busy = False
        style, wide = {"description_width": "10em"}, {"width": "21em"}
        number = {"style": style, "layout": {"width": "16em"}}
        self.name = w.Text("my first", description="name of the entry", style=style, layout={"width": "25em"})
        self.model = w.Dropdown(options=MODELS, description="model", style=style, layout=wide)
        self.method = w.Dropdown(options=METHODS, value="gptq", description="method", style=style, layout=wide)
        self.group = w.Dropdown(
            options=[("32 weights", 32), ("64 weights", 64), ("a row", 0)], description="one scale per", style=style, layout=wide
        )
        self.bits = w.BoundedIntText(2, min=2, max=8, description="bits", **number)
        self.budget = w.BoundedFloatText(0.0, min=0.0, max=8.0, step=0.05, description="budget of bits", **number)
        self.experts = w.BoundedIntText(16, min=1, max=16, description="experts kept", **number)
        self.top_k = w.BoundedIntText(2, min=1, max=4, description="experts per token", **number)
        pairs = []
        for box in (self.bits, self.budget, self.experts, self.top_k):
            kind = w.FloatSlider if box is self.budget else w.IntSlider
            slider = kind(box.value, min=box.min, max=box.max, step=box.step, readout=False, layout={"width": "12em"})
            w.link((box, "value"), (slider, "value"))
            pairs.append(w.HBox([box, slider]))
        self.button = w.Button(description="submit", button_style="primary", tooltip="compress, weigh and score this recipe")
        self.bar = w.IntProgress(0, min=0, max=len(_STAGES), description="progress", layout={"width": "12em"})
        self.stage = w.HTML("")
        self.plan, self.sentence, self.table = w.HTML(), w.HTML(), w.HTML(layout={"max_width": "100%", "overflow": "auto"})
        self.figure = go.FigureWidget(board_figure(capstone.board.entries, capstone.challenge))
        self.figure._config = self.figure._config | PLOT
        self.form = w.VBox([self.name, w.HBox([self.model, self.method, self.group], layout={"flex_flow": "row wrap"}), *pairs])
        for widget in (self.model, self.method, self.group, self.bits, self.budget, self.experts, self.top_k):
            widget.observe(lambda _: self._changed(), "value")
        self.button.on_click(lambda _: self.submit())
        self._changed()
        self._draw()

    # ------------------------------------------------------------------------------------------------------ the choice

    def choose(self, **values) -> Recipe | None:
        """Sets inputs by name (`bits=3`) and returns the recipe; None where it is none (then `error` says why)."""
        inputs = ("name", "model", "method", "group", "bits", "budget", "experts", "top_k")
        for key, value in values.items():
            if key not in inputs:
                raise ValueError(f"{key}={value!r} is not an input; there are {', '.join(inputs)}")
            box = getattr(self, key)
            if isinstance(box, w.BoundedIntText | w.BoundedFloatText) and not box.min <= value <= box.max:
                raise ValueError(f"{key}={value!r} must be from {box.min:g} to {box.max:g}")
            if isinstance(box, w.Dropdown) and value not in [o[1] if isinstance(o, tuple) else o for o in box.options]:
                raise ValueError(f"{key}={value!r} is not offered; there are {', '.join(str(o) for o in box.options)}")
        self._busy = True
        try:
            for key, value in values.items():
                getattr(self, key).value = value
        finally:
            self._busy = False
        self._changed()
        return self.recipe() if self.error is None else None

    @property
    def mixture(self) -> bool:
        return "n_routed_experts" in self._configs[self.model.value]

    def scheme(self) -> QuantScheme:
        """The scheme that bits and group stand for; hqq finds offsets, so its scheme has one."""
        offset = "u" if self.method.value == "hqq" else ""
        return QuantScheme.parse(f"{offset}int{self.bits.value}-{f'g{self.group.value}' if self.group.value else 'row'}")

    def recipe(self) -> Recipe:
        """The recipe that the inputs stand for. Raises ValueError where there is none."""
        from edgelab.recipe import Rtn

        steps: list = []
        if self.mixture and self.experts.value < (all_of := self._configs[self.model.value]["n_routed_experts"]):
            steps.append(DropExperts(1 - self.experts.value / all_of))
        if self.mixture and self.top_k.value != self._configs[self.model.value]["num_experts_per_tok"]:
            if self.top_k.value > self.experts.value:
                raise ValueError(f"experts per token={self.top_k.value} is more than the experts kept, {self.experts.value}; lower it")
            steps.append(Route(top_k=self.top_k.value))
        method = Rtn(mse_grid=24) if self.method.value == "mse" else self.method.value
        settings: dict = {"method": method}
        if self.budget.value:
            if self.method.value == "hqq":
                raise ValueError(
                    "hqq finds offsets, and the schemes of a budget have none; choose gptq, mse or rtn, or set the budget to 0"
                )
            settings |= {"budget": self.budget.value, "choices": CHOICES}
        rules = (("@router", None), ("*", self.scheme()))
        return Recipe((*steps, Quantize(rules, **settings)))

    def shape(self) -> ModelShape:
        """What the model would be, from shapes and schemes alone."""
        config = dict(self._configs[self.model.value])
        if self.mixture:
            config |= {"n_routed_experts": self.experts.value, "num_experts_per_tok": min(self.top_k.value, self.experts.value)}
        return from_config(config, self.budget.value or self.scheme(), name=self.model.value)

    def _changed(self) -> None:
        if self._busy:
            return
        self.experts.disabled = self.top_k.disabled = not self.mixture
        self.bits.disabled = bool(self.budget.value)
        try:
            self.recipe()
            self.plan.value = f'<p aria-live="polite">{escape(self.planned)}</p>'
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self._failed(error, self.plan)
        self.button.disabled = self.error is not None

    def _failed(self, error: Exception, place: w.HTML) -> None:
        self.error = error
        place.value = f'<p role="alert"><b>{type(error).__name__}:</b> {escape(str(error))}</p>'

    @property
    def planned(self) -> str:
        """What the choice would take, in a sentence (modelled)."""
        shape, challenge = self.shape(), self._capstone.challenge
        memory, ms = challenge.needs(shape), 1e3 / challenge.predict(shape).decode.value
        wrong = challenge.why_not(memory, ms)
        verdict = "it would fit" if not wrong else f"it would not fit: {'; '.join(wrong)}"
        return (
            f"Before anything runs (modelled): weights {shape.weight_bytes / 1e6:.2f} MB, with cache and working memory "
            f"{memory / 1e6:.2f} of {challenge.memory_bytes / 1e6:.2f} MB, {ms:.1f} of {challenge.ms_per_token:g} ms per token: {verdict}."
        )

    # ------------------------------------------------------------------------------------------------------ submitting

    def submit(self) -> Entry | None:
        """Does what the button does: the entry, or None when it was refused (then `error` says why)."""
        self.button.disabled, self.bar.value = True, 0
        self.sentence.value = ""
        try:
            entry = self._capstone.submit(self.recipe(), self.name.value, model=self.model.value, stage=self._at)
            self.error = None
        except Exception as error:
            self._failed(error, self.sentence)
            self.stage.value, self.bar.value = "stopped", 0
            return None
        finally:
            self.button.disabled = False
        self._draw()
        self.sentence.value = f'<p aria-live="polite">{escape(self.told(entry))}</p>'
        return entry

    def _at(self, stage: str) -> None:
        self.bar.value = _STAGES.index(stage) + 1
        self.stage.value = f'<span aria-live="polite">{escape(stage)}</span>'

    def told(self, entry: Entry) -> str:
        """What became of an entry, in a sentence."""
        low, high = entry.interval()
        place = next(p for p in self._capstone.board.places() if p.entry.name == entry.name)
        rank = f"rank {place.rank}; {place.told}" if place.rank else entry.verdict
        tasks = ", ".join(f"{100 * entry.answers[d].mean():.0f} % of {d}" for d in DOMAINS)
        return (
            f"{entry.name}: {100 * entry.score:.1f} % [{100 * low:.1f}, {100 * high:.1f}] right ({tasks}), "
            f"{entry.memory_bytes / 1e6:.2f} MB, {entry.ms_per_token:.1f} ms per token (modelled): {rank}. It took {entry.seconds:.0f} s."
        )

    def _draw(self) -> None:
        entries = self._capstone.board.entries
        with self.figure.batch_update():
            for trace, fits in zip(self.figure.data, (True, False), strict=False):
                trace.update(_points(entries, fits))
        self.table.value = html_table.lines(short_rows(entries), self._capstone.board.say())

    def _repr_mimebundle_(self, **kwargs) -> dict:
        run = w.HBox([self.button, self.bar, self.stage])
        box = frame(self.form, self.plan, run, self.sentence, self.figure, self.table)
        return box._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A form of a recipe with a button that submits it, which needs a running notebook. {self._capstone.board.say()}"


# ------------------------------------------------------------------------------------------------------------- exercises


def needs(weight_bytes: float, layers: int, kv_bytes: float, context: int, hidden: int, inner: int, vocab: int, chunk: int) -> float:
    """Bytes in memory, by `Challenge.needs`: weights, keys and values, working memory."""
    shape = ModelShape(
        "by hand", layers=layers, hidden=hidden, inner=inner, vocab=vocab, dense_bytes=weight_bytes, embedding_bytes=0.0, dense_weights=1,
        kv_bytes_per_token_layer=kv_bytes, attention_ops=0.0,
    )  # fmt: skip
    return Challenge(context=context, prompt=chunk).needs(shape)


def check_needs(answer) -> Verdict:
    """Exercise 1: a function of eight numbers that returns the bytes in memory."""
    ours = {"layers": 4, "kv_bytes": 288.0, "context": 256, "hidden": 256, "inner": 512, "vocab": 2048, "chunk": 32}
    cases = [
        Case(
            "our mixture at 2.3 MB of weights",
            (2_300_000, *ours.values()),
            "weights + layers * kv_bytes * context + 4 bytes * (chunk * (3 hidden + 3 inner) + vocab)",
        ),
        Case(
            "a prompt read token by token",
            (2_300_000, *(ours | {"chunk": 1}).values()),
            "the logits are of one row, whatever the chunk: vocab is not multiplied",
        ),
        Case("a long context", (2_300_000, *(ours | {"context": 4096}).values()), "the cache grows with the context, in every layer"),
        Case("no weights at all", (1, *ours.values()), "cache and working memory stay"),
        Case(
            "another model: 7 layers, hidden 96, inner 352, a vocabulary of 5,000, 80 bytes of cache",
            (310_000, 7, 80.0, 100, 96, 352, 5000, 16),
            "use every argument: nothing here is as in the mixture",
        ),
    ]
    form = "a function of weight_bytes, layers, kv_bytes, context, hidden, inner, vocab and chunk that returns bytes"
    return check_function(
        answer, needs, cases, form, "what `Challenge.needs` counts: bits shrink only the first of the three", tolerance=1e-9
    )


def paired(one: Sequence[int], other: Sequence[int], draws: np.ndarray) -> tuple[float, float, float]:
    """(difference of the shares of right answers, low, high): a paired bootstrap over the same items, 95 %."""
    d = np.asarray(one, float) - np.asarray(other, float)
    low, high = np.quantile(np.asarray(draws) @ d / len(d), [0.025, 0.975])
    return float(d.mean()), float(low), float(high)


def check_paired(answer) -> Verdict:
    """Exercise 2: a function of (one, other, draws) that returns (difference, low, high)."""
    rng = np.random.default_rng(12)
    a = (rng.random(120) < 0.95).astype(int)
    near = np.where(rng.random(120) < 0.03, 1 - a, a)
    apart = (rng.random(120) < 0.6).astype(int)
    draws = rng.multinomial(120, np.full(120, 1 / 120), size=400)
    small = (np.array([1, 1, 1, 0]), np.array([1, 0, 1, 0]), np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 1, 0], [1, 2, 0, 1]]))
    cases = [
        Case(
            "four items and four draws",
            small,
            "the differences item by item first; row r of draws says how often each item counts in resample r",
        ),
        Case(
            "two that agree on nearly all of 120 items",
            (a, near, draws),
            "the same draw for both: they answered the same items, so the items' luck cancels",
        ),
        Case("two that differ", (a, apart, draws), "95 %: 2.5 % are cut off at either end"),
        Case("a better second one", (apart, a, draws), "one minus other: negative here"),
    ]
    form = "a function of two lists of 0 and 1 and an array of draws [resamples, items] that returns (difference, low, high)"
    praise = "if low is above 0, the first one is significantly better"
    return check_function(answer, paired, cases, form, praise, parts=("difference", "low end", "high end"), tolerance=1e-9)


def ranks_of(low: np.ndarray) -> list[int]:
    """Ranks of entries, best first, when `low[i][j]` is the low end of the interval of (score i - score j)."""
    found, head = [], 0
    for i in range(len(low)):
        if i and low[head][i] > 0:
            head = i
        found.append(head + 1)
    return found


def check_ranks(answer) -> Verdict:
    """Exercise 3: a function of the low ends [n, n] of all differences that returns the ranks."""
    none = np.full((3, 3), -0.01)
    ladder = np.triu(np.full((3, 3), 0.02), 1)
    chain = np.array([[0, -0.01, 0.02, 0.03], [0, 0, -0.01, 0.02], [0, 0, 0, -0.01], [0, 0, 0, 0]])
    exact = np.array([[0.0, 0.0], [0.0, 0.0]])
    cases = [
        Case("three that can't be told apart", (none,), "none is significantly better than another: all share rank 1"),
        Case("three that all differ", (ladder,), "each is significantly behind the one above: 1, 2, 3"),
        Case(
            "a chain: each like its neighbour, the ends different",
            (chain,),
            "compare with the FIRST of the rank, not with the neighbour: 1, 1, 3, 3",
        ),
        Case(
            "a third one that only the second one beats",
            (np.array([[0, -0.01, -0.01], [0, 0, 0.01], [0, 0, 0]]),),
            "the FIRST of the rank alone counts, whatever others of the rank are better: 1, 1, 1",
        ),
        Case("a difference that is small and certain", (np.array([[0, 1e-4], [0, 0]]),), "above 0 is enough, however little"),
        Case("a low end of exactly 0", (exact,), "an interval that touches 0 shows no difference"),
        Case("one entry", (np.zeros((1, 1)),), "who is alone is first"),
    ]
    form = "a function of an array low[i][j] (entries best first) that returns a list of ranks"
    return check_function(answer, ranks_of, cases, form, "the ranks of the board; two who share a rank leave a gap behind them")


def most_experts(challenge: Challenge, scheme: str | float, room: Callable[[ModelShape], float] | None = None) -> int:
    """The largest number of experts kept with which the mixture fits in `scheme`, by shapes alone; 0 for none. `room`: bytes that count."""
    config = json.loads((data_dir() / "edge-moe" / "config.json").read_text(encoding="utf-8"))
    room = room or challenge.needs
    return max(
        (k for k in range(2, 17) if room(from_config(config | {"n_routed_experts": k}, scheme)) <= challenge.memory_bytes), default=0
    )


def check_most_experts(answer) -> Verdict:
    """Exercise 4: how many experts per mixture fit in int3-g32."""
    if answer is None:
        return unanswered("a whole number of experts")
    given = numbers(answer, 1)
    if given is None:
        return not_yet("one number, please")
    challenge = Challenge()
    true, twos, fours = (most_experts(challenge, s) for s in ("int3-g32", "int2-g32", "int4-g32"))
    if given[0] == true:
        return right(f"{true} of 16; two bits leave room for {twos}, four for {fours}")
    hints = {
        most_experts(challenge, 3.0): "each group of 32 has a scale of 16 bits: 3.5 bits per weight, not 3",
        most_experts(challenge, "int3-g32", lambda shape: shape.weight_bytes): "cache and working memory take their share, too",
        true + 1: "with one more it does not fit: look at the sentence below the form",
        16: "all of them fit in two bits, not in three",
    }
    return hint(
        given[0], hints, "set the form to rtn, 3 bits, a scale per 32, no budget; turn the experts kept, and read the sentence", 1e-6
    )
