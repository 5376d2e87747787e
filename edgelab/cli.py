"""The command line: `edgelab demo | compress | evaluate | compare | info | doctor`, and what `cli_export`, `cli_run` and others add.

A thin view: each command reads its arguments, calls the pipeline and prints what it measured. Bad input ends with one
sentence on stderr and exit code 2 (set EDGELAB_DEBUG=1 for the traceback); a check that failed ends with 1. torch is
imported inside the commands, so that `--help` comes at once.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from edgelab import __version__, cli_export, cli_ledger, cli_predict, cli_report, cli_reproduce, cli_run, cli_sweep, words
from edgelab.console import (
    CalibrationData,
    CalibrationTokens,
    CheckFailedError,
    Force,
    MaxDocs,
    Seed,
    Steps,
    Threads,
    context_of,
    err_console,
    guarded,
    local_only,
    may_write,
    one_tokenizer,
    out_console,
    print_coverage,
    print_report,
    print_table,
    read_calibration,
    read_documents,
    say,
    set_threads,
    staged,
    tokenizer_of,
)
from edgelab.recipe import Recipe
from edgelab.report import machine

app = typer.Typer(
    name="edgelab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a language model small enough for a phone, and measure what it costs: compress, evaluate, export.",
)
MARKER = "edgelab-demo.json"  # a folder that holds it was written by `edgelab demo` and may be overwritten


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


# ---------------------------------------------------------------------------------------------------- commands


def _version(value: bool) -> None:
    if value:
        out_console.print(f"edgelab {__version__}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Make a language model small enough for a phone, and measure what it costs: compress, evaluate, export."""


@app.command()
@guarded
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
    may_write(out, force or (out / MARKER).is_file(), ours=MARKER, models=(source,))
    with staged(out) as folder:
        _demo(source, folder, out, quick=quick, threads=threads, seed=seed)


def _demo(source: Path, folder: Path, out: Path, *, quick: bool, threads: int, seed: int) -> None:
    """The steps of the demo: everything is written into `folder`, which becomes `out` afterwards."""
    steps = Steps(6)
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

        n_threads = set_threads(threads)
        model, tokenizer = load(source), load_tokenizer(source)
        corpus = data.corpus()
        test = corpus["test"]
        sizes = ", ".join(f"{name} {len(part):,}" for name, part in corpus.items())
        say(f"{type(model).__name__}, {audit(model).parameters:,} parameters; documents: {sizes}")

    recipes = {"int8": Recipe.uniform("int8-row"), "int4": Recipe.uniform("int4-g32")}
    with steps("Compress every weight matrix, the fused expert stacks included: int8 per row, int4 in groups of 32"):
        compressed = {name: compress(model, recipe) for name, recipe in recipes.items()}
        for name, c in compressed.items():
            say(f"{name}: {c.coverage!r}")
        phone, phone_coverage = load_bundle(data_dir() / "edge-phone"), coverage_of(data_dir() / "edge-phone")
        say(f"phone (half of the experts, then learning: made beforehand by python -m edgelab.phone): {phone_coverage!r}")

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
        say(
            f"{saved.file_bytes:,} bytes on disk, {saved.predicted_bytes:,} predicted ({saved.file_error:+.2%}), "
            f"{saved.file_bytes / sizes['fp']:.3f} of the "
            f"original's; hashes match; the reloaded model's logits differ by at most {difference:.1e}"
        )
        if difference > 1e-4:
            raise CheckFailedError(f"the reloaded bundle's logits differ by {difference:.3g} from the model that was saved")

    with steps("Export the same int4 codes to ONNX and run them in ONNX Runtime"):
        exported = export(again, folder / "int4.onnx")
        told = {line["item"]: line["value"] for line in exported.table()}
        say(f"{told['logits against torch']}; {told['verified by']}")

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
    print_report(report, f"Measured here, with 95 % intervals in brackets: {words.INTERVALS}")
    out_console.print(words.ORIGINAL_SIZE + "\n", markup=False, soft_wrap=True)
    print_coverage(saved, "Coverage audit of int4")
    print_table(exported.table(), "ONNX file, verified in ONNX Runtime")
    out_console.print(
        f"bundle   {out / 'int4'}\nONNX     {out / 'int4.onnx'}\nreport   {(out / 'report.html').resolve().as_uri()}",
        markup=False,
        soft_wrap=True,
    )
    out_console.print(f"{steps.seconds:.1f} s in all on {n_threads} threads, peak memory {peak_rss_bytes() / 1e9:.2f} GB", markup=False)


@app.command()
@guarded
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
    may_write(out, force, ours="edgelab.json", models=(model,))
    local_only(model, *([] if data is None else [data]))
    from edgelab.bundle import save_bundle, verify_bundle
    from edgelab.compress import compress as run
    from edgelab.compress import plan
    from edgelab.model import load

    n_threads = set_threads(threads)
    tokenizer = tokenizer_of(model)  # first: what is missing shows before the work
    if stream:
        from edgelab.bundle import coverage_of
        from edgelab.stream import compress_checkpoint

        bundle = compress_checkpoint(model, out, chosen, tokenizer=tokenizer, threads=n_threads)
        print_coverage(coverage_of(bundle), f"Coverage audit, recipe {chosen.digest}")
        out_console.print(f"bundle   {bundle}", markup=False, soft_wrap=True)
        return
    loaded, calibration = load(model), None
    plan(loaded, chosen)  # before the corpus is read, which takes longer
    training, folder = None, work or out.with_name(out.name + ".work")
    if not chosen.data_free:
        calibration = read_calibration(tokenizer, model, data, tokens, context_of([loaded], None))
    if chosen.learns:
        training = read_calibration(tokenizer, model, data, training_tokens, min(256, context_of([loaded], None)), split="train")
        say(f"checkpoints and curves of the learning steps: {folder}")
    settings = {"folder": folder} if chosen.learns else {"inplace": True}
    result = run(loaded, chosen, calibration=calibration, training=training, **settings)
    for remark in result.remarks:
        err_console.print(f"Note: {remark}", markup=False, style="yellow", soft_wrap=True)
    bundle = save_bundle(result.model, tokenizer, out, recipe=chosen, coverage=result.coverage)  # replaces an old one when whole
    verify_bundle(bundle)
    print_coverage(result.coverage, f"Coverage audit, recipe {chosen.digest}")
    out_console.print(f"bundle   {bundle}", markup=False, soft_wrap=True)


@app.command()
@guarded
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
            may_write(file, force, ours="edgelab.json", models=models)
    local_only(*models, *([] if data is None else [data]))
    tokenizer = one_tokenizer(models)
    documents = read_documents(data)
    from edgelab import page
    from edgelab.data import fingerprint as text_fingerprint
    from edgelab.doctor import fingerprint
    from edgelab.evaluate import evaluate as run
    from edgelab.model import load

    n_threads = set_threads(threads)
    names = _short_names(models)
    loaded = {short: load(name) for short, name in names.items()}
    if int8:
        loaded = _with_int8(loaded)
    context = context_of(loaded.values(), context)
    report = run(loaded, tokenizer, documents, max_docs=max_docs or None, context=context, stride=stride, seed=seed)
    print_report(report, f"Measured here, against {next(iter(names))}, with 95 % intervals in brackets: {words.INTERVALS}")
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
@guarded
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
    local_only(model, *([] if data is None else [data]))
    tokenizer = one_tokenizer([model])
    from edgelab import peers as tools
    from edgelab.data import corpus, from_source

    chosen = [] if peers == "none" else list(tools.environments()) if peers == "installed" else peers.split(",")
    by_peer: dict[str, list[str]] = {}
    for text in chosen:
        name, _, method = text.partition(":")
        by_peer.setdefault(name, []).append(method or tools.peer(name).methods[0])
    splits = corpus() if data is None else from_source(data, label=Path(data).stem or "text")
    n_threads = set_threads(threads)
    context = context_of([SimpleNamespace(config=AutoConfig.from_pretrained(model, trust_remote_code=False))], context)
    made = run(
        model, tokenizer, splits["test"], read_calibration(tokenizer, model, data, tokens, context),
        methods=list(METHODS) if methods == "all" else methods.split(","), bits=widths, group=group, recipes=own, peers=by_peer,
        out=out, max_docs=max_docs or None, context=context, threads=n_threads, seed=seed,
    )  # fmt: skip
    print_table(made.table(), f"Measured here, against the original, with 95 % intervals in brackets: {words.INTERVALS}")
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
@guarded
def info(
    model: Annotated[str, typer.Argument(help="A model's folder, its name on the hub, or a bundle.")],
    weights: Annotated[bool, typer.Option("--weights", help="List every stored tensor, not only the sum per role.")] = False,
) -> None:
    """Say what MODEL is made of: family, weights by role, bits, bytes; for a bundle its recipe, and whether its files are whole."""
    local_only(model)
    from edgelab.model import load
    from edgelab.summary import summary

    told = summary(load(model))
    coverage = told.coverage
    print_table(told.table(), "The model")
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
        print_table(rows, "Stored tensors", right=("bytes",))
    print_coverage(coverage, "Weights by role")
    if (Path(model) / "edgelab.json").is_file():
        from edgelab.bundle import read_manifest, verify_bundle

        manifest = read_manifest(model)
        verify_bundle(model)
        out_console.print(f"bundle: format {manifest.get('format')}, all files match their sha256\n", markup=False)
        if manifest.get("recipe"):
            out_console.print(json.dumps(manifest["recipe"], indent=1), markup=False)


@app.command()
@guarded
def doctor() -> None:
    """Examine this machine: packages against the tested versions, CPU features, memory, and whether it works without a network."""
    from edgelab.doctor import examine, fingerprint
    from edgelab.doctor import table as doctor_table

    print_table([{"what": k, "value": v} for k, v in fingerprint().items()], "This machine")
    checks = examine()
    print_table(doctor_table(checks), "Examination")
    failed = [c.name for c in checks if c.status == "fail"]
    if failed:
        raise CheckFailedError(f"{', '.join(failed)}: see the way out beside each")
    out_console.print("All that is needed is here.", markup=False)


for more in (cli_export, cli_run, cli_predict, cli_sweep, cli_report, cli_ledger, cli_reproduce):
    app.registered_commands += more.app.registered_commands
    app.registered_groups += more.app.registered_groups

if __name__ == "__main__":
    app()
