"""Weights from mapped chunks: the numbers of eager loading to the last bit, few pages touched, damage named."""

import copy
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import IDS, tiny

from edgelab import Recipe, load_bundle, save_bundle
from edgelab.bundle import MANIFEST, verify_bundle
from edgelab.checkpoint import stored_in
from edgelab.compress import audit, compress
from edgelab.layers import QExperts, Quantized, set_kernel
from edgelab.lazy import LazyBundle, lazy_load, rechunk
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import FAMILIES, load
from edgelab.offload import mapped
from edgelab.recipe import EarlyExit, Quantize, QuantScheme, Route, SkipChannels, SparseAttention
from edgelab.startup import METRICS, Start, memory, random_bundle, startup_table

DATA = Path(__file__).parents[1] / "data"
SPARSE = [f for f in FAMILIES if FAMILIES[f].experts]


def saved(model, out: Path, recipe=None, calibration=None, **settings) -> Path:
    recipe = recipe or Recipe.uniform("int4-g16")
    c = compress(model, recipe, calibration=calibration, progress=False)
    return save_bundle(c.model, None, out, recipe=recipe, coverage=c.coverage, **settings)


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(ids).logits


@torch.no_grad()
def decode(model, ids=IDS[:1]) -> torch.Tensor:
    """Logits [length, vocabulary] of the first row of `ids`, token by token."""
    past, found = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits[0, 0])
    return torch.stack(found)


def same(lazy: LazyBundle, eager, ids=IDS) -> None:
    """Both give the same bits, on a text, token by token, and once more; and hold the same tensors."""
    assert torch.equal(logits(lazy.model, ids), logits(eager, ids))
    assert torch.equal(decode(lazy.model, ids[:1, :8]), decode(eager, ids[:1, :8]))
    assert torch.equal(logits(lazy.model, ids), logits(eager, ids))
    ours, theirs = lazy.model.state_dict(), eager.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


# ------------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_floats_of_every_family(family, dtype, tmp_path):
    """Stored in bfloat16: widened copies in float32, the file's own pages in bfloat16. A tied head is the embedding."""
    tiny(family).bfloat16().save_pretrained(tmp_path)
    lazy = LazyBundle(tmp_path, dtype=dtype)
    same(lazy, load(tmp_path, dtype=dtype))
    model = lazy.model
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    assert (not owned(weight)) == (dtype == torch.bfloat16)


def owned(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in memory of the process's own: in no map of a safetensors file."""
    with open("/proc/self/maps") as f:
        spans = [line.split()[0].split("-") for line in f if ".safetensors" in line]
    return not any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in spans)


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [(s, "numba") for s in ("int4-g16", "int3-g32", "uint4-g16", "int8-row", "nf4-g16", "mxfp4-g32", "int8-tensor")]
    + [("uint4-g16", "torch"), ("mxfp4-g32", "torch"), ("int4-g16", "numba-int8")],
)
def test_codes_of_a_mixture(scheme, kernel, tmp_path):
    """QLinear, QEmbedding and QExperts, in chunks of a few tensors each; the codes stay on the file's pages."""
    bundle = saved(tiny("deepseek_v3"), tmp_path / "b", Recipe.uniform(scheme), max_chunk_bytes=9_000)
    before = set_kernel(kernel)
    try:
        lazy = LazyBundle(bundle, verify="chunks")
        assert len(lazy.chunks) > 3
        same(lazy, load_bundle(bundle))
    finally:
        set_kernel(before)
    layers = [m for m in lazy.model.modules() if isinstance(m, Quantized)]
    assert {type(m).__name__ for m in layers} == {"QLinear", "QEmbedding", "QExperts"}
    assert not any(owned(m._buffers[s.packed]) for m in layers for s in m._stored.values())


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "mixtral"])
def test_codes_of_other_families(family, tmp_path):
    """A tied head, biases, experts that are stored transposed."""
    bundle = saved(tiny(family), tmp_path / "b", Recipe.uniform("int8-row"))
    lazy = LazyBundle(bundle)
    same(lazy, load_bundle(bundle))
    if family == "qwen2":
        first, last = lazy.model.get_input_embeddings(), lazy.model.get_output_embeddings()
        assert first.packed is last.packed
        lazy.release("lm_head")
        assert not first.packed.is_meta  # shared with a unit that is filled
        lazy.release("model.embed_tokens")
        assert first.packed.is_meta and last.packed is first.packed
        same(lazy, load_bundle(bundle))
        assert first.packed is last.packed and not first.packed.is_meta


def test_activations_adapters_of_schemes_and_mixed_experts(tmp_path):
    """Stored ranges of inputs; experts in several schemes."""
    bundle = saved(tiny("deepseek_v3"), tmp_path / "act", Recipe.uniform("int8-row", activations="a8-static"), [IDS])
    same(LazyBundle(bundle), load_bundle(bundle))
    name = "model.layers.0.mlp.experts.down_proj"
    rules = ((f"{name}#0", QuantScheme.parse("int8-row")), ("@router", None), ("*", QuantScheme.parse("int4-g16")))
    bundle = saved(tiny("mixtral"), tmp_path / "mixed", Recipe((Quantize(rules),)))
    lazy = LazyBundle(bundle)
    same(lazy, load_bundle(bundle))
    assert any(isinstance(m, QExpertsMixed) for m in lazy.model.modules())
    with pytest.raises(ValueError, match=r"capacity=2: .* has experts in several schemes"):
        LazyBundle(bundle, capacity=2).model  # noqa: B018


@pytest.mark.parametrize(
    "step", [Route(top_k=1), SkipChannels(0.5), SparseAttention(4), EarlyExit(after=1)], ids=lambda s: type(s).__name__
)
def test_steps_of_run_time(step, tmp_path):
    recipe = Recipe((*Recipe.uniform("int8-row").steps, step))
    c = compress(tiny("qwen3_moe"), recipe, calibration=[IDS], training=[IDS], progress=False)
    bundle = save_bundle(c.model, None, tmp_path / "b", recipe=recipe, coverage=c.coverage)
    same(LazyBundle(bundle), load_bundle(bundle))


@pytest.mark.parametrize("name", ["edge-moe", "edge-dense", "edge-phone"])
def test_embedded_models(name):
    ids = torch.arange(48).reshape(2, 24) * 37 % 2048
    lazy = LazyBundle(DATA / name)
    assert lazy.first_weight_s is None and lazy.opened_s > 0
    same(lazy, load(DATA / name), ids)
    assert lazy.first_weight_s > lazy.opened_s


# -------------------------------------------------------------------------------------------------------------- tensors


def test_tensors_lie_on_the_files_pages(tmp_path):
    bundle = saved(tiny("olmoe"), tmp_path / "b", max_chunk_bytes=9_000)
    lazy, want = LazyBundle(bundle), {n: t for f in bundle.glob("*.safetensors") for n, t in load_file(f).items()}
    table = {row["tensor"]: row for row in lazy.table()}
    assert set(table) == set(want) == set(lazy.tensors)
    index = json.loads((bundle / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in want.items():
        got = lazy.tensor(name)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor) and not owned(got)
        row = table[name]
        assert (row["chunk"], row["shape"], row["bytes"]) == (index[name], tuple(tensor.shape), tensor.nbytes)
    assert sum(lazy.chunks.values()) == sum(f.stat().st_size for f in bundle.glob("*.safetensors"))
    assert "olmoe" not in repr(lazy) and f"in {len(lazy.chunks)} chunks" in repr(lazy)
    before = {f.name: f.read_bytes() for f in bundle.iterdir()}
    lazy.tensor(next(iter(want))).zero_()  # what is written stays in this process
    assert {f.name: f.read_bytes() for f in bundle.iterdir()} == before
    with pytest.raises(ValueError, match=r"'lm_head.codes' is no tensor of"):
        lazy.tensor("lm_head.codes")


def test_a_tensor_at_an_odd_address_is_copied(tmp_path):
    """The format does not promise alignment; NumPy and numba want it."""
    model = tiny("llama")
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((1 - len(text)) % 4)  # data begin at 1 modulo 4
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + b"".join(t.numpy().tobytes() for t in tensors.values()))
    lazy = LazyBundle(tmp_path)
    assert all(s.begin % 4 == 1 for s in lazy.tensors.values())
    assert torch.equal(logits(lazy.model), logits(model))
    assert owned(lazy.model.lm_head.weight)


# ------------------------------------------------------------------------------------------------------ filled when called


def test_layers_are_filled_when_they_are_called(tmp_path):
    bundle = saved(tiny("qwen3"), tmp_path / "b")
    lazy = LazyBundle(bundle)
    model = lazy.model
    assert [*lazy.units] == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    assert lazy.filled == () and model.device.type == "cpu"
    assert [n for n, t in model.state_dict().items() if not t.is_meta] == ["model.layers.0.self_attn.q_norm.weight"]
    assert model.model.layers[1].mlp.up_proj.packed.is_meta
    with torch.no_grad():
        hidden = model.model.embed_tokens(IDS)
        position = torch.arange(20)[None]
        model.model.layers[0](hidden, position_embeddings=model.model.rotary_emb(hidden, position))
    assert lazy.filled == ("model.embed_tokens", "model.layers.0")
    lazy.fill("model.norm")
    assert lazy.filled[-1] == "model.norm"
    total = sum({id(s): s.nbytes for s in stored_in(bundle).values()}.values())
    assert sum(lazy.units.values()) == total + lazy.units["lm_head"]  # tied: counted in both
    seen = []
    lazy.load(lambda done, every, name: seen.append((done, every, name)))
    assert [name for *_, name in seen] == [*lazy.units] and seen[-1][0] == seen[-1][1] == sum(lazy.units.values())
    assert seen == sorted(seen)


def test_release_empties_a_layer_and_its_tiles(tmp_path):
    bundle = saved(tiny("mixtral"), tmp_path / "b")
    lazy, eager = LazyBundle(bundle), load_bundle(bundle)
    want = logits(eager)
    assert torch.equal(logits(lazy.model), want)
    block = lazy.model.model.layers[1]
    experts = next(m for m in block.modules() if isinstance(m, QExperts))
    assert experts._views and not experts.gate_up_packed.is_meta
    lazy.release("model.layers.1")
    assert not experts._views and all(t.is_meta for t in block.state_dict().values())
    assert "model.layers.1" not in lazy.filled
    assert torch.equal(logits(lazy.model), want)
    for name in lazy.filled:
        lazy.release(name)
    first_one = next(iter(lazy.model.named_parameters()))[0]  # by which a model says where it is
    assert [n for n, t in lazy.model.state_dict().items() if not t.is_meta] == [first_one] and lazy.model.device.type == "cpu"
    assert torch.equal(logits(lazy.model), want)
    with pytest.raises(ValueError, match=r"'layers.9' is no unit .* model.embed_tokens, model.layers.0"):
        lazy.release("layers.9")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_at_most_keep_blocks_are_filled(keep, tmp_path):
    model = tiny("llama")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 4
    bundle = saved(type(model)(config).eval(), tmp_path / "b")
    lazy, most = LazyBundle(bundle, keep=keep, prefetch=True), 0
    for block in lazy.model.model.layers:
        block.register_forward_hook(lambda *_: seen.append(sum(n.startswith("model.layers") for n in lazy.filled)))
    seen: list[int] = []
    same_bits = torch.equal(decode(lazy.model), decode(load_bundle(bundle)))
    most = max(seen)
    assert same_bits and most == keep
    assert [n for n in lazy.filled if n.startswith("model.layers")] == [f"model.layers.{i}" for i in range(4 - keep, 4)]
    with pytest.raises(ValueError, match=f"keep={keep} blocks are filled at a time"):
        lazy.load()


@pytest.mark.parametrize("family", SPARSE)
def test_few_experts_in_ram(family, tmp_path):
    """With two of four experts in slots, and blocks one at a time besides."""
    tiny(family).bfloat16().save_pretrained(tmp_path / "f")
    want = decode(load(tmp_path / "f"))
    for keep in (None, 1):
        lazy = LazyBundle(tmp_path / "f", capacity=2, keep=keep)
        assert torch.equal(decode(lazy.model), want)
    assert all(m.cache.capacity == 2 and m.misses > 0 for m in mapped(lazy.model).values()) and mapped(lazy.model)
    bundle = saved(tiny(family), tmp_path / "b", Recipe.uniform("int8-row"))
    torch.testing.assert_close(decode(lazy_load(bundle, capacity=2, keep=1)), decode(load_bundle(bundle)), rtol=1e-6, atol=1e-6)


def test_threads_fill_a_model_together(tmp_path):
    bundle = saved(tiny("qwen3_moe"), tmp_path / "b")
    want, wrong = logits(load_bundle(bundle)), []
    for _ in range(5):
        model = lazy_load(bundle)
        threads = [threading.Thread(target=lambda m=model: torch.equal(logits(m), want) or wrong.append(1)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong


def test_after_load_it_is_a_model_like_any_other(tmp_path):
    bundle = saved(tiny("olmoe"), tmp_path / "b")
    lazy = LazyBundle(bundle)
    with pytest.raises(TypeError, match=r"can't be copied.*call load\(\) first"):
        copy.deepcopy(lazy.model)
    model = lazy.load()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    again = save_bundle(copy.deepcopy(model), None, tmp_path / "c", recipe=Recipe.uniform("int4-g16"), coverage=audit(model))
    for f in bundle.glob("*.safetensors"):
        assert f.read_bytes() == (again / f.name).read_bytes()


def test_generate_begins_with_an_empty_model(tmp_path):
    bundle = saved(tiny("qwen2"), tmp_path / "b")
    lazy = LazyBundle(bundle)
    got = lazy.model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(got, load_bundle(bundle).generate(IDS[:1], max_new_tokens=5, do_sample=False))


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return saved(tiny("llama"), tmp_path_factory.mktemp("sound") / "b", max_chunk_bytes=6_000)


@pytest.fixture
def copied(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def with_header(file: Path, change) -> None:
    """Rewrite the header of `file`; the bytes behind it stay."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first(header: dict) -> dict:
    return next(v for k, v in header.items() if k != "__metadata__")


def swapped(header: dict) -> None:
    """Two tensors of which each claims the bytes of the first."""
    a, b = [v for k, v in header.items() if k != "__metadata__"][:2]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0]]


HEADERS = {
    "no JSON": (lambda f: f.write_bytes(f.read_bytes()[:9] + b"#" + f.read_bytes()[10:]), "no readable safetensors header"),
    "a length beyond the file": (lambda f: f.write_bytes((1 << 40).to_bytes(8, "little") + f.read_bytes()[8:]), "truncated or no"),
    "empty": (lambda f: f.write_bytes(b""), "truncated or no safetensors file: at least 8 bytes expected, 0 found"),
    "in the header": (lambda f: os.truncate(f, 50), "truncated or no safetensors file: at least"),
    "in a weight": (lambda f: os.truncate(f, f.stat().st_size - 7), "is truncated: .* bytes expected"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "is longer than its header says"),
    "a list": (lambda f: with_header(f, lambda h: [h]), "no readable safetensors header"),
    "no offsets": (lambda f: with_header(f, lambda h: first(h).pop("data_offsets") and None), "no readable safetensors header"),
    "no shape": (lambda f: with_header(f, lambda h: first(h).pop("shape") and None), "lacks dtype, shape or data_offsets"),
    "another shape": (lambda f: with_header(f, lambda h: first(h)["shape"].append(3)), "bytes by its header"),
    "a negative shape": (lambda f: with_header(f, lambda h: first(h).update(shape=[-1, -2])), "has the shape"),
    "another dtype": (lambda f: with_header(f, lambda h: first(h).update(dtype="I64")), "bytes by its header"),
    "overlapping": (lambda f: with_header(f, swapped), "those before end at|bytes by its header"),
    "another name": (lambda f: with_header(f, lambda h: {k.replace("packed", "codes"): v for k, v in h.items()}), "in none of the chunks"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_headers(damage, copied):
    """Without a manifest, so that the headers speak for themselves."""
    (copied / MANIFEST).unlink()
    change, says = HEADERS[damage]
    change(sorted(copied.glob("*.safetensors"))[0])
    with pytest.raises(ValueError, match=says):
        LazyBundle(copied)


def test_damaged_bundles(copied):
    chunk = sorted(copied.glob("*.safetensors"))[-1]
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    LazyBundle(copied).load()  # sizes are right, and hashes were not asked for
    lazy = LazyBundle(copied, verify="chunks")
    with pytest.raises(ValueError, match=f"{chunk.name} was changed: its sha256 is"):
        lazy.load()
    assert 0 < len(lazy.filled) < len(lazy.units)  # what lies in sound chunks was filled before
    os.truncate(chunk, 100)
    with pytest.raises(ValueError, match="has 100 bytes, the manifest says"):
        LazyBundle(copied)
    chunk.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        LazyBundle(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="weight files are not there"):
        LazyBundle(copied)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        LazyBundle(copied / "nothing")


def test_indices_and_strange_weights(copied):
    (copied / MANIFEST).unlink()
    index = copied / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    (first, file), *_ = listed["weight_map"].items()
    index.write_text(json.dumps({"weight_map": {k: v for k, v in listed["weight_map"].items() if k != first}}))
    with pytest.raises(ValueError, match=f"holds {first}, which model.safetensors.index.json does not list"):
        LazyBundle(copied)
    index.write_text(json.dumps(listed))
    save_file({**load_file(copied / file), "stranger.weight": torch.zeros(3)}, copied / file)
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "stranger.weight": file}}))
    with pytest.raises(ValueError, match=r"1 tensors of the checkpoint have no place in LlamaForCausalLM: stranger.weight"):
        LazyBundle(copied).model  # noqa: B018
    tensors = load_file(copied / file)
    save_file({n: t for n, t in tensors.items() if n not in (first, "stranger.weight")}, copied / file)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in listed["weight_map"].items() if k != first}}))
    with pytest.raises(ValueError, match=r"the checkpoint lacks 1 weights of LlamaForCausalLM"):
        LazyBundle(copied).model  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"verify": "all"}, "verify='all' is not known; use one of sizes, chunks"),
        ({"keep": 0}, "keep=0 must be 1 block or more"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no floating-point type"),
    ],
)
def test_errors_of_settings(settings, says, sound):
    with pytest.raises(ValueError, match=says):
        LazyBundle(sound, **settings)


def test_errors_of_capacity_and_of_what_has_no_manifest(sound, tmp_path):
    with pytest.raises(ValueError, match=r"capacity=2: .* without fused experts"):
        LazyBundle(sound, capacity=2).model  # noqa: B018
    tiny("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"capacity=1 of model.layers.0.mlp.experts must be in 2 .* 4"):
        LazyBundle(tmp_path, capacity=1).model  # noqa: B018
    with pytest.raises(ValueError, match=r"has no edgelab.json, which would say the sha256"):
        LazyBundle(tmp_path, verify="chunks")


# --------------------------------------------------------------------------------------------------------------- chunks


def test_rechunk_keeps_every_bit(sound, tmp_path):
    for size, several in ((4_500, True), (1 << 20, False)):
        out = rechunk(sound, tmp_path / "c", size)  # the second replaces the first
        verify_bundle(out)
        tensors, old = stored_in(out), stored_in(sound)
        files = {s.file for s in tensors.values()}
        assert (len(files) > len({s.file for s in old.values()})) == several and {f.name for f in files} == {
            f.name for f in out.glob("*.safetensors")
        }
        assert all(f.stat().st_size <= size for f in files)
        assert all(min(s.begin for s in tensors.values() if s.file == f) % 64 == 0 for f in files)
        assert set(tensors) == set(old)
        for name in old:
            assert torch.equal(LazyBundle(out).tensor(name), LazyBundle(sound).tensor(name))
        assert torch.equal(logits(load_bundle(out)), logits(load_bundle(sound)))  # transformers reads it as well
        same(LazyBundle(out, verify="chunks"), load_bundle(out))
    assert not [p for p in tmp_path.iterdir() if p.name != "c"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("precious")
    with pytest.raises(FileExistsError, match="is no bundle"):
        rechunk(sound, tmp_path / "mine", 1 << 20)


# -------------------------------------------------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A random mixture of 24 MB: 4 layers of 16 experts."""
    return random_bundle(tmp_path_factory.mktemp("large") / "b", megabytes=24, layers=4, experts=16, max_chunk_bytes=4 << 20)


def test_a_random_bundle_is_one(large):
    size = sum(f.stat().st_size for f in large.glob("*.safetensors"))
    assert 0.8 * 24e6 < size < 1.6 * 24e6  # attention, embedding and head come on top
    verify_bundle(large)
    lazy = LazyBundle(large)
    same(lazy, load_bundle(large), torch.arange(8).reshape(1, 8))
    assert logits(lazy.model, torch.arange(8).reshape(1, 8)).isfinite().all()


def test_startup_in_processes_of_their_own(large):
    """The first weight is there before the model is; the peak of RAM falls with what is not touched. From chunks of another size."""
    starts = (Start("eager", "load"), Start("one layer", layers=1, settings={"keep": 1}))
    report = startup_table(large, starts=starts, chunk_bytes=(2 << 20,), cold=True)
    value = {(r.model, r.metric): r.value for r in report}
    assert len(value) == len(starts) * len(METRICS)
    (where,) = {r.slice for r in report}
    assert where.endswith(" chunks of 2 MiB") and int(where.split()[0]) > len(LazyBundle(large).chunks)
    assert {r.note for r in report} == {"files not in the system's cache"}
    (first_weight, _), (token, _), (peak, _), *_ = METRICS.values()
    codes = sum(s.nbytes for s in stored_in(large).values()) / 2**20
    assert all(value[s.name, first_weight] < value[s.name, token] for s in starts)
    assert value["eager", peak] > codes
    assert value["one layer", peak] < 0.7 * value["eager", peak]


def test_pages_that_are_not_needed_are_given_back(large):
    """In this process: after the kernels have their tiles, the files' pages are no part of it."""
    set_before = set_kernel("numba")
    try:
        ids = torch.arange(8).reshape(1, 8)
        before = memory()
        lazy = LazyBundle(large)
        logits(lazy.model, ids)
        after = memory()
        eager = load_bundle(large)
        logits(eager, ids)
        last = memory()
    finally:
        set_kernel(set_before)
    codes = sum(s.nbytes for s in stored_in(large).values())
    assert after["RssFile"] - before["RssFile"] < 0.35 * codes
    assert last["RssFile"] - after["RssFile"] > 0.7 * codes


def test_errors_of_measuring(large, tmp_path):
    with pytest.raises(ValueError, match="how='fast' is not known"):
        Start("x", "fast")
    with pytest.raises(ValueError, match="those of LazyBundle; how='load' takes none"):
        Start("x", "load", settings={"keep": 1})
    with pytest.raises(ValueError, match="each needs its own"):
        startup_table(large, starts=(Start("x"), Start("x")))
    with pytest.raises(RuntimeError, match=r"'x' on .* failed in its process: .*keep=0 must be 1 block or more"):
        startup_table(large, starts=(Start("x", settings={"keep": 0}),))
