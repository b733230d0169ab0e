"""Files that are there but may not be read: every reader says so, and none calls them missing."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.adapters import write_adapter

import loraexport_runtime as lr
from loraexport_runtime.adapters.config import read_lora_config
from loraexport_runtime.adapters.dora import find_base_weights
from loraexport_runtime.adapters.files import digest_adapter
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensor_files import read_header, read_tensors
from loraexport_runtime.contract.foreign import reason
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.manifest import Manifest

NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who is not root: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that others may enter, which they may not pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for each in (path, *path.iterdir()):
        each.chmod(0o755)
    shutil.rmtree(path)


def close(path: Path) -> Path:
    path.chmod(0)
    return path


def adapter(folder: Path) -> Path:
    path = write_adapter(folder / "adapter", {"up": (4, 4)})
    path.chmod(0o755)
    return path


def config_of_an_adapter(folder: Path) -> Callable[[], object]:
    path = adapter(folder)
    close(path / "adapter_config.json")
    return lambda: read_lora_config(path)


def weights_of_an_adapter(folder: Path) -> Callable[[], object]:
    path = adapter(folder)
    close(path / "adapter_model.safetensors")
    return lambda: read_adapter(path)


def folder_of_an_adapter(folder: Path) -> Callable[[], object]:
    path = close(adapter(folder))
    return lambda: read_adapter(path)


def digest_of_an_adapter(folder: Path) -> Callable[[], object]:
    path = adapter(folder)
    close(path / "adapter_model.safetensors")
    return lambda: digest_adapter(path)


def header_of_a_file(folder: Path) -> Callable[[], object]:
    save_file({"a": np.zeros(2, np.float32)}, folder / "x.safetensors")
    close(folder / "x.safetensors")
    return lambda: read_header(folder / "x.safetensors")


def tensors_of_a_file(folder: Path) -> Callable[[], object]:
    save_file({"a": np.zeros(2, np.float32)}, folder / "x.safetensors")
    header = read_header(folder / "x.safetensors")
    close(folder / "x.safetensors")
    return lambda: read_tensors(header.items())


def base_of_dora(folder: Path) -> Callable[[], object]:
    (folder / "base").mkdir()
    close(folder / "base")
    return lambda: find_base_weights(folder / "base", {"up": "digest"})


def config_of_genai(folder: Path) -> Callable[[], object]:
    (folder / "genai_config.json").write_text("{}")
    close(folder / "genai_config.json")
    return lambda: read_genai_config(folder)


READERS = (
    config_of_an_adapter,
    weights_of_an_adapter,
    folder_of_an_adapter,
    digest_of_an_adapter,
    header_of_a_file,
    tensors_of_a_file,
    base_of_dora,
    config_of_genai,
)


@pytest.mark.parametrize("prepare", READERS, ids=lambda reader: reader.__name__)
def test_a_reader(folder: Path, prepare: Callable[[Path], Callable[[], object]]) -> None:
    read = prepare(folder)
    text = rf"^{folder}.*: permission denied; let this user read it$"
    with pytest.raises(lr.LoraexportError, match=text), without_rights():
        read()


@pytest.mark.parametrize("file", ["manifest.json", "graphs/up.onnx"])
def test_a_file_of_an_artifact(tenants: Path, folder: Path, file: str) -> None:
    artifact = folder / "artifact"
    shutil.copytree(tenants, artifact)
    for each in (artifact, *artifact.rglob("*")):
        each.chmod(0o755)
    Manifest.read(artifact).check_files(artifact)
    close(artifact / file)
    text = rf"^{artifact / file}: permission denied; let this user read it$"
    with pytest.raises(lr.ArtifactError, match=text), without_rights():
        lr.load(artifact)


def test_what_is_missing_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problems = {"none": "no such file", "file/none": "Not a directory"}
    for path, problem in problems.items():
        with pytest.raises(OSError, match=r"No such file|Not a directory") as caught:
            (tmp_path / path).read_bytes()
        assert reason(caught.value) == problem
        with pytest.raises(lr.WeightsError, match=rf"^{tmp_path / path}.*: {problem}$"):
            digest_adapter(tmp_path / path)
    with pytest.raises(OSError, match="Is a directory") as caught:
        tmp_path.read_bytes()
    assert reason(caught.value) == "a folder, where a file has to be"
