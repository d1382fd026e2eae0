"""Graphs as networkx graphs, and what one can ask them, from Python."""

from .graphs.networkx import group_subgraph, held_activations, longest_rewritten_path, loss_dominators, to_networkx

__all__ = ["group_subgraph", "held_activations", "longest_rewritten_path", "loss_dominators", "to_networkx"]
