"""What an app relies on in a bundle: its interface, compared between versions, stamped into the manifest and tried out on the model."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgelab.bundle import FORMAT, MANIFEST, load_bundle, read_manifest, verify_bundle
from edgelab.model import load_tokenizer

SCHEMA = 1  # of `current` and of the manifest's "interface"
INPUTS = {"input_ids": ("int64", "batch", "length")}
TOLERANCE = 0.02  # of the largest reference logit: int8 activations differ by less, another weight by more
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


@dataclass(frozen=True)
class Interface:
    """What an app relies on. `inputs` and `outputs`: {name: (dtype, dimension, ...)}. `tokenizer`: the sha256 of what decides which text
    becomes which ids, None without a tokenizer. `release` None: the bundle was not stamped."""

    schema: int
    major: int
    minor: int
    release: int | None
    model_type: str
    inputs: dict[str, tuple]
    outputs: dict[str, tuple]
    vocabulary: int
    context: int | None
    special_tokens: dict[str, tuple[int, ...]]
    tokenizer: str | None
    recipe_digest: str

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return json.loads(json.dumps(self.__dict__))


def interface(bundle: str | Path, manifest: dict | None = None) -> Interface:
    """The interface of a bundle, from its manifest (or the one given), config and tokenizer; no weight is read.

    Raises FileNotFoundError or ValueError for what is no bundle, was written by a newer edgelab, or states what its files deny.
    """
    bundle = Path(bundle)
    manifest = manifest_of(bundle) if manifest is None else manifest
    stated = manifest.get("interface") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"{bundle / MANIFEST}: interface is {stated!r:.80}, which is no JSON object; stamp the bundle again")
    schema = stated.get("schema", SCHEMA)
    if type(schema) is not int or schema > SCHEMA:
        raise ValueError(f"{bundle / MANIFEST} has interface schema {schema!r}, this edgelab reads {SCHEMA}: update the app first")
    config = _json(bundle / "config.json")
    text = config.get("text_config") or config
    vocabulary = text.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise ValueError(f"{bundle / 'config.json'} has vocab_size {vocabulary!r}: a slot holds language models")
    numbers = {key: stated.get(key, default) for key, default in (("major", 1), ("minor", 0), ("release", None))}
    for key, value in numbers.items():
        if not (type(value) is int and value >= 0) and not (key == "release" and value is None):
            raise ValueError(f"{bundle / MANIFEST}: {key} of the interface is {value!r}; it is a number from 0 on: stamp the bundle again")
    generation = _json(bundle / "generation_config.json") if (bundle / "generation_config.json").is_file() else {}
    found = Interface(
        schema=schema,
        **numbers,
        model_type=str(config.get("model_type")),
        inputs=INPUTS,
        outputs={"logits": ("float32", "batch", "length", vocabulary)},
        vocabulary=vocabulary,
        context=text.get("max_position_embeddings"),
        special_tokens={key: _ids(generation.get(f"{key}_token_id", text.get(f"{key}_token_id"))) for key in ("bos", "eos", "pad")},
        tokenizer=_tokenizer_digest(bundle),
        recipe_digest=str(manifest.get("recipe_digest")),
    )
    for key, value in (stated.get("states") or {}).items():
        if found.to_dict().get(key) != value:
            raise ValueError(
                f"{bundle / MANIFEST} states {key} {value!r:.80}, its files say {found.to_dict().get(key)!r:.80}: stamp the bundle again"
            )
    return found


def incompatible(old: Interface, new: Interface) -> list[str]:
    """Why an app that was made for `old` can't use `new`, a sentence each; empty: it can.

    >>> a = Interface(1, 1, 0, 1, "qwen3", INPUTS, {}, 96, 64, {"eos": (0,)}, None, "")
    >>> from dataclasses import replace
    >>> incompatible(a, replace(a, minor=1, release=2, context=128, model_type="deepseek_v3"))
    []
    >>> incompatible(a, replace(a, context=32))
    ['context: 64 tokens became 32']
    """
    found = []
    if new.major != old.major:
        found.append(f"major number of the interface: {old.major} became {new.major}")
    for what in ("inputs", "outputs", "vocabulary", "special_tokens", "tokenizer"):
        before, after = getattr(old, what), getattr(new, what)
        if what == "outputs" and old.vocabulary != new.vocabulary:
            continue  # said once
        if before != after:
            a, b = (f"{str(v)[:12]}..." if what == "tokenizer" and v else str(v) for v in (before, after))
            found.append(f"{what}: {a} became {b}")
    if (old.context or 0) > (new.context if new.context is not None else 1 << 62):
        found.append(f"context: {old.context} tokens became {new.context}")
    return found


def stamp(
    bundle: str | Path, *, release: int, major: int = 1, minor: int = 0, reference: Sequence[int] | int | None = 12, model=None
) -> str:
    """The digest of `bundle` after its manifest was given an interface (see the module) and reference logits to be tried against.

    `reference`: token ids, or how many (spread over the vocabulary); None: no reference. `model`: what to compute them with, by default
    the bundle's own, loaded for it. The manifest is replaced whole; no other file is touched. Verifies the bundle first.
    """
    bundle = Path(bundle)
    for name, value in (("release", release), ("major", major), ("minor", minor)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name}={value!r} must be a number from 0 on")
    manifest = verify_bundle(bundle)
    manifest["interface"] = {"schema": SCHEMA, "major": major, "minor": minor, "release": release}
    states = interface(bundle, manifest)
    manifest["interface"]["states"] = {k: v for k, v in states.to_dict().items() if k not in manifest["interface"]}
    if reference is not None:
        n = states.vocabulary
        ids = [i * 7919 % n for i in range(1, reference + 1)] if isinstance(reference, int) else [int(i) for i in reference]
        outside = [i for i in ids if not 0 <= i < n]
        if not ids or outside:
            raise ValueError(f"reference={reference!r} must be token ids of 0 .. {n - 1}, one at least")
        columns = sorted({i * n // 64 for i in range(64)})
        logits = logits_of(model if model is not None else load_bundle(bundle), ids)
        values = [[float(f"{v:.7g}") for v in row] for row in logits[:, columns].tolist()]
        manifest["interface"]["reference"] = {"ids": ids, "columns": columns, "logits": values}
    replace_manifest(bundle, manifest)
    return digest_of(bundle)


def digest_of(bundle: str | Path) -> str:
    """The sha256 of a bundle's manifest, which names every byte of the bundle."""
    return hashlib.sha256(manifest_bytes(Path(bundle))).hexdigest()


def try_out(model: nn.Module, bundle: str | Path) -> None:
    """Raises ValueError where `model`, loaded from `bundle`, does not do what the interface says: its vocabulary holds the
    tokenizer's and the special tokens, logits have their shape and are finite, at once and token by token, and are the reference's
    if the manifest has one."""
    bundle, face = Path(bundle), interface(bundle)
    rows = getattr(model.get_input_embeddings(), "num_embeddings", face.vocabulary)
    if rows < face.vocabulary:
        raise ValueError(f"the embedding has {rows} rows, the config a vocabulary of {face.vocabulary}")
    outside = {k: i for k, ids in face.special_tokens.items() for i in ids if not 0 <= i < face.vocabulary}
    if outside:
        raise ValueError(f"special tokens {outside} are outside the vocabulary of {face.vocabulary}")
    if face.tokenizer is not None:
        tokenizer = load_tokenizer(bundle)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= face.vocabulary:
            raise ValueError(f"the tokenizer has the token {largest}, the model's vocabulary ends at {face.vocabulary - 1}")
    reference = (manifest_of(bundle).get("interface") or {}).get("reference")
    ids = reference["ids"] if reference else [i * 7919 % face.vocabulary for i in range(1, 9)]
    ids = ids[: max(1, face.context - 1)] if face.context else ids  # one more comes below
    logits = logits_of(model, ids)
    if tuple(logits.shape) != (len(ids), face.vocabulary):
        raise ValueError(f"logits are {tuple(logits.shape)}; the interface says {(len(ids), face.vocabulary)}")
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity")
    with torch.no_grad():
        past = model(torch.tensor([ids]), use_cache=True).past_key_values
        step = model(torch.tensor([ids[:1]]), past_key_values=past, use_cache=True).logits
    if step.shape[1] != 1 or not step.isfinite().all():
        raise ValueError(f"the next token's logits are {tuple(step.shape)}, or hold NaN or infinity")
    if reference:
        wanted = torch.tensor(reference["logits"])[: len(ids)]
        worst, most = float((logits[:, reference["columns"]] - wanted).abs().max()), float(wanted.abs().max())
        if not worst <= TOLERANCE * most:
            raise ValueError(f"logits differ from the manifest's reference by {worst:.3g}; {TOLERANCE:g} of {most:.3g} is allowed")


def logits_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """[T, vocabulary] float32."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def manifest_bytes(bundle: Path) -> bytes:
    path = bundle / MANIFEST
    if path.is_symlink():
        raise ValueError(f"{path} is a link: a bundle holds its files itself")
    if not path.is_file():
        raise FileNotFoundError(f"there is no {MANIFEST} in {bundle}: it is not a bundle")
    return path.read_bytes()


def manifest_of(bundle: Path) -> dict:
    """`read_manifest`, which says of a newer format that it is newer."""
    text = manifest_bytes(bundle)
    try:
        version = json.loads(text).get("format")
    except (ValueError, AttributeError):
        version = None  # read_manifest says it
    if type(version) is int and version > FORMAT:
        raise ValueError(f"{bundle / MANIFEST} has format {version}, this edgelab reads {FORMAT}: update the app first")
    return read_manifest(bundle)


def replace_manifest(bundle: Path, manifest: dict) -> None:
    """Write the manifest whole. The temporary file lies beside the bundle, where a killed process leaves no stranger in it."""
    tmp = bundle.parent / f".{bundle.name}.{MANIFEST}.tmp"
    tmp.unlink(missing_ok=True)
    try:
        write_synced(tmp, (json.dumps(manifest, indent=1) + "\n").encode(), mode=0o644)
        os.replace(tmp, bundle / MANIFEST)
    finally:
        tmp.unlink(missing_ok=True)


def _json(path: Path) -> dict:
    try:
        d = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy the bundle again") from None
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON ({error})") from error
    if not isinstance(d, dict):
        raise ValueError(f"{path} holds no JSON object")
    return d


def _ids(value) -> tuple[int, ...]:
    """Special tokens: one, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _tokenizer_digest(bundle: Path) -> str | None:
    """The sha256 of what decides which text becomes which ids, however its JSON is laid out; of another tokenizer, of its files."""
    if (bundle / "tokenizer.json").is_file():
        d = _json(bundle / "tokenizer.json")
        text = json.dumps({k: d.get(k) for k in _TOKENIZER_PARTS}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
    files = [f for f in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt") if (bundle / f).is_file()]
    if not files:
        return None
    return hashlib.sha256(b"".join(hashlib.sha256((bundle / f).read_bytes()).digest() for f in files)).hexdigest()


def write_synced(path: Path, source, most: int | None = None, mode: int = 0o444) -> None:
    """Write bytes, or `most` bytes of an open file, and have them on the disk. What is installed is read-only."""
    with path.open("xb") as f:
        if isinstance(source, bytes):
            f.write(source)
        else:
            while most and (block := source.read(min(most, 1 << 22))):
                f.write(block)
                most -= len(block)
        f.flush()
        os.fchmod(f.fileno(), mode)
        os.fsync(f.fileno())
