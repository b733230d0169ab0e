"""tokenizer.json in an artifact of texts: copied, made of a vocabulary, or said to be missing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from support.builds import write_model_project, write_vit_project
from tokenizers import Tokenizer

import loraexport
from loraexport.cli.app import main
from loraexport.hf.tokenizer import write_tokenizer
from loraexport.pipeline.files import text_note
from loraexport.spec.reader import read_spec
from loraexport_runtime import ModelSession, load
from loraexport_runtime.contract.manifest import Manifest

TEXTS = ("hello world", "Hello, the ADAPTERS of a batch!", "naïve 日本", "")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "the", "adapter", "##s"]


def write_vocabulary(folder: Path, lower: bool = True) -> None:
    """BERT's vocab.txt, as checkpoints of before tokenizer.json have it."""
    letters = [*"abcdefghijklmnop", ",", "!"]
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *letters]) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_becomes_one_file(tmp_path: Path, lower: bool) -> None:
    write_model_project(tmp_path)
    write_vocabulary(tmp_path / "bert", lower)
    assert write_tokenizer(tmp_path / "bert", tmp_path / "out/tokenizer.json") is None
    made = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    plain: Any = tf.AutoTokenizer.from_pretrained(tmp_path / "bert")
    for text in TEXTS:
        assert made.encode(text).ids == plain(text)["input_ids"]
    hello = WORDS.index("hello")
    assert (hello in made.encode("HELLO").ids) == lower


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    """vocab.json and merges.txt, which GPT-2 and its kin have."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "he", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    tf.GPT2Config(vocab_size=len(vocabulary)).save_pretrained(tmp_path)
    assert write_tokenizer(tmp_path, tmp_path / "tokenizer.json") is None
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.encode("he").ids == [vocabulary["he"]]
    assert made.decode(made.encode("naïve 日本").ids) == "naïve 日本"


def test_what_cannot_be_made_is_said_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file = tmp_path / "bert", tmp_path / "out/tokenizer.json"
    write_model_project(tmp_path)
    assert "has neither tokenizer.json nor a vocabulary" in str(write_tokenizer(base, file))
    (base / "merges.txt").write_text("#version: 0.2\n")  # of another kind than the model's
    assert "finds no vocabulary for a BertTokenizer" in str(write_tokenizer(base, file))
    (base / "merges.txt").unlink()
    (base / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the vocabulary of" in str(write_tokenizer(base, file))
    write_vocabulary(base)

    class Shifted(tf.BertTokenizer):
        def __call__(self, text: str) -> Any:
            return {"input_ids": [7, *super().__call__(text)["input_ids"]]}

    read = tf.BertTokenizer.from_pretrained(base).backend_tokenizer
    shifted = Shifted.from_pretrained(base)
    assert shifted.backend_tokenizer.to_str() == read.to_str()
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda folder, **options: shifted)
    assert "otherwise than its own tokenizer.json does" in str(write_tokenizer(base, file))
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda folder, **options: object())
    assert "has no fast form in transformers" in str(write_tokenizer(base, file))
    assert not file.exists()


def test_an_artifact_of_texts_has_one_or_says_that_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["loraexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        return capsys.readouterr().err

    spec = write_model_project(tmp_path)
    said = run("build", spec, "--out", tmp_path / "without")
    assert re.search(": no tokenizer.json: .* has neither tokenizer.json nor a vocabulary", said)
    without = tmp_path / "without" / read_spec(spec).name
    assert not (without / "tokenizer").exists()
    note = "note: it has no tokenizer/tokenizer.json: it takes token ids and cannot take text."
    assert note in said
    assert note in run("inspect", without)

    stages: list[str] = []
    write_vocabulary(tmp_path / "bert")
    folder = loraexport.build(spec, tmp_path / "with", stages.append).folder
    assert run("inspect", folder) == ""
    assert stages[-4] == "write tokenizer.json"  # before the export, so that it fails early
    names = {file.name for file in (folder / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "vocab.txt", "tokenizer_config.json"}
    assert text_note(Manifest.read(folder)) is None
    session = load(folder)
    assert isinstance(session, ModelSession)
    encoded = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")).encode("hello world")
    feeds = {"input_ids": encoded.ids, "attention_mask": encoded.attention_mask}
    feeds["token_type_ids"] = encoded.type_ids
    out = session.run({name: np.array([ids], np.int64) for name, ids in feeds.items()}, ["sql"])
    assert out["last_hidden_state"].shape == (1, len(encoded.ids), 32)


def test_one_that_the_base_has_is_copied_as_it_is(tmp_path: Path) -> None:
    spec = write_model_project(tmp_path)
    write_vocabulary(tmp_path / "bert")
    assert write_tokenizer(tmp_path / "bert", tmp_path / "bert/tokenizer.json") is None
    stages: list[str] = []
    folder = loraexport.build(spec, tmp_path / "out", stages.append).folder
    assert not [stage for stage in stages if "tokenizer" in stage]
    source = (tmp_path / "bert/tokenizer.json").read_bytes()
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == source


def test_images_have_no_words(tmp_path: Path) -> None:
    stages: list[str] = []
    folder = loraexport.build(write_vit_project(tmp_path), tmp_path / "out", stages.append).folder
    assert text_note(Manifest.read(folder)) is None
    assert not [stage for stage in stages if "tokenizer" in stage]
    shutil.rmtree(folder)
