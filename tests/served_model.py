"""A small server on 127.0.0.1 that answers completions requests from a model, and can misbehave."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from listening import listening

Form = Literal["vllm", "openai"]


class ModelServer:
    """What the server does and has seen; a test changes it while it runs."""

    def __init__(self, model: PreTrainedModel, form: Form) -> None:
        self.model = model
        self.form = form
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.refuse: list[tuple[int, dict[str, str]]] = []
        """Status and headers of the next answers, before it answers again."""
        self.dies_after: int | None = None
        """Answers it gives before it says 503 for ever."""
        self.prepend: list[int] = []
        """Tokens it puts before the prompt, as a server with a BOS of its own would."""
        self.shift = 0.0
        """Added to every log-prob."""
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        with self._lock:
            self.requests.append(body)
            self.headers.append(headers)
            if self.refuse:
                return (*self.refuse.pop(0), {"error": "not now"})
            if self.dies_after is not None:
                if self.dies_after == 0:
                    return 503, {}, {"error": "gone"}
                self.dies_after -= 1
            return 200, {}, {"choices": [self._choice([*self.prepend, *body["prompt"]])]}

    def _choice(self, ids: list[int]) -> dict[str, Any]:
        with torch.no_grad():
            logps = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        values = [logps[at - 1, ids[at]].item() + self.shift for at in range(1, len(ids))]
        if self.form == "vllm":
            top = logps.argmax(-1).tolist()
            given = [
                {str(top[at]): {"logprob": -0.1}} | {str(ids[at + 1]): {"logprob": value}}
                for at, value in enumerate(values)
            ]
            return {"text": "", "prompt_logprobs": [None, *given]}
        tokens = [f"token_id:{token}" for token in ids]
        return {"text": "", "logprobs": {"tokens": tokens, "token_logprobs": [None, *values]}}


@contextmanager
def serve(model: PreTrainedModel, form: Form = "vllm") -> Iterator[ModelServer]:
    """Inside, the server answers at `url`."""
    served = ModelServer(model, form)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/v1/completions"
            status, headers, said = (
                served.answer(body, dict(self.headers)) if known else (404, {}, {"error": self.path})
            )
            content = json.dumps(said).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        served.url = f"{address}/v1"
        yield served
