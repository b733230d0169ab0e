"""Adapters whose values overflow the export's dtype: refused by the build, also without a slot."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import write_model_project, write_tenants
from support.decoders import FAMILIES, write_decoder
from support.home import Home

import loraexport_runtime as lr
from loraexport.bases.model import load_model_base
from loraexport.lora.segmented import SegmentedLoop
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.adapters.tensors import LoraWeights
from loraexport_runtime.contract.manifest import Layer, Manifest
from loraexport_runtime.errors import AdapterWeightsError

SITES = {"blocks.0.up": (32, 48), "words": (40, 32)}
FACTOR = "base_model.model.blocks.0.up.lora_"
LARGE = {f"{FACTOR}B.weight": np.full((48, 2), 3e38, np.float32)}
"""Finite in float32; with a scaling of 1.5 no more."""


def test_an_adapter_that_starts_without_a_slot(tmp_path: Path) -> None:
    spec = write_tenants(tmp_path)
    write_adapter(tmp_path / "spare", SITES, rank=2, alpha=3, embeddings=("words",), tensors=LARGE)
    expected = r"adapter 'spare': its lora_B at site 'blocks\.0\.up' overflows float32"
    with pytest.raises(AdapterWeightsError, match=expected):
        build(spec, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_a_load(tenants: Path, tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "new", {"blocks.0.up": (32, 48)}, rank=2, alpha=3, tensors=LARGE
    )
    with lr.load_layers(tenants, threads=1) as session:
        before = session.list_adapters()
        with pytest.raises(AdapterWeightsError, match="lora_B overflows float32"):
            session.load_adapter("sql", folder)
        with pytest.raises(AdapterWeightsError, match="lora_B overflows float32"):
            session.load_adapter("sql", tenants / "adapters/sql", scale=1e39)
        assert session.list_adapters() == before


def rewrite(folder: Path, value: float) -> None:
    """Every B of an adapter becomes one number."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = np.full_like(tensor, value)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("dtype", "value", "scale"),
    [
        ("float16", 65530.0, 1.0),  # the cast rounds it up to inf
        ("float16", 1e5, 1e-9),  # B alone would overflow; what the graph has does not
        ("float32", 3e38, 4.0),
    ],
)
def test_a_build_of_a_model(dtype: str, value: float, scale: float, tmp_path: Path) -> None:
    """Before anything is exported."""
    spec = write_model_project(tmp_path, export={"formats": ["onnx"], "dtype": dtype})
    rewrite(tmp_path / "legal", value)
    text = spec.read_text()
    data = yaml.safe_load(text)
    data["adapters"] = [{"name": "legal", "path": "legal", "scale": scale}]
    spec.write_text(yaml.safe_dump(data))
    if value * scale < 1:
        load_model_base(make_plan(read_spec(spec), tmp_path))  # type: ignore[arg-type]
        return
    with pytest.raises(AdapterWeightsError, match=rf"'legal': its lora_B .* overflows {dtype}"):
        build(spec, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_a_load_into_a_model(home: Home, tmp_path: Path) -> None:
    artifact = home.artifact(write_model_project, export={"formats": ["onnx"]})
    adapter = shutil.copytree(artifact.parents[1] / "legal", tmp_path / "legal")
    rewrite(adapter, 3e38)
    with lr.load_model(artifact, threads=1) as session:
        before = session.list_adapters()
        for name in ("legal", "new"):
            with pytest.raises(AdapterWeightsError, match="lora_B overflows float32"):
                session.load_adapter(name, adapter, scale=4)
        assert session.list_adapters() == before


def test_a_build_of_a_decoder(tmp_path: Path) -> None:
    spec = write_decoder(tmp_path, FAMILIES["Llama"])
    rewrite(tmp_path / "second", 3e38)
    with pytest.raises(AdapterWeightsError, match=r"'second': its lora_B .* overflows float32"):
        build(spec, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_a_factor_of_torchscript_without_its_scaling(tenants: Path) -> None:
    layer: Layer = next(one for one in Manifest.read(tenants).layers if len(one.slices) == 1)
    site = layer.slices[0].site
    b = np.full((layer.out_features, 2), 1e6)
    weights = {site: LoraWeights(np.ones((2, layer.in_features)), b, scaling=1e-3)}
    with pytest.raises(AdapterWeightsError, match="overflows float16 without its scaling"):
        SegmentedLoop(layer, {1: (weights, 1.0)}, 2, np.dtype(np.float16))
