"""Artifacts that are damaged or made to harm: each is an ArtifactError that says where."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.manifests import edit_manifest, write_manifest

import loraexport_runtime as lr
from loraexport_runtime.contract import manifest as manifest_module
from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.manifest import FORMAT_VERSION, Manifest, ParitySummary
from loraexport_runtime.contract.seal import DIGEST_FILE, digest_line

GRAPH = "graphs/up.onnx"


@pytest.fixture
def artifact(tenants: Path, tmp_path: Path) -> Path:
    """A whole artifact to damage."""
    return Path(shutil.copytree(tenants, tmp_path / "artifact"))


def refuse(folder: Path, text: str) -> None:
    with pytest.raises(lr.ArtifactError, match=text):
        lr.load(folder, threads=1)


class TestDamagedFiles:
    def test_truncated(self, artifact: Path) -> None:
        size = (artifact / GRAPH).stat().st_size
        with (artifact / GRAPH).open("r+b") as file:
            file.truncate(size - 1)
        refuse(
            artifact,
            rf"graphs/up\.onnx: {size - 1} bytes, but the manifest says {size}; copy the artifact",
        )

    def test_grown(self, artifact: Path) -> None:
        with (artifact / GRAPH).open("ab") as file:
            file.write(b"\0")
        refuse(artifact, r"graphs/up\.onnx: \d+ bytes, but the manifest says \d+")

    @pytest.mark.parametrize(
        "name",
        [GRAPH, "adapters/spare/adapter_model.safetensors", "parity/parity.md", "spec.yaml"],
    )
    def test_flipped_bit(self, artifact: Path, name: str) -> None:
        data = bytearray((artifact / name).read_bytes())
        data[len(data) // 2] ^= 1
        (artifact / name).write_bytes(bytes(data))
        refuse(artifact, rf"{re.escape(name)}: its sha256 differs from the manifest's: the file")

    def test_missing(self, artifact: Path) -> None:
        (artifact / GRAPH).unlink()
        refuse(artifact, r"up\.onnx: listed in manifest\.json but missing; copy the artifact again")

    def test_folder_in_a_files_place(self, artifact: Path) -> None:
        (artifact / GRAPH).unlink()
        (artifact / GRAPH).mkdir()
        refuse(artifact, r"up\.onnx: listed in manifest\.json but missing; copy the artifact again")

    def test_a_file_that_nothing_lists_is_left_alone(self, artifact: Path) -> None:
        (artifact / "notes.txt").write_text("ours")
        assert list(lr.load(artifact, threads=1)) == ["qkv", "up", "words"]


def list_file(data: dict[str, Any], path: str) -> None:
    data["files"][path] = data["files"][GRAPH]


class TestPathsThatLeave:
    """No path of a manifest may name a file outside the artifact, in any of its places."""

    LEAVING = (
        "../outside",
        "graphs/../../outside",
        "/etc/hostname",
        "//etc/hostname",
        "graphs\\up.onnx",
        "..\\outside",
        "",
        "graphs/up\0.onnx",
    )

    @pytest.mark.parametrize("path", LEAVING)
    def test_among_the_files(self, artifact: Path, path: str) -> None:
        edit_manifest(artifact, lambda data: list_file(data, path))
        refuse(artifact, r"the manifest's path .* leaves the artifact's folder, so nothing is read")

    @pytest.mark.parametrize("key", ["onnx", "torchscript", "base_rows"])
    def test_as_a_layers_file(self, artifact: Path, key: str) -> None:
        edit_manifest(artifact, lambda data: data["layers"][0].update({key: "../outside.onnx"}))
        refuse(artifact, r"the manifest's path '\.\./outside\.onnx' leaves the artifact's folder")

    def test_as_an_adapters_folder(self, artifact: Path) -> None:
        edit_manifest(artifact, lambda data: data["adapters"][2].update(path="/tmp"))
        refuse(artifact, "the manifest's path '/tmp' leaves the artifact's folder")

    def test_link_to_a_file_outside(self, artifact: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside.onnx"
        (artifact / GRAPH).rename(outside)
        (artifact / GRAPH).symlink_to(outside)
        refuse(artifact, r"the manifest's path 'graphs/up\.onnx' leaves the artifact's folder")

    def test_link_to_a_folder_outside(self, artifact: Path, tmp_path: Path) -> None:
        (artifact / "graphs").rename(tmp_path / "elsewhere")
        (artifact / "graphs").symlink_to(tmp_path / "elsewhere")
        refuse(artifact, r"the manifest's path 'graphs/\w+\.onnx' leaves the artifact's folder")

    def test_name_that_no_file_system_takes(self, artifact: Path) -> None:
        edit_manifest(artifact, lambda data: list_file(data, "x" * 5000))
        refuse(artifact, r"artifact: a listed file cannot be read: .*File name too long")

    def test_links_in_a_circle(self, artifact: Path) -> None:
        (artifact / GRAPH).unlink()
        (artifact / GRAPH).symlink_to("up.onnx")
        refuse(artifact, r"the manifest's path 'graphs/up\.onnx' leaves the artifact's folder")

    def test_links_that_stay_inside_are_followed(self, artifact: Path) -> None:
        (artifact / GRAPH).rename(artifact / "moved.onnx")
        (artifact / GRAPH).symlink_to("../moved.onnx")
        assert "up" in lr.load(artifact, threads=1)

    def test_a_link_to_the_whole_artifact_is_followed(self, artifact: Path) -> None:
        link = artifact.with_name("current")
        link.symlink_to(artifact)
        assert "up" in lr.load(link, threads=1)


def replace_b_by_bias(layer: dict[str, Any]) -> None:
    """A well-formed stack of biases, in a layer that names no file of the base's rows."""
    layer["stacks"][1].update(role="bias", shape=[3, 48], rows_per_slot=1, row_offset=1)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (
        lambda data: data.update(extra=1),
        r"manifest\.json: manifest: unknown key 'extra'; build the artifact again",
    ),
    "unknown nested key": (
        lambda data: data["layers"][1]["stacks"][0].update(device="cuda"),
        r"manifest\.layers\[1\]\.stacks\[0\]: unknown key 'device'",
    ),
    "missing key": (
        lambda data: data.pop("dtype"),
        "manifest: key 'dtype' is missing; build the artifact again",
    ),
    "missing nested key": (
        lambda data: data["adapters"][0].pop("scale"),
        r"manifest\.adapters\[0\]: key 'scale' is missing",
    ),
    "text for a number": (
        lambda data: data.update(num_slots="2"),
        r"manifest\.num_slots: expected int, got '2'",
    ),
    "true for a number": (
        lambda data: data.update(num_slots=True),
        r"manifest\.num_slots: expected int, got True",
    ),
    "fraction for an integer": (
        lambda data: data["files"][GRAPH].update(size=1.5),
        r"manifest\.files\.graphs/up\.onnx\.size: expected int, got 1\.5",
    ),
    "number for text": (
        lambda data: data.update(name=3),
        r"manifest\.name: expected str, got 3",
    ),
    "null for text": (
        lambda data: data["base"].update(digest=None),
        r"manifest\.base\.digest: expected str, got None",
    ),
    "number for a path": (
        lambda data: data["layers"][0].update(onnx=3),
        r"manifest\.layers\[0\]\.onnx: expected str, got 3",
    ),
    "object for a list": (
        lambda data: data.update(layers={}),
        r"manifest\.layers: expected a list, got \{\}",
    ),
    "list for an object": (
        lambda data: data.update(files=[]),
        r"manifest\.files: expected an object, got \[\]",
    ),
    "list for a nested object": (
        lambda data: data.update(parity=[]),
        r"manifest\.parity: expected an object, got \[\]",
    ),
    "shape of three": (
        lambda data: data["layers"][0]["stacks"][0].update(shape=[1, 2, 3]),
        r"manifest\.layers\[0\]\.stacks\[0\]\.shape: expected a list of 2, got \[1, 2, 3\]",
    ),
    "unknown strategy": (
        lambda data: data["layers"][0].update(strategy="guess"),
        r"manifest\.layers\[0\]\.strategy: expected one of \('segmented', .*, got 'guess'",
    ),
    "unhashable for a choice": (
        lambda data: data.update(dtype=["float32"]),
        r"manifest\.dtype: expected one of .*, got \['float32'\]",
    ),
    "newer format": (
        lambda data: data.update(format_version=FORMAT_VERSION + 1),
        f"format_version is {FORMAT_VERSION + 1}, this runtime reads 4 and {FORMAT_VERSION}; build"
        " the artifact again, or install the",
    ),
    "older format": (
        lambda data: data.update(format_version=3),
        f"format_version is 3, this runtime reads 4 and {FORMAT_VERSION}; build the",
    ),
    "format as text": (
        lambda data: data.update(format_version=str(FORMAT_VERSION)),
        f"format_version is '{FORMAT_VERSION}', this runtime reads 4 and {FORMAT_VERSION}",
    ),
    "format as truth": (
        lambda data: data.update(format_version=True),
        "format_version is True, this runtime",
    ),
    "no format": (lambda data: data.pop("format_version"), "format_version is None, this runtime"),
    "kind as a word": (
        lambda data: data.update(kind="layers"),
        r"manifest\.kind: expected an object, got 'layers'",
    ),
    "unknown kind": (
        lambda data: data.update(kind={"vision": {}}),
        r"manifest\.kind: expected one key of \('layers', .*'graph'\), got vision",
    ),
    "two kinds": (
        lambda data: data.update(kind={"layers": {}, "model": {}}),
        r"manifest\.kind: expected one key of \('layers', .*\), got layers, model",
    ),
    "no kind": (
        lambda data: data.update(kind={}),
        r"manifest\.kind: expected one key of \('layers', .*\), got none",
    ),
    "value that a kind lacks": (
        lambda data: data.update(kind={"layers": {"task": "ner"}}),
        r"manifest\.kind\.layers: unknown key 'task'",
    ),
    "value that a kind needs": (
        lambda data: data.update(kind={"decoder": {"folder": "generator"}}),
        r"manifest\.kind\.decoder: key 'blend' is missing",
    ),
    "graph that nothing vouches for": (
        lambda data: data["files"].pop(GRAPH),
        r"manifest\.files: 'graphs/up\.onnx' is missing, so nothing vouches for it",
    ),
    "two layers of one name": (
        lambda data: data["layers"][1].update(name="qkv"),
        r"manifest\.layers: two of them have one name",
    ),
    "two adapters in one slot": (
        lambda data: data["adapters"][1].update(slot=1),
        r"manifest\.adapters: slots \[1, 1\] are not distinct slots of 1 to 2",
    ),
    "slot that does not exist": (
        lambda data: data["adapters"][2].update(slot=3),
        r"manifest\.adapters: slots \[1, 2, 3\] are not distinct slots of 1 to 2",
    ),
    "adapter in the base's slot": (
        lambda data: data["adapters"][2].update(slot=0),
        r"manifest\.adapters: slots \[1, 2, 0\] are not distinct slots of 1 to 2",
    ),
    "stack too small": (
        lambda data: data["layers"][1]["stacks"][1].update(rows_per_slot=9),
        r"manifest\.layers: stack 'up\.lora_B' has 16 rows, which 2 slots do not fill",
    ),
    "rows for one slot of two": (
        lambda data: data["layers"][1]["stacks"][1].update(slot_rows=[16]),
        r"manifest\.layers: stack 'up\.lora_B' has 16 rows, which 2 slots do not fill",
    ),
    "a slot of fewer rows than none": (
        lambda data: data["layers"][1]["stacks"][1].update(slot_rows=[24, -8]),
        r"manifest\.layers: stack 'up\.lora_B' has 16 rows, which 2 slots do not fill",
    ),
    "unknown role of a stack": (
        lambda data: data["layers"][1]["stacks"][0].update(role="gate"),
        r"stacks\[0\]\.role: expected one of \('lora_A', .*'weight'\), got 'gate'",
    ),
    "parameter without the base's own": (
        lambda data: data["layers"][1]["stacks"][1].update(role="bias"),
        r"manifest\.layers: stack 'up\.lora_B' replaces the base's bias, which it does not have",
    ),
    "parameter without a file of the base's rows": (
        lambda data: replace_b_by_bias(data["layers"][1]),
        r"manifest\.layers: stack 'up\.lora_B' replaces the base's bias, which it does not have",
    ),
    "head that may be absent or not": (
        lambda data: data["layers"][1].update(in_base=None),
        r"manifest\.layers\[1\]\.in_base: expected bool, got None",
    ),
    "no heads": (
        lambda data: data["adapters"][0].pop("heads"),
        r"manifest\.adapters\[0\]: key 'heads' is missing",
    ),
    "more slots than the stacks have": (
        lambda data: data.update(num_slots=3),
        "has 48 rows, which 3 slots do not fill",
    ),
    "another digest of an adapter": (
        lambda data: data["adapters"][0].update(digest="0" * 64),
        "adapters/sql: its digest differs from the manifest's",
    ),
}


class TestEditedManifest:
    @pytest.mark.parametrize("case", EDITS)
    def test_refused(self, artifact: Path, case: str) -> None:
        change, text = EDITS[case]
        edit_manifest(artifact, change)
        refuse(artifact, text)

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"{",
            b"\xff\xfe\x00",
            b"[" * 200_000,
            b'{"format_version": 1' + b"0" * 5000 + b"}",
        ],
        ids=["empty", "broken", "not UTF-8", "nested without end", "a number without end"],
    )
    def test_not_json(self, artifact: Path, text: bytes) -> None:
        (artifact / MANIFEST_FILE).write_bytes(text)
        refuse(
            artifact, r"manifest\.json: not readable as JSON \(.*\); copy the artifact again, or"
        )

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"manifest"'])
    def test_no_object(self, artifact: Path, text: str) -> None:
        (artifact / MANIFEST_FILE).write_text(text)
        refuse(artifact, f"format_version is None, this runtime reads 4 and {FORMAT_VERSION}")


class TestDigest:
    """manifest.sha256 vouches for manifest.json."""

    def test_sha256sum_takes_it(self, artifact: Path) -> None:
        command = ["sha256sum", "--check", "--strict", DIGEST_FILE]
        done = subprocess.run(command, cwd=artifact, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "manifest.json: OK\n")

    def test_a_changed_manifest_is_refused(self, artifact: Path) -> None:
        text = (artifact / MANIFEST_FILE).read_text(encoding="utf-8")
        (artifact / MANIFEST_FILE).write_text(text.replace('"passed"', '"passed" '))
        refuse(
            artifact,
            r"manifest\.json: its sha256 differs from manifest\.sha256: the file was changed or"
            " damaged; copy the artifact again, or build it again",
        )

    @pytest.mark.parametrize("change", ["no file", "empty", "another name"])
    def test_a_digest_that_is_none(self, artifact: Path, change: str) -> None:
        file = artifact / DIGEST_FILE
        if change == "no file":
            file.unlink()
        else:
            line = file.read_text().replace(MANIFEST_FILE, "spec.yaml")
            file.write_text("" if change == "empty" else line)
        missing = "no manifest.sha256 beside manifest.json, so nothing vouches for it; copy the"
        differs = "its sha256 differs from manifest.sha256"
        refuse(artifact, differs if change == "another name" else missing)

    def test_both_digests_stand_while_the_manifest_is_replaced(self, artifact: Path) -> None:
        before = (artifact / MANIFEST_FILE).read_bytes()
        after = before.replace(b'"passed"', b'"passed" ')
        (artifact / DIGEST_FILE).write_text(digest_line(before) + digest_line(after))
        assert Manifest.read(artifact).parity.status == "passed"
        (artifact / MANIFEST_FILE).write_bytes(after)
        assert Manifest.read(artifact).parity.status == "passed"

    def test_a_swap_between_the_two_reads(
        self, artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A reader that has the old manifest and the new digest reads once more."""
        newer = replace(Manifest.read(artifact), name="newer").to_json()
        compare, calls = manifest_module.is_sealed, []

        def swap_first(folder: Path, content: bytes) -> bool:
            if not calls:
                write_manifest(folder, newer)
            calls.append(content)
            return compare(folder, content)

        monkeypatch.setattr(manifest_module, "is_sealed", swap_first)
        assert Manifest.read(artifact).name == "newer"
        assert len(calls) == 2


class TestNoArtifact:
    TEXT = r"no manifest\.json here; an artifact is a folder that 'loraexport build' has published"

    def test_no_manifest(self, artifact: Path) -> None:
        (artifact / MANIFEST_FILE).unlink()
        refuse(artifact, self.TEXT)

    def test_no_folder(self, tmp_path: Path) -> None:
        refuse(tmp_path / "nothing", rf"nothing: {self.TEXT}")

    def test_a_file(self, artifact: Path) -> None:
        refuse(artifact / MANIFEST_FILE, self.TEXT)

    def test_path_as_text(self, tenants: Path) -> None:
        assert "up" in lr.load(os.fspath(tenants), threads=1)


class TestParity:
    @pytest.mark.parametrize("status", ["failed", "deferred"])
    def test_unproven_needs_consent(self, artifact: Path, status: Any) -> None:
        manifest = Manifest.read(artifact)
        parity = ParitySummary(status, ("eager",), 0.5, 2e-5)
        write_manifest(artifact, replace(manifest, parity=parity).to_json())
        refuse(
            artifact,
            f"parity is '{status}', so its numbers are not proven. Run 'loraexport verify"
            f" .*artifact', or pass allow_unverified=True",
        )
        assert "up" in lr.load(artifact, threads=1, allow_unverified=True)

    def test_an_error_that_is_no_number(self, artifact: Path) -> None:
        parity = ParitySummary("failed", ("eager",), float("nan"), 2e-5)
        manifest = replace(Manifest.read(artifact), parity=parity)
        write_manifest(artifact, manifest.to_json())
        refuse(artifact, "parity is 'failed'")
        assert "up" in lr.load(artifact, threads=1, allow_unverified=True)

    def test_damage_is_refused_with_consent_too(self, artifact: Path) -> None:
        (artifact / GRAPH).unlink()
        with pytest.raises(lr.ArtifactError, match="but missing"):
            lr.load(artifact, allow_unverified=True)
