"""A file that is there but may not be read: "permission denied", never "no such file"."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraexport.errors import BaseModelError, SpecError
from loraexport.graphs.files import read_graph
from loraexport.hf.checkpoint import read_checkpoint
from loraexport.hf.pooling import SentencePooling
from loraexport.hf.sources import resolve_directory
from loraexport.hf.tokenizer import find_files
from loraexport.plan.starter import find_task
from loraexport.spec.reader import read_spec
from loraexport_runtime.adapters.config import read_lora_config
from loraexport_runtime.adapters.tensor_files import read_header
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.errors import AdapterConfigError, LoraexportError, WeightsError

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where any user may look: pytest's own folders are of one user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def as_other_user() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


READERS: list[tuple[str, Callable[[Path], object], type[LoraexportError]]] = [
    ("model.safetensors", lambda file: read_header(file), WeightsError),
    ("model.safetensors", lambda file: read_checkpoint(file.parent), WeightsError),
    ("model.safetensors.index.json", lambda file: read_checkpoint(file.parent), BaseModelError),
    ("modules.json", lambda file: SentencePooling.read(file.parent), BaseModelError),
    ("tokenizer.json", lambda file: find_files(file.parent), BaseModelError),
    ("config.json", lambda file: find_task(file.parent), BaseModelError),
    ("model.onnx", lambda file: read_graph(file), BaseModelError),
    (
        "genai_config.json",
        lambda file: read_genai_config(file.parent, BaseModelError),
        BaseModelError,
    ),
    ("adapter_config.json", lambda file: read_lora_config(file.parent), AdapterConfigError),
    ("spec.yaml", lambda file: read_spec(file), SpecError),
]


@pytest.mark.parametrize(("name", "read", "error"), READERS, ids=[one[0] for one in READERS])
def test_a_file_that_may_not_be_read(
    folder: Path, name: str, read: Callable[[Path], object], error: type[LoraexportError]
) -> None:
    file = folder / name
    file.write_text("{}")
    file.chmod(0)
    with as_other_user(), pytest.raises(error) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "permission denied" in str(caught.value).lower()
    assert "no such file" not in str(caught.value)


CLOSED = [one for one in READERS if one[0] != "tokenizer.json"]
"""A tokenizer is looked for where config.json has been read."""


@pytest.mark.parametrize(("name", "read"), [one[:2] for one in CLOSED], ids=[o[0] for o in CLOSED])
def test_a_file_in_a_folder_that_may_not_be_entered(
    folder: Path, name: str, read: Callable[[Path], object]
) -> None:
    (folder / "base").mkdir()
    (folder / "base" / name).write_text("{}")
    (folder / "base").chmod(0)
    try:
        with as_other_user(), pytest.raises(LoraexportError) as caught:
            read(folder / "base" / name)
    finally:
        (folder / "base").chmod(0o755)
    assert str(folder / "base") in str(caught.value)
    assert "permission denied" in str(caught.value).lower()


def test_a_directory_behind_a_closed_one(folder: Path) -> None:
    (folder / "closed/base").mkdir(parents=True)
    (folder / "closed").chmod(0)
    try:
        with as_other_user(), pytest.raises(BaseModelError, match="permission denied"):
            resolve_directory("closed/base", folder, BaseModelError)
    finally:
        (folder / "closed").chmod(0o755)
