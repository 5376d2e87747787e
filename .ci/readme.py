"""The lists in README.md, from what they list: `python .ci/readme.py --write` renews them, without the flag it says whether they differ.

Lessons: a notebook's title and the claim that it opens with. Files: a module's path and the first sentence of its docstring, by the
floors of `tests/test_project.py`.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLES = ("1 · nouns", "2 · kernels", "3 · methods", "4 · pipeline", "5 · views")


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line; raises ValueError for a module without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring: say in its first line what it is")
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", paragraph)[0]
    return sentence.rstrip(".:") if len(sentence) < 240 else sentence[:236].rsplit(" ", 1)[0] + " ..."


def lessons() -> str:
    """The notebooks as a Markdown table; raises ValueError for one without a title or a claim."""
    lines = ["| lesson | what it claims, and measures |", "|---|---|"]
    for source in sorted((ROOT / "notebooks" / "src").glob("*.py")):
        text = re.sub(r"^# ?", "", source.read_text(encoding="utf-8"), flags=re.M)
        title, claim = re.search(r"^# (.+)$", text, re.M), re.search(r"\*\*Claim: (.+?)\*\*", text, re.S)
        if not (title and claim):
            raise ValueError(f"{source.name} has no title, or no claim")
        said = " ".join(claim[1].split())
        lines.append(f"| [{title[1]}](notebooks/{source.stem}.ipynb) | {said[0].upper()}{said[1:]} |")
    return "\n".join(lines)


def files(floors: dict[str, int]) -> str:
    """The modules as Markdown, floor by floor."""
    lines = []
    every = [p for p in sorted((ROOT / "edgelab").rglob("*.py")) if "_data" not in p.parts]
    told = [p for p in every if p.stat().st_size]  # an empty __init__.py makes a folder a package, and says nothing
    for level, title in enumerate(TITLES):
        mine = [p for p in told if floors.get(p.relative_to(ROOT / "edgelab").parts[0].removesuffix(".py")) == level]
        lines += ["", f"**{title}**", ""] + [f"- `{p.relative_to(ROOT / 'edgelab')}`: {first_sentence(p)}" for p in mine]
    door = ROOT / "edgelab" / "__init__.py"
    return "\n".join([f"- `__init__.py`: {first_sentence(door)}", *lines])


def renewed(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of `name`; raises ValueError when they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md needs {begin} and {end}, each once")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def main() -> int:
    spec = importlib.util.spec_from_file_location("test_project", ROOT / "tests" / "test_project.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = renewed(renewed(text, "lessons", lessons()), "files", files(module.FLOOR))
    if "--write" in sys.argv[1:]:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(new, encoding="utf-8")
        temporary.replace(path)
        return 0
    if new != text:
        print("README.md: its lists of lessons and files are not what these say; python .ci/readme.py --write renews it")
    return int(new != text)


if __name__ == "__main__":
    raise SystemExit(main())
