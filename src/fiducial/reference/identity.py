"""What makes two references the same one: the weights that answer, and the numerics they answer in.

Only *effective* weights count (`fingerprint.py`). The layout of a batch is not part of it: a model is packed
only where that was measured to change nothing. Imports no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fiducial.reference.kinds import Checkpoint

FORMAT = 2
"""Raised when records are stored another way."""
SCORING = 1
"""Raised when the scoring path gives other numbers for the same weights and tokens, beyond rounding."""
SERVED = "served"
"""In place of a precision: what a server computes in is its own business."""

_TOLD_ONLY = ("checkpoint", "fingerprint")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Effective weights by name, and the settings they are computed with."""

    tensors: Mapping[str, str]
    """Name without an adapter's wrapping to a hash of dtype, shape and every bit."""
    settings: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Equal for equal weights and settings."""
        lines = sorted(f"{name} {digest}" for name, digest in self.tensors.items())
        return _hash("\n".join([*lines, json.dumps(self.settings, sort_keys=True)]))


@dataclass(frozen=True, slots=True)
class Identity:
    """Which reference, in which numerics."""

    checkpoint: str
    """Where it was loaded from; told to people, not compared: a moved folder holds the same weights."""
    weights: str
    """Hash of the effective weights and the config they are computed with."""
    dtype: str
    autocast: str
    matmul: str = "ieee"
    """How products of float32 numbers are made: ieee, or tf32."""
    scoring: int = SCORING
    format: int = FORMAT
    fingerprint: Fingerprint | None = field(default=None, compare=False, repr=False)
    """What `weights` is the hash of, so that a difference has a name."""

    @property
    def digest(self) -> str:
        """Equal for equal references."""
        return digest_of(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The identity as plain values, which a folder of records keeps as its manifest."""
        return asdict(self)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The digest of the identity that `manifest` holds as plain values."""
    fields = {name: value for name, value in manifest.items() if name not in _TOLD_ONLY}
    return _hash(json.dumps(fields, sort_keys=True))


def identify_served(checkpoint: Checkpoint) -> Identity:
    """The identity of a model on a server, which only its names tell."""
    settings = {
        "endpoint": checkpoint.endpoint,
        "model": checkpoint.path,
        "revision": checkpoint.revision,
    }
    found = Fingerprint({}, settings)
    return Identity(checkpoint.path, found.digest, SERVED, SERVED, SERVED, fingerprint=found)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
