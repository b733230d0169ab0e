"""Which models and adapters a key sees, tokens of both kinds of models, and who is refused."""

import openai
import pytest
from support.serving import ADMIN, ALL, RESTRICTED, Server, bearer, error


def ids(server: Server, key: str) -> set[str]:
    return {card["id"] for card in server.get("/v1/models", key=key).json()["data"]}


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert {"tiny", "sql", "chat"} <= set(cards)
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_cards_are_vllms_without_paths(server: Server) -> None:
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    base, adapter = cards["tiny"], cards["sql"]
    assert (base["root"], base["parent"], base["max_model_len"]) == ("tiny", None, 64)
    assert (adapter["root"], adapter["parent"], adapter["max_model_len"]) == ("sql", "tiny", 64)
    assert base["object"] == "model"
    assert server.get("/v1/models/tiny:sql").json() == adapter | {"id": "tiny:sql"}


def test_a_key_sees_every_base_and_its_own_adapters(many: Server) -> None:
    bases = {"tiny", "classes", "pairs", "tags", "llama"}
    every = ids(many, ALL)
    assert bases < every
    assert {"tiny:sql", "classes:sql", "first", "second"} < every
    own = {f"{base}:sql" for base in bases - {"llama"}} | {"classes:chat"}
    assert ids(many, RESTRICTED) == bases | own


def test_anothers_adapter_is_404_as_one_that_is_not_there(many: Server) -> None:
    def ask(**body: object) -> tuple[int, str | None]:
        return error(many.post("/v1/embeddings", key=RESTRICTED, input="a", **body))  # type: ignore[arg-type]

    unknown = (404, "model_not_found")
    assert ask(model="tiny:chat") == ask(model="tiny:nobody") == unknown
    assert ask(model="tiny", adapters={"sql": 0.5, "chat": 0.5}) == unknown
    assert error(many.get("/v1/models/tiny:chat", key=RESTRICTED)) == unknown
    assert many.post("/v1/embeddings", key=RESTRICTED, input="a", model="tiny:sql").is_success
    assert many.post("/classify", key=RESTRICTED, input="a", model="classes:chat").is_success


def test_a_name_of_several_artifacts_is_no_name(many: Server) -> None:
    refused = many.post("/v1/embeddings", key=ALL, model="sql", input="a")
    assert error(refused) == (400, "invalid_request")
    assert "`tiny:sql`" in refused.json()["error"]["message"]
    assert error(many.post("/v1/embeddings", key=ALL, input="a"))[0] == 400
    assert error(many.get("/v1/models/sql", key=ALL)) == (404, "model_not_found")


@pytest.mark.parametrize("key", [None, "nobody-has-such-a-key", ADMIN])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/embeddings"),
        ("POST", "/rerank"),
        ("POST", "/classify"),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
    ],
)
def test_without_a_key_nothing_is_answered(
    many: Server, key: str | None, method: str, path: str
) -> None:
    refused = many.client.request(method, path, headers=bearer(key))
    assert error(refused) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"


def test_clients_do_not_reach_what_is_operators(many: Server) -> None:
    body = {"lora_name": "legal", "lora_path": "legal", "model": "tiny"}
    assert error(many.post("/v1/load_lora_adapter", key=ALL, **body))[0] == 401
    assert error(many.post("/v1/unload_lora_adapter", key=ALL, lora_name="sql"))[0] == 401
    assert error(many.get("/metrics", key=ALL))[0] == 401
    assert error(many.get("/v1/loras", key=ADMIN))[0] == 404  # at another port
    refused = many.client.get(f"{many.urls[1]}/v1/loras", headers=bearer(ALL))
    assert error(refused)[0] == 401


def test_tokens_of_an_encoder_and_back(server: Server) -> None:
    answer = server.post("/tokenize", prompt="hello world", return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 64
    assert (answer["token_strs"][0], answer["token_strs"][-1]) == ("<s>", "</s>")
    bare = server.post("/tokenize", prompt="hello world", add_special_tokens=False).json()
    assert bare["tokens"] == answer["tokens"][1:-1]
    assert bare["token_strs"] is None
    back = server.post("/detokenize", tokens=bare["tokens"]).json()
    assert back == {"prompt": "hello world"}
    assert server.post("/tokenize", prompt="hello " * 99).json()["count"] == 101


def test_tokens_of_a_chat(many: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = many.post("/tokenize", key=ALL, model="llama", messages=messages).json()
    plain = many.post(
        "/tokenize", key=ALL, model="llama", prompt="<user>hi<assistant>", add_special_tokens=False
    ).json()
    assert chat["tokens"] == plain["tokens"]
    half = many.post(
        "/tokenize", key=ALL, model="llama", messages=messages, add_generation_prompt=False
    ).json()
    assert chat["tokens"][: half["count"]] == half["tokens"]
    for body in (
        {"model": "tiny", "messages": messages},
        {"model": "llama"},
        {"model": "llama", "messages": messages, "prompt": "a"},
        {"model": "llama", "messages": []},
        {"model": "llama", "prompt": "a", "tools": []},
    ):
        assert error(many.post("/tokenize", key=ALL, **body))[0] == 400  # type: ignore[arg-type]


def test_ids_that_are_none(server: Server) -> None:
    for tokens in ([150], [-1], [2**40], ["a"], None):
        assert error(server.post("/detokenize", tokens=tokens))[0] == 400
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}
