"""A generator in a service: its providers, its end, what it logs; on either engine."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoders import FAMILIES, open_driven, write_decoder
from support.waiting import DEADLINE, wait_until

import loraexport_runtime as lr
from loraexport.pipeline.build import build
from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.generation import genai
from loraexport_runtime.generation.captured.step import Step

Open = Callable[[], lr.TextGenerator]
PROMPTS, NAMES = [[5, 6, 7], [9, 8, 7, 6, 5]], ["first", None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    return build(write_decoder(folder, FAMILIES["Llama"]), folder / "out")[0]


@pytest.fixture(params=["genai", "driven"])
def open_generator(artifact: Path, request: pytest.FixtureRequest) -> Open:
    if request.param == "genai":
        return lambda: lr.load_generator(artifact)
    return lambda: open_driven(artifact)


# Providers


@pytest.mark.parametrize("name", ["cpu", "CPUExecutionProvider", ("cpu", {})])
def test_names_of_the_cpu(artifact: Path, name: Any) -> None:
    with lr.load_generator(artifact, [name]) as generator:
        assert generator.greedy(PROMPTS, NAMES, 2).shape == (2, 2)
    with lr.load_generator(artifact, providers=("cpu",)) as generator:
        assert set(generator.adapters) == {"first", "second"}


@pytest.mark.parametrize("providers", ["cpu", [], [3], [("cpu", 1)]])
def test_what_providers_must_be(artifact: Path, providers: Any) -> None:
    with pytest.raises(lr.ProviderError, match="providers: expected a "):
        lr.load_generator(artifact, providers)


class FakeConfig:
    """Notes what onnxruntime-genai is told."""

    told: list[Any]

    def __init__(self, folder: str) -> None:
        FakeConfig.told = []

    def clear_providers(self) -> None:
        self.told.append("clear")

    def append_provider(self, name: str) -> None:
        self.told.append(name)

    def set_provider_option(self, *option: str) -> None:
        self.told.append(option)


class FakeGenai:
    Config = FakeConfig
    __version__ = "0"

    @staticmethod
    def is_cuda_available() -> bool:
        return True

    @staticmethod
    def Model(config: FakeConfig) -> str:  # noqa: N802  its name there
        return "model"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """As if there were CUDA; the devices that were asked for."""
    asked: list[tuple[str, int]] = []
    every = ["CUDAExecutionProvider", "CPUExecutionProvider", "TensorrtExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: every)
    monkeypatch.setattr(genai, "require_device", asked.append)
    return asked


def test_options_of_cuda_reach_genai(cuda: list[tuple[str, int]], tmp_path: Path) -> None:
    options = {"gpu_mem_limit": 10**9, "device_id": 0, "cudnn_conv_use_max_workspace": "1"}
    providers = normalise_providers([("cuda", options), "cpu"])
    assert genai._open(FakeGenai, tmp_path, providers) == "model"
    assert FakeConfig.told == [
        "clear",
        "cuda",
        ("cuda", "gpu_mem_limit", "1000000000"),
        ("cuda", "cudnn_conv_use_max_workspace", "1"),
        ("cuda", "use_tf32", "0"),
    ]
    assert cuda == [("cuda", 0)]
    assert genai._open(FakeGenai, tmp_path, normalise_providers(["cpu"])) == "model"
    assert (FakeConfig.told, cuda) == (["clear"], [("cuda", 0)])


@pytest.mark.parametrize(
    ("providers", "text"),
    [
        (
            [("cuda", {"device_id": 1})],
            "cannot take device_id = 1 of CUDAExecutionProvider; leave it out, and choose the"
            " device by the environment variable CUDA_VISIBLE_DEVICES, or pass cuda_graphs=True,",
        ),
        (
            [("cuda", {"user_compute_stream": "7"})],
            "cannot take user_compute_stream = '7' of CUDAExecutionProvider; leave it out$",
        ),
        (
            [("cpu", {"arena_extend_strategy": "x"})],
            "cannot take arena_extend_strategy = 'x' of CPUExecutionProvider; leave it out$",
        ),
        (
            ["cuda", ("cpu", {"use_arena": 0})],
            "cannot take use_arena = 0 of CPUExecutionProvider; leave it out$",
        ),
        (["cpu", "cuda"], r"cannot be opened on CPUExec.*, CUDAExec.*; pass providers=\['cpu'\]"),
        (["TensorrtExecutionProvider"], r"cannot be opened on TensorrtExecutionProvider; pass pr"),
    ],
)
def test_what_cannot_be_passed_on(
    cuda: list[tuple[str, int]], tmp_path: Path, providers: Any, text: str
) -> None:
    with pytest.raises(lr.ProviderError, match=f"^onnxruntime-genai {text}"):
        genai._open(FakeGenai, tmp_path, normalise_providers(providers))


def test_genai_that_cannot_open_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        lr.ProviderError, match=r"genai .* cannot open it on CPUExecutionProvider: "
    ):
        genai.GenaiEngine(tmp_path, 0, normalise_providers(["cpu"]))


# The end


def test_a_use_after_close(open_generator: Open) -> None:
    generator = open_generator()
    generator.greedy(PROMPTS, NAMES, 2)
    generator.close()
    generator.close()
    calls: list[Callable[[], object]] = [
        lambda: generator.generate(PROMPTS, adapters=NAMES),
        lambda: generator.stream(PROMPTS, NAMES),
        lambda: generator.greedy(PROMPTS, NAMES, 2),
        lambda: generator.warm_up(1, 8),
        generator.__enter__,
    ]
    text = f"^the generator of {generator.folder} is closed; open the artifact again$"
    for call in calls:
        with pytest.raises(lr.ClosedError, match=text):
            call()
    assert not [t for t in threading.enumerate() if t.name.startswith("loraexport-decode")]


def test_an_open_stream_ends(open_generator: Open) -> None:
    """Its next piece is an error; the thread that reads it may be the one that closes."""
    with open_generator() as generator:
        streams = [generator.stream(PROMPTS, NAMES, max_new_tokens=20) for _ in range(2)]
        next(streams[0])
    for stream in streams:
        with pytest.raises(lr.ClosedError, match="is closed; open the artifact again"):
            next(stream)
        assert list(stream) == []


def test_close_waits_for_a_batch(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate and greedy end as they would have; a stream ends after the step that runs."""
    with open_driven(artifact) as whole:
        wanted = whole.generate(PROMPTS, adapters=NAMES, max_new_tokens=6)
        likeliest = whole.greedy(PROMPTS, NAMES, 6)
    generator = open_driven(artifact)
    running, go = threading.Event(), threading.Event()
    run = Step.run

    def hold(step: Step) -> None:
        running.set()
        assert go.wait(DEADLINE)
        run(step)

    monkeypatch.setattr(Step, "run", hold)
    options = {"adapters": NAMES, "max_new_tokens": 6}
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(generator.generate, PROMPTS, **options)
        second = pool.submit(generator.greedy, PROMPTS, NAMES, 6)
        assert running.wait(DEADLINE)
        wait_until(lambda: generator._gate._inside == 2)
        closing = pool.submit(generator.close)
        wait_until(lambda: generator._gate.is_closed)
        with pytest.raises(lr.ClosedError):
            generator.greedy(PROMPTS, NAMES, 1)
        assert not any(one.done() for one in (first, second, closing))
        go.set()
        closing.result(DEADLINE)
        assert first.result(DEADLINE) == wanted
        assert np.array_equal(second.result(DEADLINE), likeliest)


def test_close_gives_memory_up(open_generator: Open) -> None:
    """Of a stream that is still open too, and at once."""
    generator = open_generator()
    stream = generator.stream(PROMPTS, NAMES, max_new_tokens=20)
    engine: Any = generator._engine
    caches, kept = [], []
    for _ in range(2):  # the first one's cache goes to the stream
        generator.greedy(PROMPTS, NAMES, 3)
        caches += getattr(engine, "_idle", ())
        next(stream)
    if hasattr(engine, "_graph"):
        assert len(set(map(id, caches))) == 2
        kept += [weakref.ref(engine._graph.session), weakref.ref(engine._top._session)]
        kept += [weakref.ref(value) for cache in caches for value in cache._memory.values()]
        assert len(kept) > 4
    del caches
    gc.collect()
    gc.disable()
    try:
        generator.close()
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
    assert getattr(engine, "_model", None) is None
    del stream


def test_close_while_threads_generate(open_generator: Open) -> None:
    generator = open_generator()
    wanted = generator.greedy(PROMPTS, NAMES, 4)
    started = threading.Barrier(4)

    def work(at: int) -> int:
        started.wait(DEADLINE)
        calls = 0
        while True:
            try:
                if at % 2:
                    found = generator.greedy(PROMPTS, NAMES, 4)
                    assert np.array_equal(found, wanted)
                else:
                    pieces = list(generator.stream(PROMPTS, NAMES, max_new_tokens=4))
                    assert len(pieces) <= 8
            except lr.ClosedError:
                return calls
            calls += 1

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, at) for at in range(3)]
        started.wait(DEADLINE)
        generator.greedy(PROMPTS, NAMES, 4)
        generator.close()
        assert all(one.result(DEADLINE) >= 0 for one in workers)


# Words


def test_what_is_logged(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="loraexport_runtime")
    lr.load_generator(artifact).close()
    generator = open_driven(artifact)
    generator.warm_up(3, 30)
    generator.warm_up(4, 30)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith(f"opened {artifact} (decoder, 2 slots) on CPUExecutionProvider in")
    assert texts[1:] == [
        f"closed {artifact}",
        "prepared the decode step of 4 rows of up to 128 tokens",
    ]
