"""A manifest changed as parsed JSON, under a digest that fits it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.seal import DIGEST_FILE, digest_line

_HUGE = 2**28


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its digest along with it."""
    data = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(data)
    write_manifest(folder, json.dumps(data))


def write_manifest(folder: Path, text: str | bytes) -> None:
    """Put a manifest and its digest into a folder."""
    content = text.encode() if isinstance(text, str) else text
    (folder / MANIFEST_FILE).write_bytes(content)
    (folder / DIGEST_FILE).write_text(digest_line(content), encoding="utf-8")


def list_again(folder: Path, inner: str) -> None:
    """List the regular files of an artifact's inner folder as they are now, but for huge ones."""

    def change(data: dict[str, Any]) -> None:
        for path in [path for path in data["files"] if path.startswith(f"{inner}/")]:
            del data["files"][path]
        for file in sorted((folder / inner).iterdir()):
            if file.is_file() and not file.is_symlink() and file.stat().st_size < _HUGE:
                with file.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                size = file.stat().st_size
                data["files"][f"{inner}/{file.name}"] = {"sha256": digest, "size": size}

    edit_manifest(folder, change)
