"""LoSiA subnet fine-tuning for any PyTorch model, as a torch.fx / torch.compile pass.

>>> model = losia_fx.transform(model)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
"""

from pathlib import Path as _Path

_here = _Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    # A checkout that is not installed: passes and tools lie beside this folder (pyproject.toml maps them for wheels).
    __path__.append(str(_here.parent))

from .checkpoint import load_state_dict, state_dict
from .config import LosiaConfig
from .controller import Controller, Event
from .errors import (
    ConfigError,
    LosiaError,
    LosiaWarning,
    OptimizerError,
    PassPostconditionError,
    PassPreconditionError,
    StateError,
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
    "Event",
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
    "load_state_dict",
    "report",
    "restore",
    "state_dict",
    "subnets",
    "transform",
]
