"""Sparse attention for long text: a local window and every stride-th token before it, in place of all.

    token t attends to   t - window .. t                    (itself and the `window` tokens before)
                  and to 0, stride, 2 stride, .. < t - window

Local plus strided, after Child et al. (arXiv 1904.10509, section 4.2). Of their two patterns this is the one with fixed columns
("fixed"): which tokens are the summaries does not depend on who asks. So the strided keys of all queries are one slice
`k[::stride]`, a key that is neither recent nor a summary is never read again (a cache may drop it), and token 0, on which
trained models put what attention they have to spare (arXiv 2309.17453), is always among them. Pairs of length L:

    dense L (L + 1) / 2        sparse about L (window + 1) + L^2 / (2 stride)

still a square, 1 / stride of it. A mask alone saves nothing: it computes all pairs and throws most away. `attend` gathers
instead: block after block of queries meets one short list of keys, the strided ones before its window and the window itself,

    block of R queries from a:   keys 0, stride, .. < a - window   and   a - window .. a + R - 1

so that (R + window) / (window + 1) of the local pairs are computed and only the last part of the list needs a mask.

In a model it is an attention implementation of transformers 5 ("edgelab_sparse"), for every family that has these: with and
without key-value cache, with padding on the right, with grouped queries, MLA (whose keys are wider than its values) and
attention sinks. Layers that have a sliding window of their own keep it and nothing else. Positions are counted in the sequence as it is
given, so padding on the left would move the summaries. A static cache, longer than what it holds, is not for this.

The model was trained with dense attention: what it loses on long text is measured, not assumed away (`evaluate`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgelab.recipe import SparseAttention

NAME = "edgelab_sparse"
BLOCK = 64  # queries at a time; 32, 128, 256 took 18, 7, 35 % longer over 4,096 tokens on one AVX-512 core


# --------------------------------------------------------------------------------------------------------- the pattern


def attended(t: int, window: int, stride: int | None) -> list[int]:
    """The tokens that token `t` attends to. `stride` None: the window alone.

    >>> attended(9, 2, 4), attended(9, 2, None), attended(1, 2, 4)
    ([0, 4, 7, 8, 9], [7, 8, 9], [0, 1])
    """
    first = max(0, t - window)
    return [*(range(0, first, stride) if stride else ()), *range(first, t + 1)]


def cost(length: int, window: int, stride: int | None) -> tuple[int, int]:
    """(pairs of query and key with the pattern, pairs of dense causal attention) of a text of `length` tokens, per head.

    >>> cost(10, 2, 4)  # the window: 1 + 2 + 8 * 3; the strided: 7 tokens have one, 3 of these two
    (37, 55)
    """
    dense = length * (length + 1) // 2
    short = min(length, window + 1)  # tokens whose window reaches the beginning
    local = short * (short + 1) // 2 + (length - short) * (window + 1)
    n = length - short  # tokens with something before their window: of u + 1 keys there, u // stride + 1 are strided
    q, r = divmod(n, stride) if stride else (0, 0)
    strided = n + stride * q * (q - 1) // 2 + q * r if stride else 0
    return local + strided, dense


def dense_mask(length: int, window: int, stride: int | None, device: torch.device | str = "cpu") -> Tensor:
    """bool [length, length], True where row t attends to column j: the pattern for implementations that take a mask."""
    at = torch.arange(length, device=device)
    return _allowed(at, at, window, stride)


def _allowed(t: Tensor, j: Tensor, window: int, stride: int | None) -> Tensor:
    behind = t[:, None] - j
    allowed = (behind >= 0) & (behind <= window)
    return allowed | ((behind >= 0) & (j % stride == 0)) if stride else allowed


# ----------------------------------------------------------------------------------------------------------- computing


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    stride: int | None,
    scaling: float | None = None,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[batch, heads, queries, value width]: attention by the pattern; the queries are the last ones of the keys.

    `query` [batch, heads, queries, width], `key` and `value` [batch, heads or fewer, keys, width]. `padding` bool [batch,
    keys]: False where nothing is. `sinks` [heads]: a logit that takes its share of each softmax and gives nothing (gpt-oss).
    """
    queries, keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    out = []
    for first in range(0, queries, BLOCK):
        a, end = keys - queries + first, min(keys - queries + first + BLOCK, keys)
        low = max(0, a - window)
        cut = range(0, low, stride) if stride else range(0)
        k, v = (torch.cat([x[:, :, : cut.stop : stride], x[:, :, low:end]], 2) if len(cut) else x[:, :, low:end] for x in (key, value))
        mask = None
        if end - a > 1:
            at = torch.arange(low, end, device=query.device)
            local = _allowed(at[a - low :], at, window, stride)  # [block, window + block]
            mask = F.pad(local, (len(cut), 0), value=True)[None, None]
        if padding is not None:
            there = torch.cat([padding[:, : cut.stop : stride], padding[:, low:end]], 1) if len(cut) else padding[:, low:end]
            there = there[:, None, None]
            mask = there if mask is None else mask & there
            itself = torch.arange(k.shape[2] - (end - a), k.shape[2], device=query.device)  # padding attends to itself: no row is empty
            mask = mask | (torch.arange(k.shape[2], device=query.device) == itself[:, None])
        if groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        q = query[:, :, first : first + end - a]
        if sinks is None:
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
        else:
            out.append(_with_sinks(q, k, v, mask, scaling, sinks, dropout))
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, sinks: Tensor, dropout: float) -> Tensor:
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    shares = torch.cat([scores, column.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    return F.dropout(shares, dropout) @ v


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers calls an attention implementation: (output [batch, queries, heads, width], no weights)."""
    window, stride = (sliding_window - 1, None) if sliding_window else module._edgelab_pattern
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; sparse attention takes [batch, keys], or none")
    if attention_mask is not None and attention_mask.shape[1] != key.shape[2]:
        raise ValueError(
            f"the cache holds {key.shape[2]} keys and the mask {attention_mask.shape[1]}: use a DynamicCache with sparse attention"
        )
    padding = None if attention_mask is None else attention_mask.bool()
    out = attend(query, key, value, window, stride, scaling, padding, s_aux, dropout if module.training else 0.0)
    return out.transpose(1, 2).contiguous(), None


def _mask(attention_mask: Tensor | None = None, kv_length: int = 0, **kwargs) -> Tensor | None:
    """The padding [batch, keys] as it came, or None where there is none: what is attended to is `attend`'s own matter."""
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


# ------------------------------------------------------------------------------------------------------------ the step


def sparse_attention(model: nn.Module, step: SparseAttention) -> list[str]:
    """Remarks, after `model` attends as `step` says. In place. Raises ValueError for a model whose attention can't be replaced."""
    set_pattern(model, step.window, step.stride)
    longest = getattr(model.config, "max_position_embeddings", None) or 4096
    shares = [(n, some / every) for n in sorted({256, longest}) for some, every in (cost(n, step.window, step.stride),)]
    listed = ", ".join(f"{share:.1%} of {n:,} tokens" for n, share in shares)
    return [f"sparse attention with window {step.window} and stride {step.stride} computes of all pairs of query and key: {listed}"]


def set_pattern(model: nn.Module, window: int, stride: int | None) -> None:
    """Lets `model` attend to its `window` tokens before (0: itself alone) and every `stride`-th (None: none). In place."""
    from transformers import AttentionInterface, AttentionMaskInterface

    found = [m for name, m in model.named_modules() if name.endswith("self_attn")]
    if not found or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} has no attention that transformers lets one replace (self_attn modules and "
            "_supports_attention_backend are needed)"
        )
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)
    for module in found:
        module._edgelab_pattern = (window, stride)
    model.set_attn_implementation(NAME)


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one layer's attention over a text, this way and by torch's dense causal attention; share of pairs."""

    length: int
    sparse_ms: float
    dense_ms: float
    pairs: float


@torch.inference_mode()
def measure(
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    window: int = 32,
    stride: int | None = 16,
    *,
    heads: int = 4,
    width: int = 64,
    repetitions: int = 9,
    seed: int = 0,
) -> list[Timing]:
    """The timings of both ways, which take turns; the first turn warms up and is not counted. Batch 1, float32, torch's threads."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        q, k, v = torch.randn(3, 1, heads, length, width, generator=draw)
        ways = (
            lambda q=q, k=k, v=v: attend(q, k, v, window, stride),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
        took: tuple[list[float], list[float]] = ([], [])
        for turn in range(repetitions + 1):
            for way, seconds in zip(ways, took, strict=True):
                began = time.perf_counter()
                way()
                if turn:
                    seconds.append(time.perf_counter() - began)
        sparse, dense = (1e3 * float(torch.tensor(s).median()) for s in took)
        some, every = cost(length, window, stride)
        rows.append(Timing(length, sparse, dense, some / every))
    return rows
