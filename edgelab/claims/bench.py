"""What the entries of the claims ledger share: models, text, a wide random model for speed, and how values get their intervals.

Accuracy is exact match on the two generated tasks, `answers` of each from the test split, against the original on the *same* answers:

    kept   100 * sum(right) / sum(right of the original)      %          lost   100 * (mean right of the original - mean right)    points

with a bootstrap over answers, drawn within each task. Where not one answer differs, resampling would claim certainty: the bound is then
the rate of differing answers that n answers of which none differs still allow, 1 - 0.025^(1/n) (Clopper and Pearson 1934).

Speed is processor time of one thread, calls taken in turns; a ratio is the median over turns of the ratio within a turn, its interval a
bootstrap over turns. Both sides run on our runtime, float32 and rounded alike, with transformers beside them: against transformers alone
much of a ratio would be its overhead.

The embedded models fit into a processor's cache, where bytes cost nothing; `wide` is a random mixture of 85 million
weights, 340 MB in float32, that does not, and stands for a model whose weights have to come from memory. Its *answers* mean nothing.

A small `Bench` (`answers=20`) runs the same code in seconds, for tests.
"""

import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from edgelab.runtime import Runtime
from edgelab.startup import METRICS, Start, _reset_peak, memory, startup_table
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


def run_tokens(runtime: Runtime, ids: Sequence[int], prompt: int = 8) -> None:
    """Reads the first `prompt` of `ids` at once and the others one by one, from an empty slot: what `experts_lab.decode` does in torch."""
    runtime.release(0)
    runtime.admit(0, ids[:prompt])
    for token in ids[prompt:]:
        runtime.step([0], [token])


def exact(model: nn.Module, **settings) -> Runtime:
    """Our runtime with nothing rounded: weights as they are, inputs and cache in float32. One thread."""
    return Runtime(model, threads=1, activations="float32", kv="float32", **settings)


@dataclass(frozen=True)
class Decoding:
    """Processor time per call {name: ms [turns]} of the same 8 tokens read and 16 written; names as in `decoding`."""

    times: Mapping[str, np.ndarray]
    tokens: int
    seed: int = 0

    def faster(self, name: str, than: str = "float32") -> Spread:
        return median_ratio(self.times[than], self.times[name], self.seed)

    def rates(self) -> str:
        return ", ".join(f"{name} {1e3 * self.tokens / np.median(t):,.0f}" for name, t in self.times.items()) + " tokens/s"


def decoding(bench: Bench, scheme: str, kind: str = "wide") -> Decoding:
    """`kind` as our runtime has it in float32 (the original weights, `exact`) and in `scheme` (its defaults), and in torch: transformers on
    the original, and on layers that hold `scheme` and round their inputs to int8."""
    packed = bench.packed(scheme, kind=kind).model
    rounded, ids = copy.deepcopy(packed), bench.ids[0].tolist()
    set_activations(rounded, "int8")
    original = getattr(bench, kind)
    ours = {"float32": exact(original, context=64), scheme: Runtime(packed, threads=1, context=64)}
    calls = {name: partial(run_tokens, runtime, ids) for name, runtime in ours.items()}
    calls |= {"torch float32": partial(decode, original, bench.ids), f"torch with {scheme} layers": partial(decode, rounded, bench.ids)}
    return Decoding(timed(calls, bench.turns), len(ids), bench.seed)


def faster_entry(bench: Bench, claim: str, scheme: str, **beside: str) -> Entry:
    """How many times faster than float32 our runtime decodes the wide model in `scheme`: the entry of A4 and of C1."""
    wide, small = (decoding(bench, scheme, kind) for kind in ("wide", "moe"))
    return found(
        claim,
        f"reading 8 tokens and decoding 16 on our runtime, one thread: float32 weights, inputs and cache against {scheme} with int8 "
        "inputs, the wide random model",
        wide.faster(scheme),
        "x",
        bench.turns,
        "turns, paired bootstrap",
        beside={
            "rates": wide.rates(),
            "against torch in float32": f"{shown(wide.faster(scheme, 'torch float32'))} x",
            "in torch alone": f"{shown(wide.faster(f'torch with {scheme} layers', 'torch float32'))} x: transformers calls our layers one "
            "by one, which takes time that no format saves",
            "the embedded mixture": f"{shown(small.faster(scheme))} x on our runtime: all of it lies in the cache",
        }
        | {name.replace("_", " "): text for name, text in beside.items()},
    )


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


def save(made: Compressed | nn.Module, folder: Path) -> Path:
    """`folder` with a compressed model as a bundle, or a model in its own type."""
    if isinstance(made, Compressed):
        save_bundle(made.model, None, folder, recipe=made.recipe, coverage=made.coverage)
    else:
        made.save_pretrained(folder)
    return folder


def peaks_mib(made: Compressed | nn.Module, *, how: str = "read", repeats: int = 3, tokens: int = 4) -> Spread:
    """Median, least and most MiB of RAM above imports that a process of its own takes at its peak to load a model and decode `tokens`.

    `how` as of `startup.Start`: "read" maps the files and copies them, so that for a moment the weights are there twice.
    """
    with tempfile.TemporaryDirectory() as tmp:
        report = startup_table(save(made, Path(tmp) / "model"), starts=(Start("it", how),), repeats=repeats, tokens=tokens)
    row = report.get(model="it", metric=METRICS["peak_mib"][0])
    return row.value, row.value if row.low is None else row.low, row.value if row.high is None else row.high


@dataclass(frozen=True)
class Way:
    """How a process of its own runs a model: `by` "runtime" (ours, `settings` of `Runtime`) or "transformers"; `dtype` of the latter."""

    by: str = "runtime"
    dtype: str = "float32"
    settings: Mapping[str, object] = field(default_factory=dict)


EXACT = {"activations": "float32", "kv": "float32"}


Run = tuple[Compressed | nn.Module, Compressed | nn.Module, Way]  # the model, a small one of its kind, how


def processes(runs: Mapping[str, Run], *, prompt: int = 64, tokens: int = 4, repeats: int = 2) -> dict[str, list[dict[str, float]]]:
    """{name: [{loaded_mib, steady_mib, growth_mib}]} of `repeats` processes that load a model and run `prompt` and `tokens` through it.

    loaded: resident above the imports once every weight is (weights mapped from files count once, and are touched). growth: the peak while
    prompt and tokens run, above that: activations and cache. steady: resident afterwards, above imports. One thread. One process imports
    everything and runs the small models, so that compiled code counts for no one; each of those measured is forked from it. Linux.
    """
    with tempfile.TemporaryDirectory() as tmp:
        saved, specs = {}, {}
        for name, (made, warm, way) in runs.items():
            for model in (made, warm):
                if id(model) not in saved:
                    saved[id(model)] = str(save(model, Path(tmp) / str(len(saved))))
            specs[name] = {"by": way.by, "dtype": way.dtype, "settings": dict(way.settings), "prompt": prompt, "tokens": tokens}
            specs[name] |= {"folder": saved[id(made)], "warm": saved[id(warm)]}
        code = "import json, sys; from edgelab.claims.bench import _in_here; print(json.dumps(_in_here(*json.load(sys.stdin))))"
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        given = json.dumps([specs, repeats])
        run = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{', '.join(runs)} failed in their processes: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _in_here(specs: dict[str, dict], repeats: int) -> dict[str, list[dict[str, float]]]:
    """The numbers of all, each measured in a fork of this process."""
    import edgelab.hf  # noqa: F401 (from_pretrained knows us)

    torch.set_num_threads(1)
    for spec in specs.values():
        _run_through(_opened(spec, spec["warm"]), 16, 1)
    gc.collect()
    return {name: [_forked(spec) for _ in range(repeats)] for name, spec in specs.items()}


def _forked(spec: dict) -> dict[str, float]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(write, json.dumps(_measured(spec)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    if os.waitpid(child, 0)[1] or not text:
        raise RuntimeError(f"{spec} failed in its process")
    return json.loads(text)


def _measured(spec: dict) -> dict[str, float]:
    _trim()
    start = _reset_peak()["VmRSS"]
    model = _opened(spec, spec["folder"])
    _trim()
    before = _reset_peak()["VmRSS"]
    _run_through(model, spec["prompt"], spec["tokens"])
    after = memory()
    sizes = {"loaded_mib": before - start, "steady_mib": after["VmRSS"] - start, "growth_mib": after["VmHWM"] - before}
    return {name: value / 2**20 for name, value in sizes.items()}


def _trim() -> None:
    """Gives freed memory back to the system: kept, it would be filled again unseen, and what is used next would not show as growth."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _opened(spec: dict, folder: str) -> Runtime | nn.Module:
    if spec["by"] == "runtime":
        return Runtime.open(folder, threads=1, tiles=None, **spec["settings"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec["dtype"])).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().reshape(-1).view(torch.uint8)[::1024].sum().item()  # a mapped page that nobody touched is not resident
    return model


@torch.inference_mode()
def _run_through(model: Runtime | nn.Module, prompt: int, tokens: int) -> None:
    ids = torch.randint(0, 2048, (1, prompt), generator=torch.Generator().manual_seed(0))
    if isinstance(model, Runtime):
        model.admit(0, ids[0].tolist())
        for i in range(tokens):
            model.step([0], [i])
        return
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values  # one row of logits, as ours
    for i in range(tokens):
        model(input_ids=torch.tensor([[i]]), past_key_values=cache, use_cache=True)


def over(found: Sequence[Mapping[str, float]], name: str) -> Spread:
    """(median, least, most) over processes.

    >>> over([{"a": 3.0}, {"a": 1.0}, {"a": 2.0}], "a")
    (2.0, 1.0, 3.0)
    """
    values = [f[name] for f in found]
    return float(np.median(values)), min(values), max(values)


def ratio_of(top: Spread, bottom: Spread) -> Spread:
    """top / bottom with the widest interval that both allow: least over most, most over least.

    >>> ratio_of((2.0, 1.0, 3.0), (4.0, 2.0, 6.0))
    (0.5, 0.16666666666666666, 1.5)
    """
    return top[0] / bottom[0], top[1] / bottom[2], top[2] / bottom[1]


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
