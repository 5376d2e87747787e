"""What notebook 08 shows is measured: bytes side by side, one bit and who notices, the page in a frame, the control."""

import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch

pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

from test_export_onnx import qwen3, tiny

from edgelab import Recipe, save_bundle
from edgelab import export_lab as lab
from edgelab.byte_map import byte_map
from edgelab.byte_picture import COLOURS
from edgelab.compress import compress
from edgelab.export import ExportError, export
from edgelab.export.ladder import Ladder
from edgelab.paths import data_dir


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, bundle, exported ONNX file verified, maps) of a tiny dense model."""
    folder = tmp_path_factory.mktemp("lab")
    made = compress(tiny(qwen3(), None), Recipe.uniform("int4-g32"), progress=False)
    bundle = save_bundle(made.model, None, folder / "bundle", recipe=made.recipe, coverage=made.coverage)
    result = export(made.model, "onnx", folder / "m.onnx")
    files = lab.places(bundle, {"onnx": result})
    return made.model, bundle, result, {name: byte_map(path) for name, path in files.items()}


def test_bytes_side_by_side_and_the_same_codes(small):
    *_, maps = small
    lines = {line["kind"]: line for line in lab.kind_rows(maps)}
    assert lines["codes"]["bundle"] == lines["codes"]["onnx"] and lines["all bytes"]["onnx"] == f"{maps['onnx'].bytes:,}"
    kinds = maps["onnx"].by_kind()
    assert lab.overhead(maps["onnx"]) == pytest.approx(maps["onnx"].bytes / (kinds["codes"] + kinds["scales"]) - 1)
    but = lab.overhead(maps["onnx"], ("graph and metadata",))
    assert lab.overhead(maps["onnx"]) - but == pytest.approx(kinds["graph and metadata"] / (kinds["codes"] + kinds["scales"]))
    assert [line["all the same"] for line in lab.code_rows(maps)] == ["yes", "yes"]
    with pytest.raises(ValueError, match="edge-dense holds no codes"):
        lab.overhead(byte_map(data_dir() / "edge-dense"))


def test_a_changed_code_shows_in_the_table(small, tmp_path):
    *_, maps = small
    changed = lab.flipped(maps["onnx"].path, tmp_path / "m.onnx", lab.pick(maps["onnx"], "codes"), 3, 1)
    line = lab.code_rows({"bundle": maps["bundle"], "changed": byte_map(changed)})[1]
    assert line["all the same"] == "NO" and int(line["rows"]) - int(line["the same in bundle"]) == 1


def test_exactly_one_bit_turns(small, tmp_path):
    _, bundle, result, maps = small
    segment = lab.pick(maps["onnx"], "scales")
    before, after = (
        result.files[0].read_bytes(),
        lab.flipped(result.files[0], tmp_path / "new" / "m.onnx", segment, 1, 6).read_bytes(),
    )
    assert [(i, a ^ b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [(segment.offset + 1, 64)]
    segment = lab.pick(maps["bundle"], "codes")
    for _ in range(2):  # a second time over the first copy
        copy = lab.flipped(bundle, tmp_path / "bundle", segment)
    assert (copy / segment.file).read_bytes() != (bundle / segment.file).read_bytes()
    with pytest.raises(ValueError, match=r"bit=8: .* a byte bits 0 .. 7"):
        lab.flipped(bundle, tmp_path / "x", segment, 0, 8)
    with pytest.raises(LookupError, match="no segment of kind 'codes' with 'nothing' in its name"):
        lab.pick(maps["bundle"], "codes", "nothing")


def test_damage_is_measured_and_who_notices_is_said(small, tmp_path):
    _, bundle, _, maps = small
    m = maps["bundle"]
    flips = {"code": (lab.pick(m, "codes", "down"), 0, 0), "exponent": (lab.pick(m, "scales", "down"), 1, 6)}
    flips["header"] = (lab.pick(m, "graph and metadata", "names"), 8, 0)
    code, exponent, header = lab.damage_rows(bundle, tmp_path, flips, torch.arange(24).reshape(2, 12))
    assert 0 <= code["KLD"] < 1e-3 < exponent["KLD"] and code["load_bundle"] == exponent["load_bundle"] == "loads it"
    assert header["load_bundle"].startswith("refuses: ") and header["KLD"] != header["KLD"]
    assert all(line["verify_bundle"].endswith(".safetensors was changed") for line in (code, exponent, header))
    assert not list(tmp_path.iterdir())
    assert lab.shown_damage([header])[0]["KLD"] == "" and "%" in lab.shown_damage([code])[0]["same top token"]


def test_verify_refuses_a_changed_code_and_says_so(small, tmp_path):
    model, _, result, maps = small
    flips = {"code": (lab.pick(maps["onnx"], "codes"), 0, 0), "name": (lab.pick(maps["onnx"], "graph and metadata", "producer"), 3, 0)}
    none, code, name = lab.verdict_rows(result, model, tmp_path, flips)
    assert none["verify"].startswith("accepts it") and name["verify"].startswith("accepts it")
    assert code["verify"].startswith("refuses: ") and "the codes in the file are not the model's" in code["verify"]
    assert not list(tmp_path.iterdir())


def test_what_has_no_runtime_is_written_all_the_same(small, tmp_path, capsys):
    model, _, result, _ = small
    ladder = Ladder((), {"onnx": result}, {"gguf": "llama-cpp-python is not installed", "web": "no tokenizer"})
    found = lab.written(ladder, model, tmp_path, {"onnx": {}, "gguf": {}, "web": {}})
    assert set(found) == {"onnx", "gguf"} and not found["gguf"].verified_by and found["gguf"].files[0].is_file()
    assert "web: tokenizer is not given" in capsys.readouterr().out
    page = replace(result, target="web", files=(tmp_path / "web" / "index.html",))
    assert lab.places("b", {"web": page})["web"] == tmp_path / "web"


def test_the_page_is_served_to_this_machine_until_it_is_closed(tmp_path):
    (tmp_path / "web.json").write_text("{}")
    (tmp_path / "index.html").write_text("the page")
    shown = lab.page(tmp_path)
    try:
        assert lab.page(tmp_path) is shown and shown.address in shown._repr_mimebundle_()["text/html"]
        assert 'sandbox="allow-scripts allow-same-origin allow-forms"' in shown.html  # forms: the page's own, without them no question
        assert shown.address.startswith("http://127.0.0.1:") and shown._thread.daemon
        with urllib.request.urlopen(shown.address, timeout=5) as answer:
            assert answer.read() == b"the page" and "frame-ancestors 'self' http://localhost:*" in answer.headers["content-security-policy"]
    finally:
        shown.close()
    shown.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(shown.address, timeout=5)
    again = lab.page(tmp_path)
    assert again is not shown
    again.close()
    with pytest.raises(ExportError, match="holds no page of edgelab"):
        lab.page(tmp_path / "nothing")


def test_the_control_shows_what_is_chosen_at_once(small):
    maps = {**small[3], "phone": byte_map(data_dir() / "edge-phone"), "original": byte_map(data_dir() / "edge-moe")}
    control = lab.MapControl(maps)
    for file, m in maps.items():
        for kind in ("scales", "all kinds"):
            began = time.perf_counter()
            assert control.choose(file, kind) is m and control.error is None
            assert time.perf_counter() - began < 0.2, "an answer takes longer than a reader's eye"
            treemap, *strips = control.figure.data
            assert sum(sum(t.x) for t in strips) == m.bytes == max(treemap["values"])
            bold = control.table.value.count("font-weight:700")
            assert bold == (kind in m.by_kind()) and f"{m.bytes:,}" in control.sentence.value
            shown = {t.name: t.opacity for t in strips}
            assert (shown["graph and metadata"] < 1) == (kind == "scales") and shown["scales"] == 1
    assert len(control.figure.data) == 1 + len(COLOURS)
    control.file.value = "phone"
    assert "edge-phone" in control.told and "edge-phone" in repr(control)
    with pytest.raises(ValueError, match="file='none' is not offered; there are bundle, onnx"):
        control.choose("none")
    assert control.file.value == "phone"
    with pytest.raises(ValueError, match="maps is empty"):
        lab.MapControl({})


def test_an_error_is_shown_and_goes_away(small, monkeypatch):
    control = lab.MapControl(small[3])
    with monkeypatch.context() as broken:
        broken.setattr(lab.BytePicture, "treemap", lambda self: 1 / 0)
        control.kind.value = "codes"
        assert isinstance(control.error, ZeroDivisionError) and 'role="alert"' in control.sentence.value
    control.kind.value = "scales"
    assert control.error is None and "alert" not in control.sentence.value


def test_tables_of_fallbacks():
    row = {"rule": "a -> b", "exact": False, "gap": 0.193, "kld": 0.05, "kld_low": -1e-9, "kld_high": 0.06, "same_top": 0.9}
    rows = [row | {"on": "all"}, row | {"on": "answers", "exact_match": 0.5, "exact_match_original": 0.75}]
    (line,) = lab.fallback_rows(rows)
    assert line["as functions"] == "differs by up to 0.193" and line["KLD, nats per token"] == "5.0e-02 [0.0e+00, 6.0e-02]"
    assert line["right answers"] == "50.0% (before: 75.0%)"


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (lab.check_blocks, 73_728, {65_536: "has a scale", 81_920: "two bytes", 4_096: "number of blocks", "x": "one number"}),
        (
            lab.check_refusals, {"update", "verify_bundle"},
            {"update": "who compares", "verify_bundle": "section 6", "load_bundle": "names and sizes", "me": "is none", 3: "a set of"},
        ),
    ],
)  # fmt: skip
def test_exercises(check, right, wrong):
    assert "no answer so far" in check(None) and not check(None).passed
    assert check(right).passed
    for answer, hint in wrong.items():
        assert not check(answer).passed and hint in check(answer), answer


def test_a_varint_is_what_the_byte_map_reads_back():
    from edgelab.byte_formats import _varint

    for value in (0, 1, 127, 128, 300, 32_768, 2**40 + 1):
        assert _varint(bytes(lab.varint(value)), 0) == (value, len(lab.varint(value)))
    assert lab.check_varint(lab.varint).passed and lab.check_block(lab.q4_0_block).passed
    assert lab.q4_0_block(1.0, [j % 16 for j in range(32)]) == [0, 60, *(17 * j for j in range(16))]
