"""What the tools show on a terminal: tables, and how far a long piece of work has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def table(title: str, columns: Sequence[str], numbers: Collection[str]) -> Table:
    """A table without rows. numbers: the columns that are aligned on the right. A cell that is too long is folded."""
    found = Table(title=title, title_justify="left")
    for column in columns:
        found.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return found


@contextmanager
def progress(
    console: Console, total: int | None = None, every: int = 1, file: TextIO | None = None
) -> Iterator[Callable[[str], None]]:
    """Yields a function that is told of each piece of work: the last one that is done, beside a bar of all ``total``;
    without a total the one under way, beside a clock.

    Where there is no terminal, every so many-th is a line in ``file`` (default: stdout).
    """
    columns: tuple[ProgressColumn, ...] = (SpinnerColumn(), TimeElapsedColumn())
    if total is not None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, done = time.monotonic(), 0
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)

        def tell(said: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, advance=1, description=said)
            if not console.is_terminal and done % every == 0:
                print(said if total is None else f"{done}/{total}  {said}  ({left(total)})", file=file, flush=True)

        def left(total: int) -> str:
            minutes = (time.monotonic() - began) / done * (total - done) / 60
            return f"about {minutes:.0f} min left"

        yield tell
