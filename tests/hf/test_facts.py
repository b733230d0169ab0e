"""What a service has to know of a model, as the base's own config files say it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.builds import write_model_project
from support.families import FAMILIES

from loraexport.errors import BaseModelError
from loraexport.hf.facts import read_facts
from loraexport.hf.skeleton import read_skeleton
from loraexport.plan.model import ModelPlan
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.kinds import Facts


def write(folder: Path, **files: Any) -> Path:
    """A directory of JSON files, by their names without the ending."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def test_nothing_is_known_of_a_directory_without_files(tmp_path: Path) -> None:
    assert read_facts(tmp_path) == Facts(None, None, None, {}, None, {}, None, None, None, None)


def test_what_every_file_says(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        config={
            "model_type": "bert",
            "max_position_embeddings": 512,
            "vocab_size": 30522,
            "type_vocab_size": 2,
            "pad_token_id": 0,
            "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
            "problem_type": "single_label_classification",
            "hidden_size": 32,
        },
        tokenizer_config={"model_max_length": 1e30},
        sentence_bert_config={"max_seq_length": 256, "do_lower_case": False},
        config_sentence_transformers={
            "prompts": {"query": "query: ", "document": ""},
            "default_prompt_name": "document",
        },
    )
    assert read_facts(folder) == Facts(
        256,
        30522,
        0,
        {"0": "NEGATIVE", "1": "POSITIVE"},
        "single_label_classification",
        {"query": "query: ", "document": ""},
        "document",
        None,
        512,
        2,
    )


@pytest.mark.parametrize(
    ("config", "tokenizer", "sentences", "expected"),
    [
        ({"max_position_embeddings": 512}, {}, {}, 512),
        ({"n_positions": 1024}, {}, {}, 1024),
        ({"max_position_embeddings": 512}, {"model_max_length": 128}, {}, 128),
        ({"max_position_embeddings": 512}, {"model_max_length": 1e30}, {}, 512),
        ({"max_position_embeddings": 512}, {}, {"max_seq_length": 384}, 384),
        ({"max_position_embeddings": 512}, {}, {"max_seq_length": None}, 512),
        ({}, {"model_max_length": 77.0}, {}, 77),
        ({}, {"model_max_length": 1e30}, {}, None),
        ({"max_position_embeddings": 64}, {}, {"tokenizer_args": {"model_max_length": 32}}, 32),
        ({"max_position_embeddings": 64}, {}, {"processor_kwargs": {"model_max_length": 16}}, 16),
        # Positions 0 and 1 are of no token, up to the padding's own.
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, {}, 512),
        ({"model_type": "bert", "max_position_embeddings": 514, "pad_token_id": 1}, {}, {}, 514),
    ],
)
def test_the_longest_text(
    config: Any, tokenizer: Any, sentences: Any, expected: int | None, tmp_path: Path
) -> None:
    files = {"tokenizer_config": tokenizer, "sentence_bert_config": sentences}
    assert read_facts(write(tmp_path, config=config, **files)).max_length == expected


_WITHOUT_TABLE = ("ViT", "T5 (encoder)", "OPT", "wav2vec 2.0")
"""Families of no texts, and those whose tables are no plain look-up."""


@pytest.mark.parametrize(
    "family",
    [
        name
        for name in FAMILIES
        if name not in _WITHOUT_TABLE and not name.endswith(("(vision)", "(audio)", "r (encoder)"))
    ],
)
def test_positions_are_known_where_a_model_has_a_table(family: str, tmp_path: Path) -> None:
    """Of each family: the rows of its table, but for those that no token has."""
    config = FAMILIES[family].config()
    config.save_pretrained(tmp_path)
    skeleton = read_skeleton(tmp_path, FAMILIES[family].tasks[0], "float32")
    names = ("position_embeddings", "position_embedding", "wpe")
    tables = [
        shape.in_features
        for site, shape in skeleton.sites.items()
        if shape.kind == "embedding" and site.rpartition(".")[2] in names
    ]
    begins = FAMILIES[family].notes == "positions from the padding id"
    begins |= family in ("MPNet", "LayoutLMv3")
    expected = [rows - (config.pad_token_id + 1 if begins else 0) for rows in tables]
    positions = read_facts(tmp_path, part=skeleton.part).positions
    assert expected == ([] if positions is None else [positions])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "llama", "max_position_embeddings": 512}, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 1}, None),
        ({"model_type": "deberta-v2", "max_position_embeddings": 512}, 512),
        (
            {
                "model_type": "deberta-v2",
                "max_position_embeddings": 512,
                "position_biased_input": False,
            },
            None,
        ),
        ({"model_type": "bert"}, None),
    ],
)
def test_the_table_of_positions(config: Any, expected: int | None, tmp_path: Path) -> None:
    """Shorter texts than it allows may be advised; longer ones cannot be computed."""
    tokenizer = {"model_max_length": 16}
    facts = read_facts(write(tmp_path, config=config, tokenizer_config=tokenizer))
    assert facts.positions == expected


def test_the_vocabulary_of_a_model_within_a_model(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 70}}
    assert read_facts(write(tmp_path, config=config)).vocab_size == 70


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"config": "{"}, r"config\.json: not JSON: .*; copy or download it again"),
        (
            {"config": [1]},
            r"config\.json: expected an object, got a list; copy or download it again",
        ),
        (
            {"config": {"vocab_size": "30522"}},
            r"config\.json: vocab_size: expected an integer, got '30522'; correct it",
        ),
        ({"config": {"pad_token_id": True}}, "pad_token_id: expected an integer, got True"),
        ({"config": {"vocab_size": 1.5}}, r"vocab_size: expected an integer, got 1\.5"),
        ({"config": {"id2label": ["a", "b"]}}, r"id2label: expected an object, got \['a', 'b'\]"),
        ({"config": {"id2label": {"0": 0}}}, "id2label: expected texts, got 0"),
        ({"config": {"id2label": {"0": None}}}, "id2label: expected texts, got None"),
        (
            {"config": {"problem_type": "guess"}},
            "problem_type is 'guess'; expected one of regression, single_label_classification,",
        ),
        (
            {"config_sentence_transformers": {"default_prompt_name": "query"}},
            "default_prompt_name is 'query', but prompts has none; correct one of them",
        ),
        (
            {"config_sentence_transformers": {"prompts": {"query": 1}}},
            r"config_sentence_transformers\.json: prompts: expected texts, got 1",
        ),
        ({"tokenizer_config": {"model_max_length": "512"}}, "model_max_length: expected an int"),
    ],
)
def test_a_value_of_another_type_is_refused(files: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=text):
        read_facts(write(tmp_path, **files))


def test_a_plan_has_those_of_its_base(tmp_path: Path) -> None:
    spec = write_model_project(tmp_path)
    write(tmp_path / "bert", tokenizer_config={"model_max_length": 24})
    kind = make_plan(read_spec(spec), tmp_path).kind
    assert isinstance(kind, ModelPlan)
    config = json.loads((tmp_path / "bert/config.json").read_text(encoding="utf-8"))
    assert kind.facts.vocab_size == config["vocab_size"]
    assert kind.facts.max_length == 24 < config["max_position_embeddings"]
    write(tmp_path / "bert", tokenizer_config={"model_max_length": "24"})
    with pytest.raises(BaseModelError, match="model_max_length: expected an integer"):
        make_plan(read_spec(spec), tmp_path)
