"""Receipts: what a number needs beside it, so that somebody else can say whether they got the same one.

A receipt says what was asked for (table, seed, settings, threads), what computed it (each file of this package that the process had
loaded, with its SHA-256, and the versions of the libraries below it), on what (the files of `data/` and the fingerprint of the text),
where and when, and what came out (the SHA-256 of every file written). Its own last line is the SHA-256 of all the others.

What that is good for, and for what it is not:

    matches   the same would be computed again: nothing has to run            (`Receipt.stale` is empty)
    edited    a file is not what was written: the number in it is nobody's    (`Receipt.edited`)
    forged    who edits a file and then the receipt leaves no trace in hashes; `verify` therefore also makes the CSV, LaTeX, HTML and
              JSON files anew from the cells and compares their bytes. Who edits the cells and all of the receipts and writes the
              tables anew is found only where the values are judged, or by `edgelab reproduce --again`, which runs them

The list of files is that of the process itself (`sys.modules`), not of the repository: mending the web export does not make the table
of pruning stale. The text is not in the repository at all, it is made from the running Python's library, so its fingerprint stands for it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from edgelab.doctor import version
from edgelab.manifest import sha256
from edgelab.paths import data_dir
from edgelab.report import machine

FORMAT = 1
NAME = "receipt.json"
# what computes below us: another version may give other digits
LIBRARIES = (
    "numpy",
    "scipy",
    "torch",
    "transformers",
    "numba",
    "tokenizers",
    "safetensors",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxscript",
)
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Receipt:
    """See the module. `code`, `data`: {path below the package or below data/: SHA-256}; `outputs`: {file beside the receipt: SHA-256}."""

    table: str
    seed: int | None
    settings: Mapping[str, object]
    threads: int
    variant: str = ""
    code: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    kernels: str = ""
    wall_seconds: float = 0.0
    written: str = ""
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def code_sha256(self) -> str:
        """One hash for all of the code: over the names and hashes of its files."""
        return digest(self.code)

    def to_json(self) -> str:
        d = {"format": FORMAT, **asdict(self), "code_sha256": self.code_sha256}
        return json.dumps(d | {"sha256": digest(d)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> "Receipt":
        """The receipt in `folder`. Raises FileNotFoundError, and ValueError for one that was edited or is of another format."""
        path = Path(folder) / NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: the table was not finished, or its receipt was taken away")
        try:
            d = json.loads(path.read_text(encoding="utf-8"))
            told = d.pop("sha256")
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} is no receipt, or a damaged one: {error}") from error
        if d.get("format") != FORMAT:
            raise ValueError(f"{path}: receipt format {d.get('format')!r} is not {FORMAT}: it was written by another edgelab")
        if told != digest(d):
            raise ValueError(f"{path} was edited: its last line is not the SHA-256 of the others")
        return cls(**{k: v for k, v in d.items() if k in {f.name for f in fields(cls)}})

    def edited(self, folder: str | Path) -> list[str]:
        """What is wrong with the files that the receipt lists, a sentence each; empty when each is as it was written."""
        wrong = []
        for name, told in self.outputs.items():
            path = Path(folder) / name
            if not path.is_file():
                wrong.append(f"{name} is gone")
            elif sha256(path) != told:
                wrong.append(f"{name} was edited: its SHA-256 is not the one in the receipt")
        return wrong

    def stale(self) -> list[str]:
        """Why the same would not be computed here and now, a sentence each: other code, data, text or libraries."""
        found = []
        for what, root, told in (("code", _PACKAGE, self.code), ("data", data_dir(), self.data)):
            changed = [name for name, was in told.items() if _hash_of(root / name) != was]
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                found.append(f"other {what}: {', '.join(changed[:3])}{more} changed since")
        if self.text and (now := text_fingerprint()) != self.text:
            found.append(f"other text: the test split is {now} here and was {self.text} (made from another Python library)")
        for name, was in self.packages.items():
            if (now := version(name)) != was:
                found.append(f"other library: {name} is {now or 'not installed'} and was {was}")
        return found

    def facts(self) -> dict[str, str]:
        """The receipt in a few lines, for people."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return {
            "what": f"{self.table}{seed}" + (f", {self.variant}" if self.variant else ""),
            "settings": ", ".join(f"{k}={v}" for k, v in self.settings.items()) + f"; threads={self.threads}",
            "code": f"{self.code_sha256[:12]} ({len(self.code)} files of edgelab)",
            "data": f"{len(self.data)} files" + (f"; text {self.text}" if self.text else ""),
            "machine": self.machine,
            "kernels": self.kernels,
            "versions": ", ".join(f"{k} {v}" for k, v in self.packages.items()),
            "took": f"{self.wall_seconds:.1f} s",
            "written": self.written,
            "outputs": ", ".join(f"{name} {told[:8]}" for name, told in self.outputs.items()),
        }


def digest(d: object) -> str:
    """The SHA-256 of an object's canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": 1.5})
    True
    """
    return hashlib.sha256(json.dumps(d, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def write(folder: str | Path, receipt: Receipt, outputs: Iterable[str]) -> Receipt:
    """`receipt` with this machine, time and the hashes of `outputs` filled in, written whole to receipt.json in `folder`."""
    folder = Path(folder)
    made = replace(
        receipt,
        python=sys.version.split()[0],
        packages={name: v for name in LIBRARIES if (v := version(name)) is not None},
        machine=machine(),
        kernels=_way(),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        outputs={name: sha256(folder / name) for name in outputs},
    )
    write_text(folder / NAME, made.to_json())
    return made


def write_text(path: Path, text: str) -> Path:
    """`path`, written to a temporary name beside it and renamed: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def code_in_use() -> dict[str, str]:
    """{file below the package: SHA-256} of every module of edgelab that this process has loaded."""
    names = [n for n in sys.modules if n == "edgelab" or n.startswith("edgelab.")]
    files = {Path(f).resolve() for n in names if (f := getattr(sys.modules[n], "__file__", None)) and f.endswith(".py")}
    return {p.relative_to(_PACKAGE).as_posix(): sha256(p) for p in sorted(files) if p.is_relative_to(_PACKAGE)}


def data_in_use(names: Iterable[str]) -> dict[str, str]:
    """{file below data/: SHA-256} of the files called `names`, or lying in the folders called so. Raises FileNotFoundError."""
    root, found = data_dir(), {}
    for name in names:
        path = root / name
        if not path.exists():
            raise FileNotFoundError(f"data/{name} is not there; `python -m edgelab.manifest` says what else is missing")
        for p in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if p.is_file():
                found[p.relative_to(root).as_posix()] = sha256(p)
    return found


@cache
def embedded_corpus():
    """The corpus, made once (some seconds)."""
    from edgelab import data

    return data.corpus()


@cache
def text_fingerprint() -> str:
    """The fingerprint of the embedded corpus' test split, as this Python's library makes it."""
    from edgelab.data import fingerprint

    return fingerprint(embedded_corpus()["test"])


def _hash_of(path: Path) -> str:
    return sha256(path) if path.is_file() else ""


def _way() -> str:
    """The instructions that our kernels take here, where they were loaded."""
    simd = sys.modules.get("edgelab.kernels.simd")
    return simd.way() if simd else ""
