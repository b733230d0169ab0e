"""`loraexport-serve triton`: flags -> a model repository."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from loraexport_runtime.errors import InputError

from .repository import Options, write_repository


def main(arguments: Sequence[str]) -> int:
    """Run the command. Raises LoraexportError."""
    given = _make_parser().parse_args(arguments)
    artifact = Path(given.artifact)
    if given.key_file is not None and given.socket is None:
        raise InputError("--key-file is of the server at --socket")
    options = Options(
        name=given.name or artifact.resolve().name,
        socket=given.socket,
        key_file=given.key_file,
        device=given.device,
        rows=given.rows,
        most_queued=given.most_queued,
        timeout=given.timeout,
    )
    folder = write_repository(artifact, Path(given.out), options)
    print(f"{folder}: start it with tritonserver --model-repository {given.out}")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    defaults = Options("")
    parser = argparse.ArgumentParser(
        prog="loraexport-serve triton",
        description="Write a Triton model repository (python backend) of an artifact.",
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument("--out", required=True, metavar="REPO", help="the repository's folder")
    parser.add_argument(
        "--name", help="the model's name, and at --socket the artifact's (default: the folder's)"
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="Unix socket of a server that runs beside Triton; default: the artifact is copied into"
        " the repository and opened in Triton's process, whose Python then has loraexport-serve",
    )
    parser.add_argument("--key-file", metavar="FILE", help="holds a key of that server")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=defaults.device,
        help="in process (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=_count, default=defaults.rows, help="of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--most-queued",
        type=_count,
        default=defaults.most_queued,
        help="requests that may wait in Triton (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="SECONDS",
        help="a request that waits longer is refused (default: %(default)g)",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value
