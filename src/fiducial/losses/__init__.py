"""The losses: one visible table from what a user writes to the function that computes it."""

from collections.abc import Callable
from functools import partial

from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from fiducial.errors import ConfigError
from fiducial.logps import SequenceLogps
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import cpo_loss, dpo_loss, ipo_loss, orpo_loss, simpo_loss

Loss = Callable[[SequenceLogps, SequenceLogps | None], LossOutput]

LOSSES: dict[type[MethodConfig], Callable[..., LossOutput]] = {
    methods.DPOConfig: dpo_loss,
    methods.IPOConfig: ipo_loss,
    methods.ORPOConfig: orpo_loss,
    methods.SimPOConfig: simpo_loss,
    methods.CPOConfig: cpo_loss,
}


def build_loss(method: MethodConfig) -> Loss:
    """The loss of `method` with its hyperparameters set, as (policy, reference) to one value per pair.

    Raises:
        ConfigError: the method cannot be trained, or its beta of 0 leaves nothing to learn.
    """
    function = LOSSES.get(type(method))
    if function is None:
        raise ConfigError(
            f"rl: {method.model_dump()['name']} can be planned but not trained by this version; "
            f"trainable: {', '.join(sorted(config.model_fields['name'].default for config in LOSSES))}."
        )
    settings = method.model_dump(exclude={"name"})
    if method.needs_reference and settings["beta"] == 0:
        raise ConfigError("rl_beta: 0 makes the loss constant: nothing is learned. Write 0.1, say.")
    loss = partial(function, **settings)

    def paired(policy: SequenceLogps, reference: SequenceLogps | None) -> LossOutput:
        if method.needs_reference:
            assert reference is not None, f"{type(method).__name__} needs reference log-probs"
            return loss(policy.pairs(), reference.pairs())
        return loss(policy.pairs())

    return paired
