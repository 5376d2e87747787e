"""Adaptive precision: the model in few bits answers, and where it is not sure the one in more bits does.

`Cascade(low, high, confidence)` are two models of one tokenizer, say int3 and int8 of the same weights. Per token:

    p = softmax(low(text));  max p >= confidence: p is the answer;  else the answer is high(text)

as FrugalGPT (arXiv 2305.05176) and speculative cascades do with models of two sizes. `calibrate` chooses the confidence by the
same test as the early exit (`early_exit.choose_threshold`): of the tokens that stay with the low model at least `agreement` get
the high model's token.

**What is read.** Decoding is bound by the bytes of weights that a token reads:

    bytes per token = bytes of low + share that is escalated * bytes of high

The high model sees the whole text, so that answers do not depend on what the low one would have made of it: tokens that it
has not read yet go through it together when it is asked next. That reads its weights once per call, as the formula says,
but computes all of them: the cascade saves bytes, not multiply-adds, and where the high model reads long gaps it is slower than
the high model alone. Both key-value caches exist.

**Nested codes.** Both models in memory take the sum of their bits, unless one lies in the other: `split` takes the high nibbles of
int8 codes as 4-bit codes and the low nibbles as the rest. With q = 16 h + l, scale s and value s (q - 128), h stands for the middle
of its 16 values,

    low: 16 s h + s (7.5 - 128)        high, exactly, from both: s (16 h + l - 128)

so 8 bits and one set of scales hold both, and the low model reads half of them. The 4-bit codes are round-to-nearest with
the scale of the 8-bit ones: worse than 4-bit codes that were fitted for themselves.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.early_exit import NEVER, choose_threshold
from edgelab.evaluate import documents, routers
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import quantized, swap, weights
from edgelab.qtensor import QTensor, pack, unpack
from edgelab.scheme import QuantScheme


@dataclass(frozen=True, eq=False)
class Cascade:
    """Two models of one tokenizer: `low` answers where its largest probability is at least `confidence`, else `high`."""

    low: nn.Module
    high: nn.Module
    confidence: float

    def __post_init__(self) -> None:
        sizes = [getattr(m.config, "vocab_size", None) for m in (self.low, self.high)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"low and high have vocabularies of {sizes[0]} and {sizes[1]}: a cascade takes two models of one tokenizer")
        if not self.confidence >= 0:
            raise ValueError(f"confidence={self.confidence} must be 0 (always low) to 1, or above (always high)")


def calibrate(low: nn.Module, high: nn.Module, batches: Sequence[Tensor], agreement: float = 0.98) -> Cascade:
    """The `Cascade` with the least confidence at which tokens answered by `low` are tested to be `high`'s in `agreement` of cases.

    Token ids [rows, length]. The confidence is `early_exit.NEVER` where no threshold passes: all goes to `high`.
    """
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement={agreement} is no share; give a number from 0 to 1")
    sure, same = [], []
    for batch in batches:
        p, token = _logp(low, batch).max(-1)
        sure.append(p.exp().cpu())
        same.append((token == _logp(high, batch).argmax(-1)).cpu())
    return Cascade(low, high, choose_threshold(torch.cat(sure), torch.cat(same), agreement))


@dataclass(frozen=True)
class CascadeReport:
    """What a cascade does on text, against its high model. KL divergences in nats per token; `bytes_*` of weights read per token."""

    tokens: int
    escalated: float
    kld: float
    kld_low: float
    same_top: float
    same_top_low: float
    bytes_low: float
    bytes_high: float
    weights: float  # that a token uses

    @property
    def bytes_read(self) -> float:
        return self.bytes_low + self.escalated * self.bytes_high

    @property
    def bits(self) -> float:
        """Effective bits per weight that a token reads; above those of the high model where escalating is more than the rest saves."""
        return 8 * self.bytes_read / self.weights


def report(cascade: Cascade, batches: Sequence[Tensor]) -> CascadeReport:
    """A `CascadeReport` of every token of the token ids [rows, length], teacher-forced."""
    sums = dict.fromkeys(("tokens", "escalated", "kld", "kld_low", "same_top", "same_top_low"), 0.0)
    for batch in batches:
        low, high = _logp(cascade.low, batch), _logp(cascade.high, batch)
        up = low.amax(-1).exp() < cascade.confidence
        mixed = torch.where(up[:, None], high, low)
        best = high.argmax(-1)
        sums["tokens"] += len(low)
        sums["escalated"] += float(up.sum())
        sums["kld"] += float(token_kl(high, mixed).sum())
        sums["kld_low"] += float(token_kl(high, low).sum())
        sums["same_top"] += float((mixed.argmax(-1) == best).sum())
        sums["same_top_low"] += float((low.argmax(-1) == best).sum())
    n = int(sums.pop("tokens"))
    (low_bytes, used), (high_bytes, _) = bytes_per_token(cascade.low), bytes_per_token(cascade.high)
    return CascadeReport(n, **{k: v / n for k, v in sums.items()}, bytes_low=low_bytes, bytes_high=high_bytes, weights=used)


def bytes_per_token(model: nn.Module) -> tuple[float, float]:
    """(bytes of weights that decoding one token reads, how many weights these are): of k experts in E the share k / E, no embedding."""
    share = {name.rpartition(".")[0]: r.top_k / r.num_experts for name, r in routers(model).items()}
    held = [(w.name, w.role, w.tensor.nbytes, math.prod(w.shape)) for w in weights(model)]
    held += [(name, role, q.nbytes, math.prod(q.shape)) for name, (role, q) in quantized(model).items()]
    read = used = 0.0
    for name, role, nbytes, count in held:
        if role != "embedding":
            part = share[name.partition(".experts")[0]] if role == "experts" else 1.0
            read, used = read + part * nbytes, used + part * count
    return read, used


@torch.inference_mode()
def _logp(model: nn.Module, batch: Tensor) -> Tensor:
    """Log probabilities [tokens, vocabulary]."""
    return model(input_ids=batch, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------ decoding


@dataclass(frozen=True)
class Written:
    """Tokens that greedy decoding wrote, the share of them that the high model gave, and the seconds it took with the prompt."""

    ids: list[int]
    escalated: float
    seconds: float


@torch.inference_mode()
def generate(cascade: Cascade, ids: Tensor, max_new_tokens: int = 64, eos: int | None = None, per: str = "token") -> Written:
    """What greedy decoding writes after `ids` [length] or [1, length], up to and with `eos`.

    `per` "token": who answers is decided anew for each. "prompt": once, by the first; the other model then writes nothing.
    """
    if per not in ("token", "prompt"):
        raise ValueError(f"per={per!r} is not known; use 'token' or 'prompt'")
    began = time.perf_counter()
    low, high = _Reader(cascade.low), _Reader(cascade.high)
    text, escalated, written, only = ids.reshape(-1).tolist(), 0, [], None
    while len(written) < max_new_tokens and (not written or written[-1] != eos):
        reader = only
        if reader is None:
            p, token = low.read(text).softmax(-1).max(-1)
            reader = high if p < cascade.confidence else low
            only = reader if per == "prompt" else None
        next_ = int(token) if reader is low and only is None else int(reader.read(text).argmax())
        escalated += reader is high
        written.append(next_)
        text.append(next_)
    return Written(written, escalated / max(1, len(written)), time.perf_counter() - began)


class _Reader:
    """A model that reads what it has not read yet of a text that grows; the logits of the next token stay until it has grown."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.past, self.done, self.logits = model, None, 0, None

    def read(self, text: list[int]) -> Tensor:
        if self.done < len(text):
            ids = torch.tensor([text[self.done :]])
            out = self.model(input_ids=ids, past_key_values=self.past, use_cache=True)
            self.past, self.done, self.logits = out.past_key_values, len(text), out.logits[0, -1].float()
        return self.logits


@dataclass(frozen=True)
class Answers:
    """Shares of answers that equal the reference: of the cascade, and of its models alone. `escalated`: share of tokens."""

    prompts: int
    exact: float
    exact_low: float
    exact_high: float
    escalated: float


def answers(cascade: Cascade, tokenizer, data, n: int = 32, domain: str = "assistant", per: str = "token") -> Answers:
    """An `Answers` of the first `n` prompts of `domain` in `data` (one split of the corpus), decoded greedily."""
    docs = [d for d in documents(data, tokenizer, {domain: n}) if d.domain == domain and d.answer][:n]
    if not docs:
        raise ValueError(f"data has no rows of domain={domain!r} with answers; give one split, such as corpus()['test']")
    right, tokens, up = [0, 0, 0], 0, 0.0
    for d in docs:
        prompt, wanted = torch.from_numpy(d.ids[: d.first]), d.targets.tolist()
        for i, c in enumerate((cascade, replace(cascade, confidence=0.0), replace(cascade, confidence=NEVER))):
            w = generate(c, prompt, len(wanted) + 16, eos=int(d.ids[-1]), per=per if i == 0 else "prompt")
            right[i] += w.ids == wanted
            if i == 0:
                tokens, up = tokens + len(w.ids), up + w.escalated * len(w.ids)
    return Answers(len(docs), *(r / len(docs) for r in right), escalated=up / tokens)


# -------------------------------------------------------------------------------------------------------- nested codes


def split(q: QTensor) -> tuple[QTensor, np.ndarray]:
    """(the 4-bit tensor that lies in the high nibbles of `q`, the low nibbles packed like 4-bit codes), of symmetric int8 codes.

    Scales and offsets of the first are 16 s and -120.5 s of the scales s of `q`: they need not be stored again.

    >>> s = QuantScheme.parse("int8-row")
    >>> low, rest = split(QTensor.from_codes(np.array([[0, 128, 255]], np.uint8), np.array([[1.0]]), s))
    >>> low.codes(), low.dequantize(), join(low, rest).codes()
    (array([[ 0,  8, 15]], dtype=uint8), array([[-120.5,    7.5,  119.5]], dtype=float32), array([[  0, 128, 255]], dtype=uint8))
    """
    if q.scheme.bits != 8 or q.scheme.asymmetric or not q.scheme.affine:
        raise ValueError(f"{q.scheme} holds no nibbles to split; quantize to symmetric int8, such as int8-g64")
    codes, scales = q.codes(), q.scale_values()
    if np.abs(scales).max(initial=0) * 120.5 > np.finfo(np.float16).max:
        raise ValueError(
            f"a scale of {q.scheme} is {np.abs(scales).max()}: 120.5 times that is no float16 number; rescale the weight first"
        )
    scheme = QuantScheme(4, q.scheme.granularity, "uint")
    low = QTensor.from_codes(codes >> 4, 16 * scales, scheme, -120.5 * scales)
    return low, pack(codes & 15, 4)


def join(low: QTensor, rest: np.ndarray) -> QTensor:
    """The int8 tensor that `split` took apart, bit for bit."""
    codes = low.codes() << 4 | unpack(rest, 4, low.shape[-1])
    return QTensor.from_codes(codes, low.scale_values() / 16, QuantScheme(8, low.scheme.granularity))


def low_of(original: nn.Module, high: nn.Module) -> nn.Module:
    """A copy of the float model `original` with the 4-bit codes that lie in those of `high`, its int8 version."""
    low = copy.deepcopy(original)
    swap(low, {name: split(q)[0] for name, (_, q) in quantized(high).items()})
    return low
