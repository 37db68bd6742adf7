import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fiducial.config.schema import AdapterConfig
from fiducial.data.batch import PackedBatch
from fiducial.errors import DataError, ModelError, PlanError, TrainingError
from fiducial.logps import TokenLogps
from fiducial.model.adapters import freeze_copy, new_adapter
from fiducial.model.loader import unfreeze
from fiducial.model.scoring import Scorer
from fiducial.reference import everywhere
from fiducial.reference.cache import LogpStore
from fiducial.reference.everywhere import require_same_everywhere
from fiducial.reference.identity import Identity
from fiducial.reference.noise import ALLOWANCE, measure_noise, same_arithmetic
from fiducial.reference.sources import (
    AdapterOff,
    FrozenAdapter,
    InitialPolicy,
    Precomputed,
    Reference,
    SeparateModel,
)
from fiducial.reference.verify import (
    check_unmoved,
    probe_adapter,
    prove_reference,
    require_adapter_off,
    require_steady,
)
from tiny import random_groups, tiny_model

GROUPS = random_groups(4)


def padded(model: PreTrainedModel | PeftModel, autocast: torch.dtype | None = None) -> Scorer:
    return Scorer(model, layout="padded", autocast=autocast)  # type: ignore[arg-type]  # called like its base


def adapted(family: str = "llama", **options: object) -> Scorer:
    cfg = AdapterConfig.model_validate({"kind": "lora", "r": 4, **options})
    return padded(new_adapter(tiny_model(family), cfg, float32=True))


def nudge(model: torch.nn.Module, name: str = "") -> None:
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            if name in at and parameter.requires_grad:
                parameter.add_(0.05)


@dataclass
class DropoutLeftOn:
    """A reference scored the careless way."""

    scorer: Scorer

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        self.scorer.model.train()
        with torch.no_grad():
            return self.scorer(batch)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_an_equal_copy_is_proved(held: torch.dtype) -> None:
    policy, second = padded(tiny_model().to(held)), padded(tiny_model().to(held))
    proof = prove_reference(policy, SeparateModel(second), GROUPS, expected_equal=True)
    assert proof.max_difference == 0
    assert proof.num_tokens == sum(len(part) for group in GROUPS for part in group.completions)
    assert proof.noise.dtype == held
    assert proof.noise.nats <= proof.tolerance


def test_the_step_0_distribution_is_that_of_the_log_ratios() -> None:
    policy, reference = other_weights()
    proof = prove_reference(policy, reference, GROUPS, expected_equal=False)
    batch = policy.pack(GROUPS)
    tokens = [
        each.token_logps(batch).values.double()  # type: ignore[union-attr]  # there is a reference
        for each in (InitialPolicy(policy), reference)
    ]
    ratios = tokens[0] - tokens[1]
    sums = [ratios[batch.sequence == number].sum().item() for number in range(batch.num_sequences)]
    per_token, per_sequence = proof.log_ratios.per_token, proof.log_ratios.per_sequence
    assert per_token["min"] == pytest.approx(ratios.min().item(), abs=1e-6)
    assert per_token["median"] == pytest.approx(ratios.quantile(0.5).item(), abs=1e-6)
    assert per_sequence["max"] == pytest.approx(max(sums), abs=1e-5)
    assert per_sequence["median"] == pytest.approx(statistics.median(sums), abs=1e-5)
    assert proof.num_sequences == len(sums)
    assert max(abs(per_token["min"]), per_token["max"]) == pytest.approx(proof.max_difference, abs=1e-6)


@dataclass
class Off:
    """A reference that answers by `nats` more on one token."""

    policy: Scorer
    nats: float

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        logps = InitialPolicy(self.policy).token_logps(batch)
        logps.values[3] += self.nats
        return logps


@pytest.mark.parametrize(("held", "nats"), [(torch.float32, 5e-5), (torch.bfloat16, 1e-2)])
def test_the_measured_noise_decides_what_is_equal(held: torch.dtype, nats: float) -> None:
    policy = padded(tiny_model().to(held))
    proof = prove_reference(policy, Off(policy, 0.0), GROUPS, expected_equal=True, pass_tokens=4096)
    assert 0 < proof.tolerance < nats / 2
    with pytest.raises(TrainingError, match="differ by up to"):
        prove_reference(policy, Off(policy, nats), GROUPS, expected_equal=True)
    # What was seen to round more elsewhere may differ more here.
    prove_reference(policy, Off(policy, nats), GROUPS, expected_equal=True, known_noise=nats)


def test_the_noise_is_that_of_other_batch_shapes() -> None:
    policy = padded(tiny_model())

    class DependsOnShape(Scorer):
        def __call__(self, batch: PackedBatch, *args: object, **kwargs: object) -> TokenLogps:
            logps = super().__call__(batch)
            logps.values.add_(1e-6 * batch.num_sequences)
            return logps

    shaped = DependsOnShape(policy.model, layout="padded")
    batch = shaped.pack(GROUPS)
    _, few = measure_noise(shaped, GROUPS, batch)
    _, many = measure_noise(shaped, GROUPS, batch, pass_tokens=6 * batch.input_ids.numel())
    assert few.nats == pytest.approx(6e-6, abs=3e-6)  # 8 sequences against 2
    assert many.nats == pytest.approx(40e-6, abs=3e-6)  # 8 sequences against 48
    assert many.tolerance(same_arithmetic=True) == pytest.approx(4 * many.nats)
    proof = prove_reference(
        shaped, InitialPolicy(shaped), GROUPS, expected_equal=True, pass_tokens=6 * batch.input_ids.numel()
    )
    assert proof.noise == many


def test_the_noise_is_that_of_the_products_precision() -> None:
    policy = padded(tiny_model(), torch.bfloat16)
    _, noise = measure_noise(policy, GROUPS, policy.pack(GROUPS))
    assert noise.dtype == torch.bfloat16


def test_another_way_of_computing_the_same_is_allowed_its_own_rounding(tmp_path: Path) -> None:
    plain, dora, orthogonal = adapted(), adapted(use_dora=True), adapted(init_lora_weights="orthogonal")
    assert same_arithmetic(plain, AdapterOff(plain))
    assert not same_arithmetic(dora, AdapterOff(dora))
    assert not same_arithmetic(orthogonal, AdapterOff(orthogonal))
    assert same_arithmetic(plain, FrozenAdapter(plain))
    assert not same_arithmetic(plain, SeparateModel(padded(tiny_model())))
    assert same_arithmetic(padded(tiny_model()), SeparateModel(padded(tiny_model())))
    packed = Scorer(tiny_model(), layout="packed")
    assert not same_arithmetic(padded(tiny_model()), SeparateModel(packed))
    store = LogpStore(tmp_path, Identity("base", "0", "float32", "None"))
    for alike in (True, False):
        assert same_arithmetic(plain, Precomputed(store, same_arithmetic=alike)) is alike
    tolerances = [
        prove_reference(each, AdapterOff(each), GROUPS, expected_equal=True).tolerance
        for each in (plain, dora)
    ]
    assert tolerances[0] < ALLOWANCE[torch.float32] <= tolerances[1]


def other_weights() -> tuple[Scorer, Reference]:
    return padded(tiny_model()), SeparateModel(padded(tiny_model(seed=1)))


def other_dtype() -> tuple[Scorer, Reference]:
    return padded(tiny_model()), SeparateModel(padded(tiny_model().bfloat16()))


def rows_drawn_twice() -> tuple[Scorer, Reference]:
    torch.manual_seed(0)
    models = [tiny_model() for _ in range(2)]
    for model in models:
        model.resize_token_embeddings(340, mean_resizing=False)
    return padded(models[0]), SeparateModel(padded(models[1]))


def more_rows() -> tuple[Scorer, Reference]:
    model = tiny_model()
    model.resize_token_embeddings(340)
    return padded(model), SeparateModel(padded(tiny_model()))


def one_layer_less() -> tuple[Scorer, Reference]:
    return padded(tiny_model(num_hidden_layers=1)), SeparateModel(padded(tiny_model()))


def other_config() -> tuple[Scorer, Reference]:
    return padded(tiny_model()), SeparateModel(padded(tiny_model(rms_norm_eps=0.5)))


def pissa_off() -> tuple[Scorer, Reference]:
    policy = adapted(init_lora_weights="pissa")
    return policy, AdapterOff(policy)


def random_adapter_beside_bare_base() -> tuple[Scorer, Reference]:
    return adapted(init_lora_weights=False), SeparateModel(padded(tiny_model()))


def dropout() -> tuple[Scorer, Reference]:
    policy = adapted(init_lora_weights=False, dropout=0.5)
    return policy, DropoutLeftOn(policy)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (other_weights, r"embed_tokens\.weight differs, in 320 of 320 rows"),
        (other_dtype, r"torch\.float32 in the policy, torch\.bfloat16 in the reference"),
        (rows_drawn_twice, r"rows from row 320: new token rows"),
        (more_rows, r"is 340 × 32 in the policy and 320 × 32 in the reference"),
        (one_layer_less, r"layers\.1.* the policy has not"),
        (other_config, r"a config field differs"),
        (pissa_off, r"does not give the starting policy \(PiSSA"),
        (random_adapter_beside_bare_base, r"the policy's adapter makes the difference"),
        (dropout, r"dropout is on"),
    ],
)
def test_another_reference_is_caught_with_its_reason(
    case: Callable[[], tuple[Scorer, Reference]], reason: str
) -> None:
    policy, reference = case()
    with pytest.raises(TrainingError, match=reason):
        prove_reference(policy, reference, GROUPS, expected_equal=True)


def test_a_policy_that_samples_in_training_is_refused() -> None:
    steady, model = adapted(dropout=0.5), tiny_model("phimoe", num_key_value_heads=2).eval()
    state = torch.get_rng_state()
    require_steady(steady, GROUPS)
    with pytest.raises(ModelError, match="PhimoeForCausalLM draws random numbers in training"):
        require_steady(padded(model), GROUPS)
    assert not any(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_number_that_is_drawn_for_nothing_is_no_noise() -> None:
    policy = adapted()
    policy.model.register_forward_pre_hook(lambda *_: torch.rand(1) and None)
    require_steady(policy, GROUPS)


def test_a_different_checkpoint_on_purpose_is_only_measured() -> None:
    policy, reference = other_weights()
    assert prove_reference(policy, reference, GROUPS, expected_equal=False).max_difference > 0.1


def test_log_probs_must_be_finite_even_then() -> None:
    policy, reference = other_weights()
    torch.nn.init.constant_(policy.model.lm_head.weight, torch.nan)
    with pytest.raises(TrainingError, match="policy's log-probs are not finite"):
        prove_reference(policy, reference, GROUPS, expected_equal=False)


def test_not_one_log_prob_may_be_other_than_a_number() -> None:
    policy = padded(tiny_model())
    reference = Off(policy, 0.0)
    proof = prove_reference(policy, reference, GROUPS, expected_equal=True)
    reference.nats = torch.nan
    with pytest.raises(TrainingError, match="reference's log-probs are not finite"):
        prove_reference(policy, reference, GROUPS, expected_equal=False)
    with pytest.raises(TrainingError, match="has moved"):
        check_unmoved(proof, policy, reference, GROUPS)


def test_proving_changes_nothing() -> None:
    policy = adapted(dropout=0.5)
    policy.model.train()
    before = [parameter.detach().clone() for parameter in policy.model.parameters()]
    prove_reference(policy, AdapterOff(policy), GROUPS, expected_equal=True)
    assert all(module.training for module in policy.model.modules())
    assert all(map(torch.equal, before, policy.model.parameters()))


def test_a_reference_that_stays_is_unmoved_and_one_that_moves_is_caught() -> None:
    policy = padded(tiny_model())
    for model, moves in ((tiny_model(), False), (policy.model, True)):
        reference = SeparateModel(padded(model))
        proof = prove_reference(policy, reference, GROUPS, expected_equal=not moves)
        nudge(policy.model, "layers.0")
        if moves:
            with pytest.raises(TrainingError, match="has moved"):
                check_unmoved(proof, policy, reference, GROUPS)
        else:
            assert check_unmoved(proof, policy, reference, GROUPS) == 0


def test_another_policy_that_stays_is_unmoved() -> None:
    policy, reference = other_weights()
    proof = prove_reference(policy, reference, GROUPS, expected_equal=False)
    nudge(policy.model)
    assert check_unmoved(proof, policy, reference, GROUPS) == 0


def test_the_frozen_adapter_is_proved_and_unmoved() -> None:
    policy = adapted(init_lora_weights="pissa")
    freeze_copy(policy.model)  # type: ignore[arg-type]  # a PeftModel
    proof = prove_reference(policy, FrozenAdapter(policy), GROUPS, expected_equal=True)
    nudge(policy.model)
    assert check_unmoved(proof, policy, FrozenAdapter(policy), GROUPS) == 0
    with pytest.raises(TrainingError, match="has moved"):
        check_unmoved(proof, policy, InitialPolicy(policy), GROUPS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"dropout": 0.3},
        {"modules_to_save": ("lm_head", "embed_tokens", "norm")},
        {"trainable_token_indices": (1, 2, 40)},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_the_probe_passes_adapters_that_may_be_switched_off(options: dict[str, object]) -> None:
    scorer = adapted(**options)
    scorer.model.train()
    before = {name: value.detach().clone() for name, value in scorer.model.named_parameters()}
    probe = require_adapter_off(scorer, GROUPS)
    assert probe.off_movement == 0
    for name, value in scorer.model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert scorer.model.training


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", False])
def test_the_probe_stops_adapters_that_start_elsewhere(init: str | bool) -> None:
    scorer = adapted(init_lora_weights=init)
    probe = probe_adapter(scorer, GROUPS)
    assert probe.on_off_difference > 0.1
    assert probe.off_unmoved
    with pytest.raises(PlanError, match="does not start as the identity"):
        require_adapter_off(scorer, GROUPS)


@pytest.mark.parametrize("bias", ["all", "lora_only", "hand"])
def test_the_probe_stops_what_trains_outside_the_adapter(bias: str) -> None:
    if bias == "hand":
        scorer = adapted()
        unfreeze(scorer.model, (r"model\.norm\.",), torch.float32)
    else:
        scorer = adapted("qwen2", bias=bias)
    probe = probe_adapter(scorer, GROUPS)
    assert probe.on_equals_off
    assert probe.off_movement > 0.01
    with pytest.raises(PlanError, match=r"would move with the policy: .*(bias|norm)"):
        require_adapter_off(scorer, GROUPS)


def test_the_probe_stops_what_trains_where_no_token_of_the_sample_goes() -> None:
    scorer = adapted()
    scorer.model.get_base_model().expert = torch.nn.Linear(2, 2)  # type: ignore[operator]  # a PeftModel
    assert probe_adapter(scorer, GROUPS).off_movement == 0
    with pytest.raises(PlanError, match=r"would move with the policy: .*expert"):
        require_adapter_off(scorer, GROUPS)


def test_the_probe_stops_an_adapter_that_off_does_not_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterOff, "switch", lambda self, part: nullcontext())
    scorer = adapted()
    assert probe_adapter(scorer, GROUPS).on_equals_off
    with pytest.raises(PlanError, match="would move with the policy"):
        require_adapter_off(scorer, GROUPS)


def test_processes_that_read_other_rows_or_hear_no_number_are_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = padded(tiny_model())
    proof = prove_reference(policy, InitialPolicy(policy), GROUPS, expected_equal=True)
    require_same_everywhere(proof, GROUPS)
    keys = [key for group in GROUPS for key in group.keys]
    for said, error in (
        ((keys[::-1], proof.reference_logps.tolist()), DataError),
        ((keys, [torch.nan] * proof.num_tokens), ModelError),
    ):
        monkeypatch.setattr(everywhere, "from_first", lambda make, said=said: said)
        with pytest.raises(error, match=r"first process"):
            require_same_everywhere(proof, GROUPS)
