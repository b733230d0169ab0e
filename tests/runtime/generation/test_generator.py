"""A generator: what a call takes and refuses, and what it opens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from support.decoders import (
    EOS,
    PAD,
    VOCABULARY,
    make_prompts,
    write_family,
)
from support.home import Home
from support.manifests import edit_manifest, list_again
from support.torch_free import BLOCKED

import loraexport_runtime as lr
from loraexport.errors import exit_code
from loraexport_runtime.generation.answers import Completion
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator
from loraexport_runtime.generation.text.chat import ChatTemplates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    """Llama's, with a tokenizer. Copy it before you change a file of it."""
    return home.artifact(write_family, "Llama")


@pytest.fixture(scope="module")
def generator(artifact: Path) -> TextGenerator:
    return load_generator(artifact)


def test_one_prompt_and_no_adapter(generator: TextGenerator) -> None:
    prompt = make_prompts(6)
    assert generator.adapters == {"first": 1, "second": 2}
    alone = generator.generate(prompt, max_new_tokens=6)
    assert alone == generator.generate(prompt, adapters=[None], max_new_tokens=6)
    mixed = generator.generate(prompt * 2, adapters=["second", None], max_new_tokens=6)
    assert mixed[1] == alone[0]
    assert mixed[0].tokens != mixed[1].tokens


def test_more_rows_than_an_engine_takes_at_once(generator: TextGenerator) -> None:
    """onnxruntime-genai takes 32."""
    prompts = make_prompts(*(3 + index % 4 for index in range(35)))
    adapters = [("first", None, "second")[index % 3] for index in range(35)]
    every = generator.generate(prompts, adapters=adapters, max_new_tokens=4)
    for row in (0, 31, 32, 34):
        alone = generator.generate([prompts[row]], adapters=[adapters[row]], max_new_tokens=4)
        assert alone[0] == every[row]
    sampled = generator.generate(
        prompts, adapters=adapters, max_new_tokens=4, temperature=1, seed=3
    )
    again = generator.generate(prompts, adapters=adapters, max_new_tokens=4, temperature=1, seed=3)
    assert sampled == again


def test_max_new_tokens(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9), ["first", "second"]
    long = generator.generate(prompts, adapters=adapters, max_new_tokens=7)
    short = generator.generate(prompts, adapters=adapters, max_new_tokens=3)
    assert [one.tokens for one in short] == [one.tokens[:3] for one in long]
    assert [(len(one.tokens), one.finish_reason) for one in short] == [(3, "length")] * 2


def test_streaming_gives_the_same_tokens(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9, 5), ["first", None, "second"]
    texts = [""] * 3
    tokens: list[tuple[int, ...]] = [()] * 3
    for piece in generator.stream(prompts, adapters, max_new_tokens=6):
        texts[piece.row] += piece.text
        tokens[piece.row] += () if piece.token is None else (piece.token,)
    found = generator.generate(prompts, adapters=adapters, max_new_tokens=6)
    assert [(one.text, one.tokens) for one in found] == list(zip(texts, tokens, strict=True))


def test_sampling_with_a_seed_repeats(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9), ["first", "second"]

    def sample(seed: int | None, **options: Any) -> list[tuple[int, ...]]:
        found = generator.generate(
            prompts, adapters=adapters, max_new_tokens=10, temperature=5.0, seed=seed, **options
        )
        return [one.tokens for one in found]

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    greedy = generator.generate(prompts, adapters=adapters, max_new_tokens=10)
    assert sample(3, top_k=1) == [one.tokens for one in greedy]
    assert sample(3, top_p=1e-6) == [one.tokens for one in greedy]
    assert sample(3, top_k=0) == sample(3, top_k=0) != sample(4, top_k=0)


def test_a_stop_string_is_cut(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(5, 9), ["first", None]
    whole = generator.generate(prompts, adapters=adapters, max_new_tokens=16)
    assert all(len(one.text) > 4 for one in whole), whole
    stop = next(text for text in whole[0].text[2:] if text not in whole[1].text)
    cut = generator.generate(prompts, adapters=adapters, max_new_tokens=16, stop=[stop])
    assert cut[0].text == whole[0].text.split(stop)[0]
    assert cut[0].finish_reason == "stop"
    assert len(cut[0].tokens) < 16
    assert cut[1] == whole[1]


def test_every_token_may_stand_in_a_prompt(generator: TextGenerator) -> None:
    """None stands for padding: not the tokenizer's own, not the highest, not the one that ends."""
    prompts = [[PAD, 5, PAD], [VOCABULARY - 1], [7, EOS, 9, PAD, VOCABULARY - 1, PAD], [PAD]]
    names = ["first", None, "second", "first"]
    together = generator.greedy(prompts, names, 6)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        assert np.array_equal(generator.greedy([prompt], [name], 6)[0], together[row])
    text = generator.generate(["<pad>hello<pad>"], chat=False, max_new_tokens=2)
    assert text == generator.generate(
        [generator.tokenizer.encode("<pad>hello<pad>")], max_new_tokens=2
    )


def test_the_chat_template(generator: TextGenerator, artifact: Path) -> None:
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(artifact.parents[1] / "base")

    def run(prompt: Any, **options: Any) -> Completion:
        return generator.generate([prompt], adapters=["first"], max_new_tokens=6, **options)[0]

    messages = [{"role": "user", "content": "hello"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == "<user>hello<assistant>"
    chat, plain = run(tokenizer(written)["input_ids"]), run(tokenizer("hello")["input_ids"])
    assert chat.tokens != plain.tokens
    assert run("hello") == run(messages) == run(messages, chat=False) == chat
    assert run("hello", chat=False) == plain
    # special tokens are not shown, nor is half a character
    decoded = tokenizer.decode(plain.tokens)
    assert plain.text == decoded[: len(plain.text)]


def test_a_chat_without_a_template(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.tokenizer, "templates", ChatTemplates({}, {}))
    chat = [{"role": "user", "content": "hello"}]
    with pytest.raises(lr.InputError, match=r"prompts\[1\] is a chat, but .* no chat template"):
        generator.generate(["hello", chat], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        pytest.param(
            [[5]],
            {"adapters": ["third"]},
            lr.UnknownAdapterError,
            r"adapter 'third' is not loaded; 2 are, 2 of them in slots: see list_adapters\(\)",
            id="unknown-adapter",
        ),
        pytest.param(
            [[5], [6]],
            {"adapters": ["first"]},
            lr.InputError,
            "adapters names 1 rows, but the inputs have 2; give one name, or None for the base",
            id="too-few-adapters",
        ),
        pytest.param(
            [[5]],
            {"adapters": "first"},
            lr.InputError,
            "adapters is 'first'; expected a list with an entry for each of the 1 rows",
            id="adapters-no-list",
        ),
        pytest.param(
            [[5]],
            {"adapters": [{"first": 1.0}]},
            lr.InputError,
            "adapter is a blend, which this graph has no input for",
            id="blend",
        ),
        pytest.param([], {}, lr.InputError, "no prompt; give one at least", id="no-prompt"),
        pytest.param(
            "hello",
            {},
            lr.InputError,
            r"prompts is one text; expected a list of prompts",
            id="prompts-no-list",
        ),
        pytest.param([[5], []], {}, lr.InputError, r"prompts\[1\] has no tokens", id="no-tokens"),
        pytest.param(
            [""], {"chat": False}, lr.InputError, r"prompts\[0\] has no tokens", id="empty-text"
        ),
        pytest.param(
            ["hello"],
            {"template_arguments": {"tools": []}},
            lr.InputError,
            r"template_arguments is \{'tools': \[\]\}; expected variables of the chat template by",
            id="template-arguments",
        ),
        pytest.param(
            ["hello"],
            {"tools": ["x"]},
            lr.InputError,
            r"tools is \['x'\]; expected a list of objects",
            id="tools",
        ),
        pytest.param(
            [[5, VOCABULARY]],
            {},
            lr.InputError,
            r"prompts\[0\]\[1\] is 320; expected a token id, 0 to 319",
            id="vocabulary",
        ),
        pytest.param(
            [[5, 1.5]],
            {},
            lr.InputError,
            r"prompts\[0\]\[1\] is 1\.5; expected a token id, 0 to 319",
            id="no-token",
        ),
        pytest.param(
            [[5], None],
            {},
            lr.InputError,
            r"prompts\[1\] is None; expected a list of token ids",
            id="no-text",
        ),
        pytest.param(
            [[5], [5] * 120],
            {"max_new_tokens": 9},
            lr.InputError,
            "a prompt of 120 tokens and 9 new ones are more than the 128 that this generator",
            id="too-long",
        ),
        pytest.param(
            [[5]],
            {"max_new_tokens": 0},
            lr.InputError,
            "max_new_tokens is 0; expected a whole number from 1 on",
            id="no-new-tokens",
        ),
        pytest.param(
            [[5]],
            {"max_new_tokens": "4"},
            lr.InputError,
            "max_new_tokens is '4'; expected a whole number from 1 on",
            id="no-number",
        ),
        pytest.param(
            [[5]],
            {"seed": "x"},
            lr.InputError,
            "seed is 'x'; expected a whole number from 0 on",
            id="seed",
        ),
        pytest.param(
            [[5]],
            {"stop": 5},
            lr.InputError,
            "stop is 5; expected a list of texts, none of them empty",
            id="stop-a-number",
        ),
        pytest.param(
            [[5]],
            {"stop": "x"},
            lr.InputError,
            "stop is 'x'; expected a list of texts, none of them empty",
            id="stop-no-list",
        ),
        *(
            pytest.param([[5]], {name: value}, lr.InputError, f"{name} is ", id=f"{name}-{value}")
            for name, value in (
                ("max_new_tokens", "a"),
                ("max_new_tokens", 2.5),
                ("seed", "a"),
                ("seed", -1),
                ("template_arguments", {5: 5}),
            )
        ),
        *(
            pytest.param(prompts, {}, lr.InputError, text, id=f"prompts-{prompts!r:.20}")
            for prompts, text in (
                (5, "prompts is of type int; expected a list of prompts"),
                ({"a": 1}, "prompts is of type dict; expected a list of prompts"),
                ([5], r"prompts\[0\] is 5; expected a list of token ids"),
                ([None], r"prompts\[0\] is None; expected a list of token ids"),
                ([b"abc"], r"prompts\[0\] is b'abc'; expected a list of token ids"),
                ([{"role": "user"}], r"prompts\[0\] is .*; expected a list of token ids"),
                ([[1.5]], r"prompts\[0\]\[0\] is 1.5; expected a token id"),
                ([["5"]], r"prompts\[0\]\[0\] is '5'; expected a token id"),
                ([[True]], r"prompts\[0\]\[0\] is True; expected a token id"),
                ([np.ones((1, 2), int)], r"prompts\[0\]\[0\] is \[1, 1\]; expected a token id"),
            )
        ),
        pytest.param(
            [[5]],
            {"top_k": -1},
            lr.InputError,
            "top_k is -1; expected a whole number from 0 on",
            id="top-k",
        ),
        pytest.param(
            [[5]],
            {"temperature": float("nan")},
            lr.InputError,
            "temperature is nan; expected a number, 0 or more",
            id="temperature-nan",
        ),
        pytest.param(
            [[5]],
            {"temperature": float("inf")},
            lr.InputError,
            "temperature is inf; expected a number, 0 or more",
            id="temperature-inf",
        ),
        pytest.param(
            [[5]],
            {"top_p": float("nan")},
            lr.InputError,
            "top_p is nan; expected a number, 0 to 1",
            id="top-p-nan",
        ),
        pytest.param(
            [[5]],
            {"top_p": 0.0},
            lr.InputError,
            "top_p is 0.0; expected a number above 0, up to 1",
            id="top-p",
        ),
        pytest.param(
            [[5]],
            {"stop": [""]},
            lr.InputError,
            r"stop is \[''\]; expected a list of texts, none of them empty",
            id="stop-empty",
        ),
    ],
)
def test_a_batch_that_cannot_be_run(
    generator: TextGenerator, prompts: Any, options: dict[str, Any], error: type, message: str
) -> None:
    options = {"max_new_tokens": 4} | options
    with pytest.raises(error, match=message) as caught:
        generator.generate(prompts, **options)
    assert isinstance(caught.value, lr.BatchError)
    assert exit_code(caught.value) == 2
    with pytest.raises(error, match=message):
        next(generator.stream(prompts, **options))
    good = generator.generate([[5]], adapters=["first"], max_new_tokens=2)
    assert len(good[0].tokens) == 2


def test_the_longest_prompt(generator: TextGenerator) -> None:
    found = generator.generate([[5] * 120, [7]], adapters=["first", None], max_new_tokens=8)
    assert [len(one.tokens) for one in found] == [8, 8]


def test_a_provider_that_cannot_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(lr.ProviderError, match="npu is not part of this onnxruntime"):
        load_generator(artifact, ["npu"])
    with pytest.raises(lr.ProviderError, match="CUDA graphs were asked for on CPUExecutionProvid"):
        load_generator(artifact, cuda_graphs=True)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    load_generator(artifact, rows=1, length=16).close()  # it needs none
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(lr.ProviderError, match=r"pip install 'loraexport-runtime\[generation\]'"):
        load_generator(artifact)


def test_cuda_where_there_is_no_device(artifact: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    for cuda_graphs in (False, True):
        with pytest.raises(
            lr.ProviderError, match="CUDAExecutionProvider was asked for but cannot"
        ):
            load_generator(artifact, ["cuda"], cuda_graphs=cuda_graphs)


def test_each_kind_has_its_own_loader(artifact: Path, tenants: Path) -> None:
    with pytest.raises(
        lr.ArtifactError, match=r"its kind is 'decoder'; open it with .*load_generator\(\)"
    ):
        lr.load(artifact)
    with pytest.raises(lr.ArtifactError, match=r"its kind is 'layers'; open it with load\(\)"):
        load_generator(tenants)


def test_a_damaged_or_unproven_artifact(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    graph = copy / "generator/model.onnx.data"
    data = bytearray(graph.read_bytes())
    data[100] ^= 1
    graph.write_bytes(data)
    with pytest.raises(lr.ArtifactError, match=r"model.onnx.data: its sha256 differs"):
        load_generator(copy)
    (copy / "generator/genai_config.json").unlink()
    with pytest.raises(lr.ArtifactError, match=r"genai_config.json: listed in .* but missing"):
        load_generator(copy)

    unproven = tmp_path / "unproven"
    shutil.copytree(artifact, unproven)
    edit_manifest(unproven, lambda manifest: manifest["parity"].update(status="deferred"))
    with pytest.raises(lr.ArtifactError, match="parity is 'deferred', so its numbers are not pro"):
        load_generator(unproven)
    opened = load_generator(unproven, allow_unverified=True)
    assert len(opened.generate([[5]], max_new_tokens=2)[0].tokens) == 2


SERVICE = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
from loraexport_runtime import load_generator

generator = load_generator(sys.argv[1])
found = generator.generate(
    ["hello", "the world", "a"], adapters=["first", None, "second"], max_new_tokens=5
)
print([one.tokens for one in found])
assert not set(sys.modules) & set({BLOCKED})
"""


def test_a_service_without_torch(artifact: Path, generator: TextGenerator) -> None:
    command = [sys.executable, "-W", "error", "-c", SERVICE, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    prompts, adapters = ["hello", "the world", "a"], ["first", None, "second"]
    found = generator.generate(prompts, adapters=adapters, max_new_tokens=5)
    assert done.stdout.strip() == str([one.tokens for one in found])


@pytest.mark.parametrize(
    ("part", "key", "value", "error", "text"),
    [
        ("decoder", "num_key_value_heads", 3, lr.ArtifactError, "and head_size are 3 and 16, and"),
        ("decoder", "head_size", 8, lr.StepError, "failed in the step .* GroupQueryAttention"),
        ("decoder", "num_hidden_layers", 3, lr.ArtifactError, "is 3, and the graph has 2 of"),
        ("inputs", "input_ids", "words", lr.ArtifactError, "'words', and the graph has no"),
    ],
)
def test_a_config_of_another_graph(
    artifact: Path, tmp_path: Path, part: str, key: str, value: Any, error: type, text: str
) -> None:
    """Listed in the manifest, as a build would."""
    copy = shutil.copytree(artifact, tmp_path / "copy")
    file = copy / "generator/genai_config.json"
    config = json.loads(file.read_text())
    decoder = config["model"]["decoder"]
    (decoder if part == "decoder" else decoder[part])[key] = value
    file.write_text(json.dumps(config))
    list_again(copy, "generator")
    with pytest.raises(error, match=text), load_generator(copy) as generator:
        generator.greedy([[5, 6]], [None], 2)
