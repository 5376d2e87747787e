"""The folder answers in a real Chromium as torch does, without a network, and its tokenizer is the tokenizer."""

import hashlib
import http.client
import io
import json
import random
import shutil
import subprocess
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedTokenizerFast, Qwen3Config

from edgelab import paths
from edgelab.export import ExportError, web, web_browser, web_runtime, web_server, web_tokens
from edgelab.model import load, load_tokenizer

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on the PATH")


def runtime_or_none():
    """The runtime, where an earlier export has left it: tests fetch nothing."""
    if not all((web_runtime.cache_dir() / name).is_file() for name in web_runtime.RUNTIME_FILES):
        return None
    return web_runtime.runtime_files()


RUNTIME = runtime_or_none()
needs_runtime = pytest.mark.skipif(
    RUNTIME is None, reason=f"{web_runtime.RUNTIME} is not in {web_runtime.cache_dir()}; web_runtime.runtime_files() fetches it"
)


def node(script: str, data) -> object:
    """What `script` (a module that sees `data` and the page's folder `page`) prints, read as JSON."""
    head = 'import { readFileSync } from "node:fs";\nconst { page, data } = JSON.parse(readFileSync(0, "utf8"));\n'
    text = json.dumps({"page": web.PAGE.as_uri(), "data": data})
    done = subprocess.run([NODE, "--input-type=module", "-e", head + script], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer(paths.data_dir() / "edge-moe")


def trained(pre, normalizer=None, added=(), **model) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on this file's own text, cut by `pre`."""
    t = Tokenizer(models.BPE(**model))
    t.normalizer, t.decoder = normalizer, decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.Sequence([*pre, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False
    )
    t.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), web_runtime._MIT], trainer)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<s>")
    made.add_tokens([AddedToken(t, normalized=False, special=False) for t in added])
    return made


def split(pattern: str):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = {
    "gpt2": lambda: trained([split(web_tokens._GPT2)]),
    "qwen": lambda: trained([split(QWEN)], normalizers.NFC(), added=["<|im_start|>", "<|im_start|>x", "<ü 🙂>"]),
    "whole": lambda: trained([split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"))], ignore_merges=True),
}


def texts(n: int) -> list[str]:
    """Texts that have broken tokenizers, and `n` random ones of all scripts."""
    r = random.Random(0)
    every = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    hard = [
        "",
        " ",
        "a",
        "  \n\n\tx   ",
        "\r\n\r\n a",
        "\x85x",
        "\ufeffx \ufeff",
        "a\u2028b\u3000 c",
        "\x1c\x1d \x1e",
        "٣٤ ①② Ⅷ ½",
        "e\u0301é ſ'ſ K'K",
    ]
    hard += [
        "<|user|>hi<|call|>",
        "x<|end|><|e",
        "<|im_start|>xy<|im_start|>",
        "<ü 🙂><s>",
        "🙂👩‍👩‍👧‍👦🇦🇹",
        "it's IT'S we'Ll",
        "12345+678=",
        "\\d{2}|[a]",
    ]
    hard += [
        json.dumps({"call": "timer", "seconds": 720}),
        "def f(x):\n        return x\n",
        "नमस्ते 你好 שלום",
        "\U0001f468\u200d\U0001f4bb" * 40,
    ]
    alphabet = "ab Zé 1\n\t'.,<|{\"你"
    drawn = ("".join(r.choice(every) if r.random() < 0.4 else r.choice(alphabet) for _ in range(r.randrange(1, 60))) for _ in range(n))
    return [*hard, *drawn]


IN_JAVASCRIPT = """
const { Tokenizer } = await import(`${page}/tokenizer.js`);
const t = new Tokenizer(data.tokens);
console.log(JSON.stringify(data.texts.map(text => {
  const ids = t.encode(text);
  const stream = t.stream();
  return [ids, t.decode(ids, { special: true }), t.decode(ids), ids.map(id => stream.push(id)).join("") + stream.end()];
})));
"""


@needs_node
@pytest.mark.parametrize("kind", ["embedded", *KINDS])
def test_javascript_gives_the_ids_and_the_text_of_python(kind, embedded):
    t = embedded if kind == "embedded" else KINDS[kind]()
    some = texts(400)
    for text, (ids, special, plain, streamed) in zip(
        some, node(IN_JAVASCRIPT, {"tokens": web_tokens.tokenizer_data(t), "texts": some}), strict=True
    ):
        expected = t(text)["input_ids"]
        assert ids == expected, text
        assert special == t.decode(expected), text
        assert plain == streamed == t.decode(expected, skip_special_tokens=True), text


@needs_node
def test_javascript_decodes_ids_that_are_no_text(embedded):
    """Half a character, many of them: what a model writes is not always UTF-8."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(embedded), 30).tolist() for _ in range(200)]
    script = """
    const { Tokenizer } = await import(`${page}/tokenizer.js`);
    const t = new Tokenizer(data.tokens);
    console.log(JSON.stringify(data.rows.map(ids => t.decode(ids))));
    """
    found = node(script, {"tokens": web_tokens.tokenizer_data(embedded), "rows": rows})
    expected = [embedded.decode(ids, skip_special_tokens=True) for ids in rows]
    assert found == expected and any("\ufffd" in text for text in expected)


@needs_node
def test_javascript_applies_the_chat_template(embedded):
    some = ["set a timer", " two  words \n", "ü 🙂", "<|call|>x", "{{ x }}"]
    script = """
    const { Tokenizer } = await import(`${page}/tokenizer.js`);
    const t = new Tokenizer(data.tokens);
    console.log(JSON.stringify(data.texts.map(x => t.encode(t.chat(x), { begin: false }))));
    """
    found = node(script, {"tokens": web_tokens.tokenizer_data(embedded), "texts": some})
    expected = [embedded.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False) for x in some]
    assert found == expected


def test_a_template_that_trims_is_followed_and_one_that_does_more_is_refused():
    t = KINDS["gpt2"]()
    assert web_tokens.tokenizer_data(t)["chat"] is None
    t.chat_template = "[{{ messages[0].content | trim }}]"
    assert web_tokens.tokenizer_data(t)["chat"] == {"before": "[", "after": "]", "trim": True}
    t.chat_template = "{{ messages[0].content | upper }}!"
    with pytest.raises(ExportError, match="chat template does more than put text before and after"):
        web_tokens.tokenizer_data(t)


def test_other_tokenizers_are_refused(embedded):
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(ExportError, match="the tokenizer is Unigram; the page reads byte-level BPE only"):
        web_tokens.tokenizer_data(unigram)
    with pytest.raises(ExportError, match="no fast tokenizer"):
        web_tokens.tokenizer_data(object())
    with pytest.raises(ExportError, match="normalizes text by Lowercase"):
        web_tokens.tokenizer_data(trained([split(web_tokens._GPT2)], normalizers.Lowercase()))
    with pytest.raises(ExportError, match="cuts text by Metaspace"):
        web_tokens.tokenizer_data(trained([pre_tokenizers.Metaspace()]))
    behind = trained([split(web_tokens._GPT2)])
    behind.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 0)])
    with pytest.raises(ExportError, match="puts tokens behind a text"):
        web_tokens.tokenizer_data(behind)


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"a++", r"[^\r\n]?+\p{L}+", r"(?<=a)b", r"(?>a)", r"\h", r"[[a]&&[b]]", r"\p{Han}", r"\p{Script=Greek}"]
)
def test_patterns_that_could_mean_something_else_are_refused(pattern):
    with pytest.raises(ExportError, match="is not known to JavaScript"):
        web_tokens.browser_pattern(pattern)


# ---------------------------------------------------------------------------------------------------- engine

ENGINE = """
const { Engine, choose, generator } = await import(`${page}/engine.js`);
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
// a model whose next token is one more than the sum of all tokens so far, which it can only know through its cache
const session = { async run({ input_ids, attention_mask, "past_key_values.0.key": past }) {
  const n = input_ids.dims[1];
  if (attention_mask.dims[1] !== past.dims[2] + n) throw new Error("the mask does not cover the past");
  const all = [...past.data, ...Array.from(input_ids.data, Number)];
  const logits = new Float32Array(n * 50);
  for (let i = 0; i < n; i++) logits[i * 50 + (1 + all.slice(0, all.length - n + i + 1).reduce((a, b) => a + b, 0)) % 50] = 5;
  return { logits: { data: logits }, "present.0.key": new Tensor("float32", Float32Array.from(all), [1, 1, all.length, 1]) };
} };
const shape = { vocabulary: 50, context: data.context, caches: [{ name: "past_key_values.0.key", heads: 1, width: 1 }] };
const engine = new Engine({ Tensor }, session, shape);
"""


@needs_node
def test_the_engine_carries_the_cache_and_knows_when_to_end():
    script = (
        ENGINE
        + """
    const each = [];
    const free = await engine.answer([1, 2], { stop: [], limit: 4, each: id => each.push(id) });
    const stop = await engine.answer([1, 2], { stop: [free.ids[2]], limit: 9 });
    const context = await engine.answer([1, 2], { stop: [], limit: 99 });
    let steps = 0;
    const stopped = await engine.answer([1, 2], { stop: [], limit: 99, stopped: async () => ++steps === 3 });
    const long = await engine.answer(Array(11).fill(1), { stop: [], limit: 9 }).catch(e => e.message);
    console.log(JSON.stringify({ free, each, stop, context, stopped, long }));
    """
    )
    found = node(script, {"context": 10})
    ids, total = [], 3
    for _ in range(12):
        ids.append((1 + total) % 50)
        total += ids[-1]
    assert found["free"]["ids"] == found["each"] == ids[:4] and found["free"]["ended"] == "limit"
    assert found["stop"]["ids"] == ids[:3] and found["stop"]["ended"] == "stop"
    assert found["context"]["ids"] == ids[:9] and found["context"]["ended"] == "context"  # the last one is written, not read
    assert found["stopped"]["ids"] == ids[:3] and found["stopped"]["ended"] == "stopped"
    assert found["long"] == "the text has 11 tokens; this model reads 10 at most"


@needs_node
def test_sampling_follows_the_softmax_and_repeats_with_its_seed():
    script = (
        ENGINE
        + """
    const random = generator(7);
    const draws = Array.from({ length: 20000 }, () => choose(Float32Array.from(data.logits), data.temperature, random));
    const twice = [generator(3), generator(3)].map(g => [g(), g(), g()]);
    console.log(JSON.stringify({ draws, greedy: choose(Float32Array.from(data.logits), 0, random), twice }));
    """
    )
    logits = [0.0, 2.0, -1.0, 1.5, -30.0]
    found = node(script, {"context": 10, "logits": logits, "temperature": 0.8})
    p = np.exp(np.array(logits) / 0.8)
    p /= p.sum()
    shares = np.bincount(found["draws"], minlength=5) / 20000
    assert np.abs(shares - p).max() < 4 * np.sqrt(0.25 / 20000)  # four standard deviations of the widest share
    assert found["greedy"] == 1 and found["twice"][0] == found["twice"][1] and len(set(found["twice"][0])) == 3


# --------------------------------------------------------------------------------------------------- runtime


@pytest.fixture
def small_runtime(monkeypatch, tmp_path):
    """A runtime of three small files under other hashes: (contents, a maker of its npm package), with an empty cache."""
    contents = {name: name.encode() * 3 for name in web_runtime.RUNTIME_FILES}
    monkeypatch.setattr(web_runtime, "RUNTIME_FILES", {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def package(path: Path, **changes: bytes) -> Path:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in (contents | {k.replace("_", "."): v for k, v in changes.items()}).items():
                info = tarfile.TarInfo(f"package/dist/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return contents, package


def test_the_runtime_comes_from_a_folder_or_a_package_and_stays_in_the_cache(small_runtime, tmp_path, monkeypatch):
    contents, package = small_runtime
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match=r"npm is not installed. On a machine with a network run `npm pack onnxruntime-web@1.30.0`"):
        web_runtime.runtime_files()
    found = web_runtime.runtime_files(package(tmp_path / "ort.tgz"))
    assert {name: p.read_bytes() for name, p in found.items()} == contents
    assert web_runtime.runtime_files() == found  # from the cache now: there is no npm here
    (tmp_path / "mine" / "dist").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"holds no ort\.wasm\.min\.mjs"):
        web_runtime.runtime_files(tmp_path / "mine")
    for name, content in contents.items():
        (tmp_path / "mine" / "dist" / name).write_bytes(content)
    assert web_runtime.runtime_files(tmp_path / "mine")["ort.wasm.min.mjs"] == tmp_path / "mine" / "dist" / "ort.wasm.min.mjs"


def test_a_changed_runtime_is_refused_and_not_kept(small_runtime, tmp_path):
    _, package = small_runtime
    bad = package(tmp_path / "bad.tgz", ort_wasm_min_mjs=b"evil")
    with pytest.raises(ExportError, match=r"ort.wasm.min.mjs has the sha256 .* it is another version, or damaged"):
        web_runtime.runtime_files(bad)
    (tmp_path / "no.tgz").write_bytes(b"not a tarball")
    with pytest.raises(ExportError, match="is not the npm package"):
        web_runtime.runtime_files(tmp_path / "no.tgz")
    assert not web_runtime.cache_dir().exists() or not any(web_runtime.cache_dir().iterdir())


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on the PATH")
def test_without_a_network_npm_fails_and_the_error_says_what_to_do(small_runtime, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(web_runtime.cache_dir().parent / "npm"))
    with pytest.raises(ExportError, match=r"npm could not fetch onnxruntime-web 1.30.0 .*bring the .tgz here and pass runtime="):
        web_runtime.runtime_files()
    assert not web_runtime.cache_dir().exists()


# --------------------------------------------------------------------------------------------------- the page


def test_every_file_of_the_page_has_a_type_and_loads_nothing_from_elsewhere():
    for path in web.PAGE.iterdir():
        assert path.suffix in web_server.TYPES
        if path.suffix in (".html", ".js", ".css", ".webmanifest"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "").replace("https://example.invalid/", "")
            assert "http:" not in text and "https:" not in text and 'src="//' not in text, path
            assert max(map(len, text.splitlines())) <= 140, path


def tiny(vocabulary: int = 2048):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        DeepseekV3Config(
            vocab_size=vocabulary, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
            num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4,
            num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=16, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    ).float().eval()  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory, embedded):
    """(folder, result) of a random model's page, written without a check."""
    if RUNTIME is None:
        pytest.skip(f"{web_runtime.RUNTIME} is not in {web_runtime.cache_dir()}; web_runtime.runtime_files() fetches it")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    out = tmp_path_factory.mktemp("web") / "page"
    return out, web.export(tiny(), out, tokenizer=embedded, check=False, title="A <b> & c")


def test_the_folder_is_whole(page):
    out, result = page
    assert {f.relative_to(out).as_posix() for f in result.files} == {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    assert result.target == "web" and result.files[0] == out / "index.html" and not list(out.parent.glob("*.tmp"))
    code = (out / "sw.js").read_text()
    listed = json.loads(code.split("const FILES = ")[1].split("; // {name")[0])
    for name, stated in listed.items():
        content = (out / name).read_bytes()
        assert stated["bytes"] == len(content) and stated["sha256"] == hashlib.sha256(content).hexdigest()
    assert set(listed) == {f.relative_to(out).as_posix() for f in result.files} - {"sw.js"}
    sizes = json.loads((out / "files.json").read_text())
    assert sizes["total"]["bytes"] == sum(listed[n]["bytes"] for n in listed if n != "files.json")
    assert 14e6 < sizes["parts"]["runtime"]["bytes"] < 15e6 and sizes["total"]["gzip"] < sizes["total"]["bytes"]
    assert "A &lt;b&gt; &amp; c" in (out / "index.html").read_text() and "__" not in (out / "index.html").read_text()
    assert json.loads((out / "manifest.webmanifest").read_text())["name"] == "A <b> & c"
    about = json.loads((out / "web.json").read_text())
    assert about["model"]["stop"] == [0] and [(c["heads"], c["width"]) for c in about["model"]["caches"]] == [(1, 32), (1, 8)] * 2
    assert [t["id"] for t in about["tasks"]] == ["command", "sum", "text"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, embedded, page):
    with pytest.raises(ExportError, match="tokenizer is not given, and a module brings none"):
        web.export(tiny(), tmp_path / "page")
    with pytest.raises(ExportError, match="ids up to 2047, the model a vocabulary of 96: they do not belong together"):
        web.export(tiny(96), tmp_path / "page", tokenizer=embedded)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is no page of edgelab"):
        web.export(tiny(), tmp_path / "other", tokenizer=embedded)
    assert [p.name for p in tmp_path.rglob("*")] == ["other", "thesis.txt"]


def test_without_a_browser_the_check_says_so(tmp_path, embedded, page, monkeypatch):
    pytest.importorskip("playwright")
    monkeypatch.setattr(web_browser, "chromium", lambda: None)
    with pytest.raises(ExportError, match=r"no Chromium or Chrome on the PATH .* check=False"):
        web.export(tiny(), tmp_path / "page", tokenizer=embedded)
    assert not list(tmp_path.iterdir())


def ask(address: str, path: str, host: str | None = None):
    to = http.client.HTTPConnection(*address.split("/")[2].split(":"), timeout=10)
    to.request("GET", path, headers={"host": host} if host else {})
    answer = to.getresponse()
    body = answer.read()
    to.close()
    return answer, body


def test_the_server_gives_types_and_isolation_and_nothing_else(page, tmp_path):
    out, _ = page
    with web_server.serving(out) as address:
        assert address.startswith("http://127.0.0.1:")
        for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/ort/ort.wasm.min.mjs", "text/javascript")):
            answer, body = ask(address, path)
            assert answer.status == 200 and answer.headers["content-type"].startswith(kind) and body
            assert answer.headers["cross-origin-opener-policy"] == "same-origin"
            assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert ask(address, "/ort/ort-wasm-simd-threaded.wasm")[0].headers["content-type"] == "application/wasm"
        assert ask(address, "/manifest.webmanifest")[0].headers["content-type"] == "application/manifest+json"
        assert ask(address, "/ort/")[0].status == 404
        assert ask(address, "/../../etc/passwd")[0].status == 404
        assert ask(address, "/", host="rebound.example:80")[0].status == 421
        with pytest.raises(ExportError, match="cannot be had"):
            web_server.server(out, int(address.split(":")[2].strip("/")))
    with pytest.raises(ExportError, match="holds no page of edgelab"):
        web_server.server(tmp_path)


# ------------------------------------------------------------------------------------------------ the browser

in_browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    needs_runtime,
    pytest.mark.skipif(
        web_browser.chromium() is None, reason="no Chromium or Chrome on the PATH (Debian and Ubuntu: apt install chromium)"
    ),
]


def browser_test(test):
    for mark in in_browser:
        test = mark(test)
    return test


@browser_test
def test_the_page_computes_what_torch_computes_and_needs_no_server_twice(page):
    pytest.importorskip("playwright")
    _, result = page
    found = web.verify(result, tiny())
    assert found.parity["cosine"] >= 0.9999 and found.parity["top1_agreement"] >= 0.99
    assert "Chromium" in found.verified_by and "offline from a fresh browser" in found.notes[-1]
    with pytest.raises(ExportError, match=r"logits of the page in the browser .* have cosine"):
        torch.manual_seed(1)
        other = tiny()
        for p in other.parameters():
            p.data += 0.05 * torch.randn_like(p)
        web._verify(result, other, (24,), 0.9999, 0)  # what runs in the browser; the file alone would be refused before
    with pytest.raises(ExportError, match="the floats in the file are not the model"):
        web.verify(result, other)


@browser_test
def test_a_person_can_ask_stop_and_see_that_nothing_left(page, tmp_path):
    pytest.importorskip("playwright")
    out, _ = page
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with web_server.serving(out) as address, web_browser.opened(tmp_path / "profile", address, **phone) as opened:
        tab = opened.tab
        tab.evaluate("edgelab.ready")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("crossOriginIsolated") and tab.evaluate("edgelab.threads()") == 1
        # a sum gets its form; what is none is told so and not sent
        tab.locator("#task-sum").check()
        tab.fill("#prompt", "seven")
        tab.press("#prompt", "Enter")
        assert "A sum of two numbers" in tab.locator("#hint").inner_text() and tab.locator(".turn").count() == 0
        tab.fill("#prompt", " 12 +34 ")
        tab.press("#prompt", "Enter")
        tab.locator(".figures:not(:empty)").first.wait_for()
        assert tab.locator(".question").first.inner_text() == "12+34="
        assert tab.locator("#said").inner_text().startswith("Answer: ")
        # a long answer is stopped while it is being written, and the page answers the click at once
        tab.locator("#task-text").check()
        tab.evaluate("document.querySelector('#limit').value = 512")
        tab.fill("#prompt", "import os")
        tab.press("#prompt", "Enter")
        tab.locator("#stop").click()
        tab.locator(".figures:not(:empty)").nth(1).wait_for()
        stopped = tab.evaluate("""async () => {
            const answer = edgelab.answer("x", { limit: 200, temperature: 5, chat: false });
            setTimeout(() => document.querySelector("#stop").dispatchEvent(new Event("click")), 0);
            return answer;
        }""")
        assert stopped["ended"] == "stopped"
        assert tab.locator("#memory").inner_text() != "–" and int(tab.locator("#local").inner_text()) > 8
        assert opened.asked == [] and opened.errors == []
        tried = tab.evaluate("edgelab.tryToLeak()")
        assert tried == {"page": "blocked", "worker": "blocked", "by_policy": True}
        assert opened.asked == []  # the policy stopped it before the wall had to
        tab.click("#leak")
        tab.wait_for_timeout(500)
        assert "nothing was sent" in tab.locator("#leak-result").inner_text()
        assert tab.locator("#left").inner_text() == "0" == tab.locator("#badge-count").inner_text()


@browser_test
def test_the_wall_sees_a_page_that_sends(page, tmp_path):
    """The control of the tests above: without the policy the same request reaches the wall, and the page's own count shows it."""
    pytest.importorskip("playwright")
    out = tmp_path / "open"
    shutil.copytree(page[0], out)
    html = (out / "index.html").read_text()
    (out / "index.html").write_text(html.replace(web_server.POLICY, web_server.POLICY.replace("connect-src 'self'", "connect-src *")))
    (out / "sw.js").unlink()
    with web_server.serving(out, headers=False) as address, web_browser.opened(tmp_path / "profile", address) as opened:
        opened.tab.evaluate("edgelab.ready")
        opened.tab.evaluate("fetch('http://example.invalid/words', {mode: 'no-cors'}).catch(() => 0)")
        opened.tab.wait_for_timeout(500)
        assert any("example.invalid/words" in line for line in opened.asked)


@browser_test
def test_a_plain_host_becomes_isolated_and_threads_work(page, tmp_path):
    """A host without the headers: the service worker adds them, so the page loads itself once more and may have threads."""
    pytest.importorskip("playwright")
    out, _ = page
    with web_server.serving(out, headers=False) as address, web_browser.opened(tmp_path / "profile", address + "?threads=2") as opened:
        tab = opened.tab
        tab.wait_for_selector("#prompt:enabled")
        assert tab.evaluate("crossOriginIsolated") and tab.evaluate("edgelab.threads()") == 2
        two = opened.logits(np.arange(12))
        assert opened.asked == [] and opened.errors == []
        tab.goto(address + "?threads=1")
        tab.evaluate("edgelab.ready")
        assert np.abs(two - opened.logits(np.arange(12))).max() < 1e-4


@browser_test
def test_a_changed_file_is_not_stored_and_an_update_waits_for_the_reader(page, tmp_path):
    pytest.importorskip("playwright")
    out = tmp_path / "page"
    shutil.copytree(page[0], out)
    style = (out / "style.css").read_bytes()
    (out / "style.css").write_bytes(style + b"\n")
    stored = "async () => (await Promise.all((await caches.keys()).map(async k => (await (await caches.open(k)).keys()).length)))"
    with web_server.serving(out) as address, web_browser.opened(tmp_path / "profile", address) as opened:
        tab = opened.tab
        tab.evaluate("edgelab.ready")  # it works all the same, from the server
        assert "style.css was changed" in tab.locator("#offline").inner_text() and tab.evaluate(stored) == []
        (out / "style.css").write_bytes(style)
        tab.reload()
        tab.evaluate("edgelab.ready")
        files = len(json.loads((out / "sw.js").read_text().split("const FILES = ")[1].split("; // {name")[0]))
        assert "works without a network" in tab.locator("#offline").inner_text() and tab.evaluate(stored) == [files]
        # a new version: the old one goes on until the reader says so
        web._write_page(out, "second edition")
        tab.reload()
        tab.locator("#update").wait_for()
        assert tab.title() == "A <b> & c"
        with tab.expect_navigation():
            tab.click("#update")
        tab.wait_for_selector("#prompt:enabled")
        assert tab.title() == "second edition" and tab.evaluate(stored) == [files]


@browser_test
def test_embedded_model_answers_a_command_offline(tmp_path):
    """The model for phones, from its bundle: 2, 3 and 4 bits, verified in Chromium, then asked what the corpus knows the answer to."""
    pytest.importorskip("playwright")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    out = tmp_path / "page"
    bundle = paths.data_dir() / "edge-phone"
    result = web.export(bundle, out)
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert load(bundle).config.n_routed_experts == 8
    with web_server.serving(out) as address, web_browser.opened(tmp_path / "profile", address) as opened:
        opened.tab.evaluate("edgelab.ready")
        opened.tab.locator("#examples button").first.click()
        opened.tab.locator(".call").wait_for()
        assert json.loads(opened.tab.locator(".answer").inner_text()) == {"call": "heat", "room": "kitchen", "degrees": 21}
        assert opened.asked == []


@browser_test
def test_a_dense_model_with_another_tokenizer(tmp_path):
    pytest.importorskip("playwright")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=768, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_hidden_layers=2,
        intermediate_size=96, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    result = web.export(AutoModelForCausalLM.from_config(config).float().eval(), tmp_path / "page", tokenizer=KINDS["qwen"]())
    assert result.parity["cosine"] >= 0.9999 and result.experts_total == 0
    about = json.loads((tmp_path / "page" / "web.json").read_text())
    assert [t["id"] for t in about["tasks"]] == ["text"] and [(c["heads"], c["width"]) for c in about["model"]["caches"]] == [(1, 16)] * 4
