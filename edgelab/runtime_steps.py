"""Steps that change how a model computes and not what it stores: applied to a model, recorded on it, and applied again after loading.

`Route`, `SkipChannels`, `SparseAttention` and `EarlyExit` leave no trace in the weights (`EarlyExit` adds its own), so a saved
model has to say them: `hf.adopt` writes them into `quantization_config["runtime"]`, and loading calls `attach` before the
weights are read and `restore` after.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from edgelab.dynamic import skip_channels
from edgelab.early_exit import attach as attach_exit
from edgelab.early_exit import early_exit
from edgelab.early_exit import restore as restore_exit
from edgelab.recipe import EarlyExit, Route, RunTime, SkipChannels, SparseAttention
from edgelab.routing import route
from edgelab.sparse_attention import sparse_attention

_RECORD = "_edgelab_runtime"


def apply(model: nn.Module, step: RunTime, batches: Sequence[Tensor] | None, progress: bool = True) -> list[str]:
    """Does `step` to `model` in place and records it. Returns remarks. `batches` are for `EarlyExit` alone."""
    match step:
        case EarlyExit():
            remarks = early_exit(model, step, batches, progress=progress)
        case _:
            remarks = _without_data(model, step)
    setattr(model, _RECORD, (*steps_of(model), step))
    return remarks


def try_on(model: nn.Module, step: RunTime) -> None:
    """Raises ValueError where `model` can't compute by `step`; for a copy on the meta device, which is changed."""
    if isinstance(step, EarlyExit):
        attach_exit(model, step)
    else:
        _without_data(model, step)


def steps_of(model: nn.Module) -> tuple[RunTime, ...]:
    """The run-time steps that `model` computes by, in the order in which they came."""
    return getattr(model, _RECORD, ())


def attach(model: nn.Module, steps: Iterable[RunTime]) -> None:
    """Makes room for the weights that `steps` add: before a checkpoint is read, also on the meta device."""
    for step in steps:
        if isinstance(step, EarlyExit):
            attach_exit(model, step)


def restore(model: nn.Module, steps: Iterable[RunTime]) -> None:
    """Lets a loaded model compute by `steps` again."""
    for step in steps:
        if isinstance(step, EarlyExit):
            restore_exit(model, step)
        else:
            _without_data(model, step)
    setattr(model, _RECORD, tuple(steps))


def _without_data(model: nn.Module, step: RunTime) -> list[str]:
    match step:
        case Route():
            return route(model, step)
        case SkipChannels():
            return skip_channels(model, step)
        case SparseAttention():
            return sparse_attention(model, step)
        case _:
            raise TypeError(f"{step!r} is no step of run time")
