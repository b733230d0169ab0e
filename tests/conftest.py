"""What many tests start from: a project, and an artifact of one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from support.adapters import write_adapter
from support.builds import Project, write_small, write_tenants
from support.collected import COLLECTED
from support.home import Home
from support.models import write_base

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in ("bench", "serve"):
            item.add_marker(pytest.mark.by_file)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Base, and two adapters of different rank on different sites, one with rsLoRA."""
    write_base(tmp_path / "base")
    write_adapter(
        tmp_path / "sql",
        {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)},
        rank=4,
        seed=1,
    )
    write_adapter(
        tmp_path / "chat",
        {"blocks.0.q": (32, 32), "blocks.0.k": (32, 16)},
        rank=8,
        seed=2,
        config={"use_rslora": True},
    )
    return Project(tmp_path)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """What is built once a test run. Copy an artifact before you change a file of it."""
    home = Home.of_run(tmp_path_factory)
    yield home
    home.check()


@pytest.fixture(scope="session")
def tenants(home: Home) -> Path:
    """The artifact of `write_tenants`."""
    return home.artifact(write_tenants)


@pytest.fixture(scope="session")
def small(home: Home) -> Path:
    """The artifact of `write_small`."""
    return home.artifact(write_small)
