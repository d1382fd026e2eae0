"""What commands print with: a console, a line as it is, a table, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
def progress_bar(
    console: Console, total: int, done: int = 0, text: str = "", transient: bool = False
) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps, ``done`` of them made, beside ``text``; no output where there is no terminal.

    Yields what is to be called after each step, with the text from then on. transient: the bar goes when it is full.
    """
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=transient, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total, completed=done)
        yield lambda text: progress.update(task, advance=1, description=text)
