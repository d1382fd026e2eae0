"""``python -m losia_fx.tools.coverage``."""

from .command import main

raise SystemExit(main())
