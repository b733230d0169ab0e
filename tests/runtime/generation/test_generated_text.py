"""Texts through a generator: special tokens, chats with tools, stop strings, and the defaults."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.decoders import CONTEXT, CPU, EOS, write_family
from support.home import Home
from support.manifests import edit_manifest
from tokenizers import Tokenizer, processors

import loraexport_runtime as lr
from loraexport_runtime.contract.files import digest_file
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.handle import GenerationHandle
from loraexport_runtime.generation.request import GenerationRequest

BOS = 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    "{% for d in documents or [] %}({{ d.title }}){% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}!{% endif %}"
    "{% endif %}"
)
Change = Callable[..., Path]


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    """Llama's, with a tokenizer. Copy it before you change a file of it."""
    return home.artifact(write_family, "Llama")


@pytest.fixture
def changed(artifact: Path, tmp_path: Path) -> Change:
    """A copy of the artifact with other files in its generator's folder, as if built so."""

    def change(**files: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(artifact, copy)
        for name, content in files.items():
            path = {"template": "chat_template.jinja"}.get(name, f"{name}.json")
            file = copy / "generator" / path
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        entries = {
            file.relative_to(copy).as_posix(): {
                "sha256": digest_file(file),
                "size": file.stat().st_size,
            }
            for file in (copy / "generator").rglob("*")
            if file.is_file()
        }
        edit_manifest(copy, lambda manifest: manifest["files"].update(entries))
        return copy

    return change


def _with_bos(artifact: Path) -> str:
    tokenizer = Tokenizer.from_file(str(artifact / "generator/tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    text: str = tokenizer.to_str()
    return text


def _prompts_of(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Grows with every prompt that the engine reads."""
    read: list[list[int]] = []
    submit = generator.engine.submit_all

    def note(requests: Sequence[GenerationRequest]) -> list[GenerationHandle]:
        read.extend(list(request.tokens) for request in requests)
        return submit(requests)

    monkeypatch.setattr(generator.engine, "submit_all", note)
    return read


def test_texts_begin_with_the_tokenizers_own_tokens_and_chats_once(
    artifact: Path, changed: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = lr.load_generator(changed(tokenizer=_with_bos(artifact), template=TEMPLATE))
    read = _prompts_of(generator, monkeypatch)
    chat = [{"role": "user", "content": "hello"}]
    prompts: list[Any] = ["hello", chat]
    generator.generate(prompts, max_new_tokens=1)
    generator.generate(prompts[:1], chat=False, max_new_tokens=1)
    assert read[0] == read[1]
    assert read[0].count(BOS) == read[2].count(BOS) == 1
    assert read[0][0] == read[2][0] == BOS
    assert generator.tokenizer.decode(read[0]) == "<user>hello<assistant>"
    assert generator.tokenizer.decode(read[2]) == "hello"
    generator.close()


def test_what_else_a_template_takes(changed: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    with lr.load_generator(changed(template=TEMPLATE)) as generator:
        read = _prompts_of(generator, monkeypatch)
        generator.generate(
            ["x"],
            max_new_tokens=1,
            tools=[{"name": "f"}],
            documents=[{"title": "T"}],
            template_arguments={"enable_thinking": False, "bos_token": "<pad>"},
        )
        assert read[0][0] == 0
        assert generator.tokenizer.decode(read[0]) == '<user>x[{"name": "f"}](T)<assistant>!'
        list(generator.stream(["x"], max_new_tokens=1, tools=[{"name": "g"}]))
        assert generator.tokenizer.decode(read[1]) == '<user>x[{"name": "g"}]<assistant>'


def test_a_template_without_end_ends_the_call_alone(changed: Change) -> None:
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with lr.load_generator(changed(template=loops)) as generator:
        with pytest.raises(lr.ChatTemplateError, match="past its bounds: more than 1,000,000"):
            generator.generate(["hello"], max_new_tokens=1)
        assert generator.generate(["hello"], chat=False, max_new_tokens=1)


def _parts(generator: TextGenerator, **options: Any) -> tuple[list[str], str | None]:
    pieces = list(generator.stream([[5, 9, 17]], max_new_tokens=24, **options))
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert None not in [piece.token for piece in pieces[:-1]]
    assert pieces[-1].token is None
    return [piece.text for piece in pieces], pieces[-1].finish_reason


def test_a_stream_holds_a_stop_string_back(artifact: Path) -> None:
    with lr.load_generator(artifact) as generator:
        whole = generator.generate([[5, 9, 17]], max_new_tokens=24)[0]
        decoded = generator.tokenizer.decode(whole.tokens)
        assert whole.text == decoded
        for start in range(0, len(decoded) - 3, 2):
            stop = decoded[start : start + 3]
            wanted = decoded[: decoded.index(stop)]
            parts, reason = _parts(generator, stop=[stop])
            assert "".join(parts) == wanted
            assert reason == "stop"
            completion = generator.generate([[5, 9, 17]], max_new_tokens=24, stop=[stop])[0]
            assert (completion.text, completion.finish_reason) == (wanted, "stop")
            assert len(completion.tokens) == len(parts) - 1
        # held back to the end, and then given
        assert _parts(generator, stop=[decoded + "!"]) == ([""] * 24 + [decoded], "length")


def test_what_was_held_back_comes_with_the_end(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lr.load_generator(artifact) as generator:
        tokens = generator.generate([[5, 9, 17]], max_new_tokens=24)[0].tokens
        last = next(token for token in tokens[3:] if token not in tokens[:3])
        count = tokens.index(last)
        monkeypatch.setattr(generator.engine, "ends", frozenset({last}))
        decoded = generator.tokenizer.decode(tokens[:count])
        assert _parts(generator, stop=[decoded + "!"]) == ([""] * count + [decoded], "stop")
        completion = generator.generate([[5, 9, 17]], max_new_tokens=24)[0]
        assert completion == lr.Completion(decoded, tokens[:count], "stop")


def test_the_config_is_what_a_call_does_not_say(changed: Change) -> None:
    config = {"do_sample": True, "temperature": 5.0, "top_k": 9, "max_new_tokens": 7}
    config |= {"stop_strings": "@@", "eos_token_id": [2, 3], "transformers_version": "5"}
    with lr.load_generator(changed(generation_config=config)) as generator:
        assert generator.defaults == lr.GenerationDefaults(
            temperature=5.0, top_k=9, max_new_tokens=7, stop=("@@",), ends=(EOS,)
        )
        prompt = [[5, 9, 17]]
        said = generator.generate(prompt, max_new_tokens=7, temperature=5.0, top_k=9, seed=1)
        assert generator.generate(prompt, seed=1) == said
        assert said[0].finish_reason == "length"
        greedy = generator.generate(prompt, temperature=0.0)
        assert len(greedy[0].tokens) == 7
        assert greedy[0].tokens == tuple(generator.greedy(prompt, [None], 7)[0])
        assert generator.generate(prompt, top_k=1) == greedy != said
        letter = greedy[0].text[2]
        assert generator.generate(prompt, temperature=0.0, stop=[letter])[0].finish_reason == "stop"


def test_penalties_and_least_lengths_of_the_config(changed: Change) -> None:
    """They are computed; a call overrides them."""
    config = {"repetition_penalty": 1.3, "min_length": 9, "max_new_tokens": 12}
    with lr.load_generator(changed(generation_config=config)) as generator:
        prompt = [5, 9, 17]
        found = generator.generate([prompt])[0].tokens
        plain = generator.generate([prompt], repetition_penalty=1.0, min_new_tokens=0)[0].tokens
        assert found == generator.generate([prompt], repetition_penalty=1.3)[0].tokens != plain
        assert plain == tuple(generator.greedy([prompt], [None], 12)[0])[: len(plain)]
        generator.engine.ends = frozenset({found[2]})
        assert len(generator.generate([prompt])[0].tokens) >= 6
        assert len(generator.generate([prompt], min_new_tokens=0)[0].tokens) < 6


def test_tokens_that_the_config_forbids(changed: Change) -> None:
    config = {"no_repeat_ngram_size": 1, "suppress_tokens": [5], "max_new_tokens": 12}
    with lr.load_generator(changed(generation_config=config)) as generator:
        found = generator.generate([[9, 17]])[0].tokens
        assert len({*found, 9, 17, 5}) == len(found) + 3
        free = generator.generate([[9, 17]], no_repeat_ngram_size=0, suppress_tokens=[])[0].tokens
        assert free == tuple(generator.greedy([[9, 17]], [None], 12)[0])[: len(free)] != found


def test_a_length_of_prompt_and_answer_together(changed: Change) -> None:
    with lr.load_generator(changed(generation_config={"max_length": 10})) as generator:
        found = generator.generate([[5] * 3, [5] * 9])
        assert [len(one.tokens) for one in found] == [7, 1]
        assert [one.finish_reason for one in found] == ["length"] * 2
        assert len(generator.generate([[5] * 12], max_new_tokens=3)[0].tokens) == 3
        with pytest.raises(lr.InputError, match=r"prompts\[0\] has 10 tokens, and generation_con"):
            generator.generate([[5] * 10])
        with pytest.raises(lr.InputError, match=f"more than the {CONTEXT} that this"):
            generator.greedy([[5] * CONTEXT], [None], 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config": {"num_beams": 4}}, "num_beams is 4, which changes the tokens"),
        ({"generation_config": []}, "expected an object; build the artifact again"),
        ({"generation_config": "{"}, "generation_config.json: not JSON"),
        ({"tokenizer_config": []}, "tokenizer_config.json: expected an object"),
        ({"tokenizer": {}}, "tokenizer.json: no tokenizer that the tokenizers library reads"),
        ({"template": "\x00" * (2**20 + 1)}, "chat_template.jinja: more than 1024 KiB, which no"),
    ],
)
def test_files_that_are_damaged_at_the_build(
    changed: Change, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(lr.ArtifactError, match=message):
        lr.load_generator(changed(**files))


def test_a_file_that_changed_since_the_manifest_is_not_read(artifact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Decoder)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        copy = tmp_path / name
        shutil.copytree(artifact, copy)
        file = copy / "generator" / name
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b" ")
        with pytest.raises(lr.ArtifactError, match=f"{name}: its digest differs from the manifes"):
            TextGenerator(copy, manifest, manifest.kind, CPU)  # past load_generator's own look
