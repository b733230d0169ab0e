"""What many tests start from: a project, and an artifact of one."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from support.adapters import write_adapter
from support.builds import Project, write_tenants
from support.models import write_base


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
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of `write_tenants`, built once. Copy it before you change a file of it."""
    import torch

    from loraexport.pipeline.build import build

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tenants")
    return build(write_tenants(folder), folder / "artifacts")[0]
