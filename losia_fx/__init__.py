"""LoSiA subnet fine-tuning for any PyTorch model, as a torch.fx / torch.compile pass.

>>> model = losia_fx.transform(model)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

_here = _Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    # A checkout that is not installed: passes and tools lie beside this folder (pyproject.toml maps them for wheels).
    __path__.append(str(_here.parent))

from . import optim as optim
from .api.report import Report
from .api.transform import restore, transform
from .api.views import Subnet, controller, dense, report, stepped, subnets
from .checkpoint.state import load_state_dict, state_dict
from .config import LosiaConfig
from .delta.load import load_delta
from .delta.save import save_delta
from .errors import (
    ConfigError,
    DeltaError,
    GradientError,
    LosiaError,
    LosiaWarning,
    OptimizerError,
    PassPostconditionError,
    PassPreconditionError,
    StateError,
    TransformError,
    UnsupportedGraphError,
)
from .runtime.controller import Controller
from .runtime.train_state import Event

if _TYPE_CHECKING:
    from .checkpoint.trainer import LosiaCallback

__all__ = [
    "ConfigError",
    "Controller",
    "DeltaError",
    "Event",
    "GradientError",
    "LosiaCallback",
    "LosiaConfig",
    "LosiaError",
    "LosiaWarning",
    "OptimizerError",
    "PassPostconditionError",
    "PassPreconditionError",
    "Report",
    "StateError",
    "Subnet",
    "TransformError",
    "UnsupportedGraphError",
    "controller",
    "dense",
    "load_delta",
    "load_state_dict",
    "report",
    "restore",
    "save_delta",
    "state_dict",
    "stepped",
    "subnets",
    "transform",
]


def __getattr__(name: str) -> _Any:
    if name == "LosiaCallback":  # needs transformers, which nothing else here does
        from .checkpoint.trainer import LosiaCallback

        return LosiaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
