"""AutoRound: rounding that is learnt by signed gradient descent, for any loss.

With w a weight, s its group's scale and h the code of zero, a rounded weight is

    w^ = s * (clip(round(w / s + V), -h, h - 1)),    V in [-1/2, 1/2],    s = m * s_0,    m in [1/2, 3/2]

V decides which way each weight is rounded, m how wide the range is. Rounding passes the gradient straight through. With a
table of levels (NF4) the same is done on the number of the level: w / s lies between two of them, at a broken number p in
proportion; round(p + V) is rounded to, and the gradient is that of the broken line through the levels.

"sign": both move by the sign of their gradient, V by `lr` and m by a tenth of it, falling to 0 in a line: in 200 steps of
1/200 each weight can go half a step of its grid and back (Cheng et al. 2023, arXiv 2309.05516, section 3 and algorithm 1).
"adam": by Adam's step of the same size, so that a weight whose gradient only is noise stays where it is.

The loss is the caller's. The paper's is the squared error of a decoder block's output. The other one here is what
quantization is judged by: the KL divergence of the model's next-token distribution to the original's, with all weights
of the model learning together (`fit.py` builds both). It costs a pass of the whole model forwards and back per
step, so it is for models that train on the machine at hand; blocks are for the others.

A start that another method found (GPTQ) is kept: where its code q_0 is not the nearest one, w is first moved into q_0's
interval, a quarter of a step from q_0 on its own side, and learning goes on from exactly those codes. (At the very
edge of the interval the first steps of noise would undo what GPTQ had put right: `LOG.md`.)

Trade-offs. Rounding that passes gradients straight through never settles: weights at the edge of two codes go to and fro,
and many move at once. On one layer's squared error GPTQ with its refinement finds better codes (3 bits, 64 correlated
inputs: 1.7, where learning from round-to-nearest went from 3.5 to 2.8, `LOG.md`); learning earns its time where the loss is
no longer that of one layer. And what is learnt fits the calibration text. So a judge, the loss on text that learning does
not see, decides which of some ten states on the way is kept, the start among them: the result is never worse than the
start by the judge.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from edgelab.qtensor import QTensor
from edgelab.scheme import PerGroup

_LEAST_MOVE, _MOST_MOVE = 0.5, 1.5  # of a scale, from where it started
_INSIDE = 0.25  # steps from its code that a weight starts at when its code is not the nearest
_JUDGED = 10  # states that are judged on the way
_WARM = 20  # steps over which Adam's rate rises: its first averages are those of few gradients
OPTIMIZERS = ("sign", "adam")


class Learnt(nn.Module):
    """One weight [..., out, in] that learns its rounding: calling it gives w^, differentiable with respect to V and m.

    >>> from edgelab import QuantScheme
    >>> scheme = QuantScheme.parse("int4-row")
    >>> q = QTensor.from_codes(np.array([[0, 8, 15]], np.uint8), np.array([[0.5]], np.float16), scheme)
    >>> learnt = Learnt(torch.tensor([[-4.0, 0.2, 3.5]]), q)
    >>> learnt().tolist()
    [[-4.0, 0.0, 3.5]]
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        super().__init__()
        scheme, device = start.scheme, weight.device
        if scheme.scale_dtype != np.float16:
            raise ValueError(
                f"{scheme} has scales that are powers of two, which can't be learnt in small steps: use the method 'rtn' or 'gptq'"
            )
        self.scheme, self.shape = scheme, tuple(weight.shape)
        order = np.argsort(scheme.table, kind="stable")  # the codes, by what they stand for
        self.register_buffer("levels", torch.tensor(scheme.table[order], device=device))
        self.register_buffer("code_of", torch.tensor(order.astype(np.uint8), device=device))
        rank_of = torch.tensor(np.argsort(order, kind="stable").astype(np.float32), device=device)
        scale = self._groups(torch.from_numpy(start.scale_values()).to(device).expand(*self.shape[:-1], start.scales.shape[-1]), 1)
        offset = torch.zeros_like(scale)
        if start.offsets is not None:
            stored = torch.from_numpy(start.offsets.astype(np.float32)).to(device)
            offset = self._groups(stored.expand(*self.shape[:-1], start.offsets.shape[-1]), 1)
        rank = rank_of[self._groups(torch.from_numpy(start.codes()).to(device).long(), 0)]
        safe = torch.where(scale == 0, 1.0, scale)
        away = self._rank((self._groups(weight.detach().float(), 0) - offset) / safe) - rank
        place = rank + torch.where(away.abs() > 0.5, away.sign() * _INSIDE, away.clamp(-0.49, 0.49))
        self.register_buffer("wide", self._level(place) * scale)  # the weight without its offset, moved into the intervals of the codes
        self.register_buffer("scale", scale)  # [..., out, groups, 1]
        self.register_buffer("offset", offset)
        self.shift = nn.Parameter(torch.zeros_like(place))  # V
        self.factor = nn.Parameter(torch.ones_like(self._stored_scale(scale)))  # m, one for each scale that is stored

    def _groups(self, values: Tensor, scales: int) -> Tensor:
        """[..., out, groups, size], or [..., out, groups, 1] of scales."""
        if scales:
            return values[..., None]
        size = self.scheme.granularity.size if isinstance(self.scheme.granularity, PerGroup) else values.shape[-1]
        return values.unflatten(-1, (-1, size))

    def _stored_scale(self, scale: Tensor) -> Tensor:
        """[..., rows, groups, 1] of [..., out, groups, 1]: rows is 1 where a matrix shares a scale."""
        return scale[..., : self.scheme.scales_shape(self.shape)[-2], :, :]

    def _rank(self, value: Tensor) -> Tensor:
        """The number of the level of `value`, broken where it lies between two; beyond the ends the line goes on."""
        if self.scheme.affine:
            return value - self.levels[0]
        below = torch.bucketize(value.detach(), self.levels[1:-1])
        return below + (value - self.levels[below]) / (self.levels[below + 1] - self.levels[below])

    def _level(self, rank: Tensor) -> Tensor:
        """The broken line through the levels: the inverse of `_rank`."""
        if self.scheme.affine:
            return rank + self.levels[0]
        below = rank.detach().floor().clamp(0, len(self.levels) - 2).long()
        return self.levels[below] + (rank - below) * (self.levels[below + 1] - self.levels[below])

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rank of each code [..., out, groups, size], what it stands for, scale [..., rows, groups, 1] as float16 will hold it)."""
        scale = _through(self._stored_scale(self.scale) * self.factor, lambda v: v.half().float())
        place = self._rank(self.wide / torch.where(scale == 0, 1.0, scale)) + self.shift
        place = place.clamp(-0.49, len(self.levels) - 0.51)
        rank = place.detach().round()
        soft = self._level(place)
        level = soft + (self._level(rank) - soft).detach()
        return rank, level, scale

    def forward(self) -> Tensor:
        _, level, scale = self._parts()
        return (level * scale + self.offset).reshape(self.shape)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of signed descent; forgets the gradients."""
        for value, each in ((self.shift, rate), (self.factor, rate / 10)):
            if value.grad is not None:
                value.sub_(value.grad.sign(), alpha=each)
                value.grad = None

    @torch.no_grad()
    def bound(self) -> None:
        self.shift.clamp_(-0.5, 0.5)
        self.factor.clamp_(_LEAST_MOVE, _MOST_MOVE)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The codes and scales as they are now."""
        rank, _, scale = self._parts()
        codes = self.code_of[rank.long()].reshape(self.shape).cpu().numpy()
        offsets = self._stored_scale(self.offset)[..., 0].cpu().numpy() if self.scheme.asymmetric else None
        return QTensor.from_codes(codes, scale[..., 0].cpu().numpy(), self.scheme, offsets)


def _through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """rounding(x), whose gradient is that of x itself."""
    return x + (rounding(x) - x).detach()


def learn_rounding(
    weights: Mapping[str, Tensor],
    start: Mapping[str, QTensor],
    loss: Callable[[dict[str, Tensor], int], Tensor],
    *,
    judge: Callable[[dict[str, Tensor]], float] | None = None,
    steps: int = 200,
    lr: float = 0.005,
    optimizer: str = "sign",
    progress: bool = True,
) -> dict[str, QTensor]:
    """The codes of all `weights` after `steps` steps from `start`. `loss(rounded weights, step)` returns a scalar to lower.

    `judge(rounded weights)` says how good a state is (less is better), before the first step and after each tenth of them;
    the best is kept. Without a judge it is the last.

    Raises FloatingPointError when the loss is NaN or infinite, ValueError for MXFP4 and for settings that are no positive numbers.
    """
    if steps < 1 or lr <= 0:
        raise ValueError(f"steps={steps}, lr={lr}: both must be positive; 200 and 1/200 are the paper's")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} is not known; use {' or '.join(map(repr, OPTIMIZERS))}")
    learnt = {name: Learnt(w, start[name]) for name, w in weights.items()}
    shifts, factors = [each.shift for each in learnt.values()], [each.factor for each in learnt.values()]
    adam = torch.optim.Adam([{"params": shifts, "share": 1.0}, {"params": factors, "share": 0.1}], betas=(0.9, 0.99), eps=1e-12)
    every = max(1, steps // _JUDGED)
    best, kept = None, {name: each.qtensor() for name, each in learnt.items()}

    def consider() -> None:
        nonlocal best, kept
        with torch.no_grad():
            found = None if judge is None else judge({name: each() for name, each in learnt.items()})
        if best is None or found is None or found < best:
            best, kept = found, {name: each.qtensor() for name, each in learnt.items()}

    consider()
    with tqdm(total=steps, desc="learn rounding", unit="step", disable=not progress, leave=False) as bar, torch.enable_grad():
        for step in range(steps):
            value = loss({name: each() for name, each in learnt.items()}, step)
            told = float(value.detach())
            if not np.isfinite(told):
                raise FloatingPointError(f"the loss is {told} at step {step}: the model overflows or its inputs are broken")
            value.backward()
            rate = lr * (1 - step / steps)
            if optimizer == "adam":
                for group in adam.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / _WARM) * group["share"]
                adam.step()
                adam.zero_grad()
            for each in learnt.values():
                each.step(rate)  # finds no gradients where Adam has taken them
                each.bound()
            if (step + 1) % every == 0 or step + 1 == steps:
                consider()
            bar.set_postfix(loss=f"{told:.3g}", refresh=False)
            bar.update()
    return kept
