"""The server within Triton's own interpreter: its event loop runs in a thread of its own."""

import asyncio
import threading
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

from ..config.schema import ModelSettings, Settings
from ..embedded import Embedded, Reply

T = TypeVar("T")


class ProcessServer:
    """What `SocketServer` of model.py is, without a socket; any thread may call."""

    def __init__(self, name: str, folder: str, on_gpu: bool) -> None:
        """Open the artifact in a folder. Raises LoraexportError: it cannot be served."""
        settings = Settings(
            models={name: ModelSettings(path=folder)}, device="cuda" if on_gpu else "cpu"
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loraexport-serve")
        self._thread.start()
        self._server = Embedded(settings, {})
        try:
            self._run(self._server.start())
        except BaseException:
            self._end()
            raise

    def is_ready(self) -> bool:
        return self._server.is_ready

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        return self._run(self._post(path, body))

    def stream(self, path: str, body: bytes) -> Generator[tuple[int, bytes], None, None]:
        """The status and each line of an answer."""
        reply = self._run(self._server.ask("POST", path, body=body))
        left = b""
        try:
            while (chunk := self._run(_next(reply))) is not None:
                *lines, left = (left + chunk).split(b"\n")
                yield from ((reply.status, line) for line in lines)
            if left:
                yield reply.status, left
        finally:
            self._run(_close(reply))

    def close(self) -> None:
        """Answer what was accepted, and give everything up."""
        self._run(self._server.close())
        self._end()

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        reply = await self._server.ask("POST", path, body=body)
        return reply.status, await reply.body()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(reply: Reply) -> bytes | None:
    return await anext(reply.chunks, None)


async def _close(reply: Reply) -> None:
    await reply.chunks.aclose()
