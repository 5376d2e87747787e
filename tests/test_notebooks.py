"""The notebooks are what their sources say and run top to bottom; and the tool that makes them sees what goes wrong."""

import ast
import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)


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
@pytest.mark.parametrize("source", sorted((NOTEBOOKS / "src").glob("*.py")), ids=lambda p: p.stem)
def test_notebook_is_in_step_and_runs(source):
    assert build.check(source) == []


def test_no_notebook_without_a_source():
    assert {p.stem for p in NOTEBOOKS.glob("*.ipynb")} <= {p.stem for p in (NOTEBOOKS / "src").glob("*.py")}


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


@pytest.mark.parametrize("source", sorted((NOTEBOOKS / "src").glob("*.py")), ids=lambda p: p.stem)
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
    for cell in code:
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef | ast.While) for n in ast.walk(ast.parse(cell.source))), cell.source
