"""Hot update: every stream is one version's, what is not whole never answers, and a kill at any moment leaves a slot that opens."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import tiny

from edgelab import Recipe, save_bundle
from edgelab.bundle import MANIFEST, _sha256, load_bundle, verify_bundle
from edgelab.compress import compress
from edgelab.hot import BundleRefused, ModelSlot
from edgelab.interface import _tokenizer_digest, digest_of, incompatible, interface, stamp, try_out
from edgelab.lazy import lazy_load

EDGE_PHONE = Path(__file__).parents[1] / "data" / "edge-phone"
PROMPT = [5, 17, 3]


def words(swapped: bool = False):
    """A tokenizer of 95 words and one for all others; `swapped`: two of them have each other's number."""
    vocabulary = {"?": 95} | {f"w{i}": i for i in range(95)}
    if swapped:
        vocabulary["w7"], vocabulary["w8"] = 8, 7
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def made(out: Path, seed: int, release: int | None, *, tokenizer=None, change=None, **numbers) -> Path:
    """A small Llama of other weights for each seed, at int8."""
    model = tiny("llama")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.4, generator=draw)
    if change is not None:
        change(model)
    recipe = Recipe.uniform("int8-row")
    c = compress(model, recipe, progress=False)
    save_bundle(c.model, tokenizer or words(), out, recipe=recipe, coverage=c.coverage, max_chunk_bytes=12_000)
    if release is not None:
        stamp(out, release=release, **numbers)
    return out


@torch.no_grad()
def greedy(bundle: Path, n: int = 12, prompt=PROMPT) -> list[int]:
    """What the bundle's model says, the whole text computed anew for each token: the reference."""
    model, ids = load_bundle(bundle), list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two bundles, releases 1 and 2, that answer differently."""
    folder = tmp_path_factory.mktemp("pair")
    a, b = made(folder / "a", 1, 1), made(folder / "b", 2, 2)
    assert greedy(a) != greedy(b)
    return a, b


@pytest.fixture
def copied(pair, tmp_path):
    """A copy of the second bundle, to damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def say(slot: ModelSlot, n: int = 12) -> list[int]:
    return slot.generate(PROMPT, n, stop=()).ids


def left(slot: ModelSlot) -> set[str]:
    """What lies in the slot's folder, versions by name."""
    return {p.relative_to(slot.path).as_posix() for pattern in ("*", "versions/*", "incoming/*") for p in slot.path.glob(pattern)}


def holds(slot: ModelSlot, *versions: str) -> None:
    assert left(slot) == {"current", "lock", "versions", *(f"versions/{v}" for v in versions)}


# ------------------------------------------------------------------------------------------------------------- answers


def test_a_slot_answers_updates_and_is_opened_again(pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    assert slot.version is None and slot.check(a) == []
    with pytest.raises(ValueError, match=r"has no model yet|no model yet: update"):
        slot.generate(PROMPT)
    assert slot.update(a) == digest_of(a) == slot.version
    assert say(slot) == greedy(a)
    assert slot.update(a) == digest_of(a)  # once more: nothing to do
    assert slot.previous is None
    assert slot.update(b, expected=digest_of(b)) == digest_of(b)
    assert say(slot) == greedy(b) and slot.previous == digest_of(a)
    holds(slot, digest_of(a), digest_of(b))
    for version in (a, b):
        assert digest_of(verify_path := slot.path / "versions" / digest_of(version)) == digest_of(version)
        assert verify_bundle(verify_path)["recipe_digest"] == interface(version).recipe_digest
    again = ModelSlot(tmp_path / "slot")
    assert say(again) == greedy(b) and again.interface() == interface(b) and "release 2" in repr(again)


def test_a_stream_ends_with_the_version_it_began_with(pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    before = slot.stream(PROMPT, 12, stop=())
    unstarted = slot.stream(PROMPT, 12, stop=())
    first = [next(before) for _ in range(5)]
    slot.update(b)
    assert say(slot) == greedy(b)
    assert first + list(before) == list(unstarted) == before.ids == greedy(a)
    assert (before.version, before.interface.release) == (digest_of(a), 1)


def test_ends_of_a_stream_and_text(pair, tmp_path):
    a, _ = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    want = greedy(a)
    assert slot.generate(PROMPT, 12, stop=[want[4]]).ids == want[: want.index(want[4]) + 1]
    assert len(slot.generate([1] * 60, 64, stop=()).ids) == 4  # 64 is the context
    said = slot.generate("w5 w17 w3", 3, stop=())
    assert said.ids == want[:3] and said.text.split() == [f"w{i}" for i in want[:3]] and 95 not in want[:3]
    drawn = [slot.generate(PROMPT, 12, stop=(), temperature=2.0, seed=s).ids for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for prompt, n, says in (
        ([96], 4, "96 among them; it needs some of 0 .. 95"),
        ([], 4, "has 0 ids"),
        ([1] * 64, 4, "64 tokens, the context 64"),
    ):
        with pytest.raises(ValueError, match=says):
            slot.stream(prompt, n)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be 1"):
        slot.stream(PROMPT, 0)


def test_embedded_model_in_a_slot(tmp_path):
    slot = ModelSlot(tmp_path / "slot", load=lazy_load)
    slot.update(EDGE_PHONE)
    face = slot.interface()
    assert (face.model_type, face.vocabulary, face.context, face.release) == ("deepseek_v3", 2048, 1024, None)
    assert face.special_tokens["eos"] == (0,) and len(face.tokenizer) == 64
    prompt = slot.tokenizer("def main")["input_ids"]
    assert slot.generate(prompt, 8, stop=()).ids == greedy(EDGE_PHONE, 8, prompt)
    other = Path(shutil.copytree(EDGE_PHONE, tmp_path / "stamped"))
    stamp(other, release=1)
    assert slot.update(other) == digest_of(other) and slot.interface().release == 1  # what had no number may get one
    with pytest.raises(BundleRefused, match="no release number, current is release 1"):
        slot.update(EDGE_PHONE)


# ------------------------------------------------------------------------------------------------------------ interface


def test_stamp_states_what_the_files_say_and_keeps_the_bundle(pair, tmp_path):
    a, _ = pair
    bundle = Path(shutil.copytree(a, tmp_path / "c"))
    before = {f.name: f.read_bytes() for f in bundle.iterdir() if f.name != MANIFEST}
    digest = stamp(bundle, release=7, major=2, minor=3, reference=[1, 2, 3])
    assert digest == digest_of(bundle) != digest_of(a)
    assert {f.name: f.read_bytes() for f in bundle.iterdir() if f.name != MANIFEST} == before
    assert {f.name for f in tmp_path.iterdir()} == {"c"}
    manifest = verify_bundle(bundle)
    face = interface(bundle)
    assert (face.major, face.minor, face.release, face.vocabulary, face.context) == (2, 3, 7, 96, 64)
    assert manifest["interface"]["states"]["vocabulary"] == 96 and manifest["recipe_digest"] == face.recipe_digest
    reference = manifest["interface"]["reference"]
    with torch.no_grad():
        logits = load_bundle(bundle)(torch.tensor([[1, 2, 3]])).logits[0]
    torch.testing.assert_close(torch.tensor(reference["logits"]), logits[:, reference["columns"]], rtol=1e-5, atol=1e-5)
    transformers.AutoModelForCausalLM.from_pretrained(bundle)
    for settings, says in (
        ({"release": -1}, "release=-1"),
        ({"release": 1, "major": "2"}, "major='2'"),
        ({"release": 1, "reference": [96]}, "0 .. 95"),
    ):
        with pytest.raises(ValueError, match=says):
            stamp(bundle, **settings)


def test_the_digest_of_a_tokenizer_is_of_its_meaning(pair, tmp_path):
    a, _ = pair
    bundle = Path(shutil.copytree(a, tmp_path / "c"))
    file = bundle / "tokenizer.json"
    d = json.loads(file.read_text())
    file.write_text(json.dumps(d | {"padding": None}, indent=7))  # laid out anew
    assert _tokenizer_digest(bundle) == interface(a).tokenizer
    d["model"]["vocab"]["w7"], d["model"]["vocab"]["w8"] = 8, 7
    file.write_text(json.dumps(d))
    assert _tokenizer_digest(bundle) != interface(a).tokenizer


def test_incompatible_interfaces_are_refused_unless_asked_for(pair, tmp_path):
    slot = ModelSlot(tmp_path / "slot")
    slot.update(pair[0])

    def shorter(model):
        model.config.max_position_embeddings = 32

    def other_end(model):
        model.generation_config.eos_token_id = 3

    cases = {
        "tokenizer: .* became": made(tmp_path / "t", 3, 5, tokenizer=words(swapped=True)),
        "major number of the interface: 1 became 2": made(tmp_path / "m", 3, 5, major=2),
        "context: 64 tokens became 32": made(tmp_path / "c", 3, 5, change=shorter),
        "special_tokens: .* became": made(tmp_path / "e", 3, 5, change=other_end),
    }
    for says, bundle in cases.items():
        (reason,) = slot.check(bundle)
        with pytest.raises(BundleRefused, match=f"is not the app's .{says}.*other_interface=True"):
            slot.update(bundle)
        assert incompatible(interface(pair[0]), interface(bundle)) == [reason]
    holds(slot, digest_of(pair[0]))
    assert say(slot) == greedy(pair[0])
    slot.update(cases["major number of the interface: 1 became 2"], other_interface=True)
    assert slot.interface().major == 2
    minor = made(tmp_path / "minor", 4, 6, major=2, minor=9)
    assert slot.update(minor) == slot.version


# ------------------------------------------------------------------------------------------------------------- refusals


def restate(bundle: Path, change=lambda manifest: None) -> None:
    """A manifest that fits the files as they are now: what somebody writes who tampers with care."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (bundle / name).stat().st_size, "sha256": _sha256(bundle / name)}
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def chunk_of(bundle: Path) -> Path:
    return sorted(bundle.glob("*.safetensors"))[1]


def flip(bundle: Path, name: str | None = None, at: int = -5) -> None:
    file = bundle / name if name else chunk_of(bundle)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def poison(bundle: Path) -> None:
    """NaN among the weights, with a manifest that fits."""
    for file in bundle.glob("*.safetensors"):
        tensors = load_file(file)
        name = next((n for n in tensors if n.endswith("norm.weight")), None)
        if name:
            tensors[name] = torch.full_like(tensors[name], float("nan"))
            save_file(tensors, file, {"format": "pt"})
    restate(bundle)


def replace_text(file: Path, old: str, new: str) -> None:
    assert old in file.read_text() and len(old) == len(new)
    file.write_text(file.read_text().replace(old, new, 1))


def linked(bundle: Path, name: str) -> None:
    target = bundle.parent / f"{name}.elsewhere"
    (bundle / name).rename(target)
    (bundle / name).symlink_to(target)


def exchange(bundle: Path) -> None:
    """Another model's weights under a manifest that fits, but for the reference logits."""
    for file in bundle.glob("*.safetensors"):
        tensors = {n: t.roll(1, 0).contiguous() if n.endswith("packed") else t for n, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    restate(bundle)


def grow_vocabulary(bundle: Path) -> None:
    d = json.loads((bundle / "tokenizer.json").read_text())
    d["model"]["vocab"]["w96"] = 96
    (bundle / "tokenizer.json").write_text(json.dumps(d))
    restate(bundle, lambda m: m.pop("interface"))


def write(name: str, text: str):
    return lambda bundle: (bundle / name).write_text(text)


def write_config(text: str):
    return lambda bundle: ((bundle / "config.json").write_text(text), restate(bundle))


DAMAGE = {
    "one byte of a weight": (flip, "sha256 is"),
    "one byte of a header": (lambda b: flip(b, chunk_of(b).name, 30), "sha256 is"),
    "one byte of the config": (lambda b: replace_text(b / "config.json", "1e-06", "1e-05"), "sha256 is"),
    "one byte of the tokenizer": (lambda b: flip(b, "tokenizer.json", 40), "sha256 is|can't be|no readable JSON"),
    "cut short": (lambda b: os.truncate(chunk_of(b), 1000), "has 1,000 bytes, the manifest says"),
    "emptied": (lambda b: os.truncate(chunk_of(b), 0), "has 0 bytes, the manifest says"),
    "a chunk is missing": (lambda b: chunk_of(b).unlink(), "is missing"),
    "the config is missing": (lambda b: (b / "config.json").unlink(), "is missing"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), "there is no edgelab.json"),
    "a strange file": (write("model.safetensors", "x"), "is not in the manifest"),
    "a strange folder with a file": (lambda b: ((b / "x").mkdir(), (b / "x/y").write_text("z")), "x/y is not in the manifest"),
    "a linked weight": (lambda b: linked(b, chunk_of(b).name), "is a link"),
    "a linked manifest": (lambda b: linked(b, MANIFEST), "is a link"),
    "a strange link": (lambda b: (b / "extra").symlink_to("/etc/passwd"), "is not in the manifest"),
    "a pipe instead of a file": (lambda b: (chunk_of(b).unlink(), os.mkfifo(b / chunk_name(b))), "is missing|not in the manifest"),
    "outside of the folder": (
        lambda b: restate(b, lambda m: m["files"].update({"../outside": {"bytes": 1, "sha256": "0" * 64}})),
        "outside the bundle",
    ),
    "no JSON": (write(MANIFEST, "{"), "no readable JSON"),
    "a newer format": (lambda b: restate(b, lambda m: m.update(format=99)), "format 99, this edgelab reads 1: update the app first"),
    "a newer schema": (lambda b: restate(b, lambda m: m["interface"].update(schema=99)), "schema 99, this edgelab reads 1: update the app"),
    "an older release": (lambda b: restate(b, lambda m: m["interface"].update(release=0)), "release 0, current is release 1"),
    "the same release": (lambda b: restate(b, lambda m: m["interface"].update(release=1)), "release 1, current is release 1"),
    "no release": (lambda b: restate(b, lambda m: m.pop("interface")), "no release number"),
    "a false statement": (lambda b: restate(b, lambda m: m["interface"]["states"].update(context=128)), "states context 128, its"),
    "NaN": (poison, "NaN or infinity"),
    "other weights": (exchange, "differ from the manifest's reference"),
    "a config that is no object": (write_config("[]"), "holds no JSON object"),
    "a strange text_config": (write_config('{"text_config": "x"}'), "is refused"),
    "a config that transformers refuses": (
        lambda b: (replace_text(b / "config.json", '"llama"', '"lampa"'), restate(b, lambda m: m["interface"].pop("states"))),
        "'lampa' .* is not an architecture",
    ),
}  # fmt: skip


def chunk_name(bundle: Path) -> str:
    manifest = json.loads((bundle / MANIFEST).read_text())
    return next(n for n in manifest["files"] if n.endswith(".safetensors") and not (bundle / n).exists())


@pytest.fixture(scope="module")
def running(pair, tmp_path_factory):
    """A slot with the first bundle, and what it says."""
    slot = ModelSlot(tmp_path_factory.mktemp("running") / "slot")
    slot.update(pair[0])
    return slot, greedy(pair[0])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_and_the_old_one_goes_on(damage, running, pair, copied):
    (slot, want), (change, says) = running, DAMAGE[damage]
    stream = slot.stream(PROMPT, 12, stop=())
    first = [next(stream) for _ in range(3)]
    change(copied)
    with pytest.raises(BundleRefused, match=says) as refusal:
        slot.update(copied)
    assert f"version {digest_of(pair[0])[:12]} goes on" in str(refusal.value)
    assert first + list(stream) == want == say(slot)
    holds(slot, digest_of(pair[0]))


def test_who_writes_a_fitting_manifest_is_found_by_the_digest(running, pair, copied):
    """A tampered bundle with a manifest that fits and no reference passes every other check: only its digest tells."""
    slot, _ = running
    expected = digest_of(copied)
    exchange(copied)
    restate(copied, lambda m: m["interface"].pop("reference"))
    with pytest.raises(BundleRefused, match=r"its digest is .* expected is"):
        slot.update(copied, expected=expected)
    other = ModelSlot(copied.parent / "slot")
    other.update(pair[0])
    assert other.update(copied) == other.version  # as said in the module's docstring


def test_a_downgrade_when_asked_for(pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(b)
    with pytest.raises(BundleRefused, match="release 1, current is release 2"):
        slot.update(a)
    slot.update(a, downgrade=True)
    assert say(slot) == greedy(a)


def test_a_first_bundle_may_be_refused_too(pair, copied, tmp_path):
    slot = ModelSlot(tmp_path / "slot")
    flip(copied)
    with pytest.raises(BundleRefused, match="the slot stays empty"):
        slot.update(copied)
    assert slot.version is None and ModelSlot(tmp_path / "slot").version is None
    slot.update(pair[1])
    assert say(slot) == greedy(pair[1])


def test_what_try_out_looks_at(pair, copied):
    model = load_bundle(copied)
    try_out(model, copied)
    grow_vocabulary(copied)
    with pytest.raises(ValueError, match="the tokenizer has the token 96, the model's vocabulary ends at 95"):
        try_out(model, copied)
    d = json.loads((copied / "generation_config.json").read_text()) | {"eos_token_id": [0, 200]}
    (copied / "generation_config.json").write_text(json.dumps(d))
    with pytest.raises(ValueError, match=r"special tokens \{'eos': 200\} are outside the vocabulary of 96"):
        try_out(model, copied)
    smaller = tiny("llama")
    smaller.resize_token_embeddings(90)
    with pytest.raises(ValueError, match="the embedding has 90 rows"):
        try_out(smaller, pair[1])


def test_a_full_disk_changes_nothing(pair, tmp_path, monkeypatch):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"takes .* bytes, the disk of .* has 1,000 free: make room; nothing was changed"):
        slot.update(b)
    monkeypatch.undo()
    real = os.fsync

    def full(fd):
        if "incoming" in os.readlink(f"/proc/self/fd/{fd}") and os.readlink(f"/proc/self/fd/{fd}").endswith("tokenizer.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        slot.update(b)
    monkeypatch.undo()
    holds(slot, digest_of(a))
    assert say(slot) == greedy(a)
    slot.update(b)
    assert say(slot) == greedy(b)


# -------------------------------------------------------------------------------------------------- back, and other readers


def test_rollback_goes_back_and_forth(pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    with pytest.raises(ValueError, match="nothing to go back to"):
        slot.rollback()
    slot.update(b)
    assert slot.rollback() == digest_of(a) and say(slot) == greedy(a)
    assert say(ModelSlot(tmp_path / "slot")) == greedy(a)
    assert slot.rollback() == digest_of(b) and say(slot) == greedy(b)
    old = slot.path / "versions" / digest_of(a)
    chunk_of(old).chmod(0o644)
    flip(old)
    with pytest.raises(BundleRefused, match="sha256"):
        slot.rollback()
    assert say(slot) == greedy(b) == say(ModelSlot(tmp_path / "slot"))


def test_a_version_damaged_on_the_disk_gives_way_to_the_one_before(pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    slot.update(b)
    broken = slot.path / "versions" / digest_of(b)
    chunk_of(broken).chmod(0o644)
    flip(broken)
    with pytest.warns(UserWarning, match=f"can't be used .*sha256.*version {digest_of(a)[:12]} answers instead"):
        again = ModelSlot(tmp_path / "slot")
    assert say(again) == greedy(a) and again.previous is None
    assert again.update(b) == digest_of(b) and say(again) == greedy(b)  # and the damaged copy is replaced
    holds(again, digest_of(a), digest_of(b))
    for version in (a, b):
        shutil.rmtree(slot.path / "versions" / digest_of(version))
    with pytest.raises(ValueError, match="no version that can be used"):
        ModelSlot(tmp_path / "slot")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "version": "../../x", "previous": null}'])
def test_a_damaged_pointer(text, pair, tmp_path):
    a, b = pair
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    slot.update(b)
    (slot.path / "current").write_text(text)
    with pytest.warns(UserWarning, match="current.*answers instead"):
        again = ModelSlot(tmp_path / "slot")
    assert say(again) == greedy(b)  # the highest release
    assert json.loads((slot.path / "current").read_text())["version"] == digest_of(b)


def test_a_newer_pointer_and_a_folder_that_is_no_slot(pair, tmp_path):
    slot = ModelSlot(tmp_path / "slot")
    slot.update(pair[0])
    (slot.path / "current").write_text(json.dumps({"schema": 2, "version": slot.version, "previous": None}))
    with pytest.raises(ValueError, match="has schema 2, this edgelab reads 1: update the app first"):
        ModelSlot(tmp_path / "slot")
    with pytest.raises(FileExistsError, match="it is no slot"):
        ModelSlot(pair[0])
    with pytest.raises(NotADirectoryError, match="is a file"):
        ModelSlot(pair[0] / MANIFEST)
    verify_bundle(pair[0])


def test_another_process_s_update_is_seen_and_what_it_reads_stays(pair, tmp_path):
    a, b = pair
    c = made(tmp_path / "c", 3, 3)
    reader = ModelSlot(tmp_path / "slot", load=lazy_load)
    reader.update(a)
    writer = ModelSlot(tmp_path / "slot")
    stream = reader.stream(PROMPT, 12, stop=())
    next(stream)
    writer.update(b)
    writer.update(c)  # a is now neither current nor the one before
    assert (slot_a := writer.path / "versions" / digest_of(a)).is_dir()  # but somebody reads it
    assert reader.version == digest_of(a) and reader.refresh() and not reader.refresh()
    assert say(reader) == greedy(c)
    list(stream)
    assert stream.ids == greedy(a)
    del stream
    ModelSlot(tmp_path / "slot")
    assert not slot_a.exists()
    holds(writer, digest_of(b), digest_of(c))


# ------------------------------------------------------------------------------------------------------- many at once


def test_threads_stream_while_versions_change(pair, tmp_path):
    """Four threads, twenty swaps: each stream is wholly one version's, and both versions are seen."""
    a, b = pair
    want = {digest_of(x): greedy(x, 10) for x in pair}
    slot = ModelSlot(tmp_path / "slot")
    slot.update(a)
    done, wrong, counts = threading.Event(), [], {v: 0 for v in want}
    mixed = threading.Lock()

    def read() -> None:
        try:
            while not done.is_set():
                stream = slot.stream(PROMPT, 10, stop=())
                ids = list(stream)
                with mixed:
                    counts[stream.version] += 1
                    if ids != want[stream.version]:
                        wrong.append((stream.version, ids))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    swaps = []
    for i in range(20):
        swaps.append(slot.update((b, a)[i % 2], downgrade=True))
        time.sleep(0.01)
    done.set()
    for t in threads:
        t.join()
    assert not wrong and len(swaps) == 20 and min(counts.values()) > 0
    holds(slot, *want)


# ------------------------------------------------------------------------------------------------------------- kills


def updates_for_ever(slot: str, bundles: list[str], ready) -> None:
    torch.set_num_threads(1)
    slot = ModelSlot(slot)
    ready.send(os.getpid())
    for i in range(100_000):
        slot.update(bundles[i % 2], downgrade=True)


OPERATIONS = [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "fchmod"), (os, "open"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]


def killed_at(slot: str, bundle: str, number: int, ready) -> None:
    """An update that is killed before its file operation of that number; says how many there were if it gets through."""
    torch.set_num_threads(1)
    slot = ModelSlot(slot)
    count = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)

        return call

    for owner, name in OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    slot.update(bundle, downgrade=True)
    ready.send(count)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def spawner():
    """Processes that start fast: forked off one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgelab.hf", "transformers.models.llama.modeling_llama", "test_hot"])
    with pytest.MonkeyPatch.context() as m:  # by which the server finds this module
        m.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


def survivors(slot: Path, want: dict[str, list[int]]) -> str:
    """The version that a slot answers with after a kill; nothing lies about."""
    opened = ModelSlot(slot)
    assert say(opened) == want[opened.version]
    assert not (slot / "incoming").exists()
    assert {p.name for p in (slot / "versions").iterdir()} <= set(want)
    for path in (slot / "versions").iterdir():
        verify_bundle(path)
        assert digest_of(path) == path.name
    assert opened.previous in (None, *want)
    return opened.version


def test_killed_at_random_moments(pair, tmp_path, spawner):
    """SIGKILL, ten times, while a process does nothing but update."""
    want = {digest_of(x): greedy(x) for x in pair}
    slot, seen, draw = tmp_path / "slot", set(), random.Random(0)
    ModelSlot(slot).update(pair[0])
    for _ in range(10):
        here, there = spawner.Pipe(duplex=False)
        process = spawner.Process(target=updates_for_ever, args=(str(slot), [str(p) for p in pair[::-1]], there))
        process.start()
        here.recv()
        time.sleep(draw.uniform(0, 0.8))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(survivors(slot, want))
    assert seen <= set(want)


def test_killed_before_each_file_operation(pair, tmp_path, spawner):
    """The same, not by chance: an update is killed before its first, second, ... operation on files, until one gets through."""
    a, b = pair
    want = {digest_of(x): greedy(x) for x in pair}
    seen, ready = [], tmp_path / "ready"
    ModelSlot(ready).update(a)
    here, there = spawner.Pipe(duplex=False)

    def update(name: str, number: int) -> str:
        slot = Path(shutil.copytree(ready, tmp_path / name))
        process = spawner.Process(target=killed_at, args=(str(slot), str(b), number, there))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        return survivors(slot, want)

    assert update("through", -1) == digest_of(b)
    total = here.recv()
    assert total > 30
    for number in sorted({*range(0, total, max(1, total // 12)), total - 1}):
        seen.append(update(str(number), number))
        assert not here.poll()
    assert seen[0] == digest_of(a) and seen[-1] == digest_of(b)
    assert seen == sorted(seen, key=[digest_of(a), digest_of(b)].index)  # old up to some operation, new from then on
