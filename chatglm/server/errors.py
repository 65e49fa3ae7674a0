"""Errors as OpenAI's servers write them: {"error": {"message", "type", "param", "code"}}, for every route."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from chatglm.engine.request import SchemaTooComplex

logger = logging.getLogger("chatglm.server")

LONGEST_VALUE = 60  # characters of a wrong value that an error repeats
INTERNAL = "The server failed at this request; its log tells why."
SCHEMA = "response_format.json_schema.schema"
# What pydantic's kinds of errors are in words that need no knowledge of Python.
RULES = {
    "string_type": "it should be a string",
    "int_type": "it should be a whole number",
    "int_parsing_size": "it should be a number of 64 bits",
    "float_type": "it should be a number",
    "finite_number": "it should be a finite number",
    "bool_type": "it should be true or false",
    "list_type": "it should be a list",
    "dict_type": "it should be an object",
    "model_attributes_type": "it should be an object",
    "model_type": "it should be an object",
    "too_short": "it should have at least {min_length}",
    "too_long": "it should have at most {max_length}",
}
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refusal: one sentence, the field it is about, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(error: BaseException | None) -> ApiError:
    """What a client is told of an answer that ended in this error, perhaps when half of it was sent."""
    if isinstance(error, SchemaTooComplex):
        return ApiError(400, str(error), SCHEMA, "invalid_value")
    return ApiError(500, INTERNAL, code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Puts every error that a route or the router raises into one shape."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    where = f"{request.method} {request.url.path[:LONGEST_VALUE]}"
    message = {
        404: f"There is no {where}; /docs lists what there is.",
        405: f"{where} is not possible; /docs lists what is.",
    }.get(error.status_code, f"{HTTPStatus(error.status_code).phrase}.")
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors(), error.body).response()


def invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The refusal for what pydantic found: a sentence about the first fault that lies deepest."""
    worst = max(errors, key=lambda error: len(_path(error, body)))
    path = _path(worst, body)
    param = ".".join(map(str, path)) or None
    name = param or "The body"
    if worst["type"] == "missing":
        if not path:
            return ApiError(400, "The request has no body; send a JSON object.", code="invalid_json")
        message = f"{name} is missing."
    elif worst["type"] == "extra_forbidden":
        message = f"{name} is no field of this request; leave it out. /docs lists the fields."
    elif worst["type"] == "refused":  # by a check of ours, see schemas.py
        param = ".".join(map(str, [*path, worst["ctx"]["param"]]))
        message = worst["ctx"]["error"]
    else:
        rule = RULES.get(worst["type"]) or worst["msg"].replace("Input should be", "it should be").rstrip(".")
        rule = (
            rule.format_map(worst.get("ctx", {})) if worst["type"] in RULES else rule[:1].lower() + rule[1:]
        )
        message = f"{name} is {shown(worst.get('input'))}; {rule}."
    return ApiError(400, message, param, code="invalid_value")


def _path(error: Mapping[str, Any], body: Any) -> list[Any]:
    """Where in the body the error is. Pydantic's location also has "body" and the names of types, which are dropped."""
    path: list[Any] = []
    place, steps = body, error["loc"][1:]
    for i, step in enumerate(steps):
        if isinstance(place, Mapping) and (step in place or i == 0 or _is_missing(error, i)):
            place = place.get(step)
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            place = place[step]
        else:
            continue
        path.append(step)
    return path


def _is_missing(error: Mapping[str, Any], step: int) -> bool:
    return error["type"] == "missing" and step == len(error["loc"]) - 2


def shown(value: Any) -> str:
    """A wrong value as an error repeats it: short, and on one line."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits cannot be printed
        text = "a very large number"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
