"""Bundles: what comes back is what went in, to the bit; what was changed on the way is found and named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import CONFIGS, IDS, SmallConvNet, tiny

import edgelab.hf
from edgelab import Quantize, QuantScheme, Recipe, Report, Row, layers
from edgelab import bundle as bundles
from edgelab.bundle import MANIFEST, coverage_of, load_bundle, read_manifest, save_bundle, verify_bundle
from edgelab.compress import audit, compress
from edgelab.model import dequantize, load, load_tokenizer, quantized, stored_tensors, swap, weights
from edgelab.qtensor import QTensor
from edgelab.scheme import ActScheme

EDGE_MOE = Path(__file__).parents[1] / "data" / "edge-moe"


def saved(model, out, recipe=None, tokenizer=None, **settings):
    recipe = recipe or Recipe.uniform("int4-g32")
    c = compress(model, recipe, progress=False)
    return c, save_bundle(c.model, tokenizer, out, recipe=recipe, coverage=c.coverage, **settings)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """The embedded MoE at int4-g32, saved in chunks of 1 MB: (Compressed, bundle, logits, ids)."""
    c, out = saved(load(EDGE_MOE), tmp_path_factory.mktemp("b") / "moe", tokenizer=load_tokenizer(EDGE_MOE), max_chunk_bytes=1_000_000)
    ids = torch.arange(48).reshape(2, 24) * 37 % 2048
    with torch.no_grad():
        return c, out, c.model(ids).logits, ids


@pytest.fixture
def copied(moe, tmp_path):
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(moe[1], tmp_path / "copy"))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_embedded_moe_round_trip(moe):
    _, out, want, ids = moe
    assert verify_bundle(out)["format"] == 1
    assert torch.equal(logits(load_bundle(out), ids), want)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out)  # what anybody does
    assert torch.equal(logits(plain, ids), want)
    assert isinstance(plain.model.layers[1].mlp.experts, layers.QExperts) and not plain.training
    assert torch.equal(logits(load(out), ids), want)
    names = [p.name for p in out.iterdir()]
    assert load_tokenizer(out)("hello")["input_ids"] == load_tokenizer(EDGE_MOE)("hello")["input_ids"]
    chunks = sorted(n for n in names if n.endswith(".safetensors"))
    assert chunks == [f"model-{i + 1:05}-of-{len(chunks):05}.safetensors" for i in range(len(chunks))] and len(chunks) > 3
    assert all((out / n).stat().st_size <= 1_000_000 for n in chunks)


def test_embedded_moe_bytes(moe):
    c, out, _, _ = moe
    on_disk = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    coverage = coverage_of(out)
    assert coverage.rows == c.coverage.rows and coverage.file_bytes == on_disk
    assert abs(on_disk / coverage.predicted_bytes - 1) < 0.01
    bf16 = 2 * coverage.parameters
    assert on_disk <= 0.32 * bf16
    assert coverage.expert_share == 1.0
    assert coverage.bits_per_weight == pytest.approx(8 * on_disk / coverage.parameters, rel=0.01)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_round_trips_to_the_bit(family, tmp_path):
    c, out = saved(tiny(family), tmp_path / "b", Recipe.uniform("int4-g32", embedding="int8-row"))
    verify_bundle(out)
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(back), logits(c.model))
    assert {n: str(q.scheme) for n, (_, q) in quantized(back).items()} == read_manifest(out)["schemes"]
    assert "meta" not in {t.device.type for t in back.state_dict().values()}


def test_tied_codes_are_stored_once_and_shared_again(tmp_path):
    c, out = saved(tiny("qwen3"), tmp_path / "b")
    with safe_open(next(out.glob("*.safetensors")), "pt") as f:
        assert [k for k in f.keys() if "lm_head" in k or "embed" in k] == ["model.embed_tokens.packed", "model.embed_tokens.scales"]  # noqa: SIM118
    back = load_bundle(out)
    assert back.lm_head.packed is back.model.embed_tokens.packed
    assert torch.equal(logits(back), logits(c.model))


def test_a_tied_embedding_that_is_kept(tmp_path):
    c, out = saved(tiny("qwen3"), tmp_path / "b", Recipe.uniform("int4-g32", embedding=None))
    back = load_bundle(out)
    assert back.lm_head.weight is back.model.embed_tokens.weight and torch.equal(logits(back), logits(c.model))


def test_mixed_schemes_and_kept_experts(tmp_path):
    model = tiny("mixtral")
    recipe = Recipe(
        (Quantize((("@attention", QuantScheme.parse("int3-row")), ("@head", QuantScheme.parse("int2-g32"))), min_expert_share=0.0),)
    )
    c, out = saved(model, tmp_path / "b", recipe)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), logits(c.model))


def test_an_uncompressed_model_is_a_bundle_too(tmp_path):
    model = tiny("llama")
    _, out = saved(model, tmp_path / "b", Recipe())
    verify_bundle(out)
    assert torch.equal(logits(load_bundle(out)), logits(model))


def test_a_bfloat16_model_comes_back_as_one(tmp_path):
    tiny("qwen3_moe").save_pretrained(tmp_path / "fp")
    c, out = saved(load(tmp_path / "fp", dtype=torch.bfloat16), tmp_path / "b")
    back = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert back.dtype == torch.bfloat16 and torch.equal(logits(back), logits(c.model))


def test_bert_round_trips(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    for cls in (transformers.BertForMaskedLM, transformers.BertForSequenceClassification):
        c, out = saved(cls(config).eval(), tmp_path / cls.__name__, Recipe.uniform("int8-row"))
        back = load_bundle(out)
        assert type(back) is cls and torch.equal(logits(back), logits(c.model))


def test_save_pretrained_writes_what_loads_again(tmp_path):
    for family in ("deepseek_v3", "qwen3"):
        c = compress(tiny(family), Recipe.uniform("int4-g32"), progress=False)
        c.model.save_pretrained(tmp_path / family)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert torch.equal(logits(back), logits(c.model))
        back.dequantize()
        torch.testing.assert_close(logits(back), logits(c.model), rtol=1e-4, atol=1e-4)
        back.save_pretrained(tmp_path / f"{family}-fp")
        plain = load(tmp_path / f"{family}-fp")
        assert not quantized(plain) and torch.equal(logits(plain), logits(back))


def test_reloaded_bundle_saves_again_with_the_same_bytes(moe, tmp_path):
    c, out, _, _ = moe
    again = save_bundle(load(out), load_tokenizer(out), tmp_path / "again", recipe=c.recipe, coverage=c.coverage, max_chunk_bytes=1_000_000)
    first, second = (
        {n: e["sha256"] for n, e in read_manifest(p)["files"].items() if n.endswith(("safetensors", "index.json"))} for p in (out, again)
    )
    assert first == second


def test_loading_makes_no_floating_point_weights(moe, monkeypatch):
    """Whatever float tensor is made while loading is smaller than the smallest weight that was quantized."""
    largest = 0
    originals = {}
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        originals[name] = getattr(torch, name)

        def watched(*args, _original=originals[name], **kwargs):
            nonlocal largest
            t = _original(*args, **kwargs)
            if t.is_floating_point() and not t.is_meta and t.dtype != torch.float16:
                largest = max(largest, t.numel())
            return t

        monkeypatch.setattr(torch, name, watched)
    model = transformers.AutoModelForCausalLM.from_pretrained(moe[1])
    smallest = min(q.packed.size for _, q in quantized(model).values())
    assert largest < smallest
    floats = {n: t.numel() for n, t in stored_tensors(model).items() if t.is_floating_point() and not n.endswith("scales")}
    assert max(floats.values()) < smallest  # norms and routers


def test_a_fresh_process_loads_it_offline(moe, tmp_path):
    torch.save({"ids": moe[3]}, tmp_path / "ids.pt")
    code = (
        "import torch, edgelab.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(moe[1])!r})\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r}, weights_only=True)['ids']\n"
        "with torch.no_grad(): print(repr(float(m(ids).logits.double().sum())))\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) == float(moe[2].double().sum())


def test_manifest_holds_what_was_done(moe, tmp_path):
    c, _, _, _ = moe
    report = Report((Row("int4", "kld", 0.05),))
    out = save_bundle(c.model, None, tmp_path / "b", recipe=c.recipe, coverage=c.coverage, report=report)
    manifest = read_manifest(out)
    assert Recipe.from_json(json.dumps(manifest["recipe"])) == c.recipe and manifest["recipe_digest"] == c.recipe.digest
    assert Report.from_json(json.dumps(manifest["report"])) == report
    assert manifest["schemes"]["model.layers.1.mlp.experts.down_proj"] == "int4-g32"
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {MANIFEST}


# ------------------------------------------------------------------------------------------------------- writing


@pytest.mark.filterwarnings("ignore:.*takes .* bytes, more than max_chunk_bytes")
def test_a_weight_above_the_limit_gets_its_own_chunk(tmp_path):
    with pytest.warns(UserWarning, match=r"model.embed_tokens.packed takes .* more than max_chunk_bytes=1,500: its chunk is larger"):
        c, out = saved(tiny("llama"), tmp_path / "b", max_chunk_bytes=1500)
    big = [f for f in out.glob("*.safetensors") if f.stat().st_size > 1500]
    for file in big:
        with safe_open(file, "pt") as f:
            assert len(list(f.keys())) == 1
    assert torch.equal(logits(load_bundle(out)), logits(c.model))


def test_what_is_no_bundle_is_not_replaced(tmp_path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="thesis exists and is no bundle: it is not replaced"):
        saved(tiny("llama"), mine)
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_a_bundle_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    _, out = saved(tiny("llama"), tmp_path / "b")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(bundles, "write_config", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        saved(tiny("qwen3"), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    monkeypatch.undo()
    saved(tiny("qwen3"), out)
    assert read_manifest(out)["model_type"] == "qwen3" and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_coverage_of_another_model_is_refused(tmp_path):
    a = compress(tiny("llama"), Recipe.uniform("int4-g32"), progress=False)
    b = compress(tiny("llama"), Recipe.uniform("int8-row"), progress=False)
    with pytest.raises(ValueError, match="the coverage is of another model"):
        save_bundle(a.model, None, tmp_path / "b", recipe=a.recipe, coverage=b.coverage)
    net = compress(SmallConvNet(), Recipe.uniform("int8-row"), progress=False)
    with pytest.raises(TypeError, match="SmallConvNet is a plain module"):
        save_bundle(net.model, None, tmp_path / "b", recipe=net.recipe, coverage=net.coverage)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- reading


def edit(bundle: Path, **changes) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(manifest | changes))


def test_a_flipped_byte_is_found_in_every_file(copied):
    for file in sorted(p for p in copied.iterdir() if p.name != MANIFEST):
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name} was changed: its sha256 is"):
            verify_bundle(copied)
        file.write_bytes(whole)
    verify_bundle(copied)


def test_missing_and_truncated_chunks_are_named(copied):
    chunk = sorted(copied.glob("*.safetensors"))[1]
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    for door in (verify_bundle, load_bundle):
        with pytest.raises(ValueError, match=rf"{chunk.name} has {len(whole) - 1:,} bytes, the manifest says {len(whole):,}"):
            door(copied)
    with pytest.raises(ValueError, match=rf"{chunk.name} is truncated"):
        load(copied)
    chunk.unlink()
    for door in (verify_bundle, load_bundle, load):
        with pytest.raises(FileNotFoundError, match=f"{chunk.name} is missing"):
            door(copied)


def test_strange_files_are_found(copied):
    (copied / "extra.py").write_text("print()")
    with pytest.raises(ValueError, match=r"extra.py is not in the manifest"):
        verify_bundle(copied)


@pytest.mark.parametrize("name", ["../secret", "..", "a/../../b", "/etc/passwd", "sub//file", "./file", "..\\secret", "C:\\x", ""])
def test_paths_that_leave_the_bundle_are_refused(copied, name):
    edit(copied, files={name: {"bytes": 1, "sha256": "0"}})
    for door in (read_manifest, verify_bundle, load_bundle):
        with pytest.raises(ValueError, match="which is outside the bundle"):
            door(copied)


def test_links_are_refused(copied, tmp_path):
    (copied / "config.json").rename(tmp_path / "elsewhere.json")
    (copied / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"config.json is a link"):
        verify_bundle(copied)


def test_unknown_formats_and_broken_manifests_are_named(copied):
    edit(copied, format=99)
    with pytest.raises(ValueError, match=r"edgelab.json has format 99, this edgelab reads 1: it was written by another version"):
        load_bundle(copied)
    edit(copied, format=1, files={})
    with pytest.raises(ValueError, match="lists no files"):
        read_manifest(copied)
    for text in ("{", "[]", ""):
        (copied / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=r"edgelab.json is no readable JSON object"):
            read_manifest(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no edgelab.json in .*: it is not a bundle"):
        load_bundle(copied)


def test_a_config_of_another_format_or_model_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    quantization = config["quantization_config"]
    config["quantization_config"] = quantization | {"format": 2}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config has format 2, this edgelab reads 1"):
        load(copied)
    config["quantization_config"] = quantization | {"schemes": quantization["schemes"] | {"model.layers.9.mlp.gate_proj": "int4-g32"}}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM has no weight model.layers.9.mlp.gate_proj"):
        load(copied)


# ----------------------------------------------------------------------------------------------------- codebooks

CODEBOOKS = ["int4-g32", "int3-row", "uint4-g32", "uint3-g8", "uint8-row", "uint2-tensor", "nf4-g32", "nf4-row", "fp4-g16", "mxfp4-g32"]


def drawn(shape, scheme: str) -> QTensor:
    """A weight of random codes and scales: what a bundle holds, whoever fitted it."""
    s = QuantScheme.parse(scheme)
    codes = torch.randint(0, s.levels, shape, dtype=torch.uint8).numpy()
    small = s.scales_shape(shape)
    scales = torch.randint(118, 124, small, dtype=torch.uint8) if s.codebook == "mxfp" else (torch.rand(small) + 0.5) / s.levels / 8
    offsets = -(torch.rand(small) * 0.2 + 0.9) * scales * s.levels / 2 if s.asymmetric else None
    return QTensor.from_codes(codes, scales.numpy(), s, None if offsets is None else offsets.numpy())


def with_codes(family: str, scheme: str):
    """(model, recipe) with such codes in the place of every weight but the routers."""
    model, recipe = tiny(family), Recipe.uniform(scheme)
    swap(model, {w.name: drawn(w.shape, scheme) for w in weights(model) if not w.tied_to and w.kind != "router"})
    edgelab.hf.adopt(model)
    return model, recipe


@pytest.mark.parametrize("scheme", CODEBOOKS)
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3", "gpt_oss"])  # tied, experts, transposed experts with biases
def test_every_codebook_round_trips_to_the_bit(family, scheme, tmp_path):
    model, recipe = with_codes(family, scheme)
    coverage = audit(model)
    out = save_bundle(model, None, tmp_path / "b", recipe=recipe, coverage=coverage)
    verify_bundle(out)
    back = load_bundle(out)
    want = logits(model)
    assert want.isfinite().all() and torch.equal(logits(back), want)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(out)), want)
    ours, theirs = quantized(model), quantized(back)
    assert ours.keys() == theirs.keys() and coverage.expert_share in (None, 1.0)
    for name, (_, q) in ours.items():
        other = theirs[name][1]
        assert str(other.scheme) == scheme and other.packed.tobytes() == q.packed.tobytes()
        assert other.scales.dtype == q.scales.dtype and other.scales.tobytes() == q.scales.tobytes()
        assert (other.offsets is None) == (q.offsets is None) == (not scheme.startswith("uint"))
        assert q.offsets is None or other.offsets.tobytes() == q.offsets.tobytes()
    assert coverage_of(out).predicted_bytes == coverage.predicted_bytes
    stored = {n for f in out.glob("*.safetensors") for n in safe_open(f, "pt").keys()}  # noqa: SIM118 (no dict)
    assert any(n.endswith("offsets") for n in stored) == scheme.startswith("uint")
    if family == "qwen3":
        assert back.lm_head.packed is back.model.embed_tokens.packed and "lm_head.packed" not in stored
        assert getattr(back.lm_head, "offsets", None) is getattr(back.model.embed_tokens, "offsets", None)


@pytest.mark.parametrize("scheme", ["uint4-g32", "mxfp4-g32"])
def test_a_bfloat16_model_of_another_codebook_comes_back(scheme, tmp_path):
    model, recipe = with_codes("qwen3_moe", scheme)
    out = save_bundle(model, None, tmp_path / "b", recipe=recipe, coverage=audit(model))
    back = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert back.model.embed_tokens.weight.dtype == torch.bfloat16 and back.lm_head.scales.dtype == model.lm_head.scales.dtype
    again = save_bundle(back, None, tmp_path / "again", recipe=recipe, coverage=audit(back))
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(again)), logits(back))


@pytest.mark.parametrize("text", ["a8-static", "a8-token", "a8-tensor", "a8-token-o6"])
def test_activations_are_part_of_a_bundle(text, tmp_path):
    act = ActScheme.parse(text)
    for family in ("qwen3", "deepseek_v3"):
        c = compress(tiny(family), Recipe.uniform("uint8-row" if family == "qwen3" else "int4-g32"), progress=False)
        for i, layer in enumerate(m for m in c.model.modules() if isinstance(m, layers.QLinear | layers.QExperts)):
            for parameter in layer._stored:
                layer.round_input_of(parameter, act, 0.01 + 0.003 * i if act.static else None)
        coverage = audit(c.model)
        out = save_bundle(c.model, None, tmp_path / family, recipe=c.recipe, coverage=coverage)
        back = load_bundle(out)
        assert torch.equal(logits(back), logits(c.model))
        assert edgelab.hf.activations_of(back) == edgelab.hf.activations_of(c.model) != {}
        # the stored ranges are bytes of the model like any other
        ranges = [r for r in coverage if r.name.endswith("act_scale")]
        assert len(ranges) == (len(edgelab.hf.activations_of(back)) if act.static else 0) and all(r.predicted_bytes <= 4 for r in ranges)
        verify_bundle(out)


def test_a_missing_offset_is_named(tmp_path):
    model, recipe = with_codes("deepseek_v3", "uint4-g32")
    out = save_bundle(model, None, tmp_path / "b", recipe=recipe, coverage=audit(model))
    chunk = next(out.glob("*.safetensors"))
    with safe_open(chunk, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    gone = next(k for k in tensors if k.endswith("gate_up_offsets"))
    save_file({k: v for k, v in tensors.items() if k != gone}, chunk, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"the checkpoint lacks 1 tensors of quantized weights \({gone}\)"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("schemes", "says"),
    [
        ({"lm_head": "int4"}, "schemes of the quantization_config, lm_head: 'int4' can't be read"),
        ({"lm_head": "nf3-g64"}, "lm_head: 'nf3-g64' can't be read .*has a table of 16 levels"),
        ({"lm_head": None}, "lm_head: None can't be read"),
        ([["lm_head", "int4-g32"]], "schemes of the quantization_config is .* it must be {weight name: text}"),
        ({"lm_head": "int4-g48"}, "group_size=48 does not divide"),
    ],
)
def test_corrupted_texts_of_the_config_are_named(copied, schemes, says):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["schemes"] = schemes
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load(copied)


@pytest.mark.parametrize("tied", [False, True])
def test_a_dequantized_model_is_saved_as_a_plain_one(tmp_path, tied):
    model = compress(tiny("qwen3" if tied else "llama"), Recipe.uniform("int4-g32"), progress=False).model
    dequantize(model)
    model.save_pretrained(tmp_path / "plain")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(back), logits(model)) and not quantized(back)


def test_missing_codes_are_named_by_plain_from_pretrained(copied):
    chunk = next(copied.glob("*.safetensors"))
    with safe_open(chunk, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    gone = next(k for k in tensors if k.endswith("scales"))
    del tensors[gone]
    save_file(tensors, chunk, {"format": "pt"})
    with pytest.raises(ValueError, match=gone):
        transformers.AutoModelForCausalLM.from_pretrained(copied)


def test_a_stray_weight_file_is_not_loaded(copied):
    shutil.copy(next(copied.glob("*.safetensors")), copied / "model.safetensors")
    for reader in (load_bundle, load):
        with pytest.raises(ValueError, match=r"model.safetensors is not in the manifest"):
            reader(copied)


@pytest.mark.parametrize("entry", [{}, 5, {"bytes": "1", "sha256": "0"}, {"bytes": 1, "sha256": None}, {"bytes": True, "sha256": "0"}])
def test_a_damaged_entry_is_named(copied, entry):
    edit(copied, files={"config.json": entry})
    with pytest.raises(ValueError, match=r"config\.json"):
        load_bundle(copied)


def test_several_chat_templates(tmp_path):
    tokenizer = load_tokenizer(EDGE_MOE)
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}
    _, out = saved(tiny("llama"), tmp_path / "b", tokenizer=tokenizer)
    assert verify_bundle(out) and load_tokenizer(out).chat_template == {"default": "x", "tool_use": "y"}
    inner = next(n for n in read_manifest(out)["files"] if "/" in n)
    (out / inner).write_text("z")
    with pytest.raises(ValueError, match="was changed"):
        verify_bundle(out)


def test_models_that_read_the_weights_of_their_layers(tmp_path):
    small = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    c, out = saved(gpt2, tmp_path / "gpt2")
    assert torch.equal(logits(load_bundle(out)), logits(c.model))
    old, new = gpt2.transformer.h[0].attn.c_attn.weight, c.model.transformer.h[0].attn.c_attn.weight
    assert new.shape == old.shape == (32, 96) and (new - old).norm() < 0.2 * old.norm()
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    c, out = saved(transformers.T5ForConditionalGeneration(config).eval(), tmp_path / "t5", Recipe.uniform("int8-row"))
    with torch.no_grad():
        a, b = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (c.model, load_bundle(out)))
    assert torch.equal(a, b) and a.isfinite().all()
