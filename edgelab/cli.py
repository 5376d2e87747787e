"""The command line: `edgelab demo | compress | evaluate | export | info | doctor`.

A thin view: each command reads its arguments, calls the pipeline and prints what it measured. Bad input ends with one
sentence on stderr and exit code 2 (set EDGELAB_DEBUG=1 for the traceback); a check that failed ends with 1. torch is
imported inside the commands, so that `--help` comes at once.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from edgelab import __version__, words
from edgelab.export import ExportError
from edgelab.recipe import Recipe
from edgelab.report import Report, machine

app = typer.Typer(
    name="edgelab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a language model small enough for a phone, and measure what it costs: compress, evaluate, export.",
)
out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)

MARKER = "edgelab-demo.json"  # a folder that holds it was written by `edgelab demo` and may be overwritten


class CheckFailedError(Exception):
    """Something was measured and is not as it must be: exit code 1."""


def _guarded(command: Callable) -> Callable:
    """`command` with its expected errors turned into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except CheckFailedError as error:
            code, said = 1, f"Failed: {error}"
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("edgelab"):
                raise
            code, said = 2, f"Error: the package {error.name!r} is missing; `edgelab doctor` says what it is for and how to install it"
        except ExportError as error:
            code, said = 1, f"Failed: {error}"
        except (ValueError, OSError) as error:
            if os.environ.get("EDGELAB_DEBUG"):
                raise
            code, said = 2, f"Error: {error}"
        err_console.print(said, markup=False, style="bold red", soft_wrap=True)
        raise typer.Exit(code)

    return run


# --------------------------------------------------------------------------------------------------- arguments

Threads = Annotated[int, typer.Option("--threads", help="Threads for torch and numba; 0: all usable cores.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the bootstrap and of the choice of documents.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is at --out.")]
MaxDocs = Annotated[int, typer.Option("--max-docs", help="Documents per domain; 0: all.", min=0)]


class Target(StrEnum):
    onnx = "onnx"


def _threads(n: int) -> int:
    """Set the threads of torch and numba and return their number."""
    import numba
    import torch

    from edgelab.doctor import usable_cores

    n = min(n or usable_cores(), numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(n)
    numba.set_num_threads(n)
    return n


def _free(out: Path, force: bool, *, ours: str) -> None:
    """Make sure that `out` can be written to; `ours` is the file that marks a folder as one that we may replace."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
    elif not force:
        raise FileExistsError(f"--out {out} exists already; choose another place, or give --force to overwrite it")
    elif out.is_dir():
        if any(out.iterdir()) and not (out / ours).is_file():
            raise FileExistsError(f"--out {out} is a folder that edgelab did not write (it holds no {ours}); --force does not delete it")
        shutil.rmtree(out)


def _recipe(file: Path | None, scheme: str | None) -> Recipe:
    if (file is None) == (scheme is None):
        raise ValueError(
            "give either --recipe FILE or --scheme such as int4-g32, " + ("not both" if file else "for it says how to compress")
        )
    if scheme is not None:
        return Recipe.uniform(scheme)
    try:
        return Recipe.from_json(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--recipe {file} is not a recipe: {error}; `Recipe.uniform('int4-g32').to_json()` shows the form") from error


def _no_network_needed(name: str) -> None:
    """A local folder never needs the hub: ask transformers not to try."""
    if Path(name).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _documents(file: Path | None):
    """The embedded corpus' test split, or a local text, jsonl or parquet file as a dataset with the same columns."""
    import datasets

    from edgelab.data import corpus

    if file is None:
        return corpus()["test"]
    if not file.is_file():
        raise FileNotFoundError(f"--data {file} is no file; give a .txt, .jsonl or .parquet file")
    if file.suffix == ".txt":  # documents are separated by empty lines
        texts = [t.strip() + "\n" for t in file.read_text(encoding="utf-8").split("\n\n") if t.strip()]
        data = datasets.Dataset.from_dict({"text": texts})
    elif file.suffix in (".jsonl", ".json"):
        data = datasets.Dataset.from_json(str(file), cache_dir=None, keep_in_memory=True)
    elif file.suffix == ".parquet":
        data = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    else:
        raise ValueError(f"--data {file}: {file.suffix or 'no'} extension is not one of .txt, .jsonl, .parquet")
    if "text" not in data.column_names:
        raise ValueError(f"--data {file} has the columns {', '.join(data.column_names)}; a column `text` is needed")
    if not len(data):
        raise ValueError(f"--data {file} holds no document")
    for column, value in (("domain", file.stem), ("prompt", ""), ("answer", "")):
        if column not in data.column_names:
            data = data.add_column(column, [value] * len(data))
    return data


# ------------------------------------------------------------------------------------------------------- print


def _print_table(rows: list[dict[str, str]], title: str, *, right: Iterable[str] = ()) -> None:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(c, "") for c in columns))
    out_console.print(table, markup=False) if out_console.is_terminal else Console(width=200, highlight=False).print(table)
    out_console.print()


def _print_report(report: Report, title: str) -> None:
    _print_table(words.table(report), title, right=report.models())


def _print_coverage(coverage, title: str) -> None:
    _print_table(coverage.table(), title, right=("parameters", "touched", "bytes", "bits per weight"))
    out_console.print(words.say_coverage(coverage) + "\n", markup=False, soft_wrap=True)


def _say(text: str) -> None:
    """A detail below the line of its step."""
    out_console.print(f"      {text}", markup=False, soft_wrap=True)


class _Steps:
    """Prints a numbered line per step and, when it ends, the seconds it took."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()

    @contextmanager
    def __call__(self, text: str):
        self.done += 1
        started = time.perf_counter()
        out_console.print(f"[{self.done}/{self.total}] {text}", markup=False, soft_wrap=True, style="bold")
        yield
        out_console.print(f"      done in {time.perf_counter() - started:.1f} s", markup=False, style="dim")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


# ---------------------------------------------------------------------------------------------------- commands


def _version(value: bool) -> None:
    if value:
        out_console.print(f"edgelab {__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Make a language model small enough for a phone, and measure what it costs: compress, evaluate, export."""


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the bundle, the ONNX file and the report.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer documents: wider intervals, done in a fraction of the time.")] = False,
    threads: Threads = 0,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """The whole way once, without a network: the embedded MoE model to int8 and int4, measured, bundled, exported, verified.

    Writes OUT/int4 (a bundle that transformers loads), OUT/int4.onnx, OUT/report.html and OUT/report.json. A folder
    that an earlier demo wrote is overwritten.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    steps = _Steps(6)
    _free(out, force or (out / MARKER).is_file(), ours=MARKER)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps({"edgelab": __version__, "seed": seed, "quick": quick}))

    with steps("Load the embedded mixture-of-experts model and build its corpus from this Python installation"):
        import torch

        from edgelab import data, page
        from edgelab.bundle import coverage_of, load_bundle, save_bundle, verify_bundle
        from edgelab.compress import audit, compress
        from edgelab.doctor import fingerprint, peak_rss_bytes
        from edgelab.evaluate import QUICK_DOCS, evaluate
        from edgelab.export.onnx import export
        from edgelab.model import load, load_tokenizer
        from edgelab.paths import data_dir

        n_threads = _threads(threads)
        source = data_dir() / "edge-moe"
        model, tokenizer = load(source), load_tokenizer(source)
        corpus = data.corpus()
        test = corpus["test"]
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in corpus.items())
        _say(f"{type(model).__name__}, {audit(model).parameters:,} parameters; documents: {sizes}")

    recipes = {"int8": Recipe.uniform("int8-row"), "int4": Recipe.uniform("int4-g32")}
    with steps("Compress every weight matrix, the fused expert stacks included: int8 per row, int4 in groups of 32"):
        compressed = {name: compress(model, recipe) for name, recipe in recipes.items()}
        for name, c in compressed.items():
            _say(f"{name}: {c.coverage!r}")

    with steps("Evaluate all three on text that the model never saw"):
        max_docs = {"prose": 8, "code": 8, "assistant": 40, "arithmetic": 80} if quick else dict(QUICK_DOCS)
        models = {"fp": model, **{name: c.model for name, c in compressed.items()}}
        # the size of the original is that of its bfloat16 file, not of the float32 copy that runs here
        sizes = {"fp": sum(f.stat().st_size for f in source.glob("*.safetensors"))}
        sizes |= {name: c.coverage.predicted_bytes for name, c in compressed.items()}
        report = evaluate(models, tokenizer, test, max_docs=max_docs, seed=seed, bootstrap=500 if quick else 2000, sizes=sizes)

    with steps("Save the int4 bundle, check its hashes, load it again"):
        int4 = compressed["int4"]
        bundle = save_bundle(int4.model, tokenizer, out / "int4", recipe=int4.recipe, coverage=int4.coverage, report=report)
        verify_bundle(bundle)
        again = load_bundle(bundle)
        ids = tokenizer(test[0]["text"], return_tensors="pt").input_ids[:, :64]
        with torch.no_grad():
            difference = (again(ids).logits - int4.model(ids).logits).abs().max().item()
        saved = coverage_of(bundle)
        _say(
            f"{saved.file_bytes:,} bytes on disk, {saved.predicted_bytes:,} predicted ({saved.file_error:+.2%}), "
            f"{saved.file_bytes / sizes['fp']:.3f} of the "
            f"original's; hashes match; the reloaded model's logits differ by at most {difference:.1e}"
        )
        if difference > 1e-4:
            raise CheckFailedError(f"the reloaded bundle's logits differ by {difference:.3g} from the model that was saved")

    with steps("Export the same int4 codes to ONNX and run them in ONNX Runtime"):
        exported = export(again, out / "int4.onnx")
        told = {line["item"]: line["value"] for line in exported.table()}
        _say(f"{told['logits against torch']}; {told['verified by']}")

    with steps("Write the report"):
        (out / "report.json").write_text(report.to_json(), encoding="utf-8")
        facts = {
            **fingerprint(),
            "threads used": n_threads,
            "corpus": next((r.corpus for r in report if r.corpus), data.fingerprint(test)),
            "seed": seed,
            "documents per domain": ", ".join(f"{k} {v}" for k, v in max_docs.items()),
        }
        sections = page.standard_sections(report, coverage=saved, recipes=recipes, facts=facts)
        sections.insert(
            -1, page.Section("The exported file", (page.facts_table("ONNX, run in ONNX Runtime against torch with the same codes", told),))
        )
        lead = (
            f"{type(model).__name__} with {int4.coverage.parameters:,} parameters, in floating point and in 8 and 4 bits. "
            f"Every number was measured on {machine()} by `edgelab demo`."
        )
        path = page.write(out / "report.html", "edgelab demo: a mixture-of-experts model in 4 bits", lead, sections)

    out_console.print()
    _print_report(report, "Measured here, with 95 % intervals (paired bootstrap over documents) in brackets")
    _print_coverage(saved, "Coverage audit of int4")
    _print_table(exported.table(), "ONNX file, verified in ONNX Runtime")
    out_console.print(f"bundle   {bundle}\nONNX     {out / 'int4.onnx'}\nreport   {path.resolve().as_uri()}", markup=False, soft_wrap=True)
    out_console.print(f"{steps.seconds:.1f} s in all on {n_threads} threads, peak memory {peak_rss_bytes() / 1e9:.2f} GB", markup=False)


@app.command()
@_guarded
def compress(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the bundle to.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A recipe as JSON.")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="One scheme for all weights, such as int4-g32, int8-row, int3-g64.")
    ] = None,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Store MODEL's weights in low bits and write a bundle that `AutoModelForCausalLM.from_pretrained` loads."""
    chosen = _recipe(recipe, scheme)
    if out.exists() and not force:
        _free(out, force, ours="edgelab.json")
    _no_network_needed(model)
    from edgelab.bundle import save_bundle, verify_bundle
    from edgelab.compress import compress as run
    from edgelab.model import load, load_tokenizer

    _threads(threads)
    result = run(load(model), chosen, inplace=True)
    tokenizer = load_tokenizer(model)
    _free(out, force, ours="edgelab.json")
    bundle = save_bundle(result.model, tokenizer, out, recipe=chosen, coverage=result.coverage)
    verify_bundle(bundle)
    _print_coverage(result.coverage, f"Coverage audit, recipe {chosen.digest}")
    out_console.print(f"bundle   {bundle}", markup=False, soft_wrap=True)


@app.command()
@_guarded
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models or bundles; the first is the baseline unless --baseline says otherwise.")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="The model that the others are compared with.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A .txt, .jsonl or .parquet file (column text, optional domain, prompt, answer).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this .json file, and a page beside it.")] = None,
    max_docs: MaxDocs = 100,
    threads: Threads = 0,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Measure perplexity, bits per byte, KL divergence, exact match, flips, router overlap and speed, with intervals."""
    if baseline is not None:
        models = [baseline, *(m for m in models if m != baseline)]
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"--out {out} must end in .json; the page is written beside it as .html")
        for file in (out, out.with_suffix(".html")):
            _free(file, force, ours="edgelab.json")
    for name in models:
        _no_network_needed(name)
    documents = _documents(data)
    from edgelab import page
    from edgelab.doctor import fingerprint
    from edgelab.evaluate import evaluate as run
    from edgelab.model import load, load_tokenizer

    n_threads = _threads(threads)
    names = _short_names(models)
    loaded = {short: load(name) for short, name in names.items()}
    report = run(loaded, load_tokenizer(models[0]), documents, max_docs=max_docs or None, seed=seed)
    _print_report(report, f"Measured here, against {next(iter(names))}, with 95 % intervals in brackets")
    if out is not None:
        out.write_text(report.to_json(), encoding="utf-8")
        facts = {**fingerprint(), "threads used": n_threads, "seed": seed, "models": ", ".join(f"{k} = {v}" for k, v in names.items())}
        path = page.write(out.with_suffix(".html"), "edgelab evaluation", ", ".join(names), page.standard_sections(report, facts=facts))
        out_console.print(f"report   {out}\npage     {path.resolve().as_uri()}", markup=False, soft_wrap=True)


def _short_names(models: list[str]) -> dict[str, str]:
    """{a short distinct name: the model}: the last part of a path, and more of it where that is not unique."""
    names: dict[str, str] = {}
    for model in dict.fromkeys(models):
        parts = Path(model).resolve().parts if Path(model).exists() else tuple(model.split("/"))
        short = next((n for n in ("/".join(parts[-k:]) for k in range(1, len(parts) + 1)) if n not in names), model)
        names[short] = model
    return names


@app.command()
@_guarded
def export(
    bundle: Annotated[str, typer.Argument(help="A bundle written by `edgelab compress`, or a model.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    target: Annotated[Target, typer.Option("--target", help="The format.")] = Target.onnx,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Write BUNDLE for another runtime, run it there, and compare its logits with torch's on the same codes."""
    if out.suffix != ".onnx":
        raise ValueError(f"--out {out} must end in .onnx for --target {target.value}")
    _no_network_needed(bundle)
    _free(out, force, ours="edgelab.json")
    from edgelab.export.onnx import export as run
    from edgelab.model import load

    _threads(threads)
    exported = run(load(bundle), out)
    _print_table(exported.table(), f"{target.value} file, verified in its own runtime")
    out_console.print(f"file     {out}", markup=False, soft_wrap=True)


@app.command()
@_guarded
def info(
    model: Annotated[str, typer.Argument(help="A model's folder, its name on the hub, or a bundle.")],
    weights: Annotated[bool, typer.Option("--weights", help="List every stored tensor, not only the sum per role.")] = False,
) -> None:
    """Say what MODEL is made of: family, weights by role, bits, bytes; for a bundle its recipe, and whether its files are whole."""
    _no_network_needed(model)
    from edgelab.compress import audit
    from edgelab.model import FAMILIES, family_of, load

    loaded = load(model)
    coverage = audit(loaded)
    kind = family_of(loaded).model_type
    known = "known" if kind in FAMILIES else "not in the table: every linear layer and embedding is walked"
    out_console.print(f"{type(loaded).__name__}, family {kind or 'none'} ({known})\n", markup=False)
    if weights:
        rows = [
            {
                "weight": r.name,
                "role": r.role,
                "shape": " x ".join(map(str, r.shape)),
                "stored as": r.scheme,
                "bytes": f"{r.predicted_bytes:,}",
            }
            for r in coverage.rows
        ]
        _print_table(rows, "Stored tensors", right=("bytes",))
    _print_coverage(coverage, "Weights by role")
    if (Path(model) / "edgelab.json").is_file():
        from edgelab.bundle import read_manifest, verify_bundle

        manifest = read_manifest(model)
        verify_bundle(model)
        out_console.print(f"bundle: format {manifest.get('format')}, all files match their sha256\n", markup=False)
        if manifest.get("recipe"):
            out_console.print(json.dumps(manifest["recipe"], indent=1), markup=False)


@app.command()
@_guarded
def doctor() -> None:
    """Examine this machine: packages against the tested versions, CPU features, memory, and whether it works without a network."""
    from edgelab.doctor import examine, fingerprint
    from edgelab.doctor import table as doctor_table

    _print_table([{"what": k, "value": v} for k, v in fingerprint().items()], "This machine")
    checks = examine()
    _print_table(doctor_table(checks), "Examination")
    failed = [c.name for c in checks if c.status == "fail"]
    if failed:
        raise CheckFailedError(f"{', '.join(failed)}: see the way out beside each")
    out_console.print("All that is needed is here.", markup=False)


if __name__ == "__main__":
    app()
