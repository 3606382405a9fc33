"""A model behind an OpenAI-compatible API."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lola_vllm.evaluation import EvalError
from lola_vllm.evaluation.models import LocalTokenizer, Prediction, Tokenizer
from lola_vllm.evaluation.session import EvaluationSession

CONNECT_TIMEOUT_S = 10.0
# Enough for a long prompt on a small machine, after other requests.
ANSWER_TIMEOUT_S = 1800.0
BUSY = (429, 502, 503)
RETRIES, RETRY_WAIT_S = 4, 2.0
# The likeliest tokens. A penalty that is left out would be that of the model's
# generation_config.json, and would count what stands in the prompt against recalling it.
GREEDY: Mapping[str, float] = {
    "temperature": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip

T = TypeVar("T")


class Connection:
    """Requests to one server, with errors that say what to do.

    Args:
        url: of the server, with or without the path `/v1`.
        api_key: sent as a bearer token if given. It is not stored elsewhere.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._client = httpx.Client(headers=headers, timeout=timeout)

    def ask(self, path: str, key: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the JSON at `path`, or that answers `body`, says at `key`.

        Raises:
            EvalError: no server, no access, an unknown path or model, a refused request, or no
                such key.
        """
        import httpx

        for attempt in range(RETRIES + 1):
            try:
                method = "GET" if body is None else "POST"
                response = self._client.request(method, self.url + path, json=body)
            except httpx.TimeoutException as error:
                raise EvalError(
                    f"{self.url}{path}: no answer in time ({type(error).__name__}); is the server "
                    "overloaded? lower --batch"
                ) from None
            except httpx.TransportError as error:
                raise EvalError(
                    f"{self.url}: no server answers there ({error}); start one with "
                    "'vllm serve MODEL', or mend the address"
                ) from None
            except httpx.InvalidURL as error:
                raise EvalError(f"--model {self.url}: not a URL ({error})") from None
            if response.status_code not in BUSY or attempt == RETRIES:
                break
            time.sleep(RETRY_WAIT_S * 2**attempt)
        if response.status_code in (401, 403):
            raise EvalError(
                f"{self.url}: the server refused access ({response.status_code}); give the right "
                "key with --api-key or in OPENAI_API_KEY"
            )
        if response.status_code >= 400:
            raise EvalError(
                f"{self.url}{path}: the server answered {response.status_code}: "
                f"{_message(response.text)}"
            )
        try:
            return response.json()[key]
        except (ValueError, KeyError, TypeError):
            raise EvalError(
                f"{self.url}{path}: the answer has no {key!r}; is this an OpenAI-compatible server?"
            ) from None


def _message(text: str) -> str:
    """The message inside an error's JSON, else the start of the text."""
    import json

    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error.get("message") or error.get("detail") or error)[:500]
    except (ValueError, AttributeError):
        return text[:500]


class ServerTokenizer:
    """The tokenizer of a vLLM server, over `/tokenize` and `/detokenize`."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def _ids(self, **fields: Any) -> list[int]:
        fields["model"] = self._model
        return [int(token) for token in self._connection.ask("/tokenize", "tokens", fields)]

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._ids(prompt=text, add_special_tokens=special)

    def chat(self, message: str) -> list[int]:
        """See `Tokenizer.chat`."""
        messages = [{"role": "user", "content": message}]
        return self._ids(messages=messages, add_generation_prompt=True)

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        body = {"model": self._model, "tokens": ids}
        return str(self._connection.ask("/detokenize", "prompt", body))


class ServerModel:
    """A served model; see `models.Model`.

    Args:
        url: of the server. name: of the model there; None: the only one that it serves.
        api_key: for the server. tokenizer: a directory; None: the server's own.
        batch: requests under way at once.

    Raises:
        EvalError: the server cannot be used, or does not have the model.
    """

    def __init__(
        self, url: str, name: str | None, api_key: str | None, tokenizer: Path | None, batch: int
    ) -> None:
        self._connection = Connection(url, api_key)
        self.name, self.max_length = self._find(name)
        self.batch = batch
        self.tokenizer: Tokenizer = (
            LocalTokenizer(tokenizer) if tokenizer else ServerTokenizer(self._connection, self.name)
        )

    def _find(self, name: str | None) -> tuple[str, int | None]:
        """Name and longest context of the model, as far as the server says."""
        served = self._connection.ask("/v1/models", "data")
        models = {str(entry["id"]): entry.get("max_model_len") for entry in served}
        if name is None and len(models) == 1:
            name = next(iter(models))
        if name not in models:
            wanted = "name one" if name is None else f"{name!r} is not among them"
            raise EvalError(
                f"{self._connection.url} serves {', '.join(models)}; --served-model: {wanted}"
            )
        return name, models[name]

    def complete(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """See `models.Model.complete`."""

        def ask(ids: list[int]) -> str:
            body = {"prompt": ids, "max_tokens": max_tokens, **GREEDY}
            return str(self._choice(body)["text"])

        return self._each(ask, prompts)

    def predictions(self, windows: list[list[int]]) -> list[list[Prediction]]:
        """See `models.Model.predictions`."""

        def ask(ids: list[int]) -> list[Prediction]:
            body = {"prompt": ids, "max_tokens": 1, **GREEDY, "echo": True, "logprobs": 1}
            answer = self._choice(body).get("logprobs") or {}
            found = (answer.get("token_logprobs") or [])[1 : len(ids)]
            likely = (answer.get("top_logprobs") or [])[1 : len(ids)]
            if not len(found) == len(likely) == len(ids) - 1 or None in found or None in likely:
                raise EvalError(
                    f"{self._connection.url}: no log-probabilities of the prompt; the server must "
                    "support 'echo' with 'logprobs' on /v1/completions, as vLLM does"
                )
            return [
                Prediction(float(value), value >= max(top.values()))
                for value, top in zip(found, likely, strict=True)
            ]

        return self._each(ask, windows)

    def _choice(self, body: Mapping[str, Any]) -> Any:
        return self._connection.ask("/v1/completions", "choices", {"model": self.name, **body})[0]

    def _each(self, ask: Callable[[list[int]], T], prompts: list[list[int]]) -> list[T]:
        with ThreadPoolExecutor(self.batch) as pool:
            return list(pool.map(ask, prompts))


def run_server(session: EvaluationSession, model: ServerModel) -> str:
    """Evaluate a served model. The memory of a sequence on the server is not known.

    Args:
        session: of one record. model: the server's.

    Returns:
        The table.

    Raises:
        EvalError: lengths that the server does not take, or a request that failed.
    """
    plan = session.plan
    if model.max_length is not None and plan.max_length > model.max_length:
        raise EvalError(
            f"a length of {plan.max_length} tokens: the server takes {model.max_length} "
            "(--max-model-len); ask for shorter ones"
        )
    return session.run(
        lambda record, note: plan.run(model, note, plan.done(record.samples)),
    )
