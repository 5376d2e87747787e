"""Early exit: easy tokens leave the model behind a middle block, and the deeper blocks are left out for them.

    h   the hidden state behind block `after`
    z = P RMSNorm(h),  logits = head(z)              the exit; P square, the identity at first, the head is the model's own
    confidence = max softmax(logits) >= threshold    then these logits are the answer (CALM, arXiv 2207.07061, section 3.2)

Norm and P are all that learns: from the hidden states of the calibration batches, kept once, by KL(whole model || exit). The
body is frozen, so a step costs two products with the head.

**The threshold** is chosen on the half of the rows that the exit did not learn from, by learn-then-test (arXiv 2110.01052;
CALM, section 4): thresholds are tried from high to low, each by an exact binomial test of "fewer than `agreement` of the tokens
that leave get the whole model's token", and the last one before the first that can't reject it at 5 % is taken. With 95 %
confidence over the choice of held-out tokens, at least `agreement` of the tokens that leave on text of the same kind then
agree. The test takes tokens as independent, which they are not within a text; and it looks at one token behind a
context that the whole model has read, so what exits before it change is not in it: `exit_report` measures that.

**The cache.** A later token that does not leave attends to all earlier ones in the deeper blocks too, so their keys and values
must be there. As in CALM the state at the exit is handed on: each deeper block computes from h what it stores and stops
right there (the cache that it is given stores and then breaks off, whatever the family's attention is). Keys and values
are approximate then. Filling them in later, by whole blocks over all tokens that are missing, would be exact but leaves
no work out, it only puts it together.

Prompts are read by the whole model: exits are for one new token per sequence, in eval mode. In a batch blocks are left out when
all its rows leave; a row's numbers do not depend on the others, for those that leave are handed on in a mixed batch too.

The price: every token pays for the exit's matrix and a product with the head, which in a small model with a large vocabulary
is as much as a block or two. `exit_report` counts it.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.evaluate import documents, routers
from edgelab.metrics.kl_divergence.kl_divergence import token_kl
from edgelab.model import quantized, weights
from edgelab.recipe import EarlyExit

NEVER = 2.0  # a threshold that no probability reaches
ERROR = 0.05  # how often the guarantee may fail
_STEPS = 256  # thresholds k / 256 are numbers of bfloat16 too, whatever a checkpoint is loaded in
_TOKENS = 1024  # of a training step


class ExitHead(nn.Module):
    """z [..., hidden] of h [..., hidden]: P RMSNorm(h). `threshold` float32 [1]."""

    def __init__(self, hidden: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.Parameter(torch.ones(hidden, dtype=dtype, device=device), requires_grad=False)
        self.proj = nn.Linear(hidden, hidden, bias=False, dtype=dtype, device=device).requires_grad_(False)
        self.register_buffer("threshold", torch.full((1,), NEVER, device=device))

    def forward(self, h: Tensor) -> Tensor:
        wide = h.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.proj((normed * self.norm.float()).to(h.dtype))


class _Run:
    """What the patched parts of one model share: settings, and who has left in the pass that is under way."""

    def __init__(self, model: nn.Module, after: int) -> None:
        self.model, self.after = model, after
        self.on, self.everywhere = True, False
        self.seen = self.gone = 0  # tokens that came to the exit, and that left there
        self.left: Tensor | None = None  # bool [rows, tokens]
        self.z: Tensor | None = None
        self.ready: tuple[Tensor, Tensor] | None = None

    def decide(self, h: Tensor) -> None:
        self.left = self.z = self.ready = None
        if not self.on or self.model.training or (h.shape[1] != 1 and not self.everywhere):
            return
        z = self.model.early_exit(h)
        logits = self.model.get_output_embeddings()(z)
        left = logits.float().softmax(-1).amax(-1) >= self.model.early_exit.threshold
        self.seen, gone = self.seen + left.numel(), int(left.sum())
        self.gone += gone
        if gone:
            self.left, self.z = left, z
            self.ready = (z, logits) if gone == left.numel() else None


class _Stored(Exception):
    pass


class _StoreOnly:
    """A key-value cache that breaks off the block once it has stored."""

    def __init__(self, cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str):
        return getattr(self._cache, name)

    def update(self, *args, **kwargs) -> None:
        self._cache.update(*args, **kwargs)
        raise _Stored


# The stand-ins are bound methods on the instances, so that copy.deepcopy binds them to the copy.


def _block_forward(self, hidden_states: Tensor, *args, **kwargs):
    run: _Run = self._exit_run
    if self is run.model.model.layers[run.after]:
        run.decide(hidden_states)
    if run.left is not None and run.left.all():
        cache = kwargs.get("past_key_values")
        if cache is not None:
            with suppress(_Stored):
                type(self).forward(self, hidden_states, *args, **kwargs | {"past_key_values": _StoreOnly(cache)})
        return hidden_states
    out = type(self).forward(self, hidden_states, *args, **kwargs)
    return out if run.left is None else torch.where(run.left[..., None], hidden_states, out)


def _norm_forward(self, hidden_states: Tensor) -> Tensor:
    run: _Run = self._exit_run
    left, z, run.left, run.z = run.left, run.z, None, None
    if left is not None and left.all():
        return z
    out = type(self).forward(self, hidden_states)
    return out if left is None else torch.where(left[..., None], z, out)


def _head_forward(self, hidden_states: Tensor) -> Tensor:
    run: _Run = self._exit_run
    ready, run.ready = run.ready, None
    # z is still held, so nothing else can lie where it lies: these logits are its own
    if ready is not None and hidden_states.data_ptr() == ready[0].data_ptr() and hidden_states.shape == ready[0].shape:
        return ready[1]
    return type(self).forward(self, hidden_states)


# ------------------------------------------------------------------------------------------------------ put and take


def attach(model: nn.Module, step: EarlyExit) -> None:
    """Gives `model` an exit as the submodule `early_exit`, on its device (also meta), which is never taken. Raises ValueError."""
    inner = getattr(model, "model", None)
    layers, norm = getattr(inner, "layers", None), getattr(inner, "norm", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(layers, nn.ModuleList) or norm is None or head is None:
        raise ValueError(
            f"{type(model).__name__} is no decoder with model.layers, model.norm and an output head: an early exit has nowhere to go"
        )
    if not 1 <= step.after < len(layers):
        raise ValueError(f"after={step.after} of EarlyExit must be in 1 .. {len(layers) - 1}: the model has {len(layers)} blocks")
    if hasattr(model, "early_exit"):
        raise ValueError(f"{type(model).__name__} has an early exit already; start from the model without it")
    weight = norm.weight
    eps = next((getattr(norm, a) for a in ("variance_epsilon", "eps") if getattr(norm, a, None) is not None), 1e-6)
    model.early_exit = ExitHead(weight.shape[-1], eps, weight.dtype, weight.device)


def restore(model: nn.Module, step: EarlyExit) -> None:
    """Lets `model`, whose exit is attached and loaded, leave by it."""
    run = _Run(model, step.after)
    inner = model.model
    parts = [(layer, _block_forward) for layer in inner.layers[step.after :]]
    for part, forward in (*parts, (inner.norm, _norm_forward), (model.get_output_embeddings(), _head_forward)):
        part.__dict__["_exit_run"] = run
        part.__dict__["forward"] = MethodType(forward, part)
    model.__dict__["_exit_run"] = run


@contextmanager
def exits(model: nn.Module, on: bool = True, everywhere: bool = False) -> Iterator[_Run]:
    """Inside, exits are taken or not; `everywhere`: also in passes over many tokens, as if each had been decoded. For evaluation.

    Gives a counter: `.seen` tokens came to the exit inside, `.gone` of them left.
    """
    run = model.__dict__.get("_exit_run")
    if run is None:
        raise ValueError(f"{type(model).__name__} has no early exit; compress it with a Recipe that ends with EarlyExit()")
    before = run.on, run.everywhere
    run.on, run.everywhere, run.seen, run.gone = on, everywhere, 0, 0
    try:
        yield run
    finally:
        run.on, run.everywhere = before


def early_exit(model: nn.Module, step: EarlyExit, batches: Sequence[Tensor], progress: bool = True) -> list[str]:
    """Remarks, after `model` got an exit that was learnt and tested on token ids [rows, length]. In place.

    Half of the rows teach, half test. Raises ValueError for fewer than two rows, and what `attach` refuses.
    """
    rows = [row for batch in batches for row in batch] if batches else []
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} rows of calibration data: EarlyExit learns from one half and is tested on the other; give two or more"
        )
    attach(model, step)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(step.seed)).tolist()
    half = len(rows) // 2
    taught, held = ([rows[i] for i in part] for part in (order[:half], order[half:]))
    mode = model.training
    model.eval()
    try:
        _learn(model, step, *_states(model, step, taught), progress)
        confidence, agrees = _held_out(model, *_states(model, step, held))
    finally:
        model.train(mode)
    threshold = choose_threshold(confidence, agrees, step.agreement)
    model.early_exit.threshold.fill_(threshold)
    restore(model, step)
    where = f"the exit behind block {step.after} of {len(model.model.layers)}"
    if threshold == NEVER:
        return [
            f"{where} is never taken: on {len(confidence):,} held-out tokens no confidence assures that {step.agreement:.1%} of the "
            "tokens that leave agree with the whole model; ask for less, put it deeper or give more data"
        ]
    gone = confidence >= threshold
    return [
        f"{where} is taken at a confidence of {threshold:.4f} or more: by {gone.float().mean():.1%} of {len(gone):,} held-out tokens, of "
        f"which {agrees[gone].float().mean():.2%} get the whole model's token (asked for: {step.agreement:.1%}, tested at "
        f"{1 - ERROR:.0%} as if tokens were independent)"
    ]


def choose_threshold(confidence: Tensor, agrees: Tensor, agreement: float) -> float:
    """The least threshold k / 256 that passes, with all tried before it: `confidence` float and `agrees` bool [tokens]; else `NEVER`.

    Testing begins where so many tokens leave that one error among them passes, which the confidences alone decide.

    >>> choose_threshold(torch.tensor([0.9] * 300 + [0.5] * 300), torch.tensor([True] * 300 + [False] * 300), 0.98)
    0.50390625
    """
    best = NEVER
    for k in range(_STEPS - 1, 0, -1):
        gone = confidence >= k / _STEPS
        n, wrong = int(gone.sum()), int((gone & ~agrees).sum())
        if not n or binom.cdf(1, n, 1 - agreement) > ERROR:
            continue  # too few to pass with one error
        if binom.cdf(wrong, n, 1 - agreement) > ERROR:
            break
        best = k / _STEPS
    return best


@torch.no_grad()
def _states(model: nn.Module, step: EarlyExit, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(hidden states behind block `after`, states that the head reads), each [tokens, hidden]."""
    found: dict[str, list[Tensor]] = {"exit": [], "end": []}
    device = model.model.norm.weight.device

    def keeper(key: str):
        return lambda _module, _inputs, out: found[key].append((out if isinstance(out, Tensor) else out[0]).flatten(0, -2))

    handles = [
        model.model.layers[step.after - 1].register_forward_hook(keeper("exit")),
        model.model.norm.register_forward_hook(keeper("end")),
    ]
    try:
        for row in rows:
            model.model(input_ids=row[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found["exit"]), torch.cat(found["end"])


def _learn(model: nn.Module, step: EarlyExit, hidden: Tensor, end: Tensor, progress: bool) -> None:
    """Adam on norm and matrix; the rate falls to 0 as a half cosine."""
    exit_, head = model.early_exit, model.get_output_embeddings()
    with torch.no_grad():
        exit_.norm.copy_(model.model.norm.weight)
        exit_.proj.weight.copy_(torch.eye(len(exit_.norm)))
    learnt = [p.requires_grad_(True) for p in (exit_.norm, exit_.proj.weight)]
    optimiser = torch.optim.Adam(learnt, lr=step.lr)
    draw = torch.Generator().manual_seed(step.seed)
    try:
        for i in tqdm(range(step.steps), desc="early exit", unit="step", disable=not progress):
            for group in optimiser.param_groups:
                group["lr"] = step.lr * 0.5 * (1 + math.cos(math.pi * i / step.steps))
            at = torch.randint(len(hidden), (min(_TOKENS, len(hidden)),), generator=draw).to(hidden.device)
            with torch.no_grad():
                expected = head(end[at]).float().log_softmax(-1)
            with torch.enable_grad():
                got = head(exit_(hidden[at])).float().log_softmax(-1)
                loss = F.kl_div(got, expected, log_target=True, reduction="batchmean")
                grads = torch.autograd.grad(loss, learnt)
            for p, g in zip(learnt, grads, strict=True):
                p.grad = g
            optimiser.step()
    finally:
        for p in learnt:
            p.requires_grad_(False)
            p.grad = None


@torch.no_grad()
def _held_out(model: nn.Module, hidden: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(confidence of the exit, whether its token is the whole model's), each [tokens]."""
    head, sure, same = model.get_output_embeddings(), [], []
    for h, e in zip(hidden.split(_TOKENS), end.split(_TOKENS), strict=True):
        p, token = head(model.early_exit(h)).float().softmax(-1).max(-1)
        sure.append(p)
        same.append(token == head(e).argmax(-1))
    return torch.cat(sure).cpu(), torch.cat(same).cpu()


# ------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class ExitReport:
    """What exits do on text, every token treated as if decoded. Multiply-adds are those of weights, per token; attention's own
    products, which grow with the text, are left out of both. `agreement`: of the tokens that leave, with the whole model's."""

    tokens: int
    left: float
    agreement: float
    same_top: float
    kld: float
    macs_whole: float
    macs: float

    @property
    def saved(self) -> float:
        """Share of the multiply-adds that is saved; below 0 where the exit costs more than it leaves out."""
        return 1 - self.macs / self.macs_whole


@torch.no_grad()
def exit_report(model: nn.Module, batches: Sequence[Tensor]) -> ExitReport:
    """An `ExitReport` of token ids [rows, length]: exits taken everywhere, against none at all."""
    tokens = gone = agreed = same = 0
    kld = 0.0
    device = model.model.norm.weight.device
    for batch in batches:
        ids = batch.to(device)
        with exits(model, on=False):
            whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        masks: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, _inputs, masks=masks: masks.append(module._exit_run.left))
        try:
            with exits(model, everywhere=True):
                mixed = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        finally:
            handle.remove()
        left = torch.zeros(len(whole), dtype=torch.bool, device=device) if masks[0] is None else masks[0].flatten()
        hit = whole.argmax(-1) == mixed.argmax(-1)
        tokens, gone, agreed = tokens + len(whole), gone + int(left.sum()), agreed + int((hit & left).sum())
        same, kld = same + int(hit.sum()), kld + float(token_kl(whole, mixed).sum())
    whole_macs, stays, leaves = exit_macs(model)
    macs = (gone * leaves + (tokens - gone) * stays) / tokens
    return ExitReport(tokens, gone / tokens, agreed / gone if gone else float("nan"), same / tokens, kld / tokens, whole_macs, macs)


def exit_macs(model: nn.Module) -> tuple[float, float, float]:
    """Multiply-adds per token of: the model without its exit, a token that comes to the exit and stays, one that leaves."""
    each = multiply_adds(model)
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    run: _Run = model._exit_run
    own = each.pop("early_exit.proj")
    deep = tuple(f"model.layers.{i}." for i in range(run.after, len(model.model.layers)))
    whole = sum(each.values())
    stored = _computed_for_the_cache(model, deep)
    left_out = sum(n for name, n in each.items() if name.startswith(deep) and name not in stored)
    return whole, whole + own + each[head], whole + own - left_out


def multiply_adds(model: nn.Module) -> dict[str, float]:
    """{weight name: multiply-adds per token}: of a stack of experts those of the k that a token gets; an embedding has none."""
    k = {name.rpartition(".")[0]: (r.top_k, r.num_experts) for name, r in routers(model).items()}
    listed = [(w.name, w.kind, w.shape) for w in weights(model)]
    listed += [
        (n, {"experts": "experts", "embedding": "embedding"}.get(role, "linear"), q.shape) for n, (role, q) in quantized(model).items()
    ]
    found: dict[str, float] = {}
    for name, kind, shape in listed:
        if kind == "embedding":
            continue
        count = float(math.prod(shape))
        if kind == "experts":
            top_k, experts = k[name.partition(".experts")[0]]
            count *= top_k / experts
        found[name.partition("#")[0]] = found.get(name.partition("#")[0], 0.0) + count
    return found


@torch.no_grad()
def _computed_for_the_cache(model: nn.Module, deep: tuple[str, ...]) -> set[str]:
    """The weights of the deeper blocks that a token uses although it left: tried, for families differ."""
    used: set[str] = set()
    names = {name: m for name, m in model.named_modules() if name.startswith(deep) and not any(True for _ in m.children())}
    handles = [m.register_forward_hook(lambda _m, _i, _o, name=name: used.add(name)) for name, m in names.items()]
    threshold = model.early_exit.threshold.clone()
    mode = model.training
    try:
        model.eval()
        model.early_exit.threshold.zero_()
        with exits(model):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=threshold.device), use_cache=True)
    finally:
        model.train(mode)
        model.early_exit.threshold.copy_(threshold)
        for handle in handles:
            handle.remove()
    return used


# ------------------------------------------------------------------------------------------------------------ decoding


@dataclass(frozen=True)
class Written:
    """Tokens that greedy decoding wrote, the seconds after the prompt was read, and the share of them that left early."""

    ids: list[int]
    seconds: float
    left: float

    @property
    def tokens_per_s(self) -> float:
        return max(0, len(self.ids) - 1) / self.seconds if self.seconds else 0.0  # the prompt gives the first


@torch.inference_mode()
def generate(model: nn.Module, ids: Tensor, max_new_tokens: int = 64, eos: int | None = None, on: bool = True) -> Written:
    """What greedy decoding writes after `ids` [length] or [1, length], up to and with `eos`; `on=False`: without exits."""
    with exits(model, on=on) as run:
        out = model(input_ids=ids.reshape(1, -1), use_cache=True)
        run.seen = run.gone = 0
        written = [int(out.logits[0, -1].argmax())]
        began = time.perf_counter()
        while len(written) < max_new_tokens and written[-1] != eos:
            step = torch.tensor([[written[-1]]], device=ids.device)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
            written.append(int(out.logits[0, -1].argmax()))
        return Written(written, time.perf_counter() - began, run.gone / run.seen if run.seen else 0.0)


@dataclass(frozen=True)
class Answers:
    """Answers written with and without exits. `exact` and `exact_whole`: shares that equal the reference; `same`: each other."""

    prompts: int
    exact: float
    exact_whole: float
    same: float
    left: float
    tokens_per_s: float
    tokens_per_s_whole: float


def answers(model: nn.Module, tokenizer, data, n: int = 32, domain: str = "assistant") -> Answers:
    """An `Answers` of the first `n` prompts of `domain` in `data` (one split of the corpus), decoded one by one, in turns."""
    docs = [d for d in documents(data, tokenizer, {domain: n}) if d.domain == domain and d.answer][:n]
    if not docs:
        raise ValueError(f"data has no rows of domain={domain!r} with answers; give one split, such as corpus()['test']")
    totals = {True: [0, 0.0, 0], False: [0, 0.0, 0]}  # on: tokens, seconds, exact
    same = left = 0.0
    model.eval()
    for d in docs:
        prompt, wanted, wrote = torch.from_numpy(d.ids[: d.first]), d.targets.tolist(), {}
        for on in (True, False):
            w = generate(model, prompt, len(wanted) + 16, eos=int(d.ids[-1]), on=on)
            wrote[on] = w.ids
            total = totals[on]
            total[0], total[1], total[2] = total[0] + len(w.ids) - 1, total[1] + w.seconds, total[2] + (w.ids == wanted)
            left += w.left * (len(w.ids) - 1) if on else 0
        same += wrote[True] == wrote[False]
    rate = {on: t[0] / t[1] if t[1] else 0.0 for on, t in totals.items()}
    exact, whole = (totals[on][2] / len(docs) for on in (True, False))
    return Answers(len(docs), exact, whole, same / len(docs), left / max(1, totals[True][0]), rate[True], rate[False])
