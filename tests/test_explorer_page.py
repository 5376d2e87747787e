"""The explorer's page in a real browser without a network: it computes what Python computes, and every control does what it says."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sweeps

from edgelab import explorer_page, page, tradeoff
from edgelab.device import CLASSES, devices
from edgelab.sweep_table import FILTERS, METRICS, Sweep
from edgelab.tradeoff import OBJECTIVES, PRESETS, State

STATES = 60  # random ones, for which the page has to agree with Python


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    return Sweep.read(sweeps.write(tmp_path_factory.mktemp("sweep") / "sweep.parquet", 240, seed=3))


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory) -> Path:
    return explorer_page.write(tmp_path_factory.mktemp("page") / "explorer.html", sweep)


# ------------------------------------------------------------------------------------------------------- without a browser


def test_the_page_asks_for_nothing_and_says_so(written):
    text = written.read_text(encoding="utf-8")
    assert page.external_loads(text) == []
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "script-src 'sha256-" in policy
    assert "http" not in policy and "script-src 'unsafe-inline'" not in policy
    ours = "".join((explorer_page.FILES / name).read_text(encoding="utf-8") for name in ("tradeoff.js", "explorer.js", "explorer.css"))
    assert not re.search(r"\beval\(|new Function|fetch\(|XMLHttpRequest|WebSocket|@import|https?://", ours)


def test_the_same_sweep_gives_the_same_bytes(sweep, written):
    assert explorer_page.render(sweep) == written.read_text(encoding="utf-8")


def test_text_of_the_sweep_and_of_the_title_is_no_markup(sweep):
    from dataclasses import replace

    labels = sweep["label"].copy()
    labels[:] = [f"<img src=x onerror=alert(1)> {text}" for text in labels]
    bad = replace(sweep, columns={**sweep.columns, "label": labels})
    text = explorer_page.render(bad, title="</title><script>alert(2)</script>")
    assert "<img src=x" not in text and "<script>alert" not in text


def test_the_data_comes_back_as_it_went_in(sweep):
    content = explorer_page.packed(sweep)
    length = int.from_bytes(content[:4], "little")
    header, begin = json.loads(content[4 : 4 + length]), -(-(4 + length) // 8) * 8

    def block(place):
        kind, offset, count = place
        return np.frombuffer(content, {"f8": "<f8", "f4": "<f4", "u4": "<u4", "u1": "u1"}[kind], count, begin + offset)

    assert header["rows"] == len(sweep)
    assert np.array_equal(block(header["numbers"]["size_bytes"]), sweep["size_bytes"])
    assert np.array_equal(block(header["doc_kld"]).reshape(sweep.doc_kld.shape), sweep.doc_kld)
    assert np.array_equal(block(header["doc_exact"]).reshape(sweep.doc_exact.shape), sweep.doc_exact)
    labels = header["texts"]["label"]
    assert [labels["values"][k] for k in block(labels["codes"])] == list(sweep["label"])
    start, errors = block(header["layer"]["blocks"]["start"]), block(header["layer"]["blocks"]["error"])
    for i in (0, 17, len(sweep) - 1):
        held = sweep.layer(i)
        assert np.array_equal(errors[start[i] : start[i + 1]], np.array(held["error"], np.float32), equal_nan=True)
        assert list(header["layer"]["names"][block(header["layer"]["blocks"]["code"])[i]]) == held["name"]


def test_a_failed_write_leaves_what_was_there(sweep, tmp_path, monkeypatch):
    file = tmp_path / "explorer.html"
    file.write_text("old")
    monkeypatch.setattr(explorer_page, "render", lambda *a: "x" * 10 + "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        explorer_page.write(file, sweep)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["explorer.html"]


# ---------------------------------------------------------------------------------------------------------- in a browser

playwright = pytest.importorskip("playwright.sync_api", reason="the driver (pip install 'edgelab[test]') is not installed")

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
in_browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH (Debian and Ubuntu: apt install chromium)"),
]


def browser_test(function):
    for mark in in_browser:
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, written):
    """Opens the page (with a hash) at a size; afterwards nothing may have left the disk and no script may have failed."""
    asked, errors, contexts = [], [], []

    def decide(route):
        if route.request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    def go(hash: str = "", *, path: Path = written, size: tuple[int, int] = (1280, 900), **context):
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True, **context))
        contexts[-1].set_default_timeout(120_000)  # a busy machine takes its time over five megabytes
        contexts[-1].route("**/*", decide)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(path.as_uri() + hash)
        tab.evaluate("edgelab.ready")
        return tab

    yield go
    for context in contexts:
        context.close()
    assert asked == [] and errors == []


def settled(tab):
    """After what waits until a slider rests."""
    while not tab.evaluate("edgelab.resting()"):  # wait_for_function would need eval, which the page's policy forbids
        tab.wait_for_timeout(40)


def random_state(sweep: Sweep, rng: np.random.Generator) -> State:
    """A state as people make them: some budgets, some filters, any device; contexts up to where memory runs out."""
    metric = str(rng.choice(list(METRICS)))
    q = tradeoff.quality(sweep, metric)
    late = tradeoff.latency(sweep, "galaxy-s22")

    def maybe(values, share=0.5):
        known = values[np.isfinite(values)]
        return float(rng.choice(known)) if len(known) and rng.random() < share else None

    filters = []
    for column in FILTERS:
        values = sweep.values(column)
        if rng.random() < 0.25:
            filters.append((column, tuple(v for v in values if rng.random() < 0.7)))
    return State(
        metric=metric, device=str(rng.choice(list(devices()))), engine=str(rng.choice(CLASSES)),
        context=int(rng.choice([0, 1, 512, 4096, 100_000, 3_000_000, 20_000_000])) if rng.random() < 0.7 else int(rng.integers(0, 50_000)),
        objective=str(rng.choice(list(OBJECTIVES))), size_limit=maybe(sweep["size_bytes"]), latency_limit=maybe(late.value),
        quality_limit=maybe(q.value), filters=tuple(filters),
    )  # fmt: skip


def same(a, b) -> bool:
    """Equal numbers up to rounding; NaN (null in JSON) is itself."""
    a, b = (np.array([np.nan if v is None else v for v in x], np.float64) for x in (a, b))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-12, atol=0, equal_nan=True)


@browser_test
def test_the_page_shows_what_python_shows(opened, sweep):
    tab, rng = opened(), np.random.default_rng(5)
    seen = {"notes": 0, "nothing": 0, "flash": 0, "kld": 0}
    for _ in range(STATES):
        state = random_state(sweep, rng)
        ref = tradeoff.view(sweep, state)
        comp = tab.evaluate("state => edgelab.view(state)", json.loads(state.to_json()))
        for name in ("rows", "inside", "front", "front_size", "front_latency"):
            assert comp[name] == np.flatnonzero(getattr(ref, name)).tolist(), (name, state)
        assert (comp["best"], comp["picked_from"]) == (ref.best, ref.picked_from), state
        assert comp["notes"] == list(ref.notes), state
        for name, values in (("latency", ref.latency.value), ("low", ref.latency.low), ("high", ref.latency.high)):
            assert same(comp[name], values), (name, state)
        for name, values in (("quality", ref.quality.value), ("quality_low", ref.quality.low), ("quality_high", ref.quality.high)):
            assert same(comp[name], values), (name, state)
        seen["notes"] += bool(ref.notes)
        seen["nothing"] += ref.best is None
        seen["kld"] += any("left out" in n for n in ref.notes)
        if ref.best is not None and ref.picked_from < 120:
            found = tab.evaluate("([row, among, metric]) => edgelab.rivals(row, among, metric)", [ref.best, comp["inside"], state.metric])
            assert found == tradeoff.rivals(sweep, ref.best, ref.inside, state.metric).tolist(), state
    assert seen["notes"] > 5 and seen["nothing"] > 0 and seen["kld"] > 0  # the rare ways were taken


@browser_test
def test_memory_that_runs_out_reads_experts_from_flash_as_in_python(opened, sweep):
    """Contexts around the edge where experts no longer fit, on every device and class: the branches of the roofline."""
    rng, cases, refs, whole, part, none = np.random.default_rng(6), [], [], 0, 0, 0
    some = [int(i) for i in rng.choice(len(sweep), 8, replace=False)]
    for name, profile in devices().items():
        if profile.usable_bytes is None:
            continue
        for i in some:
            shape = tradeoff.shape_of(sweep["shape"][i])
            room = profile.usable_bytes.value - shape.dense_bytes - shape.embedding_bytes - shape.activation_bytes(128)
            for share in (0.01, 0.5, 0.97, 1.02):
                context = max(0, int((room - share * shape.moe_layers * shape.experts * shape.expert_bytes) / shape.kv_bytes(1)))
                for engine in ("cpu", "gpu"):
                    p = tradeoff.prediction(sweep, i, name, context=context, engine=engine)
                    cases.append([i, name, engine, context])
                    refs.append([None] * 3 if p.decode is None else [1e3 / p.decode.value, 1e3 / p.decode.high, 1e3 / p.decode.low])
                    whole, part, none = whole + (p.fits and p.memory.whole), part + (p.fits and not p.memory.whole), none + (not p.fits)
    assert whole and part and none
    for case, ref, comp in zip(cases, refs, opened().evaluate("all => all.map((c) => edgelab.time(...c))", cases), strict=True):
        assert same(comp, ref), case


@browser_test
def test_presets_ask_the_same_question(opened, sweep):
    tab = opened()
    for name in PRESETS:
        for filters in ((), (("model", ("edge-dense",)),)):
            state = State(filters=filters, context=2048)
            ref, comp = (
                tradeoff.apply(sweep, name, state),
                tab.evaluate("([name, state]) => edgelab.apply(name, state)", [name, json.loads(state.to_json())]),
            )
            for field in ("metric", "objective", "device", "context"):
                assert comp[field] == getattr(ref, field)
            assert same([comp["size_limit"], comp["quality_limit"]], [ref.size_limit, ref.quality_limit])


@browser_test
def test_the_verdict_on_two_is_the_same(opened, sweep):
    tab, rng, better = opened(), np.random.default_rng(7), {"a": 0, "b": 0, "": 0}
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, len(sweep), (24, 2))] + [(5, 5)]
    near = np.argsort(sweep["kld"])
    pairs += [(int(near[k]), int(near[k + 1])) for k in rng.integers(0, len(near) - 1, 12)]  # close calls
    cases = [(a, b, metric, int(rng.choice([1, 1, 30, 900]))) for a, b in pairs for metric in METRICS]
    found = tab.evaluate("all => all.map((c) => edgelab.compare(...c))", [[sweep["id"][a], sweep["id"][b], *c] for a, b, *c in cases])
    for (a, b, metric, picked), comp in zip(cases, found, strict=True):
        ref = tradeoff.compare(sweep, a, b, metric, picked_from=picked)
        assert (comp["better"], comp["significant"], comp["refused"]) == (ref.better, ref.significant, ref.refused)
        numbers = ("value_a", "value_b", "difference", "p", "low", "high", "ratio", "ratio_low", "ratio_high", "only_a", "only_b", "n")
        for name in numbers:
            assert np.isclose(
                np.nan if comp[name] is None else comp[name],
                np.nan if getattr(ref, name) is None else getattr(ref, name),
                rtol=1e-9, atol=1e-12, equal_nan=True,
            ), (name, comp[name], getattr(ref, name))  # fmt: skip
        if not ref.refused:
            assert comp["said"] == ref.said
            for name in ("p", "low", "high", "ratio_low", "ratio_high"):
                assert comp[name] == getattr(ref, name), "to the last bit"
        better[ref.better] += 1
    assert all(better.values())


# ---------------------------------------------------------------------------------------------- each control, by mouse and keys


def state_of(tab) -> dict:
    settled(tab)
    return tab.evaluate("edgelab.state()")


@browser_test
def test_every_control_has_a_name_and_an_effect(opened, sweep):
    tab = opened()
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=application], [role=region]")]
           .filter((n) => n.offsetParent !== null)
           .filter((n) => !(n.getAttribute("aria-label") || n.textContent.trim() || (n.labels && n.labels.length)))
           .map((n) => n.outerHTML)"""
    )
    assert unnamed == []
    start = state_of(tab)
    tab.select_option("#metric", "kld")
    tab.select_option("#objective", "size")
    tab.select_option("#device", "raspberry-pi-5")
    tab.select_option("#engine", "cpu")
    tab.fill("#context", "3000")
    tab.fill("#size", "3.5")
    tab.fill("#quality", "0.5")
    tab.fill("#late", "9")
    tab.uncheck("input[data-column=method][aria-label='method rtn']")
    now = state_of(tab)
    state = State(
        metric="kld", objective="size", device="raspberry-pi-5", engine="cpu", context=3000, size_limit=3.5e6, quality_limit=0.5,
        latency_limit=9.0, filters=(("method", tuple(m for m in sweep.values("method") if m != "rtn")),),
    )  # fmt: skip
    ref = tradeoff.view(sweep, state)
    assert now["best"] == sweep["id"][ref.best] and now["picked_from"] == ref.picked_from != start["picked_from"]
    assert sweep["label"][ref.best] in tab.inner_text("#say") and f"{ref.picked_from:,} configurations" in tab.inner_text("#say")
    rows = tab.locator("#front tbody tr")
    assert rows.count() == int((ref.front & ref.inside).sum())
    tab.click("#no-budgets")
    tab.click("#no-filters")
    free = tradeoff.view(sweep, State(metric="kld", objective="size", device="raspberry-pi-5", engine="cpu", context=3000))
    assert state_of(tab)["picked_from"] == free.picked_from
    assert free.notes[0] in tab.inner_text("#say")


@browser_test
def test_when_nothing_fits_the_page_says_which_budget_to_loosen(opened, sweep):
    tab = opened()
    tab.fill("#size", "0.1")
    tab.fill("#quality", "10")
    now = state_of(tab)
    assert now["best"] is None and now["picked_from"] == 0 and now["looked_at"] == ""
    loose = tradeoff.view(sweep, State(quality_limit=0.1)).picked_from
    assert "Nothing fits" in tab.inner_text("#say") and f"there would be {loose:,}" in tab.inner_text("#say")
    assert "None is chosen" in tab.inner_text("#chosen-say")
    tab.click("#no-budgets")
    assert state_of(tab)["best"] is not None and "Nothing fits" not in tab.inner_text("#say")


@browser_test
def test_sliders_lead_and_follow_their_boxes(opened):
    tab = opened()
    tab.focus("#size-slider")
    tab.keyboard.press("Home")
    least = state_of(tab)
    assert least["size_limit"] == pytest.approx(float(tab.input_value("#size")) * 1e6) and least["picked_from"] >= 1
    assert "MB" in tab.get_attribute("#size-slider", "aria-valuetext")
    tab.keyboard.press("End")
    assert state_of(tab)["size_limit"] is None and tab.input_value("#size") == ""
    tab.fill("#size", "2")
    middle = state_of(tab)
    assert middle["size_limit"] == 2e6 and 0 < int(tab.input_value("#size-slider")) < 200
    tab.focus("#context-slider")
    tab.keyboard.press("End")
    assert state_of(tab)["context"] == 131072 and tab.input_value("#context") == "131072"
    tab.fill("#late", "-3")
    settled(tab)
    assert "must be a number, 0 or more" in tab.inner_text("#alert")
    assert state_of(tab)["latency_limit"] is None


@browser_test
def test_a_preset_by_keyboard_gives_pythons_answer(opened, sweep):
    tab = opened()
    for name in PRESETS:
        tab.focus(f"[data-preset={name}]")
        tab.keyboard.press("Enter")
        ref = tradeoff.view(sweep, tradeoff.apply(sweep, name, State()))
        now = state_of(tab)
        assert now["best"] == (None if ref.best is None else sweep["id"][ref.best]), name
        assert tab.get_attribute(f"[data-preset={name}]", "aria-pressed") == "true"
        assert now["chosen"] == "" and now["looked_at"] == (now["best"] or "")
        assert PRESETS[name].meaning in tab.inner_text("#preset-meaning")


@browser_test
def test_points_are_chosen_and_pinned_by_keyboard_alone(opened, sweep):
    tab = opened()
    tab.focus("#plot-box")
    tab.keyboard.press("Home")
    first = tab.inner_text("#plot-say")
    smallest = int(np.argmin(np.where(tradeoff.view(sweep, State(**explorer_page._first(sweep))).inside, sweep["size_bytes"], np.inf)))
    assert sweep["label"][smallest] in first
    tab.keyboard.press("a")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#plot-say") != first
    tab.keyboard.press("b")
    tab.keyboard.press("Enter")
    now = state_of(tab)
    assert now["pin_a"] == sweep["id"][smallest] and now["chosen"] == now["pin_b"] not in ("", now["pin_a"])
    ref = tradeoff.pin(sweep, State(**explorer_page._first(sweep)), pin_a=now["pin_a"], pin_b=now["pin_b"])
    assert [now["from_a"], now["from_b"]] == [list(ref.from_a), list(ref.from_b)]
    ref = tradeoff.compare(sweep, now["pin_a"], now["pin_b"], now["metric"], picked_from=ref.searched)
    assert ref.said in tab.inner_text("#compare-say")
    assert tab.locator("#compare tbody tr").count() == len(METRICS) + 2
    tab.focus("#front button[data-act=choose]")
    tab.keyboard.press("Enter")
    settled(tab)
    assert tab.evaluate("document.activeElement.dataset.act") == "choose"  # the table was made anew; the focus stayed
    assert state_of(tab)["chosen"] == sweep["id"][int(tab.evaluate("document.activeElement.dataset.row"))]
    label = sweep["label"][sweep.index(state_of(tab)["chosen"])]
    assert label in tab.inner_text("#chosen-say")


@browser_test
def test_a_click_chooses_and_a_drag_brushes(opened, sweep):
    tab = opened()
    tab.click("#no-budgets")
    settled(tab)
    at = sweep.index(sweep["id"][int(np.argmax(sweep["size_bytes"]))])  # the largest stands alone
    tab.evaluate("() => document.querySelector('#plot').scrollIntoView()")  # a mouse reaches what is on the screen
    tab.mouse.click(*tab.evaluate("i => edgelab.place(i)", at))
    assert state_of(tab)["chosen"] == sweep["id"][at]
    tab.click("#brush")
    x0, y0, x1, y1 = tab.evaluate(
        "() => { const p = edgelab.panel(1), b = document.querySelector('#plot').getBoundingClientRect();"
        " return [b.left + p.left + 2, b.top + p.top + 2, b.left + (p.left + p.right) / 2, b.top + p.bottom - 2] }"
    )
    tab.mouse.move(x0, y0)
    tab.mouse.down()
    tab.mouse.move(x1, y1, steps=5)
    tab.mouse.up()
    brushed = state_of(tab)["brushed"]
    late = tradeoff.latency(sweep, "galaxy-s22").value
    assert 0 < len(brushed) < len(sweep) and late[brushed].max() < np.delete(late, brushed).max()
    assert f"{len(brushed):,} configurations in the brush" in tab.inner_text("#brushed")
    tab.select_option("#brush-x", "0")  # the same by numbers
    tab.fill("#brush-x0", "2")
    tab.fill("#brush-x1", "3")
    tab.fill("#brush-y0", "50")
    tab.fill("#brush-y1", "100")
    ref = np.flatnonzero((sweep["size_bytes"] >= 2e6) & (sweep["size_bytes"] <= 3e6) & (sweep["em_assistant"] >= 0.5))
    assert state_of(tab)["brushed"] == ref.tolist()
    tab.click("#brush-clear")
    assert state_of(tab)["brushed"] is None and tab.locator("#brushed").is_hidden()
    tab.click("#inspect")
    before = tab.evaluate("edgelab.panel(0).x.range")
    tab.mouse.move(x0, y0)
    tab.mouse.down()
    tab.mouse.move(x1, y1, steps=5)
    tab.mouse.up()
    settled(tab)
    assert tab.evaluate("edgelab.panel(1).x.range[1]") < 1e9 and tab.evaluate("edgelab.panel(0).x.range") == before
    tab.click("#whole")


@browser_test
def test_a_pin_remembers_what_it_was_picked_from_as_in_python(opened, sweep):
    tab, state = opened(), State(**explorer_page._first(sweep))
    v = tradeoff.view(sweep, state)
    worst = int(np.flatnonzero(v.rows & ~(v.front | v.front_size | v.front_latency))[0])
    front = next(int(i) for i in np.flatnonzero(v.front) if i != v.best)
    for row in (v.best, front, worst, int(np.flatnonzero(v.front & ~v.inside)[0])):
        tab.evaluate("patch => edgelab.set(patch)", {"pin_a": sweep["id"][row], "pin_b": sweep["id"][worst]})
        now, ref = state_of(tab), tradeoff.pin(sweep, state, pin_a=sweep["id"][row], pin_b=sweep["id"][worst])
        assert (now["from_a"], now["from_b"]) == (list(ref.from_a), list(ref.from_b))
    tab.evaluate("patch => edgelab.set(patch)", {"pin_a": sweep["id"][v.best]})
    words = f"picked from {v.picked_from:,} by how it did"
    settled(tab)
    assert words in tab.inner_text("#compare-say")
    tab.click("[data-preset=keep95]")
    settled(tab)
    assert words in tab.inner_text("#compare-say"), "a preset is no pin"
    tab.click("#swap")
    settled(tab)
    assert words in tab.inner_text("#compare-say") and state_of(tab)["from_b"] == ["em_assistant", v.picked_from]
    again = opened("#" + tab.evaluate("location.hash.slice(1)"))
    settled(again)
    assert words in again.inner_text("#compare-say"), "a link brings the count along"
    tab.select_option("#metric", "em_arithmetic")
    settled(tab)
    assert "by how it did" not in tab.inner_text("#compare-say"), "it was picked by another metric"


@browser_test
def test_labels_with_markup_make_no_element_in_the_page(opened, sweep, tmp_path):
    from dataclasses import replace

    labels = sweep["label"].copy()
    labels[:] = [f"<img src=x onerror=alert(1)></script><script>alert(2)</script> {text}" for text in labels]
    bad = replace(sweep, columns={**sweep.columns, "label": labels})
    tab = opened(path=explorer_page.write(tmp_path / "bad.html", bad))
    dialogs = []
    tab.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    tab.click("#against")
    tab.click("#all-summary")
    tab.click("#layers-box summary")
    tab.focus("#plot-box")
    tab.keyboard.press("Home")
    settled(tab)
    assert "<img src=x" in tab.inner_text("#say") and "<img src=x" in tab.inner_text("#tip"), "shown as text"
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 4 and dialogs == []


@browser_test
def test_a_drag_straight_up_zooms_one_axis_only(opened):
    tab = opened()
    x, y, before = tab.evaluate(
        "() => { const p = edgelab.panel(0), b = document.querySelector('#plot').getBoundingClientRect();"
        " return [b.left + (p.left + p.right) / 2, b.top + p.top + 20, p.x.range] }"
    )
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x, y + 120, steps=4)
    tab.mouse.up()
    settled(tab)
    assert tab.evaluate("edgelab.panel(0).x.range") == before and tab.evaluate("edgelab.drawn()") > 1
    low, high = tab.evaluate("edgelab.panel(0).y.range")
    assert high > low
    tab.evaluate("patch => edgelab.set(patch)", {})
    assert tab.evaluate("edgelab.panel(0).x.range") == before


@browser_test
def test_a_link_brings_the_view_back(opened, sweep):
    tab = opened()
    tab.click("[data-preset=lossless]")
    tab.uncheck("input[data-column=model][aria-label='model edge-dense']")
    tab.select_option("#pin-a", sweep["id"][0])
    tab.fill("#late", "0.4")
    now = state_of(tab)
    again = opened("#" + tab.evaluate("location.hash.slice(1)"))
    assert state_of(again) == now
    for bad in ("#metric=speed", "#size_limit=-1", "#pin_a=nobody", "#filters=[", "#what=1", "#from_a=kld,0", "#device=abacus"):
        again.evaluate("hash => { location.hash = hash }", bad)
        settled(again)
        assert "The link does not fit this page" in again.inner_text("#alert"), bad
        assert state_of(again)["metric"] == "em_assistant"


@browser_test
def test_the_recipe_and_the_python_that_are_copied_make_that_configuration(opened, sweep, monkeypatch):
    tab = opened()
    chosen = tab.evaluate("edgelab.state().looked_at")
    settled(tab)
    row = sweep.index(chosen)
    assert json.loads(tab.inner_text("#recipe")) == json.loads(sweep["recipe"][row])
    import sys
    from types import ModuleType

    asked = []
    fake = ModuleType("edgelab.sweep_run")
    names = ("size_bytes", "em_assistant", "em_arithmetic", "kld", "bits_per_byte")
    fake.measure_configuration = lambda model, recipe, step: asked.append((model, recipe)) or dict.fromkeys(names, 0)
    monkeypatch.setitem(sys.modules, "edgelab.sweep_run", fake)
    exec(compile(tab.inner_text("#code"), "copied", "exec"), {})
    from edgelab.recipe import Recipe

    assert asked == [(sweep["model"][row], Recipe.from_json(sweep["recipe"][row]))]


@browser_test
def test_light_dark_narrow_and_print(opened):
    for size in ((1280, 900), (800, 900), (390, 844)):
        tab = opened(size=size, color_scheme="dark")
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
        ink = tab.evaluate("getComputedStyle(document.body).color")
        tab.select_option("#theme", "light")
        assert tab.evaluate("getComputedStyle(document.body).color") != ink
        settled(tab)
        box = tab.locator("#plot-points").bounding_box()
        assert box["width"] > 0.8 * (size[0] - 420 if size[0] > 1100 else size[0] - 80)
        painted = tab.evaluate(
            "() => { const c = document.querySelector('#plot-points'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            " let n = 0; for (let k = 3; k < d.length; k += 4) n += d[k] > 100; return n / (c.width * c.height) }"
        )
        assert painted > 0.005
    tab.emulate_media(media="print")
    assert tab.locator("#controls").is_hidden() and tab.locator("#say").is_visible()


@browser_test
def test_tables_open_sort_and_grow(opened, sweep):
    tab = opened()
    tab.click("#no-budgets")
    tab.click("#all-summary")
    settled(tab)
    assert tab.locator("#all tbody tr").count() == 50
    tab.click("#all [data-sort=size]")
    assert float(tab.inner_text("#all tbody tr:first-child td.num >> nth=0")) == pytest.approx(sweep["size_bytes"].min() / 1e6, abs=0.01)
    tab.click("#more")
    assert tab.locator("#all tbody tr").count() == 150
    tab.click("#layers-box summary")
    settled(tab)
    row = sweep.index(state_of(tab)["looked_at"])
    assert tab.locator("#layers tbody tr").count() == len(sweep.layer(row)["name"])


@browser_test
def test_the_picture_is_saved(opened, tmp_path):
    tab = opened()
    with tab.expect_download() as download:
        tab.click("#picture")
    file = tmp_path / "picture.png"
    download.value.save_as(file)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 20_000


@browser_test
def test_without_javascript_the_front_is_there(browser, written, sweep):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written.as_uri())
    ref = tradeoff.view(sweep, State(**explorer_page._first(sweep)))
    assert tab.locator("noscript tbody tr, .layout table tbody tr").count() == int(ref.front_size.sum())
    context.close()
