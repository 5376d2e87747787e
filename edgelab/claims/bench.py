"""What the entries of the claims ledger share: models, text, a wide random model for speed, and how values get their intervals.

Accuracy is exact match on the two generated tasks, `answers` of each from the test split, against the original on the *same* answers:

    kept   100 * sum(right) / sum(right of the original)      %          lost   100 * (mean right of the original - mean right)    points

with a bootstrap over answers, drawn within each task. Where not one answer differs, resampling would claim certainty: the bound is then
the rate of differing answers that n answers of which none differs still allow, 1 - 0.025^(1/n) (Clopper and Pearson 1934).

Speed is processor time of one thread, calls taken in turns; a ratio is the median over turns of the ratio within a turn, its interval a
bootstrap over turns. The embedded models fit into a processor's cache, where bytes cost nothing; `wide` is a random mixture of 85 million
weights, 340 MB in float32, that does not, and stands for a model whose weights have to come from memory. Its *answers* mean nothing.

A small `Bench` (`answers=20`) runs the same code in seconds, for tests.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from edgelab import data
from edgelab.bundle import save_bundle
from edgelab.compress import Compressed, compress
from edgelab.evaluate import interval, measure, summarise
from edgelab.experts_lab import decode
from edgelab.kernels._jit import set_threads
from edgelab.layers import set_activations
from edgelab.ledger import Entry, entries_of
from edgelab.model import load, load_tokenizer
from edgelab.paths import data_dir
from edgelab.recipe import Recipe
from edgelab.report import Report, machine
from edgelab.startup import METRICS, Start, startup_table
from edgelab.vision import latencies_ms

TASKS = ("assistant", "arithmetic")
RESAMPLES = 4000
Spread = tuple[float, float, float]  # value, low, high


@dataclass
class Bench:
    """Models and text, loaded when first asked for. `answers`: of each task; `documents`: of prose and code; `turns`: of a timing."""

    answers: int = 500
    documents: int = 12
    turns: int = 15
    calibration_tokens: int = 32_768
    wide_layers: int = 4
    seed: int = 0
    reads: int = 0  # how often the test split was read

    @cached_property
    def moe(self) -> nn.Module:
        return load(data_dir() / "edge-moe")

    @cached_property
    def dense(self) -> nn.Module:
        return load(data_dir() / "edge-dense")

    @cached_property
    def tokenizer(self):
        return load_tokenizer(data_dir() / "edge-moe")

    @cached_property
    def corpus(self):
        return data.corpus()

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        return data.calibration_batches(self.tokenizer, self.corpus["calibration"], tokens=self.calibration_tokens, context=256)

    @cached_property
    def training(self) -> list[torch.Tensor]:
        rows = data.calibration_batches(self.tokenizer, self.corpus["train"], tokens=40 * self.calibration_tokens, context=256)
        return [b for b in rows if b.shape[1] == 256]

    @cached_property
    def ids(self) -> torch.Tensor:
        """int64 [1, 24]: what is decoded where only the time counts."""
        return torch.randint(0, 2048, (1, 24), generator=torch.Generator().manual_seed(self.seed))

    @cached_property
    def wide(self) -> nn.Module:
        return wide(self.wide_layers, self.seed)

    def packed(self, scheme: str, *, kind: str = "moe", **settings) -> Compressed:
        """`kind` ("moe", "dense" or "wide") in `scheme`, rounded to nearest unless a method is given. Kept: asked twice, made once."""
        key = (scheme, kind, repr(settings))
        made = self.__dict__.setdefault("_packed", {})
        if key not in made:
            recipe = Recipe.uniform(scheme, **settings)
            calibration = None if recipe.steps[0].data_free else self.calibration
            made[key] = compress(getattr(self, kind), recipe, calibration=calibration, progress=False)
        return made[key]

    @cached_property
    def fingerprint(self) -> str:
        """Of the test split."""
        return data.fingerprint(self.corpus["test"])

    @property
    def test(self):
        """The test split; reading it is counted, so that an entry can say which text it rests on."""
        self.reads += 1
        return self.corpus["test"]

    def _test(self, domains: Iterable[str]):
        test, wanted = self.test, set(domains)
        return test.select([i for i, d in enumerate(test["domain"]) if d in wanted])

    def right(self, model: nn.Module) -> dict[str, np.ndarray]:
        """{task: bool [answers]}: which answers of the test split `model` gives. Kept for as long as the model lives."""
        known = self.__dict__.setdefault("_right", WeakKeyDictionary())
        self.reads += 1
        if model not in known:
            docs = dict.fromkeys(TASKS, self.answers)
            measured = measure({"model": model}, self.tokenizer, self._test(TASKS), max_docs=docs, progress=False)
            known[model] = {d: s.correct.astype(bool) for d, s in measured.scores["model"].items()}
        return known[model]

    def compared(self, other: nn.Module, original: nn.Module | None = None) -> "Compared":
        """`other` against `original` (the embedded mixture) on the answers of both tasks and on some prose and code."""
        original = self.moe if original is None else original
        docs = {"prose": self.documents, "code": self.documents}
        pair = {"original": original, "other": other}
        report = summarise(measure(pair, self.tokenizer, self._test(docs), max_docs=docs, context=256, progress=False))
        return Compared(self.right(original), self.right(other), report)


def wide(layers: int = 4, seed: int = 0) -> nn.Module:
    """A random DeepSeek-V3 of which the 16 experts, 2 of them active, are nine tenths of the weights: 21 million of these per layer."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=16, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16,
        v_head_dim=64, num_nextn_predict_layers=0, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim >= 2:
                    p.normal_(0, 0.02)
    return model


# ------------------------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Compared:
    """A model against its original on the same documents."""

    original: Mapping[str, np.ndarray]
    other: Mapping[str, np.ndarray]
    report: Report

    @property
    def answers(self) -> int:
        return sum(map(len, self.original.values()))

    def kept(self, seed: int = 0) -> Spread:
        return kept(self.original, self.other, seed)

    def lost(self, seed: int = 0) -> Spread:
        return lost(self.original, self.other, seed)

    def beside(self) -> dict[str, str]:
        """Other figures that belong beside an exact match."""
        other, original = (100 * float(np.mean([r.mean() for r in m.values()])) for m in (self.other, self.original))
        found = {"exact match": f"{other:.1f} %, original {original:.1f} %"}
        for metric, name, scale, unit in (("same_top", "same top token", 100, " %"), ("kld", "KL divergence, nats per token", 1, "")):
            texts = []
            for domain in ("prose", "code"):
                for row in self.report.where(model="other", metric=metric, slice=domain):
                    texts.append(f"{domain} {scale * row.value:.3g}{unit}")
            if texts:
                found[name] = ", ".join(texts)
        return found


def _drawn(right: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """{task: how often each answer counts in each resample, [RESAMPLES, answers]}."""
    rng = np.random.default_rng(seed)
    return {d: rng.multinomial(len(r), np.full(len(r), 1 / len(r)), size=RESAMPLES).astype(np.float32) for d, r in right.items()}


def _shares(right: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """(mean over tasks of the share that is right, the same in each resample)."""
    each = np.mean([drawn[d] @ r.astype(np.float32) / len(r) for d, r in right.items()], axis=0)
    return float(np.mean([r.mean() for r in right.values()])), each


def lost(original: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], seed: int = 0) -> Spread:
    """Points of exact match that `other` {task: bool [answers]} loses against `original`, with a 95 % interval over answers, paired.

    >>> a = {"t": np.array([True] * 9 + [False])}
    >>> tuple(round(v, 2) for v in lost(a, a))
    (0.0, -30.85, 30.85)
    """
    drawn = _drawn(original, seed)
    (a, many_a), (b, many_b) = _shares(original, drawn), _shares(other, drawn)
    low, high = interval(100 * (many_a - many_b))
    if all((original[d] == other[d]).all() for d in original):
        bound = 100 * (1 - 0.025 ** (1 / sum(map(len, original.values()))))
        low, high = -bound, bound
    value = 100 * (a - b)
    return value, min(low, value), max(high, value)


def kept(original: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], seed: int = 0) -> Spread:
    """Per cent of the original's right answers' number that `other` gives, with its interval, as in `lost`.

    Raises ValueError where the original answers nothing right: there is nothing to keep.
    """
    drawn = _drawn(original, seed)
    (a, many_a), (b, many_b) = _shares(original, drawn), _shares(other, drawn)
    if not a:
        raise ValueError("the original answers nothing right: there is no accuracy to keep")
    low, high = interval(100 * many_b / np.maximum(many_a, 1e-9))
    if all((original[d] == other[d]).all() for d in original):
        bound = 100 * (1 - 0.025 ** (1 / sum(map(len, original.values())))) / a
        low, high = 100 - bound, 100 + bound
    value = 100 * b / a
    return value, min(low, value), max(high, value)


# ---------------------------------------------------------------------------------------------------------------- speed


@contextmanager
def one_thread():
    """Kernels and torch on one thread: processor time of the calling thread is then all of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    set_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        set_threads(None)


def timed(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, np.ndarray]:
    """{name: milliseconds of processor time per call, [turns]}, calls in turns, on one thread."""
    with one_thread(), torch.inference_mode():
        return latencies_ms(calls, turns=turns)


def median_ratio(top: Sequence[float], bottom: Sequence[float], seed: int = 0) -> Spread:
    """The median over turns of top / bottom, with its 95 % bootstrap interval over turns.

    >>> median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    (2.0, 2.0, 2.0)
    """
    ratios = np.asarray(top, float) / np.asarray(bottom, float)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = interval(np.median(ratios[drawn], axis=1))
    return float(np.median(ratios)), low, high


def decoding(bench: Bench, scheme: str) -> dict[str, Spread]:
    """{what: how many times faster than float32 it decodes}, on the wide model and the embedded one, inputs float32 or int8."""
    ratios = {}
    for kind in ("wide", "moe"):
        packed = bench.packed(scheme, kind=kind).model
        rounded = copy.deepcopy(packed)
        set_activations(rounded, "int8")
        calls = {"float32": getattr(bench, kind), scheme: packed, f"{scheme}, int8 inputs": rounded}
        times = timed({name: partial(decode, m, bench.ids) for name, m in calls.items()}, bench.turns)
        for name in list(times)[1:]:
            ratios[f"{kind}, {name}"] = median_ratio(times["float32"], times[name], bench.seed)
    return ratios


def less(ratio: Spread) -> Spread:
    """A ratio of what is left as "% less", with its interval the right way round.

    >>> less((0.6, 0.5, 0.7))
    (40.0, 30.0, 50.0)
    """
    value, low, high = ratio
    return tuple(round(100 * (1 - v), 9) for v in (value, high, low))


def shown(spread: Spread, digits: int = 2) -> str:
    """A value with its interval as text.

    >>> shown((1.234, 1.1, 1.4))
    '1.23 [1.10, 1.40]'
    """
    value, low, high = spread
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# ------------------------------------------------------------------------------------------------------- bytes, memory


def file_bytes(made: Compressed | nn.Module, tokenizer=None) -> int:
    """Bytes of the safetensors files of a compressed model as a bundle, or of a model in its own type."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp) / "model"
        if isinstance(made, Compressed):
            save_bundle(made.model, tokenizer, folder, recipe=made.recipe, coverage=made.coverage)
        else:
            made.save_pretrained(folder)
        return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def peaks_mib(models: Mapping[str, Compressed | nn.Module], *, how: str = "read", repeats: int = 3, tokens: int = 4) -> dict[str, Spread]:
    """{name: median, least and most MiB of RAM above imports} that a process of its own takes to load each and decode `tokens`."""
    found = {}
    for name, made in models.items():
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp) / "model"
            if isinstance(made, Compressed):
                save_bundle(made.model, None, folder, recipe=made.recipe, coverage=made.coverage)
            else:
                made.save_pretrained(folder)
            report = startup_table(folder, starts=(Start(name, how),), repeats=repeats, tokens=tokens)
            row = report.get(model=name, metric=METRICS["peak_mib"][0])
            found[name] = (row.value, row.value if row.low is None else row.low, row.value if row.high is None else row.high)
    return found


def half_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of `model` in `dtype`: what the 16-bit original takes."""
    return copy.deepcopy(model).to(dtype)


# --------------------------------------------------------------------------------------------------------------- entries


def counted(claim: str, ran: str, value: float, unit: str, n: int = 1, by: str = "counted, not sampled", **more) -> Entry:
    """An entry whose value is arithmetic: its interval has no width."""
    return Entry(claim, ran, float(value), float(value), float(value), unit, n, by, machine=machine(), **more)


def found(claim: str, ran: str, spread: Iterable[float], unit: str, n: int, by: str, **more) -> Entry:
    """An entry with an interval: (value, low, high)."""
    value, low, high = map(float, spread)
    return Entry(claim, ran, value, low, high, unit, int(n), by, machine=machine(), **more)


def study_path() -> Path:
    """Where the entries lie that were measured at build."""
    return data_dir() / "studies" / "claims.json"


def stored(claim: str, path: Path | None = None) -> Entry:
    """The entry of `claim` that was measured at build. Raises LookupError, naming the command that makes it, where there is none."""
    path = path or study_path()
    known = {e.claim: e for e in entries_of(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    if claim not in known:
        raise LookupError(f"claim {claim} was not measured at build; `python -m edgelab.claims.index {claim}` does it")
    return known[claim]
