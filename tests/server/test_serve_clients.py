"""The official clients of what llama-server serves, unchanged, against SmolLM2: each can ask for a loop of its own.

litellm is imported in a process of its own: it changes what others import.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import SMALL, Server

openai = pytest.importorskip("openai", reason="openai comes with the extra dev")

pytestmark = pytest.mark.model

Serve = Callable[..., Server]

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "Name three colours."}]
LOOP = "12:16 k=3"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "days": {"type": "integer", "minimum": 2, "maximum": 4},
                },
                "required": ["city", "days"],
            },
        },
    }
]
TEMPLATE = r"""{%- if tools %}<|im_start|>system
You may call functions: {{ tools | tojson }}
Answer <tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""SmolLM2's own knows no tools, and llama-server leaves them out, in silence, where a template does."""
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 3, "maximum": 7},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 0, "maxItems": 1},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def server(serve: Serve, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    flags = ("-t", "2", "-c", "1024", "-np", "2", "--window", "12:16", "--K", "3", "-n", "24", "-s", "1")
    return serve(smollm2, *flags, "--", "--chat-template-file", str(template))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: Any, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "temperature": 0, **fields})


def test_a_loop_for_one_request_changes_it_and_no_other(client: Any) -> None:
    looped = ask(client)
    wild = ask(client, extra_body={"loop": {"window": "12:16", "k": 4, "solver": "naive"}})
    plain = ask(client, extra_body={"loop": None})
    texts = [answer.choices[0].message.content for answer in (looped, wild, plain)]
    assert len(set(texts)) == 3
    assert looped.usage.loop == LOOP
    assert "naive" in wild.usage.loop
    assert getattr(plain.usage, "loop", None) is None
    assert ask(client, model=f"{MODEL}@off").choices[0].message.content == texts[2]
    assert ask(client, model=f"{MODEL}@12:16x4,solver=naive").choices[0].message.content == texts[1]
    assert ask(client).choices[0].message.content == texts[0]
    pieces = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == texts[0]
    assert pieces[-1].usage.loop == LOOP


def test_what_else_the_openai_client_can_ask(client: Any) -> None:
    assert {MODEL, f"{MODEL}@off", f"{MODEL}@12:16x3"} <= {model.id for model in client.models.list()}
    out = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2, stop=["."]
    )
    assert "Paris" in out.choices[0].text
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    assert len(answer.choices[0].logprobs.content) == 5
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    several = ask(client, n=2, temperature=1.5, seed=3, max_tokens=12)
    assert len({choice.message.content for choice in several.choices}) == 2
    again = ask(client, temperature=1, seed=9, max_tokens=8).choices[0].message.content
    assert ask(client, temperature=1, seed=9, max_tokens=8).choices[0].message.content == again


def test_schemas_with_ranges_and_recursion_hold(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "tree", "schema": TREE, "strict": True}}
    asked = [{"role": "user", "content": "A tree of numbers as JSON, three deep: 900, then 1000, then 1100."}]
    answer = ask(client, messages=asked, response_format=form, max_tokens=100, extra_body={"loop": None})
    values = re.findall(r'"value"\s*:\s*(-?\d+)', answer.choices[0].message.content)
    assert len(values) > 1, "the schema names itself"
    assert set(values) <= set("34567")
    form["json_schema"]["schema"] = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    answer = ask(client, messages=asked, response_format=form, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2, 3)


def weather(city: str, name: str) -> list[dict[str, Any]]:
    """A question, the call it was answered with, and what that gave."""
    function = {"name": "weather", "arguments": json.dumps({"city": city, "days": 2})}
    return [
        {"role": "user", "content": f"The weather in {city}?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": name, "type": "function", "function": function}]},
        {"role": "tool", "content": "sunny", "tool_call_id": name},
    ]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_is_made_as_it_was_before(choice: str, client: Any) -> None:
    """Where the model begins one the grammar holds it: under `auto` it need not begin, under `required` it must."""
    asked = [*weather("Rome", "a"), *weather("Oslo", "b"), *weather("Rome", "c"), *weather("Oslo", "d")[:1]]
    answer = ask(client, messages=asked, tools=TOOLS, tool_choice=choice, max_tokens=60).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason) == ("weather", "tool_calls")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo")
    assert arguments["days"] in (2, 3, 4)
    pieces = ask(client, messages=asked, tools=TOOLS, tool_choice=choice, max_tokens=60, stream=True)
    parts = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or ()]
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments
    if choice == "auto":
        said = ask(client, tools=TOOLS, max_tokens=8).choices[0].message
        assert said.content
        assert not said.tool_calls


def test_a_call_that_is_forced_obeys_the_schema(client: Any) -> None:
    """Not what was called before: other arguments than the model would write."""
    function = {**TOOLS[0]["function"], "parameters": {"type": "object", "properties": {"n": {"type": "integer",
                "minimum": 3, "maximum": 7}}, "required": ["n"]}}  # fmt: skip
    asked = [*weather("Rome", "a"), *weather("Oslo", "b"), *weather("Rome", "c"), *weather("Oslo", "d")[:1]]
    tools = [{"type": "function", "function": function}]
    choice = {"type": "function", "function": {"name": "weather"}}
    (call,) = ask(client, messages=asked, tools=tools, tool_choice=choice, max_tokens=60).choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["n"] in range(3, 8)


def test_responses(client: Any) -> None:
    answer = client.responses.create(model=MODEL, input="Name three colours.", temperature=0, max_output_tokens=24)
    assert answer.output_text == ask(client, max_tokens=24).choices[0].message.content
    looped = client.responses.create(
        model=MODEL, input="Name three colours.", temperature=0, max_output_tokens=24, extra_body={"loop": None}
    )
    assert looped.output_text != answer.output_text


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="window 12-16 is not of the form first:end"):
        ask(client, extra_body={"loop": "12-16 k=3"})
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(client, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}})


def test_embeddings(serve: Serve, tiny_model: Callable[[str], Path]) -> None:
    server = serve(tiny_model("llama"), *SMALL, "--embeddings", "--", "--pooling", "mean")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="llama", input=["one", "two", "one"]).data
    assert [len(entry.embedding) for entry in found] == [64, 64, 64]
    assert found[0].embedding == pytest.approx(found[2].embedding, abs=1e-5)
    assert found[0].embedding != pytest.approx(found[1].embedding, abs=1e-2)


def test_anthropic(server: Server, client: Any) -> None:
    anthropic = pytest.importorskip("anthropic", reason="anthropic comes with the extra dev")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as theirs:
        asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "extra_body": {"temperature": 0}}
        answer = theirs.messages.create(**asked)
        assert answer.content[0].text == ask(client, max_tokens=24).choices[0].message.content
        with theirs.messages.stream(**{**asked, "extra_body": {"temperature": 0, "loop": None}}) as stream:
            text = "".join(stream.text_stream)
        assert text == ask(client, max_tokens=24, extra_body={"loop": None}).choices[0].message.content
        assert theirs.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens == answer.usage.input_tokens
        with pytest.raises(anthropic.BadRequestError, match="window 9-1"):
            theirs.messages.create(**{**asked, "extra_body": {"loop": "9-1 k=2"}})


def test_langchain(server: Server, client: Any) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai comes with the extra dev")
    settings = {"base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 24}
    plain = langchain.ChatOpenAI(model=MODEL, extra_body={"loop": None}, **settings)
    looped = langchain.ChatOpenAI(model=f"{MODEL}@12:16x3", **settings)
    expected = ask(client, max_tokens=24, extra_body={"loop": None}).choices[0].message.content
    assert plain.invoke("Name three colours.").content == expected
    assert looped.invoke("Name three colours.").content == ask(client, max_tokens=24).choices[0].message.content
    assert "".join(str(piece.content) for piece in plain.stream("Name three colours.")) == expected


LITELLM = """
import json, sys
import litellm
litellm.telemetry = False
url, = sys.argv[1:]
def ask(**fields):
    return litellm.completion(model="openai/smollm2-135m", api_base=url, api_key="none", temperature=0, max_tokens=24,
                              messages=[{"role": "user", "content": "Name three colours."}], **fields)
plain = ask(extra_body={"loop": None}).choices[0].message.content
streamed = "".join(piece.choices[0].delta.content or "" for piece in ask(stream=True))
print(json.dumps([plain, streamed]))
"""


def test_litellm(server: Server, client: Any) -> None:
    if importlib.util.find_spec("litellm") is None:
        pytest.skip("litellm comes with the extra dev")
    words = [sys.executable, "-c", LITELLM, f"{server.url}/v1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ask(client, max_tokens=24, extra_body={"loop": None}).choices[0].message.content,
        ask(client, max_tokens=24).choices[0].message.content,
    ]
