"""What a run says of itself, on the screen and in `plan.json`: what was predicted, and what was measured."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fiducial.data.dataset import TokenizedDataset
from fiducial.model.precision import resolve_precision
from fiducial.prepare import Policy, ProvedReference, Run
from fiducial.processes import is_first_process
from fiducial.record_keeping import held_out, trained_on
from fiducial.reference.describe import plan_report, render_plan
from fiducial.reference.fill import warn
from fiducial.reference.memory import estimate_memory
from fiducial.reference.row_counts import count_data
from fiducial.run_record import changed_settings, no_record_note
from fiducial.training.arguments import world_size
from fiducial.training.expected_time import Amount, expected_seconds, products_a_second
from fiducial.training.metrics import peak_memory, resident_memory
from fiducial.training.reference_sync import ReferenceSync
from fiducial.training.step_clock import StepClock

PLAN_FILE = "plan.json"


class RunReport:
    """The record of one run while it grows."""

    def __init__(self, run: Run, budget: int, device: torch.device) -> None:
        """Print the plan and the data's account, and begin the record with them."""
        self.run = run
        self.device = device
        self.seconds: dict[str, float] = {}
        self.folder = Path(run.cfg.output.output_dir)
        memory = estimate_memory(run.cfg, run.facts, run.plan, budget, longest=_longest_group(run))
        report = plan_report(run.cfg, run.facts, run.plan, memory, count_data(run.cfg))
        render_plan(report, run.console)
        run.data.audit.render(run.console)
        self.record: dict[str, Any] = report | {"audit": run.data.audit.as_dict(), "proof": {}}
        self.record["predicted"]["seconds"] = self._expected_seconds()
        self._held = resident_memory(device)

    def _expected_seconds(self) -> dict[str, float] | None:
        """Print and give what training and scoring will take; None where the data's size is not known."""
        run, train = self.run, self.run.data.train
        if not isinstance(train, TokenizedDataset):
            return None
        precision = resolve_precision(run.cfg, self.device)
        speed = products_a_second(run.facts.model, precision.autocast or precision.weights, self.device)
        options = run.cfg.optimization
        epochs = options.num_epochs
        if options.max_steps is not None:
            epochs = options.max_steps * options.groups_per_step * world_size() / len(train)
        expected = expected_seconds(
            run.cfg,
            run.facts,
            run.plan,
            train=_amount(train),
            held_out=_amount(run.data.evaluation),
            epochs=epochs,
            speed=speed * world_size(),
        )
        if expected is None:
            return None
        run.console.print(expected.sentence(speed, run.plan), soft_wrap=True)
        return asdict(expected)

    def tell_resumed(self, checkpoint: Path) -> None:
        """Print where the run goes on, and what decides its result and is not as it was then."""
        run, then = self.run, self.run.record
        run.console.print(f"Going on from {checkpoint}.", soft_wrap=True)
        if then is None:
            warn(run.console, no_record_note(checkpoint))
            return
        if changed := changed_settings(then.run, run.cfg):
            warn(run.console, f"settings have changed since that was saved: {'; '.join(changed)}.")
        if then.trained_on_others(trained_on(run)):
            warn(
                run.console,
                "the training data or its order is not what it was when that was saved: rows may be trained "
                "on twice, or never.",
            )
        if then.held_out_others(held_out(run)):
            warn(
                run.console,
                "what val_set_size holds out is not what it was when that was saved: some of it has been "
                "trained on, and the evaluation is of no use.",
            )

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds inside as those of `what`."""
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    def tell_proof(self, policy: Policy, judged: ProvedReference) -> None:
        """Print and record the layout and the proof."""
        self.record["layout"] = {"layout": policy.layout.layout, "why": policy.layout.why}
        self.run.console.print(f"Layout: {policy.layout.layout}. {policy.layout.why}", soft_wrap=True)
        if judged.proof is not None:
            measured = judged.approximation
            self.record["proof"] = judged.proof.as_dict() | {"approximation": measured and asdict(measured)}
            if measured is not None:
                self.run.console.print(measured.sentence(), soft_wrap=True)
            self.run.console.print(judged.proof.sentence(), soft_wrap=True)

    def add_end(self, sync: ReferenceSync | None, moved: float | None) -> None:
        """Record each move of a synced reference, and how far any reference has moved by itself."""
        if sync is not None:
            self.record["proof"] |= {"moves": sync.report()}
        if moved is not None:
            self.record["proof"] |= {"moved_while_training": moved}

    def add_measured(self, clock: StepClock) -> None:
        """Record what the run really took, beside what was predicted."""
        scoring = self.seconds.get("scoring", 0.0) + clock.scoring
        training = clock.seconds - clock.scoring
        self.record["measured"] = {
            "peak_bytes": peak_memory(self.device) - self._held,
            "held_before_loading_bytes": self._held,
            "seconds": self.seconds | {"scoring": scoring, "training": training},
            "scoring_share": scoring / max(scoring + training, 1e-9),
        }

    def tell_rows(self) -> None:
        """Record the account of streamed rows, which went on while training, and print what is new in it."""
        account = self.run.data.account()
        self.record["audit"] = account.as_dict()
        if account.summary() != self.run.data.audit.summary():
            account.render(self.run.console)

    def write(self) -> None:
        """Put the record into the output folder, whole or not at all."""
        if not is_first_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{PLAN_FILE}.tmp"
        temporary.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / PLAN_FILE)


def _amount(data: TokenizedDataset | None) -> Amount:
    if data is None:
        return Amount(0, 0)
    tokens = int(data.lengths.sum())
    return Amount(tokens, tokens - int(data.piece_lengths(0).sum()))


def _longest_group(run: Run) -> int | None:
    """Tokens of the longest group there is; a stream's are not known, so what is allowed counts."""
    parts = [part for part in (run.data.train, run.data.evaluation) if part is not None]
    known = [int(part.lengths.max()) for part in parts if isinstance(part, TokenizedDataset)]
    return max(known) if len(known) == len(parts) else None
