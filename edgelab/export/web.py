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

import gzip
import hashlib
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
from torch import nn

from edgelab.export import ExportError, ExportResult
from edgelab.export.checks import LENGTHS, MIN_COSINE, agreement, causal_lm, refuse_other_arithmetic, require, whole_or_nothing
from edgelab.export.web_browser import Opened, find_browser, opened
from edgelab.export.web_runtime import _MIT, RUNTIME, RUNTIME_VERSION, runtime_files
from edgelab.export.web_server import HEADERS, POLICY, TYPES, serving
from edgelab.export.web_tokens import FORMAT, tasks_of, tokenizer_data

PAGE = Path(__file__).resolve().parent / "web_page"


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
        find_browser()  # missing? then say so before the work

    with whole_or_nothing(out, ours="web.json") as (folder,):
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
    from edgelab.export import onnx

    find_browser()
    model = causal_lm(model)
    written = result.files[0].parent / "model.onnx"
    counted = onnx.verify(replace(result, files=(written,)), model, lengths=lengths, min_cosine=min_cosine, seed=seed)
    result = replace(counted, target="web", files=result.files)
    with ThreadPoolExecutor(1) as thread:  # playwright's driver cannot run inside a notebook's event loop
        return thread.submit(_verify, result, model, lengths, min_cosine, seed).result()


def _verify(result: ExportResult, model: nn.Module, lengths: tuple[int, ...], min_cosine: float, seed: int) -> ExportResult:
    folder = result.files[0].parent
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
                require(whole, "the page in the browser (in one go)", min_cosine)
                require(pieces, "the page in the browser (through the cache)", min_cosine)
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
    return replace(result, parity=parity, verified_by=by, notes=(*result.notes, shown))


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
