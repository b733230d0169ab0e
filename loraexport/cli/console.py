"""Tables and lines as every command prints them, on a terminal or not."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_line(console: Console, line: str) -> None:
    """A line as it is: a path may hold what rich takes for markup."""
    console.print(Text(line), soft_wrap=True)


def make_table(*columns: str) -> Table:
    """Cells fold where a terminal is narrow: nothing is cut off."""
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
