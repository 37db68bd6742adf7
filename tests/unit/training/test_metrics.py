"""Metrics: exact means, however the pairs were grouped."""

import time

import pytest
import torch

from comparing import comparison
from fiducial.config.methods import APOZeroUnpairedConfig, MethodConfig, TPOConfig, TPOLConfig
from fiducial.logps import UNWEIGHTED, Comparison, SequenceLogps
from fiducial.losses import build_loss
from fiducial.losses.output import LossOutput
from fiducial.training.metrics import METRICS, MetricSums, Stopwatch, peak_memory

CPU = torch.device("cpu")


def one_batch(
    policy_sums: list[float], reference_sums: list[float] | None, *, beta: float = 0.5
) -> tuple[Comparison, LossOutput]:
    tokens = torch.arange(1, len(policy_sums) + 1)
    policy = SequenceLogps(torch.tensor(policy_sums), tokens)
    reference = None if reference_sums is None else SequenceLogps(torch.tensor(reference_sums), tokens)
    ratios = policy.sum - (reference.sum if reference is not None else 0)
    output = LossOutput.of_rewards(ratios[0::2] ** 2, beta * ratios[0::2], beta * ratios[1::2])
    return comparison(policy, reference), output


def test_every_metric_by_hand() -> None:
    sums = MetricSums(CPU)
    sums.add(*one_batch([-1.0, -4.0], [-2.0, -2.0]), tokens=9)
    sums.add(*one_batch([-3.0, -3.0, -6.0, -1.0], [-3.0, -3.0, -3.0, -2.0]), tokens=20)
    means = sums.means()
    # chosen log-ratios 1, 0, -3; rejected -2, 0, 1; the second pair is a tie
    assert means == pytest.approx(
        {
            "loss": (1 + 0 + 9) / 3,
            "rewards/chosen": 0.5 * (1 + 0 - 3) / 3,
            "rewards/rejected": 0.5 * (-2 + 0 + 1) / 3,
            "rewards/margins": 0.5 * (3 + 0 - 4) / 3,
            "rewards/accuracies": (1 + 0.5 + 0) / 3,
            "logps/chosen": (-1 - 3 - 6) / 3,
            "logps/rejected": (-4 - 3 - 1) / 3,
            "kl": (1 - 2 + 0 + 0 - 3 + 1) / 6,
            "lengths/chosen": (1 + 1 + 3) / 3,
            "lengths/rejected": (2 + 2 + 4) / 3,
        }
    )
    assert tuple(means) == METRICS
    assert (sums.num_pairs, sums.num_tokens) == (3, 29)


def test_mean_of_micro_batch_means_would_differ() -> None:
    parts = [
        one_batch([-1.0, -4.0], [-2.0, -2.0]),
        one_batch([-3.0, -3.0, -6.0, -1.0], [-3.0, -3.0, -3.0, -2.0]),
    ]
    whole, means = MetricSums(CPU), []
    for part in parts:
        sums = MetricSums(CPU)
        sums.add(*part, tokens=0)
        means.append(sums.means()["loss"])
        whole.merge(sums)
    assert whole.means()["loss"] != pytest.approx(sum(means) / 2)


def test_log_probs_are_of_whole_completions_though_the_loss_weighs_their_tokens() -> None:
    tokens = torch.tensor([3, 1])
    policy = SequenceLogps(torch.tensor([-1.5, -4.0]), tokens, {UNWEIGHTED: torch.tensor([-2.0, -4.0])})
    reference = SequenceLogps(torch.tensor([-1.0, -2.0]), tokens, {UNWEIGHTED: torch.tensor([-5.0, -2.0])})
    rewards = policy.sum - reference.sum
    sums = MetricSums(CPU)
    output = LossOutput.of_rewards(torch.zeros(1), rewards[0::2], rewards[1::2])
    sums.add(comparison(policy, reference), output, tokens=9)
    means = sums.means()
    assert (means["logps/chosen"], means["logps/rejected"], means["kl"]) == (-2, -4, (3 - 2) / 2)
    assert means["rewards/chosen"] == -0.5, "the reward is what the method compares"


def test_no_kl_without_a_reference() -> None:
    sums = MetricSums(CPU)
    sums.add(*one_batch([-1.0, -2.0], None), tokens=3)
    assert set(sums.means()) == set(METRICS) - {"kl"}


@pytest.mark.parametrize("method", [TPOConfig(), TPOLConfig()], ids=lambda method: method.name)
def test_beside_a_gold_completion_chosen_and_rejected_are_those_compared(method: MethodConfig) -> None:
    given = comparison(SequenceLogps(torch.tensor([-1.0, -4.0, -9.0]), torch.tensor([3, 1, 2])), size=3)
    sums = MetricSums(CPU)
    sums.add(given, build_loss(method)(given), tokens=9)
    means = sums.means()
    assert (means["logps/gold"], means["logps/chosen"], means["logps/rejected"]) == (-1, -4, -9)
    assert (means["lengths/gold"], means["lengths/chosen"], means["lengths/rejected"]) == (3, 1, 2)


def test_the_margin_of_completions_that_stand_alone_is_that_of_their_means() -> None:
    policy, reference = torch.tensor([-1.0, -4.0, -9.0]), torch.zeros(3)
    tokens, labels = torch.ones(3, dtype=torch.long), [1.0, -1.0, 1.0]
    given = comparison(SequenceLogps(policy, tokens), SequenceLogps(reference, tokens), size=1, scores=labels)
    sums = MetricSums(CPU)
    sums.add(given, build_loss(APOZeroUnpairedConfig(beta=0.5))(given), tokens=9)
    means = sums.means()
    rewards = means["rewards/chosen"], means["rewards/rejected"], means["rewards/margins"]
    assert rewards == (0.5 * (-1 - 9) / 2, 0.5 * -4, -0.5)


def test_nothing_counted_gives_no_metrics() -> None:
    sums = MetricSums(CPU)
    sums.add(*one_batch([], []), tokens=0)
    assert sums.means() == {}


def test_stopwatch_leaves_pauses_out() -> None:
    watch = Stopwatch()
    with watch.paused():
        time.sleep(0.05)
    assert watch.restart() < 0.04
    assert watch.restart(already=5.0) < 0.04
    assert 5.0 <= watch.elapsed < 5.04


def test_peak_memory_counts_what_was_held_once() -> None:
    before = peak_memory(CPU)
    torch.ones(50_000_000 // 4).sum()
    assert peak_memory(CPU) >= before > 10_000_000
