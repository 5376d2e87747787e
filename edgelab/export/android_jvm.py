"""The sources of an exported Android module, compiled by this machine's own compilers and run on its JVM.

The same C files and Java classes that Gradle builds for a phone, against the ONNX Runtime library of the Python package. `Jvm` talks to
`Probe` (src/test/java of the module) over its standard input: one JSON object a line.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelab.export import ExportError, NoRuntimeError

_WARNINGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden")
# by name: "all" would bring what a later JDK adds, such as a warning about any System.loadLibrary (24)
LINT = "-Xlint:cast,deprecation,divzero,empty,fallthrough,finally,overrides,rawtypes,serial,static,try,unchecked,varargs"


@dataclass(frozen=True)
class Tools:
    """Paths: the compilers, the JVM, the folder of jni.h, ONNX Runtime's shared library."""

    cc: str
    javac: str
    java: str
    headers: Path
    runtime: Path


def tools() -> Tools:
    """What compiles and runs the module here. Raises ExportError, saying what to install, for the first that is missing."""
    if not sys.platform.startswith("linux"):
        raise NoRuntimeError(
            f"the module is compiled and run on Linux only, not on {sys.platform}; leave that out: check=False (--no-verify)"
        )
    way_out = "(Debian and Ubuntu: apt install {}); leave that out: check=False (--no-verify) to leave the run on a JVM out"
    cc = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if cc is None:
        raise NoRuntimeError(f"there is no C compiler on the PATH, which the module's C code needs {way_out.format('gcc libc6-dev')}")
    javac, java = shutil.which("javac"), shutil.which("java")
    if javac is None or java is None:
        missing = "javac" if javac is None else "java"
        raise NoRuntimeError(f"there is no {missing} on the PATH, which the module's classes need {way_out.format('default-jdk-headless')}")
    headers = Path(javac).resolve().parents[1] / "include"
    if not (headers / "jni.h").is_file():
        raise NoRuntimeError(f"{headers} has no jni.h; install a whole JDK {way_out.format('default-jdk-headless')}")
    return Tools(cc, javac, java, headers, runtime_library())


def runtime_library() -> Path:
    """libonnxruntime.so of the installed Python package, by its full name. Raises ExportError where there is none."""
    try:
        import onnxruntime
    except ImportError:
        raise NoRuntimeError('onnxruntime is not installed: pip install "edgelab[export]"') from None
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        raise NoRuntimeError(
            f"onnxruntime {onnxruntime.__version__} comes without libonnxruntime.so (its Linux wheels have it): "
            "reinstall it from PyPI, or leave that out: check=False (--no-verify)"
        )
    return found[0]


def build(module: Path, work: Path, found: Tools | None = None, *, flags: Sequence[str] = ()) -> Path:
    """Compiles the sources of `module` into `work`: libedgelab.so and classes/. Returns `work`. `flags`: more for the C compiler.

    Raises ExportError with the compiler's first words: warnings count as errors, in C and in Java.
    """
    found = found or tools()
    c, java = module / "src" / "main" / "cpp", module / "src" / "main" / "java"
    sources = sorted(str(f) for f in c.glob("*.c"))
    headers = [f"-I{found.headers}", f"-I{found.headers / 'linux'}"]
    work.mkdir(parents=True, exist_ok=True)
    _compile([found.cc, *_WARNINGS, *flags, *headers, "-shared", "-o", str(work / "libedgelab.so"), *sources, "-ldl", "-lm"])
    classes = [f for f in java.rglob("*.java") if "android" not in f.relative_to(java).parts]  # that one needs Android's SDK
    classes += (module / "src" / "test" / "java").rglob("*.java")
    _compile([found.javac, "-encoding", "UTF-8", LINT, "-Werror", "-d", str(work / "classes"), *sorted(map(str, classes))])
    return work


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(f"{Path(command[0]).name} refuses the module: {' | '.join(said[:3])}")


class Jvm:
    """A JVM with the module's classes: `ask(do, ...)` gives the answer to a command of Probe as a dict, {"error": ...} among them."""

    def __init__(self, work: Path, found: Tools | None = None, *, check_jni: bool = True, env: dict[str, str] | None = None):
        found = found or tools()
        self.work = work
        command = [found.java, "-Xmx1g", "-XX:-UsePerfData", f"-XX:ErrorFile={work / 'crash.log'}", *(["-Xcheck:jni"] if check_jni else [])]
        command += [f"-Djava.library.path={work}", f"-Dedgelab.onnxruntime={found.runtime}", "-cp", str(work / "classes")]
        env = os.environ | {"LC_ALL": "C.UTF-8"} | (env or {})  # else a JVM may not find a file whose name is not ASCII
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            [*command, "dev.edgelab.Probe"], text=True, encoding="utf-8", errors="replace", env=env, cwd=work, **pipes
        )
        self.said: deque[str] = deque(maxlen=50)  # what the JVM itself writes: warnings of -Xcheck:jni, the words before a crash
        self._reader = threading.Thread(target=lambda: self.said.extend(self._process.stderr), daemon=True)
        self._reader.start()

    def ask(self, do: str, timeout_s: float = 300, **given) -> dict:
        """The answer to one command. Raises ExportError when the JVM ends or is silent for `timeout_s`."""
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do} | given) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
                self.said.append(line)
        except OSError:
            pass
        finally:
            timer.cancel()
        self._process.wait(30)
        self._reader.join(10)
        raise ExportError(
            f"the JVM ended at {do!r} (exit code {self._process.returncode}): {' | '.join(s.strip() for s in self.said)[-600:]}"
        )

    def must(self, do: str, **given) -> dict:
        """`ask`, where an exception in Java is an ExportError."""
        answer = self.ask(do, **given)
        if "error" in answer:
            raise ExportError(f"{do} on the JVM throws {answer['error']}: {answer['message']}")
        return answer

    def floats(self, do: str, key: str = "logits", **given) -> np.ndarray:
        """float32 [n], the numbers that a command writes to a file."""
        path = self.work / "floats.bin"
        count = self.must(do, to=str(path), **given)[key]
        values = np.fromfile(path, "<f4")
        if len(values) != count:
            raise ExportError(f"{do} on the JVM states {count} numbers and writes {len(values)}")
        return values

    def net(self, path: Path, x: np.ndarray) -> np.ndarray:
        """float32 [n]: the first output of the net at `path` for `x`."""
        given = self.work / "input.bin"
        np.ascontiguousarray(x, "<f4").tofile(given)
        return self.floats("net", "output", path=str(path), shape=list(x.shape), **{"from": str(given)})

    def warnings(self) -> list[str]:
        """What -Xcheck:jni found wrong in the C code."""
        return [s.strip() for s in self.said if "in native method" in s]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._reader.join(10)
        self._process.stdout.close()
        self._process.stderr.close()


@contextmanager
def running(module: Path, **settings) -> Iterator[Jvm]:
    """The module compiled in a temporary folder and a JVM with it, for as long as the block lasts."""
    found = tools()
    with tempfile.TemporaryDirectory(prefix="edgelab-jvm-") as folder:
        jvm = Jvm(build(module, Path(folder), found), found, **settings)
        try:
            yield jvm
        finally:
            jvm.close()


def speed(folder: str | Path, *, prompt: int = 16, tokens: int = 64, threads: int = 1, repeats: int = 3) -> dict[str, float]:
    """Tokens per second after the first, greedy, of an exported folder on the JVM and of the same file in Python's ONNX Runtime, in turn.

    Medians over `tokens - 1` steps, then over `repeats`. "jvm_tokens_per_s", "python_tokens_per_s", "jvm_first_ms" (prompt and first
    token), "python_first_ms", "call_ns": a call from Java to C and back that computes nothing.
    """
    import onnxruntime

    folder = Path(folder)
    path = folder / "edgelab" / "src" / "main" / "assets" / "edgelab" / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = list(range(5, 5 + prompt))
    rows: dict[str, list[float]] = {"jvm": [], "python": [], "jvm_first": [], "python_first": [], "call": []}
    with running(folder / "edgelab", check_jni=False) as jvm:
        jvm.must("load", path=str(path), threads=threads, context=0)
        for i in range(repeats + 1):  # the first warms up
            answer = jvm.must("bench", prompt=ids, max=tokens)
            java, python = np.array(answer["ns"]), np.array(_python_steps(session, ids, tokens))
            if i:
                rows["jvm"].append(1e9 / np.median(java[1:]))
                rows["python"].append(1e9 / np.median(python[1:]))
                rows["jvm_first"].append(java[0] / 1e6)
                rows["python_first"].append(python[0] / 1e6)
                rows["call"].append(answer["call_ns"])
    found = {k: float(np.median(v)) for k, v in rows.items()}
    return {
        "jvm_tokens_per_s": found["jvm"],
        "python_tokens_per_s": found["python"],
        "jvm_first_ms": found["jvm_first"],
        "python_first_ms": found["python_first"],
        "call_ns": found["call"],
    }


def _python_steps(session, ids: list[int], tokens: int) -> list[int]:
    """Nanoseconds of each of `tokens` greedy steps after `ids`."""
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past_")}
    took, step, total = [], np.array([ids]), 0
    for _ in range(tokens):
        began = time.perf_counter_ns()
        total += step.shape[1]
        logits, *present = session.run(None, {"input_ids": step, "attention_mask": np.ones((1, total), np.int64)} | past)
        past = dict(zip(past, present, strict=True))
        step = logits[:, -1:].argmax(-1)
        took.append(time.perf_counter_ns() - began)
    return took
