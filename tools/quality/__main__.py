"""``python -m losia_fx.tools.quality``."""

from .command import main

raise SystemExit(main())
