"""The instructor's kit: minutes, plans, pages without loads, sums; the launcher's entries; the lists of versions that have to agree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lab_browser
import nbformat
import psutil
import pytest
import yaml

from edgelab import handouts, workshop

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "edgelab" / "launcher"
BUILD = workshop.builder()
SOURCES = BUILD.chosen([])


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A kit without wheels, made, put into one file, and unpacked in another place."""
    made = workshop.make(tmp_path_factory.mktemp("dist") / "workshop", wheels=False, progress=False)
    place = tmp_path_factory.mktemp("room")
    with tarfile.open(workshop.archive(made)) as tar:
        tar.extractall(place, filter="data")
    return place / "workshop"


@pytest.fixture
def copied(kit, tmp_path):
    """A copy of the kit that a test may spoil."""
    return Path(shutil.copytree(kit, tmp_path / "kit"))


# ------------------------------------------------------------------------------------------------------------ minutes


@pytest.mark.parametrize(
    ("said", "minutes"),
    [
        ("less than half a minute", 0.5),
        ("some three minutes", 3),
        ("12 minutes", 12),
        ("a minute and a half", 1.5),
        ("one to two minutes", 2),
    ],
)
def test_minutes_are_read_from_the_lessons_own_words(said, minutes):
    assert workshop.minutes_of(f"*Before*: 02. *Takes* {said} on two\ncores and 2 GB of memory. Ten minutes later ...") == minutes


@pytest.mark.parametrize("text", ["no such word", "*Takes* a while on two cores", "*Takes* some time. Five minutes is not of it."])
def test_minutes_that_are_not_said_are_no_minutes(text):
    with pytest.raises(ValueError, match=r"Takes"):
        workshop.minutes_of(text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_lesson_says_what_a_plan_needs(source):
    lesson = workshop.lesson_of(source, BUILD)
    assert 0.25 <= lesson.runs_minutes <= 10 and lesson.words > 300 and lesson.claim.endswith(".")
    assert lesson.minutes(3) <= lesson.minutes(2) <= lesson.minutes(1) and lesson.minutes() % 5 == 0
    exact = lesson.words / workshop.TALK + lesson.runs_minutes + sum(m for _, m, _ in lesson.exercises)
    assert exact <= lesson.minutes() < exact + 5, "no lesson is given less than it needs"


def test_plans_fit_into_their_day_and_nobody_sits_too_long():
    lessons = [workshop.lesson_of(s, BUILD) for s in SOURCES]
    for name, (minutes, wanted) in workshop.PLANS.items():
        plan = workshop.plan(name, lessons)
        slots = plan.slots()
        assert slots[-1][1] - slots[0][0] <= minutes
        assert [a[1] for a in slots[:-1]] == [b[0] for b in slots[1:]], "no gap, no overlap"
        assert {x.number for x in plan.lessons} <= set(wanted) and plan.lessons[0].number == "00"
        assert sorted(x.name for x in (*plan.lessons, *plan.later)) == sorted(x.name for x in lessons)
        sat = 0
        for start, end, what in slots:
            sat = 0 if what in ("Break", "Lunch") else sat + end - start
            assert sat <= max(workshop.SITTING, end - start) + 10
        text = plan.markdown()
        assert all(x.claim in text for x in plan.lessons) and all(x.title in text for x in plan.later)
    assert "Lunch" in workshop.plan("a day", lessons).markdown() and "Lunch" not in workshop.plan("half a day", lessons).markdown()


def test_a_plan_leaves_out_exercises_before_lessons():
    def lesson(number: str, minutes: int) -> workshop.Lesson:
        return workshop.Lesson(f"{number}_x", number, "It is.", 110 * 20, 0, "2 GB", (("main", 10, 3), ("more", minutes, 1)))

    short = [lesson(n, 5) for n in ("00", "01", "04", "10")]
    assert workshop.plan("half a day", short).least == 1
    long = [lesson(n, 45) for n in ("00", "01", "04", "10")]
    assert workshop.plan("half a day", long).least == 2 and len(workshop.plan("half a day", long).lessons) == 4
    with pytest.raises(ValueError, match="none of its lessons"):
        workshop.plan("half a day", [lesson("07", 5)])
    with pytest.raises(ValueError, match="half a day, a day"):
        workshop.plan("a week", short)


# -------------------------------------------------------------------------------------------------------------- pages


def test_a_handout_shows_pictures_and_tables_and_loads_nothing(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><title>t</title></svg>'
    outputs = [
        nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": {}, "image/svg+xml": svg, "text/plain": "fig"}),
        nbformat.v4.new_output(
            "display_data", {"text/html": "<table><tr><td>7</td></tr></table><script src='https://x.org/a.js'></script>"}
        ),
        nbformat.v4.new_output(
            "display_data",
            {
                "text/html": '<iframe src="http://127.0.0.1:1/"></iframe><p>At <a href="http://127.0.0.1:1/" rel="x">http://127.0.0.1:1/</a>.</p>'
            },
        ),
        nbformat.v4.new_output("display_data", {"application/javascript": "fetch('https://x.org')"}),
    ]
    text = (
        "# 02 · A title\n\n[01](01_first.ipynb), [exercises](exercises/02_a.ipynb)\n\n<details><summary>Hint</summary>\n\nno\n\n</details>"
    )
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("x = 1", outputs=outputs)]
    path = tmp_path / "02_a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    page = handouts.of_notebook(path, "../notebooks/exercises")
    assert "<title>02 · A title</title>" in page and "data:image/svg+xml" in page and "<td>7</td>" in page and "<details>" in page
    assert 'href="01_first.html"' in page and 'href="../notebooks/exercises/02_a.ipynb"' in page
    assert "x.org" not in page and "<script" not in page and "A page that was open here" in page
    assert "127.0.0.1" not in page and "At an address of that kernel's own." in page


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('<img src="https://x.org/a.png">', "https://x.org/a.png"),
        ("<script>1</script>", "script"),
        ('<p style="background: url(http://a.b/c)">', "http://a.b/c"),
    ],
)
def test_a_page_that_would_load_something_is_not_written(body, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        handouts.page("t", body)


# ---------------------------------------------------------------------------------------------------------------- kit


@pytest.mark.slow
def test_a_kit_is_whole_its_pages_load_nothing_and_its_solutions_are_right(kit):
    assert workshop.check(kit, run=("00",)) == []
    lessons = {p.stem for p in (kit / "notebooks").glob("*.ipynb")}
    assert lessons == {p.stem for p in (kit / "handouts").glob("*.html")} == {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    with_exercises = {s.stem for s in SOURCES if BUILD.read(s).exercises} & lessons
    for folder in ("notebooks/exercises", "teacher/solutions"):
        assert {p.stem for p in (kit / folder).glob("*.ipynb")} == with_exercises
    told = (kit / "teacher" / "checklist.md").read_text(encoding="utf-8")
    assert "no wheels" in told and (kit / "teacher" / "half-day.html").is_file() and (kit / "teacher" / "full-day.md").is_file()
    assert not any(
        "solution" in c.metadata.get("tags", []) for p in kit.glob("notebooks/exercises/*.ipynb") for c in nbformat.read(p, 4).cells
    )
    for folder in (kit, kit / "teacher"):
        listed = subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert listed.returncode == 0, listed.stdout
    assert "teacher/" not in (kit / "SHA256SUMS").read_text(encoding="utf-8")
    assert not [link for link in links_of(kit / "handouts") if "127.0.0.1" in link or "localhost" in link]


def links_of(folder: Path) -> list[str]:
    return [link for p in sorted(folder.glob("*.html")) for link in re.findall(r'href="([^"]*)"', p.read_text(encoding="utf-8"))]


def install(folder: Path) -> tuple[subprocess.CompletedProcess, str]:
    """What install.sh does, up to the point where pip runs: a Python that only writes down how it is called; (the run, the calls)."""
    python = folder.parent / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder.parent}/calls\n[ "$1" != -m ] || [ "$2" != venv ] || exit 9\n', encoding="utf-8")
    python.chmod(0o755)
    ran = subprocess.run(
        ["sh", str(folder / "install.sh")], capture_output=True, text=True, env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    )
    calls = folder.parent / "calls"
    return ran, calls.read_text(encoding="utf-8") if calls.exists() else ""


@pytest.mark.slow
def test_a_participants_copy_installs_without_teacher_and_after_a_notebook_was_saved(copied):
    shutil.rmtree(copied / "teacher")
    notebook = next((copied / "notebooks").glob("00*.ipynb"))
    notebook.write_text(notebook.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    ran, calls = install(copied)
    assert ran.returncode == 9 and calls == "-m venv .venv\n", ran.stderr  # it came to the environment, which is not made here
    assert workshop.check(copied, run=()) == [f"notebooks/{notebook.name} is not as it was made"]


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["wheel", "constraints.txt", "start.sh", "SHA256SUMS"])
def test_what_is_installed_and_run_is_checked(copied, spoilt):
    path = next((copied / "wheels").glob("*.whl")) if spoilt == "wheel" else copied / spoilt
    path.write_bytes(b"" if spoilt == "SHA256SUMS" else path.read_bytes() + b"\n")
    ran, calls = install(copied)
    assert ran.returncode == 1 and "not as it was made" in ran.stderr and calls == ""


@pytest.mark.slow
def test_a_kit_installs_our_own_wheel_by_its_path_and_no_package_of_that_name(kit):
    (own,) = (kit / "wheels").glob("*.whl")
    with zipfile.ZipFile(own) as wheel:
        inside = wheel.namelist()
        assert wheel.read("edgelab/workshop.py") == Path(workshop.__file__).read_bytes() and "edgelab/_data/edge-moe/config.json" in inside
    (line,) = [x for x in (kit / "install.sh").read_text(encoding="utf-8").splitlines() if " -m pip install " in x]
    assert line.split()[-1] == f'"./wheels/{own.name}[{workshop.EXTRAS}]"'
    for offline in (True, False):
        text = workshop.installer(own.name, offline)
        assert "@" not in text.replace('"@jupyterlab', "").replace('"$@"', "") and ("--no-index" in text) == offline
        assert subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize(("user", "given"), [(0, "--allow-root "), (1000, "")])
def test_lab_starts_for_root_too_and_says_so_only_then(tmp_path, user, given):
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for path, text in (("bin/id", f"echo {user}"), (".venv/bin/jupyter", 'echo "$@"')):
        (tmp_path / path).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / path).chmod(0o755)
    (tmp_path / "start.sh").write_text(workshop._START, encoding="utf-8")
    ran = subprocess.run(
        ["sh", str(tmp_path / "start.sh"), "--no-browser"], capture_output=True, text=True, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    )
    assert ran.stdout.rstrip().endswith(f" {given}--no-browser") and "--ServerApp.ip=127.0.0.1" in ran.stdout, ran.stderr
    assert ran.stdout.count("--allow-root") == (user == 0)


@pytest.mark.slow
def test_a_kit_that_was_spoilt_is_found_out(copied):
    exercise = next((copied / "teacher" / "solutions").glob("00*.ipynb"))
    notebook = nbformat.read(exercise, as_version=4)
    solved = BUILD.read(next(s for s in SOURCES if s.stem == exercise.stem)).exercises[0]
    for cell in notebook.cells:
        if cell.source == solved.solution:
            cell.source = solved.mutants[0]
    nbformat.write(notebook, exercise)
    (copied / "handouts" / "00_start_here.html").write_text('<img src="https://x.org/a.png">', encoding="utf-8")
    (copied / "start.sh").unlink()
    (copied / "more.txt").write_text("?", encoding="utf-8")
    wrong = "\n".join(workshop.check(copied, run=("00",)))
    assert "start.sh is listed and not there" in wrong and "more.txt is there and not listed" in wrong
    assert "handouts/00_start_here.html is not as it was made" in wrong and "would load https://x.org/a.png" in wrong
    assert f"{exercise.name}: a solved exercise is not right: Not yet" in wrong
    ran = subprocess.run(["sh", str(copied / "install.sh")], capture_output=True, text=True)
    assert ran.returncode == 1 and "not as it was made" in ran.stderr and not (copied / ".venv").exists()


def test_an_installer_refuses_another_python_before_it_makes_anything(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "PLATFORM.json").write_text('{"python": "2.7", "system": "Linux", "machine": "x86_64"}', encoding="utf-8")
    (tmp_path / "SHA256SUMS").write_text("", encoding="utf-8")
    script = workshop.installer("edgelab-1-py3-none-any.whl", True).replace("sha256sum --quiet --check -", "cat")
    (tmp_path / "install.sh").write_text(script, encoding="utf-8")
    ran = subprocess.run(
        ["sh", "install.sh"], cwd=tmp_path, capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    )
    assert ran.returncode == 1 and "the wheels are for 2.7" in ran.stderr and not (tmp_path / ".venv").exists()


def test_a_kit_replaces_nothing_that_is_not_one(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError):
        workshop.make(tmp_path, wheels=False, progress=False)
    with pytest.raises(FileExistsError, match="did not write"):
        workshop.make(tmp_path, wheels=False, force=True, progress=False)
    with pytest.raises(FileNotFoundError, match="checkout"):
        workshop.make(tmp_path / "kit", wheels=False, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no kit"):
        workshop.check(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_pip_says_reaches_the_reader(tmp_path):
    (tmp_path / "constraints.txt").write_text("", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"collecting wheels failed: .+"):
        workshop.collect(tmp_path / "wheels", tmp_path)  # no project there


# ----------------------------------------------------------------------------------------------------------- launcher


def entries() -> list[dict]:
    return yaml.safe_load((LAUNCHER / "jp_app_launcher_edgelab.yaml").read_text(encoding="utf-8"))


def test_the_launchers_entries_keep_to_its_schema_and_start_no_server():
    utils = pytest.importorskip("jupyter_app_launcher.utils")
    read = utils.parse_config(str(LAUNCHER), str(LAUNCHER / "jp_app_launcher_edgelab.yaml"))
    assert [e["title"] for e in read] == ["edgelab: start here", "edgelab: trade-off explorer"], "one that breaks the schema is left out"
    assert all(e["icon"].startswith("<svg") for e in read)
    assert {e["type"] for e in read} == {"jupyterlab-commands"}, "the other kinds run a server and a proxy"
    for entry in entries():
        (command,) = entry["source"]
        assert command["id"] == "docmanager:open" and (ROOT / "notebooks" / command["args"]["path"]).is_file()


def test_the_wheel_puts_the_entries_where_lab_looks():
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["shared-data"] == {"edgelab/launcher": "share/jupyter/jupyter_app_launcher"}


@pytest.mark.slow
@pytest.mark.browser
def test_an_entry_opens_its_lesson_in_a_real_lab_without_a_network(tmp_path, monkeypatch):
    if missing := lab_browser.why_not():
        pytest.skip(missing)
    pytest.importorskip("jupyter_app_launcher")
    monkeypatch.setenv("JUPYTER_APP_LAUNCHER_PATH", str(LAUNCHER))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}  # else a dialog asks for one
    for entry in entries():
        cells = [nbformat.v4.new_markdown_cell("# a lesson")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / entry["source"][0]["args"]["path"])
    with lab_browser.lab(tmp_path) as lab:
        (server,) = [p for p in psutil.Process().children() if "jupyterlab" in " ".join(p.cmdline())]
        for entry in entries():
            lab.tab.evaluate("window.jupyterapp.commands.execute('launcher:create')")
            card = lab.tab.locator(".jp-LauncherCard:visible", has_text=entry["title"]).first
            if folder := os.environ.get("EDGELAB_SCREENSHOTS"):
                card.wait_for()
                lab.tab.screenshot(path=Path(folder) / "launcher.png")
            card.click()
            path = entry["source"][0]["args"]["path"]
            lab.tab.wait_for_function("path => window.jupyterapp.shell.currentWidget?.context?.path === path", arg=path)
        listening = {c.laddr.ip for p in (server, *server.children(recursive=True)) for c in p.net_connections() if c.status == "LISTEN"}
        assert listening and listening <= {"127.0.0.1", "::1"}
        assert lab.left == [], "a request that was not for this machine"


# ------------------------------------------------------------------------------------------------- Binder and conda agree


def test_binder_and_conda_agree_on_python_extras_and_versions():
    conda, binder = (yaml.safe_load((ROOT / p).read_text(encoding="utf-8")) for p in ("environment.yml", ".binder/environment.yml"))
    plain = [d for d in conda["dependencies"] if isinstance(d, str)]
    (by_pip,) = (d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert binder["dependencies"] == plain and binder["channels"] == conda["channels"] and binder["name"] == conda["name"]
    post = ROOT / ".binder" / "postBuild"
    assert post.stat().st_mode & 0o111, "repo2docker runs it"
    (command,) = re.findall(r"^python -m pip install (.*)$", post.read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = command.split()
    assert words[words.index("--constraint") + 1] == by_pip[0].removeprefix("--constraint ")
    assert words[words.index("--editable") + 1] == by_pip[1].removeprefix("--editable ")
    assert words[-1] == f".[{workshop.EXTRAS}]", "the kit installs the same"
    assert "==" not in command, "versions are in constraints.txt alone"


def test_the_root_that_binder_sets_is_read_by_the_server(tmp_path):
    text = (ROOT / ".binder" / "postBuild").read_text(encoding="utf-8")
    (line,) = re.findall(r"^printf '(.*?)\\n'", text, flags=re.MULTILINE)
    (tmp_path / "notebooks").mkdir()
    (name,) = re.findall(r'> "\$config/(\w+\.json)"$', text, flags=re.MULTILINE)
    (tmp_path / name).write_text(line % tmp_path, encoding="utf-8")
    told = "from jupyter_core.application import JupyterApp; from jupyter_server.serverapp import ServerApp; a = ServerApp(); "
    told += "JupyterApp.initialize(a, []); print(a.root_dir)"
    found = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, cwd=tmp_path,
        env={"JUPYTER_CONFIG_PATH": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert found.stdout.strip() == str(tmp_path / "notebooks"), found.stderr[-500:]
