"""The repository's pages -> their code blocks and the commands they show; and all tests by name."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(
            ROOT / name
            for name in (
                "README.md",
                "CONTRIBUTING.md",
                "runtime/README.md",
                "runtime/serve/README.md",
            )
        ),
    ]
)


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is that of its first line, from 1."""

    page: str
    line: int
    text: str


def read_blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a language, in the page's order."""
    blocks: list[Block] = []
    kept: list[str] | None = None
    is_open, start = False, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if kept is not None:
                text = "\n".join(kept) + "\n"
                blocks.append(Block(page.relative_to(ROOT).as_posix(), start, text))
            is_open = not is_open
            kept, start = ([] if is_open and line == f"```{language}" else None), number + 1
        elif kept is not None:
            kept.append(line)
    assert not is_open, f"{page}: a block is not closed"
    return blocks


def read_commands(page: Path) -> list[str]:
    """Every command that the page shows behind `$ `, without its comment."""
    lines = [line for block in read_blocks(page, "console") for line in block.text.splitlines()]
    return [re.sub(r"\s{2,}#.*", "", line[2:]).strip() for line in lines if line.startswith("$ ")]


def read_test_names() -> set[str]:
    """The tests there are: `test_x`, and `TestY::test_x` for those of a class."""
    names: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.ClassDef):
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                names.update(methods, (f"{node.name}::{method}" for method in methods))
    return {name for name in names if name.rsplit("::")[-1].startswith("test_")}
