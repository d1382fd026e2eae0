"""``python -m losia_fx.tools.plot``."""

from . import main

raise SystemExit(main())
