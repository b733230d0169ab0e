"""Whether a session takes kernels: by what was asked, the artifact, the device and the package."""

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_small
from support.home import Home
from support.manifests import edit_manifest

import loraexport_runtime as lr
from loraexport_runtime.contract.manifest import Layer, Manifest
from loraexport_runtime.device import kernels as module
from loraexport_runtime.device.kernels import KernelChoice, Kernels, choose_kernels
from loraexport_runtime.errors import ArtifactError, InputError, ProviderError

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
CUDA: list[tuple[str, dict[str, Any]]] = [("CUDAExecutionProvider", {"device_id": 1})]
PACKAGE = """
from pathlib import Path

__version__ = "1.2"


def library_path():
    return Path(__file__).parent / "library.so"


def supported(capability):
    return capability >= (8, 0)
"""


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    """A masked layer whose graph calls a function."""
    return home.artifact(
        write_small, export={"strategy": "masked", "formats": ["onnx"], "kernels": True}
    )


@pytest.fixture
def manifest(artifact: Path) -> Manifest:
    return replace(Manifest.read(artifact), dtype="float16")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package, whose library is no library."""
    folder = tmp_path / "site/loraexport_kernels"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "library.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    monkeypatch.setattr(module, "compute_capability", lambda index: (9, 0 * index))
    yield folder
    sys.modules.pop(folder.name, None)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such package is installed."""
    monkeypatch.setattr(module, "_PACKAGE", "loraexport_kernels_that_nobody_has")


def test_a_gpu_takes_them(
    manifest: Manifest, package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of itself those that the artifact's proof has run."""
    said = "loraexport-kernels 1.2, not proven in its build: see check"
    with caplog.at_level(logging.INFO, logger="loraexport_runtime"):
        choice = choose_kernels(True, manifest, CUDA)
        assert choice == KernelChoice(package / "library.so", said)
    assert caplog.messages == [f"the sites of tiny run on {said}"]
    choice = choose_kernels("auto", manifest, CUDA)
    assert choice.library is None
    assert choice.said.startswith("stock operators: its proof did not run with kernels on CUDA; ")
    checked = (*manifest.parity.checked, "onnx-cuda-kernels")
    proven = replace(manifest, parity=replace(manifest.parity, checked=checked))
    for asked in ("auto", True):
        choice = choose_kernels(asked, proven, CUDA)  # type: ignore[arg-type]
        said = "loraexport-kernels 1.2, proven in its build"
        assert choice == KernelChoice(package / "library.so", said)


@pytest.mark.usefixtures("package")
def test_a_cpu_takes_them_only_where_they_are_asked_for(manifest: Manifest) -> None:
    choice = choose_kernels("auto", manifest, CPU)
    assert choice == KernelChoice(
        None, "stock operators: on a CPU kernels are taken by kernels=True alone"
    )
    assert choose_kernels(True, manifest, CPU).library is not None


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("providers", [CPU, CUDA])
def test_false_is_false(manifest: Manifest, providers: list[tuple[str, Any]]) -> None:
    choice = choose_kernels(False, manifest, providers)
    assert choice == KernelChoice(None, "stock operators: kernels=False")


def refused(manifest: Manifest, why: str) -> None:
    """auto goes on without, and says why; True is an error that does."""
    choice = choose_kernels("auto", manifest, CUDA)
    assert choice.library is None
    assert choice.said.startswith(f"stock operators: {why}")
    with pytest.raises(ProviderError) as raised:
        choose_kernels(True, manifest, CUDA)
    assert str(raised.value).startswith(f"kernels=True, but {why}")
    assert str(raised.value).endswith("; or pass kernels=False, for stock operators")


@pytest.mark.usefixtures("nothing")
def test_without_the_package(manifest: Manifest) -> None:
    refused(manifest, "loraexport-kernels is not installed; pip install")


@pytest.mark.usefixtures("package")
def test_without_functions(manifest: Manifest) -> None:
    plain = tuple(replace(layer, function=None) for layer in manifest.layers)
    why = "no graph of this artifact calls their functions; add export: {kernels: true}"
    refused(replace(manifest, layers=plain), why)


@pytest.mark.usefixtures("package")
def test_float32_on_cuda(manifest: Manifest) -> None:
    why = "on CUDA they are of float16 and bfloat16, and this is float32"
    refused(replace(manifest, dtype="float32"), why)


@pytest.mark.usefixtures("package")
def test_an_old_card(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_capability", lambda index: (7, 4 + index))
    refused(manifest, "they do not support this device, of compute capability 7.5")


@pytest.mark.parametrize("text", ["", "import nothing_of_this_name", "1 / 0"])
def test_a_damaged_package(manifest: Manifest, package: Path, text: str) -> None:
    (package / "__init__.py").write_text(text)
    refused(manifest, "loraexport-kernels is damaged: ")


@pytest.mark.parametrize("asked", ["True", "on", None, 1, 0])
def test_another_word(manifest: Manifest, asked: Kernels) -> None:
    with pytest.raises(InputError, match=r"kernels is .*; expected 'auto', True or False"):
        choose_kernels(asked, manifest, CPU)


@pytest.mark.usefixtures("package")
def test_a_library_that_cannot_be_loaded(artifact: Path) -> None:
    with pytest.raises(
        ProviderError, match=r"library.so: onnxruntime .* cannot take these kernels: (?s:.*)False"
    ):
        lr.load(artifact, kernels=True)


def test_a_session_says_what_it_runs_on(artifact: Path) -> None:
    with lr.load(artifact) as session:
        said = "stock operators: on a CPU kernels are taken by kernels=True alone"
        assert session.stats().kernels == said


def test_an_artifact_brings_no_library(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing: None
) -> None:
    """Whatever lies in it or in the working directory."""
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    (folder / "libloraexport_kernels.so").write_bytes(b"no library")
    monkeypatch.chdir(folder)
    with pytest.raises(ProviderError, match="loraexport-kernels is not installed"):
        lr.load(folder, kernels=True)
    with lr.load(folder) as session:
        assert session.stats().kernels.startswith("stock operators")


def test_the_manifest_names_the_functions(artifact: Path, home: Home, small: Path) -> None:
    def said(path: Path) -> tuple[Layer, str]:
        manifest = Manifest.read(path)
        return manifest.layers[0], manifest.to_json()

    layer, text = said(artifact)
    assert layer.function == "LoraAdd"
    assert '"function": "LoraAdd"' in text
    assert Manifest.read(artifact).functions == {"LoraAdd"}
    layer, text = said(small)  # as readers of before know it
    assert layer.function is None
    assert '"function"' not in text


@pytest.mark.parametrize("takes", ["function", "rank"])
def test_a_function_and_its_ranks_go_together(artifact: Path, tmp_path: Path, takes: str) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)

    def take(data: dict[str, Any]) -> None:
        layer = data["layers"][0]
        if takes == "function":
            del layer["function"]
        else:
            layer["stacks"] = [stack for stack in layer["stacks"] if stack["role"] != "rank"]

    edit_manifest(folder, take)
    with pytest.raises(ArtifactError, match=r"the rank stacks of layer .* do not tile it"):
        lr.load(folder)


def test_a_manifest_that_names_another_function(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    edit_manifest(folder, lambda data: data["layers"][0].update(function="LoraLinear2"))
    with pytest.raises(ArtifactError, match="it has no function 'LoraLinear2', which the manifest"):
        lr.load(folder)
    edit_manifest(folder, lambda data: data["layers"][0].update(function="Sigmoid"))
    with pytest.raises(ArtifactError, match=r"layers\[0\].function: expected one of .*'LoraAdd'"):
        lr.load(folder)
