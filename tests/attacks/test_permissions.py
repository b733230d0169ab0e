"""A file that is there but may not be read: "permission denied", never "no such file"."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraexport.bench.results import read_results
from loraexport.bench.run import run, write_report
from loraexport.cli.app import main
from loraexport.errors import BaseModelError, SpecError, UsageError
from loraexport.graphs.files import read_graph
from loraexport.hf.checkpoint import read_checkpoint
from loraexport.hf.sentences.reader import read_tail
from loraexport.hf.sources import resolve_directory
from loraexport.hf.tokenizer import find_files
from loraexport.plan.starter import find_task, write_spec
from loraexport.spec.reader import read_spec
from loraexport_runtime.adapters.config import read_lora_config
from loraexport_runtime.adapters.tensor_files import read_header
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.errors import AdapterConfigError, LoraexportError, WeightsError

NOBODY = 65534
ROOT = Path(__file__).parents[2]


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
    ("modules.json", lambda file: read_tail(file.parent, "sentence-embedding"), BaseModelError),
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


@pytest.mark.parametrize("inner", ["", "artifact"])
def test_inspect_of_what_may_not_be_looked_at(
    folder: Path, inner: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is, an artifact, an adapter or a spec: that is not that nothing is there."""
    path = folder / "closed" / inner
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (folder / "closed").chmod(0)
    monkeypatch.setattr("sys.argv", ["loraexport", "inspect", str(path)])
    try:
        with as_other_user(), pytest.raises(SystemExit) as caught:
            main()
    finally:
        (folder / "closed").chmod(0o755)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"UsageError: {path}: permission denied; let this user read it\n"
    )


def test_a_spec_where_nothing_may_be_written(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0)
    try:
        with as_other_user(), pytest.raises(UsageError, match="permission denied") as caught:
            write_spec("base", ["adapter"], folder / "closed/spec.yaml")
    finally:
        (folder / "closed").chmod(0o755)
    assert "exists" not in str(caught.value)


def test_results_where_nothing_may_be_written(folder: Path) -> None:
    """Said before anything is measured."""
    results = read_results(ROOT / "docs/bench/bench.json")
    (folder / "file").touch()
    with pytest.raises(UsageError, match=r"file/bench: cannot be written \(Not a dir"):
        run(results.workloads, folder / "file/bench")
    (folder / "closed").mkdir(mode=0)
    try:
        with (
            as_other_user(),
            pytest.raises(UsageError, match=r"bench: cannot be written \(permission"),
        ):
            write_report(results, folder / "closed/bench")
    finally:
        (folder / "closed").chmod(0o755)


def test_a_directory_behind_a_closed_one(folder: Path) -> None:
    (folder / "closed/base").mkdir(parents=True)
    (folder / "closed").chmod(0)
    try:
        with as_other_user(), pytest.raises(BaseModelError, match="permission denied"):
            resolve_directory("closed/base", folder, BaseModelError)
    finally:
        (folder / "closed").chmod(0o755)
