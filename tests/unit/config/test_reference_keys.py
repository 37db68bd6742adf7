"""References that follow the policy, in TRL's words and in ours."""

from typing import Any

import pytest

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError

START = {"base_model": "base", "rl": "dpo", "datasets": [{"path": "pairs.jsonl"}], "learning_rate": 1e-6}


def run(**settings: Any) -> RunConfig:
    return validate_config(START | settings)


def test_both_ways_mean_the_same() -> None:
    trl = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 7}
    ours = {"schedule": "synced", "mixup_alpha": 0.3, "sync_steps": 7}
    assert run(trl=trl).reference == run(reference=ours).reference
    assert run(reference={"schedule": "synced", "mixup_alpha": 1}).reference.mixup_alpha == 1, "a copy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trl": {"ref_model_mixup_alpha": 0.3}}, "trl.ref_model_mixup_alpha: 0.3 — has no effect"),
        (
            {"reference": {"sync_steps": 3}},
            "sync_steps: 3 — has no effect without schedule: synced",
        ),
        ({"trl": {"sync_ref_model": "on"}}, "trl.sync_ref_model: on — must be true or false"),
        (
            {"trl": {"sync_ref_model": True}, "reference": {"schedule": "live"}},
            "contradicts reference.schedule: live",
        ),
        (
            {"trl": {"ref_model_sync_steps": 3}, "reference": {"schedule": "synced", "sync_steps": 4}},
            "means the same as reference.sync_steps",
        ),
        ({"reference": {"schedule": "synced", "mixup_alpha": 0}}, "reference.mixup_alpha: 0 — must be"),
        ({"reference": {"schedule": "synced", "sync_steps": 0}}, "reference.sync_steps: 0 — must be"),
        ({"rl": "orpo", "trl": {"sync_ref_model": True}}, "has no effect: rl: orpo has no reference"),
        ({"reference": {"source": "initial_policy", "schedule": "synced"}}, "gone after step 1"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(**settings)
    assert message in str(caught.value)
