"""What a batch of a whole model may hold: ids of its tables, and rows no longer than they are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.builds import write_model_project
from support.home import Home

import loraexport_runtime as lr
from loraexport_runtime.checking.model import make_cases
from loraexport_runtime.contract.kinds import Facts, Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.sessions.load import make_session
from loraexport_runtime.sessions.tokens import check_tokens

NOTHING = Facts(None, None, None, {}, None, {}, None, None, None, None)
CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]


@pytest.fixture(scope="module")
def model(home: Home) -> Path:
    return home.artifact(write_model_project, export={"formats": ["onnx"]})


def texts(batch: int = 2, sequence: int = 3) -> dict[str, np.ndarray]:
    ids = np.arange(1, 1 + batch * sequence).reshape(batch, sequence) % 60
    return {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}


def open_model(artifact: Path, has_buckets: bool) -> Any:
    manifest = Manifest.read(artifact)
    session: Any = make_session(artifact, manifest, CPU, 1, cuda_graphs=has_buckets)
    if has_buckets:
        session.warm_up([(2, 3)])
    return session


@pytest.mark.parametrize("has_buckets", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "table"),
    [
        *(("input_ids", bad, (60, "vocabulary")) for bad in (-1, 60, 2**62, -(2**63))),
        *(("token_type_ids", bad, (2, "kinds of tokens")) for bad in (-1, 2, -(2**63))),
    ],
)
def test_an_id_beyond_its_table(
    model: Path, name: str, bad: int, table: tuple[int, str], has_buckets: bool
) -> None:
    session = open_model(model, has_buckets)
    inputs = texts()
    wanted = session.run(inputs, ["sql", None])
    wrong = inputs | {name: inputs[name].copy()}
    wrong[name][1, 2] = bad
    size, words = table
    text = rf"^{name}\[1, 2\] is {bad}; expected 0 to {size - 1}, the model's {words}"
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in wrong.items()}
    for batch in (wrong, values):
        with pytest.raises(lr.InputError, match=text):
            session.run(batch, ["sql", None])
    later = session.run(inputs, ["sql", None])
    assert all(later[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize("has_buckets", [False, True])
def test_a_text_longer_than_the_positions(model: Path, has_buckets: bool) -> None:
    session = open_model(model, has_buckets)
    assert session.model.facts.positions == 64
    session.run(texts(2, 64), ["sql", None])
    long = texts(2, 65)
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in long.items()}
    text = r"^input_ids has rows of 65 tokens, padding too, .* for 64: none for column 64 of row 0"
    for batch in (long, values):
        with pytest.raises(lr.InputError, match=text):
            session.run(batch, ["sql", None])
    with pytest.raises(lr.InputError, match=r"^warm_up: sizes has rows of 65 tokens"):
        session.warm_up([(1, 3), (1, 65)])
    session.warm_up([(1, 64)])


def test_position_ids_are_held_to_their_table() -> None:
    """Where they are an input, the length is not: positions may come again."""
    facts = replace(NOTHING, positions=4)
    ids = np.array([[0, 1, 2, 3, 0, 1]])
    check_tokens({"input_ids": ids, "position_ids": ids}, facts, 6)
    for bad in (-1, 4):
        wrong = {"input_ids": ids, "position_ids": np.where(ids == 2, bad, ids)}
        with pytest.raises(
            lr.InputError, match=rf"^position_ids\[0, 2\] is {bad}; expected 0 to 3"
        ):
            check_tokens(wrong, facts, 6)


def test_what_is_not_known_is_not_checked() -> None:
    ids = np.array([[-5, 2**62]])
    check_tokens({"input_ids": ids, "token_type_ids": ids, "position_ids": ids}, NOTHING, 2)
    check_tokens({"pixel_values": np.zeros((1, 3))}, replace(NOTHING, positions=1), 7)


def test_cases_are_no_longer_than_the_positions(model: Path) -> None:
    """A build of a tiny model proves what it can take."""
    manifest = Manifest.read(model)
    assert isinstance(manifest.kind, Model)
    for positions in (64, 5):
        facts = replace(manifest.kind.facts, positions=positions)
        cases = make_cases(manifest, replace(manifest.kind, facts=facts))
        assert max(length for case in cases for length in case.lengths) == min(positions, 15)
