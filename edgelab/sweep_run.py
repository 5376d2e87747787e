"""One run of a sweep: make what a `Configuration` says, measure it, and tell everything that a reader of the sweep may ask as one row.

A sweep asks many configurations the same questions, so what they have in common is done once per process and kept in a `Bench`:
the text, the original models, what the originals say of the text (their logits, so that KL divergence costs no second forward), the
last few structures, and the statistics that GPTQ takes on each. None of it changes a number: a row is a function of its configuration,
`Protocol`, model files and text alone, which its id is a hash of. It is computed on one thread, so that sums come in one order.

Documents are one per source, at most `longest` tokens where they have no answer: at a given cost many short sources tell two models apart
better than few long ones. What is measured are the weights that the codes stand for, in float32; the kernels that read codes agree to
rounding. A model in floating point is rounded to bfloat16 first, which is how it is stored. Intervals are 95 % bootstrap intervals over
sources, prose and code each drawn by themselves; exact match has the exact bound at 0 and 1 (`evaluate`).

The student `edge-phone` is in codes; here it starts from the floats that they stand for, and its KL divergence is to its teacher.
"""

import copy
import hashlib
import json
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, cached_property, lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from edgelab import data
from edgelab.blocks import CalibStats, calibrate
from edgelab.compress import audit, compress, plan, zeros
from edgelab.evaluate import Measured, Scores, _share_interval, documents, measure, spread, weigh
from edgelab.fit import _codes_of_block, round_weight
from edgelab.manifest import sha256
from edgelab.methods.coverage import Coverage
from edgelab.model import Swapper, by_expert, dequantize, load, load_tokenizer, weights
from edgelab.recipe import Quantize, Recipe, Step
from edgelab.runtime_steps import restore, steps_of
from edgelab.shape import ModelShape, from_config
from edgelab.sweep_space import ANSWERS, METRICS, TEACHERS, TEXT, VERSION, Configuration, Protocol

PROVENANCE = "measured at build"
_KEPT = 6  # structures whose model and statistics a process keeps


class _Recorded(nn.Module):
    """A causal language model that answers each batch once and remembers: a reference that many models are compared with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self._model, self._said = model.config, (model,), {}  # in a tuple: no child, no parameters, no routers

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        key = tuple(input_ids.shape), input_ids.numpy().tobytes()
        if key not in self._said:
            self._said[key] = self._model[0](input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache).logits
        return SimpleNamespace(logits=self._said[key])


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch and the kernels compute on one thread: sums come in one order, whatever machine part a worker got."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bench:
    """What the runs of one process share. `bench(protocol)` gives the process' own."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._structures: OrderedDict[tuple[str, tuple[Step, ...]], nn.Module] = OrderedDict()
        self._statistics: OrderedDict[tuple[str, tuple[Step, ...]], CalibStats] = OrderedDict()
        self._originals: dict[str, nn.Module] = {}
        self._recorded: dict[str, _Recorded] = {}

    # ------------------------------------------------------------------------------------------------------- the text

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.protocol.folder / "edge-moe")

    @cached_property
    def _corpus(self):
        return data.corpus()

    @cached_property
    def test(self):
        """The documents, as a Dataset: of each domain one per source in the order of their SHA-256."""
        test, wanted = self._corpus["test"], dict(self.protocol.docs)
        domains, names, texts = test["domain"][:], test["id"][:], test["text"][:]
        order = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{domains[i]}:{names[i]}".encode()).digest())
        chosen, seen = [], set()
        for domain, n in wanted.items():
            mine: list[int] = []
            for i in order:
                source = (domain, names[i].rpartition("#")[0] or names[i])
                if domains[i] != domain or source in seen or len(mine) == n:
                    continue
                if domain in TEXT and len(self.tokenizer(texts[i], add_special_tokens=False)["input_ids"]) + 2 > self.protocol.longest:
                    continue
                seen.add(source)
                mine.append(i)
            if len(mine) < n:
                raise ValueError(f"the test split has {len(mine)} documents of {domain} from different sources, asked are {n}")
            chosen += mine
        # a Dataset of its own: a selection is read through an index of the whole split, each time anew
        return type(test).from_dict(test.select(chosen).to_dict())

    @cached_property
    def documents(self) -> list[dict]:
        """{domain, source, tokens, bytes} of each, in the order of the arrays of a row; tokens and bytes are those scored."""
        return [
            {"domain": d.domain, "source": d.source, "tokens": len(d.targets), "bytes": d.n_bytes}
            for d in documents(self.test, self.tokenizer)
        ]

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        return data.calibration_batches(self.tokenizer, self._corpus["calibration"], tokens=self.protocol.calibration_tokens)

    @cached_property
    def text_hash(self) -> str:
        """12 hex digits of what is tested and calibrated on."""
        h = hashlib.sha256(data.fingerprint(self.test).encode())
        for ids in self.calibration:
            h.update(ids.numpy().tobytes())
        return h.hexdigest()[:12]

    # ------------------------------------------------------------------------------------------------------ the models

    @cache  # noqa: B019 (a bench lives as long as its process)
    def model_hash(self, name: str) -> str:
        """12 hex digits of a model's weights and config, and of those of its teacher."""
        h, folder = hashlib.sha256(), self.protocol.folder / name
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
        if len(files) < 3:
            raise FileNotFoundError(f"{folder} holds no model; models are below {self.protocol.folder}")
        for file in files:
            h.update(sha256(file).encode())
        if name in TEACHERS:
            h.update(self.model_hash(TEACHERS[name]).encode())
        return h.hexdigest()[:12]

    def original(self, name: str) -> nn.Module:
        """The model in floating point, from which recipes start."""
        if name not in self._originals:
            model = load(self.protocol.folder / name)
            dequantize(model)
            self._originals[name] = model
        return self._originals[name]

    def reference(self, name: str) -> _Recorded:
        """What the rows of `name` are compared with."""
        name = TEACHERS.get(name, name)
        if name not in self._recorded:
            self._recorded[name] = _Recorded(self.original(name))
        return self._recorded[name]

    def identify(self, c: Configuration) -> str:
        """12 hex digits of all that decides a row's figures: the configuration, how and on what it is measured, the model."""
        settings = {k: v for k, v in asdict(self.protocol).items() if k != "models"}
        all_ = {"configuration": json.loads(c.to_json()), "protocol": settings, "version": VERSION}
        all_ |= {"model": self.model_hash(c.model), "text": self.text_hash}
        return hashlib.sha256(json.dumps(all_, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]

    # ----------------------------------------------------------------------------------------------------- compressing

    def _structure(self, name: str, steps: tuple[Step, ...]) -> nn.Module:
        """The original after `steps`, which no caller changes. Each step is done on what the steps before it made: kept, not repeated."""
        if not steps:
            return self.original(name)
        key = (name, steps)
        if key not in self._structures:
            before = self._structure(name, steps[:-1])
            self._structures[key] = compress(before, Recipe(steps[-1:]), calibration=self.calibration, progress=False).model
        return _kept(self._structures, key)

    def _stats(self, name: str, steps: tuple[Step, ...]) -> CalibStats:
        key = (name, steps)
        if key not in self._statistics:
            self._statistics[key] = calibrate(self._structure(name, steps), self.calibration, want=("xx",), progress=False)
        return _kept(self._statistics, key)

    def compressed(self, name: str, steps: tuple[Step, ...], step: Quantize | None) -> tuple[nn.Module, Coverage]:
        """(the model with its codes, the audit of it): what `compress(original, recipe, calibration=...)` gives, at less cost."""
        base = self._structure(name, steps)
        if step is None:
            model = copy.deepcopy(base)
            for p in model.parameters():
                p.data = p.data.to(torch.bfloat16).float()
            return model, audit(model)
        if step.method.name == "gptq" and not step.method.sequential and step.activations is None and step.budget is None:
            return self._by_statistics(base, step, self._stats(name, steps))
        made = compress(base, Recipe((step,)), calibration=self.calibration, progress=False)
        return made.model, made.coverage

    def _by_statistics(self, base: nn.Module, step: Quantize, stats: CalibStats) -> tuple[nn.Module, Coverage]:
        """GPTQ that is not sequential looks at the structure alone: all schemes on it share one calibration."""
        schemes = plan(base, Recipe((step,)))[0]
        model, pruned = copy.deepcopy(base), bool(zeros(base))
        item = SimpleNamespace(name="model", stats=stats)
        codes = _codes_of_block(model, item, schemes, step.method, [], False, pruned)
        left = {name: s for name, s in schemes.items() if name not in codes}  # an embedding is looked up: it has no inputs
        codes |= {w.name: round_weight(w, left[w.name], step.method) for w in by_expert(weights(model), left) if w.name in left}
        swapper = Swapper(model, weights(model))
        swapper.put(codes)
        swapper.finish()
        restore(model, steps_of(model))
        return model, audit(model)

    # ------------------------------------------------------------------------------------------------------- measuring

    def run(self, c: Configuration) -> dict:
        """The row of `c` without its id, as plain numbers, texts and lists (an unknown layer error: None). Raises as `compress` does."""
        row = {
            "label": c.label, "model": c.model, "method": c.method, "scheme": c.scheme, "bits": c.bits, "group": c.group,
            "sparsity": c.sparsity, "pattern": c.pattern, "experts": c.experts, "top_k": c.top_k, "channels": c.channels,
            "kept_by": c.kept_by, "ends": c.ends,
        }  # fmt: skip
        return row | self.by_recipe(c.model, c.recipe)

    def by_recipe(self, name: str, recipe: Recipe, step: Callable[[str], None] = lambda _: None) -> dict:
        """What is measured of model `name` after `recipe`: the columns of a row that do not repeat the configuration."""
        steps, last = recipe.steps, None
        if steps and isinstance(steps[-1], Quantize):
            steps, last = steps[:-1], steps[-1]
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small scales, rare experts: a sweep has them by the hundred, and their cost is measured
            step("load")
            self.original(name)
            step("compress")
            self._structure(name, steps)
            began = time.perf_counter()
            model, coverage = self.compressed(name, steps, last)
            shape = shape_of(name, model.config.to_dict(), coverage)
            dequantize(model)
            layers = _layers(self.original(name), model, coverage)
            step("evaluate")
            found = self._measured(name, model)
            seconds = time.perf_counter() - began
        row = {
            "recipe": json.dumps(json.loads(recipe.to_json()), separators=(",", ":")), "size_bytes": coverage.predicted_bytes,
            "bits_per_weight": coverage.bits_per_weight,
        }  # fmt: skip
        row |= figures(found, "row", self.protocol.resamples, self.protocol.seed) | layers
        return row | {
            "read_bytes": shape.decode_bytes(0), "macs": float(shape.active_weights), "kv_bytes": shape.kv_bytes(1), "layers": shape.layers,
            "hidden": shape.hidden, "shape": json.dumps(asdict(shape), separators=(",", ":")), "seconds": round(seconds, 3),
            "provenance": PROVENANCE,
        }  # fmt: skip

    def _measured(self, name: str, model: nn.Module) -> Measured:
        return measure(
            {"reference": self.reference(name), "row": model}, self.tokenizer, self.test, max_docs=None, context=self.protocol.context,
            stride=self.protocol.context, progress=False,
        )  # fmt: skip

    def originals(self) -> dict[str, dict]:
        """{model: bytes and figures of the original that it is compared with}: for the metadata of a stored sweep."""
        found = {}
        with one_thread():
            for name in ("edge-moe", "edge-dense"):
                f = figures(self._measured(name, self.original(name)), "reference", self.protocol.resamples, self.protocol.seed)
                found[name] = {"size_bytes": audit(self.original(name)).predicted_bytes}
                found[name] |= {m: f[m] for m in METRICS[1:]}
        return found | {s: found[t] for s, t in TEACHERS.items()}


def _kept(cache: OrderedDict, key):
    """The entry of `key`, which is now the youngest; the oldest go."""
    cache.move_to_end(key)
    while len(cache) > _KEPT:
        cache.popitem(last=False)
    return cache[key]


@lru_cache(maxsize=1)
def bench(protocol: Protocol) -> Bench:
    """This process' bench."""
    return Bench(protocol)


def run(configuration: Configuration, protocol: Protocol) -> dict:
    """The row of `configuration`: what workers are sent."""
    return bench(protocol).run(configuration)


def measure_configuration(
    model_name: str, recipe: Recipe | str, *, step: Callable[[str], None] = lambda _: None, protocol: Protocol | None = None
) -> dict:
    """One run as the sweep does it: the measured columns of the row of `recipe` (or its JSON) on `model_name`, by name.

    `step` is told "text", "load", "compress", "evaluate" as they begin. A row's recipe gives the row's figures again.
    Raises ValueError for a recipe that is none or does not fit the model, FileNotFoundError for a model that is not there.
    """
    recipe = Recipe.from_json(recipe) if isinstance(recipe, str) else recipe
    here = bench(protocol or Protocol())
    step("text")
    here.model_hash(model_name)
    _ = here.calibration, here.documents
    return {"model": model_name} | here.by_recipe(model_name, recipe, step)


# ---------------------------------------------------------------------------------------------------------- parts of a row


def figures(found: Measured, name: str, resamples: int, seed: int) -> dict:
    """The metrics with their intervals and the arrays per document of model `name`; one without a reference has a KL divergence of 0.

    `doc_kld` counts the end token and `doc_nll` does not, so that their sums over tokens and bytes are `kld` and `bits_per_byte`.
    """
    parts = [found.scores[name][d] for d in TEXT]
    # each domain's sources are drawn by themselves, with a seed of its own: equal seeds would draw equal numbers
    drawn = [weigh(s.source, resamples, seed + i) for i, s in enumerate(parts)]
    kld = [np.zeros(len(s.tokens)) if s.kld is None else s.kld for s in parts]
    row: dict = _ratio("kld", drawn, kld, [s.tokens for s in parts], sum(int(s.source.max()) + 1 for s in parts))
    bits = [s.text_nll / math.log(2) for s in parts]
    row |= _ratio("bits_per_byte", drawn, bits, [s.n_bytes for s in parts], sum(int(s.source.max()) + 1 for s in parts))
    exact: list[bool] = []
    for i, domain in enumerate(ANSWERS):
        s: Scores = found.scores[name][domain]
        low, high = _share_interval(s.correct, np.ones(len(s.correct)), s.source, weigh(s.source, resamples, seed + len(parts) + i))
        row |= {f"em_{domain}": float(s.correct.mean()), f"em_{domain}_low": low, f"em_{domain}_high": high}
        exact += [bool(x) for x in s.correct]
    row |= {"doc_kld": _floats(np.concatenate(kld)), "doc_nll": _floats(np.concatenate([s.text_nll for s in parts])), "doc_exact": exact}
    return row


def _ratio(metric: str, drawn, tops, bottoms, sources: int) -> dict:
    """A ratio of sums over all parts, and its interval."""
    top = sum(w @ t for w, t in zip(drawn, tops, strict=True))
    bottom = sum(w @ b for w, b in zip(drawn, bottoms, strict=True))
    low, high = spread(top / bottom, sources)
    return {metric: float(sum(map(np.sum, tops)) / sum(map(np.sum, bottoms))), f"{metric}_low": low, f"{metric}_high": high}


def _floats(values: np.ndarray) -> list[float]:
    return [float(v) for v in values.astype(np.float32)]


def _layers(original: nn.Module, model: nn.Module, coverage: Coverage) -> dict:
    """Names, bytes and errors of all tensors that are stored: bytes add up to the size."""
    before, after = dict(original.named_parameters()), dict(model.named_parameters())
    names, sizes, errors = [], [], []
    for r in coverage:
        key = next((k for k in (r.name, f"{r.name}.weight") if k in after), None)
        error = None
        if key in before and before[key].shape == after[key].shape and (norm := float(before[key].double().norm())) > 0:
            error = float(np.float32(float((after[key].double() - before[key].double()).norm()) / norm))
        names.append(r.name.removesuffix(".weight"))
        sizes.append(int(r.predicted_bytes))
        errors.append(error)
    return {"layer_name": names, "layer_bytes": sizes, "layer_error": errors}


def shape_of(name: str, config: Mapping, coverage: Coverage) -> ModelShape:
    """What the model reads and computes per token, with the bytes that its audit counts.

    Zeros count as any other weight: a bundle stores them, and no kernel here skips them.
    """
    shape = from_config(config, 16.0, name=name)
    sizes = {"embedding": 0.0, "expert": 0.0, "dense": 0.0}
    head = False
    for r in coverage:
        kind = "embedding" if r.role == "embedding" else "expert" if r.role == "experts" else "dense"
        head |= r.role == "head"
        sizes[kind] += r.predicted_bytes
    return replace(
        shape,
        dense_bytes=sizes["dense"] + (0.0 if head else sizes["embedding"]),
        embedding_bytes=sizes["embedding"] if head else 0.0,
        expert_bytes=sizes["expert"] / (shape.moe_layers * shape.experts) if shape.moe_layers else 0.0,
        source="bytes of the audit",
    )
