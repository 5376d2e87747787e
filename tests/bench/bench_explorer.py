"""How long the explorer takes from a control to the redrawn plot, in JupyterLab in Chromium, with 3,000 points.

    python tests/bench/bench_explorer.py [--rows 3000] [--times 40]

A made-up sweep (`tests/sweeps.py`), all requests that would leave this machine aborted. Each round touches a control as a reader does
(an arrow key on a slider, a choice in a list) and takes the time from that event in the page to the second animation frame after
plotly has drawn what came of it: the picture is on the screen then. Printed: p50 and p95 per control and over all of them, and how
long the first display took after plotly's script had been loaded. The bars are 100 and 200 ms, and 3 s; they are not asserted, since a
time belongs to a machine. Without a GPU WebGL is computed by the processor, which makes these times the worst case.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from edgelab.device import devices

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from explorer_browser import lab, missing
from sweeps import write

FIRST = """
import plotly.graph_objects as go
go.FigureWidget(go.Scatter(y=[1, 2]))  # loads plotly's script
"""
CELL = """
from edgelab.explorer import Explorer
Explorer({path!r})
"""


def processor_seconds() -> dict[str, float]:
    """Processor time so far of everything that this process started, by kind: what a busy machine can't blur."""
    found = {"browser": 0.0, "kernel": 0.0, "server": 0.0}
    for p in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(p.cmdline())
            kind = "kernel" if "ipykernel" in line else "server" if "jupyterlab" in line else "browser" if "chrom" in line else ""
            if kind:
                found[kind] += sum(p.cpu_times()[:2])
    return found


def touch(tab, name: str, act, settle_ms: int = 400) -> float | None:
    """Milliseconds from `act`'s event to the plot on the screen; None where nothing was drawn within ten seconds."""
    tab.wait_for_timeout(settle_ms)
    tab.evaluate("window.seen.drawn = []; window.seen.touched = null; window.seen.first = null")
    act()
    try:
        tab.wait_for_function("window.seen.touched && window.seen.drawn.some(t => t > window.seen.touched)", timeout=10_000)
    except Exception:
        return None
    return tab.evaluate("window.seen.drawn.find(t => t > window.seen.touched) - window.seen.touched")


def controls(tab):
    """{name: function that touches it for the i-th time}."""
    sliders = tab.locator(".noUi-handle")

    def key(i_slider: int, keys: tuple[str, str]):
        def act(i: int) -> None:
            sliders.nth(i_slider).focus()
            tab.keyboard.press(keys[(i // 8) % 2])

        return act

    where = [f"{p.title} ({p.kind})" for p in devices().values()]

    def choose(label: str, values: Sequence[str]):
        box = tab.get_by_label(label, exact=True).first

        return lambda i: box.select_option(label=values[i % len(values)])

    return {
        "size budget": key(0, ("ArrowLeft", "ArrowRight")),
        "latency budget": key(1, ("ArrowLeft", "ArrowRight")),
        "quality budget": key(2, ("ArrowRight", "ArrowLeft")),
        "quality metric": choose(
            "quality", ("KL divergence, prose and code", "exact match, arithmetic", "bits per byte, code", "exact match, assistant")
        ),
        "device": choose("device", where[3:15:3]),
        "find the": choose("find the", ("smallest", "fastest", "best quality")),
        "colour": choose("colour", ("bits", "experts", "method")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--times", type=int, default=24, help="of each control")
    given = parser.parse_args()
    if why := missing():
        sys.exit(f"no measurement: {why}")
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "sweep.parquet", given.rows)
        with lab(Path(folder), FIRST, CELL.format(path=str(path))) as (tab, left):
            first = tab.evaluate("window.plotTimes[1] - window.plotTimes[0]") / 1e3
            found: dict[str, list[float]] = {}
            spent: dict[str, dict[str, float]] = {}
            for name, act in controls(tab).items():
                act(0)
                tab.wait_for_timeout(1500)
                before = processor_seconds()
                for i in range(1, given.times + 1):
                    took = touch(tab, name, lambda i=i, act=act: act(i))
                    if took is not None:
                        found.setdefault(name, []).append(took)
                after = processor_seconds()
                spent[name] = {k: 1e3 * (after[k] - before[k]) / given.times for k in after}
            print(f"{given.rows} points, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; requests beyond this machine: {len(left)}")
            print(f"{'control':18} {'n':>3} {'p50':>7} {'p95':>7}  ms     processor ms each: browser, kernel, server")
            for name, values in found.items():
                print(
                    f"{name:18} {len(values):3} {np.quantile(values, 0.5):7.0f} {np.quantile(values, 0.95):7.0f}  "
                    + " ".join(f"{v:13.0f}" for v in spent[name].values())
                )
            every = [v for values in found.values() for v in values]
            p50, p95 = np.quantile(every, 0.5), np.quantile(every, 0.95)
            print(f"{'all':18} {len(every):3} {p50:7.0f} {p95:7.0f}   bars: 100 and 200")
            print(f"first display {first:.2f} s after plotly had loaded, the making of the explorer in it; bar: 3")
            print(json.dumps({"p50_ms": round(p50), "p95_ms": round(p95), "first_s": round(first, 2)}))


if __name__ == "__main__":
    main()
