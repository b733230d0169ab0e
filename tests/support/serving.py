"""Tiny encoders with a tokenizer, and a server as a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coverage
import httpx
import numpy as np
from tokenizers import processors

from support.adapters import write_adapter
from support.builds import Project
from support.sentences import NORMALIZE, declare, pooling
from support.tokenizers import save, word_pieces
from support.waiting import DEADLINE

_LISTENS = re.compile(r"(?:clients|operators) at (https?)://([\d.]+):(\d+)")
START = 120.0
"""Seconds until a server is ready."""
ADMIN = "the-operators-own-token"
ALL, RESTRICTED = "a-key-for-everything", "a-key-for-sql-alone"
KEYS = f"""
keys:
  - {{name: everybody, key: {ALL}}}
  - {{name: restricted, key: {RESTRICTED}, adapters: ["sql", "classes:chat"]}}
"""
PROMPTS = {"query": "hello ", "document": "batch "}


def write_encoder(folder: Path, task: str = "sentence-embedding", labels: int = 0) -> Path:
    """A tiny BERT with its tokenizer and two adapters, `sql` and `chat`; `legal` lies beside.

    Args:
        labels: of a classifier.
    """
    import torch
    import transformers as tf

    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=150,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        **({"id2label": {index: f"L{index}" for index in range(labels)}} if labels else {}),
    )
    classes = {
        "sentence-embedding": tf.BertModel,
        "sequence-classification": tf.BertForSequenceClassification,
        "token-classification": tf.BertForTokenClassification,
    }
    model = classes[task](config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "bert")
    tokenizer = word_pieces()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 1), ("</s>", 2)]
    )
    save(folder / "bert", tokenizer, model_max_length=64)
    if task == "sentence-embedding":
        declare(folder / "bert", pooling(32, "mean"), NORMALIZE, prompts=PROMPTS)
    prefix = "" if task == "sentence-embedding" else "bert."
    for seed, name in enumerate(("sql", "chat", "legal")):
        write_legal(folder / name, seed=seed, site=f"{prefix}encoder.layer.0.attention.self.query")
    base = {"kind": "transformers", "path": "bert", "task": task}
    adapters = [{"name": name, "path": name} for name in ("sql", "chat")]
    return Project(folder).spec(base=base, adapters=adapters, slots=3, max_rank=8)


def bearer(key: str | None) -> dict[str, str]:
    """The header of a key."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def error(response: httpx.Response) -> tuple[int, str | None]:
    """The status and the code of a refusal, which has OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]["code"]


def write_legal(
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    site: str = "encoder.layer.0.attention.self.query",
    nan: bool = False,
) -> None:
    """An adapter for `write_encoder`'s base, or, by its rank, site or values, for none."""
    tensors = {f"base_model.model.{site}.lora_A.weight": np.full((rank, 32), np.nan, np.float32)}
    config = {"target_modules": [site]}
    made = {site: (32, 32)}
    write_adapter(
        folder, made, rank=rank, seed=seed, config=config, tensors=tensors if nan else None
    )


class Server:
    """A server that runs; its log is kept."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self.client = httpx.Client(timeout=DEADLINE, trust_env=False)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_listening(self) -> None:
        """Until it says where; fail if the process ends."""
        _wait_start(lambda: self.urls != [] or self.process.poll() is not None)
        assert self.urls, self.log
        self.client.base_url = self.url

    @property
    def url(self) -> str:
        """Of clients."""
        return self.urls[0]

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def urls(self) -> list[str]:
        """Of clients, and of operators."""
        found = [_LISTENS.search(line) for line in list(self.lines)]
        return [f"{one[1]}://{one[2]}:{one[3]}" for one in found if one]

    def wait_ready(self) -> None:
        """Until readyz says 200; fail if the process ends."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return self.client.get("/readyz").status_code == 200

        _wait_start(is_ready)

    def post(self, path: str, /, *, key: str | None = None, **body: Any) -> httpx.Response:
        """A body as JSON. Args: key: of a client."""
        return self.client.post(path, json=body, headers=bearer(key))

    def get(self, path: str, *, key: str | None = None) -> httpx.Response:
        return self.client.get(path, headers=bearer(key))

    def admin(self, method: str, path: str, /, **body: Any) -> httpx.Response:
        """What an operator asks, at the port for it."""
        content = {"json": body} if body else {}
        return self.client.request(
            method, f"{self.urls[1]}{path}", headers=bearer(ADMIN), **content
        )

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(START)

    def release(self) -> None:
        """Close what it holds here, once the process has ended."""
        self.client.close()
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)


def _wait_start(condition: Callable[[], bool]) -> None:
    """Until it holds; a process that begins on a busy machine takes a while."""
    end = time.monotonic() + START
    while not condition():
        assert time.monotonic() < end, "the server did not come so far"
        time.sleep(0.02)


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Server]:
    """`loraexport-serve` with these arguments, at free ports; ended by SIGTERM, exit code 0."""
    with started(*arguments, **variables) as server:
        server.wait_ready()
        yield server
        assert server.end() == 0, server.log


@contextmanager
def started(*arguments: str, **variables: str) -> Iterator[Server]:
    """The same, as soon as it listens; killed in the end if it runs."""
    command = [sys.executable, "-m", "loraexport_serve", *arguments, "--port", "0"]
    with _environment(variables) as environment:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        server = Server(process)
        try:
            server.wait_listening()
            yield server
        finally:
            process.kill()
            process.wait()
            server.release()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Of a server; where lines are counted here they are there too, beside this run's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LORAEXPORT_")}
    kept |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(variables)
    current = coverage.Coverage.current()
    if current is None:
        yield kept
        return
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as settings:
        place = Path(current.config.data_file).resolve().parent / ".coverage"
        settings.write(f"[run]\nparallel=true\nsource=loraexport_serve\ndata_file={place}\n")
        settings.flush()
        yield kept | {"COVERAGE_PROCESS_START": settings.name}
