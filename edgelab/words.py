"""Numbers as people read them: what each metric is called, how its value is printed, and a sentence for each plot.

A plot has no role and no tab stop for a screen reader, so every figure of ours stands beside a table and a sentence;
the sentences are computed from the same rows as the figure, never written by hand.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from edgelab.report import Report, Row


@dataclass(frozen=True)
class Metric:
    """How one metric is shown: its name in words, the axis title, the digits, which way is good, what it means.

    `style`: "number", "share" (0..1, printed as per cent) or "megabytes" (bytes, printed as MB of 10^6).
    """

    title: str
    axis: str
    digits: int
    better: str  # "lower", "higher" or "" (neither)
    meaning: str
    style: str = "number"


# what the brackets are, and what a size beside them counts: said wherever a table of measurements stands
INTERVALS = "paired bootstrap over sources (documents; the pieces of a long one together); of tokens per second over its repetitions"
ORIGINAL_SIZE = "The size of fp is that of its bfloat16 file; the model itself runs in float32 here, and so does its speed."

METRICS = {
    "weight_bytes": Metric(
        "size", "weights, MB", 2, "lower", "bytes of all parameters as stored, scales counted (MB of 10^6)", "megabytes"
    ),
    "bits_per_weight": Metric(
        "bits per weight", "bits per weight", 3, "lower", "effective: scales, norms, router, head and embedding counted"
    ),
    "perplexity": Metric("perplexity", "perplexity (per token)", 2, "lower", "exp of the mean negative log-likelihood per token"),
    "ln_ppl_ratio": Metric(
        "ln perplexity ratio",
        "ln(perplexity / baseline's)",
        4,
        "lower",
        "paired with the baseline; an interval that holds 0 shows no difference",
    ),
    "bits_per_byte": Metric(
        "bits per byte", "bits per byte", 3, "lower", "negative log2-likelihood per byte of text; no tokenizer hides in it"
    ),
    "kld": Metric(
        "KL divergence, mean", "KL divergence, nats per token", 4, "lower", "to the baseline's next-token distribution, float32 logits"
    ),
    "kld_p99": Metric(
        "KL divergence, 99 %", "KL divergence, 99th percentile", 3, "lower", "one token in a hundred is changed more than this"
    ),
    "same_top": Metric(
        "same top token", "same top token, %", 1, "higher", "share of positions where both models' first choice is the same", "share"
    ),
    "exact_match": Metric("exact match", "exact match, %", 1, "higher", "share of answers that are right to the last character", "share"),
    "flips": Metric("flips", "flips, %", 1, "lower", "share of answers that turned from right to wrong or back", "share"),
    "router_overlap": Metric(
        "router overlap", "router overlap, %", 1, "higher", "share of the baseline's top-k experts still chosen", "share"
    ),
    "tokens_per_s": Metric(
        "tokens per second", "tokens per second", 0, "higher", "written one by one, as in a conversation; threads in the note"
    ),
    "prefill_tokens_per_s": Metric(
        "tokens read per second", "tokens read per second", 0, "higher", "a prompt read at once; threads in the note"
    ),
}


def metric(name: str) -> Metric:
    """The entry of `METRICS`; a metric that this page does not know is shown under its own name."""
    return METRICS.get(name, Metric(name.replace("_", " "), name.replace("_", " "), 3, "", ""))


def number(name: str, value: float | None, *, unit: bool = True) -> str:
    """One value of the metric `name`, as it is printed.

    >>> number("exact_match", 0.962), number("weight_bytes", 4_250_000), number("kld", 0.05123)
    ('96.2 %', '4.25 MB', '0.0512')
    """
    if value is None:
        return ""
    m = metric(name)
    if m.style == "share":
        return f"{100 * value:.{m.digits}f}" + (" %" if unit else "")
    if m.style == "megabytes":
        return f"{value / 1e6:,.{m.digits}f}" + (" MB" if unit else "")
    return f"{value:,.{m.digits}f}"


def shown(row: Row) -> str:
    """A row's value with its 95 % interval.

    >>> shown(Row("int4", "exact_match", 0.96, low=0.94, high=0.975))
    '96.0 % [94.0, 97.5]'
    """
    text = number(row.metric, row.value)
    if row.low is None or row.high is None:
        return text
    return f"{text} [{number(row.metric, row.low, unit=False)}, {number(row.metric, row.high, unit=False)}]"


def table(report: Report, metrics: Iterable[str] | None = None) -> list[dict[str, str]]:
    """One dict per (metric, slice), {"metric", "on", <model>: value with interval}; in the order of `METRICS`.

    Measured and modelled values never share a line: their provenance is part of the key, and shown when it is not
    "measured here".
    """
    order = {name: i for i, name in enumerate(METRICS)}
    wanted = None if metrics is None else set(metrics)
    lines: dict[tuple, dict[str, str]] = {}
    for row in sorted(report, key=lambda r: order.get(r.metric, len(order))):
        if wanted is not None and row.metric not in wanted:
            continue
        title = metric(row.metric).title + ("" if row.provenance == "measured here" else f" ({row.provenance})")
        line = lines.setdefault((row.metric, row.slice, row.provenance), {"metric": title, "on": row.slice})
        line[row.model] = shown(row)
    return list(lines.values())


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows of `table` (or any dicts of text) as a Markdown table, for a notebook.

    >>> print(markdown([{"metric": "flips", "int4": "1 %"}]))
    | metric | int4 |
    |---|---|
    | flips | 1 % |
    """
    columns = list(dict.fromkeys(c for row in rows for c in row))
    lines = [columns, *([row.get(c, "") for c in columns] for row in rows)]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(columns), *text[1:]])


def slices(report: Report, name: str) -> list[str]:
    """The slices on which the metric `name` was measured, in order."""
    return list(dict.fromkeys(r.slice for r in report.where(metric=name)))


def _row(report: Report, model: str, name: str, on: str = "") -> Row | None:
    rows = report.where(model=model, metric=name, slice=on).rows
    return rows[0] if rows else None


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def say_size(report: Report, name: str = "bits_per_byte") -> str:
    """A sentence on size against quality: each model's share of the first one's bytes, and what `name` became."""
    models = report.models()
    base = models[0]
    base_size = _row(report, base, "weight_bytes")
    sentences = []
    for model in models[1:]:
        size = _row(report, model, "weight_bytes")
        changes = []
        for on in slices(report, name):
            a, b = _row(report, base, name, on), _row(report, model, name, on)
            if a is not None and b is not None:
                changes.append(f"{number(name, a.value)} to {number(name, b.value)}" + (f" on {on}" if on else ""))
        weighs = f"{model} weighs"
        if size is not None and base_size is not None:
            weighs = f"{model} takes {number('weight_bytes', size.value)}, {size.value / base_size.value:.2f} of {base}'s"
            weighs += f" {number('weight_bytes', base_size.value)}"
        if changes:
            sentences.append(f"{weighs}; {metric(name).title} goes from {_listed(changes)}.")
        elif size is not None:
            sentences.append(f"{weighs}.")
    return " ".join(sentences) or f"Only {base} was measured: there is nothing to compare it with."


def say_by_domain(report: Report, name: str) -> str:
    """A sentence on `name` per domain: for each model where it is worst and where it is best."""
    m, sentences = metric(name), []
    for model in report.models():
        rows = [r for r in report.where(model=model, metric=name) if r.slice]
        if not rows or (model == report.models()[0] and all(r.value == rows[0].value for r in rows)):  # the baseline to itself
            continue
        low, high = min(rows, key=lambda r: r.value), max(rows, key=lambda r: r.value)
        worst, best = (high, low) if m.better != "higher" else (low, high)
        if len(rows) == 1:
            sentences.append(f"{model}: {shown(rows[0])} on {rows[0].slice}.")
        else:
            sentences.append(f"{model} is worst on {worst.slice} ({shown(worst)}) and best on {best.slice} ({shown(best)}).")
    return f"{m.title[0].upper()}{m.title[1:]} ({m.meaning}). " + (" ".join(sentences) or "No model was measured on it.")


def say_coverage(coverage) -> str:
    """A sentence on the audit: how much of all parameters, and of the experts', really is in low bits."""
    text = f"{100 * coverage.share:.2f} % of all parameters are in low bits"
    if coverage.expert_share is not None:
        text += f", and {100 * coverage.expert_share:.2f} % of the experts' parameters"
    kept = [r for r in coverage.rows if not r.touched and r.parameters]
    text += f"; the whole model takes {coverage.predicted_bytes:,} bytes, "
    text += f"{coverage.bits_per_weight:.3f} bits per weight with everything counted."
    if kept:
        largest = max(kept, key=lambda r: r.parameters)
        text += f" {len(kept)} parameters are kept as they were, the largest of them {largest.name} ({largest.parameters:,} numbers)."
    return text
