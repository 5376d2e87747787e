"""Models that change under a running app: a slot holds versions of a bundle, and one of them answers.

    slot = ModelSlot("model")                 opens, or makes, the folder
    slot.update("downloads/edge-phone")       verified, loaded, tried; then current. Refused: BundleRefused, the old one goes on
    for token in slot.stream(ids): ...        every token by the version that was current when it began
    slot.rollback()                           the version before

    model/current             JSON: {"schema": 1, "version": digest, "previous": digest or null}. Replaced whole (os.replace)
    model/versions/<digest>/  bundles, each as it was checked; never written to again
    model/incoming/           what an update is making; swept at the next opening
    model/lock                one update at a time, also of several processes

The digest of a bundle is the sha256 of its manifest, which states the sha256 of every other file: it names all bytes. What
it cannot tell is who made them: someone who can change a bundle can write a manifest that fits. So an app gets the digest
from where it trusts (its own release, a signed message) and passes it as `expected`.

**What an update does.** Checks formats, sizes, strangers, links; compares interfaces; copies the files that the manifest lists and no
others; checks the sha256 of each in the copy; renames it into `versions/`; loads it; tries the model (`try_out`); replaces
`current`; swaps the model in memory; removes all versions but the current and the one before. Killed at any moment, `current`
names the old version or the new one, and whichever it names is whole: it is replaced only after what it names was synced.
A version that somebody still reads is not removed: its reader holds a shared lock on its manifest, which dies with the process.

**What an interface is.** Inputs, outputs, vocabulary, context, special tokens, the tokenizer's digest, the recipe's, and two
numbers that a person gives with `interface.stamp`: (major, minor), and a release number that grows. An app that keeps token ids or
knows token numbers breaks when the tokenizer changes; so another tokenizer, other special tokens, a shorter context or another
major number are refused unless `other_interface=True`, an older release unless `downgrade=True`.

POSIX (flock, rename). While an update tries the new model, both are in RAM; with `load=lazy.lazy_load` that is little.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgelab.bundle import MANIFEST, _check_sizes, load_bundle, verify_bundle
from edgelab.interface import (
    SCHEMA,
    Interface,
    digest_of,
    incompatible,
    interface,
    manifest_bytes,
    manifest_of,
    try_out,
    write_synced,
)
from edgelab.model import load_tokenizer

_SPARE = 16 * 2**20  # bytes that stay free on the disk


class BundleRefused(ValueError):
    """A bundle that a slot does not take. Nothing has changed."""


# ---------------------------------------------------------------------------------------------------------------- slot


@dataclass(eq=False)
class _Version:
    """A version in memory. `file`: its manifest, open with a shared lock, so that nobody removes the folder. `lock`: one step at a time,
    for what a model keeps between calls (expert caches, early exits) is no matter of two threads."""

    digest: str
    path: Path
    interface: Interface
    model: nn.Module
    tokenizer: object
    file: object
    lock: threading.Lock


class Stream:
    """Token ids one by one, all by one version: `for token in stream`. `version`: its digest, `ids`: the tokens so far, `text`: decoded."""

    def __init__(self, version: _Version, prompt: list[int], most: int, stop: set[int], temperature: float, seed: int | None) -> None:
        self.version, self.interface = version.digest, version.interface
        self.prompt, self.ids = prompt, []
        self._tokenizer = version.tokenizer
        self._tokens = _tokens(version, prompt, most, stop, temperature, seed)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        token = next(self._tokens)
        self.ids.append(token)
        return token

    @property
    def text(self) -> str:
        if self._tokenizer is None:
            raise ValueError("this version has no tokenizer; read .ids")
        return self._tokenizer.decode(self.ids, skip_special_tokens=True)


class ModelSlot:
    """The versions in `path` and the model of the current one; see the module. Any number of threads may use it.

    `load`: how the model of a verified bundle is made, by default `load_bundle`; `lazy.lazy_load` maps it. An empty or new folder is
    a slot without a model until the first `update`. A current version that was damaged on the disk gives way to the one before, with a
    warning; if that is damaged too, ValueError.
    """

    def __init__(self, path: str | Path, *, load: Callable[[Path], nn.Module] = load_bundle) -> None:
        self.path, self._load = Path(path), load
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path} is a file; a slot is a folder")
        self._versions, self._incoming, self._file = self.path / "versions", self.path / "incoming", self.path / "current"
        self.path.mkdir(parents=True, exist_ok=True)
        strange = {p.name for p in self.path.iterdir()} - {"current", "versions", "incoming", "lock"}
        if strange:
            raise FileExistsError(f"{self.path} holds {min(strange)!r}: it is no slot; choose an empty or new folder")
        self._versions.mkdir(exist_ok=True)
        self._now: _Version | None = None
        self._swap = threading.Lock()  # `current` and the model in memory change together
        with self._locked(wait=False) as mine:
            if mine:
                self._prune()
        self._open_current()

    # -------------------------------------------------------------------------------------------------------- what it holds

    @property
    def version(self) -> str | None:
        """The digest of the version that answers; None before the first update."""
        now = self._now
        return now.digest if now else None

    @property
    def previous(self) -> str | None:
        """The digest of the version that `rollback` goes to."""
        return self._pointer()["previous"]

    @property
    def model(self) -> nn.Module:
        """The current version's model. One that is mapped lazily needs its files: use it while its version is current or the one before
        (a `Stream` keeps its version by itself)."""
        return self._current().model

    @property
    def tokenizer(self):
        """The current version's tokenizer; None if it has none."""
        return self._current().tokenizer

    def interface(self) -> Interface:
        """Of the version that answers."""
        return self._current().interface

    def check(self, bundle: str | Path) -> list[str]:
        """Why `update(bundle)` would refuse it by its interface, a sentence each; no weight is read. Empty also without a model."""
        now = self._now
        return incompatible(now.interface, interface(bundle)) if now else []

    def __repr__(self) -> str:
        now = self._now
        if now is None:
            return f"ModelSlot({self.path}, no model yet)"
        f = now.interface
        return f"ModelSlot({self.path}, {f.model_type}, release {f.release}, {now.digest[:12]})"

    # ---------------------------------------------------------------------------------------------------------------- answers

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        stop: Sequence[int] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Stream:
        """The tokens after `prompt` (text or ids), by the version that is current now, whatever comes to be current meanwhile.

        Ends with a token of `stop` (None: the interface's end tokens), which is yielded, after `max_new_tokens`, or at the end of the
        context. `temperature` 0 takes the best token; above, tokens are drawn, with `seed`.
        """
        now = self._current()
        if isinstance(prompt, str):
            if now.tokenizer is None:
                raise ValueError(f"version {now.digest[:12]} has no tokenizer; give token ids instead of text")
            prompt = now.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids, n = [int(i) for i in prompt], now.interface.vocabulary
        outside = [i for i in ids if not 0 <= i < n]
        if not ids or outside:
            raise ValueError(
                f"the prompt has {len(ids)} ids{f', {outside[0]} among them' if outside else ''}; it needs some of 0 .. {n - 1}"
            )
        room = (now.interface.context or 1 << 62) - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {now.interface.context}: shorten it")
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more, temperature={temperature} 0 or more")
        end = set(now.interface.special_tokens["eos"] if stop is None else stop)
        return Stream(now, ids, min(max_new_tokens, room), end, temperature, seed)

    def generate(self, prompt: str | Sequence[int], max_new_tokens: int = 64, **settings) -> Stream:
        """A `Stream` that has ended: read its `.ids`, `.text` and `.version`."""
        stream = self.stream(prompt, max_new_tokens, **settings)
        for _ in stream:
            pass
        return stream

    # ----------------------------------------------------------------------------------------------------------------- changes

    def update(self, bundle: str | Path, *, expected: str | None = None, downgrade: bool = False, other_interface: bool = False) -> str:
        """The digest of `bundle`, which is now the current version. Streams that began before end with the version they began with. Of a
        digest that the slot holds whole already, its own copy is taken, and `bundle` is not read again.

        `expected`: the digest it must have. Raises BundleRefused, with the reason, and changes nothing, for a bundle that was tampered
        with, cut short, lacks a file or has one too many, holds links, was written by a newer edgelab, is of a release not above the
        current one (unless `downgrade`), has another interface (`incompatible`, unless `other_interface`), does not load or fails
        `try_out`. Raises OSError when it can't be copied, as on a full disk.
        """
        source = Path(bundle)
        with self._locked():
            pointer = self._pointer()
            current = pointer["version"]
            try:
                text = manifest_bytes(source)
                digest = hashlib.sha256(text).hexdigest()
                if expected is not None and expected != digest:
                    raise ValueError(
                        f"its digest is {digest[:12]}..., expected is {expected[:12]}...: it is another bundle, or was changed"
                    )
                manifest_of(source)
                manifest = _check_sizes(source)
                interface(source)
                if digest != current:
                    self._compare(source, current, downgrade, other_interface)
            except Exception as error:  # nothing was verified yet: its JSON may say anything
                raise self._refused(source, error) from error
            if self._now is not None and digest == current == self._now.digest and self._is_whole(digest):
                return digest
            if not self._is_whole(digest):
                try:
                    self._copy(source, digest, manifest, text)
                except ValueError as error:
                    raise self._refused(source, error) from error
            try:
                new = self._open(digest)
                if digest != current:
                    self._compare(new.path, current, downgrade, other_interface)  # the source may have changed since
                try_out(new.model, new.path)
            except Exception as error:  # whatever a damaged or strange model makes transformers raise
                new = None
                if digest not in (current, pointer["previous"]):
                    self._discard(self._versions / digest)
                raise self._refused(source, error) from error
            self._become(new, pointer["previous"] if digest == current else current)
            self._prune()
        return digest

    def rollback(self) -> str:
        """The digest of the version before, which is now current; the one that was current is now the one before, so that a second call
        goes back. Raises ValueError when there is none, BundleRefused when it was damaged meanwhile: then nothing changes."""
        with self._locked():
            pointer = self._pointer()
            if pointer["previous"] is None:
                raise ValueError(f"{self.path} has no version before {str(pointer['version'])[:12]}: nothing to go back to")
            try:
                old = self._open(pointer["previous"])
                try_out(old.model, old.path)
            except Exception as error:
                raise self._refused(self._versions / pointer["previous"], error) from error
            self._become(old, pointer["version"])
        return old.digest

    def refresh(self) -> bool:
        """Whether another process had changed `current`: its version answers from now on. Costs the reading of a small file otherwise."""
        if self._pointer()["version"] == self.version:
            return False
        self._open_current()
        return True

    # ------------------------------------------------------------------------------------------------------------------ inside

    def _current(self) -> _Version:
        now = self._now
        if now is None:
            raise ValueError(f"{self.path} has no model yet: update(bundle) first")
        return now

    def _refused(self, source: Path, error: Exception) -> BundleRefused:
        now = self._now
        goes_on = f"version {now.digest[:12]} goes on" if now else "the slot stays empty"
        return BundleRefused(f"{source} is refused, {goes_on}: {error}")

    def _compare(self, bundle: Path, current: str | None, downgrade: bool, other_interface: bool) -> None:
        """Raises ValueError when `bundle` is no successor of the version `current`."""
        new, now = interface(bundle), self._now
        if current is None:
            return
        old = now.interface if now is not None and now.digest == current else interface(self._versions / current)
        if not downgrade and old.release is not None and (new.release is None or new.release <= old.release):
            what = "no release number" if new.release is None else f"release {new.release}"
            raise ValueError(f"it has {what}, current is release {old.release}: stamp it with a higher one, or ask for downgrade=True")
        reasons = [] if other_interface else incompatible(old, new)
        if reasons:
            raise ValueError(f"its interface is not the app's ({'; '.join(reasons)}): an app that knows it passes other_interface=True")

    @contextmanager
    def _locked(self, wait: bool = True) -> Iterator[bool]:
        """Whether this thread of this process alone changes the slot, inside."""
        with (self.path / "lock").open("a") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            shutil.rmtree(self._incoming, ignore_errors=True)  # of one that was killed
            try:
                yield True
            finally:
                shutil.rmtree(self._incoming, ignore_errors=True)

    def _pointer(self) -> dict:
        """What `current` says. Raises ValueError when it can't be read."""
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            return {"schema": SCHEMA, "version": None, "previous": None}
        try:
            d = json.loads(text)
            found = {key: d[key] for key in ("schema", "version", "previous")}
        except (ValueError, KeyError, TypeError) as error:
            raise _Unreadable(f"{self._file} can't be read ({error!r})") from error
        if type(found["schema"]) is not int or found["schema"] > SCHEMA:
            raise ValueError(f"{self._file} has schema {found['schema']!r}, this edgelab reads {SCHEMA}: update the app first")
        for key in ("version", "previous"):
            if not _is_digest(found[key]) and not (key == "previous" and found[key] is None):
                raise _Unreadable(f"{self._file}: {key} is {found[key]!r:.80}, which is no sha256")
        return found

    def _become(self, new: _Version, previous: str | None) -> None:
        """Make `new` current, on the disk and in memory."""
        with self._swap:
            self._incoming.mkdir(exist_ok=True)
            text = json.dumps({"schema": SCHEMA, "version": new.digest, "previous": previous}, indent=1) + "\n"
            write_synced(self._incoming / "current", text.encode())
            os.replace(self._incoming / "current", self._file)
            _sync(self.path)
            self._now = new

    def _open_current(self) -> None:
        """Open the version that `current` names, or, with a warning, the best one that is whole."""
        for _ in range(8):  # another process may go on while this one reads
            try:
                pointer = self._pointer()
            except _Unreadable:
                break
            if pointer["version"] is None:
                return
            try:
                new = self._open(pointer["version"])
            except Exception:
                if self._pointer() != pointer:
                    continue
                break
            with self._swap:
                if self._pointer()["version"] == new.digest:
                    self._now = new
                    return
        with self._locked():
            self._fall_back()

    def _fall_back(self) -> None:
        try:
            pointer, reason = self._pointer(), ""
        except _Unreadable as error:
            pointer, reason = {"version": None, "previous": None}, str(error)
        listed = [d for d in (pointer["version"], pointer["previous"]) if d]
        for digest in listed or self._by_age():
            try:
                new = self._open(digest)
                try_out(new.model, new.path)
            except Exception as error:
                reason = reason or f"version {digest[:12]} can't be used ({error})"
                continue
            self._now = new
            if digest != pointer["version"]:
                warnings.warn(f"{self.path}: {reason}; version {digest[:12]} answers instead", stacklevel=4)
                if pointer["version"] is None or not self._is_whole(pointer["version"]):  # else it may be read another time
                    self._become(new, None)
            return
        raise ValueError(f"{self.path} has no version that can be used: {reason}; empty the folder and update(bundle) anew")

    def _by_age(self) -> list[str]:
        """The digests of what lies in `versions/`: the highest release first, then the youngest."""
        found = []
        for path in self._versions.iterdir():
            try:
                found.append((interface(path).release or 0, path.stat().st_mtime_ns, path.name))
            except (OSError, ValueError):
                continue
        return [name for *_, name in sorted(found, reverse=True) if _is_digest(name)]

    def _open(self, digest: str) -> _Version:
        """The version `digest`, verified and loaded, and kept from being removed while it is in memory."""
        path = self._versions / digest
        file = (path / MANIFEST).open("rb")
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            found = hashlib.sha256(file.read()).hexdigest()
            if found != digest:
                raise ValueError(f"{path / MANIFEST} was changed: its sha256 is {found[:12]}..., the version is {digest[:12]}...")
            verify_bundle(path)
            face = interface(path)
            tokenizer = load_tokenizer(path) if face.tokenizer is not None else None
            return _Version(digest, path, face, self._load(path).eval(), tokenizer, file, threading.Lock())
        except BaseException:
            file.close()  # a traceback would keep it, and its lock
            raise

    def _is_whole(self, digest: str) -> bool:
        path = self._versions / digest
        try:
            verify_bundle(path)
            return digest_of(path) == digest
        except (OSError, ValueError):
            return False

    def _copy(self, source: Path, digest: str, manifest: dict, text: bytes) -> None:
        """Put a verified copy of `source` into `versions/`. The disk has it when this returns."""
        needed = sum(entry["bytes"] for entry in manifest["files"].values()) + len(text) + _SPARE
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(f"{source} takes {needed:,} bytes, the disk of {self.path} has {free:,} free: make room; nothing was changed")
        place = self._incoming / digest
        place.mkdir(parents=True)
        for name, entry in manifest["files"].items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(source / name, os.O_RDONLY | os.O_NOFOLLOW)
            with open(fd, "rb") as f:
                write_synced(place / name, f, entry["bytes"])
        write_synced(place / MANIFEST, text)
        verify_bundle(place)
        for folder in {(place / name).parent for name in manifest["files"]} | {place}:
            _sync(folder)
        self._discard(self._versions / digest, read=True)  # the same, damaged
        os.rename(place, self._versions / digest)
        _sync(self._versions)

    def _prune(self) -> None:
        """Remove every version but the current and the one before, and those that somebody reads."""
        try:
            pointer = self._pointer()
        except ValueError:
            return  # of a damaged slot nothing is removed
        for path in self._versions.iterdir():
            if path.name not in (pointer["version"], pointer["previous"]):
                self._discard(path)

    def _discard(self, path: Path, read: bool = False) -> None:
        """Remove a version, unless somebody reads it (`read`: even then; what is mapped lives on). It never lies there in part."""
        if not path.exists():
            return
        manifest = path / MANIFEST
        with manifest.open("rb") if manifest.is_file() else (self.path / "lock").open("rb") as f:
            if manifest.is_file() and not read:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
            self._incoming.mkdir(exist_ok=True)
            away = Path(tempfile.mkdtemp(prefix="old.", dir=self._incoming))
            os.rename(path, away / path.name)  # at the end of `_locked` it goes


class _Unreadable(ValueError):
    """`current` was damaged."""


def _tokens(version: _Version, prompt: list[int], most: int, stop: set[int], temperature: float, seed: int | None) -> Iterator[int]:
    draw = torch.Generator()
    draw.manual_seed(seed) if seed is not None else draw.seed()
    ids, past = prompt, None
    for _ in range(most):
        with version.lock, torch.no_grad():  # never while the caller has the token
            out = version.model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[0, -1].float()
        token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw) if temperature else logits.argmax())
        yield token
        if token in stop:
            return
        ids = [token]


def _is_digest(text) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _sync(folder: Path) -> None:
    """Have the entries of a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
