"""Requests made from the served OpenAPI document, right and wrong: no server error, only documented answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import Server

from ggufloop.sampling import Sampling

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis comes with the extra dev")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = {"/v1/chat/completions": 25, "/v1/completions": 25}
FEW = 8


@pytest.fixture(scope="module")
def server(tiny_model: Callable[[str], Path]) -> Iterator[Server]:
    limits = {"max_tokens": 2, "prompt_tokens": 200}
    with Server(tiny_model("llama"), limits=limits, suggested=(2, 5), sampling=Sampling(n=2)) as server:
        yield server


def mend(body: Any) -> Any:
    """A right request made one that can be answered: what JSON Schema cannot say of it is made true."""
    if not isinstance(body, dict):
        return body
    body = {name: value for name, value in body.items() if name not in ("model", "echo", "tool_choice")}
    if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], int):
        body["prompt"] = [token % 256 for token in body["prompt"]]
    if isinstance(body.get("loop"), dict):
        kept = ("k", "kv", "beta", "attention")
        body["loop"] = {"window": "2:5", **{name: body["loop"][name] for name in kept if name in body["loop"]}}
    elif isinstance(body.get("loop"), str):
        body["loop"] = "2:4 k=2 kv=each"
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(i): value for i, value in enumerate(body["logit_bias"].values())}
    if isinstance(body.get("response_format"), dict):
        body["response_format"] = {"type": "json_object"}
    for message in body.get("messages", ()):
        message.setdefault("content", "text")
        message["content"] = message["content"] or "text"
    return body


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_no_request_makes_the_server_fail(mode: Any, server: Server) -> None:
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json)
    schema.config.update(base_url=server.url)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 9
    statuses: dict[int, int] = {}
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.method == "post":
            fuzz(operation, mode, statuses)
    assert set(statuses) <= {200, 400, 404, 413}
    assert statuses.get(200 if mode is GenerationMode.POSITIVE else 400, 0) > 30, statuses
    assert server.complete("still there", max_tokens=1).status == 200


def fuzz(operation: Any, mode: Any, statuses: dict[int, int]) -> None:
    """Call an operation with examples of its own, and count what comes back."""

    @settings(
        max_examples=EXAMPLES.get(operation.path, FEW), deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        bodies = [case.body]
        if mode is GenerationMode.POSITIVE and operation.method == "post":
            bodies.append(mend(case.body))
        for body in bodies:
            case.body = body
            response = case.call_and_validate(checks=CHECKS)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    run()
