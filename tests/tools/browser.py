"""A headless Chromium for the tests that look at a page, without any network of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-pings",
    "--no-sandbox",
)


def executable() -> str:
    """The browser; without one the test is skipped, or fails where it must not be (LOSIA_BROWSER=required in CI)."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        why = f"no browser found ({', '.join(NAMES)}): apt-get install chromium"
        if os.environ.get("CI") and os.environ.get("LOSIA_BROWSER") == "required":
            pytest.fail(why)
        pytest.skip(why)
    return found


@contextmanager
def browser() -> Iterator[Any]:
    path = executable()
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (losia-fx[dev])")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        try:
            yield opened
        finally:
            opened.close()
