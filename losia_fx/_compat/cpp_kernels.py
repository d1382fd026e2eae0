"""Inductor's C++ kernels of a graph in one file, compiled at once: the same code, for a part of the compiler's time.

So are the strides by which it chooses what to vectorise, once it keeps them all: see ``keep_strides``.

Inductor (2.11 and 2.13) runs g++ for each kernel, and reading its headers takes most of that; there is no public way to
say otherwise. For what compiles hundreds of small models once, and nothing else: a kernel is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any

from torch._inductor import sizevars
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen import cpp

Call = Callable[..., None]

_INCLUDE = re.compile(r"^\s*#include.*$", re.MULTILINE)
_HEAD = re.compile(r'\s*extern "C"\s+void\s+kernel\(')
_NUMBERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
_TENSOR = ctypes.c_void_p


class _Libraries(CppPythonBindingsCodeCache):
    """Compiles as for a kernel that is called from Python, and loads what has no binding for that."""

    @classmethod
    def _load_library_inner(cls, path: str, key: str) -> Any:
        return ctypes.CDLL(path)


class _Kernel:
    """One that is still to be compiled."""

    def __init__(self, source: str, body: str, types: list[Any]) -> None:
        self.includes, self.body, self.types = _INCLUDE.findall(source), body, types

    def called(self, function: Any) -> Call:
        function.restype, function.argtypes = None, self.types
        tensors = [kind is _TENSOR for kind in self.types]

        def call(*args: Any) -> None:
            function(*(x.data_ptr() if is_tensor else x for x, is_tensor in zip(args, tensors, strict=True)))

        return call


def keep_strides() -> None:
    """From now on, in this process, Inductor (2.11 to 2.14) works out the stride of an index once.

    It keeps the last 128, and asks for all of a kernel's again and again: of a few hundred, none is there any more when
    its turn comes, and a backward takes minutes instead of seconds.
    """
    for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range"):
        homes: list[Any] = [module for module in (sizevars, cpp) if hasattr(module, name)]  # 2.11 has them in cpp
        kept = functools.cache(getattr(homes[0], name).__wrapped__)
        for home in homes:
            setattr(home, name, kept)


def compile_kernels_together() -> None:
    """From now on, in this process. Threads of Inductor's own are not needed, and not used."""
    binding, wait = AsyncCompile.cpp_pybinding, AsyncCompile.wait
    waiting: dict[AsyncCompile, list[_Kernel]] = {}

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
        body, types = _function_alone(source_code), [_type_of(argtype) for argtype in argtypes]
        if body is None or None in types:
            return binding(self, argtypes, source_code)
        kernel = _Kernel(source_code, body, types)
        waiting.setdefault(self, []).append(kernel)
        return kernel

    def wait_for_all(self: AsyncCompile, scope: dict[str, Any]) -> None:
        calls = _compiled(waiting.pop(self, []))
        scope.update({name: calls[value] for name, value in scope.items() if isinstance(value, _Kernel)})
        wait(self, scope)

    AsyncCompile.cpp_pybinding, AsyncCompile.wait = cpp_pybinding, wait_for_all  # type: ignore[method-assign]


def _function_alone(source: str) -> str | None:
    """The function that is all of a source beside its includes; None where there is more."""
    body = _INCLUDE.sub("", source).strip()
    if not _HEAD.match(body) or body.count('extern "C"') > 1:
        return None
    depth = 0
    for at in range(body.index("{"), len(body)):
        depth += {"{": 1, "}": -1}.get(body[at], 0)
        if depth == 0:
            return body if at == len(body) - 1 else None
    return None


def _type_of(argtype: str) -> Any:
    plain = argtype.replace("const ", "").strip()
    return _TENSOR if plain.endswith("*") else _NUMBERS.get(plain)


def _compiled(kernels: list[_Kernel]) -> dict[_Kernel, Call]:
    if not kernels:
        return {}
    names = {body: f"kernel_{number}" for number, body in enumerate(dict.fromkeys(each.body for each in kernels))}
    includes = dict.fromkeys(line.strip() for each in kernels for line in each.includes)
    functions = [re.sub(r"\bkernel\(", f"{name}(", body, count=1) for body, name in names.items()]
    library = _Libraries.load("\n".join((*includes, *functions)))
    return {each: each.called(getattr(library, names[each.body])) for each in kernels}
