"""The libraries whose models are checked, and where each one's tiny models come from.

A source has ``NAMES``, or ``names()`` where they follow from what is installed, and ``build(name, dtype)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

from losia_fx.errors import LosiaError

from ..tiny.model import TinyModel

Build = Callable[[str, torch.dtype], TinyModel]


@dataclass(frozen=True)
class Library:
    """One library. ``package``: its name in a package index, and here; ``module``: what is imported of it."""

    package: str
    module: str
    source: str
    """The module of losia_fx.tools that builds its models."""

    def names(self) -> tuple[str, ...]:
        """Of all its models that can be asked for, in alphabetical order. Raises LosiaError where it is missing."""
        self._require()
        names: tuple[str, ...] = import_module(f"losia_fx.tools.{self.source}").names()
        return names

    def build(self, name: str, dtype: torch.dtype) -> TinyModel:
        """The same weights and the same batch at every call.

        Raises LosiaError for a name that it does not have, and for a model that cannot be built so small.
        """
        self._require()
        build: Build = import_module(f"losia_fx.tools.{self.source}").build
        return build(name, dtype)

    @property
    def version(self) -> str:
        return metadata.version(self.package)

    def _require(self) -> None:
        try:
            import_module(self.module)
        except Exception as error:  # a torchvision made for another torch raises RuntimeError
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            raise LosiaError(f"{self.package} cannot be imported ({why})") from error


LIBRARIES = {
    library.package: library
    for library in (
        Library("transformers", "transformers", "tiny.architectures"),
        Library("torch", "torch", "coverage.torch_models"),
        Library("diffusers", "diffusers", "coverage.diffusers_models"),
        Library("sentence-transformers", "sentence_transformers", "coverage.sentence_models"),
        Library("x-transformers", "x_transformers", "coverage.x_transformers_models"),
        Library("timm", "timm", "coverage.timm_models"),
        Library("torchvision", "torchvision", "coverage.torchvision_models"),
    )
}
