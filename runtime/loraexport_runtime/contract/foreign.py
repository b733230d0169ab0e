"""The one reader of others' files: regular, bounded in size and depth, and with typed errors.

Every function takes the error to raise, and its message names the file, what is wrong, and what
to do.
"""

import errno
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from ..errors import LoraexportError

MAX_BYTES = 64 * 2**20
"""Of a JSON file: the largest indexes and configs that are published have a few MiB."""
MAX_DEPTH = 64
"""Objects and lists in one another in a JSON file: published ones have under ten."""
_AGAIN = "copy or download it again"
_DAMAGED = (errno.EINVAL, errno.EFBIG, errno.EIO)
"""Of a file that is there, and is not what it should be."""
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


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file to read; a FIFO, a device or a folder is refused, and not waited for.

    Raises:
        OSError: there is none, or it may not be read; `reason` puts it in words.
    """
    try:
        _require_regular(os.stat(file), file)  # opening a device may already do something
        # Without waiting: what has just taken its place may be a FIFO that has no writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as cause:
        raise OSError(errno.EINVAL, "a NUL in its path, which no file has") from cause
    try:
        _require_regular(os.fstat(descriptor), file)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _require_regular(status: os.stat_result, file: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def open_file(file: Path, error: type[LoraexportError], hint: str = "") -> BufferedReader:
    """The same, raising `error`.

    Args:
        hint: what to do if there is no such file.
    """
    try:
        return open_regular(file)
    except OSError as cause:
        raise _refusal(file, cause, error, hint) from cause


def _refusal(
    file: Path, cause: OSError, error: type[LoraexportError], hint: str
) -> LoraexportError:
    advice = _AGAIN if cause.errno in _DAMAGED else ""
    if isinstance(cause, FileNotFoundError | NotADirectoryError):
        advice = hint
    return error(f"{file}: {reason(cause)}" + (f"; {advice}" if advice else ""))


def read_bounded(file: Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: there is none, it may not be read, or it has more bytes than `limit`; `reason`
            puts it in words.
    """
    with open_regular(file) as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit >> 10} KiB"
        raise OSError(errno.EFBIG, f"more than {size}, which no such file has")
    return content


def require_file(file: Path, error: type[LoraexportError], hint: str = "") -> None:
    """Raise `error` unless a regular file is there that may be read.

    Args:
        hint: what to do if there is no such file.
    """
    open_file(file, error, hint).close()


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
    try:
        data = read_bounded(file, MAX_BYTES)
    except OSError as cause:
        raise _refusal(file, cause, error, hint) from cause
    return parse_json(data, file, error)


def parse_json(data: bytes, file: Path, error: type[LoraexportError]) -> Any:
    """The value of a JSON text that was read from a file."""
    if not data.strip():
        raise error(f"{file}: the file is empty; {_AGAIN}")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as cause:
        raise error(f"{file}: not UTF-8 text: {cause}; {_AGAIN}") from cause
    except ValueError as cause:
        raise error(f"{file}: not JSON: {cause}; {_AGAIN}") from cause
    except RecursionError as cause:
        raise error(f"{file}: not JSON: nested too deeply; {_AGAIN}") from cause
    if _is_deep(data, value):
        raise error(f"{file}: not JSON: nested too deeply; {_AGAIN}")
    return value


def _is_deep(data: bytes, value: Any) -> bool:
    """Whether a value nests more than MAX_DEPTH times: to show it would need as deep a stack."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


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
        kind_name = _NAMES[kind]
        raise error(f"{file}: {path}: expected {kind_name}, got {_kind(value)}; {_AGAIN}")
    return value


def _kind(value: Any) -> str:
    """A value in a few words: not the whole of it."""
    if isinstance(value, dict | list):
        return _NAMES[type(value)]
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
