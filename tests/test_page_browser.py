"""The HTML report in a real browser without a network: it draws its plots, and asks nobody for anything."""

import shutil
from pathlib import Path

import pytest

from edgelab import page
from edgelab.report import Report, Row

playwright = pytest.importorskip("playwright.sync_api", reason="the driver (pip install 'edgelab[test]') is not installed")

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH (Debian and Ubuntu: apt install chromium)"),
]


@pytest.fixture(scope="module")
def report_page(tmp_path_factory) -> Path:
    rows = []
    for model, size, kld in (("fp", 1.5e7, 0.0), ("int4", 4.4e6, 0.05)):
        rows.append(Row(model, "weight_bytes", size))
        for on in ("prose", "code"):
            rows.append(Row(model, "bits_per_byte", 1.5 + kld, slice=on, low=1.4, high=1.7, n=8))
            rows.append(Row(model, "kld", kld, slice=on, low=kld * 0.8, high=kld * 1.2, n=8))
    sections = page.standard_sections(Report(tuple(rows)))
    return page.write(tmp_path_factory.mktemp("page") / "report.html", "A report", "two models", sections)


@pytest.fixture
def opened(report_page):
    """Opens a page with every request that leaves the disk stopped: (tab, the requests, the errors of scripts)."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        context = browser.new_context()
        asked, errors = [], []

        def decide(route):
            if route.request.url.startswith(("file:", "data:", "blob:")):
                route.continue_()
            else:
                asked.append(route.request.url)
                route.abort()

        context.route("**/*", decide)
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))

        def go(path: Path):
            tab.goto(path.as_uri())
            return tab, asked, errors

        yield go
        browser.close()


def test_the_plots_are_drawn_and_nothing_is_fetched(opened, report_page):
    tab, asked, errors = opened(report_page)
    plots = tab.locator(".plot")
    assert plots.count() == 2
    for i in range(plots.count()):
        plots.nth(i).locator(".main-svg").first.wait_for(state="attached")
        assert plots.nth(i).locator(".trace, .bars, .point").count() > 0
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_load_state("networkidle")
    assert tab.locator("table").first.is_visible()
    assert asked == [] and errors == []


def test_the_guard_sees_a_page_that_fetches(opened, tmp_path):
    (tmp_path / "bad.html").write_text('<!doctype html><script src="https://cdn.example/plotly.js"></script>')
    tab, asked, _ = opened(tmp_path / "bad.html")
    tab.wait_for_load_state("load")
    assert asked == ["https://cdn.example/plotly.js"]
