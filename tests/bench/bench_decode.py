"""Generation against llama.cpp (same codes, as Q4_0) and transformers in bfloat16: `make bench ARGS="-k decode"`.

Two models of random weights, int4-g32 throughout: `dense` has the shape of Qwen2.5-0.5B with a vocabulary of 32,768 (387 M weights,
218 MB), `moe` is a Qwen3-MoE of 881 M weights of which some 280 M are used per token. They are made once and kept in `runs/bench/decode`
(1.4 GB with the GGUF files). llama.cpp runs where `llama-cpp-python` is installed (extra `gguf`), its own threads set to ours.

All take turns in one process; medians and the ratio of medians. By hand, with a table for each number of threads:

    python tests/bench/bench_decode.py --model dense moe --threads 1 2 --turns 5
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "bench" / "decode"
PROMPT, BEFORE, NEW = 512, 16, 48  # tokens of the prompt that is timed; before decoding; decoded


def config(name: str):
    from transformers import Qwen2Config, Qwen3MoeConfig

    both = {"vocab_size": 32768, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    if name == "dense":
        return Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, **both
        )
    return Qwen3MoeConfig(
        hidden_size=1024, intermediate_size=3072, moe_intermediate_size=512, num_hidden_layers=16, num_attention_heads=16, head_dim=64,
        num_key_value_heads=4, num_experts=32, num_experts_per_tok=8, decoder_sparse_step=1, norm_topk_prob=True, **both,
    )  # fmt: skip


def original(name: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(name)).eval()


def prepare(name: str) -> Path:
    """The folder of the bundle, beside it NAME.gguf; made where they are missing."""
    from edgelab import Recipe, compress, save_bundle
    from edgelab.export import gguf

    bundle = FOLDER / name
    if not (bundle / "edgelab.json").is_file():
        small = compress(original(name).float(), Recipe.uniform("int4-g32"))
        save_bundle(small.model, None, bundle, recipe=small.recipe, coverage=small.coverage)
    if not (file := FOLDER / f"{name}.gguf").is_file():
        gguf.export(bundle, file, tokenizer=False, check=False)
    return bundle


class Ours:
    def __init__(self, name: str, threads: int) -> None:
        from edgelab.runtime import Runtime

        self.rt = Runtime.open(prepare(name), threads=threads, context=1024)

    def prefill(self, ids: list[int]) -> None:
        self.rt.release(0)
        self.last = self.rt.admit(0, ids)

    def step(self) -> None:
        self.last = self.rt.step((0,), (int(self.last.argmax()),))[0]


class LlamaCpp:
    def __init__(self, name: str, threads: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        settings = {"n_ctx": 1024, "n_batch": PROMPT, "n_ubatch": PROMPT, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(str(FOLDER / f"{name}.gguf"), verbose=False, **settings)

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def step(self) -> None:
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.model._ctx.ctx, -1), (self.model.n_vocab(),))
        self.model.eval([int(logits.argmax())])


class Transformers:
    """bfloat16, the same shape; its weights are the originals, whose values do not change the time."""

    def __init__(self, name: str, threads: int) -> None:
        import torch

        self.torch, self.threads = torch, threads
        self.model = original(name).to(torch.bfloat16)

    def prefill(self, ids: list[int]) -> None:
        self.torch.set_num_threads(self.threads)
        with self.torch.inference_mode():
            self.out = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def step(self) -> None:
        with self.torch.inference_mode():
            token = self.out.logits[:, -1].argmax(-1, keepdim=True)
            self.out = self.model(token, past_key_values=self.out.past_key_values, use_cache=True)


CONTENDERS = {"edgelab": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def turn(contender, new: int) -> tuple[float, float]:
    """Tokens per second of a prompt and of decoding."""
    ids = np.random.default_rng(0).integers(3, 32000, PROMPT).tolist()
    start = time.perf_counter()
    contender.prefill(ids)
    prefill_s = time.perf_counter() - start
    contender.prefill(ids[:BEFORE])
    contender.step()
    start = time.perf_counter()
    for _ in range(new):
        contender.step()
    return PROMPT / prefill_s, new / (time.perf_counter() - start)


def measure(name: str, threads: int, turns: int, peers: list[str]) -> dict[str, tuple[float, float]]:
    """{contender: medians of (prompt, decoding) tokens per second}, in turn after a turn that is not counted."""
    prepare(name)
    found: dict[str, list[tuple[float, float]]] = {}
    contenders = {peer: CONTENDERS[peer](name, threads) for peer in ("edgelab", *peers)}
    for i in range(turns + 1):
        for peer, contender in contenders.items():
            result = turn(contender, NEW if peer != "transformers" else 12)
            if i:
                found.setdefault(peer, []).append(result)
    return {peer: tuple(statistics.median(r[j] for r in rows) for j in (0, 1)) for peer, rows in found.items()}


def lines(name: str, threads: int, found: dict[str, tuple[float, float]]) -> list[str]:
    ours = found["edgelab"]
    return [
        f"{name:6} {threads} thread{'s' if threads > 1 else ' '} {peer:13} prompt {p:8.1f} tokens/s ({ours[0] / p:5.2f}x)   "
        f"decode {d:7.1f} tokens/s ({ours[1] / d:5.2f}x)"
        for peer, (p, d) in found.items()
    ]


def installed() -> list[str]:
    from importlib.util import find_spec

    return [*(["llama.cpp"] if find_spec("llama_cpp") else []), "transformers"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["dense", "moe"])
def bench_decode(benchmark, name, threads):
    """One round of decoding under the benchmark; the table of all contenders is printed, its ratios kept."""
    found = measure(name, threads, 3, installed())
    print("\n" + "\n".join(lines(name, threads, found)))
    ours = found["edgelab"]
    benchmark.extra_info.update(
        {f"{what} against {peer}": ours[j] / r[j] for peer, r in found.items() for j, what in enumerate(("prompt", "decode"))}
    )
    contender = Ours(name, threads)
    contender.prefill(list(range(3, 19)))
    benchmark.pedantic(contender.step, rounds=30, warmup_rounds=3)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", nargs="+", default=["dense", "moe"], choices=["dense", "moe"])
    arguments.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--peers", nargs="*", default=None)
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    results = {}
    for model in asked.model:
        for count in asked.threads:
            rates = measure(model, count, asked.turns, installed() if asked.peers is None else asked.peers)
            print("\n".join(lines(model, count, rates)), flush=True)
            results[f"{model} {count}"] = rates
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))
