"""What a model reads, keeps and computes for a token, as numbers: the model's half of the roofline (`device.py` is the other).

Decoding reads every weight that takes part once per token, so bytes decide. Of a model with L layers, vocabulary V and hidden
size d, a token reads

    norms, attention, dense MLPs, routers, shared experts, the head  (`dense_bytes`)
    top_k experts of each mixture layer                              (`moe_layers * top_k * expert_bytes`)
    one row of the embedding                                         (`embedding_bytes / V`, of a table that is only looked up)
    the keys and values of all tokens so far                         (`layers * kv_bytes_per_token_layer * context`)

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) caches one compressed vector and one rotary key for
all heads, kv_lora_rank + qk_rope_head_dim numbers per token and layer. A runtime that decompresses first caches
heads * (qk_nope + qk_rope + v) numbers; `compressed=False` counts those.

A tied head reads the whole embedding, which is then no table that is only looked up. The files of a folder are read by their
headers alone, so that a checkpoint of many gigabytes takes milliseconds and no torch.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from edgelab.scheme import QuantScheme

FLOAT_BITS = 16  # of what a scheme leaves alone: norms, routers, and the cache of keys and values
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "qwen3_moe", "mixtral", "deepseek_v3")
_SAFETENSORS_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
_HEADER_LIMIT = 100 << 20  # bytes; safetensors itself refuses more


@dataclass(frozen=True)
class ModelShape:
    """Bytes, operations and sizes of one model at one number of bits. Bytes are those in memory.

    `dense_bytes`: read for every token, the head with them. `embedding_bytes`: in memory, one row read per token; 0 where the head
    is the embedding. `expert_bytes`: of one expert of one layer; 0 without experts. `dense_weights`, `expert_weights`: the
    numbers of weights that multiply something, two operations each. `attention_ops`: operations per token and position of the context,
    all layers. `inner`: the widest activation of a layer. `max_context`: tokens that the model was made for, 0 where nothing says.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    vocab: int
    dense_bytes: float
    embedding_bytes: float
    dense_weights: int
    kv_bytes_per_token_layer: float
    attention_ops: float
    moe_layers: int = 0
    experts: int = 0
    top_k: int = 0
    expert_bytes: float = 0.0
    expert_weights: int = 0
    embedding_weights: int = 0
    source: str = ""
    max_context: int = 0

    def __post_init__(self) -> None:
        if self.layers < 1 or self.dense_bytes <= 0:
            raise ValueError(f"layers={self.layers}, dense_bytes={self.dense_bytes}: a model has at least one layer and one weight")
        if self.moe_layers and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be 1 .. experts={self.experts}")
        if not 0 <= self.moe_layers <= self.layers:
            raise ValueError(f"moe_layers={self.moe_layers} must be 0 .. layers={self.layers}")

    @property
    def weight_bytes(self) -> float:
        """All weights, every expert counted: what flash holds and what a model that fits has in memory."""
        return self.dense_bytes + self.embedding_bytes + self.moe_layers * self.experts * self.expert_bytes

    @property
    def parameters(self) -> int:
        return self.dense_weights + self.embedding_weights + self.moe_layers * self.experts * self.expert_weights

    @property
    def active_expert_bytes(self) -> float:
        """Bytes of the experts that one token takes, all layers."""
        return self.moe_layers * self.top_k * self.expert_bytes

    @property
    def active_weights(self) -> int:
        return self.dense_weights + self.moe_layers * self.top_k * self.expert_weights

    def kv_bytes(self, context: int) -> float:
        """Bytes of the keys and values of `context` tokens."""
        return self.layers * self.kv_bytes_per_token_layer * context

    def decode_bytes(self, context: int) -> float:
        """Bytes read for one token when `context` tokens are in the cache."""
        return self.dense_bytes + self.embedding_bytes / max(self.vocab, 1) + self.active_expert_bytes + self.kv_bytes(context)

    def decode_ops(self, context: int) -> float:
        """Operations for one token; a multiplication and an addition are two."""
        return 2.0 * self.active_weights + self.attention_ops * context

    def experts_touched(self, tokens: int) -> float:
        """Expected number of different experts per layer that `tokens` tokens take, if all were equally likely.

        >>> tiny("moe", experts=4, top_k=2).experts_touched(1)
        2.0
        """
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** tokens) if self.experts else 0.0

    def activation_bytes(self, chunk: int) -> float:
        """Working memory for `chunk` tokens at once, in float32: residual stream, a layer's inner values, one row of logits.

        Three vectors of `hidden` (residual, normed, output) and three of `inner` (gate, up, product) live at once.
        """
        return 4.0 * (chunk * (3 * self.hidden + 3 * self.inner) + self.vocab)

    def __repr__(self) -> str:
        moe = f", {self.moe_layers} x {self.experts} experts, {self.top_k} active" if self.moe_layers else ""
        return (
            f"ModelShape({self.name!r}: {self.parameters / 1e6:,.1f} M weights, {self.weight_bytes / 1e6:,.1f} MB{moe}, "
            f"reads {self.decode_bytes(0) / 1e6:,.1f} MB per token + {self.kv_bytes(1) / 1e3:,.2f} kB per token of context)"
        )


def tiny(name: str = "dense", *, experts: int = 0, top_k: int = 0) -> ModelShape:
    """A shape small enough to count by hand, for tests and examples: 2 layers, hidden 8, one byte per weight."""
    return ModelShape(
        name, layers=2, hidden=8, inner=16, vocab=10, dense_bytes=1000, embedding_bytes=80, dense_weights=1000, kv_bytes_per_token_layer=32,
        attention_ops=64, moe_layers=1 if experts else 0, experts=experts, top_k=top_k, expert_bytes=100 if experts else 0,
        expert_weights=100 if experts else 0, embedding_weights=80,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- from a config


def _matrices(c: Mapping, layer: int) -> Iterator[tuple[str, int, int]]:
    """(kind, out, in) of every matrix of layer `layer`; kind "expert" is one expert of it, "router" stays in 16 bits."""
    kind, hidden = c["model_type"], c["hidden_size"]
    heads = c["num_attention_heads"]
    if kind == "deepseek_v3":
        query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if c.get("q_lora_rank"):
            yield "dense", c["q_lora_rank"], hidden
            yield "dense", query, c["q_lora_rank"]
        else:
            yield "dense", query, hidden
        yield "dense", c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden
        yield "dense", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]
        yield "dense", hidden, heads * c["v_head_dim"]
    else:
        size, kv = _head_size(c), c.get("num_key_value_heads") or heads
        for rows in (heads * size, kv * size, kv * size):
            yield "dense", rows, hidden
        yield "dense", hidden, heads * size
    experts, inner, shared = _experts(c, layer)
    if not experts:
        yield from _mlp("dense", c["intermediate_size"], hidden)
        return
    yield "router", experts, hidden
    if shared:
        yield from _mlp("dense", shared * inner, hidden)
    yield from _mlp("expert", inner, hidden)


def _mlp(kind: str, inner: int, hidden: int) -> Iterator[tuple[str, int, int]]:
    yield kind, inner, hidden
    yield kind, inner, hidden
    yield kind, hidden, inner


def _experts(c: Mapping, layer: int) -> tuple[int, int, int]:
    """(experts, their inner size, shared experts) of a layer; 0 experts for a dense one."""
    kind = c["model_type"]
    if kind == "mixtral":
        return c["num_local_experts"], c["intermediate_size"], 0
    if kind == "qwen3_moe":
        sparse = layer not in (c.get("mlp_only_layers") or ()) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
        experts = c["num_local_experts"] if "num_local_experts" in c else c["num_experts"]  # transformers 5 writes the first name
        return (experts if sparse else 0), c["moe_intermediate_size"], 0
    if kind == "deepseek_v3":
        sparse = layer >= c.get("first_k_dense_replace", 0)
        return (c["n_routed_experts"] if sparse else 0), c["moe_intermediate_size"], c.get("n_shared_experts") or 0
    return 0, 0, 0


def _head_size(c: Mapping) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def _norms(c: Mapping) -> int:
    """Weights of all norms: per layer two of `hidden` (four in Gemma 2), those on heads, those of latent attention; one at the end."""
    hidden, per_layer = c["hidden_size"], 2 * c["hidden_size"]
    if c["model_type"] == "gemma2":
        per_layer *= 2
    if c["model_type"] in ("qwen3", "qwen3_moe"):
        per_layer += 2 * _head_size(c)
    if c["model_type"] == "deepseek_v3":
        per_layer += c["kv_lora_rank"] + (c.get("q_lora_rank") or 0)
    return hidden + c["num_hidden_layers"] * per_layer


def _cache(c: Mapping, compressed: bool) -> tuple[int, float]:
    """(numbers that attention caches per token and layer, operations per token, layer and position of the context)."""
    heads = c["num_attention_heads"]
    if c["model_type"] == "deepseek_v3":
        rank, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
        if compressed:  # scores against rank + rope numbers per head, and a sum of vectors of `rank`
            return rank + rope, 2.0 * heads * (2 * rank + rope)
        nope, value = c["qk_nope_head_dim"], c["v_head_dim"]
        return heads * (nope + rope + value), 2.0 * heads * (nope + rope + value)
    size = _head_size(c)
    return 2 * (c.get("num_key_value_heads") or heads) * size, 4.0 * heads * size


def from_config(
    config: Mapping,
    scheme: QuantScheme | str | float = FLOAT_BITS,
    *,
    head: QuantScheme | str | float | None = None,
    embedding: QuantScheme | str | float | None = None,
    kv_bits: float = FLOAT_BITS,
    compressed: bool = True,
    name: str = "",
) -> ModelShape:
    """The shape of a transformers config (its dict) with weights of `scheme`: a scheme, its name, or bits per weight.

    `head` and `embedding`: other bits for those two; norms and routers have 16. `compressed`: latent attention caches its compressed
    vector. Raises ValueError for a `model_type` that is not one of `FAMILIES`, a config without a needed number, or a group
    size that does not divide a matrix.

    >>> c = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    ...      "vocab_size": 10, "tie_word_embeddings": False}
    >>> s = from_config(c, 8)  # 4 * 8 * 8 + 3 * 8 * 16 + head 10 * 8 = 720 weights of a byte, norms 3 * 8 in two bytes
    >>> s.dense_bytes, s.embedding_bytes, s.kv_bytes_per_token_layer  # keys and values: 2 * 8 numbers of two bytes
    (768.0, 80.0, 32.0)
    """
    c = dict(config.get("text_config") or config)
    kind = c.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is not known here; use one of {', '.join(FAMILIES)}")
    try:
        layers, hidden, vocab = c["num_hidden_layers"], c["hidden_size"], c["vocab_size"]
        body = [(layer, k, out, width) for layer in range(layers) for k, out, width in _matrices(c, layer)]
        numbers, per_position = _cache(c, compressed)
    except KeyError as missing:
        raise ValueError(f"the config of a {kind} has no {missing.args[0]!r}; give the whole config.json") from None
    head = scheme if head is None else head
    embedding = scheme if embedding is None else embedding
    norms, router = _norms(c), sum(out * width for _, k, out, width in body if k == "router")
    dense = [(out, width) for _, k, out, width in body if k == "dense"]
    moe_layers = sorted({layer for layer, k, _, _ in body if k == "expert"})
    expert = [(out, width) for layer, k, out, width in body if k == "expert" and layer == moe_layers[0]]
    experts, moe_inner, shared = _experts(c, moe_layers[0]) if moe_layers else (0, 0, 0)
    tied = bool(c.get("tie_word_embeddings", False))
    table = (vocab, hidden)
    return ModelShape(
        name=name or str(c.get("_name_or_path") or kind),
        layers=layers,
        hidden=hidden,
        inner=max(c.get("intermediate_size") or 0, moe_inner * max(shared, c.get("num_experts_per_tok") or 1)),
        vocab=vocab,
        dense_bytes=sum(_bytes(m, scheme) for m in dense) + _bytes(table, head) + (norms + router) * FLOAT_BITS / 8,
        embedding_bytes=0.0 if tied else _bytes(table, embedding),
        dense_weights=sum(map(prod, dense)) + prod(table) + norms + router,
        kv_bytes_per_token_layer=numbers * kv_bits / 8,
        attention_ops=layers * per_position,
        moe_layers=len(moe_layers),
        experts=experts,
        top_k=c["num_experts_per_tok"] if moe_layers else 0,
        expert_bytes=sum(_bytes(m, scheme) for m in expert),
        expert_weights=sum(map(prod, expert)),
        embedding_weights=0 if tied else prod(table),
        max_context=int(c.get("max_position_embeddings") or 0),
        source=f"config, {_said(scheme)}" + ("" if head == scheme else f", head {_said(head)}"),
    )


def _bytes(matrix: tuple[int, int], scheme: QuantScheme | str | float) -> float:
    if isinstance(scheme, str):
        scheme = QuantScheme.parse(scheme)
    if isinstance(scheme, QuantScheme):
        return float(scheme.nbytes(matrix))
    if not 0 < scheme <= 64:
        raise ValueError(f"bits={scheme!r} per weight must be above 0 and at most 64")
    return prod(matrix) * scheme / 8


def _said(scheme: QuantScheme | str | float) -> str:
    return f"{scheme:g} bits" if isinstance(scheme, int | float) else str(scheme)


# ------------------------------------------------------------------------------------------------- from a folder


def headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} of the safetensors files in `folder`, from their headers.

    Raises FileNotFoundError where there is none, ValueError for a file that is none.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names if Path(name).name == name]  # a name with a path would leave the folder
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; give the folder of a checkpoint or of a bundle")
    found = {}
    for file in files:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, file.stat().st_size - 8):
                raise ValueError(f"{file} is no safetensors file: its header would take {length} bytes")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        found |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    return found


def from_folder(folder: str | Path, *, kv_bits: float = FLOAT_BITS, compressed: bool = True, bits: float | None = None) -> ModelShape:
    """The shape of the model in `folder` with the bytes that its files really have; operations from its config.json.

    Works for a checkpoint and for a bundle of ours (codes, scales and offsets of a weight are told by its name). `bits`: as if
    every stored floating-point weight of two dimensions or more had so many, as where a runtime widens bfloat16 to float32.
    Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a checkpoint or of a bundle")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = from_config(config, FLOAT_BITS, kv_bits=kv_bits, compressed=compressed, name=folder.name)
    sizes = {"dense": 0.0, "embedding": 0.0, "expert": 0.0}
    head = False
    for name, (dtype, dims) in headers(folder).items():
        if dtype not in _SAFETENSORS_BYTES:
            raise ValueError(f"{name} in {folder} is stored as {dtype}, which is not known here")
        width = _SAFETENSORS_BYTES[dtype]
        if bits is not None and dtype in ("BF16", "F16", "F32") and len(dims) >= 2 and name.endswith((".weight", "_proj")):
            width = bits / 8
        if re.search(r"(^|\.)embed_tokens\.", name):
            kind = "embedding"
        elif re.search(r"(^|\.)experts\.", name):
            kind = "expert"
        else:
            kind = "dense"
            head |= name.startswith("lm_head.")
        sizes[kind] += prod(dims) * width
    tied = not head
    return replace(
        shape,
        dense_bytes=sizes["dense"] + (sizes["embedding"] if tied else 0.0),
        embedding_bytes=0.0 if tied else sizes["embedding"],
        expert_bytes=sizes["expert"] / (shape.moe_layers * shape.experts) if shape.moe_layers else 0.0,
        source="bytes of its files" + ("" if bits is None else f", floating-point weights counted as {bits:g} bits"),
    )
