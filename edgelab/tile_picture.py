"""The layout of `kernels/pack.py`, drawn from `pack.py` itself: which bit of a tile belongs to which weight.

Nothing here knows the layout. It is found by probing (`tile_map`), so a picture cannot be out of date.
"""

import itertools
import json
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from edgelab import plots
from edgelab.kernels.pack import QUADS, ROWS, UNIT, VECTOR, tile


def tile_map(bits: int) -> np.ndarray:
    """Which weight each bit of a tile belongs to: int [vectors, 64 bytes, 8 bits, (row, input, bit of its code)].

    Found by probing: for each bit of each code of 16 rows x 32 inputs a weight that is zero but for it is laid out by
    `pack.tile`, and the one bit that is set afterwards is looked up. Raises RuntimeError if it is not exactly one.
    """
    probes = ROWS * UNIT * bits
    row, position = np.divmod(np.arange(probes), UNIT * bits)  # a row's codes are one stream of bits
    packed = np.zeros((probes, ROWS, UNIT * bits // 8), np.uint8)
    packed[np.arange(probes), row, position // 8] = 1 << position % 8
    tiles = tile(packed, np.zeros((probes, 1, 1), np.int16), bits, 0, UNIT)
    found = np.unpackbits(tiles.codes.reshape(probes, -1), axis=1, bitorder="little")
    if not (found.sum(0) == 1).all() or found.shape[1] != probes:
        raise RuntimeError(f"the layout of {bits} bits does not give each bit of a code one place")
    at = found.argmax(0)
    parts = np.stack([row[at], position[at] // bits, position[at] % bits], axis=-1)
    return parts.reshape(bits, VECTOR, 8, 3)


class Block(NamedTuple):
    """Neighbouring bits of one byte that belong to one code."""

    vector: int
    byte: int
    first: int  # bit of the byte
    bits: int
    row: int
    input: int
    of_code: int  # the code's bit that lies lowest here


def blocks(bits: int, columns: int = VECTOR) -> list[Block]:
    """The map of a tile as blocks, for the first `columns` bytes of each vector."""
    where, found = tile_map(bits), []
    for vector, byte in itertools.product(range(bits), range(columns)):
        first = 0
        for (row, k), run in itertools.groupby(where[vector, byte].tolist(), key=lambda c: (c[0], c[1])):
            run = list(run)
            found.append(Block(vector, byte, first, len(run), row, k, run[0][2]))
            first += len(run)
    return found


class TilePicture:
    """The layout of a tile, drawn from `tile_map`: bytes to the right, vectors and their bits downwards, a panel per bit width.

    Each block is a code (at 3 bits, a part of one) and bears the number of its input; a colour is a quad of four inputs.
    """

    def __init__(self, bits: Sequence[int] = (2, 3, 4, 8), columns: int = 8) -> None:
        self.columns = columns
        self.panels = {b: blocks(b, columns) for b in bits}
        self.lanes = {b: _lanes(blocks(b)) for b in bits}

    @property
    def sentence(self) -> str:
        """What the picture shows, for a reader who does not see it."""
        same = all(len(set(lanes)) == 1 and len(lanes) == ROWS for lanes in self.lanes.values())
        read = ", ".join(f"{b} vectors of {VECTOR} bytes at {b} bits" for b in self.panels)
        return (
            f"A unit of a tile, {ROWS} rows by {UNIT} inputs, takes {read}. Bytes 4r to 4r + 3 of each vector belong to row r; drawn are "
            f"the first {self.columns} bytes, rows 0 to {self.columns // 4 - 1}, each byte with its lowest bit (bit 0) at the top"
            + (f", and the lanes of all {ROWS} rows are alike." if same else "; the lanes of the rows DIFFER.")
        )

    def figure(self) -> go.Figure:
        """As a plotly figure; the pointer over a block says its row, its input and its bits."""
        fig = make_subplots(
            1, len(self.panels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[f"{b} bits" for b in self.panels]
        )
        for i, panel in enumerate(self.panels.values(), 1):
            fig.add_bar(
                x=np.array([p.byte for p in panel]),  # arrays, not lists: plotly writes them in a fraction of the characters
                y=np.array([p.bits for p in panel]),
                base=np.array([8 * p.vector + p.first for p in panel]),
                customdata=np.array([[p.row, p.input, p.vector, p.first, p.first + p.bits - 1, p.of_code] for p in panel], np.uint8),
                texttemplate="%{customdata[1]}",
                hovertemplate="vector %{customdata[2]}, byte %{x}, bits %{customdata[3]} to %{customdata[4]}:<br>row %{customdata[0]}, "
                "input %{customdata[1]}, from bit %{customdata[5]} of its code<extra></extra>",
                marker={
                    "color": np.array([p.input // 4 % QUADS for p in panel], np.uint8),
                    "colorscale": [[(i + j) / QUADS, plots.OKABE_ITO[i]] for i in range(QUADS) for j in (0, 1)],
                    "cmin": -0.5,
                    "cmax": QUADS - 0.5,
                    "line": {"color": "white", "width": 1},
                },
                textfont={"size": np.array([7 if p.bits == 1 else 10 for p in panel], np.uint8)},  # a bit is some 9 pixels high
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                width=0.98,
                row=1,
                col=i,
            )
        fig.update_layout(template=plots.TEMPLATE, height=680, showlegend=False, barmode="overlay", title_text=self.title)
        fig.update_xaxes(title_text="byte", dtick=4, showgrid=False)
        most = 8 * max(self.panels)
        fig.update_yaxes(
            range=[most, 0],
            tickvals=[0.5, 7.5, *range(4, most, 8)],
            ticktext=["bit 0", "bit 7", *(f"vector {v}" for v in range(most // 8))],
            showgrid=False,
        )
        return fig

    @property
    def title(self) -> str:
        return f"Where the codes of {self.columns // 4} rows and {UNIT} inputs lie"

    def svg(self) -> str:
        """The same picture without JavaScript."""
        cell, bit, left, top, gap = 17, 9.0, 62, 62, 22
        high = top + bit * 8 * max(self.panels)
        wide = left + len(self.panels) * (self.columns * cell + gap)
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high + 40:.0f}" width="{wide}" role="img" '
            f'font-family="system-ui, sans-serif"><title>{escape(self.title)}</title><desc>{escape(self.sentence)}</desc>'
            f'<g fill="{plots.INK}" font-size="11"><text x="{left}" y="18" font-size="14" font-weight="600">{escape(self.title)}</text>'
        ]
        for v in range(max(self.panels)):
            out.append(f'<text x="{left - 6}" y="{top + bit * (8 * v + 4) + 4:.0f}" text-anchor="end">vector {v}</text>')
        for name, n in (("bit 0", 0), ("bit 7", 7)):
            out.append(f'<text x="{left - 6}" y="{top + bit * (n + 0.5) + 3:.0f}" text-anchor="end" font-size="9">{name}</text>')
        texts = []
        for i, (bits, panel) in enumerate(self.panels.items()):
            x0 = left + i * (self.columns * cell + gap)
            out.append(f'<text x="{x0}" y="{top - 20}" font-weight="600">{bits} bits</text>')
            for lane in range(self.columns // 4):
                out.append(f'<text x="{x0 + lane * 4 * cell}" y="{top - 6}">row {lane}</text>')
                out.append(f'<path d="M{x0 + lane * 4 * cell} {top - 4}h{4 * cell - 3}" stroke="{plots.INK}"/>')
            paths: dict[str, list[str]] = {}
            for p in panel:
                x, y, h = x0 + p.byte * cell, top + bit * (8 * p.vector + p.first), bit * p.bits
                paths.setdefault(_quad_colour(p), []).append(f"M{x} {y:g}h{cell - 1}v{h - 1:g}h-{cell - 1}z")
                small = ' font-size="6"' if p.bits == 1 else ""  # lower than the block, or the digits of two would touch
                texts.append(f'<text x="{x + cell / 2 - 0.5:g}" y="{y + h / 2 + 1.8:g}" fill="{_ink(p)}"{small}>{p.input}</text>')
            out += [f'<path fill="{colour}" d="{"".join(d)}"/>' for colour, d in paths.items()]
            out.append(f'<text x="{x0}" y="{high + 18:.0f}">bytes 0 to {self.columns - 1}</text>')
        return "\n".join([*out, f'</g><g font-size="7" text-anchor="middle">{"".join(texts)}</g></svg>'])

    def _repr_mimebundle_(self, **_) -> dict:
        return {
            "application/vnd.plotly.v1+json": json.loads(self.figure().to_json()),
            "image/svg+xml": self.svg(),
            "text/plain": self.sentence,
        }


def _lanes(found: list[Block]) -> list[tuple]:
    """For each row that occurs, its blocks without the row itself: equal where the lanes are alike."""
    lanes: dict[int, list] = {}
    for p in found:
        lanes.setdefault(p.row, []).append((p.vector, p.byte - 4 * p.row, p.first, p.bits, p.input, p.of_code))
    return [tuple(lane) for lane in lanes.values()]


def _quad_colour(p: Block) -> str:
    return plots.OKABE_ITO[p.input // 4 % QUADS]


def _ink(p: Block) -> str:
    return "white" if p.input // 4 % QUADS == 0 else "black"
