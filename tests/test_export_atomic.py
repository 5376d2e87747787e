"""An export that is killed, or runs out of disk, leaves the old file or none under the final name, never half of one.

A kill leaves on the disk what lies there at that moment, and nothing else. So one export is watched at each of its file operations: what
is there is looked at, and a copy of the folder is kept that the next export must be able to clean up. Real kills come on top.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from test_export_onnx import qwen3, tiny

from edgelab.export import ExportError, export
from edgelab.export.checks import whole_or_nothing

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
CASES = {
    "onnx": ("m.onnx", {}),
    "onnx, weights beside": ("m.onnx", {"single_file_bytes": 1}),
    "gguf": ("m.gguf", {}),
    "android": ("phone", {}),
}


def fingerprint(path: Path) -> str | None:
    """Of a file and what lies beside it, or of a folder; None where there is nothing."""
    if not path.exists():
        return None
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path, *path.parent.glob(f"{path.name}.data")]
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


class Watch:
    """Counts the file operations in a folder; keeps what lay under the name at each, and a copy of the folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        sys.addaudithook(self._hook)

    def start(self, folder: Path, name: str, copies: Path) -> None:
        self.name, self.copies, self.found, self.busy, self.folder = name, copies, [], False, folder

    def stop(self) -> list[tuple[str | None, Path]]:
        self.folder = None
        return self.found

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None or event not in EVENTS or self.busy or str(self.folder) not in str(args[0]):
            return
        self.busy = True
        copy = self.copies / str(len(self.found))
        shutil.copytree(self.folder, copy)
        self.found.append((fingerprint(self.folder / self.name), copy))
        self.busy = False


@pytest.fixture(scope="module")
def watch():
    return Watch()  # an audit hook stays for the life of the process: one is enough


@pytest.fixture(scope="module")
def models():
    from edgelab.model import load_tokenizer
    from edgelab.paths import data_dir

    tokenizer = load_tokenizer(data_dir() / "edge-moe")
    config = qwen3(vocab_size=len(tokenizer))
    return tiny(config, "int4-g32"), tiny(config, "int8-g32"), tokenizer


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment(case, watch, models, tmp_path):
    (old_model, new_model, tokenizer), target, (name, settings) = models, case.split(",")[0], CASES[case]
    pytest.importorskip(f"edgelab.export.{target}")
    settings = settings | ({"tokenizer": tokenizer} if target == "android" else {}) | {"check": False}
    folder, copies = tmp_path / "folder", tmp_path / "copies"
    folder.mkdir()
    out = folder / name
    beside = [f"{name}.data"] if "single_file_bytes" in settings else []
    at_once = out.suffix and not beside  # one file is replaced in one step
    for over_an_old_one in (False, True):
        shutil.rmtree(folder)
        folder.mkdir()
        if over_an_old_one:
            export(old_model, target, out, **settings)
        old = fingerprint(out)
        watch.start(folder, name, copies / str(over_an_old_one))
        export(new_model, target, out, **settings)
        found = watch.stop()
        new = fingerprint(out)
        assert new not in (old, None) and len(found) >= 3
        assert {p.name for p in folder.iterdir()} <= {name, *beside}  # nothing else stays
        for moment, (there, copy) in enumerate(found):
            where = f"killed at operation {moment} of {len(found)}, {'over an old one' if over_an_old_one else 'first'}"
            assert there in ({old, new} if at_once else {old, new, None}), f"{where}: half of one under {name}"
            # the next export, even one that fails, puts back what was there and sweeps the rest
            with pytest.raises(RuntimeError), whole_or_nothing(copy / name, *(copy / b for b in beside)):
                raise RuntimeError
            after = fingerprint(copy / name)
            assert after in (old, new) and (there is None or after == there), f"{where}: what was there is lost"
            assert {p.name for p in copy.iterdir()} <= {name, *beside}, f"{where}: something is left"


_EXPORT = """
import sys
sys.path.insert(0, "tests")
from test_export_onnx import qwen3, tiny
from edgelab.export import ExportError, export
model = tiny(qwen3(), "int4-g32")
print("ready", flush=True)
try:
    for _ in range(int(sys.argv[3])):
        export(model, sys.argv[1], sys.argv[2], check=False)
except ExportError as error:
    print(error)
"""
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_really_killed(tmp_path):
    out, draw = tmp_path / "m.gguf", random.Random(0)
    export(tiny(qwen3(), "int4-g32"), "gguf", out, check=False)
    whole = fingerprint(out)
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", _EXPORT, "gguf", str(out), "1000"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert run.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.1, 0.5))  # an export takes some milliseconds: in the middle of the n-th
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.stdout.close()
        assert fingerprint(out) == whole


@pytest.mark.parametrize("target, name", [("onnx", "m.onnx"), ("gguf", "m.gguf")])
def test_a_full_disk_is_said_and_leaves_nothing(target, name, tmp_path):
    """A file system of 16 kB, in a mount namespace of its own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here (unshare -rm)")
    script = 'mount -t tmpfs -o size=16k none "$1" && "$0" -c "$2" "$3" "$1/$4" 1 && ls -A "$1"'
    arguments = [sys.executable, str(tmp_path), _EXPORT, target, name]
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    ready, *said = run.stdout.splitlines()
    assert ready == "ready" and len(said) == 1, said  # and `ls` has nothing to show
    assert "no space left on device; nothing was left there" in said[0]


def test_a_file_that_may_not_grow_is_said(tmp_path):
    """Where no mount can be made: the system's limit on the size of a file."""
    import resource

    (tmp_path / "m").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ExportError, match=r"file too large; nothing was left"), whole_or_nothing(tmp_path / "m") as (path,):
            path.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and (tmp_path / "m").read_text() == "old"


def test_what_is_in_the_way_and_not_ours_stays(tmp_path):
    def refused(match, *paths, **settings):
        with pytest.raises(ExportError, match=match), whole_or_nothing(*paths, **settings):
            raise AssertionError("never reached")

    work = tmp_path / ".m.edgelab"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    refused(r"\.m\.edgelab is in the way and not of edgelab", tmp_path / "m")
    assert (work / "thesis.txt").read_text() == "years"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years")
    refused(r"folder is a folder with other things in it", tmp_path / "folder")
    refused(r"folder is a folder with no file page.json in it", tmp_path / "folder", ours="page.json")
    (tmp_path / "n.bin").write_text("mine")
    refused(r"n.bin exists without n.xml and would be overwritten", tmp_path / "n.xml", tmp_path / "n.bin")
    assert {p.name for p in tmp_path.iterdir()} == {".m.edgelab", "folder", "n.bin"}


def test_two_writers_of_the_same(tmp_path):
    with whole_or_nothing(tmp_path / "m") as (path,):
        path.write_text("first")
        with pytest.raises(ExportError, match=r"another process is writing .*m; wait for it"), whole_or_nothing(tmp_path / "m"):
            raise AssertionError("never reached")
    assert (tmp_path / "m").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ExportError, match="m was not written"), whole_or_nothing(tmp_path / "m"):
        pass
    assert (tmp_path / "m").read_text() == "first"


def test_a_name_of_another_format_is_no_folder(tmp_path):
    with pytest.raises(ExportError, match=r"m.gguf does not end in .onnx"):
        export(tiny(qwen3(), None), "onnx", tmp_path / "m.gguf", check=False)
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_before_moving_does_not_count_later(tmp_path):
    pair = tmp_path / "n.xml", tmp_path / "n.bin"
    for path in pair:
        path.write_text("old")
    work = tmp_path / ".n.xml.edgelab"
    work.mkdir()
    (work / "lock").touch()
    (work / "moving").touch()
    with pytest.raises(RuntimeError), whole_or_nothing(*pair):
        pair[0].unlink()  # by somebody else, meanwhile
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["n.bin"] and pair[1].read_text() == "old"
