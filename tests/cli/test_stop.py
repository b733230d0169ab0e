"""Ctrl-C and SIGTERM: their exit codes, and a build that leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.builds import write_model_project

from loraexport.cli.app import EXIT_CODES
from loraexport.cli.stop import Stopped, stoppable

BOUND_S = 180


@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [
        (signal.SIGINT, 130, "plan"),
        (signal.SIGTERM, 143, "read weights"),
        pytest.param(signal.SIGINT, 130, "export the model to ONNX", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "verify", marks=pytest.mark.slow),
    ],
)
def test_a_build_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: int, code: int, stage: str
) -> None:
    spec, out = write_model_project(tmp_path), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "loraexport", "build", str(spec), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if f": {stage}" in line:
            break
    else:
        raise AssertionError(f"never came to {stage!r}")
    process.send_signal(number)
    printed, said = process.communicate(timeout=BOUND_S)
    assert process.returncode == code, said
    assert printed == ""
    assert f"Stopped: by {signal.Signals(number).name}\n" in said
    assert "Traceback" not in said
    assert [path.name for path in out.glob(".*")] in ([], [".tiny.lock"])
    assert not list(out.glob("[!.]*"))
    assert not list(tmp_path.glob("tmp*")), "temporary files are gone too"


def test_the_help_says_what_each_exit_code_means() -> None:
    command = [sys.executable, "-m", "loraexport", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = re.sub(r"\s+", " ", done.stdout)
    assert EXIT_CODES in words
    for code in (0, 1, 2, 3, 4, 5, 130, 143):
        assert re.search(rf"\b{code} ", EXIT_CODES)


def test_signals_are_as_they_were_afterwards() -> None:
    kept = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signal is signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == kept


def test_another_thread_touches_no_signal() -> None:
    kept, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [kept]
