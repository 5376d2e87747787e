"""The frame around a control: what JupyterLab needs so that the control can be operated by keyboard alone.

A notebook listens to keys before its outputs do: the arrow down on a dropdown moves to the next cell, and D twice deletes the cell. It
leaves alone what bears the attribute `data-lm-suppress-shortcuts`, which Python can't set. So a frame holds a small script, with nothing
to see, that sets it on whatever takes the focus. The script also names each slider after the number box beside it, since ipywidgets gives
a slider no accessible name, and draws a ring around what has the focus, since a border one shade darker is hard to see.

The price: while the focus is in a frame, JupyterLab's own shortcuts rest. Tab leaves the frame.
"""

from collections.abc import Iterable

import anywidget
import ipywidgets as w

CLASS = "edgelab-frame"
PLOT = {
    "responsive": True,  # as wide as the page, also when that changes
    "displaylogo": False,
    "showSendToCloud": False,  # plotly offers to upload the chart to its maker, unless told not to
}

_SCRIPT = """
function name(frame) {
  for (const handle of frame.querySelectorAll("[role=slider]:not([aria-label])")) {
    let box = handle.closest(".jupyter-widgets");
    while (box && box !== frame && !box.querySelector(".widget-label")?.innerText) box = box.parentElement;
    const label = box?.querySelector(".widget-label")?.innerText;
    if (label) handle.setAttribute("aria-label", label);
  }
}
function render({ el }) {
  el.style.display = "none";
  let watch, next;
  const begin = () => {
    const frame = el.closest(".CLASS");
    if (!frame) { next = requestAnimationFrame(begin); return; }
    frame.addEventListener("focusin", (e) => e.target.setAttribute("data-lm-suppress-shortcuts", "true"));
    // inputs come in one by one; what a plot does inside itself, at every redraw, is no concern of ours
    watch = new MutationObserver((seen) => seen.some((m) => m.target.classList.contains("jupyter-widgets")) && name(frame));
    watch.observe(frame, { childList: true, subtree: true });
    name(frame);
  };
  begin();
  return () => { cancelAnimationFrame(next); watch?.disconnect(); };
}
export default { render };
""".replace("CLASS", CLASS)

_STYLE = f"""
.{CLASS} svg[role=img] {{ max-width: 100%; height: auto; }}
.{CLASS} :is(select, input, button, summary, [tabindex]):focus-visible {{
  outline: 2px solid var(--jp-brand-color1, #1976d2) !important; outline-offset: 1px;
}}
"""


class _Script(anywidget.AnyWidget):
    _esm = _SCRIPT
    _css = _STYLE


def frame(*children: w.Widget) -> w.VBox:
    """`children` one below the other, operable by keyboard alone; plots in them as wide as the page, and without an upload button."""
    _prepare(children)
    box = w.VBox([*children, _Script()])
    box.add_class(CLASS)
    return box


def _prepare(widgets: Iterable[w.Widget]) -> None:
    for widget in widgets:
        if hasattr(widget, "_config"):  # a FigureWidget: asked so, plotly needs no import
            widget._config = widget._config | PLOT
        _prepare(getattr(widget, "children", ()))
