"""An artifact that fails again and again is told by the probes, in a server of this process."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraexport_runtime import ClosedError, StepError
from loraexport_serve import Settings
from loraexport_serve.app import make_app
from loraexport_serve.auth import Keys
from loraexport_serve.config.schema import models_of
from loraexport_serve.hosts.encoder import EncoderHost
from loraexport_serve.service import Phase, Service

Ask = Callable[[str], Awaitable[int]]


def run(encoder: Path, story: Callable[[EncoderHost, Ask], Awaitable[None]]) -> None:
    """Tell a story of a host, and of who asks its routes."""

    async def main() -> None:
        settings = Settings(models={"tiny": str(encoder)})
        service = Service(settings, Keys())
        host = await service.start("tiny", models_of(settings)["tiny"])
        assert isinstance(host, EncoderHost)
        service.phase = Phase.READY
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:

            async def ask(path: str) -> int:
                if path.startswith("/v1"):
                    body = {"input": "hello"}
                    return (await client.post(path, json=body)).status_code
                return (await client.get(path)).status_code

            await story(host, ask)
        await service.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status", "live"),
    [(StepError("a step"), 500, 200), (RuntimeError("onnxruntime"), 500, 200),
     (ClosedError("its thread has ended"), 503, 503)],
)  # fmt: skip
def test_faults_in_a_row_are_told(
    encoder: Path, error: Exception, status: int, live: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is served in between begins the row anew; who asked amiss counts for nothing."""

    async def story(host: EncoderHost, ask: Ask) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        for times in (4, 5):
            with monkeypatch.context() as broken:
                broken.setattr(host.batcher, "submit", fail)
                for _ in range(times):
                    assert await ask("/v1/embeddings") == status
                assert await ask("/v1/score") == 400
            expected = 200 if times == 4 else 503
            assert await ask("/readyz") == expected
            assert await ask("/livez") == (200 if times == 4 else live)
            assert await ask("/v1/embeddings") == 200
            assert await ask("/readyz") == await ask("/livez") == 200

    run(encoder, story)


def test_a_client_is_told_no_reason_of_a_fault(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(host: EncoderHost, ask: Ask) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a secret of the inside")

        monkeypatch.setattr(host.batcher, "submit", fail)
        assert await ask("/v1/embeddings") == 500

    run(encoder, story)
    assert "a secret of the inside" in caplog.text  # the log has it
