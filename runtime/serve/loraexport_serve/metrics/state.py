"""What artifacts say of themselves when Prometheus asks: queues, batches, slots, adapters."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..hosts.decoder import DecoderHost
from ..hosts.encoder import EncoderHost
from ..hosts.host import Host
from .meter import Meter

_BATCHER = {
    "batches": "Runs of an encoder.",
    "requests": "Texts that were run, by themselves or together.",
    "tokens": "Tokens of them.",
    "padded_tokens": "Tokens that the runs computed, padding too.",
    "failed": "Texts whose run failed, alone.",
    "cancelled": "Texts whose client went before they were run.",
    "late": "Texts that waited too long.",
    "seconds": "In runs.",
}
_ENGINE = {
    "finished": "Answers that ended by themselves.",
    "cancelled": "Answers whose client went.",
    "failed": "Answers that a fault ended.",
    "prefix_hits": "Answers whose prompt began as a row's text.",
    "prefix_tokens": "Tokens that were not read again for them.",
    "chunks": "Runs that read prompts.",
    "steps": "Runs that gave a token to each row.",
    "step_rows": "Tokens of these.",
}
_SLOTS = {
    "hits": "Adapters that sat in a slot when a run named them.",
    "pages": "Adapters that were copied into a slot for a run.",
    "evictions": "Adapters that left their slot for another one.",
    "waits": "Runs, pins and loads that did not get their slots at once.",
    "wait_seconds": "Of these.",
}


class State(Collector):
    """Reads the hosts at each scrape."""

    def __init__(self, hosts: Iterable[Host], meter: Meter) -> None:
        self._hosts, self._meter = hosts, meter

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are few, and no host need be there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        hosts = list(self._hosts)
        yield from _loads(hosts)
        yield from _counts("encoder", _BATCHER, _batchers(hosts))
        yield from _counts("decoder", _ENGINE, _engines(hosts))
        slots = [(host.name, host.adapters.host.slots.counts()) for host in hosts]
        yield from _counts("adapter", _SLOTS, slots)
        held = _gauge("loraexport_slots_held", "Slots that hold an adapter.")
        every = _gauge("loraexport_slots", "Slots that there are.")
        for host, (_, counts) in zip(hosts, slots, strict=True):
            held.add_metric([host.name], counts.slots_held)
            every.add_metric([host.name], host.manifest.num_slots)
        yield from (held, every)
        yield self._adapters(hosts)
        yield _lora_info(hosts)

    def _adapters(self, hosts: Iterable[Host]) -> Metric:
        """Each adapter that metrics name, and how many the others are."""
        labels = ["model", "adapter", "tier", "pinned"]
        name = "loraexport_adapter_loaded"
        loaded = GaugeMetricFamily(name, "Adapters in memory.", labels=labels)
        for host in hosts:
            counts = Counter[tuple[str, ...]]()
            for adapter, info in host.listing().items():
                tier = "host" if info.slot is None else "slot"
                label = self._meter.adapter(host.name, adapter)
                counts[host.name, label, tier, str(info.pinned).lower()] += 1
            for key, count in counts.items():
                loaded.add_metric(key, count)
        return loaded


def _loads(hosts: Iterable[Host]) -> Iterator[Metric]:
    """vLLM's gauges, by which a gateway chooses between servers."""
    running = _gauge("vllm:num_requests_running", "Being computed.", "model_name")
    waiting = _gauge("vllm:num_requests_waiting", "In the queue.", "model_name")
    cache = _gauge("vllm:kv_cache_usage_perc", "Share of a decoder's rows.", "model_name")
    tokens = _gauge("loraexport_queued_tokens", "Tokens of what waits.")
    for host in hosts:
        match host:
            case DecoderHost():
                engine = host.engine.stats()
                running.add_metric([host.name], engine.running)
                waiting.add_metric([host.name], engine.queued)
                cache.add_metric([host.name], engine.running / engine.rows)
                tokens.add_metric([host.name], engine.queued_tokens)
            case EncoderHost():
                batcher = host.batcher.stats()
                running.add_metric([host.name], max(0, host.num_rows - batcher.queued))
                waiting.add_metric([host.name], batcher.queued)
                tokens.add_metric([host.name], batcher.queued_tokens)
    yield from (running, waiting, cache, tokens)


def _lora_info(hosts: Iterable[Host]) -> Metric:
    """The adapters that sit in slots, idle or not, and those that requests wait for."""
    names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    info = GaugeMetricFamily("vllm:lora_requests_info", "Resident and waiting.", labels=names)
    resident: set[str] = set()
    named: set[str] = set()
    most = 0
    for host in hosts:
        resident |= host.adapters.host.slots.loaded.keys()
        named |= host.in_flight.keys()
        most += host.manifest.num_slots
    labels = [str(most), ",".join(sorted(resident)), ",".join(sorted(named - resident))]
    info.add_metric(labels, time.time())
    return info


def _batchers(hosts: Iterable[Host]) -> list[tuple[str, object]]:
    return [(host.name, host.batcher.stats()) for host in hosts if isinstance(host, EncoderHost)]


def _engines(hosts: Iterable[Host]) -> list[tuple[str, object]]:
    return [(host.name, host.engine.stats()) for host in hosts if isinstance(host, DecoderHost)]


def _counts(
    family: str, texts: dict[str, str], stats: Iterable[tuple[str, object]]
) -> Iterator[Metric]:
    for name, text in texts.items():
        counter = CounterMetricFamily(f"loraexport_{family}_{name}", text, labels=["model"])
        for model, values in stats:
            counter.add_metric([model], getattr(values, name))
        yield counter


def _gauge(name: str, text: str, label: str = "model") -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=[label])
