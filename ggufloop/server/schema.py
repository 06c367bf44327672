"""The requests this server understands, as JSON Schema: what `validate.check` checks and /openapi.json shows.

Fields of OpenAI's API that mean nothing here are not listed; a request may have them, and an answer's header
X-Ggufloop-Ignored names them.
"""

from __future__ import annotations

from typing import Any

from ggufloop.loop import DECODES, KV_POLICIES, MODES, ROUTINGS, SOLVERS
from ggufloop.sampling import RANDOM_SEED
from ggufloop.server.loops import FIELDS

Schema = dict[str, Any]

MOST_STOPS, MOST_TOP = 16, 20
_MOST = 2**31 - 1


def _number(low: float, high: float, **more: Any) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high, **more}


def _integer(low: int, high: int, **more: Any) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high, **more}


def _words(known: tuple[str, ...]) -> Schema:
    return {"type": ["string", "null"], "enum": [*known, None]}


_FLAG: Schema = {"type": ["boolean", "null"]}

LOOP: Schema = {
    "description": "what to loop: an object, the same as text ('14:20 k=3 kv=first'), or null for the plain model",
    "anyOf": [
        {"type": "null"},
        {"type": "string", "maxLength": 400},
        {
            "type": "object",
            "required": ["window"],
            "additionalProperties": False,
            "properties": {
                "window": {"type": "string", "maxLength": 32, "description": "'a:b', half-open, or 'auto'"},
                "k": _integer(1, 64),
                "mode": _words(MODES),
                "solver": _words(SOLVERS),
                "damping": _number(0, 2),
                "beta": _number(0, 1),
                "mu": _number(0, 1),
                "passes": _integer(2, 64),
                "kv": _words(KV_POLICIES),
                "decode": {"type": ["string", "null"], "maxLength": 32},
                "routing": _words(ROUTINGS),
                "attention": _integer(1, _MOST),
                "sinks": _integer(0, _MOST),
                "halt": _number(0, 1e30),
            },
        },
    ],
}
CHOICES = {"mode": MODES, "solver": SOLVERS, "kv": KV_POLICIES, "routing": ROUTINGS, "decode": DECODES}
"""The words the fields of a loop may be, for the page."""

assert set(LOOP["anyOf"][2]["properties"]) == set(FIELDS)

_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _integer(0, _MOST),
    "min_p": _number(0, 1),
    "repeat_penalty": _number(1e-6, 1e6),
    "frequency_penalty": _number(-100, 100),
    "presence_penalty": _number(-100, 100),
    "seed": _integer(-1, RANDOM_SEED - 1),
    "logit_bias": {
        "type": ["object", "null"],
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "description": "token id, as text, to what is added to its logit",
    },
}

_COMMON: dict[str, Schema] = {
    "model": {"type": ["string", "null"], "maxLength": 500},
    "loop": LOOP,
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "max_tokens": _integer(1, _MOST),
    "stop": {
        "anyOf": [
            {"type": "null"},
            {"type": "string", "minLength": 1, "maxLength": 500},
            {
                "type": "array",
                "maxItems": MOST_STOPS,
                "items": {"type": "string", "minLength": 1, "maxLength": 500},
            },
        ]
    },
    "n": _integer(1, 1, description="one answer per request"),
    "user": {"type": ["string", "null"], "maxLength": 500, "description": "whose turn it is in the queue"},
    "cache_prompt": {
        **_FLAG,
        "description": "false: answer as if nothing had been said before (docs/server.md); default true",
    },
    "response_format": {
        "type": ["object", "null"],
        "required": ["type"],
        "properties": {
            "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
            "schema": {"type": "object"},
            "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}},
        },
    },
    **_SAMPLING,
}

_PARTS: Schema = {
    "anyOf": [
        {"type": "null"},
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
            },
        },
    ]
}

_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": _PARTS,
        "name": {"type": ["string", "null"]},
        "tool_call_id": {"type": ["string", "null"]},
        "tool_calls": {
            "type": ["array", "null"],
            "items": {
                "type": "object",
                "required": ["function"],
                "properties": {
                    "id": {"type": "string"},
                    "type": {"type": "string"},
                    "function": {
                        "type": "object",
                        "required": ["name", "arguments"],
                        "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
                    },
                },
            },
        },
    },
}

_FUNCTION: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
    },
}

CHAT: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "maxItems": 10000, "items": _MESSAGE},
        "max_completion_tokens": _integer(1, _MOST),
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, MOST_TOP),
        "tools": {
            "type": ["array", "null"],
            "maxItems": 128,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {"type": {"type": "string", "enum": ["function"]}, "function": _FUNCTION},
            },
        },
        "tool_choice": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "required": ["function"],
                    "properties": {
                        "function": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {"name": {"type": "string"}},
                        }
                    },
                },
            ]
        },
        **_COMMON,
    },
}

COMPLETION: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "string"}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": _MOST}},
            ]
        },
        "echo": _FLAG,
        "logprobs": _integer(0, MOST_TOP),
        **_COMMON,
    },
}

TOKENIZE: Schema = {
    "type": "object",
    "required": ["content"],
    "properties": {
        "content": {"type": "string"},
        "add_special": _FLAG,
        "parse_special": _FLAG,
    },
}

DETOKENIZE: Schema = {
    "type": "object",
    "required": ["tokens"],
    "properties": {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _MOST}}},
}


def ignored(body: dict[str, Any], schema: Schema) -> list[str]:
    """The fields of a request that its schema does not know."""
    return sorted(name for name in body if name not in schema["properties"])
