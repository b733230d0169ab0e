"""Triton's own client, by gRPC; a program, as its packages are not those of the tests.

triton_client.py HOST:PORT    -> for each line, a call as JSON, its answer as a line:
{"texts": […], "adapters": […], "parameters": {…}} -> {"rows": …}, or {"error": …, "status": …};
{"streams": [[prompt, adapter, parameters], …]}, at once on one connection -> {"ends": […]}, of each
its {"text": …} or {"error": …}; or, with "leave": true, left at the first piece -> {"ends": null}
"""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

PATIENCE = 60.0
"""Seconds until a response."""


def main(address: str) -> None:
    for line in sys.stdin:
        call = json.loads(line)
        answer = _stream(address, **call) if "streams" in call else _infer(address, **call)
        print(json.dumps(answer), flush=True)


def _infer(
    address: str, texts: list[str], adapters: list[str], parameters: dict[str, Any]
) -> dict[str, Any]:
    shape = [len(texts), 1]
    inputs = [_strings("TEXT", texts, shape), _strings("ADAPTER", adapters, shape)]
    with grpc.InferenceServerClient(address) as client:
        try:
            result = client.infer("tiny", inputs, parameters=parameters, client_timeout=PATIENCE)
        except grpc.InferenceServerException as error:
            return {"error": error.message(), "status": error.status()}
        return {"rows": result.as_numpy("EMBEDDING").tolist()}


def _stream(address: str, streams: list[Any], leave: bool = False) -> dict[str, Any]:
    came: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: came.put((result, error)))
        for index, (prompt, adapter, parameters) in enumerate(streams):
            client.async_stream_infer(
                "llama",
                [_strings("PROMPT", [prompt], [1]), _strings("ADAPTER", [adapter], [1])],
                request_id=str(index),
                enable_empty_final_response=True,
                parameters=parameters,
            )
        texts, ends = [""] * len(streams), dict[int, dict[str, str]]()
        while len(ends) < len(streams):
            result, error = came.get(timeout=PATIENCE)
            if error is not None:  # which names no request
                (index,) = set(range(len(streams))) - set(ends)
                ends[index] = {"error": error.message()}
                continue
            response = result.get_response()
            index = int(response.id)
            if response.outputs:
                texts[index] += result.as_numpy("TEXT")[0].decode()
            if leave:
                client.stop_stream(cancel_requests=True)
                return {"ends": None}
            if response.parameters["triton_final_response"].bool_param:
                ends[index] = {"text": texts[index]}
        client.stop_stream()
        return {"ends": [ends[index] for index in range(len(streams))]}


def _strings(name: str, values: list[str], shape: list[int]) -> Any:
    tensor = grpc.InferInput(name, shape, "BYTES")
    tensor.set_data_from_numpy(
        np.array([value.encode() for value in values], np.object_).reshape(shape)
    )
    return tensor


if __name__ == "__main__":
    main(*sys.argv[1:])
