"""Statistics of experts against a loop over tokens, in every family; merged, written down, by domain."""

import json
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from test_model import CONFIGS, tiny

from edgelab.evaluate import routers
from edgelab.expert_stats import ExpertStats, by_domain, expert_stats, heatmap
from edgelab.model import FAMILIES
from edgelab.recipe import Route
from edgelab.routing import route

SPARSE = [f for f in CONFIGS if FAMILIES[f].experts]
BATCHES = [torch.arange(40).reshape(2, 20) % 96, torch.arange(33).reshape(3, 11) % 96 + 7]


@torch.no_grad()
def expert(module, family, x, e):
    """f_e(x) for one token x [hidden], from the families' formulas."""
    first, second = module.gate_up_proj[e], module.down_proj[e]
    if family == "gpt_oss":
        y = x @ first + module.gate_up_proj_bias[e]
        gate, up = y[::2].clamp(max=module.limit), y[1::2].clamp(-module.limit, module.limit)
        return ((up + 1) * gate * torch.sigmoid(gate * module.alpha)) @ second + module.down_proj_bias[e]
    y = first @ x
    half = len(y) // 2
    return second @ (module.act_fn(y[:half]) * y[half:])


@torch.no_grad()
def naive(model, family, batches):
    """{router: figures}, a token at a time: each router is asked again for what its layer was called with."""
    seen = {}
    handles = [
        r.register_forward_pre_hook(lambda _m, args, n=n: seen.setdefault(n, []).append(args[0].reshape(-1, 32)))
        for n, r in routers(model).items()
    ]
    for ids in batches:
        model(ids)
    for h in handles:
        h.remove()
    found = {}
    for name, parts in seen.items():
        router, module = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]).experts
        x = torch.cat(parts)
        logits, gates, index = router(x)
        figures = {k: np.zeros(4) for k in ("counts", "gate_mass", "norm_sum", "reap_sum", "logit_sum")}
        figures |= {"tokens": len(x), "together": np.zeros((4, 4)), "output_sum": np.zeros((4, 32)), "logit_square": np.zeros((4, 4))}
        for t in range(len(x)):
            outputs = [expert(module, family, x[t], e).double().numpy() for e in range(4)]
            z = logits[t].double().numpy()
            figures["logit_sum"] += z
            figures["logit_square"] += np.outer(z, z)
            figures["output_sum"] += outputs
            for e, g in zip(index[t].tolist(), gates[t].tolist(), strict=True):
                size = np.sqrt((outputs[e] ** 2).sum())
                figures["counts"][e] += 1
                figures["gate_mass"][e] += g
                figures["norm_sum"][e] += size
                figures["reap_sum"][e] += g * size
                for f in index[t].tolist():
                    figures["together"][e, f] += 1
        found[name] = figures
    return found


@pytest.mark.parametrize("family", SPARSE)
def test_against_a_loop_over_tokens(family):
    model = tiny(family)
    want, got = naive(model, family, BATCHES), expert_stats(model, BATCHES, progress=False)
    assert list(got) == list(routers(model))
    for name, stats in got.items():
        assert stats.tokens == 73 and int(stats.counts.sum()) == 146
        for f in fields(stats):
            np.testing.assert_allclose(np.asarray(getattr(stats, f.name)), want[name][f.name], rtol=1e-4, atol=1e-4, err_msg=f.name)
        np.testing.assert_allclose(stats.reap, want[name]["reap_sum"] / np.maximum(want[name]["counts"], 1), rtol=1e-4)
        torch.testing.assert_close(stats.frequency.sum(), torch.tensor(2.0, dtype=torch.float64))


def test_without_all_tokens_only_the_outputs_are_missing():
    model = tiny("deepseek_v3")
    for a, b in zip(*(expert_stats(model, BATCHES, all_tokens=t, progress=False).values() for t in (True, False)), strict=True):
        assert not b.output_sum.any() and a.output_sum.any()
        torch.testing.assert_close(a.reap, b.reap, rtol=1e-5, atol=1e-7)


def test_likeness_is_the_correlation_of_logits():
    model, seen = tiny("qwen3_moe"), []
    (router,) = routers(model).values()
    handle = router.register_forward_hook(lambda _m, _a, output: seen.append(output[0].detach().double().numpy()))
    (stats,) = expert_stats(model, BATCHES, progress=False).values()
    handle.remove()
    np.testing.assert_allclose(stats.likeness, np.corrcoef(np.concatenate(seen).T), atol=1e-8)


def test_two_texts_add_up_and_json_brings_them_back():
    model = tiny("mixtral")
    whole = expert_stats(model, BATCHES, progress=False)
    first, second = (expert_stats(model, [b], progress=False) for b in BATCHES)
    for name, stats in whole.items():
        again = ExpertStats.from_dict(json.loads(json.dumps(first[name].merge(second[name]).to_dict())))
        for f in fields(stats):
            a, b = torch.as_tensor(getattr(stats, f.name)), torch.as_tensor(getattr(again, f.name))
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert "16 experts" not in repr(stats) and "4 experts" in stats._repr_html_() and "73 tokens" in repr(stats)
    with pytest.raises(ValueError, match="has the keys tokens, counts"):
        ExpertStats.from_dict({"tokens": 3})


def test_skipped_choices_are_none():
    """With skip = 1 only the best gate stays: each token counts for one expert."""
    model = tiny("qwen3_moe")
    route(model, Route(skip=1.0))
    (stats,) = expert_stats(model, BATCHES, progress=False).values()
    assert int(stats.counts.sum()) == 73
    assert torch.equal(stats.together, torch.diag(stats.counts))


def test_by_domain_and_heatmap():
    class Letters:
        bos_token_id = eos_token_id = 0

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(c) % 90 + 2 for c in t] for t in texts]}

    rows = [{"text": letter * 60, "domain": domain} for letter, domain in (("a", "vowels"), ("e", "vowels"), ("b", "rest"))]
    data, model = datasets.Dataset.from_list(rows), tiny("deepseek_v3")
    found = by_domain(model, Letters(), data, tokens=40, context=20, progress=False)
    assert list(found) == ["vowels", "rest"]
    assert heatmap(found["rest"], "counts").shape == (1, 4)
    assert heatmap(found["rest"], "counts").sum() == 2 * 40
    assert not np.array_equal(heatmap(found["rest"]), heatmap(found["vowels"]))
    with pytest.raises(ValueError, match="no column 'domain'"):
        by_domain(model, Letters(), data.remove_columns("domain"))


def test_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        expert_stats(tiny("llama"), BATCHES)
    with pytest.raises(ValueError, match="batches is empty"):
        expert_stats(tiny("mixtral"), [])
    a, b = (next(iter(expert_stats(tiny("mixtral"), BATCHES, progress=False).values())) for _ in range(2))
    small = ExpertStats(**{f.name: v[:3] if isinstance(v := getattr(b, f.name), torch.Tensor) else v for f in fields(b)})
    with pytest.raises(ValueError, match="of 4 and of 3 experts"):
        a.merge(small)
    broken = tiny("mixtral")
    next(p for n, p in broken.named_parameters() if n.endswith("experts.down_proj")).data[1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"mlp.gate: router logits or outputs"):
        expert_stats(broken, BATCHES, progress=False)
