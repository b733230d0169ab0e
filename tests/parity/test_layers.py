"""Verify finds planted faults, and says what it compared with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapters import write_adapter
from support.builds import Project
from support.models import write_base

import loraexport.bases.layers as layers_module
from loraexport.errors import BaseModelError, ParityError, UsageError
from loraexport.lora import segmented, segments
from loraexport.pipeline.build import build
from loraexport.pipeline.verify import verify_artifact
from loraexport_runtime.checking.rows import LAYER_TOLERANCES, CasePart, compare
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.slots.host import AdapterHost


def up_only(project: Project, dtype: str = "float32", **changes: Any) -> Path:
    """A spec with one layer, so that a build is quick; A of sql is square to be transposable."""
    layer = {"name": "q", "type": "linear", "site": "blocks.0.q"}
    write_adapter(project.folder / "sql", {"blocks.0.q": (32, 32)}, rank=4, seed=1)
    write_adapter(project.folder / "wide", {"blocks.0.q": (32, 32)}, rank=32, seed=3)
    return project.spec(
        base={"kind": "layers", "path": "base", "layers": [layer]},
        adapters=[{"name": "sql", "path": "sql"}, {"name": "wide", "path": "wide"}],
        export={"dtype": dtype, "strategy": "masked"},
        **changes,
    )


def expect_failure(spec: Path, implementation: str) -> None:
    out = spec.parent / "artifacts"
    with pytest.raises(ParityError, match="nothing was published") as caught:
        build(spec, out)
    assert f"loraexport verify {out / 'tiny.failed'}" in str(caught.value)
    assert not (out / "tiny").exists()
    report = json.loads((out / "tiny.failed/parity/parity.json").read_text())
    assert report["status"] == "failed"
    failed = {row["implementation"] for row in report["rows"] if not row["passed"]}
    assert implementation in failed
    assert "FAILED" in (out / "tiny.failed/parity/parity.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mutated_scaling_fails(
    project: Project, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    pack = layers_module.pack

    def mutated(layer: Any, weights: Any, scale: float, dtype: np.dtype) -> Any:
        return pack(layer, weights, scale * 1.02, dtype)

    monkeypatch.setattr(layers_module, "pack", mutated)
    expect_failure(up_only(project, dtype), "onnx-cpu-plain")


def test_mutated_scaling_of_the_loop_fails(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rsLoRA forgotten: alpha / r instead of alpha / sqrt(r)."""
    pack = segmented._pack_true_ranks

    def mutated(*args: Any) -> Any:
        packed = pack(*args)
        return replace(packed, scalings=[one / 2 for one in packed.scalings])

    monkeypatch.setattr(segmented, "_pack_true_ranks", mutated)
    expect_failure(up_only(project), "torchscript-cpu")


def test_swapped_slot_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = layers_module.assemble

    def swapped(stack: Any, dtype: np.dtype, base_rows: Any, blocks: Any) -> np.ndarray:
        return assemble(stack, dtype, base_rows, {1: blocks[2], 2: blocks[1]})

    monkeypatch.setattr(layers_module, "assemble", swapped)
    expect_failure(up_only(project), "onnx-cpu-plain")


def test_transposed_a_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = layers_module.pack

    def transposed(layer: Any, weights: Any, scale: float, dtype: np.dtype) -> Any:
        turned = {
            site: replace(one, a=one.a.T) if one.a.shape[0] == one.a.shape[1] else one
            for site, one in weights.items()
        }
        return pack(layer, turned, scale, dtype)

    monkeypatch.setattr(layers_module, "pack", transposed)
    expect_failure(up_only(project), "onnx-cpu-plain")


def test_dropped_segment_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph forgets one segment's end, so its tokens take the slot before it."""
    forward = segments.TokenSegments.forward

    def dropped(self: Any, seg_indptr: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return (forward(self, seg_indptr, num_tokens) - 1).clamp(min=0)

    monkeypatch.setattr(segments.TokenSegments, "forward", dropped)
    expect_failure(up_only(project), "onnx-cpu")


def test_fault_of_the_runtime_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows = AdapterHost._read_rows

    def mutated(self: AdapterHost, path: Path, scale: float, *rest: Any) -> Any:
        return read_rows(self, path, scale * 1.01, *rest)

    monkeypatch.setattr(AdapterHost, "_read_rows", mutated)
    expect_failure(up_only(project), "onnx-cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_base(folder / "base")
    return build(up_only(Project(folder)), folder / "artifacts")[0]


def test_report_covers_every_implementation_adapter_and_site(artifact: Path) -> None:
    report = json.loads((artifact / "parity/parity.json").read_text())
    rows = {(row["implementation"], row["adapter"]) for row in report["rows"]}
    implementations = {
        "eager",
        "eager-segmented",
        "torchscript-cpu",
        "onnx-cpu",
        "onnx-cpu-plain",
    }
    assert implementations <= {implementation for implementation, _ in rows}
    for implementation in implementations:
        assert {"base", "sql", "wide"} == {who for name, who in rows if name == implementation}
    adapted = [row for row in report["rows"] if row["adapter"] != "base"]
    assert all(abs(row["gain"] - 1) < 1e-4 for row in adapted)
    assert all(row["cosine"] > 0.999999 for row in adapted)
    assert Manifest.read(artifact).parity.status == "passed"


def test_verify_with_the_base_uses_the_oracle(artifact: Path) -> None:
    report = verify_artifact(artifact, Manifest.read(artifact), artifact.parent.parent / "base")
    assert report.status == "passed"
    assert report.reference == "the float64 oracle"
    assert "eager" in {row.implementation for row in report.rows}


def test_verify_without_the_base_uses_the_stored_cases(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "far/away/copy")
    report = verify_artifact(copy, Manifest.read(copy))
    assert report.status == "passed"
    assert report.reference.startswith("the stored cases (no base here")
    why = "it is code that the artifact brings; where you trust it, add --torchscript"
    assert report.skipped == {"eager": "the base is not here", "torchscript": why}


def test_verify_runs_no_torchscript_unasked(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.jit loads may write files; of an artifact from elsewhere nothing loads it."""
    manifest = Manifest.read(artifact)
    ran = {row.implementation for row in verify_artifact(artifact, manifest, torchscript=True).rows}
    assert "torchscript-cpu" in ran

    def refuse(*_: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch.jit, "load", refuse)
    report = verify_artifact(artifact, manifest)
    assert {row.implementation for row in report.rows} == ran - {"torchscript-cpu"}
    assert report.status == "passed"


@pytest.mark.parametrize("start", ["around the artifact", "the working directory"])
def test_verify_finds_a_base_of_a_relative_path(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """By its digest: another base of this name, looked at first, is not it."""
    weight = np.ones((32, 32), np.float32)
    write_base(tmp_path / "here/base", {"blocks.0.q.weight": weight})
    monkeypatch.chdir(tmp_path / "here")
    copy = artifact
    if start == "the working directory":
        monkeypatch.chdir(artifact.parent.parent)
        copy = shutil.copytree(artifact, tmp_path / "far/away/copy")
    report = verify_artifact(copy, Manifest.read(copy))
    assert report.reference == "the float64 oracle"


def test_verify_refuses_a_base_for_a_seed(project: Project) -> None:
    layer = {"name": "q", "type": "linear", "site": "blocks.0.q", "in_features": 32}
    layer["out_features"] = 32
    base = {"kind": "layers", "init": {"seed": 1}, "layers": [layer]}
    write_adapter(project.folder / "sql", {"blocks.0.q": (32, 32)})
    spec = project.spec(
        base=base, adapters=[{"name": "sql", "path": "sql"}], export={"formats": ["torchscript"]}
    )
    folder, report = build(spec, project.folder / "artifacts")
    assert report.skipped == {"onnx": "the spec does not ask for it"}
    with pytest.raises(UsageError, match="drawn from a seed; leave --base out"):
        verify_artifact(folder, Manifest.read(folder), project.folder / "base", torchscript=True)
    proven = verify_artifact(folder, Manifest.read(folder), torchscript=True)
    assert proven.reference == "the float64 oracle"


def test_an_output_of_nan_fails_and_is_null_in_json(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = layers_module.assemble

    def broken(*args: Any) -> np.ndarray:
        return assemble(*args) * np.float32("nan")

    monkeypatch.setattr(layers_module, "assemble", broken)
    expect_failure(up_only(project), "eager")
    failed = project.folder / "artifacts/tiny.failed"
    assert "NaN" not in (failed / "parity/parity.json").read_text()
    assert Manifest.read(failed).parity.max_error is None


def test_verify_refuses_another_base(artifact: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(9).standard_normal((32, 32)).astype(np.float32)
    other = write_base(tmp_path / "other", {"blocks.0.q.weight": weight})
    with pytest.raises(BaseModelError, match="its weights differ from those"):
        verify_artifact(artifact, Manifest.read(artifact), other)


def test_bfloat16_needs_cuda_or_a_deferral(project: Project) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device proves bfloat16")
    out = project.folder / "artifacts"
    with pytest.raises(ParityError, match=r"parity: \{onnx: deferred\}"):
        build(up_only(project, "bfloat16"), out)
    assert not list(out.glob("*"))
    folder, report = build(up_only(project, "bfloat16", parity={"onnx": "deferred"}), out)
    assert report.status == Manifest.read(folder).parity.status == "deferred"
    assert "no bfloat16 MatMul" in report.skipped["onnx"]
    assert {row.implementation for row in report.rows} >= {"eager", "torchscript-cpu"}


def test_an_adapter_that_does_nothing_is_named(project: Project) -> None:
    spec = up_only(project, parity={"tokens": 8})
    zero = {"base_model.model.blocks.0.q.lora_B.weight": np.zeros((32, 4), np.float32)}
    write_adapter(project.folder / "sql", {"blocks.0.q": (32, 32)}, tensors=zero)
    _, report = build(spec, project.folder / "artifacts")
    assert report.silent_adapters == ("sql",)


def rows_of(change: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Does `compare` pass an output that is the reference but for `change` of the delta?"""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((40, 32))
    delta = generator.standard_normal((40, 32)) * 0.02
    labels = ("test", "layer", "site", "adapter")
    output = base + change(delta)
    row = compare(
        labels, [CasePart("case", output, base + delta, base, base)], LAYER_TOLERANCES["bfloat16"]
    )
    return row.passed


def test_gain_sees_a_wrong_scaling_that_the_error_hides() -> None:
    """bfloat16 may be off by 3 % of y; a delta of 2 % of y must be right all the same."""
    assert rows_of(lambda delta: delta)
    assert not rows_of(lambda delta: 2 * delta)
    assert not rows_of(lambda delta: 0 * delta)
    assert not rows_of(lambda delta: delta * np.nan)
