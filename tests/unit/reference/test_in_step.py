"""A reference that passes each layer in the policy's own call of it: two passes are the naive twin."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fiducial import compat
from fiducial.errors import ModelError
from fiducial.model.adapters import freeze_copy
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import decoder_layers
from fiducial.reference.one_pass import OnePass, beside_policy, in_one_pass
from fiducial.reference.sources import AdapterOff, FrozenAdapter
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)
MOVED = 0.1
TARGETS = {"gpt_neox": ["query_key_value", "dense_4h_to_h"]}
SOURCES: dict[str, Any] = {"off": AdapterOff, "copy": FrozenAdapter}


def policy_of(
    family: str = "llama", *, layout: Any = "packed", autocast: torch.dtype | None = None, **lora: Any
) -> Scorer:
    """Three layers with an adapter on all of them, and a frozen copy of it."""
    more = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    model = tiny_model(family, num_hidden_layers=3, **(more if family == "gemma2" else {}))
    targets = TARGETS.get(family, ["q_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": targets} | lora))).train()
    freeze_copy(adapted)
    return Scorer(adapted, layout=layout, autocast=autocast)


def in_step(policy: Scorer, reference: Any, *, depth: int = 0, tolerance: float = 0) -> OnePass:
    return in_one_pass(reference, policy, policy, depth, GROUPS, tolerance=tolerance, in_step=True)


def move(policy: Scorer) -> None:
    """What training does, all at once."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def scored(policy: Scorer, reference: Any) -> list[Tensor]:
    """Log-probs of policy and reference, and the gradient of every trained weight."""
    torch.manual_seed(0)
    policy.model.zero_grad()
    with beside_policy(reference, policy.pack(GROUPS)) as answer:
        values = policy(policy.pack(GROUPS)).values
    compared = answer().values
    assert not compared.requires_grad
    assert (values - compared).abs().max() > MOVED, "a reference that is the policy proves nothing"
    (values - compared).square().sum().backward()
    return [values, compared, *(each.grad for each in policy.model.parameters() if each.requires_grad)]


def assert_as_apart(policy: Scorer, joint: OnePass, tolerance: float = 0) -> None:
    move(policy)
    for ours, theirs in zip(scored(policy, joint), scored(policy, joint.reference), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_it_is_two_passes_to_the_bit(family: str, layout: Any) -> None:
    policy = policy_of(family, layout=layout)
    assert_as_apart(policy, in_step(policy, AdapterOff(policy)))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "lora",
    [{"lora_dropout": 0.3}, {"use_dora": True}, {"use_rslora": True, "init_lora_weights": "gaussian"}],
    ids=["dropout", "dora", "rslora"],
)
def test_the_reference_has_nothing_of_the_policys_adapter(lora: dict[str, Any], source: str) -> None:
    policy = policy_of(**lora)
    assert_as_apart(policy, in_step(policy, SOURCES[source](policy)))


def test_a_copy_of_an_adapter_with_dropout_has_none() -> None:
    policy = policy_of(init_lora_weights=False, lora_dropout=0.3)
    assert_as_apart(policy, in_step(policy, FrozenAdapter(policy)))
    modes = [module.training for module in policy.model.modules()]
    assert all(modes), "the policy is left in training mode"


@pytest.mark.parametrize("source", SOURCES)
def test_backward_recomputes_the_policy_alone(source: str) -> None:
    policy = policy_of(lora_dropout=0.3)
    compat.enable_gradient_checkpointing(policy.model, {"use_reentrant": False})
    joint = in_step(policy, SOURCES[source](policy), tolerance=1e-5)
    assert_as_apart(policy, joint, tolerance=1e-5)
    computed = count(policy, "mlp")
    scored(policy, joint)
    assert computed == dict.fromkeys(range(3), 3), "policy, reference, and the policy again"


def test_under_autocast() -> None:
    policy = policy_of(autocast=torch.bfloat16)
    assert_as_apart(policy, in_step(policy, AdapterOff(policy)))


def test_without_gradient_it_is_the_same() -> None:
    policy = policy_of()
    joint = in_step(policy, AdapterOff(policy))
    move(policy)
    expected = scored(policy, joint)
    with torch.no_grad(), beside_policy(joint, policy.pack(GROUPS)) as answer:
        values = policy(policy.pack(GROUPS)).values
    assert torch.equal(values, expected[0])
    assert torch.equal(answer().values, expected[1])


def count(policy: Scorer, part: str = "") -> Counter[int]:
    """How often each layer, or a `part` of it, is called from now on."""
    calls: Counter[int] = Counter()
    for number, layer in enumerate(decoder_layers(policy.model)):
        layer.get_submodule(part).register_forward_pre_hook(lambda *_, at=number: calls.update([at]))
    return calls


def test_each_layer_is_called_once_and_lower_ones_compute_once() -> None:
    policy = policy_of(layers_to_transform=[1, 2])
    joint = in_step(policy, AdapterOff(policy), depth=1)
    assert_as_apart(policy, joint)
    called, computed = count(policy), count(policy, "mlp")
    scored(policy, joint)
    assert called == {0: 1, 1: 1, 2: 1}, "FSDP2 gathers a layer's weights whenever it is called"
    assert computed == {0: 1, 1: 2, 2: 2}


def test_layers_that_answer_from_another_pass_are_not_called() -> None:
    policy = policy_of(layers_to_transform=[1, 2])
    joint = in_one_pass(AdapterOff(policy), policy, policy, 1, GROUPS, tolerance=0)
    called = count(policy)
    move(policy)
    scored(policy, joint)
    assert called == {0: 1, 1: 2, 2: 2}


class Unswitched(AdapterOff):
    """The negative control: the reference's layers keep the policy's adapter."""

    def switch(self, part: Any) -> Any:
        return super().switch(part) if part is self.scorer.model else nullcontext()


def test_an_adapter_left_on_is_found_where_it_changes_nothing_yet() -> None:
    policy = policy_of()
    with pytest.raises(ModelError, match="in one call: something that trains has a part"):
        in_step(policy, Unswitched(policy))
    wrong = OnePass(Unswitched(policy), policy, policy, 0, in_step=True)  # unmeasured
    move(policy)
    assert (step_of(policy, wrong) - step_of(policy, AdapterOff(policy))).abs().max() > MOVED


def step_of(policy: Scorer, reference: Any) -> Tensor:
    """The reference's log-probs beside a pass of the policy."""
    with beside_policy(reference, policy.pack(GROUPS)) as answer:
        policy(policy.pack(GROUPS))
    values: Tensor = answer().values
    return values


def test_another_adapter_than_the_references_is_found() -> None:
    policy = policy_of(init_lora_weights=False)

    class Other(FrozenAdapter):
        def switch(self, part: Any) -> Any:
            return FrozenAdapter(self.scorer).switch(part) if part is self.scorer.model else off.switch(part)

    off = AdapterOff(policy)
    with pytest.raises(ModelError, match="in one call: log-probs change by up to"):
        in_step(policy, Other(policy), tolerance=1e-3)


def test_an_adapter_below_the_layers_is_found() -> None:
    policy = policy_of(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match="something that trains has a part"):
        in_step(policy, AdapterOff(policy))


@pytest.mark.parametrize("more", [{"cached": {}}, {"states": []}], ids=str)
def test_layers_that_hand_on_more_than_hidden_states_are_found(more: dict[str, Any]) -> None:
    policy = policy_of(layout="padded")
    decoder_layers(policy.model)[0].register_forward_pre_hook(
        lambda module, inputs, named: (inputs, named | more), with_kwargs=True
    )
    with pytest.raises(ModelError, match="layers hand each other more than hidden states"):
        in_step(policy, AdapterOff(policy))
