"""The errors of the server: what a client is answered, and what stops a start.

A client's answer is in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, with the
status of what went wrong. What is no fault of the request is 500, and its text stays in the log.
"""

from collections.abc import Mapping
from typing import Any

from loraexport_runtime import (
    AdapterError,
    ArtifactError,
    BatchError,
    ClosedError,
    LoraexportError,
    NoNumberError,
    QueueFullError,
    RequestTimeoutError,
    SlotsExceededError,
    SlotTimeoutError,
    UnknownAdapterError,
    WeightsError,
)
from loraexport_runtime.contract.strict_yaml import ProblemsError

RETRY_AFTER = "1"
"""Seconds after which a client that was refused for load may come again."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    501: "invalid_request_error",
    503: "service_unavailable_error",
}


class SettingsError(ProblemsError):
    """The settings, or a file of keys, break their contract; nothing was started."""


class ApiError(Exception):
    """What a request is answered in place of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = _TYPES.get(status, "invalid_request_error") if kind is None else kind
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", RETRY_AFTER)
        if status == 401:
            self.headers.setdefault("www-authenticate", "Bearer")

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def invalid(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """400: the request cannot be served as asked."""
    return ApiError(400, message, code=code, param=param)


def unsupported(param: str, why: str) -> ApiError:
    """400: a parameter that would be ignored otherwise."""
    return ApiError(400, f"{param}: {why}", code="unsupported_parameter", param=param)


def unknown_model(name: str) -> ApiError:
    """404, of a name that is not there and of one that is another's alike."""
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found", param="model")


def of_error(error: BaseException) -> ApiError | None:
    """What a request is answered for an error of the runtime; None: it is no fault of its own."""
    match error:
        case ApiError():
            return error
        case UnknownAdapterError():
            return ApiError(404, "the adapter was unloaded meanwhile", code="model_not_found")
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full")
        case RequestTimeoutError():
            return ApiError(408, str(error), code="timeout")
        case SlotTimeoutError():
            return ApiError(429, str(error), code="slots_busy")
        case SlotsExceededError():
            return ApiError(429, "every slot is kept for pinned adapters", code="slots_pinned")
        case ClosedError():
            return ApiError(503, "the artifact is being closed; try again", code="closed")
        case NoNumberError():
            return no_number(str(error))
        case BatchError():
            return invalid(str(error))
        case _:
            return None


def no_number(text: str) -> ApiError:
    """For whom the model gave NaN or infinity: that is the adapter's fault, or the input's."""
    return ApiError(400, text, code="no_number")


def of_adapter(error: LoraexportError) -> ApiError | None:
    """The same for what an adapter's files hold; the folder's path stays out of it."""
    if isinstance(error, AdapterError | WeightsError | ArtifactError):
        return ApiError(400, str(error), code="invalid_adapter", kind="InvalidUserInput")
    return of_error(error)
