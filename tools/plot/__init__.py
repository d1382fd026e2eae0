"""Pictures of a run."""

from losia_fx.cli import command

__all__ = ["main"]

main = command("plot")
