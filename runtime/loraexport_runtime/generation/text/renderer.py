"""A chat template and its variables -> text, by a process that is ended where it does not end."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ...errors import ChatTemplateError, InputError, ProviderError
from . import sandbox

_MAX_REQUEST = 2**26
"""Bytes: of a template and a chat together."""
_SECONDS = 5.0
"""Of the processor for a chat; published templates take milliseconds for long ones."""
_PATIENCE = 12
"""Times as long by the clock, on a machine that has other work: then the process is ended."""
_KEPT_VARIABLES = ("TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Of the environment: the time zone, and what Python needs to start."""


class TemplateRenderer:
    """Jinja in a process of its own, started for the first chat, and again after it was ended.

    Threads: any may call, one after another.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        """The process that started it: its child after a fork starts one of its own."""
        self._end: Any = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of a template.

        Args:
            variables: of JSON's types.

        Raises:
            ChatTemplateError: the template is broken, raises an error, or goes past its bounds.
            InputError: the variables are more than a chat has.
            ProviderError: the process cannot be started.
        """
        request = json.dumps({"template": template, "variables": variables}).encode()
        if len(request) > _MAX_REQUEST:
            raise InputError(
                f"a chat and its template are {len(request):,} bytes; expected at most"
                f" {_MAX_REQUEST >> 20} MiB: shorten the chat"
            )
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            assert self._process is not None, "it was just started"
            try:
                status, text = self._ask(self._process, request)
            except BaseException:
                self._stop()
                raise
        if status == sandbox.RENDERED:
            return text
        if status == sandbox.REFUSED:
            raise ChatTemplateError(f"the chat template refuses this chat: {text}")
        raise _past_bounds(f"the chat template goes past its bounds: {text}")

    def close(self) -> None:
        """End the process, if there is one; the next chat would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._process = None
        self._owner = os.getpid()
        command = [sys.executable, "-I", "-X", "utf8", sandbox.__file__, str(self._seconds)]
        kept = {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
        try:
            process = subprocess.Popen(
                [*command, *_import_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept,
            )
        except OSError as error:
            raise ProviderError(
                f"the process that renders chat templates cannot be started: {error}; let"
                f" {sys.executable or 'Python'} be run, or give prompts as text or token ids"
            ) from error
        self._process = process
        self._end = weakref.finalize(self, _finish, process, self._owner)
        try:
            status, _ = self._receive(process)
            assert status == sandbox.STARTED, "the first answer says that it has started"
        except BaseException as error:
            self._stop()
            if isinstance(error, ChatTemplateError):
                raise ProviderError(
                    "the process that renders chat templates ended before it began; see whether"
                    f" '{' '.join(command)}' starts, or give prompts as text or token ids"
                ) from error
            raise

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _ask(self, process: subprocess.Popen[bytes], request: bytes) -> tuple[bytes, str]:
        assert process.stdin is not None, "it is a pipe"
        clock = threading.Timer(_PATIENCE * self._seconds, process.kill)
        clock.daemon = True
        clock.start()
        try:
            process.stdin.write(sandbox.LENGTH.pack(len(request)) + request)
            process.stdin.flush()
            return self._receive(process)
        except OSError as error:
            raise self._ended(process) from error
        finally:
            clock.cancel()

    def _receive(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        assert process.stdout is not None, "it is a pipe"
        header = process.stdout.read(sandbox.HEADER.size)
        if len(header) < sandbox.HEADER.size:
            raise self._ended(process)
        status, length = sandbox.HEADER.unpack(header)
        if length > 4 * sandbox.MAX_TEXT:
            raise self._ended(process)
        data = process.stdout.read(length)
        if len(data) < length:
            raise self._ended(process)
        return status, data.decode("utf-8", "surrogatepass")

    def _ended(self, process: subprocess.Popen[bytes]) -> ChatTemplateError:
        """Why there is no answer."""
        process.kill()
        process.wait()
        return _past_bounds(
            f"the chat template does not end within {self._seconds:g} s of computing, or ends the"
            f" process that renders it (exit status {process.returncode})"
        )


def _past_bounds(why: str) -> ChatTemplateError:
    error = ChatTemplateError(
        f"{why}; shorten the chat, or correct the template of the base and build again"
    )
    error.is_past_bounds = True
    return error


def _finish(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a process and give its pipes up; after a fork the pipes alone are ours."""
    pipes: tuple[IO[bytes] | None, ...] = (process.stdin, process.stdout)
    if owner == os.getpid():
        process.kill()
        process.wait()
    for pipe in pipes:
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue  # what was not written yet has nowhere to go


def _import_folders() -> list[str]:
    """Where Jinja and what it needs lie, for a process that sees no PYTHONPATH.

    Raises:
        ProviderError: it is not installed.
    """
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ProviderError(
                "chat templates need Jinja2: pip install 'loraexport-runtime[generation]'"
            )
        folders.append(str(Path(spec.origin).parents[1]))
    return folders
