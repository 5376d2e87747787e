"""Weights in the kernels' order, kept on disk: laid out once, mapped ever after.

A bundle stores rows, which every target reads; the kernels want tiles (`kernels/pack.py`), and laying out costs a pass over all codes and
a second copy in RAM. So a `TileStore` with a file writes what it laid out, and the next one maps it: opening a model then
reads headers and plans, pages come when a product first wants them, and the system may drop them again when memory is short.

The file is a safetensors file with one tensor of bytes; its metadata say where each weight's codes and scales lie (at multiples of
64) and the `key` of what it was made from. A file of another key, or a damaged one, is laid out anew.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from edgelab.kernels.pack import ROWS, UNIT, VECTOR, Tiles, tile

FORMAT = "edgelab tiles 1"
KEPT_BYTES = 8 * 2**30  # of the user's cache: when a file is added, those opened longest ago go until no more is left


def cache_folder() -> Path:
    """Where tiles are kept: EDGELAB_CACHE, else XDG_CACHE_HOME/edgelab, else ~/.cache/edgelab; in it, `tiles`."""
    root = os.environ.get("EDGELAB_CACHE")
    if root is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgelab"
    return Path(root) / "tiles"


class TileStore:
    """Hands out the tiles of weights by name: from `file` if it holds those of `key`, else laid out now, in memory.

    `nbytes`: of all that was handed out, `mapped_bytes`: of what lies on the pages of the file. `save` writes the file.
    """

    def __init__(self, file: Path | None = None, key: str = "") -> None:
        self.file, self.key = file, key
        self.nbytes = self.mapped_bytes = 0
        self._made: dict[str, Tiles] = {}
        self._index, self._bytes = _open(file, key) if file is not None else ({}, None)

    @property
    def found(self) -> bool:
        """Whether everything so far came from the file."""
        return self._bytes is not None and not self._made

    def tiles(
        self,
        name: str,
        parts: Callable[[], tuple[np.ndarray, np.ndarray]],
        bits: int,
        group_size: int,
        shape: tuple[int, ...],
        levels: np.ndarray | None,
    ) -> Tiles:
        """The weight `name` of `shape` [out, n] or [experts, out, n].

        `parts` returns (packed, scales) as `pack.tile` takes them and is called only where they are wanted. What the file holds is taken
        if its shapes are those of such a weight: the kernels trust them.
        """
        experts, out, n = (1, *shape)[-3:]
        group = group_size or n
        tall, groups = -(-out // ROWS), n // group
        expected = [experts, tall, groups * -(-group // UNIT), bits, VECTOR], [experts, tall, groups, ROWS], out, group
        entry = self._index.get(name)
        if entry is not None and (entry[0][1], entry[1][1], entry[2], entry[3]) == expected:
            (codes_at, codes_shape), (scales_at, scales_shape), *_ = entry
            codes = self._view(codes_at, codes_shape, np.uint8)
            scales = self._view(scales_at, scales_shape, np.int16)
            table = np.zeros(16, np.float32)
            if bits < 8:
                table[:] = np.tile(
                    np.asarray(np.arange(2**bits) - 2 ** (bits - 1) if levels is None else levels, np.float32), 16 // 2**bits
                )
            found = Tiles(codes, scales, table, out, n, bits, group, levels is None)
            self.mapped_bytes += found.nbytes
        else:
            found = self._made[name] = tile(*parts(), bits, group_size, n, levels)
        self.nbytes += found.nbytes
        return found

    def count(self, array: np.ndarray) -> None:
        """Weights that are no tiles count too."""
        self.nbytes += array.nbytes

    def _view(self, at: int, shape: list[int], dtype) -> np.ndarray:
        return self._bytes[at : at + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def save(self) -> None:
        """Write what was laid out to `file`, whole or not at all. A folder that cannot be written to, or a full disk: not written."""
        if self.file is None or not self._made:
            return
        index, arrays, at = {}, [], 0
        for name, t in self._made.items():
            entry = []
            for array in (t.codes, t.scales):
                entry.append((at, list(array.shape)))
                arrays.append((at, array))
                at += -(-array.nbytes // VECTOR) * VECTOR
            index[name] = [*entry, t.out, t.group]
        meta = {"format": FORMAT, "key": self.key, "index": json.dumps(index)}
        header = json.dumps({"__metadata__": meta, "tiles": {"dtype": "U8", "shape": [at], "data_offsets": [0, at]}}).encode()
        header += b" " * (-(8 + len(header)) % VECTOR)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as f:
                f.write(len(header).to_bytes(8, "little") + header)
                for begin, array in arrays:
                    f.write(b"\0" * (8 + len(header) + begin - f.tell()))
                    f.write(np.ascontiguousarray(array).data)
                f.write(b"\0" * (8 + len(header) + at - f.tell()))
            temporary.replace(self.file)
            if self.file.parent == cache_folder():
                _forget(self.file)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _forget(newest: Path) -> None:
    """Remove the files of the cache that were opened longest ago, but for the newest. Who has one mapped can read on."""
    files = sorted((f for f in newest.parent.glob("*.safetensors") if f != newest), key=lambda f: f.stat().st_mtime)
    total = newest.stat().st_size + sum(f.stat().st_size for f in files)
    for f in files:
        if total <= KEPT_BYTES:
            return
        total -= f.stat().st_size
        f.unlink(missing_ok=True)


def _open(file: Path, key: str) -> tuple[dict, np.ndarray | None]:
    """(index, the bytes of the tiles, mapped) of a file; ({}, None) where it is not there, damaged, or of another key."""
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > 1 << 28:
                return {}, None
            header = json.loads(f.read(length))
        meta, (begin, end) = header["__metadata__"], header["tiles"]["data_offsets"]
        if meta["format"] != FORMAT or meta["key"] != key or file.stat().st_size != 8 + length + end - begin:
            return {}, None
        index = json.loads(meta["index"])
        mapped = np.memmap(file, np.uint8, "r", 8 + length, (end,))
        with suppress(OSError):
            os.utime(file)  # opened now: see `_forget`
        for codes, scales, *_ in index.values():
            for (at, shape), size in ((codes, 1), (scales, 2)):
                if at < 0 or at % VECTOR or at + int(np.prod(shape)) * size > end:
                    return {}, None
        return index, np.asarray(mapped)
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None
