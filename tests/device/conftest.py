"""The device that is none, for every test of this folder that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device.dry import Waits, dry_device


@pytest.fixture
def waits() -> Iterator[Waits]:
    with dry_device() as found:
        yield found
