"""The document that is served: every route stands in it, and what schemathesis makes of it."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from support.serving import Server

from loraexport_serve.app import describe

ANY_SPEED: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
NAMED = ("/v1/embeddings", "/v1/rerank", "/v1/score", "/classify", "/tokenize", "/detokenize")


def test_no_request_of_the_document_is_a_500(server: Server) -> None:
    """Bodies that fit the document, and bodies that do not."""
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [one.ok() for one in api.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        has_body = operation.method == "post"
        for mode in GenerationMode if has_body else [GenerationMode.POSITIVE]:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=3, **ANY_SPEED)
            @given(case=cases)
            def check(case: Any) -> None:
                case.call_and_validate(checks=[not_a_server_error])

            check()


def test_every_route_is_described(server: Server) -> None:
    document = server.get("/openapi.json").json()
    assert set(NAMED) < set(document["paths"])
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert operation["responses"]["200"]["content"]
    body = document["components"]["schemas"]["EmbeddingBody"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["input"]


def test_routes_that_change_adapters_are_there_by_consent(server: Server) -> None:
    served, every = server.get("/openapi.json").json(), describe(of_operators=False)
    changing = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
    assert set(every["paths"]) - set(served["paths"]) == changing


def test_operators_have_routes_of_their_own() -> None:
    paths = set(describe(of_operators=True)["paths"])
    assert {"/v1/loras", "/v1/loras/{name}", "/v1/artifacts", "/metrics", "/readyz"} <= paths
    assert not paths & set(NAMED)
