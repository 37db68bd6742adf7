"""Fiducial: preference alignment that treats the reference model as half of the loss.

The public names load on first use, so that planning a run does not import torch.
"""

from importlib import import_module
from typing import Any

from fiducial._version import VERSION

__version__ = VERSION

_HOME = {
    "DictDefault": "fiducial.config.load",
    "RunConfig": "fiducial.config.schema",
    "load_config": "fiducial.config.load",
    "ModelLoader": "fiducial.model.loader",
    "plan_reference": "fiducial.reference.plan",
    "setup_reference_model": "fiducial.train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fiducial' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
