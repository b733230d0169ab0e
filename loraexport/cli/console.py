"""Tables and lines as every command prints them, on a terminal or not."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
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


# No markup and no emoji codes: a path may be named [a] or :b:.
out_console = Console(soft_wrap=True, markup=False, emoji=False)
err_console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)


def print_error(title: str, message: str) -> None:
    """One block on stderr: a panel on a terminal, plain lines elsewhere."""
    if err_console.is_terminal:
        bold = Text(title, style="bold red")
        err_console.print(Panel(Text(message), title=bold, title_align="left"))
    else:
        err_console.print(Text(f"{title}: {message}"))


@contextmanager
def show_progress(title: str, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line on a terminal, plain lines elsewhere, nothing with --json."""
    if quiet:
        yield lambda stage: None
    elif err_console.is_terminal:
        with err_console.status(title) as status:
            yield lambda stage: status.update(f"{title}: {stage}")
    else:
        yield lambda stage: err_console.print(f"{title}: {stage}")


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_tree(data: Any) -> None:
    import yaml

    out_console.print(Text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip()))
