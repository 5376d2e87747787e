"""Where the buffers of a program lie: those that are never needed at the same time share their memory.

Every buffer of a step is known beforehand: its bytes, the first operation that touches it and the last. Two may overlap in memory
if they do not overlap in time. Packing them into the least memory is NP-hard (dynamic storage allocation; Garey and Johnson,
1979, SR2); placing the largest first, each at the lowest place that is free during its life, is within a few percent of the bound
on models that are layers in a row (Pisarchyk and Lee, arXiv 2001.03288, "greedy by size"). The bound is the most bytes that
are needed at any one time.

Layers in a row need the same buffers one after the other, so what one layer is done with serves the next: two copies of the widest
buffers in all, not one for each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelab import html_table

ALIGN = 64  # bytes: a vector never straddles two cache lines


@dataclass(frozen=True)
class Buffer:
    """`nbytes` that operation `first` writes and operation `last` is the last to touch."""

    name: str
    nbytes: int
    first: int
    last: int


def place(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """(where each buffer begins, bytes of the memory that holds them all). Buffers that live at the same time do not overlap.

    Raises ValueError for a buffer whose life ends before it begins.

    >>> place([Buffer("a", 64, 0, 1), Buffer("b", 128, 1, 2), Buffer("c", 64, 2, 3)])  # a and c are never needed together
    ([128, 0, 128], 192)
    """
    sizes = np.array([-(-b.nbytes // ALIGN) * ALIGN for b in buffers], np.int64)
    first, last = np.array([b.first for b in buffers], np.int64), np.array([b.last for b in buffers], np.int64)
    for b in buffers:
        if b.last < b.first or b.nbytes < 0:
            raise ValueError(f"buffer {b.name!r} has {b.nbytes} bytes and lives from operation {b.first} to {b.last}")
    offsets, placed = np.zeros(len(buffers), np.int64), np.zeros(len(buffers), bool)
    for i in np.argsort(-sizes, kind="stable"):
        meets = placed & (first <= last[i]) & (first[i] <= last)
        at = 0
        for j in sorted(np.flatnonzero(meets), key=lambda j: offsets[j]):
            if offsets[j] - at >= sizes[i]:
                break
            at = max(at, offsets[j] + sizes[j])
        offsets[i], placed[i] = at, True
    return offsets.tolist(), int((offsets + sizes).max(initial=0))


def bound(buffers: Sequence[Buffer]) -> int:
    """The most bytes that are needed during one operation: no plan takes less."""
    end = max((b.last for b in buffers), default=-1) + 1
    change = np.zeros(end + 1, np.int64)
    for b in buffers:
        size = -(-b.nbytes // ALIGN) * ALIGN
        change[b.first] += size
        change[b.last + 1] -= size
    return int(np.cumsum(change).max(initial=0))


@dataclass(frozen=True)
class MemoryPlan:
    """What a runtime holds, in bytes. Activations three ways: every buffer its own, as planned, the bound that no plan can beat.

    `cache_bytes`: keys and values for the whole context of all slots. `plain_cache_bytes`: what the same positions take as float32 keys and
    values of every head, as a runtime holds them that neither narrows nor compresses them.
    """

    buffers: int
    unplanned_bytes: int
    planned_bytes: int
    bound_bytes: int
    cache_bytes: int
    plain_cache_bytes: int
    weight_bytes: int
    mapped_bytes: int

    @property
    def saved(self) -> float:
        """The share of activation buffers that the plan saves."""
        return 1 - self.planned_bytes / self.unplanned_bytes if self.unplanned_bytes else 0.0

    @property
    def saved_with_cache(self) -> float:
        """The same share with the (unchanged) cache counted on both sides."""
        before = self.unplanned_bytes + self.cache_bytes
        return 1 - (self.planned_bytes + self.cache_bytes) / before if before else 0.0

    def rows(self) -> list[tuple[str, int]]:
        return [
            ("activations, every buffer its own", self.unplanned_bytes),
            ("activations, planned", self.planned_bytes),
            ("activations, least that any plan takes", self.bound_bytes),
            ("cache of keys and values", self.cache_bytes),
            ("the same as float32, every head", self.plain_cache_bytes),
            ("weights", self.weight_bytes),
            ("of these mapped from files", self.mapped_bytes),
        ]

    def __repr__(self) -> str:
        lines = [
            f"MemoryPlan: {self.buffers} buffers; {self.saved:.0%} of the activations saved, {self.saved_with_cache:.0%} with the cache"
        ]
        return "\n".join([*lines, *(f"  {name:<40} {value:>14,} bytes" for name, value in self.rows())])

    def _repr_html_(self) -> str:
        note = f"{self.buffers} buffers; the plan saves {self.saved:.0%} of the activations, {self.saved_with_cache:.0%} with the cache."
        return html_table.lines([{"memory": name, "bytes": f"{value:,}"} for name, value in self.rows()], note)
