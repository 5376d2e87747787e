"""A real JupyterLab in a real Chromium, for tests that operate a notebook's widgets as a person does.

Three parts. `cut` takes out of a notebook what one widget needs (a backward slice over statements, so that lesson text, plots and
checks don't run again: other tests run the whole). `Lab` is one server, on localhost, and one browser that can't resolve any other
name; it counts every request that is meant for elsewhere. `Opened` is a notebook in it: what its controls are called, what its sentence
and table say, what its plot was given, and the Tab key on its way from control to control.
"""

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "notebooks" / "src"
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
WIDGET = re.compile(r"(Control|Chat|Explorer|Capstone|Builder)$")  # what a class of the package that is operated is called
EXERCISES = {"exercise", "exercise-setup", "stub", "check", "hint", "expected", "solution", "why", "mutant"}
EMPTY = "import ipywidgets\n\nipywidgets.Widget.close_all()\nget_ipython().run_line_magic('reset', '-f')"
PATIENCE_MS = 120_000  # for what a busy machine of two cores may take


def why_not() -> str | None:
    """What a browser test lacks here, in words; None where nothing is missing."""
    if importlib.util.find_spec("playwright") is None:
        return "the driver (pip install 'edgelab[test]') is not installed"
    if CHROMIUM is None:
        return "no Chromium or Chrome on the PATH (Debian and Ubuntu: apt install chromium)"
    if importlib.util.find_spec("jupyterlab") is None:
        return "no JupyterLab (pip install 'edgelab[notebooks]')"
    return None


# --------------------------------------------------------------------------------------------------- a part of a notebook


@dataclass(frozen=True)
class _Names:
    """What a statement reads, what it binds for good (whatever was there before), and what it may change."""

    reads: frozenset[str]
    binds: frozenset[str]
    changes: frozenset[str]


def _names(statement: ast.stmt) -> _Names:
    nodes = list(ast.walk(statement))
    inner = {n.id for c in nodes if isinstance(c, ast.comprehension) for n in ast.walk(c.target) if isinstance(n, ast.Name)}
    reads, stores, changes = set(), set(), set()
    for node in nodes:
        match node:
            case ast.Name(id=name) if name in inner:
                pass  # a comprehension's own
            case ast.Name(id=name, ctx=ast.Load()):
                reads.add(name)
            case ast.Name(id=name):
                stores.add(name)
            case ast.alias(name=name, asname=asname):
                stores.add(asname or name.partition(".")[0])
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                stores.add(name)
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store()) | ast.Subscript(value=ast.Name(id=name), ctx=ast.Store()):
                changes.add(name)
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
            changes.add(name)  # out.mkdir(), rows.append()
        case ast.For() | ast.If() | ast.With() | ast.Try() | ast.While():
            changes, stores = changes | stores, set()  # perhaps never reached
        case ast.AugAssign(target=ast.Name(id=name)):
            changes.add(name)
    return _Names(frozenset(reads), frozenset(stores - changes), frozenset(changes))


def widgets_of(notebook: NotebookNode) -> dict[str, int]:
    """{class of a widget: position of the first cell that shows it} of a notebook. A cell shows what its last expression is, or what it
    hands to `display`."""
    found, made = {}, {}
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or EXERCISES & set(cell.metadata.get("tags", [])):
            continue
        for statement in ast.parse(cell.source).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    made[name] = _called(value) if isinstance(value, ast.Call) else None
                case ast.Expr(value=ast.Name(id=shown)) | ast.Expr(value=ast.Call(func=ast.Name(id="display"), args=[ast.Name(id=shown)])):
                    if made.get(shown):
                        found.setdefault(made[shown], position)
                case ast.Expr(value=ast.Call() as call) if name := _called(call):
                    found.setdefault(name, position)
    return found


def _called(call: ast.Call) -> str | None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name if WIDGET.search(name) else None


def cut(notebook: NotebookNode, widget: str, instead: Mapping[str, str] = {}) -> NotebookNode:
    """The cells of `notebook` up to the one that shows `widget`, with only those statements that it needs.

    `instead` {name: source of an expression} stands in for what the notebook assigns to a name, as papermill's parameters do.
    KeyError for a widget or a name that the notebook does not have.

    >>> n = nbformat.v4.new_notebook()
    >>> n.cells = [nbformat.v4.new_code_cell(s) for s in ("import math\\nn = 9\\nprint(n)", "m = 4", "c = aControl(n)\\nc")]
    >>> [cell.source for cell in cut(n, "aControl", {"n": "3"}).cells]
    ['n = 3', 'c = aControl(n)\\nc']
    """
    last = widgets_of(notebook)[widget]
    cells = [c for c in notebook.cells[: last + 1] if c.cell_type == "code" and not EXERCISES & set(c.metadata.get("tags", []))]
    *before, shown = cells
    wanted, kept, used = set(), [shown.source], set()
    for statement in reversed(ast.parse(shown.source).body):
        names = _names(statement)
        wanted = wanted - names.binds | names.reads
    for cell in reversed(before):
        lines = []
        for statement in reversed(ast.parse(cell.source).body):
            names = _names(statement)
            imported = isinstance(statement, ast.Import | ast.ImportFrom)
            if not (wanted & (names.binds | names.changes) or (imported and _for_its_effect(cell.source, statement))):
                continue
            source = ast.get_source_segment(cell.source, statement)
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)]) if name in instead:
                    source, names = f"{name} = {instead[name]}", _names(ast.parse(f"{name} = {instead[name]}").body[0])
                    used.add(name)
            wanted = wanted - names.binds | names.reads
            lines.insert(0, source)
        if lines:
            kept.insert(0, "\n".join(lines))
    if missing := set(instead) - used:
        raise KeyError(f"{widget} needs nothing of the names {', '.join(sorted(missing))}")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(s) for s in kept])


def _for_its_effect(source: str, statement: ast.stmt) -> bool:
    """Whether an import stands there for what it does, as its `noqa: F401` says."""
    return "noqa: F401" in source.splitlines()[statement.lineno - 1]


def read(name: str) -> NotebookNode:
    """The notebook whose source's name begins with `name`, as its source says, not executed."""
    (source,) = SOURCES.glob(f"{name}*.py")
    return jupytext.read(source, fmt="py:percent")


# ------------------------------------------------------------------------------------------------------ Lab and a browser


@dataclass
class Lab:
    """A server, a tab of a browser, and what was asked of other machines (`left`) or went wrong in a script (`errors`) since it began."""

    folder: Path
    port: int
    tab: object
    kernel: str | None = None
    left: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def here(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def open(self, notebook: NotebookNode, name: str) -> "Opened":
        """`notebook` in the tab under that name, run from top to bottom; AssertionError with the cell's words where one fails.

        All notebooks share a kernel, emptied in between: what they import is imported once.
        """
        path = f"notebooks/{name}.ipynb"
        (self.folder / "notebooks").mkdir(exist_ok=True)
        nbformat.write(notebook, self.folder / path)
        self.tab.evaluate(
            "([path, id]) => { window.jupyterapp.commands.execute('docmanager:open', {path, kernel: id ? {id} : undefined}) }",
            [path, self.kernel],
        )
        ready = (
            "path => { const p = window.jupyterapp.shell.currentWidget, k = p?.sessionContext?.session?.kernel;"
            " return p?.context?.path === path && k?.status === 'idle' && k.id }"
        )
        self.kernel = self.tab.wait_for_function(ready, arg=path).json_value()
        self.tab.evaluate(
            "window.ran = false; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = true); null"
        )
        self.tab.wait_for_function("window.ran", timeout=3 * PATIENCE_MS)
        opened = Opened(self, self.tab.locator(".jp-NotebookPanel:visible"))
        assert (errors := opened.cell_errors()) == [], f"{name} does not run: {errors}"
        return opened

    def close(self) -> None:
        """Closes every notebook, without asking, after its kernel has let go of all widgets and names: the next one would find them."""
        self.tab.evaluate(
            "async code => { for (const w of [...window.jupyterapp.shell.widgets('main')]) if (w.context) {"
            " await w.sessionContext?.session?.kernel?.requestExecute({code, silent: true}).done;"
            " await w.context.save(); w.dispose(); } }",
            EMPTY,
        )

    def look(self, theme: str, width: int) -> None:
        """The tab so many pixels wide, in the theme "light" or "dark"."""
        self.tab.set_viewport_size({"width": width, "height": 1000})
        name = f"JupyterLab {theme.title()}"
        self.tab.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        self.tab.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=name, timeout=PATIENCE_MS)


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A JupyterLab whose files are in `folder`, open in Chromium, and both ended at the end."""
    from playwright import sync_api as playwright

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    places = {f"JUPYTER_{what}_DIR": str(folder / what.lower()) for what in ("CONFIG", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    places |= {"JUPYTER_PREFER_ENV_PATH": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # one: threads that wait for each other stall
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places | {"PYTHONPATH": path}, cwd=folder)
    try:
        with playwright.sync_playwright() as p:
            walled = ["--no-sandbox", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
            browser = p.chromium.launch(executable_path=CHROMIUM, args=walled)
            context = browser.new_context(viewport={"width": 1280, "height": 1000})
            tab = context.new_page()
            tab.set_default_timeout(PATIENCE_MS)
            tab.set_default_navigation_timeout(PATIENCE_MS)
            it = Lab(folder, port, tab)
            local = (it.here, it.here.replace("http", "ws", 1), "data:", "blob:")
            context.on("request", lambda request: None if request.url.startswith(local) else it.left.append(request.url))
            tab.on("websocket", lambda socket: None if socket.url.startswith(local) else it.left.append(socket.url))
            tab.on("pageerror", lambda error: it.errors.append(str(error)))
            tab.on("console", lambda said: it.errors.append(said.text) if said.type == "error" else None)
            for _ in range(240):
                with contextlib.suppress(playwright.Error):
                    tab.goto(it.here + "lab")
                    break
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.5)
            tab.wait_for_function("window.jupyterapp?.shell.layoutModified && window.jupyterapp.restored.then(() => true)")
            tab.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
            yield it
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


@dataclass
class Opened:
    """A notebook in the tab. `view` is what the last cell with a widget shows."""

    lab: Lab
    panel: object

    @property
    def tab(self):
        return self.lab.tab

    @property
    def view(self):
        return self.panel.locator(".jp-OutputArea-output:has(.jupyter-widgets)").last

    def cell_errors(self) -> list[str]:
        """What cells say went wrong. (Not all of stderr: a slow machine has the kernel complain of its own pipes there.)"""
        cells = self.tab.evaluate("window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
        outputs = [out for cell in cells for out in cell.get("outputs", [])]
        found = [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]
        told = ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]
        return found + [text for text in told if "Traceback" in text or "Error" in text]

    def alerts(self) -> list[str]:
        return self.view.locator("[role=alert]").all_inner_texts()

    def sentence(self) -> str:
        return " ".join(self.view.locator("[aria-live]").first.inner_text().split())

    def rows(self) -> list[list[str]]:
        """The cells of the first table, row by row."""
        return self.view.locator("table").first.evaluate("t => [...t.rows].map(r => [...r.cells].map(c => c.innerText.trim()))")

    def drawn(self, ready: Callable[[list[dict]], bool] = bool) -> list[dict]:
        """The traces that plotly holds, what is on the page and not what Python thinks is there, as soon as they are `ready`."""
        plot = self.view.locator(".js-plotly-plot:has(.main-svg)").first
        plot.wait_for(state="attached")
        until = time.monotonic() + PATIENCE_MS / 1e3
        while True:
            traces = plot.evaluate("d => JSON.parse(JSON.stringify(d.data ?? [], (_, v) => ArrayBuffer.isView(v) ? [...v] : v))")
            if traces and ready(traces):
                return traces
            assert time.monotonic() < until, f"the plot is not what it should become; it holds {str(traces)[:2000]}"
            self.tab.wait_for_timeout(100)

    def controls(self) -> list[tuple[str, str]]:
        """(role, accessible name) of all that takes the focus, in order, as the browser tells a screen reader; the items of lists aside."""
        self.view.evaluate("e => { window.underTest = e }")
        talk = self.tab.context.new_cdp_session(self.tab)
        try:
            handle = talk.send("Runtime.evaluate", {"expression": "window.underTest"})["result"]["objectId"]
            nodes = talk.send("Accessibility.queryAXTree", {"objectId": handle})["nodes"]
        finally:
            talk.detach()
        focusable = [n for n in nodes if "focusable" in {p["name"] for p in n.get("properties", [])}]
        found = [(n["role"]["value"], " ".join(n.get("name", {}).get("value", "").split())) for n in focusable]
        return [(role, name) for role, name in found if role != "option"]

    def control(self, role: str, name: str):
        """The control that a screen reader would find under that role and name."""
        return self.view.get_by_role(role, name=name, exact=True)

    # -------------------------------------------------------------------------------------------------------- by keyboard

    def tab_to(self, control) -> None:
        """Presses Tab until `control` has the focus, from the cell if the focus is nowhere in the notebook; it must be seen there."""
        if not self.panel.evaluate("p => p.contains(document.activeElement)"):
            self.panel.locator(".jp-Cell").last.focus()  # where running it left the reader
        look = "e => { const s = getComputedStyle(e); return [s.outlineStyle, s.outlineWidth, s.outlineColor, s.boxShadow].join() }"
        for _ in range(150):  # once round the whole page
            if control.evaluate("e => e === document.activeElement"):
                focused = control.evaluate(look)
                break
            self.tab.keyboard.press("Tab")
        else:
            raise AssertionError(f"Tab never reaches {control}")
        assert not focused.startswith("none"), f"{control} has the focus and does not show it: {focused}"

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def write(self, text: str) -> None:
        """Types `text` over what the focused box holds, and Enter."""
        self.press("Control+a")
        self.tab.keyboard.type(text)
        self.press("Enter")

    # ----------------------------------------------------------------------------------------------------------- by mouse

    def spin(self, box, up: bool = True) -> None:
        """A click on one of the two arrows of a number box."""
        box.scroll_into_view_if_needed()
        box.hover()  # they are there only then
        size = box.bounding_box()
        self.tab.mouse.click(size["x"] + size["width"] - 9, size["y"] + size["height"] * (0.25 if up else 0.75))

    def slide(self, name: str, share: float) -> None:
        """Drags the handle of the slider `name` to that share of its way."""
        handle = self.control("slider", name)
        handle.scroll_into_view_if_needed()
        way = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]").bounding_box()
        at = handle.bounding_box()
        self.tab.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
        self.tab.mouse.down()
        self.tab.mouse.move(way["x"] + share * way["width"], at["y"] + at["height"] / 2, steps=5)
        self.tab.mouse.up()

    # ------------------------------------------------------------------------------------------------------------ waiting

    def until(self, *texts: str, selector: str = "[aria-live]") -> str:
        """The sentence (or what else `selector` finds) that holds all of `texts`, as soon as one does."""
        done = (
            "([selector, texts, view]) => [...view.querySelectorAll(selector)].map(e => e.innerText.split(/\\s+/).join(' '))"
            ".find(t => texts.every(x => t.includes(x)))"
        )
        from playwright.sync_api import TimeoutError

        try:
            return self.tab.wait_for_function(done, arg=[selector, texts, self.view.element_handle()], timeout=PATIENCE_MS).json_value()
        except TimeoutError:
            raise AssertionError(f"waited for {texts}; there is {self.view.locator(selector).all_inner_texts()}") from None

    def another(self, sentence: str) -> str:
        """The sentence as soon as it is another one than that, and no error."""
        until = time.monotonic() + PATIENCE_MS / 1e3
        while (now := self.sentence()) == sentence:
            assert time.monotonic() < until, f"nothing changed; it still says {sentence}"
            self.tab.wait_for_timeout(100)
        return now

    def cut_off(self) -> list[str]:
        """What sticks out of the cell to the right (controls, sentence, plot, tables that can't be scrolled), and labels that are cut."""
        return self.view.evaluate(
            "v => { const right = v.closest('.jp-OutputArea-child, .jp-OutputArea').getBoundingClientRect().right + 1;"
            " const scrolls = e => { for (; e && e !== v; e = e.parentElement)"
            " if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; return false };"
            " const out = e => e.getBoundingClientRect().right > right && !scrolls(e.parentElement) && !e.closest('.modebar');"
            " const short = e => e.matches('.widget-label') && e.scrollWidth > e.clientWidth + 1;"
            " return [...v.querySelectorAll('select, input, button, p, table, .main-svg, [role=slider], .widget-label')]"
            " .filter(e => e.offsetParent !== null).filter(e => out(e) || short(e))"
            " .map(e => e.outerHTML.slice(0, 80)) }"
        )
