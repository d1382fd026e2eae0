"""What pyproject.toml asks for, for tools/run.sh: runs by its path, before anything is installed.

python tools/requirements.py met [EXTRA ...]  exit code 0 where this python has all that losia_fx and the extras need
python tools/requirements.py torch            exit code 0 where this python has a torch that losia_fx takes
python tools/requirements.py pins VERSION     pip constraints to test with that torch; exit code 2 where it is not taken
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
PROJECT = "losia-fx"
WHAT_A_USER_HAS = ("cli",)
"""The extras that are pinned with the lowest torch: what only a developer needs is no promise to anybody."""

Release = tuple[int, ...]


@dataclass(frozen=True)
class Requirement:
    """``name>=lowest`` or ``name>=lowest,<below``: no other form stands in pyproject.toml."""

    name: str
    lowest: str
    below: str | None = None

    def takes(self, version: str) -> bool:
        """Whether a version is in the range; a local one (2.11.0+cu130) is as good as the release it was made from."""
        return release(self.lowest) <= release(version) and (
            self.below is None or release(version) < release(self.below)
        )

    def __str__(self) -> str:
        return f"{self.name}>={self.lowest}" + ("" if self.below is None else f",<{self.below}")


def release(version: str) -> Release:
    """The numbers of a version, without zeros at its end: 2.11 and 2.11.0 are one. ValueError for no version."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        raise ValueError(f"{version!r} is no version")
    numbers = [int(number) for number in found[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def requirements(extras: Iterable[str] = (), pyproject: Path = PYPROJECT) -> list[Requirement]:
    """What the library and the extras need, extras named by extras included. KeyError for an extra there is not."""
    with pyproject.open("rb") as file:
        project = tomllib.load(file)["project"]
    found: dict[str, Requirement] = {}
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    while wanted:
        written = wanted.pop(0)
        own = re.fullmatch(rf"{PROJECT}\[([\w,-]+)\]", written)
        if own is not None:
            wanted += [each for extra in own[1].split(",") for each in project["optional-dependencies"][extra]]
            continue
        parts = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<([\d.]+))?", written)
        if parts is None:
            raise ValueError(f"{pyproject.name}: {written!r} is not of the form name>=lowest or name>=lowest,<below")
        found[parts[1]] = Requirement(*parts.groups())
    return list(found.values())


def met(requirement: Requirement) -> bool:
    """Whether this python has it."""
    try:
        return requirement.takes(importlib.metadata.version(requirement.name))
    except importlib.metadata.PackageNotFoundError:
        return False


def pins(version: str) -> list[str]:
    """Constraints for pip that bring torch ``version``; with the lowest torch the lowest of all that a user has.

    ValueError where losia_fx does not take that torch.
    """
    torch, *others = requirements(WHAT_A_USER_HAS)
    if not torch.takes(version):
        raise ValueError(f"torch {version}: losia_fx needs {torch}")
    lowest = release(version) == release(torch.lowest)
    return [f"torch=={version}", *(f"{other.name}=={other.lowest}" for other in others if lowest)]


def main(argv: Sequence[str] | None = None) -> int:
    what, *rest = sys.argv[1:] if argv is None else argv
    if what == "pins":
        try:
            print("\n".join(pins(*rest)))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    wanted = requirements(rest) if what == "met" else requirements()[:1]
    return 0 if all(met(requirement) for requirement in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
