"""The chat page in a real browser: what it says of the session is what the server has."""

import re

import pytest

from lola_vllm.serving.inspector import ROUTE as INSPECTOR
from tests.support.axe import findings
from tests.support.browser import chromium
from tests.support.inspector import ENTER, PICTURES, TAB
from tests.support.servers import KEY

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser(lola_server):
    """The page with the key typed in, as a tab keeps it."""
    with chromium() as running:
        running.resize(*DESKTOP)
        running.open(f"{lola_server.url}/")
        running.wait(lambda: "wants an API key" in running.text("#status"))
        assert running.run("return document.activeElement.id") == "key"
        running.type("#key", "wrong")
        running.keys(TAB)
        running.wait(lambda: "does not know this API key" in running.text("#status"))
        running.type("#key", KEY)
        running.keys(TAB)
        running.wait(lambda: running.text("#model"))
        running.wait(lambda: running.text("#tokens") and running.text("#status") == "")
        running.errors()  # those of the wrong key, and that nobody has the new chat's name
        yield running


def value(browser, name):
    return browser.run("return document.getElementById(arguments[0]).value", name)


def hidden(browser, name):
    return browser.run("return document.getElementById(arguments[0]).hidden", name)


def said(browser, kind):
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
    return browser.run(script, f"#log {kind}")


def number(text):
    return int(text.replace(",", ""))


def new_chat(browser, most=24):
    """A new chat's name; its answers have so many tokens."""
    browser.click("#new")
    browser.wait(lambda: browser.run("return !!document.getElementById('welcome')"))
    browser.type("#max-tokens", str(most))
    return value(browser, "name")


def send(browser, text):
    browser.run("document.getElementById('message').value = arguments[0]", text)
    browser.press("#message", ENTER)


def name_it(browser, name):
    """Type over the name, as a person does: a driver's clearing is a change of its own."""
    browser.run("document.getElementById('name').select()")
    browser.press("#name", name + ENTER)


def ask(browser, text):
    turns = len(said(browser, ".note"))
    send(browser, text)
    browser.wait(lambda: len(said(browser, ".note")) > turns and hidden(browser, "stop"))
    assert browser.text("#status") == ""


def session(server, name):
    return server.client.get(f"/v1/lola/sessions/{name}").json()


def loaded(browser):
    """Wait for a page that a script marked as old to be gone, and for all of the new one."""
    script = "return !window.old && !!document.getElementById('tokens')?.textContent"
    browser.wait(lambda: browser.run(script) and not browser.text("#status"))


def reload(browser):
    browser.run("window.old = true; location.reload()")
    loaded(browser)


def test_two_turns_and_what_is_held_of_them(browser, lola_server):
    name = new_chat(browser)
    ask(browser, "What is gravity?")
    ask(browser, f"Say more. {'The miller went to the river. ' * 90}")
    info = lola_server.client.get("/v1/lola/info").json()
    found = session(lola_server, name)
    assert found["turn"] == 2
    first, second = [note for note in said(browser, ".note") if note.startswith("turn")]
    one = next(s for s in found["states"] if (s["turn"], s["kind"]) == (1, "answer"))
    assert first.startswith("turn 1: 0 tokens restored")
    assert second.startswith(f"turn 2: {one['tokens']:,} tokens restored, ")
    # Tokens grow and memory does not.
    assert number(browser.text("#tokens")) == found["tokens"] > 600
    mib = info["memory"]["bytes_per_sequence"] / 2**20
    assert browser.text("#held") == f"{mib:.1f} MiB"
    full = found["tokens"] * info["memory"]["full_kv_bytes_per_token"] / 2**20
    assert browser.text("#full") == f"{full:.1f} MiB" and full > mib / 2
    dots = browser.run(
        "return [...document.querySelectorAll('#chart circle.lola')]"
        ".map((c) => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
    )
    (x1, y1), (x2, y2) = dots
    assert x2 > x1 + 50 and y1 == pytest.approx(y2, abs=0.1)
    ends = "return ['y1', 'y2'].map((y) => +document.querySelector(arguments[0]).getAttribute(y))"
    start, stop = browser.run(ends, "#chart line.lola")
    assert start == stop == pytest.approx(y1, abs=0.5)
    start, stop = browser.run(ends, "#chart line.full")
    assert start - stop > 50
    # The places are those that the inspector's route counts, to the last layer and head.
    tokens = lola_server.client.get(f"/v1/lola/sessions/{name}/tokens").json()["tokens"]
    body = {"prompt": tokens[: found["tokens"]]}
    memory = lola_server.client.post("/v1/lola/memory", json=body).json()
    kept = [len(head["positions"]) for layer in memory["layers"] for head in layer["heads"]]
    past = memory["window_start"] - memory["sinks"]
    cells = browser.run(
        "return [...document.querySelectorAll('#places td:nth-child(2)')].map((c) => c.textContent)"
    )
    assert cells[:4] == [
        str(memory["sinks"]),
        str(memory["num_tokens"] - memory["window_start"]),
        f"{min(kept):,} to {max(kept):,}",
        f"{past - max(kept):,} to {past - min(kept):,}",
    ]
    assert browser.errors() == []
    browser.picture(PICTURES / "chat-two-turns.png")


def test_a_reload_goes_on_with_the_stored_session(browser, lola_server):
    # Few tokens: the second prompt is restored, which rounds otherwise, and a near tie could turn.
    name, text = new_chat(browser, most=12), "My cat is called <b>Minka</b>.\nIs that a good name?"
    browser.type("#temperature", "0")
    ask(browser, text)
    before = said(browser, "article")
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    answer = lola_server.client.post("/v1/lola/sessions/the-same/chat", json=body).json()
    assert before == [text, answer["choices"][0]["message"]["content"].strip()]
    assert not browser.run("return !!document.querySelector('#log b')")
    tokens = browser.text("#tokens")
    reload(browser)
    assert value(browser, "name") == name == value(browser, "chats")
    assert said(browser, "article") == before and browser.text("#tokens") == tokens
    browser.type("#max-tokens", "8")
    ask(browser, "What is my cat called?")
    assert session(lola_server, name)["turn"] == 2
    assert said(browser, ".note")[-1].startswith(f"turn 2: {tokens} tokens restored, ")
    # Only names are kept in this browser, and the key in this tab.
    kept = browser.run("return JSON.stringify({...localStorage})")
    assert name in kept and "Minka" not in kept and KEY not in kept
    href = browser.run("return document.getElementById('inspect').href")
    assert href.startswith(f"{lola_server.url}{INSPECTOR}#view=")
    # The inspector opens with the last turn, and with the key of this tab.
    browser.click("#inspect")
    title = "return document.querySelector('.pane:not([hidden]) h2')?.textContent"
    browser.wait(lambda: browser.run(title) == f"{name}, turn 2")
    browser.click("#links a")
    loaded(browser)
    assert value(browser, "name") == name


def test_a_turn_that_another_made_is_not_gone_on_from(browser, lola_server):
    name = new_chat(browser, most=4)
    ask(browser, "One.")
    body = {"prompt": " Something else."}
    assert lola_server.client.post(f"/v1/lola/sessions/{name}/append", json=body).is_success
    send(browser, "Two.")
    browser.wait(lambda: browser.text("#status"))
    # The server's words; the message is not lost.
    assert "turn" in browser.text("#status") and value(browser, "message") == "Two."
    assert len(said(browser, "article")) == 2
    reload(browser)
    ask(browser, "Two.")
    assert session(lola_server, name)["turn"] == 3


def test_an_answer_is_stopped_and_the_chat_goes_on(browser, lola_server):
    name = new_chat(browser, most=1024)
    browser.run(  # an answer that does not end before it is stopped
        "const real = window.fetch; window.fetch = (url, options) => {"
        "  if (options.body) options.body = JSON.stringify("
        "    {...JSON.parse(options.body), ignore_eos: true});"
        "  window.fetch = real; return real(url, options); }"
    )
    send(browser, "Tell me a long story.")
    browser.wait(lambda: len(said(browser, "article.assistant")[0]) > 20)
    assert browser.run("return document.getElementById('new').disabled")
    browser.click("#stop")
    browser.wait(lambda: hidden(browser, "stop"))
    (note,) = said(browser, ".note")
    assert note == "Stopped. Your message is part of the memory, the answer's text is not."
    found = session(lola_server, name)
    assert [state["kind"] for state in found["states"]] == ["prompt"]
    assert number(browser.text("#tokens")) == found["tokens"]
    browser.type("#max-tokens", "8")
    ask(browser, "Thank you.")
    assert session(lola_server, name)["turn"] == 2
    # No empty answer stands between the two messages, neither for the model nor on the page.
    text = text_of(lola_server, name)
    assert text.count("<|im_start|>assistant") == 1 and text.count("<|im_start|>user") == 2
    reload(browser)
    assert said(browser, "article.user") == ["Tell me a long story.", "Thank you."]
    assert len(said(browser, "article.assistant")) == 1


def press(browser, label, which=-1):
    """Press a button below a message."""
    browser.run(
        "[...document.querySelectorAll('.actions button')]"
        ".filter((b) => b.textContent === arguments[0]).at(arguments[1]).click()",
        label, which,
    )  # fmt: skip


def finished(browser, notes):
    browser.wait(lambda: len(said(browser, ".note")) == notes and hidden(browser, "stop"))
    assert browser.text("#status") == ""


def text_of(server, name):
    tokens = server.client.get(f"/v1/lola/sessions/{name}/tokens").json()["tokens"]
    return server.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_a_system_prompt_begins_a_chat(browser, lola_server):
    name = new_chat(browser, most=4)
    browser.click("#begin summary")
    browser.type("#system", "You are a miller.")
    ask(browser, "Who are you?")
    assert said(browser, "article.system") == ["You are a miller."]
    text = text_of(lola_server, name)
    assert text.startswith("<|im_start|>system\nYou are a miller.<|im_end|>\n<|im_start|>user\nWho")
    read_only = "return document.getElementById('system').readOnly"
    assert browser.run(read_only)
    ask(browser, "And who am I?")
    assert text_of(lola_server, name).count("You are a miller.") == 1
    before = said(browser, "article")
    reload(browser)
    assert said(browser, "article") == before and value(browser, "system") == "You are a miller."
    new_chat(browser)
    assert value(browser, "system") == "" and not browser.run(read_only)


def test_a_message_is_edited_and_an_answer_made_again(browser, lola_server):
    name = new_chat(browser, most=12)  # which are too few for an end of any answer
    browser.type("#temperature", "0")
    ask(browser, "Tell me of a cat.")
    ask(browser, "Tell me of a dog.")
    answers, notes = said(browser, "article.assistant"), len(said(browser, ".note"))
    press(browser, "Regenerate")
    finished(browser, notes)
    assert said(browser, "article.assistant") == answers  # as it is greedy
    assert session(lola_server, name)["turn"] >= 2
    press(browser, "Edit")
    assert value(browser, "message") == "Tell me of a dog." and not hidden(browser, "editing")
    browser.click("#cancel")
    assert hidden(browser, "editing") and len(said(browser, "article")) == 4
    press(browser, "Edit")
    send(browser, "Tell me of a horse.")
    finished(browser, notes)
    text = text_of(lola_server, name)
    assert "horse" in text and "cat" in text and "dog" not in text
    assert said(browser, "article.user") == ["Tell me of a cat.", "Tell me of a horse."]
    # The page goes on from there, also after a reload.
    reload(browser)
    assert said(browser, "article.user") == ["Tell me of a cat.", "Tell me of a horse."]
    press(browser, "Edit")
    send(browser, "Tell me of a cow.")
    browser.wait(lambda: said(browser, ".note") and hidden(browser, "stop"))
    assert "horse" not in text_of(lola_server, name)
    ask(browser, "Go on.")
    text = text_of(lola_server, name)
    assert "cat" in text and "cow" in text and text.count("<|im_start|>user") == 3


def test_a_chat_is_renamed_chosen_and_deleted(browser, lola_server):
    old = new_chat(browser, most=2)
    ask(browser, "Hello.")
    name_it(browser, "no such/name")
    browser.wait(lambda: "'no such/name'" in browser.text("#status"))
    assert value(browser, "name") == old
    name_it(browser, "renamed-chat")
    browser.wait(lambda: value(browser, "chats") == "renamed-chat")
    assert session(lola_server, "renamed-chat")["turn"] == 1
    options = "return [...document.querySelectorAll('#chats option')].map((o) => o.value)"
    assert old not in browser.run(options)
    other = new_chat(browser)
    assert browser.run(options)[:2] == [other, "renamed-chat"]
    browser.run(
        "const c = document.getElementById('chats'); c.value = 'renamed-chat';"
        "c.dispatchEvent(new Event('change'))"
    )
    browser.wait(lambda: "Hello." in said(browser, "article"))
    browser.run("window.confirm = () => true")
    browser.click("#delete")
    browser.wait(lambda: value(browser, "name") != "renamed-chat")
    browser.wait(lambda: not browser.text("#status"))
    assert lola_server.client.get("/v1/lola/sessions/renamed-chat").status_code == 404


@pytest.mark.parametrize(
    ("size", "dark"), [(DESKTOP, True), (PHONE, False)], ids=["desktop", "phone"]
)
def test_it_fits_the_screen(browser, size, dark):
    browser.resize(*size, dark=dark)
    try:
        reload(browser)
        scrolls = "const e = document.scrollingElement; return [e.scrollWidth, e.scrollHeight]"
        width, height = browser.run(scrolls)
        assert width <= size[0] and height <= size[1]
        bottom = "return document.getElementById('ask').getBoundingClientRect().bottom"
        assert browser.run(bottom) <= size[1]
        opened = browser.run("return document.getElementById('memory').open")
        assert opened == (size == DESKTOP)
        assert findings(browser) == []
        if not opened:
            assert re.search(r"tokens in [\d.]+ MiB; full KV cache", browser.text("#short"))
            browser.click("#begin summary")
            assert browser.run(scrolls)[0] <= size[0] and findings(browser) == []
            browser.click("#begin summary")
            browser.click("#memory summary")
            assert browser.run(scrolls)[0] <= size[0] and findings(browser) == []
        browser.picture(PICTURES / f"chat-{size[0]}x{size[1]}{'-dark' * dark}.png")
    finally:
        browser.resize(*DESKTOP)
