"""``python -m losia_fx.tools.page``."""

from . import main

raise SystemExit(main())
