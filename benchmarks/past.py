"""How often a session's own past answers a question, with `recall` and without.

    lola-vllm serve models/smollm2-lola
    python benchmarks/past.py --seed 3 --text postgres_docs

A server of the model reads a text into a session, `--back` tokens and a number in each of the
`--questions` segments before them. After each question its turn is deleted, so that no question
sees another, and the session at the end.
"""

from __future__ import annotations

import argparse
import random
import uuid
from pathlib import Path

from common import ROOT, parser_of, print_values, write_report
from library_corpus import NEEDLE, WORDS

from lola_vllm.command.client.server import SESSIONS, Server

SEGMENT = 2000  # tokens; as servers cut
PART = 40_000  # characters of one request


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/smollm2-lola")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server of the model")
    parser.add_argument("--text", default="postgres_docs", help="a file of models/texts")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--back", type=int, default=16_000, help="tokens")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def told(text: str, questions: int, back: int, seed: int) -> tuple[str, dict[str, str]]:
    """A text with a number in each of its first segments, and the numbers by subject."""
    chance = random.Random(seed)
    subjects = [f"{a}-{b}" for a in WORDS for b in WORDS]
    chance.shuffle(subjects)
    size = 4 * SEGMENT  # some four characters a token
    start = chance.randrange(len(text) // 2)
    text = text[start : start + questions * size + 4 * back]
    if len(text) < questions * size + 4 * back:
        raise SystemExit("the text is too short behind its start; take a longer one")
    numbers = {key: str(chance.randrange(10**6, 10**7)) for key in subjects[:questions]}
    parts = []
    for i, (key, number) in enumerate(numbers.items()):
        body, place = text[i * size : (i + 1) * size], chance.randrange(size)
        parts.append(body[:place] + NEEDLE[0].format(key=key, number=number) + body[place:])
    return "".join(parts) + text[questions * size :], numbers


def asked(client: Server, session: str, numbers: dict[str, str], recall: bool) -> dict[str, int]:
    """How many questions were answered, and for how many a segment came back."""
    right = back = 0
    for key, number in numbers.items():
        body = {"prompt": NEEDLE[1].format(key=key), "max_tokens": 16, "temperature": 0}
        if recall:
            body["recall"] = "segments"
        answer = client.json("POST", f"{session}/complete", body)
        lola = answer["kv_transfer_params"]["lola"]
        right += number in answer["choices"][0]["text"]
        back += "recalled" in lola
        client.json("DELETE", f"{session}@{lola['turn']}")
    return {"right": right, "came back": back}


def main() -> None:
    """Measure and print."""
    args = parse()
    text = (ROOT / f"models/texts/{args.text}.txt").read_text()
    text, numbers = told(text, args.questions, args.back, args.seed)
    client, session = Server(args.url), f"{SESSIONS}/past-{uuid.uuid4().hex}"
    for at in range(0, len(text), PART):
        read = client.json("POST", f"{session}/append", {"prompt": text[at : at + PART]})
    result = {
        f"{what}, {how}": float(count)
        for how, recall in (("with recall", True), ("without", False))
        for what, count in asked(client, session, numbers, recall).items()
    }
    client.json("DELETE", session)
    result |= {"questions": float(len(numbers)), "tokens": float(read["tokens"])}
    print_values(result)
    write_report(args, result)


if __name__ == "__main__":
    main()
