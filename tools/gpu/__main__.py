"""``python -m losia_fx.tools.gpu``."""

from .command import main

raise SystemExit(main())
