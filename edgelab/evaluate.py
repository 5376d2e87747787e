"""Evaluate models side by side on the same text: how good, how far from the baseline, how sure, how fast.

What is scored. A document is read as in training: the beginning token, the text, the end token, each predicted from
what is before it. Where a row has an `answer`, only the answer and the end are scored: the prompts of the generated
domains are noise that the generator drew, and a model's figure on noise says nothing. Perplexity, KL divergence,
same-top-token and router overlap count the end token (when to stop is part of the model); bits per byte leaves it
out, so that its bits and its bytes belong to the same text.

Windows. A document longer than `context` is read in windows of `context` tokens that start every `stride` tokens; a
token is scored in the first window that reaches it, so each exactly once, and after the first window with at least
`context - stride` tokens before it. Windows are batched by length and padded on the right; attention is causal, so
padding changes nothing before it, and padded positions are counted nowhere (routers see them; we drop them there).

Logits are compared in float32. The models take turns on each batch, the baseline first, so that its logits live for
one batch only; what is kept is sums per document, and 4 bytes per token for the percentile of the KL divergence.

Exact match is that of greedy decoding, found without decoding. Let a_1 .. a_n be the answer and the end token. Greedy
decoding writes t_i = argmax p(. | prompt, t_1 .. t_i-1). If t_j = a_j for all j < i, its context at i is the
reference's own prefix, so t_i is the argmax at that position of one teacher-forced pass. By induction greedy decoding
writes exactly a_1 .. a_n if and only if the teacher-forced argmax is a_i at every i: one pass instead of n steps, and
exact (on tokens: another spelling of the same characters in other tokens would not count).

Intervals are paired bootstrap intervals over sources. A source is what documents were cut from: the `id` before its
last '#' (the pieces `x#0`, `x#1` are one source, an id without '#' and a row without id are each their own). Pieces
of one source resemble each other, so to draw them one by one would make intervals too narrow; whole sources are drawn
with replacement, every model is figured on the same draws, and ratios of sums are resampled as ratios (Efron,
Tibshirani 1993, chapter 13; Davison, Hinkley 1997, section 3.8). `Row.n` is the number of sources. Where a share is 0
or 1 in every source, resampling would claim certainty; the open side is then Clopper and Pearson's 1934 exact bound,
a source counting as one trial. A single source tells nothing of the spread between sources: its figures have no
interval, except such a bound.
"""

import hashlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from tqdm.auto import tqdm

from edgelab import data as corpora
from edgelab.metrics.bits_per_byte.bits_per_byte import bits_per_byte
from edgelab.metrics.exact_match.exact_match import exact, flips
from edgelab.metrics.kl_divergence.kl_divergence import percentile, token_kl
from edgelab.metrics.perplexity.perplexity import perplexity
from edgelab.metrics.router_overlap.router_overlap import overlap
from edgelab.metrics.same_top_token.same_top_token import same_top
from edgelab.report import Report, Row, machine

# Documents per domain in a quick evaluation: about 50,000 tokens of the test split
QUICK_DOCS: Mapping[str, int] = MappingProxyType({"prose": 60, "code": 60, "assistant": 300, "arithmetic": 300})
_OTHER_DOCS = 100  # of a domain that QUICK_DOCS does not name
_LOGIT_FLOATS = 2**24  # 64 MiB of float32 logits per model in a batch, whatever the vocabulary


# ------------------------------------------------------------------------------------------- documents and windows


@dataclass(frozen=True, eq=False)
class Document:
    """One document in tokens: beginning, text, end. Positions `first` .. len(ids) - 1 are scored."""

    domain: str
    ids: np.ndarray  # int64
    first: int
    n_bytes: int  # of the scored text, the end token left out
    answer: bool  # whether it has an answer to match
    source: str = ""  # what it was cut from; documents of one domain and source are no independent observations

    @property
    def targets(self) -> np.ndarray:
        """The scored tokens, the end token last."""
        return self.ids[self.first :]


def _borders(tokenizer) -> tuple[int, int]:
    """(beginning, end) token ids. Raises ValueError for a tokenizer without either."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None and end is None:
        raise ValueError("the tokenizer has neither bos_token nor eos_token; set one: documents start and end with it")
    return (end if begin is None else begin), (begin if end is None else end)


def documents(data, tokenizer, max_docs: Mapping[str, int] | int | None = None) -> list[Document]:
    """The documents of a Dataset in tokens: of each domain the first `max_docs` in the order of their source's SHA-256.

    `data` needs a `text` column; `domain` ("text" where missing), `prompt` and `answer` (text = prompt + answer; None
    counts as "") and `id` are used where present. `max_docs`: a number of documents, one per domain (100 for a domain
    that it leaves out), or None for all. The documents of a source come together, so that all but the last source
    taken are whole. The order by hash does not depend on the order of the rows, so a subset stays the same subset.

    Raises ValueError when nothing is left to score, and for a row with an answer whose text is not prompt + answer.
    """
    columns = getattr(data, "column_names", None)
    if not isinstance(columns, list):
        raise ValueError(f"data is a {type(data).__name__}; give one split, as in corpus()['test'] or Dataset.from_dict(...)")
    if "text" not in columns:
        raise ValueError(f"data has columns {columns} and none is called 'text'; data.from_source picks and renames columns")
    n = len(data)
    texts, prompts, answers, ids_given = (
        ["" if v is None else str(v) for v in data[c]] if c in columns else [""] * n for c in ("text", "prompt", "answer", "id")
    )
    domains = list(data["domain"]) if "domain" in columns else ["text"] * n
    for i in range(n):
        if answers[i] and texts[i] != prompts[i] + answers[i]:
            named = f" (id {ids_given[i]!r})" if ids_given[i] else ""
            raise ValueError(
                f"row {i}{named} has an answer, but its text {texts[i][:60]!r} is not prompt + answer "
                f"{(prompts[i] + answers[i])[:60]!r}; make text = prompt + answer, or leave the answer out"
            )
    names = [name or text for name, text in zip(ids_given, texts, strict=True)]
    wholes = [name.rpartition("#")[0] or name if name else text for name, text in zip(ids_given, texts, strict=True)]
    sources = [whole if name else f"row {i}" for i, (name, whole) in enumerate(zip(ids_given, wholes, strict=True))]
    digest = [
        tuple(hashlib.sha256(f"{d}:{part}".encode()).digest() for part in parts) for d, *parts in zip(domains, wholes, names, strict=True)
    ]
    chosen: list[int] = []
    for domain in dict.fromkeys(domains):
        rows = sorted((i for i in range(n) if domains[i] == domain and texts[i]), key=digest.__getitem__)
        limit = max_docs.get(domain, _OTHER_DOCS) if isinstance(max_docs, Mapping) else max_docs
        chosen += rows[:limit]
    if not chosen:
        raise ValueError(f"data holds no documents to score ({n} rows, max_docs={max_docs}); give a split with text in it")
    begin, end = _borders(tokenizer)
    # in two parts, as in training: where the prompt ends must not depend on how the tokenizer joins across
    head = [prompts[i] if answers[i] else "" for i in chosen]
    tail = [texts[i][len(h) :] for i, h in zip(chosen, head, strict=True)]
    head_ids = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
    tail_ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
    result = []
    for i, h, t, text in zip(chosen, head_ids, tail_ids, tail, strict=True):
        ids = np.array([begin, *h, *t, end], np.int64)
        result.append(Document(domains[i], ids, 1 + len(h), len(text.encode()), bool(answers[i]), sources[i]))
    return result


def source_index(docs: Iterable[Document]) -> np.ndarray:
    """The number of each document's source, int64 [documents]: counted from 0 in the order of appearance."""
    seen: dict[tuple[str, str], int] = {}
    return np.array([seen.setdefault((d.domain, d.source), len(seen)) for d in docs], np.int64)


def windows(n: int, context: int, stride: int, first: int = 1) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored target) of each window over a document of `n` tokens.

    A window feeds the model tokens start .. stop - 1, which predict the targets start + 1 .. stop. Together they score
    the targets `first` .. n - 1 once each; windows that would score none are left out.

    >>> list(windows(11, context=6, stride=3))  # targets 1..6, then 7..9, then 10
    [(0, 6, 1), (3, 9, 7), (6, 10, 10)]
    """
    start, scored = 0, 0
    while scored < n - 1:
        stop = min(start + context, n - 1)
        if stop >= first:
            yield start, stop, max(first, scored + 1)
        scored = stop
        start += stride


def _check_context(docs: list[Document], context: int, stride: int, models: Mapping[str, torch.nn.Module]) -> None:
    if context < 2:
        raise ValueError(f"context={context} is too short: a window needs at least 2 tokens; use 512")
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be in 1 .. context={context}, or tokens would be skipped")
    for name, model in models.items():
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if most and context > most:
            raise ValueError(f"context={context} is longer than the {most} positions of model {name!r}; use context={most}")
    longest = max((len(d.ids) - 1 for d in docs if d.answer), default=0)
    if longest > context:
        raise ValueError(f"context={context} is too short for a prompt with its answer of {longest} tokens; use context={longest}")


@dataclass(frozen=True, eq=False)
class _Batch:
    """Windows padded to one length, and where their scored positions are.

    `rows`, `cols`: position of each scored prediction in the batch; `doc`, `target`: the document and the index in it
    of the token predicted there. Sorted by row, then by column.
    """

    input_ids: torch.Tensor  # [windows, length]
    mask: torch.Tensor | None  # None where nothing is padded
    rows: torch.Tensor
    cols: torch.Tensor
    doc: np.ndarray
    target: np.ndarray


def _batches(docs: list[Document], context: int, stride: int, batch_tokens: int) -> list[_Batch]:
    """All windows of `docs`, longest first (so that memory peaks at once), at most `batch_tokens` padded tokens a batch."""
    spans = [(i, *w) for i, d in enumerate(docs) for w in windows(len(d.ids), context, stride, d.first)]
    spans.sort(key=lambda s: (s[1] - s[2], s[0], s[1]))
    result, at = [], 0
    while at < len(spans):
        length = spans[at][2] - spans[at][1]
        part = spans[at : at + max(1, batch_tokens // length)]
        at += len(part)
        ids = np.zeros((len(part), length), np.int64)  # padded with token 0: any will do
        real = np.zeros((len(part), length), np.int64)
        rows, cols, doc, target = [], [], [], []
        for row, (i, start, stop, first) in enumerate(part):
            ids[row, : stop - start] = docs[i].ids[start:stop]
            real[row, : stop - start] = 1
            targets = np.arange(first, stop + 1)
            rows.append(np.full(len(targets), row))
            cols.append(targets - 1 - start)
            doc.append(np.full(len(targets), i))
            target.append(targets)
        mask = None if real.all() else torch.from_numpy(real)
        where = (torch.from_numpy(np.concatenate(x)) for x in (rows, cols))
        result.append(_Batch(torch.from_numpy(ids), mask, *where, np.concatenate(doc), np.concatenate(target)))
    return result


def _device(model: torch.nn.Module) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _inference(models: Iterable[torch.nn.Module]):
    """Inference mode with every model in eval mode (dropout off); their own mode comes back afterwards."""
    models = list(models)
    modes = [m.training for m in models]
    try:
        for m in models:
            m.eval()
        with torch.inference_mode():
            yield
    finally:
        for m, mode in zip(models, modes, strict=True):
            m.train(mode)


def _forward(model: torch.nn.Module, batch: _Batch) -> torch.Tensor:
    """Logits [scored positions, vocabulary], float32."""
    device = _device(model)
    mask = None if batch.mask is None else batch.mask.to(device)
    logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
    return logits[batch.rows.to(device), batch.cols.to(device)].float()


# --------------------------------------------------------------------------------------------------------- routers


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The routers of a model by module name, in layer order: empty for a dense model.

    A router is what transformers 5 makes of it in every family: a module with `top_k`, `num_experts` and its own
    `weight`, whose forward returns (logits, weights, indices [tokens, k]).
    """
    needed = ("top_k", "num_experts", "weight")
    return {name: m for name, m in model.named_modules() if all(hasattr(m, a) for a in needed)}


@contextmanager
def _watch(model: torch.nn.Module):
    """A list that holds, after each forward, every router's choice [tokens, k] in layer order."""
    modules = list(routers(model).values())
    choices: list[torch.Tensor | None] = [None] * len(modules)

    def hook(layer: int):
        def keep(_module, _inputs, output) -> None:
            choices[layer] = output[2]

        return keep

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(modules)]
    try:
        yield choices
    finally:
        for h in handles:
            h.remove()


def _choices(choices: list[torch.Tensor | None], batch: _Batch) -> list[torch.Tensor]:
    """Each layer's choice at the scored positions, [scored positions, k]: padding and repeated context left out."""
    at = batch.rows * batch.input_ids.shape[1] + batch.cols
    return [c.reshape(-1, c.shape[-1])[at.to(c.device)].cpu() for c in choices if c is not None]


def expert_counts(model, tokenizer, data, *, max_docs=None, context: int = 512, batch_tokens: int = 4096, progress: bool = True):
    """(counts int64 [sources, layers, experts], domain of each source): how often each expert was picked.

    All tokens count, prompts too, each once; the documents of a source are summed. Raises ValueError for a model without routers.
    """
    found = routers(model)
    if not found:
        raise ValueError("the model has no routers: expert load is a figure of mixture-of-experts models")
    experts = max(m.num_experts for m in found.values())
    docs = documents(data, tokenizer, max_docs)
    whole = [Document(d.domain, d.ids, 1, d.n_bytes, False) for d in docs]
    _check_context(whole, context, context, {"model": model})
    source = source_index(docs)
    n = int(source.max()) + 1
    counts = np.zeros((n, len(found), experts), np.int64)
    with _inference([model]), _watch(model) as choices:
        for batch in tqdm(_batches(whole, context, context, batch_tokens), desc="expert load", unit="batch", disable=not progress):
            _forward(model, batch)
            for layer, picked in enumerate(_choices(choices, batch)):
                k = picked.shape[1]
                flat = np.repeat(source[batch.doc], k) * experts + picked.numpy().ravel()
                counts[:, layer] += np.bincount(flat, minlength=n * experts).reshape(n, experts)
    return counts, [docs[i].domain for i in np.unique(source, return_index=True)[1]]


def expert_load(model, tokenizer, data, **settings) -> np.ndarray:
    """Share of each domain's picks that goes to each expert: float64 [layers, domains, experts], last axis sums to 1.

    Domains come in the order in which `data` names them first. Settings as in `expert_counts`.
    """
    counts, domains = expert_counts(model, tokenizer, data, **settings)
    return _shares(counts, _one_hot(domains))


def _one_hot(labels: list[str]) -> np.ndarray:
    names = list(dict.fromkeys(labels))
    return np.array([[label == name for label in labels] for name in names], np.float64)  # [domains, sources]


def _shares(counts: np.ndarray, member: np.ndarray) -> np.ndarray:
    load = np.einsum("dn,nle->lde", member, counts)
    return load / load.sum(-1, keepdims=True)


def jensen_shannon(shares: np.ndarray) -> np.ndarray:
    """Generalised Jensen-Shannon divergence of distributions [..., domains, experts], in bits: 0 .. log2(domains).

    Entropy of the mean minus the mean of the entropies (Lin 1991, equation 5.1, equal weights): how many bits a pick
    tells about the domain it was made in.

    >>> float(jensen_shannon(np.array([[1.0, 0.0], [0.0, 1.0]]))), float(jensen_shannon(np.array([[0.5, 0.5], [0.5, 0.5]])))
    (1.0, 0.0)
    """

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)

    return np.maximum(entropy(shares.mean(-2)) - entropy(shares).mean(-1), 0.0)


@dataclass(frozen=True, eq=False)
class Specialisation:
    """How far routing depends on the domain. `bits`: Jensen-Shannon divergence between the domains' expert loads, mean
    over layers; `chance` and `chance_high`: mean and 97.5th percentile of the same figure with sources dealt to
    domains at random; `by_layer`: `bits` of each layer; `p`: share of the random deals that reach `bits`;
    `documents`: how many were dealt, a source counting as one."""

    bits: float
    chance: float
    chance_high: float
    p: float
    by_layer: tuple[float, ...]
    documents: int


def specialisation(counts: np.ndarray, domains: list[str], *, permutations: int = 500, seed: int = 0) -> Specialisation:
    """Whether experts specialise by domain, against chance: a permutation test over sources.

    Takes what `expert_counts` returns. Permuting whole sources keeps the correlation of tokens inside them, and the
    number of sources per domain: what is left is the divergence that finite samples show by themselves.
    Raises ValueError for fewer than two domains.
    """
    member = _one_hot(domains)
    if len(member) < 2:
        raise ValueError(f"specialisation compares domains; data has {len(member)}")
    by_layer = jensen_shannon(_shares(counts, member))
    rng = np.random.default_rng(seed)
    random = [jensen_shannon(_shares(counts, member[:, rng.permutation(len(domains))])).mean() for _ in range(permutations)]
    bits = float(by_layer.mean())
    reached = (1 + sum(bool(r >= bits) for r in random)) / (1 + permutations)
    high = float(np.quantile(random, 0.975))
    return Specialisation(bits, float(np.mean(random)), high, reached, tuple(map(float, by_layer)), len(domains))


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class Scores:
    """Sums per document of one model on one domain; arrays are [documents].

    `nll` counts the end token, `text_nll` does not (both nats). The fields after them compare with the baseline and
    are None for the baseline itself; `correct` is None where there are no answers, `overlap` without routers.
    `token_kld` float32 [tokens] lies document after document. `source` numbers each document's source 0 .. sources - 1;
    None: each document is its own.
    """

    tokens: np.ndarray
    n_bytes: np.ndarray
    nll: np.ndarray
    text_nll: np.ndarray
    correct: np.ndarray | None = None
    kld: np.ndarray | None = None
    token_kld: np.ndarray | None = None
    same_top: np.ndarray | None = None
    overlap: np.ndarray | None = None
    source: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """What `measure` found: `scores[model][domain]`, the models in order, the baseline's name, the data's fingerprint."""

    scores: dict[str, dict[str, Scores]]
    baseline: str
    corpus: str
    context: int
    stride: int

    def domains(self) -> list[str]:
        return list(self.scores[self.baseline])


def _checked_models(models: Mapping[str, torch.nn.Module], baseline: str | None) -> tuple[list[str], str]:
    if not models:
        raise ValueError("models is empty; give {name: model}, the baseline first")
    base = next(iter(models)) if baseline is None else baseline
    if base not in models:
        raise ValueError(f"baseline={base!r} is not one of the models {', '.join(models)}")
    return [base, *(m for m in models if m != base)], base


def measure(
    models: Mapping[str, torch.nn.Module],
    tokenizer,
    data,
    *,
    baseline: str | None = None,
    max_docs: Mapping[str, int] | int | None = QUICK_DOCS,
    context: int = 512,
    stride: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Measured:
    """Per-document sums of every model on the same documents, the models taking turns on each batch.

    `stride` is half the context unless given. Raises ValueError for empty data, for a context that is too short or
    longer than a model's positions, for vocabularies that differ in size or lack a token; FloatingPointError for a model that
    returns NaN.
    """
    order, base = _checked_models(models, baseline)
    stride = max(1, context // 2) if stride is None else stride
    docs = documents(data, tokenizer, max_docs)
    _check_context(docs, context, stride, models)
    sizes = {name: m.config.vocab_size for name, m in models.items() if getattr(m.config, "vocab_size", None)}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise ValueError(f"the models have vocabularies of different sizes ({listed}): evaluate models of one tokenizer together")
    vocabulary = max(sizes.values(), default=0)
    highest = max(int(d.ids.max()) for d in docs)
    for name, model in models.items():
        if highest >= getattr(model.config, "vocab_size", highest + 1):
            raise ValueError(f"token {highest} is outside the vocabulary of model {name!r} ({model.config.vocab_size}): not its tokenizer")
    batches = _batches(docs, context, stride, min(batch_tokens, max(1, _LOGIT_FLOATS // max(1, vocabulary))))

    n = len(docs)
    tokens = np.array([len(d.targets) for d in docs])
    offset = np.concatenate([[0], np.cumsum(tokens)])  # where each document's scored tokens start
    first = np.array([d.first for d in docs])
    scored = np.concatenate([d.targets for d in docs])
    answers = np.array([d.answer for d in docs])
    sums = {m: {k: np.zeros(n) for k in ("nll", "text_nll", "kld", "same_top", "overlap")} for m in order}
    token_kld = {m: np.zeros(offset[-1], np.float32) for m in order[1:]}
    top = {m: np.zeros(offset[-1], np.int64) for m in order}
    shapes = {m: [(r.num_experts, r.top_k) for r in routers(models[m]).values()] for m in order}

    bar = tqdm(total=int(offset[-1]) * len(order), desc="evaluate", unit="tok", disable=not progress)
    with _inference(models.values()), bar:
        for batch in batches:
            place = offset[batch.doc] + batch.target - first[batch.doc]
            targets = torch.from_numpy(scored[place])
            last = place == offset[batch.doc + 1] - 1  # the end token

            def add(name: str, field: str, values: np.ndarray, doc: np.ndarray = batch.doc) -> None:
                sums[name][field] += np.bincount(doc, weights=values, minlength=n)

            for name in order:
                with _watch(models[name]) as choices:
                    logits = _forward(models[name], batch).cpu()
                    picked = _choices(choices, batch)
                logp = torch.log_softmax(logits, -1)
                if torch.isnan(logp).any():
                    raise FloatingPointError(
                        f"model {name!r} returned NaN or infinite logits; its weights are broken or overflow their type"
                    )
                nll = -logp.gather(1, targets[:, None])[:, 0].double().numpy()
                best = logits.argmax(-1)
                del logits
                add(name, "nll", nll)
                add(name, "text_nll", np.where(last, 0.0, nll))
                top[name][place] = best.numpy()
                if name == base:
                    base_logp, base_best, base_picked = logp, best, picked
                else:
                    kld = token_kl(base_logp, logp).numpy()
                    token_kld[name][place] = kld
                    add(name, "kld", kld)
                    add(name, "same_top", same_top(best, base_best).numpy())
                    if picked and shapes[name] == shapes[base]:
                        each = [overlap(a, b).numpy() for a, b in zip(picked, base_picked, strict=True)]
                        add(name, "overlap", np.mean(each, axis=0))
                bar.update(len(targets))

    scores: dict[str, dict[str, Scores]] = {m: {} for m in order}
    for domain in dict.fromkeys(d.domain for d in docs):
        mine = np.array([i for i, d in enumerate(docs) if d.domain == domain])
        spots = np.concatenate([np.arange(offset[i], offset[i + 1]) for i in mine])
        n_bytes = np.array([docs[i].n_bytes for i in mine])
        source = source_index(docs[i] for i in mine)
        for name in order:
            found = {k: v[mine] for k, v in sums[name].items()}
            right = None
            if answers[mine].all():
                right = np.array([exact(top[name][offset[i] : offset[i + 1]], docs[i].targets) for i in mine])
            compared = {}
            if name != base:
                compared = {"kld": found["kld"], "token_kld": token_kld[name][spots], "same_top": found["same_top"]}
                compared["overlap"] = found["overlap"] if shapes[base] and shapes[name] == shapes[base] else None
            scores[name][domain] = Scores(tokens[mine], n_bytes, found["nll"], found["text_nll"], right, **compared, source=source)
    scores = {m: scores[m] for m in models}
    return Measured(scores, base, corpora.fingerprint(data), context, stride)


# ------------------------------------------------------------------------------------------------------- bootstrap


def draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `n` sources is drawn in each resample: float64 [resamples, n], rows sum to n.

    Drawing n of n sources with replacement is a multinomial draw of counts; a resampled sum is then one product.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def weigh(source: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each document counts in each resample of whole sources: float64 [resamples, documents].

    A document counts as often as its source was drawn, so `weigh(...) @ x` is the resampled sum of per-source sums.
    """
    return draws(int(source.max()) + 1, resamples, seed)[:, source]


def spread(values: np.ndarray, sources: int) -> tuple[float | None, float | None]:
    """`interval` of figures that were resampled over `sources`; (None, None) of a single one: nothing was resampled."""
    return interval(values) if sources > 1 else (None, None)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of resampled values: a 95 % percentile interval."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _share_interval(top: np.ndarray, bottom: np.ndarray, source: np.ndarray, weights: np.ndarray) -> tuple[float | None, float | None]:
    """A 95 % interval of the share sum(top) / sum(bottom), per document 0 <= top <= bottom.

    Bootstrap over sources, or the exact binomial bound where every source is all 0 or every one all 1: it bounds the
    probability that a source is so, and with it the share. The bound is one-sided at 97.5 %, as the interval's ends.
    """
    sources = int(source.max()) + 1
    if not top.any():
        return 0.0, 1 - 0.025 ** (1 / sources)
    if np.isclose(top, bottom, rtol=1e-9).all():
        return 0.025 ** (1 / sources), 1.0
    return spread((weights @ top.astype(np.float64)) / (weights @ bottom.astype(np.float64)), sources)


def _resampled_percentile(values: np.ndarray, lengths: np.ndarray, weights: np.ndarray, share: float = 0.99) -> np.ndarray:
    """The percentile `share` of token values under each resample: [resamples].

    `values` lie document after document, `lengths` [documents] tokens each, `weights` [resamples, documents] as of
    `weigh`. Tokens are pooled into at most 1,024 bins
    of equal count over the largest tenth of the values (and 64 below), so a rank is exact to 0.01 % of the tokens
    (exact when the tenth has no more than 1,024 tokens), and memory is bins x (documents + resamples) whatever the text.
    """
    n = len(values)
    order = np.argsort(values, kind="stable")
    tail = n - max(1, math.ceil(10 * (1 - share) * n)) if share > 0.9 else 0
    edges = np.unique(np.concatenate([np.linspace(0, tail, 65), np.linspace(tail, n, 1025)]).astype(np.int64))
    bin_of = np.empty(n, np.int64)
    bin_of[order] = np.searchsorted(edges, np.arange(n), side="right") - 1
    bins = len(edges) - 1
    doc = np.repeat(np.arange(len(lengths)), lengths)
    held = np.bincount(doc * bins + bin_of, minlength=len(lengths) * bins).reshape(len(lengths), bins).astype(np.float32)
    below = np.cumsum(weights.astype(np.float32) @ held, axis=1, dtype=np.float64)
    where = (below < share * below[:, -1:] - 1e-9).sum(1)
    return values[order[edges[1:] - 1]][where]  # the largest value of the bin


def _sources(s: Scores) -> tuple[np.ndarray, int]:
    """(number of each document's source, how many sources)."""
    source = np.arange(len(s.tokens)) if s.source is None else s.source
    return source, int(source.max()) + 1


def count(sources: int, docs: int) -> str:
    """What `Row.n` counts, in words: for the note.

    >>> count(3, 5), count(1, 1)
    ('3 sources (5 documents)', '1 source (1 document)')
    """
    return f"{sources} source{'s' * (sources != 1)} ({docs} document{'s' * (docs != 1)})"


def compare(measured: Measured, a: str, b: str, *, resamples: int = 2000, seed: int = 0) -> Report:
    """ln(perplexity of b / perplexity of a) per domain, nats per token, with its paired bootstrap interval.

    Above 0 where `b` is the worse. An interval that holds 0 says that the documents do not tell the two apart.
    """
    for name in (a, b):
        if name not in measured.scores:
            raise ValueError(f"model {name!r} was not measured; there are {', '.join(measured.scores)}")
    rows = []
    for domain in measured.domains():
        one, two = measured.scores[a][domain], measured.scores[b][domain]
        source, sources = _sources(one)
        w = weigh(source, resamples, seed)
        low, high = spread((w @ (two.nll - one.nll)) / (w @ one.tokens), sources)
        value = float((two.nll - one.nll).sum() / one.tokens.sum())
        common = {"n": sources, "seed": seed, "machine": machine(), "corpus": measured.corpus}
        rows.append(
            Row(
                b,
                "ln_ppl_ratio",
                value,
                "nats/tok",
                domain,
                low,
                high,
                note=f"ln(ppl / ppl of {a}), paired; {count(sources, len(source))}",
                **common,
            )
        )
    return Report(tuple(rows))


def summarise(measured: Measured, *, resamples: int = 2000, seed: int = 0) -> Report:
    """The figures of what `measure` found, each with its paired bootstrap interval over sources.

    Metrics: perplexity, bits_per_byte, exact_match (domains with answers); against the baseline: ln_ppl_ratio, kld,
    kld_p99, same_top, flips (domains with answers), router_overlap (mixtures of experts).
    """
    rows: list[Row] = []
    base = measured.baseline
    for domain in measured.domains():
        reference = measured.scores[base][domain]
        source, sources = _sources(reference)
        w = weigh(source, resamples, seed)  # one set of draws for every model: paired
        counted = count(sources, len(source))
        about = f"{counted}, context {measured.context}, stride {measured.stride}"
        if reference.correct is not None:
            about = f"answers only, {about}"
        common = {"slice": domain, "n": sources, "seed": seed, "machine": machine(), "corpus": measured.corpus}

        for name, by_domain in measured.scores.items():
            s = by_domain[domain]

            def row(metric, unit, top, bottom, f=np.divide, note=about, name=name, w=w, sources=sources, common=common) -> None:
                low, high = spread(f(w @ top, w @ bottom), sources)
                rows.append(Row(name, metric, float(f(top.sum(), bottom.sum())), unit, low=low, high=high, note=note, **common))

            def share(metric, top, bottom, note, name=name, w=w, source=source, common=common) -> None:
                low, high = _share_interval(top, bottom, source, w)
                rows.append(Row(name, metric, float(top.sum() / bottom.sum()), "share", low=low, high=high, note=note, **common))

            each = np.ones(len(source))
            row("perplexity", "", s.nll, s.tokens, perplexity, f"per token, end token counted; {about}")
            row("bits_per_byte", "bit/B", s.text_nll, s.n_bytes, bits_per_byte, f"end token not counted; {about}")
            if s.correct is not None:
                share("exact_match", s.correct, each, f"greedy decoding, the whole answer and its end; {counted}")
            if name == base:
                continue
            row("kld", "nats/tok", s.kld, s.tokens, note=f"KL({base} || {name}), float32 logits; {about}")
            low, high = spread(_resampled_percentile(s.token_kld, s.tokens, w), sources)
            note = f"99th percentile over tokens; {about}"
            rows.append(Row(name, "kld_p99", percentile(s.token_kld), "nats", low=low, high=high, note=note, **common))
            share("same_top", s.same_top, s.tokens, f"same likeliest token as {base}; {about}")
            if s.correct is not None:
                down, up = flips(reference.correct, s.correct)
                note = f"answers whose correctness differs from {base}: {down.mean():.4f} right to wrong, {up.mean():.4f} wrong to right"
                share("flips", down | up, each, f"{note}; {counted}")
            if s.overlap is not None:
                share("router_overlap", s.overlap, s.tokens, f"chosen experts in common with {base}, mean over layers; {about}")
    report = Report(tuple(rows))
    for name in measured.scores:
        if name != base:
            report += compare(measured, base, name, resamples=resamples, seed=seed)
    return report


# ---------------------------------------------------------------------------------------------------- size and speed


def stored_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """(bytes, elements) of a model's parameters and saved buffers, tied ones once."""
    seen = {(t.data_ptr(), t.shape): t for t in model.state_dict().values()}
    return sum(t.nbytes for t in seen.values()), sum(t.numel() for t in seen.values())


def size(models: Mapping[str, torch.nn.Module], *, baseline: str | None = None, sizes: Mapping[str, int] | None = None) -> Report:
    """Rows weight_bytes and bits_per_weight per model, everything counted (scales, routers, norms, embedding, head).

    `sizes` gives a model's bytes where they are known better (a bundle's files, the bf16 original of a model that runs
    in float32); else they are those in memory. Bits per weight divide by the baseline's number of weights: the ones
    that the compressed model stands for.
    """
    order, base = _checked_models(models, baseline)
    weights = stored_bytes(models[base])[1]
    rows = []
    for name in [m for m in models if m in order]:
        given = (sizes or {}).get(name)
        total = stored_bytes(models[name])[0] if given is None else int(given)
        note = "parameters and buffers in memory" if given is None else "as given"
        rows.append(Row(name, "weight_bytes", total, "B", machine=machine(), note=note))
        rows.append(Row(name, "bits_per_weight", 8 * total / weights, "bit", machine=machine(), note=f"{note}; {weights:,} weights"))
    return Report(tuple(rows))


def _threads() -> str:
    layers = sys.modules.get("edgelab.layers")
    return f"torch {torch.get_num_threads()} threads" + (f", kernels {layers.kernel_threads()}" if layers else "")


def speed(
    models: Mapping[str, torch.nn.Module], *, prompt: int = 16, decode: int = 24, prefill: int = 256, repetitions: int = 7, seed: int = 0
) -> Report:
    """Rows tokens_per_s (decoding, batch 1, key-value cache) and prefill_tokens_per_s per model: the median.

    The models take turns, so that a noisy moment of the machine falls on all; the first turn warms up and is not
    counted. The interval is a bootstrap interval of the median over repetitions (2,000 resamples, seeded): how sure the
    median of this sitting is, not how far single repetitions lie from it. The note names the type of the logits.
    """
    _checked_models(models, None)
    most = min(getattr(m.config, "max_position_embeddings", None) or sys.maxsize for m in models.values())
    prefill, prompt = min(prefill, most), max(1, min(prompt, most - decode))
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str], list[float]] = {(m, k): [] for m in models for k in ("tokens_per_s", "prefill_tokens_per_s")}
    ran: dict[str, str] = {}
    with _inference(models.values()):
        for turn in range(repetitions + 1):
            for name, model in models.items():
                ids = torch.from_numpy(rng.integers(0, model.config.vocab_size, (1, max(prompt, prefill)))).to(_device(model))
                began = time.perf_counter()
                model(input_ids=ids[:, :prefill], use_cache=True).logits[:, -1].argmax(-1).tolist()  # tolist waits for the device
                read = time.perf_counter() - began
                out = model(input_ids=ids[:, :prompt], use_cache=True)
                began = time.perf_counter()
                for _ in range(decode):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                out.logits[0, -1].argmax().item()
                ran[name] = str(out.logits.dtype).removeprefix("torch.")
                written = time.perf_counter() - began
                if turn:
                    found[name, "tokens_per_s"].append(decode / written)
                    found[name, "prefill_tokens_per_s"].append(prefill / read)
    notes = {
        "tokens_per_s": f"decoding {decode} tokens after {prompt}, batch 1, key-value cache; {_threads()}",
        "prefill_tokens_per_s": f"reading {prefill} tokens at once, batch 1; {_threads()}",
    }
    rows = []
    for (name, metric), values in found.items():
        drawn = np.random.default_rng(seed).integers(0, repetitions, (2000, repetitions))
        low, high = interval(np.median(np.array(values)[drawn], axis=1))
        value = float(np.median(values))
        note = f"{notes[metric]}; {ran[name]}; median of {repetitions} repetitions, its bootstrap interval"
        rows.append(Row(name, metric, value, "tok/s", low=low, high=high, n=repetitions, seed=seed, machine=machine(), note=note))
    return Report(tuple(rows))


# -------------------------------------------------------------------------------------------------------- the door


def evaluate(
    models: Mapping[str, torch.nn.Module],
    tokenizer,
    data,
    *,
    baseline: str | None = None,
    max_docs: Mapping[str, int] | int | None = QUICK_DOCS,
    context: int = 512,
    stride: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    bootstrap: int = 2000,
    sizes: Mapping[str, int] | None = None,
    speed: bool = True,
    progress: bool = True,
) -> Report:
    """A `Report` of every figure of the module for every model, on the same documents.

    `models` is {name: causal LM}; the first is the baseline unless `baseline` names another. `data` is a Dataset with
    a `text` column and, where there are any, `domain`, `prompt` and `answer` (see `documents`). `max_docs=None` takes
    all documents. `sizes` as in `size`. See `measure` for the errors.
    """
    measured = measure(
        models, tokenizer, data, baseline=baseline, max_docs=max_docs, context=context, stride=stride,
        batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
    report = summarise(measured, resamples=bootstrap, seed=seed) + size(models, baseline=baseline, sizes=sizes)
    return report + _speed(models, seed=seed) if speed else report


_speed = speed


def generate_answers(model, tokenizer, prompts: list[str], *, max_new_tokens: int = 64, batch: int = 64) -> list[list[int]]:
    """The tokens that greedy decoding writes after each prompt, up to and with the end token.

    Prompts of equal length are decoded together, so no padding can touch the result. It is the slow road to exact
    match (`measure` takes the equivalent fast one); use it to look at what a model writes.
    """
    begin, end = _borders(tokenizer)
    ids = [[begin, *p] for p in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
    by_length: dict[int, list[int]] = {}
    for i, p in enumerate(ids):
        by_length.setdefault(len(p), []).append(i)
    result: list[list[int]] = [[] for _ in ids]
    with _inference([model]):
        for length, members in by_length.items():
            for at in range(0, len(members), batch):
                part = members[at : at + batch]
                rows = torch.tensor([ids[i] for i in part], device=_device(model))
                out = model.generate(
                    rows, attention_mask=torch.ones_like(rows), do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                    eos_token_id=end, pad_token_id=end, bos_token_id=begin,
                )[:, length:].tolist()  # fmt: skip
                for i, written in zip(part, out, strict=True):
                    result[i] = written[: written.index(end) + 1] if end in written else written
    return result
