"""What clients read when something is wrong: OpenAI's `{"error": {…}}`, always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_adapter.errors import (
    LlamaAdapterError,
    MissingDependencyError,
    QueueFullError,
    ServingError,
    UnavailableError,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
TRY_AGAIN = {"Retry-After": "1"}
_TEXT_KINDS = frozenset(("str", "constrained-str"))
"""What a place ends in where a text or something else was expected."""
TOO_LATE = "the time limit has passed"
ENDING = "the server is shutting down"


class ApiError(ServingError):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's envelope."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(error: Exception) -> ApiError:
    """The answer to an error of ours, or to one that nobody has foreseen."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", headers=TRY_AGAIN)
        case UnavailableError():
            return ApiError(503, str(error), code="unavailable", headers=TRY_AGAIN)
        case MissingDependencyError():
            return ApiError(400, str(error), code="not_installed")
        case LlamaAdapterError():
            return ApiError(400, str(error), code="invalid_request")
    return ApiError(500, "the server has failed to answer this request", code="internal_error")


def _telling(faults: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first fault; where a text or a list was expected, the first one inside the list."""
    first = faults[0]
    place = tuple(first["loc"])
    if not place or place[-1] not in _TEXT_KINDS:
        return first
    before = place[:-1]
    inside = (f for f in faults if tuple(f["loc"][: len(before)]) == before)
    return next((f for f in inside if len(f["loc"]) > len(place)), first)


def as_validation_error(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, by the name of its field."""
    fault = _telling(faults)
    where = [str(step) for step in fault["loc"]]
    if where[:1] in (["body"], ["query"], ["path"]):
        del where[0]
    # behind a field, its kind among several
    field = ".".join(
        step
        for step in where
        if step not in _TEXT_KINDS and not step.startswith(("function-", "list["))
    )
    match fault["type"]:
        case "extra_forbidden":
            similar = fault.get("ctx", {}).get("similar", "")
            message, code = f"field {field!r} is not supported{similar}", "unsupported_field"
        case "json_invalid":
            message, code, field = "the body is not valid JSON", "invalid_json", ""
        case "missing":
            message, code = f"field {field!r} is missing", "missing_field"
        case "model_attributes_type" if not field:
            message, code = (
                "the body must be a JSON object, sent with Content-Type: application/json",
                "invalid_json",
            )
        case _:
            reason = str(fault["msg"]).removeprefix("Value error, ")
            message, code = f"{field}: {reason}" if field else reason, "invalid_value"
    # a body may hold half of a surrogate pair, which no answer can
    message = message[:500].encode(errors="backslashreplace").decode()
    field = field.encode(errors="backslashreplace").decode()[:200]
    return ApiError(400, message, code=code, param=field or None)
