"""Objects of the process that nobody has handed us: optimizers, modules, wrappers."""

from __future__ import annotations

import gc
from itertools import compress
from typing import Any

from losia_fx._compat import runs_uncompiled


@runs_uncompiled
def living(*kinds: type[Any]) -> list[Any]:
    """Every object of these classes and their subclasses, of those that gc knows.

    A process has a million objects and a few thousand classes: the classes are asked, and nothing runs in Python for an
    object. By its type, as isinstance would wake dead weak proxies; by id, as a metaclass may leave its classes without
    a hash. Never in a graph: an outer torch.compile that came this far would look at every one of them."""
    objects = gc.get_objects()
    types = list(map(type, objects))
    wanted = {key for key, each in dict(zip(map(id, types), types, strict=True)).items() if issubclass(each, kinds)}
    return list(compress(objects, map(wanted.__contains__, map(id, types)))) if wanted else []
