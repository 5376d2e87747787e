"""The explorer: every control changes what it must, errors are shown in place, a measurement runs, is cancelled, and overlays its point."""

import json
import math
import sys
import threading
import time

import numpy as np
import pytest
from sweeps import made_up

pytest.importorskip("ipywidgets")

import plotly.graph_objects as go
from explorer_browser import lab, missing

from edgelab import explorer_plots, tradeoff
from edgelab import explorer_words as say
from edgelab.explorer import Explorer
from edgelab.explorer_controls import Budget, Live
from edgelab.explorer_measure import DIFFERS, INSIDE, SAME, agreement, agrees, recipe_python
from edgelab.measure_here import FLOATING, Failed, Here, Job, measure
from edgelab.recipe import Recipe
from edgelab.sweep_table import METRICS, Sweep
from edgelab.tradeoff import PRESETS, State


@pytest.fixture(scope="module")
def sweep():
    table = made_up(200, seed=7)
    return Sweep.from_table(table, json.loads(table.schema.metadata[b"edgelab"]))


@pytest.fixture
def explorer(sweep):
    return Explorer(sweep)


def drawn(e: Explorer, axis: str = "size") -> dict[str, np.ndarray]:
    """What the figure holds of all rows, in the sweep's order: x, y, in which trace (the last one: outside of the budgets)."""
    found = {k: np.full(len(e.sweep), np.nan) for k in ("x", "y", "trace")}
    for k, trace in enumerate(e.picture.points[axis]):
        if trace.visible is not False:
            of, shown = e.picture.rows_of[k], np.isfinite(trace.y)
            assert np.isnan(found["y"][of[shown]]).all(), "a row is drawn twice"
            found["x"][of[shown]], found["y"][of[shown]], found["trace"][of[shown]] = trace.x[shown], trace.y[shown], k
    return found


def last(e: Explorer) -> int:
    return len(e.picture.points["size"]) - 1


# ------------------------------------------------------------------------------------------------------------- controls


def test_the_figure_shows_the_view(explorer, sweep):
    d, v = drawn(explorer), explorer.view
    assert d["x"] == pytest.approx(sweep["size_bytes"] / 1e6, rel=1e-6) and d["y"] == pytest.approx(100 * sweep["em_assistant"], rel=1e-5)
    assert ((d["trace"] < last(explorer)) == v.inside).all() and 0 < v.inside.sum() < len(sweep), "what is outside of the budgets is faint"
    assert explorer.picture.points["size"][-1].marker.opacity < 0.3 < explorer.picture.points["size"][0].marker.opacity
    assert drawn(explorer, "latency")["x"] == pytest.approx(v.latency.value, rel=1e-6)
    assert explorer.view.state == explorer.state and sum(isinstance(t, go.Scattergl) and t.visible for t in explorer.figure.data) == 2 * (
        6 + 1
    )
    marks = explorer.picture.marks["size"]
    assert list(marks.text) == ["best", ""] and marks.x[0] == pytest.approx(sweep["size_bytes"][v.best] / 1e6)
    front = explorer.picture.fronts["size"]
    assert set(np.round(front.x, 9)) == set(np.round(sweep["size_bytes"][v.front_size] / 1e6, 9))
    assert all(word in explorer.sentence.value for word in ("measured at build", "modelled", sweep["label"][v.best]))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"metric": "kld"}, lambda a, b: a.quality.metric != b.quality.metric and b.notes),
        ({"metric": "em_arithmetic"}, lambda a, b: (a.quality.value != b.quality.value).any()),
        ({"metric": "bits_per_byte_code"}, lambda a, b: (a.quality.value != b.quality.value).any()),
        ({"device": "redmi-6a"}, lambda a, b: (b.latency.value > a.latency.value).all()),
        ({"engine": "cpu"}, lambda a, b: (b.latency.value > a.latency.value).all()),
        ({"context": 4096}, lambda a, b: (b.latency.value > a.latency.value).all()),
        ({"size_limit": 1.5e6}, lambda a, b: b.inside.sum() < a.inside.sum()),
        ({"latency_limit": 0.2}, lambda a, b: b.inside.sum() < a.inside.sum()),
        ({"quality_limit": 0.7}, lambda a, b: b.inside.sum() < a.inside.sum()),
        ({"objective": "size"}, lambda a, b: a.best != b.best),
        ({"filters": {"model": ["edge-phone"]}}, lambda a, b: b.rows.sum() < a.rows.sum()),
        ({"filters": {"bits": [2.0, 3.0], "method": "rtn"}}, lambda a, b: b.rows.sum() < a.rows.sum()),
    ],
    ids=lambda p: next(iter(p)) + str(next(iter(p.values())))[:20] if isinstance(p, dict) else "",
)
def test_each_control_changes_what_it_must(explorer, change, differs):
    before, told = explorer.view, explorer.sentence.value
    after = explorer.choose(**change)
    assert explorer.error is None and after is explorer.view and differs(before, after) and explorer.sentence.value != told
    d = drawn(explorer)
    shown = np.isfinite(d["y"])
    assert (shown == after.rows).all() and ((d["trace"][shown] < last(explorer)) == after.inside[shown]).all()
    for name, value in change.items():
        if name != "filters":
            assert getattr(explorer.state, name) == value
    again = tradeoff.view(explorer.sweep, explorer.state)
    assert again.best == after.best and (again.front == after.front).all(), "the controls stand for what is shown"


def test_controls_by_hand_do_what_choose_does(explorer, sweep):
    explorer.metric.value = "kld"
    assert explorer.view.quality.metric.name == "kld" and explorer.figure.layout.yaxis.type == "log"
    explorer.device.value = "raspberry-pi-4"
    assert explorer.view.state.device == "raspberry-pi-4" and "Raspberry" in explorer.figure.layout.xaxis2.title.text
    explorer.filters["bits"].value = (4.0,)
    assert set(sweep["bits"][explorer.view.rows]) == {4.0}
    explorer.clear_filters.click()
    assert explorer.state.filters == () and set(sweep["bits"][explorer.view.rows]) > {4.0}
    explorer.colour.value = "model"
    inside = explorer.view.inside & explorer.view.rows
    assert len(set(drawn(explorer)["trace"][inside])) == len(set(sweep["model"][inside])) == 2 and "edge-phone" in explorer.legend.value
    assert [list(explorer.picture.points["size"][k].text) == list(sweep["label"][explorer.picture.rows_of[k]]) for k in range(3)] == [
        True
    ] * 3
    explorer.show_filters.value = True
    assert explorer.filter_box.layout.display == "flex"
    explorer.size_budget.box.value = 2.0
    assert explorer.state.size_limit == 2e6 and not explorer.view.inside[sweep["size_bytes"] > 2e6].any()
    explorer.size_budget.slider.value = 200
    assert explorer.state.size_limit is None
    explorer.latency_budget.slider.value = 60
    assert explorer.state.latency_limit == pytest.approx(explorer.latency_budget.box.value)
    explorer.quality_budget.slider.value = 100
    assert explorer.state.quality_limit == pytest.approx(explorer.quality_budget.box.value)
    explorer.metric.value = "em_assistant"
    assert explorer.state.quality_limit is None, "a limit of one metric means nothing in another"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_controls_until_one_is_touched(explorer, preset):
    explorer.preset.value = preset
    asked = tradeoff.apply(explorer.sweep, preset, State())
    assert explorer.error is None and explorer.preset.value == preset
    s = explorer.state
    assert (s.metric, s.objective, s.latency_limit) == (asked.metric, asked.objective, None)
    for name in ("size_limit", "quality_limit"):
        assert getattr(s, name) == (None if getattr(asked, name) is None else pytest.approx(getattr(asked, name)))
    assert explorer.view.best == tradeoff.view(explorer.sweep, s).best
    explorer.size_budget.slider.value = 20
    assert explorer.preset.value == ""


def test_a_budget_keeps_the_limit_that_was_set_and_not_what_its_box_rounds():
    told = []
    b = Budget("at most")
    b.changed = lambda: told.append(b.limit)
    b.show(1 / 3, 0.1, 10.0, log=True, open_high=True)
    assert b.limit == 1 / 3 and b.box.value == 0.3333 and told == []
    b.slider.value = 0
    assert b.limit == pytest.approx(0.1) and b.box.value == pytest.approx(0.1)
    b.slider.value = 200
    assert b.limit is None and b.box.value == 10.0
    b.box.value = 2.5
    assert b.limit == 2.5 and 0 < b.slider.value < 200
    b.box.value = 99.0
    assert b.limit is None and len(told) == 4
    b.show(None, 0.0, 96.0, log=False, open_high=False)
    assert b.slider.value == 0 and b.box.value == 0
    b.slider.value = 100
    assert b.limit == 48.0


def test_what_is_not_there_is_refused_and_leaves_the_controls_as_they_were(explorer):
    before = explorer.state
    for wrong, error, says in (
        ({"metric": "loss"}, ValueError, "metric='loss'"), ({"device": "nokia"}, ValueError, "device='nokia'"),
        ({"filters": {"bits": [5]}}, ValueError, "bits=5 is in no row"), ({"chosen": "nothing"}, KeyError, "no row with id"),
        ({"preset": "cheap"}, ValueError, "preset='cheap'"), ({"price": 3}, TypeError, "price"),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            explorer.choose(**wrong)
        assert explorer.state == before
    with pytest.raises(ValueError, match="which='C'"):
        explorer.pin("C")
    with pytest.raises(FileNotFoundError, match="`edgelab sweep` measures one"):
        Explorer("nowhere.parquet")


def test_an_error_is_shown_in_place_and_goes_away(explorer, monkeypatch):
    monkeypatch.setattr(tradeoff, "view", lambda *_: 1 / 0)
    explorer.objective.value = "size"
    assert isinstance(explorer.error, ZeroDivisionError) and 'role="alert"' in explorer.sentence.value
    monkeypatch.undo()
    explorer.objective.value = "latency"
    assert explorer.error is None and "alert" not in explorer.sentence.value and "Fastest" in explorer.sentence.value


def test_nothing_within_the_budgets_is_said_and_loosened(explorer):
    view = explorer.choose(size_limit=1000.0)
    assert view.best is None and "Nothing lies within the budgets" in explorer.sentence.value and explorer.chosen is None
    explorer.pin_a.click()
    assert isinstance(explorer.error, ValueError) and "nothing is chosen" in explorer.sentence.value
    explorer.panel.value = "recipe"
    assert "Nothing is chosen" in explorer.recipe_panel.recipe.value and explorer.measure_panel.button.disabled
    assert explorer.choose(size_limit=None).best is not None and not explorer.measure_panel.button.disabled


# --------------------------------------------------------------------------------------------- choosing, pinning, brushing


def test_a_click_chooses_and_the_list_does_too(explorer, sweep):
    explorer._clicked(2, [3])
    row = int(explorer.picture.rows_of[2][3])
    assert explorer.chosen == row and explorer.row.value == sweep["id"][row] and sweep["label"][row] in explorer.layers_sentence.value
    held = explorer_plots.layers_of(sweep, row)
    assert sum(explorer.picture.bars.y) == pytest.approx(sum(sweep.layer(row)["bytes"]) / 1e6)
    assert len(explorer.picture.errors.y) == sum(math.isfinite(e) for e in sweep.layer(row)["error"])
    assert list(explorer.figure.layout.xaxis3.categoryarray) == list(held.places)
    other = next(value for _, value in explorer.row.options if value and value != sweep["id"][row])
    explorer.row.value = other
    assert sweep["id"][explorer.chosen] == other and explorer.state.chosen == other
    explorer.row.value = ""
    assert explorer.chosen == explorer.view.best


def test_pins_give_a_verdict_and_count_what_the_winner_was_picked_from(explorer, sweep):
    explorer.pin_a.click()  # the best within the budgets: picked by a search
    n = explorer.view.picked_from
    worst = int(np.argmin(sweep["em_assistant"]))
    explorer.choose(chosen=worst)
    explorer.pin_b.click()
    c = explorer.compared
    assert c.picked_from == n > 1 and c.a == sweep["id"][explorer.view.best] and c.b == sweep["id"][worst]
    assert c.better == "a" and "A is better" in explorer.verdict.value and f"picked from {n:,}" in explorer.verdict.value
    assert list(explorer.picture.marks["size"].text) == ["best", "", "A", "B"]
    explorer.panel.value = "A against B"
    assert all(m.title in explorer.tables["A against B"].value for m in METRICS.values())
    of = "edge-moe" if sweep["model"][sweep.index(c.a)] == "edge-dense" else "edge-dense"
    explorer.choose(metric="kld")
    on = explorer.view.front | explorer.view.front_size | explorer.view.front_latency
    explorer.choose(pin_b=int(np.flatnonzero((sweep["model"] == of) & ~on)[0]))
    assert explorer.compared.refused and f"s from {of}" in explorer.verdict.value and "Use bits per byte" in explorer.verdict.value
    assert explorer.compared.picked_from == 1, "what A was picked by was another metric"
    explorer.choose(metric="em_assistant")
    assert explorer.compared.picked_from == n, "and by this one it was found by a search, whatever B is"
    explorer.unpin.click()
    assert explorer.compared is None and "Pin two configurations" in explorer.verdict.value


def brush(e: Explorer, axis: str, points: dict[int, list[int]]) -> None:
    """What the page sends after a drag in one plot: one message, of which plotly tells every trace, also those without points."""
    at = {id(trace): i for i, trace in enumerate(e.figure.data)}
    told = [(at[id(e.picture.points[axis][k])], p) for k, found in points.items() for p in found]
    xs = [0.0] * len(told)
    message = {"event_type": "plotly_selected", "selector": None, "device_state": None,
               "points": {"xs": xs, "ys": xs, "trace_indexes": [t for t, _ in told], "point_indexes": [p for _, p in told]}}  # fmt: skip
    e.figure._js2py_pointsCallback = message


def test_pins_by_code_and_by_hand_count_alike(explorer, sweep):
    best = explorer.view.best
    explorer.choose(pin_a=0, pin_b=best)
    by_code = explorer.compared.picked_from
    explorer.choose(pin_b="")
    explorer.pin("B")
    assert explorer.compared.picked_from == by_code == explorer.view.picked_from > 1
    assert explorer.state.from_b == ("em_assistant", by_code)
    plain = np.flatnonzero(~(explorer.view.front | explorer.view.front_size | explorer.view.front_latency))
    explorer.choose(pin_a=int(plain[0]), pin_b=int(plain[1]))
    assert explorer.compared.picked_from == 1


def test_filters_that_leave_no_original_clear_the_preset(explorer, sweep):
    explorer.choose(preset="keep95")
    explorer.filters["model"].value = ("edge-phone",)
    assert explorer.error is None
    explorer.choose(preset="keep95")
    for column, widget in explorer.filters.items():  # a pair of values that no row has, found in the sweep itself
        for other, second in explorer.filters.items():
            for one in sweep.values(column):
                for two in sweep.values(other):
                    if column < other and not ((sweep[column] == one) & (sweep[other] == two)).any():
                        widget.value, second.value = (one,), (two,)
                        assert explorer.error is None and explorer.preset.value == "" and not explorer.view.rows.any()
                        assert "Nothing lies within the budgets" in explorer.sentence.value
                        return
    raise AssertionError("every pair of values is in the sweep")


def test_what_the_controls_can_not_show_is_refused(explorer):
    before = explorer.state
    for wrong, says in (({"filters": {"bits": ()}}, "'bits' allows no value"), ({"context": 200_000}, "context=200,000 is more")):
        with pytest.raises(ValueError, match=says):
            explorer.choose(**wrong)
        assert explorer.state == before


def test_brushing_links_both_plots_and_says_what_was_brushed(explorer, sweep):
    assert explorer.figure.layout.hovermode == "closest" and explorer.brush_sentence.value == ""
    explorer.mode.value = "brush"
    assert explorer.figure.layout.hovermode is False and explorer.figure.layout.dragmode == "select"
    p = explorer.picture
    some, out = np.flatnonzero(p.drawn(2))[:3].tolist(), int(np.flatnonzero(p.drawn(last(explorer)))[4])
    brush(explorer, "size", {2: some, last(explorer): [out]})
    rows = [*p.rows_of[2][some].tolist(), out]
    assert np.flatnonzero(explorer.brushed).tolist() == sorted(rows) and "Brushed: 4 rows" in explorer.brush_sentence.value
    for axis in ("size", "latency"):
        assert list(p.points[axis][2].selectedpoints) == some and p.points[axis][3].selectedpoints == ()
    brush(explorer, "latency", {2: some[:1]})
    assert explorer.brushed.sum() == 1, "a brush replaces the one before, in whichever plot it is"
    explorer.brush(sweep["size_bytes"] < 2e6)
    assert f"{(sweep['size_bytes'] < 2e6).sum():,} rows" in explorer.brush_sentence.value
    explorer.mode.value = "inspect"
    assert explorer.brushed is None and explorer.picture.points["size"][2].selectedpoints is None
    assert explorer.figure.layout.hovermode == "closest"


def test_panels_show_tables_with_their_provenance(explorer, sweep):
    assert "The front of quality, size and latency" in explorer.tables["front"].value
    assert explorer.tables["front"].value.count("<tr>") == 1 + min(say.MOST_ROWS, explorer.view.front.sum())
    for name, words in (("layers", ("layer 0", "measured at build")), ("on the device", ("decoding", "modelled"))):
        explorer.panel.value = name
        assert explorer.below.children == (explorer._panels[name],) and all(word in explorer.tables[name].value for word in words)
    explorer.panel.value = "recipe"
    text = explorer.recipe_panel.text
    assert Recipe.from_json(text) == Recipe.from_json(sweep["recipe"][explorer.chosen])
    assert "textarea readonly" in explorer.recipe_panel.recipe.value and "<button" in explorer.recipe_panel.python.value
    compile(explorer.recipe_panel.code, "recipe", "exec")
    assert "<script" not in explorer.recipe_panel.recipe.value


def test_every_control_has_a_name(explorer):
    import ipywidgets as w

    def inside(widget):
        for child in getattr(widget, "children", ()):
            yield child
            yield from inside(child)

    explorer.show_filters.value = True
    inputs = (w.Dropdown, w.BoundedFloatText, w.BoundedIntText, w.SelectMultiple, w.Button, w.ToggleButton)
    found = [x for x in [*inside(explorer.box), *explorer.measure_panel.box.children[0].children] if isinstance(x, inputs)]
    assert len(found) > 20 and all(x.description for x in found)
    sliders = [x for x in inside(explorer.box) if isinstance(x, w.IntSlider)]
    boxes = [b.box for b in (explorer.size_budget, explorer.latency_budget, explorer.quality_budget)]
    assert len(sliders) == len(boxes) == 3, "a slider has no name: a number box stands beside each"
    live = (explorer.sentence, explorer.verdict, explorer.brush_sentence, explorer.layers_sentence, explorer.measure_panel.status)
    assert all(isinstance(x, Live) for x in live), "what announces has to stay while its text is replaced"
    assert explorer.sentence.value and "aria-live" not in explorer.sentence.value


def test_a_control_sends_only_what_changed(explorer, monkeypatch):
    put = []
    original = explorer_plots.Picture._put

    def watched(self, target, name, value):
        before = self._sent.get((id(target), name))
        original(self, target, name, value)
        if self._sent.get((id(target), name)) is not before:
            put.append(name)

    monkeypatch.setattr(explorer_plots.Picture, "_put", watched)
    explorer.choose(size_limit=2.2e6)
    traces = 2 * (6 + 1)  # of points: y alone, rows go from trace to trace
    assert not {"range", "selectedpoints", "visible", "tickvals", "type"} & set(put)
    assert put.count("x") <= 6 and traces - 4 <= put.count("y") <= traces + 6, (
        "no point moved: other x are those of front, limits, marks, layers"
    )


def test_static_figures_are_small_and_an_explorer_tells_itself(explorer):
    from edgelab.svg import to_svg

    explorer.choose(preset="keep95")
    figures = explorer.static(most=100)
    assert [f.layout.title.text for f in figures] == ["Quality against size", "Quality against latency"]
    for f in figures:
        assert "best" in [t.name for t in f.data] and len(to_svg(f, describe=explorer.told)) < 40_000
    explorer._repr_mimebundle_()  # shown after it was changed: the widget's own state has to hold all of it
    sent = {t["name"]: t for t in explorer.figure._widget_data}
    assert all(len(sent[f"size {k}"].get("x", ())) == len(of) for k, of in enumerate(explorer.picture.rows_of))
    assert explorer.told in repr(explorer) and State.from_json(explorer.to_json()) == explorer.state
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"] == repr(explorer)


# ----------------------------------------------------------------------------------------------------------- measuring here

TOLD = """
import json, sys, time
request = json.loads(sys.stdin.readline())
print("a library says something")
print(json.dumps({"share": 0.3, "step": "compressing"}), flush=True)
BODY
"""
ANSWER = """
print(json.dumps({"result": {"model": request["model"], "recipe": request["recipe"], "size_bytes": SIZE, "values": VALUES, "exact": [],
      "ms_per_token": 0.4, "no_speed": "", "context": 48, "threads": 1, "machine": "test", "seconds": 1.0}}))
"""


def child(body: str) -> list[str]:
    return [sys.executable, "-c", TOLD.replace("BODY", body)]


def answer(sweep: Sweep, row: int, **off) -> list[str]:
    values = {m: float(sweep[m][row]) for m in ("kld", "bits_per_byte", "em_assistant", "em_arithmetic")} | off
    size = int(values.pop("size_bytes", sweep["size_bytes"][row]))
    return child(ANSWER.replace("SIZE", str(size)).replace("VALUES", repr(values)))


def test_measured_here_is_overlaid_and_says_whether_it_agrees(explorer, sweep):
    row, panel = explorer.chosen, explorer.measure_panel
    panel.command = answer(sweep, row)
    here = explorer.measure(timeout=30)
    assert here.size_bytes == sweep["size_bytes"][row] and set(agrees(sweep, row, here).values()) == {SAME}
    assert "agrees with the stored row" in panel.status.value and "measured here" in panel.table.value and panel.progress.value == 1.0
    assert "measured here" in explorer.picture.marks["size"].text
    assert "measured here" not in explorer.picture.marks["latency"].text, "a time of this machine is none of a phone"
    assert "0.4 ms per token on one thread of this machine" in panel.status.value
    explorer.choose(metric="kld_code")
    assert "measured here" not in explorer.picture.marks["size"].text, "no such number was measured"
    explorer.choose(metric="bits_per_byte")
    assert "measured here" in explorer.picture.marks["size"].text and panel.stop.disabled and not panel.button.disabled


def test_a_measurement_that_differs_says_in_what(explorer, sweep):
    row = explorer.chosen
    explorer.measure_panel.command = answer(sweep, row, em_assistant=0.01, size_bytes=17)
    here = explorer.measure(timeout=30)
    assert {k for k, ok in agrees(sweep, row, here).items() if ok == DIFFERS} == {"size_bytes", "em_assistant"}
    assert "differs from the stored row in the size, exact match, assistant" in agreement(sweep, row, here)


def test_agreement_is_that_of_the_same_run_and_not_of_the_interval(explorer, sweep):
    row = int(np.argmax(sweep["kld_high"] - sweep["kld"]))
    values = {m: float(sweep[m][row]) for m in ("kld", "bits_per_byte", "em_assistant", "em_arithmetic")}
    high, kld = float(sweep["kld_high"][row]), values["kld"]
    assert high > 1.02 * kld, "an interval wide enough to tell"

    def here(kld):
        return Here("m", "r", int(sweep["size_bytes"][row]), values | {"kld": kld}, (), 1.0, "", 48, 1, "test", 1.0)

    assert [agrees(sweep, row, here(k))["kld"] for k in (kld, 1.005 * kld, (kld + high) / 2 + 0.01 * kld, 2 * high)] == [
        SAME, SAME, INSIDE if (kld + high) / 2 + 0.01 * kld <= high else DIFFERS, DIFFERS
    ]  # fmt: skip
    assert "not the same run" in agreement(sweep, row, here(0.98 * high if 0.98 * high > 1.01 * kld else high))


def test_a_child_that_complains_at_length_is_heard():
    body = "sys.stderr.write('x' * 300_000 + chr(10) + 'the last line')\nsys.exit(1)"
    job = Job({"model": "m", "recipe": "r"}, child(body))
    watch = threading.Timer(30, job.cancel)
    watch.start()
    with pytest.raises(Failed, match=r"^the last line$"):
        list(job.steps())
    watch.cancel()


def test_a_child_ends_with_its_parent(tmp_path):
    """A parent killed by SIGTERM can't tell its child; the child's input ends."""
    import signal
    import subprocess

    body = "from edgelab.measure_here import end_with_parent; end_with_parent(); time.sleep(600)"
    script = (
        "import sys, time; from edgelab.measure_here import Job; "
        "j = Job({'model': 'm', 'recipe': 'r'}, sys.argv[1:]); next(j.steps()); print(j._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, *child(body)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())

    def running() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    if not sys.platform.startswith("linux"):
        parent.kill()
        pytest.skip("reads /proc")
    assert running()
    parent.send_signal(signal.SIGTERM)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running()


def test_cancel_ends_the_process_and_keeps_nothing(explorer):
    panel = explorer.measure_panel
    panel.command = child("time.sleep(600)")
    panel.button.click()
    deadline = time.monotonic() + 20
    while "compressing" not in panel.status.value and time.monotonic() < deadline:
        time.sleep(0.02)
    assert panel.busy and panel.progress.value == 0.3 and panel.button.disabled and not panel.stop.disabled
    with pytest.raises(RuntimeError, match="a measurement is running"):
        panel.start()
    explorer.choose(size_limit=2e6)  # the rest goes on working meanwhile
    assert explorer.error is None and panel.button.disabled
    process = panel._job._process
    panel.stop.click()
    assert panel.wait(20) is None and process.poll() is not None
    assert "Cancelled" in panel.status.value and panel.measured == {} and panel.stop.disabled and not panel.button.disabled
    explorer.cancel()  # nothing runs: nothing happens


def test_a_measurement_that_fails_says_why_in_place(explorer):
    panel = explorer.measure_panel
    panel.command = child('print(json.dumps({"error": "ValueError: group 48 does not divide 128"})); sys.exit(1)')
    assert explorer.measure(timeout=30) is None and isinstance(panel.error, Failed)
    assert 'role="alert"' in panel.status.value and "group 48 does not divide 128" in panel.status.value
    panel.command = child("sys.exit('no memory left')")
    assert explorer.measure(timeout=30) is None and "no memory left" in panel.status.value
    panel.command = child("time.sleep(600)")
    explorer.measure(wait=False)
    with pytest.raises(TimeoutError, match="still measuring"):
        panel.wait(0.05)
    explorer.cancel()
    panel.wait(20)


def test_a_job_tells_its_steps_and_may_be_cancelled_from_another_thread():
    job = Job({"model": "m", "recipe": "r"}, child("time.sleep(600)"))
    told = []
    for step in job.steps():
        told.append(step)
        threading.Thread(target=job.cancel).start()
    assert told == [(0.3, "compressing")] and job.result is None and job.cancelled and not job.alive
    assert math.isnan(Here.of({f: None for f in Here.__dataclass_fields__} | {"later": 1}).ms_per_token)


@pytest.mark.slow
def test_a_model_in_floating_point_gets_no_time_that_its_size_does_not_stand_for():
    protocol = {"docs": [["prose", 1], ["code", 1], ["assistant", 2], ["arithmetic", 2]], "calibration_tokens": 512, "resamples": 10}
    here = measure("edge-moe", Recipe().to_json(), protocol)
    assert math.isnan(here.ms_per_token) and here.no_speed == FLOATING


@pytest.mark.slow
def test_a_real_measurement_agrees_with_its_stored_row():
    """The row of the stored sweep that costs least to make again: real compression, evaluation and kernels, in the child."""
    try:
        stored = Sweep.read()
    except FileNotFoundError:
        pytest.skip("data/sweep.parquet is not there yet: `edgelab sweep` measures it")
    e = Explorer(stored)
    rows = np.flatnonzero((stored["model"] == "edge-moe") & (stored["method"] == "rtn") & (stored["experts"] == 16))
    row = int(rows[np.argmin(stored["seconds"][rows])])
    here = e.measure(row, timeout=300)
    assert here is not None, e.measure_panel.status.value
    assert set(agrees(stored, row, here).values()) == {SAME}, agreement(stored, row, here)
    assert not here.no_speed and 0 < here.ms_per_token < 1000


def test_the_python_that_reproduces_a_row_compiles_and_names_its_bytes(sweep):
    code = recipe_python(sweep, 5)
    compile(code, "recipe", "exec")
    assert f"{int(sweep['size_bytes'][5]):,}" in code and sweep["model"][5] in code


def test_a_recipe_stays_text_in_the_python_that_reproduces_it():
    """Backslashes, quotes and a model with an odd name: nothing of them becomes code."""
    import ast
    from types import SimpleNamespace

    odd, recipe = "m\"; import os; \"\n'''", json.dumps([{"name": "a\\b\"c'''d\ne"}])
    columns = {"recipe": [recipe], "model": [odd], "size_bytes": [17]}

    class Odd(SimpleNamespace):
        def __getitem__(self, name):
            return columns[name]

    tree = ast.parse(recipe_python(Odd(meta={}), 0))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert odd in texts and any(json.loads(t) == json.loads(recipe) for t in texts if t.startswith("["))
    assert not any(isinstance(n, ast.Import) for n in ast.walk(tree))


# ------------------------------------------------------------------------------------------------------ in a real browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("lab")
    pq.write_table(made_up(300, seed=7), folder / "s.parquet")
    cell = f"from edgelab.explorer import Explorer\ne = Explorer({str(folder / 's.parquet')!r})\ne.choose(preset='quarter')\ne"
    with lab(folder, cell, height=1600) as found:
        yield found


def sentence(tab) -> str:
    return tab.locator("div[aria-live=polite] p").first.inner_text()


def changed(tab, act) -> str:
    """The first sentence after `act`, once it is another one."""
    before = sentence(tab)
    act()
    tab.wait_for_function("t => document.querySelector('div[aria-live=polite] p').innerText !== t", arg=before, timeout=20_000)
    tab.wait_for_timeout(300)
    return sentence(tab)


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_by_mouse(page):
    tab, left = page
    points = "document.querySelector('.js-plotly-plot').data.filter(t => t.type === 'scattergl').map(t => t.x?.length ?? 0)"
    assert sum(tab.evaluate(points)) == 2 * 2 * 300, "changed before it was shown, and the page knows the last change alone"
    told = changed(tab, lambda: tab.get_by_label("find the", exact=True).select_option(label="smallest"))
    assert told.startswith("Smallest:")
    told = changed(tab, lambda: tab.get_by_label("quality", exact=True).select_option(label="KL divergence, prose and code"))
    assert "nats per token" in told and "rows are left out" in told
    told = changed(tab, lambda: tab.get_by_label("device", exact=True).select_option(label="Xiaomi Redmi 6A (phone)"))
    assert "Redmi 6A" in told
    told = changed(tab, lambda: tab.get_by_label("question", exact=True).select_option(label="smallest that keeps 95 % of exact match"))
    assert "exact match, assistant at least" in told
    box = tab.get_by_role("spinbutton", name="size at most, MB")
    told = changed(tab, lambda: (box.fill("12"), box.press("Tab")))
    assert "at most 12.00 MB" in told and "Nothing" not in told
    tab.get_by_role("button", name="pin as A").click()
    tab.wait_for_function("[...document.querySelectorAll('p')].some(p => p.innerText.includes('pin another as B'))")
    spot = tab.evaluate(
        "(() => { const gd = document.querySelector('.js-plotly-plot'), l = gd._fullLayout, r = gd.getBoundingClientRect();"
        " const t = gd.data.filter(t => t.visible)[0];"
        " const x = Array.from(t.x), y = Array.from(t.y), shown = y.map((v, k) => [v, k]).filter(p => isFinite(p[0]));"
        " const i = shown.sort((a, b) => a[0] - b[0])[5][1];"
        " return [r.x + l.xaxis._offset + l.xaxis.c2p(x[i]), r.y + l.yaxis._offset + l.yaxis.c2p(y[i])] })()"
    )
    before = tab.get_by_label("configuration", exact=True).input_value()
    tab.mouse.move(*spot)
    tab.wait_for_timeout(500)
    tab.mouse.click(*spot)
    tab.wait_for_function("v => [...document.querySelectorAll('select')].some(s => s.value !== v && s.value.includes('MB ·'))", arg=before)
    tab.get_by_role("button", name="brush").click()
    tab.wait_for_function("document.querySelector('.js-plotly-plot')._fullLayout.dragmode === 'select'")
    area = tab.evaluate(
        "(() => { const gd = document.querySelector('.js-plotly-plot'), l = gd._fullLayout, r = gd.getBoundingClientRect();"
        " return [r.x + l.xaxis._offset, r.y + l.yaxis._offset, l.xaxis._length, l.yaxis._length] })()"
    )
    tab.mouse.move(area[0] + 5, area[1] + 5)
    tab.mouse.down()
    tab.mouse.move(area[0] + 0.9 * area[2], area[1] + 0.9 * area[3], steps=8)
    tab.mouse.up()
    tab.wait_for_function("[...document.querySelectorAll('p')].some(p => /^Brushed: [0-9,]+ rows/.test(p.innerText))", timeout=20_000)
    tab.wait_for_timeout(2500)  # what comes after the first answer must not take it back
    assert tab.evaluate("[...document.querySelectorAll('p')].some(p => /^Brushed: [1-9][0-9,]* rows/.test(p.innerText))")
    counted = (
        "axis => document.querySelector('.js-plotly-plot').data.filter(t => t.type === 'scattergl' && (t.xaxis ?? 'x') === axis)"
        # a row stands in two traces, that of its colour and that of what lies outside, and is drawn in one of them
        ".reduce((n, t) => n + Array.from(t.selectedpoints ?? []).filter(i => isFinite(t.y[i] ?? NaN)).length, 0)"
    )
    both = [tab.evaluate(counted, axis) for axis in ("x", "x2")]
    assert both[0] == both[1] > 0, f"rows selected in the two plots: {both}"
    tab.get_by_role("button", name="inspect").click()
    tab.wait_for_function("![...document.querySelectorAll('p')].some(p => p.innerText.startsWith('Brush'))")
    assert left == []


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_by_keyboard_alone(page):
    tab, left = page
    tab.get_by_label("question", exact=True).focus()
    told = changed(tab, lambda: (tab.keyboard.press("Home"), *(tab.keyboard.press("ArrowDown") for _ in PRESETS)))
    tab.wait_for_function("document.querySelector('div[aria-live=polite] p').innerText.includes('exact match, arithmetic')", timeout=20_000)
    tab.get_by_label("find the", exact=True).focus()
    told = changed(tab, lambda: (tab.keyboard.press("Home"), tab.keyboard.press("ArrowDown"), tab.keyboard.press("ArrowDown")))
    assert told.startswith(("Fastest:", "Nothing"))
    box = tab.get_by_role("spinbutton", name="size at most, MB")
    box.focus()
    told = changed(tab, lambda: (tab.keyboard.press("Control+a"), tab.keyboard.type("6"), tab.keyboard.press("Enter")))
    assert "at most 6.00 MB" in told
    tab.keyboard.press("Tab")  # the slider stands behind its box
    told = changed(tab, lambda: tab.keyboard.press("ArrowLeft"))
    assert "at most 6.00 MB" not in told
    button = tab.get_by_role("button", name="filters")
    button.focus()
    tab.keyboard.press("Space")
    bits = tab.get_by_label("bits", exact=True)
    bits.wait_for(state="visible", timeout=10_000)
    bits.focus()
    told = changed(tab, lambda: (tab.keyboard.press("Home"), *(tab.keyboard.press("Shift+ArrowDown") for _ in range(2))))
    assert "300 of 300" not in told and "Nothing" not in told
    tab.get_by_role("button", name="recipe").focus()
    tab.keyboard.press("Enter")
    copy = tab.get_by_role("button", name="copy recipe as JSON")
    copy.wait_for(state="visible", timeout=10_000)
    copy.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("[...document.querySelectorAll('span[role=status]')].some(s => s.innerText === 'copied')", timeout=10_000)
    held = tab.evaluate("document.querySelector('textarea[aria-label=\"recipe as JSON\"]').value")
    assert Recipe.from_json(held).to_json() and tab.evaluate("navigator.clipboard.readText()") == held
    tab.get_by_role("button", name="measure here").focus()
    tab.keyboard.press("Enter")
    start = tab.get_by_role("button", name="measure this one now")
    start.wait_for(state="visible", timeout=10_000)
    start.focus()
    tab.keyboard.press("Enter")
    stop = tab.get_by_role("button", name="cancel", exact=True)
    tab.wait_for_function("[...document.querySelectorAll('button')].some(b => b.innerText === 'cancel' && !b.disabled)", timeout=20_000)
    stop.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("[...document.querySelectorAll('p')].some(p => p.innerText.startsWith('Cancelled'))", timeout=20_000)
    assert left == []


def test_plotlys_script_still_has_the_place_that_is_patched():
    from edgelab import explorer_plots

    assert "trace_deltas:[]" in str(explorer_plots.Fed._esm), "every redraw would send all points back to the kernel"
