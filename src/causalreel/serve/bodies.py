"""Bodies of requests: JSON or, with a picture, multipart; read with limits, checked strictly, described in OpenAPI."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, TypeVar, overload

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from causalreel.serve.safety import ApiError
from causalreel.serve.wire import COMMANDS, SessionRequest, VideoRequest

Model = TypeVar("Model", bound=BaseModel)
FIELDS = 16
"""Most fields of a form."""
REFERENCE = "#/components/schemas/{model}"


@overload
async def read_model(request: Request, model: type[Model]) -> Model: ...
@overload
async def read_model(request: Request, model: None) -> dict[str, Any]: ...
async def read_model(request: Request, model: type[Model] | None) -> Model | dict[str, Any]:
    """The body as `model`, or as the fields of a JSON object if that is None; ValidationError or ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if model is not None and kind == "multipart/form-data":
        return model.model_validate(await _form(request))  # the values of a form are text: not strict
    if kind != "application/json":
        raise ApiError(415, "unsupported_type", "the body must be application/json" + _or_form(model))
    body = await request.body()
    if model is not None:
        return model.model_validate_json(body, strict=True)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_request", "the body must be JSON") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return fields


def _or_form(model: type[BaseModel] | None) -> str:
    return "" if model is None else " or multipart/form-data"


async def _form(request: Request) -> dict[str, Any]:
    """Fields of a form; a file becomes base64, as it would be in JSON."""
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=FIELDS) as form:
        for name, value in form.multi_items():
            if name in fields:
                raise ApiError(400, "invalid_request", "a field must be given once")
            is_file = isinstance(value, UploadFile)
            if is_file != (name == "image"):
                raise ApiError(400, "invalid_request", "image must be a file, and nothing else may be one")
            fields[name] = base64.b64encode(await value.read()).decode() if isinstance(value, UploadFile) else value
    return fields


def takes(model: str, *, multipart: bool = False) -> dict[str, Any]:
    """What a route says of its body in OpenAPI."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": REFERENCE.format(model=model)}}}
    if multipart:
        content["multipart/form-data"] = {"schema": {"$ref": REFERENCE.format(model=f"{model}Form")}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The application's own `openapi`, with the bodies and the token added."""
    describe_routes = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = describe_routes()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (SessionRequest, VideoRequest):
            schemas[model.__name__] = schema = model.model_json_schema(ref_template=REFERENCE)
            form = {**schema["properties"], "image": {"type": "string", "format": "binary"}}
            schemas[f"{model.__name__}Form"] = {**schema, "title": f"{model.__name__}Form", "properties": form}
        command = COMMANDS.json_schema(ref_template=REFERENCE)
        schemas |= command.pop("$defs")
        schemas["CommandRequest"] = command
        bearer = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"token": bearer}
        document["security"] = [{"token": []}, {}]
        app.openapi_schema = document
        return document

    return complete
