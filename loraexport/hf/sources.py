"""What a spec calls a path -> a local directory: relative path, hub id, or package folder."""

import importlib.util
import os
import re
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath

from loraexport_runtime.contract.foreign import reason
from loraexport_runtime.errors import LoraexportError, quoted

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?$")
_PACKAGE = "package:"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def resolve_directory(source: str, folder: Path, error: type[LoraexportError]) -> Path:
    """Find the directory that `source` names.

    Args:
        source: a directory relative to `folder` (or absolute), `package:<module>/<folder>`, or a
            hub id `owner/name`, `owner/name@revision`, which huggingface_hub fetches or finds in
            its cache (HF_HUB_OFFLINE=1 keeps it to the cache).
        folder: where relative paths start: the folder of the spec.
        error: what to raise if there is no such directory.
    """
    if source.startswith(_PACKAGE):
        return _package_directory(source, error)
    if "://" in source:
        raise error(f"{source!r} is an address; give a directory, a hub id or package:<module>/…")
    local = folder / source
    try:
        if local.is_dir():
            return local
        if local.exists():
            raise error(f"{local} is a file; give the directory that holds it")
    except OSError as cause:
        raise error(f"{local}: {reason(cause)}") from cause
    if _HUB_ID.match(source) and not source.startswith("."):
        return _hub_directory(source, local, error)
    raise error(f"{local}: no such directory; paths are relative to the spec's folder")


def _package_directory(source: str, error: type[LoraexportError]) -> Path:
    module, _, inner = source.removeprefix(_PACKAGE).partition("/")
    parts = PurePosixPath(inner).parts
    if ".." in parts or PurePosixPath(inner).is_absolute():
        raise error(f"{source!r} leaves the package's folder; name a folder inside {module!r}")
    package = _find_package(module)
    if package is None:
        raise error(f"{source!r}: no Python package {module!r} is installed; pip install it first")
    if not package.submodule_search_locations:
        raise error(f"{source!r}: {module!r} is a single file, so it ships no folder")
    for location in package.submodule_search_locations:
        root = Path(location).resolve()
        try:
            candidate = (root / inner).resolve()
            is_there = candidate.is_dir()
        except (OSError, RuntimeError, ValueError) as cause:  # too long, links in a circle, a NUL
            said = reason(cause) if isinstance(cause, OSError) else str(cause)
            raise error(f"{quoted(source)}: {said}; name a folder of the package") from cause
        if not candidate.is_relative_to(root):
            raise error(f"{source!r} leaves the package's folder through a link")
        if is_there:
            return candidate
    raise error(f"{source!r}: package {module!r} has no folder {inner!r}")


def _find_package(module: str) -> ModuleSpec | None:
    """Where a top-level package is, without running its code."""
    try:
        return importlib.util.find_spec(module) if module.isidentifier() else None
    except ValueError:  # __main__ has no spec
        return None


def _hub_directory(source: str, local: Path, error: type[LoraexportError]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as cause:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise error(
            f"{source!r}: no directory {local}, and no such model in the hub's cache or on the hub"
            f"{offline}: {str(cause).splitlines()[0]}"
        ) from cause
