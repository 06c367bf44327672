"""The server's API as an OpenAPI document, from the schemas that requests are checked against."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ggufloop.server import schema
from ggufloop.server.loops import Served

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens", "loop"],
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
_TOKENS = {"type": "array", "items": {"type": "integer"}}


def own_version() -> str:
    """This project's version; a checkout that is not installed has none."""
    try:
        return version("ggufloop")
    except PackageNotFoundError:
        return "not installed"


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _answer(kind: str) -> dict[str, Any]:
    return _object(
        id={"type": "string"},
        object={"type": "string", "enum": [kind]},
        created={"type": "integer"},
        model={"type": "string"},
        choices={"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "object"}},
        usage=_USAGE,
        seed={"type": "integer"},
        timings={"type": "object"},
    )


def document(served: Served) -> dict[str, Any]:
    """The document of a server of this model."""
    key: dict[str, Any] = {"BearerAuth": []}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ggufloop", "version": own_version(), "description": f"serves {served.name}"},
        "security": [{}, key],
        "components": {
            "securitySchemes": {"BearerAuth": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
        "paths": {
            "/v1/chat/completions": _post("An answer to messages", schema.CHAT, _answer("chat.completion"), loop=True),
            "/v1/completions": _post("A text continued", schema.COMPLETION, _answer("text_completion"), loop=True),
            "/v1/models": _get("The model's names", _object(object={"type": "string"}, data={"type": "array"})),
            "/tokenize": _post("The tokens of a text", schema.TOKENIZE, _object(tokens=_TOKENS)),
            "/detokenize": _post("The text of tokens", schema.DETOKENIZE, _object(content={"type": "string"})),
            "/health": _get("Whether the model is loaded", _object(status={"type": "string"})),
            "/props": _get("What is served", _object(model={"type": "string"}, n_layer={"type": "integer"})),
            "/metrics": {
                "get": {"summary": "Prometheus text", "responses": _responses("text/plain", {"type": "string"})}
            },
            "/openapi.json": _get("This document", {"type": "object"}),
        },
    }


def _get(summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses("application/json", answer)}}


def _post(summary: str, form: dict[str, Any], answer: dict[str, Any], loop: bool = False) -> dict[str, Any]:
    responses = _responses("application/json", answer)
    operation: dict[str, Any] = {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": form}}},
        "responses": responses,
    }
    if loop:
        responses["200"]["content"]["text/event-stream"] = {"schema": {}}
        header = {"name": "X-Ggufloop-Loop", "in": "header", "required": False, "schema": {"type": "string"}}
        operation["parameters"] = [{**header, "description": "as the body's loop, as text; 'off' for none"}]
    return {"post": operation}


def _responses(media: str, answer: dict[str, Any]) -> dict[str, Any]:
    refused = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    told = {
        "400": "The request is not one of this API",
        "401": "The API key is missing or wrong",
        "403": "A request of another page",
        "404": "No such model",
        "408": "The body did not come",
        "413": "The body is too large",
        "503": "Loading, full or stopping; see Retry-After",
    }
    responses: dict[str, Any] = {status: {"description": text, **refused} for status, text in told.items()}
    return {"200": {"description": "The answer", "content": {media: {"schema": answer}}}, **responses}
