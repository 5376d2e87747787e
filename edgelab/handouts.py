"""A notebook as one HTML file that opens from a disk without a network, and that prints: what a reader in the back row gets.

nbconvert's own templates load MathJax and require.js from servers on the internet when the page is opened, so that a handout shows
grey boxes in a room without a network. Only its cells are taken here (template "basic"), in a page of our own: styles inlined, no script at
all, pictures as the SVG that our figures carry beside the interactive one, folded solutions folded by HTML itself. `external_loads`
(`edgelab.page`) has to find nothing in the result, or it is not written.
"""

import os
import re
from html import escape
from pathlib import Path

from edgelab.page import external_loads

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #55606e; --line: #d5dae1; --paper: #fff; --raised: #f5f7f9; --link: #0072B2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #a3aebb; --line: #3a4450; --paper: #14181d; --raised: #1d232a; --link: #56B4E9 }
}
body { margin: 0 auto; max-width: 56rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink); line-height: 1.55;
       font-family: system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.4rem } h3 { font-size: 1.05rem } a { color: var(--link) }
a.anchor-link { display: none }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; font-size: .82rem; line-height: 1.45 }
.highlight { background: var(--raised); border-left: 3px solid var(--line); padding: .3rem .8rem; border-radius: 4px }
.output_area { margin: .4rem 0 1rem; overflow-x: auto } .output_area svg, .output_area img { max-width: 100%; height: auto }
.output_stderr { display: none }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
details { margin: .5rem 0; padding: .2rem .8rem; border-left: 3px solid var(--line) } summary { cursor: pointer }
@media print { body { max-width: none; padding: 0 } .highlight, tr, svg { break-inside: avoid } a { color: inherit } }
"""
_FIRST = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]  # and no script of any kind


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML document around `body`: no script, nothing loaded. Raises ValueError naming what it would load."""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}{style}</style></head>\n<body><main>\n{body}\n'
        "</main></body></html>\n"
    )
    if found := external_loads(text):
        raise ValueError(f"the page {title!r} would load {found[0]!r} when it is opened; a handout loads nothing")
    if re.search(r"<(script|iframe|object|embed)\b", text, flags=re.I):
        raise ValueError(f"the page {title!r} holds a script or a frame; a handout is text and pictures")
    return text


def of_markdown(title: str, text: str) -> str:
    """The page of a text in Markdown (tables allowed).

    >>> "<h1>Plan</h1>" in of_markdown("Plan", "# Plan\\n\\n| a |\\n|---|\\n| 1 |\\n")
    True
    """
    from markdown_it import MarkdownIt

    return page(title, MarkdownIt("commonmark").enable("table").render(text))


def of_notebook(path: str | Path, exercises: str = "exercises") -> str:
    """The page of a notebook as it is stored, outputs and all. Links to other lessons lead to their handouts, those
    to a server that ran beside the notebook lead nowhere any more and become words.

    `exercises`: where the folder of the exercise notebooks lies, seen from the page. Raises ValueError for what would load something.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    from traitlets.config import Config

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for out in cell.get("outputs", []):
            if "data" in out:  # what is interactive has a still picture beside it, or nothing to show here
                out["data"] = {k: v for k, v in out["data"].items() if k in _FIRST}
                if "image/svg+xml" in out["data"]:
                    out["data"].pop("text/html", None)
        if "outputs" in cell:
            cell["outputs"] = [out for out in cell["outputs"] if out.get("data", True)]
    settings = {
        "NbConvertBase": {"display_data_priority": _FIRST},
        "HTMLExporter": {"template_name": "basic", "exclude_input_prompt": True, "exclude_output_prompt": True},
    }
    body, _ = HTMLExporter(config=Config(settings)).from_notebook_node(notebook)
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.S | re.I)
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.S | re.I)
    body = re.sub(r"<iframe\b.*?</iframe>", "<p><i>(A page that was open here while the notebook ran.)</i></p>", body, flags=re.S | re.I)
    body = re.sub(r'<a\b[^>]*href="https?://(?:127\.0\.0\.1|localhost)[^"]*"[^>]*>(.*?)</a>', _unlinked, body, flags=re.S | re.I)
    body = re.sub(r'href="exercises/([^"]+)"', lambda m: f'href="{exercises}/{m[1]}"', body)
    body = re.sub(r'href="(\d\d_[a-z0-9_]+)\.ipynb(#[^"]*)?"', lambda m: f'href="{m[1]}.html{m[2] or ""}"', body)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    colours = f"{_code(light)}\n@media (prefers-color-scheme: dark) {{ {_code(dark)} }}\n"
    return page(_title(notebook, path.stem), body, colours)


def _unlinked(link: re.Match) -> str:
    """The words of a link to a server that ran beside the notebook; its address means nothing any more."""
    return re.sub(r"https?://(?:127\.0\.0\.1|localhost)[^\s<]*", "an address of that kernel's own", link[1])


def _code(styles: str) -> str:
    """Pygments' colours without its backgrounds: the page has its own."""
    return re.sub(r"background(-color)?:[^;}]+;?", "", styles)


def _title(notebook, otherwise: str) -> str:
    heads = (c.source.splitlines()[0] for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("# "))
    return next(heads, f"# {otherwise}").removeprefix("# ")


def write(path: Path, text: str) -> Path:
    """`path`, written to a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
