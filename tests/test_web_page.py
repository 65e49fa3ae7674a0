"""The web page in a headless browser, on our server, with answers that are scripted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="the server needs the extra 'server'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="driving a browser needs playwright: extra 'test'"
)

from playwright.sync_api import Browser, BrowserContext, Page, expect  # noqa: E402
from web_page import (  # noqa: E402
    BROWSER_ARGUMENTS,
    PAUSE,
    Network,
    ScriptedEngine,
    demo_tokenizer,
    find_browser,
    scripted_model,
    served,
    talk,
)

if find_browser() is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

STATIC = Path(__file__).resolve().parents[1] / "chatglm" / "server" / "static"
NASTY = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> &lt;b&gt;"
DESK = {"width": 1440, "height": 800}
PHONE = {"width": 360, "height": 740}


# ---- one server and one browser for all tests


@pytest.fixture(scope="module")
def model() -> Any:
    return scripted_model(demo_tokenizer())


@pytest.fixture(scope="module")
def network(model: Any) -> Iterator[Network]:
    with served(lambda: model) as port:
        network = Network(port)
        yield network
        network.cut()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def engine(model: Any) -> Iterator[ScriptedEngine]:
    yield model.engine
    model.engine.reset()


@pytest.fixture
def context(chromium: Browser, engine: ScriptedEngine) -> Iterator[BrowserContext]:
    """A browser without a past, in English, on a desk."""
    context = chromium.new_context(viewport=DESK, locale="en-US")
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, network: Network) -> Iterator[Page]:
    """The open page. In the end it must have complained of nothing, and asked nobody but our server."""
    page = context.new_page()
    errors: list[str] = []
    hosts = set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    open_page(page, network)
    yield page
    # The browser's own words for a request that failed, which some tests want to happen.
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []
    assert hosts - {""} == {urlsplit(network.url).netloc}  # "": data: and blob:


def open_page(page: Page, network: Network) -> None:
    page.goto(network.url)
    expect(page.locator("#model")).to_contain_text("demo")


def last(page: Page, selector: str = ".answer") -> Any:
    return page.locator(f".turn.last {selector}")


def ask(page: Page, question: str) -> None:
    """Asks without waiting for the answer."""
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def wait_until(page: Page, true: Callable[[], bool]) -> None:
    """Waits ten seconds for what happens outside of the page."""
    for _ in range(200):
        if true():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it has not come true")


def choose_from_menu(page: Page, entry: str) -> None:
    page.locator("#open-more").click()
    page.locator("#more").get_by_text(entry).click()


def stored(page: Page) -> list[dict[str, Any]]:
    """What the browser keeps of conversations."""
    return page.evaluate(
        """async () => {
            const { openStore } = await import("/static/store.js");
            return (await (await openStore()).all()).conversations;
        }"""
    )


# ---- asking


def test_the_demo_model_answers(chromium, context):
    from chatglm.server.model import load_model
    from chatglm.server.settings import Settings

    with served(lambda: load_model("demo", Settings(), device="cpu")) as port:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        talk(page, "12+30=?")
        expect(last(page)).to_have_text(re.compile("42"))
        expect(last(page, ".speed")).to_contain_text("tokens")


def test_an_answer_appears_as_it_is_written(page, engine):
    engine.script["count"] = f"one two{PAUSE} three"
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    expect(page.locator("#stop")).to_be_visible()
    engine.resume()
    expect(last(page)).to_have_text("one two three")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#status")).to_have_text("one two three")  # for screen readers, once it is whole


def test_the_rounds_before_and_the_settings_are_sent(page, engine):
    talk(page, "first")
    page.locator("#open-settings").click()
    settings = {"system": "Be kind.", "temperature": "0.25", "top_p": "0.5", "max_tokens": "7", "seed": "3"}
    for name, value in settings.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.keyboard.press("Escape")
    ask(page, "second")
    expect(last(page)).to_contain_text("second")
    request = engine.requests[-1]
    prompt = engine.prompt(request)
    assert (
        prompt.index("Be kind.")
        < prompt.index("first")
        < prompt.index("You said: first")
        < prompt.index("second")
    )
    assert (request.temperature, request.top_p, request.max_tokens, request.seed) == (0.25, 0.5, 7, 3)
    page.reload()
    talk(page, "third")
    assert engine.requests[-1].temperature == 0.25
    page.locator("#open-settings").click()
    page.locator("#reset").click()
    page.keyboard.press("Escape")
    talk(page, "fourth")
    assert (engine.requests[-1].temperature, engine.requests[-1].seed) == (0.8, None)


def test_the_settings_tell_what_the_model_is(page):
    page.locator("#open-settings").click()
    for fact in ("demo", "chatglm2", "3.2M", "12.8 MB", "cpu · float32", "2,048 tokens"):
        expect(page.locator("#facts").get_by_text(fact, exact=True)).to_be_visible()


def test_a_conversation_that_is_too_long_loses_its_oldest_rounds(page, engine):
    words = "many words about nothing at all " * 8
    messages = [
        {"role": role, "content": f"{i} {words}"} for i in range(40) for role in ("user", "assistant")
    ]
    import_file(page, {"messages": messages})
    expect(page.locator(".turn")).to_have_count(40)
    ask(page, "What now?")
    expect(last(page)).to_have_text("You said: What now?")
    expect(last(page, ".note")).to_contain_text("longer than the model's context")
    assert "39 many words" in engine.prompt(engine.requests[-1])
    assert "\n0 many words" not in engine.prompt(engine.requests[-1])


# ---- stop, again, edit


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_has_come_and_frees_the_server(page, engine, how):
    engine.script["count"] = f"one two{PAUSE} three"
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(last(page, ".note")).to_contain_text("Stopped.")
    expect(last(page)).to_have_text("one two")
    wait_until(page, lambda: engine.answers[-1].cancelled)
    talk(page, "go on")  # and the conversation goes on


def test_another_answer_stands_beside_the_first(page, engine):
    engine.script["dice"] = "four"
    talk(page, "dice")
    engine.script["dice"] = "five"
    last(page, "[data-action=again]:visible").click()
    expect(last(page)).to_have_text("five")
    expect(last(page, ".number")).to_have_text("2 / 2")
    last(page, "[data-action=previous]").click()
    expect(last(page)).to_have_text("four")
    talk(page, "and now?")
    prompt = engine.prompt(engine.requests[-1])
    assert "four" in prompt and "five" not in prompt


def test_the_last_question_can_be_edited(page, engine):
    talk(page, "first")
    talk(page, "secnod")
    page.locator(".turn.last").hover()
    last(page, "[data-action=edit]").click()
    last(page, ".edit textarea").fill("second")
    last(page, ".edit textarea").press("Enter")
    expect(last(page)).to_have_text("You said: second")
    expect(last(page, ".question")).to_have_text("second")
    assert "secnod" not in engine.prompt(engine.requests[-1])
    last(page, "[data-action=previous]").click()
    expect(last(page, ".question")).to_have_text("secnod")  # nothing is lost


def test_escape_leaves_the_question_as_it_was(page):
    talk(page, "first")
    page.locator(".turn.last").hover()
    last(page, "[data-action=edit]").click()
    last(page, ".edit textarea").fill("other")
    page.keyboard.press("Escape")
    expect(last(page, ".question")).to_have_text("first")
    expect(last(page, "[data-action=edit]")).to_be_focused()


# ---- nothing is lost


def test_reload_brings_everything_back(page, engine):
    talk(page, "first")
    talk(page, "second")
    page.locator("#question").fill("half a thought")
    page.reload()
    expect(page.locator(".question")).to_have_text(["first", "second"])
    expect(page.locator(".answer")).to_have_text(["You said: first", "You said: second"])
    expect(page.locator("#question")).to_have_value("half a thought")


def test_reload_in_the_middle_keeps_what_was_shown(page, engine):
    engine.script["count"] = f"one two{PAUSE} three"
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    page.reload()
    expect(last(page)).to_have_text("one two")
    engine.script["count"] = "one two three"
    last(page, ".note button").click()
    expect(last(page)).to_have_text("one two three")


def test_a_lost_connection_keeps_what_was_shown_and_offers_another_try(page, engine, network):
    engine.script["count"] = f"one two{PAUSE} three"
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    network.cut()
    expect(last(page, ".note span")).to_have_text("The connection broke off; what had come is kept.")
    expect(last(page)).to_have_text("one two")
    last(page, ".note button").click()
    expect(last(page, ".note span")).to_have_text("The server cannot be reached.")
    network.restore()
    page.reload()
    expect(last(page, ".note span")).to_have_text("The server cannot be reached.")
    last(page, "[data-action=previous]").click()
    expect(last(page)).to_have_text("one two")
    engine.script["count"] = "one two three"
    last(page, ".note button").click()
    expect(last(page)).to_have_text("one two three")


def test_a_killed_browser_keeps_what_was_shown(chromium, engine, network, tmp_path):
    engine.script["count"] = f"one two{PAUSE} three"
    start = chromium.browser_type.launch_persistent_context
    context = start(tmp_path, executable_path=find_browser(), args=BROWSER_ARGUMENTS)
    page = context.pages[0]
    open_page(page, network)
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    page.wait_for_timeout(400)  # what is shown is stored within 300 ms
    address = page.url
    kill_browser(tmp_path)
    context = start(tmp_path, executable_path=find_browser(), args=BROWSER_ARGUMENTS)
    page = context.pages[0]
    page.goto(address)
    expect(last(page)).to_have_text("one two")
    context.close()


def test_a_killed_server_takes_nothing_of_what_was_shown(context):
    def start(port: str, answer: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, str(Path(__file__).with_name("scripted_server.py")), port, "count", answer]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with process.stdout as said:
            return process, said.readline().strip()

    process, port = start("0", f"one two{PAUSE} three")
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{port}")
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    page.wait_for_timeout(400)  # what is shown is stored within 300 ms
    process.kill()
    process.wait(10)
    expect(last(page, ".note span")).to_have_text("The connection broke off; what had come is kept.")
    expect(last(page)).to_have_text("one two")
    process, _ = start(port, "one two three")
    page.reload()
    expect(last(page)).to_have_text("one two")
    last(page, ".note button").click()
    expect(last(page)).to_have_text("one two three")
    process.kill()
    process.wait(10)


def kill_browser(profile: Path) -> None:
    """Kills the browser that uses this profile, as a power cut would."""
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if f"--user-data-dir={profile}" in arguments and not any(a.startswith("--type=") for a in arguments):
            process.kill()
            process.wait(10)


def test_damaged_stores_do_not_keep_the_page_from_working(page):
    talk(page, "first")
    page.evaluate(
        """async () => {
            localStorage.setItem("chatglm.preferences", '{"theme": 7, "temperature": "hot", "language": "xx');
            const request = indexedDB.open("chatglm", 1);
            await new Promise((resolve) => (request.onsuccess = resolve));
            const store = request.result.transaction("conversations", "readwrite").objectStore("conversations");
            store.put({ id: "broken", turns: [{ attempts: "none" }] });
            await new Promise((resolve) => (store.put({ id: "empty" }).onsuccess = resolve));
            request.result.close();
        }"""
    )
    page.reload()
    expect(page.locator("#notice")).to_contain_text("not shown: 2")
    expect(page.locator(".answer")).to_have_text(["You said: first"])
    talk(page, "second")


def test_a_full_store_is_told(page):
    page.evaluate(
        """() => {
            IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
        }"""
    )
    talk(page, "first")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    expect(last(page)).to_have_text("You said: first")


def test_without_storage_the_page_works_and_says_so(context, network):
    context.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
            Object.defineProperty(window, name, { get() { throw new DOMException("no", "SecurityError"); } });
        }"""
    )
    page = context.new_page()
    open_page(page, network)
    expect(page.locator("#notice")).to_contain_text("store nothing")
    talk(page, "first")
    expect(last(page)).to_have_text("You said: first")


def test_tabs_see_what_the_others_write(page, context, engine, network):
    other = context.new_page()
    open_page(other, network)
    talk(page, "from the first tab")
    other.locator("#conversations").get_by_text("from the first tab").click()
    expect(last(other)).to_have_text("You said: from the first tab")
    engine.script["count"] = f"one two{PAUSE} three"
    ask(other, "count")
    expect(last(page)).to_have_text("one two")
    expect(last(page, ".note")).not_to_be_visible()  # it is being answered, though not here
    expect(page.locator("#send")).to_be_disabled()
    engine.resume()
    expect(last(page)).to_have_text("one two three")
    expect(page.locator("#send")).to_be_enabled()


def test_a_network_that_falls_silent_is_a_lost_connection(page, engine):
    engine.script["count"] = f"one two{PAUSE} three"
    page.clock.install()
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    page.clock.fast_forward(61_000)  # the server would have written something every 15 seconds
    expect(last(page, ".note span")).to_have_text("The connection broke off; what had come is kept.")
    expect(last(page)).to_have_text("one two")
    wait_until(page, lambda: engine.answers[-1].cancelled)


# ---- what the server refuses


def test_a_model_that_is_being_loaded_is_waited_for(page):
    error = {"error": {"message": "The model is being loaded."}}
    page.route("**/info", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, json=error))
    page.reload()
    expect(page.locator("#notice")).to_contain_text("The model is being loaded")
    page.unroute("**/info")
    expect(page.locator("#model")).to_contain_text("demo")
    expect(page.locator("#notice")).not_to_be_visible()


def test_a_busy_server_is_told_with_the_time_to_wait(page):
    error = json.dumps(
        {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": None}}
    )
    route = "**/v1/chat/completions"
    page.route(route, lambda route: route.fulfill(status=429, headers={"Retry-After": "5"}, body=error))
    ask(page, "first")
    expect(last(page, ".note")).to_contain_text("in 5 seconds")
    page.unroute(route)
    last(page, ".note button").click()
    expect(last(page)).to_have_text("You said: first")


def test_a_refusal_is_shown_in_the_server_s_words(page):
    page.evaluate("localStorage.setItem('chatglm.preferences', JSON.stringify({ max_tokens: 999999 }))")
    page.reload()
    ask(page, "first")
    expect(last(page, ".note")).to_contain_text("max_tokens is 999999")


def test_a_question_that_is_too_long_can_be_edited_instead_of_asked_again(page, engine):
    ask(page, "字" * 3000)
    expect(last(page, ".note")).to_contain_text("shorten")
    page.reload()
    button = last(page, ".note button")
    expect(button).to_have_text("Edit the question")
    button.click()
    last(page, ".edit textarea").fill("short")
    last(page, ".edit textarea").press("Enter")
    expect(last(page)).to_have_text("You said: short")
    expect(last(page, ".note")).not_to_be_visible()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(page):
    keys: list[str | None] = []

    def guard(route: Any) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, body='{"error": {"message": "This server wants an API key."}}')

    page.route("**/v1/**", guard)
    ask(page, "first")
    page.locator("#unlock input").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#unlock input")).to_have_value("")
    page.locator("#unlock input").fill("secret")
    page.locator("#unlock .primary").click()
    expect(last(page)).to_have_text("You said: first")
    assert keys == [None, "Bearer wrong", "Bearer secret"]
    assert page.evaluate("sessionStorage.getItem('chatglm.key')") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)") + json.dumps(stored(page))


def test_with_a_key_the_page_opens_by_the_browser_s_password(chromium, model, engine):
    from chatglm.server.settings import Settings

    with served(lambda: model, Settings(api_keys=("secret",))) as port:
        context = chromium.new_context(http_credentials={"username": "", "password": "secret"})
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        talk(page, "first")
        expect(last(page)).to_have_text("You said: first")
        context.close()


# ---- several conversations


def test_conversations_are_listed_renamed_and_deleted(page):
    talk(page, "apples")
    page.locator("#new").click()
    talk(page, "pears")
    names = page.locator("#conversations button")
    expect(names).to_have_text(["pears", "apples"])
    names.get_by_text("apples").click()
    expect(page.locator(".question")).to_have_text(["apples"])
    choose_from_menu(page, "Rename")
    page.locator("#naming input").fill("About apples")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("About apples")
    page.reload()
    expect(names).to_have_text(["pears", "About apples"])
    choose_from_menu(page, "Delete")
    page.locator("#confirm .primary").click()
    expect(names).to_have_text(["pears"])
    expect(page.locator("#welcome")).to_be_visible()
    page.go_back()
    expect(page.locator(".question")).to_have_text(["pears"])


def test_an_answer_goes_on_while_another_conversation_is_open(page, engine):
    engine.script["count"] = f"one two{PAUSE} three"
    ask(page, "count")
    expect(last(page)).to_have_text("one two")
    page.locator("#new").click()
    talk(page, "meanwhile")
    engine.resume()
    page.locator("#conversations").get_by_text("count").click()
    expect(last(page)).to_have_text("one two three")


def rounds(count: int) -> list[dict[str, str]]:
    """The messages of so many rounds."""
    roles = ("user", "assistant")
    return [{"role": role, "content": f"{role} {i}\n\nand more"} for i in range(count) for role in roles]


def export_file(page: Page, button: Callable[[], None], target: Path) -> Path:
    with page.expect_download() as download:
        button()
    download.value.save_as(target / download.value.suggested_filename)
    return target / download.value.suggested_filename


def import_file(page: Page, content: Any) -> None:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    file = {"name": "conversations.json", "mimeType": "application/json", "buffer": content}
    page.locator("#file").set_input_files(file)


def test_export_and_import_bring_everything_back(page, engine, tmp_path):
    engine.script["表格"] = "| a | b |\n|---|---|\n| 1 | 😀 |"
    talk(page, "表格")
    last(page, "[data-action=again]:visible").click()
    expect(last(page, ".number")).to_have_text("2 / 2")
    page.locator("#new").click()
    talk(page, "second")
    before = stored(page)
    page.locator("#open-settings").click()
    file = export_file(page, page.locator("#export-all").click, tmp_path)
    page.locator("#delete-all").click()
    page.locator("#confirm .primary").click()
    expect(page.locator("#conversations button")).to_have_count(0)
    assert stored(page) == []
    import_file(page, file.read_bytes())
    expect(page.locator("#notice")).to_contain_text("Conversations imported: 2.")
    assert stored(page) == before
    import_file(page, file.read_bytes())  # nothing doubles
    expect(page.locator("#notice")).to_contain_text("Conversations imported: 0.")
    assert stored(page) == before


def test_an_imported_conversation_is_shown_at_its_end_and_the_news_of_it_goes_by_itself(page):
    page.clock.install()
    import_file(page, {"messages": rounds(40)})
    expect(page.locator("#notice")).to_contain_text("Conversations imported: 1.")
    page.clock.run_for(1000)
    place = "[scroller.scrollTop, scroller.scrollHeight - scroller.clientHeight]"
    wait_until(page, lambda: abs(page.evaluate(f"{place}.reduce((at, end) => end - at)")) < 2)
    expect(page.locator("#to-end")).not_to_be_visible()
    page.clock.run_for(6000)
    expect(page.locator("#notice")).not_to_be_visible()
    import_file(page, b"nothing")
    page.clock.run_for(60_000)
    expect(page.locator("#notice")).to_be_visible()  # bad news stays


def test_one_conversation_is_exported_for_people_and_for_the_terminal(page, tmp_path):
    from chatglm.cli.conversation import read_messages

    talk(page, "apples?")
    file = export_file(page, lambda: choose_from_menu(page, "Export as Markdown"), tmp_path)
    assert file.name == "apples.md"
    assert file.read_text() == "# apples?\n\n> apples?\n\nYou said: apples?\n"
    file = export_file(page, lambda: choose_from_menu(page, "Export as JSON"), tmp_path)
    said = [{"role": "user", "content": "apples?"}, {"role": "assistant", "content": "You said: apples?"}]
    assert read_messages(file) == said
    import_file(page, {"messages": said, "title": "From elsewhere"})
    expect(page.locator("#title")).to_have_text("From elsewhere")
    expect(page.locator(".answer")).to_have_text(["You said: apples?"])


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"null", b'{"conversations": [{"turns": [1]}]}', b"[" * 10**5]
)
def test_a_file_without_conversations_is_refused(page, content):
    import_file(page, content)
    expect(page.locator("#notice")).to_contain_text("no conversations that can be read")


# ---- languages, colours, keyboard, sizes


def test_the_language_is_the_browser_s_and_can_be_switched(chromium, engine, network):
    context = chromium.new_context(locale="zh-CN")
    page = context.new_page()
    open_page(page, network)
    expect(page.locator("#question")).to_have_attribute("placeholder", "输入问题")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    talk(page, "你好")
    expect(last(page, "[data-action=copy]")).to_have_attribute("aria-label", "复制")
    page.locator("#language").click()
    expect(page.locator("#question")).to_have_attribute("placeholder", "Ask something")
    expect(last(page, "[data-action=copy]")).to_have_attribute("aria-label", "Copy")
    page.reload()
    expect(page.locator("#new")).to_have_text("New conversation")
    context.close()


def test_both_languages_have_every_text(page):
    texts = (STATIC / "texts.js").read_text(encoding="utf-8")
    english, chinese = re.findall(r"const (?:EN|ZH) = \{(.*?)\n\};", texts, re.DOTALL)
    keys = [re.findall(r"^  (\w+):", table, re.MULTILINE) for table in (english, chinese)]
    assert keys[0] == keys[1]
    code = "".join(file.read_text(encoding="utf-8") for file in STATIC.glob("*.*"))
    used = set(re.findall(r"data-(?:text|label|hint)=\"(\w+)\"", code)) | set(
        re.findall(r"\btext\(\"(\w+)\"", code)
    )
    assert used <= set(keys[0])


def test_colours_follow_the_system_until_one_is_chosen(page):
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="dark")
    dark = paper()
    page.emulate_media(color_scheme="light")
    light = paper()
    assert light == "rgb(255, 255, 255)" != dark
    page.locator("#theme").click()
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Colours: dark")
    assert paper() == dark
    page.reload()
    assert paper() == dark


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_dark_enough_to_read(theme):
    """WCAG's contrast of 4.5 for text on every ground that it stands on."""
    colours = {
        name: pair.split(", ")[theme]
        for name, pair in re.findall(
            r"--([\w-]+): light-dark\((#\w+, #\w+)\)", (STATIC / "style.css").read_text()
        )
    }
    grounds = {"ink": "paper side raised bubble code warn", "quiet": "paper side raised code",
               "accent": "paper raised code", "danger": "raised", "on-accent": "accent"}  # fmt: skip
    contrasts = {
        (text, ground): contrast(colours[text], colours[ground])
        for text, names in grounds.items()
        for ground in names.split()
    }
    assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}


def contrast(first: str, second: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_enter_sends_but_not_with_shift_nor_while_a_word_is_composed(page, engine):
    field = page.locator("#question")
    field.fill("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    for composing in ("{ isComposing: true }", "{ keyCode: 229 }"):
        field.evaluate(
            f"field => field.dispatchEvent(new KeyboardEvent('keydown', "
            f"{{ key: 'Enter', bubbles: true, cancelable: true, ...{composing} }}))"
        )
    assert engine.requests == []
    field.press("Enter")
    expect(last(page, ".question")).to_have_text("one\ntwo")
    expect(field).to_have_value("")


def test_the_page_follows_the_answer_only_while_the_reader_is_at_its_end(page, engine):
    lines = "\n\n".join(f"line {i}" for i in range(60))
    engine.script["long"] = f"{lines}{PAUSE}\n\n{lines}{PAUSE}\n\nthe end"

    def distance() -> int:
        return page.evaluate("(({ scrollHeight: h, scrollTop: t, clientHeight: c }) => h - t - c)(scroller)")

    ask(page, "long")
    expect(last(page, "p")).to_have_count(60 + 2)  # with the question and the note
    assert distance() < 2
    page.mouse.move(700, 400)
    page.mouse.wheel(0, -500)
    expect(page.locator("#to-end")).to_be_visible()
    place = page.evaluate("scroller.scrollTop")
    engine.resume()
    expect(last(page)).to_contain_text("the end")
    assert page.evaluate("scroller.scrollTop") == place
    page.locator("#to-end").click()
    assert distance() < 2


def test_a_phone_shows_everything_without_scrolling_sideways(page, engine):
    engine.script["wide"] = "\n\n".join(
        ["x" * 300, "|" + "a |" * 30 + "\n|" + "-|" * 30, f"```\n{'y' * 300}\n```"]
    )
    page.set_viewport_size(PHONE)
    talk(page, "w" * 300)
    talk(page, "wide")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("scroller.scrollWidth <= scroller.clientWidth")
    expect(page.locator("#new")).not_to_be_visible()
    page.locator("#open-drawer").click()
    expect(page.locator("#close-drawer")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#new")).not_to_be_visible()
    expect(page.locator("#open-drawer")).to_be_focused()


def test_text_reads_in_its_own_direction_and_code_from_left_to_right(page, engine):
    engine.script["مرحبا بالعالم"] = (
        "# عنوان\n\nنص عربي.\n\nEnglish text.\n\n- واحد `x = 1`\n- two\n\n1. واحد\n\n   اثنان\n\n"
        "> اقتباس\n\n| اسم | b |\n|---|---|\n| قيمة | 1 |\n\n```python\n# تعليق\n```"
    )
    talk(page, "مرحبا بالعالم")

    def styles(selector: str, *names: str) -> list[Any]:
        read = "(all, names) => all.map((one) => names.map((name) => getComputedStyle(one)[name]).join(' '))"
        return page.locator(f".turn.last {selector}").evaluate_all(read, names)

    assert styles(".question", "direction") == ["rtl"]
    assert styles(".answer h3", "direction") == ["rtl"]
    assert styles(".answer > p", "direction") == ["rtl", "ltr"]
    assert styles("li", "direction") == ["rtl", "ltr", "rtl"]
    assert styles("li", "marginLeft", "marginRight") == [
        "0px 25.6px",
        "25.6px 0px",
        "0px 25.6px",
    ]  # the bullets' room
    assert styles("blockquote", "direction", "borderRightWidth") == ["rtl 3px"]
    assert styles(":is(th, td)", "direction") == ["rtl", "ltr", "rtl", "ltr"]
    assert set(styles("code", "direction") + styles(".code", "direction")) == {"ltr"}
    page.locator("#question").fill("شكرا")
    assert page.evaluate("getComputedStyle(question).direction") == "rtl"


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_a_long_conversation_scrolls_in_its_place_and_the_page_stays(page, viewport):
    page.set_viewport_size(viewport)
    import_file(page, {"messages": rounds(40)})
    expect(page.locator(".turn")).to_have_count(40)
    heights = "[document.documentElement.scrollHeight, document.body.scrollHeight]"
    assert page.evaluate(heights) == [viewport["height"]] * 2
    for which in ("first", "last"):  # as a screen reader goes from heading to heading
        getattr(page.locator("h2.unseen"), which).evaluate("(heading) => heading.scrollIntoView()")
        assert page.evaluate("[scrollY, document.body.scrollTop]") == [0, 0]
        expect(page.locator("header")).to_be_in_viewport()


def test_every_control_has_a_name(page, engine):
    engine.script["code"] = "```python\n1\n```"
    talk(page, "code")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([hidden]), textarea, img, dialog, nav, aside")]
            .filter((element) => !(element.textContent.trim() || element.getAttribute("aria-label") ||
                element.labels?.length || element.getAttribute("aria-labelledby") || element.hasAttribute("alt")))
            .map((element) => element.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_routes_fits_a_phone_and_follows_the_system_s_colours(page, network, scheme):
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{network.url}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    text = page.evaluate("getComputedStyle(document.documentElement).color")
    assert text == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]


# ---- what a model writes


def test_html_in_an_answer_stays_text(page, engine):
    engine.script["html"] = f"{NASTY}\n\n- {NASTY}\n\n| {NASTY} |\n|---|\n| x |\n\n```html\n{NASTY}\n```"
    talk(page, "html")
    talk(page, NASTY)
    assert page.locator(".answer script, .answer img, .question script, .question img").count() == 0
    expect(page.locator(".answer p").first).to_have_text(NASTY)
    expect(last(page, ".question")).to_have_text(NASTY)
    assert page.title() != "run"
    page.reload()
    expect(last(page, ".question")).to_have_text(NASTY)


def test_code_and_tables_are_elements_and_code_can_be_copied(page, context, engine):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    engine.script["code"] = "| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\nif x < 1:\n\tprint('点')\n```"
    talk(page, "code")
    expect(last(page, "td")).to_have_text(["1", "2"])
    expect(last(page, ".code-head span")).to_have_text("python")
    last(page, ".copy-code").click()
    expect(last(page, ".copy-code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "if x < 1:\n\tprint('点')"
    last(page, "[data-action=copy]").click()
    wait_until(page, lambda: page.evaluate("navigator.clipboard.readText()") == engine.script["code"])


def test_the_page_needs_nobody_else_and_builds_no_html():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""(?:src|href|from|import|url)\W{0,3}["'(](?:https?:)?//""", text), file.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text
        ), file.name
