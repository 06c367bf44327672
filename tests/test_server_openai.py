"""OpenAI's own client against a server of a real model, and the same text from `run`, the Python API and the server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server

from ggufloop.chat import Conversation
from ggufloop.engine import LoopedLlama
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.template import ChatTemplate

openai = pytest.importorskip("openai", reason="openai comes with the extra dev")

pytestmark = pytest.mark.model

ENGINE = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
LOOP = "12:16 k=3"
QUESTION = "Name three colours."
CLI = [sys.executable, "-c", "from ggufloop.cli import main; main()"]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with Server(
        smollm2, n_ctx=1024, cuts=(1024, 512), engine=ENGINE, name="smollm2-135m", suggested=(12, 16),
        loop=LoopSpec.parse(LOOP),
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: Any, text: str = QUESTION, **fields: Any) -> Any:
    settings = {"model": "smollm2-135m", "seed": 5, "max_tokens": 16, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **settings)


@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_run_the_python_api_and_the_server_say_the_same(temp: float, client: Any, smollm2: Path) -> None:
    llm = LoopedLlama(smollm2, n_ctx=1024, n_batch=1024, n_ubatch=512, loop=LOOP, **ENGINE)
    template = ChatTemplate.of(llm)
    assert template is not None
    sampling = Sampling(temp=temp, seed=5, n=16)
    texts = [Conversation(llm, template, sampling).ask(QUESTION).text]
    llm.close()
    context = ["-c", "1024", "-b", "1024", "-ub", "512", "-t", "1"]
    flags = [*context, "--window", "12:16", "--K", "3", "-s", "5", "-n", "16", "--temp", str(temp), "-p", QUESTION]
    done = subprocess.run([*CLI, "run", str(smollm2), *flags], capture_output=True, text=True, check=True)
    texts.append(done.stdout.removesuffix("\n"))
    for suffix in ("", "@12:16x3"):
        answer = ask(client, model=f"smollm2-135m{suffix}", temperature=temp)
        texts.append(answer.choices[0].message.content)
        assert answer.usage.loop["text"] == LOOP
    pieces = [c.choices[0].delta.content or "" for c in ask(client, temperature=temp, stream=True) if c.choices]
    texts.append("".join(pieces))
    assert len(set(texts)) == 1
    assert len(pieces) > 4


def test_a_loop_for_one_request_changes_it_and_no_other(client: Any) -> None:
    looped = ask(client, temperature=0).choices[0].message.content
    wild = ask(client, temperature=0, extra_body={"loop": {"window": "12:16", "k": 4, "solver": "naive"}})
    plain = ask(client, temperature=0, extra_body={"loop": None})
    assert plain.usage.loop is None
    assert wild.usage.loop["solver"] == "naive"
    assert wild.choices[0].message.content not in (looped, plain.choices[0].message.content)
    header = ask(client, temperature=0, extra_headers={"X-Ggufloop-Loop": "off"})
    assert header.choices[0].message.content == plain.choices[0].message.content
    assert ask(client, temperature=0).choices[0].message.content == looped


def test_what_else_the_client_can_ask(client: Any) -> None:
    assert "smollm2-135m@12:16x3" in [model.id for model in client.models.list()]
    assert client.models.retrieve("smollm2-135m@12:16x3,kv=each").id == "smollm2-135m@12:16x3,kv=each"
    out = client.completions.create(
        model="smollm2-135m", prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2, stop=["."]
    )
    assert "Paris" in out.choices[0].text
    assert len(out.choices[0].logprobs.tokens) == len(out.choices[0].logprobs.token_logprobs) >= 1
    answer = ask(client, logprobs=True, top_logprobs=3, temperature=0)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    last = list(ask(client, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage.completion_tokens <= 16


def test_schemas_and_tools(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    text = ask(client, "How many?", response_format=form, max_tokens=30).choices[0].message.content
    assert json.loads(text)["n"] in (1, 2, 3)
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(client, tools=tools, tool_choice=choice, max_tokens=40).choices[0]
    call = answer.message.tool_calls[0].function
    assert (call.name, answer.finish_reason) == ("weather", "tool_calls")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as e:
        ask(client, model="gpt-5")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="window 12-16 is not of the form first:end"):
        ask(client, extra_body={"loop": "12-16 k=3"})
    with pytest.raises(openai.BadRequestError) as e:
        ask(client, "word " * 2000)
    assert e.value.code == "context_length_exceeded"


def test_a_client_that_returns_does_not_pay_for_its_history(client: Any) -> None:
    """Only its new tokens are read, whoever was served in between; scripts/serve_returning.py measures the time."""
    messages = [{"role": "user", "content": "List words. " + " ".join(f"word{i}" for i in range(60))}]
    for fields in ({}, {"extra_body": {"loop": None}}):
        said = list(messages)
        settings = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 8, **fields}
        first = client.chat.completions.create(messages=said, **settings)
        for _ in range(3):
            ask(client, "Something else.", max_tokens=2)
            ask(client, "Something else.", max_tokens=2, extra_body={"loop": "12:16 k=2 kv=each"})
        said += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And now?"},
        ]
        again = client.chat.completions.create(messages=said, **settings).usage
        assert again.prompt_tokens > 200
        assert again.prompt_tokens - again.prompt_tokens_details.cached_tokens < 30


def test_the_command_serves_and_stops_in_time(smollm2: Path) -> None:
    """Ctrl-C in the middle of an answer: the server has ended within 5 seconds, and says so."""
    words = ["serve", str(smollm2), "--port", "0", "-c", "512", "-t", "1", "--window", "12:16"]
    with subprocess.Popen([*CLI, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline(), process.stderr.readline()]
            assert lines[0] == "note: loading smollm2-135m ...\n"
            told = re.fullmatch(r"serving smollm2-135m, window 12:16, K 3, at (http://127\.0\.0\.1:\d+) .*\n", lines[1])
            assert told is not None, lines
            with openai.OpenAI(base_url=f"{told[1]}/v1", api_key="none", max_retries=0) as client:
                stream = ask(client, stream=True, max_tokens=400, temperature=0)
                next(iter(stream))
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 0
                assert time.monotonic() - started < 6  # 5, and what a loaded machine needs to end a process
                stream.close()
            assert process.stderr.read() == "stopped\n"
        finally:
            process.kill()
