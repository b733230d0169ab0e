"""A published artifact -> whatever opens it, checked, even while a build swaps its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ArtifactError, LoraexportError
from .files import check_pin
from .manifest import Manifest

_T = TypeVar("_T")


def open_artifact(
    folder: Path,
    allow_unverified: bool,
    make: Callable[[Manifest], _T],
    digest: str | None = None,
) -> _T:
    """Read the manifest, check parity and files, and make a session.

    Args:
        make: opens the graphs; called again if the folder was swapped meanwhile.
        digest: the sha256 that the bytes of manifest.json must have; default: any.

    Raises:
        ArtifactError: a file is missing or damaged, parity has not passed, or the manifest has
            another digest.
        InputError: `digest` is no sha256.
    """
    check_pin(digest)
    while True:
        manifest = Manifest.read(folder, digest)
        try:
            _check(folder, manifest, allow_unverified)
            made = make(manifest)
        except (LoraexportError, OSError):
            if _is_still(manifest, folder):
                raise
        else:
            if _is_still(manifest, folder):
                return made
        # A build has swapped the folder while it was read: once more, for the new artifact.


def _check(folder: Path, manifest: Manifest, allow_unverified: bool) -> None:
    if manifest.parity.status != "passed" and not allow_unverified:
        raise ArtifactError(
            f"{folder}: parity is {manifest.parity.status!r}, so its numbers are not proven. Run"
            f" 'loraexport verify {folder}', or pass allow_unverified=True"
        )
    manifest.check_files(folder)


def _is_still(manifest: Manifest, folder: Path) -> bool:
    return Manifest.read(folder).to_json() == manifest.to_json()  # as text: NaN is not NaN
