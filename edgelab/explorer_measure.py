"""Two panels of the explorer: the recipe of the chosen row, to take away, and the same row made and measured on this machine.

The measurement runs in a process of its own (`measure_here`), a thread reads what it says. A measured point is `measured here`; it agrees
with the stored row when both have the same size and the same qualities up to rounding: the documents are the same ones, so the stored
interval, which is about other documents, is no tolerance for a rerun.
"""

import json
import threading
from collections.abc import Callable, Sequence
from html import escape
from math import isfinite

import ipywidgets as w

from edgelab import explorer_words as say
from edgelab.explorer_controls import Live
from edgelab.explorer_plots import Mark
from edgelab.measure_here import Here, Job
from edgelab.sweep_table import METRICS, STORED, Sweep
from edgelab.tradeoff import View

# selects the text of the box before the button and copies it: on localhost and elsewhere, without a network and without a library
_COPY = (
    "const b = this, t = b.parentElement.querySelector('textarea'); t.focus(); t.select(); "
    "const done = document.execCommand('copy'); b.nextElementSibling.textContent = done ? 'copied' : 'press Ctrl+C'; b.focus();"
)


def recipe_python(sweep: Sweep, row: int) -> str:
    """Python that makes row `row` again: a model with its codes, in memory."""
    protocol = dict(sweep.meta.get("protocol", {}))
    tokens = protocol.get("calibration_tokens", 8192)
    recipe = json.dumps(json.loads(sweep["recipe"][row]), separators=(",", ":"))
    return f"""from edgelab import Recipe, compress, corpus, data
from edgelab.model import dequantize, load, load_tokenizer
from edgelab.paths import data_dir

recipe = Recipe.from_json({recipe!r})
model = load(data_dir() / {str(sweep["model"][row])!r})
dequantize(model)  # a recipe starts from floating point; does nothing to a model that has it
calibration = data.calibration_batches(load_tokenizer(data_dir() / "edge-moe"), corpus()["calibration"], tokens={int(tokens)})
small = compress(model, recipe, calibration=calibration)
small.coverage.predicted_bytes  # {int(sweep["size_bytes"][row]):,} in the sweep
"""


class RecipePanel:
    """The recipe's JSON and the Python that reproduces the row, each in a box with a button that copies it."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.recipe, self.python = w.HTML(layout={"width": "auto"}), w.HTML(layout={"width": "auto"})
        self.text, self.code = "", ""
        self.box = w.VBox([self.recipe, self.python], layout={"width": "100%"})

    def show(self, row: int | None) -> None:
        """The recipe of `row`, or that there is none."""
        if row is None:
            self.text = self.code = ""
            self.recipe.value, self.python.value = say.said("Nothing is chosen."), ""
            return
        self.text = json.dumps(json.loads(self._sweep["recipe"][row]), indent=1)
        self.code = recipe_python(self._sweep, row)
        self.recipe.value = _copyable("recipe as JSON", self.text, 8)
        self.python.value = _copyable("Python that reproduces it", self.code, 11)


def _copyable(name: str, text: str, rows: int) -> str:
    box = (
        f'<textarea readonly aria-label="{escape(name)}" rows="{rows}" spellcheck="false" style="width:100%;box-sizing:border-box;'
        "font-family:var(--jp-code-font-family, monospace);font-size:0.85em;background:var(--jp-layout-color1, Canvas);"
        f'color:var(--jp-content-font-color1, CanvasText)">{escape(text)}</textarea>'
    )
    button = f'<button type="button" class="jupyter-button" style="width:auto" onclick="{escape(_COPY)}">copy {escape(name)}</button>'
    return f'<div>{box}{button} <span role="status"></span></div>'


class MeasurePanel:
    """Makes and measures the chosen row on this machine. `measured` {id: Here}; `arrived` is called when one has come in.

    `command`: another program than `measure_here`, for tests. `lock`: held while the thread that reads writes to widgets.
    """

    def __init__(self, sweep: Sweep, arrived: Callable[[], None], command: Sequence[str] | None = None, *, lock=None) -> None:
        self._lock = lock if lock is not None else threading.RLock()
        self._sweep, self._arrived, self.command = sweep, arrived, command
        self.measured: dict[str, Here] = {}
        self.error: Exception | None = None
        self._row: int | None = None
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._running = False
        self._last: Here | None = None
        self.button = w.Button(description="measure this one now", button_style="primary", layout={"width": "auto"})
        self.stop = w.Button(description="cancel", disabled=True, layout={"width": "auto"})
        self.progress = w.FloatProgress(0.0, min=0.0, max=1.0, description="progress", style={"description_width": "initial"})
        self.status, self.table = Live(), w.HTML()
        line = w.HBox([self.button, self.stop, self.progress], layout={"flex_flow": "row wrap", "align_items": "center"})
        self.box = w.VBox([line, self.status, self.table], layout={"width": "100%"})
        self.button.on_click(lambda _: self._clicked())
        self.stop.on_click(lambda _: self.cancel())

    @property
    def busy(self) -> bool:
        return self._running

    def show(self, row: int | None) -> None:
        """Speak of `row`: the one that would be measured."""
        if row != self._row:
            self._row = row
            if not self.busy:
                self._tell()
        self.button.disabled = self.busy or row is None

    def _clicked(self) -> None:
        try:
            self.start()
        except Exception as error:  # the reader sees it
            self._fail(error)

    def start(self) -> None:
        """Begin. Raises RuntimeError while another one runs, ValueError where nothing is chosen."""
        if self.busy:
            raise RuntimeError("a measurement is running; cancel it first, or wait")
        if self._row is None:
            raise ValueError("nothing is chosen, since nothing lies within the budgets; loosen one, or choose a configuration")
        row, self.error, self._last = self._row, None, None
        request = {
            "model": self._sweep["model"][row],
            "recipe": self._sweep["recipe"][row],
            "protocol": self._sweep.meta.get("protocol", {}),
        }
        self.button.disabled, self.stop.disabled = True, False
        self.progress.value, self.progress.bar_style = 0.0, ""
        self.status.value = say.said(f"Starting a process for {self._sweep['label'][row]} ...")
        self._job = Job(request, self.command)
        self._thread = threading.Thread(target=self._follow, args=(row, self._job), daemon=True)
        self._running = True
        self._thread.start()

    def _follow(self, row: int, job: Job) -> None:
        label = self._sweep["label"][row]
        try:
            for share, step in job.steps():
                with self._lock:
                    self.progress.value = share
                    self.status.value = say.said(f"{label}: {step} ...")
            if job.cancelled:
                with self._lock:
                    self.progress.value = 0.0
                    self.status.value = say.said(f"Cancelled; nothing of {label} is kept.")
                return
            with self._lock:
                self.progress.value, self.progress.bar_style = 1.0, "success"
                self.measured[self._sweep["id"][row]] = self._last = job.result
                self._tell()
                self._arrived()
        except Exception as error:  # the reader sees it
            with self._lock:
                self._fail(error)
        finally:
            with self._lock:
                self._running = False
                self.stop.disabled, self.button.disabled = True, self._row is None

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.progress.bar_style = "danger"
        self.status.value = say.alert(error)

    def cancel(self) -> None:
        """End what runs, at once; nothing happens if nothing does."""
        if self._job is not None and self.busy:
            self._job.cancel()

    def wait(self, timeout: float = 600.0) -> Here | None:
        """What was measured, once it is there; None if it was cancelled or failed. Raises TimeoutError."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self.busy:
                raise TimeoutError(f"still measuring after {timeout:g} s")
        return self._last

    # --------------------------------------------------------------------------------------------------------- telling

    def _tell(self) -> None:
        row = self._row
        here = None if row is None else self.measured.get(self._sweep["id"][row])
        if here is None:
            what = (
                "Nothing is chosen."
                if row is None
                else (
                    f"{self._sweep['label'][row]}: not measured here yet. The recipe is run on the original, the same documents read, "
                    f"and the kernels write tokens. The sweep took {self._sweep['seconds'][row]:.0f} s for its part, on one thread."
                )
            )
            self.status.value, self.table.value = say.said(what), ""
            return
        self.status.value = say.said(agreement(self._sweep, row, here))
        self.table.value = say.table(
            here_rows(self._sweep, row, here), f"{self._sweep['label'][row]}, {here.machine}, {here.seconds:.0f} s"
        )

    def marks(self, view: View) -> list[Mark]:
        """The points of what was measured here, on the explorer's axes; a metric of one domain has none."""
        m, found = view.quality.metric, []
        for id, here in self.measured.items():
            row = self._sweep.index(id)
            if m.name in here.values and view.rows[row]:
                text = (
                    f"measured here: {self._sweep['label'][row]}: {say.megabytes(here.size_bytes)}, {m.title} {m.said(here.values[m.name])}"
                )
                time = here.ms_per_token if isfinite(here.ms_per_token) else None
                if time is not None:
                    text += f", {say.milliseconds(time)} per token on this machine (not on the chosen device)"
                found.append(Mark("measured here", here.size_bytes / 1e6, time, here.values[m.name], text=text))
        return found


SAME, INSIDE, DIFFERS = "same", "inside the interval, not the same run", "differs"
RELATIVE = 1e-2  # of KL divergence and bits per byte: what another order of adding up makes of a rounding that hangs on a tie


def agrees(sweep: Sweep, row: int, here: Here) -> dict[str, str]:
    """{"size_bytes" and each stored metric: `SAME`, `INSIDE` or `DIFFERS`}.

    The same: equal bytes; KL divergence and bits per byte to 1 part in 100; exact match to one answer. Inside: not that, but within the
    stored 95 % interval, which is what other documents might give: on these documents it is another result.
    """
    found = {"size_bytes": SAME if here.size_bytes == int(sweep["size_bytes"][row]) else DIFFERS}
    for name in STORED:
        value, low, high = (float(sweep[name + end][row]) for end in ("", "_low", "_high"))
        m, got = METRICS[name], float(here.values[name])
        answers = sum(d.domain in m.domains for d in sweep.answers)
        slack = 1 / max(answers, 1) + 1e-9 if m.kind == "exact" else RELATIVE * abs(value) + 1e-6
        if abs(got - value) <= slack:
            found[name] = SAME
        else:
            found[name] = INSIDE if low <= got <= high else DIFFERS  # NaN is no interval
    return found


def agreement(sweep: Sweep, row: int, here: Here) -> str:
    """Whether it agrees, in a sentence."""
    found = agrees(sweep, row, here)
    named = {n: "the size" if n == "size_bytes" else METRICS[n].title for n in found}
    off, near = ([named[n] for n, verdict in found.items() if verdict == which] for which in (DIFFERS, INSIDE))
    differ = sum(bool(a) != bool(b) for a, b in zip(here.exact, sweep.doc_exact[row], strict=False))
    said = f"{sweep['label'][row]}, measured here: "
    if off:
        said += f"differs from the stored row in {', '.join(off)}"
    elif not near:
        said += "agrees with the stored row"
    else:
        said += "not the same run as the stored row"
    if near:
        said += f" ({', '.join(near)}: inside the interval, not the same)"
    said += f"; {differ} of {len(here.exact)} answers turned out otherwise"
    speed = (
        f"{say.milliseconds(here.ms_per_token)} per token on one thread of this machine"
        if isfinite(here.ms_per_token)
        else (f"no decoding time: {here.no_speed}")
    )
    return f"{said}; {speed}."


def here_rows(sweep: Sweep, row: int, here: Here) -> list[dict[str, str]]:
    """Here against the stored row, a dict of text per number."""
    ok = agrees(sweep, row, here)
    lines = [{"number": "size", say.HERE: say.megabytes(here.size_bytes), say.BUILD: say.megabytes(sweep["size_bytes"][row]),
              "verdict": ok["size_bytes"]}]  # fmt: skip
    for name in STORED:
        m = METRICS[name]
        stored = f"{m.said(sweep[name][row])} [{m.said(sweep[name + '_low'][row])}, {m.said(sweep[name + '_high'][row])}]"
        lines.append({"number": m.title, say.HERE: m.said(here.values[name]), say.BUILD: stored, "verdict": ok[name]})
    time = say.milliseconds(here.ms_per_token) if isfinite(here.ms_per_token) else here.no_speed
    about = f"per token, {here.context} tokens in the cache, {here.threads} thread"
    return [*lines, {"number": about, say.HERE: time, say.BUILD: "", "verdict": ""}]
