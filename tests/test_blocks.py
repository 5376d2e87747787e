"""Block by block: against naive sums over whole forwards, with one block's statistics alive at a time."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from test_evaluate import PROSE, tokenizer  # noqa: F401 (a fixture)
from test_model import CONFIGS, tiny
from torch import nn

from edgelab.blocks import calibrate, decoder_blocks, merge, walk
from edgelab.data import calibration_batches
from edgelab.evaluate import routers
from edgelab.methods.calibrate import is_shared, rare, shrink
from edgelab.methods.rtn import round_to_nearest
from edgelab.model import Swapper, weights
from edgelab.scheme import QuantScheme

BATCHES = [torch.arange(40).reshape(2, 20) % 96, torch.arange(36).reshape(3, 12) * 7 % 96]
TOKENS = 76


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MODELS = {**{f: lambda f=f: tiny(f) for f in CONFIGS}, "gpt2": gpt2, "opt": opt}


@torch.no_grad()
def naive(model, batches, all_tokens: bool = False) -> dict[str, list[torch.Tensor]]:
    """{weight name: the rows [n, in] it was multiplied by, float64, of a stack a list per expert} of whole forwards."""
    rows: dict[str, list] = {}
    handles = []
    for w in weights(model):
        module = model.get_submodule(w.module_name)
        if w.kind == "linear":

            def keep(_m, args, name=w.name):
                rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

            handles.append(module.register_forward_pre_hook(keep))
        elif w.kind == "experts" and w.parameter == "gate_up_proj":

            def route(m, args, name=w.module_name):
                x, index = args[0].double(), args[1]
                for e in range(m.num_experts):
                    mine = x if all_tokens else x[(index == e).any(1)]
                    up = m.gate_up_proj[e].double()
                    if hasattr(m, "gate_up_proj_bias"):  # gpt_oss
                        y = torch.einsum("th,ho->to", mine, up) + m.gate_up_proj_bias[e].double()
                        gate, lin = y[:, 0::2].clamp(max=m.limit), y[:, 1::2].clamp(-m.limit, m.limit)
                        h = (lin + 1) * gate / (1 + torch.exp(-m.alpha * gate))
                    else:
                        y = torch.einsum("th,oh->to", mine, up)
                        inner = y.shape[1] // 2
                        h = F.silu(y[:, :inner]) * y[:, inner:]
                    for part, value in (("gate_up_proj", mine), ("down_proj", h)):
                        rows.setdefault(f"{name}.{part}", [[] for _ in range(m.num_experts)])[e].append(value)

            handles.append(module.register_forward_pre_hook(route))
    for ids in batches:
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {n: [torch.cat(e) for e in r] if isinstance(r[0], list) else torch.cat(r) for n, r in rows.items()}


def check(stats, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """`stats` are those of the rows x [n, in], float64."""
    assert int(stats.count) == len(x)
    empty = torch.zeros(1, x.shape[1], dtype=torch.float64)
    ref = {"absmax": torch.cat([x.abs(), empty]).amax(0), "sum_abs": x.abs().sum(0), "sum_sq": x.square().sum(0), "xx": x.T @ x}
    for part, value in ref.items():
        scale = max(float(value.abs().max()), 1e-30)
        assert (getattr(stats, part).double() - value).abs().max() <= tolerance * scale, part


@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek_v3", "qwen3_moe", "gpt_oss", "granitemoe", "gpt2", "opt"])
def test_statistics_equal_naive_ones(name):
    model = MODELS[name]()
    comp, ref = calibrate(model, BATCHES, progress=False), naive(model, BATCHES)
    assert set(comp) == set(ref) == {w.name for w in weights(model) if w.kind in ("linear", "experts")} and "lm_head" in comp
    for weight, rows in ref.items():
        stats = comp[weight]
        if isinstance(rows, list):
            for e, x in enumerate(rows):
                check(stats.expert(e), x)
        else:
            check(stats, rows)
            assert stats.histogram.counts.sum() == rows.numel()
    assert comp.tokens == TOKENS
    assert model.training is False and not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "granitemoe"])
def test_routers_and_experts_agree(name):
    model = MODELS[name]()
    comp = calibrate(model, BATCHES, progress=False)
    assert set(comp.routers) == set(routers(model)) != set()
    for row in comp.report():
        r = comp.routers[row.router]
        block = row.router.rpartition(".")[0]
        assert r.tokens == TOKENS and int(r.counts.sum()) == 2 * TOKENS  # two experts per token
        for stack in ("gate_up_proj", "down_proj"):
            stats = comp[f"{block}.experts.{stack}"]
            assert torch.equal(stats.count, r.counts)
            torch.testing.assert_close(stats.gate_mass, r.gate_mass)
        assert int(comp[f"{block}.experts.gate_up_proj"].pooled.count) == TOKENS
        assert row.rare == tuple(e for e in range(4) if r.counts[e] < 32) and row.dead == ()
        assert row.least == int(r.counts.min()) and row.most == int(r.counts.max())
    assert "experts rare" in repr(comp) and comp._repr_html_().count("<tr>") == 1 + len(comp.routers)


def test_every_token_to_every_expert():
    model = tiny("deepseek_v3")
    comp, routed = (calibrate(model, BATCHES, all_tokens=a, progress=False) for a in (True, False))
    for weight, rows in naive(model, BATCHES, all_tokens=True).items():
        for e, x in enumerate(rows if isinstance(rows, list) else []):
            check(comp[weight].expert(e), x)
            assert comp[weight].histogram.counts.sum() == routed[weight].histogram.counts.sum()  # still of what runs
        if isinstance(rows, list):
            np.testing.assert_array_equal(comp[weight].histogram.counts, routed[weight].histogram.counts)
            torch.testing.assert_close(comp[weight].gate_mass, routed[weight].gate_mass)
    (router,) = comp.routers
    assert torch.equal(comp.routers[router].counts, routed.routers[router].counts)
    assert is_shared(comp["model.layers.1.mlp.experts.gate_up_proj"].xx)


def test_what_reads_the_same_input_shares_its_statistics():
    comp = calibrate(tiny("deepseek_v3"), BATCHES, progress=False)
    layer = "model.layers.1"
    assert comp[f"{layer}.self_attn.q_a_proj"] is comp[f"{layer}.self_attn.kv_a_proj_with_mqa"]
    shared = comp[f"{layer}.mlp.shared_experts.gate_proj"]
    assert shared is comp[f"{layer}.mlp.shared_experts.up_proj"] is comp[f"{layer}.mlp.experts.gate_up_proj"].pooled
    assert shared is not comp[f"{layer}.mlp.shared_experts.down_proj"]


def test_two_sets_merge_to_the_statistics_of_both():
    model = tiny("qwen3_moe")
    whole = calibrate(model, BATCHES, progress=False)
    parts = merge(*(calibrate(model, [b], progress=False) for b in BATCHES))
    assert set(parts) == set(whole) and parts.tokens == TOKENS
    for name, ref in whole.items():
        comp = parts[name]
        assert torch.equal(comp.count, ref.count)
        np.testing.assert_array_equal(comp.histogram.counts, ref.histogram.counts)
        for part in ("absmax", "sum_abs", "sum_sq", "xx"):
            # 1e-5: a batch of another shape takes another kernel, and so other roundings, through the layers
            torch.testing.assert_close(
                getattr(comp, part), getattr(ref, part), rtol=1e-5, atol=1e-5 * float(getattr(ref, part).abs().max())
            )
    for name, r in whole.routers.items():
        assert torch.equal(parts.routers[name].counts, r.counts)
    with pytest.raises(ValueError, match="only statistics of one model with the same settings merge"):
        merge(whole, calibrate(tiny("llama"), BATCHES, progress=False))


# --------------------------------------------------------------------------------------------------------- the walk


@pytest.mark.parametrize("name", MODELS)
def test_the_hidden_states_are_the_models_own(name):
    model = MODELS[name]()
    with torch.no_grad():
        ref = [model(input_ids=b, use_cache=False, output_hidden_states=True).hidden_states for b in BATCHES]
    names = []
    for i, item in enumerate(walk(model, BATCHES, want=(), progress=False)):
        names.append(item.name)
        if item.name != "head":
            for b in range(len(BATCHES)):
                torch.testing.assert_close(item.inputs[b], ref[b][i])
                if i == 0:
                    torch.testing.assert_close(item.outputs[b], ref[b][1])
            torch.testing.assert_close(item.run(), item.outputs)
            some = item.forward(item.inputs[1][[2, 0]], 1, rows=[2, 0])
            torch.testing.assert_close(some, item.outputs[1][[2, 0]], rtol=1e-4, atol=1e-5)
        elif name not in ("gpt2", "opt"):
            torch.testing.assert_close(model.model.norm(item.inputs[0]), ref[0][-1])
    assert names == [n for n, _ in decoder_blocks(model)] + ["head"] and len(names) == 3


def test_eager_masks_are_recorded_too():
    model = tiny("gpt_oss")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ref = model(input_ids=BATCHES[0], use_cache=False, output_hidden_states=True).hidden_states
    _, second, head = ([x.clone() for x in i.inputs] for i in walk(model, BATCHES[:1] * 2, want=(), progress=False))
    torch.testing.assert_close(second[1], ref[1])
    torch.testing.assert_close(model.model.norm(head[1]), ref[2])


def test_writing_a_block_leaves_nothing_behind(tmp_path, monkeypatch):
    model, held = tiny("deepseek_v3"), []
    from edgelab import blocks

    plain = blocks._write

    def write(file, item, key):
        assert [r for r in held if r() is not None] == []
        plain(file, item, key)
        held.extend(weakref.ref(s.xx) for s in item.stats.values() if not is_shared(s.xx))

    monkeypatch.setattr(blocks, "_write", write)
    gc.collect()
    gc.disable()  # a cycle of references would live until the collector comes round
    try:
        calibrate(model, BATCHES, store=tmp_path, progress=False)
    finally:
        gc.enable()
    assert len(held) > 10


def test_only_one_blocks_statistics_are_alive():
    model = tiny("deepseek_v3")
    before: list[weakref.ref] = []
    seen = 0
    gc.collect()
    gc.disable()
    try:
        for item in walk(model, BATCHES, want=("xx",), progress=False):
            assert [r for r in before if r() is not None] == []
            own = {id(s.xx): s.xx for s in item.stats.values()}
            assert own
            before += [weakref.ref(t) for t in own.values()]
            del own
            seen += 1
    finally:
        gc.enable()
    assert seen == 3


def test_an_item_that_the_walk_has_left_says_so():
    first, *_ = list(walk(tiny("llama"), BATCHES, progress=False))
    with pytest.raises(RuntimeError, match=r"the walk has left model.layers.0: keep its stats"):
        _ = first.stats


@pytest.mark.parametrize("sequential", [True, False])
def test_the_next_block_stands_behind_the_changed_one(sequential):
    model = tiny("deepseek_v3")
    original = copy.deepcopy(model)
    swapper = Swapper(model, weights(model))
    scheme = QuantScheme.parse("int4-g32")
    outputs, twins = {}, {}
    for item in walk(model, BATCHES, sequential=sequential, twin=True, progress=False):
        if item.name == "head":
            outputs[item.name], twins[item.name] = item.inputs[0].clone(), item.fp_inputs[0].clone()
            continue
        outputs[item.name], twins[item.name] = item.inputs[0].clone(), item.fp_inputs[0].clone()
        mine = [w for w in weights(model) if w.name in item.stats and w.shape[-1] % 32 == 0]
        for module in {w.module_name for w in mine}:
            swapper.put({w.name: round_to_nearest(w.tensor, scheme) for w in mine if w.module_name == module})
        changed = item.run()[0]
        assert not torch.allclose(changed, item.outputs[0], atol=1e-4)
    swapper.finish()

    def hidden(m):
        with torch.no_grad():
            return m(input_ids=BATCHES[0], use_cache=False, output_hidden_states=True).hidden_states[1]

    torch.testing.assert_close(twins["model.layers.1"], hidden(original))
    torch.testing.assert_close(outputs["model.layers.1"], hidden(model if sequential else original))
    with torch.no_grad():
        torch.testing.assert_close(original.model.norm(twins["head"]), original.model(BATCHES[0]).last_hidden_state)


def test_quantized_layers_need_no_statistics():
    model = tiny("llama")
    swapper = Swapper(model, weights(model))
    (q,) = [w for w in weights(model) if w.name == "model.layers.0.mlp.up_proj"]
    swapper.put({q.name: round_to_nearest(q.tensor, QuantScheme.parse("int8-row"))})
    assert q.name not in calibrate(model, BATCHES, progress=False)


def test_gradients_flow_through_a_block():
    model = tiny("llama").requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    item = next(walk(model, BATCHES, progress=False))
    assert torch.is_grad_enabled()
    (item.forward(item.inputs[0]) - item.outputs[0] + 1).square().sum().backward()
    assert weight.grad.abs().max() > 0 and not item.outputs[0].requires_grad


# --------------------------------------------------------------------------------------------- models without blocks


class Step(nn.Module):
    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.w, self.tuples = nn.Linear(8, 8), tuples

    def forward(self, x, extra=None):
        x = x + torch.tanh(self.w(x)) + (0 if extra is None else extra)
        return (x, None) if self.tuples else x


class Toy(nn.Module):
    """A model of blocks that is no transformers model. `side`: the second block reads what the first one saw."""

    def __init__(self, tuples: bool = False, side: bool = False, chain: bool = True) -> None:
        super().__init__()
        self.embed, self.side, self.tuples = nn.Embedding(32, 8), side, tuples
        steps = [Step(tuples) for _ in range(3)]
        self.layers = nn.ModuleList(steps) if chain else nn.ModuleDict({str(i): s for i, s in enumerate(steps)})
        self.out = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            out = layer(x, extra=x.mean() * 50 if self.side else None)
            x = out[0] if self.tuples else out
        return self.out(x)


@pytest.mark.parametrize("settings", [{}, {"tuples": True}, {"chain": False}, {"side": True}])
def test_plain_modules(settings):
    torch.manual_seed(1)
    model = Toy(**settings).train()
    batches = [torch.arange(24).reshape(2, 12)]
    rows: dict[str, torch.Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, n=n: rows.update({n: a[0]})) for n, m in model.named_modules() if type(m) is nn.Linear
    ]
    model(batches[0])
    for handle in handles:
        handle.remove()
    if settings.get("side"):
        with pytest.raises(RuntimeError, match=r"differ from the model by .* pass blocks=False"):
            calibrate(model, batches, progress=False)
    comp = calibrate(model, batches, blocks=not settings.get("side"), progress=False)
    assert len(comp) == 4 and model.training and all(m.training for m in model.modules())
    for name, x in rows.items():
        check(comp[name], x.detach().reshape(-1, 8).double())
    if not settings.get("chain", True):
        (item,) = (i.name for i in walk(model, batches, progress=False))
        assert item == "model" and decoder_blocks(model) == []


# ------------------------------------------------------------------------------------------------------ what fails


def test_a_dead_expert_has_no_statistics_and_is_reported():
    model = tiny("deepseek_v3")
    (router,) = routers(model).values()
    router.e_score_correction_bias[2] = -1e6
    comp = calibrate(model, BATCHES, progress=False)
    (row,) = comp.report()
    assert row.dead == (2,) and 2 in row.rare and "1 dead" in repr(comp)
    for part in ("gate_up_proj", "down_proj"):
        stats = comp[f"model.layers.1.mlp.experts.{part}"]
        assert rare(stats).dead == (2,) and not stats.xx[2].any() and stats.xx[1].any()
        fixed = shrink(stats)
        assert torch.linalg.eigvalsh(fixed.xx[2].double()).max() > 0
        assert fixed.count[2] == stats.in_features


def test_nan_names_block_weight_and_batch():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model.layers.1.self_attn.o_proj, batch 0 of block model.layers.1: .* NaN or infinite"):
        calibrate(model, BATCHES, progress=False)
    model = tiny("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"experts.down_proj, batch \d of block model.layers.1 \(expert 3\): "):
        calibrate(model, BATCHES, progress=False)
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the output of block model.layers.0 holds 40 NaN .* in batch 0"):
        calibrate(model, BATCHES, progress=False)
    model = tiny("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")  # in the second batch only
    assert not (BATCHES[0] == 77).any()
    with pytest.raises(FloatingPointError, match=r"what comes before the first block .* in batch 1"):
        calibrate(model, BATCHES, progress=False)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([torch.ones(4, dtype=torch.int64)], r"batches\[0\] is torch.int64 \(4,\)"),
        ([torch.ones(2, 4)], r"batches\[0\] is torch.float32 \(2, 4\)"),
        ([BATCHES[0], torch.full((1, 4), 96)], r"batches\[1\] holds the ids 96 .. 96, but the model's embedding has 96 rows"),
        (["some text"], r"batches\[0\] is str"),
    ],
)
def test_batches_that_are_none(batches, message):
    with pytest.raises(ValueError, match=message):
        walk(tiny("llama"), batches)  # at the call, not at the first step
    with pytest.raises(ValueError, match="want='xx' must be a list"):
        walk(tiny("llama"), BATCHES, want="xx")


# ------------------------------------------------------------------------------------------------------- the store


def same(a, b) -> bool:
    parts = all(torch.equal(getattr(a, p), getattr(b, p)) for p in ("count", "absmax", "sum_abs", "sum_sq", "xx"))
    mass = (a.gate_mass is None) == (b.gate_mass is None) and (a.gate_mass is None or torch.equal(a.gate_mass, b.gate_mass))
    histogram = np.array_equal(a.histogram.counts, b.histogram.counts) and a.histogram[1:] == b.histogram[1:]
    pooled = (a.pooled is None) == (b.pooled is None) and (a.pooled is None or same(a.pooled, b.pooled))
    return parts and mass and histogram and pooled


@pytest.mark.parametrize("all_tokens", [False, True])
def test_the_store_gives_back_what_was_computed(tmp_path, all_tokens):
    model = tiny("deepseek_v3")
    ref = calibrate(model, BATCHES, all_tokens=all_tokens, progress=False)
    comp = calibrate(model, BATCHES, all_tokens=all_tokens, store=tmp_path, progress=False)
    assert list(comp) == list(ref) and all(same(comp[n], ref[n]) for n in ref)
    assert comp.report() == ref.report() and comp.tokens == ref.tokens
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000-model.layers.0.safetensors", "00001-model.layers.1.safetensors", "00002-head.safetensors",
    ]  # fmt: skip
    with pytest.raises(KeyError, match=r"'model\.x' was not calibrated"):
        _ = comp["model.x"]


def test_the_store_resumes_and_knows_its_own(tmp_path, monkeypatch):
    model = tiny("deepseek_v3")
    ref = calibrate(model, BATCHES, progress=False)
    files = [tmp_path / n for n in ("00000-model.layers.0.safetensors", "00001-model.layers.1.safetensors", "00002-head.safetensors")]
    from edgelab import blocks

    written = []
    plain = blocks._write

    def write(file, item, key):
        if len(written) == kill_after:
            raise KeyboardInterrupt
        plain(file, item, key)
        written.append(item.name)

    monkeypatch.setattr(blocks, "_write", write)
    kill_after = 1
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, BATCHES, store=tmp_path, progress=False)
    assert written == ["model.layers.0"] and [f.exists() for f in files] == [True, False, False]
    (tmp_path / ".unfinished-x.safetensors").write_bytes(b"half")
    kill_after = 99
    comp = calibrate(model, BATCHES, store=tmp_path, progress=False)
    assert written == ["model.layers.0", "model.layers.1", "head"] and all(same(comp[n], ref[n]) for n in ref)
    assert not list(tmp_path.glob(".unfinished-*"))

    monkeypatch.setattr(blocks, "walk", None)  # all is there: nothing is run
    assert calibrate(model, BATCHES, store=tmp_path, progress=False).report() == ref.report()
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "_write", write)
    files[1].write_bytes(files[1].read_bytes()[:-100])  # damaged: computed again
    written.clear()
    comp = calibrate(model, BATCHES, store=tmp_path, progress=False)
    assert written == ["model.layers.1"] and all(same(comp[n], ref[n]) for n in ref)

    for change in ("tokens", "want", "weights"):
        written.clear()
        batches, want = BATCHES, ("xx", "histogram")
        if change == "tokens":
            batches = [BATCHES[0], BATCHES[1] + 0]
            batches[1][0, 3] = 5
        elif change == "want":
            want = ("histogram",)
        else:
            with torch.no_grad():
                model.model.layers[1].mlp.experts.down_proj[1, 2, 3] *= 1.001
        calibrate(model, batches, want=want, store=tmp_path, progress=False)
        assert len(written) == 3, change


# ------------------------------------------------------------------------------------------------- calibration text


def text(n: int = 40) -> Dataset:
    rows = [("prose", "", PROSE[i % len(PROSE)] + f"Number {i}.\n") for i in range(n)]
    rows += [("arithmetic", f"{i}+{i}=", f"{i}+{i}={2 * i}") for i in range(10, 10 + n)]
    return Dataset.from_dict({"domain": [r[0] for r in rows], "prompt": [r[1] for r in rows], "text": [r[2] for r in rows]})


def test_calibration_rows_are_packed_documents(tokenizer):  # noqa: F811
    end = tokenizer.eos_token_id
    batches = calibration_batches(tokenizer, text(), tokens=10**6, context=32, batch=4)
    assert all(b.dtype == torch.int64 and b.shape[1] == 32 for b in batches) and {b.shape[0] for b in batches[:-1]} == {4}
    rows = torch.cat(batches)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    first = tokenizer.decode(rows[0, 1:].tolist())
    assert any(first.startswith(str(t)[:12]) for t in text()["text"][:40])
    sums = [r for r in rows if "+" in tokenizer.decode(r[1:8].tolist())]
    whole = tokenizer.decode(sums[0].tolist()).split(tokenizer.decode([end]))
    assert sum(s in set(text()["text"]) for s in whole) >= 2  # whole documents between the ends
    # every document once: less than a row is left over, and an end where a row began with one
    parts = [[p, t[len(p) :]] for p, t in zip(text()["prompt"], text()["text"], strict=True)]
    total = sum(1 + sum(map(len, tokenizer(pair, add_special_tokens=False)["input_ids"])) for pair in parts)
    assert 0 <= total - len(rows) * 31 < 31 + len(rows)
    assert not (rows[:, 1] == end).any()


def test_calibration_domains_take_turns_in_an_order_that_the_seed_fixes(tokenizer):  # noqa: F811
    a, b, c = (calibration_batches(tokenizer, text(), tokens=256, context=32, batch=2, seed=s) for s in (0, 0, 1))
    assert [x.shape for x in a] == [(2, 32)] * 4 and all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))
    kinds = ["+" in tokenizer.decode(r.tolist()) for batch in a for r in batch]
    assert kinds == [False, True] * 4
    plain = calibration_batches(tokenizer, Dataset.from_dict({"text": PROSE}), tokens=64, context=16)
    assert plain[0].shape == (4, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 10**6, "tokens": 10**6}, r"the data set holds \d+ tokens in 80 documents, less than one row of context=1000000"),
        ({"tokens": 100}, "tokens=100, context=512, batch=8: needed are"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_too_little_text(tokenizer, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        calibration_batches(tokenizer, text(), **settings)
    with pytest.raises(ValueError, match="give one split"):
        calibration_batches(tokenizer, {"test": text()})
