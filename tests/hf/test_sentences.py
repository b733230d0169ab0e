"""What a sentence-transformers directory may declare, and every key that is refused by its name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sentences import (
    NORMALIZE,
    Module,
    declare,
    dense,
    layer_norm,
    pooling,
)

from loraexport.errors import BaseModelError
from loraexport.hf.sentences.reader import find_sentence_task, read_tail
from loraexport.hf.sentences.tail import Dense, Normalize, Scores, Sentences
from loraexport_runtime.contract.kinds import TensorEntry
from loraexport_runtime.errors import WeightsError

WIDTH = 6
TEXT_CONFIG = "sentence_bert_config.json"
VECTOR = TensorEntry("sentence_embedding", "float32", ("batch", str(WIDTH)))


def read(folder: Path) -> Sentences:
    tail = read_tail(folder, "sentence-embedding")
    assert isinstance(tail, Sentences)
    return tail


def refused(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        read_tail(folder, "sentence-embedding")
    return str(caught.value)


def write(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
        ({"pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weightedmean"]),
        # Side by side in the library's order, whatever that of the file.
        (
            {
                "pooling_mode_mean_sqrt_len_tokens": True,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": True,
                "pooling_mode_cls_token": True,
            },
            ["cls", "max", "mean", "mean_sqrt_len_tokens"],
        ),
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ["max"]),
        ({"pooling_mode": ["lasttoken", "cls"]}, ["lasttoken", "cls"]),
    ],
)
def test_modes(tmp_path: Path, config: Any, modes: list[str]) -> None:
    old = {"word_embedding_dimension": WIDTH, **config}
    tail = read(declare(tmp_path, Module("Pooling", old), NORMALIZE))
    assert (list(tail.modes), tail.include_prompt) == (modes, True)
    assert tail.steps == (Normalize(),)
    assert tail.out_features == WIDTH * len(modes)


@pytest.mark.parametrize(
    ("config", "listed"),
    [
        ({}, r"\[\]"),
        ({"pooling_mode_mean_tokens": False}, r"\[\]"),
        ({"pooling_mode": "attention"}, r"\['attention'\]"),
        ({"pooling_mode": ["mean", "nope"]}, r"\['mean', 'nope'\]"),
        ({"pooling_mode": []}, r"\[\]"),
        ({"pooling_mode": {"mean": True}}, r"\{'mean': True\}"),
        ({"pooling_mode": [["mean"]]}, r"\[\['mean'\]\]"),
    ],
)
def test_a_mode_that_is_none_of_the_library_s(tmp_path: Path, config: Any, listed: str) -> None:
    declare(tmp_path, Module("Pooling", {"embedding_dimension": WIDTH, **config}))
    with pytest.raises(BaseModelError, match=f"config.json: pooling is {listed}; supported are"):
        read_tail(tmp_path, "sentence-embedding")


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    declare(tmp_path, pooling(WIDTH, "mean"), transformer="0_Transformer")
    (tmp_path / "0_Transformer").mkdir()
    write(tmp_path / "0_Transformer" / TEXT_CONFIG, max_seq_length=12, do_lower_case=True)
    tail = read(tmp_path)
    assert (tail.folder, tail.lower_case) == (tmp_path / "0_Transformer", True)


def test_what_the_graph_takes_and_gives(tmp_path: Path) -> None:
    declare(tmp_path / "plain", pooling(WIDTH, ["cls", "max"]))
    plain = read(tmp_path / "plain")
    assert plain.inputs(()) == ()
    assert plain.outputs((VECTOR,)) == (replace(VECTOR, shape=("batch", "12")),)
    behind = (dense(WIDTH, 5), layer_norm(5))
    declare(tmp_path / "cut", pooling(WIDTH, "cls", include_prompt=False), *behind, truncate_dim=3)
    cut = read(tmp_path / "cut")
    assert cut.inputs(()) == (TensorEntry("prompt_lengths", "int64", ("batch",)),)
    assert cut.outputs((VECTOR,))[0].shape == ("batch", "3")
    with pytest.raises(BaseModelError, match="states have 8 numbers, and the pooling expects 6"):
        plain.outputs((replace(VECTOR, shape=("batch", "8")),))


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["WeightedLayerPooling", "Pooling"], "lists 'WeightedLayerPooling', which cannot be"),
        (["Pooling", "CNN"], "lists 'CNN', which cannot be built; only Transformer, Pooling,"),
        (["Pooling", "Pooling"], "lists Transformer, Pooling, Pooling; expected Transformer,"),
        (["Normalize", "Pooling"], "lists Transformer, Normalize, Pooling; expected Transformer,"),
        (["Normalize"], "no pooling is declared .* use task feature-extraction"),
    ],
)
def test_modules_that_are_no_tail(tmp_path: Path, kinds: list[str], said: str) -> None:
    modules = [pooling(WIDTH, "mean") if kind == "Pooling" else Module(kind) for kind in kinds]
    with pytest.raises(BaseModelError, match=said):
        read_tail(declare(tmp_path, *modules), "sentence-embedding")


def test_nothing_is_declared(tmp_path: Path) -> None:
    assert "no pooling is declared (modules.json and its config)" in refused(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"type": "custom_st.Transformer"}, "'custom_st.Transformer' is code of the model's own"),
        ({"type": "Transformer"}, "type 'Transformer' is code of the model's own"),
        ({"type": 3}, "type: expected a text, got 3"),
        ({"kwargs": ["task"]}, "kwargs is ['task']: its forward takes more than texts"),
        ({"scale": 2}, "'scale' is a key that this version does not know"),
        ({"path": "../elsewhere"}, "path '../elsewhere' leaves the folder"),
        ({"path": "/etc"}, "path '/etc' leaves the folder"),
    ],
)
def test_an_entry_of_modules_json(tmp_path: Path, values: Any, said: str) -> None:
    file = declare(tmp_path, pooling(WIDTH, "mean")) / "modules.json"
    modules = json.loads(file.read_text())
    modules[0] |= values
    file.write_text(json.dumps(modules))
    told = refused(tmp_path)
    assert told.startswith(f"{file}: ")
    assert said in told


def _pooling(**values: Any) -> Callable[[Path], object]:
    return lambda folder: declare(folder, pooling(WIDTH, "mean", **values))


def _dense(**values: Any) -> Callable[[Path], object]:
    step = dense(WIDTH, 4)
    changed = replace(step, config={**(step.config or {}), **values})
    return lambda folder: declare(folder, pooling(WIDTH, "mean"), changed)


def _normalize(**values: Any) -> Callable[[Path], object]:
    return lambda folder: declare(folder, pooling(WIDTH, "mean"), Module("Normalize", values))


def _model(**values: Any) -> Callable[[Path], object]:
    return lambda folder: declare(folder, pooling(WIDTH, "mean"), **values)


def _text(**values: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        write(declare(folder, pooling(WIDTH, "mean")) / TEXT_CONFIG, **values)

    return make


UNKNOWN = "is a key that this version does not know, and may change what the model gives"
CHANGES = "which changes what the model gives and cannot be built; only"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_pooling(pooling_mode_attention=True), f"'pooling_mode_attention' {UNKNOWN}"),
        (_pooling(include_prompt="no"), "include_prompt: expected true or false, got 'no'"),
        (_pooling(embedding_dimension=None), "embedding_dimension: expected a number from 1 on"),
        (_pooling(embedding_dimension=0), "embedding_dimension: expected a number from 1 on"),
        (_dense(scale=2), f"'scale' {UNKNOWN}"),
        (_dense(in_features=5), "in_features: expected 6, as comes before it, got 5"),
        (_dense(out_features=3), "its weights are {'linear.bias': (4,), 'linear.weight': (4, 6)}"),
        (_dense(bias=False), "by its config.json they should be {'linear.weight': (4, 6)}"),
        (_dense(bias=1), "bias: expected true or false, got 1"),
        (_dense(use_residual=True), "'residual.weight': (4, 6)}"),
        (_dense(activation_function="torch.nn.modules.activation.Softmax"), "only ELU, GELU, Id"),
        (_dense(activation_function="my_code.Tanh"), "activation_function is 'my_code.Tanh', whi"),
        (_dense(activation_function=["Tanh"]), "activation_function: expected a text, got ['Tan"),
        (_dense(module_input_name="token_embeddings"), f"is 'token_embeddings', {CHANGES} 'sent"),
        (_dense(module_output_name="other"), f"module_output_name is 'other', {CHANGES}"),
        (_normalize(module_input_name="token_embeddings"), f"is 'token_embeddings', {CHANGES}"),
        (_normalize(p=1), f"'p' {UNKNOWN}"),
        (_model(model_type="SparseEncoder"), f"model_type is 'SparseEncoder', {CHANGES}"),
        (_model(truncate_dim=0), "truncate_dim: expected a number from 1 on, got 0"),
        (_model(truncate_dim="8"), "truncate_dim: expected an integer, got '8'"),
        (_model(whitening=[1]), f"'whitening' {UNKNOWN}"),
        (_text(transformer_task="fill-mask"), f"transformer_task is 'fill-mask', {CHANGES}"),
        (_text(module_output_name="all"), f"module_output_name is 'all', {CHANGES} 'token_emb"),
        (_text(processing_kwargs={"text": {}}), "processing_kwargs is {'text': {}}, which changes"),
        (_text(query_length=8), f"query_length is 8, {CHANGES} None can"),
        (_text(query_expansion={"length": 32}), "query_expansion is {'length': 32}"),
        (_text(tokenizer_name_or_path="other"), "tokenizer_name_or_path is 'other'"),
        (_text(model_args={"is_causal": False}), "model_args.is_causal is False, which may change"),
        (_text(config_kwargs={"num_hidden_layers": 1}), "config_kwargs.num_hidden_layers is 1"),
        (_text(tokenizer_args={"use_fast": 1}), "tokenizer_args.use_fast is 1, which may change"),
        (_text(model_kwargs="fp16"), "model_kwargs: expected an object, got 'fp16'"),
        (_text(prefix="query: "), f"'prefix' {UNKNOWN}"),
        (
            _text(modality_config={"text": {"method": "get_text_features"}}),
            "modality_config.text is {'method': 'get_text_features'}; only {'method': 'forward', ",
        ),
        (_text(do_lower_case="yes"), "do_lower_case: expected true or false, got 'yes'"),
        (_text(prefix="x" * 999, unpad_inputs=True), UNKNOWN),
    ],
)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path)
    told = refused(tmp_path)
    assert said in told
    assert told.startswith(str(tmp_path))
    assert len(told) < 600


def test_keys_without_an_effect(tmp_path: Path) -> None:
    declare(
        tmp_path,
        pooling(WIDTH, "mean", include_prompt=True),
        Module("Normalize", {"module_input_name": "sentence_embedding"}),
        model_type="SentenceTransformer",
        similarity_fn_name="dot",
        truncate_dim=None,
        requirements=["transformers>=5"],
    )
    write(
        tmp_path / TEXT_CONFIG,
        transformer_task="feature-extraction",
        module_output_name="token_embeddings",
        modality_config={
            "text": {"method": "forward", "method_output_name": "last_hidden_state"},
            "message": {"method": "forward", "format": "flat"},
        },
        processing_kwargs={},
        unpad_inputs=False,
        model_args={"attn_implementation": "eager", "dtype": "float16", "trust_remote_code": True},
        processor_kwargs={"padding_side": "left"},
        query_length=None,
    )
    assert read(tmp_path).out_features == WIDTH


def test_an_older_name_of_the_text_s_config(tmp_path: Path) -> None:
    declare(tmp_path, pooling(WIDTH, "mean"))
    write(tmp_path / "sentence_roberta_config.json", do_lower_case=True)
    assert read(tmp_path).lower_case


def test_weights_of_a_module(tmp_path: Path) -> None:
    step = dense(WIDTH, 4)
    declare(tmp_path, pooling(WIDTH, "mean"), step)
    (found,) = read(tmp_path).steps
    assert isinstance(found, Dense)
    assert found.activation == "Tanh"
    weights = tmp_path / "2_Dense/model.safetensors"
    weights.unlink()
    assert "2_Dense: no safetensors file here" in refused(tmp_path)
    (tmp_path / "2_Dense/pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(WeightsError, match="files are unpickled on load"):
        read_tail(tmp_path, "sentence-embedding")
    tensors = {**step.tensors, "extra": np.zeros(1, np.float32)}
    declare(tmp_path / "more", pooling(WIDTH, "mean"), replace(step, tensors=tensors))
    assert "'extra': (1,)" in refused(tmp_path / "more")


def cross_encoder(folder: Path, *modules: Module, **config: Any) -> Path:
    declare(folder, *modules, model_type="CrossEncoder", **config)
    write(folder / "config.json", id2label={"0": "LABEL_0"})
    return folder


SIGMOID = "torch.nn.modules.activation.Sigmoid"
IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, None),
        ({"sbert_ce_default_activation_function": SIGMOID}, "Sigmoid"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "Identity"),
        ({"sentence_transformers": {"activation_fn": SIGMOID, "version": "4.0.1"}}, "Sigmoid"),
    ],
)
def test_an_older_cross_encoder(tmp_path: Path, config: Any, activation: str | None) -> None:
    write(tmp_path / "config.json", id2label={"0": "LABEL_0"}, **config)
    tail = read_tail(tmp_path, "sequence-classification")
    assert tail == (activation and Scores(tmp_path, False, activation))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "labels", "activation"),
    [
        ({"activation_fn": SIGMOID}, 1, "Sigmoid"),
        ({"activation_fn": IDENTITY}, 1, "Identity"),
        ({}, 1, "Sigmoid"),
        ({}, 3, "Identity"),
    ],
)
def test_a_cross_encoder(tmp_path: Path, config: Any, labels: int, activation: str) -> None:
    cross_encoder(tmp_path, **config)
    write(tmp_path / "config.json", id2label={str(one): "" for one in range(labels)})
    tail = read_tail(tmp_path, "sequence-classification")
    assert isinstance(tail, Scores)
    assert tail.activation == activation
    logits = TensorEntry("logits", "float32", ("batch", str(labels)))
    (entry,) = tail.outputs((logits,))
    assert entry == replace(logits, name="logits" if activation == "Identity" else "scores")
    assert find_sentence_task(tmp_path) == "sequence-classification"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: cross_encoder(folder, Module("LogitScore")), "lists Transformer, LogitSc"),
        (
            lambda folder: cross_encoder(folder, activation_fn="torch.nn.modules.activation.Tanh"),
            "activation_fn is 'torch.nn.modules.activation.Tanh', which cannot be built; only Iden",
        ),
        (lambda folder: cross_encoder(folder, activation_fn="mine.Sigmoid"), "is 'mine.Sigmoid'"),
        (lambda folder: cross_encoder(folder, margin=1), f"'margin' {UNKNOWN}"),
        (
            lambda folder: write(
                cross_encoder(folder) / TEXT_CONFIG, transformer_task="text-generation"
            ),
            f"transformer_task is 'text-generation', {CHANGES} 'sequence-classification'",
        ),
        (
            lambda folder: write(folder / "config.json", sentence_transformers={"scale": 2}),
            f"'scale' {UNKNOWN}",
        ),
    ],
)
def test_a_cross_encoder_that_cannot_be_built(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path)
    with pytest.raises(BaseModelError) as caught:
        read_tail(tmp_path, "sequence-classification")
    assert said in str(caught.value)


def test_a_classifier_on_an_encoder_s_directory_has_no_tail(tmp_path: Path) -> None:
    """Its adapters bring the head; what is behind the encoder is of another task."""
    declare(tmp_path, pooling(WIDTH, "mean"), dense(WIDTH, 4), prompts={})
    write(tmp_path / "config.json")
    assert read_tail(tmp_path, "sequence-classification") is None
    assert read_tail(tmp_path, "feature-extraction") is None
    assert find_sentence_task(tmp_path) == "sentence-embedding"
