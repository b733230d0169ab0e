"""Where a spec's paths lead: directories, packages, the hub's cache; and where they must not."""

import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from support.adapters import write_adapter

from loraexport.errors import BaseModelError
from loraexport.hf.sources import resolve_directory
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.errors import AdapterError


def resolve(source: str, folder: Path) -> Path:
    return resolve_directory(source, folder, BaseModelError)


def test_relative_to_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs/adapters/sql").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("adapters/sql", Path("specs")) == Path("specs/adapters/sql")
    assert resolve("../specs", tmp_path / "specs").samefile(tmp_path / "specs")


def test_absolute(tmp_path: Path) -> None:
    assert resolve(str(tmp_path), Path("elsewhere")) == tmp_path


def test_the_error_class_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such directory; paths are relative to the spec's"):
        resolve_directory("./missing", tmp_path, AdapterError)


@pytest.mark.parametrize(
    "source", ["missing", "./a/b", "../a", "a/b/c", "/nowhere/at/all", "a b/c"]
)
def test_missing_directory(tmp_path: Path, source: str) -> None:
    with pytest.raises(
        BaseModelError, match=r"no such directory; paths are relative to the spec's"
    ):
        resolve(source, tmp_path)


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BaseModelError, match=r"model\.safetensors is a file; give the directory"):
        resolve("model.safetensors", tmp_path)


@pytest.mark.parametrize("source", ["https://huggingface.co/a/b", "s3://bucket/x", "file:///tmp"])
def test_addresses_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(BaseModelError, match=r"is an address; give a directory, a hub id or pack"):
        resolve(source, tmp_path)


# ---------------------------------------------------------------- package:


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `shipped_weights` with a folder, a link out of it, and a module."""
    root = tmp_path / "site" / "shipped_weights"
    (root / "models/mini").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('weights need no import of their code')")
    (tmp_path / "site/shipped_module.py").touch()
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inner_link").symlink_to(root / "models")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root


def test_folder_of_a_package(package: Path, tmp_path: Path) -> None:
    assert resolve("package:shipped_weights/models/mini", tmp_path) == package / "models/mini"
    assert resolve("package:shipped_weights/inner_link/mini", tmp_path) == package / "models/mini"
    assert resolve("package:shipped_weights", tmp_path) == package, "weights beside __init__.py"
    assert "shipped_weights" not in sys.modules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("shipped_weights/../outside", "leaves the package's folder; name a folder inside"),
        ("shipped_weights/models/../../..", "leaves the package's folder; name a folder inside"),
        ("shipped_weights//etc", "leaves the package's folder; name a folder inside"),
        ("shipped_weights/link", "leaves the package's folder through a link"),
        ("shipped_weights/nothing", "package 'shipped_weights' has no folder 'nothing'"),
        ("shipped_weights/__init__.py", "package 'shipped_weights' has no folder '__init__.py'"),
        ("shipped_module/models", "'shipped_module' is a single file, so it ships no folder"),
        ("not_installed_here/models", "no Python package 'not_installed_here' is installed; pip"),
        ("../outside", "no Python package '..' is installed"),
        ("shipped_weights.models/mini", "no Python package 'shipped_weights.models' is installed"),
        ("/etc", "no Python package '' is installed"),
    ],
)
@pytest.mark.usefixtures("package")
def test_package_paths_that_lead_nowhere(tmp_path: Path, source: str, expected: str) -> None:
    with pytest.raises(BaseModelError) as caught:
        resolve(f"package:{source}", tmp_path)
    assert expected in str(caught.value)
    assert f"package:{source}" in str(caught.value)


@pytest.mark.parametrize("inner", ["x" * 5_000, "a\0b", "models/circle/x"])
def test_a_folder_of_a_package_that_no_file_system_takes(
    package: Path, tmp_path: Path, inner: str
) -> None:
    (package / "models/circle").symlink_to("circle")
    with pytest.raises(
        BaseModelError, match=r"^'package:shipped_weights/.*of the package$"
    ) as told:
        resolve(f"package:shipped_weights/{inner}", tmp_path)
    assert len(str(told.value)) < 400


# ---------------------------------------------------------------- the hub's cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub with one adapter, as a download would leave it."""
    cache = tmp_path / "hub"
    repository = cache / "models--tiny-org--sql-lora"
    write_adapter(repository / "snapshots" / COMMIT, {"q": (8, 8)}, rank=2)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "refs/v1.0").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", "@v1.0", "@main", f"@{COMMIT}"])
def test_hub_id_from_the_cache(hub_cache: Path, tmp_path: Path, revision: str) -> None:
    found = resolve(f"tiny-org/sql-lora{revision}", tmp_path)
    assert found.samefile(hub_cache)
    assert read_adapter(found).max_rank == 2


def test_a_local_directory_goes_before_the_hub(hub_cache: Path, tmp_path: Path) -> None:
    local = tmp_path / "tiny-org/sql-lora"
    local.mkdir(parents=True)
    assert resolve("tiny-org/sql-lora", tmp_path) == local
    assert hub_cache.is_dir()


@pytest.mark.parametrize("source", ["tiny-org/absent", "tiny-org/sql-lora@v2.0", "adapters/typo"])
@pytest.mark.usefixtures("hub_cache")
def test_hub_id_that_the_cache_lacks(tmp_path: Path, source: str) -> None:
    """The same text may be a mistyped directory: the message names both readings."""
    expected = (
        rf"'{source}': no directory .*no such model in the hub's cache.*HF_HUB_OFFLINE is set"
    )
    with pytest.raises(BaseModelError, match=expected) as caught:
        resolve(source, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub_cache")
def test_name_that_the_hub_does_not_allow(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such model in the hub's cache"):
        resolve("tiny-org/a..b", tmp_path)
