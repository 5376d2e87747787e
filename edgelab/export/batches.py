"""Rows in one batch of an ONNX file with a cache: that they leave each other alone, and what they cost on this machine."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from edgelab.export import ExportError

BATCH_TOLERANCE = 1e-3  # of the largest logit: other sums, float32


def rows_alone(path: Path, batch_size: int, vocabulary: int, seed: int = 0, steps: int = 3) -> float:
    """The largest difference of logits, as a share of the largest logit, between rows of a batch, filled up on the left to one length,
    and each of them alone, at the prompt and for `steps` tokens after it. Raises ExportError above `BATCH_TOLERANCE`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    draw = np.random.default_rng(seed)
    lengths = [3 + 5 * i for i in range(batch_size)]
    rows = [draw.integers(0, vocabulary, n + steps) for n in lengths]
    longest, worst = max(lengths), 0.0

    def run(ids: np.ndarray, mask: np.ndarray, state: dict) -> tuple[np.ndarray, dict]:
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | state)
        return logits[:, -1], dict(zip(state, present, strict=True))

    def empty(n: int) -> dict:
        return {i.name: np.zeros((n, i.shape[1], 0, i.shape[3]), np.float32) for i in past}

    def decoded(chosen: list[int]) -> list[np.ndarray]:
        width = longest if len(chosen) > 1 else lengths[chosen[0]]
        ids, mask = np.zeros((len(chosen), width), np.int64), np.zeros((len(chosen), width), np.int64)
        for at, i in enumerate(chosen):
            ids[at, width - lengths[i] :], mask[at, width - lengths[i] :] = rows[i][: lengths[i]], 1
        logits, state = run(ids, mask, empty(len(chosen)))
        found = [logits]
        for step in range(steps):
            mask = np.concatenate([mask, np.ones((len(chosen), 1), np.int64)], 1)
            logits, state = run(np.array([[rows[i][lengths[i] + step]] for i in chosen]), mask, state)
            found.append(logits)
        return found

    together = decoded(list(range(batch_size)))
    for i in range(batch_size):
        for ours, alone in zip(together, decoded([i]), strict=True):
            worst = max(worst, float(np.abs(ours[i] - alone[0]).max() / np.abs(alone).max()))
    if not worst <= BATCH_TOLERANCE:
        raise ExportError(f"{path.name}: a row of a batch of {batch_size} differs from the row alone by {worst:.1e} of the largest logit")
    return worst


_MEASURE = """
import json, sys, time
import numpy as np, onnxruntime as ort
spec = json.load(sys.stdin)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, spec["threads"]
before = status("VmRSS")
session = ort.InferenceSession(spec["path"], options, providers=["CPUExecutionProvider"])
past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
rows, length, steps = spec["rows"], spec["length"], spec["steps"]
ids = np.random.default_rng(0).integers(0, spec["vocabulary"], (rows, length))
mask = np.ones((rows, length), np.int64)
state = {i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), np.float32) for i in past}
def run(ids, mask, state):
    started = time.perf_counter()
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask} | state)
    return time.perf_counter() - started, logits[:, -1].argmax(-1)[:, None], dict(zip(state, present))
run(ids, mask, state)
first, ids, state = run(ids, mask, state)
times = []
for _ in range(steps):
    mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
    t, ids, state = run(ids, mask, state)
    times.append(t)
print(json.dumps({"first_s": first, "step_s": sorted(times)[len(times) // 2], "peak": status("VmHWM") - before}))
"""


def measure(path: Path, batches: Sequence[int], threads: int, length: int, steps: int = 24, repeats: int = 3) -> list[dict[str, object]]:
    """Of the ONNX file with a cache, here, in a process of its own without torch, the median of `repeats`: per number of rows, seconds to
    the first token of `length`, tokens/s of all rows together after it, and the peak of RAM above the imports (Linux; else none)."""
    import onnxruntime

    from edgelab.report import machine

    if not Path("/proc/self/status").exists():
        return []
    meta = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_outputs()[0].shape[-1]
    lines = []
    for rows in batches:
        spec = {"path": str(path), "threads": threads, "rows": rows, "length": length, "steps": steps, "vocabulary": meta}
        runs = []
        for _ in range(repeats):
            done = subprocess.run([sys.executable, "-c", _MEASURE], input=json.dumps(spec), capture_output=True, text=True)
            if done.returncode:
                raise ExportError(f"{path.name} with {rows} rows of {length} tokens fails: {done.stderr.strip().splitlines()[-1:]}")
            runs.append(json.loads(done.stdout))
        lines.append(
            {
                "rows": rows,
                "threads": threads,
                "prompt": length,
                "first_token_s": median(r["first_s"] for r in runs),
                "tokens_per_s": rows / median(r["step_s"] for r in runs),
                "tokens_per_s_low": rows / max(r["step_s"] for r in runs),
                "tokens_per_s_high": rows / min(r["step_s"] for r in runs),
                "peak_bytes": median(r["peak"] for r in runs),
                "machine": machine(),
            }
        )
    return lines
