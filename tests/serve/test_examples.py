"""examples/serve does what its pages say, with a small model."""

import subprocess
import sys
from pathlib import Path

from support.serving import Server

from loraexport_serve import ModelSettings, read_settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/serve"


def test_rerank_py(server: Server) -> None:
    command = [sys.executable, str(EXAMPLES / "rerank.py"), server.url, "--model", "sql"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_the_settings_are_ones() -> None:
    settings = read_settings(EXAMPLES / "settings.yaml", {}, {})
    assert settings.models["minilm"] == ModelSettings(path="artifacts/minilm", pinned=("pydoc",))
    assert settings.log_format == "json"
