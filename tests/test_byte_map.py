"""Every byte of a file belongs to one segment, and what a map says of it is what other readers find there."""

import json
import struct
from math import prod
from xml.dom import minidom

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import gguf
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import save_file
from test_export_onnx import deepseek, qwen3, qwen3_moe, tiny

from edgelab import Recipe, save_bundle
from edgelab.bundle import coverage_of
from edgelab.byte_formats import _GGML
from edgelab.byte_map import BLOCKS, ByteMap, Segment, byte_map, integers, role_of, row_prints
from edgelab.byte_picture import COLOURS, BytePicture, FilesPicture, row_bytes, strip, tree
from edgelab.compress import compress
from edgelab.export import export
from edgelab.paths import data_dir

QUIET = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def exported(config, scheme, folder):
    """Maps of a tiny model's bundle and of its exports, which are written and not run."""
    made = compress(tiny(config, None), Recipe.uniform(scheme), progress=False)
    found = {"bundle": save_bundle(made.model, None, folder / "bundle", recipe=made.recipe, coverage=made.coverage)}
    for target, name, more in (("onnx", "m.onnx", {}), ("onnx", "fused.onnx", {"experts": "auto"}), ("gguf", "m.gguf", {})):
        found[name] = export(made.model, target, folder / name, check=False, **more).files[0]
    return made, {name: byte_map(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    config = qwen3_moe()
    config.norm_topk_prob = True  # llama.cpp knows no other
    return exported(config, "int4-g32", tmp_path_factory.mktemp("mixture"))


def accounted(m: ByteMap) -> None:
    """Every byte once, by counting: no help of the map's own check."""
    for file, size in m.files.items():
        seen = np.zeros(size, np.uint8)
        for s in m.segments:
            if s.file == file:
                seen[s.offset : s.end] += 1
        assert (seen == 1).all(), file
    assert sum(m.by_kind().values()) == sum(m.by_role().values()) == m.bytes == sum(m.files.values())


def at(m: ByteMap, s: Segment) -> bytes:
    place = m.path / s.file if m.path.is_dir() else m.path.with_name(s.file)
    return place.read_bytes()[s.offset : s.end]


# ------------------------------------------------------------------------------------------------ what edgelab writes


def test_all_bytes_of_all_formats_and_the_same_codes_in_each(mixture):
    made, maps = mixture
    codes = sum(q.packed.nbytes for _, q in edgelab_codes(made.model))
    scales = sum(q.scales.nbytes for _, q in edgelab_codes(made.model))
    parameters = made.coverage.parameters
    for name, m in maps.items():
        accounted(m)
        kinds = m.by_kind()
        assert (kinds["codes"], kinds["scales"], "unknown" in kinds) == (codes, scales, False), name
        assert m.weights == parameters, name
        assert m.path.is_dir() or m.bytes == m.path.stat().st_size
        total = m.table()[-1]
        assert total["bytes"] == f"{m.bytes:,}" and float(total["bits per weight"]) == pytest.approx(8 * m.bytes / parameters, abs=1e-3)
    prints = [row_prints(m) for m in maps.values()]
    assert prints[0] == prints[1] == prints[2] == prints[3]
    assert sum(prints[0].values()) == sum(prod(q.shape[:-1]) for _, q in edgelab_codes(made.model))
    assert {s.kind for s in maps["m.gguf"].segments if "exps" in s.name} == {BLOCKS}
    layers = {s.layer for s in maps["bundle"].segments if s.role == "experts"}
    assert layers == {0} and {"experts", "attention", "router", "norm", "embedding", "head"} <= set(maps["bundle"].by_role())


def edgelab_codes(model):
    from edgelab.model import quantized

    return list(quantized(model).values())


def test_one_changed_code_or_scale_changes_one_row(mixture, tmp_path):
    _, maps = mixture
    for name in ("m.onnx", "m.gguf"):
        m = maps[name]
        for s in [next(s for s in m.segments if s.kind in ("codes", BLOCKS)), *[s for s in m.segments if s.kind == "scales"][:1]]:
            data = bytearray(m.path.read_bytes())
            data[s.offset + 1] ^= 4
            changed = tmp_path / name
            changed.write_bytes(data)
            assert sum((row_prints(m) - row_prints(byte_map(changed))).values()) == 1, (name, s.name)


@pytest.mark.parametrize(("config", "scheme"), [(qwen3, "int3-row"), (qwen3, "int8-row"), (qwen3, "int4-tensor"), (deepseek, "int2-g16")])
def test_rows_that_are_widened_or_filled_up_are_the_same_rows(config, scheme, tmp_path):
    made = compress(tiny(config(), None), Recipe.uniform(scheme), progress=False)
    bundle = byte_map(save_bundle(made.model, None, tmp_path / "bundle", recipe=made.recipe, coverage=made.coverage))
    onnx_file = byte_map(export(made.model, "onnx", tmp_path / "m.onnx", check=False).files[0])
    accounted(onnx_file)
    assert onnx_file.weights == bundle.weights == made.coverage.parameters
    assert row_prints(onnx_file) == row_prints(bundle) and row_prints(bundle)


def test_integers_times_scales_are_the_weight(mixture):
    made, maps = mixture
    wanted = {name: q.dequantize().reshape(-1, q.shape[-1]) for name, (_, q) in _named(made.model)}
    for name, codes, scales in integers(maps["bundle"]):
        found = next(v for k, v in wanted.items() if k.removesuffix("_proj") == name.removesuffix("_proj"))
        np.testing.assert_array_equal(codes * scales, found)


def _named(model):
    from edgelab.model import quantized

    return quantized(model).items()


def test_codes_that_are_not_symmetric_are_not_guessed(tmp_path):
    made = compress(tiny(qwen3(), None), Recipe.uniform("uint4-g32"), progress=False)
    m = byte_map(export(made.model, "gguf", tmp_path / "m.gguf", check=False).files[0])
    accounted(m)
    with pytest.raises(ValueError, match="is Q4_1; symmetric codes of 4 and 8 bits are Q4_0 and Q8_0"):
        row_prints(m)


def test_weights_beside_the_graph_are_part_of_the_map(tmp_path):
    model = tiny(qwen3(), "int4-g32")
    whole = byte_map(export(model, "onnx", tmp_path / "whole.onnx", check=False).files[0])
    parts = export(model, "onnx", tmp_path / "m.onnx", check=False, single_file_bytes=1).files
    m = byte_map(parts[0])
    accounted(m)
    assert set(m.files) == {"m.onnx", "m.onnx.data"} and m.bytes == sum(f.stat().st_size for f in parts)
    assert row_prints(m) == row_prints(whole) and m.by_kind()["codes"] == whole.by_kind()["codes"]
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"should lie in 'm.onnx.data' beside it; there is no such file"):
        byte_map(parts[0])


@pytest.mark.parametrize("name", ["edge-moe", "edge-dense", "edge-phone"])
def test_embedded_models(name):
    m = byte_map(data_dir() / name)
    accounted(m)
    assert m.weights > 3e6 and "unknown" not in m.by_kind()
    assert (m.form, "codes" in m.by_kind()) == (("bundle", True) if name == "edge-phone" else ("model folder", False))
    if name == "edge-phone":
        audit = coverage_of(m.path)
        assert m.by_kind()["codes"] + m.by_kind()["scales"] == sum(r.predicted_bytes for r in audit if r.touched)
        assert m.weights == audit.parameters


# ------------------------------------------------------------------------------------------------- other readers agree


def test_onnx_finds_the_same_bytes(mixture):
    _, maps = mixture
    for m in (maps["m.onnx"], maps["fused.onnx"]):
        raw = {t.name: t.raw_data for t in onnx.load(str(m.path)).graph.initializer if t.raw_data}
        mine = {s.name: at(m, s) for s in m.segments if s.name in raw}
        assert mine == raw
        nodes = {s.name for s in m.segments if s.name.startswith("node ")}  # one that holds a constant is in two pieces
        assert len(nodes) == len(onnx.load(str(m.path)).graph.node)


def test_gguf_finds_the_same_places(mixture):
    _, maps = mixture
    m = maps["m.gguf"]
    theirs = {t.name: (int(t.data_offset), int(t.n_bytes), int(t.n_elements)) for t in gguf.GGUFReader(m.path).tensors}
    assert {s.name: (s.offset, s.bytes, s.weights) for s in m.segments if s.tensor} == theirs


def test_safetensors_finds_the_same_bytes(mixture):
    _, maps = mixture
    m = maps["bundle"]
    (chunk,) = m.path.glob("*.safetensors")
    with safe_open(chunk, "pt") as f:
        wanted = {name: f.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes() for name in f.keys()}  # noqa: SIM118
    assert {s.name: at(m, s) for s in m.segments if s.name in wanted} == wanted


def test_block_sizes_are_ggml_s():
    for number, (name, block, size, scales) in _GGML.items():
        kind = next((k for k in gguf.GGMLQuantizationType if int(k) == number), None)
        if kind is not None:  # the package may be older than the type
            assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, size))
        assert (scales == 0) == (block == 1) and scales < size


# ---------------------------------------------------------------------------------------------------- random layouts

names = st.lists(st.text("abcdef.normxyz_", min_size=1, max_size=12), min_size=1, max_size=6, unique=True)
holes = st.sampled_from([b"", b"\0" * 7, b"\0" * 40, b"junk", b"\0\0x"])


@given(names, st.lists(holes, min_size=7, max_size=7), st.randoms(use_true_random=False), st.integers(0, 9))
@QUIET
def test_any_safetensors_layout(tmp_path, listed, gaps, random, spaces):
    data, header = b"", {}
    for name, gap in zip(listed, gaps, strict=False):
        count = random.randrange(0, 30)
        header[name] = {"dtype": "F16", "shape": [count], "data_offsets": [len(data) + len(gap), len(data) + len(gap) + 2 * count]}
        data += gap + random.randbytes(2 * count)
    data += gaps[-1]
    keys = list(header)
    random.shuffle(keys)  # the header's order is not the file's
    text = json.dumps({k: header[k] for k in keys}).encode() + b" " * spaces
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    m = byte_map(path)
    accounted(m)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert [(s.offset, s.end) for s in m.segments if s.name == name] == [(8 + len(text) + begin, 8 + len(text) + end)] * (end > begin)
    # what lies between, found again by hand
    used = [gap for _, gap in zip(listed, gaps, strict=False)] + [gaps[-1]]
    assert m.by_kind().get("unknown", 0) <= sum(len(g) for g in used if any(g)) + sum(len(g) for g in used)
    assert m.by_kind().get("padding", 0) + m.by_kind().get("unknown", 0) == spaces + sum(map(len, used))
    assert ("unknown" in m.by_kind()) == any(any(g) for g in used)


@given(names, st.sampled_from([8, 32, 64]), st.randoms(use_true_random=False))
@QUIET
def test_any_gguf_layout(tmp_path, listed, alignment, random):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_token_list(["a", "bc", "d" * random.randrange(40)])
    writer.add_array("x.numbers", [random.random() for _ in range(1 + random.randrange(9))])
    writer.add_bool("x.flag", True)
    writer.add_float64("x.wide", 1.5)
    for name in listed:
        kind = random.choice(["F32", "F16", "Q8_0", "Q4_0", "Q6_K"])
        n = 256 * (1 + random.randrange(2)) if kind[0] == "Q" else 1 + random.randrange(40)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        raw = np.frombuffer(random.randbytes(3 * n // block * size), np.uint8).reshape(3, -1)
        if kind[0] == "F":
            writer.add_tensor(name, raw.view(np.float32 if kind == "F32" else np.float16))
        else:
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    m = byte_map(path)
    accounted(m)
    theirs = {t.name: (int(t.data_offset), int(t.n_bytes), int(t.n_elements)) for t in gguf.GGUFReader(path).tensors}
    assert {s.name: (s.offset, s.bytes, s.weights) for s in m.segments if s.tensor} == theirs
    assert "unknown" not in m.by_kind() and m.by_kind()["vocabulary"] > 5
    assert all(s.name == "padding" and s.bytes < alignment for s in m.segments if s.kind == "padding")


def graph_of(random, listed):
    """A model whose nodes and initializers are anything."""
    tensors, nodes = [], []
    for name in listed:
        shape = [random.randrange(1, 5) for _ in range(random.randrange(0, 3))]
        dtype = random.choice([np.float32, np.float16, np.int64, np.uint8])
        array = np.frombuffer(random.randbytes(8 * max(1, prod(shape))), dtype)[: prod(shape)].reshape(shape)
        if random.random() < 0.3 and dtype is np.float32:
            tensors.append(helper.make_tensor(name, TensorProto.FLOAT, shape, np.nan_to_num(array).reshape(-1).tolist()))
        else:
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        if random.random() < 0.5:
            value = numpy_helper.from_array(np.zeros(random.choice([1, 400]), np.float32), "c")
            nodes.append(helper.make_node("Constant", [], [f"{name}_c"], value=value))
        nodes.append(helper.make_node(random.choice(["Add", "MatMulNBits", "DequantizeLinear"]), [name, listed[0], "q"], [f"{name}_out"]))
    given = [helper.make_tensor_value_info("q", TensorProto.FLOAT, [1])]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info(f"{listed[0]}_out", TensorProto.FLOAT, None)], tensors)
    model = helper.make_model(graph, producer_name="someone", opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, {"k": "v" * random.randrange(9)})
    return model


@given(names, st.randoms(use_true_random=False))
@QUIET
def test_any_onnx_file(tmp_path, listed, random):
    model = graph_of(random, listed)
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    m = byte_map(path)
    accounted(m)
    raw = {t.name: t.raw_data for t in model.graph.initializer if t.raw_data}
    assert {s.name: at(m, s) for s in m.segments if s.name in raw} == raw
    constants = sum(len(a.t.raw_data) for n in model.graph.node for a in n.attribute if a.HasField("t"))
    assert sum(s.bytes for s in m.segments if s.name.startswith("constant ")) == constants


@given(st.data())
@QUIET
def test_a_damaged_file_is_a_value_error_or_a_whole_map(mixture, tmp_path, data):
    name = data.draw(st.sampled_from(["m.onnx", "m.gguf", "bundle"]))
    source = mixture[1][name].path
    source = next(source.glob("*.safetensors")) if source.is_dir() else source
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:  # headers are where damage is dangerous
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(len(content), 6000) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"x{source.suffix}"
    path.write_bytes(content)
    try:
        m = byte_map(path)
    except ValueError as error:
        assert "x." in str(error)  # the message names the file
        return
    accounted(m)


# ----------------------------------------------------------------------------------------------- what is what, and refusals


def test_nodes_say_what_an_initializer_is(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.integers(0, 255, (8, 4), np.uint8),
        "b": rng.random((8,)).astype(np.float32),
        "z": np.zeros(8, np.uint8),
        "plain.weight": rng.random((4, 4)).astype(np.float32),
        "model.norm.weight": np.ones(4, np.float32),
        "shape": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "b", "z"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "plain.weight"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["v"]),
        helper.make_node("Mul", ["v", "model.norm.weight"], ["out"]),
    ]
    initializers = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [], [], initializers)).SerializeToString())
    m = byte_map(path)
    kinds = {s.name: s.kind for s in m.segments if s.name in arrays}
    assert kinds == {
        "a": "codes", "b": "scales", "z": "scales", "plain.weight": "float weights", "model.norm.weight": "norms",
        "shape": "graph and metadata",
    }  # fmt: skip
    assert m.weights == 32 + 16 + 4
    assert m.bits_of()["a"] == 8 * (32 + 32 + 8) / 32
    with pytest.raises(ValueError, match="the codes of a can't be unpacked by what the file says of them"):
        row_prints(m)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.mlp.gate.weight", "router"), ("blk.3.ffn_gate.weight", "feed-forward"),
        ("model.layers.3.mlp.gate_proj", "feed-forward"),
        ("blk.3.ffn_gate_inp.weight", "router"), ("blk.3.ffn_norm.weight", "norm"), ("blk.3.attn_q_norm.weight", "norm"),
        ("blk.3.ffn_gate_shexp.weight", "shared expert"), ("output.weight", "head"), ("blk.3.attn_output.weight", "attention"),
        ("output_norm.weight", "norm"), ("model.layers.0.mlp.shared_experts.up_proj", "shared expert"), ("token_embd.weight", "embedding"),
    ],
)  # fmt: skip
def test_roles(name, role):
    assert role_of(name) == role


def test_what_is_not_understood_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        byte_map(tmp_path / "nothing.onnx")
    (tmp_path / "m.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"m.pt: its bytes can't be told apart; understood are .onnx, .gguf and .safetensors files"):
        byte_map(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="holds neither a page"):
        byte_map(tmp_path)
    for suffix in (".onnx", ".gguf", ".safetensors"):
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        with pytest.raises(ValueError, match=f"empty{suffix} is no"):
            byte_map(tmp_path / f"empty{suffix}")
    tensors = {"a": np.zeros(4, np.float32), "b": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "two.safetensors")
    text = (tmp_path / "two.safetensors").read_bytes().replace(b"[16,32]", b"[08,24]").replace(b"[08,24]", b"[8,24] ")
    (tmp_path / "two.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match="lies on top of another tensor"):
        byte_map(tmp_path / "two.safetensors")


def test_a_map_with_a_hole_cannot_be_made(tmp_path):
    parts = (Segment("f", 0, 4, "a", "codes"), Segment("f", 6, 2, "b", "codes"))
    with pytest.raises(ValueError, match="does not follow byte 4"):
        ByteMap(tmp_path, "x", {"f": 8}, parts)
    with pytest.raises(ValueError, match="f has 8 bytes, 4 are accounted for"):
        ByteMap(tmp_path, "x", {"f": 8}, parts[:1])
    whole = ByteMap(tmp_path, "x", {"f": 4}, parts[:1])
    assert whole.at("f", 3).name == "a"
    with pytest.raises(LookupError, match="has no byte 4 of 'f'"):
        whole.at("f", 4)


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", ["bundle", "m.onnx", "m.gguf"])
def test_pictures_show_every_byte_where_it_is(mixture, name):
    m = mixture[1][name]
    width = row_bytes(m.bytes)
    bars = list(strip(m, width))
    places = sorted((b.row * width + b.start, b.length) for b in bars)
    ends = [0, *np.cumsum([n for _, n in places]).tolist()]
    assert [p for p, _ in places] == ends[:-1] and ends[-1] == m.bytes
    assert all(b.start + b.length <= width for b in bars) and max(b.row for b in bars) < 24
    nodes = {n.id: n for n in tree(m)}
    for n in nodes.values():
        children = [c for c in nodes.values() if c.parent == n.id]
        assert not children or sum(c.bytes for c in children) == n.bytes
        assert bool(children) != bool(n.kind)
    (root,) = [n for n in nodes.values() if not n.parent]
    assert (root.bytes, root.weights) == (m.bytes, m.weights)
    picture = BytePicture(m)
    figure = picture.figure()
    assert len(figure.data) == 1 + len(COLOURS) and sum(map(sum, (t.x for t in figure.data[1:]))) == m.bytes
    minidom.parseString(picture._repr_mimebundle_()["image/svg+xml"])
    assert f"{m.bytes:,} bytes" in picture.sentence


def test_the_chosen_kind_stands_out(mixture):
    m = mixture[1]["m.gguf"]
    traces = {t.name: t for t in BytePicture(m, "scales").figure().data[1:]}
    assert traces["codes and scales in turn"].opacity == 1 and traces["norms"].opacity < 0.2
    with pytest.raises(ValueError, match="kind='code' is not one of codes, scales"):
        BytePicture(m, "code")


def test_several_files_share_one_scale(mixture):
    maps = mixture[1]
    picture = FilesPicture(maps)
    assert -(-max(m.bytes for m in maps.values()) // picture.width) <= 64
    minidom.parseString(picture.svg())
    assert all(f"{m.bytes:,} bytes" in picture.svg() for m in maps.values())
