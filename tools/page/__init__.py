"""One HTML page of a model or a run."""

from losia_fx.cli import command

__all__ = ["main"]

main = command("page")
