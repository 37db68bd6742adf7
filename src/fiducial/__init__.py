"""Fiducial: preference alignment that treats the reference model as half of the loss.

The public names load on first use, so that planning a run does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fiducial._version import VERSION

if TYPE_CHECKING:  # the names of `_HOME` once more, for type checkers and editors
    from fiducial.config.load import DictDefault as DictDefault
    from fiducial.config.load import load_config as load_config
    from fiducial.config.load import validate_config as validate_config
    from fiducial.config.schema import RunConfig as RunConfig
    from fiducial.model.loader import ModelLoader as ModelLoader
    from fiducial.reference.facts import gather_facts as gather_facts
    from fiducial.reference.plan import plan_reference as plan_reference
    from fiducial.train import setup_reference_model as setup_reference_model

__version__ = VERSION

_HOME = {
    "DictDefault": "fiducial.config.load",
    "RunConfig": "fiducial.config.schema",
    "load_config": "fiducial.config.load",
    "validate_config": "fiducial.config.load",
    "ModelLoader": "fiducial.model.loader",
    "gather_facts": "fiducial.reference.facts",
    "plan_reference": "fiducial.reference.plan",
    "setup_reference_model": "fiducial.train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fiducial' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
