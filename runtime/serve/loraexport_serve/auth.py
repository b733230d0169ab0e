"""Who asks: keys of clients, each with the adapters that it may use, and the operators' token."""

import hashlib
import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from loraexport_runtime.contract.foreign import read_bounded
from loraexport_runtime.contract.strict_yaml import Format, Problem, read_yaml

from .config.check import find_problems
from .config.schema import Settings
from .errors import ApiError, SettingsError

_LOG = logging.getLogger(__name__)
_FILE = Format(
    "a file of keys", "`keys` is a list of name, key, adapters", SettingsError, "a file of keys"
)
_MOST_BYTES = 4096
_BEARER = re.compile(r"[Bb]earer +(\S+)")


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A client's key in the file of keys."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    """Whose it is, in logs and metrics; not secret."""
    key: Annotated[str, msgspec.Meta(min_length=16, max_length=512, pattern=r"^[!-~]+$")]
    adapters: tuple[str, ...] | None = None
    """The adapters that it may use beside the bases, `sql` or `artifact:sql`; absent: all."""


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    keys: tuple[KeyEntry, ...]


@dataclass(frozen=True)
class Caller:
    """Whose request it is."""

    name: str | None = None
    """None: anybody, of a server without keys."""
    adapters: frozenset[str] | None = None
    """None: all."""

    def may_use(self, host: str, adapter: str) -> bool:
        """Whether an adapter of an artifact is there for this caller."""
        return self.adapters is None or not self.adapters.isdisjoint({adapter, f"{host}:{adapter}"})

    @property
    def tenant(self) -> str | None:
        """Whose turn its requests take; None: the adapter's, as its key is nobody's own."""
        return None if self.adapters is None else self.name


ANYBODY = Caller()


class Keys:
    """The keys that a server knows, as digests."""

    def __init__(self, entries: tuple[KeyEntry, ...] = (), admin: str | None = None) -> None:
        self._callers = [
            (
                _digest(entry.key),
                Caller(entry.name, None if entry.adapters is None else frozenset(entry.adapters)),
            )
            for entry in entries
        ]
        self._admin = None if admin is None else _digest(admin)

    @property
    def is_open(self) -> bool:
        """Whether clients need no key."""
        return not self._callers

    @property
    def has_admin(self) -> bool:
        return self._admin is not None

    def caller(self, authorization: str | None) -> Caller:
        """Whose key a request has in its Authorization header.

        Every key is compared, each in constant time, so that the time tells nothing of them.

        Raises:
            ApiError: 401: it has none, or one that is nobody's.
        """
        if self.is_open:
            return ANYBODY
        given, found = _digest(_token(authorization)), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None:
            raise _refused(authorization)
        return found

    def require_admin(self, authorization: str | None) -> None:
        """Raise ApiError (401) unless a request has the operators' token."""
        given = _digest(_token(authorization))
        if self._admin is None or not hmac.compare_digest(self._admin, given):
            raise _refused(authorization)

    def may_watch(self, authorization: str | None) -> None:
        """Raise ApiError (401) for who may not see what names all tenants.

        A server without any key shows it to anybody; another one to operators alone.
        """
        if not (self.is_open and not self.has_admin):
            self.require_admin(authorization)


def read_keys(settings: Settings, variables: Mapping[str, str]) -> Keys:
    """The keys of the settings' files, and of the process's variables.

    Raises:
        SettingsError: a file of keys is damaged, two keys are alike, or a port for operators has
            no token.
    """
    entries: tuple[KeyEntry, ...] = ()
    if settings.keys_file is not None:
        entries = _read_file(Path(settings.keys_file))
    plain = [key.strip() for key in variables.get("LORAEXPORT_API_KEYS", "").split(",")]
    entries += tuple(
        KeyEntry(name=f"key{index}", key=key) for index, key in enumerate(filter(None, plain))
    )
    admin = variables.get("LORAEXPORT_ADMIN_TOKEN") or None
    if settings.admin_token_file is not None:
        admin = _read_secret(Path(settings.admin_token_file))
    problems = []
    every = [entry.key for entry in entries] + ([] if admin is None else [admin])
    if len(set(every)) < len(every):
        problems.append(Problem(1, "keys", "two keys are alike", "give each client its own"))
    has_port = settings.admin_port is not None or settings.admin_socket is not None
    if has_port and admin is None:
        hint = "give admin_token_file, or the variable LORAEXPORT_ADMIN_TOKEN"
        problems.append(Problem(1, "admin_port", "operators have no token", hint))
    if any(len(key) < 16 for key in every):
        problems.append(Problem(1, "keys", "a key of less than 16 characters", "make it longer"))
    if problems:
        raise SettingsError("keys", problems)
    return Keys(entries, admin)


def _read_file(file: Path) -> tuple[KeyEntry, ...]:
    data, lines, problems = read_yaml(file, _FILE)
    problems += [
        # What a message quotes of a file of keys could be one of them.
        Problem(one.line, one.path, one.message.partition(", got ")[0], one.hint)
        for one in find_problems(data, _KeyFile, lines)
    ]
    if problems:
        raise SettingsError(str(file), problems)
    entries = msgspec.convert(data, _KeyFile).keys
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise SettingsError(str(file), [Problem(1, "keys", "two keys of one name")])
    return entries


def _read_secret(file: Path) -> str:
    try:
        text = read_bounded(file, _MOST_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(1, "", "no text that can be read", "one line of ASCII is expected")
        raise SettingsError(str(file), [problem]) from error
    return text


def _token(authorization: str | None) -> str:
    found = _BEARER.fullmatch(authorization or "")
    return found[1] if found else ""


def _refused(authorization: str | None) -> ApiError:
    if not authorization:
        message = "No key was given. Send it as `Authorization: Bearer KEY`."
    else:
        message = "The key is not known here."
    return ApiError(401, message, code="invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
