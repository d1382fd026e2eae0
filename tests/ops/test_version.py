"""The op's body and its version move together."""

from __future__ import annotations

import hashlib
import inspect

import torch

from losia_fx import ops

BODIES = {
    "v1": "a6c429bc69b49359f6c0757909e052734f902103ed2c111ccb2d98f21ce35346",
}
"""Version -> sha256 of the source of _SubnetLinear and _subnet_linear. Add a line; never change one."""


def body() -> str:
    source = inspect.getsource(ops._SubnetLinear) + inspect.getsource(ops._subnet_linear)
    return hashlib.sha256(source.encode()).hexdigest()


def test_a_changed_body_has_a_new_version() -> None:
    assert BODIES.get(ops.VERSION) == body(), (
        f"the body of losia::subnet_linear is not that of version {ops.VERSION!r}. The compilers' disk caches know the "
        "op by name and not by body: a process that finds an old entry would run the OLD gradients. Set ops.VERSION to "
        f"a new name and add it here with {body()!r}"
    )


def test_the_overload_is_the_version() -> None:
    assert ops.subnet_linear is getattr(torch.ops.losia.subnet_linear, ops.VERSION)
    assert ops.subnet_linear.name() == f"losia::subnet_linear.{ops.VERSION}"
    assert torch.ops.losia.subnet_linear.overloads() == [ops.VERSION]
