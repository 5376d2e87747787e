"""The stored sweep as arrays: what was measured of each configuration, and the qualities that can be read from it.

A sweep (`data/sweep.parquet`, written by `edgelab sweep`) holds a row per configuration: its recipe, its counted bytes, its measured
quality with 95 % intervals, and sums per document, from which the quality on one domain and every paired comparison follow.
Metadata in the file say on which documents, and which original a model's KL divergence is measured from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from pathlib import Path
from types import MappingProxyType

import numpy as np

from edgelab import paired
from edgelab.paths import data_dir
from edgelab.sweep_space import ANSWERS, TEXT
from edgelab.sweep_space import METRICS as STORED  # those with columns of their own; the others are summed from documents

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """A quality. `kind`: "kld" (nats/token), "bits" (bits/byte) or "exact" (share of answers); over the documents of `domains`."""

    name: str
    title: str
    axis: str
    kind: str
    domains: tuple[str, ...]
    better: str  # "lower" or "higher"
    digits: int

    @property
    def sign(self) -> int:
        """What values are multiplied with so that less is better."""
        return 1 if self.better == "lower" else -1

    def said(self, value: float | None) -> str:
        """A value as it is printed."""
        if value is None or not math.isfinite(value):
            return "unknown"
        return f"{100 * value:.{self.digits}f} %" if self.kind == "exact" else f"{value:.{self.digits}f} {self.unit}"

    @property
    def unit(self) -> str:
        return {"kld": "nats per token", "bits": "bits per byte", "exact": ""}[self.kind]


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        m.name: m
        for m in (
            Metric("em_assistant", "exact match, assistant", "exact match on assistant, %", "exact", ("assistant",), "higher", 1),
            Metric("em_arithmetic", "exact match, arithmetic", "exact match on arithmetic, %", "exact", ("arithmetic",), "higher", 1),
            Metric("kld", "KL divergence, prose and code", "KL divergence, nats per token", "kld", TEXT, "lower", 4),
            Metric("kld_prose", "KL divergence, prose", "KL divergence on prose, nats per token", "kld", ("prose",), "lower", 4),
            Metric("kld_code", "KL divergence, code", "KL divergence on code, nats per token", "kld", ("code",), "lower", 4),
            Metric("bits_per_byte", "bits per byte, prose and code", "bits per byte", "bits", TEXT, "lower", 3),
            Metric("bits_per_byte_prose", "bits per byte, prose", "bits per byte of prose", "bits", ("prose",), "lower", 3),
            Metric("bits_per_byte_code", "bits per byte, code", "bits per byte of code", "bits", ("code",), "lower", 3),
        )
    }
)

TEXTS = ("id", "label", "model", "method", "scheme", "pattern", "recipe", "shape", "provenance")
NUMBERS = (
    "bits", "group", "sparsity", "experts", "top_k", "channels", "size_bytes", "bits_per_weight", "read_bytes", "macs", "kv_bytes",
    "layers", "hidden", "seconds", *(m + end for m in STORED for end in ("", "_low", "_high")),
)  # fmt: skip
PER_DOCUMENT = ("doc_kld", "doc_nll", "doc_exact")
PER_LAYER = ("layer_name", "layer_bytes", "layer_error")
FILTERS = ("model", "method", "bits", "group", "sparsity", "pattern", "experts", "top_k", "channels")


def metric_of(name: str) -> Metric:
    """The entry of `METRICS`. Raises ValueError that lists them."""
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is not known; use one of {', '.join(METRICS)}")
    return METRICS[name]


# ------------------------------------------------------------------------------------------------------------ the sweep


@dataclass(frozen=True)
class Document:
    """A document that all rows were measured on. `source`: what it was cut from; `tokens` scored and `bytes` of text."""

    domain: str
    source: str
    tokens: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Sweep:
    """A stored sweep: read-only arrays with a value per row. `columns` {name: [rows]}, texts as object arrays, numbers as float64.

    `doc_kld`, `doc_nll` float32 [rows, len(text)]: sums per document, nats; `doc_exact` bool [rows, len(answers)].
    `layers` {"layer_name", "layer_bytes", "layer_error"}: a sequence per row. `reference` {model: what its KL divergence is from}.
    """

    columns: Mapping[str, np.ndarray]
    doc_kld: np.ndarray
    doc_nll: np.ndarray
    doc_exact: np.ndarray
    layers: Mapping[str, Sequence]
    text: tuple[Document, ...]
    answers: tuple[Document, ...]
    reference: Mapping[str, str]
    meta: Mapping = field(default_factory=dict)
    path: str = ""

    def __len__(self) -> int:
        return len(self.columns["id"])

    def __getitem__(self, column: str) -> np.ndarray:
        """The column: [rows]. Raises KeyError that lists them."""
        if column not in self.columns:
            raise KeyError(f"the sweep has no column {column!r}; it has {', '.join(self.columns)}")
        return self.columns[column]

    def index(self, id: str) -> int:
        """The row of a configuration by its id. Raises KeyError."""
        found = np.flatnonzero(self.columns["id"] == id)
        if not len(found):
            raise KeyError(f"the sweep has no row with id={id!r}; ids look like {self.columns['id'][0]!r}")
        return int(found[0])

    def row(self, i: int) -> dict:
        """The texts and numbers of row `i`, as plain Python values."""
        return {name: values[i].item() if isinstance(values[i], np.generic) else values[i] for name, values in self.columns.items()}

    def layer(self, i: int) -> dict[str, list]:
        """{"name", "bytes", "error"} of each weight of row `i`; errors are relative, NaN where shapes differ."""
        held = {name.removeprefix("layer_"): list(self.layers[name][i]) for name in PER_LAYER}
        return held | {"error": [math.nan if e is None else e for e in held["error"]]}

    def values(self, column: str) -> list:
        """The different values of a column, sorted."""
        return sorted(v.item() if isinstance(v, np.generic) else v for v in set(self[column]))

    def original(self, model: str) -> int | None:
        """The row of the model as it is: floating point, nothing cut; None where the sweep has none."""
        c = self.columns
        plain = (c["model"] == model) & (c["method"] == "fp") & (c["sparsity"] == 0) & (c["channels"] == 0)
        found = np.flatnonzero(plain)
        return int(max(found, key=lambda i: (c["experts"][i], c["top_k"][i], c["size_bytes"][i]))) if len(found) else None

    @classmethod
    def read(cls, path: str | Path | None = None) -> "Sweep":
        """The sweep in `path`, by default data/sweep.parquet. Raises FileNotFoundError, or ValueError naming what is not of its form."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = data_dir() / "sweep.parquet" if path is None else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no sweep at {file}; `edgelab sweep` measures one")
        try:
            table = pq.read_table(file)
            meta = json.loads((table.schema.metadata or {}).get(b"edgelab", b"{}"))
        except (pa.ArrowInvalid, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no Parquet file of a sweep: {error}") from error
        return cls.from_table(table, meta, str(file))

    @classmethod
    def from_table(cls, table, meta: Mapping, path: str = "") -> "Sweep":
        """The sweep of a pyarrow table and its metadata. Raises ValueError."""
        where = path or "the table"
        if meta.get("format") != FORMAT:
            raise ValueError(f"{where} has format={meta.get('format')!r}, this version reads {FORMAT}; `edgelab sweep` writes it anew")
        absent = [c for c in (*TEXTS, *NUMBERS, *PER_DOCUMENT, *PER_LAYER) if c not in table.column_names]
        if absent:
            raise ValueError(f"{where} has no column {', '.join(absent)}; `edgelab sweep` writes all of them")
        if not table.num_rows:
            raise ValueError(f"{where} has no rows; `edgelab sweep` fills it")
        columns = {c: np.array(table[c].to_pylist(), dtype=object) for c in TEXTS}
        columns |= {c: np.asarray(table[c].to_numpy(), np.float64) for c in NUMBERS}
        documents = [Document(d["domain"], str(d["source"]), int(d["tokens"]), int(d["bytes"])) for d in meta.get("documents", ())]
        text, answers = (tuple(d for d in documents if d.domain in kinds) for kinds in (TEXT, ANSWERS))
        matrices = {}
        for c, docs in (("doc_kld", text), ("doc_nll", text), ("doc_exact", answers)):
            lists = table[c].combine_chunks()
            flat = lists.flatten().to_numpy(zero_copy_only=False)
            lengths = set(lists.value_lengths().to_pylist())
            if lengths != {len(docs)}:
                raise ValueError(f"{c} of {where} has {sorted(map(str, lengths))} values a row for {len(docs)} documents")
            matrices[c] = flat.reshape(table.num_rows, len(docs))
        if len(set(columns["id"])) != table.num_rows:
            raise ValueError(f"{where} has two rows with the same id")
        for a in (*columns.values(), *matrices.values()):
            a.setflags(write=False)
        model_of = dict(zip(columns["id"], columns["model"], strict=True))  # a reference may be named by its row's id
        given = {m: meta.get("reference", {}).get(m, m) for m in sorted(set(columns["model"]))}
        said = {m: str(r.get("kld_against", m) if isinstance(r, Mapping) else r) for m, r in given.items()}
        reference = {m: model_of.get(r, r) for m, r in said.items()}
        layers = {c: _Lists(table[c].combine_chunks()) for c in PER_LAYER}
        frozen = MappingProxyType
        return cls(frozen(columns), **matrices, layers=frozen(layers), text=text, answers=answers, reference=frozen(reference),
                   meta=frozen(dict(meta)), path=path)  # fmt: skip

    def __repr__(self) -> str:
        models = ", ".join(f"{(self['model'] == m).sum():,} of {m}" for m in self.values("model"))
        methods = ", ".join(self.values("method"))
        size = self["size_bytes"] / 1e6
        return f"Sweep({len(self):,} configurations: {models}; {methods}; {size.min():.2f} to {size.max():.2f} MB; {self._documents()})"

    def _documents(self) -> str:
        docs = (*self.text, *self.answers)
        return (
            "measured on "
            + ", ".join(f"{sum(d.domain == n for d in docs)} {n}" for n in dict.fromkeys(d.domain for d in docs))
            + (" documents" if docs else "no documents")
        )

    def _repr_html_(self) -> str:
        rows = []
        for model in self.values("model"):
            of = self["model"] == model
            spans = [f"{self[c][of].min():.3g} .. {self[c][of].max():.3g}" for c in ("bits_per_weight", "sparsity", "experts", "top_k")]
            size = self["size_bytes"][of] / 1e6
            cells = (f"{of.sum():,}", ", ".join(sorted(set(self["method"][of]))), f"{size.min():.2f} .. {size.max():.2f}", *spans)
            best = [METRICS[m].said(f(self[m][of])) for m, f in (("em_assistant", np.nanmax), ("em_arithmetic", np.nanmax))]
            line = "".join(f"<td>{escape(c)}</td>" for c in (*cells, *best))
            rows.append(f'<tr><th scope="row">{escape(model)}</th>{line}</tr>')
        heads = ("model", "rows", "methods", "MB", "bits per weight", "sparsity", "experts", "top-k", "best assistant", "best arithmetic")
        head = "".join(f'<th scope="col">{h}</th>' for h in heads)
        caption = f"<caption>{len(self):,} configurations, {escape(self._documents())}; measured at build</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


class _Lists(Sequence):
    """A column of lists, each made when it is asked for: most rows' layers never are."""

    def __init__(self, column) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, i: int) -> list:
        return self._column[int(i)].as_py()


# -------------------------------------------------------------------------------------------------------------- quality


@dataclass(frozen=True, eq=False)
class Quality:
    """A metric of each row: value and the ends of its 95 % interval, float64 [rows] each."""

    metric: Metric
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def quality(sweep: Sweep, name: str) -> Quality:
    """The metric `name` of each row: the stored column, or for one domain alone its sums over that domain's documents.

    The intervals of one domain come from the bootstrap of `paired`, over sources.
    """
    m = metric_of(name)
    if name in STORED:
        return Quality(m, sweep[name], sweep[name + "_low"], sweep[name + "_high"])
    tops, bottom, _ = sums(sweep, m)
    drawn = drawn_ratios(sweep, name)
    cut = round(0.025 * drawn.shape[1]) - 1
    ends = np.partition(drawn, (cut, drawn.shape[1] - 1 - cut), axis=1)
    return Quality(m, tops.sum(1) / bottom.sum(), ends[:, cut].copy(), ends[:, -1 - cut].copy())


@lru_cache(maxsize=6)
def drawn_ratios(sweep: Sweep, name: str) -> np.ndarray:
    """The metric of every row in every resample of the sources: float64 [rows, resamples], the same draws for all rows. Text metrics."""
    tops, bottom, sizes = sums(sweep, metric_of(name))
    index = paired.drawn(sizes)
    times = np.zeros(index.shape)  # how often each source is drawn: [resamples, sources]
    np.add.at(times, (np.arange(len(index))[:, None], index), 1)
    return (tops @ times.T) / (times @ bottom)


def sums(sweep: Sweep, m: Metric, rows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """(tops [rows, sources], bottoms [sources], sources per domain): the metric of a row is a ratio of their sums.

    KL divergence: nats over tokens. Bits per byte: nats / ln 2 over bytes.
    """
    number, sizes, keep = _sources(sweep.text, m.domains)
    docs = [d for d, k in zip(sweep.text, keep, strict=True) if k]
    held = sweep.doc_kld if m.kind == "kld" else sweep.doc_nll
    held = held[:, keep] if rows is None else held[np.asarray(rows)][:, keep]
    scale = 1.0 if m.kind == "kld" else 1 / math.log(2)
    tops = np.zeros((len(held), sum(sizes)))
    for d, j in enumerate(number):  # document after document, as a plain loop would add
        tops[:, j] += held[:, d]
    tops *= scale
    return tops, paired.summed([d.tokens if m.kind == "kld" else d.bytes for d in docs], number, sum(sizes)), sizes


@lru_cache(maxsize=16)
def _sources(docs: tuple[Document, ...], domains: tuple[str, ...]) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """(source of each kept document, sources per domain, which documents are kept)."""
    keep = np.array([d.domain in domains for d in docs], bool)
    if not keep.any():
        raise ValueError(f"the sweep was not measured on {' or '.join(domains)}")
    return *paired.groups([(d.domain, d.source) for d, k in zip(docs, keep, strict=True) if k]), keep
