"""LD-DPO's weights, RPO's term and the divergences, beyond their twins: tokens, lengths and extremes."""

import pytest
import torch

from comparing import comparison
from fiducial.config import methods
from fiducial.data.batch import pack
from fiducial.logps import ON_POLICY, SequenceLogps, TokenLogps
from fiducial.losses import build_loss
from fiducial.losses.exponential import expm1
from fiducial.losses.modifiers import token_weights
from tiny import random_groups


def test_ld_alpha_weighs_tokens_beyond_the_shorter_completion() -> None:
    groups = random_groups(5, longest=9)
    weigh = build_loss(methods.DPOConfig(ld_alpha=0.25)).token_weights
    assert weigh is not None
    expected: list[float] = []
    for group in groups:
        lengths = [len(completion) for completion in group.completions]
        expected += [1.0 if at < min(lengths) else 0.25 for length in lengths for at in range(length)]
    assert 0.25 in expected

    assert weigh(pack(groups, layout="packed")).tolist() == expected
    assert weigh(pack(groups, layout="padded")).tolist() == expected
    assert weigh(pack([], layout="packed")).tolist() == []


def test_a_weighted_sum_asks_for_what_any_of_its_parts_reads() -> None:
    parts = (methods.SFTConfig(), methods.DPOConfig(ld_alpha=0.5, use_weighting=True))
    loss = build_loss(methods.MixtureConfig(losses=parts, weights=(1.0, 1.0)))
    assert loss.statistics == (ON_POLICY,)
    assert loss.token_weights is not None


def test_without_ld_alpha_nothing_is_weighed() -> None:
    assert token_weights(None) is None


def test_supervised_terms_count_every_token_in_full() -> None:
    tokens = TokenLogps(torch.tensor([-1.0, -2.0, -4.0, -3.0]), torch.tensor([0, 0, 0, 1]), 2)
    policy = tokens.reduce(torch.tensor([1.0, 0.5, 0.5, 1.0]))
    reference = SequenceLogps(torch.tensor([-4.0, -3.0]), policy.num_tokens)
    assert policy.sum.tolist() == [-4.0, -3.0]

    plain = build_loss(methods.DPOConfig())(comparison(policy, reference)).loss
    supervised = build_loss(methods.DPOConfig(rpo_alpha=1.0))(comparison(policy, reference)).loss

    torch.testing.assert_close(supervised - plain, torch.tensor([7.0 / 3]))


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("ratios", [(-1e4, 1e4), (1e4, -1e4), (-1e4, -1e4)])
def test_divergences_stay_finite_and_keep_their_sign(kind: str, ratios: tuple[float, float]) -> None:
    policy = torch.tensor(ratios, requires_grad=True)
    tokens = torch.tensor([8192, 1])
    given = comparison(SequenceLogps(policy, tokens), SequenceLogps(torch.zeros(2), tokens))
    output = build_loss(methods.DPOConfig.model_validate({"f_divergence_type": kind}))(given)

    (gradient,) = torch.autograd.grad(output.loss.sum(), policy)

    assert output.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0] <= 0 <= gradient[1]


def test_alpha_divergence_has_an_alpha_of_a_half_unless_set() -> None:
    tokens = torch.tensor([2, 3])
    given = comparison(
        SequenceLogps(torch.tensor([-1.0, -4.0]), tokens), SequenceLogps(-torch.ones(2), tokens)
    )
    unset, half, other = (
        build_loss(methods.DPOConfig(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha))(
            given
        )
        for alpha in (None, 0.5, 0.6)
    )
    assert torch.equal(unset.loss, half.loss)
    assert not torch.equal(unset.loss, other.loss)


def test_the_exponential_turns_into_its_tangent() -> None:
    exponent = torch.tensor([-40.0, 0.5, 30.0, 1e4], requires_grad=True)
    value = expm1(exponent)
    (slope,) = torch.autograd.grad(value.sum(), exponent)

    torch.testing.assert_close(value[:3], torch.expm1(exponent[:3]).detach(), check_dtype=False)
    assert slope[3] > 1e13
    assert value.isfinite().all()
