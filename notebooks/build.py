"""Make the notebooks: sources in `notebooks/src/*.py` (py:percent) -> executed `notebooks/*.ipynb`, and their exercises.

    python notebooks/build.py                   write and execute all, and write notebooks/exercises/*.ipynb
    python notebooks/build.py 00 01             those whose names begin so
    python notebooks/build.py --exercises       write notebooks/exercises/*.ipynb alone: nothing is executed, it takes seconds
    python notebooks/build.py --check           write nothing: compare cells with the sources, and execute a copy
    python notebooks/build.py --times           write nothing: execute a copy of each, and print a table of its seconds and the sum
    python notebooks/build.py --solutions DIR   write notebooks with the exercises solved into DIR (--execute: and run them)

One source makes three notebooks. In a source an exercise is a row of tagged cells (`TAGS`): question, stub, check, hint,
expected, solution, perhaps why, and three to five *mutants*, plausible wrong answers. The reading copy shows stub and check,
and the rest folded; the exercise notebook has no lesson and no solution; the solution notebook has solutions in place of
stubs. Mutants are in none of them: tests/test_exercises.py hands them to the check, which has to reject each.

A notebook is accepted if every cell ran, no widget holds a traceback (an exception inside `interact` or `Output` does
not stop a kernel, so it would pass unseen), and the file stays below 200 kB. Widget state is taken out when it is large
(one plotly FigureWidget carries 5 MB of JavaScript); what remains are the static outputs, which a code host can show.
Cell ids depend on the name and the position alone, and no time of day is recorded, so that a rebuild changes
only what a cell printed.

Seconds are those of the clock from the kernel's start to the last cell, on this machine and whatever else it does; they are printed
and stored nowhere. EDGELAB_NOTEBOOK_SECONDS=300 makes `--check` refuse a notebook that took longer; unset, no time is refused.
"""

import argparse
import ast
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
MAX_BYTES = 200_000
MAX_EXERCISE_BYTES = 100_000
MAX_WIDGET_BYTES = 20_000
CELL_TIMEOUT_S = 600
BOUND = "EDGELAB_NOTEBOOK_SECONDS"
_STATE, _VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
_ALERT = re.compile(r"<\w+[^>]*role=\"alert\"[^>]*>\s*(?!</)(.+)", re.DOTALL)  # how our widgets say an error (edgelab/widgets.py)
_KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
# Progress bars are for the reader's run, not for the stored one; a course never goes to the network.
_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers asks this one before it shows "Loading weights"
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PREFER_ENV_PATH": "1",
    "NO_PROXY": "localhost,127.0.0.1,::1",
    "no_proxy": "localhost,127.0.0.1,::1",
} | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")  # nobody

# ----------------------------------------------------------------------------------------------------- exercises

SETUP, QUESTION, MUTANT = "exercise-setup", "exercise", "mutant"
TAGS = (QUESTION, "stub", "check", "hint", "expected", "solution", "why", MUTANT)  # in this order; "why" may be missing
_CODE = {"stub", "check", "solution", MUTANT, SETUP}
MUTANTS = range(3, 6)  # how many an exercise has
_HOW = (
    "Put your answer in place of `None` or `...` and run the cell, then the one below it: it says whether the answer is right, "
    "or what is wrong with it."
)


@dataclass(frozen=True)
class Exercise:
    """One exercise of a source: its attributes, and the text of its cells."""

    number: int  # in its notebook, from 1
    name: str
    difficulty: int  # 1 .. 3
    importance: int  # 1 .. 3
    minutes: int
    question: str
    stub: str
    check: str
    hint: str
    expected: str
    solution: str
    why: str  # "" where there is none
    mutants: tuple[str, ...]

    @property
    def header(self) -> str:
        told = (
            f"Difficulty {self.difficulty} of 3, importance {self.importance} of 3, about {self.minutes} minute{'s'[: self.minutes != 1]}."
        )
        return f"### Exercise {self.number}\n\n*{told}*"


@dataclass(frozen=True)
class Lesson:
    """A source taken apart: its cells, and which of them are the exercises."""

    name: str
    cells: list[NotebookNode]
    heading: int | None = None  # the cell "## Exercises"
    first: int = 0  # cells[first : after] are the cells of `exercises`
    after: int = 0
    setup: str = ""
    exercises: tuple[Exercise, ...] = ()


def read(source: Path) -> Lesson:
    """The source taken apart; raises ValueError naming notebook and exercise where its exercises do not keep to the form."""
    name, cells = source.stem, jupytext.read(source, fmt="py:percent").cells
    kinds = [_kind(name, i, cell) for i, cell in enumerate(cells)]
    tagged = [i for i, kind in enumerate(kinds) if kind not in (None, SETUP)]
    setups = [i for i, kind in enumerate(kinds) if kind == SETUP]
    if not tagged:
        if setups:
            raise ValueError(f"{name}: an {SETUP} cell, and no exercise after it")
        return Lesson(name, cells)
    heading = next((i for i, c in enumerate(cells) if c.cell_type == "markdown" and c.source.startswith("## Exercises")), None)
    if heading is None or heading > tagged[0]:
        raise ValueError(f"{name}: exercises come below a cell that begins with '## Exercises'")
    if len(setups) != 1 or not heading < setups[0] < tagged[0]:
        raise ValueError(f"{name}: one cell tagged {SETUP} belongs between '## Exercises' and the first exercise, found are {len(setups)}")
    first, after = tagged[0], tagged[-1] + 1
    if kinds[first] != QUESTION:
        raise ValueError(f"{name}, cell {first}: tagged {kinds[first]!r}, but no cell tagged {QUESTION!r} comes before it")
    starts = [i for i in tagged if kinds[i] == QUESTION]
    groups = zip(starts, [*starts[1:], after], strict=True)
    exercises = tuple(_exercise(name, n, cells[a:b], kinds[a:b]) for n, (a, b) in enumerate(groups, 1))
    if twice := {e.name for e in exercises if [x.name for x in exercises].count(e.name) > 1}:
        raise ValueError(f"{name}: two exercises are called {', '.join(sorted(twice))}")
    _parse(f"{name}, {SETUP}", cells[setups[0]].source)
    return Lesson(name, cells, heading, first, after, cells[setups[0]].source, exercises)


def _kind(name: str, position: int, cell: NotebookNode) -> str | None:
    """The tag of ours that a cell bears, or None; raises ValueError for two of them, or a text tagged as code."""
    found = [tag for tag in cell.metadata.get("tags", []) if tag in (*TAGS, SETUP)]
    if not found:
        if "exercise" in cell.metadata:
            raise ValueError(f"{name}, cell {position}: exercise={cell.metadata['exercise']!r}, but its tags do not say {QUESTION!r}")
        return None
    if len(found) > 1:
        raise ValueError(f"{name}, cell {position}: two tags of an exercise, {' and '.join(found)}")
    if (cell.cell_type == "code") != (found[0] in _CODE):
        raise ValueError(f"{name}, cell {position}: a {cell.cell_type} cell is tagged {found[0]!r}")
    return found[0]


def _exercise(notebook: str, number: int, cells: Sequence[NotebookNode], kinds: Sequence[str | None]) -> Exercise:
    given = cells[0].metadata
    where = f"{notebook}, exercise {given.get('exercise', number)}"
    for attribute in ("exercise", "difficulty", "importance", "minutes"):
        if attribute not in given:
            raise ValueError(f"{where}: the question's cell has no {attribute}=...")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(given["exercise"])):
        raise ValueError(f"{where}: a name is of small letters, digits and hyphens")
    for attribute, most in (("difficulty", 3), ("importance", 3), ("minutes", 60)):
        if type(given[attribute]) is not int or not 1 <= given[attribute] <= most:
            raise ValueError(f"{where}: {attribute} is a whole number from 1 to {most}, not {given[attribute]!r}")
    mutants = [c.source for c, kind in zip(cells, kinds, strict=True) if kind == MUTANT]
    wanted = [tag for tag in TAGS[:-1] if tag != "why" or "why" in kinds] + [MUTANT] * len(mutants)
    if list(kinds) != wanted:
        missing = [tag for tag in wanted if tag not in kinds]
        wrong = f"cells tagged {', '.join(missing)} are missing" if missing else "cells are not in order, or stand there twice or untagged"
        raise ValueError(f"{where}: {wrong}: {', '.join(str(k) for k in kinds)}; wanted: {', '.join(wanted)}")
    if len(mutants) not in MUTANTS:
        raise ValueError(f"{where}: has {len(mutants)} mutants, and needs {MUTANTS[0]} to {MUTANTS[-1]}")
    text = {kind: c.source.strip() for c, kind in zip(cells, kinds, strict=True) if kind != MUTANT}
    if empty := [kind for kind, source in text.items() if not source]:
        raise ValueError(f"{where}: the cell tagged {empty[0]} is empty")
    for kind in ("stub", "check", "solution"):
        _parse(f"{where}, {kind}", text[kind])
    if [type(node) for node in _parse(where, text["check"]).body] != [ast.Expr]:
        raise ValueError(f"{where}: the check is one expression, whose value is the verdict")
    for i, mutant in enumerate(mutants, 1):
        _parse(f"{where}, mutant {i}", mutant)
        if not mutant.lstrip().startswith("#"):
            raise ValueError(f"{where}: mutant {i} begins with a comment that says which misconception it is")
    if len({ast.dump(_parse(where, m)) for m in (text["stub"], text["solution"], *mutants)}) < 2 + len(mutants):
        raise ValueError(f"{where}: stub, solution and mutants are all different, and two of them are the same")
    attributes = {a: given[a] for a in ("difficulty", "importance", "minutes")}
    rest = {kind: text.get(kind, "") for kind in TAGS[1:-1]}
    return Exercise(number, given["exercise"], **attributes, question=text[QUESTION], **rest, mutants=tuple(mutants))


def _parse(where: str, code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"{where}: {error}") from None


def answered(exercise: Exercise, answer: str, names: dict):
    """What the check says when the cell `answer` stands in place of the stub; `names` hold what the setup cell defined."""
    exec(compile(answer, f"<{exercise.name}>", "exec"), names)
    return eval(compile(exercise.check, f"<check of {exercise.name}>", "eval"), names)


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _cells_of(exercise: Exercise, folded: Sequence[str], code: str = "") -> list[NotebookNode]:
    """The cells of one exercise in a notebook: question, stub (or `code`), check, and what is folded away below."""
    solution = f"```python\n{exercise.solution}\n```" + (f"\n\n{exercise.why}" if exercise.why else "")
    kept = {"hint": ("Hint", exercise.hint), "expected": ("What to expect", exercise.expected)}
    kept |= {"solution": ("Solution", solution), "why": ("Why", exercise.why)}
    below = "\n\n".join(_folded(*kept[kind]) for kind in folded if kept[kind][1])
    cells = [
        nbformat.v4.new_markdown_cell(f"{exercise.header}\n\n{exercise.question}", metadata={"tags": [QUESTION]}),
        nbformat.v4.new_code_cell(code or exercise.stub, metadata={"tags": ["solution" if code else "stub"]}),
        nbformat.v4.new_code_cell(exercise.check, metadata={"tags": ["check"]}),
    ]
    cells += [nbformat.v4.new_markdown_cell(below)] if below else []
    for cell in cells:
        cell.metadata["exercise"] = exercise.name
    return cells


def _finished(cells: list[NotebookNode], seed: str) -> NotebookNode:
    """A notebook of `cells`, not executed, with ids that depend on `seed` and position alone."""
    notebook = nbformat.v4.new_notebook(cells=cells)
    for position, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{seed}/{position}".encode()).hexdigest()[:8]
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _title(lesson: Lesson) -> str:
    return next((c.source.splitlines()[0].removeprefix("# ") for c in lesson.cells if c.source.startswith("# ")), lesson.name)


def exercise_notebook(source: Path) -> NotebookNode | None:
    """The exercises of one source without the lesson: stubs, hints folded, no solutions, not executed; None where it has none."""
    if not (lesson := read(source)).exercises:
        return None
    intro = (
        f"# {_title(lesson)}: exercises\n\n{len(lesson.exercises)} exercises, about {sum(e.minutes for e in lesson.exercises)} minutes, "
        f"to [the lesson](../{lesson.name}.ipynb), which has the solutions. Run the next cell first. {_HOW}"
    )
    cells = [nbformat.v4.new_markdown_cell(intro), nbformat.v4.new_code_cell(lesson.setup, metadata={"tags": [SETUP]})]
    for exercise in lesson.exercises:
        cells += _cells_of(exercise, ("hint", "expected"))
    return _finished(cells, f"{lesson.name}/exercises")


def solution_notebook(source: Path) -> NotebookNode | None:
    """The exercises of one source with solutions in place of stubs, for who teaches; None where it has none."""
    if not (lesson := read(source)).exercises:
        return None
    cells = [
        nbformat.v4.new_markdown_cell(f"# {_title(lesson)}: solutions\n\nThe exercises of `{lesson.name}.ipynb`, solved."),
        nbformat.v4.new_code_cell(lesson.setup, metadata={"tags": [SETUP]}),
    ]
    for exercise in lesson.exercises:
        cells += _cells_of(exercise, ("hint", "expected", "why"), exercise.solution)
    return _finished(cells, f"{lesson.name}/solutions")


# ----------------------------------------------------------------------------------------------------- notebooks


def generate(source: Path) -> NotebookNode:
    """The reading copy of one source: not executed, exercises with hint, expected and solution folded, without mutants."""
    lesson = read(source)
    cells = list(lesson.cells)
    if lesson.exercises:
        alone = f"The exercises without the lesson: [exercises/{lesson.name}.ipynb](exercises/{lesson.name}.ipynb)."
        cells[lesson.heading].source += f"\n\n{_HOW} {alone}"
        made = [c for e in lesson.exercises for c in _cells_of(e, ("hint", "expected", "solution"))]
        cells = [*cells[: lesson.first], *made, *cells[lesson.after :]]
    return _finished(cells, lesson.name)


@contextmanager
def _environment(changes: dict[str, str]):
    before = {k: os.environ.get(k) for k in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """`notebook` after its cells ran top to bottom in `folder`, without a network.

    Raises CellExecutionError at the first cell that fails, and ValueError when one reached beyond this machine, also where
    it got over the refusal (`offline/sitecustomize.py` writes down each attempt).
    """
    offline = str(HERE / "offline")
    with tempfile.TemporaryDirectory(prefix="edgelab-offline-") as empty:
        attempts = Path(empty, "attempts.txt")
        path = os.pathsep.join(p for p in (offline, os.environ.get("PYTHONPATH", "")) if p)
        with _environment(_ENVIRONMENT | {"PYTHONPATH": path, "EDGELAB_OFFLINE_LOG": str(attempts)}):
            client = NotebookClient(
                notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, record_timing=False
            )
            client.execute()
        if attempts.exists():
            reached = sorted(set(attempts.read_text(encoding="utf-8").split()))
            raise ValueError(f"a cell reached for the network: {', '.join(reached)}")
    notebook.metadata["kernelspec"] = nbformat.from_dict(_KERNEL)
    notebook.metadata.get("language_info", {}).pop("version", None)  # a patch release of Python is no change of the notebook
    return notebook


def hidden_errors(notebook: NotebookNode) -> list[str]:
    """The errors that no cell raised: tracebacks in outputs or in the saved state of an Output widget, and our widgets' alerts."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    states = [m.get("state", {}) for m in notebook.metadata.get("widgets", {}).get(_STATE, {}).get("state", {}).values()]
    for state in states:
        outputs += state.get("outputs") or []
    told = [alert for state in states for alert in _ALERT.findall(str(state.get("value", "")))]
    return [f"{out.get('ename')}: {out.get('evalue')}" for out in outputs if out.get("output_type") == "error"] + [
        re.sub(r"<[^>]*>", "", alert).strip() for alert in told
    ]


def strip(notebook: NotebookNode) -> NotebookNode:
    """`notebook` without its widget state if that is large, and then without the views that would point at nothing."""
    widgets = notebook.metadata.get("widgets")
    if widgets is not None and len(nbformat.writes(_only_metadata(notebook)).encode()) > MAX_WIDGET_BYTES:
        del notebook.metadata["widgets"]
        for cell in notebook.cells:
            for out in cell.get("outputs", []):
                out.get("data", {}).pop(_VIEW, None)
            if "outputs" in cell:
                cell["outputs"] = [out for out in cell["outputs"] if out.get("data", True)]
    return notebook


def _only_metadata(notebook: NotebookNode) -> NotebookNode:
    return nbformat.v4.new_notebook(metadata=notebook.metadata)


def accept(notebook: NotebookNode, name: str) -> str:
    """The text of the .ipynb file; raises ValueError if it hides an error or is too large."""
    if errors := hidden_errors(notebook):
        raise ValueError(f"{name} ran, but a widget holds an error: {'; '.join(errors)}")
    nbformat.validate(notebook)
    text = nbformat.writes(strip(notebook))
    text += "" if text.endswith("\n") else "\n"
    if (size := len(text.encode())) > MAX_BYTES:
        cells = [(len(str(cell.get("outputs", ""))), i) for i, cell in enumerate(notebook.cells)]
        most, where = max(cells)
        raise ValueError(f"{name} has {size} bytes, {MAX_BYTES} are allowed; cell {where} alone puts out about {most}: draw fewer points")
    return text


def differences(source: Path, target: Path) -> list[str]:
    """In what the stored notebook `target` differs from its `source`, cell by cell (outputs aside); empty if in nothing."""
    return _differences(generate(source), source, target)


def exercise_differences(source: Path, folder: Path = HERE) -> list[str]:
    """The same for `exercises/*.ipynb` of a source, which holds no outputs and stays below 100 kB."""
    target = folder / "exercises" / f"{source.stem}.ipynb"
    if (want := exercise_notebook(source)) is None:
        return [f"exercises/{target.name} is there, but {source.name} has no exercises"] if target.exists() else []
    wrong = _differences(want, source, target, "exercises/")
    if target.exists():
        if target.stat().st_size > MAX_EXERCISE_BYTES:
            wrong.append(f"exercises/{target.name} has {target.stat().st_size} bytes, {MAX_EXERCISE_BYTES} are allowed")
        if any(c.get("outputs") for c in nbformat.read(target, as_version=4).cells):
            wrong.append(f"exercises/{target.name} holds outputs; it is for the reader to run")
    return wrong


def _differences(wanted: NotebookNode, source: Path, target: Path, place: str = "") -> list[str]:
    if not target.exists():
        return [f"{place}{target.name} is not there"]
    want, have = wanted.cells, nbformat.read(target, as_version=4).cells
    wrong = [] if len(want) == len(have) else [f"{place}{target.name} has {len(have)} cells, its source {len(want)}"]
    for i, (w, h) in enumerate(zip(want, have, strict=False)):
        if (w.cell_type, w.source, w.id) != (h.cell_type, h.source, h.id):
            wrong.append(f"{place}{target.name}, cell {i}: not what {source.name} says")
    return wrong


def chosen(prefixes: list[str], folder: Path = HERE) -> list[Path]:
    """The sources whose names begin with one of `prefixes` (all for none); raises ValueError for a prefix without any."""
    sources = sorted((folder / "src").glob("*.py"))
    for prefix in prefixes:
        if not any(s.name.startswith(prefix) for s in sources):
            raise ValueError(f"no notebook begins with {prefix!r}; there are {', '.join(s.stem for s in sources) or 'none'}")
    return [s for s in sources if not prefixes or s.name.startswith(tuple(prefixes))]


def _ran(source: Path, folder: Path, seconds: dict[str, float] | None) -> NotebookNode:
    """The reading copy of `source`, executed; how long that took goes into `seconds` under its name, also where it failed."""
    notebook, began = generate(source), time.perf_counter()
    try:
        return execute(notebook, folder)
    finally:
        if seconds is not None:
            seconds[source.stem] = time.perf_counter() - began


def allowed_seconds() -> float | None:
    """What EDGELAB_NOTEBOOK_SECONDS allows a notebook to take, None where it is not set. Raises ValueError for what is no such number."""
    if not (told := os.environ.get(BOUND, "").strip()):
        return None
    try:
        allowed = float(told)
    except ValueError:
        allowed = 0.0
    if not 0 < allowed < float("inf"):
        raise ValueError(f"{BOUND}={told!r}: give seconds, such as {BOUND}=300, or leave it unset")
    return allowed


def times(seconds: dict[str, float]) -> str:
    """A table of seconds per notebook, and their sum."""
    width = max(map(len, [*seconds, "all"]))
    lines = [f"{name:<{width}}  {took:7.1f} s" for name, took in [*seconds.items(), ("all", sum(seconds.values()))]]
    return "\n".join([*lines, f"(the clock's, on {os.cpu_count()} processors, with whatever else ran on them)"])


def build(source: Path, folder: Path = HERE, seconds: dict[str, float] | None = None) -> Path:
    """The path of the notebook of `source`, executed and written, whole or not at all; its exercises are written beside it.

    `seconds`: is told how long the cells took.
    """
    target = folder / f"{source.stem}.ipynb"
    text = accept(_ran(source, folder, seconds), target.name)
    write_exercises(source, folder)
    return _write(target, text)


def write_exercises(source: Path, folder: Path = HERE) -> Path | None:
    """The path of `exercises/*.ipynb` of a source, written; None, and no file, where it has no exercises."""
    target = folder / "exercises" / f"{source.stem}.ipynb"
    if (notebook := exercise_notebook(source)) is None:
        target.unlink(missing_ok=True)
        return None
    return _write(target, _plain(notebook, f"exercises/{target.name}"))


def write_solutions(source: Path, folder: Path, run: bool = False) -> Path | None:
    """The path of the solved exercises of a source in `folder`; with `run` executed there. None where it has no exercises."""
    if (notebook := solution_notebook(source)) is None:
        return None
    target = folder / f"{source.stem}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    return _write(target, accept(execute(notebook, folder), target.name) if run else _plain(notebook, target.name))


def _plain(notebook: NotebookNode, name: str) -> str:
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if (size := len(text.encode())) > MAX_EXERCISE_BYTES:
        raise ValueError(f"{name} has {size} bytes, {MAX_EXERCISE_BYTES} are allowed")
    return text


def _write(target: Path, text: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", encoding="utf-8", delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, target)
    return target


def check(source: Path, folder: Path = HERE, seconds: dict[str, float] | None = None) -> list[str]:
    """What is wrong with the stored notebook of `source`; empty if it is in step, below the size and runs (`seconds`: as in `build`)."""
    allowed, seconds = allowed_seconds(), {} if seconds is None else seconds
    target = folder / f"{source.stem}.ipynb"
    try:
        wrong = differences(source, target) + exercise_differences(source, folder)
    except ValueError as error:  # its exercises do not keep to the form
        return [str(error)]
    if target.exists():
        if target.stat().st_size > MAX_BYTES:
            wrong.append(f"{target.name} has {target.stat().st_size} bytes, {MAX_BYTES} are allowed")
        wrong += [f"{target.name} holds an error: {e}" for e in hidden_errors(nbformat.read(target, as_version=4))]
    try:
        accept(_ran(source, folder, seconds), target.name)
    except (CellExecutionError, ValueError) as error:
        wrong.append(f"{source.name} does not run: {error}")
    if allowed is not None and (took := seconds.get(source.stem, 0.0)) > allowed:
        wrong.append(f"{source.name} took {took:.1f} s, {BOUND} allows {allowed:g}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/build.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 00 (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook is out of step or fails")
    parser.add_argument("--times", action="store_true", help="write nothing; execute a copy of each and print a table of seconds")
    parser.add_argument("--exercises", action="store_true", help="write notebooks/exercises/*.ipynb alone, and execute nothing")
    parser.add_argument("--solutions", type=Path, metavar="DIR", help="write notebooks with the exercises solved into DIR")
    parser.add_argument("--execute", action="store_true", help="with --solutions: run them")
    args = parser.parse_args(argv)
    if sum((args.check, args.times, args.exercises, args.solutions is not None)) > 1 or (args.execute and args.solutions is None):
        parser.error("--check, --times, --exercises and --solutions go one at a time, and --execute with --solutions")
    try:
        sources = chosen(args.names)
        allowed_seconds()
    except ValueError as error:
        parser.error(str(error))
    wrong, seconds = [], {}
    if not args.names:
        wrong += strays()
    for source in (bar := tqdm(sources, unit="notebook")):
        bar.set_description(source.stem)
        if args.check:
            wrong += check(source, seconds=seconds)
            continue
        try:
            if args.times:
                _ran(source, HERE, seconds)
            elif args.exercises:
                write_exercises(source)
            elif args.solutions is not None:
                write_solutions(source, args.solutions, args.execute)
            else:
                build(source, seconds=seconds)
        except (CellExecutionError, ValueError) as error:
            wrong.append(f"{source.name}: {error}")
    if seconds:
        print(times(seconds))
    done = "are in step and run" if args.check else "ran" if args.times else "written"
    print("\n".join(wrong) or f"{len(sources)} notebooks {done}", file=sys.stderr)
    return int(bool(wrong))


def strays(folder: Path = HERE) -> list[str]:
    """The notebooks that no source makes."""
    known = {s.stem for s in (folder / "src").glob("*.py")}
    found = sorted([*folder.glob("*.ipynb"), *folder.glob("exercises/*.ipynb")])
    return [f"{t.relative_to(folder)} has no source in src/" for t in found if t.stem not in known]


if __name__ == "__main__":
    raise SystemExit(main())
