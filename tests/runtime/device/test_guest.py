"""What a session leaves alone in somebody's process: stdout, onnxruntime's log severity, stderr."""

import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.waiting import DEADLINE

import loraexport_runtime as lr
from loraexport_runtime.device import cuda_libraries, ort_session
from loraexport_runtime.device.cuda_libraries import load_cuda_libraries, missing_library

LOUD = """
import sys

import numpy as np
import onnxruntime as ort

import loraexport_runtime as lr

def open_alone():
    ort.InferenceSession(graph, providers=["CPUExecutionProvider"])  # logs that stacks are inputs
    sys.stderr.write("---\\n")
    sys.stderr.flush()

graph, artifact = sys.argv[1] + "/graphs/up.onnx", sys.argv[1]
ort.set_default_logger_severity(int(sys.argv[2]))
open_alone()
session = lr.load(artifact, threads=1)
session["up"].run(np.zeros((2, 32), np.float32), segments=[("sql", 2)])
try:
    lr.load(artifact, ["cuda"]).close()
except lr.ProviderError:
    pass
session.close()
sys.stderr.write("---\\n")
open_alone()
"""


@pytest.mark.parametrize(("severity", "is_loud"), [(2, True), (3, False)])
def test_sessions_of_the_caller_log_as_before(tenants: Path, severity: int, is_loud: bool) -> None:
    command = [sys.executable, "-W", "error", "-c", LOUD, str(tenants), str(severity)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    before, ours, after, rest = done.stderr.split("---\n")
    assert (ours, rest) == ("", ""), "a session of ours says nothing"
    assert len(before.splitlines()) == len(after.splitlines())
    assert bool(before) == is_loud, "the warnings that this test is about"


def test_loads_at_once_leave_stdout_alone(tenants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other in the middle of looking for CUDA."""
    together = threading.Barrier(2, timeout=DEADLINE)
    seen: list[Any] = []
    load = ort_session.load_cuda_libraries

    def meet() -> None:
        together.wait()
        seen.append(sys.stdout)
        load()
        together.wait()

    def attempt(_: int) -> None:
        with pytest.raises(lr.ProviderError, match="cannot run here: no CUDA, says the test"):
            lr.load(tenants, ["cuda"])

    monkeypatch.setattr(ort_session, "load_cuda_libraries", meet)
    monkeypatch.setattr(ort_session, "missing_library", lambda: "no CUDA, says the test")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, range(2)))
    assert sys.stdout is mine
    assert seen == [mine, mine]
    assert mine.getvalue() == ""


class TestCudaLibraries:
    @pytest.fixture
    def tried(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What is loaded, in order; `fails` names what cannot be."""
        names: list[str] = []

        def load(name: str) -> Any:
            names.append(name)
            if "damaged" in name:
                raise OSError(f"{name}: file too short")
            return SimpleNamespace(cudaGetDeviceCount=lambda count: 0)

        monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", load)
        monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
        return names

    def test_those_of_pip_packages_come_first(
        self, tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = ["cu13/lib/libcudart.so.13", "cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9"]
        others = ["cu12/lib/libcudart.so.12", "damaged/lib/libcublasLt.so.13"]
        for file in [*files, *others]:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        monkeypatch.setattr(cuda_libraries, "_package_folders", lambda: [tmp_path])
        load_cuda_libraries()
        wanted = [others[1], files[1], files[0], files[2]]
        assert [str(Path(name).relative_to(tmp_path)) for name in tried] == wanted

    def test_the_packages_are_found_beside_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "nvidia").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        assert tmp_path / "nvidia" in cuda_libraries._package_folders()

    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(name: str) -> None:
            if name == "libcurand.so.10":
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", load)
        assert missing_library() == "libcurand.so.10: cannot open shared object file"
        monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", lambda name: None)
        assert missing_library() is None

    @pytest.mark.parametrize(
        ("status", "num", "index", "problem"),
        [
            (0, 2, 1, None),
            (0, 1, 1, "there is no device 1; CUDA finds 1, counted from 0"),
            (100, 0, 0, r"CUDA finds no device (error 100 of cudaGetDeviceCount)"),
        ],
    )
    def test_devices(
        self,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        num: int,
        index: int,
        problem: str | None,
    ) -> None:
        def count_devices(count: Any) -> int:
            count._obj.value = num
            return status

        library = SimpleNamespace(cudaGetDeviceCount=count_devices)
        monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", lambda name: library)
        assert cuda_libraries.missing_device(index) == problem

    def test_what_a_device_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def read(number: Any, attribute: int, index: int) -> int:
            number._obj.value = {75: 9, 76: index}[attribute]
            return 0

        library = SimpleNamespace(cudaDeviceGetAttribute=read)
        monkeypatch.setattr(cuda_libraries.ctypes, "CDLL", lambda name: library)
        assert cuda_libraries.compute_capability(0) == (9, 0)

    @pytest.mark.parametrize("version", ["", "none"])
    def test_a_build_that_does_not_say_its_cuda(
        self, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        monkeypatch.setattr(ort, "cuda_version", version, raising=False)
        assert "libcudart.so.13" in cuda_libraries._needed()
        monkeypatch.setattr(ort, "cuda_version", "12.8", raising=False)
        assert "libcudart.so.12" in cuda_libraries._needed()
        assert "libcufft.so.11" in cuda_libraries._optional()


def test_a_run_that_fails_says_so_by_its_exception_alone(tenants: Path, capfd: Any) -> None:
    layer: Any = lr.load(tenants, threads=1)["words"]
    feeds = {"ids": np.array([99]), "seg_indptr": np.array([0, 1]), "seg_slots": np.array([0])}
    with pytest.raises(Exception, match="Non-zero status code returned while running"):
        layer._session.run(None, feeds)
    assert capfd.readouterr() == ("", "")
