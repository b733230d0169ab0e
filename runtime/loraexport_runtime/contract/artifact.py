"""A published artifact -> whatever opens it, checked, even while a build swaps its folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ArtifactError, LoraexportError
from .files import check_pin
from .graphs import check_graphs
from .listed import ListedFiles
from .manifest import Manifest

_ATTEMPTS = 20
"""Of opening a folder that is written to: builds swap it in one step, and take seconds."""
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
        ArtifactError: a file is missing or damaged, parity has not passed, the manifest has
            another digest or does not fit its graphs, or the files change all the time.
        InputError: `digest` is no sha256.
    """
    check_pin(digest)
    for _ in range(_ATTEMPTS):
        manifest = Manifest.read(folder, digest)
        files = ListedFiles(folder, manifest.files)
        stamps = files.stamps()
        try:
            _check(folder, manifest, allow_unverified)
            session = make(manifest)
        except (LoraexportError, OSError):
            if _is_still(manifest, folder) and files.stamps() == stamps:
                raise
        else:
            if _is_still(manifest, folder) and files.stamps() == stamps:
                return session
        # The folder was swapped, or a file written to, while it was read: once more.
    raise ArtifactError(
        f"{folder}: its files changed each of the {_ATTEMPTS} times that it was opened; open it"
        " once nobody writes to it"
    )


def _check(folder: Path, manifest: Manifest, allow_unverified: bool) -> None:
    if manifest.parity.status != "passed" and not allow_unverified:
        raise ArtifactError(
            f"{folder}: parity is {manifest.parity.status!r}, so its numbers are not proven. Run"
            f" 'loraexport verify {folder}', or pass allow_unverified=True"
        )
    manifest.check_files(folder)
    check_graphs(folder, manifest)


def _is_still(manifest: Manifest, folder: Path) -> bool:
    return Manifest.read(folder).to_json() == manifest.to_json()  # as text: NaN is not NaN
