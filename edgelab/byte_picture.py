"""A `ByteMap` drawn: the file from its first to its last byte, as disk tools draw a disk, and what is in it by layer, role and kind.

The strip is exact: a bar begins and ends at its bytes, a row is as many bytes as the axis says, and nothing is sampled. Pieces too small to
be seen are drawn together when they are neighbours of one kind.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from edgelab import plots
from edgelab.byte_map import BLOCKS, KINDS, ByteMap, Segment

COLOURS = {
    "codes": plots.OKABE_ITO[0],
    BLOCKS: "#4B3F9E",
    "scales": plots.OKABE_ITO[1],
    "float weights": plots.OKABE_ITO[2],
    "norms": plots.OKABE_ITO[4],
    "router": plots.OKABE_ITO[3],
    "vocabulary": plots.OKABE_ITO[5],
    "graph and metadata": plots.OKABE_ITO[6],
    "program": plots.OKABE_ITO[7],
    "padding": "#C9CED6",
    "unknown": "#000000",
}
SAID = {BLOCKS: "codes and scales in turn"}
ROWS = 24  # of a strip
_FINE = 300  # pieces below a row / _FINE, a pixel or two, are drawn together
_FADED = 0.12


class Bar(NamedTuple):
    """A piece of a strip: bytes `start` .. `start + length` of its row, and what the pointer over it says."""

    row: int
    start: int
    length: int
    kind: str
    text: str


def row_bytes(size: int, rows: int = ROWS) -> int:
    """Bytes in a row of a strip: 2**n or 3 * 2**n, the smallest with which `size` bytes take at most `rows` rows.

    >>> row_bytes(4_265_767), row_bytes(100, 4)
    (196608, 32)
    """
    unit = 1
    while unit * rows < size:
        if unit * 3 // 2 * rows >= size and unit > 1:
            return unit * 3 // 2
        unit *= 2
    return unit


def told(map: ByteMap, s: Segment, bits: Mapping[str, float]) -> str:
    """What the pointer over a segment says, in three short lines."""
    lines = [escape(s.name), f"{escape(s.file)}: bytes {s.offset:,} to {s.end - 1:,} ({s.bytes:,})"]
    where = f"{s.role} of layer {s.layer}" if s.layer is not None else s.role
    if s.tensor in bits:
        held = f", {s.weights:,} weights" if s.weights else ""
        lines.append(f"{SAID.get(s.kind, s.kind)} of {where or 'the model'}{held}, {bits[s.tensor]:.3f} bits each in all")
    else:
        lines.append(s.kind)
    return "<br>".join(lines)


def strip(map: ByteMap, width: int) -> Iterator[Bar]:
    """The bars of `map` in rows of `width` bytes, its files one behind the other."""
    bits, fine, at = map.bits_of(), width / _FINE, 0
    pending: list[Segment] = []

    def bars(parts: list[Segment]) -> Iterator[Bar]:
        size = sum(s.bytes for s in parts)
        text = told(map, parts[0], bits)
        if len(parts) > 1:
            first, last = parts[0], parts[-1]
            text = f"{len(parts)} pieces: {escape(first.name)} to {escape(last.name)}<br>{escape(first.file)}: bytes {first.offset:,} to "
            text += f"{last.end - 1:,} ({size:,})<br>{SAID.get(first.kind, first.kind)}"
        begin = at - size
        while begin < at:
            row, start = divmod(begin, width)
            length = min(width - start, at - begin)
            yield Bar(row, start, length, parts[0].kind, text)
            begin += length

    for s in map.segments:
        if pending and (s.bytes >= fine or s.kind != pending[0].kind or s.file != pending[0].file):
            yield from bars(pending)
            pending = []
        at += s.bytes
        if s.bytes >= fine:
            yield from bars([s])
        else:
            pending.append(s)
    if pending:
        yield from bars(pending)


class Node(NamedTuple):
    """A box of the treemap: `id` is its path; `kind` of a leaf, "" of a box of boxes."""

    id: str
    label: str
    parent: str
    bytes: int
    weights: int
    kind: str


def tree(map: ByteMap) -> list[Node]:
    """The boxes of `map`: file, then layer or what is outside of them, then role, then kind; of bytes that are no weights kind and file."""
    found: dict[tuple[str, ...], list[int]] = {}
    kinds: dict[tuple[str, ...], str] = {}
    for s in map.segments:
        if s.role:
            place = (f"layer {s.layer}", s.role) if s.layer is not None else (s.role,)
        else:
            place = ("not in a layer", s.kind) if s.weights else (s.kind, s.file) if len(map.files) > 1 else (s.kind,)
        for kind, n in s.parts.items():
            path = (map.path.name, *place, kind) if s.role else (map.path.name, *place)
            kinds[path] = kind
            for depth in range(1, len(path) + 1):
                sums = found.setdefault(path[:depth], [0, 0])
                sums[0] += n
                sums[1] += s.weights if kind != "scales" else 0
    nodes = [Node("/".join(p), p[-1], "/".join(p[:-1]), *sums, kinds.get(p, "")) for p, sums in found.items()]
    return nodes


def hover(node: Node, map: ByteMap) -> str:
    """What the pointer over a box says."""
    lines = [escape(node.id), f"{node.bytes:,} bytes, {node.bytes / map.bytes:.2%} of the file"]
    if map.weights:
        each = f", {8 * node.bytes / node.weights:.3f} on each of the {node.weights:,} in here" if node.weights else ""
        lines.append(f"{8 * node.bytes / map.weights:.4f} bits on every weight of the model{each}")
    return "<br>".join(lines)


def faded(colour: str) -> str:
    """`colour` (#rrggbb) so pale that another stands out beside it."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return f"rgba({','.join(map(str, parts))},{_FADED})"


class BytePicture:
    """Treemap and strip of one map. `kind`: the one that stands out; "" for none."""

    def __init__(self, map: ByteMap, kind: str = "") -> None:
        if kind and kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
        self.map, self.kind = map, kind
        self.width = row_bytes(map.bytes)

    @cached_property
    def bars(self) -> dict[str, list[Bar]]:
        """The strip's bars by kind."""
        found: dict[str, list[Bar]] = {}
        for bar in strip(self.map, self.width):
            found.setdefault(bar.kind, []).append(bar)
        return found

    @cached_property
    def nodes(self) -> list[Node]:
        return tree(self.map)

    @property
    def sentence(self) -> str:
        """What the picture shows, for a reader who does not see it."""
        m = self.map
        kinds = sorted(m.by_kind().items(), key=lambda item: -item[1])
        shares = ", ".join(f"{kind} {n / m.bytes:.2%}" for kind, n in kinds)
        bits = f"; {8 * m.bytes / m.weights:.3f} bits on each of {m.weights:,} weights" if m.weights else ""
        mine = f" Of {self.kind}: {m.by_kind().get(self.kind, 0):,} bytes." if self.kind else ""
        return f"{m.path.name}, {m.form}, {m.bytes:,} bytes{bits}. By kind: {shares}.{mine}"

    def stands_out(self, kind: str) -> bool:
        return self.kind in ("", kind) or (kind == BLOCKS and self.kind in ("codes", "scales"))

    def treemap(self) -> dict:
        """The treemap's trace, as plotly's properties."""
        colours = [
            "rgba(138,148,163,0.18)" if not n.kind else COLOURS[n.kind] if self.stands_out(n.kind) else faded(COLOURS[n.kind])
            for n in self.nodes
        ]
        return {
            "ids": [n.id for n in self.nodes],
            "labels": [n.label for n in self.nodes],
            "parents": [n.parent for n in self.nodes],
            "values": [n.bytes for n in self.nodes],
            "customdata": [hover(n, self.map) for n in self.nodes],
            "marker": {"colors": colours, "line": {"color": "white", "width": 1}},
        }

    def strip_of(self, kind: str) -> dict:
        """The trace of the strip's bars of one kind."""
        bars = self.bars.get(kind, [])
        return {
            "x": [b.length for b in bars],
            "base": [b.start for b in bars],
            "y": [b.row for b in bars],
            "customdata": [b.text for b in bars],
            "opacity": 1.0 if self.stands_out(kind) else _FADED,
            "showlegend": bool(bars),
        }

    def axes(self) -> dict:
        """The strip's axes: where in the file a row begins."""
        rows = -(-self.map.bytes // self.width)
        step = max(1, rows // 6)
        ticks = list(range(0, rows, step))
        x = [i * self.width // 4 for i in range(5)]
        return {
            "xaxis": {"range": [0, self.width], "tickvals": x, "ticktext": [_size(v) for v in x]},
            "yaxis": {"range": [rows - 0.5, -0.5], "tickvals": ticks, "ticktext": [_size(t * self.width) for t in ticks]},
        }

    def figure(self) -> go.Figure:
        """Both as one plotly figure."""
        fig = make_subplots(2, 1, specs=[[{"type": "domain"}], [{"type": "xy"}]], row_heights=[0.52, 0.48], vertical_spacing=0.07)
        fig.add_treemap(
            **self.treemap(),
            branchvalues="total",
            hovertemplate="%{customdata}<extra></extra>",
            textinfo="label+percent root",
            tiling={"pad": 1},
            row=1,
            col=1,
        )
        for kind, colour in COLOURS.items():
            fig.add_bar(
                **self.strip_of(kind),
                name=SAID.get(kind, kind),
                orientation="h",
                width=0.86,
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate="%{customdata}<extra></extra>",
                row=2,
                col=1,
            )
        fig.update_layout(template=plots.TEMPLATE, height=720, barmode="overlay", title_text=self.title)
        fig.update_layout(legend={"y": -0.06, "yanchor": "top"}, margin={"t": 48, "b": 24, "l": 74, "r": 12}, **self.axes())
        fig.update_xaxes(showgrid=False)
        fig.update_yaxes(showgrid=False)
        return fig

    @property
    def title(self) -> str:
        return f"{self.map.path.name}: {self.map.bytes:,} bytes"

    def _repr_mimebundle_(self, **_) -> dict:
        return {
            "application/vnd.plotly.v1+json": json.loads(self.figure().to_json()),
            "image/svg+xml": FilesPicture({self.map.path.name: self.map}).svg(),
            "text/plain": self.sentence,
        }


def _size(n: int) -> str:
    return "0" if not n else f"{n / 2**20:.4g} MiB" if n >= 2**20 else f"{n / 2**10:.4g} KiB" if n >= 2**10 else f"{n} B"


class FilesPicture:
    """The strips of several files under one another, at one scale: a row has as many bytes in each."""

    def __init__(self, maps: Mapping[str, ByteMap], rows: int = 64) -> None:
        """`rows`: of the largest file."""
        self.maps = dict(maps)
        self.width = row_bytes(max(m.bytes for m in maps.values()), rows)

    @property
    def sentence(self) -> str:
        """What the picture shows, for a reader who does not see it."""
        each = "; ".join(f"{name} {m.bytes:,} bytes, of them " + _most(m) for name, m in self.maps.items())
        return f"From the first to the last byte, {_size(self.width)} a row: {each}."

    def svg(self) -> str:
        """The picture without JavaScript."""
        left, wide, high, gap = 4, 716, 7, 30
        unit = wide / self.width
        used = [k for k in COLOURS if any(s.kind == k for m in self.maps.values() for s in m.segments)]
        out, y = [], 22.0
        x = float(left)
        for kind in used:
            label = SAID.get(kind, kind)
            if x + 24 + 6.2 * len(label) > left + wide:
                x, y = float(left), y + 17
            out.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="11" height="11" fill="{COLOURS[kind]}"/>')
            out.append(f'<text x="{x + 15:.0f}" y="{y + 9.5:.1f}">{escape(label)}</text>')
            x += 30 + 6.2 * len(label)
        y += gap
        for name, m in self.maps.items():
            out.append(f'<text x="{left}" y="{y + 10:.0f}" font-weight="600">{escape(name)}</text>')
            out.append(f'<text x="{left + wide}" y="{y + 10:.0f}" text-anchor="end">{m.bytes:,} bytes</text>')
            y += 16
            paths: dict[str, list[str]] = {}
            for bar in strip(m, self.width):
                begin, end = left + bar.start * unit, left + (bar.start + bar.length) * unit
                if end - begin >= 0.05:
                    paths.setdefault(bar.kind, []).append(f"M{begin:.1f} {y + high * bar.row:.0f}H{end:.1f}v{high - 1}H{begin:.1f}z")
            out += [f'<path fill="{COLOURS[kind]}" d="{"".join(d)}"/>' for kind, d in paths.items()]
            y += high * -(-m.bytes // self.width) + gap / 2
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 4} {y:.0f}" width="{left + wide + 4}" role="img" '
            f'font-family="system-ui, sans-serif"><title>Where the bytes are</title><desc>{escape(self.sentence)}</desc>'
            f'<g fill="{plots.INK}" font-size="11"><text x="{left}" y="13" font-size="14" font-weight="600">'
            f"Where the bytes are, {_size(self.width)} a row</text>"
        )
        return "\n".join([head, *out, "</g></svg>"])

    def _repr_mimebundle_(self, **_) -> dict:
        return {"image/svg+xml": self.svg(), "text/plain": self.sentence}


def _most(m: ByteMap) -> str:
    kinds = sorted(m.by_kind().items(), key=lambda item: -item[1])[:2]
    return " and ".join(f"{kind} {n / m.bytes:.0%}" for kind, n in kinds)
