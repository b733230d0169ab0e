"""Threads that work beside captures, over a stand-in for CUDA's runtime."""

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from loraexport_runtime.device import captures
from loraexport_runtime.errors import InputError

GLOBAL, RELAXED = 0, 2


class _Cudart:
    """Keeps a mode for each thread, as CUDA does."""

    def __init__(self) -> None:
        self._modes: dict[int, int] = {}

    @property
    def mode(self) -> int:
        return self._modes.get(threading.get_ident(), GLOBAL)

    def exchange(self, mode: Any) -> int:
        value = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        value[0], self._modes[threading.get_ident()] = self.mode, value[0]
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> _Cudart:
    made = _Cudart()
    library = SimpleNamespace(cudaThreadExchangeStreamCaptureMode=made.exchange)
    monkeypatch.setattr(captures, "_cudart", lambda: library)
    return made


def test_a_thread_has_its_own_mode_again(cudart: _Cudart) -> None:
    with captures.beside_captures(("cuda", 0)):
        assert cudart.mode == RELAXED
        with pytest.raises(InputError), captures.beside_captures(("cuda", 0)):
            raise InputError("refused")
        assert cudart.mode == RELAXED
    assert cudart.mode == GLOBAL


def test_a_thread_of_our_own_stays_there(cudart: _Cudart) -> None:
    modes = []

    def work() -> None:
        captures.stay_beside_captures(("cuda", 0))
        modes.append(cudart.mode)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (modes, cudart.mode) == ([RELAXED], GLOBAL)


def test_a_cpu_has_no_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("there may be no CUDA")

    monkeypatch.setattr(captures, "_cudart", fail)
    captures.stay_beside_captures(("cpu", 0))
    with captures.beside_captures(("cpu", 0)):
        pass
