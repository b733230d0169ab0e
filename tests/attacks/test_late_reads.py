"""An artifact that is replaced, damaged or removed under a session that has it open."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file
from support.adapters import write_adapter
from support.builds import write_model_project
from support.decoders import write_family
from support.home import Home
from support.manifests import edit_manifest, write_manifest

import loraexport_runtime as lr
from loraexport_runtime.adapters.dora import SCALES_FILE
from loraexport_runtime.adapters.listed_tensors import read_listed_tensors
from loraexport_runtime.contract.artifact import open_artifact
from loraexport_runtime.contract.files import digest_file
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.load import load_generator

DORA = {"use_dora": True}
SITES = {f"encoder.layer.{layer}.attention.self.query": (32, 32) for layer in (0, 1)}
IDS = np.arange(3, 9)[None]
INPUTS = {
    "input_ids": IDS,
    "attention_mask": np.ones_like(IDS),
    "token_type_ids": np.zeros_like(IDS),
}


def write_dora(folder: Path, seed: int = 0) -> Path:
    """Two adapters with DoRA and one slot, so that the second is read late; the spec's path."""
    spec = write_model_project(folder, slots=1, adapters=[])
    for index, name in enumerate(("first", "second")):
        random = np.random.default_rng(seed + index)
        magnitudes = {
            f"base_model.model.{site}.lora_magnitude_vector": random.uniform(1, 2, 32).astype("f4")
            for site in SITES
        }
        write_adapter(folder / name, SITES, seed=index, config=DORA, tensors=magnitudes)
    adapters = [{"name": name, "path": name} for name in ("first", "second")]
    spec.write_text(spec.read_text().replace("adapters: []", f"adapters: {adapters}"))
    return spec


@pytest.fixture
def artifact(home: Home, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home.artifact(write_dora), tmp_path / "artifact"))


@pytest.fixture
def session(artifact: Path) -> Iterator[lr.ModelSession]:
    with lr.load_model(artifact, threads=1) as opened:
        yield opened


def replace_by_another(home: Home, artifact: Path) -> None:
    """What a build does: the folder of another artifact takes the name of this one."""
    artifact.rename(artifact.with_name("old"))
    shutil.copytree(home.artifact(write_dora, 7), artifact)


class TestReplaced:
    def test_scales_of_another_build_are_not_used(
        self, home: Home, artifact: Path, session: lr.ModelSession
    ) -> None:
        replace_by_another(home, artifact)
        kept = artifact.parent / "old/adapters/second"
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(kept / name, artifact / "adapters/second" / name)
        with pytest.raises(lr.ArtifactError, match=r"output_scales\.safetensors: .* open it again"):
            session.run(INPUTS, ["second"])
        session.run(INPUTS, ["first"])

    def test_base_rows_of_another_build_are_not_used(
        self, home: Home, artifact: Path, session: lr.ModelSession, tmp_path: Path
    ) -> None:
        assert session.export_adapters(tmp_path / "whole") == {"first": 1}
        replace_by_another(home, artifact)
        rows = next(layer.base_rows for layer in session.manifest.layers if layer.base_rows)
        assert rows is not None
        data = bytearray((artifact / rows).read_bytes())
        data[-1] ^= 64
        (artifact / rows).write_bytes(bytes(data))
        files = ListedFiles(artifact, session.manifest.files)
        with pytest.raises(lr.ArtifactError, match="its digest differs from the manifest's; it"):
            read_listed_tensors(files, rows)

    def test_files_that_are_gone(self, artifact: Path, session: lr.ModelSession) -> None:
        shutil.rmtree(artifact)
        with pytest.raises(lr.LoraexportError, match="no such file"):
            session.run(INPUTS, ["second"])

    def test_a_file_that_is_written_to_while_it_is_opened(self, artifact: Path) -> None:
        """In place, under a manifest that stays: it is opened once more, and then refused."""
        opened = []

        def make(manifest: Manifest) -> str:
            opened.append(manifest.name)
            if len(opened) == 1:
                data = (artifact / "spec.yaml").read_bytes()
                (artifact / "spec.yaml").write_bytes(data[:-1] + b"#")
            return "a session"

        with pytest.raises(lr.ArtifactError, match=r"spec\.yaml: its sha256 differs"):
            open_artifact(artifact, False, make)
        assert len(opened) == 1

    def test_a_folder_that_never_rests(self, artifact: Path) -> None:
        def make(manifest: Manifest) -> str:
            os.utime(artifact / "spec.yaml", ns=(0, next(times)))
            return "a session"

        times = iter(range(100))
        with pytest.raises(lr.ArtifactError, match="changed each of the 20 times that it was"):
            open_artifact(artifact, False, make)


class TestUnlisted:
    def test_scales_that_nothing_lists_are_not_read(self, tenants: Path, tmp_path: Path) -> None:
        artifact = Path(shutil.copytree(tenants, tmp_path / "artifact"))
        x = np.ones((3, 32), np.float32)
        expected = lr.load_layers(artifact, threads=1)["up"].run(x, [("sql", 3)])
        scales = {"blocks.0.up": np.full(48, 2, np.float32)}
        save_file(scales, artifact / "adapters/sql" / SCALES_FILE)
        assert np.array_equal(
            lr.load_layers(artifact, threads=1)["up"].run(x, [("sql", 3)]), expected
        )

    def test_listed_ones_of_an_adapter_without_dora(self, tenants: Path, tmp_path: Path) -> None:
        artifact = Path(shutil.copytree(tenants, tmp_path / "artifact"))
        file = artifact / "adapters/sql" / SCALES_FILE
        save_file({"blocks.0.up": np.full(48, 2, np.float32)}, file)
        edit_manifest(artifact, lambda data: list_file(artifact, data, file))
        with pytest.raises(lr.ArtifactError, match="does not have the sites of this adapter"):
            lr.load(artifact, threads=1)

    def test_a_file_in_a_decoders_folder(self, home: Home, tmp_path: Path) -> None:
        artifact = Path(
            shutil.copytree(home.artifact(write_family, "Llama"), tmp_path / "artifact")
        )
        (artifact / "generator/special_tokens_map.json").unlink(missing_ok=True)
        os.mkfifo(artifact / "generator/special_tokens.json")
        with pytest.raises(lr.ArtifactError, match=r"tokens\.json: the manifest does not list"):
            load_generator(artifact)

    @pytest.mark.parametrize("location", ["/etc/passwd", "../spec.yaml", "other.bin", "a\0b"])
    def test_external_data_of_a_graph(self, small: Path, tmp_path: Path, location: str) -> None:
        artifact = Path(shutil.copytree(small, tmp_path / "artifact"))
        (artifact / "graphs/other.bin").write_bytes(bytes(32))
        graph = artifact / "graphs/up.onnx"
        model = onnx.load(graph)
        tensor = model.graph.initializer.add()
        tensor.name, tensor.data_type, tensor.data_location = "more", 1, 1
        tensor.dims.append(8)
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
        graph.write_bytes(model.SerializeToString())
        edit_manifest(artifact, lambda data: list_file(artifact, data, graph))
        with pytest.raises(lr.ArtifactError, match=r"it keeps weights in .*, which the manifest"):
            lr.load(artifact, threads=1)


def list_file(artifact: Path, data: dict[str, Any], file: Path) -> None:
    path = file.relative_to(artifact).as_posix()
    data["files"][path] = {"sha256": digest_file(file), "size": file.stat().st_size}


PLACES = (
    "manifest.json",
    "manifest.sha256",
    "graphs/up.onnx",
    "adapters/sql/adapter_config.json",
    "adapters/spare/adapter_model.safetensors",
    "spec.yaml",
)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "memory", "folder"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file(
    tenants: Path, tmp_path: Path, place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of any file: an error at once, where reading would wait or never end."""
    artifact = Path(shutil.copytree(tenants, tmp_path / "artifact"))
    file = artifact / place
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(file.parent)  # a socket's path is short
            listener.bind(file.name)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "memory":
        file.symlink_to("/proc/self/mem")  # a regular file that no read succeeds on
    else:
        file.mkdir()
    with pytest.raises(lr.ArtifactError):
        lr.load(artifact, threads=1)


LIMITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "slots": (lambda data: data.update(num_slots=10**6), "expected 1 to 65536, got 1000000"),
    "no slot": (lambda data: data.update(num_slots=0), "expected 1 to 65536, got 0"),
    "integer": (lambda data: data.update(num_slots=2**70), "an integer of more than 64 bits"),
    "scale": (lambda data: data["adapters"][0].update(scale=10**400), "more than 64 bits"),
    "features": (
        lambda data: data["layers"][1].update(in_features=2**40),
        "or a size that is not 1 to 2147483647",
    ),
    "stack": (
        lambda data: data["layers"][1].update(ask_for(2**28)),
        r"the manifest asks for stacks of [\d,]+ bytes, and all files together have",
    ),
}


def ask_for(rank: int) -> dict[str, Any]:
    """Stacks of layer `up` that are whole, and of terabytes."""
    common = {"rows_per_slot": rank, "row_offset": 0, "column_offset": 0, "slot_rows": None}
    stacks = [
        {"name": f"up.{role}", "role": role, "shape": [2 * rank, width], **common}
        for role, width in (("lora_A", 32), ("lora_B", 48))
    ]
    return {"max_rank": rank, "stacks": stacks}


@pytest.mark.parametrize("case", LIMITS)
def test_what_a_manifest_may_ask_for(tenants: Path, tmp_path: Path, case: str) -> None:
    change, text = LIMITS[case]
    artifact = Path(shutil.copytree(tenants, tmp_path / "artifact"))
    edit_manifest(artifact, change)
    with pytest.raises(lr.ArtifactError, match=text):
        lr.load(artifact, threads=1)


def test_a_key_that_is_there_twice(tenants: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(tenants, tmp_path / "artifact"))
    text = (artifact / "manifest.json").read_text()
    write_manifest(artifact, text.replace('"num_slots"', '"num_slots": 2, "num_slots"', 1))
    with pytest.raises(lr.ArtifactError, match="the key 'num_slots' is there twice"):
        lr.load(artifact, threads=1)
