"""Adapters of another model whose modules are called alike, on layers, graphs and decoders.

The whole models' are in test_wrong_modules.py. What a base's config.json says its adapters are held
to; where nothing says it, no name is dropped, and the build's own adapters say the architecture.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project
from support.decoders import FAMILIES, write_decoder, write_tokenizer
from support.genai import add_cache, genai_config
from support.home import Home

import loraexport_runtime
from loraexport.parity.decoder import check
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import AdapterEntry
from loraexport_runtime.errors import AdapterWeightsError

SIZES = (16, 8)
QUERY = "encoder.layer.0.attention.self.query"
PROJECTION = "model.layers.0.self_attn.q_proj"
TOWER = "encoder.layers.0.self_attn.q_proj"


def weight_of(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def noted(library: str, name: str) -> dict[str, Any]:
    """What PEFT notes of the model that it was given without a task."""
    parent = f"transformers.models.{library}.modeling_{library}"
    return {"auto_mapping": {"parent_library": parent, "base_model_class": name}}


def write_kin(folder: Path, kind: str, site: str, model_type: str | None) -> None:
    """A base of one site, as layers or as a graph, with a config.json or without."""
    base = folder / "base"
    base.mkdir(parents=True)
    weight, words = weight_of(*SIZES), weight_of(20, SIZES[0])
    if kind == "layers":
        save_file({f"{site}.weight": np.ascontiguousarray(weight.T)}, base / "model.safetensors")
    else:
        nodes = [
            helper.make_node("Gather", ["words", "input_ids"], ["x"], "lookup"),
            helper.make_node("MatMul", ["x", f"{site}.weight"], ["y"], "product"),
        ]
        taken = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "n"])
        given = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "n", SIZES[1]])
        weights = {"words": words, f"{site}.weight": weight}
        tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "hand", [taken], [given], tensors)
        opsets = [helper.make_opsetid("", 21)]
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), base / "model.onnx"
        )
    if model_type is not None:
        (base / "config.json").write_text(json.dumps({"model_type": model_type}))


def write_spec(folder: Path, kind: str, site: str, *adapters: str) -> Path:
    base: dict[str, Any] = {"kind": "onnx", "path": "base"}
    if kind == "layers":
        layers = [{"name": "only", "type": "linear", "site": site}]
        base = {"kind": "layers", "path": "base", "layers": layers}
    return Project(folder).spec(
        base=base,
        adapters=[{"name": name, "path": name} for name in adapters],
        slots=2,
        export={"formats": ["onnx"], "strategy": "masked"},
    )


def run(session: Any, kind: str, adapter: str) -> np.ndarray:
    """y of three tokens."""
    words = weight_of(20, SIZES[0])[:3]
    if kind == "layers":
        y: np.ndarray = session["only"].run(words, segments=[(adapter, 3)])
        return y
    outputs = session.run({"input_ids": np.array([[0, 1, 2]])}, adapters=[adapter])
    return np.asarray(outputs["y"][0])


def expected(folder: Path) -> np.ndarray:
    words = weight_of(20, SIZES[0])[:3]
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (next(factors[name] for name in factors if f"lora_{part}." in name) for part in "AB")
    y: np.ndarray = words @ weight_of(*SIZES) + 2 * (words @ a.T @ b.T)
    return y


Case = tuple[str, str | None, dict[str, tuple[str, dict[str, Any]]], dict[str, Any]]
CASES: dict[str, Case] = {
    # Adapters that are taken: name -> (module, config). Those that are not, with the sentence.
    "a bare BERT that says so": (
        QUERY,
        "bert",
        {
            "bare": (QUERY, noted("bert", "BertModel")),
            "headed": (f"bert.{QUERY}", {}),
        },
        {
            "of_roberta": (f"roberta.{QUERY}", {}, "of 'roberta', which is not a part of this"),
            "of_bare_roberta": (
                QUERY,
                noted("roberta", "RobertaModel"),
                "trained on RobertaModel of 'roberta' .*, which is another model than this",
            ),
        },
    ),
    "a bare BERT that says nothing": (
        QUERY,
        None,
        {"bare": (QUERY, noted("bert", "BertModel")), "silent": (QUERY, {})},
        {
            # It may be BERT's; nothing tells it from RoBERTa's.
            "headed": (f"bert.{QUERY}", {}, "'bert', .* nothing says what may stand before its"),
            "of_roberta": (f"roberta.{QUERY}", {}, "'roberta', .* nothing says what may stand"),
            "of_bare_roberta": (
                QUERY,
                noted("roberta", "RobertaModel"),
                "RobertaModel of 'roberta'|on a model of 'roberta', and .* on one of 'bert'",
            ),
        },
    ),
    "a Llama that says nothing": (
        PROJECTION,
        None,
        {
            "headed": (PROJECTION, noted("llama", "LlamaForCausalLM")),
            "bare": (PROJECTION.removeprefix("model."), {}),
        },
        {
            "of_mistral": (
                PROJECTION,
                noted("mistral", "MistralForCausalLM"),
                "MistralForCausalLM of 'mistral'|on a model of 'mistral', and .* one of 'llama'",
            ),
            "of_gpt": (f"transformer.{PROJECTION}", {}, "of 'transformer', which is not a part"),
        },
    ),
    "CLIP's vision tower": (
        TOWER,
        "clip_vision_model",
        {
            "bare": (TOWER, noted("clip", "CLIPVisionModel")),
            "of_whole": (f"vision_model.{TOWER}", {}),
        },
        {
            "of_text": (f"text_model.{TOWER}", {}, "of 'text_model', which is not a part of this"),
            "of_bare_text": (
                TOWER,
                noted("clip", "CLIPTextModel"),
                "trained on CLIPTextModel of 'clip' .*, which is another part of the model",
            ),
        },
    ),
}


LOADED = ("a bare BERT that says so", "a Llama that says nothing")
"""Cases that are built too: a load matches as a plan does, by what the manifest says."""


@pytest.mark.parametrize("kind", ["layers", "onnx"])
@pytest.mark.parametrize("name", CASES)
def test_kin_are_told_apart(name: str, kind: str, home: Home, tmp_path: Path) -> None:
    """At build and at load; what is taken gives what W x + s B A x does."""
    site, model_type, right, wrong = CASES[name]
    write_kin(tmp_path, kind, site, model_type)
    for adapter, (module, config, *_) in {**right, **wrong}.items():
        write_adapter(tmp_path / adapter, {module: SIZES}, seed=len(adapter), config=config)
    first, second = right
    for adapter, (*_, message) in wrong.items():
        spec = write_spec(tmp_path, kind, site, first, adapter)
        with pytest.raises(AdapterWeightsError, match=message):
            make_plan(read_spec(spec), tmp_path)
    spec = write_spec(tmp_path, kind, site, first, second)
    assert len(make_plan(read_spec(spec), tmp_path).adapters) == 2
    if name not in LOADED:
        return
    artifact = home.build(write_spec(tmp_path, kind, site, first))
    with loraexport_runtime.load(artifact) as session:
        for adapter, (*_, message) in wrong.items():
            with pytest.raises(AdapterWeightsError, match=message):
                session.load_adapter("another", tmp_path / adapter)
        session.load_adapter("another", tmp_path / second)
        for adapter, folder in ((first, first), ("another", second)):
            y, reference = run(session, kind, adapter), expected(tmp_path / folder)
            np.testing.assert_allclose(y, reference, rtol=1e-4, atol=1e-4)


def test_a_folder_that_generates_says_its_architecture(tmp_path: Path) -> None:
    """Its builder calls all decoders' modules alike, and writes no config.json."""
    write_kin(tmp_path, "onnx", PROJECTION, None)
    add_cache(tmp_path / "base/model.onnx")
    (tmp_path / "base/genai_config.json").write_text(json.dumps(genai_config(type="llama")))
    write_tokenizer(tmp_path / "base")
    for adapter, library, name in (
        ("right", "llama", "LlamaForCausalLM"),
        ("wrong", "mistral", "MistralForCausalLM"),
    ):
        write_adapter(tmp_path / adapter, {PROJECTION: SIZES}, config=noted(library, name))
    planned = make_plan(read_spec(write_spec(tmp_path, "onnx", PROJECTION, "right")), tmp_path)
    assert planned.kind.naming.architecture == "llama"
    spec = write_spec(tmp_path, "onnx", PROJECTION, "wrong")
    with pytest.raises(AdapterWeightsError, match="another model than this base, of 'llama'"):
        make_plan(read_spec(spec), tmp_path)


def write_decoders(folder: Path) -> None:
    """A Llama with a tokenizer and adapters, and others whose tensors are the first one's."""
    write_decoder(folder, FAMILIES["Llama"])
    tensors = load_file(folder / "first/adapter_model.safetensors")
    config = json.loads((folder / "first/adapter_config.json").read_text()) | {"task_type": None}
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "of_bare": ("base_model.model.", noted("llama", "LlamaModel")),
        "of_mistral": ("base_model.model.model.", noted("mistral", "MistralForCausalLM")),
        "of_neox": ("base_model.model.gpt_neox.", {}),
    }
    for name, (prefix, note) in others.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(config | note))
        renamed = {
            prefix + key.removeprefix("base_model.model.model."): value
            for key, value in tensors.items()
        }
        save_file(renamed, folder / name / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("of_mistral", "trained on MistralForCausalLM of 'mistral' .*, which is another model"),
        ("of_neox", "are of 'gpt_neox', which is not a part of this base"),
    ],
)
def test_a_decoder_of_another_family(
    adapter: str, message: str, home: Home, tmp_path: Path
) -> None:
    folder = home.project(write_decoders)
    spec = Project(tmp_path).spec(
        base={"kind": "causal_lm", "path": str(folder / "base")},
        adapters=[{"name": adapter, "path": str(folder / adapter)}],
    )
    with pytest.raises(AdapterWeightsError, match=message):
        make_plan(read_spec(spec), tmp_path)


def test_peft_takes_a_decoders_adapters_by_their_own_names(home: Home) -> None:
    """One of the bare model moves what the same one of the headed model does."""
    folder = home.project(write_decoders)
    names = enumerate(("first", "of_bare"), 1)
    entries = [AdapterEntry(name, name, "", 0.5, slot, {}, ()) for slot, name in names]
    manifest: Any = SimpleNamespace(adapters=entries)
    logits = check._peft_runner(folder, manifest, folder / "base", None)
    prompts = [[5, 6, 7]] * 3
    tokens = np.ones((3, 4), np.int64)
    base, headed, bare = logits(prompts, tokens, [((slot, 1.0),) for slot in range(3)])
    np.testing.assert_allclose(bare, headed, rtol=1e-5, atol=1e-5)
    assert np.abs(headed - base).max() > 0.05
