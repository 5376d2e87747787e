"""The trade-off explorer: which configuration of a stored sweep is small, fast and good enough, and what can be known of it.

    Explorer()                         the stored sweep; `choose` does from code what the controls do by hand
    .state, .view                      the controls as a `tradeoff.State`, and what it shows (`tradeoff.view`)
    .compared                          A against B, with the verdict of significance
    .measure() / .cancel()             the chosen configuration made and measured here, in a process of its own
    .static()                          the plots as plain figures, for a code host

All arithmetic is in `tradeoff`: the page without a kernel shows the same numbers for the same state. Every change of a control goes one
way: controls -> `State` -> `view` -> sentence, figure, tables. Whatever goes wrong on that way is shown in place and kept in `error`.

Two modes, since plotly loses selections while it looks for what to hover: *inspect* (hovering tells, a click chooses a row) and *brush*
(dragging selects rows; the other plot shows the same ones). What the mouse does, controls do too: the list of configurations chooses,
budgets cut off a region, and every slider has a number box.
"""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from math import isfinite

import ipywidgets as w
import numpy as np
import plotly.graph_objects as go

from edgelab import explorer_words as say
from edgelab import plots, tradeoff
from edgelab.device import CLASSES, devices
from edgelab.explorer_controls import Budget, Fit, Live
from edgelab.explorer_measure import MeasurePanel, RecipePanel
from edgelab.explorer_plots import COLOURED_BY, ROLE_COLOURS, ROLE_SYMBOLS, SYMBOLS, Mark, Picture, colours, layers_of, said, scale
from edgelab.frame import frame
from edgelab.sweep_table import FILTERS, METRICS, Sweep
from edgelab.tradeoff import OBJECTIVES, PRESETS, State

PANELS = ("front", "layers", "A against B", "on the device", "recipe", "measure here")
ENGINES = {"cpu": "CPU, plain kernels", "cpu-tuned": "CPU, low-bit kernels", "gpu": "GPU", "npu": "NPU"}
FILTER_NAMES = {"top_k": "top-k", "group": "weights per scale"}


class Explorer:
    """The explorer of `sweep` (a Sweep, a path, or None for data/sweep.parquet), beginning with `state`.

    Raises FileNotFoundError or ValueError for a sweep that can't be read, ValueError for a state that it does not have.
    """

    def __init__(self, sweep: Sweep | str | None = None, state: State | None = None) -> None:
        self.sweep = sweep if isinstance(sweep, Sweep) else Sweep.read(sweep)
        self.error: Exception | None = None
        self.view: tradeoff.View | None = None
        self.compared: tradeoff.Comparison | None = None
        self.brushed: np.ndarray | None = None
        self._busy = 0
        self._lock = threading.RLock()  # a measurement draws from a thread of its own
        self._event: np.ndarray | None = None  # what the traces have told so far of one brush
        self.picture = Picture(self.sweep)
        self.figure = self.picture.figure
        self._controls()
        self.recipe_panel = RecipePanel(self.sweep)
        self.measure_panel = MeasurePanel(self.sweep, self._measured, lock=self._lock)
        for name in METRICS:  # the intervals of one domain take 1,000 resamples of every row: once, before anybody waits
            tradeoff.quality_of(self.sweep, name)
        self._layout()
        self._show(self._checked(state or self._first()))
        self._changed()
        if self.error is not None:
            raise self.error
        self._watch()

    def _first(self) -> State:
        """The best exact match within a quarter of the original's bytes."""
        base = tradeoff.anchor(self.sweep)
        return State(size_limit=None if base is None else 0.25 * float(self.sweep["size_bytes"][base]))

    # ------------------------------------------------------------------------------------------------------- controls

    def _controls(self) -> None:
        style = {"description_width": "initial"}

        def dropdown(options, description: str, width: str) -> w.Dropdown:
            return w.Dropdown(options=options, description=description, style=style, layout={"width": "auto", "max_width": width})

        self.preset = dropdown([("your own question", ""), *((p.title, n) for n, p in PRESETS.items())], "question", "26em")
        self.objective = dropdown([(title, n) for n, title in OBJECTIVES.items()], "find the", "16em")
        self.metric = dropdown([(m.title, n) for n, m in METRICS.items()], "quality", "24em")
        kinds = [(f"{p.title} ({p.kind})", n) for n, p in devices().items()]
        self.device = dropdown(kinds, "device", "26em")
        self.engine = dropdown([(ENGINES[c], c) for c in CLASSES], "software", "20em")
        self.context = w.BoundedIntText(512, min=0, max=131_072, description="context, tokens", style=style, layout={"width": "13em"})
        self.size_budget, self.latency_budget, self.quality_budget = Budget("size at most, MB"), Budget("latency at most, ms"), Budget("")
        self.filters: dict[str, w.SelectMultiple] = {}
        for column in FILTERS:
            values = self.sweep.values(column)
            if len(values) > 1:
                self.filters[column] = w.SelectMultiple(
                    options=[(said(column, v), v) for v in values], description=FILTER_NAMES.get(column, column), rows=min(5, len(values)),
                    style=style, layout={"width": "auto", "min_width": "12em"},
                )  # fmt: skip
        self.clear_filters = w.Button(description="all rows", tooltip="drop every filter")
        narrow = {"button_width": "6em", "description_width": "initial"}
        self.mode = w.ToggleButtons(options=("inspect", "brush"), style=narrow, layout={"width": "auto"})
        self.colour = dropdown([(FILTER_NAMES.get(c, c), c) for c in COLOURED_BY if len(self.sweep.values(c)) > 1], "colour", "14em")
        self.row = dropdown([("the best within the budgets", "")], "configuration", "44em")
        names = ("pin as A", "pin as B", "no pins")
        self.pin_a, self.pin_b, self.unpin = (w.Button(description=name, layout={"width": "auto"}) for name in names)
        self.show_filters = w.ToggleButton(False, description="filters", icon="filter", layout={"width": "auto"})
        self.panel = w.ToggleButtons(options=PANELS, style={"button_width": "auto"}, layout={"width": "auto"})
        self.sentence, self.verdict, self.brush_sentence = Live(), Live(), Live()
        self.legend, self.layers_sentence = w.HTML(), Live()
        self.tables = {name: w.HTML(layout={"max_width": "100%"}) for name in ("front", "layers", "A against B", "on the device")}

    def _layout(self) -> None:
        def wrapped(*children, **layout) -> w.HBox:
            return w.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center", "grid_gap": "0.2em 1em"} | layout)

        budgets = wrapped(self.size_budget.row, self.latency_budget.row, self.quality_budget.row)
        self.filter_box = wrapped(*self.filters.values(), self.clear_filters, align_items="flex-start", display="none")
        self._panels = {
            "front": w.VBox([self.tables["front"]]),
            "layers": w.VBox([self.tables["layers"]]),
            "A against B": w.VBox([self.tables["A against B"]]),
            "on the device": w.VBox([self.tables["on the device"]]),
            "recipe": self.recipe_panel.box,
            "measure here": self.measure_panel.box,
        }
        self.below = w.VBox([self._panels["front"]])
        self.box = w.VBox(
            [
                wrapped(self.preset, self.objective, self.metric),
                wrapped(self.device, self.engine, self.context),
                budgets,
                wrapped(self.show_filters, w.HBox([w.Label("mouse"), self.mode]), self.colour),
                self.filter_box,
                self.sentence,
                self.brush_sentence,
                wrapped(self.row, self.pin_a, self.pin_b, self.unpin),
                self.verdict,
                self.legend,
                Fit(),
                self.figure,
                self.layers_sentence,
                w.HBox([w.Label("show"), self.panel], layout={"flex_flow": "row wrap"}),
                self.below,
            ],
            layout={"width": "100%"},
        )

    def _watch(self) -> None:
        for widget in (self.objective, self.device, self.engine, self.context, self.colour, *self.filters.values()):
            widget.observe(lambda _: self._changed(), "value")
        self.metric.observe(lambda _: self._other_metric(), "value")
        self.row.observe(lambda _: self._changed(), "value")
        self.preset.observe(lambda change: self._asked(change.new), "value")
        for budget in (self.size_budget, self.latency_budget, self.quality_budget):
            budget.changed = self._changed
        self.mode.observe(lambda _: self._moded(), "value")
        self.panel.observe(lambda _: self._changed(), "value")
        self.show_filters.observe(lambda c: setattr(self.filter_box.layout, "display", "flex" if c.new else "none"), "value")
        self.clear_filters.on_click(lambda _: self._try(lambda: self.choose(filters={})))
        self.pin_a.on_click(lambda _: self._try(lambda: self.pin("A")))
        self.pin_b.on_click(lambda _: self._try(lambda: self.pin("B")))
        self.unpin.on_click(lambda _: self._try(lambda: self.choose(pin_a="", pin_b="")))
        all_traces = [(k, trace) for traces in self.picture.points.values() for k, trace in enumerate(traces)]
        order = {id(trace): i for i, trace in enumerate(self.figure.data)}
        all_traces.sort(key=lambda pair: order[id(pair[1])])  # as plotly calls them
        for i, (k, trace) in enumerate(all_traces):
            ends = {"first": i == 0, "last": i == len(all_traces) - 1}
            trace.on_click(lambda _, points, __, k=k: self._clicked(k, points.point_inds))
            trace.on_selection(lambda _, points, __, k=k, ends=ends: self._selected(k, points.point_inds, **ends))
        all_traces[-1][1].on_deselect(lambda *_: self._brush(None))  # told to every trace: one is enough

    @contextmanager
    def _quietly(self):
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    # ------------------------------------------------------------------------------------------------- state and back

    @property
    def state(self) -> State:
        """What the controls stand for."""
        m = METRICS[self.metric.value]
        limit = self.quality_budget.limit
        size = self.size_budget.limit
        return State(
            metric=self.metric.value, device=self.device.value, engine=self.engine.value, context=self.context.value,
            objective=self.objective.value, size_limit=None if size is None else size * 1e6, latency_limit=self.latency_budget.limit,
            quality_limit=None if limit is None else limit / scale(m),
            filters=tuple((c, f.value) for c, f in self.filters.items() if f.value),
            chosen=self.row.value or "", pin_a=self._pins["A"], pin_b=self._pins["B"], from_a=self._from["A"], from_b=self._from["B"],
        )  # fmt: skip

    def _checked(self, state: State) -> State:
        """`state`, if the sweep has what it names; raises ValueError or KeyError otherwise."""
        tradeoff.select(self.sweep, dict(state.filters))
        for column, values in state.filters:
            if not values:
                raise ValueError(f"filter {column!r} allows no value, so no row would be left; leave it out to keep all")
            if column not in self.filters:
                raise ValueError(f"filter {column!r} has one value in this sweep; filter by {', '.join(self.filters)}")
        if state.context > self.context.max:
            raise ValueError(f"context={state.context:,} is more than the {self.context.max:,} tokens that the control goes to")
        tradeoff.latency(self.sweep, state.device, context=state.context, engine=state.engine)
        for id in (state.chosen, state.pin_a, state.pin_b):
            if id:
                self.sweep.index(id)
        return state

    def _show(self, state: State) -> None:
        """Set the controls to `state`."""
        with self._quietly():
            self.metric.value, self.device.value, self.engine.value = state.metric, state.device, state.engine
            self.context.value, self.objective.value = state.context, state.objective
            held = dict(state.filters)
            for column, widget in self.filters.items():
                widget.value = tuple(held.get(column, ()))
            self._pins, self._from = {"A": state.pin_a, "B": state.pin_b}, {"A": state.from_a, "B": state.from_b}
            self._offer(None, state.chosen)
            self._scales(state)

    def _scales(self, state: State) -> None:
        """Give the budgets the ends that the sweep, the device and the metric have, and the limits of `state`."""
        size = self.sweep["size_bytes"] / 1e6
        limit = state.size_limit
        self.size_budget.show(None if limit is None else limit / 1e6, size.min(), size.max(), log=True, open_high=True)
        times = tradeoff.latency(self.sweep, state.device, context=state.context, engine=state.engine).value
        times = times[np.isfinite(times)]
        ends = (float(times.min()), float(times.max())) if len(times) else (1e-3, 1.0)
        self.latency_budget.show(state.latency_limit, *ends, log=True, open_high=True)
        m = METRICS[state.metric]
        values = tradeoff.quality_of(self.sweep, state.metric).value * scale(m)
        values = values[np.isfinite(values) & ((values > 0) | (m.kind != "kld"))]
        limit = None if state.quality_limit is None else state.quality_limit * scale(m)
        unit = "%" if m.kind == "exact" else m.unit
        words = f"{m.title.split(',')[0]} at {'most' if m.better == 'lower' else 'least'}, {unit}"
        self.quality_budget.show(limit, values.min(), values.max(), log=m.kind == "kld", open_high=m.better == "lower", description=words)

    def _offer(self, view, chosen: str) -> None:
        """The list of configurations: the best, the front from the smallest, what is chosen and pinned."""
        options = [("the best within the budgets", "")]
        if view is not None:
            rows = np.flatnonzero(view.front)
            rows = rows[np.argsort(self.sweep["size_bytes"][rows], kind="stable")].tolist()
        else:
            rows = []
        extra = [self.sweep.index(id) for id in dict.fromkeys((chosen, *self._pins.values())) if id]
        for row in [*(r for r in extra if r not in rows), *rows]:
            options.append((f"{say.megabytes(self.sweep['size_bytes'][row])} · {self.sweep['label'][row]}", self.sweep["id"][row]))
        if tuple(options) != tuple(self.row.options):
            self.row.options = options
        if self.row.value != chosen:
            self.row.value = chosen

    def choose(self, preset: str | None = None, **changes) -> tradeoff.View | None:
        """Set controls and return what they show, None when that was not possible (then `error` says why).

        `preset` first, then `changes`: fields of `State`; `filters` {column: values}; `chosen`, `pin_a`, `pin_b` ids or row numbers.
        Raises ValueError or KeyError for what the sweep or the controls do not have, and leaves the controls as they were.
        """
        state = self.state if preset is None else tradeoff.apply(self.sweep, preset, self.state)
        for name in ("chosen", "pin_a", "pin_b"):
            if isinstance(changes.get(name), int | np.integer):
                changes[name] = self.sweep["id"][changes[name]]
        if "filters" in changes:
            given = dict(changes["filters"]).items()
            changes["filters"] = tuple((c, (v,) if isinstance(v, str | int | float) else tuple(v)) for c, v in given)
        pins = {name: changes.pop(name) for name in ("pin_a", "pin_b") if name in changes}
        state = self._checked(replace(state, **changes))
        if "metric" in changes and "quality_limit" not in changes and changes["metric"] != self.metric.value:
            state = replace(state, quality_limit=None)  # a limit of one metric means nothing in another
        if pins:
            state = tradeoff.pin(self.sweep, state, **pins)
        with self._lock:
            self._show(state)
            with self._quietly():
                self.preset.value = preset or ""
            self._changed()
        return self.view if self.error is None else None

    # --------------------------------------------------------------------------------------------------- what happens

    def _try(self, act) -> None:
        """Does `act`; an error is shown in place."""
        try:
            with self._lock:
                act()
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.sentence.value = say.alert(error)

    def _asked(self, preset: str) -> None:
        if not self._busy and preset:
            self._try(lambda: self.choose(preset))

    def _other_metric(self) -> None:
        if not self._busy:
            self._try(lambda: self._show(replace(self.state, quality_limit=None)))
            self._changed()

    def _clicked(self, k: int, indices) -> None:
        if indices and not self._busy:
            self._try(lambda: self.choose(chosen=int(self.picture.rows_of[k][indices[0]])))

    def _selected(self, k: int, indices, *, first: bool, last: bool) -> None:
        """One brush: plotly tells it to every trace of both plots, one after another, those of the other plot without points."""
        if first or self._event is None:
            self._event = np.zeros(len(self.sweep), bool)
        self._event[self.picture.rows_of[k][list(indices)]] = True
        if last:
            brushed, self._event = self._event, None
            self._brush(brushed)

    def brush(self, rows) -> None:
        """Select rows (numbers or bool [rows]) as a drag in brush mode does; None selects nothing."""
        if rows is not None:
            rows = np.asarray(rows)
            if rows.dtype != bool:
                mask = np.zeros(len(self.sweep), bool)
                mask[rows] = True
                rows = mask
        self._brush(rows)

    def _brush(self, brushed: np.ndarray | None) -> None:
        self.brushed = brushed
        self._try(self._draw)

    def _moded(self) -> None:
        self.picture.mode(self.mode.value == "brush")
        if self.mode.value == "inspect":
            self._brush(None)
        else:
            self._tell_brush()

    def pin(self, which: str) -> None:
        """Pin the chosen row as "A" or "B". Raises ValueError where none is chosen."""
        if which not in ("A", "B"):
            raise ValueError(f"which={which!r} must be 'A' or 'B'")
        row = self.chosen
        if row is None:
            raise ValueError("nothing is chosen, since nothing lies within the budgets; loosen one, or choose a configuration")
        self.choose(**{f"pin_{which.lower()}": row})

    @property
    def chosen(self) -> int | None:
        """The row that is looked at: the one that was chosen, or the best within the budgets; None where there is none."""
        return self.sweep.index(self.row.value) if self.row.value else self.view.best

    def _changed(self) -> None:
        if self._busy:
            return
        with self._lock:
            self._change()

    def _change(self) -> None:
        try:
            state = self.state
            if self.preset.value and not self._answers(state):
                with self._quietly():
                    self.preset.value = ""
            self.view = tradeoff.view(self.sweep, state)
            self._draw()
            with self._quietly():
                self._scales(state)
                self._offer(self.view, state.chosen)
            self.error = None
        except Exception as error:  # whatever it is, the reader sees it: a widget's traceback would vanish in a log
            self._fail(error)

    def _answers(self, state: State) -> bool:
        """Whether the controls still ask what the preset asked."""
        try:
            asked = tradeoff.apply(self.sweep, self.preset.value, state)
        except ValueError:  # the rows that are left have no original to be measured by
            return False
        same = (asked.metric, asked.objective, asked.device, asked.latency_limit) == (
            state.metric,
            state.objective,
            state.device,
            state.latency_limit,
        )
        pairs = ((asked.size_limit, state.size_limit), (asked.quality_limit, state.quality_limit))
        return same and all(a == b or (a is not None and b is not None and np.isclose(a, b, rtol=1e-9)) for a, b in pairs)

    # ------------------------------------------------------------------------------------------------------- showing

    def _draw(self) -> None:
        view, row = self.view, self.chosen
        coloured = colours(self.sweep, self.colour.value)
        self.picture.update(view, coloured, self._marks(), row, self.brushed)  # first: it is what takes the page longest
        among = view.inside if view.best is not None else None
        self.rivals = np.zeros(0, int) if among is None else tradeoff.rivals(self.sweep, view.best, among, view.state.metric)
        self.sentence.value = say.said(say.found_said(self.sweep, view, self.rivals))
        self.legend.value = self._legend(coloured)
        self._tell_brush()
        self._compare()
        if row is not None:
            held = layers_of(self.sweep, row)
            chips = [f"{say.SIGNS[ROLE_SYMBOLS[r]]} {say.dot(ROLE_COLOURS[r], r)}" for r in held.megabytes]
            self.layers_sentence.value = say.legend(["<b>weights</b>", *chips]) + say.said(say.layers_said(self.sweep, row, held))
        else:
            self.layers_sentence.value = ""
        self._panel(row)

    def _panel(self, row: int | None) -> None:
        name, view = self.panel.value, self.view
        if self.below.children != (self._panels[name],):
            self.below.children = (self._panels[name],)
        if name == "front":
            total = int(view.front.sum())
            shown = say.front_rows(self.sweep, view)
            caption = f"The front of quality, size and latency{'' if len(shown) == total else f', {len(shown)} of {total} rows'}"
            self.tables[name].value = say.table(shown, caption)
        elif name == "layers" and row is not None:
            self.tables[name].value = say.table(
                say.layer_rows(layers_of(self.sweep, row)), "MB and median relative error, measured at build"
            )
        elif name == "on the device" and row is not None:
            s = view.state
            found = tradeoff.prediction(self.sweep, row, s.device, context=s.context, engine=s.engine)
            self.tables[name].value = say.table(found.table(), f"{found.model} on {devices()[s.device].title}, {s.engine}, modelled")
        elif name == "recipe":
            self.recipe_panel.show(row)
        self.measure_panel.show(row)

    def _marks(self) -> list[Mark]:
        view, marks = self.view, []
        best = [("best", view.best)] if view.best is not None else []
        looked = [("chosen", self.chosen)] if self.chosen is not None else []
        pins = [(name, self.sweep.index(id)) for name, id in self._pins.items() if id]
        for kind, row in best + looked + pins:
            q, late = view.quality, view.latency
            ends = (float(late.low[row]), float(late.high[row])) if isfinite(late.low[row]) else (None, None)
            marks.append(Mark(kind, float(self.sweep["size_bytes"][row] / 1e6), float(late.value[row]), float(q.value[row]),
                              float(q.low[row]), float(q.high[row]), *ends,
                              text=f"{kind}: {say.row_said(self.sweep, view, row)}"))  # fmt: skip
        return marks + self.measure_panel.marks(view)

    def _legend(self, coloured) -> str:
        parts = [f"<b>{escape(FILTER_NAMES.get(coloured.column, coloured.column))}</b>"]
        parts += [f"{say.SIGNS[SYMBOLS[i % len(SYMBOLS)]]} {say.dot(plots.OKABE_ITO[i], n)}" for i, n in enumerate(coloured.names)]
        parts.append("line: the front; dotted: budgets; grey: outside of the budgets")
        if self.measure_panel.marks(self.view):
            parts.append("x: measured here, in the plot of size alone, for its time is this machine's")
        return say.legend(parts)

    def _tell_brush(self) -> None:
        if self.mode.value != "brush" and self.brushed is None:
            self.brush_sentence.value = ""
            return
        self.brush_sentence.value = say.said(say.brush_said(self.sweep, self.view, self.brushed))

    def _compare(self) -> None:
        a, b = self._pins["A"], self._pins["B"]
        if not (a and b):
            self.compared = None
            what = (
                "Pin two configurations, A and B, to ask whether their difference is more than chance."
                if not (a or b)
                else (f"{'A' if a else 'B'} is {self.sweep['label'][self.sweep.index(a or b)]}; pin another as {'B' if a else 'A'}.")
            )
            self.verdict.value = say.said(what)
            self.tables["A against B"].value = ""
            return
        state = self.view.state
        self.compared = tradeoff.compare(self.sweep, a, b, state.metric, picked_from=state.searched)
        self.verdict.value = say.said(self.compared.said)
        if self.panel.value == "A against B":
            self.tables["A against B"].value = say.table(
                say.compared_rows(self.sweep, a, b), "A against B, on the same documents, measured at build"
            )

    # ------------------------------------------------------------------------------------------------- measuring here

    def _measured(self) -> None:
        """A measurement has come in: show its point."""
        self._try(self._draw)

    def measure(self, row: int | str | None = None, *, wait: bool = True, timeout: float = 600.0):
        """Make and measure a configuration here (the chosen one unless `row` names another), and overlay its point.

        Returns what was measured, None when it was cancelled or went wrong (the panel says why); at once with `wait=False`.
        """
        if row is not None:
            self.choose(chosen=row)
        self.measure_panel.show(self.chosen)
        self.measure_panel.start()
        return self.measure_panel.wait(timeout) if wait else None

    def cancel(self) -> None:
        """Stop the measurement that runs."""
        self.measure_panel.cancel()

    # ------------------------------------------------------------------------------------------------------ elsewhere

    @property
    def told(self) -> str:
        """What is shown, in a sentence."""
        return say.found_said(self.sweep, self.view, self.rivals)

    def static(self, most: int = 400) -> list[go.Figure]:
        """The two upper plots as plain figures of a few kilobytes, for `plots.show`: the front and the marks, and `most` of the points."""
        return self.picture.static(self.view, self._marks(), most)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The controls, the sentences, the figure, the tables; where no widget can be shown, the sentence."""
        # a page that comes to know the figure only now gets the last change alone: plotly writes the whole into the widget when it is shown
        # by itself, which a figure in a box never is
        self.figure._repr_mimebundle_()
        return frame(self.box)._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"A trade-off explorer of {len(self.sweep):,} configurations, which needs a running notebook. {self.told}"

    def to_json(self) -> str:
        """The state as JSON: what the page without a kernel takes, too."""
        return json.dumps(json.loads(self.state.to_json()), indent=1)
