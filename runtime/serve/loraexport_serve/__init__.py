"""Serve artifacts over HTTP, every request with its own adapter, together in one batch.

It needs starlette, uvicorn, msgspec, prometheus-client and the runtime; no torch. The command is
`loraexport-serve`; `serve` is the same for a program with an event loop of its own.
"""

from .config.reader import read_settings
from .config.schema import ModelSettings, Settings
from .errors import ApiError, SettingsError
from .server import serve
from .version import __version__

__all__ = [
    "ApiError",
    "ModelSettings",
    "Settings",
    "SettingsError",
    "__version__",
    "read_settings",
    "serve",
]
