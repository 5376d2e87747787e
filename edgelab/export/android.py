"""Android: a library module for Gradle whose Java classes run the model through ONNX Runtime, and its Swift counterpart.

    edgelab/        the module: Java classes (load, predict, generate, release; a tokenizer; text in, text out), the C code below them
                    (JNI over ONNX Runtime's C interface), and as assets the model with our codes, its tokenizer and edgelab.json
    ios/            a Swift package over the same C code. Not executed, and not compiled, here: no Apple machine was at hand
    README.md       for the phone developer: what to add where, how much memory it takes, what was verified
    manifest.json   sha256 of every file

Nothing of the core is of Android: `verify` compiles the very files of the folder with this machine's C compiler and javac, and runs them
on its JVM (`android_jvm`). What that leaves out is Gradle, the NDK, Arm and a phone's ONNX Runtime; the README says so.
"""

import hashlib
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, MIN_TOP1, agreement, causal_lm, refuse_other_arithmetic, whole_or_nothing

FORMAT = 1  # of edgelab.json; EdgeChat.FORMAT is the same
ANDROID = Path(__file__).resolve().parent / "android_module"
IOS = Path(__file__).resolve().parent / "ios_module"
SHARED = ("edge_runtime.c", "edge_runtime.h", "ort_slots.h")  # C files that both have
ASSETS = Path("edgelab") / "src" / "main" / "assets" / "edgelab"
TEXTS = (  # what the Java tokenizer is asked; with white space, other scripts, signs of four bytes and what looks like a token
    "heat the kitchen to twenty one degrees",
    "37+45=",
    "def f(x):\n        return x  # 12345\n",
    "  \n\n\tx   ",
    "it's IT'S we'Ll",
    "नमस्ते 你好 שלום ٣٤ Ⅷ ½",
    "e\u0301é 🙂👩‍👩‍👧‍👦🇦🇹 \u3000\x85\ufeff",
    '{"call": "timer", "seconds": 720}',
    "<|user|>hi<|call|>x<|end|><|e",
)


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    tokenizer=None,
    check: bool = True,
    threads: int = 2,
    batch_size: int = 1,
) -> ExportResult:
    """A verified folder with an Android library module (and a Swift package) that runs the model.

    `model`: a causal language model, compressed or not, or the directory of one. `out`: the folder; an earlier export there is replaced.
    `tokenizer`: of transformers, or the directory of one; by default the model's directory. `threads` and `batch_size` are written to
    edgelab.json: how many threads `EdgeChat.open(folder)` takes (0: the runtime's choice), and how many prompts the app means to give
    `predictBatch` at once. `check=False` leaves out `verify`, and with it the need for a JDK and a C compiler.

    `bytes` of the result counts the model's file, as for the other targets.

    Raises ExportError when the model or the tokenizer cannot be exported, and when the written folder does not pass `verify`; nothing
    is left under `out` then.
    """
    from edgelab.export import android_jvm, onnx

    out = Path(out)
    began = time.perf_counter()
    for name, value, least in (("threads", threads, 0), ("batch_size", batch_size, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 256:
            raise ExportError(f"{name}={value!r} is not a whole number between {least} and 256")
    if tokenizer is None and isinstance(model, nn.Module):
        raise ExportError("tokenizer is not given, and a module brings none; pass the tokenizer, or the directory of the model")
    if tokenizer is None or isinstance(tokenizer, str | Path):
        from edgelab.model import load_tokenizer

        tokenizer = load_tokenizer(tokenizer or model)
    if out.exists() and not (out.is_dir() and ((out / ASSETS / "edgelab.json").is_file() or not any(out.iterdir()))):
        raise ExportError(f"{out} exists and is no Android export of edgelab: it is not replaced; choose another folder")
    model = causal_lm(model)
    refuse_other_arithmetic(model)
    tokens = _tokens(tokenizer, model)
    if check:
        android_jvm.tools()  # missing? then say so before the work

    with whole_or_nothing(out, ours="manifest.json") as (folder,):
        folder.mkdir()
        shutil.copytree(ANDROID, folder / "edgelab", ignore=shutil.ignore_patterns("README.md"))
        shutil.copytree(IOS, folder / "ios")
        for name in SHARED:
            place = folder / "ios" / "Sources" / "CEdgelab" / ("include" if name == "edge_runtime.h" else ".")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ANDROID / "src" / "main" / "cpp" / name, place / name)
        assets = folder / ASSETS
        assets.mkdir(parents=True)
        result = onnx.export(model, assets / "model.onnx", cache=True, experts="auto", accuracy_level=1, check=check)
        if len(result.files) > 1:
            raise ExportError(f"the model has {result.bytes:,} bytes, more than an app's assets can hold; compress it to fewer bits")
        (assets / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        facts = _facts(model, tokenizer, result, tokens, assets) | {"threads": threads, "batch_size": batch_size}
        _dump(assets / "edgelab.json", facts)
        _dump(assets / "files.json", {"format": FORMAT, "files": _digests(assets)})
        _fill(folder, facts, result)
        _dump(folder / "manifest.json", {"format": FORMAT, "target": "android", "files": _digests(folder)})
        files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f != folder / "README.md", str(f)))
        result = replace(result, target="android", files=tuple(files))
        if check:
            result = verify(result, model)
    placed = tuple(out / f.relative_to(folder) for f in result.files)
    note = "ios/ (Swift) is not executed and not compiled here; neither are Gradle, the NDK and ONNX Runtime's AAR"
    return replace(result, files=placed, notes=(*result.notes, note), seconds=time.perf_counter() - began)


def _tokens(tokenizer, model: nn.Module) -> dict:
    """`web_tokens.tokenizer_data`: the same byte-level BPE is read by the Java class and by the page, and the same is refused."""
    from edgelab.export.web_tokens import tokenizer_data

    try:
        tokens = tokenizer_data(tokenizer)
    except ExportError as e:
        raise ExportError(str(e).replace("the page", "the Java class").replace("JavaScript", "the Java class")) from e
    size = model.config.get_text_config().vocab_size
    if len(tokens["vocab"]) > size:
        raise ExportError(
            f"the tokenizer has ids up to {len(tokens['vocab']) - 1}, the model a vocabulary of {size}: they do not belong together"
        )
    return tokens


def _facts(model: nn.Module, tokenizer, result: ExportResult, tokens: dict, assets: Path) -> dict:
    """What edgelab.json holds besides threads and batch_size."""
    import onnxruntime

    config = model.config.get_text_config()
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stop = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return {
        "format": FORMAT,
        "model": {
            "file": "model.onnx",
            "bytes": result.bytes,
            "vocabulary": config.vocab_size,
            "context": getattr(config, "max_position_embeddings", None) or 0,
            "stop": sorted(stop),
            "weights": result.weights_total,
            "bits_per_weight": round(result.bits_per_weight, 3),
        },
        "tokenizer": {"file": "tokenizer.json", "bytes": (assets / "tokenizer.json").stat().st_size},
        "chat": tokens["chat"],
        "onnxruntime": onnxruntime.__version__,
    }


def _digests(folder: Path) -> dict[str, dict]:
    """{name below `folder`: {"bytes", "sha256"}} of every file there."""
    found = {}
    for path in sorted(f for f in folder.rglob("*") if f.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def _dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def cache_bytes_per_token(path: Path) -> int:
    """Bytes that the file's key/value cache takes for each token of a text (float32)."""
    import onnx

    inputs = onnx.load(str(path), load_external_data=False).graph.input
    shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in inputs if i.name.startswith("past_key_values.")]
    return sum(4 * shape[1] * shape[3] for shape in shapes)


def _fill(folder: Path, facts: dict, result: ExportResult) -> None:
    """The places that name a version or a figure, filled in; the README from its template."""
    model = facts["model"]
    per_token = cache_bytes_per_token(folder / ASSETS / "model.onnx")
    about = f"{result.weights_total:,} parameters in {result.bits_per_weight:.2f} bits each"
    filled = {
        "__ORT_VERSION__": facts["onnxruntime"],
        "__ABOUT__": about + (", mixture of experts" if result.experts_total else ""),
        "__MODEL_MB__": f"{model['bytes'] / 1e6:.1f}",
        "__CACHE_KB__": f"{per_token / 1e3:.1f}",
        "__CONTEXT__": str(model["context"] or "any number of"),
        "__CACHE_MB__": f"{per_token * model['context'] / 1e6:.1f}",
        "__LOGITS_KB__": f"{4 * model['vocabulary'] / 1e3:.1f}",
        "__THREADS__": str(facts["threads"]),
        "__BATCH__": str(facts["batch_size"]),
    }
    for path, source in (
        (folder / "edgelab" / "build.gradle.kts", ANDROID / "build.gradle.kts"),
        (folder / "ios" / "Package.swift", IOS / "Package.swift"),
        (folder / "README.md", ANDROID / "README.md"),
    ):
        text = source.read_text(encoding="utf-8")
        for name, value in filled.items():
            text = text.replace(name, value)
        path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ verification


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float = MIN_COSINE, seed: int = 0
) -> ExportResult:
    """`result` with the parity that the folder's own classes reached on a JVM.

    The sources in the folder must be this version's; they are compiled here (warnings are errors) and run with JNI's checks on. Checked:
    every sha256 of the manifest; logits on random tokens of each of `lengths`, at once and through the cache in pieces, and of a padded
    batch, against `model`; a greedy continuation token by token against torch's `generate`; the tokenizer against the library; and
    that a missing file, a file that is no model, a wrong token id and a released model are exceptions, after which the JVM goes on.

    Raises ExportError for the first of these that fails, or without a JDK and a C compiler.
    """
    from edgelab.export import android_jvm

    model = causal_lm(model)
    folder = _folder_of(result).resolve()  # the JVM runs in another one
    _check_files(folder)
    if not result.weights_total:  # found on the disk, and not counted yet
        result = _counted(result, model, folder)
    assets = folder / ASSETS
    about = json.loads((assets / "edgelab.json").read_text(encoding="utf-8"))
    given = {"path": str(assets / "model.onnx"), "threads": about["threads"], "context": about["model"]["context"]}
    with android_jvm.running(folder / "edgelab") as jvm:
        version = jvm.must("version")
        jvm.must("load", **given)
        parity = _parity(jvm, model, lengths, seed)
        if not (parity["cosine"] >= min_cosine and parity["top1_agreement"] >= MIN_TOP1):
            raise ExportError(
                f"logits on the JVM have cosine {parity['cosine']:.6f} to torch's and the same top token in {parity['top1_agreement']:.2%} "
                f"of places; {min_cosine} and {MIN_TOP1:.0%} are asked for"
            )
        _check_batch(jvm, model, min_cosine, seed)
        count = _check_generation(jvm, model, seed)
        _check_tokenizer(jvm, assets)
        _check_refusals(jvm, given, assets / "tokenizer.json")
        if wrong := jvm.warnings():
            raise ExportError(f"the JVM's JNI checks complain: {wrong[0]}")
    by = (
        f"onnxruntime {version['version']} through JNI on Java {version['java']}, {' + '.join(map(str, lengths))} tokens whole and "
        f"through the cache, {count} greedy tokens as torch's"
    )
    return replace(result, parity=parity, verified_by=by)


def _folder_of(result: ExportResult) -> Path:
    above = (parent for file in result.files[:1] for parent in file.parents)
    folder = next((parent for parent in above if (parent / ASSETS / "edgelab.json").is_file()), None)
    if folder is None:
        raise ExportError(f"{result.files[:1]} lies in no Android export of edgelab; write one with export first")
    return folder


def _counted(result: ExportResult, model: nn.Module, folder: Path) -> ExportResult:
    """`result` with what the model file really holds, its codes compared with the model's bit for bit."""
    from edgelab.export import onnx

    files = (folder / ASSETS / "model.onnx",)
    counted = onnx.verify(replace(result, target="onnx", files=files), model, lengths=LENGTHS[:1])
    return replace(counted, target="android", files=result.files, notes=result.notes)


def _check_files(folder: Path) -> None:
    """Raises ExportError for a file that the manifest does not state, and for sources that are not this version's: they will be run."""
    try:
        stated = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as e:
        raise ExportError(f"{folder} holds no Android export of edgelab ({e})") from e
    found = _digests(folder)
    found.pop("manifest.json", None)
    odd = sorted(name for name in {*stated, *found} if stated.get(name) != found.get(name))
    if odd:
        raise ExportError(f"{folder}: {odd[0]} is not the file that manifest.json states")
    for source in sorted(f for f in ANDROID.rglob("*") if f.suffix in (".c", ".h", ".java")):
        if (folder / "edgelab" / source.relative_to(ANDROID)).read_bytes() != source.read_bytes():
            raise ExportError(f"{folder}: {source.name} is not this version's, and is not run; export again")
    mine = {f.relative_to(ANDROID) for f in ANDROID.rglob("*.java")} | {f.relative_to(ANDROID) for f in ANDROID.rglob("*.[ch]")}
    for path in (folder / "edgelab").rglob("*"):
        if path.suffix in (".c", ".h", ".java") and path.relative_to(folder / "edgelab") not in mine:
            raise ExportError(f"{folder}: {path.name} is no source of edgelab, and is not run")


def _parity(jvm, model: nn.Module, lengths: tuple[int, ...], seed: int) -> dict[str, float]:
    """The worse of two: read at once; and half of the tokens, then a quarter, then one by one, each on what was read before."""

    def run(ids: np.ndarray, pieces: bool) -> np.ndarray:
        n = len(ids)
        cuts = [n // 2, 3 * n // 4, *range(3 * n // 4 + 1, n + 1)] if pieces else []
        return jvm.floats("logits", ids=ids.tolist(), cuts=cuts).reshape(n, -1)

    whole = agreement(lambda ids: run(ids, False), model, lengths, seed)
    pieces = agreement(lambda ids: run(ids, True), model, lengths, seed + 1)
    return {k: (min if k in ("cosine", "top1_agreement") else max)(whole[k], pieces[k]) for k in whole}


@torch.no_grad()
def _check_batch(jvm, model: nn.Module, min_cosine: float, seed: int) -> None:
    """Raises ExportError unless prompts of three lengths, padded into one batch, give the logits that each gives alone in torch."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, model.config.get_text_config().vocab_size, n).tolist() for n in (3, 11, 7)]
    rows = jvm.floats("batch", prompts=prompts).reshape(len(prompts), -1).astype(np.float64)
    for ids, row in zip(prompts, rows, strict=True):
        ours = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        cosine = float(row @ ours / (np.linalg.norm(row) * np.linalg.norm(ours)))
        if not cosine >= min_cosine:
            raise ExportError(f"in a batch on the JVM a prompt of {len(ids)} tokens has logits of cosine {cosine:.6f} to torch's")


@torch.no_grad()
def _check_generation(jvm, model: nn.Module, seed: int, count: int = 24, tie: float = 1e-3) -> int:
    """How many greedy tokens are torch's. Raises ExportError where one is not, and its logit is not within `tie` of the best."""
    ids = np.random.default_rng(seed).integers(0, model.config.get_text_config().vocab_size, 9).tolist()
    given = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(ids) :].tolist()
    found = jvm.must("generate", prompt=ids, max=count)
    if found["ids"] != found["told"] or len(found["ids"]) != count:
        raise ExportError(
            f"generate on the JVM returns {len(found['ids'])} tokens and told its callback {len(found['told'])}; {count} were asked for"
        )
    for i, (ours, theirs) in enumerate(zip(wanted, found["ids"], strict=True)):
        if ours != theirs:
            logits = model(input_ids=torch.tensor([ids + found["ids"][:i]]), use_cache=False).logits[0, -1]
            behind = float(logits.max() - logits[theirs])
            if behind > tie:
                raise ExportError(f"greedy token {i + 1} is {theirs} on the JVM and {ours} in torch, {behind:.4f} above it")
            return i  # a tie: from here on the texts may differ
    return count


def _check_tokenizer(jvm, assets: Path) -> None:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(assets / "tokenizer.json"))
    jvm.must("tokenizer", path=str(assets / "tokenizer.json"))
    for text, (ids, special, plain) in zip(TEXTS, jvm.must("encode", texts=list(TEXTS))["rows"], strict=True):
        wanted = library.encode(text).ids
        if ids != wanted:
            raise ExportError(f"the Java tokenizer makes {ids} of {text!r}; the library makes {wanted}")
        if (special, plain) != (library.decode(wanted, skip_special_tokens=False), library.decode(wanted)):
            raise ExportError(f"the Java tokenizer makes {special!r} of the ids of {text!r}")


def _check_refusals(jvm, given: dict, no_model: Path) -> None:
    """Raises ExportError unless each mistake is the exception it should be. Leaves the model released."""

    def expect(error: str, words: str, do: str, **ask) -> None:
        answer = jvm.ask(do, **ask)
        if answer.get("error") != error or not re.search(words, answer["message"]):
            raise ExportError(f"{do} with {ask} should throw {error} ({words}); on the JVM it gives {str(answer)[:200]}")

    own = "dev.edgelab.EdgeException"
    expect("java.io.FileNotFoundException", "no model file", "load", **given | {"path": "/no/such/model.onnx"})
    expect(own, ".", "load", **given | {"path": str(no_model)})
    where = {"to": str(jvm.work / "none.bin"), "cuts": []}
    expect(own, "is not between 0 and", "logits", ids=[0, -1], **where)
    expect(own, "is not between 0 and", "logits", ids=[10**9], **where)
    expect(own, "no token ids", "logits", ids=[], **where)
    jvm.floats("logits", ids=[1, 2], cuts=[])  # it goes on all the same
    jvm.must("release")
    jvm.must("release")
    expect(own, "was released", "logits", ids=[1], **where)
    expect(own, "was released", "generate", prompt=[1], max=2)
