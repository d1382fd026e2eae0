"""``losia-fx delta show``: what a delta file changes, as a table."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from losia_fx.console import make_table, say, wide_console

from .format import fingerprint
from .read import DeltaFile


def show(path: Path) -> None:
    """Prints every weight of the file. Raises DeltaError for a file that is no sound delta."""
    console = wide_console()
    with DeltaFile(path) as delta:
        say(console, f"{path}: what it changes in a {delta.model}")
        table = make_table(None, "weight", "shape", "dtype", "visits", "elements", "share", "bytes")
        elements, sizes, nbytes = 0, 0, 0
        for record in delta.records:
            held, taken = sum(piece.values.numel() for piece in delta.pieces(record)), delta.nbytes(record)
            elements, sizes, nbytes = elements + held, sizes + record.size, nbytes + taken
            shape, dtype = " x ".join(map(str, record.shape)), str(record.dtype).removeprefix("torch.")
            visits = str(record.visits) if record.visits else "whole"
            table.add_row(
                escape(record.name), shape, dtype, visits, f"{held:,}", f"{held / record.size:.2%}", f"{taken:,}"
            )
        console.print(table)
        share = f" of {sizes:,} ({elements / sizes:.2%})" if sizes else ""
        for line in (
            f"{len(delta.records)} weights, {elements:,} elements{share}, {nbytes:,} bytes "
            f"({path.stat().st_size:,} with the header)",
            f"base  {fingerprint(delta.records, 'base')}",
            f"tuned {fingerprint(delta.records, 'tuned')}",
        ):
            say(console, line)
