"""The project's tables as functions: `quality(seed, docs=..., ...)` measures one and returns its cells. `reproduce` runs them.

A seed stands for what a paper would call a run: the documents that are drawn from the test split, the tokens of calibration, the rows
that learning sees. The same seed, settings and code give the same numbers, up to how a machine adds floats.

What a cell is decides how it can be compared with another day's:

    counted    bytes, bits, shares of zeros: must be equal to the last digit
    said       a word, such as a verdict: must be equal
    measured   a figure of a model: equal within what another order of additions changes (`reproduce.tolerance`)
    bounded    an error that only has to stay below `limit`, which follows from the arithmetic: its digits mean nothing
    time       seconds, speeds and their ratios: of this machine and minute; printed, never judged

`step` is the least that a measured value can change by: one answer of 240 is 100 / 240 per cent.

Documents are few, so that all of it takes minutes: intervals are wide, the order of methods is not for sale. The README's tables come from
the same functions with more documents (`edgelab demo`, `edgelab compare`, `python -m edgelab.studies`).
"""

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from types import MappingProxyType

KINDS = ("measured", "counted", "bounded", "said", "time")


@dataclass(frozen=True)
class Cell:
    """One number or word of a table: `row` and `column` name it. See the module for `kind`, `limit` (of "bounded") and `step`."""

    row: str
    column: str
    value: float | int | str
    kind: str = "measured"
    low: float | None = None
    high: float | None = None
    step: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cell {self.row} / {self.column}: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if isinstance(self.value, str) != (self.kind == "said"):
            raise ValueError(f"cell {self.row} / {self.column}: {self.value!r} is {self.kind!r}; text is 'said', and only text")
        if self.value != self.value:
            raise ValueError(f"cell {self.row} / {self.column} is not a number (NaN): something before it went wrong")
        if (self.kind == "bounded") != (self.limit is not None):
            raise ValueError(f"cell {self.row} / {self.column}: 'bounded' goes with a limit, and a limit with 'bounded'")

    @property
    def key(self) -> str:
        return f"{self.row} | {self.column}"

    @property
    def text(self) -> str:
        """As it is printed.

        >>> Cell("int4", "KLD", 0.05123, low=0.05, high=0.0533).text, Cell("int4", "bytes", 4178232, "counted").text
        ('0.0512 [0.0500, 0.0533]', '4,178,232')
        """
        between = "" if self.low is None or self.low == self.high == self.value else f" [{shown(self.low)}, {shown(self.high)}]"
        return shown(self.value) + between


def shown(value: float | str) -> str:
    """A value with three or four digits that count.

    >>> shown(0.05123), shown(98.64), shown(4178232), shown(1.4e-13), shown("yes"), shown(0.0)
    ('0.0512', '98.64', '4,178,232', '1.4e-13', 'yes', '0')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    size = abs(value)
    return f"{value:.1e}" if size < 1e-4 else f"{value:.4f}" if size < 1 else f"{value:.3f}" if size < 20 else f"{value:,.2f}"


@dataclass(frozen=True)
class Made:
    """The cells of one table and one seed. Shows itself as a table."""

    name: str
    title: str
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        keys = [c.key for c in self.cells]
        if twice := {k for k in keys if keys.count(k) > 1}:
            raise ValueError(f"table {self.name}: two cells are called {sorted(twice)[0]!r}")
        if not self.cells:
            raise ValueError(f"table {self.name} has no cell: nothing was measured")

    def rows(self) -> list[str]:
        return list(dict.fromkeys(c.row for c in self.cells))

    def columns(self) -> list[str]:
        return list(dict.fromkeys(c.column for c in self.cells))

    def to_json(self) -> str:
        d = {"format": 1, "name": self.name, "title": self.title, "cells": [asdict(c) for c in self.cells]}
        return json.dumps(d, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Made":
        """Raises ValueError for what is no table of this format."""
        try:
            d = json.loads(text)
            return cls(d["name"], d["title"], tuple(Cell(**c) for c in d["cells"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"these are no cells of a table, or damaged ones: {error}") from error

    def __repr__(self) -> str:
        return f"{self.title}: {len(self.rows())} rows, {len(self.columns())} columns"

    def _repr_html_(self) -> str:
        return grid_html(self.rows(), self.columns(), {(c.row, c.column): escape(c.text) for c in self.cells})


def grid_html(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], str]) -> str:
    """An HTML table of `rows` x `columns`; `cells` hold HTML, and what is missing stays empty."""
    head = "".join(f"<th scope=col align=right>{escape(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope=row align=left>{escape(r)}</th>"
        + "".join(f"<td align=right>{cells.get((r, c), '')}</td>" for c in columns)
        + "</tr>"
        for r in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class PaperTable:
    """A table that can be run: `make(seed, **settings)`. `full`, `quick`: its settings (quick None: not part of the quick set).

    `data`: what it reads of data/, by name. `text`: whether it reads the corpus. `seeded`: whether a seed changes it.
    """

    make: Callable[..., list[Cell]]
    title: str
    data: tuple[str, ...]
    full: Mapping[str, object] = field(default_factory=dict)
    quick: Mapping[str, object] | None = None
    text: bool = True
    seeded: bool = True


def run(name: str, seed: int, settings: Mapping[str, object], threads: int = 1) -> Made:
    """The cells of the table `name`. Raises ValueError for an unknown one, and what measuring raises."""
    table = named(name)
    from edgelab.console import set_threads

    set_threads(threads)
    return Made(name, table.title, tuple(table.make(seed, **settings)))


def keep(made: Made, folder: str | Path, seed: int, settings: Mapping, threads: int, seconds: float, variant: str = ""):
    """The `Receipt` of `made`, written with its cells (cells.json, receipt.json) into `folder`. It lists what this process has loaded."""
    from edgelab import receipts

    folder, table = Path(folder), named(made.name)
    receipts.write_text(folder / "cells.json", made.to_json())
    told = receipts.Receipt(
        made.name,
        seed,
        dict(settings),
        threads,
        variant,
        code=receipts.code_in_use(),
        data=receipts.data_in_use(table.data),
        text=receipts.text_fingerprint() if table.text else "",
        wall_seconds=round(seconds, 2),
    )
    return receipts.write(folder, told, ["cells.json"])


def named(name: str) -> PaperTable:
    """The table called `name`. Raises ValueError."""
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name]


# ------------------------------------------------------------------------------------------------- what the tables share

Docs = Mapping[str, int]
DOCS: Docs = MappingProxyType({"prose": 4, "code": 4, "assistant": 40, "arithmetic": 40})
FEW: Docs = MappingProxyType({"prose": 2, "code": 2, "assistant": 10, "arithmetic": 10})


def drawn(test, docs: Docs, seed: int):
    """Of each domain `docs` documents of the split `test`, drawn by `seed`; the pieces of a source stay together.

    Raises ValueError for a domain that has fewer.
    """
    domains, ids, chosen = list(test["domain"]), list(test["id"]), []
    for domain, wanted in docs.items():
        sources: dict[str, list[int]] = {}
        for i, (d, name) in enumerate(zip(domains, ids, strict=True)):
            if d == domain:
                sources.setdefault(name.rpartition("#")[0] or name, []).append(i)
        order = sorted(sources)
        random.Random(f"{seed}:{domain}").shuffle(order)
        rows = [i for source in order for i in sources[source]][:wanted]
        if len(rows) < wanted:
            raise ValueError(f"docs: {wanted} of {domain!r} were asked for, the split has {len(rows)}")
        chosen += rows
    return test.select(chosen)


class _Bench:
    """Models and text of one run, loaded when first asked for."""

    def __init__(self, seed: int, kind: str = "moe") -> None:
        from edgelab.model import load, load_tokenizer
        from edgelab.paths import data_dir
        from edgelab.receipts import embedded_corpus

        self.seed, self.corpus = seed, embedded_corpus()
        self.tokenizer = load_tokenizer(data_dir() / f"edge-{kind}")
        self.model = load(data_dir() / f"edge-{kind}")

    def tokens(self, split: str, tokens: int) -> list:
        """Rows of 256 tokens of that split, in an order that the seed fixes."""
        from edgelab.data import calibration_batches

        rows = calibration_batches(self.tokenizer, self.corpus[split], tokens=tokens, context=256, seed=self.seed)
        return [b for b in rows if b.shape[1] == 256]

    def compressed(self, recipe, calibration_tokens: int, training_tokens: int = 0):
        """(the model of `recipe`, seconds that took)."""
        from edgelab.compress import compress

        calibration = None if recipe.data_free else self.tokens("calibration", calibration_tokens)
        training = self.tokens("train", training_tokens) if recipe.learns else None
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            more = {"folder": folder} if recipe.learns else {}
            made = compress(self.model, recipe, calibration=calibration, training=training, progress=False, **more)
        return made, time.perf_counter() - began

    def measured(self, models: Mapping, docs: Docs) -> "_Figures":
        from edgelab.evaluate import measure

        test = drawn(self.corpus["test"], docs, self.seed)
        return _Figures(measure(models, self.tokenizer, test, max_docs=None, context=256, progress=False), self.seed)


class _Figures:
    """What was measured, as cells."""

    def __init__(self, measured, seed: int) -> None:
        from edgelab.compare import pool
        from edgelab.evaluate import summarise

        self.pooled = pool(measured)
        self.report = summarise(measured, resamples=1000, seed=seed) + summarise(self.pooled, resamples=1000, seed=seed)

    def cells(self, columns: Iterable[tuple[str, str, str, float]], models: Iterable[str] | None = None) -> list[Cell]:
        """A cell per model and column (its title, the metric, the slice, a factor), where the report has a row for it."""
        found = []
        for model in models or self.report.models():
            for title, metric, on, scale in columns:
                for r in self.report.where(model=model, metric=metric, slice=on):
                    low, high = (None, None) if r.low is None else (r.low * scale, r.high * scale)
                    found.append(Cell(model, title, r.value * scale, low=low, high=high, step=scale * self._step(metric, on)))
        return found

    def _step(self, metric: str, on: str) -> float:
        """One answer, or one token, of all that were scored."""
        scores = self.pooled.scores[self.pooled.baseline].get(on)
        if scores is None or metric not in ("exact_match", "flips", "same_top"):
            return 0.0
        return 1 / (scores.tokens.sum() if metric == "same_top" else len(scores.tokens))


QUALITY = (
    ("KLD, nats/token", "kld", "all", 1),
    ("same top token, %", "same_top", "all", 100),
    ("exact match, %", "exact_match", "answers", 100),
    ("flips, %", "flips", "answers", 100),
)


# -------------------------------------------------------------------------------------------------------------- tables


def quality(seed: int, *, docs: Docs = DOCS, turns: int = 3, decode: int = 12) -> list[Cell]:
    """The demo's table: the embedded mixture in floating point, 8 bits, 4 bits, and the model for a phone."""
    from edgelab.bundle import coverage_of, load_bundle
    from edgelab.evaluate import speed
    from edgelab.paths import data_dir
    from edgelab.recipe import Recipe

    b = _Bench(seed)
    made = {name: b.compressed(Recipe.uniform(scheme), 0)[0] for name, scheme in (("int8", "int8-row"), ("int4", "int4-g32"))}
    models = {"fp": b.model} | {name: m.model for name, m in made.items()} | {"phone": load_bundle(data_dir() / "edge-phone")}
    sizes = {"fp": sum(f.stat().st_size for f in (data_dir() / "edge-moe").glob("*.safetensors"))}
    sizes |= {name: m.coverage.predicted_bytes for name, m in made.items()} | {
        "phone": coverage_of(data_dir() / "edge-phone").predicted_bytes
    }
    weights = made["int4"].coverage.parameters
    cells = [Cell(name, "bytes", int(size), "counted") for name, size in sizes.items()]
    cells += [Cell(name, "bits per weight", 8 * size / weights, "counted") for name, size in sizes.items()]
    by_domain = [(f"bits per byte, {d}", "bits_per_byte", d, 1) for d in ("prose", "code")]
    cells += b.measured(models, docs).cells([*by_domain, *QUALITY])
    for r in speed(models, repetitions=turns, decode=decode, prefill=64, seed=seed).where(metric="tokens_per_s"):
        cells.append(Cell(r.model, "tokens/s", r.value, "time", r.low, r.high))
    return cells


def methods(
    seed: int, *, names: Sequence[str] = ("rtn", "hqq", "gptq"), bits: Sequence[int] = (4, 3), docs: Docs = DOCS, tokens: int = 2048
) -> list[Cell]:
    """Methods x bits on the dense model, all at the same effective bits; only the decoder's weights are rounded."""
    from edgelab.compare import METHODS
    from edgelab.model import dequantize

    b = _Bench(seed, "dense")
    models, cells = {"fp": b.model}, []
    for width, name in itertools.product(bits, names):
        scheme_of, recipe_of = METHODS[name]
        scheme = scheme_of(width, 32)
        made, seconds = b.compressed(recipe_of(scheme), tokens)
        row = f"{name} {scheme}"
        rounded = [r for r in made.coverage.rows if r.touched]
        effective = 8 * sum(r.predicted_bytes for r in rounded) / sum(r.parameters for r in rounded)
        cells += [Cell(row, "bits", effective, "counted"), Cell(row, "seconds", seconds, "time")]
        dequantize(made.model)  # the values of the codes: torch's products, whatever kernels this machine has
        models[row] = made.model
    figures = b.measured(models, docs)
    return cells + figures.cells([("ln ppl ratio, nats/token", "ln_ppl_ratio", "all", 1), *QUALITY])


def pruning(seed: int, *, patterns: Sequence[str] = ("unstructured", "2:4"), docs: Docs = DOCS, tokens: int = 2048) -> list[Cell]:
    """Half of the dense model's weights set to zero, by three methods, in two patterns."""
    from edgelab.model import weights
    from edgelab.recipe import Prune, Recipe

    b = _Bench(seed, "dense")
    models, cells = {"fp": b.model}, []
    for pattern, method in itertools.product(patterns, ("magnitude", "wanda", "sparsegpt")):
        row = f"{method} {'50 %' if pattern == 'unstructured' else pattern}"
        made, seconds = b.compressed(Recipe((Prune(0.5, method=method, pattern=pattern),)), tokens)
        touched = [w.tensor for w in weights(made.model) if w.role not in ("embedding", "head", "router")]
        zeros = 100 * sum(int((t == 0).sum()) for t in touched) / sum(t.numel() for t in touched)
        cells += [Cell(row, "zeros, %", round(zeros, 2), "counted"), Cell(row, "seconds", seconds, "time")]
        models[row] = made.model
    return cells + b.measured(models, docs).cells(QUALITY)


def experts(seed: int, *, shares: Sequence[float] = (0.5,), docs: Docs = DOCS, tokens: int = 2048) -> list[Cell]:
    """Experts of the mixture dropped or merged: by what REAP, frequency and chance say, and by their outputs."""
    from edgelab.recipe import DropExperts, MergeExperts, Recipe

    b = _Bench(seed)
    models, cells = {"fp": b.model}, []
    for share in shares:
        steps = {m: DropExperts(share, method=m) for m in ("reap", "frequency")}
        steps |= {"random": DropExperts(share, method="random", seed=seed), "merged by outputs": MergeExperts(share, method="outputs")}
        for name, step in steps.items():
            row = f"{name} {share:.0%}"
            made, seconds = b.compressed(Recipe((step,)), tokens)
            left = sum(p.numel() for p in made.model.parameters())
            cells += [Cell(row, "parameters", left, "counted"), Cell(row, "seconds", seconds, "time")]
            models[row] = made.model
    return cells + b.measured(models, docs).cells(QUALITY)


def learning(seed: int, *, steps: int = 10, batch: int = 4, docs: Docs = DOCS, tokens: int = 2048, training: int = 30_000) -> list[Cell]:
    """A few steps of learning: half of the experts gone, then distilled or fine-tuned; 4 bits a row, to nearest or learnt."""
    from edgelab.model import dequantize
    from edgelab.recipe import Distill, DropExperts, FineTune, Qat, Quantize, Recipe
    from edgelab.scheme import QuantScheme

    b = _Bench(seed)
    drop, per_row = DropExperts(0.5), (("@router", None), ("*", QuantScheme.parse("int4-row")))
    recipes = {
        "REAP 50 %": Recipe((drop,)),
        f"REAP 50 %, distilled {steps} steps": Recipe((drop, Distill(steps=steps, batch=batch, seed=seed))),
        f"REAP 50 %, fine-tuned {steps} steps": Recipe((drop, FineTune(steps=steps, batch=batch, seed=seed))),
        "int4-row, to nearest": Recipe((Quantize(per_row),)),
        f"int4-row, QAT {steps} steps": Recipe((Quantize(per_row, method=Qat(steps=steps, batch=batch, seed=seed)),)),
    }
    models, cells = {"fp": b.model}, []
    for row, recipe in recipes.items():
        made, seconds = b.compressed(recipe, tokens, training)
        dequantize(made.model)
        models[row] = made.model
        cells.append(Cell(row, "seconds", seconds, "time"))
    return cells + b.measured(models, docs).cells(QUALITY)


# (study, the better, the worse, by KL divergence over the mean of domains): what the README's sentences rest on
SAYS = (
    ("recovery", "REAP 50%, distilled", "REAP 50%"),
    ("recovery", "REAP 50%, distilled", "REAP 50%, fine-tuned"),
    ("qat", "int4-row, QAT", "int4-row, to nearest"),
    ("qat", "int8-row, QAT", "int8-row, to nearest"),
    ("students", "distilled", "text"),
    ("experts", "reap 50%", "frequency 50%"),
    ("experts", "reap 50%", "gate_mass 50%"),
    ("experts", "naee 50%", "reap 50%"),
    ("experts", "reap 50%", "merge by outputs 50%"),
    ("zeros", "dense: sparsegpt 50%", "dense: wanda 50%"),
    ("zeros", "dense: wanda 50%", "dense: magnitude 50%"),
    ("zeros", "dense: sparsegpt 50%", "dense: sparsegpt 2:4"),
    ("zeros", "moe: sparsegpt 50%", "moe: wanda 50%"),
)
APART, IN_ORDER, OTHERWISE = "beyond doubt", "in that order, intervals overlap", "not so"


def order_of(better, worse) -> str:
    """What two rows of a report say of "`better` is lower": apart, in order, or not so.

    Intervals that do not overlap settle it. Those of the studies come from paired draws, so ones that overlap a little may
    still belong to a difference that is sure; that is not claimed here.
    """
    if better.value >= worse.value:
        return OTHERWISE
    return APART if better.high < worse.low else IN_ORDER


def studies(seed: int) -> list[Cell]:
    """What the long studies found, judged again from their stored rows: measured at build, nothing is run."""
    from edgelab.studies import MEAN, read

    cells = []
    for study, better, worse in SAYS:
        report = read(study).report
        one, two = (report.get(model=m, metric="kld", slice=MEAN) for m in (better, worse))
        row = f"{study}: {better} below {worse}"
        for title, r in (("KLD of the first", one), ("of the second", two)):
            cells.append(Cell(row, title, r.value, "counted", r.low, r.high))
        cells.append(Cell(row, "verdict", order_of(one, two), "said"))
    return cells


def claims(seed: int, *, only: Sequence[str] | None = None, turns: int = 3) -> list[Cell]:
    """The claims ledger: our value for each of the articles' claims, and the verdict that its rule gives."""
    from edgelab.claims.bench import Bench
    from edgelab.claims.index import LONG, ledger

    cells = []
    for line in ledger(only, bench=Bench(turns=turns, seed=seed), progress=False):
        e = line.entry
        timed = "turns" in e.by  # a verdict that rests on a timing is of the minute, too
        kind = "counted" if e.claim in LONG else "time" if timed else "measured"
        if e.value is not None:
            cells.append(Cell(e.claim, "ours", e.value, kind, e.low, e.high))
        cells.append(Cell(e.claim, "provenance", e.provenance, "said"))
        if kind != "time":
            cells.append(Cell(e.claim, "verdict", line.verdict.word, "said"))
    return cells


def export(seed: int, *, forms: Sequence[str] = ("moe, cache", "dense, cache"), lengths: Sequence[int] = (24, 96)) -> list[Cell]:
    """The int4-g32 models as ONNX files in ONNX Runtime: the same codes, and logits against torch's."""
    from edgelab.compress import compress
    from edgelab.export.checks import MIN_COSINE
    from edgelab.export.onnx import export as write
    from edgelab.export.onnx import verify
    from edgelab.model import load
    from edgelab.paths import data_dir
    from edgelab.recipe import Recipe

    cells = []
    for form in forms:
        kind, _, cached = form.partition(", ")
        model = compress(load(data_dir() / f"edge-{kind}"), Recipe.uniform("int4-g32"), progress=False).model
        with tempfile.TemporaryDirectory() as folder:
            written = write(model, Path(folder) / "model.onnx", cache=bool(cached), check=False)
            found = verify(written, model, lengths=tuple(lengths), seed=seed)
        p, n = found.parity, sum(lengths)
        cells += [
            Cell(form, "1 - cosine", max(0.0, 1 - p["cosine"]), "bounded", limit=1 - MIN_COSINE),
            Cell(form, "same top token, %", 100 * p["top1_agreement"], step=100 / n),
            Cell(form, "weights as codes, %", round(100 * found.share, 3), "counted"),
            Cell(form, "bytes", found.bytes, "counted"),
            Cell(form, "over prediction, %", round(100 * (found.bytes / found.predicted_bytes - 1), 3), "counted"),
            Cell(form, "seconds to export", written.seconds, "time"),
        ]
    return cells


def kernels(seed: int, *, n: int = 1024, seconds: float = 0.3) -> list[Cell]:
    """Each matrix kernel against its NumPy twin, in units of what rounding explains; and its time beside torch's float32 product."""
    import numpy as np
    import torch

    from edgelab.matmul_lab import compare_all, product, tiles_of, timed
    from edgelab.methods.rtn import round_to_nearest
    from edgelab.scheme import QuantScheme

    cells = []
    for found in compare_all(seed=seed):
        cells += [
            Cell(found.kernel, "numbers compared", found.numbers, "counted"),
            Cell(found.kernel, "largest difference / bound", found.largest, "bounded", limit=1.0),
        ]
    rng = np.random.default_rng(seed)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, n), (1, n)))
    dense, rows = torch.from_numpy(weight), torch.from_numpy(x)
    for scheme in ("int4-g32", "int8-row"):
        turn = itertools.repeat(tiles_of(round_to_nearest(dense, QuantScheme.parse(scheme))))
        calls = {f"{scheme}, {a} activations": product(turn, x, a) for a in ("int8", "float32")}
        times = timed(calls | {"torch": lambda: torch.nn.functional.linear(rows, dense)}, seconds)
        for name in calls:
            cells += [
                Cell(f"{name}, {n} x {n}, one row", "µs", 1e6 * times[name].median, "time"),
                Cell(f"{name}, {n} x {n}, one row", "torch float32 takes, x", times["torch"].median / times[name].median, "time"),
            ]
    return cells


def _frozen(**settings) -> Mapping[str, object]:
    return MappingProxyType({k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in settings.items()})


_ALL = ("claims.csv", "devices.toml", "economics.toml", "published.toml", "studies", "edge-moe", "edge-dense")
TABLES: dict[str, PaperTable] = {
    "quality": PaperTable(
        quality,
        "The embedded mixture, and what is left of it",
        ("edge-moe", "edge-phone"),
        _frozen(docs=DOCS),
        _frozen(docs=FEW, turns=1, decode=4),
    ),
    "methods": PaperTable(methods, "Methods and bits, dense model", ("edge-dense",), _frozen(docs=DOCS, tokens=2048)),
    "pruning": PaperTable(pruning, "Half of the weights gone, dense model", ("edge-dense",), _frozen(docs=DOCS, tokens=2048)),
    "experts": PaperTable(experts, "Experts dropped and merged", ("edge-moe",), _frozen(docs=DOCS, tokens=2048)),
    "learning": PaperTable(learning, "A few steps of learning", ("edge-moe",), _frozen(docs=DOCS, steps=10, batch=4)),
    "studies": PaperTable(
        studies,
        "What the long studies say, judged again",
        tuple(f"studies/{name}.json" for name in ("recovery", "qat", "students", "experts", "zeros")),
        quick=_frozen(),
        text=False,
        seeded=False,
    ),
    "claims": PaperTable(
        claims, "The claims of five articles", _ALL, _frozen(turns=1), _frozen(only=("A2", "A11", "B9", "C9"), turns=1), seeded=False
    ),
    "export": PaperTable(
        export, "ONNX files in ONNX Runtime", ("edge-moe", "edge-dense"), _frozen(lengths=(24, 96)), text=False, seeded=False
    ),
    "kernels": PaperTable(
        kernels, "Kernels against their twins, and their time", (), _frozen(seconds=0.3), _frozen(n=512, seconds=0.05), text=False
    ),
}
