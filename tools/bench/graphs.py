"""What Dynamo counted: graphs, breaks, and graphs that came after the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch._dynamo.utils import counters


@dataclass
class GraphCounts:
    graphs: int = 0
    breaks: int = 0
    recompilations: int = 0
    """Graphs made after the warm-up."""

    @contextmanager
    def watching(self, warm: bool) -> Iterator[None]:
        """Adds what Dynamo makes inside; warm: it should be nothing any more."""
        graphs, breaks = _graphs(), _breaks()
        yield
        made = _graphs() - graphs
        self.graphs += made
        self.breaks += _breaks() - breaks
        self.recompilations += made if warm else 0


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _breaks() -> int:
    return sum(counters["graph_break"].values())
