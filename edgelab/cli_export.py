"""`edgelab export | verify | deploy | bytes | serve | startup | stamp | slot`: from a bundle to a device, and how it is swapped there."""

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import (
    CheckFailedError,
    Force,
    Threads,
    guarded,
    local_only,
    may_write,
    out_console,
    print_table,
    set_threads,
    tokenizer_of,
)
from edgelab.devices import DEVICES
from edgelab.export import MARKS, TARGETS, WITH_TOKENIZER, ExportError

app = typer.Typer()
slot = typer.Typer(no_args_is_help=True, help="A folder of versions of a bundle, one of them current: update it, go back, look.")
app.add_typer(slot, name="slot")

Target = StrEnum("Target", {name: name for name in TARGETS})
Experts = StrEnum("Experts", {name: name for name in ("sparse", "rank", "qmoe", "auto")})
Device = StrEnum("Device", {name: name for name in DEVICES})
Bundle = Annotated[str, typer.Argument(help="A bundle written by `edgelab compress`, or a model.")]
Check = Annotated[bool, typer.Option("--verify/--no-verify", help="Run what was written in the target's own runtime.")]
SlotFolder = Annotated[Path, typer.Argument(help="The slot's folder.")]


@app.command()
@guarded
def export(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("--out", help="The file to write; a folder for web and android, and for several targets.")],
    target: Annotated[list[Target] | None, typer.Option("--target", help="The format; may be given several times. Default: onnx.")] = None,
    cache: Annotated[bool, typer.Option("--cache", help="ONNX with keys and values of the past as inputs, for generation.")] = False,
    fallback: Annotated[
        str | None, typer.Option("--fallback", help="Another activation, as 'silu -> scaled_gelu'; its cost is shown.")
    ] = None,
    max_docs: Annotated[
        int, typer.Option("--max-docs", help="Documents per domain that a fallback's cost is measured on; 0: none.", min=0)
    ] = 10,
    experts: Annotated[
        Experts, typer.Option("--experts", help="How ONNX has them; qmoe is the smallest, where the runtime has it.")
    ] = Experts.sparse,
    check: Check = True,
    threads: Threads = 0,
    force: Force = False,
) -> None:
    """Write BUNDLE for other runtimes, run it there, and compare its logits with torch's on the same codes."""
    targets = list(dict.fromkeys(target or [Target.onnx]))
    if len(targets) > 1:
        places = {t: out / TARGETS[t.value] for t in targets}
    elif (suffix := Path(TARGETS[targets[0].value]).suffix) and out.suffix != suffix:
        raise ValueError(f"--out {out} must end in {suffix} for --target {targets[0].value}")
    else:
        places = {targets[0]: out}
    if cache and Target.onnx not in targets:
        raise ValueError("--cache is for --target onnx; the others have theirs without being told")
    for t, place in places.items():
        may_write(place, force, ours=MARKS.get(t.value, ""), models=(bundle,))
    local_only(bundle)
    from edgelab.export import export as run
    from edgelab.model import load

    set_threads(threads)
    model = load(bundle)
    if fallback:
        model = _fallen_back(model, bundle, fallback, max_docs)
    refused = {}
    for t, place in places.items():
        settings = (
            {"cache": cache, "experts": experts.value}
            if t.value == "onnx"
            else {"tokenizer": tokenizer_of(bundle)}
            if t.value in WITH_TOKENIZER
            else {}
        )
        try:
            exported = run(model, t.value, place, check=check, **settings)
        except ExportError as error:
            if len(places) == 1:
                raise
            refused[t.value] = str(error)
            continue
        print_table(exported.table(), f"{t.value}, verified in its own runtime" if check else f"{t.value}, not verified")
        out_console.print(f"{'folder' if place.is_dir() else 'file  '}   {place}", markup=False, soft_wrap=True)
    if refused:
        raise CheckFailedError("; ".join(f"--target {t}: {why}" for t, why in refused.items()) + ". The other targets were written")


def _fallen_back(model, bundle: str, rule: str, max_docs: int):
    """`model` with the rule applied and its cost on the embedded corpus printed."""
    from edgelab.console import read_documents
    from edgelab.fold import fall_back, fallback_table

    replaced = fall_back(model, rule)
    out_console.print(f"{replaced!r}", markup=False, soft_wrap=True)
    if replaced.rule.exact or not max_docs:
        return replaced.model
    tokenizer = tokenizer_of(bundle)
    if tokenizer is None:
        out_console.print("Its cost is not measured: there is no tokenizer to read text with.", markup=False)
        return replaced.model
    rows = fallback_table(model, tokenizer, read_documents(None), [rule], max_docs=max_docs, progress=True)
    shown = [
        {
            "on": row["on"],
            "KLD, nats per token": f"{row['kld']:.4f}"
            + (f" [{row['kld_low']:.4f}, {row['kld_high']:.4f}]" if row["kld_low"] is not None else ""),
            "same top token": f"{row['same_top']:.1%}",
            "exact match": f"{row['exact_match']:.1%} (was {row['exact_match_original']:.1%})" if "exact_match" in row else "",
        }
        for row in rows
    ]
    print_table(shown, f"What {rule} costs")
    return replaced.model


@app.command()
@guarded
def verify(
    written: Annotated[Path, typer.Argument(help="A file or folder that `edgelab export` or `edgelab deploy` wrote.")],
    bundle: Annotated[str | None, typer.Argument(help="What it was made of; without it only a deployment's sha256s are compared.")] = None,
    fallback: Annotated[str | None, typer.Option("--fallback", help="The rule that it was exported with.")] = None,
    threads: Threads = 0,
) -> None:
    """Open WRITTEN in its target's own runtime again: codes bit for bit those of BUNDLE, logits those of torch."""
    from edgelab import deploy as deploying
    from edgelab.export import verify as run
    from edgelab.export import written_at

    set_threads(threads)
    if (written / deploying.MANIFEST).is_file():
        deployment = deploying.verify(written, bundle)
        print_table(deployment.table(), "All files match their sha256" + ("" if bundle is None else "; each target ran again"))
        return
    result = written_at(written)
    if bundle is None:
        raise ValueError(f"{written} is a file for {result.target}: say also which bundle or model it was made of")
    local_only(bundle)
    from edgelab.model import load

    model = load(bundle)
    if fallback:
        from edgelab.fold import fall_back

        model = fall_back(model, fallback).model
    settings = {"tokenizer": tokenizer_of(bundle)} if result.target == "gguf" else {}
    print_table(run(result, model, **settings).table(), f"{result.target}, verified in its own runtime")


@app.command()
@guarded
def deploy(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    device: Annotated[Device, typer.Option("--device", help="What it is for.")] = Device.arm64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Requests answered at once, at most.", min=1, max=64)] = 1,
    dynamic_shape: Annotated[
        bool, typer.Option("--dynamic-shape/--fixed-shape", help="Any shape, or that of --batch-size and --length.")
    ] = True,
    length: Annotated[int, typer.Option("--length", help="Tokens of prompt and answer.", min=2)] = 512,
    memory: Annotated[
        int | None, typer.Option("--memory", help="MB of RAM that an app may take there; by default the device's.", min=1)
    ] = None,
    target: Annotated[list[Target] | None, typer.Option("--target", help="Instead of those that the device gets.")] = None,
    check: Check = True,
    force: Force = False,
) -> None:
    """Write a folder for a kind of device: the targets that it can run, threads, memory, and a README that its developer can follow."""
    from edgelab import deploy as deploying

    may_write(out, force, ours=deploying.MANIFEST, models=(bundle,))
    local_only(bundle)
    deployment = deploying.deploy(
        bundle,
        out,
        device=device.value,
        batch_size=batch_size,
        dynamic_shape=dynamic_shape,
        length=length,
        memory=None if memory is None else memory * 10**6,
        targets=None if target is None else [t.value for t in target],
        check=check,
    )
    print_table(deployment.table(), f"{deployment.device.name}: {deployment.device.about}")
    out_console.print(f"folder   {out}\nread     {out / 'README.md'}", markup=False, soft_wrap=True)


@app.command("bytes")
@guarded
def bytes_of(
    path: Annotated[Path, typer.Argument(help="A .safetensors, .onnx or .gguf file, or the folder of a bundle or a page.")],
) -> None:
    """Where the bytes of PATH are: every one counted once, by kind, with bits per weight."""
    from edgelab.byte_map import byte_map

    found = byte_map(path)
    print_table(found.table(), f"{path}, {found.bytes:,} bytes", right=("bytes", "share", "bits per weight"))


@app.command()
@guarded
def serve(
    folder: Annotated[Path, typer.Argument(help="A folder that `edgelab export --target web` wrote.")],
    port: Annotated[int, typer.Option("--port", help="On 127.0.0.1.", min=1, max=65535)] = 8765,
) -> None:
    """Serve the page in FOLDER to this machine alone, until Ctrl-C."""
    from edgelab.export.web_server import serve as run

    run(folder, port)


@app.command()
@guarded
def startup(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle. Default: a random one of --megabytes.")] = None,
    megabytes: Annotated[float, typer.Option("--megabytes", help="Of the random one, a mixture in int4-g32.", min=1)] = 400,
    chunks: Annotated[list[float] | None, typer.Option("--chunk", help="Measure also repacked in chunks of so many MiB.")] = None,
    fewer: Annotated[bool, typer.Option("--fewer", help="Measure also with few layers and few experts in RAM.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="With the files out of the system's cache.")] = False,
    repeats: Annotated[int, typer.Option("--repeats", help="The median of so many processes.", min=1)] = 1,
) -> None:
    """Seconds to the first weight and token, and the peak of RAM: BUNDLE read whole and mapped lazily, each in its own process."""
    from edgelab.startup import FEWER, STARTS, random_bundle, startup_table

    with tempfile.TemporaryDirectory(dir=os.environ.get("EDGELAB_TMP")) as tmp:
        report = startup_table(
            bundle or random_bundle(Path(tmp) / "random", megabytes=megabytes),
            starts=(*STARTS, *(FEWER if fewer else ())),
            chunk_bytes=(None, *(round(mib * 2**20) for mib in chunks or ())),
            cold=cold,
            repeats=repeats,
            progress=True,
        )
    for where in dict.fromkeys(r.slice for r in report):
        rows = []
        for name in report.models():
            cells = [r for r in report.where(model=name, slice=where)]
            rows.append({"start": name} | {f"{r.metric}, {r.unit}": f"{r.value:.3f}" for r in cells})
        print_table(rows, where, right=tuple(rows[0])[1:])


@app.command()
@guarded
def stamp(
    bundle: Annotated[Path, typer.Argument(help="A bundle; its manifest gets an interface and reference logits.")],
    release: Annotated[int, typer.Option("--release", help="A number that grows with every release.", min=0)],
    major: Annotated[int, typer.Option("--major", help="Another one where apps have to change.", min=0)] = 1,
    minor: Annotated[int, typer.Option("--minor", min=0)] = 0,
) -> None:
    """Give BUNDLE the version of its interface; prints the digest that an app should ask for."""
    from edgelab.interface import stamp as run

    local_only(bundle)
    out_console.print(run(bundle, release=release, major=major, minor=minor), markup=False)


@slot.command()
@guarded
def update(
    folder: SlotFolder,
    bundle: Annotated[Path, typer.Argument(help="The bundle that is to answer from now on.")],
    expected: Annotated[str | None, typer.Option("--expected", help="Its digest, from where you trust it.")] = None,
    downgrade: Annotated[bool, typer.Option("--downgrade", help="Take an older release, too.")] = False,
    other_interface: Annotated[bool, typer.Option("--other-interface", help="Take one that apps have to be changed for.")] = False,
) -> None:
    """Verify BUNDLE and make it current; refused, the old one goes on and the exit code is 1."""
    from edgelab.hot import BundleRefused, ModelSlot

    try:
        digest = ModelSlot(folder).update(bundle, expected=expected, downgrade=downgrade, other_interface=other_interface)
    except BundleRefused as error:
        raise CheckFailedError(str(error)) from error
    out_console.print(f"current   {digest}", markup=False)


@slot.command()
@guarded
def rollback(folder: SlotFolder) -> None:
    """Make the version before the current one."""
    from edgelab.hot import BundleRefused, ModelSlot

    _existing(folder)
    try:
        digest = ModelSlot(folder).rollback()
    except BundleRefused as error:
        raise CheckFailedError(str(error)) from error
    out_console.print(f"current   {digest}", markup=False)


@slot.command()
@guarded
def show(folder: SlotFolder) -> None:
    """The current version of the slot, its interface, and the one before."""
    from edgelab.hot import ModelSlot

    _existing(folder)
    holds = ModelSlot(folder)
    rows = {"current": holds.version or "none yet", "before": holds.previous or "none"}
    if holds.version:
        rows |= {k.replace("_", " "): str(v) for k, v in holds.interface().to_dict().items() if k not in ("inputs", "outputs")}
    print_table([{"item": k, "value": v} for k, v in rows.items()], str(folder))


def _existing(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; `edgelab slot update {folder} BUNDLE` makes a slot")
