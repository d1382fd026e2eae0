"""``python -m losia_fx.tools.pretrain``."""

from .command import main

raise SystemExit(main())
