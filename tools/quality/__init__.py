"""Measures what is learnt and what is forgotten, beside controls. A development tool: no wheel holds it."""

from .command import main

__all__ = ["main"]
