"""Bodies of requests: JSON or, with a picture, multipart; read with limits, checked strictly, described in OpenAPI.

Nothing here parses on the event loop: a body is read by it and taken apart in a thread.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any, TypeVar, overload

from fastapi import FastAPI, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from causalreel.foreign import parse_json
from causalreel.infer import values
from causalreel.infer.commands import COMMANDS, MOST_VALUES
from causalreel.infer.values import Reads
from causalreel.serve.guard import SMALL, too_large
from causalreel.serve.safety import ApiError
from causalreel.serve.wire import ErrorView, Record, SessionRequest, VideoRequest

Body = TypeVar("Body")
FIELDS = 16
"""Most fields of a form."""
FILES = ("image", "video")
"""Those of them that are files."""
REFERENCE = "#/components/schemas/{model}"
CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)
BOUNDARY = re.compile(
    r""";\s*boundary\s*=\s*(?:"([0-9a-z'()+_,./:=? -]{1,70})"|([0-9a-z'()+_,./:=?-]{1,70}))""", re.IGNORECASE
)


@overload
async def read_body(request: Request, cls: type[Body]) -> Body: ...
@overload
async def read_body(request: Request, cls: None) -> dict[str, Any]: ...
async def read_body(request: Request, cls: type[Body] | None) -> Body | dict[str, Any]:
    """The body as a dataclass of `values`, or as the fields of a JSON object if that is None; ApiError."""
    content_type = request.headers.get("content-type", "")
    kind, charset = content_type.partition(";")[0].strip().lower(), CHARSET.search(content_type)
    takes_forms = cls is not None and any(one.name == "image" for one in values.parameters(cls))
    if kind != "application/json" and not (takes_forms and kind == "multipart/form-data"):
        ways = "application/json or multipart/form-data" if takes_forms else "application/json"
        raise ApiError(415, "unsupported_type", f"the body must be {ways}")
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "unsupported_type", "the body must be UTF-8, and its charset utf-8 if one is named")
    body, service = await request.body(), request.app.state.service
    if kind == "application/json":
        return await service.work(_read_json, body, cls, service.encoded_picture)
    boundary = BOUNDARY.search(content_type)
    if boundary is None:
        raise ApiError(400, "invalid_request", "the content type of a form must name its boundary")
    assert cls is not None
    return await service.work(_read_form, body, boundary[1] or boundary[2], cls, service.encoded_picture)


async def read_json(request: Request) -> bytes:
    """The body of a request that must be JSON, unread; ApiError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_type", "the body must be application/json")
    return await request.body()


def _read_json(body: bytes, cls: type[Body] | None, picture: Reads | None = None) -> Body | dict[str, Any]:
    try:
        fields = parse_json(body.decode("utf-8"), "the body", items=MOST_VALUES)
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_request", "the body must be UTF-8") from error
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from error
    if len(body) - sum(len(fields[name]) for name in FILES if isinstance(fields.get(name), str)) > SMALL:
        raise too_large(SMALL)
    return fields if cls is None else _read(cls, fields, picture)


def _read_form(body: bytes, boundary: str, cls: type[Body], picture: Reads) -> Body:
    """Fields of a form in UTF-8; a file becomes base64, as it would be in JSON."""
    form = _Form()
    try:
        parser = MultipartParser(boundary.encode("ascii"), form.callbacks())
        parser.write(body)
        parser.finalize()
        fields = form.fields()
    except (FormParserError, UnicodeDecodeError) as error:
        raise ApiError(400, "invalid_request", "the form cannot be read") from error
    kinds = {one.name: one.kind for one in values.parameters(cls)}
    given = {name: kinds[name].typed(text) if name in kinds else text for name, text in fields.items()}
    return _read(cls, given, picture)


def _read(cls: type[Body], fields: dict[str, Any], picture: Reads | None) -> Body:
    try:
        return values.read(cls, fields, what="the body", picture=picture)
    except ValueError as error:
        status = 422 if isinstance(error, values.WrongKind) else 400
        raise ApiError(status, "invalid_request", str(error)) from error


class _Form:
    """What the parser of a form finds."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bool, bytearray]] = []
        """Name, whether it is a file, content."""
        self.header, self.value, self.disposition = bytearray(), bytearray(), b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self.begin,
            "on_header_field": lambda data, start, end: self.header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self.value.extend(data[start:end]),
            "on_header_end": self.end_header,
            "on_headers_finished": self.end_headers,
            "on_part_data": lambda data, start, end: self.parts[-1][2].extend(data[start:end]),
        }

    def begin(self) -> None:
        self.disposition = b""
        if len(self.parts) == FIELDS:
            raise ApiError(400, "invalid_request", f"a form must have at most {FIELDS} fields")

    def end_header(self) -> None:
        if bytes(self.header).lower() == b"content-disposition":
            self.disposition = bytes(self.value)
        self.header.clear()
        self.value.clear()

    def end_headers(self) -> None:
        options = parse_options_header(self.disposition)[1]
        if b"name" not in options:
            raise ApiError(400, "invalid_request", "every part of a form must have a name")
        self.parts.append((options[b"name"].decode("utf-8"), b"filename" in options, bytearray()))

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, is_file, content in self.parts:
            if name in found:
                raise ApiError(400, "invalid_request", "a field must be given once")
            if is_file != (name in FILES):
                raise ApiError(400, "invalid_request", "image and video must be files, and nothing else may be one")
            if not is_file and len(content) > SMALL:
                raise too_large(SMALL)
            found[name] = base64.b64encode(content).decode() if is_file else content.decode("utf-8")
        return found


def takes(model: str | type, *, multipart: bool = False) -> dict[str, Any]:
    """What a route says of its body in OpenAPI: a dataclass of `values`, or the name of what `describe` adds."""
    schema = {"$ref": REFERENCE.format(model=model)} if isinstance(model, str) else values.schema(model)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if multipart:
        content["multipart/form-data"] = {"schema": {"$ref": REFERENCE.format(model=f"{model}Form")}}
    return {"requestBody": {"required": True, "content": content}}


MEANINGS = {
    400: "The request asks for what cannot be done.",
    401: "The bearer token is missing or wrong.",
    403: "The page that asks is of another site.",
    404: "There is nothing of that id.",
    408: "The body did not arrive in time.",
    409: "The video is not completed.",
    413: "The body is too large.",
    415: "The body is of a type, or in a character set, that is not taken.",
    416: "The range is not one of the file.",
    421: "The server does not go by that name.",
    422: "A field is missing, unknown or of the wrong type.",
    429: "Too many requests, or too many videos that wait; retry-after says when to try again.",
    431: "The headers are too long.",
    500: "An error of the server, which its log has under the number in the message.",
    503: "Everything is taken, or the server is about to end.",
    507: "The server keeps as many videos as it may, or cannot write to its disk.",
}
"""Statuses of errors, and what they mean."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says of its errors in OpenAPI."""
    return {status: {"model": ErrorView, "description": MEANINGS[status]} for status in statuses}


DOOR = errors(400, 401, 403, 413, 421, 429, 431, 500)
"""What the doorkeeper may answer, whatever the route."""
BODY = errors(408, 415, 503)
"""Further errors of routes that take a body."""


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The application's own `openapi`, with the bodies and the token added."""
    describe_routes = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = describe_routes()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (SessionRequest, VideoRequest):
            about = {"title": model.__name__, "description": " ".join((model.__doc__ or "").split())}
            schemas[model.__name__] = schema = {**about, **values.schema(model)}
            files = {name: {"type": "string", "format": "binary"} for name in FILES if name in schema["properties"]}
            form = schema["properties"] | files
            schemas[f"{model.__name__}Form"] = schema | {"title": f"{model.__name__}Form", "properties": form}
        schemas["Record"] = Record.model_json_schema(ref_template=REFERENCE)
        for name, kind in COMMANDS.items():
            schema = values.schema(kind)
            schema["properties"] = {"name": {"type": "string", "const": name}} | schema["properties"]
            about = {"title": f"{kind.__name__}Command", "description": " ".join((kind.__doc__ or "").split())}
            schemas[about["title"]] = about | schema | {"required": ["name", *schema.get("required", ())]}
        every = {name: REFERENCE.format(model=f"{kind.__name__}Command") for name, kind in COMMANDS.items()}
        schemas["CommandRequest"] = {
            "oneOf": [{"$ref": place} for place in every.values()],
            "discriminator": {"propertyName": "name", "mapping": every},
        }
        for unused in ("HTTPValidationError", "ValidationError"):  # the framework's own, which no answer has
            schemas.pop(unused, None)
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
        bearer = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"token": bearer}
        document["security"] = [{"token": []}, {}]
        app.openapi_schema = document
        return document

    return complete
