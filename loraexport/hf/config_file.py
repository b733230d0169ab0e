"""One JSON object of a base's directory -> its values, each of the type that it should have."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from loraexport_runtime.contract.foreign import has_file, read_object
from loraexport_runtime.errors import quoted

from ..errors import BaseModelError


class ConfigFile:
    """A file that may be absent, or has to be there; null is as absent.

    Every method raises BaseModelError: the file is no JSON object, or a value is of another type
    than it should be.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path, required: bool = False) -> "ConfigFile":
        if not required and not has_file(path):
            return cls(path, {})
        hint = "the download is not complete, fetch it again"
        return cls(path, read_object(path, BaseModelError, hint))

    def number(self, key: str) -> int | None:
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._typed(key, value, int, "an integer")

    def text(self, key: str) -> str | None:
        return self._typed(key, self.values.get(key), str, "a text")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def object(self, key: str) -> dict[str, Any]:
        return self._typed(key, self.values.get(key), dict, "an object") or {}

    def texts(self, key: str) -> dict[str, str]:
        values = self.object(key)
        for text in values.values():
            if not isinstance(text, str):
                raise self.error(key, "texts", text)
        return values

    def size(self, key: str, expected: int | None = None) -> int:
        """A number from 1 on that has to be there, and to be the one that is expected."""
        value = self.number(key)
        if value is None or value < 1 or expected not in (None, value):
            text = "a number from 1 on" if expected is None else f"{expected}, as comes before it"
            raise self.error(key, text, value)
        return value

    def require(self, key: str, *harmless: Any) -> None:
        """Refuse a value that is there and none of those without an effect of their own."""
        value = self.values.get(key)
        if value is not None and not any(_same(value, default) for default in harmless):
            allowed = " or ".join(repr(default) for default in (*harmless, None))
            raise BaseModelError(
                f"{self.path}: {key} is {quoted(value)}, which changes what the model gives and"
                f" cannot be built; only {allowed} can"
            )

    def require_known(self, keys: Collection[str]) -> None:
        """Refuse a key that is none of these."""
        for key in self.values:
            if key not in keys:
                raise BaseModelError(
                    f"{self.path}: {quoted(key)} is a key that this version does not know, and may"
                    " change what the model gives; remove it if it does not"
                )

    def error(self, key: str, expected: str, value: Any) -> BaseModelError:
        return BaseModelError(
            f"{self.path}: {key}: expected {expected}, got {quoted(value)}; correct it"
        )

    def _typed(self, key: str, value: Any, kind: type, expected: str) -> Any:
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        raise self.error(key, expected, value)


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and not by Python's 0 == False."""
    return type(value) is type(allowed) and bool(value == allowed)
