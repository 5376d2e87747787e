"""Where the bytes of a model's file are: every byte of it belongs to one segment, and a segment says what it is.

    map = byte_map("model.onnx")     also .gguf, .safetensors, the folder of a bundle, of a model, of a page
    map.table()                      kind, bytes, share, bits per weight
    map.at("model.onnx", 4096)       the segment that holds that byte

Headers are parsed by `byte_formats.py` from the published formats. Nothing is loaded, no tensor is copied and no other package's reader
is used, nor the exporters' code: so a map is also a second opinion on what an export says of itself (`integers`).

In GGUF scales lie between the codes, some bytes each: a segment of kind "blocks" is one tensor, and `parts` has the exact shares.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

KINDS = {  # in the order of tables and legends
    "codes": "quantized weights",
    "scales": "what codes are multiplied with, and offsets",
    "float weights": "weights in floating point",
    "norms": "the weights of the norms",
    "router": "what chooses the experts",
    "vocabulary": "the tokenizer's words, merges and rules",
    "graph and metadata": "nodes, names, shapes, headers, settings, proofs",
    "program": "code that runs the model: the page and its runtime",
    "padding": "zeros that bring what follows to an aligned place",
    "unknown": "what no header mentions",
}
BLOCKS = "blocks"  # codes and their scales in turn
GRAPH = "graph and metadata"

_ROLES = (  # the first that is found in a tensor's name; names of transformers, of our exports and of llama.cpp
    ("norm", r"norm"),
    ("router", r"mlp\.gate\.|\.gate\.weight$|\.router\.|ffn_gate_inp|exp_probs_b|correction_bias"),
    ("shared expert", r"shared_expert|_shexp"),
    ("experts", r"\.experts\.|_exps"),
    ("attention", r"attn|attention"),
    ("feed-forward", r"\.mlp\.|ffn_"),
    ("embedding", r"embed|token_embd|\bwte\b"),
    ("head", r"lm_head|^output\."),
)


def role_of(name: str) -> str:
    """What a tensor of that name does in the model; "" where the name does not say.

    >>> role_of("model.layers.1.mlp.experts.gate_up.codes"), role_of("blk.1.ffn_gate_inp.weight"), role_of("val_7")
    ('experts', 'router', '')
    """
    return next((role for role, pattern in _ROLES if re.search(pattern, name)), "")


def layer_of(name: str) -> int | None:
    """The decoder block that a tensor of that name belongs to; None outside of the blocks."""
    found = re.search(r"(?:^|\.)(?:layers|blk|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Segment:
    """Bytes `offset` .. `offset + bytes` of `file`. `weights`: how many it holds. `tensor`: the weight that it belongs to, for codes and
    scales alike. `bits`, `width`: of its codes, and how many make a row; 0 where they can't be unpacked by that alone. `stored`: the
    format's name for the type of its numbers. `parts`: bytes by kind, of "blocks" more than one."""

    file: str
    offset: int
    bytes: int
    name: str
    kind: str
    tensor: str = ""
    weights: int = 0
    bits: int = 0
    width: int = 0
    stored: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", {self.kind: self.bytes})

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    @property
    def role(self) -> str:
        return role_of(self.tensor) if self.tensor else ""

    @property
    def layer(self) -> int | None:
        return layer_of(self.tensor)


@dataclass(frozen=True)
class ByteMap:
    """All bytes of a file or a folder, in order. Raises ValueError where they are not covered exactly once."""

    path: Path
    form: str  # "ONNX", "GGUF", "safetensors", "bundle", "model folder" or "page"
    files: Mapping[str, int]  # name: bytes
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        at = dict.fromkeys(self.files, 0)
        for s in self.segments:
            if s.bytes < 1 or s.offset != at[s.file] or sum(s.parts.values()) != s.bytes:
                raise ValueError(f"{self.path}: {s.name} ({s.bytes} bytes at {s.offset} of {s.file}) does not follow byte {at[s.file]}")
            at[s.file] = s.end
        if at != dict(self.files):
            short = next(f for f in at if at[f] != self.files[f])
            raise ValueError(f"{self.path}: {short} has {self.files[short]:,} bytes, {at[short]:,} are accounted for")

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def weights(self) -> int:
        return sum(s.weights for s in self.segments)

    def by_kind(self) -> dict[str, int]:
        """Bytes of each kind that occurs, in the order of `KINDS`."""
        found = dict.fromkeys(KINDS, 0)
        for s in self.segments:
            for kind, n in s.parts.items():
                found[kind] += n
        return {kind: n for kind, n in found.items() if n}

    def by_role(self) -> dict[str, int]:
        """Bytes by what they do in the model, most first; what is no tensor under its kind."""
        found: dict[str, int] = {}
        for s in self.segments:
            key = s.role or s.kind
            found[key] = found.get(key, 0) + s.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def bits_of(self) -> dict[str, float]:
        """Bits per weight of each tensor that holds weights: its codes and scales, wherever they lie."""
        size: dict[str, int] = {}
        weights: dict[str, int] = {}
        for s in self.segments:
            size[s.tensor] = size.get(s.tensor, 0) + s.bytes
            weights[s.tensor] = weights.get(s.tensor, 0) + s.weights
        return {t: 8 * size[t] / n for t, n in weights.items() if n}

    def at(self, file: str, offset: int) -> Segment:
        """The segment that holds byte `offset` of `file`. Raises LookupError."""
        for s in self.segments:
            if s.file == file and s.offset <= offset < s.end:
                return s
        raise LookupError(f"{self.path} has no byte {offset:,} of {file!r}; its files are {dict(self.files)}")

    def table(self) -> list[dict[str, str]]:
        """A line per kind: bytes, share, and what it adds to the bits of each weight; the sum last."""
        lines, weights = [], self.weights
        for kind, n in [*self.by_kind().items(), ("all", self.bytes)]:
            bits = f"{8 * n / weights:.4f}" if weights else ""
            what = KINDS.get(kind, f"{weights:,} weights")
            lines.append({"kind": kind, "bytes": f"{n:,}", "share": f"{n / self.bytes:.2%}", "bits per weight": bits, "what": what})
        return lines

    def __repr__(self) -> str:
        bits = f", {8 * self.bytes / self.weights:.3f} bits per weight" if self.weights else ""
        return f"ByteMap({self.path.name}, {self.form}: {self.bytes:,} bytes in {len(self.segments)} segments{bits})"


def byte_map(path: str | Path) -> ByteMap:
    """The map of a .onnx (with the .data beside it), .gguf or .safetensors file, or of the folder of a bundle, a model or a web page.

    Raises FileNotFoundError, and ValueError for a form that is not understood or a file that is damaged: cut short, lengths that point
    outside of it, tensors on top of each other.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        return _folder(path)
    from edgelab.byte_formats import READERS

    if path.suffix not in READERS:
        raise ValueError(
            f"{path.name}: its bytes can't be told apart; understood are .onnx, .gguf and .safetensors files, "
            "and the folders of a bundle, a model with safetensors, or a page written by export(..., 'web')"
        )
    form, reader = READERS[path.suffix]
    segments = tuple(reader(path))
    return ByteMap(path, form, {name: (path.parent / name).stat().st_size for name in dict.fromkeys(s.file for s in segments)}, segments)


def _folder(path: Path) -> ByteMap:
    from edgelab.byte_formats import READERS

    is_page, weights = (path / "web.json").is_file(), sorted(path.glob("*.safetensors"))
    if not is_page and not weights:
        raise ValueError(f"{path} holds neither a page (web.json) nor weights (*.safetensors); give a file of it, or such a folder")
    files = sorted((f for f in path.rglob("*") if f.is_file() and not f.is_symlink()), key=lambda f: (f.suffix not in _WEIGHTS, f))
    found = []
    for file in files:
        name = file.relative_to(path).as_posix()
        if file.suffix in _WEIGHTS:
            found += [replace(s, file=name) for s in READERS[file.suffix][1](file)]
        elif size := file.stat().st_size:
            kind = "program" if is_page and name != "web.json" else GRAPH
            found.append(Segment(name, 0, size, name, "vocabulary" if file.name in _TOKENIZERS else kind))
    sizes = {f.relative_to(path).as_posix(): f.stat().st_size for f in files}
    return ByteMap(path, "page" if is_page else "bundle" if (path / "edgelab.json").is_file() else "model folder", sizes, tuple(found))


_WEIGHTS = (".safetensors", ".onnx")
_TOKENIZERS = ("tokenizer.json", "tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tokenizer.js")


# ---------------------------------------------------------------------------------------------- codes, read out of it


def integers(map: ByteMap) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(tensor, integers int16 [rows, n], scales float32 [rows, n]) of every weight of `map` that is codes: the value is their product.

    The integers are the codes less their zero point, so that files which count codes differently can be compared. Raises ValueError where
    codes are not symmetric ones, scale * (q - 2**(bits-1)), or lie without what is needed to unpack them.
    """
    scales = {s.tensor: s for s in map.segments if s.kind == "scales"}
    for s in map.segments:
        if s.kind not in ("codes", BLOCKS):
            continue
        if not s.width or (s.kind == "codes" and s.tensor not in scales):
            raise ValueError(f"{map.path.name}: the codes of {s.tensor} can't be unpacked by what the file says of them")
        raw = _bytes_of(map, s)
        if s.kind == BLOCKS:
            yield s.tensor, *_of_blocks(map, s, raw)
            continue
        from edgelab.qtensor import unpack

        rows = s.weights // s.width
        packed = raw.reshape(rows, -1)
        whole = packed.shape[1] * 8 // s.bits  # a row that is filled up has more than its width
        codes = unpack(packed, s.bits, whole)[:, : s.width].astype(np.int16) - 2 ** (s.bits - 1)
        factors = scales[s.tensor]
        if factors.stored not in ("F16", "F32"):
            raise ValueError(f"{map.path.name}: the scales of {s.tensor} are {factors.stored or 'of an unknown type'}, neither F16 nor F32")
        values = _bytes_of(map, factors).view(np.float16 if factors.stored == "F16" else np.float32).astype(np.float32)
        values = np.repeat(values, -(-rows // len(values))).reshape(rows, -1) if len(values) < rows else values.reshape(rows, -1)
        run = -(-s.width // values.shape[1])
        run = run + -run % 8 if values.shape[1] > 1 else s.width  # groups are multiples of 8; the last may be filled up
        yield s.tensor, codes, np.repeat(values, run, axis=1)[:, : s.width]


def _bytes_of(map: ByteMap, s: Segment) -> np.ndarray:
    place = map.path / s.file if map.path.is_dir() else map.path.with_name(s.file)
    return np.fromfile(place, np.uint8, s.bytes, offset=s.offset)


def _of_blocks(map: ByteMap, s: Segment, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = s.weights // s.width
    if s.stored not in ("Q4_0", "Q8_0"):
        raise ValueError(f"{map.path.name}: {s.tensor} is {s.stored}; symmetric codes of 4 and 8 bits are Q4_0 and Q8_0")
    blocks = raw.reshape(rows, s.width // 32, -1)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    body = blocks[..., 2:]
    if s.stored == "Q8_0":
        codes = body.view(np.int8).astype(np.int16)
    else:  # byte j holds weight j in its low half and weight 16 + j in its high half
        codes = np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int16) - 8
    return codes.reshape(rows, -1), np.repeat(scales, 32, axis=1)


def row_prints(map: ByteMap) -> Counter[bytes]:
    """How often each row of codes occurs in the whole model: a digest of its integers and scales, in whatever tensor and order it lies.

    Two files with the same prints hold the same codes and scales, row for row. They may name, cut, stack and order the rows differently,
    as formats do: of *which row is where* this says nothing (the exporters' own `verify` does).
    """
    found: Counter[bytes] = Counter()
    for _, codes, scales in integers(map):
        step = 1 if codes.shape[1] % 8 else 8
        for row, factors in zip(codes, np.ascontiguousarray(scales[:, ::step]), strict=True):
            found[hashlib.blake2b(row.tobytes() + factors.tobytes(), digest_size=16).digest()] += 1
    return found
