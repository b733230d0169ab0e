"""A server that runs in a process of its own while it is measured, and what a load finds there."""

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "loraexport_serve"]


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The address of a server that this command starts, and its process, once it is ready."""
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url, said = "", []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"clients at (\S+)", line):
                url = found[1]
            if "ready:" in line:
                break
        else:
            raise SystemExit("".join(said))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def ask(url: str, *options: str) -> dict[str, Any]:
    """What `loraexport-serve bench` finds."""
    with tempfile.NamedTemporaryFile() as out:
        command = [*COMMAND, "bench", url, *options, "--json", out.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(Path(out.name).read_text())
        return figures
