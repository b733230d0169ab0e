"""An encoder in service: rows of tokens -> its outputs, batched with everybody else's."""

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraexport_runtime import Batcher, ModelSession
from loraexport_runtime.batching.gathering import BatchFuture
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.slots.batch import RowAdapters, row_names

from ..config.schema import ModelSettings, Settings
from ..errors import invalid
from .host import Host
from .texts import TextEncoder, Tokens

TOKENIZER = "tokenizer"
"""The folder of an artifact that has the tokenizer's files."""


@dataclass(frozen=True)
class Row:
    """What one row of a batch is made of."""

    tokens: Tokens
    prompt: int = 0
    """Tokens of the prompt ahead of the text, with what begins a text."""


class EncoderHost(Host):
    """A whole model, or a graph, and the batcher over it."""

    kind = "encoder"

    def __init__(
        self, name: str, session: ModelSession, settings: ModelSettings, server: Settings
    ) -> None:
        facts = session.model.facts
        limits = [limit for limit in (facts.max_length, facts.positions) if limit is not None]
        limit = min(limits, default=None)
        texts = TextEncoder.read(
            ListedFiles(session.folder, session.manifest.files), TOKENIZER, limit
        )
        super().__init__(name, settings, session.manifest, session, texts, limit)
        self.session, self.model = session, session.model
        self.num_rows = 0
        """Of all requests that are being answered."""
        self._names = [entry.name for entry in self.model.inputs]
        self.batcher = Batcher(
            session,
            most_rows=server.batch_rows,
            most_tokens=server.batch_tokens,
            delay=server.batch_delay,
            workers=workers_of(settings, server),
            most_queued=server.max_queued,
            most_queued_tokens=server.max_queued_tokens,
        )

    def close(self) -> None:
        self.batcher.close()
        self.session.close()

    def require_texts(self) -> TextEncoder:
        """The tokenizer. Raises ApiError (400): it takes no texts."""
        if self.texts is None or "input_ids" not in self._names:
            takes = ", ".join(self._names)
            raise invalid(f"the model takes {takes}, and no text: its artifact has no tokenizer")
        return self.texts

    async def run(
        self,
        rows: Sequence[Row],
        adapter: RowAdapters,
        *,
        tenant: str | None,
        timeout: float | None,
    ) -> tuple[list[dict[str, np.ndarray]], float]:
        """The outputs of each row, in its own batch or in another's; and the seconds until the
        first of them began.

        A task that is cancelled takes its rows out of the queue.

        Raises:
            LoraexportError: what the batcher refuses, or the first error of a row; no other row of
                these is run then.
        """
        await self.prepare(row_names([adapter]))
        if len(rows) > 1:  # half of a request is not queued: what is taken back counts for a while
            tokens = sum(len(row.tokens.ids) for row in rows)
            self.batcher.require_room(adapter, tenant, len(rows), tokens)
        futures: list[BatchFuture] = []
        self.num_rows += len(rows)
        start = time.monotonic()
        try:
            for row in rows:
                inputs = self._inputs(row)
                future = self.batcher.submit(inputs, adapter, tenant=tenant, timeout=timeout)
                futures.append(future)
            outputs = await _gather(futures)
            began = min((future.began or start for future in futures), default=start)
            return outputs, began - start
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        finally:
            self.num_rows -= len(rows)

    def _inputs(self, row: Row) -> dict[str, np.ndarray]:
        ids = np.array(row.tokens.ids, dtype=np.int64)
        inputs: dict[str, np.ndarray] = {}
        for name in self._names:
            match name:
                case "input_ids":
                    inputs[name] = ids
                case "attention_mask":
                    inputs[name] = np.ones_like(ids)
                case "token_type_ids":
                    inputs[name] = self._kinds(row.tokens)
                case "position_ids":
                    inputs[name] = np.arange(len(ids), dtype=np.int64)
                case "prompt_lengths":
                    inputs[name] = np.array(row.prompt, dtype=np.int64)
                case _:
                    raise invalid(f"the model takes {name}, which no route of texts gives")
        return inputs

    def _kinds(self, tokens: Tokens) -> np.ndarray:
        """token_type_ids, of a model that may know one kind alone."""
        kinds = np.array(tokens.kinds, dtype=np.int64)
        most = self.model.facts.type_vocab_size
        return kinds if most is None else np.minimum(kinds, most - 1)


def workers_of(model: ModelSettings, server: Settings) -> int:
    """Batches of an encoder that run at the same time."""
    if model.batch_workers is not None:
        return model.batch_workers
    return 1 if (model.device or server.device) != "cpu" else min(2, num_cores())


def threads_of(model: ModelSettings, server: Settings) -> int | None:
    """onnxruntime's threads for each of these; None: its own choice."""
    workers = workers_of(model, server)
    return model.threads or (None if workers == 1 else max(1, num_cores() // workers))


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


async def _gather(futures: Sequence[Future[Any]]) -> list[Any]:
    """The results of all, woken once: by the last of them, or by the first error."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    ended = itertools.count(1)

    def end() -> None:
        if not done.done():
            done.set_result(None)

    def on_done(future: Future[Any]) -> None:
        # Any of the batcher's threads calls, and two may at a time: `next` counts each once.
        is_last = next(ended) == len(futures)
        if is_last or future.cancelled() or future.exception() is not None:
            loop.call_soon_threadsafe(end)

    if not futures:
        return []
    for future in futures:
        future.add_done_callback(on_done)
    await done
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
