"""Ranks, scores, classes and tags are the runtime's outputs behind the right activation."""

from pathlib import Path

import numpy as np
import pytest
from support.home import Home
from support.serving import ALL, Server, error, write_encoder
from tokenizers import Tokenizer

from loraexport_runtime import load_model

QUERY = "hello world"
DOCUMENTS = ["the adapter", "hello world , hello", "don't stop"]
TASKS = {"classes": ("sequence-classification", 3), "pairs": ("sequence-classification", 1)}


def outputs(home: Home, name: str, texts: list[object], adapter: str | None) -> list[np.ndarray]:
    """The runtime's logits of each text or pair alone, float64."""
    task, labels = {"tags": ("token-classification", 4), **TASKS}[name]
    artifact: Path = home.artifact(write_encoder, task=task, labels=labels)
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer/tokenizer.json"))
    found = []
    with load_model(artifact) as session:
        for text in texts:
            encoding = tokenizer.encode(*(text if isinstance(text, tuple) else (text,)))
            inputs = {
                "input_ids": np.array([encoding.ids]),
                "attention_mask": np.ones((1, len(encoding.ids)), np.int64),
                "token_type_ids": np.array([encoding.type_ids]),
            }
            found.append(session.run(inputs, [adapter])["logits"][0].astype(np.float64))
    return found


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank_by_a_cross_encoder(many: Server, home: Home, path: str) -> None:
    """As Jina's and Cohere's clients ask; documents may be objects."""
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]
    body = {"model": "pairs:sql", "query": QUERY, "documents": documents}
    answer = many.post(path, key=ALL, **body).json()
    pairs: list[object] = [(QUERY, text) for text in DOCUMENTS]
    logits = np.array(outputs(home, "pairs", pairs, "sql"))[:, 0]
    scores = 1 / (1 + np.exp(-logits))
    order = np.argsort(-scores)
    assert [one["index"] for one in answer["results"]] == order.tolist()
    got = [one["relevance_score"] for one in answer["results"]]
    np.testing.assert_allclose(got, scores[order], rtol=0, atol=2e-6)
    assert [one["document"]["text"] for one in answer["results"]] == [DOCUMENTS[i] for i in order]
    assert answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] > 15
    two = many.post(path, key=ALL, **body, top_n=2, return_documents=False).json()
    assert two["results"] == [
        {"index": one["index"], "relevance_score": one["relevance_score"]}
        for one in answer["results"][:2]
    ]
    raw = many.post(path, key=ALL, **body, use_activation=False).json()
    got = [one["relevance_score"] for one in raw["results"]]
    np.testing.assert_allclose(got, logits[order], rtol=0, atol=1e-5)


def test_score_by_a_cross_encoder(many: Server, home: Home) -> None:
    pairs: list[object] = [(QUERY, text) for text in DOCUMENTS]
    expected = 1 / (1 + np.exp(-np.array(outputs(home, "pairs", pairs, None))[:, 0]))
    for first in (QUERY, [QUERY], [QUERY] * 3):
        body = {"model": "pairs", "text_1": first, "text_2": DOCUMENTS}
        answer = many.post("/v1/score", key=ALL, **body).json()
        got = [one["score"] for one in answer["data"]]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    refused = many.post("/score", key=ALL, model="pairs", text_1=["a", "b"], text_2=["a"])
    assert error(refused) == (400, "invalid_request")


def test_pairs_are_cut_as_transformers_cuts(many: Server) -> None:
    long = "hello " * 60
    body = {"model": "pairs", "query": long, "documents": [long]}
    assert error(many.post("/rerank", key=ALL, **body)) == (400, "context_length_exceeded")
    cut = many.post("/rerank", key=ALL, **body, truncate_prompt_tokens=-1).json()
    assert cut["usage"]["total_tokens"] == 64
    # 61 tokens between the three special ones: 30 and 31, and of a short one what it has.
    ends = {"query": "hello " * 31, "documents": ["hello " * 30]}
    same = many.post("/rerank", key=ALL, **{**body, **ends}).json()
    scores = [one["results"][0]["relevance_score"] for one in (cut, same)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-6)
    less = many.post("/rerank", key=ALL, **{**body, "query": "hello"}, max_tokens_per_doc=7).json()
    assert less["usage"]["total_tokens"] == 1 + 7 + 3


def test_scores_of_vectors_are_cosines(server: Server) -> None:
    texts = [QUERY, *DOCUMENTS]
    rows = server.post("/v1/embeddings", model="sql", input=texts).json()["data"]
    vectors = np.array([row["embedding"] for row in rows])
    expected = vectors[1:] @ vectors[0]
    answer = server.post("/v1/score", model="sql", text_1=QUERY, text_2=DOCUMENTS).json()
    got = [one["score"] for one in answer["data"]]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    ranked = server.post("/rerank", model="sql", query=QUERY, documents=DOCUMENTS).json()
    assert [one["index"] for one in ranked["results"]] == np.argsort(-expected).tolist()
    refused = server.post("/rerank", model="sql", query="a", documents=["b"], use_activation=True)
    assert error(refused) == (400, "unsupported_parameter")


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classes_of_texts(many: Server, home: Home, path: str) -> None:
    answer = many.post(path, key=ALL, model="classes:chat", input=DOCUMENTS).json()
    expected = [softmax(row) for row in outputs(home, "classes", [*DOCUMENTS], "chat")]
    for index, (row, probs) in enumerate(zip(answer["data"], expected, strict=True)):
        np.testing.assert_allclose(row.pop("probs"), probs, rtol=0, atol=2e-6)
        assert row == {"index": index, "label": f"L{probs.argmax()}", "num_classes": 3}
    logits = many.post(path, key=ALL, model="classes", input="hello", use_activation=False).json()
    raw = outputs(home, "classes", ["hello"], None)
    np.testing.assert_allclose([logits["data"][0]["probs"]], raw, rtol=0, atol=1e-5)


def test_classes_of_tokens(many: Server, home: Home) -> None:
    text = DOCUMENTS[1]
    (expected,) = outputs(home, "tags", [text], "sql")
    probs = softmax(expected)
    (row,) = many.post("/classify", key=ALL, model="tags:sql", input=text).json()["data"]
    got = np.array([token["probs"] for token in row["tokens"]])
    np.testing.assert_allclose(got, probs, rtol=0, atol=2e-6)
    assert [token["label"] for token in row["tokens"]] == [f"L{i}" for i in probs.argmax(-1)]
    parts = [text[token["start"] : token["end"]] for token in row["tokens"]]
    assert "".join(parts) == text.replace(" ", "")
    (pooled,) = many.post("/pooling", key=ALL, model="tags:sql", input=text).json()["data"]
    np.testing.assert_allclose(pooled["data"], probs, rtol=0, atol=2e-6)


def test_pooling_of_texts(many: Server) -> None:
    texts = DOCUMENTS[:2]
    pooled = many.post("/pooling", key=ALL, model="tiny", input=texts, task="embed").json()
    vectors = many.post("/v1/embeddings", key=ALL, model="tiny", input=texts).json()
    got = [row["data"] for row in pooled["data"]]
    expected = [row["embedding"] for row in vectors["data"]]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    classes = many.post("/pooling", key=ALL, model="classes", input="a").json()["data"]
    assert sum(classes[0]["data"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/classify", {"model": "tiny", "input": "a"}),
        ("/classify", {"model": "llama", "input": "a"}),
        ("/classify", {"model": "classes", "input": []}),
        ("/v1/embeddings", {"model": "classes", "input": "a"}),
        ("/rerank", {"model": "classes", "query": "a", "documents": ["b"]}),
        ("/rerank", {"model": "tags", "query": "a", "documents": ["b"]}),
        ("/rerank", {"model": "pairs", "query": "a", "documents": ["b"], "top_n": -1}),
        ("/rerank", {"model": "pairs", "query": "a", "documents": []}),
        ("/rerank", {"model": "pairs", "query": "a", "documents": ["b"], "max_tokens_per_doc": 0}),
        ("/pooling", {"model": "tiny", "input": "a", "task": "classify"}),
        ("/pooling", {"model": "tiny", "input": "a", "use_activation": True}),
        ("/v1/score", {"model": "pairs", "text_1": "a"}),
    ],
)
def test_what_no_model_gives_is_400(many: Server, path: str, body: dict[str, object]) -> None:
    assert error(many.post(path, key=ALL, **body))[0] == 400  # type: ignore[arg-type]


def test_too_many_documents_are_413(many: Server) -> None:
    body = {"model": "pairs", "query": "a", "documents": ["b"] * 5}
    assert error(many.post("/rerank", key=ALL, **body)) == (413, "batch_too_large")
