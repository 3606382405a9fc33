"""Memory of prompts beyond the trained length, where RoPE positions differ from positions."""

import pytest

from lola_vllm.serving.inspector import ROUTE
from tests.support.browser import chromium
from tests.support.inspector import Page
from tools.support.tiny import random_prompts

LENGTH, INTERVAL, SINKS = 256, 64, 2
BUCKET = 3 * LENGTH // 8  # where the bucket of old keys starts


def ask(server, n, **options):
    (prompt,) = random_prompts([n], seed=8)
    return server.client.post("/v1/lola/memory", json={"prompt": prompt, **options})


def _exact(position, shifted_by):
    """Old keys come to rest in the bucket, those before its start from below."""
    rest = BUCKET + (position - BUCKET) % INTERVAL
    if position < BUCKET:
        return min(rest, position + shifted_by)
    shifted = position - shifted_by
    return shifted if shifted >= BUCKET else rest


@pytest.mark.parametrize(
    ("n", "shifted_by"), [(256, 0), (257, 64), (320, 64), (321, 128), (700, 448)]
)
def test_rope_positions_are_told_once_they_differ(keyless, n, shifted_by):
    answer = ask(keyless, n).json()
    assert answer["shifted_by"] == shifted_by
    if shifted_by == 0:
        assert answer["rope_positions"] is None
        return
    assert answer["rope_positions"] == [p if p < SINKS else _exact(p, shifted_by) for p in range(n)]
    assert max(answer["rope_positions"]) == answer["rope_positions"][-1] < LENGTH


def test_history_goes_through_context_shifts_and_forgotten_stops_at_them(keyless):
    refused = ask(keyless, 400, forgotten=True)
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message.startswith("forgotten = true: the prompt has 400 tokens, ")
    assert "max_position_embeddings = 256 " in message
    assert message.endswith("leave forgotten out, or give a shorter prompt")
    whole = ask(keyless, 400, history=True).json()
    assert whole["history_interval"] == 16
    for read in (240, 272, 336, 400):
        (prompt,) = random_prompts([400], seed=8)
        body = {"prompt": prompt[:read]}
        then = keyless.client.post("/v1/lola/memory", json=body).json()
        for layer, short in zip(whole["layers"], then["layers"], strict=True):
            for head, told in zip(layer["heads"], short["heads"], strict=True):
                stays = zip(head["positions"], head["entered"], strict=True)
                held = [p for p, entered in stays if entered <= read]
                held += [p for p, entered, left in head["gone"] if entered <= read < left]
                assert sorted(held) == told["positions"]


def test_the_page_tells_of_rope_positions_and_of_what_it_cannot_show(keyless):
    with chromium() as browser:
        page = Page(browser)
        page.open(keyless.url + ROUTE)
        page.prompt("the hidden state of a page " * 40)
        browser.click("#run")
        browser.wait(lambda: "A part is left out. forgotten = true: " in browser.text("#status"))
        assert browser.run("return document.getElementById('status').className") == ""
        assert browser.run("return document.getElementById('key').placeholder") == "none needed"
        # The rest is there: the timeline, the text and the grid of two layers of two heads.
        browser.wait(lambda: browser.run(
            "return !document.querySelector('[data-part=time-row]').hidden"
        ))  # fmt: skip
        answer = keyless.client.post(
            "/v1/lola/memory", json={"prompt": "the hidden state of a page " * 40}
        ).json()
        assert answer["shifted_by"] > 0
        assert len(page.tokens("held")) == answer["num_tokens"] and len(page.cells()) == 4
        last = answer["num_tokens"] - 1
        browser.hover(page.token(last))
        assert f"its RoPE position is {answer['rope_positions'][last]}," in browser.text("#tip")
        assert browser.run(
            "return document.querySelector('#colour option[value=forgotten]').disabled"
        )
