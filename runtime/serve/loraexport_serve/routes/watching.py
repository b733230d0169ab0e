"""What operators watch: GET /metrics for Prometheus, and GET /, a page that shows it to a person.

Metrics name adapters, and so tenants; the page itself names none, as a browser that opens it sends
no token: its script asks /metrics, with a token where one is needed.
"""

import base64
import hashlib
import re
from importlib import resources

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..service import Service
from .endpoint import Call, Html, get

_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """A Content-Security-Policy: a page's own script and style, by digest, and its own server."""
    sources = {
        name: " ".join(f"'sha256-{_digest(text)}'" for text in _inside(name, page))
        for name in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _inside(name: str, page: str) -> list[str]:
    return re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_HEADERS = {
    "content-security-policy": _policy(_PAGE),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def routes(service: Service) -> list[Route]:
    """Metrics are for operators, of a server without keys for anybody; the page is for anybody."""
    return [
        get(service, "/", Html, _page, "anybody", needs_ready=False),
        get(service, "/metrics", str, _metrics, "trusted", needs_ready=False),
    ]


async def _page(call: Call[None]) -> Response:
    """A page for a person: models, adapters, slots, queues and latencies, as they are now."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


async def _metrics(call: Call[None]) -> Response:
    """Prometheus' text format."""
    content = generate_latest(call.service.meter.registry)
    return Response(content, media_type=CONTENT_TYPE_LATEST)
