"""A model's graphs, from Python: as Dynamo gave them, after each pass, and as AOTAutograd's forward and backward."""

from .graphs.capture import Captured, CapturedGraph, capture

__all__ = ["Captured", "CapturedGraph", "capture"]
