"""A pinned digest: every loader opens that artifact and no other, swapped folder or not."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.manifests import write_manifest

import loraexport_runtime as lr
from loraexport_runtime.contract.artifact import open_artifact
from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.generation.load import load_generator


@pytest.fixture
def artifact(tenants: Path, tmp_path: Path) -> Path:
    """An artifact to change."""
    return Path(shutil.copytree(tenants, tmp_path / "artifact"))


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()


def test_the_right_one_opens(tenants: Path) -> None:
    digest = digest_of(tenants)
    assert set(lr.load(tenants, threads=1, digest=digest)) == {"qkv", "up", "words"}
    assert set(lr.load(tenants, threads=1, digest=digest.upper())) == {"qkv", "up", "words"}


@pytest.mark.parametrize("loader", [lr.load, load_generator])
def test_another_is_refused(artifact: Path, loader: Any) -> None:
    """A whole artifact, whose own digests are right: one space more makes it another."""
    digest = digest_of(artifact)
    with (artifact / MANIFEST_FILE).open("a") as file:
        file.write(" ")
    text = (
        rf"manifest\.json: its sha256 is {digest_of(artifact)}, but the pinned digest is {digest}:"
        r" this is another artifact, or it was changed; copy the right one here, or pin this one"
    )
    with pytest.raises(lr.ArtifactError, match=text):
        loader(artifact, digest=digest)


def test_it_is_told_before_anything_is_parsed(artifact: Path) -> None:
    (artifact / MANIFEST_FILE).write_bytes(b"\xff{")
    with pytest.raises(lr.ArtifactError, match="but the pinned digest is 00000"):
        lr.load(artifact, digest="0" * 64)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "g" * 64, " " + "0" * 64, b"0" * 64])
@pytest.mark.parametrize("loader", [lr.load, load_generator])
def test_no_digest(tenants: Path, loader: Any, digest: Any) -> None:
    with pytest.raises(lr.InputError, match="expected the 64 hexadecimal digits of the sha256 of"):
        loader(tenants, digest=digest)


def test_a_folder_swapped_meanwhile_is_refused(artifact: Path) -> None:
    """Without a pin the artifact that took its place is opened."""
    digest = digest_of(artifact)
    opened = []

    def make(manifest: Any) -> str:
        if not opened:
            text = (artifact / MANIFEST_FILE).read_text(encoding="utf-8")
            other = text.replace('"name": "tiny"', '"name": "other"')
            write_manifest(artifact, other)
        opened.append(manifest.name)
        return str(manifest.name)

    with pytest.raises(lr.ArtifactError, match=f"but the pinned digest is {digest}"):
        open_artifact(artifact, False, make, digest)
    assert opened == ["tiny"]
    assert open_artifact(artifact, False, make) == "other"
