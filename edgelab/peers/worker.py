"""One quantization tool on one model, inside that tool's own environment: `python worker.py FOLDER`.

Runs by path and imports nothing of edgelab, only the standard library, torch, transformers, safetensors and the tool
itself (in `dataless.py` and `calibrated.py` beside this file). What is compared is what a tool does to the *weights*: it
hands them back dequantized, so that one and the same code measures all tools. No kernel of the tool is involved.

    FOLDER/job.json                   {peer, method, bits, group_size, symmetric, model, weights, unfuse, threads, seed, settings}
    FOLDER/calibration.safetensors    ids: int64 [sequences, context]
    FOLDER/weights.safetensors    ->  {parameter name: float32}, only those that the tool changed
    FOLDER/result.json            ->  version, seconds of the quantization alone, peak memory, stored bits per weight, coverage, notes

Fused experts. In transformers 5 the experts of a layer are two parameters, gate_up_proj [E, 2 I, H] and down_proj
[E, H, I], which a tool that looks for `nn.Linear` passes over. `unfuse` turns them into 3 E linear layers that compute
the same, y_t = sum over the chosen e of g_te W_down^e (act(W_gate^e x_t) * W_up^e x_t), under the names that
DeepSeek's own checkpoints use (experts.7.gate_proj.weight); `fuse_back` undoes that for the names and the tensors.
With `unfuse` false a tool is seen as it comes, and `coverage` says what share of the weights it left out.
"""

import importlib
import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

# peer -> the file beside this one that knows it; the function is the peer's name with underscores
BACKENDS = {
    "bitsandbytes": "dataless",
    "hqq": "dataless",
    "nncf": "dataless",
    "onnxruntime": "dataless",
    "optimum-quanto": "dataless",
    "torchao": "dataless",
    "auto-round": "calibrated",
    "gptqmodel": "calibrated",
    "llmcompressor": "calibrated",
    "neural-compressor-pt": "calibrated",
}


@dataclass(frozen=True)
class Job:
    """What to do. `weights` are parameter names of the model as transformers 5 loads it, fused experts included."""

    peer: str
    method: str
    model: str
    weights: tuple[str, ...]
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    unfuse: bool = True
    threads: int = 1
    seed: int = 0
    settings: dict = field(default_factory=dict)  # of the tool; what is not named keeps the default that `notes` states


@dataclass
class Outcome:
    """What a backend hands back: weights under the names of the model it was given, and the bits that the tool stores for them."""

    weights: dict[str, Tensor]
    stored_bits: float
    seconds: float
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- experts as linear layers


class UnfusedExperts(nn.Module):
    """The experts of one layer as linear layers, called as the fused module is: (x [T, H], chosen [T, k], gates [T, k])."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        for e, (gate_up, down) in enumerate(zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)):
            gate, up = gate_up.chunk(2)
            self.add_module(str(e), nn.ModuleDict({"gate_proj": _linear(gate), "up_proj": _linear(up), "down_proj": _linear(down)}))
        self.num_experts, self.act_fn = e + 1, fused.act_fn

    def __len__(self) -> int:
        return self.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            # an expert that nobody chose still runs, on zero rows: some tools wait for each linear layer to be called
            token, place = torch.where(top_k_index == e)
            x, expert = hidden_states[token], self._modules[str(e)]
            y = expert["down_proj"](self.act_fn(expert["gate_proj"](x)) * expert["up_proj"](x))
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def unfuse(model: nn.Module) -> list[str]:
    """Replaces every fused expert module of `model` by linear layers that compute the same; the modules' names.

    Raises ValueError for experts with a bias, or stored transposed: their function is another one.
    """
    found = [name for name, module in model.named_modules() if _is_fused(module)]
    for name in found:
        fused = model.get_submodule(name)
        extra = sorted(set(fused._parameters) - {"gate_up_proj", "down_proj"})
        (_, two_inner, hidden), down = fused.gate_up_proj.shape, tuple(fused.down_proj.shape[1:])
        if extra or down != (hidden, two_inner // 2):
            raise ValueError(
                f"{name} ({type(fused).__name__}) can't be unfused: gate_up_proj {tuple(fused.gate_up_proj.shape)}, "
                f"down_proj {tuple(fused.down_proj.shape)}, further parameters {extra}; known are experts without bias, "
                "[E, 2 I, H] and [E, H, I]. Set unfuse to false"
            )
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, UnfusedExperts(fused).train(fused.training))
    return found


def _is_fused(module: nn.Module) -> bool:
    return all(getattr(module._parameters.get(p), "ndim", 0) == 3 for p in ("gate_up_proj", "down_proj"))


def parts(weight: str, experts: int) -> list[list[str]]:
    """The linear layers' parameter names that make up a weight: per expert, [gate, up] or [down]; for a plain one, itself."""
    base, _, last = weight.rpartition(".")
    if last == "gate_up_proj" and experts:
        return [[f"{base}.{e}.gate_proj.weight", f"{base}.{e}.up_proj.weight"] for e in range(experts)]
    if last == "down_proj" and experts:
        return [[f"{base}.{e}.down_proj.weight"] for e in range(experts)]
    return [[weight]]


def fuse_back(tensors: Mapping[str, Tensor], original: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """`tensors` of linear layers, under the names and in the shapes of `original` (the model before `unfuse`).

    Of a stack of which a tool quantized some experts only, the others keep their weights; stacks of which it
    quantized none are left out.
    """
    fused = {}
    for name in names:
        stack = parts(name, original[name].shape[0] if original[name].ndim == 3 else 0)
        if name in tensors:
            fused[name] = tensors[name]
        elif any(part in tensors for group in stack for part in group):
            rows = [w.chunk(len(group)) for w, group in zip(original[name], stack, strict=True)]
            fused[name] = torch.stack(
                [torch.cat([tensors.get(p, own) for p, own in zip(*pair, strict=True)]) for pair in zip(stack, rows, strict=True)]
            )
    return fused


def targets(model: nn.Module, job: Job) -> dict[str, nn.Linear]:
    """{module name: linear layer} that the job's weights live in, in the model's order; fused experts are in none."""
    wanted = set()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight in job.weights:
        base = weight.rpartition(".")[0]
        experts = model.get_submodule(base) if weight not in parameters else None
        wanted |= {p.removesuffix(".weight") for group in parts(weight, len(experts or ())) for p in group}
    return {name: m for name, m in linears.items() if name in wanted}


def left_alone(model: nn.Module, job: Job) -> list[str]:
    """The names of the model's other linear layers: the head, routers, whatever the job does not list."""
    chosen = targets(model, job)
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in chosen]


# -------------------------------------------------------------------------------------------------------------- running


def load_model(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in the directory `path`, in eval mode, from its safetensors; no code of it is run."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    ).eval()


def batches(ids: Tensor, size: int = 8) -> Iterator[Tensor]:
    yield from ids.split(size)


def run(job: Job, ids: Tensor) -> tuple[dict[str, Tensor], dict]:
    """(weights, result) of one job. Raises ValueError or RuntimeError if the tool gave no weights, or none that can be used."""
    if job.peer not in BACKENDS:
        raise ValueError(f"peer {job.peer!r} is not one of {', '.join(BACKENDS)}")
    torch.set_num_threads(job.threads)
    random.seed(job.seed)
    torch.manual_seed(job.seed)
    model = load_model(job.model)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    original = {name: before[name] for name in job.weights if name in before}
    absent = [name for name in job.weights if name not in original]
    if absent:
        raise ValueError(f"{job.model} has no weight {absent[0]!r} ({len(absent)} of {len(job.weights)} are not there)")
    unfused = unfuse(model) if job.unfuse else []
    if not targets(model, job):
        raise RuntimeError(f"none of the {len(job.weights)} weights is a linear layer; set unfuse to true")
    file = f"{__package__}.{BACKENDS[job.peer]}" if __package__ else BACKENDS[job.peer]
    backend = getattr(importlib.import_module(file), job.peer.replace("-", "_"))
    outcome: Outcome = backend(job, model, ids)
    quantized = sum(t.numel() for t in outcome.weights.values())
    fused = fuse_back({name: t.detach().float().cpu() for name, t in outcome.weights.items()}, original, job.weights)
    changed = {name: t.contiguous() for name, t in fused.items() if not torch.equal(t, original[name].float())}
    if changed:
        changed |= folded(model, before, job)
    for name, tensor in changed.items():
        if tensor.shape != before[name].shape or not torch.isfinite(tensor).all():
            raise RuntimeError(
                f"{job.peer} gave {name} as {tuple(tensor.shape)} with {int((~torch.isfinite(tensor)).sum())} NaN or infinite values"
            )
    if not changed:
        raise RuntimeError(f"{job.peer} changed none of the {len(job.weights)} weights; is the method {job.method!r} one for weights?")
    result = {
        "peer": job.peer,
        "method": job.method,
        "version": version(job.peer),
        "seconds": outcome.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bits_per_weight": outcome.stored_bits / quantized,
        "coverage": quantized / sum(t.numel() for t in original.values()),
        "notes": [*outcome.notes, *([f"experts unfused into linear layers in {len(unfused)} layers"] if unfused else [])],
    }
    return changed, result


def folded(model: nn.Module, before: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
    """The norms and biases that a tool changed as well: AWQ and SmoothQuant move scales from the weights into them.

    Raises RuntimeError for a changed matrix that the job does not list, such as a head that should have stayed.
    """
    found = {}
    for name, p in model.state_dict().items():
        if name in before and name not in job.weights and not p.is_meta and not torch.equal(p.float(), before[name].float()):
            if p.ndim >= 2:
                raise RuntimeError(
                    f"{job.peer} changed {name} {tuple(p.shape)}, which is none of the {len(job.weights)} weights it was given"
                )
            found[name] = p.detach().float().cpu().contiguous()
    return found


def version(peer: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(peer)
    except PackageNotFoundError:
        raise ValueError(f"{peer} is not installed in {sys.prefix}") from None


def settings(job: Job, **defaults) -> dict:
    """The tool's settings: `defaults` overridden by the job's. Raises ValueError for one that the backend does not know."""
    unknown = sorted(set(job.settings) - set(defaults))
    if unknown:
        raise ValueError(f"setting {unknown[0]!r} is not one of {', '.join(defaults) or 'none'} of {job.peer} {job.method}")
    return defaults | job.settings


def no_method(job: Job, known: tuple[str, ...]) -> ValueError:
    return ValueError(f"method {job.method!r} of {job.peer} is not one of {', '.join(known)}")


class Clock:
    """`with Clock() as c: ...` then c.seconds."""

    def __enter__(self) -> "Clock":
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self._start


def main(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    job = Job(**{**vars(job), "weights": tuple(job.weights)})
    weights, result = run(job, load_file(folder / "calibration.safetensors")["ids"])
    save_file(weights, folder / "weights.safetensors.tmp")
    (folder / "weights.safetensors.tmp").rename(folder / "weights.safetensors")
    (folder / "result.json.tmp").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (folder / "result.json.tmp").rename(folder / "result.json")  # last: where it is, all is


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from worker import main as start  # by its name, as the backends import it: one set of classes, not two

        start(Path(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"worker: {type(error).__name__}: {error}")  # the last line is what the caller shows
