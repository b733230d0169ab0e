"""`kind: onnx`: graphs of torch's two exporters and of onnxruntime-genai, held to PEFT and to the
Hugging Face model; rules that name sites; and what cannot be grafted."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from onnxruntime.quantization import quantize_dynamic
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project
from support.decoders import (
    ADAPTERS,
    FAMILIES,
    Peft,
    make_prompts,
    write_decoder,
    write_tokenizer,
)
from support.genai import add_cache, genai_config

import loraexport_runtime as lr
from loraexport.bases import adapters as packed_adapters
from loraexport.errors import BaseModelError, ParityError, SpecError
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport.pipeline.verify import verify_artifact
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.checking.rows import MODEL_TOLERANCES, ROUNDED_TOLERANCE
from loraexport_runtime.contract.kinds import Decoder, Graph
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.load import load_generator

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
NAMES = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "pooler_output")


class Wrapped(torch.nn.Module):
    """Plain tensors in and out, as exporters want them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.bert = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        found = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        pooled = getattr(found, "pooler_output", None)
        first = found.last_hidden_state
        return first if pooled is None else (first, pooled)


def export(model: Any, path: Path, dynamo: bool, outputs: tuple[str, ...] = OUTPUTS) -> None:
    """torch's exporter, the new one or the one of TorchScript (as optimum uses it)."""
    path.parent.mkdir()
    ids = torch.arange(10).view(2, 5)
    axes: dict[str, Any] = {name: {0: "batch", 1: "sequence"} for name in NAMES}
    options: dict[str, Any] = {"dynamic_shapes": axes}
    if not dynamo:
        given = {
            name: {0: "batch_size"} | ({1: "n"} if name == OUTPUTS[0] else {}) for name in outputs
        }
        options = {"dynamic_axes": {**axes, **given}}
    with quiet_models(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Wrapped(model.eval()),
            (ids, torch.ones_like(ids)),
            path,
            input_names=list(NAMES),
            output_names=list(outputs),
            dynamo=dynamo,
            verbose=False,
            **options,
        )


def adapt(model: Any, folder: Path, name: str, **config: Any) -> None:
    """An adapter that PEFT makes, A and B at random."""
    torch.manual_seed(len(name))
    with quiet_models(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT corrects
        wrapped: Any = get_peft_model(model, LoraConfig(**config))
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        wrapped.save_pretrained(folder / name)
        wrapped.unload()


def spec_of(folder: Path, **changes: Any) -> Path:
    adapters = [{"name": name, "path": name} for name in ADAPTERS]
    data: dict[str, Any] = {"base": {"kind": "onnx", "path": "graph"}, "adapters": adapters}
    return Project(folder).spec(**(data | changes))


def write_bert(folder: Path, dynamo: bool = True) -> Any:
    """A BERT, its graph and two adapters; the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SIZES))
    export(model, folder / "graph/model.onnx", dynamo)
    adapt(model, folder, "first", r=4, target_modules=["query", "value"])
    adapt(model, folder, "second", r=8, target_modules="all-linear", use_rslora=True)
    return model


def peft_outputs(model: Any, folder: Path, inputs: Any, adapters: list[str | None]) -> Any:
    """Each row alone, in PEFT."""
    with quiet_models():
        wrapped: Any = PeftModel.from_pretrained(model, folder / "first", "first")
        wrapped.load_adapter(folder / "second", "second")
    wrapped.eval()
    found = []
    for row, name in enumerate(adapters):
        tensors = {key: torch.from_numpy(value[row : row + 1]) for key, value in inputs.items()}
        with torch.no_grad():
            if name is None:
                with wrapped.disable_adapter():
                    found.append(wrapped(**tensors))
            else:
                wrapped.set_adapter(name)
                found.append(wrapped(**tensors))
    wrapped.unload()
    return found


def make_batch(*lengths: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(3).integers(1, 60, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def bert(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model, its folder, the artifact)"""
    folder = tmp_path_factory.mktemp("onnx")
    model = write_bert(folder, request.param)
    artifact, report = build(spec_of(folder), folder / "out")
    assert report.status == "passed"
    return model, folder, artifact


def test_a_mixed_batch_is_what_peft_gives(bert: Any) -> None:
    """Tokens through [batch, n, in], the pooler through [batch, in], of one graph."""
    model, folder, artifact = bert
    session = lr.load(artifact)
    assert isinstance(session, lr.ModelSession)
    assert [entry.shape for entry in session.model.outputs] == [
        ("batch", "sequence", "32"),
        ("batch", "32"),
    ]
    inputs = make_batch(6, 9, 4, 7)
    adapters: list[str | None] = ["second", None, "first", "second"]
    found = session.run(inputs, adapters)
    for row, expected in enumerate(peft_outputs(model, folder, inputs, adapters)):
        length = int(inputs["attention_mask"][row].sum())
        for name, keep in ((OUTPUTS[0], slice(length)), (OUTPUTS[1], slice(None))):
            y, ref = found[name][row][keep], expected[name][0].numpy()[keep]
            assert np.abs(y - ref).max() < 2e-5 * np.abs(ref).max(), (row, name)
    base = session.run(inputs)
    assert np.abs(found[OUTPUTS[1]] - base[OUTPUTS[1]])[[0, 2, 3]].max(1).min() > 0.05


def test_the_report_and_the_manifest(bert: Any) -> None:
    _, _, artifact = bert
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Graph)
    report = json.loads((artifact / "parity/parity.json").read_text())
    assert report["reference"] == "the base's own graph, the adapter's product added in float64"
    assert {row["site"] for row in report["rows"]} == set(OUTPUTS)
    assert report["skipped"]["peft"] == "the base is an ONNX graph"
    moved = [row for row in report["rows"] if row["adapter"] != "base"]
    assert all(abs(row["gain"] - 1) < 1e-3 and row["moved"] > 0.05 for row in moved)
    names = [[part.name for part in layer.slices] for layer in manifest.layers]
    assert ["query", "key", "value"] in names
    assert ["dense"] in names
    graph = onnx.load(artifact / "graphs/model.onnx")
    onnx.checker.check_model(graph)
    assert {entry.domain for entry in graph.opset_import} <= {"", "com.microsoft"}


def test_tokens_are_held_to_the_tables_of_a_graph(bert: Any) -> None:
    """No config.json lies beside it: the graph's own tables say what there is."""
    model, folder, artifact = bert
    assert not (folder / "graph/config.json").exists()
    session = lr.load_model(artifact, threads=1)
    facts = session.model.facts
    assert facts.vocab_size == model.config.vocab_size
    assert facts.positions == model.config.max_position_embeddings
    inputs = make_batch(4, 5)
    inputs["input_ids"][1, 3] = facts.vocab_size
    with pytest.raises(lr.InputError, match=r"^input_ids\[1, 3\] is 60; expected 0 to 59"):
        session.run(inputs)
    session.run(make_batch(facts.positions))
    with pytest.raises(lr.InputError, match=r"^input_ids has rows of \d+ tokens"):
        session.run(make_batch(facts.positions + 1))


def test_values_that_overflow_the_graphs_dtype(bert: Any, tmp_path: Path) -> None:
    """Finite in float32, and not once the scale multiplies them: at a load and at a build."""
    _, folder, artifact = bert
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("out"), dirs_exist_ok=True)
    file = tmp_path / "first/adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = np.full_like(tensors[name], 3e38)
    save_file(tensors, file)
    with lr.load_model(artifact, threads=1) as session:
        before = session.list_adapters()
        with pytest.raises(lr.AdapterWeightsError, match="lora_B overflows float32"):
            session.load_adapter("first", tmp_path / "first", scale=4)
        assert session.list_adapters() == before
    with pytest.raises(lr.AdapterWeightsError, match=r"'first': its lora_B .* overflows float32"):
        build(tmp_path / "spec.yaml", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_verify_finds_the_base_or_says_what_it_takes_instead(bert: Any, tmp_path: Path) -> None:
    _, folder, artifact = bert
    manifest = Manifest.read(artifact)
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    stored = verify_artifact(copy, manifest)
    assert stored.status == "passed"
    assert stored.reference.startswith("the stored cases (no base here")
    given = verify_artifact(copy, manifest, folder / "graph")
    assert (given.status, given.reference) == ("passed", stored_source(artifact))
    other = tmp_path / "graph"
    shutil.copytree(folder / "graph", other)
    model = ir.load(other / "model.onnx")
    ir.external_data.load_to_model(model)
    model.graph.doc_string = "another file"
    ir.save(model, other / "model.onnx")
    with pytest.raises(BaseModelError, match="its weights differ from those that the artifact"):
        verify_artifact(copy, manifest, other)


def test_verify_says_that_the_base_is_of_another_kind(bert: Any, tmp_path: Path) -> None:
    _, folder, artifact = bert
    other = tmp_path / "graph"
    shutil.copytree(folder / "graph", other)
    add_cache(other / "model.onnx")
    (other / "genai_config.json").write_text(json.dumps(genai_config()))
    write_tokenizer(other)
    text = "graph: it is a decoder, and the artifact is a graph; give the base that it was built"
    with pytest.raises(BaseModelError, match=text):
        verify_artifact(artifact, Manifest.read(artifact), other)


def stored_source(artifact: Path) -> str:
    return str(json.loads((artifact / "parity/parity.json").read_text())["reference"])


def test_an_adapter_is_loaded_into_a_running_session(tmp_path: Path) -> None:
    model = write_bert(tmp_path)
    adapt(model, tmp_path, "third", r=2, target_modules=["dense"])
    spec = spec_of(tmp_path, slots=3, sites="all-linear")
    session = lr.load(build(spec, tmp_path / "out")[0])
    assert isinstance(session, lr.ModelSession)
    inputs = make_batch(5, 8)
    base = session.run(inputs)[OUTPUTS[0]]
    session.load_adapter("third", tmp_path / "third")
    found = session.run(inputs, ["third", None])[OUTPUTS[0]]
    assert np.abs(found[0] - base[0])[:5].max() > 0.05
    np.testing.assert_array_equal(found[1], base[1])


@pytest.mark.slow
def test_gpt2_whose_products_take_flat_rows(tmp_path: Path) -> None:
    """Gemm on [batch * n, in], weights stored [in, out]."""
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    )
    model = tf.GPT2Model(config)
    model.config.use_cache = False
    export(model, tmp_path / "graph/model.onnx", True, OUTPUTS[:1])
    options = {"fan_in_fan_out": True}
    adapt(model, tmp_path, "first", r=4, target_modules=["c_attn"], **options)
    adapt(model, tmp_path, "second", r=8, target_modules=["c_proj", "c_fc"], **options)
    artifact, report = build(spec_of(tmp_path, export={"blend": True}), tmp_path / "out")
    assert report.status == "passed"
    blends = [row for row in report.rows if row.adapter == "blend"]
    assert {row.implementation for row in blends} == {"onnx-cpu", "onnx-cpu-plain"}
    assert max(row.error for row in blends) < 1e-4
    found = ir.load(artifact / "graphs/model.onnx").graph
    assert any(node.op_type == "Gemm" for node in found)
    session = lr.load(artifact)
    assert isinstance(session, lr.ModelSession)
    inputs, adapters = make_batch(7, 7, 7), ["second", None, "first"]
    y = session.run(inputs, adapters)[OUTPUTS[0]]
    for row, expected in enumerate(peft_outputs(model, tmp_path, inputs, adapters)):
        ref = expected.last_hidden_state[0].numpy()
        assert np.abs(y[row] - ref).max() < 2e-5 * np.abs(ref).max(), row
    mixed = session.run(inputs, [{"first": 1.0}, {"second": 0.0}, {"first": 0.5, "second": 0.0}])
    named = session.run(inputs, ["first", None, None])
    assert np.allclose(mixed[OUTPUTS[0]][:2], named[OUTPUTS[0]][:2], atol=1e-5)
    assert not np.allclose(mixed[OUTPUTS[0]][2], named[OUTPUTS[0]][2], atol=1e-2)


# Folders of onnxruntime-genai


def build_folder(folder: Path, family: str, precision: str, *options: str) -> Path:
    """What the model builder makes of a tiny decoder; the spec of kind onnx."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    write_decoder(folder, FAMILIES[family])
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        place = ("decoder", str(folder / "base"), str(folder / "graph"), precision, "cpu")
        create_model(*place, cache, **parse_extra_options(*place, cache, [*options]))
    return spec_of(folder, name="folder")


@pytest.mark.parametrize(
    "family",
    [
        "Phi-3.5",
        pytest.param("Llama", marks=pytest.mark.slow),
        pytest.param("Gemma 2", marks=pytest.mark.slow),
        pytest.param("Qwen2", marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_genai_generates_what_peft_does(family: str, tmp_path: Path) -> None:
    """q, k and v packed by the builder, and gate and up that it splits for Phi-3's gate_up; windows
    and longrope, whose caches and factors are the builder's for a batch as a whole."""
    artifact, report = build(build_folder(tmp_path, family, "fp32"), tmp_path / "out")
    assert report.status == "passed"
    assert isinstance(Manifest.read(artifact).kind, Decoder)
    prompts, adapters = make_prompts(3, 11, 6), ["second", None, "first"]
    found = load_generator(artifact).generate(prompts, adapters=adapters, max_new_tokens=8)
    peft = Peft(tmp_path)
    for one, prompt, adapter in zip(found, prompts, adapters, strict=True):
        assert one.tokens == peft.generate(prompt, adapter, 8), adapter
    names = {file.name for file in (artifact / "generator").iterdir()}
    assert {"genai_config.json", "tokenizer.json", "model.onnx", "model.onnx.data"} <= names


def test_a_folder_without_the_window_that_it_speaks_of(tmp_path: Path) -> None:
    """As the builder makes Mistral's: its proof against itself would pass."""
    with pytest.raises(
        BaseModelError, match=r"a sliding window of 8 tokens, and no layer of model"
    ):
        build(build_folder(tmp_path, "Mistral", "fp32"), tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="default"),
        pytest.param(("accuracy_level=0",), id="as they are", marks=pytest.mark.slow),
    ],
)
def test_a_folder_in_int4(options: tuple[str, ...], tmp_path: Path) -> None:
    """As the builder makes it by default its products take activations rounded to 8 bits: held to
    the same graph, by limits that say so."""
    artifact, report = build(build_folder(tmp_path, "Llama", "int4", *options), tmp_path / "out")
    assert report.status == "passed"
    nodes = list(ir.load(artifact / "generator/model.onnx").graph)
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert {node.attributes.get_int("accuracy_level", 0) for node in products} == {
        0 if options else 4
    }
    table = MODEL_TOLERANCES["float32"] if options else ROUNDED_TOLERANCE
    assert (report.tolerance, report.gain_tolerance) == (table.error, table.gain)
    parity = Manifest.read(artifact).parity
    assert (parity.tolerance, parity.gain_tolerance) == (table.error, table.gain)
    tokens = [row for row in report.rows if row.site == "tokens"]
    assert {row.implementation for row in tokens} >= {"onnx-engine-cpu", "onnx-genai-cpu"}
    wanted = [row for row in report.rows if row.adapter != "base" and row.site == "logits"]
    assert all(row.moved is not None and row.moved > 0.05 for row in wanted)


# Rules


def test_rules_name_what_the_graph_does_not(tmp_path: Path) -> None:
    write_bert(tmp_path, dynamo=False)
    model = ir.load(tmp_path / "graph/model.onnx")
    ir.external_data.load_to_model(model)
    for node in model.graph:
        name = str(node.name)
        for block in range(2):
            for part in ("query", "value"):
                if name.endswith(f"layer.{block}/attention/self/{part}/MatMul"):
                    node.name = f"product_{block}_{part[0]}"
    ir.save(model, tmp_path / "graph/model.onnx")
    write_adapter(
        tmp_path / "first",
        {f"encoder.layer.{block}.attention.self.query": (32, 32) for block in range(2)},
        config={"target_modules": ["query"]},
    )
    adapters = [{"name": "first", "path": "first"}]
    unnamed = spec_of(tmp_path, adapters=adapters)
    with pytest.raises(
        lr.AdapterWeightsError, match=r"2 of 2 modules have no site .*under base.sites: \{node: …"
    ):
        make_plan(read_spec(unnamed), tmp_path)
    rule = {"node": "product_*_q", "site": "bert.encoder.layer.*.attention.self.query"}
    spec = spec_of(
        tmp_path, adapters=adapters, base={"kind": "onnx", "path": "graph", "sites": [rule]}
    )
    plan = make_plan(read_spec(spec), tmp_path)
    assert [[part.site for part in one.layer.slices] for one in plan.layers] == [
        [f"bert.encoder.layer.{block}.attention.self.query"] for block in range(2)
    ]
    assert build(spec, tmp_path / "out")[1].status == "passed"


def _packed(folder: Path, **changes: Any) -> Path:
    """A graph of one product that packs two sites, made by hand; the spec."""
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    values = {
        "words": generator.standard_normal((20, 16)).astype(np.float32),
        "w": generator.standard_normal((16, 12)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["x"], "lookup"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "packed"),
    ]
    taken = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "n"])
    given = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "n", 12])
    weights = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "hand", [taken], [given], weights)
    opsets = [helper.make_opsetid("", 21)]
    (folder / "graph").mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        folder / "graph/model.onnx",
    )
    write_adapter(folder / "first", {"block.v": (16, 4)})
    base = {"kind": "onnx", "path": "graph"} | changes
    return spec_of(folder, base=base, adapters=[{"name": "first", "path": "first"}])


def test_a_rule_names_the_parts_of_a_packed_product(tmp_path: Path) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    artifact, report = build(_packed(tmp_path, sites=[rule]), tmp_path / "out")
    assert report.status == "passed"
    session = lr.load(artifact)
    assert isinstance(session, lr.ModelSession)
    ids = {"input_ids": np.array([[1, 2, 3], [4, 5, 6]])}
    moved = np.abs(session.run(ids, ["first", None])["y"] - session.run(ids)["y"])
    assert moved[0, :, 8:].min() > 0
    assert moved[0, :, :8].max() == moved[1].max() == 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"node": "pakced", "site": "block.v"},
            r"no product of .* is named 'pakced'; it has 1",
        ),
        (
            {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 5]},
            r"'packed' has 12 outputs, and its 2 sites 13 in 2 widths",
        ),
        ({"node": "packed", "site": "block.*"}, r"site 'block.\*' has more \* than node 'packed'"),
    ],
)
def test_rules_that_do_not_fit(rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=message):
        make_plan(read_spec(_packed(tmp_path, sites=[rule])), tmp_path)


# What cannot be built


def test_what_a_spec_says_wrong(tmp_path: Path) -> None:
    rules = [{"node": "packed", "site": ["a", "b"]}, {"node": "q", "site": "q", "width": 3}]
    base = {"kind": "onnx", "path": "graph", "sites": rules}
    spec = spec_of(tmp_path, base=base, export={"dtype": "bfloat16"})
    with pytest.raises(SpecError) as caught:
        read_spec(spec)
    found = {one.path: (one.message, one.hint) for one in caught.value.problems}
    assert found == {
        "base.sites[0]": (
            "a list of sites and widths go together",
            "give the outputs of each site, or one site alone",
        ),
        "base.sites[1].width": ("unknown key", "did you mean 'widths'?"),
        "export.dtype": (
            "an ONNX graph in bfloat16, which no CPU can be the reference for",
            "take float16 or float32",
        ),
    }


Change = Callable[[onnx.ModelProto], None]


def _set_input(model: onnx.ModelProto, name: str, size: int | None) -> None:
    taken = model.graph.input[0]
    taken.name = model.graph.node[0].input[1] = name
    if size is not None:
        taken.type.tensor_type.shape.dim[0].dim_value = size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: _set_input(model, "ids", None),
            r"it takes 'ids' \(INT64\); known are",
        ),
        (lambda model: _set_input(model, "input_ids", 1), r"input_ids has the fixed shape \[1,n\]"),
        (
            lambda model: _set_input(model, "past_key_values.0.key", None),
            r"it takes a cache \(past_key_values.0.key\), but no genai_config.json lies beside it",
        ),
    ],
)
def test_a_graph_that_takes_something_else(change: Change, message: str, tmp_path: Path) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = _packed(tmp_path, sites=[rule])
    model = onnx.load(tmp_path / "graph/model.onnx")
    change(model)
    onnx.save(model, tmp_path / "graph/model.onnx")
    with pytest.raises(BaseModelError, match=message):
        make_plan(read_spec(spec), tmp_path)


def test_a_graph_in_int8(tmp_path: Path) -> None:
    """As optimum writes it: no product of floats is left, or only others than the adapter's."""
    spec = _packed(tmp_path)
    file, plain = tmp_path / "graph/model.onnx", tmp_path / "plain.onnx"
    file.rename(plain)
    quantize_dynamic(plain, file)
    expected = r"no product of a weight of floats; its 1 products take integers of 8 bits .* before"
    with pytest.raises(BaseModelError, match=expected):
        make_plan(read_spec(spec), tmp_path)
    model = onnx.load(file)
    weight = onnx.numpy_helper.from_array(np.ones((12, 4), np.float32), "head.weight")
    model.graph.initializer.append(weight)
    model.graph.node.append(onnx.helper.make_node("MatMul", ["y", "head.weight"], ["z"], "head"))
    onnx.save(model, file)
    with pytest.raises(
        lr.AdapterWeightsError, match=r"Sites here: head\..* In .*model\.onnx its 1 products take"
    ):
        make_plan(read_spec(spec), tmp_path)


def test_rows_that_do_not_come_first(tmp_path: Path) -> None:
    """A graph that turns [batch, n] into [n, batch] before its product."""
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = _packed(tmp_path, sites=[rule])
    model = onnx.load(tmp_path / "graph/model.onnx")
    turn = onnx.helper.make_node("Transpose", ["x"], ["turned"], "turn", perm=[1, 0, 2])
    model.graph.node.insert(1, turn)
    model.graph.node[2].input[0] = "turned"
    model.graph.node[2].output[0] = "turned_y"
    back = onnx.helper.make_node("Transpose", ["turned_y"], ["y"], "back", perm=[1, 0, 2])
    model.graph.node.append(back)
    onnx.save(model, tmp_path / "graph/model.onnx")
    with pytest.raises(BaseModelError, match=r"gets a tensor of shape \[7, 3, 16\] for 3 rows"):
        build(spec, tmp_path / "out")


def test_a_plan_refuses_files_that_a_build_could_not_take(tmp_path: Path) -> None:
    """A tokenizer that is broken; of a folder that generates one that is not there; cut data."""
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = read_spec(_packed(tmp_path, sites=[rule]))
    graph = tmp_path / "graph"
    (graph / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"tokenizer\.json: no tokenizer that"):
        make_plan(spec, tmp_path)
    (graph / "tokenizer.json").unlink()
    config = genai_config()
    for names in ("inputs", "outputs"):  # the graph has no cache
        decoder = config["model"]["decoder"]
        decoder[names] = dict.fromkeys(decoder[names], "none")
    (graph / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=r"no tokenizer\.json, which a decoder needs"):
        make_plan(spec, tmp_path)
    (graph / "secret.json").symlink_to(tmp_path / "first/adapter_config.json")
    with pytest.raises(BaseModelError, match=r"secret\.json: a link out of the base's folder"):
        make_plan(spec, tmp_path)
    (graph / "secret.json").unlink()
    (graph / "genai_config.json").unlink()
    model = ir.load(graph / "model.onnx")
    ir.save(model, graph / "model.onnx", external_data="weights", size_threshold_bytes=0)
    with (graph / "weights").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(BaseModelError, match=r"weights: 8 bytes, but '.*' of model\.onnx ends at"):
        make_plan(spec, tmp_path)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    spec = _packed(tmp_path, file="other.onnx")
    with pytest.raises(BaseModelError, match=r"other.onnx: no such file; base.file names the gra"):
        make_plan(read_spec(spec), tmp_path)
    (tmp_path / "graph/other.onnx").write_bytes(b"no graph")
    with pytest.raises(BaseModelError, match=r"other.onnx: not readable as ONNX"):
        make_plan(read_spec(spec), tmp_path)


def test_another_dtype_than_the_graphs(tmp_path: Path) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    _packed(tmp_path)
    base = {"kind": "onnx", "path": "graph", "sites": [rule]}
    adapters = [{"name": "first", "path": "first"}]
    spec = spec_of(tmp_path, base=base, adapters=adapters, export={"dtype": "float16"})
    with pytest.raises(
        BaseModelError, match=r"node 'packed' computes in float32; export.dtype is float16"
    ):
        make_plan(read_spec(spec), tmp_path)


def test_dora_is_refused(tmp_path: Path) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = _packed(tmp_path, sites=[rule])
    write_adapter(
        tmp_path / "first",
        {"block.v": (16, 4)},
        config={"use_dora": True},
        tensors={"base_model.model.block.v.lora_magnitude_vector": np.ones(4, np.float32)},
    )
    with pytest.raises(
        lr.AdapterConfigError, match=r"first: it uses dora .* an ONNX graph \(base.kind: onnx\) has"
    ):
        make_plan(read_spec(spec), tmp_path)


def test_a_planted_fault_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = _packed(tmp_path, sites=[rule])
    pack = packed_adapters.pack
    monkeypatch.setattr(
        packed_adapters,
        "pack",
        lambda layer, weights, scale, *rest: pack(layer, weights, scale * 1.05, *rest),
    )
    with pytest.raises(ParityError, match="nothing was published"):
        build(spec, tmp_path / "out")


def test_a_plan_of_a_graph_needs_no_torch(tmp_path: Path) -> None:
    rule = {"node": "packed", "site": ["block.k", "block.v"], "widths": [8, 4]}
    spec = _packed(tmp_path, sites=[rule])
    code = (
        "import sys; from pathlib import Path; from loraexport.plan.plan import make_plan\n"
        "from loraexport.spec.reader import read_spec\n"
        f"path = Path({str(spec)!r})\n"
        "print(len(make_plan(read_spec(path), path.parent).layers))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
