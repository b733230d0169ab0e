"""Cases of `kind: engine`, each to be measured in turn."""

from collections.abc import Callable, Iterator
from functools import partial

from ..contestants.decoder_graphs import DecoderGraphs
from ..results import EngineCase
from ..workloads.projects import Lab
from ..workloads.schema import EngineWorkload
from .traffic import measure_traffic
from .waits import measure_arrival, measure_chat


def engine_cases(
    workload: EngineWorkload, lab: Lab
) -> Iterator[tuple[str, Callable[[], EngineCase]]]:
    """What each is, in words, and the measuring of it, for every adapters and rank."""
    for rank in workload.ranks:
        for adapters in workload.adapters:
            graphs = DecoderGraphs(workload, lab, adapters, rank)
            if (traffic := workload.traffic) is not None:
                words = f"{traffic.requests} requests at once"
                yield words, partial(measure_traffic, graphs, workload, traffic)
            if (arrival := workload.arrival) is not None:
                words = f"short prompts beside one of {arrival.long_prompt_tokens} tokens"
                yield words, partial(measure_arrival, graphs, workload, arrival)
            if (chat := workload.chat) is not None:
                words = f"two turns of a chat of {chat.prompt_tokens} tokens"
                yield words, partial(measure_chat, graphs, workload, chat)
