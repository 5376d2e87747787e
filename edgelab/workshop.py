"""The instructor's kit for a room without a network: `python -m edgelab.workshop --out dist/workshop` (or `make workshop`).

    dist/workshop/
      README.md, index.html      where to begin
      install.sh, start.sh       an environment from wheels/, then JupyterLab on localhost; no network is needed for either
      notebooks/, .../exercises  what participants work in
      handouts/                  each lesson as a page that opens offline and prints (`handouts`)
      teacher/                   timing plans (half a day, a day), checklist for the room, solved exercises
      wheels/                    our own, and every package at its pinned version for this platform (--no-wheels leaves those out)
      SHA256SUMS                 of all files but teacher/'s, which has a list of its own: `sha256sum --check SHA256SUMS`

Our own wheel is always in the kit and is installed by its path, never by name: what a public index calls "edgelab" is not ours.
install.sh checks what it installs and runs (wheels, constraints, scripts), not the notebooks: people write in those, and may install again.

Nothing in it is written by hand that can be counted: minutes come from the lessons' own *Takes* lines, from the exercises' minutes and
from the length of their prose; sizes and memory in the checklist from the files and the lessons.

Minutes of a lesson = words / TALK + what its cells take + its exercises. TALK, 110 words a minute, is a slow speaker's pace, for there is
looking to do as well. A plan takes the lessons of its list that still fit, with all exercises, or without the least
important ones where more lessons fit then.
"""

import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from tqdm.auto import tqdm

import edgelab
from edgelab import handouts
from edgelab.console import may_write, staged
from edgelab.handouts import write
from edgelab.manifest import sha256
from edgelab.page import external_loads

ROOT = Path(__file__).resolve().parent.parent
MARKER = "workshop.json"
EXTRAS = "lab,export"
TALK = 110  # words of prose a minute
BREAK, LUNCH, SITTING = 15, 60, 90  # minutes; nobody sits longer than the last without a break
# which lessons, by the beginning of their names, the most wanted first; what does not fit is left for home
PLANS = {
    "half a day": (210, ("00", "01", "04", "10", "06", "05", "09")),
    "a day": (420, ("00", "01", "04", "10", "06", "09", "12", "02", "05", "03", "07", "08", "11")),
}


# --------------------------------------------------------------------------------------------------------- minutes


@dataclass(frozen=True)
class Lesson:
    """What a plan needs to know of a lesson. `exercises`: (name, minutes, importance 1..3) each."""

    name: str
    title: str
    claim: str
    words: int
    runs_minutes: float
    memory: str
    exercises: tuple[tuple[str, int, int], ...]

    @property
    def number(self) -> str:
        return self.name[:2]

    def minutes(self, least: int = 1) -> int:
        """Of talk, running, and the exercises of importance `least` and more; rounded up to a multiple of 5."""
        exercises = sum(m for _, m, importance in self.exercises if importance >= least)
        return max(5, 5 * math.ceil((self.words / TALK + self.runs_minutes + exercises) / 5))


_COUNTS = {"half": 0.5, "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "ten": 10}


def minutes_of(text: str) -> float:
    """The minutes that a lesson's *Takes* sentence speaks of, the longest where it gives a range.

    >>> [minutes_of(f"*Takes* {t} on two cores") for t in ("about half a minute", "one to two minutes", "a minute and a half")]
    [0.5, 2, 1.5]

    Raises ValueError where there is no such sentence, or no number that is known.
    """
    told = re.search(r"\*Takes\*(.*?)(?:\bcores?\b|[.;:])", text, flags=re.S)
    if told is None:
        raise ValueError("no sentence says what the lesson *Takes*")
    said = " ".join(told[1].split()).lower()
    found = [
        0.5 if m[1] == "half a" else _COUNTS.get(m[1], 0) or float(m[1])
        for m in re.finditer(r"(half a|half|an?|one|two|three|four|five|six|ten|\d+(?:\.\d+)?)\s+minutes?\b", said)
    ]
    if not found:
        raise ValueError(f"*Takes* {said!r} names no minutes that are understood, such as 'about two minutes'")
    return max(found) + (0.5 if re.search(r"minutes? and a half", said) else 0)


def lesson_of(source: Path, build) -> Lesson:
    """The `Lesson` of a notebook's source. Raises ValueError naming it, where its form is not that of the course."""
    taken = build.read(source)
    prose = [c.source for c in taken.cells if c.cell_type == "markdown" and not c.metadata.get("exercise")]
    text = "\n".join(prose)
    claim = re.search(r"\*\*Claim:\s*(.*?)\*\*", text, flags=re.S)
    memory = re.search(r"([\d.]+ GB)[^.;:]*memory", text)
    if claim is None or memory is None:
        raise ValueError(f"{source.stem}: no {'claim' if claim is None else 'size of memory'} was found at its beginning")
    try:
        minutes = minutes_of(text)
    except ValueError as error:
        raise ValueError(f"{source.stem}: {error}") from None
    title = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    exercises = tuple((e.name, e.minutes, e.importance) for e in taken.exercises)
    return Lesson(source.stem, title, " ".join(claim[1].split()), len(text.split()), minutes, memory[1], exercises)


@dataclass(frozen=True)
class Plan:
    """Lessons in their order, with the exercises of importance `least` and more; `later`: those that did not fit."""

    name: str
    minutes: int
    lessons: tuple[Lesson, ...]
    later: tuple[Lesson, ...]
    least: int

    def slots(self, begin: int = 9 * 60) -> list[tuple[int, int, str]]:
        """(begin, end, what) in minutes of the day: lessons, a break before anyone sits too long, lunch in the middle of a long day."""
        found, now, sat, ate = [], begin, 0, self.minutes < 300
        for lesson in self.lessons:
            takes = lesson.minutes(self.least)
            if sat and (sat + takes > SITTING or (not ate and now >= begin + self.minutes / 2 - 45)):
                pause = BREAK
                if not ate and now >= begin + self.minutes / 2 - 60:
                    pause, ate = LUNCH, True
                found.append((now, now + pause, "Lunch" if pause == LUNCH else "Break"))
                now, sat = now + pause, 0
            found.append((now, now + takes, f"**{lesson.title}**"))
            now, sat = now + takes, sat + takes
        return [*found, (now, now + 10, "What was learnt, questions, what is left for home")]

    def markdown(self) -> str:
        lines = [f"# Plan: {self.name}", ""]
        slots = self.slots()
        told = {f"**{lesson.title}**": lesson for lesson in self.lessons}
        lines += [
            f"From {_clock(slots[0][0])} to {_clock(slots[-1][1])}, {len(self.lessons)} lessons. Minutes follow from the lessons: words at "
            f"{TALK} a minute, what the cells take on two cores, and the exercises' own minutes"
            + (" (those of importance 1 are left out)." if self.least == 2 else "."),
            "",
            "| from | to | what | talk | running | exercises |",
            "|---|---|---|---:|---:|---|",
        ]
        for start, end, what in slots:
            lesson = told.get(what)
            if lesson is None:
                lines.append(f"| {_clock(start)} | {_clock(end)} | {what} | | | |")
                continue
            taken = [f"{name} ({m})" for name, m, importance in lesson.exercises if importance >= self.least]
            minutes = f"{lesson.words / TALK:.0f} | {lesson.runs_minutes:g}"
            lines.append(f"| {_clock(start)} | {_clock(end)} | {what} | {minutes} | {', '.join(taken) or 'none'} |")
        lines += ["", "## What each lesson claims", ""]
        lines += [f"- **{lesson.title}**: {lesson.claim}" for lesson in self.lessons]
        if self.later:
            lines += ["", "## Left for home", ""]
            lines += [f"- {lesson.title}, about {lesson.minutes()} minutes" for lesson in self.later]
        return "\n".join(lines) + "\n"


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


def plan(name: str, lessons: Sequence[Lesson]) -> Plan:
    """The plan called `name` out of the lessons that there are. It fits into its minutes, breaks included.

    Raises ValueError for an unknown plan, or one of whose lessons not even the first fits.
    """
    if name not in PLANS:
        raise ValueError(f"there is no plan {name!r}; there are {', '.join(PLANS)}")
    minutes, wanted = PLANS[name]
    by_number = {lesson.number: lesson for lesson in lessons}
    best: Plan | None = None
    for least in (1, 2):  # with all exercises, or without the least important ones: what brings more lessons in
        chosen: list[Lesson] = []
        for lesson in (by_number[n] for n in wanted if n in by_number):
            tried = sorted([*chosen, lesson], key=lambda x: x.name)
            slots = Plan(name, minutes, tuple(tried), (), least).slots()
            if slots[-1][1] - slots[0][0] <= minutes:
                chosen = tried
        found = Plan(name, minutes, tuple(chosen), tuple(x for x in lessons if x not in chosen), least)
        if best is None or len(found.lessons) > len(best.lessons):
            best = found
    if not best.lessons:
        raise ValueError(f"plan {name!r}: none of its lessons, {', '.join(wanted)}, is there or fits into {minutes} minutes")
    return best


# -------------------------------------------------------------------------------------------------------- the texts


def checklist(lessons: Sequence[Lesson], wheel_bytes: int) -> str:
    """The checklist for the room, with the sizes as they are."""
    most = max(float(lesson.memory.split()[0]) for lesson in lessons)
    size = (
        f"{wheel_bytes / 1e6:,.0f} MB of wheels"
        if wheel_bytes
        else "no wheels but edgelab's own: the kit was made with --no-wheels, so installing needs a network"
    )
    return f"""# Checklist for the room

## A week before

- [ ] Machines: x86-64 Linux or what the wheels are for (`wheels/PLATFORM.json`), Python of that very version, 4 GB of memory free (a lesson
  takes up to {most:g} GB), 6 GB of disk: {size}, and what they unpack to.
- [ ] `./install.sh` on one machine *with its network off*. It ends with `edgelab doctor`; everything there says "ok".
- [ ] `./start.sh` on it: JupyterLab shows the lessons; run `00_start_here.ipynb` to its end.
- [ ] The solved exercises in `teacher/solutions` run on it. `cd teacher && sha256sum --check SHA256SUMS` checks that folder.
- [ ] Print `handouts/` for who reads on paper; each is one page file, and prints without folds being lost if they are opened first.

## The day before

- [ ] The folder, without `teacher/`, is on every machine, or on as many USB sticks as rows: `sha256sum --check SHA256SUMS` on each copy.
- [ ] `./install.sh` on all machines. The first run of a lesson compiles kernels (about twenty seconds, once): run `00` everywhere.
  It may run again at any time, also after somebody saved a notebook: it checks only what it installs.
- [ ] Power at each seat: compressing models empties a battery, which lesson 09 then shows.
- [ ] A projector that shows 1280 pixels in width; browser zoom at 125 %.

## On the day

- [ ] Participants open `notebooks/`, and `notebooks/exercises/` for the exercises. `teacher/` is not on their machines.
- [ ] Say at the start: predict before you run. The point of each cell is the difference between the two.
- [ ] A cell that hangs: *Kernel, Restart*; every cell may be run again. An answer that "is not yet" says what is wrong with it.
- [ ] Figures differ a little from the handouts' where Python is another patch release: the text is made from its library.

## Afterwards

- [ ] What was unclear, per lesson; which exercise took longer than it says. Minutes are in the sources' exercise cells.
"""


def readme(lessons: Sequence[Lesson], wheels: bool) -> str:
    how = (
        "./install.sh       # makes .venv from wheels/, without a network, and looks whether all is well"
        if wheels
        else "./install.sh       # makes .venv; it needs a network, for this kit was made without the other packages' wheels"
    )
    listed = "\n".join(f"- `notebooks/{lesson.name}.ipynb`: {lesson.claim}" for lesson in lessons)
    return f"""# edgelab: a workshop

Make a language model small enough for a phone, and measure what that costs. Everything here works without a network.

    {how}
    ./start.sh         # JupyterLab on this machine alone (localhost)

The lessons, each also as a page to read or print in `handouts/`, with exercises in `notebooks/exercises/`:

{listed}

For who teaches, where this copy has the folder: `teacher/half-day.md`, `teacher/full-day.md` (also .html), `teacher/checklist.md`, and
`teacher/solutions/`. `SHA256SUMS` lists every other file, `teacher/SHA256SUMS` those: `sha256sum --check SHA256SUMS`.
"""


_INSTALL = """#!/bin/sh
# Makes .venv beside this script. @FETCHES@ edgelab itself is the wheel in wheels/, whatever an index may call so.
# What is installed and run is checked first. Notebooks are not: people write in them, and may install again.
set -eu
cd "$(dirname "$0")"
PYTHON="${PYTHON:-python3}"
grep -E '  (wheels/.*|constraints\\.txt|install\\.sh|start\\.sh)$' SHA256SUMS | sha256sum --quiet --check - || {
  echo "a file is not as it was made: copy the folder again" >&2
  exit 1
}
@CHECK@
"$PYTHON" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check --quiet @FROM@ --constraint constraints.txt "./wheels/@WHEEL@[@EXTRAS@]"
mkdir -p .venv/share/jupyter/lab/settings
echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > .venv/share/jupyter/lab/settings/overrides.json
HF_HUB_OFFLINE=1 .venv/bin/edgelab doctor
echo "now: ./start.sh"
"""
_CHECK = """"$PYTHON" - <<'END' || exit 1
import json, platform, sys
made = json.load(open("wheels/PLATFORM.json"))
here = {"python": "%d.%d" % sys.version_info[:2], "system": platform.system(), "machine": platform.machine()}
wrong = [f"{k} is {here[k]}, the wheels are for {made[k]}" for k in here if here[k] != made[k]]
sys.exit("cannot install: " + "; ".join(wrong) + ". Name another Python: PYTHON=/path/to/python ./install.sh" if wrong else 0)
END"""
_START = """#!/bin/sh
# JupyterLab on the lessons, on this machine alone.
cd "$(dirname "$0")"
[ "$(id -u)" != 0 ] || set -- --allow-root "$@" # as root, in a container, Jupyter starts only if it is told that this is meant
export HF_HUB_OFFLINE=1 PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir=notebooks --LabApp.news_url=None \\
  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate "$@"
"""


# -------------------------------------------------------------------------------------------------------- the door


def builder(root: Path = ROOT):
    """The module notebooks/build.py of a checkout. Raises FileNotFoundError where there is none (an installed wheel has no notebooks)."""
    path = root / "notebooks" / "build.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the kit is made in a checkout of the repository, which has the notebooks")
    spec = importlib.util.spec_from_file_location("notebooks_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["notebooks_build"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make(
    out: str | Path,
    *,
    wheels: bool = True,
    execute: bool = False,
    index: str | None = None,
    force: bool = False,
    root: Path = ROOT,
    progress: bool = True,
) -> Path:
    """The folder of the kit (see the module), written whole or not at all. `execute`: run the solved exercises; `index`: one more package
    index, such as PyTorch's for its CPU build. Raises FileExistsError unless `force`, RuntimeError where pip fails or a wheel is missing.
    """
    build, out = builder(root), Path(out)
    may_write(out, force or (out / MARKER).is_file(), ours=MARKER)
    sources = [s for s in build.chosen([], root / "notebooks") if (root / "notebooks" / f"{s.stem}.ipynb").is_file()]
    if not sources:
        raise FileNotFoundError(f"{root / 'notebooks'} holds no built notebook; `make notebooks` writes them")
    lessons = [lesson_of(s, build) for s in sources]
    with staged(out) as folder:
        for source in tqdm(sources, desc="lessons", unit="lesson", disable=not progress):
            stored = root / "notebooks" / f"{source.stem}.ipynb"
            _copy(stored, folder / "notebooks" / stored.name)
            build.write_exercises(source, folder / "notebooks")
            build.write_solutions(source, folder / "teacher" / "solutions", execute)
            write(folder / "handouts" / f"{source.stem}.html", handouts.of_notebook(stored, "../notebooks/exercises"))
        for name, file in (("half a day", "half-day"), ("a day", "full-day")):
            text = plan(name, lessons).markdown()
            write(folder / "teacher" / f"{file}.md", text)
            write(folder / "teacher" / f"{file}.html", handouts.of_markdown(f"Plan: {name}", text))
        _copy(root / "constraints.txt", folder / "constraints.txt")
        size = collect(folder / "wheels", root, index) if wheels else 0
        own = next((folder / "wheels").glob("edgelab-*.whl")) if wheels else own_wheel(folder / "wheels", root)
        text = checklist(lessons, size)
        write(folder / "teacher" / "checklist.md", text)
        write(folder / "teacher" / "checklist.html", handouts.of_markdown("Checklist for the room", text))
        write(folder / "README.md", readme(lessons, wheels))
        write(folder / "index.html", handouts.page("edgelab: a workshop", _index(lessons)))
        for name, script in (("install.sh", installer(own.name, wheels)), ("start.sh", _START)):
            write(folder / name, script).chmod(0o755)
        write(folder / MARKER, json.dumps({"format": 1, "edgelab": edgelab.__version__, "wheels": wheels}) + "\n")
        teacher = folder / "teacher"
        _write_sums(teacher, _files(teacher))
        _write_sums(folder, [p for p in _files(folder) if not p.is_relative_to(teacher)])
    return out


def installer(wheel: str, offline: bool) -> str:
    """The text of install.sh: it installs wheels/`wheel` by its path; `offline`: and everything else out of wheels/ too."""
    text = _INSTALL.replace("@CHECK@\n", f"{_CHECK}\n" if offline else "").replace("@WHEEL@", wheel).replace("@EXTRAS@", EXTRAS)
    text = text.replace(
        "@FETCHES@", "Nothing is fetched from anywhere." if offline else "Other packages come from the index that pip uses."
    )
    return text.replace("@FROM@ ", "--no-index --find-links wheels " if offline else "")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS" and ".venv" not in p.relative_to(folder).parts)


def _write_sums(folder: Path, files: Sequence[Path]) -> None:
    write(folder / "SHA256SUMS", "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def _read_sums(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return dict(line.split("  ", 1)[::-1] for line in lines)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _index(lessons: Sequence[Lesson]) -> str:
    rows = "".join(
        f'<tr><td><a href="handouts/{x.name}.html">{x.title}</a></td><td>{x.minutes()} min</td><td>{x.claim}</td></tr>' for x in lessons
    )
    teacher = ", ".join(
        f'<a href="teacher/{f}.html">{t}</a>' for f, t in (("half-day", "half a day"), ("full-day", "a day"), ("checklist", "the room"))
    )
    table = f"<table><tr><th>lesson</th><th>with exercises</th><th>claim</th></tr>{rows}</table>"
    return f"<h1>edgelab: a workshop</h1>{table}<p>For who teaches, where this copy has the folder: {teacher}.</p>"


def own_wheel(folder: Path, root: Path = ROOT) -> Path:
    """The path of edgelab's wheel in `folder`, made from the checkout. Raises RuntimeError with pip's last words."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    if importlib.util.find_spec("hatchling"):  # the build backend is here: nothing has to be fetched for the build
        command.append("--no-build-isolation")
    _run([*command, str(root)], "making edgelab's wheel")
    return next(folder.glob("edgelab-*.whl"))


def collect(folder: Path, root: Path = ROOT, index: str | None = None) -> int:
    """Bytes of the wheels of edgelab[lab,export] and all it needs, put into `folder` for this Python and platform, at the pinned versions.

    Then pip resolves the installation from that folder alone. Raises RuntimeError with pip's last words where either fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    more = ["--extra-index-url", index] if index else []
    pinned = ["--constraint", str(root / "constraints.txt")]
    _run([*pip, "wheel", "--quiet", "--wheel-dir", str(folder), *pinned, *more, f"{root}[{EXTRAS}]"], "collecting wheels")
    here = {"python": "{}.{}".format(*sys.version_info[:2]), "system": platform.system(), "machine": platform.machine()}
    write(folder / "PLATFORM.json", json.dumps(here) + "\n")
    offline = ["--no-index", "--find-links", str(folder), "--dry-run", "--ignore-installed", "--quiet"]
    own = next(folder.glob("edgelab-*.whl"))
    _run([*pip, "install", *offline, *pinned, f"{own}[{EXTRAS}]"], "resolving from the wheels alone")
    return sum(p.stat().st_size for p in folder.glob("*.whl"))


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{what} failed: {said[-1] if said else 'pip says nothing'}")


def archive(folder: str | Path) -> Path:
    """`folder`.tar, one file to carry; not compressed, for wheels are."""
    folder = Path(folder)
    target = folder.with_name(f"{folder.name}.tar")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with tarfile.open(temporary, "w") as tar:
        tar.add(folder, arcname=folder.name, filter=lambda m: None if "/.venv" in m.name else m)
    os.replace(temporary, target)
    return target


def check(folder: str | Path, *, run: Sequence[str] | None = None, root: Path = ROOT) -> list[str]:
    """What is wrong with a kit, a sentence each: a file that is not as listed, a page that loads something, a solution that is not right.

    `run`: the beginnings of the names of the solved exercises to execute (None: all; some minutes). Raises FileNotFoundError for no kit.
    """
    folder = Path(folder)
    if not (folder / "SHA256SUMS").is_file():
        raise FileNotFoundError(f"{folder} holds no SHA256SUMS: it is no kit, or half of one")
    if (folder / "teacher").is_dir() and not (folder / "teacher" / "SHA256SUMS").is_file():
        raise FileNotFoundError(f"{folder / 'teacher'} holds no SHA256SUMS: the folder is half of one; make the kit again")
    listed = _read_sums(folder)
    if (folder / "teacher").is_dir():  # a participant's copy has none
        listed |= {f"teacher/{name}": told for name, told in _read_sums(folder / "teacher").items()}
    there = {p.relative_to(folder).as_posix(): p for p in _files(folder)}
    wrong = [f"{name} is listed and not there" for name in sorted(set(listed) - set(there))]
    wrong += [f"{name} is there and not listed" for name in sorted(set(there) - set(listed))]
    wrong += [f"{name} is not as it was made" for name in sorted(set(there) & set(listed)) if sha256(there[name]) != listed[name]]
    for name, path in there.items():
        if name.endswith(".html"):
            wrong += [f"{name} would load {what}" for what in external_loads(path.read_text(encoding="utf-8"))]
    build = builder(root)
    for path in sorted((folder / "teacher" / "solutions").glob("*.ipynb")):
        if run is not None and not path.name.startswith(tuple(run)):
            continue
        ran = build.execute(nbformat.read(path, as_version=4), path.parent)
        checks = [c for c in ran.cells if "check" in c.metadata.get("tags", [])]
        said = ["".join(o.get("data", {}).get("text/plain", "") for o in c.outputs) for c in checks]
        wrong += [f"{path.name}: a solved exercise is not right: {text or 'nothing said'}" for text in said if not text.startswith("Right")]
        wrong += [f"{path.name} has no exercise"] * (not checks)
    return wrong


def main(argv: list[str] | None = None, tell: Callable[[str], None] = print) -> int:
    import argparse

    p = argparse.ArgumentParser(prog="python -m edgelab.workshop", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("dist/workshop"), help="the folder (default: dist/workshop)")
    p.add_argument("--no-wheels", action="store_true", help="leave out all packages but our own: small, but installing needs a network")
    p.add_argument("--index", metavar="URL", help="one more package index, such as https://download.pytorch.org/whl/cpu")
    p.add_argument("--execute", action="store_true", help="run the solved exercises, so that they show their outputs (minutes)")
    p.add_argument("--tar", action="store_true", help="write OUT.tar too: one file to carry")
    p.add_argument("--check", action="store_true", help="make nothing: check the kit at --out, and run its solved exercises")
    p.add_argument("--force", action="store_true", help="overwrite what is at --out")
    a = p.parse_args(argv)
    try:
        if a.check:
            wrong = check(a.out)
            tell("\n".join(wrong) or f"{a.out}: all files as listed, pages load nothing, solved exercises are right")
            return int(bool(wrong))
        made = make(a.out, wheels=not a.no_wheels, execute=a.execute, index=a.index, force=a.force)
        size = sum(f.stat().st_size for f in made.rglob("*") if f.is_file())
        tell(f"{made}: {size / 1e6:,.1f} MB" + (f", and {archive(made)}" if a.tar else ""))
    except (OSError, ValueError, RuntimeError) as error:
        p.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
