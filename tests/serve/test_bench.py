"""A load is the same for a seed, reaches the server, and is counted; no figure has a bound."""

import asyncio
import json
import xml.etree.ElementTree as ET
from itertools import islice
from pathlib import Path

import pytest
from support.serving import ALL, Server

from loraexport_serve.bench.load import Load, arrivals, requests
from loraexport_serve.bench.report import quantiles
from loraexport_serve.bench.wire import BROKEN, Place
from loraexport_serve.cli import main


def test_a_closed_loop(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot, texts = (tmp_path / name for name in ("out.json", "plot.svg", "texts"))
    texts.write_text("hello world\nbatch\n\n")
    flags = ["--clients", "4", "--seconds", "1", "--warm-up", "0.2", "--inputs", "2"]
    files = ["--texts", str(texts), "--json", str(out), "--plot", str(plot)]
    assert main(["bench", server.url, *flags, *files]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["models"]) == {"sql", "chat"}  # those that the server lists
    assert list(figures["statuses"]) == ["200"]
    assert figures["requests"] == sum(one["requests"] for one in figures["models"].values())
    assert figures["texts_per_second"] == pytest.approx(2 * figures["requests_per_second"], abs=0.1)
    assert figures["tokens_in_per_second"] > 0
    latency = figures["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
    assert ET.parse(plot).getroot().tag.endswith("svg")
    screen = capsys.readouterr().out
    assert "4 clients, 1 s" in screen
    assert f"answers: {figures['requests']} of 200" in screen


def test_an_open_loop(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refusals are counted by their status, and the command says that nothing was answered."""
    out = tmp_path / "out.json"
    flags = ["--rate", "40", "--seconds", "0.5", "--warm-up", "0", "--words", "2-9"]
    models = ["--models", "sql,nobody", "--zipf", "1"]
    assert main(["bench", server.url, *flags, *models, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert list(figures["models"]["sql"]["statuses"]) == ["200"]
    assert list(figures["models"]["nobody"]["statuses"]) == ["404"]
    assert figures["models"]["nobody"]["latency_ms"] == {}
    expected = sum(1 for at in islice(arrivals(40, 0), 200) if at < 0.5)
    assert figures["requests"] == expected
    assert main(["bench", server.url, "--models", "nobody", "--seconds", "0.2"]) == 1
    capsys.readouterr()


def test_completions(many: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, key = tmp_path / "out.json", tmp_path / "key"
    key.write_text(f"{ALL}\n")
    flags = ["--route", "completions", "--models", "llama", "--max-tokens", "4", "--words", "2"]
    pace = ["--clients", "2", "--seconds", "1", "--warm-up", "0", "--key-file", str(key)]
    assert main(["bench", many.url, *flags, *pace, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert list(figures["statuses"]) == ["200"]
    assert figures["tokens_out_per_second"] >= 4 * figures["requests_per_second"] > 0
    assert figures["first_event_ms"]["p50"] <= figures["latency_ms"]["p50"]
    assert "tokens/s" in capsys.readouterr().out


def test_what_cannot_be_driven(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for arguments, message in (
        (["ftp://x"], "ftp://x: expected http://HOST:PORT"),
        (["http://127.0.0.1:1"], "Connect"),
        ([server.url, "--words", "9-3"], "--words 9-3: the fewest come first"),
        ([server.url, "--texts", str(empty)], "no line has a text"),
        ([f"{server.url}", "--texts", str(tmp_path / "none")], "No such file"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
    for flags in (["--rate", "0"], ["--clients", "0"], ["--rate", "1", "--clients", "1"]):
        with pytest.raises(SystemExit):
            main(["bench", server.url, *flags])
    capsys.readouterr()


def test_a_seed_is_a_load() -> None:
    load = Load("embeddings", ("a", "b", "c"), zipf=1.0, words=(2, 9), seed=3)
    drawn = list(islice(requests(load), 600))
    assert drawn == list(islice(requests(load), 600))
    assert drawn != list(islice(requests(Load("embeddings", ("a", "b", "c"), seed=4)), 600))
    counts = [sum(one.model == place for one in drawn) for place in range(3)]
    assert counts == sorted(counts, reverse=True)  # 6 : 3 : 2
    sizes = {len(json.loads(one.body)["input"][0].split()) for one in drawn}
    assert sizes == set(range(2, 10))


def test_quantiles() -> None:
    assert quantiles([]) == {}
    hundred = [place / 1000 for place in range(100, 0, -1)]
    assert quantiles(hundred) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert quantiles([0.004])["p99"] == 4


def test_a_server_that_ends_or_hangs_is_no_answer() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if b"hang" in request:
            await reader.read()
        elif b"junk" in request:
            writer.write(b"no HTTP\r\n\r\n")
        writer.close()

    async def ask() -> list[int]:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            place = Place(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", None)
            statuses = []
            for path in ("/end", "/hang", "/junk"):
                connection = await place.connect()
                reply = await connection.ask(place.request("GET", path), 0.2)
                statuses.append(reply.status)
                connection.close()
                assert (await connection.ask(b"", 0.2)).status == BROKEN
            return statuses

    assert asyncio.run(ask()) == [BROKEN] * 3
