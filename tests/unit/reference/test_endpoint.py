"""A served reference: what is asked, what is believed, and what is kept when the server fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fiducial.cache_report import explain
from fiducial.config.load import validate_config
from fiducial.errors import ModelError, ServerError
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore
from fiducial.reference.describe import plan_run
from fiducial.reference.endpoint import KEY_VARIABLE, Endpoint
from fiducial.reference.fill import fill_from_server
from fiducial.reference.identity import identify_served
from fiducial.reference.kinds import Checkpoint
from fiducial.reference.served import ask_for_missing
from fiducial.reference.sources import Served
from fiducial.train import train
from launching import two_processes
from oracles import naive_token_logps
from run_configs import run_config
from served_model import ModelServer, serve
from tiny import random_groups, tiny_model

GROUPS = random_groups(5)
KEY = "not-for-anyone"


@pytest.fixture(params=["vllm", "openai"])
def server(request: pytest.FixtureRequest) -> Iterator[ModelServer]:
    with serve(tiny_model(seed=1), request.param) as served:
        yield served


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def endpoint(server: ModelServer, waits: list[float]) -> Endpoint:
    return Endpoint(server.url, "tiny", attempts=3, sleep=waits.append)


@pytest.fixture
def store(tmp_path: Path, server: ModelServer) -> LogpStore:
    return open_store(tmp_path, server)


def open_store(folder: Path, server: ModelServer, revision: str | None = None) -> LogpStore:
    return LogpStore(folder / "cache", identify_served(Checkpoint("tiny", revision, None, server.url)))


def ask(endpoint: Endpoint) -> Any:
    group = GROUPS[0]
    return endpoint.logps(group.prompt.tolist(), group.completions[0].tolist())


def test_log_probs_are_those_of_the_model(endpoint: Endpoint) -> None:
    with torch.no_grad():
        expected = naive_token_logps(tiny_model(seed=1), GROUPS)
    found = [endpoint.logps(g.prompt.tolist(), c.tolist()) for g in GROUPS for c in g.completions]
    np.testing.assert_allclose(np.concatenate(found), expected.numpy(), atol=1e-5)


def test_what_is_sent_is_token_ids_and_nothing_is_generated(endpoint: Endpoint, server: ModelServer) -> None:
    ask(endpoint)
    (body,) = server.requests
    assert body["prompt"] == [*GROUPS[0].prompt.tolist(), *GROUPS[0].completions[0].tolist()]
    assert (body["model"], body["max_tokens"], body["echo"]) == ("tiny", 0, True)


def test_a_server_that_puts_a_token_before_is_not_believed(endpoint: Endpoint, server: ModelServer) -> None:
    server.prepend = [256]
    asked = len(GROUPS[0].prompt) + len(GROUPS[0].completions[0])
    with pytest.raises(ModelError, match=f"answers for {asked + 1} tokens where {asked} were asked"):
        ask(endpoint)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": ""}, "gives no log-probs of the prompt"),
        ({"logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -1]}}, "names 'a' at position 0"),
        (
            {"logprobs": {"tokens": ["token_id:1", "token_id:3"], "token_logprobs": [None, -1]}},
            "names 'token_id:3' at position 1",
        ),
        ({"prompt_logprobs": [None, {"3": {"logprob": -1}}]}, "does not give the log-prob of token 2"),
        ({"prompt_logprobs": [None, None]}, "does not give the log-prob of token 2"),
        ({"prompt_logprobs": [None, {"2": {"logprob": float("-inf")}}]}, "gives -inf as a log-prob"),
        ({"prompt_logprobs": [None, {"2": {"logprob": 0.3}}]}, "gives 0.3 as a log-prob"),
        ({"prompt_logprobs": [None, {"2": {"logprob": -9999.0}}]}, "gives -9999.0 as a log-prob"),
        ({"prompt_logprobs": [None, {"2": {"logprob": 0.0}}]}, "gives 0 as the log-prob of each of 2 tokens"),
        ({"prompt_logprobs": [None, {"2": {}}]}, "does not answer as a completions endpoint"),
        ({"logprobs": {"tokens": ["token_id:1"], "token_logprobs": [None]}}, "answers for 1 tokens where 2"),
    ],
)
def test_an_answer_about_other_tokens_is_an_error(choice: dict[str, Any], message: str) -> None:
    with serve(tiny_model()) as served:
        served._choice = lambda ids: choice  # type: ignore[method-assign]
        with pytest.raises(ModelError, match=message):
            Endpoint(served.url, "tiny").logps([1], [2])


def test_what_passes_is_tried_again_and_waited_for(
    endpoint: Endpoint, server: ModelServer, waits: list[float]
) -> None:
    server.refuse = [(429, {"Retry-After": "7"}), (503, {})]
    assert np.isfinite(ask(endpoint)).all()
    assert waits == [7.0, 2.0]
    assert len(server.requests) == 3


def test_what_does_not_pass_is_not_tried_again(
    endpoint: Endpoint, server: ModelServer, waits: list[float]
) -> None:
    server.refuse = [(401, {})]
    with pytest.raises(ModelError, match=f"answers 401 .*{KEY_VARIABLE}"):
        ask(endpoint)
    assert len(server.requests) == 1
    assert waits == []


def test_a_redirect_is_not_followed_with_the_key(
    endpoint: Endpoint, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.refuse = [(302, {"Location": f"{server.url}/elsewhere"})]
    with pytest.raises(ModelError, match="answers 302"):
        ask(endpoint)
    assert len(server.requests) == 1


def test_nobody_there_is_said_after_all_tries(waits: list[float]) -> None:
    gone = Endpoint("http://127.0.0.1:9/v1", "tiny", attempts=3, sleep=waits.append)
    with pytest.raises(ModelError, match=r"did not answer in 3 tries, last: .*refused.* goes on from there"):
        gone.logps([1], [2])
    assert waits == [1.0, 2.0]


def test_a_server_that_says_nothing_is_given_up(waits: list[float]) -> None:
    with serve(tiny_model()) as served:
        served._lock.acquire()  # it takes the request, and never answers
        try:
            silent = Endpoint(served.url, "tiny", timeout=0.2, attempts=2, sleep=waits.append)
            with pytest.raises(ModelError, match=r"2 tries, last: .*timed out"):
                silent.logps([1], [2])
        finally:
            served._lock.release()


def test_what_was_answered_before_it_failed_is_kept_and_not_asked_again(
    endpoint: Endpoint, server: ModelServer, store: LogpStore, tmp_path: Path
) -> None:
    total = sum(len(group.completions) for group in GROUPS)
    server.dies_after = 4
    with pytest.raises(ModelError, match="503"):
        ask_for_missing(GROUPS, endpoint, store, flush_every=1000)
    server.dies_after = None
    server.requests.clear()
    again = open_store(tmp_path, server)
    assert len(again) == 4
    assert ask_for_missing(GROUPS, endpoint, again, flush_every=1000) == total - 4
    assert len(server.requests) == total - 4
    assert ask_for_missing(GROUPS, endpoint, again, flush_every=1000) == 0


def test_another_revision_or_server_is_another_reference(server: ModelServer, tmp_path: Path) -> None:
    folders = {
        open_store(tmp_path, server).folder,
        open_store(tmp_path, server, "a").folder,
        LogpStore(tmp_path / "cache", identify_served(Checkpoint("tiny", None, None, "http://b/v1"))).folder,
        LogpStore(tmp_path / "cache", identify_served(Checkpoint("big", None, None, server.url))).folder,
    }
    assert len(folders) == 4


def test_records_that_the_server_does_not_repeat_are_asked_for_again(
    endpoint: Endpoint, server: ModelServer, tmp_path: Path
) -> None:
    scorer = Scorer(tiny_model(), layout="packed")
    console = Console(record=True, width=200)
    for shift in (0.0, 0.01, 0.3):  # the same, what a server's batches round, another model under that name
        server.shift = -shift
        fill_from_server(
            open_store(tmp_path, server), {"training": GROUPS}, Served(endpoint), scorer, console=console
        )
    told = console.export_text()
    assert told.count("completions scored;") + told.count("completions scored.") == 2
    assert told.count("known from an earlier run") == 1
    assert told.count("set aside") == 1


@pytest.mark.parametrize("refusal", [503, 404], ids=["no answer", "another model there by now"])
def test_a_server_that_is_gone_is_needed_only_where_a_record_is_lacking(
    endpoint: Endpoint, server: ModelServer, tmp_path: Path, refusal: int
) -> None:
    scorer, reference = Scorer(tiny_model(), layout="packed"), Served(endpoint)
    console = Console(record=True, width=500)
    fill_from_server(open_store(tmp_path, server), {"training": GROUPS}, reference, scorer, console=console)
    server.refuse = [(refusal, {})] * 100
    store = open_store(tmp_path, server)
    fill_from_server(store, {"training": GROUPS[:3]}, reference, scorer, console=console)
    told = console.export_text()
    assert f"{refusal} " in told
    assert "Every completion has a record: these are used, and were not compared" in told
    assert "known from an earlier run." in told
    with pytest.raises(ServerError, match=f"{refusal} "):
        fill_from_server(store, {"training": random_groups(6)}, reference, scorer, console=console)


def test_records_of_a_server_that_answers_for_other_tokens_are_not_used(
    endpoint: Endpoint, server: ModelServer, tmp_path: Path
) -> None:
    scorer, reference, quiet = Scorer(tiny_model(), layout="packed"), Served(endpoint), Console(quiet=True)
    fill_from_server(open_store(tmp_path, server), {"training": GROUPS}, reference, scorer, console=quiet)
    server.prepend = [256]
    with pytest.raises(ModelError, match=r"where .* were asked"):
        fill_from_server(open_store(tmp_path, server), {"training": GROUPS}, reference, scorer, console=quiet)


def test_a_run_trains_against_a_served_reference(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    named = {"endpoint": server.url, "model": "tiny", "revision": "main", "cache": str(tmp_path / "cache")}
    cfg = run_config(tmp_path, rows=6, reference=named, max_steps=2)
    result = train(cfg, console=Console(quiet=True))

    asked = len(server.requests)
    assert asked == 12
    assert {headers.get("Authorization") for headers in server.headers} == {f"Bearer {KEY}"}
    assert result.record["reference"]["source"] == "endpoint"
    assert result.record["proof"]["max_difference"] > 0.1
    assert result.record["proof"]["moved_while_training"] == 0

    train(cfg | {"output_dir": str(tmp_path / "again"), "seed": 2}, console=Console(quiet=True))
    known = [body["prompt"] for body in server.requests[:asked]]
    assert all(body["prompt"] in known for body in server.requests[asked:])
    assert len(server.requests) - asked == 4 * 4  # the spot check: four groups, together and alone

    console = Console(record=True, width=200)
    assert plan_run(validate_config(cfg))["reference"]["cached_records"] == 12
    moved_on = cfg | {"reference": named | {"revision": "next"}}
    assert not plan_run(validate_config(moved_on))["reference"]["cached_records"]
    explain(validate_config(cfg), console)
    assert "Wanted: tiny" in console.export_text(clear=False)
    assert "as its server computes" in console.export_text(clear=False)
    assert "all 12 completions have records" in console.export_text()

    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    report = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert report["reference"]["checkpoint"]["endpoint"] == server.url


@pytest.mark.slow
def test_processes_that_do_not_ask_wait_for_as_long_as_it_takes(tmp_path: Path) -> None:
    two_processes(Path(__file__).parents[2] / "served_worker.py", str(tmp_path), timeout=60)
    assert [(tmp_path / rank).read_text(encoding="utf-8") for rank in "01"] == ["12 12", "0 12"]
