"""Prints a benchmark's tables and writes them as markdown."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from machine import describe_machine
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Sheet:
    """Collects what a benchmark has to say: shown at once, and kept for a file.

    Args:
        title: of the file's section.
        output: markdown file to write; None writes none.
    """

    def __init__(self, title: str, output: Path | None) -> None:
        self.console = Console(width=160, highlight=False)
        self.output = output
        self.parts = [f"## {title}", f"```sh\n{_command()}\n```"]
        self.say(f"Machine: {describe_machine().replace(chr(10), '; ')}; {_load()}.")

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self.console.print(escape(text), soft_wrap=True)
        self.parts.append(text)

    def progress(self, text: str) -> None:
        """Show a line that the file leaves out."""
        self.console.print(escape(text), style="dim", soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; its first column is text, the others are numbers."""
        table = Table(title=title)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        self.parts.append(f"{title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def verdicts(self, rows: Sequence[tuple[str, str, str, bool]]) -> None:
        """Add the table of targets: what, target, measured, met."""
        cells = [(what, target, measured, "yes" if met else "NO") for what, target, measured, met in rows]
        self.table("Targets", ("target", "wanted", "measured", "met"), cells)

    def close(self) -> None:
        """Write the file."""
        self.say(f"At the end: {_load()}.")
        if self.output is None:
            return
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")
        except OSError as err:
            raise click.ClickException(f"{self.output} cannot be written: {err.strerror}") from err


def milliseconds(seconds: float) -> str:
    """Write seconds as milliseconds."""
    return f"{seconds * 1e3:.2f}"


def megabytes(num_bytes: float) -> str:
    """Write bytes as MB."""
    return f"{num_bytes / 1e6:,.0f}"


def _command() -> str:
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f} over the last minute"
