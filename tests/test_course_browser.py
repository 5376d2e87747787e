"""Every widget of every notebook in a real JupyterLab in Chromium, with no network: by mouse, and by keyboard alone.

A notebook is cut to what its widget needs (see `lab_browser.cut`), so that the whole course takes minutes; that it runs from top to
bottom is another test's concern. With EDGELAB_SCREENSHOTS=folder each widget is photographed at 1280 and 800 pixels, light and dark.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lab_browser
import nbformat
import pytest

from edgelab.frame import CLASS, frame
from edgelab.scheme import QuantScheme

NOTEBOOKS = lab_browser.ROOT / "notebooks"
STORED = sorted(NOTEBOOKS.glob("*.ipynb"))

# What stands in for a notebook's own settings, so that a test is quick: the control is the same, it only holds less.
SMALL = {
    "MatmulControl": {"tokens": "[1, 16]", "repeat": "2"},
    "ThresholdControl": {"calibration_tokens": "4096"},
    "StaircaseControl": {
        "calibration_tokens": "1024",
        "documents": '{"prose": 1, "code": 1, "assistant": 0, "arithmetic": 0}',
        "recipes": '{"rtn": Recipe.body("int4-g32"), "gptq": Recipe.body("int4-g32", method="gptq")}',
        "tried": 'dict.fromkeys(("rtn", "gptq"), ("int4-g32", "int3-g32", "int4-g128"))',
    },
    "ZerosControl": {
        "calibration_tokens": "1024",
        "documents": '{"prose": 1, "code": 1, "assistant": 0, "arithmetic": 0}',
        "settings": '{"25%": (0.25, "unstructured"), "50%": (0.5, "unstructured"), "2:4": (0.5, "2:4")}',
    },
    "AtlasControl": {"domain_tokens": "256"},
    "SubmitControl": {"questions": "12"},
    "MapControl": {"targets": '{"onnx": {"cache": True, "experts": "auto"}, "gguf": {"tokenizer": tokenizer}}'},
}
OPERATED = {  # {widget: the lesson that has it}
    "BitsControl": "01",
    "MatmulControl": "02",
    "ThresholdControl": "03",
    "StaircaseControl": "04",
    "ZerosControl": "05",
    "AtlasControl": "06",
    "TemperatureControl": "07",
    "MapControl": "08",
    "DeviceControl": "09",
    "GovernorControl": "09",
    "Chat": "09",
    "Explorer": "10",
    "SubmitControl": "12",
}


def numbers(text: str) -> list[float]:
    """All numbers of a text, thousands' commas aside."""
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


# ------------------------------------------------------------------------------------------------------ without a browser


def test_no_widget_is_left_out():
    found = {}
    for source in sorted(lab_browser.SOURCES.glob("*.py")):
        for widget in lab_browser.widgets_of(lab_browser.read(source.stem)):
            found[widget] = source.stem[:2]
    assert found == OPERATED


@pytest.mark.parametrize("stored", STORED, ids=lambda p: p.stem)
def test_plots_have_a_static_picture_and_a_sentence(stored):
    """A code host runs no script: each plot is stored as a picture too, which says in words what it shows."""
    for cell in nbformat.read(stored, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            plotly = "application/vnd.plotly.v1+json" in data
            pictures = [kind for kind in ("image/svg+xml", "image/png") if kind in data]
            assert not plotly or pictures, f"{stored.name}, {cell.id}: a plot without a picture"
            if "image/svg+xml" in pictures:
                described = re.search(r"<desc[^>]*>([^<]+)</desc>", data["image/svg+xml"])
                assert described and len(described[1].split()) >= 5, f"{stored.name}, {cell.id}: a picture without a sentence"
            if "image/png" in pictures:
                told = data.get("text/plain", "")
                assert len(told.split()) >= 5 and not told.startswith("<"), f"{stored.name}, {cell.id}: a picture without a sentence"


def test_a_cut_keeps_what_the_widget_needs_and_no_more():
    cells = (
        "import math\nfrom edgelab.widgets import MatmulControl  # and more",
        "n = 3\nm = 4\nk = 5",
        "rows = [i * n for i in range(4)]\nrows.append(m)\nprint(rows)\nfor i in rows:\n    k = i",
        "unused = math.sqrt(k)\nn += 1\nn = 7",
        "control = MatmulControl(rows, n)\ncontrol",
        "control.choose(1)",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    assert lab_browser.widgets_of(notebook) == {"MatmulControl": 4}
    assert [c.source for c in lab_browser.cut(notebook, "MatmulControl", {"m": "9"}).cells] == [
        "from edgelab.widgets import MatmulControl",
        "n = 3\nm = 9",
        "rows = [i * n for i in range(4)]\nrows.append(m)",
        "n = 7",
        "control = MatmulControl(rows, n)\ncontrol",
    ]
    with pytest.raises(KeyError, match="needs nothing of the names k"):
        lab_browser.cut(notebook, "MatmulControl", {"k": "1"})


def test_a_frame_holds_its_children_and_no_plot_in_it_offers_an_upload():
    w, go = pytest.importorskip("ipywidgets"), pytest.importorskip("plotly.graph_objects")
    figure, box = go.FigureWidget(), w.BoundedIntText(description="n")
    framed = frame(w.HBox([box]), w.VBox([figure]))
    assert framed.children[0].children == (box,) and framed.children[1].children == (figure,) and len(framed.children) == 3
    assert CLASS in framed._dom_classes and figure._config["showSendToCloud"] is False and figure._config["responsive"] is True
    assert f'closest(".{CLASS}")' in framed.children[2]._esm and "data-lm-suppress-shortcuts" in framed.children[2]._esm


# ----------------------------------------------------------------------------------------------------------- with a browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if missing := lab_browser.why_not():
        pytest.skip(missing)
    with lab_browser.lab(tmp_path_factory.mktemp("lab")) as it:
        yield it


@contextmanager
def operated(lab, widget: str, **more: str) -> Iterator[lab_browser.Opened]:
    """The notebook of a widget, cut and open; and after it was operated a look for what must not be there."""
    lab.errors.clear()
    try:
        notebook = lab_browser.cut(lab_browser.read(OPERATED[widget]), widget, SMALL.get(widget, {}) | more)
        it = lab.open(notebook, f"{OPERATED[widget]}_{widget}")
        yield it
        photograph(it, widget)
        found = {
            "controls without a name": [role for role, name in it.controls() if not name],
            "errors in the widget": it.alerts(),
            "errors in cells": it.cell_errors(),
            "errors in the browser": lab.errors,
            "cut off in a window of 800 pixels": at_800(it),
            "requests that were not for this machine": lab.left,
        }
        assert not any(found.values()), {what: things for what, things in found.items() if things}
    finally:
        lab.close()


def at_800(it) -> list[str]:
    it.tab.set_viewport_size({"width": 800, "height": 1000})
    it.tab.wait_for_timeout(500)  # a plot redraws itself when the window has settled
    found = it.cut_off()
    it.tab.set_viewport_size({"width": 1280, "height": 1000})
    return found


def photograph(it, name: str) -> None:
    if folder := os.environ.get("EDGELAB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for theme in ("dark", "light"):
            for width in (1280, 800):
                it.lab.look(theme, width)
                it.view.scroll_into_view_if_needed()
                it.tab.wait_for_timeout(1500)
                it.view.screenshot(path=f"{folder}/{name}-{width}-{theme}.png")
        it.tab.set_viewport_size({"width": 1280, "height": 1000})


def in_a_browser(test):
    return pytest.mark.browser(pytest.mark.slow(test))


@in_a_browser
def test_the_wall_holds_and_the_guard_sees_who_runs_against_it(lab):
    asked = "https://cdn.example/plotly.js"
    lab.tab.evaluate("url => fetch(url).catch(() => null).then(() => null)", asked)
    assert lab.left == [asked]
    lab.left.clear()
    assert any("ERR_NAME_NOT_RESOLVED" in e for e in lab.errors), lab.errors


@in_a_browser
def test_01_bits(lab):
    with operated(lab, "BitsControl") as it:
        assert "int4-g32: " in it.sentence()
        (first,) = it.rows()[1:]
        it.control("combobox", "bits").select_option("3")  # by mouse
        it.until("int3-g32: ")
        third = it.rows()[2]
        assert numbers(first[2])[0] - numbers(third[2])[0] == pytest.approx(1, abs=0.01), "a bit less is a bit less"
        assert numbers(third[3])[0] > 2 * numbers(first[3])[0], "three bits lose more than four"
        it.drawn(lambda d: sorted(d[0]["x"]) == pytest.approx([numbers(r[1])[0] for r in (third, first)], abs=0.005))
        it.tab_to(it.control("spinbutton", "group size"))  # by keyboard alone
        it.write("48")
        it.until("ValueError", "48", selector="[role=alert]")
        it.write("64")
        it.until("int3-g64: ")
        it.tab_to(it.control("combobox", "bits"))
        it.press("ArrowDown")
        it.until("int4-g64: ")
        assert [row[0] for row in it.rows()[1:]] == ["int4-g32", "int3-g32", "int3-g64", "int4-g64"]


@in_a_browser
def test_02_product(lab):
    with operated(lab, "MatmulControl") as it:

        def counted() -> float:
            return QuantScheme.parse(re.match(r"\S+?(?=[,:])", it.sentence())[0]).bits_per_weight((rows, columns)) * rows * columns / 8e6

        megabytes, rows, columns = numbers(re.search(r"[\d.]+ MB for [\d,]+ x [\d,]+", it.until("1 row of int8 activations"))[0])
        rows, columns = int(rows), int(columns)
        assert megabytes == pytest.approx(counted(), abs=0.006)
        before = it.drawn()
        it.control("combobox", "bits").select_option("8")  # by mouse
        said = it.until("int8-g32")
        assert numbers(re.search(r"[\d.]+ MB", said)[0])[0] == pytest.approx(counted(), abs=0.006)
        it.drawn(lambda d: d[1]["y"] != before[1]["y"])  # the errors' outline
        it.slide("rows (tokens)", 5 / 9)
        it.until("int8-g32, 32 rows of int8 activations")
        assert it.control("spinbutton", "rows (tokens)").input_value() == "32"
        it.tab_to(it.control("combobox", "bits"))  # by keyboard alone
        it.press("Home")
        it.until("int2-g32, 32 rows")
        it.tab_to(it.control("combobox", "activations"))
        it.press("ArrowDown")
        it.until("int2-g32, 32 rows of float32 activations")
        it.tab_to(it.control("spinbutton", "rows (tokens)"))
        it.write("3")
        it.until("int2-g32, 3 rows of float32 activations")
        it.tab_to(it.control("slider", "rows (tokens)"))
        it.press("ArrowLeft")
        it.until("int2-g32, 2 rows of float32 activations")
        assert [row[1:3] for row in it.rows()[-3:]] == [["32", "float32"], ["3", "float32"], ["2", "float32"]]
        it.drawn(lambda d: len(d[-1]["x"]) == 3)  # three points with float32 activations


@in_a_browser
def test_03_threshold(lab):
    with operated(lab, "ThresholdControl") as it:
        box, start = it.control("spinbutton", "threshold"), it.sentence()
        it.control("combobox", "rule").select_option("max")  # by mouse
        said = it.until("; 0 % of the values are clipped")
        largest = numbers(said)[0]
        assert float(box.input_value()) == pytest.approx(largest, rel=1e-3) and said != start
        it.slide("threshold", 0.5)
        half = numbers(it.another(said))[0]
        assert half < largest and it.control("combobox", "rule").input_value() == "by hand"
        it.tab_to(box)  # by keyboard alone
        it.write("12.7")
        said = it.until("Threshold 12.7: steps of 0.1;")
        it.drawn(lambda d: d[3]["x"] == d[4]["x"] == [12.7, 12.7])
        it.press("ArrowUp")
        it.drawn(lambda d: 12.7 < d[3]["x"][0] < 12.72)
        it.tab_to(it.control("slider", "threshold"))
        it.press("ArrowRight")
        it.tab.wait_for_function("box => +box.value > 12.72", arg=box.element_handle())
        it.tab_to(it.control("combobox", "rule"))
        it.press("Home", "ArrowDown")
        assert numbers(it.until("Threshold", "; 0 % of the values"))[0] == largest
        it.drawn(lambda d: len(it.rows()) == 1 + len(d[5]["x"]))  # a line of the table for each point of the plot


@in_a_browser
def test_04_staircase(lab):
    with operated(lab, "StaircaseControl") as it:
        it.until("gptq, int4-g32: 4.5")
        it.control("combobox", "method").select_option("rtn")  # by mouse
        four = it.until("rtn, int4-g32: ")
        it.slide("bits", 0)
        three = it.until("rtn, int3-g32: ")
        assert numbers(four.split(": ")[1])[0] - numbers(three.split(": ")[1])[0] == pytest.approx(1, abs=1e-3)
        kld = [numbers(re.search(r"KL divergence \S+", s)[0])[0] for s in (four, three)]
        assert kld[1] > 2 * kld[0]
        level, ring = it.drawn(lambda d: d[-1]["y"] == pytest.approx([kld[1]], rel=0.01))[-2:]
        assert level["y"] == ring["y"] * 2
        it.tab_to(it.control("spinbutton", "your model, 10⁹"))  # by keyboard alone
        it.write("8")
        bits = numbers(three.split(": ")[1])[0]
        assert numbers(it.until("A model with 8 · 10⁹"))[-1] == pytest.approx(bits, abs=0.01), "8 · 10⁹ weights of so many bits, in bytes"
        it.tab_to(it.control("spinbutton", "bits"))
        it.write("5")
        it.until("5 bits were not measured; use 3 or 4", selector="[role=alert]")
        it.press("ArrowDown")
        it.until("rtn, int4-g32: ")
        it.tab_to(it.control("slider", "bits"))
        it.press("ArrowLeft")
        it.until("rtn, int3-g32: ")
        it.tab_to(it.control("combobox", "method"))
        it.press("ArrowDown")
        it.until("gptq, int3-g32: ")
        assert sorted(row[0] for row in it.rows()[1:]) == ["int3-g32", "int3-g32", "int4-g32", "int4-g32"]


@in_a_browser
def test_05_zeros(lab):
    with operated(lab, "ZerosControl") as it:
        half = it.until("sparsegpt 50%: 50.0 % of the blocks' weights are zero")
        it.control("combobox", "method").select_option("magnitude")  # by mouse
        said = it.until("magnitude 50%: 50.0 %")
        kld = [numbers(re.search(r"divergence \S+", s)[0])[0] for s in (half, said)]
        assert kld[0] < kld[1]
        it.drawn(lambda d: d[-1]["y"] == pytest.approx([kld[1]], rel=0.01))
        percent = it.control("spinbutton", "zeros, %")
        it.spin(percent, up=False)
        it.until("49 % zeros was not measured; use 25 %, 50 %", selector="[role=alert]")
        it.tab_to(percent)  # by keyboard alone
        it.write("25")
        quarter = it.until("magnitude 25%: 25.0 %")
        assert numbers(re.search(r"divergence \S+", quarter)[0])[0] < numbers(re.search(r"divergence \S+", said)[0])[0]
        it.tab_to(it.control("combobox", "pattern"))
        it.press("ArrowDown")
        it.until("magnitude 2:4: 50.0 %")
        assert percent.input_value() == "50", "a pattern has one share of zeros"
        assert len(it.rows()) == 5


@in_a_browser
def test_06_atlas(lab):
    with operated(lab, "AtlasControl") as it:
        it.until("0 edits; last:", "KL divergence now 0.0000")
        scores = it.drawn()[0]["z"]
        it.control("combobox", "map of").select_option("tokens")  # by mouse
        it.until("expert 0: tokens ")
        z = it.drawn(lambda d: d[0]["z"] != scores)[0]["z"]
        assert [sum(row) for row in z] == pytest.approx([1] * len(z), abs=0.001), "shares of all choices"
        plot = it.view.locator(".js-plotly-plot .nsewdrag").first
        plot.scroll_into_view_if_needed()
        size = plot.bounding_box()
        width, height = size["width"] / len(z[0]), size["height"] / len(z)
        it.tab.mouse.click(size["x"] + 5.5 * width, size["y"] + 1.5 * height)
        rank = 1 + sum(v > z[1][5] for v in z[1])
        it.until("Layer 1 ", f"expert 5: tokens {z[1][5]:.3g}", f"number {rank} of 16")
        assert it.control("spinbutton", "expert").input_value() == "5"
        it.drawn(lambda d: d[1]["x"] == [5])
        it.control("button", "Do it").click()
        dropped = it.until("1 edits; last:", "drop")
        kld = numbers(re.search(r"divergence now \S+", dropped)[0])[0]
        assert kld > 0
        it.drawn(lambda d: d[3]["y"] == pytest.approx([0, kld], abs=1e-4))
        it.tab_to(it.control("spinbutton", "layer"))  # by keyboard alone
        it.write("2")
        it.press("Tab")
        it.write("3")
        it.until("Layer 2 ", "expert 3: ")
        it.tab_to(it.control("combobox", "action"))
        it.press("End")
        it.tab_to(it.control("button", "Do it"))
        it.press("Enter")
        it.until("2 edits; last:", "bits")
        it.drawn(lambda d: len(it.rows()) == 4 and len(d[3]["y"]) == 3)
        it.tab_to(it.control("button", "Take all back"))
        it.press("Space")
        it.until("0 edits", "KL divergence now 0.0000")


@in_a_browser
def test_07_temperature(lab):
    with operated(lab, "TemperatureControl") as it:
        box = it.control("spinbutton", "temperature T")
        it.tab_to(box)  # by keyboard alone

        def ratio(t: str) -> float:
            it.write(t)
            it.until(f"T = {t}: ")
            first, second = (float(row[1]) for row in it.rows()[1:3])
            it.drawn(lambda d: d[0]["y"][:2] == pytest.approx([first, second], abs=1e-4))
            return first / second

        one, two = ratio("2"), ratio("4")
        assert two == pytest.approx(one**0.5, rel=0.02), "twice the temperature, half of the logarithm"
        entropy = numbers(it.sentence().split("tells ")[1])[0]
        it.press("ArrowUp")
        assert numbers(it.until("T = 4.1: ").split("tells ")[1])[0] > entropy
        slider = it.control("slider", "temperature T")
        it.tab_to(slider)
        follows = "e => Math.abs(10 ** e.getAttribute('aria-valuetext') - 4.1) < 0.1"  # its own scale is the logarithm
        it.tab.wait_for_function(follows, arg=slider.element_handle())
        it.press("End")
        it.until("T = 19.95: ")
        it.slide("temperature T", 1 / 2.3)  # by mouse
        it.tab.wait_for_function("box => Math.abs(box.value - 1) < 0.1", arg=box.element_handle())
        it.spin(box)
        it.until(f"T = {float(box.input_value()):g}: ")


@in_a_browser
def test_08_map(lab):
    with operated(lab, "MapControl") as it:
        it.until("bundle: ")
        sizes = {}
        for name in ("onnx", "gguf"):
            it.control("combobox", "file").select_option(name)  # by mouse
            it.until(f"{name}: ")
            sizes[name] = {row[0]: row[1] for row in it.rows()[1:]}
        assert sizes["onnx"]["codes"] == sizes["gguf"]["codes"], "the same codes in both files"
        assert sizes["onnx"] != sizes["gguf"]
        before = it.drawn()
        it.control("combobox", "kind").select_option("scales")
        it.until("gguf: ", "scales")
        it.drawn(lambda d: d[0]["marker"]["colors"] != before[0]["marker"]["colors"])
        bold = "v => [...v.querySelectorAll('tr')].filter(r => r.style.fontWeight === '700').map(r => r.cells[0].innerText)"
        assert it.view.evaluate(bold) == ["scales"]
        it.tab_to(it.control("combobox", "kind"))  # by keyboard alone
        it.press("Home", "ArrowDown")
        it.tab.wait_for_function(f"v => ({bold})(v)[0] === 'codes'", arg=it.view.element_handle())
        it.tab_to(it.control("combobox", "file"))
        it.press("ArrowUp")
        it.until("onnx: ")
        it.drawn(lambda d: d[0]["labels"] != before[0]["labels"])


@in_a_browser
def test_09_device(lab):
    from edgelab import device_lab
    from edgelab.device import predict

    def expected(device: str, model: str, recipe: str, context: int) -> str:
        shape = device_lab.shape_with(model, device_lab.models()[model], recipe)
        return str(predict(device, shape, context=context, prompt=128, engine="cpu-tuned").decode)

    with operated(lab, "DeviceControl") as it:
        it.until("int4-g32, on oneplus-12", expected("oneplus-12", "llama-3.2-1b", "int4-g32", 1024))
        before = it.drawn()
        it.control("combobox", "recipe").select_option("int8-g32")  # by mouse
        it.until("int8-g32", expected("oneplus-12", "llama-3.2-1b", "int8-g32", 1024))
        it.drawn(lambda d: d[1]["y"] != before[1]["y"])
        it.slide("context", 13 / 17)
        it.until("context 8,192: ", expected("oneplus-12", "llama-3.2-1b", "int8-g32", 8192))
        it.spin(it.control("spinbutton", "context"))
        it.until("context 8,193: ")
        it.tab_to(it.control("spinbutton", "context"))  # by keyboard alone
        it.write("500")
        it.until("context 500: ", expected("oneplus-12", "llama-3.2-1b", "int8-g32", 500))
        it.tab_to(it.control("slider", "context"))
        it.press("ArrowRight")
        it.until("context 1,024: ")
        it.tab_to(it.control("combobox", "model"))
        it.press("ArrowDown")
        it.until("llama-3.2-3b, int8-g32, on oneplus-12", expected("oneplus-12", "llama-3.2-3b", "int8-g32", 1024))
        it.tab_to(it.control("combobox", "device"))
        it.press("ArrowUp")
        it.until("on xiaomi-13-pro", expected("xiaomi-13-pro", "llama-3.2-3b", "int8-g32", 1024))
        assert it.rows()[1][:2] == ["decoding", expected("xiaomi-13-pro", "llama-3.2-3b", "int8-g32", 1024)]


@in_a_browser
def test_09_governor(lab):
    from edgelab import device_lab

    control = device_lab.GovernorControl()
    with operated(lab, "GovernorControl") as it:
        picture = it.view.locator("svg[role=img]").first
        before = picture.inner_html()
        for turn, do in (
            ({"static_w": 2.0}, lambda: it.slide("static power, W", 0.5)),  # by mouse
            ({"at": 21}, lambda: it.spin(it.control("spinbutton", "below battery, %"))),
            ({"per_minute": 8.0}, lambda: (it.tab_to(it.control("spinbutton", "requests per minute")), it.write("8"))),  # by keyboard alone
            ({"static_w": 2.1}, lambda: (it.tab_to(it.control("slider", "static power, W")), it.press("ArrowRight"))),
            ({"low": control.low.options[1]}, lambda: (it.tab_to(it.control("combobox", "low-power setting")), it.press("ArrowDown"))),
        ):
            control.choose(**turn)
            do()
            it.until(" ".join(control.told.split()))
        assert picture.inner_html() != before
        assert len(it.rows()) == len(control.table.value.split("<tr>")) - 1


@in_a_browser
def test_09_chat(lab):
    with operated(lab, "Chat") as it:
        box, log = it.control("textbox", "message"), it.view.locator("[role=log]")
        box.click()  # by mouse
        box.press_sequentially("heat the kitchen to twenty one degrees")
        it.control("button", "Send").click()
        said = it.until("You: heat the kitchen", 'Model: {"call": "heat", "room": "kitchen", "degrees": 21}', selector="[role=log]")
        assert "confidence" in said and box.input_value() == ""
        it.control("button", "Right").click()
        it.view.get_by_text("Noted: right.").wait_for()
        it.spin(it.control("spinbutton", "most tokens"), up=False)
        it.tab_to(it.control("spinbutton", "most tokens"))  # by keyboard alone
        it.write("3")
        it.tab_to(it.control("checkbox", "remember what was said"))
        it.press("Space")
        assert it.control("checkbox", "remember what was said").is_checked()
        it.tab_to(box)
        it.tab.keyboard.type("dim the lamp in the bedroom")
        it.press("Enter")
        it.until("You: dim the lamp in the bedroom", "3 tokens,", selector="[role=log]")
        it.tab_to(it.control("button", "Wrong"))
        it.press("Enter")
        it.view.get_by_text("Noted: wrong.").wait_for()
        it.tab_to(it.control("button", "What the monitor counted"))
        it.press("Enter")
        assert any(row[:2] == ["requests", "2"] for row in it.rows()), it.rows()
        it.tab_to(it.control("button", "New"))
        it.press("Space")
        it.view.get_by_text("A new conversation.").wait_for()
        assert log.inner_text().strip() == ""


@in_a_browser
def test_10_explorer(lab):
    """Lightly: the explorer has tests of its own. What stands there must be what the same choices say without a browser."""
    from sweeps import write

    from edgelab.explorer import Explorer
    from edgelab.tradeoff import PRESETS, State, Sweep

    file = write(lab.folder / "sweep.parquet")
    twin = Explorer(Sweep.read(file), State(metric="em_assistant", device="galaxy-s22"))

    def told() -> str:
        return " ".join(twin.told.split())

    with operated(lab, "Explorer", sweep_file=repr(str(file))) as it:
        before = it.until(told())
        it.control("combobox", "question").select_option(PRESETS["keep95"].title)  # by mouse
        twin.choose("keep95")
        assert it.until(told()) != before
        it.tab_to(it.control("spinbutton", "size at most, MB"))  # by keyboard alone
        it.write("3")
        twin.choose(size_limit=3e6)
        it.until(told())
        it.tab_to(it.control("combobox", "device"))
        it.press("Home")
        twin.choose(device=twin.device.options[0][1])
        it.until(told())
        it.tab_to(it.control("slider", "size at most, MB"))
        it.press("End")
        twin.choose(size_limit=None)
        it.until(told())


@in_a_browser
def test_12_capstone(lab):
    from edgelab.capstone import Challenge
    from edgelab.paths import data_dir
    from edgelab.shape import from_config

    config = json.loads((data_dir() / "edge-moe" / "config.json").read_text(encoding="utf-8"))

    def planned(scheme: str, **changed) -> str:
        shape = from_config(config | changed, scheme)
        return f"weights {shape.weight_bytes / 1e6:.2f} MB, with cache and working memory {Challenge().needs(shape) / 1e6:.2f} of"

    with operated(lab, "SubmitControl") as it:
        it.until(planned("int2-g32"))
        it.slide("bits", 2 / 6)  # by mouse
        it.until(planned("int4-g32"), "it would not fit")
        it.control("combobox", "one scale per").select_option("64 weights")
        it.until(planned("int4-g64"))
        it.control("combobox", "method").select_option("rtn")
        it.control("button", "submit").click()
        said = it.until("my first: ", "It took")
        row = next(row for row in it.rows() if "my first" in row)
        assert f"{numbers(said.split('), ')[1])[0]:.2f}" in " ".join(row)
        it.tab_to(it.control("textbox", "name of the entry"))  # by keyboard alone
        it.write("three quarters")
        it.tab_to(it.control("spinbutton", "experts kept"))
        it.write("3")
        it.tab_to(it.control("spinbutton", "experts per token"))
        it.write("4")
        it.until("experts per token=4 is more than the experts kept, 3", selector="[role=alert]")
        it.write("2")
        it.tab_to(it.control("spinbutton", "experts kept"))
        it.write("12")
        it.until(planned("int4-g64", n_routed_experts=12))
        it.tab_to(it.control("slider", "bits"))
        it.press("ArrowLeft", "ArrowLeft")
        it.until(planned("int2-g64", n_routed_experts=12), "it would fit")
        it.tab_to(it.control("combobox", "one scale per"))
        it.press("Home")
        it.until(planned("int2-g32", n_routed_experts=12))
        it.tab_to(it.control("button", "submit"))
        it.press("Enter")
        it.until("three quarters: ", "It took")
        it.drawn(lambda d: sum(len(trace["x"] or []) for trace in d[:2]) == 2)  # those that fit and those that don't
