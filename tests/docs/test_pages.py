"""README and docs say what is there: folders, files, links, commands, errors, keys and tests."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from support.documents import PAGES, ROOT, read_blocks, read_test_names

import loraexport.errors
import loraexport_runtime.errors
from loraexport.cli.app import app
from loraexport.errors import exit_code
from loraexport.spec.reader import json_schema
from loraexport_runtime.errors import LoraexportError

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What stands in backticks and begins like this is a path of the repository.
TOP = r"(?:loraexport|runtime|tests|examples|scripts|specs|docs)"


def read_table(page: str) -> list[list[str]]:
    """The cells of every row of every table of a page; `\\|` is a bar inside one."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ") for line in lines if line.startswith("|")]
    return [re.split(r"\s*(?<!\\)\|\s*", row) for row in rows]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """The module that makes pages of the site from the code."""
    path = ROOT / "docs/hooks/reference.py"
    spec = importlib.util.spec_from_file_location("reference_hook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_architecture_has_a_line_for_each_folder() -> None:
    described = [row[0].strip("`") for row in read_table("docs/architecture.md")]
    packages = (
        "loraexport",
        "runtime/loraexport_runtime",
        "runtime/serve/loraexport_serve",
        "runtime/kernels/loraexport_kernels",
    )
    folders = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for package in packages
        for path in (ROOT / package).rglob("__init__.py")
    }
    listed = [name for name in described if name.endswith("/")]
    assert sorted(listed) == sorted(folders)


def test_every_test_that_security_names_exists() -> None:
    rows = [row for row in read_table("docs/security.md") if len(row) == 3 and "test_" in row[2]]
    names = {name for row in rows for name in re.findall(r"`([\w:]+)`", row[2])}
    assert len(rows) > 20
    assert names - read_test_names() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    """Of the site's pages mkdocs checks links and anchors; here README's and the like."""
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"`({TOP}/[\w./-]*)`", text)
    missing = [path for path in paths if not (ROOT / path).exists()]
    if "docs" not in page.relative_to(ROOT).parts[:1]:
        links = re.findall(r"\]\(([^)#:]+)[^)]*\)", text)
        missing += [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_lists_the_commands() -> None:
    group: Any = typer.main.get_command(app)
    section = README.split("\n## Commands\n", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"^\| `loraexport (\w+)", section, re.MULTILINE))
    assert listed == set(group.commands)


def test_every_error_stands_with_its_exit_code() -> None:
    rows = {row[0].strip("`"): row[1] for row in read_table("docs/reference/errors.md")}
    for module in (loraexport.errors, loraexport_runtime.errors):
        for name, error in vars(module).items():
            is_error = isinstance(error, type) and issubclass(error, LoraexportError)
            if not is_error or name in ("LoraexportError", "AdapterError"):
                continue
            code = exit_code(error("spec.yaml", []) if name == "SpecError" else error("text"))
            assert rows.get(name) == str(code), f"docs/reference/errors.md: {name} is {code}"


def test_the_readme_lists_the_exit_codes() -> None:
    rows = [row[0] for row in read_table("docs/reference/errors.md")]
    codes = [cell for cell in rows if cell.isdigit()]
    line = README.split("Exit codes: ", 1)[1].split("\n\n", 1)[0]
    assert re.findall(r"(?:^|; |;\n)(\d+) ", line) == codes


def test_the_spec_page_has_every_key(hook: ModuleType) -> None:
    schema = json_schema()
    text = hook.spec_page(schema)
    for definition in (schema, *schema["$defs"].values()):
        for key in definition["properties"]:
            assert f"| `{key}` |" in text
    anchors = {hook.anchor(title) for title in hook.TITLES.values()}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert set(hook.TITLES) == set(schema["$defs"])


def test_the_commands_page_has_every_option(hook: ModuleType) -> None:
    text = hook.cli_page()
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = text.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]
        for parameter in command.params:
            label = parameter.name.upper()
            if parameter.param_type_name == "option":
                label = parameter.opts[0]
            assert label in section, f"{name}: {label}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_compile(page: Path) -> None:
    for block in read_blocks(page, "python"):
        compile(block.text, f"{block.page}:{block.line}", "exec")


def test_decisions_are_numbered_and_listed() -> None:
    pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [int(name[:2]) for name in pages] == list(range(1, len(pages) + 1))
    index = (ROOT / "docs/decisions/index.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\d\d-[\w-]+\.md)\)", index) == pages
    for name in pages:
        title = (ROOT / "docs/decisions" / name).read_text(encoding="utf-8").splitlines()[0]
        assert title.startswith(f"# {int(name[:2])}. ")
        assert title.split(". ", 1)[1] in index
