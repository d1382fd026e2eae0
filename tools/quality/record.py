"""The runs made so far, a JSON line each; several files of one folder are read together."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

from losia_fx.errors import LosiaError

from .text import LENGTH
from .training import BATCH, Outcome, Run


@dataclass(frozen=True)
class Setting:
    """What runs must have in common to be counted together."""

    steps: int
    base_steps: int
    """That a base pretrained here has seen."""
    threads: int
    machine: str
    """Its GPU, or its processor."""
    batch: int = BATCH
    length: int = LENGTH
    torch: str = field(default_factory=lambda: metadata.version("torch"))
    transformers: str = field(default_factory=lambda: metadata.version("transformers"))
    python: str = field(default_factory=platform.python_version)


class Record:
    """Outcomes by run. folder: of all files; name: of the one that this process adds to; setting: None is the files'.

    Raises LosiaError for a line that is none of ours, or of another setting. A last line that was cut off (the machine
    went down while it was written) is dropped.
    """

    def __init__(self, folder: Path, name: str, setting: Setting | None) -> None:
        self._setting, self._file = setting, folder / name
        self.outcomes: dict[Run, Outcome] = {}
        self.dates: set[str] = set()
        if setting is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(self._file)
        for file in sorted(folder.glob("runs*.jsonl")):
            self._load(file)

    @property
    def setting(self) -> Setting:
        if self._setting is None:
            raise LosiaError(f"{self._file.parent}: holds no run")
        return self._setting

    def add(self, run: Run, outcome: Outcome) -> None:
        today = date.today().isoformat()
        line = {"date": today, "setting": asdict(self.setting), **asdict(run), **asdict(outcome)}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        self.outcomes[run] = outcome
        self.dates.add(today)

    def left(self, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if run not in self.outcomes]

    def _load(self, path: Path) -> None:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                day, setting = found.pop("date"), Setting(**found.pop("setting"))
                run = Run(**{name: found.pop(name) for name in Run.__dataclass_fields__})
                outcome = Outcome(**found)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise LosiaError(f"{path}, line {number}: no run of quality ({error!r}"[:200] + ")") from error
            if self._setting is None:
                self._setting = setting
            if setting != self._setting:
                other = ", ".join(f"{key} {value}" for key, value in asdict(setting).items())
                raise LosiaError(f"{path}, line {number}: of another setting ({other}); give each a folder of its own")
            self.outcomes[run] = outcome
            self.dates.add(day)


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
