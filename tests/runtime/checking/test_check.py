"""The command on an artifact of layers: every exit code in a process without torch, planted faults,
and what is said on stdout and stderr."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project
from support.checks import run_check, scale_adapter, seal, swap_slots
from support.manifests import edit_manifest
from support.models import write_base

from loraexport.parity.layers.check import check
from loraexport.pipeline.build import build
from loraexport.spec.reader import read_spec
from loraexport_runtime import ArtifactError, ProviderError
from loraexport_runtime import __main__ as command
from loraexport_runtime.__main__ import main
from loraexport_runtime.checking import check as checking
from loraexport_runtime.checking.check import check_artifact
from loraexport_runtime.checking.layers import load_reference
from loraexport_runtime.contract.files import MANIFEST_FILE, digest_file
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.slots import host

CASES = "parity/cases.safetensors"


@pytest.fixture
def artifact(tenants: Path, tmp_path: Path) -> Path:
    """An artifact of three layers and two loaded adapters, to change."""
    return Path(shutil.copytree(tenants, tmp_path / "artifact"))


class TestExitCodes:
    def test_passed_is_0(self, tenants: Path) -> None:
        done = run_check("check", tenants, "--providers", "cpu")
        assert (done.code, done.err) == (0, "")
        *table, verdict, digest = done.out.splitlines()
        assert [line.split()[:2] for line in table[1:]] == [
            ["onnx-cpu", layer] for layer in ("qkv", "up", "words")
        ]
        assert all(line.endswith("  ok") for line in table[1:])
        assert verdict == (
            f"passed: {tenants}: 15 of 15 comparisons with the stored cases, tolerance 2e-05"
        )
        assert digest == f"digest: {digest_file(tenants / MANIFEST_FILE)}"

    def test_usage_is_2(self, tenants: Path) -> None:
        for arguments in ([], ["check"], ["check", tenants, "--no-such-option"], ["chek", tenants]):
            done = run_check(*arguments)
            assert (done.code, done.out) == (2, "")
            assert done.err.startswith("usage: python -m loraexport_runtime")

    def test_a_provider_that_is_not_one_is_2(self, tenants: Path) -> None:
        done = run_check("check", tenants, "--providers", "cpu,tpu", "--json")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("ProviderError: tpu is not part of this onnxruntime ")
        assert done.err.count("\n") == 1

    def test_ctrl_c_is_130(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(*_: Any) -> None:
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(command, "check_artifact", stop)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
        try:
            assert command.main(["check", "artifact"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)
        assert capsys.readouterr() == ("", "Stopped: by SIGINT\n")

    def test_another_adapter_is_3(self, artifact: Path) -> None:
        """Its own digest is right, so nothing but the cases can tell: B is 1 % too large."""
        scale_adapter(artifact, "chat", 1.01)
        done = run_check("check", artifact, "--providers", "cpu")
        assert done.code == 3
        assert "FAILED" in done.out
        assert f"failed: {artifact}: 13 of 15 comparisons" in done.out
        assert done.err.startswith(
            "2 of 15 comparisons failed. Worst: onnx-cpu, layer 'qkv', site 'blocks.0."
        )
        for word in (
            "adapter 'chat', case '",
            " is above 2e-05 (parity.tolerance) and its gain of 1.0100 is off 1 by more than 1e-04"
            " (parity.gain). Do not serve",
        ):
            assert word in done.err
        assert done.err.count("\n") == 1

    def test_an_adapter_that_cannot_be_used_is_4(self, artifact: Path) -> None:
        file = artifact / "adapters/sql/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"no_such_key": 1}))
        seal(artifact)
        done = run_check("check", artifact, "--providers", "cpu")
        assert (done.code, done.out) == (4, "")
        assert done.err.startswith("AdapterConfigError: ")

    @pytest.mark.parametrize("name", ["graphs/up.onnx", CASES])
    def test_a_damaged_file_is_5(self, artifact: Path, name: str) -> None:
        content = bytearray((artifact / name).read_bytes())
        content[-1] ^= 1
        (artifact / name).write_bytes(content)
        done = run_check("check", artifact, "--json")
        assert (done.code, done.out) == (5, "")
        assert done.err.startswith(f"ArtifactError: {artifact / name}: its sha256 differs from the")

    def test_the_pinned_digest(self, tenants: Path) -> None:
        digest = digest_file(tenants / MANIFEST_FILE)
        options = ("--providers", "cpu", "--json", "--digest")
        done = run_check("check", tenants, *options, digest.upper())
        assert (done.code, done.data["digest"]) == (0, digest)
        other = "0" * 64
        done = run_check("check", tenants, *options, other)
        assert (done.code, done.out) == (5, "")
        assert f"its sha256 is {digest}, but the pinned digest is {other}" in done.err
        done = run_check("check", tenants, *options, digest[:-1])
        assert (done.code, done.out) == (2, "")
        assert "expected the 64 hexadecimal digits of the sha256 of manifest.json" in done.err

    def test_as_a_user_types_it(self, tenants: Path) -> None:
        command = [sys.executable, "-m", "loraexport_runtime", "check", tenants, "--providers=cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\npassed: " in done.stdout


class TestFaults:
    """Of the runtime, as another version of it might have them."""

    def test_scaling(self, tenants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pack = host.pack

        def mutated(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
            return pack(layer, weights, scale * 1.002, *rest)

        monkeypatch.setattr(host, "pack", mutated)
        report = check_artifact(tenants, ["cpu"])
        assert report.status == "failed"
        assert {row.adapter for row in report.failures} == {"sql", "chat"}
        assert all(row.gain == pytest.approx(1.002, abs=1e-5) for row in report.failures)

    def test_slots_in_another_order(self, artifact: Path) -> None:
        """Each adapter alone is right; batches that mix them are other batches."""
        swap_slots(artifact)
        report = check_artifact(artifact, ["cpu"])
        assert report.status == "failed"
        mixed = {"mixed", "repeated-slots", "uneven-and-empty", "one-token"}
        assert {row.worst_case for row in report.failures} <= mixed

    def test_nan_is_null_in_json(
        self, tenants: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pack = host.pack

        def broken(*args: Any) -> Any:
            return {name: block * np.float32("nan") for name, block in pack(*args).items()}

        monkeypatch.setattr(host, "pack", broken)
        assert main(["check", str(tenants), "--providers", "cpu", "--json"]) == 3
        shown = capsys.readouterr()
        data = json.loads(shown.out, parse_constant=pytest.fail)
        failed = [row for row in data["rows"] if not row["passed"]]
        assert failed
        assert all(row["error"] is None for row in failed)
        assert "error of nan is above 2e-05 (parity.tolerance)" in shown.err


class TestParityOfTheBuild:
    @pytest.mark.parametrize(
        ("status", "code", "text"),
        [
            ("deferred", 0, "its parity is deferred, so load() refuses it. Run 'loraexport verify"),
            ("failed", 3, "its parity failed when it was built; do not serve it, build it again"),
        ],
    )
    def test_unproven(
        self, artifact: Path, capsys: pytest.CaptureFixture[str], status: str, code: int, text: str
    ) -> None:
        edit_manifest(artifact, lambda data: data["parity"].update(status=status))
        assert main(["check", str(artifact), "--providers", "cpu"]) == code
        assert text in capsys.readouterr().err

    def test_the_tolerance_is_that_of_the_build(self, artifact: Path) -> None:
        """parity.tolerance of the spec; the gain's stays as it is."""
        edit_manifest(artifact, lambda data: data["parity"].update(tolerance=1e-9))
        report = check_artifact(artifact, ["cpu"])
        assert (report.tolerance, report.status) == (1e-9, "failed")
        exact = [row for row in report.rows if row.passed]
        assert exact
        assert all(row.error <= 1e-9 for row in exact)

    def test_the_exporter_compares_alike(self, tenants: Path) -> None:
        manifest = Manifest.read(tenants)
        reference = load_reference(tenants, manifest)
        spec = read_spec(tenants / "spec.yaml")
        verified = check(tenants, manifest, spec, reference, (), ["cpu"], False)
        rows = [row for row in verified.rows if row.implementation == "onnx-cpu"]
        assert check_artifact(tenants, ["cpu"]).rows == tuple(rows)


class TestStoredCases:
    def test_none(self, artifact: Path) -> None:
        edit_manifest(artifact, lambda data: data["files"].pop(CASES))
        with pytest.raises(ArtifactError, match="the artifact holds no stored cases; build it"):
            check_artifact(artifact, ["cpu"])

    def test_no_adapter_starts_loaded(self, artifact: Path) -> None:
        edit_manifest(artifact, lambda data: [one.update(slot=None) for one in data["adapters"]])
        with pytest.raises(ArtifactError, match="the artifact holds no stored cases; build it"):
            check_artifact(artifact, ["cpu"])

    @pytest.mark.parametrize("name", ["up/x", "qkv/y/mixed", "words/y/", "up/y/alone-chat"])
    def test_of_another_manifest(self, artifact: Path, name: str) -> None:
        arrays = load_file(artifact / CASES)
        save_file(arrays | {name: arrays[name][:-1]}, artifact / CASES)
        seal(artifact)
        with pytest.raises(ArtifactError, match=r"has shape \[\d.*\], so these are not the cases"):
            check_artifact(artifact, ["cpu"])
        del arrays[name]
        save_file(arrays, artifact / CASES)
        seal(artifact)
        with pytest.raises(ArtifactError, match=f"'{name}' is missing, so these are not the cases"):
            check_artifact(artifact, ["cpu"])

    @pytest.mark.parametrize("content", [b"", b"\xff" * 40])
    def test_no_safetensors(self, artifact: Path, content: bytes) -> None:
        (artifact / CASES).write_bytes(content)
        seal(artifact)
        with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
            check_artifact(artifact, ["cpu"])

    def test_a_dtype_of_no_case(self, artifact: Path) -> None:
        arrays = load_file(artifact / CASES)
        arrays["up/x"] = arrays["up/x"].astype(np.float64)
        save_file(arrays, artifact / CASES)
        seal(artifact)
        with pytest.raises(ArtifactError, match=r"cannot be read as safetensors \('F64'\)"):
            check_artifact(artifact, ["cpu"])


class TestWhatRunsHere:
    def test_without_cuda_that_is_said(
        self, tenants: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(checking, "why_no_cuda", lambda: "no CUDA here")
        assert main(["check", str(tenants)]) == 0
        shown = capsys.readouterr()
        assert "\nnot run: onnx-cuda: no CUDA here\n" in shown.out
        assert shown.err == ""

    def test_nothing_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """bfloat16 graphs, which the CPU cannot run."""
        monkeypatch.setattr(checking, "why_no_cuda", lambda: "no CUDA here")
        monkeypatch.setattr("loraexport.parity.implementations.has_cuda", lambda: False)
        write_base(tmp_path / "base")
        write_adapter(tmp_path / "sql", {"blocks.0.q": (32, 32)})
        layer = {"name": "q", "type": "linear", "site": "blocks.0.q"}
        spec = Project(tmp_path).spec(
            base={"kind": "layers", "path": "base", "layers": [layer]},
            adapters=[{"name": "sql", "path": "sql"}],
            export={"dtype": "bfloat16", "formats": ["onnx"], "strategy": "masked"},
            parity={"onnx": "deferred"},
        )
        folder, _ = build(spec, tmp_path / "out")
        with pytest.raises(ProviderError, match="CPU provider has no bfloat16 MatMul, and no CUDA"):
            check_artifact(folder)
        assert load_reference(folder, Manifest.read(folder)).inputs["q"].dtype.name == "bfloat16"
