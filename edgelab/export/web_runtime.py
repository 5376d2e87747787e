"""ONNX Runtime Web: three files of its npm package, checked against their sha256 and kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgelab.export import ExportError
from edgelab.export.checks import whole_or_nothing

RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_FILES = {  # of dist/ in the npm package; the wasm-only build, a third of the one with WebGPU
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}

_MIT = """ort/ holds three files of ONNX Runtime Web {version} (npm package onnxruntime-web, folder dist), unchanged.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

What the runtime itself is built from is listed in ThirdPartyNotices.txt of github.com/microsoft/onnxruntime, tag v{version}.
"""


def cache_dir() -> Path:
    """Where the runtime's files are kept between exports: `$XDG_CACHE_HOME/edgelab` or `~/.cache/edgelab`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgelab" / f"{RUNTIME}-{RUNTIME_VERSION}"


def runtime_files(source: str | Path | None = None) -> dict[str, Path]:
    """{name: path} of the three files of ONNX Runtime Web that a page needs, each with the sha256 that stands in this module.

    `source`: a folder that holds them (also the unpacked npm package, or a node_modules), or the package's .tgz. Without it
    they come from the cache of this user, and when that is empty `npm pack` fetches them once: the one step that needs a network.
    Raises ExportError when they cannot be had, or are not the ones of version 1.30.0.
    """
    cache = cache_dir()
    if source is None:
        if not all((cache / name).is_file() for name in RUNTIME_FILES):
            with tempfile.TemporaryDirectory() as folder:
                _keep(_from_tarball(_npm_pack(Path(folder))), cache)
        found = {name: cache / name for name in RUNTIME_FILES}
    else:
        source = Path(source).expanduser()
        if source.is_file():
            _keep(_from_tarball(source), cache)
            found = {name: cache / name for name in RUNTIME_FILES}
        else:
            places = [source, source / "dist", source / "package" / "dist", source / RUNTIME / "dist", source / "ort"]
            place = next((p for p in places if all((p / name).is_file() for name in RUNTIME_FILES)), None)
            if place is None:
                raise ExportError(f"{source} holds no {', '.join(RUNTIME_FILES)}; give the folder dist of {RUNTIME} {RUNTIME_VERSION}")
            found = {name: place / name for name in RUNTIME_FILES}
    for name, path in found.items():
        _check_runtime(name, path.read_bytes(), str(path))
    return found


def _check_runtime(name: str, content: bytes, where: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != RUNTIME_FILES[name]:
        raise ExportError(
            f"{where} has the sha256 {digest[:12]}..., that of {RUNTIME} {RUNTIME_VERSION} is {RUNTIME_FILES[name][:12]}...: "
            "it is another version, or damaged. Remove it, and it is fetched again"
        )


def _npm_pack(folder: Path) -> Path:
    """The package's tarball, fetched into `folder` by npm."""
    way_out = (
        f"On a machine with a network run `npm pack {RUNTIME}@{RUNTIME_VERSION}`, bring the .tgz here and pass runtime=<that file>; "
        f"it is kept in {cache_dir()} from then on"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(f"the browser's runtime ({RUNTIME} {RUNTIME_VERSION}) is not in the cache and npm is not installed. {way_out}")
    command = [npm, "pack", f"{RUNTIME}@{RUNTIME_VERSION}", "--silent", "--pack-destination", str(folder), "--fetch-retries", "1"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    except subprocess.TimeoutExpired:
        raise ExportError(f"npm did not fetch {RUNTIME} {RUNTIME_VERSION} within 5 minutes. {way_out}") from None
    tarball = next(iter(folder.glob("*.tgz")), None)
    if done.returncode or tarball is None:
        said = next((line for line in done.stderr.splitlines() if line.strip()), f"exit code {done.returncode}")
        raise ExportError(f"npm could not fetch {RUNTIME} {RUNTIME_VERSION} ({said.strip()}). {way_out}")
    return tarball


def _from_tarball(tarball: Path) -> dict[str, bytes]:
    """The three files' contents; nothing else of the archive is read or written."""
    try:
        with tarfile.open(tarball) as tar:
            contents = {name: tar.extractfile(f"package/dist/{name}").read() for name in RUNTIME_FILES}
    except (tarfile.TarError, KeyError, OSError, AttributeError) as e:
        raise ExportError(f"{tarball} is not the npm package {RUNTIME} {RUNTIME_VERSION} ({e})") from e
    for name, content in contents.items():
        _check_runtime(name, content, f"{tarball}: {name}")
    return contents


def _keep(contents: Mapping[str, bytes], cache: Path) -> None:
    for name, content in contents.items():  # each is checked again when it is read
        with whole_or_nothing(cache / name) as (place,):
            place.write_bytes(content)
