"""What a GGUF file says besides its tensors: settings and tokenizer. Refused is a model that llama.cpp would compute otherwise."""

import json
from math import prod

from torch import nn

from edgelab.export import ExportError
from edgelab.export.gguf_file import Type
from edgelab.export.gguf_tensors import ARCHITECTURES, Out, head_dim, rope_scaling
from edgelab.qtensor import QTensor


def refuse_config(config) -> None:
    """Raises ExportError for settings that llama.cpp's code for the architecture does not have."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ExportError(f"model_type={kind!r} is not one that this target writes; it writes {', '.join(sorted(ARCHITECTURES))}")
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"hidden_act={config.hidden_act!r}: llama.cpp's {ARCHITECTURES[kind].name} computes with silu only")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ExportError(f"sliding_window={config.sliding_window}: llama.cpp's {ARCHITECTURES[kind].name} attends to all tokens")
    if rope_scaling(config) not in ("default", "linear", "yarn") + (("llama3",) if kind == "llama" else ()):
        raise ExportError(
            f"rope_type={rope_scaling(config)!r} is not written for {kind}; default, linear and yarn are, and llama3 for llama. "
            "A model that is used within its original context length can be exported with rope_type='default'"
        )
    if rope_scaling(config) == "yarn":
        rope = {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
        } | config.rope_parameters
        plain = (rope["beta_fast"] or 32.0, rope["beta_slow"] or 1.0, rope["attention_factor"]) == (32.0, 1.0, None)
        matched = rope["mscale"] is not None and rope["mscale"] == rope["mscale_all_dim"]
        if not plain or (kind.startswith("deepseek") and not matched):
            raise ExportError(
                f"yarn with {rope}: llama.cpp reads beta_fast=32, beta_slow=1, no attention_factor, and for DeepSeek an mscale that "
                "equals mscale_all_dim (as DeepSeek-V3 has it); other numbers are not written"
            )
    if dict(config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("partial_rotary_factor below 1 is not written")
    if kind == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError(f"head_dim={head_dim(config)}: llama.cpp's qwen2 takes hidden_size / heads only")
    if kind == "qwen3_moe" and not config.norm_topk_prob:
        raise ExportError("norm_topk_prob=False: llama.cpp's qwen3moe always lets the weights of the chosen experts sum to 1")
    if kind == "qwen3_moe" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        raise ExportError(
            f"mlp_only_layers={config.mlp_only_layers}, decoder_sparse_step={config.decoder_sparse_step}: llama.cpp's qwen3moe has experts "
            "in every layer"
        )
    if kind == "deepseek_v2" and config.topk_method != "greedy":
        raise ExportError(f"topk_method={config.topk_method!r}: llama.cpp ranks groups as DeepSeek-V3 does; greedy can be exported")
    if kind.startswith("deepseek") and (config.q_lora_rank is not None and config.num_hidden_layers in (26, 27)):
        raise ExportError(f"num_hidden_layers={config.num_hidden_layers} with q_lora_rank: llama.cpp takes 26 and 27 layers for V2-Lite")


def metadata_of(model: nn.Module, tensors: list[Out], mla: str) -> dict[str, object]:
    """The keys of the architecture, as llama.cpp reads them (llama-arch.cpp)."""
    config = model.config.get_text_config()
    arch, rope = ARCHITECTURES[config.model_type].name, dict(config.rope_parameters or {})
    by_type: dict[Type, int] = {}
    for t in tensors:
        by_type[t.kind] = by_type.get(t.kind, 0) + prod(t.shape)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    own: dict[str, object] = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope_scaling(config) in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope_scaling(config), "rope.scaling.factor": float(rope["factor"])}
    if rope_scaling(config) == "yarn":
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if arch == "deepseek2" and rope.get("mscale_all_dim"):
            own["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]  # llama.cpp divides by 0.1 again
    stacks = [t for t in tensors if t.name.endswith("ffn_down_exps.weight")]
    if stacks:
        counts = {t.shape[0] for t in stacks}
        if len(counts) > 1:
            raise ExportError(f"the layers have {sorted(counts)} experts; llama.cpp takes one number for all layers. Keep as many in each")
        own |= {
            "expert_count": counts.pop(),
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": stacks[0].shape[2],
        }
    if arch == "deepseek2":
        nope, turned, value, lora = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        own |= {
            "attention.kv_lora_rank": lora,
            "rope.dimension_count": turned,
            "leading_dense_block_count": min(config.first_k_dense_replace, layers) if stacks else layers,
            "expert_shared_count": config.n_shared_experts if stacks else 0,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_weights_norm": config.model_type == "deepseek_v3" and bool(config.norm_topk_prob),
            "expert_gating_func": 2 if config.model_type == "deepseek_v3" else 1,  # sigmoid, softmax
        }
        if not stacks:  # llama.cpp asks for it of a dense model too
            own["expert_feed_forward_length"] = config.moe_intermediate_size
        own["attention.q_lora_rank"] = config.q_lora_rank or 0  # asked for also where there is none
        if config.model_type == "deepseek_v3" and stacks and config.n_group > 1:
            own |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
        if mla == "whole":
            own |= {"attention.head_count_kv": heads, "attention.key_length": nope + turned, "attention.value_length": value}
        else:  # one head of keys: the latent
            own |= {"attention.head_count_kv": 1, "attention.key_length": lora + turned, "attention.value_length": lora}
            own |= {"attention.key_length_mla": nope + turned, "attention.value_length_mla": value}
    schemes = sorted({str(p.source.scheme) for t in tensors for p in t.pieces if isinstance(p.source, QTensor)})
    found: dict[str, object] = {"general.architecture": arch, "general.type": "model"}
    if schemes:
        found |= {"general.quantization_version": 2, "edgelab.schemes": json.dumps(schemes)}
    found["general.file_type"] = max(by_type, key=by_type.get).file_type
    return found | {f"{arch}.{key}": v for key, v in own.items()}


# -------------------------------------------------------------------------------------------------------- tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's pre-tokenizers by name: expressions that cut the text one after the other (llama-vocab.cpp). It has no others
# than those it was compiled with, so a tokenizer of one's own gets the nearest. That of the embedded models, which knows no
# contractions, gets "smollm", which cuts 's, 't, 're ... off whatever follows them: b'text' becomes b 't ext '. Of 270,000 held-out
# tokens 0.01 % differ for it.
PRE_TOKENIZERS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "qwen2": (rf"{_CASELESS}|{_WORDS}|\p{{N}}|{_TAIL}",),
    "llama-bpe": (rf"{_CASELESS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# what a tokenizer is compared on: prose, contractions, quotes, numbers, code, white space, other scripts, nothing
TEXTS = (
    "Return a list of the names, in the order in which they were defined.",
    "It's what we'd call a don't-care: they're I'm you've we'll.",
    "set a timer for 25 minutes and 3.5 seconds",
    "12345 + 678 = 13023",
    "def f(self, *args, key='value', **kwargs):\n    return {k: v for k, v in kwargs.items()}\n",
    "x = b'text' if r'raw' else 'self'\n",
    "    indented\n\n\n        twice\t\ttabs   \n",
    "a  b   c    d",
    "naïve café, Größe, Ελληνικά, Русский",
    "日本語のテキスト と 中文",
    "emoji 🙂👍🏽 and symbols ±×÷ €100 <html> a->b != c",
    "",
    " leading and trailing ",
    "CamelCase snake_case SCREAMING_CASE http://example.org/a?b=c&d=%20",
)


def vocabulary_of(tokenizer, size: int, pre: str | None) -> dict[str, object]:
    """The keys tokenizer.ggml.* of a byte-level BPE tokenizer for a model with `size` rows. None or False: no tokenizer in the file."""
    if not tokenizer:
        return {"tokenizer.ggml.model": "none"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if stored["model"].get("type") != "BPE" or '"ByteLevel"' not in json.dumps(stored["pre_tokenizer"]):
        raise ExportError(
            f"{type(tokenizer).__name__} is no byte-level BPE tokenizer, the only kind that this target writes; "
            "tokenizer=False leaves it out (ids in, ids out)"
        )
    ids = {**stored["model"]["vocab"], **{t["content"]: t["id"] for t in stored["added_tokens"]}}
    if max(ids.values()) >= size:
        raise ExportError(f"the tokenizer has ids up to {max(ids.values())}; the model has {size} rows: it is another model's tokenizer")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [5] * size  # 5: unused
    for token, i in ids.items():
        tokens[i], types[i] = token, 1
    for token in stored["added_tokens"]:
        types[token["id"]] = 3 if token["special"] else 4  # control, user defined
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    if pre is not None and pre not in PRE_TOKENIZERS:
        raise ExportError(f"pre={pre!r} is not one of {', '.join(PRE_TOKENIZERS)}")
    found: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or nearest_pre_tokenizer(tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if merges:
        found["tokenizer.ggml.merges"] = merges
    for key in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{key}_token_id")) is not None:
            found[f"tokenizer.ggml.{'unknown' if key == 'unk' else 'padding' if key == 'pad' else key}_token_id"] = i
    probe = tokenizer("a").input_ids
    found["tokenizer.ggml.add_bos_token"] = bool(probe) and probe[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(probe) > 1 and probe[-1] == tokenizer.eos_token_id
    found["tokenizer.ggml.add_space_prefix"] = False
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        found["tokenizer.chat_template"] = template
    return found


def nearest_pre_tokenizer(tokenizer) -> str:
    """The name in `PRE_TOKENIZERS` with which most of `TEXTS` become the same ids as with the tokenizer's own."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    own = tokenizer.backend_tokenizer
    wanted = [own.encode(text).ids for text in TEXTS]
    same = {}
    for name, expressions in PRE_TOKENIZERS.items():
        twin = Tokenizer.from_str(own.to_str())
        twin.pre_tokenizer = Sequence(
            [*(Split(Regex(e), "isolated") for e in expressions), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        same[name] = sum(twin.encode(text).ids == ids for text, ids in zip(TEXTS, wanted, strict=True))
    return max(same, key=same.get)  # the first of equals
