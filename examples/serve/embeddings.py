"""Start a server, ask it with three adapters and the base at once, and show who answered what.

    python examples/serve/embeddings.py artifacts/minilm

Needs loraexport-serve alone: requests are plain HTTP. Each of the four asks which name of a
character fits an HTML entity, which the adapter `entity` was trained for; they share batches, and
each gets the answer of its own adapter.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

QUERY = "napos"
NAMES = [
    "LATIN SMALL LETTER N PRECEDED BY APOSTROPHE",
    "RIGHT SINGLE QUOTATION MARK",
    "SNOWFLAKE",
    "NOT ALMOST EQUAL TO",
]
SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    command = [sys.executable, "-m", "loraexport_serve", f"minilm={args.artifact}"]
    server = subprocess.Popen([*command, "--port", str(args.port), "--log-level", "warning"])
    url = f"http://127.0.0.1:{args.port}"
    try:
        wait_ready(server, url)
        models = [card["id"] for card in ask(f"{url}/v1/models")["data"]]
        with ThreadPoolExecutor(len(models)) as pool:
            scores = list(pool.map(lambda model: rank(url, model), models))
    finally:
        server.terminate()  # what was accepted is answered first
        server.wait()
    print(f"{len(models)} tenants asked at once which name fits {QUERY!r}:")
    for model, (best, score) in zip(models, scores, strict=True):
        print(f"  {model:8} {score:6.3f}  {best}")


def rank(url: str, model: str) -> tuple[str, float]:
    """The name that fits best, by one model's vectors."""
    body = {"model": model, "input": [QUERY, *NAMES]}
    rows = [row["embedding"] for row in ask(f"{url}/v1/embeddings", body)["data"]]
    query, *vectors = rows
    cosines = [sum(a * b for a, b in zip(query, row, strict=True)) for row in vectors]
    best = max(range(len(NAMES)), key=cosines.__getitem__)
    return NAMES[best], cosines[best]


def ask(url: str, body: Any = None) -> Any:
    """The answer of a route; a body makes it a POST."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(url, data, timeout=SECONDS) as answer:
        return json.load(answer)


def wait_ready(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Until readyz says so: the port is open before the artifact is loaded."""
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            ask(f"{url}/readyz")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the server did not become ready; its log says why")


if __name__ == "__main__":
    main()
