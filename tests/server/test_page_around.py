"""The page around the chat: what it shows of a results folder, of errors and keys, and that all can use it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route
from support import ROOT, tiny
from support.browser import SCRIPTS, SLOW, Served, Visit, launched

from ggufloop.files import file_sha256
from ggufloop.server.serve import PAGE, VENDORED

KEY = "secret-1"
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
        "# Found\n\n<script>window.hit = 5</script>\n\n| loop | PPL |\n| --- | --: |\n| a \\| b | 1.50 |\n\n"
        "![a figure beside it](ppl.png)\n\n![one from elsewhere](https://other.example/x.png)\n"
    )
    (folder / "table.csv").write_text('loop,"gain, nats",n\n"12:16 k=3",0.0123456789,8\n"a ""b""\n c",-inf,10\n')
    (folder / "ppl.png").write_bytes(PIXEL)
    (folder / "broken.json").write_text("{not json")
    (folder / "page.html").write_text(
        "<style>p { color: rgb(1, 2, 3) }</style><p id=p>Report</p><img src=http://other.example/x.png>"
        "<script>document.getElementById('p').textContent = 'ran'; parent.hit = 6</script>"
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny-30.gguf", replace(tiny.FAMILIES["llama"], n_layer=30))


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Served]:
    with Served(model, "--results", folder) as server:
        yield server


@pytest.fixture(scope="module")
def locked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a key, a loop of its own and an empty results folder."""
    empty = tmp_path_factory.mktemp("empty")
    loop = ("--window", "14:20", "--K", "6", "--passes", "3", "--kv", "frozen", "--decode", "first:8")
    with Served(model, *loop, "--api-key", KEY, "--results", empty) as server:
        yield server


def with_key(page: Page) -> None:
    page.add_init_script(f"sessionStorage.setItem('ggufloop.key', '{KEY}')")


@pytest.fixture
def visit(browser: Browser, server: Served) -> Iterator[Visit]:
    with Visit(browser, server.url) as visit:
        yield visit


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
    markup = (PAGE / "index.html").read_text(encoding="ascii")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', markup)
    assert policy is not None
    # styles of a report's own are let in: it is shown in a frame that takes this policy over
    rules = " ".join(policy[1].split())
    assert rules.startswith(
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self';"
    )
    assert "eval" not in policy[1]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", markup)
    assert rules.endswith("form-action 'none'; require-trusted-types-for 'script'; trusted-types dompurify report")
    for path in PAGE.glob("*.*"):
        text = path.read_text(encoding="ascii")
        hosts = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
        assert not {host for host in hosts if host != "http://www.w3.org"}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert text.count("\n") <= 600, path.name
        assert max(map(len, text.splitlines())) <= 120 or path.name == "icon.svg", path.name
    assert visit.page.evaluate("fetch('https://example.org').then(() => 'left', (e) => 'kept')") == "kept"
    script = "const s = document.createElement('script'); s.textContent = 'window.hit = 7'; document.body.append(s)"
    for attempt in (script, "document.body.innerHTML = '<p>markup</p>'"):
        assert visit.page.evaluate(f"() => {{ try {{ {attempt} }} catch (e) {{ return e.name }} }}") == "TypeError"
    assert visit.page.evaluate("window.hit") is None
    visit.errors.clear()  # the browser logs what its policy forbids
    visit.left.clear()


def test_what_is_vendored_is_what_the_docs_say() -> None:
    """Nobody changed a file, or renewed it without saying so."""
    table = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w.]+)` \| [\w.]+ [\d.]+, `[\w./]+` \| `(\w{64})` \|$", table, re.MULTILINE))
    files = {path.name: path for path in VENDORED.iterdir() if path.suffix == ".js"}
    assert told == {name: file_sha256(path) for name, path in files.items()}
    assert {name.split(".")[0] for name in told} == {path.stem for path in VENDORED.glob("*.LICENSE")}


# errors


def test_errors_are_one_line(browser: Browser, model: Path) -> None:
    with Served(model) as server, Visit(browser, server.url, refusals=True) as visit:
        page = visit.page
        page.select_option("#kv", "each")
        visit.ask("sky")
        refused = "kv each needs K/V slots that this server has not; start it with --loop '12:16 k=3 kv=each'."
        assert (visit.text("plain"), visit.text("looped")) == (SCRIPTS["sky"][0], refused)
        assert page.text_content("#announce") == f"Plain answer finished. Looped answer failed: {refused}"
        page.select_option("#kv", "first")
        visit.send(SLOW)
        visit.until("document.querySelector('.turn:last-child .looped .text').innerText.includes('word word')")
        server.kill()
        visit.settle()
        broken = "The answer broke off: the server closed the connection."
        assert re.fullmatch(rf"[word ]+{broken}", visit.text("plain"))
        page.wait_for_selector("#model[data-state=error]")
        assert page.text_content("#model") == "Server unreachable, trying again"
        page.click(".turn:last-child .plain >> text=Try again")
        visit.settle()
        assert visit.text("plain") == "The server cannot be reached. Is it still running?"
        with Served(model, port=server.port):
            page.wait_for_selector("#model[data-state=ready]")  # it comes back by itself
            visit.ask("same")
            assert visit.text("looped") == "Four."
            told = [m["content"] for m in visit.requests[-1]["messages"]]
            assert told[:2] == ["sky", SCRIPTS["sky"][0]]  # the answer there is


def test_a_server_that_loads_and_wants_a_key(browser: Browser, locked: Served) -> None:
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    looks = 0

    def health(route: Route) -> None:
        nonlocal looks
        looks += 1
        if looks > 1:
            route.continue_()
        else:
            route.fulfill(status=503, json=loading)

    def slowly(page: Page) -> None:
        page.route("**/health", health)

    with Visit(browser, locked.url, refusals=True, ready=False, before=slowly) as visit:
        page = visit.page
        page.wait_for_selector("#model[data-state=loading]")
        assert page.text_content("#model") == "The model is loading"
        page.wait_for_selector("#model[data-state=locked]")
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.text_content("#key-label") == "This server wants an API key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        visit.until("document.getElementById('key-label').textContent.startsWith('The server does not take that key')")
        visit.until("document.activeElement.id === 'key'")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model[data-state=ready]")
        visit.ask("same")
        assert visit.text("plain") == "Four."
        assert KEY not in page.evaluate("JSON.stringify({ ...localStorage })")
        page.reload()
        page.wait_for_selector("#model[data-state=ready]")  # kept for this tab
        page.click("#tab-results")
        page.wait_for_selector("#result h2:has-text('Nothing here yet')")
        for path in ("results.json", "results/report.md", "results/page.html.txt"):  # and nobody else reads them
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(locked.url + path, timeout=10)


def test_the_loop_the_server_runs_is_where_the_controls_begin(browser: Browser, locked: Served) -> None:
    with Visit(browser, locked.url, before=with_key) as visit:
        assert visit.page.text_content("#loop-summary") == "14:20 k=6 passes=3 kv=frozen decode=first:8"
        assert visit.page.text_content("#cost") == ""  # passes decides it, and the page does not compute that
        visit.page.fill("#k", "4")
        visit.page.focus("#window-end")
        visit.page.keyboard.press("ArrowLeft")
        visit.page.reload()
        visit.page.wait_for_selector("#model[data-state=ready]")
        assert visit.page.text_content("#loop-summary") == "14:19 k=4 passes=3 kv=frozen decode=first:8"
        visit.ask("sky")
        assert [visit.text(v) for v in ("plain", "looped")] == list(SCRIPTS["sky"])  # plain is plain here too
        assert sorted(str(body["loop"]) for body in visit.requests)[1] == "None"


# results


def test_the_second_tab_shows_the_results_folder(visit: Visit) -> None:
    page = visit.page
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#files li")
    assert page.text_content("#folder") == "study"
    assert page.locator("#files a").count() == 6
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
    assert page.locator("#result h1").text_content() == "Found"
    visit.until("[...document.querySelectorAll('#result img')].map((img) => img.naturalWidth).join() === '1'")
    assert "<script>window.hit = 5</script>" in str(page.text_content("#result"))
    assert page.locator("#result td").all_text_contents() == ["a | b", "1.50"]
    page.click("text=table.csv")
    page.wait_for_selector("#result th:has-text('gain, nats')")
    cells = [row.locator("td").all_text_contents() for row in page.locator("#result tbody tr").all()]
    assert cells == [["12:16 k=3", "0.012346", "8"], ['a "b"\n c', "-inf", "10"]]
    page.click("text=broken.json")
    page.wait_for_selector("#result pre")
    assert page.text_content("#result pre") == "{not json"
    assert page.text_content("#result .error") == "This file is not JSON. Here it is as it is written."
    page.reload()
    page.wait_for_selector("#result pre")  # the address says what is shown
    assert page.evaluate("window.hit") is None


def test_verdicts_come_first_and_each_beside_its_own(visit: Visit) -> None:
    """A sweep and a study in one folder: a table of the study does not say what the sweep found."""
    page = visit.page
    found = {"m/sweep.jsonl": "1:2 k=2 helps.", "m/study.jsonl": "No loop helps.", "m/table.csv": "", "n/x.csv": "",
             "n/answer.md": "It hurts.", "m/report.html": "", "m/other.csv": "", "loose.md": ""}  # fmt: skip
    listed = [{"name": name, "kind": name.split(".")[-1], "size": 9, "modified": 1e9, "headline": said}
              for name, said in found.items()]  # fmt: skip
    page.route("**/results.json", lambda route: route.fulfill(json={"folder": "f", "results": listed}))
    page.route("**/results/**", lambda route: route.fulfill(body="a,b\n1,2\n"))
    page.click("#tab-results")
    page.wait_for_selector("#result .headline")
    assert page.locator("#files h3").all_text_contents() == page.locator("#result h2").all_text_contents() == ["m", "n"]
    assert page.locator("#result .headline").all_text_contents() == [
        "1:2 k=2 helps.", "No loop helps.", "It hurts."]  # fmt: skip
    links = page.locator("#result .hint a").all_text_contents()
    assert links == ["sweep.jsonl", "Report", "study.jsonl", "answer.md"]
    for name, told in (
        ("m/table.csv", ["No loop helps."]), ("m/other.csv", []), ("n/x.csv", ["It hurts."]), ("loose.md", []),
        ("m/sweep.jsonl", ["1:2 k=2 helps."]),
    ):  # fmt: skip
        page.evaluate("(name) => { location.hash = `results/${encodeURIComponent(name)}`; }", name)
        page.wait_for_selector(f"#result h2:has-text('{name}')")
        visit.until("document.querySelector('#result .content') !== null")
        assert (name, page.locator("#result .headline").all_text_contents()) == (name, told)


def test_a_report_is_shown_without_its_scripts(visit: Visit, server: Served) -> None:
    page = visit.page
    page.goto(f"{visit.url}#results/page.html")
    paragraph = page.frame_locator("iframe.report").locator("p")
    assert paragraph.text_content() == "Report"
    assert paragraph.evaluate("(p) => getComputedStyle(p).color") == "rgb(1, 2, 3)"  # it looks as it should
    assert paragraph.evaluate("() => origin") == "null"
    assert page.evaluate("window.hit") is None
    with page.expect_download() as download:
        page.click("text=Download")
    assert download.value.suggested_filename == "page.html"
    with urllib.request.urlopen(f"{server.url}results/page.html.txt", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain"  # by its own address it is no page
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}results/page.html", timeout=10)
    assert [message for message in visit.errors if "script" not in message and "other.example" not in message] == []
    assert any("other.example" in message and "Content Security Policy" in message for message in visit.errors)
    visit.errors.clear()  # the browser logs what it does not let the report do
    visit.left.clear()


def test_what_is_written_meanwhile_appears(visit: Visit, folder: Path) -> None:
    page = visit.page
    page.click("#tab-results")
    page.wait_for_selector("#files li")
    (folder / "late.jsonl").write_text('{"a": 1}\n')
    try:
        for _ in range(80):  # the server looks every few seconds
            page.click("#refresh")
            page.wait_for_timeout(100)
            if page.locator("text=late.jsonl").count():
                break
        page.click("text=late.jsonl")
        page.wait_for_selector("#result td")
        with (folder / "late.jsonl").open("a") as file:
            file.write('{"a": 2}\n')
        page.click("#refresh")
        visit.until("document.querySelectorAll('#result tbody tr').length === 2")  # at once
    finally:
        (folder / "late.jsonl").unlink()


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
def test_nothing_sticks_out_at_any_size(browser: Browser, server: Served, size: tuple[int, int]) -> None:
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
        page.set_viewport_size({"width": size[0] - 20, "height": size[1]})
        page.evaluate("location.hash = ''")
        page.wait_for_selector(".answer")
        right = "Math.round(document.querySelector('%s').getBoundingClientRect().right)"
        visit.until(f"{right % '.answers'} === {right % '.write'}")  # with room for a scroll bar beside the first
        plain, looped = (page.locator(f".answer.{v}").bounding_box() for v in ("plain", "looped"))
        assert plain is not None
        assert looped is not None
        assert (plain["y"] == looped["y"]) == (size[0] > 720)  # side by side, or one below the other


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Browser, server: Served) -> None:
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
