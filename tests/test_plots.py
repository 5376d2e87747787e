"""Figures, their SVG twins, the sentences beside them, and the page that must open without a network."""

import re
import xml.etree.ElementTree as ET

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from edgelab import page, plots, words
from edgelab.methods.coverage import Coverage, CoverageRow
from edgelab.recipe import Recipe
from edgelab.report import Report, Row


@pytest.fixture
def report() -> Report:
    rows = []
    for model, size, harm in (("fp", 14.8e6, 0.0), ("int8", 7.8e6, 0.001), ("int4", 4.4e6, 0.05)):
        rows.append(Row(model, "weight_bytes", size, "B"))
        for i, domain in enumerate(("prose", "assistant")):
            bpb = 1.5 - i + harm
            rows.append(Row(model, "bits_per_byte", bpb, slice=domain, low=bpb - 0.03, high=bpb + 0.05, n=30, seed=0))
            rows.append(Row(model, "kld", harm * (1 + i), slice=domain, low=harm * 0.8, high=harm * (1.3 + i), n=30, seed=0))
        rows.append(Row(model, "exact_match", 0.96 - harm, slice="assistant", low=0.9 - harm, high=0.98 - harm, n=100))
    return Report(tuple(rows))


@pytest.fixture
def coverage() -> Coverage:
    rows = [
        CoverageRow(f"model.layers.{i}.mlp.experts.{p}", "experts", (4, 64, 64), 4 * 64 * 64, "int4-g32", 9216, True)
        for i in range(2)
        for p in ("gate_up_proj", "down_proj")
    ]
    return Coverage((*rows, CoverageRow("model.embed_tokens.weight", "embedding", (128, 64), 128 * 64, "bfloat16", 2 * 128 * 64, False)))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_template_is_registered_and_its_ink_reads_on_light_and_dark():
    assert pio.templates["edgelab"].layout.colorway == plots.OKABE_ITO
    ink = _luminance(plots.INK)
    assert (1.05 / (ink + 0.05)) >= 4.5  # WCAG AA on white
    assert (ink + 0.05) / (_luminance("#14181d") + 0.05) >= 2.5  # the page brightens it further for dark readers


def test_size_against_draws_what_the_report_says(report):
    fig = plots.size_against(report)
    assert [t.name for t in fig.data] == ["prose", "assistant"]
    prose = fig.data[0]
    assert list(prose.x) == pytest.approx([4.4, 7.8, 14.8])
    assert list(prose.y) == pytest.approx([1.55, 1.501, 1.5])
    assert list(prose.error_y.array) == pytest.approx([0.05] * 3)
    assert list(prose.error_y.arrayminus) == pytest.approx([0.03] * 3)


def test_size_against_says_what_is_missing(report):
    with pytest.raises(LookupError, match=r"no rows of .weight_bytes"):
        plots.size_against(report.where(metric="kld"))


def test_divergence_is_logarithmic_and_says_who_is_not_on_it(report):
    fig = plots.by_domain(report, "kld")
    assert fig.layout.yaxis.type == "log"
    assert [t.name for t in fig.data] == ["int8", "int4"]
    assert "fp is 0" in fig.layout.title.text
    shares = plots.by_domain(report, "exact_match")
    assert list(shares.data[0].y) == pytest.approx([96.0])
    assert len({t.marker.symbol for t in shares.data}) == 3  # never by colour alone
    with pytest.raises(LookupError, match="'flips'"):
        plots.by_domain(report, "flips")


def test_layer_bytes_add_up(coverage):
    fig = plots.layer_bytes(coverage)
    bars = [t for t in fig.data if t.type == "bar"]
    assert sum(sum(t.y) for t in bars) == pytest.approx(coverage.predicted_bytes / 1e6)
    full = next(t for t in fig.data if t.type == "scatter")
    assert sum(full.y) == pytest.approx(2 * coverage.parameters / 1e6)
    assert list(bars[0].x) == ["embedding", "layer 0", "layer 1"]


def test_svg_is_whole_and_places_points_in_order(report, coverage):
    for fig in (*(p.figure for p in page.plots_of(report, coverage)), plots.by_domain(report, "bits_per_byte")):
        root = ET.fromstring(plots.to_svg(fig, describe="a < b & c"))
        assert root.attrib["role"] == "img"
        names = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
        assert fig.layout.title.text in names
        assert all(t.name in names for t in fig.data)
        assert root.find("{http://www.w3.org/2000/svg}desc").text == "a < b & c"
    svg = plots.to_svg(plots.size_against(report))
    first = re.search(r'<polyline points="([^"]+)"', svg)[1]
    points = [tuple(map(float, p.split(","))) for p in first.split()]
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert points[0][1] < points[-1][1]  # int4's 1.55 stands above fp's 1.5: SVG counts y downwards


def test_svg_log_axis_puts_decades_at_equal_distances():
    fig = go.Figure(go.Scatter(x=[1, 2, 3], y=[0.01, 0.1, 1.0], mode="lines"), layout={"yaxis": {"type": "log"}})
    points = re.search(r'<polyline points="([^"]+)"', plots.to_svg(fig))[1]
    a, b, c = (float(p.split(",")[1]) for p in points.split())
    assert a - b == pytest.approx(b - c, abs=0.2)
    assert a > b > c


def test_svg_refuses_what_it_cannot_draw():
    with pytest.raises(TypeError, match="heatmap"):
        plots.to_svg(go.Figure(go.Heatmap(z=[[1]])))


def test_sentences_are_computed_from_the_rows(report, coverage):
    said = words.say_size(report)
    assert "int4 takes 4.40 MB, 0.30 of fp's 14.80 MB" in said
    assert "1.500 to 1.550 on prose" in said
    said = words.say_by_domain(report, "kld")
    assert "int4 is worst on assistant (0.1000 [0.0400, 0.1150]) and best on prose" in said
    assert "fp is" not in said
    assert f"{100 * coverage.share:.2f} %" in words.say_coverage(coverage)


def test_table_keeps_measured_and_modelled_apart():
    rows = (Row("a", "kld", 0.1), Row("b", "kld", 0.2, provenance="modelled"))
    lines = words.table(Report(rows))
    assert [line["metric"] for line in lines] == ["KL divergence, mean", "KL divergence, mean (modelled)"]
    assert "b" not in lines[0]


def test_page_is_one_file_that_loads_nothing(report, coverage, tmp_path):
    sections = page.standard_sections(
        report, coverage=coverage, recipes={"int4": Recipe.uniform("int4-g32")}, facts={"machine": "m </script>"}
    )
    path = page.write(tmp_path / "deep" / "report.html", "A <title>", "lead & more", sections)
    html = path.read_text(encoding="utf-8")
    assert page.external_loads(html) == []
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left
    assert html.count("Plotly.newPlot") >= 1 and len(html) > 3e6  # plotly.js is inside, once
    assert html.count("plotly.js v") == 1
    assert '<html lang="en">' in html and "A &lt;title&gt;" in html and "m &lt;/script&gt;" in html
    assert html.count("<caption>") == html.count("<table>") > 3
    assert html.count("<figcaption") == html.count('class="plot"') == html.count("<desc>") == 4
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert "1.550 [1.520, 1.600]" in markup  # the figures stand in the table, interval and all, without JavaScript
    assert "int4-g32" in markup


@pytest.mark.parametrize(
    "markup",
    [
        '<script src="https://cdn.plot.ly/x.js"></script>',
        '<link rel="stylesheet" href="http://x.org/a.css">',
        "<img src=pic.png>",
        "<style>body { background: url('https://x.org/b.png') }</style>",
        '<style>@import "https://x.org/c.css";</style>',
    ],
)
def test_external_loads_are_found(markup):
    assert len(page.external_loads(f"<p>text</p>{markup}")) == 1
