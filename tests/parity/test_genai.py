"""onnxruntime-genai as a contestant: what it is told, and that it gives the runtime's tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoders import make_prompts, write_family
from support.home import Home

import loraexport_runtime as lr
from loraexport.parity.decoder import genai
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import normalise_providers


def test_it_gives_the_runtimes_tokens(home: Home) -> None:
    """Also in more batches than it takes at once."""
    artifact = home.artifact(write_family, "Llama")
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Decoder)
    engine = genai.GenaiEngine(artifact, manifest, manifest.kind, normalise_providers(["cpu"]))
    prompts = make_prompts(*(3 + index % 9 for index in range(35)))
    names = [(None, "first", "second")[index % 3] for index in range(35)]
    with lr.load_generator(artifact) as generator:
        wanted = generator.greedy(prompts, names, 6)
        assert engine.ends == generator.ends
    found = engine.greedy(prompts, names, 6)
    for row, expected in zip(found, wanted, strict=True):
        over = np.flatnonzero(np.isin(expected, list(engine.ends)))
        end = int(over[0]) + 1 if len(over) else 6
        assert row[:end].tolist() == expected[:end].tolist()


class FakeConfig:
    """Notes what onnxruntime-genai is told."""

    told: list[Any]

    def __init__(self, folder: str) -> None:
        FakeConfig.told = []

    def overlay(self, text: str) -> None:
        assert json.loads(text) == {"model": {"pad_token_id": -1}}

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
    assert genai.open_model(FakeGenai, tmp_path, providers) == "model"
    assert FakeConfig.told == [
        "clear",
        "cuda",
        ("cuda", "gpu_mem_limit", "1000000000"),
        ("cuda", "cudnn_conv_use_max_workspace", "1"),
        ("cuda", "use_tf32", "0"),
    ]
    assert cuda == [("cuda", 0)]
    assert genai.open_model(FakeGenai, tmp_path, normalise_providers(["cpu"])) == "model"
    assert (FakeConfig.told, cuda) == (["clear"], [("cuda", 0)])


@pytest.mark.parametrize(
    ("providers", "text"),
    [
        (
            [("cuda", {"device_id": 1})],
            "cannot take device_id = 1 of CUDAExecutionProvider; leave it out, and choose the"
            " device by the environment variable CUDA_VISIBLE_DEVICES$",
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
        genai.open_model(FakeGenai, tmp_path, normalise_providers(providers))


def test_genai_that_cannot_open_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        lr.ProviderError, match=r"genai .* cannot open it on CPUExecutionProvider: "
    ):
        genai.open_model(genai.import_genai(), tmp_path, normalise_providers(["cpu"]))
