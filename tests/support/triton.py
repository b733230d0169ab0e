"""Triton itself, of the wheel nvidia-pytriton, as a process that serves a model repository."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from support.waiting import wait_until

VARIABLE = "TRITON_SITE_PACKAGES"
"""The site-packages of an environment of its own, as its interpreter takes numpy < 2 alone."""
_STUB = "pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub"


def find_triton() -> Path:
    """The folder that VARIABLE names; skips where there is no Triton."""
    site = Path(os.environ.get(VARIABLE, "/nowhere"))
    if not (site / _STUB).is_file():
        pytest.skip(
            f"{VARIABLE} names no site-packages for Python 3.11 with numpy<2 and, by pip's"
            " --no-deps, nvidia-pytriton"
        )
    return site


@contextmanager
def triton(site: Path, repository: Path, scratch: Path) -> Iterator[str]:
    """A server of all models of a repository. Gives host:port of its HTTP."""
    backends = scratch / "backends"
    (backends / "python").mkdir(parents=True)
    files = [*(site / "pytriton/tritonserver/backends/python").glob("*.*"), site / _STUB]
    for file in files:
        (backends / "python" / file.name).symlink_to(file)
    port = free_port()
    command = [
        str(site / "pytriton/tritonserver/bin/tritonserver"),
        *("--model-repository", str(repository), "--backend-directory", str(backends)),
        *("--http-address", "127.0.0.1", "--http-port", str(port)),
        *("--allow-grpc", "false", "--allow-metrics", "false", "--exit-timeout-secs", "5"),
    ]
    for model in repository.glob("*/1/model.py"):  # the stub passes no variable on; in a container
        lines = f"import sys\n\nsys.path.insert(0, {str(site)!r})\n"  # numpy is where it looks
        model.write_text(lines + model.read_text())
    variables = os.environ | {"LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs")}
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

            wait_until(is_ready)
            yield f"127.0.0.1:{port}"
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that was free just now."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port: int = listening.getsockname()[1]
    return port
