"""Weights in the kernels' order, kept on disk: laid out once, mapped ever after.

A bundle stores rows, which every target reads; the kernels want tiles (`kernels/pack.py`), and laying out costs a pass over all codes and
a second copy in RAM. So a `TileStore` with a file writes what it laid out, and the next one maps it: opening a model then
reads headers and plans, pages come when a product first wants them, and the system may drop them again when memory is short.

The file is a safetensors file with one tensor of bytes; its metadata say where each weight's codes and scales lie (at multiples of
64), their CRC-32, and the `key` of what it was made from. A file of another key, shape or layout is laid out anew. Its bytes are trusted
as those of the bundle are: a sum over all of them is computed on request (`check`), for it reads them all.
"""

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from edgelab.kernels import pack
from edgelab.kernels.pack import ROWS, UNIT, VECTOR, Tiles, tile

# another layout, another format
FORMAT = f"edgelab tiles 1 {hashlib.sha256(Path(pack.__file__).read_bytes()).hexdigest()[:16]}"
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
        self.found = False  # whether everything so far came from the file
        self._all: dict[str, Tiles] = {}
        self._index, self._bytes = _open(file, key) if file is not None else ({}, None)
        self.found = self._bytes is not None

    def check(self) -> None:
        """Raises ValueError, naming the weight, where the file's bytes are not those that were written."""
        for name, (codes, scales, _, _, crc) in self._index.items():
            views = (self._view(*codes, np.uint8), self._view(*scales, np.int16))
            if _crc(*views) != crc:
                raise ValueError(f"{self.file} was damaged: the tiles of {name} are not what was written; delete the file")

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
            codes, scales = self._view(*entry[0], np.uint8), self._view(*entry[1], np.int16)
            table = np.zeros(16, np.float32)
            if bits < 8:
                table[:] = np.tile(
                    np.asarray(np.arange(2**bits) - 2 ** (bits - 1) if levels is None else levels, np.float32), 16 // 2**bits
                )
            found = Tiles(codes, scales, table, out, n, bits, group, levels is None)
            self.mapped_bytes += found.nbytes
        else:
            self.found = False
            found = tile(*parts(), bits, group_size, n, levels)
        self._all[name] = found
        self.nbytes += found.nbytes
        return found

    def count(self, array: np.ndarray) -> None:
        """Weights that are no tiles count too."""
        self.nbytes += array.nbytes

    def _view(self, at: int, shape: list[int], dtype) -> np.ndarray:
        return self._bytes[at : at + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def save(self) -> None:
        """Write what was handed out to `file`, whole or not at all. A folder that cannot be written to, or a full disk: not written."""
        if self.file is None or self.found:
            return
        index, arrays, at = {}, [], 0
        for name, t in self._all.items():
            entry = []
            for array in (t.codes, t.scales):
                entry.append((at, list(array.shape)))
                arrays.append((at, array))
                at += -(-array.nbytes // VECTOR) * VECTOR
            index[name] = [*entry, t.out, t.group, _crc(t.codes, t.scales)]
        meta = {"format": FORMAT, "key": self.key, "index": json.dumps(index)}
        header = json.dumps({"__metadata__": meta, "tiles": {"dtype": "U8", "shape": [at], "data_offsets": [0, at]}}).encode()
        header += b" " * (-(8 + len(header)) % VECTOR)
        temporary = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.file.parent, prefix=".tiles-", delete=False) as f:
                temporary = f.name
                f.write(len(header).to_bytes(8, "little") + header)
                for begin, array in arrays:
                    f.write(b"\0" * (8 + len(header) + begin - f.tell()))
                    f.write(np.ascontiguousarray(array).data)
                f.write(b"\0" * (8 + len(header) + at - f.tell()))
                f.flush()
                os.fsync(f.fileno())  # or a power cut may leave a file of the right size, full of zeros
            os.replace(temporary, self.file)
            if self.file.parent == cache_folder():
                _forget(self.file)
        except OSError:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)


def _crc(codes: np.ndarray, scales: np.ndarray) -> int:
    return zlib.crc32(scales.tobytes(), zlib.crc32(np.ascontiguousarray(codes).data))


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
        for codes, scales, out, group, crc in index.values():
            if any(type(number) is not int for number in (out, group, crc, codes[0], scales[0], *codes[1], *scales[1])):
                return {}, None
            for (at, shape), size in ((codes, 1), (scales, 2)):
                if at < 0 or at % VECTOR or min(shape) < 0 or at + math.prod(shape) * size > end:
                    return {}, None
        return index, np.asarray(mapped)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}, None
