"""The public names of both packages, and the face of the exporter; everything else may move."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.builds import write_one_layer

import loraexport
import loraexport_kernels
import loraexport_runtime
import loraexport_serve
from loraexport.artifact import mark_verified
from loraexport.parity.report import Report
from loraexport.plan.plan import Plan
from loraexport_runtime.contract.manifest import Manifest

EXPORTER = {
    "AdapterError",
    "ArtifactError",
    "BaseModelError",
    "BatchError",
    "BuildBusyError",
    "BuildResult",
    "DiskFullError",
    "ExportError",
    "LoraexportError",
    "ParityError",
    "ProviderError",
    "SpecError",
    "UsageError",
    "VerifyResult",
    "WeightsError",
    "__version__",
    "build",
    "make_plan",
    "verify",
}
RUNTIME = {
    "AdapterConfigError",
    "AdapterError",
    "AdapterInfo",
    "AdapterWeightsError",
    "ArtifactError",
    "ArtifactSession",
    "BatchError",
    "Batcher",
    "BatcherStats",
    "ChatTemplateError",
    "ClosedError",
    "Completion",
    "GeneratedAnswer",
    "GeneratedToken",
    "Generation",
    "GenerationDefaults",
    "GenerationEngine",
    "GenerationHandle",
    "GenerationRequest",
    "GenerationStats",
    "Grammar",
    "InputError",
    "LayerSession",
    "LayersSession",
    "LoraexportError",
    "ModelSession",
    "NoNumberError",
    "Piece",
    "ProviderError",
    "QueueFullError",
    "RequestTimeoutError",
    "SegmentsError",
    "SessionStats",
    "SlotTimeoutError",
    "SlotsExceededError",
    "StepError",
    "TextGenerator",
    "Tokenizer",
    "UnknownAdapterError",
    "UnknownLayerError",
    "WeightsError",
    "__version__",
    "load",
    "load_generator",
    "load_layers",
    "load_model",
}
SERVE = {
    "ApiError",
    "ModelSettings",
    "Settings",
    "SettingsError",
    "__version__",
    "read_settings",
    "serve",
}
KERNELS = {"__version__", "library_path", "supported"}


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (loraexport, EXPORTER),
        (loraexport_runtime, RUNTIME),
        (loraexport_serve, SERVE),
        (loraexport_kernels, KERNELS),
    ],
    ids=["loraexport", "loraexport_runtime", "loraexport_serve", "loraexport_kernels"],
)
def test_the_names_of_a_package(package: object, names: set[str]) -> None:
    listed = list(package.__all__)  # type: ignore[attr-defined]
    assert sorted(listed) == sorted(names)
    for name in listed:
        assert getattr(package, name) is not None


def test_an_import_brings_no_torch() -> None:
    code = "import sys, loraexport; print({'torch', 'transformers', 'onnx'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("kind", [str, Path])
def test_build_plan_and_verify_give_values(tmp_path: Path, kind: type) -> None:
    spec, stages, proof = write_one_layer(tmp_path), list[str](), list[str]()
    planned = list[str]()
    plan = loraexport.make_plan(kind(spec), progress=planned.append)
    assert planned == ["read the spec", "plan"]
    assert isinstance(plan, Plan)
    assert [layer.layer.name for layer in plan.layers] == ["q"]
    built = loraexport.build(kind(spec), out=kind(tmp_path / "out"), progress=stages.append)
    assert built.folder == tmp_path / "out/tiny"
    assert isinstance(built.report, Report)
    assert built.report.status == "passed"
    assert stages == ["plan", "read weights", "export q to TorchScript", "verify", "publish"]
    verified = loraexport.verify(
        kind(built.folder), base=kind(tmp_path / "base"), torchscript=True, progress=proof.append
    )
    assert (verified.folder, verified.report.status) == (built.folder, "passed")
    assert not verified.published  # it was published verified
    assert proof == ["run every implementation"]
    with pytest.raises(AttributeError):
        built.folder = tmp_path  # type: ignore[misc]


def test_a_deferred_artifact_is_verified_by_a_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32, deferred or not, every graph runs here; only the mark is missing."""
    built = loraexport.build(write_one_layer(tmp_path), tmp_path / "out")
    manifest = built.folder / "manifest.json"
    read = Manifest.read(built.folder)
    mark_verified(built.folder, read, replace(read.parity, status="deferred"))
    before = manifest.read_bytes()
    assert loraexport.verify(built.folder, torchscript=True).published
    assert manifest.read_bytes() != before
    assert Manifest.read(built.folder).parity.status == "passed"
    assert not loraexport.verify(built.folder, torchscript=True).published


def test_errors_come_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(loraexport.SpecError, match="no such file"):
        loraexport.build(str(tmp_path / "missing.yaml"), out=tmp_path)
    with pytest.raises(loraexport.ArtifactError):
        loraexport.verify(str(tmp_path))
