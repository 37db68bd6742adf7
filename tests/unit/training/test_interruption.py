"""A signal finishes the step, saves and stops; a second one acts at once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerCallback

from fiducial.training.interruption import Interruption
from training_harness import build_trainer


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    trainer = build_trainer(tmp_path, callbacks=[interruption, SignalAt(1, number)])
    trainer.train()
    assert interruption.stopped_at == trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    interruption.release()
    assert signal.getsignal(number) is before
    told = "Stopping after this step, with a checkpoint. Ctrl-C again stops at once"
    assert capfd.readouterr().err.count(told) == 1


@pytest.fixture
def python_takes_interrupts() -> Iterator[None]:
    """As in a terminal: a shell's background jobs are started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path: Path, python_takes_interrupts: None) -> None:
    interruption = Interruption()
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    interruption.on_train_begin(trainer.args, trainer.state, trainer.control)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.requested


def test_what_a_cluster_and_its_launcher_both_send_is_one_request(
    tmp_path: Path, python_takes_interrupts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    interruption = Interruption()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # by default it would end the tests
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    interruption.on_train_begin(trainer.args, trainer.state, trainer.control)
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        assert capfd.readouterr().err.count("Stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        interruption.release()
        assert signal.signal(signal.SIGTERM, before) is signal.default_int_handler


def test_an_uninterrupted_run_is_not_stopped_and_releases_the_signals(tmp_path: Path) -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    trainer.train()
    assert interruption.stopped_at is None
    assert trainer.state.global_step == 4
    interruption.release()
    assert signal.getsignal(signal.SIGINT) is before
