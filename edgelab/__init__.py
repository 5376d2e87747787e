"""edgelab: make mixture-of-experts and dense language models small enough for a phone, and measure what it costs.

    compress -> evaluate -> export

The nouns (`QuantScheme`, `QTensor`, `Recipe`, `Report`) are here at once; the verbs, which need torch, load on first
use, so that `import edgelab` stays light.
"""

import sys as _sys
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from edgelab.qtensor import QTensor as QTensor
from edgelab.recipe import AutoRound as AutoRound
from edgelab.recipe import Distill as Distill
from edgelab.recipe import DropExperts as DropExperts
from edgelab.recipe import DropLayers as DropLayers
from edgelab.recipe import EarlyExit as EarlyExit
from edgelab.recipe import FineTune as FineTune
from edgelab.recipe import Gptq as Gptq
from edgelab.recipe import Hqq as Hqq
from edgelab.recipe import MergeExperts as MergeExperts
from edgelab.recipe import Prune as Prune
from edgelab.recipe import PruneChannels as PruneChannels
from edgelab.recipe import PruneHeads as PruneHeads
from edgelab.recipe import Qat as Qat
from edgelab.recipe import Quantize as Quantize
from edgelab.recipe import Recipe as Recipe
from edgelab.recipe import Rotate as Rotate
from edgelab.recipe import Route as Route
from edgelab.recipe import Rtn as Rtn
from edgelab.recipe import SkipChannels as SkipChannels
from edgelab.recipe import Smooth as Smooth
from edgelab.recipe import SparseAttention as SparseAttention
from edgelab.report import Report as Report
from edgelab.report import Row as Row
from edgelab.scheme import ActScheme as ActScheme
from edgelab.scheme import PerChannel as PerChannel
from edgelab.scheme import PerGroup as PerGroup
from edgelab.scheme import PerTensor as PerTensor
from edgelab.scheme import QuantScheme as QuantScheme

__version__ = "0.1.0"

_LATER = {
    "compress": "edgelab.compress",
    "evaluate": "edgelab.evaluate",
    "corpus": "edgelab.data",
    "load": "edgelab.model",
    "save_bundle": "edgelab.bundle",
    "load_bundle": "edgelab.bundle",
    "set_threads": "edgelab.kernels._jit",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(_import_module(_LATER[name]), name)
    raise AttributeError(f"module 'edgelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])


class _Door(_ModuleType):
    """Keeps `edgelab.compress` the verb: importing the module of that name would otherwise bind the module here."""

    def __setattr__(self, name: str, value: object) -> None:
        verb = name in _LATER and isinstance(value, _ModuleType)
        super().__setattr__(name, getattr(value, name) if verb else value)


_sys.modules[__name__].__class__ = _Door
