"""Bits of manifest.json turned, with a digest that fits and without: no number changes in silence.

Seeded. A trial that opens has to give the numbers of the whole artifact for every adapter that it
names, or refuse with one of the runtime's own errors.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builds import write_model_project
from support.decoders import write_family
from support.home import Home
from support.manifests import write_manifest

import loraexport_runtime as lr
from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import LoraexportError
from loraexport_runtime.generation.load import load_generator

TRIALS = 400
Outputs = dict[tuple[str, str | None], np.ndarray]


def run_layers(folder: Path) -> Outputs:
    """Every layer, for every adapter that is listed."""
    outputs: Outputs = {}
    with lr.load_layers(folder, threads=1) as session:
        for name, layer in session.items():
            ids = layer.layer.kind == "embedding"
            size = layer.layer.in_features
            rows = np.random.default_rng(1).standard_normal((5, size)).astype(np.float32)
            x = np.arange(5) if ids else rows
            for adapter in (None, *session.list_adapters()):
                outputs[name, adapter] = layer.run(x, [(adapter, 5)])
    return outputs


def run_model(folder: Path) -> Outputs:
    """Every output, for every adapter that is listed."""
    outputs: Outputs = {}
    with lr.load_model(folder, threads=1) as session:
        ids = np.arange(2, 8)[None] % 30
        feeds = {
            entry.name: np.zeros_like(ids) if "type" in entry.name else np.maximum(ids, 1)
            for entry in session.model.inputs
        }
        feeds |= {"attention_mask": np.ones_like(ids)} if "attention_mask" in feeds else {}
        for adapter in (None, *session.list_adapters()):
            for name, y in session.run(feeds, [adapter]).items():
                outputs[name, adapter] = y
    return outputs


def run_decoder(folder: Path) -> Outputs:
    """Greedy tokens, for every adapter that is listed."""
    with load_generator(folder) as generator:
        names = [None, *generator.adapters]
        prompts = [[5, 9, 6, 11]] * len(names)
        return dict(
            zip(
                (("tokens", name) for name in names),
                generator.greedy(prompts, names, 8),
                strict=True,
            )
        )


@pytest.fixture(scope="module")
def artifacts(home: Home, tenants: Path) -> dict[str, Path]:
    return {
        "layers": tenants,
        "model": home.artifact(write_model_project),
        "decoder": home.artifact(write_family, "Llama"),
    }


RUNS: dict[str, Callable[[Path], Outputs]] = {
    "layers": run_layers,
    "model": run_model,
    "decoder": run_decoder,
}


def flips(data: bytes, seed: int) -> Iterator[bytes]:
    """The manifest with one bit of it turned, at places that the seed says."""
    generator = np.random.default_rng(seed)
    for place in generator.choice(8 * len(data), TRIALS, replace=False).tolist():
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)


def edits(data: bytes, seed: int) -> Iterator[bytes]:
    """The manifest with one of its values another: numbers near it, far and absurd; other texts."""
    generator = np.random.default_rng(seed)
    places = list(_places(json.loads(data)))
    for index in generator.integers(len(places), size=TRIALS).tolist():
        value = json.loads(data)
        *path, last = places[index]
        part = value
        for key in path:
            part = part[key]
        part[last] = _other(part[last], generator)
        yield json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (key,)
        if isinstance(part, dict | list):
            yield from ((key, *rest) for rest in _places(part))


def _other(value: Any, generator: np.random.Generator) -> Any:
    others: list[Any] = [None, True, -1, 0, 1, 2, 10**30, 2**62, 1e308, "", "x" * 5000, [], {}]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [value + 1, value - 1, value * 2, -value] * 4
    if isinstance(value, str):
        others += [value[:-1], value + "x", value.swapcase(), value.replace("q", "k")] * 4
    if isinstance(value, list) and value:
        others += [value[:-1], value[1:], value[::-1], [*value, value[0]]] * 4
    return others[int(generator.integers(len(others)))]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=pytest.mark.slow if kind == "decoder" else ())
        for kind in RUNS
        for way in (flips, edits)
    ],
)
def test_numbers_or_a_refusal(
    kind: str, way: Callable[..., Iterator[bytes]], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(artifacts[kind], tmp_path / "artifact")
    whole = RUNS[kind](folder)
    data = (folder / MANIFEST_FILE).read_bytes()
    opened = 0
    for seed, changed in enumerate(way(data, 13)):
        write_manifest(folder, changed)
        try:
            outputs = RUNS[kind](folder)
        except LoraexportError:
            continue
        opened += 1
        known = {key: whole[key] for key in outputs if key in whole}
        assert known, seed
        for key, y in known.items():
            assert np.array_equal(outputs[key], y), (seed, key)
    assert opened < TRIALS / 2


def test_without_a_digest_that_fits_nothing_opens(tenants: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tenants, tmp_path / "artifact")
    for changed in flips((folder / MANIFEST_FILE).read_bytes(), 14):
        (folder / MANIFEST_FILE).write_bytes(changed)
        with pytest.raises(lr.ArtifactError):
            Manifest.read(folder)
