"""`edgelab devices | predict | calibrate-host`: what a device would do with a model, and what this machine does."""

import json
from pathlib import Path
from typing import Annotated

import typer

from edgelab.console import CheckFailedError, guarded, out_console, print_table
from edgelab.device import CLASSES, LINES, DeviceProfile, Prediction, device, discrepancies, plain, predict
from edgelab.device import devices as known_devices
from edgelab.scheme import QuantScheme
from edgelab.shape import FAMILIES, ModelShape, from_config, from_folder

app = typer.Typer()

Context = Annotated[int, typer.Option("--context", help="Tokens in the cache while decoding.", min=0)]
Prompt = Annotated[int, typer.Option("--prompt", help="Tokens of the prompt that are read first.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
@guarded
def devices(
    name: Annotated[
        str | None, typer.Argument(help="One device, with every number and its source. Default: all of them in a table.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors", help="How far the predictor is off published measurements, row by row.")] = False,
    as_json: AsJson = False,
) -> None:
    """The devices that `predict` knows, where their numbers come from, and how good its predictions are."""
    if errors:
        _errors(as_json)
        return
    profiles = known_devices()
    if name is not None:
        profile = device(name)
        if as_json:
            out_console.print_json(json.dumps({"name": name, "title": profile.title, "numbers": profile.table()}))
            return
        print_table(profile.table(), f"{profile.title}, {profile.soc}, {profile.year}" + (f": {profile.note}" if profile.note else ""))
        return
    rows = [_summary(p) for p in profiles.values()]
    wrong = [d.row() for d in discrepancies()]
    if as_json:
        out_console.print_json(json.dumps({"devices": rows, "discrepancies": wrong}))
        return
    print_table(rows, f"{len(rows)} devices; `edgelab devices NAME` has every number with its source", right=("GB/s", "memory, GB"))
    print_table(wrong, "Where an article says something else")


def _summary(p: DeviceProfile) -> dict[str, str]:
    def shown(name: str, scale: float) -> str:
        q = getattr(p, name)
        return "" if q is None else f"{q.value / scale:.4g}"

    return {
        "name": p.name,
        "device": p.title,
        "kind": p.kind,
        "year": str(p.year),
        "GB/s": shown("dram_bytes_per_s", 1e9),
        "memory, GB": shown("memory_bytes", 1e9),
        "deploy as": p.deploy,
        "numbers": f"{len(p.quantities)}, {sum(q.how == 'assumed' for q in p.quantities.values())} of them assumed",
    }


def _errors(as_json: bool) -> None:
    from edgelab import efficiency as eff

    held, fit, out = eff.validation(), eff.validation(split="fit"), eff.leave_one_device_out()
    if as_json:
        content = {
            "efficiencies": eff.efficiency_table(),
            "held_out": held.table(),
            "median_error": held.median_error,
            "by_class": held.class_table(),
            "coverage": eff.coverage(),
            "prompts": eff.prefill_validation(),
            "energy": eff.energy_validation(),
        }
        out_console.print_json(json.dumps(content))
        return
    print_table(eff.efficiency_table(), "Efficiencies, fitted on published measurements")
    print_table(held.class_table(), "Held-out devices, class by class", right=("rows", "devices", "median error"))
    rows, sources = _numbered(held.table())
    print_table(
        rows, "Devices that were held out: measured by others, predicted here", right=("bits", "measured", "predicted", "error", "source")
    )
    for number, source in enumerate(sources, 1):
        out_console.print(f"[{number}] {source}", markup=False, soft_wrap=True)
    out_console.print()
    print_table(eff.prefill_validation(), "Prompts on held-out devices", right=("prompt", "measured", "predicted", "error"))
    print_table(
        eff.coverage(),
        "What the brackets hold of devices that neither the fit nor the brackets had seen",
        right=("rows", "devices", "rows inside", "devices counted once", "nominal"),
    )
    print_table(eff.energy_validation(), "Energy per token, measured by others", right=("bits", "measured W", "measured J", "times off"))
    for v in (held, fit, out):
        out_console.print(v.say(), markup=False, soft_wrap=True)
    whole = eff.validation(eff.whole_device(eff.published()))
    out_console.print(f"Without rows of fewer threads than the device has cores: {whole.say()}", markup=False, soft_wrap=True)
    out_console.print(eff.say_energy(), markup=False, soft_wrap=True)


def _numbered(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """The rows with the number of their source in its place, and the sources."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    return [row | {"source": f"[{1 + sources.index(row['source'])}]"} for row in rows], sources


@app.command("predict")
@guarded
def predict_command(
    model: Annotated[str, typer.Argument(help="A bundle, a checkpoint's folder, or a config.json (then give --scheme).")],
    on: Annotated[str, typer.Option("--device", help="A name that `edgelab devices` lists, or all.")] = "all",
    context: Context = 1024,
    prompt: Prompt = 128,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="As if its weights were in that scheme, such as int4-g32, or so many bits: 4.5.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help=f"Class of software: {', '.join(CLASSES)}.")] = "cpu-tuned",
    hit_rate: Annotated[
        float | None,
        typer.Option("--hit-rate", help="Share of the experts found in RAM, where not all fit; default: as if all were equal."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens per second, memory, energy and load time of MODEL on a device: modelled, from its published numbers."""
    shape = shape_of(model, scheme)
    names = list(known_devices()) if on == "all" else [on]
    found = [predict(name, shape, context=context, prompt=prompt, engine=engine, hit_rate=hit_rate) for name in names]
    if as_json:
        out_console.print_json(json.dumps({"shape": repr(shape), "predictions": [_plain(p) for p in found]}))
        return
    out_console.print(f"{shape!r}", markup=False, soft_wrap=True)
    if len(found) == 1:
        print_table(found[0].table(), f"{shape.name} on {device(names[0]).title}, engine class {engine}: modelled")
    else:
        rows = [_line(p) for p in found]
        print_table(rows, f"Modelled, engine class {engine}, context {context}, prompt {prompt}", right=tuple(rows[0])[1:])
        out_console.print(
            "* rests on an assumed number; empty: a number is missing (`--device NAME` says which).", markup=False, soft_wrap=True
        )
        for warning, where in _warned(found).items():
            on_which = "" if len(where) == len(found) else f" ({', '.join(where)})"
            out_console.print(f"warning: {warning}{on_which}", markup=False, soft_wrap=True)
    out_console.print(
        "The brackets are where four of five published speeds should fall. Of devices that they had not seen they held 76 %. "
        "Energy is an order of magnitude: it may be off by a factor of two or three (`edgelab devices --errors`).",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _warned(found: list[Prediction]) -> dict[str, list[str]]:
    """{warning: devices}."""
    by: dict[str, list[str]] = {}
    for p in found:
        for warning in p.warnings:
            by.setdefault(warning, []).append(p.device)
    return by


def shape_of(model: str, scheme: str | None) -> ModelShape:
    """The shape of a folder (real bytes, unless a scheme is given) or of a config.json. Raises FileNotFoundError or ValueError."""
    path = Path(model)
    config = path if path.suffix == ".json" else path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is not there: give a bundle, a checkpoint's folder or a config.json of {', '.join(FAMILIES)}")
    if scheme is None:
        if path.suffix == ".json":
            raise ValueError(f"{path} says nothing of bits per weight: give --scheme, such as int4-g32")
        return from_folder(path)
    bits = QuantScheme.parse(scheme) if not scheme.replace(".", "", 1).isdigit() else float(scheme)
    return from_config(json.loads(config.read_text(encoding="utf-8")), bits, name=config.parent.name or str(path))


def _line(p: Prediction) -> dict[str, str]:
    def short(e) -> str:
        return "" if e is None else plain(e.value) + ("*" if e.assumed else "")

    def banded(e) -> str:
        return short(e) + ("" if e is None or e.low is None else f" [{plain(e.low)}, {plain(e.high)}]")

    return {
        "device": p.device,
        "decode, tokens/s": banded(p.decode) or ("does not fit" if p.fits is False else "unknown"),
        "prompt, tokens/s": banded(p.prefill),
        "first token, s": short(p.first_token),
        "load, s": short(p.shown["load"]),
        "memory, MB": f"{p.memory.total / 1e6:,.0f}",
        "J/token": short(p.energy),
        "%/h": short(p.battery),
        "hot, tokens/s": short(p.steady),
        "waits for": p.binds,
    }


def _plain(p: Prediction) -> dict:
    def numbers(e) -> dict | None:
        if e is None:
            return None
        return {"value": e.value, "low": e.low, "high": e.high, "unit": e.unit, "provenance": e.provenance, "rests_on": list(e.rests_on)}

    return {
        "device": p.device, "model": p.model, "engine": p.engine, "context": p.context, "prompt": p.prompt, "fits": p.fits,
        "memory_bytes": p.memory.total, "binds": p.binds, "hit_rate": p.hit_rate, "missing": dict(p.missing),
        "warnings": list(p.warnings),
        **{name: numbers(p.shown[name]) for name in LINES},
    }  # fmt: skip


@app.command()
@guarded
def calibrate_host(
    models: Annotated[list[Path] | None, typer.Argument(help="Bundles to predict and then to measure with our runtime.")] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="A number of threads; may be given several times.", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The ceilings only: do not time the runtime's probes.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; by default in the user's cache.")] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", help="Exit with 1 if a prediction is off by more than this share, such as 0.15.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine (bandwidth, byte products, disk, power), then predict our own runtime's decoding of MODELS and compare."""
    from edgelab import host as hosts

    if models and quick:
        raise ValueError("--quick times no probes, and without them nothing can be said of MODELS: leave out one of the two")
    for m in models or ():
        hosts.work_in(m)  # says what is wrong with a bundle before a minute of measuring
    found = hosts.measure_host(threads=threads)
    if not quick:
        found = hosts.calibrate_runtime(found, progress=not as_json)
    path = found.save(out)
    compared = [p for m in models or () for p in hosts.compare_with_runtime(m, threads=tuple(found.bandwidth), host=found)]
    if as_json:
        out_console.print_json(json.dumps({"host": json.loads(found.to_json()), "compared": [p.row() for p in compared]}))
    else:
        print_table(found.table(), f"This machine, measured here: {found.machine}")
        if compared:
            print_table(
                [p.row() for p in compared],
                "Predicted before it ran, then measured",
                right=("predicted (modelled)", "measured here", "error"),
            )
        out_console.print(f"saved     {path}", markup=False, soft_wrap=True)
    off = [p for p in compared if limit is not None and abs(p.error) > limit]
    if off:
        worst = max(off, key=lambda p: abs(p.error))
        raise CheckFailedError(f"{worst.model} with {worst.threads} threads is {abs(worst.error):.0%} off, more than {limit:.0%}")
