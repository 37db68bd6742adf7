"""One optimizer step: exact, however it is cut; and what happens when it cannot be computed."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import training_harness as harness
from fiducial.config.methods import AOTConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError
from fiducial.logps import TokenLogps
from fiducial.training.metrics import METRICS
from tiny import random_groups, tiny_model
from training_harness import build_trainer


def step_gradients(tmp_path: Path, groups: list[TokenizedGroup], budget: int, **model_settings):
    model = tiny_model(**model_settings)
    trainer = build_trainer(tmp_path, model=model, groups=groups, budget=budget)
    move_off_the_reference(model)
    loss = trainer.training_step(model, groups)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def move_off_the_reference(model: torch.nn.Module) -> None:
    """At the reference itself all pairs weigh the same, and a wrong weight could hide."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def naive_mean_loss(model, reference_model, groups: list[TokenizedGroup], beta: float = 0.1):
    from oracles import dpo, naive_token_logps

    losses = []
    for group in groups:
        ratios = []
        for completion in group.completions:
            alone = [TokenizedGroup(group.prompt, (completion,))]
            with torch.no_grad():
                reference = naive_token_logps(reference_model, alone).sum()
            ratios.append(naive_token_logps(model, alone).sum() - reference)
        losses.append(dpo(ratios[0], ratios[1], beta=beta))
    return torch.stack(losses)


def test_gradient_is_that_of_the_mean_over_pairs_whatever_the_cut(tmp_path: Path) -> None:
    groups = random_groups(7)
    twin = tiny_model()
    move_off_the_reference(twin)
    naive = naive_mean_loss(twin, tiny_model(), groups)
    naive.mean().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for budget in (1, 150, 10**6):
        loss, gradients = step_gradients(tmp_path, groups, budget)
        assert loss.item() == pytest.approx(naive.mean().item(), rel=1e-5)
        assert distance(gradients, expected) < 2e-5 * scale


class Counted(harness.StoredReference):
    """Counts how often it is asked."""

    asked = 0

    def token_logps(self, batch) -> TokenLogps:
        self.asked += 1
        return super().token_logps(batch)


def test_a_loss_of_the_whole_step_asks_for_each_reference_log_prob_once(tmp_path: Path) -> None:
    groups, reference = random_groups(4), []

    def live(scorer):
        reference.append(Counted(scorer, groups))
        return reference[0]

    trainer = build_trainer(tmp_path, groups=groups, budget=1, method=AOTConfig(), live=live)
    trainer.training_step(trainer.model, groups)
    assert reference[0].asked == len(groups)


def test_mean_of_micro_batch_means_would_be_another_gradient(tmp_path: Path) -> None:
    groups = random_groups(5)
    _, whole = step_gradients(tmp_path, groups, 10**6)
    _, first = step_gradients(tmp_path, groups[:1], 10**6)
    _, rest = step_gradients(tmp_path, groups[1:], 10**6)
    averaged = {name: (first[name] + rest[name]) / 2 for name in whole}
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    assert distance(averaged, whole) > 0.1 * scale


def test_gradients_of_an_earlier_step_are_not_carried_over(tmp_path: Path) -> None:
    groups = random_groups(3)
    model = tiny_model()
    trainer = build_trainer(tmp_path, model=model, groups=groups)
    trainer.training_step(model, groups)
    first = model.get_input_embeddings().weight.grad.clone()
    trainer.training_step(model, groups)
    assert torch.equal(model.get_input_embeddings().weight.grad, first)


def test_every_documented_metric_is_logged_once_a_step(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path, evaluation=random_groups(3, seed=4), eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    for log in logs:
        assert set(METRICS) <= set(log)
        assert log["tokens_per_second"] > 0
        assert log["peak_memory_gb"] > 0
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 4]
    assert {f"eval_{name}" for name in METRICS} <= set(evaluations[0])


def test_logged_means_cover_all_pairs_since_the_last_log(tmp_path: Path) -> None:
    every = build_trainer(tmp_path, logging_steps=1, max_steps=3, groups=random_groups(10))
    every.train()
    seldom = build_trainer(tmp_path, logging_steps=3, max_steps=3, groups=random_groups(10))
    seldom.train()
    each = [log["rewards/margins"] for log in every.state.log_history if "loss" in log]
    (together,) = [log["rewards/margins"] for log in seldom.state.log_history if "loss" in log]
    assert together == pytest.approx((4 * each[0] + 4 * each[1] + 2 * each[2]) / 10, rel=1e-6)


@pytest.mark.parametrize(("batch_size", "budget"), [(1, 10**6), (2, 60), (7, 1)])
def test_evaluation_is_the_exact_mean_whatever_the_batch_size(
    tmp_path: Path, batch_size: int, budget: int
) -> None:
    evaluation = random_groups(7, seed=9)
    model = tiny_model()
    trainer = build_trainer(
        tmp_path, model=model, evaluation=evaluation, budget=budget, per_device_eval_batch_size=batch_size
    )
    move_off_the_reference(model)
    with torch.no_grad():
        expected = naive_mean_loss(model, tiny_model(), evaluation).mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_evaluating_and_saving_take_no_training_time(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=1, evaluation=random_groups(3, seed=4))
    trainer.train()
    watch = trainer.running.stopwatch
    for call in (trainer.evaluate, lambda: trainer._save_checkpoint(trainer.model, None)):
        began = time.perf_counter()
        watch.restart()
        call()
        assert watch.elapsed < 0.5 * (time.perf_counter() - began)


def test_an_optimizer_of_two_sets_of_weights_is_told_which_are_wanted(tmp_path: Path) -> None:
    trainer, asked = build_trainer(tmp_path, evaluation=random_groups(3, seed=4)), []
    trainer.optimizer = SimpleNamespace(
        train=lambda: asked.append("train"), eval=lambda: asked.append("eval")
    )
    trainer.training_step(trainer.model, random_groups(2))
    trainer.evaluate()
    assert asked == ["train", "eval"]


def test_loss_falls(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=12, groups=random_groups(4))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.3 * losses[0]


class OutOfMemoryAbove:
    """A scorer that fits at most `limit` tokens a pass, as a device would."""

    def __init__(self, scorer, limit: int) -> None:
        self.scorer, self.limit, self.passes = scorer, limit, []
        self.layout, self.model, self.device = scorer.layout, scorer.model, scorer.device

    def pack(self, groups):
        return self.scorer.pack(groups)

    def __call__(self, batch, statistics=()) -> TokenLogps:
        self.passes.append(batch.input_ids.numel())
        logps = self.scorer(batch, statistics)
        if batch.input_ids.numel() > self.limit:
            if logps.values.requires_grad:
                logps.values.sum().backward()  # as a failure in mid-step leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logps


def limited(trainer, limit: int):
    scorer = OutOfMemoryAbove(trainer.objective.scorer, limit)
    trainer.objective = harness.Objective(scorer, trainer.objective.reference, trainer.objective.loss)
    return scorer


def test_running_out_of_memory_halves_the_budget_and_repeats_the_step(tmp_path: Path) -> None:
    groups = random_groups(8)
    _, expected = step_gradients(tmp_path, groups, 10**6)
    model = tiny_model()
    trainer = build_trainer(tmp_path, model=model, groups=groups, budget=10**6)
    move_off_the_reference(model)
    scorer = limited(trainer, 200)
    trainer.training_step(model, groups)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert trainer.running.micro_batch_tokens <= 200
    assert distance(gradients, expected) < 1e-5 * max(g.abs().max().item() for g in expected.values())
    assert trainer.running.sums.num_pairs == 8
    assert scorer.passes[0] > 200 >= scorer.passes[-1]
    failed = [tokens for tokens in scorer.passes if tokens > 200]
    assert len(failed) < 4, "half of what the step filled, not of a budget it never filled"


class OutOfMemoryOnce(OutOfMemoryAbove):
    """Another program takes the memory just before this scorer's second pass."""

    def __call__(self, batch, statistics=()) -> TokenLogps:
        self.limit = 0 if len(self.passes) == 1 else 10**6
        return super().__call__(batch, statistics)


def test_an_evaluation_that_runs_out_of_memory_counts_every_group_once(tmp_path: Path) -> None:
    budget, rows = 100, random_groups(8, seed=9)
    trainer = build_trainer(
        tmp_path, evaluation=rows, budget=budget, layout="packed", per_device_eval_batch_size=4
    )
    expected = trainer.evaluate()
    objective = trainer.objective
    scorer = OutOfMemoryOnce(objective.scorer, 0)
    trainer.objective = harness.Objective(scorer, objective.reference, objective.loss)
    found = trainer.evaluate()
    assert trainer.running.micro_batch_tokens < budget
    assert len(scorer.passes) > 4
    for name in ("eval_loss", "eval_logps/chosen", "eval_lengths/rejected"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_a_group_that_does_not_fit_alone_is_an_error(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    limited(trainer, 1)
    with pytest.raises(TrainingError, match=r"step 1 with one group of \d+ tokens.*sequence_len"):
        trainer.train()


class NotANumber:
    def __init__(self, reference, key: str) -> None:
        self.reference, self.key = reference, key

    def token_logps(self, batch) -> TokenLogps:
        logps = self.reference.token_logps(batch)
        if self.key in batch.keys:
            logps.values[batch.sequence == batch.keys.index(self.key)] = float("nan")
        return logps


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_changes_no_weight(
    tmp_path: Path, wrong: float, max_grad_norm: float
) -> None:
    model = tiny_model()
    trainer = build_trainer(tmp_path, model=model, max_steps=3, max_grad_norm=max_grad_norm)
    factors = iter([1.0, wrong])
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * next(factors))
    with pytest.raises(TrainingError, match="gradient is not a number at step 2, though the loss is one"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_loss_that_is_not_a_number_names_step_and_rows(tmp_path: Path) -> None:
    groups = random_groups(8)
    model = tiny_model()
    trainer = build_trainer(tmp_path, model=model, groups=groups, max_steps=2)
    order = [row for rows in trainer.get_train_dataloader().batch_sampler for row in rows]
    bad = groups[order[5]].keys  # in the second step
    reference = NotANumber(trainer.objective.reference, bad[0])
    trainer.objective = harness.Objective(trainer.objective.scorer, reference, trainer.objective.loss)
    with pytest.raises(TrainingError, match="not a number at step 2, for 1 of 4 groups") as caught:
        trainer.train()
    assert " / ".join(bad) in str(caught.value)
    assert "learning_rate" in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
