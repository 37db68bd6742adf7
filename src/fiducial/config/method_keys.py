"""Keys of the preference method: which loss, and its hyperparameters.

A key belongs to every loss that has its field. In a weighted sum it goes to each part that has it; where no
part has, it is an error, because it would have no effect.
"""

from typing import Any

from fiducial.config.document import dotted
from fiducial.config.method_names import FAMILIES, RL, unknown_loss, unknown_method
from fiducial.config.methods import MethodConfig
from fiducial.config.outcomes import Deciding, Key, Note, Outcomes, Put, Refuse, Settings, as_path

HYPERPARAMETERS = {
    "dpo_label_smoothing": "label_smoothing",
    "ld_alpha": "ld_alpha",
    "rpo_alpha": "rpo_alpha",
    "f_divergence_type": "f_divergence_type",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "discopop_tau": "tau",
    "bco_running_delta": "running_delta",
    "dpop_lambda": "penalty",
    "r_dpo_alpha": "length_penalty",
    "beta_dpo_alpha": "beta_scaling",
    "beta_dpo_momentum": "momentum",
    "beta_dpo_rho": "keep_share",
    "odpo_alpha": "offset_weight",
    "odpo_offset": "offset_scale",
    "tdpo_alpha": "divergence_weight",
    "dpo_use_weighting": "use_weighting",
    "nca_alpha": "temperature",
    "tpo_alpha": "gold_weight",
    "tpo_gamma": "target_margin",
    "simpo_gamma": "gamma",
    "alphapo_alpha": "reward_alpha",
    "cpo_alpha": "cpo_alpha",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
}
"""Key to the field it sets, which belongs to one key alone."""

BETA_OF = {"dpo_beta": ("dpo", "ipo"), "orpo_alpha": ("orpo",)}
"""Keys that mean beta for some `rl` only."""

LOSS_TYPES = tuple(f"{family}_loss_type" for family in FAMILIES)

OWN = ("rl_beta", *BETA_OF, *HYPERPARAMETERS, *LOSS_TYPES, "dpo_loss_weights")
"""Keys that mean nothing without `rl`."""

KEYS = ("rl", "trl", *OWN)
"""All keys read here."""

Fields = dict[str, tuple[Any, Key]]
"""Field to its value and the key that set it."""


def method(settings: Settings) -> Outcomes:
    """The preference method and its hyperparameters."""
    name = settings.get("rl")
    if name is None:
        yield from (
            Refuse(key, "has no effect without rl; write rl: dpo, or remove it")
            for key in OWN
            if key in settings
        )
        return
    if not isinstance(name, str) or name not in RL:
        yield Refuse("rl", unknown_method(name))
        return
    losses = yield from _losses(name, settings)
    fields = yield from _fields(name, losses, settings)
    if all(_is_zero(fields.get(side)) for side in ("desirable_weight", "undesirable_weight")):
        yield Refuse("kto_undesirable_weight", "with kto_desirable_weight: 0 nothing is learned; raise one")
    weights = settings.get("dpo_loss_weights")
    if len(losses) == 1:
        if weights == [1.0]:
            yield Note("dpo_loss_weights", "one loss has all the weight")
        elif weights is not None:
            yield Refuse(
                "dpo_loss_weights", "one loss has all the weight; name more in dpo_loss_type, or remove it"
            )
        yield Put("method.name", losses[0].model_fields["name"].default, "rl")
        yield from (Put(f"method.{field}", value, key) for field, (value, key) in fields.items())
        return
    if name == "dpo" and not any(map(_stands_alone, losses)):  # or that is said already
        yield from _mixture(losses, fields, weights)


def chosen(settings: Settings) -> tuple[type[MethodConfig], ...]:
    """The losses that are asked for; nothing where that is not clear."""
    name = settings.get("rl")
    if not isinstance(name, str) or name not in RL:
        return ()
    types = _as_list(settings.get(f"{name}_loss_type", RL[name].loss_type))
    family = FAMILIES.get(name, {str(RL[name].loss_type): RL[name]})
    return tuple(family[str(each)] for each in types if str(each) in family)


def why_no_reference(settings: Settings) -> str | None:
    """Why there is nothing the policy is compared with; None where there is, or where `rl` is no method."""
    losses = chosen(settings)
    if settings.get("rl") is None:
        return "there is no reference without rl"
    free = bool(losses) and not any(loss.needs_reference for loss in losses)
    return f"{losses[0].written()} has no reference" if free else None


def key_of(field: str, settings: Settings) -> Key:
    """The key that sets a hyperparameter in `settings`."""
    if field == "beta":
        given = _betas(settings)
        return given[0][0] if given else "rl_beta"
    return next(key for key, target in HYPERPARAMETERS.items() if target == field)


def _losses(name: str, settings: Settings) -> Deciding[list[type[MethodConfig]]]:
    """Yields what is wrong with the loss types; returns the losses, at least one."""
    own = f"{name}_loss_type"
    for key in LOSS_TYPES:
        if key in settings and key != own:
            family = key.removesuffix("_loss_type")
            yield Refuse(key, f"has no effect with rl: {name}; it belongs to rl: {family}; remove it")
    if own not in settings or own not in LOSS_TYPES:
        return [RL[name]]
    known = FAMILIES[name]
    types = _as_list(settings[own])
    unknown = [each for each in types if not isinstance(each, str) or each not in known]
    if unknown or not types:
        yield Refuse(own, unknown_loss(name, unknown[0] if unknown else None))
        return [RL[name]]
    if len(set(types)) < len(types):
        yield Refuse(own, "names a loss twice; give it one weight in dpo_loss_weights")
        return [RL[name]]
    alone = [each for each in types if _stands_alone(known[each])]
    if len(types) > 1 and alone:
        more = "scores" if known[alone[0]].needs_scores else "whole distributions"
        yield Refuse(own, f"{alone[0]} reads {more} and is no part of a weighted sum")
    if len(types) > 1 and name != "dpo":
        yield Refuse(own, "takes one loss; weighted sums are for rl: dpo")
    return [known[each] for each in types]


def _stands_alone(loss: type[MethodConfig]) -> bool:
    """Whether a loss reads more than the log-probs that those of a weighted sum share."""
    return loss.needs_scores or loss.needs_distribution


def _fields(name: str, losses: list[type[MethodConfig]], settings: Settings) -> Deciding[Fields]:
    """Yields what is wrong with the hyperparameters; returns those that some loss has."""
    fields: Fields = {}
    for key, field in HYPERPARAMETERS.items():
        if key in settings and any(field in loss.model_fields for loss in losses):
            fields[field] = (settings[key], key)
        elif key in settings:
            yield _without_effect(key, settings[key], losses, _owners(field))
    yield from _divergence(losses, settings)
    given = _betas(settings)
    for setter, value in given:
        readers = BETA_OF.get(str(setter), (name,))
        if name not in readers:
            yield _without_effect(setter, value, losses, f"rl: {' or '.join(readers)}")
        elif not any("beta" in loss.model_fields for loss in losses):
            yield _without_effect(setter, value, losses, "the other losses")
        elif setter != given[0][0] and as_number(value) != as_number(given[0][1]):
            first, number = given[0]
            yield Refuse(setter, f"contradicts {dotted(as_path(first))}: {number}; both mean beta: keep one")
        else:
            fields["beta"] = (value, setter)
    return fields


def _mixture(losses: list[type[MethodConfig]], fields: Fields, weights: Any) -> Outcomes:
    if weights is None:
        weights = [1.0] * len(losses)
    if not isinstance(weights, list) or len(weights) != len(losses):
        yield Refuse(
            "dpo_loss_weights", f"must be a list of {len(losses)} numbers, one for each dpo_loss_type"
        )
        weights = [1.0] * len(losses)
    if "rpo_alpha" in fields:
        yield Refuse("rpo_alpha", "is for one loss; add sft to dpo_loss_type and its weight instead")
    parts = [
        {field: value for field, (value, _) in fields.items() if field in loss.model_fields}
        | {"name": loss.model_fields["name"].default}
        for loss in losses
    ]
    yield Put("method.name", "mixture", "dpo_loss_type")
    yield Put("method.losses", parts, "dpo_loss_type")
    yield Put("method.weights", weights, "dpo_loss_weights")


def _divergence(losses: list[type[MethodConfig]], settings: Settings) -> Outcomes:
    kind = settings.get("f_divergence_type")
    if "f_alpha_divergence_coef" in settings and kind != "alpha_divergence":
        yield Refuse("f_alpha_divergence_coef", "has no effect without f_divergence_type: alpha_divergence")
    deaf = [
        str(loss.loss_type)
        for loss in losses
        if loss.needs_reference and "f_divergence_type" not in loss.model_fields
    ]
    if kind not in (None, "reverse_kl") and 0 < len(deaf) < len(losses):
        yield Refuse(
            "f_divergence_type", f"is not defined for {', '.join(deaf)}, which read more than the margin"
        )


def _without_effect(key: Key, value: Any, losses: list[type[MethodConfig]], owners: str) -> Refuse | Note:
    names = " + ".join(loss.model_fields["name"].default for loss in losses)
    if not value:
        return Note(key, f"{names} has no such term")
    return Refuse(key, f"has no effect with {names}; it belongs to {owners}; remove it")


def _owners(field: str) -> str:
    """The losses that have `field`, as a user writes them."""
    owners = [
        f"rl: {name}" for name, loss in RL.items() if loss.family is None and field in loss.model_fields
    ]
    for family, losses in FAMILIES.items():
        types = [loss_type for loss_type, loss in losses.items() if field in loss.model_fields]
        if len(types) == len(losses):
            owners.append(f"rl: {family}")
        elif types:
            owners.append(f"{family}_loss_type: {', '.join(types)}")
    return " or ".join(owners)


def _betas(settings: Settings) -> list[tuple[Key, Any]]:
    """Every key that sets beta, with its value."""
    trl = settings.get("trl")
    given: list[tuple[Key, Any]] = [(key, settings[key]) for key in ("rl_beta", *BETA_OF) if key in settings]
    if isinstance(trl, dict) and trl.get("beta") is not None:
        given.append((("trl", "beta"), trl["beta"]))
    return given


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_zero(given: tuple[Any, Key] | None) -> bool:
    return given is not None and as_number(given[0]) == 0


def as_number(value: Any) -> Any:
    """`value` as a number, if it is one in any spelling."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
