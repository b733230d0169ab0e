"""What the server counts of requests: names of its own, and vLLM's, by which gateways route."""

import time
from collections.abc import Iterable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER = "other"
"""What stands for the adapters beyond those that metrics name."""
BASE = ""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Meter:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, most_adapters: int) -> None:
        self.registry = CollectorRegistry()
        self._most_adapters = most_adapters
        self._named: set[tuple[str, str]] = set()
        self.child = cache(_child)
        """(counter, *labels) -> the counter of these labels, looked up once."""
        self._encoded: dict[str, tuple[Counter, Histogram, Counter, list[Histogram]]] = {}
        """What a request to an encoder is counted by, looked up once for each artifact."""
        self.requests = self._counter(
            "loraexport_requests",
            "Requests that were answered, or whose client has gone (499).",
            "route",
            "status",
        )
        self.seconds = self._histogram(
            "loraexport_request_seconds", "From a request's head to its answer's end.", "route"
        )
        self.stalled = self._counter(
            "loraexport_stalled_connections",
            "Connections that were ended as their client read nothing for write_timeout.",
        )
        self.in_flight = 0
        """Requests that are being answered."""
        Gauge(
            "loraexport_requests_in_flight", "Being answered.", registry=self.registry
        ).set_function(lambda: self.in_flight)
        self.by_adapter = self._counter(
            "loraexport_adapter_requests",
            "Requests by artifact and adapter; the first ones by name, then `other`.",
            "model",
            "adapter",
        )
        self.loads = self._histogram(
            "loraexport_adapter_load_seconds", "Loads of adapters.", "model", "outcome"
        )
        of_model = "model_name"
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Until an answer's first token.", of_model
        )
        self.next_token = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an answer.",
            of_model,
            buckets=_TOKEN_SECONDS,
        )
        self.whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request to its answer's end.", of_model
        )
        self.queue_times = (
            self._histogram(
                "loraexport_queue_seconds", "Until a request's first run began.", "model"
            ),
            self._histogram("vllm:request_queue_time_seconds", "The same.", of_model),
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens read.", of_model)
        self.generated_tokens = self._counter("vllm:generation_tokens", "Tokens made.", of_model)
        self.finished = self._counter(
            "vllm:request_success", "Requests that ended well.", of_model, "finished_reason"
        )

    def adapter(self, model: str, adapter: str | None) -> str:
        """The label of an adapter: its name, if it is among the first so many; of the base ""."""
        if adapter is None:
            return BASE
        if (model, adapter) not in self._named:
            if len(self._named) >= self._most_adapters:
                return OTHER
            self._named.add((model, adapter))
        return adapter

    def note_load(self, model: str, seconds: float, failed: bool) -> None:
        """An adapter was loaded, or could not be."""
        self.loads.labels(model, "failed" if failed else "loaded").observe(seconds)

    def note_encoded(self, model: str, tokens: int, seconds: float, waited: float) -> None:
        """An encoder has answered a request of so many tokens.

        Args:
            seconds: since the request.
            waited: of them in the queue.
        """
        if model not in self._encoded:
            self._encoded[model] = (
                self.prompt_tokens.labels(model),
                self.whole.labels(model),
                self.finished.labels(model, "stop"),
                [histogram.labels(model) for histogram in self.queue_times],
            )
        read, whole, finished, queue_times = self._encoded[model]
        read.inc(tokens)
        whole.observe(seconds)
        finished.inc()
        for queue_time in queue_times:
            queue_time.observe(waited)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def _child(counter: Counter, *labels: str) -> Counter:
    return counter.labels(*labels)


class Pace:
    """When the tokens of one request's answers come, as a meter is told."""

    def __init__(self, meter: Meter, model: str, start: float, num_answers: int) -> None:
        """`start`: of the request, by `time.perf_counter`."""
        self._meter, self._model, self._start = meter, model, start
        self._last: list[float | None] = [None] * num_answers
        self._has_begun = self._has_ended = False
        self.waited = 0.0
        """Seconds in the queue."""

    def begin(self, waited: float, prompt_tokens: int) -> None:
        """The first prompt is read, or was, after so many seconds in the queue."""
        if not self._has_begun:
            self._has_begun, self.waited = True, waited
            for queue_time in self._meter.queue_times:
                queue_time.labels(self._model).observe(waited)
            self._meter.prompt_tokens.labels(self._model).inc(prompt_tokens)

    def tokens(self, answer: int, num: int) -> None:
        """So many tokens of an answer have come since the last time."""
        now, last = time.perf_counter(), self._last[answer]
        if num == 0:
            return
        self._meter.generated_tokens.labels(self._model).inc(num)
        if last is not None:
            gaps = self._meter.next_token.labels(self._model)
            for _ in range(num):
                gaps.observe((now - last) / num)
        elif all(other is None for other in self._last):
            self._meter.first_token.labels(self._model).observe(now - self._start)
        self._last[answer] = now

    def end(self, reasons: Iterable[str]) -> None:
        """All answers have ended, each for its reason; what is said later is not counted."""
        if self._has_ended:
            return
        self._has_ended = True
        for reason in reasons:
            self._meter.finished.labels(self._model, reason).inc()
        self._meter.whole.labels(self._model).observe(time.perf_counter() - self._start)
