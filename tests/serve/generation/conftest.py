"""Servers of a tiny decoder with two adapters."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.serving import Server, serving

from loraexport_runtime import TextGenerator, load_generator


@pytest.fixture(scope="session")
def generator(decoder: Path) -> Iterator[TextGenerator]:
    """What the runtime itself gives, in this process."""
    with load_generator(decoder, rows=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def chats(decoder: Path) -> Iterator[Server]:
    """A server of it, `llama`, without keys."""
    with serving(f"llama={decoder}") as running:
        yield running


@pytest.fixture(scope="session")
def openai_client(chats: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chats.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def narrow(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that computes one answer at a time, lets 64 wait, and each for half a second."""
    file = tmp_path_factory.mktemp("narrow") / "settings.yaml"
    file.write_text(
        f"models:\n  llama: {{path: {decoder}, rows: 1}}\nmax_queued: 64\nqueue_timeout: 0.5\n"
    )
    with serving("--config", str(file)) as running:
        yield running
