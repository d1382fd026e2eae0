"""What would be trained, before it is: ``losia-fx explain``, and ``explain`` from Python."""

import sys

from losia_fx.cli import command

from .forecast.explanation import explain

__all__ = ["explain", "main"]

main = command("explain")

if __name__ == "__main__":
    sys.exit(main())
