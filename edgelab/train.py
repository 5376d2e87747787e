"""Learning steps: get the quality back that structure, zeros or codes have cost.

One loop (`_run`) for all: AdamW, a rate that rises over the first twentieth of the steps and falls to zero by a straight line, gradients
clipped to norm 1, forward passes in bfloat16 where the processor multiplies it (`autocast`). Rows are drawn by (seed, step), so
that a resumed run sees what it would have seen. An eighth of the rows, at most 64, is never learnt from: every tenth of the run
judges by it, in float32, and the state that was best comes back at the end (the first one, if learning only harmed). Two models that
are the same but for bfloat16's noise lie 1e-3 nats apart (the embedded MoE; dense 8e-5), about what 8 bits cost: in bfloat16 no
judge could see that.

What learns (`train=`):

    all      every floating-point parameter
    norms    parameters of one dimension
    lora     W + B A for each linear of the decoder blocks, A [r, in], B [out, r] zero at first (arXiv 2106.09685): merged at the end
             into a floating-point weight, kept beside the codes of a quantized one (`QLinear.adapt`); experts have none. An adapter
             that is there already learns on
    scales   after Quantize: the scales and offsets of all codes, norms and routers; the codes stay (arXiv 2407.11062, section 3.3).
             No byte is added. A scale learns as a factor around 1, so that one rate fits all

A quantized model learns through a floating-point twin: its codes are unpacked once into levels, and each step multiplies them
with the scales as they are; a rounding of its inputs (`ActScheme`) is not in the loop. A router's selection bias (DeepSeek-V3) is no
parameter and stays as it is. A model in bfloat16 learns in float32 and is bfloat16 again afterwards: a step of 1e-4 is less than
what a bfloat16 number near 0.1 can move by.
"""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.blocks import walk
from edgelab.fit import round_weight, substituted
from edgelab.layers import QLinear, Quantized
from edgelab.methods.distill import cross_entropy, divergence, draw, hidden_error, sampled_cross_entropy
from edgelab.methods.qat import check, fake_quantize, levels
from edgelab.mixed_experts import QExpertsMixed
from edgelab.model import Weight, by_expert, dequantize, quantized, swap, weights
from edgelab.qtensor import QTensor
from edgelab.recipe import Distill, FineTune, Gptq, Qat, Rtn
from edgelab.runtime_steps import restore, steps_of
from edgelab.scheme import PerGroup, QuantScheme

_HELD, _HELD_MOST = 0.125, 64  # rows that only judge
_JUDGEMENTS = 10
_WARM_UP = 0.05
_SAVE_EVERY_S = 120.0
_START_GRID = 32  # scales tried for the first step sizes
_LORA_ROLES = ("attention", "mlp", "shared", "linear")


def learn(
    model: nn.Module,
    step: Distill | FineTune,
    batches: Sequence[Tensor],
    *,
    teacher: nn.Module | None = None,
    keep_zeros: bool = False,
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """Trains `model` in place as `step` says, and returns a remark: how the judged loss went.

    `batches` int64 [B, T] of token ids without padding. `teacher`: a model of the same vocabulary, for `Distill`. `keep_zeros`:
    floating-point weights that are exactly zero stay so (codes do anyway; an adapter beside them has no zeros). `folder`: checkpoints and
    `curve.jsonl`; a run that was interrupted goes on from there.

    The model is in eval mode afterwards. Raises ValueError for a missing teacher, one of another vocabulary or the model itself, too few
    rows, an adapter of another rank, a checkpoint of another run; FloatingPointError when the loss is no number.
    """
    rows = _Rows(batches, step.seed)
    distilling = isinstance(step, Distill)
    if distilling and teacher is None:
        raise ValueError("teacher=None: Distill learns from one; pass the model that this one came from")
    if distilling:
        _check_teacher(model, teacher)
    stamp = {"step": json.loads(json.dumps(step.to_dict())), "keep_zeros": keep_zeros} | _stamp(model, teacher if distilling else None)
    with _modes(model, *([teacher] if distilling else [])), _wide(model):
        trainee = _trainee(model, step, keep_zeros)
        drawn = _Drawn(teacher, rows, step, stamp["teacher"], folder, progress) if distilling and step.samples else None
        bridge = _bridge(trainee.model, teacher) if distilling and step.hidden else None
        matrices = [p for p in trainee.parameters if p.ndim >= 2] if not distilling and step.l1 else []

        def loss_of(ids: Tensor, at: _Place) -> Tensor:
            wanted = distilling and step.alpha > 0
            ids = ids.to(_device(trainee.model))
            with trainee.computing():
                got = _forward(trainee.model, ids, hidden=bool(distilling and step.hidden), exact=at.judging)
            loss = torch.zeros((), device=ids.device)
            if not distilling or step.alpha < 1:
                loss = loss + (1 - step.alpha if distilling else 1.0) * cross_entropy(got.logits, ids)
            if wanted and drawn is not None:
                loss = loss + step.alpha * sampled_cross_entropy(got.logits, drawn.of(at).to(ids.device))
            if (wanted and drawn is None) or (distilling and step.hidden):
                with torch.no_grad():
                    want = _forward(teacher, ids, hidden=bool(step.hidden), exact=at.judging)
                if wanted and drawn is None:
                    settings = {"loss": step.loss, "temperature": step.temperature, "beta": step.beta}
                    loss = loss + step.alpha * divergence(got.logits, want.logits, **settings)
                if step.hidden:
                    loss = loss + step.hidden * hidden_error(list(got.hidden_states[1:]), list(want.hidden_states[1:]), bridge)
            if matrices:
                loss = loss + step.l1 * sum(p.abs().sum() for p in matrices) / sum(p.numel() for p in matrices)
            return loss

        groups = trainee.groups + ([{"params": list(bridge.parameters()), "share": 1.0}] if bridge is not None else [])
        name = "distill" if distilling else "fine-tune"
        settings = _Settings(name, step.steps, step.lr, step.batch, step.patience, step.seed)
        told = _run(groups, loss_of, rows, settings, stamp, trainee.mask, folder, progress)
        trainee.finish()
    return [f"{name} ({step.train}): {told}"]


def quantization_aware(
    model: nn.Module,
    schemes: Mapping[str, QuantScheme],
    method: Qat,
    batches: Sequence[Tensor],
    *,
    teacher: nn.Module | None = None,
    calibration: Sequence[Tensor] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """Trains `model` in place while the weights named in `schemes` compute as rounded, then swaps in their codes. Returns a remark.

    The codes stand for exactly the values that the forward pass computed with. `calibration` is for `start="gptq"`. Raises
    ValueError for a scheme without a step size of its own, and as `learn`.
    """
    for name, scheme in schemes.items():
        try:
            check(scheme)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if method.alpha > 0:
        if teacher is None:
            raise ValueError("teacher=None: Qat(alpha > 0) learns from one; pass the model that this one came from, or alpha=0")
        _check_teacher(model, teacher)
    teacher = teacher if method.alpha > 0 else None
    rows = _Rows(batches, method.seed)
    stamp = {"step": asdict(method), "schemes": {n: str(s) for n, s in schemes.items()}} | _stamp(model, teacher)
    with _modes(model, *([] if teacher is None else [teacher])), _wide(model):
        listed = {w.name: w for w in by_expert(weights(model), schemes) if w.name in schemes}
        start = _first_scales(model, listed, schemes, method, calibration, progress)
        with torch.no_grad():
            factors = {name: nn.Parameter(torch.ones_like(s)) for name, s in start.items()}
        chosen = _floating(model)
        own = {name: _parameter(model, w) for name, w in listed.items()}

        def scale_of(name: str) -> Tensor:
            if method.step_size == "lsq":
                return start[name] * factors[name]
            with torch.no_grad():
                return _scales(_own(own[name], listed[name]), schemes[name], 0)

        def values() -> dict[str, Tensor]:
            return {name: fake_quantize(_own(own[name], w), scale_of(name), schemes[name]) for name, w in listed.items()}

        def loss_of(ids: Tensor, at: _Place) -> Tensor:
            ids = ids.to(_device(model))
            with substituted(model, listed, values()):
                got = _forward(model, ids, exact=at.judging).logits
            loss = torch.zeros((), device=ids.device)
            if teacher is not None:
                with torch.no_grad():
                    want = _forward(teacher, ids, exact=at.judging).logits
                loss = loss + method.alpha * divergence(got, want, temperature=method.temperature)
            if method.alpha < 1:
                loss = loss + (1 - method.alpha) * cross_entropy(got, ids)
            return loss

        groups = [{"params": chosen, "share": 1.0}]
        if method.step_size == "lsq" and method.scale_lr:
            groups.append({"params": list(factors.values()), "share": method.scale_lr})
        for p in (*chosen, *factors.values()):
            p.requires_grad_(True)
        settings = _Settings("qat", method.steps, method.lr, method.batch, 0, method.seed)
        stamp |= {"scales": _digest(list(start.values()))}  # of calibration data, with start="gptq"
        told = _run(groups, loss_of, rows, settings, stamp, None, folder, progress)
        codes = {}
        with torch.no_grad():
            for name, w in listed.items():
                scheme, weight, scale = schemes[name], _own(own[name], w), scale_of(name)
                q = (levels(weight, scale, scheme) + scheme.zero_point).to(torch.uint8)
                codes[name] = QTensor.from_codes(q.cpu().numpy(), scale.half().cpu().numpy(), scheme)
    swap(model, codes)
    return [f"qat ({method.step_size}, {len(listed)} weights): {told}"]


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class _Settings:
    name: str
    steps: int
    lr: float
    batch: int
    patience: int
    seed: int


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up over the first twentieth of the steps, then down to zero, both by a straight line.

    >>> [round(learning_rate(s, 100, 1.0), 2) for s in (0, 4, 52, 99)]
    [0.2, 1.0, 0.5, 0.01]
    """
    warm = max(1, round(_WARM_UP * steps))
    return peak * (step + 1) / warm if step < warm else peak * (steps - step) / (steps - warm + 1)


def _run(
    groups: list[dict],
    loss_of: Callable[[Tensor, "_Place"], Tensor],
    rows: "_Rows",
    s: _Settings,
    stamp: dict,
    mask: Callable[[], None] | None,
    folder: str | Path | None,
    progress: bool,
) -> str:
    """Trains the parameters of `groups` ({"params", "share" of the rate}), leaves the best state in them, and says how it went."""
    parameters = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW([{"params": g["params"], "lr": s.lr} for g in groups], betas=(0.9, 0.95), weight_decay=0.0)
    every = max(1, s.steps // _JUDGEMENTS)
    kept = _Checkpoint(folder, parameters, optimizer, stamp | {"data": rows.digest})

    def judge() -> float:
        total = 0.0
        with torch.no_grad():
            for ids, at in rows.held(s.batch):
                total += float(loss_of(ids, at)) * len(ids)
        return total / rows.judging

    state = kept.read()
    first = state["first"] if state else judge()
    best, best_at, done, without = (state[k] for k in ("best", "best_at", "step", "without")) if state else (first, 0, 0, 0)
    best_values = state["values"] if state else [p.detach().clone() for p in parameters]
    saved, running, told = time.monotonic(), [], {}
    left = range(0) if 0 < s.patience <= without else range(done, s.steps)  # a run that lost patience is over
    with tqdm(left, initial=done, total=s.steps, desc=s.name, unit="step", disable=not progress, mininterval=1) as bar:
        for step in bar:
            rate = learning_rate(step, s.steps, s.lr)
            for group, mine in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * mine["share"]
            ids, at = rows.draw(step, s.batch)
            loss = loss_of(ids, at)
            loss.backward()
            last = float(loss.detach())
            running.append(last)
            if not math.isfinite(last):
                raise FloatingPointError(
                    f"{s.name}: the loss is {last} at step {step + 1}: lower lr={s.lr:g}, or start from a better state"
                )
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if mask is not None:
                mask()
            if (step + 1) % every == 0 or step + 1 == s.steps:
                judged = judge()
                kept.note({"step": step + 1, "loss": round(float(np.mean(running)), 5), "judged": round(judged, 5), "lr": rate})
                without += 1
                if judged < best:
                    best, best_at, without, best_values = judged, step + 1, 0, [p.detach().clone() for p in parameters]
                running = []
                told = {"judged": f"{judged:.4f}", "best": f"{best:.4f}"}
            bar.set_postfix({"loss": f"{last:.4f}"} | told, refresh=False)
            stop = 0 < s.patience <= without
            if stop or step + 1 == s.steps or time.monotonic() - saved > _SAVE_EVERY_S:
                kept.write(step + 1, first, best, best_at, without, best_values)
                saved = time.monotonic()
            if stop:
                break
    with torch.no_grad():
        for p, value in zip(parameters, best_values, strict=True):
            p.copy_(value)
    return f"held-out loss {first:.4f} -> {best:.4f} nats per token, best after {best_at} of {s.steps} steps of {s.batch} rows"


class _Checkpoint:
    """The state of a run in `folder`: written whole or not at all, read back only by the same run."""

    def __init__(self, folder, parameters: list[nn.Parameter], optimizer, stamp: dict) -> None:
        self._folder, self._parameters, self._optimizer = None if folder is None else Path(folder), parameters, optimizer
        shapes = [tuple(p.shape) for p in parameters]
        first = _digest(parameters)
        self._stamp = json.loads(json.dumps(stamp | {"shapes": hashlib.sha256(repr(shapes).encode()).hexdigest()[:12], "start": first}))
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def note(self, row: dict) -> None:
        if self._folder is not None:
            with (self._folder / "curve.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def write(self, step: int, first: float, best: float, best_at: int, without: int, values: list[Tensor]) -> None:
        if self._folder is None:
            return
        tensors = {f"now.{i}": p.detach() for i, p in enumerate(self._parameters)} | {f"best.{i}": v for i, v in enumerate(values)}
        for i, entry in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in entry.items()}
        facts = {"step": step, "first": first, "best": best, "best_at": best_at, "without": without, "stamp": self._stamp}
        whole = {k: v.cpu().clone().contiguous() for k, v in tensors.items()}
        temporary = self._folder / f".checkpoint.{os.getpid()}"
        save_file(whole, temporary, {"facts": json.dumps(facts)})
        os.replace(temporary, self._folder / "checkpoint.safetensors")

    def read(self) -> dict | None:
        """What `write` left, after it was put back into parameters and optimizer; None where nothing was written."""
        path = None if self._folder is None else self._folder / "checkpoint.safetensors"
        if path is None or not path.is_file():
            if path is not None:
                (self._folder / "curve.jsonl").unlink(missing_ok=True)  # of a run that left no checkpoint
            return None
        with safe_open(path, "pt") as f:
            facts, tensors = json.loads(f.metadata()["facts"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        differs = next((k for k, v in self._stamp.items() if facts["stamp"].get(k, v) != v), None)
        if differs:
            raise ValueError(f"{path} is of a run with another {differs}; give another folder, or delete it to start anew")
        with torch.no_grad():
            for i, p in enumerate(self._parameters):
                p.copy_(tensors[f"now.{i}"])
        state = self._optimizer.state_dict()
        for key, value in tensors.items():
            kind, i, *name = key.split(".", 2)
            if kind == "optimizer":
                state["state"].setdefault(int(i), {})[name[0]] = value
        self._optimizer.load_state_dict(state)
        curve = self._folder / "curve.jsonl"
        if curve.is_file():  # steps after the checkpoint will be done, and noted, again
            lines = [line for line in curve.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= facts["step"]]
            curve.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return facts | {"values": [tensors[f"best.{i}"] for i in range(len(self._parameters))]}


def _stamp(model: nn.Module, teacher: nn.Module | None) -> dict[str, str | None]:
    """What a checkpoint must know of the models: adapters and factors begin alike whatever they are added to."""
    digests = (None if m is None else _digest([t for t in m.state_dict().values() if isinstance(t, Tensor)]) for m in (model, teacher))
    return dict(zip(("model", "teacher"), digests, strict=True))


def _digest(tensors: Sequence[Tensor]) -> str:
    """Twelve hex digits of values; of a large tensor, 2**14 spread over it."""
    h = hashlib.sha256()
    for t in tensors:
        flat = t.detach().reshape(-1)
        h.update(flat[:: max(1, flat.numel() >> 14)].float().cpu().numpy().tobytes())
    return h.hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------- rows


class _Place(NamedTuple):
    """Where rows come from: those of `length` tokens, numbers `at`, of the ones that only judge or of the others."""

    length: int
    at: np.ndarray
    judging: bool


class _Rows:
    """Rows of token ids by length; those that only judge apart."""

    def __init__(self, batches: Sequence[Tensor], seed: int) -> None:
        by_length: dict[int, list[Tensor]] = {}
        for i, ids in enumerate(batches):
            if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[1] < 2:
                what = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"training batch {i} is {what}; it must be int64 [B, T] token ids with T of at least 2")
            by_length.setdefault(ids.shape[1], []).append(ids)
        everything = {length: torch.cat(parts) for length, parts in by_length.items()}
        total = sum(len(rows) for rows in everything.values())
        if total < 2:
            raise ValueError(f"there are {total} rows of training data: one judges, so at least two are needed")
        self.digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for _, rows in sorted(everything.items()))).hexdigest()[:12]
        rng = np.random.default_rng(seed)
        self.learning, self.held_back = {}, {}
        self.judging = max(1, min(_HELD_MOST, int(_HELD * total)))
        judges = set(rng.permutation(total)[: self.judging].tolist())
        at = 0
        for length, rows in everything.items():
            mine = torch.tensor([at + i in judges for i in range(len(rows))])
            at += len(rows)
            if mine.any():
                self.held_back[length] = rows[mine]
            if not mine.all():
                self.learning[length] = rows[~mine]
        self._seed = seed
        self._lengths = sorted(self.learning)
        counts = np.array([len(self.learning[n]) for n in self._lengths], float)
        self._shares = counts / counts.sum()

    def draw(self, step: int, batch: int) -> tuple[Tensor, _Place]:
        """(ids [at most batch, T], where they are) of this step: rows of one length, each length as often as it has rows."""
        rng = np.random.default_rng((self._seed, step))
        length = self._lengths[rng.choice(len(self._lengths), p=self._shares)]
        rows = self.learning[length]
        at = rng.choice(len(rows), min(batch, len(rows)), replace=False)
        return rows[at], _Place(length, at, judging=False)

    def held(self, batch: int) -> Iterator[tuple[Tensor, _Place]]:
        for length, rows in self.held_back.items():
            for at in np.split(np.arange(len(rows)), range(batch, len(rows), batch)):
                yield rows[at], _Place(length, at, judging=True)


class _Drawn:
    """Tokens drawn once from the teacher at every position of every row; kept in `folder`, too, where there is one."""

    def __init__(self, teacher: nn.Module, rows: _Rows, step: Distill, digest: str, folder: str | Path | None, progress: bool) -> None:
        path = None if folder is None else Path(folder) / "drawn.safetensors"
        stamp = {"samples": str(step.samples), "seed": str(step.seed), "data": rows.digest, "teacher": digest}
        if path is not None and path.is_file():
            with safe_open(path, "pt") as f:
                differs = next((k for k, v in stamp.items() if f.metadata().get(k) != v), None)
                if differs:
                    raise ValueError(f"{path} was drawn with another {differs}; give another folder, or delete it to draw anew")
                self._kept = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            return
        parts = {self._key(n, judging): r for judging, found in ((False, rows.learning), (True, rows.held_back)) for n, r in found.items()}
        generator, self._kept = torch.Generator().manual_seed(step.seed), {}
        desc = f"{step.samples} tokens of the teacher per position"
        with tqdm(total=sum(map(len, parts.values())), desc=desc, unit="row", disable=not progress) as bar:
            for key, every in parts.items():
                drawn = []
                for ids in every.split(16):
                    with torch.no_grad():
                        logits = _forward(teacher, ids.to(_device(teacher))).logits.cpu()
                    small = torch.int16 if logits.shape[-1] <= 2**15 else torch.int32
                    drawn.append(draw(logits, step.samples, generator).to(small))
                    bar.update(len(ids))
                self._kept[key] = torch.cat(drawn)  # [rows, T, samples]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".drawn.{os.getpid()}")
            save_file(self._kept, temporary, stamp)
            os.replace(temporary, path)

    def of(self, place: _Place) -> Tensor:
        return self._kept[self._key(place.length, place.judging)][place.at]

    @staticmethod
    def _key(length: int, judging: bool) -> str:
        return f"{'judging' if judging else 'learning'}.{length}"


# -------------------------------------------------------------------------------------------------------- what learns


class _Trainee:
    """`model` computes (inside `computing()`), `groups` learn, `mask()` keeps zeros, `finish()` puts what was learnt where it belongs."""

    def __init__(self, model: nn.Module, groups: list[dict]) -> None:
        self.model, self.groups = model, [g for g in groups if g["params"]]
        self.parameters = [p for g in self.groups for p in g["params"]]
        if not self.parameters:
            raise ValueError(f"nothing of this {type(model).__name__} learns: it has no parameter of the kind that train= names")
        self.mask: Callable[[], None] | None = None
        self.values: Callable[[], tuple[Mapping[str, Weight], dict[str, Tensor]]] | None = None
        self.finish: Callable[[], None] = lambda: None
        for p in self.parameters:
            p.requires_grad_(True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        if self.values is None:
            yield
            return
        with substituted(self.model, *self.values()):
            yield


def _trainee(model: nn.Module, step: Distill | FineTune, keep_zeros: bool) -> _Trainee:
    packed = quantized(model)
    match step.train:
        case "all":
            trainee = _Trainee(model, [{"params": _floating(model), "share": 1.0}])
        case "norms" if packed:
            return _norms_trainee(model)
        case "norms":
            trainee = _Trainee(model, [{"params": [p for p in _floating(model) if p.ndim == 1], "share": 1.0}])
        case "scales":
            return _scales_trainee(model, {name: q for name, (_, q) in packed.items()})
        case _:
            return _lora_trainee(model, step.rank, keep_zeros)
    if packed:
        raise ValueError(f"train={step.train!r} can't reach the gradient of packed weights; use 'scales', 'lora' or 'norms' after Quantize")
    if keep_zeros:
        trainee.mask = _zeros_kept(model)
    return trainee


def _zeros_kept(model: nn.Module) -> Callable[[], None]:
    """A function that sets the weights to zero again that are zero now."""
    zeros = [(p, p == 0) for p in {id(q): q for w in weights(model) for q in [model.get_parameter(w.parameter_name)]}.values()]
    zeros = [(p, z) for p, z in zeros if z.any()]

    def mask() -> None:
        with torch.no_grad():
            for p, z in zeros:
                p.masked_fill_(z, 0.0)

    return mask


def _scales_trainee(model: nn.Module, codes: dict[str, QTensor]) -> _Trainee:
    if not codes:
        raise ValueError("train='scales': this model holds no codes; put the step behind a Quantize step")
    for name, q in codes.items():
        if q.scheme.codebook == "mxfp":
            raise ValueError(f"{name}: the scales of {q.scheme} are powers of two and can't learn; use train='lora' or 'norms'")
    twin, adapters = _twin(model)
    device = _device(twin)
    listed = {w.name: w for w in by_expert(weights(twin), codes)}
    steps = {name: torch.from_numpy(_unit(q)).to(device) for name, q in codes.items()}  # levels, float32
    scales = {name: torch.from_numpy(q.scale_values().copy()).to(device) for name, q in codes.items()}
    offsets = {name: torch.from_numpy(q.offsets.astype(np.float32)).to(device) for name, q in codes.items() if q.offsets is not None}
    added = {name: b @ a for name, (a, b) in adapters.items()}
    factors = {name: nn.Parameter(torch.ones_like(s)) for name, s in scales.items()}
    moves = {name: nn.Parameter(torch.zeros_like(o)) for name, o in offsets.items()}  # in units of the scale

    def now(name: str) -> tuple[Tensor, Tensor | None]:
        offset = offsets[name] + moves[name] * scales[name] if name in offsets else None
        return scales[name] * factors[name], offset

    def values() -> tuple[Mapping[str, Weight], dict[str, Tensor]]:
        found = {}
        for name, q in codes.items():
            scale, offset = now(name)
            if isinstance(q.scheme.granularity, PerGroup):
                value = steps[name].unflatten(-1, (-1, q.scheme.granularity.size)) * scale[..., None]
                found[name] = (value if offset is None else value + offset[..., None]).flatten(-2)
            else:
                found[name] = steps[name] * scale if offset is None else steps[name] * scale + offset
            if name in added:
                found[name] = found[name] + added[name]
        return listed, found

    matrices = {w.parameter_name for w in weights(twin) if w.role != "router"}  # those without codes stay as they are
    mirrored = [(p, t) for name, p, t in _mirrored(model, twin) if name not in matrices]
    groups = [{"params": [*factors.values(), *moves.values()], "share": 1.0}]
    # norms lie around 1 and learn as the factors do; a router's weights are smaller, and so are their steps
    groups += [{"params": [t], "share": float(t.detach().abs().mean().clamp(min=1e-6))} for _, t in mirrored]
    trainee = _Trainee(twin, groups)
    trainee.values = values

    def finish() -> None:
        with torch.no_grad():
            for p, t in mirrored:
                p.copy_(t)
            for name, (scale_buffer, offset_buffer) in _scale_buffers(model).items():
                scale, offset = now(name)
                scale_buffer.copy_(scale.half())
                if offset is not None:
                    offset_buffer.copy_(offset.half())

    trainee.finish = finish
    return trainee


def _norms_trainee(model: nn.Module) -> _Trainee:
    twin = copy.deepcopy(model)
    dequantize(twin)  # adapters are in the weights then
    mirrored = [(p, t) for _, p, t in _mirrored(model, twin) if p.ndim == 1]
    trainee = _Trainee(twin, [{"params": [t for _, t in mirrored], "share": 1.0}])

    def finish() -> None:
        with torch.no_grad():
            for p, t in mirrored:
                p.copy_(t)

    trainee.finish = finish
    return trainee


def _twin(model: nn.Module) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """A floating-point copy of a quantized model without its adapters, and these: {linear: (a, b)}."""
    twin, adapters = copy.deepcopy(model), {}
    for name, module in twin.named_modules():
        if isinstance(module, QLinear) and module.lora_a is not None:
            adapters[name] = module.lora_a.detach().float(), module.lora_b.detach().float()
            module.lora_a = module.lora_b = None
    dequantize(twin)
    restore(twin, steps_of(twin))  # the modules that came back compute by the model's run-time steps, too
    return twin, adapters


def _mirrored(model: nn.Module, twin: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    """(name, parameter of `model`, that of `twin`) of the floating-point parameters that both have."""
    theirs = dict(twin.named_parameters())
    return [(name, p, theirs[name]) for name, p in model.named_parameters() if p.is_floating_point() and name in theirs]


def _unit(q: QTensor) -> np.ndarray:
    """The levels of `q`: its values at scale 1 and offset 0."""
    zeros = None if q.offsets is None else np.zeros_like(q.offsets)
    return QTensor(q.packed, np.ones_like(q.scales), q.shape, q.scheme, zeros).dequantize()


def _scale_buffers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """{weight name, as `quantized` has it: its buffers of scales and offsets, views of one expert's where each has its own}."""
    names = iter(quantized(model))
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for module in model.modules():
        if isinstance(module, QExpertsMixed):
            for parameter in ("gate_up_proj", "down_proj"):
                one = {e: (part, i) for part, group in zip(module.parts, module.groups, strict=True) for i, e in enumerate(group)}
                for e in range(module.num_experts):
                    part, i = one[e]
                    s = part._stored[parameter]
                    found[next(names)] = (part._buffers[s.scales][i], None if s.offsets is None else part._buffers[s.offsets][i])
        elif isinstance(module, Quantized) and not getattr(module, "tied_to", None) and not getattr(module, "is_part", False):
            for s in module._stored.values():
                found[next(names)] = (module._buffers[s.scales], module._buffer(s.offsets))
    return found


def _lora_trainee(model: nn.Module, rank: int, keep_zeros: bool) -> _Trainee:
    twin, before = _twin(model) if any(isinstance(m, Quantized) for m in model.modules()) else (model, {})
    other = next((name for name, (a, _) in before.items() if len(a) != rank), None)
    if other:
        has = len(before[other][0])
        raise ValueError(f"rank={rank}: {other} has an adapter of rank {has} already, which would learn on; give rank={has}")
    device = _device(twin)
    listed = {w.name: w for w in weights(twin) if w.kind == "linear" and w.role in _LORA_ROLES and not w.tied_to}
    generator = torch.Generator().manual_seed(0)
    base, a, b, zeros = {}, {}, {}, {}
    for name, w in listed.items():
        out, inputs = w.shape
        base[name] = w.tensor.float()
        new = (torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)).to(device), torch.zeros(out, rank, device=device)
        a[name], b[name] = (nn.Parameter(x) for x in before.get(name, new))
        beside = isinstance(model.get_submodule(w.module_name), QLinear)  # of codes: these keep their zeros, the adapter has none
        zeros[name] = w.tensor == 0 if keep_zeros and not beside else None

    def merged(name: str) -> Tensor:
        value = base[name] + b[name] @ a[name]
        return value if zeros[name] is None else value.masked_fill(zeros[name], 0.0)

    trainee = _Trainee(twin, [{"params": [*a.values(), *b.values()], "share": 1.0}])
    trainee.values = lambda: (listed, {name: merged(name) for name in listed})

    def finish() -> None:
        with torch.no_grad():
            for name, w in listed.items():
                module = model.get_submodule(w.module_name)
                if isinstance(module, QLinear):
                    module.adapt(*(x.detach().to(torch.bfloat16) for x in (a[name], b[name])))
                else:
                    w.tensor.copy_(merged(name))

    trainee.finish = finish
    return trainee


def _floating(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.is_floating_point()]


# -------------------------------------------------------------------------------------------------------------- QAT


def _parameter(model: nn.Module, w: Weight) -> nn.Parameter:
    return model.get_parameter(w.parameter_name)


def _own(parameter: nn.Parameter, w: Weight) -> Tensor:
    """The weight `w` as a part of its parameter that gradients reach: [out, in], or [experts, out, in]."""
    _, _, expert = w.name.partition("#")
    value = parameter[int(expert)] if expert else parameter
    return value if tuple(value.shape) == tuple(w.shape) and value.stride() == w.tensor.stride() else value.mT


def _scales(weight: Tensor, scheme: QuantScheme, grid: int) -> Tensor:
    return torch.from_numpy(round_weight(_named(weight), scheme, Rtn(mse_grid=grid)).scale_values().copy()).to(weight.device)


def _named(weight: Tensor) -> Weight:
    return Weight("weight", "", "weight", "linear", "linear", tuple(weight.shape), weight.detach())


def _first_scales(model, listed: Mapping[str, Weight], schemes, method: Qat, calibration, progress: bool) -> dict[str, Tensor]:
    """{weight: float32 scales that learning starts from}."""
    if method.start == "rtn":
        return {name: _scales(w.tensor, schemes[name], _START_GRID) for name, w in listed.items()}
    if calibration is None:
        raise ValueError("Qat(start='gptq') needs calibration data: pass calibration=data.calibration_batches(...)")
    found = {}
    for item in walk(model, calibration, want=("xx",), sequential=False, progress=progress):
        for name, w in listed.items():
            stack, _, expert = name.partition("#")
            stats = item.stats.get(stack)
            if stats is not None:
                q = round_weight(w, schemes[name], Gptq(), stats.expert(int(expert)) if expert else stats)
                found[name] = torch.from_numpy(q.scale_values().copy()).to(w.tensor.device)
    return {name: found[name] if name in found else _scales(w.tensor, schemes[name], _START_GRID) for name, w in listed.items()}


# ------------------------------------------------------------------------------------------------------------ forward


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def autocast(device: str | torch.device, enabled: bool = True) -> torch.autocast:
    """torch.autocast to bfloat16 where that is fast. oneDNN multiplies bfloat16 with AVX-512 and better; on an older processor torch
    falls back to plain loops, about seven times slower than float32 (LOG.md, 2026-11-26), so there everything stays as it is."""
    kind = torch.device(device).type
    if kind == "cpu":
        enabled = enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def _forward(model: nn.Module, ids: Tensor, hidden: bool = False, exact: bool = False):
    """The model's output; in bfloat16 where that is fast, `exact`: in the model's own dtype."""
    with autocast(ids.device, enabled=not exact):
        extra = {"output_hidden_states": True} if hidden else {}
        return model(input_ids=ids.to(_device(model)), use_cache=False, **extra)


@contextmanager
def _modes(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, dropout is off, and fused experts run as grouped products where they fit.

    Afterwards `model` is in eval mode still; all else is as before.
    """
    models = (model, *others)
    before = [(m, [(x, x.training) for x in m.modules()], [(p, p.requires_grad) for p in m.parameters()]) for m in models]
    kinds = [(m, getattr(m.config, "_experts_implementation", None)) for m in models if _may_group(m)]
    try:
        for m in models:
            m.eval().requires_grad_(False)
        for m, _ in kinds:
            m.set_experts_implementation("grouped_mm")  # 3x the speed of the default loop on CPU (LOG.md)
        yield
    finally:
        for m, kind in kinds:
            m.set_experts_implementation(kind or "eager")
        for m, modes, grads in before:
            for x, mode in modes if m is not model else ():
                x.training = mode
            for p, grad in grads:
                p.requires_grad_(grad)


@contextmanager
def _wide(model: nn.Module) -> Iterator[None]:
    """Inside, all floating-point parameters are float32. Afterwards they have their dtype, and those whose values were
    bfloat16 numbers hold such again: a checkpoint must not double for having learnt."""
    dtypes = [(p, p.dtype) for p in _floating(model)]
    narrow = [p for p, _ in dtypes if torch.equal(p.detach().to(torch.bfloat16).to(p.dtype), p.detach())]
    try:
        for p, _ in dtypes:
            p.data = p.data.float()
        yield
        with torch.no_grad():
            for p in narrow:
                p.copy_(p.to(torch.bfloat16))
    finally:
        for p, dtype in dtypes:
            p.data = p.data.to(dtype)


def _may_group(model: nn.Module) -> bool:
    """Whether grouped products take its experts: in floating point, with rows of a multiple of 16 bytes."""
    stacks = [w for w in weights(model) if w.kind == "experts"]
    return bool(stacks) and hasattr(model, "set_experts_implementation") and all(n % 8 == 0 for w in stacks for n in w.shape[1:])


def _bridge(student: nn.Module, teacher: nn.Module) -> nn.Module | None:
    """A matrix from the student's width to the teacher's, drawn from a fixed seed; None where they are the same."""
    mine, theirs = student.config.hidden_size, teacher.config.hidden_size
    if mine == theirs:
        return None
    bridge = nn.Linear(mine, theirs, bias=False)
    with torch.no_grad():
        bridge.weight.copy_(torch.randn(theirs, mine, generator=torch.Generator().manual_seed(0)) / math.sqrt(mine))
    return bridge


def _check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    if teacher is student:
        raise ValueError("teacher= is the model that learns: it would change with it; pass the one it came from, or a copy")
    if not hasattr(teacher, "config"):
        raise ValueError(
            f"teacher={type(teacher).__name__} is no causal language model of transformers; pass the model that this one came from"
        )
    sizes = [getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(f"the student has {sizes[0]} tokens and the teacher {sizes[1]}: a student must read its teacher's tokens")
