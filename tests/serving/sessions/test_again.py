"""What a default server computes of a long prompt that comes again, by the habits of clients."""

from tests.serving.sessions.test_routes import ok, user

FILE = " ".join(f"In hall {i} the pump starts at {i * 7 % 24} and stops later." for i in range(60))


def ask(server, messages, name):
    """Tokens of a prompt, those of them that were cached, and the answer."""
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 6}
    answer = ok(server.client.post("/v1/chat/completions", json={**body, "cache_salt": name}))
    usage = answer["usage"]
    cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    return usage["prompt_tokens"], cached, answer["choices"][0]["message"]["content"]


def test_another_question_about_the_same_file(tiny):
    n, cached, _ = ask(tiny, user(f"{FILE} When does the pump of hall 3 start?"), "file")
    assert cached == 0
    for question in ("Is hall 1 the first?", "Name a hall."):
        n, cached, _ = ask(tiny, user(f"{FILE} {question}"), "file")
        assert 0.9 * n < cached < n  # of a waypoint: nobody knew where the question begins
    n, cached, _ = ask(tiny, user(f"{FILE} Name a pump."), "file")
    assert n - 40 < cached < n
    # A longer question, the second of its file.
    long = "Compare the halls, and say which pump starts before the others do. " * 8
    file = FILE.replace("pump", "valve")
    ask(tiny, user(f"{file} When?"), "file")
    n, cached, _ = ask(tiny, user(f"{file} {long}"), "file")
    assert 0.5 * n < cached < n
