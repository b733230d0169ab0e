"""Execution providers that really run, and buffers on their devices."""

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from ..errors import InputError, ProviderError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_SHORT_NAMES = {"cpu": CPU, "cuda": CUDA}
_NO_CUDNN_ATTENTION = str(1 | 2 | 4 | 16 | 32 | 64)
"""Every attention kernel that onnxruntime takes of its own accord, but for cuDNN's (8)."""

Provider = str | tuple[str, dict[str, Any]]


def normalise_providers(providers: Sequence[Provider]) -> list[tuple[str, dict[str, Any]]]:
    """`["cuda"]` or onnxruntime's own names, with or without options, as (name, options)."""
    if isinstance(providers, str) or not providers:
        raise ProviderError(f"providers: expected a list such as ['{CPU}'], got {providers!r}")
    pairs = []
    for entry in providers:
        pair = entry if isinstance(entry, tuple) else (entry, {})
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], dict):
            raise ProviderError(
                f"providers: expected a name, or a tuple (name, options), got {entry!r}"
            )
        pairs.append((_SHORT_NAMES.get(pair[0], pair[0]), dict(pair[1])))
    for name, options in pairs:
        if name == CUDA:
            # onnxruntime would round float32 products to TF32, about 3 decimal digits.
            options.setdefault("use_tf32", "0")
        if name not in ort.get_available_providers():
            raise ProviderError(
                f"{name} is not part of this onnxruntime {ort.__version__} (it has"
                f" {', '.join(ort.get_available_providers())}); for CUDA install onnxruntime-gpu,"
                " and do not keep plain onnxruntime beside it"
            )
    return pairs


def session_device(provider: tuple[str, dict[str, Any]]) -> tuple[str, int]:
    """Where a session of this first provider keeps its buffers, as ("cuda", 1) or ("cpu", 0)."""
    name, options = provider
    if name != CUDA:
        return ("cpu", 0)
    device = options.get("device_id", 0)
    try:
        return ("cuda", int(device))
    except (TypeError, ValueError) as error:
        raise ProviderError(f"{CUDA}: device_id is {device!r}; expected a number") from error


def check_threads(threads: int | None) -> None:
    """Raise InputError unless it is a number of threads, or None; onnxruntime takes any number."""
    if threads is not None and (type(threads) is not int or threads < 0):
        raise InputError(
            f"threads is {threads!r}; expected 1 or more, or None for onnxruntime's own choice"
        )


def check_cuda_graphs(providers: Sequence[tuple[str, dict[str, Any]]], cuda_graphs: bool) -> None:
    """Raise ProviderError unless sessions of these providers capture graphs as they are told to."""
    if cuda_graphs and providers[0][0] != CUDA:
        raise ProviderError(
            f"CUDA graphs were asked for on {providers[0][0]}; pass providers=['cuda'], or no"
            " cuda_graphs"
        )
    settings = [str(options.get("enable_cuda_graph", "0")) for _, options in providers]
    if not cuda_graphs and not set(settings) <= {"0", "False"}:
        raise ProviderError(
            "enable_cuda_graph alone would replay one batch's graph for all others; pass"
            " cuda_graphs=True instead, and warm_up the sizes of your batches"
        )


def with_cuda_graphs(
    providers: Sequence[tuple[str, dict[str, Any]]],
) -> list[tuple[str, dict[str, Any]]]:
    """The same providers, where CUDA may capture: a run says whether, by its `gpu_graph_id`."""
    return [
        (name, {**options, "enable_cuda_graph": "1"} if name == CUDA else options)
        for name, options in providers
    ]


def with_varied_shapes(
    providers: Sequence[tuple[str, dict[str, Any]]],
) -> list[tuple[str, dict[str, Any]]]:
    """The same providers for batches of any sizes, of which most are new.

    On Hopper and later onnxruntime prefers cuDNN's attention, which makes a plan for every new
    shape and thread: 60 to 90 ms a run of BERT-base and of a Llama of 1 B on an H100, where the
    others run in 3 and 15. `sdpa_kernel` among a provider's options goes before.
    """
    return [
        (name, {"sdpa_kernel": _NO_CUDNN_ATTENTION, **options} if name == CUDA else options)
        for name, options in providers
    ]


def graph_options(graph_id: int) -> ort.RunOptions:
    """For a run of a session that may capture: replay, or capture, this graph; -1: neither."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
