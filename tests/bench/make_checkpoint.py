"""A random Qwen3-MoE checkpoint of any size, as the hub would hold it: bfloat16 shards, one tensor per expert and projection.

    python tests/bench/make_checkpoint.py OUT --billions 7     # 14 GB in shards of 1.5 GB, in less memory than one tensor more
    python tests/bench/make_checkpoint.py OUT --tiny           # 2 layers, 8 experts, 1 MB

Weights are normal numbers with a standard deviation per tensor, cut from one random block at random places: nobody learns from
them, but scales and codes differ from group to group as those of a real model do.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

BLOCK = 1 << 23  # random numbers that are made once
LARGE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_attention_heads": 32,
    "head_dim": 128,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 8, "num_attention_heads": 4, "head_dim": 16}


def shapes(config) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors, in the order of the layers."""
    hidden, inner, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "mlp.gate": (config.num_experts, hidden)}
        layer |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,), "self_attn.o_proj": (hidden, heads)}
        layer |= {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        for e in range(config.num_experts):
            layer |= {f"mlp.experts.{e}.{p}_proj": (inner, hidden) for p in ("gate", "up")}
            layer |= {f"mlp.experts.{e}.down_proj": (hidden, inner)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def make(out: Path, billions: float | None = None, shard_bytes: int = 1500 * 10**6, seed: int = 0, layers: int = 2) -> int:
    """The number of parameters of the checkpoint written to `out`: about `billions` of them, or a tiny one of `layers` layers."""
    import transformers

    sizes = dict(TINY if billions is None else LARGE)
    config = transformers.Qwen3MoeConfig(
        **sizes, num_key_value_heads=4, num_experts_per_tok=2 if billions is None else 8, num_hidden_layers=layers, decoder_sparse_step=1,
        intermediate_size=4 * sizes["hidden_size"], max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"], bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    if billions is not None:
        config.num_hidden_layers = 1
        one = count(shapes(config))
        config.num_hidden_layers = 2
        each = count(shapes(config)) - one
        config.num_hidden_layers = max(1, round((billions * 1e9 - one) / each) + 1)
    config.layer_types = None
    out.mkdir(parents=True)
    type(config)(**config.to_dict()).save_pretrained(out)
    tensors = shapes(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * count(shards[-1]) + 2 * count({name: shape}) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    torch.manual_seed(seed)
    block = torch.randn(BLOCK).bfloat16()
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        write(out / file, shard, block)
    total = 2 * count(tensors)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return count(tensors)


def count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in tensors.values())


def write(file: Path, tensors: dict[str, tuple[int, ...]], block: torch.Tensor) -> None:
    """A safetensors file of random tensors, written as they are made."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for part in values(name, torch.Size(shape).numel(), block):
                f.write(part.view(torch.uint8).numpy())


def values(name: str, n: int, block: torch.Tensor) -> Iterator[torch.Tensor]:
    """`n` numbers for the tensor `name`, in parts: 1 for a norm, else normal with a standard deviation of its own."""
    if "norm" in name:
        yield torch.ones(n).bfloat16()
        return
    spread = 0.02 * float(2 ** torch.randn(()).mul(0.5))
    while n > 0:
        start = int(torch.randint(0, len(block) // 2, ()))
        part = block[start : start + min(n, len(block) // 2)] * spread
        n -= len(part)
        yield part


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--billions", type=float, default=7.0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    print(f"{make(given.out, None if given.tiny else given.billions):,} parameters in {given.out}")
