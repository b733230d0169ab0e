"""Servers that several tests ask."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.decoders import write_tenants
from support.home import Home
from support.serving import ADMIN, KEYS, Server, serving, write_encoder


@pytest.fixture(scope="session")
def encoder(home: Home) -> Path:
    """An artifact of sentence vectors; `legal` lies in `../..`."""
    return home.artifact(write_encoder)


@pytest.fixture(scope="session")
def decoder(home: Home) -> Path:
    """An artifact that generates; `first` and `second` are its adapters, and may be blended."""
    return home.artifact(write_tenants, export={"blend": True})


@pytest.fixture(scope="session")
def server(encoder: Path) -> Iterator[Server]:
    """One without keys, of one artifact, `tiny`."""
    with serving(f"tiny={encoder}") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's own."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def many(
    home: Home, encoder: Path, decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One with keys and a port for operators, of an artifact of each kind."""
    folder = tmp_path_factory.mktemp("many")
    classify, tag = "sequence-classification", "token-classification"
    models = {
        "tiny": encoder,
        "classes": home.artifact(write_encoder, task=classify, labels=3),
        "pairs": home.artifact(write_encoder, task=classify, labels=1),
        "tags": home.artifact(write_encoder, task=tag, labels=4),
        "llama": decoder,
    }
    (folder / "keys.yaml").write_text(KEYS)
    (folder / "token").write_text(f"{ADMIN}\n")
    lines = [f"  {name}: {path}" for name, path in models.items() if name != "tiny"]
    settings = [
        "models:",
        f"  tiny: {{path: {encoder}, dimensions: [8, 16], pinned: [sql]}}",
        *lines,
        f"keys_file: {folder / 'keys.yaml'}",
        f"admin_token_file: {folder / 'token'}",
        "admin_port: 0",
        "allow_adapter_updates: true",
        f"adapter_roots: [{encoder.parents[1]}]",
        "max_inputs: 4",
        "metrics_adapters: 2",
        "log_format: json",
    ]
    (folder / "settings.yaml").write_text("\n".join(settings) + "\n")
    with serving("--config", str(folder / "settings.yaml")) as running:
        yield running
