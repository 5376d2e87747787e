"""Is this machine ready? One line per thing that edgelab needs, with the way out where something is missing.

Also the machine's fingerprint: processor, its low-bit instructions, threads, memory, versions. `edgelab doctor` and
notebook 00 print both.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from edgelab.report import machine

# what each package is for; the first group is needed, the others say what is lost without them
NEEDED = ("numpy", "torch", "transformers", "safetensors", "tokenizers", "datasets", "evaluate", "numba", "tqdm", "plotly", "typer", "rich")
OPTIONAL = {
    "onnx": "export to ONNX (pip install 'edgelab[export]')",
    "onnxruntime": "running the exported ONNX file (pip install 'edgelab[export]')",
    "onnxscript": "torch's ONNX exporter (pip install 'edgelab[export]')",
    "ipywidgets": "controls in the notebooks (pip install 'edgelab[lab]')",
    "anywidget": "interactive figures in the notebooks (pip install 'edgelab[lab]')",
    "jupyterlab": "the notebooks (pip install 'edgelab[lab]')",
}
# cpuinfo's name -> what its instruction is good for
CPU_FEATURES = {
    "avx2": "AVX2 (256-bit integer vectors)",
    "avx512f": "AVX-512 (512-bit vectors)",
    "avx512_vnni": "AVX-512 VNNI (vpdpbusd: 64 int8 products per instruction)",
    "avx_vnni": "AVX-VNNI (vpdpbusd on 256 bits)",
    "amx_int8": "AMX (int8 tiles)",
    "asimddp": "Arm dot product (sdot)",
    "i8mm": "Arm int8 matrix product",
}
_IMPORT_TIMEOUT_S = 300  # the first import on a slow disk takes long; one that hangs must not hang us
_MIN_FREE_GB = 3.0  # what the demo may take at its peak

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the examination; `way_out` is empty when all is well."""

    name: str
    status: Status
    found: str
    way_out: str = ""


def constraints() -> dict[str, str]:
    """The tested version of each package, from constraints.txt: a checkout has it at its root, a wheel in the package."""
    for folder in (Path(__file__).resolve().parents[1], Path(__file__).resolve().parent):
        file = folder / "constraints.txt"
        if file.is_file():
            pairs = re.findall(r"^([A-Za-z0-9_.\-]+)\s*==\s*([^\s;#]+)", file.read_text(encoding="utf-8"), flags=re.M)
            return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}
    return {}


def version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where /proc/cpuinfo does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    m = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, flags=re.M)
    return frozenset(m[1].split()) if m else frozenset()


def memory_gb() -> tuple[float, float] | None:
    """(total, available) memory in GB of 10^9 bytes, or None where /proc/meminfo does not exist."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    kib = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, flags=re.M)}
    return kib["MemTotal"] * 1024 / 1e9, kib.get("MemAvailable", kib["MemFree"]) * 1024 / 1e9


def usable_cores() -> int:
    """Cores that this process may run on (an affinity mask or a container can hide some)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fingerprint() -> dict[str, str]:
    """This machine in a few lines: enough to tell two measurements of different machines apart."""
    flags = cpu_flags()
    memory = memory_gb()
    found = {
        "machine": machine(),
        "architecture": platform.machine(),
        "low-bit instructions": ", ".join(k for k in CPU_FEATURES if k in flags) or "none known",
        "kernels": _kernel_way()[0],
        "cores usable": str(usable_cores()),
        "memory": f"{memory[0]:.1f} GB, {memory[1]:.1f} GB free" if memory else "unknown",
        "system": platform.platform(),
        "edgelab": version("edgelab") or "from its sources",
    }
    found |= {p: v for p in ("torch", "transformers", "numba", "numpy", "datasets", "onnxruntime") if (v := version(p))}
    return found


def _kernel_way() -> tuple[str, str]:
    """(the instructions that the kernels take here, or why they cannot run; the way out, empty when all is well)."""
    try:
        import edgelab.kernels.matmul  # noqa: F401 - compiles nothing, but fails where kernels cannot be
        from edgelab.kernels import simd

        return f"{simd.way()} (of {', '.join(simd.ways())}; the environment variable {simd.VARIABLE} chooses another)", ""
    except ImportError as error:
        return f"cannot be imported: {error}", "pip install -c constraints.txt -e ."
    except Exception as error:
        return f"cannot run: {error}", "set EDGELAB_SIMD to one of those, or not at all" if isinstance(
            error, ValueError
        ) else "see the error"


def broken_imports(names: Iterable[str] = NEEDED) -> dict[str, str]:
    """{package: what went wrong} for those of `names` that are installed and yet cannot be imported.

    They are imported in another process: a shared library that crashes takes that one down, and is named.
    """
    todo, broken = list(names), {}
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        print('\\n@' + name, 'no', type(error).__name__ + ':', ' '.join(str(error).split())[:300], flush=True)\n"
        "    else:\n"
        "        print('\\n@' + name, 'yes', flush=True)\n"
    )
    while todo:  # once, unless a package brings the process down: then again with those after it
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", code, *todo], capture_output=True, text=True, errors="replace", timeout=_IMPORT_TIMEOUT_S
            )
            said, end = done.stdout, f"importing it ended Python with code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes | None) else error.stdout
            end = f"importing it took more than {_IMPORT_TIMEOUT_S} s"
        told = dict(re.findall(r"^@(\S+) (.*)$", said, flags=re.M))
        broken |= {name: answer.removeprefix("no ") for name, answer in told.items() if answer != "yes"}
        todo = [name for name in todo if name not in told]
        if todo:
            broken[todo.pop(0)] = end
    return broken


def _packages() -> list[Check]:
    tested, checks = constraints(), []
    broken = broken_imports(name for name in NEEDED if version(name))
    for name in (*NEEDED, *OPTIONAL):
        have, want = version(name), tested.get(name)
        if have is None:
            missing = OPTIONAL.get(name)
            way_out = f"without it there is no {missing}" if missing else f"pip install {name}" + (f"=={want}" if want else "")
            checks.append(Check(name, "warn" if missing else "fail", "not installed", way_out))
        elif name in broken:
            again = f"pip install --force-reinstall {name}" + (f"=={want}" if want else "")
            checks.append(Check(name, "fail", f"{have}, but it cannot be imported: {broken[name]}", again))
        elif want and have.split("+")[0] != want.split("+")[0]:
            checks.append(
                Check(name, "warn", f"{have}; tested with {want}", f"pip install {name}=={want} if something behaves differently")
            )
        else:
            checks.append(Check(name, "ok", have + ("" if want else " (no tested version is recorded here)")))
    return checks


def _offline() -> list[Check]:
    """What a run without a network needs: the embedded models, a corpus to be read, a place to write to."""
    from edgelab.paths import data_dir

    checks = []
    for name, status in (("edge-moe", "fail"), ("edge-dense", "warn")):
        folder = data_dir() / name
        missing = [f for f in ("config.json", "tokenizer.json") if not (folder / f).is_file()]
        weights = sorted(folder.glob("*.safetensors"))
        if missing or not weights:
            lost = ", ".join([*missing, *([] if weights else ["*.safetensors"])])
            checks.append(
                Check(
                    f"model {name}", status, f"{lost} missing in {folder}", "restore data/ from the repository, or train it: make pretrain"
                )
            )
        else:
            checks.append(Check(f"model {name}", "ok", f"{sum(f.stat().st_size for f in weights) / 1e6:.1f} MB of weights"))
    try:
        import pydoc_data.topics as topics

        library = Path(os.__file__).parent
        n = sum(1 for _ in library.glob("*.py"))
        checks.append(
            Check("text for the corpus", "ok" if n > 100 else "fail", f"{len(topics.topics)} topics, {n} modules in the standard library")
        )
    except ImportError:
        checks.append(
            Check("text for the corpus", "fail", "pydoc_data is missing", "install the full standard library (Debian: python3-full)")
        )
    return checks


def examine() -> list[Check]:
    """Every check, in the order in which a newcomer would need them."""
    v = sys.version_info
    checks = [
        Check("Python", "ok" if v >= (3, 11) else "fail", platform.python_version(), "" if v >= (3, 11) else "use Python 3.11 or newer")
    ]
    checks += _packages()
    flags = [k for k in CPU_FEATURES if k in cpu_flags()]
    checks.append(
        Check("CPU features", "ok" if flags else "warn", ", ".join(CPU_FEATURES[k] for k in flags) or "none known: portable loops")
    )
    way, wrong = _kernel_way()
    checks.append(Check("kernels", "fail" if wrong else "ok", way, wrong))
    cores = usable_cores()
    checks.append(Check("cores", "ok" if cores >= 2 else "warn", str(cores), "" if cores >= 2 else "everything runs, more slowly"))
    memory = memory_gb()
    if memory:
        enough = memory[1] >= _MIN_FREE_GB
        checks.append(
            Check(
                "memory",
                "ok" if enough else "warn",
                f"{memory[1]:.1f} GB free of {memory[0]:.1f}",
                "" if enough else f"the demo may need {_MIN_FREE_GB:.0f} GB",
            )
        )
    return checks + _offline()


def table(checks: list[Check]) -> list[dict[str, str]]:
    """The checks as lines of text, for the CLI and the notebook."""
    return [{"status": c.status, "what": c.name, "found": c.found, "way out": c.way_out} for c in checks]
