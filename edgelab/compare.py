"""One table: method x bits, ours and other tools', on the same model, calibration tokens and evaluation.

What is alike for all: the weights of the decoder blocks are rounded, embedding, head, routers and norms stay (what
papers' tables compare); the tokens of calibration; the documents, and the code that reads them. What a line says of
cost is measured alike, too: each method runs in a process of its own, ours as the peers', so that `seconds` is the quantization
alone and `peak RSS` that of the whole process, PyTorch and the model included.

Effective bits count codes, scales and offsets or zero points as the format stores them, over the rounded weights.
Methods whose scheme stores more beside a code get a larger group, so that all lines of a step of bits have the same
effective bits: int4-g32, uint4-g64 (a scale and an offset) and nf4-g32 are 4.5 each. Bytes are those of the bundle's weight files; a
peer's are modelled, by its bits, with all else in 16 bits: its own file is not written. "All bits" divides by the parameters
of the original, also where a tied head has become one of its own (rotation).

Our lines load their bundle from the disk before they are measured. A line that is done is kept in the output folder,
so a comparison that was stopped goes on where it was.
"""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab import html_table
from edgelab.blocks import checksum
from edgelab.bundle import coverage_of, load_bundle, save_bundle
from edgelab.evaluate import Measured, Scores, measure, summarise
from edgelab.mixed_experts import expert_of
from edgelab.model import load, weights
from edgelab.recipe import AutoRound, Recipe, Rotate, Rtn, Smooth
from edgelab.report import Report
from edgelab.scheme import QuantScheme

KEPT = ("embedding", "head", "router")  # roles that no line rounds


def _affine(bits: int, group: int) -> str:
    return f"int{bits}-g{group}"


def _offset(bits: int, group: int) -> str:
    """With an offset beside each scale: groups twice as large take as much."""
    return f"uint{bits}-g{2 * group}"


def _bits(scheme: str) -> float:
    return QuantScheme.parse(scheme).bits_per_weight((1, 4096))


WITH_NF4 = ("int2-g32", "int3-g64", "int3-g32", "nf4-g64", "nf4-g32", "int8-g64")
BEST = AutoRound(scope="model", start="gptq", steps=300, batch=4, lr=0.003)
# {method: (its scheme for so many bits and a group, its recipe for that scheme)}
METHODS: dict[str, tuple] = {
    "rtn": (_affine, lambda s: Recipe.body(s)),
    "rtn-asym": (_offset, lambda s: Recipe.body(s)),
    "mse": (_affine, lambda s: Recipe.body(s, method=Rtn(mse_grid=32))),
    "weighted": (_affine, lambda s: Recipe.body(s, method=Rtn(mse_grid=32, weighted=True))),
    "hqq": (_offset, lambda s: Recipe.body(s, method="hqq")),
    "nf4": (lambda bits, group: f"nf4-g{group}", lambda s: Recipe.body(s, method=Rtn(mse_grid=32))),
    "mxfp4": (lambda bits, group: "mxfp4-g32", lambda s: Recipe.body(s, method=Rtn(mse_grid=1))),
    "awq": (_affine, lambda s: Recipe.body(s, before=(Smooth("awq"),), method=Rtn(mse_grid=32, weighted=True))),
    "gptq": (_affine, lambda s: Recipe.body(s, method="gptq")),
    "gptq-nf4": (lambda bits, group: f"nf4-g{group}", lambda s: Recipe.body(s, method="gptq")),
    "awq+gptq": (_affine, lambda s: Recipe.body(s, before=(Smooth("awq"),), method="gptq")),
    "rotate+gptq": (_affine, lambda s: Recipe.body(s, before=(Rotate(),), method="gptq")),
    "autoround": (_affine, lambda s: Recipe.body(s, method=AutoRound())),
    "gptq+autoround": (_affine, lambda s: Recipe.body(s, method=AutoRound(start="gptq"))),
    "best": (_affine, lambda s: Recipe.body(s, method=BEST)),
    "mixed": (_affine, lambda s: Recipe.body(s, method="gptq", budget=_bits(s))),
    "mixed-nf4": (_affine, lambda s: Recipe.body(s, method="gptq", budget=_bits(s), choices=WITH_NF4)),
    "best-mixed": (_affine, lambda s: Recipe.body(s, method=BEST, budget=_bits(s))),
    "best-nf4": (lambda bits, group: f"nf4-g{group}", lambda s: Recipe.body(s, method=BEST)),
}
# rows of 8 bits for weights and activations; the other methods round weights only
METHODS |= {
    name: (lambda bits, group: "int8-row", lambda s, before=before, act=act: Recipe.body(s, before=before, activations=act))
    for name, before, act in (
        ("w8a8-token", (), "a8-token"),
        ("w8a8-static", (), "a8-static"),
        ("smooth+w8a8-static", (Smooth(),), "a8-static"),
        ("llm.int8", (), "a8-token-o6"),
    )
}
EIGHT_BITS_ONLY = ("w8a8-token", "w8a8-static", "smooth+w8a8-static", "llm.int8")
FOUR_BITS_ONLY = ("nf4", "gptq-nf4", "best-nf4", "mxfp4")


@dataclass(frozen=True)
class Line:
    """A line of the table. `bits`: effective bits of the rounded weights; `whole_bits`: of all parameters; `file_bytes` of all
    weights, `modelled` or read from the disk. The measured figures are in the comparison's report, under `name`."""

    name: str
    method: str
    by: str
    scheme: str
    bits: float
    whole_bits: float
    file_bytes: int
    modelled: bool
    seconds: float
    peak_rss_bytes: int
    coverage: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The lines, and the `Report` of what was measured of each against "fp". Shows itself as a table."""

    lines: tuple[Line, ...]
    report: Report
    facts: Mapping[str, object] = field(default_factory=dict)

    def rows(self) -> list[dict[str, object]]:
        """A dict per line, numbers as numbers; intervals are (low, high). The original comes first."""
        return [self._row("fp"), *(self._row(line.name) for line in self.lines)]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(line.name for line in self.lines)}; {len(self.report)} rows)"

    def _row(self, name: str) -> dict[str, object]:
        line = next((x for x in self.lines if x.name == name), None)
        found = {(r.metric, r.slice): r for r in self.report.where(model=name)}

        def value(metric: str, on: str = "all"):
            return found[metric, on].value if (metric, on) in found else None

        def bounds(metric: str, on: str = "all"):
            r = found.get((metric, on))
            return None if r is None or r.low is None else (r.low, r.high)

        return {
            "method": line.method if line else "original",
            "by": line.by if line else "",
            "scheme": line.scheme if line else "",
            "bits": line.bits if line else None,
            "whole_bits": line.whole_bits if line else None,
            "file_bytes": line.file_bytes if line else None,
            "modelled_bytes": line.modelled if line else None,
            "coverage": line.coverage if line else None,
            "kld": value("kld"),
            "kld_interval": bounds("kld"),
            "kld_p99": value("kld_p99"),
            "ln_ppl_ratio": value("ln_ppl_ratio"),
            "ln_ppl_ratio_interval": bounds("ln_ppl_ratio"),
            "same_top": value("same_top"),
            "exact_match": value("exact_match", "answers"),
            "exact_match_interval": bounds("exact_match", "answers"),
            "seconds": line.seconds if line else None,
            "peak_rss_bytes": line.peak_rss_bytes if line else None,
        }

    def table(self) -> list[dict[str, str]]:
        """The rows as text: what the command line, Markdown, LaTeX and HTML print."""
        lines = []
        for row in self.rows():

            def show(key: str, form: str, scale: float = 1.0, row=row) -> str:
                return "" if row[key] is None else form.format(row[key] * scale)

            def spread(key: str, form: str, scale: float = 1.0, row=row) -> str:
                bounds = row[f"{key}_interval"]
                between = "" if bounds is None else f" [{form.format(bounds[0] * scale)}, {form.format(bounds[1] * scale)}]"
                return show(key, form, scale) + between

            share = "" if row["coverage"] in (None, 1.0) else f" ({row['coverage']:.0%} of the weights)"
            lines.append(
                {
                    "method": f"{row['method']}{share}",
                    "by": str(row["by"]),
                    "scheme": str(row["scheme"]),
                    "bits": show("bits", "{:.3f}"),
                    "KLD": spread("kld", "{:.4f}"),
                    "KLD 99 %": show("kld_p99", "{:.3f}"),
                    "ln ppl ratio": spread("ln_ppl_ratio", "{:+.4f}"),
                    "same top, %": show("same_top", "{:.1f}", 100),
                    "exact match, %": spread("exact_match", "{:.1f}", 100),
                    "all bits": show("whole_bits", "{:.2f}"),
                    "MB": ("~" if row["modelled_bytes"] else "") + show("file_bytes", "{:.2f}", 1e-6),
                    "s": show("seconds", "{:.1f}"),
                    "peak MB": show("peak_rss_bytes", "{:.0f}", 1e-6),
                }
            )
        return lines

    def to_dataframe(self):
        """A pandas DataFrame of `rows`."""
        import pandas

        return pandas.DataFrame(self.rows())

    def to_markdown(self) -> str:
        lines = self.table()
        head = list(lines[0])
        body = [" | ".join(line[k].replace("|", "\\|") for k in head) for line in lines]
        return "\n".join(f"| {row} |" for row in (" | ".join(head), " | ".join(["---"] * len(head)), *body)) + "\n"

    def to_latex(self) -> str:
        """A tabular in booktabs' style (\\usepackage{booktabs})."""
        lines = self.table()
        head = list(lines[0])
        rows = [" & ".join(_tex(line[k]) for k in head) + r" \\" for line in lines]
        top = " & ".join(map(_tex, head)) + r" \\"
        columns = "lll" + "r" * (len(head) - 3)
        return (
            "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", top, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"
        )

    def to_html(self) -> str:
        return html_table.lines(self.table())

    _repr_html_ = to_html

    def to_json(self) -> str:
        lines = [dict(vars(line)) for line in self.lines]
        return json.dumps({"format": 1, "facts": self.facts, "lines": lines, "report": json.loads(self.report.to_json())}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        d = json.loads(text)
        if d.get("format") != 1:
            raise ValueError(f"comparison format {d.get('format')!r} is not 1: it was written by another edgelab")
        lines = tuple(Line(**(line | {"notes": tuple(line["notes"])})) for line in d["lines"])
        return cls(lines, Report.from_json(json.dumps(d["report"])), d["facts"])


def _tex(text: str) -> str:
    for plain, written in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("~", r"$\sim$")):
        text = text.replace(plain, written)
    return text


# ------------------------------------------------------------------------------------------------------------ the door


def compare(
    model_dir: str | Path,
    tokenizer,
    data,
    calibration: Sequence[Tensor],
    *,
    methods: Iterable[str] = ("rtn", "mse", "hqq", "nf4", "awq", "gptq"),
    bits: Iterable[int] = (4, 3),
    group: int = 32,
    recipes: Mapping[str, Recipe] | None = None,
    peers: Mapping[str, Iterable[str]] | None = None,
    peers_root: str | Path | None = None,
    out: str | Path,
    max_docs=None,
    context: int = 512,
    threads: int = 0,
    seed: int = 0,
    bootstrap: int = 2000,
    progress: bool = True,
) -> Comparison:
    """The table of `methods` (of `METHODS`), own `recipes` {name: recipe} and `peers` {peer: methods} on the model in `model_dir`.

    `data` is scored and `calibration` (as of `data.calibration_batches`) seen by every line. `out`: a folder that keeps
    each line's weights; lines that are there, of the same model, tokens and settings, are not made again. A line that
    fails is left out, with a warning that says why; when all do, RuntimeError. ValueError for an unknown method or peer.
    """
    from edgelab import peers as tools

    jobs: list[tuple[str, str, dict]] = []
    for b in bits:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
            if (b != 4 and method in FOUR_BITS_ONLY) or (b != 8 and method in EIGHT_BITS_ONLY):
                continue
            scheme_of, recipe_of = METHODS[method]
            scheme = scheme_of(b, group)
            jobs.append((f"{method} {scheme}", method, {"recipe": recipe_of(scheme).to_json(), "scheme": scheme}))
        for peer, chosen in (peers or {}).items():
            for method in chosen:
                if method not in tools.peer(peer).methods:
                    raise ValueError(f"method {method!r} of {peer} is not one of {', '.join(tools.peer(peer).methods)}")
                jobs.append((f"{peer} {method} {b}-g{group}", method, {"peer": peer, "method": method, "bits": b, "group": group}))
    for name, recipe in (recipes or {}).items():
        jobs.append((name, name, {"recipe": recipe.to_json(), "scheme": "own recipe"}))

    names = [name for name, _, _ in jobs]
    twice = {name for name in names if names.count(name) > 1} | ({"fp"} & set(names))
    if twice:
        raise ValueError(f"two lines would be called {sorted(twice)[0]!r} (the original is 'fp'); give the recipe another name")
    lengths = {ids.shape[1:] for ids in calibration}
    if len(lengths) != 1:
        raise ValueError(f"calibration has rows of {len(lengths)} lengths; they must be of one, as calibration_batches makes them")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model, ids = load(model_dir), torch.cat(list(calibration))
    key = {"model": _digest_of(model), "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16], "shape": list(ids.shape)}
    key |= {"threads": threads, "seed": seed, "code": _digest_of_code()}
    body = [w for w in weights(model) if w.role not in KEPT and not w.tied_to]
    lines: list[Line] = []
    folders: dict[str, Path] = {}
    failed: list[str] = []
    with tqdm(jobs, desc="compare", unit="line", disable=not progress) as bar:
        for name, method, job in bar:
            bar.set_postfix_str(name)
            versions = tools.peer(job["peer"]).requirements if "peer" in job else ()
            digest = hashlib.sha256(json.dumps([key, job, versions], sort_keys=True).encode()).hexdigest()[:16]
            folder = out / "lines" / digest
            try:
                if not (folder / "line.json").is_file():
                    if "peer" in job:
                        _make_peer(folder, name, method, job, model, model_dir, ids, body, threads, seed, peers_root)
                    else:
                        _make_own(folder, name, method, job, model, model_dir, ids, body, threads)
                lines.append(Line(**_tuples(json.loads((folder / "line.json").read_text()))))
                folders[name] = folder
            except (RuntimeError, FileNotFoundError) as error:
                failed.append(f"{name}: {str(error).strip().splitlines()[-1]}")
                tqdm.write(f"left out: {name}: {error}")
    if not lines:
        raise RuntimeError("no line could be made: " + "; ".join(failed))

    report = Report()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    at_once = max(1, int(2e9 / size))  # models in memory beside the original
    done = [line.name for line in lines]
    for first in range(0, len(done), at_once):
        models = {"fp": model} | {n: _loaded(folders[n], model) for n in done[first : first + at_once]}
        found = measure(models, tokenizer, data, baseline="fp", max_docs=max_docs, context=context, progress=progress)
        part = summarise(pool(found), resamples=bootstrap, seed=seed) + summarise(found, resamples=bootstrap, seed=seed)
        report += Report(tuple(r for r in part if first == 0 or r.model != "fp"))
    rounded, whole = sum(w.tensor.numel() for w in body), sum(p.numel() for p in model.parameters())
    facts = {
        "model": Path(model_dir).name,
        "weights rounded": f"{rounded:,} of {whole:,}",
        "calibration tokens": int(ids.numel()),
        "corpus": report.rows[0].corpus,
        "machine": report.rows[0].machine,
        "left out": failed,
    }
    made = Comparison(tuple(lines), report, facts)
    for file, text in (
        ("comparison.json", made.to_json()),
        ("comparison.md", made.to_markdown()),
        ("comparison.tex", made.to_latex()),
        ("comparison.html", made.to_html()),
        ("comparison.csv", made.to_dataframe().to_csv(index=False)),
    ):
        temporary = out / f".{file}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / file)
    return made


def pool(measured: Measured) -> Measured:
    """The same sums with the domains put together: "all" (every document) and "answers" (those with one to match)."""
    scores: dict[str, dict[str, Scores]] = {}
    for name, by_domain in measured.scores.items():
        every = list(by_domain.values())
        scores[name] = {"all": _joined(every, False)}
        with_answers = [s for s in every if s.correct is not None]
        if with_answers:
            scores[name]["answers"] = _joined(with_answers, True)
    return Measured(scores, measured.baseline, measured.corpus, measured.context, measured.stride)


def _joined(parts: list[Scores], answers: bool) -> Scores:
    sources, first = [], 0
    for s in parts:
        own = np.arange(len(s.tokens)) if s.source is None else s.source
        sources.append(own + first)
        first += int(own.max()) + 1

    def joined(field: str):
        arrays = [getattr(s, field) for s in parts]
        return None if any(a is None for a in arrays) else np.concatenate(arrays)

    fields = ("tokens", "n_bytes", "nll", "text_nll", "kld", "token_kld", "same_top", "overlap")
    return Scores(**{f: joined(f) for f in fields}, correct=joined("correct") if answers else None, source=np.concatenate(sources))


def _digest_of(model: nn.Module) -> str:
    """Of every tensor, to the bit, and of the config."""
    h = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}\n".encode())
    return h.hexdigest()[:16]


def _digest_of_code() -> str:
    """Of this package's source: a line that other code has made is made again."""
    h = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        h.update(file.read_bytes())
    return h.hexdigest()[:16]


def _tuples(d: dict) -> dict:
    return d | {"notes": tuple(d["notes"])}


def _loaded(folder: Path, model: nn.Module) -> nn.Module:
    if (folder / "bundle").is_dir():
        return load_bundle(folder / "bundle")
    from edgelab.peers import put

    return put(model, load_file(folder / "weights.safetensors"))


def _write_line(folder: Path, line: Line) -> None:
    """Last of all: a folder without it is an unfinished one."""
    temporary = folder / ".line.json"
    temporary.write_text(json.dumps(dict(vars(line)), indent=1), encoding="utf-8")
    temporary.replace(folder / "line.json")


def _make_peer(folder, name, method, job, model, model_dir, ids, body, threads, seed, root) -> None:
    from edgelab import peers as tools

    names = [w.parameter_name for w in body]
    settings = {"bits": job["bits"], "group_size": job["group"], "threads": threads or torch.get_num_threads(), "seed": seed, "root": root}
    done = tools.run(job["peer"], method, model_dir, ids, names, **settings)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in done.weights.items()}, folder / "weights.safetensors")
    count, every = sum(w.tensor.numel() for w in body), sum(p.numel() for p in model.parameters())
    rounded = round(count * done.coverage)
    bytes_all = (rounded * done.bits_per_weight + 16 * (every - rounded)) / 8
    by = f"{job['peer']} {done.version}"
    line = Line(
        name, method, by, f"{job['bits']} bits, {job['group']}", done.bits_per_weight, 8 * bytes_all / every, round(bytes_all), True,
        done.seconds, done.peak_rss_bytes, done.coverage, done.notes,
    )  # fmt: skip
    _write_line(folder, line)


def _make_own(folder: Path, name: str, method: str, job: dict, model, model_dir, ids: Tensor, body: list, threads: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="edgelab-line-") as scratch:
        save_file({"ids": ids.contiguous()}, Path(scratch) / "calibration.safetensors")
        told = job | {"model": str(model_dir), "out": str(folder.absolute() / "bundle"), "threads": threads}
        (Path(scratch) / "job.json").write_text(json.dumps(told), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "edgelab.compare", scratch], text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError("\n".join((done.stderr or done.stdout).strip().splitlines()[-6:]) or f"exit code {done.returncode}")
        cost = json.loads((Path(scratch) / "cost.json").read_text())
    coverage, wanted = coverage_of(folder / "bundle"), {w.name for w in body}
    rounded = [r for r in coverage if r.touched and expert_of(r.name)[0] in wanted]
    count = sum(r.parameters for r in rounded)
    notes = tuple(cost["remarks"])
    beside = sorted({r.role for r in coverage if r.touched} & set(KEPT))
    if beside:
        notes += (f"also rounds {' and '.join(beside)}, which the other lines keep",)
    line = Line(
        name, method, "edgelab", job["scheme"], 8 * sum(r.predicted_bytes for r in rounded) / max(count, 1),
        8 * coverage.file_bytes / sum(p.numel() for p in model.parameters()), coverage.file_bytes, False, cost["seconds"],
        cost["peak_rss_bytes"], count / sum(w.tensor.numel() for w in body), notes,
    )  # fmt: skip
    _write_line(folder, line)


def _work(folder: Path) -> None:
    """One of our lines, in a process of its own: what a peer's worker is to a peer."""
    from edgelab.compress import compress

    job = json.loads((folder / "job.json").read_text())
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    ids = load_file(folder / "calibration.safetensors")["ids"]
    model, recipe = load(job["model"]), Recipe.from_json(job["recipe"])
    started = time.perf_counter()
    made = compress(model, recipe, calibration=list(ids.split(8)), progress=False, inplace=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = {"seconds": seconds, "peak_rss_bytes": peak, "remarks": made.remarks}
    save_bundle(made.model, None, job["out"], recipe=recipe, coverage=made.coverage)
    (folder / "cost.json").write_text(json.dumps(cost), encoding="utf-8")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
