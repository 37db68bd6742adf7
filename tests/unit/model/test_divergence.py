"""Token KL over chunks of the vocabulary against full logits, in value and gradient."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fiducial.data.batch import Layout
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.logps import KL
from fiducial.model import divergence, head
from fiducial.model.divergence import Distribution, token_kl
from fiducial.model.logit_rule import LogitRule
from fiducial.model.scoring import Scorer
from oracles import token_kl as naive_kl
from tiny import random_groups, tiny_model

SCORED, WIDTH, VOCAB = 11, 8, 37
WEIGHTS = torch.linspace(-1, 2, SCORED, dtype=torch.float64)
RULES = [LogitRule(), LogitRule(scale=0.4), LogitRule(softcap=3.0), LogitRule(1.7, 5.0)]


def tensors(*, bias: bool, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(SCORED, WIDTH), (VOCAB, WIDTH), (VOCAB,)][: 3 if bias else 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def full_logits(rule: LogitRule, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = hidden @ weight.T * rule.scale if bias is None else (hidden @ weight.T + bias) * rule.scale
    return logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)


def of(rule: LogitRule, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Distribution:
    return Distribution(hidden, weight, bias, rule)


def with_gradients(kl: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [kl.detach(), *torch.autograd.grad((kl * WEIGHTS).sum(), leaves)]


def assert_same(ours: list[Tensor], naive: list[Tensor]) -> None:
    for left, right in zip(ours, naive, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("chunk", [1, 10, 37, None])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_equals_full_logits(bias: bool, rule: LogitRule, chunk: int | None, frozen_head: bool) -> None:
    other, theirs = LogitRule(0.9, 4.0), tensors(bias=True, seed=1)
    given = tensors(bias=bias)
    leaves = [tensor.requires_grad_() for tensor in (given[:1] if frozen_head else given)]

    ours = with_gradients(token_kl(of(other, *theirs), of(rule, *given), chunk=chunk), leaves)

    naive = with_gradients(naive_kl(full_logits(other, *theirs), full_logits(rule, *given)), leaves)
    assert_same(ours, naive)
    assert (ours[0] > 0.1).all()


def test_reads_logits_that_are_there_in_one_piece() -> None:
    theirs, given = tensors(bias=False, seed=1), tensors(bias=False)
    logits = full_logits(LogitRule(), *given).requires_grad_()
    reference = full_logits(LogitRule(), *theirs)

    ours = with_gradients(token_kl(of(LogitRule(), *theirs), Distribution(logits, None), chunk=10), [logits])

    assert_same(ours, with_gradients(naive_kl(reference, logits), [logits]))
    whole = token_kl(Distribution(reference, None), Distribution(logits, None))
    torch.testing.assert_close(whole.detach(), ours[0])


def test_the_other_direction_would_show() -> None:
    theirs, given = tensors(bias=False, seed=1), tensors(bias=False)
    wrong = naive_kl(full_logits(LogitRule(), *given), full_logits(LogitRule(), *theirs))
    with pytest.raises(AssertionError):
        assert_same([token_kl(of(LogitRule(), *theirs), of(LogitRule(), *given))], [wrong])


def test_no_gradient_reaches_the_reference_and_itself_is_at_no_distance() -> None:
    given = [tensor.requires_grad_() for tensor in tensors(bias=True)]
    kl = token_kl(of(LogitRule(), *given), of(LogitRule(), *given))
    assert kl.abs().max() < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad((kl * WEIGHTS).sum(), given))


def test_a_gpus_logits_are_those_that_its_head_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (head, divergence):
        monkeypatch.setattr(module, "unrounded_product", lambda left, right: left.float() @ right.float())
    hidden, weight, _ = (tensor.bfloat16() for tensor in tensors(bias=True))
    targets = torch.arange(SCORED)
    whole = Distribution(hidden, weight).logits(0, VOCAB).log_softmax(1)
    torch.testing.assert_close(head.token_logps(hidden, weight, targets), whole[targets, targets])


def test_refuses_another_vocabulary() -> None:
    hidden, weight = tensors(bias=False)
    with pytest.raises(ModelError, match="30 outputs and the policy's 37"):
        token_kl(Distribution(hidden, weight[:30]), Distribution(hidden, weight))


def naive_of_models(policy: Any, reference: Any, groups: list[TokenizedGroup]) -> Tensor:
    """Each prompt + completion alone through both stock models."""
    values = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.tolist(), *completion.tolist()]])
            where = slice(len(group.prompt) - 1, -1)
            with torch.no_grad():
                theirs = reference(input_ids=ids).logits[0, where].double()
            values.append(naive_kl(theirs, policy(input_ids=ids).logits[0, where].double()))
    return torch.cat(values)


def adapted(target: list[str]) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        tiny_model(), LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    ).eval()


POLICIES: dict[str, Any] = {
    "trained": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "capped": lambda: tiny_model("gemma2"),
    "divided": lambda: tiny_model("granite", num_key_value_heads=2, logits_scaling=3.0),
    "biased": lambda: tiny_model("phi"),
    "adapter": lambda: adapted(["q_proj", "down_proj"]),
    "adapter on the head": lambda: adapted(["q_proj", "lm_head"]),
}


def of_models(policy: Any, reference: Any, layout: Layout) -> Tensor:
    groups = random_groups(3, seed=1)
    second, scorer = Scorer(reference, layout=layout), Scorer(policy, layout=layout)
    against = second.distribution(second.pack(groups))[1]
    return scorer(scorer.pack(groups), (), against).statistics[KL]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_each_sequence_alone(name: str, layout: Layout) -> None:
    policy, reference = POLICIES[name](), tiny_model(seed=1)
    leaves = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    weights: Tensor | None = None
    found = []
    for kl in (
        of_models(policy, reference, layout),
        naive_of_models(policy, reference, random_groups(3, seed=1)),
    ):
        weights = torch.linspace(-1, 2, len(kl)) if weights is None else weights
        gradients = torch.autograd.grad((kl * weights).sum(), leaves, allow_unused=True)
        found.append((kl.detach().float(), [torch.zeros(1) if g is None else g for g in gradients]))
    (ours, our_gradients), (naive, naive_gradients) = found
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in naive_gradients)
    assert largest > 1e-2
    for left, right in zip(our_gradients, naive_gradients, strict=True):
        assert (left - right).abs().max() <= 2e-5 * largest


def test_never_holds_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    logits = Distribution.logits

    def watched(self: Distribution, start: int, stop: int) -> Tensor:
        widths.append(stop - start)
        return logits(self, start, stop)

    monkeypatch.setattr(Distribution, "logits", watched)
    monkeypatch.setattr(divergence, "chunk_rows", lambda hidden: 64)
    of_models(tiny_model(), tiny_model(seed=1), "packed").sum().backward()
    assert max(widths) == 64
    assert sum(widths) == 320 * 4, "two heads, forward and backward"
