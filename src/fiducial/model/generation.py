"""Generation settings that can be saved beside the aligned model.

transformers saves none that it finds odd once a token of theirs has changed, as it does for a run whose
tokenizer pads with another. That would come to light after training.
"""

import logging
from tempfile import TemporaryDirectory

from transformers import GenerationConfig, PreTrainedModel

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
    """Leave out, where they cannot be saved, settings of sampling that is off and of beams there are none of.

    Servers may sample by them all the same: settings that can be saved stay as they are.
    """
    settings = model.generation_config
    if settings is None or _is_savable(settings):
        return
    unread = (() if settings.do_sample else _OF_SAMPLING) + (
        () if (settings.num_beams or 1) > 1 else _OF_BEAMS
    )
    left_out = [name for name in unread if getattr(settings, name, None) is not None]
    for name in left_out:
        setattr(settings, name, None)
    if left_out:
        logger.warning(
            "%s: generation_config.json sets %s without do_sample or num_beams, which transformers does not "
            "save again: left out beside the aligned model.",
            path,
            ", ".join(left_out),
        )


def _is_savable(settings: GenerationConfig) -> bool:
    with TemporaryDirectory() as folder:
        try:
            settings.save_pretrained(folder)
        except ValueError:
            return False
    return True
