"""The exported Android module, compiled here and run on the JVM: torch's logits and tokens, the library's tokenizer, Java exceptions."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
from test_export_web import KINDS, texts, trained
from test_export_web import tiny as tiny_model
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from edgelab import paths
from edgelab.compress import compress
from edgelab.export import ExportError, ExportResult, android, android_jvm
from edgelab.model import load, load_tokenizer
from edgelab.recipe import Recipe

try:
    TOOLS = android_jvm.tools()
    WHY = ""
except ExportError as e:
    TOOLS, WHY = None, str(e)
needs_jvm = pytest.mark.skipif(TOOLS is None, reason=WHY)
EDGE = "dev.edgelab.EdgeException"
BAD_ARGUMENT, RELEASED, WRONG_MODEL, NO_RUNTIME = -4, -5, -2, -1


@pytest.fixture(scope="module")
def embedded():
    return load_tokenizer(paths.data_dir() / "edge-moe")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, embedded):
    """(folder, result) of a small random mixture, written without a check."""
    out = tmp_path_factory.mktemp("android") / "app"
    return out, android.export(tiny_model(), out, tokenizer=embedded, check=False, threads=1, batch_size=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the module's library and classes, compiled once."""
    if TOOLS is None:
        pytest.skip(WHY)
    return android_jvm.build(android.ANDROID, tmp_path_factory.mktemp("built"), TOOLS)


@pytest.fixture(scope="module")
def jvm(built):
    made = android_jvm.Jvm(built, TOOLS)
    yield made
    made.close()
    assert made.warnings() == []  # of -Xcheck:jni, over all tests of this file


@pytest.fixture
def loaded(jvm, exported):
    jvm.must("load", path=str(exported[0] / android.ASSETS / "model.onnx"), threads=1, context=256)
    yield jvm
    jvm.must("release")


# ----------------------------------------------------------------------------------------------------- the folder


def test_the_folder_is_whole_and_says_what_is_in_it(exported):
    out, result = exported
    names = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    assert {f.relative_to(out).as_posix() for f in result.files} == names and result.files[0] == out / "README.md"
    assert result.target == "android" and not list(out.parent.glob("*.tmp"))
    stated = json.loads((out / "manifest.json").read_text())["files"]
    assert set(stated) == names - {"manifest.json"}
    assert stated == {name: entry for name, entry in android._digests(out).items() if name != "manifest.json"}
    for name in ("build.gradle.kts", "src/main/AndroidManifest.xml", "src/main/cpp/CMakeLists.txt", "consumer-rules.pro"):
        assert f"edgelab/{name}" in names
    assert {"ios/Package.swift", "ios/Sources/CEdgelab/edge_runtime.c", "ios/Sources/CEdgelab/include/edge_runtime.h"} <= names
    assert (out / "ios/Sources/CEdgelab/edge_runtime.c").read_bytes() == (out / "edgelab/src/main/cpp/edge_runtime.c").read_bytes()
    for path in out.rglob("*.swift"):
        assert "NOT EXECUTED" in path.read_text()
    about = json.loads((out / android.ASSETS / "edgelab.json").read_text())
    assert (about["threads"], about["batch_size"], about["model"]["stop"], about["model"]["context"]) == (1, 4, [0], 256)
    assert about["chat"]["after"] == "<|call|>"
    import onnxruntime

    gradle, readme = (out / "edgelab/build.gradle.kts").read_text(), (out / "README.md").read_text()
    assert f"onnxruntime-android:{onnxruntime.__version__}" in gradle and f"onnxruntime-android:{onnxruntime.__version__}" in readme
    for name in ("README.md", "edgelab/build.gradle.kts", "ios/Package.swift"):
        assert not re.search(r"__[A-Z_]+__", (out / name).read_text())
    # two layers that each cache a compressed vector of 32 and a rotary key of 8, in float32
    assert android.cache_bytes_per_token(out / android.ASSETS / "model.onnx") == 2 * (32 + 8) * 4
    assert "0.3 kB of cache for each token" in readme and "0.1 MB at 256 tokens" in readme and "8.2 kB for each token of a" in readme


def test_the_classes_that_the_c_code_names_are_kept_and_the_rows_of_the_table_ascend():
    rules = (android.ANDROID / "consumer-rules.pro").read_text()
    c = (android.ANDROID / "src/main/cpp/edge_jni.c").read_text()
    for name in re.findall(r'FindClass\(env, "([\w/]+)"\)', c):
        assert f"class {name.replace('/', '.')} {{ *; }}" in rules
    rows = [int(n) for n in re.findall(r"^    X\((\d+),", (android.ANDROID / "src/main/cpp/ort_slots.h").read_text(), re.M)]
    assert rows == sorted(set(rows)) and rows[-1] == 100  # 101, ReleaseCustomOpDomain, closes version 1 of the interface
    for path in (android.ANDROID / "src/main").rglob("*"):
        if path.suffix in (".java", ".c", ".h"):
            text = path.read_text()
            assert max(map(len, text.splitlines())) <= 140, path
            assert "java.nio.file" not in text, path  # Android has it from API 26 on; the module asks for 24
            assert ("import android" in text) == (path.name == "EdgeAssets.java")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, embedded):
    with pytest.raises(ExportError, match="tokenizer is not given, and a module brings none"):
        android.export(tiny_model(), tmp_path / "app")
    with pytest.raises(ExportError, match="ids up to 2047, the model a vocabulary of 96: they do not belong together"):
        android.export(tiny_model(96), tmp_path / "app", tokenizer=embedded)
    for wrong in (-1, 2.0, 257, True):
        with pytest.raises(ExportError, match=r"threads=.* is not a whole number between 0 and 256"):
            android.export(tiny_model(), tmp_path / "app", tokenizer=embedded, threads=wrong)
    with pytest.raises(ExportError, match="batch_size=0 is not a whole number between 1 and 256"):
        android.export(tiny_model(), tmp_path / "app", tokenizer=embedded, batch_size=0)
    with pytest.raises(ExportError, match="the tokenizer is Unigram; the Java class reads byte-level BPE only"):
        unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
        android.export(tiny_model(), tmp_path / "app", tokenizer=unigram)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is no Android export of edgelab"):
        android.export(tiny_model(), tmp_path / "other", tokenizer=embedded)
    assert [p.name for p in tmp_path.rglob("*")] == ["other", "thesis.txt"]


@needs_jvm  # for there to be something to take away
def test_without_compilers_the_check_says_what_to_install_and_the_export_does_without(tmp_path, embedded, monkeypatch, exported):
    real = shutil.which
    for lacking, words in ((("cc", "gcc", "clang"), "no C compiler"), (("javac",), "no javac"), (("java",), "no java")):
        monkeypatch.setattr(shutil, "which", lambda name, lacking=lacking: None if name in lacking else real(name))
        with pytest.raises(ExportError, match=rf"{words} .*apt install .* check=False"):
            android.export(tiny_model(), tmp_path / "app", tokenizer=embedded)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not list(tmp_path.iterdir())
    assert (exported[0] / "README.md").is_file()  # written with check=False: no compiler was asked for
    with pytest.raises(ExportError, match="no C compiler"):
        android.verify(exported[1], tiny_model())


# -------------------------------------------------------------------------------------------------- the computation


@needs_jvm
def test_the_jvm_computes_what_torch_computes(exported):
    _, result = exported
    found = android.verify(result, tiny_model())
    assert found.parity["cosine"] >= 0.9999 and found.parity["top1_agreement"] >= 0.99 and found.parity["max_abs_diff"] < 1e-4
    assert "through JNI on Java" in found.verified_by and "24 greedy tokens" in found.verified_by
    # found on the disk by another process: the same verdict, and counted in the file
    bare = android.verify(ExportResult("android", (result.files[3],), 0, 0, 0, 0, 0, 0), tiny_model())
    assert bare.parity == found.parity and (bare.weights_total, bare.bytes) == (result.weights_total, result.bytes)
    with pytest.raises(ExportError, match="lies in no Android export"):
        android.verify(ExportResult("android", (Path("/no/such/README.md"),), 0, 0, 0, 0, 0, 0), tiny_model())
    other = tiny_model()
    torch.manual_seed(1)
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    with pytest.raises(ExportError, match="logits on the JVM have cosine"):
        android.verify(result, other)


@needs_jvm
def test_a_changed_file_is_not_run(exported, tmp_path):
    out, result = exported
    for name, words in (
        ("edgelab/src/main/java/dev/edgelab/EdgeModel.java", "EdgeModel.java is not the file that manifest.json states"),
        ("edgelab/src/main/assets/edgelab/model.onnx", "model.onnx is not the file that manifest.json states"),
    ):
        copy = tmp_path / Path(name).stem
        shutil.copytree(out, copy)
        with (copy / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(ExportError, match=words):
            android.verify(replace(result, files=(copy / "README.md",)), tiny_model())
    # with a manifest that fits, sources are still not run: they are not ours
    shutil.copytree(out, tmp_path / "fits")
    (tmp_path / "fits" / "edgelab/src/main/cpp/more.c").write_text("int more;")
    (tmp_path / "fits" / "manifest.json").unlink()
    android._dump(tmp_path / "fits" / "manifest.json", {"files": android._digests(tmp_path / "fits")})
    with pytest.raises(ExportError, match=r"more.c is no source of edgelab, and is not run"):
        android.verify(replace(result, files=(tmp_path / "fits" / "README.md",)), tiny_model())


@needs_jvm
def test_predict_gives_the_last_position_and_begins_anew(loaded):
    ids = [7, 300, 12, 99]
    every = loaded.floats("logits", ids=ids, cuts=[]).reshape(4, -1)
    loaded.floats("logits", ids=[5, 5, 5], cuts=[1, 3])  # leaves three tokens in the cache, which predict forgets
    assert np.array_equal(loaded.floats("predict", ids=ids), every[-1])
    pieces = loaded.floats("logits", ids=ids, cuts=[3, 4]).reshape(4, -1)
    assert np.abs(pieces - every).max() < 1e-5


@needs_jvm
def test_mistakes_are_exceptions_and_the_model_goes_on(loaded, exported, tmp_path):
    def refused(error: str, words: str, do: str, code: int | None = None, **ask):
        answer = loaded.ask(do, **ask)
        assert answer.get("error") == error and re.search(words, answer["message"]), answer
        assert code is None or answer["code"] == code, answer

    where = {"to": str(tmp_path / "x"), "cuts": []}
    good = loaded.floats("predict", ids=[1, 2, 3])
    refused(EDGE, r"token id 2048 at 1 is not between 0 and 2047", "logits", BAD_ARGUMENT, ids=[0, 2048], **where)
    refused(EDGE, "the text has 257 tokens; this model reads 256 at most", "logits", BAD_ARGUMENT, ids=[1] * 257, **where)
    refused(EDGE, "callback of generate may not use the model", "nested", BAD_ARGUMENT, ids=[1])
    refused(EDGE, "maxNew=-1 is below 0", "generate", BAD_ARGUMENT, prompt=[1], max=-1)
    refused(EDGE, "no prompts", "batch", BAD_ARGUMENT, prompts=[], **where)
    refused(EDGE, "no token ids", "batch", BAD_ARGUMENT, prompts=[[1], []], **where)
    assert np.array_equal(loaded.floats("predict", ids=[1, 2, 3]), good)
    # after a mistake in the middle of a text the text is as it was
    assert loaded.must("generate", prompt=[1, 2], max=3)["ids"]
    # files: none, a folder, no model, a model of another kind, a name with signs that JNI's own strings would garble
    given = {"threads": 1, "context": 0}
    for path in ("/no/such.onnx", str(tmp_path), "", None):
        refused("java.io.FileNotFoundException", "no model file", "load", path=path, **given)
    (tmp_path / "text.onnx").write_text("not a model")
    refused(EDGE, "(?i)protobuf", "load", path=str(tmp_path / "text.onnx"), **given)
    model = exported[0] / android.ASSETS / "model.onnx"
    (tmp_path / "half.onnx").write_bytes(model.read_bytes()[:5000])
    refused(EDGE, ".", "load", path=str(tmp_path / "half.onnx"), **given)
    refused(EDGE, "threads=300", "load", BAD_ARGUMENT, path=str(model), threads=300, context=0)
    shutil.copyfile(model, tmp_path / "ü🙂.onnx")
    loaded.must("load", path=str(tmp_path / "ü🙂.onnx"), **given)
    assert np.array_equal(loaded.floats("predict", ids=[1, 2, 3]), good)
    loaded.must("release")
    loaded.must("release")
    refused(EDGE, "was released", "predict", RELEASED, ids=[1], **where)


@needs_jvm
def test_generate_can_be_stopped_and_sampled(loaded):
    free = loaded.must("generate", prompt=[5, 6], max=10)
    assert len(free["ids"]) == 10 and free["told"] == free["ids"]
    assert loaded.must("generate", prompt=[5, 6], max=10, until=3)["ids"] == free["ids"][:3]
    assert loaded.must("generate", prompt=[5, 6], max=0)["ids"] == []
    # the context is 256: the last token is written and not read
    assert len(loaded.must("generate", prompt=[5] * 250, max=100)["ids"]) == 7
    hot = [loaded.must("generate", prompt=[5, 6], max=10, temperature=5.0)["ids"] for _ in range(2)]
    assert hot[0] == hot[1] != free["ids"]
    assert loaded.must("generate", prompt=[5, 6], max=10, temperature=1e-6)["ids"] == free["ids"]
    refused = loaded.ask("generate", prompt=[5], max=1, temperature=0.0)
    assert refused["error"] == "java.lang.IllegalArgumentException"
    assert loaded.must("threads", ids=[1, 2, 3, 4], times=20)["wrong"] == 0


@needs_jvm
def test_another_thread_stops_a_text_and_a_callback_may_release(jvm, exported):
    path = str(exported[0] / android.ASSETS / "model.onnx")
    jvm.must("load", path=path, threads=1, context=0)
    stopped = jvm.must("stop", ids=[1, 2])
    assert stopped["ended"] and stopped["count"] >= 1
    assert len(jvm.must("generate", prompt=[1, 2], max=4)["ids"]) == 4  # an old stop does not end a new text
    assert len(jvm.must("released", ids=[1, 2])["ids"]) == 1
    assert jvm.ask("generate", prompt=[1], max=1)["code"] == RELEASED


@needs_jvm
def test_memory_does_not_grow(built, exported):
    """Rounds of load, predict, generate, a refused call and release; then the same without release, left to the garbage collector."""
    path = str(exported[0] / android.ASSETS / "model.onnx")
    for release in (True, False):
        jvm = android_jvm.Jvm(built, TOOLS, check_jni=False, env={"MALLOC_ARENA_MAX": "1"})
        kb = jvm.must("loop", path=path, ids=[1, 2, 3], rounds=10, each=4, release=release)["kb"]
        jvm.close()
        # a session left behind is about a megabyte of weights and graph, four a round
        assert kb[-1] - kb[4] < 4000, kb


DRIVER = r"""
#include <stdio.h>
#include "edge_runtime.h"
#define MUST(x) do { if (!(x)) { printf("line %d: %s\n", __LINE__, e.message); return 1; } } while (0)
int main(int argc, char **argv) {
    EdgeError e = {0};
    int64_t ids[6] = {1, 2, 3, 4, 5, 6}, wrong[2] = {1, -7}, mask[6] = {0, 1, 1, 1, 1, 1}, shape[8];
    size_t rank = 8;
    float x[3] = {0};
    MUST(argc == 3 && edge_start(argv[1], &e));
    for (int round = 0; round < 2; round++) {
        MUST(!edge_open("/no/such", 1, &e) && !edge_open(argv[0], 1, &e) && !edge_open(argv[2], -1, &e));
        EdgeSession *s = edge_open(argv[2], 1, &e);
        MUST(s && edge_is_language_model(s, &e));
        for (int i = 0; i < 3; i++) MUST(edge_feed(s, ids, NULL, 1, 6, &e));
        MUST(edge_past(s) == 18 && !edge_feed(s, wrong, NULL, 1, 2, &e) && !edge_feed(s, ids, NULL, 2, 3, &e) && edge_past(s) == 18);
        MUST(!edge_feed(s, ids, NULL, 1, 0, &e) && !edge_input_shape(s, shape, &rank, &e) && !edge_run(s, x, 3, shape, 1, &e));
        edge_forget(s);
        MUST(edge_feed(s, ids, mask, 2, 3, &e) && edge_output(s, shape, &rank) && rank == 3 && shape[0] == 2 && shape[1] == 3);
        edge_close(s);
    }
    edge_close(NULL);
    return 0;
}
"""


@needs_jvm
def test_the_c_code_is_clean_under_the_address_sanitizer(exported, tmp_path):
    """Without a JVM, whose own leaks would hide ours: what is allocated is freed, on the ways that fail too."""
    (tmp_path / "driver.c").write_text(DRIVER)
    c = android.ANDROID / "src/main/cpp"
    command = [TOOLS.cc, "-std=gnu11", "-g", "-O1", "-fsanitize=address,undefined", f"-I{c}", str(tmp_path / "driver.c")]
    done = subprocess.run([*command, str(c / "edge_runtime.c"), "-ldl", "-o", str(tmp_path / "driver")], capture_output=True, text=True)
    if done.returncode and "asan" in done.stderr:
        pytest.skip("this C compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    run = [str(tmp_path / "driver"), str(TOOLS.runtime), str(exported[0] / android.ASSETS / "model.onnx")]
    done = subprocess.run(run, capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=1"}, timeout=120)
    if "LeakSanitizer does not work under ptrace" in done.stderr:
        pytest.skip("traced processes cannot look for leaks")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@needs_jvm
@pytest.mark.parametrize(
    ("version", "words"),
    [("2.0.0", "ONNX Runtime 2.0.0 is not one that this program knows"), ("1.16.3", "it needs 1.17 or a later 1.x"), (None, "no-such")],
)
def test_a_runtime_that_is_not_known_is_refused(built, exported, tmp_path, version, words):
    fake = tmp_path / "no-such.so"
    if version:
        (tmp_path / "fake.c").write_text(
            f'static const void *api(unsigned v) {{ (void)v; return 0; }} static const char *version(void) {{ return "{version}"; }}\n'
            "static struct { const void *(*a)(unsigned); const char *(*v)(void); } base = {api, version};\n"
            "const void *OrtGetApiBase(void); const void *OrtGetApiBase(void) { return &base; }\n"
        )
        fake = tmp_path / "fake.so"
        subprocess.run([TOOLS.cc, "-shared", "-fPIC", "-o", str(fake), str(tmp_path / "fake.c")], check=True)
    jvm = android_jvm.Jvm(built, replace(TOOLS, runtime=fake))
    answer = jvm.ask("load", path=str(exported[0] / android.ASSETS / "model.onnx"), threads=1, context=0)
    jvm.close()
    assert answer["error"] == EDGE and answer["code"] == NO_RUNTIME and words in answer["message"]


# -------------------------------------------------------------------------------------------------------- a plain net


@needs_jvm
def test_a_net_of_floats_gives_what_onnx_runtime_gives_python(jvm, tmp_path, exported):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    w = draw.normal(size=(6, 3)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 6), ("y", 3)))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    graph = helper.make_graph(nodes, "net", [x], [y], [numpy_helper.from_array(w, "w")])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    given = draw.normal(size=(5, 6)).astype(np.float32)
    assert np.allclose(jvm.net(path, given).reshape(5, 3), np.maximum(given @ w, 0), atol=1e-6)
    raw = tmp_path / "in.bin"
    given.tofile(raw)
    ask = {"path": str(path), "from": str(raw), "to": str(tmp_path / "out.bin")}
    assert jvm.must("net", shape=[], **ask) == {"shape": [-1, 6], "output": 15}  # the open size follows from the length
    for shape, words in (
        ([5, 5], "size 1 of the shape is 5; the model takes 6"), ([4, 6], "30 numbers do not fill"),
        ([6], "has 1 sizes; this model's input has 2"), ([-5, 6], "size 0 of the shape is -5"), ([10**17, 6], "do not fill"),
    ):  # fmt: skip
        answer = jvm.ask("net", shape=shape, **ask)
        assert answer["error"] == EDGE and answer["code"] == BAD_ARGUMENT and words in answer["message"], answer
    answer = jvm.ask("net", shape=[], **ask | {"path": str(exported[0] / android.ASSETS / "model.onnx")})
    assert answer["code"] == WRONG_MODEL and "a net has one, of floats" in answer["message"]
    answer = jvm.ask("load", path=str(path), threads=1, context=0)
    assert answer["code"] == WRONG_MODEL and "no language model with a cache" in answer["message"]


@needs_jvm
def test_the_digits_are_read_on_the_jvm(jvm, tmp_path):
    """The small vision model as `vision_onnx` writes it, in floats and in int8 with static ranges: the numbers that Python's runtime gives
    with the same (default) options, and the float one's digits are right."""
    pytest.importorskip("sklearn", reason="the extra `vision` is not installed")
    from edgelab import vision
    from edgelab.export import vision_onnx
    from edgelab.fold import fold

    split = vision.digits()
    net = vision.network(width=4)
    vision.train(net, split.train, epochs=8)
    folded = fold(net).model
    pixels = split.test.pixels[:64].numpy()
    for name, model in (("float", folded), ("int8", vision.static(folded, split.calibration.pixels))):
        path = vision_onnx.export(model, tmp_path / f"{name}.onnx", check=False).files[0]
        theirs = vision_onnx.run(path, {}, threads=1)(pixels)
        ours = jvm.net(path, pixels).reshape(theirs.shape)
        assert np.abs(ours - theirs).max() < 1e-5 and ours.std() > 0.1
        assert (ours.argmax(-1) == split.test.labels[:64].numpy()).mean() > 0.85


# ----------------------------------------------------------------------------------------------------- the tokenizer


def known(jvm, some: list[str]) -> list[str]:
    """Those of `some` whose every character this JVM's version of Unicode has; a later one is no letter to it."""
    kept = [text for text in some if jvm.must("defined", text=text)["defined"]]
    assert len(kept) > 0.8 * len(some)
    return kept


@needs_jvm
@pytest.mark.parametrize("kind", ["embedded", *KINDS])
def test_java_gives_the_ids_and_the_text_of_python(kind, embedded, jvm, tmp_path):
    t = embedded if kind == "embedded" else KINDS[kind]()
    (tmp_path / "tokenizer.json").write_text(t.backend_tokenizer.to_str(), encoding="utf-8")
    jvm.must("tokenizer", path=str(tmp_path / "tokenizer.json"))
    some = known(jvm, texts(400))
    for text, (ids, special, streamed) in zip(some, jvm.must("encode", texts=some)["rows"], strict=True):
        expected = t(text)["input_ids"]
        assert ids == expected, text
        assert special == t.decode(expected), text
        assert streamed == t.decode(expected, skip_special_tokens=True), text


@needs_jvm
def test_java_decodes_ids_that_are_no_text_and_a_long_word(embedded, jvm, tmp_path):
    (tmp_path / "tokenizer.json").write_text(embedded.backend_tokenizer.to_str(), encoding="utf-8")
    jvm.must("tokenizer", path=str(tmp_path / "tokenizer.json"))
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, len(embedded), 30).tolist() for _ in range(100)]
    found = [jvm.must("decode", ids=ids)["text"] for ids in rows]
    assert found == [embedded.decode(ids, skip_special_tokens=True) for ids in rows] and any("\ufffd" in text for text in found)
    word = "".join(draw.choice(list("abcdefghij"), 50_000))  # one piece: merging takes n log n, not n squared
    assert jvm.must("encode", texts=[word], timeout_s=20)["rows"][0][0] == embedded(word)["input_ids"]


@needs_jvm
def test_java_applies_the_chat_template(jvm, exported, embedded):
    assert jvm.must("open", folder=str(exported[0] / android.ASSETS))["batch_size"] == 4
    for text in ("set a timer", " two  words \n", "ü 🙂", "<|call|>x", "{{ x }}"):
        expected = embedded.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        assert jvm.must("prompt", text=text)["ids"] == expected


@needs_jvm
def test_java_refuses_a_tokenizer_of_another_kind(jvm, tmp_path, embedded):
    spec = json.loads(embedded.backend_tokenizer.to_str())
    lower = trained([], normalizers.Lowercase())
    for content, words in (
        (lower.backend_tokenizer.to_str(), "normalizes by"),
        (json.dumps(spec | {"model": spec["model"] | {"type": "Unigram"}}), "is Unigram, no BPE"),
        (json.dumps(spec | {"pre_tokenizer": {"type": "Whitespace"}}), "cuts text by"),
        (json.dumps(spec | {"pre_tokenizer": split_by(spec, r"\w+")}), "may mean something else"),
        ("{", "JSON: no name"),
        ("[" * 100_000, "more than 64 levels"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        answer = jvm.ask("tokenizer", path=str(tmp_path / "tokenizer.json"))
        assert answer["error"] == EDGE and words in answer["message"], answer


def split_by(spec: dict, pattern: str) -> dict:
    pre = json.loads(json.dumps(spec["pre_tokenizer"]))
    pre["pretokenizers"][1]["pattern"]["Regex"] = pattern
    return pre


# ----------------------------------------------------------------------------------------------------------- Android

STUBS = {  # what EdgeAssets uses of Android, over two folders
    "android/content/Context.java": """package android.content;
public class Context {
  public static java.io.File root;
  public android.content.res.AssetManager getAssets() { return new android.content.res.AssetManager(); }
  public java.io.File getNoBackupFilesDir() { return new java.io.File(root, "files"); }
}
""",
    "android/content/res/AssetManager.java": """package android.content.res;
public class AssetManager {
  public java.io.InputStream open(String name) throws java.io.IOException {
    return new java.io.FileInputStream(new java.io.File(new java.io.File(android.content.Context.root, "assets"), name));
  }
}
""",
    "Main.java": """public class Main {
  public static void main(String[] args) throws Exception {
    android.content.Context.root = new java.io.File(args[0]);
    System.out.println(dev.edgelab.android.EdgeAssets.install(new android.content.Context()));
  }
}
""",
}


@needs_jvm
def test_the_android_class_compiles_against_stubs_for_java_8_and_installs_the_assets(exported, tmp_path):
    for name, text in STUBS.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    sources = [*(tmp_path / "src").rglob("*.java"), *(exported[0] / "edgelab/src/main/java").rglob("*.java")]
    command = [TOOLS.javac, "--release", "8", "-encoding", "UTF-8", f"{android_jvm.LINT},-options", "-Werror"]
    command += ["-d", str(tmp_path / "classes"), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "release version 8 not supported" in done.stderr:
        pytest.skip("this JDK no longer compiles for Java 8")
    assert done.returncode == 0, done.stderr
    shutil.copytree(exported[0] / android.ASSETS, tmp_path / "assets" / "edgelab")
    run = [TOOLS.java, "-cp", str(tmp_path / "classes"), "Main", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    place = Path(done.stdout.strip())
    assert done.returncode == 0 and place.parent == tmp_path / "files" / "edgelab", done.stderr
    assert {f.name for f in place.iterdir()} == {"model.onnx", "tokenizer.json", "edgelab.json"}
    assert (place / "model.onnx").read_bytes() == (exported[0] / android.ASSETS / "model.onnx").read_bytes()


@needs_jvm
def test_installing_is_whole_or_not_at_all(jvm, exported, tmp_path):
    source, target = tmp_path / "assets", tmp_path / "files"
    shutil.copytree(exported[0] / android.ASSETS, source)
    first = Path(jvm.must("install", to=str(target), **{"from": str(source)})["folder"])
    assert [p.name for p in target.iterdir()] == [first.name]
    (source / "model.onnx").unlink()  # not read again
    assert jvm.must("install", to=str(target), **{"from": str(source)})["folder"] == str(first)
    # another version whose file is not what it states: refused, the old one stays
    (source / "model.onnx").write_bytes(b"other")
    files = json.loads((source / "files.json").read_text())
    (source / "files.json").write_text(json.dumps(files))
    answer = jvm.ask("install", to=str(target), **{"from": str(source)})
    assert answer["error"] == "java.io.IOException" and "model.onnx has the sha256" in answer["message"]
    assert [p.name for p in target.iterdir()] == [first.name]
    evil = {"format": 1, "files": {"../evil": files["files"]["model.onnx"]} | files["files"]}
    (source / "files.json").write_text(json.dumps(evil))
    assert "names the file ../evil" in jvm.ask("install", to=str(target), **{"from": str(source)})["message"]
    # and one that fits replaces it
    (source / "files.json").unlink()
    android._dump(source / "files.json", {"format": 1, "files": android._digests(source)})
    second = Path(jvm.must("install", to=str(target), **{"from": str(source)})["folder"])
    assert [p.name for p in target.iterdir()] == [second.name] and (second / "model.onnx").read_bytes() == b"other"


# -------------------------------------------------------------------------------------------------- the embedded models


@needs_jvm
def test_the_model_for_phones_answers_a_command_on_the_jvm(jvm, tmp_path):
    result = android.export(paths.data_dir() / "edge-phone", tmp_path / "app")
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99 and result.expert_share == 1
    jvm.must("open", folder=str(tmp_path / "app" / android.ASSETS))
    said = jvm.must("answer", text="heat the kitchen to twenty one degrees", max=96)
    assert json.loads(said["text"]) == {"call": "heat", "room": "kitchen", "degrees": 21} and said["streamed"] == said["text"]
    assert jvm.must("answer", text="37+45=", max=8, chat=False)["text"].strip().startswith("28")  # 82, last digit first


@needs_jvm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["edge-moe", "edge-dense"])
def test_the_embedded_models_in_int4_agree_on_the_jvm(name, tmp_path):
    small = compress(load(paths.data_dir() / name), Recipe.uniform("int4-g32"), progress=False).model
    result = android.export(small, tmp_path / "app", tokenizer=load_tokenizer(paths.data_dir() / name))
    assert result.parity["cosine"] >= 0.9999 and result.parity["top1_agreement"] >= 0.99
    assert result.share > 0.99 and result.expert_share in (None, 1)
