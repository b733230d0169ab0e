"""Whole models that compute texts without their padding (export.packed)."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import write_model_project, write_vit_project

import loraexport_runtime as lr
from loraexport.bases.unpadded import _POSITIONS, Packing
from loraexport.errors import BaseModelError, ParityError, SpecError
from loraexport.pipeline.build import build
from loraexport.plan.model import PACKED_TYPES
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec

ON_CUDA = {"packed": True, "dtype": "float16", "formats": ["onnx"]}
PORTABLE = {"packed": True, "tune": {"device": "cpu"}, "formats": ["torchscript", "onnx"]}
MASKS = {
    "full": [[1, 1, 1, 1, 1]] * 3,
    "filled up on the right": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "filled up on the left": [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "with gaps": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]],
}


def inputs_of(session: lr.ModelSession, mask: Any, seed: int = 0) -> dict[str, np.ndarray]:
    mask = np.array(mask, np.int64)
    ids = np.random.default_rng(seed).integers(2, 40, mask.shape)
    known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    return {entry.name: known[entry.name] for entry in session.model.inputs}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[lr.ModelSession, lr.ModelSession]:
    """Of one BERT, with its padding and without."""
    folder = tmp_path_factory.mktemp("packed")
    opened = []
    for name, export in (("padded", {"tune": {"device": "cpu"}}), ("packed", PORTABLE)):
        spec = write_model_project(folder, name=name, sites="all-linear", export=export)
        session = lr.load(build(spec, folder / "out")[0])
        assert isinstance(session, lr.ModelSession)
        opened.append(session)
    return opened[0], opened[1]


@pytest.mark.parametrize("case", MASKS)
def test_real_tokens_get_what_they_get_beside_padding(
    sessions: tuple[lr.ModelSession, lr.ModelSession], case: str
) -> None:
    padded, packed = sessions
    inputs = inputs_of(padded, MASKS[case])
    adapters = ["sql", None, "chat"]
    expected = padded.run(inputs, adapters)["last_hidden_state"]
    y = packed.run(inputs, adapters)["last_hidden_state"]
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(y[real], expected[real], rtol=1e-4, atol=2e-5)
    assert not y[~real].any()


def test_no_token_of_padding_is_computed(
    sessions: tuple[lr.ModelSession, lr.ModelSession],
) -> None:
    """Rows of a packed batch do not depend on what stands in its padding."""
    packed = sessions[1]
    inputs = inputs_of(packed, MASKS["filled up on the right"])
    expected = packed.run(inputs, ["sql"] * 3)["last_hidden_state"]
    inputs["input_ids"][inputs["attention_mask"] == 0] = 59
    np.testing.assert_array_equal(packed.run(inputs, ["sql"] * 3)["last_hidden_state"], expected)


def test_a_row_without_a_token(sessions: tuple[lr.ModelSession, lr.ModelSession]) -> None:
    packed = sessions[1]
    inputs = inputs_of(packed, [[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    y = packed.run(inputs, ["sql", "chat", None])["last_hidden_state"]
    assert not y[1].any()
    alone = {name: one[2:] for name, one in inputs.items()}
    np.testing.assert_allclose(
        packed.run(alone, [None])["last_hidden_state"][0], y[2], rtol=1e-4, atol=1e-5
    )


def test_another_tenants_overflow_stays_its_own(
    sessions: tuple[lr.ModelSession, lr.ModelSession], tmp_path: Path
) -> None:
    packed = sessions[1]
    config = {"target_modules": ["encoder.layer.0.attention.self.value"]}
    folder = write_adapter(
        tmp_path / "hot", {"encoder.layer.0.attention.self.value": (32, 32)}, config=config
    )
    weights = load_file(folder / "adapter_model.safetensors")
    huge = {name: np.full_like(one, 1e30) for name, one in weights.items()}
    save_file(huge, folder / "adapter_model.safetensors")
    packed.load_adapter("hot", folder)
    for mask in MASKS.values():
        inputs = inputs_of(packed, mask)
        beside_it = packed.run(inputs, ["sql", "hot", None])["last_hidden_state"]
        beside_base = packed.run(inputs, ["sql", None, None])["last_hidden_state"]
        assert not np.isfinite(beside_it[1]).all()
        assert beside_it[[0, 2]].tobytes() == beside_base[[0, 2]].tobytes()
    packed.unload_adapter("hot")


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_packing_and_back(mask: list[list[int]]) -> None:
    given = torch.tensor(mask)
    packing = Packing.of(given)
    x = torch.arange(1, given.numel() + 1).view(given.shape)
    assert packing.pick(x).squeeze(1).tolist() == x[given == 1].tolist()
    assert packing.cumulated.tolist() == [0, *given.sum(1).cumsum(0).tolist()]
    left = [5 * row + column for row, one in enumerate(mask) for column in range(sum(one))]
    assert packing.offset.flatten()[: len(left)].tolist() == left
    assert sorted(packing.offset.flatten().tolist()) == list(range(given.numel()))
    back = packing.restore(packing.pick(x).unsqueeze(1).float()).squeeze(-1)
    assert back.tolist() == (x * given).tolist()


def test_for_cuda_attention_is_onnxruntimes_packed_one(tmp_path: Path) -> None:
    """It has no such kernel on a CPU, so that the build publishes unverified, as it is told to."""
    spec = write_model_project(
        tmp_path, export=ON_CUDA, parity={"onnx": "deferred"}, sites="all-linear"
    )
    folder, report = build(spec, tmp_path / "out")
    if report.status == "deferred":  # no CUDA here
        why = "onnxruntime's CPU provider has no PackedMultiHeadAttention, and no CUDA is here"
        assert report.skipped["onnx"] == why
    nodes = onnx.load(folder / "graphs/model.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("PackedMultiHeadAttention") == 2
    assert not {"MultiHeadAttention", "Attention"} & set(kinds)
    with pytest.raises(lr.ProviderError, match=r"has no PackedMultiHeadAttention; pass providers="):
        lr.load(folder, providers=["cpu"], allow_unverified=True)


def test_without_cuda_it_is_not_published_as_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraexport.parity.implementations.has_cuda", lambda: False)
    spec = write_model_project(tmp_path, export=ON_CUDA)
    with pytest.raises(ParityError, match="has no PackedMultiHeadAttention and there is no CUDA"):
        build(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export": PORTABLE | {"blend": True}}, "packed beside blend"),
        (
            {"export": {"packed": True, "dtype": "bfloat16"}},
            r"packed beside bfloat16 \(take float16\)",
        ),
        ({"base": {"kind": "causal_lm", "path": "bert"}}, "export.packed: for whole models only"),
    ],
)
def test_a_spec_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    spec = write_model_project(tmp_path, **({"export": {"packed": True}} | changes))
    with pytest.raises(SpecError, match=message):
        read_spec(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base": {"kind": "transformers", "path": "bert", "task": "sequence-classification"}},
            "task 'sequence-classification' cannot be packed, but feature-extraction",
        ),
        ({"features": ["dora"]}, "every slot has its own output_scale at 'encoder"),
    ],
)
def test_a_plan_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    spec = write_model_project(tmp_path, export=PORTABLE, **changes)
    with pytest.raises(BaseModelError, match=message):
        make_plan(read_spec(spec), tmp_path)


def test_a_model_whose_positions_are_not_known(tmp_path: Path) -> None:
    spec = write_vit_project(tmp_path, export=PORTABLE)
    with pytest.raises(BaseModelError, match="a model of type 'vit' cannot be packed, but bert"):
        make_plan(read_spec(spec), tmp_path)
    assert set(_POSITIONS) == set(PACKED_TYPES)
