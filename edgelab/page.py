"""The HTML report: one file that opens from a disk, without a network, light or dark, with or without JavaScript.

plotly.js is inlined once. Each plot is a drawing (SVG, from `svg.py`) that the script replaces with the interactive
figure; beside it stands a sentence in words, and every number is in a table with its interval. Nothing is loaded
from anywhere: `external_loads` finds what would be.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from edgelab import words
from edgelab.report import Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #55606e; --line: #d5dae1; --paper: #fff; --raised: #f5f7f9; --link: #0072B2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #a3aebb; --line: #3a4450; --paper: #14181d; --raised: #1d232a; --link: #56B4E9 }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink); line-height: 1.55;
       font-family: system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p { max-width: 46rem } .soft, figcaption { color: var(--soft) } a { color: var(--link) }
.scroll { overflow-x: auto; margin: .6rem 0 1.4rem } .scroll:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; min-width: 60% }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.num, th.num { text-align: right } thead th { border-bottom: 2px solid var(--line) } tbody th { font-weight: 500 }
figure { margin: 1.2rem 0 2rem } .plot svg { max-width: 100%; height: auto } figcaption { font-size: .92rem; max-width: 46rem }
pre { background: var(--raised); padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; border-radius: 4px }
details summary { cursor: pointer; margin: .6rem 0 }
@media print { .plot .modebar { display: none } body { max-width: none } }
"""

# draws each figure over its SVG, and redraws the ink when the reader switches between light and dark
_SCRIPT = """
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const ink = () => ({ "font.color": getComputedStyle(document.body).getPropertyValue("--soft").trim() });
  const plots = [...document.querySelectorAll(".plot")];
  for (const div of plots) {
    const fig = JSON.parse(div.nextElementSibling.textContent);
    div.replaceChildren();
    Plotly.newPlot(div, fig.data, fig.layout, { responsive: true, displaylogo: false, showSendToCloud: false })
      .then(() => Plotly.relayout(div, ink()));
  }
  dark.addEventListener("change", () => plots.forEach(div => Plotly.relayout(div, ink())));
})();
"""


@dataclass(frozen=True)
class Table:
    """A table as data: `caption`, column names, rows of text. `numeric`: the columns that align right; `folded`: shown on demand."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[str, ...] = ()
    folded: bool = False

    def html(self) -> str:
        def cell(tag: str, column: str, text: str, extra: str = "") -> str:
            number = " class=num" if column in self.numeric else ""
            return f"<{tag}{extra}{number}>{escape(text)}</{tag}>"

        head = "".join(cell("th", c, c, ' scope="col"') for c in self.columns)
        body = "".join(
            "<tr>"
            + cell("th", self.columns[0], r[0], ' scope="row"')
            + "".join(cell("td", c, v) for c, v in zip(self.columns[1:], r[1:], strict=True))
            + "</tr>"
            for r in self.rows
        )
        label = escape(self.caption, quote=True)
        table = f"<table><caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        whole = f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'
        return _folded(f"{self.caption} ({len(self.rows)} rows)", whole) if self.folded else whole


def _folded(summary: str, html: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


@dataclass(frozen=True)
class Plot:
    """A plotly figure and the sentence that says the same."""

    figure: object
    sentence: str

    def html(self, name: str) -> str:
        from edgelab.svg import to_svg

        data = self.figure.to_json().replace("</", "<\\/")
        return (
            f'<figure aria-labelledby="{name}-words"><div class="plot" id="{name}">{to_svg(self.figure, describe=self.sentence)}</div>'
            f'<script type="application/json">{data}</script><figcaption id="{name}-words">{escape(self.sentence)}</figcaption></figure>'
        )


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: text, `Table`s, `Plot`s, or (summary, code) pairs."""

    title: str
    parts: tuple[object, ...]


def report_table(report: Report, caption: str = f"All measurements, with 95 % intervals in brackets: {words.INTERVALS}") -> Table:
    models = report.models()
    rows = tuple((line["metric"], line["on"], *(line.get(m, "") for m in models)) for line in words.table(report))
    return Table(caption, ("metric", "on", *models), rows, tuple(models))


def coverage_table(coverage, caption: str = "Coverage audit by role: how much is in low bits, and the bytes it takes") -> Table:
    lines = coverage.table()
    columns = tuple(lines[0])
    return Table(caption, columns, tuple(tuple(line.values()) for line in lines), columns[1:])


def tensors_table(coverage, caption: str = "Every stored tensor, what it became, and its bytes") -> Table:
    rows = tuple(
        (
            r.name,
            r.role,
            " x ".join(map(str, r.shape)),
            f"{r.parameters:,}",
            r.scheme,
            "yes" if r.touched else "no",
            f"{r.predicted_bytes:,}",
        )
        for r in coverage.rows
    )
    columns = ("tensor", "role", "shape", "parameters", "stored as", "in low bits", "bytes")
    return Table(caption, columns, rows, ("parameters", "bytes"), folded=True)


def facts_table(caption: str, facts: dict[str, object]) -> Table:
    return Table(caption, ("what", "value"), tuple((k, str(v)) for k, v in facts.items()))


def plots_of(report: Report, coverage=None) -> list[Plot]:
    """The standard figures that `report` (and the audit) has the rows for, each with its sentence."""
    from edgelab import plots

    have = {r.metric for r in report}
    made = []
    if {"weight_bytes", "bits_per_byte"} <= have:
        made.append(Plot(plots.size_against(report), words.say_size(report)))
    made += [
        Plot(plots.by_domain(report, name), words.say_by_domain(report, name))
        for name in ("kld", "exact_match", "same_top", "router_overlap")
        if name in have and any(r.value for r in report.where(metric=name))
    ]
    if coverage is not None and coverage.rows:
        made.append(Plot(plots.layer_bytes(coverage), plots.say_layer_bytes(coverage)))
    return made


def standard_sections(
    report: Report,
    *,
    coverage=None,
    recipes: dict[str, object] | None = None,
    facts: dict[str, object] | None = None,
    beside: str = "",
) -> list[Section]:
    """The sections of the report that `edgelab demo` and `edgelab evaluate` write; `beside` stands below the first table."""
    metrics = [words.METRICS[m] for m in words.METRICS if report.where(metric=m).rows]
    meaning = Table("What the metrics mean", ("metric", "better", "meaning"), tuple((m.title, m.better, m.meaning) for m in metrics))
    sections = [Section("The figures", (report_table(report), *([beside] if beside else []), meaning))]
    figures = plots_of(report, coverage)
    if figures:
        sections.append(Section("The same in pictures", tuple(figures)))
    if coverage is not None:
        sections.append(Section("Coverage audit", (words.say_coverage(coverage), coverage_table(coverage), tensors_table(coverage))))
    if recipes:
        codes = tuple((f"{name}: recipe {recipe.digest}, as JSON", recipe.to_json()) for name, recipe in recipes.items())
        sections.append(Section("Recipes", codes))
    notes: dict[tuple[str, str], list[str]] = {}
    for r in report:
        if r.note:
            notes.setdefault((words.metric(r.metric).title, r.note), []).append(r.model)
    if notes:
        rows = tuple((title, ", ".join(dict.fromkeys(of)), note) for (title, note), of in notes.items())
        sections.append(
            Section("Notes to the measurements", (Table("How each was measured", ("metric", "model", "note"), rows, folded=True),))
        )
    if facts:
        sections.append(Section("Where this was measured", (facts_table("Machine, text and versions", facts),)))
    return sections


def render(title: str, lead: str, sections: Iterable[Section]) -> str:
    """The whole page as text: one self-contained HTML document."""
    import plotly.offline

    body, number = [], 0
    for section in sections:
        body.append(f"<section><h2>{escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Plot):
                number += 1
                body.append(part.html(f"plot-{number}"))
            elif isinstance(part, Table):
                body.append(part.html())
            elif isinstance(part, tuple):
                body.append(_folded(part[0], f"<pre>{escape(part[1])}</pre>"))
            else:
                body.append(f"<p>{escape(str(part))}</p>")
        body.append("</section>")
    scripts = f"<script>{plotly.offline.get_plotlyjs()}</script><script>{_SCRIPT}</script>" if number else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>'
        f'<p class="soft">{escape(lead)}</p>\n' + "\n".join(body) + f"</main>\n{scripts}</body></html>\n"
    )


def write(path: str | Path, title: str, lead: str, sections: Iterable[Section]) -> Path:
    """Write the page (to a temporary name, then renamed) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(render(title, lead, sections), encoding="utf-8")
    temporary.replace(path)
    return path


def external_loads(html: str) -> list[str]:
    """What the page would fetch when it is opened: every src, link href, CSS url() and @import that is not data: or a fragment.

    Scripts are code, not markup, so their bodies are left out; that plotly.js itself fetches nothing for the figures
    made here is what `tests/test_page_browser.py` sees in a browser that has no network.

    >>> external_loads('<img src="data:,x"><a href="https://x.org">read</a>'), external_loads('<script src="https://x.org/a.js"></script>')
    ([], ['https://x.org/a.js'])
    """
    markup = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", html, flags=re.S | re.I)
    found = re.findall(r"""\b(?:src|srcset|poster|data)\s*=\s*["']?([^"'\s>]+)""", markup)
    found += re.findall(r"""<link\b[^>]*?\bhref\s*=\s*["']?([^"'\s>]+)""", markup, flags=re.I)
    found += re.findall(r"""url\(\s*["']?([^"')]+)""", markup)
    found += re.findall(r"""@import\s+["']([^"']+)""", markup)
    return [f for f in found if not f.startswith(("data:", "#"))]
