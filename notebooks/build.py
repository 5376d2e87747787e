"""Make the notebooks: sources in `notebooks/src/*.py` (py:percent) -> executed `notebooks/*.ipynb`.

    python notebooks/build.py                 write and execute all
    python notebooks/build.py 00 01           those whose names begin so
    python notebooks/build.py --check         write nothing: compare cells with the sources, and execute a copy

A notebook is accepted if every cell ran, no widget holds a traceback (an exception inside `interact` or `Output` does
not stop a kernel, so it would pass unseen), and the file stays below 200 kB. Widget state is taken out when it is large
(one plotly FigureWidget carries 5 MB of JavaScript); what remains are the static outputs, which a code host can show.
Cell ids depend on the name and the position alone, and no time of day is recorded, so that a rebuild changes
only what a cell printed.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
MAX_BYTES = 200_000
MAX_WIDGET_BYTES = 20_000
CELL_TIMEOUT_S = 600
_STATE, _VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
_KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
# Progress bars are for the reader's run, not for the stored one; a course never goes to the network.
_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers asks this one before it shows "Loading weights"
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PREFER_ENV_PATH": "1",
}


def generate(source: Path) -> NotebookNode:
    """The notebook of one py:percent source: not executed, with ids that depend on name and position alone."""
    notebook = jupytext.read(source, fmt="py:percent")
    for position, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha256(f"{source.stem}/{position}".encode()).hexdigest()[:8]
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """`notebook` after its cells ran top to bottom in `folder`; raises CellExecutionError at the first that fails."""
    before = {k: os.environ.get(k) for k in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        client = NotebookClient(
            notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, record_timing=False
        )
        client.execute()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    notebook.metadata["kernelspec"] = nbformat.from_dict(_KERNEL)
    notebook.metadata.get("language_info", {}).pop("version", None)  # a patch release of Python is no change of the notebook
    return notebook


def hidden_errors(notebook: NotebookNode) -> list[str]:
    """The errors that no cell raised: tracebacks kept in outputs, or in the saved state of an Output widget."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    state = notebook.metadata.get("widgets", {}).get(_STATE, {}).get("state", {})
    for model in state.values():
        outputs += model.get("state", {}).get("outputs") or []
    return [f"{out.get('ename')}: {out.get('evalue')}" for out in outputs if out.get("output_type") == "error"]


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
    if not target.exists():
        return [f"{target.name} is not there"]
    want, have = generate(source).cells, nbformat.read(target, as_version=4).cells
    wrong = [] if len(want) == len(have) else [f"{target.name} has {len(have)} cells, its source {len(want)}"]
    for i, (w, h) in enumerate(zip(want, have, strict=False)):
        if (w.cell_type, w.source, w.id) != (h.cell_type, h.source, h.id):
            wrong.append(f"{target.name}, cell {i}: not what {source.name} says")
    return wrong


def chosen(prefixes: list[str], folder: Path = HERE) -> list[Path]:
    """The sources whose names begin with one of `prefixes` (all for none); raises ValueError for a prefix without any."""
    sources = sorted((folder / "src").glob("*.py"))
    for prefix in prefixes:
        if not any(s.name.startswith(prefix) for s in sources):
            raise ValueError(f"no notebook begins with {prefix!r}; there are {', '.join(s.stem for s in sources) or 'none'}")
    return [s for s in sources if not prefixes or s.name.startswith(tuple(prefixes))]


def build(source: Path, folder: Path = HERE) -> Path:
    """The path of the notebook of `source`, executed and written, whole or not at all."""
    target = folder / f"{source.stem}.ipynb"
    text = accept(execute(generate(source), folder), target.name)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", encoding="utf-8", delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, target)
    return target


def check(source: Path, folder: Path = HERE) -> list[str]:
    """What is wrong with the stored notebook of `source`; empty if it is in step, below the size and runs."""
    target = folder / f"{source.stem}.ipynb"
    wrong = differences(source, target)
    if target.exists():
        if target.stat().st_size > MAX_BYTES:
            wrong.append(f"{target.name} has {target.stat().st_size} bytes, {MAX_BYTES} are allowed")
        wrong += [f"{target.name} holds an error: {e}" for e in hidden_errors(nbformat.read(target, as_version=4))]
    try:
        accept(execute(generate(source), folder), target.name)
    except (CellExecutionError, ValueError) as error:
        wrong.append(f"{source.name} does not run: {error}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/build.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 00 (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook is out of step or fails")
    args = parser.parse_args(argv)
    try:
        sources = chosen(args.names)
    except ValueError as error:
        parser.error(str(error))
    wrong = []
    if not args.names:
        known = {s.stem for s in sources}
        wrong += [f"{t.name} has no source in src/" for t in sorted(HERE.glob("*.ipynb")) if t.stem not in known]
    for source in (bar := tqdm(sources, unit="notebook")):
        bar.set_description(source.stem)
        if args.check:
            wrong += check(source)
        else:
            try:
                build(source)
            except (CellExecutionError, ValueError) as error:
                wrong.append(f"{source.name}: {error}")
    print("\n".join(wrong) or f"{len(sources)} notebooks {'are in step and run' if args.check else 'written'}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
