"""Names of the methods: what `rl` and the loss types may be, and papers' names that are written otherwise."""

from typing import Any

from fiducial.config.methods import METHODS, MethodConfig, MixtureConfig

ONLINE_METHODS = ("grpo", "gdpo", "ebft")

_ALL: tuple[type[MethodConfig], ...] = (*METHODS, MixtureConfig)
BY_NAME: dict[str, type[MethodConfig]] = {method.model_fields["name"].default: method for method in _ALL}
"""Every config class by its `name`."""

FAMILIES: dict[str, dict[str, type[MethodConfig]]] = {
    family: {str(method.loss_type): method for method in METHODS if method.family == family}
    for family in dict.fromkeys(method.family for method in METHODS if method.family is not None)
}
"""Family to its losses by `loss_type`."""

RL: dict[str, type[MethodConfig]] = {
    name: method
    for name, method in BY_NAME.items()
    if method.family in (None, name) or name == "ipo"  # axolotl's second way to write it
}
"""What `rl` may be, and the loss it means alone."""

ELSEWHERE = {
    "slic": "rl: cpo and cpo_loss_type: hinge",
    "cdpo": "rl: dpo and dpo_label_smoothing",
    "rpo": "rl: dpo and rpo_alpha",
    "wpo": "rl: dpo and dpo_use_weighting: true",
    "ld_dpo": "rl: dpo and ld_alpha",
    "f_dpo": "rl: dpo and f_divergence_type",
    "mpo": "rl: dpo, a list in dpo_loss_type and dpo_loss_weights",
    "rdpo": "rl: dpo and dpo_loss_type: robust, or r_dpo for the length-regularised one",
    "sppo": "rl: dpo and dpo_loss_type: sppo_hard",
    "tdpo": "rl: dpo and dpo_loss_type: tdpo2",
    "exo": "rl: dpo and dpo_loss_type: exo_pair",
    "bco": "rl: dpo and dpo_loss_type: bco_pair",
    "apo": "rl: dpo and dpo_loss_type: apo_zero or apo_down",
    "kto_pair": "rl: kto, which takes pairs apart",
}
"""Names of papers, and older ones of other tools, that are written otherwise."""


def unknown_method(name: Any) -> str:
    """What is wrong with a value of `rl` that names no method, and what to write."""
    if name in ONLINE_METHODS:
        return "generates while it trains; Fiducial learns from given preferences: use another tool or dpo"
    written = _written(name)
    return f"write {written}" if written else f"no such method; write one of {', '.join(RL)}"


def unknown_loss(family: str, name: Any) -> str:
    """What is wrong with a value of `<family>_loss_type` that names no loss of it, and what to write."""
    several = ", or a list of them" if family == "dpo" else ""
    written = _written(name) if name != family else None
    return f"write {written}" if written else f"must be one of {', '.join(FAMILIES[family])}{several}"


def _written(name: Any) -> str | None:
    """How the method of that name is written; None where there is none."""
    plain = str(name).lower().replace("-", "_")
    if plain in RL:
        return f"rl: {plain}"
    if (written := ELSEWHERE.get(plain)) is not None:
        return written
    for method in METHODS:
        if plain in (method.model_fields["name"].default, str(method.loss_type).replace("-", "_")):
            return method.written().replace(", ", " and ")
    return None
