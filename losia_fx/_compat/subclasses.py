"""What a tensor subclass that wraps others is made with, which torch has under private names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Wrapper = TypeVar("Wrapper", bound=Tensor)

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""As a class's __torch_function__: results are what they are, and no instances of the class."""


def wrapper_of(cls: type[Wrapper], like: Tensor, dtype: torch.dtype) -> Wrapper:
    """A tensor of ``cls`` of the shape and device of ``like``, contiguous, without memory of its own."""
    made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=dtype, device=like.device)
    return made


def unwrapped(cls: type[Wrapper], unwrap: Callable[[Wrapper], Tensor], arguments: Any) -> Any:
    """The arguments of an operation with each instance of ``cls`` in them, however deep, as ``unwrap`` makes it."""
    return pytree.tree_map_only(cls, unwrap, arguments)
