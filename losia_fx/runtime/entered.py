"""Which calls are under way in a thread: of transformed models, of their modules by themselves, of compiled graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .state import SubnetState


class Entered(threading.local):
    def __init__(self) -> None:
        self.modes = 0
        """Modules under way that have entered the mode."""
        self.calls = 0
        """Forwards of transformed models under way, with gradients on."""
        self.paused = False
        """A compiled graph is running: it sees to its weights itself."""
        self.looked: frozenset[SubnetState] = frozenset()
        """Of the modules under way that are called by themselves: whose S and W have been made to agree."""
        self.in_place = False
        """Within a call that torch.func transforms, each S is in its W."""


ENTERED = Entered()


@contextmanager
def compiled_region() -> Iterator[None]:
    """While a compiled graph runs, what it calls is not taken for a use outside of one."""
    before, ENTERED.paused = ENTERED.paused, True
    try:
        yield
    finally:
        ENTERED.paused = before
