"""Triton itself, of the wheel nvidia-pytriton, as a process that serves a model repository."""

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any, Self

import httpx
import pytest

from support.documents import ROOT
from support.serving import START
from support.waiting import DEADLINE, wait_until

SITE = ROOT / ".venv-triton"
"""Packages of its own, with its client: Triton's Python models take numpy < 2 alone."""
_STUB = "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"
needs_triton = pytest.mark.skipif(
    not ((SITE / _STUB).is_file() and (SITE / "tritonclient").is_dir()),
    reason="scripts/setup --end-to-end triton",
)


@contextmanager
def triton(repository: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """A server of all models of a repository. Gives host:port of its HTTP and of its gRPC."""
    backends = scratch / "backends"
    (backends / "python").mkdir(parents=True)
    files = [*(SITE / "pytriton/tritonserver/backends/python").glob("*.*"), SITE / _STUB]
    for file in files:
        (backends / "python" / file.name).symlink_to(file)
    port, grpc_port = free_port(), free_port()
    command = [
        str(SITE / "pytriton/tritonserver/bin/tritonserver"),
        *("--model-repository", str(repository), "--backend-directory", str(backends)),
        *("--http-address", "127.0.0.1", "--http-port", str(port)),
        *("--grpc-address", "127.0.0.1", "--grpc-port", str(grpc_port)),
        *("--allow-metrics", "false", "--exit-timeout-secs", "5"),
    ]
    for model in repository.glob("*/1/model.py"):  # the stub passes no variable on; in a container
        lines = f"import sys\n\nsys.path.insert(0, {str(SITE)!r})\n"  # numpy is where it looks
        model.write_text(lines + model.read_text())
    variables = os.environ | {"LD_LIBRARY_PATH": str(SITE / "nvidia_pytriton.libs")}
    log = scratch / "triton.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables)
        try:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_ready, START)
            yield f"127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


class Held:
    """At a socket in place of a server: answers nobody until `go` is set, then all alike."""

    def __init__(self, path: Path, answer: Any) -> None:
        self.go, self.asked = threading.Event(), threading.Semaphore(0)
        body, held = json.dumps(answer).encode(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                held.asked.release()
                held.go.wait(DEADLINE)
                self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)

        self._server = ThreadingUnixStreamServer(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def free_port() -> int:
    """A port that was free just now."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port: int = listening.getsockname()[1]
    return port
