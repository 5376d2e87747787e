"""The command line: `edgelab demo | compress | evaluate | compare | export | serve | info | doctor`.

A thin view: each command reads its arguments, calls the pipeline and prints what it measured. Bad input ends with one
sentence on stderr and exit code 2 (set EDGELAB_DEBUG=1 for the traceback); a check that failed ends with 1. torch is
imported inside the commands, so that `--help` comes at once.
"""

import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgelab import __version__, words
from edgelab.export import TARGETS, ExportError
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


def _expected(error: Exception) -> bool:
    """Bad input or a broken model or data set (numbers that overflow are ArithmeticErrors); anything else is our mistake."""
    return isinstance(error, ValueError | OSError | ArithmeticError) or type(error).__module__.split(".")[0] == "datasets"


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
        except Exception as error:
            if os.environ.get("EDGELAB_DEBUG") or not _expected(error):
                raise
            code, said = 2, f"Error: {error}"
        err_console.print(said, markup=False, style="bold red", soft_wrap=True)
        raise typer.Exit(code)

    return run


# --------------------------------------------------------------------------------------------------- arguments

Threads = Annotated[int, typer.Option("--threads", help="Threads for torch and numba; 0: all usable cores.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the bootstrap and of the choice of documents.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is at --out.")]
CalibrationData = Annotated[
    str | None, typer.Option("--data", help="Text to calibrate on, as for evaluate; of it the calibration split. By default the corpus'.")
]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", help="At most so many tokens of it.", min=1)]
MaxDocs = Annotated[int, typer.Option("--max-docs", help="Documents per domain; 0: all.", min=0)]


class Target(StrEnum):
    onnx = "onnx"
    gguf = "gguf"
    web = "web"


def _threads(n: int) -> int:
    """Set the threads of torch and numba and return their number."""
    import numba
    import torch

    from edgelab.doctor import usable_cores

    n = min(n or usable_cores(), numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(n)
    numba.set_num_threads(n)
    return n


def _may_write(out: Path, force: bool, *, ours: str, models: Iterable[str | Path] = ()) -> None:
    """Make sure, without touching anything, that `out` may be written: what lies there stays until its successor is whole.

    `ours` is the file that marks a folder as one that we may replace. Raises FileExistsError, and ValueError when `out`
    is, holds or lies in one of `models`.
    """
    here = out.resolve()
    for model in models:
        if Path(model).exists():
            there = Path(model).resolve()
            if here == there or here in there.parents or there in here.parents:
                how = "is" if here == there else "holds" if here in there.parents else "lies in"
                raise ValueError(f"--out {out} {how} the model {model}, which would be overwritten or changed; choose another place")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
    elif not force:
        raise FileExistsError(f"--out {out} exists already; choose another place, or give --force to overwrite it")
    elif out.is_dir() and any(out.iterdir()) and not (out / ours).is_file():
        raise FileExistsError(f"--out {out} is a folder that edgelab did not write (it holds no {ours}); --force does not delete it")


@contextmanager
def _staged(out: Path):
    """A new folder beside `out` that takes its place at the end; after an error `out` is as it was, and the new one gone."""
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        whole = staging / out.name
        whole.mkdir()
        yield whole
        if out.exists():
            out.rename(staging / "previous")
            try:
                whole.rename(out)
            except BaseException:
                (staging / "previous").rename(out)
                raise
        else:
            whole.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _recipe(
    file: Path | None, scheme: str | None, method: str | None = None, activations: str | None = None, budget: float | None = None
) -> Recipe:
    if (file is None) == (scheme is None):
        raise ValueError(
            "give either --recipe FILE or --scheme such as int4-g32, " + ("not both" if file else "for it says how to compress")
        )
    if scheme is not None:
        return Recipe.uniform(scheme, method=method or "rtn", activations=activations, budget=budget)
    if method or activations or budget:
        raise ValueError("--method, --activations and --budget go with --scheme; a recipe names its own")
    if str(file) == "phone" and not file.is_file():
        return Recipe.phone()
    if not file.is_file():
        raise ValueError(f"--recipe {file}: there is no such file; `phone` is the only recipe with a name")
    try:
        return Recipe.from_json(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--recipe {file} is not a recipe: {error}; `Recipe.uniform('int4-g32').to_json()` shows the form") from error


def _local_only(*names: str | Path) -> None:
    """Where all of `names` are on this disk, the hub is never needed: tell transformers and datasets not to try."""
    if all(Path(name).exists() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece.*", "tekken.json", "*.tiktoken")


def _tokenizer(name: str):
    """The tokenizer of the model `name`, None (and a line that says so) where it has none.

    From a folder without a tokenizer's files transformers makes an empty one for some architectures and fails for
    others; neither is wanted. Raises what loading raises where the files are there but do not load.
    """
    from edgelab.model import load_tokenizer

    why = "its folder holds no tokenizer file"
    local = Path(name).is_dir()
    if not local or any(f for pattern in _TOKENIZER_FILES for f in Path(name).glob(pattern)):
        try:
            tokenizer = load_tokenizer(name)
            if len(tokenizer) > 1:
                return tokenizer
            why = f"the one that loads knows {len(tokenizer)} token"
        except (ValueError, OSError) as error:
            if local:
                raise
            why = str(error).splitlines()[0]  # a network that fails will fail again, and stop us, when the weights are asked for
    elif not (Path(name) / "config.json").is_file():
        return None  # no model either; loading it says what is wrong
    err_console.print(f"Note: {name} comes without a tokenizer: {why}", markup=False, style="yellow", soft_wrap=True)
    return None


def _one_tokenizer(models: list[str]):
    """The tokenizer that all of `models` share; one without its own is taken to use the others'. Raises ValueError."""
    found = {name: tokenizer for name in models if (tokenizer := _tokenizer(name)) is not None}
    if not found:
        raise ValueError(f"{models[0]} has no tokenizer; put its files (tokenizer.json, tokenizer_config.json) beside config.json")
    (first, tokenizer), *others = found.items()
    vocabulary = tokenizer.get_vocab()
    for name, other in others:
        if (theirs := other.get_vocab()) != vocabulary:
            differ = len(dict(vocabulary.items() ^ theirs.items()))
            raise ValueError(
                f"{name} and {first} have different tokenizers ({len(theirs):,} and {len(vocabulary):,} tokens, {differ:,} differ): "
                "their figures per token cannot be compared; evaluate them one at a time and compare bits per byte"
            )
    return tokenizer


def _documents(source: str | None):
    """The embedded corpus' test split, or all documents of any source that `edgelab.data.from_source` reads."""
    import datasets

    from edgelab.data import corpus, from_source

    if source is None:
        return corpus()["test"]
    splits = from_source(source, label=Path(source).stem or "text")
    return datasets.concatenate_datasets([part for part in splits.values() if len(part)])


def _calibration(tokenizer, model: str, source: str | None, tokens: int, context: int, split: str = "calibration") -> list:
    """Batches of tokens of the embedded corpus' calibration (or training) split, or of that of any other source."""
    from edgelab.data import calibration_batches, corpus, from_source

    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, and this recipe has to see text: put its files beside config.json")
    splits = corpus() if source is None else from_source(source, label=Path(source).stem or "text")
    return calibration_batches(tokenizer, splits[split], tokens=tokens, context=context)


def _context(models: Iterable, asked: int | None) -> int:
    """Tokens of a window: `asked`, or 512; never more than the positions that every one of `models` has."""
    configs = [getattr(m.config, "get_text_config", lambda m=m: m.config)() for m in models]
    most = min((n for c in configs if (n := getattr(c, "max_position_embeddings", None))), default=None)
    if asked is not None and most is not None and asked > most:
        raise ValueError(f"--context {asked} is more than the {most} positions that the models have")
    return asked or min(512, most or 512)


# ------------------------------------------------------------------------------------------------------- print


def _print_table(rows: list[dict[str, str]], title: str, *, right: Iterable[str] = ()) -> None:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(row.get(c, "")) for c in columns))  # or rich would read [lab] as markup
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
    from edgelab.paths import data_dir

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    source = data_dir() / "edge-moe"
    _may_write(out, force or (out / MARKER).is_file(), ours=MARKER, models=(source,))
    with _staged(out) as folder:
        _demo(source, folder, out, quick=quick, threads=threads, seed=seed)


def _demo(source: Path, folder: Path, out: Path, *, quick: bool, threads: int, seed: int) -> None:
    """The steps of the demo: everything is written into `folder`, which becomes `out` afterwards."""
    steps = _Steps(6)
    (folder / MARKER).write_text(json.dumps({"edgelab": __version__, "seed": seed, "quick": quick}), encoding="utf-8")

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
        phone, phone_coverage = load_bundle(data_dir() / "edge-phone"), coverage_of(data_dir() / "edge-phone")
        _say(f"phone (half of the experts, then learning: made beforehand by python -m edgelab.phone): {phone_coverage!r}")

    with steps("Evaluate all four on text that the model never saw"):
        max_docs = {"prose": 8, "code": 8, "assistant": 40, "arithmetic": 80} if quick else dict(QUICK_DOCS)
        models = {"fp": model, **{name: c.model for name, c in compressed.items()}, "phone": phone}
        # the size of the original is that of its bfloat16 file, not of the float32 copy that runs here
        sizes = {"fp": sum(f.stat().st_size for f in source.glob("*.safetensors"))}
        sizes |= {name: c.coverage.predicted_bytes for name, c in compressed.items()} | {"phone": phone_coverage.predicted_bytes}
        report = evaluate(models, tokenizer, test, max_docs=max_docs, seed=seed, bootstrap=500 if quick else 2000, sizes=sizes)

    with steps("Save the int4 bundle, check its hashes, load it again"):
        int4 = compressed["int4"]
        bundle = save_bundle(int4.model, tokenizer, folder / "int4", recipe=int4.recipe, coverage=int4.coverage, report=report)
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
        exported = export(again, folder / "int4.onnx")
        told = {line["item"]: line["value"] for line in exported.table()}
        _say(f"{told['logits against torch']}; {told['verified by']}")

    with steps("Write the report"):
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        facts = {
            **fingerprint(),
            "threads used": n_threads,
            "fingerprint of the test split": data.fingerprint(test),
            "fingerprint of the corpus (all splits)": data.fingerprint(corpus),
            "seed": seed,
            "documents per domain": ", ".join(f"{k} {v}" for k, v in max_docs.items()),
        }
        sections = page.standard_sections(report, coverage=saved, recipes=recipes, facts=facts, beside=words.ORIGINAL_SIZE)
        sections.insert(
            -1, page.Section("The exported file", (page.facts_table("ONNX, run in ONNX Runtime against torch with the same codes", told),))
        )
        lead = (
            f"{type(model).__name__} with {int4.coverage.parameters:,} parameters, in floating point, 8 and 4 bits, and for a phone. "
            f"Every number was measured on {machine()} by `edgelab demo`."
        )
        page.write(folder / "report.html", "edgelab demo: a mixture-of-experts model in 4 bits", lead, sections)

    out_console.print()
    _print_report(report, f"Measured here, with 95 % intervals in brackets: {words.INTERVALS}")
    out_console.print(words.ORIGINAL_SIZE + "\n", markup=False, soft_wrap=True)
    _print_coverage(saved, "Coverage audit of int4")
    _print_table(exported.table(), "ONNX file, verified in ONNX Runtime")
    out_console.print(
        f"bundle   {out / 'int4'}\nONNX     {out / 'int4.onnx'}\nreport   {(out / 'report.html').resolve().as_uri()}",
        markup=False,
        soft_wrap=True,
    )
    out_console.print(f"{steps.seconds:.1f} s in all on {n_threads} threads, peak memory {peak_rss_bytes() / 1e9:.2f} GB", markup=False)


@app.command()
@_guarded
def compress(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the bundle to.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A recipe as JSON, or phone: the one of the house.")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="One scheme for all weights, such as int4-g32, int8-row, uint4-g64, nf4-g64.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="How codes are found: rtn (default), hqq, gptq, autoround.")] = None,
    activations: Annotated[
        str | None, typer.Option("--activations", help="Round the layers' inputs too: a8-token, a8-tensor or a8-static.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Effective bits per weight on average: each weight gets its own scheme, by what the model loses."),
    ] = None,
    data: CalibrationData = None,
    tokens: CalibrationTokens = 65_536,
    training_tokens: Annotated[
        int, typer.Option("--training-tokens", help="At most so many tokens of the training split, for steps that learn.", min=1)
    ] = 4_000_000,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder for checkpoints of steps that learn; given again, they go on from there. Default: OUT.work"),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Straight from file to file, in little memory: for folders larger than memory and methods that need no data. "
            "Given again after an interruption, it goes on where it stopped.",
        ),
    ] = False,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Make MODEL smaller and write a bundle that `AutoModelForCausalLM.from_pretrained` loads.

    --scheme stores its weights in low bits. --recipe does all that a recipe can say: experts, channels, heads or layers taken out, zeros,
    distillation, learning with rounding, other routing.
    """
    chosen = _recipe(recipe, scheme, method, activations, budget)
    _may_write(out, force, ours="edgelab.json", models=(model,))
    _local_only(model, *([] if data is None else [data]))
    from edgelab.bundle import save_bundle, verify_bundle
    from edgelab.compress import compress as run
    from edgelab.compress import plan
    from edgelab.model import load

    n_threads = _threads(threads)
    tokenizer = _tokenizer(model)  # first: what is missing shows before the work
    if stream:
        from edgelab.bundle import coverage_of
        from edgelab.stream import compress_checkpoint

        bundle = compress_checkpoint(model, out, chosen, tokenizer=tokenizer, threads=n_threads)
        _print_coverage(coverage_of(bundle), f"Coverage audit, recipe {chosen.digest}")
        out_console.print(f"bundle   {bundle}", markup=False, soft_wrap=True)
        return
    loaded, calibration = load(model), None
    plan(loaded, chosen)  # before the corpus is read, which takes longer
    training, folder = None, work or out.with_name(out.name + ".work")
    if not chosen.data_free:
        calibration = _calibration(tokenizer, model, data, tokens, _context([loaded], None))
    if chosen.learns:
        training = _calibration(tokenizer, model, data, training_tokens, min(256, _context([loaded], None)), split="train")
        _say(f"checkpoints and curves of the learning steps: {folder}")
    settings = {"folder": folder} if chosen.learns else {"inplace": True}
    result = run(loaded, chosen, calibration=calibration, training=training, **settings)
    for remark in result.remarks:
        err_console.print(f"Note: {remark}", markup=False, style="yellow", soft_wrap=True)
    bundle = save_bundle(result.model, tokenizer, out, recipe=chosen, coverage=result.coverage)  # replaces an old one when whole
    verify_bundle(bundle)
    _print_coverage(result.coverage, f"Coverage audit, recipe {chosen.digest}")
    out_console.print(f"bundle   {bundle}", markup=False, soft_wrap=True)


@app.command()
@_guarded
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models or bundles; the first is the baseline unless --baseline says otherwise.")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="The model that the others are compared with.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A .txt, .md, .jsonl or .parquet file, a folder of them, or a hub data set (column text; also domain, prompt, answer).",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this .json file, and a page beside it.")] = None,
    max_docs: MaxDocs = 100,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a window; 512, or the models' positions if fewer.", min=2)
    ] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Tokens from one window to the next; by default half.", min=1)] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8-activations", help="Measure each compressed model with int8 activations too: faster, not quite the same."),
    ] = False,
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
            _may_write(file, force, ours="edgelab.json", models=models)
    _local_only(*models, *([] if data is None else [data]))
    tokenizer = _one_tokenizer(models)
    documents = _documents(data)
    from edgelab import page
    from edgelab.data import fingerprint as text_fingerprint
    from edgelab.doctor import fingerprint
    from edgelab.evaluate import evaluate as run
    from edgelab.model import load

    n_threads = _threads(threads)
    names = _short_names(models)
    loaded = {short: load(name) for short, name in names.items()}
    if int8:
        loaded = _with_int8(loaded)
    context = _context(loaded.values(), context)
    report = run(loaded, tokenizer, documents, max_docs=max_docs or None, context=context, stride=stride, seed=seed)
    _print_report(report, f"Measured here, against {next(iter(names))}, with 95 % intervals in brackets: {words.INTERVALS}")
    if out is not None:
        _write_text(out, report.to_json())
        facts = {
            **fingerprint(),
            "threads used": n_threads,
            "seed": seed,
            "models": ", ".join(f"{k} = {v}" for k, v in names.items()),
            f"fingerprint of {'the test split' if data is None else 'all documents of ' + data}": text_fingerprint(documents),
            "context, tokens": context,
        }
        path = page.write(out.with_suffix(".html"), "edgelab evaluation", ", ".join(names), page.standard_sections(report, facts=facts))
        out_console.print(f"report   {out}\npage     {path.resolve().as_uri()}", markup=False, soft_wrap=True)


@app.command()
@_guarded
def compare(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model in floating point, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the lines and the table; a comparison that was stopped goes on there.")],
    methods: Annotated[
        str, typer.Option("--methods", help="Comma-separated; `all` for all, also those that learn for minutes (autoround, best).")
    ] = "rtn,mse,hqq,nf4,awq,gptq",
    bits: Annotated[str, typer.Option("--bits", help="Comma-separated: 2, 3, 4, 8.")] = "4,3",
    group: Annotated[int, typer.Option("--group", help="Weights that share a scale; schemes with an offset get twice as many.")] = 32,
    recipe: Annotated[list[Path] | None, typer.Option("--recipe", help="A recipe of your own as JSON; may be given again.")] = None,
    peers: Annotated[
        str,
        typer.Option(
            "--peers", help="Other tools: `installed`, `none`, or names such as hqq,gptqmodel:gptaq (python -m edgelab.peers list)."
        ),
    ] = "none",
    data: Annotated[
        str | None, typer.Option("--data", help="Text of your own, as for evaluate: calibrated and tested on its splits.")
    ] = None,
    tokens: CalibrationTokens = 65_536,
    max_docs: MaxDocs = 100,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a window; 512, or the models' positions if fewer.", min=2)
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
) -> None:
    """One table of methods x bits, ours and other tools', on the same model, calibration tokens and test text.

    Writes OUT/comparison.md, .tex, .html, .csv and .json.
    """
    from types import SimpleNamespace

    from transformers import AutoConfig

    from edgelab.compare import METHODS
    from edgelab.compare import compare as run

    try:
        widths = [int(b) for b in bits.split(",")]
    except ValueError:
        raise ValueError(f"--bits {bits} must be numbers with commas between, such as 4,3") from None
    stems = [file.stem for file in recipe or ()]
    if len(set(stems)) < len(stems):
        raise ValueError(f"--recipe: two files are called {max(stems, key=stems.count)!r}, and their lines would be too; rename one")
    own = {file.stem: _recipe(file, None) for file in recipe or ()}
    _local_only(model, *([] if data is None else [data]))
    tokenizer = _one_tokenizer([model])
    from edgelab import peers as tools
    from edgelab.data import corpus, from_source

    chosen = [] if peers == "none" else list(tools.environments()) if peers == "installed" else peers.split(",")
    by_peer: dict[str, list[str]] = {}
    for text in chosen:
        name, _, method = text.partition(":")
        by_peer.setdefault(name, []).append(method or tools.peer(name).methods[0])
    splits = corpus() if data is None else from_source(data, label=Path(data).stem or "text")
    n_threads = _threads(threads)
    context = _context([SimpleNamespace(config=AutoConfig.from_pretrained(model, trust_remote_code=False))], context)
    made = run(
        model, tokenizer, splits["test"], _calibration(tokenizer, model, data, tokens, context),
        methods=list(METHODS) if methods == "all" else methods.split(","), bits=widths, group=group, recipes=own, peers=by_peer,
        out=out, max_docs=max_docs or None, context=context, threads=n_threads, seed=seed,
    )  # fmt: skip
    _print_table(made.table(), f"Measured here, against the original, with 95 % intervals in brackets: {words.INTERVALS}")
    for line in made.lines:
        for note in line.notes:
            out_console.print(f"{line.name}: {note}", markup=False, style="dim", soft_wrap=True)
    if made.facts["left out"]:
        out_console.print("left out: " + "; ".join(made.facts["left out"]), markup=False, soft_wrap=True)
    out_console.print(f"table    {out / 'comparison.md'} (.tex, .html, .csv, .json)", markup=False, soft_wrap=True)


def _with_int8(models: dict) -> dict:
    """`models`, and behind each compressed one a copy that takes int8 activations."""
    from copy import deepcopy

    from edgelab.layers import set_activations

    found = {}
    for name, model in models.items():
        found[name] = model
        if set_activations(model, None):  # it has layers in low bits
            twin = found[f"{name}, int8 activations"] = deepcopy(model)
            set_activations(twin, "int8")
    if len(found) == len(models):
        raise ValueError(f"--int8-activations: {', '.join(models)} has no layer in low bits; name a bundle, from edgelab compress")
    return found


def _write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
    out: Annotated[Path, typer.Option("--out", help="The file to write; a folder for web, and for several targets.")],
    target: Annotated[list[Target] | None, typer.Option("--target", help="The format; may be given several times. Default: onnx.")] = None,
    cache: Annotated[bool, typer.Option("--cache", help="ONNX with keys and values of the past as inputs, for generation.")] = False,
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Run what was written in the target's own runtime.")] = True,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Write BUNDLE for other runtimes, run it there, and compare its logits with torch's on the same codes."""
    targets = list(dict.fromkeys(target or [Target.onnx]))
    if len(targets) > 1:
        places = {t: out / TARGETS[t.value] for t in targets}
    elif targets[0] is not Target.web and out.suffix != f".{targets[0].value}":
        raise ValueError(f"--out {out} must end in .{targets[0].value} for --target {targets[0].value}")
    else:
        places = {targets[0]: out}
    for place in places.values():
        _may_write(place, force, ours="web.json", models=(bundle,))
    _local_only(bundle)
    from edgelab.export import export as run
    from edgelab.model import load

    _threads(threads)
    model = load(bundle)
    for t, place in places.items():
        settings = {Target.onnx: {"cache": cache}}.get(t, {"tokenizer": _tokenizer(bundle)})
        exported = run(model, t.value, place, check=check, **settings)
        _print_table(exported.table(), f"{t.value}, verified in its own runtime" if check else f"{t.value}, not verified")
        out_console.print(f"{'folder' if place.is_dir() else 'file  '}   {place}", markup=False, soft_wrap=True)


@app.command()
@_guarded
def serve(
    folder: Annotated[Path, typer.Argument(help="A folder that `edgelab export --target web` wrote.")],
    port: Annotated[int, typer.Option("--port", help="On 127.0.0.1.", min=1, max=65535)] = 8765,
) -> None:
    """Serve the page in FOLDER to this machine alone, until Ctrl-C."""
    from edgelab.export.web import serve as run

    run(folder, port)


@app.command()
@_guarded
def info(
    model: Annotated[str, typer.Argument(help="A model's folder, its name on the hub, or a bundle.")],
    weights: Annotated[bool, typer.Option("--weights", help="List every stored tensor, not only the sum per role.")] = False,
) -> None:
    """Say what MODEL is made of: family, weights by role, bits, bytes; for a bundle its recipe, and whether its files are whole."""
    _local_only(model)
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
