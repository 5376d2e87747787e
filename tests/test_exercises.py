"""Every exercise of the course: the untouched stub fails, the solution passes, and each plausible wrong answer is rejected.

Answers run in this process, each in a copy of what the notebook's setup cell made, which runs once for all of them.
"""

import ast
import importlib.util
import sys
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgelab import exercises
from edgelab.exercises import Case, Verdict, check_function, hint, not_yet, right, unanswered

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_build", NOTEBOOKS / "build.py")
build = sys.modules.setdefault("notebooks_build", importlib.util.module_from_spec(_spec))
if not hasattr(build, "generate"):
    _spec.loader.exec_module(build)

SOURCES = sorted((NOTEBOOKS / "src").glob("*.py"))
MOST_SETUP_S = 10  # of one setup cell, so that an exercise notebook opens quickly


def lesson_of(source: Path):
    try:
        return build.read(source)
    except ValueError as error:  # told by test_every_source_keeps_to_the_form, not by an error of this file
        return build.Lesson(f"{source.stem}: {error}", [])


LESSONS = [lesson_of(source) for source in SOURCES]


def each_answer() -> list:
    """(lesson, exercise, what stands in place of the stub, does it pass?) as pytest's parameters."""
    found = []
    for lesson in LESSONS:
        for e in lesson.exercises:
            answers = [("stub", e.stub, False), ("solution", e.solution, True)]
            answers += [(f"mutant{i}", mutant, False) for i, mutant in enumerate(e.mutants, 1)]
            for kind, answer, passes in answers:
                found.append(pytest.param(lesson, e, answer, passes, id=f"{lesson.name[:2]}-{e.name}-{kind}"))
    return found


@cache
def names_after_setup(lesson_name: str, setup: str) -> dict:
    names: dict = {"__name__": "__main__"}
    started = time.process_time()
    exec(compile(setup, f"<setup of {lesson_name}>", "exec"), names)
    names["_setup_seconds"] = time.process_time() - started
    return names


def verdict(lesson, exercise, answer: str):
    return build.answered(exercise, answer, dict(names_after_setup(lesson.name, lesson.setup)))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_source_keeps_to_the_form(source):
    lesson = build.read(source)
    assert len(lesson.exercises) >= 3, f"{source.stem} has {len(lesson.exercises)} exercises, three are wanted"


@pytest.mark.parametrize(("lesson", "exercise", "answer", "passes"), each_answer())
def test_the_check_tells_right_from_wrong(lesson, exercise, answer, passes):
    said = verdict(lesson, exercise, answer)
    assert isinstance(said, Verdict), f"a check gives a Verdict, this one {type(said).__name__}: {said!r}"
    assert said.passed == passes, f"{said}\n\n{answer}"
    assert said.startswith("Right: " if passes else "Not yet: ") and not said.endswith(": .")


@pytest.mark.parametrize("lesson", [lesson for lesson in LESSONS if lesson.exercises], ids=lambda lesson: lesson.name)
def test_the_setup_is_quick_and_stubs_say_what_is_asked(lesson):
    assert names_after_setup(lesson.name, lesson.setup)["_setup_seconds"] < MOST_SETUP_S
    for exercise in lesson.exercises:
        assert verdict(lesson, exercise, exercise.stub) not in {verdict(lesson, exercise, m) for m in exercise.mutants}, (
            f"{exercise.name}: a wrong answer hears the same as none"
        )


@pytest.mark.parametrize("lesson", [lesson for lesson in LESSONS if lesson.exercises], ids=lambda lesson: lesson.name)
def test_no_mutant_leaks_into_a_notebook(lesson):
    source = NOTEBOOKS / "src" / f"{lesson.name}.py"
    reading, alone, solved = build.generate(source), build.exercise_notebook(source), build.solution_notebook(source)
    for exercise in lesson.exercises:
        for notebook in (reading, alone, solved):
            text = "\n".join(c.source for c in notebook.cells)
            assert not any(mutant in text for mutant in exercise.mutants)
        assert exercise.solution not in [c.source for c in alone.cells]
        assert all(f"```python\n{exercise.solution}" not in c.source for c in alone.cells)
        assert any(exercise.solution == c.source for c in solved.cells)
    assert [c.source for c in reading.cells if c.metadata.get("tags") == ["stub"]] == [e.stub for e in lesson.exercises]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_stored_exercises_are_in_step(source):
    assert build.exercise_differences(source) == []


# ------------------------------------------------------------------------------------------------------ the verdict


def test_a_verdict_is_a_text_that_knows_whether_it_passed():
    good, bad = right("Right: 2 of 3"), not_yet("asked is <b>bytes</b>, these are bits.")
    assert (good, good.passed) == ("Right: 2 of 3.", True) and repr(good) == good
    assert (bad, bad.passed) == ("Not yet: asked is <b>bytes</b>, these are bits.", False)
    assert "✓" in good._repr_html_() and "Right: 2 of 3." in good._repr_html_()
    assert "✗" in bad._repr_html_() and "&lt;b&gt;bytes" in bad._repr_html_(), "said in words, and escaped"
    assert unanswered("a number") == "Not yet: no answer so far. It is a number."
    near = hint(8.001, {8: "these are bits", 1: "these are bytes"}, "no idea")
    assert near == "Not yet: these are bits." and isinstance(near, Verdict) and not near.passed
    assert hint(5, {8: "these are bits"}, "no idea") == "Not yet: no idea."


# --------------------------------------------------------------------------------------------------------- functions

CASES = [
    Case("a plain row", (np.array([1.0, -2.0]),), "the sum of magnitudes"),
    Case("a row of zeros", (np.zeros(2),), "mind the division"),
]


def normed(row):
    total = np.abs(row).sum()
    return row / (total or 1.0), total


def check(answer, **settings):
    return check_function(answer, normed, CASES, "a function that returns (row, total)", "fine", parts=("row", "total"), **settings)


def in_place(row):
    total = np.abs(row).sum()
    row /= total or 1.0
    return row, total


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "no answer so far"),
        (..., "no answer so far"),
        (lambda row: None, "no answer so far"),
        (3.0, "this is a float, and asked is a function"),
        (lambda row: row, "returns a ndarray, and asked are 2 things: row, total"),
        (lambda row: (row, 1, 2), "returns a tuple of 3"),
        (lambda row: (row / row.sum(), np.abs(row).sum()), "row[0] is -1, and 0.333333 is right (2 of 2 places differ). Hint: the sum"),
        (
            lambda row: (row / np.abs(row).sum() if row.any() else None, np.abs(row).sum()),
            "for a row of zeros, you return a NoneType as the row",
        ),
        (lambda row: (row[:1], 3.0), "the shape of the row is [1], and [2] is right"),
        (lambda row: ("x", 3.0), "a str as the row, which is no number"),
        (lambda row: normed(row)[0] and 1, "raises ValueError"),
        (lambda row: normed(row) if row.any() else None, "for a row of zeros, your function returns None. Hint: mind the division"),
        (lambda: 1, "raises TypeError"),
        (in_place, "changes its argument"),
    ],
)
def test_what_is_wrong_with_a_function_is_told(answer, says):
    said = check(answer)
    assert not said.passed and says in said, said
    assert said.startswith("Not yet: ") and ".." not in said.replace("...", "")


def test_a_right_function_passes_with_lists_and_tensors():
    import torch

    assert check(normed).passed
    assert check(lambda row: (normed(row)[0].tolist(), torch.tensor(float(normed(row)[1])))).passed
    assert not check(lambda row: (normed(row)[0] + 1e-4, normed(row)[1])).passed
    assert check(lambda row: (normed(row)[0] + 1e-4, normed(row)[1]), tolerance=1e-3).passed


# ------------------------------------------------------------------------------------- the machinery sees what is wrong

GOOD = {
    "exercise": '[markdown] tags=["exercise"] exercise="sum" difficulty=1 importance=2 minutes=3\n# What is 1 + 1?',
    "stub": ' tags=["stub"]\nanswer = None',
    "check": ' tags=["check"]\nexercises.right("2") if answer == 2 else exercises.not_yet("count again")',
    "hint": '[markdown] tags=["hint"]\n# Fingers.',
    "expected": '[markdown] tags=["expected"]\n# A number.',
    "solution": ' tags=["solution"]\nanswer = 2',
    "mutant1": ' tags=["mutant"]\n# forgets one\nanswer = 1',
    "mutant2": ' tags=["mutant"]\n# counts one twice\nanswer = 3',
    "mutant3": ' tags=["mutant"]\n# multiplies\nanswer = 1.0',
}
HEAD = """# %% [markdown]
# # 00 · Sums

# %% [markdown]
# ## Exercises

# %% tags=["exercise-setup"]
from edgelab import exercises

"""


def source_of(folder: Path, cells: dict[str, str], head: str = HEAD, tail: str = "\n# %% [markdown]\n# ## The end\n") -> Path:
    path = folder / "00_sums.py"
    path.write_text(head + "\n\n".join(f"# %% {text.strip()}" for text in cells.values()) + "\n" + tail, encoding="utf-8")
    return path


def test_a_good_source_is_read_whole(tmp_path):
    lesson = build.read(source_of(tmp_path, GOOD))
    (e,) = lesson.exercises
    assert (e.number, e.name, e.difficulty, e.importance, e.minutes, e.why) == (1, "sum", 1, 2, 3, "")
    assert e.question == "What is 1 + 1?" and e.stub == "answer = None" and len(e.mutants) == 3
    assert lesson.cells[lesson.after].source == "## The end"
    with_why = {k: v for k, v in GOOD.items() if not k.startswith("mutant")} | {"why": '[markdown] tags=["why"]\n# Peano.'}
    (e,) = build.read(source_of(tmp_path, with_why | {k: v for k, v in GOOD.items() if k.startswith("mutant")})).exercises
    assert e.why == "Peano."


def without(*names):
    return {k: v for k, v in GOOD.items() if k not in names}


def changed(name, old, new):
    assert old in GOOD[name]
    return GOOD | {name: GOOD[name].replace(old, new)}


def swapped(a, b):
    order = list(GOOD)
    i, j = order.index(a), order.index(b)
    order[i], order[j] = order[j], order[i]
    return {k: GOOD[k] for k in order}


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        *((without(tag), f"exercise sum: cells tagged {tag} are missing") for tag in ("stub", "check", "hint", "expected", "solution")),
        (without("exercise"), "no cell tagged 'exercise' comes before it"),
        (without("mutant2"), "exercise sum: has 2 mutants, and needs 3 to 5"),
        (GOOD | {f"more{i}": f' tags=["mutant"]\n# {i}\nanswer = {i}' for i in range(4, 7)}, "has 6 mutants"),
        (swapped("stub", "check"), "not in order"),
        (swapped("solution", "mutant1"), "not in order"),
        (GOOD | {"untagged": "\n1 + 1", "m": GOOD["mutant3"].replace("1.0", "7")}, "not in order, or stand there twice or untagged"),
        *((changed("exercise", f" {a}", " x"), f"has no {a}=") for a in ("difficulty", "importance", "minutes")),
        (changed("exercise", ' exercise="sum"', ""), "exercise 1: the question's cell has no exercise="),
        (changed("exercise", "difficulty=1", "difficulty=4"), "difficulty is a whole number from 1 to 3, not 4"),
        (changed("exercise", "minutes=3", 'minutes="3"'), "minutes is a whole number from 1 to 60, not '3'"),
        (changed("exercise", '"sum"', '"A sum"'), "small letters, digits and hyphens"),
        (changed("exercise", 'tags=["exercise"]', ""), "tags do not say 'exercise'"),
        (changed("stub", '"stub"', '"stub", "check"'), "two tags of an exercise, stub and check"),
        (changed("hint", "[markdown]", ""), "a code cell is tagged 'hint'"),
        (changed("stub", 'tags=["stub"]', '[markdown] tags=["stub"]'), "a markdown cell is tagged 'stub'"),
        (changed("check", "exercises.right", "x = exercises.right"), "the check is one expression"),
        (changed("check", "exercises.right", "1\nexercises.right"), "the check is one expression"),
        (changed("solution", "answer = 2", "answer = ="), "exercise sum, solution: invalid syntax"),
        (changed("mutant1", "# forgets one\n", ""), "mutant 1 begins with a comment"),
        (changed("mutant1", "answer = 1", "answer = 2"), "two of them are the same"),
        (changed("hint", "# Fingers.", ""), "the cell tagged hint is empty"),
        (GOOD | {f"{k}-again": v for k, v in GOOD.items()}, "two exercises are called sum"),
    ],
)
def test_a_source_that_does_not_keep_to_the_form_is_refused(tmp_path, cells, says):
    with pytest.raises(ValueError, match="00_sums") as refused:
        build.generate(source_of(tmp_path, cells))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (HEAD.replace("## Exercises", "## Questions"), "below a cell that begins with '## Exercises'"),
        (HEAD.split("# %% tags")[0], "exercise-setup belongs between '## Exercises' and the first exercise, found are 0"),
        (HEAD + '# %% tags=["exercise-setup"]\nimport math\n\n', "found are 2"),
        (HEAD.replace("from edgelab import", "from edgelab imports"), "exercise-setup: invalid syntax"),
    ],
)
def test_heading_and_setup_have_their_place(tmp_path, head, says):
    with pytest.raises(ValueError, match="00_sums") as refused:
        build.read(source_of(tmp_path, GOOD, head))
    assert says in str(refused.value)


def test_a_setup_without_exercises_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no exercise after it"):
        build.read(source_of(tmp_path, {}))


def test_a_check_that_accepts_a_wrong_answer_is_caught(tmp_path):
    lax = changed("check", "answer == 2", "answer in (2, 3)")
    lesson = build.read(source_of(tmp_path, lax))
    (e,) = lesson.exercises
    test_the_check_tells_right_from_wrong(lesson, e, e.solution, True)
    test_the_check_tells_right_from_wrong(lesson, e, e.mutants[0], False)
    with pytest.raises(AssertionError, match="counts one twice"):
        test_the_check_tells_right_from_wrong(lesson, e, e.mutants[1], False)
    (strict,) = build.read(source_of(tmp_path, changed("check", "answer == 2", "answer == 9"))).exercises
    with pytest.raises(AssertionError, match="Not yet: count again"):
        test_the_check_tells_right_from_wrong(lesson, strict, strict.solution, True)
    (bare,) = build.read(source_of(tmp_path, changed("check", 'exercises.right("2")', '"Right: 2."'))).exercises
    with pytest.raises(AssertionError, match="gives a Verdict, this one str"):
        test_the_check_tells_right_from_wrong(lesson, bare, bare.solution, True)


def test_one_answer_sees_nothing_of_another(tmp_path):
    lesson = build.read(source_of(tmp_path, GOOD))
    (e,) = lesson.exercises
    assert verdict(lesson, e, e.solution).passed
    assert "answer" not in names_after_setup(lesson.name, lesson.setup)


def test_every_notebook_of_a_source_is_the_same_each_time(tmp_path):
    source = source_of(tmp_path, GOOD)
    for make in (build.generate, build.exercise_notebook, build.solution_notebook):
        one, two = make(source), make(source)
        assert [(c.id, c.source) for c in one.cells] == [(c.id, c.source) for c in two.cells]
        assert len({c.id for c in one.cells}) == len(one.cells)
    text = "\n".join(c.source for c in build.generate(source).cells)
    assert "*Difficulty 1 of 3, importance 2 of 3, about 3 minutes.*" in text and "exercises/00_sums.ipynb" in text
    for summary in ("Hint", "What to expect", "Solution"):
        assert f"<details><summary>{summary}</summary>\n\n" in text
    assert "```python\nanswer = 2\n```" in text and "forgets one" not in text


def test_exercises_are_written_and_an_old_one_is_taken_away(tmp_path):
    (tmp_path / "src").mkdir()
    source = source_of(tmp_path / "src", GOOD)
    assert build.exercise_differences(source, tmp_path) == ["exercises/00_sums.ipynb is not there"]
    target = build.write_exercises(source, tmp_path)
    assert build.exercise_differences(source, tmp_path) == [] and build.strays(tmp_path) == []
    source_of(tmp_path / "src", changed("hint", "Fingers", "Toes"))
    assert build.exercise_differences(source, tmp_path) == ["exercises/00_sums.ipynb, cell 5: not what 00_sums.py says"]
    source.write_text("# %%\n1\n", encoding="utf-8")
    assert build.exercise_differences(source, tmp_path) == ["exercises/00_sums.ipynb is there, but 00_sums.py has no exercises"]
    assert build.write_exercises(source, tmp_path) is None and not target.exists()
    target.write_text("{}", encoding="utf-8")
    source.unlink()
    assert build.strays(tmp_path) == ["exercises/00_sums.ipynb has no source in src/"]


def test_a_large_exercise_notebook_is_refused(tmp_path):
    source = source_of(tmp_path, changed("hint", "Fingers.", "x" * 110_000))
    with pytest.raises(ValueError, match=r"exercises/00_sums\.ipynb has 11\d\d\d\d bytes, 100000 are allowed"):
        build.write_exercises(source, tmp_path)


@pytest.mark.slow
def test_solutions_run_and_their_checks_pass(tmp_path):
    import nbformat

    target = build.write_solutions(source_of(tmp_path, GOOD), tmp_path / "solved", run=True)
    (output,) = next(c for c in nbformat.read(target, as_version=4).cells if c.metadata.get("tags") == ["check"]).outputs
    assert output.data["text/plain"] == "Right: 2." and "✓" in output.data["text/html"]


def test_what_the_module_offers_is_documented():
    tree = ast.parse(Path(exercises.__file__).read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


# ------------------------------------------------------------------------------------------- right answers in other forms


def test_an_answer_may_have_the_form_of_the_reader_s_tools():
    import torch

    from edgelab import clip_lab, device_lab, export_lab, start_lab

    for four in (4, 4.0, [4], np.array(4), torch.tensor(4), torch.tensor(4.0, requires_grad=True)):
        assert clip_lab.check_bins_kept(four).passed, four
    assert start_lab.check_kl(torch.tensor(0.0268, requires_grad=True)).passed
    assert export_lab.check_block(lambda s, c: bytes(export_lab.q4_0_block(s, c))).passed
    assert (
        export_lab.check_varint(lambda n: bytearray(export_lab.varint(n))).passed
        and export_lab.check_varint(lambda n: bytes(export_lab.varint(n))).passed
    )
    assert not export_lab.check_varint(lambda n: bytes([n % 256])).passed
    three = [Case("one and two", (1.0, 2.0))]
    for form in (list, tuple, np.array, torch.tensor):
        said = check_function(lambda a, b, form=form: form([a, b, a + b]), lambda a, b: (a, b, a + b), three, "three numbers", "so",
                              parts=("a", "b", "sum"))  # fmt: skip
        assert said.passed, (form, said)
    two = check_function(lambda a, b: np.array([a, b]), lambda a, b: (a, b, a + b), three, "three numbers", "so", parts=("a", "b", "sum"))
    assert "asked are 3 things" in two and not two.passed
    assert "MiB" in device_lab.check_cache(128) and not device_lab.check_cache(128).passed


def test_near_misses_are_told_apart():
    from edgelab import clip_lab, start_lab

    keep, clip = (60 / 127) ** 2 / 12, 56**2 / 1e5
    assert clip_lab.check_costs(0.0314, 0.0186).passed
    for wrong in ((clip, (60 / 128) ** 2 / 12), (clip, (120 / 255) ** 2 / 12), (55**2 / 1e5, keep), (57**2 / 1e5, keep)):
        assert not clip_lab.check_costs(*wrong).passed, wrong
    assert "60 / 127" in clip_lab.check_costs(clip, (120 / 255) ** 2 / 12)
    default = start_lab.check_zlib(lambda text: 8 * len(zlib.compress(text.encode())) / len(text.encode()))
    assert not default.passed and "level 9" in default
