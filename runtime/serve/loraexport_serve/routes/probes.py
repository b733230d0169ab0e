"""What an orchestrator asks: alive, started, ready; and which version it is."""

from starlette.responses import Response
from starlette.routing import Route

from ..service import Phase, Service
from ..version import __version__
from .endpoint import Call, Json, get


def routes(service: Service) -> list[Route]:
    """Open to anybody, and there before an artifact is loaded."""
    answers = {
        "/livez": _live,
        "/startupz": _started,
        "/readyz": _ready,
        "/health": _ready,
        "/ping": _ready,
        "/version": _version,
    }
    return [
        get(service, path, dict[str, str], answer, "anybody", needs_ready=False)
        for path, answer in answers.items()
    ]


async def _live(call: Call[None]) -> Response:
    """Whether the process serves; 503 where another start alone helps."""
    dead = any(host.is_dead for host in call.service.catalog)
    return _status(call.service.phase is not Phase.FAILED and not dead, call.service)


async def _started(call: Call[None]) -> Response:
    """Whether the artifacts are open and warm."""
    return _status(call.service.phase in (Phase.READY, Phase.DRAINING), call.service)


async def _ready(call: Call[None]) -> Response:
    """Whether requests are taken; not while it drains, or fails again and again."""
    return _status(call.service.is_ready, call.service)


async def _version(call: Call[None]) -> Response:
    """The server's version."""
    return Json({"version": __version__})


def _status(is_well: bool, service: Service) -> Response:
    phase = service.phase.value
    if service.phase is Phase.READY and not service.is_ready:
        phase = "failing"
    return Json({"status": phase}, 200 if is_well else 503)
