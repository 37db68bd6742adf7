"""What holds for every method: YAML reaches it, and it takes its own hyperparameters alone, in range."""

import re
from typing import Any

import pytest

from fiducial.config import dialect
from fiducial.config.load import validate_config
from fiducial.config.method_keys import HYPERPARAMETERS
from fiducial.config.method_names import ELSEWHERE, FAMILIES, RL
from fiducial.config.methods import METHODS, AlphaPOConfig, MethodConfig
from fiducial.errors import ConfigError
from fiducial.loss_table import yaml_key
from fiducial.losses import LOSSES
from fiducial.reference.kinds import Source
from fiducial.reference.plan import plan_reference
from planning import facts_of

VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "rl_beta": ([0.001, 3], [-0.1, "much", float("inf"), float("nan"), True]),
    "dpo_label_smoothing": ([0.01, 0.49], [-0.1, 0.5, 1, float("nan")]),
    "ld_alpha": ([0, 0.5, 1], [-0.1, 1.1]),
    "rpo_alpha": ([0.1, 2], [-0.1]),
    "f_divergence_type": (["reverse_kl", "forward_kl", "js_divergence"], ["kl", 1]),
    "f_alpha_divergence_coef": ([0.01, 0.99], [0, 1, -1]),
    "dpo_use_weighting": ([False, True], ["perhaps"]),
    "discopop_tau": ([0.01, 2], [0, -1]),
    "bco_running_delta": ([False, True], ["perhaps"]),
    "dpop_lambda": ([0, 50], [-1]),
    "r_dpo_alpha": ([0, 0.1], [-0.1]),
    "beta_dpo_alpha": ([0, 2], [-0.1]),
    "beta_dpo_momentum": ([0, 0.99], [-0.1, 1]),
    "beta_dpo_rho": ([0.01, 1], [0, 1.1]),
    "odpo_alpha": ([0, 2], [-0.1]),
    "odpo_offset": (["log", "identity"], ["square"]),
    "tdpo_alpha": ([0, 2], [-0.1]),
    "nca_alpha": ([0.0001, 2], [0, -1]),
    "tpo_alpha": ([0, 2], [-0.1]),
    "tpo_gamma": ([0, 10], [-0.1]),
    "simpo_gamma": ([0, 2], [-0.1]),
    "alphapo_alpha": ([-1, 0, 0.25], ["much", float("nan")]),
    "cpo_alpha": ([0, 2], [-0.1]),
    "kto_desirable_weight": ([0, 2], [-0.1]),
    "kto_undesirable_weight": ([0, 2], [-0.1]),
}
"""By key: values that must be accepted, values that must be refused."""
MAY_BE_CONSTANT = {"dpo", "kto", "apo_zero_unpaired"}
"""A beta of 0 can be planned with these; nowhere else."""
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def name(method: type[MethodConfig]) -> str:
    return str(method.model_fields["name"].default)


def written(method: type[MethodConfig], **more: Any) -> dict[str, Any]:
    """A run with the method written as `fiducial losses` says, and data that have what it reads."""
    keys = dict(part.split(": ") for part in method.written().split(", "))
    data = {"path": "rows.jsonl"}
    if method.needs_scores and method.num_completions == 2:
        data |= {"field_chosen_score": "up", "field_rejected_score": "down"}
    return {"base_model": "base", "datasets": [data], **keys, **more}


def extra(key: str) -> dict[str, str]:
    """What `key` has no effect without."""
    return {"f_divergence_type": "alpha_divergence"} if key == "f_alpha_divergence_coef" else {}


@each_method
def test_it_is_written_as_the_table_says(method: type[MethodConfig]) -> None:
    assert type(validate_config(written(method)).method) is method


@each_method
@pytest.mark.parametrize("key", VALUES)
def test_a_key_is_checked_where_it_has_effect_and_refused_elsewhere(
    method: type[MethodConfig], key: str
) -> None:
    accepted, refused = VALUES[key]
    if not any(yaml_key(field) == key for field in method.model_fields if field != "name"):
        with pytest.raises(ConfigError, match=rf"{key}: .*(has no effect|is not defined)"):
            validate_config(written(method, **{key: accepted[-1]}))
        return
    field = HYPERPARAMETERS.get(key, "beta")
    for value in accepted:
        found = validate_config(written(method, **extra(key), **{key: value})).method
        assert getattr(found, field) == value
    for value in refused:
        with pytest.raises(ConfigError, match=rf"{key}: "):
            validate_config(written(method, **extra(key), **{key: value}))


@each_method
def test_a_beta_of_zero_is_a_plan_at_most(method: type[MethodConfig]) -> None:
    if "beta" not in method.model_fields:
        return
    if name(method) in MAY_BE_CONSTANT:
        assert validate_config(written(method, rl_beta=0)).method is not None
        return
    with pytest.raises(ConfigError, match="rl_beta: "):
        validate_config(written(method, rl_beta=0))


def test_exo_needs_some_smoothing() -> None:
    with pytest.raises(ConfigError, match="dpo_label_smoothing: "):
        validate_config(
            {"base_model": "base", "rl": "dpo", "dpo_loss_type": "exo_pair", "dpo_label_smoothing": 0}
        )


def test_names_of_papers_lead_to_keys_that_exist() -> None:
    known = dialect.SUPPORTED | {loss_type for losses in FAMILIES.values() for loss_type in losses}
    for paper, instead in ELSEWHERE.items():
        assert paper not in RL
        assert set(re.findall(r"\w+_\w+", instead)) <= known, paper
        assert set(re.findall(r"rl: (\w+)", instead)) <= RL.keys()


@pytest.mark.parametrize(
    ("family", "loss", "message"),
    [
        ("cpo", "simpo", "write rl: simpo$"),
        ("dpo", "orpo", "write rl: orpo$"),
        ("dpo", "kto_pair", "write rl: kto, which"),
        ("cpo", "robust", "write rl: dpo and dpo_loss_type: robust$"),
        ("dpo", "dpo", "must be one of sigmoid, .* or a list of them$"),
        ("cpo", 3, "must be one of sigmoid, .*alphapo$"),
    ],
)
def test_a_loss_of_another_family_leads_to_its_own(family: str, loss: Any, message: str) -> None:
    """TRL's CPOConfig calls SimPO a loss type, and LLaMA-Factory's pref_loss calls ORPO one."""
    with pytest.raises(ConfigError, match=rf"{family}_loss_type: {loss} — {message}"):
        validate_config({"base_model": "base", "rl": family, f"{family}_loss_type": loss})


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("KTO", "rl: kto"),
        ("info-nca", "rl: info_nca"),
        ("beta-dpo", "rl: dpo and dpo_loss_type: beta_dpo"),
        ("cpo_hinge", "rl: cpo and cpo_loss_type: hinge"),
        ("apo_zero_unpaired", "rl: kto and kto_loss_type: apo_zero_unpaired"),
        ("TPO-L", "rl: tpo and tpo_loss_type: tpo-l"),
        ("kto_pair", "rl: kto, which takes pairs apart"),
    ],
)
def test_a_method_written_otherwise_leads_to_how_it_is_written(name: str, written: str) -> None:
    with pytest.raises(ConfigError, match=f"rl: {name} — write {written}$"):
        validate_config({"base_model": "base", "rl": name})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid", "odpo"]}, "odpo reads scores"),
        ({"rl": "dpo", "dpo_loss_type": ["tdpo2", "sigmoid"]}, "tdpo2 reads whole distributions"),
        ({"rl": "kto", "kto_loss_type": ["kto", "apo_zero_unpaired"]}, "takes one loss"),
    ],
)
def test_losses_that_do_not_add_up_are_told_once(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        validate_config({"base_model": "base", **settings})
    assert str(caught.value).count("loss_type") == 1


def test_every_hyperparameter_is_tried() -> None:
    assert set(VALUES) == {"rl_beta", *HYPERPARAMETERS}
    assert set(LOSSES) == set(METHODS)


@each_method
def test_the_plan_has_a_reference_exactly_where_the_loss_reads_one(method: type[MethodConfig]) -> None:
    cfg = validate_config(written(method))
    assert (plan_reference(cfg, facts_of(cfg)).source is Source.NONE) is not method.needs_reference
    other = {"source": "none"} if method.needs_reference else {"source": "separate_model"}
    with pytest.raises(ConfigError, match=r"reference\.source: "):
        validate_config(written(method, reference=other))


def test_alphapo_asks_by_default_for_the_margin_of_its_paper() -> None:
    """Its table gives the margin as a share of beta, and ours is the margin itself."""
    method = validate_config({"base_model": "base", "rl": "cpo", "cpo_loss_type": "alphapo"}).method
    assert isinstance(method, AlphaPOConfig)
    assert method.gamma / method.beta == pytest.approx(0.1)
