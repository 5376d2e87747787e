"""The ledger of `data/`: every file with its bytes, SHA-256, origin and licence, in `data/manifest.json`.

    python -m edgelab.manifest            say what differs from the ledger (exit 1 if anything does)
    python -m edgelab.manifest --write    write the ledger anew, after a file of data/ was made again

A file whose origin is not told below cannot enter the ledger: that is the point of it.
"""

import hashlib
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from edgelab.paths import data_dir

NAME = "manifest.json"

_TRAINED = "trained from scratch by this project (python -m edgelab.pretrain {}) on CPython's standard library and on generated text"
# (pattern of the path below data/, origin, licence); the first match holds.
ORIGINS = [
    ("edge-moe/README.md", "written by this project", "Apache-2.0"),
    ("edge-dense/README.md", "written by this project", "Apache-2.0"),
    ("edge-moe/*", _TRAINED.format("moe"), "Apache-2.0"),
    ("edge-dense/*", _TRAINED.format("dense"), "Apache-2.0"),
    ("edge-phone/*", "made from edge-moe by this project (python -m edgelab.phone)", "Apache-2.0"),
    ("studies/*", "measured by this project (python -m edgelab.studies)", "Apache-2.0"),
    ("tables/*", "measured by this project (python -m edgelab.reproduce)", "Apache-2.0"),
    ("sweep.parquet", "measured by this project (edgelab sweep)", "Apache-2.0"),
    ("README.md", "written by this project", "Apache-2.0"),
    ("devices.toml", "collected by this project; each number names its source", "Apache-2.0"),
    ("published.toml", "published measurements, collected by this project; each names its source", "Apache-2.0"),
    ("claims.csv", "claims of five articles, with rules by this project", "Apache-2.0"),
    ("economics.toml", "collected by this project; each range names its source", "Apache-2.0"),
]


def origin_of(path: str) -> tuple[str, str]:
    """(origin, licence) of the file `path` below data/.

    >>> origin_of("README.md")
    ('written by this project', 'Apache-2.0')

    Raises ValueError for a file that `ORIGINS` does not know.
    """
    for pattern, origin, licence in ORIGINS:
        if fnmatchcase(path, pattern):
            return origin, licence
    raise ValueError(f"data/{path} has no known origin: add its line to edgelab.manifest.ORIGINS, or take the file out of data/")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(p.as_posix() for p in found if p.name != NAME and not any(part.startswith(".") for part in p.parts))


def survey(folder: Path | None = None) -> dict[str, dict[str, str | int]]:
    """{path below `folder`: {bytes, sha256, origin, licence}} of every file there, as it is now."""
    folder = folder or data_dir()
    ledger: dict[str, dict[str, str | int]] = {}
    for name in _files(folder):
        origin, licence = origin_of(name)
        path = folder / name
        ledger[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "origin": origin, "licence": licence}
    return ledger


def write(folder: Path | None = None) -> Path:
    """The path of the ledger, written anew from the files that are there."""
    folder = folder or data_dir()
    target = folder / NAME
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_text(json.dumps({"format": 1, "files": survey(folder)}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)
    return target


def check(folder: Path | None = None) -> list[str]:
    """What is wrong with `folder` by its ledger, a sentence each; an empty list means that every file is as recorded.

    Raises FileNotFoundError where there is no ledger.
    """
    folder = folder or data_dir()
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"no {NAME} in {folder}; `python -m edgelab.manifest --write` makes it")
    recorded = json.loads(path.read_text(encoding="utf-8"))["files"]
    there = _files(folder)
    wrong = [f"{name} is recorded but not there" for name in sorted(set(recorded) - set(there))]
    for name in there:
        if name not in recorded:
            wrong.append(f"{name} is there but not recorded")
        elif (size := (folder / name).stat().st_size) != recorded[name]["bytes"]:
            wrong.append(f"{name} has {size} bytes, recorded are {recorded[name]['bytes']}")
        elif sha256(folder / name) != recorded[name]["sha256"]:
            wrong.append(f"{name} has other contents than recorded (SHA-256 differs)")
        elif origin_of(name) != (recorded[name]["origin"], recorded[name]["licence"]):
            wrong.append(f"{name} is recorded with another origin or licence than edgelab.manifest tells")
    return wrong


def main() -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m edgelab.manifest", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the ledger anew")
    parser.add_argument("--data", type=Path, help="the folder (default: the package's own data)")
    args = parser.parse_args()
    if args.write:
        print(f"wrote {write(args.data)}")
        return 0
    wrong = check(args.data)
    print("\n".join(wrong) or "every file is as recorded")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
