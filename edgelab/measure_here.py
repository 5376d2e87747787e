"""One configuration of a sweep, made and measured on this machine: what the explorer's "measure here" runs, in a process of its own.

A process and not a thread: the notebook stays quick while weights are rounded, and to cancel is to end the process, at any moment,
with its memory. It gets a JSON request as the first line of its standard input, which stays open: it ends with whoever asked, and the
process with it. It writes a JSON object per line: {"share": 0.3, "step": "..."} as it goes, at the end {"result": {...}} or
{"error": "..."}. It does what the sweep did (`sweep_run.measure_configuration`): the same documents, calibration text and reference.
Then it compresses once more and writes tokens one by one with the kernels (`runtime.Runtime`): a stored
sweep holds no times, since time belongs to a machine.

    (echo '{"model": "edge-moe", "recipe": "...", "protocol": {}}'; cat) | python -m edgelab.measure_here
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import nan
from statistics import median

DECODE_TOKENS, ROUNDS, PROMPT_TOKENS = 64, 3, 16
FLOATING = "the kernels would read its weights as float32, twice the bytes of the bfloat16 that its size counts"
STEPS = ("reading the text", "loading the model", "compressing", "measuring it against the original", "timing the kernels")


@dataclass(frozen=True)
class Here:
    """What was measured here. `values` {metric: value}; `ms_per_token` NaN with the reason in `no_speed` where the kernels can't run it.

    `exact`: which answers were right, in the order of the sweep. `context`: tokens in the cache when it was timed, on average.
    """

    model: str
    recipe: str
    size_bytes: int
    values: Mapping[str, float]
    exact: Sequence[bool]
    ms_per_token: float
    no_speed: str
    context: int
    threads: int
    machine: str
    seconds: float

    provenance = "measured here"

    @classmethod
    def of(cls, d: Mapping) -> "Here":
        known = {f.name for f in fields(cls)}
        return cls(**{k: nan if k == "ms_per_token" and v is None else v for k, v in d.items() if k in known})


class Failed(RuntimeError):
    """The process that measured ended with an error; the text is its own."""


class Job:
    """A measurement under way. `steps()` yields (share done, what it does) until it ends; then `result`, or an exception.

    `command`: the program, by default this module in this Python. `cancel` ends it at once; it may be called from another thread.
    """

    def __init__(self, request: Mapping, command: Sequence[str] | None = None) -> None:
        self.result: Here | None = None
        self.cancelled = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in steps; a pipe that nobody reads would stop the process once it is full
        environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            list(command or (sys.executable, "-m", "edgelab.measure_here")), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8", env=environment, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()  # it stays open: its end tells the child that nobody waits any more

    def steps(self) -> Iterator[tuple[float, str]]:
        """Progress as it comes. Raises Failed with what the process said if it did not end well; nothing after `cancel`."""
        said = None
        for line in self._process.stdout:
            try:
                told = json.loads(line)
            except json.JSONDecodeError:  # a library's own print
                continue
            if "result" in told:
                self.result = Here.of(told["result"])
            elif "error" in told:
                said = told["error"]
            else:
                yield float(told["share"]), str(told["step"])
        code = self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.seek(0)
        errors = self._errors.read().decode("utf-8", "replace")
        self._errors.close()
        if self.cancelled:
            self.result = None
        elif self.result is None:
            last = errors.strip().splitlines()[-1:] or [f"it ended with code {code} and said nothing"]
            raise Failed(said or last[0])

    def cancel(self) -> None:
        """End the process and whatever it started."""
        self.cancelled = True
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None


def measure(model: str, recipe: str, protocol: Mapping | None = None, *, tell=lambda share, step: None) -> Here:
    """Make `recipe` (JSON of a Recipe) of the embedded model and measure it as the sweep does, and its decoding with our kernels.

    `protocol`: the fields of `sweep_run.Protocol` that the sweep was measured with. `tell(share, step)` is called before each step.
    """
    from edgelab import set_threads
    from edgelab.compress import compress
    from edgelab.recipe import Quantize, Recipe
    from edgelab.report import machine
    from edgelab.sweep_run import Protocol, bench, measure_configuration, one_thread

    began = time.perf_counter()
    given = {k: tuple(map(tuple, v)) if k == "docs" else v for k, v in dict(protocol or {}).items()}
    how, steps, told = Protocol(**given), Recipe.from_json(recipe), iter((0.02, 0.3, 0.45, 0.55))
    names = {"text": STEPS[0], "load": STEPS[1], "compress": STEPS[2], "evaluate": STEPS[3]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small scales, rare experts: the row's own quality tells
        row = measure_configuration(model, steps, protocol=how, step=lambda name: tell(next(told, 0.6), names.get(name, name)))
        tell(0.9, STEPS[4])
        set_threads(1)
        with one_thread():  # the codes once more, for the kernels: what was measured above are the floats that they stand for
            small = compress(bench(how).original(model), steps, calibration=bench(how).calibration, progress=False).model
        floating = not any(isinstance(step, Quantize) for step in steps.steps)
        seconds, no_speed = (nan, FLOATING) if floating else _decode(small)
    values = {m: row[m] for m in ("kld", "bits_per_byte", "em_assistant", "em_arithmetic")}
    context = PROMPT_TOKENS + DECODE_TOKENS // 2
    took = round(time.perf_counter() - began, 1)
    return Here(model, recipe, int(row["size_bytes"]), values, row["doc_exact"], 1e3 * seconds, no_speed, context, 1, machine(), took)


def _decode(model) -> tuple[float, str]:
    """(median seconds per token over `ROUNDS` rounds, "") with our kernels on one thread, or (NaN, why not)."""
    from edgelab.runtime import Runtime

    try:
        runtime = Runtime(model, threads=1, context=PROMPT_TOKENS + DECODE_TOKENS + 8)
    except (ValueError, TypeError) as error:
        return nan, str(error)
    runtime.eos = ()
    prompt = [1 + i % (runtime.vocabulary - 1) for i in range(PROMPT_TOKENS)]
    found = [1 / runtime.generate(prompt, DECODE_TOKENS).decode_tokens_per_s for _ in range(ROUNDS + 1)][1:]
    return median(found), ""


def end_with_parent() -> None:
    """End this process as soon as its standard input does: whoever asked is gone, killed perhaps, and nobody reads the answer."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held while Python shuts down
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    request = json.loads(sys.stdin.readline())
    end_with_parent()

    def say(line: Mapping) -> None:
        print(json.dumps(line), flush=True)

    try:
        here = measure(
            request["model"], request["recipe"], request.get("protocol"), tell=lambda share, step: say({"share": share, "step": step})
        )
    except Exception as error:  # whatever it is, the notebook shows it
        say({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None
    d = {f.name: getattr(here, f.name) for f in fields(Here)}
    say({"result": d | {"ms_per_token": None if here.ms_per_token != here.ms_per_token else here.ms_per_token}})


if __name__ == "__main__":
    main()
