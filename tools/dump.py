"""Graphs as text, JSON, DOT, GraphML and GEXF: ``losia-fx dump``, and ``dump_graph`` from Python."""

import sys

from losia_fx.cli import command

from .graphs.documents import dump_graph

__all__ = ["dump_graph", "main"]

main = command("dump")

if __name__ == "__main__":
    sys.exit(main())
