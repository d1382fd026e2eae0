"""All methods, in the order of the table."""

from __future__ import annotations

from .adapters import ADAPTERS
from .floors import FLOORS
from .losia_methods import LOSIA
from .plain_pro import PRO

METHODS = (*FLOORS, *LOSIA, *PRO, *ADAPTERS)
