"""What commands print with: a console, a line as it is, a table, a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
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


def wide_console() -> Console:
    """A console whose tables do not fold names where nobody sees the width: in a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def say(console: Console, line: str, style: str = "") -> None:
    """Prints a line as it is: unfolded, and a bracket in a name is no markup."""
    console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)


def make_table(title: str | None, *columns: str, left: Collection[str] = ()) -> Table:
    """A table without rows. The first column and those in ``left`` are text; the others are numbers, to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        text = number == 0 or column in left
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


@contextmanager
def progress(
    console: Console,
    total: int | None = None,
    *,
    done: int = 0,
    text: str = "",
    every: int = 1,
    file: TextIO | None = None,
    transient: bool = True,
) -> Iterator[Callable[[str], None]]:
    """Yields a function that is told of each piece of work: the last one that is done, beside a bar of all ``total``,
    of which ``done`` are made already; without a total the one under way, beside a clock.

    text: until the first is told. transient: the bar goes when all is done. Where there is no terminal, every so
    many-th is a line in ``file`` (default: stdout), none with 0.
    """
    columns: tuple[ProgressColumn, ...] = (SpinnerColumn(), TimeElapsedColumn())
    if total is not None:
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    began, made = time.monotonic(), 0
    shown = console.is_terminal
    columns = (*columns, TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=transient, disable=not shown) as bar:
        task = bar.add_task(text, total=total, completed=done)

        def tell(said: str) -> None:
            nonlocal made
            made += 1
            bar.update(task, advance=1, description=said)
            if not shown and every and (done + made) % every == 0:
                print(said if total is None else of_all(total, said), file=file, flush=True)

        def of_all(total: int, said: str) -> str:
            minutes = (time.monotonic() - began) / made * (total - done - made) / 60
            return f"{done + made}/{total}  {said}  (about {minutes:.0f} min left)"

        yield tell
