"""A manifest changed as parsed JSON, under a digest that fits it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.seal import DIGEST_FILE, digest_line


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its digest along with it."""
    data = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(data)
    write_manifest(folder, json.dumps(data))


def write_manifest(folder: Path, text: str) -> None:
    """Put a manifest and its digest into a folder."""
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    (folder / DIGEST_FILE).write_text(digest_line(text.encode()), encoding="utf-8")
