"""A reference behind a server: the log-probs it gives to token ids, through `/completions`.

Prompt log-probs are asked for in the words of OpenAI's completions (`echo`, `logprobs`, no new token) and of
vLLM (`prompt_logprobs`, tokens by their id); either answer is taken. It must name our token ids one by one: a
server that puts a token before them, or splits text its own way, would give numbers about something else.

The key, where a server wants one, is read from the environment and never stored.
"""

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fiducial.errors import ModelError, ServerError

KEY_VARIABLE = "FIDUCIAL_ENDPOINT_KEY"
TIMEOUT_SECONDS = 120.0
ATTEMPTS = 6
"""Waits of 1, 2, 4, 8 and 16 seconds between them, or what the server asks for."""
_LONGEST_WAIT = 60.0
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Status codes that another try may not give again."""
_ROUNDING = 1e-4
"""Above 0 a log-prob is only by rounding."""
_MINUS_INFINITY = -9999.0
"""vLLM's word for it in JSON, which has none."""


class _PassingError(Exception):
    """What went wrong and may not go wrong again; `wait` is what the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model on a server."""

    url: str
    """Up to and without `/completions`."""
    model: str
    """Its name there."""
    timeout: float = TIMEOUT_SECONDS
    attempts: int = ATTEMPTS
    sleep: Callable[[float], None] = time.sleep

    def logps(self, prompt: Sequence[int], completion: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-prob of every token of `completion` after `prompt`, in nats.

        Raises:
            ServerError: The server does not answer, or refuses.
            ModelError: It answers for other tokens.
        """
        ids = [*map(int, prompt), *map(int, completion)]
        answer = self._ask(
            {
                "model": self.model,
                "prompt": ids,
                "max_tokens": 0,
                "temperature": 1,
                "echo": True,
                "logprobs": 1,
                "prompt_logprobs": 0,
                "return_tokens_as_token_ids": True,
            }
        )
        try:
            found = _read(answer["choices"][0], ids)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._error(f"does not answer as a completions endpoint ({error!r})") from error
        if isinstance(found, str):
            raise self._error(found)
        return found[len(prompt) :]

    def _ask(self, body: Mapping[str, Any]) -> Any:
        for attempt in range(self.attempts):
            try:
                return self._post(body)
            except _PassingError as error:
                if attempt + 1 == self.attempts:
                    raise self._error(
                        f"did not answer in {self.attempts} tries, last: {error}. What it has answered "
                        "so far is in the cache, and a new start goes on from there",
                        ServerError,
                    ) from error
                self.sleep(min(2.0**attempt if error.wait is None else error.wait, _LONGEST_WAIT))
        raise AssertionError("at least one try")

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace").strip()
            if error.code not in _PASSING:
                raise self._error(
                    f"answers {error.code} {error.reason}: {said}{_hint(error.code)}", ServerError
                ) from error
            raise _PassingError(f"{error.code} {error.reason}: {said}", _asked_wait(error)) from error
        except json.JSONDecodeError as error:
            raise _PassingError(f"its answer is not JSON ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(str(error) or type(error).__name__) from error

    def _error(self, what: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(f"reference.endpoint: {self.url} ({self.model}) {what}.")


def _read(choice: Mapping[str, Any], ids: Sequence[int]) -> npt.NDArray[np.float32] | str:
    """Log-probs of all tokens, the first one's as 0, or what is wrong with the answer."""
    if choice.get("prompt_logprobs") is not None:
        found = _by_id(choice["prompt_logprobs"], ids)
    else:
        found = _by_token(choice.get("logprobs") or {}, ids)
    if isinstance(found, str):
        return found
    values = np.array(found, np.float32)
    wrong = [value for value in found if not math.isfinite(value) or not _MINUS_INFINITY < value <= _ROUNDING]
    if wrong:
        return f"gives {wrong[0]} as a log-prob"
    return values if any(found) else f"gives 0 as the log-prob of each of {len(ids)} tokens: it computes none"


def _by_id(positions: Sequence[Mapping[str, Any] | None], ids: Sequence[int]) -> list[float] | str:
    """The form of vLLM: for each position a mapping from token id to its log-prob."""
    if len(positions) != len(ids):
        return f"answers for {len(positions)} tokens where {len(ids)} were asked"
    found = [0.0]
    for number in range(1, len(ids)):
        entry = (positions[number] or {}).get(str(ids[number]))
        if entry is None:
            return f"does not give the log-prob of token {ids[number]} at position {number}"
        found.append(float(entry["logprob"]))
    return found


def _by_token(logprobs: Mapping[str, Any], ids: Sequence[int]) -> list[float] | str:
    """The form of OpenAI: a list of tokens, here by id, and one of their log-probs."""
    tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if tokens is None or values is None:
        return "gives no log-probs of the prompt (echo with logprobs, or prompt_logprobs)"
    if len(tokens) != len(ids) or len(values) != len(ids):
        return f"answers for {len(tokens)} tokens where {len(ids)} were asked"
    for number, (token, expected) in enumerate(zip(tokens, ids, strict=True)):
        if str(token) != f"token_id:{expected}":
            return (
                f"names {token!r} at position {number}, and not token_id:{expected}: which tokens its "
                "numbers are of cannot be told (vLLM: return_tokens_as_token_ids)"
            )
    return [0.0, *(float(value) for value in values[1:])]


def _hint(code: int) -> str:
    return f". Put its key into the environment variable {KEY_VARIABLE}" if code in (401, 403) else ""


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    try:
        return max(float(error.headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return None
