"""This machine as a device profile, measured; and the time that our own runtime needs for a token on it, predicted.

`measure_host` takes the ceilings (read bandwidth by threads and by working set, products of bytes, float32), the disk, memory, and power
where the system lets us read it. What cannot be read is left out, with the reason.

A small model does not wait for DRAM: its weights lie in a cache, and its time is overhead. So the runtime (`runtime.py`) is
calibrated, too: on *probes*, models of random weights in a few sizes and architectures, none of them the model to be predicted. Their
times per token give the coefficients c >= 0 of

    t = c0 + c1 * attention layers + c2 * latent attention layers + c3 * MLPs + c4 * mixtures
        + (1 - f) (sum over kinds of codes c_k * weights * 2 / P + c10 * bytes of floats / B) + f * c11 * all bytes / B
        + (c12 * attention operations / P + c13 * heads) * context + c14 * vocabulary

by non-negative least squares of the *relative* error (Lawson & Hanson 1974, chapter 23). P is the measured peak of byte products, B the
bandwidth measured at the working set: the bytes that a token reads. f is the share of them that comes from beyond the last cache, by
how far B has fallen from its highest towards that of DRAM. c0 .. c4 are the overheads of a step and of a layer of each kind: norms,
rotations, rounding, handing work to threads, and Python between two tokens; c14 is choosing a token and its probability. The kinds
of codes are 2, 3, 4 and 8 bits, and tables (NF4 and the like), whose products are floats: each is unpacked at a pace of its own.

What is left out: prompts (the fit is of decoding), other activations than int8, and caches larger than the probes'.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from edgelab import html_table
from edgelab.device import UNITS, DeviceProfile, Quantity, engineering
from edgelab.meters import battery_wh, disk_bandwidth, float_peak, power_reader
from edgelab.probes import NEW, PROBES, PROMPT, Probe, probe_model, seconds_per_token
from edgelab.report import Report, Row, machine
from edgelab.scheme import QuantScheme
from edgelab.shape import FLOAT_BITS, ModelShape, from_config, from_folder, headers

FORMAT = 1
SIZES = tuple(1 << n for n in range(20, 29))  # working sets that bandwidth is measured at: 1 MiB .. 256 MiB
CODES = ("2 bits", "3 bits", "4 bits", "8 bits", "tables")
TERMS = ("step", "attention", "latent attention", "MLP", "mixture", *CODES, "floats", "memory", "context", "softmax", "vocabulary")


# ------------------------------------------------------------------------------------------------------- what a step does


@dataclass(frozen=True)
class Work:
    """What the runtime does for one token, in the terms of the model above.

    `weights`: products by kind of code (`CODES`); `packed_bytes`: those codes and their scales; `float_bytes`: what it multiplies as
    float32 (routers, the half of a latent attention that makes keys, a checkpoint that is not quantized). `attention_ops`: per
    position of the context; `heads`: of all layers, whose softmax runs over the context. `vocabulary`: logits to choose from.
    """

    attention: int
    latent: int
    mlps: int
    mixtures: int
    weights: Mapping[str, float]
    packed_bytes: float
    float_bytes: float
    attention_ops: float
    heads: int
    kv_bytes: float
    vocabulary: int

    @property
    def read_bytes(self) -> float:
        return self.packed_bytes + self.float_bytes


def kind_of(scheme: QuantScheme | str) -> str:
    """Which of `CODES` the kernels take a scheme for.

    >>> kind_of("int3-g64"), kind_of("uint8-row"), kind_of("nf4-g64")
    ('3 bits', '8 bits', 'tables')
    """
    scheme = QuantScheme.parse(scheme) if isinstance(scheme, str) else scheme
    return f"{scheme.bits} bits" if scheme.affine else "tables"


def work_of(config: Mapping, shape: ModelShape, shares: Mapping[str, float]) -> Work:
    """The work of a model with that config, of which `shape` gives the stored bytes. `shares`: of its products by kind of code, 1 in all.

    No shares: its matrices are floats.
    """
    layers, latent = shape.layers, config.get("model_type") == "deepseek_v3"
    low, floats, matrices = 0.0, float(shape.active_weights), 0.0  # without codes all of it is multiplied as floats
    if shares:
        router = shape.moe_layers * shape.experts * shape.hidden  # stored in 16 bits
        keys = 0  # the half of kv_b that makes keys of latents is multiplied as floats; the other half stays codes
        if latent:
            keys = layers * config["num_attention_heads"] * config["qk_nope_head_dim"] * config["kv_lora_rank"]
        every = shape.active_weights - router  # the norms are too few to tell apart
        low = (shape.dense_bytes + shape.active_expert_bytes - router * FLOAT_BITS / 8) * (1 - keys / every)
        floats, matrices = float(router + keys), float(every - keys)
    shared = bool(config.get("n_shared_experts")) * shape.moe_layers
    return Work(
        attention=0 if latent else layers,
        latent=layers if latent else 0,
        mlps=layers - shape.moe_layers + shared,
        mixtures=shape.moe_layers,
        weights={kind: share * matrices for kind, share in shares.items()},
        packed_bytes=low,
        float_bytes=4.0 * floats,
        attention_ops=shape.attention_ops,
        heads=layers * config["num_attention_heads"],
        kv_bytes=shape.kv_bytes(1),
        vocabulary=shape.vocab,
    )


def work_in(folder: str | Path) -> Work:
    """The work of the model in `folder`, from its config and the headers of its files. Raises FileNotFoundError or ValueError."""
    folder = Path(folder)
    shape, tensors = from_folder(folder), headers(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    schemes = (config.get("quantization_config") or {}).get("schemes") or {}
    counts: dict[str, float] = {}
    for name, scheme in schemes.items():
        packed = tensors.get(f"{name}.packed") or tensors.get(f"{name.removesuffix('_proj')}_packed")
        if packed is None or ("embed_tokens" in name and shape.embedding_bytes):  # looked up, not multiplied
            continue
        taken = shape.top_k / shape.experts if ".experts." in name and shape.experts else 1.0
        number = prod(packed[1]) * 8 / QuantScheme.parse(scheme).bits * taken
        counts[kind_of(scheme)] = counts.get(kind_of(scheme), 0.0) + number
    total = sum(counts.values())
    if schemes and not total:
        raise ValueError(f"{folder} states schemes ({next(iter(schemes))} ...), and its files hold no codes under these names")
    return work_of(config, shape, {kind: n / total for kind, n in counts.items()})


# ------------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Host:
    """This machine. `bandwidth`: {threads: ((bytes of the working set, bytes per second), ...)}, ascending.

    `lacks`: {number: why it is missing}.
    `runtime`: {threads: the coefficients of `TERMS`}, `fit_error`: {threads: median relative error on the probes}; empty before
    `calibrate_runtime`. `core_integer_peak`: operations per second by threads.
    """

    profile: DeviceProfile
    machine: str
    bandwidth: Mapping[int, tuple[tuple[int, float], ...]]
    integer_peak: Mapping[int, float]
    lacks: Mapping[str, str] = field(default_factory=dict)
    runtime: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    fit_error: Mapping[int, float] = field(default_factory=dict)
    measured_at: str = ""

    def bandwidth_at(self, size: float, threads: int) -> float:
        """Bytes per second that `threads` threads read of a working set of `size` bytes; between two measured sizes by their logarithms."""
        curve = self.bandwidth[self.threads_known(threads)]
        return float(np.interp(np.log(max(size, 1.0)), [np.log(s) for s, _ in curve], [b for _, b in curve]))

    def threads_known(self, threads: int) -> int:
        if threads not in self.bandwidth:
            raise ValueError(
                f"threads={threads} was not measured; this machine was for {', '.join(map(str, self.bandwidth))}: measure again"
            )
        return threads

    def beyond_cache(self, size: float, threads: int) -> float:
        """Share 0 .. 1 of a working set of `size` bytes that the last cache does not hold, told by the bandwidth at that size."""
        curve = self.bandwidth[self.threads_known(threads)]
        (peak_size, peak), (_, dram) = max(curve, key=lambda p: p[1]), curve[-1]
        if size <= peak_size or peak <= dram:
            return 0.0
        return float(np.clip((peak - self.bandwidth_at(size, threads)) / (peak - dram), 0, 1))

    def columns(self, work: Work, context: float, threads: int) -> np.ndarray:
        """The factors that the coefficients of `TERMS` are multiplied with, in seconds or layers."""
        peak, size = self.integer_peak[self.threads_known(threads)], work.read_bytes + work.kv_bytes * context
        read, far = self.bandwidth_at(size, threads), self.beyond_cache(size, threads)
        codes = [(1 - far) * 2 * work.weights.get(kind, 0.0) / peak for kind in CODES]
        return np.array(
            [
                1.0, work.attention, work.latent, work.mlps, work.mixtures, *codes, (1 - far) * work.float_bytes / read,
                far * work.read_bytes / read, work.attention_ops * context / peak, work.heads * context, work.vocabulary,
            ]
        )  # fmt: skip

    def table(self) -> list[dict[str, str]]:
        """One dict of text per number."""
        rows = self.profile.table()
        for n, curve in self.bandwidth.items():
            said = ", ".join(f"{s >> 20} MiB {b / 1e9:.0f}" for s, b in curve)
            rows.append(
                {"number": f"read, {n} thread{'s' * (n > 1)}", "value": f"{curve[-1][1] / 1e9:.1f} GB/s", "how": "measured", "source": said}
            )
        for n, peak in self.integer_peak.items():
            rows.append(
                {
                    "number": f"byte products, {n} thread{'s' * (n > 1)}",
                    "value": engineering(peak, "op/s"),
                    "how": "measured",
                    "source": "on registers",
                }
            )
        rows += [{"number": k.replace("_", " "), "value": "unknown", "how": "", "source": why} for k, why in self.lacks.items()]
        for n, error in self.fit_error.items():
            c = self.runtime[n]
            said = f"step {1e6 * c[0]:.0f} us, per layer: " + ", ".join(
                f"{t} {1e6 * v:.1f} us" for t, v in zip(TERMS[1:5], c[1:5], strict=True)
            )
            rows.append(
                {
                    "number": f"runtime, {n} thread{'s' * (n > 1)}",
                    "value": f"probes within {error:.0%} (median)",
                    "how": "measured",
                    "source": said,
                }
            )
        return rows

    def to_json(self) -> str:
        d = {
            "format": FORMAT, "machine": self.machine, "measured_at": self.measured_at, "lacks": dict(self.lacks),
            "profile": {k: asdict(q) for k, q in self.profile.quantities.items()},
            "about": {k: getattr(self.profile, k) for k in ("name", "title", "kind", "soc", "year", "deploy", "note")},
            "bandwidth": {str(n): [list(p) for p in c] for n, c in self.bandwidth.items()},
            "integer_peak": {str(n): v for n, v in self.integer_peak.items()},
            "runtime": {str(n): list(c) for n, c in self.runtime.items()}, "fit_error": {str(n): e for n, e in self.fit_error.items()},
        }  # fmt: skip
        return json.dumps(d, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Host":
        """Raises ValueError for what is no calibration of this format."""
        d = json.loads(text)
        if not isinstance(d, dict) or d.get("format") != FORMAT:
            raise ValueError(
                f"calibration format {d.get('format') if isinstance(d, dict) else None!r} is not {FORMAT}: measure this machine again"
            )
        try:
            profile = DeviceProfile(**d["about"], **{k: Quantity(**q) for k, q in d["profile"].items()})
            return cls(
                profile, d["machine"], {int(n): tuple((int(s), float(b)) for s, b in c) for n, c in d["bandwidth"].items()},
                {int(n): float(v) for n, v in d["integer_peak"].items()}, d["lacks"], {int(n): tuple(c) for n, c in d["runtime"].items()},
                {int(n): float(e) for n, e in d["fit_error"].items()}, d["measured_at"],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the calibration is not whole ({error}): measure this machine again") from error

    def save(self, path: str | Path | None = None) -> Path:
        """The path written, whole or not at all: `calibration_file()` unless given."""
        path = Path(path) if path is not None else calibration_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(self.to_json())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    def __repr__(self) -> str:
        best = max(c[-1][1] for c in self.bandwidth.values())
        fitted = f", runtime fitted for {', '.join(map(str, self.runtime))} threads" if self.runtime else ""
        peak = engineering(max(self.integer_peak.values()), "op/s")
        return f"Host({self.machine}: reads {best / 1e9:.1f} GB/s, {peak}{fitted}; {len(self.lacks)} numbers missing)"

    def _repr_html_(self) -> str:
        return html_table.lines(self.table(), self.machine)


def calibration_file() -> Path:
    """Where the measurement of this machine is kept: host.json in the user's cache folder of edgelab."""
    from edgelab.tile_store import cache_folder

    return cache_folder().parent / "host.json"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_host(
    *, threads: Sequence[int] | None = None, seconds: float = 0.15, disk: bool = True, folder: str | Path | None = None
) -> Host:
    """This machine measured, its runtime not yet (`calibrate_runtime`). `threads`: numbers of them, by default 1 .. cores (8 at most).

    Its dram_bytes_per_s is what was read, not the theoretical rate that the classes of `predict` are shares of: those come out low on it.
    `seconds`: for each bandwidth; `folder`: where the disk is measured, by default the system's temporary folder. Raises
    ValueError for a number of threads outside 1 .. cores.
    """
    import psutil

    from edgelab.kernels.ceiling import integer_peak, read_bandwidth

    most = cores()
    threads = tuple(range(1, min(most, 8) + 1)) if threads is None else tuple(threads)
    if not threads or not all(1 <= n <= most for n in threads):
        raise ValueError(f"threads={list(threads)}; this process may run on {most} cores: use numbers from 1 to {most}")
    lacks: dict[str, str] = {}
    bandwidth: dict[int, list[tuple[int, float]]] = {n: [] for n in threads}
    for size in SIZES:
        for n in threads:
            bandwidth[n].append((size, read_bandwidth(n, size, seconds)))
    peaks = {n: integer_peak(n, seconds=seconds) for n in threads}
    top = max(threads)
    here = "measured here"
    found: dict[str, Quantity] = {
        "dram_bytes_per_s": _measured(
            max(c[-1][1] for c in bandwidth.values()),
            "dram_bytes_per_s",
            f"{here}: reads of {SIZES[-1] >> 20} MiB, the best number of threads",
        ),
        "cpu_int8_ops_per_s": _measured(
            max(peaks.values()), "cpu_int8_ops_per_s", f"{here}: byte products on registers, the best number of threads"
        ),
        "cpu_fp32_flops": _measured(float_peak(), "cpu_fp32_flops", f"{here}: NumPy, float32 matrices of 1,024"),
    }
    memory = psutil.virtual_memory()
    found["memory_bytes"] = _measured(memory.total, "memory_bytes", f"{here}: the system")
    found["usable_bytes"] = _measured(memory.available, "usable_bytes", f"{here}: what the system calls available at this moment")
    if disk:
        rate, why = disk_bandwidth(folder)
        if rate is None:
            lacks["flash_bytes_per_s"] = why
        else:
            found["flash_bytes_per_s"] = _measured(rate, "flash_bytes_per_s", f"{here}: {why}")
    else:
        lacks["flash_bytes_per_s"] = "not asked for"
    watts, why = power_reader()
    if watts is None:
        lacks |= {"idle_w": why, "cpu_w": why}
    else:
        idle, busy = watts(lambda: time.sleep(0.5)), watts(lambda: integer_peak(top, seconds=0.5))
        found["idle_w"] = _measured(idle, "idle_w", f"{here}: {why}, half a second of nothing")
        found["cpu_w"] = _measured(busy, "cpu_w", f"{here}: {why}, half a second of byte products, threads: {top}")
    energy, why = battery_wh()
    if energy is None:
        lacks["battery_wh"] = why
    else:
        found["battery_wh"] = _measured(energy, "battery_wh", f"{here}: {why}")
    lacks["sustained_share"] = "takes minutes of load; not measured"
    profile = DeviceProfile(
        "host", f"this machine, {platform.node() or 'unnamed'}", "host", machine().split(",")[0], time.localtime().tm_year,
        "x86-64" if platform.machine().lower() in ("x86_64", "amd64") else "", **found,
    )  # fmt: skip
    return Host(
        profile, machine(), {n: tuple(c) for n, c in bandwidth.items()}, peaks, lacks, measured_at=time.strftime("%Y-%m-%dT%H:%M:%S%z")
    )


def _measured(value: float, name: str, source: str) -> Quantity:
    return Quantity(float(value), UNITS[name], source, "measured")


def probe_work(probe: Probe) -> Work:
    """What the runtime does for a token of a probe."""
    shape = from_config(probe.config, probe.scheme or 32.0, name=probe.name)
    return work_of(probe.config, shape, {kind_of(probe.scheme): 1.0} if probe.scheme else {})


def calibrate_runtime(host: Host, *, probes: Sequence[Probe] = PROBES, seconds: float = 0.3, progress: bool = False) -> Host:
    """`host` with the coefficients of our runtime, fitted on the times of `probes` for each number of threads that it was measured for."""
    from tqdm.auto import tqdm

    from edgelab.runtime import Runtime

    times: dict[int, list[tuple[np.ndarray, float]]] = {n: [] for n in host.bandwidth}
    for probe in tqdm(probes, desc="timing probes", unit="probe", disable=not progress):
        model = probe_model(probe)
        for n in host.bandwidth:
            runtime = Runtime(model, threads=n, context=probe.prompt + NEW)
            t, context = seconds_per_token(runtime, prompt=probe.prompt, seconds=seconds)
            times[n].append((host.columns(probe_work(probe), context, n), t))
            del runtime
        del model
    fitted = {n: fit_terms(*map(np.array, zip(*rows, strict=True))) for n, rows in times.items()}
    errors = {n: float(np.median([abs(columns @ fitted[n] / t - 1) for columns, t in rows])) for n, rows in times.items()}
    coefficients = {n: tuple(map(float, c)) for n, c in fitted.items()}
    return replace(host, runtime=coefficients, fit_error=errors)


def fit_terms(columns: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The coefficients >= 0 [terms] that minimise sum (columns c / seconds - 1)^2, for columns [probes, terms].

    >>> fit_terms(np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0]]), np.array([5.0, 9.0, 17.0])).round(6).tolist()  # 1 + 2 x
    [1.0, 2.0]
    """
    from scipy.optimize import nnls

    rows = columns / seconds[:, None]
    scale = np.maximum(np.abs(rows).max(0), 1e-300)  # seconds and numbers of layers beside each other
    return nnls(rows / scale, np.ones(len(seconds)))[0] / scale


# ------------------------------------------------------------------------------------------------------------ predicting


@dataclass(frozen=True)
class HostPrediction:
    """Seconds per token of our runtime on this machine, modelled; `parts`: {term: seconds}."""

    model: str
    threads: int
    context: float
    parts: Mapping[str, float]
    measured_s: float | None = None

    provenance = "modelled"

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.seconds

    @property
    def error(self) -> float | None:
        """Share by which predicted tokens per second are off the measured ones; None where nothing was measured."""
        return None if self.measured_s is None else self.measured_s / self.seconds - 1

    def report(self) -> Report:
        rows = [
            Row(
                self.model,
                "tokens_per_s",
                self.tokens_per_s,
                "tokens/s",
                f"{self.threads} threads",
                provenance="modelled",
                machine=machine(),
            )
        ]
        if self.measured_s is not None:
            rows.append(Row(self.model, "tokens_per_s", 1 / self.measured_s, "tokens/s", f"{self.threads} threads", machine=machine()))
        return Report(tuple(rows))

    def row(self) -> dict[str, str]:
        """One dict of text: what the CLI prints."""
        main = sorted(self.parts.items(), key=lambda kv: -kv[1])[:3]
        return {
            "model": self.model,
            "threads": str(self.threads),
            "predicted (modelled)": f"{self.tokens_per_s:,.0f} tokens/s",
            "measured here": "" if self.measured_s is None else f"{1 / self.measured_s:,.0f} tokens/s",
            "error": "" if self.error is None else f"{self.error:+.0%}",
            "most of the time": ", ".join(f"{k} {1e6 * v:.0f} us" for k, v in main),
        }

    def __repr__(self) -> str:
        measured = "" if self.measured_s is None else f", measured {1 / self.measured_s:,.0f} ({self.error:+.0%})"
        modelled = f"{self.tokens_per_s:,.0f} tokens/s modelled"
        return f"HostPrediction({self.model!r}, {self.threads} threads, context {self.context:g}: {modelled}{measured})"


def predict_host(
    work: Work | str | Path, *, threads: int = 1, context: float = PROMPT + NEW / 2, host: Host | None = None, name: str = ""
) -> HostPrediction:
    """What our runtime would do on this machine. `work`: of a model, or its folder, which is read by its headers alone.

    `context`: mean number of tokens in the cache. `host`: by default the one that `calibrate_host` saved. Raises FileNotFoundError where
    this machine was not calibrated, ValueError for threads that were not.
    """
    host = saved_host() if host is None else host
    if not isinstance(work, Work):
        name, work = name or Path(work).name, work_in(work)
    host.threads_known(threads)
    if threads not in host.runtime:
        raise ValueError(f"the runtime was not calibrated for threads={threads}: run `edgelab calibrate-host`")
    values = host.columns(work, context, threads) * np.array(host.runtime[threads])
    return HostPrediction(name, threads, context, dict(zip(TERMS, map(float, values), strict=True)))


def saved_host(path: str | Path | None = None) -> Host:
    """The calibration that was saved. Raises FileNotFoundError where there is none, ValueError where it is of another machine."""
    path = Path(path) if path is not None else calibration_file()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: this machine was not measured yet; run `edgelab calibrate-host`")
    host = Host.from_json(path.read_text(encoding="utf-8"))
    if host.machine != machine():
        raise ValueError(f"{path} is of another machine ({host.machine}); run `edgelab calibrate-host` here")
    return host


def calibrate_host(*, path: str | Path | None = None, runtime: bool = True, progress: bool = False, **settings) -> DeviceProfile:
    """The profile of this machine, measured and saved. `runtime`: time our runtime's probes, too. Other settings as `measure_host`."""
    host = measure_host(**settings)
    if runtime:
        host = calibrate_runtime(host, progress=progress)
    host.save(path)
    return host.profile


def compare_with_runtime(
    folder: str | Path,
    *,
    threads: Sequence[int] = (1,),
    host: Host | None = None,
    seconds: float = 1.0,
    prompt: int = PROMPT,
    new: int = NEW,
) -> list[HostPrediction]:
    """The model in `folder` predicted from its headers, then run and measured, for each number of threads."""
    from edgelab.runtime import Runtime

    host = saved_host() if host is None else host
    found = []
    for n in threads:
        predicted = predict_host(folder, threads=n, context=prompt + new / 2, host=host)
        runtime = Runtime.open(folder, threads=n, context=prompt + new, tiles=None)
        measured, _ = seconds_per_token(runtime, prompt=prompt, new=new, seconds=seconds)
        found.append(HostPrediction(predicted.model, n, predicted.context, predicted.parts, measured))
    return found
