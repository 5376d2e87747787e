"""The peers' side of a comparison, without any peer: experts as linear layers, jobs there and back, errors. And one real peer."""

import ast
import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from torch import nn

from edgelab import peers
from edgelab.model import weights as walk
from edgelab.peers import worker
from edgelab.peers.__main__ import main

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOES = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **BASE | {"num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**BASE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mixtral": lambda: transformers.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
}


def tiny(kind="deepseek_v3"):
    model = transformers.AutoModelForCausalLM.from_config(MOES[kind](), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():  # some classes leave their fused experts as they were allocated
            p.normal_(0, 0.2)
    return model


def in_blocks(model):
    return tuple(w.parameter_name for w in walk(model) if w.role not in ("router", "head", "embedding"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = tiny()
    model.save_pretrained(folder)
    return folder, model


# ---------------------------------------------------------------------------------------------- experts as linear layers


@pytest.mark.parametrize("kind", MOES)
def test_unfused_experts_compute_the_same(kind):
    model = tiny(kind)
    ids = torch.randint(0, 96, (3, 20))
    with torch.no_grad():
        fused = model(ids).logits
        names = worker.unfuse(model)
        linear = model(ids).logits
    assert names and not any(worker._is_fused(m) for m in model.modules())
    torch.testing.assert_close(linear, fused, rtol=1e-5, atol=1e-5 * float(fused.abs().max()))


def test_every_expert_layer_is_called_even_if_no_token_chose_it():
    model = tiny()
    worker.unfuse(model)
    experts = model.model.layers[1].mlp.experts
    called = set()
    for e in range(len(experts)):
        experts.get_submodule(str(e))["down_proj"].register_forward_hook(lambda *_, e=e: called.add(e))
    with torch.no_grad():
        experts(torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert called == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", MOES)
def test_fuse_back_is_the_inverse(kind):
    model = tiny(kind)
    names, original = in_blocks(model), {k: v.clone() for k, v in model.state_dict().items()}
    worker.unfuse(model)
    linear = model.state_dict()
    back = worker.fuse_back(linear, original, names)
    assert set(back) == set(names)
    for name in names:
        torch.testing.assert_close(back[name], original[name], rtol=0, atol=0)
    moved = worker.fuse_back({k: v + 1 for k, v in linear.items()}, original, names)
    torch.testing.assert_close(moved["model.layers.1.mlp.experts.down_proj"], original["model.layers.1.mlp.experts.down_proj"] + 1)


def test_a_stack_of_which_one_matrix_was_quantized_keeps_the_rest():
    original = {"m.experts.gate_up_proj": torch.randn(2, 6, 4), "m.experts.down_proj": torch.randn(2, 4, 3)}
    back = worker.fuse_back({"m.experts.1.up_proj.weight": torch.zeros(3, 4)}, original, tuple(original))
    assert set(back) == {"m.experts.gate_up_proj"}
    expected = original["m.experts.gate_up_proj"].clone()
    expected[1, 3:] = 0  # up comes after gate
    torch.testing.assert_close(back["m.experts.gate_up_proj"], expected, rtol=0, atol=0)


def test_experts_with_a_bias_are_refused():
    config = transformers.GptOssConfig(
        **BASE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match=r"GptOssExperts\) can't be unfused: .*gate_up_proj_bias.* Set unfuse to false"):
        worker.unfuse(transformers.AutoModelForCausalLM.from_config(config))


def test_targets_are_the_listed_weights_and_nothing_else():
    model = tiny()
    job = worker.Job("hqq", "hqq", "", in_blocks(model))
    assert not any("experts.0" in name for name in worker.targets(model, job))
    worker.unfuse(model)
    chosen, alone = worker.targets(model, job), worker.left_alone(model, job)
    assert "model.layers.1.mlp.experts.3.gate_proj" in chosen and "model.layers.0.mlp.down_proj" in chosen
    assert "lm_head" in alone and not set(chosen) & set(alone)
    assert sum(m.weight.numel() for m in chosen.values()) == sum(model.get_parameter(n).numel() for n in chosen_parameters(chosen))


def chosen_parameters(chosen):
    return [f"{name}.weight" for name in chosen]


# --------------------------------------------------------------------------------------------------------- a whole job

FAKE = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
{body}
"""
ANSWERS = """
import numpy as np
from safetensors.numpy import load_file, save_file
ids = load_file(folder / "calibration.safetensors")["ids"]
assert "PYTHONPATH" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"
save_file({name: np.full((2, 2), ids.sum(), np.float32) for name in job["weights"]}, folder / "weights.safetensors")
result = {"peer": job["peer"], "method": job["method"], "version": "1.2", "seconds": 0.5, "peak_rss_bytes": 7, "bits_per_weight": 4.5}
result |= {"coverage": 1.0, "notes": [f"{job['bits']} bits, {job['group_size']}, {job['settings']}"]}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a script in the worker's place; call it with the script's body."""

    def put(body):
        script = tmp_path / "fake.py"
        script.write_text(FAKE.replace("{body}", textwrap.dedent(body)))
        monkeypatch.setattr(peers, "WORKER", script)
        monkeypatch.setenv("PYTHONPATH", "/nowhere")

    return put


def ask(**more):
    settings = {"python": sys.executable, "bits": 3, "group_size": 64, "settings": {"iters": 9}} | more
    return peers.run("auto-round", "signround", "model", torch.arange(6).view(2, 3), ["a.weight"], **settings)


def test_a_job_goes_there_and_comes_back(fake):
    fake(ANSWERS)
    result = ask()
    torch.testing.assert_close(result.weights["a.weight"], torch.full((2, 2), 15.0))
    assert (result.peer, result.method, result.version, result.bits_per_weight) == ("auto-round", "signround", "1.2", 4.5)
    assert result.notes == ("3 bits, 64, {'iters': 9}",)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "print('starting', file=sys.stderr)\nsys.exit('worker: ValueError: bits=3; it has 4')",
            r"exit code 1:\nstarting\nworker: ValueError: bits=3",
        ),
        ("print('10%|#    | 1/10', file=sys.stderr)\nsys.exit('no')", r"exit code 1:\nno$"),
        ("(folder / 'weights.safetensors').write_bytes(b'half')", r"exit code 0:\n\(it said nothing\)"),
    ],
)
def test_a_failing_peer_is_quoted(fake, body, says):
    fake(body)
    with pytest.raises(RuntimeError, match=rf"auto-round signround ended with {says}"):
        ask()


def test_a_peer_that_does_not_end_is_stopped(fake):
    fake("import time\ntime.sleep(60)")
    with pytest.raises(RuntimeError, match=r"took longer than timeout_s=0\.2"):
        ask(timeout_s=0.2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("autoround", "x", "m", torch.zeros(1, 2, dtype=torch.long), ["w"]), ValueError, "'autoround' is not one of auto-round, "),
        (("hqq", "gptq", "m", torch.zeros(1, 2, dtype=torch.long), ["w"]), ValueError, "method 'gptq' of hqq is not one of hqq"),
        (("hqq", "hqq", "m", torch.zeros(2), ["w"]), ValueError, r"ids is torch.float32 \(2,\); it must be int64"),
        (("hqq", "hqq", "m", torch.zeros(1, 2, dtype=torch.long), []), ValueError, "weights is empty"),
        (("hqq", "hqq", "m", torch.zeros(1, 2, dtype=torch.long), ["w"]), FileNotFoundError, "python -m edgelab.peers install hqq --root"),
    ],
)
def test_errors_name_the_value_and_the_way_out(arguments, error, says, tmp_path):
    with pytest.raises(error, match=says):
        peers.run(*arguments, root=tmp_path)


# --------------------------------------------------------------------------------------------------------- environments


def test_an_installation_that_did_not_end_does_not_count(tmp_path, monkeypatch):
    asked = []

    def create(folder, with_pip):
        assert with_pip
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").write_text("")

    def pip(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) == 1, stderr="ERROR: no such version")

    monkeypatch.setattr(peers.venv, "create", create)
    monkeypatch.setattr(peers.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"torch==2\.13\.0 hqq==.* failed:\nERROR: no such version"):
        peers.install("hqq", tmp_path)
    with pytest.raises(FileNotFoundError, match="its installation did not end"):
        peers.interpreter("hqq", tmp_path)
    peers.install("hqq", tmp_path)
    assert peers.interpreter("hqq", tmp_path) == tmp_path / "hqq/bin/python" == peers.environments(tmp_path)["hqq"]
    assert all("torch==2.13.0" in command for command in asked)


def test_each_peer_is_pinned_and_has_a_backend(capsys, tmp_path):
    assert set(peers.PEERS) == set(worker.BACKENDS)
    for p in peers.PEERS.values():
        assert all("==" in r for r in p.requirements) and p.requirements[0].startswith(f"{p.name}==")
        source = (peers.WORKER.parent / f"{worker.BACKENDS[p.name]}.py").read_text(encoding="utf-8")
        assert f"\ndef {p.name.replace('-', '_')}(job: Job" in source
    main(["list", "--root", str(tmp_path)])
    listed = capsys.readouterr().out
    assert "auto-round" in listed and "not installed" in listed


def test_the_worker_needs_nothing_of_edgelab():
    """What its files import at once, where there is no edgelab: they run in other environments."""
    allowed = {*sys.stdlib_module_names, "torch", "worker"}
    for file in ("worker.py", "dataless.py", "calibrated.py"):
        for node in ast.parse((peers.WORKER.parent / file).read_text(encoding="utf-8")).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            assert {n.split(".")[0] for n in names} <= allowed, file


def test_put_changes_a_copy_and_shares_the_rest(checkpoint):
    model = checkpoint[1]
    name = "model.layers.0.mlp.down_proj.weight"
    changed = peers.put(model, {name: torch.zeros(32, 64)})
    assert (changed.get_parameter(name) == 0).all() and (model.get_parameter(name) != 0).any()
    assert changed.lm_head.weight is model.lm_head.weight
    with pytest.raises(ValueError, match=r"is \(2, 2\); the DeepseekV3ForCausalLM has \(32, 64\)"):
        peers.put(model, {name: torch.zeros(2, 2)})
    tied = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**BASE, head_dim=8, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="is tied to"):
        peers.put(tied, {"lm_head.weight": torch.zeros(96, 32)})


# ------------------------------------------------------------------------------------------- the worker, on a real model


def job(checkpoint, **more):
    folder, model = checkpoint
    return worker.Job(**{"peer": "hqq", "method": "hqq", "model": str(folder), "weights": in_blocks(model)} | more)


def halve(job, model, ids, also=None):
    """A backend that halves every layer it is given."""
    chosen = worker.targets(model, job)
    if also:
        model.get_parameter(also).data *= 2
    found = {f"{name}.weight": layer.weight / 2 for name, layer in chosen.items()}
    return worker.Outcome(found, sum(8 * w.numel() for w in found.values()), 0.1, ["halved"])


@pytest.fixture
def backend(monkeypatch):
    def put(function):
        monkeypatch.setattr(worker, "version", lambda _: "0")
        monkeypatch.setattr("edgelab.peers.dataless.hqq", function)

    return put


@pytest.mark.parametrize("unfused", [True, False])
def test_coverage_says_what_was_left_out(checkpoint, backend, unfused):
    backend(halve)
    model = checkpoint[1]
    found, result = worker.run(job(checkpoint, unfuse=unfused), torch.zeros(1, 4, dtype=torch.long))
    stacks = {name for name in in_blocks(model) if name.endswith(("gate_up_proj", "experts.down_proj"))}
    assert set(found) == set(in_blocks(model)) - (set() if unfused else stacks)
    for name, w in found.items():
        torch.testing.assert_close(w, model.get_parameter(name) / 2, rtol=0, atol=0)
    total, left = (sum(model.get_parameter(n).numel() for n in names) for names in (in_blocks(model), stacks))
    assert result["coverage"] == pytest.approx(1 if unfused else 1 - left / total)
    assert result["bits_per_weight"] == 8 and result["peak_rss_bytes"] > 2**20


def test_norms_that_a_tool_moved_scales_into_come_along(checkpoint, backend):
    norm = "model.layers.0.input_layernorm.weight"
    backend(lambda *a: halve(*a, also=norm))
    found, _ = worker.run(job(checkpoint), torch.zeros(1, 4, dtype=torch.long))
    torch.testing.assert_close(found[norm], checkpoint[1].get_parameter(norm) * 2)


def nothing(job, model, ids):
    return worker.Outcome({n: p for n, p in model.named_parameters() if n in job.weights}, 1.0, 0.1)


def nan(job, model, ids):
    outcome = halve(job, model, ids)
    next(iter(outcome.weights.values())).data[0, 0] = float("nan")
    return outcome


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda *a: halve(*a, also="lm_head.weight"), r"changed lm_head.weight \(96, 32\), which is none of the \d+ weights"),
        (nothing, r"changed none of the \d+ weights"),
        (nan, "with 1 NaN or infinite values"),
    ],
)
def test_a_tool_that_did_something_else_is_found_out(checkpoint, backend, function, says):
    backend(function)
    with pytest.raises(RuntimeError, match=says):
        worker.run(job(checkpoint), torch.zeros(1, 4, dtype=torch.long))


def test_the_worker_refuses_what_it_does_not_know(checkpoint):
    ids = torch.zeros(1, 4, dtype=torch.long)
    for more, says in (
        ({"peer": "x"}, "peer 'x' is not one of bitsandbytes"),
        ({"weights": ("model.nothing",)}, "has no weight 'model.nothing'"),
        ({"peer": "bitsandbytes", "method": "nf5"}, "method 'nf5' of bitsandbytes is not one of nf4"),
    ):
        if more.get("method") and not importlib.util.find_spec("bitsandbytes"):
            continue
        with pytest.raises(ValueError, match=says):
            worker.run(job(checkpoint, **more), ids)
    with pytest.raises(ValueError, match="setting 'itres' is not one of iters"):
        worker.settings(job(checkpoint, settings={"itres": 1}), iters=200)


def test_bitsandbytes_from_end_to_end(checkpoint):
    """A real worker in a real process; the values are those of bitsandbytes called on each expert's matrices."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed here")
    folder, model = checkpoint
    ids = torch.zeros(1, 4, dtype=torch.long)
    result = peers.run("bitsandbytes", "nf4", folder, ids, in_blocks(model), 4, 32, threads=1, root=folder / "none")
    assert result.coverage == 1 and result.bits_per_weight == 4 + 32 / 32
    stack = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    gate = stack[2, :32].contiguous()
    expected = functional.dequantize_4bit(*functional.quantize_4bit(gate, blocksize=32, quant_type="nf4"))
    torch.testing.assert_close(result.weights["model.layers.1.mlp.experts.gate_up_proj"][2, :32], expected, rtol=0, atol=0)
    changed = peers.put(model, result.weights)
    with torch.no_grad():
        a, b = (m(torch.arange(16)[None]).logits for m in (model, changed))
    assert 0.9 < float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0)) < 1 - 1e-6


def test_onnxruntime_rounds_within_half_a_step(checkpoint):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed here")
    pytest.importorskip("onnx", reason="onnx is not installed here")
    model = checkpoint[1]
    for symmetric in (True, False):
        found, result = worker.run(
            job(checkpoint, peer="onnxruntime", method="rtn", symmetric=symmetric), torch.zeros(1, 4, dtype=torch.long)
        )
        assert result["bits_per_weight"] == (4.5 if symmetric else 4.625)
        w = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().reshape(32, -1, 32)
        error = (found["model.layers.0.mlp.down_proj.weight"].reshape(w.shape) - w).abs()
        # symmetric: 16 values from -8 s to 7 s, the largest weight at -8 s, its opposite may be a step off
        step = w.abs().amax(-1, keepdim=True) / 8 if symmetric else (w.amax(-1, keepdim=True) - w.amin(-1, keepdim=True)) / 15
        assert (error <= step * (1.01 if symmetric else 0.51)).all()


def test_the_result_is_written_last(checkpoint, backend, tmp_path):
    from safetensors.torch import save_file

    backend(halve)
    (tmp_path / "job.json").write_text(json.dumps(vars(job(checkpoint))))
    save_file({"ids": torch.zeros(1, 4, dtype=torch.long)}, tmp_path / "calibration.safetensors")
    worker.main(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.safetensors", "job.json", "result.json", "weights.safetensors"]
    backend(nan)
    for name in ("result.json", "weights.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(RuntimeError):
        worker.main(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.safetensors", "job.json"]
