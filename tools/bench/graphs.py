"""What Dynamo counted: graphs, breaks, and graphs that came after the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from losia_fx._compat import graph_counts


@dataclass
class GraphCounts:
    graphs: int = 0
    breaks: int = 0
    recompilations: int = 0
    """Graphs made after the warm-up."""

    @contextmanager
    def watching(self, warm: bool) -> Iterator[None]:
        """Adds what Dynamo makes inside; warm: it should be nothing any more."""
        graphs, breaks = graph_counts()
        yield
        graphs_now, breaks_now = graph_counts()
        self.graphs += graphs_now - graphs
        self.breaks += breaks_now - breaks
        self.recompilations += graphs_now - graphs if warm else 0
