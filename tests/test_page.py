"""The page at `/`, driven in headless Chromium against a server whose answers are written beforehand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Visit, launched
from fake_server import SCRIPTS, FakeServer
from playwright.sync_api import Browser

from ggufloop.server import assets

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc00000030101"
    "00c9fe92ef0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "study"
    (folder / "qwen3").mkdir(parents=True)
    rows = [
        {"record": "header", "model": "m.gguf", "n_ctx": 512, "seed": 0, "patch_id": "x"},
        {"record": "cell", "loop": "12:16 k=3", "nll": {"mean": 0.0125, "low": -0.01, "high": 0.035, "n": 512}},
        {"record": "cell", "loop": "10:14 k=3", "nll": {"mean": -0.5, "low": None, "high": None, "n": 512}},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "qwen3" / "sweep.jsonl").write_text(text + '{"record": "cell", "loo')  # still being written
    (folder / "report.md").write_text(
        "# Found\n\n<script>window.hit = 5</script>\n\n| loop | PPL |\n| --- | --: |\n| a \\| b | 1.50 |\n"
    )
    (folder / "ppl.png").write_bytes(PIXEL)
    (folder / "broken.json").write_text("{not json")
    (folder / "page.html").write_text(
        "<p id=p>Report</p><script>document.getElementById('p').textContent = 'ran'</script>"
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[FakeServer]:
    with FakeServer(folder, pace=0.002) as server:
        yield server


@pytest.fixture
def visit(browser: Browser, server: FakeServer) -> Iterator[Visit]:
    server.requests.clear()
    server.most_at_once = 0
    with Visit(browser, server.url) as visit:
        yield visit


# asking


def test_a_message_is_answered_both_ways_at_once(visit: Visit, server: FakeServer) -> None:
    visit.ask("sky")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["sky"]
    assert visit.marked("plain") == ["scatters", "sunlight"]
    assert visit.marked("looped") == ["small molecules of", "scatter", "light far"]
    plain, looped = sorted(server.requests, key=lambda body: body["loop"] is not None)
    loop = {"window": "12:16", "k": 3, "solver": "euler", "kv": "first", "decode": "full"}
    assert (plain["loop"], looped["loop"]) == (None, loop)
    assert {**plain, "loop": None} == {**looped, "loop": None}  # the same prompt, seed and sampling
    assert plain["stream"] is True
    assert (plain["temperature"], plain["max_tokens"]) == (0.5, 512)  # the server's, and enough
    assert isinstance(plain["seed"], int)
    assert server.most_at_once == 2
    figures = visit.page.locator(".figures").all_text_contents()
    assert [f.split(",")[0] for f in figures] == [
        "31.3 tokens/s",
        "24.5 tokens/s",
    ]  # the server's, not the page's clock
    assert "15 tokens" in figures[0]
    assert "0.78\u00d7 the plain speed, side by side" in str(visit.page.text_content(".differ"))
    assert visit.page.evaluate("document.activeElement.id") == "prompt"


def test_stop_ends_both_answers_and_frees_the_server(visit: Visit, server: FakeServer) -> None:
    page, left = visit.page, server.left
    for press in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        visit.send("slow")
        visit.until(
            "[...document.querySelectorAll('.turn:last-child .text')].every((t) => t.innerText.includes('word3'))"
        )
        assert page.is_hidden("#send")
        press()
        visit.settle()
        assert page.locator(".turn:last-child .answer[data-state=stopped]").count() == 2
        assert visit.text("plain").startswith("word0 word1 word2 word3")
        assert "stopped" in page.locator(".figures").last.text_content()
        left += 2
        for _ in range(500):  # it notices at its next word
            if server.left == left:
                break
            page.wait_for_timeout(10)
        assert server.left == left
    visit.ask("same")  # and it goes on, from what was written of the stopped answer
    assert visit.text("looped") == "Four."
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]


def test_the_window_moves_by_arrow_keys(visit: Visit, server: FakeServer) -> None:
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
    assert server.requests[-1]["loop"] or server.requests[-2]["loop"]
    loops = [body["loop"] for body in server.requests if body["loop"]]
    assert (loops[0]["window"], loops[0]["k"]) == ("28:29", 5)


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


def test_a_reload_keeps_conversation_and_settings(visit: Visit, server: FakeServer) -> None:
    page = visit.page
    page.fill("#k", "4")
    page.select_option("#kv", "frozen")
    visit.ask("sky")
    page.locator(".answer.plain .kept input").check()
    page.reload()
    page.wait_for_selector("#model[data-state=ready]")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["sky"]
    assert visit.marked("plain") == ["scatters", "sunlight"]
    assert page.text_content("#loop-summary") == "12:16 k=4 kv=frozen"
    visit.ask("same")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["sky", SCRIPTS["sky"][0], "same"]
    page.click("#clear")
    assert page.locator(".turn").count() == 2  # asked once more
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    page.reload()
    assert page.is_visible("#empty")


def test_another_tab_shows_the_same_conversation(visit: Visit) -> None:
    other = visit.context.new_page()
    other.goto(visit.url)
    other.wait_for_selector("#model[data-state=ready]")
    visit.ask("sky")
    other.wait_for_selector(".answer.looped[data-state=done]")
    assert other.locator(".text").all_text_contents() == list(SCRIPTS["sky"])


def test_an_answer_cut_off_by_a_reload_is_kept_as_far_as_it_came(visit: Visit) -> None:
    visit.send("slow")
    visit.until("document.querySelectorAll('.text')[1].textContent.includes('word3')")
    visit.page.reload()
    visit.page.wait_for_selector(".answer.looped[data-state=stopped]")
    assert visit.text("looped").startswith("word0 word1 word2 word3")


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


def exported(visit: Visit, button: str) -> str:
    with visit.page.expect_download() as download:
        visit.page.click(button)
    assert re.fullmatch(r"conversation-\d{4}-\d\d-\d\d\.(json|md)", download.value.suggested_filename)
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_the_conversation_is_exported(visit: Visit) -> None:
    assert visit.page.is_disabled("#export-json")
    visit.page.click("#sampling-panel summary")
    visit.page.fill("#seed", "7")
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
    assert [a["tokens_per_second"] for a in turn["answers"]] == [31.25, 24.5]
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
    assert "24.5 tokens/s, 19 tokens" in text


def test_a_wrong_setting_is_said_in_one_line_and_nothing_is_sent(visit: Visit, server: FakeServer) -> None:
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
    assert server.requests == []


# one answer, or another


def test_one_variant_alone_and_the_other_afterwards(visit: Visit, server: FakeServer) -> None:
    page = visit.page
    page.check("input[name=view][value=plain]")
    visit.ask("sky")
    assert [body["loop"] for body in server.requests] == [None]
    assert page.is_hidden(".answer.looped")
    assert page.locator("mark").count() == 0
    page.check("input[name=view][value=both]")
    page.click("text=Answer looped too")
    visit.settle()
    first, second = server.requests
    assert first["seed"] == second["seed"]
    assert visit.marked("plain") == ["scatters", "sunlight"]
    assert "side by side" not in str(page.text_content(".differ"))
    page.click("text=Again, same seed")
    visit.settle()
    page.click("text=Again, new seed")
    visit.settle()
    seeds = [body["seed"] for body in server.requests]
    assert len(set(seeds[:4])) == 1
    assert seeds[4] == seeds[5] != seeds[0]
    assert page.locator(".turn").count() == 1


def test_equal_answers_are_said_to_be(visit: Visit) -> None:
    visit.ask("same")
    assert visit.page.locator("mark").count() == 0
    assert str(visit.page.text_content(".differ")).startswith("The same words.")


# what a model or a file says is text


def test_a_script_in_an_answer_is_inert(visit: Visit) -> None:
    page = visit.page
    visit.ask("markup")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["markup"]
    page.reload()  # nor does it come alive from the store
    page.wait_for_selector("#model[data-state=ready]")
    assert (visit.text("plain"), visit.text("looped")) == SCRIPTS["markup"]
    assert page.locator("#log :is(script, img, svg, b, a)").count() == 0
    page.wait_for_timeout(50)
    assert page.evaluate("window.hit") is None


def test_the_page_holds_nothing_inline_and_names_no_other_host(visit: Visit) -> None:
    policy = assets.HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    for name in ["", *assets.asset_names()]:
        asset = assets.read_asset(name)
        assert asset is not None
        text = asset.content.decode("ascii")
        hosts = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
        assert not {host for host in hosts if host != "http://www.w3.org"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert text.count("\n") <= 600, name
        assert max(map(len, text.splitlines())) <= 120 or name == "icon.svg", name
    page = assets.read_asset("")
    assert page is not None
    markup = page.content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", markup)
    assert assets.read_asset("index.html") is None
    assert assets.read_asset("../assets.py") is None
    assert visit.page.evaluate("fetch('https://example.org').then(() => 'left', (e) => 'kept')") == "kept"
    visit.errors.clear()  # the browser logs what its policy forbids
    visit.left.clear()


# errors


def test_errors_are_one_line(browser: Browser, server: FakeServer) -> None:
    with Visit(browser, server.url, refusals=True) as visit:
        visit.ask("fail")
        assert visit.text("looped") == "window 12:16 is out of range."
        assert visit.page.text_content("#announce") == (
            "Plain answer failed: window None is out of range. Looped answer failed: window 12:16 is out of range."
        )
        visit.ask("break")
        broken = "The answer broke off: the server closed the connection."
        assert visit.text("plain") == f"The sky is {broken}"
        assert [m["content"] for m in server.requests[-1]["messages"]] == ["break"]  # no answer, no turn in the history
        visit.page.click(".turn:last-child .plain >> text=Try again")
        visit.settle()
        assert visit.text("plain") == f"The sky is {broken}"
        visit.page.route("**/health", lambda route: route.abort())
        visit.page.route("**/v1/chat/completions", lambda route: route.abort())
        visit.ask("sky")
        assert visit.text("plain") == "The server cannot be reached. Is it still running?"
        visit.page.wait_for_selector("#model[data-state=error]")
        visit.page.unroute("**/health")
        visit.page.wait_for_selector("#model[data-state=ready]")  # it comes back by itself


def test_a_server_that_loads_and_one_that_wants_a_key(browser: Browser) -> None:
    with FakeServer(key="secret", loading=1) as server, Visit(browser, server.url, refusals=True, ready=False) as visit:
        page = visit.page
        page.wait_for_selector("#model[data-state=loading]")
        page.wait_for_selector("#model[data-state=locked]")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        visit.until("document.getElementById('key-label').textContent.startsWith('The server does not take that key')")
        visit.until("document.activeElement.id === 'key'")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model[data-state=ready]")
        visit.ask("sky")
        assert visit.text("plain") == SCRIPTS["sky"][0]
        assert "secret" not in page.evaluate("JSON.stringify({ ...localStorage })")
        page.reload()
        page.wait_for_selector("#model[data-state=ready]")  # kept for this tab


def test_the_loop_the_server_runs_is_where_the_controls_begin(browser: Browser) -> None:
    loop = "14:20 k=6 solver=euler passes=3 kv=frozen decode=first:8"
    with FakeServer(default_loop=loop) as server, Visit(browser, server.url) as visit:
        assert visit.page.text_content("#loop-summary") == "14:20 k=6 passes=3 kv=frozen decode=first:8"
        assert visit.page.text_content("#cost") == ""  # passes decides it, and the page does not compute that
        visit.page.fill("#k", "4")
        visit.page.focus("#window-end")
        visit.page.keyboard.press("ArrowLeft")
        visit.page.reload()
        visit.page.wait_for_selector("#model[data-state=ready]")
        assert visit.page.text_content("#loop-summary") == "14:19 k=4 passes=3 kv=frozen decode=first:8"


# results


def test_the_second_tab_shows_the_results_folder(visit: Visit) -> None:
    page = visit.page
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#files li")
    assert page.text_content("#folder") == "study"
    assert page.locator("#files li").count() == 5
    page.click("text=sweep.jsonl")
    page.wait_for_selector("#result table")
    cells = [
        row.locator("td").all_text_contents() for row in page.locator("#result table").nth(1).locator("tbody tr").all()
    ]
    assert cells == [["12:16 k=3", "0.0125", "-0.01 to 0.035", "512"], ["10:14 k=3", "-0.5", "", "512"]]
    page.locator("#result table").nth(1).locator("th button", has_text=re.compile("^nll$")).click()
    assert page.locator("#result table").nth(1).locator("td").first.text_content() == "10:14 k=3"
    page.click("text=ppl.png")
    page.wait_for_selector("#result img")
    visit.until("document.querySelector('#result img').naturalWidth === 1")
    page.click("text=report.md")
    page.wait_for_selector("#result table")
    assert page.locator("#result h3").text_content() == "Found"
    assert "<script>window.hit = 5</script>" in str(page.text_content("#result"))
    assert page.locator("#result td").all_text_contents() == ["a | b", "1.50"]
    page.click("text=broken.json")
    page.wait_for_selector("#result pre")
    assert page.text_content("#result pre") == "{not json"
    assert page.text_content("#result .error") == "This file is not JSON. Here it is as it is written."
    page.reload()
    page.wait_for_selector("#result pre")  # the address says what is shown
    assert page.evaluate("window.hit") is None


def test_a_report_opens_without_scripts(visit: Visit) -> None:
    page = visit.page
    page.goto(f"{visit.url}#results/page.html")
    with visit.context.expect_page() as opened:
        page.click("text=Open the report")
    report = opened.value
    report.wait_for_load_state()
    assert report.locator("p").text_content() == "Report"
    assert report.evaluate("origin") == "null"


def test_no_folder_and_an_empty_one_say_what_to_do(browser: Browser, tmp_path: Path) -> None:
    for folder, heading in ((None, "No results folder"), (tmp_path, "Nothing here yet")):
        with FakeServer(folder) as server, Visit(browser, f"{server.url}", refusals=True) as visit:
            visit.page.click("#tab-results")
            visit.page.wait_for_selector("#result h2")
            assert visit.page.text_content("#result h2") == heading


# the real server


@pytest.fixture(scope="module")
def real(tiny_model: Callable[[str], Path], folder: Path) -> Iterator[str]:
    """`ggufloop serve` with a tiny random model; -> its address."""
    code = "from ggufloop.cli import main; main()"
    words = ["serve", str(tiny_model("llama")), "-t", "1", "-c", "1024", "--port", "0", "--results", str(folder)]
    server = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        told = next((line for line in server.stderr if line.startswith("serving")), "")
        address = re.search(r"http://127\.0\.0\.1:\d+", told)
        assert address is not None
        yield address[0] + "/"
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_the_real_server_answers_the_page_as_it_answers_the_api(browser: Browser, real: str) -> None:
    with Visit(browser, real) as visit:
        page = visit.page
        page.click("#sampling-panel summary")
        page.fill("#seed", "7")
        page.fill("#max-tokens", "40")
        page.select_option("#kv", "frozen")
        visit.ask("Hello")
        page.select_option("#decode", "bypass")
        visit.ask("Again")
        texts = [page.locator(f".answer.{v} .text").all_text_contents() for v in ("plain", "looped")]
        specs = page.locator(".answer.looped .spec").all_text_contents()
        assert specs == ["2:4 k=3 kv=frozen", "2:4 k=3 kv=frozen decode=bypass"]  # what ran, from the usage
        kept = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": texts[1][0]}]
        for turn, before in enumerate(([], kept)):
            messages = [*before, {"role": "user", "content": ("Hello", "Again")[turn]}]
            for loop, text in ((None, texts[0][turn]), (specs[turn], texts[1][turn])):
                body = {"messages": messages, "seed": 7 + turn, "temperature": 0.8, "max_tokens": 40, "loop": loop}
                request = urllib.request.Request(
                    f"{real}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=30) as response:
                    answer = json.load(response)
                assert text == answer["choices"][0]["message"]["content"]
        assert texts[0] != texts[1]
        page.click("#tab-results")
        page.click("text=ppl.png")
        page.wait_for_selector("#result img")
        visit.until("document.querySelector('#result img').naturalWidth === 1")
        page.goto(f"{real}#results/page.html")
        with visit.context.expect_page() as opened:
            page.click("text=Open the report")
        opened.value.wait_for_load_state()
        assert opened.value.locator("p").text_content() == "Report"
    with urllib.request.urlopen(real, timeout=30) as response:
        assert response.headers["Content-Security-Policy"] == assets.HEADERS["Content-Security-Policy"]


# for everybody


def test_everything_to_press_has_a_name_and_tabs_are_tabs(visit: Visit) -> None:
    visit.page.click("#sampling-panel summary")
    visit.ask("sky")
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, a[href], [role=tab]')].filter((e) =>
            !(e.getAttribute('aria-label') || e.textContent.trim() && e.tagName !== 'SELECT' || e.labels?.length)
        ).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    ids = visit.page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert visit.page.locator("[role=tab][aria-selected=true]").count() == 1
    references = visit.page.evaluate(
        """() => [...document.querySelectorAll('[aria-controls], [aria-describedby], [aria-labelledby]')].flatMap((e) =>
            ['aria-controls', 'aria-describedby', 'aria-labelledby'].map((name) => e.getAttribute(name)).filter(Boolean)
        ).filter((id) => !document.getElementById(id))"""
    )
    assert references == []
    assert visit.page.text_content("#announce") == "Plain answer finished. Looped answer finished."


@pytest.mark.parametrize("size", [(1280, 800), (800, 600), (390, 844)], ids=str)
def test_nothing_sticks_out_at_any_size(browser: Browser, server: FakeServer, size: tuple[int, int]) -> None:
    with Visit(browser, server.url) as visit:
        page = visit.page
        page.set_viewport_size({"width": size[0], "height": size[1]})
        visit.ask("sky")
        for _ in range(2):
            for name in ("", "#results/qwen3%2Fsweep.jsonl"):
                page.evaluate("(name) => { location.hash = name }", name)
                if name:
                    page.wait_for_selector("#result table")
                wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                tall = page.evaluate("document.documentElement.scrollHeight - innerHeight")
                assert (wide, tall) == (0, 0)
            page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = !d.open })")
        page.evaluate("location.hash = ''")
        page.wait_for_selector(".answer")
        plain, looped = (page.locator(f".answer.{v}").bounding_box() for v in ("plain", "looped"))
        assert plain is not None
        assert looped is not None
        assert (plain["y"] == looped["y"]) == (size[0] > 720)  # side by side, or one below the other


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, server: FakeServer) -> None:
    with Visit(browser, server.url, color_scheme="dark") as visit:
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        dark = visit.page.evaluate(paper)
        visit.page.emulate_media(color_scheme="light")
        light = visit.page.evaluate(paper)
        assert dark != light
        visit.page.click("#theme")
        visit.page.click("#theme")
        assert visit.page.get_attribute("#theme", "aria-label") == "Theme: dark"
        assert visit.page.evaluate(paper) == dark
        visit.page.reload()
        assert visit.page.evaluate(paper) == dark
