"""What coverage has found so far, a line a model, in a file that a later run goes on with."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from losia_fx.errors import LosiaError

from .check import EXACT, REFUSED, Result
from .libraries import Library


@dataclass(frozen=True)
class Conditions:
    """What results must have in common to be counted together."""

    library: str
    version: str
    """Of the library."""
    torch: str
    python: str
    compiler: str
    dtype: str

    @classmethod
    def of(cls, library: Library, compiler: str, dtype: str) -> Conditions:
        return cls(
            library.package, library.version, metadata.version("torch"), platform.python_version(), compiler, dtype
        )


class Record:
    """Results by model, the last of each; each is in the file as soon as it is added."""

    def __init__(self, path: Path | None, conditions: Conditions) -> None:
        """path: None for no file; one that exists is gone on with.

        Raises LosiaError for a file with results of another setting, or with a line that is none of ours. A last line
        that was cut off (the machine went down while it was written) is dropped.
        """
        self.path, self.conditions = path, conditions
        self.results: dict[str, Result] = {}
        self.dates: set[str] = set()
        if path is not None and path.exists():
            self._load(path)

    def add(self, result: Result) -> None:
        today = date.today().isoformat()
        self._note(result, today)
        if self.path is not None:
            line = json.dumps({"date": today, "setting": asdict(self.conditions), **asdict(result)})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def left(self, names: list[str], retry: bool) -> list[str]:
        """Of these names, those without a result; retry: or with one that says no more than that something failed."""
        done = {name for name, result in self.results.items() if not retry or result.verdict in (EXACT, REFUSED)}
        return [name for name in names if name not in done]

    def of(self, names: list[str]) -> list[Result]:
        return [self.results[name] for name in names if name in self.results]

    def _note(self, result: Result, day: str) -> None:
        self.results[result.architecture] = result
        self.dates.add(day)

    def _load(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                day, conditions = found.pop("date"), Conditions(**found.pop("setting"))
                result = Result(**found)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise LosiaError(f"{path}, line {number}: no result of coverage ({error!r}"[:200] + ")") from error
            if conditions != self.conditions:
                other = ", ".join(f"{key} {value}" for key, value in asdict(conditions).items())
                raise LosiaError(f"{path}, line {number}: of another setting ({other}); give each a file of its own")
            self._note(result, day)
