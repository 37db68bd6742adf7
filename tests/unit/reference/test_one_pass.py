"""A reference on the layers it shares with the policy: two passes are the naive twin, to the last bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fiducial import compat
from fiducial.errors import ModelError
from fiducial.model.adapters import freeze_copy
from fiducial.model.held_once import share_frozen_weights
from fiducial.model.loader import unfreeze
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import decoder_layers
from fiducial.reference.cache import LogpStore
from fiducial.reference.identity import Identity
from fiducial.reference.kept import Kept
from fiducial.reference.one_pass import BesidePolicy, OnePass, beside_policy, in_one_pass
from fiducial.reference.sources import AdapterOff, FrozenAdapter, SeparateModel
from fiducial.training.step_clock import TimedReference
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)
DEPTH = 2
MOVED = 0.1
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_neox")


def policy_of(family: str = "llama", *, layout: Any = "packed", **options: Any) -> Scorer:
    """Four layers, of which the upper two train."""
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma2" else {}
    model = tiny_model(family, num_hidden_layers=4, **more)
    unfreeze(model, (r".*layers\.[23]\.",), torch.float32)
    return Scorer(model.train(), layout=layout, **options)


def second_of(policy: Scorer) -> Scorer:
    model = copy.deepcopy(policy.model).requires_grad_(False).eval()
    return Scorer(model, layout=policy.layout, autocast=policy.autocast)


def move(policy: Scorer) -> None:
    """What training does, all at once."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def joined(policy: Scorer, reference: Any, scorer: Scorer, groups: Any = GROUPS) -> OnePass:
    return in_one_pass(reference, scorer, policy, DEPTH, groups, tolerance=0)


def together(policy: Scorer, reference: Any) -> list[Tensor]:
    """Log-probs of policy and reference, and the gradient of every trained weight."""
    policy.model.zero_grad()
    batch = policy.pack(GROUPS)
    with beside_policy(reference, batch) as answer:
        values = policy(batch).values
    compared = answer().values
    assert not compared.requires_grad
    (values - compared).square().sum().backward()
    return [values, compared, *(each.grad for each in policy.model.parameters() if each.requires_grad)]


def assert_as_apart(policy: Scorer, joint: OnePass) -> None:
    for ours, theirs in zip(together(policy, joint), together(policy, joint.reference), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_model_goes_on_from_the_policys_own_layers(family: str, layout: Any) -> None:
    policy = policy_of(family, layout=layout)
    second = second_of(policy)
    joint = joined(policy, SeparateModel(second), second)
    move(policy)
    assert_as_apart(policy, joint)
    values, compared = together(policy, joint)[:2]
    assert (values - compared).abs().max() > MOVED, "a reference that is the policy proves nothing"


@pytest.mark.parametrize("setting", ["autocast", "checkpointing"])
def test_it_holds_under(setting: str) -> None:
    policy = policy_of(autocast=torch.bfloat16 if setting == "autocast" else None)
    second = second_of(policy)
    if setting == "checkpointing":
        compat.enable_gradient_checkpointing(policy.model, {"use_reentrant": False})
    joint = in_one_pass(SeparateModel(second), second, policy, DEPTH, GROUPS, tolerance=1e-5)
    move(policy)
    ours, theirs = together(policy, joint), together(policy, joint.reference)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_reentrant_checkpoints_are_told_by_their_gradients() -> None:
    policy = policy_of()
    second = second_of(policy)
    compat.enable_gradient_checkpointing(policy.model, {"use_reentrant": True})
    with pytest.raises(ModelError, match="something that trains"):
        joined(policy, SeparateModel(second), second)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_on_upper_layers_alone(dropout: float) -> None:
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[2, 3],
        init_lora_weights=False,
        lora_dropout=dropout,
    )
    policy = Scorer(get_peft_model(tiny_model(num_hidden_layers=4), lora).train(), layout="packed")
    freeze_copy(policy.model)
    sources = {"off": AdapterOff(policy), "copy": FrozenAdapter(policy)}
    joints = {name: joined(policy, source, policy) for name, source in sources.items()}
    move(policy)
    for joint in joints.values():
        torch.manual_seed(0)
        ours = together(policy, joint)
        torch.manual_seed(0)
        theirs = together(policy, joint.reference)
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_shared_layers_compute_once() -> None:
    policy = policy_of()
    second = second_of(policy)
    joint = joined(policy, SeparateModel(second), second)
    counted: list[str] = []
    for name, model in {"policy": policy.model, "reference": second.model}.items():
        for number, layer in enumerate(decoder_layers(model)):
            layer.mlp.register_forward_hook(lambda *_, at=f"{name} {number}": counted.append(at))
    together(policy, joint)
    assert sorted(counted) == [*(f"policy {n}" for n in range(4)), "reference 2", "reference 3"]
    counted.clear()
    joint.token_logps(policy.pack(GROUPS))
    assert len(counted) == 4, "asked alone, it passes all of its layers"


def test_a_layer_that_trains_is_no_part_of_the_trunk() -> None:
    policy = policy_of()
    second = second_of(policy)
    source = SeparateModel(second)
    with pytest.raises(ModelError, match="lowest 3 layers: something that trains has a part in them"):
        in_one_pass(source, second, policy, 3, GROUPS, tolerance=1.0)
    wrong = OnePass(source, second, policy, 3)  # unmeasured
    move(policy)
    ours, theirs = together(policy, wrong)[1], together(policy, source)[1]
    assert (ours - theirs).abs().max() > MOVED, "were it taken, the reference would move with the policy"


def test_what_trains_below_the_layers_is_seen() -> None:
    policy = policy_of()
    policy.model.get_input_embeddings().weight.requires_grad_(True)
    second = second_of(policy)
    with pytest.raises(ModelError, match="something that trains"):
        joined(policy, SeparateModel(second), second)


def test_other_lower_layers_are_another_reference() -> None:
    policy = policy_of()
    second = second_of(policy)
    with torch.no_grad():
        decoder_layers(second.model)[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ModelError, match="log-probs change by up to"):
        joined(policy, SeparateModel(second), second)


def test_what_cannot_be_laid_side_by_side() -> None:
    policy = policy_of()
    padded = Scorer(second_of(policy).model, layout="padded")
    with pytest.raises(ModelError, match="packed for one and padded for the other"):
        joined(policy, SeparateModel(padded), padded)
    second = second_of(policy)
    with pytest.raises(ModelError, match="not so many"):
        in_one_pass(SeparateModel(second), second, policy, 5, GROUPS, tolerance=0)


def test_the_clock_and_the_cache_let_it_through(tmp_path: Path) -> None:
    policy = policy_of()
    second = second_of(policy)
    joint = joined(policy, SeparateModel(second), second)
    expected = joint.token_logps(policy.pack(GROUPS)).values
    counted: list[int] = []
    decoder_layers(second.model)[0].mlp.register_forward_hook(lambda *_: counted.append(1))
    kept = Kept(joint, policy, LogpStore(tmp_path, Identity("base", "0", "float32", "None")), tell=print)
    timed = TimedReference(kept, torch.device("cpu"))
    assert isinstance(timed, BesidePolicy)
    for _ in range(2):
        with beside_policy(timed, policy.pack(GROUPS)) as answer:
            policy(policy.pack(GROUPS))
        assert torch.equal(answer().values, expected)
    assert counted == [], "the second model's lowest layer had nothing to compute"
    assert kept.scored == 2 * len(GROUPS), "scored once, read the second time"
    assert timed.seconds > 0
    with beside_policy(timed, policy.pack([*GROUPS, *random_groups(1, seed=9)])) as answer:
        policy(policy.pack(GROUPS))
    assert answer() is not None
    assert counted == [1], "only what has no record is scored, in a pass of its own"


def test_processes_share_the_policys_pass_or_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of()
    second = second_of(policy)
    joint = joined(policy, SeparateModel(second), second)
    kept = Kept(joint, policy, LogpStore(tmp_path, Identity("base", "0", "float32", "None")), tell=print)
    counted: list[int] = []
    decoder_layers(second.model)[0].mlp.register_forward_hook(lambda *_: counted.append(1))
    monkeypatch.setattr("fiducial.reference.kept.any_process", lambda here, device: True)
    with beside_policy(kept, policy.pack(GROUPS)) as answer:
        policy(policy.pack(GROUPS))
    answer()
    assert counted == [1], "another process has records of some of its rows, and makes a pass for the others"
    kept.token_logps(policy.pack(GROUPS))
    assert counted == [1, 1], "another process lacks some, and a sharded model needs this one in its pass"


def test_a_reference_with_its_own_pass_makes_it_first() -> None:
    policy = policy_of()
    order: list[str] = []

    class Told(SeparateModel):
        def token_logps(self, batch: Any) -> Any:
            order.append("reference")
            return SeparateModel(self.scorer).token_logps(batch)

    with beside_policy(Told(second_of(policy)), policy.pack(GROUPS)) as answer:
        order.append("policy")
    answer()
    assert order == ["reference", "policy"]


def test_frozen_weights_are_held_once_and_trained_ones_apart() -> None:
    policy = policy_of()
    second = second_of(policy)
    with torch.no_grad():
        decoder_layers(second.model)[0].mlp.up_proj.weight[0, 0] += 1  # not equal, so not shared
    frozen = [parameter for parameter in policy.model.parameters() if not parameter.requires_grad]
    freed = share_frozen_weights(policy.model, second.model)
    different = decoder_layers(policy.model)[0].mlp.up_proj.weight
    assert freed == 4 * (sum(each.numel() for each in frozen) - different.numel())
    ours, theirs = dict(policy.model.named_parameters()), dict(second.model.named_parameters())
    shared = {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert shared == {n for n, each in ours.items() if not each.requires_grad and each is not different}
