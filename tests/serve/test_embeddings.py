"""Vectors by OpenAI's own client are those of the runtime, each with its adapter."""

from pathlib import Path

import numpy as np
import openai
import pytest
from support.serving import ALL, PROMPTS, Server, error
from tokenizers import Tokenizer

from loraexport_runtime import load_model

TEXTS = ["hello world", "the adapter 's batch", "don't stop ."]


def vectors(artifact: Path, texts: list[str], adapter: str | None) -> np.ndarray:
    """What the runtime gives for each text alone."""
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer/tokenizer.json"))
    rows = []
    with load_model(artifact) as session:
        for text in texts:
            encoding = tokenizer.encode(text)
            inputs = {
                "input_ids": np.array([encoding.ids]),
                "attention_mask": np.ones((1, len(encoding.ids)), np.int64),
                "token_type_ids": np.array([encoding.type_ids]),
            }
            rows.append(session.run(inputs, [adapter])["sentence_embedding"][0])
    return np.stack(rows)


@pytest.mark.parametrize(
    ("model", "adapter"), [("tiny", None), ("sql", "sql"), ("tiny:chat", "chat")]
)
def test_the_openai_client(client: openai.OpenAI, encoder: Path, model: str, adapter: str) -> None:
    """It asks for base64 by itself."""
    answer = client.embeddings.create(model=model, input=TEXTS)
    got = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(got, vectors(encoder, TEXTS, adapter), rtol=0, atol=2e-6)
    assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.model == model
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
    floats = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
    np.testing.assert_array_equal(np.array([one.embedding for one in floats.data]), got)


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    for name in ("nobody", "tiny:nobody", "other:sql"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.embeddings.create(model=name, input="hello")
        assert caught.value.code == "model_not_found"


def test_adapters_differ(client: openai.OpenAI) -> None:
    """Three at once in one batch are no proof if all of them give the same."""
    rows = [
        client.embeddings.create(model=name, input="hello world").data[0].embedding
        for name in ("tiny", "sql", "chat")
    ]
    assert np.abs(np.diff(np.array(rows), axis=0)).max() > 1e-4


def test_what_langchain_sends(client: openai.OpenAI, encoder: Path) -> None:
    """OpenAIEmbeddings' requests: by default ids of tiktoken's cl100k_base, which are another's.

    With check_embedding_ctx_length=False it sends the texts.
    """
    with pytest.raises(openai.BadRequestError) as caught:  # hello world
        client.embeddings.create(model="sql", input=[[15339, 1917]])
    assert "token 15339; expected 0 to 149" in caught.value.message
    answer = client.embeddings.create(model="sql", input=TEXTS)
    got = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(got, vectors(encoder, TEXTS, "sql"), rtol=0, atol=2e-6)


def test_token_ids(server: Server, encoder: Path) -> None:
    """As they are: with the tokens around a text they give what the text gives."""
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer/tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    several = server.post("/v1/embeddings", model="sql", input=ids).json()
    one = server.post("/v1/embeddings", model="sql", input=ids[0]).json()
    by_text = server.post("/v1/embeddings", model="sql", input=TEXTS).json()
    got = [np.array([row["embedding"] for row in body["data"]]) for body in (several, by_text)]
    np.testing.assert_allclose(*got, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[0][:1], [one["data"][0]["embedding"]], rtol=0, atol=2e-6)
    assert several["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_prompts(server: Server, encoder: Path) -> None:
    """A name or a kind of input stands for a text ahead of each; none is taken by itself."""
    bare, named, kind = (
        server.post("/v1/embeddings", input="world", **more).json()["data"][0]["embedding"]
        for more in ({}, {"prompt_name": "query"}, {"input_type": "search_document"})
    )
    expected = [f"{PROMPTS['query']}world", f"{PROMPTS['document']}world", "world"]
    for got, text in zip((named, kind, bare), expected, strict=True):
        np.testing.assert_allclose([got], vectors(encoder, [text], None), rtol=0, atol=2e-6)


def test_dimensions_are_those_of_the_settings(many: Server) -> None:
    whole, short = (
        many.post("/v1/embeddings", key=ALL, model="tiny", input="hello", **more).json()
        for more in ({}, {"dimensions": 8})
    )
    vector = np.array(whole["data"][0]["embedding"][:8])
    expected = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(short["data"][0]["embedding"], expected, rtol=0, atol=1e-6)
    for size in (9, 0, -1, 64):
        refused = many.post("/v1/embeddings", key=ALL, model="tiny", input="a", dimensions=size)
        assert error(refused) == (400, "unsupported_parameter")
        assert "8, 16, 32" in refused.json()["error"]["message"]


def test_a_long_text_is_refused_or_cut_as_asked(server: Server, encoder: Path) -> None:
    text = "hello " * 100
    refused = server.post("/v1/embeddings", input=["a", text])
    assert error(refused) == (400, "context_length_exceeded")
    assert "input[1] has 102 tokens" in refused.json()["error"]["message"]
    for cut, kept in ((-1, 64), (10, 10)):
        answer = server.post("/v1/embeddings", input=text, truncate_prompt_tokens=cut).json()
        assert answer["usage"]["prompt_tokens"] == kept
        own = vectors(encoder, ["hello " * (kept - 2)], None)
        got = [answer["data"][0]["embedding"]]
        np.testing.assert_allclose(got, own, rtol=0, atol=2e-6)
    for cut in (0, -2, 65, 2):
        refused = server.post("/v1/embeddings", input=text, truncate_prompt_tokens=cut)
        assert error(refused)[0] == 400


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": []}, 400, "input is empty"),
        ({"input": [[]]}, 400, "input[0] has no tokens"),
        ({"input": [1, "a"]}, 400, "mixes"),
        ({"input": ["a", 1]}, 400, "mixes"),
        ({"input": [[1], 2]}, 400, "mixes"),
        ({"input": [150]}, 400, "token 150; expected 0 to 149"),
        ({"input": [-1]}, 400, "token -1"),
        ({"input": None}, 400, "got `null`"),
        ({}, 400, "missing required field `input`"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "a", "prompt_name": "nobody"}, 400, "query, document"),
        ({"input": "a", "input_type": "image"}, 400, "query, document"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, 400, "both"),
        ({"input": [1], "prompt_name": "query"}, 400, "token ids"),
        ({"input": "a", "best_of": 2}, 400, "best_of is not supported"),
        ({"input": "a", "adapters": {}}, 400, "adapters is empty"),
        ({"input": "a", "adapters": {"sql": 0.5}}, 400, "blend"),
        ({"input": "a", "adapters": {"nobody": 0.5}}, 404, "nobody"),
        ({"input": "a", "model": "sql", "adapters": {"sql": 1.0}}, 400, "names an artifact"),
        ({"input": "a", "model": ""}, 400, "model"),
        ({"input": ["a"] * 2049}, 413, "2049 items"),
    ],
)
def test_what_is_refused(server: Server, body: dict[str, object], status: int, words: str) -> None:
    refused = server.post("/v1/embeddings", **body)  # type: ignore[arg-type]
    assert error(refused)[0] == status
    message = refused.json()["error"]
    assert words.lower() in f"{message['message']} {message['param']}".lower()
