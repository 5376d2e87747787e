"""How long a bundle takes to its first weight and its first token, and what RAM: each way to start in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.bundle import save_bundle
from edgelab.checkpoint import stored_in
from edgelab.layers import Blank, QEmbedding, QExperts, QLinear, set_kernel
from edgelab.lazy import LazyBundle, _make_unsaved, rechunk
from edgelab.model import architecture, load, swap, weights
from edgelab.recipe import Recipe
from edgelab.report import Report, Row, machine
from edgelab.scheme import QuantScheme


def random_model(config, scheme: str | None, seed: int = 0) -> nn.Module:
    """A model of a transformers `config` with random codes, scales and floats, made without rounding anything. The routers stay floats."""
    import transformers

    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if scheme:
            parsed = QuantScheme.parse(scheme)
            swap(model, {w.name: Blank(w.shape, parsed) for w in weights(model) if w.kind != "router"})
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                if new.dtype == torch.uint8:
                    new.random_(0, 256, generator=draw)
                elif tensor.ndim == 1:
                    new.fill_(1)
                elif store is module._buffers:
                    new.uniform_(0.002, 0.006, generator=draw)  # scales
                else:
                    new.normal_(0, 0.02, generator=draw)
                store[name] = nn.Parameter(new, requires_grad=False) if store is module._parameters else new
    _make_unsaved(model, {})
    return model


def random_bundle(
    out: str | Path,
    *,
    megabytes: float = 400,
    scheme: str | None = "int4-g32",
    layers: int = 16,
    experts: int = 32,
    max_chunk_bytes: int = 256 * 2**20,
    seed: int = 0,
) -> Path:
    """A bundle of about `megabytes` (10**6 bytes) with random weights, for measuring: a Qwen3 mixture, hidden size 1024, 4 experts per
    token. `scheme` None: float32. Its manifest states the recipe of that scheme, though nothing was rounded."""
    import transformers

    from edgelab.compress import audit

    per_weight = QuantScheme.parse(scheme).bits_per_weight((1024, 1024)) / 8 if scheme else 4.0
    expert = megabytes * 1e6 / per_weight / layers / experts
    inner = max(64, round(expert / (3 * 1024) / 64) * 64)
    config = transformers.Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=experts, num_experts_per_tok=4, decoder_sparse_step=1,
        mlp_only_layers=[], max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    recipe = Recipe.uniform(scheme) if scheme else Recipe(())
    model = random_model(config, scheme, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stack larger than a chunk gets one of its own: no news here
        return save_bundle(model, None, out, recipe=recipe, coverage=audit(model), max_chunk_bytes=max_chunk_bytes)


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Start:
    """A way to start a model: `how` it is loaded, with the settings of `LazyBundle` if lazily; `layers`: the first so many blocks only.

    "read": all weights in memory of the process, as without mmap; "load": `load_bundle`; "from_pretrained": plain transformers.
    """

    name: str
    how: str = "lazy"
    layers: int | None = None
    settings: dict = field(default_factory=dict)
    kernel: str = "numba"

    def __post_init__(self) -> None:
        if self.how not in ("read", "load", "from_pretrained", "lazy"):
            raise ValueError(f"how={self.how!r} is not known; use one of read, load, from_pretrained, lazy")
        if self.settings and self.how != "lazy":
            raise ValueError(f"settings={self.settings} are those of LazyBundle; how={self.how!r} takes none")


STARTS = (
    Start("all read", "read"),
    Start("from_pretrained", "from_pretrained"),
    Start("load_bundle", "load"),
    Start("lazy"),
    Start("lazy, sha256", settings={"verify": "chunks"}),
)
FEWER = (  # what a mixture can leave on disk besides
    Start("load_bundle, 2 layers", "load", layers=2),
    Start("lazy, 2 layers", layers=2),
    Start("lazy, one layer at a time", settings={"keep": 1}),
    Start("lazy, 8 experts a layer", settings={"capacity": 8}),
    Start("lazy, both", settings={"capacity": 8, "keep": 1}),
)
METRICS = {
    "first_weight_s": ("time to first weight", "s"),
    "first_token_s": ("time to first token", "s"),
    "peak_mib": ("peak RSS above imports", "MiB"),
    "own_mib": ("own memory at the end", "MiB"),
    "file_mib": ("mapped pages at the end", "MiB"),
}


def startup_table(
    bundle: str | Path,
    *,
    starts: Sequence[Start] = STARTS,
    chunk_bytes: Sequence[int | None] = (None,),
    tokens: int = 1,
    prompt: int = 8,
    repeats: int = 1,
    cold: bool = False,
    threads: int = 1,
    progress: bool = False,
) -> Report:
    """A Report of `METRICS` by start and chunk size, each measured in a fresh process; the median of `repeats`.

    The clock starts when Python, torch, transformers and the kernels are ready. The first weight is there when its bytes are; the
    first token is the greedy one after `prompt` random ids. The peak is the process's VmHWM, reset before the clock starts,
    less what it held then. `tokens`: so many are decoded before the peak is read. `chunk_bytes`: for each (None: as it is) a
    copy in such chunks is made in a temporary folder. `cold`: the system's cache of the bundle's files is emptied before each process.
    """
    bundle, rows = Path(bundle), []
    if len({s.name for s in starts}) < len(starts):
        raise ValueError(f"starts have the names {[s.name for s in starts]}; each needs its own")
    bar = tqdm(total=len(chunk_bytes) * len(starts) * repeats, desc="starting processes", unit="start", disable=not progress)
    with bar, tempfile.TemporaryDirectory(dir=os.environ.get("EDGELAB_TMP")) as tmp:
        for size in chunk_bytes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights larger than a chunk
                folder = bundle if size is None else rechunk(bundle, Path(tmp) / str(size), size)
            number = len({s.file for s in stored_in(folder).values()})
            where = f"{number} chunk{'s' * (number > 1)}" + (f" of {size / 2**20:.4g} MiB" if size else "")
            for start in starts:
                found = []
                for _ in range(repeats):
                    bar.set_postfix_str(f"{where}, {start.name}")
                    if cold:
                        _evict(folder)
                    found.append(
                        _in_a_process({"folder": str(folder), "tokens": tokens, "prompt": prompt, "threads": threads} | asdict(start))
                    )
                    bar.update()
                for key, (metric, unit) in METRICS.items():
                    values = [f[key] for f in found]
                    low, high = (min(values), max(values)) if repeats > 1 else (None, None)
                    note = ("files not in the system's cache" if cold else "") + ("; low and high: least and most" if repeats > 1 else "")
                    rows.append(
                        Row(start.name, metric, median(values), unit, where, low, high, repeats, machine=machine(), note=note.lstrip("; "))
                    )
            if size is not None:
                shutil.rmtree(folder)
    return Report(tuple(rows))


def memory() -> dict[str, int]:
    """Bytes of RAM that this process takes: VmRSS, RssAnon (its own), RssFile (pages of mapped files), VmHWM (the most so far). Linux."""
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}


def _evict(folder: Path) -> None:
    """Have the system forget what it holds of the files in `folder`."""
    for file in folder.iterdir():
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _in_a_process(spec: dict) -> dict:
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(spec["threads"])}
    code = "import json, sys; from edgelab.startup import _measure; print(json.dumps(_measure(json.load(sys.stdin))))"
    run = subprocess.run([sys.executable, "-c", code], input=json.dumps(spec), capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{spec['name']!r} on {spec['folder']} failed in its process: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


@torch.no_grad()
def _measure(spec: dict) -> dict:
    """The numbers of one start, in the process that is measured."""
    import transformers

    import edgelab.hf  # noqa: F401 (from_pretrained knows us)

    folder = Path(spec["folder"])
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(spec["threads"])
    set_kernel(spec["kernel"])
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture(config, str(folder))
    _warm_up({QuantScheme.parse(s) for s in dict(getattr(config, "quantization_config", None) or {}).get("schemes", {}).values()})
    ids = torch.randint(0, config.get_text_config().vocab_size, (1, spec["prompt"]), generator=torch.Generator().manual_seed(0))
    before = _reset_peak()
    start = perf_counter()
    if spec["how"] == "lazy":
        bundle = LazyBundle(folder, **spec["settings"])
        bundle.tensor(next(iter(bundle.tensors))).view(-1)[0].item()
        first_weight = perf_counter() - start
        model = bundle.model
    else:
        if spec["how"] == "from_pretrained":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            model = load(folder)
        if spec["how"] == "read":
            copies: dict[int, Tensor] = {}
            for module in model.modules():
                for store in (module._parameters, module._buffers):
                    for name, tensor in store.items():
                        if tensor is not None:
                            store[name] = copies.setdefault(id(tensor), tensor.detach().clone())
        next(iter(model.state_dict().values())).reshape(-1)[0].item()
        first_weight = perf_counter() - start
    if spec["layers"] is not None:
        name, blocks = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
        model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = blocks[: spec["layers"]]
    past, first_token = None, None
    for _ in range(max(1, spec["tokens"])):
        out = model(ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids[0, 0].item()
        first_token = first_token or perf_counter() - start
    after = memory()
    return {
        "first_weight_s": first_weight,
        "first_token_s": first_token,
        "peak_mib": (after["VmHWM"] - before["VmRSS"]) / 2**20,
        "own_mib": (after["RssAnon"] - before["RssAnon"]) / 2**20,
        "file_mib": (after["RssFile"] - before["RssFile"]) / 2**20,
    }


def _warm_up(schemes: set[QuantScheme]) -> None:
    """Have the kernels of these schemes compiled, or loaded from where they are kept."""
    for scheme in schemes:
        QLinear.empty(64, 512, scheme)(torch.zeros(1, 512))
        QEmbedding.empty(8, 512, scheme)(torch.zeros(1, dtype=torch.int64))
        for tokens in (1, 8):
            choice = torch.zeros(tokens, 1, dtype=torch.int64)
            QExperts.empty(2, 512, 512, scheme, scheme, nn.SiLU())(torch.zeros(tokens, 512), choice, torch.ones(tokens, 1))


def _reset_peak() -> dict[str, int]:
    import gc

    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # proc(5): resets VmHWM
    return memory()
