"""Streaming: the bundle is the one that compress and save_bundle write, to the byte, whatever interrupts it."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import CONFIGS, IDS, tiny
from typer.testing import CliRunner

import edgelab.hf
from edgelab import Quantize, QuantScheme, Recipe, stream
from edgelab.bundle import load_bundle, read_manifest, save_bundle, verify_bundle
from edgelab.cli import app
from edgelab.compress import compress
from edgelab.methods.hqq import hqq
from edgelab.model import FAMILIES, load, load_tokenizer, quantized, weights
from edgelab.recipe import Rotate
from edgelab.stream import compress_checkpoint

DATA = Path(__file__).parents[1] / "data"
INT4 = Recipe.uniform("int4-g32")
QUIET = {"progress": False}


def maker():
    """tests/bench/make_checkpoint.py, which is no package."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", Path(__file__).parent / "bench" / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A tiny Qwen3-MoE checkpoint in three shards, a tensor per expert and projection."""
    folder = tmp_path_factory.mktemp("checkpoint") / "moe"
    assert maker().make(folder, shard_bytes=200_000) == 263_552
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def saved(source: Path, out: Path, recipe: Recipe = INT4, tokenizer=None, **settings) -> Path:
    """The bundle by way of a model in memory."""
    c = compress(load(source), recipe, progress=False)
    return save_bundle(c.model, tokenizer, out, recipe=recipe, coverage=c.coverage, **settings)


def edited(source: Path, to: Path, change) -> Path:
    """A copy of the checkpoint as one file, its tensors changed by `change`."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            tensors |= {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    save_file({k: v.contiguous() for k, v in (change(tensors) or tensors).items()}, to / "model.safetensors", {"format": "pt"})
    return to


# --------------------------------------------------------------------------------------------------------- the same bundle


@pytest.mark.parametrize("text", ["int4-g32", "int3-row", "int8-tensor"])
def test_the_embedded_models_in_several_chunks(tmp_path, text):
    recipe = Recipe.uniform(text)
    for name in ("edge-moe", "edge-dense"):  # untied and tied; per-expert tensors and none
        tokenizer, room = load_tokenizer(DATA / name), {"max_chunk_bytes": 1_200_000}
        want = saved(DATA / name, tmp_path / f"{name}-a", recipe, tokenizer, **room)
        got = compress_checkpoint(DATA / name, tmp_path / f"{name}-b", recipe, tokenizer=tokenizer, **room, **QUIET)
        assert content(got) == content(want)
        assert verify_bundle(got) and len(list(got.glob("*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edge-dense-a", "edge-dense-b", "edge-moe-a", "edge-moe-b"]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(tmp_path, family):
    # float16 with a bfloat16 norm, and something that stays as it is: each stored tensor keeps the smallest dtype without loss
    tiny(family).to(torch.float16 if family in ("llama", "gpt_oss") else torch.bfloat16).save_pretrained(tmp_path / "m")
    recipe = Recipe.uniform("int4-g32", embedding=None)
    want = saved(tmp_path / "m", tmp_path / "a", recipe, max_chunk_bytes=40_000)
    got = compress_checkpoint(tmp_path / "m", tmp_path / "b", recipe, max_chunk_bytes=40_000, **QUIET)
    assert content(got) == content(want)
    with torch.no_grad():
        assert torch.equal(load_bundle(got)(IDS).logits, load_bundle(want)(IDS).logits)


@pytest.mark.parametrize("family", [f for f in CONFIGS if FAMILIES[f].experts and f != "gpt_oss"])
def test_experts_that_are_stored_as_stacks(tmp_path, family):
    model = tiny(family)
    model.save_pretrained(tmp_path / "m")
    fused = edited(tmp_path / "m", tmp_path / "fused", lambda _: {k: v for k, v in model.state_dict().items()})
    assert content(compress_checkpoint(fused, tmp_path / "a", INT4, **QUIET)) == content(saved(tmp_path / "m", tmp_path / "b"))


def test_transposed_weights(tmp_path):
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    for text in ("int4-g32", "int8-tensor"):
        recipe = Recipe.uniform(text)
        got = compress_checkpoint(tmp_path / "m", tmp_path / f"{text}-a", recipe, **QUIET)
        assert content(got) == content(saved(tmp_path / "m", tmp_path / f"{text}-b", recipe))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_too(tmp_path, same):
    tiny("qwen3").save_pretrained(tmp_path / "m")
    source = edited(
        tmp_path / "m", tmp_path / "both", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * (1 if same else 2)}
    )
    got, want = compress_checkpoint(source, tmp_path / "a", INT4, **QUIET), saved(source, tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(load(got)(IDS).logits, load(want)(IDS).logits)
    assert content(got) == content(want)


def test_plain_from_pretrained_loads_it(tmp_path, moe):
    out = compress_checkpoint(moe, tmp_path / "out", INT4, **QUIET)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, compress(load(moe), INT4, progress=False).model(IDS).logits)


def test_hqq_and_the_codes_of_a_table(tmp_path, moe):
    rules = (("@router", None), ("@experts", QuantScheme.parse("uint4-g64")))
    recipe = Recipe((Quantize(rules, method="hqq"), Quantize((("@router", None), ("@experts", None), ("*", QuantScheme.parse("nf4-g64"))))))
    recipe = Recipe((recipe.steps[0], Quantize(recipe.steps[1].rules, min_expert_share=0)))
    got = quantized(load_bundle(compress_checkpoint(moe, tmp_path / "out", recipe, **QUIET)))
    assert {str(q.scheme) for _, q in got.values()} == {"uint4-g64", "nf4-g64"}
    for w in weights(load(moe)):
        if w.role == "experts":
            want, (_, q) = hqq(w.tensor, QuantScheme.parse("uint4-g64")), got[w.name]
            for part in ("packed", "scales", "offsets"):
                assert (getattr(q, part) == getattr(want, part)).all(), (w.name, part)


def test_an_older_bundle_is_replaced_and_anything_else_is_not(tmp_path, moe):
    out = compress_checkpoint(moe, tmp_path / "out", Recipe.uniform("int8-row"), **QUIET)
    assert compress_checkpoint(moe, out, INT4, **QUIET) == out and read_manifest(out)["recipe_digest"] == INT4.digest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine exists and is no bundle"):
        compress_checkpoint(moe, tmp_path / "mine", INT4, **QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_the_command(tmp_path, moe):
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["compress", str(moe), "--out", str(out), "--scheme", "int4-g32", "--stream"])
    assert run.exit_code == 0 and "Coverage audit" in run.output, run.output
    assert content(out) == content(saved(moe, tmp_path / "want"))


# ------------------------------------------------------------------------------------------------------------ interruptions

CHILD = """
import sys
from edgelab import Recipe, stream
stream.BLOCK_BYTES = 1 << 12  # some hundred blocks
stream.compress_checkpoint(sys.argv[1], sys.argv[2], Recipe.uniform("int4-g32"), max_chunk_bytes=20_000, progress=False)
"""


def test_killed_at_any_moment(tmp_path, moe):
    want = content(saved(moe, tmp_path / "want", max_chunk_bytes=20_000))
    out, work = tmp_path / "out", tmp_path / ".out.stream"
    whole = work / "bundle"
    seen = []
    for chunks in (1, 4):  # kill when so many chunks are whole
        child = subprocess.Popen([sys.executable, "-c", CHILD, moe, out], stderr=subprocess.PIPE)
        while child.poll() is None and not (whole.is_dir() and len(list(whole.glob("*.safetensors"))) >= chunks):
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if child.returncode == 0:
            break  # it was faster; what follows still holds
        seen.append({f.name: f.stat().st_mtime_ns for f in whole.glob("*.safetensors")})
        assert not out.exists()
        assert all(want[f.name] == f.read_bytes() for f in whole.glob("*.safetensors"))  # whole or not there
    assert seen
    out = compress_checkpoint(moe, out, INT4, max_chunk_bytes=20_000, **QUIET)
    assert content(out) == want and not work.exists()
    kept = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    assert all(kept[name] == when for before in seen for name, when in before.items())  # none was written again


class Killed(BaseException):
    """Stands for a kill in this process."""


@pytest.mark.parametrize("where", ["note", "_close", "_write", "put", "write_manifest", "_sync"])
def test_interrupted_at_each_step(tmp_path, moe, monkeypatch, where):
    room = {"max_chunk_bytes": 60_000}
    want = content(saved(moe, tmp_path / "want", **room))
    owner = {"note": stream._Journal, "_close": stream._Run, "_write": stream._Run}.get(where, stream)
    original, calls = getattr(owner, where), []

    def killing(*args, **kwargs):
        calls.append(0)
        if len(calls) == (3 if where in ("note", "_close", "_write", "_sync") else 1):
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(owner, where, killing)
        compress_checkpoint(moe, tmp_path / "out", INT4, **room, **QUIET)
    assert not (tmp_path / "out").exists()
    assert content(compress_checkpoint(moe, tmp_path / "out", INT4, **room, **QUIET)) == want
    assert not (tmp_path / ".out.stream").exists()


def test_killed_between_the_rename_and_the_cleaning_up(tmp_path, moe, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(stream.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(Killed))
        compress_checkpoint(moe, tmp_path / "out", INT4, **QUIET)
    before = content(tmp_path / "out")
    when = (tmp_path / "out" / "edgelab.json").stat().st_mtime_ns
    compress_checkpoint(moe, tmp_path / "out", INT4, **QUIET)
    assert content(tmp_path / "out") == before and not (tmp_path / ".out.stream").exists()
    assert (tmp_path / "out" / "edgelab.json").stat().st_mtime_ns == when  # nothing was done again


@pytest.mark.parametrize("change", ["recipe", "source", "chunks"])
def test_something_else_starts_anew(tmp_path, moe, monkeypatch, change):
    source = shutil.copytree(moe, tmp_path / "source")
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(stream, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(Killed))
        compress_checkpoint(source, tmp_path / "out", INT4, max_chunk_bytes=60_000, **QUIET)
    assert len((tmp_path / ".out.stream" / "journal.jsonl").read_text().splitlines()) > 1
    recipe, room = INT4, 60_000
    if change == "recipe":
        recipe = Recipe.uniform("int8-row")
    elif change == "chunks":
        room = 90_000
    else:
        file = next(source.glob("*.safetensors"))
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    got = compress_checkpoint(source, tmp_path / "out", recipe, max_chunk_bytes=room, **QUIET)
    assert content(got) == content(saved(source, tmp_path / "want", recipe, max_chunk_bytes=room))


def test_a_line_of_the_journal_that_was_cut_short(tmp_path, moe, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(stream, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(Killed))
        compress_checkpoint(moe, tmp_path / "out", INT4, max_chunk_bytes=60_000, **QUIET)
    journal = tmp_path / ".out.stream" / "journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    got = compress_checkpoint(moe, tmp_path / "out", INT4, max_chunk_bytes=60_000, **QUIET)
    assert content(got) == content(saved(moe, tmp_path / "want", max_chunk_bytes=60_000))


def test_two_at_once(tmp_path, moe):
    with stream._locked(tmp_path / ".out.stream"), pytest.raises(BlockingIOError, match="another process works in"):
        compress_checkpoint(moe, tmp_path / "out", INT4, **QUIET)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("text", ["int4-g32", "int8-tensor", "nf4-g64"])
def test_nan_is_named_and_nothing_is_left(tmp_path, moe, name, text):
    def change(tensors):
        tensors[name].view(-1)[17] = torch.nan

    source = edited(moe, tmp_path / "source", change)
    with pytest.raises(ValueError, match=rf"holds 1 NaN or infinite values \(tensor {name} of model.safetensors, rows \d+ to \d+\)"):
        compress_checkpoint(source, tmp_path / "out", Recipe.uniform(text), **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_too_large_for_float16_scales(tmp_path, moe):
    source = edited(moe, tmp_path / "source", lambda t: t["lm_head.weight"].view(-1)[0].fill_(1e30) and None)
    with pytest.raises(ValueError, match=r"lm_head: a weight needs a scale above float16's 65504 at 4 bits"):
        compress_checkpoint(source, tmp_path / "out", INT4, **QUIET)


def test_small_groups_are_warned_of_once(tmp_path, moe):
    source = edited(moe, tmp_path / "source", lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 1e-6})
    with pytest.warns(UserWarning, match=r"lm_head: \d+ groups are so small") as said:
        compress_checkpoint(source, tmp_path / "out", INT4, **QUIET)
    assert len(said) == 1


def test_damaged_checkpoints(tmp_path, moe):
    source = shutil.copytree(moe, tmp_path / "source")
    last = sorted(source.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{last.name} is truncated"):
        compress_checkpoint(source, tmp_path / "out", INT4, **QUIET)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{last.name} is missing"):
        compress_checkpoint(source, tmp_path / "out", INT4, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


CHANGES = {
    r"1 tensors of the checkpoint have no place in Qwen3MoeForCausalLM: model.extra": lambda t: t | {"model.extra": torch.zeros(2)},
    r"lacks 1 weights of Qwen3MoeForCausalLM: model.norm.weight": lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"},
    r"stack of 8 experts; the checkpoint holds 7 x": lambda t: {k: v for k, v in t.items() if "layers.0.mlp.experts.5" not in k},
    r"an expert of .*down_proj is \(64, 64\); the checkpoint holds .*experts.2.down_proj.weight \(64, 32\)": lambda t: (
        t | {n: t[n][:, :32] for n in ["model.layers.1.mlp.experts.2.down_proj.weight"]}
    ),
    r"model.norm.weight has the shape \(64,\), the checkpoint holds model.norm.weight \(32,\)": lambda t: (
        t | {"model.norm.weight": torch.ones(32)}
    ),
    r"lm_head.weight is stored as F8_E4M3; weights of BF16, F16, F32 can be streamed": lambda t: (
        t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("says", CHANGES)
def test_tensors_that_do_not_fit_the_model(tmp_path, moe, says):
    source = edited(moe, tmp_path / "source", CHANGES[says])
    with pytest.raises(ValueError, match=says):
        compress_checkpoint(source, tmp_path / "out", INT4, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_what_needs_a_model_is_refused(tmp_path, moe):
    for recipe, says in (
        (Recipe.uniform("int4-g32", method="gptq"), "the method 'gptq' needs calibration data"),
        (Recipe((Rotate(), *INT4.steps)), "a Rotate step needs a model"),
        (Recipe.uniform("int4-g48"), "group_size=48 does not divide"),
    ):
        with pytest.raises(ValueError, match=says):
            compress_checkpoint(moe, tmp_path / "out", recipe, **QUIET)
    bundle = compress_checkpoint(moe, tmp_path / "bundle", INT4, **QUIET)
    with pytest.raises(ValueError, match="is quantized already"):
        compress_checkpoint(bundle, tmp_path / "out", INT4, **QUIET)


def test_no_room_on_the_disk(tmp_path, moe, monkeypatch):
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"takes [\d,]+ more bytes, the disk of .* has 0 free"):
        compress_checkpoint(moe, tmp_path / "out", INT4, **QUIET)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------------ memory

PEAK = """
import resource, sys
from edgelab import Recipe, stream
from edgelab.kernels.quantize import *
for folder in sys.argv[1:]:
    stream.compress_checkpoint(folder, folder + ".out", Recipe.uniform("int4-g32"), progress=False, threads=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, moe):
    make = maker()
    make.TINY = make.TINY | {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 32}
    make.make(tmp_path / "large", layers=4)  # 200 MB
    size = sum(f.stat().st_size for f in (tmp_path / "large").glob("*.safetensors"))
    shutil.copytree(moe, tmp_path / "small")
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, check=True)
    small, large = map(int, run.stdout.split())
    assert size > 200e6 and large - small < 0.25 * size, (small, large)
    assert json.loads((tmp_path / "large.out" / "config.json").read_text())["quantization_config"]["quant_method"] == "edgelab"
    assert edgelab.hf.FORMAT == 1
