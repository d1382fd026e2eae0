"""All that wants a GPU, in one go. A development tool: no wheel holds it."""

from .command import main

__all__ = ["main"]
