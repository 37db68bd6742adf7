"""Each loss at one point worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from comparing import comparison, step_facts
from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from fiducial.logps import SequenceLogps
from fiducial.losses import LOSSES, build_loss

# One pair. Policy: chosen -4 over 2 tokens, rejected -9 over 3. Reference: -5 and -6.
# Log-ratios +1 and -3, margin 4; per token +0.5 and -1, margin 1.5; policy means -2 and -3.
POLICY = [-4.0, -9.0]
REFERENCE = [-5.0, -6.0]
NUM_TOKENS = torch.tensor([2, 3])


def logistic(value: float) -> float:
    return math.log1p(math.exp(-value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def log_odds(logp: float) -> float:
    return logp - math.log(1 - math.exp(logp))


WORKED = [
    (methods.DPOConfig(beta=0.5), logistic(2.0), 0.5, -1.5),
    (
        methods.DPOConfig(beta=0.5, label_smoothing=0.1),
        0.9 * logistic(2.0) + 0.1 * logistic(-2.0),
        0.5,
        -1.5,
    ),
    (methods.DPOConfig(beta=0.5, rpo_alpha=0.5), logistic(2.0) + 0.5 * 2.0, 0.5, -1.5),
    (
        methods.DPOConfig(beta=0.5, f_divergence_type="forward_kl"),
        logistic(0.5 * (math.exp(3.0) - math.exp(-1.0))),
        0.5,
        -1.5,
    ),
    (methods.HingeConfig(beta=0.2), 1 - 0.8, 0.2, -0.6),
    (methods.IPOConfig(beta=0.5), (1.5 - 1.0) ** 2, 0.5, -1.5),
    (
        methods.EXOPairConfig(beta=0.5, label_smoothing=0.1),
        sigmoid(2.0) * math.log(sigmoid(2.0) / 0.9) + sigmoid(-2.0) * math.log(sigmoid(-2.0) / 0.1),
        0.5,
        -1.5,
    ),
    (methods.NCAPairConfig(beta=0.5), logistic(0.5) + (logistic(-0.5) + logistic(1.5)) / 2, 0.5, -1.5),
    (
        methods.RobustConfig(beta=0.5, label_smoothing=0.2),
        (0.8 * logistic(2.0) - 0.2 * logistic(-2.0)) / 0.6,
        0.5,
        -1.5,
    ),
    (methods.BCOPairConfig(beta=0.5), 2 * logistic(1.0), 0.5, -1.5),  # mean reward -0.5
    (methods.BCOPairConfig(beta=0.5, running_delta=False), logistic(0.5) + logistic(1.5), 0.5, -1.5),
    (methods.SPPOHardConfig(beta=0.5), 0.0 + 2.0**2, 0.5, -1.5),
    (methods.AOTConfig(beta=0.5), logistic(0.5 * (5.0 - 1.0)), 0.5, -1.5),
    (methods.AOTUnpairedConfig(beta=0.5), logistic(0.5 * (1.0 + 3.0)), 0.5, -1.5),
    (methods.APOZeroConfig(beta=0.5), 1 - sigmoid(0.5) + sigmoid(-1.5), 0.5, -1.5),
    (methods.APODownConfig(beta=0.5), sigmoid(0.5) + 1 - sigmoid(2.0), 0.5, -1.5),
    (
        methods.DiscoPOPConfig(beta=0.5, tau=1.0),
        sigmoid(-2.0) * logistic(2.0) + sigmoid(2.0) * math.exp(-2.0),
        0.5,
        -1.5,
    ),
    (methods.SFTConfig(), 4.0 / 2, -2.0, -3.0),
    (methods.SigmoidNormConfig(beta=2.0), logistic(3.0), 2.0, -6.0),
    (methods.DPOPConfig(beta=0.5, penalty=2.0), logistic(2.0), 0.5, -1.5),  # chosen has not fallen
    (methods.RDPOConfig(beta=0.5, length_penalty=0.25), logistic(2.0 - 0.25), 0.5, -1.5),
    (methods.BetaDPOConfig(beta=0.5), logistic(2.0), 0.5, -1.5),
    (methods.CalDPOConfig(beta=0.5), logistic(4.0) + 0.0 + 2.0**2, 0.5, -1.5),
    (methods.ORPOConfig(beta=0.5), 2.0 + 0.5 * logistic(log_odds(-2.0) - log_odds(-3.0)), -1.0, -1.5),
    (methods.SimPOConfig(beta=2.0, gamma=0.5), logistic(2.0 - 0.5), -4.0, -6.0),
    (methods.SimPOConfig(beta=2.0, gamma=0.5, cpo_alpha=1.0), logistic(1.5) + 2.0, -4.0, -6.0),
    (methods.CPOConfig(beta=0.5, cpo_alpha=0.0), logistic(2.5), -2.0, -4.5),
    (methods.CPOConfig(beta=0.5, cpo_alpha=1.0), logistic(2.5) + 2.0, -2.0, -4.5),
    (methods.CPOHingeConfig(beta=0.1, cpo_alpha=1.0), 0.5 + 2.0, -0.4, -0.9),
    (methods.CPOIPOConfig(beta=0.25, cpo_alpha=1.0), (1.0 - 2.0) ** 2 + 2.0, -1.0, -2.25),
    (
        methods.AlphaPOConfig(beta=2.0, gamma=0.5, reward_alpha=0.25),
        logistic(8 * (math.exp(0.75) - math.exp(0.5)) - 0.5),
        8 * (1 - math.exp(0.5)),
        8 * (1 - math.exp(0.75)),
    ),
]


def sequences(values: list[float]) -> SequenceLogps:
    total: Tensor = torch.tensor(values, dtype=torch.float64)
    return SequenceLogps(total, NUM_TOKENS)


@pytest.mark.parametrize(("method", "loss", "chosen", "rejected"), WORKED, ids=repr)
def test_worked_value(method: MethodConfig, loss: float, chosen: float, rejected: float) -> None:
    reference = sequences(REFERENCE) if method.needs_reference else None

    given, built = comparison(sequences(POLICY), reference), build_loss(method)
    output = built(given, **step_facts(built, given))

    torch.testing.assert_close(output.loss.item(), loss)
    torch.testing.assert_close(output.metrics["rewards/chosen"].item(), chosen)
    torch.testing.assert_close(output.metrics["rewards/rejected"].item(), rejected)


ELSEWHERE = {
    "test_lists.py": {"plackett_luce", "info_nca", "nca", "tpo", "tpo_l", "odpo"},
    "test_kto.py": {"kto", "apo_zero_unpaired"},
    "test_tdpo.py": {"tdpo1", "tdpo2"},
}
"""Where losses of more than pairs' log-probs are worked out."""


def test_every_loss_has_a_worked_value() -> None:
    here = {type(method).model_fields["name"].default for method, *_ in WORKED}
    assert here.isdisjoint(set.union(*ELSEWHERE.values()))
    assert here | set.union(*ELSEWHERE.values()) == {config.model_fields["name"].default for config in LOSSES}


def test_discopop_turns_where_its_paper_says() -> None:
    """Its minimum and maximum at the paper's own beta and tau, appendix D.6."""
    for margin, value in ((-2.3714, 0.785929), (1.44012, 0.87829)):
        policy = torch.tensor([margin, 0.0], dtype=torch.float64, requires_grad=True)
        tokens = torch.tensor([1, 1])
        given = comparison(SequenceLogps(policy, tokens), SequenceLogps(torch.zeros_like(policy), tokens))
        loss = build_loss(methods.DiscoPOPConfig())(given).loss
        assert loss.item() == pytest.approx(value, abs=1e-5)
        assert torch.autograd.grad(loss.sum(), policy)[0].abs().max() < 1e-5


def test_dpo_of_the_starting_policy_is_log_two() -> None:
    output = build_loss(methods.DPOConfig())(comparison(sequences(POLICY), sequences(POLICY)))

    assert output.loss.item() == pytest.approx(math.log(2))
    assert output.metrics["rewards/chosen"].item() == output.metrics["rewards/rejected"].item() == 0.0
