"""JupyterLab in Chromium, offline, for the tests and the measurement of the explorer."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the page notes of its plot: when a control was touched, when plotly had drawn, and when that was on the screen
WATCH = """
window.seen = {touched: null, drawn: [], gd: null};
for (const kind of ['input', 'change', 'keydown', 'pointerdown'])
    document.addEventListener(kind, () => { window.seen.touched = performance.now(); }, true);
window.plots = () => [...document.querySelectorAll('.js-plotly-plot')].filter(gd => gd._fullLayout && gd.querySelector('.main-svg'));
window.plotTimes = [];
setInterval(() => { while (window.plotTimes.length < window.plots().length) window.plotTimes.push(performance.now()); }, 10);
window.watchPlot = () => {
    const gd = window.plots().at(-1);
    if (!gd || gd.data.length < 10) return false;
    if (window.seen.gd === gd) return true;
    window.seen.gd = gd;
    gd.on('plotly_afterplot', () => requestAnimationFrame(() => requestAnimationFrame(() => window.seen.drawn.push(performance.now()))));
    return true;
};
"""


def chromium() -> str | None:
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def missing() -> str:
    """Why there can be no JupyterLab in a browser here, "" where there can."""
    for module in ("playwright", "jupyterlab", "nbformat"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return "" if chromium() else "no Chromium or Chrome on the PATH"


@contextlib.contextmanager
def lab(folder: Path, *cells: str, width: int = 1280, height: int = 1000, dark: bool = False) -> Iterator[tuple]:
    """A notebook of `cells`, opened in JupyterLab and run: (the tab, requests that would have left this machine; they were aborted)."""
    import nbformat
    from playwright.sync_api import Error, sync_playwright

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=list(map(nbformat.v4.new_code_cell, cells))), folder / "explorer.ipynb")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    places = {f"JUPYTER_{what}_DIR": str(folder / what.lower()) for what in ("CONFIG", "RUNTIME")} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    theme = folder / "settings" / "@jupyterlab" / "apputils-extension"
    theme.mkdir(parents=True, exist_ok=True)
    (theme / "themes.jupyterlab-settings").write_text('{"theme": "JupyterLab %s"}' % ("Dark" if dark else "Light"), encoding="utf-8")
    (theme / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places | {"PYTHONPATH": path}, cwd=folder)
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--no-proxy-server"])
            context = browser.new_context(viewport={"width": width, "height": height})
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            tab, left = context.new_page(), []
            here = (f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "data:", "blob:")

            def gate(route) -> None:
                if route.request.url.startswith(here):
                    route.continue_()
                else:
                    left.append(route.request.url)
                    route.abort()

            tab.route("**/*", gate)
            for _ in range(240):
                with contextlib.suppress(Error):
                    tab.goto(f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb")
                    break
                time.sleep(0.5)
            ready = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
            tab.wait_for_function(ready, timeout=300_000)
            tab.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
            tab.evaluate(WATCH)
            tab.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
            tab.wait_for_function("window.watchPlot()", timeout=600_000)
            yield tab, left
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
