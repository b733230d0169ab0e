"""`loraexport-serve bench`: flags -> a load, its figures on the screen, as JSON and as a plot."""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import uvloop

from loraexport_runtime.errors import InputError

from .drive import Pace, Run, drive, list_models
from .load import Load, Route
from .plot import draw
from .report import summarize, text
from .wire import Place


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns 0 if a request was answered, else 1.

    Raises:
        InputError: a value is not what it may be.
        OSError: nobody listens there, or a file cannot be read or written.
    """
    given = _make_parser().parse_args(arguments)
    key = None if given.key_file is None else Path(given.key_file).read_text().strip()
    place = Place(given.url, key)
    pace = Pace(
        given.seconds,
        clients=(given.clients or 64) if given.rate is None else None,
        rate=given.rate,
        warm_up=given.warm_up,
    )
    if given.words[0] > given.words[1]:
        raise InputError(f"--words {given.words[0]}-{given.words[1]}: the fewest come first")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        load, run = runner.run(_run(place, pace, given))
    figures = summarize(run, load, pace, place.url)
    print(text(figures))
    if given.json is not None:
        Path(given.json).write_text(json.dumps(figures, indent=2) + "\n")
    if given.plot is not None:
        Path(given.plot).write_text(draw(run, load, pace))
    return 0 if figures["statuses"].get("200") else 1


async def _run(place: Place, pace: Pace, given: argparse.Namespace) -> tuple[Load, Run]:
    texts: list[str] = []
    if given.texts is not None:
        texts = [line for line in Path(given.texts).read_text().splitlines() if line.strip()]
        if not texts:
            raise InputError(f"{given.texts}: no line has a text")
    load = Load(
        given.route,
        tuple(given.models or await list_models(place)),
        zipf=given.zipf,
        texts=tuple(texts),
        words=given.words,
        inputs=given.inputs,
        max_tokens=given.max_tokens,
        seed=given.seed,
    )
    return load, await drive(place, load, pace)


def _make_parser() -> argparse.ArgumentParser:
    defaults = Load("embeddings", ())
    parser = argparse.ArgumentParser(
        prog="loraexport-serve bench",
        description="Drive load at a server, and print its throughput and latencies.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, kind: Any, text: str, default: Any = None, **options: Any) -> None:
        parser.add_argument(flag, type=kind, help=text, default=default, **options)

    parser.add_argument("url", metavar="URL", help="of the server, http://HOST:PORT")
    parser.add_argument(
        "--route", choices=get_args(Route), default=defaults.route, help="which one is asked"
    )
    add("--models", _names, "adapters or bases; default: the adapters that it lists", metavar="A,B")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--clients", type=_count, help="a closed loop: each asks again once it is answered"
    )
    pace.add_argument("--rate", type=_above_0, help="an open loop: requests a second, Poisson's")
    add("--seconds", _above_0, "which are counted", 30.0)
    add("--warm-up", _not_below_0, "seconds ahead, which are not", 2.0)
    add("--zipf", _not_below_0, "the k-th model is asked in proportion to k ** -ZIPF", 0.0)
    add("--texts", str, "a text in each line, from which they are drawn", metavar="FILE")
    add("--words", _range, "of a text, where there is no file", defaults.words, metavar="A-B")
    add("--inputs", _count, "texts of a request for embeddings", defaults.inputs)
    add("--max-tokens", _count, "of a completion", defaults.max_tokens)
    add("--seed", int, "of all that is drawn", defaults.seed)
    add("--key-file", str, "holds a client's key", metavar="FILE")
    add("--json", str, "the figures", metavar="FILE")
    add("--plot", str, "an SVG", metavar="FILE")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _not_below_0(text: str) -> float:
    return _above_0(text) if float(text) else 0.0


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return _count(low), _count(high or low)
