"""What losses of a whole step carry from step to step, and which pairs they keep."""

import pytest
import torch

import pair_oracles
from comparing import comparison, step_facts
from fiducial.config import methods
from fiducial.logps import SequenceLogps
from fiducial.losses import build_loss
from fiducial.losses.output import LossOutput


def step(method: methods.MethodConfig, ratios: list[float], **running: float) -> LossOutput:
    """One step of pairs with these log-ratios."""
    tokens = torch.full((len(ratios),), 3)
    policy = SequenceLogps(torch.tensor(ratios, dtype=torch.float64), tokens)
    loss = build_loss(method)
    given = comparison(policy, SequenceLogps(torch.zeros_like(policy.sum), tokens))
    return loss(given, **step_facts(loss, given) | running)


def test_delta_is_the_mean_of_all_rewards_so_far() -> None:
    method = methods.BCOPairConfig(beta=0.5)
    first = step(method, [2.0, -4.0])
    assert first.running == {"delta": -0.5, "num_rewards": 2}

    second = step(method, [6.0, 2.0, 1.0, 3.0], **first.running)

    assert second.running["delta"] == pytest.approx((1 - 2 + 3 + 1 + 0.5 + 1.5) / 6)
    assert second.metrics["delta"].item() == pytest.approx(second.running["delta"])


def test_without_delta_nothing_is_carried_and_no_second_pass_is_needed() -> None:
    loss = build_loss(methods.BCOPairConfig(running_delta=False))
    assert not loss.whole_step
    assert not loss.running


def test_beta_follows_the_margins_of_the_pairs_kept() -> None:
    method = methods.BetaDPOConfig(beta=0.5, beta_scaling=0.6, keep_share=1)
    output = step(method, [2.0, 0.0, 4.0, 0.0], mean=1.0, deviation=2.0, num_steps=3.0)

    mean = 0.9 * 1.0 + 0.1 * 3.0  # margins 2 and 4, whatever beta is
    assert output.running["mean"] == pytest.approx(mean)
    assert output.running["deviation"] == pytest.approx(0.9 * 2.0 + 0.1 * 1.0)
    assert output.metrics["beta"].item() == pytest.approx(0.5 * (1 + 0.6 * (3.0 - mean)))
    naive = pair_oracles.beta_dpo(0.5, 0.6, momentum=0.9, mean=1.0)
    ratios = torch.tensor([2.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(output.loss, naive(ratios, torch.zeros(4), torch.ones(4)))


def test_outliers_are_left_out_and_the_mean_is_of_the_others() -> None:
    method = methods.BetaDPOConfig(beta=1.0, beta_scaling=0.0, keep_share=0.8)
    ratios = [1.0, 0.0, 1.1, 0.0, 0.9, 0.0, 1e3, 0.0, 1.05, 0.0]
    output = step(method, ratios, mean=1.0, deviation=0.5, num_steps=9.0)

    assert output.metrics["kept"].tolist() == [1, 1, 1, 0, 1]
    others = torch.tensor([1.0, 1.1, 0.9, 1.05], dtype=torch.float64)
    torch.testing.assert_close(output.loss.mean(), -torch.nn.functional.logsigmoid(others).mean())


def test_which_pairs_are_kept_does_not_depend_on_their_order() -> None:
    method = methods.BetaDPOConfig(keep_share=0.5)
    ratios = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))

    kept = step(method, ratios.flatten().tolist()).metrics["kept"]
    again = step(method, ratios[shuffled].flatten().tolist()).metrics["kept"]

    assert kept.sum() == 10
    assert torch.equal(kept[shuffled], again)


def test_every_step_draws_anew_which_pairs_are_kept() -> None:
    method = methods.BetaDPOConfig(keep_share=0.5)
    ratios = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()

    first, second, again = (
        step(method, ratios, mean=0.0, deviation=1.0, num_steps=number).metrics["kept"]
        for number in (1.0, 2.0, 1.0)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_before_the_first_step_which_pairs_are_kept_does_not_depend_on_order_or_rounding() -> None:
    """The policy is its own reference, but for what two cuts of one step round differently."""
    loss, generator = build_loss(methods.BetaDPOConfig(keep_share=0.5)), torch.Generator().manual_seed(0)
    tokens = torch.full((40,), 3)
    reference = SequenceLogps(-50 * torch.rand(40, generator=generator), tokens)

    def kept(order: torch.Tensor) -> torch.Tensor:
        sequences = torch.stack([2 * order, 2 * order + 1], 1).flatten()
        rounding = 1e-5 * torch.randn(40, generator=generator)
        policy = SequenceLogps((reference.sum + rounding)[sequences], tokens)
        given = comparison(policy, reference.at(sequences))
        return loss(given, **step_facts(loss, given)).metrics["kept"]

    shuffled = torch.randperm(20, generator=generator)
    first = kept(torch.arange(20))

    assert first.sum() == 10
    assert torch.equal(first, kept(torch.arange(20)))
    assert torch.equal(first[shuffled], kept(shuffled))


def test_a_mixture_logs_its_parts_and_carries_their_numbers() -> None:
    parts = (methods.DPOConfig(beta=0.5), methods.BCOPairConfig(beta=0.5), methods.SFTConfig())
    output = step(methods.MixtureConfig(losses=parts, weights=(0.8, 0.2, 1.0)), [2.0, -4.0])

    alone = [step(part, [2.0, -4.0]) for part in parts]
    expected = 0.8 * alone[0].loss + 0.2 * alone[1].loss + alone[2].loss
    torch.testing.assert_close(output.loss, expected)
    for name, part in zip(("sigmoid", "bco_pair", "sft"), alone, strict=True):
        torch.testing.assert_close(output.metrics[f"loss/{name}"], part.loss)
    assert output.running == {"bco_pair/delta": -0.5, "bco_pair/num_rewards": 2}
    assert output.metrics["rewards/chosen"].tolist() == [1.0]


def test_a_mixtures_rewards_are_those_of_its_first_part_with_a_reference() -> None:
    parts = (methods.SFTConfig(), methods.DPOConfig(beta=0.5), methods.HingeConfig(beta=0.25))

    output = step(methods.MixtureConfig(losses=parts, weights=(1.0, 0.8, 0.2)), [2.0, -4.0])

    assert (output.metrics["rewards/chosen"].item(), output.metrics["rewards/rejected"].item()) == (1.0, -2.0)
