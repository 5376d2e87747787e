"""The ONNX file holds the model's own codes, and ONNX Runtime computes with them what torch computes."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx
import onnxruntime
from small_models import deepseek, qwen3, qwen3_moe, tiny

from edgelab import paths
from edgelab.compress import compress
from edgelab.export import ExportError
from edgelab.export.onnx import _Blocks, export, verify
from edgelab.layers import Blank
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import load, swap, weights
from edgelab.recipe import Recipe
from edgelab.scheme import ActScheme, QuantScheme


@pytest.mark.parametrize("scheme", ["uint4-g32", "nf4-g32", "mxfp4-g32"])
def test_other_codebooks_are_refused_at_the_door(scheme, tmp_path):
    model, s = tiny(qwen3_moe(), None), QuantScheme.parse(scheme)
    name = "model.layers.0.mlp.experts"
    swap(model, {w.name: Blank(w.shape, s) for w in weights(model) if w.module_name == name})
    with pytest.raises(ExportError, match=rf"{name}.gate_up_proj is {scheme}; this target writes the symmetric codebook only.* int4-g32"):
        export(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["a8-token", "a8-static"])
def test_rounded_inputs_are_refused_at_the_door(text, tmp_path):
    model, act = tiny(qwen3(), "int8-row"), ActScheme.parse(text)
    layer = model.model.layers[0].mlp.down_proj
    layer.round_input_of("weight", act, 0.1 if act.static else None)
    with pytest.raises(ExportError, match=rf"model.layers.0.mlp.down_proj \(int8-row\) rounds its input to {text}, which this target"):
        export(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def initializers(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def change(source, target, name: str, edit):
    """A copy of the file in which `edit` has changed the initializer `name`."""
    model = onnx.load(str(source))
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(target))
    return target


@pytest.fixture(scope="module")
def moe():
    return tiny(deepseek(layers=2), "int4-g32")


@pytest.fixture(scope="module")
def exported(moe, tmp_path_factory):
    return export(moe, tmp_path_factory.mktemp("onnx") / "moe.onnx")


def test_codes_and_scales_are_in_the_file_bit_for_bit(moe, exported):
    held = initializers(exported.files[0])
    experts = moe.model.layers[1].mlp.experts.qtensors()
    for part, q in (("gate_up", experts["gate_up_proj"]), ("down", experts["down_proj"])):
        for e in range(8):
            name = f"model.layers.1.mlp.experts.{part}.{e}"
            assert held[f"{name}.codes"].tobytes() == q[e].packed.tobytes()
            assert held[f"{name}.scales"].tobytes() == q[e].scales.tobytes()
    q = moe.model.layers[0].self_attn.o_proj.qtensors()["weight"]
    assert held["model.layers.0.self_attn.o_proj.codes"].shape == (64, 1, 16)  # 32 inputs: one block
    assert held["model.layers.0.self_attn.o_proj.codes"].tobytes() == q.packed.tobytes()


def test_result_says_what_was_verified(exported):
    assert exported.parity["cosine"] >= 0.9999
    assert exported.parity["top1_agreement"] > 0.98 and abs(exported.parity["kld"]) < 1e-6
    assert exported.expert_share == 1.0 and exported.experts_total == 8 * (64 * 64 + 32 * 64)
    assert exported.weights_quantized > 0.98 * exported.weights_total
    assert exported.verified_by == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider, 24 + 96 tokens"
    assert exported.bytes == exported.files[0].stat().st_size
    assert [f.name for f in exported.files[0].parent.iterdir()] == ["moe.onnx"]  # no temporary left
    text = " ".join(line["value"] for line in exported.table())
    assert "100.0%" in text and "moe.onnx" in exported._repr_html_()


def test_any_length_and_batch(moe, exported):
    session = onnxruntime.InferenceSession(str(exported.files[0]), providers=["CPUExecutionProvider"])
    for shape in ((1, 1), (3, 5), (2, 150)):
        ids = torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(shape[1]))
        theirs = session.run(None, {"input_ids": ids.numpy()})[0]
        with torch.no_grad():
            ours = moe(input_ids=ids).logits.numpy()
        assert theirs.shape == (*shape, 96)
        np.testing.assert_allclose(theirs, ours, atol=2e-5)


@pytest.mark.parametrize(
    "config, scheme",
    [
        (deepseek, "int3-g32"),
        (deepseek, "int8-row"),
        (qwen3, "int4-g32"),
        (lambda: qwen3(hidden_size=40), "int8-row"),  # 40 inputs are no whole blocks
        (lambda: qwen3(hidden_size=40, tie_word_embeddings=False), "int3-row"),
        (qwen3, "int2-tensor"),
        (qwen3_moe, "int4-g16"),
    ],
    ids=[
        "deepseek-int3-g32",
        "deepseek-int8-row",
        "qwen3-int4-g32",
        "ragged-int8-row",
        "ragged-int3-row",
        "qwen3-int2-tensor",
        "qwen3_moe",
    ],
)
def test_schemes_and_families(config, scheme, tmp_path):
    result = export(tiny(config(), scheme), tmp_path)
    assert result.files == (tmp_path / "model.onnx",)
    assert result.parity["cosine"] >= 0.9999
    assert result.expert_share in (1.0, None)
    assert result.weights_quantized > 0.97 * result.weights_total
    assert any("4 bits" in note for note in result.notes) == scheme.startswith("int3")


def cached(session, ids, mask, pasts):
    """(logits, pasts) of one step."""
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | pasts)
    return logits, dict(zip(pasts, present, strict=True))


def no_past(session, batch):
    inputs = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs}


@pytest.mark.parametrize(
    "config", [deepseek, lambda: qwen3(sliding_window=6, use_sliding_window=True, max_window_layers=0)], ids=["mla", "sliding"]
)
def test_cache_and_padding_give_what_torch_gives(config, tmp_path):
    """Two rows of different length, padded on the left: the prompt, then token by token, far beyond the window."""
    model = tiny(config(), "int4-g32")
    result = export(model, tmp_path, cache=True)
    assert result.parity["cosine"] >= 0.9999
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert [o.name for o in session.get_outputs()] == ["logits", "present.0.key", "present.0.value"]
    rows = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = np.ones((2, 20), np.int64)
    mask[1, :4] = 0
    logits, pasts = cached(session, rows[:, :9].numpy(), mask[:, :9], no_past(session, 2))
    seen = [logits]
    for t in range(9, 20):
        logits, pasts = cached(session, rows[:, t : t + 1].numpy(), mask[:, : t + 1], pasts)
        seen.append(logits)
    theirs = np.concatenate(seen, 1)
    assert pasts["past_key_values.0.key"].shape[2] == 20
    with torch.no_grad():
        whole = model(input_ids=rows[:1]).logits.numpy()
        unpadded = model(input_ids=rows[1:, 4:]).logits.numpy()
    np.testing.assert_allclose(theirs[:1], whole, atol=3e-5)
    np.testing.assert_allclose(theirs[1:, 4:], unpadded, atol=3e-5)
    # control: without the past the last token is another one's
    alone, _ = cached(session, rows[:, -1:].numpy(), mask[:, -1:], no_past(session, 2))
    assert np.abs(alone[:, 0] - theirs[:, -1]).max() > 1e-3


def test_tied_head_shares_the_embedding_s_codes(tmp_path):
    model = tiny(qwen3(), "int4-g32")
    result = export(model, tmp_path)
    held = initializers(tmp_path / "model.onnx")
    assert "model.embed_tokens.codes" in held and "lm_head.codes" not in held
    assert operators(tmp_path / "model.onnx").count("GatherBlockQuantized") == 1
    assert result.weights_total == sum(p.numel() for p in tiny(qwen3(), None).parameters())


def test_float_model_goes_out_as_it_is(tmp_path):
    model = tiny(deepseek(), None)
    result = export(model, tmp_path)
    assert result.parity["cosine"] >= 0.9999 and result.expert_share == 0.0 and result.weights_quantized == 0
    assert not {"MatMulNBits", "GatherBlockQuantized"} & set(operators(tmp_path / "model.onnx"))
    assert result.predicted_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_rank_needs_no_sorting_and_gives_the_same(moe, exported, tmp_path):
    result = export(moe, tmp_path, experts="rank")
    used = set(operators(tmp_path / "model.onnx"))
    assert {"TopK", "NonZero", "GatherND", "GatherElements", "ScatterElements"} & used == set()
    assert {"TopK", "NonZero", "GatherND"} <= set(operators(exported.files[0]))
    assert result.parity["cosine"] >= 0.9999 and result.weights_quantized == exported.weights_quantized


@pytest.mark.parametrize("config, scheme", [(deepseek, "int4-g32"), (qwen3_moe, "int4-g16"), (deepseek, "int3-g32")])
def test_one_node_for_a_whole_stack(config, scheme, tmp_path):
    model = tiny(config(), scheme)
    result = export(model, tmp_path, experts="qmoe")
    assert result.parity["cosine"] >= 0.9999 and result.expert_share == 1.0
    assert operators(tmp_path / "model.onnx").count("QMoE") == 1 and "NonZero" not in operators(tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    codes = next(t for t in file.graph.initializer if t.name.endswith("gate_up.codes"))
    raw = bytearray(codes.raw_data)
    raw[5] ^= 1
    codes.raw_data = bytes(raw)
    onnx.save(file, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"gate_up\.0 .*the codes in the file are not the model's"):
        verify(result, model)


@pytest.mark.parametrize("scheme, nodes", [("int4-g32", 1), ("int4-row", 0)])
def test_auto_takes_one_node_where_it_can(scheme, nodes, tmp_path):
    export(tiny(qwen3_moe(), scheme), tmp_path, experts="auto", check=False)
    assert operators(tmp_path / "model.onnx").count("QMoE") == nodes


@pytest.mark.parametrize("scheme, says", [("int4-row", "wants groups"), ("int8-g32", "rounds the activations"), (None, "not quantized")])
def test_a_stack_that_one_node_can_t_take(scheme, says, tmp_path):
    with pytest.raises(ExportError, match=says):
        export(tiny(deepseek(), scheme), tmp_path, experts="qmoe")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down.5", "lm_head", "model.embed_tokens"])
def test_verify_detects_one_changed_code_or_scale(moe, exported, tmp_path, name):
    def flip(array):
        array.reshape(-1).view(np.uint8)[7] ^= 1
        return array

    for part in ("codes", "scales"):
        bad = change(exported.files[0], tmp_path / f"{part}.onnx", f"{name}.{part}", flip)
        with pytest.raises(ExportError, match=f"{name} .*the {part} in the file are not the model's"):
            verify(replace(exported, files=(bad,)), moe)


def test_verify_detects_a_weight_that_is_not_quantized(moe, exported, tmp_path):
    model = onnx.load(str(exported.files[0]))
    node = next(n for n in model.graph.node if n.input[1:2] == ["model.layers.1.mlp.experts.down.3.codes"])
    dense = torch.from_numpy(moe.model.layers[1].mlp.experts.qtensors()["down_proj"][3].dequantize()).T.contiguous().numpy()
    model.graph.initializer.append(onnx.numpy_helper.from_array(dense, "dense"))
    output = node.output[0]
    node.CopyFrom(onnx.helper.make_node("MatMul", [node.input[0], "dense"], [output]))
    onnx.save(model, str(tmp_path / "dense.onnx"))
    with pytest.raises(ExportError, match=r"experts\.down\.3 .*no MatMulNBits"):
        verify(replace(exported, files=(tmp_path / "dense.onnx",)), moe)


def test_verify_detects_a_float_that_is_not_the_models(moe, exported, tmp_path):
    def lowest_bit(w):
        w.view(np.uint32)[3] ^= 1
        return w

    for name in ("model.norm.weight", "model.layers.1.mlp.gate.weight"):
        bad = change(exported.files[0], tmp_path / "float.onnx", name, lowest_bit)
        with pytest.raises(ExportError, match=f"{name}: the floats in the file are not the model's"):
            verify(replace(exported, files=(bad,)), moe)


def test_verify_detects_other_logits_and_another_size(moe, exported, tmp_path):
    model = onnx.load(str(exported.files[0]))
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Tanh"
    onnx.save(model, str(tmp_path / "tanh.onnx"))
    with pytest.raises(ExportError, match="cosine"):
        verify(replace(exported, files=(tmp_path / "tanh.onnx",)), moe)
    model = onnx.load(str(exported.files[0]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(200_000, np.float32), "ballast"))
    onnx.save(model, str(tmp_path / "fat.onnx"))
    with pytest.raises(ExportError, match="bytes; the weights take"):
        verify(replace(exported, files=(tmp_path / "fat.onnx",)), moe)


def test_refused_export_leaves_nothing_behind(moe, tmp_path, monkeypatch):
    monkeypatch.setattr(_Blocks, "codes", lambda self: np.zeros((self.q.shape[0], self.count, self.block // 2), np.uint8))
    with pytest.raises(ExportError, match="codes in the file are not the model's"):
        export(moe, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_the_graph(moe, tmp_path):
    result = export(moe, tmp_path, single_file_bytes=1)
    assert sorted(f.name for f in result.files) == ["model.onnx", "model.onnx.data"]
    assert all(f.exists() for f in result.files) and result.bytes == sum(f.stat().st_size for f in result.files)
    moved = shutil.move(tmp_path, tmp_path.with_name("moved"))  # the graph finds its weights wherever both are
    session = onnxruntime.InferenceSession(f"{moved}/model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"input_ids": np.zeros((1, 3), np.int64)})[0].shape == (1, 3, 96)


@pytest.mark.parametrize("scheme", ["int2-g16", "int3-g32", "int4-g48", "int4-g512", "int8-row", "int3-row", "int4-tensor"])
@pytest.mark.parametrize("width", [768, 1536])
def test_blocks_give_the_codes_back(scheme, width):
    scheme = QuantScheme.parse(scheme)
    if width % 512 and str(scheme).endswith("g512"):
        width = 1024
    q = round_to_nearest(torch.randn(5, width, generator=torch.Generator().manual_seed(1)), scheme)
    w = _Blocks.of("w", q)
    codes = w.codes()
    assert codes.shape == (5, w.count, w.block * w.bits // 8) and codes.nbytes == w.code_bytes
    assert w.block in (16, 32, 64, 128, 256)
    assert np.array_equal(w.restored(codes), q.codes())


def test_errors_name_the_way_out(moe, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="experts='loop' is not one of sparse, rank"):
        export(moe, tmp_path, experts="loop")
    with pytest.raises(ExportError, match="accuracy_level=3 is not one of"):
        export(moe, tmp_path, accuracy_level=3)
    with pytest.raises(ExportError, match="Linear has no language-model head"):
        export(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ExportError, match=r"group_size=8 is no multiple of 16.* use 16, 32, 64 or 128"):
        export(tiny(qwen3(), "int4-g8"), tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed.*pip install "edgelab\[export\]"'):
        export(moe, tmp_path)


def test_embedded_model(tmp_path):
    result = export(
        compress(load(paths.data_dir() / "edge-moe"), Recipe.uniform("int4-g32"), progress=False).model, tmp_path / "edge-moe.onnx"
    )
    assert result.parity["cosine"] >= 0.9999 and result.expert_share == 1.0
    assert result.bytes <= 1.03 * result.predicted_bytes  # the graph of 96 expert products and what is around them
    assert result.bits_per_weight < 5
