"""A whole model through the runtime: rows with different adapters, hot loads, and bad input."""

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch
from support.builds import write_model_project, write_vit_project
from support.home import Home

from loraexport.hf.model import load_plain_model
from loraexport.pipeline.build import build
from loraexport_runtime import (
    ArtifactError,
    InputError,
    ModelSession,
    SlotsExceededError,
    UnknownAdapterError,
    load,
)
from loraexport_runtime.slots.batch import read_rows, row_arrays, row_names


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_model_project)


@pytest.fixture(scope="module")
def folder(artifact: Path) -> Path:
    """The project of the artifact: its base and adapters."""
    return artifact.parents[1]


@pytest.fixture
def session(artifact: Path) -> ModelSession:
    opened = load(artifact)
    assert isinstance(opened, ModelSession)
    return opened


def inputs(batch: int = 4, sequence: int = 9) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch * sequence)
    mask = np.ones((batch, sequence), np.int64)
    mask[0, sequence // 2 :] = 0
    ids = generator.integers(1, 60, (batch, sequence)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def hidden(session: ModelSession, values: dict[str, np.ndarray], names: Any) -> np.ndarray:
    y: np.ndarray = session.run(values, names)["last_hidden_state"]
    return y


def test_a_mixed_batch_is_what_each_row_gives_alone(session: ModelSession) -> None:
    values, names = inputs(), ["sql", None, "chat", "sql"]
    mixed = hidden(session, values, names)
    assert mixed.shape == (4, 9, 32)
    for row, name in enumerate(names):
        alone = hidden(session, values, [name] * 4)[row]
        assert mixed[row].tobytes() == alone.tobytes()
    assert np.abs(mixed - hidden(session, values, None))[[0, 2, 3]].max() > 0.05


def test_the_base_is_the_plain_model(session: ModelSession, folder: Path) -> None:
    values = inputs(3, 14)
    plain: Any = load_plain_model(folder / "bert", "feature-extraction", {})
    with torch.no_grad():
        expected = plain(**{name: torch.from_numpy(one) for name, one in values.items()})
    y = hidden(session, values, None)
    assert (
        np.abs(y - expected.last_hidden_state.numpy())[values["attention_mask"] == 1].max() < 1e-4
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, in PEFT's own call
def test_hot_load_is_peft(session: ModelSession, folder: Path) -> None:
    """An adapter that the build never saw, loaded into a free slot, against PEFT itself."""
    from peft import PeftModel

    values = inputs(2, 11)
    session.load_adapter("legal", folder / "legal")
    y = hidden(session, values, ["legal", None])
    plain: Any = load_plain_model(folder / "bert", "feature-extraction", {})
    wrapped = PeftModel.from_pretrained(plain, str(folder / "legal")).eval()
    with torch.no_grad():
        found = wrapped(**{name: torch.from_numpy(one) for name, one in values.items()})
    keep = values["attention_mask"][0] == 1
    assert np.abs(y[0] - found.last_hidden_state.numpy()[0])[keep].max() < 1e-4
    session.unload_adapter("legal")
    with pytest.raises(UnknownAdapterError, match="'legal' is not loaded"):
        session.run(values, ["legal", None])


def test_device_tensors_in_and_out(session: ModelSession) -> None:
    values = inputs()
    tensors = {name: torch.from_numpy(one) for name, one in values.items()}
    names = ["sql", "chat", None, None]
    y = torch.from_dlpack(session.run(tensors, names)["last_hidden_state"])
    assert y.numpy().tobytes() == hidden(session, values, names).tobytes()


def test_what_a_batch_must_be(session: ModelSession) -> None:
    values = inputs()
    with pytest.raises(InputError, match="adapters names 2 rows, but the inputs have 4"):
        session.run(values, ["sql", None])
    with pytest.raises(InputError, match=r"inputs are \['attention_mask', 'input_ids'\]; this"):
        session.run({name: values[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(InputError, match="input_ids is int32; this model takes int64"):
        session.run({**values, "input_ids": values["input_ids"].astype(np.int32)})
    with pytest.raises(InputError, match=r"attention_mask has shape \[4, 8\]; expected \[4, 9\]"):
        session.run({**values, "attention_mask": values["attention_mask"][:, :8]})
    with pytest.raises(InputError, match=r"input_ids has shape \[9\]; expected \[batch, seq"):
        session.run({**values, "input_ids": values["input_ids"][0]})
    with pytest.raises(InputError, match="input_ids is of type list"):
        session.run({**values, "input_ids": values["input_ids"].tolist()})
    with pytest.raises(UnknownAdapterError, match="'nobody' is not loaded"):
        session.run(values, ["nobody", None, None, None])
    with pytest.raises(SlotsExceededError, match="names 4 adapters"):
        session.run(values, ["a", "b", "c", "d"])


def test_a_graph_without_a_blend_refuses_one(session: ModelSession) -> None:
    blend = {"sql": 0.5, "chat": 0.5}
    with pytest.raises(InputError, match=r"adapters\[1\] is a blend, .* export: \{blend: true\}"):
        session.run(inputs(2), ["sql", blend])


class TestRows:
    """What each row uses, as arrays: a slot, or the weights of a blend."""

    SLOTS: ClassVar = {None: 0, "sql": 2, "chat": 1, "legal": 4}

    def test_no_adapters_are_the_base(self) -> None:
        assert read_rows(None, 3) == [None, None, None]

    @pytest.mark.parametrize(
        "rows", [("sql", None), iter(["sql", None]), np.array(["sql", "chat"])]
    )
    def test_rows_may_be_any_iterable(self, rows: Any) -> None:
        assert read_rows(rows, 2)[0] == "sql"

    @pytest.mark.parametrize(("rows", "batch"), [([], 1), (["sql"], 2), (["sql", None, None], 2)])
    def test_one_entry_for_each_row(self, rows: list[Any], batch: int) -> None:
        expected = f"adapters names {len(rows)} rows, but the inputs have {batch}; give one name"
        with pytest.raises(InputError, match=expected):
            read_rows(rows, batch)

    @pytest.mark.parametrize("rows", ["sql", {"sql": 0.5}, 3, 0.5])
    def test_what_is_no_list(self, rows: Any) -> None:
        """A name or a blend would be taken for its letters or its keys."""
        with pytest.raises(
            InputError, match="expected a list with an entry for each of the 1 rows"
        ):
            read_rows(rows, 1)

    @pytest.mark.parametrize("row", [1, 0.5, b"sql", ["sql"], ("sql", 0.5), True])
    def test_entry_of_another_type(self, row: Any) -> None:
        expected = r"adapters\[1\] is .*; expected an adapter's name, a blend such as"
        with pytest.raises(InputError, match=expected):
            read_rows([None, row], 2)

    @pytest.mark.parametrize(
        "weight",
        [np.nan, np.inf, -np.inf, 1e39, 10**400, "0.5", None, True, 1j, np.float32("nan"), [0.5]],
        ids=str,
    )
    def test_weight_that_is_no_finite_number(self, weight: Any) -> None:
        expected = r"adapters\[0\]: weight .* of adapter 'chat'; expected a finite number"
        with pytest.raises(InputError, match=expected):
            read_rows([{"sql": 0.5, "chat": weight}], 1)

    @pytest.mark.parametrize("name", [None, 1])
    def test_blend_of_what_is_no_name(self, name: Any) -> None:
        with pytest.raises(InputError, match=f"weight 0.5 of adapter {name}; expected a finite"):
            read_rows([{name: 0.5}], 1)

    def test_names_of_plain_and_blended_rows(self) -> None:
        rows = read_rows(["sql", None, {"chat": 1, "sql": 0}, {}], 4)
        assert row_names(rows) == ["sql", "chat", "sql"]

    def test_plain_rows_need_no_weights(self) -> None:
        adapter_ids, weights = row_arrays(["legal", None, "sql"], self.SLOTS, 4)
        assert (adapter_ids.dtype, adapter_ids.tolist()) == (np.int64, [4, 0, 2])
        assert weights is None

    def test_weights_stand_at_their_slots(self) -> None:
        """Rows that blend have id 0, plain rows no weight: the graph adds the two."""
        rows = read_rows(["chat", {"sql": 0.75, "legal": np.float16(-2)}, None, {"chat": 3}, {}], 5)
        adapter_ids, weights = row_arrays(rows, self.SLOTS, 4)
        assert adapter_ids.tolist() == [1, 0, 0, 0, 0]
        assert weights is not None
        assert weights.dtype == np.float32
        zeros = [0.0] * 4
        assert weights.tolist() == [zeros, [0, 0.75, 0, -2], zeros, [3, 0, 0, 0], zeros]


def test_images_are_of_the_models_size_and_dtype(tmp_path: Path) -> None:
    spec = write_vit_project(tmp_path, export={"formats": ["onnx"]})
    artifact = build(spec, tmp_path / "artifacts")[0]
    assert (artifact / "tokenizer/preprocessor_config.json").is_file()
    session = load(artifact)
    assert isinstance(session, ModelSession)
    assert [(one.dtype, one.shape) for one in session.model.inputs] == [
        ("float32", ("batch", "3", "8", "12"))
    ]
    pixels = np.random.default_rng(0).standard_normal((5, 3, 8, 12)).astype(np.float32)
    values, names = {"pixel_values": pixels}, ["birds", None, "birds", None, None]
    y = hidden(session, values, names)
    assert y.shape == (5, 7, 32)
    on_device = session.run({"pixel_values": torch.from_numpy(pixels)}, names)
    assert torch.from_dlpack(on_device["last_hidden_state"]).numpy().tobytes() == y.tobytes()
    expected = r"expected \[{}, 3, 8, 12\]"
    with pytest.raises(InputError, match=r"has shape \[5, 3, 12, 8\]; " + expected.format(5)):
        session.run({"pixel_values": pixels.swapaxes(2, 3)})
    with pytest.raises(InputError, match=r"has shape \[5, 1, 8, 12\]; " + expected.format(5)):
        session.run({"pixel_values": pixels[:, :1]})
    with pytest.raises(InputError, match=r"has shape \[3, 8, 12\]; " + expected.format("batch")):
        session.run({"pixel_values": pixels[0]})
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16):
        found = np.dtype(dtype).name
        with pytest.raises(InputError, match=f"pixel_values is {found}; this model takes float32"):
            session.run({"pixel_values": pixels.astype(dtype)})


def test_a_model_without_an_onnx_graph(tmp_path: Path) -> None:
    spec = write_model_project(tmp_path, name="script", export={"formats": ["torchscript"]})
    # Project.spec takes `name` as the file's name.
    artifact, report = build(spec, tmp_path / "script-only")
    assert report.skipped == {"onnx": "the spec does not ask for it"}
    with pytest.raises(ArtifactError, match="the model has no ONNX graph"):
        load(artifact)


def test_no_torch_is_needed(artifact: Path) -> None:
    code = f"""
import sys
import numpy as np
from loraexport_runtime import load
session = load({str(artifact)!r})
ids = np.ones((2, 5), np.int64)
inputs = dict(input_ids=ids, attention_mask=ids, token_type_ids=ids * 0)
print(session.run(inputs, ["sql", None])["last_hidden_state"].shape)
assert not {{"torch", "transformers", "onnx", "loraexport"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 5, 32)"


def test_more_adapters_than_slots_are_paged(session: ModelSession, folder: Path) -> None:
    """Three slots, four tenants: a run pages in what it names, and the numbers stay the same."""
    values = inputs()
    before = hidden(session, values, ["sql", "chat", "sql", None])
    for name, path in (("third", "legal"), ("fourth", "sql")):
        session.load_adapter(name, folder / path)
    assert len(session.adapters) == 3
    assert set(session.list_adapters()) == {"sql", "chat", "third", "fourth"}
    fourth = hidden(session, values, ["fourth", "third", "fourth", None])
    assert np.abs(fourth[[0, 2]] - before[[0, 2]]).max() < 1e-5
    again = hidden(session, values, ["sql", "chat", "sql", None])
    assert np.abs(again - before).max() < 1e-5  # another slot sums in another order


def test_the_slots_as_one_onnx_adapter(
    session: ModelSession, artifact: Path, tmp_path: Path
) -> None:
    """onnxruntime's own LoraAdapter API, as C++ and C# services have it."""
    import onnxruntime as ort

    values = inputs()
    slots = session.export_adapters(tmp_path)
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "model.onnx_adapter"))
    options, run = ort.SessionOptions(), ort.RunOptions()
    options.log_severity_level = 3
    run.add_active_adapter(adapter)
    plain = ort.InferenceSession(artifact / "graphs/model.onnx", options)
    names = ["chat", None, "sql", "chat"]
    ids = np.array([slots[name] if name else 0 for name in names])
    y = plain.run(None, {**values, "adapter_ids": ids}, run)[0]
    assert y.tobytes() == hidden(session, values, names).tobytes()
