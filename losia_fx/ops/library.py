"""The torch.library namespace ``losia``, and the form of its ops that compilers see through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("losia", "DEF")

VERSION = "v11"
"""Of the bodies of all ops made by ``define``.

The compilers' caches on disk know an op by its name and not by its body: a changed body under an old name would run old
gradients in a new process. So the overload is the version, and tests/ops/test_version.py ties it to a hash of the
bodies.
"""


def define(name: str, arguments: str, body: Callable[..., Any], returns: str = "Tensor") -> Any:
    """The op ``losia::<name>``: one node in a dump, and what ``body`` does (plain aten) after AOTAutograd."""
    library.define(f"{name}.{VERSION}({arguments}) -> {returns}")
    library.impl(f"{name}.{VERSION}", body, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops.losia, name), VERSION)
