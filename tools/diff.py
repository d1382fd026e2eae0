"""What the passes changed in a model's graphs: ``losia-fx diff``, and ``diff`` from Python."""

import sys

from losia_fx.cli import command

from .graphs.changes import diff

__all__ = ["diff", "main"]

main = command("diff")

if __name__ == "__main__":
    sys.exit(main())
