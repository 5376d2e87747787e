"""The browser: a folder with a page where a person types and the model answers, and nothing that is typed leaves the device.

    index.html, style.css, app.js     the page; `window.edgelab` in app.js is the same door for tests
    worker.js, engine.js              the thread that holds the model: a step at a time, keys and values kept between steps
    tokenizer.js, tokens.json         byte-level BPE of our own, and the tokenizer as data
    ort/                              ONNX Runtime Web, three files of the npm package, checked by sha256: see `runtime_files`
    model.onnx, web.json              the model with our codes (`export.onnx`, cache=True), and what the page has to know of it
    sw.js, files.json                 stores all of it by sha256, so that the page is an app that needs no network
    manifest.webmanifest, icon*       what makes it installable

The page needs a web server (any; `serve` is one for this machine) because browsers give a file:// page neither modules nor
service workers. Two walls keep words in: a content security policy that knows no address but the page's own, in the
document and as a header of every file (so that it also binds the worker), and the service worker, which turns other
addresses away. The same headers isolate the page, which is what browsers ask for before they allow threads.

`verify` opens the folder in a real Chromium whose every way out is a wall that counts, compares the logits with torch's,
stops the server, starts the browser anew and asks again.
"""

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from html import escape
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, refuse_other_arithmetic, whole_or_nothing

FORMAT = 1
PAGE = Path(__file__).resolve().parent / "web_page"

RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_FILES = {  # of dist/ in the npm package; the wasm-only build, a third of the one with WebGPU
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
}

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    # 'webrtc' and 'frame-ancestors' are not for a <meta>; a notebook on this machine may show the page in a frame
    "content-security-policy": f"{POLICY}; webrtc 'block'; frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
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


# ------------------------------------------------------------------------------------------------------- the runtime


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
    with whole_or_nothing(*(cache / name for name in contents)) as places:
        for place, content in zip(places, contents.values(), strict=True):
            place.write_bytes(content)


# ----------------------------------------------------------------------------------------------------- the tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel(use_regex=True) cuts by
_PIECE = re.compile(
    r"(?P<property>\\[pP]\{\^?[A-Z][a-z]?\})|(?P<space>\\[sSd])|(?P<control>\\[rnt])|(?P<escape>\\[\\^$.*+?()\[\]{}|/\-])|(?P<open>\[\^?)|(?P<close>\])"
    r"|(?P<caseless>\(\?i:[^()\[\]{}\\*+?.^$]*\))|(?P<group>\(\?[:=!]|\((?!\?))|(?P<end>\))|(?P<repeat>[*+?]\??(?![*+?])|\{\d+(?:,\d*)?\}(?![*+?]))"
    r"|(?P<other>[|.]|[^\\\[\](){}*+?.^$|])",
    re.DOTALL,
)
_SAME_FOLDED = {"s": "ſ", "k": "\u212a"}  # beyond the other case, what Unicode folds to these letters


def browser_pattern(pattern: str) -> str:
    r"""A pattern of the `tokenizers` library (Oniguruma) as JavaScript's RegExp writes it, with the flag u.

    The two mean different things by `\s`: JavaScript adds U+FEFF and leaves out U+0085. Raises ExportError for what is not
    known to mean the same in both.

    >>> print(browser_pattern(r" ?[^\s\p{L}]+|(?i:'s)"))
     ?[^\p{White_Space}\p{L}]+|(?:'[sSſ])
    """
    at, out, inside = 0, [], False  # inside: of a class [...]
    while at < len(pattern):
        found = _PIECE.match(pattern, at)
        if found is None or (inside and (found.lastgroup == "open" or pattern.startswith("&&", at))):  # Oniguruma's sets of sets
            raise ExportError(f"the tokenizer cuts text by {pattern!r}; what stands at {pattern[at : at + 8]!r} is not known to JavaScript")
        text, at = found.group(), found.end()
        inside = found.lastgroup == "open" or (inside and found.lastgroup != "close")
        match found.lastgroup:
            case "space":
                out.append({r"\s": r"\p{White_Space}", r"\S": r"\P{White_Space}", r"\d": r"\p{Nd}"}[text])
            case "property":
                negated = (text[1] == "P") != ("^" in text)
                out.append(f"\\{'P' if negated else 'p'}{{{text[3:-1].lstrip('^')}}}")
            case "caseless":
                letters = (
                    f"[{c.lower()}{c.upper()}{_SAME_FOLDED.get(c.lower(), '')}]" if c.isascii() and c.isalpha() else c for c in text[4:-1]
                )
                out.append(f"(?:{''.join(letters)})")
            case _:
                out.append(text)
    return "".join(out)


def tokenizer_data(tokenizer) -> dict:
    """The tokenizer as tokenizer.js reads it (its fields are described there).

    Raises ExportError for anything but byte-level BPE with steps and patterns that JavaScript computes alike.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{type(tokenizer).__name__} is no fast tokenizer; the page reads byte-level BPE of the `tokenizers` library only"
        )
    spec = json.loads(backend.to_str())
    model = spec["model"]

    def refuse(what: str):
        return ExportError(f"the tokenizer {what}; the page reads byte-level BPE only, as GPT-2, Qwen, Llama 3 and edgelab's own use it")

    if model["type"] != "BPE":
        raise refuse(f"is {model['type']}")
    odd = {
        k: model.get(k)
        for k in ("unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(k)
    }
    if odd:
        raise refuse(f"has {odd}")
    normalizer = spec.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise refuse(f"normalizes text by {normalizer['type']}")
    pre = spec.get("pre_tokenizer") or {"type": "nothing"}
    steps, byte_level = [], False
    for step in pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        match step["type"]:
            case "Digits" if step["individual_digits"]:
                steps.append({"digits": True})
            case "Split" if step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
                steps.append({"pattern": browser_pattern(step["pattern"]["Regex"])})
            case "ByteLevel" if not step["add_prefix_space"]:
                steps += [{"pattern": browser_pattern(_GPT2)}] if step["use_regex"] else []
                byte_level = True
            case other:
                raise refuse(f"cuts text by {other} with {json.dumps(step)}")
    if not byte_level or (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise refuse("is not byte-level")
    vocabulary: list[str | None] = [None] * (1 + max([*model["vocab"].values(), *(t["id"] for t in spec["added_tokens"])]))
    for token, i in model["vocab"].items():
        vocabulary[i] = token
    lacking = [b for b in _byte_alphabet() if b not in model["vocab"]]
    if lacking:
        raise refuse(f"has no token for {len(lacking)} of the 256 bytes")
    for t in spec["added_tokens"]:
        if t["single_word"] or t["lstrip"] or t["rstrip"] or (t["normalized"] and normalizer):
            raise refuse(f"finds {t['content']!r} in a way of its own (single_word, lstrip, rstrip or normalized)")
        vocabulary[t["id"]] = t["content"]
    plain, dressed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if dressed[len(dressed) - len(plain) :] != plain:
        raise refuse("puts tokens behind a text, which would end it before its answer")
    return {
        "format": FORMAT,
        "vocab": vocabulary,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "whole": bool(model.get("ignore_merges")),
        "steps": steps,
        "normalize": normalizer and "NFC",
        "added": {t["content"]: t["id"] for t in spec["added_tokens"]},
        "special": sorted(t["id"] for t in spec["added_tokens"] if t["special"]),
        "begin": dressed[: len(dressed) - len(plain)],
        "chat": _chat(tokenizer),
    }


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _chat(tokenizer) -> dict | None:
    """What the chat template puts around one message of the user: {before, after, trim}, found by rendering it; None without one."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(message: str) -> str:
        return tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)

    mark = "q7d1a5"
    before, found, after = render(mark).partition(mark)
    trim = render(f"  {mark}\n") == before + mark + after
    chat = {"before": before, "after": after, "trim": trim}
    for message in ("", "two words", " spaces \n and lines\n", "{% if x %}", "ü 🙂"):
        if not found or render(message) != before + (message.strip() if trim else message) + after:
            raise ExportError(
                f"the chat template does more than put text before and after a message ({message!r} shows it); the page can't do that"
            )
    return chat


# ---------------------------------------------------------------------------------------------------- what one can ask


def tasks_of(tokens: dict) -> list[dict]:
    """What the page offers to ask. A model of edgelab's corpus gets its commands and sums; others a chat, or text to go on with.

    The commands are of the corpus' test split, and edge-moe (in floats, int4-g32 and as edge-phone) answers them and the sums right.

    A task: {id, label, chat, placeholder, examples, limit}; `chat` puts the chat template around the text. Further: `temperature`;
    `pattern` (the groups of a JavaScript RegExp, joined, are what is sent) with `ending` behind and `wanted` said where it does not
    match; `reading`: "last digit first".
    """
    from edgelab.data import CALL, END, USER

    own = tokens["chat"] is not None and (tokens["chat"]["before"], tokens["chat"]["after"]) == (END + USER, CALL)
    if own:
        return [
            {
                "id": "command",
                "label": "Command",
                "chat": True,
                "placeholder": "Say a command",
                "examples": [
                    "heat the kitchen to twenty one degrees",
                    "call grace at quarter to twelve",
                    "sunday weather for oslo",
                    "text emma dinner is ready",
                    "play jazz at twenty nine percent volume",
                    "meet emma on sunday at fifteen past four",
                    "add thirteen eggs to my list",
                    "book half past six on saturday with lena",
                ],
                "limit": 96,
            },
            {
                "id": "sum",
                "label": "Sum",
                "chat": False,
                "placeholder": "37+45",
                "examples": ["37+45=", "58+67=", "81-46=", "63-28="],
                "pattern": r"\s*(\d{2})\s*([+-])\s*(\d{2})\s*=?",
                "ending": "=",
                "wanted": "A sum of two numbers from 10 to 99, such as 37+45 or 90-17.",
                "reading": "last digit first",
                "limit": 8,
            },
            {
                "id": "text",
                "label": "Free text",
                "chat": False,
                "placeholder": "Begin a text",
                "examples": ["def __init__(self, ", "Return a list of ", "Return True if ", "import os\n"],
                "limit": 160,
                "temperature": 0.7,
            },
        ]
    chat = {"id": "chat", "label": "Ask", "chat": True, "placeholder": "Ask something", "examples": [], "limit": 256, "temperature": 0.7}
    text = {"id": "text", "label": "Free text", "chat": False, "placeholder": "Begin a text", "examples": [], "limit": 160}
    return ([chat] if tokens["chat"] else []) + [text | {"temperature": 0.7}]


# --------------------------------------------------------------------------------------------------------- the doors


def export(
    model: "nn.Module | str | Path",
    out: str | Path,
    *,
    tokenizer=None,
    check: bool = True,
    title: str = "edgelab",
    runtime: str | Path | None = None,
    tasks: list[dict] | None = None,
) -> ExportResult:
    """A verified folder that runs the model in a browser.

    `model`: a causal language model, compressed or not, or the directory of one. `out`: the folder; a page that lies there is
    replaced. `tokenizer`: of transformers, or the directory of one; by default the model's directory. `runtime`: where ONNX Runtime
    Web is, see `runtime_files`. `tasks`: what the page offers to ask, see `tasks_of`. `check=False` leaves out `verify`, and
    with it the need for Chromium.

    `bytes` of the result counts the model's file, as for the other targets; the notes state the whole download.

    Raises ExportError when the model or the tokenizer cannot be exported, when the runtime cannot be had, and when the written
    page does not pass `verify`; nothing is left under `out` then.
    """
    from edgelab.export import onnx

    out = Path(out)
    began = time.perf_counter()
    if tokenizer is None and isinstance(model, nn.Module):
        raise ExportError("tokenizer is not given, and a module brings none; pass the tokenizer, or the directory of the model")
    if tokenizer is None or isinstance(tokenizer, str | Path):
        from edgelab.model import load_tokenizer

        tokenizer = load_tokenizer(tokenizer or model)
    if out.exists() and not (out.is_dir() and ((out / "web.json").is_file() or not any(out.iterdir()))):
        raise ExportError(f"{out} exists and is no page of edgelab: it is not replaced; choose another folder")
    model = causal_lm(model)
    refuse_other_arithmetic(model)
    tokens = tokenizer_data(tokenizer)
    size = model.config.get_text_config().vocab_size
    if len(tokens["vocab"]) > size:
        raise ExportError(
            f"the tokenizer has ids up to {len(tokens['vocab']) - 1}, the model a vocabulary of {size}: they do not belong together"
        )
    needed = runtime_files(runtime)
    if check:
        _browser()  # missing? then say so before the work

    with whole_or_nothing(out) as (folder,):
        folder.mkdir()
        result = onnx.export(model, folder / "model.onnx", cache=True, experts="auto", accuracy_level=1, check=False)
        if len(result.files) > 1:
            raise ExportError(f"the model has {result.bytes:,} bytes, more than a browser can hold; compress it to fewer bits")
        (folder / "ort").mkdir()
        for name, path in needed.items():
            shutil.copyfile(path, folder / "ort" / name)
        (folder / "ort" / "LICENSE.txt").write_text(_MIT.format(version=RUNTIME_VERSION), encoding="utf-8")
        _dump(folder / "tokens.json", tokens)
        facts = _facts(model, tokenizer, result, folder / "model.onnx")
        _dump(folder / "web.json", facts | {"tasks": tasks_of(tokens) if tasks is None else tasks})
        _write_page(folder, title)
        sizes = download(folder)
        files = tuple(sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.name != "index.html", str(f))))
        result = replace(result, target="web", files=files, notes=(*result.notes, _said(sizes)))
        if check:
            result = verify(result, model)
    placed = tuple(out / f.relative_to(folder) for f in result.files)
    return replace(result, files=placed, seconds=time.perf_counter() - began)


def _dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _facts(model: nn.Module, tokenizer, result: ExportResult, path: Path) -> dict:
    """What web.json holds besides the tasks."""
    import onnx

    caches = []
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, width = value.type.tensor_type.shape.dim
            caches.append({"name": value.name, "heads": heads.dim_value, "width": width.dim_value})
    if not caches or any(c["heads"] < 1 or c["width"] < 1 for c in caches):
        raise ExportError(f"{path.name} states no fixed heads and widths of its cache: {caches[:2]}")
    config = model.config.get_text_config()
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stop = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    million = result.weights_total / 1e6
    size = f"{million:.1f} M parameters" if million >= 1 else f"{result.weights_total:,} parameters"
    experts = "mixture of experts, " if result.experts_total else ""
    bits = result.bits_per_weight
    return {
        "format": FORMAT,
        "about": f"{size}, {experts}{bits:.1f} bits each",
        "runtime": f"{RUNTIME} {RUNTIME_VERSION} (WebAssembly)",
        "model": {
            "file": path.name,
            "bytes": path.stat().st_size,
            "vocabulary": config.vocab_size,
            "context": getattr(config, "max_position_embeddings", None) or 2**31 - 1,
            "caches": caches,
            "stop": sorted(stop),
            "weights": f"{result.weights_total:,} in {bits:.2f} bits each, {result.share:.0%} as codes",
        },
    }


def _write_page(folder: Path, title: str) -> None:
    """The static files with what they ask for filled in, then files.json and, last, sw.js, which states the sha256 of all others."""
    for source in sorted(PAGE.iterdir()):
        if source.name == "sw.js" or not source.is_file():
            continue
        if source.name in ("index.html", "manifest.webmanifest"):
            shown = escape(title) if source.suffix == ".html" else json.dumps(title, ensure_ascii=False)[1:-1]
            text = source.read_text(encoding="utf-8").replace("__TITLE__", shown).replace("__POLICY__", POLICY)
            (folder / source.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, folder / source.name)
    _dump(folder / "files.json", download(folder))
    files = {}
    for path in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "sw.js"):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": len(content), "sha256": digest, "type": TYPES[path.suffix]}
    code = (PAGE / "sw.js").read_text(encoding="utf-8")
    version = hashlib.sha256("\n".join(f"{name} {f['sha256']}" for name, f in files.items()).encode() + code.encode()).hexdigest()[:16]
    code = (
        code.replace("__VERSION__", version)
        .replace("__FILES__", json.dumps(files, indent=1))
        .replace("__HEADERS__", json.dumps(HEADERS, indent=1))
    )
    (folder / "sw.js").write_text(code, encoding="utf-8")


def download(folder: str | Path) -> dict:
    """{"total": {"bytes", "gzip"}, "parts": {"runtime" | "model" | "page": the same}}: what a first visit loads, plain and as a server
    that compresses sends it (gzip, level 6). files.json and sw.js, which are made of the others, are left out: a few kB."""
    parts = {part: {"bytes": 0, "gzip": 0} for part in ("runtime", "model", "page")}
    for path in Path(folder).rglob("*"):
        if not path.is_file() or path.name in ("files.json", "sw.js"):
            continue
        part = "runtime" if path.parent.name == "ort" else "model" if path.suffix == ".onnx" else "page"
        content = path.read_bytes()
        parts[part]["bytes"] += len(content)
        parts[part]["gzip"] += len(gzip.compress(content, 6))
    return {"total": {k: sum(p[k] for p in parts.values()) for k in ("bytes", "gzip")}, "parts": parts}


def _said(sizes: dict) -> str:
    def of(p):
        return f"{p['bytes'] / 1e6:.2f} MB ({p['gzip'] / 1e6:.2f} gzipped)"

    return f"download {of(sizes['total'])}: " + ", ".join(f"{name} {of(p)}" for name, p in sizes["parts"].items())


# ---------------------------------------------------------------------------------------------------------- the server


class _Handler(SimpleHTTPRequestHandler):
    """Files below one folder with their types and the headers that isolate the page; GET and HEAD, no listings."""

    extensions_map: Mapping[str, str] = TYPES | {"": "application/octet-stream"}
    protocol_version = "HTTP/1.1"
    served: tuple[str, ...] = ()
    headers_on = True

    def send_head(self):
        host = self.headers.get("host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # another name that leads here is someone else's page asking
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        if self.path.split("?")[0].endswith("/") and self.path.split("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path):
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self):
        self.send_header("cache-control", "no-cache")
        for name, value in HEADERS.items() if self.headers_on else ():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


def server(folder: str | Path, port: int = 0, *, headers: bool = True) -> ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1 that does not run yet: `serve_forever()`, `shutdown()`, `server_close()` are its own.

    `port=0` takes a free one, found in `.server_port`. `headers=False` is a plain host that knows none of the page's headers.
    Raises ExportError when `folder` holds no page, or when the port is taken.
    """
    folder = Path(folder).resolve()
    if not (folder / "web.json").is_file():
        raise ExportError(f"{folder} holds no page of edgelab (there is no web.json); write one with export first")
    handler = type("Handler", (_Handler,), {"headers_on": headers})
    try:
        made = ThreadingHTTPServer(("127.0.0.1", port), lambda *a, **k: handler(*a, directory=str(folder), **k))
    except OSError as e:
        raise ExportError(f"port {port} of 127.0.0.1 cannot be had ({e.strerror}); choose another, or 0 for a free one") from e
    made.daemon_threads = True
    return made


@contextmanager
def serving(folder: str | Path, port: int = 0, *, headers: bool = True) -> Iterator[str]:
    """The address of the page, served from a thread for as long as the block lasts."""
    made = server(folder, port, headers=headers)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/"
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def serve(folder: str | Path, port: int = 8765) -> None:
    """Serves the page on 127.0.0.1 until it is interrupted (Ctrl-C)."""
    with serving(folder, port) as address:
        print(f"{address} (this machine only; Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


# ------------------------------------------------------------------------------------------------------ verification


def chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def _browser():
    """(playwright's sync_playwright, path of Chromium)."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ExportError(
            'the page is verified in a browser, driven by playwright: pip install "edgelab[test]", or export with check=False'
        ) from None
    path = chromium()
    if path is None:
        raise ExportError(
            "the page is verified in a real browser, and there is no Chromium or Chrome on the PATH "
            "(Debian and Ubuntu: apt install chromium); export with check=False to leave that out"
        )
    return sync_playwright, path


class Wall:
    """A proxy on 127.0.0.1 that lets nothing through and writes down what was asked: a browser's only way out leads here.

    It sees what a page's own counter and the driver's interception cannot: requests of workers, service workers and of the browser.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                peer.settimeout(2)
                line = peer.recv(2048).split(b"\r\n", 1)[0].decode("latin-1")
                if line:
                    self.asked.append(line)
                peer.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def arguments(self) -> list[str]:
        """Chromium's: everything but 127.0.0.1 goes to this proxy, and the browser has no business of its own."""
        return [
            "--no-sandbox",
            f"--proxy-server=http://127.0.0.1:{self.port}",
            "--proxy-bypass-list=127.0.0.1",
            # what the browser would ask for by itself, on any page: updates, the time, its accounts, hints how to fill in forms
            "--disable-features=AutofillServerCommunication,OptimizationHints,MediaRouter,Translate,NetworkTimeServiceQuerying",
            "--disable-background-networking",
            "--disable-component-update",
            "--component-updater=url-source=http://127.0.0.1:9/",
            "--gaia-url=http://127.0.0.1:9/",
            "--disable-domain-reliability",
            "--disable-sync",
            "--no-first-run",
            "--no-pings",
        ]


@dataclass
class Opened:
    """A page in a browser: the tab, what was asked of other addresses (`asked`), the scripts' errors."""

    tab: object
    wall: Wall
    intercepted: list[str]
    errors: list[str]

    @property
    def asked(self) -> list[str]:
        return [*self.wall.asked, *self.intercepted]

    def logits(self, ids: np.ndarray, step: int | None = None) -> np.ndarray:
        """float32 [T, vocabulary] of the page's own runtime; `step`: fed in pieces of that many tokens, through the cache."""
        raw = self.tab.evaluate(
            """async ([ids, step]) => {
                const bytes = new Uint8Array((await edgelab.logits(ids, step ?? undefined)).buffer);
                let text = "";
                for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
                return btoa(text);
            }""",
            [ids.tolist(), step],
        )
        return np.frombuffer(base64.b64decode(raw), np.float32).reshape(len(ids), -1)


@contextmanager
def opened(profile: str | Path, address: str, **context) -> Iterator[Opened]:
    """The page at `address` in a Chromium with the user data folder `profile`, ready to answer, every other address walled off."""
    sync_playwright, path = _browser()
    origin = "/".join(address.split("/")[:3]) + "/"
    wall = Wall()
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch_persistent_context(
                str(profile), executable_path=path, args=wall.arguments(), **({"viewport": {"width": 1280, "height": 800}} | context)
            )
            try:
                intercepted: list[str] = []
                errors: list[str] = []

                def decide(route):
                    url = route.request.url
                    if url.startswith((origin, "blob:", "data:")):
                        route.continue_()
                    else:
                        intercepted.append(url)
                        route.abort()

                browser.route("**/*", decide)
                tab = browser.pages[0] if browser.pages else browser.new_page()
                tab.set_default_timeout(120_000)
                tab.on("pageerror", lambda e: errors.append(str(e)))
                tab.goto(address)
                yield Opened(tab, wall, intercepted, errors)
            finally:
                browser.close()
    finally:
        wall.close()


def verify(
    result: ExportResult, model: nn.Module, *, lengths: tuple[int, ...] = LENGTHS, min_cosine: float = MIN_COSINE, seed: int = 0
) -> ExportResult:
    """`result` with the parity that the page reached in a real Chromium, and a note of how fast it answered.

    Its ONNX file is verified first (`onnx.verify`: every code). Then the folder is served on 127.0.0.1; every other address leads to a
    wall that counts. Checked: logits on random tokens of each of `lengths`, once in one go and once through the cache in pieces,
    against `model`; the greedy answer to the first example, token for
    token against torch; then the server is stopped, the browser started anew, and the same question asked of what the service worker
    stored. No request may have left.

    Raises ExportError for the first of these that fails, or without playwright and Chromium.
    """
    _browser()
    model = causal_lm(model)
    with ThreadPoolExecutor(1) as thread:  # playwright's driver cannot run inside a notebook's event loop
        return thread.submit(_verify, result, model, lengths, min_cosine, seed).result()


def _verify(result: ExportResult, model: nn.Module, lengths: tuple[int, ...], min_cosine: float, seed: int) -> ExportResult:
    from edgelab.export import onnx

    folder = result.files[0].parent
    counted = onnx.verify(replace(result, files=(folder / "model.onnx",)), model, lengths=lengths, min_cosine=min_cosine, seed=seed)
    task = json.loads((folder / "web.json").read_text(encoding="utf-8"))["tasks"][0]
    text = task["examples"][0] if task["examples"] else "a"
    settings = {"chat": task["chat"], "limit": min(task["limit"], 48), "temperature": 0}
    with tempfile.TemporaryDirectory() as profile:
        with serving(folder) as address:
            port = int(address.rsplit(":", 1)[1].strip("/"))
            with opened(profile, address) as page:
                began = time.perf_counter()
                _ready(page)
                cold_s = time.perf_counter() - began
                whole = agreement(page.logits, model, lengths, seed)
                pieces = agreement(lambda ids: page.logits(ids, 5), model, lengths, seed + 1)
                parity = {k: (min if k in ("cosine", "top1_agreement") else max)(whole[k], pieces[k]) for k in whole}
                if not parity["cosine"] >= min_cosine:
                    raise ExportError(
                        f"logits in the browser have cosine {whole['cosine']:.6f} (in one go) and {pieces['cosine']:.6f} (through the "
                        f"cache) to torch's; {min_cosine} is asked for"
                    )
                answer = page.tab.evaluate("([text, settings]) => edgelab.answer(text, settings)", [text, settings])
                _same_answer(answer, model)
                threads = page.tab.evaluate("edgelab.threads()")
                version = page.tab.context.browser.version if page.tab.context.browser else ""
                version = version or page.tab.evaluate("navigator.userAgent").rsplit("Chrome/", 1)[-1].split(" ")[0]
                _silent(page)
        # the server is gone: a fresh browser has nothing but what was stored
        with opened(profile, f"http://127.0.0.1:{port}/") as page:
            _ready(page)
            again = page.tab.evaluate(
                """async ([text, settings]) => {
                    const answer = await edgelab.answer(text, settings);
                    return { ...answer, since_start_ms: performance.now(), state: await edgelab.state() };
                }""",
                [text, settings],
            )
            _silent(page)
    if again["ids"] != answer["ids"]:
        raise ExportError(f"offline the page answers {again['text']!r} to {text!r}; with the server it was {answer['text']!r}")
    shown = (
        f"offline from a fresh browser: answer to {text!r} whole {again['since_start_ms'] / 1000:.1f} s after opening; first token "
        f"{again['first_ms']:.0f} ms, {again['tokens_per_s'] or 0:.0f} tokens/s, {threads} threads, "
        f"{again['state']['wasm_bytes'] / 1e6:.0f} MB of WebAssembly memory; first visit ready in {cold_s:.1f} s from this machine's server"
    )
    tokens = " + ".join(map(str, lengths))
    by = f"{RUNTIME} {RUNTIME_VERSION} in Chromium {version}, {tokens} tokens whole and through the cache, no request left"
    return replace(counted, target="web", files=result.files, parity=parity, verified_by=by, notes=(*result.notes, shown))


def _ready(page: Opened) -> None:
    try:
        page.tab.evaluate("edgelab.ready")
    except Exception as e:
        said = page.tab.evaluate("document.querySelector('#state')?.textContent ?? ''")
        raise ExportError(f"the page does not start: {said or e}") from e


def _silent(page: Opened) -> None:
    """Raises ExportError if anything asked for another address, by the wall, the driver or the page's own count."""
    counted = page.tab.evaluate("edgelab.requests()")
    if page.asked or counted["away"] or counted["stopped"] or page.errors:
        raise ExportError(f"the page is not silent: {[*page.asked, *counted['away'], *counted['stopped'], *page.errors][:3]}")


@torch.no_grad()
def _same_answer(answer: dict, model: nn.Module, tie: float = 1e-3) -> None:
    """Raises ExportError unless each token of a greedy answer is the one that torch finds likeliest (within `tie` of its logit)."""
    ids = torch.tensor([[*answer["prompt"], *answer["ids"]]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(answer["prompt"]) - 1 : -1]
    chosen = logits.gather(1, ids[0, len(answer["prompt"]) :, None])[:, 0]
    behind = logits.max(1).values - chosen
    if not answer["ids"] or not bool((behind <= tie).all()):
        at = int((behind > tie).nonzero()[0]) if answer["ids"] else 0
        raise ExportError(
            f"the answer {answer['text']!r} leaves torch's at token {at + 1}, whose logit is {float(behind.max()):.4f} below the best"
        )
