"""Other quantization tools, measured as ours are: same model, same calibration tokens, our evaluation of their weights.

    python -m edgelab.peers list                         # which there are, and which are installed
    python -m edgelab.peers install auto-round           # a virtual environment of its own: .peers/auto-round

Their requirements contradict each other and ours, so each runs in an environment of its own, in a process of its own
(`worker.py`), and gives back dequantized weights. `put` writes these into a copy of the model; `evaluate` then can't
tell whose they are. The price: a tool's kernels and file formats are not measured here, only its choice of values and
the bits that its format stores for them.
"""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WORKER = Path(__file__).with_name("worker.py")
TORCH = "torch==2.13.0"  # in each pip command: else a tool may pull in another build


@dataclass(frozen=True)
class Peer:
    """A tool: its methods (as `run` takes them), the exact requirements of its environment, what to know of it."""

    name: str
    methods: tuple[str, ...]
    requirements: tuple[str, ...]
    note: str = ""
    ours: bool = False  # it may also live in the environment that runs edgelab


PEERS: dict[str, Peer] = {
    p.name: p
    for p in (
        Peer(
            "auto-round",
            ("signround", "signround-ext", "rtn"),
            ("auto-round==0.16.1", "transformers==5.24.0", "numpy==2.4.6", "safetensors==0.8.0"),
            "signed gradient descent on rounding and ranges; asymmetric too",
        ),
        Peer(
            "gptqmodel",
            ("gptq", "gptq-act-order", "gptq-mse", "gptaq"),
            ("gptqmodel==7.6.0", "transformers==5.24.0", "numpy==2.2.6", "safetensors==0.8.0"),
            "GPTQ; unfuses experts itself",
        ),
        Peer(
            "llmcompressor",
            ("gptq", "gptq-mse", "awq", "smoothquant-gptq-w8a8", "rtn"),
            ("llmcompressor==0.14.0.1", "transformers==5.17.0", "safetensors==0.8.0"),
            "GPTQ, AWQ, SmoothQuant",
        ),
        Peer(
            "hqq",
            ("hqq",),
            ("hqq==0.2.8.post1", "transformers==5.24.0", "safetensors==0.8.0"),
            "half-quadratic quantization, axis=1, needs no tokens",
        ),
        Peer(
            "optimum-quanto",
            ("max", "hqq"),
            ("optimum-quanto==0.2.7", "transformers==5.24.0", "safetensors==0.8.0"),
            "scale and shift by range or by HQQ; 2, 4 and 8 bits",
        ),
        Peer(
            "torchao",
            ("intx", "intx-hqq"),
            ("torchao==0.18.0", "transformers==5.24.0", "safetensors==0.8.0"),
            "IntxWeightOnly, 2 to 8 bits",
        ),
        Peer(
            "neural-compressor-pt",
            ("rtn", "gptq", "awq"),
            ("neural-compressor-pt==3.10", "accelerate==1.15.0", "transformers==5.24.0", "safetensors==0.8.0"),
            "RTN, GPTQ, AWQ",
        ),
        Peer(
            "nncf",
            ("int",),
            ("nncf==3.4.0", "transformers==5.24.0", "safetensors==0.8.0"),
            "data-free 4 and 8 bits",
        ),
        Peer(
            "bitsandbytes",
            ("nf4", "nf4-double", "fp4", "fp4-double"),
            ("bitsandbytes==0.50.2", "transformers==5.23.0", "safetensors==0.8.0"),
            "4-bit tables, no tokens",
            ours=True,
        ),
        Peer(
            "onnxruntime",
            ("rtn",),
            ("onnxruntime==1.31.1", "onnx==1.23.2", "transformers==5.23.0", "safetensors==0.8.0"),
            "MatMulNBits, 4 and 8 bits",
            ours=True,
        ),
    )
}


@dataclass(frozen=True, eq=False)
class PeerResult:
    """What a tool made of a model. `weights` {parameter name: float32 tensor} holds only those that it changed,
    norms and biases among them where it moved scales into these (AWQ, SmoothQuant).

    `bits_per_weight` counts codes, scales and zero points as the tool's format stores them, over the weights that it
    quantized; `coverage` is their share of the weights that it was asked for. `seconds` is the quantization alone.
    """

    weights: dict[str, Tensor] = field(repr=False)
    peer: str
    method: str
    version: str
    seconds: float
    peak_rss_bytes: int
    bits_per_weight: float
    coverage: float
    notes: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------------------- environments


def default_root() -> Path:
    """Where the environments lie: `$EDGELAB_PEERS`, else `.peers` in the current directory."""
    return Path(os.environ.get("EDGELAB_PEERS", ".peers")).expanduser().absolute()


def peer(name: str) -> Peer:
    """The row of `PEERS`. Raises ValueError for an unknown name."""
    if name not in PEERS:
        raise ValueError(f"peer {name!r} is not one of {', '.join(PEERS)}")
    return PEERS[name]


def interpreter(name: str, root: str | Path | None = None) -> Path:
    """The Python that runs this peer: of its own environment, or, for those that may live in ours, the present one.

    Raises FileNotFoundError, with the command that installs it, where there is none.
    """
    found = peer(name)
    root = Path(root) if root else default_root()
    own = root / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if own.is_file() and (root / name / "installed").is_file():
        return own
    if found.ours:
        from importlib.util import find_spec

        if find_spec(name):
            return Path(sys.executable)
    half = f" ({root / name} is there, but its installation did not end)" if own.is_file() else ""
    raise FileNotFoundError(f"{name} is not installed under {root}{half}: run `python -m edgelab.peers install {name} --root {root}`")


def environments(root: str | Path | None = None) -> dict[str, Path]:
    """{name: its Python} of the peers that are installed, in the order of `PEERS`."""
    found = {}
    for name in PEERS:
        try:
            found[name] = interpreter(name, root)
        except FileNotFoundError:
            continue
    return found


def install(name: str, root: str | Path | None = None, *, quiet: bool = True) -> Path:
    """Makes the environment of one peer, with the pins of `PEERS`; its Python. Needs pip's package index.

    Raises RuntimeError with pip's last lines when it fails; run again, it goes on from what is there.
    """
    found = peer(name)
    folder = (Path(root) if root else default_root()) / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--no-input", *(["-q"] if quiet else []), TORCH, *found.requirements]
    made = subprocess.run(command, text=True, stderr=subprocess.PIPE)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{_tail(made.stderr)}")
    (folder / "installed").write_text("\n".join((TORCH, *found.requirements)) + "\n", encoding="utf-8")
    return python


# -------------------------------------------------------------------------------------------------------------- running


def run(
    name: str,
    method: str,
    model_dir: str | Path,
    ids: Tensor,
    weights: Sequence[str],
    bits: int = 4,
    group_size: int = 32,
    *,
    symmetric: bool = True,
    unfuse: bool = True,
    threads: int = 2,
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    root: str | Path | None = None,
    timeout_s: float | None = None,
    python: str | Path | None = None,
) -> PeerResult:
    """What the peer `name` makes of the checkpoint in `model_dir`.

    `ids` int64 [sequences, context] are the calibration tokens, `weights` the names of the parameters to quantize (as
    in the model's state dict, fused expert stacks by the name of the stack), `settings` those of the tool that differ
    from the ones that the result's notes state. `unfuse` gives the tool linear layers in the place of fused experts.
    `python` overrides the interpreter.

    Raises ValueError for an unknown peer or method, FileNotFoundError where it is not installed, RuntimeError with the
    tool's own last lines when it fails.
    """
    found = peer(name)
    if method not in found.methods:
        raise ValueError(f"method {method!r} of {name} is not one of {', '.join(found.methods)}")
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids is {ids.dtype} {tuple(ids.shape)}; it must be int64 [sequences, context]")
    if not weights:
        raise ValueError("weights is empty; name the parameters to quantize")
    python = python or interpreter(name, root)
    job = {"peer": name, "method": method, "model": str(Path(model_dir).absolute()), "weights": list(weights)}
    job |= {"bits": bits, "group_size": group_size, "symmetric": symmetric, "unfuse": unfuse}
    job |= {"threads": threads, "seed": seed, "settings": dict(settings or {})}
    with tempfile.TemporaryDirectory(prefix="edgelab-peer-") as folder:
        here = Path(folder)
        (here / "job.json").write_text(json.dumps(job), encoding="utf-8")
        save_file({"ids": ids.contiguous()}, here / "calibration.safetensors")
        # nothing of this process's Python may reach the other one, and nothing is fetched
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                [str(python), str(WORKER), folder], cwd=folder, env=environment, text=True, capture_output=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} {method} took longer than timeout_s={timeout_s}; give it more time or fewer tokens") from None
        if done.returncode or not (here / "result.json").is_file():
            raise RuntimeError(f"{name} {method} ended with exit code {done.returncode}:\n{_tail(done.stderr or done.stdout)}")
        result = json.loads((here / "result.json").read_text(encoding="utf-8"))
        tensors = {k: t.clone() for k, t in load_file(here / "weights.safetensors").items()}  # the file goes with the folder
    return PeerResult(tensors, **{k: tuple(v) if k == "notes" else v for k, v in result.items()})


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with these weights in the place of its own, in its own dtype; all others are shared.

    Raises ValueError for a name or a shape that the model does not have, and for a weight that is tied to another.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            has = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(f"weights[{name!r}] is {tuple(tensor.shape)}; the {type(model).__name__} has {has}")
        twins = [n for n, p in parameters.items() if p is parameters[name] and n != name]
        if twins:
            raise ValueError(f"{name} is tied to {twins[0]}: a peer's weight for one would change both")
    memo = {id(p): p for n, p in parameters.items() if n not in weights}
    changed = copy.deepcopy(model, memo)
    with torch.no_grad():
        for name, tensor in weights.items():
            changed.get_parameter(name).copy_(tensor)
    return changed


def _tail(text: str, lines: int = 12) -> str:
    """The last lines, without progress bars."""
    kept = [line for line in re.split(r"[\r\n]+", text or "") if line.strip() and not re.search(r"\d+%\|", line)]
    return "\n".join(kept[-lines:]) or "(it said nothing)"
