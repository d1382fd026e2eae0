"""Makes the model that losia_fx ships. A development tool: no wheel holds it."""

from .command import main

__all__ = ["main"]
