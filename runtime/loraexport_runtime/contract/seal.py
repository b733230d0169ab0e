"""manifest.sha256: the digest of manifest.json beside it, as `sha256sum -c` takes it."""

import hashlib
from pathlib import Path

from ..errors import ArtifactError
from .files import MANIFEST_FILE
from .foreign import read_bounded, reason

DIGEST_FILE = "manifest.sha256"
MAX_MANIFEST = 32 * 2**20
"""Bytes: a thousand adapters at each of two hundred sites take half of it."""


def digest_line(manifest: bytes) -> str:
    """The one line of manifest.sha256, for these bytes of manifest.json."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_FILE}\n"


def is_sealed(folder: Path, manifest: bytes) -> bool:
    """Whether the bytes that were read are those of the digest beside them.

    A file of two lines is one that is being replaced: either may be the one.

    Returns:
        False if the folder was changed since the bytes were read: read them again.

    Raises:
        ArtifactError: nothing has changed since, so the manifest is damaged; or one of the two
            cannot be read.
    """
    digests = _read(folder / DIGEST_FILE)
    if digest_line(manifest).encode() in digests.splitlines(keepends=True):
        return True
    if _read(folder / MANIFEST_FILE) != manifest or _read(folder / DIGEST_FILE) != digests:
        return False
    if not digests:
        raise ArtifactError(
            f"{folder}: no {DIGEST_FILE} beside {MANIFEST_FILE}, so nothing vouches for it; copy"
            " the whole artifact again"
        )
    raise ArtifactError(
        f"{folder / MANIFEST_FILE}: its sha256 differs from {DIGEST_FILE}: the file was changed or"
        " damaged; copy the artifact again, or build it again"
    )


def _read(file: Path) -> bytes:
    """Empty if there is no such file."""
    try:
        return read_bounded(file, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise ArtifactError(f"{file}: {reason(error)}; copy the artifact again") from error
