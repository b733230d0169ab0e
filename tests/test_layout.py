"""Imports run downwards, in no circle; a folder is a room of modest size, and so is a module."""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOOSE = {"errors", "tensors", "artifact"}
"""Modules of the exporter that stand in no folder and serve every stage."""

EXPORTER: dict[str, set[str]] = {
    "errors": set(),
    "tensors": {"errors"},
    "artifact": {"errors"},
    "spec": LOOSE,
    "hf": LOOSE,
    "lora": LOOSE,
    "graphs": LOOSE | {"spec", "hf", "lora"},
    "plan": LOOSE | {"spec", "hf", "lora", "graphs"},
    "bases": LOOSE | {"spec", "hf", "lora", "graphs", "plan"},
    "export": LOOSE | {"spec", "hf", "lora", "graphs", "plan", "bases"},
    "parity": LOOSE | {"spec", "hf", "lora", "graphs", "plan", "bases"},
    "pipeline": LOOSE | {"spec", "hf", "lora", "graphs", "plan", "bases", "export", "parity"},
    "bench": LOOSE
    | {"spec", "hf", "lora", "graphs", "plan", "bases", "export", "parity", "pipeline"},
    "cli": LOOSE | {"spec", "hf", "plan", "parity", "pipeline", "bench", ""},
    "": LOOSE | {"spec", "plan", "parity", "pipeline", "version"},  # the Python face
    "__main__": {"cli"},
    "version": set(),
}
"""Folder (or module that stands in none) -> what of the exporter it may import.

Every row may import the runtime; only `pipeline` knows the order of the stages.
"""

RUNTIME: dict[str, set[str]] = {
    "errors": set(),
    "contract": {"errors"},
    "device": {"errors", "contract"},
    "adapters": {"errors", "contract", "device"},
    "slots": {"errors", "contract", "device", "adapters"},
    "buckets": {"errors", "contract", "device", "adapters"},
    "sessions": {"errors", "contract", "device", "adapters", "slots", "buckets"},
    "generation": {"errors", "contract", "device", "adapters", "slots", "buckets"},
    "batching": {"errors", "contract", "device", "slots", "buckets", "sessions"},
    "checking": {
        *("errors", "contract", "device", "adapters", "slots", "buckets"),
        *("sessions", "generation"),
    },
    "": {"errors", "version", "device", "sessions", "slots", "generation", "batching"},
    "version": set(),
    "__main__": {"errors", "checking"},
}
"""The same of the runtime, which imports nothing of the exporter."""

SERVE: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "config": {"errors", "version"},
    "auth": {"errors", "config"},
    "hosts": {"errors", "config", "auth"},
    "metrics": {"errors", "config", "hosts", "version"},
    "service": {"errors", "config", "auth", "hosts", "metrics"},
    "gone": set(),
    "routes": {"errors", "gone", "config", "auth", "hosts", "metrics", "service", "version"},
    "app": {"errors", "config", "auth", "routes", "service"},
    "ports": {"config"},
    "server": {"errors", "config", "auth", "hosts", "metrics", "service", "app", "ports"},
    "bench": set(),
    "embedded": {"config", "auth", "metrics", "service", "app"},
    "triton": {"config", "hosts", "embedded"},
    "ray": {"errors", "config", "embedded"},
    "cli": {"errors", "config", "bench", "server", "triton"},
    "__main__": {"cli"},
    "": {"errors", "config", "server", "version"},
}
"""The same of the server, which imports the runtime, and nothing of the exporter."""

KERNELS: dict[str, set[str]] = {"version": set(), "": {"version"}}
"""The same of the kernels' package, which imports nothing of the others."""

TABLES = {
    "loraexport": EXPORTER,
    "loraexport_runtime": RUNTIME,
    "loraexport_serve": SERVE,
    "loraexport_kernels": KERNELS,
}
PLACES = {
    "loraexport": ROOT,
    "loraexport_runtime": ROOT / "runtime",
    "loraexport_serve": ROOT / "runtime/serve",
    "loraexport_kernels": ROOT / "runtime/kernels",
}

MOST_LINES = 300
MOST_MODULES = 15
LONGER = {
    "loraexport/cli/app.py": "every command with the help of its options",
    "runtime/loraexport_runtime/contract/manifest.py": "the whole contract, value by value",
}
"""Modules of more lines -> why they are not two."""


@dataclass(frozen=True)
class Module:
    """A module of one of the packages, and what it imports of both, wherever in the file."""

    name: str
    path: Path
    imports: frozenset[str]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


@cache
def modules() -> dict[str, Module]:
    """Every module by its name; a package is its `__init__`."""
    paths = {
        _name_of(path, place): path
        for package, place in PLACES.items()
        for path in sorted((place / package).rglob("*.py"))
    }
    return {
        name: Module(name, path, frozenset(_imports(name, path, paths)))
        for name, path in paths.items()
    }


def _name_of(path: Path, place: Path) -> str:
    parts = path.relative_to(place).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, paths: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in paths)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                if start in paths and name not in (start, inner):
                    yield inner if inner in paths else start


def _folder(name: str) -> str:
    """The folder of a module in its package; "" is the package's own `__init__`."""
    return [*name.split("."), ""][1]


def test_every_folder_stands_in_the_table() -> None:
    for package, table in TABLES.items():
        folders = {_folder(name) for name in modules() if name.partition(".")[0] == package}
        assert folders <= set(table), f"{package}: folders without a row"
        assert set().union(*table.values()) <= set(table), f"{package}: rows that name no folder"


def test_the_tables_lead_downwards() -> None:
    """No folder may reach itself by way of others, whatever the modules do today."""
    for table in TABLES.values():
        tuple(TopologicalSorter(table).static_order())


def test_no_import_runs_upwards() -> None:
    wrong = {
        (module.name, target)
        for module in modules().values()
        for target in module.imports
        if not _allowed(module, target)
    }
    assert not wrong


def _allowed(module: Module, target: str) -> bool:
    package = target.partition(".")[0]
    if package != module.package:
        return package == "loraexport_runtime"
    here, there = _folder(module.name), _folder(target)
    return here == there or there in TABLES[package][here]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and those for types alone count too."""
    graph = {module.name: module.imports for module in modules().values()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_a_module_is_short_or_says_why_not() -> None:
    lines = {
        module.path.relative_to(ROOT).as_posix(): len(module.path.read_text().splitlines())
        for module in modules().values()
    }
    long = {path for path, count in lines.items() if count > MOST_LINES}
    assert long <= set(LONGER), f"split these, or write a reason: {long - set(LONGER)}"
    assert set(LONGER) <= set(lines), "reasons for files that are gone"


def test_a_folder_is_no_crowd() -> None:
    folders = Counter(module.path.parent for module in modules().values())
    crowded = {
        folder.relative_to(ROOT).as_posix(): count
        for folder, count in folders.items()
        if count - (folder / "__init__.py").is_file() > MOST_MODULES
    }
    assert not crowded
