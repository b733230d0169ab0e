"""A load at a server: so many clients who wait for their answers, or so many requests a second."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from loraexport_runtime.errors import InputError

from .load import Load, Request, arrivals, requests
from .wire import BROKEN, Connection, Place, Reply

TIMEOUT = 120.0
"""Seconds until a request is given up."""
_IDLE = 3.0
"""Seconds until a connection is not used again: servers end those that are idle, some after 5."""


@dataclass(frozen=True)
class Pace:
    """How fast: exactly one of `clients` and `rate` is set."""

    seconds: float
    clients: int | None = None
    """Who ask, get their answer, and ask again: a closed loop."""
    rate: float | None = None
    """Requests a second, whether the others are answered or not: an open loop."""
    warm_up: float = 0.0
    """Seconds ahead, of which nothing is counted."""


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds from the end of the warm-up."""

    model: int
    status: int
    start: float
    """When it was to be sent: in an open loop a late generator's delay counts too."""
    end: float
    first: float | None
    """When the first byte of its answer's body came."""
    tokens_in: int
    tokens_out: int


@dataclass
class Run:
    """What a load has given."""

    samples: list[Sample] = field(default_factory=list)
    cpu: float = 0.0
    """Seconds of CPU that the generator took, in the counted time."""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_READER = msgspec.json.Decoder(_Answer)


async def list_models(place: Place) -> list[str]:
    """The adapters that may be asked, or the bases where there are none.

    Raises:
        InputError: the server does not list them.
        OSError: nobody listens.
    """
    connection = await place.connect()
    try:
        reply = await connection.ask(place.request("GET", "/v1/models"), TIMEOUT)
        if reply.status != 200:
            raise InputError(f"{place.url}/v1/models: {reply.status}; name --models")
        cards = msgspec.json.decode(reply.body)["data"]
        adapters = [card["id"] for card in cards if card.get("parent")]
        return adapters or [card["id"] for card in cards]
    finally:
        connection.close()


async def drive(place: Place, load: Load, pace: Pace) -> Run:
    """Send the load, and wait for every answer. Raises OSError: nobody listens."""
    return await _Drive(place, load, pace).run()


class _Drive:
    def __init__(self, place: Place, load: Load, pace: Pace) -> None:
        self._place, self._load, self._pace = place, load, pace
        self._path = f"/v1/{load.route}"
        self._run = Run()
        self._idle: list[Connection] = []
        self._start = 0.0

    async def run(self) -> Run:
        self._idle.append(await self._place.connect())  # or it fails here
        begin = time.perf_counter()
        self._start = begin + self._pace.warm_up
        measuring = asyncio.create_task(self._measure())
        try:
            if self._pace.rate is None:
                assert self._pace.clients is not None, "one of both"
                draws = requests(self._load)
                clients = [self._client(draws) for _ in range(self._pace.clients)]
                await asyncio.gather(*clients)
            else:
                await self._open_loop(self._pace.rate, begin)
            await measuring
        finally:
            measuring.cancel()
            for connection in self._idle:
                connection.close()
        return self._run

    async def _measure(self) -> None:
        await asyncio.sleep(self._pace.warm_up)
        before = time.process_time()
        await asyncio.sleep(self._pace.seconds)
        self._run.cpu = time.process_time() - before

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _client(self, draws: Iterator[Request]) -> None:
        while (now := self._now()) < self._pace.seconds:
            await self._ask(next(draws), now)

    async def _open_loop(self, rate: float, begin: float) -> None:
        asking: set[asyncio.Task[None]] = set()
        draws = requests(self._load)
        for at in arrivals(rate, self._load.seed):
            at += begin - self._start
            if at >= self._pace.seconds:
                break
            if (wait := at - self._now()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self._ask(next(draws), at))
            asking.add(task)
            task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)

    async def _ask(self, request: Request, start: float) -> None:
        reply = Reply(BROKEN)
        try:
            connection = self._kept() or await self._place.connect()
            data = self._place.request("POST", self._path, request.body)
            reply = await connection.ask(data, TIMEOUT)
            if connection.is_open:
                connection.since = time.perf_counter()
                self._idle.append(connection)
        except OSError:
            await asyncio.sleep(0.01)  # a server that is gone is not asked without a pause
        end = self._now()
        if end < 0:
            return
        usage = _usage(reply, self._load.route == "completions")
        first = reply.first - self._start if reply.first else None
        sample = Sample(
            request.model,
            reply.status,
            start,
            end,
            first,
            usage.prompt_tokens,
            usage.completion_tokens,
        )
        self._run.samples.append(sample)

    def _kept(self) -> Connection | None:
        """A connection that waits for a request, and that the server will not end right now."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and time.perf_counter() - connection.since < _IDLE:
                return connection
            connection.close()
        return None


def _usage(reply: Reply, is_stream: bool) -> _Usage:
    """The tokens of an answer; of a stream its last event but the end has them."""
    if reply.status != 200:
        return _Usage()
    body = reply.body
    if is_stream:
        events = [event for event in body.split(b"\n\n") if event.startswith(b"data: {")]
        body = events[-1].removeprefix(b"data: ") if events else b"{}"
    return _READER.decode(body).usage or _Usage()
