"""The functions of a Python file, and their lines."""

import ast
from pathlib import Path


def function_lines(path: Path) -> dict[str, range]:
    """`name`, or `Class.name` of a method, to its lines, the decorators' too."""
    lines: dict[str, range] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                assert child.end_lineno is not None
                lines[prefix + child.name] = range(first, child.end_lineno + 1)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return lines
