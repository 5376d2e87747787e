"""What goes and how the rest makes good for it, against a readable version of each rule; figures against a file on the disk."""

import copy
import re
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
import transformers
from test_model import CONFIGS, tiny

from edgelab.data import calibration_batches, corpus
from edgelab.evaluate import routers
from edgelab.model import family_of, load, load_tokenizer, weights
from edgelab.paths import data_dir
from edgelab.recipe import DropLayers, PruneChannels, PruneHeads
from edgelab.structure import block_influence, figures, shrink

HEADS = [f for f in CONFIGS if f not in ("olmoe", "llama")]  # surgery refuses: a norm over all heads; head_dim is the config's quotient


def tokens(vocabulary: int = 96, batches: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (4, 32), generator=generator) for _ in range(batches)]


def inputs_of(model, names: list[str], batches) -> dict[str, torch.Tensor]:
    """{linear's name: all inputs it saw, float64 [n, in]}, by plain hooks."""
    seen: dict[str, list] = {n: [] for n in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _m, args, n=n: seen[n].append(args[0].detach().flatten(0, -2).double()))
        for n in names
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for h in handles:
        h.remove()
    return {n: torch.cat(xs) for n, xs in seen.items()}


def expert_inputs(model, name: str, batches) -> list[torch.Tensor]:
    """What the down of each expert of the stack `name` was multiplied by, float64 [n_e, inner]: Qwen3-MoE's formula written out."""
    module, found = model.get_submodule(name), None

    def hook(m, args, _kwargs):
        nonlocal found
        x, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
        found = found or [[] for _ in m.gate_up_proj]
        for e, gate_up in enumerate(m.gate_up_proj):
            gate, up = (x[(index == e).any(-1)] @ gate_up.T).chunk(2, -1)
            found[e].append((gate * gate.sigmoid() * up).detach().double())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for ids in batches:
            model(ids)
    handle.remove()
    return [torch.cat(f) for f in found]


def least_squares(x, weight, kept, damping=0.01):
    """argmin |x W^T - x_K V^T|^2 + n lambda |V - W_K|^2, by a QR of the stacked equations: not the module's normal equations."""
    inner = x[:, kept]
    root = (damping * inner.square().sum(0).mean()).sqrt()
    a = torch.cat([inner, root * torch.eye(len(kept), dtype=x.dtype)])
    b = torch.cat([x @ weight.T, root * weight[:, kept].T])
    return torch.linalg.lstsq(a, b).solution.T


# ----------------------------------------------------------------------------------------------------------- channels


def test_channels_that_carry_least_of_the_output_go_and_the_rest_is_refitted():
    model, batches = tiny("llama"), tokens()
    before = copy.deepcopy(model)
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    seen = inputs_of(before, names, batches)
    remarks = shrink(model, PruneChannels(0.5, multiple=8), batches, progress=False)
    for name in names:
        old, x = before.get_submodule(name).weight.detach().double(), seen[name]
        loss = [float(torch.outer(x[:, c], old[:, c]).square().sum()) for c in range(64)]  # the term's own norm, channel by channel
        kept = sorted(sorted(range(64), key=lambda c: -loss[c])[:32])
        mlp, mlp_before = (m.get_submodule(name.removesuffix(".down_proj")) for m in (model, before))
        assert torch.equal(mlp.up_proj.weight, mlp_before.up_proj.weight[kept])
        assert torch.equal(mlp.gate_proj.weight, mlp_before.gate_proj.weight[kept])
        want = least_squares(x, old, kept)
        torch.testing.assert_close(mlp.down_proj.weight.double(), want, rtol=1e-3, atol=1e-4)
        cut, repaired = (((x @ old.T - x[:, kept] @ w.T).square().sum()) for w in (old[:, kept], mlp.down_proj.weight.double()))
        assert repaired < cut
    assert model.config.intermediate_size == 32 and "dense 64 -> 32 (50.0% gone)" in remarks[0]


def test_without_repair_down_keeps_its_columns():
    model, batches = tiny("llama"), tokens()
    before = copy.deepcopy(model).model.layers[0].mlp.down_proj.weight
    shrink(model, PruneChannels(0.25, multiple=8), batches, progress=False, repair=False)
    columns = {tuple(c.tolist()) for c in before.T}
    assert all(tuple(c.tolist()) in columns for c in model.model.layers[0].mlp.down_proj.weight.T)


def test_experts_lose_their_own_channels_and_rare_ones_lean_on_the_others():
    model, batches = tiny("qwen3_moe"), tokens()
    name = "model.layers.1.mlp.experts"
    before = copy.deepcopy(model)
    seen = expert_inputs(before, name, batches)
    shrink(model, PruneChannels(0.5, multiple=8), batches, progress=False)
    own = [x.T @ x for x in seen]
    weight = 32 / sum(len(x) for x in seen)  # as many tokens of the pool as there are channels
    moments = [h + weight * sum(own) for h in own]
    old, new = before.get_submodule(name), model.get_submodule(name)
    chosen = []
    for e in range(4):
        down = old.down_proj[e].double()
        score = [float(moments[e][c, c] * (down[:, c].detach() ** 2).sum()) for c in range(32)]
        kept = sorted(sorted(range(32), key=lambda c: -score[c])[:16])
        chosen.append(kept)
        assert torch.equal(new.gate_up_proj[e], old.gate_up_proj[e][[*kept, *(32 + c for c in kept)]])
        eigen, vectors = torch.linalg.eigh(moments[e])  # any X with X^T X = H does
        x = (vectors * eigen.clamp(min=0).sqrt()).T
        torch.testing.assert_close(new.down_proj[e].double(), least_squares(x, down, kept), rtol=1e-3, atol=1e-3)
    assert len({tuple(k) for k in chosen}) > 1


def test_an_expert_that_no_token_reached_is_pruned_by_the_others_inputs():
    model = tiny("deepseek_v3")
    router = next(iter(routers(model).values()))
    with torch.no_grad():
        router.e_score_correction_bias[3] = -100.0
    shrink(model, PruneChannels(0.5, multiple=8), tokens(), progress=False)
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(tokens()[0]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt_oss", "qwen2_moe"])
def test_magnitude_multiplies_the_norms_of_the_three(family):
    model = tiny(family)
    before = copy.deepcopy(model)
    shrink(model, PruneChannels(0.5, "magnitude", multiple=8), None, progress=False)
    inner = {w.name: w for w in weights(before)}
    new = {w.name: w.tensor for w in weights(model)}
    checked = 0
    for name, w in inner.items():
        if not name.endswith("down_proj"):
            continue
        stem, width, checked = name.removesuffix("down_proj"), w.shape[-1], checked + 1
        for e in range(w.shape[0] if w.kind == "experts" else 1):
            down, cut = (w.tensor[e], new[name][e]) if w.kind == "experts" else (w.tensor, new[name])
            if w.kind == "experts":
                both = inner[f"{stem}gate_up_proj"].tensor[e]
                odd = family_of(model).experts.interleaved
                gate, up = (both[0::2], both[1::2]) if odd else (both[:width], both[width:])
            else:
                gate, up = inner[f"{stem}gate_proj"].tensor, inner[f"{stem}up_proj"].tensor
            size = [prod(float(v.double().norm()) for v in (gate[c], up[c], down[:, c])) for c in range(width)]
            kept = sorted(sorted(range(width), key=lambda c: -size[c])[: width // 2])
            assert torch.equal(cut, down[:, kept]), (name, e)
    assert checked >= 2


def test_random_channels_follow_the_seed():
    ones = [copy.deepcopy(tiny("qwen3")) for _ in range(3)]
    for model, seed in zip(ones, (0, 0, 1), strict=True):
        shrink(model, PruneChannels(0.5, "random", multiple=8, seed=seed), None, progress=False)
    a, b, c = (m.model.layers[0].mlp.up_proj.weight for m in ones)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_deepseeks_three_kinds_lose_the_same_share_and_the_config_stays_true(shared, tmp_path):
    config = CONFIGS["deepseek_v3"]()
    config.n_shared_experts = shared
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shrink(model, PruneChannels(0.3, multiple=8), tokens(), progress=False)
    assert (model.config.intermediate_size, model.config.moe_intermediate_size, model.config.n_shared_experts) == (48, 24, shared)
    assert model.model.layers[1].mlp.shared_experts.up_proj.weight.shape == (24 * shared, 32)
    model.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(again(tokens()[0]).logits, model(tokens()[0]).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "share", "multiple", "stays"),
    [(64, 0.3, 32, 32), (64, 0.2, 32, 64), (64, 0.99, 32, 32), (64, 0.0, 32, 64), (64, 0.9, 1, 6), (64, 0.0, 24, 64), (64, 0.5, 128, 64)],
)
def test_what_stays_is_the_nearest_multiple_and_never_nothing(width, share, multiple, stays):
    model = tiny("qwen3")
    remarks = shrink(model, PruneChannels(share, "magnitude", multiple), None, progress=False)
    assert model.config.intermediate_size == stays and f"{width} -> {stays} ({1 - stays / width:.1%} gone)" in remarks[0]


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves no channel"):
        shrink(tiny("llama"), PruneChannels(1.0, method="magnitude"), None, progress=False)


# ----------------------------------------------------------------------------------------------------- heads and blocks


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_the_head_whose_output_is_least_goes(family):
    model, batches = tiny(family), tokens()
    before = copy.deepcopy(model)
    groups = before.config.num_key_value_heads
    names = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    seen = inputs_of(before, names, batches)
    shrink(model, PruneHeads(1 / groups), batches, progress=False)
    for name in names:
        old, x = before.get_submodule(name).weight.detach().double(), seen[name]
        each = old.shape[1] // groups
        loss = [float((x[:, g * each : (g + 1) * each] @ old[:, g * each : (g + 1) * each].T).square().sum()) for g in range(groups)]
        kept = [c for g in range(groups) if g != int(np.argmin(loss)) for c in range(g * each, (g + 1) * each)]
        torch.testing.assert_close(model.get_submodule(name).weight.double(), least_squares(x, old, kept), rtol=1e-3, atol=1e-3)
    assert model.config.num_key_value_heads == groups - 1


def test_heads_by_magnitude_hand_checked():
    model = tiny("qwen3")
    with torch.no_grad():
        for block, small in zip(model.model.layers, (0, 1), strict=True):  # head 0 speaks softly in block 0, head 1 in block 1
            block.self_attn.o_proj.weight[:, small * 16 : (small + 1) * 16] *= 0.01
    want = [model.model.layers[i].self_attn.o_proj.weight[:, s].clone() for i, s in enumerate((slice(16, 32), slice(0, 16)))]
    remarks = shrink(model, PruneHeads(0.5, "magnitude"), None, progress=False)
    assert all(torch.equal(b.self_attn.o_proj.weight, w) for b, w in zip(model.model.layers, want, strict=True))
    assert remarks[0].startswith("key-value heads kept by magnitude, of 2: 0: 1; 1: 0; ")


def test_block_influence_and_the_least_goes():
    config = CONFIGS["qwen3"]()
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0, 0.1)
        for weight in (model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight):
            weight *= 0.01
    batches = tokens()
    sums, count = [0.0] * 4, 0
    with torch.no_grad():
        for ids in batches:
            hidden = []
            handles = [b.register_forward_pre_hook(lambda _m, a: hidden.append(a[0])) for b in model.model.layers]  # noqa: B023
            handles.append(model.model.norm.register_forward_pre_hook(lambda _m, a: hidden.append(a[0])))  # noqa: B023
            model(ids)
            for h in handles:
                h.remove()
            for i, (x, y) in enumerate(pairwise(hidden)):
                x, y = x.flatten(0, 1).double(), y.flatten(0, 1).double()
                sums[i] += float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum())
            count += ids.numel()
    want = [1 - s / count for s in sums]
    assert block_influence(model, batches, progress=False) == pytest.approx(want, abs=1e-5) and min(want) == want[2]
    stays = model.model.layers[3].mlp.up_proj.weight
    remarks = shrink(model, DropLayers(1), batches, progress=False)
    assert "blocks 2 dropped" in remarks[0] and model.config.num_hidden_layers == 3
    assert model.model.layers[2].mlp.up_proj.weight is stays


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_on_the_meta_device_are_those_of_the_real_model(family):
    steps = [PruneChannels(0.5, "activation", multiple=8), DropLayers(1)]
    if family in HEADS:
        steps.insert(1, PruneHeads(0.5))
    real, meta = tiny(family), copy.deepcopy(tiny(family)).to("meta")
    meta.tie_weights()  # moving to the meta device parts what is tied
    for step in steps:
        shrink(real, step, tokens(), progress=False)
        assert shrink(meta, step, None, progress=False) == []
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert real.config.to_dict() == meta.config.to_dict()
    assert real(tokens()[0]).logits.isfinite().all()


@pytest.mark.parametrize("step", [PruneHeads(0.2, "magnitude"), PruneChannels(0.2, "magnitude", multiple=32)])
def test_a_share_that_rounds_to_nothing_says_so(step):
    model = tiny("qwen3")
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert "rounds to none" in shrink(model, step, None, progress=False)[-1]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "step", "says"),
    [
        ("qwen3", PruneHeads(0.9), "share=0.9 leaves none of 2 key-value heads; at most 0.5"),
        ("qwen3", DropLayers(2), "count=2 leaves none of 2 decoder blocks; at most 1"),
        ("olmoe", PruneHeads(0.5), "runs over all heads at once"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_refusals(family, step, says, device):
    with pytest.raises(ValueError, match=re.escape(says)):
        shrink(tiny(family).to(device), step, tokens() if device == "cpu" else None, progress=False)


@pytest.mark.parametrize(
    ("step", "says"),
    [(PruneChannels(), "no feed-forward"), (PruneHeads(), "no attention"), (DropLayers(), "leaves none of 0")],
)
def test_models_without_such_parts_are_refused(step, says):
    with pytest.raises(ValueError, match=says):
        shrink(torch.nn.Sequential(torch.nn.Linear(4, 4)), step, tokens(), progress=False)


# ------------------------------------------------------------------------------------------------------------ figures


def test_figures_by_hand():
    got = figures(tiny("qwen3_moe"))  # hidden 32, 4 heads of 8, 2 of them keys; 4 experts of 32, 2 active; dense 64; vocabulary 96
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    assert got["attention"] == {"parameters": attention, "bytes": 4 * attention, "multiply_adds": attention}
    assert got["mlp"]["multiply_adds"] == 3 * 32 * 64
    assert got["experts"]["parameters"] == 4 * 3 * 32 * 32 and got["experts"]["multiply_adds"] == 2 * 3 * 32 * 32
    assert got["router"]["multiply_adds"] == 4 * 32 and got["head"]["multiply_adds"] == 96 * 32
    assert got["embedding"]["multiply_adds"] == 0
    assert got["all"]["multiply_adds"] == sum(v["multiply_adds"] for k, v in got.items() if k != "all")


def test_a_context_costs_scores_and_values():
    model = tiny("qwen3")
    more = figures(model, context=10)
    assert more["context"]["multiply_adds"] == 10 * 2 * (32 + 32)
    assert more["all"]["multiply_adds"] - figures(model)["all"]["multiply_adds"] == 1280
    # MLA: four heads, keys of 8 + 8, values of 8
    assert figures(tiny("deepseek_v3"), context=1)["context"]["multiply_adds"] == 2 * 4 * (16 + 8)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_parameters_are_those_of_the_file(family, dtype, tmp_path):
    model = tiny(family).to(dtype)
    shrink(model, PruneChannels(0.5, "magnitude", multiple=8), None, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert figures(model)["all"]["bytes"] == file.stat().st_size - header
    assert figures(model)["all"]["parameters"] == sum(p.numel() for p in model.parameters())


KNOWN = {  # config, parameters as published, channels that stay of 30 % fewer in multiples of 32, matrices that each of them is a row of
    "Llama-2-7B": (
        lambda: transformers.LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            tie_word_embeddings=False,
        ),
        6_738_415_616, (11008, 7712), 32 * 3,
    ),
    "Mixtral-8x7B": (lambda: transformers.MixtralConfig(vocab_size=32000), 46_702_792_704, (14336, 10048), 32 * 8 * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_lose_exactly_what_a_hand_computes(name):
    make, published, (width, stays), matrices = KNOWN[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make(), dtype=torch.bfloat16)
    before = figures(model)["all"]
    assert before["parameters"] == published
    shrink(model, PruneChannels(0.3), None, progress=False)
    after, gone = figures(model)["all"], matrices * 4096 * (width - stays)
    assert model.config.intermediate_size == stays
    assert (after["parameters"], after["bytes"]) == (published - gone, before["bytes"] - 2 * gone)
    assert before["multiply_adds"] - after["multiply_adds"] == gone // (4 if name.startswith("Mixtral") else 1)  # 2 experts of 8


# ------------------------------------------------------------------------------------------------ on the embedded models


# hidden 256; dense: 4 blocks, 640 -> 448 channels. MoE: one block 512 -> 352, three of 16 experts and a shared one, 128 -> 96
EMBEDDED = {"edge-dense": 3 * 256 * 4 * 192, "edge-moe": 3 * 256 * (160 + 3 * 17 * 32)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_file_of_an_embedded_model_falls_by_exactly_what_went(name, tmp_path):
    def body(folder) -> int:
        model.save_pretrained(folder)
        file = folder / "model.safetensors"
        return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")

    model = load(data_dir() / name, dtype=torch.bfloat16)
    before = body(tmp_path / "before")
    shrink(model, PruneChannels(0.3, "magnitude"), None, progress=False)
    assert before - body(tmp_path / "after") == 2 * EMBEDDED[name]


@pytest.fixture(scope="module")
def texts():
    return corpus(("arithmetic", "assistant"), assistant=2000)


@pytest.mark.parametrize("name", ["edge-dense", "edge-moe"])
def test_looking_at_activations_beats_chance_and_repair_helps(name, texts):
    model, tokenizer = load(data_dir() / name, dtype=torch.float32), load_tokenizer(data_dir() / name)
    batches = calibration_batches(tokenizer, texts["calibration"], tokens=4096, context=256)
    test = calibration_batches(tokenizer, texts["test"], tokens=2048, context=256)

    @torch.no_grad()
    def answers(m) -> torch.Tensor:
        return torch.cat([m(ids).logits.log_softmax(-1).flatten(0, 1) for ids in test])

    original = answers(model)

    def divergence(step, **more) -> float:
        small = copy.deepcopy(model)
        shrink(small, step, batches, progress=False, **more)
        return float((original.exp() * (original - answers(small))).sum(-1).mean())

    step = PruneChannels(0.3)
    with_repair, without, chance = divergence(step), divergence(step, repair=False), divergence(PruneChannels(0.3, "random"))
    assert 0 < with_repair < 0.8 * without and without < 0.8 * chance
