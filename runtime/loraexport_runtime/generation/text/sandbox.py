"""Renders chat templates. A program of its own, which generation/text/renderer.py starts and ends.

It takes requests on stdin and answers on stdout, each a length and so many bytes. Of the other
modules it imports none: it is started by its path, in Python's isolated mode.
"""

import codecs
import importlib
import json
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import IO, Any

STARTED, RENDERED, REFUSED, PAST_BOUNDS = b"+", b"=", b"!", b">"
"""The first byte of an answer."""
HEADER = struct.Struct(">cI")
"""Of an answer: its first byte, and how many bytes of text follow."""
LENGTH = struct.Struct(">I")
"""Of a request."""
MAX_STEPS = 1_000_000
"""Turns of loops and calls of macros: a chat of a thousand messages takes some ten thousand."""
MAX_TEXT = 2**24
"""Characters of a rendered chat: far more than any context holds."""
MEMORY = 2**30
"""Bytes of address space, Python's own included."""
_KEPT = 8
"""Templates that stay compiled."""


class PastBoundsError(Exception):
    """A template takes more steps, or writes more text, than it may."""


def main() -> None:
    """Answer requests until stdin ends. Arguments: CPU seconds of each, folders to import from."""
    seconds, *folders = sys.argv[1:]
    sys.path += [folder for folder in folders if folder not in sys.path]
    environment = make_environment()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _limit()
    templates: dict[str, Any] = {}
    _send(answers, STARTED, "")
    while len(header := requests.read(LENGTH.size)) == LENGTH.size:
        request = json.loads(requests.read(*LENGTH.unpack(header)))
        _set_timer(float(seconds))
        status, text = _answer(environment, templates, request)
        _set_timer(0.0)
        _send(answers, status, text)


def make_environment() -> Any:
    """Jinja as transformers sets it up for chat templates, with a counter of steps in its loops."""
    import jinja2
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    def count() -> nodes.Node:
        return nodes.ExprStmt(nodes.EnvironmentAttribute("step"))

    class CountedCode(CodeGenerator):
        """All that a template can do again and again is a loop or a macro: each body counts."""

        def visit_For(self, node: Any, frame: Any) -> None:  # noqa: N802
            node.body.insert(0, count())
            super().visit_For(node, frame)

        def macro_body(self, node: Any, frame: Any) -> Any:
            node.body.insert(0, count())
            return super().macro_body(node, frame)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = CountedCode
        steps = 0

        @property
        def step(self) -> None:
            """To read it is one more: a call would pass through the sandbox, and take ten times."""
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise PastBoundsError(f"more than {MAX_STEPS:,} turns of its loops and macros")

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}` mark what an assistant has said: its text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            said = self.call_method("_say")
            return nodes.CallBlock(said, [], [], body).set_lineno(line)

        def _say(self, caller: Any) -> Any:
            return caller()

    class Names(Namespace):
        """A namespace without names of Python's own."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            values = dict(*rest, **kwargs)
            for name in values:
                _require_plain(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: Any, value: Any) -> None:
            _require_plain(name)
            super().__setitem__(name, value)

    class Objects:
        """`dict(…)` and `dict.fromkeys(…)`, without the class itself."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def _require_plain(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no place for {name!r}")

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Objects(),
        "namespace": Names,
    }
    return environment


def render(environment: Any, template: Any, variables: dict[str, Any]) -> str:
    """The text of a compiled template.

    Raises:
        PastBoundsError: it takes too many steps, or writes too much.
    """
    environment.steps = 0
    return "".join(_bounded(template.generate(**variables)))


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    length = 0
    for part in parts:
        length += len(part)
        if length > MAX_TEXT:
            raise PastBoundsError(f"more than {MAX_TEXT:,} characters of text")
        yield part


def _answer(
    environment: Any, templates: dict[str, Any], request: dict[str, Any]
) -> tuple[bytes, str]:
    source = request["template"]
    try:
        if source not in templates:
            while len(templates) >= _KEPT:
                del templates[next(iter(templates))]
            templates[source] = environment.from_string(source)
        return RENDERED, render(environment, templates[source], request["variables"])
    except PastBoundsError as error:
        return PAST_BOUNDS, str(error)
    except RecursionError:
        return PAST_BOUNDS, "macros or brackets too deep in one another"
    except MemoryError:
        return PAST_BOUNDS, f"more than {MEMORY >> 20} MiB of memory"
    except (OSError, ImportError):
        return PAST_BOUNDS, "it needs a file"
    except Exception as error:  # of whatever a template can run into
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        return REFUSED, f"{error or type(error).__name__}{where}"


def _limit() -> None:
    """No file is opened or written from here on, and memory is bounded, where there are limits."""
    # What Jinja, or Python for it, imports late, when no file can be opened any more.
    for module in ("jinja2.constants", "jinja2.debug", "linecache", "textwrap", "traceback"):
        importlib.import_module(module)
    for codec in ("unicode_escape", "ascii", "latin-1", "utf-8", "utf-16", "utf-32"):
        codecs.lookup(codec)
    try:
        import resource
    except ImportError:  # Windows: the renderer's clock alone ends a template
        return
    limits = {"AS": MEMORY, "NOFILE": 3, "FSIZE": 0, "CORE": 0, "NPROC": 0}
    for name, limit in limits.items():
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _set_timer(seconds: float) -> None:
    """End this process after so much CPU time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _send(answers: IO[bytes], status: bytes, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    answers.write(HEADER.pack(status, len(data)) + data)
    answers.flush()


if __name__ == "__main__":
    main()
