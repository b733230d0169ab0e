"""Artifacts with functions on the CPU kernels: the same proof as with stock operators."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builds import write_model_project, write_tenants
from support.decoders import make_prompts, write_family
from support.home import Home

import loraexport_runtime as lr
from loraexport.pipeline.verify import verify_artifact
from loraexport_runtime.checking.check import check_artifact
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.sessions.load import make_session

pytestmark = pytest.mark.usefixtures("installed")


def export(strategy: str) -> dict[str, Any]:
    return {"kernels": True, "formats": ["onnx"], "strategy": strategy}


def calls(artifact: Path) -> set[str | None]:
    return {layer.function for layer in Manifest.read(artifact).layers}


def ranks(session: lr.LayersSession, layer: str) -> list[int]:
    """Of its slots' rows those that are in use, as kernels read it."""
    return session._host.stack(f"{layer}.rank").numpy().ravel().tolist()  # type: ignore[no-any-return]


def proven(artifact: Path, *names: str) -> None:
    """Both ways, by check and by verify."""
    report = check_artifact(artifact, ["cpu"])
    assert not report.failures
    assert {"onnx-cpu", "onnx-cpu-kernels", *names} <= {row.implementation for row in report.rows}
    proof = verify_artifact(artifact, Manifest.read(artifact))
    assert not proof.failures
    checked = set(proof.summary().checked)
    assert {"onnx-cpu", "onnx-cpu-kernels", *names} <= checked


@pytest.mark.parametrize("strategy", [pytest.param("masked", marks=pytest.mark.slow), "augmented"])
def test_layers(home: Home, strategy: str) -> None:
    artifact = home.artifact(write_tenants, export=export(strategy))
    name = "LoraAdd" if strategy == "masked" else "LoraLinear"
    assert calls(artifact) == {name, None}  # the embedding has none
    proven(artifact)
    x = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    segments = [("sql", 3), (None, 1), ("chat", 3)]
    ys = {}
    for kernels in (True, False):
        with lr.load_layers(artifact, kernels=kernels) as session:
            before = session["up"].run(x, segments)
            assert ranks(session, "qkv") == [8, 16], "of q and v, of q and k"
            assert ranks(session, "up") == [4, 0]
            session.load_adapter("spare", artifact / "adapters/spare")
            session.unload_adapter("chat")
            slot = session.adapters["spare"]
            assert ranks(session, "up")[slot - 1] == 2
            assert ranks(session, "qkv")[slot - 1] == 0
            ys[kernels] = before, session["up"].run(x, [("spare", 3), (None, 4)])
            said = session.stats().kernels
            assert said.startswith("loraexport-kernels" if kernels else "stock operators")
    for with_kernels, stock in zip(ys[True], ys[False], strict=True):
        np.testing.assert_allclose(with_kernels, stock, rtol=0, atol=2e-5 * np.abs(stock).max())
    assert ys[True][0].tobytes() != ys[True][1].tobytes()


def test_buckets(home: Home) -> None:
    """Padded batches of sizes that were warmed up give what the same batches give as they are."""
    artifact = home.artifact(write_tenants, export=export("augmented"))
    x = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
    segments = [("chat", 2), (None, 1), ("sql", 3)]
    manifest, providers = Manifest.read(artifact), normalise_providers(["cpu"])
    with make_session(artifact, manifest, providers, 1, cuda_graphs=True, kernels=True) as session:
        assert isinstance(session, lr.LayersSession)
        plain = session["qkv"].run(x, segments)
        session.warm_up([8])
        assert session["qkv"].run(x, segments).tobytes() == plain.tobytes()
        assert session.stats().bucket_hits == 1


@pytest.mark.parametrize("strategy", [pytest.param("masked", marks=pytest.mark.slow), "augmented"])
def test_a_whole_model(home: Home, strategy: str) -> None:
    artifact = home.artifact(write_model_project, sites="all-linear", export=export(strategy))
    assert None in calls(artifact)  # the pooler, of which this task gives nothing
    proven(artifact)


@pytest.mark.parametrize("strategy", ["masked", pytest.param("augmented", marks=pytest.mark.slow)])
def test_a_decoder(home: Home, strategy: str) -> None:
    artifact = home.artifact(write_family, "Llama", export=export(strategy))
    kind = "LoraAdd" if strategy == "masked" else "LoraLinear"
    assert calls(artifact) >= {kind, f"{kind}2"}, "of gate and up, which are apart"
    proven(artifact, "onnx-engine-cpu", "onnx-engine-cpu-kernels")
    prompts, given = make_prompts(5, 9, 7), ["first", None, "second"]
    tokens = {}
    for kernels in (True, False):
        with lr.load_generator(artifact, kernels=kernels, rows=4) as generator:
            tokens[kernels] = generator.greedy(prompts, given, 8)
            said = generator.engine.stats().kernels
            assert said.startswith("loraexport-kernels" if kernels else "stock operators")
    np.testing.assert_array_equal(tokens[True], tokens[False])
