"""Top-2 of 16 experts against all 16: arithmetic per token and decoding, in float32 and in packed int4. `make bench ARGS="-k routing"`.

The articles claim 62 % fewer operations and 2.3 times the speed for active experts alone. Each number is printed beside ours:
operations by `routing.flops_per_token` (weights; attention over the context left out), and the time of a decoding step of the whole
model, batch 1, with a key-value cache. Both routings and both kinds of weights take turns in one process, and each turn decodes the
same tokens after the same prompt; a ratio is the median over turns of the ratio within a turn. By hand:

    python tests/bench/bench_routing.py --turns 15

Speed stays behind operations as far as a step is bound by what routing leaves alone: attention, the head, and what Python and torch spend
per call. The random "wide" model, whose experts are most of the weights, shows what is left of that.
"""

import argparse
import copy
import statistics
import time

import pytest
import torch
import transformers

from edgelab import Quantize, QuantScheme, Recipe
from edgelab.compress import compress
from edgelab.model import load
from edgelab.paths import data_dir
from edgelab.recipe import Route
from edgelab.routing import flops_per_token, route

ARTICLES = {"fewer": 0.62, "faster": 2.3}
FEW, ALL = 2, 16
PROMPT, DECODE = 16, 16  # tokens
KINDS = ("float32", "int4")


def embedded() -> torch.nn.Module:
    return load(data_dir() / "edge-moe")


def wide() -> torch.nn.Module:
    """A random DeepSeek-V3 of which the 16 experts are nine tenths of the 85 million weights: 340 MB in float32."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, n_routed_experts=16, num_experts_per_tok=FEW, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
        num_nextn_predict_layers=0, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.02)
    return model


MODELS = {"embedded": embedded, "wide": wide}


def contenders(model: torch.nn.Module) -> dict[tuple[str, int], torch.nn.Module]:
    """{(kind of weights, experts per token): model}; `model` itself is one of them."""
    int4 = QuantScheme.parse("int4-g32")
    rules = tuple((f"@{role}", int4) for role in ("experts", "shared", "mlp", "attention", "head"))
    packed = compress(model, Recipe((Quantize(rules),)), progress=False).model
    found = {}
    for kind, source in zip(KINDS, (model, packed), strict=True):
        for k in (FEW, ALL):
            found[kind, k] = twin = copy.deepcopy(source)
            route(twin, Route(top_k=k))
    return found


def decode(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds per token of ids int64 [1, PROMPT + DECODE], the prompt read before the clock starts."""
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
        begin = time.perf_counter()
        for i in range(PROMPT, PROMPT + DECODE):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        return (time.perf_counter() - begin) / DECODE


def in_turn(models: dict, turns: int) -> dict[tuple[str, int], list[float]]:
    """{contender: seconds per token of each turn}, after a turn that warms up; every other turn goes backwards."""
    random = torch.Generator().manual_seed(0)
    found = {key: [] for key in models}
    for turn in range(turns + 1):
        ids = torch.randint(2048, (1, PROMPT + DECODE), generator=random)
        for key in list(models) if turn % 2 else list(models)[::-1]:
            took = decode(models[key], ids)
            if turn:
                found[key].append(took)
    return found


def report(name: str, turns: int) -> dict[str, float]:
    """Prints the lines of one model; returns {"fewer": share of operations saved, kind: times faster}."""
    models = contenders(MODELS[name]())
    times = in_turn(models, turns)
    few, most = (flops_per_token(models["float32", k]) for k in (FEW, ALL))
    result = {"fewer": 1 - few["all"] / most["all"]}
    print(
        f"\n{name}: {few['all'] / 1e6:.2f} against {most['all'] / 1e6:.2f} million operations per token, {result['fewer']:.0%} fewer"
        f" (experts alone {1 - few['experts'] / most['experts']:.0%}; articles {ARTICLES['fewer']:.0%});"
        f" at most {most['all'] / few['all']:.2f} times faster by operations alone"
    )
    for kind in KINDS:
        ours, theirs = times[kind, FEW], times[kind, ALL]
        result[kind] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(
            f"  {kind:8} top-{FEW} {statistics.median(ours) * 1e3:7.2f} ms per token, all {ALL} {statistics.median(theirs) * 1e3:7.2f} ms:"
            f" {result[kind]:.2f} times faster (articles {ARTICLES['faster']})"
        )
    return result


@pytest.mark.parametrize("name", MODELS)
def bench_routing(benchmark, name):
    found = benchmark.pedantic(report, args=(name, 7), rounds=1, iterations=1)
    benchmark.extra_info.update(found | {"articles": ARTICLES})
    assert found["fewer"] > 0.5  # times are for reading: the embedded model in int4 hardly gains


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch (the kernels take OMP_NUM_THREADS' or all)")
    parser.add_argument("names", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for chosen in given.names:
        report(chosen, given.turns)
