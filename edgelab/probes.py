"""Probes: models of random weights that our runtime is timed on, to know what a step and a layer cost on this machine.

None has the sizes of an embedded model, so that a prediction of those is one. `host.py` fits the times.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PROMPT, NEW = 16, 64  # tokens of a probe's prompt and answer


@dataclass(frozen=True)
class Probe:
    """A model of random weights that the runtime is timed on. `scheme` None: floats."""

    name: str
    config: Mapping
    scheme: str | None = "int4-g32"
    prompt: int = PROMPT


def _dense(layers: int, hidden: int, inner: int, vocab: int = 1024, heads: int = 4, kind: str = "llama") -> dict:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _sparse(layers: int, hidden: int, inner: int, experts: int = 8, vocab: int = 1024) -> dict:
    return _dense(layers, hidden, 2 * inner, vocab, kind="qwen3_moe") | {
        "num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": inner, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    }  # fmt: skip


def _latent(layers: int, hidden: int, inner: int, dense_layers: int, rank: int = 96, vocab: int = 1024) -> dict:
    return {
        "model_type": "deepseek_v3", "hidden_size": hidden, "intermediate_size": 2 * inner, "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": dense_layers, "kv_lora_rank": rank, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
        "v_head_dim": 32, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "vocab_size": vocab,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip


# sizes that the embedded models do not have (theirs: hidden 256, inner 512 or 640, vocabulary 2048, 4 layers, 16 experts, rank 128)
PROBES = (
    Probe("dense, 2 layers", _dense(2, 192, 512)),
    Probe("dense, 8 layers", _dense(8, 192, 512)),
    Probe("dense, wider", _dense(3, 512, 1536)),
    Probe("dense, wide", _dense(3, 1024, 2816, 4096, 8)),
    Probe("dense, large", _dense(4, 2048, 5632, 4096, 16)),
    Probe("dense, 2 bits", _dense(3, 192, 768), "int2-g32"),
    Probe("dense, 2 bits, wider", _dense(4, 320, 1024), "int2-g64"),
    Probe("dense, 3 bits", _dense(3, 192, 768), "int3-g32"),
    Probe("dense, 3 bits, wider", _dense(4, 384, 1024), "int3-g64"),
    Probe("dense, 8 bits", _dense(3, 192, 768), "int8-g32"),
    Probe("dense, 8 bits, wider", _dense(4, 320, 1024, 3072), "int8-row"),
    Probe("dense, tables", _dense(3, 192, 768), "nf4-g64"),
    Probe("dense, tables, wider", _dense(4, 320, 1024), "fp4-g32"),
    Probe("dense, large vocabulary", _dense(2, 192, 512, 24576)),
    Probe("dense, long context", _dense(6, 192, 512), prompt=512),
    Probe("dense, long context, more heads", _dense(3, 256, 512, heads=8), prompt=768),
    Probe("floats, small", _dense(2, 192, 512), None),
    Probe("floats, wider", _dense(3, 320, 1152), None),
    Probe("floats, wide", _dense(4, 640, 1792, 2048), None),
    Probe("mixture, 2 layers", _sparse(2, 192, 128)),
    Probe("mixture, 8 layers", _sparse(8, 192, 128)),
    Probe("mixture, wider", _sparse(4, 512, 384, 8, 3072)),
    Probe("latent, 2 layers", _latent(2, 192, 128, 2)),
    Probe("latent, 6 layers, dense", _latent(6, 192, 128, 6)),
    Probe("latent, 8 layers", _latent(8, 320, 192, 2, 160, 3072), "int3-g32"),
    Probe("latent, long context", _latent(5, 192, 128, 1), prompt=384),
    Probe("latent, long context, wider", _latent(3, 256, 128, 1, 224), prompt=640),
)  # fmt: skip


def probe_model(probe: Probe, seed: int = 0):
    """The transformers model of a probe, its weights random; nothing was rounded, codes are drawn."""
    import transformers

    from edgelab.startup import random_model

    settings = {k: v for k, v in probe.config.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(probe.config["model_type"], **settings, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return random_model(config, probe.scheme, seed)


def seconds_per_token(runtime, *, prompt: int = PROMPT, new: int = NEW, seconds: float = 0.3, seed: int = 0) -> tuple[float, float]:
    """(seconds per decoded token of an open runtime, mean context).

    The median over the tokens of an answer, and the least of these medians over the answers that fit into `seconds`, four at least: other
    work on the machine interrupts some tokens and slows some answers.
    """
    ids = np.random.default_rng(seed).integers(1, runtime.vocabulary, prompt).tolist()
    best, stop, runs = np.inf, time.perf_counter() + seconds, 0
    while runs < 4 or time.perf_counter() < stop:
        times = [time.perf_counter() for _ in runtime.stream(ids, new, stop=[])]
        if runs:  # the first one meets cold caches
            best = min(best, float(np.median(np.diff(times))))
        runs += 1
    return best, prompt + new / 2
