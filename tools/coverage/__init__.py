"""Every model of a library, tiny, held against plain autograd. A development tool: no wheel holds it."""

from .command import main

__all__ = ["main"]
