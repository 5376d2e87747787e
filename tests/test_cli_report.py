"""`edgelab report`: from stored results to one page, and what it says of input that is none."""

import json
import math
import re
from pathlib import Path

import pytest
import sweeps
import typer
from test_cli import bundle, model  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from edgelab import cli_report, page
from edgelab.cli_report import merge
from edgelab.report import Report, Row

app = typer.Typer()  # with a second command, so that `report` keeps its name whether or not the whole command line has it
app.registered_commands += cli_report.app.registered_commands
app.command("other")(lambda: None)
runner = CliRunner()


def edgelab(*args: object, code: int = 0) -> str:
    """What a run says in one line; its exit code must be `code`, and no traceback may show."""
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def rows(model_: str, kld: float, **more) -> list[Row]:
    return [
        Row(model_, "weight_bytes", 4e6, "B", **more),
        *(
            Row(model_, "kld", kld, slice=on, low=kld / 2, high=2 * kld, n=8, seed=0, machine="a box", corpus="abc", **more)
            for on in ("prose", "code")
        ),
    ]


@pytest.fixture
def reports(tmp_path) -> list[Path]:
    found = []
    for name, kld in (("monday", 0.25), ("tuesday", 0.125)):
        found.append(tmp_path / f"{name}.json")
        found[-1].write_text(Report((*rows("fp", 0.0), *rows("int4", kld))).to_json())
    return found


def test_one_report_becomes_a_page_with_its_numbers(reports, tmp_path):
    said = edgelab("report", reports[0], "--out", tmp_path / "out" / "page.html", "--title", "Two <models>")
    file = tmp_path / "out" / "page.html"
    text = file.read_text(encoding="utf-8")
    assert file.as_uri() in said and "MB" in said
    assert page.external_loads(text) == []
    assert "0.2500 [0.1250, 0.5000]" in text and "Two &lt;models&gt;" in text and "a box" in text


def test_reports_that_disagree_on_a_name_keep_both_numbers(reports, tmp_path):
    edgelab("report", *reports, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.2500 [" in text and "0.1250 [" in text and "int4 (tuesday)" in text
    assert "fp (tuesday)" not in text  # the same in both: once


def test_merging_keeps_nan_and_repeated_rows_once():
    a = Report((Row("m", "kld", math.nan), Row("m", "flips", 0.5)))
    assert len(merge({"a": a, "b": a})) == 2
    b = Report((Row("m", "kld", 1.0),))
    merged = merge({"a": a, "b": b, "c": b})
    assert [r.model for r in merged] == ["m", "m", "m (b)", "m (c)"]


def test_a_bundle_brings_its_audit_and_recipe(bundle, reports, tmp_path):  # noqa: F811
    edgelab("report", bundle, reports[0], "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    manifest = json.loads((bundle / "edgelab.json").read_text())
    assert f"Coverage audit of {bundle.name}" in text and manifest["recipe_digest"] in text
    assert "measured at build" in text  # never evaluated: its size is what the manifest states
    assert f"{sum(r['predicted_bytes'] for r in manifest['coverage']['rows']):,}" in text
    assert text.count('class="plot"') >= 2 and page.external_loads(text) == []


def test_two_bundles_of_one_name_are_told_apart(bundle, tmp_path):  # noqa: F811
    import shutil

    twin = tmp_path / "elsewhere" / bundle.name
    shutil.copytree(bundle, twin)
    edgelab("report", bundle, twin, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Coverage audit of {bundle.name}<" in text and f"Coverage audit of {bundle.name} #2" in text


def test_the_explorer_is_written_and_replaced_only_by_force(tmp_path):
    sweep, out = sweeps.write(tmp_path / "sweep.parquet", 40), tmp_path / "explorer.html"
    edgelab("report", "--explorer", "--sweep", sweep, "--out", out)
    text = out.read_text(encoding="utf-8")
    assert page.external_loads(text) == [] and "40 ways to make" in text and len(text) > 4_000_000
    assert "--force" in edgelab("report", "--explorer", "--sweep", sweep, "--out", out, code=2)
    assert out.read_text(encoding="utf-8") == text
    edgelab("report", "--explorer", "--sweep", sweep, "--out", out, "--force", "--title", "Mine")
    assert re.search("<title>Mine</title>", out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--out", "x.html"], "name at least one report"),
        (["nobody.json", "--out", "x.html"], "nobody.json: there is no such file"),
        (["--explorer", "--sweep", "nobody.parquet", "--out", "x.html"], "nobody.parquet"),
        (["--explorer", "some.json", "--out", "x.html"], "--explorer shows a sweep, not some.json"),
        (["some.json", "--sweep", "s.parquet", "--out", "x.html"], "goes with --explorer"),
        (["some.json", "--out", "x.txt"], "must end in .html"),
        (["broken.json", "--out", "x.html"], "broken.json is not a report"),
        (["other.json", "--out", "x.html"], "other.json is not a report"),
        (["empty.json", "--out", "x.html"], "no row in any of them"),
        (["folder", "--out", "x.html"], "is not a bundle"),
        (["--explorer", "--sweep", "broken.json", "--out", "x.html"], "broken.json is no Parquet file"),
        (["--explorer", "--out", "page.html"], "page.html is a folder"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"format": 1, "rows": [{"model": "x"}]}')
    (tmp_path / "empty.json").write_text(Report().to_json())
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.html").mkdir()
    assert says in edgelab("report", *args, code=2)
    assert not (tmp_path / "x.html").exists() and not (tmp_path / "x.txt").exists()
