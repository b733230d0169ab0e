"""`loraexport-serve`: flags, variables and a file -> a server, and its end as an exit code."""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraexport_runtime.errors import EXIT_CODES, LoraexportError, exit_code

from .bench import command as bench
from .config.flags import make_parser
from .config.reader import read_models, read_settings
from .config.schema import Settings
from .errors import SettingsError
from .server import serve
from .triton import command as triton

_CODES = ((SettingsError, 2), *EXIT_CODES)
_KNOWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0 after a signal that let it answer everything."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["bench"]:
            return bench.main(words[1:])
        if words[:1] == ["triton"]:
            return triton.main(words[1:])
        _serve(words)
    except LoraexportError as error:
        print(f"loraexport-serve: {error}", file=sys.stderr)
        return exit_code(error, _CODES)
    except OSError as error:  # of a port, or of a file of TLS
        print(f"loraexport-serve: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(arguments: Sequence[str]) -> None:
    given = vars(make_parser().parse_args(arguments))
    file = given.pop("config")
    flags: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    words = flags.pop("models")
    if words:
        flags["models"] = read_models(words)
    settings = read_settings(None if file is None else Path(file), os.environ, flags)
    _set_up_log(settings)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, os.environ))


def _loop_factory() -> Any:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _set_up_log(settings: Settings) -> None:
    # What no format here writes is not looked up for each line: a request has one.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as logging's own guide has it
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonLines()
        if settings.log_format == "json"
        else _Lines("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


class _Lines(logging.Formatter):
    """A line of text, whose date and time are made anew each second."""

    _second, _text = -1, ""

    def formatTime(  # noqa: N802 - its name in logging
        self, record: logging.LogRecord, datefmt: str | None = None
    ) -> str:
        second = int(record.created)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._text},{int(record.msecs):03d}"


class _JsonLines(logging.Formatter):
    """A line of JSON for each record, with the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in _KNOWN}
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
