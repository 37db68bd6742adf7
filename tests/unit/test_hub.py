"""Without a network a hub name is answered from the cache, or refused at once with what to do."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from rich.console import Console

from fiducial import hub
from fiducial.config.load import validate_config
from fiducial.errors import FiducialError
from fiducial.evaluate import evaluate
from fiducial.offline import kept_to_cache
from fiducial.train import train
from listening import listening
from processor_time import times_the_imports
from run_configs import run_config

NOBODY = "http://127.0.0.1:9"
COMMIT = "a" * 40


class Answers(BaseHTTPRequestHandler):
    """A hub in trouble, which is there all the same; it notes what was asked."""

    asked: list[str] = []  # noqa: RUF012 (each server has its own class)

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(503)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[tuple[str, list[str]]]:
    """The address of a server, and the paths it is asked for."""
    handler = type("Answers", (Answers,), {"asked": []})
    with listening(HTTPServer(("127.0.0.1", 0), handler)) as address:
        yield address, handler.asked


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    hub._last_answer.cache_clear()
    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", *proxies, *map(str.upper, proxies)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)


def test_nobody_listens() -> None:
    assert hub.unreachable() == f"{NOBODY}: Connection refused"


def test_any_answer_is_an_answer_and_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[str, list[str]]
) -> None:
    address, asked = answers
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert hub.unreachable() is None
    assert hub.unreachable() is None
    assert len(asked) == 1


def test_who_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert hub.unreachable() is not None
        assert time.monotonic() - begun < 2


def test_a_proxy_is_used(monkeypatch: pytest.MonkeyPatch, answers: tuple[str, list[str]]) -> None:
    monkeypatch.setenv("http_proxy", answers[0])
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid")
    assert hub.unreachable() is None
    assert answers[1] == ["http://mirror.invalid"]


def test_a_socks_proxy_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    assert hub.unreachable() is None


@pytest.mark.parametrize(("said", "reason"), [("1", "HF_HUB_OFFLINE is set"), ("0", None)])
def test_what_the_user_says_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[str, list[str]], said: str, reason: str | None
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", answers[0])
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    assert hub.unreachable() == reason
    assert not answers[1]


def test_what_can_be_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert all(map(hub.is_hub_name, ("gpt2", "org/name")))
    assert not any(map(hub.is_hub_name, ("here", "./there", "/a/b", "~/c", "a/b/c", "s3://bucket/x")))


def hub_run(folder: Path, name: str) -> Path:
    """A run on `some/model`, which is in the cache, or on another name, which is not."""
    run = run_config(folder, max_steps=1)
    model = folder / "home" / "hub" / "models--some--model"
    if not model.exists():
        shutil.copytree(folder / "base-llama", model / "snapshots" / COMMIT)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(json.dumps(run | {"base_model": name}), encoding="utf-8")
    return path


def fiducial(folder: Path, command: str, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fiducial", command, str(hub_run(folder, name))],
        env=os.environ | {"HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_cached_name_is_planned_offline_in_a_second(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = fiducial(tmp_path, "plan", "some/model")
    waited = time.monotonic() - begun
    assert done.returncode == 0, done.stderr
    assert "initial_policy" in done.stdout
    assert f"cannot be reached ({NOBODY}: Connection refused)" in done.stderr
    assert waited < 8, "there is no wait for the network"
    assert times_the_imports(lambda: fiducial(tmp_path, "plan", "some/model")) < 6, "more than a second"


def test_a_name_that_is_not_cached_is_refused_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = fiducial(tmp_path, "plan", "some/other")
    assert time.monotonic() - begun < 8
    assert done.returncode == 2
    assert "base_model: some/other is not here and not cached, and the hub" in done.stderr
    assert f"({NOBODY}: Connection refused)" in done.stderr
    assert "go online once" in done.stderr


LORA = {"adapter": "lora", "lora_r": 2}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"base_model": "some/other"}, "base_model: some/other"),
        ({"base_model": "some/model"}, "A file of some/model"),  # its config.json is cached
        ({"tokenizer_config": "some/other"}, "tokenizer_config: the tokenizer of some/other"),
        ({"datasets": [{"path": "some/other"}]}, "datasets.0.path: 'some/other'"),
        ({"reference": {"model": "some/other"}}, "reference.model: some/other"),
        (LORA | {"reference": {"adapter": "some/other"}}, "reference.adapter: some/other"),
        (LORA | {"lora_model_dir": "some/other"}, "lora_model_dir: some/other"),
    ],
)
def test_what_is_not_cached_is_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], named: str
) -> None:
    local = json.loads(hub_run(tmp_path, "some/model").read_text()) | {
        "base_model": str(tmp_path / "base-llama")
    }
    (weights,) = (tmp_path / "home").rglob("model.safetensors")
    weights.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    with pytest.raises(FiducialError) as error:
        train(local | changed, console=Console(quiet=True))
    reason = f"the hub cannot be reached to look it up ({NOBODY}: Connection refused)"
    assert f"{named} is not here and not cached, and {reason}" in str(error.value)
    assert "go online once so that it is cached" in str(error.value)


def test_an_answer_holds_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 59.0, []
    monkeypatch.setattr(hub, "_ask", asked.append)
    monkeypatch.setattr(hub.time, "monotonic", lambda: now)
    hub.unreachable()
    now += 59
    hub.unreachable()
    assert len(asked) == 1
    now += 2
    hub.unreachable()
    assert len(asked) == 2


def test_the_reason_outlasts_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = validate_config({"base_model": "some/model", "rl": "dpo", "datasets": [{"path": "/pairs.jsonl"}]})
    with kept_to_cache(cfg):
        hub._last_answer.cache_clear()
        assert hub.unreachable() == f"{NOBODY}: Connection refused"
    hub._last_answer.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"


def test_what_a_run_names_there(monkeypatch: pytest.MonkeyPatch) -> None:
    local: dict[str, Any] = {"base_model": "/base", "rl": "dpo", "datasets": [{"path": "/pairs.jsonl"}]}
    files = [{"path": "json", "data_files": ["rows.jsonl"]}]
    assert hub.out_of_reach(validate_config(local | {"datasets": files})) is None
    for reference, asked in (
        ({}, False),
        ({"model": "some/model"}, True),
        ({"adapter": "some/adapter"}, True),
        ({"endpoint": "http://localhost/v1", "model": "some/model"}, False),
    ):
        named = validate_config(local | ({"reference": reference} if reference else {}))
        assert (hub.out_of_reach(named) is not None) == asked, reference


def test_a_run_from_python_asks_a_hub_out_of_reach_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = json.loads(hub_run(tmp_path, "some/model").read_text())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    tried: list[object] = []
    look_up = socket.getaddrinfo

    def counted(*address: Any, **options: Any) -> Any:
        tried.append(address)
        if len(tried) > 1:
            pytest.fail(
                f"the hub is asked again: {address}"
            )  # no Exception, after which the client would wait
        return look_up(*address, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    console = Console(record=True, width=200, file=io.StringIO())
    train(run, console=console)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert f"cannot be reached ({NOBODY}: Connection refused): using what is cached" in console.export_text()
    evaluate(run | {"test_datasets": run["datasets"]}, console=Console(quiet=True))
    assert len(tried) == 1, "what was found out holds for a minute"
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not huggingface_hub.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.slow
def test_a_cached_name_trains_offline(tmp_path: Path) -> None:
    done = fiducial(tmp_path, "train", "some/model")
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
