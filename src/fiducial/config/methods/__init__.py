"""What a user may set for each preference method, and what the planner must know of it.

One small class a loss: its hyperparameters with the paper's names and defaults, whether it needs a reference,
and where it comes from. The formula itself is a function in `fiducial.losses`, which maps each class to it.
"""

from typing import Annotated, get_args

from pydantic import Field

from fiducial.config.methods.dpo import (
    DiscoPOPConfig,
    DPOConfig,
    EXOPairConfig,
    HingeConfig,
    IPOConfig,
    RDPOConfig,
    RobustConfig,
    SigmoidNormConfig,
)
from fiducial.config.methods.dpo_family import DPOFamily, MixtureConfig
from fiducial.config.methods.kto import APOZeroUnpairedConfig, KTOConfig
from fiducial.config.methods.lists import InfoNCAConfig, NCAConfig, PlackettLuceConfig, TPOConfig, TPOLConfig
from fiducial.config.methods.log_ratios import (
    APODownConfig,
    APOZeroConfig,
    CalDPOConfig,
    DPOPConfig,
    NCAPairConfig,
    SPPOHardConfig,
)
from fiducial.config.methods.margins import ODPOConfig, TDPO1Config, TDPO2Config
from fiducial.config.methods.method import MethodConfig
from fiducial.config.methods.reference_free import (
    AlphaPOConfig,
    CPOConfig,
    CPOHingeConfig,
    CPOIPOConfig,
    ORPOConfig,
    SimPOConfig,
)
from fiducial.config.methods.whole_step import (
    AOTConfig,
    AOTUnpairedConfig,
    BCOPairConfig,
    BetaDPOConfig,
    SFTConfig,
)

__all__ = [
    "METHODS",
    "AOTConfig",
    "AOTUnpairedConfig",
    "APODownConfig",
    "APOZeroConfig",
    "APOZeroUnpairedConfig",
    "AlphaPOConfig",
    "AnyMethod",
    "BCOPairConfig",
    "BetaDPOConfig",
    "CPOConfig",
    "CPOHingeConfig",
    "CPOIPOConfig",
    "CalDPOConfig",
    "DPOConfig",
    "DPOPConfig",
    "DiscoPOPConfig",
    "EXOPairConfig",
    "HingeConfig",
    "IPOConfig",
    "InfoNCAConfig",
    "KTOConfig",
    "MethodConfig",
    "MixtureConfig",
    "NCAConfig",
    "NCAPairConfig",
    "ODPOConfig",
    "ORPOConfig",
    "PlackettLuceConfig",
    "RDPOConfig",
    "RobustConfig",
    "SFTConfig",
    "SPPOHardConfig",
    "SigmoidNormConfig",
    "SimPOConfig",
    "TDPO1Config",
    "TDPO2Config",
    "TPOConfig",
    "TPOLConfig",
]

SingleMethod = (
    DPOFamily
    | ODPOConfig
    | TDPO1Config
    | TDPO2Config
    | KTOConfig
    | APOZeroUnpairedConfig
    | ORPOConfig
    | SimPOConfig
    | CPOConfig
    | CPOHingeConfig
    | CPOIPOConfig
    | AlphaPOConfig
    | PlackettLuceConfig
    | InfoNCAConfig
    | NCAConfig
    | TPOConfig
    | TPOLConfig
)

AnyMethod = Annotated[SingleMethod | MixtureConfig, Field(discriminator="name")]

METHODS: tuple[type[MethodConfig], ...] = get_args(SingleMethod)
"""Every method but the mixture, in the order of the union above."""
