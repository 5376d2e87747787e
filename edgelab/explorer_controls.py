"""Three parts of the explorer's page: a budget (a number box and the slider that leads and follows it), a sentence that is announced, and
what keeps the plot as wide as the page."""

import anywidget
import ipywidgets as w
import numpy as np
import traitlets

_STEPS = 200  # of a budget's slider


class Fit(anywidget.AnyWidget):
    """An invisible line that tells plotly when the page has given it another width: plotly itself hears of the window's only."""

    _esm = """
    export default { render({ el }) {
        let width = 0;
        new ResizeObserver(() => {
            if (el.clientWidth !== width) { width = el.clientWidth; window.dispatchEvent(new Event("resize")); }
        }).observe(el);
    } };
    """


class Live(anywidget.AnyWidget):
    """HTML that a screen reader announces when `value` changes: the live element stays, its content is replaced.

    (In an `ipywidgets.HTML` the live element would be part of what is replaced, and a new live element announces nothing.)
    """

    _esm = """
    export default { render({ model, el }) {
        el.setAttribute("aria-live", "polite");
        const show = () => { el.innerHTML = model.get("value"); };
        model.on("change:value", show);
        show();
        return () => model.off("change:value", show);
    } };
    """
    value = traitlets.Unicode("").tag(sync=True)


class Budget:
    """A limit: a number box, and a slider that leads and follows it. `limit` is in the box's unit; None at the open end: no limit.

    `open_high`: whether the open end is the high one (at most), or the low one (at least). `log`: how the slider goes.
    """

    def __init__(self, description: str) -> None:
        self.box = w.BoundedFloatText(min=0, max=1e12, step=None, description=description, style={"description_width": "initial"},
                                      layout={"width": "auto", "min_width": "17em"})  # fmt: skip
        self.slider = w.IntSlider(0, min=0, max=_STEPS, readout=False, layout={"width": "10em"})
        self.low, self.high, self.log, self.open_high = 0.0, 1.0, False, True
        self._limit: float | None = None
        self._shown = 0.0
        self._following = False
        self.box.observe(self._typed, "value")
        self.slider.observe(self._slid, "value")
        self.changed = lambda: None
        self.row = w.HBox([self.box, self.slider], layout={"flex_flow": "row wrap"})

    @property
    def limit(self) -> float | None:
        return self._limit

    def show(self, limit: float | None, low: float, high: float, *, log: bool, open_high: bool, description: str | None = None) -> None:
        """Set scale and limit without telling anybody."""
        self._following = True
        try:
            if description is not None and self.box.description != description:
                self.box.description = description
            self.low, self.high, self.log, self.open_high = low, max(high, low * (1 + 1e-9) + 1e-12), log, open_high
            self._limit = limit
            self._shown = float(f"{(self._open if limit is None else limit):.4g}")
            if self.box.value != self._shown:
                self.box.value = self._shown
            position = self._position(self._open if limit is None else limit)
            if self.slider.value != position:
                self.slider.value = position
        finally:
            self._following = False

    @property
    def _open(self) -> float:
        """The slider's end that stands for no limit, rounded away so that nothing is cut off."""
        return self.high if self.open_high else self.low

    def _position(self, value: float) -> int:
        value = min(max(value, self.low), self.high)
        if self.log:
            return round(_STEPS * np.log(max(value, self.low) / self.low) / np.log(self.high / self.low))
        return round(_STEPS * (value - self.low) / (self.high - self.low))

    def _value(self, position: int) -> float:
        share = position / _STEPS
        return self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)

    def _is_open(self, value: float) -> bool:
        return value >= self.high * (1 - 5e-4) if self.open_high else value <= self.low

    def _typed(self, change) -> None:
        if self._following or change.new == self._shown:
            return
        self.show(None if self._is_open(change.new) else change.new, self.low, self.high, log=self.log, open_high=self.open_high)
        self.changed()

    def _slid(self, change) -> None:
        if self._following:
            return
        at_open_end = change.new == (_STEPS if self.open_high else 0)
        limit = None if at_open_end else float(f"{self._value(change.new):.4g}")
        self.show(limit, self.low, self.high, log=self.log, open_high=self.open_high)
        self.changed()
