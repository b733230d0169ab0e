"""What Prometheus reads: names of ours and of vLLM, few labels, and adapters for a gateway."""

import json
import time

from prometheus_client.parser import text_string_to_metric_families
from support.serving import ADMIN, ALL, Server
from support.waiting import wait_until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metrics(server: Server) -> Samples:
    return read(server.get("/metrics").text)


def test_requests_are_counted(server: Server) -> None:
    key = ("loraexport_requests_total", (("route", "/v1/embeddings"), ("status", "200")))
    of_adapter = ("loraexport_adapter_requests_total", (("adapter", "sql"), ("model", "tiny")))
    of_base = ("loraexport_adapter_requests_total", (("adapter", ""), ("model", "tiny")))
    tokens = ("vllm:prompt_tokens_total", (("model_name", "tiny"),))
    ends = ("vllm:request_success_total", (("finished_reason", "stop"), ("model_name", "tiny")))
    whole = ("vllm:e2e_request_latency_seconds_count", (("model_name", "tiny"),))
    texts = ("loraexport_encoder_requests_total", (("model", "tiny"),))
    before = metrics(server)
    answer = server.post("/v1/embeddings", model="sql", input=["hello", "world"]).json()
    server.post("/v1/embeddings", input="hello")
    after = metrics(server)
    used = answer["usage"]["prompt_tokens"]
    grown = {key: 2, of_adapter: 1, of_base: 1, tokens: used + 3, ends: 2, whole: 2, texts: 3}
    for name, more in grown.items():
        assert after[name] - before.get(name, 0) == more, name
    for gauge in ("num_requests_running", "num_requests_waiting"):
        assert after[f"vllm:{gauge}", (("model_name", "tiny"),)] == 0
    assert after["loraexport_slots", (("model", "tiny"),)] == 3


def test_a_gateway_sees_resident_adapters_of_an_idle_server(server: Server) -> None:
    server.post("/v1/embeddings", model="sql", input="a")
    (labels, stamp), = [
        (dict(labels), value)
        for (name, labels), value in metrics(server).items()
        if name == "vllm:lora_requests_info"
    ]  # fmt: skip
    assert "sql" in labels["running_lora_adapters"].split(",")
    assert labels["waiting_lora_adapters"] == ""
    assert labels["max_lora"] == "3"
    assert abs(stamp - time.time()) < 60


def test_few_adapters_are_named(many: Server) -> None:
    """The settings say 2; what is more is told together."""
    for name in ("tiny:sql", "tiny:chat", "classes:sql"):
        many.post("/tokenize", key=ALL, model=name, prompt="a")
    for text in (many.admin("GET", "/metrics").text, many.get("/metrics", key=ADMIN).text):
        named = {
            dict(labels)["adapter"]
            for name, labels in read(text)
            if name.startswith("loraexport_adapter") and "adapter" in dict(labels)
        }
        assert len(named - {"", "other"}) <= 2
        assert "other" in named


def test_a_line_of_the_log_for_each_request(many: Server) -> None:
    """With the id that the client gave, the caller and the adapter, and no text of it."""
    headers = {"authorization": f"Bearer {ALL}", "x-request-id": "my-id.1"}
    body = {"model": "tiny:chat", "input": "a very private text"}
    answer = many.client.post("/v1/embeddings", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-id.1"
    wait_until(lambda: "my-id.1" in many.log)  # it is written once the answer is sent
    (line,) = (json.loads(line) for line in list(many.lines) if "my-id.1" in line)
    assert line["caller"] == "everybody"
    assert line["model"] == "tiny:chat"
    assert (line["status"], line["path"], line["level"]) == (200, "/v1/embeddings", "info")
    assert "private" not in many.log
    assert ALL not in many.log
    bad = {"authorization": f"Bearer {ALL}", "x-request-id": "a b" * 30}
    other = many.client.post("/v1/embeddings", json=body, headers=bad)
    assert len(other.headers["x-request-id"]) == 32
