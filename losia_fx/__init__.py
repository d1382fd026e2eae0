"""LoSiA subnet fine-tuning for any PyTorch model, as a torch.fx / torch.compile pass.

>>> model = losia_fx.transform(model)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
"""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    # A checkout that is not installed: passes and tools lie beside this folder (pyproject.toml maps them for wheels).
    __path__.append(str(_here.parent))

from .config import LosiaConfig
from .controller import Controller, Event
from .delta import load_delta, save_delta
from .errors import (
    ConfigError,
    DeltaError,
    LosiaError,
    LosiaWarning,
    OptimizerError,
    PassPostconditionError,
    PassPreconditionError,
    TransformError,
    UnsupportedGraphError,
)
from .inspect import controller, report, subnets
from .report import Report
from .state import Subnet
from .transform import restore, transform

__all__ = [
    "ConfigError",
    "Controller",
    "DeltaError",
    "Event",
    "LosiaConfig",
    "LosiaError",
    "LosiaWarning",
    "OptimizerError",
    "PassPostconditionError",
    "PassPreconditionError",
    "Report",
    "Subnet",
    "TransformError",
    "UnsupportedGraphError",
    "controller",
    "load_delta",
    "report",
    "restore",
    "save_delta",
    "subnets",
    "transform",
]
