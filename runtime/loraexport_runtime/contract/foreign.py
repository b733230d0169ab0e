"""The one reader of others' files: regular, bounded in size and depth, and with typed errors.

Every function takes the error to raise, and its message names the file, what is wrong, and what
to do.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LoraexportError

MAX_BYTES = 64 * 2**20
"""Of a JSON file: the largest indexes and configs that are published have a few MiB."""
_AGAIN = "copy or download it again"
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    bool: "true or false",
}
_T = TypeVar("_T")


def reason(cause: OSError) -> str:
    """Why a file cannot be read, and what to do, in words."""
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    if isinstance(cause, PermissionError):
        return "permission denied; let this user read it"
    if isinstance(cause, IsADirectoryError):
        return "a folder, where a file has to be"
    return cause.strerror or str(cause)


def require_file(file: Path, error: type[LoraexportError], hint: str = "") -> None:
    """Raise `error` unless a regular file is there that may be read.

    Args:
        hint: what to do if there is no such file.
    """
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            raise error(f"{file}: not a regular file; {_AGAIN}")
        file.open("rb").close()
    except OSError as cause:
        missing = isinstance(cause, FileNotFoundError | NotADirectoryError)
        told = f"; {hint}" if hint and missing else ""
        raise error(f"{file}: {reason(cause)}{told}") from cause


def has_file(file: Path) -> bool:
    """Whether anything is there under this name, be it readable or not."""
    try:
        file.lstat()
    except PermissionError:
        return True  # reading it says so
    except OSError:
        return False
    return True


def read_json(file: Path, error: type[LoraexportError], hint: str = "") -> Any:
    """The value of a JSON file.

    Args:
        hint: what to do if there is no such file.
    """
    require_file(file, error, hint)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as cause:
        raise error(f"{file}: {reason(cause)}") from cause
    if len(data) > MAX_BYTES:
        raise error(f"{file}: more than {MAX_BYTES >> 20} MiB, which no such file has; {_AGAIN}")
    if not data.strip():
        raise error(f"{file}: the file is empty; {_AGAIN}")
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as cause:
        raise error(f"{file}: not UTF-8 text: {cause}; {_AGAIN}") from cause
    except ValueError as cause:
        raise error(f"{file}: not JSON: {cause}; {_AGAIN}") from cause
    except RecursionError as cause:
        raise error(f"{file}: not JSON: nested too deeply; {_AGAIN}") from cause


def read_object(file: Path, error: type[LoraexportError], hint: str = "") -> dict[str, Any]:
    """The object of a JSON file."""
    value = read_json(file, error, hint)
    if not isinstance(value, dict):
        raise error(f"{file}: expected an object, got {_kind(value)}; {_AGAIN}")
    return value


def value_of(
    data: Mapping[str, Any], path: str, kind: type[_T], file: Path, error: type[LoraexportError]
) -> _T:
    """The value at a dotted path, which has to be there and of this type."""
    value: Any = data
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise error(f"{file}: key {path!r} is missing; {_AGAIN}")
        value = value[part]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = _NAMES[kind]
        raise error(f"{file}: {path}: expected {wanted}, got {_kind(value)}; {_AGAIN}")
    return value


def _kind(value: Any) -> str:
    """A value in a few words: not the whole of it."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
