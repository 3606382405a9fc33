"""The memory inspector in a real browser: what it shows is what the server answered."""

import json
import re

import httpx
import pytest

from lola_vllm.serving import chat
from lola_vllm.serving.inspector import ROUTE, page_files
from tests.support.browser import chromium
from tests.support.inspector import Page
from tests.support.servers import KEY

STORY = "The miller went to the river and the river went to the sea. " * 30
PROMPT = f"<b>The code</b> & the vault: 73192 🦙. {STORY}"
TEXTS = "return [...document.querySelectorAll('.pane:not([hidden]) .text')].length"


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def address(lola_server):
    return lola_server.url + ROUTE


@pytest.fixture(scope="module")
def memory(lola_server):
    body = {"prompt": PROMPT, "forgotten": True, "history": True}
    return lola_server.client.post("/v1/lola/memory", json=body).json()


@pytest.fixture(scope="module")
def open_page(browser, address):
    page = Page(browser)
    page.open(address, KEY)
    page.prompt(PROMPT)
    page.show()
    return page


@pytest.fixture
def shown(open_page):
    """The page with the prompt's memory on it, in its first state."""
    browser = open_page.browser
    if browser.text(".pane:nth-of-type(1) h2") != "Text" or open_page.tokens("held") == []:
        open_page.prompt(PROMPT)
        open_page.show()
    if not browser.run("return document.getElementById('alone').hidden"):
        browser.click("#alone")
    for name in ("layer", "head"):
        open_page.set(f"#{name}", 0)
    open_page.set("#least", 1)
    open_page.set("#colour", "passages")
    browser.run("document.getElementById('clear').click()")
    return open_page


def counts(memory, layers=range(30), heads=range(3), read=None):
    """Per token, the heads that hold it after so many tokens."""
    found = [0] * memory["num_tokens"]
    for layer in layers:
        for head in heads:
            told = memory["layers"][layer]["heads"][head]
            for position, entered in zip(told["positions"], told["entered"], strict=True):
                found[position] += read is None or entered <= read
            for position, entered, left in told["gone"] if read is not None else ():
                found[position] += entered <= read < left
    return found


def span_of(memory, text):
    """First and last token of a text's first place."""
    start = "".join(memory["texts"]).index(text)
    ends, end = [], 0
    for piece in memory["texts"]:
        end += len(piece)
        ends.append(end)
    first = next(i for i, end in enumerate(ends) if end > start)
    last = next(i for i, end in enumerate(ends) if end >= start + len(text))
    return first, last


@pytest.mark.parametrize(
    ("route", "files"), [(ROUTE, page_files()), ("/", chat.page_files())], ids=["inspector", "chat"]
)
def test_a_page_and_its_files_need_no_key_and_nothing_from_elsewhere(lola_server, route, files):
    url = httpx.URL(lola_server.url).join(route)
    answer = httpx.get(url)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    links = set(re.findall(r'(?:src|href)="([^"]+)"', answer.text)) - {"data:,"}
    assert {"main.js", "style.css"} <= {link.rpartition("/")[2] for link in links}
    for link in links:
        assert "//" not in link and httpx.get(url.join(link)).status_code == 200, link
    folder = f"{lola_server.url}{ROUTE if route == ROUTE else chat.ROUTE}"
    for name in set(files) - {""}:
        file = httpx.get(f"{folder}/{name}")
        assert file.status_code == 200 and 0 < len(file.text.splitlines()) < 500
        # But for the name of SVG's elements, no address, and no text is ever read as HTML.
        text = file.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"@import|url\(|https?://|innerHTML|insertAdjacentHTML", text), name
    for name in ("nothing.js", "..%2f__init__.py"):
        assert httpx.get(f"{folder}/{name}").status_code == 404


# --- the map


def test_the_text_is_shown_as_text(shown, memory):
    tokens = shown.tokens("textContent")
    assert tokens == memory["texts"] and "".join(tokens) == PROMPT
    assert shown.browser.run("return document.querySelector('.text b')") is None
    for kept in (
        "document.documentElement.outerHTML",
        "JSON.stringify([{...localStorage}, {...sessionStorage}])",
    ):
        assert KEY not in shown.browser.run(f"return {kept}")


@pytest.mark.parametrize(("layer", "head"), [(None, None), (29, 2)])
def test_sliders_choose_layer_and_head(shown, memory, layer, head):
    shown.slide("layer", 0 if layer is None else layer + 1)
    shown.slide("head", 0 if head is None else head + 1)
    browser = shown.browser
    assert browser.text("#layer-name") == ("all" if layer is None else str(layer))
    assert browser.text("#head-name") == ("all" if head is None else str(head))
    layers = range(30) if layer is None else [layer]
    heads = range(3) if head is None else [head]
    assert shown.held() == counts(memory, layers, heads)


# --- heads and spans


def expected_cells(memory, first, last):
    wanted = set(range(max(4, first), last + 1))
    return {
        (layer["layer"], index): len(wanted & set(head["positions"]))
        for layer in memory["layers"]
        for index, head in enumerate(layer["heads"])
    }


def test_a_span_of_the_text_shows_which_heads_hold_it(shown, memory):
    first, last = span_of(memory, "73192")
    shown.browser.drag(shown.token(first), shown.token(last))
    shown.browser.wait(shown.chosen)
    found = shown.chosen()
    # Where in a glyph the mouse comes down may be the token before or after.
    assert found == list(range(found[0], found[-1] + 1)) and len(found) >= 3
    assert shown.cells() == expected_cells(memory, found[0], found[-1])

    shown.browser.type("#find", "73192")
    assert shown.chosen() == list(range(first, last + 1))
    cells = shown.cells()
    assert cells == expected_cells(memory, first, last)
    whole = sum(held == last - first + 1 for held in cells.values())
    note = shown.browser.text("#heat-note")
    assert f"held whole by {whole} of 90 heads" in note and "73192" in note
    shown.browser.click("#clear")
    assert shown.chosen() == [] and "Select a span" in shown.browser.text("#heat-note")


# --- time


def test_the_timeline_goes_through_the_states(shown, memory):
    step = memory["history_interval"]
    assert step == memory["update_interval"] == 64
    for stop in (1, 3, 5):
        shown.time(stop)
        read = (stop + 1) * step
        assert shown.held() == counts(memory, read=read)
        assert shown.browser.text("[data-part=time-name]").startswith(f"{read} of")
        places = shown.tokens("className")
        start = max(4, read - memory["window_size"])
        assert sum("unread" in place for place in places) == memory["num_tokens"] - read
        assert [i for i, place in enumerate(places) if "window" in place] == [*range(start, read)]
    shown.time(99)
    assert shown.held() == counts(memory)


# --- two sides


def test_what_a_session_remembers_from_turn_to_turn(shown, lola_server):
    client, browser = lola_server.client, shown.browser
    sizes = []
    for text in (f"{STORY} The code is 4711.", f" And then: {STORY}"):
        answer = client.post("/v1/lola/sessions/shown/append", json={"prompt": text})
        assert answer.status_code == 200, answer.text
        sizes.append(answer.json()["tokens"])
    browser.click("[name=kind][value=session]")
    assert not browser.run("return document.getElementById('prompt').checkVisibility()")
    options = "return [...document.querySelectorAll(arguments[0])].map((o) => o.value)"
    browser.wait(lambda: "shown" in browser.run(options, "#session option"))
    shown.set("#session", "shown")
    assert browser.run(options, "#turn option") == ["2", "1"]
    shown.show()
    assert browser.text(".summary").startswith(f"{sizes[1]:,} tokens")
    assert browser.text(".pane:nth-of-type(1) h2") == "shown, turn 2"
    browser.click("#before")
    browser.wait(lambda: browser.run(TEXTS) == 2)
    assert browser.text(".pane:nth-of-type(2) h2") == "shown, turn 1"
    assert len(shown.tokens("held", 1)) == sizes[0]
    one = client.get("/v1/lola/sessions/shown@1/tokens").json()["tokens"]
    # As the page asks in the end: computed from the start, and not from the stored state.
    body = {"prompt": one, "forgotten": True, "history": True}
    then = counts(client.post("/v1/lola/memory", json=body).json())
    shown.settle()
    assert shown.held(1) == then
    browser.click("[name=kind][value=prompt]")
    assert not browser.run("return document.getElementById('session').checkVisibility()")


# --- answers, the example, files and links


def test_the_example_is_recalled_on_one_click(shown):
    browser = shown.browser
    browser.run(
        "window.seen = new Set(); const a = document.getElementById('answer');"
        "new MutationObserver(() => seen.add(a.textContent)).observe(a, {childList: true})"
    )
    browser.click("#example")
    browser.wait(lambda: browser.text("#verdict"), 120)
    shown.settle()
    assert browser.run("return seen.size") > 5  # it came in parts
    assert "7319482" in browser.text("#answer")
    assert browser.text("#verdict").startswith("Recalled: “7319482”.")
    chosen = shown.chosen()
    tokens, levels = shown.tokens("textContent"), shown.levels()
    assert "".join(tokens[p] for p in chosen) == "7319482"
    # In the view of all heads the number stands out, and prose is pale.
    assert min(levels[p] for p in chosen) >= 6
    assert sum(level >= 6 for level in levels) < len(levels) / 50
    assert sum(level > 0 for level in levels) < len(levels) / 8
    cells = shown.cells()
    whole = sum(held == 7 for held in cells.values())
    assert whole and f"{whole} of 90 heads hold it whole" in browser.text("#verdict")


def test_the_reading_is_saved_and_opened_again(shown, memory, lola_server, tmp_path):
    browser = shown.browser
    browser.save_to(tmp_path)
    browser.click("#save")
    file = tmp_path / "lola-memory.json"
    browser.wait(file.exists)
    saved = json.loads(file.read_text())
    assert saved["memory"] == memory and KEY not in file.read_text()
    config = lola_server.client.get("/v1/lola/info").json()["lola_config"]
    assert saved["lola_config"] == config
    browser.press("#open", str(file))
    browser.wait(lambda: browser.run(TEXTS) == 2)
    assert shown.held(1) == counts(memory)
    settings = "return [...document.querySelectorAll('.settings')].map((p) => p.textContent)"
    one, two = browser.run(settings)
    sizes = [layer["heads"][0]["sparse_cache_size"] for layer in memory["layers"]]
    assert one == two
    assert one == (
        f"smollm2: window of {memory['window_size']}, 4 sinks, sparse caches of {min(sizes):,} to "
        f"{max(sizes):,} pairs, an update every {memory['update_interval']} tokens."
    )
    # A reading of a server with other settings.
    saved["lola_config"] = {**config, "sparse_cache_size": 32, "mixing": "lolcats"}
    for layer in saved["memory"]["layers"]:
        for head in layer["heads"]:
            head["sparse_cache_size"] = 32
            head["positions"] = head["positions"][:32]
    (tmp_path / "smaller.json").write_text(json.dumps(saved))
    browser.press("#open", str(tmp_path / "smaller.json"))
    browser.wait(lambda: browser.text(".pane:nth-of-type(2) h2") == "Text, smaller.json")
    one, two = browser.run(settings)
    assert "sparse caches of 32 pairs" in two
    assert two.endswith(" Unlike the other side: sparse_cache_size 32, mixing lolcats.")
    assert one.endswith(
        f"sparse_cache_size {min(sizes):,} to {max(sizes):,} by layer, mixing lola."
    )
    lost = {p for layer in memory["layers"] for h in layer["heads"] for p in h["positions"][32:]}
    assert {p for p, level in enumerate(shown.levels()) if level} <= lost
    assert any(shown.levels()) and not any(shown.levels(1))
    (tmp_path / "other.json").write_text("{}")
    browser.press("#open", str(tmp_path / "other.json"))
    browser.wait(lambda: "other.json is no saved reading" in browser.text("#kept"))


def test_a_link_restores_the_view(shown, address, memory):
    browser = shown.browser
    shown.set("#layer", 18)
    shown.set("#top", 33)
    shown.set("#colour", "held")
    browser.type("#find", "73192")
    shown.time(4)
    chosen, levels, held = shown.chosen(), shown.levels(), shown.held()
    browser.click("#link")
    browser.wait(lambda: "link" in browser.text("#kept"))
    link = browser.run("return location.href")
    assert link.startswith(f"{address}#view=") and KEY not in link
    shown.open(link)
    browser.wait(lambda: "wants an API key" in browser.text("#status"))
    browser.type("#key", KEY)
    browser.keys("\ue004")
    browser.wait(lambda: shown.browser.run("return !!document.querySelector('#panes .token')"))
    shown.settle()
    assert browser.run("return document.getElementById('prompt').value") == PROMPT
    assert browser.text("[data-part=time-name]").startswith("320 of")
    assert (shown.chosen(), shown.levels(), shown.held()) == (chosen, levels, held)
    shown.open(f"{address}#view=broken")
    browser.type("#key", KEY)
    browser.keys("\ue004")
    browser.wait(lambda: "cannot be read" in browser.text("#status"))
