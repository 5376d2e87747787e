"""The commands from a bundle to a device, as a stranger uses them."""

import shutil

import pytest

pytest.importorskip("onnxruntime")

from test_cli import bundle, edgelab, model  # noqa: F401 (fixtures)

from edgelab.export import ExportError, written_at


@pytest.fixture(scope="module")
def onnx_file(bundle, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("exported") / "m.onnx"
    edgelab("export", bundle, "--out", out, "--no-verify")
    return out


@pytest.mark.parametrize("command", ["verify", "deploy", "bytes", "startup", "stamp", "slot", "slot update", "slot rollback", "slot show"])
def test_help(command):
    assert "Usage" in edgelab(*command.split(), "--help").output


def test_a_file_is_verified_against_what_it_was_made_of(onnx_file, bundle, model, tmp_path):  # noqa: F811
    said = edgelab("verify", onnx_file, bundle).output
    assert "100.0%" in said and "onnxruntime" in said
    assert "which bundle or model it was made of" in edgelab("verify", onnx_file, code=2).output.replace("\n", " ")
    said = edgelab("verify", onnx_file, model, code=1).output.replace("\n", " ")
    assert "it was made of another one" in said
    other = tmp_path / "int3"
    edgelab("compress", model, "--scheme", "int3-g32", "--out", other)
    assert "Failed" in edgelab("verify", onnx_file, other, code=1).output


def test_what_is_no_file_of_ours_is_refused_in_a_sentence(bundle, tmp_path):  # noqa: F811
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 100)
    assert "is no ONNX file, or a damaged one" in edgelab("verify", tmp_path / "junk.onnx", bundle, code=1).output.replace("\n", " ")
    said = edgelab("export", bundle, "--target", "gguf", "--cache", "--out", tmp_path / "m.gguf", code=2).output
    assert "--cache is for --target onnx" in said


def test_what_lies_where(onnx_file, tmp_path):
    assert written_at(onnx_file).target == "onnx" and written_at(onnx_file).files == (onnx_file,)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ExportError, match=r"a.txt is nothing that `export` writes; it writes .onnx"):
        written_at(tmp_path / "a.txt")
    with pytest.raises(ExportError, match="does not exist"):
        written_at(tmp_path / "b.onnx")


def test_a_fallback_is_exported_and_its_cost_is_shown(bundle, tmp_path, monkeypatch):  # noqa: F811
    import onnx

    from edgelab import console

    documents = console.read_documents(None)
    monkeypatch.setattr(console, "read_documents", lambda source: documents.select(range(0, len(documents), len(documents) // 8)))
    said = edgelab("export", bundle, "--out", tmp_path / "m.onnx", "--fallback", "silu -> hardswish").output
    assert "What silu -> hardswish costs" in said and "KLD" in said and "100.0%" in said
    kinds = {n.op_type for n in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert "HardSwish" in kinds
    assert "%" in said and "0.0% (was 0.0%)" in said  # a random model answers nothing right
    said = edgelab("verify", tmp_path / "m.onnx", bundle, code=1).output.replace("\n", " ")
    assert "was made of a model with hardswish; this one has silu: apply the same fallback" in said
    assert "100.0%" in edgelab("verify", tmp_path / "m.onnx", bundle, "--fallback", "silu -> hardswish").output
    said = edgelab("export", bundle, "--out", tmp_path / "n.onnx", "--fallback", "relu -> gelu", code=2).output
    assert "holds no relu" in said and not (tmp_path / "n.onnx").exists()


def test_a_slot_is_updated_goes_back_and_refuses(bundle, tmp_path):  # noqa: F811
    first, second, slot = tmp_path / "first", tmp_path / "second", tmp_path / "slot"
    shutil.copytree(bundle, first)
    digest = edgelab("stamp", first, "--release", 1).stdout.strip()
    shutil.copytree(first, second)
    newer = edgelab("stamp", second, "--release", 2).stdout.strip()
    assert len(digest) == len(newer) == 64 and digest != newer
    assert "makes a slot" in edgelab("slot", "show", slot, code=2).output.replace("\n", " ")
    assert digest in edgelab("slot", "update", slot, first).output
    assert newer in edgelab("slot", "update", slot, second, "--expected", newer).output
    said = edgelab("slot", "show", slot).output
    assert newer in said and digest in said and "release" in said
    said = edgelab("slot", "update", slot, first, code=1).output
    assert "is refused" in said and "goes on" in said
    assert digest in edgelab("slot", "rollback", slot).output
    edgelab("stamp", second, "--release", 3)
    weights = next(second.glob("*.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert "is refused" in edgelab("slot", "update", slot, second, code=1).output
    assert digest in edgelab("slot", "show", slot).output


def test_startup(bundle):  # noqa: F811
    said = edgelab("startup", bundle, "--repeats", 1, "--chunk", 0.1).output
    assert "first weight" in said and "chunks of 0.1 MiB" in said


def test_bytes(onnx_file, bundle):  # noqa: F811
    for path in (onnx_file, bundle):
        said = edgelab("bytes", path).output
        assert (
            "codes" in said
            and "scales" in said
            and f"{sum(f.stat().st_size for f in path.rglob('*')) if path.is_dir() else path.stat().st_size:,} bytes" in said
        )
    assert "test_cli_export.py" in edgelab("bytes", __file__, code=2).output.replace("\n", "")
