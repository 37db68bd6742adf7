"""Generation settings that can be saved beside the aligned model.

transformers saves none that it finds odd once a token of theirs has changed, as it does for a run whose
tokenizer pads with another. That would come to light after training.
"""

import logging

from transformers import PreTrainedModel

logger = logging.getLogger("fiducial")

_OF_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_OF_BEAMS = ("early_stopping", "length_penalty")


def make_savable(model: PreTrainedModel, path: str) -> None:
    """Leave out settings that nothing reads: of sampling where it is off, of beams where there are none."""
    settings = model.generation_config
    if settings is None:
        return
    unread = (() if settings.do_sample else _OF_SAMPLING) + (
        () if (settings.num_beams or 1) > 1 else _OF_BEAMS
    )
    left_out = [name for name in unread if getattr(settings, name, None) is not None]
    for name in left_out:
        setattr(settings, name, None)
    if left_out:
        logger.info(
            "%s: generation_config.json sets %s, which nothing reads as it is; left out.",
            path,
            ", ".join(left_out),
        )
