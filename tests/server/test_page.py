"""The chat of the page at `/`, in headless Chromium against `ggufloop serve` with a tiny model."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from support import tiny
from support.browser import SCRIPTS, SLOW, Served, Visit, launched

WRITTEN = "/(word ){3}/"
"""Of SLOW's answer, enough to see that it goes on."""

THINKING = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.reasoning_content -%}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}{%- endif -%}
{{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}
{%- else -%}{{- '<think>\n' -}}{%- endif -%}
{%- endif -%}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deep as SmolLM2, so that windows look as they do in use."""
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny-30.gguf", replace(tiny.FAMILIES["llama"], n_layer=30))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    with Served(model, "--temp", "0.5") as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: Served) -> Iterator[Visit]:
    with Visit(browser, server.url) as visit:
        yield visit


# asking


def test_a_message_is_answered_both_ways(visit: Visit) -> None:
    visit.ask("sky")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["sky"]
    assert visit.marked("plain") == ["Air scatters", "sunlight"]
    assert visit.marked("looped") == ["Molecules of air scatter", "light far"]
    plain, looped = sorted(visit.requests, key=lambda body: body["loop"] is not None)
    assert (plain["loop"], looped["loop"]) == (None, "12:16 k=3")
    assert {**plain, "loop": None} == {**looped, "loop": None}  # the same prompt, seed and sampling
    assert plain["stream"] is True
    assert (plain["temperature"], plain["max_tokens"]) == (0.5, 512)  # the server's, and enough
    assert isinstance(plain["seed"], int)
    for text, figures in zip(SCRIPTS["sky"], visit.page.locator(".figures").all_text_contents(), strict=True):
        # a byte is a token, the end of the answer is one too
        assert re.fullmatch(rf"[\d.]+ tokens/s, {len(text) + 1} tokens, first after \d\.\d\d s", figures)
    assert re.search(
        r"Looped at \d\.\d\d\u00d7 the plain speed, side by side\.", str(visit.page.text_content(".differ"))
    )
    assert visit.page.locator(".answer.looped .spec").text_content() == "12:16 k=3"
    assert visit.page.evaluate("document.activeElement.id") == "prompt"


def test_an_answer_is_the_one_the_api_gives(visit: Visit, server: Served) -> None:
    """Nothing of the loop, the seed or the history is lost on the way: a random model shows every change of them."""
    page = visit.page
    page.click("#sampling-panel summary")
    for field, value in {"seed": 7, "max-tokens": 30, "top-k": 20, "top-p": 0.9, "min-p": 0}.items():
        page.fill(f"#{field}", str(value))
    page.select_option("#kv", "frozen")
    visit.ask("Hello")
    page.select_option("#decode", "bypass")
    visit.ask("Again")
    turns = json.loads(exported(visit, "#export-json"))["turns"]  # as they came: the page shows what they mean
    texts = [[turn["answers"][side]["text"] for turn in turns] for side in (0, 1)]
    specs = page.locator(".answer.looped .spec").all_text_contents()
    assert specs == ["12:16 k=3 kv=frozen", "12:16 k=3 kv=frozen decode=bypass"]  # what ran, from the usage
    kept = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": texts[1][0]}]
    for turn, before in enumerate(([], kept)):
        messages = [*before, {"role": "user", "content": ("Hello", "Again")[turn]}]
        for loop, text in ((None, texts[0][turn]), (specs[turn], texts[1][turn])):
            drawn = {"temperature": 0.5, "max_tokens": 30, "top_k": 20, "top_p": 0.9, "min_p": 0}
            body = {"messages": messages, "seed": 7 + turn, "loop": loop, **drawn}
            request = urllib.request.Request(
                f"{server.url}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = json.load(response)
            assert text == answer["choices"][0]["message"]["content"]
    assert texts[0] != texts[1]


def test_stop_ends_both_answers_and_frees_the_server(visit: Visit, server: Served) -> None:
    page = visit.page
    for press in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        visit.send(SLOW)
        visit.until(
            f"[...document.querySelectorAll('.turn:last-child .text')].every((t) => {WRITTEN}.test(t.innerText))"
        )
        assert page.is_hidden("#send")
        assert page.locator(".answer[data-state=streaming]").count() == server.at_work() == 2  # both at once
        press()
        visit.settle()
        assert page.locator(".turn:last-child .answer[data-state=stopped]").count() == 2
        assert visit.text("plain").startswith("word word word ")
        assert "stopped" in page.locator(".figures").last.text_content()
        for _ in range(200):  # it notices at its next word
            if not server.at_work():
                break
            page.wait_for_timeout(10)
        assert server.at_work() == 0
    visit.ask("same")  # and it goes on, from what was written of the stopped answer
    assert visit.text("looped") == "Four."
    roles = [message["role"] for message in visit.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]


def test_thinking_is_folded_and_not_part_of_the_answer(browser: Browser, model: Path, tmp_path: Path) -> None:
    template = tmp_path / "think.jinja"
    template.write_text(THINKING)
    with Served(model, "--", "--chat-template-file", template) as server, Visit(browser, server.url) as visit:
        page = visit.page
        visit.ask("think")
        assert (visit.text("plain"), visit.text("looped")) == ("Four.", "Five.")
        assert (visit.marked("plain"), visit.marked("looped")) == (["Four"], ["Five"])
        assert page.locator(".thoughts summary").all_text_contents() == ["Thought, 3 words", "Thought, 5 words"]
        assert page.is_hidden(".answer.plain .thought")
        page.click(".answer.plain .thoughts summary")
        assert page.locator(".answer.plain .thought").inner_text().strip() == "Let me see."
        (turn,) = json.loads(exported(visit, "#export-json"))["turns"]
        assert [a["thinking"].strip() for a in turn["answers"]] == ["Let me see.", "So many.\n\nTwo of two."]
        assert "\n\nThinking:\n\n> Let me see.\n\nAnswer:\n\n> Four.\n" in exported(visit, "#export-md")
        page.reload()
        page.wait_for_selector("#model[data-state=ready]")
        assert page.locator(".thought").first.text_content().strip() == "Let me see."
        visit.ask("same")  # never comes to an answer: the grammar allows no end of thinking
        assert [m["content"] for m in visit.requests[-1]["messages"]] == ["think", "Five.", "same"]
        assert visit.text("plain") == "It wrote no answer after its thinking."


def test_the_window_moves_by_arrow_keys(visit: Visit) -> None:
    page = visit.page
    press = page.keyboard.press

    def spoken() -> list[str]:
        return [str(page.get_attribute(f"#window-{edge}", "aria-valuetext")) for edge in ("start", "end")]

    assert spoken() == ["layer 12", "layer 15"]  # what the server suggests
    page.focus("#window-start")
    press("ArrowLeft")
    press("ArrowLeft")
    page.focus("#window-end")
    press("ArrowRight")
    assert spoken() == ["layer 10", "layer 16"]
    press("Shift+ArrowLeft")
    assert spoken() == ["layer 9", "layer 15"]
    press("Home")  # an edge stops at the other one, and at the ends of the model
    assert spoken() == ["layer 9", "layer 9"]
    press("End")
    assert spoken() == ["layer 9", "layer 28"]
    page.focus("#window-start")
    press("Home")
    assert spoken() == ["layer 1", "layer 28"]
    for _ in range(3):
        press("Shift+ArrowLeft")
    assert spoken() == ["layer 1", "layer 28"]
    press("End")
    assert spoken() == ["layer 28", "layer 28"]
    assert page.locator("#layers .inside").count() == 1
    page.fill("#k", "5")
    assert page.locator("#layers .pass").count() == 4  # a row for each pass after the first
    visit.ask("sky")
    assert sorted(str(body["loop"]) for body in visit.requests) == ["28:29 k=5", "None"]


def test_the_window_is_dragged_as_a_whole(visit: Visit) -> None:
    page = visit.page
    box = page.locator("#layers .grip").bounding_box()
    assert box is not None
    x, y, layer = box["x"] + box["width"] / 2, box["y"] + 20, box["width"] / 4
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 3 * layer, y, steps=4)
    page.mouse.up()
    assert page.text_content("#loop-summary") == "15:19 k=3"


# what is kept


def test_a_reload_keeps_conversation_and_settings(visit: Visit) -> None:
    page = visit.page
    page.fill("#k", "4")
    page.select_option("#kv", "frozen")
    visit.ask("sky")
    page.locator(".answer.plain .kept input").check()
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["sky"]
    assert visit.marked("plain") == ["Air scatters", "sunlight"]
    assert page.text_content("#loop-summary") == "12:16 k=4 kv=frozen"
    visit.ask("same")
    assert [m["content"] for m in visit.requests[-1]["messages"]] == ["sky", SCRIPTS["sky"][0], "same"]


def test_another_tab_shows_the_same_conversation(visit: Visit) -> None:
    other = visit.context.new_page()
    other.goto(visit.url)
    other.wait_for_selector("#model[data-state=ready]")
    visit.ask("sky")
    other.wait_for_selector(".answer.looped[data-state=done]")
    assert other.locator(".text").all_text_contents() == list(SCRIPTS["sky"])


def test_an_answer_cut_off_by_a_reload_is_kept_as_far_as_it_came(visit: Visit) -> None:
    visit.send(SLOW)
    visit.until(f"{WRITTEN}.test(document.querySelectorAll('.text')[1].textContent)")
    visit.page.reload()
    visit.page.wait_for_selector(".answer.looped[data-state=stopped]")
    assert visit.text("looped").startswith("word word word ")


def test_a_broken_store_is_an_empty_one(visit: Visit) -> None:
    for kept in (
        "{",
        '{"view": "x", "windows": {"tiny-30": [1, null]}, "k": "3", "solver": "eular", "panels": 3}',
        "[]",
        '{"version": 1, "turns": [{"user": 3}]}',
        '{"version": 9, "turns": []}',
        "null",
    ):
        for name in ("conversation", "settings"):
            visit.page.evaluate("([name, kept]) => localStorage.setItem(`ggufloop.${name}`, kept)", [name, kept])
        visit.page.reload()
        visit.page.wait_for_selector("#model[data-state=ready]")
        assert visit.page.is_visible("#empty")
        assert visit.page.text_content("#loop-summary") == "12:16 k=3"


def titles(visit: Visit) -> list[str]:
    return visit.page.locator("#talks .talk").all_text_contents()


def test_conversations_are_kept_apart(visit: Visit) -> None:
    page = visit.page
    page.click("#talks-panel summary")
    assert page.is_disabled("#new")  # there is nothing to leave
    visit.ask("sky")
    page.click("#new")
    assert page.is_visible("#empty")
    visit.ask("same")
    assert len(visit.requests[-1]["messages"]) == 1  # nothing of the other one
    assert titles(visit) == ["same", "sky"]
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert page.locator(".user").all_text_contents() == ["same"]
    page.click("#talks-panel summary")
    page.click("#talks .talk:has-text('sky')")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["sky"]
    assert titles(visit) == ["same", "sky"]  # looking at it changes nothing
    page.click("#talks li:has-text('sky') >> text=Rename")
    page.keyboard.type("Why <b>blue</b>?")
    page.keyboard.press("Enter")
    assert titles(visit) == ["same", "Why <b>blue</b>?"] == [*titles(visit)[:1], page.text_content("#talk-title")]
    visit.ask("same")
    assert titles(visit)[0] == "Why <b>blue</b>?"  # the one written to last
    for _ in range(2):  # asked once more
        assert len(titles(visit)) == 2
        page.click("#talks li:has-text('Why') >> [aria-label^=Delete]")
    assert titles(visit) == ["same"]
    assert page.locator(".user").all_text_contents() == ["same"]
    page.click("[aria-label='Delete same']")
    page.click("[aria-label='Delete same']")
    assert page.is_visible("#empty")
    assert page.evaluate("Object.keys(localStorage).filter((k) => k.includes('conversation'))") == []


def test_what_was_kept_by_an_older_page_is_one_of_them(visit: Visit) -> None:
    page = visit.page
    visit.ask("sky")
    page.evaluate(
        "() => { const key = Object.keys(localStorage).find((k) => k.startsWith('ggufloop.conversation.'));"
        "localStorage['ggufloop.conversation'] = localStorage[key]; localStorage.removeItem(key); }"
    )
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert visit.text("plain") == SCRIPTS["sky"][0]


def test_an_export_is_imported(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.click("#sampling-panel summary")
    page.fill("#system", "Be brief.")
    visit.ask("sky")
    (tmp_path / "c.json").write_text(exported(visit, "#export-json"))
    before = json.loads((tmp_path / "c.json").read_text())
    page.fill("#system", "")
    page.set_input_files("#import-file", tmp_path / "c.json")
    visit.until("document.getElementById('announce').textContent.startsWith('c.json is imported')")
    page.click("#talks-panel summary")
    page.wait_for_selector("#talks .talk")  # the list is drawn when the panel has opened
    assert titles(visit) == ["sky", "sky"]
    assert page.input_value("#system") == "Be brief."
    after = json.loads(exported(visit, "#export-json"))
    assert {**after, "exported": 0} == {**before, "exported": 0}
    assert visit.marked("plain") == ["Air scatters", "sunlight"]
    turn = before["turns"][0]
    for wrong, told in (
        ("{", "it is not JSON."),
        ('{"turns": []}', "it is no conversation that this page exported as JSON."),
        (json.dumps(before | {"turns": [turn, turn | {"seed": "7"}]}), "message 2 is not as this page exports it."),
        (json.dumps(before | {"turns": [turn | {"answers": [{"variant": "x", "text": ""}]}]}), "message 1 is not"),
    ):
        (tmp_path / "w.json").write_text(wrong)
        page.set_input_files("#import-file", tmp_path / "w.json")
        visit.until(
            f"document.getElementById('alert-text').textContent.startsWith('w.json cannot be imported: {told}')"
        )
    assert len(titles(visit)) == 2


def test_a_message_is_edited_and_answered_anew(visit: Visit) -> None:
    page = visit.page
    for text in ("sky", "same", "same"):
        visit.ask(text)
    page.click(".turn:nth-child(2) >> text=Edit")
    assert page.text_content(".edit .hint") == "The message after it will go."
    page.keyboard.press("Escape")
    assert page.locator(".user").all_text_contents() == ["sky", "same", "same"]
    page.click(".turn:nth-child(2) >> text=Edit")
    page.fill(".edit textarea", "code")
    page.keyboard.press("Enter")
    visit.settle()
    assert page.locator(".user").all_text_contents() == ["sky", "code"]
    asked = visit.requests[-1]["messages"]
    assert [m["content"] for m in asked] == ["sky", SCRIPTS["sky"][1], "code"]
    assert visit.requests[-1]["seed"] == visit.requests[2]["seed"]  # the message is what differs
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert page.locator(".user").all_text_contents() == ["sky", "code"]


def exported(visit: Visit, button: str) -> str:
    with visit.page.expect_download() as download:
        visit.page.click(button)
    assert re.fullmatch(r"conversation-\d{4}-\d\d-\d\d\.(json|md)", download.value.suggested_filename)
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_the_conversation_is_exported(visit: Visit) -> None:
    assert visit.page.is_disabled("#export-json")
    visit.page.click("#sampling-panel summary")
    visit.page.fill("#seed", "7")
    visit.page.fill("#min-p", "0.1")
    visit.page.fill("#system", "Be brief.")
    visit.ask("sky")
    data = json.loads(exported(visit, "#export-json"))
    assert (data["schema_version"], data["model"], data["system"]) == (1, "tiny-30", "Be brief.")
    (turn,) = data["turns"]
    assert (turn["user"], turn["seed"], turn["continued_from"]) == ("sky", 7, "looped")
    for answer, text, variant, loop in zip(
        turn["answers"], SCRIPTS["sky"], ("plain", "looped"), (None, "12:16 k=3"), strict=True
    ):
        assert (answer["text"], answer["variant"], answer["loop"]) == (text, variant, loop)
        assert (answer["state"], answer["finish_reason"], answer["streamed_together"]) == ("done", "stop", True)
    assert turn["sampling"] == {"temperature": 0.5, "max_tokens": 512, "min_p": 0.1}
    assert [a["tokens"] for a in turn["answers"]] == [len(text) + 1 for text in SCRIPTS["sky"]]
    assert all(a["tokens_per_second"] > 1 for a in turn["answers"])
    text = exported(visit, "#export-md")
    plain, looped = SCRIPTS["sky"]
    for line in (
        "# Conversation",
        "## System prompt",
        "> Be brief.",
        "> sky",
        "### Plain",
        f"> {plain}",
        "### Looped, `12:16 k=3`",
        f"> {looped}",
    ):
        assert f"\n{line}\n" in f"\n{text}"
    assert f" tokens/s, {len(looped) + 1} tokens" in text


def test_a_wrong_setting_is_said_in_one_line_and_nothing_is_sent(visit: Visit) -> None:
    page = visit.page
    for further, told in [
        ("beta", "'beta' is not of the form name=value."),
        ("window=3:4", "'window' has a control of its own."),
        ("bta=1", "'bta' is not a setting. Known: mode, damping, beta, mu, passes, routing, attention, sinks, halt."),
    ]:
        page.fill("#further", further)
        assert page.text_content("#loop-error") == told
        assert page.get_attribute("#further", "aria-invalid") == "true"
    page.focus("#prompt")
    page.keyboard.type("sky")
    page.keyboard.press("Enter")
    assert page.text_content("#alert-text") == told
    assert page.input_value("#prompt") == "sky"  # what was written is not lost
    page.fill("#further", "")
    for k in ("0", "65", "2.5", ""):
        page.fill("#k", k)
        assert page.text_content("#loop-error") == "K is a whole number from 1 to 64 with solver euler."
    page.fill("#k", "3")
    page.click("#sampling-panel summary")
    page.fill("#seed", "-1")
    assert page.text_content("#sampling-summary") == "Seed is a whole number from 0 to 4294967294."
    page.focus("#prompt")
    page.keyboard.press("Enter")
    assert str(page.text_content("#alert-text")).startswith("Seed is")
    page.fill("#seed", "")
    for field, told in (("top-k", "Top-k is a whole number"), ("top-p", "Top-p is"), ("min-p", "Min-p is")):
        page.fill(f"#{field}", "1.5")
        assert str(page.text_content("#sampling-summary")).startswith(told)
        page.fill(f"#{field}", "")
    assert visit.requests == []


# one answer, or another


def test_one_variant_alone_and_the_other_afterwards(visit: Visit) -> None:
    page = visit.page
    page.check("input[name=view][value=plain]")
    visit.ask("sky")
    assert [body["loop"] for body in visit.requests] == [None]
    assert page.is_hidden(".answer.looped")
    assert page.locator("mark").count() == 0
    page.check("input[name=view][value=both]")
    page.click("text=Answer looped too")
    visit.settle()
    first, second = visit.requests
    assert first["seed"] == second["seed"]
    assert visit.marked("plain") == ["Air scatters", "sunlight"]
    assert "side by side" not in str(page.text_content(".differ"))
    page.click("text=Again, same seed")
    visit.settle()
    page.click("text=Again, new seed")
    visit.settle()
    seeds = [body["seed"] for body in visit.requests]
    assert len(set(seeds[:4])) == 1
    assert seeds[4] == seeds[5] != seeds[0]
    assert page.locator(".turn").count() == 1


def test_equal_answers_are_said_to_be(visit: Visit) -> None:
    visit.ask("same")
    assert visit.page.locator("mark").count() == 0
    assert str(visit.page.text_content(".differ")).startswith("The same words.")


def test_an_answer_is_copied(browser: Browser, server: Served) -> None:
    with Visit(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        visit.ask("sky")
        visit.page.click(".answer.looped .copy")
        visit.until("document.getElementById('announce').textContent === 'Looped answer copied.'")
        assert visit.page.evaluate("navigator.clipboard.readText()") == SCRIPTS["sky"][1]


def test_markdown_is_read_and_its_code_copied(browser: Browser, server: Served) -> None:
    with Visit(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as visit:
        page = visit.page
        visit.ask("code")
        plain = page.locator(".answer.plain .prose")
        assert plain.locator("strong").text_content() == "print"
        assert plain.locator("li").all_text_contents() == ["one", "two"]
        assert plain.locator(".code-head span").text_content() == "python"
        assert (visit.marked("plain"), visit.marked("looped")) == (["1", "two"], ["2", "three"])
        assert page.locator(".answer.looped em mark").text_content() == "three"
        for side in ("plain", "looped"):  # a picture is a link
            link = page.locator(f".answer.{side} .prose a")
            assert (link.text_content(), link.get_attribute("target")) == ("here", "_blank")
            assert "noopener" in str(link.get_attribute("rel"))
        plain.locator(".code button").click()
        visit.until("document.getElementById('announce').textContent === 'The code is copied.'")
        assert page.evaluate("navigator.clipboard.readText()") == "print(1)"
        page.click(".answer.plain .answer-foot .copy")
        visit.until("document.getElementById('announce').textContent === 'Plain answer copied.'")
        assert page.evaluate("navigator.clipboard.readText()") == SCRIPTS["code"][0]
        assert "two seeds differ as much" in str(page.text_content(".differ"))


def test_each_control_of_the_loop_says_what_it_is(visit: Visit) -> None:
    said = {name: visit.page.get_attribute(f"label:has(#{name})", "title") for name in ("k", "solver", "kv", "decode")}
    assert all(tip and 40 < len(tip) < 100 for tip in said.values())
    assert len(set(said.values())) == 4


def test_what_the_loop_settings_do_is_said(visit: Visit) -> None:
    visit.page.select_option("#solver", "rk4")
    visit.page.select_option("#kv", "frozen")
    visit.page.select_option("#decode", "first")
    assert visit.page.text_content("#meaning") == (
        "rk4: K steps, each with four evaluations; frozen: later passes read the first one's keys and values; "
        "first: the prompt loops, and the answer's first tokens."
    )


def test_without_a_results_folder_the_tab_says_how_to_have_one(visit: Visit) -> None:
    visit.page.click("#tab-results")
    visit.page.wait_for_selector("#result h2")
    assert visit.page.text_content("#result h2") == "No results folder"
    assert "--results DIR" in str(visit.page.text_content("#result"))
