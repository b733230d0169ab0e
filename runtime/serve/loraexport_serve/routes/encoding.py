"""What every route of encoders does: texts to rows, rows to outputs, and the tokens counted."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import no_number
from ..hosts.encoder import EncoderHost, Row
from ..hosts.texts import Tokens
from .common import Usage, read_cut, usage
from .endpoint import Call


async def read_texts(
    call: Call[Any],
    host: EncoderHost,
    texts: Sequence[str | tuple[str, str]],
    truncate: int | None,
    param: str,
    *,
    most_second: int | None = None,
) -> list[Tokens]:
    """The tokens of texts or pairs. Raises ApiError (400).

    Args:
        truncate: `truncate_prompt_tokens`.
        param: what they are in the request, for an error.
        most_second: tokens that the second text of a pair keeps at most.
    """
    require_room(call, host)
    encoder = host.require_texts()
    cut = read_cut(truncate, encoder)
    size = sum(sum(map(len, text)) if isinstance(text, tuple) else len(text) for text in texts)
    return await call.service.read_texts(
        size, lambda: encoder.encode(texts, cut=cut, param=param, most_second=most_second)
    )


def require_room(call: Call[Any], host: EncoderHost) -> None:
    """Refuse what cannot wait before its texts are read. Raises QueueFullError."""
    assert call.target is not None, "the host was resolved"
    host.batcher.require_room(call.target.adapter, call.caller.tenant)


async def run_rows(
    call: Call[Any], host: EncoderHost, rows: Sequence[Row]
) -> list[dict[str, np.ndarray]]:
    """The outputs of each row, under the request's adapter. Raises ApiError (400): one has no
    number."""
    assert call.target is not None, "the host was resolved"
    outputs, call.outcome.waited = await host.run(
        rows,
        call.target.adapter,
        tenant=call.caller.tenant,
        timeout=call.service.settings.queue_timeout or None,
    )
    if not all(np.isfinite(values).all() for one in outputs for values in one.values()):
        raise no_number(
            "the model gave no number (NaN or infinity) for this input; its adapter overflows here,"
            " or the input does: export in bfloat16 or float32"
        )
    return outputs


def stack(outputs: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """One output of all rows, float32 [n, …]."""
    return np.array([one[name] for one in outputs], dtype=np.float32)


def counted(call: Call[Any], tokens: Sequence[Tokens]) -> Usage:
    """The usage of a request that was answered, which the meter is told too."""
    assert call.target is not None, "the host was resolved"
    said = usage([len(one.ids) for one in tokens])
    seconds = time.perf_counter() - call.start
    waited = call.outcome.waited
    call.service.meter.note_encoded(call.target.host.name, said.prompt_tokens, seconds, waited)
    call.outcome.prompt_tokens = said.prompt_tokens
    return said


def new_id(kind: str) -> str:
    """An answer's, such as `rerank-…`."""
    return f"{kind}-{uuid.uuid4().hex}"
