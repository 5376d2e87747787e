"""The notebooks are what their sources say and run top to bottom; and the tool that makes them sees what goes wrong.

Running a notebook takes up to a minute and a half. So `conftest.py` spreads these tests over the workers of `pytest -n`,
though the tests of any other file stay together.
"""

import ast
import importlib.util
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
build = sys.modules.setdefault("notebooks_build", importlib.util.module_from_spec(_spec))
if not hasattr(build, "generate"):
    _spec.loader.exec_module(build)
SOURCES = sorted((NOTEBOOKS / "src").glob("*.py"))


@pytest.fixture
def course(tmp_path):
    """A folder of notebooks, and a function that puts a source there and returns its path."""
    (tmp_path / "src").mkdir()

    def add(name: str, text: str) -> Path:
        path = tmp_path / "src" / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        return path

    return tmp_path, add


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_is_in_step_and_runs(source):
    seconds = {}
    assert build.check(source, seconds=seconds) == []
    print(build.times(seconds))


def test_seconds_are_told_and_stored_nowhere_and_a_bound_is_kept_where_one_is_set(course, monkeypatch, capsys):
    folder, add = course
    source = add("00_a", "# %%\nimport time\n\ntime.sleep(0.5)\n")
    seconds = {}
    target = build.build(source, folder, seconds)
    assert 0.5 < seconds["00_a"] < 300
    before = target.read_bytes()
    assert build.build(source, folder).read_bytes() == before, "another run took another time, and the file does not say so"
    assert build.times({"00_a": 61.04, "01_bc": 2.5}).splitlines()[:3] == ["00_a      61.0 s", "01_bc      2.5 s", "all       63.5 s"]
    monkeypatch.setenv(build.BOUND, "0.4")
    (slow,) = build.check(source, folder)
    assert slow.startswith("00_a.py took ") and slow.endswith("EDGELAB_NOTEBOOK_SECONDS allows 0.4")
    monkeypatch.setenv(build.BOUND, "300")
    assert build.check(source, folder) == []
    for wrong in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv(build.BOUND, wrong)
        with pytest.raises(ValueError, match=f"EDGELAB_NOTEBOOK_SECONDS='{wrong}'"):
            build.check(source, folder)
    monkeypatch.delenv(build.BOUND)
    monkeypatch.setattr(build, "HERE", folder)
    monkeypatch.setattr(build, "chosen", lambda names: [source])
    stamp = target.stat().st_mtime_ns
    assert build.main(["--times", "00"]) == 0 and target.stat().st_mtime_ns == stamp
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("00_a ") and printed[1].startswith("all ") and printed[0].endswith(" s")


def test_no_notebook_without_a_source():
    assert build.strays() == []


def test_cells_and_ids_follow_the_source_alone(course):
    _, add = course
    source = add("00_a", "# %% [markdown]\n# # Title\n\n# %%\nx = 1\n\n# %%\nx\n")
    one, two = build.generate(source), build.generate(source)
    assert [c.cell_type for c in one.cells] == ["markdown", "code", "code"]
    assert [c.source for c in one.cells] == ["# Title", "x = 1", "x"]
    assert nbformat.writes(one) == nbformat.writes(two)
    assert len({c.id for c in one.cells}) == 3


def test_build_writes_a_notebook_that_check_accepts_until_either_side_changes(course):
    folder, add = course
    source = add("00_a", "# %%\nfrom pathlib import Path\n\nprint(Path('here.txt').read_text(encoding='utf-8'))\n")
    (folder / "here.txt").write_text("cwd is the notebooks' folder", encoding="utf-8")
    target = build.build(source, folder)
    assert nbformat.read(target, as_version=4).cells[0].outputs[0].text == "cwd is the notebooks' folder\n"
    assert sorted(p.name for p in folder.iterdir()) == ["00_a.ipynb", "here.txt", "src"]
    before = target.read_bytes()
    assert build.check(source, folder) == []
    assert target.read_bytes() == before
    source.write_text(source.read_text(encoding="utf-8") + "\n# %%\n1 + 1\n", encoding="utf-8")
    assert build.check(source, folder) == ["00_a.ipynb has 1 cells, its source 2"]
    source.write_text("# %%\n2 + 2\n", encoding="utf-8")
    assert build.check(source, folder) == ["00_a.ipynb, cell 0: not what 00_a.py says"]


def test_a_stored_notebook_holds_no_progress_bar(course):
    folder, add = course
    text = "# %%\nfrom transformers.utils import logging\n\nfor _ in logging.tqdm(range(3), desc='Loading weights'):\n    pass\n"
    assert "Loading weights" not in str(nbformat.read(build.build(add("00_a", text), folder), as_version=4).cells[0].outputs)


@pytest.mark.parametrize("stored", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_outputs_hold_no_progress_bar(stored):
    outputs = "".join(str(cell.get("outputs", "")) for cell in nbformat.read(stored, as_version=4).cells)
    assert "Loading weights" not in outputs and "it/s]" not in outputs


def test_a_failing_cell_stops_the_build(course):
    folder, add = course
    source = add("00_a", "# %%\nassert 1 + 1 == 3, 'sums'\n")
    with pytest.raises(CellExecutionError, match="sums"):
        build.build(source, folder)
    assert not (folder / "00_a.ipynb").exists()
    not_there, does_not_run = build.check(source, folder)
    assert not_there == "00_a.ipynb is not there" and "sums" in does_not_run


def test_an_error_inside_a_widget_stops_the_build(course):
    folder, add = course
    source = add("00_a", "# %%\nimport ipywidgets as w\n\nw.interact(lambda n: 1 // n, n=w.fixed(0));\n")
    with pytest.raises(ValueError, match=r"widget holds an error: ZeroDivisionError"):
        build.build(source, folder)


def test_an_alert_of_our_own_widgets_stops_the_build(course):
    folder, add = course
    source = add("00_a", "# %%\nimport ipywidgets as w\n\nw.HTML('<p role=\"alert\"><b>ValueError:</b> group 48</p>')\n")
    with pytest.raises(ValueError, match=r"00_a\.ipynb ran, but a widget holds an error: ValueError: group 48"):
        build.build(source, folder)
    source.write_text("# %%\nimport ipywidgets as w\n\nw.HTML('<p role=\"alert\"></p>')\n", encoding="utf-8")
    build.build(source, folder)


REACHES = """# %%
import socket

try:
    socket.create_connection(("192.0.2.1", 443), timeout=1)
except OSError as error:
    print(error)
"""
FROM_A_CHILD = """# %%
import subprocess
import sys

print(subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('example.org', 443)"], capture_output=True).returncode)
"""
DATAGRAM = """# %%
import socket

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    try:
        s.sendto(b"x", ("192.0.2.1", 53))
    except OSError as error:
        print(error)
"""
STAYS = """# %%
import socket

with socket.socket() as server, socket.socket() as client:
    server.bind(("127.0.0.1", 0))
    server.listen()
    client.connect(server.getsockname())
    print(socket.getaddrinfo("localhost", 80)[0][4][1])
"""


@pytest.mark.parametrize(
    ("cells", "reached"),
    [(REACHES, "192.0.2.1:443"), (FROM_A_CHILD, "example.org:443"), (DATAGRAM, "192.0.2.1:53")],  # TEST-NET-1: reaches nobody
    ids=["swallowed", "child process", "datagram"],
)
def test_a_cell_that_reaches_beyond_this_machine_stops_the_build(course, cells, reached):
    folder, add = course
    source = add("00_a", cells)
    with pytest.raises(ValueError, match=f"a cell reached for the network: {reached}"):
        build.build(source, folder)
    assert not (folder / "00_a.ipynb").exists()
    assert f"reached for the network: {reached}" in build.check(source, folder)[-1]


def test_an_uncaught_refusal_says_what_to_do_and_this_machine_stays_in_reach(course):
    folder, add = course
    add("01_b", STAYS)
    reaches = add("00_a", "# %%\nimport socket\n\nsocket.create_connection(('192.0.2.1', 443), timeout=1)\n")
    with pytest.raises(CellExecutionError, match=r"no network, and this one reached for 192\.0\.2\.1:443; use local files"):
        build.build(reaches, folder)
    assert nbformat.read(build.build(folder / "src" / "01_b.py", folder), as_version=4).cells[0].outputs[0].text == "80\n"


def test_the_environment_is_as_it_was_after_a_build(course):
    folder, add = course
    before = dict(os.environ)
    build.build(add("00_a", "# %%\n1\n"), folder)
    assert dict(os.environ) == before


def notebook_with_state(characters: int) -> nbformat.NotebookNode:
    view = {"model_id": "m", "version_major": 2, "version_minor": 0}
    picture = nbformat.v4.new_output("display_data", {build._VIEW: view, "image/svg+xml": "<svg/>", "text/plain": "Figure"})
    alone = nbformat.v4.new_output("display_data", {build._VIEW: view})
    cell = nbformat.v4.new_code_cell("show()", outputs=[picture, alone])
    state = {"m": {"model_name": "M", "model_module": "m", "model_module_version": "1", "state": {"text": "x" * characters}}}
    return nbformat.v4.new_notebook(
        cells=[cell], metadata={"widgets": {build._STATE: {"version_major": 2, "version_minor": 0, "state": state}}}
    )


def test_large_widget_state_goes_and_static_pictures_stay():
    small = build.strip(notebook_with_state(100))
    assert "widgets" in small.metadata and len(small.cells[0].outputs) == 2
    large = build.strip(notebook_with_state(100_000))
    assert "widgets" not in large.metadata
    (kept,) = large.cells[0].outputs
    assert set(kept.data) == {"image/svg+xml", "text/plain"}


def test_a_notebook_over_the_size_names_its_heaviest_cell():
    cells = [nbformat.v4.new_code_cell("a"), nbformat.v4.new_code_cell("b", outputs=[nbformat.v4.new_output("stream", text="x" * 300_000)])]
    with pytest.raises(ValueError, match=r"cell 1 alone puts out about 300\d\d\d"):
        build.accept(nbformat.v4.new_notebook(cells=cells), "09_x.ipynb")


def test_names_choose_by_their_beginning(course):
    folder, add = course
    for name in ("00_start", "01_way", "01_way_back"):
        add(name, "# %%\n1\n")
    assert [p.stem for p in build.chosen(["01"], folder)] == ["01_way", "01_way_back"]
    assert len(build.chosen([], folder)) == 3
    with pytest.raises(ValueError, match="no notebook begins with '07'"):
        build.chosen(["07"], folder)


# ------------------------------------------------------------------------------------------------- the course's form


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_lesson_has_its_parts_and_defines_no_algorithm(source):
    cells = build.generate(source).cells
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    code = [c for c in cells if c.cell_type == "code"]
    assert prose.startswith("# ") and prose.count("**Claim:") == 1
    goals = prose.split("you can", 1)[1].split("\n\n", 2)[1]
    assert 4 <= sum(line[:1].isdigit() for line in goals.splitlines()) <= 7, "four to seven goals, numbered"
    assert "*Before you start*" in prose and "*Takes*" in prose and "memory" in prose
    assert [c.metadata.get("tags") for c in code].count(["parameters"]) == 1
    assert prose.count("**Predict.**") >= 3 and prose.count("**Explain.**") >= 3
    assert "must fail" in prose, "a control that must fail"
    assert cells[-1].cell_type == "markdown" and cells[-1].source.startswith("## What would change on your model")
    assert sum(c.source.startswith("## Exercises") for c in cells) == 1
    for cell in code:
        if cell.metadata.get("tags") in (["stub"], ["solution"]):
            continue  # what the reader writes
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.While) for n in ast.walk(ast.parse(cell.source))), cell.source
